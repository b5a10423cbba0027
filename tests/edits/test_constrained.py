"""Own constraints and penalties: against direct cvxpy, with gradients, status and named errors."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cvxpy as cp
import pytest
import torch
from edits_for_tests import normal
from edits_for_tests import probe_of as random_probe
from models_for_tests import VOCABULARY, Prompts, build, random_edit
from torch import Tensor
from torch.autograd import gradcheck

import lrqp_torch as lrqp
from lrqp_torch import LRQP, LinearProbe, Mahalanobis, Solution, Status
from lrqp_torch.edits.constrained import ConstrainedLRQP
from lrqp_torch.errors import (
    ConstraintError,
    InfeasibleError,
    LRQPError,
    PositionError,
    SavedEditError,
    SolverError,
    TargetError,
    WidthError,
)
from lrqp_torch.qp.posed import Point
from lrqp_torch.stream.replay import Replay

WIDTH = 6


def probe_of(n_classes: int = 3, seed: int = 1, width: int = WIDTH) -> LinearProbe:
    return random_probe(n_classes, seed, width)


def metric_of(width: int = WIDTH) -> Mahalanobis:
    root, identity = normal(width, width, seed=2), torch.eye(width, dtype=torch.float64)
    return Mahalanobis(root @ root.T / width + identity / 2, normal(width, seed=4) / 2)


def edit_of(function: Callable[[Point], Any], **options: Any) -> ConstrainedLRQP:
    settings = {"log_odds": 2.0, "rule": "fixed", **options}
    return ConstrainedLRQP(probe_of(), metric_of(), function, **settings)


def directly(
    edit: ConstrainedLRQP,
    x: Tensor,
    target: int,
    floor: float,
    terms: Callable[[cp.Variable], tuple[list[cp.Constraint], cp.Expression | float]],
) -> Tensor | None:
    """x' of one activation by cvxpy in the coordinates of the stream, as the post poses it."""
    weight, logits = edit.probe.weight, edit.probe(x)
    edited = cp.Variable(len(x))
    factor = torch.linalg.cholesky(torch.linalg.inv(edit.metric.covariance)).numpy()
    own, penalty = terms(edited)
    others = [k for k in range(len(weight)) if k != target]
    normals = (weight[target] - weight[others]).numpy()
    gaps = (floor - (logits[target] - logits[others])).numpy()
    program = cp.Problem(
        cp.Minimize(cp.sum_squares(factor.T @ (edited - x.numpy())) / 2 + penalty),
        [normals @ (edited - x.numpy()) >= gaps, *own],
    )
    program.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return torch.from_numpy(edited.value) if program.status.startswith("optimal") else None


def compare(
    edit: ConstrainedLRQP,
    solution: Solution,
    x: Tensor,
    target: int,
    terms: Callable[[int, cp.Variable], tuple[list[cp.Constraint], cp.Expression | float]],
) -> set[int]:
    """Every example is what cvxpy says, infeasible ones too; returns the statuses that occurred."""
    for i in range(len(x)):
        floor = float(solution.floor[i])
        best = directly(edit, x[i], target, floor, lambda edited, i=i: terms(i, edited))
        assert (best is None) == (solution.status[i] == Status.INFEASIBLE)
        expected = x[i] if best is None else best
        torch.testing.assert_close(solution.x_new[i], expected, rtol=1e-5, atol=2e-5)
    return set(solution.status.tolist())


def cap(point: Point) -> list[cp.Constraint]:
    return [point.radius <= point.parameters["cap"]]


@pytest.mark.parametrize("reads", ["activation", "length"])
def test_a_cap_on_the_radius(reads: str) -> None:
    edit = edit_of(cap, parameters={"cap": ()}, reads=reads, on_infeasible="skip")
    x = 1.5 * normal(16, WIDTH)
    caps = torch.linspace(0.3, 5.0, 16, dtype=torch.float64)
    solution = edit.solve(x, 1, parameters={"cap": caps})
    factor = torch.linalg.cholesky(torch.linalg.inv(edit.metric.covariance)).numpy()
    mean = edit.metric.mean.numpy()
    found = compare(
        edit,
        solution,
        x,
        1,
        lambda i, edited: ([cp.norm(factor.T @ (edited - mean)) <= float(caps[i])], 0.0),
    )
    assert {Status.SOLVED, Status.INFEASIBLE} <= found
    fine = solution.status <= Status.SOLVED
    radius = edit.metric.distance(solution.x_new - edit.metric.mean)
    assert (radius[fine] <= caps[fine] + 1e-6).all()
    assert (solution.log_odds_after[fine] >= 2).all()
    assert (solution.kkt_residual[fine] < 1e-6).all()
    # The cap binds somewhere: there the edit is longer than LRQP's.
    free = edit.edit.solve(x, 1).distance
    assert (solution.distance[fine] >= free[fine] - 1e-6).all()
    assert (solution.distance[fine] > free[fine] + 1e-3).any()


def test_a_box_on_chosen_coordinates() -> None:
    chosen = [0, 3]
    rows = torch.eye(WIDTH, dtype=torch.float64)[chosen]

    def through_x(point: Point) -> list[cp.Constraint]:
        return [point.x[chosen] >= point.parameters["low"], cp.abs(point.displacement[5]) <= 0.2]

    def box(point: Point) -> list[cp.Constraint]:
        return [point.features >= point.parameters["low"]]

    x = normal(12, WIDTH)
    low = x[:, chosen] - torch.rand(12, 2, dtype=torch.float64)
    reduced = edit_of(box, parameters={"low": (2,)}, reads=rows)
    solution = reduced.solve(x, 2, parameters={"low": low})
    compare(reduced, solution, x, 2, lambda i, edited: ([edited[chosen] >= low[i].numpy()], 0.0))
    whole = edit_of(through_x, parameters={"low": 2})
    solution = whole.solve(x, 2, parameters={"low": low})
    compare(
        whole,
        solution,
        x,
        2,
        lambda i, edited: (
            [edited[chosen] >= low[i].numpy(), cp.abs(edited[5] - float(x[i, 5])) <= 0.2],
            0.0,
        ),
    )
    # K − 1 + n coordinates and one towards the mean, against d.
    assert reduced._pose()[0].size == 5 and whole._pose()[0].size == WIDTH


def test_an_l1_penalty_in_a_basis() -> None:
    basis = torch.linalg.qr(normal(WIDTH, WIDTH, seed=8)).Q

    def sparse(point: Point) -> cp.Expression:
        return point.parameters["weight"] * cp.norm1(basis.numpy() @ point.displacement)

    strength = cp.Parameter(nonneg=True)
    edit = edit_of(sparse, parameters={"weight": strength})
    x = normal(10, WIDTH)
    weights = torch.linspace(0.0, 3.0, 10, dtype=torch.float64)
    solution = edit.solve(x, 0, parameters={"weight": weights})
    compare(
        edit,
        solution,
        x,
        0,
        lambda i, edited: (
            [],
            float(weights[i]) * cp.norm1(basis.numpy() @ (edited - x[i].numpy())),
        ),
    )
    heavy = edit.solve(x, 0, parameters={"weight": 50.0})
    moved = ((heavy.x_new - x) @ basis.T).abs()
    edited = heavy.status == Status.SOLVED
    assert edited.any()
    # A few coordinates of the basis carry the whole edit, K − 1 at most.
    assert ((moved > 1e-4).sum(-1)[edited] <= 2).all()


def test_a_penalty_moves_what_the_odds_leave_alone() -> None:
    """Terms hold for every activation, whether its odds are right already or not."""
    x = normal(8, WIDTH)
    target = probe_of()(x).argmax(-1)
    edit = edit_of(cap, parameters={"cap": ()}, reads="length", log_odds=-50.0)
    radius = edit.metric.distance(x - edit.metric.mean)
    solution = edit.solve(x, target, parameters={"cap": radius * 0.5})
    assert (solution.status == Status.SOLVED).all()
    after = edit.metric.distance(solution.x_new - edit.metric.mean)
    torch.testing.assert_close(after, radius * 0.5, rtol=1e-6, atol=1e-6)
    idle = edit.solve(x, target, parameters={"cap": radius * 2})
    assert (idle.status == Status.SATISFIED).all() and torch.equal(idle.x_new, x)


def test_infeasible_examples_leave_their_company_alone() -> None:
    edit = edit_of(cap, parameters={"cap": ()}, reads="length", on_infeasible="skip")
    x = normal(6, WIDTH)
    caps = torch.tensor([9.0, 1e-3, 9.0, 1e-3, 9.0, 9.0], dtype=torch.float64)
    x.requires_grad_(), caps.requires_grad_()
    solution = edit.solve(x, 1, parameters={"cap": caps})
    lost = solution.status == Status.INFEASIBLE
    assert lost.tolist() == [False, True, False, True, False, False]
    assert torch.equal(solution.x_new[lost], x[lost])
    outgoing = normal(6, WIDTH, seed=5)
    together = torch.autograd.grad((solution.x_new * outgoing).sum(), x)[0]
    assert torch.isfinite(together).all()
    assert torch.equal(together[lost], outgoing[lost])
    alone = edit.solve(x[~lost], 1, parameters={"cap": caps[~lost]})
    torch.testing.assert_close(solution.x_new[~lost], alone.x_new, rtol=1e-9, atol=1e-9)
    single = torch.autograd.grad((alone.x_new * outgoing[~lost]).sum(), x)[0]
    torch.testing.assert_close(together[~lost], single[~lost], rtol=1e-5, atol=1e-6)
    strict = edit_of(cap, parameters={"cap": ()}, reads="length")
    with pytest.raises(InfeasibleError, match=r"2 examples, first \[1, 3\]"):
        strict.solve(x.detach(), 1, parameters={"cap": caps.detach()})


def test_a_cap_that_leaves_rounding_no_room_is_not_called_infeasible() -> None:
    """Half precision aims above the floor; what is infeasible is the floor, not the aim."""
    edit = edit_of(cap, parameters={"cap": ()}, reads="length", on_infeasible="skip")
    x = (3 * normal(4, WIDTH)).bfloat16()
    low, barely = torch.zeros(4, dtype=torch.float64), torch.full((4,), 20.0, dtype=torch.float64)
    for _ in range(14):
        middle = (low + barely) / 2
        lost = edit.solve(x.double(), 1, parameters={"cap": middle}).status == Status.INFEASIBLE
        low, barely = torch.where(lost, middle, low), torch.where(lost, barely, middle)
    coarse = edit.solve(x, 1, parameters={"cap": barely}).status
    assert Status.INACCURATE in coarse.tolist() and Status.INFEASIBLE not in coarse.tolist()
    assert (edit.solve(x, 1, parameters={"cap": barely / 4}).status == Status.INFEASIBLE).all()


@pytest.mark.parametrize("reads", ["activation", "length"])
def test_gradients_against_finite_differences(reads: str) -> None:
    edit = edit_of(cap, parameters={"cap": ()}, reads=reads)
    x = 1.5 * normal(3, WIDTH)
    caps = torch.full((3,), 2.2, dtype=torch.float64)
    free = edit.edit.solve(x, 1)
    radius = edit.metric.distance(free.x_new - edit.metric.mean)
    assert (radius > 2.3).any()

    def edited(x: Tensor, caps: Tensor) -> Tensor:
        return edit(x, 1, parameters={"cap": caps})

    inputs = (x.requires_grad_(), caps.requires_grad_())
    assert gradcheck(edited, inputs, eps=1e-2, atol=5e-3, rtol=1e-2, nondet_tol=1e-4)


def test_another_solver_may_be_chosen() -> None:
    """MOREAU takes the square as it is, and so knows the edit to more digits than DIFFCP."""
    pytest.importorskip("moreau")
    edit = edit_of(cap, parameters={"cap": ()}, reads="length", solver="MOREAU")
    x = 1.5 * normal(3, WIDTH)
    caps = torch.full((3,), 2.2, dtype=torch.float64)
    reference = edit_of(cap, parameters={"cap": ()}, reads="length")
    torch.testing.assert_close(
        edit(x, 1, parameters={"cap": caps}),
        reference(x, 1, parameters={"cap": caps}),
        rtol=1e-5,
        atol=2e-5,
    )

    def edited(x: Tensor, caps: Tensor) -> Tensor:
        return edit(x, 1, parameters={"cap": caps})

    inputs = (x.requires_grad_(), caps.requires_grad_())
    assert gradcheck(edited, inputs, eps=1e-4, atol=1e-4, rtol=1e-3, nondet_tol=1e-7)


def test_gradients_of_the_probe_and_of_a_penalty() -> None:
    def ridge(point: Point) -> cp.Expression:
        return cp.sum_squares(point.x - point.parameters["goal"]) / 20

    edit = edit_of(ridge, parameters={"goal": (WIDTH,)})
    x, goal = normal(2, WIDTH), normal(WIDTH, seed=6)
    weight = edit.probe.weight.detach().clone()

    def edited(weight: Tensor, goal: Tensor) -> Tensor:
        item = copy.copy(edit)
        item._modules = dict(edit._modules)
        item.edit = LRQP(edit.probe, edit.metric, log_odds=2.0, rule="fixed")
        probe = LinearProbe(WIDTH, 3, dtype=torch.float64)
        del probe.weight
        probe.weight = weight
        with torch.no_grad():
            probe.bias.copy_(edit.probe.bias)
        probe.bias.requires_grad_(False)
        item.edit.probe = probe
        return item(x, 1, parameters={"goal": goal})

    inputs = (weight.requires_grad_(), goal.requires_grad_())
    assert gradcheck(edited, inputs, eps=1e-2, atol=5e-3, rtol=1e-2, nondet_tol=1e-4)
    reduced = edit_of(cap, parameters={"cap": ()}, reads="length")
    reduced.probe.weight.requires_grad_()
    with pytest.raises(ConstraintError, match="constants of the posed problem"):
        reduced(x, 1, parameters={"cap": 9.0})


def not_dpp(point: Point) -> list[cp.Constraint]:
    return [point.parameters["a"] * (point.parameters["b"] * point.distance) <= 1]


def floor_on_a_norm(point: Point) -> list[cp.Constraint]:
    return [point.distance >= 1]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (not_dpp, "not DPP"),
        (floor_on_a_norm, "not convex"),
        (lambda point: [point.parameters["a"] * point.distance <= 1, 3.0], "term 1 is float"),
        (lambda point: [point.displacement], "of shape"),
        (lambda point: None, "must return"),
        (lambda point: [], "no terms"),
        (lambda point: [point.features <= 1], "no features"),
        (lambda point: [point.distance <= 1], "no term uses them"),
    ],
)
def test_terms_that_cannot_be_posed_are_explained(
    function: Callable[[Point], Any], message: str
) -> None:
    declared = {"a": cp.Parameter(nonneg=True), "b": cp.Parameter(nonneg=True)}
    with pytest.raises(ConstraintError, match=message):
        edit_of(function, parameters=declared)


def test_what_is_not_dpp_is_told_how_to_become_it() -> None:
    declared = {"a": cp.Parameter(nonneg=True), "b": cp.Parameter(nonneg=True)}
    with pytest.raises(ConstraintError, match="declare it as a parameter of its own"):
        edit_of(not_dpp, parameters=declared)


def test_bad_input_is_named(tmp_path: Path) -> None:
    edit = edit_of(cap, parameters={"cap": ()}, reads="length")
    x = normal(4, WIDTH)
    with pytest.raises(ConstraintError, match="have no value"):
        edit(x, 1)
    with pytest.raises(ConstraintError, match="were not declared"):
        edit(x, 1, parameters={"cap": 1.0, "other": 2.0})
    with pytest.raises(ConstraintError, match="got \\(3,\\)"):
        edit(x, 1, parameters={"cap": torch.ones(3)})
    with pytest.raises(TargetError):
        edit(x, 3, parameters={"cap": 9.0})
    with pytest.raises(ConstraintError, match="reads x'"):
        edit_of(lambda point: [point.x <= 1], reads="length")
    with pytest.raises(WidthError, match="reads must be rows"):
        edit_of(cap, parameters={"cap": ()}, reads=torch.ones(2, 5))
    with pytest.raises(LRQPError, match="reads must be"):
        edit_of(cap, parameters={"cap": ()}, reads="lengths")
    with pytest.raises(ConstraintError, match="needs the mean"):
        ConstrainedLRQP(probe_of(), Mahalanobis.euclidean(WIDTH), cap, parameters={"cap": ()})
    with pytest.raises((SolverError, ConstraintError, LRQPError)):
        edit_of(cap, parameters={"cap": ()}, solver="NO_SUCH_SOLVER")
    with pytest.raises(SavedEditError, match="function is code"):
        edit.save(tmp_path)


def test_copies_and_changed_probes_are_posed_anew() -> None:
    edit = edit_of(cap, parameters={"cap": ()}, reads="length")
    x = normal(4, WIDTH)
    before = edit(x, 1, parameters={"cap": 9.0})
    torch.testing.assert_close(copy.deepcopy(edit)(x, 1, parameters={"cap": 9.0}), before)
    edit.probe.weight.mul_(-1)
    after = edit(x, 1, parameters={"cap": 9.0})
    assert (edit.probe.log_odds(after, 1) >= 2 - 1e-9).all()
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_inside_a_model(dtype: torch.dtype) -> None:
    model, site = build("gpt2", dtype=dtype), "L1.mid"
    generator = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(VOCABULARY, (12, 7), generator=generator)}
    at = torch.full((12,), 4)
    x = lrqp.capture(model, inputs, [site], at)[site].double()
    free = random_edit(x, 3, log_odds=4.0, rule="fixed")
    edit = ConstrainedLRQP(
        free.probe,
        free.metric,
        cap,
        parameters={"cap": ()},
        reads="length",
        log_odds=4.0,
        rule="fixed",
        on_infeasible="skip",
    )
    reached = free.metric.distance(free(x, 1) - free.metric.mean)
    caps = reached * torch.linspace(0.9, 1.1, 12, dtype=torch.float64)
    with edit.at(model, site, positions=at, target=1, parameters={"cap": caps}) as run:
        model(**inputs)
        held = lrqp.capture(model, inputs, [site], at)[site].double()
    fine = run.status <= Status.SOLVED
    assert (run.status == Status.SOLVED).sum() >= 4
    assert (edit.probe.log_odds(held, 1)[fine] >= 4).all()
    radius = edit.metric.distance(held - edit.metric.mean)
    slack = 1e-5 if dtype == torch.float32 else 0.05
    assert (radius[fine] <= caps[fine] * (1 + slack)).all()


LOW = torch.tensor([[0.0, 0.1], [0.2, -0.1], [0.5, 0.5], [1.0, 0.0]])


def above_low(model: Any) -> tuple[ConstrainedLRQP, dict[str, Any]]:
    """An edit whose first two coordinates are bounded from below, and inputs."""
    inputs = Prompts.random([9, 6, 12, 7]).padded("right")
    read = lrqp.capture(model, inputs, "L1.mid", inputs["attention_mask"].bool())["L1.mid"]
    free, rows = random_edit(read.double(), 3, log_odds=5.0), torch.eye(read.shape[1])[:2]
    edit = ConstrainedLRQP(
        free.probe,
        free.metric,
        lambda point: [point.features >= point.parameters["low"]],
        parameters={"low": (2,)},
        reads=rows,
        log_odds=5.0,
    )
    return edit, inputs


@pytest.mark.parametrize(
    ("positions", "low"),
    [
        (torch.tensor([3, 2, 4, 5]), LOW),
        (torch.tensor([[3, 2], [2, 5], [4, 0], [5, 1]]), LOW),
        (torch.tensor([[3, 2], [2, 5], [4, 0], [5, 1]]), torch.stack([LOW, LOW.flip(0)], 1)),
        (torch.arange(12) == torch.tensor([[3], [2], [4], [5]]), LOW[:, None].repeat(1, 12, 1)),
        ("last", LOW),
    ],
)
@torch.no_grad()
def test_values_of_each_example_position_or_request(positions: Any, low: Tensor) -> None:
    """Read back from what the next reader is given."""
    model: Any = build("gpt2", n_layer=2)
    (edit, inputs), seen, given = above_low(model), list[Tensor](), low.double()
    model.transformer.h[1].ln_2.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with edit.at(model, "L1.mid", positions=positions, target=1, parameters={"low": given}) as run:
        for _ in range(3):
            model(**inputs)
            given += 7  # a copy is kept
    example, token = run.example.flatten(), run.token.flatten()
    held, wanted = seen[-1][example, token], low[example]
    if low.ndim == 3:
        wanted = low.flatten(0, 1) if low.shape[1] == 2 else low[example, token]
    assert (held[:, :2] >= wanted - 1e-5).all() and (held[:, :2] - wanted).amin() < 1e-5
    others = edit.probe(held.double())
    margin = others[:, 1] - others[:, [0, 2]].amax(1)
    assert torch.allclose(margin, run.log_odds_after.flatten()) and (margin >= 5).all()


@torch.no_grad()
def test_each_request_of_a_generation_has_values_of_its_own() -> None:
    model: Any = build("gpt2", n_layer=2)
    (edit, inputs), seen = above_low(model), list[Tensor]()
    model.transformer.h[1].ln_2.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    prompt = {"input_ids": inputs["input_ids"][:, :6], "pad_token_id": 0}
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    where, given = lrqp.Scope("generated", repeats=2), {"low": LOW}
    with edit.at(model, "L1.mid", positions=where, target=1, parameters=given) as run:
        model.generate(**prompt, **options)
    assert len(run.token) == 16
    for stream in seen[1:]:
        assert (stream[:, -1, :2] >= LOW.repeat_interleave(2, 0) - 1e-5).all()
    with (
        pytest.raises(PositionError, match="for 3 examples with repeats=2"),
        edit.at(model, "L1.mid", positions=where, target=1, parameters={"low": LOW[:3]}),
    ):
        model.generate(**prompt, **options)
    for wrong, said in (
        ({}, r"\['low'\] have no value"),
        ({"low": LOW[:3]}, r"must be \(2,\) or \(4, 2\), got \(3, 2\)"),
        ({"lo": LOW}, "were not declared, .* have no value"),
    ):
        with pytest.raises(ConstraintError, match=said):
            edit.at(model, "L1.mid", positions=[3, 2, 4, 5], target=1, parameters=wrong)


def test_gradients_and_graphs_and_replay_within_a_model() -> None:
    model: Any = build("gpt2", n_layer=2)
    edit, inputs = above_low(model)
    at, low = torch.tensor([3, 2, 4, 5]), LOW.double().requires_grad_()

    def loss(low: Tensor, model: Any = model) -> Tensor:
        with edit.at(model, "L1.mid", positions=at, target=1, parameters={"low": low}):
            return model(**inputs).logits.double().square().mean()

    (slope,) = torch.autograd.grad(loss(low), low)
    step = 1e-2 * slope.sign()  # a smaller one drowns in what the solver leaves
    with torch.no_grad():
        rise = (loss(low + step) - loss(low - step)) / 2
        assert abs(float((slope * step).sum() - rise)) < 1e-3 * abs(float(rise))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(loss(low, compiled), loss(low))
        again = Replay(model, inputs, 2)
        with edit.at(model, "L1.mid", positions=at, target=1, parameters={"low": low}):
            whole = model(**inputs).logits
            assert torch.allclose(again.run(1), whole[:, -1], atol=1e-4)


@pytest.mark.parametrize(
    "wrong", [normal(WIDTH), normal(2, WIDTH - 1), torch.ones(2, WIDTH, dtype=torch.long), [1.0]]
)
def test_activations_of_another_shape_or_kind(wrong: Any) -> None:
    edit = edit_of(lambda point: [point.distance <= 50], reads="length")
    for solve in (edit, edit.edit):
        with pytest.raises(WidthError, match="activations must be"):
            solve(wrong, 1)


def test_an_empty_batch_needs_no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    edit = edit_of(lambda point: [point.distance <= 50], reads="length")
    monkeypatch.setattr(edit._pose()[1], "layer", None)
    solution = edit.solve(normal(0, WIDTH), 1)
    assert solution.x_new.shape == (0, WIDTH)
    assert solution.status.shape == solution.distance.shape == (0,)


def test_a_batch_that_the_solver_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example is then judged alone; what can be solved is, without its company."""
    edit = edit_of(cap, parameters={"cap": ()}, reads="length", on_infeasible="skip")
    problem = edit._pose()[1]
    x, caps = normal(3, WIDTH), torch.tensor([9.0, 0.01, 9.0], dtype=torch.float64)
    expected, solve = edit.solve(x, 1, parameters={"cap": caps}), problem.solve

    def refusing(values: list[Tensor], rows: Tensor) -> Tensor:
        if 1 in rows.tolist():
            raise SolverError("refused")
        return solve(values, rows)

    monkeypatch.setattr(problem, "solve", refusing)
    solution = edit.solve(x, 1, parameters={"cap": caps})
    assert solution.status.tolist() == expected.status.tolist() == [1, 2, 0]
    torch.testing.assert_close(solution.x_new, expected.x_new)


def test_an_option_that_the_solver_does_not_have() -> None:
    edit = edit_of(lambda point: [point.distance <= 50], solver_args={"bogus": 1})
    with pytest.raises(SolverError, match="bogus"):
        edit(normal(2, WIDTH), 1)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (3, "must be a function"),
        (lambda: [], "one argument"),
        (lambda point: [point.distance <= point.parameters["zz"]], "'zz'.*declare"),
        (lambda point: [point.distance <= cp.Variable(name="mine")], "mine"),
        (lambda point: [cp.Variable(name="mine")], "mine"),
        (lambda point: [point.distance <= cp.Parameter(name="mine", value=1.0)], "mine"),
        (lambda point: [point.x <= torch.nan], "NaN"),
        (lambda point: [cp.norm_inf(point) <= 1], r"that is point\.x"),
    ],
)
def test_functions_that_cannot_be_posed(function: Any, said: str) -> None:
    with pytest.raises(ConstraintError, match=said):
        edit_of(function)


@pytest.mark.parametrize("value", [torch.nan, -1.0, "much", None, torch.tensor([2.0, -1.0])])
def test_values_that_a_parameter_cannot_have(value: Any) -> None:
    edit = edit_of(cap, parameters={"cap": cp.Parameter(nonneg=True)}, reads="length")
    with pytest.raises(ConstraintError, match="parameter 'cap'"):
        edit(normal(2, WIDTH), 1, parameters={"cap": value})


def test_an_objective_without_a_lower_bound() -> None:
    edit = edit_of(lambda point: [1e12 * point.x[0]])
    with pytest.raises(ConstraintError, match="objective of example 0 has no lower bound"):
        edit(normal(2, WIDTH), 1)


def test_made_in_inference_mode_or_in_transforms() -> None:
    x, probe = normal(4, WIDTH, seed=3), probe_of()
    with torch.inference_mode():
        edit = ConstrainedLRQP(
            probe, metric_of(), lambda point: [point.distance <= 1e3], reads="length", log_odds=3.0
        )
    leaf = x.clone().requires_grad_()
    edit(leaf, 1).square().sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
    with pytest.raises(SolverError, match=r"torch\.func .* use torch\.autograd"):
        torch.func.grad(lambda z: edit(z, 1).square().sum())(x)


@pytest.mark.parametrize("reads", ["length", "activation"])
def test_classes_that_are_all_equal_are_out_of_reach_or_there_already(reads: Any) -> None:
    """Nothing of x' is read then, and a program without a variable cannot be posed."""
    weight, bias = torch.ones(2, WIDTH, dtype=torch.float64), torch.tensor([0.0, 3.0]).double()
    probe, metric = LinearProbe.from_weights(weight, bias), Mahalanobis(metric_of().covariance)
    near = lambda point: [point.distance <= 1]  # noqa: E731
    edit = ConstrainedLRQP(probe, metric, near, reads=reads, log_odds=2.0, on_infeasible="skip")
    x = normal(2, WIDTH, seed=3)
    solution = edit.solve(x, torch.tensor([0, 1]))
    assert solution.status.tolist() == [Status.INFEASIBLE, Status.SATISFIED]
    assert torch.equal(solution.x_new, x)
