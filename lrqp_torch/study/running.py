"""Running prompts batch by batch: clean once, then under any edits, rerunning what they change."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lrqp_torch.baselines import Baseline, Paired
from lrqp_torch.edits.joint import JointLRQP
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.record import EditRun
from lrqp_torch.errors import NonFiniteError, PromptError, WidthError
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.compiled import input_device
from lrqp_torch.stream.intervene import Edit, EditContext, Intervention, intervene
from lrqp_torch.stream.replay import Replay
from lrqp_torch.stream.sites import Site
from lrqp_torch.study.ceiling import Interchange, held_against
from lrqp_torch.study.context import Advance, StudyContext, Task, no_progress
from lrqp_torch.study.estimates import Sample
from lrqp_torch.study.heads import parse_head
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
        Raises NonFiniteError: the logits hold NaN or infinity.
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

        It acts at the marked token, or at each of several. ``targets`` are by name the class to
        write, (B,), of an edit of several variables (B, V); ``beside`` what is put at the marked
        token instead, (B, d), in as many runs as are left of the copies: where there are several
        tokens, the others move as it does. ``source`` is the class that holds, by default the
        prompts' labels; ``asked`` has by name of a target and by variable the log α, (B,), in place
        of the edit's own rule, of one variable under the name ``""``. Raises NonFiniteError: the
        model's logits under an edit are NaN or infinite.
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
    """The prompts, padded on the left, in batches of ``size`` at most, cheapest to replay first.

    Padding on the left puts the end in the last column, so a later start means a shorter suffix to
    run again; prompts of like suffixes share a batch. No edit acts before the token ``start``, one
    of ``prompts.positions``; ``copies`` targets of each edit run side by side. Raises PromptError:
    prompts that do not end in the last column.
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

    ``logit_difference``, the score of the class that holds minus that of the counterfactual one;
    ``own_lead`` and ``other_lead``, the score of each minus the highest of all other classes,
    positive where it is what the model answers. With two classes these are the preference and its
    negative. The arguments are those of :meth:`PromptSet.scores`.
    """
    if prompts.answers is None:
        return {}
    scores = prompts.scores(logits, rest).cpu()
    own, other = prompts.labels.cpu()[:, None], prompts.other.cpu()[:, None]
    difference = scores.gather(-1, own) - scores.gather(-1, other)
    leads = {"own_lead": lead(scores, own), "other_lead": lead(scores, other)}
    return {"logit_difference": difference.squeeze(-1)} | leads


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


# ---- many edits of the same prompts --------------------------------------------------------------


class Trial:
    """One edit of every prompt, and what it did once it has run.

    It acts at a site, None for no edit; ``place`` gives the edit of the prompts ``rows``, (B,), at
    columns ``at``, (B,); it is held against the trial ``patch``, added before, of which ``known``
    says which prompts have a twin, BoolTensor (n,).
    """

    def __init__(
        self,
        site: str | None,
        place: Callable[[Tensor, Tensor], Intervention] | None,
        patch: "Trial | None" = None,
        known: Tensor | None = None,
    ) -> None:
        self.site, self.place, self.patch, self.known = site, place, patch, known
        self.found: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """What was seen of each prompt, (n, ...) on the CPU, by the names in :class:`Trials`."""
        return self.found[name]


class Trials:
    """Many edits of the marked token of n prompts, each batch of which runs clean only once.

        trials = Trials(context, context.task.test)
        moved = trials.add("L6.mid", delta)
        written = trials.write("L7.pre", edit, target)
        trials.run()
        trials.sample.flipped(trials.clean.found, moved.found), written["logit_difference"]

    Where the prompts have answers every trial has ``logit_difference``, ``own_lead`` and
    ``other_lead`` of :func:`answers`, and ``said`` of :meth:`PromptSet.said`, (n, K); and where it
    is asked for:

    - ``divergence``, KL(clean ‖ edited) of the next token in nats, mean over the columns
      ``elsewhere``, and ``rest``, the part of it that is not about the answers. By the chain rule
      KL is that of the events "this answer", for each, and "none of them", and P(none) times the KL
      of the next token given none; the latter is ``rest``. Without answers it is all. The clean run
      has ``said_elsewhere``, the mean probability of the answers there;
    - ``attention``, the change of the watched heads' attention from the last column to the first
      key less that to the second, mean over heads; missing where all lie below the edits;
    - ``activations`` that the stream holds at the marked token after the edit, (n, d);
    - ``kl_to_interchange``, KL(patch ‖ edited) of the token at the end, in nats, where it is held
      against a patch, such as the :meth:`ceiling`; that has ``kl_at_end``, KL(clean ‖ patch) there.

    Args:
        context: the model, and how many prompts a batch has.
        prompts: padded on the left.
        elsewhere: columns at which the next-token distribution should stay, BoolTensor (n, T), at
            least one a prompt and none before the marked one.
        watched: heads.
        keys: the two columns to which their attention is read, (n, 2).
        activations: whether to keep them.

    Attributes:
        clean: the trial without an edit.
        sample: estimates over the prompts, from the study's seed.
    """

    def __init__(
        self,
        context: StudyContext,
        prompts: PromptSet,
        *,
        elsewhere: Tensor | None = None,
        watched: Sequence[str] = (),
        keys: Tensor | None = None,
        activations: bool = False,
    ) -> None:
        self._context, self._prompts = context, prompts
        self.elsewhere, self.keys, self.activations = elsewhere, keys, activations
        self.watched = [] if keys is None else [parse_head(name) for name in watched]
        self.clean, self.sample = Trial(None, None), Sample(context.seed, prompts.groups)
        self._trials: list[Trial] = []

    def add(
        self,
        site: str,
        delta: Tensor,
        patch: Trial | None = None,
        metric: Mahalanobis | None = None,
    ) -> Trial:
        """Add a displacement to the stream of each prompt, (n, d); the clean run where all are 0.

        ``patch`` is as of :class:`Trial`; what changes nothing is not held against it. With a
        metric the trial has the ``distance``, (n,). Raises WidthError: not one displacement for
        each prompt.
        """
        n = len(self._prompts)
        if delta.ndim != 2 or len(delta) != n:
            raise WidthError(
                f"a trial at {site} has displacements {tuple(delta.shape)}; give one for each of "
                f"the {n} held-out prompts"
            )

        def place(rows: Tensor, at: Tensor) -> Intervention:
            own = _rows(delta, rows, at)

            def add(x: Tensor, context: EditContext) -> Tensor:
                return (x.double() + own[context.index]).to(x.dtype)

            return Intervention(site, at, add)

        made = self._added(Trial(site, place, patch)) if bool(delta.any()) else self.clean
        if metric is not None:
            made.found["distance"] = metric.distance(delta).cpu()
        return made

    def ceiling(self, site: str, metric: Mahalanobis) -> Trial | None:
        """The activation of each prompt's twin in the place of its own; None without twins.

        Add it before the edits that are held against it; the metric measures the distance of both.
        """
        task = Task("", self._context.task.train, self._prompts)
        item = Twinned.of(self._context, task, site, metric.distance)
        if item is None:
            return None

        def place(rows: Tensor, at: Tensor) -> Intervention:
            return Intervention(site, at, placed(_rows(item.x, rows, at)))

        made = self._added(Trial(site, place, known=item.known))
        made.found["distance"] = item.distance
        return made

    def likenesses(
        self, edits: Mapping[str, Trial], patch: Trial | None
    ) -> tuple[Interchange | None, dict[str, dict[str, Any]]]:
        """A ceiling, and how edits that are shown together compare with it; None without one.

        Each edit, and the patch, knows its ``distance``, (n,).
        """
        if patch is None or patch.known is None:
            return None, {}
        there = patch.found | {"divergence": patch["kl_at_end"]}
        held = {name: trial.found for name, trial in edits.items()}
        return held_against(self.clean.found, held, there, self.sample.among(patch.known))

    def write(
        self,
        site: str,
        edit: Baseline,
        target: Tensor,
        source: Tensor | None = None,
        partners: Tensor | None = None,
        patch: Trial | None = None,
    ) -> Trial:
        """Make an edit, at the strength wanted, of each prompt, held against a patch.

        It writes the class ``target``, (n,), where ``source`` holds, (n,), by default the reference
        probe's own reading; ``partners`` are what a method that patches writes, (n, d).
        """

        def place(rows: Tensor, at: Tensor) -> Intervention:
            own = edit if partners is None else with_partners(edit, _rows(partners, rows, at))
            holds = None if source is None else _rows(source, rows, at)
            wanted = _rows(target, rows, at)
            return own.on(site, positions=at, target=wanted, source=holds, record=False)

        return self._added(Trial(site, place, patch))

    @torch.no_grad()
    def run(self, trial_done: Advance = no_progress, batch_done: Advance = no_progress) -> None:
        """Run every prompt clean and under every edit.

        The clean run goes the way of the edits, from the lowest site's layer on, so that an edit
        there which changes nothing leaves every bit as it is. ``trial_done`` is called with the
        number of prompts after each trial of a batch, ``batch_done`` after each batch. Raises
        NonFiniteError: a displacement or the model's logits hold NaN or infinity.
        """
        model, n = self._context.model, len(self._prompts)
        sites = [trial.site for trial in self._trials if trial.site]
        lowest = min((Site.parse(site).layer for site in sites), default=0)
        # No edit changes what heads below all of them attend to.
        layers = sorted({layer for layer, _ in self.watched if layer >= lowest})
        for batch in batches(model, self._prompts, self._context.batch_size):
            with ExitStack() as stack:
                patterns: dict[int, Tensor] = {}
                if layers:  # recording them makes attention slower
                    end = batch.prompts.end
                    patterns = stack.enter_context(record_patterns(model, layers, end))
                seen = _Seen(self, batch, lowest, patterns)
                put(self.clean.found, seen.clean, batch.rows, n)
                for trial in self._trials:
                    put(trial.found, seen.under(trial), batch.rows, n)
                    trial_done(len(batch))
            batch_done(len(batch))

    @property
    def patches(self) -> set[Trial]:
        """The trials that others are held against."""
        return {trial.patch for trial in self._trials if trial.patch is not None}

    def _added(self, trial: Trial) -> Trial:
        self._trials.append(trial)
        return trial


class _Seen:
    """What is seen of one batch, ``clean`` and under each edit, by the names in :class:`Trials`."""

    def __init__(
        self, trials: Trials, batch: Batch[PromptSet], lowest: int, patterns: dict[int, Tensor]
    ) -> None:
        self._trials, self._batch, self._patterns = trials, batch, patterns
        self._heads = [head for head in trials.watched if head[0] >= lowest]
        end, self._mask, self._columns = batch.prompts.end, torch.ones(0), None
        if trials.elsewhere is not None:
            mask = _rows(trials.elsewhere, batch.rows, end)
            # The last column is read for the answers.
            self._columns = mask.any(0).index_fill(0, end[:1], True).nonzero().flatten()
            self._mask = mask[:, self._columns]
        self._ends: dict[Trial, Tensor] = {}
        logits = self._run(lowest, "the clean run")
        self._end = logits[:, -1]
        self.clean = self._answers(logits)
        if trials.elsewhere is not None:
            self._log_p = logits.float().log_softmax(-1)
            self.clean["said_elsewhere"] = self._mean(self._said(self._log_p))
        if self._heads:
            self._attended = self._attention()

    def under(self, trial: Trial) -> dict[str, Tensor]:
        """What is seen under an edit."""
        assert trial.site is not None and trial.place is not None
        item = trial.place(self._batch.rows, self._batch.prompts.position)
        found: dict[str, Tensor] = {}

        def keep(x: Tensor, context: EditContext) -> Tensor:
            found["activations"] = x[context.index.argsort()]
            return x

        # Edits at one site run in their order, so that this one reads what the other wrote.
        reader = Intervention(item.site, item.positions, keep)
        with intervene(self._batch.model, [item, reader] if self._trials.activations else [item]):
            logits = self._run(Site.parse(trial.site).layer, f"an edit at {trial.site}")
        found |= self._answers(logits)
        if trial in self._trials.patches:
            self._ends[trial] = logits[:, -1]
            found["kl_at_end"] = divergences(self._end, logits[:, -1])
        if trial.patch is not None:
            found["kl_to_interchange"] = divergences(self._ends[trial.patch], logits[:, -1])
        if self._trials.elsewhere is not None:
            found |= self._divergences(logits.float().log_softmax(-1))
        if self._heads:
            shift = (self._attention() - self._attended).sum(-1)
            found["attention"] = (shift / len(self._trials.watched)).double()
        return found

    def _run(self, layer: int, where: str) -> Tensor:
        """Logits of the columns that are read, (B, columns, vocabulary)."""
        logits = self._batch.replay.run(layer, self._columns)
        return finite(logits if logits.ndim == 3 else logits.unsqueeze(1), where)

    def _answers(self, logits: Tensor) -> dict[str, Tensor]:
        prompts, rest = self._batch.prompts, self._batch.rest()
        if prompts.answers is None:
            return {}
        said = prompts.said(logits[:, -1], rest)
        return answers(prompts, logits[:, -1], rest) | {"said": said}

    def _divergences(self, log_q: Tensor) -> dict[str, Tensor]:
        terms = self._log_p.exp() * (self._log_p - log_q)
        none, still = (
            torch.log1p(-self._said(log).clamp_max(1 - 1e-7)) for log in (self._log_p, log_q)
        )
        about = self._of_answers(terms).sum(-1) + none.exp() * (none - still)
        # Rounding may leave a sum of 1e-9 below 0.
        whole, rest = terms.sum(-1).clamp_min(0), (terms.sum(-1) - about).clamp_min(0)
        return {"divergence": self._mean(whole), "rest": self._mean(rest)}

    def _said(self, log_p: Tensor) -> Tensor:
        """Probability of any answer at each column, (B, columns)."""
        return self._of_answers(log_p.exp()).sum(-1)

    def _of_answers(self, values: Tensor) -> Tensor:
        """The entries of the answers, (B, columns, answers), of values (B, columns, vocabulary)."""
        said = self._batch.prompts.first_tokens
        tokens = said.unsqueeze(1).expand(-1, values.shape[1], -1)
        return values.gather(-1, tokens.clamp_min(0)).masked_fill(tokens < 0, 0.0)

    def _mean(self, values: Tensor) -> Tensor:
        """Mean over the columns elsewhere, (B, columns) → (B,), float64."""
        return ((values * self._mask).sum(-1) / self._mask.sum(-1)).double()

    def _attention(self) -> Tensor:
        """Attention to the first key less that to the second, (B, heads)."""
        assert self._trials.keys is not None
        first, second = _rows(self._trials.keys, self._batch.rows, self._batch.prompts.end).T
        rows = [(self._patterns[layer][:, [head]]) for layer, head in self._heads]
        return torch.cat([attention_to(p, first) - attention_to(p, second) for p in rows], dim=-1)


def displacements(
    edit: LRQP, x: Tensor, target: Tensor, source: Tensor, asked: Tensor | None = None
) -> Tensor:
    """What an edit adds to activations (n, d), in float64; 0 where it cannot reach the target.

    ``asked`` is as in :meth:`LRQP.solve`.
    """
    wide = x.double()
    return edit.solve(wide, target, source, asked=asked).x_new.detach() - wide


def with_partners(edit: Baseline, activations: Tensor) -> Baseline:
    """The edit, with what it writes, (n, d), if it is one that needs to be told."""
    return edit.paired(activations) if isinstance(edit, Paired) else edit


def attention_to(rows: Tensor, keys: Tensor) -> Tensor:
    """Attention of all heads to one key an example: (B, heads) from (B, heads, T)."""
    return rows[torch.arange(len(rows), device=rows.device), :, keys.to(rows.device)]


def _rows(values: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """Some rows of a tensor, on the device of another one."""
    return values[rows.to(values.device)].to(like.device)
