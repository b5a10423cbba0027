"""Large batches of float32 activations on the CPU, edited in float32 with a proven promise.

Everything else displaces activations in float64 and reads the result back. For a thousand
activations of width 768 that is several passes over 6 MB, several times what the edit costs. Here
margins are still read in float64, but x' = x + c P is one float32 product, and that its rounding
leaves the floor reached is proven instead of read: with u = 2⁻²⁴, γ_n = n u / (1 − n u) and p_k the
rows of P, in whatever order it sums (Higham 2002, Accuracy and Stability, §3.1),

    ‖fl(x + c P) − (x + c P)‖ ≤ γ_{K+2} (‖x‖ + Σ_k |c_k| ‖p_k‖).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.qp.geometry import ProbeGeometry, other_classes
from lrqp_torch.qp.implicit import matvec
from lrqp_torch.qp.projection import is_large
from lrqp_torch.qp.solution import Solution, kkt_residual, statuses
from lrqp_torch.qp.solvers import solve_gram

# Rounds of solving until the bound is met; one does it, except for edits far longer than x.
ROUNDS = 4
UNIT = 2.0**-24
# Terms added to the bound, each of u, for the rounding of the float64 part: more than enough.
SPARE = 2


@dataclass(frozen=True)
class SinglePulls:
    """Directions of edits in float32, relative to the last class: their coefficients sum to zero.

    Attributes:
        pulled: p_k = Σ (w_k − w_K) for the classes but the last, (K−1, d), float32.
        length: ‖p_k‖, (K−1,), float64.
        stretch: (‖p_t‖ + ‖p_ℓ‖) / M_ℓℓ for every target, (K, K−1): how long the directions are that
            one nat takes.
        rate: γ_{K+2}.
        pair: for two classes γ ‖a‖ and 1 / (M − γ ‖a‖ ‖p‖), unless that is no positive number.
    """

    pulled: Tensor
    length: Tensor
    stretch: Tensor
    rate: float
    pair: tuple[float, float] | None

    @classmethod
    def of(cls, geometry: ProbeGeometry) -> "SinglePulls":
        """Those of a geometry."""
        pulled = (geometry.steering[:-1] - geometry.steering[-1]).detach()
        length = pulled.norm(dim=-1)
        terms = (geometry.n_classes + 2 + SPARE) * UNIT
        rate, pair = terms / (1 - terms), None
        if geometry.n_classes == 2:
            lost = rate * float(geometry.length[0, 0])
            left = float(geometry.gram[0, 0, 0]) - lost * float(length[0])
            pair = (lost, 1 / left) if left > float(geometry.noise[0, 0]) else None
        every = torch.arange(geometry.n_classes, device=pulled.device)
        other = other_classes(every, geometry.n_classes, pulled.device)
        lengths = torch.cat([length, length.new_zeros(1)])
        diagonal = geometry.gram.detach().diagonal(dim1=-2, dim2=-1)
        stretch = torch.where(
            diagonal > geometry.noise, (lengths.unsqueeze(-1) + lengths[other]) / diagonal, 0.0
        )
        return cls(pulled.float(), length, stretch, rate, pair)

    def coefficients(self, target: Tensor, multipliers: Tensor) -> Tensor:
        """What ΣAᵀλ = c P takes: c_t = Σλ and c_ℓ = −λ_ℓ without the last class, (B, K−1)."""
        if self.pulled.shape[0] == 1:
            return multipliers * (1 - 2 * target).unsqueeze(-1)
        n_classes = len(self.pulled) + 1
        other = other_classes(target, n_classes, target.device)
        everything = multipliers.new_zeros(len(target), n_classes).scatter(-1, other, -multipliers)
        total = multipliers.sum(-1, keepdim=True)
        return everything.scatter(-1, target.unsqueeze(-1), total)[:, :-1]

    def displace(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """The point x + c P, (B, d)."""
        if self.pulled.shape[0] == 1:
            return torch.addcmul(x, coefficients.float(), self.pulled)
        return torch.addmm(x, coefficients.float(), self.pulled)


def suits(x: Tensor, geometry: object) -> bool:
    """Whether a solve can go this way: large, float32, on the CPU, probe and metric constant."""
    return (
        x.dtype == torch.float32
        and isinstance(geometry, ProbeGeometry)
        and is_large(x)
        and not (torch.is_grad_enabled() and geometry.gram.requires_grad)
        # "high" and "medium" let products be rounded to bfloat16.
        and torch.get_float32_matmul_precision() == "highest"
    )


def solve_single(
    x: Tensor,
    target: Tensor,
    margins: Tensor,
    floor: Tensor,
    geometry: ProbeGeometry,
    tolerance: float,
) -> Solution | None:
    """The solution, or None where the bound cannot be met and x' has to be read back.

    Args:
        x: activations, (B, d), float32, finite.
        target: target classes, (B,).
        margins: at x, (B, K−1), float64.
        floor: log α, (B,) or (B, K−1).
        geometry: probe and metric.
        tolerance: on the KKT residual.
    """
    pulls, constraints = geometry.single, geometry.constraints(target)
    bound = floor if floor.ndim == 2 else floor.unsqueeze(-1)
    needed = (margins.detach() < bound.detach()).any(-1)
    everywhere = bool(needed.all())
    # An overflow here is met by no λ, and read in float64.
    size = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True).double()

    def ask(pad: Tensor) -> Tensor:
        gap = bound + pad - margins
        return gap if everywhere else torch.where(needed.unsqueeze(-1), gap, -1.0)

    if pulls.pair is not None:
        # λ M − γ ‖a‖ (‖x‖ + λ ‖p‖) = g, so that the bound is met exactly.
        rate, inverse = pulls.pair
        gap = ask(rate * size)
        multipliers = (gap if everywhere else gap.clamp_min(0.0)) * inverse
        edit, feasible = needed, torch.ones_like(needed)
        # The floor that was aimed at follows λ.
        gap = gap + rate * pulls.length * multipliers
        coefficients = pulls.coefficients(target, multipliers)
    else:
        rates = pulls.rate * constraints.length
        # One constraint alone takes λ = g / M_ii; several together have taken up to 1.9 times that.
        gaps = (bound - margins).detach().clamp_min(0.0)
        likely = 2 * (gaps * pulls.stretch.index_select(0, target)).amax(-1, keepdim=True)
        pad = 1.1 * rates * (size + likely)
        for _ in range(ROUNDS):
            gap = ask(pad)
            multipliers, own = solve_gram(
                constraints.gram, gap, constraints.noise, table=constraints.table
            )
            coefficients = pulls.coefficients(target, multipliers)
            moved = coefficients.detach().abs() @ pulls.length
            reached = margins.detach() + matvec(constraints.gram, multipliers).detach()
            short = bound.detach() + rates * (size + moved.unsqueeze(-1)) - reached
            feasible, edit = own.feasible, needed & own.feasible
            if not bool(((short > 0).any(-1) & edit).any()):
                break
            pad = pad + 2 * short.clamp_min(0.0).amax(-1, keepdim=True)
        else:
            return None
        everywhere = bool(edit.all())
    found = multipliers.detach()
    # Half of what float32 can hold, so that no coordinate of x' can overflow; false for NaN too.
    moved = coefficients.detach().abs() @ pulls.length
    if not bool((moved + size.squeeze(-1)).max() < torch.finfo(x.dtype).max / 2):
        return None
    edited = pulls.displace(x, coefficients)
    if not everywhere:
        rows = (~edit).nonzero().squeeze(-1)
        edited = edited.index_copy(0, rows, x[rows])

    residual = kkt_residual(constraints.gram.detach(), gap.detach(), found, constraints.noise)
    squared = (multipliers * matvec(constraints.gram, multipliers)).sum(-1)
    after = geometry.margins(edited.detach(), target).amin(-1)
    before = margins.amin(-1)
    return Solution(
        x_new=edited,
        multipliers=multipliers,
        active=found > 0,
        # The gradient of √0 is infinite; an unedited example has distance 0 and gradient 0.
        distance=torch.where(edit, squared, 1.0).clamp_min(0.0).sqrt() * edit,
        euclidean=constraints.moved(found),
        floor=floor,
        log_odds_before=before,
        log_odds_after=torch.where(edit, after, before.detach()),
        kkt_residual=residual,
        status=statuses(feasible, edit, residual <= tolerance),
    )
