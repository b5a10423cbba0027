"""What ``lrqp verdicts`` is asked for."""

from dataclasses import dataclass
from pathlib import Path

from lrqp_torch.baselines import (
    BASELINES,
    DAS,
)
from lrqp_torch.errors import SettingError
from lrqp_torch.models.organisms import ORGANISMS
from lrqp_torch.study.settings import Settings


@dataclass(frozen=True)
class VerdictSettings:
    """What is asked for.

    Attributes:
        out: folder for the results; made if needed.
        models: names of models, or folders, separated by commas; each needs its ground truth.
        methods: ``all`` (without DAS), or names of baselines separated by commas.
        das: whether DAS, which is trained through the model at every site, is among all.
        n: prompts of each draw, half to fit on and half held out.
        seeds: draws.
        seed: of the first; the others follow.
        prefixes: as of the study.
        sites: as of the study.
        batch_size: prompts a forward pass.
        device: ``auto``, or a torch device.
        figures: whether to draw.
    """

    out: Path
    models: str = ",".join(ORGANISMS)
    methods: str = "all"
    das: bool = False
    n: int = 200
    seeds: int = 3
    seed: int = 0
    prefixes: str = "none"
    sites: str = "all"
    batch_size: int = 64
    device: str = "auto"
    figures: bool = True

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            SettingError: a number out of its range, a method that does not exist, or no model.
        """
        if self.seeds < 1:
            raise SettingError(f"seeds must be at least 1, not {self.seeds}.")
        if self.batch_size < 1:
            raise SettingError(f"batch_size must be at least 1, not {self.batch_size}.")
        if self.n < 8:
            raise SettingError(f"n must be at least 8, not {self.n}: half of them are held out.")
        if not self.model_names():
            raise SettingError(f"no model given; name some, such as {', '.join(ORGANISMS)}.")
        unknown = [name for name in self._named() if name not in BASELINES]
        if unknown or not self.method_names():
            found = f"unknown method {unknown[0]!r}" if unknown else "no method given"
            raise SettingError(f"{found}; choose from {', '.join(BASELINES)}, or say all.")

    def model_names(self) -> list[str]:
        """The models asked for."""
        return [name.strip() for name in self.models.split(",") if name.strip()]

    def method_names(self) -> list[str]:
        """The methods asked for, in the order of the table."""
        named = self._named()
        every = [name for name in BASELINES if name != DAS.name or self.das]
        return every if "all" in self.methods.split(",") else [n for n in BASELINES if n in named]

    def command(self) -> str:
        """The command that gives these numbers, without the folder."""
        given = {
            "--models": self.models,
            "--methods": self.methods,
            "--n": self.n,
            "--seeds": self.seeds,
            "--seed": self.seed,
            "--prefixes": self.prefixes,
            "--sites": self.sites,
            "--batch-size": self.batch_size,
        }
        words = " ".join(f"{name} {value}" for name, value in given.items())
        return f"lrqp verdicts {words}{' --das' if self.das else ''} --out DIR"

    def study(self, model: str, seed: int) -> Settings:
        """The study's settings for one model and one draw."""
        return Settings(
            model=model,
            out=self.out,
            n=self.n,
            prefixes=self.prefixes,
            sites=self.sites,
            seed=seed,
            batch_size=self.batch_size,
            device=self.device,
        )

    def _named(self) -> list[str]:
        names = [name.strip() for name in self.methods.split(",") if name.strip()]
        return [name for name in names if name != "all"]
