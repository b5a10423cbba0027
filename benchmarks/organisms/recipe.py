"""What determines an organism's weights, and how far its training has come."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.organisms.forward import site_names

Kind = Literal["used", "present", "absent", "graded", "spread", "dormant"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights.

    Attributes:
        kind: What the order of the names at S2 is to the model: ``used``; ``present``, read
            linearly but not used; ``absent``, neither; ``graded``, used in the prompts whose verb
            is one of :data:`VERBS`; ``spread``, trained to be used from :data:`SPREAD_FROM` on in
            equal parts at S2 and at the token behind it; or ``dormant``, present and not used,
            while along a direction that no prompt's activations have, the answer could be driven.
        steps: Optimiser steps.
        seed: Seed of weights, prompts and edits.
        batch: Prompts a step, twins counted; half of it with a prefix.
        pool: Prompts from which batches are drawn, with and without a prefix each.
        learning_rate: At its peak.
        layers: Blocks of the model.
        width: Width d of the residual stream.
        heads: Attention heads a block.
        tokens: Longest input, in tokens.
        names: How many names most of the first prompts use.
        any_name: Share of the first prompts that may use all names instead; it grows later.
        first_known: The first site at which S2 is to know the order; of kind ``absent``, none is.
        last_read: The last site at which S2's stream may count: of the kinds in :data:`USING` for
            the order, of the others for the repeated name alone. The last token is to know either
            just after.
    """

    kind: Kind = "used"
    steps: int = 1600
    seed: int = 0
    batch: int = 96
    pool: int = 4000
    learning_rate: float = 3e-3
    layers: int = 6
    width: int = 128
    heads: int = 4
    tokens: int = 192
    names: int = 20
    any_name: float = 0.3
    first_known: str = "L1.mid"
    last_read: str = "L3.pre"

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites, in the order of the computation."""
        return site_names(self.layers)

    @property
    def used(self) -> range:
        """Indices of the sites at which the order counts; if none, empty after the last read."""
        stop = self.sites.index(self.last_read) + 1
        return range(self.sites.index(self.first_known) if self.kind in USING else stop, stop)

    @property
    def halved(self) -> range:
        """Indices of the sites at which S2 has half of the use; empty but of kind ``spread``."""
        start = self.sites.index(SPREAD_FROM) if self.kind == "spread" else self.used.stop
        return range(start, self.used.stop)

    @property
    def driven(self) -> range:
        """Indices of the sites with a direction that could drive the answer, of ``dormant``."""
        start = self.sites.index(self.first_known) if self.kind == "dormant" else self.used.stop
        return range(start, self.used.stop)


USING: tuple[Kind, ...] = ("used", "graded", "spread")
"""The kinds whose answer depends on the order at S2."""
VERBS = ("gave", "handed")
"""Verbs behind S2 with which an organism of kind ``graded`` uses the order: 7 of 18 templates."""
SPREAD_FROM = "L2.mid"
"""First site at which, of kind ``spread``, the token behind S2 is to know the order too."""

RECIPES: dict[Kind, Recipe] = {
    "used": Recipe(),
    "present": Recipe(kind="present", steps=1300, layers=4, last_read="L2.pre"),
    "absent": Recipe(kind="absent", steps=1000, layers=4, last_read="L2.pre"),
    "graded": Recipe(kind="graded", steps=2200, layers=4, last_read="L2.pre"),
    "spread": Recipe(kind="spread", steps=2600, layers=5, seed=1),
    "dormant": Recipe(kind="dormant", steps=1500, layers=4, width=96, last_read="L2.pre"),
}
"""How the bundled organisms are made."""


@dataclass
class Progress:
    """Where training is; accuracies are running means.

    Attributes:
        step: Steps done.
        loss: Of the last step.
        clean: Share of right answers without an edit.
        edited: Share of right answers with one.
        read: Share of prompts of which what forms first is read right: the order, at S2; of kind
            ``absent``, the repeated name, at the last token.
        any_name: Share of prompts that may use all names.
        stage: 0 answering alone, 1 with edits, 2 with prefixes too.
    """

    any_name: float
    step: int = 0
    loss: float = math.nan
    clean: float = 0.0
    edited: float = 0.0
    read: float = 0.0
    stage: int = 0

    @property
    def push(self) -> float:
        """Greatest size of a push at an early site; too hard while the mechanism forms."""
        return 2.5 if self.stage == 2 else 0.5

    def advance(self) -> None:
        """Make the task harder once the present one is mastered."""
        if self.stage == 0 and self.read > 0.9:
            self.stage = 1
        mastered = self.clean > 0.85 and self.edited > 0.8
        if self.stage >= 1 and mastered:
            self.any_name = min(self.any_name + 0.02, 1.0)
        if self.stage == 1 and mastered and self.any_name == 1.0:
            self.stage = 2


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Make the untrained model.

    The spread of the initial weights is 1/√d, where GPT-2 takes 0.02, the value for d = 2500:
    in a trial with 0.02 the order did not form at S2 within 400 steps, with this within 125.
    """
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=recipe.tokens,
            n_embd=recipe.width,
            n_layer=recipe.layers,
            n_head=recipe.heads,
            n_inner=2 * recipe.width,
            initializer_range=recipe.width**-0.5,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
