"""Tables of records by paths, and what is not told of them."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from report_for_tests import study_results

from lrqp_torch.plot.chart import ends, marks_of
from lrqp_torch.plot.reading import get, read
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.parts.flipping import PART, sites_table
from lrqp_torch.study.results import told
from lrqp_torch.study.showing import known, said, table_of

SHARE = Estimate(0.5, 0.25, 0.75, 4)


def test_a_table_reads_its_columns_by_paths() -> None:
    rows = [
        (["a", 1], SimpleNamespace(edit=SimpleNamespace(flipped=SHARE), used=True, n=3)),
        (["b", 2], SimpleNamespace(edit=None, used=False, n=4)),
    ]
    columns = {"flipped (%)": "edit.flipped", "used": "used", "double": lambda row: 2 * row.n}
    table = table_of(["name", "number"], rows, columns)
    assert table.columns == [
        "name", "number", "flipped (%)", "lower end (%)", "upper end (%)", "used", "double"
    ]  # fmt: skip
    assert [list(row) for row in table.rows] == [
        ["a", 1, 50.0, 25.0, 75.0, "yes", 6],
        ["b", 2, None, None, None, "no", 8],
    ]
    records = [record for _, record in rows]
    assert list(known(records, {"flipped": "edit.flipped", "nothing": "nothing"})) == ["flipped"]


@pytest.mark.parametrize("record", [
    {"edit": {"flipped": 0.5, "flipped_interval": [0.25, 0.75]}, "each": [1.0, 2.0]},
    SimpleNamespace(edit={"flipped": {"value": 0.5, "interval": [0.25, 0.75]}}, each=[1.0, 2.0]),
    SimpleNamespace(edit=SimpleNamespace(flipped=SHARE), each=[1.0, 2.0]),
])  # fmt: skip
def test_a_number_is_read_the_same_of_objects_and_of_json(record: Any) -> None:
    assert read(record, "nothing", "edit.flipped") == (0.5, 0.25, 0.75)
    assert get(record, "each.1") == 2.0 and read(record, "nothing.at.all") == (None, None, None)


def test_numbers_become_marks_with_their_intervals() -> None:
    assert ends((1.0, 0.0, 2.0)) == (1.0, 0.0, 2.0) and ends(None) == (None, None, None)
    marks = marks_of("a", ["x", "y"], [SHARE, None], scale=100)
    assert (marks.y, marks.lower, marks.upper) == ([50.0, None], [25.0, None], [75.0, None])
    assert marks_of("a", ["x"], [1.0]).lower is None


def test_what_is_recovered_is_told_where_the_site_is_used() -> None:
    results = study_results()
    sites = {n: replace(site, recovered=SHARE) for n, site in results.sites.items()}
    results = replace(results, sites=sites)
    assert all(site.recovered == SHARE for site in results.sites.values()), "kept in results.json"
    shown = told(results.sites)
    yes = {name for name, site in shown.items() if site.recovered is not None}
    clear = {name for name, site in sites.items() if site.verdict or site.clearly_flips}
    assert yes == clear and set() < yes < set(sites)
    table = sites_table(results)
    column = table.columns.index("recovered (%)")
    assert {row[0] for row in table.rows if row[column] is not None} == yes
    found = PART.found(results)
    assert found is not None
    assert {n for n, site in found.own.sites.items() if site.recovered is not None} == yes


def test_words_are_paragraphs_and_lack_nothing() -> None:
    study = study_results()
    given = {"study": study, "best": study.strongest}
    title, text = said("flipping", "flipping_histogram", **given)
    assert title == f"The answers under the edit at {study.best_site}"
    assert "\n" not in text and "  " not in text
    (strongest,) = said("flipping", "strongest", **given)
    assert "\u00a0%" in strongest  # a number is not broken from its sign
    with pytest.raises(Exception, match="'study' is undefined"):
        said("flipping", "flipping_histogram")
