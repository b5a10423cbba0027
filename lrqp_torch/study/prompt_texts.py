"""The held-out prompts as the report shows them: text, answers, and where their tokens stand."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lrqp_torch.errors import OutputError
from lrqp_torch.files import read_json, write_json
from lrqp_torch.plot.chart import strong
from lrqp_torch.study.prompts import PromptSet
from lrqp_torch.study.records import from_json, to_json

TEXTS_FILE = "prompts.json"
LINE_WIDTH = 46


@dataclass(frozen=True)
class PromptTexts:
    """The held-out prompts in the order of ``prompts.safetensors``."""

    prompts: list[str]  # the texts, prefix included, without marks
    # What the answer in the sense of the class that holds is called: a name (IO), a class.
    held: list[str]
    other: list[str]  # the same of the counterfactual class
    # What each token that is shown is called to its number in each prompt, from 1.
    positions: dict[str, list[int]]

    @classmethod
    def of(cls, data: PromptSet) -> Self:
        """Texts and positions of prompts, padding on the left not counted."""
        padding = (data.inputs["attention_mask"].cumsum(1) == 0).sum(1)
        columns = data.pointed_out.items()
        return cls(
            prompts=list(data.prompts),
            held=[own for own, _ in data.called],
            other=[other for _, other in data.called],
            positions={name: (column - padding + 1).tolist() for name, column in columns},
        )

    def save(self, folder: Path) -> None:
        """Write ``prompts.json`` into a folder. Raises OutputError: the file cannot be written."""
        write_json(folder / TEXTS_FILE, to_json(self))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read back what :meth:`save` wrote.

        Raises:
            OutputError: the file is missing, unreadable or of another form.
        """
        path = folder / TEXTS_FILE
        try:
            texts = from_json(cls, read_json(path, OutputError))
            lengths = {len(column) for column in texts.positions.values()}
            if lengths | {len(texts.held), len(texts.other)} != {len(texts.prompts)}:
                raise ValueError("its lists are of unequal length")
        except (OutputError, ValueError) as error:
            raise OutputError(
                f"cannot read the prompts in {str(path)!r}: {error}. "
                "Run the study with --out set to this folder to write them anew."
            ) from error
        return texts

    def shown(self, row: int, held: str, other: str) -> str:
        """One prompt for a reader who points at it: in short lines, its answers standing out.

        ``held`` and ``other`` are what answers in the sense of both classes are called.
        """
        own, rival = self.held[row], self.other[row]
        names = re.compile(rf"\b({re.escape(own)}|{re.escape(rival)})\b")
        lines = [
            names.sub(lambda match: strong(match[1]), line)
            for line in textwrap.wrap(self.prompts[row], LINE_WIDTH)
        ]
        tokens = ", ".join(f"{name} {column[row]}" for name, column in self.positions.items())
        return "\n".join([*lines, f"{held}: {own}", f"{other}: {rival}", f"tokens: {tokens}"])
