"""Illusion controls: splits, readers, chance, and planted effects that they must recognise."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contexts_for_tests import check, own_context
from contexts_for_tests import given as given_to
from heads_for_tests import random_model, study_of, with_roles, with_telling_answers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.organisms.prompts import build_tokenizer
from lrqp_torch import LRQP, LinearProbe, Mahalanobis
from lrqp_torch.cli import app
from lrqp_torch.errors import UnknownFamilyError, WidthError
from lrqp_torch.stream.sites import blocks_of
from lrqp_torch.study import illusions
from lrqp_torch.study.context import StudyContext
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.illusions import (
    CARRIES,
    KINDS,
    RANDOM,
    ControlsResult,
    Piece,
    Place,
    Split,
    by_chance,
    half_edits,
)
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.parts.controls import PART
from lrqp_torch.study.results import SiteResult
from lrqp_torch.study.running import Trials
from lrqp_torch.study.subspaces import (
    Along,
    along,
    class_mean_space,
    direction_of,
    fold_norm,
    head_weights,
    mlp_weights,
    random_space,
    reader_spaces,
    readers_of,
    split,
    top_space,
)
from lrqp_torch.study.sweep import fit_edits, sweep

SITE = "L2.pre"
HEAD = "L2.H1"


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.fixture(scope="module")
def context() -> StudyContext:
    return with_telling_answers(study_of("gpt2"), SITE)


@pytest.fixture(scope="module")
def result(context: StudyContext) -> ControlsResult:
    edit = fitted(context, SITE)
    given_heads = with_roles(context, S_inhibition=[HEAD])
    return controlled(context, SITE, edit, given_heads, seeds=2)


def controlled(
    context: StudyContext, site: str, edit: LRQP, heads: Any, seeds: int = 1
) -> ControlsResult:
    """The controls of an edit, beside others that ask for the same odds."""
    own = given_to(context, site, {"heads": heads})
    asked = replace(own.settings, log_odds=float(edit.log_odds))
    own = replace(own, edit_at=lambda _: edit, settings=asked)
    return illusions.compute(own, lambda _: None, seeds=seeds)


def fitted(context: StudyContext, site: str) -> LRQP:
    x = context.activations(context.task, "train", "S2", [site])
    return fit_edits(x, context.task.train.labels)[site]


@settings(max_examples=40, deadline=None)
@given(width=st.integers(2, 9), rank=st.integers(1, 9), seed=st.integers(0, 1000))
def test_a_split_is_two_orthogonal_projections_that_add_up(
    width: int, rank: int, seed: int
) -> None:
    basis = top_space("", normal(rank, width, seed=seed), energy=1.0).rows
    delta = 100 * normal(5, width, seed=seed + 1)
    inside, outside = split(delta, basis)
    torch.testing.assert_close(inside + outside, delta)
    for part, place in ((inside, 0), (outside, 1)):
        again = split(part, basis)
        torch.testing.assert_close(again[place], part)
        torch.testing.assert_close(again[1 - place], torch.zeros_like(part), atol=1e-10, rtol=0)
    assert float((inside * outside).sum(-1).abs().max()) < 1e-9
    squares = inside.square().sum(-1) + outside.square().sum(-1)
    torch.testing.assert_close(squares, delta.square().sum(-1))


def test_a_split_needs_one_width() -> None:
    with pytest.raises(WidthError, match=r"one width, got \(2, 3\) and \(1, 4\)"):
        split(torch.zeros(2, 3), torch.zeros(1, 4))


def test_a_space_holds_the_energy_asked_for_and_no_direction_more() -> None:
    u, v = torch.linalg.qr(normal(30, 8))[0], torch.linalg.qr(normal(8, 8, seed=1))[0]
    values = torch.tensor([4.0, 3.0, 2.0, 1.0, 1e-20, 0, 0, 0], dtype=torch.float64)
    weights = u @ torch.diag(values) @ v.T
    space = top_space("some", weights)
    # 16 + 9 = 25 of 30 is too little for 90 %, 29 of 30 enough.
    assert (len(space.rows), space.rank) == (3, 4)
    assert space.energy == pytest.approx(29 / 30)
    torch.testing.assert_close(space.rows @ space.rows.T, torch.eye(3, dtype=torch.float64))
    held = (weights @ space.rows.T).square().sum() / weights.square().sum()
    assert float(held) == pytest.approx(space.energy)
    assert len(top_space("all", weights, energy=1.0).rows) == 4
    with pytest.raises(WidthError, match="not all 0"):
        top_space("none", torch.zeros(3, 4))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_folded_weights_read_what_the_model_reads(name: str) -> None:
    """W (norm(x) − norm(0)) is R x / s, for keys, values and the MLP."""
    model = random_model(name, 50)
    block, x = blocks_of(model)[2], 3 * normal(7, 24)
    if name == "gpt2":
        read = block.attn.c_attn(block.ln_1(x)) - block.attn.c_attn(block.ln_1(0 * x))
        keys, values = read[:, 24 + 6 : 24 + 12], read[:, 48 + 6 : 48 + 12]
        hidden = block.mlp.c_fc(block.ln_2(x)) - block.mlp.c_fc(block.ln_2(0 * x))
        scale = x.std(-1, unbiased=False, keepdim=True)
    else:
        # Four heads share two sets of keys and values, so head 1 reads with the first.
        at = block.input_layernorm(x)
        keys, values = block.self_attn.k_proj(at)[:, :6], block.self_attn.v_proj(at)[:, :6]
        at = block.post_attention_layernorm(x)
        hidden = torch.cat([block.mlp.gate_proj(at), block.mlp.up_proj(at)], dim=1)
        scale = x.square().mean(-1, keepdim=True).sqrt()
    folded_keys, folded_values = head_weights(model, HEAD)
    for seen, weights in (
        (keys, folded_keys),
        (values, folded_values),
        (hidden, mlp_weights(model, 2)),
    ):
        torch.testing.assert_close(x @ weights.T / scale, seen, rtol=1e-4, atol=1e-4)
    if name == "llama":
        torch.testing.assert_close(head_weights(model, "L2.H0"), head_weights(model, HEAD))
        assert not torch.allclose(head_weights(model, "L2.H2")[0], folded_keys)


def test_norms_that_store_their_gain_less_one_are_read_as_they_act() -> None:
    class Shifted(torch.nn.Module):
        gain = normal(6)

        def forward(self, x: Tensor) -> Tensor:
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + self.gain)

    norm, weight = Shifted(), normal(3, 6, seed=2)
    torch.testing.assert_close(fold_norm(weight, norm), weight * (1 + norm.gain), rtol=1e-5, atol=0)


def test_readers_are_heads_above_the_site_and_others_take_their_place(
    context: StudyContext,
) -> None:
    some = with_roles(context, S_inhibition=["L0.H0", HEAD], answer_writer=["L1.H0", "L2.H0"])
    assert readers_of(context, "L0.mid", some) == ("S-inhibition heads", [HEAD])
    assert readers_of(context, "L0.pre", some) == ("S-inhibition heads", ["L0.H0", HEAD])
    none = with_roles(context, S_inhibition=["L0.H0"], answer_writer=["L1.H0", "L2.H0"])
    assert readers_of(context, "L1.mid", none) == ("answer writers", ["L2.H0"])
    assert readers_of(context, "L2.post", none) == ("", [])
    assert reader_spaces(context.model, "L2.post", *readers_of(context, "L2.post", none)) == []
    role, heads = readers_of(context, "L1.mid", none)
    names = [space.name for space in reader_spaces(context.model, "L1.mid", role, heads)]
    assert names[-1] == "MLP of layer 1" and names[0] == "answer writers: values"


def test_a_family_without_a_row_is_named() -> None:
    with pytest.raises(UnknownFamilyError, match="'gpt_neox' read the stream is not known"):
        mlp_weights(random_model("gpt_neox", 50), 0)


def test_random_spaces_and_spaces_of_class_means() -> None:
    like = top_space("", normal(3, 8), energy=1.0)
    space = random_space(like, torch.Generator().manual_seed(0))
    assert space.rows.shape == (3, 8) and not space.reads
    torch.testing.assert_close(space.rows @ space.rows.T, torch.eye(3, dtype=torch.float64))
    x, y = normal(40, 8), torch.arange(40) % 2
    means = class_mean_space(x, y)
    difference = x[y == 1].mean(0) - x[y == 0].mean(0)
    assert means.rows.shape == (1, 8)
    inside, _ = split(difference[None], means.rows)
    torch.testing.assert_close(inside[0], difference)


def test_along_a_direction_against_a_calculation_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    x = torch.tensor([[-1.0, 5], [1, 5], [3, 7], [5, 9]])
    delta = torch.tensor([[4.0, 0], [4, 0], [-4, 0], [-4, 0]])
    seen = along(torch.tensor([1.0, 0], dtype=torch.float64), x, delta, labels)
    # Means 0 and 4, each class ±1; all: mean 2, variance ((-3)² + (-1)² + 1² + 3²) / 4 = 5.
    assert seen.separation == pytest.approx(4)
    assert seen.shift == pytest.approx(4 / 5**0.5)
    assert seen.position == pytest.approx((1 + 3 + 3 + 1) / 4 / 5**0.5)
    assert seen.farthest == pytest.approx(3 / 5**0.5)
    assert direction_of(torch.zeros(3, 2), torch.ones(3, 2)) is None
    found = direction_of(delta, delta)
    assert found is not None and float(found[0].abs()) == pytest.approx(1)


def planted(direction: str) -> tuple[StudyContext, LRQP, ControlsResult]:
    """A model whose last layer reads S2 through one head alone, and an edit along a known vector.

    Args:
        direction: ``null`` for what that head cannot see, ``both`` for that with something added
            that it sees well.
    """
    tokenizer = build_tokenizer([])
    model = random_model("gpt2", len(tokenizer))
    others = [row for row in range(24) if not 6 <= row < 12]
    with torch.no_grad():
        blocks_of(model)[2].attn.c_proj.weight[others] = 0
    context = study_of("gpt2", model=model, tokenizer=tokenizer)
    keys, values = head_weights(model, HEAD)
    whole = top_space("", torch.cat([keys, values]), energy=1.0)
    blind = split(normal(1, 24), whole.rows)[1]
    # A LayerNorm sees no shift of all entries, and its scale sees little of a blind direction.
    blind = torch.nn.functional.normalize(blind - blind.mean(), dim=-1)[0]
    seen = top_space("", torch.cat([keys, values])).rows[0]
    axis = blind if direction == "null" else 2 * blind + seen
    probe = LinearProbe(24, 2, dtype=torch.float64).requires_grad_(False)
    probe.weight.copy_(torch.stack([-axis, axis]))
    probe.bias.zero_()
    edit = LRQP(probe, Mahalanobis.euclidean(24), log_odds=8.0, rule="fixed")
    context = telling(context, edit)
    return (
        context,
        edit,
        controlled(context, SITE, edit, with_roles(context, S_inhibition=[HEAD])),
    )


@torch.no_grad()
def telling(context: StudyContext, edit: LRQP) -> StudyContext:
    """The same study with those two tokens for answers whose logits the edit moves most."""
    test = context.task.test
    labels = test.labels
    clean = context.model(**test.inputs).logits[:, -1]
    at = {"positions": test.positions["S2"], "target": 1 - labels, "source": labels}
    with edit.at(context.model, SITE, **at):
        change = context.model(**test.inputs).logits[:, -1] - clean
    moved = ((2 * labels - 1)[:, None] * change).mean(0)
    best, worst = int(moved.argmin()), int(moved.argmax())
    answers = replace(
        test.data,
        io_tokens=torch.where(labels == 1, best, worst),
        s_tokens=torch.where(labels == 1, worst, best),
    )
    data = IOIPrompts.of(answers)
    return replace(context, task=replace(context.task, test=data))


def found_split(result: ControlsResult, name: str) -> Split:
    return next(item for item in result.splits if name in item.space)


def test_an_effect_planted_in_the_row_space_is_found_there() -> None:
    _, _, result = planted("both")
    found = found_split(result, "keys and values")
    assert found.inside.share < 0.5 < found.outside.share
    inside, outside = found.inside.outcome.effect, found.outside.outcome.effect
    assert inside is not None and outside is not None
    assert inside.known > 0.8 and abs(outside.known) < 0.2
    assert found.carrier == "inside"
    (text,) = [panel.text for panel in PART.panels(result) if "splits" in panel.name]
    assert "so the part inside carries the effect" in text


def test_an_effect_planted_in_the_null_space_is_found_there() -> None:
    _, _, result = planted("null")
    found = found_split(result, "keys and values")
    assert found.inside.share < 1e-9 and found.inside.along is None
    assert found.outside.share == pytest.approx(1)
    assert found.inside.outcome.logit_difference.value == pytest.approx(result.clean.value)
    assert found.outside.outcome.flipped == result.counterfactual.flipped
    alone, whole = found.outside.outcome.logit_difference, result.counterfactual.logit_difference
    assert alone.value == pytest.approx(whole.value)
    if result.counterfactual.effect is not None:
        assert found.carrier == "outside"


def test_the_illusion_is_told_by_all_of_its_marks() -> None:
    def part(effect: float, separation: float) -> Piece:
        outcome = replace(found.inside.outcome, effect=Estimate(effect, None, None, 30))
        return Piece(0.5, 1.0, Along(separation, 3.0, 3.0, 2.0), outcome)

    _, _, result = planted("both")
    found = found_split(result, "keys and values")
    sick = replace(found, inside=part(0.9, 0.1), outside=part(0.0, 4.0))
    assert sick.illusory
    assert not replace(sick, reads=False).illusory
    assert not replace(sick, inside=part(0.9, 2.0)).illusory
    assert not replace(sick, outside=part(0.0, 0.2)).illusory
    assert not replace(sick, outside=part(0.9, 4.0)).illusory
    assert not replace(sick, inside=part(CARRIES - 0.01, 0.1)).illusory
    carriers = {
        (a, b): replace(sick, inside=part(a, 1), outside=part(b, 1)).carrier
        for a in (0.1, 0.9)
        for b in (0.1, 0.9)
    }
    assert carriers == {
        (0.1, 0.1): "neither",
        (0.9, 0.1): "inside",
        (0.1, 0.9): "outside",
        (0.9, 0.9): "both",
    }
    ill = replace(result, splits=[sick])
    assert "Signs of an illusion" in PART.panels(ill)[0].text
    assert "No sign of an illusion" in PART.panels(replace(ill, splits=[found]))[0].text


def test_the_study_s_own_edit_does_what_it_does_in_the_sweep(
    context: StudyContext, result: ControlsResult
) -> None:
    sites = [SITE, "L1.mid"]
    edits = {site: fitted(context, site) for site in sites}
    flat = sweep(context.model, context.task.test, edits)
    swept = {site: SiteResult.of(flat, site, Estimate.count(0, 1), 0) for site in edits}
    assert result.counterfactual.effect is not None
    for own, condition in ((result.counterfactual, "counterfactual"), (result.control, "control")):
        there = getattr(swept[SITE], condition)
        assert own.flipped == there.flipped
        assert own.logit_difference.value == pytest.approx(there.logit_difference.value, abs=1e-5)
    other = next(item for item in result.elsewhere if item.site == "L1.mid")
    assert other.fitted.flipped == swept["L1.mid"].counterfactual.flipped
    assert other.probe_accuracy == swept["L1.mid"].probe_accuracy.value
    assert result.probe_accuracy == swept[SITE].probe_accuracy.value
    assert result.counterfactual.effect.value == pytest.approx(1)
    assert SITE not in [item.site for item in result.elsewhere]


def test_chance_is_as_long_as_it_says_and_drawn_anew_for_each_seed(context: StudyContext) -> None:
    edit, task = fitted(context, SITE), context.task
    x_train, x = (
        context.activations(task, half, "mark", [SITE])[SITE] for half in ("train", "test")
    )
    here = Place(SITE, edit, x_train, task.train.labels, x, task.test.labels)
    torch.testing.assert_close(here.delta, edit(x.double(), 1 - here.y, here.y) - x.double())
    drawn = by_chance(here, [3, 4], None)
    assert drawn.keys() == KINDS.keys()
    length = edit.metric.distance(here.delta)
    for kind, draws in drawn.items():
        assert len(draws) == 2 and not torch.equal(draws[0][0], draws[1][0])
        own = edit.metric.distance(draws[0][0])
        if "same length" in kind:
            moved = own > 0
            torch.testing.assert_close(own[moved], length[moved])
        assert (draws[0][1] is None) == (kind == RANDOM)
    again = by_chance(here, [3], None)
    for kind in KINDS:
        assert torch.equal(again[kind][0][0], drawn[kind][0][0])


def test_halves_are_disjoint_and_balanced() -> None:
    x, y = normal(41, 5), (torch.arange(41) % 2).long()
    own = given_to(study_of("gpt2", n=8), SITE)
    own = replace(own, settings=replace(own.settings, log_odds=3.0))
    halves = half_edits(x, y, own)
    assert [count for count, _ in halves] == [21, 20]
    # Each row marks itself in the mean of the half that it is in.
    means = [half.metric.mean for _, half in halves]
    assert means[0] is not None and means[1] is not None
    torch.testing.assert_close(21 * means[0] + 20 * means[1], x.sum(0))
    assert all(float(half.log_odds) == 3.0 for _, half in halves)
    assert half_edits(x[:6], torch.tensor([0, 0, 0, 1, 1, 1]), own) == []


def test_trials_add_displacements_at_s2_and_nowhere_else(context: StudyContext) -> None:
    data, model = context.task.test, context.model
    delta = normal(len(data), 24)
    trials = Trials(context, data)
    moved, still = trials.add("L1.mid", delta), trials.add("L1.mid", torch.zeros_like(delta))
    assert still is trials.clean
    trials.run()

    def add(module: Any, args: Any, output: Any) -> Any:
        rows, at = torch.arange(len(data)), data.positions["S2"]
        return (output[0].index_put((rows, at), delta, accumulate=True), *output[1:])

    handle = blocks_of(model)[1].attn.register_forward_hook(add)
    with torch.no_grad():
        logits = model(**data.inputs).logits[:, -1]
    handle.remove()
    rows = torch.arange(len(data))
    wanted = logits[rows, data.io_tokens] - logits[rows, data.s_tokens]
    torch.testing.assert_close(moved["logit_difference"], wanted)
    with pytest.raises(WidthError, match=f"each of the {len(data)} held-out prompts"):
        trials.add(SITE, delta[:3])


def test_a_model_whose_readers_are_unknown_is_split_by_the_class_alone() -> None:
    context = study_of("gpt_neox", n=32)
    edit = fitted(context, "L1.pre")
    result = controlled(context, "L1.pre", edit, with_roles(context))
    assert [item.space for item in result.splits] == ["differences of class means"]
    assert "'gpt_neox'" in result.unread
    assert "not split by what later parts read" in PART.panels(result)[0].text


def test_the_result_survives_json_is_drawn_and_counts_its_work(
    context: StudyContext, result: ControlsResult
) -> None:
    check(PART, result)
    assert set(PART.figures(result)) == {"controls_splits", "controls_sites", "controls_chance"}
    shown = [panel.name for panel in PART.panels(result)]
    assert shown == ["controls-splits", "controls-sites", "controls-chance"]
    assert len({len(item.flipped) for item in result.chance}) == 1
    done: list[int] = []
    Trials(context, context.task.test).run(batch_done=done.append)
    assert sum(done) == PART.work(context)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_prompts_of_one_s_own_are_split_by_heads_found_by_their_effect(n_classes: int) -> None:
    context = own_context(n_classes)
    assert PART.missing(context) is None
    done: list[int] = []
    result = PART.compute(given_to(context, "L2.pre", on_infeasible="skip"), done.append)
    check(PART, result)
    assert sum(done) == PART.work(context)
    assert [split.space.split(":")[0] for split in result.splits[:3]] == 3 * ["answer writers"]
    assert result.halves is not None and result.answered > 0
    if n_classes == 2:  # the order of the names, which the model uses here
        assert result.counterfactual.flipped.known > 0.5 > result.control.flipped.known
    shown = " ".join(panel.text for panel in PART.panels(result))
    for word in ("S2", "END", "order", "IO"):
        assert word not in shown.split()
    without = own_context(n_classes, answers=False)
    assert "no answers" in (PART.missing(without) or "")


def test_the_command_runs_the_part_and_what_it_needs(tmp_path: Path) -> None:
    arguments = ["controls", "--n", "40", "--sites", "L2.pre,L4.pre", "--out", str(tmp_path)]
    arguments += ["--no-figures", "--no-report"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    raw = json.loads((tmp_path / "results.json").read_text())
    assert list(raw["parts"]) == ["heads", "controls"]
    result = PART.read(raw["parts"]["controls"])
    assert result.site == "L2.pre" and result.counterfactual.flipped.known > 0.5
    assert [item.site for item in result.elsewhere] == ["L4.pre"]
    refused = CliRunner().invoke(app, ["controls", "--sites", "L99.pre", "--out", str(tmp_path)])
    assert refused.exit_code == 2 and "L99.pre" in refused.stderr
