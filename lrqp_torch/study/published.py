"""Rows of published data sets of pairs, as the rows of one's own file that they stand for.

Sources of the forms: CausalGym (Arora, Jurafsky and Potts 2024, arXiv 2402.12560; data set
``aryaman/causalgym``), BLiMP (Warstadt et al. 2020, arXiv 1912.00582), RAVEL (Huang et al. 2024,
arXiv 2402.17700; the files of ``explanare/ravel`` and the tables of ``hij/ravel``), MIB (Mueller et
al. 2025, arXiv 2504.13151; data sets of ``mib-bench``).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrqp_torch.errors import PromptError, RowError
from lrqp_torch.files import read_json
from lrqp_torch.study.prompts import Prompt

CAUSALGYM = ("base", "src", "base_type", "src_type", "base_label", "src_label")
BLIMP = ("sentence_good", "sentence_bad")

FRONT = "<|endoftext|>"
"""CausalGym writes the token that stands before every text into the text."""


def is_published(row: Mapping[str, Any]) -> bool:
    """Whether a row is one of a published form."""
    return any(row.keys() >= {*form} for form in (CAUSALGYM, BLIMP))


def unfolded(number: int, row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rows of one's own form that a published row stands for.

    Raises:
        RowError: a field that does not hold what its data set says.
    """
    if all(name in row for name in CAUSALGYM):
        yield from _causalgym(number, row)
    else:
        yield from _blimp(number, row)


def spans_of(number: int, row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The spans of both texts of a pair of CausalGym, which align one to one.

    Raises:
        RowError: they do not.
    """
    both = [row["base"], row["src"]]
    texts = [[side] if isinstance(side, str) else side for side in both]
    for side in texts:
        if not isinstance(side, Sequence) or not all(isinstance(span, str) for span in side):
            raise RowError(
                f"prompt {number}: base and src must be lists of texts", "spans that are no texts"
            )
    base, source = ([span.replace(FRONT, "") for span in side] for side in texts)
    if len(base) != len(source):
        raise RowError(
            f"prompt {number}: base has {len(base)} spans and src {len(source)}; they must align",
            "spans that do not align",
        )
    if len(base) == 1:
        base, source = _apart(base[0], source[0])
    return base, source


def _causalgym(number: int, row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    sides = spans_of(number, row)
    answers = {str(row[f"{side}_type"]): row[f"{side}_label"] for side in ("base", "src")}
    if len(answers) < 2:
        raise RowError(
            f"prompt {number}: base_type and src_type are both {row['base_type']!r}",
            "a pair of one type",
        )
    differ = [one != other for one, other in zip(*sides, strict=True)]
    for side, own in zip(("base", "src"), sides, strict=True):
        yield {
            "text": "".join(
                _marked(span) if other else span for span, other in zip(own, differ, strict=True)
            ),
            "label": row[f"{side}_type"],
            "answers": answers,
            "pair": f"{row.get('task', '')}.{number}",
            **{name: row[name] for name in row if name not in CAUSALGYM},
        }


def _blimp(number: int, row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    good, bad = (str(row[name]).split(" ") for name in BLIMP)
    start = _alike(good, bad)
    if not 0 < start < min(len(good), len(bad)):
        raise RowError(
            f"prompt {number}: the sentences do not part behind a first word, so there is no "
            f"prompt before what tells them apart",
            "sentences that do not part behind a first word",
        )
    words = [side[start].rstrip(".?!") for side in (good, bad)]
    yield {
        "text": " ".join(good[:start]),
        "label": words[0],
        "answers": {word: f" {word}" for word in words},
        **{name: row[name] for name in row if name not in BLIMP},
    }


def _marked(span: str) -> str:
    bare = span.lstrip(" ")
    return f"{span[: len(span) - len(bare)]}[[{bare}]]"


def _apart(base: str, source: str) -> tuple[list[str], list[str]]:
    """Two texts as what they begin with alike, where they differ, and what they end in alike."""
    words = [text.split(" ") for text in (base, source)]
    front = _alike(*words)
    back = _alike(*(side[front:][::-1] for side in words))

    def cut(side: list[str]) -> list[str]:
        end = len(side) - back
        first, own, last = (" ".join(part) for part in (side[:front], side[front:end], side[end:]))
        # A part that follows another begins with the space between them.
        own = f" {own}" if front and end > front else own
        return [first, own, f" {last}" if end and back else last]

    return cut(words[0]), cut(words[1])


def _alike(one: Sequence[str], other: Sequence[str]) -> int:
    """How many words both begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


# ---- folders of published files ------------------------------------------------------------------


def mib_rows(number: int, row: Mapping[str, Any], column: str) -> Iterator[Mapping[str, Any]]:
    """A prompt of MIB and its counterfactual, which stands in a column of the row, as two rows of a
    pair.

    The class is the answer; each row has the answers of both, and the other one to become. Raises
    RowError: no such counterfactual, or one with the same answer.
    """
    asked = row.get("attribute")
    sides = [_mib_side(number, side, asked) for side in _both(number, row, column)]
    if sides[0][1] == sides[1][1]:
        raise _same_answer(number, column)
    for (text, own), (_, becomes) in zip(sides, sides[::-1], strict=True):
        yield {
            "text": text,
            "label": own.strip(),
            "answers": {said.strip(): said for _, said in sides},
            "pair": str(number),
            "target": becomes.strip(),
        }


def _both(number: int, row: Mapping[str, Any], column: str) -> tuple[Mapping[str, Any], ...]:
    """A row and its counterfactual."""
    other = row.get(column)
    if not isinstance(other, Mapping):
        raise RowError(f"prompt {number} has no {column!r}", f"no {column}")
    return row, other


def _same_answer(number: int, column: str) -> RowError:
    return RowError(
        f"prompt {number} and its {column} have the same answer",
        "a counterfactual with the same answer",
    )


def _mib_side(number: int, row: Mapping[str, Any], attribute: Any) -> tuple[str, str]:
    """Text and answer of one side; the text with its entity marked, where it has one."""
    text, said = row.get("prompt"), row.get("answer")
    choices, key = row.get("choices"), row.get("answerKey")
    if said is None and choices is not None and key is not None:
        names = choices["label"] if isinstance(choices, Mapping) else choices
        said, number_of = key, int(key) if str(key).isdigit() else None
        if number_of is not None:
            said = names[number_of] if number_of < len(names) else None
    if said is None:
        said = row.get("label", row.get(attribute) if isinstance(attribute, str) else None)
    if not isinstance(text, str) or said is None or not str(said).strip():
        looked = "prompt, and an answer as answer, choices and answerKey, label, or by attribute"
        raise RowError(
            f"prompt {number} lacks a field of MIB's form: looked for {looked}; it has "
            f"{', '.join(map(str, row))}",
            "no prompt or no answer",
        )
    entity = row.get("entity")
    if isinstance(entity, str) and entity and entity in text:
        text = _entity_marked(text, entity)
    return text, spoken(text, str(said))


def asked_attributes(rows: Iterable[Any], column: str) -> list[str]:
    """The attributes that rows of MIB's RAVEL ask for and have values of; none for other rows.

    A row has ``prompt``, ``entity``, ``attribute`` and a column an attribute; so has its
    counterfactual, of which ``attribute`` may be another one, or none that has values.
    """
    names = (
        row.get("attribute")
        for row in rows
        if isinstance(row, Mapping)
        and all(isinstance(s, Mapping) and "entity" in s for s in (row, row.get(column)))
        and row.get(row.get("attribute"))
    )
    return list(dict.fromkeys(str(name) for name in names))


def agree(
    values: dict[str, dict[str, str]], row: Mapping[str, Any], entity: str, names: Iterable[str]
) -> None:
    """Add what a row says of an entity; where another says otherwise, that is not known of it.

    Two entities of one name, which a prompt cannot tell apart, keep what they agree in.
    """
    own = {name: str(row.get(name) or "").strip() for name in names if name in row}
    if entity:
        seen = values.setdefault(entity, own)
        values[entity] = {k: v for k, v in seen.items() if own.get(k) == v}


def city_prompt(
    number: int,
    row: Mapping[str, Any] | RowError,
    column: str,
    name: str,
    values: Mapping[str, Mapping[str, str]],
) -> tuple[Prompt, tuple[str, str]]:
    """A prompt of MIB's RAVEL that asks for an attribute, and its source: marked text and entity.

    ``row`` is as of :func:`asked_attributes`, ``column`` names its counterfactual and ``name`` the
    attribute; ``values`` are by entity and attribute. Raises RowError: no such counterfactual, an
    entity that is not in its prompt or of which the value is not known, or both entities have the
    same.
    """
    if isinstance(row, RowError):
        raise row
    sides = []
    for side in _both(number, row, column):
        text, entity = side.get("prompt"), side.get("entity")
        if not isinstance(text, str) or not isinstance(entity, str) or entity not in text:
            raise RowError(
                f"prompt {number}: entity {entity!r} is not in the prompt {text!r}",
                "an entity that is not in its prompt",
            )
        sides.append((text, entity, values.get(entity, {}).get(name, "")))
    (text, entity, own), (theirs, source, becomes) = sides
    if not own or not becomes:
        raise RowError(
            f"prompt {number}: the {name} of {entity!r} and of {source!r} must be known",
            f"an entity whose {name} is not known",
        )
    if own == becomes:
        raise _same_answer(number, column)
    answers = {value: (spoken(text, value),) for value in (own, becomes)}
    prompt = Prompt(_entity_marked(text, entity), own, answers, group=entity, target=becomes)
    return prompt, (_entity_marked(theirs, source), source)


def _entity_marked(text: str, entity: str) -> str:
    before, _, after = text.rpartition(entity)
    return f"{before}[[{entity}]]{after}"


def spoken(text: str, answer: str) -> str:
    """An answer with the space that a word needs behind a text, none behind a quote or bracket."""
    bare = answer.strip()
    return bare if not text or text[-1] in "\"'([{\n\t " else f" {bare}"


@dataclass(frozen=True)
class Ravel:
    """Entities and prompt templates of RAVEL."""

    values: dict[str, dict[str, str]]  # entity to attribute to value
    templates: dict[str, list[str]]  # attribute to templates, with ``%s`` where the entity goes
    entity_split: dict[str, str]  # entity to ``"train"``, ``"val"`` or ``"test"``
    template_split: dict[str, str]  # template to the same


RAVEL_FILES = (
    "entity_attributes.json",
    "attribute_to_prompts.json",
    "entity_to_split.json",
    "prompt_to_split.json",
)


RAVEL_PROMPT = ("Template", "Attribute")
"""Columns of the prompts of ``hij/ravel``, beside ``Source`` and ``Entity``."""
RAVEL_KEYS = ("ID", "URL")
"""Columns of its entities that are neither their name nor an attribute."""


def read_ravel(folder: Path, rows: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> Ravel:
    """RAVEL's tables, from the files of its repository (``ravel_city_entity_attributes.json`` …).

    They lie in the folder, or within it, of several kinds of entity the first by name. ``rows`` are
    of the tables of ``hij/ravel``, with the split they are of, where it holds those. Raises
    PromptError: files that are not there, or of another form; the message names those that were
    looked for.
    """
    tabled = _ravel_of(rows)
    if tabled is not None:
        return tabled
    found = sorted(folder.rglob(f"*{RAVEL_FILES[0]}"))
    if not found:
        looked = ", ".join(f"ravel_*_{name}" for name in RAVEL_FILES)
        raise PromptError(
            f"{str(folder)!r} holds no files of RAVEL; looked for {looked}, and for tables with "
            f"the columns {', '.join(RAVEL_PROMPT)} of prompts and of entities' attributes"
        )
    start = found[0].name.removesuffix(RAVEL_FILES[0])
    tables: list[Any] = []
    for name in RAVEL_FILES:
        path = found[0].with_name(start + name)
        table = read_json(path, PromptError)
        if not isinstance(table, dict):
            raise PromptError(f"{str(path)!r} is no JSON object, as RAVEL's is")
        tables.append(table)
    values, templates, entities, prompts = tables
    if not all(isinstance(own, dict) for own in values.values()):
        raise PromptError(f"{str(found[0])!r} does not map entities to attributes to values")
    return Ravel(
        {entity: {k: str(v) for k, v in own.items() if v} for entity, own in values.items()},
        {name: [str(each) for each in own] for name, own in templates.items()},
        entities,
        {name: split["split"] if isinstance(split, dict) else split
         for name, split in prompts.items()},
    )  # fmt: skip


def _ravel_of(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Ravel | None:
    """The same from the tables of ``hij/ravel``: one of prompts, one of entities, each in splits.

    Prompts are ``Template`` with ``%s`` for the entity and ``Attribute``; those that name an
    ``Entity`` of their own, or ask for nothing, are left out. The first column of entities but
    ``ID`` and ``URL`` is their name. Two of one name, which a prompt cannot tell apart, keep the
    attributes in which they agree.
    """
    values: dict[str, dict[str, str]] = {}
    templates: dict[str, list[str]] = {}
    entities: dict[str, str] = {}
    prompts: dict[str, str] = {}
    asking = [(side, row) for side, row in rows if all(name in row for name in RAVEL_PROMPT)]
    attributes = {str(row["Attribute"]) for _, row in asking if row["Attribute"]}
    for side, row in asking:
        template, name = str(row["Template"]), str(row["Attribute"] or "")
        if name and "%s" in template and not row.get("Entity") and template not in prompts:
            templates.setdefault(name, []).append(template)
            prompts[template] = side
    for side, row in rows:
        if not attributes & set(row) or RAVEL_PROMPT[0] in row:
            continue
        column = next(name for name in row if name not in (*RAVEL_KEYS, *attributes))
        entity = str(row[column] or "").strip()
        agree(values, row, entity, attributes)
        if entity:
            entities.setdefault(entity, side)
    if not values or not templates:
        return None
    known = {entity: {k: v for k, v in own.items() if v} for entity, own in values.items()}
    return Ravel(known, templates, entities, prompts)
