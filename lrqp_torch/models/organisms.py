"""The bundled organisms: small models of which it is known where they use the order at S2."""

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

ORGANISMS: Final = {
    "organism": "used",
    "organism-present": "present",
    "organism-absent": "absent",
    "organism-dormant": "dormant",
    "organism-graded": "graded",
    "organism-spread": "spread",
}
"""Names of the bundled organisms, which are those of their folders, and what the order is there.

``used``: the answer follows the order of the names that S2 holds. ``present``: a linear probe reads
the order at S2, but the answer does not depend on it. ``absent``: no linear probe reads it there.
``dormant``: present, and not used, but along one direction, which activations do not take, the
answer could be driven: an illusion for edits that are trained on the answer. ``graded``: used in
the prompts with certain verbs, 3 in 10, and in the others not. ``spread``: used, from a site on in
part at S2 and in part at the token behind it. The last two come with the sources alone, not with an
installed package.
"""
GROUND_TRUTH: Final = "ground_truth.json"
"""The file beside an organism's weights that says where it uses the order."""


def organisms_here() -> list[str]:
    """Those of :data:`ORGANISMS` whose weights are here."""
    return [name for name in ORGANISMS if (organism_folder(name) / "model.safetensors").is_file()]


def organism_folder(name: str) -> Traversable:
    """The folder of a bundled organism: weights, tokenizer and ground truth.

    Args:
        name: One of :data:`ORGANISMS`.

    Returns:
        The folder, within the installed package.
    """
    return files("lrqp_torch.models") / name
