"""What is known beforehand: where a model uses the order of the names, and what was published.

The published figures are of GPT-2 small on indirect objects, to set beside a run's own. Sources:

* Wang et al. 2022, *Interpretability in the Wild: a Circuit for Indirect Object Identification
  in GPT-2 small*, arXiv 2211.00593.
* Makelov, Lange, Nanda 2023, *Is This the Subspace You Are Looking for?*, arXiv 2311.17030.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrqp_torch.errors import ModelError
from lrqp_torch.models.organisms import GROUND_TRUTH, ORGANISMS, organism_folder

USED, NOT_USED, UNCLEAR = "used", "not used", "unclear"


@dataclass(frozen=True)
class GroundTruth:
    """Where a model was trained to use the class, beside the sites that the study found."""

    used_sites: list[str]  # the true ones among the sites swept
    unclear_sites: list[str]  # sites swept at which the truth is neither; they are not compared
    agrees: bool  # whether the study's `used_sites`, but for the unclear ones, are exactly these


@dataclass(frozen=True)
class KnownSites:
    """Where a model is known to use the order of the names at S2."""

    # Sites at which exchanging the order between two prompts changes the answer.
    used_at: frozenset[str]
    unclear_at: frozenset[str]  # sites at which it does so for some prompts

    def at(self, site: str) -> str:
        """:data:`USED`, :data:`NOT_USED` or :data:`UNCLEAR`."""
        if site in self.unclear_at:
            return UNCLEAR
        return USED if site in self.used_at else NOT_USED

    def compare(self, swept: Sequence[str], used: Sequence[str]) -> GroundTruth:
        """Compare the sites ``used`` with the true ones in ``swept``, unclear ones left out."""
        true_sites = [site for site in swept if site in self.used_at]
        found = [site for site in used if site not in self.unclear_at]
        return GroundTruth(
            used_sites=true_sites,
            unclear_sites=[site for site in swept if site in self.unclear_at],
            agrees=found == true_sites,
        )


def read_truth(name: str) -> KnownSites | None:
    """The known sites of a model, from the ``ground_truth.json`` beside its weights.

    ``name`` is a bundled organism, such as ``organism``, or a model's folder; None for a model
    without such a file. Raises ModelError: the file is damaged.
    """
    folder = organism_folder(name) if name in ORGANISMS else Path(name)
    file = folder / GROUND_TRUTH
    if not file.is_file():
        return None
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return KnownSites(frozenset(raw["used_at"]), frozenset(raw["unclear_at"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the file {str(file)!r} is damaged ({type(error).__name__}: {error}): it must hold "
            "lists used_at and unclear_at. Make it again with the model, or remove it."
        ) from error


# ---- published -----------------------------------------------------------------------------------

WANG = "Wang et al. 2022, arXiv 2211.00593"
MAKELOV = "Makelov et al. 2023, arXiv 2311.17030"


@dataclass(frozen=True)
class PublishedFigure:
    """One published number."""

    quantity: str  # what was measured, in words
    value: float  # the number; shares and probabilities lie between 0 and 1, the rest are logits
    source: str  # authors, year and arXiv number


_MEAN, _PATCHED = "mean logit difference", "mean logit difference, S-inhibition outputs patched"
_FULL, _ADDED = "full patch at END after layer 8", "mean difference ABB − BAB at END after layer 8"
_WANG = {
    "logit_difference": (f"{_MEAN} IO − S", 3.56),
    "accuracy": ("share of prompts with IO above S", 0.993),
    "io_probability": ("mean probability of IO", 0.49),
    "logit_difference_long_prefix": (
        f"{_MEAN}, S-inhibition heads patched from sentences with a longer prefix", 3.57
    ),
    "inhibition_patched": (f"{_PATCHED}, both signals kept", 3.55),
    "position_inverted": (f"{_PATCHED}, position signal inverted", -0.99),
    "position_and_token_inverted": (f"{_PATCHED}, both signals inverted", -3.16),
}  # fmt: skip
_MAKELOV = {
    "logit_difference_makelov": (f"{_MEAN} on their prompts, no edit", 3.364),
    "full_patch": (f"{_MEAN}, {_FULL}", -0.723),
    "full_patch_flipped": (f"share of answers flipped, {_FULL}", 0.544),
    "mean_difference": (f"{_MEAN}, {_ADDED}", -0.650),
    "mean_difference_flipped": (f"share of answers flipped, {_ADDED}", 0.523),
}
PUBLISHED = {
    key: PublishedFigure(*figure, source)
    for source, figures in ((WANG, _WANG), (MAKELOV, _MAKELOV))
    for key, figure in figures.items()
}
"""Published figures of GPT-2 small, by a short key."""
