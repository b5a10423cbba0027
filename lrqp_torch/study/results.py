"""The results of a study: what is kept, how it is written to disk, and how it is read back.

A study leaves ``results.json`` (every figure, with the settings, seed and versions behind it) and
``prompts.safetensors`` (one number per held-out prompt). Both are written whole or not at all.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from lrqp_torch.errors import NonFiniteError, OutputError
from lrqp_torch.files import written_whole
from lrqp_torch.study.published import PublishedFigure

FORMAT = 1
"""Version of the layout of ``results.json``."""

RESULTS_FILE = "results.json"
PROMPTS_FILE = "prompts.safetensors"


@dataclass(frozen=True)
class CleanResult:
    """The model without any edit, on the held-out prompts.

    Attributes:
        prompts: number of held-out prompts.
        logit_difference: mean of the IO logit minus the S logit at END.
        accuracy: share of prompts whose IO logit is above the S logit.
        io_probability: mean softmax probability of IO over the whole vocabulary.
    """

    prompts: int
    logit_difference: float
    accuracy: float
    io_probability: float


@dataclass(frozen=True)
class ConditionResult:
    """One edit at one site, over the held-out prompts.

    Attributes:
        logit_difference: mean of the IO logit minus the S logit at END.
        accuracy: share of prompts whose IO logit is above the S logit.
        flipped: of the prompts answered IO in the clean run (IO logit above S logit), the share
            answered S under the edit (S logit above IO logit); ``None`` if none was answered IO.
            Under the control edit these are accidental flips.
        distance: mean Mahalanobis length of the edit.
        euclidean: mean Euclidean length of the edit.
        worst_log_odds_margin: least value, over prompts, of the log odds that the probe reads
            after the edit minus the log odds asked for; not negative when every prompt got them.
        skipped: prompts whose odds sufficed already, left unchanged bit for bit.
        solved: prompts edited to the optimum.
        infeasible: prompts for which no activation satisfies the probe.
        inaccurate: prompts whose solution misses the solver's promised accuracy.
    """

    logit_difference: float
    accuracy: float
    flipped: float | None
    distance: float
    euclidean: float
    worst_log_odds_margin: float
    skipped: int
    solved: int
    infeasible: int
    inaccurate: int


@dataclass(frozen=True)
class SiteResult:
    """One site: what its probe knows, and what editing its belief does.

    Attributes:
        probe_accuracy: accuracy of the probe on the held-out prompts.
        control: edits towards the true label.
        counterfactual: edits towards the other label.
        worst_log_odds_margin: the worse of the two conditions' margins.
    """

    probe_accuracy: float
    control: ConditionResult
    counterfactual: ConditionResult
    worst_log_odds_margin: float


@dataclass(frozen=True)
class GroundTruth:
    """The sites at which a model was trained to use the order, beside those that the study found.

    Attributes:
        used_sites: the true ones among the sites swept.
        unclear_sites: sites swept at which the truth is neither; they are not compared.
        agrees: whether the study's ``used_sites``, but for the unclear ones, are exactly these.
    """

    used_sites: list[str]
    unclear_sites: list[str]
    agrees: bool


@dataclass(frozen=True)
class StudyResults:
    """Everything that ``results.json`` holds.

    Attributes:
        settings: what the study was asked to do.
        model: name, class, family, size and revision of the model.
        data: number of prompts to fit on and held out.
        clean: the model without any edit.
        sites: results keyed by site name, in order of computation.
        used_sites: sites whose counterfactual edit flips at least half of the answers more than
            the control edit does.
        best_site: site whose counterfactual edit flips most beyond its control; among equals, the
            one with the largest change of the mean logit difference; None where no site was swept.
        ground_truth: set only for a model whose true sites are known.
        published: figures of GPT-2 small from the literature, by key.
        versions: versions of Python and of the packages that computed the results.
        elapsed: seconds spent in each stage, and in total.
        parts: part of the study to its result, as the part's ``from_json`` reads it.
        format: version of this layout.
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, int]
    clean: CleanResult
    sites: dict[str, SiteResult]
    used_sites: list[str]
    best_site: str | None
    ground_truth: GroundTruth | None
    published: dict[str, PublishedFigure]
    versions: dict[str, str]
    elapsed: dict[str, float]
    parts: dict[str, dict[str, Any]]
    format: int = FORMAT


def save(results: StudyResults, prompts: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write ``results.json`` and ``prompts.safetensors`` into ``folder``.

    Args:
        results: the study's figures.
        prompts: tensors whose first dimension counts the held-out prompts.
        folder: an existing folder.

    Raises:
        NonFiniteError: a figure is NaN or infinite, which strict JSON cannot hold.
        OutputError: a file cannot be written.
    """
    try:
        text = json.dumps(asdict(results), indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise NonFiniteError(
            "a result is NaN or infinite, so results.json was not written. The model's logits or "
            "an edited activation overflowed; try the model in float32."
        ) from error
    save_prompts(prompts, folder)
    with written_whole(folder / RESULTS_FILE) as path:
        path.write_text(text + "\n", encoding="utf-8")


def save_prompts(prompts: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write ``prompts.safetensors`` into ``folder``.

    Raises:
        OutputError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in prompts.items()}
    with written_whole(folder / PROMPTS_FILE) as path:
        # Not save_file, which makes the file unreadable for other users.
        path.write_bytes(serialise(tensors))


def load_prompts(folder: Path) -> dict[str, torch.Tensor]:
    """Read back what :func:`save_prompts` wrote.

    Raises:
        OutputError: the file is missing or unreadable.
    """
    try:
        return load_file(folder / PROMPTS_FILE)
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error


def load(folder: Path) -> tuple[StudyResults, dict[str, torch.Tensor]]:
    """Read back what :func:`save` wrote.

    Raises:
        OutputError: a file is missing, unreadable or of another format.
    """
    prompts = load_prompts(folder)
    try:
        raw = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']}, but this version reads {FORMAT}")
        results = _from_json(raw)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error
    return results, prompts


def _unreadable(folder: Path, error: Exception) -> OutputError:
    return OutputError(
        f"cannot read the results in {str(folder)!r}: {error}. "
        "Run `lrqp reproduce` with --out set to this folder to write them anew, "
        "or with --resume to finish a run that was stopped."
    )


def read_sites(raw: Mapping[str, Any]) -> dict[str, SiteResult]:
    """The sites that ``dataclasses.asdict`` turned into ``raw``."""
    return {
        name: SiteResult(
            probe_accuracy=site["probe_accuracy"],
            control=ConditionResult(**site["control"]),
            counterfactual=ConditionResult(**site["counterfactual"]),
            worst_log_odds_margin=site["worst_log_odds_margin"],
        )
        for name, site in raw.items()
    }


def _from_json(raw: dict[str, Any]) -> StudyResults:
    truth = raw["ground_truth"]
    nested = {
        "clean": CleanResult(**raw["clean"]),
        "sites": read_sites(raw["sites"]),
        "ground_truth": None if truth is None else GroundTruth(**truth),
        "published": {key: PublishedFigure(**item) for key, item in raw["published"].items()},
    }
    return StudyResults(**(raw | nested))
