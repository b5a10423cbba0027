"""The tutorial and the notebooks run from top to bottom, and find what their texts say."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[str]:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_page(page: str) -> dict[str, Any]:
    """What the blocks leave behind, run in order in one session."""
    session: dict[str, Any] = {}
    for number, block in enumerate(blocks(page), start=1):
        exec(compile(block, f"{page}, block {number}", "exec"), session)
    return session


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    assert len(blocks("tutorial")) == 10
    return run_page("tutorial")


def share(names: dict[str, Any], edited: torch.Tensor) -> float:
    clean = names["clean"]
    return float(((clean > 0) & (edited < 0)).float().mean())


def test_the_model_answers_and_the_probe_reads(names: dict[str, Any]) -> None:
    assert float((names["clean"] > 0).float().mean()) > 0.97
    late = names["sites"][names["sites"].index("L1.mid") :]
    assert min(names["accuracy"][site] for site in late) > 0.95


def test_the_edit_flips_where_the_order_is_used_and_only_there(names: dict[str, Any]) -> None:
    assert share(names, names["counterfactual"]) > 0.8
    assert share(names, names["control"]) < 0.02
    assert share(names, names["unmoved"]) < 0.02


def test_the_margin_is_never_negative(names: dict[str, Any]) -> None:
    solution = names["solution"]
    assert bool((solution.log_odds_after >= solution.floor).all())


def test_a_kept_belief_does_not_move(names: dict[str, Any]) -> None:
    assert float(names["kept_move"].abs().max()) < 1e-3
    assert float(names["free_move"].abs().max()) > 100 * float(names["kept_move"].abs().max())


def test_generation_follows_the_edit(names: dict[str, Any]) -> None:
    told = names["told"][:, -1]
    assert torch.equal(told, names["few"].s_tokens)


def test_the_saved_edit_is_the_same(names: dict[str, Any]) -> None:
    x = names["held_out"]["L2.mid"]
    assert torch.equal(names["again"](x, 1), names["edit"](x, 1))
    assert names["again"].provenance.variable == "order of the names"


def test_a_task_of_ones_own_takes_ten_minutes() -> None:
    names = run_page("own_task")
    assert names["results"].used_sites == ["L1.mid", "L2.pre", "L2.mid", "L3.pre"]
    assert (names["folder"] / "scatter.png").stat().st_size > 10_000
    run = names["run"]
    assert bool((run.log_odds_after >= run.floor).all())


@pytest.fixture(scope="module")
def notebooks() -> Any:
    for package in ("nbformat", "nbclient", "ipykernel"):
        pytest.importorskip(package, reason="notebooks need nbclient and ipykernel")
    spec = importlib.util.spec_from_file_location("notebooks", DOCS / "notebooks" / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["tutorial", "own_task"])
def test_a_notebook_is_its_page_and_keeps_its_outputs(page: str) -> None:
    kept = json.loads((DOCS / "notebooks" / f"{page}.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in kept["cells"] if cell["cell_type"] == "code"]
    assert ["".join(cell["source"]) for cell in code] == [block.strip() for block in blocks(page)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    shown = {kind for output in outputs for kind in output.get("data", {"text": 0})}
    assert shown >= ({"image/png", "text/html", "text"} if page == "own_task" else {"text"})
    assert str(Path.home()) not in json.dumps(kept) and str(DOCS.parent) not in json.dumps(kept)


def test_a_notebook_runs_as_it_is_kept(notebooks: Any, tmp_path: Path) -> None:
    page = notebooks.made_of(DOCS / "own_task.md")
    ran = notebooks.run(page, tmp_path)
    said = [o.text for cell in ran.cells for o in cell.get("outputs", []) if "text" in o]
    assert any("used at ['L1.mid'" in text for text in said)
