"""LinearProbe: the optimum of its documented objective, certified independently."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from lrqp_torch import LinearProbe
from lrqp_torch.errors import (
    ConvergenceError,
    LabelError,
    LRQPError,
    NonFiniteError,
    TargetError,
    WidthError,
)
from lrqp_torch.probes import multinomial


def samples(
    n: int, width: int, n_classes: int, separation: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % n_classes
    centres = separation * torch.randn(n_classes, width, dtype=torch.float64)
    return (torch.randn(n, width, dtype=torch.float64) + centres[labels]).to(dtype), labels


def objective(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, l2: float) -> Tensor:
    """(1/n) Σ −log softmax(W x + b)[y] + (l2/2) ‖W‖², by torch's own cross-entropy."""
    loss = torch.nn.functional.cross_entropy(x.double() @ weight.T + bias, y.long())
    return loss + l2 / 2 * weight.square().sum()


def gradient_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, l2: float) -> float:
    weight, bias = weight.double().requires_grad_(), bias.double().requires_grad_()
    gradients = torch.autograd.grad(objective(x, y, weight, bias, l2), (weight, bias))
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))


def relative_gradient(probe: LinearProbe, x: Tensor, y: Tensor, l2: float) -> float:
    zero = torch.zeros_like(probe.weight), torch.zeros_like(probe.bias)
    found = probe.weight.detach().clone(), probe.bias.detach().clone()
    return gradient_norm(x, y, *found, l2) / gradient_norm(x, y, *zero, l2)


@pytest.mark.parametrize("n_classes", [2, 3, 5, 10])
@pytest.mark.parametrize("l2", [None, 1e-4, 1.0, 100.0])
def test_the_gradient_vanishes(n_classes: int, l2: float | None) -> None:
    x, y = samples(200, 12, n_classes)
    probe = LinearProbe.fit(x, y, l2=l2)
    used = 1 / 200 if l2 is None else l2
    assert relative_gradient(probe, x, y, used) <= 2e-8
    assert probe.report is not None
    assert probe.report.l2 == used
    assert probe.report.n_samples == 200
    loss = float(objective(x, y, probe.weight, probe.bias, used))
    assert probe.report.loss == pytest.approx(loss, rel=1e-10)
    assert probe.report.relative_gradient_norm <= 1e-8


@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("separation", [0.3, 5.0])
def test_same_optimum_as_an_independent_optimiser(n_classes: int, separation: float) -> None:
    x, y = samples(150, 6, n_classes, separation)
    l2 = 0.02
    probe = LinearProbe.fit(x, y, l2=l2)

    def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        flat = torch.from_numpy(parameters).requires_grad_()
        weight, bias = flat[: 6 * n_classes].reshape(n_classes, 6), flat[6 * n_classes :]
        loss = objective(x, y, weight, bias, l2)
        (gradient,) = torch.autograd.grad(loss, flat)
        return float(loss.detach()), gradient.numpy()

    result = minimize(
        loss_and_gradient,
        np.zeros(7 * n_classes),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 20_000, "maxfun": 50_000, "ftol": 1e-16, "gtol": 1e-10, "maxcor": 50},
    )
    weight = torch.from_numpy(result.x[: 6 * n_classes]).reshape(n_classes, 6)
    bias = torch.from_numpy(result.x[6 * n_classes :])
    assert torch.allclose(probe.weight, weight, atol=1e-5)
    # The softmax leaves one shift of all biases free.
    assert torch.allclose(probe.bias - probe.bias.mean(), bias - bias.mean(), atol=1e-4)
    assert float(objective(x, y, probe.weight, probe.bias, l2)) <= result.fun + 1e-12


@pytest.mark.parametrize(("n", "width", "n_classes"), [(10, 50, 2), (30, 200, 5), (5, 100, 5)])
def test_fewer_examples_than_dimensions(n: int, width: int, n_classes: int) -> None:
    x, y = samples(n, width, n_classes)
    probe = LinearProbe.fit(x, y)
    assert relative_gradient(probe, x, y, 1 / n) <= 1e-7
    assert probe.accuracy(x, y) == 1.0
    # The penalised optimum lies in the span of the centred data.
    centred = x - x.mean(0)
    basis = torch.linalg.svd(centred, full_matrices=False).Vh[: n - 1]
    outside = probe.weight - probe.weight @ basis.T @ basis
    assert outside.norm() <= 1e-6 * probe.weight.norm()


@pytest.mark.parametrize("l2", [1e-6, 1e-3])
def test_separable_classes_have_a_finite_optimum(l2: float) -> None:
    x, y = samples(200, 5, 2, separation=10)
    probe = LinearProbe.fit(x, y, l2=l2)
    assert probe.accuracy(x, y) == 1.0
    assert relative_gradient(probe, x, y, l2) <= 2e-8


def test_badly_scaled_features() -> None:
    x, y = samples(300, 13, 3)
    x = x * torch.logspace(-3, 3, 13, dtype=torch.float64)
    probe = LinearProbe.fit(x, y)
    assert relative_gradient(probe, x, y, 1 / 300) <= 2e-8


@pytest.mark.parametrize(("n_classes", "n"), [(2, 5), (2, 50), (3, 50)])
def test_activations_that_say_nothing_give_no_weight(n_classes: int, n: int) -> None:
    """Each activation once in every class, as at a position before the classes differ."""
    x = torch.randn(n, 7, dtype=torch.float64).repeat(n_classes, 1)
    y = torch.arange(n_classes * n) // n
    probe = LinearProbe.fit(x, y)
    assert probe.weight.abs().max() <= 1e-12
    assert probe.bias.abs().max() <= 1e-12
    assert probe.report is not None and probe.report.relative_gradient_norm <= 1e-8


def test_one_activation_for_all_examples_leaves_the_class_frequencies() -> None:
    y = (torch.arange(10) >= 9).long()
    probe = LinearProbe.fit(torch.full((10, 3), 0.1, dtype=torch.float64), y)
    assert probe.weight.abs().max() <= 1e-12
    assert float(probe.bias[0] - probe.bias[1]) == pytest.approx(math.log(9), rel=1e-6)


def test_a_feature_that_never_varies_gets_no_weight() -> None:
    x, y = samples(100, 5, 2)
    x[:, 2] = 7
    probe = LinearProbe.fit(x, y)
    assert probe.weight[:, 2].abs().max() <= 1e-9
    assert relative_gradient(probe, x, y, 0.01) <= 2e-8


@pytest.mark.parametrize("offset", [1.0, 1e4])
def test_a_shift_of_the_data_changes_only_the_bias(offset: float) -> None:
    x, y = samples(200, 8, 3)
    shift = offset * torch.randn(8, dtype=torch.float64)
    here, there = LinearProbe.fit(x, y), LinearProbe.fit(x + shift, y)
    assert torch.allclose(here.weight, there.weight, atol=1e-7)
    assert torch.allclose(here.bias, there.bias + there.weight @ shift, atol=1e-6 * (1 + offset))
    assert torch.allclose(here(x), there(x + shift), atol=1e-6 * (1 + offset))


def test_the_order_of_examples_does_not_matter() -> None:
    x, y = samples(200, 8, 3)
    order = torch.randperm(200)
    one, other = LinearProbe.fit(x, y), LinearProbe.fit(x[order], y[order])
    assert torch.allclose(one.weight, other.weight, atol=1e-7)
    assert torch.allclose(one.bias, other.bias, atol=1e-7)


def test_renaming_classes_permutes_the_rows() -> None:
    x, y = samples(200, 8, 3)
    rename = torch.tensor([2, 0, 1])
    one, other = LinearProbe.fit(x, y), LinearProbe.fit(x, rename[y])
    assert torch.allclose(one.weight, other.weight[rename], atol=1e-7)


def test_weights_of_all_classes_sum_to_zero() -> None:
    """At the optimum Σ_k ∂/∂w_k = l2 Σ_k w_k = 0: the penalty picks the symmetric solution."""
    x, y = samples(200, 8, 4)
    probe = LinearProbe.fit(x, y)
    assert probe.weight.sum(0).abs().max() <= 1e-8
    assert abs(float(probe.bias.sum())) <= 1e-8


def test_more_penalty_never_gives_longer_weights() -> None:
    x, y = samples(200, 8, 3)
    norms = [float(LinearProbe.fit(x, y, l2=10.0**p).weight.norm()) for p in range(-4, 3)]
    assert norms == sorted(norms, reverse=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_activations_give_a_float32_probe(dtype: torch.dtype) -> None:
    x, y = samples(300, 16, 3, dtype=dtype)
    probe = LinearProbe.fit(x, y)
    assert probe.weight.dtype == probe.bias.dtype == torch.float32
    exact = LinearProbe.fit(x.double(), y)
    assert exact.weight.dtype == torch.float64
    assert torch.equal(probe.weight, exact.weight.float())
    assert probe(x).dtype == torch.float32
    assert torch.allclose(probe(x), exact(x).float(), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_labels_of_every_integer_dtype(dtype: torch.dtype) -> None:
    x, y = samples(60, 4, 2)
    assert torch.equal(LinearProbe.fit(x, y.to(dtype)).weight, LinearProbe.fit(x, y).weight)


def test_a_fitted_probe_is_frozen_and_leaves_its_data_alone() -> None:
    x, y = samples(60, 4, 2)
    before = x.clone()
    x.requires_grad_()
    probe = LinearProbe.fit(x, y)
    assert torch.equal(x, before)
    assert not any(parameter.requires_grad for parameter in probe.parameters())
    assert isinstance(probe, torch.nn.Linear)
    assert (probe.width, probe.n_classes) == (4, 2)


def test_accuracy_is_the_share_of_right_answers() -> None:
    probe = LinearProbe(2, 3)
    with torch.no_grad():
        probe.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, -1]]))
        probe.bias.zero_()
    x = torch.tensor([[1.0, 0], [0, 1], [-1, -1], [2, 0]])
    assert probe.accuracy(x, torch.tensor([0, 1, 2, 1])) == 0.75
    assert probe.accuracy(x.reshape(2, 2, 2), torch.tensor([[0, 1], [2, 1]])) == 0.75


def test_log_odds_are_those_of_the_probabilities() -> None:
    x, y = samples(50, 4, 4)
    probe = LinearProbe.fit(x, y)
    probability = probe(x).softmax(-1)
    target = torch.arange(50) % 4
    own = probability.gather(-1, target[:, None]).squeeze(-1)
    rival = probability.scatter(-1, target[:, None], 0).amax(-1)
    assert torch.allclose(probe.log_odds(x, target), (own / rival).log())
    assert torch.allclose(probe.log_odds(x, target, against="rest"), (own / (1 - own)).log())
    assert torch.allclose(probe.log_odds(x, 2)[target == 2], probe.log_odds(x, target)[target == 2])
    gap = probe.log_odds(x, target) - probe.log_odds(x, target, against="rest")
    assert (gap >= 0).all()
    assert (gap <= math.log(3) + 1e-12).all()


def test_the_two_log_odds_agree_for_two_classes() -> None:
    x, y = samples(50, 4, 2)
    probe = LinearProbe.fit(x, y)
    assert torch.allclose(probe.log_odds(x, y), probe.log_odds(x, y, against="rest"))


def bad(x: object = None, y: object = None, **options: object) -> tuple[object, object, dict]:
    good_x, good_y = torch.randn(9, 4), torch.arange(9) % 3
    return (good_x if x is None else x), (good_y if y is None else y), options


BAD_FITS = {
    "x not a matrix": (bad(x=torch.zeros(9)), WidthError, r"\(n, d\)"),
    "integer x": (bad(x=torch.zeros(9, 4).long()), WidthError, "int64"),
    "number of labels": (bad(y=torch.zeros(8).long()), LabelError, r"\(9,\)"),
    "labels of shape (n, 1)": (bad(y=torch.zeros(9, 1).long()), LabelError, r"\(9,\)"),
    "floating labels": (bad(y=torch.zeros(9)), LabelError, "float32"),
    "no examples": (
        bad(x=torch.zeros(0, 4), y=torch.zeros(0).long()),
        LabelError,
        "no examples",
    ),
    "NaN": (bad(x=torch.full((9, 4), float("nan"))), NonFiniteError, "9 of 9"),
    "infinity": (bad(x=torch.full((9, 4), -float("inf"))), NonFiniteError, "infinity"),
    "negative label": (bad(y=torch.arange(9) - 1), LabelError, "-1"),
    "label beyond n_classes": (bad(n_classes=2), LabelError, "label 2"),
    "one class": (bad(y=torch.ones(9).long()), LabelError, "class 1"),
    "a class missing": (bad(y=torch.arange(9) % 2 * 2), LabelError, r"\[1\]"),
    "last class missing": (bad(n_classes=4), LabelError, r"\[3\]"),
    "more classes than examples": (bad(n_classes=20), LabelError, "20 classes"),
    "l2 zero": (bad(l2=0.0), LabelError, "l2"),
    "l2 negative": (bad(l2=-1.0), LabelError, "l2"),
    "l2 NaN": (bad(l2=float("nan")), LabelError, "l2"),
}


@pytest.mark.parametrize("name", BAD_FITS)
def test_bad_data_is_named(name: str) -> None:
    (x, y, options), error, message = BAD_FITS[name]
    with pytest.raises(error, match=message) as caught:
        LinearProbe.fit(x, y, **options)
    assert isinstance(caught.value, LRQPError)


def test_an_optimum_not_reached_is_an_error() -> None:
    x, y = samples(200, 12, 3)
    with pytest.raises(ConvergenceError, match="max_iterations"):
        LinearProbe.fit(x, y, max_iterations=1)


def test_a_looser_tolerance_is_honoured() -> None:
    x, y = samples(200, 12, 3)
    loose = LinearProbe.fit(x, y, tolerance=1e-1).report
    tight = LinearProbe.fit(x, y, tolerance=1e-10).report
    assert loose is not None and tight is not None
    assert tight.relative_gradient_norm <= 1e-10 < loose.relative_gradient_norm <= 1e-1
    assert loose.iterations < tight.iterations


@pytest.mark.parametrize(("n", "width", "k"), [(200, 12, 3), (200, 12, 2), (20, 64, 2)])
def test_a_standardised_fit_is_that_of_standardised_activations_folded(
    n: int, width: int, k: int
) -> None:
    x, y = samples(n, width, k)
    x = x * torch.logspace(-3, 3, width, dtype=torch.float64) + 5
    x[:, 0] = 0.1  # never varies
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale[0] = 1
    one = LinearProbe.fit((x - mean) / scale, y, tolerance=1e-10)
    expected = LinearProbe.from_weights(one.weight, one.bias, mean, scale)
    found = LinearProbe.fit(x, y, standardise=True, tolerance=1e-10)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found(x), expected(x), rtol=1e-6, atol=1e-7)
    assert float(found.weight[:, 0].abs().max()) < 1e-9
    units = x * torch.logspace(2, -2, width, dtype=torch.float64)
    both = LinearProbe.fit_many({1: (x, y), 2: (units, y)}, standardise=True, tolerance=1e-10)
    torch.testing.assert_close(both[1](x), both[2](units), rtol=1e-6, atol=1e-7)


def test_bad_use_is_named() -> None:
    probe = LinearProbe(4, 3)
    x = torch.zeros(5, 4)
    with pytest.raises(LabelError, match="at least 2"):
        LinearProbe(4, 1)
    with pytest.raises(WidthError, match="width 4"):
        probe(torch.zeros(5, 3))
    with pytest.raises(TargetError, match=r"\(5,\)"):
        probe.accuracy(x, torch.zeros(4).long())
    with pytest.raises(TargetError, match="0 to 2"):
        probe.log_odds(x, 3)
    with pytest.raises(TargetError, match="0 to 2"):
        probe.log_odds(x, torch.tensor([0, 1, 2, -1, 0]))
    with pytest.raises(LRQPError, match="against"):
        probe.log_odds(x, 0, against="all")
    with pytest.raises(TargetError, match="float32"):
        probe.log_odds(x, torch.zeros(5))
    with pytest.raises(TargetError, match=r"\(5,\).*\(4,\)"):
        probe.log_odds(x, torch.zeros(4).long())


@pytest.mark.parametrize("n_classes", [2, 5])
def test_products_in_float32_end_at_the_same_optimum(
    monkeypatch: pytest.MonkeyPatch, n_classes: int
) -> None:
    """Large fits compute products with the Hessian in float32; what they reach is float64's."""
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(1200) % n_classes
    x = torch.randn(1200, 240, generator=generator, dtype=torch.float64)
    x[:, :n_classes] += torch.nn.functional.one_hot(y, n_classes)
    x[:, 7] *= 1e4
    x[:, 9] *= 1e-4
    narrow = LinearProbe.fit(x, y)
    # One whose float32 products lead nowhere goes on in float64.
    monkeypatch.setattr(multinomial, "NARROW_STEPS", 2)
    widened = LinearProbe.fit(x, y)
    monkeypatch.setattr(multinomial, "LONG", float("inf"))
    wide = LinearProbe.fit(x, y)
    assert wide.report is not None
    for probe in (narrow, widened):
        assert probe.report is not None
        assert probe.report.relative_gradient_norm <= 1e-8
        assert probe.report.loss == pytest.approx(wide.report.loss, rel=1e-11)
        assert torch.allclose(probe(x), wide(x), rtol=0, atol=1e-4)


def test_a_smaller_gradient_is_no_progress_where_the_loss_is_larger() -> None:
    # One far example pulls harder than three near ones, which are wrong by far after the step.
    features = torch.tensor([[10.0, 1], [1, 1], [1, 1], [1, 1]], dtype=torch.float64)
    targets = multinomial.encode(torch.tensor([0, 1, 1, 1]), 2).view(1, 1, 1, 4)
    block = multinomial.Block(features.unsqueeze(0), targets)
    loss = multinomial.MultinomialLoss([block], total=4.0, l2=1e-6, in_memory=True)
    start = loss.evaluate(torch.tensor([[[[1.0, 0]]]], dtype=torch.float64))
    step = torch.tensor([[[[-1001.0, 0]]]], dtype=torch.float64)
    assert bool(loss.evaluate(start.parameters + step).size < 0.5 * start.size)
    found, moved = multinomial._line_search(loss, start, step, torch.tensor([[True]]))
    assert bool(moved) and bool(found.loss < start.loss)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_one_example_a_class(n_classes: int) -> None:
    x = torch.randn(n_classes, 6, dtype=torch.float64)
    probe = LinearProbe.fit(x, torch.arange(n_classes), l2=1e-6)
    assert relative_gradient(probe, x, torch.arange(n_classes), 1e-6) <= 1e-7
    assert torch.equal(probe(x).argmax(1), torch.arange(n_classes))


@pytest.mark.parametrize(("n", "width"), [(400, 3), (60, 90)])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_next_to_no_penalty(n: int, width: int, n_classes: int) -> None:
    """Separable classes have their optimum far out, at |W| in the order of log 1/l2."""
    x, y = samples(n, width, n_classes, separation=30.0)
    probe = LinearProbe.fit(x, y, l2=1e-12)
    assert relative_gradient(probe, x, y, 1e-12) <= 1e-7
    assert probe.report is not None and probe.report.loss < 1e-7


def uneven(n: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Four overlapping classes, the smallest a hundredth of all, with a weight for each example."""
    y = torch.bucketize(torch.arange(n) % 100, torch.tensor([0, 20, 50]))
    x = torch.randn(n, width, dtype=torch.float64)
    x[:, :4] += 2 * torch.nn.functional.one_hot(y, 4)
    x[:, 6] = x[:, 6] * 300 + 100
    x[:, 8] = 1.0
    return x, y, 0.1 + torch.rand(n, dtype=torch.float64)


@pytest.mark.parametrize("weighed", [False, True])
def test_large_fits_of_classes_with_a_factor_each(
    monkeypatch: pytest.MonkeyPatch, weighed: bool
) -> None:
    """In float32, then widened; certified by autograd and by scipy from where it ended."""
    x, y, weights = uneven(1500, 200)
    scale = weights if weighed else torch.ones(1500, dtype=torch.float64)
    l2 = 1 / float(scale.sum())

    def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        flat = torch.from_numpy(parameters).requires_grad_()
        weight, bias = flat[:800].view(4, 200), flat[800:]
        nll = torch.nn.functional.cross_entropy(x @ weight.T + bias, y, reduction="none")
        value = (scale * nll).sum() / scale.sum() + l2 / 2 * weight.square().sum()
        (gradient,) = torch.autograd.grad(value, flat)
        return float(value), gradient.numpy()

    found = []
    for steps in (multinomial.NARROW_STEPS, 2):
        monkeypatch.setattr(multinomial, "NARROW_STEPS", steps)
        probe = LinearProbe.fit(x, y, sample_weight=weights if weighed else None)
        found.append(torch.cat([probe.weight.flatten(), probe.bias]).detach())
        value, gradient = loss_and_gradient(found[-1].numpy())
        _, start = loss_and_gradient(np.zeros(804))
        assert np.linalg.norm(gradient) <= 2e-8 * np.linalg.norm(start)
        better = minimize(loss_and_gradient, found[-1].numpy(), jac=True, options={"maxiter": 50})
        assert value <= (1 + 1e-11) * better.fun
    assert torch.allclose(*found, rtol=0, atol=1e-5)


def stacked(n_classes: int) -> tuple[multinomial.MultinomialLoss, multinomial.Evaluation]:
    x, y = samples(60, 5, n_classes)
    features = torch.cat([x, torch.ones(60, 1, dtype=torch.float64)], 1).unsqueeze(0)
    targets = multinomial.encode(y, n_classes).view(1, 1, -1, 60)
    weights = torch.rand(1, 1, 1, 60, dtype=torch.float64)
    block = multinomial.Block(features, targets, weights)
    total = float(weights.sum())
    loss = multinomial.MultinomialLoss([block], total=total, l2=0.01, in_memory=True)
    parameters = 0.3 * torch.randn(1, 1, multinomial.rows_of(n_classes), 6, dtype=torch.float64)
    return loss, loss.evaluate(parameters)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_hessians_are_second_derivatives(n_classes: int) -> None:
    loss, point = stacked(n_classes)
    rows, copies = multinomial.rows_of(n_classes), 2 if n_classes == 2 else 1
    whole = torch.autograd.functional.jacobian(
        lambda w: loss.evaluate(w.view(1, 1, rows, 6)).gradient.flatten(),
        point.parameters.flatten(),
    )
    direction = torch.randn(1, 1, rows, 6, dtype=torch.float64)
    product = loss.hessian(point)(direction).flatten()
    assert torch.allclose(product, whole @ direction.flatten())
    parts = loss.class_hessians(point, [(0, 0)], rows)[0]
    penalty = torch.diag(torch.tensor([0.01] * 5 + [0.0], dtype=torch.float64))
    scale = 1.0 if copies == 2 else n_classes / (n_classes - 1)
    for row, part in enumerate(parts):
        own = whole.view(rows, 6, rows, 6)[row, :, row]
        assert torch.allclose(part - penalty, scale * (own - penalty))
    average = loss.class_hessians(point, [(0, 0)], 1)[0]
    assert torch.allclose(average[0], parts.mean(0))


@pytest.mark.parametrize("n_classes", [2, 4])
def test_a_step_is_as_long_as_is_best(n_classes: int) -> None:
    loss, point = stacked(n_classes)
    for size in (0.01, 1.0, 100.0):
        step = -size * point.gradient
        changes = [multinomial._times(step, loss.blocks[0].features)]
        length = loss.best_length(point, step, changes)[..., None, None]
        found = loss.evaluate(point.parameters + length * step)
        best = loss.evaluate(point.parameters + length * (1 + 0.05) * step).loss
        best = torch.minimum(
            best, loss.evaluate(point.parameters + length * (1 - 0.05) * step).loss
        )
        assert bool(found.loss < point.loss)
        if size > 0.01:  # From 0.01 the best may be further than is looked for.
            assert bool(found.loss <= best + 1e-12)


def test_factors_and_grams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multinomial, "STRIPED", 8)
    x = torch.randn(2, 3, 90, 45, dtype=torch.float64) * torch.logspace(-9, 9, 45).double()
    matrices = x.mT @ x
    inverse = multinomial._factor(matrices.clone())
    diagonal = matrices.diagonal(dim1=2, dim2=3).sqrt()
    units = diagonal.unsqueeze(3) * diagonal.unsqueeze(2)
    unit = inverse @ matrices @ inverse.mT
    assert torch.allclose(unit, torch.eye(45).double(), rtol=0, atol=1e-8)
    # What has no factor gets that of its diagonal.
    indefinite = torch.tensor([[4.0, 30.0], [30.0, 9.0]], dtype=torch.float64)
    expected = torch.diag(torch.tensor([1 / 2, 1 / 3], dtype=torch.float64))
    assert torch.allclose(multinomial._factor(indefinite), expected)
    weights = torch.rand(3, 90, dtype=torch.float64)
    weights = torch.stack([weights, weights.flip(0)])
    for strip in (8, 1000):
        monkeypatch.setattr(multinomial, "STRIPED", strip)
        both = multinomial._grams(x[:, 0], weights.unsqueeze(1), [(0, 0), (1, 0)])
        one = multinomial._grams(x[:, 0], weights.unsqueeze(1), [(1, 0)])
        assert torch.allclose(both[1], one[0], rtol=1e-12)
    gram, weights = both[0], weights[0]
    expected = (x[0, 0].T * weights.unsqueeze(1)) @ x[0, 0]
    assert torch.allclose(gram / units[0, 0], expected / units[0, 0], rtol=0, atol=1e-10)
    assert torch.allclose(gram / units[0, 0], gram.mT / units[0, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("n_classes", [2, 3, 10])
@pytest.mark.parametrize(("n", "width"), [(203, 37), (1201, 245)], ids=["float64", "float32"])
def test_the_compiled_search_finds_what_torch_does(
    monkeypatch: pytest.MonkeyPatch, n: int, width: int, n_classes: int, factored: bool
) -> None:
    """Of weighed examples and odd sizes, and of label sets that share a factor at the start."""
    if multinomial._compiled() is None:
        pytest.skip("no C compiler")
    x = torch.randn(n, width, dtype=torch.float64) * torch.logspace(-2, 2, width).double()
    noise = torch.randn(2, n, n_classes, dtype=torch.float64)
    many = (x[:, :n_classes] / x[:, :n_classes].std(0) + noise).argmax(-1)
    weights = torch.rand(n, dtype=torch.float64) + 0.1
    factors = []
    if factored:
        monkeypatch.setattr(multinomial.MultinomialLoss, "patience", lambda *_, **__: 4.0)
        make = multinomial._factor
        monkeypatch.setattr(multinomial, "_factor", lambda m: factors.append(len(m)) or make(m))

    def fit() -> list[LinearProbe]:
        weighed = LinearProbe.fit(x, many[0], sample_weight=weights)
        return [weighed, *LinearProbe.fit_many({i: (x, y) for i, y in enumerate(many)}).values()]

    found = fit()
    assert bool(factors) == factored
    monkeypatch.setattr(multinomial, "_compiled", lambda: None)
    for one, other in zip(found, fit(), strict=True):
        assert one.report is not None and other.report is not None
        assert max(one.report.relative_gradient_norm, other.report.relative_gradient_norm) <= 1e-8
        assert one.report.loss == pytest.approx(other.report.loss, rel=1e-12)
        assert one.report.gradient_norm > 0
        assert torch.allclose(one(x), other(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("n_classes", [2, 6])
def test_threads_change_no_bit_of_a_fit(n_classes: int, standardise: bool) -> None:
    if multinomial._compiled() is None:
        pytest.skip("no C compiler")
    x, y = samples(2600, 250, n_classes, 0.5, dtype=torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(LinearProbe.fit(x, y, standardise=standardise))
    finally:
        torch.set_num_threads(threads)
    first, *others = found
    assert first.report is not None and first.report.relative_gradient_norm <= 1e-8
    for other in others:
        assert torch.equal(first.weight, other.weight) and torch.equal(first.bias, other.bias)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("width", [4, 240])
def test_activations_are_read_as_they_are(
    monkeypatch: pytest.MonkeyPatch, width: int, standardise: bool
) -> None:
    """Rows of larger ones, float32 and half precision, far from zero, some constant."""
    x, y = samples(1200, width, 3, 1.0, dtype=torch.float32)
    x = (x + 300 * (torch.arange(width) % 8)).half()
    x[:, 1] = 0.1
    with monkeypatch.context() as patch:
        patch.setattr(multinomial, "_compiled", lambda: None)
        wide = LinearProbe.fit(x.double(), y, standardise=standardise)
    assert wide.report is not None
    padded = torch.cat([x, x], 1).float()[:, width:]
    for given in (x, x.float(), padded, x.float().T.contiguous().T):
        probe = LinearProbe.fit(given, y, standardise=standardise)
        assert probe.report is not None and probe.report.relative_gradient_norm <= 1e-8
        assert probe.report.loss == pytest.approx(wide.report.loss, rel=1e-10)
        assert torch.allclose(probe.weight, wide.weight.float(), rtol=0, atol=1e-5)


def test_an_error_while_a_compiled_search_asks_for_a_factor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: Tensor) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(multinomial.MultinomialLoss, "patience", lambda *_, **__: 1.0)
    monkeypatch.setattr(multinomial, "_factor", fail)
    with pytest.raises(KeyboardInterrupt):
        LinearProbe.fit(*samples(100, 20, 2))


@pytest.mark.parametrize("compiled", [True, False])
def test_activations_whose_squares_overflow_are_refused(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(multinomial, "_compiled", lambda: None)
    x, y = samples(60, 5, 3)
    with pytest.raises(ConvergenceError, match="squares overflow"):
        LinearProbe.fit(x * 1e160, y)


def test_defaults_of_device_and_dtype_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = samples(1100, 245, 2, dtype=torch.float32)
    names = [("no", "yes")[label] for label in y.tolist()]
    monkeypatch.setattr(multinomial.MultinomialLoss, "patience", lambda *_, **__: 3.0)

    def fit() -> LinearProbe:
        return LinearProbe.fit(x, names, held_out=0.2, class_weight={"yes": 2.0})

    whole = fit()
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    for change, value, before in (
        (torch.set_default_device, "meta", device),
        (torch.set_default_dtype, torch.float64, dtype),
    ):
        try:
            change(value)
            other = fit()
            odds = other.log_odds(x, "yes")
        finally:
            change(before)
        assert torch.equal(other.weight, whole.weight) and other.report == whole.report
        assert torch.equal(odds, whole.log_odds(x, 1))


@pytest.mark.parametrize("l2", [0.0, -1.0, math.inf, math.nan, "much", [1.0, 2.0]])
def test_penalties_that_are_none_are_refused(l2: Any) -> None:
    with pytest.raises(LabelError, match="l2 must be a positive number"):
        LinearProbe.fit(*samples(40, 3, 2), l2=l2)
