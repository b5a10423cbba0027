"""Linear readers of what an organism is to know where; hints for its training."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.organisms.forward import Stream
from benchmarks.organisms.prompts import Prompts
from benchmarks.organisms.recipe import Recipe


class Readers(nn.Module):
    """Linear readers of what is to be where, as hints: they are no part of the model.

    Unless the order is to be absent, they ask for: which of the two a name is, at its token before
    the order is known; the order, at S2 at the first two sites that are to know it. Always: what
    S2 told, at the last token just after it read S2; the order where it is used, else the name.

    Args:
        recipe: Of the organism.
        n_tokens: Size of its vocabulary.
    """

    def __init__(self, recipe: Recipe, n_tokens: int) -> None:
        super().__init__()
        self.uses_order = recipe.kind == "used"
        self.first_known = recipe.sites.index(recipe.first_known)
        self.after_read = recipe.used.stop
        if recipe.kind != "absent":
            self.place = nn.Linear(recipe.width, 2)
            self.orders = nn.ModuleList(nn.Linear(recipe.width, 2) for _ in range(2))
        self.end = nn.Linear(recipe.width, 2 if self.uses_order else n_tokens)

    def s2(self, activations: Tensor) -> Tensor:
        """Scores of both orders from S2's streams, ``(sites, batch, d)``: ``(2, batch, 2)``."""
        read = zip(self.orders, activations[self.first_known :], strict=False)
        return torch.stack([order(stream) for order, stream in read])

    def place_loss(self, names: Tensor) -> Tensor:
        """Loss on first or second, from the two names' streams, ``(sites, 2, batch, d)``."""
        scores = self.place(names[self.first_known - 1])
        places = torch.arange(2)[:, None].expand(scores.shape[:2])
        return functional.cross_entropy(scores.flatten(0, 1), places.flatten())

    def last(self, stream: Stream) -> Tensor:
        """Scores, at the last token, of what S2 told: both orders, or all tokens."""
        scores: Tensor = self.end(stream.ends[self.after_read])
        return scores

    def told(self, prompts: Prompts, flips: Tensor) -> Tensor:
        """What S2 told: the order, exchanged where ``flips``, or the token of the name there."""
        return prompts.abb ^ flips.long() if self.uses_order else prompts.subject
