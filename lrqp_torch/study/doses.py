"""How much belief an edit asks for: so many nats, or what the data say.

Ten nats are another dose at every site, with every penalty and every number of prompts: a probe's
logits grow with all of them. What the probe reads of real activations grows with it:

* ``nats``: log α by the edit's own rule, as in the post;
* ``twin``: until the probe reads of the edited prompt what it reads of the prompt's twin, which
  differs in the variable alone: the edit then writes what the interchange writes, no more;
* ``class``: until it reads what it reads of the median training prompt of the target class.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import SettingError
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.study.context import StudyContext, Task, no_progress

DOSES = ("nats", "twin", "class")


def class_readings(probe: LinearProbe, x: Tensor, labels: Tensor) -> Tensor:
    """Median log odds that a probe of K classes reads of each on its own activations, (K,) float64.

    Activations x (n, d) with classes ``labels`` (n,), of which every one must occur.
    """
    own = probe.log_odds(x, labels).double()
    return own.new_tensor([own[labels == k].median() for k in range(probe.n_classes)])


def asked_of(
    dose: str, probe: LinearProbe, target: Tensor, twin: Tensor, x: Tensor, labels: Tensor
) -> Tensor:
    """The log α of each edit, (m,) float64 in nats; NaN for ``nats``, the edit's own rule.

    ``probe`` is of what the edit writes, ``target`` the class that it writes, (m,), ``twin`` the
    activations of twins, of a control edit the prompts' own, (m, d); x are training activations,
    (n, d), with classes ``labels``, (n,).
    """
    if dose == "class":
        return class_readings(probe, x, labels)[target]
    own = probe.log_odds(twin, target).double()
    return own if dose == "twin" else own * float("nan")


@torch.no_grad()
def asked_at(
    context: StudyContext, task: Task, dose: str, edits: Mapping[str, LRQP]
) -> dict[str, dict[str, Tensor]]:
    """The log α of the control and the counterfactual edit of each held-out prompt, by site.

    Nothing is asked for by ``nats``; a prompt without a twin is dosed by its target class. Raises
    SettingError: ``twin`` where no prompt has one.
    """
    if dose == "nats":
        return {}
    twins = context.twins(task, list(edits)) if dose == "twin" else None
    if dose == "twin" and twins is None:
        raise SettingError("these prompts have no twins to dose by; use --dose class or nats.")
    own, target = (each.to(context.device) for each in (task.test.labels, task.test.other))
    y, found = task.train.labels.to(context.device), dict[str, dict[str, Tensor]]()
    train, test = context.clean(task, "mark", no_progress, list(edits))
    for site, edit in edits.items():
        there = test[site] if twins is None else twins[0][site]
        by, fitted = partial(asked_of, dose, edit.probe), (train[site], y)
        written = by(target, there, *fitted)
        if twins is not None:
            by_class = class_readings(edit.probe, *fitted)[target]
            written = torch.where(twins[1].to(context.device), written, by_class)
        found[site] = {"control": by(own, test[site], *fitted), "counterfactual": written}
    return found
