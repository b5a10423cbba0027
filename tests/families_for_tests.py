"""A tiny random model of each family, with its blocks' second half written by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from models_for_tests import CONTEXT, HEADS, LAYERS, VOCABULARY, WIDTH
from torch import Tensor, nn
from transformers import PreTrainedModel

Half = Callable[[Any, Tensor], Tensor]
"""What a block makes of its ``mid``, computed with the block's own modules."""


def llama_half(block: Any, mid: Tensor) -> Tensor:
    return mid + block.mlp(block.post_attention_layernorm(mid))


def experts_half(block: Any, mid: Tensor) -> Tensor:
    out = block.mlp(block.post_attention_layernorm(mid))
    return mid + (out if isinstance(out, Tensor) else out[0])


def gemma2_half(block: Any, mid: Tensor) -> Tensor:
    return mid + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(mid)))


def gpt2_half(block: Any, mid: Tensor) -> Tensor:
    return mid + block.mlp(block.ln_2(mid))


def olmo2_half(block: Any, mid: Tensor) -> Tensor:
    return mid + block.post_feedforward_layernorm(block.mlp(mid))


def glm4_half(block: Any, mid: Tensor) -> Tensor:
    return mid + block.post_mlp_layernorm(block.mlp(block.post_attention_layernorm(mid)))


def opt_half(block: Any, mid: Tensor) -> Tensor:
    return mid + block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(mid))))


@dataclass(frozen=True)
class Recipe:
    """How to build a family's model, and what to expect of it."""

    prefix: str
    settings: dict[str, Any]
    second_reader: str | None = None
    half: Half | None = None
    patterns: bool = True

    @property
    def has_mid(self) -> bool:
        return self.half is not None


_ROTARY = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = {**_ROTARY, "num_key_value_heads": 2}
_HEAD = {**_GROUPED, "head_dim": WIDTH // HEADS}
_GPT2 = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_positions": CONTEXT}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
_SECOND = "post_attention_layernorm"

FAMILIES_BUILT: dict[str, Recipe] = {
    "cohere": Recipe("Cohere", _GROUPED),
    "falcon": Recipe(
        "Falcon",
        {**_ROTARY, "new_decoder_architecture": False, "parallel_attn": False, "alibi": False},
        _SECOND,
        llama_half,
        patterns=False,
    ),
    "falcon_parallel": Recipe(
        "Falcon", {**_ROTARY, "new_decoder_architecture": True, "num_kv_heads": 2}, patterns=False
    ),
    "gemma": Recipe("Gemma", _HEAD, _SECOND, llama_half),
    "gemma2": Recipe("Gemma2", _HEAD, "pre_feedforward_layernorm", gemma2_half),
    "gemma3_text": Recipe("Gemma3", _HEAD, "pre_feedforward_layernorm", gemma2_half),
    "glm4": Recipe("Glm4", _HEAD, _SECOND, glm4_half),
    "gpt2": Recipe("GPT2", _GPT2, "ln_2", gpt2_half),
    "gpt_bigcode": Recipe("GPTBigCode", _GPT2, "ln_2", gpt2_half),
    "gpt_neo": Recipe(
        "GPTNeo",
        {
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "hidden_size": WIDTH,
            "max_position_embeddings": CONTEXT,
            "attention_types": [[["global"], LAYERS]],
        },
        "ln_2",
        gpt2_half,
        patterns=False,
    ),
    "gpt_neox": Recipe("GPTNeoX", {**_ROTARY, "use_parallel_residual": False}, _SECOND, llama_half),
    "gpt_neox_parallel": Recipe("GPTNeoX", {**_ROTARY, "use_parallel_residual": True}),
    "gptj": Recipe("GPTJ", {**_GPT2, "rotary_dim": 4}, patterns=False),
    "llama": Recipe("Llama", _GROUPED, _SECOND, llama_half),
    "mistral": Recipe("Mistral", {**_GROUPED, "sliding_window": None}, _SECOND, llama_half),
    "mixtral": Recipe(
        "Mixtral",
        {**_GROUPED, "num_local_experts": 3, "sliding_window": None},
        _SECOND,
        experts_half,
    ),
    "olmo": Recipe("Olmo", _GROUPED, _SECOND, llama_half),
    "olmo2": Recipe("Olmo2", _GROUPED, "mlp", olmo2_half),
    "opt": Recipe(
        "OPT",
        {
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "ffn_dim": 2 * WIDTH,
            "max_position_embeddings": CONTEXT,
        },
        "final_layer_norm",
        opt_half,
    ),
    "phi": Recipe("Phi", {**_ROTARY, "num_attention_heads": 2}),
    "phi3": Recipe("Phi3", _GROUPED, _SECOND, llama_half),
    "qwen2": Recipe("Qwen2", _GROUPED, _SECOND, llama_half),
    "qwen2_moe": Recipe(
        "Qwen2Moe",
        {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": WIDTH},
        _SECOND,
        experts_half,
    ),
    "qwen3": Recipe("Qwen3", _HEAD, _SECOND, llama_half),
    "qwen3_moe": Recipe("Qwen3Moe", {**_HEAD, **_EXPERTS}, _SECOND, experts_half),
    "smollm3": Recipe("SmolLM3", _GROUPED, _SECOND, llama_half),
    "stablelm": Recipe(
        "StableLm", {**_GROUPED, "use_parallel_residual": False}, _SECOND, llama_half
    ),
    "stablelm_parallel": Recipe("StableLm", {**_GROUPED, "use_parallel_residual": True}),
    "starcoder2": Recipe("Starcoder2", {**_GROUPED, "sliding_window": None}, _SECOND, llama_half),
}
WITH_MID = [name for name, recipe in FAMILIES_BUILT.items() if recipe.has_mid]
WITHOUT_MID = [name for name, recipe in FAMILIES_BUILT.items() if not recipe.has_mid]


def build_family(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny model of a family in eval mode, with weights whose every part has a visible effect."""
    recipe = FAMILIES_BUILT[name]
    config_class = getattr(
        transformers, recipe.prefix + ("TextConfig" if recipe.prefix == "Gemma3" else "Config")
    )
    model_class = getattr(
        transformers,
        recipe.prefix + ("LMHeadModel" if recipe.prefix == "GPT2" else "ForCausalLM"),
    )
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    attention = changes.pop("attention", "eager")
    config = config_class(vocab_size=VOCABULARY, **tokens, **{**recipe.settings, **changes})
    config._attn_implementation = attention
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.25 * noise)
    return model


def record_input(module: nn.Module, into: list[Tensor]) -> Any:
    """A plain hook of torch that keeps what a module reads."""

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        into[:] = [args[0] if args else kwargs["hidden_states"]]

    return module.register_forward_pre_hook(keep, with_kwargs=True)


def record_output(module: nn.Module, into: list[Tensor]) -> Any:
    """A plain hook of torch that keeps what a module returns."""

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        into[:] = [output if isinstance(output, Tensor) else output[0]]

    return module.register_forward_hook(keep)
