"""The dose sweep, against its closed form and against plain forward passes of the organism."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contexts_for_tests import TEST, TRAIN, Count, check_part, context

from lrqp_torch import LRQP
from lrqp_torch.errors import SettingError
from lrqp_torch.study import dose
from lrqp_torch.study.dose import DoseResult, EditSummary

SITE = "L2.pre"
ALPHAS = (-10.0, 0.0, 5.0, 12.0, 30.0)


@pytest.fixture(scope="module")
def result() -> DoseResult:
    return dose.compute(context(), SITE, log_alphas=ALPHAS)


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
            assert found.distance.value == pytest.approx(float(distance.mean()), rel=1e-4)
            assert found.euclidean.value == pytest.approx(float(euclidean.mean()), rel=1e-4)
            assert found.edited == float((gap > 0).double().mean())
            assert (found.log_alpha, found.unreached) == (alpha, 0)


def test_more_odds_cost_more_and_flip_more_where_the_order_is_used(result: DoseResult) -> None:
    for task in result.tasks.values():
        distances = [edit.distance.value for edit in task.doses]
        differences = [edit.logit_difference.value for edit in task.doses]
        assert distances == sorted(distances)
        assert len(set(distances)) == len(distances)
        assert differences == sorted(differences, reverse=True)
        assert task.doses[0].flipped is not None and task.doses[0].flipped < 0.2
        assert task.doses[-1].flipped is not None and task.doses[-1].flipped > 0.9
        half = task.half_dose()
        assert half is not None and -10 < half <= 12
        assert task.control.flipped is not None and task.control.flipped < 0.05
        assert task.counterfactual.flipped is not None and task.counterfactual.flipped > 0.6


def test_every_number_has_its_interval_around_it(result: DoseResult) -> None:
    for task in result.tasks.values():
        for edit in (*task.doses, task.control, task.counterfactual):
            assert edit.flipped is not None
            assert edit.lower <= edit.flipped <= edit.upper
            for mean in (edit.logit_difference, edit.distance, edit.euclidean):
                assert mean.lower <= mean.value <= mean.upper
            assert edit.logit_difference.lower < edit.logit_difference.upper


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
    assert task.clean.value == pytest.approx(float(before.mean()), abs=1e-4)
    assert found.logit_difference.value == pytest.approx(float(after.mean()), abs=1e-4)
    assert task.answered == int((before > 0).sum())
    assert found.flipped == pytest.approx(float((after[before > 0] < 0).double().mean()))


def test_no_dose_flips_much_where_the_order_is_only_knowable() -> None:
    found = dose.compute(context("plain", None), "L4.pre", log_alphas=[0.0, 30.0])
    task = found.tasks["plain"]
    assert list(found.tasks) == ["plain"]
    assert task.probe_accuracy > 0.95
    assert task.doses[-1].flipped is not None and task.doses[-1].flipped < 0.1
    assert task.half_dose() is None
    assert "no dose of the sweep" in dose.panels(found)[0].text


def test_mirror_rule_asks_for_at_least_its_floor(result: DoseResult) -> None:
    assert result.floor == 10.0
    for task in result.tasks.values():
        assert task.control.log_alpha == 10.0
        assert task.counterfactual.log_alpha > 10.0


def test_part_keeps_its_promises(result: DoseResult, tmp_path: Path) -> None:
    check_part(dose, result, tmp_path)
    panel = dose.panels(result)[0]
    assert panel.table is not None
    assert len(panel.table.rows) == 2 * (len(ALPHAS) + 2)
    curve = panel.figures["answers flipped"].data[0]
    assert list(curve.x) == list(ALPHAS)
    assert list(curve.y) == [edit.flipped for edit in result.tasks["prefixed"].doses]


def test_a_model_that_answers_nothing_is_shown_too(result: DoseResult, tmp_path: Path) -> None:
    def nothing(edit: EditSummary) -> EditSummary:
        return replace(edit, flipped=None, lower=0.0, upper=1.0)

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
    assert "no held-out prompt with IO" in dose.panels(empty)[0].text
    check_part(dose, empty, tmp_path)


def test_progress_adds_up_and_the_seed_decides() -> None:
    one, count = context("plain", None), Count()
    first = dose.compute(one, SITE, log_alphas=[3.0], advance=count)
    assert count.total == dose.work(one, log_alphas=[3.0]) == TRAIN + TEST + 3 * TEST
    assert dose.compute(one, SITE, log_alphas=[3.0]) == first


@pytest.mark.parametrize("alphas", [[], [1.0, 1.0], [2.0, 1.0]])
def test_doses_must_rise(alphas: list[float]) -> None:
    with pytest.raises(SettingError, match="rising"):
        dose.compute(context(), SITE, log_alphas=alphas)
