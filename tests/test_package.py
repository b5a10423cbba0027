"""What stands about the package, beside it: its bounds, its README for an index, its site."""

import pickle
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import lrqp_torch
from lrqp_torch import errors

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = {
    name.lower(): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
}


@pytest.mark.parametrize("text", PROJECT["project"]["dependencies"])
def test_a_dependency_has_bounds_and_was_tested_within(text: str) -> None:
    requirement = Requirement(text)
    assert {bound.operator for bound in requirement.specifier} == {">=", "<"}
    assert requirement.specifier.contains(PINS[requirement.name.lower()].split("+")[0])


def test_the_readme_of_an_index_leads_nowhere_that_is_not_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for rule in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert "![" not in text and all(link.startswith("https://") for link in links)
    assert "tutorial" in text and "lrqp.LRQP.fit" in text


def test_every_error_reaches_the_process_that_waits_for_it() -> None:
    """An error of a worker is pickled on its way."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, errors.LRQPError)]
    assert len(kinds) > 20
    for kind in kinds:
        error = kind("what", "why") if kind is errors.RowError else kind("what")
        copied = pickle.loads(pickle.dumps(error))
        assert type(copied) is kind
        assert str(copied) == "what"
        assert vars(copied) == vars(error)


def test_it_is_cited_in_its_own_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == PROJECT["project"]["version"] == lrqp_torch.__version__
    assert cited["title"].startswith("lrqp_torch") and cited["references"][0]["url"]


def test_the_site_has_every_page_and_every_room() -> None:
    site = yaml.safe_load((ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8"))

    def listed(entry: object) -> list[str]:
        entry = list(entry.values()) if isinstance(entry, dict) else entry
        return (
            [page for item in entry for page in listed(item)]
            if isinstance(entry, list)
            else [str(entry)]
        )

    pages, docs = set(listed(site["nav"])), ROOT / "docs"
    there = {
        str(path.relative_to(docs)) for kind in ("md", "ipynb") for path in docs.rglob(f"*.{kind}")
    }
    assert pages == there
    rooms = {path.parent.name for path in (ROOT / "lrqp_torch").glob("*/__init__.py")} - {"cli"}
    assert {Path(page).stem for page in pages if page.startswith("api/")} == rooms | {
        "errors", "lrqp_torch",
    }  # fmt: skip
    # Nothing is fetched: no fonts, and no script but the theme's own.
    assert site["theme"]["font"] is False and "extra_javascript" not in site
