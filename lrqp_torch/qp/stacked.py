"""Constraints of several probes on one activation, each to write, to keep, or to leave alone."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from lrqp_torch.errors import (
    FEW,
    SolverError,
    TargetError,
    WidthError,
    capturing,
    check_distances,
    concrete,
    in_transforms,
    readable,
    trace,
)
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.qp.constraints import (
    Constraints,
    DenseConstraints,
    low_parts,
    other_classes,
    steered,
)
from lrqp_torch.qp.fused import OddsRule, VariableRules
from lrqp_torch.qp.implicit import matvec
from lrqp_torch.qp.native import Shared, Task, address
from lrqp_torch.qp.pivots import DEPENDENT
from lrqp_torch.qp.reach import Realise
from lrqp_torch.qp.solution import Solution

_PARTS = [field.name for field in fields(Solution)]
FREE = -1
"""In place of a target: the variable may move as it likes."""
KEEP = -2
"""In place of a target: the variable's beliefs stay where they are."""

MOST_PAIRS = 16_384
TINY = torch.finfo(torch.float64).tiny
# The other modes of torch's distances take them from products, which lose those of near classes.
DIFFERENCES = "donot_use_mm_for_euclid_dist"


@dataclass(frozen=True)
class Prepared:
    """What a kernel is told of the constraints of some choices, n of them."""

    held: Tensor  # classes that hold now, negative where a variable's own reading counts, (n, V)
    # Of each slot its two classes and 1 for an inequality, 2 for one with a tolerance, 3 for an
    # equation, 0 for none, −1 of a choice out of range, (n, 3, m) int32; the rounding error of M'
    # and ‖a‖, (n, 2, m); and M' with A' in the slots' rows, (n, 2, m, m).
    parts: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class StackedGeometry:
    """Constraints of V probes stacked, in one metric; all floating tensors float64.

    Variable v with K_v classes has K_v − 1 constraints z_t − z_ℓ for a target t, others ascending;
    none for :data:`FREE`; and for :data:`KEEP` either C δ = 0 with C the differences of neighbours,
    or, where it has a tolerance, all K_v (K_v − 1) ordered differences as inequalities. So that all
    examples have one shape, a variable owns as many slots as it can need; in a slot that it does
    not need stands a constraint of no length that reads 0.

    C δ = 0 is eliminated beforehand, by Gaussian elimination in the Gram matrix: constraints A
    become A' = A − A Σ Cᵀ (C Σ Cᵀ)⁺ C, which is the conditional covariance of
    :func:`~.keeping.conditional_covariance` for each example its own, and never larger
    than m × m.

        plus, minus: classes p and n of every ordered pair (p, n) of one probe, (R,).
        gram: (w_p − w_n)ᵀ Σ (w_q − w_r) for all pairs, (R, R).
        noise, length: rounding error of its diagonal, and ‖w_p − w_n‖, (R,).
        variable, offset: to which variable a slot belongs, and as which of its slots, (m,).
        first: the first pair of a slot's variable, (m,).
        rivals: K_v − 1 of a slot's variable, (m,).
        tolerant: whether a slot's variable is kept within a tolerance, (m,) bool.
        n_classes: K_v of each variable.
        slots: how many slots each has.
        low: what to add to steering, (ΣK, d), so that differences of a variable's rows keep their
            digits where classes are nearly equal; None where none are.
    """

    weight: Tensor  # all W stacked, (ΣK, d)
    bias: Tensor  # all b, (ΣK,)
    steering: Tensor  # W̄ Σ of each, W̄ the weights less their mean, (ΣK, d)
    plus: Tensor
    minus: Tensor
    gram: Tensor
    noise: Tensor
    length: Tensor
    variable: Tensor
    offset: Tensor
    first: Tensor
    rivals: Tensor
    tolerant: Tensor
    n_classes: tuple[int, ...]
    slots: tuple[int, ...]
    low: Tensor | None = None

    @classmethod
    def build(
        cls,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        covariance: Tensor | Mahalanobis,
        tolerant: Sequence[bool],
    ) -> "StackedGeometry":
        """Compute the geometry; differentiable in weights, biases and covariance.

        Cost: ΣK d² for WΣ, unless a saved metric keeps it, and R² d for the Gram matrix,
        R = Σ K (K − 1), once.

        Args:
            weights: W of each probe, (K_v, d).
            biases: b of each, (K_v,).
            covariance: Σ, (d, d); or the metric.
            tolerant: for each, whether it is to be kept within a tolerance.

        Raises:
            WidthError: the shapes do not fit together.
            SolverError: more than :data:`MOST_PAIRS` pairs of classes.
        """
        width = len(covariance) if isinstance(covariance, Tensor) else covariance.width
        for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
                raise WidthError(
                    f"probe {place} has weight {tuple(weight.shape)} and bias "
                    f"{tuple(bias.shape)}, the metric has width {width}; fit all on activations "
                    f"of the same site"
                )
        device = weights[0].device
        sizes = tuple(len(weight) for weight in weights)
        n_ordered = sum(size * (size - 1) for size in sizes)
        if n_ordered > MOST_PAIRS:
            raise SolverError(
                f"variables of {', '.join(map(str, sizes))} classes have {n_ordered:,} ordered "
                f"pairs, and the products of all with all are held: at most {MOST_PAIRS:,}, as of "
                f"128 classes; leave classes out, or keep a variable by metric.keeping(probe)"
            )
        each = [part.double() for part in weights]
        weight, bias = torch.cat(each), torch.cat([part.double() for part in biases])
        along_each, sizes_in = steered(covariance, each)
        steering = torch.cat(along_each)

        plus, minus, first, slots = [], [], [], []
        n_pairs = n_stacked = 0
        for place, (size, wide) in enumerate(zip(sizes, tolerant, strict=True)):
            classes = torch.arange(size, device=device)
            plus.append(n_stacked + classes.repeat_interleave(size - 1))
            minus.append(n_stacked + other_classes(classes, size, device).flatten())
            n_slots = size * (size - 1) if wide else size - 1
            slots += [(place, i, n_pairs, size - 1, wide) for i in range(n_slots)]
            first.append(n_pairs)
            n_pairs, n_stacked = n_pairs + size * (size - 1), n_stacked + size
        p, n = torch.cat(plus), torch.cat(minus)
        normals, along = weight[p] - weight[n], steering[p] - steering[n]
        length = torch.linalg.vector_norm(normals.detach(), dim=-1)
        low, size_of = _low_parts(each, along_each, covariance), sizes_in.norm(steering)
        if low is not None:
            along, size_of = along + (low[p] - low[n]), torch.zeros_like(size_of)
        products = normals @ along.T
        check_distances(products.diagonal())
        noise = sizes_in.rounding(length, size_of[p] + size_of[n])
        columns = [torch.tensor(column, device=device) for column in zip(*slots, strict=True)]
        return cls(
            weight=weight,
            bias=bias,
            steering=steering,
            plus=p,
            minus=n,
            gram=(products + products.T) / 2,
            noise=noise,
            length=length,
            variable=columns[0],
            offset=columns[1],
            first=columns[2],
            rivals=columns[3],
            tolerant=columns[4],
            n_classes=sizes,
            low=low,
            slots=tuple(k * (k - 1) if w else k - 1 for k, w in zip(sizes, tolerant, strict=True)),
        )

    @classmethod
    def of_probes(
        cls, tolerant: Sequence[bool], probes: Sequence[Tensor], metric: Tensor | Mahalanobis
    ) -> "StackedGeometry":
        """:meth:`build` of the weights of all probes, then their biases."""
        count = len(tolerant)
        return cls.build(probes[:count], probes[count:], metric, tolerant)

    @property
    def n_constraints(self) -> int:
        """Slots of all variables together."""
        return len(self.variable)

    @property
    def width(self) -> int:
        """The width d of the activations that the probes read."""
        return self.weight.shape[1]

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """What logits are read by and edits move along: W, b and WΣ."""
        return self.weight, self.bias, self.steering

    @cached_property
    def layout(self) -> Tensor:
        """The variable of each slot, and where the classes of each begin, (m + V + 1,) int32."""
        ends = torch.tensor([0, *accumulate(self.n_classes)], device=self.weight.device)
        return torch.cat([self.variable, ends]).int()

    @torch.no_grad()
    def live(
        self, weights: list[Tensor], biases: list[Tensor], floors: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The probes' W and b and the least log α of each as they are now, stacked in memory that
        stays where it is.
        """
        kept: tuple[Tensor, Tensor, Tensor] | None = vars(self).get("stacked")
        if kept is None or kept[0].dtype != weights[0].dtype:
            with torch.inference_mode(False):
                least = torch.stack(floors).double()
                kept = vars(self)["stacked"] = torch.cat(weights), torch.cat(biases), least
            return kept
        torch.cat(weights, out=kept[0])
        torch.cat(biases, out=kept[1])
        torch.stack(floors, out=kept[2])
        return kept

    @torch.no_grad()
    def prepared(self, choice: Tensor, held: Tensor | None) -> Prepared:
        """What a kernel needs of choices (n, V), which may be out of range, and classes that hold.

        Those of the last choices are kept, unless they are part of a CUDA graph.
        """
        # A tensor made in inference mode does not tell whether it was written to.
        counts = [0 if part is None else trace(part)[1] for part in (choice, held)]
        mark = choice, held, *(object() if count is None else count for count in counts)
        last = vars(self).get("ready")
        if last is not None and all(
            old is new or (isinstance(old, int) and old == new)
            for old, new in zip(last[0], mark, strict=True)
        ):
            ready: Prepared = last[1]
            return ready
        given = torch.full_like(choice, FREE) if held is None else held
        sound = (self.in_range(choice) & self.in_range(given)).all(-1, keepdim=True)
        chosen = torch.where(sound, choice, FREE)
        gram, noise, combination = self._eliminate(chosen)
        pair, wanted, fixed = self._slots(chosen)
        tolerated = wanted & (chosen[:, self.variable] == KEEP)
        kind = torch.where(fixed, 3, wanted.long() + tolerated.long())
        kind = torch.where(sound, kind, -1)
        ready = Prepared(
            given.contiguous(),
            (
                torch.stack([self.plus[pair], self.minus[pair], kind], 1).int(),
                torch.stack([noise, self.length[pair]], 1),
                torch.stack([gram, combination], 1),
            ),
        )
        if not capturing(choice):
            vars(self)["ready"] = mark, ready
        return ready

    @cached_property
    def shared(self) -> Shared:
        """What compiled solves need of it."""
        counts = [0, *accumulate(self.slots)], [0, *accumulate(self.n_classes)]
        at = torch.tensor(counts[0][:-1])
        tables = (
            self.plus,
            self.minus,
            *map(torch.tensor, counts),
            self.first[at],
            self.tolerant[at],
        )
        numbers = self.gram, self.noise, self.length, None, *self.rows, None, self.low
        return Shared.of(*numbers, layout=[table.long().contiguous() for table in tables])

    def in_range(self, choice: Tensor) -> Tensor:
        """Which choices, (B, V), are a class of their variable, FREE or KEEP; (B, V) bool."""
        below = [own < size for own, size in zip(choice.unbind(-1), self.n_classes, strict=True)]
        return (choice >= KEEP) & torch.stack(below, -1)

    def check(
        self,
        choice: Tensor,
        batch: int,
        what: str = "target",
        names: Sequence[str] | None = None,
    ) -> None:
        """Raise unless ``choice`` is (B, V) with classes of each variable, FREE or KEEP."""
        n_variables = len(self.n_classes)
        if choice.shape != (batch, n_variables):
            raise TargetError(
                f"{what}s must be ({batch}, {n_variables}), one per activation and variable, got "
                f"{tuple(choice.shape)}"
            )
        if choice.numel() <= FEW and all(
            KEEP <= value < size
            for row in choice.tolist()
            for value, size in zip(row, self.n_classes, strict=True)
        ):
            return
        outside = ~self.in_range(choice)
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise TargetError(
                f"the {what} of variable {names[column] if names else column!r} is "
                f"{int(choice[row, column])} at example {row}; "
                f"it has classes 0 to {self.n_classes[column] - 1}, FREE is {FREE} and KEEP {KEEP}"
            )

    def logits(self, x: Tensor) -> Tensor:
        """Logits of all probes side by side, in float64, (B, ΣK)."""
        return torch.nn.functional.linear(x.double(), self.weight, self.bias)

    def margins(self, x: Tensor, choice: Tensor) -> Tensor:
        """z_p − z_n of each slot's pair, 0 where the slot is not needed; float64, (B, m)."""
        pair, wanted, _ = self._slots(choice)
        logits = self.logits(x)
        margins = logits.gather(-1, self.plus[pair]) - logits.gather(-1, self.minus[pair])
        return torch.where(wanted, margins, 0.0)

    def constraints(self, choice: Tensor) -> Constraints:
        """The dual's constants of what each example is to write and keep."""
        gram, noise, _ = self._eliminated(choice)
        pair, wanted, _ = self._slots(choice)
        return DenseConstraints(
            gram=gram,
            noise=torch.where(wanted, noise, 1.0),
            length=torch.where(wanted, self.length[pair], 0.0),
        )

    def displace(
        self, x: Tensor, choice: Tensor, multipliers: Tensor, moved: Tensor | None = None
    ) -> Tensor:
        """X + Σ A'ᵀ λ, (B, d), in float64."""
        if self.low is None:
            return torch.addmm(x.double(), self.coefficients(choice, multipliers), self.steering)
        edited, (pair, _, _) = x.double(), self._slots(choice)
        for at, part in zip(
            pair.unbind(-1), self._shares(choice, multipliers).unbind(-1), strict=True
        ):
            p, n = self.plus[at], self.minus[at]
            along = (self.steering[p] - self.steering[n]) + (self.low[p] - self.low[n])
            edited = torch.addcmul(edited, part.unsqueeze(-1), along)
        return edited

    def coefficients(self, choice: Tensor, multipliers: Tensor) -> Tensor:
        """Class coefficients c of multipliers λ, (B, ΣK), by which edits move along c (WΣ)."""
        pair, _, _ = self._slots(choice)
        share = self._shares(choice, multipliers)
        coefficients = share.new_zeros(len(share), len(self.weight))
        coefficients = coefficients.scatter_add(-1, self.plus[pair], share)
        return coefficients.scatter_add(-1, self.minus[pair], -share)

    def _shares(self, choice: Tensor, multipliers: Tensor) -> Tensor:
        """Multipliers of all slots' pairs, (B, m): those of what is kept follow from the others."""
        _, _, combination = self._eliminated(choice)
        return matvec(combination.transpose(-1, -2), multipliers)

    def _slots(self, choice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each slot: its pair, whether it is an inequality, and whether an equation; (B, m)."""
        chosen = choice[:, self.variable]
        written, kept = chosen >= 0, chosen == KEEP
        within = self.offset < self.rivals
        wanted = (written & within) | (kept & self.tolerant)
        fixed = kept & within & ~self.tolerant
        # Equations compare neighbours, of which near-equal ones have a short row of their own.
        block = torch.where(fixed, self.offset, torch.where(written, chosen, 0))
        start = block * self.rivals
        pair = self.first + torch.where(wanted | fixed, start + self.offset, 0)
        return pair, wanted, fixed

    def _eliminated(self, choice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """M' = A' Σ A'ᵀ (B, m, m), its noise (B, m), and A' as combinations of the slots' rows.

        Rows of slots that are not inequalities are zero. Every round of a solve asks for them, so
        those of the last choices are kept.
        """
        if not concrete(choice) or in_transforms():
            return self._eliminate(choice)
        mode = trace(choice), torch.is_grad_enabled()
        last: Any = vars(self).get("last")
        known = last is not None and last[0] is choice and last[1] == mode
        if known and readable(choice):
            # What is written through .data leaves no trace.
            known = torch.equal(last[2], choice)
        elif choice.is_inference():
            known = False
        if not known:
            last = vars(self)["last"] = choice, mode, choice.clone(), self._eliminate(choice)
        found: tuple[Tensor, Tensor, Tensor] = last[3]
        return found

    def _eliminate(self, choice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pair, wanted, fixed = self._slots(choice)
        used = wanted | fixed
        gram = self.gram[pair.unsqueeze(-1), pair.unsqueeze(-2)]
        gram = torch.where(used.unsqueeze(-1) & used.unsqueeze(-2), gram, 0.0)
        diagonal = gram.detach().diagonal(dim1=-2, dim2=-1)
        noise = self.noise[pair]
        identity = torch.eye(self.n_constraints, dtype=gram.dtype, device=gram.device)
        combination = identity.expand_as(gram)
        if not readable(fixed) or bool(fixed.any()):
            # Of each example by itself, so that it is the same in any company; first what stands
            # out most from its rounding, which what it is taken out of inherits.
            noise, left = noise + DEPENDENT * diagonal * fixed.any(-1, keepdim=True), fixed
            for _ in range(int(fixed.sum(-1).max()) if readable(fixed) else self.n_constraints):
                over = gram.detach().diagonal(dim1=-2, dim2=-1) / noise.clamp_min(TINY)
                slot = torch.where(left, over, -1.0).argmax(-1, keepdim=True)
                present = left.gather(-1, slot) & (over.gather(-1, slot) > 1)
                left = left.scatter(-1, slot, False)
                own, other = (
                    part.take_along_dim(slot.unsqueeze(-1), -2) for part in (gram, combination)
                )
                pivot = own.take_along_dim(slot.unsqueeze(-1), -1)
                scaled = torch.where(
                    present, (own / torch.where(present.unsqueeze(-1), pivot, 1.0)).squeeze(-2), 0.0
                )
                combination = combination - scaled.unsqueeze(-1) * other
                gram = gram - scaled.unsqueeze(-1) * own
                noise = noise + scaled.detach().square() * noise.gather(-1, slot)
        both = wanted.unsqueeze(-1) & wanted.unsqueeze(-2)
        gram = torch.where(both, (gram + gram.transpose(-1, -2)) / 2, 0.0)
        return gram, noise, torch.where(wanted.unsqueeze(-1), combination, 0.0)


def _low_parts(
    weights: Sequence[Tensor], steering: Sequence[Tensor], covariance: Tensor | Mahalanobis
) -> Tensor | None:
    """What differences lack in WΣ of several probes, (ΣK, d); None where no classes are near."""
    found = []
    for weight, along in zip(weights, steering, strict=True):
        length = torch.cdist(weight.detach(), weight.detach(), compute_mode=DIFFERENCES)
        found.append(low_parts(weight, along, covariance, length))
    if all(low is None for low in found):
        return None
    pairs = zip(found, steering, strict=True)
    return torch.cat([torch.zeros_like(along) if low is None else low for low, along in pairs])


@dataclass(frozen=True, repr=False)
class JointSolution(Solution):
    """What one problem did to several variables: a :class:`Solution` with V columns of odds.

    ``floor``, ``log_odds_before`` and ``log_odds_after`` are (B, V), NaN where a variable was not
    written; ``multipliers`` and ``active`` are those of all constraints together, (B, m).

    Attributes:
        moved: the largest change of any log odds z_j − z_k of a variable, read back, (B, V): for a
            kept variable what rounding or its tolerance let through.
    """

    moved: Tensor

    def revert(self, failed: Tensor, x: Tensor) -> Self:
        """See :meth:`Solution.revert`."""
        moved = torch.where(failed.unsqueeze(-1), 0.0, self.moved)
        return replace(super().revert(failed, x), moved=moved)


@dataclass(frozen=True, eq=False)
class StackedRule:
    """Log α of several variables by their odds rules; a floor for :meth:`~.MahalanobisQP.solve`.

    Attributes:
        geometry: the constraints that floors are of.
        rules: of each variable.
        log_odds: the least log α of each, () float64.
        choice: what each example writes, keeps and leaves free, (B, V).
        source: classes that hold now, (B, V), negative where a variable's own reading counts; None:
            everywhere.
        asked: log α in place of the rules', (B, V), NaN where there is none; or None.
    """

    geometry: StackedGeometry
    rules: VariableRules
    log_odds: Sequence[Tensor]
    choice: Tensor
    source: Tensor | None = None
    asked: Tensor | None = None

    def of(self, rows: slice) -> "StackedRule":
        """That of a slice of the batch."""
        own = (None if part is None else part[rows] for part in (self.source, self.asked))
        return StackedRule(self.geometry, self.rules, self.log_odds, self.choice[rows], *own)

    def told(self, task: Task) -> None:
        """Tell compiled code of the rules, which the task then holds."""
        each = zip(self.rules, self.log_odds, strict=True)
        table = [(rule[0], log_odds.item(), *rule[1:]) for rule, log_odds in each]
        rules = (ctypes.c_double * (4 * len(table)))(*(value for row in table for value in row))
        asked = None if self.asked is None else self.asked.contiguous()
        task.rules, task.asked = ctypes.addressof(rules), address(asked)
        task.each, task.held = self.geometry.n_constraints, (rules, asked)

    def __call__(self, margins: Tensor, rows: slice = slice(None)) -> Tensor:
        """The floor of every slot: log α, the margin at x less τ, or what always holds; (b, m)."""
        own, columns = self.of(rows), []
        parts = zip(margins.split(self.geometry.slots, -1), own._floors(margins), strict=True)
        for place, (part, floor) in enumerate(parts):
            chosen, (_, _, within) = own.choice[:, place].unsqueeze(-1), self.rules[place]
            slot = torch.arange(part.shape[-1], device=part.device)
            inside = (chosen >= 0) & (slot < self.geometry.n_classes[place] - 1)
            column = torch.where(inside, floor.unsqueeze(-1), -1.0)
            columns.append(torch.where(chosen == KEEP, part - within, column) if within else column)
        return torch.cat(columns, -1)

    def floors(self, margins: Tensor) -> Tensor:
        """Log α of each variable, (B, V), NaN where it is not written."""
        return torch.where(self.choice >= 0, torch.stack(self._floors(margins), -1), torch.nan)

    def least(self, margins: Tensor) -> Tensor:
        """The least margin of each variable that is written, (B, V), else NaN."""
        parts = zip(margins.split(self.geometry.slots, -1), self.geometry.n_classes, strict=True)
        least = torch.stack([part[:, : size - 1].amin(-1) for part, size in parts], -1)
        return torch.where(self.choice >= 0, least, torch.nan)

    def _floors(self, margins: Tensor) -> list[Tensor]:
        """Log α of each, (B,): any number where the variable is not written."""
        columns, geometry = [], self.geometry
        for place, part in enumerate(margins.split(geometry.slots, -1)):
            (mirror, surplus, _), target = self.rules[place], self.choice[:, place].clamp_min(0)
            source = None if self.source is None else self.source[:, place]
            rule = OddsRule(mirror > 0, self.log_odds[place], target, source)
            own = rule(part[:, : geometry.n_classes[place] - 1]) + surplus
            if self.asked is not None:
                asked = self.asked[:, place]
                own = torch.where(asked.isnan(), own, asked)
            columns.append(own)
        return columns

    def completed(self, solution: Solution, x: Tensor, realise: Realise | None) -> JointSolution:
        """The solution with the odds of each variable, read back from what the stream holds."""
        if isinstance(solution, JointSolution):
            return solution
        geometry, choice = self.geometry, self.choice
        with torch.no_grad():
            edited = solution.x_new.detach().double()
            stored = edited if realise is None else realise(edited)
            unchanged = (solution.x_new == x).all(-1, keepdim=True)
            stored = torch.where(unchanged, x.double(), stored)
            change = (geometry.logits(stored) - geometry.logits(x)).split(geometry.n_classes, -1)
            moved = torch.stack([part.amax(-1) - part.amin(-1) for part in change], -1)
            after = self.least(geometry.margins(stored, choice))
        margins = geometry.margins(x, choice)
        parts = {name: getattr(solution, name) for name in _PARTS}
        own = {"floor": self.floors(margins), "log_odds_before": self.least(margins)}
        return JointSolution(**parts | own | {"log_odds_after": after, "moved": moved})
