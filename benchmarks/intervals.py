"""How often 95 % intervals hold the truth, on values as skewed as KL is.

    python -m benchmarks.intervals [--small]

Samples of n prompts are drawn from a lognormal distribution (σ = 1), from one in which 3 % of the
prompts carry the effect, and in templates whose means differ, and the bootstrap of
:mod:`lrqp_torch.study.estimates` is asked for the interval of the mean: BCa, the percentiles that
it took the place of, and over templates.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lrqp_torch.study.estimates import bootstrap, resampled_sums

Draw = Callable[[int, torch.Generator], Tensor]
TEMPLATES, APART = 18, 0.15


def lognormal(n: int, generator: torch.Generator) -> Tensor:
    """exp(z), z standard normal, of mean √e."""
    return torch.randn(n, generator=generator, dtype=torch.float64).exp()


def rare(n: int, generator: torch.Generator) -> Tensor:
    """0, but for 3 % of the prompts, whose values are exponential with mean 1."""
    some = torch.rand(n, generator=generator) < 0.03
    return some * torch.empty(n, dtype=torch.float64).exponential_(generator=generator)


CASES: dict[str, tuple[Draw, float]] = {
    "lognormal": (lognormal, math.sqrt(math.e)),
    "3 % carry it": (rare, 0.03),
}


def percentiles(values: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of resampled means, as version 0.3 took them."""
    means = resampled_sums(values[:, None], generator, 1000)[:, 0] / len(values)
    ends = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def coverage(draw: Draw, mean: float, n: int, runs: int) -> tuple[float, float]:
    """Share of runs in which the interval holds the mean: BCa, and percentiles."""
    generator, held = torch.Generator().manual_seed(0), [0, 0]
    for _ in range(runs):
        values = draw(n, generator)
        for index, interval in enumerate((bootstrap, percentiles)):
            lower, upper = interval(values, generator)
            held[index] += lower <= mean <= upper
    return held[0] / runs, held[1] / runs


def over_templates(n: int, runs: int) -> tuple[float, float]:
    """The same of a share in templates that differ with sd 0.15: by template, and by prompt."""
    generator, held = torch.Generator().manual_seed(0), [0, 0]
    groups = torch.arange(n) % TEMPLATES
    for _ in range(runs):
        shares = 0.5 + APART * torch.randn(TEMPLATES, generator=generator, dtype=torch.float64)
        values = (torch.rand(n, generator=generator) < shares[groups]).double()
        for index, given in enumerate((groups, None)):
            lower, upper = bootstrap(values, generator, groups=given)
            held[index] += lower <= 0.5 <= upper
    return held[0] / runs, held[1] / runs


def main() -> None:
    """Print the coverage of each interval."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer runs")
    runs = 100 if parser.parse_args().small else 1000
    print(f"share of {runs} runs in which a 95 % interval holds the mean")
    for name, (draw, mean) in CASES.items():
        for n in (20, 50, 200, 500):
            bca, plain = coverage(draw, mean, n, runs)
            print(f"{name:>14}, n = {n:>3}: BCa {bca:.1%}, percentiles {plain:.1%}")
    grouped, alone = over_templates(500, runs)
    print(f"{TEMPLATES} templates, n = 500: over templates {grouped:.1%}, over prompts {alone:.1%}")


if __name__ == "__main__":
    main()
