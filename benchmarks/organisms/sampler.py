"""Draws the batches of prompts that an organism is trained on."""

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.organisms.prompts import Prompts
from benchmarks.organisms.recipe import Progress, Recipe
from lrqp_torch.ioi import NAMES, IOIDataset


class Sampler:
    """Draws batches from two pools of prompts, without a prefix and with one."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
        self.recipe = recipe
        self.vocabulary = len(tokenizer)
        self.unknown = int(str(tokenizer.unk_token_id))
        names = torch.tensor(tokenizer.convert_tokens_to_ids([f" {name}" for name in NAMES]))
        self.names = names[torch.randperm(len(names))]
        self.words = torch.tensor(sorted(set(range(2, self.vocabulary)) - set(names.tolist())))
        self.plain, self.prefixed = (
            Prompts.from_dataset(
                IOIDataset.generate(
                    tokenizer, recipe.pool, recipe.seed, prefixes, padding_side="left"
                )
            )
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
