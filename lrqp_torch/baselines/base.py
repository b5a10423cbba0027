"""What every baseline is: an edit of activations with the same call as LRQP."""

import copy
import math
from abc import abstractmethod
from numbers import Real
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lrqp_torch.baselines.data import BaselineData
from lrqp_torch.edits.base import Edit
from lrqp_torch.edits.lrqp import LRQP, Classes
from lrqp_torch.edits.record import EditRun
from lrqp_torch.errors import (
    NonFiniteError,
    PairError,
    SettingError,
    WidthError,
    check_activations,
    check_finite,
    quoted,
    require_concrete,
)
from lrqp_torch.qp import Solution, Status
from lrqp_torch.qp.reach import Realise
from lrqp_torch.stream.intervene import EditContext, Placement


class Baseline(Edit[Classes]):
    """An edit x ↦ x' that LRQP is compared with.

        x' = x + s (edit(x) − x)

    with ``edit`` the method's own formula and s the ``strength``: 0 leaves activations as they
    are, 1 is the method as published, and a sweep over s gives its curve of effect against side
    effect. An activation that the method does not move comes back bit for bit.

    Args:
        reference: the LRQP whose probe gives the default source class and the odds on record, and
            whose metric measures the size of the edit.
        strength: s.

    Raises:
        SettingError: a strength that is not finite.
    """

    name: ClassVar[str]
    """Under which the registry knows it."""
    title: ClassVar[str]
    """For tables."""

    def __init__(self, reference: LRQP, *, strength: float = 1.0) -> None:
        super().__init__(reference.on_infeasible)
        self.reference = reference
        self.strength = _checked(strength)

    @classmethod
    def fit(cls, x: Tensor, y: Any, *, reference: LRQP | None = None, **options: Any) -> Self:
        """Fit it to activations.

        Args:
            x: activations, (n, d).
            y: their classes, (n,): numbers, or names as for :meth:`LRQP.fit`.
            reference: default an LRQP fitted to the same activations.
            options: ``strength``, and those that the method names.

        Raises:
            WidthError, NonFiniteError, LabelError: bad input, named.
        """
        return cls._fit(LRQP.fit(x, y) if reference is None else reference, x, y, **options)

    @classmethod
    def from_data(cls, data: BaselineData) -> Self:
        """Build it with its default options from what a comparison has at hand."""
        return cls._fit(data.reference, data.x, data.y)

    @classmethod
    def _fit(cls, reference: LRQP, x: Tensor, y: Tensor, *given: Any, **options: Any) -> Self:
        """With what is estimated from activations; a method that estimates nothing ignores them."""
        return cls(reference, *given, **options)

    @abstractmethod
    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """The method at strength 1.

        Args:
            x: checked activations, (N, d), in the stream's dtype.
            target: class to write, (N,) long.
            source: class that holds now, (N,) long.
            context: which rows these are, and what the stream will hold of them.

        Returns:
            Edited activations, (N, d), of any floating dtype; rows to leave alone equal x.
        """

    @property
    def n_classes(self) -> int:
        """K."""
        return self.reference.n_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the reference."""
        return self.reference.class_names

    @property
    def width(self) -> int:
        """The width d of the activations."""
        return self.reference.probe.width

    @property
    def label(self) -> str:
        """Its name."""
        return self.name

    def solve(
        self,
        x: Tensor,
        target: Classes,
        source: Classes | None = None,
        *,
        realise: Realise | None = None,
        examples: Tensor | None = None,
    ) -> Solution:
        """Edit activations x, (B, d); differentiable where the formula is.

        ``target`` and ``source`` are classes, (B,) or one for all; by default the source is the
        reference probe's own reading. In the :class:`~lrqp_torch.Solution` odds and distance are
        those of the reference's probe and metric, read from what the stream holds; ``floor`` and
        ``kkt_residual`` are NaN, since a baseline promises no odds. ``status`` is SATISFIED where
        the activation was left as it was, and otherwise SOLVED.

        Raises:
            WidthError, TargetError, NonFiniteError: bad input, named.
            NonFiniteError: an edited activation that x's dtype cannot hold.
            PairError: a method that needs paired activations has none, or not as many as x.
        """
        check_activations(x, self.width)
        self.check_pairs(len(x))
        rows = torch.arange(len(x), device=x.device)
        names = rows if examples is None else examples
        held = realise or Placement(None, 1.0, x.dtype)
        given = self.row_classes(target, x, "target")
        own = None if source is None else self.row_classes(source, x, "source")
        return self.edit_rows(x, given, own, EditContext(rows, names, torch.zeros_like(rows), held))

    def edit_rows(
        self, x: Tensor, target: Tensor, source: Tensor | None, context: EditContext, **given: Any
    ) -> Solution:
        """:meth:`solve` for rows that ``context`` numbers: what the hook in a model calls."""
        check_activations(x, self.width)
        require_concrete(f"the baseline {self.name}", x)
        check_finite(x)
        geometry = self.reference.geometry(x.device)
        if source is None:
            source = geometry.logits(x).argmax(-1)
        edited = self.edit(x, target.long(), source.long(), context)
        if self.strength != 1:
            wide = x.double()
            edited = wide + self.strength * (edited.double() - wide)
        result = edited.to(x.dtype)
        _check_holds(result, context)
        with torch.no_grad():
            moved = (result != x).any(-1)
            held = torch.where(moved.unsqueeze(-1), context.realise(result), x.double())
            delta = held - x.double()
            unknown = torch.full_like(delta[:, 0], torch.nan)
            none = torch.zeros(len(x), self.n_classes - 1, dtype=torch.float64, device=x.device)
            return Solution(
                x_new=result,
                multipliers=none,
                active=none > 0,
                squared_distance=self.reference.metric.distance(delta).square(),
                squared_euclidean=delta.square().sum(-1),
                floor=unknown,
                log_odds_before=geometry.margins(x, target).amin(-1),
                log_odds_after=geometry.margins(held, target).amin(-1),
                kkt_residual=unknown,
                status=torch.where(moved, int(Status.SOLVED), int(Status.SATISFIED)),
            )

    def at_strength(self, strength: float) -> Self:
        """The same edit at another strength; shares all tensors with this one."""
        other = copy.copy(self)
        other.strength = _checked(strength)
        return other

    def _hold(self, name: str, tensor: Tensor, *shape: int) -> None:
        """Keep a tensor as a buffer in float64, or raise :class:`WidthError` for its shape."""
        if tuple(tensor.shape) != shape:
            raise WidthError(
                f"{name} of {self.name} must be {shape}, got {tuple(tensor.shape)}: it has another "
                f"width or other classes than the reference"
            )
        self.register_buffer(name, tensor.double())

    def check_pairs(self, count: int) -> None:
        """Raise unless paired activations, where the method needs them, are as many as rows."""


class Paired(Baseline):
    """A baseline that reads, for each example, the activation of another prompt.

    The pair says what is written; ``target`` is only what the record's odds refer to. For a control
    edit give the activations of prompts of the same class.
    """

    def __init__(self, reference: LRQP, *, strength: float = 1.0) -> None:
        super().__init__(reference, strength=strength)
        self.partner: Tensor | None = None

    def paired(self, activations: Tensor) -> Self:
        """The same edit, bound to one paired activation for each row that it will edit.

        Args:
            activations: in the order and shape of the rows: (B, d) for positions (B,), (B, n, d)
                for (B, n), (N, d) for a mask with N true entries; as :func:`capture` returns them
                for the paired prompts.

        Raises:
            PairError: no tensor, another width, or NaN.
        """
        if not isinstance(activations, Tensor):
            raise PairError(
                f"paired activations must be a tensor, got {type(activations).__name__}"
            )
        if activations.ndim < 2 or activations.shape[-1] != self.width:
            raise PairError(
                f"paired activations must be (..., {self.width}), one for each edited position, "
                f"got {tuple(activations.shape)}"
            )
        flat = activations.detach().flatten(0, -2)
        if not bool(torch.isfinite(flat).all()):
            raise PairError("paired activations hold NaN or infinity; capture them again")
        other = copy.copy(self)
        other.partner = flat
        return other

    def bind(self, run: EditRun, **given: Any) -> dict[str, Any]:
        """See :meth:`Edit.bind`."""
        if run.positions.scope is not None:
            raise PairError(f"{self.name} needs a pair for each position, known beforehand")
        self.check_pairs(len(run.positions))
        return super().bind(run, **given)

    def partners(self, x: Tensor, context: EditContext) -> Tensor:
        """The paired activations of some rows, (N, d) float64."""
        assert self.partner is not None
        return self.partner.to(x.device)[context.index].double()

    def check_pairs(self, count: int) -> None:
        """Raise unless there is one paired activation for each of ``count`` rows."""
        if self.partner is None:
            raise PairError(
                f"{self.name} writes the activations of paired prompts: call "
                f".paired(activations) first, with one activation for each of the {count} rows"
            )
        if len(self.partner) != count:
            raise PairError(
                f"{self.name} was given {len(self.partner)} paired activations for {count} rows; "
                f"give one for each, in the same order"
            )


def _check_holds(edited: Tensor, context: EditContext) -> None:
    # A finite sum has finite terms, and costs a fraction of looking at each of them.
    if bool(torch.isfinite(edited.detach().sum())):
        return
    lost = (~torch.isfinite(edited).all(-1)).nonzero().flatten()
    if len(lost):
        raise NonFiniteError(
            f"{len(lost)} edited activations exceed what {edited.dtype} can hold, the first are of "
            f"rows {context.index[lost[:5]].tolist()}; lower the strength, or run the model in "
            f"float32"
        )


def _checked(strength: Any) -> float:
    if not isinstance(strength, Real | Tensor) or not math.isfinite(strength):
        raise SettingError(f"strength must be a finite number, got {quoted(strength)}")
    return float(strength)


class NoEdit(Baseline):
    """x' = x, bit for bit, at every strength: what happens by itself."""

    name: ClassVar[str] = "none"
    title: ClassVar[str] = "no edit"

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        return x


class FullPatch(Paired):
    """x' = x_pair, the activation of another prompt at the same site.

    The upper bound of what any edit of this activation can do, and what it does besides: whatever
    else tells the two prompts apart comes along.

    Source: interchange interventions (Geiger et al. 2021, arXiv 2106.02997) and activation patching
    (Vig et al. 2020, arXiv 2004.12265).
    """

    name: ClassVar[str] = "full_patch"
    title: ClassVar[str] = "full patch"

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        return self.partners(x, context)
