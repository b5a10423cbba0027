"""A pass like the one before is edited by compiled code that looks at all that may have changed."""

import contextvars
import copy
import gc
import re
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from test_changes import OF_SIGMA, OF_THE_REST, WIDTH, One, Several
from torch import Tensor
from torch.autograd import forward_ad

import lrqp_torch as lrqp
from lrqp_torch import Intervention, intervene
from lrqp_torch.edits.record import WAITING
from lrqp_torch.errors import LRQPError, NonFiniteError, SiteError, WidthError
from lrqp_torch.qp import native
from lrqp_torch.stream import repeats

pytestmark = pytest.mark.skipif(not repeats.available(), reason="no C compiler")

SITES = ["L1.pre", "L1.mid", "L0.post"]
IDS = torch.randint(61, (4, 6), generator=torch.Generator().manual_seed(0))
AT = torch.tensor([3, 2, 5, 1])
ADDED = torch.linspace(-1, 2, WIDTH)


def build() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=WIDTH, n_layer=3, n_head=4, n_positions=32, eos_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


@contextmanager
def by_python() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats, "_python", lambda: None)
        yield


def function(x: Tensor, context: Any) -> Tensor:
    return x + ADDED.to(x.dtype)


def opened(kind: str, model: Any, site: str) -> Any:
    if kind == "function":
        return intervene(model, Intervention(site, AT, function))
    made = One() if kind == "edit" else Several()
    return made.edit.at(model, site, positions=AT, target=made.target)


def again(model: Any, inputs: dict[str, Tensor]) -> Any:
    return model(**inputs).logits


def another_mask(model: Any, inputs: dict[str, Tensor]) -> Any:
    return model(**{**inputs, "attention_mask": inputs["attention_mask"].clone()}).logits


def written_mask(model: Any, inputs: dict[str, Tensor]) -> Any:
    inputs["attention_mask"].numpy()[1, 4:] = 0  # behind the position
    found = model(**inputs).logits
    inputs["attention_mask"].numpy()[1, 4:] = 1
    return found


def longer(model: Any, inputs: dict[str, Tensor]) -> Any:
    return model(torch.cat([inputs["input_ids"], inputs["input_ids"][:, :1]], 1)).logits


def gradient(model: Any, inputs: dict[str, Tensor]) -> Any:
    with torch.enable_grad():
        loss = model(**inputs).logits.square().mean()
        (found,) = torch.autograd.grad(loss, model.transformer.wte.weight)
    return found


def tangent(model: Any, inputs: dict[str, Tensor]) -> Any:
    with forward_ad.dual_level():
        point = model.transformer.wte(inputs["input_ids"])
        dual = forward_ad.make_dual(point, torch.ones_like(point))
        out = model(inputs_embeds=dual, attention_mask=inputs["attention_mask"]).logits
        return forward_ad.unpack_dual(out).tangent


def mapped(model: Any, inputs: dict[str, Tensor]) -> Any:
    points = model.transformer.wte(inputs["input_ids"]).expand(2, -1, -1, -1)
    return torch.func.vmap(lambda point: model(inputs_embeds=point).logits)(points)


def beside(model: Any, inputs: dict[str, Tensor]) -> Any:
    """A pass within transforms of something else."""
    found = list[Tensor]()

    def run(x: Tensor) -> Tensor:
        found.append(again(model, inputs))
        return x.sin()

    torch.func.vmap(run)(torch.zeros(2))
    torch.func.grad(run)(torch.zeros(()))
    return torch.stack(found)


def functional(model: Any, inputs: dict[str, Tensor]) -> Any:
    with suppress(RuntimeError):  # torch has no rule for what derivatives of edits are made by
        return torch.func.functionalize(lambda ids: model(ids).logits)(inputs["input_ids"])
    return again(model, inputs)


def half(model: Any, inputs: dict[str, Tensor]) -> Any:
    try:
        return model.bfloat16()(**inputs).logits.float()
    finally:
        model.float()


def cast(model: Any, inputs: dict[str, Tensor]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(**inputs).logits


def nested(model: Any, inputs: dict[str, Tensor]) -> Any:
    with intervene(model, Intervention("L0.post", AT, lambda x, context: 2 * x)):
        found = [again(model, inputs) for _ in range(3)]
    return torch.stack(found)


def elsewhere(model: Any, inputs: dict[str, Tensor]) -> Any:
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.append(again(model, inputs))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def inference(model: Any, inputs: dict[str, Tensor]) -> Any:
    with torch.inference_mode():
        found = again(model, inputs)
    return found.clone()


def broken(model: Any, inputs: dict[str, Tensor]) -> Any:
    """A pass that ends in the midst, within its site."""
    handle = model.transformer.h[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    handle.remove()
    return again(model, inputs)


CHANGES: list[Callable[[Any, dict[str, Tensor]], Any]] = [
    again,
    lambda model, given: again(model, {**given, "input_ids": given["input_ids"].flip(0)}),
    lambda model, given: again(model, {**given, "input_ids": given["input_ids"].T.clone().T}),
    lambda model, given: model(given["input_ids"], use_cache=False).logits,
    lambda model, given: model(**given, output_hidden_states=True).hidden_states[-1],
    lambda model, given: model(**given, use_cache=True).logits,
    another_mask,
    written_mask,
    longer,
    gradient,
    tangent,
    mapped,
    beside,
    functional,
    half,
    cast,
    nested,
    elsewhere,
    inference,
    broken,
    lambda model, given: lrqp.capture(model, given, "L2.pre")["L2.pre"],
    lambda model, given: again(copy.deepcopy(model), given),
]


@pytest.mark.parametrize("kind", ["function", "edit", "joint"])
@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_whatever_changes_between_passes_is_seen(kind: str, site: str) -> None:
    found = []
    for compiled in (True, False):
        model, given = build(), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        with nullcontext() if compiled else by_python():
            with opened(kind, model, site) as run:
                each = [[again(model, given), change(model, given)] for change in CHANGES]
                each += [[again(model, given)] for _ in range(3)]
            numbers = [] if kind == "function" else run.steps
        found.append((each, numbers))
    for one, other in zip(*(part for part, _ in found), strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert torch.equal(mine, theirs)
    for step, other in zip(*(numbers for _, numbers in found), strict=True):
        for name, value in vars(step).items():
            same = torch.as_tensor(value).double(), torch.as_tensor(vars(other)[name]).double()
            assert torch.equal(*map(torch.nan_to_num, same)), name


@pytest.mark.parametrize("kind", [One, Several])
@torch.no_grad()
def test_whatever_an_edit_is_made_of_may_change_between_passes(kind: type[One]) -> None:
    model, given = build(), {"input_ids": IDS}
    for name, change in (OF_SIGMA | OF_THE_REST).items():
        made = kind()
        with made.edit.at(model, "L0.post", positions=AT, target=made.target) as run:
            before = [again(model, given) for _ in range(3)]
            assert run._rows._passes[-1].site.used
            change(made.edit if name in OF_SIGMA else made.written)
            found = [again(model, given) for _ in range(2)]
            last = run.steps[-1]
        other = made.anew()
        with other.at(model, "L0.post", positions=AT, target=made.target) as fresh:
            expected = again(model, given)
        assert torch.equal(before[0], before[2])
        assert all(torch.equal(one, expected) for one in found), name
        assert torch.equal(last.distance, fresh.steps[0].distance), name


@torch.no_grad()
def test_what_stands_for_an_edit_is_called() -> None:
    """A method, or a class, that is put in the place of the edit's own between passes."""
    model, given, made = build(), {"input_ids": IDS}, One()

    def refuse(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    class Other(lrqp.LRQP):
        solve = refuse

    for route in ("object", "class", "kind"):
        with (
            pytest.raises(ZeroDivisionError),
            pytest.MonkeyPatch.context() as patch,
            made.edit.at(model, "L0.post", positions=AT, target=1),
        ):
            for _ in range(3):
                again(model, given)
            if route == "kind":
                patch.setattr(made.edit, "__class__", Other)
            else:
                owner = made.edit if route == "object" else lrqp.LRQP
                patch.setattr(owner, "solve", refuse)
            again(model, given)
        vars(made.edit).pop("solve", None)


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (lambda x: x * torch.inf, NonFiniteError),
        (lambda x: x[:2], WidthError),
        (lambda x: None, WidthError),
        (lambda x: x.double() + 1, None),
        (lambda x: (x + 1).T.contiguous().T, None),
        (lambda x: x + torch.zeros(WIDTH, requires_grad=True), None),
        (lambda x: x, None),
        (lambda x: x.zero_(), None),
    ],
)
@torch.no_grad()
def test_what_a_function_gives_is_looked_at_in_every_pass(
    result: Callable[[Tensor], Any], error: type[Exception] | None
) -> None:
    model, calls = build(), list[int]()

    def sometimes(x: Tensor, context: Any) -> Any:
        calls.append(len(calls))
        return result(x) if len(calls) > 3 else x + 1

    with intervene(model, Intervention("L1.pre", AT, sometimes)):
        for _ in range(3):
            model(IDS)
        if error is not None:
            for _ in range(2):
                with pytest.raises(error):
                    model(IDS)
            assert len(calls) == 5
            return
        found = [model(IDS).logits for _ in range(2)]
    with by_python(), intervene(model, Intervention("L1.pre", AT, lambda x, c: result(x))):
        expected = model(IDS).logits
    assert len(calls) == 5 and all(torch.equal(one, expected) for one in found)


@torch.no_grad()
def test_every_pass_is_recorded_in_order_whoever_wrote_it() -> None:
    """Also where others come between, where it is read meanwhile, and where room runs out."""
    model, made = build(), One()
    texts = torch.randint(61, (WAITING + 40, 4, 6), generator=torch.Generator().manual_seed(1))
    found = []
    for compiled in (True, False):
        with nullcontext() if compiled else by_python():
            with made.edit.at(model, "L0.post", positions=AT, target=made.target) as run:
                for number, ids in enumerate(texts):
                    model(ids, use_cache=number % 30 == 29)
                    if number == 20:
                        before = run.log_odds_before
            found.append((before, run.steps))
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one.forward_pass == other.forward_pass
        assert torch.equal(one.log_odds_before, other.log_odds_before)


def in_turns(work: Callable[[int], None], count: int) -> None:
    """Run work(0), work(1), ... in threads that share this context and often change places."""
    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(work, own))
        for own in range(count)
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(3e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("way", ["repeated", "in one call", "torch"])
@pytest.mark.parametrize("kind", [One, Several])
@torch.no_grad()
def test_threads_of_one_context_lose_no_pass(
    kind: type[One], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass has a number and rows of its own, wherever threads take turns."""
    if way != "repeated":
        monkeypatch.setattr(repeats, "_python", lambda: None)
    if way == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    model, made, passes = build(), kind(), 30
    texts = [IDS.roll(step) for step in range(3)]
    with made.edit.at(model, "L0.post", positions=AT, target=made.target) as run:
        expected = [model(ids).logits for ids in texts]
    distances = [step.distance for step in run.steps]
    wrong: list[int] = []

    @torch.no_grad()
    def work(own: int) -> None:
        for _ in range(passes):
            if not torch.equal(model(texts[own]).logits, expected[own]):
                wrong.append(own)

    with made.edit.at(model, "L0.post", positions=AT, target=made.target) as run:
        in_turns(work, 3)
    assert not wrong
    assert sorted(step.forward_pass for step in run.steps) == [*range(3 * passes)]
    for distance in distances:
        assert sum(torch.equal(step.distance, distance) for step in run.steps) == passes


@pytest.mark.parametrize("region", ["all", "generated", "last"])
def test_threads_of_one_context_generate_each_its_own(region: str) -> None:
    model, edit = build(), One().edit
    texts = [IDS.roll(step) for step in range(3)]

    def generate(ids: Tensor) -> Tensor:
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    alone, distances, found = list[Tensor](), list[float](), dict[int, Tensor]()
    for ids in texts:
        with edit.at(model, "L0.post", positions=region, target=1) as run:
            alone.append(generate(ids))
        distances += run.distance.flatten().tolist()
    with edit.at(model, "L0.post", positions=region, target=1) as run:
        in_turns(lambda own: found.update({own: generate(texts[own])}), 3)
    assert all(torch.equal(found[own], ids) for own, ids in enumerate(alone))
    assert sorted(run.distance.flatten().tolist()) == sorted(distances)


@torch.no_grad()
def test_an_edit_of_ones_own_may_have_any_other_attributes() -> None:
    class Added:
        begin = end_step = 3

        def __call__(self, x: Tensor, context: Any) -> Tensor:
            return function(x, context)

    model = build()
    with intervene(model, Intervention("L1.pre", AT, function)):
        expected = model(IDS).logits
    with intervene(model, Intervention("L1.pre", AT, Added())):
        assert all(torch.equal(model(IDS).logits, expected) for _ in range(3))


@torch.no_grad()
def test_a_closed_context_keeps_nothing_of_its_passes() -> None:
    model = build()
    seen: list[Any] = []
    with intervene(model, Intervention("L1.pre", AT, function)):
        for _ in range(3):
            model(IDS)
        seen += [hook for hook in model.transformer.h[1]._forward_pre_hooks.values()]
    assert seen[0].repeat is not None and not model.transformer.h[1]._forward_pre_hooks
    clean = model(IDS).logits
    assert torch.equal(build()(IDS).logits, clean)


# From one context to the next


class Contexts:
    """A model, an edit, and what each context is opened with."""

    def __init__(self, kind: str, site: str) -> None:
        self.kind, self.site, self.model = kind, site, build()
        self.made = One() if kind == "edit" else Several()
        self.given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        self.at, self.target, self.source, self.record = AT, self.made.target, None, True
        self.change: Callable[[Any, dict[str, Tensor]], Any] = again
        self.function, self.edit = function, self.made.edit

    def opened(self) -> Any:
        if self.kind == "function":
            # Another function each time, as in a loop.
            added = self.function
            item = Intervention(self.site, self.at, lambda x, context: added(x, context))
            return intervene(self.model, item)
        options: dict[str, Any] = {"positions": self.at, "record": self.record}
        options |= {"target": self.target, "source": self.source}
        return self.edit.at(self.model, self.site, **options)

    def once(self) -> tuple[bool, list[Any]]:
        """Whether a context began with what the last one knew; and all that came of it."""
        resumed, each = False, list[Any]()
        try:
            with self.opened() as run:
                resumed = bool(lrqp.stream.watch.opened()[-1].watch.resumed)
                each.append(self.change(self.model, self.given))
        except LRQPError as error:
            said = re.sub(r"Thread-\d+", "Thread", str(error))
            return resumed, [*each, said]
        if self.kind != "function" and self.record:
            steps = [torch.as_tensor(v) for step in run.steps for v in vars(step).values()]
            each += [torch.nan_to_num(step.double()) for step in steps]
        return resumed, each


def other_targets(here: Contexts) -> None:
    flipped = torch.tensor([0, 1, 1, 0])
    here.target = flipped if here.kind == "edit" else {"a": flipped}


def one_target(here: Contexts) -> None:
    here.target = 1 if here.kind == "edit" else {"b": 1, "a": 0}


def sources(here: Contexts) -> None:
    classes = torch.tensor([0, 0, 1, 1])
    here.source = classes if here.kind == "edit" else {"a": classes}


def other_positions(here: Contexts) -> None:
    here.at = AT.flip(0)


def several_positions(here: Contexts) -> None:
    here.at = torch.stack([AT, (AT + 1) % 6], 1)
    here.target = 1 if here.kind == "edit" else {"a": 1}


def every_position(here: Contexts) -> None:
    here.at = torch.ones_like(IDS).bool()
    here.target = 1 if here.kind == "edit" else {"a": 1}


def a_scope(here: Contexts) -> None:
    here.at = "all"
    here.target = 1 if here.kind == "edit" else {"a": 1}


def other_texts(here: Contexts) -> None:
    here.given = {"input_ids": IDS.flip(1), "attention_mask": torch.ones_like(IDS)}


def padded(here: Contexts) -> None:
    here.given = {**here.given, "attention_mask": (torch.arange(6) <= AT[:, None]).long()}


def without_mask(here: Contexts) -> None:
    here.given = {"input_ids": IDS}


def longer_texts(here: Contexts) -> None:
    here.given = {"input_ids": torch.cat([IDS, IDS], 1)}


def fewer_texts(here: Contexts) -> None:
    here.given, here.at = {"input_ids": IDS[:2]}, AT[:2]
    here.target = 1 if here.kind == "edit" else {"a": 1}


def another_edit(here: Contexts) -> None:
    here.made = Several() if here.kind == "joint" else One()
    here.edit, here.function = here.made.edit, lambda x, context: 2 * x
    here.made.written.log_odds.fill_(3.0)


def another_weight(here: Contexts) -> None:
    here.made.written.probe.weight.data.mul_(1.5)


def another_metric(here: Contexts) -> None:
    here.made.written.metric.covariance.mul_(1.5)


def another_rule(here: Contexts) -> None:
    here.made.written.rule = "fixed"


def learned(here: Contexts) -> None:
    here.made.written.probe.weight.requires_grad_()
    here.change = gradient


def without_record(here: Contexts) -> None:
    here.record = not here.record


def double(here: Contexts) -> None:
    here.model.double()


def other_blocks(here: Contexts) -> None:
    blocks = here.model.transformer.h
    blocks[0], blocks[1] = blocks[1], blocks[0]


def another_block(here: Contexts) -> None:
    blocks = here.model.transformer.h
    blocks[1] = copy.deepcopy(blocks[2])
    blocks[1].attn.layer_idx = 1


def a_hook(here: Contexts) -> None:
    for block in here.model.transformer.h:
        block.register_forward_hook(lambda module, given, output: 1.5 * output, prepend=True)
        block.register_forward_pre_hook(lambda module, given: (given[0] + 0.25, *given[1:]))


def other_tables(here: Contexts) -> None:
    for module in here.model.modules():
        module._forward_hooks = OrderedDict()
        module._forward_pre_hooks = OrderedDict()


def other_attributes(here: Contexts) -> None:
    for module in here.model.modules():
        module.__dict__ = dict(vars(module))
    here.model.transformer.h[1] = copy.deepcopy(here.model.transformer.h[1])
    here.model.transformer.h[1].mlp.c_fc.weight.data.mul_(2)


def another_class(here: Contexts) -> None:
    mlp = here.model.transformer.h[1].mlp

    class Half(type(mlp)):  # type: ignore[misc]
        def forward(self, *given: Any) -> Any:
            return super().forward(*given) / 2

    mlp.__class__ = Half


def wrapped_hooks(here: Contexts) -> None:
    """Somebody puts something around our hooks, for one context."""
    calls = list[int]()

    def around(hook: Any, *given: Any) -> Any:
        calls.append(1)
        assert len(calls) < 8
        return hook(*given)

    def change(model: Any, given: dict[str, Tensor]) -> Any:
        for module in model.modules():
            for table in (module._forward_pre_hooks, module._forward_hooks):
                table.update({key: partial(around, hook) for key, hook in table.items()})
        here.change = again
        return again(model, given)

    here.change = change


def a_later_hook(here: Contexts) -> None:
    """One that is set while a context is open, and changes what the edit has put in place."""

    def change(model: Any, given: dict[str, Tensor]) -> Any:
        here.change = again
        block = model.transformer.h[1]
        handles = [block.attn.register_forward_hook(lambda m, i, o: (o[0] * 2, *o[1:]))]
        handles += [block.register_forward_pre_hook(lambda m, i: (i[0] * 2, *i[1:]))]
        try:
            return again(model, given)
        finally:
            for handle in handles:
                handle.remove()

    here.change = change


def another_copy(here: Contexts) -> None:
    here.model = copy.deepcopy(here.model)
    here.model.transformer.wpe.weight.data.mul_(2)


def moved(here: Contexts) -> None:
    """As by a move to another device and back: all parameters are other tensors."""
    for own in here.model.parameters():
        own.data = own.data.clone() * 1.25


def own_forward(here: Contexts) -> None:
    block = here.model.transformer.h[1]
    plain = type(block).forward
    block.forward = lambda *given, **named: 0.5 * plain(block, *given, **named)


def another_trunk(here: Contexts) -> None:
    trunk = here.model.transformer
    plain = type(trunk).forward
    here.model.transformer.forward = lambda *given, **named: plain(trunk, *given, **named)


def training(here: Contexts) -> None:
    here.model.transformer.h[2].train()
    for part in here.model.transformer.h[2].modules():
        part.p = 0.0  # type: ignore[assignment]


def checkpointed(here: Contexts) -> None:
    here.model.gradient_checkpointing_enable({"use_reentrant": False})
    training(here)
    here.given["use_cache"] = False  # type: ignore[assignment]
    here.change = gradient


def compiled_parts(here: Contexts) -> None:
    here.model.transformer.h[2].mlp.compile(backend="eager")


def within_another(here: Contexts) -> None:
    outer = here.opened()

    def change(model: Any, given: dict[str, Tensor]) -> Any:
        here.change = again
        with outer:
            return again(model, given)

    here.change = change


def twice(here: Contexts) -> None:
    here.change = lambda model, given: torch.stack([again(model, given) for _ in range(4)])


def between(change: Callable[[Any, dict[str, Tensor]], Any]) -> Callable[[Contexts], None]:
    def put(here: Contexts) -> None:
        here.change = change

    put.__name__ = getattr(change, "__name__", "pass")
    return put


def in_another_thread(here: Contexts) -> None:
    plain = here.once

    def once() -> Any:
        found: list[Any] = []

        def work() -> None:
            with torch.no_grad():
                found.append(plain())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found[0]

    here.once = once  # type: ignore[method-assign]


BETWEEN: list[Callable[[Contexts], None]] = [
    *(other_targets, one_target, sources, other_positions, several_positions, every_position),
    *(a_scope, other_texts, padded, without_mask, longer_texts, fewer_texts, another_edit),
    *(another_weight, another_metric, another_rule, learned, without_record, double),
    *(other_blocks, another_block, a_hook, other_tables, other_attributes, another_class),
    *(wrapped_hooks, a_later_hook, another_copy, moved, own_forward, another_trunk),
    *(training, checkpointed, compiled_parts, within_another, twice, in_another_thread),
    *map(between, CHANGES),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("function", change) for change in BETWEEN),
        *(("edit", change) for change in BETWEEN),
        *(("joint", change) for change in BETWEEN[:19]),
    ],
    ids=lambda change: getattr(change, "__name__", change),
)
@torch.no_grad()
def test_what_changes_between_contexts_is_seen(
    kind: str, change: Callable[[Contexts], None]
) -> None:
    """Each context equals one that nothing is kept for, and in which Python does all."""
    site = "L1.pre" if kind == "function" else "L1.mid"
    found = []
    for kept in (True, False):
        here = Contexts(kind, site)
        with nullcontext() if kept else by_python():
            opened = [here.once() for _ in range(3)]
            assert opened[-1][0] is kept
            change(here)
            opened += [here.once() for _ in range(3)]
        each = [part for _, parts in opened for part in parts]
        found.append(each)
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert one == other if isinstance(one, str) else torch.equal(one, other)


@pytest.mark.parametrize(
    "at", [AT, AT.tolist(), AT[:, None], torch.nn.functional.one_hot(AT, 6).bool()]
)
@torch.no_grad()
def test_positions_are_those_with_which_a_context_opened(at: Any) -> None:
    """Also where its first pass is unlike those before, and the caller has written to them."""
    model, given = build(), copy.deepcopy(at)
    for number in range(4):
        with intervene(model, Intervention("L1.pre", given, function)):
            if number == 3:
                assert lrqp.stream.watch.opened()[-1].watch.resumed
                given[:] = [[0]] * 4 if isinstance(given, list) else given.flip(0)
                found = model(torch.cat([IDS, IDS], 1)).logits
            else:
                model(IDS)
    if isinstance(at, Tensor) and at.dtype == torch.bool:
        at = AT
    with by_python(), intervene(model, Intervention("L1.pre", at, function)):
        expected = model(torch.cat([IDS, IDS], 1)).logits
    assert torch.equal(found, expected)
    wrong: Any = ["L1.pre"]
    with pytest.raises(SiteError), intervene(model, Intervention(wrong, at, function)):
        pass


@torch.no_grad()
def test_an_edit_is_freed_at_once_whatever_contexts_leave() -> None:
    model, made = build(), One()
    collected = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for passes in (1, 1, 1, 3):
            with made.edit.at(model, "L1.mid", positions=AT, target=made.target) as run:
                for _ in range(passes):
                    model(IDS)
        alive, edit = weakref.ref(run), weakref.ref(made.edit)
        del run, made
        assert (alive(), edit()) == (None, None)
    finally:
        gc.enable() if collected else None
