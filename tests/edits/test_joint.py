"""Several variables in one problem: least, all odds hold at the end, kept ones stay."""

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import quadprog
import torch
from edits_for_tests import normal
from edits_for_tests import probe_of as random_probe
from models_for_tests import VOCABULARY, build, random_edit
from torch import Tensor

import lrqp_torch as lrqp
from lrqp_torch import LRQP, LinearProbe, Mahalanobis, Status
from lrqp_torch.edits.base import Edit
from lrqp_torch.edits.joint import JointLRQP
from lrqp_torch.errors import (
    InfeasibleError,
    LRQPError,
    NonFiniteError,
    OutputError,
    SavedEditError,
    TargetError,
    WidthError,
)
from lrqp_torch.qp import native
from lrqp_torch.qp.stacked import FREE, KEEP, StackedGeometry
from lrqp_torch.stream.intervene import Placement

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")

WIDTH = 16


def metric_of(width: int = WIDTH, condition: float = 1e3) -> Mahalanobis:
    basis = torch.linalg.qr(normal(width, width, seed=0)).Q
    scales = torch.logspace(0, -math.log10(condition), width, dtype=torch.float64)
    covariance = (basis * scales) @ basis.T
    return Mahalanobis((covariance + covariance.T) / 2)


def probe_of(n_classes: int, seed: int, width: int = WIDTH) -> LinearProbe:
    return random_probe(n_classes, seed, width)


def joint_of(**options: object) -> JointLRQP:
    """Variables a (3 classes, mirror), b (2 classes, fixed) and c (4 classes, kept)."""
    metric = metric_of()
    edits = {
        "a": LRQP(probe_of(3, 1), metric, log_odds=2.0),
        "b": LRQP(probe_of(2, 2), metric, log_odds=3.0, rule="fixed"),
        "c": probe_of(4, 5),
    }
    return JointLRQP(edits, **options)


def targets(batch: int) -> dict[str, Tensor]:
    return {"a": torch.arange(batch) % 3, "b": (torch.arange(batch) // 3) % 2}


def full_dimension(
    joint: JointLRQP, x: Tensor, choice: list[int], floor: list[float], within: dict[int, float]
) -> float:
    """The distance of the least edit of one activation, by quadprog on all coordinates."""
    equations, rows, right = [], [], []
    for place, edit in enumerate(joint.edits):
        weight, logits = edit.probe.weight, edit.probe(x)
        n_classes, target = len(weight), choice[place]
        pairs = [(j, k) for j in range(n_classes) for k in range(n_classes) if j != k]
        if target == KEEP and place in within:
            rows += [weight[j] - weight[k] for j, k in pairs]
            right += [-within[place] for _ in pairs]
        elif target == KEEP:
            equations += [weight[k] - weight[0] for k in range(1, n_classes)]
        elif target >= 0:
            for k in range(n_classes):
                if k != target:
                    rows.append(weight[target] - weight[k])
                    right.append(floor[place] - float(logits[target] - logits[k]))
    factor = torch.linalg.cholesky(joint.metric.covariance)
    slopes = torch.stack([*equations, *rows]) @ factor
    values = np.array([0.0] * len(equations) + right)
    size = len(factor)
    u = quadprog.solve_qp(
        np.eye(size), np.zeros(size), slopes.T.numpy(), values, meq=len(equations)
    )[0]
    return float(np.linalg.norm(u))


def test_all_odds_hold_and_no_edit_is_shorter() -> None:
    joint, x = joint_of(), normal(60, WIDTH)
    wanted = targets(60)
    solution = joint.solve(x, wanted)
    assert (solution.status <= Status.SOLVED).all()
    assert int((solution.status == Status.SOLVED).sum()) > 40
    for place, name in enumerate(("a", "b")):
        probe = joint.edits[place].probe
        odds = probe.log_odds(solution.x_new, wanted[name])
        torch.testing.assert_close(solution.log_odds_after[:, place], odds, rtol=0, atol=1e-9)
        assert (odds >= solution.floor[:, place] - 1e-9).all()
    assert (solution.kkt_residual <= 1e-9).all()
    for i in range(12):
        choice = [int(wanted["a"][i]), int(wanted["b"][i]), KEEP]
        floor = [float(value) for value in solution.floor[i]]
        best = full_dimension(joint, x[i], choice, floor, {})
        assert float(solution.distance[i]) == pytest.approx(best, rel=1e-7, abs=1e-7)
    delta = solution.x_new - x
    torch.testing.assert_close(
        joint.metric.distance(delta), solution.distance, rtol=1e-6, atol=1e-6
    )


def test_each_variable_has_its_own_rule() -> None:
    joint, x = joint_of(), normal(60, WIDTH)
    wanted = targets(60)
    solution = joint.solve(x, wanted)
    logits = joint.edits[0].probe(x)
    own = logits.gather(-1, wanted["a"][:, None]).squeeze(-1)
    mirrored = (logits.amax(-1) - own).clamp_min(2.0)
    torch.testing.assert_close(solution.floor[:, 0], mirrored)
    assert (solution.floor[:, 1] == 3).all() and solution.floor[:, 2].isnan().all()
    source = torch.zeros(60, dtype=torch.long)
    given = joint.solve(x, wanted, {"a": source}).floor[:, 0]
    torch.testing.assert_close(given, (logits[:, 0] - own).clamp_min(2.0))


def test_kept_variables_stay_and_free_ones_move() -> None:
    joint, x = joint_of(), normal(50, WIDTH)
    c = joint.edits[2].probe
    kept = joint.solve(x, {"a": 1, "b": KEEP})
    for place in (1, 2):
        probe = joint.edits[place].probe
        change = probe(kept.x_new).log_softmax(-1) - probe(x).log_softmax(-1)
        assert float(change.abs().max()) < 1e-11
        assert float(kept.moved[:, place].max()) < 1e-11
    free = joint.solve(x, {"a": 1, "b": FREE, "c": FREE})
    assert float((c(free.x_new) - c(x)).abs().max()) > 0.1
    assert (free.distance <= kept.distance + 1e-9).all()
    # A single variable with the rest free is LRQP; with the rest kept, LRQP in the kept metric.
    alone = joint.edits[0].solve(x, 1)
    torch.testing.assert_close(free.x_new, alone.x_new, rtol=1e-9, atol=1e-9)
    metric = joint.metric.keeping(joint.edits[1].probe, c)
    conditional = LRQP(joint.edits[0].probe, metric, log_odds=2.0).solve(x, 1)
    torch.testing.assert_close(kept.x_new, conditional.x_new, rtol=1e-7, atol=1e-7)


def test_every_example_may_ask_for_something_else() -> None:
    joint, x = joint_of(), normal(7, WIDTH)
    choice = torch.tensor(
        [
            [0, 1, KEEP],
            [KEEP, 1, FREE],
            [FREE, FREE, 2],
            [1, KEEP, 3],
            [KEEP, KEEP, KEEP],
            [FREE, KEEP, FREE],
            [2, 0, 1],
        ]
    )
    together = joint.solve(x, choice)
    for i in range(7):
        alone = joint.solve(x[i : i + 1], choice[i : i + 1])
        torch.testing.assert_close(together.x_new[i], alone.x_new[0], rtol=1e-9, atol=1e-9)
        floor = [float(value) for value in together.floor[i]]
        if (choice[i] >= 0).any():
            best = full_dimension(joint, x[i], choice[i].tolist(), floor, {})
            assert float(together.distance[i]) == pytest.approx(best, rel=1e-7, abs=1e-7)
    assert together.status[4] == together.status[5] == Status.SATISFIED
    assert torch.equal(together.x_new[4:6], x[4:6])
    assert torch.equal(together.log_odds_after.isnan(), choice < 0)


def test_never_longer_than_one_after_another_which_may_break_the_first() -> None:
    metric, x = metric_of(), normal(200, WIDTH)
    first = LRQP(probe_of(3, 1), metric, log_odds=4.0, rule="fixed")
    # A second probe that reads partly against the first.
    mixed = probe_of(3, 2)
    mixed.weight.copy_(-first.probe.weight.roll(1, 0) + 0.5 * mixed.weight)
    second = LRQP(mixed, metric, log_odds=4.0, rule="fixed")
    joint = JointLRQP([first, second], on_infeasible="skip")
    solution = joint.solve(x, torch.zeros(200, 2, dtype=torch.long))
    solved = solution.status <= Status.SOLVED
    assert float(solved.double().mean()) > 0.9
    sequential = second(first(x, 0), 0)
    held = first.probe.log_odds(sequential, 0) >= 4 - 1e-9
    assert float(held.double().mean()) < 0.9
    assert (solution.log_odds_after[solved] >= 4 - 1e-9).all()
    length = metric.distance(sequential - x)
    both = held & solved
    assert both.any()
    assert (solution.distance[both] <= length[both] + 1e-7).all()


def test_within_a_tolerance() -> None:
    joint, x = joint_of(within={"c": 0.5}), normal(50, WIDTH)
    exact = joint_of().solve(x, targets(50))
    solution = joint.solve(x, targets(50))
    free = joint_of().solve(x, targets(50) | {"c": FREE})
    c = joint.edits[2].probe
    change = c(solution.x_new) - c(x)
    spread = change.amax(-1) - change.amin(-1)
    assert float(spread.max()) <= 0.5 + 1e-9
    assert int((spread > 0.5 - 1e-6).sum()) > 25
    torch.testing.assert_close(solution.moved[:, 2], spread)
    assert (solution.distance <= exact.distance + 1e-9).all()
    assert (solution.distance >= free.distance - 1e-9).all()
    for i in range(8):
        choice = [int(targets(50)["a"][i]), int(targets(50)["b"][i]), KEEP]
        floor = [float(value) for value in solution.floor[i]]
        best = full_dimension(joint, x[i], choice, floor, {2: 0.5})
        assert float(solution.distance[i]) == pytest.approx(best, rel=1e-7, abs=1e-7)
    # A variable with a tolerance can be written like any other.
    written = joint.solve(x, {"a": FREE, "b": FREE, "c": 2})
    torch.testing.assert_close(written.x_new, LRQP(c, joint.metric)(x, 2), rtol=1e-9, atol=1e-9)


def test_contradictions_are_recognised() -> None:
    metric, probe, x = metric_of(), probe_of(2, 1), normal(6, WIDTH)
    edit = LRQP(probe, metric, rule="fixed")
    twin = LRQP(probe_of(2, 1), metric, rule="fixed")
    joint = JointLRQP({"one": edit, "two": twin})
    joint.solve(x, {"one": 1, "two": 1})
    with pytest.raises(InfeasibleError, match="one 1, two 0"):
        joint.solve(x, {"one": 1, "two": 0})
    below = probe(x).argmax(-1) == 0
    with pytest.raises(InfeasibleError, match="two kept"):
        joint.solve(x[below], {"one": 1, "two": KEEP})
    skipping = JointLRQP({"one": edit, "two": twin}, on_infeasible="skip")
    target = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 1], [1, KEEP], [FREE, 0]])
    solution = skipping.solve(x, target)
    lost = solution.status == Status.INFEASIBLE
    assert lost[[1, 3]].all() and not lost[[0, 2, 5]].any()
    assert torch.equal(solution.x_new[lost], x[lost])
    torch.testing.assert_close(
        solution.log_odds_after[lost], solution.log_odds_before[lost], equal_nan=True
    )
    # Within a tolerance larger than what is asked, the twin may move.
    loose = JointLRQP({"one": edit, "two": twin}, within={"two": 60.0})
    assert (loose.solve(x, {"one": 1, "two": KEEP}).status <= Status.SOLVED).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_odds_hold_for_the_stored_numbers(dtype: torch.dtype) -> None:
    joint = joint_of()
    x = normal(80, WIDTH).to(dtype)
    solution = joint.solve(x, targets(80))
    assert solution.x_new.dtype == dtype and (solution.status <= Status.SOLVED).all()
    for place, name in enumerate(("a", "b")):
        odds = joint.edits[place].probe.log_odds(solution.x_new.double(), targets(80)[name])
        assert (odds >= solution.floor[:, place]).all()
    weight = joint.edits[2].probe.weight
    longest = torch.cdist(weight, weight).max()
    bound = torch.finfo(dtype).eps * longest * solution.x_new.double().norm(dim=-1)
    assert (solution.moved[:, 2] <= bound).all()


def test_gradients_against_finite_differences() -> None:
    metric = metric_of(5, 5.0)
    a, b, c = probe_of(3, 1, 5), probe_of(2, 2, 5), probe_of(2, 5, 5)
    x = normal(4, 5)
    choice = torch.tensor([[0, 1, KEEP], [1, KEEP, FREE], [2, 0, KEEP], [FREE, 1, 0]])
    for within in ({}, {"2": 0.3}):
        joint = JointLRQP(
            [LRQP(probe, metric, rule="fixed", log_odds=2.0) for probe in (a, b, c)],
            within=within,
            on_infeasible="skip",
        )

        def edit(
            x: Tensor, weight: Tensor, root: Tensor, joint: JointLRQP = joint
        ) -> tuple[Tensor, Tensor]:
            geometry = StackedGeometry.build(
                [weight, b.weight, c.weight],
                [a.bias, b.bias, c.bias],
                (root + root.T) / 2,
                [name in joint.within for name in joint.names],
            )
            solution = joint.qp.solve(
                x,
                choice,
                joint.rule(geometry, choice),
                geometry,
            )
            return solution.x_new, solution.distance

        inputs = (x, a.weight.detach().clone(), metric.covariance.clone())
        inputs = tuple(tensor.clone().requires_grad_() for tensor in inputs)
        assert torch.autograd.gradcheck(edit, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_saved_edits_do_the_same(tmp_path: Path) -> None:
    joint, x = joint_of(within={"c": 0.5}), normal(10, WIDTH)
    joint.save(tmp_path / "edit", site="L1.mid")
    loaded = JointLRQP.load(tmp_path / "edit")
    assert loaded.names == ("a", "b", "c") and loaded.notes == {"site": "L1.mid"}
    assert torch.equal(loaded(x, targets(10)), joint(x, targets(10)))
    file = tmp_path / "edit" / "joint.json"
    content = json.loads(file.read_text())
    for change in ({"version": 9}, {"names": []}, {"within": {"z": 1.0}}, {"format": "x"}):
        file.write_text(json.dumps(content | change))
        with pytest.raises(SavedEditError):
            JointLRQP.load(tmp_path / "edit")
    with pytest.raises(SavedEditError, match="missing"):
        JointLRQP.load(tmp_path)
    with pytest.raises(OutputError, match="JSON"):
        joint.save(tmp_path / "other", note=object())


def test_bad_input_is_named() -> None:
    joint, x = joint_of(), normal(4, WIDTH)
    with pytest.raises(TargetError, match="no target for 'b'"):
        joint.solve(x, {"a": 1})
    with pytest.raises(TargetError, match="variables are"):
        joint.solve(x, {"a": 1, "b": 1, "z": 0})
    with pytest.raises(TargetError, match="classes 0 to 1"):
        joint.solve(x, {"a": 1, "b": 2})
    with pytest.raises(TargetError, match="last axis"):
        joint.solve(x, torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(TargetError, match="integers"):
        joint.solve(x, {"a": 0.5, "b": 1})
    with pytest.raises(TargetError, match="one number or"):
        joint.solve(x, {"a": torch.zeros(3, dtype=torch.long), "b": 1})
    with pytest.raises(WidthError):
        joint.solve(x[:, 1:], {"a": 1, "b": 1})
    with pytest.raises(LRQPError, match="positive"):
        joint_of(within={"c": 0.0})
    with pytest.raises(LRQPError, match="different metrics"):
        other = metric_of(condition=2.0)
        JointLRQP([LRQP(probe_of(2, 1), metric_of()), LRQP(probe_of(2, 2), other)])
    with pytest.raises(LRQPError, match="at least one"):
        JointLRQP([])


def test_probes_may_change_between_solves() -> None:
    joint, x = joint_of(), normal(10, WIDTH)
    before = joint(x, targets(10))
    with torch.no_grad():
        joint.edits[0].probe.weight.mul_(2)
    assert not torch.allclose(before, joint(x, targets(10)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", ["L1.pre", "L1.mid"])
@torch.no_grad()
def test_inside_a_model(dtype: torch.dtype, site: str) -> None:
    model = build("gpt2", dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(VOCABULARY, (32, 7), generator=generator)}
    at = torch.tensor([[2, 4]]).expand(32, 2)
    x = lrqp.capture(model, inputs, [site], at)[site]
    flat = x.reshape(-1, x.shape[-1])
    a, b, c = (random_edit(flat, k, seed=k, log_odds=5.0) for k in (2, 3, 4))
    joint = JointLRQP({"a": a, "b": b, "c": c.probe}, a.metric)
    wanted = {"a": torch.arange(32) % 2, "b": torch.randint(3, (32, 2), generator=generator)}
    with joint.at(model, site, positions=at, target=wanted) as run:
        assert "0 of 64" in repr(run)
        model(**inputs)
        held = lrqp.capture(model, inputs, [site], at)[site].double()
    assert run.status.shape == (32, 2) and (run.status == Status.SOLVED).any()
    assert run.log_odds_after.shape == run.floor.shape == run.moved.shape == (32, 2, 3)
    for place, (edit, name) in enumerate(((a, "a"), (b, "b"))):
        target = wanted[name] if name == "b" else wanted[name][:, None].expand(32, 2)
        odds = edit.probe.log_odds(held, target)
        assert (odds >= run.floor[..., place]).all()
        torch.testing.assert_close(run.log_odds_after[..., place], odds, rtol=1e-9, atol=1e-9)
    change = c.probe(held) - c.probe(x.double())
    spread = change.amax(-1) - change.amin(-1)
    longest = torch.cdist(c.probe.weight, c.probe.weight).max()
    size = torch.maximum(held.norm(dim=-1), x.double().norm(dim=-1))
    assert (spread <= torch.finfo(dtype).eps * longest * size).all()
    # Several joint edits at once, through intervene.
    item = joint.on(site, positions=at[:, 0], target={"a": 1, "b": 0})
    with lrqp.intervene(model, [item]):
        model(**inputs)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("choice", [FREE, KEEP])
def test_activations_that_are_not_finite_raise_where_nothing_is_written(
    value: float, choice: int
) -> None:
    x = normal(2, WIDTH)
    x[1, 3] = value
    with pytest.raises(NonFiniteError, match="1 of 2"):
        joint_of()(x, {"a": choice, "b": choice, "c": choice})


@pytest.mark.parametrize(
    "damage",
    [
        {"names": ["a", "a", "c"]},
        {"names": ["a", "b"]},
        {"names": ["a", "b", "c", "d"]},
        {"kept_by_default": ["z"]},
        {"kept_by_default": [["c"]]},
        {"within": {"c": 10**400}},
        {"within": {"c": True}},
    ],
)
def test_a_damaged_joint_file_is_named(damage: dict[str, object], tmp_path: Path) -> None:
    file = joint_of().save(tmp_path / "joint") / "joint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(SavedEditError):
        JointLRQP.load(tmp_path / "joint")


def test_a_smaller_edit_replaces_a_larger_one(tmp_path: Path) -> None:
    joint = joint_of()
    joint.save(tmp_path)
    first = JointLRQP({"a": joint.edits[0]})
    first.save(tmp_path)
    assert not (tmp_path / "1").exists()
    assert JointLRQP.load(tmp_path).names == ("a",)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "mine.txt").write_text("kept")
    with pytest.raises(OutputError, match="one more edit"):
        first.save(tmp_path)
    assert (tmp_path / "1" / "mine.txt").exists()


def test_a_wrong_class_is_said_by_name_and_role() -> None:
    joint, x = joint_of(), normal(2, WIDTH)
    with pytest.raises(TargetError, match="the source of variable 'a' is 5 at example 0"):
        joint(x, {"a": 1, "b": 1}, {"a": 5})
    with pytest.raises(TargetError, match="the target of variable 'b' is 7 at example 1"):
        joint(x, {"a": 1, "b": torch.tensor([0, 7])})
    with pytest.raises(TargetError, match="names"):
        joint(x, {"a": 1, "b": 1, "z": 1, 3: 0})
    with pytest.raises(WidthError, match="must be a tensor"):
        joint([[0.0] * WIDTH], {"a": 1, "b": 1})


def test_what_is_kept_or_free_may_be_said_in_words_and_classes_by_name() -> None:
    joint, x = joint_of(), normal(3, WIDTH)
    by_words = {"a": [1, "keep", "free"], "b": "keep"}
    by_numbers = {"a": torch.tensor([1, joint.KEEP, joint.FREE]), "b": joint.KEEP}
    assert torch.equal(joint(x, by_words), joint(x, by_numbers))
    with pytest.raises(TargetError, match="target of 'b' names the class 'hold'"):
        joint(x, {"a": 1, "b": "hold"})
    with pytest.raises(TargetError, match="source of 'a' names the class 'keep'"):
        joint(x, {"a": 1, "b": 1}, {"a": "keep"})
    many = normal(40, WIDTH)
    named = JointLRQP.fit(many, {"a": ["no", "yes"] * 20, "b": torch.arange(40) // 20})
    assert torch.equal(named(many, {"a": "yes", "b": "free"}), named(many, {"a": 1, "b": -1}))


def test_misuse_of_the_constructor_is_named() -> None:
    metric = metric_of()
    edit = LRQP(probe_of(3, 1), metric)
    for edits in ({"a": 3}, {"a": torch.nn.ReLU()}, edit, {1: edit}, "ab"):
        with pytest.raises(LRQPError, match=r"variable|edits must be"):
            JointLRQP(edits, metric)
    with pytest.raises(LRQPError, match="Mahalanobis"):
        JointLRQP({"a": edit}, torch.eye(WIDTH))
    for within in ({"a": "x"}, {"a": 10**400}, ["a"]):
        with pytest.raises(LRQPError, match="within must map"):
            JointLRQP({"a": edit}, within=within)


def test_fitting_all_variables_at_once_is_fitting_each_and_one_metric() -> None:
    x = normal(120, WIDTH, seed=11).float()
    y = {"order": torch.arange(120) % 2, "name": torch.arange(120) % 5}
    joint = JointLRQP.fit(x, y, keep=["name"], l2=1e-2, log_odds=4.0)
    assert joint.names == ("order", "name") and joint.kept_by_default == ("name",)
    metric = Mahalanobis.fit(x)
    probes = {name: LinearProbe.fit(x, labels, l2=1e-2) for name, labels in y.items()}
    own = JointLRQP({"order": LRQP(probes["order"], metric, log_odds=4.0), "name": probes["name"]})
    asked = {"order": 1 - y["order"]}
    assert torch.allclose(joint(x, asked), own(x, asked), atol=1e-4)
    every = {"order": 1 - y["order"], "name": (y["name"] + 3) % 5}
    both = joint.solve(x.double(), every)
    assert bool((both.log_odds_after[:, 0] >= 4.0).all())
    assert bool((both.log_odds_after >= both.floor).all())
    with pytest.raises(LRQPError, match="'tense'"):
        JointLRQP.fit(x, y, keep=["tense"])
    with pytest.raises(LRQPError, match="by the name"):
        JointLRQP.fit(x, [0, 1])  # type: ignore[arg-type]


def test_what_a_probe_reads_elsewhere_can_be_asked_for() -> None:
    joint, x = joint_of(), normal(12, WIDTH, seed=5)
    other, wanted = normal(12, WIDTH, seed=6), targets(12)
    edit = joint.edits[0]
    assert isinstance(edit, LRQP)
    reads = edit.probe.log_odds(other, wanted["a"])
    alone = edit.solve(x, wanted["a"], asked=reads)
    assert torch.equal(alone.floor, reads.double())
    assert bool((alone.log_odds_after >= reads).all())
    least = edit.probe.log_odds(x, wanted["a"]) >= reads
    assert torch.equal(alone.status == Status.SATISFIED, least)
    together = joint.solve(x, wanted, asked={"a": reads})
    assert torch.equal(together.floor[:, 0], reads.double())
    assert bool((together.floor[:, 1] == 3.0).all())  # by its own rule
    assert bool((together.log_odds_after[:, :2] >= together.floor[:, :2]).all())
    with pytest.raises(WidthError, match="one for each activation"):
        edit.solve(x, 1, asked=reads[:3])
    with pytest.raises(TargetError, match="'tense'"):
        joint.solve(x, wanted, asked={"tense": 1.0})


def test_a_model_is_given_the_odds_of_each_example() -> None:
    model = build("gpt2")
    ids = torch.randint(VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(0))
    width = model.config.n_embd
    metric = Mahalanobis(torch.eye(width, dtype=torch.float64))
    edit = LRQP(probe_of(2, 1, width), metric)
    asked = torch.tensor([1.0, 30.0, -1e6])
    with edit.at(model, "L0.post", positions=[1, 2, 3], target=1, asked=asked) as run:
        model(ids)
    assert torch.equal(run.floor, asked.double())
    assert run.status.tolist()[2] == Status.SATISFIED
    joint = JointLRQP({"a": edit, "b": probe_of(3, 2, width)}, metric)
    given = {"a": asked}
    with joint.at(model, "L0.post", positions=[1, 2, 3], target={"a": 1}, asked=given) as run:
        model(ids)
    assert torch.equal(run.floor[:, 0], asked.double())


def _of_kind(kind: str, covariance: Tensor) -> Edit[Any]:
    """An edit of three classes in a metric, with another variable beside them."""
    metric = Mahalanobis(covariance, torch.zeros(len(covariance), dtype=covariance.dtype))
    probe, other = probe_of(3, 1), probe_of(2, 2)
    skips = {"on_infeasible": "skip"}
    if kind == "joint":
        return JointLRQP({"a": probe, "b": other}, metric, **skips)
    if kind == "within":
        return JointLRQP({"a": probe, "b": other}, metric, within={"b": 0.5}, **skips)
    if kind in ("box", "radius"):
        # What the radius is measured by has the scale of Σ.
        unit = float(covariance.double().diagonal().mean().sqrt())
        reads = torch.eye(len(covariance), dtype=torch.float64)[:2] if kind == "box" else "length"
        return lrqp.ConstrainedLRQP(
            probe,
            metric,
            lambda point: point.radius * unit <= 30 if kind == "radius" else point.features <= 9,
            reads=reads,
            log_odds=3.0,
            **skips,
        )
    odds = "total" if kind == "total" else "pairwise"
    metric = metric.keeping(other) if kind == "keeping" else metric
    return LRQP(probe, metric, log_odds=3.0, odds=odds, **skips)


@pytest.mark.parametrize("kind", ["joint", "within", "keeping", "total", "box", "radius"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_kind_of_edit_sees_the_scale_of_the_covariance(kind: str, dtype: torch.dtype) -> None:
    x, covariance = normal(16, WIDTH, seed=9), metric_of(condition=30).covariance
    a = torch.arange(16) % 3
    wishes = {"joint": {"a": a, "b": a % 2}, "within": {"a": a, "b": KEEP}}
    target = wishes.get(kind, a)
    close = {"box": 1e-4, "radius": 1e-4}.get(kind, 1e-8)
    here = _of_kind(kind, covariance.to(dtype)).solve(x, target)
    assert (here.status == Status.SOLVED).sum() > 8
    exponents = [-300, -150, -30, 150, 290, 300] if dtype == torch.float64 else [-36, 20, 36]
    for exponent in exponents:
        scaled = (covariance.to(dtype).double() * 10.0**exponent).to(dtype)
        there = _of_kind(kind, scaled).solve(x, target)
        assert torch.equal(here.status, there.status), exponent
        loose = close if dtype == torch.float64 else max(close, 1e-5)
        torch.testing.assert_close(there.x_new, here.x_new, rtol=loose, atol=loose)
        units = there.distance * 10.0 ** (exponent / 2)
        torch.testing.assert_close(units, here.distance, rtol=loose, atol=loose)


@pytest.mark.parametrize("kind", ["joint", "keeping", "total"])
def test_a_covariance_of_which_distances_overflow_is_named(kind: str) -> None:
    covariance = metric_of().covariance
    with pytest.raises(NonFiniteError, match="overflow"):
        _of_kind(kind, covariance / covariance.abs().amax() * 1.7e308)


SIZES = (3, 2, 5, 9)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def joint_of_kind(kind: str, sizes: tuple[int, ...], seed: int, width: int = 24) -> JointLRQP:
    """Of both rules and both odds; the third variable is kept within a tolerance."""
    probes = [probe_of(size, seed + place, width) for place, size in enumerate(sizes)]
    covariance = metric_of(width, 100.0).covariance
    for size, probe in zip(sizes, probes, strict=True):
        weight, odd = probe.weight, probe.weight[1::2]
        if kind == "copies" and size > 2:
            weight[1] = weight[2]
        if kind == "nearly equal":
            weight[1::2] = weight[::2][: len(odd)] + 1e-5 * torch.randn_like(odd)
        if kind == "far apart":
            weight *= torch.logspace(-2, 2, size).double()[:, None]
        if kind == "weakly active":
            probe.weight.copy_(weight.round()), probe.bias.copy_(probe.bias.round())
    if kind == "dependent":
        probes[-1].weight[:2] = probes[0].weight[:2]
    if kind == "low rank":
        basis = torch.linalg.qr(normal(width, 9, seed=seed)).Q
        covariance = basis @ basis.T
    metric = Mahalanobis(covariance * 1e20 if kind == "far apart" else covariance)
    options = [
        {"log_odds": 2.0, "rule": ("mirror", "fixed")[i % 2], "odds": ("pairwise", "total")[i // 2]}
        for i in range(4)
    ]
    edits = {
        str(i): LRQP(probe, metric, **own)
        for i, (probe, own) in enumerate(zip(probes, options, strict=False))
    }
    within = {"2": 0.5} if len(sizes) > 2 else {}
    return JointLRQP(edits, metric, within=within, on_infeasible="skip")


@pytest.mark.parametrize("compiled", [True, False])
def test_what_is_kept_to_rounding_is_not_taken_for_a_direction(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven equations in a metric of rank 3: what is left of four of them is rounding, which grows
    where a small pivot comes before. Kept variables moved by 30 nats with a status of SOLVED.
    """
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        basis = torch.linalg.qr(draw(9, 3)).Q
        metric = Mahalanobis(basis @ basis.T)
        weights = [draw(6, 9), (2 * draw(3, 9)).round(), draw(3, 9)]
        edits = [LRQP(LinearProbe.from_weights(w, draw(len(w))), metric) for w in weights]
        joint = JointLRQP(edits, metric, on_infeasible="skip")
        x = draw(30, 9).half()
        target = torch.tensor([[KEEP, KEEP, i % 3] for i in range(30)])
        found = joint.propose(x, target)
        held = found.log_odds_before[:, 2] >= 10
        assert torch.equal(found.status == Status.SATISFIED, held), seed
        assert (found.status[~held] == Status.INFEASIBLE).all(), seed


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind",
    ["plain", "copies", "nearly equal", "far apart", "weakly active", "dependent", "low rank"],
)
def test_every_path_gives_the_same_edit_and_the_same_verdict(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sizes in (SIZES[:2], SIZES):
        joint, batch = joint_of_kind(kind, sizes, 3), 16
        choices = [torch.randint(KEEP, size, (batch,)) for size in sizes]
        source = [column.clamp_min(FREE).roll(1) for column in choices]
        asked = torch.where(torch.arange(batch) % 2 > 0, torch.nan, 4.0)
        x, base = (normal(batch, 24, seed=seed).to(dtype) for seed in (0, 8))
        target, source = torch.stack(choices, -1), torch.stack(source, -1)

        def solve(rows: slice = slice(None), joint: JointLRQP = joint, parts: Any = None) -> Any:
            x, target, source, asked, base = (part[rows] for part in parts)
            if len(joint.names) == 2:
                return joint.solve(x, target)
            placing = Placement(base, 0.3, dtype)
            return joint.solve(x, target, source, asked={"0": asked}, realise=placing)

        solve = partial(solve, joint=joint, parts=(x, target, source, asked, base))
        found = solve()
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            other = solve()
        # What fails may fail at its first aim or at a higher one.
        worst = int(Status.INFEASIBLE)
        alike = found.status.clamp_max(worst) == other.status.clamp_max(worst)
        assert bool(alike.all())
        coarse = max(torch.finfo(dtype).eps, 1e-9) * (1e3 if kind == "nearly equal" else 1)
        size = 1 + found.x_new.double().norm(dim=-1) + x.double().norm(dim=-1)
        off = (found.x_new.double() - other.x_new.double()).norm(dim=-1) / size
        allowed = torch.full_like(off, 64 * max(torch.finfo(dtype).eps, 1e-9) + 1e-8)
        if kind == "nearly equal":
            # An edit of length d grows by λ/d with a floor, and margins at x' are rounded.
            long = max(edit.probe.weight.norm(dim=-1).max() for edit in joint.edits)
            rounding = torch.finfo(dtype).eps * long * found.x_new.double().norm(dim=-1)
            price = found.multipliers.abs().sum(-1) / found.squared_distance.clamp_min(1e-30)
            allowed += price * rounding
        assert bool((off <= allowed).all())
        for name in ("floor", "log_odds_before", "distance", "euclidean"):
            near = {"rtol": 256 * coarse, "atol": 64 * coarse, "equal_nan": True}
            mine, yours = getattr(found, name), getattr(other, name)
            torch.testing.assert_close(mine, yours, **near)
        done = found.status == Status.SOLVED
        unwritten = found.log_odds_after.isnan()
        assert torch.equal(unwritten, target < 0)
        assert ((found.log_odds_after >= found.floor) | unwritten)[done].all()
        assert torch.equal(found.x_new[~done], x[~done])
        for i in (0, batch - 1):
            alone = solve(slice(i, i + 1))
            for name in ("x_new", "status", "moved", "multipliers"):
                assert torch.equal(getattr(alone, name), getattr(found, name)[i : i + 1])


@needs_compiler
def test_numbers_are_the_same_with_and_without_gradients() -> None:
    joint, x = joint_of(within={"c": 0.5}), normal(30, WIDTH)
    wanted = targets(30) | {"c": torch.arange(30) % 3 - 2}
    plain = joint.solve(x, wanted)
    traced = joint.solve(x.clone().requires_grad_(), wanted)
    assert traced.x_new.requires_grad and traced.floor.requires_grad
    for name in vars(plain):
        torch.testing.assert_close(
            getattr(traced, name), getattr(plain, name), rtol=0, atol=0, equal_nan=True
        )


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", ["L1.pre", "L1.mid"])
@torch.no_grad()
def test_one_call_a_pass_writes_what_the_operations_write_bit_for_bit(
    dtype: torch.dtype, site: str
) -> None:
    model = build("gpt2", dtype=dtype)
    inputs = {"input_ids": torch.arange(12).reshape(2, 6) % VOCABULARY}
    x = lrqp.capture(model, inputs, [site], "all")[site]
    edits = {name: random_edit(x, size, seed=size) for name, size in (("a", 2), ("b", 3))}
    metric = Mahalanobis.euclidean(x.shape[-1])
    joint = JointLRQP(edits | {"c": probe_of(3, 5, x.shape[-1])}, metric)
    found = []
    for operations in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if operations:
                patch.setattr(JointLRQP, "line", lambda edit: None)
            for given in ({"target": {"a": 1, "b": 0}}, {"source": {"a": 0}}):
                wanted = {"target": {"a": 1, "b": FREE, "c": FREE}} | given
                for positions in ([3, 2], "all"):
                    with joint.at(model, site, positions=positions, **wanted) as run:
                        logits = model(**inputs).logits
                    assert (run._line is None) == operations
                    names = "log_odds_before", "log_odds_after", "floor", "moved", "status"
                    lengths = "distance", "euclidean", "kkt_residual", "token"
                    found.append([logits, *(getattr(run, name) for name in names + lengths)])
    for one, other in zip(found[:4], found[4:], strict=True):
        assert torch.equal(one[0], other[0])
        near = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}
        torch.testing.assert_close(one[1:], other[1:], **near)


@needs_compiler
@torch.no_grad()
def test_what_changes_between_two_passes_is_seen() -> None:
    model = build("gpt2")
    inputs = {"input_ids": torch.arange(12).reshape(2, 6) % VOCABULARY}
    x = lrqp.capture(model, inputs, ["L1.pre"], "all")["L1.pre"]
    edits = {name: random_edit(x, size, seed=size) for name, size in (("a", 2), ("b", 3))}
    joint = JointLRQP(edits, edits["a"].metric)
    a, b = joint.edits
    changes = (
        lambda: b.probe.weight.data.mul_(1.5),
        lambda: a.probe.bias.add_(0.5),
        lambda: joint.metric.covariance.mul_(3),
        lambda: b.log_odds.fill_(4.0),
        lambda: setattr(a, "rule", "fixed"),
        lambda: a.probe.double(),
    )
    with joint.at(model, "L1.pre", positions=[3, 2], target={"a": 1, "b": 2}) as run:
        for change in (lambda: None, *changes):
            change()
            seen, odds = model(**inputs).logits, run.log_odds_after
            assert run._line is not None and (odds >= run.floor).all()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(JointLRQP, "line", lambda edit: None)
                assert torch.equal(model(**inputs).logits, seen)
        with pytest.MonkeyPatch.context() as patch:
            replaced = mock.Mock(side_effect=joint.solve)
            patch.setattr(joint, "solve", replaced)
            model(**inputs)
            assert replaced.called and run._line is None


@needs_compiler
def test_solving_is_one_call_and_follows_what_the_edit_holds() -> None:
    """Bit for bit what the general way finds, for every form of target; changes are seen."""
    joint = joint_of(within={"c": 0.5}, on_infeasible="skip")
    x, n = torch.randn(5, joint.metric.width), joint.n_classes
    targets = (
        {"a": 1, "b": 0, "c": KEEP},
        {"a": 1, "b": FREE, "c": FREE},
        {"a": torch.arange(5) % 2, "b": KEEP, "c": 1},
        torch.tensor([[1, KEEP, FREE]] * 5),
    )
    asked, source = {"a": 3.0, "b": torch.arange(5.0)}, {"a": 0, "b": torch.arange(5) % 2}
    changes = {
        "nothing": lambda: None,
        "weights through .data": lambda: joint.edits[1].probe.weight.data.mul_(1.5),
        "least odds": lambda: joint.edits[0].log_odds.fill_(4.0),
        "rule": lambda: setattr(joint.edits[0], "rule", "fixed"),
        "tolerance": lambda: joint.within.update(c=0.25),
        "covariance": lambda: joint.metric.covariance.mul_(2.0),
    }
    for change in changes.values():
        change()
        for target in targets:
            for given in ({}, {"asked": asked}, {"source": source}):
                found = joint.solve(x, target, **given), joint.propose(x, target, **given)
                assert joint._line is not None
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(JointLRQP, "_own_line", lambda edit: None)
                    general = joint.solve(x, target, **given)
                for name, value in vars(general).items():
                    for one in found:
                        same = getattr(one, name).nan_to_num(), value.nan_to_num()
                        assert torch.equal(*same), name
    line = joint._line
    assert joint.solve(x, targets[0]) and joint._line is line
    for wrong in ({"a": n, "b": 0, "c": 0}, {"a": -3, "b": 0, "c": 0}, {"a": 1}):
        with pytest.raises(TargetError):
            joint.solve(x, wrong)
    with pytest.raises(NonFiniteError):
        joint.solve(x * torch.nan, {"a": FREE, "b": FREE, "c": FREE})
    joint.edits[0].probe.requires_grad_(True)
    assert joint.solve(x, targets[0]).x_new.requires_grad
    assert copy.deepcopy(joint).solve(x, targets[0]).x_new.requires_grad
