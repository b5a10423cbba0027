"""What is said of a whole study: its title, its question, its key numbers, and its command."""

import shlex
from dataclasses import fields
from pathlib import Path

from lrqp_torch.study.results import StudyResults
from lrqp_torch.study.settings import Settings
from lrqp_torch.study.showing import between, percent, signed


def title(results: StudyResults) -> str:
    """The report's title."""
    what = results.words.variable if results.published else " / ".join(results.classes)
    name = str(results.model["name"])
    return f"Where {'the ' if name.startswith('organism') else ''}{name} uses {what}"


def subtitle(results: StudyResults) -> str:
    """Size of the model and of the data, in one line."""
    words = [
        f"{results.model['class']}, {_size(results.model['parameters'])} parameters",
        f"{results.data['train']} prompts fitted, {results.data['test']} held out",
        {"plain": "no prefix", "prefixed": "a sentence before each prompt"}.get(results.task, ""),
        f"seed {results.settings['seed']}",
    ]
    return "; ".join(filter(None, words))


def question(results: StudyResults) -> str:
    """What the study asks, for a reader who has not met the task."""
    if results.words.question:
        return results.words.question
    return (
        f"Each prompt has one of the classes {', '.join(results.classes)}. A probe shows where it "
        "can be read at the marked token. But what can be read need not be used. So the activation "
        "there is moved to the nearest point, in Mahalanobis distance, at which the probe believes "
        "another class, and the model goes on from there: where it uses the class, its answer "
        "follows."
    )


def key_figures(results: StudyResults) -> list[tuple[str, str, str]]:
    """The numbers of the clean run and of the strongest edit, as they are shown.

    Each is the number, what it is, and a note on it: the published one, or its interval.
    """
    clean, words = results.clean, results.words
    best = results.strongest
    edited = None if best is None else best.counterfactual
    rows = [
        ("logit_difference", f"mean {words.preference}", clean.logit_difference, False),
        ("accuracy", f"prompts answered {words.held}", clean.accuracy, True),
        ("io_probability", f"mean probability of {words.held}", clean.io_probability, True),
    ]
    if edited is not None and edited.logit_difference is None:
        rows.append(
            ("", f"nats of change, edited at {results.best_site}", edited.divergence, False)
        )
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


def _size(parameters: int) -> str:
    for unit, name in ((1_000_000_000, " billion"), (1_000_000, " million")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{name}"
    return f"{parameters:,}"
