"""The head of the report in words: what was asked, the key numbers, and what they say."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from lrqp_torch.study.estimates import wilson
from lrqp_torch.study.flipping import USED_THRESHOLD
from lrqp_torch.study.results import StudyResults
from lrqp_torch.study.settings import Settings

CERTAIN_PROBE = 0.95
"""A probe that is right on this share of the held-out prompts reads the order reliably."""

NO_BREAK = "\u00a0"


@dataclass(frozen=True)
class KeyFigure:
    """One number of this run beside the published one of GPT-2 small, as they are shown."""

    quantity: str
    own: str
    published: str


def title(results: StudyResults) -> str:
    """The report's title."""
    return f"Where {results.model['name']} uses the order of two names"


def subtitle(results: StudyResults) -> str:
    """Size of the model and of the data, in one line."""
    prefix = results.settings["prefixes"]
    task = "no prefix" if prefix == "none" else "a sentence before each prompt"
    return (
        f"{results.model['class']}, {_size(results.model['parameters'])} parameters; "
        f"{results.data['train']} prompts fitted, {results.data['test']} held out; {task}; "
        f"seed {results.settings['seed']}"
    )


def question(results: StudyResults) -> str:
    """What the study asks, for a reader who has not met the task."""
    return (
        "In “When Mary and John went to the store, John gave a drink to”, the right answer is the "
        "name that was not repeated: Mary, the indirect object (IO), and not John, the subject "
        "(S). To tell, a model can keep track of which of the two names came first when it meets "
        "the second “John” (the token S2). A probe shows where that order can be read. But what "
        "can be read need not be used. So the activation at S2 is moved to the nearest point, in "
        "Mahalanobis distance, at which the probe believes the other order, and the model goes on "
        "from there: where it uses the order, its answer turns from IO to S."
    )


def key_figures(results: StudyResults) -> list[KeyFigure]:
    """The numbers of the clean run and of the strongest edit, beside the published ones."""
    clean, published = results.clean, results.published
    figures = [
        KeyFigure(
            f"mean logit difference IO{NO_BREAK}−{NO_BREAK}S",
            signed(clean.logit_difference),
            signed(published["logit_difference"].value),
        ),
        KeyFigure(
            "prompts answered IO", percent(clean.accuracy), percent(published["accuracy"].value)
        ),
        KeyFigure(
            "mean probability of IO",
            percent(clean.io_probability, digits=0),
            percent(published["io_probability"].value, digits=0),
        ),
    ]
    if results.best_site is not None:
        edited = results.sites[results.best_site].counterfactual.logit_difference
        figures.append(
            KeyFigure(
                f"mean logit difference, order inverted at {results.best_site}",
                signed(edited),
                signed(published["position_inverted"].value),
            )
        )
    return figures


def findings(results: StudyResults) -> list[str]:
    """What the numbers say, a sentence or two each."""
    clean = results.clean
    right = round(clean.accuracy * clean.prompts)
    lower, upper = wilson(right, clean.prompts)
    lines = [
        f"Without any edit, {results.model['name']} puts IO above S on {right} of "
        f"{clean.prompts} held-out prompts ({_range(lower, upper)} with 95 % confidence)."
    ]
    if results.best_site is None:
        return lines
    sites = results.sites
    readable = [name for name, site in sites.items() if site.probe_accuracy >= CERTAIN_PROBE]
    lines.append(
        f"Readable: a probe reads the order right on {percent(CERTAIN_PROBE, digits=0)} of the "
        f"held-out prompts or more at {_sites(readable, len(sites))}."
    )
    lines.append(
        f"Used: the counterfactual edit flips {percent(USED_THRESHOLD, digits=0)} of the answers, "
        f"beyond what the control edit flips, at "
        f"{_sites(results.used_sites, len(sites))}."
    )
    lines.append(_strongest(results))
    lines += _truth(results)
    margin = min(site.worst_log_odds_margin for site in sites.values())
    failed = sum(
        condition.infeasible + condition.inaccurate
        for site in sites.values()
        for condition in (site.control, site.counterfactual)
    )
    return [*lines, promise_in_words(failed, margin)]


def promise_in_words(failed: int, margin: float) -> str:
    """Whether the edits kept their promise: how many failed, and the worst log odds margin."""
    if failed:
        return f"{failed} edits were infeasible or inaccurate; see the table of sites."
    if margin >= 0:
        return (
            "Every edit reached the odds asked of its probe, read back from the very numbers that "
            "the model received."
        )
    return f"The worst edit missed the log odds asked of its probe by {-margin:.1g}."


def command(results: StudyResults, folder: Path) -> str:
    """The command that writes these results again, with what was not left at its default."""
    defaults = {field.name: field.default for field in fields(Settings)}
    words = ["lrqp", "reproduce"]
    for name, value in results.settings.items():
        if name != "model" and (value == defaults.get(name) or value is None):
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            words += [option, shlex.quote(str(value))]
    return " ".join([*words, "--out", shlex.quote(str(folder))])


def signed(value: float) -> str:
    """A difference of logits, with its sign."""
    return f"{value:+z.2f}".replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str:
    """A share in per cent; a dash for none."""
    return "–" if share is None else f"{100 * share:.{digits}f}{NO_BREAK}%"


def _strongest(results: StudyResults) -> str:
    best = results.sites[str(results.best_site)]
    control, counterfactual = best.control, best.counterfactual
    published = results.published["position_inverted"].value
    return (
        f"The strongest edit, at {results.best_site}, flips {percent(counterfactual.flipped)} of "
        f"the answers and takes the mean logit difference from "
        f"{signed(results.clean.logit_difference)} to {signed(counterfactual.logit_difference)}. "
        f"The control edit there, which writes the order that is true, flips "
        f"{percent(control.flipped)}. In GPT-2 small, inverting the position signal and keeping "
        f"the names' tokens was published to give {signed(published)}."
    )


def _truth(results: StudyResults) -> list[str]:
    truth = results.ground_truth
    if truth is None:
        return []
    verdict = "agrees with that" if truth.agrees else "DISAGREES with that"
    line = (
        "This model was trained so that the truth is known: it uses the order at "
        f"{_sites(truth.used_sites, len(results.sites))}. The study {verdict}."
    )
    if truth.unclear_sites:
        line += f" Used in part, so not compared: {', '.join(truth.unclear_sites)}."
    return [line]


def _sites(names: list[str], among: int) -> str:
    if not names:
        return "no site"
    if len(names) == among:
        return f"all {among} sites"
    return f"{len(names)} of {among} sites: {', '.join(names)}"


def _range(lower: float, upper: float) -> str:
    return f"{100 * lower:.1f} to {100 * upper:.1f}{NO_BREAK}%"


def _size(parameters: int) -> str:
    for unit, name in ((1_000_000_000, " billion"), (1_000_000, " million")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{name}"
    return f"{parameters:,}"
