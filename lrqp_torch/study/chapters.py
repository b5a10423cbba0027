"""The study's parts in their order, with what each asks; and the report's chapters made of them."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lrqp_torch.errors import SettingError
from lrqp_torch.study import (
    circuit,
    compare,
    controls,
    dose,
    flipping_view,
    geometry,
    heads,
    mediation,
    probing,
)
from lrqp_torch.study.context import Advance
from lrqp_torch.study.flipping import TaskFlipping
from lrqp_torch.study.html import Section
from lrqp_torch.study.part_store import Given, Part
from lrqp_torch.study.prompt_texts import PromptTexts
from lrqp_torch.study.results import StudyResults

FLIPPING = "flipping"
OTHER_TASK = "other_task"
"""Under this name the sweep of the other task is kept."""

TITLES = {FLIPPING: "Flipping the answer"}


def _geometry(given: Given, advance: Advance) -> Any:
    return geometry.compute(given.context, advance=advance)


def _probing(given: Given, advance: Advance) -> Any:
    return probing.compute(given.context, advance=advance)


def _dose(given: Given, advance: Advance) -> Any:
    settings = given.settings
    return dose.compute(
        given.context,
        given.site,
        log_odds=settings.log_odds,
        l2=settings.l2,
        shrinkage=settings.shrinkage,
        advance=advance,
    )


def _heads(given: Given, advance: Advance) -> Any:
    return heads.compute(given.context, advance=advance)


def _circuit(given: Given, advance: Advance) -> Any:
    edit = given.edit_at(given.site)
    return circuit.compute(given.context, given.site, edit, given.results["heads"], advance=advance)


def _mediation(given: Given, advance: Advance) -> Any:
    edit = given.edit_at(given.site)
    return mediation.compute(
        given.context, given.site, edit, given.results["heads"], advance=advance
    )


def _compare(given: Given, advance: Advance) -> Any:
    edits = {given.site: given.edit_at(given.site)}
    return compare.compute(given.context, edits, given.results["heads"], advance=advance)


def _controls(given: Given, advance: Advance) -> Any:
    settings = given.settings
    return controls.compute(
        given.context,
        given.site,
        given.edit_at(given.site),
        given.results["heads"],
        l2=settings.l2,
        shrinkage=settings.shrinkage,
        advance=advance,
    )


PARTS: tuple[Part, ...] = (
    Part(
        "geometry",
        "Geometry without labels",
        "Does the order of the names show among the largest differences between prompts, before "
        "any probe is told what to look for?",
        geometry,
        _geometry,
    ),
    Part(
        "probing",
        "What probes can read",
        "Which facts about a prompt can a linear probe read from the clean activations, and how "
        "much of that is more than chance, or than what shuffled labels would give?",
        probing,
        _probing,
    ),
    Part(
        "dose",
        "How much belief it takes",
        "An edit can ask its probe for any odds. From which odds on does the answer turn, and does "
        "asking for more change more?",
        dose,
        _dose,
        needs=(FLIPPING,),
    ),
    Part(
        "heads",
        "What the attention heads do",
        "Which heads look where, which of them write the answer, and which published role of the "
        "circuit does each one play?",
        heads,
        _heads,
    ),
    Part(
        "circuit",
        "What the edit does to the circuit",
        "Do the heads between the edit and the answer report the new belief, and do the name "
        "movers follow it? In a model without name movers, answer writers take their place.",
        circuit,
        _circuit,
        needs=(FLIPPING, "heads"),
    ),
    Part(
        "mediation",
        "Through which attention the edit works",
        "If the name movers' attention is put back to where it was, does the answer come back too? "
        "And does their attention under the edit, put into a clean run, suffice to turn it? "
        "In a model without name movers, answer writers take their place.",
        mediation,
        _mediation,
        needs=(FLIPPING, "heads"),
    ),
    Part(
        "compare",
        "LRQP beside other edits",
        "What do other ways to write the same belief at the same place do to the answer, to all "
        "else that the model says, and to what independent probes read? Is LRQP the better choice?",
        compare,
        _compare,
        needs=(FLIPPING, "heads"),
        by_name_only=True,  # it trains edits, which takes as long as all else together
    ),
    Part(
        "controls",
        "Is the edit an illusion?",
        "An edit can change an answer along a direction that means nothing to the model. Does this "
        "one act through what later parts of the model read, does it act elsewhere too, and what "
        "do edits do that know nothing of the order?",
        controls,
        _controls,
        needs=(FLIPPING, "heads"),
    ),
)
NAMES = (FLIPPING, *(part.name for part in PARTS))


def choose(names: str) -> list[str]:
    """Parts to run, in order, with those that they need.

    Args:
        names: part names separated by commas; ``all`` stands for every part but those that run
            only when they are named.

    Raises:
        SettingError: a name that is no part, or no name at all.
    """
    asked = {name.strip() for name in names.split(",") if name.strip()}
    if "all" in asked:
        by_name = {part.name for part in PARTS if part.by_name_only}
        asked = (asked - {"all"}) | (set(NAMES) - by_name)
    unknown = sorted(asked - set(NAMES))
    if unknown or not asked:
        found = f"unknown part {unknown[0]!r}" if unknown else "no part given"
        raise SettingError(f"{found}; choose from {', '.join(NAMES)}, or say all.")
    needed = {need for part in PARTS if part.name in asked for need in part.needs}
    return [name for name in NAMES if name in asked | needed]


def sections(
    results: StudyResults, prompts: Mapping[str, Tensor], texts: PromptTexts
) -> list[Section]:
    """The report's chapters: the sweep, then every other part that the results hold.

    Args:
        results: the study's figures.
        prompts: the per-prompt tensors, as in ``prompts.safetensors``.
        texts: the prompts' words, in the same order.
    """
    chapters = list(_flipping(results, prompts, texts))
    for part in PARTS:
        raw = results.parts.get(part.name)
        if raw is not None:
            panels = part.module.panels(part.module.from_json(raw))
            chapters.append(Section(part.title, part.text, panels))
    return chapters


def _flipping(
    results: StudyResults, prompts: Mapping[str, Tensor], texts: PromptTexts
) -> Iterable[Section]:
    if results.best_site is None:
        return
    panels = [flipping_view.sweep_panel(results.clean, results.sites, results.used_sites)]
    raw = results.parts.get(OTHER_TASK)
    if raw is not None:
        other = TaskFlipping.from_json(raw)
        own = "plain" if results.settings["prefixes"] == "none" else "prefixed"
        panels.append(flipping_view.tasks_panel(own, results.sites, other))
    panels.append(flipping_view.answers_panel(results.sites, results.best_site, prompts, texts))
    yield Section(
        TITLES[FLIPPING],
        "At each site a probe for the order is fitted to the activations at S2 of the training "
        "prompts. On held-out prompts the activation there is replaced by the nearest one at which "
        "the probe believes the order that is true (control) or the other one (counterfactual), "
        "and the model goes on from there. If the counterfactual edit turns the answer, the model "
        "uses the order at that site; what the probe reads shows only that it could.",
        panels,
    )
