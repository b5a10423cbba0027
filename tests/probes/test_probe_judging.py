"""What a fit says unasked, and what it reports when asked."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lrqp_torch import LRQP, Covariance, LinearProbe, Mahalanobis
from lrqp_torch.errors import LabelError, ProbeWarning


def samples(
    n: int, width: int = 8, n_classes: int = 2, signal: float = 2.0
) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % n_classes
    centres = signal * torch.eye(n_classes, width)
    return torch.randn(n, width) + centres[labels], labels


def said_by(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(warning.category is ProbeWarning for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("n_classes", [2, 4])
def test_good_data_are_fitted_in_silence(n_classes: int) -> None:
    x, y = samples(400, n_classes=n_classes)
    assert said_by(lambda: LRQP.fit(x, y, held_out=0.25)) == []
    assert said_by(lambda: LRQP.fit(1000 * x + 5000, y)) == []
    assert said_by(lambda: Covariance(8).update(x).finish()) == []


def test_few_samples() -> None:
    x, y = samples(30, width=64)
    (said,) = said_by(lambda: LinearProbe.fit(x, y))
    assert "30 activations of width 64 are fewer than the 130 numbers of the probe" in said


@pytest.mark.parametrize(("n", "width"), [(300, 8), (1000, 32), (400, 100)])
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("l2", [None, 1.0])
def test_random_labels(n: int, width: int, n_classes: int, l2: float | None) -> None:
    x, y = samples(n, width, n_classes, signal=0.0)
    (said,) = said_by(lambda: LinearProbe.fit(x, y, l2=l2))
    assert "no more than chance" in said
    clear, strong = samples(n, width, n_classes, signal=6.0)
    assert said_by(lambda: LinearProbe.fit(clear, strong, l2=l2)) == []


def test_classes_of_very_different_size() -> None:
    x, y = samples(1000)
    rows = torch.cat([torch.arange(0, 1000, 2), torch.arange(1, 1000, 20)])
    (said,) = said_by(lambda: LinearProbe.fit(x[rows], y[rows]))
    assert "class 1 has 50 of 550 examples" in said and "balanced" in said
    assert said_by(lambda: LinearProbe.fit(x[rows], y[rows], class_weight="balanced")) == []


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_rows_that_dwarf_the_others(share: float, offset: float) -> None:
    x, y = samples(1000)
    sinks = torch.randperm(1000)[: int(1000 * share)]
    x = x + offset
    x[sinks] = 0.0
    x[sinks, 3] = 900.0
    for fit in (lambda: LRQP.fit(x, y), lambda: LinearProbe.fit(x, y), lambda: Mahalanobis.fit(x)):
        (said,) = said_by(fit)
        assert f"{len(sinks)} of 1000 activations" in said and "coordinate 3" in said
        assert str(sorted(sinks.tolist())[:5]) in said
    if share <= 0.1:
        (said,) = said_by(lambda: Covariance(8).update(x).finish())
        assert f"about one activation in {98 if share == 0.01 else 8}" in said
        assert "coordinate 3" in said


def test_coordinates_that_dwarf_the_others() -> None:
    x, y = samples(500)
    x[:, 6] *= 1000
    for fit in (
        lambda: LinearProbe.fit(x, y),
        lambda: Mahalanobis.fit(x),
        lambda: Covariance(8).update(x).finish(),
    ):
        (said,) = said_by(fit)
        assert "1 of 8 coordinates (the first are [6])" in said
    x, y = samples(500)
    x[:, 6] += 1000  # large, but the same for all
    assert said_by(lambda: Mahalanobis.fit(x)) == []


def test_activations_that_are_all_the_same_are_no_sinks() -> None:
    x = torch.ones(100, 4)
    assert said_by(lambda: LinearProbe.fit_many({"same": (x, torch.arange(100) % 2)})) == []
    said = said_by(lambda: LinearProbe.fit(x, torch.arange(100) % 2))
    assert len(said) == 1 and "no more than chance" in said[0]


def test_many_fits_are_silent() -> None:
    x, y = samples(10, width=64, signal=0.0)
    assert said_by(lambda: LinearProbe.fit_many({"a": (x, y)})) == []


def test_a_held_out_share_is_scored_by_a_probe_that_has_not_seen_it() -> None:
    x, y = samples(400, width=40, signal=0.0)
    plain = LinearProbe.fit(x, y)
    assert plain.report is not None and plain.report.held_out is None
    probe = LinearProbe.fit(x, y, held_out=0.25)
    assert torch.equal(probe.weight, plain.weight) and probe.report is not None
    assert probe.report.held_out_samples == 100 and probe.report.chance == 0.5
    assert probe.report.held_out is not None and abs(probe.report.held_out - 0.5) < 0.15
    assert probe.accuracy(x, y) > 0.6
    again = LinearProbe.fit(x, y, held_out=0.25, seed=1).report
    assert again is not None and again.held_out != probe.report.held_out
    assert LinearProbe.fit(x, y, held_out=0.25).report == probe.report
    (said,) = said_by(lambda: LinearProbe.fit(x, y, held_out=0.25))
    assert "of 100 activations held out are right" in said


def test_held_out_examples_are_scored() -> None:
    x, y = samples(400)
    names = ["yes" if label else "no" for label in y]
    probe = LinearProbe.fit(x[:300], names[:300], held_out=(x[300:].numpy(), names[300:]))
    assert probe.report is not None and probe.report.held_out_samples == 100
    assert probe.report.held_out == probe.accuracy(x[300:], names[300:]) > 0.8
    edit = LRQP.fit(x[:300], y[:300], held_out=(x[300:], y[300:]))
    assert edit.probe.report is not None and edit.probe.report.held_out == probe.report.held_out


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2, 1e-9])
def test_shares_that_leave_nothing_are_refused(share: float) -> None:
    x, y = samples(40)
    with pytest.raises(LabelError, match=r"hold|held_out"):
        LinearProbe.fit(x, y, held_out=share)


def test_a_penalty_that_leaves_nothing_of_a_probe() -> None:
    x, y = samples(400, n_classes=3, signal=6.0)
    (said,) = said_by(lambda: LinearProbe.fit(1e-3 * x, y, l2=1.0))
    assert "no more than chance" in said and "l2" in said


def test_sinks_at_a_regular_distance_are_found() -> None:
    """The first tokens of prompts of one length, whatever share of all rows is looked at."""
    for length in (8, 16, 32):
        x = torch.randn(2**13, 16)
        x[::length, 3] += 900.0
        with pytest.warns(ProbeWarning, match=f"{len(x[::length])} of {len(x)} activations"):
            Mahalanobis.fit(x)
