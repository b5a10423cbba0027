"""Clean activations for one part of the study, with a progress count that always adds up."""

from collections.abc import Sequence

from torch import Tensor

from lrqp_torch.study.context import Advance, StudyContext, Task

SPLITS = ("train", "test")


def tasks_of(context: StudyContext) -> list[Task]:
    """The study's task, then the other one where there is one."""
    return [context.task] if context.other_task is None else [context.task, context.other_task]


def capture_units(task: Task) -> int:
    """How much :func:`clean_activations` advances for both splits at one position."""
    return len(task.train) + len(task.test)


def clean_activations(
    context: StudyContext,
    task: Task,
    position: str,
    advance: Advance,
    sites: Sequence[str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Activations of the training and of the held-out prompts, (n, d) by site.

    ``advance`` is called with :func:`capture_units` in all, also where another part of the study
    has captured the same before.
    """
    splits = []
    for split in SPLITS:
        counted = 0

        def count(done: int) -> None:
            nonlocal counted
            counted += done
            advance(done)

        splits.append(context.activations(task, split, position, sites, count))
        advance(len(getattr(task, split)) - counted)
    return splits[0], splits[1]
