"""Rerunning only what an edit can change, against full forward passes, and against the floor.

The floor of a sweep over sites is what the counts give: one clean pass, and for each site and
condition only the tokens from the first edited one on, through the blocks from the edited one on.
The sweep may fall below it, because it runs both conditions of a site side by side in one batch.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from benchmarks.floor import BarePasses
from benchmarks.measure import Row, medians, parse_arguments, report
from lrqp_torch import LRQP, all_sites, capture, position_ids
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.stream.replay import Replay
from lrqp_torch.stream.sites import Site, blocks_of
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.sweep import CONDITIONS, sweep

TRAIN = 128


def gpt2_small() -> PreTrainedModel:
    """GPT-2 small's shape."""
    return GPT2LMHeadModel(GPT2Config())  # type: ignore[no-any-return]


def smollm2() -> PreTrainedModel:
    """SmolLM2-135M's shape, in the Llama family."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)  # type: ignore[no-any-return]


def tiny() -> PreTrainedModel:
    """A model for trying this script out."""
    return GPT2LMHeadModel(  # type: ignore[no-any-return]
        GPT2Config(vocab_size=99, n_layer=4, n_embd=32, n_head=2, bos_token_id=0, eos_token_id=0)
    )


SHAPES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2-small": gpt2_small,
    "smollm2": smollm2,
    "tiny": tiny,
}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__ or "", argv, _options)
    arguments.models = arguments.models or (
        "gpt2-small" if arguments.small else "gpt2-small,smollm2"
    )
    arguments.batch = arguments.batch or (8 if arguments.small else 32)
    replays, sweeps = [], []
    for name in arguments.models.split(","):
        torch.manual_seed(0)
        model = SHAPES[name]().eval().to(arguments.device)
        data = prompts(model, arguments)
        edits = fit_edits(model, data)
        replays += measure_replay(name, model, data, edits, arguments)
        sweeps.append(measure_sweep(name, model, data, edits, arguments))
    what = f"{arguments.batch} left-padded prompts of up to {arguments.length} tokens"
    report(
        f"An edit in the middle, {arguments.suffix} tokens rerun, {what}",
        replays,
        arguments,
        sweeps=sweeps,
    )
    arguments.json = None
    report(f"A sweep over every site, {' and '.join(CONDITIONS)}, {what}", sweeps, arguments)


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--models", help=f"of {', '.join(SHAPES)}; default the first two")
    parser.add_argument("--batch", type=int, help="prompts; default 32, 8 with --small")
    parser.add_argument("--length", type=int, default=60, help="tokens of the longest prompt")
    parser.add_argument("--suffix", type=int, default=8, help="tokens from the first edit on")


def prompts(model: PreTrainedModel, arguments: Namespace) -> IOIDataset:
    """Random tokens in the shape of the task: padding on the left, an own S2 for each prompt."""
    generator = torch.Generator().manual_seed(0)
    batch, length, suffix = arguments.batch, arguments.length, arguments.suffix

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    padding = draw(0, max(1, length - suffix - 8), batch)
    padding[0] = 0
    mask = (torch.arange(length) >= padding.unsqueeze(-1)).long()
    edited = draw(length - suffix, length - suffix // 2, batch)
    edited[0] = length - suffix
    vocabulary = model.config.vocab_size
    names = tuple("" for _ in range(batch))
    data = IOIDataset(
        inputs={
            "input_ids": draw(0, vocabulary, batch, length),
            "attention_mask": mask,
            "position_ids": position_ids(mask),
        },
        positions={"S2": edited, "END": torch.full((batch,), length - 1)},
        labels={"abb": torch.arange(batch) % 2},
        io_tokens=draw(0, vocabulary, batch),
        s_tokens=draw(0, vocabulary, batch),
        templates=torch.zeros(batch, dtype=torch.long),
        prompts=names,
        prefixes=names,
        io_names=names,
        s_names=names,
    )
    return data.to(arguments.device)


def fit_edits(model: PreTrainedModel, data: IOIDataset) -> dict[str, LRQP]:
    """An edit for every site, fitted to the activations of random tokens."""
    device = data.io_tokens.device
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (TRAIN, 8), generator=generator).to(device)
    last = torch.full((TRAIN,), 7, device=device)
    activations = capture(model, {"input_ids": tokens}, all_sites(model), last)
    labels = torch.arange(TRAIN, device=device) % 2
    return {
        site: LRQP.fit(x, labels, on_infeasible="skip", log_odds=5.0)
        for site, x in activations.items()
    }


@torch.no_grad()
def measure_replay(
    name: str,
    model: PreTrainedModel,
    data: IOIDataset,
    edits: dict[str, LRQP],
    arguments: Namespace,
) -> list[Row]:
    """One edit in the middle of the network: replayed, and in a full forward pass."""
    layer = len(blocks_of(model)) // 2
    site = f"L{layer}.mid"
    positions, labels = data.positions["S2"], data.labels["abb"]
    replay = Replay(model, data.inputs, int(positions.min()))
    bare = BarePasses(model, data.inputs, int(positions.min()))

    def edited(run: Callable[[], Tensor]) -> Tensor:
        with edits[site].at(model, site, positions=positions, target=1 - labels, source=labels):
            return run()

    def full() -> Tensor:
        logits: Tensor = model(**data.inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits

    whole, replayed = edited(full), edited(partial(replay.run, layer))
    if torch.equal(whole, replay.clean_logits):
        raise AssertionError(f"the edit at {site} changed no logit")
    difference = float((replayed - whole).abs().max() / whole.abs().max())
    seconds = medians(
        {
            "full forward pass, edited": lambda: edited(full),
            "replayed, edited": lambda: edited(partial(replay.run, layer)),
            "suffix and layers above, bare (the floor)": lambda: bare.suffix(layer),
        },
        arguments.repeats,
        arguments.device,
        seconds=5.0 if arguments.small else 20.0,
    )
    reference = seconds["full forward pass, edited"]
    return [
        {
            "run": what,
            "model": name,
            "site": site,
            "milliseconds": value * 1e3,
            "times faster than full": reference / value,
            "largest relative logit difference": difference if "replayed" in what else None,
        }
        for what, value in seconds.items()
    ]


def measure_sweep(
    name: str,
    model: PreTrainedModel,
    data: IOIDataset,
    edits: dict[str, LRQP],
    arguments: Namespace,
) -> Row:
    """The study's whole sweep of one batch, the floor, and two full passes for each site."""
    bare = BarePasses(model, data.inputs, int(data.positions["S2"].min()))

    def floor() -> None:
        bare.clean()
        for site in edits:
            for _ in CONDITIONS:
                bare.suffix(Site.parse(site).layer)

    seconds = medians(
        {
            "sweep": lambda: sweep(model, IOIPrompts.of(data), edits, batch_size=len(data)),
            "floor": floor,
            "full": bare.clean,
        },
        arguments.repeats,
        arguments.device,
        seconds=2.0 if arguments.small else 30.0,
    )
    full = seconds["full"] * len(CONDITIONS) * len(edits)
    return {
        "model": name,
        "sites": len(edits),
        "sweep, seconds": seconds["sweep"],
        "floor, seconds": seconds["floor"],
        "two full passes a site, seconds": full,
        "sweep over floor": seconds["sweep"] / seconds["floor"],
        "full over sweep": full / seconds["sweep"],
    }


if __name__ == "__main__":
    main()
