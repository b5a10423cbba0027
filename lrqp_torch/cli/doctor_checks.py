"""What works in this installation: versions, devices, solvers, extras, and a check of a real edit.

Every answer is found by trying, not by reading a list: a solver counts as usable when it has solved
a small program to the same solution as ours, and the engine when it has turned an answer of the
bundled model.
"""

import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from itertools import groupby
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from lrqp_torch import models
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.provenance import package_versions
from lrqp_torch.edits.record import EditRun
from lrqp_torch.errors import LRQPError
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.qp import MahalanobisQP
from lrqp_torch.qp.solvers import ACTIVE_SET, SOLVERS
from lrqp_torch.stream import TESTED_TRANSFORMERS
from lrqp_torch.stream.capture import capture
from lrqp_torch.stream.intervene import Intervention, intervene
from lrqp_torch.stream.replay import Replay
from lrqp_torch.stream.sites import layout_of

SITE = "L2.mid"
"""A site at which the bundled model uses the order of the names."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str  # what
    usable: bool  # whether it works here
    detail: str  # a version, a figure, or what to do about it
    required: bool = False  # whether the package is broken without it


def examine(model: str | None = None) -> dict[str, list[Finding]]:
    """Look at everything, and at the sites of a model that is named; takes some ten seconds.

    The findings stand by heading, in the order in which to read them.
    """
    return {
        "Versions": _versions(),
        "Devices": _devices(),
        "Solvers": _solvers(),
        "Extras": _extras(),
        "Self-check": _self_check(),
        **({} if model is None else {f"Sites of {model}": _sites(model)}),
    }


def _versions() -> list[Finding]:
    oldest, newest = TESTED_TRANSFORMERS[0], TESTED_TRANSFORMERS[-1]
    tested, found = f"tested from {oldest} to {newest}", []
    for name, text in package_versions().items():
        here, detail = text != "not installed", text
        if name == "transformers" and here:
            beyond = Version(text) > Version(newest)
            note = f"newer than what was {tested}; what follows was tried" if beyond else tested
            detail = f"{text} ({note})"
        found.append(Finding(name, here, detail, required=True))
    return found


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
        versions = {requirement.name: _installed(requirement) for requirement in wanted}
        missing = [name for name, text in versions.items() if text is None]
        detail = ", ".join(f"{name} {text}" for name, text in versions.items())
        if missing:
            detail = f"without {', '.join(missing)}: pip install 'lrqp_torch[{extra}]'"
        found.append(Finding(extra, not missing, detail))
    return found


def _installed(requirement: Requirement) -> str | None:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return None
    return found if requirement.specifier.contains(found, True) else None


def _self_check() -> list[Finding]:
    """Capture, an edit, its replay and an edit in generation, of the bundled model."""
    trial = None
    found = []
    for name, check in (
        ("capture", SelfCheck.capture),
        ("an edit of the bundled model", SelfCheck.edit),
        ("replay", SelfCheck.replay),
        ("generation", SelfCheck.generation),
    ):
        try:
            trial = trial or SelfCheck()
            right, detail = check(trial)
        except Exception as error:
            # Whatever is broken here is what the reader wants to know.
            right, detail = False, f"{type(error).__name__}: {error}"
        found.append(Finding(name, right, detail, required=True))
    return found


class SelfCheck:
    """The bundled model with prompts and an edit, on which everything is tried."""

    @torch.no_grad()
    def __init__(self) -> None:
        loaded, tokenizer = models.load("organism")
        self.model: Any = loaded
        train = IOIDataset.generate(tokenizer, n=400, seed=0)
        self.test = IOIDataset.generate(tokenizer, n=64, seed=1, padding_side="left")
        self.rows, self.at = torch.arange(64), self.test.positions["S2"]
        x = capture(self.model, train.inputs, [SITE], train.positions["S2"])[SITE]
        self.fitted = LRQP.fit(x, train.labels["abb"])
        self.clean = self.answers()

    def answers(self) -> torch.Tensor:
        """The logits of the last token, (64, vocabulary)."""
        logits: torch.Tensor = self.model(**self.test.inputs).logits[:, -1]
        return logits

    def opened(self, positions: Any = None) -> AbstractContextManager[EditRun]:
        """The edit of the other order, at S2 or elsewhere."""
        labels = self.test.labels["abb"]
        where = self.at if positions is None else positions
        return self.fitted.at(self.model, SITE, positions=where, target=1 - labels)

    @torch.no_grad()
    def capture(self) -> tuple[bool, str]:
        """Whether the stream after a block is what transformers itself gives."""
        found = capture(self.model, self.test.inputs, ["L2.post"], self.at)["L2.post"]
        given = self.model(**self.test.inputs, output_hidden_states=True).hidden_states[3]
        wrong = float((found - given[self.rows, self.at]).abs().max())
        return wrong < 1e-4, f"the stream is transformers' to {wrong:.0e}"

    @torch.no_grad()
    def edit(self) -> tuple[bool, str]:
        """Whether an edit turns answers and keeps its promise, and none changes nothing."""
        with intervene(self.model, Intervention(SITE, self.at, lambda x, context: x)):
            unchanged = torch.equal(self.answers(), self.clean)
        with self.opened() as run:
            edited = self.answers()
        test, rows = self.test, self.rows
        before, after = (
            logits[rows, test.io_tokens] - logits[rows, test.s_tokens]
            for logits in (self.clean, edited)
        )
        reached = bool((run.log_odds_after >= run.floor).all())
        flipped = float(((before > 0) & (after < 0)).sum() / (before > 0).sum())
        return reached and unchanged and flipped > 0.5, (
            f"{flipped:.0%} of the answers turned, odds {'reached' if reached else 'MISSED'}, "
            f"identity {'exact' if unchanged else 'NOT EXACT'}"
        )

    @torch.no_grad()
    def replay(self) -> tuple[bool, str]:
        """Whether rerunning what an edit can change gives what the whole pass gives."""
        with self.opened():
            whole = self.answers()
        again = Replay(self.model, self.test.inputs, int(self.at.min()))
        with self.opened():
            wrong = float((again.run(first_layer=2) - whole).abs().max())
        return wrong < 1e-3, f"equals the full pass to {wrong:.0e}"

    @torch.no_grad()
    def generation(self) -> tuple[bool, str]:
        """Whether an edit of all tokens that are generated fires at each of them."""
        inputs = {name: self.test.inputs[name] for name in ("input_ids", "attention_mask")}
        new = 4
        with self.opened("generated") as run:
            self.model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        edited = len(run.log_odds_after)
        reached = bool((run.log_odds_after >= run.floor).all())
        right = reached and edited == len(self.rows) * (new - 1)
        return right, f"{edited} tokens edited, odds {'reached' if reached else 'MISSED'}"


def _sites(name: str) -> list[Finding]:
    """Where each block of a model keeps its stream, as found and proven by the cut test."""
    try:
        model, _ = models.load(name)
        layout = layout_of(model)
    except Exception as error:
        return [Finding("sites", False, f"{type(error).__name__}: {error}", required=True)]
    found = []
    for cut, layers in groupby(enumerate(layout.each), key=lambda item: item[1].cut):
        blocks = list(layers)
        first, last = blocks[0][0], blocks[-1][0]
        which = f"L{first}.mid" if first == last else f"L{first}.mid to L{last}.mid"
        why = blocks[0][1].without_mid
        detail = f"a block {why}" if cut is None else f"{cut}; proven by the cut test"
        found.append(Finding(which, cut is not None, detail))
    return found
