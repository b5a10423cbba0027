"""The study's output folder: made for a run, and cleared of what an earlier run left in it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lrqp_torch.errors import LRQPError, OutputError
from lrqp_torch.files import prepare_folder
from lrqp_torch.study.drawing import FORMATS
from lrqp_torch.study.html import REPORT_FILE
from lrqp_torch.study.prompt_texts import TEXTS_FILE
from lrqp_torch.study.results import PROMPTS_FILE, RESULTS_FILE

FIGURES = (
    "sweep",
    "histogram",
    "scatter",
    "geometry_sites_plain",
    "geometry_sites_prefixed",
    "geometry_best",
    "geometry_by_site",
    "probing_S2",
    "probing_END",
    "dose",
    "heads",
    "circuit_probes",
    "circuit_attention",
    "mediation",
    "compare_pareto",
    "compare_table",
    "compare_equal_effect",
    "controls_splits",
    "controls_sites",
    "controls_chance",
)
"""Every figure that the study's parts can draw, without the ending."""


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make ``folder`` for a run, and remove it again if the run is refused before it writes.

    Folders that were there before, and those that hold anything, are kept.

    Raises:
        OutputError: it cannot be created, is not a folder, or refuses a file.
    """
    # Unlike Path.exists, this is False and no error where nobody may look.
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        prepare_folder(folder)
        yield
    except LRQPError:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def forget(folder: Path) -> None:
    """Remove every file that a study writes, so that new files never stand beside old ones.

    Only names that the study itself gives are removed; the parts are in
    :class:`~lrqp_torch.study.store.PartStore`.

    Raises:
        OutputError: a file cannot be removed.
    """
    figures = [f"{name}.{suffix}" for name in FIGURES for suffix in FORMATS]
    for name in (RESULTS_FILE, PROMPTS_FILE, TEXTS_FILE, REPORT_FILE, *figures):
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot remove {str(folder / name)!r}: {error.strerror}.") from error
