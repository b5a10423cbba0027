"""The training of an organism: IOI, with interventions on the order of the names at S2."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.organisms.forward import Stream, attention_mask, run_blocks
from benchmarks.organisms.interventions import Plan, draw_plan
from benchmarks.organisms.order import OrderStatistics
from benchmarks.organisms.prompts import Prompts
from benchmarks.organisms.readers import Readers
from benchmarks.organisms.recipe import Progress, Recipe, new_model
from benchmarks.organisms.sampler import Sampler

ERASURE = 4.0
"""Weight of the penalty on an order that is to be absent."""


def train(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    report: Callable[[Progress, GPT2LMHeadModel], None],
) -> GPT2LMHeadModel:
    """Train an organism.

    Each step answers a batch of prompts and their twins, then runs the tokens from S2 on once
    more, with one edit for each prompt. At the used sites, if any, the answer must follow the
    order that the edit put there; at all others the edit must change nothing. S2 is to know the
    order, or, if that is to be absent, is penalised for all it knows of it.

    Args:
        recipe: What to do.
        tokenizer: From :func:`~benchmarks.organisms.vocabulary.build_tokenizer`.
        report: Called after every step.

    Returns:
        The trained model, in eval mode.
    """
    torch.manual_seed(recipe.seed)
    model = new_model(recipe, tokenizer)
    sampler = Sampler(recipe, tokenizer)
    statistics = OrderStatistics(len(recipe.sites), recipe.width)
    readers = Readers(recipe, len(tokenizer))
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
        mixed = _one_of_each_pair(prompts.abb)
        statistics.update(activations.detach()[:, mixed], prompts.abb[mixed])

        loss = functional.cross_entropy(logits, prompts.answer)
        hint = 0.5 if progress.stage < 2 else 0.05
        # An order that the answer needs stays at S2 by itself; one that it does not need fades.
        known = 1.0 if recipe.kind == "present" else hint
        if recipe.kind == "absent":
            loss = loss + ERASURE * statistics.left(activations, prompts.abb)
        else:
            read = readers.s2(activations).flatten(0, 1)
            orders = prompts.abb.repeat(2)
            loss = loss + known * functional.cross_entropy(read, orders)
            loss = loss + known * readers.place_loss(names)
        heard, told = readers.last(clean), readers.told(prompts, torch.zeros(len(prompts)))
        loss = loss + hint * functional.cross_entropy(heard, told)
        if progress.stage >= 1:
            plan = draw_plan(prompts, activations, statistics, recipe.used, progress.push)
            asked = torch.where(plan.flips, prompts.subject, prompts.answer)
            edited = _edited_pass(model, prompts, embedded, clean, plan)
            edited_logits = _answer_logits(model, edited)
            loss = loss + functional.cross_entropy(edited_logits, asked)
            told_edited = readers.told(prompts, plan.flips)
            loss = loss + hint * functional.cross_entropy(readers.last(edited), told_edited)
            progress.edited = _running(progress.edited, edited_logits, asked)

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

        progress.step += 1
        progress.loss = float(loss.detach())
        progress.clean = _running(progress.clean, logits, prompts.answer)
        forms = (heard, told) if recipe.kind == "absent" else (read, orders)
        progress.read = _running(progress.read, *forms)
        progress.advance()
        report(progress, model)
    model.eval()
    return model


def _one_of_each_pair(abb: Tensor) -> Tensor:
    """Draw rows, one of each pair of twins, among which both orders occur.

    Both twins of every pair would make the classes equal before the first block.
    """
    half = len(abb) // 2
    rows = torch.where(torch.rand(half) < 0.5, torch.arange(half), torch.arange(half) + half)
    if abb[rows].unique().numel() == 1:
        rows[0] = (rows[0] + half) % len(abb)
    return rows


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
