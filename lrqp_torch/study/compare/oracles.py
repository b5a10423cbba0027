"""Independent probes: fitted to held-out prompts, which no edit has seen, and read on others.

The held-out prompts are split in two halves by the seed. A probe of a variable is fitted to the
clean activations of each half, and reads the edited activations of the other one. So the oracle
shares no prompt with the edit, which is fitted to the training prompts, nor with what it reads.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.study.estimates import wilson
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.variables import NAME_IO, NAME_S, ORDER

TEMPLATE, POSITION_S2 = "template", "position of S2"
MOST_CLASSES = 20
LEAST_PROMPTS = 3
"""Classes with fewer prompts in a half are left out."""
RANGES = 4
"""Positions are cut at their quantiles into so many ranges."""


@dataclass(frozen=True)
class OracleScore:
    """How well an independent probe reads a variable from clean activations.

    Attributes:
        variable: such as ``"name of S"``.
        classes: how many.
        accuracy: share of held-out prompts with a class that it reads rightly.
        lower: lower end of its Wilson 95 % interval.
        upper: upper end.
        baseline: share of the most frequent class.
        readable: whether the whole interval lies above the baseline. What an oracle cannot read,
            it cannot see change either, so selectivity is taken over readable variables.
    """

    variable: str
    classes: int
    accuracy: float
    lower: float
    upper: float
    baseline: float
    readable: bool


class Oracles:
    """Probes of the order and of variables that do not depend on it, two of each.

    Positions of the names depend on the order, and an edit that writes another order ought to
    change what is read of them; so they are not among these.

    Args:
        x: clean activations of the held-out prompts, (n, d).
        data: those prompts.
        generator: of the split.

    Attributes:
        half: which half each prompt is in, (n,), 0 or 1.
        scores: of each variable, the order first.
    """

    def __init__(self, x: Tensor, data: IOIPrompts, generator: torch.Generator) -> None:
        self.half = torch.zeros(len(data), dtype=torch.long)
        labels = {ORDER: data.labels.cpu()}
        for label in (0, 1):  # both orders are as frequent in one half as in the other
            rows = (labels[ORDER] == label).nonzero().flatten()
            rows = rows[torch.randperm(len(rows), generator=generator)]
            self.half[rows[::2]] = 1
        real = data.inputs["position_ids"].gather(1, data.positions["S2"].unsqueeze(1)).squeeze(1)
        values: dict[str, Sequence[Hashable]] = {
            NAME_S: data.data.s_names,
            NAME_IO: data.data.io_names,
            TEMPLATE: data.data.templates.tolist(),
            POSITION_S2: _ranges(real.cpu()).tolist(),
        }
        for name, items in values.items():
            classes = _classes(items, self.half)
            if int(classes.max()) >= 1:
                labels[name] = classes
        problems = {}
        for name, classes in labels.items():
            for half in (0, 1):
                rows = ((classes >= 0) & (self.half == half)).nonzero().flatten()
                problems[name, half] = (x[rows.to(x.device)], classes[rows].to(x.device))
        self._probes = LinearProbe.fit_many(problems)
        self.scores = [self._score(name, x, classes) for name, classes in labels.items()]

    @property
    def others(self) -> list[str]:
        """Readable variables other than the order."""
        return [score.variable for score in self.scores[1:] if score.readable]

    @torch.no_grad()
    def logits(self, variable: str, x: Tensor) -> Tensor:
        """What the probe of the other half says of the first m prompts, (m, K) float64, on the CPU.

        Args:
            variable: one that has a score.
            x: activations of the first m held-out prompts, (m, d).
        """
        pair = []
        for half in (0, 1):
            probe = self._probes[variable, half]
            weight, bias = (t.detach().double() for t in (probe.weight, probe.bias))
            pair.append(x.double() @ weight.T + bias)
        one = (self.half[: len(x)] == 1).to(x.device).unsqueeze(-1)
        return torch.where(one, pair[0], pair[1]).cpu()

    def _score(self, variable: str, x: Tensor, classes: Tensor) -> OracleScore:
        known = classes >= 0
        right = int((self.logits(variable, x).argmax(-1) == classes)[known].sum())
        n = int(known.sum())
        baseline = float(torch.bincount(classes[known]).max()) / n
        lower, upper = wilson(right, n)
        return OracleScore(
            variable=variable,
            classes=int(classes.max()) + 1,
            accuracy=right / n,
            lower=lower,
            upper=upper,
            baseline=baseline,
            readable=lower > baseline,
        )


def _ranges(values: Tensor) -> Tensor:
    shares = torch.linspace(0, 1, RANGES + 1, dtype=torch.float64)[1:-1]
    return torch.bucketize(values.double(), values.double().quantile(shares).unique())


def _classes(values: Sequence[Hashable], half: Tensor) -> Tensor:
    """Numbers from 0 for the most frequent values that both halves hold; −1 for the others."""
    halves = half.tolist()
    counts = [Counter(v for v, h in zip(values, halves, strict=True) if h == k) for k in (0, 1)]
    enough = {v: min(c[v] for c in counts) for v in dict.fromkeys(values)}
    kept = sorted(
        (v for v, least in enough.items() if least >= LEAST_PROMPTS), key=lambda v: -enough[v]
    )[:MOST_CLASSES]
    number = {value: index for index, value in enumerate(kept)}
    return torch.tensor([number.get(value, -1) for value in values])
