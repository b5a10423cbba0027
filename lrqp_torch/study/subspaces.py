"""What later parts of a model read from the stream, and an edit split by it.

A head reads W_K y and W_V y from a token, an MLP W_in y, where y = g ⊙ (x − mean x) / s + b is the
norm before it (an RMSNorm has neither mean nor b). With the gain g and the centring C folded in,
the rows of

    R = W diag(g) C

span all that the head or the MLP can see of x, apart from the scale s, which any change of x moves
a little: a displacement that R maps to 0 is seen through s alone. Rows of a few heads or of one MLP
often span the whole stream. So the space is cut where its leading singular directions hold
:data:`ENERGY` of ‖R‖²_F; what is left out is read, but faintly.

With B an orthonormal basis of a space, (r, d), P = Bᵀ B projects onto it and splits a displacement:

    δ = δ_in + δ_out,   δ_in = P δ,   δ_out = (I − P) δ,   ‖δ‖² = ‖δ_in‖² + ‖δ_out‖²

The Mahalanobis lengths of the two do not add up in squares, since P is orthogonal in the Euclidean
sense and not in that of Σ: a part can be longer than the whole.

Along a part's own direction the natural activations vary by so much, and the classes differ by so
much. An edit whose effect lies in a part along which the data hardly vary with the class, while the
part along which they do has no effect, is the illusion of Makelov, Lange and Nanda 2023
(arXiv 2311.17030), who split by the null space of W_out: the probe reads a direction that nothing
follows, and the edit works through one that is otherwise asleep. Heads' reading matrices are those
of Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lrqp_torch.errors import NonFiniteError, UnknownFamilyError, WidthError
from lrqp_torch.stream.sites import Site, blocks_of, head_count
from lrqp_torch.study.attribution import find_writers, output_projection, weight_of
from lrqp_torch.study.context import StudyContext, no_progress
from lrqp_torch.study.heads import HeadsResult, Role, first_reader, parse_head

ENERGY = 0.9
"""Share of the squared Frobenius norm of reading weights that a space must hold."""

NEGLIGIBLE = 1e-6
"""A part shorter than this share of the whole is rounding, and has no direction."""


@dataclass(frozen=True)
class Space:
    """A subspace of the stream."""

    name: str  # for tables
    rows: Tensor  # orthonormal basis, (r, d), float64
    rank: int  # numerical rank of the weights that it was cut from
    energy: float  # share of their squared Frobenius norm that it holds
    # Whether later parts of the model read through it; False for other subspaces.
    reads: bool = True


@dataclass(frozen=True)
class ReadingModules:
    """Where the blocks of a family keep the weights that read the stream, from the block."""

    attention_norm: str  # the norm before attention
    keys: str  # makes keys
    # Makes values; the same module where it makes queries, keys and values side by side.
    values: str
    mlp_norm: str  # the norm before the MLP
    mlp: tuple[str, ...]  # the MLP's first linear maps


_LLAMA = ReadingModules(
    "input_layernorm",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "post_attention_layernorm",
    ("mlp.gate_proj", "mlp.up_proj"),
)
_GEMMA, _GPT = replace(_LLAMA, mlp_norm="pre_feedforward_layernorm"), ("ln_2", ("mlp.c_fc",))
READING: dict[str, ReadingModules] = {
    **dict.fromkeys(("gemma", "llama", "mistral", "qwen2", "qwen3", "smollm3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    "gpt2": ReadingModules("ln_1", "attn.c_attn", "attn.c_attn", *_GPT),
    "gpt_neo": ReadingModules("ln_1", "attn.attention.k_proj", "attn.attention.v_proj", *_GPT),
}
"""Rows by ``config.model_type``."""


def top_space(name: str, weights: Tensor, *, energy: float = ENERGY) -> Space:
    """The fewest leading right singular directions of R, (m, d), that hold a share of ‖R‖²_F.

    Raises:
        WidthError: not a matrix, or one without a row that is not zero.
        NonFiniteError: NaN or infinity in it.
    """
    if weights.ndim != 2 or not bool((weights != 0).any()):
        raise WidthError(f"{name}: reading weights must be (m, d) and not all 0")
    if not bool(torch.isfinite(weights).all()):
        raise NonFiniteError(f"{name}: the reading weights hold NaN or infinity")
    wide = weights.detach().double()
    values, basis = torch.linalg.svd(wide, full_matrices=False)[1:]
    rank = int((values > max(wide.shape) * torch.finfo(wide.dtype).eps * values[0]).sum())
    held = values.square().cumsum(0) / values.square().sum()
    # Rounding may leave the last share a hair below 1.
    count = min(int((held < energy * (1 - 1e-12)).sum()) + 1, rank)
    return Space(name, basis[:count], rank, float(held[count - 1]))


def reader_spaces(model: nn.Module, site: str, role: str, heads: Sequence[str]) -> list[Space]:
    """What heads above a site read of it, and what the next MLP reads.

    ``role`` is that of the heads, for the names of the spaces; no heads leave out theirs. Raises
    UnknownFamilyError: the model has no row in :data:`READING`, so its weights cannot be told.
    """
    spaces = []
    if heads:
        keys, values = zip(*(head_weights(model, name) for name in heads), strict=True)
        spaces = [
            top_space(f"{role}: values", torch.cat(values)),
            top_space(f"{role}: keys", torch.cat(keys)),
            top_space(f"{role}: keys and values", torch.cat([*keys, *values])),
        ]
    parsed = Site.parse(site)
    layer = parsed.layer + (parsed.part == "post")
    if layer < len(blocks_of(model)):
        spaces.append(top_space(f"MLP of layer {layer}", mlp_weights(model, layer)))
    return spaces


def readers_of(
    context: StudyContext, site: str, heads: HeadsResult | None
) -> tuple[str, list[str]]:
    """A role whose heads are taken for the readers of a site, and those of them above it.

    S-inhibition heads; without them above the site, name movers take their place, or answer
    writers. These are found by their direct effect where the prompts have no names (``heads`` is
    None). Raises UnknownFamilyError: the model's final norm is of an unknown form.
    """
    if heads is None:
        roles = [("answer writers", find_writers(context, no_progress))]
    else:
        roles = [
            ("S-inhibition heads", heads.members(Role.S_INHIBITION)),
            ("name movers", heads.members(Role.MOVER)),
            ("answer writers", heads.found[Role.WRITER]),
        ]
    lowest = first_reader(site)
    above = [(role, [h for h in names if parse_head(h)[0] >= lowest]) for role, names in roles]
    return next((pair for pair in above if pair[1]), ("", []))


def head_weights(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """The reading weights of a head's keys and values, (head width, d) each, norm folded in.

    Heads that share keys and values (grouped queries) give the same ones. Raises
    UnknownFamilyError: the family has no row, or its modules have other shapes.
    """
    layer, head = parse_head(name)
    modules, block = _modules(model), blocks_of(model)[layer]
    width = output_projection(model, layer)[0].shape[0] // head_count(model)
    keys, values = (weight_of(block.get_submodule(path)) for path in (modules.keys, modules.values))
    if modules.keys == modules.values:
        _, keys, values = keys.chunk(3)
    group = head * (len(keys) // width) // head_count(model)
    rows = slice(group * width, (group + 1) * width)
    norm = block.get_submodule(modules.attention_norm)
    return fold_norm(keys[rows], norm), fold_norm(values[rows], norm)


def mlp_weights(model: nn.Module, layer: int) -> Tensor:
    """The reading weights of a layer's MLP, (hidden, d), norm folded in.

    Raises:
        UnknownFamilyError: the family has no row, or its modules have other shapes.
    """
    modules, block = _modules(model), blocks_of(model)[layer]
    weight = torch.cat([weight_of(block.get_submodule(path)) for path in modules.mlp])
    return fold_norm(weight, block.get_submodule(modules.mlp_norm))


@torch.no_grad()
def fold_norm(weight: Tensor, norm: nn.Module) -> Tensor:
    """W diag(g) C of a LayerNorm or an RMSNorm, (m, d), float64; exact up to its epsilon.

    Both are read from what the norm does, so that norms which store g − 1 need no rule of their
    own: norm(x) − norm(−x) = 2 g ⊙ C x / s for every x, and C is the identity unless the norm sends
    all vectors with equal entries to one.
    """
    width = weight.shape[1]
    ones = torch.ones(1, width, dtype=weight.dtype, device=weight.device)
    x = ones.clone()
    x[:, 1::2] = -1
    shift: Tensor = (norm(ones) - norm(-ones)).double()
    change: Tensor = (norm(x) - norm(-x)).double()
    centres = bool(shift.abs().max() <= 1e-3 * change.abs().max())
    seen = x.double() - x.double().mean() if centres else x.double()
    gain = change / (2 * seen)
    folded = weight.double() * gain
    return folded - folded.mean(1, keepdim=True) if centres else folded


def random_space(like: Space, generator: torch.Generator) -> Space:
    """A subspace of the same dimension in a random position, uniform over all of them."""
    count, width = like.rows.shape
    normal = torch.randn(width, count, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(normal)[0].T.to(like.rows.device)
    return Space(f"random space, {count} dimensions", basis, count, 1.0, reads=False)


def class_mean_space(x: Tensor, labels: Tensor) -> Space:
    """The span of the differences of class means of x (n, d): all that the class explains."""
    wide = x.double()
    means = torch.stack([wide[labels == k].mean(0) for k in labels.unique()])
    found = top_space("differences of class means", means[1:] - means[0], energy=1.0)
    return replace(found, reads=False)


# ---- an edit split by a space --------------------------------------------------------------------


@dataclass(frozen=True)
class Along:
    """How natural and edited activations lie along one direction p."""

    # |difference of the class means| along p, in standard deviations within a class.
    separation: float
    shift: float  # mean |δ · p| in standard deviations of the natural activations along p
    position: float  # mean |x' · p − mean| in the same unit: how far out the edited activations lie
    farthest: float  # the same of the natural activation that lies farthest out


def split(delta: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of displacements (n, d) inside and outside a subspace of orthonormal rows (r, d).

    Both in float64; their sum is ``delta``. Raises WidthError: other widths.
    """
    if delta.ndim != 2 or basis.ndim != 2 or delta.shape[1] != basis.shape[1]:
        raise WidthError(
            f"displacements (n, d) and basis (r, d) must have one width, got "
            f"{tuple(delta.shape)} and {tuple(basis.shape)}"
        )
    wide, rows = delta.double(), basis.double()
    inside = wide @ rows.T @ rows
    return inside, wide - inside


def direction_of(part: Tensor, whole: Tensor) -> Tensor | None:
    """The unit vector along which the rows of a part vary most, (d,); None where it is rounding.

    With two classes all displacements of one edit are multiples of one vector, and so are parts.
    Both are (n, d).
    """
    if float(part.norm()) <= NEGLIGIBLE * float(whole.norm()):
        return None
    first: Tensor = torch.linalg.svd(part.double(), full_matrices=False)[2][0]
    return first


def along(direction: Tensor, x: Tensor, delta: Tensor, labels: Tensor) -> Along:
    """How activations x (n, d) lie along a unit vector (d,) before and after displacements (n, d).

    ``labels`` are their classes, (n,), two or more.
    """
    natural, moved = x.double() @ direction, delta.double() @ direction
    mean, deviation = natural.mean(), natural.std(unbiased=False)
    classes = [natural[labels == k] for k in labels.unique()]
    means = torch.stack([values.mean() for values in classes])
    within = torch.cat([values - values.mean() for values in classes]).square().mean().sqrt()
    tiny = torch.finfo(natural.dtype).tiny
    return Along(
        separation=float((means.max() - means.min()) / within.clamp_min(tiny)),
        shift=float((moved.abs() / deviation.clamp_min(tiny)).mean()),
        position=float(((natural + moved - mean).abs() / deviation.clamp_min(tiny)).mean()),
        farthest=float((natural - mean).abs().max() / deviation.clamp_min(tiny)),
    )


def _modules(model: nn.Module) -> ReadingModules:
    model_type: str = cast(Any, model).config.model_type
    if model_type not in READING:
        raise UnknownFamilyError(
            f"which weights of model type {model_type!r} read the stream is not known (known: "
            f"{', '.join(sorted(READING))}); add a row to READING of "
            "lrqp_torch.study.subspaces"
        )
    return READING[model_type]
