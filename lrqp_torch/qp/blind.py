"""Edits of a probe's activations where no value may be looked at, in few operations of torch.

On a GPU without Triton, and on the meta device, where each operation is a launch. What rows have in
common is tabled beforehand, once a geometry; and instead of one round of rounding and reading back
after another, several aims above the floors are tried at once, of which each row takes the lowest
that is read back at its floor. Rounding and reading err by a share of ‖a‖ ‖x'‖ that is known up to
a factor, so aims that grow by factors find it. Statuses, active sets and certificate are those of
:mod:`~.problem` and :mod:`~.reach`, which all other solves go through.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrqp_torch.errors import capturing, in_transforms, readable
from lrqp_torch.qp import fused
from lrqp_torch.qp.constraints import nearest_neighbours, other_classes
from lrqp_torch.qp.fused import OddsRule
from lrqp_torch.qp.implicit import Ended
from lrqp_torch.qp.reach import FINE, LONGER, ROOM, Headroom, Realise, advance, excess, sizes
from lrqp_torch.qp.solution import ROUNDING, Solution, Status, statuses
from lrqp_torch.qp.table import ActiveSets
from lrqp_torch.qp.total_odds import (
    TotalOdds,
    solve_total,
    total_log_odds,
    total_residual,
    without_constants,
)

if TYPE_CHECKING:
    from lrqp_torch.qp.geometry import ProbeGeometry

# How far above the floors is aimed, in units of the first aim. In the finer dtypes that is twice
# the bound on rounding to nearest, and what else may be missing is tiny and of any size; in half
# precision it is what most errors stay below, and their bound is 2 √d times that.
FINE_STEPS = (0.0, 1.0, 7.0, 60.0, 1e3, 3e4, 1e6, 1e8)
# In float64 a product's own rounding, which hangs on its company, is of the first aim's size.
DOUBLE_STEPS = (1.0, 3.0, 9.0, 1e2, 3e3, 1e5, 1e8, 1e11)
COARSE_STEPS = (0.0, 1.0, 3.0, 7.0, 15.0, 50.0, 250.0, 2000.0)
# On the residual of an accurate solve, as in `solvers.ActiveSet`.
TOLERANCE, TOTAL_TOLERANCE = 1e-8, TotalOdds.tolerance
# So many numbers of all trials, 512 MB, are held at once.
CHUNK_NUMBERS = 2**26


def serves(x: Tensor, geometry: "ProbeGeometry") -> bool:
    """Whether activations are solved here: few classes, and no value may be looked at."""
    # These see through what `reach` does; and a compiler makes few launches of it.
    if torch.compiler.is_compiling() or in_transforms() or readable(x):
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and geometry.blind is not None


def at_once(geometry: "ProbeGeometry", total: bool) -> int:
    """How many rows are solved together where they are very many."""
    assert geometry.blind is not None
    sets = 0 if geometry.sets is None else geometry.sets.table.shape[1]
    numbers = (1 + len(COARSE_STEPS)) * max(geometry.width, sets * (8 if total else 1))
    return max(1, CHUNK_NUMBERS // numbers)


@dataclass(frozen=True)
class Blind:
    """What solves of one geometry share.

    Attributes:
        read: W transposed, of R trials (R, d, K), of none (d, K); of two classes their difference.
        bias: b, (K,).
        steering: W̄Σ, (R, K, d); or differences of its rows.
        within: the residual of an accurate solve, (R, 1, 1), a little less for the trial that aims
            at the floors themselves, which counts last.
        own: numbers of each target, (K, q), split into ``sizes``; of two classes (6, 4), of each
            target with each source; see :meth:`build`.
        blocks: what λ is multiplied by in three or four parts, the last of which moves x.
        paired: of more than two those of each target with each source, (K, K + 1, q); the last, or
            that of source −1, is where it is the probe's own reading.
        sets: the active sets of all targets; of two classes None.
        constants: of two classes ‖a‖, ‖a‖ ‖Σa‖ / M, the roots of M and of ‖Σa‖², what is wrong
            with 1 / M, and M, each (1, 1) or (1, 2).
        steps: how far above the first aim trials are, in float64, float32 and half, and the same
            with the floors themselves before them, (R, 1, 1).
        status: each :class:`Status`, (); what is asked for and not reached has that of ``failed``.
        zero: this number, ().
    """

    read: dict[int, Tensor]
    bias: Tensor
    steering: dict[int, Tensor]
    within: Tensor
    own: Tensor
    paired: Tensor
    sizes: list[int]
    blocks: list[int]
    sets: ActiveSets | None
    constants: tuple[Tensor, ...]
    steps: list[Tensor]
    status: tuple[Tensor, ...]
    failed: Tensor
    zero: Tensor

    def numbered(self, x: Tensor) -> Tensor:
        """0, 1, …, B − 1; the last are kept, as each operation counts, but not in a CUDA graph."""
        kept: Tensor | None = vars(self).get("last")
        if kept is None or len(kept) != len(x):
            kept = torch.arange(len(x), device=x.device)
            if not capturing(x):
                vars(self)["last"] = kept
        return kept

    @classmethod
    @torch.no_grad()
    def build(cls, geometry: "ProbeGeometry") -> "Blind":
        """Of two classes or of few."""
        weight, bias, steering = (part.detach() for part in geometry.rows)
        n, sets, blocks = geometry.n_classes, geometry.sets, [0]
        pairs, unit = geometry.distances, geometry.sizes.unit
        status = torch.arange(len(Status), device=weight.device).unbind()
        failed = status[Status.INACCURATE]
        constants: tuple[Tensor, ...] = ()
        if sets is None:
            squared, length = pairs.squared.detach()[:1, 1:], pairs.length[:1, 1:]
            solvable = squared > pairs.noise[:1, 1:]
            inverse = torch.where(solvable, 1 / squared, 0.0)
            failed = torch.where(solvable, failed, status[Status.INFEASIBLE]).squeeze()
            roots = torch.cat([squared, pairs.stretch[:1, 1:]], 1).clamp_min(0).sqrt()
            unit = torch.stack([torch.ones_like(unit), unit])
            stretched = length * inverse * geometry.narrow[0]
            wrong = solvable * (torch.finfo(squared.dtype).eps + (squared * inverse - 1).abs())
            constants = length, stretched, roots * unit, wrong, squared
            # In row v + 3 t, v being −1 where it is the probe's own reading: sign of the target,
            # that / M, and what z_v − z_t is held between.
            free, held, top = [-torch.inf, torch.inf], [0.0, 0.0], [0.0, torch.inf]
            bounds = weight.new_tensor([held, free, top, free, held, top])
            sign = weight.new_tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0]).unsqueeze(1)
            own = paired = torch.cat([sign, sign * inverse, bounds], 1)
            sizes = [1, 1, 1, 1]
        else:
            assert geometry.gram is not None
            m, count = n - 1, len(sets.members)
            every = torch.arange(n, device=weight.device)
            other = other_classes(every, n, weight.device)
            spread = weight.new_zeros(n, n, m)
            spread[every, every] = sets.scale
            # λ times these: how margins grow, how x moves, and coefficients; of what it moves along
            # the last.
            towards = weight.new_zeros(n, m, n).scatter_(2, other.unsqueeze(-1), -1.0)
            towards[every, :, every] = 1.0
            along, blocks = [towards], [m, m, n]
            if geometry.low is not None:
                # Where classes are nearly equal, along the edges of a tree between them instead:
                # what crosses an edge does so in one direction, and no terms cancel.
                before, after = torch.tensor(nearest_neighbours(pairs.length)).unbind(-1)
                crossed = weight.new_zeros(n, m)
                for edge in range(m):
                    crossed[after[edge]] = crossed[before[edge]]
                    crossed[after[edge], edge] = 1.0
                along.append(crossed.unsqueeze(1) - crossed[other])
                blocks.append(m)
                steering, low = (part[after] - part[before] for part in (steering, geometry.low))
                steering = steering + low
            packed = torch.cat([geometry.gram[0].detach(), geometry.gram[1], *along], -1)
            packed[..., m : 2 * m] *= unit.square()
            length = pairs.length.gather(-1, other)
            moved = pairs.stretch.gather(-1, other).clamp_min(0).sqrt() * unit
            moved = moved * sets.scale.square()
            # How margins come from logits, and behind them z_v − z_t.
            margins = torch.nn.functional.pad(towards, (0, 0, 0, 1))
            none, root = weight.new_zeros(n, 1), 1 / sets.scale
            parts = none, none, sets.scale, root, length, moved, spread, sets.cap, packed, margins
            own = torch.cat([part.flatten(1) for part in parts], 1)
            sizes = [1, 1, m, m, m, m, n * m, count, m * sum(blocks), n * n]
            unit = torch.eye(n, dtype=own.dtype, device=own.device)
            paired = own.unsqueeze(1).repeat(1, n + 1, 1)
            paired[:, :n, 1] = -torch.inf
            paired[:, :n, -n:] = unit - unit.unsqueeze(1)
        columns = weight.mT.contiguous()
        kinds = DOUBLE_STEPS, FINE_STEPS, COARSE_STEPS
        trials = 1, len(FINE_STEPS), 1 + len(COARSE_STEPS)
        within = weight.new_full((trials[-1], 1, 1), TOLERANCE)
        within[0] *= 1 - 1e-6
        return cls(
            read={0: columns, **{count: columns.expand(count, -1, -1) for count in trials}},
            bias=bias,
            steering={count: steering.expand(count, -1, -1) for count in trials},
            within=within,
            own=own,
            paired=paired,
            sizes=sizes,
            blocks=blocks,
            sets=sets,
            constants=constants,
            steps=[
                weight.new_tensor((*first, *kind)).view(-1, 1, 1)
                for first in ((), (0.0,))
                for kind in kinds
            ],
            status=status,
            failed=failed,
            zero=weight.new_zeros(()),
        )


@torch.no_grad()
def solve(
    x: Tensor,
    target: Tensor,
    floor: Tensor | OddsRule,
    geometry: "ProbeGeometry",
    realise: Realise | None = None,
    *,
    repeats: bool = False,
    wrong: Tensor | None = None,
    total: bool = False,
) -> tuple[Solution, Ended | None]:
    """The least edits, read back, and where the solves ended.

    Args:
        x: activations, (B, d).
        target: t, (B,) int64, in range.
        floor: log α, (B,) or (B, K−1) float64, or a rule.
        geometry: probe and metric.
        realise: what the model will hold; default x' in x's dtype.
        repeats: whether where they ended is wanted, for a derivative.
        wrong: which are INVALID, whatever they are, bool, (B,) or ().
        total: whether odds are total odds.
    """
    kind = _Two if geometry.n_classes == 2 else _Total if total else _Several
    return kind(x, target, geometry, realise).solve(floor, repeats, wrong)


class _Two:
    """Two classes: one constraint, λ = g / M; coefficients and readings are their difference's."""

    def __init__(
        self, x: Tensor, target: Tensor, geometry: "ProbeGeometry", realise: Realise | None
    ) -> None:
        assert geometry.blind is not None
        self.of, self.x, self.target, self.geometry = geometry.blind, x, target, geometry
        self.realise, self.precision = realise, torch.finfo(x.dtype).eps
        self.share = advance(self.precision, x.shape[1])
        self.wide = x.double()
        # How far the stream rounds is known where it only rounds, or takes a base off and adds it:
        # the trials have room for one that is longer than x.
        self.plain = realise is None or (fused.places(realise) and realise.dtype == x.dtype)
        self.size = torch.linalg.vector_norm(self.wide, dim=-1, keepdim=True)
        # By how much it rounds, in units of the dtype's precision.
        self.rounded, self.rows = self.size, self.of.numbered(x)

    def held(self, edited: Tensor) -> tuple[Tensor, Tensor]:
        """Edited activations (R, B, d) in their dtype, and what will be held of them, float64."""
        narrow = edited.to(self.x.dtype)
        if self.realise is None:
            return narrow, narrow.double()
        if self.plain:
            return narrow, self.realise(narrow)
        return narrow, torch.stack([self.realise(one) for one in edited.unbind()])

    def seen(self, units: Tensor, length: Tensor, edited: Tensor) -> Tensor:
        """Units that are no less than how far the stream is seen to round."""
        missed = torch.linalg.vector_norm(self.held(edited)[1] - edited, dim=-1, keepdim=True)
        missed = torch.nan_to_num(missed.squeeze(0), nan=0.0, posinf=0.0)
        self.rounded = torch.maximum(self.size, 4 * missed / self.precision)
        return torch.maximum(units, missed * length / self.precision)

    def trials(self, gap: Tensor, units: Tensor) -> Tensor:
        """The gaps that are tried, (R, B, m)."""
        kind = 2 if self.precision >= FINE else int(self.x.dtype != torch.float64)
        steps = self.of.steps[kind + (3 if gap.ndim > 2 else 0)]
        return torch.addcmul(gap, units, steps, value=self.share)

    def solve(
        self, floor: Tensor | OddsRule, repeats: bool, wrong: Tensor | None
    ) -> tuple[Solution, Ended | None]:
        """See :func:`solve`."""
        of, wide = self.of, self.wide
        length, stretched, roots, rounding, squared = of.constants
        rule = floor if isinstance(floor, OddsRule) and floor.mirror else None
        if rule is not None and rule.source is not None:
            index = torch.add(rule.source, self.target, alpha=3)
        else:
            index = 3 * self.target - 1
        sign, inverse, *between = of.own[index].split(of.sizes, -1)
        before = sign * torch.addmm(of.bias, wide, of.read[0])
        if rule is not None:
            floors = torch.maximum(torch.clamp(-before, *between), rule.log_odds)
        else:
            floors = _given(floor, before)
        missing, valid, needed = _missing(floors - before, wrong)

        units = torch.addcmul(missing, self.size, length)
        gap = torch.add(missing, units, alpha=self.share)
        units = torch.addcmul(units, missing, stretched)
        if not self.plain:
            edited = torch.addcmul(wide, inverse * gap, of.steering[1])
            units = self.seen(units, length, edited)
        found = inverse * self.trials(gap, units)
        narrow, held = self.held(torch.addcmul(wide, found, of.steering[1]))
        after = sign * torch.baddbmm(of.bias, held, of.read[len(held)])
        reached, first = (_finite(after) >= floors).max(0)
        first = first.squeeze(-1)

        multipliers = torch.where(needed, sign * found[first, self.rows], of.zero)
        active = multipliers > 0
        after = torch.where(active, after[first, self.rows], before)
        columns = [(multipliers * roots).square(), active * rounding, before, after, floors]
        distance, moved, residual, before, after, floors = torch.cat(columns, -1).unbind(-1)
        status = torch.where(reached, of.status[Status.SOLVED], of.failed)
        status = torch.where(needed, status, of.status[Status.SATISFIED])
        status = torch.where(valid, status, of.status[Status.INVALID])
        solution = Solution(
            x_new=torch.where(active, narrow[first, self.rows], self.x),
            multipliers=multipliers,
            active=active,
            squared_distance=distance,
            squared_euclidean=moved,
            floor=floor if isinstance(floor, Tensor) else floors,
            log_odds_before=before,
            log_odds_after=after,
            kkt_residual=residual,
            status=status.squeeze(-1),
        )
        if not repeats:
            return solution, None
        aims = before.unsqueeze(-1) + multipliers * squared
        return solution, Ended(None, active, multipliers.unsqueeze(-1), aims)


class _Several(_Two):
    """Few classes: all active sets of a target are tried together."""

    def solve(
        self, floor: Tensor | OddsRule, repeats: bool, wrong: Tensor | None
    ) -> tuple[Solution, Ended | None]:
        """See :func:`solve`."""
        of, wide = self.of, self.wide
        assert of.sets is not None
        batch, n, self.sets = len(wide), len(of.bias), of.sets
        m = n - 1
        rule = floor if isinstance(floor, OddsRule) and floor.mirror else None
        if rule is not None and rule.source is not None:
            own = of.paired[self.target, rule.source]
        else:
            own = of.own.index_select(0, self.target)
        none, reads, scale, root, length, reach, spread, self.cap, packed, towards = own.split(
            of.sizes, -1
        )
        self.packed = packed.view(batch, m, -1)
        logits = torch.addmm(of.bias, wide, of.read[0])
        margins = torch.bmm(towards.view(batch, n, n), logits.unsqueeze(-1)).squeeze(-1)
        margins, belief = margins.split([m, 1], -1)
        before = margins.amin(-1, keepdim=True)
        if rule is not None:
            floors = torch.maximum(torch.maximum(belief, reads - before), rule.log_odds)
        else:
            floors = _given(floor, before)
        missing = floors - margins
        behind = missing.amax(-1, keepdim=True)
        if floors.shape[-1] > 1:
            # Of one floor, or of the logits, infinity or NaN is in all that is missing.
            behind = behind + 0.0 * missing.sum(-1, keepdim=True)
        _, valid, needed = _missing(behind, wrong)

        rise = missing.clamp_min(0.0)
        units = torch.addcmul(rise, length, self.size)
        gap = torch.add(missing, units, alpha=self.share)
        # About as long as x' is: x, and an edit for what is missing most.
        units = torch.addcmul(units, length, (rise * reach).amax(-1, keepdim=True))
        largest = (gap * scale).amax(-1, keepdim=True)
        self.spread, unit = spread / largest, largest * root
        if not self.plain:
            units = self.seen(units, length, self.attempt(gap.unsqueeze(0))[0])
        # Where all aims are out of reach, the floors themselves may not be.
        gaps = self.trials(torch.stack([missing, *[gap] * len(COARSE_STEPS)]), units)
        edited, found, chosen, towards = self.attempt(gaps)
        narrow, held = self.held(edited)
        after = torch.baddbmm(of.bias, held, of.read[len(held)])
        after = torch.bmm(after.view(-1, 1, n), towards.mT)
        # What the dtype cannot hold reads infinity, and so does its residual.
        reached = (after.view(gaps.shape) >= floors).all(-1, keepdim=True)
        within, first = (reached * of.within).max(0)
        first = first.squeeze(-1)

        every = torch.cat([*found, after], -1).view(len(gaps), batch, -1)[first, self.rows]
        gap, multipliers, grown, moved, *_, after = every.split([m, m, *of.blocks, m], -1)
        multipliers = torch.where(needed, multipliers, of.zero)
        active = multipliers > 0
        edit = active.any(-1, keepdim=True)
        behind = gap - grown
        terms = torch.stack([grown, moved, behind, after - floors, missing, length, root], 1)
        products = (terms * multipliers.unsqueeze(1)).sum(-1)
        distance, moved, *_, total = products.split(1, -1)
        _, _, unbalanced, surplus, least, bound, rounds = (products / distance).split(1, -1)
        # As in `solution.kkt_residual`: what is short relative to the largest gap and its own, and
        # what Mλ rounds by taken off.
        behind = torch.addcmul(behind, total, root, value=-ROUNDING)
        short = behind / torch.hypot(gap, unit)
        unbalanced = torch.addcmul(unbalanced.abs(), total, rounds, value=-ROUNDING)
        # And as in `reach.excess`.
        base = self.realise.base if self.realise and fused.places(self.realise) else None
        if self.plain and base is not None:
            self.rounded = self.size + sizes(base)
        least = torch.minimum(least, 1 - surplus)
        long = torch.addcmul(self.rounded, least.clamp_min(0.0), moved.sqrt())
        longer = torch.addcmul(1 - LONGER - least, bound, long, value=-ROOM * self.precision)
        residual = torch.cat([none, short, unbalanced, longer], -1).amax(-1, keepdim=True)
        residual = torch.where(edit, residual, of.zero)
        status = torch.where(residual < within, of.status[Status.SOLVED], of.failed)
        status = torch.where(edit, status, of.status[Status.INFEASIBLE])
        status = torch.where(needed, status, of.status[Status.SATISFIED])
        status = torch.where(valid, status, of.status[Status.INVALID])
        after = torch.where(edit, after.amin(-1, keepdim=True), before)
        columns = [distance, moved, residual, before, after, floors]
        distance, moved, residual, before, after, *asked = torch.cat(columns, -1).unbind(-1)
        solution = Solution(
            x_new=torch.where(edit, narrow[first, self.rows], self.x),
            multipliers=multipliers,
            active=active,
            squared_distance=distance,
            squared_euclidean=moved,
            floor=floor if isinstance(floor, Tensor) else asked[0],
            log_odds_before=before,
            log_odds_after=after,
            kkt_residual=residual,
            status=status.squeeze(-1),
        )
        if not repeats:
            return solution, None
        inverse = self.sets.inverses[self.target, chosen[first, self.rows]]
        inverse = torch.where(edit.unsqueeze(-1), inverse, of.zero)
        bound = inverse.diagonal(dim1=-2, dim2=-1) > 0
        return solution, Ended(None, bound, inverse, margins + gap)

    def attempt(self, gaps: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
        """Solve for gaps (R, B, m).

        Returns:
            x', (R, B, d); gaps, λ, and what λ comes to, each (R B, 1, …); which set each has,
            (R, B); how margins come from logits, (R B, m, K).
        """
        of, (trials, batch, m), n = self.of, gaps.shape, len(self.of.bias)
        packed = self.packed if trials == 1 else self.packed.repeat(trials, 1, 1)
        gram, _, towards, *_ = packed.split(of.blocks, -1)
        spread = (gaps.repeat(1, 1, n) * self.spread).view(trials * batch, -1)
        chosen = self.sets.choose(spread, self.cap)
        inverse = self.sets.inverses[self.target, chosen].view(-1, m, m)
        right = gaps.view(-1, 1, m)
        found = torch.bmm(right, inverse)
        left = torch.baddbmm(right, found, gram, alpha=-1)
        found = torch.baddbmm(found, left, inverse).clamp_min(0.0)
        grown = torch.bmm(found, packed)
        coefficients = grown[..., -of.blocks[-1] :].view(trials, batch, -1)
        edited = torch.baddbmm(self.wide, coefficients, of.steering[trials])
        return edited, (right, found, grown), chosen, towards


class _Total(_Two):
    """Total odds of few classes, by the steps of :mod:`~.total_odds`, all trials together."""

    def solve(
        self, floor: Tensor | OddsRule, repeats: bool, wrong: Tensor | None
    ) -> tuple[Solution, Ended | None]:
        """See :func:`solve`."""
        of, wide, geometry = self.of, self.wide, self.geometry
        constraints = geometry.constraints(self.target)
        length = constraints.length.amax(-1, keepdim=True)
        margins = geometry.margins(wide, self.target)
        before = total_log_odds(margins).unsqueeze(-1)
        floors = _given(floor(margins) if isinstance(floor, OddsRule) else floor, before)
        missing, valid, needed = _missing(floors - before, wrong)
        units = torch.addcmul(missing, self.size, length)
        gap = torch.add(missing, units, alpha=self.share)
        if not self.plain:
            units = self.seen(units, length, self.attempt(gap.unsqueeze(0), before, needed)[0])
        gaps = self.trials(torch.stack([missing, *[gap] * len(COARSE_STEPS)]), units)
        edited, found, residual, feasible = self.attempt(gaps, before, needed)
        narrow, held = self.held(edited)
        trials, batch = gaps.shape[:2]
        after = geometry.margins(held.flatten(0, 1), self.target.repeat(trials))
        after = total_log_odds(after).view(trials, batch, 1)
        reached, first = ((_finite(after) >= floors) * of.within).max(0)
        at = first.squeeze(-1), self.rows
        edit = needed & feasible[at].unsqueeze(-1)
        found, after, edited = found[at], after[at], edited[at]
        squared = (found * constraints.apply(found)).sum(-1)
        weight, headroom = found.sum(-1), Headroom(self.precision, length, self.size, wide.shape[1])
        aims = before + gaps[at]
        over = torch.maximum(after, aims) - floors
        gap = torch.where(edit & (reached > 0), over, 0.0).squeeze(-1) * weight
        reach = (found * constraints.length).sum(-1)
        held = held[at]
        longer = excess(gap, reach, squared, headroom, wide, edited, lambda _: held)
        residual = torch.where(edit.squeeze(-1), torch.maximum(residual[at], longer), 0.0)
        accurate = (reached.squeeze(-1) > 0) & (residual <= TOTAL_TOLERANCE)
        parts = edit & (found > 0)
        solution = Solution(
            x_new=torch.where(edit, narrow[at], self.x),
            multipliers=torch.where(edit, found, of.zero),
            active=parts,
            squared_distance=torch.where(edit.squeeze(-1), squared, of.zero),
            squared_euclidean=torch.where(edit, (edited - wide), of.zero).square().sum(-1),
            floor=floor if isinstance(floor, Tensor) else floors.squeeze(-1),
            log_odds_before=before.squeeze(-1),
            log_odds_after=torch.where(edit, after, before).squeeze(-1),
            kkt_residual=residual,
            status=statuses(
                (feasible[at].unsqueeze(-1) | ~needed).squeeze(-1),
                edit.squeeze(-1),
                accurate,
                valid.squeeze(-1),
            ),
        )
        return solution, Ended(None, parts, found, aims.expand_as(found)) if repeats else None

    def attempt(self, gaps: Tensor, before: Tensor, needed: Tensor) -> tuple[Tensor, ...]:
        """Solve for gaps (R, B, 1): x', (R, B, d); λ, residual and whether it is in reach."""
        trials, batch, _ = gaps.shape
        geometry, target = self.geometry, self.target.repeat(trials)
        constraints = geometry.constraints(target)
        aims = (before + gaps).view(-1)
        asked = needed.squeeze(-1).repeat(trials)
        margins = geometry.margins(self.wide, self.target).repeat(trials, 1)
        assert geometry.sets is not None and geometry.lent_sets is not None
        gram, noise = constraints.gram, constraints.noise
        start, wanted, room = without_constants(gram, margins, aims, noise)
        question = torch.where(asked & room, wanted, -torch.inf)
        tables = geometry.sets, geometry.lent_sets, target
        found = solve_total(gram, start, question, noise, tables)
        feasible = (room | ~asked) & found.feasible
        multipliers = torch.where((asked & feasible).unsqueeze(-1), found.multipliers, 0.0)
        residual = total_residual(gram, start, wanted, multipliers)
        moved = constraints.moved(multipliers)
        edited = geometry.displace(self.wide.repeat(trials, 1), target, multipliers, moved)
        parts = edited, multipliers, residual, feasible
        return tuple(part.view(trials, batch, *part.shape[1:]) for part in parts)


def _given(floor: Tensor | OddsRule, like: Tensor) -> Tensor:
    """Log α as it is given, (B, 1) or (B, m)."""
    if isinstance(floor, OddsRule):
        return floor.log_odds.expand_as(like)
    return floor if floor.ndim == 2 else floor.unsqueeze(-1)


def _finite(after: Tensor) -> Tensor:
    """Readings, of which those of what the dtype cannot hold reach no floor."""
    return torch.nan_to_num(after, nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def _missing(missing: Tensor, wrong: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What is missing, (B, 1), whether that is a number, and whether there is to be an edit."""
    if wrong is not None:
        missing = missing.masked_fill(wrong.unsqueeze(-1) if wrong.ndim else wrong, torch.nan)
    finite = torch.nan_to_num(missing, nan=-1.0, posinf=-1.0, neginf=-1.0)
    return finite, finite == missing, finite > 0
