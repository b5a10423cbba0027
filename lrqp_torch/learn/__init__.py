"""Learned edits: probe, odds and metric trained through the program and the rest of the model."""

from lrqp_torch.learn.loop import LearnOptions, learn
from lrqp_torch.learn.objective import (
    Objective,
    Weights,
    answer_difference,
    counterfactual_wins,
)
from lrqp_torch.learn.prompts import EditPrompts
from lrqp_torch.learn.result import Comparison, Epoch, Learned, principal_angles

__all__ = [
    "Comparison",
    "EditPrompts",
    "Epoch",
    "LearnOptions",
    "Learned",
    "Objective",
    "Weights",
    "answer_difference",
    "counterfactual_wins",
    "learn",
    "principal_angles",
]
