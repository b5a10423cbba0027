"""What a request asks to be edited, and the edits that a server was started with."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from lrqp_torch.edits.base import Edit
from lrqp_torch.edits.joint import JointLRQP
from lrqp_torch.edits.library import EditLibrary
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.provenance import Provenance
from lrqp_torch.edits.saving import INDEX_FILE, JOINT_FILE, JSON_FILE
from lrqp_torch.errors import (
    LRQPError,
    ProvenanceError,
    RequestError,
    RevisionWarning,
    SavedEditError,
    SiteError,
    quoted,
    warn,
)
from lrqp_torch.files import digest_values, from_json
from lrqp_torch.qp.stacked import FREE, KEEP
from lrqp_torch.stream.sites import Site

FOLDERS_VARIABLE = "LRQP_EDITS"
"""Names the folders of edits in the environment of a server, separated as paths are."""
ARGUMENT = "lrqp"
"""What a request's edits are called among its extra arguments."""
SCOPES = ("prompt", "generated", "all")
KEYS = ("edit", "positions", "scope", "target", "source")
MOST_EDITS = 64
"""So many edits a request may ask for; each is held against all others."""
OWN_READING = FREE
"""As a source class: what the probe reads."""
_WORDS = {"keep": KEEP, "free": FREE}


@dataclass(frozen=True)
class RequestEdit:
    """One edit of a request, with every position and class settled.

    Attributes:
        edit: its name.
        positions: absolute tokens of the request, as given; None for a scope.
        lo: the first token that it may edit.
        hi: the first token behind those that it may edit: [lo, hi) is the scope, if it is one.
        targets: class to write, one a position, or one for a scope. An edit of V variables has V
            for each, one after another, and may hold :data:`KEEP` and :data:`FREE`.
        sources: class that holds now, likewise; −1 is the probe's own reading.
        digest: of all that the edit computes with.
        variables: V; 1 of an :class:`~lrqp_torch.LRQP`.
    """

    edit: str
    positions: tuple[int, ...] | None
    lo: int
    hi: int
    targets: tuple[int, ...]
    sources: tuple[int, ...]
    digest: str
    variables: int = 1

    def at(self, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Targets and sources, (V,) each, of a position by its place in the list; 0 of a scope."""
        part = slice(index * self.variables, (index + 1) * self.variables)
        return self.targets[part], self.sources[part]

    def inside(self, start: int, end: int) -> tuple[Any, ...] | None:
        """What it does to tokens start … end − 1, for a cache's key; None where it does nothing.

        Equal keys mean equal edits, however they were asked for.
        """
        if self.positions is None:
            found = [(p, *self.at(0)) for p in range(max(start, self.lo), min(end, self.hi))]
        else:
            places = enumerate(self.positions)
            found = sorted((p, *self.at(i)) for i, p in places if start <= p < end)
        return (self.digest, tuple(found)) if found else None

    def overlaps(self, other: "RequestEdit") -> int | None:
        """The first token that both edit; None if there is none."""
        lo, hi = max(self.lo, other.lo), min(self.hi, other.hi)
        listed = [set(e.positions) for e in (self, other) if e.positions is not None]
        common = set.intersection(*listed) if listed else range(lo, hi)
        return min((p for p in common if lo <= p < hi), default=None)


def key_of_block(edits: Iterable[RequestEdit], start: int, end: int) -> tuple[Any, ...] | None:
    """What the edits of a request do to tokens start … end − 1; None where nothing is edited.

    Keys and values of a block are those of another only if tokens and this are equal, there and in
    all blocks before.
    """
    inside = sorted(found for edit in edits if (found := edit.inside(start, end)) is not None)
    return tuple(inside) or None


@dataclass(frozen=True)
class NamedEdit:
    """An edit that a server was started with.

    Attributes:
        name: of its folder.
        folder: that it was read from.
        edit: itself.
        site: where it edits.
        digest: of all that it computes with, and of the site.
    """

    name: str
    folder: Path
    edit: LRQP | JointLRQP
    site: Site
    digest: str

    @property
    def stream(self) -> Site:
        """The site, by the one name of those that mean the same stream: ``Ln.post`` is the
        ``pre`` of the next block.
        """
        if self.site.part != "post":
            return self.site
        return replace(self.site, part="pre", layer=self.site.layer + 1)

    @property
    def parts(self) -> dict[str, LRQP]:
        """The edit of each variable; of one alone under its own name."""
        if isinstance(self.edit, LRQP):
            return {self.name: self.edit}
        parts = (part for part in self.edit.edits if isinstance(part, LRQP))
        return dict(zip(self.edit.names, parts, strict=True))

    @classmethod
    def of(cls, folder: Path, edit: LRQP | JointLRQP) -> Self:
        """An edit that was read from a folder.

        Raises:
            SavedEditError: it does not say its site, or says two.
        """
        parts = [edit] if isinstance(edit, LRQP) else [e for e in edit.edits if isinstance(e, LRQP)]
        said = {p.provenance.site for p in parts if p.provenance is not None}
        said |= {e.notes["site"] for e in (edit, *parts) if isinstance(e.notes.get("site"), str)}
        try:
            sites = {Site.parse(name) for name in said}
        except SiteError as error:
            raise SavedEditError(f"{folder}: {error}") from error
        if len(sites) != 1:
            found = f"more than one, {', '.join(sorted(said))}" if sites else "none"
            raise SavedEditError(
                f"{folder} must say at which site its edit was fitted, and says {found}: save it "
                f"with edit.provenance = Provenance.of(model, 'L6.mid'), or "
                f"edit.save(folder, site='L6.mid')"
            )
        values: dict[str, Any] = {"site": str(min(sites)), "on_infeasible": edit.on_infeasible}
        for place, part in enumerate(parts):
            values |= {f"{place}.{name}": value for name, value in part.state_dict().items()}
            values[f"{place}.options"] = part.rule, part.odds, part.qp.solver_name
        if isinstance(edit, JointLRQP):
            values["joint"] = edit.names, edit.kept_by_default, sorted(edit.within.items())
        return cls(folder.name, folder, edit, sites.pop(), digest_values(values))


class Library(Mapping[str, NamedEdit]):
    """The edits of a server by name.

    Args:
        edits: that it has.

    Raises:
        SavedEditError: none, or two of one name.
    """

    def __init__(self, edits: Iterable[NamedEdit]) -> None:
        self._edits: dict[str, NamedEdit] = {}
        for item in edits:
            if item.name in self._edits:
                raise SavedEditError(
                    f"{self._edits[item.name].folder} and {item.folder} have one name, "
                    f"{item.name!r}, by which requests could not tell them apart; rename one"
                )
            self._edits[item.name] = item
        if not self._edits:
            raise SavedEditError(f"no edits: set {FOLDERS_VARIABLE} to the folders that hold them")

    @classmethod
    def load(cls, folders: str | Path | Sequence[str | Path]) -> Self:
        """Read edits from folders.

        Args:
            folders: each that of an edit, of a :class:`~lrqp_torch.EditLibrary`, or one in which
                every folder is that of an edit; in a string, separated as in ``PATH``.

        Raises:
            SavedEditError: a folder that holds no edit, or one that is refused, with the reason.
        """
        if isinstance(folders, str):
            folders = [part for part in folders.split(os.pathsep) if part]
        elif isinstance(folders, Path):
            folders = [folders]
        return cls(item for folder in folders for item in _read(Path(folder).resolve()))

    def __getitem__(self, name: str) -> NamedEdit:
        return self._edits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._edits)

    def __len__(self) -> int:
        return len(self._edits)

    @property
    def digest(self) -> str:
        """Of all edits, in order."""
        return digest_values({item.name: item.digest for item in self.values()})

    def check_model(self, config: Any, names: Iterable[str] = ()) -> None:
        """Refuse a model that one of the edits cannot be meant for.

        Args:
            config: the model's, as transformers has it.
            names: that the model goes by here, its folder among them.

        Raises:
            ProvenanceError: an edit of another family, width or number of blocks.

        Warns:
            RevisionWarning: an edit of a model of another name, or of unknown origin.
        """
        text = config.get_text_config()
        width, layers = int(text.hidden_size), int(text.num_hidden_layers)
        known = list(dict.fromkeys([*names, getattr(config, "_name_or_path", None)]))
        for item in self.values():
            if item.edit.metric.width != width or item.site.layer >= layers:
                raise ProvenanceError(
                    f"edit {item.name!r} at {item.site} has width {item.edit.metric.width}; the "
                    f"model has width {width} and {layers} blocks"
                )
            for part in item.parts.values():
                origin = part.provenance
                if origin is None:
                    warn(
                        RevisionWarning,
                        f"edit {item.name!r} does not say which model it was fitted on; nothing "
                        f"but its width was checked",
                    )
                    continue
                here = Provenance(
                    site=origin.site,
                    model_type=config.model_type,
                    width=width,
                    layers=layers,
                    model=origin.model if origin.model in known else next(filter(None, known), ""),
                    revision=getattr(config, "_commit_hash", None),
                )
                try:
                    origin.compare(here)
                except ProvenanceError as error:
                    raise ProvenanceError(f"edit {item.name!r}: {error}") from error

    def resolve(self, given: Any, prompt_length: int, max_tokens: int) -> tuple[RequestEdit, ...]:
        """What a request asks for, settled.

            {"edit": "order", "positions": [12, -1], "target": "ABBA"}
            {"edit": "order", "scope": "generated", "target": 1, "source": 0}

        ``positions`` are absolute tokens, from the end of the prompt where negative; a scope is
        ``prompt``, ``generated`` or ``all``. Classes are numbers or names, one for all positions or
        one each; ``source`` is left out where it is the probe's own reading. Of several variables,
        ``target`` and ``source`` are mappings from their names, with ``"keep"`` and ``"free"``.

        Args:
            given: one such or a list of them, as JSON text or as values.
            prompt_length: tokens of the prompt.
            max_tokens: the most that are generated; the last of them is never read by the model.

        Raises:
            RequestError: what is wrong, in which of them.
        """
        if isinstance(given, str | bytes):
            given = from_json(given, f"{ARGUMENT}={quoted(given)}", RequestError)
        items = list(given) if isinstance(given, Sequence) else [given]
        if not items:
            raise RequestError(f"{ARGUMENT} is an empty list; leave it out to edit nothing")
        if len(items) > MOST_EDITS:
            raise RequestError(f"{ARGUMENT} holds {len(items)} edits, and {MOST_EDITS} at most")
        end = prompt_length + max(max_tokens, 1) - 1
        found: list[RequestEdit] = []
        for number, item in enumerate(items):
            where = ARGUMENT if len(items) == 1 else f"{ARGUMENT}[{number}]"
            try:
                made = self._resolve(item, prompt_length, end)
                self._apart(made, found)
            except RequestError as error:
                raise RequestError(f"{where}: {error}") from error
            found.append(made)
        return tuple(found)

    def _resolve(self, item: Any, prompt: int, end: int) -> RequestEdit:
        if not isinstance(item, Mapping):
            raise RequestError(
                f'an edit is an object such as {{"edit": "{next(iter(self))}", "positions": [-1], '
                f'"target": 0}}, got {quoted(item)}'
            )
        unknown = [key for key in item if key not in KEYS]
        if unknown:
            raise RequestError(f"unknown {quoted(unknown[0])}; there are {', '.join(KEYS)}")
        for key in ("edit", "target"):
            if item.get(key) is None:
                raise RequestError(f"{key!r} is missing")
        name = item["edit"]
        if not isinstance(name, str) or name not in self:
            raise RequestError(
                f"no edit {quoted(name)}; this server has {', '.join(map(repr, self))}"
            )
        scope, listed = item.get("scope"), item.get("positions")
        if (scope is None) == (listed is None):
            raise RequestError("give 'positions' or 'scope', and one of them alone")
        if scope is None:
            positions = _positions(listed, prompt, end)
            lo, hi, count = min(positions), max(positions) + 1, len(positions)
        else:
            lo, hi = _scope(scope, prompt, end)
            positions, count = None, 1
        named = self[name]
        targets, sources = (
            _columns(named, item.get(what), count, what, scope is not None)
            for what in ("target", "source")
        )
        variables = len(named.parts)
        return RequestEdit(name, positions, lo, hi, targets, sources, named.digest, variables)

    def _apart(self, new: RequestEdit, others: Sequence[RequestEdit]) -> None:
        """Refuse two edits of one token at one site: the second would undo what the first says."""
        for other in others:
            if self[other.edit].stream == self[new.edit].stream:
                place = new.overlaps(other)
                if place is not None:
                    raise RequestError(
                        f"{new.edit!r} and {other.edit!r} both edit token {place} at "
                        f"{self[new.edit].site}, where only the last would hold; edit other "
                        f"tokens, or both variables at once by a JointLRQP"
                    )


def _read(folder: Path) -> Iterator[NamedEdit]:
    """The edits of one folder that a server was given."""
    if not folder.is_dir():
        raise SavedEditError(f"{folder} is no folder; edits are folders that edit.save wrote")
    kinds = [name for name in (JSON_FILE, JOINT_FILE, INDEX_FILE) if (folder / name).is_file()]
    if len(kinds) > 1:
        raise SavedEditError(f"{folder} holds {' and '.join(kinds)}, and can be only one of them")
    try:
        if kinds == [INDEX_FILE]:
            for name, edit in EditLibrary.load(folder).items():
                yield NamedEdit.of(folder / name, edit)
        elif kinds:
            kind: type[LRQP] | type[JointLRQP] = LRQP if kinds == [JSON_FILE] else JointLRQP
            yield NamedEdit.of(folder, kind.load(folder))
        else:
            inner = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] not in "._")
            for part in inner:
                if not any((part / name).is_file() for name in (JSON_FILE, JOINT_FILE)):
                    raise SavedEditError(f"{part} holds no edit: no {JSON_FILE}, no {JOINT_FILE}")
                yield from _read(part)
            if not inner:
                raise SavedEditError(f"{folder} holds no edit and no folder of one")
    except SavedEditError:
        raise
    except (LRQPError, OSError) as error:
        raise SavedEditError(f"{folder} cannot be used: {error}") from error


def _positions(listed: Any, prompt: int, end: int) -> tuple[int, ...]:
    """Absolute positions, of which none is twice or out of reach."""
    listed = list(listed) if isinstance(listed, list | tuple) else [listed]
    if not listed:
        raise RequestError("'positions' is empty")
    for place in listed:
        if not isinstance(place, int) or isinstance(place, bool):
            raise RequestError(f"positions must be integers, got {quoted(place)}")
        if not -prompt <= place < end:
            raise RequestError(
                f"position {quoted(place)} is out of reach: the prompt has {prompt} tokens, and "
                f"the model reads {end} at most, 0 to {end - 1}, or −{prompt} to −1 from the "
                f"prompt's end (the last token that is generated is not read)"
            )
    found = tuple(place + prompt if place < 0 else place for place in listed)
    if len(set(found)) != len(found):
        twice = next(place for place in found if found.count(place) > 1)
        raise RequestError(f"position {twice} is given twice")
    return found


def _scope(scope: Any, prompt: int, end: int) -> tuple[int, int]:
    """The tokens of a scope, from the first to behind the last."""
    if scope not in SCOPES:
        raise RequestError(f"scope must be one of {', '.join(SCOPES)}, got {quoted(scope)}")
    lo, hi = {"prompt": (0, prompt), "generated": (prompt, end), "all": (0, end)}[scope]
    if lo >= hi:
        raise RequestError(
            f"scope {scope!r} holds no token: the prompt has {prompt}, and of those generated the "
            f"last is not read; raise max_tokens"
        )
    return lo, hi


def _columns(named: NamedEdit, given: Any, count: int, what: str, scope: bool) -> tuple[int, ...]:
    """Classes, V for each of ``count`` positions, of one for all or one each; by variable."""
    parts = named.parts
    if isinstance(named.edit, LRQP):
        by_name: dict[str, Any] = {named.name: given}
    elif given is None or isinstance(given, Mapping):
        by_name = dict(given or {})
        unknown = [key for key in by_name if key not in parts]
        if unknown:
            raise RequestError(
                f"{what} names {quoted(unknown[0])}; the variables of {named.name!r} are "
                f"{', '.join(map(repr, parts))}"
            )
    else:
        raise RequestError(
            f"{what} of {named.name!r} must be an object with a class for each of "
            f"{', '.join(map(repr, parts))}, got {quoted(given)}"
        )
    rows = []
    for name, part in parts.items():
        classes = by_name.get(name)
        if classes is None:
            if what == "target" and name not in getattr(named.edit, "kept_by_default", ()):
                raise RequestError(
                    f'no target for {name!r}; give a class, "keep" to hold its beliefs where '
                    f'they are, or "free" to let them move'
                )
            column = [KEEP if what == "target" else OWN_READING] * count
        else:
            asked = list(classes) if isinstance(classes, list | tuple) else [classes] * count
            if len(asked) != count:
                rest = "a scope has one" if scope else f"there are {count} positions"
                raise RequestError(f"{what} has {len(asked)} classes, and {rest}")
            label = what if isinstance(named.edit, LRQP) else f"{what} of {name!r}"
            words = _WORDS if what == "target" and isinstance(named.edit, JointLRQP) else {}
            column = [_class(part, value, label, words) for value in asked]
        rows.append(column)
    return tuple(value for place in zip(*rows, strict=True) for value in place)


def _class(edit: Edit[Any], value: Any, what: str, words: Mapping[str, int]) -> int:
    """A class by number or by name."""
    names = edit.class_names
    if isinstance(value, str):
        if value in names:
            return names.index(value)
        if value in words:
            return words[value]
    elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < edit.n_classes:
        return value
    called = f", {', '.join(map(repr, names))}" if names else ""
    raise RequestError(
        f"{what} is {quoted(value)}; the probe has classes 0 to {edit.n_classes - 1}{called}"
    )
