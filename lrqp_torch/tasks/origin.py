"""What a saved edit knows about itself: its site, position and classes."""

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.provenance import Provenance
from lrqp_torch.errors import ProvenanceError


def origin_of(edit: LRQP) -> Provenance:
    """Where an edit comes from.

    Raises:
        ProvenanceError: it does not say, or not which classes its probe reads.
    """
    origin = edit.provenance
    if origin is None:
        raise ProvenanceError(
            "this edit does not say which site and classes it was fitted for; fit it with "
            "`lrqp fit`, or use edit.at(...) in Python"
        )
    if origin.classes is None or len(origin.classes) != edit.probe.n_classes:
        raise ProvenanceError(
            f"this edit names the classes {origin.classes}, and its probe reads "
            f"{edit.probe.n_classes}; fit it with `lrqp fit`, or use edit.at(...) in Python"
        )
    return origin
