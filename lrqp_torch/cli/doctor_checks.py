"""What works in this installation: versions, devices, solvers, extras, and a check of a real edit.

Every answer is found by trying, not by reading a list: a solver counts as usable when it has solved
a small program to the same solution as ours, and the engine when it has turned an answer of the
bundled model.
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version

import torch
from packaging.requirements import Requirement

from lrqp_torch import models
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.provenance import package_versions
from lrqp_torch.errors import LRQPError
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.qp import MahalanobisQP
from lrqp_torch.qp.solvers import ACTIVE_SET, SOLVERS
from lrqp_torch.stream.capture import capture
from lrqp_torch.stream.intervene import Intervention, intervene

SITE = "L2.mid"
"""A site at which the bundled model uses the order of the names."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        usable: whether it works here.
        detail: a version, a figure, or what to do about it.
        required: whether the package is broken without it.
    """

    name: str
    usable: bool
    detail: str
    required: bool = False


def examine() -> dict[str, list[Finding]]:
    """Look at everything; takes some ten seconds.

    Returns:
        Heading to findings, in the order in which to read them.
    """
    return {
        "Versions": _versions(),
        "Devices": _devices(),
        "Solvers": _solvers(),
        "Extras": _extras(),
        "Self-check": _self_check(),
    }


def _versions() -> list[Finding]:
    return [
        Finding(name, text != "not installed", text, required=True)
        for name, text in package_versions().items()
    ]


def _devices() -> list[Finding]:
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    found = [Finding("cpu", True, threads, required=True)]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            detail = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
            found.append(Finding(f"cuda:{index}", True, detail))
    else:
        built = torch.version.cuda
        detail = (
            f"torch is built for CUDA {built} but sees no GPU"
            if built
            else "this torch is built without CUDA"
        )
        found.append(Finding("cuda", False, detail))
    if torch.backends.mps.is_available():
        found.append(Finding("mps", False, "has no float64, in which programs are solved"))
    return found


@torch.no_grad()
def _solvers() -> list[Finding]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, target, weight, bias = normal(6, 8), torch.arange(6) % 3, normal(3, 8), normal(3)
    factor = normal(8, 8)
    problem = (x, target, 5.0, weight, bias, factor @ factor.T)
    expected = MahalanobisQP(3).forward(*problem)
    found = []
    for name in SOLVERS:
        try:
            solution = MahalanobisQP(3, solver=name).forward(*problem)
        except LRQPError as error:
            found.append(Finding(name, False, str(error)))
            continue
        wrong = float((solution.x_new - expected.x_new).abs().max())
        detail = "the default" if name == ACTIVE_SET else f"agrees with ours to {wrong:.0e}"
        found.append(Finding(name, wrong < 1e-3, detail, required=name == ACTIVE_SET))
    return found


def _extras() -> list[Finding]:
    found = []
    try:
        package = metadata("lrqp_torch")
    except PackageNotFoundError:
        return [Finding("all", False, "unknown: lrqp_torch runs from a folder, not installed")]
    requirements = [Requirement(text) for text in package.get_all("Requires-Dist") or []]
    for extra in package.get_all("Provides-Extra") or []:
        wanted = [
            requirement
            for requirement in requirements
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
        ]
        texts = [_installed(requirement) for requirement in wanted]
        missing = [name for name, text in texts if text is None]
        detail = ", ".join(f"{name} {text}" for name, text in texts if text is not None)
        if missing:
            command = f"pip install 'lrqp_torch[{extra}]'"
            detail = f"without {', '.join(missing)}: {command}"
        found.append(Finding(extra, not missing, detail))
    return found


def _installed(requirement: Requirement) -> tuple[str, str | None]:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return requirement.name, None
    return requirement.name, found if requirement.specifier.contains(found, True) else None


def _self_check() -> list[Finding]:
    checks: dict[str, Callable[[], Finding]] = {"an edit of the bundled model": _edit_a_model}
    found = []
    for name, check in checks.items():
        try:
            found.append(check())
        except Exception as error:
            # Whatever is broken here is what the reader wants to know.
            text = f"{type(error).__name__}: {error}"
            found.append(Finding(name, False, text, required=True))
    return found


@torch.no_grad()
def _edit_a_model() -> Finding:
    name = "an edit of the bundled model"
    model, tokenizer = models.load("organism")
    train = IOIDataset.generate(tokenizer, n=400, seed=0)
    test = IOIDataset.generate(tokenizer, n=64, seed=1)
    labels, positions = test.labels["abb"], test.positions["S2"]
    rows = torch.arange(len(test))

    def answers() -> torch.Tensor:
        logits = model(**test.inputs).logits[rows, test.positions["END"]]
        difference: torch.Tensor = logits[rows, test.io_tokens] - logits[rows, test.s_tokens]
        return difference

    x = capture(model, train.inputs, [SITE], train.positions["S2"])[SITE]
    edit = LRQP.fit(x, train.labels["abb"])
    clean = answers()
    with intervene(model, Intervention(SITE, positions, lambda x, context: x)):
        unchanged = torch.equal(answers(), clean)
    with edit.at(model, SITE, positions=positions, target=1 - labels, source=labels) as run:
        edited = answers()
    reached = bool((run.log_odds_after >= run.floor).all())
    flipped = float(((clean > 0) & (edited < 0)).sum() / (clean > 0).sum())
    detail = (
        f"{flipped:.0%} of the answers turned, odds {'reached' if reached else 'MISSED'}, identity "
        f"{'exact' if unchanged else 'NOT EXACT'}"
    )
    return Finding(name, reached and unchanged and flipped > 0.5, detail, required=True)
