"""The README's example runs as printed, and does what the text around it says."""

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_example_flips_answers_as_the_readme_says() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, str(README), "exec"), names)
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
