"""``import lrqp_torch`` and ``lrqp --help`` load what they need, and every public name is there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lrqp_torch


def loaded_by(program: str) -> set[str]:
    """The modules that a fresh interpreter has after a program."""
    code = f"{program}\nimport sys\nprint('\\n' + ' '.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return set(result.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_no_library() -> None:
    modules = loaded_by("import lrqp_torch; assert 'LRQP' in dir(lrqp_torch)")
    assert not modules & {"torch", "transformers", "cvxpy", "cvxpylayers", "numpy", "rich"}
    assert {name for name in modules if name.startswith("lrqp_torch")} == {"lrqp_torch"}


@pytest.mark.parametrize("command", ["", "reproduce", "compare", "fit", "study", "doctor"])
def test_the_help_of_a_command_loads_no_library(command: str) -> None:
    modules = loaded_by(
        f"import sys; sys.argv = ['lrqp', {command!r}, '--help']\n"
        "sys.argv = [word for word in sys.argv if word]\n"
        "from lrqp_torch.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass"
    )
    assert "lrqp_torch.cli.app" in modules
    assert not modules & {"torch", "transformers", "cvxpy", "cvxpylayers", "numpy"}


def test_models_are_asked_for_before_what_loads_them_is() -> None:
    modules = loaded_by("from lrqp_torch.models import load; from lrqp_torch.ioi import IOIDataset")
    assert not modules & {"transformers.modeling_utils", "cvxpy", "huggingface_hub"}


def test_what_is_not_asked_for_is_not_loaded() -> None:
    """cvxpy belongs to constraints of one's own and to its layers, transformers to models."""
    names = ", ".join(name for name in lrqp_torch.__all__ if name != "ConstrainedLRQP")
    modules = loaded_by(f"from lrqp_torch import {names}")
    assert "torch" in modules
    assert not modules & {"cvxpy", "cvxpylayers", "transformers", "matplotlib", "plotly"}


def test_type_checkers_see_the_names_that_are_imported_at_run_time() -> None:
    tree = ast.parse(Path(str(lrqp_torch.__file__)).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == sorted(lrqp_torch.__all__)
    for name, module in seen.items():
        assert module is not None
        home = __import__(module, fromlist=[name])
        assert getattr(lrqp_torch, name) is getattr(home, name), name


def test_rooms_are_attributes_and_other_names_are_not() -> None:
    code = "import lrqp_torch; print(lrqp_torch.baselines.build, lrqp_torch.errors.LRQPError)"
    assert "lrqp_torch.baselines" in loaded_by(code)
    assert not hasattr(lrqp_torch, "no_such_name")


def test_the_stream_loads_what_a_model_needs_only_with_a_model() -> None:
    modules = loaded_by(
        "import lrqp_torch as lrqp; lrqp.LRQP, lrqp.capture, lrqp.intervene, lrqp.capture_to\n"
        "import lrqp_torch.stream.replay, lrqp_torch.stream.attention"
    )
    assert "torch" in modules
    assert not modules & {"transformers", "cvxpy", "rich", "torch._dynamo"}


def test_rooms_are_found_by_their_names() -> None:
    for room in ("tasks", "plot", "ioi", "models", "baselines", "learn", "sensitivity"):
        assert lrqp_torch.__getattr__(room).__name__ == f"lrqp_torch.{room}"
        assert room in dir(lrqp_torch)
