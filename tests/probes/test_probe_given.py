"""Probes, weights and data that people already have: layers, arrays, names, weights, inference."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrqp_torch as lrqp
from lrqp_torch import LRQP, Covariance, JointLRQP, LinearProbe, Mahalanobis
from lrqp_torch.errors import LabelError, LRQPError, NonFiniteError, TargetError, WidthError


def samples(n: int = 120, width: int = 5, n_classes: int = 2) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % n_classes
    x = torch.randn(n, width, dtype=torch.float64)
    return x + torch.randn(n_classes, width, dtype=torch.float64)[labels], labels


class Stored:
    """Activations that are read a batch at a time."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def batches(self, rows: int, /) -> Iterator[Tensor]:
        yield from self.x.split(min(rows, 50))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_linear_layer_is_a_probe_of_the_same_odds(
    outputs: int, bias: bool, dtype: torch.dtype
) -> None:
    layer = nn.Linear(5, outputs, bias=bias, dtype=dtype)
    probe = LinearProbe.from_linear(layer)
    x = torch.randn(30, 5, dtype=torch.float64)
    z = x @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    expected = torch.cat([torch.zeros_like(z), z], 1) if outputs == 1 else z
    assert torch.allclose(probe.double()(x), expected, atol=1e-12)
    assert not any(parameter.requires_grad for parameter in probe.parameters())
    before = layer.weight.clone()
    with torch.no_grad():
        probe.weight.zero_()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.eye(120, 5).to_sparse(), "must be a dense tensor"),
        (torch.empty(120, 5, device="meta"), "on meta"),
        ({"L1.mid": torch.zeros(120, 5)}, r"\['L1\.mid'\]: take one of these"),
    ],
)
def test_activations_that_hold_no_numbers_are_refused(x: Any, said: str) -> None:
    labels = torch.arange(120) % 2
    for fitted in (
        lambda: LRQP.fit(x, labels),
        lambda: LinearProbe.fit(x, labels),
        lambda: Mahalanobis.fit(x),
        lambda: Covariance(5).update(x),
        lambda: LinearProbe.fit_many({"a": (x, labels)}),
    ):
        with pytest.raises(WidthError, match=said):
            fitted()
    with pytest.raises(LabelError, match="take one of these"):
        LinearProbe.fit(torch.randn(120, 5), {"a": labels})
    with pytest.raises(WidthError, match="on meta"):
        LRQP(nn.Linear(5, 2, device="meta"), Mahalanobis.euclidean(5))


def test_what_is_no_linear_layer_is_refused() -> None:
    layers: list[Any] = [nn.ReLU(), nn.Sequential(nn.Linear(5, 2)), torch.eye(5), None]
    for layer in layers:
        with pytest.raises(WidthError, match=r"nn\.Linear"):
            LinearProbe.from_linear(layer)
        with pytest.raises(LRQPError):
            LRQP(layer, Mahalanobis.euclidean(5))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_every_edit_takes_a_linear_layer(outputs: int, bias: bool) -> None:
    x = torch.randn(200, 5)
    layer, metric = nn.Linear(5, outputs, bias=bias), Mahalanobis.fit(x)
    new = LRQP(layer, metric, log_odds=3.0, rule="fixed")(x, 1)
    joint = JointLRQP({"mine": layer}, metric)
    with torch.no_grad():
        z, both = layer(new), layer(joint(x, {"mine": 1}))
    rivals = torch.zeros(200) if outputs == 1 else z.index_select(1, torch.tensor([0])).squeeze(1)
    assert float((z[:, -1 if outputs < 3 else 1] - rivals).min()) >= 3 - 1e-4
    assert bool((both[:, 0] > 0).all() if outputs == 1 else (both.argmax(1) == 1).all())


@pytest.mark.parametrize("shape", ["(d,)", "(1, d)", "(K, d)"])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("convert", [torch.as_tensor, np.asarray, np.ndarray.tolist])
def test_weights_of_a_standardised_fit(
    shape: str, scaled: bool, convert: Callable[[np.ndarray], Any]
) -> None:
    rng = np.random.default_rng(0)
    coef = rng.normal(size={"(d,)": (4,), "(1, d)": (1, 4), "(K, d)": (3, 4)}[shape])
    intercept = rng.normal(size=3 if shape == "(K, d)" else 1)
    mean, scale = (rng.normal(size=4), rng.uniform(0.1, 3, size=4)) if scaled else (None, None)
    x = rng.normal(size=(20, 4))
    given = [None if v is None else convert(v) for v in (coef, intercept, mean, scale)]
    probe = LinearProbe.from_weights(*given)
    standardised = (x - mean) / scale if scaled else x
    z = standardised @ np.atleast_2d(coef).T + intercept
    expected = np.concatenate([np.zeros_like(z), z], 1) if z.shape[1] == 1 else z
    assert probe.weight.dtype == torch.float64
    assert np.allclose(probe(torch.from_numpy(x)).numpy(), expected, atol=1e-12)


def test_weights_by_the_names_and_dtypes_of_others() -> None:
    probe = LinearProbe.from_weights(
        np.ones((1, 3), dtype=np.float32), 0.5, classes=["singular", "plural"]
    )
    assert probe.weight.dtype == torch.float32 and probe.classes == ("singular", "plural")
    x = np.ones((2, 3), dtype=np.float32)
    assert probe.accuracy(x, ["plural", "plural"]) == 1.0
    assert probe.accuracy(x, np.array([0, 1])) == 0.5
    assert torch.allclose(probe.log_odds(torch.ones(2, 3), "plural"), torch.tensor(3.5))
    with pytest.raises(TargetError, match="dual"):
        probe.numbers(["dual"])
    with pytest.raises(TargetError, match="plural"):
        LinearProbe.from_weights(np.ones((2, 3))).accuracy(x, ["plural", "plural"])


BAD_WEIGHTS: dict[str, tuple[tuple[Any, ...], type[LRQPError], str]] = {
    "intercept": ((np.ones((2, 3)), np.ones(3)), WidthError, r"intercept must be \(2,\)"),
    "mean": ((np.ones((2, 3)), None, np.ones(2)), WidthError, r"mean must be \(3,\)"),
    "scale": ((np.ones((2, 3)), None, None, np.ones((2, 3))), WidthError, "scale"),
    "scale of zero": ((np.ones((2, 3)), None, None, [1, 0, 1]), NonFiniteError, "scale"),
    "NaN": ((np.full((2, 3), np.nan),), NonFiniteError, "NaN"),
    "a cube": ((np.ones((2, 3, 4)),), WidthError, r"\(K, d\)"),
    "nothing": ((np.ones((0, 3)),), WidthError, r"\(K, d\)"),
    "complex": ((np.ones((2, 3)) * 1j,), WidthError, "complex"),
    "words": ((["a", "b"],), WidthError, "numbers"),
    "no object": ((None,), WidthError, "numbers"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_named(name: str) -> None:
    given, error, message = BAD_WEIGHTS[name]
    with pytest.raises(error, match=message):
        LinearProbe.from_weights(*given)


def test_other_names_than_classes_are_refused() -> None:
    with pytest.raises(LabelError, match="3 names were given for 2 classes"):
        LinearProbe.from_weights(np.ones((1, 3)), classes=["a", "b", "c"])


def backwards(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array[::-1])[::-1]


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.filterwarnings("error:The given NumPy")
@pytest.mark.parametrize(
    "form",
    [
        lambda a: a,
        np.asfortranarray,
        backwards,
        read_only,
        lambda a: a.astype(a.dtype.newbyteorder()),
        np.ndarray.tolist,
    ],
    ids=["as it is", "columns", "backwards", "read-only", "other bytes", "list"],
)
def test_arrays_give_what_tensors_give(form: Callable[[np.ndarray], Any]) -> None:
    x, y = samples()
    array, labels = form(x.numpy()), form(y.numpy())
    one, other = LinearProbe.fit(x, y), LinearProbe.fit(array, labels)
    assert torch.equal(one.weight, other.weight) and other.weight.dtype == torch.float64
    assert other.accuracy(array, labels) == one.accuracy(x, y)
    many = LinearProbe.fit_many({"a": (array, labels)})["a"]
    assert torch.equal(one.weight, many.weight)
    metric = Mahalanobis.fit(x)
    assert torch.equal(Mahalanobis.fit(array).covariance, metric.covariance)
    assert torch.equal(Covariance(5).update(array).finish().covariance, metric.covariance)
    again = Mahalanobis(form(metric.covariance.numpy()), form(x.mean(0).numpy()))
    assert torch.equal(again.covariance, metric.covariance)
    assert torch.equal(LRQP.fit(array, labels)(x, 1), LRQP.fit(x, y)(x, 1))


def test_stored_activations_give_what_they_hold() -> None:
    x, y = samples()
    assert torch.allclose(Mahalanobis.fit(Stored(x)).covariance, Mahalanobis.fit(x).covariance)
    with pytest.raises(LRQPError, match="at least 2"):
        Mahalanobis.fit(Stored(x[:0]))
    names = np.array(["no", "yes"])[y]
    edit = LRQP.fit(Stored(x), names, class_weight={"yes": 2.0})
    assert edit.probe.classes == ("no", "yes")
    whole = LinearProbe.fit(x, y, class_weight=[1, 2])
    assert torch.allclose(edit.probe.weight, whole.weight, atol=1e-6)


@pytest.mark.parametrize("kind", [list, np.array, lambda v: np.array(v, dtype=object), tuple])
def test_labels_by_name_are_numbered_in_their_order(kind: Callable[[list[str]], Any]) -> None:
    x, y = samples(n_classes=3)
    names = kind([("b", "c", "a")[label] for label in y])
    probe = LinearProbe.fit(x, names)
    assert probe.classes == ("a", "b", "c")
    assert torch.allclose(probe.weight, LinearProbe.fit(x, (y + 1) % 3).weight, atol=1e-9)
    assert probe.accuracy(x, names) == probe.accuracy(x, (y + 1) % 3) > 0.5
    assert LinearProbe.fit_many({"z": (x, names)})["z"].classes == probe.classes
    assert torch.equal(probe.log_odds(x, names), probe.log_odds(x, (y + 1) % 3))


@pytest.mark.parametrize("labels", [[None, "a"] * 60, [1.5, 0.0] * 60, [[0], [1, 2]] * 60, "ab"])
def test_labels_that_are_none_are_refused(labels: Any) -> None:
    with pytest.raises(LabelError, match="labels"):
        LinearProbe.fit(samples()[0], labels)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_weight_counts_examples(n_classes: int) -> None:
    """ω_i times the term of example i is ω_i copies of it, with the penalty 1/Σω of as many."""
    x, y = samples(90, n_classes=n_classes)
    weights = torch.arange(90) // n_classes % 4
    probe = LinearProbe.fit(x, y, sample_weight=weights)
    copied = LinearProbe.fit(x.repeat_interleave(weights, 0), y.repeat_interleave(weights))
    assert torch.allclose(probe.weight, copied.weight, atol=1e-6)
    assert torch.allclose(probe.bias, copied.bias, atol=1e-6)
    report, other = probe.report, copied.report
    assert report is not None and other is not None
    assert report.l2 == other.l2 and report.counts == other.counts
    assert report.loss == pytest.approx(other.loss, rel=1e-9)
    batches = [(x[i : i + 20], y[i : i + 20], weights[i : i + 20]) for i in range(0, 90, 20)]
    assert torch.allclose(LinearProbe.fit_batches(batches).weight, probe.weight, atol=1e-6)
    many = LinearProbe.fit_many({"weighed": (x, y, weights), "plain": (x, y)})
    assert torch.allclose(many["weighed"].weight, probe.weight, atol=1e-9)
    assert torch.allclose(many["plain"].weight, LinearProbe.fit(x, y).weight, atol=1e-9)


@pytest.mark.parametrize(
    ("form", "by_hand"),
    [
        ("balanced", [80 / 120, 2.0]),
        ([0.5, 2.5], [0.5, 2.5]),
        (np.array([0.5, 2.5]), [0.5, 2.5]),
        ({1: 3.0}, [1.0, 3.0]),
    ],
)
def test_weights_of_classes(form: Any, by_hand: list[float]) -> None:
    x, y = samples(120)
    rows = torch.cat([torch.arange(0, 120, 2), torch.arange(1, 120, 6)])
    x, y = x[rows], y[rows]
    own = torch.rand(80, dtype=torch.float64) + 0.5
    expected = LinearProbe.fit(x, y, sample_weight=torch.tensor(by_hand)[y])
    probe = LinearProbe.fit(x, y, class_weight=form)
    assert probe.report is not None and expected.report is not None
    assert probe.report.counts == pytest.approx(expected.report.counts)
    assert torch.allclose(probe.weight, expected.weight, atol=1e-6)
    streamed = LinearProbe.fit_batches([(x[:30], y[:30]), (x[30:], y[30:])], class_weight=form)
    assert torch.allclose(streamed.weight, probe.weight, atol=1e-6)
    if isinstance(form, str):
        assert probe.report.counts == pytest.approx((40, 40)) and probe.report.chance == 0.5
    else:
        both = LinearProbe.fit(x, y, class_weight=form, sample_weight=own)
        product = LinearProbe.fit(x, y, sample_weight=own * torch.tensor(by_hand)[y])
        assert torch.allclose(both.weight, product.weight, atol=1e-6)


BAD_WEIGHTING: dict[str, dict[str, Any]] = {
    "of another length": {"sample_weight": torch.ones(119)},
    "negative": {"sample_weight": -torch.ones(120)},
    "infinite": {"sample_weight": [float("inf")] * 120},
    "all zero in a class": {"sample_weight": torch.arange(120) % 2},
    "words": {"sample_weight": ["a"] * 120},
    "unknown word": {"class_weight": "balance"},
    "unknown class": {"class_weight": {2: 1.0}},
    "too many classes": {"class_weight": [1.0, 1.0, 1.0]},
    "a class of weight 0": {"class_weight": [1.0, 0.0]},
    "NaN": {"class_weight": [1.0, float("nan")]},
}


@pytest.mark.parametrize("name", BAD_WEIGHTING)
def test_bad_weighting_is_named(name: str) -> None:
    x, y = samples()
    with pytest.raises(LRQPError, match="weight"):
        LinearProbe.fit(x, y, **BAD_WEIGHTING[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_fitted_in_inference_mode_can_be_differentiated_through(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        x, y = (part for part in samples(200, n_classes=3))
        x = x.to(dtype)
        edits = {
            "LRQP": LRQP.fit(x, y),
            "total": LRQP.fit(x, y, odds="total"),
            "keeping": LRQP(LinearProbe.fit(x, y), Mahalanobis.fit(x).keeping(torch.randn(1, 5))),
            "given": LRQP(
                LinearProbe.from_weights(torch.randn(3, 5, dtype=dtype)),
                Mahalanobis(torch.eye(5, dtype=dtype), torch.zeros(5)),
            ),
            "streamed": LRQP(
                LinearProbe.fit_batches([(x, y)]), Covariance(5).update(x).finish("oas")
            ),
        }
        joint = JointLRQP({"a": edits["LRQP"], "b": LinearProbe.fit(x, y == 0)})
        edits["LRQP"](x, 1)
    for name, edit in edits.items():
        tensors = [*edit.parameters(), *edit.buffers()]
        assert not any(tensor.is_inference() for tensor in tensors), name
        edit.probe.requires_grad_()
        edit.metric.covariance.requires_grad_()
        point = torch.randn(4, 5, dtype=dtype, requires_grad=True)
        edit(point, 1).square().sum().backward()
        assert point.grad is not None and edit.probe.weight.grad is not None, name
        assert edit.metric.covariance.grad is not None
        edit.probe.requires_grad_(False)
        edit.metric.covariance.requires_grad_(False)
    point = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    joint(point, {"a": 1}).sum().backward()
    assert point.grad is not None


def test_an_accumulator_made_outside_takes_what_was_captured_in_inference_mode() -> None:
    x, _ = samples()
    covariance = lrqp.Covariance(5)
    with torch.inference_mode():
        covariance.update(x[:60] + 0)
    covariance.update(x[60:])
    assert torch.allclose(covariance.finish().covariance, Mahalanobis.fit(x).covariance)


def test_what_is_loaded_moved_or_copied_in_inference_mode_is_ordinary(tmp_path: Path) -> None:
    x, y = samples()
    kept = LRQP.fit(x.float(), y)
    kept.save(tmp_path / "edit")
    with torch.inference_mode():
        loaded = LRQP.load(tmp_path / "edit")
        edits = loaded, copy.deepcopy(kept), copy.deepcopy(kept).to(torch.float64)
        covariance = Covariance(5).update(x[:60])
    for edit in edits:
        edit.probe.requires_grad_()
        point = torch.randn(4, 5, requires_grad=True)
        edit(point, 1).square().sum().backward()
        assert point.grad is not None and edit.probe.weight.grad is not None
        assert edit.log_odds.dtype == edit.metric.covariance.dtype == torch.float64
    assert torch.equal(edits[1].metric.covariance, kept.metric.covariance)
    covariance.update(x[60:])
    assert torch.allclose(covariance.finish().covariance, Mahalanobis.fit(x).covariance)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 0.1 * super().forward(input)


def hooked() -> nn.Linear:
    layer = nn.Linear(5, 3)
    layer.register_forward_hook(lambda module, args, output: 0.1 * output)
    return layer


def replaced() -> LinearProbe:
    probe = LinearProbe(5, 3)
    probe.forward = lambda x: x[:, :3]  # type: ignore[method-assign]
    return probe


@pytest.mark.parametrize("make", [lambda: Scaled(5, 3), hooked, replaced])
def test_a_layer_that_computes_something_else_than_its_weights_is_refused(
    make: Callable[[], nn.Linear],
) -> None:
    with pytest.raises(WidthError, match=r"does not compute weight · x \+ bias with its own"):
        LRQP(make(), Mahalanobis.euclidean(5))


def test_layers_that_compute_what_they_hold_are_taken() -> None:
    class Same(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 0

    seen = nn.Linear(5, 3)
    seen.register_forward_hook(lambda *_: None)
    for layer in (Same(5, 3), seen, nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))):
        new = LRQP(layer, Mahalanobis.euclidean(5), log_odds=3.0, rule="fixed")(
            torch.randn(9, 5), 1
        )
        logits = layer(new).detach()
        assert (logits[:, [1]] - logits[:, [0, 2]]).min() > 3 - 1e-4
    with pytest.raises(WidthError, match="a lazy layer that was never run"):
        LRQP(nn.LazyLinear(3), Mahalanobis.euclidean(5))
