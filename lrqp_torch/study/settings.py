"""What a study is asked to do."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lrqp_torch.errors import SettingError
from lrqp_torch.probes.covariance import Shrinkage
from lrqp_torch.study.doses import check_dose
from lrqp_torch.study.indirect_objects import IDENTITY, ORDER
from lrqp_torch.study.reading import FRONTS, Columns, label_columns

OWN = ("data", "label", "position", "text", "group", "pair", "bos", "strict")
"""The settings that say which prompts of one's own are studied."""


@dataclass(frozen=True)
class Settings:
    """What a study is asked to do.

    Attributes:
        model: ``organism``, ``smollm2``, ``gpt2``, or a folder or Hub name.
        out: folder for the results; created if needed.
        data: a file or data set of prompts of one's own, as :func:`~.reading.read_prompts` takes
            it, in place of prompts about two names.
        label: its column of the class; or several columns with commas, the class first, whose
            variables are edited one by one and all together.
        position: where its prompts are read and edited; see there.
        text: its column of the prompt.
        group: its column of what prompts have in common, such as an entity or a template; those of
            a group are fitted on together or held out together. None for none.
        pair: its column of pairs, whose prompts are each other's twins.
        bos: whether the token that begins a text stands in front of each of its prompts: ``auto``
            puts it there where prompts are edited at their first token, which is where models keep
            an attention sink; ``always``, ``never``.
        strict: whether a row of it that cannot be used is an error, and not left out and counted.
        n: number of prompts about two names, to fit on and held out together.
        prefixes: a sentence before each of these: ``none``, ``bundled``, ``openwebtext``, or a text
            file with a sentence per line.
        variables: which variables of these are edited, one by one and all together: ``order``, or
            ``order,identity``.
        names: how many different names they have; ``None`` for all.
        sites: ``all`` (every pre and mid), or site names separated by commas.
        seed: of everything random: the prompts, and the resampling behind intervals.
        batch_size: prompts per forward pass.
        device: ``auto``, or a torch device.
        train_share: share of the prompts to fit on; the others are held out.
        log_odds: least log odds that an edit asks of the probe, where it is dosed by nats.
        dose: how much belief an edit asks for, see :mod:`.doses`: ``nats``, ``twin`` or ``class``.
        l2: penalty of the probe; ``None`` for its own default.
        shrinkage: of the covariance: ``ledoit_wolf``, ``oas``, or a number from 0 to 1.
        refits: how many times the edits of the sweep are fitted anew, to training prompts drawn
            with replacement, for the spread over fits.
        figures: whether to draw figures.
        report: whether to write the interactive report.
        parts: ``all``, or parts of the study separated by commas.
        compare_task: whether to run prompts about two names both without a prefix and with a
            bundled one; ``None`` does so where this study has prefixes.
        resume: whether to go on with what an earlier run left in ``out``.
    """

    model: str
    out: Path
    data: str | None = None
    label: str = "label"
    position: str = "auto"
    text: str = "text"
    group: str | None = None
    pair: str = "pair"
    bos: str = "auto"
    strict: bool = False
    n: int = 1000
    prefixes: str = "none"
    variables: str = ORDER
    names: int | None = None
    sites: str = "all"
    seed: int = 0
    batch_size: int = 64
    device: str = "auto"
    train_share: float = 0.5
    log_odds: float = 10.0
    dose: str = "nats"
    l2: float | None = None
    shrinkage: Shrinkage = "ledoit_wolf"
    refits: int = 0
    figures: bool = True
    report: bool = True
    parts: str = "all"
    compare_task: bool | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            SettingError: a number out of its range.
        """
        if not 0 < self.train_share < 1:
            raise SettingError(f"train_share must lie between 0 and 1, not {self.train_share}.")
        if self.data is None and min(self.train_size, self.n - self.train_size) < 2:
            raise SettingError(
                f"n = {self.n} with train_share = {self.train_share} leaves fewer than two prompts "
                "to fit on or to hold out; raise n."
            )
        check_dose(self.dose)
        if self.bos not in FRONTS:
            raise SettingError(f"bos must be one of {', '.join(FRONTS)}, not {self.bos!r}.")
        if self.refits < 0:
            raise SettingError(f"refits must be 0 or more, not {self.refits}.")
        if self.batch_size < 1:
            raise SettingError(f"batch_size must be at least 1, not {self.batch_size}.")
        if self.data is None and not (
            self.variable_names[0] == ORDER and {*self.variable_names} <= {ORDER, IDENTITY}
        ):
            raise SettingError(
                f"variables is {self.variables!r}: of prompts about two names they are {ORDER}, or "
                f"{ORDER},{IDENTITY}."
            )
        if self.l2 is not None and not 0 < self.l2 < math.inf:
            raise SettingError(
                f"l2 must be above 0 and finite, not {self.l2}; leave it out for the default."
            )

    @property
    def columns(self) -> Columns:
        """Which columns of one's own prompts say what."""
        label, *further = self.variable_names
        return Columns(
            label, self.text, self.position, self.group, self.pair, further=tuple(further)
        )

    @property
    def variable_names(self) -> tuple[str, ...]:
        """The variables that are edited, the class first."""
        return tuple(label_columns(self.label if self.data is not None else self.variables))

    @property
    def train_size(self) -> int:
        """Number of prompts about two names to fit on."""
        return round(self.n * self.train_share)

    @property
    def compares(self) -> bool:
        """Whether both tasks run."""
        if self.data is not None:
            return False
        return self.prefixes != "none" if self.compare_task is None else self.compare_task

    def other(self) -> "Settings":
        """The same settings for the other task."""
        return replace(self, prefixes="bundled" if self.prefixes == "none" else "none")

    def record(self) -> dict[str, Any]:
        """The settings as ``results.json`` keeps them: all that decides what it holds."""
        names, own = {"n", "prefixes", "variables", "names", "compare_task"}, set(OWN)
        left_out = {"out", "resume"} | (own if self.data is None else names)
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the numbers of every part."""
        left_out = ("figures", "report", "parts", "compare_task")
        kept = {name: value for name, value in self.record().items() if name not in left_out}
        return kept | ({"compare_task": self.compares} if self.data is None else {})
