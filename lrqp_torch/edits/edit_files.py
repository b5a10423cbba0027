"""An LRQP edit as the content of a saved edit, and back."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lrqp_torch.edits.card import CARD_FILE, model_card
from lrqp_torch.edits.saving import JSON_FILE, load_edit, save_edit
from lrqp_torch.errors import LRQPError, OutputError, SavedEditError, SolverError
from lrqp_torch.files import written_whole
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.qp.external import SOLVERS

if TYPE_CHECKING:
    from lrqp_torch.edits.lrqp import LRQP

Edit = TypeVar("Edit", bound="LRQP")

INDEX_FILE = "library.json"
"""Tells a folder of several edits from that of one, which has ``edit.json``."""


def require_one_kind(folder: Path, several: bool) -> None:
    """Refuse to write an edit into a library's folder, or a library into an edit's.

    Of a folder with both, a reader could find only one.

    Args:
        folder: to write to.
        several: whether a library is to be written.

    Raises:
        OutputError: the folder holds the other kind.
    """
    # Unlike Path.exists, this is no error where nobody may look; writing will name that.
    if os.path.exists(folder / (JSON_FILE if several else INDEX_FILE)):
        kinds = ("an edit", "a library of edits")
        raise OutputError(
            f"{str(folder)!r} holds {kinds[not several]}, beside which {kinds[several]} could not "
            f"be told apart; choose another folder (on the command line with --out)"
        )


def write_edit(edit: "LRQP", path: str | Path, notes: dict[str, Any]) -> Path:
    """Write an edit to a folder; see :meth:`LRQP.save`."""
    require_one_kind(Path(path), several=False)
    options = {name: getattr(edit, name) for name in ("rule", "odds", "on_infeasible")}
    options |= {"solver": edit.qp.solver_name, "solver_args": edit.qp.solver_args}
    facts = {
        "n_classes": edit.probe.n_classes,
        "width": edit.probe.width,
        "shrinkage": edit.metric.shrinkage,
        "n_samples": edit.metric.n_samples,
    }
    notes = {**edit.notes, **notes}
    folder = save_edit(path, edit.state_dict(), options, notes, facts, edit.provenance)
    figures: dict[str, Any] = {
        "classes_of_the_probe": edit.probe.n_classes,
        "width": edit.probe.width,
    }
    figures |= {"least_log_odds": float(edit.log_odds), "rule": edit.rule, "odds": edit.odds}
    figures |= {"shrinkage": edit.metric.shrinkage, "samples": edit.metric.n_samples}
    with written_whole(folder / CARD_FILE) as partial:
        partial.write_text(model_card(folder.name, figures, edit.provenance), encoding="utf-8")
    return folder


def read_edit(cls: "type[Edit]", path: str | Path) -> "Edit":
    """Read an edit of class ``cls`` from a folder; see :meth:`LRQP.load`."""
    saved = load_edit(path)
    tensors = saved.tensors
    weight = tensors["probe.weight"]
    probe = LinearProbe(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    probe.requires_grad_(False)
    probe.weight.copy_(weight)
    probe.bias.copy_(tensors["probe.bias"])
    try:
        metric = Mahalanobis(
            tensors["metric.covariance"],
            tensors.get("metric.mean"),
            shrinkage=saved.facts["shrinkage"],
            n_samples=saved.facts["n_samples"],
            kept=tensors.get("metric.kept"),
        )
        edit = cls(probe, metric, log_odds=float(tensors["log_odds"]), **saved.options)
    except LRQPError as error:
        if isinstance(error, SolverError) and saved.options["solver"] in SOLVERS:
            raise
        raise SavedEditError(f"{path} does not hold a valid edit: {error}") from error
    edit.notes, edit.provenance = saved.notes, saved.provenance
    return edit
