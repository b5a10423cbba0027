"""What a study runs on: its device, its model with the sites, and its prompts."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lrqp_torch import models
from lrqp_torch.errors import PromptError, SettingError, SiteError
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.stream.capture import capture
from lrqp_torch.stream.progress import Clock, Start, no_stages
from lrqp_torch.stream.sites import Site, all_sites, locate
from lrqp_torch.study.context import StudyContext, Task, evenly
from lrqp_torch.study.estimates import FEWEST_GROUPS
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.prompts import Prompt, PromptSet, split
from lrqp_torch.study.reading import RowLog, front, prompts_of, rows_of, screen
from lrqp_torch.study.settings import Settings, listed


def prepare(
    settings: Settings, start: Start = no_stages, clock: Clock | None = None
) -> StudyContext:
    """Read or write the prompts of a study, and load its model.

    ``start`` opens progress bars, ``clock`` counts the stages ``model`` and ``prompts``. Raises
    LRQPError: a model, site, device or file that is not there, or cannot be used.
    """
    clock = clock or Clock()
    log = RowLog(settings.strict)
    read = None if settings.data is None else read_own(settings, log)
    with clock.stage("model"):
        advance = start("loading the model", 1)
        device = choose_device(settings.device)
        model, tokenizer = models.load(settings.model, device=device)
        advance(1)
    sites = choose_sites(model, settings.sites)
    with clock.stage("prompts"):
        advance = start("writing prompts", 1)
        if read is not None:
            train, test, _ = encode_own(tokenizer, read, settings, log)
            tasks = [Task("own", train, test)]
            few = 0 if test.groups is None else len(test.groups.unique())
            if 0 < few < FEWEST_GROUPS:
                log.note(
                    f"The held-out prompts are of {few} {'group' if few == 1 else 'groups'}; fewer "
                    f"than {FEWEST_GROUPS} are too few for intervals over groups, so theirs take "
                    f"prompts to be independent."
                )
        else:
            versions = [settings, settings.other()] if settings.compares else [settings]
            tasks = [named_task(tokenizer, version) for version in versions]
        advance(1)
    other, how = tasks[1] if len(tasks) > 1 else None, (settings.batch_size, settings.seed)
    context = StudyContext(model, tasks[0], other, sites, *how, device, settings.variable_names)
    context.left_out, context.notes = dict(log.left_out), log.says()
    if read is None:
        return context
    context = _without_constant(context)
    sink = find_sink(context)
    return context if sink is None else replace(context, notes=[*context.notes, sink])


def _without_constant(context: StudyContext) -> StudyContext:
    """The context without the stream before the first block, where all prompts have one token."""
    first = "L0.pre"
    if first not in context.sites or len(context.sites) == 1:
        return context
    x = context.activations(context.task, "train", "mark", [first])[first]
    if bool((x != x[0]).any()):
        return context
    note = f"All prompts have the same token where they are edited, so {first} was left out."
    rest = [site for site in context.sites if site != first]
    return replace(context, sites=rest, notes=[*context.notes, note])


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes a CUDA device where there is one.

    Raises:
        SettingError: the name is no device, or this machine lacks it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(
            f"cannot use device {name!r}: {reason}. Use --device auto or --device cpu."
        ) from error
    return device


def choose_sites(model: Any, names: str) -> list[str]:
    """Sites to sweep, in order of computation, by names separated by commas.

    ``all`` stands for every pre and mid. Raises SiteError: a name that is no place in this model's
    stream, or no name at all.
    """
    chosen: set[Site] = set()
    for name in listed(names):
        named = all_sites(model) if name == "all" else [name]
        chosen.update(locate(model, site).site for site in named)
    if not chosen:
        raise SiteError("no site given; name some, such as L6.mid,L7.pre, or say `all`.")
    return [str(site) for site in sorted(chosen)]


def read_own(settings: Settings, log: RowLog) -> list[Prompt]:
    """The prompts of one's own file, which can be divided into some to fit on and some held out.

    Raises:
        PromptError: see :func:`~.reading.read_prompts` and :func:`~.prompts.split`.
    """
    data = str(settings.data)
    prompts = prompts_of(rows_of(data), settings.columns, log, data)
    try:
        split(prompts, settings.train_share, settings.seed)
    except PromptError as error:
        raise PromptError(" ".join([f"{error}.", *log.says()])) from error
    return prompts


def encode_own(
    tokenizer: Any, prompts: list[Prompt], settings: Settings, log: RowLog
) -> tuple[PromptSet, PromptSet, bool | None]:
    """Those of them that this tokenizer knows, to fit on and held out, with the classes of both.

    The third value is what :meth:`PromptSet.encode` was told of ``bos``. Raises PromptError: see
    :func:`~.reading.screen` and :func:`~.prompts.split`.
    """
    kept = screen(tokenizer, prompts, log)
    first = front(tokenizer, kept, settings.bos, log)
    halves = split(kept, settings.train_share, settings.seed)
    classes = sorted({prompt.label for prompt in kept})
    further = {name: sorted({prompt.further[name] for prompt in kept}) for name in kept[0].further}
    train, test = (
        PromptSet.encode(tokenizer, half, classes, further_classes=further, bos=first)
        for half in halves
    )
    return train, test, first


def named_task(tokenizer: Any, settings: Settings) -> Task:
    """Prompts about two names, to fit on and held out, without a prompt in common."""
    plain, size = settings.prefixes == "none", settings.train_size
    asked: dict[str, Any] = {"seed": settings.seed, "names": settings.names}
    asked |= {"prefixes": None if plain else settings.prefixes}
    data = IOIPrompts.of(IOIDataset.generate(tokenizer, settings.n, padding_side="left", **asked))
    return Task("plain" if plain else "prefixed", data[:size], data[size:])


def describe_model(model: Any, name: str) -> dict[str, Any]:
    """What identifies the model: name (of a folder, its last part), class, revision and size."""
    folder = Path(name)
    parameter = next(model.parameters())
    return {
        "name": folder.resolve().name if folder.is_dir() else name,
        "class": type(model).__name__,
        "family": model.config.model_type,
        "revision": getattr(model.config, "_commit_hash", None),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
    }


def digest_prompts(tasks: Sequence[Task]) -> str:
    """A short digest of the prompts of all tasks, as tokens."""
    digest = hashlib.sha256()
    for task in tasks:
        for data in (task.train, task.test):
            digest.update("\n".join(data.prompts).encode())
            digest.update(data.inputs["input_ids"].cpu().numpy().tobytes())
            digest.update(data.labels.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- attention sinks -----------------------------------------------------------------------------


TIMES_MEDIAN = 20.0
"""A token whose norm is more than this many medians is a sink."""

LOOKED_AT = 32
"""Prompts that are looked at."""

MOST_SITES = 12
"""Sites that are looked at, evenly spaced."""


@torch.no_grad()
def find_sink(context: StudyContext) -> str | None:
    """A warning where tokens that a study edits are sinks; None where they are not.

        |x at the edited token|  >  20 · median over all tokens of |x|

    The first 32 prompts to fit on are looked at.
    """
    few = context.task.train[: min(LOOKED_AT, len(context.task.train))].trimmed()
    real = few.inputs["attention_mask"].bool()
    edited = few.edited
    sites, size = evenly(context.sites, MOST_SITES), context.batch_size
    found = capture(context.model, few.inputs, sites, positions=real, batch_size=size)
    most, sinks, rows = 0.0, [], torch.zeros(len(few), dtype=torch.bool)
    for site, x in found.items():
        norms = torch.zeros(real.shape, dtype=torch.float64)
        norms[real] = x.double().norm(dim=-1).cpu()
        times = norms / norms[real].median()
        here = (times > TIMES_MEDIAN) & edited
        if bool(here.any()):
            sinks.append(site)
            rows |= here.any(1)
            most = max(most, float(times[here].max()))
    if not sinks:
        return None
    return (
        f"The edited token of {int(rows.sum())} of the first {len(few)} prompts is an attention "
        f"sink at {', '.join(sinks)}: its norm is up to {most:.0f} times the median token's. What "
        f"is read and flipped there says little of the class; put a token in front of the prompts "
        f"(--bos always), or mark other words."
    )
