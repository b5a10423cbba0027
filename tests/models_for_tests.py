"""Tiny random models of real transformers classes, prompts, and a forward pass by hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import lrqp_torch as lrqp

WIDTH, LAYERS, HEADS, VOCABULARY, CONTEXT = 24, 3, 4, 61, 64
POST_MODELS = ("gpt2", "llama")  # every theorem is tested on these
WITH_MID = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gpt_neox_serial")
ALL_MODELS = (*WITH_MID, "gpt_neox_parallel")
SITES = tuple(f"L{layer}.{part}" for layer in range(LAYERS) for part in ("pre", "mid", "post"))

_COMMON = {
    "vocab_size": VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_ROTARY = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = {**_ROTARY, "num_key_value_heads": 2}


def build(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    seed: int = 0,
    **changes: object,
) -> PreTrainedModel:
    """A tiny model in eval mode, with weights large enough that every part has a visible effect."""
    config_class, model_class, settings = {
        "gpt2": (
            GPT2Config,
            GPT2LMHeadModel,
            {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_positions": CONTEXT},
        ),
        "llama": (LlamaConfig, LlamaForCausalLM, _GROUPED),
        "mistral": (MistralConfig, MistralForCausalLM, {**_GROUPED, "sliding_window": None}),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, _GROUPED),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**_GROUPED, "head_dim": WIDTH // HEADS}),
        "gpt_neox_serial": (
            GPTNeoXConfig,
            GPTNeoXForCausalLM,
            {**_ROTARY, "use_parallel_residual": False},
        ),
        "gpt_neox_parallel": (
            GPTNeoXConfig,
            GPTNeoXForCausalLM,
            {**_ROTARY, "use_parallel_residual": True},
        ),
    }[name]
    config = config_class(**{**_COMMON, **settings, **changes})
    config._attn_implementation = attention
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.25 * noise)
    return model.to(dtype)


@dataclass(frozen=True)
class Prompts:
    """Random prompts of different lengths, which can be padded on either side."""

    tokens: tuple[Tensor, ...]

    @classmethod
    def random(cls, lengths: list[int], seed: int = 0) -> "Prompts":
        generator = torch.Generator().manual_seed(seed)
        return cls(
            tuple(torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths)
        )

    def padded(self, side: str) -> dict[str, Tensor]:
        """input_ids, attention_mask and position_ids of the batch, padded on one side."""
        width = max(len(row) for row in self.tokens)
        ids = torch.zeros(len(self.tokens), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(self.tokens):
            columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, columns], mask[i, columns] = row, 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": lrqp.position_ids(mask),
        }

    def columns(self, tokens: Tensor, side: str) -> Tensor:
        """Columns of the padded batch of the given tokens, (B,) or (B, n), counted unpadded."""
        if side == "right":
            return tokens
        width = max(len(row) for row in self.tokens)
        offset = torch.tensor([width - len(row) for row in self.tokens])
        return tokens + offset.reshape(-1, *[1] * (tokens.ndim - 1))

    def alone(self, example: int) -> dict[str, Tensor]:
        """One prompt, unpadded."""
        return {"input_ids": self.tokens[example][None]}


def random_edit(
    x: Tensor, n_classes: int, *, seed: int = 0, log_odds: float = 6.0, **options: object
) -> lrqp.LRQP:
    """An LRQP with a random probe, and the covariance of the activations x (n, d)."""
    generator = torch.Generator().manual_seed(seed)
    probe = lrqp.LinearProbe(x.shape[1], n_classes, dtype=torch.float64)
    probe.requires_grad_(False)
    probe.weight.copy_(torch.randn(n_classes, x.shape[1], generator=generator))
    probe.bias.copy_(torch.randn(n_classes, generator=generator))
    metric = lrqp.Mahalanobis.fit(x.double(), shrinkage=0.1)
    return lrqp.LRQP(probe, metric, log_odds=log_odds, **options)


def hook_count(model: nn.Module) -> int:
    """Hooks of any kind on any module of the model."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def forward_by_hand(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and residual streams, from the model's own submodules and nothing else.

    ``edits`` maps names to functions of the whole stream (B, T, d), applied where the site is. The
    further name ``Ln.mlp_input`` changes what the second norm reads, and not the skip path.
    """
    edits = edits or {}
    streams: dict[str, Tensor] = {}

    def at(name: str, x: Tensor) -> Tensor:
        streams[name] = edits[name](x) if name in edits else x
        return streams[name]

    trunk, kind = model.base_model, model.config.model_type
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    position_ids = inputs.get("position_ids", torch.arange(ids.shape[1])[None].expand_as(ids))
    visible = torch.ones(ids.shape[1], ids.shape[1]).tril().bool() & mask[:, None, None, :].bool()
    bias = torch.zeros(visible.shape, dtype=model.dtype).masked_fill(
        ~visible, torch.finfo(model.dtype).min
    )
    x = model.get_input_embeddings()(ids)
    if kind == "gpt2":
        x = x + trunk.wpe(position_ids)
        blocks, final = trunk.h, trunk.ln_f
    else:
        rotary = trunk.rotary_emb(x, position_ids)
        blocks = trunk.layers
        final = trunk.final_layer_norm if kind == "gpt_neox" else trunk.norm
    for n, block in enumerate(blocks):
        x = at(f"L{n}.pre", x)
        if kind == "gpt2":
            attention = block.attn(block.ln_1(x), attention_mask=bias)[0]
            norm = block.ln_2
        elif kind == "gpt_neox":
            attention = block.attention(block.input_layernorm(x), bias, position_embeddings=rotary)[
                0
            ]
            norm = block.post_attention_layernorm
        else:
            attention = block.self_attn(
                hidden_states=block.input_layernorm(x),
                position_embeddings=rotary,
                attention_mask=bias,
            )[0]
            norm = block.post_attention_layernorm
        if kind == "gpt_neox" and model.config.use_parallel_residual:
            x = block.mlp(norm(x)) + attention + x
        else:
            x = at(f"L{n}.mid", attention + x)
            x = x + block.mlp(norm(at(f"L{n}.mlp_input", x)))
        x = at(f"L{n}.post", x)
    return model.get_output_embeddings()(final(x)), streams


def in_double(model: nn.Module) -> nn.Module:
    """The model in float64 throughout: Llama's own norms would compute in float32."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double()
