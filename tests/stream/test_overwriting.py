"""What an edit has promised is what the model holds, or it is said that something changes it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from models_for_tests import WIDTH, Prompts, build, hook_count, random_edit
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from zoo_for_tests import WIDTH as ZOO_WIDTH
from zoo_for_tests import build_tiny

import lrqp_torch as lrqp
from lrqp_torch import Intervention, intervene
from lrqp_torch.errors import EditOverwrittenError, EditOverwrittenWarning, PositionError

PROMPTS = Prompts.random([6, 4, 5])
INPUTS = PROMPTS.padded("left")
AT = torch.tensor([5, 5, 5])


def edit_at(model: Any, site: str, inputs: Any = INPUTS) -> lrqp.LRQP:
    x = lrqp.capture(model, inputs, site)[site].flatten(0, 1)
    return random_edit(x, 3, log_odds=20.0)


@contextmanager
def read_by(reader: Any) -> Iterator[list[Tensor]]:
    """What a module's own forward is given, behind all hooks there are."""
    seen = list[Tensor]()

    def forward(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return type(reader).forward(reader, x)  # type: ignore[no-any-return]

    reader.forward = forward
    yield seen
    del reader.forward


def check_record(edit: lrqp.LRQP, held: Tensor, run: Any, at: Tensor = AT) -> None:
    logits = edit.probe(held[torch.arange(len(at)), at].double())
    margins = (logits[:, [1]] - logits[:, [0, 2]]).amin(1)
    torch.testing.assert_close(margins, run.log_odds_after[-len(at) :], rtol=1e-4, atol=1e-4)


def adds(module: Any, args: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) else output
    first = first + torch.linspace(-1, 1, first.shape[-1])
    return (first, *output[1:]) if isinstance(output, tuple) else first


def adds_elsewhere(module: Any, args: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) else output
    first = torch.cat([first[:, :1] + 1, first[:, 1:]], 1)
    return (first, *output[1:]) if isinstance(output, tuple) else first


def adds_before(module: Any, args: Any) -> Any:
    return args[0] + torch.linspace(-1, 1, WIDTH), *args[1:]


@pytest.mark.parametrize("passes", [0, 4])
@pytest.mark.parametrize(
    ("site", "where", "register", "hook"),
    [
        ("L1.pre", "h.1", nn.Module.register_forward_pre_hook, adds_before),
        ("L1.mid", "h.1.attn", nn.Module.register_forward_hook, adds),
        ("L1.post", "h.1", nn.Module.register_forward_hook, adds),
    ],
)
@torch.no_grad()
def test_a_late_hook_that_torchs_class_sets_is_seen(
    site: str, where: str, register: Callable[..., Any], hook: Any, passes: int
) -> None:
    model: Any = build("gpt2")
    edit, module = edit_at(model, site), model.transformer.get_submodule(where)
    with edit.at(model, site, positions=AT, target=1):
        for _ in range(passes):
            model(**INPUTS)
        reads = register(module, lambda *given: None)
        model(**INPUTS)
        handle = register(module, hook)
        with pytest.raises(EditOverwrittenError, match="was set on"):
            model(**INPUTS)
        handle.remove()
        model(**INPUTS)
    reads.remove()
    assert hook_count(model) == 0


@pytest.mark.parametrize("passes", [0, 4])
@pytest.mark.parametrize("early", [False, True])
@torch.no_grad()
def test_mid_is_beside_what_the_skip_path_holds_whatever_hooks_of_all_modules_do(
    early: bool, passes: int
) -> None:
    model: Any = build("gpt2")
    edit, block = edit_at(model, "L1.mid"), model.transformer.h[1]

    def everywhere(module: Any, args: Any) -> Any:
        return adds_before(module, args) if module is block.ln_1 else None

    register = torch_modules.register_module_forward_pre_hook
    handle = register(everywhere) if early else None
    try:
        with (
            read_by(block.ln_2) as seen,
            edit.at(model, "L1.mid", positions=AT, target=1) as run,
        ):
            for _ in range(passes):
                model(**INPUTS)
            handle = handle or register(everywhere)
            for _ in range(3):
                model(**INPUTS)
                check_record(edit, seen[-1], run)
            assert torch.equal(lrqp.capture(model, INPUTS, "L1.mid")["L1.mid"], seen[-1])
    finally:
        handle.remove()
    assert not torch_modules._global_forward_pre_hooks and hook_count(model) == 0
    assert not block.ln_1._forward_pre_hooks_with_kwargs


IDS = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(0))
TWO = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "decoder_input_ids": IDS[:, :4]}
TWO_AT = torch.tensor([3, 2])


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("hook", [adds, adds_elsewhere])
@pytest.mark.parametrize("path", ["layer.{}", "layer.{}.dropout"])
@pytest.mark.parametrize(("stack", "layer"), [("encoder", 0), ("decoder", 1)])
@torch.no_grad()
def test_hooks_where_a_tensor_is_passed_on_or_added_are_seen(
    stack: str, layer: int, path: str, hook: Any, early: bool
) -> None:
    """T5 adds its attention to the stream two modules further out, behind dropout."""
    model: Any = build_tiny("T5ForConditionalGeneration")
    site, block = f"{stack}.L1.mid", getattr(model, stack).block[1]
    edit, module = edit_at(model, site, TWO), block.get_submodule(path.format(layer))
    handle = module.register_forward_hook(hook) if early else None
    wrong = pytest.raises(EditOverwrittenError, match=r"a hook on (Dropout|T5Layer.*) changes what")
    with (
        read_by(block.layer[layer + 1].layer_norm) as seen,
        wrong if hook is adds else nullcontext(),
        edit.at(model, site, positions=TWO_AT, target=1) as run,
    ):
        for _ in range(3):
            model(**TWO)
        handle = handle or module.register_forward_hook(hook)
        model(**TWO)
    if hook is not adds:
        check_record(edit, seen[-1], run, TWO_AT)
    handle.remove()
    assert hook_count(model) == 0


ONE_NAME_EACH = [
    ("L1.mid", "L1.mid"),
    ("L1.mid", "L1.attn_out"),
    ("L1.mid", "transformer.h.1.attn:output"),
    ("L1.post", "L2.pre"),
    ("L1.post", "transformer.h.1:output"),
]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", ["edit", "function", "scope"])
@pytest.mark.parametrize(("first", "second"), ONE_NAME_EACH)
@torch.no_grad()
def test_an_edit_that_another_one_changes_is_warned_of_whatever_both_are_called(
    first: str, second: str, kind: str, together: bool
) -> None:
    """In one context or one within another; also where tokens are known only as they come."""
    model: Any = build("gpt2")
    edit, at = edit_at(model, first), "all" if kind == "scope" else AT
    one = edit.on(first, positions=at, target=1)
    two = Intervention(second, AT, lambda x, context: x + 1)
    if kind != "function":
        two = edit.on(second, positions=AT[:, None], target=2)
    if together and "attn_out" in second:  # which runs before
        one, two = edit.on(second, positions=at, target=1), two.__class__(first, AT, two.edit)
    pattern = r"(at .* changes tokens of which that at .* has promised|0 and 1 write the same) "
    with pytest.warns(EditOverwrittenWarning, match=pattern) as said:
        if together:
            with intervene(model, [one, two]):
                model(**INPUTS)
                model(**INPUTS)
        else:
            with intervene(model, one), intervene(model, two):
                model(**INPUTS)
                model(**INPUTS)
    assert len(said) == 1


@torch.no_grad()
def test_edits_that_leave_each_other_alone_are_not_warned_of() -> None:
    model: Any = build("gpt2")
    mid, head = edit_at(model, "L1.mid"), random_edit(torch.randn(40, WIDTH // 4), 2)
    same = Intervention("L1.mid", AT, lambda x, context: x)
    on_mid = partial(mid.on, "L1.mid", target=1)
    other = partial(mid.on, "L1.mid", target=2)
    pairs = [
        (on_mid(positions=AT), on_mid(positions=AT)),
        (on_mid(positions=AT), other(positions=AT - 1)),
        (on_mid(positions=AT), other(positions=slice(3, 5))),
        (on_mid(positions=AT), same),
        (on_mid(positions=AT), mid.on("L2.mid", positions=AT, target=2)),
        (mid.on("L1.pre", positions=AT, target=1), other(positions=AT)),
        (head.on("L1.H1.z", positions=AT, target=1), head.on("L1.H2.z", positions=AT, target=1)),
        (mid.on("L2.pre", positions=AT, target=1), other(positions=AT)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one, two in pairs:
            with intervene(model, one), intervene(model, two):
                model(**INPUTS)
        # The one around is behind the one within.
        with (
            read_by(model.transformer.h[2].ln_1) as seen,
            intervene(model, mid.on("L2.pre", positions=AT, target=1)) as runs,
            intervene(model, Intervention("L1.post", AT, lambda x, context: x + 1)),
        ):
            model(**INPUTS)
        check_record(mid, seen[-1], runs[0])
    # An edit within that has closed is told of no more; the one around holds again.
    with (
        read_by(model.transformer.h[1].ln_2) as seen,
        mid.at(model, "L1.mid", positions=AT, target=1) as run,
    ):
        for _ in range(3):
            with (
                pytest.warns(EditOverwrittenWarning),
                intervene(model, Intervention("L1.mid", AT, lambda x, context: x + 1)),
            ):
                model(**INPUTS)
        model(**INPUTS)
        check_record(mid, seen[-1], run)


@torch.no_grad()
def test_what_the_inner_edit_left_is_told_of_where_the_one_around_runs_behind_it() -> None:
    model: Any = build("gpt2")
    edit = edit_at(model, "L1.post")
    with (
        intervene(model, edit.on("L2.pre", positions=AT, target=2)),
        pytest.warns(EditOverwrittenWarning, match=r"at L2\.pre changes .* that at L1\.post"),
        edit.at(model, "L1.post", positions=AT, target=1),
    ):
        model(**INPUTS)


@torch.no_grad()
def test_a_layer_of_t5_is_the_stream_under_another_name() -> None:
    model: Any = build_tiny("T5ForConditionalGeneration")
    edit = edit_at(model, "encoder.L1.mid", TWO)
    for path in ("layer.0:output", "layer.0.dropout:output", "layer.1:input"):
        push = Intervention(f"encoder.block.1.{path}", TWO_AT, lambda x, context: x + 1)
        with (
            pytest.warns(EditOverwrittenWarning, match=r"of which that at encoder\.L1\.mid has"),
            edit.at(model, "encoder.L1.mid", positions=TWO_AT, target=1),
            intervene(model, push),
        ):
            model(**TWO)
    assert edit.probe.weight.shape[1] == ZOO_WIDTH and hook_count(model) == 0


@pytest.mark.parametrize("stopped", [0, 1, 3])
@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_a_stopped_pass_hides_no_run_by_a_hook(stopped: int, layer: int) -> None:
    """As of helpers that leave a forward pass early by an exception, before a site or behind it."""
    model: Any = build("gpt2")
    edit, mlp = edit_at(model, "L1.mlp_out"), model.transformer.h[1].mlp

    def stops(*given: Any) -> None:
        raise KeyboardInterrupt

    def runs(module: Any, args: Any, output: Any) -> None:
        mlp(2 * args[0])

    for hidden in (False, True):
        told = pytest.raises(PositionError, match="ran more often") if hidden else nullcontext()
        with told, edit.at(model, "L1.mlp_out", positions=AT, target=1) as run:
            handle = model.transformer.h[layer].register_forward_pre_hook(stops)
            for _ in range(stopped):
                with pytest.raises(KeyboardInterrupt):
                    model(**INPUTS)
            handle.remove()
            handle = model.transformer.h[0].register_forward_hook(runs) if hidden else None
            model(**INPUTS)
            if handle is not None:
                handle.remove()
        if not hidden:
            assert len(run.steps) == 1 + stopped * (layer == 2)


@pytest.mark.parametrize("passes", [0, 1, 4])
@torch.no_grad()
def test_a_module_that_a_hook_runs_by_itself_is_not_taken_for_the_models_own_run(
    passes: int,
) -> None:
    """Its input is not in the block, or it is run a second time."""
    model: Any = build("gpt2")
    edit, block = edit_at(model, "L1.mid"), model.transformer.h[1]

    def attends(module: Any, args: Any, output: Any) -> None:
        block.attn(args[0])

    def runs(module: Any, args: Any, output: Any) -> None:
        block(args[0])

    with (
        read_by(block.ln_2) as seen,
        edit.at(model, "L1.mid", positions=AT, target=1) as run,
    ):
        for _ in range(passes):
            model(**INPUTS)
        handle = model.transformer.h[0].register_forward_hook(attends)
        with pytest.raises(
            PositionError, match=r"L1\.mid: the GPT2Attention ran without the Layer"
        ):
            model(**INPUTS)
        handle.remove()
        model(**INPUTS)
        check_record(edit, seen[-1], run)
    for site in ("L1.mid", "L1.post"):
        with (
            pytest.raises(PositionError, match=rf"that {site} names ran more often than the model"),
            edit.at(model, site, positions=AT, target=1),
        ):
            for _ in range(passes):
                model(**INPUTS)
            handle = model.transformer.h[2].register_forward_hook(runs)
            model(**INPUTS)
            handle.remove()
