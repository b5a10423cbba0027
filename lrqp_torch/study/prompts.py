"""Prompts of any task as tokens: where to edit, what holds there, and which answers go with it."""

import random
import re
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor

from lrqp_torch.errors import PromptError, SettingError, TokenizerError, quoted
from lrqp_torch.stream.text import encode, pad, require_fast, row_numbers, token_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENING, CLOSING = "[[", "]]"
"""The marks around the words at whose last token a prompt is read and edited."""

PAIRING = ("pairs", "groups")
"""Attributes of prompts that say which of them go together."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_MARKED = re.compile(r"(.*?)\[\[(.+?)\]\](.*)", re.DOTALL)


@dataclass(frozen=True)
class Prompt:
    """One prompt before it is tokens.

    Attributes:
        text: with at most one marked span, as in ``"The [[keys]] to the cabinet"``; the last token
            of the span is the position. Without a mark it is the prompt's last token.
        label: name of the class that holds.
        answers: for each class the continuations that go with it, each of one token, such as
            ``{"plural": (" are", " were"), "singular": (" is", " was")}``; None where the task has
            none, and then edits can be made but not judged by what the model says.
        pair: prompts of one pair say the same but for the class; None to match prompts whose
            texts are the same but for the marked words.
        group: what it has in common with others, such as an entity or a template: prompts of one
            group are not independent, and are not matched with those of another.
    """

    text: str
    label: str
    answers: Mapping[str, tuple[str, ...]] | None = None
    pair: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Words:
    """What the things of a task are called in figures and sentences.

    Attributes:
        variable: what the classes are of, with its article.
        value: what one of the classes is, without an article: "the other ...", "the true ...".
        position: the token that is read and edited.
        end: the token after which the answer is read.
        held: the answer in the sense of the class that holds.
        other: the answer in the sense of the counterfactual class.
        answers: those of all classes together.
        preference: score of the one minus that of the other.
        unit: of the scores.
        question: what a study of the task asks, for a reader who has not met it; may be empty.
    """

    variable: str = "the class"
    value: str = "class"
    position: str = "the marked token"
    end: str = "the last token"
    held: str = "the class that holds"
    other: str = "the other class"
    answers: str = "the answers"
    preference: str = "class that holds − other"
    unit: str = "nats"
    question: str = ""


P = TypeVar("P", bound="PromptSet")


@dataclass(frozen=True)
class Twins(Generic[P]):
    """For each of n prompts one that differs from it in one variable alone.

    Attributes:
        prompts: n prompts, the twin of each; the prompt itself where none is known.
        known: which have one, BoolTensor (n,).
        rows: where the twins stand among the prompts that they are of, LongTensor (n,); None where
            they are not among them.
    """

    prompts: P
    known: Tensor
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class PromptSet:
    """Prompts of a task, n of them, padded to T tokens.

    Attributes:
        inputs: ``input_ids``, ``attention_mask``, ``position_ids``, LongTensors (n, T), ready for
            ``model(**inputs)``.
        position: where each prompt is read and edited, on the padded input, LongTensor (n,).
        end: the last token of each, after which the answer is read, LongTensor (n,).
        labels: class of each, LongTensor (n,).
        classes: names of the K classes; ``labels`` counts in their order.
        answers: token ids that go with each class, LongTensor (n, K, A), −1 where there are fewer
            than A; None where the task has none.
        prompts: the texts, without marks.
        pairs: number of the pair, or of the texts that are the same but for the marked words, to
            which each prompt belongs, LongTensor (n,), −1 for none; None where the task has none.
        groups: number of the group of each, LongTensor (n,); None for prompts without groups, which
            are then taken to be independent.
        words: what the things of the task are called.
    """

    words: ClassVar[Words] = Words()
    variables: ClassVar[tuple[str, ...]] = ()
    """Names of the variables that :meth:`twins` can be asked for, the class first."""

    inputs: dict[str, Tensor]
    position: Tensor
    end: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    answers: Tensor | None
    prompts: tuple[str, ...]
    pairs: Tensor | None = field(default=None, kw_only=True)
    groups: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check what says where, and what holds there.

        Raises:
            PromptError: positions, ends, labels, pairs or groups that are no integers, or not one
                a prompt.
        """
        for name in ("position", "end", "labels", *PAIRING):
            given = getattr(self, name)
            if given is None and name in PAIRING:
                continue
            if given.shape != (len(self.prompts),) or given.dtype not in _INTEGERS:
                raise PromptError(
                    f"{name} must be ({len(self.prompts)},) integers, one a prompt, got "
                    f"{tuple(given.shape)} {given.dtype}"
                )

    @classmethod
    def encode(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        prompts: Sequence[Prompt],
        classes: Sequence[str] | None = None,
        *,
        padding_side: Literal["right", "left"] = "left",
    ) -> Self:
        """Tokenise prompts.

        Args:
            tokenizer: a fast transformers tokenizer; it is not changed.
            prompts: at least one.
            classes: names of the classes in order; default those that occur, sorted.
            padding_side: where shorter prompts are padded.

        Raises:
            PromptError: no prompts, marks that do not pair, a label or an answer of no class, a
                class without an answer.
            TokenizerError: no offsets, or an answer that is not one token behind its prompt.
        """
        require_fast(tokenizer)
        names = _classes(prompts, classes)
        split = [unmark(row, prompt.text) for row, prompt in enumerate(prompts)]
        encoding = encode(tokenizer, [text for text, _ in split])
        positions, ends = [], []
        for row, (text, character) in enumerate(split):
            at, last = token_at(encoding, row, character), token_at(encoding, row, len(text) - 1)
            if at < 0 or last < 0:
                raise TokenizerError(
                    f"prompt {row}: no token of {text!r} holds character "
                    f"{character if at < 0 else len(text) - 1}; end prompts and marked spans with "
                    f"a letter, not with a space"
                )
            positions.append(at)
            ends.append(last)
        # What a tokenizer adds behind a text would stand between the prompt and its answer.
        rows = [
            torch.tensor(ids[: last + 1])
            for ids, last in zip(encoding["input_ids"], ends, strict=True)
        ]
        inputs = pad(rows, tokenizer, padding_side)
        position, end = torch.tensor(positions), torch.tensor(ends)
        left = padding_side == "left"
        shift = inputs["input_ids"].shape[1] - 1 - end if left else torch.zeros_like(end)
        return cls(
            inputs=inputs,
            position=position + shift,
            end=end + shift,
            labels=torch.tensor([names.index(prompt.label) for prompt in prompts]),
            classes=names,
            answers=_answer_ids(tokenizer, prompts, [text for text, _ in split], rows, names),
            prompts=tuple(text for text, _ in split),
            pairs=_numbered([_frame(prompt) for prompt in prompts]),
            groups=_numbered([prompt.group for prompt in prompts]),
        )

    @property
    def positions(self) -> dict[str, Tensor]:
        """The named tokens of each prompt, (n,): ``"mark"`` and ``"end"``."""
        return {"mark": self.position, "end": self.end}

    def scores(self, logits: Tensor) -> Tensor:
        """How strongly the model answers in the sense of each class, (n, K), float64.

            s_c = log Σ_{a ∈ answers of c} exp(logit_a)

        so that s_c − s_ℓ is the log odds of answering with c rather than with ℓ.

        Args:
            logits: of the token after each prompt, (n, vocabulary).

        Raises:
            PromptError: the task has no answers.
        """
        answers = self._answered().to(logits.device)
        chosen = logits.double().gather(-1, answers.clamp_min(0).flatten(1)).view(answers.shape)
        return chosen.masked_fill(answers < 0, float("-inf")).logsumexp(-1)

    def preference(self, logits: Tensor, against: Tensor) -> Tensor:
        """Score of the class that holds minus that of another, (n,): positive where answered so.

        Args:
            logits: of the token after each prompt, (n, vocabulary).
            against: the other class, LongTensor (n,).
        """
        scores = self.scores(logits)
        pair = torch.stack([self.labels, against.to(self.labels)], -1).to(scores.device)
        own, other = scores.gather(-1, pair).unbind(-1)
        return own - other

    def probability(self, logits: Tensor) -> Tensor:
        """Softmax probability of the answers of the class that holds, (n,), float64.

        Args:
            logits: of the token after each prompt, (n, vocabulary).

        Raises:
            PromptError: the task has no answers.
        """
        rows = torch.arange(len(self), device=self.labels.device)
        own = self._answered()[rows, self.labels].to(logits.device)
        chances = logits.double().softmax(-1).gather(-1, own.clamp_min(0))
        return chances.masked_fill(own < 0, 0.0).sum(-1)

    @property
    def called(self) -> tuple[tuple[str, str], ...]:
        """For each prompt what its answers in the sense of both classes are called.

        The class that holds first, then the counterfactual one.
        """
        names, count = self.classes, len(self.classes)
        return tuple((names[k], names[(k + 1) % count]) for k in self.labels.tolist())

    @property
    def pointed_out(self) -> dict[str, Tensor]:
        """The tokens that a reader is to be shown, by what they are called, (n,)."""
        return {self.words.position: self.position, self.words.end: self.end}

    def twins(
        self, variable: str | None = None, target: Tensor | None = None
    ) -> Twins[Self] | None:
        """For each prompt one of these that is of the same pair and of another class.

        Where several are, it is that which follows it, so that all of them are somebody's twin.

        Args:
            variable: in which twins differ; None for the class.
            target: class of each twin, (n,); default the next class.

        Returns:
            None where no prompt has one.

        Raises:
            SettingError: the task does not know the variable.
        """
        if variable not in (None, *self.variables):
            raise SettingError(
                f"these prompts have no twins that differ in {quoted(variable or '')}; they know "
                f"{', '.join(self.variables) or 'their class alone'}"
            )
        if self.pairs is None:
            return None
        labels, pairs = self.labels.tolist(), self.pairs.tolist()
        wanted = (
            [(k + 1) % len(self.classes) for k in labels] if target is None else target.tolist()
        )
        rows: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(pairs, labels, strict=True)):
            rows.setdefault(key, []).append(row)
        own = list(range(len(self)))
        for row, key in enumerate(zip(pairs, wanted, strict=True)):
            found = rows.get(key) if key[0] >= 0 and key[1] != labels[row] else None
            if found:
                # The first behind it, or else the first of all.
                own[row] = found[bisect(found, row) % len(found)]
        at = torch.tensor(own, device=self.labels.device)
        known = at != torch.arange(len(self), device=at.device)
        return Twins(self[at], known, at) if bool(known.any()) else None

    def trimmed(self) -> Self:
        """The same prompts without the padding on the left that none of them needs."""
        spare = self.spare_columns()
        return replace(
            self,
            inputs={name: tensor[:, spare:] for name, tensor in self.inputs.items()},
            position=self.position - spare,
            end=self.end - spare,
        )

    def spare_columns(self) -> int:
        """How many columns on the left are padding in every prompt."""
        return int((self.inputs["attention_mask"].cumsum(1) == 0).sum(1).min())

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    def __repr__(self) -> str:
        """Size, classes and an example: the tensors would fill pages."""
        example = f", e.g. {self.prompts[0]!r}" if self.prompts else ""
        return f"PromptSet(n={len(self)}, classes={', '.join(self.classes)}{example})"

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Self:
        """The chosen prompts, with the same padding; one int gives a set of length 1.

        Raises:
            SelectionError: an index is out of range, or of a wrong shape or dtype.
        """
        rows = row_numbers(index, len(self))
        here = rows.to(self.labels.device)
        texts = tuple(self.prompts[row] for row in rows.tolist())
        return self._change_tensors(lambda tensor: tensor[here], prompts=texts)

    def __iter__(self) -> Iterator[Self]:
        """The prompts one by one, each a set of length 1."""
        return (self[row] for row in range(len(self)))

    def to(self, device: torch.device | str) -> Self:
        """The same prompts with their tensors on ``device``."""
        return self._change_tensors(lambda tensor: tensor.to(device))

    def _answered(self) -> Tensor:
        if self.answers is None:
            raise PromptError(
                "these prompts have no answers, so what the model says cannot be scored; give "
                "each prompt the answers of every class"
            )
        return self.answers

    def _change_tensors(self, change: Callable[[Tensor], Tensor], **others: Any) -> Self:
        perhaps: dict[str, Any] = {
            name: None if (given := getattr(self, name)) is None else change(given)
            for name in ("answers", *PAIRING)
        }
        return replace(
            self,
            **others,
            **perhaps,
            inputs={name: change(value) for name, value in self.inputs.items()},
            position=change(self.position),
            end=change(self.end),
            labels=change(self.labels),
        )


def _classes(prompts: Sequence[Prompt], classes: Sequence[str] | None) -> tuple[str, ...]:
    if not prompts:
        raise PromptError("no prompts were given")
    names = tuple(sorted({prompt.label for prompt in prompts}) if classes is None else classes)
    if len(set(names)) != len(names) or len(names) < 2:
        raise PromptError(
            f"a task needs at least two different classes, got {', '.join(map(repr, names))}"
        )
    for row, prompt in enumerate(prompts):
        answers = prompt.answers
        wrong = [prompt.label] if prompt.label not in names else []
        wrong += [] if answers is None else [name for name in answers if name not in names]
        if wrong:
            raise PromptError(
                f"prompt {row} names the class {wrong[0]!r}; the classes are {', '.join(names)}"
            )
        if (answers is None) != (prompts[0].answers is None):
            raise PromptError(f"prompts 0 and {row}: give answers to all prompts or to none")
        empty = [] if answers is None else [name for name in names if not answers.get(name)]
        if empty:
            raise PromptError(f"prompt {row} has no answer for the class {empty[0]!r}")
        said = [] if answers is None else [text for name in names for text in answers[name]]
        if any("\0" in text for text in (prompt.label, *said)):
            raise PromptError(f"prompt {row} holds a NUL character in its label or an answer")
    return names


def _frame(prompt: Prompt) -> tuple[str | None, ...] | None:
    """What prompts of one pair have in common; None where nothing says so."""
    if prompt.pair is not None:
        return prompt.group, prompt.pair
    found = _MARKED.fullmatch(prompt.text)
    return None if found is None else (prompt.group, found[1], found[3])


def _numbered(names: Sequence[Hashable]) -> Tensor | None:
    """Names as numbers from 0, (n,), −1 for None; None where all are."""
    number: dict[Hashable, int] = {}
    found = [-1 if name is None else number.setdefault(name, len(number)) for name in names]
    return torch.tensor(found) if number else None


def unmark(row: int, marked: str) -> tuple[str, int]:
    """The text without its marks, and the character at whose token to edit.

    Raises:
        PromptError: marks that do not pair, several of them, or no text that can be one.
    """
    found = _MARKED.fullmatch(marked)
    before, span, after = found.groups() if found else ("", marked, "")
    text = before + span + after
    if not span or OPENING in text or CLOSING in text:
        raise PromptError(
            f"prompt {row}: {quoted(marked)} needs one marked span, as in "
            f"'The {OPENING}keys{CLOSING} to the cabinet', or none for its last token"
        )
    if "\0" in text:
        raise PromptError(f"prompt {row}, {quoted(marked)}, holds a NUL character; remove it")
    return text, len(before) + len(span) - 1


def _answer_ids(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    rows: Sequence[Tensor],
    classes: tuple[str, ...],
) -> Tensor | None:
    """Token ids (n, K, A) of the answers, found behind each prompt, where they will be read."""
    given = [prompt.answers for prompt in prompts if prompt.answers is not None]
    if not given:
        return None
    asked = [
        (row, index, answer)
        for row, answers in enumerate(given)
        for index, name in enumerate(classes)
        for answer in answers[name]
    ]
    encoding = encode(tokenizer, [texts[row] + answer for row, _, answer in asked])
    most = max(len(texts_of_class) for answers in given for texts_of_class in answers.values())
    ids = torch.full((len(prompts), len(classes), most), -1)
    for number, (row, index, answer) in enumerate(asked):
        whole = torch.tensor(encoding["input_ids"][number])
        last = token_at(encoding, number, len(texts[row]) + len(answer) - 1)
        length = len(rows[row])
        if last != length or not torch.equal(whole[:length], rows[row]):
            raise TokenizerError(
                f"prompt {row}: the answer {answer!r} is not one token of its own behind "
                f"{texts[row]!r}; begin it with a space where a word follows, or choose another"
            )
        token = int(whole[length])
        if bool((ids[row] == token).any()):
            raise PromptError(
                f"prompt {row}: the answer {answer!r} is given twice, so it would speak for no "
                f"class; give each class answers of its own"
            )
        ids[row, index, int((ids[row, index] >= 0).sum())] = token
    return ids


def split(
    prompts: Sequence[Prompt], train_share: float = 0.5, seed: int = 0
) -> tuple[list[Prompt], list[Prompt]]:
    """Divide prompts so that both sides hold every class in the same shares, but for rounding.

    Prompts with the same words stay on one side, wherever their marks are: a probe must not be
    tested on what it was fitted to. Where such prompts have several labels, texts with the same
    labels are divided among themselves; one that is alone with its labels goes to the side that
    lacks them more.

    Args:
        prompts: at least two different texts of each class.
        train_share: of each class, to fit on; strictly between 0 and 1.
        seed: of the order in which they are drawn.

    Returns:
        ``(train, test)``, each in random order.

    Raises:
        SettingError: a share that leaves a side without prompts.
        PromptError: no prompts, the same prompt under two labels, or a class with too few different
            texts to be on both sides.
    """
    if not 0 < train_share < 1:
        raise SettingError(
            f"train_share is {train_share}: it must lie between 0 and 1, without either, so that "
            f"there are prompts to fit on and prompts held out"
        )
    if not prompts:
        raise PromptError("no prompts were given")
    _refuse_contradictions(prompts)
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        words = prompt.text.replace(OPENING, "").replace(CLOSING, "")
        groups.setdefault(words, []).append(prompt)
    by_labels: dict[tuple[str, ...], list[list[Prompt]]] = {}
    for group in groups.values():
        by_labels.setdefault(tuple(sorted(_labels(group))), []).append(group)
    for label in sorted(_labels(prompts)):
        texts = sum(len(own) for labels, own in by_labels.items() if label in labels)
        if texts < 2:
            raise PromptError(
                f"class {label!r} has {texts} different texts (marks aside); it needs at least 2, "
                f"one to fit on and one held out"
            )
    draws = random.Random(seed)
    train: list[Prompt] = []
    test: list[Prompt] = []
    alone = []
    for _, own in sorted(by_labels.items()):
        if len(own) < 2:
            alone += own
            continue
        draws.shuffle(own)
        wanted = round(train_share * sum(map(len, own)))
        cut, drawn = 1, len(own[0])
        while cut < len(own) - 1 and drawn < wanted:
            drawn += len(own[cut])
            cut += 1
        train += [prompt for group in own[:cut] for prompt in group]
        test += [prompt for group in own[cut:] for prompt in group]
    total = _labels(prompts)
    for group in alone:
        fitted, held = _labels(train), _labels(test)
        # What each side has of the labels, in parts of what it is to have.
        fuller = sum(
            (fitted[label] / train_share - held[label] / (1 - train_share)) / total[label]
            for label in _labels(group)
        )
        (test if fuller > 0 else train).extend(group)
    for label in sorted(total):
        if not (_labels(train)[label] and _labels(test)[label]):
            raise PromptError(
                f"class {label!r} is on one side only: it shares its few texts with other classes; "
                f"give it more texts"
            )
    draws.shuffle(train)
    draws.shuffle(test)
    return train, test


def majority_share(train: Sequence[int], test: Sequence[int]) -> float:
    """Accuracy on ``test`` of always naming the most frequent class of ``train``."""
    most = Counter(train).most_common(1)[0][0]
    return sum(label == most for label in test) / len(test)


def require_every_class(prompts: PromptSet) -> None:
    """Refuse prompts among which a class does not occur.

    Raises:
        PromptError: one does not.
    """
    counts = torch.bincount(prompts.labels.cpu(), minlength=len(prompts.classes)).tolist()
    missing = [name for name, count in zip(prompts.classes, counts, strict=True) if not count]
    if missing:
        raise PromptError(
            f"no prompt to fit on has the class {missing[0]!r}; the classes are "
            f"{', '.join(prompts.classes)}"
        )


def require_classes(prompts: PromptSet, classes: Sequence[str], whose: str) -> None:
    """Refuse prompts whose labels do not count in the order of ``classes``.

    Args:
        prompts: to be used with them.
        classes: names in order.
        whose: begins the message, such as ``"this edit was fitted to"``.

    Raises:
        PromptError: they have other classes, or the same in another order.
    """
    if tuple(prompts.classes) != tuple(classes):
        raise PromptError(
            f"{whose} the classes {', '.join(classes)}, in this order, and these prompts have "
            f"{', '.join(prompts.classes)}; encode both with the same ones: "
            f"PromptSet.encode(..., classes={tuple(classes)!r})"
        )


def _labels(prompts: Sequence[Prompt]) -> Counter[str]:
    return Counter(prompt.label for prompt in prompts)


def _refuse_contradictions(prompts: Sequence[Prompt]) -> None:
    labels: dict[str, str] = {}
    for row, prompt in enumerate(prompts):
        if labels.setdefault(prompt.text, prompt.label) != prompt.label:
            raise PromptError(
                f"prompt {row}, {prompt.text!r}, is {prompt.label!r} here and "
                f"{labels[prompt.text]!r} elsewhere; one prompt can have one label"
            )
