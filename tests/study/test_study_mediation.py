"""What attention patterns carry of an edit's effect, where the answer is known or independent."""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
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
from lrqp_torch.stream.sites import blocks_of
from lrqp_torch.study import heads, mediation, roles
from lrqp_torch.study.context import StudyContext
from lrqp_torch.study.head_groups import CEILING, RANDOM_SETS, head_groups
from lrqp_torch.study.mediation import GroupMediation, MediationResult

SITE = "L1.pre"
ABOVE = [name for name in EVERY_HEAD if not name.startswith("L0")]
GROUPS = {"two": ["L1.H2", "L2.H1"], "none": [], "every": ABOVE, "below": ["L0.H1"]}


@pytest.fixture(scope="module")
def context() -> StudyContext:
    return with_telling_answers(study_of("gpt2"), SITE)


@pytest.fixture(scope="module")
def result(context: StudyContext) -> MediationResult:
    given = with_roles(context)
    return mediation.compute(context, SITE, edit_at(context, SITE), given, groups=GROUPS)


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
    assert result.logit_difference_clean == pytest.approx(float(clean.mean()))
    assert result.logit_difference_edited == pytest.approx(float(edited.mean()))
    effect = float((clean - edited).mean())
    assert abs(effect) > 0.1
    for name in ("two", "every"):
        chosen = [roles.parse_head(head) for head in GROUPS[name]]
        back = {(n, h): clean_patterns[n][:, h, -1] for n, h in chosen}
        forth = {(n, h): edited_patterns[n][:, h, -1] for n, h in chosen}
        restored, _ = independent.run(True, back)
        induced, _ = independent.run(False, forth)
        found = group(result, name)
        assert found.logit_difference_restored == pytest.approx(float(restored.mean()))
        assert found.logit_difference_induced == pytest.approx(float(induced.mean()))
        assert found.restored is not None and found.induced is not None
        assert found.restored.value == pytest.approx(float((restored - edited).mean()) / effect)
        assert found.induced.value == pytest.approx(float((clean - induced).mean()) / effect)
        assert abs(found.restored.value) > 1e-3
        answered = clean > 0
        flipped = answered & (edited < 0)
        assert found.answers_restored is not None and found.answers_flipped is not None
        assert found.answers_restored.prompts == int(flipped.sum()) > 0
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
        assert found.logit_difference_restored == result.logit_difference_edited
        assert found.logit_difference_induced == result.logit_difference_clean


def test_patterns_that_cannot_change_carry_nothing_of_a_real_effect() -> None:
    """Without keys every pattern is uniform: the edit acts through values alone."""
    tokenizer = build_tokenizer([])
    model = random_model("gpt2", len(tokenizer))
    with torch.no_grad():
        for block in blocks_of(model):
            block.attn.c_attn.weight[:, WIDTH : 2 * WIDTH] = 0
            block.attn.c_attn.bias[WIDTH : 2 * WIDTH] = 0
    context = with_telling_answers(study_of("gpt2", model=model, tokenizer=tokenizer), SITE)
    given = with_roles(context)
    result = mediation.compute(
        context, SITE, edit_at(context, SITE), given, groups={"every": ABOVE}
    )
    (every,) = result.groups
    assert abs(result.logit_difference_clean - result.logit_difference_edited) > 0.05
    assert every.restored is not None and abs(every.restored.value) < 1e-12
    assert every.induced is not None and abs(every.induced.value) < 1e-12


def test_an_edit_that_changes_nothing_has_no_effect_to_share(
    context: StudyContext, tmp_path: Path
) -> None:
    fitted = edit_at(context, SITE)
    identity = LRQP(fitted.probe, fitted.metric, log_odds=-1e9, rule="fixed")
    result = mediation.compute(context, SITE, identity, with_roles(context), groups=GROUPS)
    assert result.effect_interval == [0, 0]
    assert result.edit_flips is not None and result.edit_flips.value == 0
    for found in result.groups:
        assert found.restored is None and found.induced is None
        assert found.answers_restored is None
    (panel,) = mediation.panels(result)
    assert "no effect of which a share could be told" in panel.text
    assert panel.table is not None and panel.table.rows[0][1] is None
    assert mediation.draw(result, tmp_path) == []


def test_groups_are_sets_of_roles_a_ceiling_and_equally_many_others(
    context: StudyContext,
) -> None:
    given = with_roles(
        context,
        name_mover=["L2.H1", "L1.H2"],
        backup_name_mover=["L2.H3"],
        S_inhibition=["L1.H0"],
        answer_writer=["L2.H1", "L0.H0"],
    )
    groups = head_groups(context, SITE, given)
    assert groups["name movers"] == ["L2.H1", "L1.H2"]
    assert groups["with backups"] == ["L2.H1", "L1.H2", "L2.H3"]
    assert "with negative ones" not in groups and "with both" not in groups
    assert "answer writers" not in groups
    assert groups[CEILING] == ABOVE
    others = [members for name, members in groups.items() if "other heads" in name]
    assert len(others) == RANDOM_SETS
    for members in others:
        assert len(members) == 2 and set(members) <= set(ABOVE)
        assert not set(members) & {"L2.H1", "L1.H2", "L2.H3", "L1.H0"}
    assert head_groups(context, SITE, given) == groups
    few = head_groups(context, "L2.pre", given)
    assert {name for name in few if "other head" in name} == {
        f"1 other head, draw {number}" for number in range(1, RANDOM_SETS + 1)
    }
    three = with_roles(context, name_mover=["L2.H0", "L2.H1", "L2.H2"])
    assert head_groups(context, "L2.pre", three)["the other head"] == ["L2.H3"]
    assert few[CEILING] == [name for name in EVERY_HEAD if name.startswith("L2")]
    assert next(m for n, m in few.items() if "other head" in n) in (["L2.H0"], ["L2.H2"])


def test_result_survives_json_is_drawn_and_counts_its_work(
    context: StudyContext, result: MediationResult, tmp_path: Path
) -> None:
    raw = json.loads(json.dumps(asdict(result), allow_nan=False))
    assert mediation.from_json(raw) == result
    names = {path.name for path in mediation.draw(result, tmp_path)}
    assert names == {"mediation.png", "mediation.svg"}
    (panel,) = mediation.panels(result)
    (figure,) = panel.figures.values()
    shown = {trace.name.split(":")[0]: list(trace.x) for trace in figure.data}
    expected = [100 * g.restored.value for g in result.groups[::-1] if g.restored]
    assert shown["restored"] == pytest.approx(expected)
    done: list[int] = []
    mediation.compute(
        context, SITE, edit_at(context, SITE), with_roles(context), done.append, groups={}
    )
    assert sum(done) == mediation.work(context)


def test_the_organisms_answer_writers_carry_nearly_all_of_the_effect() -> None:
    model, tokenizer = models.load("organism")
    context = study_of("", n=160, model=model, tokenizer=tokenizer)
    site = "L3.pre"  # the last site at which its order is used
    found = heads.compute(context)
    result = mediation.compute(context, site, edit_at(context, site), found)
    assert result.edit_flips is not None and result.edit_flips.value > 0.9
    name = "name movers" if found.found[roles.MOVER] else "answer writers"
    assert name in mediation.panels(result)[0].title
    writers, inhibition = group(result, name), group(result, "S-inhibition heads")
    ceiling = group(result, CEILING)
    for kind in ("restored", "induced"):
        assert getattr(writers, kind).value > 0.8
        assert getattr(ceiling, kind).value > 0.8
        assert abs(getattr(inhibition, kind).value) < 0.2
    assert writers.answers_restored is not None and writers.answers_restored.value > 0.9
