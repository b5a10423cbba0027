"""The directions of variation: planted ones with known shares, and the organism's."""

from pathlib import Path

import pytest
import torch
from contexts_for_tests import SITES, TEST, TRAIN, Count, check_part, context
from torch import Tensor

from lrqp_torch.errors import LabelError
from lrqp_torch.study import geometry
from lrqp_torch.study.by_site import in_ranges
from lrqp_torch.study.geometry import (
    GeometryResult,
    area_under_curve,
    best_threshold,
    eta_squared,
    site_geometry,
)


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
    return geometry.compute(context())


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
    assert (site.strongest, site.accuracy, site.auc) == (1, 1.0, 1.0)
    assert site.threshold == pytest.approx(0.0, abs=1e-9)
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
    assert site.accuracy < 0.8


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
    assert site.lower < 0.5 < site.upper
    assert abs(site.auc - 0.5) < 0.06
    assert max(site.eta_squared) < 0.012


def test_held_out_prompts_are_measured_with_the_training_mean_and_threshold() -> None:
    x, labels = planted(order=4.0, other=3.0)
    moved = site_geometry(x, labels, x + 100, labels)
    there = site_geometry(x, labels, x, labels)
    assert moved.threshold == there.threshold
    assert moved.accuracy == 0.5  # all on one side
    assert moved.eta_squared == pytest.approx(there.eta_squared, abs=1e-9)


def test_activations_that_do_not_vary_are_no_error() -> None:
    x, labels = torch.ones(20, 4), torch.arange(20) % 2
    site = site_geometry(x, labels, x, labels)
    assert site.variance == site.eta_squared == [0.0, 0.0]
    assert site.accuracy == 0.5


def test_one_order_only_is_refused() -> None:
    x, labels = planted(1.0, 1.0)
    with pytest.raises(LabelError, match="held-out prompts are all of one order"):
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
    assert area_under_curve(scores, labels) == pytest.approx(sum(pairs) / len(pairs))


def test_organism_shows_the_order_without_labels_where_it_is_used(result: GeometryResult) -> None:
    for task in result.tasks.values():
        assert task.sites["L0.pre"].upper < 0.7
        assert task.sites["L2.pre"].accuracy > 0.9
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


def test_part_keeps_its_promises(result: GeometryResult, tmp_path: Path) -> None:
    check_part(geometry, result, tmp_path)
    by_site = next(panel for panel in geometry.panels(result) if panel.name == "geometry-by-site")
    assert "at least 90 %" in by_site.text
    directions = geometry.panels(result)[0]
    assert next(iter(directions.figures)) == result.best_site
    assert set(directions.figures) == set(SITES)


def test_progress_adds_up_also_when_activations_are_there_already() -> None:
    one = context("plain", None)
    for _ in range(2):
        count = Count()
        geometry.compute(one, count)
        assert count.total == geometry.work(one) == TRAIN + TEST + len(SITES)


def test_sites_in_words() -> None:
    order = ["a", "b", "c", "d", "e"]
    assert in_ranges([], order) == "no site"
    assert in_ranges(["b"], order) == "b"
    assert in_ranges(["a", "b", "d", "e"], order) == "a to b, d to e"
    assert in_ranges(["a", "c", "e"], order) == "a, c, e"
    assert in_ranges(order, order) == "a to e"
