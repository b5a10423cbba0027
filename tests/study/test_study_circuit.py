"""What probes and attention read under edits, against full forward passes without any replay."""

from typing import Any

import pytest
import torch
from contexts_for_tests import Count, check, computed, given, own_context
from heads_for_tests import LAYERS, edit_at, study_of, with_roles
from torch import Tensor

from lrqp_torch import LinearProbe, models
from lrqp_torch.stream.hooks import record_heads
from lrqp_torch.study import heads as roles
from lrqp_torch.study.context import Advance, StudyContext, no_progress
from lrqp_torch.study.heads import HeadsResult
from lrqp_torch.study.parts.circuit import ALL, CONDITIONS, PART, CircuitResult
from lrqp_torch.study.parts.heads import PART as HEADS

SITE = "L1.pre"
READERS, MOVERS = ["L1.H0", "L1.H3", "L0.H1"], ["L2.H1", "L1.H2", "L0.H2"]


def run(
    context: StudyContext, heads: HeadsResult, site: str = SITE, advance: Advance = no_progress
) -> CircuitResult:
    return PART.compute(given(context, site, {"heads": heads}), advance)


@pytest.fixture(scope="module")
def context() -> StudyContext:
    return study_of("gpt2")


@pytest.fixture(scope="module")
def result(context: StudyContext) -> CircuitResult:
    heads = with_roles(
        context, S_inhibition=READERS, name_mover=MOVERS, negative_name_mover=["L2.H3"]
    )
    return run(context, heads)


@pytest.fixture(scope="module")
def by_hand(context: StudyContext) -> dict[str, tuple[Tensor, tuple[Tensor, ...], Any]]:
    """Logits, all attention and the heads' outputs at END by condition, from whole forwards."""
    model, data = context.model, context.task.test
    labels, edit = data.labels, edit_at(context, SITE)
    model.set_attn_implementation("eager")
    runs = {}
    with torch.no_grad():
        for name, target in (("clean", None), ("control", labels), ("counterfactual", 1 - labels)):
            with record_heads(model, range(LAYERS), data.positions["END"]) as z:
                if target is None:
                    output = model(**data.inputs, output_attentions=True)
                else:
                    with edit.at(
                        model,
                        SITE,
                        positions=data.positions["S2"],
                        target=target,
                        source=labels,
                    ):
                        output = model(**data.inputs, output_attentions=True)
            runs[name] = output.logits[:, -1], output.attentions, z
    model.set_attn_implementation("sdpa")
    return runs


def test_attention_and_answers_are_those_of_whole_forward_passes(
    context: StudyContext, result: CircuitResult, by_hand: dict[str, Any]
) -> None:
    data = context.task.test
    rows, end = torch.arange(len(data)), data.positions["END"]
    clean = by_hand["clean"][1]
    assert len(result.attention) == 4 * len(CONDITIONS)
    for reading in result.attention:
        layer, head = roles.parse_head(reading.head)
        _, attentions, _ = by_hand[reading.condition]
        pattern = attentions[layer][rows, head, end]
        moved = (pattern - clean[layer][rows, head, end]).abs().sum(-1) / 2
        expected = {
            "to_io": pattern[rows, data.positions["IO"]],
            "to_s1": pattern[rows, data.positions["S1"]],
            "moved": moved,
        }
        for key, values in expected.items():
            found = getattr(reading, key)
            assert found.values == pytest.approx(values.tolist(), abs=1e-4)
            assert found.mean.value == pytest.approx(float(values.mean()), abs=1e-6)
            low, high = found.mean.interval
            assert low <= found.mean.known <= high
        if layer == 0 or reading.condition == "clean":
            assert reading.moved.mean.value == 0
        elif reading.condition == "counterfactual":
            assert reading.moved.mean.known > 0.001
    for name, (logits, _, _) in by_hand.items():
        difference = logits[rows, data.io_tokens] - logits[rows, data.s_tokens]
        assert result.logit_difference[name].mean.value == pytest.approx(float(difference.mean()))
    means = [result.logit_difference[name].mean.value for name in CONDITIONS]
    assert len(set(means)) == 3


@torch.no_grad()
def test_probes_are_fitted_to_clean_training_runs_and_read_the_edited_ones(
    context: StudyContext, result: CircuitResult, by_hand: dict[str, Any]
) -> None:
    train, true = context.task.train, context.task.test.labels
    with record_heads(context.model, range(LAYERS), train.positions["END"]) as z:
        context.model(**train.inputs)

    def outputs(z: dict[int, Tensor], name: str) -> Tensor:
        names = READERS if name == ALL else [name]
        return torch.cat([z[n][:, h] for n, h in map(roles.parse_head, names)], dim=1).float()

    assert [reading.head for reading in result.probes[::3]] == [*READERS, ALL]
    for reading in result.probes:
        probe = LinearProbe.fit(outputs(z, reading.head), train.labels)
        x = outputs(by_hand[reading.condition][2], reading.head)
        log_odds = probe.log_odds(x, true)
        assert reading.log_odds.values == pytest.approx(log_odds.tolist(), abs=2e-3)
        sign = -1 if reading.condition == "counterfactual" else 1
        assert reading.reports.value == pytest.approx(float((sign * log_odds > 0).double().mean()))
        assert reading.reports.n == len(true)


def test_heads_below_the_site_read_the_same_in_every_condition(
    result: CircuitResult,
) -> None:
    readings = [reading for reading in result.probes if reading.head == "L0.H1"]
    assert len({tuple(reading.log_odds.values) for reading in readings}) == 1
    above = [reading for reading in result.probes if reading.head == "L1.H0"]
    assert len({tuple(reading.log_odds.values) for reading in above}) == 3


def test_without_heads_it_says_so(context: StudyContext) -> None:
    empty = run(context, with_roles(context))
    assert empty.probes == [] and empty.attention == []
    assert empty.prompts == len(context.task.test)
    assert PART.figures(empty) == {} and PART.says(empty) == []
    for panel in PART.panels(empty):
        assert "No head with this role was found" in panel.text and not panel.charts


def test_answer_writers_stand_in_where_there_are_no_name_movers(context: StudyContext) -> None:
    without = with_roles(context, answer_writer=["L2.H0"], name_mover=[])
    assert without.attending()[roles.Role.WRITER] == ["L2.H0"]
    with_one = with_roles(context, answer_writer=["L2.H0"], name_mover=["L2.H1"])
    assert roles.Role.WRITER not in with_one.attending()


def test_prompts_without_names_are_refused() -> None:
    assert "two names" in str(PART.missing(own_context()))


def test_the_part_keeps_its_promises(context: StudyContext, result: CircuitResult) -> None:
    check(PART, result)
    assert set(PART.figures(result)) == {"circuit_probes", "circuit_attention"}
    probes, attention = PART.panels(result)
    assert list(probes.charts) == [*READERS, ALL]
    assert len(attention.charts) == 4
    assert probes.table is not None and len(probes.table.rows) == len(result.probes)
    shown = [m for p in next(iter(attention.charts.values())).panes for m in p.marks]
    assert [len(marks.x) for marks in shown] == [result.prompts] * 4
    count = Count()
    run(context, with_roles(context), advance=count)
    assert count.total == PART.work(context)


def test_the_organisms_heads_report_the_injected_belief() -> None:
    model, tokenizer = models.load("organism")
    context = study_of("", n=160, model=model, tokenizer=tokenizer)
    site = "L3.pre"  # the last site at which its order is used
    found = computed(HEADS, context)
    assert found.truth is not None and found.truth.last_layer == 3
    result = run(context, found, site)
    joint = {r.condition: r for r in result.probes if r.head == ALL}
    assert all(reading.reports.known > 0.95 for reading in joint.values())
    assert joint["clean"].log_odds.mean.known > 0 > joint["counterfactual"].log_odds.mean.known
    assert ("No name mover was found" in PART.panels(result)[1].text) == (
        not found.found[roles.Role.MOVER]
    )
    name = "name movers" if found.found[roles.Role.MOVER] else "answer writers"
    assert PART.panels(result)[1].title == f"Where {name} look under the edit"
    moved = {
        condition: [r.moved.mean.known for r in result.attention if r.condition == condition]
        for condition in CONDITIONS
    }
    assert min(moved["counterfactual"]) > 3 * max(moved["control"])
