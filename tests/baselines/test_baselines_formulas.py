"""Every baseline against its formula computed otherwise, or a theorem that defines it."""

import builtins
import importlib
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
import torch
from baselines_for_tests import three_classes
from models_for_tests import Prompts, build, random_edit
from torch import Tensor

from lrqp_torch import LRQP, LinearProbe, Mahalanobis, capture
from lrqp_torch.baselines import (
    BASELINES,
    LEACE,
    AlterRep,
    BaselineData,
    ConditionalMean,
    EuclideanLeastEdit,
    ExactMeanDifference,
    FullPatch,
    InverseMetric,
    LeastEdit,
    MeanDifference,
    NeuronTransport,
    NoEdit,
    OptimalTransport,
    RandomDirection,
)
from lrqp_torch.baselines import (
    build as build_baseline,
)
from lrqp_torch.errors import (
    CovarianceError,
    InfeasibleError,
    MissingExtraError,
    NonFiniteError,
    PairError,
    SettingError,
    SolverError,
    TargetError,
    WidthError,
)

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def fitted(**options: Any) -> tuple[Tensor, Tensor, LRQP]:
    x, y = three_classes()
    return x, y, LRQP.fit(x, y, **{"log_odds": 1.5, **options})


def two_classes() -> tuple[Tensor, Tensor]:
    x, y = three_classes()
    return x[y < 2], y[y < 2]


def numpy_mean(x: Tensor, y: Tensor, k: int) -> np.ndarray:
    return x[y == k].numpy().mean(0)


def test_no_edit_is_the_identity() -> None:
    x, y, reference = fitted()
    assert torch.equal(NoEdit(reference)(x, 1, y), x)
    assert torch.equal(NoEdit(reference, strength=7.0)(x.float(), 1, y), x.float())


def test_lrqp_behind_the_call_is_lrqp() -> None:
    x, y, reference = fitted()
    target = (y + 1) % 3
    for z in (x, x.float(), x.bfloat16()):
        assert torch.equal(LeastEdit(reference)(z, target, y), reference(z, target, y))


# Least edits in other metrics


@pytest.mark.parametrize("name", ["euclidean", "inverse"])
def test_least_edits_by_cvxpy(name: str) -> None:
    x, y, reference = fitted(rule="fixed")
    covariance = reference.metric.covariance.numpy()
    if name == "euclidean":
        baseline, matrix = EuclideanLeastEdit(reference), np.eye(10)
    else:
        baseline, matrix = InverseMetric(reference), covariance
    target = (y + 2) % 3
    edited = baseline(x[:6], target[:6])
    weight, bias = reference.probe.weight.numpy(), reference.probe.bias.numpy()
    for i in range(6):
        t = int(target[i])
        found = cp.Variable(10)
        logits = weight @ found + bias
        cp.Problem(
            cp.Minimize(cp.quad_form(found - x[i].numpy(), cp.psd_wrap(matrix))),
            [logits[t] - logits[k] >= 1.5 for k in range(3) if k != t],
        ).solve(solver="CLARABEL")
        np.testing.assert_allclose(edited[i].numpy(), found.value, atol=2e-4)


def test_euclidean_closed_form_for_two_classes() -> None:
    x, y = two_classes()
    reference = LRQP.fit(x, y, rule="fixed", log_odds=2.0)
    normal = (reference.probe.weight[1] - reference.probe.weight[0]).numpy()
    offset = float(reference.probe.bias[1] - reference.probe.bias[0])
    short = np.maximum(0, 2.0 - (x.numpy() @ normal + offset))
    expected = x.numpy() + np.outer(short, normal) / (normal @ normal)
    np.testing.assert_allclose(EuclideanLeastEdit(reference)(x, 1), expected, atol=1e-9)


def test_inverse_metric_moves_along_the_inverse() -> None:
    x, y = two_classes()
    reference = LRQP.fit(x, y)
    normal = (reference.probe.weight[1] - reference.probe.weight[0]).numpy()
    along = np.linalg.solve(reference.metric.covariance.numpy(), normal)
    moved = (InverseMetric(reference)(x, 1 - y) - x).numpy()
    cosine = moved @ along / np.linalg.norm(moved, axis=1) / np.linalg.norm(along)
    np.testing.assert_allclose(np.abs(cosine), 1, atol=1e-9)


def test_a_singular_metric_has_no_inverse() -> None:
    x, y = two_classes()
    reference = LRQP(LinearProbe.fit(x, y), Mahalanobis(torch.diag(torch.arange(10.0))))
    with pytest.raises(CovarianceError, match="shrinkage"):
        InverseMetric(reference)


# The random direction


def test_random_directions_are_as_long_as_lrqps_edits() -> None:
    x, y, reference = fitted()
    target = (y + 1) % 3
    solution = reference.solve(x, target, y)
    moved = RandomDirection(reference, seed=5)(x, target, y) - x
    inverse = np.linalg.inv(reference.metric.covariance.numpy())
    length = np.sqrt(np.einsum("nd,de,ne->n", moved, inverse, moved))
    np.testing.assert_allclose(length, solution.distance, rtol=1e-8)
    satisfied = solution.status == 0
    assert torch.equal(moved[satisfied], torch.zeros_like(moved[satisfied]))


def test_random_directions_are_seeded_and_spread_as_the_ellipsoid() -> None:
    x, y, reference = fitted()
    target = (y + 1) % 3
    first = RandomDirection(reference, seed=5)(x, target, y)
    assert torch.equal(first, RandomDirection(reference, seed=5)(x, target, y))
    assert not torch.equal(first, RandomDirection(reference, seed=6)(x, target, y))
    # Each row's direction is its own, whatever rows come with it and in what order.
    for rows in (torch.arange(7), torch.randperm(len(x)), torch.tensor([30])):
        part = RandomDirection(reference, seed=5)(x[rows], target[rows], y[rows])
        torch.testing.assert_close(part, first[rows], rtol=1e-9, atol=1e-9)
    # Whitened and scaled to length 1, their covariance is I / d.
    moved = torch.cat([RandomDirection(reference, seed=s)(x, target, y) - x for s in range(20)])
    factor = np.linalg.cholesky(reference.metric.covariance.numpy())
    white = scipy.linalg.solve_triangular(factor, moved.numpy().T, lower=True).T
    present = np.linalg.norm(white, axis=1) > 0
    white[present] /= np.linalg.norm(white[present], axis=1, keepdims=True)
    spread = white[present].T @ white[present] / present.sum()
    np.testing.assert_allclose(spread, np.eye(10) / 10, atol=0.015)
    # And they are as normal numbers would be: of ten, each squared is a Beta(1/2, 9/2) draw.
    found = scipy.stats.kstest((white[present] ** 2).ravel(), scipy.stats.beta(0.5, 4.5).cdf)
    assert found.statistic < 1.63 / np.sqrt(white[present].size / 10)
    # Rows that are near one another, and one row under two seeds, go ways of their own.
    one = white.reshape(20, len(x), 10)
    near = (x[1:] - x[:1]).norm(dim=-1).argmin() + 1
    assert abs((one[:, 0] * one[:, near]).sum(-1).mean()) < 3 / np.sqrt(200)
    assert abs((one[1:] * one[:-1]).sum(-1).mean()) < 4 / np.sqrt(19 * len(x) * 10)


def test_a_random_direction_is_the_same_in_any_batch_of_a_model() -> None:
    model, site = build("gpt2"), "L1.mid"
    prompts = Prompts.random([7, 4, 6, 5])
    inputs = prompts.padded("left")
    rows = capture(model, inputs, [site], positions="last")[site].double()
    edit = RandomDirection(
        random_edit(torch.cat([rows, torch.randn(60, 24).double()]), 2, log_odds=60.0)
    )

    def moved(chosen: list[int], side: str) -> Tensor:
        part = Prompts(tuple(prompts.tokens[i] for i in chosen)).padded(side)
        with edit.at(model, site, positions="last", target=1, source=0) as run:
            edited = capture(model, part, [site], positions="last")[site]
        assert run.distance.shape == (len(chosen),)
        return edited

    whole = moved([0, 1, 2, 3], "left")
    assert float((whole - rows).norm(dim=-1).min()) > 0.1
    for chosen, side in (([3, 1, 0, 2], "right"), ([2], "left"), ([1, 3], "right")):
        torch.testing.assert_close(moved(chosen, side), whole[chosen], rtol=0, atol=2e-3)


def test_random_directions_stay_in_the_range_of_a_singular_metric() -> None:
    x, y = two_classes()
    basis = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64)).Q
    values = torch.tensor([0.0, 0, 0, 1, 1, 2, 2, 3, 3, 4], dtype=torch.float64)
    reference = LRQP(LinearProbe.fit(x, y), Mahalanobis((basis * values) @ basis.T))
    moved = RandomDirection(reference)(x, 1 - y, y) - x
    assert float((moved @ basis[:, :3]).abs().max()) < 1e-8
    distance = reference.solve(x, 1 - y, y).distance
    torch.testing.assert_close(reference.metric.distance(moved), distance, rtol=1e-7, atol=1e-7)


# Mean differences


def test_mean_difference_adds_it() -> None:
    x, y, reference = fitted()
    baseline = MeanDifference.fit(x, y, reference=reference)
    edited = baseline.at_strength(1.5)(x, 2, y)
    for k in (0, 1):
        expected = x[y == k].numpy() + 1.5 * (numpy_mean(x, y, 2) - numpy_mean(x, y, k))
        np.testing.assert_allclose(edited[y == k], expected, atol=1e-12)
    assert torch.equal(edited[y == 2], x[y == 2])


def test_exact_dose_ends_at_the_floor_by_the_least_multiple() -> None:
    x, y, reference = fitted(on_infeasible="skip")
    baseline = ExactMeanDifference.fit(x, y, reference=reference)
    target = (y + 1) % 3
    edited, floor = baseline(x, target, y), reference.solve(x, target, y).floor
    reached = reference.probe.log_odds(edited, target)
    moved = (edited != x).any(-1)
    torch.testing.assert_close(reached[moved], floor[moved], **EXACT)
    # The dose by a linear program in one variable, which also says where there is none.
    direction = baseline.means[target] - baseline.means[y]
    for i in range(60):
        t, others = int(target[i]), [k for k in range(3) if k != int(target[i])]
        normals = (reference.probe.weight[t] - reference.probe.weight[others]).numpy()
        offsets = (reference.probe.bias[t] - reference.probe.bias[others]).numpy()
        gap = float(floor[i]) - normals @ x[i].numpy() - offsets
        rate = normals @ direction[i].numpy()
        found = scipy.optimize.linprog([1.0], A_ub=-rate[:, None], b_ub=-gap, bounds=[(0, None)])
        if found.status == 2:
            assert torch.equal(edited[i], x[i])
        else:
            expected = x[i] + found.x[0] * direction[i]
            torch.testing.assert_close(edited[i], expected, rtol=1e-7, atol=1e-7)
    assert 0 < int(moved.sum()) < 240 and bool((reached < floor - 1e-9).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_dose_reaches_the_floor_in_the_dtype_of_the_stream(dtype: torch.dtype) -> None:
    x, y = two_classes()
    x = x.to(dtype)
    reference = LRQP.fit(x.double(), y, log_odds=3.0)
    edited = ExactMeanDifference.fit(x, y, reference=reference)(x, 1 - y, y)
    floor = reference.solve(x, 1 - y, y).floor
    assert edited.dtype == dtype
    assert bool((reference.probe.log_odds(edited.double(), 1 - y) >= floor).all())


def test_exact_dose_is_lrqp_when_the_probe_is_lda() -> None:
    """w ∝ Σ⁻¹ Δμ makes Σ w ∝ Δμ: both move along the mean difference to the same floor."""
    x, y = two_classes()
    metric = Mahalanobis.fit(x, 0.1)
    means = torch.stack([x[y == k].mean(0) for k in range(2)])
    normal = torch.linalg.solve(metric.covariance, means[1] - means[0])
    probe = LinearProbe(10, 2, dtype=torch.float64).requires_grad_(False)
    probe.weight.copy_(torch.stack([-normal / 2, normal / 2]))
    offset = normal @ means.sum(0) / 4
    probe.bias.copy_(torch.stack([offset, -offset]))
    reference = LRQP(probe, metric, log_odds=2.0)
    baseline = ExactMeanDifference.fit(x, y, reference=reference)
    for target in (1 - y, y):
        torch.testing.assert_close(baseline(x, target, y), reference(x, target, y), **EXACT)


def test_exact_dose_says_when_no_multiple_reaches() -> None:
    x, y = two_classes()
    probe = LinearProbe.fit(x, y)
    wrong = torch.stack([x[y == 1].mean(0), x[y == 0].mean(0)])  # points away from the target
    metric = Mahalanobis.fit(x)
    baseline = ExactMeanDifference(LRQP(probe, metric), wrong)
    with pytest.raises(InfeasibleError, match=r"no multiple .* first \[0, 1"):
        baseline(x, 1 - y, y)
    skipping = ExactMeanDifference(LRQP(probe, metric, on_infeasible="skip"), wrong)
    assert torch.equal(skipping(x, 1 - y, y), x)


def test_exact_dose_stops_where_a_rival_overtakes() -> None:
    """Along a direction that raises a third class faster, no dose is enough."""
    probe = LinearProbe(2, 3, dtype=torch.float64).requires_grad_(False)
    probe.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]]))
    probe.bias.copy_(torch.tensor([0.0, 0.0, -8.0]))
    reference = LRQP(probe, Mahalanobis.euclidean(2), log_odds=1.0, rule="fixed")
    means = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = torch.zeros(1, 2, dtype=torch.float64)
    edited = ExactMeanDifference(reference, means)(x, 1, 0)
    torch.testing.assert_close(edited, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    # The third class overtakes by little, in a short stretch and in a long one.
    for slope, bias in ((3.0, -2.0), (102.0, -101.0)):
        probe.weight[2, 0], probe.bias[2] = slope, bias
        with pytest.raises(InfeasibleError):
            ExactMeanDifference(reference, means)(x, 1, 0)


# The conditional mean


def test_conditional_mean_is_the_regression_on_the_projection() -> None:
    x, y = three_classes()
    reference = LRQP(LinearProbe.fit(x, y), Mahalanobis.fit(x, 0.0))
    edited = ConditionalMean.fit(x, y, reference=reference)(x, 1, y)
    weight = reference.probe.weight.numpy()
    contrasts = weight[1:] - weight[:1]  # another basis of the same projection
    read = x.numpy() @ contrasts.T
    design = np.column_stack([np.ones(len(x)), read])
    coefficients = np.linalg.lstsq(design, x.numpy(), rcond=None)[0]
    wanted = np.concatenate([[1.0], contrasts @ numpy_mean(x, y, 1)])
    expected = x.numpy() - design @ coefficients + wanted @ coefficients
    np.testing.assert_allclose(edited, expected, atol=1e-8)
    # All end at the projection of the target's mean.
    np.testing.assert_allclose(
        edited.numpy() @ contrasts.T, np.tile(wanted[1:], (len(x), 1)), atol=1e-8
    )


def test_conditional_mean_leaves_what_is_uncorrelated() -> None:
    x, y, reference = fitted()
    moved = ConditionalMean.fit(x, y, reference=reference)(x, (y + 1) % 3) - x
    weight = reference.probe.weight
    steering = reference.metric.covariance @ (weight - weight.mean(0)).T
    other = scipy.linalg.null_space(steering.T.numpy(), rcond=1e-10)
    assert other.shape[1] == 8
    assert np.abs(moved.numpy() @ other).max() < 1e-9


# Transport


@pytest.mark.parametrize("shrinkage", [0.0, "ledoit_wolf"])
def test_optimal_transport_maps_mean_and_covariance(shrinkage: float | str) -> None:
    x, y, reference = fitted()
    baseline = OptimalTransport.fit(x, y, reference=reference, shrinkage=shrinkage)
    classes = [Mahalanobis.fit(x[y == k], shrinkage).covariance.numpy() for k in range(3)]
    held = x[y == 0]
    edited = baseline(held, 2, 0).numpy()
    np.testing.assert_allclose(edited.mean(0), numpy_mean(x, y, 2), atol=1e-9)
    # The map itself, by the formula.
    root = scipy.linalg.sqrtm(classes[0])
    inverse = np.linalg.inv(root)
    monge = inverse @ scipy.linalg.sqrtm(root @ classes[2] @ root) @ inverse
    expected = numpy_mean(x, y, 2) + (held.numpy() - numpy_mean(x, y, 0)) @ monge.T
    np.testing.assert_allclose(edited, expected, atol=1e-8)
    np.testing.assert_allclose(monge @ classes[0] @ monge, classes[2], atol=1e-8)
    if shrinkage == 0.0:
        np.testing.assert_allclose(np.cov(edited.T, bias=True), classes[2], atol=1e-8)
    assert torch.equal(baseline(held, 0, 0), held)


def test_optimal_transport_moves_less_than_another_map_that_matches() -> None:
    """Colouring by Cholesky factors matches the same moments, at a greater cost."""
    x, y, reference = fitted()
    held = x[y == 0]
    moved = OptimalTransport.fit(x, y, reference=reference, shrinkage=0.0)(held, 2, 0) - held
    covariance = [torch.cov(x[y == k].T, correction=0) for k in range(3)]
    factor = [torch.linalg.cholesky(c) for c in covariance]
    other = torch.linalg.solve_triangular(factor[0], (held - held.mean(0)).T, upper=False)
    coloured = (factor[2] @ other).T + x[y == 2].mean(0)
    torch.testing.assert_close(torch.cov(coloured.T, correction=0), covariance[2], **EXACT)
    assert float(moved.square().sum()) < float((coloured - held).square().sum())


def test_transport_there_and_back() -> None:
    x, y, reference = fitted()
    for baseline in (
        OptimalTransport.fit(x, y, reference=reference),
        NeuronTransport.fit(x, y, reference=reference),
    ):
        target = (y + 1) % 3
        torch.testing.assert_close(baseline(baseline(x, target, y), y, target), x, **EXACT)


def test_neuron_transport_matches_every_marginal() -> None:
    x, y, reference = fitted()
    baseline = NeuronTransport.fit(x, y, reference=reference)
    edited = baseline(x, 1, y).numpy()
    for k in range(3):
        np.testing.assert_allclose(edited[y == k].mean(0), numpy_mean(x, y, 1), atol=1e-10)
        np.testing.assert_allclose(edited[y == k].std(0), x[y == 1].numpy().std(0), atol=1e-10)
    assert torch.equal(baseline(x, y, y), x)


def test_neuron_transport_shifts_a_constant_coordinate() -> None:
    x, y = two_classes()
    x[y == 0, 4] = 1.5
    edited = NeuronTransport.fit(x, y)(x[y == 0], 1, 0)
    torch.testing.assert_close(
        edited[:, 4], x[y == 1, 4].mean().expand(int((y == 0).sum())), **EXACT
    )


# LEACE


def test_leace_leaves_no_linear_information() -> None:
    pytest.importorskip("concept_erasure")
    x, y, reference = fitted()
    erased = LEACE.fit(x, y, reference=reference)(x, 1, y)
    for k in range(3):
        np.testing.assert_allclose(numpy_mean(erased, y, k), x.numpy().mean(0), atol=1e-9)
    # The best linear probe of what is left is the share of each class, that is, no weights.
    assert float(LinearProbe.fit(erased, y).weight.abs().max()) < 1e-6
    # The target is not read.
    assert torch.equal(erased, LEACE.fit(x, y, reference=reference)(x, y, y))


def test_leace_erases_a_class_that_is_hardly_there() -> None:
    pytest.importorskip("concept_erasure")
    x, y = torch.randn(100_000, 2, dtype=torch.float64), torch.arange(100_000) % 2
    erased = LEACE.fit(x, y)(x, 1)
    assert np.abs(numpy_mean(x, y, 1) - numpy_mean(x, y, 0)).max() > 1e-3
    np.testing.assert_allclose(numpy_mean(erased, y, 1), numpy_mean(erased, y, 0), atol=1e-12)


def test_leace_is_the_packages_and_the_papers() -> None:
    package = pytest.importorskip("concept_erasure")
    x, y, reference = fitted()
    one_hot = torch.nn.functional.one_hot(y, 3).double()
    eraser = package.LeaceEraser.fit(x, one_hot, shrinkage=False)
    baseline = LEACE.fit(x, y, reference=reference, shrinkage=False)
    torch.testing.assert_close(baseline(x, 0), eraser(x), **EXACT)
    # The paper's formula in numpy: x − W⁺ P W (x − μ).
    covariance = np.cov(x.numpy().T)
    whiten = np.linalg.inv(scipy.linalg.sqrtm(covariance))
    cross = (x - x.mean(0)).numpy().T @ (one_hot - one_hot.mean(0)).numpy()
    basis = scipy.linalg.orth(whiten @ cross, rcond=1e-10)
    projection = np.linalg.inv(whiten) @ basis @ basis.T @ whiten
    expected = x.numpy() - (x - x.mean(0)).numpy() @ projection.T
    np.testing.assert_allclose(baseline(x, 0), expected, atol=1e-8)


def test_leace_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name == "concept_erasure":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr("lrqp_torch.baselines.projections.import_module", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'lrqp_torch\[leace\]'"):
        LEACE.fit(*three_classes())
    assert issubclass(MissingExtraError, builtins.ImportError)


# AlterRep


def test_alterrep_rows_are_a_nullspace_projection() -> None:
    x, y, reference = fitted()
    baseline = AlterRep.fit(x, y, reference=reference, iterations=4)
    for k in range(3):
        rows = baseline.directions[k]
        torch.testing.assert_close(rows @ rows.T, torch.eye(4).double(), **EXACT)
        null = torch.eye(10) - rows.T @ rows
        torch.testing.assert_close(null @ null, null, **EXACT)
        assert float((null @ rows.T).abs().max()) < 1e-12
        # The second row is what a probe finds once the first is projected out.
        centred = x - baseline.centres[k]
        left = centred - torch.outer(centred @ rows[0], rows[0])
        probe = LinearProbe.fit(left, y == k)
        found = probe.weight[1] - probe.weight[0]
        torch.testing.assert_close(rows[1], found / found.norm(), rtol=1e-6, atol=1e-6)


def test_alterrep_puts_every_projection_on_the_targets_side() -> None:
    x, y = two_classes()
    baseline = AlterRep.fit(x, y, alpha=4.0, iterations=3)
    centre, rows = baseline.centres[1], baseline.directions[1]
    torch.testing.assert_close(baseline.directions[0], -rows)
    before = (x - centre) @ rows.T
    for target, sign in ((1, 1.0), (0, -1.0)):
        edited = baseline(x, target)
        after = (edited - centre) @ rows.T
        torch.testing.assert_close(after, sign * 4.0 * before.abs(), **EXACT)
        null = torch.eye(10) - rows.T @ rows
        torch.testing.assert_close((edited - x) @ null, torch.zeros_like(x), **EXACT)
    # α = 0 is the nullspace projection, which is idempotent.
    erased = AlterRep(baseline.reference, baseline.directions, baseline.centres, alpha=0.0)
    torch.testing.assert_close(erased(erased(x, 1), 1), erased(x, 1), **EXACT)


def test_alterrep_stops_when_nothing_is_left() -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    x = plane @ torch.randn(2, 6, generator=generator, dtype=torch.float64)
    y = (plane[:, 0] > 0).long()
    baseline = AlterRep.fit(x, y, iterations=5)
    assert int((baseline.directions[1].norm(dim=-1) > 0).sum()) == 2
    assert bool(torch.isfinite(baseline(x, 1 - y)).all())


def test_alterrep_without_centres_is_the_published_formula() -> None:
    x, y = two_classes()
    baseline = AlterRep.fit(x, y, iterations=2, centred=False)
    rows = baseline.directions[1].numpy()
    for k in range(2):
        weight = LinearProbe.fit(x, y).weight
        first = ((weight[1] - weight[0]) / (weight[1] - weight[0]).norm()).numpy()
        np.testing.assert_allclose(rows[0], first, atol=1e-8)
        read = x.numpy() @ rows.T
        sign = 1.0 if k else -1.0
        expected = x.numpy() - read @ rows + sign * 4.0 * np.abs(read) @ rows
        np.testing.assert_allclose(baseline(x, k), expected, atol=1e-9)


def test_alterrep_options() -> None:
    x, y, reference = fitted()
    with pytest.raises(SettingError, match="alpha"):
        AlterRep.fit(x, y, reference=reference, alpha=-1.0)
    with pytest.raises(SettingError, match="iterations must be 1 to 10"):
        AlterRep.fit(x, y, reference=reference, iterations=11)


# The full patch


def test_full_patch_is_the_pair() -> None:
    x, y, reference = fitted()
    pair = x.roll(1, 0).float()
    baseline = FullPatch(reference).paired(pair)
    assert torch.equal(baseline(x.float(), 1 - y.clamp(max=1), y), pair)
    # Patching the pair back gives x.
    assert torch.equal(FullPatch(reference).paired(x)(baseline(x, 1), 0), x)
    half = baseline.at_strength(0.5)(x, 1)
    np.testing.assert_allclose(half, (x.numpy() + pair.double().numpy()) / 2, atol=1e-12)


def test_tensors_that_do_not_fit_are_named() -> None:
    _, _, reference = fitted()
    wrong = torch.zeros(3, 9)
    for make in (
        lambda: MeanDifference(reference, wrong),
        lambda: ConditionalMean(reference, wrong),
        lambda: NeuronTransport(reference, torch.zeros(3, 10), wrong),
        lambda: OptimalTransport(reference, [Mahalanobis.euclidean(10)] * 3),
        lambda: AlterRep(reference, torch.zeros(3, 2, 9), torch.zeros(3, 10)),
        lambda: LEACE(reference, torch.zeros(10, 2), torch.zeros(3, 10), torch.zeros(10)),
    ):
        with pytest.raises(WidthError):
            make()


@pytest.mark.parametrize(
    "name", ["mean_difference", "conditional_mean", "optimal_transport", "leace", "alterrep"]
)
def test_labels_may_be_names_as_those_of_an_lrqp(name: str) -> None:
    x, y, _ = fitted()
    names = ["abc"[k] for k in y.tolist()]
    reference = LRQP.fit(x, names)
    by_name, by_number = (
        build_baseline(name, BaselineData(x, own, reference)) for own in (names, y)
    )
    assert torch.equal(by_name(x, (y + 1) % 3), by_number(x, (y + 1) % 3))
    with pytest.raises(TargetError, match="names the class 'z'"):
        build_baseline(name, BaselineData(x, ["z", *names[1:]], reference))


def test_what_a_dtype_cannot_hold_is_named() -> None:
    x, y, reference = fitted()
    baseline = MeanDifference.from_data(BaselineData(x, y, reference))
    with pytest.raises(NonFiniteError, match=r"float16 can hold, the first are of rows \[0"):
        baseline.at_strength(1e7)(x.half(), (y + 1) % 3)
    assert bool(torch.isfinite(baseline.at_strength(1e7)(x.float(), (y + 1) % 3)).all())
    for strength in ("1", None, float("nan")):
        with pytest.raises(SettingError, match="strength must be a finite number"):
            baseline.at_strength(strength)
    with pytest.raises(PairError, match="must be a tensor, got list"):
        FullPatch(reference).paired([1])


@pytest.mark.parametrize(
    "name", [n for n in sorted(BASELINES) if n[:3] != "das" and n not in ("full_patch", "none")]
)
def test_what_is_fitted_in_inference_mode_can_be_differentiated_through(name: str) -> None:
    with torch.inference_mode():
        x, y = three_classes()
        edit = BASELINES[name].fit(x + 0, y)
        edit(x[:4], 1)
    assert not any(tensor.is_inference() for tensor in [*edit.parameters(), *edit.buffers()])
    point = torch.randn(4, x.shape[1], dtype=x.dtype, requires_grad=True)
    edit(point, 1).square().sum().backward()
    assert point.grad is not None


def test_vmap_is_refused_by_name() -> None:
    x, labels = three_classes()
    edit = MeanDifference.fit(x, labels, reference=LRQP.fit(x, labels))
    with pytest.raises(SolverError, match="mean_difference looks at values while it solves, which"):
        torch.func.vmap(lambda row: edit(row[None], 1))(x[:4])
