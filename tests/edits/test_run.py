"""The record of an edit: what was read before, what was written, and what the stream holds."""

import copy
import pickle
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from models_for_tests import POST_MODELS, Prompts, build, hook_count, random_edit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import lrqp_torch as lrqp
from lrqp_torch.baselines import NoEdit
from lrqp_torch.errors import (
    EditNeverFiredError,
    EditOverwrittenWarning,
    InfeasibleError,
    LRQPError,
    NonFiniteError,
    TargetError,
    WidthError,
)
from lrqp_torch.qp import native

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")

PROMPTS = Prompts.random([7, 4, 9, 6])
TOKENS = torch.tensor([[0, 3], [1, 3], [2, 8], [5, 3]])
AT = PROMPTS.columns(TOKENS, "left")
RECORDED = (
    "log_odds_before",
    "log_odds_after",
    "odds_before",
    "odds_after",
    "floor",
    "distance",
    "euclidean",
    "status",
    "kkt_residual",
)


def edit_of(model: nn.Module, site: str, n_classes: int = 3, **options: object) -> lrqp.LRQP:
    inputs = PROMPTS.padded("left")
    x = lrqp.capture(model, inputs, [site], inputs["attention_mask"].bool())[site]
    return random_edit(x, n_classes, **options)


@pytest.mark.parametrize("kind", ["lrqp", "baseline", "joint", "function"])
def test_what_an_edit_refuses_is_said_with_its_site(kind: str) -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    for site, other in (("L1.mid", "L1.H1.z"), ("L1.H1.z", "L1.mid")):
        edit: Any = edit_of(model, site, 2)
        width, found = edit.metric.width, edit_of(model, other, 2).metric.width
        if kind == "function":
            item = lrqp.Intervention(other, "last", lambda x, _, w=width: x.new_zeros(len(x), w))
            message = rf"edit at {other} returned \(4, {width}\) for activations \(4, {found}\)"
        else:
            edit = NoEdit(edit) if kind == "baseline" else edit
            edit = lrqp.JointLRQP({"a": edit}, edit.metric) if kind == "joint" else edit
            target: Any = {"a": 1} if kind == "joint" else 1
            item = edit.on(other, positions="last", target=target)
            message = rf"edit at {other}: activations must be \(B, {width}\), got \(4, {found}\)"
        with pytest.raises(WidthError, match=message), lrqp.intervene(model, [item]):
            model(**inputs)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.bias[3] = torch.inf
    if kind != "function":
        item = edit.on("L1.H1.z", positions="last", target=target)
        with (
            pytest.raises(NonFiniteError, match=r"edit at L1\.H1\.z: activations of 4 of 4"),
            lrqp.intervene(model, [item]),
        ):
            model(**inputs)


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("site", ["L0.pre", "L1.mid", "L2.post"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_record_is_the_solution_at_the_clean_activations(
    name: str, site: str, dtype: torch.dtype
) -> None:
    model, inputs = build(name, dtype=dtype), PROMPTS.padded("left")
    edit = edit_of(model, site)
    at, target = AT[:, 0], torch.tensor([0, 2, 1, 2])
    x = lrqp.capture(model, inputs, [site], at)[site]
    solution = edit.solve(x, target)
    with edit.at(model, site, positions=at, target=target) as run:
        model(**inputs)
        held = lrqp.capture(model, inputs, [site], at)[site].double()
    exact = {"rtol": 1e-9, "atol": 1e-9}
    # Written through an attention output, mid rounds otherwise than the solution by itself.
    rounded = (
        exact if not site.endswith("mid") else {"rtol": 20 * torch.finfo(dtype).eps, "atol": 1e-4}
    )
    torch.testing.assert_close(run.log_odds_before, solution.log_odds_before, **exact)
    torch.testing.assert_close(
        run.log_odds_before, edit.probe.log_odds(x.double(), target), **exact
    )
    torch.testing.assert_close(run.floor, solution.floor, **exact)
    torch.testing.assert_close(run.distance, solution.distance, **rounded)
    torch.testing.assert_close(run.euclidean, solution.euclidean, **rounded)
    assert torch.equal(run.status, solution.status)
    assert bool((run.status == lrqp.Status.SOLVED).any())
    # What the record says was done is what was done to the stream.
    moved = held - x.double()
    near = {"rtol": 0.01, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(run.euclidean, moved.norm(dim=-1), **near)
    if dtype == torch.float32:
        torch.testing.assert_close(run.distance, edit.metric.distance(moved), **near)
    torch.testing.assert_close(run.log_odds_after, edit.probe.log_odds(held, target), **exact)
    torch.testing.assert_close(run.odds_after, run.log_odds_after.exp(), **exact)
    torch.testing.assert_close(run.odds_before, run.log_odds_before.exp(), **exact)
    assert bool((run.kkt_residual < 1e-8).all())


@pytest.mark.parametrize("name", POST_MODELS)
@torch.no_grad()
def test_every_position_has_its_own_target(name: str) -> None:
    """Targets as one number, one an example, and one a position say the same thing."""
    model, inputs, site = build(name), PROMPTS.padded("left"), "L1.mid"
    edit = edit_of(model, site)
    target = torch.tensor([[0, 1], [2, 0], [1, 1], [2, 2]])
    with edit.at(model, site, positions=AT, target=target) as run:
        model(**inputs)
        held = lrqp.capture(model, inputs, [site], AT)[site].double()
    odds = edit.probe.log_odds(held, target)
    assert bool((odds >= run.floor).all())
    assert torch.equal(edit.probe(held).argmax(-1), target)

    def logits(positions: Tensor, target: Tensor | int) -> Tensor:
        with edit.at(model, site, positions=positions, target=target):
            return model(**inputs).logits

    one = logits(AT, 1)
    assert torch.equal(one, logits(AT, torch.full((4,), 1)))
    assert torch.equal(one, logits(AT, torch.full((4, 2), 1)))
    each = torch.tensor([0, 2, 1, 2])
    by_example = logits(AT, each)
    assert torch.equal(by_example, logits(AT, each[:, None].expand(4, 2)))
    assert not torch.equal(by_example, one)
    # The same positions and targets as a mask.
    mask = torch.zeros(4, 9, dtype=torch.bool).scatter(1, AT, True)
    table = torch.zeros(4, 9, dtype=torch.long).scatter(1, AT, target)
    torch.testing.assert_close(logits(mask, table), logits(AT, target), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(mask, each), by_example, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(mask, 1), one)


@torch.no_grad()
def test_sources_have_the_same_shapes_and_set_the_floor() -> None:
    model, inputs, site = build("gpt2"), PROMPTS.padded("left"), "L1.mid"
    edit = edit_of(model, site, log_odds=1.0)
    z = edit.probe(lrqp.capture(model, inputs, [site], AT)[site].double())
    source = torch.tensor([[0, 1], [2, 0], [1, 1], [2, 2]])
    for given in (source, source[:, 0], 2):
        each = torch.as_tensor(given)
        each = (each[:, None] if each.ndim == 1 else each).expand(4, 2)
        expected = (z.gather(-1, each[..., None])[..., 0] - z[..., 1]).clamp_min(1.0)
        with edit.at(model, site, positions=AT, target=1, source=given) as run:
            model(**inputs)
        torch.testing.assert_close(run.floor, expected)


@torch.no_grad()
def test_shapes_are_those_of_the_positions() -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    edit = edit_of(model, "L1.mid")
    mask = inputs["attention_mask"].bool()
    for positions, shape in ((AT[:, 0], (4,)), (AT, (4, 2)), (mask, (26,))):
        with edit.at(model, "L1.mid", positions=positions, target=1) as run:
            model(**inputs)
        for name in RECORDED:
            assert getattr(run, name).shape == shape, name
            assert bool(torch.isfinite(getattr(run, name)).all()), name


@torch.no_grad()
def test_the_record_is_that_of_the_last_forward_pass() -> None:
    model, edit = build("gpt2"), edit_of(build("gpt2"), "L1.mid")
    other = Prompts.random([7, 4, 9, 6], seed=3).padded("left")
    with edit.at(model, "L1.mid", positions=AT, target=1) as run:
        model(**PROMPTS.padded("left"))
        first = run.log_odds_before
        model(**other)
    x = lrqp.capture(model, other, ["L1.mid"], AT)["L1.mid"].flatten(0, 1)
    expected = edit.solve(x, 1)
    assert not torch.allclose(run.log_odds_before, first)
    assert torch.equal(run.log_odds_before.flatten(), expected.log_odds_before)


@torch.no_grad()
def test_steps_of_a_context_outlive_the_next() -> None:
    model, edit = build("gpt2"), edit_of(build("gpt2"), "L1.mid")
    item, kept = edit.on("L1.mid", positions=AT, target=1), []
    for seed in (0, 3):
        with lrqp.intervene(model, item) as (run,):
            model(**Prompts.random([7, 4, 9, 6], seed=seed).padded("left"))
        kept.append((run.steps[0].distance, run.distance.flatten()))
    for step, read in kept:
        assert torch.equal(step, read)
    assert not torch.equal(*(step for step, _ in kept))


def test_an_edit_that_another_overwrites_is_warned_of() -> None:
    """Its record would tell of odds that the stream does not hold."""
    model = build("gpt2")
    edit = edit_of(model, "L1.mid")

    def opened(*items: lrqp.Intervention) -> None:
        with pytest.raises(EditNeverFiredError), lrqp.intervene(model, items):
            pass

    def item(site: str, at: Any, target: int = 1) -> lrqp.Intervention:
        return edit.on(site, positions=at, target=target)

    push = lrqp.Intervention("L1.mid", AT[:, :1], lambda x, context: x + 1)
    for first, second in (
        (item("L1.mid", AT), item("L1.mid", AT[:, 0], target=0)),
        (item("L1.mid", AT), push),
        (item("L1.mid", slice(1, 3)), item("L1.mid", slice(1, 3))),
    ):
        with pytest.warns(
            EditOverwrittenWarning, match=r"0 and 1 write the same tokens at L1\.mid"
        ):
            opened(first, second)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(push, item("L1.mid", AT))
        opened(item("L1.mid", AT[:, 0]), item("L1.mid", AT[:, 1]))
        opened(item("L1.mid", AT), item("L1.post", AT))


@torch.no_grad()
def test_a_record_is_copied_within_its_context_and_after() -> None:
    """Also after passes that compiled code has written of."""
    model = build("gpt2")
    edit, inputs, copies = edit_of(model, "L1.mid"), PROMPTS.padded("left"), []
    with edit.at(model, "L1.mid", positions=AT, target=1) as run:
        for _ in range(5):
            model(**inputs)
            copies += [pickle.loads(pickle.dumps(run)), copy.deepcopy(run)]
    copies += [pickle.loads(pickle.dumps(run)), copy.deepcopy(run)]
    assert [len(one.steps) for one in copies] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5]
    for one in copies:
        assert torch.equal(one.log_odds_after, run.log_odds_after)
        assert torch.equal(one.distance, run.distance)
    assert len(run.steps) == 5


def test_reading_before_running_is_an_error() -> None:
    model = build("gpt2")
    edit = edit_of(model, "L1.mid")
    with edit.at(model, "L1.mid", positions=AT, target=1) as run:
        for name in (*RECORDED, "n_unreached"):
            with pytest.raises(EditNeverFiredError, match="8 of 8 positions have not run yet"):
                getattr(run, name)
        with torch.no_grad():
            model(**PROMPTS.padded("left"))
        assert run.n_unreached == 0


def test_the_record_carries_no_graph() -> None:
    model = build("gpt2")
    edit = edit_of(model, "L1.mid")
    edit.requires_grad_(True)
    with edit.at(model, "L1.mid", positions=AT, target=1) as run:
        assert model(**PROMPTS.padded("left")).logits.requires_grad
    assert not any(getattr(run, name).requires_grad for name in RECORDED)


def with_unreachable_class(model: nn.Module, site: str, **options: object) -> lrqp.LRQP:
    """Class 2 has the weights of class 1 and a far smaller bias: it can never win."""
    edit = edit_of(model, site, **options)
    edit.probe.weight[2] = edit.probe.weight[1]
    edit.probe.bias[2] = edit.probe.bias[1] - 1000
    return edit


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("site", ["L1.pre", "L1.mid", "L1.post"])
@torch.no_grad()
def test_skip_leaves_unreachable_rows_bit_for_bit_and_counts_them(name: str, site: str) -> None:
    model, inputs = build(name, dtype=torch.bfloat16), PROMPTS.padded("left")
    edit = with_unreachable_class(model, site, on_infeasible="skip")
    at, target = AT[:, 1], torch.tensor([2, 0, 2, 0])
    before = lrqp.capture(model, inputs, [site], at)[site]
    target[1::2] = edit.probe(before.double())[1::2, :2].argmin(-1)  # reachable, and not held
    clean = model(**inputs).logits
    with edit.at(model, site, positions=at, target=target) as run:
        edited = model(**inputs).logits
        after = lrqp.capture(model, inputs, [site], at)[site]
    for skipped in (0, 2):
        assert torch.equal(after[skipped], before[skipped])
        assert torch.equal(edited[skipped], clean[skipped])
        assert run.status[skipped] == lrqp.Status.INFEASIBLE
        assert run.distance[skipped] == run.euclidean[skipped] == 0
        assert run.log_odds_after[skipped] == run.log_odds_before[skipped]
    assert run.n_unreached == 2
    for index in (1, 3):
        assert not torch.equal(after[index], before[index])
        assert run.status[index] == lrqp.Status.SOLVED


@torch.no_grad()
def test_an_unreachable_target_raises_with_the_examples_and_leaves_no_hooks() -> None:
    model = build("gpt2")
    edit = with_unreachable_class(model, "L1.mid")
    with (
        pytest.raises(InfeasibleError, match=r"target class \[2\] for 2 examples.*\[1, 3\]"),
        edit.at(model, "L1.mid", positions=AT[:, 0], target=torch.tensor([0, 2, 0, 2]), source=0),
    ):
        model(**PROMPTS.padded("left"))
    assert hook_count(model) == 0


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a forward pass does not wait to know how an edit went."""
    for module in (lrqp.edits.lrqp, lrqp.stream.intervene):
        monkeypatch.setattr(module, "readable", lambda tensor: False)


@torch.no_grad()
def test_without_waiting_the_record_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    edit, runs = edit_of(model, "L1.mid"), []
    for waits in (True, False):
        monkeypatch.setattr(lrqp.edits.lrqp, "readable", lambda tensor, waits=waits: waits)
        with edit.at(model, "L1.mid", positions=AT, target=1, source=2) as run:
            model(**inputs)
        runs.append(run)
    for name in RECORDED:
        assert torch.equal(getattr(runs[0], name), getattr(runs[1], name)), name


@torch.no_grad()
def test_a_failure_that_was_not_waited_for_is_raised_when_the_context_closes(late: None) -> None:
    model = build("gpt2")
    edit = with_unreachable_class(model, "L1.mid")
    finished = []
    target = torch.tensor([0, 2, 0, 2])
    with (
        pytest.raises(InfeasibleError, match=r"target class \[2\] for 2 examples.*\[1, 3\]"),
        edit.at(model, "L1.mid", positions=AT[:, 0], target=target, source=0) as run,
    ):
        model(**PROMPTS.padded("left"))
        # Another pass does not make the failure forgotten, and reading the record tells it.
        model(**Prompts.random([7, 4, 9, 6], seed=3).padded("left"))
        with pytest.raises(InfeasibleError):
            run.distance  # noqa: B018
        finished.append(True)
    assert finished
    assert hook_count(model) == 0


@torch.no_grad()
def test_skipped_failures_are_no_errors_without_waiting_either(late: None) -> None:
    model = build("gpt2")
    edit = with_unreachable_class(model, "L1.mid", on_infeasible="skip")
    with edit.at(model, "L1.mid", positions=AT[:, 0], target=2) as run:
        model(**PROMPTS.padded("left"))
    assert run.n_unreached > 0


@torch.no_grad()
def test_an_edit_of_nan_is_raised_when_the_context_closes(late: None) -> None:
    model, done = build("gpt2"), []
    item = lrqp.Intervention("L1.mid", AT[:, 0], lambda x, context: x / 0)
    with pytest.raises(NonFiniteError, match=r"L1\.mid"), lrqp.intervene(model, item):
        model(**PROMPTS.padded("left"))
        done.append(True)
    assert done


def test_a_class_that_does_not_exist_is_found_before_anything_runs() -> None:
    model = build("gpt2")
    edit = edit_of(model, "L1.mid")
    for wrong in ({"target": 3}, {"target": 0, "source": torch.tensor([0, 1, 7, 0])}):
        with pytest.raises(TargetError):
            edit.on("L1.mid", positions=AT, **wrong)


def by_operations(patch: pytest.MonkeyPatch) -> None:
    """Let hooks edit by the operations that a pass takes where there is no compiler."""
    patch.setattr(lrqp.LRQP, "line", lambda edit: None)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("site", ["L1.pre", "L1.mid"])
@pytest.mark.parametrize("n_classes", [2, 5])
@torch.no_grad()
def test_one_call_a_pass_writes_what_the_operations_write_bit_for_bit(
    dtype: torch.dtype, site: str, n_classes: int
) -> None:
    model, inputs = build("gpt2", dtype=dtype), PROMPTS.padded("right")
    edit = edit_of(model, site, n_classes, log_odds=1.0)
    found = []
    for operations in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            by_operations(patch) if operations else None
            for positions, source in (([3, 2, 5, 1], None), ("all", 1)):
                with edit.at(model, site, positions=positions, target=0, source=source) as run:
                    logits = model(**inputs).logits
                assert (run._line is None) == operations
                record = [getattr(run, name) for name in RECORDED]
                found.append((logits, run.example, run.token, *record))
    for one, other in zip(found[:2], found[2:], strict=True):
        assert torch.equal(one[0], other[0])
        torch.testing.assert_close(one[1:], other[1:], rtol=1e-12, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_classes", [2, 5])
@torch.no_grad()
def test_floors_that_are_given_go_by_one_call_too(dtype: torch.dtype, n_classes: int) -> None:
    """In a model and outside, bit for bit; what a tensor of them holds is read in each pass."""
    model, inputs = build("gpt2", dtype=dtype), PROMPTS.padded("right")
    edit, each = edit_of(model, "L1.mid", n_classes), torch.tensor([2.0, 3.5, 0.5, 4.0])
    positions, target = torch.tensor([3, 2, 5, 1]), torch.tensor([0, 1, 1, 0])
    x = lrqp.capture(model, inputs, ["L1.mid"], positions)["L1.mid"]
    for asked in (3.0, each, each.double()[0], each.double()):
        found = []
        for operations in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                by_operations(patch) if operations else None
                patch.setattr(lrqp.LRQP, "_own_line", lambda edit: None) if operations else None
                solution = edit.solve(x, target, asked=asked)
                where = {"positions": positions, "target": target}
                with edit.at(model, "L1.mid", **where, asked=asked) as run:
                    logits = [model(**inputs).logits]
                    floor = run.floor
                    if isinstance(asked, Tensor):
                        asked.add_(1)
                        logits.append(model(**inputs).logits)
                        asked.sub_(1)
                assert (run._line is None) == operations
                torch.testing.assert_close(floor, torch.as_tensor(asked).double().expand(4))
                found.append((torch.stack(logits), vars(solution), run.log_odds_after))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1]["x_new"], found[1][1]["x_new"])
        torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-12, atol=1e-12)


@needs_compiler
@torch.no_grad()
def test_floors_that_are_wrong_raise_what_they_did() -> None:
    edit, x = random_edit(torch.randn(40, 6), 3), torch.randn(4, 6)
    for wrong in (torch.nan, torch.tensor([1.0, torch.inf, 1.0, 1.0])):
        with pytest.raises(NonFiniteError):
            edit.solve(x, 1, asked=wrong)
    with pytest.raises(WidthError, match="asked"):
        edit.solve(x, 1, asked=torch.ones(3))
    for target, source in ((3, None), (0, 3), (torch.tensor([0, 1, 2, 3]), None)):
        with pytest.raises(TargetError):
            edit.solve(x, target, source)
    with pytest.raises(TargetError):
        edit.solve(x, 0, torch.tensor([0, -1, 1, 0]))
    kept = edit.solve(x, 0, torch.tensor([0, 1, 1, 2]))
    assert torch.equal(
        kept.x_new,
        edit.qp.solve(
            x,
            torch.zeros(4, dtype=torch.long),
            edit._odds_rule(torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 1, 2])),
            edit.geometry(x.device),
        ).x_new,
    )


@needs_compiler
def test_what_is_solved_follows_what_the_edit_holds() -> None:
    """One call for as long as nothing changes: whatever does is seen by the next solve."""
    edit, x = random_edit(torch.randn(40, 6), 3), torch.randn(4, 6)
    changes = {
        "weights through .data": lambda: edit.probe.weight.data.mul_(1.5),
        "a bias of its own": lambda: setattr(
            edit.probe, "bias", nn.Parameter(-edit.probe.bias, requires_grad=False)
        ),
        "covariance": lambda: edit.metric.covariance.diagonal().add_(torch.arange(6)),
        "least odds": lambda: edit.log_odds.fill_(4.0),
        "rule": lambda: setattr(edit, "rule", "fixed"),
        "precision": lambda: edit.probe.double(),
    }
    before = edit.solve(x, 1).x_new
    line = edit._line
    assert line is not None and edit.solve(x, 1) and edit._line is line
    for name, change in changes.items():
        change()
        found, fresh = edit.solve(x, 1).x_new, edit.like(edit.probe, edit.metric)
        assert torch.equal(found, fresh.solve(x, 1).x_new), name
        assert not torch.equal(found, before) or name == "precision", name
        before = found
    edit.probe.requires_grad_(True)
    solved = edit.solve(x, 1)
    assert solved.x_new.requires_grad and torch.equal(solved.x_new, before)
    with torch.inference_mode():
        assert torch.equal(edit.solve(x, 1).x_new, before)
    assert torch.equal(torch.func.vmap(lambda row: edit(row[None], 1)[0])(x).detach(), before)


@needs_compiler
@torch.no_grad()
def test_what_changes_between_two_passes_is_seen() -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("right")
    edit = edit_of(model, "L1.pre", 2)
    mask = inputs["attention_mask"]

    def halve(tensor: Tensor) -> None:
        tensor.data = tensor.data / 2

    changes = {
        "nothing": lambda: None,
        "weights in place": lambda: edit.probe.weight.mul_(1.5),
        "weights through .data": lambda: edit.probe.weight.data.mul_(1.5),
        "other weights": lambda: halve(edit.probe.weight),
        "bias": lambda: edit.probe.bias.add_(0.5),
        "a parameter of its own": lambda: setattr(
            edit.probe, "weight", nn.Parameter(-edit.probe.weight, requires_grad=False)
        ),
        "precision": lambda: edit.probe.double(),
        "covariance": lambda: edit.metric.covariance.mul_(3),
        "another covariance": lambda: halve(edit.metric.covariance),
        "least odds": lambda: edit.log_odds.fill_(4.0),
        "least odds through .data": lambda: edit.log_odds.data.fill_(5.0),
        "rule": lambda: setattr(edit, "rule", "fixed"),
        "the model's precision": lambda: model.double(),
        "tokens": lambda: inputs["input_ids"].copy_(inputs["input_ids"].flip(0)),
    }
    with edit.at(model, "L1.pre", positions=[3, 2, 5, 1], target=1) as run:
        for name, change in changes.items():
            change()
            seen, odds = model(**inputs).logits, run.log_odds_after
            assert run._line is not None, name
            with pytest.MonkeyPatch.context() as patch:
                by_operations(patch)
                assert torch.equal(model(**inputs).logits, seen), name
            torch.testing.assert_close(run.log_odds_after, odds, rtol=1e-12, atol=1e-12)
            assert bool((odds >= run.floor).all()), name
        with pytest.MonkeyPatch.context() as patch:
            replaced = mock.Mock(side_effect=edit.solve)
            patch.setattr(edit, "solve", replaced)
            model(**inputs)
            assert replaced.called and run._line is None
        mask[1, 2:] = 0
        with pytest.raises(lrqp.errors.PositionError, match="padding"):
            model(**inputs)


@needs_compiler
def test_a_step_of_training_between_two_passes_goes_by_operations_and_back() -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("right")
    edit = edit_of(model, "L1.pre", 2)
    with edit.at(model, "L1.pre", positions=[3, 2, 5, 1], target=1) as run:
        for _ in range(2):
            with torch.no_grad():
                held = model(**inputs).logits
            trained = model(**inputs).logits
            torch.testing.assert_close(trained, held)
            trained.square().mean().backward()
            with torch.no_grad():
                for part in model.parameters():
                    part.sub_(0.01 * part.grad)
        assert [len(step) for step in run.steps] == [4, 4, 4, 4]


@needs_compiler
@torch.no_grad()
def test_what_is_to_raise_or_be_skipped_is_so_with_one_call_too() -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("right")
    edit = with_unreachable_class(model, "L1.pre")
    with edit.at(model, "L1.pre", positions=[3, 2, 5, 1], target=0) as run:
        model(**inputs)
        assert run._line is not None
    with (
        pytest.raises(InfeasibleError, match="4 examples"),
        edit.at(model, "L1.pre", positions=[3, 2, 5, 1], target=2),
    ):
        model(**inputs)


@pytest.mark.parametrize("record", [True, False])
def test_keeping_a_step_waits_for_no_device(record: bool) -> None:
    """Nothing whose size or course depends on values, for which a GPU would have to stop."""

    class NoLooking(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = function.overloadpacket.__name__
            assert name not in ("_local_scalar_dense", "nonzero", "masked_select"), name
            return function(*args, **(kwargs or {}))

    edit = random_edit(torch.randn(40, 6), 3)
    run = edit.on("L1.mid", positions=torch.tensor([3, 8, 8, 8]), target=0, record=record).edit
    index, x = torch.arange(4), torch.randn(4, 6)
    context = lrqp.EditContext(index, index, index, lambda values: values)
    solution = edit.solve(x, 0)
    edit.edit_rows = lambda *given, **options: solution  # type: ignore[method-assign]
    for _ in range(3):
        with NoLooking():
            run(x, context)
    if record:
        assert len(run.steps[0]) == 12
        assert torch.equal(run.distance, solution.distance)


@pytest.mark.parametrize("positions", ["fixed", "generated", "all", "prompt"])
@torch.no_grad()
def test_hooks_wait_for_no_device(positions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, nothing whose size or course depends on values is asked for in a pass."""

    class NoLooking(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = function.overloadpacket.__name__
            assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), name
            return function(*args, **(kwargs or {}))

    def guarded(added: Any, *args: Any) -> Any:
        with NoLooking():
            return called(added, *args)

    def solved(*rows: Any, **more: Any) -> Any:
        with _disable_current_modes():  # which is not what is tested here
            return type(edit).edit_rows(edit, *rows, **more)

    model, inputs = build("llama"), PROMPTS.padded("left")
    del inputs["position_ids"]
    edit, found = edit_of(model, "L1.mid"), []
    # What would be looked at on the host is; a pass of fixed positions is held against no mask.
    where = AT[:, 0] if positions == "fixed" else positions
    given = {"input_ids": inputs["input_ids"]} if positions == "fixed" else inputs
    called = lrqp.stream.watch._Added.__call__
    for waits in (True, False):
        add = lrqp.Intervention("L1.pre", where, lambda x, context: x + 1)
        with lrqp.intervene(model, [edit.on("L1.mid", positions=where, target=1), add]) as (run, _):
            if not waits:
                for module in (lrqp.stream.intervene, lrqp.stream.following, lrqp.edits.lrqp):
                    monkeypatch.setattr(module, "readable", lambda tensor: False)
                monkeypatch.setattr(edit, "edit_rows", solved)
                by_operations(monkeypatch)
                monkeypatch.setattr(lrqp.stream.watch._Added, "__call__", guarded)
            logits = (
                model(**given).logits
                if positions == "fixed"
                else model.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=0)
            )
            monkeypatch.undo()
        found.append((logits, run.token, run.distance, run.status))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_a_long_generation_costs_constant_time_a_pass_and_little_memory() -> None:
    """Numbers written in a pass do not grow with the passes before; 200 bytes a token."""

    class Written(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found = function(*args, **(kwargs or {}))
            alias = function._schema.returns[0].alias_info if isinstance(found, Tensor) else None
            if isinstance(found, Tensor) and (alias is None or alias.is_write):
                self.numbers += found.numel()
            return found

    edit = random_edit(torch.randn(40, 6), 2)
    x, rows = torch.randn(2, 6), torch.arange(2)
    solution = edit.solve(x, 1)
    edit.edit_rows = lambda *given, **options: solution  # type: ignore[method-assign]
    passes, written = 2000, []
    positions = torch.arange(passes).expand(2, -1)
    run = edit.on("L1.mid", positions=positions, target=1).edit
    for number in range(passes):
        places = rows * passes + number, rows, rows + number
        context = lrqp.EditContext(*places, lambda v: v, forward_pass=number)
        with Written() as mode:
            run(x, context)
        written.append(mode.numbers)
    # Most passes only keep what was stored; rows are made of many at once.
    assert sorted(written)[passes // 2] == sorted(written[:20])[10]
    assert sum(written[passes // 2 :]) < 2 * sum(written[: passes // 2]) < 200 * passes
    assert run.nbytes <= 200 * len(run.positions)
    assert len(run.steps) == passes and run.distance.shape == (2, passes)


@torch.no_grad()
def test_a_record_can_be_switched_off(late: None) -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    edit = edit_of(model, "L1.mid")
    logits = []
    for record in (True, False):
        with edit.at(model, "L1.mid", positions=AT, target=1, record=record) as run:
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits)
    assert repr(run) == "EditRun(no record)" and run.nbytes < 1000
    for read in (lambda: run.distance, lambda: run.steps, run.summary):
        with pytest.raises(LRQPError, match="record=False"):
            read()
    # What failed is said all the same, after other passes too.
    unreachable, target = with_unreachable_class(model, "L1.mid"), torch.tensor([0, 2, 0, 0])
    with (
        pytest.raises(InfeasibleError, match=r"target class \[2\] for 1 examples, first \[1\]"),
        unreachable.at(model, "L1.mid", positions=AT[:, 0], target=target, source=0, record=False),
    ):
        model(**inputs)
        model(**Prompts.random([7, 4, 9, 6], seed=3).padded("left"))


def test_a_record_begun_in_inference_mode_goes_on_outside_of_it() -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    edit = edit_of(model, "L1.mid")
    with edit.at(model, "L1.mid", positions=AT, target=1) as run:
        with torch.inference_mode():
            model(**inputs)
        with torch.no_grad():
            model(**inputs)
    first, second = run.steps
    assert torch.equal(first.distance, second.distance) and not run.distance.is_inference()


@pytest.mark.parametrize("record", [True, False])
def test_transforms_of_torch_func_go_through_an_edited_model(record: bool) -> None:
    model = build("llama", attention="eager")
    edit = edit_of(model, "L1.mid")
    ids = torch.stack([tokens[:4] for tokens in PROMPTS.tokens])
    embedded = model.get_input_embeddings()(ids).detach()

    def loss(embeddings: Tensor) -> Tensor:
        return model(inputs_embeds=embeddings).logits[:, -1].square().sum()

    def of_one(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (row[None],)).logits[0, -1].sum()

    where = {"target": 1, "record": record}
    with edit.at(model, "L1.mid", positions=torch.full((4,), 2), **where) as run:
        point = embedded.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(loss(point), point)
        found = torch.func.grad(loss)(embedded)
        _, slope = torch.func.jvp(loss, (embedded,), (torch.ones_like(embedded),))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slope, wanted.sum(), rtol=1e-3, atol=1e-3)
    if record:
        assert len(run.steps) == 3
        torch.testing.assert_close(run.steps[0].distance, run.steps[1].distance, rtol=1e-5, atol=0)
    parameters = dict(model.named_parameters())
    with edit.at(model, "L1.mid", positions=torch.tensor([2]), **where):
        each = torch.func.vmap(torch.func.grad(of_one), (None, 0))(parameters, ids)
        for row in range(4):
            alone = torch.autograd.grad(of_one(parameters, ids[row]), list(parameters.values()))
            for gradient, expected in zip(each.values(), alone, strict=True):
                torch.testing.assert_close(gradient[row], expected, rtol=1e-3, atol=1e-3)


def test_a_notebook_shows_what_an_edit_is_and_did() -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    edit = edit_of(model, "L1.mid")
    x = lrqp.capture(model, inputs, ["L1.mid"], AT[:, 0])["L1.mid"]
    solved = edit.solve(x, 1)._repr_html_()
    with edit.at(model, "L1.mid", positions=AT[:, 0], target=1) as run:
        assert "0 of 4 positions" in run._repr_html_()
        model(**inputs)
    assert all(word in edit._repr_html_() for word in ("rule", "mirror", "shrinkage", ">K<"))
    for shown in (solved, run._repr_html_()):
        assert "worst margin" in shown and "before" in shown and "lengths of 4" in shown


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@torch.no_grad()
def test_classes_of_any_integer_dtype_are_those_that_are_written(dtype: torch.dtype) -> None:
    """Compiled code reads them as int64, of which there must be as many."""
    model, inputs = build("gpt2"), PROMPTS.padded("right")
    edit = edit_of(model, "L1.mid", 2)
    for positions in ([3, 2, 5, 1], "prompt"):
        for target in ([1, 0, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0]):
            found = []
            for kind in (torch.int64, dtype):
                classes = torch.tensor([*target, 0, 0, 0, 0]).to(kind)[:4]
                given = {"target": classes, "source": 1 - classes}
                with edit.at(model, "L1.mid", positions=positions, **given) as run:
                    assert run._target.dtype == run._source.dtype == torch.int64
                    logits = model(**inputs).logits
                found.append((logits, run.log_odds_before, run.log_odds_after, run.floor))
            for one, other in zip(*found, strict=True):
                assert torch.equal(one, other)
