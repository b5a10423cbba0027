"""Tiny random models of many classes of transformers, from their configurations alone."""

from contextlib import suppress
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lrqp_torch.stream import TESTED_TRANSFORMERS

WIDTH, LAYERS = 32, 3
OLDEST = transformers.__version__ == TESTED_TRANSFORMERS[0]
TWO_STACKS = (
    "BartForConditionalGeneration",
    "BigBirdPegasusForConditionalGeneration",
    "BlenderbotSmallForConditionalGeneration",
    "BlenderbotForConditionalGeneration",
    "LongT5ForConditionalGeneration",
    "M2M100ForConditionalGeneration",
    "MBartForConditionalGeneration",
    "MT5ForConditionalGeneration",
    "MarianMTModel",
    "MvpForConditionalGeneration",
    "NllbMoeForConditionalGeneration",
    "PLBartForConditionalGeneration",
    "PegasusForConditionalGeneration",
    "SwitchTransformersForConditionalGeneration",
    "T5ForConditionalGeneration",
    "T5Gemma2ForConditionalGeneration",
    "T5GemmaForConditionalGeneration",
    "UMT5ForConditionalGeneration",
)
"""Encoder–decoders."""
_SIZES: dict[int, str] = {
    WIDTH: """hidden_size d_model n_embd dim embedding_size attention_hidden_size lru_width
        word_embed_proj_dim emb_dim mamba_d_ssm embed_dim out_hidden_size
        cross_attention_hidden_size""",
    64: """intermediate_size ffn_dim n_inner d_ff hidden_dim ffn_hidden_size encoder_ffn_dim
        decoder_ffn_dim intermediate_size_mlp block_ff_dim vocab_size max_position_embeddings
        n_positions max_seq_len vocab_size_per_layer_input""",
    LAYERS: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
        conv_L_cache depth""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads
        decoder_attention_heads num_local_experts num_experts n_routed_experts moe_num_experts
        mamba_n_heads mamba_num_heads linear_num_value_heads time_step_rank rotary_dim
        qk_rope_head_dim qk_nope_head_dim conv_kernel mamba_d_conv""",
    2: """num_key_value_heads num_experts_per_tok num_kv_heads linear_num_key_heads expand
        mamba_expand index_n_heads moe_topk eos_token_id""",
    8: """head_dim d_kv v_head_dim linear_key_head_dim linear_value_head_dim state_size
        mamba_d_state ssm_state_size mamba_d_head chunk_size mamba_chunk_size sliding_window
        index_head_dim index_topk hidden_size_per_layer_input block_multiple_of""",
    16: """moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank
        mamba_head_dim""",
    1: """n_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups n_groups
        bos_token_id decoder_start_token_id""",
    0: "pad_token_id num_kv_shared_layers",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
"""What the classes call the sizes of their models."""


def build_tiny(class_name: str, text: dict[str, Any] | None = None, **changes: Any) -> nn.Module:
    """A random model of a class, 32 wide with three blocks, in evaluation mode.

    Args:
        class_name: of transformers.
        text: settings of the text tower alone, where there are several.
        changes: other settings.
    """
    if not hasattr(transformers, class_name) and OLDEST:
        pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
    kind = getattr(transformers, class_name)
    config = kind.config_class(**{**_small(kind.config_class()), **changes})
    _shrink(config, changes)
    for name, value in (text or {}).items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    return kind(config).eval()


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # a setting that each layer has of its own
        return False


def _small(config: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in SMALL.items()
        if _has(config, name)
        and not isinstance(getattr(type(config), name, None), property)
        and not isinstance(getattr(config, name), list | tuple | dict)
    }


def _shrink(config: Any, changes: dict[str, Any]) -> None:
    for name, value in {**_small(config), **changes}.items():
        if _has(config, name):
            # Some are computed from others.
            with suppress(AttributeError):
                setattr(config, name, value)
    for part in ("text_config", "vision_config", "encoder", "decoder"):
        inner = getattr(config, part, None)
        if isinstance(inner, transformers.PreTrainedConfig):
            _shrink(inner, changes)
