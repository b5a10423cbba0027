"""Comparing the sites that a study finds with those that a model is known to use."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrqp_torch.errors import ModelError
from lrqp_torch.models.organisms import GROUND_TRUTH, ORGANISMS, organism_folder
from lrqp_torch.study.results import GroundTruth


@dataclass(frozen=True)
class KnownSites:
    """Where a model is known to use the order of the names at S2.

    Attributes:
        used_at: sites at which exchanging the order between two prompts changes the answer.
        unclear_at: sites at which it does so for some prompts.
    """

    used_at: frozenset[str]
    unclear_at: frozenset[str]

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

    Args:
        name: A bundled organism, such as ``organism``, or a model's folder.

    Returns:
        The sites, or ``None`` for a model without such a file.

    Raises:
        ModelError: the file is damaged.
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
