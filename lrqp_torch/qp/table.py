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
from lrqp_torch.qp.pivots import DEPENDENT, SATISFIED, unit_gap
from lrqp_torch.qp.solution import unit_scale

# The least violation over all sets is of the order of the gaps where a problem is infeasible, and
# rounding where it is not.
FITS = 1e-7
# A batch is tried in parts of this many numbers; buffers above 32 MB are slow on the CPU, where
# the allocator returns them to the system each time.
CHUNK_NUMBERS = 2_000_000


@dataclass(frozen=True)
class ActiveSets:
    """The active sets of C problems of m constraints each."""

    members: Tensor  # which constraints each set holds, smaller sets first, (2^m, m) bool
    transforms: Tensor  # P_S transposed, for constraints of unit length, (C, m, 2^m, m)
    inverses: Tensor  # M_SS⁻¹ padded with zeros, (C, 2^m, m, m)
    dependent: Tensor  # sets whose constraints are linearly dependent, (C, 2^m) bool
    scale: Tensor  # 1/√M_ii, or 0 for a constraint without length, (C, m)

    @classmethod
    @torch.no_grad()
    def build(cls, gram: Tensor, noise: Tensor) -> "ActiveSets":
        """Work out the sets by principal pivots: those with constraint q from those without.

        Args:
            gram: M of each problem, (C, m, m).
            noise: rounding error of its diagonal, (C, m).
        """
        n_problems, m = noise.shape
        gram = gram.detach()
        scale = unit_scale(gram.diagonal(dim1=-2, dim2=-1), noise.detach())
        # Problems last: (m, m, sets, C).
        tableau = (gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)).permute(1, 2, 0).unsqueeze(2)
        dependent = torch.zeros(1, n_problems, dtype=torch.bool, device=gram.device)
        members = torch.zeros(1, m, dtype=torch.bool, device=gram.device)
        for q in range(m):
            joined = torch.where(
                dependent | (tableau[q, q] <= DEPENDENT), 0.0, _principal_pivot(tableau, q)
            )
            dependent = torch.cat([dependent, dependent | (tableau[q, q] <= DEPENDENT)])
            tableau = torch.cat([tableau, joined], 2)
            alone = torch.arange(m, device=gram.device) == q
            members = torch.cat([members, members | alone])
        order = members.sum(-1).argsort(stable=True)
        members, dependent = members[order], dependent[order].T
        tableau = tableau[:, :, order].permute(3, 2, 0, 1)

        rows, columns = members.unsqueeze(-1), members.unsqueeze(-2)
        outside = torch.where(rows, 0.0, -torch.eye(m, dtype=gram.dtype, device=gram.device))
        transforms = torch.where(columns, torch.where(rows, -tableau, tableau), outside)
        inverses = torch.where(rows & columns, -tableau, 0.0)
        return cls(
            members=members,
            transforms=transforms.permute(0, 3, 1, 2).contiguous(),
            inverses=inverses * scale[:, None, :, None] * scale[:, None, None, :],
            dependent=dependent,
            scale=scale,
        )

    @torch.no_grad()
    def solve(self, case: Tensor, gap: Tensor) -> DualSolution:
        """Pick the set that violates the KKT conditions least, the smallest of equals.

        Args:
            case: which of the C problems each example is, (B,).
            gap: g, (B, m).
        """
        scale = self.scale[case]
        unit, impossible = unit_gap(gap, scale)
        unit = torch.where(torch.isinf(unit), -1.0, unit)
        _, m, n_sets, _ = self.transforms.shape
        chunk = max(1, CHUNK_NUMBERS // (n_sets * m))
        parts = [
            self._try(case[start : start + chunk], unit[start : start + chunk])
            for start in range(0, max(1, len(gap)), chunk)
        ]
        violation = parts[0] if len(parts) == 1 else torch.cat(parts)
        violation = violation.clamp_min(SATISFIED)
        least, chosen = torch.where(self.dependent[case], torch.inf, violation).min(-1)
        feasible = (least <= FITS) & ~impossible
        held = self.members[chosen] & feasible.unsqueeze(-1)
        inverse = torch.where(feasible[:, None, None], self.inverses[case, chosen], 0.0)
        return DualSolution(None, held, inverse, feasible, torch.ones_like(feasible))

    def _try(self, case: Tensor, unit: Tensor) -> Tensor:
        """How much each set violates the KKT conditions, (B, 2^m), relative to 1 + its own gap."""
        n_problems, m, n_sets, _ = self.transforms.shape
        # Gaps in the columns of their own problem, zero in others': one product for all problems.
        own = case.unsqueeze(-1) == torch.arange(n_problems, device=case.device)
        spread = torch.where(own.unsqueeze(-1), unit.unsqueeze(1), 0.0).flatten(1)
        values = spread @ self.transforms.reshape(n_problems * m, n_sets * m)
        least: Tensor = (values.unflatten(-1, (n_sets, m)) / (1 + unit.abs()).unsqueeze(1)).amin(-1)
        return -least


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
