"""A GPT-2 forward pass, written out so that one token's stream can be replaced at any site.

Training needs it because an edit at S2 changes only the tokens from S2 on: the clean pass runs
over whole prompts and keeps keys and values, the edited pass runs over the last few tokens.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

Edit = Callable[[int, Tensor], Tensor]
"""``(site, stream) -> stream``; sites count L0.pre, L0.mid, L1.pre, ..., the last block's post."""


class Stream(NamedTuple):
    """What a pass over the blocks gives.

    Attributes:
        last: The stream after the last block, ``(batch, tokens, d)``.
        ends: The last token's stream at each site, ``(batch, d)`` each.
        keys_values: Each block's keys and values, ``(batch, heads, tokens, d / heads)``.
    """

    last: Tensor
    ends: list[Tensor]
    keys_values: list[tuple[Tensor, Tensor]]


def site_names(n_layers: int) -> tuple[str, ...]:
    """Name the sites in the order of the computation: pre and mid of each block, then the end."""
    names = [f"L{layer}.{place}" for layer in range(n_layers) for place in ("pre", "mid")]
    return (*names, f"L{n_layers - 1}.post")


def attention_mask(present: Tensor, n_queries: int) -> Tensor:
    """Build the causal mask of the last ``n_queries`` tokens of left-padded prompts.

    Args:
        present: ``(batch, tokens)``, false on padding.
        n_queries: How many of the last tokens ask.

    Returns:
        ``(batch, 1, n_queries, tokens)``, true where a query may look. Every token may look at
        itself, padding included, so that no row of the softmax is empty.
    """
    n_tokens = present.shape[1]
    every = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=present.device)
    allowed = (every.tril() & present.bool()[:, None, :]) | torch.eye(
        n_tokens, dtype=torch.bool, device=present.device
    )
    return allowed[:, None, n_tokens - n_queries :]


def run_blocks(
    model: GPT2LMHeadModel,
    stream: Tensor,
    mask: Tensor,
    edit: Edit,
    past: list[tuple[Tensor, Tensor]] | None = None,
) -> Stream:
    """Run all blocks, passing the stream through ``edit`` at every site.

    Args:
        model: An organism.
        stream: Embedded tokens, ``(batch, queries, d)``.
        mask: From :func:`attention_mask`.
        edit: Called at each site; what it returns goes on.
        past: Keys and values of the tokens before ``stream``.

    Returns:
        The final stream and each block's keys and values, ``past`` included.
    """
    n_heads = int(model.config.n_head)
    keys_values: list[tuple[Tensor, Tensor]] = []
    ends: list[Tensor] = []

    def at_site(stream: Tensor) -> Tensor:
        stream = edit(len(ends), stream)
        ends.append(stream[:, -1])
        return stream

    blocks = cast("Iterable[GPT2Block]", model.transformer.h)
    for layer, block in enumerate(blocks):
        stream = at_site(stream)
        query, key, value = (
            part.unflatten(-1, (n_heads, -1)).transpose(1, 2)
            for part in block.attn.c_attn(block.ln_1(stream)).chunk(3, dim=-1)
        )
        if past is not None:
            key = torch.cat([past[layer][0], key], dim=2)
            value = torch.cat([past[layer][1], value], dim=2)
        keys_values.append((key, value))
        heads = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        stream = at_site(stream + block.attn.c_proj(heads.transpose(1, 2).flatten(2)))
        stream = stream + block.mlp(block.ln_2(stream))
    return Stream(at_site(stream), ends, keys_values)
