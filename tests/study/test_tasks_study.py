"""Fitting, applying and studying edits of tasks of one's own."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contexts_for_tests import own_task
from models_for_tests import build
from prompts_for_tests import names_task, organism

from lrqp_torch import LRQP, capture, tasks
from lrqp_torch.errors import OutputError, PromptError, ProvenanceError, SettingError, TargetError
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.study.editing import HeldOut, apply, fit_sites, origin_of, typed_prompts
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.parts.flipping import PART as FLIPPING
from lrqp_torch.study.results import ConditionResult, StudyResults, columns_of
from lrqp_torch.study.running import answers, batches, divergences, next_class
from lrqp_torch.study.sweep import fit_edits, sweep
from lrqp_torch.tasks import Prompt, PromptSet, split

USED = ["L1.mid", "L2.pre", "L2.mid"]
SITES = ["L0.mid", *USED, "L3.mid"]


def encoded(n: int, seed: int = 0, answers: bool = True) -> tuple[PromptSet, PromptSet]:
    tokenizer = organism()[1]
    train, test = split(names_task(n, seed, answers), seed=seed)
    return PromptSet.encode(tokenizer, train), PromptSet.encode(tokenizer, test)


@pytest.fixture(scope="module")
def halves() -> tuple[PromptSet, PromptSet]:
    return encoded(400)


@pytest.fixture(scope="module")
def results(halves: tuple[PromptSet, PromptSet]) -> StudyResults:
    return tasks.study(organism()[0], *halves, SITES, name="organism", data="names.jsonl")


@pytest.fixture(scope="module")
def edit(halves: tuple[PromptSet, PromptSet]) -> LRQP:
    train, test = halves
    known = {"position": "mark", "variable": "label", "seed": 0}
    return tasks.fit(organism()[0], train, "L2.mid", held_out=test, **known)


# ---- the study -----------------------------------------------------------------------------------


def test_the_study_finds_where_the_organism_uses_the_order(results: StudyResults) -> None:
    assert results.used_sites == USED
    assert results.best_site in USED
    assert results.answered.value > 0.95 and results.clean.logit_difference.value > 5
    assert results.data == {"train": 200, "test": 200} and results.majority == 0.5
    for name, site in results.sites.items():
        assert 0.3 < site.shuffled_accuracy.value < 0.7 < site.probe_accuracy.value
        assert site.control.flipped.value < 0.05
        assert site.worst_log_odds_margin >= 0 and site.counterfactual.failed == 0
        low, high = site.counterfactual.logit_difference.interval
        assert low <= site.counterfactual.logit_difference.value <= high
        if name not in USED:
            assert site.counterfactual.flipped.value < 0.05
            assert site.counterfactual.divergence.value < 0.1
    # Read there, and not used.
    assert results.sites["L3.mid"].probe_accuracy.value > 0.97


def test_numbers_of_each_prompt_make_the_summary(results: StudyResults) -> None:
    flat = results.prompts
    right = flat["clean.logit_difference"] > 0
    for name, site in results.sites.items():
        edited = columns_of(flat, f"{name}.counterfactual")["logit_difference"]
        assert site.counterfactual.flipped == Estimate.share(edited[right] < 0)
        assert site.probe_accuracy == Estimate.share(flat[f"{name}.control.log_odds_before"] > 0)
        assert torch.equal(flat["labels"], 1 - flat["other"])


def test_results_survive_a_round_trip(results: StudyResults, tmp_path: Path) -> None:
    results.save(tmp_path / "out")
    loaded = StudyResults.load(tmp_path / "out")
    for name in ("settings", "model", "classes", "sites", "answered", "texts", "used_sites"):
        assert getattr(loaded, name) == getattr(results, name)
    assert all(torch.equal(loaded.prompts[k], v) for k, v in results.prompts.items())
    file = tmp_path / "out" / "results.json"
    raw = json.loads(file.read_text())
    assert raw["settings"]["data"] == "names.jsonl" and raw["versions"]["torch"]
    file.write_text(json.dumps(raw | {"format": 99}))
    with pytest.raises(OutputError, match="format 99"):
        StudyResults.load(tmp_path / "out")


def test_indirect_objects_are_one_task_of_the_study() -> None:
    model, tokenizer = organism()
    train, test = (
        IOIPrompts.of(IOIDataset.generate(tokenizer, 60, s, padding_side="left")) for s in (0, 1)
    )
    sites = ["L1.mid", "L4.pre"]
    found = capture(model, train.inputs, sites, positions=train.positions["S2"])
    edits = fit_edits(found, train.labels)
    said = torch.stack([test.io_tokens, test.s_tokens], 1)
    labels = test.labels
    prompts = PromptSet(
        inputs=test.inputs,
        position=test.positions["S2"],
        end=test.positions["END"],
        labels=labels,
        classes=("BABA", "ABBA"),
        answers=torch.where(labels[:, None] == 0, said, said.flip(1))[:, :, None],
        prompts=test.prompts,
    )
    named, plain = (sweep(model, each, edits, batch_size=25) for each in (test, prompts))
    assert named.pop("groups").tolist() == test.groups.tolist()  # its templates
    assert named.keys() == plain.keys()
    assert all(torch.equal(named[name], plain[name]) for name in named)
    rows = torch.arange(60)
    with torch.no_grad():
        logits = model(**test.inputs).logits[:, -1].double()
    difference = logits[rows, test.io_tokens] - logits[rows, test.s_tokens]
    torch.testing.assert_close(named["clean.logit_difference"], difference, atol=1e-4, rtol=1e-5)
    chances = logits.softmax(-1)[rows, test.io_tokens]
    torch.testing.assert_close(named["clean.io_probability"], chances, atol=1e-5, rtol=1e-4)


def test_the_divergence_is_that_of_the_whole_forward_pass(
    halves: tuple[PromptSet, PromptSet], edit: LRQP, results: StudyResults
) -> None:
    model, test = organism()[0], halves[1][:20]
    with torch.no_grad():
        clean = model(**test.inputs).logits[:, -1]
        target = next_class(test.labels, 2)
        with edit.at(model, "L2.mid", positions=test.position, target=target, source=test.labels):
            edited = model(**test.inputs).logits[:, -1]
    expected = torch.nn.functional.kl_div(
        edited.double().log_softmax(-1),
        clean.double().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    found = results.prompts["L2.mid.counterfactual.divergence"][:20]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert torch.equal(divergences(clean, clean), torch.zeros(20, dtype=torch.float64))


def test_with_three_classes_a_flip_is_an_answer_with_the_target() -> None:
    tokens = torch.tensor([[[0], [1], [2]]]).expand(4, 3, 1)
    labels = torch.tensor([0, 0, 1, 2])
    assert next_class(labels, 3).tolist() == [1, 1, 2, 0]
    prompts = PromptSet({}, labels, labels, labels, ("a", "b", "c"), tokens, ("",) * 4)
    clean = torch.tensor([[3.0, 1, 0], [1, 3, 0], [0, 3, 1], [0, 0, 3]])
    edited = torch.tensor([[1.0, 3, 0], [0, 3, 0], [0, 2, 1], [0, 4, 3]])
    before, after = (answers(prompts, logits) for logits in (clean, edited))
    assert before["own_lead"].tolist() == [2, -2, 2, 3]
    assert after["other_lead"].tolist() == [2, 3, -1, -4]
    assert after["logit_difference"].tolist() == [-2, -3, 1, 3]
    record = {name: torch.zeros(4) for name in (
        "status", "distance", "euclidean", "log_odds_after", "floor", "divergence"
    )}  # fmt: skip
    flat = {f"x.control.{name}": values for name, values in (record | after).items()}
    flat |= {f"clean.{name}": values for name, values in before.items()}
    flat["x.control.logit_difference"] = after["logit_difference"]
    # Prompt 1 was answered otherwise to begin with; prompt 3 is now answered with a third class.
    assert ConditionResult.of(flat, "x.control", 0).flipped == Estimate.count(1, 3)


def test_without_answers_the_next_token_is_measured(tmp_path: Path) -> None:
    found = tasks.study(organism()[0], *encoded(80, answers=False), ["L0.mid", "L2.pre"])
    assert found.answered is None and found.used_sites == [] and found.best_site == "L2.pre"
    assert found.clean.logit_difference is found.clean.io_probability is None
    site = found.sites["L2.pre"]
    assert site.counterfactual.flipped is None and not site.used
    assert site.counterfactual.divergence.value > 1 > 10 * site.control.divergence.value
    assert any("no flip can be counted" in line for line in said(found))
    found.save(tmp_path)
    assert StudyResults.load(tmp_path).sites == found.sites
    assert list(FLIPPING.figures(FLIPPING.found(found))) == ["sweep"]
    assert FLIPPING.panels(FLIPPING.found(found)) == []
    (panel,) = FLIPPING.overview(FLIPPING.found(found))
    assert panel.table is not None and "flipped" not in " ".join(panel.table.columns)


def said(found: StudyResults) -> list[str]:
    return FLIPPING.says(FLIPPING.found(found))


def test_parts_that_need_no_names_run_on_own_prompts(halves: tuple[PromptSet, PromptSet]) -> None:
    train, test = halves
    found = tasks.study(organism()[0], train[:60], test[:60], ["L2.mid"], parts="geometry,dose")
    assert list(found.parts) == ["geometry", "dose"] and found.best_site == "L2.mid"
    assert "labels.abb" not in found.prompts and found.published == {}
    with pytest.raises(SettingError, match="circuit cannot run on these prompts"):
        tasks.study(organism()[0], train[:60], test[:60], ["L2.mid"], parts="circuit")


def test_a_study_in_memory_takes_the_settings_of_the_command(
    halves: tuple[PromptSet, PromptSet],
) -> None:
    given = organism()[0], halves[0][:60], halves[1][:60], ["L2.mid"]
    nats, dosed = (tasks.study(*given, dose=dose, note="mine") for dose in ("nats", "class"))
    lengths = [found.sites["L2.mid"].counterfactual.distance for found in (nats, dosed)]
    assert abs(lengths[0] - lengths[1]) > 0.01
    assert (dosed.settings["dose"], dosed.settings["note"]) == ("class", "mine")
    with pytest.raises(SettingError, match="dose must be one of nats, twin, class"):
        tasks.study(*given, dose="much")


def test_a_model_that_never_answers_right_is_said_to_be_unused(
    halves: tuple[PromptSet, PromptSet],
) -> None:
    train, test = halves
    turned = replace(test[:20], answers=test[:20].answers.flip(1))
    found = tasks.study(organism()[0], train, turned, ["L2.mid"])
    assert found.answered.value == 0
    assert found.sites["L2.mid"].counterfactual.flipped == Estimate.count(0, 0)
    assert found.used_sites == []
    assert any("no answer can flip" in line for line in said(found))


def test_studies_of_prompts_that_do_not_fit_are_refused(
    halves: tuple[PromptSet, PromptSet],
) -> None:
    model, tokenizer = organism()
    train, test = halves
    with pytest.raises(PromptError, match="both fitted on and held out"):
        tasks.study(model, train, train, ["L2.mid"])
    with pytest.raises(PromptError, match="encode both with the same"):
        tasks.study(model, train, replace(test, classes=("a", "b")), ["L2.mid"])
    with pytest.raises(PromptError, match="no prompt to fit on has the class 'BABA'"):
        tasks.study(model, train[train.labels == 0], test, ["L2.mid"])
    right = PromptSet.encode(tokenizer, names_task(20, 5), padding_side="right")
    with pytest.raises(PromptError, match="padded on the left"):
        tasks.study(model, train, right, ["L2.mid"])


# ---- dividing ------------------------------------------------------------------------------------


def test_both_sides_hold_every_class_and_no_text_is_on_both() -> None:
    prompts = [Prompt(f"word{i}", "abc"[i % 3]) for i in range(60)]
    prompts += [Prompt("[[one]] two", "a"), Prompt("one [[two]]", "b"), *prompts[:9]]
    for seed in range(5):
        train, test = split(prompts, 0.6, seed)
        assert sorted(p.text for p in train + test) == sorted(p.text for p in prompts)
        plain = [{p.text.replace("[[", "").replace("]]", "") for p in x} for x in (train, test)]
        assert not plain[0] & plain[1]
        for label in "abc":
            share = sum(p.label == label for p in train) / sum(p.label == label for p in prompts)
            assert abs(share - 0.6) < 0.12
    assert split(prompts, 0.6, 1) == split(prompts, 0.6, 1) != split(prompts, 0.6, 2)


def test_prompts_of_the_same_words_with_several_labels_are_divided_in_shares() -> None:
    both = [
        Prompt(text, label)
        for i in range(20)
        for text, label in ((f"[[one{i}]] two", "a"), (f"one{i} [[two]]", "b"))
    ]
    # One text with both labels, and two with one: a side that got no other must get it.
    few = [Prompt("[[x]] y", "a"), Prompt("x [[y]]", "b"), Prompt("p", "a"), Prompt("q", "b")]
    for prompts, tolerance in ((both, 0.0), (few, 0.0), (both + few, 0.1)):
        for seed in range(5):
            halves = split(prompts, 0.5, seed)
            train, test = ({p.text.translate({91: None, 93: None}) for p in x} for x in halves)
            assert not train & test and sum(map(len, halves)) == len(prompts)
            for label in "ab":
                count = sum(p.label == label for p in halves[0])
                of = sum(p.label == label for p in prompts)
                assert abs(count / of - 0.5) <= tolerance


@pytest.mark.parametrize(
    ("prompts", "share", "error", "what"),
    [
        ([Prompt("x", "a"), Prompt("y", "b")], 0.5, PromptError, "class 'a' has 1 different"),
        ([Prompt("x", "a")] * 4, 0.5, PromptError, "class 'a' has 1 different"),
        ([Prompt("x", "a"), Prompt("x", "b")], 0.5, PromptError, "is 'b' here and 'a' elsewhere"),
        ([], 0.5, PromptError, "no prompts were given"),
        (
            [Prompt(f"{m}[[{x}]] {x}", x) for x in "ab" for m in ("", "the ")] + [Prompt("x", "c")],
            0.5,
            PromptError,
            "class 'c' has 1 different",
        ),
        (
            [
                Prompt(text, label)
                for labels, pair in zip(("ab", "ac", "bc"), ("k l", "m n", "o p"), strict=True)
                for label, text in zip(
                    labels, (f"[[{pair[0]}]] {pair[2]}", f"{pair[0]} [[{pair[2]}]]"), strict=True
                )
            ],
            0.5,
            PromptError,
            "is on one side only",
        ),
        ([Prompt("x", "a")], 1.0, SettingError, "train_share is 1.0"),
        ([Prompt("x", "a")], float("nan"), SettingError, "train_share is nan"),
    ],
)
def test_prompts_that_cannot_be_divided_are_refused(prompts, share, error, what) -> None:
    with pytest.raises(error, match=what):
        split(prompts, share)


# ---- fitting and applying ------------------------------------------------------------------------


def test_a_fit_is_that_of_the_activations_and_knows_its_origin(
    halves: tuple[PromptSet, PromptSet], edit: LRQP, tmp_path: Path
) -> None:
    model = organism()[0]
    train, test = halves
    x, held = (capture(model, part.inputs, "L2.mid", part.position)["L2.mid"] for part in halves)
    plain = LRQP.fit(x, train.labels)
    torch.testing.assert_close(edit.probe.weight, plain.probe.weight, atol=1e-4, rtol=1e-3)
    assert edit.on_infeasible == "raise"
    for made in (edit, LRQP.load(edit.save(tmp_path / "edit"))):
        origin = origin_of(made)
        assert (origin.site, origin.classes) == ("L2.mid", ("ABBA", "BABA"))
        assert (origin.position, origin.variable, origin.seed) == ("mark", "label", 0)
        assert origin.probe_samples == len(train) and origin.model_type == "gpt2"
        assert origin.probe_accuracy == pytest.approx(plain.probe.accuracy(held, test.labels))
    with pytest.raises(ProvenanceError, match="does not say"):
        origin_of(plain)


def test_odds_that_are_not_reached_are_counted(halves: tuple[PromptSet, PromptSet]) -> None:
    model, (train, test) = organism()[0], halves
    edit = fit_sites(model, train, ["L2.mid"])[0]["L2.mid"]
    x = capture(model, test.inputs, "L2.mid", test.position)["L2.mid"]
    found = HeldOut.of(edit, x, test.labels)
    assert found.reached == found.prompts == 200 and found.worst_log_odds_margin >= 0
    assert found.accuracy.value == pytest.approx(edit.probe.accuracy(x, test.labels))
    turned = edit.solve(x, 1 - test.labels, test.labels)
    assert found.distance == pytest.approx(turned.distance.mean().item())
    with torch.no_grad():
        edit.probe.weight[1] = edit.probe.weight[0]
    assert HeldOut.of(edit, x, test.labels).reached < 200


def test_an_edit_turns_answers_and_its_control_does_not(
    halves: tuple[PromptSet, PromptSet], edit: LRQP
) -> None:
    model, tokenizer = organism()
    test = halves[1][:30]
    turned = apply(model, tokenizer, edit, test, "other", generate=2, batch_size=16)
    control = apply(model, tokenizer, edit, test, "own")
    assert [item.prompt for item in turned] == list(test.prompts)
    for item, same in zip(turned, control, strict=True):
        assert {item.source, item.target} == {"ABBA", "BABA"} and same.target == same.source
        assert item.belief_after >= 10 - 1e-4 and item.belief_before < 10
        assert item.lead_before < item.lead_after
        assert item.continued_before.startswith(item.next_before[0][0])
        assert item.continued_after.startswith(item.next_after[0][0])
        assert sum(chance for _, chance in item.next_after) <= 1 + 1e-9
        assert same.next_before[0][0] == same.next_after[0][0] and same.continued_after is None
    assert sum(item.lead_after > 0 for item in turned) > 25
    named = apply(model, tokenizer, edit, test, "ABBA")
    assert {item.target for item in named} == {"ABBA"}


def test_prompts_without_a_label_have_what_the_probe_reads(
    halves: tuple[PromptSet, PromptSet], edit: LRQP
) -> None:
    model, tokenizer = organism()
    texts = [prompt.text for prompt in names_task(8, 3)]
    prompts = typed_prompts(tokenizer, texts, edit)
    assert prompts.answers is None
    found = apply(model, tokenizer, edit, prompts, "other", labelled=False)
    assert apply(model, tokenizer, edit, texts, "other") == found
    assert apply(model, tokenizer, edit, texts[0], "other")[0].prompt == found[0].prompt
    x = capture(model, prompts.inputs, "L2.mid", prompts.position)["L2.mid"]
    read = edit.probe(x).argmax(-1).tolist()
    assert [item.source for item in found] == [("ABBA", "BABA")[index] for index in read]
    assert all(item.lead_before is None for item in found)
    with pytest.raises(PromptError, match="marks no words"):
        typed_prompts(tokenizer, ["Mary and John"], edit)


def test_edits_that_do_not_fit_are_refused(halves: tuple[PromptSet, PromptSet], edit: LRQP) -> None:
    model, tokenizer = organism()
    with pytest.raises(TargetError, match=r"no class 'plural'.*ABBA, BABA.*'own'"):
        apply(model, tokenizer, edit, halves[1], "plural")
    with pytest.raises(ProvenanceError, match="not on"):
        apply(build("gpt2"), tokenizer, edit, halves[1], "other")


def test_prompts_with_other_classes_than_the_edit_are_refused(
    halves: tuple[PromptSet, PromptSet], edit: LRQP
) -> None:
    model, tokenizer = organism()
    test = halves[1][:4]
    turned = replace(test, classes=test.classes[::-1], labels=1 - test.labels)
    for wrong in (turned, replace(test, classes=("p", "q"))):
        with pytest.raises(PromptError, match=r"fitted to the classes ABBA, BABA, in this order"):
            apply(model, tokenizer, edit, wrong, wrong.classes[0])
        with pytest.raises(PromptError, match=r"encode both with the same"):
            tasks.fit(model, halves[0], "L2.mid", held_out=wrong)
        with pytest.raises(PromptError, match=r"encode both with the same"):
            tasks.study(model, halves[0], wrong, ["L2.mid"])


@pytest.mark.parametrize(
    "setting", [{"generate": -3}, {"likeliest": 0}, {"likeliest": -1}, {"likeliest": 10**6}]
)
def test_settings_out_of_range_are_refused(
    halves: tuple[PromptSet, PromptSet], edit: LRQP, setting: dict[str, int]
) -> None:
    model, tokenizer = organism()
    with pytest.raises(
        SettingError, match=f"{next(iter(setting))} is {next(iter(setting.values()))}"
    ):
        apply(model, tokenizer, edit, halves[1][:2], "own", **setting)


# ---- several tokens a prompt ---------------------------------------------------------------------


def spread(n: int, seed: int = 0) -> list[Prompt]:
    """The order of two names, edited at S2 and at the two words behind it."""
    prompts = names_task(n, seed)
    return [
        replace(p, text=re.sub(r"(\[\[\w+)\]\]( \w+ \w+)", r"\1\2]]", p.text), span=True)
        for p in prompts
    ]


def test_a_span_is_edited_at_all_of_its_tokens() -> None:
    model, tokenizer = organism()
    train, test = split(spread(240), seed=0)
    sets = [PromptSet.encode(tokenizer, half) for half in (train, test)]
    assert bool((sets[1].spans.sum(1) == 3).all())
    plain = [replace(half, spans=None) for half in sets]
    site = "L2.mid"
    found = tasks.study(model, *sets, [site])
    row = found.sites[site].counterfactual
    # Fitted to three tokens a prompt, and asked of each of them.
    assert row.failed == 0 and row.worst_log_odds_margin >= 0 and found.data["test"] == len(test)
    edit = fit_sites(model, sets[0], [site])[0][site]
    assert edit.provenance.probe_samples == len(train)
    (batch,) = batches(model, sets[1], 500)
    clean = batch.clean
    ran = batch.edited(site, edit, {"other": batch.prompts.other})["other"]
    at = batch.prompts.spans
    with (
        torch.no_grad(),
        edit.at(
            model, site, positions=at, target=batch.prompts.other, source=batch.prompts.labels
        ) as run,
    ):
        logits = model(**batch.prompts.inputs).logits[:, -1]
    torch.testing.assert_close(ran.logits, logits, atol=1e-3, rtol=1e-3)
    whole = run.distance.view(-1, 3)
    torch.testing.assert_close(ran.record["distance"], whole.double().norm(dim=-1).cpu())
    margin = (run.log_odds_after - run.floor).view(-1, 3).amin(1)
    torch.testing.assert_close(ran.record["log_odds_after"] - ran.record["floor"], margin.cpu())
    # A displacement put beside goes along with all tokens; the clean activation changes nothing.
    (batch,) = batches(model, sets[1], 500, copies=2)
    assert torch.equal(batch.clean, clean)
    x = capture(model, batch.prompts.inputs, site, batch.prompts.position)[site]
    beside = batch.edited(site, edit, {"other": batch.prompts.other}, {"same": x})
    torch.testing.assert_close(beside["same"].logits, batch.clean, atol=1e-3, rtol=1e-3)
    assert torch.equal(beside["other"].record["distance"], ran.record["distance"])
    with pytest.raises(SettingError, match=r"dose cannot run.*several tokens"):
        tasks.study(model, *sets, [site], parts="dose")
    assert tasks.study(model, *plain, [site], parts="dose").parts["dose"]


def test_several_marks_are_several_positions() -> None:
    tokenizer = organism()[1]
    texts = ("[[Mary]] and [[John]] went to the park", "[[Paul]] went")
    prompts = PromptSet.encode(tokenizer, [Prompt(t, "ab"[i]) for i, t in enumerate(texts)])
    words = [
        [tokenizer.decode(i).strip() for i in row[mask]]
        for row, mask in zip(prompts.inputs["input_ids"], prompts.spans, strict=True)
    ]
    assert words == [["Mary", "John"], ["Paul"]]
    assert torch.equal(prompts.trimmed().spans, prompts.spans)
    assert torch.equal(prompts[[1]].spans, prompts.spans[[1]])


def test_rows_may_name_two_of_three_classes_in_every_part() -> None:
    task = own_task(3)
    halves = []
    for half in (task.train[:60], task.test[:40]):
        named = torch.zeros(len(half), 3, dtype=torch.bool)
        named.scatter_(1, torch.stack([half.labels, (half.labels + 2) % 3], 1), True)
        halves.append(replace(half, answers=half.answers.masked_fill(~named[..., None], -1)))
    assert torch.equal(halves[1].other, (halves[1].labels + 2) % 3)
    found = tasks.study(organism()[0], *halves, ["L5.mid"], parts="flipping,joint")
    assert found.sites["L5.mid"].counterfactual.flipped.value > 0.9
    (variable,) = (v for k, v in found.sites["L5.mid"].variables.items() if k != "all")
    assert {target.flipped.n for target in variable.by_target.values()} != {0}
