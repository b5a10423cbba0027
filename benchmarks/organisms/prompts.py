"""What organisms are trained on: a word-level tokenizer, pairs of twins, and batches of them.

Every name with its leading space is one token; twins differ in the order of the names alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.organisms.recipe import VERBS, Progress, Recipe
from lrqp_torch.ioi import NAMES, IOIDataset
from lrqp_torch.ioi.words import BABA_TEMPLATES, OBJECTS, PLACES

UNKNOWN = "<unk>"
PADDING = "<pad>"
# A word with the space before it, a number likewise, or one other sign likewise.
WORD = r" ?[A-Za-z]+(?:['’][A-Za-z]+)*| ?[0-9]+| ?[^\sA-Za-z0-9]|\s+"


def build_tokenizer(sentences: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build the tokenizer over the task's words and those of some more sentences.

    Every word is entered with and without a leading space, because a sentence behind a prefix
    starts with one. Words outside the vocabulary become ``<unk>``.

    Args:
        sentences: Text whose words join the vocabulary, for example the bundled prefixes.

    Returns:
        The tokenizer; ids follow the sorted order of the words, so the result depends on the set
        of words alone.
    """
    split = Split(Regex(WORD), behavior="isolated")
    task = chain(BABA_TEMPLATES, NAMES, PLACES, OBJECTS)
    words = {
        piece.strip()
        for text in chain(task, sentences)
        for piece, _ in split.pre_tokenize_str(text)
    } - {""}
    entries = [PADDING, UNKNOWN, *sorted(chain(words, (f" {word}" for word in words)))]
    tokenizer = Tokenizer(
        WordLevel({word: index for index, word in enumerate(entries)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=PADDING,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


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
        """Take the prompts of a left-padded data set, to the device that is the default.

        Args:
            dataset: Generated with ``padding_side="left"``.

        Returns:
            The same prompts.
        """
        dataset = dataset.to(torch.get_default_device())
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

    @property
    def behind(self) -> Tensor:
        """Token behind the repeated name, the verb, ``(batch,)``."""
        return self.ids[self.rows, self.s2 + 1]

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


def generate(
    tokenizer: PreTrainedTokenizerFast, n: int, seed: int, prefixes: str | None
) -> Prompts:
    """Generate prompts of the task; the draws are the same on every device."""
    with torch.device("cpu"):
        drawn = IOIDataset.generate(tokenizer, n, seed, prefixes, padding_side="left")
    return Prompts.from_dataset(drawn)


class Sampler:
    """Draws batches from two pools of prompts, without a prefix and with one."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
        self.recipe = recipe
        self.vocabulary = len(tokenizer)
        self.unknown = int(str(tokenizer.unk_token_id))
        names = torch.tensor(tokenizer.convert_tokens_to_ids([f" {name}" for name in NAMES]))
        self.names = names[torch.randperm(len(names))]
        self.verbs = torch.tensor(tokenizer.convert_tokens_to_ids([f" {verb}" for verb in VERBS]))
        self.words = torch.tensor(sorted(set(range(2, self.vocabulary)) - set(names.tolist())))
        self.plain, self.prefixed = (
            generate(tokenizer, recipe.pool, recipe.seed, prefixes)
            for prefixes in (None, "bundled")
        )
        self.by_length = self.prefixed.present.sum(1).argsort(stable=True)

    def draw(self, progress: Progress) -> Prompts:
        """Draw prompts as hard as the present stage asks for, each with its twin."""
        n = self.recipe.batch // 2
        if progress.stage < 2 or torch.rand(()) < 0.5:
            prompts = self.plain.select(torch.randint(len(self.plain), (n,)))
        else:
            prompts = self._with_prefix(n // 2)
        # Some names often, so that the mechanism forms; all now and then, so that it is general.
        few, every = prompts.renamed(self.names[: self.recipe.names]), prompts.renamed(self.names)
        prompts = Prompts.where(torch.rand(len(prompts)) < progress.any_name, every, few)
        # Without an offset, absolute positions would give the order away in the first block.
        room = self.recipe.tokens - int(prompts.position_ids.max())
        offset = torch.randint(room, (len(prompts), 1))
        prompts = prompts.shifted(torch.where(torch.rand(len(prompts), 1) < 0.3, 0, offset))
        return prompts.with_twins()

    def _with_prefix(self, n: int) -> Prompts:
        # Prompts of similar length together, so that little of a batch is padding.
        band = min(len(self.by_length), 8 * n)
        start = int(torch.randint(len(self.by_length) - band + 1, ()))
        prompts = self.prefixed.select(self.by_length[start + torch.randperm(band)[:n]])
        share = torch.tensor([0.0, 0.0, 0.3, 1.0])[torch.randint(4, (n, 1))]
        words = self.words[torch.randint(len(self.words), prompts.ids.shape)]
        return prompts.scrambled(share, torch.where(torch.rand(n, 1) < 0.6, self.unknown, words))
