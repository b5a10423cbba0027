"""Tokens that are like the one before: what they are known by, and what is done again for them.

Each case decodes by hand, with a change between two tokens, and is held against the same where no
token is known by the one before. On the CPU by one compiled call a pass; and the GPU's way, by
launches that are done again by addresses (:mod:`launches_for_tests`).
"""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import copy_context
from typing import Any
from unittest import mock

import pytest
import torch
from launches_for_tests import Elsewhere, launched_by_address
from models_for_tests import VOCABULARY, build, random_edit
from torch import Tensor
from transformers import DynamicCache

import lrqp_torch as lrqp
from lrqp_torch.edits import record
from lrqp_torch.errors import LRQPError
from lrqp_torch.qp import fused
from lrqp_torch.stream import following, repeats
from lrqp_torch.stream.passes import Texts

WAYS = ("one call", "launches")
WITHOUT = "launches without a compiler"
ROWS, PROMPT, TOKENS, CHANGED = 3, 4, 7, 4
"""Rows, columns of the prompt, tokens behind it, and which of these a change is before."""


def model_of(name: str = "gpt2") -> Any:
    # A width for which what is compiled is laid down: strides are multiples of 16.
    wide = {"n_embd": 32} if name == "gpt2" else {"hidden_size": 32, "intermediate_size": 64}
    return build(name, **wide).requires_grad_(False)


def edit_of(model: Any, site: str, n_classes: int = 3) -> lrqp.LRQP:
    ids = torch.randint(VOCABULARY, (8, 9), generator=torch.Generator().manual_seed(5))
    x = lrqp.capture(model, {"input_ids": ids}, [site], torch.ones_like(ids).bool())[site]
    return random_edit(x, n_classes, on_infeasible="skip")


@contextmanager
def nothing_known() -> Iterator[None]:
    """Each call is read, and each launch laid down, as if it were the first."""
    with (
        mock.patch.object(Texts, "like", lambda *_: None),
        mock.patch.object(Texts, "again", lambda *_: None),
        mock.patch.object(record._Launch, "of", lambda *_: None),
    ):
        yield


@contextmanager
def going(way: str) -> Iterator[None]:
    with ExitStack() as stack:
        if way != "one call":
            stack.enter_context(launched_by_address(stands_in=True))
        if way == WITHOUT:
            stack.enter_context(mock.patch.object(repeats, "_python", lambda: None))
        yield


class Decoding:
    """A prompt that was read, and tokens behind it, one call each."""

    def __init__(
        self, model: Any, edit: lrqp.LRQP, hidden: int = 0, mask: type[Tensor] = Tensor
    ) -> None:
        self.model, self.edit = model, edit
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(VOCABULARY, (ROWS, PROMPT + TOKENS), generator=generator)
        self.mask: Tensor | None = torch.ones_like(self.ids)[:, :PROMPT]
        self.mask[0, :hidden] = 0
        self.mask = self.mask.as_subclass(mask)
        self.cache, self.more, self.logits = DynamicCache(config=model.config), {}, []
        self.before: Any = None
        self.run: Callable[[Callable[[], Any]], Any] = lambda call: call()
        self.column = PROMPT
        self.read(self.ids[:, :PROMPT])

    def read(self, ids: Tensor) -> None:
        given = {"input_ids": ids, "past_key_values": self.cache, "use_cache": True, **self.more}
        if self.mask is not None:
            given["attention_mask"] = self.mask
        output = self.run(lambda: self.model(**given))
        self.logits.append(output.logits)

    def token(self) -> None:
        if self.mask is not None:
            shown = torch.ones_like(self.mask[:, :1])
            self.mask = torch.cat([self.mask, shown], 1)
        self.read(self.ids[: len(self.ids), self.column : self.column + 1])
        self.column += 1


def decoded(
    change: Callable[[Decoding], None],
    site: str = "L1.mid",
    *,
    model: Any = None,
    scope: Any = "generated",
    target: Any = 1,
    make: Callable[..., Any] = edit_of,
    **given: Any,
) -> Any:
    """What the model returned and what was recorded, or the error, as it is or begins."""
    model = model_of() if model is None else model
    edit = make(model, site)
    try:
        with torch.no_grad(), edit.at(model, site, positions=scope, target=target) as run:
            text = Decoding(model, edit, **given)
            for number in range(TOKENS):
                if number == CHANGED:
                    change(text)
                text.token()
    except LRQPError as error:
        return type(error), str(error)
    columns = "log_odds_before", "log_odds_after", "floor", "distance", "status"
    found = [getattr(run, name) for name in columns]
    return [*text.logits, *found, run.example, run.token, run.generation]


def agree(ours: Any, others: Any) -> None:
    assert type(ours) is type(others)
    if isinstance(ours, tuple):
        assert ours == others
    else:
        assert len(ours) == len(others) and all(map(torch.equal, ours, others))


def nothing(text: Decoding) -> None:
    """The tokens go on as before."""


def next_column_hidden(text: Decoding) -> None:
    """A row whose token is hidden from now on."""
    assert text.mask is not None
    text.mask = torch.cat([text.mask[:, :-1], torch.tensor([[1], [0], [1]])], 1)
    text.token = lambda: hidden_token(text)  # type: ignore[method-assign]


def hidden_token(text: Decoding) -> None:
    assert text.mask is not None
    text.mask = torch.cat([text.mask, torch.tensor([[1], [0], [1]])], 1)
    text.read(text.ids[:, text.column : text.column + 1])
    text.column += 1


def mask_written_over(text: Decoding) -> None:
    """One mask for all tokens, written to as NumPy does, which leaves no trace."""
    whole = torch.ones_like(text.ids)

    def token() -> None:
        if text.column == PROMPT + CHANGED + 1:
            whole.numpy()[2, text.column] = 0
        text.mask = whole[:, : text.column + 1]
        text.read(text.ids[:, text.column : text.column + 1])
        text.column += 1

    text.token = token  # type: ignore[method-assign]


def mask_left_out(text: Decoding) -> None:
    text.mask = None


def other_columns(text: Decoding) -> None:
    """Positions that leave one out: the model computes others, the text goes on."""

    def read(ids: Tensor, read: Any = text.read) -> None:
        text.more = {"position_ids": torch.full((ROWS, 1), text.column + 3)}
        read(ids)

    text.read = read  # type: ignore[method-assign]


def rows_reordered(text: Decoding) -> None:
    """As beams are."""
    text.cache.reorder_cache(torch.tensor([2, 0, 0]))


def rows_left_out(text: Decoding) -> None:
    text.cache.batch_select_indices(torch.tensor([0, 2]))
    text.ids = text.ids[[0, 2]]
    assert text.mask is not None
    text.mask = text.mask[[0, 2]]


def another_cache(text: Decoding) -> None:
    """That holds the same, beside the one before."""
    text.before = text.cache
    text.cache = copy.deepcopy(text.cache)


def a_cache_cut(text: Decoding) -> None:
    text.cache.crop(PROMPT + 1 - text.column)
    assert text.mask is not None
    text.mask = text.mask[:, : PROMPT + 1]
    text.column = PROMPT + 1


def another_text(text: Decoding) -> None:
    """One that is begun and goes on by turns with it."""
    other = Decoding(text.model, text.edit)

    def token(token: Any = text.token) -> None:
        token()
        other.token()
        text.logits.append(other.logits[-1])

    text.token = token  # type: ignore[method-assign]


def a_text_anew(text: Decoding) -> None:
    """The cache is emptied, and a prompt of one token is read into it."""
    text.cache.crop(0)
    text.mask, text.column = None, 0


def a_thread_of_the_context(text: Decoding) -> None:
    """One that takes its context along."""

    def run(call: Callable[[], Any]) -> Any:
        results: list[Any] = []
        context = copy_context()

        def within() -> None:
            with torch.no_grad():
                results.append(call())

        thread = threading.Thread(target=lambda: context.run(within))
        thread.start()
        thread.join()
        return results[0]

    text.run = run


def a_thread_of_its_own(text: Decoding) -> None:
    """One token of which no context knows."""

    def run(call: Callable[[], Any]) -> Any:
        results: list[Any] = []

        def within() -> None:
            with torch.no_grad():
                results.append(call())

        thread = threading.Thread(target=within)
        thread.start()
        thread.join()
        text.run = lambda call: call()
        return results[0]

    text.run = run


def weights_scaled(text: Decoding) -> None:
    text.edit.probe.weight.mul_(1.25)


def weights_written_over(text: Decoding) -> None:
    """Unseen: the kernel itself finds it, and the rest is the same."""
    text.edit.probe.weight.data[0, 0] += 0.5


def bias_replaced(text: Decoding) -> None:
    bias = text.edit.probe.bias
    text.edit.probe.bias = torch.nn.Parameter(bias + torch.arange(len(bias)), requires_grad=False)


def odds_changed(text: Decoding) -> None:
    text.edit.log_odds.fill_(3.0)


def rule_changed(text: Decoding) -> None:
    text.edit.rule = "fixed"


def metric_scaled(text: Decoding) -> None:
    text.edit.metric.covariance.mul_(2.0)


def failures_raised(text: Decoding) -> None:
    text.edit.on_infeasible = "raise"


def edit_moved(text: Decoding) -> None:
    """To other memory, as to another device and back."""
    for part in (*text.edit.parameters(), *text.edit.buffers()):
        part.data = part.data.clone()


def a_gradient_asked_for(text: Decoding) -> None:
    """One token through which a derivative with respect to the probe goes."""

    def run(call: Callable[[], Any]) -> Any:
        text.edit.probe.requires_grad_(True)
        with torch.enable_grad():
            output = call()
        text.edit.probe.requires_grad_(False)
        text.run = lambda call: call()
        output.logits = output.logits.detach()
        return output

    text.run = run


def half_precision(text: Decoding) -> None:
    """Under autocast the attention output is narrower than the stream."""

    def run(call: Callable[[], Any]) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return call()

    text.run = run


CHANGES = [
    nothing, next_column_hidden, mask_written_over, mask_left_out, other_columns, rows_reordered,
    rows_left_out, another_cache, a_cache_cut, another_text, a_text_anew, a_thread_of_the_context,
    a_thread_of_its_own, weights_scaled, weights_written_over, bias_replaced, odds_changed,
    rule_changed, metric_scaled, failures_raised, edit_moved, a_gradient_asked_for, half_precision,
]  # fmt: skip


@pytest.mark.parametrize(
    ("way", "change"),
    [(way, change) for way in WAYS for change in CHANGES]
    + [(WITHOUT, change) for change in CHANGES[CHANGES.index(weights_scaled) :]],
)
def test_a_change_between_two_tokens_is_followed(
    way: str, change: Callable[[Decoding], None]
) -> None:
    with going(way):
        ours = decoded(change)
        with nothing_known():
            others = decoded(change)
    agree(ours, others)
    alike = {nothing, mask_left_out, a_thread_of_the_context, failures_raised, edit_moved}
    if change in alike | {mask_written_over, weights_written_over, a_gradient_asked_for}:
        return
    # And it does change something, which a token that was wrongly known would not have.
    with going(way):
        unchanged = decoded(nothing)
    with pytest.raises(AssertionError):
        agree(ours, unchanged)


SCOPES = [
    ("generated", 1),
    ("all", 1),
    (lrqp.Scope("generated", repeats=3), [2]),
    (lrqp.Scope("generated", prompt_length=6), 0),
    ([1, 2, 3], [0, 1, 2]),
    ([[1, 5], [2, 9], [3, 10]], 1),
]


@pytest.mark.parametrize("site", ["L0.pre", "L1.mid", "L2.post"])
@pytest.mark.parametrize(("scope", "target"), SCOPES)
@pytest.mark.parametrize("way", WAYS)
def test_tokens_that_are_like_are_done_as_if_they_were_not(
    way: str, scope: Any, target: Any, site: str
) -> None:
    """In every scope, also behind padding."""
    given = {"scope": scope, "target": target, "hidden": 1}
    model = model_of("gpt2" if site == "L1.mid" else "llama")
    with going(way):
        ours = decoded(nothing, site, model=model, **given)
        with nothing_known():
            others = decoded(nothing, site, model=model, **given)
    agree(ours, others)


def test_a_like_token_is_launched_by_what_was_laid_down() -> None:
    """It is neither read nor laid down again."""
    model = model_of()
    edit, read = edit_of(model, "L1.mid"), Texts.read
    laid, seen = mock.Mock(side_effect=fused.edit_stream), mock.Mock()
    with (
        launched_by_address(stands_in=True) as again,
        mock.patch.object(fused, "edit_stream", laid),
        mock.patch.object(Texts, "read", lambda *args, **given: (seen(), read(*args, **given))[1]),
    ):
        found = decoded(nothing, model=model, make=lambda *_: edit)
    assert isinstance(found, list)
    # The prompt and a token are read; that one and the first that is like it are laid down.
    assert (seen.call_count, laid.call_count) == (2, 2)
    assert again == [ROWS] * (TOKENS - 1)


@pytest.mark.parametrize("hides", [False, True])
def test_masks_that_are_not_looked_at_are_read_by_the_launch(hides: bool) -> None:
    """As on a GPU: what is hidden is neither edited nor numbered."""
    found = []
    for kind in (Tensor, Elsewhere):
        with launched_by_address(stands_in=True) as again:
            found.append(decoded(next_column_hidden if hides else nothing, mask=kind))
        # What is seen to be hidden has rows of its own; what is not is launched like the others.
        assert len(again) == TOKENS - 1 or (hides and kind is Tensor)
    agree(*found)


def test_nothing_is_kept_that_only_a_cuda_graph_will_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of rows, where they are, and launches that read these."""
    kept = dict[torch.device, Tensor]()
    monkeypatch.setattr(following, "_NUMBERS", kept)
    step, found = following.ScopeFollower._new_step, []
    for captures in (False, True):
        kept.clear()
        laid, seen = mock.Mock(side_effect=fused.edit_stream), mock.Mock()
        with launched_by_address(stands_in=True), monkeypatch.context() as patch:
            for module in (record, following):
                patch.setattr(module, "capturing", lambda *_, captures=captures: captures)
            patch.setattr(fused, "edit_stream", laid)
            patch.setattr(
                following.ScopeFollower, "_new_step", lambda *a, seen=seen: (seen(), step(*a))[1]
            )
            found.append(decoded(nothing))
        # The first token is read like any call.
        assert seen.call_count == (TOKENS - 1 if captures else 1)
        assert laid.call_count == (TOKENS if captures else 2)
        assert bool(kept) != captures
    agree(*found)


def test_beams_and_several_open_contexts() -> None:
    """Rows that change places by themselves, and edits at two sites of one generation."""
    found = []
    for known in (True, False):
        model = model_of()
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
        one, two = edit_of(model, "L0.post"), edit_of(model, "L2.mid", 2)
        ids = torch.randint(VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(3))
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        scope = lrqp.Scope("generated", repeats=2)
        with (
            launched_by_address(stands_in=True),
            nullcontext() if known else nothing_known(),
            one.at(model, "L0.post", positions=scope, target=[0, 2]) as first,
            two.at(model, "L2.mid", positions=scope, target=1) as second,
        ):
            tokens = model.generate(ids, attention_mask=mask, num_beams=2, max_new_tokens=6)
        runs = [getattr(run, n) for run in (first, second) for n in ("distance", "token", "floor")]
        found.append([tokens, *runs])
    assert all(map(torch.equal, *found))
