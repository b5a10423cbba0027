"""Shared fixtures: one thread, a fixed seed for every test, and small seeded data."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from torch import Tensor

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Batches of tiny matrices only lose by threads, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture
def clusters() -> tuple[Tensor, Tensor]:
    """300 activations of width 12 in three overlapping classes; float64."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.arange(300) % 3
    shape = normal(12, 12) / 12**0.5 + torch.eye(12, dtype=torch.float64)
    return normal(300, 12) @ shape + 0.6 * normal(3, 12)[labels] + 3, labels
