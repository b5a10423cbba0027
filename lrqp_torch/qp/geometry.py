"""What the edit needs to know of a probe and a metric, computed once for all activations."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from lrqp_torch.errors import (
    NonFiniteError,
    SolverError,
    WidthError,
    all_finite,
    check_classes,
    concrete,
    in_transforms,
    readable,
    trace,
)
from lrqp_torch.probes.covariance import Mahalanobis, Snapshot
from lrqp_torch.qp.blind import Blind
from lrqp_torch.qp.constraints import (
    ClassConstraints,
    Constraints,
    DenseConstraints,
    MetricSizes,
    class_grams,
    low_parts,
    other_classes,
    steered,
)
from lrqp_torch.qp.distances import DIRECT, Distances, lengths
from lrqp_torch.qp.native import Shared
from lrqp_torch.qp.normals import NormalConstraints
from lrqp_torch.qp.projection import project
from lrqp_torch.qp.table import ActiveSets
from lrqp_torch.qp.total_odds import lent_to

# Up to so many constraints M of every target is formed, and all 2^m active sets of each are tabled:
# then no step of a solve waits for the device, and it takes fewer steps.
TABLED = 7
MOST_CLASSES = 10_000
# Terms of an edit that are so many times longer than their sum leave float32 too few digits.
CANCELLED = 16.0

Made = TypeVar("Made")
Metric = Tensor | Mahalanobis
"""A metric, or its Σ."""


class Geometry(Protocol):
    """All that a solve asks of the constraints A x' + c ≥ floor and of the metric Σ.

    ``choice`` says which constraints each example has: for a probe the target class, (B,); for
    other problems any integer tensor whose first dimension is the batch.
    """

    @property
    def n_constraints(self) -> int:
        """How many constraints each example has, m."""

    @property
    def width(self) -> int:
        """The width d of the activations."""

    def check(self, choice: Tensor, batch: int) -> None:
        """Raise :class:`~lrqp_torch.errors.TargetError` unless ``choice`` suits ``batch`` examples.

        Called only where values can be looked at: not inside transforms or a compiled graph.
        """

    def margins(self, x: Tensor, choice: Tensor) -> Tensor:
        """A x + c, (B, m), in float64 whatever the dtype of x, (B, d); differentiable."""

    def constraints(self, choice: Tensor) -> Constraints:
        """The dual's constants for each example; M is differentiable, the rest is not."""

    def displace(
        self, x: Tensor, choice: Tensor, multipliers: Tensor, moved: Tensor | None = None
    ) -> Tensor:
        """The point x + Σ Aᵀ λ, (B, d), for λ (B, m), in float64; differentiable.

        Where its squared length ``moved``, (B,), is given and x is of a lower precision, it may be
        in float32, if that is as good.
        """


@dataclass(frozen=True)
class ProbeGeometry:
    """Class constraints of a linear probe in a metric; all tensors float64.

    For target t, the other classes ℓ in ascending order give the constraint normals
    a_ℓ = w_t − w_ℓ. What a solve needs of them are distances of classes, K × K, whatever K is: see
    :mod:`~.constraints`. Σ⁻¹ is never formed, and Σ may be singular.

    Attributes:
        weight: W, (K, d).
        bias: b, (K,).
        steering: W̄ Σ with W̄ the weights less their mean, (K, d): edits move along differences of
            its rows, which are those of W Σ.
        sizes: of Σ.
        rows: what logits are read by and edits move along: W, b and W̄Σ; for two classes their
            one difference, (1, d), (1,) and (1, d).
        narrow: length and float32 direction of each of these W̄Σ: no scale of Σ is too large or
            small for them.
        gram: M_t[ℓ, j] = a_ℓᵀ Σ a_j for every target t, (K, K−1, K−1), and the same with Σ² / s²,
            where K is small or classes are nearly equal, else None.
        sets: the active sets for every target where K is small, else None.
        low: what to add to steering, (K, d), so that a difference of its rows keeps its digits
            where classes are nearly equal; None where none are, or K is large.
        known: the distances of all pairs of classes, unless K is large.
    """

    weight: Tensor
    bias: Tensor
    steering: Tensor
    sizes: MetricSizes
    rows: tuple[Tensor, Tensor, Tensor]
    narrow: tuple[Tensor, Tensor]
    gram: tuple[Tensor, Tensor] | None
    sets: ActiveSets | None
    low: Tensor | None = None
    known: Distances | None = None

    @classmethod
    def build(
        cls, weight: Tensor, bias: Tensor, covariance: Tensor | Mahalanobis
    ) -> "ProbeGeometry":
        """Compute the geometry; differentiable in all three arguments.

        Cost: K d² for WΣ, unless a saved metric keeps it, and K² d for the distances, once.

        Args:
            weight: probe weights, (K, d), K ≥ 2.
            bias: probe biases, (K,).
            covariance: Σ, (d, d), symmetric positive semidefinite; or the metric.

        Raises:
            WidthError: the shapes do not fit together.
            SolverError: more than :data:`MOST_CLASSES` classes.
            NonFiniteError: NaN or infinity in any of them.
        """
        if weight.ndim != 2 or weight.shape[0] < 2 or bias.shape != weight.shape[:1]:
            raise WidthError(
                f"a probe needs weight (K, d) with K ≥ 2 and bias (K,), got weight "
                f"{tuple(weight.shape)} and bias {tuple(bias.shape)}"
            )
        n_classes, width = weight.shape
        if n_classes > MOST_CLASSES:
            raise SolverError(
                f"a probe of {n_classes} classes has more than the {MOST_CLASSES:,} whose "
                f"distances, K² numbers several times over, are held; leave out classes that "
                f"no edit is for: LinearProbe.from_weights(W[kept], b[kept])"
            )
        own = covariance.shape if isinstance(covariance, Tensor) else 2 * (covariance.width,)
        if own != (width, width):
            raise WidthError(
                f"the probe reads width {width} but the covariance is {tuple(own)}; fit both on "
                f"activations of the same site"
            )
        for name, tensor in (("weight", weight), ("bias", bias)):
            if readable(tensor) and not all_finite(tensor):
                raise NonFiniteError(f"the probe's {name} holds NaN or infinity; refit it")

        weight, bias = weight.double(), bias.double()
        (steering,), sizes = steered(covariance, [weight])
        low = known = None
        if n_classes <= DIRECT or torch.compiler.is_compiling() or in_transforms():
            length = lengths(weight)
            if n_classes <= DIRECT:
                low = low_parts(weight, steering, covariance, length)
            known = Distances.of(weight, steering, sizes, low, length)
        rows = weight, bias, steering
        if n_classes == 2:
            rows = weight[:1] - weight[1:], bias[:1] - bias[1:], steering[:1] - steering[1:]
            if low is not None:
                rows, low = (*rows[:2], rows[2] + (low[:1] - low[1:])), None
        with torch.no_grad():
            size = sizes.norm(rows[2])
            narrow = size, (rows[2] / torch.where(size > 0, size, 1.0).unsqueeze(-1)).float()
        gram = sets = None
        if known is not None and (1 < n_classes - 1 <= TABLED or low is not None):
            every = torch.arange(n_classes, device=weight.device)
            other = other_classes(every, n_classes, weight.device)
            each = every, weight, steering, known.length.gather(-1, other), low
            gram = class_grams(*each), class_grams(*each, unit=sizes.unit)
            if n_classes - 1 <= TABLED:
                sets = ActiveSets.build(gram[0], known.noise.gather(-1, other))
        geometry = cls(weight, bias, steering, sizes, rows, narrow, gram, sets, low, known)
        if not readable(weight) and not torch.compiler.is_compiling() and not in_transforms():
            # At once: nothing can be laid down while a graph is captured.
            geometry.blind, geometry.lent_sets  # noqa: B018
        return geometry

    @property
    def distances(self) -> Distances:
        """Of all pairs of classes, K × K numbers four times over where they were not known."""
        return self.known or self._distances

    @cached_property
    def _distances(self) -> Distances:
        # Differentiable whenever they are first asked for.
        with torch.inference_mode(False), torch.enable_grad():
            return Distances.of(self.weight, self.steering, self.sizes)

    @cached_property
    def blind(self) -> Blind | None:
        """What solves need of it that look at no value; None where there are too many classes."""
        return None if self.n_classes > 2 and self.sets is None else Blind.build(self)

    @cached_property
    def lent_sets(self) -> ActiveSets | None:
        """The active sets with what proofs of total odds lend M, where they are held."""
        if self.gram is None or self.sets is None:
            return None
        every = torch.arange(self.n_classes, device=self.weight.device)
        other = other_classes(every, self.n_classes, every.device)
        noise = self.distances.noise.gather(-1, other)
        return ActiveSets.build(lent_to(self.gram[0].detach()), noise.detach())

    @cached_property
    def grams(self) -> Tensor | None:
        """M of every target with an empty row and column for it, (K, K, K), where it is held."""
        return None if self.gram is None else self._filled(self.gram[0])

    @cached_property
    def shared(self) -> Shared:
        """What compiled solves need of it."""
        return self._shared(self.grams)

    @cached_property
    def shared_total(self) -> Shared:
        """What those for total odds need: M of every target, of up to :data:`DIRECT` classes."""
        return self._shared(self.total_grams)

    @cached_property
    @torch.no_grad()
    def total_grams(self) -> Tensor:
        """M of every target of up to :data:`DIRECT` classes, as ``grams``."""
        if self.grams is not None:
            return self.grams
        every = torch.arange(self.n_classes, device=self.weight.device)
        length = self.distances.length.gather(-1, other_classes(every, len(every), every.device))
        return self._filled(class_grams(every, self.weight, self.steering, length))

    def _filled(self, gram: Tensor) -> Tensor:
        every = torch.arange(self.n_classes, device=gram.device)
        other = other_classes(every, self.n_classes, every.device)
        grams = gram.new_zeros(3 * (self.n_classes,))
        grams[every[:, None, None], other[:, :, None], other[:, None]] = gram.detach()
        return grams

    def _shared(self, grams: Tensor | None) -> Shared:
        of = self.distances
        pairs = of.squared, of.noise, of.length, of.stretch
        return Shared.of(*pairs, *self.rows, grams, self.low, unit=float(self.sizes.unit))

    @property
    def n_classes(self) -> int:
        """K."""
        return self.weight.shape[0]

    @property
    def n_constraints(self) -> int:
        """One for each class other than the target, K − 1."""
        return self.n_classes - 1

    @property
    def width(self) -> int:
        """The width d of the activations that the probe reads."""
        return self.weight.shape[1]

    def check(self, target: Tensor, batch: int) -> None:
        """Raise :class:`~lrqp_torch.errors.TargetError` unless ``target`` is (B,) in [0, K)."""
        check_classes(target, batch, self.n_classes, "target")

    def constraints(self, target: Tensor) -> Constraints:
        """The dual's constants for targets (B,)."""
        batch, of, unit = len(target), self.distances, self.sizes.unit
        if self.n_classes == 2:
            # The two targets have the same problem, up to a sign that M does not see.
            both = of.squared, of.noise, of.length, of.stretch
            gram, noise, length, stretch = (part[:1, 1:].expand(batch, 1) for part in both)
            return DenseConstraints(
                gram.unsqueeze(-1), noise, length, (stretch.unsqueeze(-1), unit)
            )
        other = other_classes(target, self.n_classes, target.device)
        if self.gram is None:
            return ClassConstraints(of, unit, target, other, (self.weight, self.steering))
        pairs = of.noise, of.length
        noise, length = (part.index_select(0, target).gather(-1, other) for part in pairs)
        return DenseConstraints(
            gram=self.gram[0].index_select(0, target),
            noise=noise,
            length=length,
            steering=(self.gram[1].index_select(0, target), unit),
            table=None if self.sets is None else (self.sets, target),
        )

    def by_normals(self, target: Tensor) -> Constraints:
        """What total odds ask of them, without distances of all pairs where these are not known."""
        if self.known is not None:
            return self.constraints(target)
        found = NormalConstraints.of(self.weight, self.steering, self.sizes, target)
        return cast(Constraints, found)

    def logits(self, x: Tensor) -> Tensor:
        """Probe logits x Wᵀ + b in float64, (B, K)."""
        return project(x, self.weight, self.bias)

    def margins(self, x: Tensor, target: Tensor) -> Tensor:
        """z_t − z_ℓ for the other classes ℓ in ascending order, (B, K−1), float64."""
        return self.differences(self.read(x), target)

    def read(self, x: Tensor) -> Tensor:
        """Logits, (B, K); of two classes their difference, (B, 1): what margins come from."""
        return project(x, *self.rows[:2])

    def differences(self, logits: Tensor, target: Tensor) -> Tensor:
        """The margins from logits, (B, K); of two classes from their difference, (B, 1)."""
        if self.n_classes == 2:
            return logits * (1 - 2 * target).unsqueeze(-1)
        other = other_classes(target, self.n_classes, logits.device)
        return logits.gather(-1, target.unsqueeze(-1)) - logits.gather(-1, other)

    def displace(
        self, x: Tensor, target: Tensor, multipliers: Tensor, moved: Tensor | None = None
    ) -> Tensor:
        """X + Σ Aᵀ λ, as x + c (WΣ) with c_t = Σλ and c_ℓ = −λ_ℓ; (B, d).

        In float64; or, where ``moved`` is given and x is of a lower precision, in float32 as far as
        that rounds no more than by a few ulps of the edit.
        """
        return self.add(x, self.coefficients(target, multipliers), moved)

    def coefficients(self, target: Tensor, multipliers: Tensor) -> Tensor:
        """Class coefficients c of multipliers λ, (B, K); of two classes their difference's."""
        if self.n_classes == 2:
            return multipliers * (1 - 2 * target).unsqueeze(-1)
        other = other_classes(target, self.n_classes, target.device)
        none = multipliers.new_zeros(len(multipliers), self.n_classes)
        coefficients = none.scatter(-1, other, -multipliers)
        total = multipliers.sum(-1, keepdim=True)
        return coefficients.scatter(-1, target.unsqueeze(-1), total)

    def add(self, x: Tensor, coefficients: Tensor, moved: Tensor | None = None) -> Tensor:
        """The point x + c (WΣ), (B, d), for class coefficients c, (B, K); see :meth:`displace`.

        Of two classes c is that of their one difference, (B, 1).
        """
        length, unit = self.narrow
        scaled = coefficients * length
        narrow = moved is not None and x.dtype != torch.float64 and self._narrows(x)
        if narrow:
            edited = _added(x.float(), scaled.float(), unit)
        else:
            edited = _added(x.double(), coefficients, self.rows[2])
        looking = readable(x)
        some = looking or self.low is not None
        if self.n_classes > 2 and moved is not None and some and not in_transforms():
            # Where terms cancel, as between nearly equal classes, float32 would lose what is left;
            # and a product, which rounds by its company, would decide what that is.
            lost = scaled.detach().abs().sum(-1).square() > CANCELLED**2 * moved
            if narrow and looking:
                # So would an edit that takes x away.
                ends, began = (part.detach().square().sum(-1) for part in (edited, x.float()))
                lost = lost | (CANCELLED**2 * ends < began)
            rows = lost.nonzero().squeeze(-1) if looking else torch.arange(len(x), device=x.device)
            if len(rows):
                # Coefficients add up to 0: along differences to the target, if need be.
                wide, own = x[rows].double(), coefficients[rows]
                target = own.detach().argmax(-1)
                low = torch.zeros_like(self.steering) if self.low is None else self.low
                for part, row, rest in zip(own.unbind(-1), self.rows[2], low, strict=True):
                    if self.low is not None:
                        row = (row - self.rows[2][target]) + (rest - low[target])
                    wide = torch.addcmul(wide, part.unsqueeze(-1), row)
                edited = edited.index_copy(0, rows, wide.to(edited.dtype))
        return edited

    def _narrows(self, x: Tensor) -> bool:
        return (
            readable(x)
            and not (torch.is_grad_enabled() and self.steering.requires_grad)
            # "high" and "medium" let products be rounded to bfloat16.
            and torch.get_float32_matmul_precision() == "highest"
        )


def _added(x: Tensor, coefficients: Tensor, rows: Tensor) -> Tensor:
    """The sum x + c P, (B, d)."""
    if len(rows) == 1:
        return torch.addcmul(x, coefficients, rows)
    return torch.addmm(x, coefficients, rows)


class Trace:
    """Some tensors on a device: unequal to that of others, and after changes that can be seen."""

    def __init__(self, device: torch.device, *tensors: Tensor) -> None:
        # They are held, so that no other tensor can be taken for one of them.
        self.device, self.tensors = device, tensors
        self.marks = [trace(one) for one in tensors]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Trace)
            and self.device == other.device
            and self.marks == other.marks
            and all(map(operator.is_, self.tensors, other.tensors))
        )

    __hash__ = None  # type: ignore[assignment]

    def holds(self) -> bool:
        """Whether no change of its tensors has left a trace since."""
        return Trace(self.device, *self.tensors).marks == self.marks

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is of copies.
        return Trace, (self.device,)


@dataclass(frozen=True)
class _Kept(Generic[Made]):
    """A geometry, what it was computed from, and copies of the probes' tensors."""

    device: torch.device
    metric: Snapshot
    looks: int  # how often Σ had been handed out
    probes: Trace
    copies: list[Tensor]
    geometry: Made
    lines: tuple[list[Tensor], list[Tensor]] | None  # see `_lines`


class GeometryCache(Generic[Made]):
    """The geometry of the probes and metric that were asked for last, on one device.

    Args:
        build: computes it from the probes' tensors on its device, and the metric or Σ.
    """

    def __init__(self, build: Callable[[list[Tensor], Metric], Made]) -> None:
        self.build = build
        self._kept: _Kept[Made] | None = None

    def get(self, probes: Sequence[Tensor], metric: Metric, device: torch.device) -> Made:
        """The geometry on a device. On a GPU this waits for the device; :meth:`peek` does not."""
        given = [part if part.device == device else part.to(device) for part in probes]
        traced, looks = _traced(metric)
        if _needs_graph(*probes, traced):
            return self.build(given, metric)
        kept, own = self._kept, Trace(device, *probes)
        # Probes are small enough to compare by value, which sees every way of changing them:
        # .data, .double() and the like leave no trace in a tensor's version. All of Σ is compared
        # once after it was handed out, and a part of it always.
        if (
            kept is not None
            and kept.device == device
            and kept.metric.holds(traced, whole=kept.looks != looks)
            and all(map(_same, kept.copies, given))
        ):
            if kept.probes != own or kept.looks != looks:
                lines = _lines(probes, kept.copies, kept.metric)
                self._kept = replace(kept, probes=own, looks=looks, lines=lines)
            return kept.geometry
        # What is kept may be differentiated through later, whatever the mode it was computed in.
        with torch.inference_mode(False), torch.no_grad():
            # However they lie: what is computed of them is the same to the bit.
            copies = [part.clone(memory_format=torch.contiguous_format) for part in given]
            # Of a Σ that is still in its file, the building may read it.
            geometry = self.build(copies, metric)
            traced, looks = _traced(metric)
            seen = Snapshot(traced)
            lines = _lines(probes, copies, seen)
            self._kept = _Kept(device, seen, looks, own, copies, geometry, lines)
        return geometry

    def peek(
        self, probes: Sequence[Tensor], metric: Metric, device: torch.device
    ) -> tuple[Made, Tensor]:
        """The geometry, and a number () on the device that is not 0 if it has become stale unseen.

        Changes that leave a trace are seen; others (``.data``) only by value, on the device.
        """
        kept = self._kept
        if kept is None or kept.lines is None or self.known(probes, metric, device) is None:
            return self.get(probes, metric, device), torch.zeros(
                (), dtype=torch.bool, device=device
            )
        changed = torch.cat(torch._foreach_sub(*kept.lines))
        # A difference of NaN has a norm that is none.
        return kept.geometry, torch.linalg.vector_norm(changed, torch.inf)

    def snapshot(self) -> Snapshot | None:
        """What Σ was when the geometry was computed."""
        return None if self._kept is None else self._kept.metric

    def known(self, probes: Sequence[Tensor], metric: Metric, device: torch.device) -> Made | None:
        """The geometry, unless there is none or a change of what it is of has left a trace."""
        kept, (traced, looks) = self._kept, _traced(metric)
        if (
            kept is None
            or kept.device != device
            or not kept.metric.is_of(traced)
            or (readable(traced) and not kept.metric.holds(traced, whole=kept.looks != looks))
            or kept.probes != Trace(device, *probes)
            or any(part.device != device for part in probes)
            or any(old.dtype != new.dtype for old, new in zip(kept.copies, probes, strict=True))
            or _needs_graph(*probes, traced)
        ):
            return None
        return kept.geometry


def _lines(
    probes: Sequence[Tensor], copies: list[Tensor], metric: Snapshot
) -> tuple[list[Tensor], list[Tensor]] | None:
    """What probes and some of Σ were and are, as lines: what is compared where nothing waits.

    Views that are kept, since each would be an operation. None where values can be looked at, or
    weights are not contiguous.
    """
    if readable(probes[0]) or not all(part.is_contiguous() for part in probes):
        return None
    now, then = ([part.detach().view(-1) for part in side] for side in (probes, copies))
    if metric.matrix.device == probes[0].device:
        now, then = now + metric.lines, then + [line.clone() for line in metric.lines]
    return then, now


def probe_geometry(probe: list[Tensor], metric: Metric) -> ProbeGeometry:
    """That of W and b."""
    weight, bias = probe
    return ProbeGeometry.build(weight, bias, metric)


def _traced(metric: Metric) -> tuple[Tensor, int]:
    """In what changes of Σ are seen, and how often it was handed out."""
    return (metric, 0) if isinstance(metric, Tensor) else (metric.traced, metric.looks)


def _needs_graph(*tensors: Tensor) -> bool:
    """Whether the geometry is part of a computation that is being recorded or transformed."""
    hidden = torch.compiler.is_compiling() or in_transforms() or tensors[0].is_meta
    if hidden and not all(concrete(tensor) for tensor in tensors):
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _same(old: Tensor, new: Tensor) -> bool:
    return old.dtype == new.dtype and torch.equal(old, new)
