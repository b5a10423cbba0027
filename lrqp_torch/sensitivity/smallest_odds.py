"""The smallest odds that flip each prompt's answer, found through the edit's own derivative.

With the rule ``fixed``, the edit of an activation x is a path x'(a) in a = log α: it stays at x up
to the log odds that the probe reads already, and moves from there. The number f that is read from
the logits, positive in the clean run, is followed along this path by Newton's method,
a ← a − f(x'(a)) / (d/da) f(x'(a)), whose derivative passes through the quadratic program and the
rest of the model; a bracket in which f changes its sign makes it safe.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import SettingError, quoted
from lrqp_torch.qp import Status
from lrqp_torch.sensitivity.readout import Readout, SiteReadout
from lrqp_torch.stream.replay import frozen

LEAST_TOLERANCE = 1e-9
"""Narrower brackets would come near the spacing of float64 at large log odds."""


@dataclass(frozen=True)
class SmallestOdds:
    """Where each of n prompts flips, float64.

    Attributes:
        log_odds: log α at which f is negative while it is not ``tolerance`` below: a crossing in
            the first step of the scan that saw one, (n,). −inf where f is not positive in the clean
            run, so that no edit is needed; +inf where f stays positive at every log α of the scan,
            or the target cannot be reached.
        start: log odds of the target that the probe reads without an edit, (n,); an edit begins
            above it.
        slope: df/da at the crossing, (n,), per nat; NaN where there is none.
        rounds: passes through the layers above after the scan, the most of any prompt.
    """

    log_odds: Tensor
    start: Tensor
    slope: Tensor
    rounds: int

    @property
    def flips(self) -> Tensor:
        """Whether an edit flips the prompt, (n,) bool."""
        return torch.isfinite(self.log_odds)


def smallest_odds(
    model: nn.Module,
    site: str,
    edit: LRQP,
    inputs: Mapping[str, Tensor],
    positions: Tensor,
    target: Tensor | int,
    read: Tensor,
    reading: Readout,
    *,
    highest: float = 50.0,
    scan: int = 12,
    tolerance: float = 1e-3,
    method: Literal["newton", "bisection"] = "newton",
    batch_size: int = 32,
) -> SmallestOdds:
    """The least log α at which an edit makes f negative, for each prompt.

    f need not fall with α, so no method that evaluates it finitely often can promise the least α
    of all. Here f is first evaluated at ``scan`` equal steps from where the edit begins to
    ``highest``, and the first step at whose end it is negative is searched. What is returned is one
    crossing within that step: the only one if f falls there. A pair of crossings within an earlier
    step is missed; more steps miss less.

    Args:
        model: a transformers causal language model in evaluation mode; it is not changed.
        site: where to edit.
        edit: its probe and metric; α is ours, applied as with rule ``fixed``.
        inputs: ``input_ids`` and ``attention_mask``, (n, T), and ``position_ids`` where padded.
        positions: column to edit, LongTensor (n,).
        target: class to write, one for all or (n,).
        read: column whose logits ``reading`` is given, LongTensor (n,).
        reading: f, positive where the answer has not flipped; each row must depend on its own
            prompt alone.
        highest: largest log α to try, in nats.
        scan: steps of the scan.
        tolerance: width of the bracket that is left, in nats.
        method: ``"bisection"`` uses no derivative, and is a check of ``"newton"``.
        batch_size: prompts a pass.

    Raises:
        SettingError: an option out of its range.
        LRQPError: a model in training mode.
        NonFiniteError: f or its derivative is NaN or infinite.
        SiteError, PositionError, WidthError, TargetError: bad input, named.

    Source: safeguarded Newton as in Press et al., "Numerical Recipes", section 9.4, on a batch.
    """
    limits: dict[str, tuple[Any, type[Integral] | type[Real], float]] = {
        "scan": (scan, Integral, 1),
        "batch_size": (batch_size, Integral, 1),
        "tolerance": (tolerance, Real, LEAST_TOLERANCE),
        "highest": (highest, Real, -sys.float_info.max),
    }
    for name, (value, kind, least) in limits.items():
        if not isinstance(value, kind) or not least <= float(value) < math.inf:
            what = "an integer" if kind is Integral else "a finite number"
            raise SettingError(f"{name} must be {what}, at least {least:g}, got {quoted(value)}")
    if method not in ("newton", "bisection"):
        raise SettingError(f"method must be 'newton' or 'bisection', got {quoted(method)}")
    run = SiteReadout(model, site, inputs, positions, read, reading, batch_size=batch_size)
    target = edit.row_classes(target, run.read, "target")
    found = [
        _search(_Path(run, edit, rows, target[rows]), highest, scan, tolerance, method == "newton")
        for rows in run.batches()
    ]
    return SmallestOdds(
        torch.cat([item.log_odds for item in found]),
        torch.cat([item.start for item in found]),
        torch.cat([item.slope for item in found]),
        max(item.rounds for item in found),
    )


class _Path:
    """f along the edits of a batch, as a function of log α, (B,)."""

    def __init__(self, run: SiteReadout, edit: LRQP, rows: Tensor, target: Tensor) -> None:
        self.run, self.edit, self.rows, self.target = run, edit, rows, target
        self.x = run.activations(rows)
        with torch.no_grad():
            self.geometry = edit.geometry(self.x.device)
            self.start = self.geometry.margins(self.x, target).amin(-1)
            self.clean = run.value(rows, self.x)

    def value(self, log_odds: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """The reading f of the prompts ``which``, and whether they can reach the target."""
        with torch.no_grad():
            moved, reached = self._edit(log_odds, which)
            return self.run.value(self.rows[which], moved), reached

    def slope(self, log_odds: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """The reading f of the prompts ``which``, and df/da."""
        with frozen(self.run.model), torch.enable_grad():
            leaf = log_odds.detach().requires_grad_(True)
            moved, _ = self._edit(leaf, which)
            value, gradient = self.run.gradient(self.rows[which], moved)
            (slope,) = torch.autograd.grad((moved * gradient).sum(), [leaf])
        return value, slope

    def _edit(self, log_odds: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        x, target = self.x[which], self.target[which]
        # In float64: read back in the stream's dtype, α would be a staircase of tiny steps.
        solution = self.edit.qp.solve(x.double(), target, log_odds, self.geometry)
        return solution.x_new, solution.status != Status.INFEASIBLE


def _search(path: _Path, highest: float, scan: int, tolerance: float, newton: bool) -> SmallestOdds:
    start = path.start
    low, high = start.clone(), torch.full_like(start, torch.inf)
    waiting = (path.clean > 0) & (start < highest)
    for step in range(1, scan + 1):
        which = waiting.nonzero().flatten()
        if len(which) == 0:
            break
        trial = start[which] + (highest - start[which]) * step / scan
        value, reached = path.value(trial, which)
        crossed = reached & (value < 0)
        high[which[crossed]] = trial[crossed]
        stays = which[~crossed]
        low[stays] = trial[~crossed]
        waiting[which[crossed | ~reached]] = False

    open_ = torch.isfinite(high)
    trial, slope = (low + high) / 2, torch.full_like(start, torch.nan)
    previous = high - low
    rounds = 0
    while bool((open_ & (high - low > tolerance)).any()):
        rounds += 1
        which = (open_ & (high - low > tolerance)).nonzero().flatten()
        at = trial[which]
        if newton:
            value, tangent = path.slope(at, which)
        else:
            value, tangent = path.value(at, which)[0], torch.zeros_like(at)
        flipped = value < 0
        high[which] = torch.where(flipped, at, high[which])
        low[which] = torch.where(flipped, low[which], at)
        newtons = -value / tangent
        # Newton alone closes the bracket from one side only: a step beyond the root, by less than
        # the tolerance, makes the other side follow.
        guess = at + newtons + torch.where(flipped, -0.4, 0.4) * tolerance
        # Steps that do not shrink by half, or that should have closed the bracket, give way to
        # bisection, so that the search ends however f behaves.
        inside = (guess > low[which]) & (guess < high[which])
        shrinks = (newtons.abs() <= previous[which] / 2) & (previous[which] > tolerance / 4)
        good = inside & shrinks
        middle, half = (low + high)[which] / 2, (high - low)[which] / 2
        trial[which] = torch.where(good, guess, middle)
        previous[which] = torch.where(good, newtons.abs(), half)

    log_odds = torch.where(path.clean > 0, high, -torch.inf)
    crossing = torch.isfinite(log_odds).nonzero().flatten()
    if len(crossing):
        slope[crossing] = path.slope(log_odds[crossing], crossing)[1]
    return SmallestOdds(log_odds, start, slope, rounds)
