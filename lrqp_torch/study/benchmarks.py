"""Other people's benchmarks of interventions, by their own measures: CausalGym, RAVEL, MIB.

Each is a list of tasks: prompts to fit on and prompts held out, as any prompts of one's own. At
each site that is asked for, the same methods are fitted to the former and edit the latter:

    LRQP                the study's edit
    JointLRQP           the same with every other attribute kept, where the task has others
    class means         x + μ_t − μ_v
    DAS                 rank 1, trained through the model
    full patch          the activation of a prompt of the class to write

**CausalGym** (Arora, Jurafsky and Potts 2024, arXiv 2402.12560): the log odds-ratio

    log p(y_b | b) / p(y_s | b)  +  log p*(y_s | b) / p*(y_b | b)

of base b with answer y_b, source answer y_s, and p* the edited model; its selectivity, that less
the log odds-ratio of a control task in which the classes go with " dog" and " give"; and the share
of prompts at which p*(y_s) > p*(y_b).

**RAVEL** (Huang et al. 2024, arXiv 2402.17700): of the prompts that the model completes rightly,
*cause*, the share that an edit of the attribute asked for turns to the value that was written, and
*isolate*, the share of those that ask for another attribute of the entity which stay as they were,
mean over the other attributes; *disentangle* is the mean of both.

**MIB** (Mueller et al. 2025, arXiv 2504.13151): interchange intervention accuracy, the share of
prompts, of those that the model answers rightly, which it answers as their counterfactual. Of its
RAVEL, where the counterfactual is another entity in a prompt that may ask for another attribute, or
for none, an attribute is edited to the value of that entity: prompts that ask for it are to say
that value (*cause*), those that ask for another attribute are to stay as they are (*isolate*).

A model says an answer if it would write it greedily, token by token.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrqp_torch.baselines import Baseline
from lrqp_torch.edits.joint import JointLRQP
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import HubError, LRQPError, PromptError, RowError, SettingError, quoted
from lrqp_torch.files import prepare_folder, write_json
from lrqp_torch.plot.chart import Table
from lrqp_torch.stream.capture import capture
from lrqp_torch.stream.intervene import EditContext
from lrqp_torch.stream.progress import Clock, Start, no_stages
from lrqp_torch.study.context import StudyContext, Task
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.methods import (
    Candidate,
    LearnedLRQP,
    Training,
    build_candidates,
    counterparts,
    drawn,
)
from lrqp_torch.study.preparing import choose_sites, describe_model, find_sink
from lrqp_torch.study.prompts import Prompt, PromptSet, split
from lrqp_torch.study.published import (
    CAUSALGYM,
    RAVEL_FILES,
    Ravel,
    agree,
    asked_attributes,
    city_prompt,
    mib_rows,
    read_ravel,
    spoken,
)
from lrqp_torch.study.reading import (
    LEAST_OF_CLASS,
    LINES,
    TABLES,
    Columns,
    RowLog,
    answering,
    encodable,
    front,
    prompts_of,
    rows_of,
    screen,
)
from lrqp_torch.study.records import to_json
from lrqp_torch.study.running import Trial, Trials
from lrqp_torch.study.sweep import fit_edits

FITTING, HOLDING = ("train", "dev", "val", "validation"), ("test",)
"""Words in the names of files whose rows are fitted on, and held out."""

HELD_OUT = ("val", "validation", "test")
"""Splits of RAVEL that are not fitted on."""

CONTROL = (" dog", " give")
"""The answers of CausalGym's control task, which no class has to do with."""

KINDS = (*TABLES, *LINES, ".parquet")
"""How the names of files of rows end."""

MOST_LOOKED_AT = 4
"""Rows of an attribute that are looked at for each that a task may have."""

HUB = {
    "causalgym": "aryaman/causalgym",
    "ravel": "hij/ravel",
    "mib": "mib-bench/copycolors_mcqa/4_answer_choices",
}
"""Data sets of the Hub, from which the files are fetched where it is reachable."""

CLOSED = ("lrqp", "mean_difference", "full_patch")
"""Methods that are not trained through the model."""

METHODS = ("lrqp", "joint", "mean_difference", "das", "full_patch")
"""All methods, in the order of tables."""


class KeptLRQP(LearnedLRQP):
    """LRQP of one variable that keeps the readings of all others: C δ = 0 for their probes.

    ``joint`` has the variable, ``name_of``, and the others, each kept unless it is told to change.
    """

    name: ClassVar[str] = "joint"
    title: ClassVar[str] = "JointLRQP, others kept"

    def __init__(self, reference: LRQP, joint: JointLRQP, name_of: str) -> None:
        super().__init__(reference, reference)
        self.joint, self.name_of = joint, name_of

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        wanted = {name: self.joint.KEEP for name in self.joint.names} | {self.name_of: target}
        here: dict[str, Any] = {"realise": context.realise, "examples": context.example}
        return self.joint.solve(x, wanted, {self.name_of: source}, **here).x_new


@dataclass(frozen=True)
class Beside:
    """Prompts that ask for another attribute, and what an edit writes into them."""

    prompts: PromptSet  # held out, with the answers of the attribute that they ask for
    source: Tensor  # the class that holds of the attribute that is edited, (n,)
    target: Tensor  # the one to write, (n,)
    # Prompts whose activations the full patch writes into them; None for some of the target's.
    patches: PromptSet | None = None


@dataclass(frozen=True)
class BenchTask:
    """One task of a benchmark."""

    name: str  # of the task
    train: PromptSet  # prompts to fit on
    test: PromptSet  # prompts held out
    log: RowLog  # what became of the rows
    # Answers of CausalGym's control task, a token each; None where the tokenizer has none.
    control: tuple[int, int] | None = None
    # Prompts to which probes and means are fitted, those of `train` and others that ask for other
    # attributes; `train` where None.
    fitted: PromptSet | None = None
    # Class of each other attribute of the prompts that are fitted to, (n,) each.
    attributes: dict[str, Tensor] = field(default_factory=dict)
    # By the name of each other attribute, prompts that ask for it.
    others: dict[str, Beside] = field(default_factory=dict)
    # Prompts whose activations the full patch writes into those held out; None for their twins'.
    patches: PromptSet | None = None


@dataclass(frozen=True)
class MethodScore:
    """What one method scores."""

    name: str  # of the method in files
    title: str  # in tables
    measures: dict[str, Estimate]  # the benchmark's own, by name; empty where it could not be built
    settings: str = ""  # how it was trained
    problem: str = ""  # why it could not be built


@dataclass(frozen=True)
class TaskScore:
    """All methods on one task at one site."""

    task: str  # its name
    site: str  # where they edit
    train: int  # number of prompts to fit on
    test: int  # number of prompts held out
    classes: list[str]  # their names
    probe_accuracy: Estimate  # of LRQP's probe on the prompts held out
    # Prompts that the model answers rightly, by the answers it is asked to choose from.
    answered: Estimate
    methods: list[MethodScore]  # in order
    left_out: dict[str, int]  # rows that could not be used, by reason
    notes: list[str]  # what a reader should know


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark's scores."""

    benchmark: str  # its name
    settings: dict[str, Any]  # what was asked for
    model: dict[str, Any]  # what identifies the model
    tasks: list[TaskScore]  # by task, then site
    skipped: dict[str, str]  # tasks that could not run, with the reason
    seconds: float  # in all

    def save(self, folder: Path) -> Path:
        """Write ``benchmark.json`` into a folder. Raises OutputError: it cannot be written."""
        prepare_folder(folder)
        write_json(folder / "benchmark.json", to_json(self), indent=2)
        return folder / "benchmark.json"

    def tables(self) -> dict[str, Table]:
        """By task and site the measures of every method, with half of their intervals' widths."""
        found = {}
        for score in self.tasks:
            measures = list(dict.fromkeys(name for row in score.methods for name in row.measures))
            rows = [
                [row.title, *(_short(row.measures.get(name)) for name in measures)]
                for row in score.methods
            ]
            found[f"{score.task}, {score.site}, n = {score.test}"] = Table(
                ["method", *measures], rows
            )
        return found

    def says(self) -> list[str]:
        """What a reader should know of the tasks, a sentence each."""
        notes = [f"{score.task}: {note}" for score in self.tasks for note in score.notes]
        problems = [
            f"{score.task}, {score.site}: {row.title} could not be built: {row.problem}"
            for score in self.tasks for row in score.methods if row.problem
        ]  # fmt: skip
        skipped = [f"{name} was left out: {reason}" for name, reason in self.skipped.items()]
        return list(dict.fromkeys([*notes, *problems, *skipped]))


def _short(estimate: Estimate | None) -> str:
    if estimate is None or estimate.value is None:
        return "–"
    if estimate.interval is None:
        return f"{estimate.value:.2f}"
    low, high = estimate.interval
    return f"{estimate.value:.2f} ± {(high - low) / 2:.2f}"


def run_benchmark(
    name: str,
    data: str | None,
    model: Any,
    tokenizer: Any,
    sites: str,
    *,
    n: int = 400,
    tasks: Sequence[str] = (),
    position: str = "auto",
    bos: str = "auto",
    batch_size: int = 64,
    seed: int = 0,
    training: Training | None = None,
    start: Start = no_stages,
) -> BenchmarkResult:
    """Score all methods on the published files of ``"causalgym"``, ``"ravel"`` or ``"mib"``.

    Args:
        data: folder or file with the published files, or a data set of the Hub; None for the
            benchmark's own. For CausalGym also files of prompts in this project's form, each of
            which is a task.
        sites: names separated by commas.
        n: prompts of a task at most, half of them held out.
        tasks: names of tasks, attributes or counterfactuals; all if empty.
        position: where prompts are edited; see :class:`~.reading.Columns`.
        bos: see :func:`~.reading.front`.
        training: of DAS.

    Raises:
        SettingError: no such benchmark.
        PromptError: files that are not there or of another form; the message says what was looked
            for. No task that can run.
        HubError: neither a file nor to be had from the Hub.
        SiteError, UnknownFamilyError: no such site in this model.
    """
    readers: dict[str, Callable[[Path, _How], Iterator[Named]]] = {
        "causalgym": _causalgym, "ravel": _ravel, "mib": _mib,
    }  # fmt: skip
    if name not in readers:
        raise SettingError(f"no benchmark {quoted(name)}; there are {', '.join(readers)}")
    if n < 8:
        raise SettingError(f"n = {n} is too few prompts of a task; give 8 or more")
    clock, training = Clock(), training or Training()
    chosen, folder = choose_sites(model, sites), _fetched(data or HUB[name])
    how = _How(tokenizer, n, tuple(tasks), position, bos, seed)
    found: list[TaskScore] = []
    skipped: dict[str, str] = {}
    for called, task in readers[name](folder, how):
        if isinstance(task, PromptError):
            skipped[called] = str(task)
            continue
        advance = start(f"{name}: {task.name}", len(chosen))
        device = next(model.parameters()).device
        own = Task(task.name, task.train, task.test)
        context = StudyContext(model, own, None, chosen, batch_size, seed, device)
        sink = find_sink(context)
        notes = task.log.says() + ([] if sink is None else [sink])
        for site in chosen:
            try:
                found.append(_Scoring(context, task, site, training).scored(name, notes))
            except LRQPError as error:  # such as a site at which all activations are the same
                skipped[f"{task.name} at {site}"] = str(error)
            advance(1)
    if not found:
        reasons = "".join(f"; {task}: {reason}" for task, reason in skipped.items())
        raise PromptError(f"no task of {name} can run on {quoted(str(data))}{reasons}")
    settings = {"data": str(data or HUB[name]), "sites": ",".join(chosen), "n": n, "seed": seed,
                "tasks": list(tasks), "position": position, "bos": bos}  # fmt: skip
    about = describe_model(model, str(getattr(model.config, "_name_or_path", "model")))
    return BenchmarkResult(name, settings, about, found, skipped, clock.seconds()["total"])


# ---- reading -------------------------------------------------------------------------------------

Named = tuple[str, BenchTask | PromptError]
"""The name of a task, and the task, or why it cannot be made."""


@dataclass(frozen=True)
class _Divided:
    """Prompts that ask for one thing, at most n in all."""

    train: list[Prompt]  # to fit on
    test: list[Prompt]  # held out
    classes: list[str]
    bos: bool | None  # what encoding them is told of it
    log: RowLog  # what became of the rows


@dataclass(frozen=True)
class _How:
    """How tasks are made of files; see :func:`run_benchmark`."""

    tokenizer: Any
    n: int
    tasks: tuple[str, ...]
    position: str
    bos: str
    seed: int

    def wants(self, *names: str) -> bool:
        """Whether a task is asked for, by any of its names."""
        return not self.tasks or any(name in self.tasks for name in names)

    def divided(self, train: Sequence[Prompt], test: Sequence[Prompt], log: RowLog) -> _Divided:
        """Prompts to fit on, and those held out or, where there are none, some of the former.

        Raises PromptError: too few that this tokenizer knows.
        """
        kept = screen(self.tokenizer, train, log)
        held = list(test)
        if not held:
            kept, held = split(kept, 0.5, self.seed)
        kept, held = (_limited(half, self.n // 2, self.seed) for half in (kept, held))
        counts = Counter(p.label for p in kept)
        names = sorted(name for name, count in counts.items() if count > 1)
        few = PromptError("fewer than two classes are both fitted on and held out")
        if len(names) < 2:
            raise few
        kept, held = (
            encodable(self.tokenizer, answering(own, names), names, log)
            for own in ([p for p in half if p.label in names] for half in (kept, held))
        )
        if len({p.label for p in held}) < 2:
            raise few
        return _Divided(kept, held, names, front(self.tokenizer, kept, self.bos, log), log)

    def encode(self, prompts: list[Prompt], names: list[str], bos: bool | None) -> PromptSet:
        """Prompts as tokens. Raises PromptError: there are none."""
        return PromptSet.encode(self.tokenizer, prompts, names, bos=bos)

    def task(self, name: str, train: list[Any], test: list[Any]) -> Named:
        """A task of rows; those held out are divided where there are none to fit on."""
        log, columns = RowLog(), Columns(position=self.position)
        halves = (train, test) if train else (test, [])
        try:
            given = [prompts_of(own, columns, log, name) if own else [] for own in halves]
            own = self.divided(given[0], given[1], log)
            train_set, test_set = (
                self.encode(half, own.classes, own.bos) for half in (own.train, own.test)
            )
        except PromptError as error:
            return name, error
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in CONTROL]
        known = all(len(own) == 1 and own[0] != self.tokenizer.unk_token_id for own in ids)
        control = (ids[0][0], ids[1][0]) if known else None
        return name, BenchTask(name, train_set, test_set, log, control)


def _limited(prompts: Sequence[Prompt], most: int, seed: int) -> list[Prompt]:
    """At most so many prompts, drawn with their pairs whole, in random order."""
    pairs: dict[Any, list[Prompt]] = {}
    for row, prompt in enumerate(prompts):
        pairs.setdefault(row if prompt.pair is None else prompt.pair, []).append(prompt)
    kept: list[Prompt] = []
    for key in random.Random(seed).sample(list(pairs), len(pairs)):
        if len(kept) + len(pairs[key]) <= most:
            kept += pairs[key]
    return kept


def _fetched(data: str) -> Path:
    """A folder or file as it is, or the folder of a data set of the Hub, or one within it."""
    path = Path(data)
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download

        *named, within = [*data.split("/", 2), ""] if data.count("/") < 2 else data.split("/", 2)
        wanted = [f"{within}*{kind}" for kind in KINDS]
        found = snapshot_download("/".join(named), repo_type="dataset", allow_patterns=wanted)
        return Path(found) / within
    except Exception as error:
        # Of many libraries, for a name or a network that is not.
        raise HubError(
            f"{quoted(data)} is neither a file or folder nor a data set that the Hub can be asked "
            f"for: {error}"
        ) from error


def _files(folder: Path) -> list[Path]:
    """The files of rows in a folder, in order. Raises PromptError: there are none."""
    found = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    found = [path for path in found if path.suffix in KINDS]
    if not found:
        raise PromptError(f"{str(folder)!r} holds no files ending in {', '.join(KINDS)}")
    return found


def _words(path: Path) -> list[str]:
    """The words of a file's name."""
    return path.stem.lower().replace("-", "_").replace(".", "_").split("_")


def _side(path: Path) -> str:
    """Whether a file's rows are held out (``"test"``), fitted on (``"train"``), or either."""
    words = set(_words(path))
    return "test" if words & set(HOLDING) else "train" if words & set(FITTING) else ""


def _causalgym(folder: Path, how: _How) -> Iterator[Named]:
    """Pairs by task, or files of prompts in this project's form, each a task."""
    rows: dict[str, dict[str, list[Any]]] = {}
    for path in _files(folder):
        every = list(rows_of(str(path)))
        paired = any(isinstance(row, Mapping) and all(k in row for k in CAUSALGYM) for row in every)
        for row in every:
            own = row.get("task") if paired and isinstance(row, Mapping) else None
            sides = rows.setdefault(path.stem if own is None else str(own), {})
            sides.setdefault(_side(path) if paired else "", []).append(row)
    for name, sides in rows.items():
        if how.wants(name):
            train = [*sides.get("train", []), *sides.get("", [])]
            yield how.task(name, train, sides.get("test", []))


def _mib(folder: Path, how: _How) -> Iterator[Named]:
    """Prompts with counterfactuals, a task for each kind of counterfactual."""
    rows: dict[str, list[Any]] = {"train": [], "test": []}
    for path in _files(folder):
        rows[_side(path) or "train"] += list(rows_of(str(path)))
    every = [*rows["train"], *rows["test"]]
    fields = [item for row in every if isinstance(row, Mapping) for item in row.items()]
    named = [(name, value) for name, value in fields if name.endswith("counterfactual")]
    kinds = [name for name, value in named if isinstance(value, Mapping)]
    if not kinds:
        seen = dict.fromkeys(str(name) for name, _ in fields)
        raise PromptError(
            f"{str(folder)!r} holds no rows of MIB; looked for fields whose names end in "
            f"counterfactual, and found {', '.join(seen) or 'none'}"
        )
    for name in dict.fromkeys(kinds):
        attributes = asked_attributes(every, name)
        if attributes:
            yield from _mib_cities(rows, name, attributes, how)
        elif how.wants(name):
            yield how.task(name, *(_mib_pairs(own, name) for own in rows.values()))


def _mib_pairs(rows: list[Any], name: str) -> list[Any]:
    """The rows of one kind of counterfactual, and why there are none."""
    found: list[Any] = []
    for number, row in enumerate(rows):
        try:
            found += [row] if isinstance(row, RowError) else mib_rows(number, row, name)
        except RowError as error:
            found.append(error)
    return found


def _mib_cities(
    rows: Mapping[str, list[Any]], kind: str, attributes: Sequence[str], how: _How
) -> Iterator[Named]:
    """Entities with a counterfactual entity each, a task for each attribute."""
    values: dict[str, dict[str, str]] = {}
    for row in chain.from_iterable(rows.values()):
        for side in (row, row.get(kind)) if isinstance(row, Mapping) else ():
            if isinstance(side, Mapping):
                agree(values, side, str(side.get("entity") or ""), attributes)
    made, sources = dict[str, _Divided](), dict[str, tuple[str, str]]()
    for name in attributes:
        sides, log = list[list[Prompt]](), RowLog()
        for half, own in rows.items():
            asking = [
                row for row in own if not isinstance(row, Mapping) or row.get("attribute") == name
            ]
            draws = random.Random(how.seed)
            # Of a hundred thousand rows no more are looked at than a task may need.
            asking = draws.sample(asking, min(len(asking), MOST_LOOKED_AT * how.n))
            sides.append([])
            for number, row in enumerate(asking):
                key = f"{half}.{name}.{number}"
                try:
                    prompt, sources[key] = city_prompt(number, row, kind, name, values)
                    sides[-1].append(replace(prompt, pair=key))
                except RowError as error:
                    log.refuse(error)
        try:
            made[name] = how.divided(sides[0], sides[1], log)
        except PromptError as error:
            if how.wants(kind, name):
                yield f"{name}:{kind}", error
    wanted = [name for name in made if how.wants(kind, name)]
    yield from _attribute_tasks(made, values, wanted, how, sources, f":{kind}")


def _ravel(folder: Path, how: _How) -> Iterator[Named]:
    """Entities by attribute: prompts that ask for it, and those that ask for the others."""
    folder = folder if folder.is_dir() else folder.parent
    whole = any(folder.rglob(f"*{RAVEL_FILES[0]}"))
    tables = read_ravel(folder, [] if whole else _ravel_rows(folder))
    asked = [name for name in tables.templates if how.wants(name)]
    if not asked:
        raise PromptError(
            f"no attribute of RAVEL is asked for: looked for {', '.join(how.tasks)}; there are "
            f"{', '.join(tables.templates)}"
        )
    made = dict[str, _Divided]()
    for name in asked:
        try:
            train, test = (_ravel_prompts(tables, name, how, held) for held in (False, True))
            made[name] = how.divided(train, test, RowLog())
        except PromptError as error:
            yield name, error
    yield from _attribute_tasks(made, tables.values, list(made), how)


def _attribute_tasks(
    made: Mapping[str, _Divided],
    values: Mapping[str, Mapping[str, str]],
    wanted: Sequence[str],
    how: _How,
    sources: Mapping[str, tuple[str, str]] | None = None,
    suffix: str = "",
) -> Iterator[Named]:
    """A task for each attribute that is wanted, of prompts by the attribute that they ask for.

    What is written into prompts that ask for another attribute is drawn, or, where each prompt's
    pair has a source, a marked text and its entity, what that entity has.
    """
    draws = random.Random(how.seed)
    for name in (name for name in made if name in wanted):
        yield f"{name}{suffix}", _attribute_task(name, suffix, made, values, how, draws, sources)


def _attribute_task(
    name: str,
    suffix: str,
    made: Mapping[str, _Divided],
    values: Mapping[str, Mapping[str, str]],
    how: _How,
    draws: random.Random,
    sources: Mapping[str, tuple[str, str]] | None,
) -> BenchTask:
    own = made[name]
    names, bos = own.classes, own.bos
    value = {entity: known.get(name, "") for entity, known in values.items()}

    def has(prompt: Prompt) -> str:
        return value[prompt.group or ""]

    def becomes(prompt: Prompt) -> str:
        return value[sources[prompt.pair or ""][1]] if sources else ""

    def patches(prompts: Sequence[Prompt]) -> PromptSet | None:
        if sources is None:
            return None
        pairs = [sources[p.pair or ""] for p in prompts]
        return how.encode([Prompt(text, value[entity]) for text, entity in pairs], names, bos)

    every = [p for each in made.values() for p in each.train]
    fitted = [Prompt(p.text, has(p), group=p.group) for p in every if has(p) in names]
    attributes, others = {}, {}
    for other, asking in made.items():
        if other == name:
            continue
        theirs = {label: number for number, label in enumerate(asking.classes)}
        held = [theirs.get(values[p.group or ""].get(other, ""), len(theirs)) for p in fitted]
        attributes[other] = torch.tensor(held)
        kept = [p for p in asking.test if has(p) in names]
        if sources is not None:  # a counterfactual of the same value says nothing
            kept = [p for p in kept if becomes(p) in names and becomes(p) != has(p)]
        if len({p.label for p in kept}) < 2:
            continue
        source = torch.tensor([names.index(has(p)) for p in kept])
        if sources is None:
            step = torch.tensor([draws.randrange(1, len(names)) for _ in kept])
            target = (source + step) % len(names)
        else:
            target = torch.tensor([names.index(becomes(p)) for p in kept])
        prompts = how.encode([replace(p, pair=None) for p in kept], asking.classes, bos)
        others[other] = Beside(prompts, source, target, patches(kept))
    return BenchTask(
        f"{name}{suffix}",
        how.encode(own.train, names, bos),
        how.encode(own.test, names, bos),
        own.log,
        fitted=how.encode(fitted, names, bos),
        attributes=attributes,
        others=others,
        patches=patches(own.test),
    )


def _ravel_rows(folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The rows of all tables in a folder, each with the split that its file is named after."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix in KINDS):
        split_of = next((w for w in _words(path) if w in (*FITTING, *HOLDING)), "train")
        rows = (row for row in rows_of(str(path)) if isinstance(row, Mapping))
        found += [(split_of, row) for row in rows]
    return found


def _ravel_prompts(tables: Ravel, name: str, how: _How, held: bool) -> list[Prompt]:
    """Prompts that ask for an attribute of entities, each with another value to write."""
    draws = random.Random(how.seed + held)

    def side(split_of: Mapping[str, str], items: Sequence[str]) -> list[str]:
        own = [item for item in items if (split_of.get(item, "train") in HELD_OUT) == held]
        return own or list(items)

    entities = side(tables.entity_split, [e for e, own in tables.values.items() if own.get(name)])
    counts = Counter(tables.values[e][name] for e in entities)
    often = [v for v, count in counts.most_common() if held or count >= LEAST_OF_CLASS]
    often = often if len(often) > 1 else list(counts)
    templates = side(tables.template_split, tables.templates[name])
    kept = [e for e in entities if tables.values[e][name] in often]
    if len(often) < 2 or not kept:
        raise PromptError(
            f"RAVEL's files give {len(entities)} entities with {len(counts)} values of {name!r}; "
            f"two values are needed"
        )
    found = []
    for number in range(max(how.n, len(kept))):
        entity = kept[number % len(kept)] if number < len(kept) else draws.choice(kept)
        template, own = draws.choice(templates), tables.values[entity][name]
        target = draws.choice([v for v in often if v != own])
        text = template.replace("%s", entity)
        answers = {v: (spoken(text, v),) for v in (own, target)}
        before, _, after = template.rpartition("%s")
        marked = f"{before.replace('%s', entity)}[[{entity}]]{after}"
        found.append(Prompt(marked, own, answers, group=entity, target=target))
    return found


# ---- scoring -------------------------------------------------------------------------------------


class _Scoring:
    """All methods on one task at one site, and what they do to its prompts."""

    def __init__(
        self, context: StudyContext, task: BenchTask, site: str, training: Training
    ) -> None:
        self.context, self.task, self.site, self.training = context, task, site, training
        self.wide = context
        if task.fitted is not None:
            self.wide = replace(context, task=Task(task.name, task.fitted, task.test))
        self.x = self.wide.activations(self.wide.task, "train", "mark", [site])[site]
        labels = self.wide.task.train.labels.to(self.x.device)
        self.reference = fit_edits({site: self.x}, labels)[site]
        self.candidates = self._methods()
        self.edits = {item.name: item.edit for item in self.candidates if item.edit is not None}

    def _methods(self) -> list[Candidate]:
        """Those of closed form fitted to all prompts, DAS to those that ask."""
        given = (self.site, self.reference)
        found = {
            item.name: item
            for context, names in ((self.wide, CLOSED), (self.context, ("das",)))
            for item in build_candidates(context, *given, names, self.training)
        }
        kept = self.task.attributes
        if kept:
            variables = {self.task.name: self.wide.task.train.labels} | kept
            known = {name: labels.to(self.x.device) for name, labels in variables.items()}
            edit, problem = None, ""
            try:
                joint = JointLRQP.fit(self.x, known, keep=list(kept), on_infeasible="skip")
                edit = KeptLRQP(self.reference, joint, self.task.name)
            except LRQPError as error:
                problem = str(error)
            found["joint"] = Candidate("joint", KeptLRQP.title, edit=edit, problem=problem)
        return [found[name] for name in METHODS if name in found]

    def scored(self, benchmark: str, notes: list[str]) -> TaskScore:
        """Every method's measures of a benchmark."""
        task, test = self.task, self.task.test
        trials, done = self._run(self.edits, test, test.labels, test.other, task.patches)
        right = _says(trials.clean, test.labels) if benchmark != "causalgym" else None
        if right is None:
            measured = self._odds_ratios(trials, done)
        elif benchmark == "ravel" or task.patches is not None:
            measured = self._isolated({k: _says(t, test.other)[right] for k, t in done.items()})
        else:
            measured = {
                key: {
                    "interchange accuracy": Estimate.share(_says(trial, test.other)[right]),
                    "of the two answers": Estimate.share(trial["logit_difference"] < 0),
                }
                for key, trial in done.items()
            }
        held = self.context.activations(self.context.task, "test", "mark", [self.site])[self.site]
        read = self.reference.probe(held).argmax(-1).cpu()
        methods = [
            MethodScore(c.name, c.title, measured.get(c.name, {}), c.settings, c.problem)
            for c in self.candidates
        ]
        counts, classes = (len(task.train), len(test)), list(test.classes)
        told = Estimate.share(read == test.labels.cpu())
        answered = Estimate.share(trials.clean["own_lead"] > 0)
        out = dict(task.log.left_out)
        return TaskScore(
            task.name, self.site, *counts, classes, told, answered, methods, out, notes
        )

    def _run(
        self,
        edits: Mapping[str, Baseline],
        prompts: PromptSet,
        source: Tensor,
        target: Tensor,
        patches: PromptSet | None = None,
    ) -> tuple[Trials, dict[str, Trial]]:
        """Every edit of prompts to a target, and the clean run."""
        wide, site = self.wide, self.site
        same = len(prompts.classes) == len(wide.task.train.classes)
        if patches is not None:
            size = self.context.batch_size
            at = patches.position
            found = capture(self.context.model, patches.inputs, [site], at, batch_size=size)
            partners = found[site].float()
        elif same and torch.equal(target.cpu(), prompts.other.cpu()):
            partners = counterparts(wide, prompts, [site])[site]
        else:
            partners = drawn(wide, [site], target)[site]
        trials = Trials(self.context, prompts)
        done = {k: trials.write(site, edit, target, source, partners) for k, edit in edits.items()}
        trials.run()
        return trials, done

    def _odds_ratios(
        self, trials: Trials, done: Mapping[str, Trial]
    ) -> dict[str, dict[str, Estimate]]:
        """CausalGym's measures."""
        clean, other, context, task = trials, dict[str, Trial](), self.context, self.task
        if task.control is not None:
            train, test = (_controlled(half, task.control) for half in (task.train, task.test))
            # DAS alone is trained on answers, so it is trained on those of the control task too.
            steered = replace(context, task=Task(task.name, train, test))
            again = build_candidates(steered, self.site, self.reference, ["das"], self.training)
            own = {key: edit for key, edit in self.edits.items() if key != "das"}
            own |= {} if again[0].edit is None else {"das": again[0].edit}
            clean, other = self._run(own, test, test.labels, test.other)
        measured = {}
        for key, trial in done.items():
            odds = trials.clean["logit_difference"] - trial["logit_difference"]
            found = {"log odds-ratio": Estimate.mean(odds, context.generator())}
            if key in other:
                less = clean.clean["logit_difference"] - other[key]["logit_difference"]
                found["selectivity"] = Estimate.mean(odds - less, context.generator())
            accuracy = {"interchange accuracy": Estimate.share(trial["logit_difference"] < 0)}
            measured[key] = found | accuracy
        return measured

    def _isolated(self, turned: Mapping[str, Tensor]) -> dict[str, dict[str, Estimate]]:
        """RAVEL's measures."""
        stays: dict[str, list[Tensor]] = {key: [] for key in turned}
        for beside in self.task.others.values():
            asking = beside.prompts
            how = beside.source, beside.target, beside.patches
            trials, done = self._run(self.edits, asking, *how)
            right = _says(trials.clean, asking.labels)
            for key, trial in done.items():
                stays[key].append(_says(trial, asking.labels)[right])
        draws, paired = self.context.generator, self.task.patches is not None
        found = {key: _disentangled(hit, stays[key], draws()) for key, hit in turned.items()}
        for key, hit in turned.items() if paired else ():
            found[key]["interchange accuracy"] = Estimate.share(torch.cat([hit, *stays[key]]))
        return found


def _controlled(prompts: PromptSet, tokens: tuple[int, int]) -> PromptSet:
    """The prompts with the answers of CausalGym's control task: of two classes, each has one."""
    rows, own, other = torch.arange(len(prompts)), prompts.labels, prompts.other
    said = torch.full((len(prompts), len(prompts.classes), 1), -1)
    first = own < other
    said[rows, own, 0] = torch.where(first, *tokens)
    said[rows, other, 0] = torch.where(first, *tokens[::-1])
    return replace(prompts, answers=said, continued=None)


def _says(trial: Trial, classes: Tensor) -> Tensor:
    """Whether the model says an answer of a class, BoolTensor (n,)."""
    return trial["said"].gather(-1, classes.cpu().unsqueeze(-1)).squeeze(-1)


def _disentangled(
    hit: Tensor, kept: Sequence[Tensor], generator: torch.Generator
) -> dict[str, Estimate]:
    """RAVEL's cause, isolate (mean over attributes) and the mean of both."""
    kept = [each for each in kept if len(each)]

    def mean(*parts: Sequence[Tensor]) -> Estimate:
        known = [part for part in parts if part and all(len(each) for each in part)]
        count = sum(len(each) for part in known for each in part)
        if not count or len(known) < len(parts):
            return Estimate(None, None, None, 0)
        # Each prompt weighs so that the mean of all is the mean of the parts' means.
        scaled = [
            each.double() * (count / (len(known) * len(part) * len(each)))
            for part in known
            for each in part
        ]
        return Estimate.mean(torch.cat(scaled), generator)

    return {"cause": Estimate.share(hit), "isolate": mean(kept), "disentangle": mean([hit], kept)}
