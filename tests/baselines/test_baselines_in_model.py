"""Every baseline inside a tiny GPT-2, and the call that all of them share."""

import copy
from functools import cache

import pytest
import torch
from baselines_for_tests import SITE, Setting, setting
from models_for_tests import hook_count
from torch import Tensor

import lrqp_torch as lrqp
from lrqp_torch.baselines import BASELINES, Baseline, BaselineData, Paired, build
from lrqp_torch.errors import (
    EditNeverFiredError,
    LabelError,
    NonFiniteError,
    PairError,
    SettingError,
    TargetError,
    WidthError,
)

NAMES = tuple(BASELINES)
UNMOVED_BY_CONTROL = ("none", "mean_difference", "optimal_transport", "neuron_transport")
FITTED = (
    "mean_difference",
    "mean_difference_exact",
    "conditional_mean",
    "optimal_transport",
    "neuron_transport",
    "leace",
    "alterrep",
)


@cache
def tiny() -> Setting:
    return setting()


@cache
def fitted(name: str) -> Baseline:
    if name == "leace":
        pytest.importorskip("concept_erasure")
    return build(name, tiny().data)


def ready(name: str) -> Baseline:
    """The baseline, with the pairs of all rows where it takes pairs."""
    baseline = fitted(name)
    return baseline.paired(tiny().data.paired) if isinstance(baseline, Paired) else baseline


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_in_the_model_as_outside_with_a_true_record(name: str, strength: float) -> None:
    here, baseline = tiny(), ready(name).at_strength(strength)
    target, before = 1 - here.labels, hook_count(here.model)
    clean = here.model(**here.inputs).logits
    expected = baseline(here.activations, target, here.labels)
    with baseline.at(
        here.model, SITE, positions=here.positions, target=target, source=here.labels
    ) as run:
        edited = here.model(**here.inputs).logits
        held = lrqp.capture(here.model, here.inputs, [SITE])[SITE]
    assert hook_count(here.model) == before
    assert torch.equal(here.model(**here.inputs).logits, clean)

    at = held[torch.arange(60), here.positions]
    torch.testing.assert_close(at, expected, rtol=1e-5, atol=1e-4)
    untouched = torch.ones(held.shape[:2], dtype=torch.bool)
    untouched[torch.arange(60), here.positions] = False
    stream = lrqp.capture(here.model, here.inputs, [SITE])[SITE]
    assert torch.equal(held[untouched], stream[untouched])

    assert isinstance(run, lrqp.EditRun) and name in repr(run)
    reference = here.data.reference
    probe = copy.deepcopy(reference.probe).double()
    near = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(run.log_odds_after, probe.log_odds(at.double(), target), **near)
    x = here.activations.double()
    torch.testing.assert_close(run.log_odds_before, probe.log_odds(x, target), **near)
    moved = at.double() - x
    torch.testing.assert_close(run.euclidean, moved.norm(dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run.distance, reference.metric.distance(moved), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.odds_after, run.log_odds_after.exp(), **near)
    assert torch.equal(run.status == lrqp.Status.SATISFIED, (at == here.activations).all(-1))
    assert bool(run.floor.isnan().all())
    if name == "none":
        assert torch.equal(edited, clean)
    else:
        # Every edit is seen downstream.
        assert bool((edited[:, -1] != clean[:, -1]).any(-1)[run.distance > 0.1].all())
        assert float(run.distance.max()) > 0.1


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_strength_zero_changes_no_bit(name: str) -> None:
    here, baseline = tiny(), ready(name)
    clean = here.model(**here.inputs).logits
    intervention = baseline.at_strength(0.0).on(
        SITE, positions=here.positions, target=1 - here.labels, source=here.labels
    )
    with lrqp.intervene(here.model, [intervention]) as (run,):
        assert torch.equal(here.model(**here.inputs).logits, clean)
    assert torch.equal(run.distance, torch.zeros(60, dtype=torch.float64))
    assert baseline.strength == 1.0


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_strength_scales_the_change(name: str) -> None:
    here, baseline = tiny(), ready(name)
    x, target = here.activations.double(), 1 - here.labels
    full = baseline(x, target, here.labels) - x
    twice = baseline.at_strength(2.0)(x, target, here.labels) - x
    torch.testing.assert_close(twice, 2 * full, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_control_edits(name: str) -> None:
    here, baseline = tiny(), ready(name)
    edited = baseline(here.activations, here.labels, here.labels)
    assert torch.equal(edited, here.activations) == (name in UNMOVED_BY_CONTROL)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_dtype_source_and_target(name: str) -> None:
    here, baseline = tiny(), ready(name)
    x = here.activations
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert baseline(x.to(dtype), 1).dtype == dtype
    # The probe's own reading is the default source, and one number is a target for all.
    source = here.data.reference.geometry(x.device).logits(x).argmax(-1)
    assert torch.equal(baseline(x, 1), baseline(x, torch.ones(60, dtype=torch.long), source))
    # Halving a model that holds the edit leaves the edit's own numbers as they are.
    half = copy.deepcopy(baseline).half()
    for before, after in zip(baseline.buffers(), half.buffers(), strict=True):
        assert torch.equal(before, after) and before.dtype == after.dtype


@pytest.mark.parametrize("name", NAMES)
def test_differentiable_in_the_activation(name: str) -> None:
    here, baseline = tiny(), ready(name)
    rows = slice(0, 3)
    if isinstance(baseline, Paired):
        baseline = baseline.paired(here.data.paired[rows])
    x = here.activations[rows].double().requires_grad_()
    target, source = 1 - here.labels[rows], here.labels[rows]

    def edit(x: Tensor) -> Tensor:
        return baseline(x, target, source)

    if name == "full_patch":
        assert not edit(x).requires_grad
    else:
        assert torch.autograd.gradcheck(edit, (x,), atol=1e-5)


@torch.no_grad()
def test_pairs_at_several_positions_and_in_a_mask() -> None:
    here = tiny()
    baseline = build("full_patch", here.data)
    positions = torch.stack([here.positions, here.positions - 1], -1)
    partner = torch.randn(60, 2, 24)
    with baseline.paired(partner).at(here.model, SITE, positions=positions, target=1) as run:
        here.model(**here.inputs)
        held = lrqp.capture(here.model, here.inputs, [SITE], positions)[SITE]
    torch.testing.assert_close(held, partner, rtol=1e-5, atol=1e-5)
    assert run.distance.shape == (60, 2)
    mask = torch.zeros_like(here.inputs["attention_mask"], dtype=torch.bool)
    mask[torch.arange(60), here.positions] = True
    with baseline.paired(partner[:, 0]).at(here.model, SITE, positions=mask, target=1):
        held = lrqp.capture(here.model, here.inputs, [SITE], mask)[SITE]
    torch.testing.assert_close(held, partner[:, 0], rtol=1e-5, atol=1e-5)


# Bad input, named


@pytest.mark.parametrize("name", NAMES)
def test_bad_calls_are_named(name: str) -> None:
    here, baseline = tiny(), ready(name)
    x = here.activations
    broken = x.clone()
    broken[4, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="4"):
        baseline(broken, 1)
    with pytest.raises(WidthError, match="24"):
        baseline(x[:, :-1], 1)
    with pytest.raises(WidthError, match="float"):
        baseline(x.long(), 1)
    with pytest.raises(TargetError, match="0 to 1"):
        baseline(x, 2)
    with pytest.raises(TargetError, match="source"):
        baseline(x, 1, -1)
    with pytest.raises(TargetError):
        baseline(x, torch.ones(59, dtype=torch.long))
    with pytest.raises(SettingError, match="strength"):
        baseline.at_strength(float("nan"))
    with pytest.raises(EditNeverFiredError):
        baseline.at(here.model, SITE, positions=here.positions, target=1).__enter__().distance  # noqa: B018


@pytest.mark.parametrize("name", FITTED)
def test_bad_examples_are_named(name: str) -> None:
    if name == "leace":
        pytest.importorskip("concept_erasure")
    here, kind = tiny(), BASELINES[name]
    x, y, reference = here.activations, here.labels, here.data.reference
    fit = kind.fit
    with pytest.raises(WidthError):
        fit(x[:, 1:], y, reference=reference)
    with pytest.raises(LabelError):
        fit(x, y[1:], reference=reference)
    with pytest.raises(LabelError, match="0 to 1"):
        fit(x, y + 1, reference=reference)
    with pytest.raises(LabelError, match="fewer than two"):
        fit(x, torch.zeros_like(y), reference=reference)
    with pytest.raises(NonFiniteError):
        fit(x.where(x < 1e9, 0).index_fill(0, torch.tensor([3]), torch.inf), y, reference=reference)


@pytest.mark.parametrize("name", ["das", "full_patch"])
def test_pairs_that_do_not_fit_are_named(name: str) -> None:
    here, baseline = tiny(), fitted(name)
    with pytest.raises(PairError, match="paired"):
        baseline(here.activations, 1)
    with pytest.raises(PairError, match="24"):
        baseline.paired(torch.zeros(60, 23))
    with pytest.raises(PairError, match="NaN"):
        baseline.paired(torch.full((60, 24), torch.nan))
    with pytest.raises(PairError, match="59 paired activations for 60"):
        baseline.paired(torch.zeros(59, 24)).on(SITE, positions=here.positions, target=1)


def test_unknown_names_and_missing_data() -> None:
    here = tiny()
    with pytest.raises(SettingError, match="choose one of none, random"):
        build("magic", here.data)
    alone = BaselineData(here.activations, here.labels, here.data.reference)
    with pytest.raises(PairError, match="Behaviour"):
        build("das", alone)
    for name in set(NAMES) - {"das", "das_least", "leace"}:
        assert build(name, alone).name == name
