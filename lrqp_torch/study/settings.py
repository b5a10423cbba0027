"""What studies and verdicts are asked to do: settings, each of them an option of a command too.

The command reads its options from here, and its help is not to wait for torch: what is more than
the standard library is imported where it is used.
"""

import math
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrqp_torch.study.parts import PARTS

if TYPE_CHECKING:
    from lrqp_torch.probes.covariance import Shrinkage
    from lrqp_torch.study.reading import Columns

OWN = ("data", "label", "position", "text", "group", "pair", "bos", "strict")
"""The settings that say which prompts of one's own are studied."""
NAMES = ("n", "prefixes", "variables", "names", "compare_task")
"""Those of prompts about two names."""


def listed(names: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def option(default: Any, text: str, *flags: str, **looks: Any) -> Any:
    """A field of a dataclass that is an option of the command, with what it means.

    With the default MISSING it must be given. ``flags`` are what it is called, where that is not
    the field's name, and ``looks`` as typer takes them; ``kind`` is its type where that is another
    one than the field's, with None as its default.
    """
    return field(default=default, metadata={"help": text, "flags": flags, **looks})


@dataclass(frozen=True)
class Settings:
    """What a study is asked to do; see each field's help."""

    model: str = option(
        MISSING,
        "organism, organism-present, -absent, -dormant, -graded or -spread (bundled, ready in "
        "seconds), smollm2, gpt2, or a folder or Hub name.",
    )
    out: Path = option(  # noqa: RUF009 -- a field
        MISSING, "Folder for results and figures; made if needed."
    )
    data: str | None = option(
        None,
        "Prompts of your own: a .csv, .tsv, .jsonl or .parquet file, or a data set of the Hub as "
        "NAME or NAME:SPLIT. Columns: text, with the words to edit marked as in 'The [[keys]] to "
        "the cabinet'; label; and, if there are any, answers for each class.",
        show_default="prompts about two names",
    )
    label: str = option(
        "label",
        "Column of the class, with --data; or several with commas, the class first: each is "
        "edited alone, with the others kept, and all together.",
    )
    position: str = option(
        "auto",
        "Where to read and edit, with --data: mark (the last token of the marked words, of each "
        "where there are several), span (all of their tokens), last (the last token of the "
        "prompt), a column that holds words of the prompt, or auto (mark where there are marks, "
        "else last).",
    )
    text: str = option("text", "Column of the prompt, with --data.")
    group: str | None = option(
        None,
        "Column of what prompts have in common, such as an entity or a template: those of a group "
        "are fitted on together or held out together.",
        show_default="none",
    )
    pair: str = option(
        "pair",
        "Column of pairs, if there is one: prompts of a pair are the same but for the class.",
    )
    bos: str = option(
        "auto",
        "Whether the token that begins a text stands in front of each prompt, with --data: always, "
        "never, or auto (where prompts are edited at their first token, at which models keep an "
        "attention sink).",
    )
    strict: bool = option(
        False,
        "Stop at the first row of --data that cannot be used, and take answers as they stand; else "
        "such rows are left out and counted, and answers get the space that a word needs.",
        "--strict",
    )
    n: int = option(1000, "Prompts about two names, fitted and held out.", "--n", min=4)
    prefixes: str = option(
        "none",
        "Sentence before each prompt about two names: none, bundled, openwebtext, or a text file "
        "with a sentence per line.",
    )
    variables: str = option(
        "order",
        "What is edited in prompts about two names: order; or order,identity (which name it is), "
        "each alone, with the other kept, and both together.",
    )
    names: int | None = option(
        None, "How many different names these prompts have.", min=2, show_default="all that fit"
    )
    sites: str = option(
        "all", "all (the stream before and within every block), or names such as L6.mid,L7.pre."
    )
    parts: str = option(
        "all",
        f"all that the prompts allow (without compare), or some of {', '.join(PARTS)}, with "
        "commas; what they need runs too.",
    )
    compare_task: bool | None = option(
        None,
        "Run the prompts about two names with and without prefixes, side by side.",
        "--compare-task/--no-compare-task",
        show_default="where there are prefixes",
    )
    resume: bool = option(False, "Go on with what a stopped run left in the folder.", "--resume")
    seed: int = option(0, "Seed of everything random.")
    batch_size: int = option(64, "Prompts per forward pass.", min=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    train_share: float = option(0.5, "Share of the prompts to fit on; the others are held out.")
    log_odds: float = option(10.0, "Least log odds that an edit asks of the probe.")
    dose: str = option(
        "nats",
        "How much belief an edit asks for: nats (--log-odds, or as certain as before); twin (what "
        "the probe reads of the prompt's twin); class (what it reads of the median prompt of the "
        "class written).",
    )
    l2: float | None = option(None, "Penalty of the probe.", show_default="the probe's own")
    shrinkage: "Shrinkage" = option(  # noqa: RUF009 -- a field, which is made anew
        "ledoit_wolf", "Of the covariance: ledoit_wolf, oas, or a number from 0 to 1.", kind=str
    )
    refits: int = option(
        0,
        "Fit the edits of the sweep so many times anew, to training prompts drawn with "
        "replacement, for the spread over fits.",
    )
    methods: str = option(
        "all",
        "Edits that compare puts beside LRQP and no edit, with commas, such as "
        "mean_difference,leace,full_patch; all trains some of them.",
    )
    figures: bool = option(
        True,
        "Draw PNG and SVG figures.",
        "--figures/--no-figures",
        kind=bool | None,
        show_default="where matplotlib is installed",
    )
    report: bool = option(
        True,
        "Write the interactive report.html.",
        "--report/--no-report",
        kind=bool | None,
        show_default="where plotly is installed",
    )

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            SettingError: a number out of its range, or a method that does not exist.
            SiteError: a name that is no site's.
        """
        from lrqp_torch.errors import SettingError, quoted
        from lrqp_torch.study.doses import DOSES
        from lrqp_torch.study.indirect_objects import IDENTITY, ORDER
        from lrqp_torch.study.methods import check_names
        from lrqp_torch.study.reading import FRONTS

        if not 0 < self.train_share < 1:
            raise SettingError(f"train_share must lie between 0 and 1, not {self.train_share}.")
        if self.data is None and min(self.train_size, self.n - self.train_size) < 2:
            raise SettingError(
                f"n = {self.n} with train_share = {self.train_share} leaves fewer than two prompts "
                "to fit on or to hold out; raise n."
            )
        for name, known in (("dose", DOSES), ("bos", FRONTS)):
            if (own := getattr(self, name)) not in known:
                raise SettingError(f"{name} must be one of {', '.join(known)}, not {quoted(own)}.")
        check_names(self.compared)
        _check_sites(self.sites)
        _require_least(self, refits=0, batch_size=1)
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
    def fitting(self) -> dict[str, Any]:
        """How probes and edits are fitted, as :func:`~.sweep.fit_edits` takes it."""
        return {"l2": self.l2, "shrinkage": self.shrinkage, "log_odds": self.log_odds}

    @property
    def columns(self) -> "Columns":
        """Which columns of one's own prompts say what."""
        from lrqp_torch.study.reading import Columns

        label, *further = self.variable_names
        return Columns(
            label, self.text, self.position, self.group, self.pair, further=tuple(further)
        )

    @property
    def variable_names(self) -> tuple[str, ...]:
        """The variables that are edited, the class first."""
        from lrqp_torch.study.reading import label_columns

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
        left_out = {"out", "resume", *(OWN if self.data is None else NAMES)}
        left_out |= {"methods"} if self.compared is None else set()
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the numbers of every part."""
        left_out = ("figures", "report", "parts", "compare_task")
        kept = {name: value for name, value in self.record().items() if name not in left_out}
        return kept | ({"compare_task": self.compares} if self.data is None else {})


def _check_sites(names: str) -> None:
    """Raise SiteError where one is a site of no model, before any is loaded."""
    from lrqp_torch.stream.sites import Site

    for name in listed(names):
        if name != "all":
            Site.parse(name)


def _require_least(settings: Any, **least: int) -> None:
    """Raise :class:`SettingError` for a setting below what it must be at least."""
    from lrqp_torch.errors import SettingError

    for name, bound in least.items():
        if (own := getattr(settings, name)) < bound:
            raise SettingError(f"{name} must be at least {bound}, not {own}.")


def _same(name: str) -> Any:
    """The field of :class:`Settings` of that name."""
    known = next(each for each in fields(Settings) if each.name == name)
    return field(default=known.default, metadata=known.metadata)


@dataclass(frozen=True)
class VerdictSettings:
    """What ``lrqp verdicts`` is asked for; see each field's help."""

    out: Path = _same("out")  # noqa: RUF009 -- a field
    models: str = option(
        "all",
        "all that are bundled, or names or folders of models with a ground_truth.json, with "
        "commas.",
    )
    methods: str = option(
        "all", "all, or names of edits, with commas; all leaves out those trained on the answers."
    )
    das: bool = option(
        False,
        "If all edits run, those trained on the answers too: DAS, what it reads written by the "
        "least edit, and learned LRQP; takes minutes.",
        "--das",
    )
    n: int = option(200, "Prompts a draw; half are held out.", "--n", min=8)
    seeds: int = option(3, "Draws of prompts.", min=1)
    seed: int = option(0, "Seed of the first draw; the others follow.")
    prefixes: str = _same("prefixes")
    sites: str = option("all", "all, or names that every model has, such as L1.mid,L2.pre.")
    batch_size: int = _same("batch_size")
    device: str = _same("device")
    figures: bool = _same("figures")

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            SettingError: a number out of its range, a method that does not exist, or no model.
            SiteError: a name that is no site's.
        """
        from lrqp_torch.errors import SettingError
        from lrqp_torch.models.organisms import ORGANISMS, organisms_here
        from lrqp_torch.study.methods import METHODS

        if self.models == "all":
            object.__setattr__(self, "models", ",".join(organisms_here()))
        _require_least(self, seeds=1, batch_size=1, n=8)
        _check_sites(self.sites)
        if not self.model_names():
            raise SettingError(f"no model given; name some, such as {', '.join(ORGANISMS)}.")
        unknown = [name for name in listed(self.methods) if name not in {*METHODS, "all"}]
        if unknown or not self.method_names():
            found = f"unknown method {unknown[0]!r}" if unknown else "no method given"
            raise SettingError(f"{found}; choose from {', '.join(METHODS)}, or say all.")

    def model_names(self) -> list[str]:
        """The models asked for."""
        return listed(self.models)

    def method_names(self) -> list[str]:
        """The methods asked for, in the order of the table."""
        from lrqp_torch.study.methods import METHODS, TRAINED

        named = listed(self.methods)
        if "all" in named:
            return [name for name in METHODS if name not in TRAINED or self.das]
        return [name for name in METHODS if name in named]

    def command(self) -> str:
        """The command that gives these numbers, without the folder."""
        left_out = ("out", "das", "device", "figures")
        words = [
            f"--{name.replace('_', '-')} {value}"
            for name, value in asdict(self).items()
            if name not in left_out
        ]
        return f"lrqp verdicts {' '.join(words)}{' --das' if self.das else ''} --out DIR"
