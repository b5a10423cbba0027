"""The key numbers of a whole study, and its command; other words are in ``words/study.jinja``."""

import shlex
from dataclasses import fields
from pathlib import Path

from lrqp_torch.study.results import StudyResults
from lrqp_torch.study.settings import Settings
from lrqp_torch.study.showing import between, percent, signed


def key_figures(results: StudyResults) -> list[tuple[str, str, str]]:
    """The numbers of the clean run and of the strongest edit, as they are shown.

    Each is the number, what it is, and a note on it: the published one, or its interval.
    """
    clean, words, best = results.clean, results.words, results.strongest
    edited = None if best is None else best.counterfactual
    rows = [
        ("logit_difference", f"mean {words.preference}", clean.logit_difference, False),
        ("accuracy", f"prompts answered {words.held}", clean.accuracy, True),
        ("io_probability", f"mean probability of {words.held}", clean.io_probability, True),
    ]
    if edited is not None and edited.logit_difference is None:
        name = f"nats of change, edited at {results.best_site}"
        rows.append(("", name, edited.divergence, False))
    elif edited is not None:
        name = f"mean {words.preference}, edited at {results.best_site}"
        rows.append(("position_inverted", name, edited.logit_difference, False))
    found = []
    for key, quantity, value, share in rows:
        if value is None:
            continue
        published = results.published.get(key)
        note = f"95 % interval {between(value, 1 if share else 2, 100 if share else 1)}"
        if published is not None:
            number = percent(published.value) if share else signed(published.value)
            note = f"GPT-2 small, published: {number}"
        shown = percent(value.value) if share else signed(value.known)
        found.append((shown, quantity, note))
    return found


def command(results: StudyResults, folder: Path) -> str:
    """The command that writes these results again, with what was not left at its default."""
    defaults = {field.name: field.default for field in fields(Settings)}
    words = ["lrqp", "study" if "data" in results.settings else "reproduce"]
    if words[1] == "study":
        defaults["parts"] = "flipping"
    for name, value in results.settings.items():
        if name != "model" and (value == defaults.get(name) or value is None):
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            words += [option, shlex.quote(str(value))]
    return " ".join([*words, "--out", shlex.quote(str(folder))])
