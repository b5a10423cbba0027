"""Where a variable of your own can be read, and where editing it changes what the model says.

At each site a probe and a covariance are fitted to the activations at the marked position. On
held-out prompts the activation is then replaced by the nearest one at which the probe believes the
class that holds (control) or the next one (counterfactual), and the model goes on from there. If
the counterfactual edit flips the answer, the model *uses* the variable at that site; a probe's
accuracy tells only that it is *knowable* there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.provenance import package_versions
from lrqp_torch.errors import PromptError
from lrqp_torch.probes.covariance import Shrinkage
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.stream.capture import capture
from lrqp_torch.stream.compiled import input_device
from lrqp_torch.study.clock import Clock
from lrqp_torch.study.context import Advance, no_progress
from lrqp_torch.study.flipping import CONDITIONS, fit_edits, sweep_runs
from lrqp_torch.study.preparing import choose_sites, describe_model
from lrqp_torch.study.prompts import PromptSet
from lrqp_torch.tasks.fitting import require_classes, require_every_class
from lrqp_torch.tasks.results import (
    Condition,
    Mean,
    Share,
    TaskResults,
    TaskSite,
    columns_of,
    strongest,
)
from lrqp_torch.tasks.splitting import majority_share
from lrqp_torch.tasks.sweep import sweep

Start = Callable[[str, int], Advance]
"""Called with the name of a stage and its units of work; returns what to call as they are done."""


def no_stages(title: str, total: int) -> Advance:
    """The default of ``start``."""
    return no_progress


def study(
    model: Any,
    train: PromptSet,
    test: PromptSet,
    sites: str | Sequence[str] = "all",
    *,
    l2: float | None = None,
    shrinkage: Shrinkage = "ledoit_wolf",
    log_odds: float = 10.0,
    batch_size: int = 64,
    seed: int = 0,
    name: str | None = None,
    start: Start = no_stages,
    **settings: Any,
) -> TaskResults:
    """Study a variable of your own.

        results = tasks.study(model, train, test, ["L6.mid", "L7.mid"])
        results.used_sites, results.sites["L6.mid"].counterfactual.flipped

    Args:
        model: a transformers causal language model in evaluation mode.
        train: prompts to fit on.
        test: prompts held out, with the same classes, padded on the left. Without answers the
            effect is measured by how much the next token changes, and no site counts as used.
        sites: names, or ``"all"`` for every pre and mid.
        l2: penalty of the probe; default its own.
        shrinkage: of the covariance.
        log_odds: least log odds of the ``mirror`` rule, in nats.
        batch_size: prompts a forward pass.
        seed: of the shuffled labels and the bootstrap.
        name: of the model in the results; default its own.
        start: shows progress.
        settings: anything else that JSON can hold, kept with the results.

    Raises:
        SiteError, UnknownFamilyError: no such site in this model.
        PromptError: a class without prompts to fit on, a text on both sides, other classes held
            out, or prompts that are not padded on the left.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    _check(train, test)
    chosen = choose_sites(model, sites if isinstance(sites, str) else ",".join(sites))
    clock = Clock()
    with clock.stage("capture"):
        advance = start("reading activations", len(train) + len(test))
        found, held_out = (
            capture(
                model,
                part.inputs,
                chosen,
                positions=part.position,
                batch_size=batch_size,
                progress=advance,
            )
            for part in (train, test)
        )
    device = input_device(model)
    labels = train.labels.to(device)
    with clock.stage("fit"):
        advance = start("fitting probes", 2 * len(chosen))
        edits = fit_edits(
            found, labels, l2=l2, shrinkage=shrinkage, log_odds=log_odds, advance=advance
        )
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        mixed = labels[order.to(device)]
        shuffled = LinearProbe.fit_many(
            {site: (x, mixed) for site, x in found.items()}, l2=l2, advance=advance
        )
    with clock.stage("sweep"):
        runs = -(-len(test) // batch_size) * sweep_runs(len(edits))
        flat = sweep(model, test, edits, batch_size=batch_size, advance=start("editing", runs))
    right = flat["clean.own_lead"] > 0 if "clean.own_lead" in flat else None
    summary = {
        site: _summarise(edits[site], shuffled[site], held_out[site], flat, site, right, seed)
        for site in chosen
    }
    return TaskResults(
        settings=settings
        | {
            "sites": ",".join(chosen),
            "seed": seed,
            "log_odds": log_odds,
            "l2": l2,
            "shrinkage": shrinkage,
            "batch_size": batch_size,
        },
        model=describe_model(model, name or str(getattr(model.config, "_name_or_path", "model"))),
        classes=train.classes,
        data={"train": len(train), "test": len(test)},
        majority=majority_share(train.labels.tolist(), test.labels.tolist()),
        answered=None if right is None else Share.that(right),
        preference=None if right is None else Mean.of(flat["clean.preference"], seed),
        sites=summary,
        used_sites=[site for site, result in summary.items() if result.used],
        best_site=strongest(summary),
        versions=package_versions(),
        elapsed=clock.seconds(),
        prompts=flat,
        texts=test.prompts,
    )


def _summarise(
    edit: LRQP,
    shuffled: LinearProbe,
    x: Tensor,
    flat: Mapping[str, Tensor],
    site: str,
    right: Tensor | None,
    seed: int,
) -> TaskSite:
    def reads(probe: LinearProbe) -> Share:
        return Share.that(probe(x).argmax(-1).cpu() == flat["labels"])

    control, counterfactual = (
        Condition.of(columns_of(flat, f"{site}.{condition}"), right, seed)
        for condition in CONDITIONS
    )
    return TaskSite(reads(edit.probe), reads(shuffled), control, counterfactual)


def _check(train: PromptSet, test: PromptSet) -> None:
    require_every_class(train)
    require_classes(test, train.classes, "the prompts to fit on have")
    both = set(train.prompts) & set(test.prompts)
    if both:
        raise PromptError(
            f"{len(both)} texts are both fitted on and held out, such as {min(both)!r}; divide the "
            f"prompts with tasks.split"
        )
