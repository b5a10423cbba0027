"""Random numbers and random probes, the same for every run."""

import torch
from torch import Tensor

from lrqp_torch import LinearProbe


def normal(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def probe_of(n_classes: int, seed: int, width: int) -> LinearProbe:
    probe = LinearProbe(width, n_classes, dtype=torch.float64).requires_grad_(False)
    probe.weight.copy_(normal(n_classes, width, seed=seed))
    probe.bias.copy_(normal(n_classes, seed=seed + 100))
    return probe
