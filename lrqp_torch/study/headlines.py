"""What the parts of the study found, for the summary at the head of the report."""

from lrqp_torch.study.parts import find_part
from lrqp_torch.study.results import StudyResults


def headlines(results: StudyResults) -> list[str]:
    """What the parts found, for those parts that ran and found something to tell."""
    lines: list[str] = []
    for name in ("geometry", "dose", "circuit", "mediation"):
        if name in results.parts:
            part = find_part(name)
            lines += part.says(part.read(results.parts[name]))
    return lines
