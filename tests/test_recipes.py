"""The recipes beside other libraries: each runs where its library is, as its page says."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"


def blocks() -> list[tuple[str, str, str]]:
    """Heading, needed package or nothing, and code of each block."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = []
    for heading, text in zip(["", *parts[1::2]], parts[::2], strict=True):
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            needs = re.match(r"# needs (\w+)", code)
            found.append((heading, needs[1] if needs else "", code))
    return found


FIRST, *RECIPES = blocks()


def test_every_recipe_is_there() -> None:
    headings = PAGE.read_text(encoding="utf-8")
    for name in ("Plain PyTorch", "TransformerLens", "nnsight", "PEFT", "vLLM"):
        assert f"\n## {name}\n" in headings
    for name in ("steering-vectors", "pyvene", "scikit-learn"):
        assert f"\n## Coming from {name}\n" in headings
    assert len(RECIPES) == 11


@pytest.fixture(autouse=True)
def gradients() -> object:
    yield
    torch.set_grad_enabled(True)


@pytest.mark.parametrize(("heading", "needs", "code"), RECIPES)
@pytest.mark.filterwarnings("ignore")
def test_a_recipe_gives_the_logits_of_the_edit(
    heading: str, needs: str, code: str, tmp_path: Path
) -> None:
    if needs and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    file = tmp_path / "recipe.py"  # one library reads the source of what it traces
    file.write_text(f"{FIRST[2]}\n{code}", encoding="utf-8")
    names = runpy.run_path(str(file))
    if "logits" in names:
        torch.testing.assert_close(names["logits"], names["expected"], rtol=1e-4, atol=1e-4)
    if heading == "vLLM":
        said = names["expected"].log_softmax(-1)
        torch.testing.assert_close(names["found"], said, rtol=1e-4, atol=2e-4)
    if heading == "TransformerLens":
        assert float((names["of_bridge"] - names["of_stream"]).abs().max()) > 0.1
    if heading == "Coming from scikit-learn":
        assert (
            float(names["probe"].accuracy(names["x"]["L3.pre"], names["train"].labels["abb"]))
            > 0.95
        )
