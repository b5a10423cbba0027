"""What a study of your own says in sentences, on the page and on the terminal."""

import shlex
from pathlib import Path

from lrqp_torch.study.by_site import in_ranges
from lrqp_torch.study.flipping import USED_THRESHOLD
from lrqp_torch.study.summary import percent, promise_in_words, signed
from lrqp_torch.tasks.results import Condition, Mean, Share, TaskResults

KNOWABLE = 0.95
"""A probe that is right on this share of the held-out prompts reads the class reliably."""


def question(results: TaskResults) -> str:
    """What the study asks."""
    return (
        f"Each prompt has one of the classes {', '.join(results.classes)}. A probe shows where it "
        "can be read at the marked token. But what can be read need not be used. So the activation "
        "there is moved to the nearest point, in Mahalanobis distance, at which the probe believes "
        "another class, and the model goes on from there: where it uses the class, its answer "
        "follows."
    )


def subtitle(results: TaskResults) -> str:
    """Model and data in one line."""
    return (
        f"{results.model['class']}, {results.model['parameters']:,} parameters; "
        f"{results.data['train']} prompts fitted, {results.data['test']} held out; "
        f"seed {results.settings['seed']}"
    )


def findings(results: TaskResults) -> list[str]:
    """What the numbers say, a sentence or two each."""
    order = list(results.sites)
    known = [name for name, site in results.sites.items() if (site.probe.value or 0) >= KNOWABLE]
    lines = [
        f"Knowable: a probe is right on {percent(KNOWABLE, 0)} of the held-out prompts or more at "
        f"{in_ranges(known, order)}; always naming the most frequent class is right on "
        f"{percent(results.majority)}."
    ]
    best = results.sites[results.best_site]
    counterfactual, control = best.counterfactual, best.control
    if results.answered is None or counterfactual.flipped is None or control.flipped is None:
        lines += [
            "The prompts have no answers, so no flip can be counted, and no site is said to be "
            "used. The effect of an edit is how much it changes the next token.",
            f"The counterfactual edit changes it most at {results.best_site}: by "
            f"{mean_in_words(counterfactual.divergence)} nats, where the control edit changes it "
            f"by {mean_in_words(control.divergence)}.",
        ]
    else:
        lines.append(
            f"Without an edit, the model answers with the class that holds on "
            f"{share_in_words(results.answered)} of the held-out prompts."
        )
        if not results.answered.count:
            lines.append("None is left whose answer could flip, so no site is said to be used.")
        else:
            lines += [
                f"Used: the counterfactual edit flips {percent(USED_THRESHOLD, 0)} of these "
                f"answers or more, beyond what the control edit flips, at "
                f"{in_ranges(results.used_sites, order)}.",
                f"The strongest edit, at {results.best_site}, flips "
                f"{share_in_words(counterfactual.flipped)}, the control edit there "
                f"{share_in_words(control.flipped)}.",
            ]
    failed = sum(c.failed for s in results.sites.values() for c in (s.control, s.counterfactual))
    margin = min(site.worst_log_odds_margin for site in results.sites.values())
    return [*lines, promise_in_words(failed, margin)]


def command(results: TaskResults, folder: Path) -> str:
    """The command that writes these results again."""
    settings = {"model": results.model["name"], **results.settings}
    words = [
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in settings.items()
        if value is not None
    ]
    return " ".join(["lrqp", "study", *words, "--out", shlex.quote(str(folder))])


def measured(condition: Condition) -> Mean:
    """What is shown of an edit's effect: the preference, or without answers the divergence."""
    return condition.divergence if condition.preference is None else condition.preference


def effect_title(results: TaskResults) -> str:
    """What :func:`measured` is, for an axis."""
    if results.preference is None:
        return "Change of the next token, KL (nats)"
    return "Mean preference, class that holds − other (nats)"


def share_in_words(share: Share) -> str:
    """A share with its count and interval."""
    low, high = share.interval
    return (
        f"{percent(share.value)} ({share.count} of {share.of}; 95 % interval "
        f"{100 * low:.1f} to {100 * high:.1f} %)"
    )


def mean_in_words(mean: Mean) -> str:
    """A mean with its interval."""
    low, high = mean.interval
    return f"{signed(mean.value)} ({signed(low)} to {signed(high)})"
