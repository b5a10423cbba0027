"""Edits of prompts of one's own: fitted to them, found in a folder, and applied to others."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrqp_torch.edits.hub import fetched_folder
from lrqp_torch.edits.library import EditLibrary
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.provenance import Provenance
from lrqp_torch.edits.record import EditRun
from lrqp_torch.edits.saving import INDEX_FILE, JSON_FILE
from lrqp_torch.errors import (
    PromptError,
    ProvenanceError,
    SavedEditError,
    SettingError,
    TargetError,
    quoted,
)
from lrqp_torch.probes.covariance import Shrinkage
from lrqp_torch.stream.capture import capture
from lrqp_torch.stream.compiled import input_device
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.prompts import (
    CLOSING,
    OPENING,
    Prompt,
    PromptSet,
    require_classes,
    require_every_class,
    unmark,
)
from lrqp_torch.study.running import Batch, in_batches, lead, next_class
from lrqp_torch.study.sweep import fit_edits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Editing = AbstractContextManager[EditRun]

OWN, OTHER = "own", "other"
"""Targets besides the classes' names: the class that holds, and the one after it."""

# ---- fitting -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """An edit at one site, on the activations of n prompts that it was not fitted to."""

    prompts: int  # n
    accuracy: Estimate  # share of the prompts whose class the probe reads
    # Prompts whose edit to the next class was granted the odds that it asks for, read back from the
    # edited activation.
    reached: int
    worst_log_odds_margin: float  # least log odds read back minus those asked for
    distance: float  # mean Mahalanobis length of these edits

    @classmethod
    def of(cls, edit: LRQP, x: Tensor, labels: Tensor, other: Tensor | None = None) -> "HeldOut":
        """Try an edit on activations x, (n, d), of classes ``labels``, (n,), to ``other``, (n,).

        The latter are by default the next classes.
        """
        labels = labels.to(x.device)
        if other is None:
            other = next_class(labels, edit.probe.n_classes)
        solution = edit.propose(x, other.to(x.device), labels)
        margin = solution.log_odds_after - solution.floor
        return cls(
            prompts=len(labels),
            accuracy=Estimate.share(edit.probe(x).argmax(-1) == labels),
            reached=int((margin >= 0).sum()),
            worst_log_odds_margin=float(margin.min()),
            distance=float(solution.distance.mean()),
        )


def fit(
    model: Any,
    prompts: PromptSet,
    site: str,
    *,
    held_out: PromptSet | None = None,
    l2: float | None = None,
    shrinkage: Shrinkage = "ledoit_wolf",
    log_odds: float = 10.0,
    batch_size: int = 64,
    **known: Any,
) -> LRQP:
    """Fit probe, metric and edit to prompts of your own.

        edit = tasks.fit(model, train, "L6.mid", held_out=test)
        edit.save("number")

    Args:
        model: a transformers causal language model in evaluation mode.
        prompts: to fit on; every class must occur.
        site: where, such as ``"L6.mid"``.
        held_out: other prompts with the same classes in the same order, for the probe accuracy
            that the edit keeps.
        l2: penalty of the probe; default its own.
        shrinkage: of the covariance.
        log_odds: least log odds that an edit asks for, in nats.
        batch_size: prompts a forward pass.
        known: further fields of the edit's :class:`~lrqp_torch.edits.provenance.Provenance`,
            such as ``task``, ``variable``, ``position`` and ``seed``.

    Returns:
        The edit; its ``provenance`` names site, model, classes, accuracy and versions.

    Raises:
        SiteError, UnknownFamilyError: no such site in this model.
        PromptError: a class without prompts, or held-out prompts with other classes.
    """
    how: dict[str, Any] = {"l2": l2, "shrinkage": shrinkage, "log_odds": log_odds}
    edits, _ = fit_sites(model, prompts, [site], held_out, batch_size=batch_size, **how, **known)
    return edits[site]


def fit_sites(
    model: Any,
    prompts: PromptSet,
    sites: Sequence[str],
    held_out: PromptSet | None = None,
    *,
    l2: float | None = None,
    shrinkage: Shrinkage = "ledoit_wolf",
    log_odds: float = 10.0,
    batch_size: int = 64,
    **known: Any,
) -> tuple[dict[str, LRQP], dict[str, HeldOut]]:
    """Fit an edit at each of several sites, as :func:`fit` does, whose errors it raises.

    Returns the edits by site, and what each does to the held-out prompts, if there are any.
    """
    require_every_class(prompts)
    if held_out is not None:
        require_classes(held_out, prompts.classes, "the prompts to fit on have")

    def captured(of: PromptSet, at: Tensor) -> dict[str, Tensor]:
        return capture(model, of.inputs, list(sites), positions=at, batch_size=batch_size)

    labels, at = prompts.labels, prompts.position
    if prompts.spans is not None:
        at, labels = prompts.spans, labels[prompts.spans.nonzero()[:, 0]]
    labels = labels.to(input_device(model))
    how: dict[str, Any] = {"l2": l2, "shrinkage": shrinkage, "log_odds": log_odds}
    edits = fit_edits(captured(prompts, at), labels, **how)
    tried = {}
    if held_out is not None:
        found = captured(held_out, held_out.position)
        both = held_out.labels, held_out.other
        tried = {site: HeldOut.of(edits[site], x, *both) for site, x in found.items()}
    for site, edit in edits.items():
        edit.on_infeasible = "raise"
        accuracy = tried[site].accuracy.value if site in tried else None
        read: dict[str, Any] = {"probe_accuracy": accuracy, "probe_samples": len(prompts)}
        edit.provenance = Provenance.of(model, site, classes=prompts.classes, **read, **known)
    return edits, tried


# ---- finding -------------------------------------------------------------------------------------


def load_one(name_or_path: str, name: str | None = None) -> LRQP:
    """The edit of a folder or a name on the Hub, which holds one, or a library of several with
    ``name``.

    Raises:
        HubError: neither a folder nor to be had from the Hub.
        SavedEditError: it holds no edit, several and none is named, none of that name, or a library
            beside an edit of its own.
    """
    folder = fetched_folder(name_or_path)
    if not (folder / INDEX_FILE).is_file():
        if name is not None:
            raise SavedEditError(f"{name_or_path!r} holds one edit, and none called {name!r}")
        return LRQP.load(folder)
    if (folder / JSON_FILE).exists():
        raise SavedEditError(
            f"{name_or_path!r} holds a library ({INDEX_FILE}) beside an edit ({JSON_FILE}), so "
            f"which one is meant cannot be told; move one of the two to another folder"
        )
    library = EditLibrary.load(folder)
    if name is None or name not in library:
        asked = "say which one you mean" if name is None else f"it has none called {name!r}"
        raise SavedEditError(
            f"{name_or_path!r} holds the edits {', '.join(library)}; {asked} (on the command line "
            f"with --edit)"
        )
    return library[name]


def origin_of(edit: LRQP) -> Provenance:
    """Where an edit comes from.

    Raises:
        ProvenanceError: it does not say, or not which classes its probe reads.
    """
    origin = edit.provenance
    if origin is None:
        raise ProvenanceError(
            "this edit does not say which site and classes it was fitted for; fit it with "
            "`lrqp fit`, or use edit.at(...) in Python"
        )
    if origin.classes is None or len(origin.classes) != edit.probe.n_classes:
        raise ProvenanceError(
            f"this edit names the classes {origin.classes}, and its probe reads "
            f"{edit.probe.n_classes}; fit it with `lrqp fit`, or use edit.at(...) in Python"
        )
    return origin


# ---- applying ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Applied:
    """One prompt without and with an edit. "Before" is without."""

    prompt: str  # its text
    source: str  # class that holds, by the data or, for prompts without a label, by the probe
    target: str  # class that was written
    belief_before: float  # the probe's log odds of the target against its strongest rival, in nats
    belief_after: float  # the same, read back from the activation that the model received
    distance: float  # Mahalanobis length of the edit
    # Score of the target's answers minus the highest of the other classes', in nats; None for
    # prompts without answers.
    lead_before: float | None
    lead_after: float | None
    next_before: list[tuple[str, float]]  # the likeliest next tokens with their probabilities
    next_after: list[tuple[str, float]]
    continued_before: str | None  # what the model writes behind the prompt; None if not asked for
    continued_after: str | None


def typed_prompts(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], edit: LRQP
) -> PromptSet:
    """Prompts without labels, for an edit that knows its position and classes.

    Raises:
        ProvenanceError: it does not.
        PromptError: a text without marks for an edit at marked words, or marks that do not pair.
    """
    origin = origin_of(edit)
    last = origin.position == "last"
    for text in texts:
        if not last and OPENING not in text:
            raise PromptError(
                f"{quoted(text)} marks no words, and this edit was fitted at marked ones: write "
                f"the words that it is for as {OPENING}words{CLOSING}"
            )
    plain = [unmark(row, text)[0] if last else text for row, text in enumerate(texts)]
    classes = origin.classes or ()
    prompts = [Prompt(text, classes[0]) for text in plain]
    return PromptSet.encode(tokenizer, prompts, classes, bos=origin.bos)


def targets_of(name: str, prompts: PromptSet) -> Tensor:
    """The class to write into each prompt, (n,).

    It is that of the name; or, where no class has it, with ``"own"`` the class that holds, and with
    ``"other"`` the counterfactual one. Raises TargetError: no such class.
    """
    labels, classes = prompts.labels, prompts.classes
    if name in classes:
        return torch.full_like(labels, classes.index(name))
    if name == OWN:
        return labels
    if name == OTHER:
        return prompts.other
    raise TargetError(
        f"no class {name!r}: the classes of this edit are {', '.join(classes)}; or write "
        f"{OTHER!r}, or {OWN!r} for a control edit"
    )


@torch.no_grad()
def apply(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    edit: LRQP,
    prompts: PromptSet | Sequence[str],
    target: str,
    *,
    labelled: bool = True,
    likeliest: int = 5,
    generate: int = 0,
    batch_size: int = 64,
) -> list[Applied]:
    """Run prompts without and with an edit at the site that it was fitted for.

    Args:
        model: the model that the edit was fitted on.
        tokenizer: its tokenizer.
        edit: made by :func:`fit`.
        prompts: with the edit's classes in the edit's order, padded on the left; or texts, whose
            labels are not known, marked where the edit is for marked words.
        target: see :func:`targets_of`.
        labelled: whether the labels of ``prompts`` are known; else the probe's reading is taken.
        likeliest: how many next tokens to list, from 1 to the size of the vocabulary.
        generate: how many tokens to continue each prompt by, greedily; 0 for none.
        batch_size: prompts a forward pass.

    Raises:
        ProvenanceError: an edit of another model, or one that does not know its site.
        PromptError: prompts with other classes than the edit's, or in another order.
        SettingError: ``likeliest`` or ``generate`` out of range.
        TargetError: no such class.
        InfeasibleError: a class that no activation reaches.
    """
    origin = origin_of(edit)
    origin.check(model, origin.site)
    if not isinstance(prompts, PromptSet):
        texts = [prompts] if isinstance(prompts, str) else prompts
        prompts, labelled = typed_prompts(tokenizer, texts, edit), False
    require_classes(prompts, origin.classes or (), "this edit was fitted to")
    if generate < 0:
        raise SettingError(f"generate is {generate}: give 0 or more tokens to continue by")
    targets_of(target, prompts)
    device = input_device(model)
    edit = edit.to(device)
    found = []
    for rows in in_batches(torch.arange(len(prompts)), batch_size):
        batch = prompts[rows].to(device)
        if not labelled:
            x = capture(model, batch.inputs, origin.site, batch.position)[origin.site]
            read = edit.probe(x).argmax(-1)
            batch = replace(batch, labels=read, targets=None)
        written = targets_of(target, batch)

        here = Batch(model, rows, batch, int(batch.edited.long().argmax(1).min()))
        clean, clean_rest = here.clean, here.clean_rest
        if not 1 <= likeliest <= clean.shape[-1]:
            raise SettingError(
                f"likeliest is {likeliest}: list 1 to {clean.shape[-1]} next tokens, of which the "
                f"vocabulary has no more"
            )
        edited = here.edited(origin.site, edit, {target: written})[target]
        before = after = [None] * len(batch)
        if generate:
            before = _continued(model, tokenizer, batch, generate)
            positions = batch.position if batch.spans is None else batch.spans
            site, held = origin.site, batch.labels
            with edit.at(model, site, positions=positions, target=written, source=held):
                after = _continued(model, tokenizer, batch, generate)
        runs = ((clean, clean_rest), (edited.logits, edited.rest))
        columns = [
            batch.prompts,
            *([batch.classes[k] for k in own.tolist()] for own in (batch.labels, written)),
            *(edited.record[n].tolist() for n in ("log_odds_before", "log_odds_after", "distance")),
            *(_leads(batch, *run, written) for run in runs),
            *(_likeliest(tokenizer, logits, likeliest) for logits, _ in runs),
            before,
            after,
        ]
        found += [Applied(*row) for row in zip(*columns, strict=True)]
    return found


def applied_json(found: Sequence[Applied], origin: Provenance) -> dict[str, Any]:
    """What an edit did to every prompt, with its origin, as plain JSON values."""
    return {"edit": origin.to_json(), "prompts": [asdict(item) for item in found]}


def _leads(
    prompts: PromptSet, logits: Tensor, rest: Tensor | None, classes: Tensor
) -> list[float | None] | list[None]:
    if prompts.answers is None:
        return [None] * len(prompts)
    values: list[float] = lead(prompts.scores(logits, rest), classes[:, None]).tolist()
    # A prompt need not have answers for the class that was written.
    return [value if math.isfinite(value) else None for value in values]


def _likeliest(
    tokenizer: "PreTrainedTokenizerBase", logits: Tensor, count: int
) -> list[list[tuple[str, float]]]:
    chances, tokens = logits.double().softmax(-1).topk(count)
    return [
        [(str(tokenizer.decode([token])), chance) for token, chance in zip(*row, strict=True)]
        for row in zip(tokens.tolist(), chances.tolist(), strict=True)
    ]


def _continued(
    model: Any, tokenizer: "PreTrainedTokenizerBase", prompts: PromptSet, count: int
) -> list[Any]:
    length = prompts.inputs["input_ids"].shape[1]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    inputs = {name: prompts.inputs[name] for name in ("input_ids", "attention_mask")}
    how = {"max_new_tokens": count, "do_sample": False, "pad_token_id": padding}
    ids = model.generate(**inputs, **how)
    texts: list[Any] = tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
    return texts
