"""What the operator edits of a batch, and how its two forms agree; no vLLM is needed."""

from collections.abc import Sequence
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrqp_torch import LRQP, JointLRQP, LinearProbe, Mahalanobis
from lrqp_torch.errors import ServingError
from lrqp_torch.qp import Status
from lrqp_torch.qp.stacked import FREE, KEEP
from lrqp_torch.serving import operator, plugin
from lrqp_torch.serving.operator import Scheduled, Tables
from lrqp_torch.serving.plugin import _by_request
from lrqp_torch.serving.requests import Library, RequestEdit
from lrqp_torch.serving.sites import Blocks
from lrqp_torch.stream.sites import Site

WIDTH, ROWS = 16, 40
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def edit_of(n_classes: int, seed: int, **options: Any) -> LRQP:
    generator = torch.Generator().manual_seed(seed)
    probe = LinearProbe(WIDTH, n_classes).requires_grad_(False)
    probe.weight.copy_(torch.randn(n_classes, WIDTH, generator=generator))
    spread = torch.randn(WIDTH, WIDTH, generator=generator)
    return LRQP(probe, Mahalanobis(spread @ spread.T / WIDTH + torch.eye(WIDTH)), **options)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Edits at two sites: of two and five classes, fixed odds, and of two variables."""
    root = tmp_path_factory.mktemp("edits")
    two, five = edit_of(2, 0), edit_of(5, 1)
    two.save(root / "two", site="L0.post")
    five.save(root / "five", site="L1.pre")
    edit_of(3, 2, rule="fixed", log_odds=4.0).save(root / "fixed", site="L1.mid")
    JointLRQP({"two": two, "five": five}, two.metric).save(root / "joint", site="L1.mid")
    return Library.load(root)


def tables_of(library: Library, device: str = "cpu", slack: int = 0) -> Tables:
    found = Tables(library, ROWS, torch.device(device), slack)
    found.arm({item.stream for item in library.values()})
    return found


def asked(
    library: Library, given: Any, prompt: int = 12, most: int = 20
) -> tuple[RequestEdit, ...]:
    return library.resolve(given, prompt, most)


def batch(tables: Tables, step: Sequence[Scheduled], rows: Sequence[tuple[str, int, int]]) -> None:
    """Place a step in a batch of requests, each with its first position and number of rows."""
    counts = torch.tensor([0, *(count for _, _, count in rows)])
    positions = torch.cat([torch.arange(start, start + count) for _, start, count in rows])
    device = tables.device
    starts = counts.cumsum(0).int().to(device)
    tables.place(step, [name for name, _, _ in rows], starts, positions.to(device))


def seen(tables: Tables, name: str) -> dict[int, tuple[int, int]]:
    """Row to target and source of an edit."""
    number = tables.number[name]
    rows = tables.shown[number, :-1].nonzero().flatten().tolist()
    parts = tables.target[number, rows, 0].tolist(), tables.source[number, rows, 0].tolist()
    return dict(zip(rows, zip(*parts, strict=True), strict=True))


def test_rows_are_found_by_the_positions_of_the_device(library: Library) -> None:
    tables = tables_of(library, slack=4)
    one = asked(library, [
        {"edit": "two", "positions": [9, 11, 3], "target": [0, 1, 0], "source": [1, 0, 1]},
        {"edit": "fixed", "scope": "generated", "target": 2},
    ])  # fmt: skip
    step = [Scheduled("a", one, 9, 4), Scheduled("b", one, 12, 3)]
    batch(tables, step, [("b", 12, 3), ("other", 0, 5), ("a", 9, 4)])
    assert seen(tables, "two") == {8: (0, 1), 10: (1, 0)}
    assert seen(tables, "fixed") == {11: (2, -1), 0: (2, -1), 1: (2, -1), 2: (2, -1)}
    assert seen(tables, "five") == {}
    # The host believes in drafts that the device knows to be rejected.
    batch(tables, step, [("a", 7, 4), ("b", 10, 3)])
    assert seen(tables, "two") == {2: (0, 1), 5: (1, 0)}
    assert seen(tables, "fixed") == {6: (2, -1)}
    tables.clear()
    assert not bool(tables.shown.any()) and bool((tables.target == FREE).all())
    # A step that reaches none of the tokens asks nothing.
    tables = tables_of(library)
    batch(tables, [Scheduled("a", one[:1], 4, 3)], [("a", 4, 3)])
    assert not tables.busy


STREAMS = [
    ("two", 0), ("two", "some"), ("five", 3), ("five", "some"), ("fixed", 1), ("joint", None),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "source"), STREAMS)
def test_both_forms_of_the_operator_edit_as_the_edit_itself(
    library: Library, name: str, source: Any, dtype: torch.dtype, pair: bool, device: str
) -> None:
    edit = library[name].edit
    generator = torch.Generator().manual_seed(5)
    x = (3 * torch.randn(ROWS - 5, WIDTH, generator=generator)).to(dtype)
    beside = torch.randn(ROWS - 5, WIDTH, generator=generator).to(dtype)
    places = [0, 3, 4, 10, 11]
    wanted: Any = [place % edit.n_classes for place in places]
    given = {"edit": name, "positions": places, "target": wanted}
    if name == "joint":
        given["target"] = {"two": [0, 1, 0, "keep", 1], "five": ["free", 2, "keep", 4, 0]}
    if isinstance(source, int):
        given["source"] = source
    edits = asked(library, given)
    if source == "some":
        sources = tuple(-1 if place % 2 else 1 for place in places)
        edits = (RequestEdit(**vars(edits[0]) | {"sources": sources}),)
    stream = x + beside if pair else x
    mine = stream[places]
    wide = edits[0].variables
    targets = torch.tensor(edits[0].targets).view(-1, wide)
    sources_ = torch.tensor(edits[0].sources).view(-1, wide)
    expected = mine.clone()
    for row in range(len(places)):
        at = slice(row, row + 1)
        if isinstance(edit, JointLRQP):
            expected[at] = edit.cpu()(mine[at], targets[at], sources_[at])
        else:
            held = None if sources_[row, 0] < 0 else sources_[at, 0]
            expected[at] = edit.cpu()(mine[at], targets[at, 0], held)
    found = []
    for form in ("gathered", "everywhere"):
        if device == "cuda" and form == "gathered":
            continue
        tables = tables_of(library, device)
        batch(tables, [Scheduled("a", edits, 0, 20)], [("a", 0, 20), ("b", 0, 15)])
        own, other = x.clone().to(device), beside.clone().to(device) if pair else None
        getattr(tables, form)(tables.number[name], own, other)
        held_now = (own if other is None else own + other).cpu()
        came = tables.collect()
        assert came is not None
        rows = _by_request(["a"], came)["a"]
        assert [int(row[1]) for row in rows] == places
        untouched = torch.ones(len(x), dtype=torch.bool)
        untouched[places] = False
        assert torch.equal(own.cpu()[untouched], x[untouched])
        if other is not None:
            assert torch.equal(other.cpu()[untouched], beside[untouched])
        tolerance = {"atol": 2e-5, "rtol": 1e-5} if dtype == torch.float32 else None
        if dtype == torch.float32:
            torch.testing.assert_close(held_now[places], expected, **tolerance)  # type: ignore
        certificate = torch.tensor([row[2:] for row in rows], dtype=torch.float64)
        assert set(certificate[:, 0].tolist()) <= {Status.SOLVED, Status.SATISFIED}
        # What is certified is what the stream holds.
        geometry = edit.to("cpu").geometry(torch.device("cpu"))
        if isinstance(edit, LRQP):
            odds = geometry.margins(held_now[places], targets[:, 0]).amin(-1)
            most = tables.variables
            torch.testing.assert_close(certificate[:, 2 + most], odds, atol=1e-9, rtol=1e-9)
            assert bool((certificate[:, 2 + most] >= certificate[:, 2 + 2 * most]).all())
        found.append((held_now[places], certificate))
    for held_there, certificate in found[1:]:
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(held_there, found[0][0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(
            certificate[:, :2], found[0][1][:, :2], atol=1e-6, rtol=1e-3, equal_nan=True
        )


def test_rows_that_are_not_finite_are_marked_and_left_alone(library: Library) -> None:
    tables, x = tables_of(library), torch.randn(6, WIDTH)
    x[2, 3], x[3, 0] = torch.nan, torch.inf
    edit = library["two"].edit
    assert isinstance(edit, LRQP)
    other = 1 - int(edit.probe(x[1]).argmax())
    edits = asked(library, {"edit": "two", "positions": [1, 2, 3], "target": other})
    batch(tables, [Scheduled("a", edits, 0, 6)], [("a", 0, 6)])
    before = x.clone()
    tables.apply(x, None, "L1.pre")
    came = tables.collect()
    assert came is not None
    statuses = {int(row[1]): int(row[2]) for row in _by_request(["a"], came)["a"]}
    assert statuses[2] == statuses[3] == Status.INVALID and statuses[1] != Status.INVALID
    assert torch.equal(x[[0, 3, 4, 5]], before[[0, 3, 4, 5]])
    assert bool(x[2, 3].isnan()) and not torch.equal(x[1], before[1])


def test_an_idle_operator_touches_nothing_and_a_larger_batch_is_an_error(
    library: Library,
) -> None:
    tables = tables_of(library)
    x = torch.randn(ROWS + 1, WIDTH)
    before = x.clone()
    tables.apply(x, None, "L1.pre")
    assert torch.equal(x, before) and tables.collect() is None
    edits = asked(library, {"edit": "two", "positions": [1], "target": 1})
    batch(tables, [Scheduled("a", edits, 0, 6)], [("a", 0, 6)])
    with pytest.raises(ServingError, match="41 rows"):
        tables.apply(x, None, "L1.pre")


def test_the_operator_lives_in_a_compiled_graph_as_one_node(library: Library) -> None:
    operator.define()
    tables = tables_of(library)
    operator.activate(tables)
    norm = nn.LayerNorm(WIDTH)

    def block(x: Tensor, residual: Tensor) -> Tensor:
        x, residual = x * 2, residual + 1
        torch.ops.lrqp.edit_(x, residual, "L1.pre")
        return norm(x + residual) + residual

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x, residual = torch.randn(6, WIDTH), torch.randn(6, WIDTH)
    edits = asked(library, {"edit": "five", "scope": "all", "target": 3})
    outputs = []
    with torch.no_grad():
        for run in (block, compiled, compiled):
            batch(tables, [Scheduled("a", edits, 0, 4)], [("a", 0, 4), ("b", 0, 2)])
            outputs.append(run(x.clone(), residual.clone()))
            assert tables.collect() is not None
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(outputs[2], outputs[0])
        idle = compiled(x.clone(), residual.clone())
    assert not torch.allclose(idle[:4], outputs[0][:4])
    torch.testing.assert_close(idle[4:], outputs[0][4:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["two", "five", "fixed", "joint"])
def test_on_a_gpu_a_graph_edits_what_the_tables_say_when_it_runs(
    library: Library, name: str
) -> None:
    tables = tables_of(library, "cuda")
    tables.rehearse(torch.bfloat16)
    site = str(library[name].stream)
    x = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn_like(x)
    kept = x.clone(), residual.clone()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        tables.apply(x, residual, site)
    target: Any = {"two": 1, "five": 2} if name == "joint" else 1
    given = {"edit": name, "positions": [2, 5], "target": target}
    if name == "five":
        given["source"] = 3
    step = [Scheduled("a", asked(library, given), 0, 8)]
    starts = torch.tensor([0, 6, 14], device="cuda", dtype=torch.int32)
    positions = torch.cat([torch.arange(6), torch.arange(8)]).cuda()
    for asks in (True, False, True):
        x.copy_(kept[0])
        residual.copy_(kept[1])
        torch.cuda.synchronize()
        # Nothing between two steps waits for the device either.
        torch.cuda.set_sync_debug_mode("error")
        try:
            tables.place(step if asks else [], ["b", "a"], starts, positions)
            graph.replay()
            came = tables.collect()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        changed = ((x + residual) != kept[0] + kept[1]).any(-1).nonzero().flatten().tolist()
        if not asks:
            assert came is None and not changed
            continue
        assert came is not None
        rows = _by_request(["a"], came)["a"]
        assert [int(row[1]) for row in rows] == [2, 5]
        assert set(changed) <= {8, 11}
        assert all(row[2] in (Status.SOLVED, Status.SATISFIED) for row in rows)
        stream, edit = (kept[0] + kept[1])[[8, 11]].cpu(), library[name].edit
        alone = deepcopy(edit).to("cpu")  # the graph holds the addresses of the edit itself
        classes = target if name == "joint" else torch.tensor([1, 1])
        held = torch.tensor([3, 3]) if name == "five" else None
        solution = alone.propose(stream, classes, held)
        distances = torch.tensor([row[3] for row in rows], dtype=torch.float64)
        torch.testing.assert_close(distances, solution.distance.double(), rtol=2e-2, atol=1e-3)


class GPT2Block(nn.Module):
    """Of vLLM's names alone."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(4), nn.LayerNorm(4)


class PPMissingLayer(nn.Identity):
    """What another rank has."""


class Model(nn.Module):
    """The second of two ranks, with blocks 1 and 2 of 3, or whatever is given."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.h = nn.ModuleList(blocks or (PPMissingLayer(), GPT2Block(), GPT2Block()))
        self.ln_f = nn.LayerNorm(4)


def test_a_site_is_the_norm_that_reads_it_where_its_block_lives() -> None:
    model = Model()
    blocks = Blocks.of(nn.Sequential(model))
    block = model.h[1]
    assert blocks.norm_of(Site.parse("L1.pre")) is block.ln_1
    assert blocks.norm_of(Site.parse("L0.post")) is block.ln_1
    assert blocks.norm_of(Site.parse("L1.mid")) is block.ln_2
    assert blocks.norm_of(Site.parse("L2.post")) is model.ln_f
    sites = [Site.parse(name) for name in ("L0.pre", "L0.mid", "L2.post")]
    assert set(blocks.here(sites)) == {sites[2]}
    for name in ("L1.z", "L1.attn_out", "final", "encoder.L1.pre", "h:input"):
        with pytest.raises(ServingError, match="is not served"):
            blocks.norm_of(Site.parse(name))
    for name in ("L3.mid", "L3.post"):
        with pytest.raises(ServingError, match="has 3 blocks"):
            blocks.norm_of(Site.parse(name))
    with pytest.raises(ServingError, match="not served in Model"):
        Blocks.of(Model(nn.Linear(4, 4)))


def test_what_is_kept_in_a_joint_edit_is_told_apart_from_what_is_free() -> None:
    assert KEEP != FREE and operator.OWN < 0


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("use_ubatching", "micro-batches"),
        ("prefill_context_parallel_size", "prefill context parallelism"),
        ("enable_sleep_mode", "--enable-sleep-mode"),
    ],
)
def test_a_model_is_not_loaded_where_rows_are_split_or_discarded(
    option: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = {"use_ubatching": False, "prefill_context_parallel_size": 1}
    model = {
        "enable_sleep_mode": False, "served_model_name": None, "model": "m", "hf_config": None
    }  # fmt: skip
    (parallel if option in parallel else model)[option] = 2
    config = SimpleNamespace(
        model_config=SimpleNamespace(**model), parallel_config=SimpleNamespace(**parallel)
    )
    edits = SimpleNamespace(check_model=lambda *_: None)
    monkeypatch.setattr(plugin, "library", lambda: edits)
    loaded: list[Any] = []
    with pytest.raises(ServingError, match=said):
        plugin._load(loaded.append, SimpleNamespace(vllm_config=config))
    assert len(loaded) == 1
