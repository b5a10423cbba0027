"""Constraints by their normals, where M = A Σ Aᵀ of many classes would be larger than A itself."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lrqp_torch.qp.active_set import solve_dual
from lrqp_torch.qp.constraints import (
    GRAM_NUMBERS,
    DenseConstraints,
    MetricSizes,
    class_grams,
    class_normals,
    occurring,
    other_classes,
)
from lrqp_torch.qp.solution import unit_scale

# So many constraints are looked at at first, and so often are others taken in; one counts as met
# within this share of the largest gap, and Mλ of unit constraints rounds by that of Σλ.
FEW, EXCHANGES, MET, PRECISION = 128, 50, 1e-9, 1e-12


@dataclass(frozen=True)
class Normals:
    """M = A (AΣ)ᵀ of each example; products with it cost m d, and a system in it d³ + m d²."""

    rows: Tensor  # A, (B, m, d)
    along: Tensor  # AΣ, (B, m, d)

    @cached_property
    def diagonal(self) -> Tensor:
        """Of M, (B, m)."""
        return torch.einsum("bmd,bmd->bm", self.rows, self.along)

    def times(self, vector: Tensor) -> Tensor:
        """M v, (B, m)."""
        return (self.rows @ (self.along.mT @ vector.unsqueeze(-1))).squeeze(-1)

    def block(self, index: Tensor) -> Tensor:
        """M between some constraints of each example, (B, n) → (B, n, n)."""
        place = index.unsqueeze(-1).expand(-1, -1, self.rows.shape[-1])
        products = self.rows.gather(1, place) @ self.along.gather(1, place).mT
        return (products + products.mT) / 2

    def inner(self, share: Tensor, weight: Tensor, *right: Tensor) -> tuple[Tensor, ...]:
        """(I + μ H M)⁻¹ r for each r, H = diag p − p pᵀ, by a system of d equations (Woodbury).

        H A = diag p (A − pᵀA), in differences to the normal of the largest share: no digits cancel
        where it comes near 1.
        """
        most = share.argmax(-1)[:, None, None].expand(-1, 1, self.rows.shape[-1])
        pulled, rises = (self._centred(part, most, share) for part in (self.rows, self.along))
        identity = torch.eye(self.rows.shape[-1], dtype=share.dtype, device=share.device)
        scaled = weight[:, None, None] * share.unsqueeze(-1)
        columns = torch.stack(right, -1)
        system = identity + (scaled * rises).mT @ pulled
        solved, _ = torch.linalg.solve_ex(system, self.along.mT @ columns)
        return tuple((columns - scaled * (pulled @ solved)).unbind(-1))

    def where(self, mine: Tensor) -> "Normals":
        """The same where ``mine``, (B,) bool, and elsewhere M with a 1 in its corner alone."""
        corner = torch.zeros_like(self.rows[0])
        corner[0, 0] = 1.0
        mine = mine[:, None, None]
        return Normals(*(torch.where(mine, part, corner) for part in (self.rows, self.along)))

    def __getitem__(self, rows: Tensor) -> "Normals":
        return Normals(self.rows[rows], self.along[rows])

    def __truediv__(self, scale: Tensor) -> "Normals":
        return Normals(self.rows, self.along / scale)

    def detach(self) -> "Normals":
        """Not differentiable."""
        return Normals(self.rows.detach(), self.along.detach())

    def numel(self) -> int:
        """How many numbers it holds."""
        return self.rows.numel() + self.along.numel()

    @staticmethod
    def _centred(part: Tensor, most: Tensor, share: Tensor) -> Tensor:
        apart = part - part.gather(1, most)
        return apart - share.unsqueeze(-2) @ apart


@dataclass(frozen=True)
class NormalConstraints:
    """Those of a probe of many classes, of single targets; see :class:`~.constraints.Constraints`.

    M is held as it is where it is smaller than the normals, else as these.
    """

    probe: tuple[Tensor, Tensor]  # W and WΣ, (K, d), up to one row that all share
    target: Tensor  # t, (B,)
    diagonal: Tensor
    noise: Tensor
    length: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, weight: Tensor, steering: Tensor, sizes: MetricSizes, target: Tensor
    ) -> "NormalConstraints":
        """For targets (B,)."""
        targets, which = occurring(target)
        terms, parts = sizes.norm(steering), []
        for some in targets.split(max(1, GRAM_NUMBERS // weight.numel())):
            normals = Normals(*class_normals(some, weight, steering))
            length = torch.linalg.vector_norm(normals.rows, dim=-1)
            others = terms[other_classes(some, len(weight), target.device)]
            noise = sizes.rounding(length, terms[some].unsqueeze(-1) + others)
            parts.append((normals.diagonal, noise, length))
        each = (torch.cat(part)[which] for part in zip(*parts, strict=True))
        return cls((weight, steering), target, *each)

    @property
    def gram(self) -> "Tensor | Normals":
        """M, (B, m, m) or by its normals; differentiable."""
        if self.length.shape[-1] > self.probe[0].shape[-1]:
            return Normals(*class_normals(self.target, *self.probe))
        targets, which = occurring(self.target)
        first = torch.zeros_like(targets).scatter_(0, which, torch.arange(len(which)).to(which))
        return class_grams(targets, *self.probe, self.length[first]).index_select(0, which)

    @torch.no_grad()
    def moved(self, multipliers: Tensor) -> Tensor:
        """‖ΣAᵀλ‖², (B,)."""
        _, along = class_normals(self.target, *self.probe)
        return (along.mT @ multipliers.unsqueeze(-1)).square().sum((-2, -1))

    def rows(self, rows: Tensor) -> "NormalConstraints":
        """Those of some of the examples, (n,) integer."""
        each = (part[rows] for part in (self.target, self.diagonal, self.noise, self.length))
        return NormalConstraints(self.probe, *each)


@torch.no_grad()
def solve_by_few(
    normals: Normals, noise: Tensor, gap: Tensor, lent: float
) -> tuple[Tensor, Tensor]:
    """The dual min ½ λᵀMλ − gᵀλ over λ ≥ 0, and whether it is bounded, by those that matter.

    Few constraints are solved for at a time: those that bind, and of the others those that are
    violated most, until none is. What proves some of them out of reach proves it of all.

    Args:
        normals: of M.
        noise: rounding error of its diagonal, (B, m).
        gap: g, (B, m).
        lent: the share of its diagonal that M has beside it.

    Returns:
        λ, (B, m); feasible, (B,) bool.
    """
    extra = lent * normals.diagonal
    scale = unit_scale(normals.diagonal, noise)
    wanted = torch.where(scale > 0, gap * scale, torch.where(gap > 0, torch.inf, -torch.inf))
    enough, root = MET * wanted.amax(-1).clamp_min(0.0), normals.diagonal.clamp_min(0.0).sqrt()
    few, found = min(FEW, gap.shape[-1]), torch.zeros_like(gap)
    for _ in range(EXCHANGES):
        index = wanted.topk(few).indices
        own, right = noise.gather(-1, index), gap.gather(-1, index)
        block = normals.block(index) + extra.gather(-1, index).diag_embed()
        constraints = DenseConstraints(block, own, own)
        solved = solve_dual(constraints, right)
        part = solved.multipliers(constraints, right)
        found = torch.zeros_like(gap).scatter(-1, index, part)
        wanted = (gap - normals.times(found) - extra * found) * scale
        wanted = wanted.scatter(-1, index, -torch.inf)
        # What Mλ rounds by is not asked for.
        behind = wanted.amax(-1) > enough + PRECISION * (found * root).sum(-1)
        if not bool((behind & solved.feasible).any()):
            break
        if 2 * int((part > 0).sum(-1).max()) > few:
            few = min(2 * few, gap.shape[-1])
        wanted = torch.where(found > 0, torch.inf, wanted)
    return found, solved.feasible
