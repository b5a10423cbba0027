"""The README's example runs as printed, and does what the text around it says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lrqp_torch as lrqp
from lrqp_torch.models import load

ROOT = Path(__file__).parents[1]
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def run_example(page: Path, names: dict[str, Any]) -> dict[str, Any]:
    """Run the first example of a page, and return the names that it leaves."""
    examples = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(examples[0], str(page), "exec"), names)
    return names


def test_the_example_on_other_texts_runs() -> None:
    model, tokenizer = load("organism")
    texts = ["the dog and the book", "a ring", "the store and the book to", "a dog"]
    given = {"lrqp": lrqp, "model": model, "tokenizer": tokenizer, "texts": texts}
    given |= {"labels": torch.tensor([0, 1, 2, 1]), "direction": torch.ones(128)}
    names = run_example(GUIDE, given)
    assert names["edit"].probe.n_classes == 3
    assert names["last"].tolist() == [4, 1, 5, 1]


def test_the_example_flips_answers_as_the_readme_says() -> None:
    names = run_example(README, {})
    run, test, model = names["run"], names["test"], names["model"]
    assert bool((run.log_odds_after >= 10).all())
    assert bool((run.odds_before < run.odds_after).all())
    rows = torch.arange(len(test))
    with torch.no_grad():
        clean = model(**test.inputs).logits[rows, test.positions["END"]]

    def difference(logits: torch.Tensor) -> torch.Tensor:
        return logits[rows, test.io_tokens] - logits[rows, test.s_tokens]

    assert float((difference(clean) > 0).float().mean()) > 0.95
    assert float((difference(names["logits"]) < 0).float().mean()) > 0.8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_shows_its_figure_and_every_room() -> None:
    text = README.read_text(encoding="utf-8")
    assert "](docs/sweep.png)" in text
    rooms = [path.parent.name for path in (ROOT / "lrqp_torch").glob("*/__init__.py")]
    assert [room for room in rooms if f"`{room}/`" not in text] == []
