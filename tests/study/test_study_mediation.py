"""What attention patterns carry of an edit's effect, where the answer is known or independent."""

import json
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from contexts_for_tests import Count, check, computed, given, own_context
from contexts_for_tests import context as prompts_context
from heads_for_tests import (
    EVERY_HEAD,
    LAYERS,
    WIDTH,
    edit_at,
    random_model,
    study_of,
    with_roles,
    with_telling_answers,
)
from torch import Tensor, nn

from benchmarks.organisms.prompts import build_tokenizer
from lrqp_torch import LRQP, models
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.sites import blocks_of
from lrqp_torch.study import heads as roles
from lrqp_torch.study.context import StudyContext, Task, no_progress
from lrqp_torch.study.heads import HeadsResult
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.parts.heads import PART as HEADS
from lrqp_torch.study.parts.mediation import (
    CEILING,
    PART,
    RANDOM_SETS,
    GroupMediation,
    Mediation,
    MediationResult,
    attention_awake,
    head_groups,
    matched,
)
from lrqp_torch.study.records import to_json

SITE = "L1.pre"
ABOVE = [name for name in EVERY_HEAD if not name.startswith("L0")]
EVERY_HEAD_OF_THE_ORGANISM = [f"L{layer}.H{head}" for layer in range(6) for head in range(4)]
GROUPS = {"two": ["L1.H2", "L2.H1"], "none": [], "every": ABOVE, "below": ["L0.H1"]}


@pytest.fixture(scope="module")
def context() -> StudyContext:
    return with_telling_answers(study_of("gpt2"), SITE)


@pytest.fixture(scope="module")
def result(context: StudyContext) -> MediationResult:
    found: MediationResult = computed(Mediation(GROUPS), context, SITE)
    return found


def group(result: MediationResult, name: str) -> GroupMediation:
    return next(item for item in result.groups if item.group == name)


class Independent:
    """Whole forward passes in which END's patterns are set by hooks around the heads' values.

    A head's output at END is replaced, before W_O, by the given pattern times the head's values of
    that very forward pass, read from GPT-2's own c_attn: none of the engine's code takes part.
    """

    def __init__(self, context: StudyContext) -> None:
        self.model: Any = context.model
        self.data = context.task.test
        self.edit = edit_at(context, SITE)

    @torch.no_grad()
    def run(self, edited: bool, patterns: dict[tuple[int, int], Tensor]) -> tuple[Tensor, Any]:
        """Logit differences, and all attention."""
        labels = self.data.labels
        with ExitStack() as stack:
            for layer in range(LAYERS):
                mine = {h: p for (n, h), p in patterns.items() if n == layer}
                self._replace(stack, blocks_of(self.model)[layer].attn, mine)
            if edited:
                at = self.data.positions["S2"]
                stack.enter_context(
                    self.edit.at(self.model, SITE, positions=at, target=1 - labels, source=labels)
                )
            output = self.model(**self.data.inputs, output_attentions=True)
        logits, rows = output.logits[:, -1], torch.arange(len(self.data))
        return logits[rows, self.data.io_tokens] - logits[
            rows, self.data.s_tokens
        ], output.attentions

    def _replace(self, stack: ExitStack, attention: Any, patterns: dict[int, Tensor]) -> None:
        values: list[Tensor] = []
        width = WIDTH // attention.num_heads

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            values[:] = [output[..., -WIDTH:].unflatten(-1, (-1, width))]

        def change(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            z = args[0].clone().unflatten(-1, (-1, width))
            for head, pattern in patterns.items():
                z[:, -1, head] = torch.einsum("bt,btw->bw", pattern, values[0][:, :, head])
            return (z.flatten(2),)

        stack.callback(attention.c_attn.register_forward_hook(keep).remove)
        stack.callback(attention.c_proj.register_forward_pre_hook(change).remove)


def test_ratios_are_those_of_whole_forward_passes_with_hooks(
    context: StudyContext, result: MediationResult
) -> None:
    independent = Independent(context)
    context.model.set_attn_implementation("eager")
    clean, clean_patterns = independent.run(False, {})
    edited, edited_patterns = independent.run(True, {})
    assert result.preference_clean == pytest.approx(float(clean.mean()))
    assert result.preference_edited == pytest.approx(float(edited.mean()))
    effect = float((clean - edited).mean())
    assert abs(effect) > 0.1
    for name in ("two", "every"):
        chosen = [roles.parse_head(head) for head in GROUPS[name]]
        back = {(n, h): clean_patterns[n][:, h, -1] for n, h in chosen}
        forth = {(n, h): edited_patterns[n][:, h, -1] for n, h in chosen}
        restored, _ = independent.run(True, back)
        induced, _ = independent.run(False, forth)
        found = group(result, name)
        assert found.preference_restored == pytest.approx(float(restored.mean()))
        assert found.preference_induced == pytest.approx(float(induced.mean()))
        assert found.restored is not None and found.induced is not None
        assert found.restored.value == pytest.approx(float((restored - edited).mean()) / effect)
        assert found.induced.value == pytest.approx(float((clean - induced).mean()) / effect)
        assert abs(found.restored.known) > 1e-3
        answered = clean > 0
        flipped = answered & (edited < 0)
        assert found.answers_restored is not None and found.answers_flipped is not None
        assert found.answers_restored.n == int(flipped.sum()) > 0
        assert found.answers_restored.value == pytest.approx(
            float((restored[flipped] > 0).double().mean())
        )
        assert found.answers_flipped.value == pytest.approx(
            float((induced[answered] < 0).double().mean())
        )
    context.model.set_attn_implementation("sdpa")


def test_no_heads_and_heads_below_the_site_carry_nothing(result: MediationResult) -> None:
    for name in ("none", "below"):
        found = group(result, name)
        assert found.heads == []
        assert found.restored is not None and found.restored.value == 0
        assert found.induced is not None and found.induced.value == 0
        assert found.preference_restored == result.preference_edited
        assert found.preference_induced == result.preference_clean


def test_patterns_that_cannot_change_carry_nothing_of_a_real_effect() -> None:
    """Without keys every pattern is uniform: the edit acts through values alone."""
    tokenizer = build_tokenizer([])
    model = random_model("gpt2", len(tokenizer))
    with torch.no_grad():
        for block in blocks_of(model):
            block.attn.c_attn.weight[:, WIDTH : 2 * WIDTH] = 0
            block.attn.c_attn.bias[WIDTH : 2 * WIDTH] = 0
    context = with_telling_answers(study_of("gpt2", model=model, tokenizer=tokenizer), SITE)
    result: MediationResult = computed(Mediation({"every": ABOVE}), context, SITE)
    (every,) = result.groups
    assert abs(result.preference_clean - result.preference_edited) > 0.05
    assert every.restored is not None and abs(every.restored.known) < 1e-12
    assert every.induced is not None and abs(every.induced.known) < 1e-12


def test_an_edit_that_changes_nothing_has_no_effect_to_share(context: StudyContext) -> None:
    fitted = edit_at(context, SITE)
    identity = LRQP(fitted.probe, fitted.metric, log_odds=-1e9, rule="fixed")
    built = replace(given(context, SITE), edit_at=lambda site: identity)
    result = Mediation(GROUPS).compute(built, no_progress)
    assert result.effect.interval == [0, 0]
    assert result.edit_flips is not None and result.edit_flips.value == 0
    for found in result.groups:
        assert found.restored is None and found.induced is None
        assert found.answers_restored is None
    (panel,) = PART.panels(result)
    assert "no effect of which a share could be told" in " ".join(PART.says(result))
    assert panel.table is not None and panel.table.rows[0][1] is None
    assert PART.figures(result) == {}
    check(PART, result)


def roles_of(heads: HeadsResult) -> dict[str, list[str]]:
    return heads.attending() | {roles.Role.S_INHIBITION: heads.members(roles.Role.S_INHIBITION)}


def test_groups_are_sets_of_roles_a_ceiling_and_equally_many_others(
    context: StudyContext,
) -> None:
    heads = with_roles(
        context,
        name_mover=["L2.H1", "L1.H2"],
        backup_name_mover=["L2.H3"],
        S_inhibition=["L1.H0"],
        answer_writer=["L2.H1", "L0.H0"],
    )
    groups = head_groups(context, SITE, roles_of(heads))
    assert groups["name movers"] == ["L2.H1", "L1.H2"]
    assert groups["with backups"] == ["L2.H1", "L1.H2", "L2.H3"]
    assert "with negative ones" not in groups and "with both" not in groups
    assert "answer writers" not in groups
    assert groups[CEILING] == ABOVE
    others = [members for name, members in groups.items() if "other heads" in name]
    assert len(others) == 2 < RANDOM_SETS  # no head is in two of them, and five are left
    for members in others:
        assert len(members) == 2 and set(members) <= set(ABOVE)
        assert not set(members) & {"L2.H1", "L1.H2", "L2.H3", "L1.H0"}
    assert head_groups(context, SITE, roles_of(heads)) == groups
    few = head_groups(context, "L2.pre", roles_of(heads))
    assert {name for name in few if "other head" in name} == {
        f"1 other head, matched, set {number}" for number in (1, 2)
    }
    three = with_roles(context, name_mover=["L2.H0", "L2.H1", "L2.H2"])
    assert head_groups(context, "L2.pre", roles_of(three))["the other head"] == ["L2.H3"]
    assert few[CEILING] == [name for name in EVERY_HEAD if name.startswith("L2")]
    assert next(m for n, m in few.items() if "other head" in n) in (["L2.H0"], ["L2.H2"])


def test_heads_are_matched_in_layer_and_in_how_much_they_attend() -> None:
    awake = {"L2.H0": 0.5, "L2.H1": 0.1, "L2.H2": 0.45, "L2.H3": 0.9, "L3.H0": 0.5, "L3.H1": 0.48}
    others = ["L2.H1", "L2.H2", "L2.H3", "L3.H1"]
    sets = matched(["L2.H0", "L3.H0"], others, awake)
    # The nearest of the layer first; where none of it is left, one of the nearest layer.
    assert sets == [["L2.H2", "L3.H1"], ["L2.H1", "L2.H3"]]
    assert matched([], others, awake) == []


def test_attention_awake_is_what_the_first_token_leaves(context: StudyContext) -> None:
    data = context.task.train[:5]
    one = replace(context, task=replace(context.task, train=data))
    awake = attention_awake(one, ["L2.H1", "L1.H2"])
    with record_patterns(one.model, [1, 2], data.end) as patterns, torch.no_grad():
        one.model(**data.inputs)
    first = (data.inputs["attention_mask"].cumsum(1) == 1).int().argmax(1)
    for layer, head in ((2, 1), (1, 2)):
        rests = patterns[layer][torch.arange(5), head, first]
        assert awake[f"L{layer}.H{head}"] == pytest.approx(float(1 - rests.mean()), abs=1e-5)


def test_the_edit_of_all_variables_is_mediated_too() -> None:
    drawn = IOIDataset.generate(models.load("organism")[1], 120, 4, names=10, padding_side="left")
    data = IOIPrompts.of(drawn)
    task = Task("plain", data[:80], data[80:])
    one = replace(prompts_context("plain", None), task=task, variables=("order", "identity"))
    one = replace(one, sites=["L3.pre"])
    found = Mediation({"all": [f"L{i}.H{k}" for i in range(3, 6) for k in range(4)]}).compute(
        given(one, "L3.pre"), lambda _: None
    )
    both = found.together
    assert both is not None and both.together is None
    assert both.prompts == found.prompts == 40
    assert both.preference_edited < found.preference_clean
    assert both.interchange is not None and found.interchange is not None
    assert both.interchange.distance > found.interchange.distance
    assert both.groups[0].restored is not None
    assert len(Mediation().panels(found)) == 2 and len(Mediation().says(found)) == 2
    assert Mediation().read(json.loads(json.dumps(to_json(found)))) == found


def test_the_part_keeps_its_promises(context: StudyContext, result: MediationResult) -> None:
    check(PART, result)
    assert set(PART.figures(result)) == {"mediation"}
    (panel,) = PART.panels(result)
    (chart,) = panel.charts.values()
    shown = {marks.name.split(":")[0]: list(marks.y) for marks in chart.panes[0].marks}
    expected = [100 * g.restored.known for g in result.groups if g.restored]
    assert shown["restored"] == pytest.approx(expected)
    count, part = Count(), Mediation({})
    computed(part, context, SITE, count)
    assert count.total == part.work(context)


@pytest.mark.parametrize(("n_classes", "site"), [(2, "L2.pre"), (3, "L3.mid")])
def test_of_own_prompts_the_heads_that_write_the_answer_are_found_in_training_prompts(
    n_classes: int, site: str
) -> None:
    context, count = own_context(n_classes), Count()
    result: MediationResult = computed(PART, context, site, count)
    assert count.total == PART.work(context) == len(context.task)
    check(PART, result)
    assert result.groups[0].group == "answer writers"
    assert not any(set(group.heads) - set(EVERY_HEAD_OF_THE_ORGANISM) for group in result.groups)
    # Held-out prompts have no say in the choice.
    half = replace(context, task=replace(context.task, test=context.task.test[:30]))
    again: MediationResult = computed(PART, half, site)
    assert again.groups[0].heads == result.groups[0].heads
    if n_classes == 2:
        ceiling = group(result, CEILING)
        assert result.edit_flips is not None and result.edit_flips.known > 0.8
        for kind in ("restored", "induced"):
            assert getattr(result.groups[0], kind).known > 0.6
            assert getattr(ceiling, kind).known > 0.6
    assert "true class − other" in " ".join(PART.says(result))


def test_prompts_without_answers_are_refused() -> None:
    assert "no answers" in str(PART.missing(own_context(answers=False)))
    assert PART.missing(own_context()) is None


def test_the_organisms_answer_writers_carry_nearly_all_of_the_effect() -> None:
    model, tokenizer = models.load("organism")
    context = study_of("", n=160, model=model, tokenizer=tokenizer)
    site = "L3.pre"  # the last site at which its order is used
    found = computed(HEADS, context)
    result = PART.compute(given(context, site, {"heads": found}), no_progress)
    assert result.edit_flips is not None and result.edit_flips.known > 0.9
    name = "name movers" if found.found[roles.Role.MOVER] else "answer writers"
    assert name in PART.panels(result)[0].title
    writers, inhibition = group(result, name), group(result, "S-inhibition heads")
    ceiling = group(result, CEILING)
    for kind in ("restored", "induced"):
        assert getattr(writers, kind).value > 0.8
        assert getattr(ceiling, kind).value > 0.8
        assert abs(getattr(inhibition, kind).value) < 0.2
    assert writers.answers_restored is not None and writers.answers_restored.value > 0.9
