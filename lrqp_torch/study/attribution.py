"""What each part of the model adds to the answer by itself, and where every head looks.

Direct logit attribution: the stream at the end is a sum of what was written into it,
x = e + Σ_n (Σ_h a_nh + c_n + m_n), with e the embedding, a_nh = z_nh W_O^nh the result of head h of
layer n, c_n the bias of that layer's attention output and m_n its MLP. The final norm
y = g ⊙ (x − mean x) / s + b (an RMSNorm has neither mean nor b) is linear once its scale s is
frozen at the clean run's value, so that for answers a with weights w, such as +1 for IO and −1 for
S,

    Σ_a w_a logit[a] = r · x + u · b + Σ_a w_a bias[a],   u = Σ_a w_a W_U[a]
    r = (g ⊙ u − mean(g ⊙ u)) / s      (an RMSNorm: r = g ⊙ u / s)

and r · part is the part's share. The shares and the constants add up to that sum of logits.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; for two names,
Wang et al. 2022 (arXiv 2211.00593).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lrqp_torch.errors import UnknownFamilyError, WidthError
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.capture import capture
from lrqp_torch.stream.hooks import record_heads
from lrqp_torch.stream.sites import blocks_of, layout_of, projection_of, trunk_of
from lrqp_torch.study.context import Advance, StudyContext
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.heads import head_name, writers
from lrqp_torch.study.prompts import PromptSet
from lrqp_torch.study.running import attention_to, batches, put

MOST_ERROR = 0.02
"""How far the sum may miss the model's own logits, as a share of the largest of them."""

ATTENTIONS = {
    "END→IO": ("END", "IO"),
    "END→S1": ("END", "S1"),
    "END→S2": ("END", "S2"),
    "S2→S1": ("S2", "S1"),
    "S2→S1+1": ("S2", "S1+1"),
    "S1+1→S1": ("S1+1", "S1"),
}
"""Name of an attention to the positions of its query and key, in prompts about two names."""


@dataclass(frozen=True)
class Pull:
    """The logits that count for and against an answer: Σ_a w_a logit[a]."""

    tokens: Tensor  # a, LongTensor (B, m)
    weights: Tensor  # w, (B, m), float64; 0 for tokens that fill up

    @classmethod
    def of(cls, prompts: PromptSet, logits: Tensor) -> "Pull":
        """The preference of :meth:`PromptSet.preference` to first order around given logits.

        With one answer a class it is the difference of two logits itself. With more, the answers of
        a class count by their shares of its probability. The logits are (B, vocabulary).
        """
        answers = cast(Tensor, prompts.answers)
        rows, labels = torch.arange(len(answers), device=answers.device), prompts.labels
        sides = [answers[rows, kind] for kind in (labels, prompts.other)]
        shares = []
        for side in sides:
            own = logits.double().gather(-1, side.clamp_min(0))
            shares.append(own.masked_fill(side < 0, float("-inf")).softmax(-1))
        weights = torch.cat([shares[0], -shares[1]], dim=-1)
        return cls(torch.cat(sides, dim=-1).clamp_min(0), weights)

    def sum(self, values: Tensor) -> Tensor:
        """Σ_a w_a values[a], (B,) of logits (B, vocabulary)."""
        return (self.weights * values.double().gather(-1, self.tokens)).sum(-1)


@dataclass(frozen=True)
class HeadAttribution:
    """Shares of a :class:`Pull` at one token, in logits, float64."""

    embedding: Tensor  # the stream that enters the first block, (B,)
    heads: Tensor  # each head's result, (B, layers, heads)
    biases: Tensor  # each layer's attention output bias, (B, layers)
    mlps: Tensor  # whatever else each block adds: its MLP, (B, layers)
    constant: Tensor  # the biases of the final norm and of the unembedding, (B,)
    total: Tensor  # the sum of all, (B,)
    direction: Tensor  # r of the module's formula, (B, d)


@torch.no_grad()
def attribute(
    model: nn.Module, streams: Sequence[Tensor], z: Mapping[int, Tensor], pull: Pull
) -> HeadAttribution:
    """Split what pulls towards an answer into shares of embedding, heads and MLPs.

    The streams are those at one token an example, (B, d) each: ``Ln.pre`` of every block, then
    ``post`` of the last. ``z`` has for every layer the heads' outputs before W_O at the same token,
    (B, heads, head width); see :func:`~lrqp_torch.stream.hooks.record_heads`.

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
    direction, constant = _direction(model, streams[-1], pull)
    along = torch.stack([(stream.double() * direction).sum(-1) for stream in streams], dim=1)
    heads, biases = [], []
    for layer in range(layers):
        _, bias = output_projection(model, layer)
        heads.append(head_shares(model, layer, z[layer], direction))
        biases.append(direction @ bias.double())
    by_head, by_layer = torch.stack(heads, dim=1), torch.stack(biases, dim=1)
    mlps, total = along.diff(dim=1) - by_head.sum(-1) - by_layer, along[:, -1] + constant
    shares = along[:, 0], by_head, by_layer, mlps, constant
    result = HeadAttribution(*shares, total, direction)
    expected = pull.sum(cast(Any, model).get_output_embeddings()(final_norm(model)(streams[-1])))
    error = float((result.total - expected).abs().max())
    if not error <= MOST_ERROR * max(1.0, float(expected.abs().max())):
        raise UnknownFamilyError(
            f"the shares of {type(model).__name__}'s parts miss its logit difference by {error:.2g}"
            ": its final norm or unembedding is not of the form that attribution knows"
        )
    return result


@dataclass(frozen=True)
class Scores:
    """What every head does on n clean prompts, on the CPU; H counts the heads of all layers."""

    names: list[str]  # of the heads, in order of computation
    heads: Tensor  # direct effect on the preference, (n, H)
    attention: dict[str, Tensor]  # attention by name, (n, H) each
    parts: dict[str, Tensor]  # shares of the preference by part of the model, (n,) each
    total: Tensor  # what they add up to, (n,)
    z: Tensor  # the heads' outputs before W_O at the end, (n, layers, heads, head width)
    direction: Tensor  # along which a write at the end raises the preference, (n, d)


@torch.no_grad()
def score(
    context: StudyContext,
    prompts: PromptSet,
    attentions: Mapping[str, tuple[str, str]],
    advance: Advance,
) -> Scores:
    """Run clean prompts, which have answers, once, and score every head on each.

    ``attentions`` maps a name to the positions of a query and a key, from which and to which
    attention is read; ``advance`` is called with the number of prompts after each batch. Raises
    UnknownFamilyError: the model's attention or final norm is of an unknown form.
    """
    model, kept = context.model, dict[str, Tensor]()
    layers = range(len(blocks_of(model)))
    sites = [f"L{layer}.pre" for layer in layers] + [f"L{layers[-1]}.post"]
    for batch in batches(model, prompts, context.batch_size, start="end"):
        at = batch.prompts.positions
        with ExitStack() as stack:
            queries = {
                query: stack.enter_context(record_patterns(model, layers, at[query]))
                for query in dict.fromkeys(query for query, _ in attentions.values())
            }
            z = stack.enter_context(record_heads(model, layers, at["end"]))
            streams = capture(model, batch.prompts.inputs, sites, positions=at["end"])
        last = streams[sites[-1]]
        logits = cast(Any, model).get_output_embeddings()(final_norm(model)(last))
        share = attribute(
            model, [streams[site] for site in sites], z, Pull.of(batch.prompts, logits)
        )
        here = {
            "heads": share.heads.flatten(1),
            "part embedding": share.embedding,
            "part heads": share.heads.flatten(1).sum(1) + share.biases.sum(1),
            "part MLPs": share.mlps.sum(1),
            "part constant": share.constant,
            "total": share.total,
            "direction": share.direction,
            "z": torch.stack([z[layer] for layer in layers], dim=1),
        }
        for name, (query, key) in attentions.items():
            columns = [attention_to(queries[query][layer], at[key]) for layer in layers]
            here[f"attention {name}"] = torch.cat(columns, dim=1)
        put(kept, here, batch.rows, len(prompts))
        advance(len(batch))

    def group(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in kept.items() if k.startswith(prefix)}

    n_heads = kept["z"].shape[2]
    return Scores(
        names=[head_name(layer, head) for layer in layers for head in range(n_heads)],
        attention=group("attention "),
        parts=group("part "),
        **{name: kept[name] for name in ("heads", "total", "z", "direction")},
    )


def find_writers(context: StudyContext, advance: Advance) -> list[str]:
    """Answer writers by their direct effects in the training prompts, the strongest first."""
    found, draws = score(context, context.task.train, {}, advance), context.generator()
    effects = {n: Estimate.mean(found.heads[:, i], draws) for i, n in enumerate(found.names)}
    return writers(effects)


def head_shares(model: nn.Module, layer: int, z: Tensor, direction: Tensor) -> Tensor:
    """What the heads of a layer write along a direction (B, d): r · z_h W_O^h, (B, heads), float64.

    ``z`` holds their outputs before W_O, (B, heads, head width).
    """
    weight, _ = output_projection(model, layer)
    read = (direction.double() @ weight.double().T).unflatten(1, z.shape[1:])
    shares: Tensor = (z.double() * read).sum(-1)
    return shares


def _direction(model: nn.Module, final: Tensor, pull: Pull) -> tuple[Tensor, Tensor]:
    """The direction r and the constant of the module's formula, (B, d) and (B,), in float64.

    The norm's scale is frozen at ``final``, the stream after the last block, (B, d).
    """
    norm, unembedding = cast(Any, final_norm(model)), cast(Any, model).get_output_embeddings()
    x = final.double()
    u = torch.einsum("bm,bmd->bd", pull.weights, unembedding.weight[pull.tokens].double())
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
        constant = constant + (pull.weights * unembedding.bias[pull.tokens].double()).sum(-1)
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
    module = projection_of(model, layer)
    weight, bias = weight_of(module).T, getattr(module, "bias", None)
    return weight, weight.new_zeros(weight.shape[1]) if bias is None else bias.detach()


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear map, (out, in)."""
    weight: Tensor = cast(Any, module).weight.detach()
    # transformers' Conv1D keeps its weight as (in, out), nn.Linear as (out, in).
    return weight if isinstance(module, nn.Linear) else weight.T
