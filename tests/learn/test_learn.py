"""Learned edits: the loss and its gradient, what is left alone, and what comes of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models_for_tests import POST_MODELS, Prompts, build, hook_count, in_double, random_edit
from torch import Tensor, nn

import lrqp_torch as lrqp
from lrqp_torch.errors import LearningError, PositionError, WidthError
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.learn import (
    EditPrompts,
    LearnOptions,
    Weights,
    answer_difference,
    counterfactual_wins,
    learn,
    principal_angles,
)
from lrqp_torch.learn.objective import Workload, loss_runs, total
from lrqp_torch.learn.parameters import TrainableEdit
from lrqp_torch.models import load
from lrqp_torch.stream.sites import Site

SITE = "L1.mid"
CPU = torch.device("cpu")
ALL_PARTS = {"probe": True, "log_odds": True, "metric": True, "rank": 2, "seed": 0}


def prompts_for(n: int, seed: int, side: str = "left", n_classes: int = 2) -> EditPrompts:
    """Random prompts of 6 to 9 tokens, edited at the fourth token, read at the last."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 10, (n,), generator=generator).tolist()
    made = Prompts.random(lengths, seed)
    tokens = torch.randperm(61, generator=generator)[:2]
    source = torch.arange(n) % n_classes
    return EditPrompts(
        inputs=made.padded(side),
        positions=made.columns(torch.full((n,), 3), side),
        target=(source + 1) % n_classes,
        source=source,
        read=made.columns(torch.tensor(lengths) - 1, side),
        wins=tokens[0].repeat(n),
        loses=tokens[1].repeat(n),
    )


def start_for(model: nn.Module, prompts: EditPrompts, n_classes: int = 2, **options: Any):
    x = lrqp.capture(model, prompts.inputs, SITE, prompts.inputs["attention_mask"].bool())[SITE]
    return random_edit(x, n_classes, **{"rule": "fixed", "log_odds": 4.0, **options})


def same(first: lrqp.LRQP, second: lrqp.LRQP) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_terms_are_those_of_plain_edits_in_the_full_model(side: str, n_classes: int) -> None:
    """The objective, both divergences and the size, each computed without this package's loss."""
    model = build("llama").requires_grad_(False)
    prompts, others = (prompts_for(6, seed, side, n_classes) for seed in (0, 1))
    start = start_for(model, prompts, n_classes, log_odds=12.0)
    edit = TrainableEdit(start, CPU, **{**ALL_PARTS, "metric": False})
    loads = [Workload(model, Site.parse(SITE), item, 4) for item in (prompts, others)]
    rows = torch.tensor([4, 1, 5])
    runs = list(loss_runs(edit, loads[0], rows, counterfactual_wins, Weights(), (loads[1], rows)))
    terms = {name: float(term.detach()) for run in runs for name, term in run.items()}

    def plain(all_prompts: EditPrompts, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch = all_prompts[rows]
        clean = model(**batch.inputs).logits.log_softmax(-1)
        with start.at(
            model, SITE, positions=batch.positions, target=target[rows], source=batch.source
        ) as run:
            logits = model(**batch.inputs).logits
        kl = (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)
        return logits, kl, run.distance

    def mean_over(kl: Tensor, batch: EditPrompts, read: bool) -> float:
        values = [
            kl[i, column]
            for i in range(len(batch))
            for column in range(kl.shape[1])
            if batch.inputs["attention_mask"][i, column] and column >= batch.positions[i]
            if read or column != batch.read[i]
        ]
        return float(torch.stack(values).mean())

    logits, kl, distance = plain(prompts, prompts.target)
    batch = prompts[rows]
    read = logits[torch.arange(3), batch.read]
    gap = read[:, prompts.loses[0]] - read[:, prompts.wins[0]]
    expected = {
        "objective": float((1 + gap.exp()).log().mean()),
        "size": float(distance.square().mean()),
        "elsewhere": mean_over(kl, batch, read=False),
        "control": mean_over(plain(prompts, prompts.source)[1], batch, read=True),
        "unrelated": mean_over(plain(others, others.target)[1], others[rows], read=True),
    }
    assert terms == pytest.approx(expected, rel=1e-4)
    assert min(expected.values()) > 1e-4
    weights = Weights(2.0, 3.0, 5.0, 7.0)
    summed = sum(float(total(run, weights).detach()) for run in runs)
    factors = {"objective": 1, "elsewhere": 2, "control": 3, "unrelated": 5, "size": 7}
    assert summed == pytest.approx(sum(factors[k] * v for k, v in expected.items()), rel=1e-4)


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("rule", ["fixed", "mirror"])
def test_gradients_are_finite_differences(name: str, rule: str) -> None:
    """Of the whole loss, in every free parameter, through the program and the layers above."""
    model = in_double(build(name)).requires_grad_(False)
    prompts = prompts_for(5, 0, n_classes=3)
    edit = TrainableEdit(start_for(model, prompts, 3, rule=rule), CPU, **ALL_PARTS)
    load = Workload(model, Site.parse(SITE), prompts, 8)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in edit.free.values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        runs = loss_runs(edit, load, torch.arange(5), counterfactual_wins, Weights())
        return torch.stack([total(run, Weights()) for run in runs]).sum()

    gradients = torch.autograd.grad(loss(), list(edit.free.values()))
    for (label, tensor), gradient in zip(edit.free.items(), gradients, strict=True):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * 1e-5 * direction
                values.append(float(loss()))
                tensor -= sign * 1e-5 * direction
        difference = (values[0] - values[1]) / 2e-5
        autograd = float((gradient * direction).sum())
        assert autograd == pytest.approx(difference, rel=1e-4, abs=1e-7), label
        if label != "log_odds" or rule == "fixed":
            assert abs(difference) > 1e-6, label


def test_the_metric_stays_one_and_the_size_keeps_its_ruler() -> None:
    model, prompts = build("gpt2").requires_grad_(False), prompts_for(6, 0)
    start = start_for(model, prompts, rule="mirror", log_odds=20.0)
    edit = TrainableEdit(start, CPU, **ALL_PARTS)
    with torch.no_grad():
        for tensor in edit.free.values():
            tensor += 3 * torch.randn(tensor.shape, dtype=torch.float64)
        edit.free["log_odds"].fill_(-20.0)
    made = edit.finish(CPU)
    assert float(torch.linalg.eigvalsh(made.metric.covariance).min()) > 0
    assert 0 < float(made.log_odds) < 1e-6
    assert start.metric.shrinkage < made.metric.shrinkage < 1

    with torch.no_grad():
        edit.free["log_odds"].fill_(0.0)
    outcome = Workload(model, Site.parse(SITE), prompts, 8).edited(edit, torch.arange(6))
    x = lrqp.capture(model, prompts.inputs, SITE, prompts.positions)[SITE]
    moved = outcome.applied.solution.x_new.detach().double() - x.double()
    squared = start.metric.distance(moved).square()
    torch.testing.assert_close(outcome.applied.squared.detach(), squared, rtol=1e-3, atol=1e-3)
    own = edit.finish(CPU).metric.distance(moved).square()
    changed = squared > 0.1
    assert int(changed.sum()) >= 3
    assert float((own / squared - 1)[changed].abs().min()) > 0.1


def test_it_starts_at_the_start_and_trains_only_what_is_asked() -> None:
    model, prompts = build("gpt2"), prompts_for(8, 0)
    start = start_for(model, prompts)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    fresh = TrainableEdit(start, CPU, **{**ALL_PARTS, "metric": False}).finish(CPU)
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-12, atol=1e-14)
    owners = {
        "probe": {"probe.weight", "probe.bias"},
        "log_odds": {"log_odds"},
        "metric": {"metric.covariance"},
    }
    for part, names in owners.items():
        switches = {name: name == part for name in owners}
        options = LearnOptions(epochs=2, batch_size=4, **switches)
        learned = learn(model, SITE, start, prompts, options=options)
        now = learned.edit.state_dict()
        assert {name for name in before if not torch.equal(now[name], before[name])} == names
        assert all(torch.equal(start.state_dict()[name], before[name]) for name in before)
    with pytest.raises(LearningError, match="nothing to train"):
        none = LearnOptions(probe=False, log_odds=False, metric=False)
        learn(model, SITE, start, prompts, options=none)


def test_the_model_is_left_as_it_was() -> None:
    model, prompts = build("gpt2"), prompts_for(8, 0)
    next(model.parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    learn(model, SITE, start_for(model, prompts), prompts, options=LearnOptions(epochs=1))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not model.training and hook_count(model) == 0


def test_seeds_stopping_and_going_on(tmp_path: Path) -> None:
    """The same seed gives the same bits, also when the run is stopped in the middle."""
    model, prompts, held = build("gpt2"), prompts_for(10, 0), prompts_for(6, 1)
    start = start_for(model, prompts)

    def run(epochs: int, seed: int = 0, **changes: Any):
        # So fast that the last epoch is not the best.
        rate = {"learning_rate": 0.5}
        options = LearnOptions(epochs=epochs, seed=seed, batch_size=4, patience=9, **rate)
        return learn(model, SITE, start, prompts, validation=held, options=options, **changes)

    straight, again, other = run(4), run(4), run(4, seed=1)
    assert same(straight.edit, again.edit) and straight.history == again.history
    assert not same(straight.edit, other.edit)
    folder = tmp_path / "run"
    assert len(run(2, folder=folder).history) == 3
    resumed = run(4, folder=folder)
    assert same(resumed.edit, straight.edit) and resumed.history == straight.history
    assert resumed.best_epoch == straight.best_epoch
    with pytest.raises(LearningError, match="of another run"):
        run(4, seed=1, folder=folder)
    with torch.no_grad():
        model.transformer.h[2].mlp.c_fc.weight[0, 0] += 1
    with pytest.raises(LearningError, match="of another run"):
        run(4, folder=folder)


@pytest.mark.parametrize(
    "damage", ["nonsense", "lost", "shape", "float8", "NaN", "history", "best"]
)
def test_a_damaged_run_is_named(tmp_path: Path, damage: str) -> None:
    model, prompts = build("gpt2"), prompts_for(6, 0)
    start, options = start_for(model, prompts), LearnOptions(epochs=1)
    learn(model, SITE, start, prompts, options=options, folder=tmp_path)
    file = tmp_path / "learning.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        facts = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.startswith("now."))
    changed = {
        "lost": {n: t for n, t in tensors.items() if n != name},
        "shape": tensors | {name: tensors[name][None].contiguous()},
        "float8": tensors | {name: tensors[name].to(torch.float8_e4m3fn)},
        "NaN": tensors | {name: tensors[name] * float("nan")},
    }.get(damage, tensors)
    facts |= {"history": {"history": "[1e999]"}, "best": {"best_epoch": "7"}}.get(damage, {})
    blob = b"nonsense" if damage == "nonsense" else safetensors.torch.save(changed, facts)
    file.write_bytes(blob)
    with pytest.raises(LearningError, match="cannot be read"):
        learn(model, SITE, start, prompts, options=options, folder=tmp_path)


def test_early_stopping_keeps_the_best_epoch() -> None:
    model, prompts, held = build("gpt2"), prompts_for(6, 0), prompts_for(6, 1)
    start = start_for(model, prompts)
    # So fast that no epoch can be better than the start.
    options = LearnOptions(epochs=20, learning_rate=3.0, patience=2)
    learned = learn(model, SITE, start, prompts, validation=held, options=options)
    losses = [epoch.validation["loss"] for epoch in learned.history]
    assert learned.best_epoch == min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) == learned.best_epoch + 3


def test_an_edit_learned_is_an_edit_like_any_other(tmp_path: Path) -> None:
    model, prompts = build("llama"), prompts_for(12, 0)
    start = start_for(model, prompts)
    weights = Weights(0, 0, 0, 1e-4)
    options = LearnOptions(epochs=12, batch_size=6, learning_rate=0.1, weights=weights)
    learned = learn(model, SITE, start, prompts, options=options)
    losses = [epoch.train["objective"] for epoch in learned.history[1:]]
    assert losses[-1] < 0.9 * losses[0]
    loaded = lrqp.LRQP.load(learned.edit.save(tmp_path / "edit"))
    assert loaded.notes["learned"]["site"] == SITE

    def answers(edit: lrqp.LRQP) -> Tensor:
        with edit.at(
            model, SITE, positions=prompts.positions, target=prompts.target, source=prompts.source
        ) as run:
            logits = model(**prompts.inputs).logits[torch.arange(12), prompts.read]
        assert bool((run.log_odds_after >= run.floor).all())
        return answer_difference(logits, prompts).detach()

    assert torch.equal(answers(loaded), answers(learned.edit))
    assert float(answers(loaded).mean()) > float(answers(start).mean()) + 0.1
    x = lrqp.capture(model, prompts.inputs, SITE, prompts.positions)[SITE]
    y = learned.edit.probe(x).argmax(-1)
    comparison = learned.compare(x, y)
    a, b = (e.probe.weight.double() for e in (start, learned.edit))
    cosine = torch.cosine_similarity(a[1] - a[0], b[1] - b[0], dim=0)
    assert float(comparison.probe_angles) == pytest.approx(float(cosine.acos().rad2deg()))
    assert comparison.accuracy[1] == 1.0 and comparison.log_odds[1] > 0
    assert comparison.floor == (4.0, float(learned.edit.log_odds))
    assert comparison.covariance_change > 0


def test_principal_angles() -> None:
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    turn = torch.tensor([1e-7, 0.7], dtype=torch.float64)
    turned = turn.cos()[:, None] * basis[:2] + turn.sin()[:, None] * basis[2:4]
    mixed = torch.tensor([[2.0, 1.0], [0.3, -1.0]], dtype=torch.float64) @ turned
    angles = principal_angles(basis[:2], mixed)
    torch.testing.assert_close(angles, turn.rad2deg(), rtol=1e-6, atol=1e-13)
    opposite = principal_angles(basis[:1], -3 * basis[:1])
    torch.testing.assert_close(opposite, torch.tensor([180.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda logits, prompts: logits.mean() * float("nan"), "the loss is nan in epoch 1"),
        (lambda logits, prompts: logits.detach().mean(), "does not depend on the edit"),
        (lambda logits, prompts: 0 * logits.mean(), "gradient of the objective is 0"),
        (lambda logits, prompts: logits.mean(-1), "one number"),
        (lambda logits, prompts: 1.0, "one number"),
    ],
)
def test_objectives_that_cannot_be_followed(objective: Callable[..., Any], message: str) -> None:
    model, prompts = build("gpt2"), prompts_for(6, 0)
    with pytest.raises(LearningError, match=message):
        learn(model, SITE, start_for(model, prompts), prompts, objective=objective)
    assert hook_count(model) == 0 and all(p.requires_grad for p in model.parameters())


def test_any_objective_on_logits_can_be_given() -> None:
    model, prompts = build("gpt2"), prompts_for(6, 0)
    prompts = replace(prompts, wins=None, loses=None)
    start, options = start_for(model, prompts), LearnOptions(epochs=8)

    def entropy(logits: Tensor, batch: EditPrompts) -> Tensor:
        shares = logits.softmax(-1)
        return (shares * shares.clamp_min(1e-9).log()).sum(-1).mean()

    history = learn(model, SITE, start, prompts, objective=entropy, options=options).history
    assert history[-1].train["loss"] < history[1].train["loss"]
    with pytest.raises(LearningError, match="which token should win"):
        learn(model, SITE, start, prompts, options=options)


def test_what_cannot_be_learned_from_is_named() -> None:
    model, prompts = build("gpt2"), prompts_for(6, 0)
    start = start_for(model, prompts)
    with pytest.raises(LearningError, match="no prompts"):
        prompts[torch.zeros(6, dtype=torch.bool)]
    with pytest.raises(LearningError, match="in both train and validation"):
        learn(model, SITE, start, prompts, validation=prompts_for(6, 0, "right"))
    with pytest.raises(LearningError, match="source"):
        learn(model, SITE, start, replace(prompts, source=None))
    with pytest.raises(LearningError, match="training mode"):
        learn(model.train(), SITE, start, prompts)
    model.eval()
    # The probe reads the target with the odds asked for already, so the edit never moves anything.
    held = lrqp.capture(model, prompts.inputs, SITE, prompts.positions)[SITE]
    idle = replace(prompts, target=start.probe(held).argmax(-1))
    start.log_odds.fill_(1e-9)
    with pytest.raises(LearningError, match="no activation was edited"):
        learn(model, SITE, start, idle)
    before = replace(prompts, read=prompts.positions.clone(), elsewhere=None)
    before = replace(before, positions=prompts.read.clone())
    with pytest.raises((LearningError, PositionError)):
        learn(model, SITE, start, before)
    with torch.inference_mode(), pytest.raises(LearningError, match=r"torch\.inference_mode"):
        learn(model, SITE, start_for(model, prompts), prompts)
    start.log_odds.fill_(-1.0)
    with pytest.raises(LearningError, match="above 0"):
        learn(model, SITE, start, prompts)
    with pytest.raises(WidthError, match="target must be"):
        replace(prompts, target=prompts.target[:3])
    assert replace(prompts, target=prompts.target > 0).target.dtype == torch.int64
    with pytest.raises(PositionError, match="read must hold integers"):
        replace(prompts, read=prompts.read > 0)
    with pytest.raises(WidthError, match="BoolTensor"):
        replace(prompts, elsewhere=prompts.inputs["input_ids"])
    with pytest.raises(PositionError, match="outside the 9 tokens"):
        replace(prompts, read=prompts.read + 1)
    for options in ({"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"patience": 0}):
        with pytest.raises(LearningError, match="must be"):
            LearnOptions(**options)
    for options in ({"epochs": 1.5}, {"epochs": float("nan")}, {"learning_rate": "0.1"}):
        with pytest.raises(LearningError, match="must be"):
            LearnOptions(**options)
    with pytest.raises(PositionError, match=r"read lies on padding in rows \["):
        replace(prompts, read=torch.zeros(6, dtype=torch.long))
    with pytest.raises(PositionError, match="read must hold integers"):
        replace(prompts, read=prompts.read.float())
    for name, token in (("wins", 61), ("loses", -1)):
        ids = getattr(prompts, name).clone()
        ids[2] = token
        with pytest.raises(LearningError, match=rf"{name} of train holds {token} in row 2"):
            learn(model, SITE, start, replace(prompts, **{name: ids}))
    one = replace(prompts, target=1, source=0)
    assert torch.equal(one.target, torch.ones(6).long()) and one[torch.arange(2)].source.shape == (
        2,
    )
    with pytest.raises(LearningError, match="weight size"):
        Weights(size=-1.0)


def other_order(data: IOIDataset) -> EditPrompts:
    """Prompts whose edit at S2 writes the other order, so that S wins over IO at END."""
    order = data.labels["abb"]
    return EditPrompts(
        inputs=data.inputs,
        positions=data.positions["S2"],
        target=1 - order,
        source=order,
        read=data.positions["END"],
        wins=data.s_tokens,
        loses=data.io_tokens,
    )


def test_on_the_organism_it_flips_more_held_out_answers() -> None:
    """Fitted LRQP leaves a quarter of the answers at L1.mid; learned from few prompts, it flips
    nearly all of them, without moving the answers under control edits.
    """
    model, tokenizer = load("organism")
    data = IOIDataset.generate(tokenizer, 300, seed=3, prefixes="bundled", padding_side="left")
    train, test, site = data[:200], data[200:], "L1.mid"
    x = lrqp.capture(model, data.inputs, site, data.positions["S2"])[site]
    start = lrqp.LRQP.fit(x[:200], train.labels["abb"])
    # The organism says names wherever it is, so its output between S2 and END is the answer too.
    options = LearnOptions(epochs=3, learning_rate=0.03, weights=Weights(elsewhere=0))
    prompts = other_order(train)
    rows = torch.arange(200)
    learned = learn(
        model, site, start, prompts[rows[:150]], validation=prompts[rows[150:]], options=options
    )
    prompts = other_order(test)

    @torch.no_grad()
    def flipped(edit: lrqp.LRQP, target: Tensor) -> float:
        where = {"positions": prompts.positions, "source": prompts.source, "target": target}
        rows = torch.arange(len(prompts))
        clean = answer_difference(model(**prompts.inputs).logits[rows, prompts.read], prompts)
        with edit.at(model, site, **where):
            logits = model(**prompts.inputs).logits[rows, prompts.read]
        return float((answer_difference(logits, prompts)[clean < 0] > 0).double().mean())

    assert flipped(learned.edit, prompts.target) > flipped(start, prompts.target) + 0.1
    assert flipped(learned.edit, prompts.target) > 0.9
    assert flipped(learned.edit, prompts.source) < 0.02
    comparison = learned.compare(x[200:], test.labels["abb"])
    assert min(comparison.accuracy) > 0.9 and 5 < float(comparison.probe_angles) < 90
