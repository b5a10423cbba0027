"""What the edited belief does to the circuit: S-inhibition heads report it, name movers follow it.

The belief about the order is edited at S2, at one site, towards the true order (control) and
towards the other one (counterfactual). Downstream, at END:

* Linear probes read the order from the outputs of the S-inhibition heads. They are fitted to clean
  runs of the training prompts, and asked what they read in each condition.
* The attention of name movers, negative and backup name movers to IO and to S1 is recorded in each
  condition, and how much of it moved elsewhere at all.

Source: the post "Intervening in the Residual Stream" (2023).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.stream.capture import capture
from lrqp_torch.stream.hooks import record_heads
from lrqp_torch.study.circuit_figures import draw, panels
from lrqp_torch.study.conditions import CONDITIONS, Conditions, run_conditions
from lrqp_torch.study.context import Advance, StudyContext, no_progress
from lrqp_torch.study.estimates import bootstrap_mean, wilson
from lrqp_torch.study.heads import HeadsResult
from lrqp_torch.study.roles import BACKUP, MOVER, NEGATIVE, S_INHIBITION, WRITER, parse_head
from lrqp_torch.study.running import in_batches

__all__ = [
    "AttentionReading",
    "CircuitResult",
    "Mean",
    "ProbeReading",
    "compute",
    "draw",
    "from_json",
    "panels",
    "work",
]

ALL = "all together"
"""Name of the probe that reads the outputs of all S-inhibition heads side by side."""


@dataclass(frozen=True)
class Mean:
    """A mean over held-out prompts, with its 95 % bootstrap interval and the values behind it.

    Attributes:
        mean: the mean.
        interval: lower and upper end.
        values: one a prompt, in the order of the prompts, rounded to 4 digits.
    """

    mean: float
    interval: list[float]
    values: list[float]


@dataclass(frozen=True)
class ProbeReading:
    """What one probe reads at END in one condition.

    The order asked for is the true one in the clean and control conditions, and the other one in
    the counterfactual condition.

    Attributes:
        head: the head whose output is read, or :data:`ALL`.
        condition: ``clean``, ``control`` or ``counterfactual``.
        reports: share of prompts for which the probe reads the order asked for.
        reports_interval: its 95 % Wilson interval.
        log_odds: the probe's log odds of the true order, in nats; below 0 it reads the other one.
    """

    head: str
    condition: str
    reports: float
    reports_interval: list[float]
    log_odds: Mean


@dataclass(frozen=True)
class AttentionReading:
    """Where one head looks from END in one condition.

    Attributes:
        head: such as ``"L9.H9"``.
        role: the role for which it was chosen.
        condition: ``clean``, ``control`` or ``counterfactual``.
        to_io: attention to IO.
        to_s1: attention to S1.
        moved: attention that lies elsewhere than in the clean run, ½ Σ |p − p_clean| over tokens.
    """

    head: str
    role: str
    condition: str
    to_io: Mean
    to_s1: Mean
    moved: Mean


@dataclass(frozen=True)
class CircuitResult:
    """The three conditions at one site.

    Attributes:
        site: where the belief is edited, at S2.
        prompts: held-out prompts.
        logit_difference: condition to IO − S at END, in logits.
        published: whether the heads are the published ones, or found by the program.
        roles: role to heads, as read here; a role without heads has an empty list.
        probes: readings by head and condition; empty if there is no S-inhibition head.
        attention: readings by head and condition; empty if no head has one of the roles.
    """

    site: str
    prompts: int
    logit_difference: dict[str, Mean]
    published: bool
    roles: dict[str, list[str]]
    probes: list[ProbeReading]
    attention: list[AttentionReading]


def work(context: StudyContext) -> int:
    """Units that :func:`compute` counts: every prompt once, to fit on or held out."""
    return len(context.task.train) + len(context.task.test)


@torch.no_grad()
def compute(
    context: StudyContext,
    site: str,
    edit: LRQP,
    heads: HeadsResult,
    advance: Advance = no_progress,
) -> CircuitResult:
    """Edit the belief at one site, and read S-inhibition heads and name movers downstream.

    Args:
        context: the model and its prompts.
        site: where to edit, at S2.
        edit: fitted to the training prompts at that site, as by :func:`~.flipping.fit_edits`.
        heads: the heads and their roles.
        advance: called with the number of prompts after each batch.
    """
    movers, readers = attention_roles(heads), heads.members(S_INHIBITION)
    probes = _fit_probes(context, readers, advance)
    watched = sorted({head for group in movers.values() for head in group}, key=parse_head)
    runs = run_conditions(context, site, edit, watched, readers, advance)
    generator = context.generator()
    return CircuitResult(
        site=site,
        prompts=len(context.task.test),
        logit_difference={
            name: _mean(runs.logit_difference[name], generator) for name in CONDITIONS
        },
        published=heads.published is not None,
        roles=movers | {S_INHIBITION: readers},
        probes=_read_probes(context, probes, runs, generator),
        attention=[
            AttentionReading(
                head=head,
                role=role,
                condition=condition,
                to_io=_mean(runs.attention[condition][head, "IO"], generator),
                to_s1=_mean(runs.attention[condition][head, "S1"], generator),
                moved=_mean(runs.moved[condition][head], generator),
            )
            for role, group in movers.items()
            for head in group
            for condition in CONDITIONS
        ],
    )


def attention_roles(heads: HeadsResult) -> dict[str, list[str]]:
    """Name movers of all three kinds; where there are none, answer writers, which always exist."""
    movers = {role: heads.members(role) for role in (MOVER, NEGATIVE, BACKUP)}
    return movers if movers[MOVER] else movers | {WRITER: heads.members(WRITER)}


def from_json(raw: dict[str, Any]) -> CircuitResult:
    """The result that ``dataclasses.asdict`` turned into ``raw``."""

    def means(item: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        return dict(item) | {name: Mean(**item[name]) for name in names}

    nested = {
        "logit_difference": {k: Mean(**item) for k, item in raw["logit_difference"].items()},
        "probes": [ProbeReading(**means(item, ["log_odds"])) for item in raw["probes"]],
        "attention": [
            AttentionReading(**means(item, ["to_io", "to_s1", "moved"]))
            for item in raw["attention"]
        ],
    }
    return CircuitResult(**(raw | nested))


def _fit_probes(
    context: StudyContext, readers: list[str], advance: Advance
) -> dict[str, LinearProbe]:
    """A probe of the order for each head's output at END, and one for all, from clean runs."""
    data = context.task.train
    layers = sorted({parse_head(name)[0] for name in readers})
    pieces: list[Tensor] = []
    for rows in in_batches(torch.arange(len(data)), context.batch_size):
        if readers:
            batch = data[rows].to(context.device)
            end = batch.positions["END"]
            with record_heads(context.model, layers, end) as z:
                # Nothing after the last of these heads needs to run.
                capture(context.model, batch.inputs, [f"L{layers[-1]}.post"], positions=end)
            pieces.append(torch.stack([z[n][:, h] for n, h in map(parse_head, readers)], dim=1))
        advance(len(rows))
    if not readers:
        return {}
    outputs, labels = torch.cat(pieces).float(), data.labels.to(context.device)
    problems = {name: (outputs[:, i], labels) for i, name in enumerate(readers)}
    return LinearProbe.fit_many(problems | {ALL: (outputs.flatten(1), labels)})


def _read_probes(
    context: StudyContext,
    probes: dict[str, LinearProbe],
    runs: Conditions,
    generator: torch.Generator,
) -> list[ProbeReading]:
    true = context.task.test.labels.cpu()
    readings = []
    for number, (name, probe) in enumerate(probes.items()):
        for condition in CONDITIONS:
            outputs = runs.outputs[condition]
            x = outputs.flatten(1) if name == ALL else outputs[:, number]
            log_odds = probe.log_odds(x.to(context.device), true.to(context.device)).cpu()
            asked = log_odds < 0 if condition == "counterfactual" else log_odds > 0
            n, reports = len(true), int(asked.sum())
            readings.append(
                ProbeReading(
                    head=name,
                    condition=condition,
                    reports=reports / n,
                    reports_interval=list(wilson(reports, n)),
                    log_odds=_mean(log_odds, generator),
                )
            )
    return readings


def _mean(values: Tensor, generator: torch.Generator) -> Mean:
    return Mean(
        mean=float(values.double().mean()),
        interval=list(bootstrap_mean(values, generator)),
        values=[round(value, 4) for value in values.tolist()],
    )
