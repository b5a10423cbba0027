"""LRQP: the odds rules by their definition, failures, the cached geometry, gradients, copies."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from models_for_tests import WIDTH, Prompts, build, random_edit
from torch import Tensor

from lrqp_torch import LRQP, JointLRQP, LinearProbe, Mahalanobis, Solution, Status
from lrqp_torch.baselines import NoEdit
from lrqp_torch.edits.base import OnInfeasible
from lrqp_torch.errors import (
    InfeasibleError,
    LRQPError,
    NonFiniteError,
    SolverError,
    TargetError,
    WidthError,
)
from lrqp_torch.qp import ProbeGeometry

Clusters = tuple[Tensor, Tensor]


def probe_of(weight: Tensor, bias: Tensor | None = None) -> LinearProbe:
    probe = LinearProbe(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        probe.weight.copy_(weight)
        probe.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return probe.requires_grad_(False)


def duplicate_edit(**options: object) -> LRQP:
    """Three classes of width 2, of which 1 and 2 are the same."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    return LRQP(probe_of(weight), Mahalanobis.euclidean(2), **options)


def margin(edit: LRQP, x: Tensor, target: Tensor) -> Tensor:
    """z_t − max z_ℓ in float64, computed here."""
    logits = x.double() @ edit.probe.weight.double().T + edit.probe.bias.double()
    own = logits.gather(-1, target[:, None]).squeeze(-1)
    return own - logits.scatter(-1, target[:, None], float("-inf")).amax(-1)


# The odds rules


def test_mirror_rule_by_its_definition(clusters: Clusters) -> None:
    x, y = clusters
    edit = LRQP.fit(x, y, log_odds=1.5)
    target = (y + 1) % 3
    solution = edit.solve(x, target, source=y)
    probability = edit.probe(x).softmax(-1).log()
    believed = (
        probability.gather(-1, y[:, None]) - probability.gather(-1, target[:, None])
    ).squeeze(-1)
    assert (believed < 1.5).any() and (believed > 1.5).any()
    expected = believed.clamp_min(1.5)
    assert torch.allclose(solution.floor, expected, rtol=1e-12, atol=1e-10)
    assert (margin(edit, solution.x_new, target) >= solution.floor - 1e-10).all()
    # In edited examples the strongest rival ends exactly at α: no more than was asked.
    edited = solution.status == Status.SOLVED
    assert torch.allclose(
        solution.log_odds_after[edited], solution.floor[edited], rtol=1e-9, atol=1e-9
    )


def test_control_edits_ask_for_the_floor_only(clusters: Clusters) -> None:
    x, y = clusters
    edit = LRQP.fit(x, y, log_odds=2.0)
    solution = edit.solve(x, y, source=y)
    assert torch.equal(solution.floor, torch.full((300,), 2.0, dtype=torch.float64))
    certain = margin(edit, x, y) >= 2
    assert 0 < certain.sum() < 300
    assert torch.equal(solution.status == Status.SATISFIED, certain)
    assert torch.equal(solution.x_new[certain], x[certain])


def test_two_classes_are_mirrored_exactly(clusters: Clusters) -> None:
    x, y = clusters
    x, y = x[y < 2], y[y < 2]
    edit = LRQP.fit(x, y, log_odds=0.0)
    solution = edit.solve(x, 1 - y, source=y)
    right = margin(edit, x, y) > 0
    assert torch.allclose(
        margin(edit, solution.x_new, 1 - y)[right], margin(edit, x, y)[right], rtol=1e-9, atol=1e-9
    )


def test_fixed_rule_asks_the_same_of_all(clusters: Clusters) -> None:
    x, y = clusters
    edit = LRQP.fit(x, y, log_odds=3.0, rule="fixed")
    for source in (None, y):
        solution = edit.solve(x, (y + 1) % 3, source=source)
        assert torch.equal(solution.floor, torch.full((300,), 3.0, dtype=torch.float64))
        assert (margin(edit, solution.x_new, (y + 1) % 3) >= 3 - 1e-10).all()


def test_a_negative_floor_lets_weak_beliefs_stay(clusters: Clusters) -> None:
    x, y = clusters
    edit = LRQP.fit(x, y, log_odds=-2.0, rule="fixed")
    target = (y + 1) % 3
    solution = edit.solve(x, target)
    assert torch.equal(solution.status == Status.SATISFIED, margin(edit, x, target) >= -2)


def test_the_default_source_is_what_the_probe_reads(clusters: Clusters) -> None:
    x, y = clusters
    edit = LRQP.fit(x, y, log_odds=1.0)
    target = (y + 1) % 3
    read = edit.probe(x).argmax(-1)
    assert (read != y).any()
    assert torch.equal(edit.solve(x, target).floor, edit.solve(x, target, source=read).floor)
    assert not torch.equal(edit.solve(x, target).floor, edit.solve(x, target, source=y).floor)


def test_total_odds_reach_alpha_where_pairwise_odds_do_not() -> None:
    """At pairwise odds of 3 against 4 equal rivals the total odds are 3/4."""
    probe = probe_of(torch.eye(5, dtype=torch.float64))
    x = torch.zeros(1, 5, dtype=torch.float64)
    alpha = 3.0
    odds = {}
    for kind in ("pairwise", "total"):
        edit = LRQP(
            probe, Mahalanobis.euclidean(5), log_odds=math.log(alpha), rule="fixed", odds=kind
        )
        odds[kind] = float(probe.log_odds(edit(x, 0), 0, against="rest").exp())
    assert odds["pairwise"] == pytest.approx(alpha / 4)
    assert odds["total"] == pytest.approx(alpha)


def test_total_odds_on_data(clusters: Clusters) -> None:
    x, y = clusters
    target = (y + 1) % 3
    pairwise = LRQP.fit(x, y, log_odds=2.0)
    total = LRQP.fit(x, y, log_odds=2.0, odds="total")
    reached = {}
    for name, edit in (("pairwise", pairwise), ("total", total)):
        solution = edit.solve(x, target, source=y)
        rest = edit.probe.log_odds(solution.x_new, target, against="rest")
        reached[name] = (rest >= solution.floor - 1e-10).all()
    assert reached["total"]
    assert not reached["pairwise"]
    # Adding log(K − 1) to the pairwise floor suffices too, and is never shorter.
    total_fixed = LRQP(total.probe, total.metric, log_odds=2.0, rule="fixed", odds="total")
    sufficient = LRQP(total.probe, total.metric, log_odds=2.0 + math.log(2), rule="fixed").solve(
        x, target
    )
    least = total_fixed.solve(x, target)
    assert (least.distance <= sufficient.distance * (1 + 1e-9)).all()
    assert (least.distance < sufficient.distance * (1 - 1e-4)).any()


def test_total_odds_have_a_solver_of_their_own(clusters: Clusters) -> None:
    with pytest.raises(SolverError, match="solver of its own"):
        LRQP.fit(*clusters, odds="total", solver="DIFFCP")


def test_total_and_pairwise_agree_for_two_classes(clusters: Clusters) -> None:
    x, y = clusters
    edits = [LRQP.fit(x, y % 2, odds=odds) for odds in ("pairwise", "total")]
    assert torch.equal(edits[0](x, 1), edits[1](x, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["mirror", "fixed"])
def test_what_is_stored_reads_the_target(clusters: Clusters, dtype: torch.dtype, rule: str) -> None:
    x, y = clusters[0].to(dtype), clusters[1]
    edit = LRQP.fit(x, y, rule=rule)
    target = (y + 2) % 3
    solution = edit.solve(x, target, source=y)
    assert solution.x_new.dtype == dtype
    assert (solution.log_odds_after >= solution.floor).all()
    assert edit.probe.accuracy(solution.x_new, target) == 1.0
    assert torch.equal(edit(x, target, source=y), solution.x_new)
    again = edit.solve(solution.x_new, target, source=target)
    assert (again.status[solution.floor >= 10] == Status.SATISFIED).all()


def test_one_class_for_all(clusters: Clusters) -> None:
    x, y = clusters
    edit = LRQP.fit(x, y)
    assert torch.equal(edit(x, 1), edit(x, torch.ones(300, dtype=torch.long)))
    assert torch.equal(edit(x, 1, source=2), edit(x, 1, source=torch.full((300,), 2)))
    assert torch.equal(edit(x, torch.tensor(1)), edit(x, torch.ones(300, dtype=torch.int16)))


def test_no_activations(clusters: Clusters) -> None:
    x, y = clusters
    for classes in (y, y % 2):
        edit = LRQP.fit(x, classes)
        solution = edit.solve(x[:0], 1)
        assert solution.x_new.shape == (0, 12)
        assert edit(x[:0], y[:0]).shape == (0, 12)


def test_fit_is_its_parts(clusters: Clusters) -> None:
    x, y = clusters
    edit = LRQP.fit(x, y, l2=0.1, shrinkage="oas", log_odds=4.0, rule="fixed")
    parts = LRQP(
        LinearProbe.fit(x, y, l2=0.1), Mahalanobis.fit(x, "oas"), log_odds=4.0, rule="fixed"
    )
    assert torch.equal(edit(x, 0), parts(x, 0))
    assert float(edit.log_odds) == 4.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_solver_can_be_chosen(clusters: Clusters) -> None:
    x, y = clusters[0][:10], clusters[1][:10]
    edit = LRQP.fit(*clusters)
    other = LRQP(edit.probe, edit.metric, solver="DIFFCP")
    solution = other.solve(x, (y + 1) % 3)
    assert torch.allclose(solution.x_new, edit(x, (y + 1) % 3), atol=1e-2)
    assert (solution.log_odds_after >= solution.floor).all()


# Failures


def test_infeasible_targets_raise_and_name_the_examples() -> None:
    edit = duplicate_edit()
    x = torch.zeros(4, 2, dtype=torch.float64)
    target = torch.tensor([0, 1, 0, 2])
    with pytest.raises(InfeasibleError) as caught:
        edit.solve(x, target)
    message = str(caught.value)
    assert "class [1, 2]" in message
    assert "2 examples" in message
    assert "[1, 3]" in message
    assert "skip" in message
    with pytest.raises(InfeasibleError, match=r"\[12, 40\]"):
        edit.solve(x, target, examples=torch.tensor([7, 12, 9, 40]))


def test_infeasible_targets_can_be_skipped() -> None:
    edit = duplicate_edit(on_infeasible="skip")
    x = torch.tensor([[0.0, -0.0], [-0.0, 0.5], [0.2, 0.1], [1.0, -0.0]], dtype=torch.float64)
    target = torch.tensor([0, 1, 0, 2])
    solution = edit.solve(x, target)
    assert solution.status.tolist() == [
        Status.SOLVED,
        Status.INFEASIBLE,
        Status.SOLVED,
        Status.INFEASIBLE,
    ]
    lost = solution.status == Status.INFEASIBLE
    assert torch.equal(solution.x_new[lost], x[lost])
    assert torch.equal(solution.x_new[lost].signbit(), x[lost].signbit())
    assert (solution.distance[lost] == 0).all()
    assert (solution.euclidean[lost] == 0).all()
    assert torch.equal(solution.log_odds_after[lost], solution.log_odds_before[lost])
    alone = edit.solve(x[~lost], target[~lost])
    assert torch.allclose(solution.x_new[~lost], alone.x_new)


@pytest.mark.parametrize("on_infeasible", ["raise", "skip"])
def test_a_floor_that_cannot_be_stored(on_infeasible: str) -> None:
    """float16 ends at 65504; an edit that needs more is an error, or left undone."""
    weight = torch.tensor([[1e-6, 0.0], [0.0, 0.0]], dtype=torch.float64)
    edit = LRQP(probe_of(weight), Mahalanobis.euclidean(2), on_infeasible=on_infeasible)
    x = torch.ones(3, 2, dtype=torch.float16)
    if on_infeasible == "raise":
        with pytest.raises(SolverError, match=r"\[0, 1, 2\]"):
            edit(x, 0)
    else:
        solution = edit.solve(x, 0)
        assert (solution.status == Status.INACCURATE).all()
        assert torch.equal(solution.x_new, x)
        assert (solution.euclidean == 0).all()
        assert not solution.active.any()


def test_a_metric_without_length_between_the_classes() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    flat = Mahalanobis(torch.diag(torch.tensor([0.0, 1.0])))
    with pytest.raises(InfeasibleError, match="shrink"):
        LRQP(probe_of(weight), flat)(torch.zeros(2, 2), 0)


BAD_CALLS = {
    "x of another width": ({"x": torch.zeros(4, 11)}, WidthError, r"\(B, 12\)"),
    "x without batch": ({"x": torch.zeros(12)}, WidthError, r"\(B, 12\)"),
    "x with positions": ({"x": torch.zeros(4, 2, 12)}, WidthError, r"\(B, 12\)"),
    "integer x": ({"x": torch.zeros(4, 12).long()}, WidthError, "int64"),
    "NaN": ({"x": torch.full((4, 12), float("nan"))}, NonFiniteError, "4 of 4"),
    "infinity": ({"x": torch.full((4, 12), float("inf"))}, NonFiniteError, "infinity"),
    "target too large": ({"target": 3}, TargetError, "target holds 3"),
    "target negative": ({"target": torch.tensor([0, 1, -2, 0])}, TargetError, "example 2"),
    "target shape": ({"target": torch.zeros(3).long()}, TargetError, r"\(4,\)"),
    "target matrix": ({"target": torch.zeros(4, 1).long()}, TargetError, r"\(4, 1\)"),
    "target floating": ({"target": torch.zeros(4)}, TargetError, "float32"),
    "target a float": ({"target": 1.0}, TargetError, "float32"),
    "source too large": ({"source": 3}, TargetError, "source holds 3"),
    "source shape": ({"source": torch.zeros(5).long()}, TargetError, "source"),
    "source floating": ({"source": torch.zeros(4)}, TargetError, "source"),
}


def test_true_and_false_are_the_classes_one_and_zero(clusters: Clusters) -> None:
    x, y = clusters
    truth = y > 0
    edit, model = LRQP.fit(x, truth), build("gpt2")
    joint = JointLRQP({"truth": edit, "kind": LRQP.fit(x, y)}, edit.metric)
    assert torch.equal(edit(x, ~truth, truth), edit(x, (~truth).long(), truth.long()))
    assert torch.equal(edit(x, True), edit(x, 1))
    assert torch.equal(edit(x, [bool(one) for one in truth]), edit(x, truth.long()))
    assert torch.equal(NoEdit(edit)(x, ~truth), x)
    asked = {"truth": ~truth, "kind": "keep"}
    assert torch.equal(joint(x, asked), joint(x, {**asked, "truth": (~truth).long()}))
    wide = random_edit(torch.randn(60, WIDTH), 2)
    inputs = Prompts.random([5, 4, 6]).padded("left")
    flags = torch.tensor([True, False, True])
    found = []
    for given in (flags, flags.long()):
        with wide.at(model, "L1.mid", positions="last", target=given, source=~given.bool()):
            found.append(model(**inputs).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("rule", ["mirror", "fixed"])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_named(clusters: Clusters, name: str, rule: str) -> None:
    changes, error, message = BAD_CALLS[name]
    edit = LRQP.fit(*clusters, rule=rule)
    arguments = {"x": torch.zeros(4, 12), "target": 1, "source": None, **changes}
    with pytest.raises(error, match=message):
        edit(**arguments)


def test_one_bad_activation_is_found_in_a_batch(clusters: Clusters) -> None:
    edit = LRQP.fit(*clusters)
    x = torch.zeros(9, 12)
    x[6, 3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"1 of 9.*\[6\]"):
        edit(x, 0)


@pytest.mark.parametrize(
    "options",
    [{"rule": "mirrored"}, {"odds": "all"}, {"on_infeasible": "ignore"}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_do_not_exist(options: dict[str, str]) -> None:
    with pytest.raises(LRQPError, match="must be one of"):
        duplicate_edit(**options)


@pytest.mark.parametrize("log_odds", [float("nan"), float("inf"), torch.zeros(2)])
def test_a_floor_that_is_no_number(log_odds: float | Tensor) -> None:
    with pytest.raises(NonFiniteError, match="log_odds"):
        duplicate_edit(log_odds=log_odds)


def test_parts_of_another_kind_are_refused_with_what_to_do() -> None:
    layer = torch.nn.Linear(2, 3)
    for metric in (torch.eye(2), torch.eye(2).numpy(), None):
        with pytest.raises(WidthError, match=r"metric must be a Mahalanobis.*euclidean\(2\)"):
            LRQP(layer, metric)  # type: ignore[arg-type]
    with pytest.raises(WidthError, match=r"got Sequential.*get_submodule\('1'\)"):
        LRQP(torch.nn.Sequential(torch.nn.Dropout(), layer), Mahalanobis.euclidean(2))  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="got '10'"):
        LRQP(layer, Mahalanobis.euclidean(2), log_odds="10")  # type: ignore[arg-type]


def test_a_broken_probe_is_named() -> None:
    weight = torch.tensor([[float("nan"), 0.0], [0.0, 1.0]])
    with pytest.raises(NonFiniteError, match="probe's weight"):
        LRQP(probe_of(weight), Mahalanobis.euclidean(2))


def test_unknown_solver() -> None:
    with pytest.raises(SolverError, match="unknown solver"):
        duplicate_edit(solver="OSQP")


# The cached geometry


def in_place(edit: LRQP) -> None:
    edit.probe.weight.mul_(2)


def through_data(edit: LRQP) -> None:
    edit.probe.weight.data.mul_(2)


def new_data(edit: LRQP) -> None:
    edit.probe.weight.data = edit.probe.weight.data * 2


def new_parameter(edit: LRQP) -> None:
    edit.probe.weight = torch.nn.Parameter(edit.probe.weight * 2, requires_grad=False)


def new_parameter_twice(edit: LRQP) -> None:
    new_parameter(edit)
    new_parameter(edit)


def new_bias(edit: LRQP) -> None:
    edit.probe.bias += torch.arange(3)


def new_probe(edit: LRQP) -> None:
    edit.probe = probe_of(edit.probe.weight * 2, edit.probe.bias)


def new_metric(edit: LRQP) -> None:
    edit.metric = Mahalanobis.euclidean(12)


def metric_in_place(edit: LRQP) -> None:
    edit.metric.covariance.diagonal().add_(5)


def metric_loaded(edit: LRQP) -> None:
    state = edit.state_dict()
    state["metric.covariance"] = torch.eye(12, dtype=torch.float64)
    edit.load_state_dict(state)


def rounded(edit: LRQP) -> None:
    edit.bfloat16()


CHANGES = [
    in_place,
    through_data,
    new_data,
    new_parameter,
    new_parameter_twice,
    new_bias,
    new_probe,
    new_metric,
    metric_in_place,
    metric_loaded,
    rounded,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_of_probe_or_metric_is_seen(clusters: Clusters, change: object) -> None:
    x, y = clusters
    edit = LRQP.fit(x.float(), y)
    before = edit(x, 0)
    with torch.no_grad():
        change(edit)
    after = edit(x, 0)
    assert not torch.equal(before, after)
    fresh = LRQP(edit.probe, edit.metric)
    assert torch.equal(after, fresh(x, 0))


def test_an_unchanged_edit_computes_its_geometry_once(
    clusters: Clusters, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = clusters
    edit = LRQP.fit(x, y)
    edit(x, 0)
    calls = []
    build = ProbeGeometry.build
    monkeypatch.setattr(
        ProbeGeometry, "build", staticmethod(lambda *args: calls.append(1) or build(*args))
    )
    for target in (0, 1, 2):
        edit(x, target)
    assert not calls
    edit.probe.weight.mul_(2)
    edit(x, 0)
    assert len(calls) == 1


# Gradients


def test_gradients_reach_the_probe_and_the_activations(clusters: Clusters) -> None:
    x, y = clusters[0][:6].clone(), clusters[1][:6]
    edit = LRQP.fit(*clusters, log_odds=2.0)
    target = (y + 1) % 3
    edit.probe.requires_grad_()
    x.requires_grad_()
    outgoing = torch.randn(6, 12, dtype=torch.float64)
    inputs = [x, edit.probe.weight, edit.probe.bias]
    gradients = torch.autograd.grad((edit(x, target) * outgoing).sum(), inputs)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    # Central differences along a random direction in all three at once; mirror rule included.
    directions = [torch.randn_like(tensor) for tensor in inputs]
    expected = sum(float((g * v).sum()) for g, v in zip(gradients, directions, strict=True))
    values = []
    for step in (1e-6, -1e-6):
        moved = copy.deepcopy(edit)
        with torch.no_grad():
            moved.probe.weight += step * directions[1]
            moved.probe.bias += step * directions[2]
            values.append(float((moved(x + step * directions[0], target) * outgoing).sum()))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(expected, rel=1e-5)


def test_a_trained_probe_is_followed_step_by_step(clusters: Clusters) -> None:
    """Gradient descent on the probe through the edit: the distance falls."""
    x, y = clusters[0][:20], clusters[1][:20]
    edit = LRQP.fit(*clusters, log_odds=2.0, rule="fixed")
    edit.probe.requires_grad_()
    optimiser = torch.optim.SGD(edit.probe.parameters(), lr=1e-3)
    distances = []
    for _ in range(5):
        optimiser.zero_grad()
        distance = edit.solve(x, (y + 1) % 3).distance.sum()
        distance.backward()
        optimiser.step()
        distances.append(distance.item())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < distances[0]


def test_no_gradient_is_kept_where_none_is_asked(clusters: Clusters) -> None:
    x, y = clusters
    edit = LRQP.fit(x, y)
    assert not edit(x, 0).requires_grad
    edit.probe.requires_grad_()
    with torch.no_grad():
        assert not edit(x, 0).requires_grad
    assert edit(x, 0).requires_grad


# Copies


def same(a: Solution, b: Solution) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


def test_deep_copies_are_equal_and_independent(clusters: Clusters) -> None:
    x, y = clusters
    edit = LRQP.fit(x, y, log_odds=3.0, odds="total")
    edit.notes["site"] = "L6.mid"
    before = edit.solve(x, 0)
    twin = copy.deepcopy(edit)
    assert same(twin.solve(x, 0), before)
    assert twin.notes == edit.notes
    with torch.no_grad():
        twin.probe.weight.mul_(3)
    assert not same(twin.solve(x, 0), before)
    assert same(edit.solve(x, 0), before)


def test_state_dict_carries_the_numbers(clusters: Clusters) -> None:
    x, y = clusters
    edit = LRQP.fit(x, y, log_odds=3.0)
    other = LRQP.fit(x + torch.randn_like(x), y, log_odds=1.0)
    assert not same(edit.solve(x, 0), other.solve(x, 0))
    missing, unexpected = other.load_state_dict(edit.state_dict())
    assert not missing and not unexpected
    assert same(edit.solve(x, 0), other.solve(x, 0))
    names = {"log_odds", "probe.weight", "probe.bias", "metric.covariance", "metric.mean"}
    assert set(edit.state_dict()) == names


def test_the_floor_survives_half_precision(clusters: Clusters) -> None:
    x, y = clusters
    edit = LRQP.fit(x, y, log_odds=9.7, rule="fixed").half()
    assert (edit.solve(x, 0).floor == 9.7).all()


def test_an_edit_made_in_inference_mode_works_there_and_outside() -> None:
    x = torch.randn(60, 6, dtype=torch.float64)
    y = torch.arange(60) % 2
    with torch.inference_mode():
        edit = LRQP.fit(x, y)
        inside = edit(x, 1 - y)
    torch.testing.assert_close(edit(x, 1 - y), inside, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_edit_too_large_for_the_dtype_is_not_called_solved(dtype: torch.dtype) -> None:
    x = torch.randn(60, 6)
    y = (x[:, 0] > 0).long()
    floor = 1e7 if dtype == torch.float16 else 1e40
    edit = LRQP.fit(x, y, log_odds=floor)
    with pytest.raises(SolverError, match="exceed what"):
        edit(x.to(dtype), 1)
    edit.on_infeasible = "skip"
    solution = edit.solve(x.to(dtype), 1)
    assert torch.equal(solution.x_new, x.to(dtype))
    assert bool((solution.status == Status.INACCURATE).all())


def test_targets_that_are_no_classes_are_refused_by_name() -> None:
    edit = LRQP.fit(torch.randn(20, 3), torch.arange(20) % 2)
    with pytest.raises(TargetError, match="target must be class numbers"):
        edit(torch.randn(4, 3), None)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="names the class 'abb'; the classes are numbers only"):
        edit(torch.randn(4, 3), "abb")
    named = LRQP.fit(torch.randn(20, 3), ["plural", "singular"] * 10)
    with pytest.raises(TargetError, match="'abb'; the classes are 'plural', 'singular'"):
        named(torch.randn(4, 3), ["plural", "abb", "plural", "plural"])


def test_classes_may_be_named_wherever_they_are_given() -> None:
    x = torch.randn(40, 3)
    edit = LRQP.fit(x, ["plural", "singular"] * 20)
    own = torch.tensor([1, 0, 1, 1])
    numbers = edit(x[:4], own, 1 - own)
    for names in (["singular", "plural", "singular", 1], np.array(["singular", "plural"])[1 - own]):
        others = ["singular" if one == 0 else "plural" for one in own.tolist()]
        assert torch.equal(edit(x[:4], names, others), numbers)
        assert torch.equal(edit.propose(x[:4], names, others).x_new, numbers)
    numbered = LRQP(copy.deepcopy(edit.probe), edit.metric)
    numbered.probe.classes = None
    assert numbered.class_names == ()
    assert torch.equal(edit(x, "singular"), numbered(x, 1))


@pytest.mark.parametrize("on_infeasible", ["raise", "skip"])
def test_an_edit_compiles_in_one_graph(on_infeasible: OnInfeasible) -> None:
    """What would be raised or skipped is told by its status there, too."""
    torch.compiler.reset()
    edit, x = duplicate_edit(on_infeasible=on_infeasible), torch.randn(6, 2)
    compiled = torch.compile(edit, fullgraph=True, backend="eager")
    target = torch.arange(6) % 3
    found, reached = compiled(x, target), target == 0
    torch.testing.assert_close(found[reached], edit(x[reached], target[reached]))
    if on_infeasible == "skip":
        assert torch.equal(found[~reached], x[~reached])
    else:
        assert found[~reached].isnan().all()


@pytest.mark.parametrize(
    ("x", "asked", "message"),
    [
        (torch.randn(4, 3).to_sparse(), None, "dense"),
        (torch.randn(4, 3).to(torch.float8_e4m3fn), None, "16 bits"),
        (torch.randn(4, 3), "ten", "asked must be numbers"),
    ],
)
def test_what_is_no_numbers_is_refused_by_name(x: Tensor, asked: str | None, message: str) -> None:
    edit = LRQP.fit(torch.randn(20, 3), torch.arange(20) % 2)
    for solve in (edit.solve, edit.propose, edit):
        with pytest.raises(WidthError, match=message):
            solve(x, 1, asked=asked)  # type: ignore[arg-type]
    with pytest.raises(WidthError, match="floating"):
        LRQP.fit(torch.randn(20, 0), torch.arange(20) % 2)


def test_a_solution_prints_one_line() -> None:
    x = torch.randn(20, 3)
    edit = LRQP.fit(x, torch.arange(20) % 2)
    assert re.fullmatch(r"Solution\(20 activations: .*solved.*\)", repr(edit.solve(x, 1)))


def test_an_edit_prints_its_rule_and_its_fit(clusters: Clusters) -> None:
    edit = LRQP.fit(*clusters, log_odds=3.0, shrinkage=0.25)
    said = "rule=mirror, odds=pairwise, log_odds=3, K=3, d=12, n=300, shrinkage=0.25"
    assert repr(edit) == f"LRQP({said})"
    edit.notes["site"] = "L6.mid"
    assert repr(edit) == f"LRQP({said}, site=L6.mid)"
    bare = LRQP(edit.probe, Mahalanobis.euclidean(12), rule="fixed")
    assert repr(bare) == "LRQP(rule=fixed, odds=pairwise, log_odds=10, K=3, d=12, shrinkage=0)"


def test_an_edit_is_where_its_probe_is() -> None:
    """Seen on the device that holds no numbers, which is always there."""
    probe = LinearProbe(4, 3, device="meta", dtype=torch.float64)
    metric = Mahalanobis.euclidean(4)
    edit = LRQP(probe, metric)
    assert {tensor.device.type for tensor in edit.state_dict().values()} == {"meta"}
    assert metric.covariance.device.type == "cpu"
    assert edit(torch.zeros(2, 4, device="meta"), 1).device.type == "meta"


def test_what_a_user_gave_is_cut_in_messages() -> None:
    with pytest.raises(LRQPError, match="rule must be one of") as caught:
        duplicate_edit(rule="x" * 10_000)
    assert len(str(caught.value)) < 300
