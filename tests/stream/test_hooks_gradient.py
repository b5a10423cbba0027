"""Gradients flow through an edit inside a model: autograd against finite differences."""

from collections.abc import Callable

import pytest
import torch
from models_for_tests import POST_MODELS, WIDTH, Prompts, build, in_double, random_edit
from torch import Tensor

import lrqp_torch as lrqp

PROMPTS = Prompts.random([6, 4, 5])
TOKENS = torch.tensor([[3, 1], [2, 0], [4, 3]])
STEP = 1e-5


def slope(loss: Callable[[], Tensor], parameter: Tensor, direction: Tensor) -> tuple[float, float]:
    """The derivative of the loss along a direction, by autograd and by central differences."""
    (gradient,) = torch.autograd.grad(loss(), [parameter])
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            parameter.add_(sign * STEP * direction)
            values.append(float(loss()))
            parameter.sub_(sign * STEP * direction)
    return float((gradient * direction).sum()), (values[0] - values[1]) / (2 * STEP)


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("site", ["L1.pre", "L1.mid", "L1.post"])
@pytest.mark.parametrize("rule", ["mirror", "fixed"])
def test_autograd_is_the_finite_difference(name: str, site: str, rule: str) -> None:
    model, inputs = in_double(build(name)), PROMPTS.padded("left")
    real, at = inputs["attention_mask"].bool(), PROMPTS.columns(TOKENS, "left")
    edit = random_edit(lrqp.capture(model, inputs, [site], real)[site], 3, rule=rule)
    edit.requires_grad_(True)
    edit.metric.covariance.requires_grad_(True)
    target = torch.tensor([[0, 1], [2, 2], [1, 0]])
    generator = torch.Generator().manual_seed(1)
    shape = model(**inputs).logits.shape
    reading = torch.randn(shape, dtype=torch.float64, generator=generator) * real[..., None]

    def loss() -> Tensor:
        with edit.at(model, site, positions=at, target=target) as run:
            logits = model(**inputs).logits
        assert bool((run.status == lrqp.Status.SOLVED).any())
        return (logits * reading).sum()

    blocks = model.base_model.h if name == "gpt2" else model.base_model.layers
    parameters = {
        "embedding, upstream": model.get_input_embeddings().weight,
        "attention, upstream": next(blocks[0].parameters()),
        "mlp, upstream": next(iter(blocks[0].mlp.parameters())),
        "mlp, downstream": next(iter(blocks[2].mlp.parameters())),
        "probe weight": edit.probe.weight,
        "probe bias": edit.probe.bias,
        "covariance": edit.metric.covariance,
    }
    for label, parameter in parameters.items():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        direction = direction / direction.norm()
        if label == "covariance":
            direction = direction + direction.T
        autograd, difference = slope(loss, parameter, direction)
        assert abs(difference) > 1e-4, label
        assert autograd == pytest.approx(difference, rel=2e-5, abs=1e-6), label


@pytest.mark.parametrize("name", POST_MODELS)
def test_an_edit_that_is_not_needed_passes_the_gradient_of_the_clean_run(name: str) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    at = torch.tensor([5, 5, 5])
    x = lrqp.capture(model, inputs, ["L1.mid"], at)["L1.mid"]
    edit = random_edit(x, 3, rule="fixed", log_odds=1e-9)
    held = edit.probe(x.double()).argmax(-1)
    weight = model.get_input_embeddings().weight

    def gradient() -> Tensor:
        loss = torch.nn.functional.log_softmax(model(**inputs).logits[:, -1], -1)[:, 0].sum()
        return torch.autograd.grad(loss, [weight])[0]

    with edit.at(model, "L1.mid", positions=at, target=held):
        edited = gradient()
    torch.testing.assert_close(edited, gradient(), rtol=1e-6, atol=1e-7)


def test_training_a_parameter_through_an_edit_lowers_the_loss() -> None:
    """The probe is trained so that its edit makes the model say token 7."""
    model, inputs = build("gpt2").requires_grad_(False), PROMPTS.padded("left")
    at, site = torch.tensor([5, 5, 5]), "L1.mid"
    x = lrqp.capture(model, inputs, [site])[site].flatten(0, 1)
    edit = random_edit(x, 2, rule="fixed", log_odds=40.0)
    edit.probe.requires_grad_(True)
    optimiser = torch.optim.Adam(edit.probe.parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        with edit.at(model, site, positions=at, target=1):
            logits = model(**inputs).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([7, 7, 7]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


class _Steer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vector = torch.nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor, context: object) -> Tensor:
        return x + self.vector


@pytest.mark.parametrize("site", ["L1.pre", "L1.mid", "L1.post"])
@pytest.mark.parametrize("where", ["last", "all"])
@pytest.mark.parametrize("kind", ["module", "function", "method", "transform", "compiled"])
def test_a_vector_that_is_still_zero_has_a_derivative(site: str, where: str, kind: str) -> None:
    """Steering vectors are learned from zero on, where the edit changes nothing yet."""
    model, inputs = in_double(build("llama")).requires_grad_(False), PROMPTS.padded("right")
    runs = torch.compile(model, backend="aot_eager") if kind == "compiled" else model
    learned = _Steer()

    def loss(vector: Tensor = learned.vector) -> Tensor:
        edits = {"module": learned, "method": learned.forward}
        edit = edits.get(kind, lambda x, context: x + vector)
        with lrqp.intervene(runs, lrqp.Intervention(site, where, edit)):
            return runs(**inputs, use_cache=False).logits.square().sum()

    direction = torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, wanted = slope(loss, learned.vector, direction)
    if kind == "transform":
        got = float(torch.func.grad(loss)(torch.zeros_like(direction)) @ direction)
    assert abs(wanted) > 0.1
    assert got == pytest.approx(wanted, rel=1e-4)
    with torch.no_grad():
        assert torch.equal(loss(), runs(**inputs, use_cache=False).logits.square().sum())


def test_forward_derivatives_pass_an_edit_that_changes_nothing_yet() -> None:
    module, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()), torch.randn(5, 3)
    site, ahead = lrqp.Site.module("0", "output"), torch.randn(4)
    with torch.autograd.forward_ad.dual_level():
        vector = torch.autograd.forward_ad.make_dual(torch.zeros(4), ahead)
        with lrqp.intervene(module, lrqp.Intervention(site, 0, lambda y, context: y + vector)):
            found = torch.autograd.forward_ad.unpack_dual(module(x)).tangent
    torch.testing.assert_close(found, (1 - module(x).square()) * ahead)
