"""What the penalty of the probe does to its edits: of the weights as they are, or standardised.

    python -m benchmarks.penalties --model smollm2 --n 1000 --prefixes FILE --sites L17.mid,L18.mid
    python -m benchmarks.penalties --model smollm2 --data FILE,FILE --penalties default

At each site the order of two names, or the class of prompts of one's own, is read by probes of
several penalties, fitted to activations as they are and to standardised ones, and written by the
least edit, dosed by nats and by the twin. Each edit is held against the activation of the prompt's
twin, or, where no prompt has one, of a prompt to fit on of the class that is written.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.study import ceiling
from lrqp_torch.study.doses import asked_of
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.methods import drawn
from lrqp_torch.study.preparing import prepare
from lrqp_torch.study.running import Trials, displacements
from lrqp_torch.study.settings import Settings

PENALTIES: tuple[float | None, ...] = (1e-4, None, 1.0)
"""None is the default, 1/n."""
EFFECTS = ("flipped", "recovered", "agreement", "kl", "length")
COLUMNS = ("site", "standardised", "l2", "dose", "accuracy", *EFFECTS)


@torch.no_grad()
def rows_of(
    settings: Settings, penalties: Sequence[float | None] = PENALTIES
) -> Iterator[dict[str, Any]]:
    """One row an edit: what it does, over the held-out prompts."""
    context = prepare(settings)
    task = context.task
    fit, x = (
        context.activations(task, split, "mark", context.sites) for split in ("train", "test")
    )
    labels, own, target = (
        values.to(context.device)
        for values in (task.train.labels, task.test.labels, task.test.other)
    )
    found = context.twins(task)
    if found is None:
        found = drawn(context, context.sites, target), torch.ones(len(target), dtype=torch.bool)
    twins, known = found
    trials, made = Trials(context, task.test), []
    for site in context.sites:
        metric = Mahalanobis.fit(fit[site], settings.shrinkage)
        moved = twins[site].double() - x[site].double()
        patch = trials.add(site, moved)
        seen = {"distance": metric.distance(moved).cpu()}
        for standardised, l2 in product((False, True), penalties):
            probe = LinearProbe.fit_many(
                {site: (fit[site], labels)}, l2=l2, standardise=standardised
            )[site]
            edit = LRQP(probe, metric, log_odds=settings.log_odds, on_infeasible="skip")
            right = Estimate.share((probe(x[site]).argmax(-1) == own).cpu(), task.test.groups)
            for dose in ("nats", "twin"):
                by_twin = asked_of("twin", probe, target, twins[site], fit[site], labels)
                asked = by_twin if dose == "twin" else None
                delta = displacements(edit, x[site], target, own, asked)
                what = site, standardised, l2 or f"1/{len(labels)}", dose, right
                length = {"distance": metric.distance(delta).cpu()}
                made.append((what, trials.add(site, delta, patch), length, patch, seen))
    trials.run()
    clean = trials.clean.found
    for what, trial, length, patch, seen in made:
        each = trial.found | length, patch.found | seen
        like = ceiling.likenesses(clean, {0: each}, trials.sample.among(known))[0]
        edit = ceiling.interchange_of(
            clean,
            each[0] | {"divergence": each[0]["kl_to_interchange"]},
            trials.sample.among(known),
        )
        found = edit.flipped, like["recovered"], like["agreement"], like["kl_to_interchange"]
        values = (*what, *found, edit.distance)
        yield {
            name: [value.value, value.lower, value.upper] if isinstance(value, Estimate) else value
            for name, value in zip(COLUMNS, values, strict=True)
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.penalties", description=__doc__)
    add = parser.add_argument
    add("--model", default="organism")
    add("--n", type=int, default=400, help="prompts, half of them held out")
    add("--prefixes", default="none")
    add("--data", default="", help="files of prompts of one's own in their place, with commas")
    add("--penalties", default="all", help="all, or default")
    add("--sites", default="L3.pre")
    add("--seeds", default="0", help="one run each, with commas")
    add("--device", default="auto")
    add("--batch-size", type=int, default=64)
    add("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    settings = Settings(
        options.model,
        Path(),
        n=options.n,
        prefixes=options.prefixes,
        sites=options.sites,
        device=options.device,
        batch_size=options.batch_size,
        compare_task=False,
    )
    rows = []
    penalties = (None,) if options.penalties == "default" else PENALTIES
    for seed, data in product(map(int, options.seeds.split(",")), options.data.split(",")):
        named = {"data": Path(data).stem} if data else {}
        for row in rows_of(replace(settings, seed=seed, data=data or None), penalties):
            rows.append({"seed": seed, **named, **row})
            print("  ".join(_shown(name, value) for name, value in rows[-1].items()), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def _shown(name: str, value: Any) -> str:
    if isinstance(value, list):
        return f"{name} {value[0]:.3f}"
    return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"


if __name__ == "__main__":
    main()
