"""The held-out prompts as the report shows them: text, names, and where their tokens stand."""

import json
import re
import textwrap
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Self

from lrqp_torch.errors import OutputError
from lrqp_torch.files import written_whole
from lrqp_torch.study.indirect_objects import IOIPrompts

TEXTS_FILE = "prompts.json"
SHOWN_POSITIONS = ("IO", "S1", "S2", "END")
LINE_WIDTH = 46


@dataclass(frozen=True)
class PromptTexts:
    """The held-out prompts in the order of ``prompts.safetensors``.

    Attributes:
        prompts: the texts, prefix included.
        io_names: the answers, without the space.
        s_names: the subjects, without the space.
        positions: IO, S1, S2 and END, each the number of a token of the prompt, from 1.
    """

    prompts: list[str]
    io_names: list[str]
    s_names: list[str]
    positions: dict[str, list[int]]

    @classmethod
    def of(cls, data: IOIPrompts) -> Self:
        """Texts and positions of a data set, padding not counted."""
        padding = (data.inputs["attention_mask"] == 0).sum(1)
        if not bool((data.inputs["attention_mask"][:, -1] == 1).all()):
            padding = padding * 0  # padded on the right: columns count from the first token already
        return cls(
            prompts=list(data.prompts),
            io_names=list(data.data.io_names),
            s_names=list(data.data.s_names),
            positions={
                name: (data.positions[name] - padding + 1).tolist() for name in SHOWN_POSITIONS
            },
        )

    def save(self, folder: Path) -> None:
        """Write ``prompts.json`` into a folder.

        Raises:
            OutputError: the file cannot be written.
        """
        with written_whole(folder / TEXTS_FILE) as path:
            path.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read back what :meth:`save` wrote.

        Raises:
            OutputError: the file is missing, unreadable or of another form.
        """
        path = folder / TEXTS_FILE
        try:
            texts = cls(**json.loads(path.read_text(encoding="utf-8")))
            lengths = {len(column) for column in texts.positions.values()}
            if lengths | {len(texts.io_names), len(texts.s_names)} != {len(texts.prompts)}:
                raise ValueError("its lists are of unequal length")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise OutputError(
                f"cannot read the prompts in {str(path)!r}: {error}. "
                "Run `lrqp reproduce` with --out set to this folder to write them anew."
            ) from error
        return texts

    def hover(self, row: int) -> str:
        """One prompt for a plotly hover label: in short lines, its names bold, its positions."""
        at = {name: column[row] for name, column in self.positions.items()}
        io, s = self.io_names[row], self.s_names[row]
        names = re.compile(rf"\b({re.escape(escape(io))}|{re.escape(escape(s))})\b")
        lines = [
            # plotly reads tags such as <b>, and decodes no named quotes.
            names.sub(r"<b>\1</b>", escape(line, quote=False))
            for line in textwrap.wrap(self.prompts[row], LINE_WIDTH)
        ]
        return "<br>".join(
            [
                *lines,
                f"IO {escape(io, quote=False)}: token {at['IO']}",
                f"S {escape(s, quote=False)}: tokens {at['S1']} (S1) and {at['S2']} (S2)",
                f"END: token {at['END']}",
            ]
        )
