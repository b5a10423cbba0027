"""Where a model keeps its residual stream, found by running it, and proven by the cut test.

The place between attention and MLP, ``mid``, is a *cut* of a block: with the stream there forced to
one value, the block's output at that token is the same whatever the block's input was. That is what
"both the skip path and the MLP see it" means, and running a block decides it, without knowing the
model's family. What is found here is proven before it is used, and so is what a table says; where
nothing is a cut (attention and MLP in parallel, state-space blocks), there is no ``mid``. A block's
input is all that it is given of the text: where it reads the token once more behind attention, as
with per-layer embeddings, the stream there does not decide its output and is no ``mid`` either.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, compress
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor, nn

from lrqp_torch.errors import UnknownFamilyError
from lrqp_torch.stream.compiled import input_device, own_forward, run_eagerly, unwrapped
from lrqp_torch.stream.passes import is_cache

Blocks = Sequence[nn.Module]
"""The blocks of a stack, first to last."""

Example = Mapping[str, Any] | None
"""What a model is run on, arguments by name; None for a few tokens that are made up."""

ROWS, TOKENS, TOKEN = 2, 6, 4
"""Size of the inputs that blocks are tried on, and the token at which a cut is forced."""

SMALL = 2.0**-6
"""Size of the input by which sums are found: what a block adds to it must not drown in rounding."""

TOKENS_BY = ("input_ids", "decoder_input_ids", "inputs_embeds", "decoder_inputs_embeds")
"""Names by which models take tokens, or their embeddings."""

CROSSED = ("encoder_hidden_states", "cross_attention_states")
"""Arguments of a block by which cross-attention is given another stack's stream."""

WITHOUT_MID = (
    "has no place behind one module that skip path and MLP both go through; attention and MLP may "
    "run in parallel"
)
"""Why a block has no ``mid`` if none was found."""

READS_ON = (
    "reads the text once more behind its attention, beside the stream (as per-layer embeddings "
    "of the tokens), so no place in the stream decides what it returns"
)
"""The same, where there would be one if that were held fixed."""

LEARNED = (
    "multiplies what its attention adds by a number that it learns, so no number that one could "
    "keep says what the stream there is"
)
"""The same, where there is one for as long as the block's weights are what they are."""


@dataclass(frozen=True)
class Cut:
    """A place between a block's attention and its MLP, through which all goes that follows."""

    module: str  # path, from the block, of the module whose output is (part of) the stream there
    # The stream is block input + scale · output, as in most families (where the scale is 1); None
    # where the output itself is the stream (blocks that normalise after adding).
    scale: float | None = 1.0
    # Path of the module whose input is what the output is added to; None for the block's first
    # reader. Behind cross-attention, it is what that reads.
    added_to: str | None = None
    # Modules that ran before, and numbers: their outputs, times these, are added to scale · output
    # before it all is added to the stream, as where attention and a state space run side by side.
    beside: tuple[tuple[str, float], ...] = ()

    def stream(self, outputs: Mapping[str, Tensor], base: Tensor) -> Tensor:
        """The stream there, added to ``base`` and rounded as the model does it."""
        own = outputs[self.module]
        if self.scale is None:
            return own
        return base + added(own, self.scale, beside_of(self.beside, outputs))

    def __str__(self) -> str:
        if self.scale is None:
            return f"the output of {self.module!r} itself"
        times = "" if self.scale == 1 else f"{self.scale:g} times "
        base = "the block's input" if self.added_to is None else f"what {self.added_to!r} reads"
        for name, scale in self.beside:
            base += f" plus {scale:g} times the output of {name!r}"
        return f"{base} plus {times}the output of {self.module!r}"


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """Scale · tensor, rounded as the model rounds it; the tensor itself for a scale of 1."""
    return tensor if scale == 1 else tensor * scale


def added(tensor: Tensor, scale: float, beside: Tensor | None) -> Tensor:
    """What is added to the stream: scale · tensor, and what is added to that first."""
    return scaled(tensor, scale) if beside is None else beside + scaled(tensor, scale)


def beside_of(beside: Sequence[tuple[Any, float]], outputs: Mapping[Any, Tensor]) -> Tensor | None:
    """The sum of other modules' outputs, times their numbers; None of none."""
    found: Tensor | None = None
    for module, scale in beside:
        found = added(outputs[module], scale, found)
    return found


@dataclass(frozen=True)
class BlockSites:
    """What a block's sites are read and written by; paths from the block."""

    first_reader: str  # the module that first reads the block's input; empty for the block itself
    cut: Cut | None  # where `mid` is; None where the block has no such place
    # The module that maps the heads' outputs, side by side, back to the stream (W_O); None where no
    # module does.
    projection: str | None
    without_mid: str | None = None  # why there is no cut, or None where there is one
    # The module whose output, times a number, is what attention adds to the stream; None where no
    # module's is.
    attention: Cut | None = None
    mlp: Cut | None = None  # the same of the MLP, or of the experts in its place

    def as_in(self, other: "BlockSites") -> "BlockSites":
        """What of it another block has too, whose weights of one number are others."""
        cut = self.cut if self.cut == other.cut else None
        return replace(
            self,
            cut=cut,
            without_mid=LEARNED if self.cut is not cut else self.without_mid,
            attention=self.attention if self.attention == other.attention else None,
            mlp=self.mlp if self.mlp == other.mlp else None,
        )


@dataclass(frozen=True)
class Stack:
    """A run of blocks."""

    # Path, from the model, of the innermost module around the blocks that is given the token ids in
    # every forward pass.
    trunk: str
    blocks: str  # path of the list of blocks, from the trunk
    each: tuple[BlockSites, ...]  # the sites of every block
    # Whether the model adds learned position embeddings to columns of the input, so that a left-
    # padded batch needs `position_ids`.
    absolute_positions: bool = False
    # Path, from the trunk, of the module after the last block whose output is the stream that is
    # read out, its last norm; None where that is the last block's output, and empty where that
    # module runs more than once in a pass.
    final: str | None = None
    # What padding does to other tokens; None where that was not tried.
    padding: "Padding | None" = None
    plain: bool = False  # whether the model is given no tokens, so that the stream itself says all
    crossed: bool = False  # whether blocks were given what cross-attention reads


@dataclass
class _Call:
    """How a block was called in the trial run, so that it can be called again."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream: Tensor
    output: Tensor | None = None
    times: int = 1
    carried: list[Tensor] = field(default_factory=list)
    later: list[Tensor] = field(default_factory=list)

    @property
    def given(self) -> dict[str, Any]:
        """All that the block was called with, by name."""
        named = inspect.signature(self.block.forward).parameters
        return {**dict(zip(named, self.args, strict=False)), **self.kwargs}

    @property
    def crossed(self) -> list[Tensor]:
        """What the block reads of earlier blocks beside the stream, and by cross-attention."""
        named = [item for name, item in self.given.items() if name in CROSSED]
        found = [*named, *self.carried]
        return [item for item in found if isinstance(item, Tensor) and item is not self.stream]

    def wide(self) -> "_Call":
        """The same of a copy of the block in float32, if it is in half precision: beside the stream
        in that, some outputs are too small to be seen. Itself where it cannot be copied or run.
        """
        held = [*self.block.parameters(), *self.block.buffers()]
        if torch.finfo(self.stream.dtype).eps < 1e-4 or not all(
            type(item) in (Tensor, nn.Parameter, nn.Buffer)
            and item.device == self.stream.device
            and (item.element_size() > 1 or not item.is_floating_point())
            for item in held
        ):
            return self
        known: dict[int, Any] = {}

        def widened(item: Any) -> Any:
            if isinstance(item, Tensor) and item.is_floating_point():
                return known.setdefault(id(item), item.float())
            if isinstance(item, list | tuple):
                return type(item)(map(widened, item))
            return item

        try:
            block = copy.deepcopy(self.block).float()
            named = {name: widened(item) for name, item in self.kwargs.items()}
            call = _Call(block, widened(self.args), named, widened(self.stream))
            call.carried = widened(self.carried)
            call.again(call.stream)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
            return self
        return call

    def relearned(self) -> "_Call | None":
        """The same of a copy of the block in which weights of one number, and such numbers among
        its arguments, are others; None where it has none, or cannot be copied.
        """

        def single(item: Any) -> bool:
            return isinstance(item, Tensor) and item.is_floating_point() and item.numel() == 1

        def changed(item: Any) -> Any:
            return 0.7 * item - 0.4 if single(item) else item

        if not any(map(single, [*self.block.parameters(), *self.block.buffers(), *self._items])):
            return None
        try:
            block = copy.deepcopy(self.block)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
            return None
        for item in filter(single, [*block.parameters(), *block.buffers()]):
            item.copy_(changed(item))
        named = {name: changed(item) for name, item in self.kwargs.items()}
        args = tuple(map(changed, self.args))
        return replace(self, block=block, args=args, kwargs=named)

    @property
    def _items(self) -> list[Any]:
        return [*self.args, *self.kwargs.values()]

    def again(self, stream: Tensor, seed: int | None = None) -> Tensor:
        """The block's output, (B, T, d), for another input, and for another encoder's if a seed is
        given: all that the block reads of other tokens is then made up from it.
        """
        stream = stream.clone()  # which some blocks add to in place

        def other(item: Any) -> Any:
            if item is self.stream:
                return stream
            if is_cache(item):  # of the run before
                return None
            if isinstance(item, list | tuple) and self.carried:
                return type(item)(map(other, item))
            crossed = seed is not None and any(item is states for states in self.crossed)
            if not crossed:
                return item
            if not item.is_floating_point():  # token ids, of which there are no others but these
                return item.roll(seed or 0, -1)
            return _input_like(item, seed or 0)

        output = first_tensor(
            self.block(*map(other, self.args), **{k: other(v) for k, v in self.kwargs.items()})
        )
        assert output is not None
        return output


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that a module returned, or the first of several; None where it is none."""
    if isinstance(output, Tensor):
        return output
    # An abstract class takes longer to ask than these, which most modules return.
    if type(output) is not tuple and isinstance(output, Mapping):
        output = next(iter(output.values()), None)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _stream_in(output: Any, h: Tensor) -> Tensor | None:
    """What a module returned, in the shape of a stream h; None where it is none, as where adapters
    run a module on a matrix of weights as well (DoRA).
    """
    tensor = first_tensor(output)
    if tensor is None or not tensor.is_floating_point() or distributed(tensor):
        return None
    fits = tensor.shape == h.shape or tensor.shape == (h.shape[0] * h.shape[1], h.shape[2])
    return tensor.view(h.shape) if fits else None


def distributed(tensor: Tensor) -> bool:
    """Whether ranks hold parts of a tensor, as of what passes between tensor-parallel layers."""
    return hasattr(tensor, "full_tensor")


def stream_given(args: tuple[Any, ...], kwargs: dict[str, Any], shape: torch.Size) -> Tensor | None:
    """The first argument that can be a stream of this shape, also with rows and tokens in one."""
    for item in (kwargs.get("hidden_states"), *args, *kwargs.values()):
        if isinstance(item, Tensor) and item.is_floating_point() and not distributed(item):
            if item.shape == shape:
                return item
            if item.shape == (shape[0] * shape[1], shape[2]):
                return item.view(shape)
    return None


def discover(model: nn.Module, example: Example = None) -> list[Stack]:
    """The stacks of blocks of a model, each with its proven sites.

    The model runs a few times on a few tokens, and each kind of block some times more on made-up
    inputs; nothing in it is changed.

    Args:
        model: a transformers model, or one like it: its forward takes ``input_ids``.
        example: what to run any other model on, named arguments of at least two different rows.
            Where there are tokens among them, blocks are those that are given their stream.

    Returns:
        The stacks in the order in which they run: one of most models, two of encoder–decoders.
        Empty where no list of blocks carries a stream of shape (rows, tokens, width) on.

    Raises:
        UnknownFamilyError: the blocks run more than once in a pass (ALBERT).
    """
    inner = unwrapped(model)
    with quiet(inner):
        calls, given = trial(inner, example=example)
        padding = _padding(inner) if example is None else Padding(read=True)
        plain = example is not None and not _tokens_of(example)
        found = []
        for name, blocks in _lists_of_blocks(inner, calls):
            known: dict[object, BlockSites] = {}
            _note_carried(inner, blocks, calls, example)
            for block in blocks:
                kind = _kind(calls[block])
                if kind not in known:
                    known[kind] = sites_of(calls[block].wide(), inner)
            each = tuple(known[_kind(calls[block])] for block in blocks)
            trunk = "" if plain else _trunk(name, given)
            last = _last_norm(name, blocks[-1], inner, calls)
            begin = len(trunk) + 1 if trunk else 0
            final = None if last is None else last[begin:]
            crossed = any(isinstance(calls[blocks[0]].given.get(key), Tensor) for key in CROSSED)
            stack = Stack(trunk, name[begin:], each, padding.counted, final, padding)
            found.append(replace(stack, plain=plain, crossed=crossed))
        if not found:
            _refuse_shared(inner, calls)
    return found


def _note_carried(
    model: nn.Module, blocks: Blocks, calls: dict[nn.Module, _Call], example: Example = None
) -> None:
    """Note what blocks are given of the text beside the stream: what else is of its width, and what
    changes with the tokens, be it of earlier blocks or of the tokens themselves.
    """
    changed, _ = trial(model, seed=1, example=example)
    for block in blocks:
        pairs = zip(_tensors(calls[block].given), _tensors(changed[block].given), strict=False)
        calls[block].carried = [
            one
            for one, two in pairs
            if one is not calls[block].stream
            and one.dtype != torch.bool
            and (
                (block is not blocks[0] and _alike(one, calls[block].stream))
                or not torch.equal(one, two)
            )
        ]


def _alike(one: Tensor, stream: Tensor) -> bool:
    return one.shape[:2] == stream.shape[:2] and one.shape[-1] == stream.shape[-1]


def _tensors(items: Any) -> Iterator[Tensor]:
    """The tensors among some values, and in lists of them."""
    if isinstance(items, Tensor):
        yield items
    elif isinstance(items, Mapping | list | tuple):
        for item in items.values() if isinstance(items, Mapping) else items:
            yield from _tensors(item)


def _refuse_shared(model: nn.Module, calls: dict[nn.Module, _Call]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(
            calls[b].times > 1 for b in module if b in calls
        ):
            raise UnknownFamilyError(
                f"{type(model).__name__} runs the blocks of {name!r} more than once in a pass, as "
                f"several layers share their weights, so what a block reads is no one place"
            )


def _last_norm(
    name: str, last: nn.Module, model: nn.Module, calls: dict[nn.Module, _Call]
) -> str | None:
    """Path of the module beside a list of blocks that reads the output of the last of them; empty
    where it has run before in the pass.
    """
    parent, stream = name.rpartition(".")[0], calls[last].output
    names: dict[nn.Module, str] = {module: path for path, module in model.named_modules()}
    assert stream is not None
    found = None
    for module, call in calls.items():
        path = names[module]
        beside = path.startswith(f"{parent}.") if parent else True
        if not beside or path.startswith(f"{name}.") or call.output is None:
            continue
        if call.output.shape == stream.shape:
            if torch.equal(call.stream, stream):
                found, stream = path, call.output  # and what reads it in turn
            elif found is None and any(torch.equal(other, stream) for other in call.later):
                return ""
    return found


def hold_to_proof(model: nn.Module, stack: Stack) -> None:
    """Hold the sites that a row gives to the cut test, and to what its modules read.

    Raises:
        UnknownFamilyError: a block's ``mid`` is no cut, or its first reader reads something else;
            the message says by how much, and what would be right.
    """
    with quiet(model):
        calls, _ = trial(model)
        owner = model.get_submodule(stack.trunk).get_submodule(stack.blocks)
        blocks = [*owner.children()]
        seen: set[object] = set()
        _note_carried(model, blocks, calls)
        for layer, (block, places) in enumerate(zip(blocks, stack.each, strict=True)):
            if _kind(calls[block]) in seen:
                continue
            seen.add(_kind(calls[block]))
            _hold_block_to_proof(
                calls[block].wide(), places, f"block {layer} of {type(model).__name__}"
            )


def _hold_block_to_proof(call: _Call, places: BlockSites, where: str) -> None:
    paths = [places.first_reader, *([] if places.cut is None else [places.cut.module])]
    missing = [p for p in paths if p not in dict(call.block.named_modules())]
    if missing:
        raise UnknownFamilyError(
            f"{where} has no module {missing[0]!r}, which its row names; the blocks of a model may "
            f"differ. Leave the row out: the sites of most models are found without one"
        )
    h = _input_like(call.stream, seed=0, size=SMALL)
    record = _Record.of(call, h)
    if places.first_reader and not any(
        name == places.first_reader and torch.equal(x, h) for name, x, _ in record.inputs
    ):
        raise UnknownFamilyError(
            f"{where}: its row says that {places.first_reader!r} reads the block's input, and it "
            f"reads something else"
        )
    order = [name for name, _ in record.outputs]
    last = None if places.cut is None else places.cut.module
    behind = order.index(last) if last in order else len(order)
    if places.projection is not None and not (
        places.projection in record.weights
        and order.index(places.projection) <= behind
        and _mixes_tokens(call, Cut(places.projection, None))
    ):
        raise UnknownFamilyError(
            f"{where}: its row says that {places.projection!r} maps the heads' outputs to the "
            f"stream, and it does not: it is no matrix of attention onto the stream's width"
        )
    if places.cut is None:
        return
    changed = call.relearned()
    passes = all(is_cut(one, places.cut) for one in (call, changed) if one is not None)
    if passes and places.cut.scale is None:
        return
    found = sites_of(call, nn.Module()).cut
    if passes and (found is None or found.scale is not None):
        return
    right = "no other place was found" if found is None else f"what passes is {found}"
    if passes:
        raise UnknownFamilyError(
            f"{where}: its row says that the stream between attention and MLP is {places.cut}, but "
            f"that is normalised before anything else reads it: skip path and MLP both read {found}"
        )
    raise UnknownFamilyError(
        f"{where}: its row says that the stream between attention and MLP is {places.cut}, but it "
        f"is no cut: forced to one value there, the block's output still changes with its input "
        f"by {cut_difference(call, places.cut):.0%}. Odds reached there would be nowhere in the "
        f"model; {right}"
    )


def _kind(call: _Call) -> object:
    """Equal for blocks of the same modules and settings, which then have the same sites."""
    numbers = [(name, item) for name, item in call.given.items() if isinstance(item, float)]
    return bool(call.carried), (*numbers,), built(call.block)


_PASSING = "training", "_is_torch_compile"
"""Attributes that say how a module runs at the moment."""


def built(module: nn.Module) -> tuple[tuple[Any, ...], ...]:
    """What a module computes by: its modules with their classes, what stands in place of their
    forward, and settings.
    """
    return tuple(
        (
            name,
            type(part),
            type(part).forward,
            # accelerate's hooks move tensors alone.
            None if hasattr(part, "_hf_hook") else own_forward(part),
            tuple(
                (key, value)
                for key, value in vars(part).items()
                if isinstance(value, bool | float | str) and key not in _PASSING
            ),
        )
        for name, part in module.named_modules()
    )


def sites_of(call: _Call, model: nn.Module) -> BlockSites:
    """The sites of one block, from its behaviour, whatever it learns."""
    found, changed = _sites_as_is(call, model), call.relearned()
    return found if changed is None else found.as_in(_sites_as_is(changed, model))


def _sites_as_is(call: _Call, model: nn.Module) -> BlockSites:
    """The same with the weights that the block has."""
    h = _input_like(call.stream, seed=0, size=SMALL)
    record = _Record.of(call, h)
    constants = list(_constants(call, model))
    whole = ((name, x) for name, x, _ in record.inputs if name not in record.flat)
    first_reader = next((name for name, x in whole if torch.equal(x, h)), "")
    cut, start, attention = None, 0, None
    # Behind self-attention there may be cross-attention, which adds to what the first has left.
    base: tuple[Tensor, str | None] | None = (h, None)
    readers = set[str]()  # each is begun from once: what it reads may be found behind it again
    while cut is None and base is not None:
        sums, base = record.sums(*base, constants), None
        for found in sums:
            if not _mixes_tokens(call, found.cut):
                continue
            attention = attention or _added(call, [found.cut.module], None, constants)
            if is_cut(call, found.cut):
                cut, start = found.cut, found.before
                break
            if base is None and call.crossed and found.reader not in readers:
                readers.add(found.reader)
                base = found.stream, found.reader
    if cut is None:
        for found in record.joint_sums(h, _mixing(call, record), constants):
            if is_cut(call, found.cut):
                cut, start = found.cut, found.before
                break
    if cut is None:
        for candidate, before in record.unread(h, _mixing(call, record)):
            later = [name for name, _ in record.outputs[before:]]
            # What the MLP adds tells that the skip path holds the sum itself, and no multiple.
            if is_cut(call, candidate) and _added(call, later, candidate, constants):
                cut, start = candidate, before
                attention = attention or cut
                break
    # Blocks that normalise after adding have a later cut, which both the skip path and the MLP
    # read. The last of all is the one between attention and MLP.
    for candidate, index in record.single_outputs(h, start, cut):
        if _mixes_tokens(call, candidate) and is_cut(call, candidate):
            cut, start = candidate, index
            break
    if cut is None:
        attention, mlp = _side_by_side(call, [name for name, _ in record.outputs], constants)
    else:
        if attention is None:  # an output too small to be seen in the sum, in half precision
            earlier = [name for name, _ in record.outputs[:start]]
            mixing = [name for name in _mixing(call, record) if name in earlier]
            attention = None if cut.beside else _added(call, mixing, None, constants)
        mlp = _added(call, [name for name, _ in record.outputs[start:]], cut, constants)
    reason = None
    if cut is None:
        close = _tolerance(call.stream.dtype)
        passes = (s.cut for s in record.sums(h, None, constants) if _mixes_tokens(call, s.cut))
        apart = any(cut_difference(call, c, reads_on=False) <= close for c in passes)
        reason = READS_ON if call.carried and apart else WITHOUT_MID
    # W_O runs before what attention adds, and before the MLP, whose matrices mix tokens too.
    order = [name for name, _ in record.outputs]
    known = attention is not None and attention.module in order
    end = order.index(attention.module) + 1 if attention and known else start or len(order)
    matrices = (name for name in record.weights if name in order[:end])
    matrix = next((name for name in matrices if _mixes_tokens(call, Cut(name, None))), None)
    # An adapter around a matrix reads what the matrix reads, and adds to it or turns it first.
    around = (name for name in record.weights if f"{matrix}.".startswith(f"{name}."))
    projection = min(around, key=len, default=None)
    return BlockSites(first_reader, cut, projection, reason, attention, mlp)


def _mixing(call: _Call, record: "_Record") -> list[str]:
    """Modules whose outputs tell of earlier tokens, in the order in which they run."""
    return [name for name, _ in record.outputs if _mixes_tokens(call, Cut(name, None))]


def _added(
    call: _Call, names: Sequence[str], cut: Cut | None, constants: Sequence[float]
) -> Cut | None:
    """The first of some modules whose output, times a number, is added to a stream that is read.

    Seen by forcing the output to one value at a token, and the stream to another: a later reader,
    or the next block, must be given the one plus a multiple of the other.

    Args:
        call: the block.
        names: its modules to try, the outermost first.
        cut: where the stream is; None for the block's input.
        constants: numbers that the model may multiply by.
    """
    h, mid, out = (_input_like(call.stream, seed) for seed in (0, 3, 4))
    stream = (h if cut is None else mid)[:, TOKEN].double()
    for name in sorted(names, key=lambda name: name.count(".")):
        forced = [(Cut(name, None), out[:, TOKEN])]
        forced += [] if cut is None else [(cut, mid[:, TOKEN])]
        with _forced(call, h, *forced):
            record = _Record.of(call, h)
        for x in [*(x for _, x, _ in record.inputs), record.result]:
            scales = _multiples(x[:, TOKEN].double() - stream, [out[:, TOKEN]], constants)
            if scales is not None:
                return Cut(name, scales[0])
    return None


def _side_by_side(
    call: _Call, names: Sequence[str], constants: Sequence[float]
) -> tuple[Cut | None, Cut | None]:
    """Attention and MLP of a block that adds the outputs of both to its input at once."""
    h, one, two = (_input_like(call.stream, seed) for seed in (0, 3, 4))
    names = sorted(names, key=lambda name: name.count("."))
    mixing = [name for name in names if _mixes_tokens(call, Cut(name, None))]
    for first in mixing:
        for second in (name for name in names if name not in mixing):
            forced = ((Cut(first, None), one[:, TOKEN]), (Cut(second, None), two[:, TOKEN]))
            with _forced(call, h, *forced):
                change = (call.again(h) - h)[:, TOKEN].double()
            scales = _multiples(change, [one[:, TOKEN], two[:, TOKEN]], constants)
            if scales is not None:
                return Cut(first, scales[0]), Cut(second, scales[1])
    return None, None


def _multiples(
    change: Tensor, parts: Sequence[Tensor], constants: Sequence[float]
) -> list[float] | None:
    """The numbers by which parts are multiplied to make up a change; None where they do not."""
    matrix = torch.stack([part.double().flatten() for part in parts], 1)
    scales = torch.linalg.lstsq(matrix, change.reshape(-1, 1)).solution
    close = 2 * _tolerance(parts[0].dtype)
    rest = float((matrix @ scales - change.reshape(-1, 1)).norm())
    if rest > close * float(matrix.norm()) or bool((scales.abs() < 0.01).any()):
        return None
    found = scales.flatten().tolist()
    near = [[c for c in constants if abs(c - scale) <= close * abs(scale)] for scale in found]
    return [min(c, key=lambda c: abs(c - s), default=s) for c, s in zip(near, found, strict=True)]


@contextmanager
def _forced(call: _Call, h: Tensor, *forced: tuple[Cut, Tensor]) -> Iterator[None]:
    """Within this the stream at some cuts is a value (B, d) at the token, for the input h."""
    with ExitStack() as stack:
        for cut, value in forced:
            base, others = [h], dict[str, Tensor]()

            def keep(module: nn.Module, args: Any, kwargs: Any, base: list[Tensor] = base) -> None:
                read = stream_given(args, kwargs, base[0].shape)
                assert read is not None
                base[0] = read

            def note(
                module: nn.Module,
                args: Any,
                output: Any,
                name: str,
                others: dict[str, Tensor] = others,
            ) -> None:
                tensor = _stream_in(output, h)
                if tensor is not None:
                    others[name] = tensor

            def force(
                module: nn.Module,
                args: Any,
                output: Any,
                cut: Cut = cut,
                value: Tensor = value,
                base: list[Tensor] = base,
                others: dict[str, Tensor] = others,
            ) -> Any:
                tensor, wanted = _stream_in(output, h), value
                if tensor is None:
                    return output
                shaped = tensor.clone()
                if cut.scale is not None:
                    beside = beside_of(cut.beside, others)
                    held = base[0] if beside is None else base[0] + beside
                    wanted = (value - held[:, TOKEN]) / cut.scale
                shaped[:, TOKEN] = wanted.to(shaped.dtype)
                return with_first(output, shaped.view_as(cast(Tensor, first_tensor(output))))

            if cut.added_to is not None:
                reader = call.block.get_submodule(cut.added_to)
                before = reader.register_forward_pre_hook(_ours(keep), with_kwargs=True)
                stack.callback(before.remove)
            for name, _ in cut.beside:
                module = call.block.get_submodule(name)
                stack.enter_context(_hooked(module, partial(note, name=name)))
            stack.enter_context(_hooked(call.block.get_submodule(cut.module), force))
        yield


def is_cut(call: _Call, cut: Cut) -> bool:
    """Whether a block's output at a token follows from the stream there, at the cut, alone.

    So neither the block's input nor, in a decoder, the encoder's output is read behind it.
    """
    return cut_difference(call, cut) <= _tolerance(call.stream.dtype)


def cut_difference(call: _Call, cut: Cut, reads_on: bool = True) -> float:
    """How far two runs differ whose stream at the cut is the same, relative to their output, with
    other text beside the stream unless ``reads_on`` is false.

    Inputs and the forced value are small multiples of 1/8, whose differences and sums every dtype
    holds exactly, so that two runs through a cut with scale 1 agree bit for bit; and once more such
    of 1/512, beside which no module's output is too small to be seen.
    """
    worst = 0.0
    for size in (1.0, SMALL):
        value = _input_like(call.stream, seed=3, size=size)[:, TOKEN]
        outputs = []
        for seed in (1, 2):
            h = _input_like(call.stream, seed, size)
            with _forced(call, h, (cut, value)):
                outputs.append(call.again(h, seed if reads_on else None)[:, TOKEN].double())
        largest = float(outputs[0].abs().max())
        if not largest or not bool(torch.isfinite(torch.stack(outputs)).all()):
            return float("inf")
        worst = max(worst, float((outputs[0] - outputs[1]).abs().max()) / largest)
    return worst


def _mixes_tokens(call: _Call, cut: Cut) -> bool:
    """Whether the stream at a candidate tells of earlier tokens: it lies after attention."""
    seen = []
    for other in (1, 2):
        h = _input_like(call.stream, seed=1)
        h[:, :TOKEN] = _input_like(call.stream, other)[:, :TOKEN]

        def keep(module: nn.Module, args: Any, output: Any, h: Tensor = h) -> None:
            tensor = _stream_in(output, h)
            if tensor is not None:
                seen.append(tensor[:, TOKEN].double())

        with _hooked(call.block.get_submodule(cut.module), keep):
            call.again(h)
    return not torch.allclose(seen[0], seen[-1], rtol=1e-6, atol=0)


@dataclass(frozen=True, eq=False)
class _Sum:
    """A stream that a module reads, and the output that it may be made of."""

    cut: Cut  # the output, its factor, and what it is added to
    stream: Tensor  # what is read, (B, T, d)
    reader: str  # who reads it
    before: int  # how many outputs there were when it was read


@dataclass
class _Record:
    """What the modules of a block read and returned in one run, in the order of the calls."""

    # Name, stream read, and how many outputs were there before.
    inputs: list[tuple[str, Tensor, int]]
    outputs: list[tuple[str, Tensor]]  # name and output, reshaped to (B, T, d)
    weights: list[str]  # names of the modules with a matrix of weights onto the stream's width
    result: Tensor  # the block's output
    flat: set[str]  # names of the modules that read rows and tokens in one, perhaps only some

    @classmethod
    def of(cls, call: _Call, h: Tensor) -> "_Record":
        record = cls([], [], [], h, set())
        with ExitStack() as stack:
            for name, module in call.block.named_modules():
                if not name:
                    continue

                def before(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                    x = stream_given(args, kwargs, h.shape)
                    if x is not None:
                        record.inputs.append((name, x.detach().clone(), len(record.outputs)))
                        if not any(x is item for item in (*args, *kwargs.values())):
                            record.flat.add(name)

                def after(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    x = _stream_in(output, h)
                    if x is not None:
                        weight = getattr(module, "weight", None)
                        packed = isinstance(getattr(module, "in_features", None), int)
                        if packed or (isinstance(weight, Tensor) and weight.ndim == 2):
                            record.weights.append(name)
                        record.outputs.append((name, x.detach().clone()))

                handle = module.register_forward_pre_hook(_ours(before), with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(module.register_forward_hook(_ours(after)).remove)
            record.result = call.again(h).detach()
        # What runs more than once, as W_O with some adapters, is no one place.
        names = [name for name, _ in record.outputs]
        once = [names.count(name) == 1 for name in names]
        record.inputs = [(name, x, sum(once[:before])) for name, x, before in record.inputs]
        record.outputs = list(compress(record.outputs, once))
        record.weights = [name for name in record.weights if names.count(name) == 1]
        return record

    def sums(
        self, base: Tensor, added_to: str | None, constants: Sequence[float]
    ) -> Iterator[_Sum]:
        """Outputs that, times a number and added to a stream, are what a later module reads.

        Args:
            base: the stream, such as the block's input h.
            added_to: the module that reads it, if that is not the first of the block.
            constants: numbers that the model may multiply by, to be exact to the last bit.
            start: how many outputs, from the beginning, are not asked about.

        """
        seen: set[Cut] = set()
        precision = torch.finfo(base.dtype).eps
        for reader, x, before in self.inputs:
            change, noise = (x - base).double(), 4 * precision * float(x.double().norm())
            size = float(change.norm())
            if size <= 2 * noise:
                continue
            # A small output, of weights that were never trained, tells its factor less exactly.
            inexact = max(1e-4, 2 * precision) + 2 * noise / size
            # The outermost of the modules that return the same is the one to name.
            for name, output in sorted(self.outputs[:before], key=lambda o: o[0].count(".")):
                wide = output.double()
                scale = float((change * wide).sum() / (wide * wide).sum().clamp_min(1e-300))
                near = [c for c in constants if abs(c - scale) <= inexact * abs(scale)]
                scale = min(near, key=lambda c: abs(c - scale), default=scale)
                rest = float((change - scale * wide).norm())
                cut = Cut(name, scale, added_to)
                if abs(scale) <= 1e-3 or rest > inexact * size or cut in seen:
                    continue
                # In half precision what is nearly the same may be another sum.
                if precision < 1e-4 or torch.equal(base + scaled(output, scale), x):
                    seen.add(cut)
                    yield _Sum(cut, x, reader, before)

    def joint_sums(
        self, base: Tensor, names: Sequence[str], constants: Sequence[float]
    ) -> Iterator[_Sum]:
        """Outputs of several modules that, times numbers and together added to a stream, are what a
        later module reads, to the last bit.

        Args:
            base: the stream, the block's input h.
            names: the modules, in the order in which they run.
            constants: numbers that the model may multiply by, to be exact to the last bit.
        """
        for reader, x, before in self.inputs:
            outputs = dict(self.outputs[:before])
            distinct: list[str] = []
            for name in sorted(names, key=lambda n: n.count(".")):
                if name in outputs and not any(
                    torch.equal(outputs[name], outputs[n]) or name.startswith(f"{n}.")
                    for n in distinct
                ):
                    distinct.append(name)
            if len(distinct) < 2 or torch.equal(x, base):
                continue
            scales = _multiples((x - base).double(), [outputs[n] for n in distinct], constants)
            if scales is not None:
                found = sorted(zip(distinct, scales, strict=True), key=lambda s: names.index(s[0]))
                cut = Cut(*found[-1], beside=tuple(found[:-1]))
                if torch.equal(cut.stream(outputs, base), x):
                    yield _Sum(cut, x, reader, before)

    def unread(self, h: Tensor, names: Sequence[str]) -> Iterator[tuple[Cut, int]]:
        """Modules whose output, added to the block's input, may be a stream that no module reads,
        as where norms are functions; the outermost first.

        Yields:
            A candidate, and how many outputs there are up to it.
        """
        close, order = 4 * _tolerance(h.dtype), [name for name, _ in self.outputs]
        for name in sorted(names, key=lambda name: name.count(".")):
            place = order.index(name)
            # The block's own output is `post`.
            if not torch.allclose(h + self.outputs[place][1], self.result, rtol=close):
                yield Cut(name), place + 1

    def single_outputs(self, h: Tensor, start: int, found: Cut | None) -> Iterator[tuple[Cut, int]]:
        """Modules whose own output may be the stream, the last to run first.

        Args:
            h: the block's input.
            start: how many outputs, from the beginning, are not asked about.
            found: the sum that is a cut; modules that return the same are not asked about.

        Yields:
            A candidate, and how many outputs there are up to it.
        """
        # The block's own output is `post`, and its input is `pre`.
        known = [self.result, h]
        if found is not None and found.scale is not None:
            read = dict((name, x) for name, x, _ in reversed(self.inputs))
            base = h if found.added_to is None else read[found.added_to]
            known.append(found.stream(dict(self.outputs), base))
        close = 4 * _tolerance(h.dtype)
        tried: list[tuple[str, Tensor, int]] = []
        for index in range(len(self.outputs), start, -1):
            name, output = self.outputs[index - 1]
            if not any(torch.allclose(output, other, rtol=close) for other in known):
                tried.append((name, output, index))
        for name, output, index in tried:
            # The outermost of the modules that return the same is the one to name.
            same = [n for n, other, _ in tried if torch.equal(other, output)]
            if name == min(same, key=lambda n: n.count(".")):
                yield Cut(name, None), index


def _constants(call: _Call, model: nn.Module) -> Iterator[float]:
    """Numbers that a model may multiply what it adds to the stream by: 1, and those it names."""
    yield 1.0
    config = getattr(model, "config", None)
    holders = (call.block, *call.block.children(), config)
    named = [call.given, *(getattr(holder, "__dict__", {}) for holder in holders)]
    for value in chain.from_iterable(names.values() for names in named):
        if isinstance(value, float) and value:
            yield value
            yield 1 / value


def _tokens_of(inputs: Mapping[str, Any]) -> list[Tensor]:
    """The token ids among a model's arguments, or the embeddings in their place."""
    found = (inputs.get(name) for name in TOKENS_BY)
    return [item for item in found if isinstance(item, Tensor)]


def trial(
    model: nn.Module, seed: int = 0, example: Example = None
) -> tuple[dict[nn.Module, _Call], dict[str, bool]]:
    """One run of the model: every module given a stream, and who was given token ids."""
    calls: dict[nn.Module, _Call] = {}
    given: dict[str, bool] = {}
    inputs = trial_inputs(model, seed) if example is None else _example(model, example, seed)
    tokens = _tokens_of(inputs)
    ids, shapes = {item.data_ptr() for item in tokens}, {item.shape[:2] for item in tokens}
    rows = {item.shape[0] for item in inputs.values() if isinstance(item, Tensor) and item.ndim}

    def is_stream(item: Any) -> bool:
        if not isinstance(item, Tensor) or item.ndim != 3 or not item.is_floating_point():
            return False
        # Of a model without tokens, blocks are told by what they are given and return alone.
        return item.shape[:2] in shapes if shapes else item.shape[0] in rows

    def is_token(item: Any) -> bool:
        if not isinstance(item, Tensor) or distributed(item):
            return False
        return not item.is_floating_point() or any(item.shape == own.shape for own in tokens)

    with ExitStack() as stack:
        for name, module in model.named_modules():

            def before(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                # The ids themselves, or a view of them: embeddings do not count as being given ids.
                for item in filter(is_token, (*args, *kwargs.values())):
                    given[name] = given.get(name, False) or item.data_ptr() in ids
                streams = [item for item in (*args, *kwargs.values()) if is_stream(item)]
                if module in calls:
                    calls[module].times += 1
                    calls[module].later += streams
                elif streams:
                    named = kwargs.get("hidden_states")
                    stream = named if any(named is item for item in streams) else streams[0]
                    calls[module] = _Call(module, args, dict(kwargs), stream)

            def after(module: nn.Module, args: Any, output: Any) -> None:
                if module in calls and calls[module].output is None:
                    calls[module].output = first_tensor(output)

            handle = module.register_forward_pre_hook(_ours(before), with_kwargs=True)
            stack.callback(handle.remove)
            stack.callback(module.register_forward_hook(_ours(after)).remove)
        model(**inputs)
    return calls, given


def vocabularies(*models: Any) -> list[int]:
    """How many tokens there are, as the first of some models says that does; or else the sizes of
    all tables of embeddings of the last, some of which may be of positions.
    """
    for model in models:
        try:
            embedding = model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if embedding is not None:
            return [int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])]
    tables = (part for part in models[-1].modules() if isinstance(part, nn.Embedding))
    return [table.num_embeddings for table in tables]


def trial_inputs(model: nn.Module, seed: int = 0) -> dict[str, Any]:
    """A few tokens, as keyword arguments of a model's forward."""
    # Those of two or three kinds of token are none.
    size = min((size for size in vocabularies(model) if size > TOKENS), default=TOKENS)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(3, size - 1), size, (ROWS, TOKENS), generator=generator)
    ids = ids.to(input_device(model))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    taken = inspect.signature(type(model).forward).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    if "attention_mask" not in taken and not any_name:
        del inputs["attention_mask"]
    if "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = ids
    if "use_cache" in taken or (any_name and hasattr(model, "config")):
        inputs["use_cache"] = False
    return inputs


def _example(model: nn.Module, example: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """An example as a model is given it, its rows in the order of another text for another seed.

    Raises:
        ValueError: rows that are no two, or tokens that are too few, to tell what changes.
    """
    inputs, device = dict(example), input_device(model)
    for name, item in inputs.items():
        if isinstance(item, Tensor):
            inputs[name] = item.to(device)
    tensors = {name: item for name, item in inputs.items() if isinstance(item, Tensor)}
    first = next(iter(_tokens_of(inputs)), next(iter(tensors.values()), torch.empty(0)))
    if len(first) < 2 or torch.equal(first, first.flip(0)):
        raise ValueError("the example needs two rows that differ")
    for item in _tokens_of(inputs):
        if item.shape[1] <= TOKEN or item.shape[1] == len(item):
            raise ValueError(
                f"the texts of the example need more than {TOKEN} tokens, and not as many of them "
                f"as there are texts"
            )
    if seed:
        rows = len(first)
        inputs |= {name: item.flip(0) for name, item in tensors.items() if len(item) == rows}
    if "use_cache" in inspect.signature(type(model).forward).parameters:
        inputs["use_cache"] = False
    return inputs


def _lists_of_blocks(model: nn.Module, calls: dict[nn.Module, _Call]) -> list[tuple[str, Blocks]]:
    """The outermost lists whose members each carry a stream of one width on; where there is none,
    the sequences of modules that do.
    """
    found: list[tuple[str, Blocks]] = []
    order = {module: number for number, module in enumerate(calls)}
    for kind in (nn.ModuleList, nn.Sequential):
        for name, module in model.named_modules():
            if not isinstance(module, kind) or not len(module):
                continue
            if any(name.startswith(f"{outer}.") for outer, _ in found):
                continue
            blocks = [*module.children()]
            if all(block in calls for block in blocks) and _carry_on(blocks, calls):
                found.append((name, blocks))
        if found:
            break
    sizes = {name: sum(p.numel() for b in blocks for p in b.parameters()) for name, blocks in found}
    # Beside the blocks there may be short lists, such as one of norms.
    kept = [item for item in found if sizes[item[0]] * 8 >= max(sizes.values())]
    return sorted(kept, key=lambda item: order[item[1][0]])


def _carry_on(blocks: Blocks, calls: dict[nn.Module, _Call]) -> bool:
    """Whether each of the blocks reads what the one before has written."""
    before: Tensor | None = None
    for block in blocks:
        call = calls[block]
        # A block that runs more than once, its weights shared by several layers, is no place.
        if call.times > 1 or call.output is None or call.output.shape != call.stream.shape:
            return False
        if call.stream.shape[1] <= TOKEN:
            return False
        if before is not None and not torch.equal(before, call.stream):
            return False
        before = call.output
    return True


@dataclass(frozen=True)
class Padding:
    """What padding does to the other tokens of a model."""

    # Whether padding on the left moves the text to other learned positions, unless the model is
    # given `position_ids`.
    counted: bool = False
    # Whether it changes what is computed in yet another way, on either side, so that it must run as
    # it was given.
    read: bool = False
    # The only token that may be put there, as the model tells padding by it; None for any.
    token: int | None = None


def _padding(model: nn.Module) -> Padding:
    """See :class:`Padding`; from a few runs with two columns of it on either side."""
    inputs, taken = trial_inputs(model), inspect.signature(type(model).forward).parameters
    if "decoder_input_ids" in taken or "attention_mask" not in inputs:
        return Padding(read=True)
    ids: Tensor = inputs["input_ids"]
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    given = getattr(text, "pad_token_id", None)
    own = given if isinstance(given, int) and given >= 0 else 0

    def changes(left: bool, token: int, told: bool) -> bool:
        columns = torch.full_like(ids[:, :2], token)
        both = [columns, ids] if left else [ids, columns]
        mask = [torch.zeros_like(columns), torch.ones_like(ids)]
        padded = {
            **inputs,
            "input_ids": torch.cat(both, 1),
            "attention_mask": torch.cat(mask if left else mask[::-1], 1),
        }
        if told:
            padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
        try:
            found = first_tensor(model(**padded))
        except (RuntimeError, TypeError, ValueError, LookupError):
            return True
        if found is None or found.shape[:2] != padded["input_ids"].shape:
            return True
        real = (found[:, 2:] if left else found[:, :-2]).double()
        return not bool((real - alone).abs().max() <= near)

    whole = first_tensor(model(**inputs))
    if whole is None:
        return Padding(read=True)
    alone = whole.double()
    near = 4 * _tolerance(whole.dtype) * float(alone.abs().max())
    left = changes(True, own, told=False)
    counted = left and "position_ids" in taken and not changes(True, own, told=True)
    if (left and not counted) or changes(False, own, told=False):
        return Padding(counted, read=True)
    other = 1 if own == 0 else own - 1
    by_token = changes(True, other, told=counted) or changes(False, other, told=False)
    return Padding(counted, token=own if by_token else None)


def _trunk(blocks: str, given: dict[str, bool]) -> str:
    """The innermost module around the blocks that was given the token ids."""
    path = blocks
    while path:
        path = path.rpartition(".")[0]
        if given.get(path, False):
            return path
    return ""


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients, in eager mode; everything as before afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), run_eagerly(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module in training:
            module.training = True


def _ours(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook for passes of this thread alone: other threads may run the model meanwhile."""
    thread = get_ident()
    return lambda *args: hook(*args) if get_ident() == thread else None


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(_ours(hook))
    try:
        yield
    finally:
        handle.remove()


def with_first(output: Any, tensor: Tensor) -> Any:
    """A module's output with its (first) tensor replaced."""
    if isinstance(output, Tensor):
        return tensor
    if type(output) is tuple:
        return tensor, *output[1:]
    if isinstance(output, Mapping):
        return type(output)({**output, next(iter(output)): tensor})  # type: ignore[call-arg]
    return type(output)([tensor, *output[1:]])


def _input_like(stream: Tensor, seed: int, size: float = 1.0) -> Tensor:
    """A made-up stream of small multiples of 1/8 (times a power of two), (B, T, d)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-16, 17, stream.shape, generator=generator).double() / 8
    return (size * values).to(stream.device, stream.dtype)


def _tolerance(dtype: torch.dtype) -> float:
    return max(1e-4, 4 * torch.finfo(dtype).eps)
