"""Prompts of any task as tokens: where to edit, what holds there, and which answers go with it."""

import itertools
import random
import re
from bisect import bisect
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lrqp_torch.errors import PromptError, RowError, SettingError, VocabularyWarning, quoted, warn
from lrqp_torch.stream.text import Rows, encode, last_token_at, pad, require_fast, token_at

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

OPENING, CLOSING = "[[", "]]"
"""The marks around the words at whose last token a prompt is read and edited."""

ALL = "all"
"""All variables together."""

PAIRING = ("pairs", "groups")
"""Attributes of prompts that say which of them go together."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_MARKS = re.compile(r"\[\[|\]\]")
_SPAN = re.compile(r"\[\[.*?\]\]", re.DOTALL)


@dataclass(frozen=True)
class Prompt:
    """One prompt before it is tokens.

    Attributes:
        text: with marked spans, as in ``"The [[keys]] to the cabinet"``; the last token of the
            last one is the position, and with several of them those of the others are edited too.
            An empty span, ``"that[[]] he"``, means the token before it.
            Without a mark it is the prompt's last token.
        label: name of the class that holds.
        answers: for each class the continuations that go with it, of one token or more, such as
            ``{"plural": (" are", " were"), "singular": " is"}``: those of the class that
            holds and of at least one other. None where the task has none, and then edits can be
            made but not judged by what the model says.
        pair: prompts of one pair say the same but for the class; None to match prompts whose
            texts are the same but for the marked words.
        group: what it has in common with others, such as an entity or a template: prompts of one
            group are not independent, are not matched with those of another, and are fitted on
            together or held out together.
        target: the class that a counterfactual edit writes; None for the next one after ``label``
            for which the prompt has answers.
        span: whether it is edited at all tokens of its marked spans, and not at the last of each.
        further: what holds of other variables than the label's, by their names.
    """

    text: str
    label: str
    answers: Mapping[str, Any] | None = None  # tuples, once it is made
    pair: str | None = None
    group: str | None = None
    target: str | None = None
    span: bool = False
    further: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("text", self.text), ("label", self.label)):
            if not isinstance(value, str):
                raise PromptError(
                    f"{name} of a prompt must be text, got {quoted(value)}"
                    + (f"; name the class, such as {str(value)!r}" if name == "label" else "")
                )
        if self.answers is None:
            return
        if not isinstance(self.answers, Mapping):
            raise PromptError(
                f"answers must be those of each class, such as {{'plural': (' are',), 'singular': "
                f"(' is',)}}, got {quoted(self.answers)}"
            )
        # One answer is meant as a whole, not letter by letter.
        each = {k: (v,) if isinstance(v, str) else v for k, v in self.answers.items()}
        object.__setattr__(self, "answers", each)


@dataclass(frozen=True)
class Words:
    """What the things of a task are called in figures and sentences."""

    variable: str = "the class"  # what the classes are of, with its article
    # What one of the classes is, without an article: "the other ...", "the true ...".
    value: str = "class"
    position: str = "the edited token"  # marked, or the last
    end: str = "the last token"  # the token after which the answer is read
    held: str = "the true class"  # the answer in the sense of the class that holds
    other: str = "the other class"  # the answer in the sense of the counterfactual class
    answers: str = "the answers"  # those of all classes together
    preference: str = "true class − other"  # score of the one minus that of the other
    unit: str = "nats"  # of the scores
    # What a study of the task asks, for a reader who has not met it; may be empty.
    question: str = ""


@dataclass(frozen=True)
class Values:
    """One variable of n prompts."""

    classes: tuple[str, ...]  # names of its K classes
    labels: Tensor  # class of each prompt, LongTensor (n,)


P = TypeVar("P", bound="PromptSet")


@dataclass(frozen=True)
class Twins(Generic[P]):
    """For each of n prompts one that differs from it in one variable alone."""

    prompts: P  # n prompts, the twin of each; the prompt itself where none is known
    known: Tensor  # which have one, BoolTensor (n,)
    # Where the twins stand among the prompts that they are of, LongTensor (n,); None where they are
    # not among them.
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class PromptSet(Rows):
    """Prompts of a task, n of them, padded to T tokens.

    Attributes:
        inputs: ``input_ids``, ``attention_mask``, ``position_ids``, LongTensors (n, T), ready for
            ``model(**inputs)``.
        position: where each prompt is read and edited, on the padded input, LongTensor (n,).
        end: the last token of each, after which the answer is read, LongTensor (n,).
        labels: class of each, LongTensor (n,).
        classes: names of the K classes; ``labels`` counts in their order.
        answers: first tokens of the answers that go with each class, LongTensor (n, K, A), −1
            where there are fewer than A; None where the task has none.
        prompts: the texts, without marks.
        pairs: number of the pair, or of the texts that are the same but for the marked words, to
            which each prompt belongs, LongTensor (n,), −1 for none; None where the task has none.
        groups: number of the group of each, LongTensor (n,); None for prompts without groups, which
            are then taken to be independent.
        targets: the class that a counterfactual edit writes into each, LongTensor (n,); None for
            the next one, see :attr:`other`.
        continued: the tokens of each answer behind its first, LongTensor (n, K, A, M), −1 where
            there are fewer than M; None where all answers are of one token.
        further: classes of other variables than the label's, LongTensor (n, V), in the order of
            ``further_classes``; None where there are none.
        further_classes: names of these variables to the names of their classes.
        spans: the tokens that are edited, BoolTensor (n, T), ``position`` the last of each; None
            where each prompt has one.
        words: what the things of the task are called.
    """

    _texts = ("prompts",)
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
    targets: Tensor | None = field(default=None, kw_only=True)
    spans: Tensor | None = field(default=None, kw_only=True)
    continued: Tensor | None = field(default=None, kw_only=True)
    further: Tensor | None = field(default=None, kw_only=True)
    further_classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        """Check what says where, and what holds there.

        Raises:
            PromptError: positions, ends, labels, pairs or groups that are no integers, or not one
                a prompt.
        """
        for name in ("position", "end", "labels", "targets", *PAIRING):
            given = getattr(self, name)
            if given is None and name in ("targets", *PAIRING):
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
        further_classes: Mapping[str, Sequence[str]] | None = None,
        padding_side: Literal["right", "left"] = "left",
        bos: bool | None = None,
    ) -> Self:
        """Tokenise prompts.

        Args:
            tokenizer: a fast transformers tokenizer; it is not changed.
            prompts: at least one.
            classes: names of the classes in order; default those that occur, sorted.
            further_classes: the same of each further variable, by name.
            padding_side: where shorter prompts are padded.
            bos: whether the tokenizer's first token of a text stands in front of each prompt; None
                for what the tokenizer does by itself.

        Raises:
            PromptError: no prompts, a label or an answer of no class, or a tokenizer without a
                token to put in front.
            RowError: marks that do not pair, a prompt without an answer for its own class or for
                any other, or an answer that is not tokens of its own behind its prompt.
            TokenizerError: a tokenizer without offsets.
        """
        for prompt in prompts:
            if not isinstance(prompt, Prompt):
                raise PromptError(
                    f"prompts must be a list of Prompt(text, label, ...), got {quoted(prompt)}"
                )
        names, further = _classes(prompts, classes), _further(prompts, further_classes)
        rows = []
        for row in _tokens(tokenizer, prompts, names):
            if isinstance(row, RowError):
                raise row
            rows.append(row if bos is None else row.fronted(front_token(tokenizer), bos))
        _warn_of_unknown(tokenizer, prompts, rows)
        inputs = pad([torch.tensor(row.ids) for row in rows], tokenizer, padding_side)
        end = torch.tensor([len(row.ids) - 1 for row in rows])
        left = padding_side == "left"
        shift = inputs["input_ids"].shape[1] - 1 - end if left else torch.zeros_like(end)
        unanswered = prompts[0].answers is None
        answers, continued = (None, None) if unanswered else _padded([row.answers for row in rows])
        states = [[further[name].index(p.further[name]) for name in further] for p in prompts]
        made = cls(
            inputs=inputs,
            position=torch.tensor([row.positions[-1] for row in rows]) + shift,
            end=end + shift,
            spans=_spans([row.positions for row in rows], shift, inputs["input_ids"].shape[1]),
            labels=torch.tensor([names.index(prompt.label) for prompt in prompts]),
            classes=names,
            answers=answers,
            prompts=tuple(row.text for row in rows),
            continued=continued,
            pairs=_numbered([_frame(prompt) for prompt in prompts]),
            groups=_numbered([prompt.group for prompt in prompts]),
            further=torch.tensor(states) if further else None,
            further_classes=further,
        )
        asked = [prompt.target for prompt in prompts]
        if not any(asked):
            return made
        pairs = zip(made.other.tolist(), asked, strict=True)
        own = [other if name is None else names.index(name) for other, name in pairs]
        return replace(made, targets=torch.tensor(own))

    @property
    def positions(self) -> dict[str, Tensor]:
        """The named tokens of each prompt, (n,): ``"mark"`` and ``"end"``."""
        return {"mark": self.position, "end": self.end}

    def scores(self, logits: Tensor, rest: Tensor | None = None) -> Tensor:
        """How strongly the model answers in the sense of each class, (n, K), float64.

            s_c = log Σ_{a ∈ answers of c} exp(logit of a's first token + log P(rest of a | …))

        so that s_c − s_ℓ is the log odds of answering with c rather than with ℓ; −∞ for a class
        for which the prompt has no answer.

        Args:
            logits: of the token after each prompt, (n, vocabulary).
            rest: of what goes on behind each answer's first token, (n, K, A, 2), as
                :meth:`~.running.Batch.rest` gives it; needed where answers have several tokens.

        Raises:
            PromptError: the task has no answers, or ``rest`` is missing.
        """
        return self._each(logits.double(), rest)[..., 0].logsumexp(-1)

    def said(self, logits: Tensor, rest: Tensor | None = None) -> Tensor:
        """Whether a greedy model would write one of the answers of each class, BoolTensor (n, K).

        Arguments as of :meth:`scores`.
        """
        back = logits.double() - logits.double().amax(-1, keepdim=True)
        return (self._each(back, rest).amin(-1) >= 0).any(-1)

    def preference(self, logits: Tensor, against: Tensor, rest: Tensor | None = None) -> Tensor:
        """Score of the class that holds minus that of another, (n,): positive where answered so.

        ``against`` is the other class, (n,); the other arguments as of :meth:`scores`.
        """
        scores = self.scores(logits, rest)
        pair = torch.stack([self.labels, against.to(self.labels)], -1).to(scores.device)
        own, other = scores.gather(-1, pair).unbind(-1)
        return own - other

    def probability(self, logits: Tensor, rest: Tensor | None = None) -> Tensor:
        """Probability of the answers of the class that holds, (n,), float64; see :meth:`scores`."""
        rows = torch.arange(len(self), device=logits.device)
        every = self._each(logits.double().log_softmax(-1), rest)
        return every[rows, self.labels.to(logits.device), :, 0].exp().sum(-1)

    @property
    def edited(self) -> Tensor:
        """The tokens that are edited, BoolTensor (n, T)."""
        if self.spans is not None:
            return self.spans
        columns = torch.arange(self.inputs["input_ids"].shape[1], device=self.position.device)
        return columns == self.position.unsqueeze(1)

    @property
    def first_tokens(self) -> Tensor:
        """The tokens with which any answer begins, each once, (n, M), −1 where there are fewer."""
        if self.answers is None:
            return self.labels.new_full((len(self), 0), -1)
        tokens = self.answers.flatten(1).sort(-1).values
        again = (tokens[:, 1:] == tokens[:, :-1]).nonzero(as_tuple=True)
        tokens[again[0], again[1] + 1] = -1
        return tokens

    @property
    def named(self) -> Tensor:
        """Classes for which each prompt has answers, BoolTensor (n, K); all without answers."""
        if self.answers is None:
            shape = (len(self), len(self.classes))
            return torch.ones(shape, dtype=torch.bool, device=self.labels.device)
        return (self.answers >= 0).any(-1)

    @property
    def other(self) -> Tensor:
        """The counterfactual class of each, LongTensor (n,).

        Where no other is asked for it is the next one after the class that holds (the other one of
        two) for which the prompt has answers.
        """
        if self.targets is not None:
            return self.targets
        count = len(self.classes)
        after = (self.labels[:, None] + torch.arange(1, count, device=self.labels.device)) % count
        found = self.named.gather(1, after.long()).long().argmax(1, keepdim=True)
        return after.gather(1, found).squeeze(1)

    @property
    def called(self) -> tuple[tuple[str, str], ...]:
        """For each prompt what its answers in the sense of both classes are called.

        The class that holds first, then the counterfactual one.
        """
        pairs = zip(self.labels.tolist(), self.other.tolist(), strict=True)
        return tuple((self.classes[own], self.classes[other]) for own, other in pairs)

    @property
    def pointed_out(self) -> dict[str, Tensor]:
        """The tokens that a reader is to be shown, by what they are called, (n,)."""
        return {self.words.position: self.position, self.words.end: self.end}

    def values(self, variable: str) -> Values:
        """A variable beside the class. Raises SettingError: the prompts do not know it."""
        if self.further is None or variable not in self.further_classes:
            raise SettingError(
                f"these prompts say nothing of {quoted(variable)} beside their class; they know "
                f"{', '.join(self.further_classes) or 'nothing else'}"
            )
        place = list(self.further_classes).index(variable)
        return Values(self.further_classes[variable], self.further[:, place])

    def twins(
        self, variable: str | None = None, target: Tensor | None = None
    ) -> Twins[Self] | None:
        """For each prompt one of these that is of the same pair and of another class.

        Where several are, it is that which follows it, so that all of them are somebody's twin.

        Args:
            variable: in which twins differ, and in no other; None for the class, ``"all"`` for
                the class and every further variable.
            target: class of each twin in that variable, (n,); default the next class.

        Returns:
            None where no prompt has one.

        Raises:
            SettingError: the task does not know the variable.
        """
        known = (*self.variables, *self.further_classes)
        everything = (*known, ALL) if self.further_classes else known
        if variable not in (None, *everything):
            raise SettingError(
                f"these prompts have no twins that differ in {quoted(variable or '')}; they know "
                f"{', '.join(everything) or 'their class alone'}"
            )
        if self.pairs is None:
            return None
        own_class = self.labels.unsqueeze(-1)
        states = own_class if self.further is None else torch.cat([own_class, self.further], -1)
        sizes = torch.tensor([len(self.classes), *map(len, self.further_classes.values())])
        moved = (states + 1) % sizes.to(states)
        moved[:, 0] = self.other
        if variable != ALL:
            place = 0 if variable not in known else 1 + list(self.further_classes).index(variable)
            column = moved[:, place] if target is None else target.to(states)
            moved = states.clone()
            moved[:, place] = column
        rows: dict[tuple[int, ...], list[int]] = {}
        pairs = self.pairs.tolist()
        for row, key in enumerate(zip(pairs, *states.T.tolist(), strict=True)):
            rows.setdefault(key, []).append(row)
        own = list(range(len(self)))
        for row, key in enumerate(zip(pairs, *moved.T.tolist(), strict=True)):
            found = [] if key[0] < 0 else [at for at in rows.get(key, ()) if at != row]
            if found and bool((moved[row] != states[row]).any()):
                # The first behind it, or else the first of all.
                own[row] = found[bisect(found, row) % len(found)]
        at = torch.tensor(own, device=self.labels.device)
        paired = at != torch.arange(len(self), device=at.device)
        return Twins(self[at], paired, at) if bool(paired.any()) else None

    def deciding(self) -> "PromptSet":
        """The same prompts up to where the answers of both classes part, for what trains on logits.

        Where answers have several tokens, the first one of a class stands for it: each prompt goes
        on with the tokens that both classes' answers begin with, and the answers are then the one
        token of each that is different. Prompts whose answers are of one token stay as they are.
        """
        if self.continued is None or self.answers is None:
            return self
        rows, mask = torch.arange(len(self)), self.inputs["attention_mask"].bool()
        both = torch.cat([self.answers.unsqueeze(-1), self.continued], -1)[:, :, 0]
        own, other = both[rows, self.labels], both[rows, self.other]
        same = ((own == other) & (own >= 0)).long().cumprod(-1).sum(-1)
        each = zip(self.inputs["input_ids"], mask, own, same.tolist(), strict=True)
        ids = [torch.cat([whole[real], said[:count]]) for whole, real, said, count in each]
        fill = int(self.inputs["input_ids"].min())
        padded, real = (
            pad_sequence(each, batch_first=True, padding_value=value, padding_side="left")
            for each, value in ((ids, fill), ([torch.ones_like(row) for row in ids], 0))
        )
        answers = torch.full((*self.answers.shape[:2], 1), -1)
        answers[rows, self.labels, 0] = own[rows, same]
        answers[rows, self.other, 0] = other[rows, same]
        shift, columns = padded.shape[1] - 1 - same - self.end, (real.cumsum(1) - 1).clamp(min=0)
        return replace(
            self,
            inputs={"input_ids": padded, "attention_mask": real, "position_ids": columns},
            position=self.position + shift,
            end=self.end + shift + same,
            spans=None if self.spans is None else _moved(self.spans, shift, padded.shape[1]),
            answers=answers,
            continued=None,
            targets=self.other,
        )

    def trimmed(self) -> Self:
        """The same prompts without the padding on the left that none of them needs."""
        spare = int((self.inputs["attention_mask"].cumsum(1) == 0).sum(1).min())
        return replace(
            self,
            inputs={name: tensor[:, spare:] for name, tensor in self.inputs.items()},
            position=self.position - spare,
            spans=None if self.spans is None else self.spans[:, spare:],
            end=self.end - spare,
        )

    def __repr__(self) -> str:
        """Size, classes and an example: the tensors would fill pages."""
        example = f", e.g. {self.prompts[0]!r}" if self.prompts else ""
        return f"PromptSet(n={len(self)}, classes={', '.join(self.classes)}{example})"

    def _each(self, values: Tensor, rest: Tensor | None) -> Tensor:
        """Of all answers, (n, K, A, 2), from what holds of tokens, (n, vocabulary).

        The first of both is the value of an answer's first token plus the log probability of the
        rest, the second the least of it and of what the rest lies back; −∞ where there is no
        answer.
        """
        if self.answers is None:
            raise PromptError(
                "these prompts have no answers, so what the model says cannot be scored; give "
                "each prompt the answers of every class"
            )
        tokens = self.answers.to(values.device)
        start = values.gather(-1, tokens.clamp_min(0).flatten(1)).view(tokens.shape)
        scores = torch.stack([start, start], -1)
        if self.continued is not None:
            if rest is None:
                raise PromptError(
                    "some answers of these prompts have several tokens, so logits of the next one "
                    "do not score them; give `rest`, as Batch.rest() computes it"
                )
            log_p, back = rest.to(scores).unbind(-1)
            scores = torch.stack([start + log_p, torch.minimum(start, back)], -1)
        return scores.masked_fill((tokens < 0).unsqueeze(-1), float("-inf"))


def _warn_of_unknown(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], rows: "Sequence[_Tokens]"
) -> None:
    """Warn of prompts in which a closed vocabulary lacks a word."""
    unknown = tokenizer.unk_token_id
    # Where one token ends texts and stands for what is unknown, nothing is unknown: all is bytes.
    if unknown in (None, tokenizer.bos_token_id, tokenizer.eos_token_id):
        return
    found = [number for number, row in enumerate(rows) if unknown in row.ids]
    if not found:
        return
    text = prompts[found[0]].text.replace(OPENING, "").replace(CLOSING, "")
    lacking = [
        word
        for word in text.split()
        if unknown in tokenizer(word, add_special_tokens=False).input_ids
    ]
    warn(
        VocabularyWarning,
        f"the tokenizer does not know a word of {len(found)} of {len(rows)} prompts, such as "
        f"{quoted(lacking[0] if lacking else text)} in {quoted(text)}: the model reads "
        f"{tokenizer.unk_token} there. Use words of its vocabulary, or a model with an open one",
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
    return names


def _frame(prompt: Prompt) -> tuple[str | None, ...] | None:
    """What prompts of one pair have in common; None where nothing says so."""
    if prompt.pair is not None:
        return prompt.group, prompt.pair
    beside = _SPAN.split(prompt.text)
    return None if len(beside) == 1 else (prompt.group, *beside)


def _further(
    prompts: Sequence[Prompt], classes: Mapping[str, Sequence[str]] | None
) -> dict[str, tuple[str, ...]]:
    """The classes of every further variable."""
    names = list(prompts[0].further) if classes is None else list(classes)
    for row, prompt in enumerate(prompts):
        if list(prompt.further) != names:
            raise PromptError(
                f"prompt {row} knows {', '.join(prompt.further) or 'no further variable'}, and "
                f"prompt 0 {', '.join(names) or 'none'}; give all prompts the same variables"
            )
    seen = {name: sorted({p.further[name] for p in prompts}) for name in names}
    found = {name: tuple(each) for name, each in (seen if classes is None else classes).items()}
    for name, known in found.items():
        unknown = {prompt.further[name] for prompt in prompts} - set(known)
        if unknown or len(known) < 2:
            raise PromptError(
                f"the variable {name!r} needs at least two classes, among them all that occur, got "
                f"{', '.join(known)}"
                + (f" without {', '.join(sorted(unknown))}" if unknown else "")
            )
    return found


def _numbered(names: Sequence[Hashable]) -> Tensor | None:
    """Names as numbers from 0, (n,), −1 for None; None where all are."""
    number: dict[Hashable, int] = {}
    found = [-1 if name is None else number.setdefault(name, len(number)) for name in names]
    return torch.tensor(found) if number else None


@dataclass(frozen=True)
class _Tokens:
    """One prompt as tokens: the text without marks, where it is edited, and its answers."""

    text: str
    ids: list[int]
    positions: list[int]
    answers: list[list[list[int]]]

    def fronted(self, token: int, wanted: bool) -> "_Tokens":
        """The same with a token in front, or without it."""
        there = self.ids[0] == token
        if there == wanted:
            return self
        if wanted:
            return replace(self, ids=[token, *self.ids], positions=[p + 1 for p in self.positions])
        return replace(self, ids=self.ids[1:], positions=[p - 1 for p in self.positions])


def _tokens(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], classes: Sequence[str]
) -> Iterator[_Tokens | RowError]:
    """Each prompt as tokens, or why it cannot be.

    Raises:
        TokenizerError: a tokenizer without offsets.
    """
    require_fast(tokenizer)
    unknown = tokenizer.unk_token_id
    split: list[tuple[str, list[tuple[int, int]]] | RowError] = []
    for row, prompt in enumerate(prompts):
        try:
            split.append(unmark(row, prompt.text))
        except RowError as error:
            split.append(error)
    texts = ["a" if isinstance(item, RowError) else item[0] for item in split]
    encoding = encode(tokenizer, texts)
    said = [
        [(name, text) for name in classes for text in (prompt.answers or {}).get(name, ())]
        for prompt in prompts
    ]
    behind = [text + answer for text, own in zip(texts, said, strict=True) for _, answer in own]
    answered, number = encode(tokenizer, behind) if behind else None, 0
    for row, (prompt, item) in enumerate(zip(prompts, split, strict=True)):
        first, number = number, number + len(said[row])
        if isinstance(item, RowError):
            yield item
            continue
        text, spans = item
        try:
            if any("\0" in each for each in (prompt.label, *(answer for _, answer in said[row]))):
                raise RowError(
                    f"prompt {row} holds a NUL character in its label or an answer",
                    "a NUL character",
                )
            ends = [_token(encoding, row, text, max(end - 1, 0)) for _, end in spans]
            places = set(ends)
            if prompt.span:
                for (start, _), end in zip(spans, ends, strict=True):
                    places |= set(range(min(token_at(encoding, row, start), end), end + 1))
            last = _token(encoding, row, text, len(text) - 1)
            # What a tokenizer adds behind a text would stand between the prompt and its answer.
            ids = encoding["input_ids"][row][: last + 1]
            found: list[list[list[int]]] = [[] for _ in classes]
            for place, (name, answer) in enumerate(said[row], start=first):
                assert answered is not None
                if not answer:
                    raise RowError(
                        f"prompt {row}: an answer of class {name!r} is empty; leave it out, or "
                        f"write what the model would say",
                        "an empty answer",
                    )
                whole = answered["input_ids"][place]
                until = last_token_at(answered, place, len(text) + len(answer) - 1)
                if until <= last or whole[: last + 1] != ids:
                    raise RowError(
                        f"prompt {row}: the answer {answer!r} is not tokens of its own behind "
                        f"{text!r}; begin it with a space where a word follows, or choose another",
                        "an answer that is not tokens of its own behind the text",
                    )
                own, tokens = found[classes.index(name)], whole[last + 1 : until + 1]
                if unknown is not None and unknown in tokens:
                    raise RowError(
                        f"prompt {row}: the tokenizer does not know the answer {answer!r}; choose "
                        f"another",
                        "an answer that the tokenizer does not know",
                    )
                if tokens not in own:
                    own.append(tokens)
            if prompt.answers is not None:
                _check_answers(row, prompt.label, classes, found)
            target = prompt.target
            if target is not None and (
                target not in classes
                or target == prompt.label
                or (prompt.answers is not None and not found[classes.index(target)])
            ):
                raise RowError(
                    f"prompt {row} is to become {target!r}, which is no other class for which it "
                    f"has answers",
                    "a class to write that is no other class with answers",
                )
        except RowError as error:
            yield error
        else:
            yield _Tokens(text, ids, sorted(places), found)


def screened(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], classes: Sequence[str]
) -> Iterator[RowError | None]:
    """For each prompt why it cannot be encoded with these classes, or None where it can."""
    for row in _tokens(tokenizer, prompts, classes):
        yield row if isinstance(row, RowError) else None


def front_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that begins a text: the tokenizer's own, or the one that ends a text before.

    Raises:
        PromptError: it has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise PromptError(
        "this tokenizer has no token that begins a text, so none can be put in front; use "
        "--bos auto or --bos never"
    )


def first_marked(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt]) -> int:
    """How many prompts are edited at their first token, where a model may keep its sink."""
    names = {prompt.label: None for prompt in prompts}
    rows = _tokens(tokenizer, [replace(prompt, answers=None) for prompt in prompts], [*names])
    return sum(isinstance(row, _Tokens) and row.positions[0] == 0 for row in rows)


def _token(encoding: "BatchEncoding", row: int, text: str, character: int) -> int:
    found = last_token_at(encoding, row, character)
    if found < 0:
        raise RowError(
            f"prompt {row}: no token of {text!r} holds character {character}; end prompts and "
            f"marked spans with a letter, not with a space",
            "words that end in a space",
        )
    return found


def _check_answers(
    row: int, label: str, classes: Sequence[str], answers: Sequence[list[list[int]]]
) -> None:
    """Refuse a row whose answers do not tell its class from another."""
    given = [name for name, own in zip(classes, answers, strict=True) if own]
    if label not in given or len(given) < 2:
        lacks = label if label not in given else next(n for n in classes if n != label)
        raise RowError(
            f"prompt {row} has no answer for the class {lacks!r}; give answers for the class that "
            f"holds and for another",
            "no answer for its class, or for no other",
        )
    for index, own in enumerate(answers):
        others = [tokens for rest in answers[index + 1 :] for tokens in rest]
        for one, two in itertools.product(own, others):
            short = min(len(one), len(two))
            if one[:short] == two[:short]:
                raise RowError(
                    f"prompt {row}: an answer of class {classes[index]!r} is given twice, or "
                    f"begins one of another class, so it would speak for no class; give each class "
                    f"answers of its own, or write both on to where they part, such as a full stop",
                    "an answer that two classes share",
                )


def _spans(positions: Sequence[list[int]], shift: Tensor, width: int) -> Tensor | None:
    """Which tokens are edited, (n, width); None where each prompt has one."""
    if all(len(own) == 1 for own in positions):
        return None
    mask = torch.zeros(len(positions), width, dtype=torch.bool)
    for row, own in enumerate(positions):
        mask[row, own] = True
    return _moved(mask, shift, width)


def _moved(mask: Tensor, shift: Tensor, width: int) -> Tensor:
    """A mask (n, T) with each row moved to the right, (n, width)."""
    rows, columns = mask.nonzero(as_tuple=True)
    found = torch.zeros(len(mask), width, dtype=torch.bool, device=mask.device)
    found[rows, columns + shift[rows]] = True
    return found


def _padded(answers: Sequence[list[list[list[int]]]]) -> tuple[Tensor, Tensor | None]:
    """First tokens of all answers, (n, K, A), and the tokens behind them, (n, K, A, M)."""
    every = [tokens for row in answers for own in row for tokens in own]
    most = max(len(own) for row in answers for own in row)
    longest = max(map(len, every)) - 1
    first = torch.full((len(answers), len(answers[0]), most), -1)
    behind = torch.full((*first.shape, longest), -1)
    for row, own in enumerate(answers):
        for index, texts in enumerate(own):
            for place, tokens in enumerate(texts):
                first[row, index, place] = tokens[0]
                behind[row, index, place, : len(tokens) - 1] = torch.tensor(tokens[1:])
    return first, behind if longest else None


def unmark(row: int, marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without its marks, and the spans [start, end) of its characters to edit.

    Raises:
        RowError: marks that do not pair, or no text that can be a prompt.
    """
    text, marks = "", _MARKS.findall(marked)
    spans: list[tuple[int, int]] = []
    for number, piece in enumerate(_MARKS.split(marked)):
        if number % 2:  # between an opening and a closing mark
            spans.append((len(text), len(text) + len(piece.rstrip())))
        text += piece
    paired = marks == [OPENING, CLOSING] * len(spans)
    # An empty span at the very start has no token before it.
    if not (paired and text and all(end for _, end in spans)):
        raise RowError(
            f"prompt {row}: {quoted(marked)} needs one marked span or more, as in "
            f"'The {OPENING}keys{CLOSING} to the cabinet', or none for its last token",
            "marks that do not pair",
        )
    if "\0" in text:
        raise RowError(
            f"prompt {row}, {quoted(marked)}, holds a NUL character; remove it", "a NUL character"
        )
    return text, spans or [(0, len(text))]


def split(
    prompts: Sequence[Prompt], train_share: float = 0.5, seed: int = 0
) -> tuple[list[Prompt], list[Prompt]]:
    """Divide prompts so that both sides hold every class in the same shares, but for rounding.

    Prompts with the same words stay on one side, wherever their marks are: a probe must not be
    tested on what it was fitted to. So do those of a group, and those of a pair, which is what they
    are twins by. Where prompts that stay together have several labels, those with the same labels
    are divided among themselves; what is alone with its labels goes to the side that lacks them
    more.

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
    by_labels: dict[tuple[str, ...], list[list[Prompt]]] = {}
    for group in _together(prompts):
        by_labels.setdefault(tuple(sorted(_labels(group))), []).append(group)
    for label in sorted(_labels(prompts)):
        texts = sum(len(own) for labels, own in by_labels.items() if label in labels)
        if texts < 2:
            raise PromptError(
                f"class {label!r} has {texts} different texts (marks aside), or groups of them; it "
                f"needs at least 2, one to fit on and one held out"
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


def _together(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Prompts that share their words, a group or a pair, directly or through others."""
    home: dict[Hashable, int] = {}
    found: dict[int, list[Prompt]] = {}
    for row, prompt in enumerate(prompts):
        words = prompt.text.replace(OPENING, "").replace(CLOSING, "")
        keys: list[Hashable] = [words]
        keys += [] if prompt.group is None else [("group", prompt.group)]
        keys += [] if prompt.pair is None else [("pair", prompt.group, prompt.pair)]
        homes = {home[key] for key in keys if key in home} or {row}
        own = min(homes)
        for other in homes - {own}:
            found[own] += found.pop(other)
            home |= {key: own for key, at in home.items() if at == other}
        found.setdefault(own, []).append(prompt)
        home |= dict.fromkeys(keys, own)
    return list(found.values())


def halves(prompts: PromptSet) -> tuple[Tensor, Tensor]:
    """Rows of two halves: one by which to choose, another on which to report what was chosen.

    Prompts of a pair stay together, and both halves hold as many of a class, within one. Of a pair
    with several prompts of a class, such as all that are of one template, one of each class stay
    together. Where a half would be without prompts of a class that the other has, both are all
    prompts.
    """
    labels = prompts.labels.tolist()
    pairs = [-1] * len(labels) if prompts.pairs is None else prompts.pairs.tolist()
    units: dict[tuple[int, int], list[int]] = {}
    before = Counter[tuple[int, int]]()
    for row, own in enumerate(zip(pairs, labels, strict=True)):
        units.setdefault((own[0], before[own]) if own[0] >= 0 else (-1, row), []).append(row)
        before[own] += 1
    found: tuple[list[int], list[int]] = ([], [])
    counts = [Counter[int](), Counter[int]()]
    for rows in units.values():
        first = labels[rows[0]]
        half = int(counts[1][first] < counts[0][first])
        found[half].extend(rows)
        counts[half].update(labels[row] for row in rows)
    if set(counts[0]) != set(counts[1]):
        return torch.arange(len(labels)), torch.arange(len(labels))
    return torch.tensor(sorted(found[0])), torch.tensor(sorted(found[1]))


def rows_by_class(labels: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """The rows of each class that occurs among labels (n,), in random order, on the CPU."""
    for label in labels.unique().cpu():
        rows = (labels.cpu() == label).nonzero().flatten()
        yield rows[torch.randperm(len(rows), generator=generator)]


def majority_share(train: Sequence[int], test: Sequence[int]) -> float:
    """Accuracy on ``test`` of always naming the most frequent class of ``train``."""
    most = Counter(train).most_common(1)[0][0]
    return sum(label == most for label in test) / len(test)


def require_every_class(prompts: PromptSet) -> None:
    """Raise :class:`PromptError` for prompts among which a class does not occur."""
    counts = torch.bincount(prompts.labels.cpu(), minlength=len(prompts.classes)).tolist()
    missing = [name for name, count in zip(prompts.classes, counts, strict=True) if not count]
    if missing:
        raise PromptError(
            f"no prompt to fit on has the class {missing[0]!r}; the classes are "
            f"{', '.join(prompts.classes)}"
        )


def require_classes(prompts: PromptSet, classes: Sequence[str], whose: str) -> None:
    """Raise :class:`PromptError` for prompts whose labels do not count in the order of ``classes``.

    ``whose`` begins the message, such as ``"this edit was fitted to"``.
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
