"""What a request may ask of a server, and what a server may be started with; no vLLM is needed."""

import json
import os
import shutil
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import build

from lrqp_torch import LRQP, EditLibrary, JointLRQP, LinearProbe, Mahalanobis, Provenance
from lrqp_torch.errors import (
    LRQPError,
    ProvenanceError,
    RequestError,
    RevisionWarning,
    SavedEditError,
)
from lrqp_torch.qp.stacked import FREE, KEEP
from lrqp_torch.serving.requests import Library, RequestEdit, key_of_block

WIDTH, PROMPT, MAX_TOKENS = 24, 10, 5
LAST_READ = PROMPT + MAX_TOKENS - 2


def edit_of(n_classes: int, seed: int, **options: Any) -> LRQP:
    generator = torch.Generator().manual_seed(seed)
    probe = LinearProbe(WIDTH, n_classes).requires_grad_(False)
    probe.weight.copy_(torch.randn(n_classes, WIDTH, generator=generator))
    return LRQP(probe, Mahalanobis(torch.eye(WIDTH)), **options)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Edits of two and of five classes, and of three variables."""
    root = tmp_path_factory.mktemp("edits")
    order, five, held = edit_of(2, 0), edit_of(5, 1), edit_of(2, 2).probe
    order.probe.classes, five.probe.classes = ("BABA", "ABBA"), tuple("abcde")
    joint = JointLRQP({"order": order, "five": five, "held": held}, order.metric)
    joint.save(root / "both", site="L1.pre")
    five.save(root / "five", site="L0.post")
    order.provenance = Provenance.of(build("gpt2"), "L1.mid", model="someone/tiny")
    order.save(root / "order")
    return Library.load(root)


def one(library: Library, **given: Any) -> RequestEdit:
    (found,) = library.resolve(given, PROMPT, MAX_TOKENS)
    return found


def test_positions_are_counted_from_the_prompts_end_and_classes_from_their_names(
    library: Library,
) -> None:
    text = json.dumps({"edit": "order", "positions": [2, -1, 12], "target": ["BABA", 1, "ABBA"]})
    (found,) = library.resolve(text, PROMPT, MAX_TOKENS)
    assert found.positions == (2, 9, 12)
    assert (found.targets, found.sources) == ((0, 1, 1), (-1, -1, -1))
    assert (found.edit, found.lo, found.hi, found.variables) == ("order", 2, 13, 1)
    assert found.at(1) == ((1,), (-1,))
    assert found.digest == library["order"].digest
    with pytest.raises(FrozenInstanceError):
        found.lo = 0  # type: ignore[misc]
    single = one(library, edit="five", positions=-3, target="e", source=1)
    assert (single.positions, single.targets, single.sources) == ((7,), (4,), (1,))


def test_scopes_are_half_open_and_leave_out_the_token_that_is_never_read(library: Library) -> None:
    spans = {"prompt": (0, 10), "generated": (10, 14), "all": (0, 14)}
    for scope, span in spans.items():
        found = one(library, edit="order", scope=scope, target=1, source="BABA")
        assert (found.positions, (found.lo, found.hi)) == (None, span)
        assert (found.targets, found.sources) == ((1,), (0,))
    assert one(library, edit="order", positions=LAST_READ, target=1).positions == (13,)


def test_a_joint_edit_has_a_class_for_each_variable(library: Library) -> None:
    target = {"order": ["ABBA", "keep"], "five": "free"}
    found = one(library, edit="both", positions=[0, 1], target=target, source={"five": 3})
    assert found.variables == 3
    assert found.targets == (1, FREE, KEEP, KEEP, FREE, KEEP)
    assert found.sources == (-1, 3, -1, -1, 3, -1)
    assert found.at(1) == ((KEEP, FREE, KEEP), (-1, 3, -1))


def test_keys_are_of_what_is_edited_and_not_of_how_it_was_asked_for(library: Library) -> None:
    scope = one(library, edit="order", scope="prompt", target=1)
    listed = one(library, edit="order", positions=list(range(9, -1, -1)), target="ABBA")
    assert scope.inside(0, 8) == listed.inside(0, 8) is not None
    assert scope.inside(0, 8) != scope.inside(8, 16) == listed.inside(8, 16)
    assert scope.inside(10, 16) is None
    ahead = one(library, edit="order", positions=12, target=1)
    assert ahead.inside(0, 12) is None
    assert key_of_block([scope, ahead], 16, 32) is None
    other = one(library, edit="order", positions=12, target=0)
    source = one(library, edit="order", positions=12, target=1, source=0)
    another = replace(ahead, digest="0" * 16)
    keys = [key_of_block([e], 8, 16) for e in (ahead, other, source, another)]
    assert len(set(keys)) == 4  # hashable, too
    assert key_of_block([scope, ahead], 8, 16) == key_of_block([ahead, scope], 8, 16)


def test_several_edits_may_not_write_one_token_of_one_stream(library: Library) -> None:
    order = {"edit": "order", "positions": [3], "target": 1}
    five = {"edit": "five", "scope": "prompt", "target": 0}
    assert [e.edit for e in library.resolve([order, five], PROMPT, 5)] == ["order", "five"]
    with pytest.raises(RequestError, match=r"lrqp\[1\]: .* both edit token 3 at L1.mid"):
        library.resolve([order, order | {"scope": "all", "positions": None}], PROMPT, 5)
    # L0.post is L1.pre.
    both = {"edit": "both", "positions": 4, "target": {"order": 0, "five": 0}}
    with pytest.raises(RequestError, match="both edit token 4"):
        library.resolve([five, both], PROMPT, 5)
    apart = order | {"positions": [4]}
    assert len(library.resolve([order, apart], PROMPT, 5)) == 2


GOOD = {"edit": "order", "positions": [1, 2], "target": 0}
WRONG: list[tuple[Any, str]] = [
    ("{", "not valid JSON"),
    ('{"edit": NaN}', "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ("7" * 10_000, "not valid JSON"),
    ("[]", "empty list"),
    ([GOOD] * 65, "65 edits, and 64 at most"),
    ("3", "an edit is an object such as"),
    (None, "an edit is an object such as"),
    ([GOOD, "order"], r"lrqp\[1\]: an edit is an object"),
    (GOOD | {"position": 3}, "unknown 'position'; there are edit, positions, scope, target"),
    ({"positions": 1, "target": 0}, "'edit' is missing"),
    ({"edit": "order", "positions": 1}, "'target' is missing"),
    (GOOD | {"edit": "ordre"}, "no edit 'ordre'; this server has 'both', 'five', 'order'"),
    (GOOD | {"edit": ["order"]}, r"no edit \['order'\]"),
    (GOOD | {"scope": "all"}, "'positions' or 'scope', and one of them alone"),
    ({"edit": "order", "target": 0}, "'positions' or 'scope', and one of them alone"),
    (GOOD | {"positions": []}, "'positions' is empty"),
    (GOOD | {"positions": [1.0, 2]}, "must be integers, got 1.0"),
    (GOOD | {"positions": [True, 2]}, "must be integers, got True"),
    (GOOD | {"positions": "12"}, "must be integers, got '12'"),
    (GOOD | {"positions": [[1], [2]]}, "must be integers"),
    (GOOD | {"positions": [1, 14]}, "position 14 is out of reach: the prompt has 10 tokens"),
    (GOOD | {"positions": [1, -11]}, "position -11 is out of reach"),
    (GOOD | {"positions": [1, 10**400]}, "is out of reach"),
    (GOOD | {"positions": [9, -1]}, "position 9 is given twice"),
    ({"edit": "order", "scope": "promt", "target": 0}, "scope must be one of prompt, generated"),
    ({"edit": "order", "scope": ["all"], "target": 0}, "scope must be one of"),
    ({"edit": "order", "scope": "all", "target": [0, 1]}, "target has 2 classes, and a scope has"),
    (GOOD | {"target": [0]}, "target has 1 classes, and there are 2 positions"),
    (GOOD | {"target": 2}, "target is 2; the probe has classes 0 to 1, 'BABA', 'ABBA'"),
    (GOOD | {"target": -1}, "target is -1"),
    (GOOD | {"target": True}, "target is True"),
    (GOOD | {"target": 1.0}, "target is 1.0"),
    (GOOD | {"target": "keep"}, "target is 'keep'"),
    (GOOD | {"target": {"order": 0}}, "target is {'order': 0}"),
    (GOOD | {"source": "BAAB"}, "source is 'BAAB'"),
    (GOOD | {"source": -1}, "source is -1"),
    (GOOD | {"edit": "both"}, "target of 'both' must be an object"),
    (GOOD | {"edit": "both", "target": {"order": 0}}, "no target for 'five'"),
    (GOOD | {"edit": "both", "target": {"x": 0}}, "target names 'x'; the variables of 'both'"),
    (
        GOOD | {"edit": "both", "target": {"order": 0, "five": 5}},
        "target of 'five' is 5; the probe has classes 0 to 4",
    ),
    (
        GOOD | {"edit": "both", "target": {"order": 0, "five": 0}, "source": {"order": "free"}},
        "source of 'order' is 'free'",
    ),
]


@pytest.mark.parametrize(("given", "said"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_said_in_its_words(library: Library, given: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        library.resolve(given, PROMPT, MAX_TOKENS)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 700
    if not isinstance(given, str):
        try:
            text = json.dumps(given)
        except ValueError:  # integers of thousands of digits have no text
            return
        with pytest.raises(RequestError):
            library.resolve(text, PROMPT, MAX_TOKENS)


def test_a_scope_that_no_token_can_be_in_is_refused(library: Library) -> None:
    with pytest.raises(RequestError, match="scope 'generated' holds no token"):
        library.resolve({"edit": "order", "scope": "generated", "target": 0}, PROMPT, 1)


def test_folders_libraries_and_single_edits_are_read(library: Library, tmp_path: Path) -> None:
    assert sorted(library) == ["both", "five", "order"]
    assert [str(library[name].site) for name in sorted(library)] == ["L1.pre", "L0.post", "L1.mid"]
    assert len({item.digest for item in library.values()}) == 3
    order = library["order"].edit
    assert isinstance(order, LRQP)
    EditLibrary({"L1.mid": order, "second": order}).save(tmp_path / "library")
    several = os.pathsep.join([str(tmp_path / "library"), str(library["five"].folder)])
    read = Library.load(several)
    assert list(read) == ["L1.mid", "second", "five"]
    assert read["second"].digest == library["order"].digest
    assert (
        Library.load(library["order"].folder).digest
        == Library.load([library["order"].folder]).digest
    )
    stronger = order.like(order.probe, order.metric, log_odds=11.0)
    stronger.save(tmp_path / "stronger", site="L1.mid")
    assert Library.load(tmp_path / "stronger")["stronger"].digest != library["order"].digest


def test_what_cannot_be_served_is_refused_at_once(library: Library, tmp_path: Path) -> None:
    edit = edit_of(2, 0)
    order = library["order"].edit
    assert isinstance(order, LRQP)
    JointLRQP([order], order.metric).save(tmp_path / "astray", site="L1.pre")
    with pytest.raises(SavedEditError, match=r"says more than one, L1\.mid, L1\.pre"):
        Library.load(tmp_path / "astray")
    with pytest.raises(SavedEditError, match="set LRQP_EDITS"):
        Library.load("")
    with pytest.raises(SavedEditError, match="is no folder"):
        Library.load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SavedEditError, match="no edit and no folder of one"):
        Library.load(tmp_path / "empty")
    edit.save(tmp_path / "some" / "unsaid")
    with pytest.raises(SavedEditError, match="says none"):
        Library.load(tmp_path / "some")
    edit.save(tmp_path / "some" / "unsaid", site="L1.middle")
    with pytest.raises(SavedEditError, match="is no site"):
        Library.load(tmp_path / "some")
    edit.save(tmp_path / "some" / "unsaid", site="L1.mid")
    (tmp_path / "some" / "other").mkdir()
    with pytest.raises(SavedEditError, match="other holds no edit"):
        Library.load(tmp_path / "some")
    (tmp_path / "some" / "other").rmdir()
    assert list(Library.load(tmp_path / "some")) == ["unsaid"]
    shutil.copytree(tmp_path / "some" / "unsaid", tmp_path / "twice" / "unsaid")
    with pytest.raises(SavedEditError, match="have one name, 'unsaid'"):
        Library.load([tmp_path / "some", tmp_path / "twice"])
    tensors = tmp_path / "twice" / "unsaid" / "edit.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(SavedEditError, match="checksum"):
        Library.load(tmp_path / "twice")
    shutil.copy(library["both"].folder / "joint.json", tmp_path / "some" / "unsaid")
    with pytest.raises(SavedEditError, match=r"edit\.json and joint\.json"):
        Library.load(tmp_path / "some")


def test_the_model_is_held_against_the_origin_of_the_edits(library: Library) -> None:
    config = build("gpt2").config
    order = Library([library["order"]])
    order.check_model(config, ["someone/tiny", "/somewhere"])
    with pytest.warns(RevisionWarning, match="someone/tiny"):
        order.check_model(config, ["/somewhere"])
    with pytest.warns(RevisionWarning, match="nothing but its width"):
        Library([library["five"]]).check_model(config)
    with pytest.raises(ProvenanceError, match=r"edit 'order': .*\(family gpt2\)"):
        order.check_model(build("llama").config, ["someone/tiny"])
    wider = type(config)(n_embd=48, n_layer=config.n_layer, n_head=config.n_head)
    with pytest.raises(
        ProvenanceError, match=r"'five' at L0\.post has width 24; the model has wid"
    ):
        Library([library["five"]]).check_model(wider)
    deep = replace(library["five"], site=replace(library["five"].site, layer=99))
    with pytest.raises(ProvenanceError, match="blocks"):
        Library([deep]).check_model(config)
    assert issubclass(ProvenanceError, LRQPError)
