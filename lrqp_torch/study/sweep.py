"""The edits of a study: fitted to training prompts at every site, and run on held-out ones.

At each site a probe and a covariance are fitted to the activations at the marked token. On held-out
prompts the activation there is then replaced by the nearest one at which the probe believes the
class that holds (control) or the next one (counterfactual), and the model goes on from there.

Source: the post "Intervening in the Residual Stream" (2023).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrqp_torch.distributed import Ranks
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import LRQPError, RankError
from lrqp_torch.probes.covariance import Mahalanobis, Shrinkage
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.study.context import ALONE, Advance, no_progress
from lrqp_torch.study.prompts import PromptSet
from lrqp_torch.study.running import Batch, Edited, answers, batches, divergences, put

if TYPE_CHECKING:
    from lrqp_torch.study.store import BatchStore

CONDITIONS = ("control", "counterfactual")
INTERCHANGE, NULL = "interchange", "null"
"""Names of what runs beside the edits; further runs of the null are NULL1, NULL2, ..."""
USED_THRESHOLD = 0.5
"""Up to version 0.3 a site counted as used if its counterfactual edit flipped this share more than
its control edit; results of that time are still read so. See :mod:`~.ceiling` for the verdict."""


def fit_edits(
    activations: Mapping[str, Tensor],
    labels: Tensor,
    *,
    l2: float | None = None,
    shrinkage: Shrinkage = "ledoit_wolf",
    log_odds: float = 10.0,
    advance: Advance = no_progress,
) -> dict[str, LRQP]:
    """Fit one edit per site to the training prompts alone: (n, d) activations of classes (n,).

    ``l2`` is the penalty of the probe, None for its own default, and ``log_odds`` the least log
    odds of the ``mirror`` rule, log α = max(z_v − z_k, ``log_odds``), with v the true class and k
    the target, as in the post. ``advance`` is called with the number of probes fitted, one a site
    in all.
    """
    problems = {site: (x, labels) for site, x in activations.items()}
    probes = LinearProbe.fit_many(problems, l2=l2, advance=advance)
    # Prompts that cannot be edited are counted in the results instead of ending the study.
    metrics = {site: Mahalanobis.fit(x, shrinkage) for site, x in activations.items()}
    return {
        site: LRQP(probes[site], metric, log_odds=log_odds, on_infeasible="skip")
        for site, metric in metrics.items()
    }


def sweep(
    model: Any,
    prompts: PromptSet,
    edits: Mapping[str, LRQP],
    *,
    batch_size: int = 64,
    ranks: Ranks = ALONE,
    kept: "BatchStore | None" = None,
    first: int = 0,
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
    asked: Mapping[str, Mapping[str, Tensor]] | None = None,
    advance: Advance = no_progress,
) -> dict[str, Tensor]:
    """Run every edit, by site, towards both targets, on held-out prompts padded on the left.

    Each batch runs clean once; each edit then reruns only what it can change. Prompts with like
    suffixes behind the marked token share a batch. The batches that are not done yet are run in
    rounds, one a rank, and kept as soon as a round ends, so a stopped sweep goes on with any number
    of ranks. The numbers are those of one process; model, prompts and edits are the same on every
    rank.

    Args:
        kept: keeps batches; read and written by rank 0 alone.
        first: under what number it keeps the first one.
        beside: site to what is put at the marked token in further runs, (n, d) by name: the same
            names at every site, such as :data:`INTERCHANGE` and :data:`NULL`.
        asked: site and condition to the log α of each prompt, (n,), in place of the edit's rule.
        advance: called with the number of prompts run, ``(1 + runs · len(edits)) · len(prompts)``
            in all on every rank, with a run for each condition and each name beside.

    One number a prompt, (n,), on the CPU, in the order of ``prompts``:

    - ``labels`` and ``other``: the class that holds and the counterfactual one; ``groups``
      where the prompts have groups;
    - ``clean.NAME``, with the names of :func:`~.running.answers` and ``io_probability``, the
      probability of the answers of the class that holds;
    - ``SITE.CONDITION.NAME``, with the names of :func:`~.running.answers`, those of
      :data:`~.running.RECORD`, and ``divergence``, KL(clean ‖ edited) of the next token in nats;
    - ``SITE.NAME_BESIDE.NAME``, the same without a record; and where there is an interchange,
      ``SITE.CONDITION.kl_to_interchange``, KL(interchange ‖ edited).

    Tasks without answers have neither those names nor ``io_probability``.

    Raises:
        PromptError: prompts that do not end in the last column.
        NonFiniteError: the model's logits are NaN or infinite, on the first rank where it happens.
        ToldError: on the others.
        RankError: another rank has ended.
    """
    others = beside or {}
    copies = len(CONDITIONS) + len(next(iter(others.values()), {}))
    work = dict(enumerate(batches(model, prompts, batch_size, copies=copies)))
    rows = {number: batch.rows for number, batch in work.items()}
    store = kept if ranks.is_main else None
    with ranks.together():
        found = {} if store is None else {number: store.load(first + number) for number in work}
    done = ranks.from_main({n: tensors for n, tensors in found.items() if tensors is not None})
    pending = [number for number in work if number not in done]
    runs = 1 + copies * len(edits)
    advance(runs * sum(len(rows[number]) for number in done))
    with ranks.counted(advance, runs * sum(len(rows[n]) for n in pending)) as ran:
        for start in range(0, len(pending), ranks.size):
            own: dict[int, dict[str, Tensor]] = {}
            error = None
            for number in pending[start : start + ranks.size][ranks.turns]:
                try:
                    # What a batch has run is let go with it.
                    own[number] = _sweep_batch(work.pop(number), edits, others, asked or {}, ran)
                except RankError:
                    raise
                except LRQPError as caught:
                    error = caught
            finished = ranks.exchange(own, error)
            done |= finished
            if store is not None:
                for number, tensors in finished.items():
                    store.save(first + number, tensors)
    flat = {"labels": prompts.labels.cpu(), "other": prompts.other.cpu()}
    if prompts.groups is not None:
        flat["groups"] = prompts.groups.cpu()
    for number in sorted(done):
        put(flat, done[number], rows[number], len(prompts))
    return flat


def columns(
    batch: Batch[PromptSet], edited: Edited, patch: Edited | None = None
) -> dict[str, Tensor]:
    """What is kept of a run of a batch under an edit, (B,) by name, as :func:`sweep` names it.

    ``patch`` is the interchange that it is held against.
    """
    found = answers(batch.prompts, edited.logits, edited.rest) | edited.record
    found["divergence"] = divergences(batch.clean, edited.logits)
    if patch is not None:
        found["kl_to_interchange"] = divergences(patch.logits, edited.logits)
    return found


def edited_columns(
    batch: Batch[Any], site: str, edit: Any, targets: Mapping[str, Tensor], *beside: Any, **how: Any
) -> dict[str, Tensor]:
    """All :func:`columns` of the runs of :meth:`.Batch.edited`, by their names in :func:`sweep`."""
    ran, found = batch.edited(site, edit, targets, *beside, **how), dict[str, Tensor]()
    for name, edited in ran.items():
        own = columns(batch, edited, ran.get(INTERCHANGE) if name in targets else None)
        found |= {f"{site}.{name}.{key}": values for key, values in own.items()}
    return found


@torch.no_grad()
def _sweep_batch(
    batch: Batch[PromptSet],
    edits: Mapping[str, LRQP],
    beside: Mapping[str, Mapping[str, Tensor]],
    asked: Mapping[str, Mapping[str, Tensor]],
    advance: Advance,
) -> dict[str, Tensor]:
    prompts, targets, count = batch.prompts, batch.targets(), len(batch)
    clean = answers(prompts, batch.clean, batch.clean_rest)
    if clean:
        clean["io_probability"] = prompts.probability(batch.clean, batch.clean_rest).cpu()
    found = {f"clean.{name}": values for name, values in clean.items()}
    advance(count)
    for site, edit in edits.items():
        here = {name: x[batch.rows.to(x.device)] for name, x in beside.get(site, {}).items()}
        doses = {
            condition: {"": floors[batch.rows.to(floors.device)]}
            for condition, floors in asked.get(site, {}).items()
        }
        found |= edited_columns(batch, site, edit, targets, here, asked=doses or None)
        advance(count * len([*targets, *here]))
    return found
