"""Small models with prompts of the task, for tests of the study's parts about attention heads."""

from dataclasses import replace
from typing import Any

import torch
from contexts_for_tests import computed
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from benchmarks.organisms.prompts import build_tokenizer
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.stream.sites import all_sites
from lrqp_torch.study.context import StudyContext, Task
from lrqp_torch.study.heads import HeadsResult
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.parts.heads import PART as HEADS_PART

LAYERS, HEADS, WIDTH = 3, 4, 24
EVERY_HEAD = [f"L{layer}.H{head}" for layer in range(LAYERS) for head in range(HEADS)]


def random_model(name: str, vocabulary: int, dtype: torch.dtype = torch.float64) -> Any:
    """A random model whose weights are large enough for edits to matter."""
    rotary = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": 64,
    }
    config_class, model_class, settings = {
        "gpt2": (
            GPT2Config,
            GPT2LMHeadModel,
            {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_positions": 64},
        ),
        "llama": (LlamaConfig, LlamaForCausalLM, rotary | {"num_key_value_heads": 2}),
        "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, rotary | {"use_parallel_residual": True}),
    }[name]
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    model = model_class(config_class(vocab_size=vocabulary, **settings, **special)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.35 * noise)
    return model.to(dtype)


def study_of(
    name: str, *, n: int = 60, model: nn.Module | None = None, tokenizer: Any = None
) -> StudyContext:
    """A study's context on a random model of a family, or on a given model."""
    tokenizer = build_tokenizer([]) if tokenizer is None else tokenizer
    model = random_model(name, len(tokenizer)) if model is None else model
    data = IOIPrompts.of(IOIDataset.generate(tokenizer, n, seed=0, padding_side="left"))
    task = Task("plain", data[: n // 2], data[n // 2 :])
    return StudyContext(model, task, None, all_sites(model), 16, 0, torch.device("cpu"))


def edit_at(context: StudyContext, site: str, **options: Any) -> LRQP:
    """An edit fitted to the training prompts."""
    x = context.activations(context.task, "train", "S2", [site])[site]
    return LRQP.fit(x, context.task.train.labels, **options)


def with_roles(context: StudyContext, **roles: list[str]) -> HeadsResult:
    """A result whose heads have the given roles and no others; underscores stand for spaces."""
    result = computed(HEADS_PART, context)
    found: dict[str, list[str]] = {role: [] for role in result.found}
    given = {role.replace("_", " ").replace("S i", "S-i"): names for role, names in roles.items()}
    assert set(given) <= set(found)
    return replace(result, found=found | given)


@torch.no_grad()
def with_telling_answers(context: StudyContext, site: str) -> StudyContext:
    """The same study, its answers renamed so that the counterfactual edit has a systematic effect.

    A random model says nothing of IO and S. So two tokens take their place, exchanged where the
    order is: a pair whose answers the edit at ``site`` flips on several prompts, and of those pairs
    the one whose logits it moves most.
    """
    edit, test = edit_at(context, site), context.task.test
    labels = test.labels
    clean = context.model(**test.inputs).logits[:, -1]
    with edit.at(
        context.model, site, positions=test.positions["S2"], target=1 - labels, source=labels
    ):
        edited = context.model(**test.inputs).logits[:, -1]
    sign = (2 * labels - 1)[:, None, None]
    before = sign * (clean[:, :, None] - clean[:, None, :])
    after = sign * (edited[:, :, None] - edited[:, None, :])
    flips = ((before > 0) & (after < 0)).sum(0)
    effect = (before - after).mean(0).masked_fill(flips < flips.max() / 2, -torch.inf)
    best, worst = divmod(int(effect.argmax()), effect.shape[1])
    answers = replace(
        test.data,
        io_tokens=torch.where(labels == 1, best, worst),
        s_tokens=torch.where(labels == 1, worst, best),
    )
    data = IOIPrompts.of(answers)
    return replace(context, task=replace(context.task, test=data))
