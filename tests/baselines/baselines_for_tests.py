"""A tiny GPT-2 with activations, labels and pairs for every baseline."""

from dataclasses import dataclass

import torch
from models_for_tests import Prompts, build
from torch import Tensor
from transformers import PreTrainedModel

import lrqp_torch as lrqp
from lrqp_torch.baselines import BaselineData, Behaviour, answer_loss

SITE = "L1.mid"


@dataclass(frozen=True)
class Setting:
    """Prompts with two classes, their activations at a site, and what baselines are built from."""

    model: PreTrainedModel
    inputs: dict[str, Tensor]
    positions: Tensor
    labels: Tensor
    activations: Tensor
    data: BaselineData


def setting(dtype: torch.dtype = torch.float32, n: int = 60) -> Setting:
    model = build("gpt2", dtype=dtype)
    prompts = Prompts.random([5 + i % 4 for i in range(n)])
    inputs = prompts.padded("left")
    at = prompts.columns(torch.full((n,), 3), "left")
    x = lrqp.capture(model, inputs, [SITE], at)[SITE]
    # A class that is partly readable: the sign of a noisy projection.
    generator = torch.Generator().manual_seed(1)
    reading = (x.double() - x.double().mean(0)) @ torch.randn(
        x.shape[1], generator=generator, dtype=torch.float64
    )
    noise = 0.3 * reading.std() * torch.randn(n, generator=generator, dtype=torch.float64)
    y = (reading + noise > 0).long()
    reference = lrqp.LRQP.fit(x, y, log_odds=2.0)
    behaviour = Behaviour(
        model=model,
        inputs=inputs,
        site=SITE,
        positions=at,
        loss=answer_loss(torch.full((n,), inputs["input_ids"].shape[1] - 1), 1 - y),
    )
    data = BaselineData(x, y, reference, paired=x.roll(1, 0), behaviour=behaviour)
    return Setting(model, inputs, at, y, x, data)


def three_classes(n: int = 240, width: int = 10, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Activations of three classes, each with a covariance of its own; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    y = torch.arange(n) % 3
    shapes = normal(3, width, width) / width**0.5 + torch.eye(width)
    x = torch.einsum("nd,nde->ne", normal(n, width), shapes[y])
    return x + 1.2 * normal(3, width)[y] + 5, y
