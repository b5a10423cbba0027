"""What fits and edits of your own say on the terminal."""

import math
from collections.abc import Mapping, Sequence

from rich.console import Console

from lrqp_torch.edits.provenance import Provenance
from lrqp_torch.plot.chart import Table
from lrqp_torch.study.editing import Applied, HeldOut
from lrqp_torch.study.report.terminal import as_rich
from lrqp_torch.study.showing import between, percent, signed


def print_fit(
    label: str,
    classes: Sequence[str],
    fitted: int,
    majority: float,
    tried: Mapping[str, HeldOut],
    console: Console,
) -> None:
    """Say how well the probes of one label read prompts held out, and what edits of these reach."""
    columns = ("site", "probe\naccuracy", "95 %\ninterval", "odds\nreached", "worst\nmargin",
               "edit\nlength")  # fmt: skip
    rows = [
        (
            site,
            percent(found.accuracy.value),
            between(found.accuracy, 1, 100),
            f"{found.reached} of {found.prompts}",
            f"{found.worst_log_odds_margin:.0e}",
            f"{found.distance:.2f}",
        )
        for site, found in tried.items()
    ]
    held_out = next(iter(tried.values())).prompts
    title = (
        f"{label}: {', '.join(classes)}; {fitted} prompts fitted, {held_out} held out; always\n"
        f"naming the most frequent class is right on {percent(majority)}"
    )
    caption = (
        "on prompts held out; edits are to the next class; margin: log odds read after the edit\n"
        "minus those asked, worst prompt; length: Mahalanobis"
    )
    console.print(as_rich(Table(columns, rows), title, caption))


def print_applied(
    found: Sequence[Applied], origin: Provenance, show: int, console: Console
) -> None:
    """Print what an edit did to the first prompts, and what it did to all."""
    for item in found[:show]:
        lines = [
            f"\n{item.prompt}",
            f"  belief in {item.target}: {_chance(item.belief_before)} → "
            f"{_chance(item.belief_after)} (log odds {signed(item.belief_before)} → "
            f"{signed(item.belief_after)}; edit of length {item.distance:.2f} at {origin.site})",
        ]
        if item.lead_before is not None and item.lead_after is not None:
            lines.append(
                f"  answers with {item.target} rather than another: "
                f"{signed(item.lead_before)} → {signed(item.lead_after)} nats"
            )
        lines.append(f"  next: {_tokens(item.next_before)}")
        lines.append(f"     →  {_tokens(item.next_after)}")
        if item.continued_before is not None:
            lines.append(f"  goes on: {item.continued_before!r}")
            lines.append(f"        →  {item.continued_after!r}")
        console.print("\n".join(lines), markup=False)
    left_out = len(found) - min(show, len(found))
    if left_out:
        console.print(f"\n{left_out} more prompts: see --show and --json.", markup=False)
    console.print(f"\n{_total(found)}", markup=False)


def _total(found: Sequence[Applied]) -> str:
    count = len(found)
    believed = sum(item.belief_after > 0 for item in found)
    text = f"Of {count} prompts, the probe reads the target on {believed} after the edit"
    leads = [
        (item.lead_before, item.lead_after)
        for item in found
        if item.lead_before is not None and item.lead_after is not None
    ]
    if leads:
        before, after = (sum(value > 0 for value in column) for column in zip(*leads, strict=True))
        return (
            f"{text}; the model answers with the target on {after}, without the edit on {before}."
        )
    changed = sum(item.next_before[0][0] != item.next_after[0][0] for item in found)
    return f"{text}; the likeliest next token changes on {changed}."


def _chance(log_odds: float) -> str:
    """The probability of a class against its strongest rival."""
    return f"{100 / (1 + math.exp(-max(-700.0, log_odds))):.2f} %"


def _tokens(tokens: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{token!r} {100 * chance:.0f} %" for token, chance in tokens)
