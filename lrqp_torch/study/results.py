"""The results of a study: what is kept, how it is written to disk, and how it is read back.

A study leaves ``results.json`` (every figure, with the settings, seed and versions behind it),
``prompts.safetensors`` (one number per held-out prompt) and ``prompts.json`` (their texts). Each is
written whole or not at all.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from statistics import stdev
from typing import Any, Self, TypeVar, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from lrqp_torch.errors import NonFiniteError, OutputError
from lrqp_torch.files import prepare_folder, read_json, write_json, written_whole
from lrqp_torch.plot.chart import strong
from lrqp_torch.qp import Status
from lrqp_torch.study import ceiling
from lrqp_torch.study.ceiling import Interchange, Likeness, Null, Verdict
from lrqp_torch.study.estimates import Estimate, Sample
from lrqp_torch.study.known import GroundTruth, PublishedFigure
from lrqp_torch.study.prompts import PromptSet, Words
from lrqp_torch.study.records import BESIDE, from_json, to_json
from lrqp_torch.study.sweep import CONDITIONS, INTERCHANGE, NULL, USED_THRESHOLD

T = TypeVar("T")

FORMAT = 2
"""Version of the layout of ``results.json``; 0.2.0 wrote 1."""

RESULTS_FILE = "results.json"
PROMPTS_FILE = "prompts.safetensors"
TEXTS_FILE = "prompts.json"
LINE_WIDTH = 46


@dataclass(frozen=True)
class CleanResult:
    """The model without any edit, on the held-out prompts; None for a task without answers."""

    prompts: int  # number of held-out prompts
    # Mean score of the class that holds minus that of the counterfactual one. Where each class has
    # one answer, that is a difference of logits, such as IO − S at END.
    logit_difference: Estimate | None
    # Share of prompts that the model answers with the class that holds rather than with any other.
    accuracy: Estimate | None
    # Mean probability of the answers of the class that holds (of IO).
    io_probability: Estimate | None

    @classmethod
    def of(cls, flat: Mapping[str, Tensor], seed: int) -> Self:
        """Summarise the clean run of a sweep, as :func:`~.sweep.sweep` returns it."""
        sample = Sample(seed, flat.get("groups"))
        return cls(len(flat["labels"]), *_answered(columns_of(flat, "clean"), sample))


@dataclass(frozen=True)
class ConditionResult:
    """One edit at one site, over the held-out prompts; what is answered is None without answers."""

    logit_difference: Estimate | None  # as in :class:`CleanResult`, like ``accuracy``
    accuracy: Estimate | None  # see there
    # Of the prompts that the clean model answers with the class that holds, those that it answers
    # with the counterfactual class under the edit; without a value where there are none of the
    # former. Under the control edit these are accidental flips.
    flipped: Estimate | None
    divergence: Estimate  # mean KL(clean ‖ edited) of the next token, in nats
    distance: float  # mean Mahalanobis length of the edit
    euclidean: float  # mean Euclidean length of the edit
    # Least value, over prompts, of the log odds that the probe reads after the edit minus the log
    # odds asked for; not negative when every prompt got them.
    worst_log_odds_margin: float
    skipped: int  # prompts whose odds sufficed already, left unchanged bit for bit
    solved: int  # prompts edited to the optimum
    infeasible: int  # prompts for which no activation satisfies the probe
    inaccurate: int  # prompts whose solution misses the solver's promised accuracy

    @classmethod
    def of(cls, flat: Mapping[str, Tensor], key: str, seed: int) -> Self:
        """Summarise one edit of a sweep; ``key`` is ``SITE.CONDITION``."""
        columns, sample = columns_of(flat, key), Sample(seed, flat.get("groups"))
        difference, accuracy, _ = _answered(columns, sample)
        ended = columns["status"].tolist()
        return cls(
            logit_difference=difference,
            accuracy=accuracy,
            flipped=difference and sample.flipped(columns_of(flat, "clean"), columns),
            divergence=sample.mean(columns["divergence"]),
            distance=columns["distance"].mean().item(),
            euclidean=columns["euclidean"].mean().item(),
            worst_log_odds_margin=(columns["log_odds_after"] - columns["floor"]).min().item(),
            skipped=ended.count(Status.SATISFIED),
            solved=ended.count(Status.SOLVED),
            infeasible=ended.count(Status.INFEASIBLE),
            inaccurate=ended.count(Status.INACCURATE),
        )

    @property
    def failed(self) -> int:
        """Prompts that were left as they were, because their target could not be reached."""
        return self.infeasible + self.inaccurate


@dataclass(frozen=True)
class Refits:
    """The counterfactual edit fitted anew, each time to training prompts drawn with replacement."""

    flipped: list[float]  # share of the answers that each flips; the held-out prompts stay the same
    # Share of the interchange's effect that each recovers; empty where that is not known.
    recovered: list[float]
    flipped_sd: float | None  # standard deviation of the former; None of fewer than two
    recovered_sd: float | None  # of the latter

    @classmethod
    def of(cls, flipped: list[float], recovered: list[float]) -> Self:
        """With their spread."""
        spreads = [stdev(v) if len(v) > 1 else None for v in (flipped, recovered)]
        return cls(flipped, recovered, *spreads)


@dataclass(frozen=True)
class SiteResult(Likeness):
    """One site: what its probe knows, what editing its belief does, what that is held against."""

    probe_accuracy: Estimate  # of the probe on the held-out prompts
    shuffled_accuracy: Estimate  # of a probe fitted to the training labels in random order
    control: ConditionResult  # edits towards the class that holds
    # Edits towards the next class, the other one of two; ``recovered``, ``agreement``,
    # ``kl_to_interchange`` and ``beyond`` are of these.
    counterfactual: ConditionResult
    worst_log_odds_margin: float  # the worse of the two conditions' margins
    interchange: Interchange | None = None  # the ceiling; None where no prompt has a twin
    null: Null | None = None  # edits of shuffled probes, as long; None for a task without answers
    verdict: Verdict | None = None  # whether the model uses the class here; None likewise
    # The same of each of several variables, and of ``all`` together; empty where one alone is
    # edited.
    variables: "dict[str, VariableResult]" = field(default_factory=dict)
    # The spread over fits; None where none was asked for, or there are no answers.
    refits: Refits | None = None

    @classmethod
    def of(cls, flat: Mapping[str, Tensor], site: str, shuffled: Estimate, seed: int) -> Self:
        """Summarise a site of a sweep, without a verdict: that takes all sites.

        The probe's accuracy is read from the control edit: the log odds of the class that holds,
        against its strongest rival, are positive before the edit where the probe is right.
        """
        control, counterfactual = (
            ConditionResult.of(flat, f"{site}.{c}", seed) for c in CONDITIONS
        )
        margins = (control.worst_log_odds_margin, counterfactual.worst_log_odds_margin)
        groups = flat.get("groups")
        right = Estimate.share(flat[f"{site}.control.log_odds_before"] > 0, groups)
        both, interchange, null = patched(flat, site), None, None
        if both is not None:
            clean, _, patch, known = both
            interchange = ceiling.interchange_of(clean, patch, Sample(seed, groups, known))
        if runs := null_runs(flat, site):
            clean, edit = columns_of(flat, "clean"), columns_of(flat, f"{site}.counterfactual")
            null = ceiling.null_of(clean, edit, runs, seed, groups)
        return cls(right, shuffled, control, counterfactual, min(margins), interchange, null)

    @property
    def net_flips(self) -> float:
        """Share of answers that flip under the counterfactual edit beyond those of the control."""
        shares = (self.counterfactual.flipped, self.control.flipped)
        own, accidental = ((share and share.value) or 0.0 for share in shares)
        return own - accidental

    @property
    def clearly_flips(self) -> bool:
        """Whether the counterfactual edit flips more answers than the control, beyond intervals."""
        edit, control = self.counterfactual.flipped, self.control.flipped
        if edit is None or control is None or edit.lower is None or control.upper is None:
            return False
        return edit.lower > control.upper

    @property
    def used(self) -> bool:
        """Whether the model uses the class here; results before 0.4 say so by another rule."""
        return self.net_flips >= USED_THRESHOLD if self.verdict is None else self.verdict.used


@dataclass(frozen=True, kw_only=True)
class KeptResult(Likeness):
    """The counterfactual edit of one variable that keeps the beliefs about all others."""

    edit: ConditionResult  # the edit, held against the same interchange


@dataclass(frozen=True)
class TargetResult:
    """Counterfactual edits that wrote one class."""

    prompts: int  # into how many held-out prompts
    # Of those answered with the class that holds, the share then answered with what the class
    # written goes with; None for a task without answers.
    flipped: Estimate | None
    # Mean preference for the class that holds over that; None likewise.
    logit_difference: Estimate | None
    distance: float  # mean Mahalanobis length


@dataclass(frozen=True)
class VariableResult(SiteResult):
    """One of several variables at a site, or all of them together: the keys of a site, and more."""

    prompts: int = 0  # held-out prompts of which every class is known; all numbers are of these
    kept: KeptResult | None = None  # the edit that keeps the others; None where there are none
    # Class that was written to what writing it did, of all K − 1 others for each prompt, or of that
    # of its twin where that is the only one that an answer goes with.
    by_target: dict[str, TargetResult] = field(default_factory=dict)


def told(record: T, used: bool = True) -> T:
    """The same results without shares of a ceiling where the variable is not used.

    There the interchange has next to no effect on the answer, and a share of that says nothing. A
    site says of itself, and of all within it, whether it is used: by its verdict, or, where it has
    none, by whether the counterfactual edit flips clearly more answers than the control edit.
    ``used`` holds of records that are no sites, and lie in none.
    """
    if isinstance(record, str | int | float):  # most of what there is
        return record
    if isinstance(record, Mapping):
        return cast(T, {key: told(value, used) for key, value in record.items()})
    if isinstance(record, list):
        return cast(T, [told(value, used) for value in record])
    if not is_dataclass(record) or isinstance(record, type | Estimate):
        return record
    if isinstance(record, SiteResult):
        used = record.used if record.verdict else record.clearly_flips
    kept = {each.name: told(getattr(record, each.name), used) for each in fields(record)}
    kept |= {name: None for name in ("recovered", "recovered_sd") if name in kept and not used
             and not isinstance(kept[name], list)}  # fmt: skip
    return replace(record, **kept)


def judged(
    sites: Mapping[str, SiteResult], flat: Mapping[str, Tensor], seed: int
) -> dict[str, SiteResult]:
    """The sites that were swept with what takes all of them: verdicts, and likeness to the
    interchange.
    """
    clean, groups = columns_of(flat, "clean"), flat.get("groups")
    patches = {name: found for name in sites if (found := patched(flat, name)) is not None}
    likeness: dict[str, dict[str, Any]] = {}
    if patches:
        pairs = {name: (edit, patch) for name, (_, edit, patch, _) in patches.items()}
        twins = Sample(seed, groups, flat["twins"].bool())
        likeness = ceiling.likenesses(clean, pairs, twins)
    nulls = {name: site.null for name, site in sites.items() if site.null is not None}
    p_values, needed = {}, {}
    for name in nulls:
        edit = columns_of(flat, f"{name}.counterfactual")
        p_values[name] = ceiling.excess(clean, edit, null_runs(flat, name)[0], Sample(seed))
        told = "recovered" in likeness.get(name, ())
        needed[name] = ceiling.needed_for_half(*patches[name]) if told else None
    said = ceiling.verdicts(p_values, nulls, needed)
    return {
        name: replace(site, verdict=said.get(name), **likeness.get(name, {}))
        for name, site in sites.items()
    }


def null_runs(flat: Mapping[str, Tensor], site: str) -> list[dict[str, Tensor]]:
    """Columns of each run of the null at a site, with the probe that each prompt met."""
    names = [name for name in flat if name.startswith(NULL) and name.endswith(".probe")]
    runs = [(flat[name], columns_of(flat, f"{site}.{name[: -len('.probe')]}")) for name in names]
    return [columns | {"probe": probe} for probe, columns in runs if "own_lead" in columns]


def patched(
    flat: Mapping[str, Tensor], site: str, edit: str = "counterfactual"
) -> tuple[Any, ...] | None:
    """Columns of the clean run, of an edit and of the interchange; who has one."""
    if f"{site}.{INTERCHANGE}.divergence" not in flat:
        return None
    names = ("clean", f"{site}.{edit}", f"{site}.{INTERCHANGE}")
    return *(columns_of(flat, name) for name in names), flat["twins"].bool()


@dataclass(frozen=True)
class TaskFlipping:
    """What the sweep says about one version of the task."""

    task: str  # its name
    clean: CleanResult  # the model without any edit
    sites: dict[str, SiteResult]  # the sweep by site, in order of computation
    used_sites: list[str]  # see :attr:`SiteResult.used`
    best_site: str  # see :func:`best_site`
    seconds: dict[str, float]  # time of each stage
    # The best site on the prompts that it was not chosen by; None in results before 0.4.
    best: SiteResult | None = None


def best_site(flat: Mapping[str, Tensor], sites: Sequence[str]) -> str:
    """The site that flips most beyond its null; among equals, the one that changes most.

    What changes is the mean logit difference, or without answers the distribution of the next token
    beyond what the control edit does to it. ``flat`` is of the prompts by which it is chosen, as
    :func:`~.sweep.sweep` returns it.
    """
    answered = flat["clean.own_lead"] > 0 if "clean.own_lead" in flat else None

    def strength(name: str) -> tuple[float, float]:
        edit, control = (columns_of(flat, f"{name}.{c}") for c in reversed(CONDITIONS))
        if answered is None:
            return 0.0, float((edit["divergence"] - control["divergence"]).mean())
        null = (null_runs(flat, name) or [control])[0]
        flips = [(one["other_lead"] > 0)[answered].double().sum() for one in (edit, null)]
        change = edit["logit_difference"] - flat["clean.logit_difference"]
        return float(flips[0] - flips[1]), abs(float(change.mean()))

    return max(sites, key=strength)


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


@dataclass(frozen=True)
class StudyResults:
    """Everything that a study finds: what ``results.json`` holds, and the files beside it."""

    settings: dict[str, Any]  # what the study was asked to do
    model: dict[str, Any]  # name, class, family, size and revision of the model
    task: str  # name of the version of the task
    words: Words  # what the things of the task are called
    classes: list[str]  # names of the classes, in order
    data: dict[str, int]  # number of prompts to fit on (`train`) and held out (`test`)
    majority: float  # accuracy of always naming the most frequent class, on the held-out prompts
    # Held-out prompts that the model answers with the class that holds, without an edit: the
    # accuracy of `clean`. None for a task without answers.
    answered: Estimate | None
    clean: CleanResult  # the model without any edit
    sites: dict[str, SiteResult]  # by site name, in order of computation
    used_sites: list[str]  # sites that the model uses, by the verdict of :mod:`~.ceiling`
    # The site that flips most beyond its null, on the first half of the held-out prompts; see
    # :func:`best_site`. None where no site was swept.
    best_site: str | None
    ground_truth: GroundTruth | None  # set only for a model whose true sites are known
    # Figures of GPT-2 small from the literature, by key; none for other tasks.
    published: dict[str, PublishedFigure]
    versions: dict[str, str]  # of Python and of the packages that computed the results
    elapsed: dict[str, float]  # seconds spent in each stage, and in total
    parts: dict[str, Any]  # part of the study to its result, as the part reads it
    # Rows of one's own data that could not be used, by reason.
    left_out: dict[str, int] = field(default_factory=dict)
    # What a reader should know of the prompts, a sentence each.
    notes: list[str] = field(default_factory=list)
    # Names of the figures and pages beside ``results.json``.
    files: list[str] = field(default_factory=list)
    # The best site on the other half, by which it was not chosen; None where no site was swept, and
    # in results before 0.4.
    best: SiteResult | None = None
    format: int = FORMAT  # version of this layout
    # One number per held-out prompt, as :func:`~.sweep.sweep` returns them.
    prompts: dict[str, Tensor] = field(
        default_factory=dict, repr=False, compare=False, metadata=BESIDE
    )
    # The held-out prompts.
    texts: PromptTexts | None = field(default=None, repr=False, compare=False, metadata=BESIDE)
    # Results of parts as they are shown, by name, each with what it was read from.
    shown: dict[str, tuple[Any, Any]] = field(
        default_factory=dict, init=False, repr=False, compare=False, metadata=BESIDE
    )

    @property
    def strongest(self) -> SiteResult | None:
        """The best site, on prompts that it was not chosen by where there are such."""
        return self.best or self.sites.get(str(self.best_site))

    def save(self, folder: Path) -> None:
        """Write ``results.json``, ``prompts.safetensors`` and ``prompts.json`` into a folder.

        Raises:
            NonFiniteError: a figure is NaN or infinite, which strict JSON cannot hold.
            OutputError: a file cannot be written.
        """
        prepare_folder(folder)
        save_prompts(self.prompts, folder)
        if self.texts is not None:
            self.texts.save(folder)
        try:
            write_json(folder / RESULTS_FILE, to_json(self), indent=2)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"results.json was not written: {error}. The model's logits or an edited "
                "activation overflowed; try the model in float32."
            ) from error

    def __repr__(self) -> str:
        used = f", used at {', '.join(self.used_sites) or 'no site'}" if self.sites else ""
        return f"StudyResults({self.model['name']}, {len(self.sites)} sites{used})"

    def _repr_html_(self) -> str:
        from lrqp_torch.plot.cards import card

        facts = {
            "model": self.model["name"],
            "prompts": f"{self.data['train']} fitted, {self.data['test']} held out",
            "classes": ", ".join(self.classes),
            "sites": ", ".join(self.sites) if len(self.sites) < 4 else len(self.sites),
        }
        if self.best_site is not None:
            edit = self.sites[self.best_site].counterfactual
            facts |= {"used at": ", ".join(self.used_sites) or "no site"}
            facts |= {"flips most": self.best_site}
            if (share := edit.flipped) is not None and share.value is not None:
                ends = f"{share.lower:.1%} to {share.upper:.1%}"
                facts["answers flipped there"] = f"{share.value:.1%} ({ends})"
            ended = f"{edit.solved} / {edit.skipped} / {edit.failed}"
            margin = f"{edit.worst_log_odds_margin:.1e} nats"
            facts |= {"solved / satisfied / failed": ended}
            facts |= {"worst margin over the odds asked": margin}
        facts |= {"parts": ", ".join(self.parts)} if self.parts else {}
        lengths = columns_of(self.prompts, f"{self.best_site}.counterfactual").get("distance")
        numbers = [] if lengths is None else lengths.tolist()
        return card("StudyResults", facts, numbers, f"lengths at {self.best_site}")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read back what :meth:`save` wrote.

        Raises:
            OutputError: a file is missing, unreadable or of another format.
        """
        prompts = load_prompts(folder)
        try:
            raw = read_json(folder / RESULTS_FILE, OutputError)
            if raw["format"] != FORMAT:
                raise ValueError(f"format {raw['format']}, but this version reads {FORMAT}")
            found = from_json(cls, raw)
        except (OutputError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(folder, error) from error
        return replace(found, prompts=prompts, texts=PromptTexts.load(folder))


def columns_of(flat: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The per-prompt tensors whose names begin with ``prefix`` and a dot, without it."""
    start = f"{prefix}."
    return {name[len(start) :]: v for name, v in flat.items() if name.startswith(start)}


def save_prompts(prompts: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``prompts.safetensors`` into ``folder``.

    Raises:
        OutputError: the file cannot be written.
    """
    write_tensors(folder / PROMPTS_FILE, prompts)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors. Raises OutputError: the file cannot be written."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as temporary:
        # Not save_file, which makes the file unreadable for other users.
        temporary.write_bytes(serialise(content, metadata))


def load_prompts(folder: Path) -> dict[str, Tensor]:
    """Read back what :func:`save_prompts` wrote.

    Raises:
        OutputError: the file is missing or unreadable.
    """
    try:
        return load_file(folder / PROMPTS_FILE)
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error


def _answered(
    columns: Mapping[str, Tensor], sample: Sample
) -> tuple[Estimate | None, Estimate | None, Estimate | None]:
    """Logit difference, accuracy and, of the clean run, probability of the class that holds."""
    if "logit_difference" not in columns:
        return None, None, None
    chance = columns.get("io_probability")
    return (
        sample.mean(columns["logit_difference"]),
        sample.share(columns["own_lead"] > 0),
        None if chance is None else sample.mean(chance),
    )


def _unreadable(folder: Path, error: Exception) -> OutputError:
    return OutputError(
        f"cannot read the results in {str(folder)!r}: {error}. Run the study with --out set to "
        "this folder to write them anew, or with --resume to finish a run that was stopped."
    )
