"""The directions of variation: planted ones with known shares, and the organism's."""

import pytest
import torch
from contexts_for_tests import SITES, TEST, TRAIN, Count, check, computed, context, own_context
from torch import Tensor

from lrqp_torch.errors import LabelError
from lrqp_torch.study.parts.geometry import (
    PART,
    GeometryResult,
    area_under_curve,
    best_threshold,
    eta_squared,
    neighbours,
    site_geometry,
)
from lrqp_torch.study.showing import in_ranges


def planted(order: float, other: float, n: int = 64) -> tuple[Tensor, Tensor]:
    """Activations whose only variation is the order, of that size, and a sign unrelated to it."""
    generator = torch.Generator().manual_seed(1)
    axes = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64)).Q
    labels = torch.arange(n) % 2
    unrelated = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).repeat(n // 4)
    sign = 2.0 * labels.double() - 1
    return 5 + order * sign[:, None] * axes[0] + other * unrelated[:, None] * axes[1], labels


@pytest.fixture(scope="module")
def result() -> GeometryResult:
    result: GeometryResult = computed(PART, context())
    return result


def test_eta_squared_is_the_planted_share() -> None:
    labels = torch.arange(80) % 2
    unrelated = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(20)
    for order, other in ((3.0, 4.0), (1.0, 0.0), (0.0, 2.0)):
        values = order * (2.0 * labels - 1) + other * unrelated + 11
        expected = order**2 / (order**2 + other**2)
        assert eta_squared(values, labels) == pytest.approx(expected, abs=1e-12)


def test_eta_squared_of_three_unequal_classes_follows_from_the_variances() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(90, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 10)
    within = sum(
        float(values[labels == k].var(correction=0) * (labels == k).sum()) for k in (0, 1, 2)
    )
    total = float(values.var(correction=0) * len(values))
    assert eta_squared(values, labels) == pytest.approx(1 - within / total, rel=1e-9)


def test_eta_squared_of_no_variation_is_zero() -> None:
    assert eta_squared(torch.full((6,), 2.0), torch.arange(6) % 2) == 0.0


def test_planted_order_is_the_first_direction_when_it_is_the_largest() -> None:
    x, labels = planted(order=4.0, other=3.0)
    site = site_geometry(x, labels, x, labels)
    assert site.variance == pytest.approx([16 / 25, 9 / 25], abs=1e-12)
    assert site.eta_squared == pytest.approx([1.0, 0.0], abs=1e-9)
    assert (site.strongest, site.accuracy.value, site.auc) == (1, 1.0, 1.0)
    assert site.thresholds == pytest.approx([0.0], abs=1e-9)
    # ABB lies on the higher side, at ± the planted sizes.
    for point, label in zip(site.points, labels.tolist(), strict=True):
        assert point[0] == pytest.approx(4.0 if label else -4.0, rel=1e-3)
        assert abs(point[1]) == pytest.approx(3.0, rel=1e-3)


def test_planted_order_is_found_below_a_larger_unrelated_direction() -> None:
    x, labels = planted(order=1.0, other=3.0)
    site = site_geometry(x, labels, x, labels)
    assert site.eta_squared == pytest.approx([0.0, 1.0], abs=1e-9)
    assert site.strongest == 2
    assert site.strongest_eta_squared == pytest.approx(1.0)
    assert site.accuracy.known < 0.8


def test_directions_do_not_depend_on_labels() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(60, 8, generator=generator) * torch.arange(1, 9)
    labels = torch.arange(60) % 2
    others = labels[torch.randperm(60, generator=generator)]
    one, two = site_geometry(x, labels, x, labels), site_geometry(x, others, x, others)
    assert one.variance == two.variance
    for point, other in zip(one.points, two.points, strict=True):
        assert [abs(v) for v in point] == pytest.approx([abs(v) for v in other])


def test_shuffled_labels_are_at_chance_on_held_out_prompts() -> None:
    generator = torch.Generator().manual_seed(3)
    train, test = torch.randn(2, 800, 20, generator=generator)
    labels = torch.randint(2, (2, 800), generator=generator)
    site = site_geometry(train, labels[0], test, labels[1])
    lower, upper = site.accuracy.interval or (0, 0)
    assert lower < 0.5 < upper
    assert abs(site.auc - 0.5) < 0.06
    assert max(site.eta_squared) < 0.012


def test_held_out_prompts_are_measured_with_the_training_mean_and_threshold() -> None:
    x, labels = planted(order=4.0, other=3.0)
    moved = site_geometry(x, labels, x + 100, labels)
    there = site_geometry(x, labels, x, labels)
    assert moved.thresholds == there.thresholds
    assert moved.accuracy.value == 0.5  # all on one side
    assert moved.eta_squared == pytest.approx(there.eta_squared, abs=1e-9)


def test_activations_that_do_not_vary_are_no_error() -> None:
    x, labels = torch.ones(20, 4), torch.arange(20) % 2
    site = site_geometry(x, labels, x, labels)
    assert site.variance == site.eta_squared == [0.0, 0.0]
    assert site.accuracy.value == 0.5


def test_one_class_only_is_refused() -> None:
    x, labels = planted(1.0, 1.0)
    with pytest.raises(LabelError, match="held-out prompts are all of one class"):
        site_geometry(x, labels, x, torch.ones_like(labels))


@pytest.mark.parametrize("seed", range(8))
def test_threshold_and_area_agree_with_trying_everything(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (25,), generator=generator)
    labels[:2] = torch.tensor([0, 1])
    # Rounded, so that there are ties.
    scores = (torch.randn(25, generator=generator, dtype=torch.float64) + labels).mul(2).round()

    def right(threshold: float) -> int:
        return int(((scores > threshold).long() == labels).sum())

    best = max(right(cut) for cut in [*(scores - 0.25).tolist(), float(scores.max()) + 1])
    assert right(best_threshold(scores, labels)) == best
    pairs = [
        float(a > b) + 0.5 * float(a == b) for a in scores[labels == 1] for b in scores[labels == 0]
    ]
    assert area_under_curve(scores, labels, [0, 1]) == pytest.approx(sum(pairs) / len(pairs))


def test_organism_shows_the_order_without_labels_where_it_is_used(result: GeometryResult) -> None:
    for task in result.tasks.values():
        assert (task.sites["L0.pre"].accuracy.upper or 1) < 0.7
        assert task.sites["L2.pre"].accuracy.known > 0.9
        assert task.sites["L2.pre"].eta_squared[0] > 0.6 > task.eta_chance
        assert task.sites["L0.pre"].eta_squared[0] < 0.1
    assert result.best_site in {"L1.mid", "L2.pre", "L3.mid", "L4.pre"}
    own = result.tasks["prefixed"].sites
    assert own[result.best_site].eta_squared[0] == max(s.eta_squared[0] for s in own.values())


def test_result_covers_both_tasks_and_all_sites(result: GeometryResult) -> None:
    assert list(result.tasks) == ["prefixed", "plain"]
    for task in result.tasks.values():
        assert (task.train, task.test) == (TRAIN, TEST)
        assert list(task.sites) == SITES
        assert len(task.labels) == len(task.prompts) == len(task.sites["L0.pre"].points) == TEST
    assert result.tasks["prefixed"].prompts[0].startswith("… ")
    assert max(map(len, result.tasks["prefixed"].prompts)) <= 92


def test_part_keeps_its_promises(result: GeometryResult) -> None:
    check(PART, result)
    directions, by_site = PART.panels(result)
    assert next(iter(directions.charts)) == result.best_site
    assert set(directions.charts) == set(SITES)
    assert by_site.table is not None and len(by_site.table.rows) == 2 * len(SITES)
    figures = PART.figures(result)
    assert set(figures) == {
        "geometry_sites_plain", "geometry_sites_prefixed", "geometry_best", "geometry_by_site"
    }  # fmt: skip
    assert len(figures["geometry_sites_plain"].panes) == len(SITES)
    plain, prefixed = sorted(PART.says(result), key=len)
    for line in (plain, prefixed):
        assert f"The order explains that direction most at {result.best_site}" in line


@pytest.mark.parametrize("n_classes", [2, 3])
def test_own_classes_are_told_apart_in_their_own_words(n_classes: int) -> None:
    one = own_context(n_classes)
    found: GeometryResult = computed(PART, one)
    check(PART, found)
    assert found.classes == list(one.task.test.classes) and len(found.classes) == n_classes
    last = found.tasks["own"].sites["L4.pre"]
    assert len(last.thresholds) == n_classes - 1
    assert last.thresholds == sorted(last.thresholds)
    assert last.accuracy.n == len(one.task.test)
    (line,) = PART.says(found)
    assert "The class explains that direction most" in line and "order" not in line
    shown = PART.figures(found)["geometry_best"].panes[0]
    assert {marks.name for marks in shown.marks} == set(found.classes)


def test_three_classes_in_a_row_are_cut_between_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=generator)
    middle = torch.tensor([5.0, -5.0, 0.0], dtype=torch.float64)
    scores = middle[labels] + torch.randn(300, generator=generator, dtype=torch.float64)
    order, cuts = neighbours(scores, labels)
    assert order == [1, 2, 0]
    assert cuts == pytest.approx([-2.5, 2.5], abs=0.7)
    said = torch.tensor(order)[torch.bucketize(scores, torch.tensor(cuts, dtype=torch.float64))]
    assert float((said == labels).double().mean()) > 0.97
    pairs = [
        float((scores[labels == b][:, None] > scores[labels == a][None]).double().mean())
        for a, b in ((1, 2), (1, 0), (2, 0))
    ]
    assert area_under_curve(scores, labels, order) == pytest.approx(sum(pairs) / 3)
    site = site_geometry(
        scores[:, None] * torch.eye(4)[0], labels, scores[:, None] * torch.eye(4)[0], labels
    )
    assert site.accuracy.known > 0.97 and site.auc > 0.99


def test_the_chance_of_eta_squared_is_that_of_random_directions(result: GeometryResult) -> None:
    """Of normal values without a class effect 95 % stay below it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(TEST) % 2
    values = torch.randn(2000, TEST, generator=generator)
    below = [eta_squared(row, labels) < result.tasks["plain"].eta_chance for row in values]
    assert sum(below) / 2000 == pytest.approx(0.95, abs=0.015)


def test_progress_adds_up_also_when_activations_are_there_already() -> None:
    one = context("plain", None)
    for _ in range(2):
        count = Count()
        computed(PART, one, advance=count)
        assert count.total == PART.work(one) == TRAIN + TEST + len(SITES)


def test_sites_in_words() -> None:
    order = ["a", "b", "c", "d", "e"]
    assert in_ranges([], order) == "no site"
    assert in_ranges(["b"], order) == "b"
    assert in_ranges(["a", "b", "d", "e"], order) == "a to b, d to e"
    assert in_ranges(["a", "c", "e"], order) == "a, c, e"
    assert in_ranges(order, order) == "a to e"
