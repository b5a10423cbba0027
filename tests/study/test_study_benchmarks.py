"""Benchmarks by others: their files are read as published, and their measures are what they say."""

import json
import random
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from prompts_for_tests import organism

from lrqp_torch.errors import (
    HubError,
    MissingExtraError,
    PromptError,
    RowError,
    SettingError,
)
from lrqp_torch.ioi import NAMES
from lrqp_torch.ioi.prompts import single_token_names
from lrqp_torch.study.benchmarks import BenchmarkResult, _fetched, _ravel_rows, run_benchmark
from lrqp_torch.study.methods import Training
from lrqp_torch.study.published import mib_rows, read_ravel, spoken, unfolded
from lrqp_torch.study.reading import rows_of
from lrqp_torch.study.records import from_json, to_json

FAST = Training(prompts=16, epochs=1)
PLACES = ("park", "school", "garden", "station")


def sentences(n: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Two names and a place, drawn among words that the organism knows."""
    names = sorted(single_token_names(organism()[1], NAMES))
    draws = random.Random(seed)
    return [(*draws.sample(names, 2), draws.choice(PLACES)) for _ in range(n)]


def dump(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(value))


def run(name: str, folder: Path, sites: str, **options: object) -> BenchmarkResult:
    options = {"n": 80, "training": FAST} | options
    return run_benchmark(name, str(folder), *organism(), sites, **options)


def by_method(result: BenchmarkResult, row: int = 0) -> dict[str, dict[str, float | None]]:
    return {
        m.name: {name: estimate.value for name, estimate in m.measures.items()}
        for m in result.tasks[row].methods
    }


# ---- CausalGym -----------------------------------------------------------------------------------


def causalgym(n: int, seed: int) -> list[dict]:
    """Pairs that differ in the last mention of a name, as spans, the front token in the text."""
    rows = []
    for one, two, place in sentences(n, seed):
        front = ["<|endoftext|>When", f" {one} and {two}", f" went to the {place},"]
        sides = [[*front, f" {name}", " gave a book", " to"] for name in (two, one)]
        rows.append({
            "task": "order", "base": sides[0], "src": sides[1], "base_type": "abb",
            "src_type": "bab", "base_label": f" {one}", "src_label": f" {two}",
        })  # fmt: skip
    return rows


def test_causalgym_is_read_and_scored_as_published(tmp_path: Path) -> None:
    dump(tmp_path / "train.json", [*causalgym(40, 0), {"task": "order", "base": ["a"]}])
    dump(tmp_path / "test.json", causalgym(20, 1))
    result = run("causalgym", tmp_path, "L0.pre,L4.pre")
    assert [(t.task, t.site, t.train, t.test) for t in result.tasks] == [
        ("order", "L0.pre", 40, 40),
        ("order", "L4.pre", 40, 40),
    ]
    early, late = by_method(result), by_method(result, 1)
    assert set(early) == {"lrqp", "mean_difference", "das", "full_patch"}
    # The twin's activation before any layer is the other word: the model then says what the twin
    # says, so the odds change by the whole distance between both, and nothing happens at L4.
    assert early["full_patch"]["interchange accuracy"] > 0.9
    assert early["full_patch"]["log odds-ratio"] > 5 > abs(late["full_patch"]["log odds-ratio"])
    assert late["full_patch"]["interchange accuracy"] < 0.1
    # No name has to do with " dog" or " give": nearly all of the effect is the task's own.
    assert early["full_patch"]["selectivity"] > 0.8 * early["full_patch"]["log odds-ratio"]
    assert result.tasks[0].left_out == {"no text": 1}
    again = from_json(BenchmarkResult, json.loads(result.save(tmp_path / "out").read_text()))
    assert to_json(again) == to_json(result)
    tables = result.tables()
    assert list(tables) == ["order, L0.pre, n = 40", "order, L4.pre, n = 40"]
    assert all(len(table.rows) == 4 and len(table.columns) == 4 for table in tables.values())


def test_the_log_odds_ratio_is_that_of_four_probabilities(tmp_path: Path) -> None:
    dump(tmp_path / "train.json", causalgym(16, 4))
    dump(tmp_path / "test.json", causalgym(24, 3))
    result = run("causalgym", tmp_path, "L0.pre", n=1000)
    model, tokenizer = organism()
    ratios = []
    for row in causalgym(24, 3):
        log_p = []
        for side in ("base", "src"):
            text = "".join(row[side]).replace("<|endoftext|>", "")
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                at_end = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
            said = [tokenizer(row[f"{s}_label"])["input_ids"][-1] for s in ("base", "src")]
            log_p.append((at_end[said[0]] - at_end[said[1]]).item())
        # The patch makes base source and source base, and both are measured.
        ratios += [log_p[0] - log_p[1]] * 2
    assert result.tasks[0].test == len(ratios)
    found = by_method(result)["full_patch"]["log odds-ratio"]
    assert found == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)


def test_prompts_in_ones_own_form_are_tasks_of_causalgym(tmp_path: Path) -> None:
    rows = [
        {"text": f"When {one} and {two} went to the {place}, [[{s}]] gave a book to",
         "label": "abb" if s == two else "bab",
         "answers": {"abb": f" {one}", "bab": f" {two}"}}
        for one, two, place in sentences(40) for s in (one, two)
    ]  # fmt: skip
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run("causalgym", tmp_path, "L2.mid")
    assert by_method(result)["lrqp"]["interchange accuracy"] > 0.8
    assert result.tasks[0].probe_accuracy.value > 0.95
    with pytest.raises(PromptError, match="no task of causalgym can run"):
        run("causalgym", tmp_path, "L2.mid", tasks=["other"])


def test_one_text_a_side_is_taken_apart_by_its_words() -> None:
    row = {"base": "The keys there", "src": "The old key there", "base_type": "p", "src_type": "s",
           "base_label": " are", "src_label": " is"}  # fmt: skip
    one, two = unfolded(0, row)
    assert (one["text"], two["text"]) == ("The [[keys]] there", "The [[old key]] there")
    assert one["pair"] == two["pair"] and one["answers"] == {"p": " are", "s": " is"}
    row |= {"src": "The there", "base": "The keys there"}
    assert [side["text"] for side in unfolded(0, row)] == ["The [[keys]] there", "The[[]] there"]


def test_blimp_is_a_prompt_up_to_where_both_sentences_part() -> None:
    row = {"sentence_good": "Katherine can't help herself.",
           "sentence_bad": "Katherine can't help himself.", "UID": "anaphor"}  # fmt: skip
    (own,) = unfolded(0, row)
    assert own["text"] == "Katherine can't help" and own["label"] == "herself"
    assert own["answers"] == {"herself": " herself", "himself": " himself"}
    assert own["UID"] == "anaphor"


# ---- RAVEL ---------------------------------------------------------------------------------------


def ravel(folder: Path) -> None:
    """Entities whose attributes are themselves, asked for in two ways that the organism answers."""
    names = sorted(single_token_names(organism()[1], NAMES))[:6]
    friend = sorted(single_token_names(organism()[1], NAMES))[10]
    templates = {
        name: [f"{opening} %s and {friend} went to the {place}, {friend} gave a book to"
               for place in PLACES]
        for name, opening in (("name", "When"), ("also", "After"))
    }  # fmt: skip
    dump(folder / "ravel_person_entity_attributes.json", {n: dict.fromkeys(templates, n)
                                                          for n in names})  # fmt: skip
    dump(folder / "ravel_person_attribute_to_prompts.json", templates)
    dump(folder / "ravel_person_entity_to_split.json", dict.fromkeys(names, "train"))
    dump(folder / "ravel_person_prompt_to_split.json",
         {t: "test" if i % 2 else "train" for own in templates.values()
          for i, t in enumerate(own)})  # fmt: skip


def test_ravel_measures_cause_and_isolate(tmp_path: Path) -> None:
    ravel(tmp_path / "data")
    result = run("ravel", tmp_path, "L0.pre")
    assert [t.task for t in result.tasks] == ["name", "also"]
    for row in range(2):
        found = by_method(result, row)
        assert set(found) == {"lrqp", "joint", "mean_difference", "das", "full_patch"}
        # Another word at the entity is another entity: its answer, and so every attribute's.
        patch = found["full_patch"]
        assert patch["cause"] > 0.9 and patch["isolate"] < 0.1
        assert patch["disentangle"] == pytest.approx((patch["cause"] + patch["isolate"]) / 2)
        # What is kept to be what is written: the joint edit cannot do both, and does nothing.
        assert found["joint"]["isolate"] >= found["lrqp"]["isolate"]
    with pytest.raises(PromptError, match=r"no attribute of RAVEL.*looked for Country"):
        run("ravel", tmp_path, "L0.pre", tasks=["Country"])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(PromptError, match=r"looked for ravel_\*_entity_attributes.json"):
        run("ravel", tmp_path / "nothing", "L0.pre")


def cities(folder: Path, write: Callable[[Path, list[dict]], None]) -> None:
    """The tables of hij/ravel: entities and prompts, a folder each, with a file for each split."""
    known = [("Aalen", "Europe", "Germany"), ("Bonn", "Europe", "Germany"),
             ("Kyoto", "Asia", "Japan"), ("Osaka", "Asia", "Japan"),
             ("Paris", "Europe", "France"), ("Paris", "North America", "Canada")]  # fmt: skip
    rows = [
        {"ID": f"{city}-{number}", "City": city, "Continent": continent, "Country": country,
         "Language": None, "Latitude": "48", "Longitude": "10", "Timezone": "", "URL": "http://x"}
        for number, (city, continent, country) in enumerate(known)
    ]  # fmt: skip
    asked = [
        {"Template": "%s is in the continent of", "Attribute": "Continent", "Source": "RAVEL",
         "Entity": ""},
        {"Template": "People in %s speak", "Attribute": "Language", "Source": "RAVEL",
         "Entity": ""},
        {"Template": '"city": "%s", "country": "', "Attribute": "Country", "Source": "RAVEL",
         "Entity": None},
        {"Template": "%s is a city with a long", "Attribute": "", "Source": "Wikipedia",
         "Entity": "Bonn"},
    ]  # fmt: skip
    for name, (own, held) in {
        "city_entity": (rows[:3] + rows[4:], rows[3:4]), "city_prompt": (asked[:2], asked[2:])
    }.items():  # fmt: skip
        write(folder / name / "train-00000-of-00001", own)
        write(folder / name / "val-00000-of-00001", held)


def as_parquet(path: Path, rows: list[dict]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(exist_ok=True, parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))


@pytest.mark.parametrize(
    "write",
    [as_parquet, lambda path, rows: dump(path.with_suffix(".json"), rows)],
    ids=["parquet", "json"],
)
def test_the_tables_of_the_hub_are_read_as_they_are(
    tmp_path: Path, write: Callable[[Path, list[dict]], None]
) -> None:
    cities(tmp_path, write)
    found = read_ravel(tmp_path, _ravel_rows(tmp_path))
    assert found.values["Kyoto"] == {"Continent": "Asia", "Country": "Japan"}
    # A prompt cannot tell which Paris is meant, and a prompt for one entity is none for the others.
    assert found.values["Paris"] == {}
    assert found.templates == {
        "Continent": ["%s is in the continent of"],
        "Language": ["People in %s speak"],
        "Country": ['"city": "%s", "country": "'],
    }
    assert found.entity_split == dict(Aalen="train", Bonn="train", Kyoto="train", Paris="train",
                                      Osaka="val")  # fmt: skip
    assert found.template_split['"city": "%s", "country": "'] == "val"


def test_a_parquet_file_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    if find_spec("pyarrow"):
        with pytest.raises(PromptError, match="cannot be read as parquet"):
            list(rows_of(str(tmp_path / "a.parquet")))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lrqp_torch\[datasets\]'"):
        list(rows_of(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("in the continent of", " Asia"), ('"continent": "', "Asia"), ("Continent:", " Asia")],
)
def test_an_answer_has_the_space_that_its_text_leaves(text: str, expected: str) -> None:
    assert spoken(text, " Asia ") == expected


# ---- MIB -----------------------------------------------------------------------------------------


def test_mib_measures_interchange_accuracy(tmp_path: Path) -> None:
    rows = []
    names = sorted(single_token_names(organism()[1], NAMES))[:4]
    for number in range(120):
        one, two = random.Random(number).sample(names, 2)
        place = PLACES[number % 4]

        def side(s: str, one: str = one, two: str = two, place: str = place) -> dict:
            return {"prompt": f"When {one} and {two} went to the {place}, {s} gave a book to",
                    "choices": [one, two], "answerKey": 0 if s == two else 1}  # fmt: skip

        rows.append(side(two) | {
            "metadata": {"place": place}, "s2_io_flip_counterfactual": side(one),
            "random_counterfactual": side(two),
        })  # fmt: skip
    for name, own in (("train", rows[:80]), ("test", rows[80:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)))
    result = run("mib", tmp_path, "L0.pre,L1.pre,L5.mid", n=120)
    # The last word is the same in all prompts, so there is nothing to fit to before any layer.
    assert "all activations are the same" in result.skipped["s2_io_flip_counterfactual at L0.pre"]
    assert {t.task for t in result.tasks} == {"s2_io_flip_counterfactual"}
    assert "same answer" in result.skipped["random_counterfactual"]
    early, late = by_method(result), by_method(result, 1)
    assert early["full_patch"]["interchange accuracy"] < 0.1
    assert late["full_patch"]["interchange accuracy"] > 0.9
    assert late["lrqp"]["of the two answers"] >= late["lrqp"]["interchange accuracy"]
    (tmp_path / "other").mkdir()
    dump(tmp_path / "other" / "a.json", [{"prompt": "a", "answerKey": 0}])
    with pytest.raises(PromptError, match=r"looked for fields.*counterfactual.*prompt, answerKey"):
        run("mib", tmp_path / "other", "L0.pre")


def test_the_cities_of_mib_are_edited_to_what_the_counterfactual_entity_has(tmp_path: Path) -> None:
    """Its counterfactual asks for another attribute, or for nothing."""
    known = single_token_names(organism()[1], NAMES)
    names, friend = sorted(known)[:6], sorted(known)[10]
    draws, asked = random.Random(0), {"name": "When", "also": "After"}
    kinds = ("attribute_counterfactual", "wikipedia_counterfactual")

    def side(entity: str, attribute: str) -> dict:
        opening = asked.get(attribute, "While")
        template = f"{opening} %s and {friend} went to the {draws.choice(PLACES)}, {friend} gave a"
        own = {"entity": entity, "attribute": attribute, "name": entity, "also": entity}
        return own | {"template": f"{template} book to", "prompt": f"{template % entity} book to"}

    def row(attribute: str) -> dict:
        base, source = draws.sample(names, 2)
        other = next(name for name in asked if name != attribute)
        sides = side(source, other), side(source, "wikipedia")
        return side(base, attribute) | dict(zip(kinds, sides, strict=True))

    bad = row("name") | {"prompt": "nobody is here"}
    same = row("name")
    same["attribute_counterfactual"] = side(same["entity"], "also")
    for name, count in (("train", 160), ("test", 100)):
        rows = [row([*asked][number % 2]) for number in range(count)]
        dump(tmp_path / f"{name}.json", [*rows, bad, same])
    result = run("mib", tmp_path, "L0.pre")
    assert [t.task for t in result.tasks] == [f"{name}:{kind}" for kind in kinds for name in asked]
    for number, task in enumerate(result.tasks):
        found = by_method(result, number)
        assert set(found) == {"lrqp", "joint", "mean_difference", "das", "full_patch"}
        patch = found["full_patch"]
        assert patch["cause"] > 0.9 and patch["isolate"] < 0.1
        assert patch["disentangle"] == pytest.approx((patch["cause"] + patch["isolate"]) / 2)
        assert patch["isolate"] < patch["interchange accuracy"] < patch["cause"]
        if task.task.startswith("name"):
            assert task.left_out["an entity that is not in its prompt"] == 2
    assert result.tasks[0].left_out["a counterfactual with the same answer"] == 2
    some = run("mib", tmp_path, "L0.pre", tasks=["also"])
    assert [t.task for t in some.tasks] == [f"also:{kind}" for kind in kinds]


def test_every_form_of_mib_says_its_answer() -> None:
    """Rows as its data sets have them: the answer is a choice, a label, a number, an attribute."""
    name = "x_counterfactual"
    letters = {"prompt": "A. red B. blue Answer:", "answerKey": 1,
               "choices": {"label": ["A", "B"], "text": ["red", "blue"]},
               name: {"prompt": "1. red 2. blue Answer:", "answerKey": 0,
                      "choices": {"label": [1, 2], "text": ["red", "blue"]}}}  # fmt: skip
    sums = {"prompt": "1 + 2 =", "label": "3", "operator": "+", "operand1": 1, "operand2": 2,
            name: {"prompt": "0 + 0 =", "label": 0, "operand1": 0, "operand2": 0}}  # fmt: skip
    arc = {"arc_id": "q", "question": "?", "prompt": "? A. x B. y Answer:", "label": "A",
           "answerKey": 0, "choices": {"text": ["x", "y"], "label": ["A", "B"]},
           name: {"question": "?", "prompt": "? X. x Y. y Answer:", "label": "Y", "answerKey": 1,
                  "choices": {"text": ["x", "y"], "label": ["X", "Y"]}}}  # fmt: skip
    city = {"template": "%s is in", "prompt": "Kyoto is in", "entity": "Kyoto",
            "attribute": "Country", "Continent": "Asia", "Country": "Japan", "Language": "Japanese",
            name: {"template": "%s is in", "prompt": "Bonn is in", "entity": "Bonn",
                   "attribute": "Country", "Continent": "Europe", "Country": "Germany",
                   "Language": "German"}}  # fmt: skip
    for row, own, other in ((letters, "B", "1"), (sums, "3", "0"), (arc, "A", "Y"),
                            (city, "Japan", "Germany")):  # fmt: skip
        base, source = mib_rows(0, row, name)
        assert (base["label"], base["target"], source["label"]) == (own, other, other)
        assert base["answers"] == {own: f" {own}", other: f" {other}"}
    assert base["text"] == "[[Kyoto]] is in"
    with pytest.raises(RowError, match="lacks a field"):
        list(mib_rows(0, letters | {"answerKey": 7}, name))


@pytest.mark.parametrize(
    ("data", "name", "within"),
    [("mine", "mine", ""), ("hij/ravel", "hij/ravel", ""), ("a/b/four/x", "a/b", "four/x")],
)
def test_a_data_set_of_the_hub_may_be_one_folder_of_it(
    data: str, name: str, within: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(found: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        assert (found, repo_type) == (name, "dataset")
        assert f"{within}*.parquet" in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    assert _fetched(data) == tmp_path / within


def test_what_is_no_benchmark_and_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no benchmark 'glue'"):
        run("glue", tmp_path, "L0.pre")
    with pytest.raises(HubError, match="neither a file or folder"):
        run("mib", tmp_path / "not" / "there" / "at all", "L0.pre")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PromptError, match="holds no files"):
        run("causalgym", tmp_path / "empty", "L0.pre")
