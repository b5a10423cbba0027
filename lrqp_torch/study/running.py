"""Running prompts batch by batch: clean once, then under any edits, rerunning what they change."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lrqp_torch.edits.joint import JointLRQP
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.record import EditRun
from lrqp_torch.errors import NonFiniteError, PromptError
from lrqp_torch.stream.compiled import input_device
from lrqp_torch.stream.intervene import Edit, EditContext, Intervention, intervene
from lrqp_torch.stream.replay import Replay
from lrqp_torch.stream.sites import Site
from lrqp_torch.study.context import StudyContext, Task
from lrqp_torch.study.prompts import PromptSet

P = TypeVar("P", bound=PromptSet)
K = TypeVar("K", bound=Hashable)

RECORD = ("log_odds_before", "log_odds_after", "floor", "distance", "euclidean", "status")
"""What is kept of each edit's :class:`~lrqp_torch.edits.record.EditRun`, one number a prompt."""


@dataclass(frozen=True)
class Edited:
    """One edit of a batch of prompts."""

    logits: Tensor  # of the last column, (B, vocabulary), on the model's device
    rest: Tensor | None  # what `rest` says of it, (B, K, A, 2)
    # Each of `RECORD`, (B,), on the CPU; float64, the status int64. Empty where nothing was solved.
    record: dict[str, Tensor]


@dataclass(frozen=True)
class Batch(Generic[P]):
    """Some prompts, and their clean run once it is asked for."""

    model: Any  # a transformers causal language model
    rows: Tensor  # which prompts of the whole set, (B,), on the CPU
    prompts: P  # the same prompts, on the model's device
    first: int  # the smallest column that an edit will touch
    copies: int = 1  # how many targets of each edit run side by side

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.rows)

    @cached_property
    def replay(self) -> Replay:
        """The clean run, made when first asked for and kept."""
        goes_on = self.prompts.continued is not None
        inputs = self.prompts.inputs
        return Replay(self.model, inputs, self.first, copies=self.copies, goes_on=goes_on)

    @cached_property
    def clean(self) -> Tensor:
        """Logits of the last column in the clean run, (B, vocabulary).

        Raises:
            NonFiniteError: they hold NaN or infinity.
        """
        return finite(self.replay.clean_logits, "the clean run")

    @cached_property
    def clean_rest(self) -> Tensor | None:
        """What :meth:`rest` says of the clean run, (B, K, A, 2)."""
        return self._rest(1, clean=True)

    def rest(self) -> Tensor | None:
        """What :meth:`Replay.follow` says of each answer behind its first token, after a run.

        (copies · B, K, A, 2) float64, 0 for answers of one token; None where all are.
        """
        return self._rest(self.copies, clean=False)

    def _rest(self, copies: int, *, clean: bool) -> Tensor | None:
        first, behind = self.prompts.answers, self.prompts.continued
        if first is None or behind is None:
            return None
        every = torch.cat([first.unsqueeze(-1), behind], -1)
        rest = torch.zeros(copies, *first.shape, 2, dtype=torch.float64, device=first.device)
        for number, own in enumerate(rest):
            at = (behind[..., 0] >= 0).nonzero(as_tuple=True)
            if len(at[0]):
                rows = at[0] + number * len(self)
                own[at] = self.replay.follow(every[at], rows, clean=clean)
        return finite(rest.flatten(0, 1), "the answers behind a run")

    def targets(self) -> dict[str, Tensor]:
        """The class to write by condition: the one that holds (control) or the other one."""
        return {"control": self.prompts.labels, "counterfactual": self.prompts.other}

    def editing(self, site: str, edit: LRQP, condition: str) -> AbstractContextManager[object]:
        """The context of an edit under ``"control"`` or ``"counterfactual"``; none for others."""
        target = self.targets().get(condition)
        if target is None:
            return nullcontext()
        at = self.prompts.position if self.prompts.spans is None else self.prompts.spans
        source = self.prompts.labels
        return edit.at(self.model, site, positions=at, target=target, source=source)

    def run(self, first_layer: int, where: str) -> Tensor:
        """Logits of the last column under the contexts that are open, (copies · B, vocabulary).

        ``first_layer`` is the lowest that any of them touches; ``where`` is what they do, in words.

        Raises:
            NonFiniteError: the logits hold NaN or infinity.
        """
        return finite(self.replay.run(first_layer), where)

    def edited(
        self,
        site: str,
        edit: LRQP | JointLRQP,
        targets: Mapping[str, Tensor],
        beside: Mapping[str, Tensor] | None = None,
        *,
        source: Tensor | None = None,
        asked: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Edited]:
        """What an edit at one site does, and what other activations there do, in one pass.

        Args:
            site: its name.
            edit: acts at the marked token, or at each of several.
            targets: name to the class to write, (B,), of an edit of several variables (B, V).
            beside: name to what is put at the marked token instead, (B, d); with the targets as
                many as there are copies. Where there are several, the others move as it does.
            source: class that holds, in the same shape; default the prompts' labels.
            asked: name of a target to the log α of each variable that is written, (B,), in place of
                the edit's own rule; of an edit of one variable under the name ``""``.

        Raises:
            NonFiniteError: the model's logits under an edit are NaN or infinite.
        """
        count, others = len(self), beside or {}
        copies = len(targets) + len(others)
        at, holds = self.prompts.position.repeat(copies), self.prompts.labels
        target = torch.cat([*targets.values(), *[next(iter(targets.values()))] * len(others)])
        sources = torch.cat([holds if source is None else source] * copies)
        # A mask, so that the copies beside the edit are none of its business.
        solved = torch.arange(len(at), device=at.device) < count * len(targets)
        here = self.prompts.edited.repeat(copies, 1)
        mask = here & solved.unsqueeze(1)
        given: dict[str, Any] = {}
        if asked is not None:
            given["asked"] = _floors(edit, [*targets], len(others), asked)
        items = [edit.on(site, positions=mask, target=target, source=sources, **given)]
        if others:
            values = torch.cat(list(others.values()))
            free = here & ~mask
            put_there = placed(values)
            if self.prompts.spans is not None:
                example, column = free.nonzero(as_tuple=True)
                own = example - len(at) + len(values)
                put_there = moved_along(values, own, column == at[example])
            items.append(Intervention(site, free, put_there))
        with intervene(self.model, items) as (run, *_):
            logits = self.run(Site.parse(site).layer, f"the edits at {site}")
        rest = self.rest()
        assert isinstance(run, EditRun)
        record = read_record(run)
        if self.prompts.spans is not None:
            example, column = (index.cpu() for index in mask.nonzero(as_tuple=True))
            record = _of_prompts(record, example, column == at.cpu()[example])
        record["status"] = record["status"].to(torch.int64)
        found = {}
        for index, name in enumerate([*targets, *others]):
            rows = slice(index * count, (index + 1) * count)
            kept = {key: values[rows].clone() for key, values in record.items()}
            ended = None if rest is None else rest[rows]
            found[name] = Edited(logits[rows], ended, kept if name in targets else {})
        return found


@dataclass(frozen=True)
class Twinned:
    """The activation of each prompt's twin at one site, put in the place of its own."""

    site: str  # where
    x: Tensor  # what is put there, (n, d); a prompt's own activation where it has no twin
    known: Tensor  # which prompts have one, BoolTensor (n,) on the CPU
    distance: Tensor  # Mahalanobis distance of the two activations, (n,) on the CPU

    @classmethod
    def of(
        cls,
        context: StudyContext,
        task: Task,
        site: str,
        distance: Callable[[Tensor], Tensor],
        variable: str | None = None,
    ) -> "Twinned | None":
        """Those of the held-out prompts of a task; None where none of them has a twin.

        ``distance`` is that of displacements (n, d), such as an edit's ``metric.distance``;
        ``variable`` that in which twins differ, as :meth:`.PromptSet.twins` takes it.
        """
        found = context.twins(task, [site], variable=variable)
        if found is None:
            return None
        (x, known), own = found, context.activations(task, "test", "mark", [site])[site]
        return cls(site, x[site], known, distance(x[site].double() - own.double()).cpu())

    def under(self, batch: "Batch[Any]") -> Edited:
        """What it does to a batch."""
        values = self.x[batch.rows.to(self.x.device)]
        item = Intervention(self.site, batch.prompts.position, placed(values))
        with intervene(batch.model, item):
            logits = batch.run(Site.parse(self.site).layer, f"the interchange at {self.site}")
        return Edited(logits, batch.rest(), {})


def read_record(run: EditRun) -> dict[str, Tensor]:
    """Each of :data:`RECORD` of an edit, (N,) in float64 on the CPU.

    Of an edit of several variables the odds are those of the one that is written and, of these, got
    least beyond what was asked for; before the edit, those of the one that is believed least.
    """
    record = {name: getattr(run, name).to("cpu", torch.float64) for name in RECORD}
    if not run.names:
        return record
    missing = (record["log_odds_after"] - record["floor"]).nan_to_num(torch.inf)
    least = missing.argmin(-1, keepdim=True)
    before = record["log_odds_before"].nan_to_num(torch.inf).amin(-1)
    odds = {n: record[n].gather(-1, least).squeeze(-1) for n in ("log_odds_after", "floor")}
    return record | odds | {"log_odds_before": before}


def _floors(
    edit: LRQP | JointLRQP,
    targets: Sequence[str],
    others: int,
    asked: Mapping[str, Mapping[str, Tensor]],
) -> Tensor | dict[str, Tensor]:
    """The log α of all copies, by variable where there are several, NaN for the edit's own rule."""
    names = edit.names or ("",)
    like = next(value for own in asked.values() for value in own.values()).double()
    unknown = torch.full_like(like, torch.nan)

    def column(name: str) -> Tensor:
        own = [asked.get(target, {}).get(name, unknown) for target in targets]
        return torch.cat([*own, *[own[0]] * others])

    return {name: column(name) for name in names} if edit.names else column("")


def batches(
    model: Any, prompts: P, size: int, *, start: str = "mark", copies: int = 1
) -> Iterator[Batch[P]]:
    """The prompts in batches, in the order in which replaying them is cheapest.

    Padding on the left puts the end in the last column, so a later start means a shorter suffix to
    run again; prompts of like suffixes share a batch.

    Args:
        model: a transformers causal language model in evaluation mode.
        prompts: padded on the left.
        size: prompts a batch, at most.
        start: the token, one of ``prompts.positions``, before which no edit acts.
        copies: how many targets of each edit run side by side.

    Raises:
        PromptError: prompts that do not end in the last column.
    """
    if not bool((prompts.end == prompts.inputs["input_ids"].shape[1] - 1).all()):
        raise PromptError(
            "the prompts of a study must be padded on the left: use "
            "PromptSet.encode(..., padding_side='left')"
        )
    device = input_device(model)
    columns = (
        prompts.edited.long().argmax(1) if start == "mark" else prompts.positions[start]
    ).cpu()
    for rows in in_batches(torch.argsort(columns, stable=True), size):
        yield Batch(model, rows, prompts[rows].to(device), int(columns[rows].min()), copies)


def placed(values: Tensor) -> Edit:
    """An edit that puts values, (N, d), in the place of the activations there."""

    def place(x: Tensor, context: EditContext) -> Tensor:
        return values[context.index.to(values.device)].to(x)

    return place


def moved_along(values: Tensor, example: Tensor, main: Tensor) -> Edit:
    """An edit that puts values, (N, d), at one token of each example and moves the others as it.

    ``example`` is that of each token that is edited, (M,), and ``main`` says which tokens get the
    values, (M,), one for each example.
    """

    def place(x: Tensor, context: EditContext) -> Tensor:
        own, first = example[context.index], main[context.index]
        placed_there = values[own].to(x)
        start = torch.zeros_like(values).to(x)
        start[own[first]] = x[first]
        return torch.where(first.unsqueeze(-1), placed_there, x + placed_there - start[own])

    return place


def _of_prompts(record: dict[str, Tensor], rows: Tensor, main: Tensor) -> dict[str, Tensor]:
    """One number a prompt of those of several tokens, (M,): of the last one where it has a class.

    Odds are those of the last token before, and those that fell shortest of their floor after;
    lengths are those of all tokens together.
    """
    count = int(rows.max()) + 1
    short = record["log_odds_after"] - record["floor"]
    least = torch.full((count,), float("inf"), dtype=torch.float64)
    least = least.scatter_reduce(0, rows, short, "amin")
    worst = torch.zeros(count, dtype=torch.long)
    at = (short == least[rows]).nonzero().flatten()
    worst[rows[at]] = at
    status = torch.zeros(count, dtype=torch.float64)
    lengths = {
        name: torch.zeros(count, dtype=torch.float64).index_add(0, rows, record[name] ** 2).sqrt()
        for name in ("distance", "euclidean")
    }
    return {
        "log_odds_before": record["log_odds_before"][main],
        "log_odds_after": record["log_odds_after"][worst],
        "floor": record["floor"][worst],
        "status": status.scatter_reduce(0, rows, record["status"], "amax"),
    } | lengths


def in_batches(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Consecutive pieces of ``rows``, each of at most ``size``."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def put(kept: dict[K, Tensor], found: Mapping[K, Tensor], rows: Tensor, n: int) -> None:
    """Put tensors ``found`` of a batch of prompts, (B, …) each, into those of all n, on the CPU.

    New names are added to ``kept``, with zeros elsewhere.
    """
    for name, values in found.items():
        here = values.detach().cpu()
        if name not in kept:
            kept[name] = here.new_zeros(n, *here.shape[1:])
        kept[name][rows] = here


def answers(prompts: PromptSet, logits: Tensor, rest: Tensor | None = None) -> dict[str, Tensor]:
    """What the model answers, (n,) each in float64 on the CPU; nothing for a task without answers.

    ``preference``, the score of the class that holds minus that of the counterfactual class;
    ``own_lead`` and ``other_lead``, the score of each minus the highest of all other classes,
    positive where it is what the model answers. With two classes these are the preference and its
    negative. The arguments are those of :meth:`PromptSet.scores`.
    """
    if prompts.answers is None:
        return {}
    scores = prompts.scores(logits, rest).cpu()
    own, other = prompts.labels.cpu()[:, None], prompts.other.cpu()[:, None]
    preference = scores.gather(-1, own) - scores.gather(-1, other)
    leads = {"own_lead": lead(scores, own), "other_lead": lead(scores, other)}
    return {"preference": preference.squeeze(-1)} | leads


def lead(scores: Tensor, classes: Tensor) -> Tensor:
    """Score of a class minus the highest of all others, (n,), of scores (n, K), classes (n, 1)."""
    rival = scores.scatter(-1, classes, float("-inf")).amax(-1)
    return scores.gather(-1, classes).squeeze(-1) - rival


def divergences(clean: Tensor, edited: Tensor) -> Tensor:
    """KL(clean ‖ edited) of the next token in nats, (n,), of logits (n, vocabulary)."""
    before, after = clean.double().log_softmax(-1), edited.double().log_softmax(-1)
    # Rounding can leave −1e-17 where nothing changed.
    return (before.exp() * (before - after)).sum(-1).clamp_min(0).cpu()


def next_class(labels: Tensor, n_classes: int) -> Tensor:
    """The class after each one, (n,): the counterfactual one, the other one of two."""
    return (labels + 1) % n_classes


def finite(logits: Tensor, where: str) -> Tensor:
    """The same logits, or a :class:`NonFiniteError` where they hold NaN or infinity."""
    if not torch.isfinite(logits).all():
        raise NonFiniteError(
            f"the model's logits contain NaN or infinity in {where}. Try the model in float32."
        )
    return logits
