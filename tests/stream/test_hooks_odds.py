"""The promise of the edit: read back at the site, the odds reach α for every example."""

import pytest
import torch
from models_for_tests import POST_MODELS, VOCABULARY, Prompts, build, random_edit
from torch import Tensor

import lrqp_torch as lrqp

N = 96
GENERATOR = torch.Generator().manual_seed(5)
LENGTHS = torch.randint(5, 13, (N,), generator=GENERATOR).tolist()
PROMPTS = Prompts.random(LENGTHS, seed=6)
TOKENS = torch.tensor([int(torch.randint(n, (), generator=GENERATOR)) for n in LENGTHS])


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("rule", ["mirror", "fixed"])
@torch.no_grad()
def test_odds_read_back_in_the_model_reach_alpha(
    name: str, dtype: torch.dtype, n_classes: int, rule: str
) -> None:
    model, inputs = build(name, dtype=dtype), PROMPTS.padded("left")
    at = PROMPTS.columns(TOKENS, "left")
    target = torch.randint(n_classes, (N,), generator=torch.Generator().manual_seed(7))
    for site in ("L0.pre", "L1.mid", "L2.post"):
        x = lrqp.capture(model, inputs, [site], at)[site]
        edit = random_edit(x, n_classes, log_odds=10.0, rule=rule)
        z = edit.probe(x.double())
        with edit.at(model, site, positions=at, target=target) as run:
            model(**inputs)
            # An independent reading, from the values that the stream holds during the edit.
            held = lrqp.capture(model, inputs, [site], at)[site]
        assert held.dtype == dtype
        own = z.gather(-1, target[:, None]).squeeze(-1)
        alpha = (z.amax(-1) - own).clamp_min(10.0) if rule == "mirror" else torch.full((N,), 10.0)
        torch.testing.assert_close(run.floor, alpha.double())
        odds = edit.probe.log_odds(held.double(), target)
        assert bool((odds >= alpha).all()), (site, float((odds - alpha).min()))
        torch.testing.assert_close(odds, run.log_odds_after, rtol=1e-9, atol=1e-9)
        solved = run.status == lrqp.Status.SOLVED
        assert int(solved.sum()) > N // 4
        assert torch.equal(~solved, run.status == lrqp.Status.SATISFIED)
        assert torch.equal(held[~solved], x[~solved])
        # No further than rounding in the stream's dtype requires.
        excess = (odds - alpha)[solved]
        size = held.double().norm(dim=-1) * edit.probe.weight.norm(dim=-1).max()
        assert bool((excess <= 8 * torch.finfo(dtype).eps * (size + alpha)[solved]).all())


@pytest.mark.parametrize("name", POST_MODELS)
@torch.no_grad()
def test_odds_are_reached_at_every_position_of_a_mask(name: str) -> None:
    model, inputs = build(name, dtype=torch.bfloat16), PROMPTS.padded("right")
    mask = inputs["attention_mask"].bool()
    target = torch.randint(4, mask.shape, generator=torch.Generator().manual_seed(8))
    for site in ("L1.pre", "L1.mid", "L1.post"):
        edit = random_edit(lrqp.capture(model, inputs, [site], mask)[site], 4)
        with edit.at(model, site, positions=mask, target=target) as run:
            model(**inputs)
            held = lrqp.capture(model, inputs, [site], mask)[site]
        odds = edit.probe.log_odds(held.double(), target[mask])
        assert bool((odds >= run.floor).all())
        assert bool((run.floor >= edit.log_odds).all())


@pytest.mark.parametrize("name", POST_MODELS)
@torch.no_grad()
def test_a_fitted_edit_flips_what_the_model_itself_prefers(name: str) -> None:
    """Fitted on some prompts, tried on others, and judged by the logits of the model."""
    model, site = build(name), "L2.post"
    prompts = torch.randint(VOCABULARY, (660, 6), generator=torch.Generator().manual_seed(9))
    at, fitted, tried = torch.full((660,), 5), slice(0, 600), slice(600, 660)

    def prefers(rows: slice) -> Tensor:
        logits = model(input_ids=prompts[rows]).logits[:, -1]
        return (logits[:, 1] > logits[:, 0]).long()

    x = lrqp.capture(model, {"input_ids": prompts}, [site], at)[site]
    edit = lrqp.LRQP.fit(x[fitted], prefers(fitted))
    y = prefers(tried)
    assert 5 <= int(y.sum()) <= 55
    with edit.at(model, site, positions=at[tried], target=1 - y, source=y):
        assert float((prefers(tried) == 1 - y).double().mean()) > 0.9
    with edit.at(model, site, positions=at[tried], target=y, source=y):
        assert float((prefers(tried) == y).double().mean()) > 0.9
