"""The measures of the league table against independent calculations, and its runs of the model."""

import statistics
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from compare_for_tests import FEW, SITE, baseline, few, reference
from contexts_for_tests import TEST, context, own_context
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lrqp_torch import capture
from lrqp_torch.baselines import BASELINES, DAS, Behaviour, answer_loss
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.study.estimates import Sample, bca
from lrqp_torch.study.league import (
    LEAST_TOKENS,
    Swept,
    cost_at,
    elsewhere,
    front,
    relative_costs,
    unrelated,
)
from lrqp_torch.study.methods import Training, counterparts, others_alike, shortest, train_das
from lrqp_torch.study.oracles import (
    Oracles,
    completeness,
    nullified,
    reliability,
    selectivity,
    side_variables,
    total_variation,
)
from lrqp_torch.study.running import Trial, Trials

# ---- measures ------------------------------------------------------------------------------------

distributions = st.lists(st.floats(0.01, 1), min_size=2, max_size=6).map(
    lambda v: torch.tensor(v, dtype=torch.float64) / sum(v)
)
share = st.floats(0, 1)


@given(share, share)
def test_reliability_is_the_harmonic_mean(a: float, b: float) -> None:
    found = float(reliability(*torch.tensor([a, b], dtype=torch.float64)))
    assert found == pytest.approx(statistics.harmonic_mean([a, b]), abs=1e-12)
    assert min(a, b) - 1e-12 <= found <= max(a, b) + 1e-12


def test_completeness_is_1_exactly_where_the_oracle_is_certain_of_the_target() -> None:
    certain = torch.eye(3).double()
    target = torch.arange(3)
    assert completeness(certain, target).tolist() == [1, 1, 1]
    assert completeness(certain, target.roll(1)).tolist() == [0, 0, 0]
    goal = torch.nn.functional.one_hot(torch.tensor([1]), 3).double()
    mixed = torch.tensor([[0.2, 0.5, 0.3]]).double()
    wanted = float(1 - total_variation(mixed, goal))
    assert float(completeness(mixed, torch.tensor([1]))) == pytest.approx(wanted)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_an_edit_that_erases_is_complete_where_the_oracle_cannot_tell(classes: int) -> None:
    uniform = torch.full((1, classes), 1 / classes).double()
    assert float(nullified(uniform)) == pytest.approx(1)
    assert float(nullified(torch.eye(classes).double()[:1])) == pytest.approx(0)


@given(distributions)
def test_selectivity_is_1_for_no_change_and_0_for_the_largest(before: Tensor) -> None:
    assert float(selectivity(before[None], before[None])) == 1
    corners = torch.eye(len(before)).double()
    furthest = max(float(total_variation(before, corner)) for corner in corners)
    least = min(float(selectivity(before[None], corner[None])) for corner in corners)
    most = max(1 - float(before.min()), float(before.max()))
    # m of the paper is the distance of the furthest corner.
    assert furthest == pytest.approx(most)
    assert least == pytest.approx(0, abs=1e-12)


numbers = st.integers(-3, 3).map(float)  # few values, so that there are ties


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12))
def test_the_front_is_what_no_point_beats(points: list[tuple[float, float]]) -> None:
    effects, costs = [p[0] for p in points], [p[1] for p in points]
    brute = [
        not any(e >= effect and c <= cost and (e, c) != (effect, cost) for e, c in points)
        for effect, cost in points
    ]
    assert front(effects, costs) == brute


def test_cost_at_an_effect_is_read_off_straight_lines() -> None:
    effects = torch.tensor([[1.0, 2.0, 4.0], [2.0, 1.0, 3.0], [0.1, 0.2, 0.3]])
    costs = torch.tensor([[0.5, 1.5, 2.5], [1.0, 2.0, 4.0], [1.0, 1.0, 1.0]])
    wanted = torch.tensor([3.0, 1.5, 1.5])
    found = cost_at(effects, costs, wanted)
    assert found[:2].tolist() == [2.0, 0.75]  # the first time that the second curve gets there
    assert found[2].isnan()
    assert float(cost_at(effects[0], costs[0], torch.tensor(1.0))) == 0.5


def test_resamples_are_those_of_the_bootstrap() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, generator=generator).double()
    for groups in (None, torch.arange(200) // 4):
        sample = Sample(1, groups)
        means, own = sample.resampled(torch.stack([values, 2 * values], -1)).T, sample.mean(values)
        assert torch.allclose(2 * means[0], means[1])
        lower, upper = bca(float(values.mean()), means[0], leave_out(values, groups))
        assert (own.lower, own.upper) == pytest.approx((lower, upper), rel=1e-12)


def leave_out(values: Tensor, groups: Tensor | None) -> Tensor:
    """The mean of all but one prompt, or one group."""
    kept = (
        ~torch.eye(200, dtype=torch.bool) if groups is None else groups != torch.arange(50)[:, None]
    )
    return torch.stack([values[rows].mean() for rows in kept])


def test_relative_cost_of_a_dearer_copy_of_lrqp_is_its_price() -> None:
    generator = torch.Generator().manual_seed(0)
    fall = torch.tensor([1.0, 2.0]) * (1 + torch.rand(50, 1, generator=generator)).double()
    costs = {"divergence": fall**2}
    own = Swept("lrqp", "LRQP", "strength", (1.0, 2.0), (None, None), fall, costs)
    dear = replace(own, name="dear", costs={"divergence": 3 * fall**2})
    weak = replace(own, name="weak", fall=0.1 * fall)
    found = relative_costs([own, dear, weak], "lrqp", Sample(0))
    for name, price in (("lrqp", 1), ("dear", 3)):
        mean = found[name]["divergence"]
        assert mean is not None
        assert (mean.value, mean.lower, mean.upper) == pytest.approx((price, price, price))
    assert found["weak"]["divergence"] is None


# ---- independent probes --------------------------------------------------------------------------


def test_no_prompt_is_read_by_a_probe_that_was_fitted_to_it() -> None:
    one = context()
    x = one.activations(one.task, "test", "S2", [SITE])[SITE]
    oracles = Oracles(x, one.task.test, one.generator())
    labels = one.task.test.labels
    found = oracles.logits("order of the names", x)
    assert abs(int((oracles.half == 1).sum()) - TEST / 2) <= 1
    for half in (0, 1):
        fitted, read = oracles.half == half, oracles.half != half
        probe = LinearProbe.fit(x[fitted], labels[fitted])
        wanted = x[read].double() @ probe.weight.double().T + probe.bias.double()
        assert torch.allclose(found[read], wanted, atol=1e-4)
    right = (found.argmax(-1) == labels).double().mean()
    assert oracles.scores[0].accuracy.value == pytest.approx(float(right))
    assert oracles.scores[0].readable and oracles.scores[0].accuracy.known > 0.9
    assert "order of the names" not in oracles.others


# ---- runs of the model ---------------------------------------------------------------------------


@cache
def patches() -> tuple[Tensor, Tensor]:
    """What a patch writes into each prompt: its minimal pair, and another prompt of its class."""
    one = few()
    x = one.activations(one.task, "test", "mark", [SITE])[SITE]
    alike = others_alike(one.task.test.labels, one.generator())
    return counterparts(one, one.task.test, [SITE])[SITE], x[alike]


def test_partners_are_minimal_pairs_and_as_a_control_others_of_the_same_order() -> None:
    one = few()
    data = one.task.test
    pairs, others = patches()
    wanted = capture(one.model, data.twins().prompts.inputs, [SITE], data.positions["S2"])[SITE]
    assert torch.allclose(pairs, wanted, atol=1e-4)
    x = one.activations(one.task, "test", "S2", [SITE])[SITE]
    chosen = torch.cdist(others.double(), x.double()).argmin(1)
    assert torch.equal(x[chosen], others)
    assert torch.equal(data.labels[chosen], data.labels)
    assert (chosen != torch.arange(FEW)).all()
    assert chosen.unique().numel() == FEW


def test_prompts_without_minimal_pairs_are_patched_from_training_prompts_of_the_class() -> None:
    one = own_context(3)
    train, test = one.task.train, one.task.test
    x = one.activations(one.task, "train", "mark", [SITE])[SITE]
    found = counterparts(one, test, [SITE])[SITE]
    chosen = torch.cdist(found.double(), x.double()).argmin(1)
    assert torch.equal(x[chosen], found)
    assert torch.equal(train.labels[chosen], (test.labels + 1) % 3)


def runs_of(edits: list[Any], *, control: bool = False) -> tuple[Trial, list[Trial]]:
    one = few()
    data = one.task.test
    target = data.labels if control else 1 - data.labels
    trials = Trials(one, data, elsewhere=elsewhere(data)[0], activations=True)
    done = [trials.write(SITE, e, target, data.labels, patches()[control]) for e in edits]
    trials.run()
    return trials.clean, done


CLOSED = [name for name in BASELINES if not name.startswith("das")]


def test_strength_0_is_the_clean_run_bit_for_bit() -> None:
    clean, (nothing, *found) = runs_of(
        [baseline("none"), *(baseline(name).at_strength(0) for name in CLOSED)]
    )
    x = nothing["activations"]
    for effects in found:
        assert torch.equal(effects["logit_difference"], clean["logit_difference"])
        for name in ("divergence", "rest"):
            assert not effects[name].any()
        assert torch.equal(effects["activations"], x)


def test_no_edit_changes_nothing_and_a_mean_difference_nothing_under_control() -> None:
    clean, (nothing,) = runs_of([baseline("none")])
    undone, (shift,) = runs_of([baseline("mean_difference")], control=True)
    for effects in (nothing, shift):
        assert not effects["divergence"].any()
        assert torch.equal(effects["activations"], nothing["activations"])
        assert torch.equal(effects["logit_difference"], clean["logit_difference"])
    assert torch.equal(clean["logit_difference"], undone["logit_difference"])


def test_effects_are_those_of_whole_forward_passes() -> None:
    one = few()
    data, model = one.task.test, one.model
    labels, rows = data.labels, torch.arange(FEW)
    edit = baseline("lrqp").at_strength(0.75)
    watched = ["L1.H0", "L3.H1", "L5.H0"]
    keys = torch.stack([data.positions["IO"], data.positions["S1"]], dim=-1)
    trials = Trials(
        one, data, elsewhere=elsewhere(data)[0], watched=watched, keys=keys, activations=True
    )
    found, clean = trials.write(SITE, edit, 1 - labels, labels), trials.clean
    trials.run()
    layers = [3, 5]
    with torch.no_grad():
        with record_patterns(model, layers, data.positions["END"]) as before:
            plain = model(**data.inputs).logits.double()
        with (
            record_patterns(model, layers, data.positions["END"]) as after,
            edit.at(model, SITE, positions=data.positions["S2"], target=1 - labels, source=labels),
        ):
            logits = model(**data.inputs).logits.double()
            x = capture(model, data.inputs, [SITE], data.positions["S2"])[SITE]
    for effects, whole in ((clean, plain), (found, logits)):
        end = whole[rows, data.positions["END"]]
        difference = end[rows, data.io_tokens] - end[rows, data.s_tokens]
        assert torch.allclose(effects["logit_difference"], difference, atol=1e-3)
    assert torch.allclose(found["activations"], x, atol=1e-3)

    columns = torch.arange(plain.shape[1])
    shift = torch.zeros(FEW).double()
    for row in range(FEW):
        s2, end = int(data.positions["S2"][row]), int(data.positions["END"][row])
        inside = (columns > s2) & (columns < end)
        p, q = plain[row, inside].log_softmax(-1), logits[row, inside].log_softmax(-1)
        divergence = (p.exp() * (p - q)).sum(-1)
        assert float(found["divergence"][row]) == pytest.approx(
            float(divergence.mean()), rel=1e-3, abs=1e-5
        )
        # What is left of KL once the two names are struck from the vocabulary.
        other = torch.ones(plain.shape[-1], dtype=torch.bool)
        other[torch.stack([data.io_tokens[row], data.s_tokens[row]])] = False
        neither = p[:, other].exp().sum(-1)
        p, q = (t[:, other].log_softmax(-1) for t in (p, q))
        rest = neither * (p.exp() * (p - q)).sum(-1)
        assert float(found["rest"][row]) == pytest.approx(float(rest.mean()), rel=1e-2, abs=1e-5)
        said = 1 - float(neither.mean())
        assert float(clean["said_elsewhere"][row]) == pytest.approx(said, abs=1e-4)
        io, s1 = data.positions["IO"][row], data.positions["S1"][row]
        for layer, head in ((3, 1), (5, 0)):  # L1.H0 lies below the edit and cannot change
            a, b = after[layer][row, head], before[layer][row, head]
            shift[row] += float(a[io] - a[s1] - b[io] + b[s1]) / 3
    assert torch.allclose(found["attention"], shift, atol=1e-4)
    assert bool((found["rest"] <= found["divergence"] + 1e-6).all())


def test_das_learns_the_same_from_reruns_as_from_whole_forward_passes() -> None:
    one = few()
    data = one.task.train[:40]
    training = Training(prompts=32, epochs=2)
    reruns, settings = train_das(one, SITE, reference(), data, training)
    behaviour = Behaviour(
        one.model,
        data.inputs,
        SITE,
        data.positions["S2"],
        answer_loss(data.positions["END"], data.s_tokens),
        batch_size=training.batch_size,
    )
    paired = counterparts(one, data, [SITE])[SITE]
    whole = DAS.fit(
        behaviour, paired, reference=reference(), epochs=2, validation=0.25, seed=one.seed
    )
    assert isinstance(reruns, DAS)
    assert torch.allclose(reruns.basis, whole.basis, atol=1e-5)
    assert "rank 1, 40 prompts, 2 epochs" in settings


def test_training_prompts_are_the_shortest_without_spare_padding() -> None:
    data = context().task.train
    lengths = data.inputs["attention_mask"].sum(1)
    chosen = shortest(data, 50)
    found = chosen.inputs["attention_mask"].sum(1)
    assert sorted(found.tolist()) == sorted(lengths.tolist())[:50]
    assert int(found.max()) == chosen.inputs["input_ids"].shape[1]
    rows = torch.arange(50)
    for name, tokens in (("S2", chosen.s_tokens), ("IO", chosen.io_tokens)):
        assert torch.equal(chosen.inputs["input_ids"][rows, chosen.positions[name]], tokens)


def test_unrelated_text_is_what_stands_before_the_first_name() -> None:
    one = context()
    found = unrelated(one, 30)
    assert found is not None
    texts, behind, target = found
    data = one.task.test
    prefixes = set()
    for row in range(len(data)):
        real = data.inputs["attention_mask"][row].bool().clone()
        real[int(data.positions["first"][row]) :] = False
        prefixes.add(tuple(data.inputs["input_ids"][row][real].tolist()))
    for row in range(len(texts)):
        real = texts.inputs["attention_mask"][row].bool()
        tokens = texts.inputs["input_ids"][row][real]
        assert tuple(tokens.tolist()) in prefixes and len(tokens) >= LEAST_TOKENS
        at, last = int(texts.position[row]), real.numel() - 1
        assert real[at - 1] and at < last
        assert behind[row].nonzero().flatten().tolist() == list(range(at + 1, last + 1))
        assert texts.inputs["position_ids"][row][real].tolist() == list(range(len(tokens)))
    assert set(target.tolist()) == {0, 1}
    again = unrelated(one, 30)
    assert again is not None and torch.equal(again[0].position, texts.position)


def test_kl_on_unrelated_text_is_that_of_whole_forward_passes() -> None:
    one = context()
    found = unrelated(one, 10)
    assert found is not None
    texts, behind, target = found
    edit = baseline("mean_difference").at_strength(2)
    trials = Trials(one, texts, elsewhere=behind)
    done = trials.write(SITE, edit, target)
    trials.run()
    with torch.no_grad():
        plain = one.model(**texts.inputs).logits.double().log_softmax(-1)
        with edit.at(one.model, SITE, positions=texts.position, target=target):
            edited = one.model(**texts.inputs).logits.double().log_softmax(-1)
    each = (plain.exp() * (plain - edited)).sum(-1)
    wanted = torch.stack([row[keep].mean() for row, keep in zip(each, behind, strict=True)])
    assert torch.allclose(done["divergence"], wanted, rtol=1e-2, atol=1e-6)
    assert float(wanted.max()) > 1e-5


def test_where_no_token_lies_between_mark_and_answer_the_last_one_is_read() -> None:
    data = own_context(3).task.test  # marked at their last tokens
    beside, where = elsewhere(data)
    assert where == "at the last token"
    assert beside.nonzero()[:, 1].tolist() == data.end.tolist()
    named = context().task.test
    beside, where = elsewhere(named)
    assert where == "between S2 and END"
    gaps = named.positions["END"] - named.positions["S2"] - 1
    assert torch.equal(beside.sum(1), gaps)


def test_side_variables_of_one_s_own_task_do_not_tell_its_class() -> None:
    data = own_context(2).task.test
    found = side_variables(data)
    assert len(found) == 3 and all(len(values) == len(data) for values in found.values())
    for name, values in found.items():
        if "token" in name:
            for value in set(values) - {None}:
                rows = [row for row, other in enumerate(values) if other == value]
                assert set(data.labels[rows].tolist()) == {0, 1}
