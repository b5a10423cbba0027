"""What baselines are built from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import LabelError, WidthError, as_classes, check_finite

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(logits, rows)``: logits (b, T, V) of training prompts ``rows`` (b,) → losses, (b,)."""


@dataclass(frozen=True)
class Behaviour:
    """A frozen model, its training prompts, and what it should say once they are edited.

    Attributes:
        model: a transformers causal language model; it is not changed.
        inputs: arguments of its forward, one row a training prompt.
        site: such as ``"L6.mid"``.
        positions: the column edited in each prompt, LongTensor (n,).
        loss: of the edited model's logits; see :data:`Loss` and :func:`answer_loss`.
        batch_size: prompts a forward pass.
        rerun: gives the logits of training prompts ``rows`` (b,) under the edits that are open, for
            the loss to read; default the whole forward pass, (b, T, V). A rerun of the layers above
            the site alone, such as :meth:`lrqp_torch.stream.replay.Tail.run`, is cheaper.
    """

    model: nn.Module
    inputs: Mapping[str, Tensor]
    site: str
    positions: Tensor
    loss: Loss
    batch_size: int = 32
    rerun: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class BaselineData:
    """All that any baseline may need, for one site.

    Attributes:
        x: training activations at the site, (n, d).
        y: their classes, (n,); numbers, or names that the reference's probe knows.
        reference: the LRQP that the baselines stand beside: its probe, metric and odds rule.
        paired: for each training prompt the activation of its counterfactual prompt, (n, d).
        behaviour: for the methods that are trained through the model.
        seed: for what is drawn at random.
    """

    x: Tensor
    y: Any
    reference: LRQP
    paired: Tensor | None = None
    behaviour: Behaviour | None = None
    seed: int = 0


def answer_loss(columns: Tensor, tokens: Tensor) -> Loss:
    """Cross-entropy of the wanted next token, in nats: −log P(token | prompt up to its column).

    Args:
        columns: where each training prompt's answer is read, (n,), columns of the padded input.
        tokens: the token wanted there once the prompt is edited, (n,).
    """

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        at = columns.to(rows.device)[rows].to(logits.device)
        wanted = tokens.to(rows.device)[rows].to(logits.device)
        read = logits[torch.arange(len(at), device=logits.device), at]
        wide = read.to(torch.promote_types(read.dtype, torch.float32))
        return nn.functional.cross_entropy(wide, wanted, reduction="none")

    return loss


def check_examples(x: Tensor, y: Any, reference: LRQP) -> tuple[Tensor, Tensor]:
    """Activations in float64, (n, d), and labels, (n,), of which every class occurs twice.

    Raises:
        WidthError: activations of another width than the reference's.
        NonFiniteError: NaN or infinity in them.
        LabelError: labels that do not fit, or a class with fewer than two examples.
        TargetError: a name that is no class of the reference.
    """
    width, n_classes = reference.probe.width, reference.probe.n_classes
    if x.ndim != 2 or x.shape[1] != width or not x.dtype.is_floating_point:
        raise WidthError(
            f"activations must be floating (n, {width}) as the reference probe reads, got "
            f"{x.dtype} {tuple(x.shape)}"
        )
    y = as_classes(reference.by_number(y, "labels"), "labels").to(x.device)
    if y.shape != x.shape[:1] or y.dtype.is_floating_point:
        raise LabelError(f"labels must be ({len(x)},) integers, got {y.dtype} {tuple(y.shape)}")
    check_finite(x)
    labels = y.long()
    if bool(((labels < 0) | (labels >= n_classes)).any()):
        raise LabelError(f"labels must lie in 0 to {n_classes - 1}, the reference probe's classes")
    counts = torch.bincount(labels, minlength=n_classes)
    if bool((counts < 2).any()):
        few = (counts < 2).nonzero().flatten()[:10].tolist()
        raise LabelError(f"classes {few} have fewer than two examples; give more prompts")
    return x.detach().double(), labels


def class_means(x: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Mean activation of each class, (K, d)."""
    return torch.stack([x[labels == k].mean(0) for k in range(n_classes)])
