"""``lrqp doctor``: it tries things, and says so when they fail."""

from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from lrqp_torch.cli import app
from lrqp_torch.cli import doctor_checks as doctor
from lrqp_torch.errors import SolverError
from lrqp_torch.qp import MahalanobisQP, Solution


def run() -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout


def test_everything_needed_works_here() -> None:
    code, text = run()
    assert code == 0, text
    for word in ("torch", "cpu", "ACTIVE_SET", "DIFFCP", "plots", "of the answers turned"):
        assert word in text
    assert "pip install 'lrqp_torch[" in text or "no  datasets" not in text


def test_a_solver_that_gives_something_else_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MahalanobisQP.forward

    def wrong(self: MahalanobisQP, *given: Any) -> Solution:
        solution = right(self, *given)
        shift = 0.01 if self.solver_name == "DIFFCP" else 0.0
        return replace(solution, x_new=solution.x_new + shift)

    monkeypatch.setattr(MahalanobisQP, "forward", wrong)
    found = {finding.name: finding for finding in doctor._solvers()}
    assert found["ACTIVE_SET"].usable and not found["DIFFCP"].usable


def test_a_broken_engine_is_named_and_ends_with_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **options: object) -> None:
        raise SolverError("nothing solves here")

    monkeypatch.setattr("lrqp_torch.edits.lrqp.LRQP.solve", broken)
    code, text = run()
    assert code == 1
    assert "nothing solves here" in text and "Broken: an edit of the bundled model" in text


def test_extras_are_those_of_the_package() -> None:
    names = {finding.name for finding in doctor._extras()}
    assert {"plots", "report", "gguf", "dev"} <= names
