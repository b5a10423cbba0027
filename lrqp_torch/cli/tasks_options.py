"""Options that the commands for prompts of your own share, and how they read them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from lrqp_torch.study.prompts import Prompt

PANEL = "Edits of your own"

Data = Annotated[
    Path,
    typer.Option(
        help="Prompts: a .csv or .jsonl file, or a data set of the Hub as NAME or NAME:SPLIT. "
        "Columns: text, with the words to edit marked as in 'The [[keys]] to the cabinet'; label; "
        "and, if there are any, answers for each class."
    ),
]
Model = Annotated[str, typer.Option(help="organism, smollm2, gpt2, or a folder or Hub name.")]
Label = Annotated[str, typer.Option(help="Column of the class.")]
Position = Annotated[
    str,
    typer.Option(
        help="Where to read and edit: mark (the last token of the marked words), last (the last "
        "token of the prompt), or a column that holds words of the prompt."
    ),
]
TrainShare = Annotated[
    float, typer.Option(help="Share of each class to fit on; the others are held out.")
]
LogOdds = Annotated[float, typer.Option(help="Least log odds that an edit asks of the probe.")]
L2 = Annotated[
    float | None, typer.Option(help="Penalty of the probe.", show_default="the probe's own")
]
ShrinkageOf = Annotated[
    str, typer.Option(help="Of the covariance: ledoit_wolf, oas, or a number from 0 to 1.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


def read_halves(
    data: Path, label: str, position: str, train_share: float, seed: int
) -> "tuple[list[Prompt], list[Prompt]]":
    """The prompts of a file to fit on, and those held out."""
    from lrqp_torch.tasks.reading import read_prompts
    from lrqp_torch.tasks.splitting import split

    prompts = read_prompts(data, label=label, position=position)
    return split(prompts, train_share, seed)


def encode_halves(tokenizer: Any, halves: "tuple[list[Prompt], list[Prompt]]") -> Any:
    """Both halves as tokens, with the classes of both."""
    from lrqp_torch.study.prompts import PromptSet

    classes = sorted({prompt.label for half in halves for prompt in half})
    return tuple(PromptSet.encode(tokenizer, half, classes) for half in halves)


def load_model(model: str, device: str) -> Any:
    """A model and its tokenizer."""
    from transformers.utils.logging import disable_progress_bar

    from lrqp_torch.models import load
    from lrqp_torch.study.preparing import choose_device

    disable_progress_bar()  # it would run through ours
    return load(model, device=choose_device(device))


def split_names(text: str) -> list[str]:
    """Names separated by commas."""
    from lrqp_torch.errors import PromptError

    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise PromptError("no label given; name the column of the class")
    return names


def console() -> Console:
    """Where the commands print."""
    return Console(highlight=False, soft_wrap=True)
