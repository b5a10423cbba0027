"""The tutorial runs from top to bottom, and finds what its text says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the blocks leave behind, run in order in one session."""
    blocks = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 10
    session: dict[str, Any] = {}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{TUTORIAL.name}, block {number}", "exec"), session)
    return session


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
