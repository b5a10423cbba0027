"""``lrqp doctor``: it tries things, and says so when they fail."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families_for_tests import build_family
from typer.testing import CliRunner

from lrqp_torch import models
from lrqp_torch.cli import app
from lrqp_torch.cli import doctor_checks as doctor
from lrqp_torch.errors import SolverError
from lrqp_torch.qp import MahalanobisQP, Solution
from lrqp_torch.stream import TESTED_TRANSFORMERS


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout


def test_everything_needed_works_here() -> None:
    code, text = run()
    assert code == 0, text
    for word in ("torch", "cpu", "ACTIVE_SET", "DIFFCP", "plots", "of the answers turned"):
        assert word in text
    for check in ("capture", "an edit of the bundled model", "replay", "generation"):
        assert f"yes  {check}" in text
    assert f"to {TESTED_TRANSFORMERS[-1]}" in text
    assert "pip install 'lrqp_torch[" in text or "no  datasets" not in text
    for heading in ("Versions (needed)", "Extras (optional)", "Self-check (needed)"):
        assert heading in text
    for line in text.splitlines():
        assert "moreau" not in line or "moreau" in line.lower().split()[1]  # advice at its line


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
    assert "nothing solves here" in text
    assert "Broken: an edit of the bundled model, replay, generation." in text


def test_a_newer_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = doctor.package_versions() | {"transformers": "99.0.0"}
    monkeypatch.setattr(doctor, "package_versions", lambda: versions)
    (found,) = (finding for finding in doctor._versions() if finding.name == "transformers")
    assert found.usable and "newer than what was tested" in found.detail


def test_the_sites_of_a_model_are_shown_or_why_they_are_not(tmp_path: Path) -> None:
    (found,) = doctor._sites("organism")
    assert (found.name, found.usable) == ("L0.mid to L5.mid", True)
    assert "the output of 'attn'; proven" in found.detail
    model = build_family("gpt_neox_parallel")
    model.save_pretrained(tmp_path)
    models.load("organism")[1].save_pretrained(tmp_path)
    (found,) = doctor._sites(str(tmp_path))
    assert not found.usable and "parallel" in found.detail
    (found,) = doctor._sites(str(tmp_path / "none"))
    assert not found.usable and found.required and "ModelError" in found.detail


def test_extras_are_those_of_the_package() -> None:
    names = {finding.name for finding in doctor._extras()}
    assert {"plots", "report", "gguf", "dev"} <= names
