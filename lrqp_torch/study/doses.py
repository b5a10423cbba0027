"""How much belief an edit asks for: so many nats, or what the data say.

Ten nats are another dose at every site, with every penalty and every number of prompts: a probe's
logits grow with all of them. What the probe reads of real activations grows with it:

* ``nats``: log α by the edit's own rule, as in the post;
* ``twin``: until the probe reads of the edited prompt what it reads of the prompt's twin, which
  differs in the variable alone: the edit then writes what the interchange writes, no more;
* ``class``: until it reads what it reads of the median training prompt of the target class.
"""

from typing import Literal, get_args

from torch import Tensor

from lrqp_torch.errors import SettingError, quoted
from lrqp_torch.probes.linear import LinearProbe

Dose = Literal["nats", "twin", "class"]
DOSES: tuple[Dose, ...] = get_args(Dose)


def check_dose(dose: str) -> None:
    """Refuse a dose that does not exist.

    Raises:
        SettingError: it does not.
    """
    if dose not in DOSES:
        raise SettingError(f"dose must be one of {', '.join(DOSES)}, not {quoted(dose)}.")


def class_readings(probe: LinearProbe, x: Tensor, labels: Tensor) -> Tensor:
    """Median log odds that a probe reads of each class on its own activations, (K,) float64.

    Args:
        probe: of K classes.
        x: activations, (n, d).
        labels: their classes, (n,); every class must occur.
    """
    own = probe.log_odds(x, labels).double()
    return own.new_tensor([own[labels == k].median() for k in range(probe.n_classes)])


def asked_of(
    dose: str, probe: LinearProbe, target: Tensor, twin: Tensor, x: Tensor, labels: Tensor
) -> Tensor:
    """The log α of each edit, (m,) float64 in nats; NaN for ``nats``, the edit's own rule.

    Args:
        dose: one of :data:`DOSES`.
        probe: what the edit writes.
        target: the class it writes, (m,).
        twin: activations of twins, of a control edit the prompts' own, (m, d).
        x: training activations, (n, d).
        labels: their classes, (n,).
    """
    if dose == "class":
        return class_readings(probe, x, labels)[target]
    own = probe.log_odds(twin, target).double()
    return own if dose == "twin" else own * float("nan")
