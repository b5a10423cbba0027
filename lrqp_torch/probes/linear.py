"""The linear probe: multinomial logistic regression, fitted to its optimum."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lrqp_torch.distributed.ranks import Ranks
from lrqp_torch.errors import (
    LabelError,
    LRQPError,
    NonFiniteError,
    TargetError,
    WidthError,
    as_numbers,
    concrete,
    quoted,
)
from lrqp_torch.probes.fitting import (
    BATCH,
    Batches,
    ClassWeight,
    FitReport,
    Fitted,
    Options,
    Passes,
    Problem,
    fit_in_memory,
    fit_passes,
    named,
    read_labels,
)
from lrqp_torch.probes.judging import check_sinks, judge, split
from lrqp_torch.probes.multinomial import ALONE

Key = TypeVar("Key", bound=Hashable)


def as_probe(layer: nn.Linear) -> "LinearProbe":
    """A probe as it is, another linear layer by :meth:`LinearProbe.from_linear`."""
    if not isinstance(layer, LinearProbe):
        return LinearProbe.from_linear(layer)
    _check_affine(layer)
    return layer


@torch.no_grad()
def _check_affine(layer: nn.Linear) -> None:
    """Raise :class:`WidthError` unless a layer computes W x + b, with the W and b that it holds."""
    if is_lazy(layer.weight):
        raise WidthError("the probe is a lazy layer that was never run: run it on activations once")
    weight, bias = layer.weight, layer.bias
    own = type(layer).forward in (nn.Linear.forward, LinearProbe.forward)
    changed = not own or "forward" in vars(layer)
    if not (changed or layer._forward_hooks or layer._forward_pre_hooks):
        return
    if not concrete(weight) or not bool(weight.isfinite().all()):
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    given = layer(x)
    size, close = float(wanted.abs().max()), 64 * torch.finfo(weight.dtype).eps
    alike = isinstance(given, Tensor) and given.shape == wanted.shape
    if not alike or not bool(((given.double() - wanted).abs() <= close * size).all()):
        raise WidthError(
            f"the probe, a {type(layer).__name__}, does not compute weight · x + bias with its own "
            f"weight and bias: it has a forward or hooks that do something else, of which an edit "
            f"would know nothing; give the weights that it reads by to LinearProbe.from_weights"
        )


class ReadInBatches(Protocol):
    """Activations (n, d) that are read a batch at a time, such as those of an activation store."""

    def batches(self, rows: int, /) -> Iterator[Tensor]:
        """All rows in order, at most so many at a time; anew with every call."""


class LinearProbe(nn.Linear):
    """A linear probe z(x) = W x + b over K classes: an ``nn.Linear`` from d to K.

    Args:
        width: d, the width of the activations.
        n_classes: K ≥ 2.
        device: where the weights live.
        dtype: their dtype; default float32.

    Attributes:
        report: how it was fitted; None if it was not.
        classes: names of the classes in order, where labels were given by name; else None.
    """

    report: FitReport | None = None
    classes: tuple[str, ...] | None = None

    def __init__(
        self,
        width: int,
        n_classes: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if n_classes < 2:
            raise LabelError(f"a probe needs at least 2 classes, got {n_classes}")
        super().__init__(width, n_classes, device=device, dtype=dtype)

    @property
    def width(self) -> int:
        """The width d of the activations that the probe reads."""
        return self.in_features

    @property
    def n_classes(self) -> int:
        """K."""
        return self.out_features

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> Self:
        """A copy of a linear layer as a probe, frozen, in its dtype but not below float32.

        Without a bias, b = 0. A layer with one output w x + b is that of a sigmoid, whose classes
        are 0 and 1: z = (0, w x + b).

        Raises:
            WidthError: not a linear layer, or one whose forward is another than W x + b.
            NonFiniteError: NaN or infinity in its weights.
        """
        given: Any = layer
        if not isinstance(given, nn.Linear):
            parts = given.named_modules() if isinstance(given, nn.Module) else ()
            linear = [name for name, part in parts if isinstance(part, nn.Linear)]
            alone = len(linear) == 1
            inner = f". Its linear layer alone is .get_submodule({linear[0]!r})" if alone else ""
            raise WidthError(
                f"a probe must be an nn.Linear from activations to logits, got "
                f"{type(given).__name__}; for weights of other kinds use LinearProbe.from_weights, "
                f"which also folds in a standardisation (mean, scale)" + inner
            )
        _check_affine(layer)
        return cls.from_weights(layer.weight, layer.bias)

    @classmethod
    def from_weights(
        cls,
        coef: Any,
        intercept: Any = None,
        mean: Any = None,
        scale: Any = None,
        *,
        classes: Sequence[str] | None = None,
    ) -> Self:
        """A frozen probe from weights that were fitted elsewhere, as tensors or arrays.

            z(x) = coef (x − mean) / scale + intercept

        The standardisation is folded into the weights, in float64; they are stored in the dtype of
        ``coef``, but not below float32. In scikit-learn's terms: ``coef_`` and ``intercept_`` of a
        linear classifier, ``mean_`` and ``scale_`` of a ``StandardScaler`` in front of it.

        Args:
            coef: (K, d); or (1, d) or (d,), of the log odds of class 1 against class 0.
            intercept: (K,), or for one row (1,) or a number; default 0.
            mean: what is subtracted first, (d,) or a number; default 0.
            scale: what is then divided by, (d,) or a number; default 1.
            classes: names of the classes in order.

        Raises:
            WidthError: shapes that do not fit together, or no floating-point numbers.
            NonFiniteError: NaN or infinity, also as the result of a scale of 0.
            LabelError: another number of names than of classes.
        """
        given = as_numbers(coef, "coef").detach()
        weight = torch.atleast_2d(given.double())
        n_rows, width = weight.shape[0], weight.shape[-1]
        shapes = {"intercept": (n_rows,), "mean": (width,), "scale": (width,)}
        values = {"intercept": intercept, "mean": mean, "scale": scale}
        if weight.ndim != 2 or 0 in weight.shape or given.is_complex():
            raise WidthError(f"coef must be (K, d), got {given.dtype} {tuple(given.shape)}")
        found = {}
        for name, shape in shapes.items():
            value = 1.0 if name == "scale" else 0.0
            tensor = as_numbers(value if values[name] is None else values[name], name).detach()
            if tensor.numel() != 1 and tensor.shape != shape:
                raise WidthError(
                    f"{name} must be {shape} for coef {tuple(weight.shape)}, got "
                    f"{tuple(tensor.shape)}"
                )
            found[name] = tensor.to(weight).flatten().expand(shape)
        weight = weight / found["scale"]
        bias = found["intercept"] - weight @ found["mean"]
        if not bool(weight.isfinite().all() and bias.isfinite().all()):
            raise NonFiniteError(
                "the probe's weights are NaN or infinite; look at coef, intercept and mean, and "
                "for zeros in scale"
            )
        if n_rows == 1:
            weight = torch.cat([torch.zeros_like(weight), weight])
            bias = torch.cat([torch.zeros_like(bias), bias])
        if classes is not None and len(classes) != len(weight):
            raise LabelError(f"{len(classes)} names were given for {len(weight)} classes")
        names = None if classes is None else tuple(map(str, classes))
        return cls._frozen(weight, bias, like=given.dtype, classes=names)

    @classmethod
    def fit(
        cls,
        x: Any,
        y: Any,
        *,
        l2: float | None = None,
        n_classes: int | None = None,
        sample_weight: Any = None,
        class_weight: ClassWeight | None = None,
        held_out: float | tuple[Any, Any] | None = None,
        seed: int = 0,
        standardise: bool = False,
        tolerance: float = 1e-8,
        max_iterations: int = 200,
    ) -> Self:
        """Fit to the optimum of the L2-penalised multinomial likelihood.

            minimise  (1/n) Σ_i ω_i (−log softmax(W x_i + b)[y_i])  +  (l2/2) ‖W‖²_F,   n = Σ_i ω_i

        The bias is not penalised. The problem is strictly convex in W, so the optimum is one
        point however the data look, separable ones and n < d included. Solved in float64 on x's
        device by a Newton–conjugate-gradient method; the weights are then stored in float32 (in
        float64 when x is), frozen: call ``requires_grad_()`` to train them further.

        Args:
            x: activations, (n, d), a tensor or an array; or stored ones, which are then read as by
                :meth:`fit_batches`.
            y: class of each, (n,), integers from 0, or bool; or names, which are numbered in
                alphabetical order and kept in ``classes``.
            l2: penalty on W; default 1/n, which is the usual C = 1.
            n_classes: K; default the largest label + 1. Every class must occur.
            sample_weight: ω, (n,); default 1 each. An example of weight 2 is one given twice.
            class_weight: by class, what ω is multiplied by: K numbers, some by number or name, or
                ``"balanced"``, n / (K n_k).
            held_out: what to report the accuracy on: examples (x, y), or a share of each class. In
                that case a second probe, fitted to the others, is asked; this one is fitted to all.
            seed: of that random share.
            standardise: whether the penalty is on the weights of standardised activations,
                (l2/2) Σ_j s_j² ‖W_j‖² with s_j the standard deviation of coordinate j, so that it
                does not depend on the units of a coordinate; folded into W and b. Not of stored
                activations.
            tolerance: bound on the gradient norm, relative to the one at zero.
            max_iterations: Newton steps before giving up.

        Warns:
            ProbeWarning: few activations for their width, classes of very different size and, in
                memory, an accuracy of chance, or a few activations or coordinates whose size dwarfs
                the others.

        Raises:
            WidthError: shapes that do not fit.
            NonFiniteError: NaN or infinity in x.
            LabelError: one class only, a class without examples, fewer examples than classes, or
                weights that do not fit.
            ConvergenceError: the gradient norm was not reached.
        """
        options = Options(l2, tolerance, max_iterations, standardise)
        share = held_out if isinstance(held_out, int | float) else None
        pair = held_out if isinstance(held_out, tuple | list) else None
        if not isinstance(x, Tensor) and hasattr(x, "batches"):
            if share is not None:
                raise LabelError("of stored activations no share can be held out; give (x, y)")
            if standardise:
                raise LabelError("stored activations cannot be standardised; give a tensor")
            numbers, classes = read_labels(y)
            batches = _in_order(x, numbers, sample_weight)
            data = Passes(batches, n_classes, class_weight, classes=classes)
            probe, accuracy = cls._streamed(data, options), None
        else:
            problem = Problem.of(x, y, sample_weight, n_classes, class_weight)
            check_sinks(problem.x)
            probe = cls._in_memory({"probe": problem}, options)["probe"]
            accuracy = probe.accuracy(problem.x, problem.labels)
        if share is not None:
            rest, kept = split(problem, share, seed)
            (other,) = cls._in_memory({"probe of the others": rest}, options).values()
            probe._score(other.accuracy(kept.x, kept.labels), len(kept.x))
        elif pair is not None:
            probe._score(probe.accuracy(*pair), len(pair[0]))
        probe._judge(accuracy)
        return probe

    @classmethod
    def fit_many(
        cls,
        problems: Mapping[Key, tuple[Any, ...]],
        *,
        l2: float | None = None,
        class_weight: ClassWeight | None = None,
        standardise: bool = False,
        tolerance: float = 1e-8,
        max_iterations: int = 200,
        memory: int = 2**32,
        advance: Callable[[int], object] | None = None,
        ranks: Ranks = ALONE,
    ) -> dict[Key, Self]:
        """Fit many probes at once, each to the optimum that :meth:`fit` finds, without warnings.

            probes = LinearProbe.fit_many({site: (x, labels) for site, x in activations.items()})

        Several label sets on the same tensor share its first factorisation, and activations of one
        shape are stacked on a GPU, in float64. A probe that has reached its optimum
        leaves the stack. Widths, numbers of examples and of classes may differ.

        Over many ranks, each fits some of the probes, and all of them are on each. Label sets on
        the same activations stay on one rank, which factorises them once.

        Args:
            problems: name of a probe to its activations (n, d), classes (n,) and, if wanted,
                weights (n,); the same on all ranks.
            memory: bytes of float64 working copies to hold at once, never less than one tensor's.
                On a CPU one tensor is worked on at a time, whatever this says.
            advance: called with the number of probes fitted here, after each stack.
            ranks: this process among the others.

        The other arguments are those of :meth:`fit`, with 1/n by each probe's own n.

        Returns:
            Name to probe, in the order given.

        Raises:
            WidthError, NonFiniteError, LabelError, ConvergenceError: as :meth:`fit`, beginning
                with the name of the probe; of many ranks, on the first that fits such a probe.
            ToldError: on the other ranks.
        """
        options = Options(l2, tolerance, max_iterations, standardise)

        def fit(some: list[list[Key]]) -> dict[Key, Self]:
            checked: dict[Key, Problem] = {}
            for name in (name for names in some for name in names):
                x, y, weights = (*problems[name], None)[:3]
                try:
                    checked[name] = Problem.of(x, y, weights, class_weight=class_weight)
                except LRQPError as error:
                    raise named(error, name) from error
            return cls._in_memory(checked, options, memory, advance)

        sites: dict[object, list[Key]] = {}
        for name, (x, *_) in problems.items():
            dense = isinstance(x, Tensor) and x.layout == torch.strided
            sites.setdefault(x.data_ptr() if dense else id(x), []).append(name)
        probes: dict[Key, Self] = ranks.divide(list(sites.values()), fit, "cpu")
        devices = {name: getattr(x, "device", "cpu") for name, (x, *_) in problems.items()}
        return {name: probes[name].to(device) for name, device in devices.items()}

    @classmethod
    def fit_batches(
        cls,
        batches: Batches,
        *,
        l2: float | None = None,
        n_classes: int | None = None,
        class_weight: ClassWeight | None = None,
        tolerance: float = 1e-8,
        max_iterations: int = 200,
        device: torch.device | str | None = None,
        ranks: Ranks = ALONE,
    ) -> Self:
        """Fit to data beyond memory: the optimum of :meth:`fit` over all batches together.

        Not stochastic: each evaluation and each product with the Hessian is a pass over all
        batches, some 20 to 60 passes in all. Memory grows with the batch and with d², not with n.

        Over many ranks, each passes over its own batches only. Loss, gradient and products with
        the Hessian are sums over examples, which are added up over the ranks; every rank then takes
        the same step, and gets the same probe bit for bit. The ranks must compute alike, so on
        devices of one kind.

        Args:
            batches: activations (m, d), classes (m,) and, if wanted, weights (m,), that can be gone
                through again and again: a list, a DataLoader, an object whose ``__iter__`` starts
                anew, or a function that returns a new iterator. Every pass must give the same
                examples; their order and their division into batches may change. Of many ranks,
                this one's batches, which may be none.
            device: where to compute; default the device of the first batch.
            ranks: this process among the others.

        The other arguments are those of :meth:`fit`, over the examples of all ranks; not every
        class need occur on each.

        Warns:
            ProbeWarning: as :meth:`fit` for stored activations, on rank 0 only.

        Raises:
            BatchError: an iterator that is exhausted after one pass, batches that are no pairs,
                examples or labels that changed between passes.
            WidthError, NonFiniteError, LabelError, ConvergenceError: as :meth:`fit`.
            ToldError: one of these on another rank, in the first pass.
            RankError: another rank has ended.
        """
        data = Passes(batches, n_classes, class_weight, device, ranks)
        probe = cls._streamed(data, Options(l2, tolerance, max_iterations))
        if ranks.is_main:
            probe._judge(None)
        return probe

    @classmethod
    def _streamed(cls, data: Passes, options: Options) -> Self:
        return cls._frozen(*fit_passes(data, options), like=data.dtype, classes=data.classes)

    @classmethod
    def _in_memory(
        cls,
        problems: Mapping[Key, Problem],
        options: Options,
        memory: int = 0,
        advance: Callable[[int], object] | None = None,
    ) -> dict[Key, Self]:
        """The frozen probes of problems, in their order."""
        found: dict[Key, Fitted] = {}
        for fitted in fit_in_memory(problems, options, memory):
            found |= fitted
            if advance is not None:
                advance(len(fitted))
        return {
            name: cls._frozen(*found[name], like=problem.x.dtype, classes=problem.classes)
            for name, problem in problems.items()
        }

    @classmethod
    def _frozen(
        cls,
        weight: Tensor,
        bias: Tensor,
        report: FitReport | None = None,
        *,
        like: torch.dtype,
        classes: tuple[str, ...] | None = None,
    ) -> Self:
        """The probe of weights (K, d) and biases (K,), in float64 if ``like`` is, else float32.

        Its parameters are ordinary tensors, also under ``torch.inference_mode``.
        """
        dtype = torch.float64 if like == torch.float64 else torch.float32
        with torch.inference_mode(False), torch.no_grad():
            probe = cls(weight.shape[1], weight.shape[0], device=weight.device, dtype=dtype)
            probe.weight.copy_(weight)
            probe.bias.copy_(bias)
        probe.requires_grad_(False)
        probe.report, probe.classes = report, classes
        return probe

    def _judge(self, accuracy: float | None) -> None:
        if self.report is not None:
            judge(self.report, self.width, accuracy)

    def _score(self, accuracy: float, n_samples: int) -> None:
        if self.report is not None:
            self.report = replace(self.report, held_out=accuracy, held_out_samples=n_samples)

    def numbers(self, labels: Any) -> Tensor:
        """Class numbers of labels, which may be names of :attr:`classes`.

        Raises:
            TargetError: a name that the probe does not know.
            LabelError: neither numbers nor names.
        """
        found, names = read_labels(labels)
        if names is None:
            return found
        known = self.classes or ()
        unknown = [name for name in names if name not in known]
        if unknown:
            raise TargetError(
                f"no class is named {quoted(unknown[0])}; "
                + (f"there are {', '.join(known)}" if known else "this probe's have numbers only")
            )
        return found.new_tensor([known.index(name) for name in names])[found]

    def forward(self, input: Tensor) -> Tensor:
        """Logits z(x), (..., K), in the probe's dtype whatever the dtype of the activations."""
        if input.shape[-1] != self.width:
            raise WidthError(
                f"the probe reads width {self.width}, the activations have {input.shape[-1]}"
            )
        with torch.autocast(self.weight.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))

    @torch.no_grad()
    def accuracy(self, x: Any, y: Any) -> float:
        """Share of examples, in tensors or arrays, whose most likely class is y."""
        x, y = as_numbers(x, "activations").to(self.weight.device), self.numbers(y)
        if y.shape != x.shape[:-1]:
            raise TargetError(f"labels must be {tuple(x.shape[:-1])}, got {tuple(y.shape)}")
        return float((self(x).argmax(-1) == y.to(x.device)).double().mean())

    def log_odds(
        self,
        x: Tensor,
        target: Any,
        *,
        against: Literal["strongest", "rest"] = "strongest",
    ) -> Tensor:
        """Log odds of a class at each activation, (...), in nats.

        ``against="strongest"``: log P[t] / max_ℓ P[ℓ] = z_t − max_ℓ z_ℓ over ℓ ≠ t, which is what
        an edit constrains. ``against="rest"``: log P[t] / (1 − P[t]), the total odds, lower by at
        most log(K − 1). For K = 2 they are the same.

        Args:
            x: activations, (..., d).
            target: class t, a number or name, or one per activation.
            against: which odds.

        Raises:
            WidthError: activations of another width.
            TargetError: classes out of range, or of a wrong shape or dtype.
            LRQPError: odds that do not exist.
        """
        if against not in ("strongest", "rest"):
            raise LRQPError(f"against must be 'strongest' or 'rest', got {against!r}")
        logits = self(x)
        target = self.numbers(target).to(logits.device)
        if target.dtype.is_floating_point or target.dtype.is_complex:
            raise TargetError(f"target must hold integer class numbers, got {target.dtype}")
        if target.ndim and target.shape != logits.shape[:-1]:
            raise TargetError(
                f"target must be a number or {tuple(logits.shape[:-1])}, one class per "
                f"activation, got {tuple(target.shape)}"
            )
        target = target.long().expand(logits.shape[:-1])
        if bool(((target < 0) | (target >= self.n_classes)).any()):
            raise TargetError(f"target must lie in 0 to {self.n_classes - 1}")
        own = logits.gather(-1, target.unsqueeze(-1))
        rivals = logits.scatter(-1, target.unsqueeze(-1), float("-inf"))
        rival = rivals.amax(-1) if against == "strongest" else rivals.logsumexp(-1)
        result: Tensor = own.squeeze(-1) - rival
        return result


def _in_order(x: ReadInBatches, labels: Tensor, weights: Any) -> Batches:
    """Stored activations with their labels and weights, batch by batch."""
    columns = [labels] if weights is None else [labels, as_numbers(weights, "sample_weight")]

    def rows() -> Iterator[Sequence[Tensor]]:
        start = 0
        for part in x.batches(BATCH):
            yield part, *(column[start : start + len(part)] for column in columns)
            start += len(part)
        if any(len(column) != start for column in columns):
            raise LabelError(
                f"labels must be ({start},), one per activation, and sample_weight too, got "
                f"{' and '.join(str(len(column)) for column in columns)}"
            )

    return rows
