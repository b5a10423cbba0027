"""Where vLLM's models keep the residual stream: in what their norms are given.

A block of vLLM reads its stream through two norms, and the last norm reads that of all blocks. In
GPT-2 a norm is given the stream itself. In the Llama-like families it is given a pair, the output
of the module before and the residual, and adds them; then the stream is their sum. So each site is
an argument of a norm:

    Ln.pre   the norm before the attention of block n
    Ln.mid   the norm before its MLP
    Ln.post  = L(n+1).pre; after the last block the last norm

Both the skip path and what the norm feeds read these arguments, so both see what is written there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lrqp_torch.errors import ServingError
from lrqp_torch.stream.sites import Site

NORMS: Mapping[str, tuple[str, str]] = {
    "GPT2Block": ("ln_1", "ln_2"),
    **dict.fromkeys(
        (
            "GemmaDecoderLayer",
            "GraniteDecoderLayer",
            "LlamaDecoderLayer",
            "MistralDecoderLayer",
            "MixtralDecoderLayer",
            "OlmoeDecoderLayer",
            "Qwen2DecoderLayer",
            "Qwen2MoeDecoderLayer",
            "Qwen3DecoderLayer",
            "Qwen3MoeDecoderLayer",
        ),
        ("input_layernorm", "post_attention_layernorm"),
    ),
}
"""The norms before attention and MLP, by the class of vLLM's blocks."""
LAST = ("norm", "ln_f")
"""What the last norm may be called, beside the blocks."""
MISSING = "PPMissingLayer"
"""Stands for what another rank of a pipeline has."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of one rank's model."""

    blocks: nn.ModuleList  # all of the model's, those of other ranks as stand-ins
    norms: tuple[str, str]  # names of the two norms of a block
    last: nn.Module  # the last norm, or its stand-in

    @classmethod
    def of(cls, model: nn.Module, name: str = "") -> "Blocks":
        """Find them in a model, which errors call by its name, by default that of its class.

        Raises:
            ServingError: a family whose streams are not known here, by name.
        """
        for module in model.modules():
            for child in module.children():
                kinds = {type(block).__name__ for block in child.children()} - {MISSING}
                if not isinstance(child, nn.ModuleList) or len(kinds) != 1:
                    continue
                norms = NORMS.get(kinds.pop())
                last = next((getattr(module, name) for name in LAST if hasattr(module, name)), None)
                if norms is not None and isinstance(last, nn.Module):
                    return cls(child, norms, last)
        families = ", ".join(sorted(NORMS))
        raise ServingError(
            f"edits are not served in {name or type(model).__name__}: its blocks are none of those "
            f"whose residual stream is known here ({families}). Edit it with edit.at in "
            f"transformers"
        )

    def norm_of(self, site: Site) -> nn.Module | None:
        """The norm that is given the stream at a site; None where another rank has it.

        Raises:
            ServingError: no such place, or one that is not served.
        """
        layer, part = site.layer, site.part
        if site.path is not None or site.stack or part not in ("pre", "mid", "post"):
            raise ServingError(f"site {site} is not served in vLLM: Ln.pre, Ln.mid and Ln.post are")
        if layer >= len(self.blocks) + (part == "pre"):
            raise ServingError(f"site {site}: the model has {len(self.blocks)} blocks")
        if part == "post":
            layer, part = layer + 1, "pre"
        if layer == len(self.blocks):
            return None if type(self.last).__name__ == MISSING else self.last
        block = self.blocks[layer]
        if type(block).__name__ == MISSING:
            return None
        norm: nn.Module = getattr(block, self.norms[part == "mid"])
        return norm

    def here(self, sites: Iterable[Site]) -> dict[Site, nn.Module]:
        """Those of the sites that this rank has, with the norm of each."""
        found = {site: self.norm_of(site) for site in sites}
        return {site: norm for site, norm in found.items() if norm is not None}
