"""Reruns above a site: the same logits and gradients as the full forward pass, and less work."""

import pytest
import torch
from models_for_tests import ALL_MODELS, POST_MODELS, Prompts, build, hook_count
from torch import Tensor, nn

import lrqp_torch as lrqp
from lrqp_torch.errors import NonFiniteError, PositionError, SiteError
from lrqp_torch.stream.replay import Tail, frozen

PROMPTS = Prompts.random([9, 7, 8, 9, 6])
EDITED = torch.tensor([4, 3, 5, 6, 3])


def push(site: str, positions: Tensor, direction: Tensor) -> lrqp.Intervention:
    return lrqp.Intervention(site, positions, lambda x, context: x + direction[context.example])


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("part", ["pre", "mid", "post"])
def test_logits_and_gradients_are_those_of_the_full_pass(name: str, side: str, part: str) -> None:
    if name == "gpt_neox_parallel" and part == "mid":
        pytest.skip("no such site")
    model, inputs = build(name).requires_grad_(False), PROMPTS.padded(side)
    positions, site = PROMPTS.columns(EDITED, side), f"L1.{part}"
    first = int(positions.min())
    tail = Tail(model, inputs, 1, first, batch_size=2)
    rows, columns = torch.tensor([3, 0, 4]), torch.tensor([first, first + 2, 8])
    directions = torch.randn(3, model.config.hidden_size).requires_grad_(True)
    reading = torch.randn(3, 3, model.config.vocab_size)
    # A padded token's own logits mean nothing, on either route.
    reading = reading * inputs["attention_mask"][rows][:, columns, None]

    def run(full: bool) -> tuple[Tensor, Tensor]:
        with lrqp.intervene(model, push(site, positions[rows], directions)):
            if full:
                logits = model(**{k: v[rows] for k, v in inputs.items()}).logits[:, columns]
            else:
                logits = tail.run(rows, columns)
        loss = (logits * reading).sum()
        return loss.detach(), torch.autograd.grad(loss, directions)[0]

    for found, expected in zip(run(full=False), run(full=True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float(run(full=True)[1].abs().sum(-1).min()) > 1e-3


def test_sliding_windows_run_in_full() -> None:
    model = build("mistral", sliding_window=4).requires_grad_(False)
    inputs, positions = PROMPTS.padded("left"), PROMPTS.columns(EDITED, "left")
    tail = Tail(model, inputs, 1, int(positions.min()))
    assert tail.first_position == 0
    direction = torch.randn(5, model.config.hidden_size)
    with lrqp.intervene(model, push("L1.mid", positions, direction)):
        expected = model(**inputs).logits[:, 6:]
        found = tail.run(torch.arange(5), torch.arange(6, 9))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", POST_MODELS)
def test_blocks_below_and_tokens_before_do_not_run_again(name: str) -> None:
    model = build(name)
    blocks = model.base_model.h if name == "gpt2" else model.base_model.layers
    lengths: list[tuple[int, int]] = []
    for number, block in enumerate(blocks):
        block.register_forward_hook(
            lambda module, args, output, number=number: lengths.append((number, args[0].shape[1]))
        )
    tail = Tail(model, PROMPTS.padded("left"), 1, 5)
    lengths.clear()
    tail.run(torch.arange(5), torch.tensor([8]))
    assert lengths == [(1, 4), (2, 4)]


def test_frozen_restores_each_flag_also_after_an_error() -> None:
    model = build("gpt2")
    first = next(model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise ZeroDivisionError
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not first.requires_grad


def test_bad_input_is_named() -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("right")
    with pytest.raises(PositionError, match="input_ids"):
        Tail(model, {}, 1, 0)
    with pytest.raises(PositionError, match="outside the 9 tokens"):
        Tail(model, inputs, 1, 9)
    with pytest.raises(SiteError, match="3 blocks"):
        Tail(model, inputs, 3, 2)
    tail = Tail(model, inputs, 1, 4)
    with pytest.raises(PositionError, match="4 or more"):
        tail.run(torch.arange(2), torch.tensor([3]))
    assert hook_count(model) == 0
    nn.init.constant_(model.transformer.wte.weight, float("nan"))
    with pytest.raises(NonFiniteError, match="clean stream"):
        Tail(model, inputs, 1, 4)
