"""The options that several commands have, described once, and how they are read."""

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrqp_torch.cli.app import Voice

if TYPE_CHECKING:
    from lrqp_torch.probes.covariance import Shrinkage

OWN = "Edits of your own"
"""Heading of the commands for prompts of one's own."""

MARKED = "'The [[keys]] to the cabinet'"

Out = Annotated[Path, typer.Option(help="Folder for results and figures; made if needed.")]
Model = Annotated[
    str,
    typer.Option(
        help="organism, organism-present, -absent, -dormant, -graded or -spread (bundled, ready in "
        "seconds), smollm2, gpt2, or a folder or Hub name."
    ),
]
_DATA = (
    "Prompts of your own: a .csv, .tsv, .jsonl or .parquet file, or a data set of the Hub as "
    "NAME or NAME:SPLIT. "
    f"Columns: text, with the words to edit marked as in {MARKED}; label; and, if there are any, "
    "answers for each class."
)
Data = Annotated[str | None, typer.Option(help=_DATA, show_default="prompts about two names")]
RequiredData = Annotated[str, typer.Option(help=_DATA)]
Label = Annotated[
    str,
    typer.Option(
        help="Column of the class, with --data; or several with commas, the class first: each is "
        "edited alone, with the others kept, and all together."
    ),
]
Text = Annotated[str, typer.Option(help="Column of the prompt, with --data.")]
Position = Annotated[
    str,
    typer.Option(
        help="Where to read and edit, with --data: mark (the last token of the marked words, of "
        "each where there are several), span (all of their tokens), last (the last token of the "
        "prompt), a column that holds words of the prompt, or auto (mark where there are marks, "
        "else last)."
    ),
]
Group = Annotated[
    str | None,
    typer.Option(
        help="Column of what prompts have in common, such as an entity or a template: those of a "
        "group are fitted on together or held out together.",
        show_default="none",
    ),
]
Pair = Annotated[
    str,
    typer.Option(
        help="Column of pairs, if there is one: prompts of a pair are the same but for the class."
    ),
]
Bos = Annotated[
    str,
    typer.Option(
        help="Whether the token that begins a text stands in front of each prompt, with --data: "
        "always, never, or auto (where prompts are edited at their first token, at which models "
        "keep an attention sink)."
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Stop at the first row of --data that cannot be used, and take answers as they stand; "
        "else such rows are left out and counted, and answers get the space that a word needs.",
    ),
]
N = Annotated[int, typer.Option("--n", min=4, help="Prompts about two names, fitted and held out.")]
Prefixes = Annotated[
    str,
    typer.Option(
        help="Sentence before each prompt about two names: none, bundled, openwebtext, or a text "
        "file with a sentence per line."
    ),
]
Variables = Annotated[
    str,
    typer.Option(
        help="What is edited in prompts about two names: order; or order,identity (which name it "
        "is), each alone, with the other kept, and both together."
    ),
]
Names = Annotated[
    int | None,
    typer.Option(
        min=2, help="How many different names these prompts have.", show_default="all that fit"
    ),
]
Sites = Annotated[
    str,
    typer.Option(
        help="all (the stream before and within every block), or names such as L6.mid,L7.pre."
    ),
]
CompareTask = Annotated[
    bool | None,
    typer.Option(
        "--compare-task/--no-compare-task",
        help="Run the prompts about two names with and without prefixes, side by side.",
        show_default="where there are prefixes",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with what a stopped run left in the folder.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
TrainShare = Annotated[
    float, typer.Option(help="Share of the prompts to fit on; the others are held out.")
]
LogOdds = Annotated[float, typer.Option(help="Least log odds that an edit asks of the probe.")]
Dose = Annotated[
    str,
    typer.Option(
        help="How much belief an edit asks for: nats (--log-odds, or as certain as before); twin "
        "(what the probe reads of the prompt's twin); class (what it reads of the median prompt "
        "of the class written)."
    ),
]
L2 = Annotated[
    float | None, typer.Option(help="Penalty of the probe.", show_default="the probe's own")
]
ShrinkageOf = Annotated[
    str, typer.Option(help="Of the covariance: ledoit_wolf, oas, or a number from 0 to 1.")
]
Refits = Annotated[
    int,
    typer.Option(
        help="Fit the edits of the sweep so many times anew, to training prompts drawn with "
        "replacement, for the spread over fits."
    ),
]
Methods = Annotated[
    str,
    typer.Option(
        help="Edits that compare puts beside LRQP and no edit, with commas, such as "
        "mean_difference,leace,full_patch; all trains some of them."
    ),
]
Figures = Annotated[
    bool | None,
    typer.Option(
        "--figures/--no-figures",
        help="Draw PNG and SVG figures.",
        show_default="where matplotlib is installed",
    ),
]
Report = Annotated[
    bool | None,
    typer.Option(
        "--report/--no-report",
        help="Write the interactive report.html.",
        show_default="where plotly is installed",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print what would run, and about how long it would take; write nothing."
    ),
]


def parse_shrinkage(text: str) -> "Shrinkage":
    """The shrinkage that an option names."""
    from lrqp_torch.errors import SettingError

    named: dict[str, Shrinkage] = {"ledoit_wolf": "ledoit_wolf", "oas": "oas"}
    if text in named:
        return named[text]
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise SettingError(
            f"shrinkage is {text!r}: it must be ledoit_wolf, oas, or a number from 0 to 1."
        )
    return share


def load_model(model: str, device: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    from lrqp_torch.models import load
    from lrqp_torch.study.preparing import choose_device

    return load(model, device=choose_device(device))


def able(wanted: bool | None, what: str, package: str, extra: str, voice: Voice) -> bool:
    """Whether to make figures or report; where their library is missing, says how to get it.

    Args:
        wanted: what the user asked for; None for nothing, which is wherever it is possible.
        what: is left out, in words.
        package: that makes it.
        extra: of this package, which brings it.
        voice: says so.
    """
    if wanted is not None or find_spec(package) is not None:
        return wanted is not False
    if os.environ.get("RANK", "0") == "0":
        voice.say(
            f"{what} left out: {package} is not installed. Get it with pip install "
            f"'lrqp_torch[{extra}]', then run the same command with --resume.",
            aside=True,
        )
    return False


def split_names(text: str, what: str) -> Sequence[str]:
    """Names separated by commas.

    Raises:
        PromptError: there is none.
    """
    from lrqp_torch.errors import PromptError

    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise PromptError(f"no {what} given; name the column of the class")
    return names
