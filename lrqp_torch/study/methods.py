"""The edits that are compared: every baseline, LRQP as fitted and as learned, on equal terms.

All are fitted to the training prompts and to nothing else. Some write the activation of another
prompt; where the task knows each prompt's minimal pair it is that one's, else that of a training
prompt of the class to write.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lrqp_torch.baselines import (
    BASELINES,
    DAS,
    LEACE,
    Baseline,
    BaselineData,
    Behaviour,
    DASLeast,
    LeastEdit,
    build,
)
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import LRQPError, PromptError, SettingError
from lrqp_torch.learn import EditPrompts, LearnOptions, Weights, learn
from lrqp_torch.stream.capture import capture
from lrqp_torch.stream.replay import Tail
from lrqp_torch.stream.sites import Site
from lrqp_torch.study.context import StudyContext
from lrqp_torch.study.prompts import PromptSet, rows_by_class


class LearnedLRQP(LeastEdit):
    """LRQP with its learned probe, odds and metric, measured by those of the fitted one."""

    name: ClassVar[str] = "lrqp_learned"
    title: ClassVar[str] = "LRQP, learned"

    def __init__(self, reference: LRQP, learned: LRQP, *, strength: float = 1.0) -> None:
        super().__init__(reference, strength=strength)
        self.program = learned


class DosedLRQP(LeastEdit):
    """LRQP that asks for the same log odds of every prompt: its own dose, instead of a strength."""

    name: ClassVar[str] = "lrqp_dose"
    title: ClassVar[str] = "LRQP, by its odds"

    def __init__(self, reference: LRQP, log_alpha: float) -> None:
        super().__init__(reference)
        odds, own = log_alpha, (reference.probe, reference.metric)
        self.program = LRQP(*own, log_odds=odds, rule="fixed", on_infeasible="skip")


NOTHING, RANDOM = "none", "random"
FITTED, LEARNED, DOSED = LeastEdit.name, LearnedLRQP.name, DosedLRQP.name
OWN = (FITTED, LEARNED, DOSED)
"""LRQP in all its forms."""
_ROWS = list(BASELINES.items())
_OWN = 1 + list(BASELINES).index(FITTED)
METHODS: dict[str, type[Baseline]] = dict([*_ROWS[:_OWN], (LEARNED, LearnedLRQP), *_ROWS[_OWN:]])
"""All edits that are compared, in the order of tables."""
TRAINED = (DAS.name, DASLeast.name, LEARNED)
"""Edits that are trained on the answers, through the model."""
ERASING = (LEACE.name,)
"""Methods that remove the variable instead of writing a class of it."""


@dataclass(frozen=True)
class Training:
    """How methods that are trained through the model are trained: all on the same terms."""

    prompts: int = 192  # most training prompts that they see; the shortest ones, which cost least
    epochs: int = 20  # passes over them, at most
    # Share of them by whose loss training stops and the best epoch is chosen, the same prompts for
    # every method.
    held_back: float = 0.25
    patience: int = 3  # epochs without a better loss on these after which to stop
    # What a nat of KL at other tokens costs it, in nats of the answer; see `Weights`.
    elsewhere: float = 0.1
    batch_size: int = 16  # prompts a step


@dataclass(frozen=True)
class Candidate:
    """One method, ready to run or not."""

    name: str  # in files
    title: str  # in tables and figures
    settings: str = ""  # how it was trained, in words; empty for methods in closed form
    edit: Baseline | None = None  # None where it could not be built
    problem: str = ""  # why not; empty otherwise


def check_names(names: Sequence[str] | None) -> list[str]:
    """The methods asked for, in the order of tables; all for None. LRQP and none always run.

    Raises:
        SettingError: a name that is no method.
    """
    unknown = [name for name in names or () if name not in METHODS]
    if unknown:
        raise SettingError(f"unknown method {unknown[0]!r}; choose from {', '.join(METHODS)}")
    return [n for n in METHODS if names is None or n in {*names, NOTHING, FITTED}]


def build_candidates(
    context: StudyContext, site: str, reference: LRQP, names: Sequence[str], training: Training
) -> list[Candidate]:
    """Fit every method of :func:`check_names` to the training prompts, to edit the marked token.

    ``reference`` is the study's LRQP at the site, ``training`` that of methods that are trained
    through the model.
    """
    data = context.task.train
    x = context.activations(context.task, "train", "mark", [site])[site]
    labels = data.labels.to(x.device)
    given = context, site, reference, shortest(data, training.prompts), training
    das = cache(lambda: train_das(*given))
    trained: dict[str, Callable[[], tuple[Baseline, str]]] = {
        LEARNED: lambda: train_learned(*given),
        DAS.name: das,
        DASLeast.name: lambda: (DASLeast.of(das()[0]), das()[1]),
    }
    known, candidates = BaselineData(x, labels, reference, seed=context.seed), []
    for name in names:
        title = METHODS[name].title
        try:
            edit, settings = trained[name]() if name in trained else (build(name, known), "")
        except LRQPError as error:  # a method that cannot be built is a row that says so
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
            candidates.append(Candidate(name, title, problem=problem))
        else:
            candidates.append(Candidate(name, title, settings, edit))
    return candidates


# ---- what methods that patch are told to write ---------------------------------------------------


def counterparts(
    context: StudyContext, prompts: PromptSet, sites: Sequence[str], variable: str | None = None
) -> dict[str, Tensor]:
    """For each prompt the activation of one of the next class, by site, (n, d) each in float32.

    It is that of the prompt's twin where it has one, else that of a training prompt drawn with the
    study's seed.
    """
    twins, target = prompts.twins(variable), prompts.other
    if twins is None:
        return drawn(context, sites, target)
    inputs, at, size = twins.prompts.inputs, twins.prompts.position, context.batch_size
    seen = capture(context.model, inputs, list(sites), at, batch_size=size)
    found = {site: values.float() for site, values in seen.items()}
    known = twins.known.to(context.device).unsqueeze(-1)
    if bool(known.all()):
        return found
    others = drawn(context, sites, target)
    return {site: torch.where(known, values, others[site]) for site, values in found.items()}


def drawn(context: StudyContext, sites: Sequence[str], target: Tensor) -> dict[str, Tensor]:
    """Activations of random training prompts with the classes asked for, by site, (n, d) each.

    Raises:
        PromptError: no training prompt has a class that is asked for.
    """
    x = context.activations(context.task, "train", "mark", sites)
    labels, target = context.task.train.labels.cpu(), target.cpu()
    chosen = torch.zeros(len(target), dtype=torch.long)
    generator = context.generator()
    for label in range(len(context.task.train.classes)):
        rows, wanted = (labels == label).nonzero().flatten(), target == label
        if len(rows):
            draws = torch.randint(len(rows), (int(wanted.sum()),), generator=generator)
            chosen[wanted] = rows[draws]
        elif bool(wanted.any()):
            name = context.task.train.classes[label]
            raise PromptError(f"no training prompt has the class {name!r}, so none can be patched")
    return {site: values[chosen.to(values.device)] for site, values in x.items()}


def others_alike(labels: Tensor, generator: torch.Generator) -> Tensor:
    """For each prompt the row of another one of its class, drawn without replacement, (n,).

    Its activation is what a patch writes as a control: a minimal pair of the same class would be
    the prompt itself.
    """
    other = torch.arange(len(labels))
    for rows in rows_by_class(labels, generator):
        other[rows] = rows.roll(1)
    return other


# ---- methods that are trained through the model --------------------------------------------------


def shortest(data: PromptSet, most: int) -> PromptSet:
    """The shortest prompts in their own order, without the padding that none of them needs."""
    mask = data.inputs["attention_mask"]
    rows = torch.argsort(mask.sum(1), stable=True)[:most].sort().values
    return data[rows].trimmed()


def behaviour(context: StudyContext, site: str, data: PromptSet, batch_size: int) -> Behaviour:
    """The model that should answer in the sense of the next class once prompts are edited.

    The loss is −log P(an answer of that class) at the last column, in nats. Raises PromptError: the
    prompts have no answers.
    """
    if data.answers is None:
        raise PromptError("these prompts have no answers, so no edit can be trained to change them")
    here = data.deciding().to(context.device)
    # Left padding puts the end in the last column, and nothing before the first mark can change.
    end, first = here.inputs["input_ids"].shape[1] - 1, int(here.position.min())
    tail = Tail(
        context.model, here.inputs, Site.parse(site).layer, first, batch_size=context.batch_size
    )
    assert here.answers is not None
    tokens = here.answers[torch.arange(len(here), device=here.other.device), here.other]

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        wanted = tokens[rows.to(tokens.device)].to(logits.device)
        read = logits[:, -1]
        log_p = read.to(torch.promote_types(read.dtype, torch.float32)).log_softmax(-1)
        chosen = log_p.gather(-1, wanted.clamp_min(0)).masked_fill(wanted < 0, float("-inf"))
        return -chosen.logsumexp(-1)

    return Behaviour(
        model=context.model,
        inputs=here.inputs,
        site=site,
        positions=here.position,
        loss=loss,
        batch_size=batch_size,
        rerun=lambda rows: tail.run(rows, torch.tensor([end])),
    )


def train_das(
    context: StudyContext,
    site: str,
    reference: LRQP,
    data: PromptSet,
    training: Training,
    *,
    rank: int = 1,
    variable: str | None = None,
) -> tuple[DAS, str]:
    """DAS of rank 1 for the next class to be the answer, and how it was trained, in words."""
    wanted, pairs = behaviour(context, site, data, training.batch_size), [site]
    edit = DAS.fit(
        wanted,
        counterparts(context, data, pairs, variable)[site],
        reference=reference,
        rank=rank,
        epochs=training.epochs,
        validation=training.held_back,
        patience=training.patience,
        seed=context.seed,
    )
    report = edit.report
    assert report is not None
    return edit, (
        f"rank {rank}, {len(data)} prompts, {len(report.validation_loss)} epochs in batches of "
        f"{training.batch_size}, best {report.best_epoch}"
    )


def train_learned(
    context: StudyContext, site: str, reference: LRQP, data: PromptSet, training: Training
) -> tuple[Baseline, str]:
    """LRQP learned for the next class to be the answer, and how, in words.

    It is learned from the prompts that are given and no others; those held back are DAS's.
    """
    prompts = counterfactual_prompts(data)
    rows = torch.randperm(len(data), generator=context.generator())
    back = max(1, round(training.held_back * len(data)))
    held_back, seen = (prompts[own.sort().values] for own in (rows[:back], rows[back:]))
    options = LearnOptions(
        weights=Weights(elsewhere=training.elsewhere),
        epochs=training.epochs,
        patience=training.patience,
        batch_size=training.batch_size,
        seed=context.seed,
    )
    known: dict[str, Any] = {"validation": held_back, "options": options}
    learned = learn(context.model, site, reference, seen, **known)
    return LearnedLRQP(reference, learned.edit), (
        f"{len(data)} prompts, {len(learned.history) - 1} epochs in batches of "
        f"{training.batch_size}, best {learned.best_epoch}, weight of KL elsewhere "
        f"{training.elsewhere:g}"
    )


def counterfactual_prompts(data: PromptSet) -> EditPrompts:
    """Prompts whose edit writes the next class, so that its answer wins over that which holds.

    The first answer of a class stands for it. Raises PromptError: the prompts have no answers.
    """
    if data.answers is None:
        raise PromptError("these prompts have no answers, so no edit can be learned from them")
    data = data.deciding()
    target, answers = data.other, cast(Tensor, data.answers)
    rows, first = torch.arange(len(data), device=target.device), answers[..., 0]
    return EditPrompts(
        inputs=data.inputs,
        positions=data.position,
        target=target,
        source=data.labels,
        read=data.end,
        wins=first[rows, target],
        loses=first[rows, data.labels],
    )
