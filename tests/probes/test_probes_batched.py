"""Many probes at once, and probes of data read in batches: the optimum of the single fit."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrqp_torch import LinearProbe
from lrqp_torch.errors import (
    BatchError,
    ConvergenceError,
    LabelError,
    LRQPError,
    NonFiniteError,
    WidthError,
)
from lrqp_torch.probes import fitting, multinomial

Pair = tuple[Tensor, Tensor]


def samples(n: int, width: int, n_classes: int, separation: float = 1.0) -> Pair:
    labels = torch.arange(n) % n_classes
    centres = separation * torch.randn(n_classes, width, dtype=torch.float64)
    return torch.randn(n, width, dtype=torch.float64) + centres[labels], labels


def relative_gradient(probe: LinearProbe, x: Tensor, y: Tensor, l2: float) -> float:
    """Of the documented objective, by torch's cross-entropy and autograd."""

    def norm(weight: Tensor, bias: Tensor) -> float:
        weight, bias = weight.double().requires_grad_(), bias.double().requires_grad_()
        loss = torch.nn.functional.cross_entropy(x.double() @ weight.T + bias, y.long())
        gradients = torch.autograd.grad(loss + l2 / 2 * weight.square().sum(), (weight, bias))
        return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))

    weight, bias = probe.weight.detach(), probe.bias.detach()
    start = norm(torch.zeros_like(weight), torch.zeros_like(bias))
    return norm(weight.clone(), bias.clone()) / start


def same(one: LinearProbe, other: LinearProbe, tolerance: float = 1e-6) -> bool:
    size = float(other.weight.abs().max()) + 1
    return torch.allclose(one.weight, other.weight, rtol=0, atol=tolerance * size) and (
        torch.allclose(one.bias, other.bias, rtol=0, atol=tolerance * size)
    )


def mixed() -> dict[object, Pair]:
    """Problems of several kinds, some of them on the same activations."""
    x, y = samples(120, 9, 2)
    shuffled = y[torch.randperm(len(y))]
    return {
        "L0": (x, y),
        ("L0", "three"): (x, torch.arange(120) % 3),
        "L1": samples(120, 9, 2, separation=10.0),
        ("L0", "shuffled"): (x, shuffled),
        ("L1", "shuffled"): (samples(120, 9, 2)[0], shuffled),
        "few": samples(8, 30, 3),
        "few more": samples(8, 30, 3),
        "nearly few": samples(20, 30, 2),
        "constant": (torch.full((120, 9), 0.1, dtype=torch.float64), (y + (x[:, 0] > 0)) // 2),
        "scaled": (samples(120, 9, 5)[0] * torch.logspace(-3, 3, 9), torch.arange(120) % 5),
    }


@pytest.fixture(params=[0, 2**30], ids=["one at a time", "stacked"])
def stacks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems of one shape on their own, or all in one stack."""
    monkeypatch.setattr(fitting, "CACHE", request.param)


@pytest.mark.usefixtures("stacks")
@pytest.mark.parametrize("l2", [None, 1e-3])
def test_each_gradient_vanishes_and_each_probe_is_that_of_the_single_fit(l2: float | None) -> None:
    problems = mixed()
    probes = LinearProbe.fit_many(problems, l2=l2)
    assert list(probes) == list(problems)
    for name, (x, y) in problems.items():
        used = 1 / len(x) if l2 is None else l2
        alone, report = LinearProbe.fit(x, y, l2=l2), probes[name].report
        assert relative_gradient(probes[name], x, y, used) <= 1e-7, name
        assert same(probes[name], alone), name
        assert report is not None and alone.report is not None
        assert (report.l2, report.n_samples) == (used, len(x))
        # Label sets of one site begin with a factor that they share.
        assert abs(report.iterations - alone.report.iterations) <= 1
        assert report.relative_gradient_norm <= 1e-8
        assert report.loss == pytest.approx(alone.report.loss, rel=1e-9)


@pytest.mark.usefixtures("stacks")
def test_the_order_of_problems_does_not_matter() -> None:
    problems = mixed()
    names = list(problems)
    backwards = LinearProbe.fit_many({name: problems[name] for name in reversed(names)})
    forwards = LinearProbe.fit_many(problems)
    assert list(backwards) == names[::-1]
    assert all(same(forwards[name], backwards[name]) for name in names)


def test_two_classes_have_opposite_rows() -> None:
    """Σ_k ∂/∂w_k = l2 Σ_k w_k = 0 at the optimum, which the one fitted row relies on."""
    x, y = samples(200, 8, 2)
    probe = LinearProbe.fit(x, y)
    assert torch.equal(probe.weight[0], -probe.weight[1])
    assert relative_gradient(probe, x, y, 1 / 200) <= 2e-8
    assert torch.allclose(LinearProbe.fit(x, y == 0).weight, probe.weight.flip(0), atol=1e-9)


def test_a_problem_that_ends_early_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "CACHE", 2**30)
    noise = torch.randn(30, 6, dtype=torch.float64).repeat(2, 1)
    says_nothing = noise, torch.arange(60) // 30
    hard = [samples(60, 6, 2, separation=20.0) for _ in range(3)]
    probes = LinearProbe.fit_many({0: says_nothing, **{i + 1: p for i, p in enumerate(hard)}})
    assert probes[0].report is not None and probes[0].report.iterations == 0
    assert probes[0].weight.abs().max() <= 1e-12
    for index, (x, y) in enumerate(hard):
        assert relative_gradient(probes[index + 1], x, y, 1 / 60) <= 1e-7
        assert same(probes[index + 1], LinearProbe.fit(x, y))


def test_progress_counts_every_probe() -> None:
    problems, done = mixed(), []
    LinearProbe.fit_many(problems, advance=done.append)
    assert sum(done) == len(problems) > len(done) > 1


def test_dtypes_are_those_of_the_single_fit() -> None:
    x, y = samples(50, 4, 2)
    probes = LinearProbe.fit_many({"half": (x.half(), y), "double": (x, y == 1)})
    assert (probes["half"].weight.dtype, probes["double"].weight.dtype) == (
        torch.float32,
        torch.float64,
    )
    assert not any(p.requires_grad for probe in probes.values() for p in probe.parameters())


def test_no_problems_give_no_probes() -> None:
    assert LinearProbe.fit_many({}) == {}


GOOD = torch.randn(9, 4)
BAD = {
    "labels": ((GOOD, torch.zeros(8).long()), LabelError),
    "one class": ((GOOD, torch.zeros(9).long()), LabelError),
    "width": ((GOOD[0], torch.zeros(4).long()), WidthError),
    "NaN": ((GOOD * float("nan"), torch.arange(9) % 2), NonFiniteError),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_names_its_problem(name: str) -> None:
    problem, error = BAD[name]
    with pytest.raises(error, match=r"^L7\.mid: "):
        LinearProbe.fit_many({"L1.mid": (GOOD, torch.arange(9) % 2), "L7.mid": problem})


@pytest.mark.usefixtures("stacks")
def test_a_probe_that_did_not_converge_is_named() -> None:
    easy = torch.randn(30, 5, dtype=torch.float64).repeat(2, 1), torch.arange(60) // 30
    with pytest.raises(ConvergenceError, match=r"^hard: .*max_iterations"):
        LinearProbe.fit_many({"easy": easy, "hard": samples(60, 5, 2)}, max_iterations=1)
    with pytest.raises(LabelError, match="l2"):
        LinearProbe.fit_many({"easy": easy}, l2=0.0)


class Stored:
    """Activations that can be read only a batch at a time."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.passes, self.longest = x, 0, 0

    def batches(self, rows: int, /) -> Iterator[Tensor]:
        self.passes += 1
        for part in self.x.split(min(rows, 32)):
            self.longest = max(self.longest, len(part))
            yield part


def cut(x: Tensor, y: Tensor, size: int) -> list[Pair]:
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("separation", [0.5, 8.0])
def test_streamed_is_in_memory(
    monkeypatch: pytest.MonkeyPatch, n_classes: int, separation: float
) -> None:
    x, y = samples(150, 10, n_classes, separation)
    streamed = LinearProbe.fit_batches(cut(x, y, 32), tolerance=1e-10)
    assert same(streamed, LinearProbe.fit(x, y, tolerance=1e-10))
    assert relative_gradient(streamed, x, y, 1 / 150) <= 1e-7
    # Where neither is compiled both take the same steps.
    monkeypatch.setattr(multinomial, "_compiled", lambda: None)
    whole = LinearProbe.fit(x, y, tolerance=1e-10)
    assert streamed.report is not None and whole.report is not None
    assert streamed.report.iterations == whole.report.iterations
    assert streamed.report.loss == pytest.approx(whole.report.loss, rel=1e-9)
    assert streamed.report.n_samples == 150
    assert same(LinearProbe.fit(Stored(x), y), whole)
    assert same(LinearProbe.fit_batches(lambda: iter(cut(x, y, 7)), l2=1 / 150), whole)


def test_streams_of_few_examples_and_low_precision() -> None:
    x, y = samples(12, 40, 3)
    assert same(LinearProbe.fit_batches(cut(x, y, 5)), LinearProbe.fit(x, y))
    streamed = LinearProbe.fit_batches(cut(x.bfloat16(), y, 5))
    assert streamed.weight.dtype == torch.float32
    assert same(streamed, LinearProbe.fit(x.bfloat16(), y))


def test_batches_may_come_in_another_order_each_time() -> None:
    x, y = samples(90, 6, 3)

    def shuffled() -> Iterator[Pair]:
        order = torch.randperm(90)
        return iter(cut(x[order], y[order], 20))

    assert same(LinearProbe.fit_batches(shuffled), LinearProbe.fit(x, y))


def test_an_iterator_that_is_exhausted_is_named() -> None:
    x, y = samples(40, 4, 2)
    with pytest.raises(BatchError, match="only once"):
        LinearProbe.fit_batches(iter(cut(x, y, 8)))
    once = iter(cut(x, y, 8))
    with pytest.raises(BatchError, match="40 examples on the first pass and 0"):
        LinearProbe.fit_batches(lambda: once)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_labels_or_activations_that_change_between_passes_are_named(n_classes: int) -> None:
    x, y = samples(40, 4, n_classes)

    def relabelled() -> Iterator[Pair]:
        return iter(cut(x, y[torch.randperm(40)], 8))

    def resampled() -> Iterator[Pair]:
        return iter(cut(x + 0.01 * torch.randn_like(x), y, 8))

    for batches in (relabelled, resampled):
        with pytest.raises(BatchError, match="changed between passes"):
            LinearProbe.fit_batches(batches)
    passes = iter([cut(x, y, 8), cut(x, y + 1, 8)])
    with pytest.raises(BatchError, match=f"label {n_classes}"):
        LinearProbe.fit_batches(lambda: next(passes))


BATCHES = {
    "widths": ([(GOOD, torch.arange(9) % 2), (GOOD[:, :3], torch.arange(9) % 2)], WidthError, "1"),
    "number of labels": ([(GOOD, torch.zeros(8).long())], LabelError, "batch 0"),
    "NaN": ([(GOOD * float("nan"), torch.arange(9) % 2)], NonFiniteError, "batch 0"),
    "no pairs": ([GOOD], BatchError, "pair"),
    "none": ([], LabelError, "no examples"),
    "one class": ([(GOOD, torch.ones(9).long())], LabelError, "class 1"),
    "a class missing": ([(GOOD, torch.arange(9) % 2 * 2)], LabelError, r"\[1\]"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_bad_batches_are_named(name: str) -> None:
    batches, error, message = BATCHES[name]
    with pytest.raises(error, match=message) as caught:
        LinearProbe.fit_batches(batches)
    assert isinstance(caught.value, LRQPError)


def test_labels_of_another_length_than_stored_activations_are_named() -> None:
    x, y = samples(40, 4, 2)
    for labels in (y[:-1], torch.cat([y, y])):
        with pytest.raises(LabelError, match=r"labels must be"):
            LinearProbe.fit(Stored(x), labels)


def test_a_stream_that_did_not_converge_is_an_error() -> None:
    x, y = samples(60, 5, 2)
    with pytest.raises(ConvergenceError, match="max_iterations"):
        LinearProbe.fit_batches(cut(x, y, 16), max_iterations=1)


@pytest.mark.parametrize(("n", "n_classes", "factors"), [(500, 8, 8), (170, 20, 1)])
def test_many_classes_of_few_prompts_have_the_optimum_of_float64(
    n: int, n_classes: int, factors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, y = samples(n, 128, n_classes, 0.2)
    problems = {"own": (x, y), "shuffled": (x, y[torch.randperm(n)])}
    made, parts_of = [], multinomial.MultinomialLoss.parts

    def parts(self: multinomial.MultinomialLoss, rows: Tensor) -> int:
        made.append(parts_of(self, rows))
        return made[-1]

    monkeypatch.setattr(multinomial.MultinomialLoss, "parts", parts)
    narrow = LinearProbe.fit_many(problems, l2=1e-3)
    monkeypatch.setattr(multinomial, "LONG", float("inf"))
    wide = LinearProbe.fit_many(problems, l2=1e-3)
    assert {*made} == {factors, 1}
    for name, (_, labels) in problems.items():
        assert relative_gradient(narrow[name], x, labels, 1e-3) < 1e-6
        assert torch.allclose(narrow[name].weight, wide[name].weight, atol=1e-4)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_a_stack_takes_the_calls_of_one(monkeypatch: pytest.MonkeyPatch, n_classes: int) -> None:
    """As on a GPU: no call is made for each problem, and the host waits a few times a step."""
    monkeypatch.setattr(multinomial, "_compiled", lambda: None)
    monkeypatch.setattr(multinomial, "_may_ask", lambda number, _: number & (number - 1) == 0)
    monkeypatch.setattr(fitting, "CACHE", 2**32)
    monkeypatch.setattr(multinomial.MultinomialLoss, "patience", lambda *_, **__: 8.0)
    x, y = samples(200, 12, n_classes, 0.5)
    products, times = [], multinomial._times

    def counted(rows: Tensor, features: Tensor) -> Tensor:
        products.append(len(rows))
        return times(rows, features)

    monkeypatch.setattr(multinomial, "_times", counted)
    calls, looks, steps = [], [], []
    for size in (1, 24):
        problems = {i: fitting.Problem.of(x.clone(), y) for i in range(size)}
        products.clear()
        counter = Calls()
        with counter:
            (fitted,) = fitting.fit_in_memory(problems, fitting.Options(None, 1e-8, 200), 2**32)
        calls.append(counter.calls)
        looks.append(counter.looks)
        steps.append({report.iterations for *_, report in fitted.values()})
    (taken,) = steps[0]
    assert steps[0] == steps[1]
    # What each problem is told in the end is put into place one by one.
    assert calls[1] - calls[0] <= 8 * 24 and looks[1] - looks[0] <= 2 * 24
    assert calls[0] <= 150 + 60 * taken + 40 * len(products)
    assert looks[0] <= 30 + 8 * taken


class Calls(TorchDispatchMode):
    """Counts operations that are launches on a GPU, and those for which the host waits for it."""

    LOOKS = "_local_scalar_dense", "nonzero", "equal"

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.looks = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aliases = [argument.alias_info for argument in operation._schema.returns]
        self.looks += operation.overloadpacket.__name__ in self.LOOKS
        # Views and what is written over need no kernel, or are one.
        self.calls += not any(alias is not None and not alias.is_write for alias in aliases)
        return operation(*args, **kwargs or {})
