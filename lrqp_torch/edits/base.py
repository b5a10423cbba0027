"""What every edit is: a change of activations, outside a model or inside its forward pass."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from lrqp_torch.edits.failures import visible
from lrqp_torch.edits.hub import Shared
from lrqp_torch.edits.provenance import Provenance
from lrqp_torch.edits.record import EditRun, floors_of
from lrqp_torch.errors import (
    SavedEditError,
    WidthError,
    as_numbers,
    by_number,
    check_classes,
    check_option,
    row_classes,
)
from lrqp_torch.probes.covariance import Exact
from lrqp_torch.qp import Solution, native
from lrqp_torch.qp.direct import Line
from lrqp_torch.qp.fused import Laid, StreamRows
from lrqp_torch.qp.reach import Realise
from lrqp_torch.stream.compiled import input_device, require_module
from lrqp_torch.stream.following import Rows
from lrqp_torch.stream.inputs import as_inputs
from lrqp_torch.stream.intervene import EditContext, Editing, Intervention
from lrqp_torch.stream.positions import Positions, Where
from lrqp_torch.stream.repeats import Guards
from lrqp_torch.stream.sites import Site
from lrqp_torch.stream.text import Span

Asked = TypeVar("Asked")
"""How a kind of edit is told what to write: a class, or a class for each of several variables."""
OnInfeasible = Literal["raise", "skip"]


class Edit(Exact, Shared, Generic[Asked]):
    """A change of activations, with a record of what it did to each.

    A kind of edit says how it is solved, in :meth:`solve`; how it is put into a model, read back,
    and passed on is the same for all.

    Attributes:
        on_infeasible: what to do where a target cannot be reached: ``"raise"`` or ``"skip"``.
        provenance: what the edit was fitted on, saved with it and checked by :meth:`at`; None
            where that is not known.
        notes: what was given to :meth:`save`.
        names: the variables that it writes, where they are several.
    """

    certified: ClassVar[bool] = False
    """Whether what :meth:`solve` returns is finite where its status is no failure, and x bit for
    bit where nothing was edited; then the hook in a model does not look again."""

    _line: Line | None = None

    def __init__(self, on_infeasible: OnInfeasible = "raise") -> None:
        super().__init__()
        check_option("on_infeasible", on_infeasible, ("raise", "skip"))
        self.on_infeasible = on_infeasible
        self.notes: dict[str, Any] = {}
        self.provenance: Provenance | None = None
        self.names: tuple[str, ...] = ()

    @abstractmethod
    def solve(
        self,
        x: Tensor,
        target: Asked,
        source: Asked | None = None,
        *,
        realise: Realise | None = None,
        examples: Tensor | None = None,
    ) -> Solution:
        """Edit activations x, (B, d), and return what was done with them.

        ``realise`` says what the model will hold of float64 activations, by default x' in x's
        dtype, and ``examples`` what the rows are called in messages, (B,).
        """

    @property
    @abstractmethod
    def n_classes(self) -> int:
        """How many classes a target may be one of, K."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """What its classes are called, in order, by its probe or its provenance; () if not known.
        A target may be one of them.
        """
        probe, origin = getattr(self, "probe", None), self.provenance
        names = getattr(probe, "classes", None) or (origin and origin.classes) or ()
        return tuple(map(str, names)) if len(names) == self.n_classes else ()

    def by_number(self, classes: Any, what: str, words: Mapping[str, int] | None = None) -> Any:
        """Classes as numbers, where some are given by name; see :func:`.errors.by_number`."""
        if classes is None or isinstance(classes, Tensor | int):
            return classes
        return by_number(classes, self.class_names, what, words)

    def row_classes(self, classes: Any, x: Tensor, what: str) -> Tensor:
        """A class for each row of x, (B,) int64, from one each or for all, by number or name."""
        return row_classes(self.by_number(classes, what), x, self.n_classes, what)

    @property
    def label(self) -> str:
        """What a record says of this edit, besides its numbers."""
        return ", ".join(self.names)

    def forward(
        self, x: Tensor, target: Asked, source: Asked | None = None, **given: Any
    ) -> Tensor:
        """Edited activations, (B, d), in x's dtype; differentiable. See :meth:`solve`.

        Under ``vmap`` and in a compiled graph, where nothing can raise, a row that would have
        raised is NaN; the status of :meth:`solve` says why.
        """
        return visible(self.solve(x, target, source, **given), self.on_infeasible)

    def at(
        self,
        model: nn.Module,
        site: str | Site,
        *,
        positions: Where,
        target: Asked,
        source: Asked | None = None,
        record: bool = True,
        texts: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        **given: Any,
    ) -> Editing[EditRun]:
        """Edit ``model`` at a site in every forward pass within the context.

            with edit.at(model, "L6.mid", positions=s2, target=1 - labels) as run:
                logits = model(**inputs).logits

        Args:
            model: a transformers model; it is not changed. At the sites of
                :meth:`~lrqp_torch.Site.module`, any module.
            site: ``Ln.pre``, ``Ln.mid`` or ``Ln.post``, or any other
                :class:`~lrqp_torch.Site`.
            positions: LongTensor (B,), (B, n) or BoolTensor (B, T), or lists of these; a column of
                each text, a slice of them, ``"last"``, a word's (:class:`~lrqp_torch.Span`), or a
                function of the model's inputs; or, around ``model.generate``, ``"prompt"``,
                ``"generated"``, ``"all"`` or a :class:`~lrqp_torch.Scope`.
            target: class to write, by number or name: one for all, (B,) one an example, or the
                shape of positions. Of several variables: variable to class, each in one of these
                shapes, or a tensor with the variables as a last axis.
            source: class that holds now, in the same shapes; default the probe's own reading.
            record: whether to keep what the edit did to each token, some 100 bytes a token.
            texts: what the model is to be run on, in which positions are then found:
                ``model(**run.inputs)``.
            tokenizer: the model's own, which reads the texts.
            given: what else this kind of edit is given, such as ``parameters``.

        Yields:
            An :class:`~lrqp_torch.EditRun` that records what the edit did.

        Raises:
            ProvenanceError: the edit was fitted on a model of another family or size.
        """
        require_module(model)
        inputs: Mapping[str, Tensor] | None = None
        if texts is not None:
            inputs = as_inputs(model, texts, tokenizer).to(input_device(model))
            positions = positions(inputs) if isinstance(positions, Span) else positions
        item = self.on(
            site, positions=positions, target=target, source=source, record=record, **given
        )
        run = cast(EditRun, item.edit)
        run.inputs = inputs
        if self.provenance is not None:
            self.provenance.check(model, site)
        run.checked = True
        return Editing(model, item, EditRun)

    def on(
        self,
        site: str | Site,
        *,
        positions: Where,
        target: Asked,
        source: Asked | None = None,
        record: bool = True,
        **given: Any,
    ) -> Intervention:
        """The same edit as an item for :func:`~lrqp_torch.intervene`, to apply several at once."""
        where = Positions.parse(positions)
        run = EditRun(self, where, target, source, record)
        run.given = self.bind(run, **given)
        return Intervention(site, where, run)

    def bind(self, run: EditRun, **given: Any) -> dict[str, Any]:
        """What :meth:`solve` is given at every position besides its classes, checked beforehand."""
        if given:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(given)} in a model")
        return {}

    def edit_rows(
        self, x: Tensor, target: Tensor, source: Tensor | None, context: EditContext, **given: Any
    ) -> Solution:
        """:meth:`solve` for rows that ``context`` numbers: what the hook in a model calls."""
        solve: Callable[..., Solution] = self.solve
        return solve(x, target, source, realise=context.realise, examples=context.example, **given)

    def edit_stream(
        self, rows: StreamRows, target: Tensor, source: Tensor | None, **given: Any
    ) -> tuple[Tensor, Laid | None] | None:
        """:meth:`edit_rows` and what surrounds it in one launch; None where there is no such thing.

        Args:
            rows: to edit, and where to record them.
            target: classes of all positions, of one request each, or one for all.
            source: likewise, or None.
            given: see :meth:`bind`.

        Returns:
            What is written of the stream, with edited rows in place; and the launch, where it may
            be done again as long as :meth:`made_of` stays what it is.
        """
        return None

    def made_of(self) -> tuple[tuple[Tensor | None, ...], tuple[object, ...]] | None:
        """The tensors that the edit is made of, and what else; None where that is not all."""
        return None

    def note_parts(self, look: Guards) -> None:
        """Look up all that :meth:`line` does, for compiled code to see that it is there still."""

    def asked_at(self, asked: Any, rows: EditContext | Rows | StreamRows) -> Tensor:
        """Log α as :meth:`solve` is given it, of rows within a model; see :meth:`bind`."""
        return floors_of(asked, rows)

    def line(self) -> Line | None:
        """What does :meth:`edit_stream` on the CPU, the same for as long as nothing of the edit
        changes; None where there is no such thing.
        """
        return None

    def _own_line(self) -> Line | None:
        """What edits on the CPU by one call each, kept for as long as nothing of it changes."""
        made, line = self.made_of(), self._line
        if made is None:
            return None
        parts, own = made
        if line is not None and line.holds(parts, own):
            return line if native.library() is not None else None
        vars(self)["_line"] = line = self._new_line(parts, own)
        return line

    def _new_line(self, parts: tuple[Tensor | None, ...], own: tuple[object, ...]) -> Line | None:
        """See :meth:`_own_line`; None where there is no such thing."""
        return None

    def place(self, classes: Asked, what: str, positions: Positions) -> Tensor:
        """The classes for each position, (N,), or (N, V) of V variables, checked.

        Args:
            classes: as given to :meth:`on`.
            what: ``"target"`` or ``"source"``.
            positions: where.

        Raises:
            TargetError: another shape or dtype, or out of range.
        """
        placed = positions.classes(self.by_number(classes, what), what)
        check_classes(placed, placed.shape[0], self.n_classes, what)
        return placed

    def unreachable(self, target: Tensor, which: str) -> str:
        """What to say where no activation reaches the target.

        Args:
            target: what was asked of the examples, (n,) or (n, V).
            which: how many they are, and the first of them.
        """
        return f"no activation reaches the target for {which}"

    def save(self, path: str | Path, **notes: Any) -> Path:
        """Write the edit to a folder.

        Args:
            path: the folder; made if it is missing, its edit replaced if it has one.
            notes: anything that JSON can hold, such as ``site="L6.mid"``; read back in ``notes``.

        Raises:
            OutputError: the folder cannot be written, or the notes are not JSON.
            SavedEditError: an edit of a kind that cannot be saved.
        """
        return self._write(Path(path), {**self.notes, **notes})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> Self:
        """Read an edit that :meth:`save` wrote. Nothing is executed.

        Raises:
            SavedEditError: missing, damaged, foreign, of a newer format, or holding NaN.
            SolverError: it was saved with a solver that is not installed here.
        """
        with torch.inference_mode(False):
            edit = cls._read(Path(path))
        return edit.to(device) if device is not None else edit

    def _write(self, folder: Path, notes: dict[str, Any]) -> Path:
        raise SavedEditError(
            f"{type(self).__name__} cannot be saved; LRQP and JointLRQP can, and what else an edit "
            f"was built from"
        )

    @classmethod
    def _read(cls, folder: Path) -> Self:
        raise SavedEditError(f"{cls.__name__} is not an edit that can be saved or loaded")


def as_floors(asked: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Log α as given: one number, or one for each activation (and variable), of this shape.

    Raises:
        WidthError: another shape.
    """
    if isinstance(asked, float | int):
        # A fill needs no copy from the host, for which a GPU would stop.
        return torch.full(shape, asked, dtype=torch.float64, device=device)
    floors = as_numbers(asked, "asked").to(device, torch.float64)
    if floors.ndim and floors.shape != shape:
        raise WidthError(
            f"asked must be one number or {shape}, one for each activation, got "
            f"{tuple(floors.shape)}"
        )
    return floors.expand(shape)
