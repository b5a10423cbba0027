"""The parts that are not yet :class:`~.part.Part`s of their own, in the form of those that are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lrqp_torch.study import compare, controls
from lrqp_torch.study.context import Advance, StudyContext
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.part import Given, Part


class OldPart(Part[Any]):
    """A module with ``compute``, ``work``, ``from_json``, ``panels`` and ``draw``."""

    def __init__(
        self,
        name: str,
        title: str,
        question: str,
        module: Any,
        compute: Callable[[Given, Advance], Any],
        needs: tuple[str, ...] = (),
        by_name_only: bool = False,
    ) -> None:
        self.name, self.title, self.question = name, title, question  # type: ignore[misc]
        self.needs, self.by_name_only = needs, by_name_only  # type: ignore[misc]
        self.module, self._compute = module, compute

    def missing(self, context: StudyContext, /) -> str | None:
        """Whether the prompts have names."""
        named = isinstance(context.task.test, IOIPrompts)
        return None if named else "it needs the names of indirect object identification"

    def work(self, context: StudyContext, /) -> int:
        """See :class:`Part`, like the methods below."""
        return int(self.module.work(context))

    def compute(self, given: Given, advance: Advance, /) -> Any:
        """The module's result."""
        return self._compute(given, advance)

    def read(self, raw: dict[str, Any], /) -> Any:
        """By the module's own reader."""
        return self.module.from_json(raw)

    def panels(self, result: Any, /) -> list[Any]:
        """Panels with plotly figures."""
        found: list[Any] = self.module.panels(result)
        return found

    def figures(self, result: Any, /) -> dict[str, Any]:
        """None: :meth:`draw` writes them."""
        return {}

    def says(self, result: Any, /) -> Sequence[str]:
        """Nothing: see :mod:`~.headlines`."""
        return []

    def draw(self, result: Any, folder: Path) -> list[Path]:
        """Write its figures as PNG and SVG."""
        paths: list[Path] = self.module.draw(result, folder)
        return paths


def _compare(given: Given, advance: Advance) -> Any:
    edits = {given.site: given.edit_at(given.site)}
    return compare.compute(given.context, edits, given.results["heads"], advance=advance)


def _controls(given: Given, advance: Advance) -> Any:
    settings = given.settings
    return controls.compute(
        given.context,
        given.site,
        given.edit_at(given.site),
        given.results["heads"],
        l2=settings.l2,
        shrinkage=settings.shrinkage,
        advance=advance,
    )


_PARTS = (
    OldPart(
        "compare",
        "LRQP beside other edits",
        "What do other ways to write the same belief at the same place do to the answer, to all "
        "else that the model says, and to what independent probes read? Is LRQP the better choice?",
        compare,
        _compare,
        needs=("flipping", "heads"),
        by_name_only=True,  # it trains edits, which takes as long as all else together
    ),
    OldPart(
        "controls",
        "Is the edit an illusion?",
        "An edit can change an answer along a direction that means nothing to the model. Does this "
        "one act through what later parts of the model read, does it act elsewhere too, and what "
        "do edits do that know nothing of the order?",
        controls,
        _controls,
        needs=("flipping", "heads"),
    ),
)

OLD: dict[str, Part[Any]] = {part.name: part for part in _PARTS}
