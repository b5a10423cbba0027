"""Rows of published data sets of pairs, as the rows of one's own file that they stand for.

Sources of the forms: CausalGym (Arora, Jurafsky and Potts 2024, arXiv 2402.12560; data set
``aryaman/causalgym``), BLiMP (Warstadt et al. 2020, arXiv 1912.00582).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lrqp_torch.errors import RowError

CAUSALGYM = ("base", "src", "base_type", "src_type", "base_label", "src_label")
BLIMP = ("sentence_good", "sentence_bad")

FRONT = "<|endoftext|>"
"""CausalGym writes the token that stands before every text into the text."""


def is_published(row: Mapping[str, Any]) -> bool:
    """Whether a row is one of a published form."""
    return any(all(name in row for name in form) for form in (CAUSALGYM, BLIMP))


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
    cuts = [(side[:front], side[front : len(side) - back], side[len(side) - back :])
            for side in words]  # fmt: skip
    found = []
    for parts in cuts:
        texts = [" ".join(part) for part in parts]
        found.append(
            [
                texts[0],
                (" " if parts[0] and parts[1] else "") + texts[1],
                (" " if (parts[0] or parts[1]) and parts[2] else "") + texts[2],
            ]
        )
    return found[0], found[1]


def _alike(one: Sequence[str], other: Sequence[str]) -> int:
    """How many words both begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
