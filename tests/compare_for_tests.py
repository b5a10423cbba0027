"""Few prompts on the bundled organism, and the edits that the league table compares there."""

from dataclasses import replace
from functools import cache
from typing import Any

from contexts_for_tests import context

from lrqp_torch import LRQP
from lrqp_torch.baselines import BaselineData, build
from lrqp_torch.study.league import CompareOptions
from lrqp_torch.study.methods import Training

SITE = "L2.pre"
FEW = 24
SMALL = CompareOptions(
    methods=("mean_difference", "leace", "full_patch", "das", "lrqp_learned"),
    strengths=(0.5, 1.0, 2.0),
    log_alphas=(0.0, 10.0),
    sweep_prompts=20,
    texts=12,
    training=Training(prompts=32, epochs=1),
)


@cache
def reference() -> LRQP:
    one = context()
    x = one.activations(one.task, "train", "S2", [SITE])[SITE]
    return LRQP.fit(x, one.task.train.labels, on_infeasible="skip")


def few() -> Any:
    """The context with fewer held-out prompts, in two batches."""
    one = context()
    return replace(one, task=replace(one.task, test=one.task.test[:FEW]), batch_size=16)


def baseline(name: str) -> Any:
    one = context()
    x = one.activations(one.task, "train", "S2", [SITE])[SITE]
    return build(name, BaselineData(x, one.task.train.labels, reference()))
