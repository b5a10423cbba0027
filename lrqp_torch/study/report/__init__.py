"""The report of a study: one page of its parts, and the short summary on the terminal."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from lrqp_torch.study.part import Part
from lrqp_torch.study.parts import PARTS, find_part
from lrqp_torch.study.report.page import REPORT_FILE, Chapter, lead, require_plotly, write_page
from lrqp_torch.study.report.terminal import command, key_figures, print_study
from lrqp_torch.study.results import StudyResults
from lrqp_torch.study.showing import said

__all__ = ["REPORT_FILE", "print_summary", "require_plotly", "write_report"]


def write_report(path: Path, results: StudyResults) -> None:
    """Write the report of a study as one self-contained HTML file, whole or not at all.

    The folder is named as given here in the command that the report shows.

    Raises:
        MissingExtraError: plotly is not installed.
        OutputError: the file cannot be written.
    """
    # What the first screen says is not said again.
    chapters = [
        Chapter(
            part.title,
            part.question,
            [] if part.overview(result) else part.says(result),
            part.panels(result),
        )
        for part, result in _found(results)
    ]
    write_page(path, chapters, **about(results, path.parent))


def about(results: StudyResults, folder: Path) -> dict[str, Any]:
    """What a study's report, which lies in a folder, says before and behind its chapters."""
    title, subtitle, question = (
        "\n\n".join(said("study", what, results=results))
        for what in ("title", "subtitle", "question")
    )
    return {
        "title": title,
        "subtitle": subtitle,  # model and data in a line
        "question": question,  # what the study asks, for a reader who has not met the task
        # The charts that answer it, side by side; key figures; answers of one sentence.
        "panels": [panel for part, result in _found(results) for panel in part.overview(result)],
        "tiles": key_figures(results),
        "says": _says(results),
        "command": command(results, folder),
        # What the numbers depend on, as name and value.
        "tables": {
            "Settings": results.settings,
            "Model": results.model,
            "Versions": results.versions,
            "Seconds": {stage: f"{time:.1f}" for stage, time in results.elapsed.items()},
        },
    }


def print_summary(results: StudyResults, console: Console, *, whole: bool = False) -> None:
    """Print the key figures, the sweep, and what each part found; ``whole`` leaves nothing out."""
    print_study(results, _says(results, whole=whole), console, whole=whole)


def _found(results: StudyResults) -> Iterator[tuple[Part[Any], Any]]:
    """Every part that ran, with its result."""
    for part in map(find_part, PARTS):
        result = part.found(results)
        if result is not None:
            yield part, result


def _says(results: StudyResults, *, whole: bool = False) -> list[str]:
    """All that the sweep says, and the beginning of what every other part does, or all of it."""
    lines: list[str] = []
    for part, result in _found(results):
        says = list(part.says(result))
        if part.overview(result):
            lines += says
        elif says:
            mark = "" if part.title.endswith("?") else ":"
            lines.append(f"{part.title}{mark} {says[0] if whole else lead(says[0], most=1)[0]}")
            lines += says[1:] if whole else []
    return lines
