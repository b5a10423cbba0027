"""Methods that are trained through the model, on as few and as short prompts as will do."""

from dataclasses import dataclass

import torch

from lrqp_torch.baselines import DAS, Behaviour, answer_loss
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.learn import LearnOptions, Weights
from lrqp_torch.stream.replay import Tail
from lrqp_torch.stream.sites import Site
from lrqp_torch.study.compare.partners import s2_activations
from lrqp_torch.study.compare.variants import LearnedLRQP
from lrqp_torch.study.context import StudyContext
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.learned import fit_learned


@dataclass(frozen=True)
class Training:
    """How methods that are trained through the model are trained.

    Attributes:
        prompts: most training prompts that they see; the shortest ones, which cost least.
        das_epochs: of DAS, at most.
        learned_epochs: of learned LRQP, at most.
        elsewhere: what a nat of KL at other tokens costs it, in nats of the answer; see
            :class:`~lrqp_torch.learn.Weights`.
        batch_size: prompts a step.
    """

    prompts: int = 192
    das_epochs: int = 20
    learned_epochs: int = 4
    elsewhere: float = 0.1
    batch_size: int = 16


def shortest(data: IOIPrompts, most: int) -> IOIPrompts:
    """The shortest prompts in their own order, without the padding that none of them needs."""
    mask = data.inputs["attention_mask"]
    rows = torch.argsort(mask.sum(1), stable=True)[:most].sort().values
    return data[rows].trimmed()


def train_das(
    context: StudyContext, site: str, reference: LRQP, data: IOIPrompts, training: Training
) -> tuple[DAS, str]:
    """DAS of rank 1 for S to be the answer, and how it was trained, in words."""
    here = data.to(context.device)
    # Left padding puts END in the last column, and nothing before the first S2 can change.
    end = here.inputs["input_ids"].shape[1] - 1
    tail = Tail(
        context.model,
        here.inputs,
        Site.parse(site).layer,
        int(here.positions["S2"].min()),
        batch_size=context.batch_size,
    )
    column = torch.tensor([end])
    behaviour = Behaviour(
        model=context.model,
        inputs=here.inputs,
        site=site,
        positions=here.positions["S2"],
        loss=answer_loss(torch.zeros_like(here.s_tokens), here.s_tokens),
        batch_size=training.batch_size,
        rerun=lambda rows: tail.run(rows, column),
    )
    edit = DAS.fit(
        behaviour,
        s2_activations(context, data.twins(), site),
        reference=reference,
        rank=1,
        epochs=training.das_epochs,
        seed=context.seed,
    )
    assert edit.report is not None
    report = edit.report
    return edit, (
        f"rank 1, {len(data)} prompts, {len(report.validation_loss)} epochs in batches of "
        f"{training.batch_size}, best {report.best_epoch}"
    )


def train_learned(
    context: StudyContext, site: str, reference: LRQP, data: IOIPrompts, training: Training
) -> tuple[LearnedLRQP, str]:
    """LRQP learned for S to be the answer, and how, in words."""
    options = LearnOptions(
        weights=Weights(elsewhere=training.elsewhere),
        epochs=training.learned_epochs,
        batch_size=training.batch_size,
        seed=context.seed,
    )
    learned = fit_learned(context.model, site, reference, data, options=options)
    return LearnedLRQP(reference, learned.edit), (
        f"{len(data)} prompts, {len(learned.history) - 1} epochs in batches of "
        f"{training.batch_size}, best {learned.best_epoch}, weight of KL elsewhere "
        f"{training.elsewhere:g}"
    )
