"""Linear readers of what the organism is to know where; hints for its training."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrqp_torch.models.training.forward import Stream
from lrqp_torch.models.training.recipe import Recipe


class Readers(nn.Module):
    """Linear readers of what is to be where, as hints: they are no part of the model.

    They ask for: which of the two a name is, at its token before the first used site; the order,
    at S2 at the first two used sites; the order that S2 told, at the last token just after the
    last used site.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.used = recipe.used
        self.place = nn.Linear(recipe.width, 2)
        self.orders = nn.ModuleList(nn.Linear(recipe.width, 2) for _ in recipe.used[:2])
        self.end = nn.Linear(recipe.width, 2)

    def s2(self, activations: Tensor) -> Tensor:
        """Scores of both orders from S2's streams, ``(sites, batch, d)``: ``(2, batch, 2)``."""
        read = zip(self.orders, activations[self.used.start :], strict=False)
        return torch.stack([order(stream) for order, stream in read])

    def place_loss(self, names: Tensor) -> Tensor:
        """Loss on first or second, from the two names' streams, ``(sites, 2, batch, d)``."""
        scores = self.place(names[self.used.start - 1])
        places = torch.arange(2)[:, None].expand(scores.shape[:2])
        return functional.cross_entropy(scores.flatten(0, 1), places.flatten())

    def end_loss(self, stream: Stream, order: Tensor) -> Tensor:
        """Loss on the order, ``(batch,)``, read at the last token."""
        return functional.cross_entropy(self.end(stream.ends[self.used.stop]), order)
