"""How an edit is learned: what is trained, for how long, and what by-effects cost."""

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from lrqp_torch.errors import LearningError
from lrqp_torch.learn.objective import Weights


@dataclass(frozen=True)
class LearnOptions:
    """How an edit is learned.

    Attributes:
        probe: train W and b.
        log_odds: train log α.
        metric: train Σ: its shrinkage, and low-rank factors.
        rank: of the factors; 0 trains the shrinkage alone.
        weights: of the by-effects in the loss.
        epochs: passes through the training prompts, at most.
        batch_size: prompts a step.
        learning_rate: of Adam; each free parameter is in units of its own size.
        patience: epochs without a better validation loss after which to stop.
        seed: of the order of the prompts and the start of the factors.

    Raises:
        LearningError: an option out of its range.
    """

    probe: bool = True
    log_odds: bool = True
    metric: bool = True
    rank: int = 2
    weights: Weights = field(default_factory=Weights)
    epochs: int = 10
    batch_size: int = 16
    learning_rate: float = 0.02
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rank", 0), ("epochs", 1), ("batch_size", 1), ("patience", 1)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise LearningError(
                    f"{name} must be an integer and at least {least}, got {value!r}"
                )
        rate: Any = self.learning_rate
        if not isinstance(rate, Real) or not 0 < float(rate) < math.inf:
            raise LearningError(f"learning_rate must be a number above 0, got {rate!r}")
