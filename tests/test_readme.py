"""The README's example runs as printed, and does what the text around it says."""

import re
from pathlib import Path
from typing import Any

import torch

import lrqp_torch as lrqp
from lrqp_torch.models import load

README = Path(__file__).parents[1] / "README.md"


def run_example(index: int, names: dict[str, Any]) -> dict[str, Any]:
    """Run one of the README's examples, and return the names that it leaves."""
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(examples[index], str(README), "exec"), names)
    return names


def test_the_example_on_other_texts_runs() -> None:
    model, tokenizer = load("organism")
    texts = ["the dog and the book", "a ring", "the store and the book to", "a dog"]
    given = {"lrqp": lrqp, "model": model, "tokenizer": tokenizer, "texts": texts}
    given |= {"labels": torch.tensor([0, 1, 2, 1]), "direction": torch.ones(128)}
    names = run_example(1, given)
    assert names["edit"].probe.n_classes == 3
    assert names["last"].tolist() == [4, 1, 5, 1]


def test_the_example_flips_answers_as_the_readme_says() -> None:
    names = run_example(0, {})
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


def test_every_file_that_the_readme_links_exists() -> None:
    text = README.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links, "the README shows at least its figure"
    assert [link for link in links if not (README.parent / link).exists()] == []
