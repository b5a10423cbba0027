"""Edits that keep other beliefs: C δ = 0, least among such edits, and held inside a model."""

import numpy as np
import pytest
import quadprog
import torch
from models_for_tests import VOCABULARY, build, random_edit
from torch import Tensor, nn

import lrqp_torch as lrqp
from lrqp_torch import LRQP, LinearProbe, Mahalanobis, Status
from lrqp_torch.errors import CovarianceError, InfeasibleError, NonFiniteError, WidthError


def metric_of(width: int, condition: float = 1e4, seed: int = 0) -> Mahalanobis:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(width, width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(normal).Q
    scales = torch.logspace(0, -float(np.log10(condition)), width, dtype=torch.float64)
    covariance = (basis * scales) @ basis.T
    return Mahalanobis((covariance + covariance.T) / 2, torch.zeros(width))


def probe_of(width: int, n_classes: int, seed: int) -> LinearProbe:
    generator = torch.Generator().manual_seed(seed)
    probe = LinearProbe(width, n_classes, dtype=torch.float64).requires_grad_(False)
    probe.weight.copy_(torch.randn(n_classes, width, generator=generator))
    probe.bias.copy_(torch.randn(n_classes, generator=generator))
    return probe


def normal(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_it_is_the_conditional_covariance() -> None:
    metric, rows = metric_of(16), normal(3, 16)
    covariance = metric.covariance
    pulled = covariance @ rows.T
    expected = covariance - pulled @ torch.linalg.solve(rows @ pulled, pulled.T)
    kept = metric.keeping(rows)
    torch.testing.assert_close(kept.covariance, expected, rtol=1e-9, atol=1e-12)
    # Symmetric, positive semidefinite, of the right rank, and zero along the rows.
    values = torch.linalg.eigvalsh(kept.covariance)
    assert torch.equal(kept.covariance, kept.covariance.T)
    assert int((values > 1e-12).sum()) == 13 and float(values.min()) > -1e-14
    assert float((rows @ kept.covariance).abs().max()) < 1e-14
    assert kept.kept is not None and kept.kept.shape == (3, 16)


def test_it_is_the_covariance_of_the_residual_given_the_rows() -> None:
    x, rows = normal(400, 8), normal(2, 8, seed=4)
    x = x @ normal(8, 8, seed=5)
    metric = Mahalanobis.fit(x, shrinkage=0.0)
    centred = x - x.mean(0)
    read = centred @ rows.T
    residual = centred - read @ torch.linalg.lstsq(read, centred).solution
    torch.testing.assert_close(
        metric.keeping(rows).covariance, residual.T @ residual / 400, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8])
@pytest.mark.parametrize(("n_classes", "n_kept"), [(2, 2), (3, 4), (5, 3)])
def test_other_beliefs_stay_and_no_such_edit_is_shorter(
    condition: float, n_classes: int, n_kept: int
) -> None:
    width = 20
    metric, other = metric_of(width, condition), probe_of(width, n_kept, 1)
    edit = LRQP(probe_of(width, n_classes, 2), metric.keeping(other), log_odds=4.0)
    x, target = normal(40, width), torch.arange(40) % n_classes
    solution = edit.solve(x, target)
    assert (solution.status <= Status.SOLVED).all() and (solution.status == Status.SOLVED).any()
    before, after = other(x).log_softmax(-1), other(solution.x_new).log_softmax(-1)
    assert float((after - before).abs().max()) < 1e-12 * float(1 + other(x).abs().max())
    assert (edit.probe.log_odds(solution.x_new, target) >= solution.floor - 1e-9).all()
    # The same in full dimension, with C δ = 0 as equality constraints, by a solver not ours.
    factor = torch.linalg.cholesky(metric.covariance)
    rows = other.weight[1:] - other.weight[0]
    for i in range(8):
        t = int(target[i])
        others = [k for k in range(n_classes) if k != t]
        normals = edit.probe.weight[t] - edit.probe.weight[others]
        gap = solution.floor[i] - (edit.probe(x[i])[t] - edit.probe(x[i])[others])
        slopes = torch.cat([rows, normals]) @ factor
        right = torch.cat([torch.zeros(len(rows), dtype=torch.float64), gap])
        u = quadprog.solve_qp(
            np.eye(width), np.zeros(width), slopes.T.numpy(), right.numpy(), meq=len(rows)
        )[0]
        assert float(solution.distance[i]) == pytest.approx(float(np.linalg.norm(u)), rel=1e-6)


def test_the_distance_is_that_of_the_original_metric() -> None:
    """Cδ = 0 costs length, and the length is measured alike in both metrics."""
    metric, other = metric_of(12), probe_of(12, 3, 1)
    probe, x = probe_of(12, 3, 2), normal(30, 12)
    kept = LRQP(probe, metric.keeping(other)).solve(x, 0)
    free = LRQP(probe, metric).solve(x, 0)
    assert (kept.distance >= free.distance - 1e-9).all()
    assert (kept.distance > free.distance + 1e-3).any()
    torch.testing.assert_close(metric.distance(kept.x_new - x), kept.distance, rtol=1e-7, atol=1e-7)


def test_a_shift_common_to_all_logits_is_free() -> None:
    """Only differences are kept: the edit may move the mean of the logits."""
    metric, other = metric_of(10, 1.0), probe_of(10, 3, 1)
    edit = LRQP(probe_of(10, 2, 2), metric.keeping(other))
    x = normal(20, 10)
    moved = other(edit(x, 0)) - other(x)
    assert float((moved - moved.mean(-1, keepdim=True)).abs().max()) < 1e-11
    assert float(moved.abs().max()) > 1e-2
    held = LRQP(edit.probe, metric.keeping(other.weight))
    assert float((other(held(x, 0)) - other(x)).abs().max()) < 1e-11


def test_keeping_twice_is_keeping_both() -> None:
    metric, first, second = metric_of(14), probe_of(14, 3, 1), probe_of(14, 2, 2)
    together, one_by_one = metric.keeping(first, second), metric.keeping(first).keeping(second)
    torch.testing.assert_close(together.covariance, one_by_one.covariance, rtol=1e-9, atol=1e-13)
    assert together.kept is not None and one_by_one.kept is not None
    assert together.kept.shape == one_by_one.kept.shape == (3, 14)
    again = metric.keeping(first, first)
    torch.testing.assert_close(
        again.covariance, metric.keeping(first).covariance, rtol=1e-9, atol=1e-13
    )


def test_a_singular_covariance_has_a_pseudo_inverse() -> None:
    """Rows along which Σ is zero already are kept by any edit, and change nothing."""
    scales = torch.tensor([4.0, 3, 2, 1, 0, 0], dtype=torch.float64)
    metric = Mahalanobis(torch.diag(scales))
    nothing = torch.zeros(1, 6, dtype=torch.float64)
    dead = torch.eye(6, dtype=torch.float64)[4:]
    assert torch.equal(metric.keeping(nothing).covariance, metric.covariance)
    torch.testing.assert_close(metric.keeping(dead).covariance, metric.covariance)
    mixed = torch.tensor([[1.0, 0, 0, 0, 1, 0]], dtype=torch.float64)
    expected = torch.diag(torch.tensor([0.0, 3, 2, 1, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(metric.keeping(mixed).covariance, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [6, 24, 200])
@pytest.mark.parametrize("condition", [1.0, 1e6])
def test_a_target_that_is_kept_cannot_be_reached(width: int, condition: float) -> None:
    metric = metric_of(width, condition)
    probe = probe_of(width, 2, 2)
    twin = LinearProbe(width, 2, dtype=torch.float64).requires_grad_(False)
    twin.weight.copy_(-3 * probe.weight)
    x = normal(10, width)
    target = 1 - probe(x).argmax(-1)
    for kept in (probe, twin, normal(3, 3, seed=9) @ torch.cat([probe.weight, normal(1, width)])):
        edit = LRQP(probe, metric.keeping(kept), on_infeasible="skip")
        solution = edit.solve(x, target)
        assert (solution.status == Status.INFEASIBLE).all()
        assert torch.equal(solution.x_new, x)
    with pytest.raises(InfeasibleError, match="keep"):
        LRQP(probe, metric.keeping(probe)).solve(x, target)


def test_gradients_flow_to_the_covariance() -> None:
    root = metric_of(6, 10.0).covariance.clone()
    rows, probe, x = normal(2, 6), probe_of(6, 3, 2), normal(4, 6)

    def edited(root: Tensor, x: Tensor) -> Tensor:
        metric = Mahalanobis((root + root.T) / 2).keeping(rows)
        result: Tensor = LRQP(probe, metric, rule="fixed", log_odds=3.0)(x, 1)
        return result

    assert torch.autograd.gradcheck(edited, (root.requires_grad_(), x.requires_grad_()), atol=1e-6)


def test_bad_input_is_named() -> None:
    metric = metric_of(6)
    with pytest.raises(WidthError, match="nothing to keep"):
        metric.keeping()
    with pytest.raises(WidthError, match="width 6"):
        metric.keeping(probe_of(5, 2, 0))
    with pytest.raises(WidthError, match="probe or a floating tensor"):
        metric.keeping([1.0] * 6)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError):
        metric.keeping(torch.full((1, 6), float("nan")))
    with pytest.raises(CovarianceError, match="leaves none"):
        metric.keeping(torch.eye(6))


def test_half_precision_and_copies_leave_the_metric_alone() -> None:
    kept = metric_of(6).keeping(normal(2, 6))
    before = kept.covariance.clone()
    kept.half()
    assert torch.equal(kept.covariance, before)
    assert kept.kept is not None and kept.kept.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", ["L1.pre", "L1.mid", "L2.post"])
@torch.no_grad()
def test_inside_a_model_other_beliefs_move_by_rounding_only(dtype: torch.dtype, site: str) -> None:
    model = build("gpt2", dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(VOCABULARY, (64, 7), generator=generator)}
    at = torch.full((64,), 4)
    x = lrqp.capture(model, inputs, [site], at)[site]
    free = random_edit(x, 3, log_odds=8.0)
    other: nn.Linear = random_edit(x, 4, seed=5).probe
    edit = LRQP(free.probe, free.metric.keeping(other), log_odds=8.0)
    moved = {}
    for name, item in (("free", free), ("kept", edit)):
        with item.at(model, site, positions=at, target=1) as run:
            model(**inputs)
            held = lrqp.capture(model, inputs, [site], at)[site].double()
        assert (run.log_odds_after >= run.floor).all() and (run.status == Status.SOLVED).any()
        change = (held - x.double()) @ (other.weight - other.weight.mean(0)).T
        moved[name] = change.abs().amax(-1)
    size = torch.maximum(held.norm(dim=-1), x.double().norm(dim=-1))
    length = (other.weight - other.weight.mean(0)).norm(dim=-1).max()
    bound = torch.finfo(dtype).eps * length * size
    assert (moved["kept"] <= bound).all()
    assert float((moved["free"] / bound).max()) > 10
