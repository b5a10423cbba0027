"""Saved edits: bit-exact round trips, and a named error for everything that is not an edit."""

import copy
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lrqp_torch import LRQP, JointLRQP, LinearProbe, Mahalanobis
from lrqp_torch.edits import saving
from lrqp_torch.errors import LRQPError, NonFiniteError, OutputError, SavedEditError

Clusters = tuple[Tensor, Tensor]
NUMBERS, TEXT, SIGMA = "edit.safetensors", "edit.json", "covariance.safetensors"


@pytest.fixture
def saved(clusters: Clusters, tmp_path: Path) -> Path:
    """The folder of a saved edit."""
    return LRQP.fit(*clusters).save(tmp_path / "edit", site="L6.mid")


def rewrite(folder: Path, **changes: Any) -> None:
    """Change fields of the JSON; a value of ``...`` removes the field."""
    content = json.loads((folder / TEXT).read_text()) | changes
    content = {name: value for name, value in content.items() if value is not ...}
    (folder / TEXT).write_text(json.dumps(content))


def rewrite_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Change tensors (None removes one), with a checksum that fits."""
    tensors = safetensors.torch.load_file(folder / NUMBERS)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    blob = safetensors.torch.save(tensors)
    (folder / NUMBERS).write_bytes(blob)
    rewrite(folder, sha256=hashlib.sha256(blob).hexdigest())


def rewrite_covariance(folder: Path, covariance: Tensor, **others: Tensor) -> None:
    """Another Σ, with a checksum that fits."""
    safetensors.torch.save_file({"metric.covariance": covariance, **others}, folder / SIGMA)
    digest = hashlib.sha256(covariance.contiguous().numpy().tobytes()).hexdigest()
    rewrite(folder, covariance_sha256=digest)


def as_first_version(folder: Path) -> None:
    """As the versions before 0.7.0 wrote it: all numbers in one file, and no more than needed."""
    covariance = safetensors.torch.load_file(folder / SIGMA)["metric.covariance"]
    (folder / SIGMA).unlink()
    none = {f"metric__{name}": None for name in ("steering", "gram", "sizes")}
    rewrite_tensors(folder, metric__covariance=covariance, **none)
    rewrite(folder, version=1, covariance_sha256=...)


@pytest.fixture(params=[True, False], ids=["at once", "when looked at"])
def read_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether Σ of the small edits here is read with the rest, or as that of large ones."""
    if not request.param:
        monkeypatch.setattr(saving, "READ_AT_ONCE", 0)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_mean", [True, False])
def test_round_trip_is_bit_exact(
    clusters: Clusters, tmp_path: Path, dtype: torch.dtype, with_mean: bool, read_at_once: bool
) -> None:
    x, y = clusters[0].to(dtype), clusters[1]
    fitted = LRQP.fit(x, y)
    metric = fitted.metric if with_mean else Mahalanobis(fitted.metric.covariance, n_samples=None)
    edit = LRQP(
        fitted.probe,
        metric,
        log_odds=0.1,
        rule="fixed",
        odds="total",
        on_infeasible="skip",
    )
    folder = edit.save(
        tmp_path / "a" / "b", site="L6.mid", accuracy=0.5, nested={"list": [1, None]}
    )
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", SIGMA, TEXT, NUMBERS]
    loaded = LRQP.load(folder)
    assert set(loaded.state_dict()) == set(edit.state_dict())
    for name, tensor in edit.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(loaded.state_dict()[name], tensor)
    for name in ("rule", "odds", "on_infeasible"):
        assert getattr(loaded, name) == getattr(edit, name)
    assert loaded.metric.shrinkage == edit.metric.shrinkage
    assert loaded.metric.n_samples == edit.metric.n_samples
    assert loaded.notes == {"site": "L6.mid", "accuracy": 0.5, "nested": {"list": [1, None]}}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    before, after = edit.solve(x, 1), loaded.solve(x, 1)
    for name in vars(before):
        assert torch.equal(getattr(before, name), getattr(after, name)), name


def test_saving_twice_gives_the_same_bytes_and_keeps_notes(saved: Path, tmp_path: Path) -> None:
    loaded = LRQP.load(str(saved))
    again = loaded.save(tmp_path / "again", seed=3)
    assert (again / NUMBERS).read_bytes() == (saved / NUMBERS).read_bytes()
    assert LRQP.load(again).notes == {"site": "L6.mid", "seed": 3}
    assert loaded.save(tmp_path / "again") == again
    assert LRQP.load(again).notes == {"site": "L6.mid"}


def test_the_solver_and_its_arguments_are_kept(clusters: Clusters, tmp_path: Path) -> None:
    edit = LRQP.fit(*clusters, solver="DIFFCP", solver_args={"max_iter": 77})
    loaded = LRQP.load(edit.save(tmp_path))
    assert loaded.qp.solver_name == "DIFFCP"
    assert loaded.qp.solver_args == edit.qp.solver_args
    assert loaded.qp.solver_args["max_iter"] == 77


def test_loading_to_a_device(saved: Path) -> None:
    edit = LRQP.load(saved, device="cpu")
    assert {tensor.device.type for tensor in edit.state_dict().values()} == {"cpu"}


def test_nothing_is_pickled(saved: Path) -> None:
    for file in saved.glob("edit.*"):
        content = file.read_bytes()
        assert not content.startswith((b"PK", b"\x80"))
    json.loads((saved / TEXT).read_text())
    safetensors.torch.load_file(saved / NUMBERS)


def test_an_edit_in_half_precision_round_trips(clusters: Clusters, tmp_path: Path) -> None:
    edit = LRQP.fit(*clusters).bfloat16()
    loaded = LRQP.load(edit.save(tmp_path))
    assert loaded.probe.weight.dtype == torch.bfloat16
    assert torch.equal(loaded(clusters[0], 1), edit(clusters[0], 1))


def truncate(name: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / NUMBERS).read_bytes())
    content[-100] ^= 1
    (folder / NUMBERS).write_bytes(content)


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def fields(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, **changes)


def tensors(**changes: Tensor | None) -> Callable[[Path], None]:
    return lambda folder: rewrite_tensors(folder, **changes)


def option(name: str, value: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        options = json.loads((folder / TEXT).read_text())["options"]
        rewrite(folder, options=options | {name: value})

    return damage


def foreign_safetensors(folder: Path) -> None:
    blob = b"not safetensors"
    (folder / NUMBERS).write_bytes(blob)
    rewrite(folder, sha256=hashlib.sha256(blob).hexdigest())


def empty_folder(folder: Path) -> None:
    remove(NUMBERS)(folder)
    remove(TEXT)(folder)


def json_is_a_folder(folder: Path) -> None:
    remove(TEXT)(folder)
    (folder / TEXT).mkdir()


nan = torch.full((3,), float("nan"))
asymmetric = torch.eye(12, dtype=torch.float64)
asymmetric[0, 1] = 0.5
indefinite = torch.eye(12, dtype=torch.float64)
indefinite[0, 0] = -1

DAMAGES = {
    "empty folder": (empty_folder, "missing"),
    "no folder": (shutil.rmtree, "missing"),
    "numbers missing": (remove(NUMBERS), "missing"),
    "text missing": (remove(TEXT), "missing"),
    "text is a folder": (json_is_a_folder, "missing"),
    "numbers truncated": (truncate(NUMBERS, 0.7), "checksum"),
    "numbers empty": (truncate(NUMBERS, 0), "checksum"),
    "one bit flipped": (flip_a_bit, "checksum"),
    "text truncated": (truncate(TEXT, 0.7), "JSON"),
    "text empty": (truncate(TEXT, 0), "JSON"),
    "text not UTF-8": (write(TEXT, b"\xff\xfe\xfa"), "JSON"),
    "text nested without end": (write(TEXT, b"[" * 200_000), "JSON"),
    "text far too long": (write(TEXT, b" " * 2_000_000), "larger"),
    "text a list": (write(TEXT, b"[1, 2]"), "does not describe"),
    "foreign text": (write(TEXT, b'{"architectures": ["GPT2LMHeadModel"]}'), "does not describe"),
    "foreign numbers": (foreign_safetensors, "safetensors"),
    "other format": (fields(format="lrqp_torch.probe"), "does not describe"),
    "no number of samples": (fields(n_samples=...), "n_samples"),
    "a truth for a number": (fields(shrinkage=True), "shrinkage"),
    "newer": (fields(version=3), "version 3.*update"),
    "no version": (fields(version=...), "version None"),
    "no checksum": (fields(sha256=...), "sha256"),
    "no options": (fields(options=...), "options"),
    "options a list": (fields(options=[]), "options"),
    "options empty": (fields(options={}), "options.rule"),
    "notes a string": (fields(notes="x"), "notes"),
    "n_classes a string": (fields(n_classes="3"), "n_classes"),
    "n_samples a string": (fields(n_samples="many"), "n_samples"),
    "shrinkage beyond all numbers": (
        lambda folder: (folder / TEXT).write_text(
            (folder / TEXT).read_text().replace('"shrinkage": ', '"shrinkage": 1e999, "x": ')
        ),
        "1e999",
    ),
    "eight bits a number": (
        tensors(probe__bias=torch.zeros(3).to(torch.float8_e4m3fn)),
        "non-floating",
    ),
    "shrinkage NaN": (fields(shrinkage=float("nan")), "NaN"),
    "note infinite": (fields(notes={"a": float("inf")}), "Infinity"),
    "other n_classes": (fields(n_classes=4), r"probe.weight should be \(4, 12\)"),
    "other width": (fields(width=11), "probe.weight"),
    "one class": (fields(n_classes=1), "probe.weight"),
    "unknown option": (option("extra", 1), "options.extra"),
    "unknown rule": (option("rule", "mirrored"), "rule"),
    "unknown odds": (option("odds", "all"), "odds"),
    "unknown on_infeasible": (option("on_infeasible", "ignore"), "on_infeasible"),
    "rule a number": (option("rule", 1), "options.rule"),
    "solver_args a list": (option("solver_args", []), "options.solver_args"),
    "unknown solver": (option("solver", "SIMPLEX"), "SIMPLEX"),
    "weight missing": (tensors(probe__weight=None), "probe.weight.*nothing"),
    "floor missing": (tensors(log_odds=None), "log_odds"),
    "bias of another shape": (tensors(probe__bias=torch.zeros(4)), "probe.bias"),
    "mean of another shape": (tensors(metric__mean=torch.zeros(11)), "mean"),
    "floor a vector": (tensors(log_odds=torch.zeros(1)), "log_odds"),
    "unknown tensor": (tensors(extra=torch.zeros(1)), "extra"),
    "NaN in bias": (tensors(probe__bias=nan), "probe.bias holds NaN"),
    "infinite floor": (tensors(log_odds=torch.tensor(float("inf"))), "log_odds holds NaN"),
    "integer bias": (tensors(probe__bias=torch.zeros(3).long()), "non-floating"),
    "covariance among the rest": (tensors(metric__covariance=asymmetric), "metric.covariance"),
    "WΣ missing": (tensors(metric__steering=None), "metric.steering"),
    "WΣ in float32": (tensors(metric__steering=torch.zeros(3, 12)), "too few digits"),
    "WΣ nothing": (tensors(metric__steering=torch.zeros(3, 12).double()), "metric.steering"),
    "WΣ of another probe": (tensors(probe__weight=torch.randn(3, 12)), "metric.steering"),
    "G missing": (tensors(metric__gram=None), "metric.gram.*nothing"),
    "G of another probe": (tensors(metric__gram=torch.eye(3).double()), "metric.gram"),
    "sizes of nothing": (tensors(metric__sizes=torch.zeros(2).double()), "metric.sizes"),
    "sizes too small": (tensors(metric__sizes=torch.full((2,), 1e-9).double()), "metric.steering"),
    "sizes negative": (tensors(metric__sizes=-torch.ones(2).double()), "metric.sizes"),
}
FIRST_VERSION_DAMAGES = {
    "covariance missing": (tensors(metric__covariance=None), "metric.covariance"),
    "asymmetric covariance": (tensors(metric__covariance=asymmetric), "symmetric"),
    "indefinite covariance": (tensors(metric__covariance=indefinite), "negative"),
    "WΣ": (tensors(metric__steering=torch.zeros(3, 12).double()), "unknown.*metric.steering"),
}


def flip_a_bit_of_the_covariance(folder: Path) -> None:
    content = bytearray((folder / SIGMA).read_bytes())
    content[-100] ^= 1
    (folder / SIGMA).write_bytes(content)


def covariance(change: Callable[[Tensor], Tensor], **others: Tensor) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found = safetensors.torch.load_file(folder / SIGMA)["metric.covariance"]
        rewrite_covariance(folder, change(found), **others)

    return damage


def covariance_is_a_folder(folder: Path) -> None:
    remove(SIGMA)(folder)
    (folder / SIGMA).mkdir()


def larger_than_it_says(folder: Path) -> None:
    rewrite_tensors(folder, metric__sizes=torch.tensor([1e6, 1e7], dtype=torch.float64))


SIGMA_DAMAGES = {
    "missing": (remove(SIGMA), "missing"),
    "a folder": (covariance_is_a_folder, "unreadable"),
    "empty": (truncate(SIGMA, 0), "header"),
    "truncated": (truncate(SIGMA, 0.7), "should hold"),
    "foreign": (write(SIGMA, b"not safetensors"), "header"),
    "its header damaged": (write(SIGMA, b"\x08" + 7 * b"\0" + b"{}{}{}{}"), "header"),
    "one bit flipped": (flip_a_bit_of_the_covariance, "checksum"),
    "other checksum": (fields(covariance_sha256="0" * 64), "checksum"),
    "no checksum": (fields(covariance_sha256=...), "covariance_sha256"),
    "of another width": (covariance(lambda s: s[:11, :11].contiguous()), "should hold"),
    "in float32": (covariance(lambda s: s.float()), "should hold"),
    "with company": (covariance(lambda s: s, extra=torch.zeros(1)), "should hold"),
    "NaN": (covariance(lambda s: s * float("nan")), "NaN"),
    "asymmetric": (covariance(lambda s: asymmetric), "symmetric"),
    "indefinite": (covariance(lambda s: indefinite), "negative"),
    "zero": (covariance(torch.zeros_like), "is zero"),
    "twice as large": (covariance(lambda s: 2 * s), "is not the covariance"),
    "another by 1e-6": (covariance(lambda s: s * (1 + 1e-6)), "is not the covariance"),
    "another off the probe": (covariance(lambda s: s + 1e-3 * torch.eye(12)), "is not the cov"),
    "smaller than it says": (larger_than_it_says, "is not the covariance"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_not_an_edit_is_refused_by_name(saved: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    LRQP.load(saved)
    damage(saved)
    with pytest.raises(SavedEditError, match=message) as caught:
        LRQP.load(saved)
    assert isinstance(caught.value, LRQPError)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("name", SIGMA_DAMAGES)
def test_a_damaged_covariance_is_refused_when_it_is_read(
    saved: Path, name: str, read_at_once: bool
) -> None:
    damage, message = SIGMA_DAMAGES[name]
    assert len(LRQP.load(saved).metric.covariance) == 12
    damage(saved)
    with pytest.raises(SavedEditError, match=message) as caught:
        edit = LRQP.load(saved)
        assert not read_at_once
        edit.state_dict()
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("name", FIRST_VERSION_DAMAGES)
def test_edits_of_the_first_version(clusters: Clusters, saved: Path, name: str) -> None:
    edit = LRQP.load(saved)
    as_first_version(saved)
    old = LRQP.load(saved)
    assert torch.equal(old(clusters[0], 1), edit(clusters[0], 1))
    assert torch.equal(old.metric.covariance, edit.metric.covariance)
    damage, message = FIRST_VERSION_DAMAGES[name]
    damage(saved)
    with pytest.raises(SavedEditError, match=message):
        LRQP.load(saved)


def kinds_of_edits(clusters: Clusters) -> dict[str, LRQP | JointLRQP]:
    """Two classes and more, kept directions, total odds, several variables."""
    x, y = clusters
    three, other = LRQP.fit(x, y), LinearProbe.fit(x, (x[:, 3] > 0).long())
    two = LRQP.fit(x, (y > 0).long(), rule="fixed", log_odds=1.0)
    keeping = three.metric.keeping(other)
    return {
        "three": three,
        "two": two,
        "bfloat16": LRQP.fit(x, y).bfloat16(),
        "total": LRQP(three.probe, three.metric, odds="total"),
        "keeping": LRQP(three.probe, keeping, on_infeasible="skip"),
        "more classes than width": LRQP(
            LinearProbe.from_weights(torch.randn(15, 12), torch.zeros(15)),
            three.metric,
            on_infeasible="skip",
        ),
        "joint": JointLRQP({"a": three, "b": two, "c": other}, three.metric, within={"c": 0.3}),
    }


@pytest.mark.parametrize(
    "kind", ["three", "two", "bfloat16", "total", "keeping", "more classes than width", "joint"]
)
def test_edits_solve_without_their_covariance(
    clusters: Clusters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The same solutions bit for bit, before the file of Σ has been read and after."""
    monkeypatch.setattr(saving, "READ_AT_ONCE", 0)
    reads: list[Path] = []
    read = saving.CovarianceFile.read
    monkeypatch.setattr(
        saving.CovarianceFile, "read", lambda file: reads.append(file.file) or read(file)
    )
    edit = kinds_of_edits(clusters)[kind]
    loaded = type(edit).load(edit.save(tmp_path / "edit"))
    target: Any = {"a": 1, "b": 0} if kind == "joint" else 1
    sources = [clusters[0], clusters[0].float()]
    before = [edit.solve(x, target) for x in sources]
    for name in ("at first", "moved", "copied", "read"):
        if name == "moved":
            loaded.to("cpu", torch.float64 if kind == "three" else None).eval()
        elif name == "copied":
            loaded = copy.deepcopy(loaded)
        elif name == "read":
            assert not reads
            for tensors in (loaded.state_dict(), dict(loaded.named_buffers())):
                assert torch.equal(tensors["metric.covariance"], edit.metric.covariance)
            assert len(reads) == 1 and type(loaded.metric) is Mahalanobis
        for old, new in zip(before, [loaded.solve(x, target) for x in sources], strict=True):
            for field in vars(old):
                # NaN where a variable is not written.
                one, other = (getattr(part, field).nan_to_num(nan=-7) for part in (old, new))
                assert torch.equal(one, other), (name, field)
    if kind == "joint":
        assert JointLRQP(dict(zip("ab", loaded.edits, strict=False))).metric is loaded.metric


def in_place(edit: LRQP) -> None:
    edit.metric.covariance.diagonal().add_(5)


def replaced(edit: LRQP) -> None:
    edit.metric.covariance = torch.eye(12, dtype=torch.float64)


def state_loaded(edit: LRQP) -> None:
    state = edit.state_dict() | {"metric.covariance": torch.eye(12, dtype=torch.float64)}
    edit.load_state_dict(state)


def other_data(edit: LRQP) -> None:
    edit.metric.covariance.data = torch.eye(12, dtype=torch.float64)


def copied_then_changed(edit: LRQP) -> None:
    edit.metric.covariance.diagonal().add_(5)
    edit.metric = copy.deepcopy(edit.metric)


def other_weights(edit: LRQP) -> None:
    edit.probe.weight.mul_(2)


@pytest.mark.parametrize(
    "change",
    [in_place, replaced, state_loaded, other_data, copied_then_changed, other_weights],
    ids=lambda change: change.__name__,
)
def test_what_the_file_keeps_serves_no_other_numbers(
    clusters: Clusters, saved: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
) -> None:
    monkeypatch.setattr(saving, "READ_AT_ONCE", 0)
    edit, x = LRQP.load(saved), clusters[0]
    before = edit(x, 0)
    with torch.no_grad():
        change(edit)
    fresh = LRQP(edit.probe, Mahalanobis(edit.metric.covariance.clone()))
    assert not torch.equal(edit(x, 0), before)
    assert torch.equal(edit(x, 0), fresh(x, 0))


def test_a_covariance_outlives_its_folder(
    clusters: Clusters, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another edit is saved in its place, then the folder removed; a pickle takes it along."""
    whole = LRQP.load(saved)
    monkeypatch.setattr(saving, "READ_AT_ONCE", 0)
    first, second = LRQP.load(saved), LRQP.load(saved)
    LRQP(first.probe, Mahalanobis.euclidean(12)).save(saved)
    third = LRQP.load(saved)
    assert torch.equal(
        first.metric.keeping(torch.ones(12)).covariance[0],
        whole.metric.keeping(torch.ones(12)).covariance[0],
    )
    shutil.rmtree(saved)
    found = pickle.loads(pickle.dumps(second))
    assert torch.equal(found.metric.covariance, whole.metric.covariance)
    assert torch.equal(found(clusters[0], 1), whole(clusters[0], 1))
    again = third.save(saved)
    assert torch.equal(LRQP.load(again).metric.covariance, torch.eye(12).double())


def test_derivatives_of_what_is_kept_are_those_of_the_covariance(
    clusters: Clusters, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, gradients = clusters[0][:5], []
    for most in (1024, 0):
        monkeypatch.setattr(saving, "READ_AT_ONCE", most)
        edit = LRQP.load(saved)
        edit.probe.requires_grad_()
        edit(x, 1).square().sum().backward()
        gradients.append((edit.probe.weight.grad, edit.probe.bias.grad))
        assert float(gradients[-1][0].abs().sum()) > 0
    assert all(map(torch.equal, *gradients))


def test_a_joint_edit_of_two_covariances_is_damaged(clusters: Clusters, tmp_path: Path) -> None:
    joint = kinds_of_edits(clusters)["joint"]
    folder = joint.save(tmp_path / "joint")
    LRQP(joint.edits[1].probe, Mahalanobis.euclidean(12)).save(folder / "1")
    with pytest.raises(SavedEditError, match="different covariances"):
        JointLRQP.load(folder)


def test_a_path_to_a_file_is_refused(saved: Path) -> None:
    for file in (saved / TEXT, saved / NUMBERS):
        with pytest.raises(SavedEditError, match="give the folder"):
            LRQP.load(file)


def test_files_of_two_edits_do_not_mix(clusters: Clusters, saved: Path, tmp_path: Path) -> None:
    other = LRQP.fit(*clusters, l2=1.0).save(tmp_path / "other")
    shutil.copy(other / NUMBERS, saved / NUMBERS)
    with pytest.raises(SavedEditError, match="checksum"):
        LRQP.load(saved)


def test_a_folder_that_cannot_be_written(clusters: Clusters, tmp_path: Path) -> None:
    edit = LRQP.fit(*clusters)
    (tmp_path / "file").write_text("here already")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing/here")):
        with pytest.raises(OutputError, match="cannot write"):
            edit.save(path)
    assert (tmp_path / "file").read_text() == "here already"


def test_the_names_of_classes_are_kept(clusters: Clusters, tmp_path: Path) -> None:
    x, y = clusters
    edit = LRQP.fit(x, [["red", "green", "blue"][label] for label in y])
    edit.save(tmp_path)
    assert LRQP.load(tmp_path).probe.classes == ("blue", "green", "red")
    content = json.loads((tmp_path / "edit.json").read_text())
    for classes in ("abc", ["a", "b"], ["a", "b", 3], {"a": 1}):
        (tmp_path / "edit.json").write_text(json.dumps(content | {"classes": classes}))
        with pytest.raises(SavedEditError, match="classes"):
            LRQP.load(tmp_path)


def test_notes_must_be_json(clusters: Clusters, tmp_path: Path) -> None:
    edit = LRQP.fit(*clusters)
    for note in (torch.zeros(1), float("nan"), object()):
        with pytest.raises((OutputError, NonFiniteError), match=r"plain JSON|notes\.note is NaN"):
            edit.save(tmp_path / "new", note=note)
    assert not (tmp_path / "new").exists()


def test_a_failed_save_leaves_the_old_edit_whole(
    clusters: Clusters, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def full_disk(*_: object) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OutputError, match="no space left"):
        LRQP.fit(*clusters, l2=1.0).save(saved)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    LRQP.load(saved)


def test_the_probe_alone_keeps_its_class(saved: Path) -> None:
    loaded = LRQP.load(saved)
    assert isinstance(loaded.probe, LinearProbe)
    assert isinstance(loaded.metric, Mahalanobis)
