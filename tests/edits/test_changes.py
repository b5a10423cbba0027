"""Whatever an edit is made of may change between two calls: the next one is that of a new edit."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from edits_for_tests import normal, probe_of
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lrqp_torch import LRQP, ConstrainedLRQP, JointLRQP, LinearProbe, Mahalanobis, Site
from lrqp_torch.qp import native

WIDTH = 40
X = normal(4, WIDTH)


def sigma(seed: int = 0) -> Tensor:
    root = normal(3 * WIDTH, WIDTH, seed=seed) * torch.linspace(0.2, 2, WIDTH).double()
    return root.T @ root / len(root)


def copied(edit: LRQP, metric: Mahalanobis) -> LRQP:
    return LRQP(
        own_numbers(edit.probe),
        metric,
        log_odds=float(edit.log_odds),
        rule=edit.rule,
        odds=edit.odds,
    )


def own_numbers(probe: LinearProbe) -> LinearProbe:
    other = LinearProbe(probe.width, probe.n_classes)
    for name in ("weight", "bias"):
        part = getattr(probe, name)
        number = nn.Parameter(part.detach().clone(), requires_grad=part.requires_grad)
        setattr(other, name, number)
    return other


class One:
    """An edit, and how it is made anew of what it holds."""

    target: Any = torch.tensor([1, 0, 2, 1])

    def __init__(self) -> None:
        self.edit: Any = LRQP(probe_of(3, 1, WIDTH), Mahalanobis(sigma()))

    @property
    def written(self) -> LRQP:
        return self.edit  # type: ignore[no-any-return]

    def anew(self) -> Any:
        return copied(self.edit, self.metric())

    def metric(self) -> Mahalanobis:
        covariance = self.edit.metric.covariance.detach().clone()
        return Mahalanobis(covariance, _known=True)


class Total(One):
    def __init__(self) -> None:
        self.edit = LRQP(probe_of(3, 1, WIDTH), Mahalanobis(sigma()), odds="total")


class Several(One):
    def __init__(self) -> None:
        self.target = {"a": One.target, "b": JointLRQP.KEEP}
        metric = Mahalanobis(sigma())
        first = LRQP(probe_of(3, 1, WIDTH), metric)
        self.edit = JointLRQP({"a": first, "b": probe_of(2, 2, WIDTH)}, metric)

    @property
    def written(self) -> LRQP:
        return self.edit.edits[0]  # type: ignore[no-any-return]

    def anew(self) -> Any:
        metric = self.metric()
        edits = {"a": copied(self.written, metric), "b": own_numbers(self.edit.edits[1].probe)}
        return JointLRQP(edits, metric)


class Carrying(nn.Module):
    """A stream to edit."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.stream(x)  # type: ignore[no-any-return]


def solved(edit: Any, target: Any) -> list[Tensor]:
    found = edit.solve(X, target)
    return [found.x_new, found.distance, found.log_odds_after, found.floor]


def solved_by_operations(edit: Any, target: Any) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return solved(edit, target)


def solved_elsewhere(edit: Any, target: Any) -> list[Tensor]:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(solved(edit, target)))
    thread.start()
    thread.join()
    return found


def differentiated(edit: Any, target: Any) -> list[Tensor]:
    x = X.clone().requires_grad_()
    found = edit.solve(x, target)
    (gradient,) = torch.autograd.grad(found.x_new.sum() + found.squared_distance.sum(), x)
    return [found.x_new, found.distance, gradient]


@torch.no_grad()
def in_a_model(edit: Any, target: Any) -> list[Tensor]:
    model, site = Carrying(), Site.module("stream", "output")
    where = torch.zeros(4, 1, dtype=torch.long)
    target = {k: v for k, v in target.items()} if isinstance(target, dict) else target
    with edit.at(model, site, positions=where, target=target) as run:
        stream = model(X[:, None])
    return [stream, run.distance, run.log_odds_after]


def proposed(edit: Any, target: Any) -> list[Tensor]:
    found = edit.propose(X, target)
    return [found.x_new, found.distance]


@torch.inference_mode()
def solved_in_inference_mode(edit: Any, target: Any) -> list[Tensor]:
    return solved(edit, target)


def measured(edit: Any, target: Any) -> list[Tensor]:
    return [edit.metric.distance(X)]


PATHS = [
    solved,
    solved_by_operations,
    solved_elsewhere,
    solved_in_inference_mode,
    differentiated,
    in_a_model,
    proposed,
    measured,
]


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def both(matrix: Tensor) -> Tensor:
    """Row and column 11 of a symmetric matrix at half their size."""
    matrix[11] /= 2
    matrix[:, 11] /= 2
    return matrix


def pair(matrix: Tensor) -> Tensor:
    """One entry and its mirror."""
    matrix[3, 17] = matrix[17, 3] = 0.01
    return matrix


def loaded(edit: Any) -> None:
    state = edit.state_dict()
    for name in state:
        if name.endswith("metric.covariance"):
            state[name] = sigma(4)
    edit.load_state_dict(state)


def by_inference(tensor: Tensor) -> None:
    with torch.inference_mode():
        tensor.mul_(1.5)


def made_in_inference_mode(edit: Any) -> None:
    with torch.inference_mode():
        other = sigma(5).clone()
    edit.metric.covariance = other
    by_inference(edit.metric.covariance)


# What becomes of Σ, and of everything else.
OF_SIGMA: dict[str, Callable[[Any], Any]] = {
    "in place": lambda e: e.metric.covariance.mul_(2),
    "in place, through a view": lambda e: e.metric.covariance.diagonal().add_(0.1),
    "copied to": lambda e: e.metric.covariance.copy_(sigma(3)),
    "through .data": lambda e: e.metric.covariance.data.mul_(2),
    "ridge through .data": lambda e: e.metric.covariance.data.diagonal().add_(0.1),
    "another through .data": lambda e: e.metric.covariance.data.copy_(sigma(3)),
    "row and column through .data": lambda e: both(e.metric.covariance.data),
    "one entry through .data": lambda e: pair(e.metric.covariance.data),
    "in NumPy": lambda e: e.metric.covariance.numpy().__imul__(3),
    "in place, in inference mode": lambda e: by_inference(e.metric.covariance),
    "of inference mode": made_in_inference_mode,
    "another .data": lambda e: setattr(e.metric.covariance, "data", sigma(3)),
    "another tensor": lambda e: setattr(e.metric, "covariance", sigma(3)),
    "transposed": lambda e: setattr(e.metric, "covariance", sigma(3).T),
    "another metric": lambda e: setattr(e, "metric", Mahalanobis(sigma(3))),
    "loaded": loaded,
    "through the .data of a state": lambda e: [
        part.data.mul_(2) for name, part in e.state_dict().items() if name.endswith("covariance")
    ],
    "of other memory": lambda e: e.metric.covariance.set_(sigma(3)),
    "shared": lambda e: e.metric.share_memory(),
}
OF_THE_REST: dict[str, Callable[[LRQP], Any]] = {
    "weights in place": lambda e: e.probe.weight.mul_(1.5),
    "weights through .data": lambda e: e.probe.weight.data.mul_(1.5),
    "a weight in NumPy": lambda e: e.probe.weight.data.numpy().__setitem__((0, 5), 2.0),
    "weights in inference mode": lambda e: by_inference(e.probe.weight),
    "weights that lie otherwise": lambda e: setattr(
        e.probe.weight, "data", e.probe.weight.data.T.contiguous().T
    ),
    "a parameter": lambda e: setattr(
        e.probe, "weight", nn.Parameter(-e.probe.weight, requires_grad=False)
    ),
    "weights of half precision": lambda e: e.probe.bfloat16(),
    "learned weights": lambda e: e.probe.requires_grad_(True),
    "parametrised weights": lambda e: parametrize.register_parametrization(
        e.probe, "weight", Twice()
    ),
    "a bias through .data": lambda e: e.probe.bias.data.add_(0.5),
    "least odds through .data": lambda e: e.log_odds.data.fill_(5.0),
    "other least odds": lambda e: setattr(e, "log_odds", torch.tensor(6.0).double()),
    "a rule": lambda e: setattr(e, "rule", "fixed"),
    "a probe": lambda e: setattr(e, "probe", probe_of(3, 8, WIDTH)),
}


def follows(edited: One, path: Callable[[Any, Any], list[Tensor]], name: str) -> None:
    found = path(edited.edit, edited.target)
    expected = path(edited.anew(), edited.target)
    for mine, other in zip(found, expected, strict=True):
        # What nothing is asked of is NaN.
        assert torch.equal(mine.nan_to_num(), other.nan_to_num()), f"{name}, {path.__name__}"


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        *((One, path) for path in PATHS),
        *((Total, path) for path in (solved, differentiated)),
        *((Several, path) for path in (solved, solved_by_operations, in_a_model)),
    ],
)
def test_every_change_is_seen_by_every_path(
    kind: type[One], path: Callable[[Any, Any], list[Tensor]]
) -> None:
    for name, change in (OF_SIGMA | OF_THE_REST).items():
        edited = kind()
        path(edited.edit, edited.target)
        before = path(edited.edit, edited.target)
        with torch.no_grad():
            change(edited.edit if name in OF_SIGMA else edited.written)
        follows(edited, path, name)
        if name in OF_SIGMA and name != "shared":
            assert not all(map(torch.equal, path(edited.edit, edited.target), before)), name


@pytest.mark.parametrize("kind", [One, Total, Several])
@pytest.mark.parametrize("copies", [copy.deepcopy, lambda edit: pickle.loads(pickle.dumps(edit))])
def test_a_copy_and_what_it_is_of_change_by_themselves(
    kind: type[One], copies: Callable[[Any], Any]
) -> None:
    for path in (solved, measured, in_a_model):
        edited, other = kind(), kind()
        path(edited.edit, edited.target)
        other.edit = copies(edited.edit)
        follows(other, path, "a copy")
        other.edit.metric.covariance.data.mul_(2)
        follows(edited, path, "the original")
        follows(other, path, "a copy that was changed")


def test_a_held_covariance_is_watched_and_single_entries_are_not() -> None:
    """What is written to Σ through .data by who took it before the last solve: whole matrices,
    rows with their columns and ridges are seen; an entry counts when Σ is asked for again.
    """
    edited = One()
    held, x = edited.edit.metric.covariance, X
    for change in (lambda s: s.mul_(2), lambda s: s.diagonal().add_(1), both):
        edited.edit.solve(x, 1)
        change(held.data)
        follows(edited, solved, "held")
    edited.edit.solve(x, 1)
    pair(held.data)
    edited.edit.metric.covariance  # noqa: B018
    follows(edited, solved, "asked for again")


def test_a_call_with_other_numbers_leaves_none_behind() -> None:
    edited = One()
    before = solved(edited.edit, edited.target)
    other = {"metric.covariance": sigma(6), "probe.weight": 2 * edited.edit.probe.weight}
    called = torch.func.functional_call(edited.edit, other, (X, edited.target))
    assert not torch.equal(called, before[0])
    assert all(map(torch.equal, solved(edited.edit, edited.target), before))


@pytest.mark.parametrize("path", [solved, solved_by_operations, in_a_model])
@pytest.mark.parametrize("change", ["data", "inference mode"])
def test_classes_that_were_written_over_are_those_that_are_edited(
    path: Callable[[Any, Any], list[Tensor]], change: str
) -> None:
    edit, joint = Several().edit, JointLRQP
    with torch.inference_mode(change == "inference mode"):
        target = torch.tensor([[1, 0], [0, joint.KEEP], [2, 1], [1, joint.KEEP]])
        path(edit, target)
        target.data.copy_(torch.tensor([[1, joint.KEEP], [2, 0], [0, joint.KEEP], [1, 1]]))
        found, expected = path(edit, target), path(Several().edit, target.clone())
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("change", ["constraints", "mean", "features", "covariance"])
def test_a_posed_problem_is_that_of_what_the_edit_holds(change: str) -> None:
    def near(point: Any) -> list[Any]:
        return [point.distance <= 50]

    def short(point: Any) -> list[Any]:
        return [point.distance**2 / 100]

    def build() -> ConstrainedLRQP:
        metric = Mahalanobis(sigma(), X[0])
        return ConstrainedLRQP(probe_of(3, 1, WIDTH), metric, near, reads=normal(2, WIDTH))

    edit, fresh = build(), build()
    edit.solve(X, 1)
    for one in (edit, fresh):
        if change == "constraints":
            one.constraints = short
        if change == "mean":
            one.metric.mean = None
        if change == "features":
            one.features = normal(2, WIDTH, seed=9)
        if change == "covariance":
            one.metric.covariance.data.mul_(2)
        one._posed = one._posed if one is edit else []
    found, expected = edit.solve(X, 1), fresh.solve(X, 1)
    assert edit._posed[0][3] is not None and torch.equal(found.x_new, expected.x_new)
    assert torch.equal(found.distance, expected.distance)
