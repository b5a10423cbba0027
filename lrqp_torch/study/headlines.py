"""One sentence for each part of the study, for the summary at the head of the report."""

from collections.abc import Callable
from typing import Any

from lrqp_torch.study import circuit, mediation
from lrqp_torch.study.parts import find_part
from lrqp_torch.study.results import StudyResults
from lrqp_torch.study.summary import percent


def headlines(results: StudyResults) -> list[str]:
    """What the parts found, for those parts that ran and found something to tell."""
    tellers: dict[str, Callable[[dict[str, Any]], str | None]] = {
        "geometry": _said("geometry"),
        "dose": _said("dose"),
        "circuit": _circuit,
        "mediation": _mediation,
    }
    lines = [tell(results.parts[name]) for name, tell in tellers.items() if name in results.parts]
    return [line for line in lines if line is not None]


def _said(name: str) -> Callable[[dict[str, Any]], str | None]:
    part = find_part(name)
    return lambda raw: " ".join(part.says(part.read(raw))) or None


def _circuit(raw: dict[str, Any]) -> str | None:
    result = circuit.from_json(raw)
    for probe in result.probes:
        if probe.head == circuit.ALL and probe.condition == "counterfactual":
            return (
                "Circuit: read from the outputs of the S-inhibition heads, the order is the one "
                f"that the counterfactual edit wrote in {percent(probe.reports)} of the prompts."
            )
    return None


def _mediation(raw: dict[str, Any]) -> str | None:
    result = mediation.from_json(raw)
    for group in result.groups:
        if group.restored is not None and group.induced is not None and group.heads:
            return (
                f"Mediation: putting only the attention from END of {_heads(group.heads)} "
                f"({group.group}) back to the clean run's undoes "
                f"{percent(group.restored.value, digits=0)} of the edit's effect; putting their "
                "attention under the edit into a clean run brings about "
                f"{percent(group.induced.value, digits=0)} of it."
            )
    return None


def _heads(heads: list[str]) -> str:
    return f"{len(heads)} head{'' if len(heads) == 1 else 's'}"
