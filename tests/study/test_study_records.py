"""Results written as strict JSON and read back: the same objects, and plain keys for others."""

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.records import from_json, to_json


@dataclass(frozen=True)
class Inner:
    flipped: Estimate | None
    count: int
    note: str | None = None


@dataclass(frozen=True)
class Outer:
    difference: Estimate
    kind: Literal["plain", "prefixed"]
    sites: dict[str, Inner]
    pairs: list[tuple[int, float]]
    names: tuple[str, ...]
    many: dict[str, list[Estimate]] = field(default_factory=dict)


WHOLE = Outer(
    difference=Estimate(0.5, 0.25, 0.75, 12),
    kind="plain",
    sites={
        "L0.mid": Inner(Estimate(None, 0.0, 1.0, 0), 3),
        "L1.pre": Inner(None, 4, "no answers"),
    },
    pairs=[(1, 2.5), (3, 4.0)],
    names=("a", "b"),
    many={"x": [Estimate(1.0, None, None, 2)]},
)


def test_what_is_written_is_read_back_as_the_same_object() -> None:
    text = json.dumps(to_json(WHOLE), allow_nan=False)
    assert from_json(Outer, json.loads(text)) == WHOLE


def test_a_number_with_an_interval_stands_under_its_own_key() -> None:
    raw = to_json(WHOLE)
    assert raw["difference"] == 0.5
    assert raw["difference_interval"] == [0.25, 0.75]
    assert raw["difference_n"] == 12
    assert raw["sites"]["L1.pre"]["flipped"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, "kind: 'other' is none of"),
        ({"names": "ab"}, "names: list wanted, str found"),
        ({"difference": "much"}, "difference: a number wanted"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"sites": {"L0.mid": {"flipped": None}}}, "sites.L0.mid.count is missing"),
        ({"pairs": [[1, True]]}, r"pairs\[0\]\[1\]: a number wanted"),
        ({"pairs": [[1]]}, r"pairs\[0\]: 2 values wanted, 1 found"),
    ],
)
def test_damage_is_named_with_its_place(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(Outer, to_json(WHOLE) | change)
