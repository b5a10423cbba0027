"""Indirect object identification as a task of the study: its prompts, and what things are called.

The variable edited is the order of the two names of the first clause, read at the second mention of
the subject (S2); the answer after the last token (END) is the indirect object (IO) or the subject.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lrqp_torch.errors import PromptError, SettingError, quoted
from lrqp_torch.ioi import IOIDataset, swap_identity, swap_order
from lrqp_torch.study.prompts import ALL, PromptSet, Twins, Values, Words

WORDS = Words(
    variable="the order of the names",
    value="order",
    position="S2",
    end="END",
    held="IO",
    other="S",
    answers="the two names",
    preference="IO − S",
    unit="logits",
    question="In “When Mary and John went to the store, John gave a drink to”, the right answer is "
    "the name that was not repeated: Mary, the indirect object (IO), and not John, the subject "
    "(S). To tell, a model can keep track of which of the two names came first when it meets "
    "the second “John” (the token S2). A probe shows where that order can be read. But what "
    "can be read need not be used. So the activation at S2 is moved to the nearest point, in "
    "Mahalanobis distance, at which the probe believes the other order, and the model goes on "
    "from there: where it uses the order, its answer turns from IO to S.",
)

NAMES_NEEDED = (
    "it follows attention to the two names, which only the prompts of `lrqp reproduce` have"
)
"""Why a part of the study cannot run on prompts of another task."""


ORDER, IDENTITY = "order", "identity"
"""What S2 tells: which name came first, and whose name it is."""


@dataclass(frozen=True, eq=False, repr=False)
class IOIPrompts(PromptSet):
    """IOI prompts with the order of the names as their class, ABB (1) or BAB (0).

    Answering in the sense of the class that holds is to answer IO, in that of the other one S, so
    that :meth:`PromptSet.preference` is the logit difference IO − S.
    """

    data: IOIDataset  # the prompts as they were generated, with names, templates and all positions
    names: tuple[str, ...]  # names that S may have, the classes of its identity, in order
    words = WORDS
    variables = (ORDER, IDENTITY, ALL)

    @classmethod
    def of(cls, data: IOIDataset, names: tuple[str, ...] | None = None) -> Self:
        """The prompts of a data set, whose padding stays; ``names`` default to those that occur."""
        order = data.labels["abb"]
        own_first = torch.stack([data.io_tokens, data.s_tokens], dim=-1)
        answers = torch.where((order == 0).unsqueeze(-1), own_first, own_first.flip(-1))
        return cls(
            inputs=data.inputs,
            position=data.positions["S2"],
            end=data.positions["END"],
            labels=order,
            classes=("BAB", "ABB"),
            answers=answers.unsqueeze(-1),
            prompts=data.prompts,
            groups=data.templates,
            data=data,
            names=tuple(sorted({*data.s_names, *data.io_names})) if names is None else names,
        )

    def values(self, variable: str) -> Values:
        """See :meth:`PromptSet.values`: also the identity of S, which name it is."""
        if variable == ORDER:
            return Values(self.classes, self.labels)
        if variable != IDENTITY:
            return super().values(variable)
        numbers = [self.names.index(name) for name in self.data.s_names]
        return Values(self.names, torch.tensor(numbers, device=self.labels.device))

    @property
    def positions(self) -> dict[str, Tensor]:
        """The named tokens: those of every task, and IO, S1, S1+1, S2, END, first and second."""
        return {**super().positions, **self.data.positions}

    @property
    def called(self) -> tuple[tuple[str, str], ...]:
        """For each prompt both names: of the indirect object and of the subject."""
        return tuple(zip(self.data.io_names, self.data.s_names, strict=True))

    @property
    def pointed_out(self) -> dict[str, Tensor]:
        """The tokens IO, S1, S2 and END, (n,)."""
        return {name: self.data.positions[name] for name in ("IO", "S1", "S2", "END")}

    @property
    def io_tokens(self) -> Tensor:
        """Token id of the indirect object, (n,)."""
        return self.data.io_tokens

    @property
    def s_tokens(self) -> Tensor:
        """Token id of the subject, (n,)."""
        return self.data.s_tokens

    def twins(
        self, variable: str | None = None, target: Tensor | None = None
    ) -> Twins[Self] | None:
        """Each prompt's minimal pair, which differs in what S2 tells of one variable alone.

        In ``"order"`` (default) the names of the first clause change places; in ``"identity"`` the
        two people change roles; in ``"all"`` both, so that S2 is the other name and nothing else
        differs. ``target`` is the order of each twin, (n,); default the other one. None where no
        prompt has one, or the answers are not the names in the prompts. Raises SettingError:
        another variable.
        """
        if variable not in (None, *self.variables):
            raise SettingError(
                f"prompts about two names have twins in {', '.join(self.variables)}, not in "
                f"{quoted(variable or '')}"
            )
        try:
            data = swap_identity(self.data) if variable in (IDENTITY, ALL) else self.data
            twins = self.of(data if variable == IDENTITY else swap_order(data), self.names)
        except PromptError:  # answers that are not the names in the prompts
            return None
        wanted = twins.labels if target is None else target.to(twins.labels)
        known = wanted == twins.labels
        return Twins(twins, known) if bool(known.any()) else None

    def trimmed(self) -> Self:
        """See :meth:`PromptSet.trimmed`."""
        shorter = super().trimmed()
        spare = self.end[:1] - shorter.end[:1]
        positions = {name: columns - spare for name, columns in self.data.positions.items()}
        return self.of(replace(self.data, inputs=shorter.inputs, positions=positions), self.names)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Self:
        return self.of(self.data[index], self.names)

    def to(self, device: torch.device | str) -> Self:
        """The same prompts with their tensors on ``device``."""
        return self.of(self.data.to(device), self.names)


def named(prompts: PromptSet) -> IOIPrompts:
    """The same prompts, for what asks for the tokens IO and S1.

    Raises:
        PromptError: they are of another task.
    """
    if not isinstance(prompts, IOIPrompts):
        raise PromptError(NAMES_NEEDED)
    return prompts
