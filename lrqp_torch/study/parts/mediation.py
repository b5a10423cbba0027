"""Is the effect of the edit carried by where heads look? The post's open question.

The counterfactual edit at the marked token lowers the preference for the answer that holds, such as
IO − S. Two interventions on the attention from the end of a set of heads ask how much of that goes
by way of their patterns:

* restored: with the edit, the patterns are set back to those of the clean run,
  (P(edit + clean patterns) − P(edit)) / (P(clean) − P(edit));
* induced: without the edit, they are set to those under the edit,
  (P(clean) − P(clean + edited patterns)) / (P(clean) − P(edit)).

Both are ratios of means over prompts: 1 if the patterns carry all of the effect, 0 if none. They
need not agree, nor add up over sets of heads: heads make up for each other, and what a head moves
depends on what is there to be moved. All heads above the site are the ceiling for attention from
the end. The floor are other heads, matched one by one: in the same layer, and with about as much
attention to anything but the first token, where heads rest.

Where several variables are edited, the same is asked of the edit of all of them together, whose
effect is that of the whole activation.

In prompts about two names the heads are those with roles in that task. In others they are the
answer writers: heads whose direct effect on the preference, in the training prompts, is large by
the rule of :func:`lrqp_torch.study.heads.writers`.

Source: the question is from the post "Intervening in the Residual Stream" (2023); the two ratios
are the shares of the natural indirect effect from the edited and the clean side, as in Vig et al.
2020, "Investigating Gender Bias in Language Models Using Causal Mediation Analysis".
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.edits.record import EditRun
from lrqp_torch.plot.chart import COUNTERFACTUAL, PROBE, Chart, Pane, Panel, Rule, marks_of
from lrqp_torch.stream.attention import record_patterns, set_patterns
from lrqp_torch.stream.sites import Site, blocks_of, head_count
from lrqp_torch.study.attribution import find_writers
from lrqp_torch.study.ceiling import Interchange, Likeness, held_against
from lrqp_torch.study.context import Advance, StudyContext
from lrqp_torch.study.estimates import Estimate, Sample
from lrqp_torch.study.heads import HeadsResult, Role, first_reader, head_name, layers_of, parse_head
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.joint import JointStudy
from lrqp_torch.study.part import Given, Part
from lrqp_torch.study.prompts import ALL, PromptSet, Words
from lrqp_torch.study.running import Batch, Twinned, answers, batches, divergences, put
from lrqp_torch.study.showing import Reading, plural, reads, table_of

RANDOM_SETS = 3
"""Sets of other heads, each as large as the first set of heads with a role."""
MATCHED_BY = 64
"""Training prompts by whose attention they are matched."""

CEILING = "all heads above the site"
MOVERS, WRITERS = "name movers", "answer writers"
KINDS = {
    "restored": ("restored: edit, patterns set back", PROBE),
    "induced": ("induced: no edit, patterns of the edit", COUNTERFACTUAL),
}


@dataclass(frozen=True)
class GroupMediation:
    """What the attention patterns of one set of heads carry."""

    group: str  # name of the set
    # Its heads in layers that read the edited site or come later; only these can have changed, and
    # only these are set.
    heads: list[str]
    preference_restored: float  # mean preference with the edit and clean patterns
    preference_induced: float  # mean preference without the edit and with the edited patterns
    # Share of the edit's effect undone; None where the edit has no effect to share, that is, where
    # the interval of its mean effect includes 0 or that of the ratio is not finite.
    restored: Estimate | None
    induced: Estimate | None  # share of the edit's effect brought about; None in the same case
    # Of the prompts that the edit flipped, those answered with the class that holds again; None if
    # it flipped none.
    answers_restored: Estimate | None
    # Of the prompts answered with the class that holds in the clean run, those that the edited
    # patterns alone flip; None if there are none.
    answers_flipped: Estimate | None


@dataclass(frozen=True)
class MediationResult(Likeness):
    """The counterfactual edit at one site, and what the patterns of sets of heads carry of it."""

    words: Words  # what the things of the task are called
    site: str  # where the belief is edited
    prompts: int  # held-out prompts
    published: bool  # whether the heads are the published ones, or found by the program
    preference_clean: float  # mean preference without any intervention
    preference_edited: float  # the same under the counterfactual edit
    effect: Estimate  # mean of their difference
    # Of the prompts answered with the class that holds in the clean run, those that the edit flips;
    # None if there are none.
    edit_flips: Estimate | None
    groups: list[GroupMediation]  # sets of heads
    # The ceiling of the edit, which ``recovered`` and the like compare it with; None where no
    # prompt has a twin.
    interchange: Interchange | None = None
    # The same of the edit of all variables; None where there is one.
    together: "MediationResult | None" = None

    @property
    def shown(self) -> list[GroupMediation]:
        """Groups whose shares are known."""
        return [group for group in self.groups if group.restored and group.induced]


class Mediation(Part[MediationResult]):
    """Through which attention the edit works.

    Args:
        groups: sets of heads by name; default those with roles, see :func:`head_groups`.
    """

    name = "mediation"
    title = "Through which attention the edit works"
    result = MediationResult
    needs = ("flipping", "heads")
    prompts = "reporting"

    def __init__(self, groups: Mapping[str, list[str]] | None = None) -> None:
        self.groups = groups

    def missing(self, context: StudyContext, /) -> str | None:
        """Answers of one token."""
        test = context.task.test
        if test.answers is None:
            return "these prompts have no answers, so no effect on them can be told"
        if test.continued is not None:
            return (
                "it follows the logits of one token, and some answers of these prompts have several"
            )
        return None

    def work(self, context: StudyContext, /) -> int:
        """Held-out prompts, and those in which heads are looked for."""
        task, named = context.task, isinstance(context.task.test, IOIPrompts)
        found = 0 if named or self.groups is not None else len(task.train)
        return len(task.test) * (1 + (len(context.variables) > 1)) + found

    @torch.no_grad()
    def compute(self, given: Given, advance: Advance, /) -> MediationResult:
        """Edit the belief, set attention patterns from the end, and measure the answer."""
        context, site, chosen = given.context, given.site, self.groups
        if chosen is None:
            heads: HeadsResult | None = given.results.get("heads")
            roles: Mapping[str, list[str]] = (
                {Role.WRITER: find_writers(context, advance)}
                if heads is None
                else heads.attending() | {Role.S_INHIBITION: heads.members(Role.S_INHIBITION)}
            )
            chosen = head_groups(context, site, roles)
        sets = {
            name: [head for head in members if parse_head(head)[0] >= first_reader(site)]
            for name, members in chosen.items()
        }
        own = given.edit_at(site)
        twinned = Twinned.of(context, context.task, site, own.metric.distance)
        editing = partial(Batch.editing, site=site, edit=own)
        result = _carried(given, sets, _Edited(context.task.test, editing, twinned), advance)
        if len(context.variables) < 2:
            return result
        study = JointStudy(given)
        distance, rows = study.edits[site].metric.distance, study.rows
        twinned = Twinned.of(context, context.task, site, distance, variable=ALL)
        if twinned is not None:
            x = twinned.x[rows.to(twinned.x.device)]
            twinned = Twinned(site, x, twinned.known[rows], twinned.distance[rows])
        both = _Edited(study.data, partial(study.editing, site=site), twinned)
        return replace(result, together=_carried(given, sets, both, advance))

    def figures(self, result: MediationResult, /) -> dict[str, Chart]:
        """Shares of the effect, where the edit has one."""
        title = f"What attention from {result.words.end} carries of the edit at {result.site}"
        return {"mediation": Chart([_bars(result)], title)} if result.shown else {}

    def panels(self, result: MediationResult, /) -> list[Panel]:
        """Shares of each edit's effect that sets of attention patterns carry."""
        edits = {"mediation": result, "mediation-together": result.together}
        return [self._panel(name, edit) for name, edit in edits.items() if edit is not None]

    def _panel(self, name: str, result: MediationResult) -> Panel:
        words = result.words
        quantities: dict[str, Reading] = {
            "restored (%)": "restored",
            "induced (%)": "induced",
            "answers restored (%)": "answers_restored",
            "answers flipped (%)": "answers_flipped",
            f"{words.preference}, restored": "preference_restored",
            f"{words.preference}, induced": "preference_induced",
            "heads": _listed,
        }
        rows = [([_label(group)], group) for group in result.groups]
        shown = {
            "charts": {"": Chart([_bars(result)])} if result.shown else {},
            "table": table_of([f"attention from {words.end} of"], rows, quantities),
        }
        who = WRITERS if any(group.group == WRITERS for group in result.groups) else MOVERS
        return self.panel(name, result, shown=shown, who=who)


@dataclass(frozen=True)
class _Edited:
    """An edit whose effect is mediated."""

    data: PromptSet  # held-out prompts
    # Gives the context of ``(batch, condition=...)``.
    editing: Callable[..., AbstractContextManager[object]]
    twinned: Twinned | None  # the interchange that it is held against


def head_groups(
    context: StudyContext, site: str, roles: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """The sets of heads that the study compares, of those by role; sets without heads are left out.

    Name movers alone, with negative, with backup name movers, and with both; answer writers where
    there are no name movers; S-inhibition heads, which look at S2 whatever it says, so that what
    they carry should be in what they read there and not in their patterns; all heads above the
    site; and sets of others, in none of these roles, that are matched with the first set by their
    attention in the training prompts.
    """
    movers, negative, backup = (
        roles.get(role, []) for role in (Role.MOVER, Role.NEGATIVE, Role.BACKUP)
    )
    groups = {MOVERS: movers}
    if movers:
        groups |= {
            "with negative ones": [*movers, *negative] if negative else [],
            "with backups": [*movers, *backup] if backup else [],
            "with both": [*movers, *negative, *backup] if negative and backup else [],
        }
    groups[WRITERS] = roles.get(Role.WRITER, [])
    groups["S-inhibition heads"] = roles.get(Role.S_INHIBITION, [])
    everything = [
        head_name(layer, head)
        for layer in range(first_reader(site), len(blocks_of(context.model)))
        for head in range(head_count(context.model))
    ]
    known = {head for group in groups.values() for head in group}
    others = [head for head in everything if head not in known]
    first = [head for head in movers or groups[WRITERS] if head in everything]
    size = len(first)
    groups[CEILING] = everything
    if len(others) <= size:
        name = "the other head" if len(others) == 1 else f"all {len(others)} other heads"
        groups[name] = others
    else:
        awake = attention_awake(context, everything)
        for number, drawn in enumerate(matched(first, others, awake), start=1):
            groups[f"{plural(size, 'other head')}, matched, set {number}"] = drawn
    return {name: members for name, members in groups.items() if members}


@torch.no_grad()
def attention_awake(context: StudyContext, heads: Sequence[str]) -> dict[str, float]:
    """By head, its mean attention from the end to all tokens but the first, where heads rest.

    Over the first training prompts, :data:`MATCHED_BY` at most.
    """
    data = context.task.train[: min(MATCHED_BY, len(context.task.train))]
    layers, total, model = layers_of(heads), dict.fromkeys(heads, 0.0), context.model
    for batch in batches(model, data, context.batch_size):
        real = batch.prompts.inputs["attention_mask"].cumsum(1)
        start = ((real == 1).int().argmax(1)).view(-1, 1, 1)
        with record_patterns(model, layers, batch.prompts.end) as patterns:
            model(**batch.prompts.inputs)
        for layer, head in map(parse_head, heads):
            pattern = patterns[layer]
            rests = pattern.gather(-1, start.expand(-1, pattern.shape[1], 1)).squeeze(-1)
            total[head_name(layer, head)] += float((1 - rests[:, head]).sum())
    return {head: value / len(data) for head, value in total.items()}


def matched(
    heads: Sequence[str], others: Sequence[str], awake: Mapping[str, float]
) -> list[list[str]]:
    """:data:`RANDOM_SETS` sets of other heads, each as large, or as many as there are heads for.

    No head is in two of them. For each head in turn comes the other one that is most like it in
    ``awake``, see :func:`attention_awake`, among those of its layer that are left, or of the
    nearest layer that has any.
    """
    left, sets = list(others), list[list[str]]()
    while len(sets) < RANDOM_SETS and len(left) >= len(heads) > 0:
        chosen = []
        for head in heads:
            layer = parse_head(head)[0]
            unlike = {
                o: (abs(parse_head(o)[0] - layer), abs(awake[o] - awake[head]), parse_head(o))
                for o in left
            }
            chosen.append(min(left, key=lambda o: unlike[o]))
            left.remove(chosen[-1])
        sets.append(sorted(chosen, key=parse_head))
    return sets


def _run(
    given: Given, batch: Batch[Any], sets: Mapping[str, list[str]], edited_by: _Edited
) -> dict[tuple[str, str], Tensor]:
    """What a batch answers, one number a prompt, by ``(run, name)``.

    Runs are ``"clean"``, ``"edited"``, ``"restored GROUP"`` and ``"induced GROUP"``; names are
    those of :func:`~lrqp_torch.study.running.answers`.
    """
    prompts, twinned, model = batch.prompts, edited_by.twinned, batch.model
    end, first = prompts.end, Site.parse(given.site).layer
    layers = layers_of(head for members in sets.values() for head in members)
    found: dict[tuple[str, str], Tensor] = {}

    def keep(run: str, condition: str, first_layer: int) -> Tensor:
        with edited_by.editing(batch, condition=condition) as record:
            logits = batch.run(first_layer, f"the {run} run")
        if run == "edited" and isinstance(record, EditRun):
            found[run, "distance"] = record.distance.cpu()
        here = answers(prompts, logits, batch.rest())
        found.update({(run, name): value for name, value in here.items()})
        return logits

    # One implementation of attention throughout, so that only the interventions differ.
    with record_patterns(model, [], end):
        with record_patterns(model, layers, end) as clean:
            before = keep("clean", "clean", first)
        with record_patterns(model, layers, end) as edited:
            after = keep("edited", "counterfactual", first)
        if twinned is not None:
            patch = twinned.under(batch)
            of_patch = answers(prompts, patch.logits, patch.rest)
            of_patch["divergence"] = divergences(before, patch.logits)
            found |= {("patched", name): value for name, value in of_patch.items()}
            found["edited", "kl_to_interchange"] = divergences(patch.logits, after)
        for name, members in sets.items():
            heads = [parse_head(head) for head in members]
            # Without the edit nothing changes below the lowest of the heads.
            lowest = min((layer for layer, _ in heads), default=first)
            for run, patterns, condition, first_layer in (
                ("restored", clean, "counterfactual", first),
                ("induced", edited, "clean", lowest),
            ):
                rows = {(layer, head): patterns[layer][:, head] for layer, head in heads}
                with set_patterns(model, rows, end):
                    keep(f"{run} {name}", condition, first_layer)
    return found


def _carried(
    given: Given, sets: Mapping[str, list[str]], edit: _Edited, advance: Advance
) -> MediationResult:
    """What the sets of heads carry of one edit."""
    context, kept = given.context, dict[tuple[str, str], Tensor]()
    for batch in batches(context.model, edit.data, context.batch_size):
        put(kept, _run(given, batch, sets, edit), batch.rows, len(edit.data))
        advance(len(batch))
    generator, clusters, twinned = context.generator(), edit.data.groups, edit.twinned
    sample = Sample(context.seed, clusters)
    clean, edited = (kept[run, "logit_difference"] for run in ("clean", "edited"))
    effect = Estimate.mean(clean - edited, generator, clusters)

    def ratio(change: Tensor) -> Estimate | None:
        if not effect.certain:
            return None
        found = Estimate.ratio(change, clean - edited, generator, clusters)
        return None if found.interval is None else found

    def share(run: str, name: str, among: Tensor) -> Estimate | None:
        """Of some prompts those with a positive lead in a run."""
        return sample.among(among).share(kept[run, name] > 0) if among.any() else None

    answered = kept["clean", "own_lead"] > 0
    flipped = answered & (kept["edited", "other_lead"] > 0)

    def carried(name: str, members: list[str]) -> GroupMediation:
        restored, induced = (kept[f"{kind} {name}", "logit_difference"] for kind in KINDS)
        return GroupMediation(
            group=name,
            heads=members,
            preference_restored=float(restored.mean()),
            preference_induced=float(induced.mean()),
            restored=ratio(restored - edited),
            induced=ratio(clean - induced),
            answers_restored=share(f"restored {name}", "own_lead", flipped),
            answers_flipped=share(f"induced {name}", "other_lead", answered),
        )

    groups = [carried(*item) for item in sets.items()]
    heads: HeadsResult | None = given.results.get("heads")
    likeness: dict[str, Any] = {}
    if twinned is not None:
        before, after, patch = (
            {name: value for (own, name), value in kept.items() if own == run}
            for run in ("clean", "edited", "patched")
        )
        patch["distance"] = twinned.distance
        twins = sample.among(twinned.known)
        interchange, own = held_against(before, {"edited": after}, patch, twins)
        likeness = own["edited"] | {"interchange": interchange}
    return MediationResult(
        words=context.task.test.words,
        site=given.site,
        prompts=len(clean),
        published=heads is not None and heads.published is not None,
        preference_clean=float(clean.mean()),
        preference_edited=float(edited.mean()),
        effect=effect,
        edit_flips=share("edited", "other_lead", answered),
        groups=groups,
        **likeness,
    )


# ---- charts --------------------------------------------------------------------------------------


def _label(group: GroupMediation) -> str:
    known = "other head" in group.group
    return group.group if known else f"{group.group} ({plural(len(group.heads), 'head')})"


def _listed(group: GroupMediation) -> str:
    return ", ".join(group.heads) if len(group.heads) <= 16 else f"{len(group.heads)} heads"


def _bars(result: MediationResult) -> Pane:
    """Shares of the effect by set of heads."""
    names, heads = ([of(group) for group in result.shown] for of in (_label, _listed))
    looks: dict[str, Any] = {"scale": 100.0, "kind": "bars", "notes": heads}
    marks = [
        marks_of(label, names, [reads(g, kind) for g in result.shown], colour=colour, **looks)
        for kind, (label, colour) in KINDS.items()
    ]
    title = f"Share of the edit's effect on {result.words.preference} (%)"
    return Pane(marks, rules=[Rule(100.0)], y_title=title, horizontal=True)


PART = Mediation()
