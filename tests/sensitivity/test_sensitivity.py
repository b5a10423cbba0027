"""Attribution adds up to the whole effect; the smallest odds are those where answers flip."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_for_tests import POST_MODELS, Prompts, build, hook_count, in_double, random_edit
from torch import Tensor, nn

import lrqp_torch as lrqp
from lrqp_torch.errors import (
    LRQPError,
    NonFiniteError,
    PositionError,
    SettingError,
    TargetError,
    WidthError,
)
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.models import load
from lrqp_torch.sensitivity.attribution import attribute
from lrqp_torch.sensitivity.readout import SiteReadout
from lrqp_torch.sensitivity.smallest_odds import SmallestOdds, smallest_odds

SITE = "L1.mid"
LENGTHS = [9, 7, 8, 9, 6, 8]
PROMPTS = Prompts.random(LENGTHS)
INPUTS = PROMPTS.padded("left")
AT = PROMPTS.columns(torch.tensor([4, 3, 5, 6, 3, 2]), "left")
READ = torch.full((6,), 8)
WHERE = {"inputs": INPUTS, "positions": AT, "read": READ}


def difference(logits: Tensor, rows: Tensor) -> Tensor:
    return logits[:, 7] - logits[:, 11]


def edit_for(model: nn.Module, n_classes: int, **options: Any) -> lrqp.LRQP:
    x = lrqp.capture(model, INPUTS, SITE, INPUTS["attention_mask"].bool())[SITE]
    return random_edit(x, n_classes, **options)


def full_pass(
    model: nn.Module, edit: lrqp.LRQP, target: Tensor, reading: Callable[..., Tensor]
) -> Tensor:
    """The reading with the edit in a plain forward pass."""
    with torch.no_grad(), edit.at(model, SITE, positions=AT, target=target):
        logits = model(**INPUTS).logits
    return reading(logits[torch.arange(6), READ], torch.arange(6)).double()


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("rule", ["mirror", "fixed"])
def test_the_parts_are_complete(name: str, n_classes: int, rule: str) -> None:
    model = in_double(build(name)).eval()
    edit = edit_for(model, n_classes, rule=rule)
    target = torch.arange(6) % n_classes
    found = attribute(
        model, SITE, edit, **WHERE, target=target, reading=difference, tolerance=1e-7, batch_size=4
    )
    clean = model(**INPUTS).logits[:, 8].detach()
    torch.testing.assert_close(found.before, difference(clean, target))
    torch.testing.assert_close(found.after, full_pass(model, edit, target, difference))
    assert float(found.effect.abs().max()) > 0.01
    for parts in (found.constraints, found.dimensions, found.through_directions):
        torch.testing.assert_close(parts.sum(-1), found.effect, rtol=0, atol=1e-6)
    assert float(found.unexplained.abs().max()) < 1e-7
    assert not found.constraints[torch.arange(6), target].any()
    assert not found.constraints[found.multipliers == 0].any()
    # K classes span K − 1 directions, and no more.
    assert len(found.directions) <= n_classes - 1
    identity = torch.eye(len(found.directions), dtype=torch.float64)
    torch.testing.assert_close(found.directions @ found.directions.T, identity)
    assert hook_count(model) == 0


def test_gradients_at_the_site_are_finite_differences() -> None:
    model = in_double(build("llama")).eval()
    run = SiteReadout(model, SITE, INPUTS, AT, READ, difference, batch_size=8)
    rows = torch.tensor([5, 0, 2])
    x = run.activations(rows)
    captured = lrqp.capture(model, INPUTS, SITE, AT)[SITE]
    torch.testing.assert_close(x, captured[rows])
    x = x + torch.randn(x.shape, dtype=x.dtype)
    direction = torch.randn(x.shape, dtype=x.dtype)
    value, gradient = run.gradient(rows, x)
    torch.testing.assert_close(value, run.value(rows, x))
    ahead, behind = (run.value(rows, x + sign * 1e-5 * direction) for sign in (1, -1))
    slope = (gradient * direction).sum(-1)
    torch.testing.assert_close(slope, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-7)
    assert float(slope.abs().min()) > 1e-4


def test_an_edit_that_is_not_needed_has_no_parts() -> None:
    model = build("gpt2")
    edit = edit_for(model, 2, rule="fixed", log_odds=1e-9)
    held = edit.probe(lrqp.capture(model, INPUTS, SITE, AT)[SITE]).argmax(-1)
    target = held.clone()
    target[2] = 1 - held[2]
    found = attribute(model, SITE, edit, **WHERE, target=target, reading=difference)
    still = torch.arange(6) != 2
    for parts in (found.constraints, found.dimensions, found.through_directions, found.multipliers):
        assert not parts[still].any() and bool(parts[2].any())
    assert torch.equal(found.before[still], found.after[still])


def crossings(model: nn.Module, edit: lrqp.LRQP, target: Tensor, found: SmallestOdds) -> None:
    """At the odds found a plain edit flips the answer, and 0.01 nats below it does not."""
    fixed = lrqp.LRQP(edit.probe, edit.metric, rule="fixed")
    for row in found.flips.nonzero().flatten().tolist():
        for below, flipped in ((0.0, True), (0.01, False)):
            fixed.log_odds.fill_(float(found.log_odds[row]) - below)
            value = full_pass(model, fixed, target, zero_of(model))[row]
            assert bool(value < 0) is flipped


def zero_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A reading that is 0.002 in every clean run, so that any edit that lowers it flips it."""
    clean = difference(model(**INPUTS).logits[:, 8].detach(), torch.arange(6))
    return lambda logits, rows: difference(logits, rows) - clean[rows] + 0.002


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_smallest_odds_are_where_a_plain_edit_flips(name: str, n_classes: int) -> None:
    model = in_double(build(name)).eval()
    edit, reading = edit_for(model, n_classes), zero_of(model)
    target = torch.arange(6) % n_classes
    options = {"target": target, "reading": reading, "tolerance": 1e-6, "batch_size": 4}
    newton = smallest_odds(model, SITE, edit, **WHERE, **options)
    bisection = smallest_odds(model, SITE, edit, **WHERE, **options, method="bisection")
    assert int(newton.flips.sum()) >= 1
    assert torch.equal(newton.flips, bisection.flips)
    torch.testing.assert_close(newton.log_odds, bisection.log_odds, rtol=0, atol=2e-6)
    assert newton.rounds < bisection.rounds
    crossings(model, edit, target, newton)
    assert bool((newton.log_odds[newton.flips] > newton.start[newton.flips]).all())
    assert bool((newton.slope[newton.flips] < 0).all())
    assert bool(newton.slope[~newton.flips].isnan().all())
    # The slope at the crossing, by differences of plain edits.
    row = int(newton.flips.nonzero()[0])
    fixed, values = lrqp.LRQP(edit.probe, edit.metric, rule="fixed"), []
    for sign in (1, -1):
        fixed.log_odds.fill_(float(newton.log_odds[row]) + sign * 1e-4)
        values.append(float(full_pass(model, fixed, target, reading)[row]))
    assert float(newton.slope[row]) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-4)


def test_the_first_crossing_that_the_scan_sees() -> None:
    """A reading that turns negative and positive again: the first interval, not the last."""
    model = in_double(build("gpt2")).eval()
    edit, target = edit_for(model, 2), torch.arange(6) % 2
    plain = smallest_odds(
        model, SITE, edit, **WHERE, target=target, reading=zero_of(model), tolerance=1e-6
    )
    gap = zero_of(model)

    def there_and_back(logits: Tensor, rows: Tensor) -> Tensor:
        return gap(logits, rows) * (gap(logits, rows) + 0.02)

    found = smallest_odds(
        model, SITE, edit, **WHERE, target=target, reading=there_and_back, scan=150, tolerance=1e-6
    )
    assert int(plain.flips.sum()) >= 1
    torch.testing.assert_close(
        found.log_odds[plain.flips], plain.log_odds[plain.flips], rtol=1e-6, atol=2e-6
    )


def test_prompts_that_never_flip_or_have_flipped_already() -> None:
    model = build("gpt2")
    edit = edit_for(model, 2)
    for constant, expected in ((1.0, torch.inf), (-1.0, -torch.inf)):
        found = smallest_odds(
            model,
            SITE,
            edit,
            **WHERE,
            target=1,
            reading=lambda z, rows, c=constant: 0 * z[:, 0] + c,
        )
        assert bool((found.log_odds == expected).all()) and not found.flips.any()
        assert bool(found.slope.isnan().all()) and found.rounds == 0
    # Two classes with equal weights: no activation reaches the target.
    edit.probe.weight[1] = edit.probe.weight[0]
    found = smallest_odds(model, SITE, edit, **WHERE, target=1, reading=zero_of(model))
    assert bool((found.log_odds == torch.inf).all())


def test_on_the_organism_odds_flip_where_the_order_is_used() -> None:
    model, tokenizer = load("organism")
    data = IOIDataset.generate(tokenizer, 220, seed=4, padding_side="left")
    train, test = data[:200], data[200:]
    labels = test.labels["abb"]

    def answer(logits: Tensor, rows: Tensor) -> Tensor:
        at = torch.arange(len(rows))
        return logits[at, test.io_tokens[rows]] - logits[at, test.s_tokens[rows]]

    for site, least, most in (("L2.mid", 0.8, 1.0), ("L4.mid", 0.0, 0.05)):
        x = lrqp.capture(model, data.inputs, site, data.positions["S2"])[site]
        edit = lrqp.LRQP.fit(x[:200], train.labels["abb"])
        options = {
            "inputs": test.inputs,
            "positions": test.positions["S2"],
            "read": test.positions["END"],
            "target": 1 - labels,
            "reading": answer,
        }
        newton = smallest_odds(model, site, edit, **options, tolerance=1e-2)
        bisection = smallest_odds(model, site, edit, **options, tolerance=1e-2, method="bisection")
        assert least <= float(newton.flips.double().mean()) <= most
        torch.testing.assert_close(newton.log_odds, bisection.log_odds, rtol=0, atol=2e-2)
        parts = attribute(model, site, edit, **options, source=labels, tolerance=0.1)
        assert float(parts.unexplained.abs().max()) < 0.1


def test_a_reading_without_a_gradient_is_not_one_of_gradient_zero() -> None:
    model = build("gpt2")
    edit = edit_for(model, 2)
    for reading in (lambda z, rows: difference(z.detach(), rows), lambda z, rows: rows.float()):
        with pytest.raises(LRQPError, match="the reading has no gradient"):
            attribute(model, SITE, edit, **WHERE, target=1, reading=reading)
    with torch.inference_mode(), pytest.raises(LRQPError, match=r"outside of torch\.inference"):
        attribute(model, SITE, edit, **WHERE, target=1, reading=difference)


def test_bad_input_is_named() -> None:
    model = build("gpt2")
    edit = edit_for(model, 2)
    common = {**WHERE, "target": 1, "reading": difference}
    for call, options, error, message in (
        (attribute, {"tolerance": 0.0}, LRQPError, "tolerance"),
        (smallest_odds, {"scan": 0}, LRQPError, "scan"),
        (smallest_odds, {"tolerance": 0.0}, LRQPError, "tolerance"),
        (smallest_odds, {"method": "secant"}, LRQPError, "method"),
        (attribute, {"positions": AT[:3]}, PositionError, "one column a prompt"),
        (attribute, {"read": READ.double()}, PositionError, "one column a prompt"),
        (attribute, {"reading": lambda z, rows: z}, WidthError, "one a prompt"),
        (smallest_odds, {"reading": lambda z, rows: z[:, 0] * torch.nan}, NonFiniteError, "NaN"),
        (attribute, {"target": 2}, LRQPError, "target"),
        (smallest_odds, {"highest": float("nan")}, SettingError, "highest must be a finite"),
        (smallest_odds, {"highest": float("inf")}, SettingError, "highest must be a finite"),
        (smallest_odds, {"tolerance": float("inf")}, SettingError, "tolerance must be a finite"),
        (smallest_odds, {"scan": 2.5}, SettingError, "scan must be an integer"),
        (attribute, {"target": AT[:3] * 0}, TargetError, r"target must be \(6,\)"),
        (smallest_odds, {"target": AT[:3] * 0}, TargetError, r"target must be \(6,\)"),
        (attribute, {"source": AT[:3] * 0}, TargetError, r"source must be \(6,\)"),
    ):
        with pytest.raises(error, match=message):
            call(model, SITE, edit, **{**common, **options})
    number = attribute(model, SITE, edit, **common, source=0)
    each = attribute(model, SITE, edit, **common, source=torch.zeros(6, dtype=torch.long))
    assert torch.equal(number.after, each.after)
    with pytest.raises(LRQPError, match="training mode"):
        attribute(model.train(), SITE, edit, **common)
    assert hook_count(model) == 0
