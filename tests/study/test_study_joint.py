"""Several variables at once: against plain forward passes, the sweep, and what must add up."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from contexts_for_tests import Count, check, context, given, organism, own_context
from torch import Tensor

from lrqp_torch import LRQP, LinearProbe, models, tasks
from lrqp_torch.errors import PromptError, SettingError
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.stream.intervene import Intervention, intervene
from lrqp_torch.study.context import StudyContext, Task
from lrqp_torch.study.doses import asked_of, class_readings
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.joint import METHODS
from lrqp_torch.study.methods import Training
from lrqp_torch.study.parts.joint import Joint, JointResult
from lrqp_torch.study.prompts import ALL
from lrqp_torch.study.run import run
from lrqp_torch.study.running import placed
from lrqp_torch.study.settings import Settings
from lrqp_torch.study.sweep import fit_edits, sweep

SITE, LATER = "L3.pre", "L4.pre"
PART = Joint(Training(prompts=16, epochs=1))


@cache
def two_variables() -> StudyContext:
    drawn = IOIDataset.generate(models.load("organism")[1], 160, 4, names=10, padding_side="left")
    data = IOIPrompts.of(drawn)
    task = Task("plain", data[:110], data[110:])
    names = {"variables": ("order", "identity"), "sites": [SITE, LATER]}
    return replace(context("plain", None), task=task, **names)


@cache
def result() -> JointResult:
    found: JointResult = PART.compute(given(two_variables(), SITE), Count())
    return found


def test_the_part_keeps_its_promises() -> None:
    one, count = two_variables(), Count()
    found = PART.compute(given(replace(one, sites=[SITE]), SITE), count)
    assert count.total == PART.work(replace(one, sites=[SITE]))
    check(PART, found)
    assert PART.missing(one) is None
    assert "--variables order,identity" in str(PART.missing(context("plain", None)))


def test_the_first_variable_alone_is_the_study_s_own_edit() -> None:
    one = two_variables()
    x = one.activations(one.task, "train", "mark", [SITE])
    flat = sweep(one.model, one.task.test, fit_edits(x, one.task.train.labels))
    own = result().sites[SITE]["order"]
    answered = flat["clean.own_lead"] > 0
    for condition in ("control", "counterfactual"):
        flips = (flat[f"{SITE}.{condition}.other_lead"] > 0)[answered].double().mean()
        edit = getattr(own, condition)
        assert edit.flipped.value == pytest.approx(float(flips))
        assert edit.distance == pytest.approx(
            float(flat[f"{SITE}.{condition}.distance"].mean()), rel=1e-3
        )
    assert result().prompts == len(one.task.test) and result().left_out == 0


def answered(data: IOIPrompts, site: str, values: Tensor) -> Tensor:
    item = Intervention(site, data.position, placed(values))
    with torch.no_grad(), intervene(organism(), item):
        logits = organism()(**data.inputs).logits[:, -1]
    return data.scores(logits)


def test_the_ceiling_of_all_is_the_activation_of_a_twin_with_another_s2() -> None:
    one = two_variables()
    data = one.task.test
    assert isinstance(data, IOIPrompts)
    twins = data.twins(ALL)
    assert twins is not None and bool(twins.known.all())
    there = one.twins(one.task, [SITE], variable=ALL)
    assert there is not None
    scores = answered(data, SITE, there[0][SITE])
    own, other = (scores.gather(1, c[:, None]).squeeze(1) for c in (data.labels, data.other))
    found = result().sites[SITE][ALL].interchange
    assert found is not None and found.logit_difference is not None
    assert found.logit_difference.known == pytest.approx(float((own - other).mean()), abs=1e-4)
    patch = result().row(ALL, "patch")
    assert patch is not None
    assert patch.logit_difference.known == pytest.approx(found.logit_difference.known, abs=1e-4)


def test_together_they_do_what_the_patch_does_and_below_the_read_nothing_does() -> None:
    both, order = result().sites[SITE][ALL], result().sites[SITE]["order"]
    assert both.agreement is not None and both.agreement.known > 0.9
    assert order.recovered is not None and 0.8 < order.recovered.known < 1.2
    assert order.kept is not None and order.kept.edit.flipped is not None
    # To keep what is believed of the other variable is a constraint more.
    assert order.kept.edit.distance > order.counterfactual.distance
    assert both.kept is None and order.by_target == {}
    later = result().sites[LATER]["order"].counterfactual.flipped
    assert later is not None and later.known == 0
    edits = result().additive[SITE].edits
    parts = [result().sites[SITE][name] for name in ("order", "identity", ALL)]
    clean = [found.counterfactual.logit_difference for found in parts]
    assert edits is not None and all(clean)
    rows = [result().row(one, "lrqp") for one in ("order", "identity", ALL)]
    for row, one in zip(rows, clean, strict=True):
        assert row is not None and one is not None
        assert row.logit_difference.known == pytest.approx(one.known, abs=0.05)


def test_every_method_stands_beside_the_patch_of_the_same_pairs() -> None:
    rows = {(row.variables, row.method): row for row in result().methods}
    assert {method for _, method in rows} == METHODS.keys()
    assert rows["order", "das_least"].distance <= rows["order", "das"].distance + 1e-9
    for (_, method), row in rows.items():
        assert (row.recovered is None and row.beyond is None) == (method == "patch") or row.beyond
        assert (row.kl_to_interchange is None) == (method == "patch")
    assert "rank 2" in rows[ALL, "das"].settings and "rank 1" in rows["order", "das"].settings


def test_the_least_edit_alone_reads_the_odds_that_were_asked_for_at_every_prompt() -> None:
    for row in result().methods:
        assert row.reached is not None and row.astray is not None
        if row.method in ("lrqp", "kept"):
            assert row.reached.value == 1 and row.astray.value < 1e-3
        else:
            assert row.astray.value > 0.1


def test_every_other_class_is_written_and_told_apart() -> None:
    one = replace(own_context(3), sites=[LATER])
    found = PART.compute(given(one, LATER), Count())
    (variable,) = found.variables
    targets = found.sites[LATER][variable].by_target
    labels = one.task.test.labels
    assert list(targets) == list(one.task.test.classes)
    for index, (name, target) in enumerate(targets.items()):
        assert target.prompts == int((labels != index).sum()), name
    x = one.activations(one.task, "train", "mark", [LATER])
    edit = fit_edits(x, one.task.train.labels)[LATER]
    data = one.task.test[(labels != 2).nonzero().flatten()]
    with (
        torch.no_grad(),
        edit.at(one.model, LATER, positions=data.position, target=2, source=data.labels) as run,
    ):
        scores = data.scores(one.model(**data.inputs).logits[:, -1])
    assert targets[data.classes[2]].distance == pytest.approx(float(run.distance.mean()), rel=1e-3)
    rival = scores[:, :2].amax(1)
    clean = data.scores(one.model(**data.inputs).logits[:, -1]).argmax(1) == data.labels
    flips = (scores[:, 2] > rival)[clean].double().mean()
    flipped = targets[data.classes[2]].flipped
    assert flipped is not None and flipped.known == pytest.approx(float(flips))


def test_a_file_may_have_several_labels(tmp_path: Path) -> None:
    drawn = IOIDataset.generate(models.load("organism")[1], 80, 2, names=6)
    file = tmp_path / "both.csv"
    lines = [
        f'"{text[: at + len(s)]}]]{text[at + len(s) :]}",{label},{s}'.replace(
            text[:at] + s, text[:at] + "[[" + s, 1
        )
        for text, s, label in zip(
            drawn.prompts, drawn.s_names, drawn.labels["abb"].tolist(), strict=True
        )
        for at in [text.rindex(s)]
    ]
    file.write_text("\n".join(["text,order,name", *lines]))
    prompts = tasks.read_prompts(file, label="order,name")
    assert prompts[0].further == {"name": drawn.s_names[0]}
    data = tasks.PromptSet.encode(models.load("organism")[1], prompts)
    names = data.values("name")
    assert [names.classes[k] for k in names.labels.tolist()] == list(drawn.s_names)
    study = tasks.study(organism(), data[:50], data[50:], LATER)
    found = study.sites[LATER].variables
    assert list(found) == ["class", "name", ALL]
    assert found["name"].probe_accuracy.n == found[ALL].prompts <= 30
    with pytest.raises(PromptError, match="each once"):
        tasks.read_prompts(file, label="order,order")
    with pytest.raises(PromptError, match="all prompts the same"):
        tasks.PromptSet.encode(
            models.load("organism")[1], [*prompts[:-1], replace(prompts[-1], further={})]
        )
    with pytest.raises(SettingError, match="they know name"):
        data.values("tense")


def test_twins_in_one_of_several_variables_are_alike_in_the_others() -> None:
    tokenizer = models.load("organism")[1]
    made = [
        tasks.Prompt("Mary went", order, None, "1", further={"name": name})
        for order in "ab"
        for name in ("Mary", "John")
    ]
    data = tasks.PromptSet.encode(tokenizer, made)
    for variable, rows in ((None, [2, 3, 0, 1]), ("name", [1, 0, 3, 2]), (ALL, [3, 2, 1, 0])):
        twins = data.twins(variable)
        assert twins is not None and twins.rows is not None
        assert twins.rows.tolist() == rows


def test_prompts_have_as_many_names_as_asked_for() -> None:
    tokenizer = models.load("organism")[1]
    data = IOIDataset.generate(tokenizer, 200, 0, names=12)
    assert len({*data.s_names, *data.io_names}) == 12
    assert IOIDataset.generate(tokenizer, 200, 0, names=12).prompts == data.prompts
    for wrong in (1, 2.0, 10_000):
        with pytest.raises(PromptError, match="names is"):
            IOIDataset.generate(tokenizer, 20, 0, names=wrong)  # type: ignore[arg-type]
    prompts = IOIPrompts.of(data)
    identity = prompts[:7].values("identity")
    assert len(identity.classes) == 12
    assert [identity.classes[k] for k in identity.labels] == list(data.s_names[:7])


def test_a_dose_from_data_asks_for_what_is_read_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.randn(90, 8, generator=generator) + 2 * torch.nn.functional.one_hot(y, 8)
    probe, target = LinearProbe.fit(x, y), (y + 1) % 3
    twin = x.roll(7, 0)
    wanted = asked_of("twin", probe, target, twin, x, y)
    edit = LRQP(probe, fit_edits({"": x}, y)[""].metric)
    solution = edit.solve(x.double(), target, asked=wanted)
    short = probe.log_odds(x, target) < wanted
    after = probe.double().log_odds(solution.x_new, target)
    # Exactly what the probe reads of the twin where it reads less, and nothing more elsewhere.
    assert torch.allclose(after[short], wanted[short], atol=1e-4)
    assert torch.equal(solution.x_new[~short], x.double()[~short])
    medians = class_readings(probe, x, y)
    assert torch.equal(asked_of("class", probe, target, twin, x, y), medians[target])
    own = probe.log_odds(x, y)
    assert all(float((own[y == k] >= medians[k]).double().mean()) >= 0.5 for k in range(3))
    assert bool(asked_of("nats", probe, target, twin, x, y).isnan().all())
    with pytest.raises(SettingError, match="dose must be one of"):
        Settings("organism", Path(), dose="grams")
    with pytest.raises(SettingError, match="variables"):
        Settings("organism", Path(), variables="identity")


def test_a_dose_by_the_twin_reads_the_twin_in_the_model() -> None:
    one = replace(two_variables(), sites=[SITE])
    asked = given(one, SITE)
    dosed = replace(asked, settings=replace(asked.settings, dose="twin"))
    found = PART.compute(dosed, Count()).sites[SITE]["order"]
    plain = result().sites[SITE]["order"]
    assert found.kl_to_interchange is not None and plain.kl_to_interchange is not None
    # Of its own class each prompt's probe reads already what it is asked for.
    assert found.control.distance < 1e-3
    assert found.counterfactual.worst_log_odds_margin >= 0
    assert found.agreement is not None and found.agreement.known > 0.95


def test_a_dosed_sweep_asks_each_prompt_for_its_twin_s_reading(tmp_path: Path) -> None:
    common = {"n": 60, "sites": SITE, "parts": "flipping", "figures": False, "report": False}
    found = {
        dose: run(Settings("organism", tmp_path / dose, dose=dose, **common))  # type: ignore[arg-type]
        for dose in ("nats", "twin", "class")
    }
    floors = {dose: study.prompts[f"{SITE}.counterfactual.floor"] for dose, study in found.items()}
    assert bool((floors["nats"] >= 10).all())
    assert len(floors["class"].unique()) == 2 and len(floors["twin"].unique()) > 20
    for study in found.values():
        assert study.sites[SITE].worst_log_odds_margin >= 0
    assert found["twin"].sites[SITE].control.distance < 1e-3
    assert found["twin"].sites[SITE].counterfactual.flipped.known > 0.9


def test_classes_that_too_few_prompts_have_are_named() -> None:
    task = two_variables().task
    few = replace(two_variables(), task=replace(task, train=task.train[:4]))
    with pytest.raises(PromptError, match="order and identity"):
        PART.compute(given(few, SITE), Count())
