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


PUBLISHED: dict[str, PublishedFigure] = {
    "logit_difference": PublishedFigure("mean logit difference IO − S", 3.56, WANG),
    "accuracy": PublishedFigure("share of prompts with IO above S", 0.993, WANG),
    "io_probability": PublishedFigure("mean probability of IO", 0.49, WANG),
    "logit_difference_long_prefix": PublishedFigure(
        "mean logit difference, S-inhibition heads patched from sentences with a longer prefix",
        3.57,
        WANG,
    ),
    "inhibition_patched": PublishedFigure(
        "mean logit difference, S-inhibition outputs patched, both signals kept", 3.55, WANG
    ),
    "position_inverted": PublishedFigure(
        "mean logit difference, S-inhibition outputs patched, position signal inverted", -0.99, WANG
    ),
    "position_and_token_inverted": PublishedFigure(
        "mean logit difference, S-inhibition outputs patched, both signals inverted", -3.16, WANG
    ),
    "logit_difference_makelov": PublishedFigure(
        "mean logit difference on their prompts, no edit", 3.364, MAKELOV
    ),
    "full_patch": PublishedFigure(
        "mean logit difference, full patch at END after layer 8", -0.723, MAKELOV
    ),
    "full_patch_flipped": PublishedFigure(
        "share of answers flipped, full patch at END after layer 8", 0.544, MAKELOV
    ),
    "mean_difference": PublishedFigure(
        "mean logit difference, mean difference ABB − BAB at END after layer 8", -0.650, MAKELOV
    ),
    "mean_difference_flipped": PublishedFigure(
        "share of answers flipped, mean difference ABB − BAB at END after layer 8", 0.523, MAKELOV
    ),
}
"""Published figures of GPT-2 small, by a short key."""
