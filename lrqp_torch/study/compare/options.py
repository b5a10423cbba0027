"""What the league table runs."""

from dataclasses import dataclass, field

from lrqp_torch.errors import SettingError
from lrqp_torch.study.compare.methods import check_names
from lrqp_torch.study.compare.trained import Training

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
LOG_ALPHAS = (0.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0)


@dataclass(frozen=True)
class CompareOptions:
    """What the table runs.

    Attributes:
        methods: names; None for all. No edit, and LRQP as fitted, always run.
        strengths: of the curves; 1 must be among them.
        log_alphas: odds of LRQP's curve by its own dose, in nats.
        sweep_prompts: held-out prompts of the curves, the first ones.
        texts: unrelated texts, at most.
        training: of methods that are trained through the model.

    Raises:
        SettingError: a method that does not exist, strengths without 1 or not above 0, or fewer
            than two prompts or texts.
    """

    methods: tuple[str, ...] | None = None
    strengths: tuple[float, ...] = STRENGTHS
    log_alphas: tuple[float, ...] = LOG_ALPHAS
    sweep_prompts: int = 128
    texts: int = 64
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_names(self.methods)
        if 1.0 not in self.strengths or min(self.strengths) <= 0:
            raise SettingError(
                f"strengths must be above 0, and 1 among them, got {list(self.strengths)}"
            )
        if min(self.sweep_prompts, self.texts) < 2:
            raise SettingError(
                f"sweep_prompts and texts must be at least 2, got {self.sweep_prompts} and "
                f"{self.texts}"
            )

    @property
    def names(self) -> list[str]:
        """Methods in the order of the table."""
        return check_names(self.methods)


DEFAULTS = CompareOptions()
