"""The edit in one launch against the same edit in operations of torch.

On a GPU where there is one; else through Triton's interpreter (``make test-kernel``), on few and
small problems.
"""

import copy
import os
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import pytest
import torch
from launches_for_tests import launched_by_address
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from transformers import GPT2Config, GPT2LMHeadModel

import lrqp_torch as lrqp
from lrqp_torch import MahalanobisQP, Solution, Status
from lrqp_torch.edits import record
from lrqp_torch.qp import ProbeGeometry, fused
from lrqp_torch.qp.active_set import solve_dual
from lrqp_torch.qp.constraints import DenseConstraints
from lrqp_torch.qp.total_odds import TotalOdds
from lrqp_torch.stream import following
from lrqp_torch.stream.intervene import Placement
from tests.qp.qp_reference import Problem, barely_reachable, random_problem

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

BATCH = 4 if DEVICE == "cpu" else 256
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CLASSES = [2, 3, 5, 8, 10, 16] + ([] if DEVICE == "cpu" else [32, 33, 50, 64])


def problem_of(kind: str, n_classes: int, seed: int = 0) -> Problem:
    """A random problem, and what may be wrong with one."""
    p = random_problem(n_classes, 24 if DEVICE == "cpu" else 96, BATCH, seed)
    generator = torch.Generator().manual_seed(seed)
    if kind == "near":
        noise = torch.randn(p.weight.shape, generator=generator, dtype=torch.float64)
        p.weight[1:] = p.weight[0] + 1e-5 * noise[1:]
        p.floor /= 1e4
    elif kind == "twins":
        p.weight[1], p.bias[1] = p.weight[0], p.bias[0] - 1
    elif kind == "rank":
        factor = torch.randn(len(p.covariance), 3, generator=generator, dtype=torch.float64)
        p.covariance = factor @ factor.T
    elif kind == "line":
        # All classes along one direction: those between others can never be the largest.
        steps = torch.arange(n_classes, dtype=torch.float64)
        p.weight = steps.unsqueeze(1) * p.weight[:1]
    elif kind == "large":
        p.covariance *= 1e12
        p.weight *= 1e-3
    elif kind == "small":
        p.covariance *= 1e-14
        p.weight *= 1e2
    return p


KINDS = ["random", "near", "twins", "rank", "line", "large", "small"]


def solved(
    p: Problem,
    dtype: torch.dtype,
    *,
    by_kernel: bool,
    realise: Placement | None = None,
    total: bool = False,
) -> Solution:
    """By the kernel, or on the CPU, where what rounding leaves is seen and taken out to the end."""
    device = DEVICE if by_kernel else "cpu"
    geometry = ProbeGeometry.build(*(t.to(device) for t in (p.weight, p.bias, p.covariance)))
    x, target, floor = p.x.to(device, dtype), p.target.to(device), p.floor.to(device)
    if realise is not None and realise.base is not None:
        realise = replace(realise, base=realise.base.to(device))
    qp = MahalanobisQP(len(p.bias), **({"solver": TotalOdds()} if total else {}))
    if by_kernel:
        assert qp.fuses(x, geometry, realise)
        return qp.solve(x, target, floor, geometry, realise=realise)
    with mock.patch.object(fused, "serves", lambda *_: False):
        found = qp.solve(x, target, floor, geometry, realise=realise)
    moved = {field.name: getattr(found, field.name).to(DEVICE) for field in fields(found)}
    return replace(found, **moved)


def agree(ours: Solution, other: Solution, atol: float, rtol: float = 1e-7) -> None:
    assert ours.status.tolist() == other.status.tolist()
    for name in ("log_odds_before", "floor"):
        assert torch.allclose(getattr(ours, name), getattr(other, name), rtol=1e-9, atol=1e-9)
    for name in ("distance", "euclidean"):
        assert torch.allclose(getattr(ours, name), getattr(other, name), rtol=rtol, atol=atol), name
    edited = ours.x_new.double(), other.x_new.double()
    scale = 1 + edited[1].abs().amax()
    assert float((edited[0] - edited[1]).abs().amax()) <= atol * scale


def coarse_of(dtype: torch.dtype, fine: float = 1e-5) -> float:
    """How far two edits in a dtype may be apart, whose precision is fine below a number.

    A first round that falls short by a hair in the one sum and not in the other is another edit.
    """
    eps = torch.finfo(dtype).eps
    return 1e-7 if eps < fine else 32 * eps


def kept(solution: Solution, residual: float = 1e-8) -> None:
    """What is promised of what is certified."""
    done = solution.status == Status.SOLVED
    assert bool((solution.log_odds_after[done] >= solution.floor[done]).all())
    assert bool((solution.kkt_residual[done] <= residual).all())


def few(p: Problem, n_classes: int) -> Problem:
    """So many rows as the interpreter takes a second for."""
    rows = slice(None, 1 if n_classes > 8 else 2) if DEVICE == "cpu" else slice(None)
    return replace(p, x=p.x[rows], target=p.target[rows], floor=p.floor[rows] + 3)


TOTAL = [(3, d) for d in DTYPES]
TOTAL += [(2, DTYPES[2]), (5, DTYPES[1]), (10, DTYPES[1]), (20, DTYPES[0])]
if DEVICE != "cpu":
    TOTAL += [(k, d) for k in (2, 5, 8, 10, 16) for d in DTYPES]
    # Each takes a minute or more to compile.
    TOTAL += [(k, d) for k in (32, 33, 50, 64) for d in DTYPES[::2]]


@pytest.mark.parametrize(("n_classes", "dtype"), TOTAL)
def test_total_odds_are_those_of_the_other_paths(n_classes: int, dtype: torch.dtype) -> None:
    """Of compiled code on the CPU, and of operations of torch."""
    p = few(random_problem(n_classes, 24, BATCH, n_classes), n_classes)
    ours, compiled = (solved(p, dtype, by_kernel=by, total=True) for by in (True, False))
    with mock.patch("lrqp_torch.qp.native.library", lambda: None):
        other = solved(p, dtype, by_kernel=False, total=True)
    coarse = coarse_of(dtype, 1e-8)
    for one in (compiled, other):
        agree(ours, one, coarse, coarse)
        # Of many classes the shares of some vanish, and rounding decides on which side of 0.
        counts = one.multipliers > 1e-9 * one.multipliers.sum(-1, keepdim=True)
        assert torch.equal(ours.active & counts, one.active & counts)
    multipliers = ours.multipliers[ours.status == Status.SOLVED]
    assert bool((multipliers >= 0).all()) and (n_classes > 33 or bool((multipliers > 0).all()))
    kept(ours)


@pytest.mark.parametrize(
    "kind", ["near", "twins", "rank", "pair"] if DEVICE == "cpu" else [*KINDS, "pair"]
)
@pytest.mark.parametrize("n_classes", [3] if DEVICE == "cpu" else [3, 6, 10, 33, 64])
def test_hard_problems_of_total_odds_come_out_the_same(n_classes: int, kind: str) -> None:
    """Also where shares are taken from the last multipliers, and where a proof is looked for."""
    p = few(problem_of(kind, n_classes, 1), n_classes)
    if kind == "pair":
        p.weight[1], p.bias[1] = p.weight[0] + 1e-7 * p.weight[1], p.bias[0]
        p.target = torch.zeros_like(p.target)
    ours, other = (solved(p, torch.float64, by_kernel=by, total=True) for by in (True, False))
    agree(ours, other, 1e-5, 1e-5)
    kept(ours, 1e-5)


def test_a_twin_of_the_target_bounds_total_odds() -> None:
    p = random_problem(5, 12, 4, seed=7, condition=10)
    p.target.zero_()
    p.weight[1], p.bias[1] = p.weight[0], p.bias[0] - 3.0
    p.floor = torch.tensor([2.9, 2.999, 3.001, 5.0], dtype=torch.float64)
    ours = solved(p, torch.float64, by_kernel=True, total=True)
    assert ours.status.tolist() == 2 * [Status.SOLVED] + 2 * [Status.INFEASIBLE]
    assert torch.equal(ours.x_new[2:].cpu(), p.x[2:]) and not bool(ours.distance[2:].any())
    kept(ours)


@pytest.mark.parametrize(("dtype", "scale"), [(DTYPES[1], 0.22), (DTYPES[2], 1.0)])
def test_total_odds_hold_for_sums_that_the_stream_rounds(dtype: torch.dtype, scale: float) -> None:
    p = few(random_problem(4, 24, BATCH, 3), 4)
    place = Placement((3 * p.x.to(DEVICE, dtype)).roll(1, 0), scale, dtype)
    ours, other = (
        solved(p, dtype, by_kernel=by, realise=place, total=True) for by in (True, False)
    )
    coarse = coarse_of(dtype, 1e-8)
    agree(ours, other, coarse, coarse)
    geometry = ProbeGeometry.build(*(t.to(DEVICE) for t in (p.weight, p.bias, p.covariance)))
    read = -(-geometry.margins(place(ours.x_new.double()), p.target.to(DEVICE))).logsumexp(-1)
    done = ours.status == Status.SOLVED
    assert torch.allclose(read[done], ours.log_odds_after[done], rtol=1e-12, atol=1e-12)
    kept(ours)


def test_total_odds_have_derivatives_to_the_third_order() -> None:
    p = random_problem(3, 5, 2, 11)
    target, way = p.target.to(DEVICE), torch.randn(2, 5).to(DEVICE).double()
    geometry = ProbeGeometry.build(*(t.to(DEVICE) for t in (p.weight, p.bias, p.covariance)))
    qp = MahalanobisQP(3, solver=TotalOdds())

    def found(by_kernel: bool) -> list[Tensor]:
        x = p.x.to(DEVICE).requires_grad_()
        floor = (p.floor + 4).to(DEVICE).requires_grad_()
        with mock.patch.object(fused, "serves", fused.serves if by_kernel else lambda *_: False):
            assert qp.fuses(x, geometry) == by_kernel
            solution = qp.solve(x, target, floor, geometry)
        assert bool((solution.status == Status.SOLVED).all())
        parts = [solution.x_new, solution.squared_distance, solution.log_odds_before]
        value = (solution.x_new * way).sum() + solution.squared_distance.sum()
        value = value + solution.multipliers.square().sum()
        for _ in range(3):
            one, other = torch.autograd.grad(value, (x, floor), create_graph=True)
            parts += [one, other]
            value = (one * way).sum() + other.sum()
        return parts

    for one, other in zip(found(True), found(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", CLASSES)
def test_equals_the_operations_of_torch(n_classes: int, dtype: torch.dtype) -> None:
    p = random_problem(n_classes, 24 if DEVICE == "cpu" else 768, BATCH, n_classes)
    ours, other = (solved(p, dtype, by_kernel=by_kernel) for by_kernel in (True, False))
    coarse = coarse_of(dtype)
    agree(ours, other, coarse, coarse)
    kept(ours)


def test_a_launch_that_was_prepared_serves_any_batch() -> None:
    p = random_problem(3, 32, 8, 4)
    geometry = ProbeGeometry.build(*(t.to(DEVICE) for t in (p.weight, p.bias, p.covariance)))
    x, target, floor = p.x.to(DEVICE), p.target.to(DEVICE), p.floor.to(DEVICE)
    parts = [
        MahalanobisQP(3).solve(x[rows], target[rows], floor[rows], geometry)
        for rows in (slice(0, 1), slice(1, 8), slice(0, 8))
    ]
    for name in ("x_new", "distance", "log_odds_before", "kkt_residual", "status"):
        one, seven, eight = (getattr(part, name) for part in parts)
        assert torch.equal(torch.cat([one, seven]), eight), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_classes", [2, 3, 6] + ([] if DEVICE == "cpu" else [10, 33, 64]))
def test_hard_problems_come_out_the_same(n_classes: int, kind: str) -> None:
    for seed in range(2 if DEVICE == "cpu" else 8):
        p = problem_of(kind, n_classes, seed)
        ours, other = (solved(p, torch.float64, by_kernel=by_kernel) for by_kernel in (True, False))
        agree(ours, other, 1e-6, 1e-6)
        kept(ours)


def pairs_apart(p: Problem, apart: float) -> Problem:
    """Every second class so near the one before."""
    noise = torch.randn(p.weight[1::2].shape, generator=torch.Generator().manual_seed(1))
    p.weight[1::2] = p.weight[: 2 * len(noise) : 2] + apart * noise.double()
    return p


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("n_classes", [4, 10])
def test_near_equal_classes_keep_their_digits(n_classes: int, dtype: torch.dtype) -> None:
    """What their differences lack in WΣ is in the kernel's tables, and in what it moves along."""
    p = pairs_apart(random_problem(n_classes, 24, BATCH, 7), 1e-8)
    ours, other = (solved(p, dtype, by_kernel=way) for way in (True, False))
    assert ours.status.tolist() == other.status.tolist()
    near = {"rtol": 1e-6 if dtype != torch.bfloat16 else 0.05, "atol": 0.0}
    done = ours.status == Status.SOLVED
    assert bool(done.any())
    torch.testing.assert_close(ours.distance[done], other.distance[done], **near)


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_aims_out_of_reach_do_not_make_floors_unreachable(dtype: torch.dtype, total: bool) -> None:
    p = barely_reachable(3, dtype, total)
    p = replace(p, x=p.x[:BATCH], target=p.target[:BATCH], floor=p.floor[:BATCH])
    ours, other = (solved(p, dtype, by_kernel=way, total=total) for way in (True, False))
    assert torch.equal(ours.status.cpu() == Status.INFEASIBLE, p.floor == p.floor.max())
    agree(ours, other, atol=1e-6 if dtype == torch.float32 else 0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.22])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_promises_hold_for_sums_that_the_stream_rounds(
    n_classes: int, scale: float, dtype: torch.dtype
) -> None:
    p = random_problem(n_classes, 24, BATCH, 3)
    x = p.x.to(DEVICE, dtype)
    place = Placement((3 * x).roll(1, 0), scale, dtype)
    ours, other = (
        solved(p, dtype, by_kernel=by_kernel, realise=place) for by_kernel in (True, False)
    )
    coarse = coarse_of(dtype)
    agree(ours, other, coarse, coarse)
    geometry = ProbeGeometry.build(*(t.to(DEVICE) for t in (p.weight, p.bias, p.covariance)))
    read = geometry.margins(place(ours.x_new.double()), p.target.to(DEVICE)).amin(-1)
    done = ours.status == Status.SOLVED
    assert torch.allclose(read[done], ours.log_odds_after[done], rtol=1e-12, atol=1e-12)
    kept(ours)


def edit_of(p: Problem, **options: object) -> lrqp.LRQP:
    probe = lrqp.LinearProbe(p.weight.shape[1], len(p.bias), dtype=torch.float64)
    with torch.no_grad():
        probe.weight.copy_(p.weight)
        probe.bias.copy_(p.bias)
    probe = probe.requires_grad_(False).to(DEVICE)
    return lrqp.LRQP(probe, lrqp.Mahalanobis(p.covariance.to(DEVICE)), **options)  # type: ignore[arg-type]


def launched(edit: lrqp.LRQP, x: Tensor, target: Tensor, source: Tensor | None = None) -> Solution:
    """What :meth:`LRQP.propose` does on a GPU."""
    live, kept = (edit.probe.weight, edit.probe.bias), edit._geometry._kept
    assert kept is not None
    return edit._attempt(x, target, source, None, kept.geometry, live=live)


def proposed(edit: lrqp.LRQP, x: Tensor, *classes: Tensor, by_kernel: bool = True) -> Solution:
    with mock.patch.object(fused, "serves", fused.serves if by_kernel else lambda *_: False):
        if DEVICE == "cpu" and by_kernel:
            return launched(edit, x, *classes)
        return edit.propose(x, *classes)


@pytest.mark.parametrize("rule", ["mirror", "fixed"])
@pytest.mark.parametrize(("n_classes", "odds"), [(2, "pairwise"), (5, "pairwise"), (3, "total")])
def test_odds_rules(n_classes: int, odds: str, rule: str) -> None:
    p = random_problem(n_classes, 24, BATCH, 5)
    edit = edit_of(p, rule=rule, log_odds=3.0, odds=odds)
    x, target = p.x.to(DEVICE), p.target.to(DEVICE)
    for source in ((), (target.roll(1),), (target,)):
        ours, other = (proposed(edit, x, target, *source, by_kernel=by) for by in (True, False))
        agree(ours, other, 1e-9)


def test_views_are_read_as_they_are_seen() -> None:
    p = random_problem(3, 24, BATCH, 8)
    edit = edit_of(p, on_infeasible="skip")
    x = p.x.to(DEVICE)
    one = torch.ones((), dtype=torch.long, device=DEVICE)
    wanted = edit.solve(x, torch.ones(BATCH, dtype=torch.long, device=DEVICE))
    for target in (1, one.expand(BATCH), one.repeat(BATCH, 2)[:, 1]):
        for found in (edit.solve(x, target), edit.propose(x, target)):
            assert torch.equal(found.x_new, wanted.x_new)
    # Rows, classes and what counts of them as columns of wider tensors, or one for all.
    stream = torch.stack([x, 2 * x, 3 * x], 1)
    wide = torch.arange(BATCH, device=DEVICE)[:, None].expand(BATCH, 3).contiguous()
    shown = torch.ones(BATCH, 3, dtype=torch.bool, device=DEVICE)
    shown[0], shown[1, 0] = False, False
    record = torch.full((BATCH, 9), -1.0, dtype=torch.float64, device=DEVICE)
    places = wide[:, 1], (0 * wide)[:, 2], wide[:, 0], None, shown[:, 1]
    edited, _ = fused.edit_stream(
        fused.StreamRows(stream, None, 1.0, *places, (record, 0, 5)),
        one.expand(BATCH),
        edit._odds_rule(one, None),
        edit.geometry(x.device),
        skip=True,
        live=(edit.probe.weight, edit.probe.bias),
    )
    assert torch.equal(edited[1:, 0], wanted.x_new[1:])
    assert torch.equal(edited[0], stream[0]) and torch.equal(edited[:, 1:], stream[:, 1:])
    assert record[1:, 7].tolist() == list(range(1, BATCH))


@pytest.mark.parametrize("odds", ["pairwise", "total"])
def test_what_is_not_edited_stays_bit_for_bit(odds: str) -> None:
    p = random_problem(3, 24, BATCH, 7)
    p.weight[1], p.bias[1] = p.weight[0], p.bias[0]
    floor = 0.0 if odds == "pairwise" else -0.5
    edit = edit_of(p, log_odds=floor, rule="fixed", on_infeasible="skip", odds=odds)
    x = p.x.to(DEVICE, torch.bfloat16)
    own = edit.probe(x.double()).argmax(-1)
    x[0, 0] = torch.nan
    for target in (own, torch.zeros_like(own)):
        solution = proposed(edit, x, target)
        still = solution.status != Status.SOLVED
        assert bool(still.any())
        assert torch.equal(solution.x_new[still].view(torch.int16), x[still].view(torch.int16))
        assert solution.status[0] == Status.INVALID


def test_a_probe_that_changed_unseen_and_classes_out_of_range_are_invalid() -> None:
    p = random_problem(4, 24, BATCH, 9)
    edit = edit_of(p)
    x, target = p.x.to(DEVICE), p.target.to(DEVICE)
    outside = target.clone()
    outside[1] = 4
    geometry = edit.geometry(x.device)
    rule = edit._odds_rule(outside, None)
    status = fused.solve(x, outside, rule, geometry)[0].status
    assert status[1] == Status.INVALID and status[0] != Status.INVALID
    edit.probe.weight.data[2, 3] += 1e-3
    assert bool((launched(edit, x, target).status == Status.INVALID).all())
    probe = edit.probe
    tensors = (probe.weight, probe.bias), edit.metric.covariance
    assert edit._geometry.known(*tensors, x.device) is geometry
    # A change that leaves a trace makes another geometry.
    with torch.no_grad():
        probe.weight.mul_(2.0)
    assert edit._geometry.known(*tensors, x.device) is None
    assert edit.geometry(x.device) is edit._geometry.known(*tensors, x.device) is not geometry


def tiny_model(dtype: torch.dtype, width: int = 24) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=width,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config).eval().requires_grad_(False).to(DEVICE, dtype)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_probe_of_views_is_read_as_it_is_now(name: str) -> None:
    """The kernel holds what it is compared with by its address."""
    edit, model = edit_of(random_problem(3, 24, 4, 13)), tiny_model(torch.float32)
    own = getattr(edit.probe, name).detach()
    view = own.T.contiguous().T if name == "weight" else torch.stack([own, own], 1)[:, 0]
    setattr(edit.probe, name, torch.nn.Parameter(view, requires_grad=False))
    ids = torch.randint(50, (3, 5)).to(DEVICE)
    with edit.at(model, "L1.post", positions=2, target=1) as run:
        for _ in range(2):
            model(ids)
        getattr(edit.probe, name).data[0] += 0.5
        stream = lrqp.capture(model, {"input_ids": ids}, "L1.post")["L1.post"][:, 2]
    read = edit.geometry(stream.device).margins(stream, torch.ones(3, device=stream.device).long())
    after = run.log_odds_after[-3:].to(read.device)
    torch.testing.assert_close(read.amin(-1), after, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("site", ["L1.pre", "L0.mid", "L1.post"])
@pytest.mark.parametrize(
    ("dtype", "odds"),
    [(torch.float32, "pairwise"), (torch.bfloat16, "pairwise"), (torch.float32, "total")],
)
def test_an_edit_in_a_model_is_one_launch_and_the_same(
    site: str, dtype: torch.dtype, odds: str
) -> None:
    p = random_problem(3, 24, 4, 13)
    edit, model = edit_of(p, on_infeasible="skip", odds=odds), tiny_model(dtype)
    ids = torch.randint(50, (3, 5), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    positions, source = torch.tensor([1, 4, 2]), torch.tensor([2, 1, 0])
    runs = []
    for by_kernel in (True, False):
        serves = fused.serves if by_kernel else lambda *_: False
        seen = mock.Mock(side_effect=fused.edit_stream)
        with (
            mock.patch.object(fused, "serves", serves),
            mock.patch.object(fused, "edit_stream", seen),
            edit.at(model, site, positions=positions, target=1, source=source) as run,
        ):
            captured = lrqp.capture(model, {"input_ids": ids}, site)
            logits = model(ids).logits
        assert bool(seen.called) == by_kernel
        runs.append((run, logits, captured[site]))
    (ours, logits, stream), (other, other_logits, other_stream) = runs
    coarse = 1e-5 if dtype == torch.float32 else 0.1
    assert torch.allclose(logits, other_logits, rtol=coarse, atol=coarse)
    assert torch.allclose(stream, other_stream, rtol=coarse, atol=coarse)
    assert ours.status.tolist() == other.status.tolist()
    assert torch.allclose(ours.distance, other.distance, rtol=coarse)
    assert bool((ours.log_odds_after >= ours.floor).all())
    # What is certified is what the model holds.
    rows = stream[torch.arange(3), positions.to(stream.device)]
    held = edit.geometry(rows.device).margins(rows, torch.ones_like(rows[:, 0]).long())
    held = edit.qp.solver.read(held).amin(-1)
    assert torch.allclose(held.cpu(), ours.log_odds_after.cpu(), rtol=1e-12, atol=1e-12)


def test_generated_tokens_are_edited_by_the_kernel() -> None:
    edit, model = edit_of(random_problem(2, 24, 4, 13)), tiny_model(torch.float32)
    ids = torch.randint(50, (2, 3), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    tokens = []
    for by_kernel in (True, False):
        with mock.patch.object(fused, "serves", fused.serves if by_kernel else lambda *_: False):
            with edit.at(model, "L0.post", positions="generated", target=[1, 0]) as run:
                tokens.append(model.generate(ids, max_new_tokens=4, do_sample=False))
            assert bool((run.log_odds_after >= run.floor).all())
            assert len(run.status) == 6
    assert tokens[0].tolist() == tokens[1].tolist()


@pytest.mark.parametrize(
    ("site", "dtype"),
    [("L1.pre", torch.float32), ("L0.mid", torch.bfloat16)]
    + ([] if DEVICE == "cpu" else [("L1.pre", torch.bfloat16), ("L0.mid", torch.float32)]),
)
def test_a_launch_that_is_done_again_is_the_one_it_would_be(site: str, dtype: torch.dtype) -> None:
    """And after each change of what it was laid down for there is another."""
    p, model = random_problem(3, 32, 4, 13), tiny_model(dtype, 32)
    texts = [
        torch.randint(50, (3, 5), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        for seed in range(3)
    ]

    def change_weight(edit: lrqp.LRQP) -> None:
        with torch.no_grad():
            edit.probe.weight.mul_(1.25)

    def change_odds(edit: lrqp.LRQP) -> None:
        edit.log_odds.fill_(3.0)

    def change_bias(edit: lrqp.LRQP) -> None:
        edit.probe.bias = torch.nn.Parameter(edit.probe.bias.detach() + 1)

    def change_rule(edit: lrqp.LRQP) -> None:
        edit.rule = "fixed"

    def change_metric(edit: lrqp.LRQP) -> None:
        edit.metric.covariance.mul_(2.0)

    changes = change_weight, change_odds, change_bias, change_rule, change_metric
    found = []
    for repeats in (True, False):
        edit = edit_of(copy.deepcopy(p), on_infeasible="skip")
        made = record._Launch.of if repeats else lambda *_: None
        seen = mock.Mock(side_effect=fused.edit_stream)
        streams = []
        with (
            nullcontext() if DEVICE == "cuda" else launched_by_address(),
            mock.patch.object(record._Launch, "of", made),
            mock.patch.object(fused, "edit_stream", seen),
        ):
            with edit.at(model, site, positions=torch.tensor([1, 4, 2]), target=1) as run:
                for ids in texts:
                    streams.append(lrqp.capture(model, {"input_ids": ids}, site)[site])
                assert seen.call_count == (1 if repeats else 3)
                for change in changes:
                    change(edit)
                    streams.append(lrqp.capture(model, {"input_ids": texts[0]}, site)[site])
                streams.append(lrqp.capture(model, {"input_ids": texts[1][:, :5]}, site)[site])
                double = copy.deepcopy(run)
            assert len(double.steps) == len(run.steps) == len(streams)
            steps = [torch.stack([step.distance, step.log_odds_after]) for step in run.steps]
            seen.reset_mock()
            with edit.at(model, site, positions="generated", target=1) as run:
                tokens = model.generate(texts[0], max_new_tokens=5, do_sample=False)
            # The first token is unlike the prompt; that the second is like it is seen then.
            assert seen.call_count == (2 if repeats else 4)
        steps.append(torch.stack([run.distance, run.log_odds_after]))
        found.append((streams, steps, tokens, run.status))
    (ours, numbers, tokens, status), (others, wanted, same, other_status) = found
    assert all(map(torch.equal, ours, others)) and all(map(torch.equal, numbers, wanted))
    assert torch.equal(tokens, same) and torch.equal(status, other_status)


def test_a_static_cache_is_edited_as_a_growing_one() -> None:
    """Its masks are columns of a table of queries and keys, and on a GPU are not looked at."""
    edit, model = edit_of(random_problem(2, 24, 4, 13)), tiny_model(torch.float32)
    ids = torch.randint(50, (4, 3), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = []
    for kind in ("dynamic", "static"):
        with (
            mock.patch.object(following, "readable", lambda *_: False),
            edit.at(model, "L0.post", positions="generated", target=1) as run,
            torch.compiler.set_stance("force_eager"),
        ):
            options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": kind}
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert bool((run.log_odds_after >= run.floor).all())
        found.append((tokens.tolist(), run.distance))
    assert found[0][0] == found[1][0]
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4)


@pytest.mark.parametrize("rank", [3, 12])
@pytest.mark.parametrize("m", [2, 9])
def test_duals_of_any_matrix_have_the_same_active_sets(m: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(m + rank)
    rows = torch.randn(BATCH, m, rank, generator=generator, dtype=torch.float64)
    gap = torch.randn(BATCH, m, generator=generator, dtype=torch.float64).to(DEVICE)
    gram = (rows @ rows.mT).to(DEVICE)
    noise = 1e-15 * gram.diagonal(dim1=-2, dim2=-1)
    constraints = DenseConstraints(gram, noise, noise)
    ours = solve_dual(constraints, gap)
    with mock.patch.object(fused, "serves", lambda *_: False):
        other = solve_dual(constraints, gap)
    assert ours.feasible.tolist() == other.feasible.tolist()
    assert bool(ours.converged.all())
    some = ours.feasible
    found, expected = (one.multipliers(constraints, gap)[some] for one in (ours, other))
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-9)


def test_no_constant_of_the_kernel_differs_from_itself() -> None:
    """Triton compares the constants that it compiled with at every launch: NaN would stop it."""
    from lrqp_torch.qp import kernel

    constants = [v for v in vars(kernel).values() if isinstance(v, triton.language.constexpr)]
    assert len(constants) > 10
    assert all(constant.value == constant.value for constant in constants)


def test_joint_edits_are_the_same() -> None:
    p, q = (random_problem(n_classes, 24, BATCH, seed) for n_classes, seed in ((4, 1), (5, 2)))
    q.covariance = p.covariance
    metric = lrqp.Mahalanobis(p.covariance.to(DEVICE))
    edits = {name: lrqp.LRQP(edit_of(one).probe, metric) for name, one in (("p", p), ("q", q))}
    joint = lrqp.JointLRQP(edits, within={"q": 0.5}, on_infeasible="skip")
    target = {"p": p.target.to(DEVICE), "q": q.target.to(DEVICE)}
    target["q"][0] = joint.KEEP
    x = p.x.to(DEVICE, torch.float32)
    ours = joint.solve(x, target)
    with mock.patch.object(fused, "serves", lambda *_: False):
        other = joint.solve(x, target)
    assert ours.status.tolist() == other.status.tolist()
    assert torch.allclose(ours.distance, other.distance, rtol=1e-6)
    assert torch.allclose(ours.x_new, other.x_new, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["L0.mid", "L1.post"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_joint_edit_in_a_model_is_one_launch_and_the_same(site: str, dtype: torch.dtype) -> None:
    """Variables that are written, kept, kept within a tolerance, and left free."""
    p, q, r = (random_problem(k, 24, 4, seed) for k, seed in ((2, 1), (4, 2), (3, 3)))
    metric = lrqp.Mahalanobis(p.covariance.to(DEVICE))
    rules = {"p": {"log_odds": 2.0}, "q": {"rule": "fixed", "odds": "total"}, "r": {}}
    edits = {
        name: lrqp.LRQP(edit_of(one).probe.float(), metric, **rules[name])  # type: ignore[arg-type]
        for name, one in (("p", p), ("q", q), ("r", r))
    }
    joint = lrqp.JointLRQP(edits, within={"q": 0.5}, on_infeasible="skip")
    model, free, keep = tiny_model(dtype), joint.FREE, joint.KEEP
    ids = torch.randint(50, (4, 5), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    target = {
        "p": torch.tensor([1, 0, keep, keep]),
        "q": torch.tensor([3, keep, 1, free]),
        "r": torch.tensor([keep, 2, free, keep]),
    }
    given: dict[str, Any] = {
        "target": target,
        "source": {"p": torch.tensor([0, 1, 0, 0])},
        "asked": {"r": torch.tensor([3.0, 4.0, 5.0, 6.0])},
        "positions": torch.tensor([1, 4, 2, 3]),
    }
    runs = []
    for by_kernel in (True, False):
        serves = fused.serves if by_kernel else lambda *_: False
        seen = mock.Mock(side_effect=fused.edit_stream)
        with (
            mock.patch.object(fused, "serves", serves),
            mock.patch.object(fused, "edit_stream", seen),
            joint.at(model, site, **given) as run,
        ):
            for _ in range(2):
                captured = lrqp.capture(model, {"input_ids": ids}, site)
        assert seen.call_count == (2 if by_kernel else 0)
        runs.append((run, captured[site]))
    (ours, stream), (other, other_stream) = runs
    coarse = 1e-4 if dtype == torch.float32 else 0.1
    assert torch.allclose(stream, other_stream, rtol=coarse, atol=coarse)
    assert ours.status.tolist() == other.status.tolist() == [1, 1, 1, 0]
    exact = {"rtol": 1e-9, "atol": 1e-6, "equal_nan": True}
    for name in ("log_odds_before", "floor"):
        assert torch.allclose(getattr(ours, name), getattr(other, name), **exact), name
    for name in ("log_odds_after", "distance", "euclidean", "moved"):
        close = {"rtol": coarse, "atol": 20 * coarse, "equal_nan": True}
        assert torch.allclose(getattr(ours, name), getattr(other, name), **close), name
    reached = ours.log_odds_after >= ours.floor
    assert bool((reached | ours.floor.isnan()).all()) and len(ours.steps) == 2
    # What is certified is what the model holds.
    rows = stream[torch.arange(4), given["positions"].to(stream.device)].double()
    for name, place in (("p", 0), ("q", 1), ("r", 2)):
        wanted = target[name].to(rows.device)
        read = edits[name].geometry(rows.device).margins(rows, wanted.clamp_min(0)).amin(-1)
        found = ours.log_odds_after[:, place]
        assert torch.allclose(read[wanted >= 0], found[wanted >= 0], rtol=1e-9, atol=1e-6)
    edits["r"].probe.weight.data[0, 0] += 1e-3
    with (
        pytest.raises(lrqp.errors.NonFiniteError, match=r"changed through \.data"),
        joint.at(model, site, **given),
    ):
        model(ids)
    # A change that leaves a trace is another edit.
    with torch.no_grad():
        edits["r"].probe.weight.mul_(1.5)
    with joint.at(model, site, **given) as run:
        model(ids)
    assert run.status.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_near_equal_classes_of_several_variables_keep_their_digits(dtype: torch.dtype) -> None:
    p, q = (pairs_apart(random_problem(k, 24, 4, seed), 1e-6) for k, seed in ((4, 2), (3, 3)))
    metric = lrqp.Mahalanobis(p.covariance.to(DEVICE))
    edits = {name: lrqp.LRQP(edit_of(one).probe, metric) for name, one in (("p", p), ("q", q))}
    joint = lrqp.JointLRQP(edits, on_infeasible="skip")
    model, ids = tiny_model(dtype), torch.randint(50, (4, 5)).to(DEVICE)
    target = {"p": torch.tensor([0, 1, 2, 3]), "q": torch.tensor([joint.KEEP, 0, 1, 2])}
    runs = []
    for serves in (fused.serves, lambda *_: False):
        with (
            mock.patch.object(fused, "serves", serves),
            joint.at(model, "L1.post", target=target, positions=2) as run,
        ):
            model(ids)
        runs.append(run)
    ours, other = runs
    assert ours.status.tolist() == other.status.tolist() and Status.SOLVED in ours.status.tolist()
    torch.testing.assert_close(ours.distance, other.distance, rtol=1e-5, atol=1e-9)


def test_a_launch_of_several_variables_is_done_again_with_what_they_hold_now() -> None:
    """Their weights, biases and least odds are put together anew, also after changes unseen."""
    model = tiny_model(torch.float32, 32)
    found = []
    for repeats in (True, False):
        p, q = (random_problem(k, 32, 4, seed) for k, seed in ((2, 1), (4, 2)))
        metric = lrqp.Mahalanobis(p.covariance.to(DEVICE))
        edits = {name: lrqp.LRQP(edit_of(one).probe, metric) for name, one in (("p", p), ("q", q))}
        joint = lrqp.JointLRQP(edits, on_infeasible="skip")
        made = record._Launch.of if repeats else lambda *_: None
        seen = mock.Mock(side_effect=fused.edit_stream)
        given: dict[str, Any] = {"target": {"p": 1, "q": 2}, "asked": {"q": 6.0}}
        with (
            nullcontext() if DEVICE == "cuda" else launched_by_address(),
            mock.patch.object(record._Launch, "of", made),
            mock.patch.object(fused, "edit_stream", seen),
            joint.at(model, "L0.mid", positions=torch.tensor([1, 3]), **given) as run,
        ):
            ids = torch.randint(50, (2, 4), generator=torch.Generator().manual_seed(1)).to(DEVICE)
            model(ids)
            model(ids)
            joint.edits[0].log_odds.data.fill_(12.0)  # type: ignore[union-attr,operator]
            model(ids)
            assert seen.call_count == (1 if repeats else 3)
            with torch.no_grad():
                edits["q"].probe.weight.mul_(1.25)
            logits = model(ids).logits
        assert seen.call_count == (2 if repeats else 4)
        names = "log_odds_before", "log_odds_after", "floor", "distance", "status"
        steps = [torch.stack([*step.log_odds_after.T, step.distance]) for step in run.steps]
        found.append([logits, *steps, *(getattr(run, name) for name in names)])
        assert run.floor[:, 0].tolist() == [12.0, 12.0] and run.floor[:, 1].tolist() == [6.0, 6.0]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("n_classes", [2, 4])
def test_derivatives_of_every_order(n_classes: int) -> None:
    p = random_problem(n_classes, 6, 2, 11)
    qp = MahalanobisQP(n_classes)
    target, floor = p.target.to(DEVICE), (p.floor + 4).to(DEVICE)

    def edited(x: Tensor, w: Tensor, b: Tensor, root: Tensor, floor: Tensor) -> tuple[Tensor, ...]:
        solution = qp(x, target, floor, w, b, root @ root.mT)
        return solution.x_new, solution.squared_distance

    root = torch.linalg.cholesky(p.covariance)
    inputs = [t.to(DEVICE).requires_grad_() for t in (p.x, p.weight, p.bias, root, floor)]
    solution = qp(inputs[0], target, floor, *inputs[1:3], p.covariance.to(DEVICE))
    assert bool((solution.status == Status.SOLVED).all())
    assert gradcheck(edited, inputs, fast_mode=True)
    assert gradgradcheck(edited, inputs, fast_mode=True)
