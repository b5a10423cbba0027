"""DAS: what it moves, and that training finds a planted direction through a frozen model."""

import copy
import dataclasses
from functools import cache

import pytest
import torch
from models_for_tests import Prompts, build
from torch import Tensor
from transformers import PreTrainedModel

import lrqp_torch as lrqp
from lrqp_torch.baselines import DAS, Behaviour, DASLeast, answer_loss
from lrqp_torch.baselines.das import _basis, _losses
from lrqp_torch.errors import LearningError, PairError, SettingError, WidthError

SITE = "L1.pre"
N = 96


@dataclasses.dataclass(frozen=True)
class Planted:
    """A GPT-2 that answers token 0 or 1 by the sign of one direction of its stream."""

    model: PreTrainedModel
    direction: Tensor
    inputs: dict[str, Tensor]
    positions: Tensor
    answers: Tensor
    activations: Tensor
    partner: Tensor  # for each prompt one with the other answer

    def behaviour(self, rows: Tensor, batch_size: int = 16) -> Behaviour:
        at = self.positions[rows]
        return Behaviour(
            model=self.model,
            inputs={name: value[rows] for name, value in self.inputs.items()},
            site=SITE,
            positions=at,
            loss=answer_loss(at, self.answers[self.partner[rows]]),
            batch_size=batch_size,
        )


@cache
@torch.no_grad()
def planted() -> Planted:
    model = build("gpt2", tie_word_embeddings=False)
    # Blocks above the site only whisper, so that the answer is read off the stream at the site.
    for block in model.transformer.h[1:]:
        block.attn.c_proj.weight.mul_(0.05)
        block.mlp.c_proj.weight.mul_(0.05)
    direction = torch.randn(24)
    direction = (direction - direction.mean()) / (direction - direction.mean()).norm()
    model.transformer.ln_f.weight.fill_(1.0)
    model.transformer.ln_f.bias.zero_()
    model.lm_head.weight.zero_()
    model.lm_head.weight[0], model.lm_head.weight[1] = 4 * direction, -4 * direction
    prompts = Prompts.random([4] * N)
    inputs, positions = prompts.padded("right"), torch.full((N,), 3)
    answers = model(**inputs).logits[:, -1, :2].argmax(-1)
    groups = [(answers == k).nonzero().squeeze(-1) for k in range(2)]
    assert min(map(len, groups)) >= 20
    partner = torch.tensor(
        [int(groups[1 - int(a)][i % len(groups[1 - int(a)])]) for i, a in enumerate(answers)]
    )
    x = lrqp.capture(model, inputs, [SITE], positions)[SITE]
    return Planted(model, direction, inputs, positions, answers, x, partner)


@cache
def trained() -> tuple[DAS, Tensor]:
    """DAS fitted on two thirds of the prompts, and the rows left for testing."""
    here, rows = planted(), torch.arange(64)
    reference = lrqp.LRQP.fit(here.activations, here.answers)
    das = DAS.fit(
        here.behaviour(rows),
        here.activations[here.partner[rows]],
        reference=reference,
        seed=1,
        learning_rate=0.1,
        epochs=30,
    )
    return das, torch.arange(64, N)


def random_das(rank: int) -> tuple[DAS, Tensor]:
    x, y = torch.randn(40, 12, dtype=torch.float64), torch.arange(40) % 2
    basis = torch.linalg.qr(torch.randn(12, rank, dtype=torch.float64)).Q
    return DAS(lrqp.LRQP.fit(x, y), basis), x


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_only_the_subspace_is_interchanged(rank: int) -> None:
    das, x = random_das(rank)
    pair = x.roll(1, 0)
    edited = das.paired(pair)(x, 1)
    inside = das.basis @ das.basis.T
    outside = torch.eye(12) - inside
    torch.testing.assert_close(edited @ inside, pair @ inside, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(edited @ outside, x @ outside, rtol=1e-9, atol=1e-9)
    # Of full rank it is the full patch; with itself as the pair it is nothing.
    if rank == 12:
        torch.testing.assert_close(edited, pair, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(das.paired(x)(x, 1), x, rtol=0, atol=0)
    # The other way round it puts back what was there.
    torch.testing.assert_close(das.paired(x)(edited, 0), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_the_least_edit_of_a_reading_reads_the_pair_and_is_never_longer(rank: int) -> None:
    das, x = random_das(rank)
    least, pair = DASLeast.of(das).paired(x.roll(1, 0)), x.roll(1, 0)
    edited, other = least(x, 1), das.paired(pair)(x, 1)
    torch.testing.assert_close(edited @ das.basis, pair @ das.basis, rtol=1e-9, atol=1e-9)
    metric = das.reference.metric
    assert bool((metric.distance(edited - x) <= metric.distance(other - x) + 1e-9).all())
    # Least: along Σ R, so that no step that R does not read makes it shorter.
    null = torch.linalg.svd(das.basis.T).Vh[rank:]
    scaled = torch.linalg.solve(metric.covariance.double(), (edited - x).T)
    torch.testing.assert_close(null @ scaled, torch.zeros(12 - rank, len(x)).double())


def test_there_is_nothing_to_train_where_no_edit_reaches_the_answer() -> None:
    here, rows = planted(), torch.arange(8)
    last = dataclasses.replace(
        here.behaviour(rows),
        site=f"L{here.model.config.n_layer - 1}.post",
        positions=torch.ones(8, dtype=torch.long),  # the answer is read behind it
    )
    with pytest.raises(LearningError, match="nothing to train"):
        DAS.fit(last, here.activations[rows], reference=trained()[0].reference)


@torch.no_grad()
def test_training_flips_the_planted_model_and_finds_the_direction() -> None:
    here, (das, test) = planted(), trained()
    report = das.report
    assert report is not None and report.best_epoch >= 1
    assert report.training_loss[-1] < 0.5 * report.training_loss[0]
    assert min(report.validation_loss) == report.validation_loss[report.best_epoch - 1]
    assert min(report.validation_loss) < 0.5 * report.start_loss
    torch.testing.assert_close(das.basis.T @ das.basis, torch.eye(1).double())
    assert abs(float(das.basis[:, 0] @ here.direction.double())) > 0.6

    inputs = {name: value[test] for name, value in here.inputs.items()}
    pair = here.activations[here.partner[test]]
    with das.paired(pair).at(
        here.model, SITE, positions=here.positions[test], target=1 - here.answers[test]
    ) as run:
        answers = here.model(**inputs).logits[:, -1, :2].argmax(-1)
    assert float((answers == 1 - here.answers[test]).double().mean()) > 0.9
    # An untrained direction flips next to nothing.
    other = torch.linalg.qr(torch.randn(24, 1, dtype=torch.float64)).Q
    with (
        DAS(das.reference, other)
        .paired(pair)
        .at(here.model, SITE, positions=here.positions[test], target=0)
    ):
        untrained = here.model(**inputs).logits[:, -1, :2].argmax(-1)
    assert float((untrained == 1 - here.answers[test]).double().mean()) < 0.4
    assert bool((run.euclidean > 0).all())


def test_training_is_repeatable_and_leaves_the_model_alone() -> None:
    here, (das, _) = planted(), trained()
    before = {name: value.clone() for name, value in here.model.state_dict().items()}
    frozen = next(here.model.parameters())
    frozen.requires_grad_(False)
    rows = torch.arange(64)
    pairs = here.activations[here.partner[rows]]
    options = {"reference": das.reference, "learning_rate": 0.1, "epochs": 30}
    again = DAS.fit(here.behaviour(rows), pairs, seed=1, **options)
    other = DAS.fit(here.behaviour(rows), pairs, reference=das.reference, seed=2, epochs=1)
    assert torch.equal(again.basis, das.basis) and again.report == das.report
    assert not torch.equal(other.basis, das.basis)
    for name, value in here.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in here.model.parameters())
    flags = [parameter.requires_grad for parameter in here.model.parameters()]
    assert flags == [False] + [True] * (len(flags) - 1)
    frozen.requires_grad_(True)


def test_the_gradient_of_training() -> None:
    here, rows = planted(), torch.arange(6)
    pairs = here.activations[here.partner[rows]].double()
    model = copy.deepcopy(here.model).double()
    behaviour = dataclasses.replace(here.behaviour(rows), model=model)

    def loss(free: Tensor) -> Tensor:
        return _losses(behaviour, pairs, _basis(free), rows).mean()

    free = torch.randn(24, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (free,), rtol=1e-4, atol=1e-7)


def test_backward_goes_through_the_layers_above_only() -> None:
    here, rows = planted(), torch.arange(8)
    needs: dict[str, set[bool]] = {"L0.mid": set(), "L2.mid": set()}

    def watch(site: str) -> lrqp.Intervention:
        def read(x: Tensor, context: lrqp.EditContext) -> Tensor:
            needs[site].add(x.requires_grad)
            return x

        return lrqp.Intervention(site, here.positions[:4], read)

    behaviour = here.behaviour(rows, batch_size=4)
    with lrqp.intervene(here.model, [watch(site) for site in needs]):
        DAS.fit(
            behaviour,
            here.activations[here.partner[rows]],
            reference=trained()[0].reference,
            epochs=1,
            validation=0.5,
        )
    assert needs == {"L0.mid": {False}, "L2.mid": {False, True}}


def test_early_stopping_keeps_the_best() -> None:
    here, rows = planted(), torch.arange(40)
    das = DAS.fit(
        here.behaviour(rows),
        here.activations[here.partner[rows]],
        reference=trained()[0].reference,
        epochs=60,
        patience=1,
        learning_rate=0.5,
    )
    report = das.report
    assert report is not None
    assert len(report.validation_loss) == len(report.training_loss) < 60
    assert report.best_epoch == len(report.validation_loss) - 1


def test_bad_training_is_named() -> None:
    here, rows = planted(), torch.arange(8)
    reference = trained()[0].reference
    behaviour, pairs = here.behaviour(rows), here.activations[here.partner[rows]]
    with pytest.raises(PairError, match="one paired activation for each prompt"):
        DAS.fit(behaviour, pairs[1:], reference=reference)
    for wrong in ({"rank": 0}, {"rank": 25}, {"epochs": 0}, {"validation": 1.0}, {"patience": 0}):
        with pytest.raises(SettingError):
            DAS.fit(behaviour, pairs, reference=reference, **wrong)
    with pytest.raises(LearningError, match="too few"):
        DAS.fit(here.behaviour(rows[:1]), pairs[:1], reference=reference)
    broken = dataclasses.replace(
        behaviour, loss=lambda logits, rows: torch.full((len(rows),), torch.nan)
    )
    with pytest.raises(LearningError, match="finite"):
        DAS.fit(broken, pairs, reference=reference)
    mean = dataclasses.replace(behaviour, loss=lambda logits, rows: logits.mean())
    with pytest.raises(LearningError, match="for each of"):
        DAS.fit(mean, pairs, reference=reference)
    with pytest.raises(SettingError, match="orthonormal"):
        DAS(reference, torch.ones(24, 1))
    with pytest.raises(WidthError):
        DAS(reference, torch.eye(23))
