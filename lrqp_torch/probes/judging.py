"""What a fit tells its user unasked: too few samples, chance, unequal classes, and sinks."""

import math

import numpy as np
import torch
from torch import Tensor

from lrqp_torch.errors import LabelError, ProbeWarning, warn
from lrqp_torch.probes.fitting import FitReport, Problem

UNEQUAL = 5.0
"""How many times as large as the smallest class the largest may be."""

FAR = 5.0
"""How many times as far from the median as half of the rows a row must be to be called a sink."""

WIDE = 10.0
"""How many times the standard deviation of half of the coordinates that of one must be."""

KURTOSIS = 5.0
"""Of the lengths of activations, beyond which few of them carry the variance."""

LOOKED_AT = 256
"""Rows from which the median of each coordinate is taken, at most."""

NUMBERS = 2**16
"""Numbers of activations that are read at a time, of so many rows at least."""


def judge(report: FitReport, width: int, accuracy: float | None) -> None:
    """Warn of a fit whose result says little.

    Args:
        report: of the fit.
        width: d.
        accuracy: on the examples that were fitted; None if it is not known.
    """
    n, counts, chance = report.n_samples, report.counts, report.chance
    parameters = len(counts) * (width + 1)
    if n < parameters:
        warn(
            ProbeWarning,
            f"{n} activations of width {width} are fewer than the {parameters} numbers of the "
            f"probe: random labels would mostly be separated too (for two classes Cover 1965); "
            f"give more prompts, or ask for held_out=0.2",
        )
    if max(counts) > UNEQUAL * min(counts):
        small = counts.index(min(counts))
        warn(
            ProbeWarning,
            f"class {small} has {min(counts):g} of {sum(counts):g} examples, the largest class "
            f"{max(counts):g}: the probe leans to the largest; give more of the others, or "
            f"class_weight='balanced'",
        )
    if report.held_out is not None:
        found, size, excess, where = report.held_out, report.held_out_samples, 0.0, "held out"
    elif accuracy is not None and n >= parameters:
        # By simulation, labels drawn at random are fitted about so much better than by chance.
        excess = (1 - chance) * math.sqrt(width / n)
        found, size, where = accuracy, n, "that it was fitted to"
    else:
        return
    if found <= chance + excess + 2 * math.sqrt(chance * (1 - chance) / size):
        warn(
            ProbeWarning,
            f"the probe reads no more than chance: {found:.1%} of {size} activations {where} are "
            f"right, as with random labels; the most frequent class alone gives {chance:.1%}. What "
            f"it asks for may not be there, or l2={report.l2:.1e} be too strong for the "
            f"activations' size",
        )


def check_sinks(x: Tensor) -> None:
    """Warn of few activations, or few coordinates of (n, d), that carry most of the variance."""
    if len(x) == 0:
        return
    x = x.detach()
    looked_at = LOOKED_AT if x.device.type == "cpu" else 16 * LOOKED_AT
    if len(x) > looked_at:
        # At random: one row in so many may be the first token of each of the prompts.
        generator = torch.Generator("cpu").manual_seed(0)
        rows = torch.randint(len(x), (looked_at,), generator=generator, device="cpu")
        sample = x[rows.to(x.device)].float()
    else:
        sample = x.float()
    if sample.device.type == "cpu":
        # Up to ten times as fast as torch's median.
        middle = (len(sample) - 1) // 2
        columns = np.partition(sample.T.contiguous().numpy(), middle, axis=1)
        centre = torch.from_numpy(columns[:, middle].copy())
    else:
        centre = sample.median(0).values
    count = max(len(sample), NUMBERS // max(1, x.shape[1]))
    rows, room = sample.new_empty(len(x)), sample.new_empty(count, x.shape[1])
    for part, lengths in zip(x.split(len(room)), rows.split(len(room)), strict=True):
        # In place: pages of new memory would take many times as long.
        apart = torch.sub(part, centre, out=room[: len(part)])
        torch.linalg.vector_norm(apart, dim=1, out=lengths)
    rows.square_()
    far = rows > FAR**2 * rows.median()
    share = float(rows[far].sum() / rows.sum())
    if share > 0.5:
        which = far.nonzero().flatten().tolist()
        most = int((x[far].float() - centre).square().sum(0).argmax())
        _warn_of_sinks(
            f"{len(which)} of {len(x)} activations (the first are {which[:5]})", share, most
        )
    else:
        _check_coordinates((sample - centre).square().sum(0))


def check_moments(squares: Tensor, fourth: Tensor, n_samples: int) -> None:
    """The same from moments about the mean, which do not tell which activations these are.

    Args:
        squares: Σ y², (d,).
        fourth: Σ ‖y‖⁴. Where a share f of the activations carries all the variance, the kurtosis
            n Σ ‖y‖⁴ / (Σ ‖y‖²)² is 1 / f, less 3 or so; for isotropic Gaussian ones 1 + 2 / d.
        n_samples: n.
    """
    kurtosis = float(n_samples * fourth / squares.sum().square())
    if kurtosis > KURTOSIS:
        _warn_of_sinks(f"about one activation in {kurtosis:.0f}", None, int(squares.argmax()))
    else:
        _check_coordinates(squares)


def _check_coordinates(squares: Tensor) -> None:
    wide = squares > WIDE**2 * squares.median()
    share = float(squares[wide].sum() / squares.sum())
    if share > 0.5:
        warn(
            ProbeWarning,
            f"{int(wide.sum())} of {len(squares)} coordinates (the first are "
            f"{wide.nonzero().flatten()[:5].tolist()}) carry {share:.0%} of the variance, so edits "
            f"would mostly go there; leave them out, or fit with standardise=True",
        )


def _warn_of_sinks(which: str, share: float | None, coordinate: int) -> None:
    carry = "most" if share is None else f"{share:.0%}"
    warn(
        ProbeWarning,
        f"{which} dwarf the others and carry {carry} of the variance, most of it in coordinate "
        f"{coordinate}, so edits would mostly go there; were first tokens, which are attention "
        f"sinks, or padding captured along with the rest? Leave them out",
    )


def split(problem: Problem, share: float, seed: int) -> tuple[Problem, Problem]:
    """The examples to fit on, and a random share of each class to hold out.

    Raises:
        LabelError: a share that leaves nothing to fit on, or nothing to hold out.
    """
    if not 0 < share < 1:
        raise LabelError(f"held_out must be a share from 0 to 1, or a pair (x, y), got {share}")
    order = torch.randperm(
        len(problem.x), generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    )
    labels = problem.labels.cpu()[order]
    chosen = torch.zeros(len(order), dtype=torch.bool, device="cpu")
    for number in range(len(problem.counts)):
        rows = order[labels == number]
        chosen[rows[: min(round(share * len(rows)), len(rows) - 1)]] = True
    if not bool(chosen.any()):
        raise LabelError(f"no class has enough examples to hold out a share of {share} of them")
    return problem.take(~chosen), problem.take(chosen)
