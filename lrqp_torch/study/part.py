"""What a part of the study is: a question, its numbers, and how they are shown.

A part is one file of :mod:`lrqp_torch.study.parts` with one :class:`Part` in it, and an instance of
it under the name ``PART``; a row of :data:`lrqp_torch.study.parts.PARTS` is all that knows it
besides.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import OutputError, SettingError
from lrqp_torch.plot.chart import Chart, Panel
from lrqp_torch.study.context import Advance, StudyContext, no_progress
from lrqp_torch.study.indirect_objects import NAMES_NEEDED, IOIPrompts
from lrqp_torch.study.records import from_json
from lrqp_torch.study.results import StudyResults, told
from lrqp_torch.study.settings import Settings
from lrqp_torch.study.showing import panel, said
from lrqp_torch.study.store import BatchStore
from lrqp_torch.study.sweep import fit_edits

R = TypeVar("R")


@dataclass(frozen=True)
class Given:
    """What a part may build on."""

    context: StudyContext  # the model and its prompts
    settings: Settings  # what the study is asked to do
    best_site: str | None  # where the sweep's counterfactual edit flips most; None without a sweep
    edit_at: Callable[[str], LRQP]  # the study's edit at a site
    # Results of the parts that ran before, by name.
    results: dict[str, Any] = field(default_factory=dict)
    # Where the part may keep batches until it is finished; None to keep none.
    batches: BatchStore | None = None
    # Keeps numbers of each held-out prompt, (n,) by name, beside the results.
    keep_prompts: Callable[[Mapping[str, Tensor]], object] = lambda tensors: None

    @property
    def site(self) -> str:
        """The best site, for parts that need the sweep."""
        if self.best_site is None:
            raise SettingError("this part edits the best site of the sweep: run flipping before it")
        return self.best_site

    def fit(
        self, found: Mapping[str, Tensor], labels: Tensor, advance: Advance = no_progress
    ) -> dict[str, LRQP]:
        """Edits by site as the settings ask for them, see :func:`~.sweep.fit_edits`."""
        return fit_edits(found, labels, advance=advance, **self.settings.fitting)


class Part(ABC, Generic[R]):
    """One part of the study."""

    name: ClassVar[str]  # on the command line and of its file; letters only
    title: ClassVar[str]  # of its chapter in the report, and of its progress bar
    # The dataclass of its result, which :mod:`~.records` writes and reads.
    result: ClassVar[type]
    needs: ClassVar[tuple[str, ...]] = ()  # parts that run before, if they can on the prompts
    by_name_only: ClassVar[bool] = False  # whether it is not one of all
    shared: ClassVar[bool] = False  # whether all ranks compute it together; such parts come first
    spans: ClassVar[bool] = False  # whether it runs where prompts are edited at several tokens each
    # Which held-out prompts it sees: all; those by which something is chosen; or the others, on
    # which what was chosen, such as the best site, is reported.
    prompts: ClassVar[Literal["all", "choosing", "reporting"]] = "all"
    asks: ClassVar[Literal["nothing", "answers", "names"]] = "nothing"  # of the prompts

    @property
    def question(self) -> str:
        """What the chapter asks, in plain words."""
        return said(self.name, "question")[0]

    def scope(self, context: StudyContext, /) -> StudyContext:
        """The study of the prompts that it sees."""
        return context if self.prompts == "all" else context.half(int(self.prompts == "reporting"))

    def missing(self, context: StudyContext, /) -> str | None:
        """Why the part cannot run on these prompts (a sentence), or None if it can."""
        test = context.task.test
        if self.asks == "answers" and test.answers is None:
            return "its prompts have no answers, so no edit can be judged by what the model says"
        return NAMES_NEEDED if self.asks == "names" and not isinstance(test, IOIPrompts) else None

    @abstractmethod
    def work(self, context: StudyContext, /) -> int:
        """Units by which :meth:`compute` advances its progress bar in all."""

    @abstractmethod
    def compute(self, given: Given, advance: Advance, /) -> R:
        """The part's numbers.

        Raises:
            NonFiniteError: the model's logits are NaN or infinite.
            UnknownFamilyError: the model's attention or final norm is of an unknown form, where
                heads are looked at.
        """

    def read(self, raw: dict[str, Any], /) -> R:
        """A result from the plain JSON values that :func:`~.records.to_json` made of it.

        Raises:
            OutputError: they are others.
        """
        try:
            return cast(R, from_json(self.result, raw))
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"what a study keeps of its part {self.name!r} is not what this version writes "
                f"({error}): run it anew, without --resume"
            ) from error

    def found(self, study: StudyResults, /) -> R | None:
        """Its result in a finished study, to be shown; None if it did not run.

        See :func:`~.results.told` for what is not shown.
        """
        raw, here = study.parts.get(self.name), study.sites.get(str(study.best_site))
        if raw is None:
            return None
        if study.shown.get(self.name, (None,))[0] is not raw:
            shown = told(self.read(raw), here is None or here.used)
            study.shown[self.name] = raw, shown
        return cast(R, study.shown[self.name][1])

    def overview(self, result: R, /) -> list[Panel]:
        """What the report's first screen shows of it; most parts have nothing there."""
        return []

    @abstractmethod
    def panels(self, result: R, /) -> list[Panel]:
        """Its charts and tables in the report."""

    @abstractmethod
    def figures(self, result: R, /) -> dict[str, Chart]:
        """Its figures on disk: file name without ending to chart."""

    def says(self, result: R, /) -> Sequence[str]:
        """What was found, a sentence or two each, for the report and the terminal."""
        return said(self.name, "says", result=result)

    def panel(self, name: str, result: R, /, *, shown: Mapping[str, Any], **known: Any) -> Panel:
        """A panel with its words, see :func:`~.showing.panel`, which are given the result too."""
        return panel(self.name, name, shown=shown, result=result, **known)
