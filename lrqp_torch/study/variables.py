"""What the prompts of a task differ in, as classes that a probe can be fitted to."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.study.context import Task
from lrqp_torch.study.indirect_objects import IOIPrompts, named
from lrqp_torch.study.prompts import PromptSet

ORDER = "order of the names"
POSITION_S1, POSITION_IO = "position of S1", "position of IO"
CLAUSE_S1, CLAUSE_IO = "position of S1 in its clause", "position of IO in its clause"
NAME_S, NAME_IO = "name of S", "name of IO"

VARIABLES = (ORDER, POSITION_S1, POSITION_IO, CLAUSE_S1, CLAUSE_IO, NAME_S, NAME_IO)

MEANINGS = {
    ORDER: "ABB (IO before S1) or BAB",
    POSITION_S1: "token position of S1, counted from the first real token of the input",
    POSITION_IO: "token position of IO, counted from the first real token of the input",
    CLAUSE_S1: "token position that S1 has, or would have, without a prefix",
    CLAUSE_IO: "token position that IO has, or would have, without a prefix",
    NAME_S: "which name S is, among the most frequent ones",
    NAME_IO: "which name IO is, among the most frequent ones",
}

FEWEST = 2
"""A class with fewer training prompts is left out, with its prompts."""


@dataclass(frozen=True)
class Variable:
    """One variable of one task. Prompts of no class are left out."""

    name: str  # one of `VARIABLES`, or what the labels of another task are of
    classes: list[str]  # names of the classes
    train_rows: Tensor  # training prompts that have a class, (n,)
    train_labels: Tensor  # their classes, (n,)
    test_rows: Tensor  # held-out prompts that have a class, (m,)
    test_labels: Tensor  # (m,)

    @property
    def baseline(self) -> float:
        """Share of the most frequent class among the held-out prompts.

        No constant guess is right more often on them, so it never flatters a probe.
        """
        return torch.bincount(self.test_labels).max().item() / len(self.test_labels)


def variables_of(task: Task, plain: Task | None, *, names: int, bins: int) -> list[Variable]:
    """All variables of a task that have at least two classes; the label comes first.

    Of prompts that are not about two names the label is the only one. Positions are classes of
    their own while they take at most ``bins`` values in the training prompts, as they mostly do
    without a prefix; else they are cut at the training prompts' quantiles into at most ``bins``
    ranges. A position within the clause is that of the same template and order in the task without
    a prefix (``plain``; None leaves those out), so it asks the same of both tasks. At most
    ``names`` names are told apart, the most frequent in the training prompts.
    """
    train, test = task.train, task.test
    label = label_name(train)
    made = [_numbered(label, list(train.classes), train.labels.cpu(), test.labels.cpu())]
    if isinstance(train, IOIPrompts) and isinstance(test, IOIPrompts):
        for name, token in ((POSITION_S1, "S1"), (POSITION_IO, "IO")):
            made.append(_of_values(name, _positions(train, token), _positions(test, token), bins))
        if plain is not None:
            for name, token in ((CLAUSE_S1, "S1"), (CLAUSE_IO, "IO")):
                known = _clause_positions([named(plain.train), named(plain.test)], token)
                # −1 where a prompt's template does not occur.
                at = [torch.tensor([known.get(k, -1) for k in _keys(d)]) for d in (train, test)]
                made.append(_of_values(name, at[0], at[1], bins))
        made.append(_of_names(NAME_S, train.data.s_names, test.data.s_names, names))
        made.append(_of_names(NAME_IO, train.data.io_names, test.data.io_names, names))
    return [
        variable
        for variable in made
        if len(variable.classes) > 1 and len(variable.test_rows) and len(variable.train_rows)
    ]


def label_name(prompts: PromptSet) -> str:
    """What the labels are of, as a variable is called."""
    return ORDER if isinstance(prompts, IOIPrompts) else prompts.words.variable


def _positions(data: IOIPrompts, token: str) -> Tensor:
    """Positions counted from the first real token, (n,)."""
    columns = data.positions[token].unsqueeze(1)
    return data.inputs["position_ids"].gather(1, columns).squeeze(1).cpu()


def _keys(data: IOIPrompts) -> list[tuple[int, int]]:
    return list(zip(data.data.templates.tolist(), data.labels.tolist(), strict=True))


def _clause_positions(plain: Sequence[IOIPrompts], token: str) -> dict[tuple[int, int], int]:
    """Position by template and order; the most frequent where a longer word moves it."""
    seen: dict[tuple[int, int], Counter[int]] = {}
    for data in plain:
        for key, value in zip(_keys(data), _positions(data, token).tolist(), strict=True):
            seen.setdefault(key, Counter())[value] += 1
    return {key: min(counts, key=lambda v: (-counts[v], v)) for key, counts in seen.items()}


def _of_values(name: str, train: Tensor, test: Tensor, bins: int) -> Variable:
    """Classes of non-negative numbers: each value, or quantile ranges where there are many."""
    present = train[train >= 0]
    if len(present.unique()) > bins:
        shares = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
        # Cuts lie between whole numbers, so that none falls on a value.
        cuts = present.double().quantile(shares).floor().add(0.5).unique()
    else:
        cuts = present.unique()[:-1].double() + 0.5
    classes = [torch.bucketize(values.double(), cuts) for values in (train, test)]
    # A value that never occurs in training has no class of its own.
    seen = torch.isin(test, present) | (len(present.unique()) > bins)
    train_class = torch.where(train >= 0, classes[0], -1)
    test_class = torch.where((test >= 0) & seen, classes[1], -1)
    labels = []
    for index in range(len(cuts) + 1):
        inside = train[train_class == index].tolist()
        low, high = (min(inside), max(inside)) if inside else (0, 0)
        labels.append(str(low) if low == high else f"{low} to {high}")
    return _numbered(name, labels, train_class, test_class)


def _of_names(name: str, train: Sequence[str], test: Sequence[str], most: int) -> Variable:
    counts = Counter(train)
    kept = sorted(counts, key=lambda n: (-counts[n], n))[:most]
    number = {value: index for index, value in enumerate(kept)}
    classes = [torch.tensor([number.get(value, -1) for value in split]) for split in (train, test)]
    return _numbered(name, kept, classes[0], classes[1])


def _numbered(name: str, labels: list[str], train: Tensor, test: Tensor) -> Variable:
    """Leave out classes with too few training prompts, and number the rest from 0."""
    counts = torch.bincount(train[train >= 0], minlength=len(labels))
    kept = (counts >= FEWEST).nonzero().flatten()
    new = torch.full((len(labels) + 1,), -1)
    new[kept] = torch.arange(len(kept))
    # Index −1 reads the last entry, which stays −1.
    train, test = new[train], new[test]
    train_rows, test_rows = ((split >= 0).nonzero().flatten() for split in (train, test))
    return Variable(
        name=name,
        classes=[labels[index] for index in kept.tolist()],
        train_rows=train_rows,
        train_labels=train[train_rows],
        test_rows=test_rows,
        test_labels=test[test_rows],
    )
