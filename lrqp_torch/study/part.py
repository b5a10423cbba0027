"""What a part of the study is: a question, its numbers, and how they are shown.

A part is one file of :mod:`lrqp_torch.study.parts` with one :class:`Part` in it, and an instance of
it under the name ``PART``; a row of :data:`lrqp_torch.study.parts.PARTS` is all that knows it
besides.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar, cast

from torch import Tensor

from lrqp_torch.distributed import Ranks
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import SettingError
from lrqp_torch.plot.chart import Chart, Panel
from lrqp_torch.study.context import ALONE, Advance, StudyContext
from lrqp_torch.study.records import from_json
from lrqp_torch.study.settings import Settings

if TYPE_CHECKING:
    from lrqp_torch.study.results import StudyResults

R = TypeVar("R")


class Batches(Protocol):
    """Keeps the tensors of finished batches, so that a part that was stopped can go on."""

    def load(self, index: int) -> dict[str, Tensor] | None:
        """The tensors of a batch, or None if it was not reached."""

    def save(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a batch."""


def keep_nothing(tensors: Mapping[str, Tensor]) -> None:
    """The default of :attr:`Given.keep_prompts`."""


@dataclass(frozen=True)
class Given:
    """What a part may build on.

    Attributes:
        context: the model and its prompts.
        settings: what the study is asked to do.
        best_site: where the sweep's counterfactual edit flips most; None without a sweep.
        edit_at: the study's edit at a site.
        results: results of the parts that ran before, by name.
        ranks: the processes that all compute this part, for parts that are ``shared``.
        batches: where the part may keep batches until it is finished; None to keep none.
        keep_prompts: keeps numbers of each held-out prompt, (n,) by name, beside the results.
    """

    context: StudyContext
    settings: Settings
    best_site: str | None
    edit_at: Callable[[str], LRQP]
    results: dict[str, Any] = field(default_factory=dict)
    ranks: Ranks = ALONE
    batches: Batches | None = None
    keep_prompts: Callable[[Mapping[str, Tensor]], object] = keep_nothing

    @property
    def site(self) -> str:
        """The best site, for parts that need the sweep."""
        if self.best_site is None:
            raise SettingError("this part edits the best site of the sweep: run flipping before it")
        return self.best_site


class Part(ABC, Generic[R]):
    """One part of the study.

    Attributes:
        name: on the command line and of its file; letters only.
        title: of its chapter in the report, and of its progress bar.
        question: what the chapter asks, in plain words.
        result: the dataclass of its result: plain values, :class:`~.estimates.Estimate` and
            dataclasses of these, which :mod:`~.records` writes and reads.
        needs: names of the parts that run before, those that can run on the prompts.
        by_name_only: whether it runs only when it is named, and not as one of all.
        spans: whether it runs where prompts are edited at several tokens each.
        shared: whether all ranks compute it together, and not rank 0 alone; such parts come first.
        prompts: which of the held-out prompts it sees: all; those by which something is chosen; or
            the others, on which what was chosen, such as the best site, is reported.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]
    result: ClassVar[type]
    needs: ClassVar[tuple[str, ...]] = ()
    by_name_only: ClassVar[bool] = False
    shared: ClassVar[bool] = False
    spans: ClassVar[bool] = False
    prompts: ClassVar[Literal["all", "choosing", "reporting"]] = "all"

    def scope(self, context: StudyContext, /) -> StudyContext:
        """The study of the prompts that it sees."""
        return context if self.prompts == "all" else context.half(int(self.prompts == "reporting"))

    def missing(self, context: StudyContext, /) -> str | None:
        """Why the part cannot run on these prompts (a sentence), or None if it can."""
        return None

    @abstractmethod
    def work(self, context: StudyContext, /) -> int:
        """Units by which :meth:`compute` advances its progress bar in all."""

    @abstractmethod
    def compute(self, given: Given, advance: Advance, /) -> R:
        """The part's numbers."""

    def read(self, raw: dict[str, Any], /) -> R:
        """A result from the plain JSON values that :func:`~.records.to_json` made of it."""
        return cast(R, from_json(self.result, raw))

    def found(self, study: "StudyResults", /) -> R | None:
        """Its result in a finished study, to be shown; None if it did not run."""
        raw = study.parts.get(self.name)
        return None if raw is None else self.read(raw)

    def overview(self, result: R, /) -> list[Panel]:
        """What the report's first screen shows of it; most parts have nothing there."""
        return []

    @abstractmethod
    def panels(self, result: R, /) -> list[Panel]:
        """Its charts and tables in the report."""

    @abstractmethod
    def figures(self, result: R, /) -> dict[str, Chart]:
        """Its figures on disk: file name without ending to chart."""

    @abstractmethod
    def says(self, result: R, /) -> Sequence[str]:
        """What was found, a sentence or two each, for the report and the terminal."""
