"""The organism's training: its parts against independent ones, and the script end to end."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from benchmarks.organisms.forward import attention_mask, run_blocks, site_names
from benchmarks.organisms.prompts import Prompts, build_tokenizer
from benchmarks.organisms.recipe import KINDS, RECIPES, Progress, Recipe, new_model
from benchmarks.organisms.recipe import Kind as Use
from benchmarks.organisms.train import main
from benchmarks.organisms.training import (
    Kind,
    OrderStatistics,
    Readers,
    _one_of_each_pair,
    draw_plan,
    train,
)
from benchmarks.organisms.truth import ask, interchange_flip_rates
from lrqp_torch.errors import OutputError
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.ioi.prefixes import bundled
from lrqp_torch.models import load

TINY = Recipe(layers=4, width=16, heads=2, tokens=96)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    tokenizer = build_tokenizer(bundled())
    return Prompts.from_dataset(
        IOIDataset.generate(tokenizer, 24, 5, "bundled", padding_side="left")
    )


def test_the_tokenizer_depends_on_the_words_alone() -> None:
    forwards = build_tokenizer(["One two.", "Three."])
    backwards = build_tokenizer(["Three.", "two One."])
    assert forwards.get_vocab() == backwards.get_vocab()


def test_the_written_out_forward_pass_is_gpt2s(prompts: Prompts) -> None:
    model = new_model(TINY, build_tokenizer(bundled())).eval()
    embedded = model.transformer.wte(prompts.ids) + model.transformer.wpe(prompts.position_ids)
    mask = attention_mask(prompts.present, prompts.ids.shape[1])
    with torch.no_grad():
        ours = run_blocks(model, embedded, mask, lambda _, stream: stream).last
        theirs = model.transformer(
            input_ids=prompts.ids,
            attention_mask=prompts.present.long(),
            position_ids=prompts.position_ids,
        ).last_hidden_state
    torch.testing.assert_close(
        model.transformer.ln_f(ours)[prompts.present],
        theirs[prompts.present],
        rtol=1e-4,
        atol=1e-4,
    )


def test_running_the_last_tokens_alone_changes_nothing(prompts: Prompts) -> None:
    model = new_model(TINY, build_tokenizer(bundled())).eval()
    embedded = model.transformer.wte(prompts.ids) + model.transformer.wpe(prompts.position_ids)
    n = prompts.ids.shape[1]
    start = int(prompts.s2.min())
    with torch.no_grad():
        whole = run_blocks(model, embedded, attention_mask(prompts.present, n), lambda _, s: s)
        past = [(key[:, :, :start], value[:, :, :start]) for key, value in whole.keys_values]
        mask = attention_mask(prompts.present, n - start)
        part = run_blocks(model, embedded[:, start:], mask, lambda _, s: s, past)
    torch.testing.assert_close(part.last[:, -1], whole.last[:, -1], rtol=1e-4, atol=1e-4)


def test_twins_have_the_same_answer_and_the_other_order(prompts: Prompts) -> None:
    twins = prompts.twins()
    assert torch.equal(twins.answer, prompts.answer)
    assert torch.equal(twins.subject, prompts.subject)
    assert torch.equal(twins.abb, 1 - prompts.abb)
    assert (twins.ids != prompts.ids).sum() == 2 * len(prompts)
    both = prompts.with_twins()
    assert torch.equal(both.ids[len(prompts) :], twins.ids)


def test_renaming_keeps_order_answer_and_subject_consistent(prompts: Prompts) -> None:
    names = torch.tensor([7, 11, 13])
    renamed = prompts.renamed(names)
    assert torch.isin(renamed.answer, names).all()
    assert (renamed.answer != renamed.subject).all()
    second = renamed.ids[renamed.rows, renamed.second]
    assert torch.equal((renamed.subject == second).long(), renamed.abb)


def test_scrambling_leaves_everything_from_the_first_name_on(prompts: Prompts) -> None:
    scrambled = prompts.scrambled(torch.ones(len(prompts), 1), torch.full_like(prompts.ids, 1))
    after = torch.arange(prompts.ids.shape[1]) >= prompts.first[:, None]
    assert torch.equal(scrambled.ids[after], prompts.ids[after])
    assert (scrambled.ids[~after & prompts.present] == 1).all()
    assert torch.equal(scrambled.ids[~prompts.present], prompts.ids[~prompts.present])


def test_a_linear_edit_reaches_the_log_odds_and_moves_along_the_means() -> None:
    means = torch.randn(2, 6)
    abb = torch.arange(4000) % 2
    x = means[abb] + torch.randn(4000, 6)
    statistics = OrderStatistics(1, 6, ridge=0.0)
    statistics.update(x[None], abb)
    sites = torch.zeros(4000, dtype=torch.long)
    edited = statistics.edited(x, sites, 1 - abb, torch.ones(4000))
    between = statistics.means[0, 1] - statistics.means[0, 0]
    weight = torch.linalg.solve(statistics.within[0], between)
    odds_before, odds = ((v - statistics.means[0].mean(0)) @ weight for v in (x, edited))
    asked = odds_before.abs().clamp(min=10)
    torch.testing.assert_close(odds * (1 - 2 * abb), asked, rtol=1e-3, atol=1e-2)
    moved = edited - x
    cosine = torch.nn.functional.cosine_similarity(moved, between.expand_as(moved))
    torch.testing.assert_close(cosine, 1.0 - 2 * abb)


def test_a_plan_asks_for_flips_at_the_used_sites_alone(prompts: Prompts) -> None:
    both = prompts.with_twins()
    sites = site_names(4)
    used = range(sites.index("L1.mid"), sites.index("L2.pre") + 1)
    activations = torch.randn(len(sites), len(both), 16)
    statistics = OrderStatistics(len(sites), 16)
    statistics.update(activations, both.abb)
    for _ in range(20):
        plan = draw_plan(both, activations, statistics, used, push=1.0)
        inside = (plan.sites >= used.start) & (plan.sites < used.stop)
        assert not plan.flips[~inside].any()
        assert plan.flips[inside & (plan.kinds == Kind.TWIN)].all()
        swapped = plan.kinds == Kind.TWIN
        partner = both.rows.roll(len(prompts))
        torch.testing.assert_close(
            plan.values[swapped], activations[plan.sites, partner][swapped], rtol=0, atol=0
        )


def test_without_an_edit_asking_is_the_model_itself(prompts: Prompts) -> None:
    model, tokenizer = load("organism")
    data = IOIDataset.generate(tokenizer, 16, 6, padding_side="left")
    asked = ask(model, Prompts.from_dataset(data))  # type: ignore[arg-type]
    with torch.no_grad():
        logits = model(**data.inputs).logits[:, -1]
    rows = torch.arange(16)
    torch.testing.assert_close(
        asked.difference,
        logits[rows, data.io_tokens] - logits[rows, data.s_tokens],
        rtol=1e-3,
        atol=1e-3,
    )


def test_a_swap_of_equal_streams_flips_nothing_that_was_right() -> None:
    model, tokenizer = load("organism")
    data = IOIDataset.generate(tokenizer, 32, 7, padding_side="left")
    rates = interchange_flip_rates(model, Prompts.from_dataset(data))  # type: ignore[arg-type]
    # Before the first block S2 holds its own name and position, which twins share.
    assert rates["L0.pre"] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_script_writes_a_model_that_loads(kind: Use, tmp_path: Path) -> None:
    out = tmp_path / "new" / "organism"
    sizes = "--steps 3 --batch 8 --pool 64 --measured 24 --threads 1 --save-every 2"
    main(["--kind", kind, "--out", str(out), *sizes.split()])
    record = json.loads((out / "ground_truth.json").read_text(encoding="utf-8"))
    listed = {*record["used_at"], *record["not_used_at"], *record["unclear_at"]}
    assert listed == set(RECIPES[kind].sites) == set(record["interchange_flip_rate"])
    assert f"--kind {kind} --steps 3 --seed {RECIPES[kind].seed}" in record["command"]
    assert record["kind"] == kind
    assert record["recipe"] == vars(replace(RECIPES[kind], steps=3, batch=8, pool=64))
    model, tokenizer = load(out)
    assert model.config.n_layer == RECIPES[kind].layers
    assert len(tokenizer) == model.config.vocab_size
    # Stored in half precision, once each, and computed with in single.
    stored = safetensors.torch.load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert model.dtype == torch.float32 and len(stored) == len(list(model.parameters()))
    assert all(torch.equal(model.state_dict()[n], stored[n].float()) for n in stored)


def test_one_of_each_pair_is_drawn_and_both_orders_occur() -> None:
    for _ in range(50):
        first = torch.randint(0, 2, (2,))
        rows = _one_of_each_pair(torch.cat([first, 1 - first]))
        assert torch.equal(rows % 2, torch.arange(2))
        assert torch.cat([first, 1 - first])[rows].unique().numel() == 2


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_trains_and_the_same_seed_gives_the_same_weights(
    kind: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_step_a_stage(progress: Progress) -> None:
        progress.stage = progress.step

    monkeypatch.setattr(Progress, "advance", one_step_a_stage)
    tokenizer = build_tokenizer(bundled())
    recipe = replace(
        RECIPES[kind], steps=3, batch=8, pool=64, layers=4, width=16, heads=2, last_read="L2.pre"
    )
    reports: list[tuple[int, float, float]] = []

    def report(progress: Progress, _: object) -> None:
        assert math.isfinite(progress.loss)
        reports.append((progress.stage, progress.loss, progress.edited))

    first, second = (train(recipe, tokenizer, report).state_dict() for _ in range(2))
    assert [stage for stage, *_ in reports] == [1, 2, 3] * 2
    assert reports[:3] == reports[3:]
    assert all(torch.equal(first[name], second[name]) for name in first)
    untrained = new_model(recipe, tokenizer).state_dict()
    assert not torch.equal(first["transformer.wpe.weight"], untrained["transformer.wpe.weight"])


def test_an_unwritable_folder_is_refused_before_training(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(OutputError, match="--out"):
        main(["--out", str(blocker / "organism"), "--steps", "1000000"])


@pytest.mark.parametrize(("option", "least"), [("--steps", 1), ("--batch", 8), ("--measured", 1)])
def test_too_small_a_size_is_refused(
    option: str, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([option, str(least - 1)])
    assert f"too few: give at least {least}" in capsys.readouterr().err


def test_the_recipe_names_its_sites() -> None:
    recipe = replace(Recipe(), layers=2, first_known="L0.mid", last_read="L1.pre")
    assert recipe.sites == ("L0.pre", "L0.mid", "L1.pre", "L1.mid", "L1.post")
    assert list(recipe.used) == [1, 2]
    for kind in ("present", "absent"):
        unused = replace(recipe, kind=kind)
        assert list(unused.used) == []
        # Its borders still say where S2 is read for the last time.
        assert unused.used.start == unused.used.stop == 3


def test_without_used_sites_no_edit_may_change_the_answer(prompts: Prompts) -> None:
    both = prompts.with_twins()
    recipe = replace(TINY, kind="present", last_read="L2.pre")
    activations = torch.randn(len(recipe.sites), len(both), 16)
    statistics = OrderStatistics(len(recipe.sites), 16)
    statistics.update(activations, both.abb)
    rows = both.rows.tolist()
    for _ in range(20):
        plan = draw_plan(both, activations, statistics, recipe.used, push=0.0)
        assert not plan.flips.any()
        # Up to the last read the name at S2 counts, so the stream of no other prompt is put there.
        other = (plan.kinds == Kind.OTHER) & (plan.sites < recipe.used.stop)
        unmoved = activations[plan.sites, rows]
        torch.testing.assert_close(plan.values[other], unmoved[other])


def test_what_is_left_of_the_order_is_its_formula_and_zero_for_equal_twins() -> None:
    torch.manual_seed(3)
    n, d = 40, 5
    abb = torch.arange(n) % 2
    abb = torch.cat([abb, 1 - abb])
    shared = torch.randn(2, n, d).repeat(1, 2, 1)
    activations = shared + 0.3 * abb[:, None] * torch.tensor([1.0, 0, 0, -2.0, 0])
    statistics = OrderStatistics(2, d)
    statistics.update(activations, abb)
    assert float(statistics.left(shared, abb)) == 0.0

    expected = []
    for site in range(2):
        x = activations[site].double()
        of_order = [x[abb == order] for order in (0, 1)]
        gap = of_order[1].mean(0) - of_order[0].mean(0)
        within = sum((part - part.mean(0)).T @ (part - part.mean(0)) for part in of_order) / (2 * n)
        ridge = 0.001 * within.trace() / d * torch.eye(d)
        unlike = (x[:n] - x[n:]).square().mean() / x.var(0).mean()
        expected.append(unlike + 0.1 * gap @ torch.linalg.inv(within + ridge) @ gap)
    left = statistics.left(activations, abb)
    torch.testing.assert_close(left.double(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


def test_what_is_left_shrinks_along_its_gradient() -> None:
    torch.manual_seed(4)
    abb = torch.cat([torch.zeros(30), torch.ones(30)]).long()
    activations = torch.randn(1, 60, 4, requires_grad=True)
    statistics = OrderStatistics(1, 4)
    statistics.update(activations.detach(), abb)
    before = statistics.left(activations, abb)
    (gradient,) = torch.autograd.grad(before, activations)
    assert statistics.left(activations.detach() - 0.5 * gradient, abb) < before


def test_the_last_token_is_told_the_order_or_the_name(prompts: Prompts) -> None:
    flips = torch.rand(len(prompts)) < 0.5
    for kind in KINDS:
        readers = Readers(replace(TINY, kind=kind, last_read="L2.pre"), 50)
        told = readers.told(prompts, flips)
        by_order = kind in ("used", "spread")
        if by_order:
            assert torch.equal(told == prompts.abb, ~flips)
        else:
            assert torch.equal(told, prompts.subject)
        assert readers.end.out_features == (2 if by_order else 50)
        assert hasattr(readers, "orders") == (kind != "absent")
