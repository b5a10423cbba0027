"""The stream's dtype: what is captured, what an edit promises in it, and mixed precision."""

from functools import cache

import pytest
import torch
from families_for_tests import build_family
from models_for_tests import Prompts, build, random_edit
from torch import Tensor
from transformers import PreTrainedModel

import lrqp_torch as lrqp
from lrqp_torch import EditContext, Intervention, intervene
from lrqp_torch.errors import SolverError
from lrqp_torch.stream.replay import Replay

FAMILIES = ("gpt2", "llama", "gemma2")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PARTS = ("pre", "mid", "post")
N = 32
GENERATOR = torch.Generator().manual_seed(11)
LENGTHS = torch.randint(5, 13, (N,), generator=GENERATOR).tolist()
INPUTS = Prompts.random(LENGTHS, seed=12).padded("right")
REAL = INPUTS["attention_mask"].bool()
AT = torch.tensor([n - 2 for n in LENGTHS])
LABELS = torch.arange(N) % 3


def tiny(name: str, dtype: torch.dtype) -> PreTrainedModel:
    return build_family("gemma2").to(dtype) if name == "gemma2" else build(name, dtype=dtype)


@cache
def wide(name: str) -> dict[str, Tensor]:
    """The stream in float64, from the weights as float16 and bfloat16 would round them."""
    return lrqp.capture(tiny(name, torch.float64), INPUTS, [f"L1.{part}" for part in PARTS], AT)


def keep(x: Tensor, context: EditContext) -> Tensor:
    return x


@torch.no_grad()
def check_promise(model: PreTrainedModel, site: str, edit: lrqp.LRQP) -> Tensor:
    """Edit, read the stream while it is edited, and hold what it holds against the promise."""
    with edit.at(model, site, positions=AT, target=(LABELS + 1) % 3) as run:
        edited = model(**INPUTS).logits
        held = lrqp.capture(model, INPUTS, [site], AT)[site]
    # Read with float64 products of the weights, so that the reading itself rounds nothing.
    weight, bias = edit.probe.weight.double(), edit.probe.bias.double()
    z = held.double() @ weight.T + bias
    own = z.gather(-1, (LABELS[:, None] + 1) % 3)
    rivals = z.scatter(-1, (LABELS[:, None] + 1) % 3, -torch.inf).amax(-1)
    odds = own.squeeze(-1) - rivals
    assert bool((odds >= run.floor).all()), (site, float((odds - run.floor).min()))
    torch.testing.assert_close(odds, run.log_odds_after, rtol=1e-9, atol=1e-9)
    assert int((run.status == lrqp.Status.SOLVED).sum()) > N // 4
    assert bool(torch.isfinite(edited).all())
    return held


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_capture_keeps_the_dtype_and_is_as_near_as_it_can_be(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype)
    found = lrqp.capture(model, INPUTS, list(wide(name)), AT)
    for site, value in found.items():
        assert value.dtype == dtype
        size = wide(name)[site].abs().max()
        assert (value - wide(name)[site]).abs().max() <= 60 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_edit_fitted_on_the_streams_own_dtype_keeps_its_promise(
    name: str, dtype: torch.dtype
) -> None:
    model = tiny(name, dtype)
    for part in PARTS:
        site = f"L1.{part}"
        x = lrqp.capture(model, INPUTS, [site], AT)[site]
        edit = lrqp.LRQP.fit(x, LABELS, l2=0.01, log_odds=4.0)
        # Statistics of half-precision activations are never taken in half precision.
        exact = lrqp.LRQP.fit(x.double(), LABELS, l2=0.01, log_odds=4.0)
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        assert edit.probe.weight.dtype == edit.probe.bias.dtype == wanted
        torch.testing.assert_close(edit.probe.weight.double(), exact.probe.weight.double())
        torch.testing.assert_close(
            edit.metric.covariance.double(), exact.metric.covariance.double()
        )
        held = check_promise(model, site, edit)
        assert held.dtype == dtype


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_an_edit_that_changes_nothing_leaves_every_bit(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype)
    clean = model(**INPUTS).logits
    edits = [Intervention(f"L{layer}.{part}", REAL, keep) for layer in range(3) for part in PARTS]
    with intervene(model, edits):
        assert torch.equal(model(**INPUTS).logits, clean)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_an_edit_fitted_in_one_dtype_runs_in_another(name: str) -> None:
    for site, x in wide(name).items():
        edit = random_edit(x, 3, log_odds=6.0)
        for dtype in DTYPES:
            check_promise(tiny(name, dtype), site, edit)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_under_autocast_the_promise_is_on_what_the_stream_holds(name: str, part: str) -> None:
    """There the attention output is bfloat16, and its sum with the skip path float32."""
    model, site = tiny(name, torch.float32), f"L1.{part}"
    plain = lrqp.capture(model, INPUTS, [site], AT)[site]
    with torch.autocast("cpu", torch.bfloat16):
        clean = model(**INPUTS).logits
        assert clean.dtype == torch.bfloat16
        x = lrqp.capture(model, INPUTS, [site], AT)[site]
        assert x.dtype == torch.float32
        assert not torch.equal(x, plain)
        for edit in (random_edit(x, 3, log_odds=10.0), lrqp.LRQP.fit(x, LABELS, log_odds=6.0)):
            with torch.autocast("cpu", enabled=False):
                odds = edit.probe.log_odds(x, LABELS)
            # The probe reads in its own dtype here as elsewhere.
            assert torch.equal(edit.probe.log_odds(x, LABELS), odds)
            check_promise(model, site, edit)
        with intervene(model, Intervention(site, AT, keep)):
            assert torch.equal(model(**INPUTS).logits, clean)
        replay = Replay(model, INPUTS, 3)
        with edit.at(model, site, positions=AT, target=LABELS):
            full = model(**INPUTS).logits[:, -1]
        with edit.at(model, site, positions=AT, target=LABELS):
            replayed = replay.run(1)
        torch.testing.assert_close(replayed, full, rtol=0.05, atol=0.1)


@torch.no_grad()
def test_fits_under_autocast_are_those_without_it() -> None:
    x = wide("llama")["L1.mid"].bfloat16()
    plain = lrqp.LRQP.fit(x, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        cast = lrqp.LRQP.fit(x, LABELS)
        assert torch.equal(cast(x, LABELS), plain(x, LABELS))
    assert torch.equal(cast(x, LABELS), plain(x, LABELS))
    for one, other in zip(cast.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_odds_beyond_what_a_dtype_can_hold_are_an_error_that_says_so() -> None:
    model, site = tiny("llama", torch.float16), "L1.mid"
    x = lrqp.capture(model, INPUTS, [site], AT)[site]
    edit = random_edit(x, 3, log_odds=1e6)
    with (
        torch.no_grad(),
        pytest.raises(SolverError, match=r"exceed what torch\.float16 can hold"),
        edit.at(model, site, positions=AT, target=LABELS),
    ):
        model(**INPUTS)
