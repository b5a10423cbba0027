"""What the edited belief does to the circuit: S-inhibition heads report it, name movers follow it.

The belief about the order is edited at S2, at one site, towards the true order (control) and
towards the other one (counterfactual). Downstream, at END:

* Linear probes read the order from the outputs of the S-inhibition heads. They are fitted to clean
  runs of the training prompts, and asked what they read in each condition.
* The attention of name movers, negative and backup name movers to IO and to S1 is recorded in each
  condition, and how much of it moved elsewhere at all.

Source: the post "Intervening in the Residual Stream" (2023).
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lrqp_torch.plot.chart import CONDITION_COLOURS, Chart, Marks, Pane, Panel, Rule, counted, edges
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.capture import capture
from lrqp_torch.stream.hooks import record_heads
from lrqp_torch.stream.sites import Site
from lrqp_torch.study.context import Advance, StudyContext
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.heads import Role, layers_of, parse_head
from lrqp_torch.study.indirect_objects import named
from lrqp_torch.study.part import Given, Part
from lrqp_torch.study.running import answers, attention_to, batches, put
from lrqp_torch.study.showing import grouped, percent, said, table_of

CONDITIONS = ("clean", "control", "counterfactual")
KEYS = ("IO", "S1")
ALL = "all together"
"""Name of the probe that reads the outputs of all S-inhibition heads side by side."""

MOST_DRAWN = 8
"""Heads in the static figures; the interactive ones have them all."""


@dataclass(frozen=True)
class Spread:
    """A mean over held-out prompts, and the values behind it."""

    mean: Estimate  # with its bootstrap interval
    values: list[float]  # one a prompt, in the order of the prompts, rounded to 4 digits

    @classmethod
    def of(cls, values: Tensor, generator: torch.Generator) -> "Spread":
        """Of values (n,)."""
        return cls(Estimate.mean(values, generator), [round(value, 4) for value in values.tolist()])


@dataclass(frozen=True)
class ProbeReading:
    """What one probe reads at END in one condition.

    The order asked for is the true one in the clean and control conditions, and the other one in
    the counterfactual condition.
    """

    head: str  # the head whose output is read, or :data:`ALL`
    condition: str  # one of :data:`CONDITIONS`
    reports: Estimate  # share of prompts for which the probe reads the order asked for
    # The probe's log odds of the true order, in nats; below 0 it reads the other one.
    log_odds: Spread


@dataclass(frozen=True)
class AttentionReading:
    """Where one head looks from END in one condition."""

    head: str  # such as ``"L9.H9"``
    role: str  # the role for which it was chosen
    condition: str  # one of :data:`CONDITIONS`
    to_io: Spread  # attention to IO
    to_s1: Spread  # attention to S1
    # Attention that lies elsewhere than in the clean run, ½ Σ |p − p_clean| over tokens.
    moved: Spread


@dataclass(frozen=True)
class CircuitResult:
    """The three conditions at one site."""

    site: str  # where the belief is edited, at S2
    prompts: int  # held-out prompts
    logit_difference: dict[str, Spread]  # condition to IO − S at END, in logits
    published: bool  # whether the heads are the published ones, or found by the program
    # Role to heads, as read here; a role without heads has an empty list.
    roles: dict[str, list[str]]
    # Readings by head and condition; empty if there is no S-inhibition head.
    probes: list[ProbeReading]
    # Readings by head and condition; empty if no head has one of the roles.
    attention: list[AttentionReading]


Reading = TypeVar("Reading", ProbeReading, AttentionReading)


class Circuit(Part[CircuitResult]):
    """What S-inhibition heads report and where name movers look, under the edit."""

    name = "circuit"
    title = "What the edit does to the circuit"
    result = CircuitResult
    needs = ("flipping", "heads")
    prompts = "reporting"
    asks = "names"

    def work(self, context: StudyContext, /) -> int:
        """Every prompt once, to fit on or held out."""
        return len(context.task)

    @torch.no_grad()
    def compute(self, given: Given, advance: Advance, /) -> CircuitResult:
        """Edit the belief at one site, and read S-inhibition heads and name movers downstream."""
        context, heads = given.context, given.results["heads"]
        movers, readers = heads.attending(), heads.members(Role.S_INHIBITION)
        probes = _fit_probes(context, readers, advance)
        watched = sorted({head for group in movers.values() for head in group}, key=parse_head)
        found = _run(given, watched, readers, advance)
        generator, true = context.generator(), context.task.test.labels.cpu()

        def spread(*key: str) -> Spread:
            return Spread.of(found[key], generator)

        def read(name: str, condition: str) -> ProbeReading:
            z = found["outputs", condition]
            x = z.flatten(1) if name == ALL else z[:, readers.index(name)]
            odds = probes[name].log_odds(x.to(context.device), true.to(context.device)).cpu()
            asked = odds < 0 if condition == "counterfactual" else odds > 0
            return ProbeReading(name, condition, Estimate.share(asked), Spread.of(odds, generator))

        return CircuitResult(
            site=given.site,
            prompts=len(context.task.test),
            logit_difference={name: spread("preference", name) for name in CONDITIONS},
            published=heads.published is not None,
            roles=movers | {Role.S_INHIBITION: readers},
            probes=[read(name, condition) for name in probes for condition in CONDITIONS],
            attention=[
                AttentionReading(head, role, c, *(spread(k, c, head) for k in (*KEYS, "moved")))
                for role, group in movers.items()
                for head in group
                for c in CONDITIONS
            ],
        )

    def says(self, result: CircuitResult, /) -> list[str]:
        """What the S-inhibition heads report of the edit."""
        return said(self.name, "says", result=result, together=_together(result))

    def figures(self, result: CircuitResult, /) -> dict[str, Chart]:
        """What probes read, and attention before and after, where there are heads to show."""
        charts = {}
        if result.probes:
            shown = list(_by_head(result.probes).items())[-MOST_DRAWN:]
            charts["circuit_probes"] = Chart(
                [_histogram(readings, head) for head, readings in shown],
                f"What S-inhibition heads report under edits at {result.site}, and how often as "
                "asked",
                columns=min(4, len(shown)),
            )
        if result.attention:
            pairs = list(_by_head(result.attention).items())[:MOST_DRAWN]
            panes = [_paired(o, "to_io", f"{head}\n{o['clean'].role}") for head, o in pairs]
            panes += [_paired(own, "to_s1") for _, own in pairs]
            title = f"Attention before and after the edit at {result.site}, a point a prompt"
            chart = Chart(panes, title, columns=len(pairs), share_x=True, share_y=True)
            charts["circuit_attention"] = chart
        return charts

    def panels(self, result: CircuitResult, /) -> list[Panel]:
        """What probes read from S-inhibition heads, and where name movers look."""
        heads = {}
        for head, own in _by_head(result.attention).items():
            panes = [_paired(own, key) for key in ("to_io", "to_s1")]
            heads[f"{head} ({own['clean'].role})"] = Chart(panes, columns=2)
        probes = {head: Chart([_histogram(o, "")]) for head, o in _by_head(result.probes).items()}
        read = {
            "reads the order asked for (%)": "reports",
            "mean log odds of the true order (nats)": "log_odds.mean",
        }
        looked = {"END → IO": "to_io.mean", "END → S1": "to_s1.mean", "moved": "moved.mean"}
        shown = _by_choice(probes, result.probes, read), _by_choice(heads, result.attention, looked)
        known = {"writers": Role.WRITER in result.roles, "changes": _changes(result)}
        return [
            self.panel("circuit-probes", result, shown=shown[0], together=_together(result)),
            self.panel("circuit-attention", result, shown=shown[1], **known),
        ]


def _together(result: CircuitResult) -> list[ProbeReading]:
    """What the probe of all heads reads in each condition."""
    return [reading for reading in result.probes if reading.head == ALL]


def _changes(result: CircuitResult) -> dict[str, list[float]]:
    """By role, the counterfactual edit's mean change of its heads' attention to IO and to S1."""
    by_role = grouped(_by_head(result.attention).values(), lambda own: own["clean"].role)

    def change(heads: list[dict[str, AttentionReading]], key: str) -> float:
        changes: list[float] = [
            getattr(own["counterfactual"], key).mean.known - getattr(own["clean"], key).mean.known
            for own in heads
        ]
        return sum(changes) / len(changes)

    return {role: [change(own, key) for key in ("to_io", "to_s1")] for role, own in by_role.items()}


def _fit_probes(
    context: StudyContext, readers: list[str], advance: Advance
) -> dict[str, LinearProbe]:
    """A probe of the order for each head's output at END, and one for all, from clean runs."""
    model, data = context.model, context.task.train
    layers = layers_of(readers)
    kept: dict[str, Tensor] = {}
    for batch in batches(model, data, context.batch_size, start="end"):
        if readers:
            end = batch.prompts.end
            with record_heads(model, layers, end) as z:
                # Nothing after the last of these heads needs to run.
                capture(model, batch.prompts.inputs, [f"L{layers[-1]}.post"], positions=end)
            put(kept, {"outputs": _side_by_side(z, readers)}, batch.rows, len(data))
        advance(len(batch))
    if not readers:
        return {}
    outputs, labels = (t.to(context.device) for t in (kept["outputs"], data.labels))
    problems = {name: (outputs[:, i], labels) for i, name in enumerate(readers)}
    return LinearProbe.fit_many(problems | {ALL: (outputs.flatten(1), labels)})


def _side_by_side(z: dict[int, Tensor], heads: list[str]) -> Tensor:
    """Outputs of some heads, (B, heads, head width) in float32."""
    return torch.stack([z[n][:, h] for n, h in map(parse_head, heads)], dim=1).float()


def _run(
    given: Given, attending: list[str], writing: list[str], advance: Advance
) -> dict[tuple[str, ...], Tensor]:
    """Run the held-out prompts in all conditions, and record heads at END.

    A row a prompt: ``("preference", condition)``; ``("IO", condition, head)`` and ``("S1",
    condition, head)``, the attention of the attending heads; ``("moved", condition, head)``; and
    ``("outputs", condition)`` of all writing heads, (n, heads, head width).
    """
    context, site, edit = given.context, given.site, given.edit_at(given.site)
    model, data = context.model, named(context.task.test)
    layers = layers_of((*attending, *writing))
    first = Site.parse(site).layer
    above = [layer for layer in layers if layer >= first]
    kept: dict[tuple[str, ...], Tensor] = {}
    for batch in batches(model, data, context.batch_size):
        prompts, end = batch.prompts, batch.prompts.end
        with record_patterns(model, layers, end) as clean, record_heads(model, layers, end) as z:
            _ = batch.replay  # the clean run, for which these wait
        seen: dict[str, dict[int, Tensor]] = {}
        for condition in CONDITIONS:
            with (
                record_patterns(model, above, end) as patterns,
                record_heads(model, above, end) as outputs,
                batch.editing(site, edit, condition),
            ):
                logits = batch.run(first, f"the {condition} run")
            # Below the site nothing changes.
            seen[condition] = patterns = clean | patterns
            here: dict[tuple[str, ...], Tensor] = {
                ("preference", condition): answers(prompts, logits)["logit_difference"]
            }
            for name in attending:
                layer, head = parse_head(name)
                for key in KEYS:
                    to_key = attention_to(patterns[layer], prompts.positions[key])[:, head]
                    here[key, condition, name] = to_key
                change = (patterns[layer][:, head] - seen["clean"][layer][:, head]).abs()
                here["moved", condition, name] = change.sum(-1) / 2
            if writing:
                here["outputs", condition] = _side_by_side(z | outputs, writing)
            put(kept, here, batch.rows, len(data))
        advance(len(batch))
    return kept


def _by_head(readings: list[Reading]) -> dict[str, dict[str, Reading]]:
    """Head to condition to reading."""
    heads = grouped(readings, lambda reading: reading.head)
    return {head: {reading.condition: reading for reading in own} for head, own in heads.items()}


def _histogram(readings: dict[str, ProbeReading], title: str) -> Pane:
    """What one probe reads in each condition."""
    limits = edges([value for reading in readings.values() for value in reading.log_odds.values])

    def bars(condition: str, reading: ProbeReading) -> Marks:
        name = f"{condition} {percent(reading.reports.value, 0)}"
        looks: dict[str, Any] = {"colour": CONDITION_COLOURS[condition], "opacity": 0.5}
        return counted(name, reading.log_odds.values, limits, **looks)

    return Pane(
        [bars(*each) for each in readings.items()],
        rules=[Rule(0.0, "x", dash="solid")],
        title=title,
        x_title="log odds of the true order, read from the head's output at END (nats)",
        y_title="held-out prompts",
        names="corner",
    )


def _paired(readings: dict[str, AttentionReading], key: str, title: str = "") -> Pane:
    """Clean against edited attention to one token, a mark a prompt."""
    seen = {condition: getattr(own, key).values for condition, own in readings.items()}
    looks: dict[str, Any] = {"kind": "points", "size": 0.6, "opacity": 0.4}
    marks = [
        Marks(f"{c} edit", seen["clean"], seen[c], colour=CONDITION_COLOURS[c], **looks)
        for c in CONDITIONS[1:]
    ]
    return Pane(
        marks,
        rules=[Rule(0.0, "diagonal", dash="dash")],
        title=title,
        x_title="attention in the clean run",
        y_title=f"END → {key.removeprefix('to_').upper()}, edited",
        x_range=(-0.04, 1.04),
        y_range=(-0.04, 1.04),
        square=True,
    )


def _by_choice(
    charts: dict[str, Chart], readings: list[Reading], columns: dict[str, str]
) -> dict[str, Any]:
    """Charts by head, with a table of a row for each head and condition; nothing without heads."""
    if not readings:
        return {}
    keys = [name for name in ("head", "role", "condition") if hasattr(readings[0], name)]
    rows = [([getattr(reading, key) for key in keys], reading) for reading in readings]
    return {"charts": charts, "choice": "head", "table": table_of(keys, rows, {**columns})}


PART = Circuit()
