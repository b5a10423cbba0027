"""Direct logit attribution: what each part of a model adds to the answer by itself.

The stream at END is a sum of what was written into it: x = e + Σ_n (Σ_h a_nh + c_n + m_n), with e
the embedding, a_nh = z_nh W_O^nh the result of head h of layer n, c_n the bias of that layer's
attention output and m_n its MLP. The final norm y = g ⊙ (x − mean x) / s + b (an RMSNorm has
neither mean nor b) is linear once its scale s is frozen at the clean run's value, so

    logit[IO] − logit[S] = r · x + u · b + (bias[IO] − bias[S]),   u = W_U[IO] − W_U[S]
    r = (g ⊙ u − mean(g ⊙ u)) / s      (an RMSNorm: r = g ⊙ u / s)

and r · part is the part's share. The shares and the constants add up to the logit difference.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; for this task,
Wang et al. 2022 (arXiv 2211.00593).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lrqp_torch.errors import UnknownFamilyError, WidthError
from lrqp_torch.stream.sites import blocks_of, layout_of, projection_of, trunk_of

MOST_ERROR = 0.02
"""How far the sum may miss the model's own logits, as a share of the largest of them."""


@dataclass(frozen=True)
class Attribution:
    """Shares of the logit difference IO − S at one token, in logits, float64.

    Attributes:
        embedding: the stream that enters the first block, (B,).
        heads: each head's result, (B, layers, heads).
        biases: each layer's attention output bias, (B, layers).
        mlps: whatever else each block adds: its MLP, (B, layers).
        constant: the biases of the final norm and of the unembedding, (B,).
        logit_difference: the sum of all, (B,).
        direction: r of the module's formula, (B, d).
    """

    embedding: Tensor
    heads: Tensor
    biases: Tensor
    mlps: Tensor
    constant: Tensor
    logit_difference: Tensor
    direction: Tensor


@torch.no_grad()
def attribute(
    model: nn.Module,
    streams: Sequence[Tensor],
    z: Mapping[int, Tensor],
    io_tokens: Tensor,
    s_tokens: Tensor,
) -> Attribution:
    """Split the logit difference into shares of embedding, heads and MLPs.

    Args:
        model: a transformers causal language model.
        streams: the stream at one token an example, (B, d) each: ``Ln.pre`` of every block, then
            ``post`` of the last.
        z: layer to the heads' outputs before W_O at the same token, (B, heads, head width), for
            every layer; see :func:`~lrqp_torch.stream.hooks.record_heads`.
        io_tokens: answer for which the logit counts, (B,).
        s_tokens: answer against which it counts, (B,).

    Raises:
        WidthError: not one stream more than blocks, or a layer's heads missing.
        UnknownFamilyError: the model's final norm is not a LayerNorm or an RMSNorm as above.
    """
    layers = len(blocks_of(model))
    if len(streams) != layers + 1 or set(z) != set(range(layers)):
        raise WidthError(
            f"the model has {layers} blocks: give {layers + 1} streams and the heads of every "
            f"layer, not {len(streams)} and layers {sorted(z)}"
        )
    direction, constant = logit_direction(model, streams[-1], io_tokens, s_tokens)
    along = torch.stack([(stream.double() * direction).sum(-1) for stream in streams], dim=1)
    heads, biases = [], []
    for layer in range(layers):
        _, bias = output_projection(model, layer)
        heads.append(head_shares(model, layer, z[layer], direction))
        biases.append(direction @ bias.double())
    result = Attribution(
        embedding=along[:, 0],
        heads=torch.stack(heads, dim=1),
        biases=torch.stack(biases, dim=1),
        mlps=along.diff(dim=1) - torch.stack(heads, dim=1).sum(-1) - torch.stack(biases, dim=1),
        constant=constant,
        logit_difference=along[:, -1] + constant,
        direction=direction,
    )
    _check_sum(model, streams[-1], io_tokens, s_tokens, result.logit_difference)
    return result


def head_shares(model: nn.Module, layer: int, z: Tensor, direction: Tensor) -> Tensor:
    """What the heads of a layer write along a direction, r · z_h W_O^h, (B, heads), in float64.

    Args:
        model: a transformers model.
        layer: the heads' layer.
        z: their outputs before W_O, (B, heads, head width).
        direction: (B, d).
    """
    weight, _ = output_projection(model, layer)
    read = (direction.double() @ weight.double().T).unflatten(1, z.shape[1:])
    shares: Tensor = (z.double() * read).sum(-1)
    return shares


@torch.no_grad()
def logit_direction(
    model: nn.Module, final: Tensor, io_tokens: Tensor, s_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """The direction r and the constant of the module's formula, (B, d) and (B,), in float64.

    Args:
        model: a transformers causal language model.
        final: the stream after the last block, (B, d); the norm's scale is frozen there.
        io_tokens: answer for which the logit counts, (B,).
        s_tokens: answer against which it counts, (B,).
    """
    norm, unembedding = cast(Any, final_norm(model)), cast(Any, model).get_output_embeddings()
    x = final.double()
    u = (unembedding.weight[io_tokens] - unembedding.weight[s_tokens]).double()
    direction = norm.weight.double() * u
    constant = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    if isinstance(norm, nn.LayerNorm):
        direction = direction - direction.mean(-1, keepdim=True)
        scale = (x.var(-1, unbiased=False) + norm.eps).sqrt()
        if norm.bias is not None:
            constant = constant + u @ norm.bias.double()
    else:
        epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        scale = (x.square().mean(-1) + epsilon).sqrt()
    if unembedding.bias is not None:
        constant = constant + (unembedding.bias[io_tokens] - unembedding.bias[s_tokens]).double()
    return direction / scale[:, None], constant


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the unembedding: the only norm beside the blocks.

    Raises:
        UnknownFamilyError: there is none, or more than one.
    """
    parent, _, _ = layout_of(model).blocks.rpartition(".")
    owner = trunk_of(model).get_submodule(parent)
    norms = [child for child in owner.children() if type(child).__name__.endswith("Norm")]
    if len(norms) != 1:
        raise UnknownFamilyError(
            f"{type(model).__name__} has {len(norms)} norms beside its blocks, so the one before "
            "the unembedding cannot be told; direct logit attribution does not support it"
        )
    return norms[0]


def output_projection(model: nn.Module, layer: int) -> tuple[Tensor, Tensor]:
    """W_O with shape (heads · head width, d), and its bias, (d,), zeros where there is none."""
    module = cast(Any, projection_of(model, layer))
    # transformers' Conv1D keeps its weight as (in, out), nn.Linear as (out, in).
    weight: Tensor = module.weight.T if isinstance(module, nn.Linear) else module.weight
    bias = getattr(module, "bias", None)
    return weight.detach(), weight.new_zeros(weight.shape[1]) if bias is None else bias.detach()


def _check_sum(
    model: nn.Module, final: Tensor, io_tokens: Tensor, s_tokens: Tensor, found: Tensor
) -> None:
    logits = cast(Any, model).get_output_embeddings()(final_norm(model)(final)).double()
    rows = torch.arange(len(logits), device=logits.device)
    expected = logits[rows, io_tokens] - logits[rows, s_tokens]
    error = float((found - expected).abs().max())
    if not error <= MOST_ERROR * max(1.0, float(expected.abs().max())):
        raise UnknownFamilyError(
            f"the shares of {type(model).__name__}'s parts miss its logit difference by {error:.2g}"
            ": its final norm or unembedding is not of the form that attribution knows"
        )
