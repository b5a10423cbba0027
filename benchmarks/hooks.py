"""The forward pass of a model with one edit in it, against the bare forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.measure import medians, parse_arguments, report
from lrqp_torch import LRQP, Intervention, capture, intervene

SITE = "L6.mid"
LENGTH = 64


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    device = arguments.device
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=5000)).eval().to(device)
    rows = []
    for batch in (16,) if arguments.small else (1, 16, 64):
        rows += measure(model, batch, arguments.repeats, device)
    report(f"GPT-2 small shape, {LENGTH} tokens, one edit a prompt at {SITE}", rows, arguments)


@torch.no_grad()
def measure(model: GPT2LMHeadModel, batch: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Time the bare forward, one with an addition, one with LRQP, and the LRQP solve alone."""
    inputs = {"input_ids": torch.randint(5000, (batch, LENGTH), device=device)}
    positions = torch.randint(LENGTH, (batch,), device=device)
    train = {"input_ids": torch.randint(5000, (256, 16), device=device)}
    activations = capture(model, train, [SITE], torch.full((256,), 15, device=device))[SITE]
    edit = LRQP.fit(activations, torch.arange(256, device=device) % 2)
    target = torch.arange(batch, device=device) % 2
    direction = torch.randn(activations.shape[1], device=device)
    sample = activations[:batch] if batch <= len(activations) else activations

    def bare() -> None:
        model(**inputs)

    def addition() -> None:
        with intervene(model, [Intervention(SITE, positions, lambda x, context: x + direction)]):
            model(**inputs)

    def lrqp() -> None:
        with edit.at(model, SITE, positions=positions, target=target):
            model(**inputs)

    def solve() -> None:
        edit.solve(sample, target[: len(sample)])

    runs: dict[str, Callable[[], None]] = {
        "bare forward pass": bare,
        "with an addition": addition,
        "with LRQP": lrqp,
        "the LRQP solve alone": solve,
    }
    seconds = medians(runs, repeats, device)
    return [
        {
            "what": name,
            "B": batch,
            "milliseconds": value * 1e3,
            "share of bare": value / seconds["bare forward pass"],
        }
        for name, value in seconds.items()
    ]


if __name__ == "__main__":
    main()
