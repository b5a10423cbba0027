"""Verdicts "used here": rules, counts against brute force, and runs on the bundled organisms."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from heads_for_tests import study_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from lrqp_torch import models
from lrqp_torch.cli import app
from lrqp_torch.errors import MissingExtraError, ModelError, SettingError
from lrqp_torch.study import methods, verdicts
from lrqp_torch.study.context import StudyContext
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.known import KnownSites, read_truth
from lrqp_torch.study.results import SiteResult
from lrqp_torch.study.running import Trials
from lrqp_torch.study.sweep import fit_edits, sweep
from lrqp_torch.study.verdicts import (
    ACCURATE,
    ALL,
    NOT_USED,
    PROBE,
    UNCLEAR,
    USED,
    Count,
    SiteScores,
    VerdictSettings,
    VerdictsResult,
    chart,
    count_all,
    findings,
    judge,
    score_sites,
)

SITES = ["L1.mid", "L4.pre"]


def score(
    truth: str = USED,
    *,
    accuracy: float = 1.0,
    control: float | None = 0.0,
    flips: float | None = 1.0,
    model: str = "m",
) -> SiteScores:
    return SiteScores(model, 0, "L1.mid", truth, accuracy, {"lrqp": control}, {"lrqp": flips})


def test_an_edit_says_used_where_half_of_the_answers_flip_beyond_the_control() -> None:
    assert score(flips=0.5).says_used("lrqp")
    assert not score(flips=0.49).says_used("lrqp")
    assert not score(flips=1.0, control=0.6).says_used("lrqp")
    assert not score(flips=None, control=None).says_used("lrqp")
    assert score(accuracy=ACCURATE).says_used(PROBE)
    assert not score(accuracy=ACCURATE - 1e-9).says_used(PROBE)
    assert score().rules == [PROBE, "lrqp"]
    assert score(UNCLEAR).right("lrqp") is None
    assert score(NOT_USED).right("lrqp") is False and score(USED).right("lrqp") is True


def test_draws_at_one_site_are_no_sites_of_their_own() -> None:
    """Ten sites right or wrong in all of six draws: the interval is that of ten."""
    one = [replace(score(flips=float(k < 6)), site=f"L{k}.mid") for k in range(10)]
    rate = Count.of("lrqp", "m", one * 6).right
    assert (rate.value, rate.n) == (0.6, 60)
    assert rate.interval == pytest.approx(Estimate.count(6, 10).interval, abs=0.02)
    assert Count.of("lrqp", "m", one).right == Estimate.count(6, 10)
    always = [replace(item, counterfactual={"lrqp": 1.0}) for item in one]
    assert Count.of("lrqp", "m", always * 6).right.interval == Estimate.count(10, 10).interval


shares = st.one_of(st.none(), st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))


def test_a_test_says_used_and_a_guard_takes_back_what_is_beyond_its_patch() -> None:
    both = {"p_adjusted": {"lrqp": 0.01}, "null": {"lrqp": 0.1}, "tested": {"lrqp": True}}
    own = replace(score(NOT_USED, flips=0.3), **both, beyond={"lrqp": True})
    assert own.rules == [PROBE, "lrqp", "lrqp:tested", "lrqp:guarded"]
    assert [own.says_used(rule) for rule in own.rules] == [True, False, True, False]
    assert own.score("lrqp:tested") == pytest.approx(0.2)
    assert replace(own, beyond={"lrqp": False}).says_used("lrqp:guarded")
    assert not replace(own, tested={"lrqp": False}).says_used("lrqp:guarded")


all_scores = st.builds(
    score,
    st.sampled_from([USED, NOT_USED, UNCLEAR]),
    accuracy=st.sampled_from([0.5, 0.89, 0.9, 1.0]),
    control=shares,
    flips=shares,
    model=st.sampled_from(["a", "b"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(all_scores, min_size=1, max_size=25))
def test_counts_are_those_of_a_table_made_by_hand(scores: list[SiteScores]) -> None:
    scores = [replace(item, site=f"L{number}.mid") for number, item in enumerate(scores)]
    counted = {(c.rule, c.model): c for c in count_all(scores)}
    names = [*{item.model for item in scores}, ALL]
    assert counted.keys() == {(rule, name) for rule in (PROBE, "lrqp") for name in names}
    for (rule, name), count in counted.items():
        table = {(said, truth): 0 for said in (True, False) for truth in (USED, NOT_USED, UNCLEAR)}
        for item in scores:
            if name not in (item.model, ALL):
                continue
            if rule == PROBE:
                said = item.probe_accuracy >= 0.9
            else:
                said = (item.counterfactual["lrqp"] or 0) - (item.control["lrqp"] or 0) >= 0.5
            table[said, item.truth] += 1
        tp, fp = table[True, USED], table[True, NOT_USED]
        fn, tn = table[False, USED], table[False, NOT_USED]
        assert (count.true_positives, count.false_positives) == (tp, fp)
        assert (count.true_negatives, count.false_negatives) == (tn, fn)
        assert count.unclear == table[True, UNCLEAR] + table[False, UNCLEAR]
        for rate, part, whole in (
            (count.right, tp + tn, tp + fp + tn + fn),
            (count.false_positive_rate, fp, fp + tn),
            (count.false_negative_rate, fn, fn + tp),
        ):
            assert rate == Estimate.count(part, whole)


def test_findings_say_what_the_counts_say() -> None:
    scores = [score(USED), score(NOT_USED, flips=0.0), score(NOT_USED, flips=0.1)]
    titles = {PROBE: "probe accuracy alone", "lrqp": "LRQP"}
    result = VerdictsResult({}, "", {}, titles, {}, scores, count_all(scores))
    lines = findings(result)
    assert lines[0].startswith("LRQP: right in 3 of 3 verdicts (100.0\u00a0%")
    assert (
        lines[1].startswith("probe accuracy alone: right in 1 of 3")
        and "false positives: 2" in lines[1]
    )
    assert lines[2] == "Most often right, in 100.0\u00a0% of the sites: LRQP."
    assert lines[-1] == "Sites said to be used that are not: probe accuracy alone (2 of 2)."
    silent = [replace(item, counterfactual={"lrqp": 0.0}) for item in scores]
    lines = findings(replace(result, scores=silent, counts=count_all(silent)))
    assert "Never say that a site is used, and so are right where none is: LRQP." in lines
    careful = [replace(item, probe_accuracy=0.5) for item in silent]
    lines = findings(replace(result, scores=careful, counts=count_all(careful)))
    assert lines[-1] == "No rule says of a site that it is used when it is not."


@pytest.fixture(scope="module")
def context() -> StudyContext:
    model, tokenizer = models.load("organism")
    return replace(study_of("", n=80, model=model, tokenizer=tokenizer), sites=SITES)


def test_scores_are_those_of_the_sweep_and_of_a_patch(context: StudyContext) -> None:
    truth = read_truth("organism")
    assert truth is not None
    chosen = ["none", "lrqp", "mean_difference", "full_patch"]
    scores, problems = score_sites(context, truth, chosen, "organism")
    assert problems == {} and [item.site for item in scores] == SITES
    assert [item.truth for item in scores] == [USED, NOT_USED]
    edits = fit_edits(context.activations(context.task, "train", "S2"), context.task.train.labels)
    flat = sweep(context.model, context.task.test, edits)
    summary = {site: SiteResult.of(flat, site, Estimate.count(0, 1), 0) for site in edits}
    for item in scores:
        there = summary[item.site]
        assert item.counterfactual["lrqp"] == there.counterfactual.flipped.value
        assert item.control["lrqp"] == there.control.flipped.value
        assert item.probe_accuracy == there.probe_accuracy.value
        assert item.says_used("lrqp") == there.used
        assert item.control["none"] == item.counterfactual["none"] == 0
        assert item.control["mean_difference"] == 0
    used, unused = scores
    # What a minimal pair writes is what the truth was found by.
    assert (used.counterfactual["full_patch"] or 0) > 0.9
    assert (unused.counterfactual["full_patch"] or 0) < 0.1
    unclear = KnownSites(frozenset(), frozenset(["L1.mid"]))
    again, _ = score_sites(context, unclear, ["none"], "organism")
    assert [item.truth for item in again] == [UNCLEAR, NOT_USED]


def test_equal_displacements_run_once_and_give_what_they_would(
    context: StudyContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[str] = []
    add = Trials.add

    def counted(self: Trials, site: str, delta: Tensor) -> object:
        trial = add(self, site, delta)
        added.append("clean" if trial is self.clean else site)
        return trial

    monkeypatch.setattr(Trials, "add", counted)
    monkeypatch.setattr(verdicts, "turns", lambda n, generator: [torch.arange(n) % 20])
    truth = KnownSites(frozenset(), frozenset())
    one = replace(context, sites=["L1.mid"])
    (found,), _ = score_sites(one, truth, ["none", "leace", "full_patch"], "organism")
    # The exchange with twins; no edit is the clean run, and so is its null; LEACE does the same
    # whatever the target, a patch does not, and each has a null.
    assert added == ["L1.mid", "clean", "clean", *["L1.mid"] * (2 + 3)]
    assert found.control["leace"] == found.counterfactual["leace"]
    assert found.control["full_patch"] != found.counterfactual["full_patch"]


def test_the_figure_frames_what_is_said_to_be_used_and_crosses_what_is_wrong() -> None:
    scores = [score(USED), score(NOT_USED, flips=0.1)]
    scores = [replace(item, site=site) for item, site in zip(scores, "ab", strict=True)]
    titles = {PROBE: "probe accuracy alone", "lrqp": "LRQP"}
    counts = count_all(scores)
    result = VerdictsResult({"seeds": 1}, "", {"m": ""}, titles, {}, scores, counts)
    heat = chart(result).panes[0].heat
    assert heat is not None and heat.columns == ["a", "b"]
    assert heat.rows == ["truth", "probe accuracy alone", "LRQP"]
    assert heat.texts == [["used", "–"], ["100", "100"], ["100", "10"]]
    assert set(heat.framed) == {(1, 0), (1, 1), (2, 0)} and list(heat.crossed) == [(1, 1)]


def test_a_method_that_cannot_be_built_is_named(
    context: StudyContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = methods.build

    def missing(name: str, data: object) -> object:
        if name == "leace":
            raise MissingExtraError("leace needs a package")
        return build(name, data)  # type: ignore[arg-type]

    monkeypatch.setattr(methods, "build", missing)
    scores, problems = score_sites(
        context, KnownSites(frozenset(), frozenset()), ["none", "leace"], "organism"
    )
    assert problems == {"leace": "MissingExtraError: leace needs a package"}
    known = [PROBE, "none", "none:tested", "none:guarded"]
    assert all(item.rules == known for item in scores)


def lrqp(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verdicts", *map(str, arguments)])


def test_the_command_judges_and_writes(tmp_path: Path) -> None:
    common = ("--models", "organism,organism-absent", "--methods", "lrqp,leace,full_patch")
    small = ("--n", 40, "--seeds", 2, "--seed", 3, "--sites", "L1.mid,L2.mid")
    result = lrqp(*common, *small, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "Seeds 3 to 4." in result.stdout and "lrqp verdicts --models organism," in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        f"verdicts.{suffix}" for suffix in ("json", "csv", "png", "svg")
    }
    raw = json.loads((tmp_path / "verdicts.json").read_text())
    assert len(raw["scores"]) == 2 * 2 * 2
    assert raw["models"] == {"organism": "used", "organism-absent": "absent"}
    rows = list(csv.DictReader((tmp_path / "verdicts.csv").open()))
    assert len(rows) == (1 + 3 * 3) * 3
    by_name = {(row["rule"], row["model"]): row for row in rows}
    own = by_name["lrqp", "organism"]
    assert int(own["true_positives"]) + int(own["false_negatives"]) == 4
    assert math.isclose(float(own["right_share"]), int(own["true_positives"]) / 4)
    assert by_name["lrqp", "organism-absent"]["false_negative_rate_share"] == ""
    assert int(by_name["lrqp", ALL]["true_positives"]) == int(own["true_positives"])

    again = lrqp(*common, *small, "--out", tmp_path / "again", "--no-figures")
    assert again.exit_code == 0, again.output
    other = json.loads((tmp_path / "again" / "verdicts.json").read_text())
    assert other["scores"] == raw["scores"] and other["counts"] == raw["counts"]
    assert not (tmp_path / "again" / "verdicts.png").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--methods", "lrqp,origami"), "unknown method 'origami'"),
        (("--methods", ","), "no method given"),
        (("--models", ","), "no model given"),
        (("--models", "gpt2-shape"), "nothing is known of where 'gpt2-shape' uses the order"),
        (("--sites", "L77.pre", "--n", "20"), "L77.pre"),
        (("--device", "quantum"), "quantum"),
    ],
)
def test_bad_input_is_one_message(
    arguments: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    result = lrqp(*arguments, "--out", tmp_path)
    assert result.exit_code == 2
    assert expected in result.stderr and "Traceback" not in result.stderr


def test_settings_are_checked(tmp_path: Path) -> None:
    for wrong in ({"n": 7}, {"seeds": 0}, {"batch_size": 0}):
        with pytest.raises(SettingError, match=next(iter(wrong))):
            VerdictSettings(tmp_path, **wrong)  # type: ignore[arg-type]
    assert "das" not in VerdictSettings(tmp_path).method_names()
    trained = {"das", "das_least", "lrqp_learned"}
    assert trained < {*VerdictSettings(tmp_path, das=True).method_names()}
    assert VerdictSettings(tmp_path, methods="full_patch,lrqp").method_names() == [
        "lrqp",
        "full_patch",
    ]
    with pytest.raises(ModelError, match="ground_truth"):
        judge(VerdictSettings(tmp_path, models=str(tmp_path), figures=False))


def test_help_names_the_options() -> None:
    text = lrqp("--help").stdout
    for option in ("--models", "--methods", "--das", "--seeds", "--out"):
        assert option in text
