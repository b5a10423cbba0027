"""Where the order of the names can be read, and where editing it flips the answer.

At each site a probe and a covariance are fitted to the activations at S2 of the training prompts.
On the held-out prompts the activation at S2 is then replaced by the nearest one at which the probe
believes the true order (control) or the other one (counterfactual), and the model goes on from
there. If the counterfactual edit flips the answer from IO to S, the model *uses* the order at that
site; a probe's accuracy tells only that it is *knowable* there.

Source: the post "Intervening in the Residual Stream" (2023).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.probes.covariance import Mahalanobis, Shrinkage
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.qp import Status
from lrqp_torch.study.context import Advance, no_progress
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.results import CleanResult, ConditionResult, SiteResult, read_sites
from lrqp_torch.study.running import Batch, put
from lrqp_torch.study.running import batches as in_order

CONDITIONS = ("control", "counterfactual")
USED_THRESHOLD = 0.5
"""A site counts as used if its counterfactual edit flips this share more than its control edit.

An edit may break an answer without changing the order: where a probe reads nothing, the odds asked
for take a long arbitrary step, and the control edit then flips about as many answers.
"""


class Batches(Protocol):
    """Keeps the tensors of finished batches, so that a stopped sweep can go on."""

    def load(self, index: int) -> dict[str, Tensor] | None:
        """The tensors of a batch, or None if it was not reached."""

    def save(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a batch."""


@dataclass(frozen=True)
class CleanEffects:
    """The clean run, one number per held-out prompt, each of shape (n,) in float64.

    Attributes:
        logit_difference: IO logit minus S logit at END.
        io_probability: softmax probability of IO at END.
    """

    logit_difference: Tensor
    io_probability: Tensor


@dataclass(frozen=True)
class EditEffects:
    """One edit at one site, one number per held-out prompt, each of shape (n,).

    Attributes:
        logit_difference: IO logit minus S logit at END.
        log_odds_before: the probe's log odds of the target before the edit.
        log_odds_after: the same after it, read from the activation that the model received.
        floor: log odds asked for.
        distance: Mahalanobis length of the edit.
        euclidean: Euclidean length of the edit.
        status: the solver's :class:`~lrqp_torch.qp.Status`, int64.
    """

    logit_difference: Tensor
    log_odds_before: Tensor
    log_odds_after: Tensor
    floor: Tensor
    distance: Tensor
    euclidean: Tensor
    status: Tensor


@dataclass(frozen=True)
class Sweep:
    """All sites and both conditions.

    Attributes:
        clean: the clean run.
        effects: ``effects[site][condition]``, with the conditions of :data:`CONDITIONS`.
    """

    clean: CleanEffects
    effects: dict[str, dict[str, EditEffects]]

    def prompts(self) -> dict[str, Tensor]:
        """The per-prompt tensors under flat names such as ``L6.mid.control.distance``."""
        flat = {f"clean.{name}": value for name, value in vars(self.clean).items()}
        for site, conditions in self.effects.items():
            for condition, effects in conditions.items():
                flat |= {f"{site}.{condition}.{k}": v for k, v in vars(effects).items()}
        return flat

    @classmethod
    def from_prompts(cls, flat: Mapping[str, Tensor], sites: Iterable[str]) -> Self:
        """The inverse of :meth:`prompts`."""

        def columns(kind: type, prefix: str) -> dict[str, Tensor]:
            return {field.name: flat[f"{prefix}.{field.name}"] for field in fields(kind)}

        effects = {
            site: {
                condition: EditEffects(**columns(EditEffects, f"{site}.{condition}"))
                for condition in CONDITIONS
            }
            for site in sites
        }
        return cls(CleanEffects(**columns(CleanEffects, "clean")), effects)


@dataclass(frozen=True)
class TaskFlipping:
    """What the sweep says about one task.

    Attributes:
        task: name of the task.
        clean: the model without any edit.
        sites: the sweep by site, in order of computation.
        used_sites: see :func:`used_sites`.
        best_site: the site whose counterfactual edit flips most.
        seconds: time of each stage.
    """

    task: str
    clean: CleanResult
    sites: dict[str, SiteResult]
    used_sites: list[str]
    best_site: str
    seconds: dict[str, float]

    @classmethod
    def of(cls, task: str, swept: Sweep, seconds: dict[str, float]) -> Self:
        """Summarise a sweep."""
        clean, sites = summarise_clean(swept.clean), summarise_sites(swept)
        return cls(task, clean, sites, used_sites(sites), best_site(clean, sites), seconds)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        nested = {"clean": CleanResult(**raw["clean"]), "sites": read_sites(raw["sites"])}
        return cls(**(raw | nested))


def fit_edits(
    activations: Mapping[str, Tensor],
    labels: Tensor,
    *,
    l2: float | None = None,
    shrinkage: Shrinkage = "ledoit_wolf",
    log_odds: float = 10.0,
    advance: Advance = no_progress,
) -> dict[str, LRQP]:
    """Fit one edit per site to the training prompts alone.

    Args:
        activations: site name to activations (n, d) at S2.
        labels: class of each prompt, (n,).
        l2: penalty of the probe; ``None`` for its own default.
        shrinkage: of the covariance.
        log_odds: least log odds of the ``mirror`` rule, log α = max(z_v − z_k, ``log_odds``), with
            v the true class and k the target, as in the post.
        advance: called with the number of probes fitted, one a site in all.

    Returns:
        Site name to edit, in the order given.
    """
    problems = {site: (x, labels) for site, x in activations.items()}
    probes = LinearProbe.fit_many(problems, l2=l2, advance=advance)
    # Prompts that cannot be edited are counted in the results instead of ending the study.
    return {
        site: LRQP(
            probes[site],
            Mahalanobis.fit(x, shrinkage),
            log_odds=log_odds,
            on_infeasible="skip",
        )
        for site, x in activations.items()
    }


def sweep(
    model: Any,
    data: IOIPrompts,
    edits: Mapping[str, LRQP],
    *,
    batch_size: int = 64,
    batches: Batches | None = None,
    advance: Advance = no_progress,
) -> Sweep:
    """Run every edit, towards both targets, on held-out prompts.

    Each batch runs clean once; each edit then reruns only what it can change. Prompts are grouped
    by the distance from S2 to END, so that this suffix is short, and the results come back in the
    order of ``data``.

    Args:
        model: a Hugging Face causal language model in evaluation mode.
        data: held-out prompts, padded on the left.
        edits: site name to edit.
        batch_size: prompts per batch.
        batches: keeps each batch as soon as it is done; batches that it has are not run again.
        advance: called with the number of runs done, ``1 + 2 · len(edits)`` a batch in all.

    Raises:
        NonFiniteError: the model's logits are NaN or infinite.
    """
    flat: dict[str, Tensor] = {}
    for index, batch in enumerate(in_order(model, data, batch_size, copies=len(CONDITIONS))):
        done = None if batches is None else batches.load(index)
        if done is None:
            done = _sweep_batch(batch, edits, advance).prompts()
            if batches is not None:
                batches.save(index, done)
        else:
            advance(sweep_runs(len(edits)))
        put(flat, done, batch.rows, len(data))
    return Sweep.from_prompts(flat, edits)


def sweep_runs(edits: int) -> int:
    """Runs of the model in each batch of a sweep over so many edits."""
    return 1 + len(CONDITIONS) * edits


@torch.no_grad()
def _sweep_batch(batch: Batch[IOIPrompts], edits: Mapping[str, LRQP], advance: Advance) -> Sweep:
    data, targets = batch.prompts, batch.targets()
    clean = CleanEffects(_logit_difference(batch.clean, data), _io_probability(batch.clean, data))
    advance(1)
    effects: dict[str, dict[str, EditEffects]] = {}
    for site, edit in edits.items():
        effects[site] = {
            condition: EditEffects(_logit_difference(edited.logits, data), **edited.record)
            for condition, edited in batch.edited(site, edit, targets).items()
        }
        advance(len(targets))
    return Sweep(clean, effects)


def summarise_clean(clean: CleanEffects) -> CleanResult:
    """Means over the held-out prompts of the clean run."""
    difference = clean.logit_difference
    return CleanResult(
        prompts=len(difference),
        logit_difference=difference.mean().item(),
        accuracy=(difference > 0).double().mean().item(),
        io_probability=clean.io_probability.mean().item(),
    )


def summarise_sites(sweep: Sweep) -> dict[str, SiteResult]:
    """Means over the held-out prompts at every site.

    The probe's accuracy is read from the control edit: with two classes, the log odds of the true
    class before the edit are positive exactly where the probe is right.
    """
    sites = {}
    for name, effects in sweep.effects.items():
        conditions = {key: _summarise_condition(sweep.clean, effects[key]) for key in CONDITIONS}
        sites[name] = SiteResult(
            probe_accuracy=(effects["control"].log_odds_before > 0).double().mean().item(),
            worst_log_odds_margin=min(c.worst_log_odds_margin for c in conditions.values()),
            **conditions,
        )
    return sites


def used_sites(sites: Mapping[str, SiteResult]) -> list[str]:
    """Sites whose counterfactual edit flips enough answers more than their control edit.

    "Enough" is :data:`USED_THRESHOLD`.
    """
    return [name for name, site in sites.items() if _net_flips(site) >= USED_THRESHOLD]


def best_site(clean: CleanResult, sites: Mapping[str, SiteResult]) -> str:
    """The site that flips most beyond its control; among equals, the one that moves answers most.

    "Moves" is the change of the mean logit difference under the counterfactual edit.
    """

    def strength(name: str) -> tuple[float, float]:
        site = sites[name]
        change = abs(site.counterfactual.logit_difference - clean.logit_difference)
        return _net_flips(site), change

    return max(sites, key=strength)


def flipped(clean: Tensor, edited: Tensor) -> float | None:
    """Share of answers that an edit flips from IO to S.

        flipped = #{clean > 0 and edited < 0} / #{clean > 0}

    Args:
        clean: logit differences IO − S without the edit, (n,).
        edited: the same under the edit, (n,).

    Returns:
        The share, or ``None`` if no prompt was answered IO to begin with.
    """
    eligible = clean > 0
    if not eligible.any():
        return None
    return (edited[eligible] < 0).double().mean().item()


def _net_flips(site: SiteResult) -> float:
    return (site.counterfactual.flipped or 0.0) - (site.control.flipped or 0.0)


def _summarise_condition(clean: CleanEffects, effects: EditEffects) -> ConditionResult:
    def count(status: Status) -> int:
        return int((effects.status == int(status)).sum())

    return ConditionResult(
        logit_difference=effects.logit_difference.mean().item(),
        accuracy=(effects.logit_difference > 0).double().mean().item(),
        flipped=flipped(clean.logit_difference, effects.logit_difference),
        distance=effects.distance.mean().item(),
        euclidean=effects.euclidean.mean().item(),
        worst_log_odds_margin=(effects.log_odds_after - effects.floor).min().item(),
        skipped=count(Status.SATISFIED),
        solved=count(Status.SOLVED),
        infeasible=count(Status.INFEASIBLE),
        inaccurate=count(Status.INACCURATE),
    )


def _logit_difference(logits: Tensor, data: IOIPrompts) -> Tensor:
    """IO minus S, (B,), float64 on the CPU."""
    answers = torch.stack([data.io_tokens, data.s_tokens], -1).to(logits.device)
    io, s = logits.gather(-1, answers).double().cpu().unbind(-1)
    return io - s


def _io_probability(logits: Tensor, data: IOIPrompts) -> Tensor:
    answers = data.io_tokens.unsqueeze(-1).to(logits.device)
    return logits.double().softmax(-1).gather(-1, answers).squeeze(-1).cpu()
