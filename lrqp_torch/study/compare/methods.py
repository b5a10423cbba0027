"""The edits of the league table: every baseline, LRQP as fitted and as learned, on equal terms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lrqp_torch.baselines import BASELINES, DAS, LEACE, Baseline, BaselineData, LeastEdit, build
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import LRQPError, SettingError
from lrqp_torch.study.compare.trained import Training, shortest, train_das, train_learned
from lrqp_torch.study.compare.variants import LearnedLRQP
from lrqp_torch.study.context import StudyContext

NOTHING, FITTED, LEARNED = "none", LeastEdit.name, LearnedLRQP.name
ERASING = (LEACE.name,)
"""Methods that remove the variable instead of writing a class of it."""


@dataclass(frozen=True)
class Candidate:
    """One row of the table, ready to run or not.

    Attributes:
        name: in files.
        title: in tables and figures.
        settings: how it was trained, in words; empty for methods in closed form.
        edit: None where it could not be built.
        problem: why not; empty otherwise.
    """

    name: str
    title: str
    settings: str
    edit: Baseline | None
    problem: str = ""


def method_names() -> list[str]:
    """All methods in the order of the table; learned LRQP behind LRQP."""
    names = list(BASELINES)
    names.insert(names.index(FITTED) + 1, LEARNED)
    return names


def check_names(names: Sequence[str] | None) -> list[str]:
    """The methods asked for in the order of the table; all for None. LRQP and none always run.

    Raises:
        SettingError: a name that is no method.
    """
    known = method_names()
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise SettingError(f"unknown method {unknown[0]!r}; choose from {', '.join(known)}")
    return [n for n in known if names is None or n in {*names, NOTHING, FITTED}]


def build_candidates(
    context: StudyContext,
    site: str,
    reference: LRQP,
    names: Sequence[str],
    training: Training,
) -> list[Candidate]:
    """Fit every method to the training prompts, and to nothing else.

    Args:
        context: the model and its prompts.
        site: where they edit, at S2.
        reference: the study's LRQP at that site.
        names: from :func:`check_names`.
        training: of methods that are trained through the model.
    """
    data = context.task.train
    x = context.activations(context.task, "train", "S2", [site])[site]
    labels = data.labels.to(x.device)
    few = shortest(data, training.prompts)

    def closed_form(name: str) -> tuple[Baseline, str]:
        return build(name, BaselineData(x, labels, reference, seed=context.seed)), ""

    def das(name: str) -> tuple[Baseline, str]:
        return train_das(context, site, reference, few, training)

    def learned(name: str) -> tuple[Baseline, str]:
        return train_learned(context, site, reference, few, training)

    makers: dict[str, Callable[[str], tuple[Baseline, str]]] = {DAS.name: das, LEARNED: learned}
    candidates = []
    for name in names:
        title = LearnedLRQP.title if name == LEARNED else BASELINES[name].title
        try:
            edit, settings = makers.get(name, closed_form)(name)
        except LRQPError as error:  # a method that cannot be built is a row that says so
            candidates.append(Candidate(name, title, "", None, _first_sentence(error)))
        else:
            candidates.append(Candidate(name, title, settings, edit))
    return candidates


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"
