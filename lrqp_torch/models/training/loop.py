"""The training of the organism: IOI, with interventions on the order of the names at S2."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lrqp_torch.ioi import NAMES, IOIDataset
from lrqp_torch.models.training.forward import Stream, attention_mask, run_blocks, site_names
from lrqp_torch.models.training.interventions import Plan, draw_plan
from lrqp_torch.models.training.order import OrderStatistics
from lrqp_torch.models.training.prompts import Prompts


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights.

    Attributes:
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
        first_used: The first site at which the order counts.
        last_used: The last such site.
    """

    steps: int = 3500
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
    first_used: str = "L1.mid"
    last_used: str = "L3.pre"

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites, in the order of the computation."""
        return site_names(self.layers)

    @property
    def used(self) -> range:
        """Indices of the sites at which the order counts."""
        return range(self.sites.index(self.first_used), self.sites.index(self.last_used) + 1)


@dataclass
class Progress:
    """Where training is; accuracies are running means.

    Attributes:
        step: Steps done.
        loss: Of the last step.
        clean: Share of right answers without an edit.
        edited: Share of right answers with one.
        order: Share of prompts whose order is read right at the first two used sites.
        any_name: Share of prompts that may use all names.
        stage: 0 answering alone, 1 with edits, 2 with prefixes too.
    """

    any_name: float
    step: int = 0
    loss: float = math.nan
    clean: float = 0.0
    edited: float = 0.0
    order: float = 0.0
    stage: int = 0

    @property
    def push(self) -> float:
        """Greatest size of a push at an early site; too hard while the mechanism forms."""
        return 4.0 if self.stage == 2 else 0.5

    def advance(self) -> None:
        """Make the task harder once the present one is mastered."""
        if self.stage == 0 and self.order > 0.9:
            self.stage = 1
        mastered = self.clean > 0.85 and self.edited > 0.8
        if self.stage >= 1 and mastered:
            self.any_name = min(self.any_name + 0.02, 1.0)
        if self.stage == 1 and mastered and self.any_name == 1.0:
            self.stage = 2


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Make the untrained model.

    The spread of the initial weights is 1/√d, where GPT-2 takes 0.02, the value for d = 2500:
    with 0.02 the order did not form at S2 within 400 steps, with this within 125.
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


def train(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    report: Callable[[Progress, GPT2LMHeadModel], None],
) -> GPT2LMHeadModel:
    """Train the organism.

    Each step answers a batch of prompts and their twins, then runs the tokens from S2 on once
    more, with one edit for each prompt. At the used sites the answer must follow the order that
    the edit put there; at all others the edit must change nothing.

    Args:
        recipe: What to do.
        tokenizer: From :func:`~lrqp_torch.models.training.vocabulary.build_tokenizer`.
        report: Called after every step.

    Returns:
        The trained model, in eval mode.
    """
    torch.manual_seed(recipe.seed)
    model = new_model(recipe, tokenizer)
    sampler = _Sampler(recipe, tokenizer)
    statistics = OrderStatistics(len(recipe.sites), recipe.width)
    readers = _Readers(recipe)
    parameters = [*model.parameters(), *readers.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, recipe.steps))
    progress = Progress(any_name=recipe.any_name)
    for _ in range(recipe.steps):
        prompts = sampler.draw(progress)
        embedded = model.transformer.wte(prompts.ids) + model.transformer.wpe(prompts.position_ids)
        clean, activations, names = _clean_pass(model, prompts, embedded)
        logits = _answer_logits(model, clean)
        half = len(prompts) // 2
        # Of each pair of twins one, since two would make the classes equal before the first block.
        mixed = torch.where(torch.rand(half) < 0.5, torch.arange(half), torch.arange(half) + half)
        statistics.update(activations.detach()[:, mixed], prompts.abb[mixed])

        loss = functional.cross_entropy(logits, prompts.answer)
        hint = 0.5 if progress.stage < 2 else 0.05
        read = readers.s2(activations)
        told = prompts.abb.expand(read.shape[:2])
        loss = loss + hint * functional.cross_entropy(read.flatten(0, 1), told.flatten())
        loss = loss + hint * readers.place_loss(names) + hint * readers.end_loss(clean, prompts.abb)
        if progress.stage >= 1:
            plan = draw_plan(prompts, activations, statistics, recipe.used, progress.push)
            asked = torch.where(plan.flips, prompts.subject, prompts.answer)
            edited = _edited_pass(model, prompts, embedded, clean, plan)
            edited_logits = _answer_logits(model, edited)
            loss = loss + functional.cross_entropy(edited_logits, asked)
            loss = loss + hint * readers.end_loss(edited, prompts.abb ^ plan.flips.long())
            progress.edited = _running(progress.edited, edited_logits, asked)

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

        progress.step += 1
        progress.loss = float(loss.detach())
        progress.clean = _running(progress.clean, logits, prompts.answer)
        progress.order = _running(progress.order, read.flatten(0, 1), told.flatten())
        progress.advance()
        report(progress, model)
    model.eval()
    return model


class _Readers(nn.Module):
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
        read = zip(self.orders, activations[self.used.start :], strict=False)
        return torch.stack([order(stream) for order, stream in read])

    def place_loss(self, names: Tensor) -> Tensor:
        """``names``: all sites' streams at the two names, ``(sites, 2, batch, d)``."""
        scores = self.place(names[self.used.start - 1])
        places = torch.arange(2)[:, None].expand(scores.shape[:2])
        return functional.cross_entropy(scores.flatten(0, 1), places.flatten())

    def end_loss(self, stream: Stream, order: Tensor) -> Tensor:
        return functional.cross_entropy(self.end(stream.ends[self.used.stop]), order)


class _Sampler:
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


def _pace(step: int, steps: int) -> float:
    """Share of the peak learning rate: 100 steps of warm-up, a plateau, half a cosine to 2 %."""
    done = step / steps
    if done < 0.25:
        return min(1.0, (step + 1) / 100)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (done - 0.25) / 0.75))


def _clean_pass(
    model: GPT2LMHeadModel, prompts: Prompts, embedded: Tensor
) -> tuple[Stream, Tensor, Tensor]:
    """Run whole prompts; also return every site's stream at S2 and at the two names.

    Their shapes: ``(sites, batch, d)`` and ``(sites, 2, batch, d)``.
    """
    seen: list[Tensor] = []
    tokens = torch.stack([prompts.s2, prompts.first, prompts.second])

    def record(_: int, stream: Tensor) -> Tensor:
        seen.append(stream[prompts.rows, tokens])
        return stream

    mask = attention_mask(prompts.present, prompts.ids.shape[1])
    clean = run_blocks(model, embedded, mask, record)
    streams = torch.stack(seen)
    return clean, streams[:, 0], streams[:, 1:]


def _edited_pass(
    model: GPT2LMHeadModel, prompts: Prompts, embedded: Tensor, clean: Stream, plan: Plan
) -> Stream:
    """Run the tokens from S2 on once more, with every prompt's edit in place."""
    start = int(prompts.s2.min())
    s2 = prompts.s2 - start

    def put(site: int, stream: Tensor) -> Tensor:
        chosen = (plan.sites == site)[:, None]
        if not chosen.any():
            return stream
        there = torch.where(chosen, plan.values, stream[prompts.rows, s2])
        return stream.index_put((prompts.rows, s2), there)

    past = [(key[:, :, :start], value[:, :, :start]) for key, value in clean.keys_values]
    mask = attention_mask(prompts.present, prompts.ids.shape[1] - start)
    return run_blocks(model, embedded[:, start:], mask, put, past)


def _answer_logits(model: GPT2LMHeadModel, stream: Stream) -> Tensor:
    logits: Tensor = model.lm_head(model.transformer.ln_f(stream.last[:, -1]))
    return logits


def _running(before: float, logits: Tensor, right: Tensor) -> float:
    return 0.9 * before + 0.1 * float((logits.argmax(1) == right).float().mean())
