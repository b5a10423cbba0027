"""The results of a study of your own: what is kept, written to disk, and read back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lrqp_torch.errors import NonFiniteError, OutputError
from lrqp_torch.files import prepare_folder, written_whole
from lrqp_torch.qp import Status
from lrqp_torch.study.estimates import bootstrap_mean, wilson
from lrqp_torch.study.flipping import CONDITIONS, USED_THRESHOLD
from lrqp_torch.study.results import RESULTS_FILE, load_prompts, save_prompts

FORMAT = 1
"""Version of the layout of ``results.json``."""
TEXTS_FILE = "prompts.json"


@dataclass(frozen=True)
class Share:
    """A share of prompts, with its 95 % interval (Wilson).

    Attributes:
        count: prompts of which it is true.
        of: prompts asked about.
        value: count / of; None where none was asked about.
        interval: lower and upper end.
    """

    count: int
    of: int
    value: float | None
    interval: tuple[float, float]

    @classmethod
    def that(cls, true: Tensor) -> Self:
        """The share of a BoolTensor (n,) that is true."""
        count, of = int(true.sum()), len(true)
        return cls(count, of, count / of if of else None, wilson(count, of))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        return cls(**{**raw, "interval": tuple(raw["interval"])})


@dataclass(frozen=True)
class Mean:
    """A mean over prompts, with its 95 % interval (bootstrap)."""

    value: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, values: Tensor, seed: int) -> Self:
        """The mean of (n,) values."""
        generator = torch.Generator().manual_seed(seed)
        return cls(values.double().mean().item(), bootstrap_mean(values, generator))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        return cls(raw["value"], tuple(raw["interval"]))


@dataclass(frozen=True)
class Condition:
    """One edit at one site, over the held-out prompts.

    Attributes:
        preference: mean score of the class that holds minus that of the counterfactual class, in
            nats; None for a task without answers.
        flipped: of the prompts that the clean model answers with the class that holds, those that
            it answers with the counterfactual class under the edit; None without answers. Under
            the control edit these are accidental flips.
        divergence: KL(clean ‖ edited) of the next token, in nats.
        distance: mean Mahalanobis length of the edit.
        euclidean: mean Euclidean length.
        worst_log_odds_margin: least log odds read after the edit minus those asked for.
        skipped: prompts whose odds sufficed already.
        solved: prompts edited to the optimum.
        infeasible: prompts for which no activation satisfies the probe.
        inaccurate: prompts whose solution misses the promised accuracy.
    """

    preference: Mean | None
    flipped: Share | None
    divergence: Mean
    distance: float
    euclidean: float
    worst_log_odds_margin: float
    skipped: int
    solved: int
    infeasible: int
    inaccurate: int

    @classmethod
    def of(cls, columns: Mapping[str, Tensor], right: Tensor | None, seed: int) -> Self:
        """Summarise the columns of one site and condition; ``right`` says which prompts count."""
        counts = {
            name: int((columns["status"] == int(status)).sum())
            for name, status in (
                ("skipped", Status.SATISFIED),
                ("solved", Status.SOLVED),
                ("infeasible", Status.INFEASIBLE),
                ("inaccurate", Status.INACCURATE),
            )
        }
        return cls(
            preference=None if right is None else Mean.of(columns["preference"], seed),
            flipped=None if right is None else Share.that(columns["other_lead"][right] > 0),
            divergence=Mean.of(columns["divergence"], seed),
            distance=columns["distance"].mean().item(),
            euclidean=columns["euclidean"].mean().item(),
            worst_log_odds_margin=(columns["log_odds_after"] - columns["floor"]).min().item(),
            **counts,
        )

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        return cls(**{
            **raw,
            "preference": raw["preference"] and Mean.from_json(raw["preference"]),
            "flipped": raw["flipped"] and Share.from_json(raw["flipped"]),
            "divergence": Mean.from_json(raw["divergence"]),
        })  # fmt: skip

    @property
    def failed(self) -> int:
        """Prompts that were left as they were, because their target could not be reached."""
        return self.infeasible + self.inaccurate


@dataclass(frozen=True)
class TaskSite:
    """One site: what its probe knows, and what editing its belief does.

    Attributes:
        probe: held-out prompts whose class the probe reads.
        shuffled: the same of a probe fitted to labels in random order.
        control: edits towards the class that holds.
        counterfactual: edits towards the next class, the other one of two.
    """

    probe: Share
    shuffled: Share
    control: Condition
    counterfactual: Condition

    @property
    def net_flips(self) -> float | None:
        """Flips of the counterfactual edit beyond those of the control; None without answers."""
        if self.counterfactual.flipped is None or self.control.flipped is None:
            return None
        return (self.counterfactual.flipped.value or 0.0) - (self.control.flipped.value or 0.0)

    @property
    def used(self) -> bool:
        """Whether the model uses the variable here, by the rule of the study of names.

        That is :data:`~lrqp_torch.study.flipping.USED_THRESHOLD`.
        """
        return self.net_flips is not None and self.net_flips >= USED_THRESHOLD

    @property
    def worst_log_odds_margin(self) -> float:
        """The worse of the two conditions' margins."""
        return min(c.worst_log_odds_margin for c in (self.control, self.counterfactual))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        return cls(
            Share.from_json(raw["probe"]),
            Share.from_json(raw["shuffled"]),
            *(Condition.from_json(raw[name]) for name in CONDITIONS),
        )


@dataclass(frozen=True)
class TaskResults:
    """Everything that a study of your own finds.

    Attributes:
        settings: what it was asked to do, with the seed.
        model: name, class, family, size and revision of the model.
        classes: names, in order.
        data: number of prompts to fit on (``train``) and held out (``test``).
        majority: accuracy of always naming the most frequent class, on the held-out prompts.
        answered: held-out prompts that the model answers with the class that holds, without an
            edit; None for a task without answers.
        preference: mean of the clean preference; None without answers.
        sites: results by site, in order of computation.
        used_sites: sites whose counterfactual edit flips enough answers more than the control.
        best_site: the site that flips most beyond its control, or without answers the one whose
            counterfactual edit changes the next token most beyond its control.
        versions: of Python and the packages that computed the results.
        elapsed: seconds spent in each stage.
        prompts: one number per held-out prompt, as :func:`~lrqp_torch.tasks.sweep.sweep` returns.
        texts: the held-out prompts.
        format: version of this layout.
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    classes: tuple[str, ...]
    data: dict[str, int]
    majority: float
    answered: Share | None
    preference: Mean | None
    sites: dict[str, TaskSite]
    used_sites: list[str]
    best_site: str
    versions: dict[str, str]
    elapsed: dict[str, float]
    prompts: dict[str, Tensor] = field(repr=False)
    texts: tuple[str, ...] = field(repr=False)
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        """Write ``results.json``, ``prompts.safetensors`` and ``prompts.json``.

        Raises:
            NonFiniteError: a figure is NaN or infinite.
            OutputError: a file cannot be written.
        """
        prepare_folder(folder)
        raw = {name: value for name, value in asdict(self).items() if name not in _BESIDE}
        try:
            text = json.dumps(raw, indent=2, allow_nan=False, ensure_ascii=False)
        except ValueError as error:
            raise NonFiniteError(
                "a result is NaN or infinite, so results.json was not written. The model's logits "
                "or an edited activation overflowed; try the model in float32"
            ) from error
        save_prompts(self.prompts, folder)
        with written_whole(folder / TEXTS_FILE) as path:
            path.write_text(json.dumps(self.texts, ensure_ascii=False, indent=1), encoding="utf-8")
        with written_whole(folder / RESULTS_FILE) as path:
            path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read back what :meth:`save` wrote.

        Raises:
            OutputError: a file is missing, unreadable or of another format.
        """
        prompts = load_prompts(folder)
        try:
            texts = json.loads((folder / TEXTS_FILE).read_text(encoding="utf-8"))
            raw = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise ValueError(f"format {raw['format']}, but this version reads {FORMAT}")
            raw |= {
                "classes": tuple(raw["classes"]),
                "answered": raw["answered"] and Share.from_json(raw["answered"]),
                "preference": raw["preference"] and Mean.from_json(raw["preference"]),
                "sites": {name: TaskSite.from_json(site) for name, site in raw["sites"].items()},
            }
            return cls(**raw, prompts=prompts, texts=tuple(texts))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"cannot read the results in {str(folder)!r}: {error}. Run `lrqp study` with "
                f"--out set to this folder to write them anew"
            ) from error


_BESIDE = ("prompts", "texts")


def columns_of(flat: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The per-prompt tensors whose names begin with ``prefix`` and a dot, without it."""
    start = f"{prefix}."
    return {name[len(start) :]: v for name, v in flat.items() if name.startswith(start)}


def strongest(sites: Mapping[str, TaskSite]) -> str:
    """The site that flips most beyond its control, then the one that changes most beyond it."""

    def strength(name: str) -> tuple[float, float]:
        site = sites[name]
        change = site.counterfactual.divergence.value - site.control.divergence.value
        return site.net_flips or 0.0, change

    return max(sites, key=strength)
