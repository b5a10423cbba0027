"""The dose sweep, against its closed form and against plain forward passes of the organism."""

from dataclasses import replace

import pytest
import torch
from contexts_for_tests import TEST, TRAIN, Count, check, computed, context, own_context

from lrqp_torch import LRQP
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.parts.dose import PART, Dose, DoseResult, EditSummary

SITE = "L2.pre"
ALPHAS = (-10.0, 0.0, 5.0, 12.0, 30.0)


def flips(edit: EditSummary) -> float:
    assert edit.flipped is not None
    return edit.flipped.known


@pytest.fixture(scope="module")
def result() -> DoseResult:
    result: DoseResult = computed(Dose(ALPHAS), context(), SITE)
    return result


def test_sizes_follow_the_closed_form_of_two_classes(result: DoseResult) -> None:
    """The distance is max(0, log α − z) / √(wᵀΣw), z the target's log odds and w their slope."""
    one = context()
    for task in (one.task, one.other_task):
        assert task is not None
        x = one.activations(task, "train", "S2", [SITE])[SITE]
        edit = LRQP.fit(x, task.train.labels)
        held_out = one.activations(task, "test", "S2", [SITE])[SITE].double()
        weight, bias = edit.probe.weight.double(), edit.probe.bias.double()
        sign = 1.0 - 2.0 * task.test.labels  # the target is the other order
        odds = sign * (held_out @ (weight[1] - weight[0]) + bias[1] - bias[0])
        slope = weight[1] - weight[0]
        pushed = edit.metric.covariance @ slope
        for alpha, found in zip(ALPHAS, result.tasks[task.name].doses, strict=True):
            gap = (alpha - odds).clamp_min(0)
            distance = gap / (slope @ pushed).sqrt()
            euclidean = gap * pushed.norm() / (slope @ pushed)
            assert found.distance.known == pytest.approx(float(distance.mean()), rel=1e-4)
            assert found.euclidean.known == pytest.approx(float(euclidean.mean()), rel=1e-4)
            assert found.edited == float((gap > 0).double().mean())
            assert (found.log_alpha, found.unreached) == (alpha, 0)


def test_more_odds_cost_more_and_flip_more_where_the_order_is_used(result: DoseResult) -> None:
    for task in result.tasks.values():
        distances = [edit.distance.known for edit in task.doses]
        differences = [edit.preference.known for edit in task.doses]
        assert distances == sorted(distances)
        assert len(set(distances)) == len(distances)
        assert differences == sorted(differences, reverse=True)
        assert flips(task.doses[0]) < 0.2 and flips(task.doses[-1]) > 0.9
        half = task.half_dose()
        assert half is not None and -10 < half <= 12
        assert flips(task.control) < 0.05 and flips(task.counterfactual) > 0.6


def test_every_number_has_its_interval_around_it(result: DoseResult) -> None:
    for task in result.tasks.values():
        for edit in (*task.doses, task.control, task.counterfactual):
            assert edit.flipped is not None and edit.flipped.n == task.answered
            means = (edit.preference, edit.divergence, edit.distance, edit.euclidean)
            for found in (edit.flipped, *means):
                assert found is not None and found.interval is not None
                assert found.interval[0] <= found.known <= found.interval[1]
            assert edit.preference is not None and len(set(edit.preference.interval or [])) == 2


@pytest.mark.parametrize("alpha", [5.0, 30.0])
def test_replayed_answers_are_those_of_the_full_forward_pass(
    result: DoseResult, alpha: float
) -> None:
    one = context()
    data = one.task.test
    x = one.activations(one.task, "train", "S2", [SITE])[SITE]
    edit = LRQP.fit(x, one.task.train.labels, rule="fixed", log_odds=alpha)
    rows = torch.arange(TEST)
    with torch.no_grad():
        clean = one.model(**data.inputs).logits[:, -1]
        target = 1 - data.labels
        with edit.at(one.model, SITE, positions=data.positions["S2"], target=target):
            edited = one.model(**data.inputs).logits[:, -1]
    before, after = (
        logits[rows, data.io_tokens] - logits[rows, data.s_tokens] for logits in (clean, edited)
    )
    task = result.tasks["prefixed"]
    found = task.doses[ALPHAS.index(alpha)]
    assert task.clean is not None and found.preference is not None
    assert task.clean.value == pytest.approx(float(before.mean()), abs=1e-4)
    assert found.preference.value == pytest.approx(float(after.mean()), abs=1e-4)
    kl = (clean.softmax(-1) * (clean.log_softmax(-1) - edited.log_softmax(-1))).sum(-1)
    assert found.divergence.value == pytest.approx(float(kl.mean()), rel=1e-3)
    assert task.answered == int((before > 0).sum())
    assert flips(found) == pytest.approx(float((after[before > 0] < 0).double().mean()))


def test_no_dose_flips_much_where_the_order_is_only_knowable() -> None:
    found = computed(Dose([0.0, 30.0]), context("plain", None), "L4.pre")
    task = found.tasks["plain"]
    assert list(found.tasks) == ["plain"]
    assert task.probe_accuracy > 0.95
    assert flips(task.doses[-1]) < 0.1
    assert task.half_dose() is None
    assert "no dose of the sweep" in " ".join(PART.says(found))


def test_mirror_rule_asks_for_at_least_its_floor(result: DoseResult) -> None:
    assert result.floor == 10.0
    for task in result.tasks.values():
        assert task.control.log_alpha == 10.0
        assert task.counterfactual.log_alpha > 10.0


def test_part_keeps_its_promises(result: DoseResult) -> None:
    check(PART, result)
    (panel,) = PART.panels(result)
    assert panel.table is not None
    assert len(panel.table.rows) == 2 * (len(ALPHAS) + 2)
    curve = panel.charts["answers flipped (%)"].panes[0].marks[0]
    assert list(curve.x) == list(ALPHAS)
    assert list(curve.y) == [100 * flips(edit) for edit in result.tasks["prefixed"].doses]
    assert len(PART.figures(result)["dose"].panes) == 4


def test_a_model_that_answers_nothing_is_shown_too(result: DoseResult) -> None:
    def nothing(edit: EditSummary) -> EditSummary:
        return replace(edit, flipped=Estimate.count(0, 0))

    tasks = {
        name: replace(
            task,
            answered=0,
            doses=[nothing(edit) for edit in task.doses],
            control=nothing(task.control),
            counterfactual=nothing(task.counterfactual),
        )
        for name, task in result.tasks.items()
    }
    empty = replace(result, tasks=tasks)
    assert tasks["plain"].half_dose() is None
    assert "no held-out prompt with IO" in " ".join(PART.says(empty))
    check(PART, empty)


def test_two_classes_of_ones_own_are_dosed_as_the_order_is() -> None:
    found: DoseResult = computed(Dose([0.0, 30.0]), own_context(), SITE)
    task = found.tasks["own"]
    assert flips(task.doses[-1]) > 0.9 > 0.05 > flips(task.control)
    check(PART, found)
    (line,) = PART.says(found)
    assert line.startswith("At L2.pre, half of the answers flip") and "the other class" in line


@torch.no_grad()
def test_of_three_classes_a_flip_is_an_answer_with_the_next() -> None:
    one, site = own_context(3), "L4.pre"
    found: DoseResult = computed(Dose([20.0]), one, site)
    data, model = one.task.test, one.model
    x = one.activations(one.task, "train", "mark", [site])[site]
    edit = LRQP.fit(x, one.task.train.labels, rule="fixed", log_odds=20.0)
    target = (data.labels + 1) % 3
    clean = data.scores(model(**data.inputs).logits[:, -1])
    with edit.at(model, site, positions=data.position, target=target):
        edited = data.scores(model(**data.inputs).logits[:, -1])
    right = clean.argmax(-1) == data.labels
    assert found.tasks["own"].answered == int(right.sum()) > 0
    share = float((edited.argmax(-1) == target)[right].double().mean())
    assert flips(found.tasks["own"].doses[0]) == pytest.approx(share)
    assert share > 0.1
    check(PART, found)


def test_without_answers_the_next_token_is_measured() -> None:
    found: DoseResult = computed(Dose([0.0, 30.0]), own_context(answers=False), SITE)
    task = found.tasks["own"]
    assert task.answered is None and task.clean is None
    assert task.counterfactual.flipped is None and task.counterfactual.preference is None
    assert task.counterfactual.divergence.known > 1 > 10 * task.control.divergence.known
    check(PART, found)
    assert "answers flipped (%)" not in PART.panels(found)[0].charts
    assert "nats of the next token" in PART.says(found)[0]


def test_progress_adds_up_and_the_seed_decides() -> None:
    one, count, part = context("plain", None), Count(), Dose([3.0])
    first = computed(part, one, SITE, count)
    assert count.total == part.work(one) == TRAIN + TEST + 3 * TEST
    assert computed(part, one, SITE) == first
