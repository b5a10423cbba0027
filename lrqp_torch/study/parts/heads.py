"""Which attention heads do what: scores of all heads on clean held-out prompts, and their roles.

A head's direct effect on the answer is its direct logit attribution
(:mod:`lrqp_torch.study.attribution`); where it looks is its mean attention between the tokens of
the task. The rules that turn scores into roles are in :mod:`lrqp_torch.study.heads`.

S-inhibition heads are told by what the name movers do without them: the head's output at END is set
to its mean over prompts, and the name movers' attention to IO less that to S1 is measured again.
No edit of the order takes part in this choice, so that what the edit later does to these heads is
a finding and not how they were chosen.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lrqp_torch.plot import chart
from lrqp_torch.plot.chart import Chart, Marker, Marks, Pane, Panel, Table
from lrqp_torch.plot.figures import DIRECT, LOOKS_WITHOUT, WRITES_WITHOUT, head_panes, heads_of
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.hooks import record_heads
from lrqp_torch.stream.intervene import EditContext, Intervention, intervene
from lrqp_torch.stream.sites import Site, has_mid
from lrqp_torch.study import heads as rules
from lrqp_torch.study.attribution import ATTENTIONS, Scores, head_shares, output_projection, score
from lrqp_torch.study.context import Advance, StudyContext
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.heads import (
    HeadScore,
    HeadsResult,
    InhibitionTest,
    Role,
    layers_of,
    parse_head,
)
from lrqp_torch.study.indirect_objects import IOIPrompts, named
from lrqp_torch.study.known import read_truth
from lrqp_torch.study.part import Given, Part
from lrqp_torch.study.running import attention_to, batches, put
from lrqp_torch.study.showing import between, grouped, said, signed

MOST_TESTED = 24
"""At most this many heads are tested for S-inhibition, those that attend most to S2."""

NO_ROLE = "no role"
ROLE_LOOKS: dict[str, tuple[str, Marker]] = {
    Role.MOVER: (chart.GREEN, "square"),
    Role.NEGATIVE: (chart.VERMILION, "down"),
    Role.BACKUP: (chart.ORANGE, "pentagon"),
    Role.S_INHIBITION: (chart.BLUE, "triangle"),
    Role.INDUCTION: (chart.PURPLE, "diamond"),
    Role.DUPLICATE: (chart.SKY, "cross"),
    Role.PREVIOUS: (chart.BLACK, "plus"),
    Role.WRITER: (chart.GREEN, "star"),
    NO_ROLE: (chart.NOTE, "circle"),
}
"""Colour and shape of heads, by role."""


class Heads(Part[HeadsResult]):
    """Scores and roles of all attention heads, in prompts about two names."""

    name = "heads"
    title = "What the attention heads do"
    result = HeadsResult
    prompts = "choosing"
    asks = "names"

    def work(self, context: StudyContext, /) -> int:
        """Every held-out prompt twice."""
        return 2 * len(context.task.test)

    def compute(self, given: Given, advance: Advance, /) -> HeadsResult:
        """Score all heads on the clean held-out prompts, and give them their roles."""
        context = given.context
        clean = score(context, context.task.test, ATTENTIONS, advance)
        generator = context.generator()
        attention = {
            name: {key: float(values[:, i].mean()) for key, values in clean.attention.items()}
            for i, name in enumerate(clean.names)
        }
        effects = {
            name: Estimate.mean(clean.heads[:, i], generator) for i, name in enumerate(clean.names)
        }
        to_io, to_s1 = (
            {name: attention[name][key] for name in clean.names} for key in ("END→IO", "END→S1")
        )
        found = rules.attend_roles(attention) | rules.mover_roles(to_io, to_s1, effects)
        published = rules.published_heads(context.model.config)
        movers = (published or found)[Role.MOVER]
        watched = movers or found[Role.WRITER]
        changes = effects_on_movers(context, clean, attention, watched, advance)
        tests = {
            name: InhibitionTest(*(Estimate.mean(values, generator) for values in change))
            for name, change in changes.items()
        }
        whole = sum(effects[name].known for name in watched)

        def inhibits(test: InhibitionTest) -> bool:
            effect = test.attention if movers else test.writing
            least = rules.EFFECT if movers else rules.WRITING_EFFECT * whole
            return effect.known <= -least and effect.certain < 0

        inhibiting = [name for name, test in tests.items() if inhibits(test)]
        found[Role.S_INHIBITION] = sorted(inhibiting, key=lambda name: tests[name].writing.known)
        return HeadsResult(
            prompts=len(context.task.test),
            logit_difference=float(clean.total.mean()),
            parts={name: float(values.mean()) for name, values in clean.parts.items()},
            scores=[HeadScore(n, effects[n], attention[n], tests.get(n)) for n in clean.names],
            found={role: found[role] for role in Role},
            published=published,
            truth=_check_truth(context, found[Role.S_INHIBITION]),
        )

    def says(self, result: HeadsResult, /) -> list[str]:
        """How many heads have the roles on which the rest of the study builds."""
        roles = (Role.S_INHIBITION, Role.MOVER, Role.WRITER)
        counts = [f"{role}: {len(result.members(role))}" for role in roles]
        return said(self.name, "says", result=result, counts=counts)

    def figures(self, result: HeadsResult, /) -> dict[str, Chart]:
        """Every head's scores as maps of layer by head."""
        return {"heads": heads_of(result)}

    def panels(self, result: HeadsResult, /) -> list[Panel]:
        """Maps of all scores, the direct effect against attention, and the roles."""
        scores = {name: Chart([pane]) for name, pane in head_panes(result).items()}
        known = {"looks": LOOKS_WITHOUT, "writes": WRITES_WITHOUT}
        movers = {"": Chart([_by_attention(result)])}
        maps = {"charts": scores, "choice": "score"}
        return [
            self.panel("head-scores", result, shown=maps, **known),
            self.panel("head-movers", result, shown={"charts": movers}),
            self.panel("head-roles", result, shown={"table": _roles(result)}),
        ]


def effects_on_movers(
    context: StudyContext,
    clean: Scores,
    attention: dict[str, dict[str, float]],
    movers: list[str],
    advance: Advance,
) -> dict[str, tuple[Tensor, Tensor]]:
    """What the name movers do without each head that attends from END to S2, below the highest of
    them.

    "Without" means that the head's output at END is its mean over the held-out prompts, of which
    ``clean`` are the heads' scores and ``attention`` the means by the keys of
    :data:`~.attribution.ATTENTIONS`. An effect is measured on the movers in layers above the head.

    By head, (n,) each: the change of the movers' mean attention END→IO less END→S1, and of their
    summed direct effect; see :class:`~.heads.InhibitionTest`.
    """
    model, data = context.model, named(context.task.test)
    top = max((parse_head(name)[0] for name in movers), default=0)
    tested = [
        name
        for name in sorted(attention, key=lambda name: -attention[name]["END→S2"])
        if attention[name]["END→S2"] >= rules.ATTENTION and parse_head(name)[0] < top
    ][:MOST_TESTED]
    kept: dict[tuple[str, int], Tensor] = {}
    layers, mean = layers_of(movers), clean.z.mean(0)
    for batch in batches(model, data, context.batch_size, start="end"):
        end = batch.prompts.end
        direction = clean.direction[batch.rows].to(context.device)
        with record_patterns(model, layers, end) as before, record_heads(model, layers, end) as z:
            _ = batch.replay if tested else None  # the clean run, for which these wait
        for name in tested:
            layer, head = parse_head(name)
            shift = (mean[layer, head] - clean.z[batch.rows, layer, head]).to(context.device)
            above = [mover for mover in movers if parse_head(mover)[0] > layer]
            reached = layers_of(above)
            with (
                record_patterns(model, reached, end) as after,
                record_heads(model, reached, end) as z_after,
                intervene(model, [shift_head(model, layer, head, shift, end)]),
            ):
                batch.replay.run(layer)
            looks = [_preference(seen, above, batch.prompts) for seen in (after, before)]
            writes = [_writing(model, heads, above, direction) for heads in (z_after, z)]
            pairs = enumerate((looks, writes))
            changes = {(name, i): (new - old).double() for i, (new, old) in pairs}
            put(kept, changes, batch.rows, len(data))
        advance(len(batch))
    return {name: (kept[name, 0], kept[name, 1]) for name in tested}


def shift_head(model: nn.Module, layer: int, head: int, shift: Tensor, end: Tensor) -> Intervention:
    """An intervention that adds ``shift``, (B, head width), to a head's output before W_O at END,
    (B,).

    What W_O makes of the shift is added to the stream after attention, which is the same thing.
    Where attention and MLP run in parallel, that place is the end of the block.
    """
    weight, _ = output_projection(model, layer)
    width = shift.shape[-1]
    added = shift.to(weight) @ weight[head * width : (head + 1) * width]

    def add(x: Tensor, context: EditContext) -> Tensor:
        return x + added[context.example]

    site = f"L{layer}.mid" if has_mid(model) else f"L{layer}.post"
    return Intervention(site, end, add)


def _preference(patterns: dict[int, Tensor], heads: list[str], prompts: IOIPrompts) -> Tensor:
    """Mean over heads of attention END→IO less END→S1, (B,)."""
    columns = []
    for name in heads:
        layer, head = parse_head(name)
        to_io, to_s1 = (attention_to(patterns[layer], prompts.positions[k]) for k in ("IO", "S1"))
        columns.append((to_io - to_s1)[:, head])
    return torch.stack(columns).mean(0)


def _writing(model: nn.Module, z: dict[int, Tensor], heads: list[str], direction: Tensor) -> Tensor:
    """Summed direct effect of heads, (B,)."""
    shares = {layer: head_shares(model, layer, values, direction) for layer, values in z.items()}
    return torch.stack([shares[layer][:, head] for layer, head in map(parse_head, heads)]).sum(0)


def _check_truth(context: StudyContext, inhibiting: list[str]) -> rules.TruthCheck | None:
    known = read_truth(str(getattr(context.model.config, "_name_or_path", "")))
    if known is None or not known.used_at:
        return None
    readers = [rules.first_reader(site) for site in sorted(map(Site.parse, known.used_at))]
    layers = [parse_head(name)[0] for name in inhibiting]
    return rules.TruthCheck(
        first_layer=readers[0],
        last_layer=readers[-1],
        agrees=(min(layers) >= readers[0] and max(layers) >= readers[-1]) if layers else None,
    )


def _by_attention(result: HeadsResult) -> Pane:
    """Direct effect against attention to IO, a mark a head."""
    by_role = grouped(result.scores, lambda item: _main_role(result, item.head))

    def text(role: str, item: HeadScore) -> str:
        effect = f"{signed(item.attribution.known, 3)} ({between(item.attribution, 3)})"
        looks = [f"attention {key} {value:.2f}" for key, value in item.attention.items()]
        return "\n".join([f"{item.head}: {role}", f"direct effect {effect}", *looks])

    marks = []
    for role in (role for role in (*list(Role)[::-1], NO_ROLE) if role in by_role):
        items, (colour, marker) = by_role[role], ROLE_LOOKS[role]
        known: dict[str, Any] = {"size": 0.8} if role == NO_ROLE else {"size": 1.4}
        known |= {} if role == NO_ROLE else {"labels": [item.head for item in items]}
        known |= {"texts": [text(role, item) for item in items], "colour": colour}
        x, y = [i.attention["END→IO"] for i in items], [i.attribution.value for i in items]
        marks.append(Marks(role, x, y, kind="points", marker=marker, **known))
    return Pane(marks, x_title="mean attention END → IO", y_title=DIRECT)


def _main_role(result: HeadsResult, head: str) -> str:
    """The role of a head that is nearest to the answer."""
    for role in (Role.MOVER, Role.NEGATIVE, Role.WRITER, *list(Role)[::-1]):
        if head in result.found[role]:
            return role
    return NO_ROLE


def _roles(result: HeadsResult) -> Table:
    """A row a role: its heads, those that were published for it, and its rule."""
    published, rows = result.published, []
    for role, rule in zip(Role, said("heads", "rules", asks=rules), strict=True):
        found, known = result.found[role], (published or {}).get(role)
        both = [", ".join(known), rules.overlap(found, known)] if known else ["–", "–"]
        own = [role, ", ".join(found) or "none found"]
        rows.append([*own, *(() if published is None else both), rule])
    both = [] if published is None else ["published", "published ones found"]
    return Table(["role", "heads found", *both, "rule"], rows)


PART = Heads()
