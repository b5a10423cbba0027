"""Site names, and where a model keeps its residual stream.

A site is a place in the residual stream, named as in "Intervening in the Residual Stream":
``Ln.pre`` is the input of block n, ``Ln.mid`` the stream after its attention and before its MLP,
``Ln.post`` its output, which is ``L(n+1).pre`` except after the last block. ``Ln.attn_out`` and
``Ln.mlp_out`` are what the two add to the stream, ``Ln.z`` and ``Ln.Hh.z`` the outputs of all heads
and of one before W_O, and ``final`` the stream after the last norm. Encoder–decoders put
``encoder.`` or ``decoder.`` in front; a decoder's ``mid`` is behind its cross-attention.
:meth:`Site.module` is any module of any ``nn.Module``.

Where these places are is found by running the model (:mod:`~.discovery`). A row registered for a
family stands in for what is found, and is held to the same proof.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from operator import attrgetter, contains
from threading import RLock
from typing import Any, Literal, Self, cast
from weakref import WeakKeyDictionary, ref

from torch import nn

from lrqp_torch.errors import (
    LRQPError,
    ModelError,
    SiteError,
    UnknownFamilyError,
    quoted,
)
from lrqp_torch.stream.compiled import (
    Census,
    descend,
    inner_model,
    modules_of,
    own_forward,
    require_module,
    unwrapped,
    wrapped,
)
from lrqp_torch.stream.discovery import (
    Blocks,
    BlockSites,
    Cut,
    Example,
    Padding,
    Stack,
    built,
    discover,
    hold_to_proof,
)
from lrqp_torch.stream.passes import forward_of
from lrqp_torch.stream.repeats import same

Part = Literal["pre", "z", "attn_out", "mid", "mlp_out", "post", "final"]
Side = Literal["input", "output"]
PARTS: tuple[Part, ...] = ("pre", "z", "attn_out", "mid", "mlp_out", "post", "final")
"""Places of a block in the order in which a forward pass reaches them; ``final`` is behind all."""

STACKS = ("encoder", "decoder")
"""Stacks of blocks of a model that has two, in the order in which they run."""

KINDS = ("one stack of blocks", "an encoder and a decoder")

_NAME = re.compile(
    r"(?:(encoder|decoder)\.)?(?:L(\d+)\.(?:(pre|attn_out|mid|mlp_out|post)|(?:H(\d+)\.)?z)|final)"
)
_MODULE = re.compile(r"(.*):(input|output)")
_FOREIGN = re.compile(
    r"(?:(encoder|decoder)\.)?(?:blocks\.)?(\d+)\."
    r"(?:hook_(?:resid_(pre|mid|mid_cross|post)|(attn_out|mlp_out))|attn\.hook_(z))"
)


@dataclass(frozen=True)
class Site:
    """One place in a model; sorts in the order in which a forward pass reaches it.

    Attributes:
        part: which place of a block, or ``"final"``.
        layer: the block; 0 where the place is in none, as all blocks may matter to it.
        stack: ``"encoder"`` or ``"decoder"`` in a model that has both, else empty.
        head: one head of ``z``, or None for all of them, side by side.
        path: of a module, for :meth:`module`; else None.
        side: of that module.
    """

    part: Part
    layer: int = 0
    stack: str = ""
    head: int | None = None
    path: str | None = None
    side: Side = "output"

    @classmethod
    def parse(cls, name: "str | Site") -> "Site":
        """The site of a name such as ``"L6.mid"``, or of TransformerLens' name for it.

        Raises:
            SiteError: it is no such name.
        """
        if isinstance(name, Site):
            return name
        text = name if isinstance(name, str) else ""
        if match := _NAME.fullmatch(text):
            stack, layer, part, head = match.groups()
            part = part or ("final" if layer is None else "z")
            head = None if head is None else int(head)
            return cls(cast(Part, part), int(layer or 0), stack or "", head)
        if match := _FOREIGN.fullmatch(text):
            stack, layer, stream, added, z = match.groups()
            if stack == "decoder" and stream == "mid":
                raise SiteError(
                    f"{name!r} lies between self-attention and cross-attention; a decoder's mid is "
                    f"behind both (hook_resid_mid_cross): write 'decoder.L{layer}.mid'"
                )
            stream = "mid" if stream == "mid_cross" else stream
            return cls(cast(Part, stream or added or z), int(layer), stack or "")
        if match := _MODULE.fullmatch(text):
            return cls.module(match[1], cast(Side, match[2]))
        raise SiteError(
            f"{quoted(name)} is no site; write L<layer>.pre, .mid or .post, as in 'L6.mid'; "
            f".attn_out, .mlp_out, .z or .H<head>.z; final; any of these behind encoder. or "
            f"decoder.; or Site.module(path, 'input' or 'output')"
        )

    @classmethod
    def module(cls, path: str, side: Side = "output") -> Self:
        """What a module of any ``nn.Module`` reads or returns, by its path in ``named_modules``.

        Its (first) tensor is (rows, features) or (rows, tokens, features); in (rows, features) the
        only position is 0.

        Raises:
            SiteError: another side.
        """
        if not isinstance(path, str) or side not in ("input", "output"):
            raise SiteError(
                f"Site.module takes a path and 'input' or 'output', got {quoted(path)} and "
                f"{quoted(side)}"
            )
        return cls("final", path=path, side=side)

    def __str__(self) -> str:
        return self._name

    @cached_property
    def _name(self) -> str:
        if self.path is not None:
            return f"{self.path}:{self.side}"
        return f"{self.stack}.{self.bare}" if self.stack else self.bare

    @property
    def bare(self) -> str:
        """The name within its stack."""
        head = "" if self.head is None else f"H{self.head}."
        return "final" if self.part == "final" else f"L{self.layer}.{head}{self.part}"

    def __lt__(self, other: "Site") -> bool:
        return self._order < other._order

    @cached_property
    def _order(self) -> tuple[object, ...]:
        last, head = self.part == "final", -1 if self.head is None else self.head
        place = self.stack == "decoder", last, self.layer, PARTS.index(self.part), head
        return (*place, self.path or "", self.side)


class Captured(dict[str, Any]):
    """What was read, by the sites' own names; other names of a site find it too."""

    def __missing__(self, name: Any) -> Any:
        site = str(Site.parse(name))
        if site not in self:
            raise KeyError(name)
        return self[site]


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
            count = len([*trunk.get_submodule(self.blocks).children()])
        except (AttributeError, TypeError) as error:
            raise UnknownFamilyError(
                f"the row of {type(model).__name__} names blocks that it does not have: {error}"
            ) from error
        reason = self.without_mid(getattr(model, "config", None))
        cut = None if reason is not None else Cut(self.attention_output, self.scale)
        attention = cut if cut is not None and cut.scale is not None else None
        each = BlockSites(self.first_reader, cut, self.output_projection, reason, attention)
        path = names[id(trunk)]
        return Stack(path, self.blocks, (each,) * count, self.absolute_positions)


def in_parallel(config: Any) -> str:
    """The reason of families whose attention and MLP read the same stream."""
    return "runs attention and MLP in parallel"


FAMILIES: dict[str, Family] = {}
"""Rows by ``config.model_type`` that stand in for what is found; see :func:`register_family`."""

Stacks = Mapping[str, Stack]
"""The stacks of a model by name: one without a name, or an encoder's and a decoder's."""

_LAYOUTS: dict[tuple[object, ...], Stacks] = {}
"""What was found and proven in this process."""

_FINDING = RLock()
"""Held where a model is run on a few tokens, and out of its training mode meanwhile."""
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


KEPT = 64
"""Of so many edits and sites it is kept what contexts know of passes."""


class Known:
    """What is known of a model, and what that rests on: what contexts ask for over and over.

    It does not hold the model itself, which is freed as ever.

    Attributes:
        stacks: of the model.
        places: sites that were located, by the names that were given.
        passes: what contexts keep of passes for those after them.
    """

    def __init__(self, model: nn.Module, row: Family | None, stacks: Stacks) -> None:
        inner = inner_model(model)
        self.stacks, self.places = stacks, dict[str | Site, Located]()
        self.passes: dict[tuple[object, ...], Any] = {}
        self._inner, self._row, self._census = ref(inner), row, Census.of(model)
        config: Any = getattr(inner, "config", None)
        self._config, self._type = config, getattr(config, "model_type", None)
        self._settings = dict(_settings(config))
        self._same = same(self._settings)
        self._blocks: list[nn.Module] = []
        for stack in stacks.values():
            blocks = descend(descend(inner, stack.trunk), stack.blocks)
            self._blocks += blocks.children()
        self._own = [vars(block) for block in self._blocks]
        # Such as what a block multiplies by what it adds to the stream.
        self._numbers = [
            (own, name, value)
            for own in self._own
            for name, value in own.items()
            if isinstance(value, bool | float | str) and name != "training" and name[0] != "_"
        ]
        self._computed = [type(block).forward for block in self._blocks]
        self._kinds = {type(block): type(block).forward for block in self._blocks}
        self._plain = self._census.plain
        # What stands in place of a forward may hold the model.
        self._replaced = [_reference(own_forward(block)) for block in self._blocks]

    def holds(self, model: nn.Module, census: Census | None = None) -> bool:
        """Whether the model is still what it was found to be; ``census``: that of it now."""
        inner = self._inner()
        if inner is None or inner is not inner_model(model):
            return False
        census = Census.of(model) if census is None else census
        if census is not self._census:
            return False
        if getattr(inner, "config", None) is not self._config:
            return False
        if self._type is not None and FAMILIES.get(self._type) is not self._row:
            return False
        if any([own.get(name) != value for own, name, value in self._numbers]):
            return False
        if census.plain and self._plain:
            # They are of the classes that they were; these may compute something else.
            if [kind.forward for kind in self._kinds] != [*self._kinds.values()]:
                return False
        elif [*map(_forward, map(type, self._blocks))] != self._computed:
            return False
        elif any(self._replaced) or any(map(contains, self._own, _FORWARD)):
            for block, replaced in zip(self._blocks, self._replaced, strict=True):
                if own_forward(block) is not (replaced and replaced()):
                    return False
        # Of the settings, contexts themselves change how attention is computed.
        settings, known = _settings(self._config), self._settings
        if self._same is not None and self._same(settings):
            return True
        return settings == known or {**settings, _ATTENTION: known.get(_ATTENTION)} == known

    def note(self, key: tuple[object, ...], what: Any) -> None:
        """Keep what contexts know of passes, of the latest :data:`KEPT`."""
        self.passes.pop(key, None)
        if len(self.passes) >= KEPT:
            self.passes.pop(next(iter(self.passes)), None)
        self.passes[key] = what

    def keep(self, name: str | Site, found: "Located", model: nn.Module) -> "Located":
        """Remember a site that was located."""
        found, inner = found.placed(model), self._inner()
        whole = model, inner
        if found.module not in whole and found.trunk.module not in whole:
            self.places[name] = found
        return found


def _settings(config: Any) -> dict[str, Any]:
    """What a model's configuration says, be it an object, a dictionary or none."""
    return config if isinstance(config, dict) else getattr(config, "__dict__", {})


_forward, _FORWARD = attrgetter("forward"), repeat("forward")


def _reference(held: Any) -> Callable[[], Any] | None:
    """A weak reference to what may be None."""
    try:
        return None if held is None else ref(held)
    except TypeError:
        return lambda: None  # and so never the same


_OF_MODELS: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


known_of = _OF_MODELS.get
"""What is known of a model, if it still :meth:`~Known.holds`; or None."""


def stacks_of(model: nn.Module) -> Stacks:
    """A model's stacks of blocks and where their sites are, found and proven on its first use.

    Kept by class and configuration, so that a model runs for it once in a process.

    Raises:
        UnknownFamilyError: the model takes no ``input_ids``, cannot be run on a few tokens, or
            has no run of blocks; or its family's row does not pass the cut test.
    """
    return _known(model).stacks


def _known(model: nn.Module, example: Example = None) -> Known:
    """What is known of a model as it is now; see :func:`stacks_of` and :func:`all_sites`."""
    require_module(model)
    known = _OF_MODELS.get(model)
    if known is not None and known.holds(model) and example is None:
        return known
    inner = inner_model(model)
    for part in inner.modules():
        require_module(part)
    config: Any = getattr(inner, "config", None)
    model_type = getattr(config, "model_type", None)
    told = example is not None or "input_ids" in forward_of(inner).parameters
    if model_type is None and (not told or wrapped(inner)):
        raise UnknownFamilyError(
            f"{type(model).__name__} has no config.model_type, and no input_ids; pass a "
            f"transformers model, name its modules: Site.module(path, 'output'); or say once what "
            f"it is run on: lrqp_torch.all_sites(model, inputs=...){wrapped(inner)}"
        )
    row, kind = FAMILIES.get(model_type), built(inner)  # type: ignore[arg-type]
    settings = config.to_dict() if hasattr(config, "to_dict") else _settings(config)
    settings = json.dumps(settings, sort_keys=True, default=str)
    # What stands in place of a forward may hold the model, and no other model has it.
    key = None if any(part[3] for part in kind) else (kind, settings, row)
    with _FINDING:
        stacks = None if key is None or example is not None else _LAYOUTS.get(key)
        try:
            if stacks is None:
                stacks = _found(inner, example) if row is None else {"": _proven(inner, row)}
        except Exception as error:  # what a model raises may be anything
            if isinstance(error, UnknownFamilyError | ModelError):
                raise
            given, own = ("a few tokens", "") if example is None else ("the example", " another")
            raise UnknownFamilyError(
                f"{type(inner).__name__} could not be run on {given}, so where its stream is "
                f"could not be found or proven ({type(error).__name__}: {quoted(str(error))}). "
                f"Where it needs{own or ' more, such as images or sound'}, run it on some of your "
                f"inputs once: lrqp_torch.all_sites(model, inputs=...){wrapped(inner)}"
            ) from error
        if key is not None:
            _LAYOUTS[key] = stacks
    known = _OF_MODELS[model] = Known(model, row, stacks)
    return known


def layout_of(model: nn.Module, stack: str = "") -> Stack:
    """One of a model's stacks of blocks; see :func:`stacks_of`.

    Raises:
        UnknownFamilyError: as there; or the model has an encoder and a decoder, and which of them
            is meant is not said, or has no stack of this name.
    """
    stacks = stacks_of(model)
    if stack in stacks:
        return stacks[stack]
    kind, known = type(inner_model(model)).__name__, " and ".join(f"{name}." for name in stacks)
    if "" in stacks:
        raise UnknownFamilyError(f"{kind} has one stack of blocks: leave {stack}. out")
    if stack:
        raise UnknownFamilyError(
            f"the blocks of the {stack} of {kind} were not found, only those behind {known}"
        )
    raise UnknownFamilyError(
        f"{kind} is an encoder–decoder, and which stack of blocks is meant is not said: sites are "
        f"behind {known}, as in '{max(stacks)}.L0.mid'; what runs on the whole model, "
        f"as replay and attention patterns, is for models of one stack"
    )


def _found(model: nn.Module, example: Example = None) -> Stacks:
    base: Any = getattr(model, "base_model", model)
    try:
        stacks = discover(model, example)
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        # Some heads take other inputs, such as several choices an example; not so what they are on.
        prefix = next((name for name, part in model.named_modules() if part is base), "")
        if not prefix or isinstance(error, LRQPError) or example is not None:
            raise
        stacks = [replace(s, trunk=f"{prefix}.{s.trunk}".strip(".")) for s in discover(base)]
    paths = [f"{stack.trunk}.{stack.blocks}".strip(".") for stack in stacks]
    if "decoder_input_ids" in forward_of(model).parameters:
        named = {
            next((part for part in path.split(".") if part in STACKS), ""): stack
            for path, stack in zip(paths, stacks, strict=True)
        }
        if named and len(named) == len(stacks) and "" not in named:
            return named
    if len(stacks) != 1:
        config: Any = getattr(model, "config", None)
        what = "no list of blocks that carry a stream on from one to the next"
        if stacks:
            names = " and ".join(paths)
            what = f"{len(stacks)} stacks of blocks ({names}), and sites name those of one alone"
        raise UnknownFamilyError(
            f"{type(model).__name__} has {what}. If its blocks have a stream (rows, tokens, width)"
            f", name its modules: lrqp_torch.register_family("
            f"{getattr(config, 'model_type', 'its model_type')!r}, Family(blocks='layers', "
            f"first_reader='input_layernorm', attention_output='self_attn', output_projection="
            f"'self_attn.o_proj')); or one of them, Site.module(path, 'output')"
        )
    return {"": stacks[0]}


def _proven(model: nn.Module, row: Family) -> Stack:
    stack = row.stack(model)
    hold_to_proof(model, stack)
    return stack


@dataclass(frozen=True, eq=False)
class Trunk:
    """Whose calls say which tokens a site is given."""

    module: nn.Module  # what is given them
    stack: str = ""  # its name, for models that have several
    absolute: bool = False  # whether it counts columns where it is given no `position_ids`
    plain: bool = False  # whether it is no language model, so that a site's own tensor says it all
    # What padding does to other tokens; None where that was not tried.
    padding: Padding | None = None
    crossed: bool = False  # whether its sites were found with what cross-attention reads

    @classmethod
    def of(cls, model: nn.Module, stack: str = "", layout: Stack | None = None) -> "Trunk":
        """The trunk around one of the stacks of a transformers model."""
        layout = layout_of(model, stack) if layout is None else layout
        if layout.plain:
            return cls(inner_model(model), stack, plain=True)
        module = descend(inner_model(model), layout.trunk)
        found = cls(module, stack, layout.absolute_positions, padding=layout.padding)
        return replace(found, crossed=layout.crossed)


Home = tuple[dict[str, nn.Module | None], str, nn.Module]
"""A table of children, the name of one of them, and that."""


@dataclass(frozen=True, eq=False)
class Located:
    """A site in a particular model: what a hook needs.

    The stream there is residual + scale · tensor, of which the hook sees the tensor.
    """

    site: Site  # its name
    trunk: Trunk  # what says which tokens are there
    module: nn.Module  # whose input or output holds the tensor
    side: Side = "output"  # which of the two
    scale: float = 1.0  # what the tensor is multiplied by
    # The module whose input it is added to; None where it is the stream itself.
    residual: nn.Module | None = None
    # Modules whose outputs, times numbers, are added to scale · tensor before that.
    beside: tuple[tuple[nn.Module, float], ...] = ()
    features: slice | None = None  # which of its last axis belong to the site, or None for all
    # Where the module, and each that it is part of, is in the model.
    homes: tuple[Home, ...] = ()

    def placed(self, model: nn.Module) -> Self:
        """The same, with where it is in the model."""
        inner, homes = inner_model(model), list[Home]()
        parents = {
            module: (parent, child)
            for parent in modules_of(model)
            for child, module in parent._modules.items()
            if module is not None
        }
        at = self.module
        while at is not inner and at in parents:
            parent, child = parents.pop(at)
            homes.append((parent._modules, child, at))
            at = parent
        return replace(self, homes=tuple(homes))

    @property
    def replaced(self) -> bool:
        """Whether there is another module by now where this one was; or where one around it was,
        if it is not that within a wrapper, as of FSDP.
        """
        for table, name, module in self.homes:
            held = table.get(name)
            if held is not module:
                wrapped = module is not self.module and held is not None
                if not wrapped or module not in {*cast(nn.Module, held).modules()}:
                    return True
        return False

    @cached_property
    def block(self) -> Home | None:
        """The outermost member of a list of modules that the module is part of, or is; or outermost
        part of the model.
        """
        last = self.homes[-1] if self.homes else None
        return next((home for home in reversed(self.homes) if home[1].isdigit()), last)

    @cached_property
    def neighbours(self) -> list[nn.Module]:
        """The other modules of the block that are not part of the module."""
        block = self.block
        if block is None or block[2] is self.module:
            return []
        own = {*modules_of(self.module), block[2]}
        return [part for part in modules_of(block[2]) if part not in own]

    def may_hold_what(self, other: "Located") -> bool:
        """Whether it may be, by another name, what another site holds, and runs behind it."""
        if self.module is other.module and self.side == other.side:
            return True
        if self.block is None or other.block is None:
            return False
        table, name, block = other.block
        if other.module is block and other.side == "output" and self.side == "input":
            return name.isdigit() and self.module is table.get(str(int(name) + 1))
        return self.block[2] is block and (self.site.path or other.site.path) is not None

    @property
    def passes(self) -> object:
        """Equal for sites that are given the same tokens in the same calls."""
        return self if self.trunk.plain else self.trunk.module


def trunk_of(model: nn.Module) -> nn.Module:
    """The module that holds the blocks and reads the attention mask."""
    return Trunk.of(model).module


def blocks_of(model: nn.Module, stack: str = "") -> Blocks:
    """The blocks of a model, first to last."""
    trunk = Trunk.of(model, stack).module
    return [*descend(trunk, layout_of(model, stack).blocks).children()]


def projection_of(model: nn.Module, layer: int, stack: str = "") -> nn.Module:
    """The module of a block that maps its heads' outputs, side by side, to the stream (W_O).

    Raises:
        UnknownFamilyError: no module of the block does.
    """
    path = layout_of(model, stack).each[layer].projection
    if path is None:
        raise UnknownFamilyError(
            f"block {layer} of {type(inner_model(model)).__name__} has no module that maps heads "
            f"to the stream, so its heads cannot be told apart"
        )
    return descend(blocks_of(model, stack)[layer], path)


def head_count(model: nn.Module) -> int:
    """Attention heads of each block; of the text part in models that also see."""
    return int(cast(Any, inner_model(model)).config.get_text_config().num_attention_heads)


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_v_heads")
_HEAD_WIDTHS = (
    "v_head_dim",
    "head_v_dim",
    "attention_head_size",
    "key_value_proj_dim",
    "head_dim",
    "head_size",
)
"""What attention modules call the number of their heads, and the width of what each returns."""


def _heads_of(located: Located, model: nn.Module, block: nn.Module) -> tuple[int, int]:
    """How many heads lie side by side in what a projection reads, and how wide each is."""
    names = {module: name for name, module in block.named_modules()}
    # The layers of GPT-2's kind do not say, and hold (in, out).
    projection = cast(Any, located.module)
    width = int(getattr(projection, "in_features", 0) or projection.weight.shape[0])
    path = names[located.module]
    while path:
        path = path.rpartition(".")[0]
        # The module around W_O, what lies beside it, and so on outwards.
        for owner in descend(block, path).modules():
            sizes = [getattr(owner, name, None) for name in _HEAD_WIDTHS]
            counts: list[Any] = [width // n for n in sizes if isinstance(n, int) and n > 0]
            counts += [getattr(owner, name, None) for name in _HEADS]
            for count in counts:
                if isinstance(count, int) and count > 0 and width % count == 0:
                    return count, width // count
    raise UnknownFamilyError(
        f"{located.site}: {type(inner_model(model)).__name__} does not say how many heads block "
        f"{located.site.layer} has; 'z' without a head names all of them"
    )


def locate(model: nn.Module, name: str | Site, census: Census | None = None) -> Located:
    """Find a site's modules in a model.

    ``census``: that of the model as it is now, where that is known.

    Raises:
        SiteError: bad name, layer out of range, or a place that the block does not have.
        UnknownFamilyError: see :func:`stacks_of` and :func:`layout_of`.
    """
    require_module(model)
    known = _OF_MODELS.get(model) if isinstance(name, str | Site) else None
    if known is not None and name in known.places and known.holds(model, census):
        return known.places[name]
    site = Site.parse(name)
    if site.path is None:
        known = _known(model)
        return known.keep(name, _locate(model, site, known.stacks), model)
    found, known = _locate_module(model, site), _OF_MODELS.get(model)
    if known is None or found.trunk.plain:
        return found.placed(model)
    return known.keep(name, found, model)


def _locate(model: nn.Module, site: Site, stacks: Stacks) -> Located:
    kind = type(inner_model(model)).__name__
    if site.stack not in stacks:
        names = " or ".join(f"'{f'{name}.{site.bare}'.lstrip('.')}'" for name in stacks)
        raise SiteError(f"{site}: of {kind}, which has {KINDS[len(stacks) > 1]}, write {names}")
    layout = stacks[site.stack]
    trunk = Trunk.of(model, site.stack, layout)
    if site.layer >= len(layout.each):
        last = len(layout.each) - 1
        raise SiteError(f"{site}: the model has {last + 1} blocks, L0 to L{last}")
    blocks = blocks_of(model, site.stack)
    if site.part == "final":
        if layout.final == "":
            raise SiteError(
                f"{site}: in {kind} the module that reads the last block's output runs more than "
                f"once in a pass, so it is no one place; use L{len(layout.each) - 1}.post"
            )
        norm = blocks[-1] if layout.final is None else descend(trunk.module, layout.final)
        return Located(site, trunk, norm)
    block, places = blocks[site.layer], layout.each[site.layer]
    if site.part in ("pre", "post"):
        return Located(site, trunk, block, "input" if site.part == "pre" else "output")
    which = f"block {site.layer} of {kind}"
    layer = f"{site.stack}.L{site.layer}".lstrip(".")
    if site.part == "mid":
        if places.cut is None:
            raise SiteError(
                f"{site}: {which} {places.without_mid}; use {layer}.pre or {layer}.post"
            )
        cut, reader = places.cut, places.cut.added_to or places.first_reader
        residual = None if cut.scale is None else descend(block, reader)
        module, scale = descend(block, cut.module), cut.scale or 1.0
        beside = tuple((descend(block, name), times) for name, times in cut.beside)
        return Located(site, trunk, module, scale=scale, residual=residual, beside=beside)
    if site.part == "z":
        if places.attention is None:
            raise SiteError(f"{site}: {which} has no attention whose heads are added to the stream")
        projection = projection_of(model, site.layer, site.stack)
        located = Located(site, trunk, projection, "input")
        if site.head is None:
            return located
        heads, width = _heads_of(located, model, block)
        if site.head >= heads:
            raise SiteError(f"{site}: {which} has {heads} heads, H0 to H{heads - 1}")
        return Located(
            site,
            trunk,
            projection,
            "input",
            features=slice(site.head * width, (site.head + 1) * width),
        )
    added = places.attention if site.part == "attn_out" else places.mlp
    if added is None:
        what = "attention" if site.part == "attn_out" else "its MLP"
        raise SiteError(
            f"{site}: {which} has no module of which one could say that what it returns is what "
            f"{what} adds to the stream; name one: Site.module(path, 'output')"
        )
    return Located(site, trunk, descend(block, added.module), scale=added.scale or 1.0)


def _locate_module(model: nn.Module, site: Site) -> Located:
    path, whole = site.path or "", inner_model(model)
    owner = next((part for part in (model, whole) if path in dict(part.named_modules())), None)
    if owner is None:
        last = path.rpartition(".")[2]
        near = [name for name, _ in whole.named_modules() if last and name.endswith(last)]
        raise SiteError(
            f"{site}: {type(whole).__name__} has no module {path!r}"
            + (f"; it has {', '.join(near[:5])}" if near else "")
        )
    module = descend(owner, path)
    try:
        stacks = stacks_of(model)
    except UnknownFamilyError:
        return Located(site, Trunk(unwrapped(model), plain=True), module, site.side)
    trunks = [Trunk.of(model, stack) for stack in stacks]
    for trunk in trunks:
        if module is not trunk.module and module in modules_of(trunk.module):
            return Located(site, trunk, module, site.side)
    if len(trunks) > 1:
        raise SiteError(
            f"{site}: the module is outside of encoder and decoder, so which tokens it is given "
            f"cannot be told; name one within"
        )
    return Located(site, replace(trunks[0], module=whole), module, site.side)


def has_mid(model: nn.Module) -> bool:
    """Whether some of the model's blocks have a stream between attention and MLP."""
    stacks = stacks_of(model).values()
    return any(places.cut is not None for stack in stacks for places in stack.each)


def all_sites(
    model: nn.Module,
    parts: Sequence[Part] = ("pre", "mid"),
    *,
    inputs: Mapping[str, Any] | None = None,
) -> list[str]:
    """Names of all sites of the given parts, in the order of a forward pass.

    Parts that a block lacks are left out; ``post`` duplicates the next ``pre``. ``z`` is that of
    all heads of a block.

    Args:
        model: a transformers model, or any module whose forward takes ``input_ids``.
        parts: which.
        inputs: what to find the sites of a model by that cannot be run on tokens alone: arguments
            of its forward by name, of at least two different examples. Once is enough for all
            models of the class and configuration in this process. Sites of a model with tokens
            among them are where its text is; without, positions count the columns of the stream.

    Raises:
        UnknownFamilyError: see :func:`stacks_of`.
    """
    names = []
    for stack, layout in _known(model, inputs).stacks.items():
        for layer, places in enumerate(layout.each):
            lacking = {
                "z": places.attention is None or places.projection is None,
                "attn_out": places.attention is None,
                "mid": places.cut is None,
                "mlp_out": places.mlp is None,
                "final": True,
            }
            names += [Site(p, layer, stack) for p in PARTS if p in parts and not lacking.get(p)]
        names += [Site("final", stack=stack)] if "final" in parts and layout.final != "" else []
    return [str(site) for site in names]
