"""Fitting edits to prompts of your own, and looking at what they do to prompts held out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.provenance import Provenance
from lrqp_torch.probes.covariance import Shrinkage
from lrqp_torch.stream.capture import capture
from lrqp_torch.stream.compiled import input_device
from lrqp_torch.study.context import Advance, no_progress
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.prompts import PromptSet, require_classes, require_every_class
from lrqp_torch.study.running import next_class
from lrqp_torch.study.sweep import fit_edits


@dataclass(frozen=True)
class HeldOut:
    """An edit at one site, on the activations of n prompts that it was not fitted to.

    Attributes:
        prompts: n.
        accuracy: share of the prompts whose class the probe reads.
        reached: prompts whose edit to the next class was granted the odds that it asks for, read
            back from the edited activation.
        worst_log_odds_margin: least log odds read back minus those asked for.
        distance: mean Mahalanobis length of these edits.
    """

    prompts: int
    accuracy: Estimate
    reached: int
    worst_log_odds_margin: float
    distance: float

    @classmethod
    def of(cls, edit: LRQP, x: Tensor, labels: Tensor) -> "HeldOut":
        """Try an edit on activations x, (n, d), of classes ``labels``, (n,)."""
        labels = labels.to(x.device)
        solution = edit.propose(x, next_class(labels, edit.probe.n_classes), labels)
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
    if held_out is not None:
        require_classes(held_out, prompts.classes, "the prompts to fit on have")
    edits = fit_sites(
        model, prompts, [site], l2=l2, shrinkage=shrinkage, log_odds=log_odds, batch_size=batch_size
    )
    tried = {} if held_out is None else try_sites(model, held_out, edits, batch_size=batch_size)
    return with_origin(model, prompts, edits, tried, **known)[site]


def fit_sites(
    model: Any,
    prompts: PromptSet,
    sites: Sequence[str],
    *,
    l2: float | None = None,
    shrinkage: Shrinkage = "ledoit_wolf",
    log_odds: float = 10.0,
    batch_size: int = 64,
    advance: Advance = no_progress,
) -> dict[str, LRQP]:
    """One edit a site, fitted to the same prompts. They leave what they cannot reach unchanged.

    Args:
        model: as for :func:`fit`, like the other arguments.
        prompts: as there.
        sites: names.
        l2: as there.
        shrinkage: as there.
        log_odds: as there.
        batch_size: as there.
        advance: called with the number of probes fitted.

    Raises:
        SiteError, UnknownFamilyError, PromptError: as :func:`fit`.
    """
    require_every_class(prompts)
    found = capture(
        model, prompts.inputs, list(sites), positions=prompts.position, batch_size=batch_size
    )
    device = input_device(model)
    return fit_edits(
        found,
        prompts.labels.to(device),
        l2=l2,
        shrinkage=shrinkage,
        log_odds=log_odds,
        advance=advance,
    )


def try_sites(
    model: Any, prompts: PromptSet, edits: Mapping[str, LRQP], *, batch_size: int = 64
) -> dict[str, HeldOut]:
    """What each edit does to the activations of held-out prompts, without the rest of the model."""
    found = capture(
        model, prompts.inputs, list(edits), positions=prompts.position, batch_size=batch_size
    )
    return {site: HeldOut.of(edit, found[site], prompts.labels) for site, edit in edits.items()}


def with_origin(
    model: Any,
    prompts: PromptSet,
    edits: Mapping[str, LRQP],
    tried: Mapping[str, HeldOut],
    **known: Any,
) -> dict[str, LRQP]:
    """Finished edits: they know where they come from, and refuse what they cannot reach."""
    for site, edit in edits.items():
        accuracy = tried[site].accuracy.value if site in tried else None
        edit.on_infeasible = "raise"
        edit.provenance = Provenance.of(
            model,
            site,
            classes=prompts.classes,
            probe_accuracy=accuracy,
            probe_samples=len(prompts),
            **known,
        )
    return dict(edits)
