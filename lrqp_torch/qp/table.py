"""Every active set of a few small dual problems, worked out beforehand and then looked up.

With m constraints there are 2^m active sets. For each set S the principal transform P_S maps the
gaps g to λ_i for i in S and to the slack (Mλ − g)_i for the others, so the KKT conditions are
P_S g ≥ 0, and one matrix product tries all sets for a whole batch. No step depends on a value
that the host must wait for, so the solve can be captured in a CUDA graph or compiled.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.qp.active_set import DualSolution
from lrqp_torch.qp.pivots import DEPENDENT, SATISFIED, rounding
from lrqp_torch.qp.solution import unit_scale

# The least violation over all sets is of the order of the gaps where a problem is infeasible, and
# rounding where it is not.
FITS = 1e-7
# A constraint without length does not depend on the activation. It is measured so much finer than
# the others that any gap of it is too large.
EMPTY = 1e12
# A batch is tried in parts of this many numbers; buffers above 32 MB are slow on the CPU, where
# the allocator returns them to the system each time.
CHUNK_NUMBERS = 2_000_000


@dataclass(frozen=True)
class ActiveSets:
    """The S = 2^m active sets of C problems of m constraints each, smaller ones first, and one more
    that is chosen where there is no solution.
    """

    members: Tensor  # which constraints each set holds, (S + 1, m) bool
    table: Tensor  # P_S transposed, for constraints of unit length, (C m, (S + 1) m)
    inverses: Tensor  # M_SS⁻¹ padded with zeros, (C, S + 1, m, m)
    cap: Tensor  # what least slack counts as none missing; −∞: linearly dependent, (C, S + 1)
    scale: Tensor  # 1/√M_ii, or EMPTY times the largest for a constraint without length, (C, m)

    @classmethod
    @torch.no_grad()
    def build(cls, gram: Tensor, noise: Tensor) -> "ActiveSets":
        """Work out the sets by principal pivots: those with constraint q from those without.

        Args:
            gram: M of each problem, (C, m, m).
            noise: rounding error of its diagonal, (C, m).
        """
        n_problems, m = noise.shape
        scale = unit_scale(gram.detach().diagonal(dim1=-2, dim2=-1), noise.detach())
        # Problems last: (m, m, sets, C).
        unit = gram.detach() * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        tableau = unit = unit.permute(1, 2, 0).unsqueeze(2)
        error = torch.stack([scale, scale * noise.detach()]).mT.unsqueeze(2)
        dependent = torch.zeros(1, n_problems, dtype=torch.bool, device=gram.device)
        members = torch.zeros(1, m, dtype=torch.bool, device=gram.device)
        for q in range(m):
            own = _checked(tableau, unit, error, members.mT.unsqueeze(-1), q)
            without = dependent | (own[q, q] <= DEPENDENT)
            dependent = torch.cat([dependent, without])
            tableau = torch.cat([tableau, torch.where(without, 0.0, _principal_pivot(own, q))], 2)
            alone = torch.arange(m, device=gram.device) == q
            members = torch.cat([members, members | alone])
        order = members.sum(-1).argsort(stable=True)
        members, dependent = members[order], dependent[order].T
        tableau = tableau[:, :, order].permute(3, 2, 0, 1)

        rows, columns = members.unsqueeze(-1), members.unsqueeze(-2)
        outside = torch.where(rows, 0.0, -torch.eye(m, dtype=gram.dtype, device=gram.device))
        transforms = torch.where(columns, torch.where(rows, -tableau, tableau), outside)
        inverses = torch.where(rows & columns, -tableau, 0.0)
        inverses = inverses * scale[:, None, :, None] * scale[:, None, None, :]
        longest = scale.amax(-1, keepdim=True)
        longest = EMPTY * torch.where(longest > 0, longest, 1.0)
        cap = torch.where(dependent, -torch.inf, -SATISFIED)
        pad = torch.nn.functional.pad
        return cls(
            members=pad(members, (0, 0, 0, 1)),
            table=pad(transforms.permute(0, 3, 1, 2).reshape(n_problems * m, -1), (0, m)),
            inverses=pad(inverses, (0, 0, 0, 0, 0, 1)),
            cap=pad(cap, (0, 1), value=-FITS),
            scale=torch.where(scale > 0, scale, longest),
        )

    def choose(self, spread: Tensor, cap: Tensor) -> Tensor:
        """The set that violates the KKT conditions least, the smallest of equals, (...).

        Args:
            spread: gaps in units, of which the largest is 1, in the columns of each example's own
                problem, zero in others', so that one product tries all sets of all, (N, C m).
            cap: of each example's problem, (..., S + 1), of N altogether or less.
        """
        m = self.members.shape[-1]
        fits = torch.mm(spread, self.table).view(-1, *cap.shape, m)
        chosen: Tensor = torch.minimum(fits.amin(-1), cap).max(-1).indices
        return chosen

    @torch.no_grad()
    def solve(self, case: Tensor, gap: Tensor) -> DualSolution:
        """The active sets of a batch.

        Args:
            case: which of the C problems each example is, (B,).
            gap: g, (B, m).
        """
        unit = gap * self.scale[case]
        largest = unit.amax(-1, keepdim=True)
        unit = torch.where(largest > 0, unit / largest, -1.0)
        chunk = max(1, CHUNK_NUMBERS // self.table.shape[1])
        problems = torch.arange(len(self.cap), device=case.device)
        parts = []
        for start in range(0, max(1, len(gap)), chunk):
            at = slice(start, start + chunk)
            own = (case[at].unsqueeze(-1) == problems).unsqueeze(-1)
            spread = torch.where(own, unit[at].unsqueeze(1), 0.0).flatten(1)
            parts.append(self.choose(spread, self.cap[case[at]]).squeeze(0))
        chosen = parts[0] if len(parts) == 1 else torch.cat(parts)
        feasible = chosen < len(self.members) - 1
        held, inverse = self.members[chosen], self.inverses[case, chosen]
        return DualSolution(None, held, inverse, feasible, torch.ones_like(feasible))


def _checked(tableau: Tensor, unit: Tensor, error: Tensor, members: Tensor, q: int) -> Tensor:
    """The tableaus, (m, m, sets, C), with their column q free of what pivots left of rounding.

    Args:
        tableau: of the sets so far.
        unit: M, (m, m, 1, C).
        error: scale of each constraint and that times the error of M_ii, (2, m, 1, C).
        members: of the sets so far, (m, sets, 1) bool.
        q: the constraint that joins next.
    """

    def times(matrix: Tensor, vector: Tensor) -> Tensor:
        return torch.where(members, (matrix * vector.unsqueeze(0)).sum(1), 0.0)

    column = torch.where(members, unit[:, q], 0.0)
    rate = torch.where(members, tableau[:, q], 0.0)
    for _ in range(2):
        rate = rate - times(tableau, column - times(unit, rate))
    # ‖a_q − Σ r_i a_i‖² is exact to the second order in what is still wrong with r.
    exact = unit[q, q] + (rate * (times(unit, rate) - 2 * column)).sum(0)
    joined = torch.cat([rate[:q], torch.ones_like(rate[q : q + 1]), rate[q + 1 :]])
    exact = torch.where(exact > rounding(joined.abs(), *error), exact, 0.0)
    result, own = tableau.clone(), torch.where(members, rate, tableau[:, q])
    own[q] = exact
    result[:, q] = result[q] = own
    return result


def _principal_pivot(tableau: Tensor, q: int) -> Tensor:
    """Let constraint q join the active set in every tableau, (m, m, …).

    With d = T_qq: T_ij ← T_ij − T_iq T_qj / d, T_iq ← T_iq / d, T_qq ← −1 / d.
    """
    diagonal = tableau[q, q]
    scaled = tableau[:, q] / diagonal
    updated = tableau - tableau[:, q].unsqueeze(1) * scaled.unsqueeze(0)
    updated[q], updated[:, q] = scaled, scaled
    updated[q, q] = -1 / diagonal
    return updated
