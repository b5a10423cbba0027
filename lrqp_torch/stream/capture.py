"""Reading the residual stream: a checked request, and the forward passes that answer it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lrqp_torch.distributed.ranks import Ranks
from lrqp_torch.errors import (
    EditNeverFiredError,
    PositionError,
    SiteError,
    WidthError,
    ordinary,
)
from lrqp_torch.files import digest_model, digest_values
from lrqp_torch.stream.compiled import Census, input_device
from lrqp_torch.stream.discovery import added
from lrqp_torch.stream.hooks import Residual, Visit, attach, warn_of_dropout
from lrqp_torch.stream.inputs import (
    TokenBatch,
    as_inputs,
    by_length,
    check_inputs,
    count_tokens,
    cut,
    in_order,
    may_trim,
    of_stack,
    take,
)
from lrqp_torch.stream.passes import ForwardCall, cache_among
from lrqp_torch.stream.positions import Positions, Where, check_fit
from lrqp_torch.stream.progress import Advance, no_progress, progress_bars
from lrqp_torch.stream.sites import Captured, Located, Site, locate
from lrqp_torch.stream.watch import Watch, opened

ALONE = Ranks()
"""One process."""

NOTHING = "no sites were given: nothing would be captured"

Given: TypeAlias = Mapping[str, Any] | Sequence[str] | str | Tensor | tuple[Any, ...]
"""What a model is run on: named tensors, texts, or what any other module takes."""

Progressed = bool | Advance
"""Whether to show a progress bar, or what to call with the number of examples just run."""


def capture(
    model: nn.Module,
    inputs: Given,
    sites: str | Site | Sequence[str | Site],
    positions: Where | None = None,
    *,
    tokenizer: Any = None,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    device: torch.device | str | None = None,
    progress: Progressed = False,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Activations at sites and positions; keeps nothing else, and runs no further than needed.

    With positions and an attention mask, examples of similar length run together and the padding
    that none of them needs does not run (:mod:`~.inputs`); the result is in the order
    of the inputs all the same, and equal to what the inputs as given would yield, to rounding.
    Under open edits and other hooks the inputs run as given.

    Args:
        model: a transformers model; at the sites of :meth:`~lrqp_torch.Site.module`, any module.
        inputs: arguments of the model's forward, tensors with one row an example; moved to the
            model's device batch by batch. Or texts, for which ``tokenizer`` is the model's own. Of
            any other module also what it takes by place, a tensor or a tuple.
        sites: names such as ``["L6.mid", "L7.pre"]``, or one name; see
            :class:`~lrqp_torch.stream.sites.Site`.
        positions: LongTensor (n,) or (n, k), or BoolTensor (n, T), on the padded input as given, or
            lists of these; an int or a slice, for columns of every example; ``"last"``,
            ``"prompt"`` or ``"all"``, for its last or all of its real tokens; a word's
            (:class:`~lrqp_torch.Span`); or a function of the inputs that returns such. Default all
            tokens, padding included. In an encoder–decoder they count those of the site's own stack
            (``input_ids``, or ``decoder_input_ids``); sites of both may be asked for at once.
        batch_size: the most examples a forward pass; default no limit.
        batch_tokens: the most tokens a forward pass, padding included; default no limit. A single
            example may exceed it.
        device: where to keep the activations; default the model's device.
        progress: whether to show a progress bar (rank 0 does); or a function to call with the
            number of examples just run.
        ranks: processes that share the work, of which each runs some batches and gets the whole,
            the same bits as of one process with the same ``batch_size`` or ``batch_tokens``;
            without either, every rank runs one batch. The whole model and all inputs must be there
            on each.

    Returns:
        For each site's name activations in the stream's dtype: (n, d) for positions (n,),
        (n, k, d) for (n, k), (N, d) for a mask with N true entries in row-major order, (n, T, d)
        without.

    Raises:
        SiteError, UnknownFamilyError, PositionError: bad input, named, on the first rank.
        ToldError: an error on another rank, which raises it.
        RankError: models or inputs that are not the same on all ranks, or a rank that has gone.
    """
    with ranks.together():
        asked = [locate(model, site) for site in listed(sites)]
    found: dict[str, Tensor] = {}
    plain = [item for item in asked if item.trunk.plain]
    if plain:
        found |= _read_plainly(model, inputs, plain, positions, batch_size, device)
    for passes in dict.fromkeys(item.passes for item in asked if not item.trunk.plain):
        together = [item.site for item in asked if item.passes is passes]
        reading = Reading(
            model, inputs, together, positions, batch_size, batch_tokens, ranks, tokenizer
        )
        with progress_shown(ranks.is_main and progress, reading.n_examples) as advance:
            found |= reading.gather(range(reading.n_examples), device, advance)
    if not asked:
        raise PositionError(NOTHING)
    return Captured((str(item.site), ordinary(found[str(item.site)])) for item in asked)


def listed(sites: str | Site | Sequence[str | Site]) -> Sequence[str | Site]:
    """One site or several, as a list."""
    return [sites] if isinstance(sites, str | Site) else sites


def capture_batches(
    model: nn.Module,
    inputs: Given,
    sites: str | Site | Sequence[str | Site],
    positions: Where | None = None,
    *,
    tokenizer: Any = None,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    device: torch.device | str | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The activations of :func:`capture` batch by batch, in memory that does not grow with n.

    ::

        covariance = lrqp.Covariance(width)
        for rows, found in capture_batches(model, inputs, "L6.mid", at, batch_size=64):
            covariance.update(found["L6.mid"])        # labels[rows] would be their labels

    Batches come in order of length, not of the inputs.

    All arguments are as there, and all sites in one stack of one language model. Of ``ranks`` each
    batch comes on one only, and nothing is exchanged: ``ranks.merge`` makes one covariance of those
    of all ranks, and :func:`lrqp_torch.distributed.fit_batches` one probe.

    Yields:
        ``(rows, found)`` with ``capture(...)[site][rows]`` equal to ``found[site]``; rows is a
        LongTensor, ascending, on the CPU.

    Raises:
        SiteError, UnknownFamilyError, PositionError, ToldError, RankError: as there; at the call,
            not at the first batch.
    """
    reading = Reading(model, inputs, sites, positions, batch_size, batch_tokens, ranks, tokenizer)
    runs = reading.run(range(reading.n_examples), device, ranks.turns)
    return ((rows, {name: ordinary(x) for name, x in found.items()}) for _, rows, found in runs)


@contextmanager
def progress_shown(progress: Progressed, n_examples: int) -> Iterator[Advance]:
    """What to call after each batch."""
    if callable(progress):
        yield progress
    elif progress:
        with progress_bars() as start:
            yield start("capturing activations", n_examples)
    else:
        yield no_progress


# What says where the text is, and where each token of it stands.
_READ = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


class _StopForwardError(Exception):
    """Ends a forward pass after the last site that a capture needs; never leaves this file."""


class Reading:
    """A checked request for activations, of which any range of examples can be run.

    Args:
        model: as for :func:`lrqp_torch.capture`, like all other arguments.
        inputs: as there.
        sites: as there.
        positions: as there.
        batch_size: as there.
        batch_tokens: as there.

    Attributes:
        n_examples: n.
        sites: the names in the order asked for, each once.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Given,
        sites: str | Site | Sequence[str | Site],
        positions: Where | None,
        batch_size: int | None,
        batch_tokens: int | None,
        ranks: Ranks = ALONE,
        tokenizer: Any = None,
    ) -> None:
        with ranks.together():
            located = [locate(model, site) for site in listed(sites)]
            self._check_alike(located)
            read = as_inputs(model, inputs, tokenizer)
            self._prepare(model, read, located, positions, batch_size, batch_tokens)
        self.ranks = ranks
        if ranks.size > 1:
            ranks.agree(
                {
                    "the models": digest_model(model),
                    "the inputs": digest_values(self.inputs),
                    "the positions": self.digest_of_positions,
                    "sites and batches": (self.sites, batch_size, batch_tokens),
                }
            )

    def _prepare(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        located: list[Located],
        positions: Where | None,
        batch_size: int | None,
        batch_tokens: int | None,
    ) -> None:
        self.trunk = located[0].trunk
        own = of_stack(model, inputs, self.trunk)
        self.n_examples, self.length = count_tokens(own)
        check_inputs(model, own, self.trunk)
        if cache_among(inputs) is not None:
            raise PositionError(
                "capture stops the forward pass early, which would leave the KV cache in inputs "
                "half filled; give the whole text without a cache"
            )
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
            if value is not None and value < 1:
                raise PositionError(f"{name} must be at least 1, got {value}")
        self.model, self.inputs = model, inputs
        self.located = {str(item.site): item for item in located}
        self.sites = list(self.located)
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.trims = positions is not None and may_trim(model, inputs, self.trunk)
        self.places = None if positions is None else self._parse(positions, own)
        known = positions is None or isinstance(positions, Tensor)
        said = positions if known or self.places is None else self.places.positions.token
        self.digest_of_positions = digest_values({"positions": said})
        given = {name: own[name] for name in _READ if name in own}
        call = Watch(model, trunk=self.trunk, warns=True).texts.read(given)
        if self.places is not None:
            check_fit(self.places.positions, call)
        self._within = opened()
        warn_of_dropout(Census.of(model).in_training(model))

    @staticmethod
    def _check_alike(located: list[Located]) -> None:
        if not located:
            raise PositionError(NOTHING)
        if located[0].trunk.plain or len({id(item.trunk.module) for item in located}) > 1:
            raise SiteError(
                f"{', '.join(str(item.site) for item in located)}: batches are of sites in one "
                f"stack of one language model; capture takes others too"
            )

    def _parse(self, positions: Where, own: Mapping[str, Any]) -> "_Places":
        parsed = Positions.parse(positions).among(self.n_examples, self.length, own)
        if parsed.batch != self.n_examples:
            raise PositionError(
                f"positions are for {parsed.batch} examples, inputs have {self.n_examples}"
            )
        if parsed.is_mask and parsed.grid[1] != self.length:
            raise PositionError(
                f"the mask of positions has {parsed.grid[1]} columns, the inputs have {self.length}"
            )
        return _Places(parsed.to("cpu"))

    def gather(
        self,
        examples: range,
        device: torch.device | str | None,
        advance: Advance,
    ) -> dict[str, Tensor]:
        """The activations of consecutive examples, in their order, on every rank."""
        begin, end = self.span(examples)
        if self.ranks.size > 1:
            return self._gather_shares(examples, device, advance)
        whole: dict[str, Tensor] = {}
        for batch, rows, found in self.run(examples, device):
            if len(rows) == end - begin:  # all of it, in order, so without a copy
                whole = found
            else:
                whole = whole or {
                    name: part.new_empty(end - begin, *part.shape[1:])
                    for name, part in found.items()
                }
                for name, part in found.items():
                    whole[name][rows.to(part.device) - begin] = part
            advance(len(batch.examples))
        return whole

    def _gather_shares(
        self,
        examples: range,
        device: torch.device | str | None,
        advance: Advance,
    ) -> dict[str, Tensor]:
        if self.batch_size is None and self.batch_tokens is None:
            self.batch_size = -(-len(examples) // self.ranks.size)
        begin, end = self.span(examples)
        rows, parts = [torch.empty(0, dtype=torch.long)], list[dict[str, Tensor]]()
        with self.ranks.counted(advance, len(examples)) as own, self.ranks.together():
            for batch, here, found in self.run(examples, device, self.ranks.turns):
                rows.append(here - begin)
                parts.append(found)
                own(len(batch.examples))
        names = self.sites if parts else []
        mine = {name: torch.cat([part[name] for part in parts]) for name in names}
        return self.ranks.gather_rows(torch.cat(rows), mine, end - begin)

    def span(self, examples: range) -> tuple[int, int]:
        """First row of the result that consecutive examples fill, and the one after the last."""
        begin, end = examples.start, examples.stop
        if self.places is not None and self.places.is_mask:
            begin, end = int(self.places.offsets[begin]), int(self.places.offsets[end])
        return begin, end

    def run(
        self, examples: range, device: torch.device | str | None, turns: slice = slice(None)
    ) -> Iterator[tuple[TokenBatch, Tensor, dict[str, Tensor]]]:
        """Batch, rows of the result and activations by site, of consecutive examples.

        ``turns`` says which of the batches to run, such as every second one.
        """
        limits = examples, self.batch_size, self.batch_tokens
        batches = (
            by_length(self.inputs["attention_mask"], *limits)
            if self.trims
            else in_order(self.length, *limits)
        )
        home = input_device(self.model)
        for opening in self._within:
            opening.check()
        for batch in batches[turns]:
            part = (
                cut(self.inputs, batch, self.trunk)
                if self.trims
                else take(self.inputs, batch, self.n_examples)
            )
            part = {
                name: value.to(home) if isinstance(value, Tensor) else value
                for name, value in part.items()
            }
            at = None if self.places is None else self.places.of(batch).to(home)
            found = _read(self.model, part, list(self.located.values()), at)
            if device is not None:
                found = {name: activations.to(device) for name, activations in found.items()}
            rows = batch.examples if self.places is None else self.places.rows(batch)
            yield batch, rows, {name: found[name] for name in self.sites}


class _Places:
    """The positions of a whole set of inputs, of which each batch takes its own.

    Attributes:
        is_mask: whether they were given as a mask, so that results have one row a position.
        offsets: number of positions before each example, and in all, LongTensor (n + 1,).
    """

    def __init__(self, positions: Positions) -> None:
        self.positions, self.is_mask = positions, positions.is_mask
        self.counts = positions.example.bincount(minlength=positions.batch or 0)
        self.offsets = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])

    def of(self, batch: TokenBatch) -> Positions:
        """The positions of a batch, on the columns that it runs."""
        pairs, counts = self._pairs(batch), self.counts[batch.examples]
        example = torch.arange(len(batch.examples)).repeat_interleave(counts)
        token = self.positions.token[pairs] - batch.first[example]
        size = len(batch.examples)
        return Positions(
            example, token, size, grid=(size, *self.positions.grid[1:]), is_mask=self.is_mask
        )

    def rows(self, batch: TokenBatch) -> Tensor:
        """Which rows of the whole result a batch yields."""
        return self._pairs(batch) if self.is_mask else batch.examples

    def _pairs(self, batch: TokenBatch) -> Tensor:
        counts = self.counts[batch.examples]
        before = self.offsets[batch.examples] - (counts.cumsum(0) - counts)
        return before.repeat_interleave(counts) + torch.arange(int(counts.sum()))


@torch.no_grad()
def _read(
    model: nn.Module, inputs: dict[str, Any], located: list[Located], at: Positions | None
) -> dict[str, Tensor]:
    """One forward pass, ended when all sites have been read."""
    captured: dict[str, Tensor] = {}
    # A module that was named by its path may run once more, which must be seen.
    once = all(item.site.path is None for item in located)

    def keep(item: Located) -> Visit:
        name = str(item.site)

        def read(stream: Tensor, residual: Residual, scale: float, call: ForwardCall) -> Tensor:
            def pick(tensor: Tensor) -> Tensor:
                if at is None:
                    return tensor[:, call.front :]
                here = at.to(tensor.device)
                rows = tensor[here.example, here.token + call.front]
                return rows.reshape(*at.shape, tensor.shape[-1])

            captured[name] = _held(stream, residual, scale, pick).detach()
            if once and len(captured) == len(located):
                raise _StopForwardError
            if at is None and residual is None:
                # What goes on may write over its own tensors, as Falcon adds to its MLP's output.
                captured[name] = captured[name].clone()
            return stream

        return read

    watch = Watch(model, trunk=located[0].trunk)
    with watch:
        for item in sorted(located, key=lambda item: item.site):
            attach(watch, item, keep(item))
        with suppress(_StopForwardError):
            model(**inputs)
    _check_reached(located, captured)
    return captured


def _held(
    stream: Tensor,
    residual: Residual,
    scale: float,
    pick: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """What is at a site, or what is picked of it, of what its hook is given."""
    base, beside = residual if isinstance(residual, tuple) else (residual, None)
    held = added(pick(stream), scale, None if beside is None else pick(beside))
    return held if base is None else pick(base) + held


def _check_reached(located: Sequence[Located], captured: Mapping[str, Tensor]) -> None:
    missing = [str(item.site) for item in located if str(item.site) not in captured]
    if missing:
        raise EditNeverFiredError(f"the forward pass never reached {', '.join(missing)}")


@torch.no_grad()
def _read_plainly(
    model: nn.Module,
    inputs: Any,
    located: list[Located],
    positions: Where | None,
    batch_size: int | None,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """Activations of modules that are no language model: what they are called with is their own."""
    parts: dict[str, list[Tensor]] = {str(item.site): [] for item in located}
    given = inputs if isinstance(inputs, Mapping | tuple) else (inputs,)
    tensors = given.values() if isinstance(given, Mapping) else given
    n_examples = next((len(x) for x in tensors if isinstance(x, Tensor) and x.ndim), 0)
    if not n_examples:
        raise WidthError(
            f"inputs must be what the model takes, tensors with one row an example, got "
            f"{type(inputs).__name__}"
        )

    def keep(item: Located) -> Visit:
        def read(stream: Tensor, residual: Residual, scale: float, call: ForwardCall) -> Tensor:
            held = _held(stream, residual, scale)
            # What goes on may write over its own tensors.
            parts[str(item.site)].append((held.clone() if held is stream else held).detach())
            return stream

        return read

    warn_of_dropout(Census.of(model).in_training(model))
    home = input_device(model)
    for batch in in_order(1, range(n_examples), batch_size, None):
        part = take(given, batch, n_examples)
        with ExitStack() as stack:
            for item in located:
                attach(stack.enter_context(Watch(model, trunk=item.trunk)), item, keep(item))
            if isinstance(part, Mapping):
                model(**{k: x.to(home) if isinstance(x, Tensor) else x for k, x in part.items()})
            else:
                model(*(x.to(home) if isinstance(x, Tensor) else x for x in part))
    found = {name: torch.cat(batches) for name, batches in parts.items() if batches}
    _check_reached(located, found)
    for name, whole in found.items():
        if positions is not None:
            at = Positions.parse(positions).among(len(whole), whole.shape[1], {})
            if at.batch != len(whole) or at.span[1] >= whole.shape[1]:
                raise PositionError(
                    f"{name} has {len(whole)} rows of {whole.shape[1]} tokens, positions are for "
                    f"{at.batch} rows and up to {at.span[1]}"
                )
            here = at.to(whole.device)
            found[name] = whole[here.example, here.token].reshape(*at.shape, whole.shape[-1])
        elif whole.shape[1] == 1:
            found[name] = whole[:, 0]
        found[name] = found[name].to(device or whole.device)
    return found
