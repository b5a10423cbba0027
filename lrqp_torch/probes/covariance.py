"""Streaming moments, shrinkage, and the Mahalanobis metric made from them."""

import copy
import math
from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lrqp_torch.distributed.ranks import Ranks
from lrqp_torch.errors import (
    CovarianceError,
    NonFiniteError,
    RankError,
    WidthError,
    all_finite,
    as_numbers,
    check_finite,
    ordinary,
    trace,
    unwrapped,
)
from lrqp_torch.probes.fitting import BATCH
from lrqp_torch.probes.judging import check_moments, check_sinks
from lrqp_torch.probes.keeping import class_differences, conditional_covariance, orthonormal_basis
from lrqp_torch.probes.multinomial import add_symmetric, mirror

Shrinkage = Literal["ledoit_wolf", "oas"] | float

MOMENTS = ("mean", "second", "third", "fourth")
# Which share of all squares may come from the distance of the mean to where moments are about.
FAR = 0.75
# So few activations wait for more, and are added with them in one product; on other devices than a
# CPU, where asking costs more than computing.
WAITING, ELSEWHERE = 256, 1024
# A matrix of so many columns is looked at as a whole; else so many neighbours at once, which share
# a line of the processor's cache.
WHOLE, NEIGHBOURS = 32, 8
# Temporary matrices of so many numbers at most.
CHUNK_NUMBERS = 2_000_000


class Exact(nn.Module):
    """A module whose own buffers keep their precision, and through which gradients can flow.

    ``.half()`` of a model that holds an edit must not round the edit's own numbers: a floor in half
    precision could promise less than was asked for, and a metric be destroyed. What is made under
    ``torch.inference_mode``, also in a copy or on another device, is an ordinary tensor.
    """

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As of any module."""
        super().register_buffer(name, tensor if tensor is None else ordinary(tensor), persistent)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = dict(self._buffers)
        with torch.inference_mode(False):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for name, before in kept.items():
                after = self._buffers[name]
                if before is not None and after is not None and after.dtype != before.dtype:
                    self._buffers[name] = before.to(after.device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = copied = type(self).__new__(type(self))
        state: Any = self.__getstate__()  # type: ignore[no-untyped-call]
        with torch.inference_mode(False):
            copied.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
        return copied


class Snapshot:
    """What Σ is, so that one can see whether it still is that.

    Another tensor, other memory, and whatever counts as writing is seen by that. What is written
    through ``.data``, or memory that is shared with NumPy, is seen by value. :meth:`holds` looks at
    an eighth of the diagonal, an entry of every column and some far from both, or at all where
    there are up to :data:`WHOLE` columns: it sees another matrix, another scale or ridge, and
    another row with its column. Where it is to, it looks at the sums of the bits of all rows and
    columns, and sees a single entry. Both are exact, whatever the number of threads.

    Args:
        matrix: Σ, (d, d).
    """

    def __init__(self, matrix: Tensor) -> None:
        # It is held, so that no other tensor can be taken for it.
        self.matrix, self.mark = matrix, trace(matrix)
        # Of a Σ that is still in its file there is nothing to see.
        read = matrix.numel() > 0
        self.sums = _sums(matrix) if read else []
        self.places = _places(matrix.detach()) if read else []
        self.values = [place.clone() for place in self.places]

    def is_of(self, matrix: Tensor) -> bool:
        """Whether a matrix is this one, and no change of it has left a trace."""
        return matrix is self.matrix and self.mark == trace(matrix)

    def holds(self, matrix: Tensor, *, whole: bool = False) -> bool:
        """Whether a matrix is this one and unchanged."""
        if not self.is_of(matrix):
            return False
        if whole and not all(map(torch.equal, self.sums, _sums(matrix))):
            return False
        return all(map(torch.equal, self.places, self.values))

    @property
    def lines(self) -> list[Tensor]:
        """The diagonal and the other one, as views; nothing of a Σ that is still in its file."""
        matrix = self.matrix.detach()
        if not matrix.numel():
            return []
        width, (down, along) = len(matrix), matrix.stride()
        corner = matrix[:, -1] if down > along else matrix[-1]
        other = corner.as_strided((width,), (abs(down - along),), corner.storage_offset())
        return [matrix.diagonal(), other]

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is of other memory: this is what no matrix is.
        return Snapshot, (torch.empty(0),)


def _sums(matrix: Tensor) -> list[Tensor]:
    """Sums of the bits of each column and each row, as numbers that wrap around."""
    matrix = matrix.detach()
    bits = matrix.view(torch.int64) if matrix.dtype == torch.float64 else matrix
    return [bits.sum(0), bits.sum(1)]


def _places(matrix: Tensor) -> list[Tensor]:
    """The parts of a matrix that are looked at, as views: short rows of neighbours each."""
    width = len(matrix)
    if width <= WHOLE:
        return [matrix]
    # Along the diagonal to the last column; and, a quarter as many, where that runs to the left.
    matrix = matrix if matrix.stride(0) >= matrix.stride(1) else matrix.T
    down, along = matrix.stride()
    far, corner = 4 * NEIGHBOURS, matrix[NEIGHBOURS // 2 :, width - NEIGHBOURS :]
    parts = (matrix, NEIGHBOURS, along), (corner, far, -along)
    return [matrix[-1:, -NEIGHBOURS:]] + [
        part.as_strided(
            (width // apart, NEIGHBOURS), (apart * (down + step), along), part.storage_offset()
        )
        for part, apart, step in parts
    ]


class Mahalanobis(Exact):
    """The metric ‖δ‖² = δᵀ Σ⁻¹ δ on activations, held by Σ alone; Σ⁻¹ is never formed.

    Edits follow a Σ that changes, whichever way: in place, by loading, or through ``.data`` and
    NumPy, which leave no trace and are seen by value (:class:`Snapshot`). One way is not seen:
    single entries that are written through ``.data`` by who took ``covariance`` before the last
    solve and does not ask for it again. Write them in place, under ``torch.no_grad()``. On a GPU,
    where an edit in a model looks at nothing, what leaves no trace is seen by :meth:`LRQP.solve`.

    Args:
        covariance: Σ, (d, d), symmetric positive semidefinite, a tensor or an array; singular is
            allowed, and then a displacement out of Σ's range is infinitely long.
        mean: mean activation, (d,), for reference; the metric does not depend on it.
        shrinkage: the weight that was given to the isotropic target, for the record.
        n_samples: how many activations the covariance was estimated from, for the record.
        kept: directions along which Σ is zero because :meth:`keeping` took them out, (r, d),
            orthonormal; for the record and for error messages.

    Raises:
        WidthError: the covariance is not square, or mean or kept have another width.
        NonFiniteError: NaN or infinity in any of them.
        CovarianceError: not symmetric, or not positive semidefinite.
    """

    covariance: Tensor
    mean: Tensor | None
    kept: Tensor | None
    looks = 0
    """How often Σ was handed out: whoever has it may write to it."""

    def __init__(
        self,
        covariance: Any,
        mean: Any = None,
        *,
        shrinkage: float = 0.0,
        n_samples: int | None = None,
        kept: Any = None,
        _known: bool = False,
    ) -> None:
        super().__init__()
        covariance = as_numbers(covariance, "a covariance")
        # What is computed here is symmetric and positive semidefinite by its formula.
        check_covariance(covariance, known=_known)
        self._hold(covariance.double(), len(covariance), mean, kept, shrinkage, n_samples)

    def _hold(
        self,
        covariance: Tensor,
        width: int,
        mean: Any,
        kept: Any,
        shrinkage: float,
        n_samples: int | None,
        saved: "Saved | None" = None,
    ) -> None:
        self.register_buffer("covariance", covariance)
        for name, value, rank in (("mean", mean, 1), ("kept", kept, 2)):
            tensor = None if value is None else as_numbers(value, name)
            if tensor is not None and (tensor.ndim != rank or tensor.shape[-1] != width):
                raise WidthError(f"the covariance has width {width}, {name} {tuple(tensor.shape)}")
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"{name} holds NaN or infinity")
            self.register_buffer(name, None if tensor is None else tensor.double())
        self.shrinkage = float(shrinkage)
        self.n_samples = n_samples
        self._eigenbasis: tuple[Snapshot, Tensor, Tensor] | None = None
        self._saved = saved

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name == "covariance" and not torch.compiler.is_compiling():
            vars(self)["looks"] = self.looks + 1
        return found

    def own(self) -> Tensor:
        """Σ, for code that does not write to it."""
        return cast(Tensor, nn.Module.__getattr__(self, "covariance"))

    @classmethod
    def fit(
        cls, x: Any, shrinkage: Shrinkage = "ledoit_wolf", *, _told: bool = False
    ) -> "Mahalanobis":
        """The metric of activations x, (n, d), on x's device. See :meth:`Covariance.finish`.

        They are a tensor or an array; or stored ones, which are then read a batch at a time.

        Warns:
            ProbeWarning: a few activations or coordinates carry most of the variance, as attention
                sinks do that were captured along with the rest.
        """
        if not isinstance(x, Tensor) and hasattr(x, "batches"):
            parts = iter(x.batches(BATCH))
            first = next(parts, torch.empty(0, 1))
            found = Covariance(first.shape[1], device=first.device).update(first)
            for part in parts:
                found.update(part)
            return found.finish(shrinkage)
        x = as_numbers(x, "activations")
        if x.ndim != 2:
            raise WidthError(f"activations must be (n, d), got {tuple(x.shape)}")
        found = Covariance(x.shape[1], device=x.device).update(x)
        if not _told:
            check_sinks(x)
        return found._finish(shrinkage)

    @classmethod
    def euclidean(cls, width: int) -> "Mahalanobis":
        """Σ = I: the metric of the Euclidean least edit."""
        return cls(torch.eye(width, dtype=torch.float64))

    @property
    def width(self) -> int:
        """The width d of the activations."""
        return self.own().shape[0]

    @property
    def traced(self) -> Tensor:
        """A tensor on Σ's device in which every change of Σ can be seen: Σ, if it has been read."""
        return self.own()

    def saved(self, weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor] | None:
        """W̄ Σ of some probes' weights, and the sizes of Σ, where its file keeps them; constants."""
        kept = self._saved
        if kept is None or torch.compiler.is_compiling() or not kept.holds(self.traced):
            return None
        found = [kept.steered(weight) for weight in weights]
        known = [part for part in found if part is not None]
        return (known, kept.sizes) if len(known) == len(found) else None

    def is_same(self, other: "Mahalanobis") -> bool:
        """Whether another has the same Σ; what files keep of it then serves both."""
        if self is other:
            return True
        mine, yours = self._saved, other._saved
        if mine is None or yours is None:
            return torch.equal(self.own(), other.own())
        if not (mine.holds(self.traced) and yours.holds(other.traced)):
            return torch.equal(self.own(), other.own())
        same = mine.sha256 == yours.sha256
        if same:
            mine.products = yours.products = [*mine.products, *yours.products]
        return same

    @property
    def n_kept(self) -> int:
        """How many directions :meth:`keeping` took out of Σ."""
        return 0 if self.kept is None else len(self.kept)

    def keeping(self, *others: nn.Linear | Tensor) -> "Mahalanobis":
        """The metric of the least edits that leave what other probes believe where it is.

            minimise δᵀ Σ⁻¹ δ subject to further constraints and C δ = 0

        is the same problem without C, in the conditional covariance Σ − Σ Cᵀ (C Σ Cᵀ)⁺ C Σ: that
        of x given C x, for Gaussian x. So every edit can use it,

            edit = LRQP(probe, metric.keeping(other_probe))

        The rows C of a probe are its class differences w_k − mean of w: its probabilities stay,
        while a shift common to all its logits is free. In a stream of machine precision ε the
        edited activation is rounded, which moves a kept log odds aᵀ x by at most ε ‖a‖ ‖x'‖, and by
        1e-12 of that size in float64. A target whose own directions all are kept is unreachable:
        :class:`~lrqp_torch.errors.InfeasibleError`. To keep within a tolerance instead, or another
        probe for each example, see :class:`~lrqp_torch.JointLRQP`.

        Args:
            others: probes, or rows (n, d). They are constants: gradients flow to Σ only.

        Raises:
            WidthError: another width, or neither a probe nor rows.
            NonFiniteError: NaN or infinity in them.
            CovarianceError: no direction is left.
        """
        rows = [class_differences(other, self.width).to(self.covariance) for other in others]
        if not rows:
            raise WidthError("nothing to keep: give at least one probe or tensor of rows")
        held = [] if self.kept is None else [self.kept]
        bases = [orthonormal_basis(block) for block in rows]
        basis = orthonormal_basis(torch.cat([*held, *bases]))
        covariance = self.covariance
        if len(basis):
            covariance = conditional_covariance(covariance, basis)
        return Mahalanobis(
            covariance,
            self.mean,
            shrinkage=self.shrinkage,
            n_samples=self.n_samples,
            kept=basis,
            _known=True,
        )

    @torch.no_grad()
    def distance(self, delta: Tensor) -> Tensor:
        """√(δᵀ Σ⁻¹ δ) for displacements δ, (..., d) → (...), float64.

        Computed in Σ's eigenbasis, which is kept for as long as Σ stays what it is; infinite where
        δ leaves the range of a singular Σ.
        """
        if delta.shape[-1] != self.width:
            raise WidthError(
                f"the metric has width {self.width}, the displacement {delta.shape[-1]}"
            )
        covariance = self.own()
        delta = delta.to(covariance.device, torch.float64)
        if self._eigenbasis is None or not self._eigenbasis[0].holds(covariance, whole=True):
            self._eigenbasis = (Snapshot(covariance), *torch.linalg.eigh(covariance.double()))
        _, values, vectors = self._eigenbasis
        present = values > values[-1] * self.width * torch.finfo(values.dtype).eps
        coordinates = delta @ vectors
        inside = torch.where(present, coordinates.square() / values.clamp_min(1e-300), 0.0).sum(-1)
        # A displacement that was stored in float32 has rounding noise in every direction.
        noise = torch.finfo(torch.float32).eps * torch.linalg.vector_norm(delta, dim=-1)
        outside = torch.where(present, 0.0, coordinates).abs().amax(-1) > noise
        return torch.where(outside, float("inf"), inside.sqrt())


class Saved:
    """What the file of an edit keeps of Σ: solves need no more of it.

    Args:
        sha256: of Σ's numbers.
        sizes: the largest entry of Σ, and its Frobenius norm, (2,).
        products: W and W̄ Σ of probes, (K, d) each, float64, with W̄ the weights W less their mean.
    """

    def __init__(self, sha256: str, sizes: Tensor, products: list[tuple[Tensor, Tensor]]) -> None:
        self.sha256, self.sizes, self.products = sha256, sizes, products
        self._read: Snapshot | None = None

    def read(self, covariance: Tensor) -> None:
        """Σ has been read; from now on it may change."""
        self._read = Snapshot(covariance)

    def holds(self, traced: Tensor) -> bool:
        """Whether Σ is what it was in the file: not read yet, or unchanged since."""
        read = self._read
        if read is None:
            return True
        asked = torch.is_grad_enabled() and traced.requires_grad
        return not asked and read.holds(traced, whole=True)

    def steered(self, weight: Tensor) -> Tensor | None:
        """W̄ Σ of weights W; None if it is not kept, or a derivative may be asked for."""
        if unwrapped(weight) is not weight or weight.is_meta:
            return None
        if torch.is_grad_enabled() and weight.requires_grad:
            return None
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(weight).tangent is not None:
            return None
        for own, product in self.products:
            if own.shape == weight.shape and torch.equal(own.to(weight.device), weight.double()):
                return product.to(weight.device)
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        # Whether a copy of Σ is changed cannot be seen in what the copy was made of.
        return (Saved, (self.sha256, self.sizes, self.products)) if self._read is None else _NOTHING


_NOTHING = type(None), ()
_READING = RLock()


class StoredMahalanobis(Mahalanobis):
    """A metric whose Σ stays in its file until somebody looks at it.

    Whoever asks for ``covariance``, or for all buffers (``state_dict``, a pickle), makes it an
    ordinary :class:`Mahalanobis`; copies and moves to another device leave Σ where it is.

    Args:
        read: gives Σ, (d, d), float64, checked; or raises.
        width: d.
        saved: what is known of Σ.
        mean, kept, shrinkage, n_samples: see :class:`Mahalanobis`.
    """

    def __init__(
        self,
        read: Callable[[], Tensor],
        width: int,
        saved: Saved,
        *,
        mean: Tensor | None,
        kept: Tensor | None,
        shrinkage: float,
        n_samples: int | None,
    ) -> None:
        nn.Module.__init__(self)
        # In its place stands what tells its dtype and device.
        place = torch.empty(0, dtype=torch.float64)
        self._hold(place, width, mean, kept, shrinkage, n_samples, saved)
        self._source: tuple[Callable[[], Tensor], int] = read, width

    @property
    def covariance(self) -> Tensor:  # type: ignore[override]
        """Σ, (d, d), which is read now."""
        return cast(Tensor, Mahalanobis.__getattr__(self.whole(), "covariance"))

    def own(self) -> Tensor:
        """See :meth:`Mahalanobis.own`."""
        return Mahalanobis.own(self.whole())

    @property
    def _buffers(self) -> dict[str, Tensor | None]:
        return cast(dict[str, Tensor | None], vars(self.whole())["_buffers"])

    @_buffers.setter
    def _buffers(self, buffers: dict[str, Tensor | None]) -> None:
        vars(self)["_buffers"] = buffers

    @property
    def width(self) -> int:
        """The width d of the activations."""
        return self._source[1]

    @property
    def traced(self) -> Tensor:
        """See :attr:`Mahalanobis.traced`."""
        return cast(Tensor, vars(self)["_buffers"]["covariance"])

    @torch.inference_mode(False)
    @torch.no_grad()
    def whole(self) -> Mahalanobis:
        """Itself, with Σ read."""
        with _READING:
            if "_source" in vars(self):
                held, covariance = vars(self)["_buffers"], self._source[0]()
                held["covariance"] = covariance.to(held["covariance"].device)
                cast(Saved, self._saved).read(held["covariance"])
                self.__class__ = Mahalanobis  # type: ignore[assignment]
                del vars(self)["_source"]
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        held = vars(self)["_buffers"]
        with torch.inference_mode(False):
            for name, before in held.items():
                if before is not None:
                    after = fn(before)
                    held[name] = after if after.dtype == before.dtype else before.to(after.device)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        nn.Module.__setattr__(self.whole() if name == "covariance" else self, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy for elsewhere takes Σ with it.
        return self.whole().__reduce_ex__(protocol)


class Covariance:
    """Mean and covariance of activations in one pass, in memory that does not grow with n.

    Holds the moments about the running mean μ, all in float64:

        n,  μ,  Σ y yᵀ,  Σ ‖y‖² y,  Σ ‖y‖⁴      with y = x − μ

    The last two are what Ledoit and Wolf's shrinkage needs. Batches are added about the mean of
    those before the last shift, in place, which costs one product each, small ones together; when
    the mean has gone far from there, and when anybody looks, all is shifted to it by the formulas
    of these moments (Chan, Golub and LeVeque 1983 for the second). So the result does not depend on
    how the data were split, up to rounding.

    Args:
        width: d.
        device: where to accumulate; data are moved there.
    """

    @torch.inference_mode(False)
    def __init__(self, width: int, device: torch.device | str | None = None) -> None:
        self._mean = torch.zeros(width, dtype=torch.float64, device=device)
        # One product of rows (y, 1, ‖y‖², 0, …) with themselves has all moments: Σ y yᵀ; beside it
        # Σ y, n and Σ ‖y‖²; beside that Σ ‖y‖² y, … and Σ ‖y‖⁴. Products like their widths even.
        # It is symmetric, and mirrored when the moments are shifted.
        wide = width + 2 + -(width + 2) % 8
        self._moments = self._mean.new_zeros(wide, wide)
        # How many are in the moments; and how many since the last shift, before which Σ y was 0.
        self._counted = self._added = 0
        # Rows for activations that wait, and how many do.
        self._rows, self._waiting = self._mean.new_empty(0, wide), 0

    @property
    def width(self) -> int:
        """The width d of the activations."""
        return self._mean.shape[0]

    @property
    def n_samples(self) -> int:
        """How many activations were added, n."""
        return self._counted + self._waiting

    def update(self, x: Any) -> Self:
        """Add a batch of activations, (n, d), a tensor or an array. Returns self.

        Raises:
            WidthError: another width.
            NonFiniteError: NaN or infinity; the accumulator is then as it was before.
        """
        x = as_numbers(x, "activations").detach()
        if x.ndim != 2 or x.shape[1] != self.width or x.is_complex() or x.dtype == torch.bool:
            raise WidthError(
                f"expected activations (n, {self.width}), got {x.dtype} {tuple(x.shape)}"
            )
        room = WAITING if self._mean.device.type == "cpu" else ELSEWHERE
        if x.shape[0] > room:
            # Before any part is added; and through rows that stay near the processor.
            check_finite(x)
            for part in x.split(room):
                self.update(part)
            return self
        begin, end = self._waiting, self._waiting + x.shape[0]
        if end > begin:
            if end > self._rows.shape[0]:
                self._add_waiting()
                self._rows = self._rows if len(self._rows) else self._room(room)
                begin, end = 0, end - begin
            rows = self._rows[begin:end, : self.width].copy_(x)
            # A finite sum has finite terms; one that is not may have overflowed.
            if not math.isfinite(rows.sum().item()):
                check_finite(x)
            self._waiting = end
        return self

    @torch.inference_mode(False)
    def _room(self, count: int) -> Tensor:
        """Rows for activations, (n, d + 2 or more), with what does not depend on them."""
        rows, width = self._mean.new_empty(count, len(self._moments)), self.width
        rows[:, width:] = 0
        rows[:, width] = 1
        return rows

    def _add_waiting(self) -> None:
        if self._waiting:
            rows, self._waiting = self._rows[: self._waiting], 0
            self._add(rows)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _add(self, rows: Tensor) -> None:
        """Add activations that stand in rows, which are written over."""
        width = self.width
        y = rows[:, :width]
        # Of nothing, another shift costs nothing.
        about = self._mean if self._counted else y[0].clone()
        y -= about
        squares = torch.linalg.vecdot(y, y)
        rows[:, width + 1] = squares
        add_symmetric(self._moments, rows, rows)
        self._mean = about
        self._counted, self._added = self._counted + len(rows), self._added + len(rows)
        gone = self._moments[:width, width]
        share = gone.dot(gone) / self._counted / self._moments[width, width + 1]
        if share.item() > FAR and self._added > 1:
            self._shift()

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, other: "Covariance") -> Self:
        """Add everything that another accumulator has seen. Returns self."""
        if other.width != self.width:
            raise WidthError(f"cannot merge widths {self.width} and {other.width}")
        if other.n_samples == 0:
            return self
        self._settle()
        moved = Covariance(self.width, device=self._mean.device)
        moved._take(other.n_samples, {name: getattr(other, name) for name in MOMENTS})
        apart = moved._mean - self._mean
        counts = self._counted, moved._counted
        self._move(apart * (counts[1] / sum(counts)), 1.0)
        moved._move(-apart * (counts[0] / sum(counts)), 1.0)
        self._moments += moved._moments
        self._counted = sum(counts)
        return self

    def _take(self, n_samples: int, moments: dict[str, Tensor]) -> None:
        """Hold copies of these moments about their mean; of nothing so far."""
        self._counted, width = n_samples, self.width
        self._mean = moments["mean"].to(self._mean, copy=True)
        self._moments[:width, :width] = moments["second"]
        self._moments[:width, width + 1] = moments["third"]
        self._moments[width + 1, width + 1] = moments["fourth"]
        self._moments[width, width + 1] = moments["second"].diagonal().sum()

    def _settle(self) -> Tensor:
        """The moments about the mean, with all that was given."""
        self._add_waiting()
        self._shift()
        return self._moments

    @torch.inference_mode(False)
    @torch.no_grad()
    def _shift(self) -> None:
        """Shift all moments to the mean of what was added."""
        if self._added:
            mirror(self._moments)
            sums = self._moments[: self.width, self.width]
            delta, self._added = sums / self._counted, 0
            sums.zero_()
            self._move(delta, -1.0)

    def _move(self, delta: Tensor, sign: float) -> None:
        """Shift y to y − δ where Σ y is 0 (sign 1), or, as its mean is δ, becomes so (sign −1)."""
        n, width, moments = self._counted, self.width, self._moments
        second, third = moments[:width, :width], moments[:width, width + 1]
        length, pulled, trace = delta.square().sum(), second @ delta, second.diagonal().sum()
        # Σ y adds −4 (δᵀ Σ y) ‖δ‖² to the fourth moment, and 2 δ δᵀ Σ y + ‖δ‖² Σ y to the third.
        odd = 0.0 if sign > 0 else 1.0
        moments[width + 1, width + 1] += (
            4 * delta @ pulled
            - 4 * third @ delta
            + 2 * trace * length
            + n * (1 - 4 * odd) * length.square()
        )
        third -= trace * delta + 2 * pulled + n * (1 - 3 * odd) * length * delta
        second.addr_(delta, delta, alpha=sign * n)
        self._mean = self._mean + delta
        moments[width, width + 1] = second.diagonal().sum()

    @property
    def mean(self) -> Tensor:
        """μ, (d,)."""
        self._settle()
        return self._mean

    @property
    def second(self) -> Tensor:
        """Σ y yᵀ, (d, d)."""
        return self._settle()[: self.width, : self.width]

    @property
    def third(self) -> Tensor:
        """Σ ‖y‖² y, (d,)."""
        return self._settle()[: self.width, self.width + 1]

    @property
    def fourth(self) -> Tensor:
        """Σ ‖y‖⁴, ()."""
        return self._settle()[self.width + 1, self.width + 1]

    def over(self, ranks: Ranks) -> "Covariance":
        """The accumulators of all ranks, merged in rank order, with the same bits on every rank.

        Raises:
            RankError: covariances of different widths.
        """
        counts = ranks.gather((self.width, self.n_samples))
        if len({width for width, _ in counts}) > 1:
            raise RankError(f"covariances of widths {[width for width, _ in counts]} do not merge")
        device = self.mean.device
        merged = Covariance(self.width, device=device)
        for rank, (width, n_samples) in enumerate(counts):
            part = self if rank == ranks.rank else Covariance(width, device=device)
            received = Covariance(width, device=device)
            received._take(
                n_samples, {name: ranks.send(getattr(part, name), rank) for name in MOMENTS}
            )
            merged.merge(received)
        return merged

    def finish(self, shrinkage: Shrinkage = "ledoit_wolf") -> Mahalanobis:
        """The metric with covariance (1 − ρ) S + ρ (tr S / d) I, S with denominator n.

        ``"ledoit_wolf"``: ρ of Ledoit and Wolf 2004, "A well-conditioned estimator for
        large-dimensional covariance matrices", the minimiser of the expected squared error.
        ``"oas"``: ρ of Chen, Wiesel, Eldar and Hero 2010, "Shrinkage algorithms for MMSE
        covariance estimation", eq. 23. A number in [0, 1]: that ρ.

        Warns:
            ProbeWarning: as :meth:`Mahalanobis.fit`.

        Raises:
            CovarianceError: fewer than two samples, or a shrinkage that is none of these.
        """
        metric = self._finish(shrinkage)
        check_moments(self.second.diagonal(), self.fourth, self.n_samples)
        return metric

    @torch.no_grad()
    def _finish(self, shrinkage: Shrinkage) -> Mahalanobis:
        if self.n_samples < 2:
            raise CovarianceError(
                f"a covariance needs at least 2 activations, got {self.n_samples}; capture more"
            )
        n, d = self.n_samples, self.width
        # No more than this one matrix is made: at large widths it is what memory goes to.
        sample = torch.add(self.second, self.second.T).div_(2 * n)
        scale = sample.diagonal().mean()
        squared = torch.linalg.vector_norm(sample).square()
        # Beyond, a shrinkage would be made of nothing; what is all the same is refused below.
        if bool(scale > 0) and not bool(
            (squared > 0) & squared.isfinite() & self.fourth.isfinite()
        ):
            raise NonFiniteError(
                f"the squares of activations whose variance is {float(scale):.0e} do not fit into "
                f"float64; multiply them by a number"
            )
        spread = squared - d * scale.square()
        if shrinkage == "ledoit_wolf":
            error = (self.fourth / n - squared) / n
            weight = float((error / spread).clamp(0, 1)) if spread > 0 else 0.0
        elif shrinkage == "oas":
            trace = scale * d
            top = (1 - 2 / d) * squared + trace.square()
            bottom = (n + 1 - 2 / d) * spread
            weight = float((top / bottom).clamp(0, 1)) if bottom > 0 else 1.0
        elif isinstance(shrinkage, int | float) and 0 <= shrinkage <= 1:
            weight = float(shrinkage)
        else:
            raise CovarianceError(
                f"shrinkage must be 'ledoit_wolf', 'oas' or a number in [0, 1], got {shrinkage!r}"
            )
        sample.mul_(1 - weight).diagonal().add_(weight * scale)
        return Mahalanobis(sample, self.mean.clone(), shrinkage=weight, n_samples=n, _known=True)


def check_covariance(covariance: Tensor, known: bool) -> None:
    """Raise unless Σ is a covariance; see :class:`Mahalanobis`.

    Args:
        covariance: Σ.
        known: whether it is symmetric and positive semidefinite by its formula.
    """
    square = covariance.ndim == 2 and covariance.shape[0] == covariance.shape[1]
    if not square or covariance.numel() == 0:
        raise WidthError(f"a covariance must be square, got {tuple(covariance.shape)}")
    if not all_finite(covariance):
        raise NonFiniteError("the covariance holds NaN or infinity")
    matrix = covariance.detach().double()
    size = max(float(matrix.amax()), -float(matrix.amin()))
    if size == 0:
        raise CovarianceError("the covariance is zero: all activations are the same")
    if known:
        return
    rows = max(1, CHUNK_NUMBERS // len(matrix))
    uneven = [
        (a - b).abs().max() for a, b in zip(matrix.split(rows), matrix.T.split(rows), strict=True)
    ]
    if float(torch.stack(uneven).max()) > 1e-6 * size:
        raise CovarianceError("the covariance is not symmetric; use (Σ + Σᵀ) / 2")
    # Cholesky of Σ plus a rounding-sized ridge exists exactly when Σ is positive semidefinite to
    # rounding, and costs a tenth of the eigenvalues.
    ridged = matrix.clone()
    ridged.diagonal().add_((1e-6 if covariance.dtype != torch.float64 else 1e-9) * size)
    if int(torch.linalg.cholesky_ex(ridged).info) > 0:
        raise CovarianceError(
            "the covariance has a negative eigenvalue; estimate it from data or shrink it"
        )
