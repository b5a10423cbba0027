"""Site names, and where a model keeps its residual stream.

A site is a place in the residual stream, named as in "Intervening in the Residual Stream":
``Ln.pre`` is the input of block n, ``Ln.mid`` the stream after its attention and before its MLP,
``Ln.post`` its output, which is ``L(n+1).pre`` except after the last block.

Where these places are is found by running the model (:mod:`~.discovery`). A row registered for a
family stands in for what is found, and is held to the same proof.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

from torch import nn

from lrqp_torch.errors import SiteError, UnknownFamilyError
from lrqp_torch.stream.compiled import descend, inner_model
from lrqp_torch.stream.discovery import BlockSites, Cut, Stack, discover, hold_to_proof

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
    """Where a family of models keeps its residual stream, where that cannot be found or is meant
    otherwise: a row for :func:`register_family`.

    Module paths may be dotted.

    Attributes:
        blocks: the list of blocks, from the trunk.
        first_reader: the module of a block that first reads the stream, from the block: its first
            norm, or its attention where that comes without one.
        attention_output: the module of a block whose output (or first output), times ``scale``, is
            added to the stream after attention, from the block. In families that normalise before
            adding, it is that norm.
        output_projection: the module of a block that maps the heads' outputs, side by side, back to
            the stream (W_O), from the block.
        without_mid: tells from the config why blocks have no stream between attention and MLP, or
            None where they have one; :func:`in_parallel` is the usual reason.
        absolute_positions: whether the model adds learned position embeddings to columns of the
            input, so that a left-padded batch needs ``position_ids``.
        trunk: the module that reads the token ids and the attention mask in every forward pass,
            from the base model (``model.base_model``); by default that itself.
        scale: what the output is multiplied by before it is added; None where the output itself is
            the stream between attention and MLP.
    """

    blocks: str
    first_reader: str
    attention_output: str
    output_projection: str
    without_mid: Callable[[Any], str | None] = lambda config: None
    absolute_positions: bool = False
    trunk: str = ""
    scale: float | None = 1.0

    def stack(self, model: nn.Module) -> Stack:
        """The row as the sites of a model's blocks.

        Raises:
            UnknownFamilyError: the model has no such modules.
        """
        base = cast(nn.Module, getattr(model, "base_model", model))
        names = {id(module): name for name, module in model.named_modules()}
        try:
            trunk = base.get_submodule(self.trunk)
            count = len(cast(nn.ModuleList, trunk.get_submodule(self.blocks)))
        except (AttributeError, TypeError) as error:
            raise UnknownFamilyError(
                f"the row of {type(model).__name__} names blocks that it does not have: {error}"
            ) from error
        reason = self.without_mid(getattr(model, "config", None))
        cut = None if reason is not None else Cut(self.attention_output, self.scale)
        each = BlockSites(self.first_reader, cut, self.output_projection, reason)
        path = names[id(trunk)]
        return Stack(path, self.blocks, (each,) * count, self.absolute_positions)


def in_parallel(config: Any) -> str:
    """The reason of families whose attention and MLP read the same stream."""
    return "runs attention and MLP in parallel"


FAMILIES: dict[str, Family] = {}
"""Rows by ``config.model_type`` that stand in for what is found; see :func:`register_family`."""

_LAYOUTS: dict[tuple[object, ...], Stack] = {}
"""What was found and proven in this process."""

_OF_MODELS: WeakKeyDictionary[nn.Module, tuple[Family | None, dict[str, Any], Stack]] = (
    WeakKeyDictionary()
)
_ATTENTION = "_attn_implementation_internal"


def register_family(model_type: str, family: Family) -> None:
    """Add a row: it then says where models of ``config.model_type`` keep their stream.

    The row is held to the cut test on the first use of each class and configuration.

    Raises:
        UnknownFamilyError: the type has another row already.
    """
    if FAMILIES.get(model_type, family) != family:
        raise UnknownFamilyError(
            f"model type {model_type!r} has a row already; choose another name"
        )
    FAMILIES[model_type] = family


def layout_of(model: nn.Module) -> Stack:
    """Where a model's blocks and their sites are, found and proven on its first use.

    Kept by class and configuration, so that a model runs for it once in a process.

    Raises:
        UnknownFamilyError: the model is not from transformers, cannot be run on a few tokens, has
            no run of blocks, or more than one; or its family's row does not pass the cut test.
    """
    inner = inner_model(model)
    config: Any = getattr(inner, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise UnknownFamilyError(
            f"{type(model).__name__} has no config.model_type; pass a transformers model"
        )
    row = FAMILIES.get(model_type)
    # What a context asks for over and over is kept by model, for as long as its settings stay.
    known = _OF_MODELS.get(inner)
    if known is not None and known[0] is row:
        # Of the settings, contexts themselves change how attention is computed.
        settings = vars(config)
        if settings == known[1] or {**settings, _ATTENTION: known[1].get(_ATTENTION)} == known[1]:
            return known[2]
    key = (type(inner), json.dumps(config.to_dict(), sort_keys=True, default=str), row)
    if key not in _LAYOUTS:
        try:
            _LAYOUTS[key] = _found(inner) if row is None else _proven(inner, row)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            if isinstance(error, UnknownFamilyError):
                raise
            raise UnknownFamilyError(
                f"{type(inner).__name__} could not be run on a few tokens, so where its stream is "
                f"could not be found or proven ({type(error).__name__}: {str(error)[:200]})"
            ) from error
    _OF_MODELS[inner] = (row, dict(vars(config)), _LAYOUTS[key])
    return _LAYOUTS[key]


def _found(model: nn.Module) -> Stack:
    stacks = discover(model)
    if len(stacks) != 1:
        what = "no list of blocks that carry a stream on from one to the next"
        if stacks:
            names = " and ".join(f"{s.trunk}.{s.blocks}".lstrip(".") for s in stacks)
            what = f"{len(stacks)} stacks of blocks ({names}), and sites name those of one alone"
        raise UnknownFamilyError(
            f"{type(model).__name__} has {what}. If its blocks have a stream (rows, tokens, width)"
            f", name its modules: lrqp_torch.register_family("
            f"{cast(Any, model).config.model_type!r}, Family(blocks='layers', first_reader="
            f"'input_layernorm', attention_output='self_attn', output_projection="
            f"'self_attn.o_proj'))"
        )
    return stacks[0]


def _proven(model: nn.Module, row: Family) -> Stack:
    stack = row.stack(model)
    hold_to_proof(model, stack)
    return stack


@dataclass(frozen=True)
class Located:
    """A site in a particular model: the modules that a hook needs."""

    site: Site
    block: nn.Module
    places: BlockSites

    @property
    def first_reader(self) -> nn.Module:
        """The module that first reads the block's input."""
        return descend(self.block, self.places.first_reader)

    @property
    def cut(self) -> Cut:
        """Where ``mid`` is."""
        assert self.places.cut is not None
        return self.places.cut

    @property
    def attention_output(self) -> nn.Module:
        """The module whose output is (part of) the stream after attention."""
        return descend(self.block, self.cut.module)


def trunk_of(model: nn.Module) -> nn.Module:
    """The module that holds the blocks and reads the attention mask."""
    return descend(inner_model(model), layout_of(model).trunk)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of a model, first to last."""
    return cast(nn.ModuleList, descend(trunk_of(model), layout_of(model).blocks))


def projection_of(model: nn.Module, layer: int) -> nn.Module:
    """The module of a block that maps its heads' outputs, side by side, to the stream (W_O).

    Raises:
        UnknownFamilyError: no module of the block does.
    """
    path = layout_of(model).each[layer].projection
    if path is None:
        raise UnknownFamilyError(
            f"block {layer} of {type(inner_model(model)).__name__} has no module that maps heads "
            f"to the stream, so its heads cannot be told apart"
        )
    return blocks_of(model)[layer].get_submodule(path)


def head_count(model: nn.Module) -> int:
    """Attention heads of each block; of the text part in models that also see."""
    return int(cast(Any, inner_model(model)).config.get_text_config().num_attention_heads)


def locate(model: nn.Module, name: str | Site) -> Located:
    """Find a site's modules in a model.

    Raises:
        SiteError: bad name, layer out of range, or a ``mid`` that the block does not have.
        UnknownFamilyError: see :func:`layout_of`.
    """
    site, layout = Site.parse(name), layout_of(model)
    if site.layer >= len(layout.each):
        last = len(layout.each) - 1
        raise SiteError(f"{site}: the model has {last + 1} blocks, L0 to L{last}")
    places = layout.each[site.layer]
    if site.part == "mid" and places.cut is None:
        raise SiteError(
            f"{site}: block {site.layer} of {type(inner_model(model)).__name__} "
            f"{places.without_mid}; use L{site.layer}.pre or L{site.layer}.post"
        )
    blocks = descend(descend(inner_model(model), layout.trunk), layout.blocks)
    return Located(site, cast(nn.ModuleList, blocks)[site.layer], places)


def has_mid(model: nn.Module) -> bool:
    """Whether some of the model's blocks have a stream between attention and MLP."""
    return any(places.cut is not None for places in layout_of(model).each)


def all_sites(model: nn.Module, parts: Sequence[Part] = ("pre", "mid")) -> list[str]:
    """Names of all sites of the given parts, in the order of a forward pass.

    Parts that a block lacks are left out; ``post`` duplicates the next ``pre``.
    """
    return [
        f"L{layer}.{part}"
        for layer, places in enumerate(layout_of(model).each)
        for part in PARTS
        if part in parts and (part != "mid" or places.cut is not None)
    ]
