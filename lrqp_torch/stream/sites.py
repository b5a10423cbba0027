"""Site names, and the table that says where each model family keeps its residual stream.

A site is a place in the residual stream, named as in "Intervening in the Residual Stream":
``Ln.pre`` is the input of block n, ``Ln.mid`` the stream after its attention and before its MLP,
``Ln.post`` its output, which is ``L(n+1).pre`` except after the last block.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import nn

from lrqp_torch.errors import SiteError, UnknownFamilyError

Part = Literal["pre", "mid", "post"]
PARTS: tuple[Part, ...] = ("pre", "mid", "post")
_NAME = re.compile(r"L(\d+)\.(pre|mid|post)")


@dataclass(frozen=True, order=True)
class Site:
    """One place in the residual stream; sorts in the order in which a forward pass reaches it."""

    layer: int
    part_index: int

    @classmethod
    def parse(cls, name: "str | Site") -> "Site":
        """The site of a name such as ``"L6.mid"``.

        Raises:
            SiteError: the name does not read ``Ln.pre``, ``Ln.mid`` or ``Ln.post``.
        """
        if isinstance(name, Site):
            return name
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise SiteError(
                f"{name!r} is no site; write L<layer>.pre, .mid or .post, as in 'L6.mid'"
            )
        return cls(int(match[1]), PARTS.index(cast(Part, match[2])))

    @property
    def part(self) -> Part:
        """``"pre"``, ``"mid"`` or ``"post"``."""
        return PARTS[self.part_index]

    def __str__(self) -> str:
        return f"L{self.layer}.{self.part}"


@dataclass(frozen=True)
class Family:
    """Where a family of Hugging Face models keeps its residual stream: one row of the table.

    Module paths may be dotted.

    Attributes:
        blocks: the list of blocks, from the trunk.
        first_reader: the module of a block that first reads the stream, from the block: its first
            norm, or its attention where that comes without one.
        attention_output: the module of a block whose output (or first output) is added to the
            stream after attention, from the block. In families that normalise before adding, it
            is that norm.
        output_projection: the module of a block that maps the heads' outputs, side by side, back to
            the stream (W_O), from the block.
        without_mid: tells from the config why blocks have no stream between attention and MLP, or
            None where they have one; :func:`in_parallel` is the usual reason.
        absolute_positions: whether the model adds learned position embeddings to columns of the
            input, so that a left-padded batch needs ``position_ids``.
        trunk: the module that reads the token ids and the attention mask in every forward pass,
            from the base model (``model.base_model``); by default that itself.
    """

    blocks: str
    first_reader: str
    attention_output: str
    output_projection: str
    without_mid: Callable[[Any], str | None] = lambda config: None
    absolute_positions: bool = False
    trunk: str = ""


def in_parallel(config: Any) -> str:
    """The reason of families whose attention and MLP read the same stream."""
    return "runs attention and MLP in parallel"


def _in_parallel_if(option: str) -> Callable[[Any], str | None]:
    return lambda config: in_parallel(config) if getattr(config, option) else None


def _opt_without_mid(config: Any) -> str | None:
    return (
        None if config.do_layer_norm_before else "normalises the stream itself after adding to it"
    )


def _falcon_without_mid(config: Any) -> str | None:
    return in_parallel(config) if config.new_decoder_architecture or config.parallel_attn else None


_LLAMA = Family("layers", "input_layernorm", "self_attn", "self_attn.o_proj")
_GEMMA2 = replace(_LLAMA, attention_output="post_attention_layernorm")
_GPT2 = Family("h", "ln_1", "attn", "attn.c_proj", absolute_positions=True)

FAMILIES: dict[str, Family] = {
    "cohere": replace(_LLAMA, without_mid=in_parallel),
    "falcon": Family(
        "h",
        "input_layernorm",
        "self_attention",
        "self_attention.dense",
        without_mid=_falcon_without_mid,
    ),
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3": replace(_GEMMA2, blocks="language_model.layers"),
    "gemma3_text": _GEMMA2,
    "glm4": replace(_LLAMA, attention_output="post_self_attn_layernorm"),
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": replace(_GPT2, output_projection="attn.attention.out_proj"),
    "gpt_neox": Family(
        "layers",
        "input_layernorm",
        "post_attention_dropout",
        "attention.dense",
        without_mid=_in_parallel_if("use_parallel_residual"),
    ),
    "gptj": Family("h", "ln_1", "attn", "attn.out_proj", without_mid=in_parallel),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": replace(_LLAMA, first_reader="self_attn", attention_output="post_attention_layernorm"),
    "opt": Family(
        "layers",
        "self_attn_layer_norm",
        "self_attn",
        "self_attn.out_proj",
        without_mid=_opt_without_mid,
        trunk="decoder",
    ),
    "phi": Family(
        "layers", "input_layernorm", "self_attn", "self_attn.dense", without_mid=in_parallel
    ),
    "phi3": replace(_LLAMA, attention_output="resid_attn_dropout"),
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": replace(_LLAMA, without_mid=_in_parallel_if("use_parallel_residual")),
    "starcoder2": _LLAMA,
}
"""Rows by ``config.model_type``. Add one with :func:`register_family`."""


def register_family(model_type: str, family: Family) -> None:
    """Add a row: models whose ``config.model_type`` is ``model_type`` can then be edited.

    Raises:
        UnknownFamilyError: the type has another row already.
    """
    if FAMILIES.get(model_type, family) != family:
        raise UnknownFamilyError(
            f"model type {model_type!r} has a row already; choose another name"
        )
    FAMILIES[model_type] = family


@dataclass(frozen=True)
class Located:
    """A site in a particular model: the modules that a hook needs."""

    site: Site
    block: nn.Module
    family: Family

    @property
    def first_reader(self) -> nn.Module:
        """The module that first reads the block's input."""
        return self.block.get_submodule(self.family.first_reader)

    @property
    def attention_output(self) -> nn.Module:
        """The module whose output is added to the stream after attention."""
        return self.block.get_submodule(self.family.attention_output)


def family_of(model: nn.Module) -> Family:
    """The table row of a model.

    Raises:
        UnknownFamilyError: the model is not from transformers, or its type has no row.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise UnknownFamilyError(
            f"{type(model).__name__} has no config.model_type; pass a transformers model"
        )
    if model_type not in FAMILIES:
        raise UnknownFamilyError(
            f"model type {model_type!r} has no row (known: {', '.join(sorted(FAMILIES))}); with "
            f"the names of its own modules in place of Llama's, add one: "
            f"lrqp_torch.register_family({model_type!r}, Family(blocks='layers', "
            f"first_reader='input_layernorm', attention_output='self_attn', "
            f"output_projection='self_attn.o_proj'))"
        )
    return FAMILIES[model_type]


def trunk_of(model: nn.Module) -> nn.Module:
    """The module that holds the blocks and reads the attention mask."""
    # A model with adapters of peft names its tuner, and not its trunk, a base model.
    inner = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    base = cast(nn.Module, getattr(inner, "base_model", inner))
    return base.get_submodule(family_of(model).trunk)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of a model, first to last."""
    return cast(nn.ModuleList, trunk_of(model).get_submodule(family_of(model).blocks))


def head_count(model: nn.Module) -> int:
    """Attention heads of each block; of the text part in models that also see."""
    return int(cast(Any, model).config.get_text_config().num_attention_heads)


def locate(model: nn.Module, name: str | Site) -> Located:
    """Find a site's modules in a model.

    Raises:
        SiteError: bad name, layer out of range, or a ``mid`` that the family does not have.
        UnknownFamilyError: the family has no row.
    """
    site, family, blocks = Site.parse(name), family_of(model), blocks_of(model)
    if site.layer >= len(blocks):
        raise SiteError(f"{site}: the model has {len(blocks)} blocks, L0 to L{len(blocks) - 1}")
    reason = family.without_mid(getattr(model, "config", None))
    if site.part == "mid" and reason is not None:
        raise SiteError(
            f"{site}: {type(model).__name__} {reason}, so there is no stream between attention and "
            f"MLP; use L{site.layer}.pre or L{site.layer}.post"
        )
    return Located(site, blocks[site.layer], family)


def has_mid(model: nn.Module) -> bool:
    """Whether the model's blocks have a stream between attention and MLP."""
    return family_of(model).without_mid(getattr(model, "config", None)) is None


def all_sites(model: nn.Module, parts: Sequence[Part] = ("pre", "mid")) -> list[str]:
    """Names of all sites of the given parts, in the order of a forward pass.

    Parts that the family lacks are left out; ``post`` duplicates the next ``pre``.
    """
    present = [part for part in PARTS if part in parts and (part != "mid" or has_mid(model))]
    return [f"L{layer}.{part}" for layer in range(len(blocks_of(model))) for part in present]
