"""A study context on the bundled organism, small enough for tests."""

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from lrqp_torch import models
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.study.context import StudyContext, Task
from lrqp_torch.study.indirect_objects import IOIPrompts

TRAIN, TEST = 240, 120
SITES = ["L0.pre", "L1.mid", "L2.pre", "L3.mid", "L4.pre"]


@cache
def task(name: str) -> Task:
    tokenizer = models.load("organism")[1]
    data = IOIPrompts.of(
        IOIDataset.generate(
            tokenizer,
            TRAIN + TEST,
            3,
            "bundled" if name == "prefixed" else None,
            padding_side="left",
        )
    )
    return Task(name, data[:TRAIN], data[TRAIN:])


@cache
def organism() -> Any:
    return models.load("organism")[0]


def context(name: str = "prefixed", other: str | None = "plain") -> StudyContext:
    return StudyContext(
        model=organism(),
        task=task(name),
        other_task=None if other is None else task(other),
        sites=list(SITES),
        batch_size=50,
        seed=0,
        device=torch.device("cpu"),
    )


class Count:
    """An ``advance`` that adds up."""

    def __init__(self) -> None:
        self.total, self.calls = 0, 0

    def __call__(self, done: int) -> None:
        assert done >= 0
        self.total += done
        self.calls += 1


def check_part(module: Any, result: Any, folder: Path) -> None:
    """What every part promises: strict JSON and back, figures that open, and clear panels."""
    import json

    text = json.dumps(asdict(result), allow_nan=False)
    assert module.from_json(json.loads(text)) == result

    paths = module.draw(result, folder)
    assert len(set(paths)) == len(paths) > 0
    assert {path.suffix for path in paths} == {".png", ".svg"}
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")

    shown = module.panels(result)
    assert len({panel.name for panel in shown}) == len(shown) > 0
    for panel in shown:
        assert panel.title and panel.text and panel.figures
        assert bool(panel.choice) == (len(panel.figures) > 1)
        for figure in panel.figures.values():
            layout = json.loads(figure.to_json())["layout"]
            assert layout["paper_bgcolor"] == layout["plot_bgcolor"] == "rgba(0,0,0,0)"
            assert layout["template"] == {} or "layout" not in layout["template"]
            assert any(len(trace.x) for trace in figure.data)
        if panel.table is not None:
            assert panel.table.rows
            assert {len(row) for row in panel.table.rows} == {len(panel.table.columns)}
