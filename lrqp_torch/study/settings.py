"""What a study is asked to do."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lrqp_torch.errors import SettingError
from lrqp_torch.probes.covariance import Shrinkage
from lrqp_torch.study.doses import check_dose
from lrqp_torch.study.indirect_objects import IDENTITY, ORDER
from lrqp_torch.study.methods import check_names
from lrqp_torch.study.reading import FRONTS, Columns, label_columns, listed

OWN = ("data", "label", "position", "text", "group", "pair", "bos", "strict")
"""The settings that say which prompts of one's own are studied."""


@dataclass(frozen=True)
class Settings:
    """What a study is asked to do."""

    model: str  # `organism`, `smollm2`, `gpt2`, or a folder or Hub name
    out: Path  # folder for the results; created if needed
    # A file or data set of prompts of one's own, as `read_prompts` takes it, in place of prompts
    # about two names.
    data: str | None = None
    # Its column of the class; or several columns with commas, the class first, whose variables are
    # edited one by one and all together.
    label: str = "label"
    position: str = "auto"  # where its prompts are read and edited; see there
    text: str = "text"  # its column of the prompt
    # Its column of what prompts have in common, such as an entity or a template; those of a group
    # are fitted on together or held out together. None for none.
    group: str | None = None
    pair: str = "pair"  # its column of pairs, whose prompts are each other's twins
    # Whether the token that begins a text stands in front of each of its prompts: `auto` puts it
    # there where prompts are edited at their first token, which is where models keep an attention
    # sink; `always`, `never`.
    bos: str = "auto"
    # Whether a row of it that cannot be used is an error, and not left out and counted.
    strict: bool = False
    n: int = 1000  # number of prompts about two names, to fit on and held out together
    # A sentence before each of these: `none`, `bundled`, `openwebtext`, or a text file with a
    # sentence per line.
    prefixes: str = "none"
    # Which variables of these are edited, one by one and all together: `order`, or
    # `order,identity`.
    variables: str = ORDER
    names: int | None = None  # how many different names they have; `None` for all
    sites: str = "all"  # `all` (every pre and mid), or site names separated by commas
    seed: int = 0  # of everything random: the prompts, and the resampling behind intervals
    batch_size: int = 64  # prompts per forward pass
    device: str = "auto"  # `auto`, or a torch device
    train_share: float = 0.5  # share of the prompts to fit on; the others are held out
    # Least log odds that an edit asks of the probe, where it is dosed by nats.
    log_odds: float = 10.0
    dose: str = "nats"  # how much belief an edit asks for, see `doses`: `nats`, `twin` or `class`
    l2: float | None = None  # penalty of the probe; `None` for its own default
    # Of the covariance: `ledoit_wolf`, `oas`, or a number from 0 to 1.
    shrinkage: Shrinkage = "ledoit_wolf"
    # How many times the edits of the sweep are fitted anew, to training prompts drawn with
    # replacement, for the spread over fits.
    refits: int = 0
    methods: str = "all"  # of the part `compare`: `all`, or names separated by commas
    figures: bool = True  # whether to draw figures
    report: bool = True  # whether to write the interactive report
    parts: str = "all"  # `all`, or parts of the study separated by commas
    # Whether to run prompts about two names both without a prefix and with a bundled one; `None`
    # does so where this study has prefixes.
    compare_task: bool | None = None
    resume: bool = False  # whether to go on with what an earlier run left in `out`

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            SettingError: a number out of its range, or a method that does not exist.
        """
        if not 0 < self.train_share < 1:
            raise SettingError(f"train_share must lie between 0 and 1, not {self.train_share}.")
        if self.data is None and min(self.train_size, self.n - self.train_size) < 2:
            raise SettingError(
                f"n = {self.n} with train_share = {self.train_share} leaves fewer than two prompts "
                "to fit on or to hold out; raise n."
            )
        check_dose(self.dose)
        check_names(self.compared)
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
    def compared(self) -> tuple[str, ...] | None:
        """The methods of the league table; None for all."""
        return None if self.methods == "all" else tuple(listed(self.methods))

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
        left_out |= {"methods"} if self.compared is None else set()
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the numbers of every part."""
        left_out = ("figures", "report", "parts", "compare_task")
        kept = {name: value for name, value in self.record().items() if name not in left_out}
        return kept | ({"compare_task": self.compares} if self.data is None else {})
