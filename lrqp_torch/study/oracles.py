"""Independent probes, and how completely and how selectively an edit writes what they read.

The held-out prompts, which no edit has seen, are split in two halves by the seed. A probe of a
variable is fitted to the clean activations of each half, and reads the edited activations of the
other one. So the oracle shares no prompt with the edit, which is fitted to the training prompts,
nor with what it reads: an edit cannot score by fooling its own probe.

δ(P, Q) = ½ Σ_z |P(z) − Q(z)| is the total variation distance between distributions over a
variable's classes. Source: Canby, Davies, Rastogi and Hockenmaier 2024, "Measuring the Reliability
of Causal Probing Methods: Tradeoffs, Limitations, and the Plight of Nullifying Interventions",
arXiv 2408.15510. Its measures are taken prompt by prompt here and then averaged: in a mean over
prompts first, an edit that does nothing would look like one that erases a balanced variable.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.prompts import PromptSet, rows_by_class

MOST_CLASSES = 20
LEAST_PROMPTS = 3
"""Classes with fewer prompts in a half are left out."""
RANGES = 4
"""Positions are cut at their quantiles into so many ranges."""


@dataclass(frozen=True)
class OracleScore:
    """How well an independent probe reads a variable from clean activations."""

    variable: str  # such as `"name of S"`
    classes: int  # how many
    accuracy: Estimate  # share of held-out prompts with a class that it reads rightly
    baseline: float  # share of the most frequent class
    # Whether the whole interval lies above the baseline. What an oracle cannot read, it cannot see
    # change either, so selectivity is taken over readable variables.
    readable: bool


class Oracles:
    """Probes of the class and of variables that do not depend on it, two of each.

    They are fitted to clean activations x of the held-out prompts, (n, d). ``half`` says which half
    each prompt is in, (n,), 0 or 1; ``scores`` are those of each variable, the class first.
    """

    def __init__(self, x: Tensor, data: PromptSet, generator: torch.Generator) -> None:
        self.half = torch.zeros(len(data), dtype=torch.long)
        own = data.labels.cpu()
        for rows in rows_by_class(own, generator):  # as frequent in one half as in the other
            self.half[rows[::2]] = 1
        labels = {data.words.variable.removeprefix("the "): own}
        for name, items in side_variables(data).items():
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
        """Readable variables other than the class."""
        return [score.variable for score in self.scores[1:] if score.readable]

    @torch.no_grad()
    def logits(self, variable: str, x: Tensor) -> Tensor:
        """What the probe of the other half says of the first m prompts, (m, K) float64, on the CPU.

        ``x`` are their activations, (m, d).
        """
        pair = []
        for half in (0, 1):
            probe = self._probes[variable, half]
            weight, bias = (t.detach().double() for t in (probe.weight, probe.bias))
            pair.append(x.double() @ weight.T + bias)
        one = (self.half[: len(x)] == 1).to(x.device).unsqueeze(-1)
        return torch.where(one, pair[0], pair[1]).cpu()

    def read_class(self, x: Tensor) -> Tensor:
        """:meth:`logits` of the classes that edits write."""
        return self.logits(self.scores[0].variable, x)

    def selectivity(self, x: Tensor, after: Tensor) -> Tensor | None:
        """Mean :func:`selectivity` over readable variables other than the class, (m,); None of none

        ``x`` are clean activations of the first m held-out prompts, (m, d), ``after`` edited ones.
        """
        kept = [
            selectivity(self.logits(v, x).softmax(-1), self.logits(v, after).softmax(-1))
            for v in self.others
        ]
        return torch.stack(kept).mean(0) if kept else None

    def _score(self, variable: str, x: Tensor, classes: Tensor) -> OracleScore:
        known = classes >= 0
        accuracy = Estimate.share((self.logits(variable, x).argmax(-1) == classes)[known])
        baseline = float(torch.bincount(classes[known]).max()) / accuracy.n
        assert accuracy.lower is not None
        readable, count = accuracy.lower > baseline, int(classes.max()) + 1
        return OracleScore(variable, count, accuracy, baseline, readable)


def side_variables(data: PromptSet) -> dict[str, Sequence[Hashable]]:
    """Variables of the prompts that an edit of the class should leave alone, a value a prompt.

    Of indirect object identification the names, the template and the position of S2. Positions of
    the names depend on the order, and an edit that writes another order ought to change what is
    read of them; so they are not among these. Of other tasks the position of the marked token, it
    and the token before; of the tokens, those that occur with every class.
    """
    at, word = data.position.unsqueeze(1), data.words.position
    real = data.inputs["position_ids"].gather(1, at).squeeze(1).cpu().double()
    cuts = torch.linspace(0, 1, RANGES + 1, dtype=torch.float64)[1:-1]
    ranges = torch.bucketize(real, real.quantile(cuts).unique()).tolist()
    position: dict[str, Sequence[Hashable]] = {f"position of {word}": ranges}
    if isinstance(data, IOIPrompts):
        names = {"name of S": data.data.s_names, "name of IO": data.data.io_names}
        return names | {"template": data.data.templates.tolist()} | position
    ids, labels = data.inputs["input_ids"], data.labels.tolist()
    found = dict(position)
    for name, columns in ((word, at), (f"the token before {word}", (at - 1).clamp_min(0))):
        tokens = ids.gather(1, columns).squeeze(1).tolist()
        pairs = set(zip(tokens, labels, strict=True))
        everywhere = {t for t in tokens if all((t, k) in pairs for k in set(labels))}
        found[f"which token {word} is" if columns is at else name] = [
            token if token in everywhere else None for token in tokens
        ]
    return found


def total_variation(first: Tensor, second: Tensor) -> Tensor:
    """δ(P, Q) = ½ Σ |P − Q|, (n,), of distributions (n, K)."""
    return (first - second).abs().sum(-1) / 2


def completeness(after: Tensor, target: Tensor) -> Tensor:
    """C = 1 − δ(P̂, P*), with P* all on the target: P̂(target), the oracle's probability of it.

    ``after`` is its distribution over the edited variable's classes after the edit, (n, K).
    """
    return after.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def nullified(after: Tensor) -> Tensor:
    """C = 1 − K/(K − 1) δ(P̂, U), with U uniform over K classes, (n,): for edits that erase.

    1 where the oracle cannot tell the classes apart, 0 where it is certain of one.
    """
    classes = after.shape[-1]
    uniform = torch.full_like(after, 1 / classes)
    return 1 - classes / (classes - 1) * total_variation(after, uniform)


def selectivity(before: Tensor, after: Tensor) -> Tensor:
    """S = 1 − δ(P̂, P) / m, m = max(1 − min P, max P), (n,): how little a variable was moved.

    m is the largest distance that any distribution has from P. Both are the oracle's distributions
    over the classes of a variable that the edit should leave alone, (n, K).
    """
    most = torch.maximum(1 - before.amin(-1), before.amax(-1))
    return 1 - total_variation(after, before) / most


def reliability(complete: Tensor, selective: Tensor) -> Tensor:
    """R = 2 C S / (C + S), the harmonic mean; 0 where both are 0."""
    total = complete + selective
    return torch.where(total > 0, 2 * complete * selective / total.clamp_min(1e-300), 0.0)


def _classes(values: Sequence[Hashable], half: Tensor) -> Tensor:
    """Numbers from 0 for the most frequent values that both halves hold; −1 for the others."""
    halves = half.tolist()
    counts = [Counter(v for v, h in zip(values, halves, strict=True) if h == k) for k in (0, 1)]
    enough = {v: min(c[v] for c in counts) for v in dict.fromkeys(values) if v is not None}
    kept = sorted(
        (v for v, least in enough.items() if least >= LEAST_PROMPTS), key=lambda v: -enough[v]
    )[:MOST_CLASSES]
    number = {value: index for index, value in enumerate(kept)}
    return torch.tensor([number.get(value, -1) for value in values])
