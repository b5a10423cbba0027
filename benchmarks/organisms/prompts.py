"""Batches of prompts for training: pairs of twins that differ in the order of the names alone."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrqp_torch.ioi import IOIDataset


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts, every one ending just before its answer.

    Attributes:
        ids: Token ids, ``(batch, tokens)``.
        present: ``(batch, tokens)``, false on padding.
        position_ids: ``(batch, tokens)``.
        first: Position of the first name, ``(batch,)``.
        second: Position of the second name, ``(batch,)``.
        s2: Position of the repeated name, ``(batch,)``.
        abb: 1 where the repeated name equals the second name, else 0, ``(batch,)``.
    """

    ids: Tensor
    present: Tensor
    position_ids: Tensor
    first: Tensor
    second: Tensor
    s2: Tensor
    abb: Tensor

    @classmethod
    def from_dataset(cls, dataset: IOIDataset) -> "Prompts":
        """Take the prompts of a left-padded data set.

        Args:
            dataset: Generated with ``padding_side="left"``.

        Returns:
            The same prompts.
        """
        return cls(
            ids=dataset.inputs["input_ids"],
            present=dataset.inputs["attention_mask"].bool(),
            position_ids=dataset.inputs["position_ids"],
            first=dataset.positions["first"],
            second=dataset.positions["second"],
            s2=dataset.positions["S2"],
            abb=dataset.labels["abb"],
        )

    def __len__(self) -> int:
        """Count the prompts."""
        return len(self.ids)

    @property
    def rows(self) -> Tensor:
        """Row numbers, ``(batch,)``, for indexing with positions."""
        return torch.arange(len(self))

    @property
    def subject(self) -> Tensor:
        """Token of the repeated name, ``(batch,)``."""
        return self.ids[self.rows, self.s2]

    @property
    def answer(self) -> Tensor:
        """Token of the name that is not repeated, ``(batch,)``."""
        other = torch.where(self.abb == 1, self.first, self.second)
        return self.ids[self.rows, other]

    def select(self, rows: Tensor) -> "Prompts":
        """Take some rows, and drop the columns that are padding in all of them."""
        cut = int(self.present[rows].any(0).int().argmax())
        return Prompts(
            self.ids[rows, cut:],
            self.present[rows, cut:],
            self.position_ids[rows, cut:],
            self.first[rows] - cut,
            self.second[rows] - cut,
            self.s2[rows] - cut,
            self.abb[rows],
        )

    def twins(self) -> "Prompts":
        """Exchange the two names of the first clause: same answer, same tokens, other order."""
        ids = self.ids.clone()
        ids[self.rows, self.first] = self.ids[self.rows, self.second]
        ids[self.rows, self.second] = self.ids[self.rows, self.first]
        return replace(self, ids=ids, abb=1 - self.abb)

    def with_twins(self) -> "Prompts":
        """Append every prompt's twin: row ``i`` and row ``i + n`` are a pair."""
        pairs = zip(vars(self).values(), vars(self.twins()).values(), strict=True)
        return Prompts(*(torch.cat(pair) for pair in pairs))

    def renamed(self, names: Tensor) -> "Prompts":
        """Give every prompt two fresh names and a fresh order.

        Args:
            names: Token ids to draw from.

        Returns:
            New prompts over the same templates.
        """
        drawn = names[torch.rand(len(self), len(names)).argsort(1)[:, :2]]
        abb = torch.randint(0, 2, (len(self),))
        ids = self.ids.clone()
        ids[self.rows, self.first] = drawn[:, 0]
        ids[self.rows, self.second] = drawn[:, 1]
        ids[self.rows, self.s2] = drawn[self.rows, abb]
        return replace(self, ids=ids, abb=abb)

    @staticmethod
    def where(condition: Tensor, first: "Prompts", second: "Prompts") -> "Prompts":
        """Take each row from ``first`` where ``condition``, ``(batch,)``, holds, else ``second``.

        The two differ in their names alone.
        """
        return replace(
            first,
            ids=torch.where(condition[:, None], first.ids, second.ids),
            abb=torch.where(condition, first.abb, second.abb),
        )

    def scrambled(self, share: Tensor, replacement: Tensor) -> "Prompts":
        """Replace some of the words before the first name, as arbitrary prefixes would.

        Args:
            share: Chance of each such word to be replaced, ``(batch, 1)``.
            replacement: Token ids to put there, ``(batch, tokens)``.

        Returns:
            The prompts with names, positions and answers as before.
        """
        before = torch.arange(self.ids.shape[1]) < self.first[:, None]
        hit = (torch.rand(self.ids.shape) < share) & before & self.present
        return replace(self, ids=torch.where(hit, replacement, self.ids))

    def shifted(self, offset: Tensor) -> "Prompts":
        """Add ``offset``, ``(batch, 1)``, to the position ids."""
        return replace(self, position_ids=self.position_ids + offset)
