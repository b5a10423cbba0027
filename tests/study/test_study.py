"""The study end to end, on a tiny random GPT-2 and on the bundled organism."""

import json
import math
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.organisms.prompts import build_tokenizer
from lrqp_torch import capture, models
from lrqp_torch.errors import ModelError, NonFiniteError, OutputError, SettingError, SiteError
from lrqp_torch.files import prepare_folder, sole_writer, written_whole
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.study import part
from lrqp_torch.study import preparing as stages
from lrqp_torch.study import sweep as sweeping
from lrqp_torch.study.context import Task
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.known import read_truth
from lrqp_torch.study.records import to_json
from lrqp_torch.study.results import SiteResult, StudyResults, best_site, columns_of
from lrqp_torch.study.run import run as run_study
from lrqp_torch.study.settings import Settings, VerdictSettings
from lrqp_torch.study.store import made_folder

SITES = "L0.mid,L1.pre,L1.mid"
N = 60


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-2 whose weights are large enough for edits to matter."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer([])
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=24,
        n_layer=3,
        n_head=2,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reproduce(settings: Settings) -> StudyResults:
    results = run_study(settings)
    assert results is not None
    return results


def settings(tiny: Path, out: Path, **changes: Any) -> Settings:
    return replace(
        Settings(
            model=str(tiny),
            out=out,
            n=N,
            sites=SITES,
            batch_size=16,
            figures=False,
            report=False,
            parts="flipping",
            compare_task=False,
        ),
        **changes,
    )


@pytest.fixture(scope="session")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyResults, Path]:
    out = tmp_path_factory.mktemp("run") / "new" / "folder"
    return reproduce(settings(tiny, out, figures=True)), out


def strict_json(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    parsed: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    return parsed


def comparable(results: StudyResults) -> dict[str, Any]:
    return {key: value for key, value in to_json(results).items() if key != "elapsed"}


def test_results_file_holds_every_figure(run: tuple[StudyResults, Path]) -> None:
    results, out = run
    raw = strict_json(out / "results.json")
    assert {"logit_difference", "accuracy", "io_probability"} <= raw["clean"].keys()
    assert list(raw["sites"]) == SITES.split(",")
    for site in raw["sites"].values():
        for key in ("probe_accuracy", "shuffled_accuracy"):
            low, high = site[f"{key}_interval"]
            assert 0 <= low <= site[key] <= high <= 1 and site[f"{key}_n"] == N // 2
        for condition in ("control", "counterfactual"):
            values = site[condition]
            assert values["skipped"] + values["solved"] == raw["data"]["test"] == N // 2
            assert values["infeasible"] == values["inaccurate"] == 0
            assert values["distance"] > 0 and values["euclidean"] > 0
            assert math.isfinite(values["logit_difference"])
        patch = site["interchange"]
        assert patch["prompts"] == N // 2 and patch["distance"] > 0
        assert {"flipped", "flipped_interval", "logit_difference"} <= patch.keys()
        assert {"recovered", "agreement_interval", "beyond"} <= site.keys()
        assert 0 <= site["agreement"] <= 1 and site["kl_to_interchange"] >= 0
        assert site["null"]["probes"] == 20 and isinstance(site["verdict"]["used"], bool)
        assert site["verdict"]["p_value"] <= site["verdict"]["p_adjusted"] <= 1
    assert raw["best"]["probe_accuracy_n"] == N // 4
    assert raw["settings"]["seed"] == 0 and raw["settings"]["log_odds"] == 10
    assert raw["versions"]["torch"] == metadata.version("torch")  # without what a build adds
    assert {"python", "transformers", "cvxpy", "cvxpylayers", "lrqp_torch"} <= raw[
        "versions"
    ].keys()
    assert raw["model"]["class"] == "GPT2LMHeadModel"
    assert raw["published"]["position_inverted"]["value"] == -0.99
    assert raw["ground_truth"] is None
    stages = {"model", "prompts", "capture", "fit", "interchange", "sweep", "total"}
    assert set(raw["elapsed"]) == stages
    assert StudyResults.load(out) == results


def test_figures_agree_with_the_numbers_of_each_prompt(run: tuple[StudyResults, Path]) -> None:
    results, out = run
    prompts = load_file(out / "prompts.safetensors")
    clean = prompts["clean.logit_difference"]
    assert clean.shape == (N // 2,)
    assert results.clean.logit_difference.value == pytest.approx(clean.mean().item())
    assert results.clean.accuracy.value == pytest.approx((clean > 0).double().mean().item())
    assert results.answered == results.clean.accuracy
    assert results.answered == Estimate.share(clean > 0, prompts["groups"])
    for name, site in results.sites.items():
        edited = prompts[f"{name}.counterfactual.logit_difference"]
        assert not torch.equal(edited, clean)
        assert site.counterfactual.logit_difference.value == pytest.approx(edited.mean().item())
        low, high = site.counterfactual.logit_difference.interval
        assert low < site.counterfactual.logit_difference.value < high
        eligible = [
            (before, after) for before, after in zip(clean, edited, strict=True) if before > 0
        ]
        flips = sum(int(after < 0) for _, after in eligible)
        share = site.counterfactual.flipped
        assert (share.value, share.n) == (flips / len(eligible), len(eligible))
        assert site.counterfactual.divergence.value > 0 <= site.control.divergence.value


def test_every_edit_reaches_the_odds_asked_for(run: tuple[StudyResults, Path]) -> None:
    results, out = run
    prompts = load_file(out / "prompts.safetensors")
    for name, site in results.sites.items():
        assert site.worst_log_odds_margin >= 0
        for condition in sweeping.CONDITIONS:
            margin = (
                prompts[f"{name}.{condition}.log_odds_after"] - prompts[f"{name}.{condition}.floor"]
            )
            assert getattr(site, condition).worst_log_odds_margin == margin.min().item() >= 0
        # Source and target agree in the control edit, so the mirror rule asks for 10 exactly.
        assert torch.equal(
            prompts[f"{name}.control.floor"], torch.full((N // 2,), 10.0, dtype=torch.float64)
        )


@pytest.mark.parametrize("name", ["sweep", "histogram", "scatter"])
def test_figures_are_drawn(run: tuple[StudyResults, Path], name: str) -> None:
    from matplotlib.image import imread

    results, out = run
    pixels = imread(out / f"{name}.png")
    assert min(pixels.shape[:2]) > 500
    assert pixels[..., :3].std() > 0.03
    text = " ".join(ElementTree.parse(out / f"{name}.svg").getroot().itertext())
    assert "logit" in text
    for site in results.sites if name == "sweep" else [results.best_site]:
        assert site in text


def test_the_seed_decides_everything(tiny: Path, tmp_path: Path) -> None:
    first = reproduce(settings(tiny, tmp_path / "first", seed=3))
    torch.manual_seed(99)
    again = reproduce(settings(tiny, tmp_path / "again", seed=3))
    other = reproduce(settings(tiny, tmp_path / "other", seed=4))
    assert comparable(first) == comparable(again)
    assert comparable(first)["clean"] != comparable(other)["clean"]
    numbers = [load_file(tmp_path / run / "prompts.safetensors") for run in ("first", "again")]
    assert all(torch.equal(numbers[0][key], numbers[1][key]) for key in numbers[0])


def halves(tokenizer: Any, chosen: Settings) -> tuple[Any, Any]:
    task = stages.named_task(tokenizer, chosen)
    return task.train, task.test


def test_training_and_held_out_prompts_are_disjoint(tiny: Path, tmp_path: Path) -> None:
    _, tokenizer = models.load(tiny)
    chosen = settings(tiny, tmp_path, n=50, train_share=0.3, prefixes="bundled")
    train, test = halves(tokenizer, chosen)
    assert (len(train), len(test)) == (15, 35)
    assert not set(train.prompts) & set(test.prompts)
    assert all(train.data.prefixes)
    assert (test.positions["END"] == test.inputs["input_ids"].shape[1] - 1).all()


def test_held_out_prompts_do_not_reach_the_fit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokenizer = models.load(tiny)
    train, test = halves(tokenizer, settings(tiny, tmp_path))
    other = IOIPrompts.of(IOIDataset.generate(tokenizer, 40, seed=9, padding_side="left"))
    original, fitted = part.fit_edits, []

    def record(*args: Any, **kwargs: Any) -> dict[str, Any]:
        fitted.append(original(*args, **kwargs))
        return fitted[-1]

    monkeypatch.setattr(part, "fit_edits", record)
    results = []
    for both in ((train, test), (train, other), (other, test)):
        drawn = Task("plain", *both)
        monkeypatch.setattr(stages, "named_task", lambda tokenizer, settings, t=drawn: t)
        results.append(reproduce(settings(tiny, tmp_path)))
    same, changed_test, changed_train = (
        {
            f"{site}.{key}": value
            for site, edit in run.items()
            for key, value in edit.state_dict().items()
            if key.startswith(("probe.", "metric."))
        }
        for run in fitted
    )
    assert same.keys() == changed_test.keys() and len(same) >= 3 * 2
    assert all(torch.equal(same[key], changed_test[key]) for key in same)
    assert not all(torch.equal(same[key], changed_train[key]) for key in same)
    assert results[0].clean != results[1].clean


@pytest.mark.parametrize("prefixes", ["none", "bundled"])
def test_replay_gives_what_the_whole_forward_pass_gives(
    tiny: Path, tmp_path: Path, prefixes: str
) -> None:
    model, tokenizer = models.load(tiny)
    chosen = settings(tiny, tmp_path, prefixes=prefixes)
    train, test = halves(tokenizer, chosen)
    sites = stages.choose_sites(model, "all,L2.post")
    activations = capture(model, train.inputs, sites, positions=train.positions["S2"])
    edits = sweeping.fit_edits(activations, train.labels)
    swept = sweeping.sweep(model, test, edits, batch_size=11)
    rows = torch.arange(len(test))

    def difference(logits: torch.Tensor) -> torch.Tensor:
        last = logits[:, -1].double()
        return last[rows, test.io_tokens] - last[rows, test.s_tokens]

    with torch.no_grad():
        clean = difference(model(**test.inputs).logits)
        torch.testing.assert_close(swept["clean.logit_difference"], clean, atol=2e-4, rtol=1e-4)
        for site, edit in edits.items():
            for condition, target in (
                ("control", test.labels),
                ("counterfactual", 1 - test.labels),
            ):
                with edit.at(
                    model,
                    site,
                    positions=test.positions["S2"],
                    target=target,
                    source=test.labels,
                ) as run:
                    full = difference(model(**test.inputs).logits)
                effects = columns_of(swept, f"{site}.{condition}")
                torch.testing.assert_close(effects["logit_difference"], full, atol=2e-4, rtol=1e-4)
                torch.testing.assert_close(
                    effects["distance"], run.distance.double(), atol=1e-4, rtol=1e-3
                )
    # Nothing reads S2 after the last block, and something does before it.
    last = swept["L2.post.counterfactual.logit_difference"]
    torch.testing.assert_close(last, clean, atol=2e-4, rtol=1e-4)
    first = swept["L0.mid.counterfactual.logit_difference"]
    assert (first - clean).abs().max() > 0.1


def test_batches_do_not_change_the_results(tiny: Path, tmp_path: Path) -> None:
    large = reproduce(settings(tiny, tmp_path, batch_size=64))
    first = load_file(tmp_path / "prompts.safetensors")
    reproduce(settings(tiny, tmp_path, batch_size=7))
    second = load_file(tmp_path / "prompts.safetensors")
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], atol=1e-3, rtol=1e-3)
    assert large.data == {"train": N // 2, "test": N // 2}


def test_probe_accuracy_is_that_of_held_out_activations(
    tiny: Path, run: tuple[StudyResults, Path], tmp_path: Path
) -> None:
    results, _ = run
    model, tokenizer = models.load(tiny)
    train, test = halves(tokenizer, settings(tiny, tmp_path))
    sites = list(results.sites)
    read = {
        half: capture(model, data.inputs, sites, positions=data.positions["S2"])
        for half, data in (("train", train), ("test", test))
    }
    edits = sweeping.fit_edits(read["train"], train.labels)
    for name, site in results.sites.items():
        expected = edits[name].probe.accuracy(read["test"][name], test.labels)
        assert site.probe_accuracy.value == pytest.approx(expected)


def test_the_best_site_flips_most_beyond_its_null_and_then_moves_most() -> None:
    clean = {"clean.logit_difference": torch.ones(8), "clean.own_lead": torch.ones(8)}

    def site(name: str, flips: int, null: int, change: float) -> dict[str, torch.Tensor]:
        columns = {}
        for run, count in (("counterfactual", flips), ("control", 0), ("null", null)):
            other = torch.where(torch.arange(8) < count, 1.0, -1.0)
            columns |= {f"{name}.{run}.other_lead": other, f"{name}.{run}.own_lead": -other}
            columns[f"{name}.{run}.logit_difference"] = torch.full((8,), 1.0 + change)
        return columns

    flat = clean | site("a", 7, 5, 9.0) | site("b", 5, 0, 1.0) | site("c", 5, 0, -3.0)
    assert best_site(flat | {"null.probe": torch.zeros(8)}, ["a", "b", "c"]) == "c"
    assert best_site(flat, ["a", "b", "c"]) == "a"  # without a null, beyond the control


def test_results_before_the_test_say_used_by_their_own_rule(
    run: tuple[StudyResults, Path],
) -> None:
    results, _ = run
    template = replace(results.sites["L1.pre"], verdict=None)

    def site(own: float, control: float) -> SiteResult:
        edits = {
            name: replace(getattr(template, name), flipped=Estimate(share, 0.0, 1.0, 100))
            for name, share in (("counterfactual", own), ("control", control))
        }
        return replace(template, **edits)

    assert site(0.5, 0.0).used and site(0.6, 0.01).used
    assert not site(0.49, 0.0).used and not site(0.9, 0.7).used


def test_sites_come_in_order_without_repeats(tiny: Path) -> None:
    model, _ = models.load(tiny)
    assert stages.choose_sites(model, "L1.mid, L0.pre,L1.mid") == ["L0.pre", "L1.mid"]
    assert stages.choose_sites(model, "L2.post,all") == [
        "L0.pre",
        "L0.mid",
        "L1.pre",
        "L1.mid",
        "L2.pre",
        "L2.mid",
        "L2.post",
    ]
    for bad, message in (("L3.pre", "L3"), ("L0.attn", "L0.attn"), (" , ", "no site")):
        with pytest.raises(SiteError, match=message):
            stages.choose_sites(model, bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_share": 1.0}, "train_share"),
        ({"train_share": 0.0}, "train_share"),
        ({"n": 3}, "raise n"),
        ({"batch_size": 0}, "batch_size"),
        ({"l2": 0.0}, "l2"),
        ({"l2": -1.0}, "l2"),
        ({"l2": math.nan}, "l2"),
        ({"l2": math.inf}, "l2"),
    ],
)
def test_settings_out_of_range_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        replace(Settings(model="organism", out=tmp_path), **change)


def test_what_is_no_site_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    for names in ("L2.mix", "L2.mid-L3.pre", "all,L1"):
        with pytest.raises(SiteError, match="is no site"):
            Settings(model="organism", out=tmp_path, sites=names)
        with pytest.raises(SiteError, match="is no site"):
            VerdictSettings(out=tmp_path, sites=names)
    assert Settings(model="organism", out=tmp_path, sites="all, final,L1.H2.z").sites


def test_unknown_devices_are_refused() -> None:
    assert stages.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(SettingError, match="'abacus'"):
        stages.choose_device("abacus")


def test_the_output_folder_is_checked_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    for out in (blocked, blocked / "below"):
        with pytest.raises(OutputError, match="--out"):
            reproduce(Settings(model="organism", out=out))


def test_a_refused_run_leaves_no_folder_of_its_own(tiny: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for out in (tmp_path / "new" / "folder", mine):
        with pytest.raises(SiteError):
            reproduce(settings(tiny, out, sites="L9.mid"))
    assert list(tmp_path.iterdir()) == [mine]
    with pytest.raises(SiteError), made_folder(tmp_path / "new"):
        (tmp_path / "new" / "kept").write_text("something")
        raise SiteError("too late")
    assert (tmp_path / "new" / "kept").exists()


def test_one_run_at_a_time_writes_to_a_folder(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with sole_writer(out), pytest.raises(OutputError, match=r"process .* writes to .*out"):
        reproduce(settings(tiny, out))
    assert not list(out.iterdir())
    reproduce(settings(tiny, out))
    assert not (out / ".lock").exists()


def test_preparing_a_folder_leaves_nothing_in_it(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), written_whole(path) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_not_finite_are_refused(
    run: tuple[StudyResults, Path], tmp_path: Path
) -> None:
    results, _ = run
    site = results.sites["L1.pre"]
    broken = replace(site, counterfactual=replace(site.counterfactual, distance=math.nan))
    with pytest.raises(NonFiniteError, match=r"sites\.L1\.pre\.counterfactual\.distance is NaN"):
        replace(results, sites={"L1.pre": broken}).save(tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_a_model_that_returns_nan_is_refused(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = models.load(tiny)
    train, test = halves(tokenizer, settings(tiny, tmp_path))
    activations = capture(model, train.inputs, ["L0.mid"], positions=train.positions["S2"])
    edits = sweeping.fit_edits(activations, train.labels)
    with torch.no_grad():
        model.get_parameter("transformer.ln_f.weight").fill_(math.nan)
    with pytest.raises(NonFiniteError, match="clean run"):
        sweeping.sweep(model, test, edits)


def test_reading_results_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="--out set to this folder"):
        StudyResults.load(tmp_path)


def test_results_that_this_version_cannot_read_are_named(
    run: tuple[StudyResults, Path], tmp_path: Path
) -> None:
    results, _ = run
    results.save(tmp_path)
    path = tmp_path / "results.json"
    whole = path.read_text()
    for text, what in (
        (whole.replace('"format": 2', '"format": 1'), "format 1, but this version reads 2"),
        (whole.replace('"majority": 0.', '"majority": 1e999, "x": 0.'), "1e999"),
        (whole.replace('"majority":', '"minority":'), "majority is missing"),
        (whole[:-40], "not valid JSON"),
    ):
        assert text != whole
        path.write_text(text)
        with pytest.raises(OutputError, match=what):
            StudyResults.load(tmp_path)


def test_ground_truth_is_compared_on_the_swept_sites(tmp_path: Path) -> None:
    truth = {"used_at": ["L1.mid", "L2.pre"], "not_used_at": ["L1.pre"], "unclear_at": ["L2.mid"]}
    (tmp_path / "ground_truth.json").write_text(json.dumps(truth))

    known = read_truth(str(tmp_path))
    assert known is not None

    def compare(swept: str, used: str) -> tuple[list[str], list[str], bool]:
        found = known.compare(swept.split(), used.split())
        return found.used_sites, found.unclear_sites, found.agrees

    assert compare("L1.pre L1.mid L2.pre", "L1.mid L2.pre") == (["L1.mid", "L2.pre"], [], True)
    assert compare("L2.pre L3.pre", "L2.pre") == (["L2.pre"], [], True)
    for used in ("L2.pre", "L2.pre L2.mid"):
        assert compare("L2.pre L2.mid", used) == (["L2.pre"], ["L2.mid"], True)
    assert not compare("L1.pre L1.mid", "L1.pre L1.mid")[2]
    assert not compare("L1.pre L1.mid", "")[2]
    assert read_truth("gpt2") is None
    (tmp_path / "ground_truth.json").write_text("{}")
    with pytest.raises(ModelError, match="damaged"):
        read_truth(str(tmp_path))


def test_the_study_finds_where_the_organism_uses_the_order(tmp_path: Path) -> None:
    results = reproduce(
        Settings(
            model="organism",
            out=tmp_path,
            n=240,
            prefixes="bundled",
            parts="flipping",
            figures=False,
            report=False,
        )
    )
    assert results.clean.accuracy.value > 0.95
    assert results.ground_truth is not None
    assert results.ground_truth.agrees
    assert results.ground_truth.used_sites
    assert set(results.ground_truth.used_sites) <= set(results.used_sites)
    assert results.best_site in results.used_sites
    for site in results.sites.values():
        assert site.worst_log_odds_margin >= 0
        # Where the probe knows nothing, an edit is long and may break anything.
        if site.probe_accuracy.value > 0.95:
            assert site.control.flipped.value < 0.05 and site.control.divergence.value < 0.1
        assert 0.3 < site.shuffled_accuracy.value < 0.7
    # Knowable is not used: some site has a near perfect probe, and its edit flips nothing.
    assert any(
        site.probe_accuracy.value > 0.95 and site.counterfactual.flipped.value < 0.1
        for site in results.sites.values()
    )
