"""What all parts of a study share: the model, the prompts of both tasks, and clean activations."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrqp_torch.distributed import Ranks, capture
from lrqp_torch.stream.progress import Advance as Advance
from lrqp_torch.stream.progress import no_progress as no_progress
from lrqp_torch.study.prompts import PromptSet, halves

ALONE = Ranks()
"""One process, without others to share work with."""


def evenly(sites: Sequence[str], most: int) -> list[str]:
    """At most ``most`` sites, evenly spaced, the first and the last among them."""
    if len(sites) <= most:
        return list(sites)
    steps = torch.linspace(0, len(sites) - 1, most).round().long()
    return [sites[index] for index in steps.tolist()]


@dataclass(frozen=True)
class Task:
    """One version of the task: prompts to fit on and prompts held out, padded on the left."""

    # Of the version: `"plain"` (no prefix) or `"prefixed"` (a sentence before each prompt) for
    # prompts about two names, `"own"` for others.
    name: str
    train: PromptSet  # prompts to fit on
    test: PromptSet  # prompts held out; none of them is in `train`

    def __len__(self) -> int:
        """Number of prompts, to fit on and held out together."""
        return len(self.train) + len(self.test)


@dataclass
class StudyContext:
    """The model and its prompts, with the clean activations computed once for all parts."""

    model: nn.Module  # a transformers causal language model in evaluation mode
    task: Task  # the task under study
    other_task: Task | None  # the other version, for comparison; None where it was not asked for
    sites: list[str]  # site names in order of computation
    batch_size: int  # prompts a forward pass
    seed: int  # of everything random in the analysis, such as bootstrap and shuffled labels
    device: torch.device  # where the model is
    variables: tuple[str, ...] = ()  # names of the variables that are edited, the class first
    # Rows of one's own data that could not be used, by reason.
    left_out: dict[str, int] = field(default_factory=dict)
    # What a reader of the results should know of the prompts, a sentence each.
    notes: list[str] = field(default_factory=list)
    # The processes that share what is captured, all of which then ask for it.
    ranks: Ranks = field(default=ALONE, init=False, repr=False)
    # By the prompts themselves, which are kept with them: names may be the same for others.
    _activations: dict[tuple[int, str], tuple[PromptSet, dict[str, Tensor]]] = field(
        default_factory=dict, init=False, repr=False
    )
    _halves: dict[int, "StudyContext"] = field(default_factory=dict, init=False, repr=False)

    def activations(
        self,
        task: Task,
        split: str,
        position: str,
        sites: Sequence[str] | None = None,
        advance: Advance = no_progress,
    ) -> dict[str, Tensor]:
        """Clean activations by site, (n, d) each in float32 on the model's device; kept.

        They are of the ``"train"`` or the ``"test"`` prompts, at one of ``PromptSet.positions``;
        of all sites of the study by default. ``advance`` is called with the number of prompts after
        each batch that had to be run.
        """
        data: PromptSet = getattr(task, split)
        at = data.positions[position]
        # One token may have several names, such as mark and S2.
        name = next(name for name, columns in data.positions.items() if torch.equal(columns, at))
        return self._kept(data, name, data.inputs, at, sites, advance)

    def _kept(
        self,
        data: PromptSet,
        name: str,
        inputs: dict[str, Tensor],
        at: Tensor,
        sites: Sequence[str] | None,
        advance: Advance,
    ) -> dict[str, Tensor]:
        """What is kept under a name of some prompts, captured where it is missing."""
        wanted = list(self.sites if sites is None else sites)
        _, kept = self._activations.setdefault((id(data), name), (data, {}))
        missing = [site for site in wanted if site not in kept]
        if missing:
            how: dict[str, Any] = {"batch_size": self.batch_size, "progress": advance}
            found = capture(self.model, inputs, missing, at, ranks=self.ranks, **how)
            kept.update({site: found.pop(site).float() for site in missing})
        return {site: kept[site] for site in wanted}

    def twins(
        self, task: Task, sites: Sequence[str] | None = None, variable: str | None = None
    ) -> tuple[dict[str, Tensor], Tensor] | None:
        """Clean activations of held-out prompts' twins at the mark, by site, and who has one.

        (n, d) each in float32 on the model's device, a prompt's own where it has no twin, and which
        have one, BoolTensor (n,) on the CPU; None where no prompt has one. ``variable`` is that in
        which twins differ, as :meth:`.PromptSet.twins` takes it; the rest as :meth:`activations`.
        """
        data, found = task.test, task.test.twins(variable)
        if found is None:
            return None
        if found.rows is not None:
            own = self.activations(task, "test", "mark", sites)
            rows = found.rows.to(self.device)
            return {site: x[rows] for site, x in own.items()}, found.known.cpu()
        name, (inputs, at) = f"twins {variable}", (found.prompts.inputs, found.prompts.position)
        return self._kept(data, name, inputs, at, sites, no_progress), found.known.cpu()

    def half(self, which: int) -> "StudyContext":
        """The same study of one half of the held-out prompts, see :func:`~.prompts.halves`.

        By the first half (0) sites and heads are chosen; what was chosen is reported on the second
        (1), so that no number is of the prompts that made it the largest.
        """
        if which not in self._halves:
            task, *others = (
                replace(task, test=task.test[halves(task.test)[which]]) for task in self.tasks
            )
            found = replace(self, task=task, other_task=others[0] if others else None)
            found._activations = self._activations
            self._halves[which] = found
        return self._halves[which]

    def examples(self, task: Task, sites: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """What an edit is fitted to: activations at all tokens that it acts on, and their classes.

        Site to (N, d), and (N,), on the model's device; N is the number of training prompts, or of
        their marked tokens where they have several.
        """
        data = task.train
        if data.spans is None:
            found = self.activations(task, "train", "mark", sites) if sites else {}
            return found, data.labels.to(self.device)
        rows = data.spans.nonzero()[:, 0]
        found = {}
        if sites:
            at, size = data.spans, self.batch_size
            found = capture(self.model, data.inputs, list(sites), at, batch_size=size)
        return {site: x.float() for site, x in found.items()}, data.labels[rows].to(self.device)

    @property
    def tasks(self) -> list[Task]:
        """The study's task, then the other one where there is one."""
        return [self.task] if self.other_task is None else [self.task, self.other_task]

    def clean(
        self, task: Task, position: str, advance: Advance, sites: Sequence[str] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Clean activations of the training and of the held-out prompts; see :meth:`activations`.

        ``advance`` is called with ``len(task)`` in all, also where another part of the study has
        captured the same before.
        """
        halves = []
        for split in ("train", "test"):
            counted = 0

            def count(done: int) -> None:
                nonlocal counted
                counted += done
                advance(done)

            halves.append(self.activations(task, split, position, sites, count))
            advance(len(getattr(task, split)) - counted)
        return halves[0], halves[1]

    def generator(self) -> torch.Generator:
        """A fresh generator from the study's seed; parts do not share random streams."""
        return torch.Generator().manual_seed(self.seed)
