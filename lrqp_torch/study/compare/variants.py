"""LRQP in other forms: as learned through the model, and by its own dose."""

from typing import ClassVar

from lrqp_torch.baselines import LeastEdit
from lrqp_torch.edits.lrqp import LRQP


class LearnedLRQP(LeastEdit):
    """LRQP with its learned probe, odds and metric, measured by the fitted one's.

    Args:
        reference: the edit as fitted.
        learned: the edit as learned from it.
        strength: see :class:`~lrqp_torch.baselines.Baseline`.
    """

    name: ClassVar[str] = "lrqp_learned"
    title: ClassVar[str] = "LRQP, learned"

    def __init__(self, reference: LRQP, learned: LRQP, *, strength: float = 1.0) -> None:
        super().__init__(reference, strength=strength)
        self.program = learned


class DosedLRQP(LeastEdit):
    """LRQP that asks for the same odds of every prompt: its own dose, instead of a strength.

    Args:
        reference: the edit as fitted.
        log_alpha: log odds asked for, in nats.
    """

    name: ClassVar[str] = "lrqp_dose"
    title: ClassVar[str] = "LRQP, by its odds"

    def __init__(self, reference: LRQP, log_alpha: float) -> None:
        super().__init__(reference)
        self.program = LRQP(
            reference.probe,
            reference.metric,
            log_odds=log_alpha,
            rule="fixed",
            on_infeasible="skip",
        )
