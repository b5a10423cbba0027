"""The short summary of a study on the terminal, with the published figures beside it."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.results import StudyResults
from lrqp_torch.study.showing import between, percent, signed
from lrqp_torch.study.summary import findings, key_figures

MOST_ROWS = 30


def print_summary(results: StudyResults, console: Console) -> None:
    """Print the clean run and the sweep as two tables, then what they say."""
    table = Table(title="On held-out prompts", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("quantity")
    table.add_column(str(results.model["name"]), justify="right")
    table.add_column("", justify="right")
    for figure in key_figures(results):
        table.add_row(figure.quantity, figure.own, figure.note)
    console.print(table)
    if results.sites:
        console.print(_site_table(results))
    for line in findings(results):
        wrong = "DISAGREES" in line or "infeasible or inaccurate" in line
        console.print(Text(line, style="bold red" if wrong else ""))


def _site_table(results: StudyResults) -> Table:
    words = results.words
    table = Table(
        title=f"Edits of the belief about {words.variable}, at {words.position}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=f"shares with 95 % intervals; effect: mean {words.preference} ({words.unit}), or "
        "without answers KL (nats); length: Mahalanobis,\ncounterfactual; margin: log odds read "
        "after the edit minus those asked, worst prompt",
        caption_justify="left",
    )
    table.add_column("site", no_wrap=True)
    answered = results.answered is not None
    for heading in (
        "probe\naccuracy",
        "shuffled\nlabels",
        *(("flipped,\ncontrol", "flipped,\ncounter-\nfactual") if answered else ()),
        "effect,\ncontrol",
        "effect,\ncounter-\nfactual",
        "edit\nlength",
        "worst\nmargin",
    ):
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    most = set(sorted(results.sites, key=lambda name: _change(results, name))[-MOST_ROWS:])
    for name, site in results.sites.items():
        if name not in most:
            continue
        edits = (site.control, site.counterfactual)
        flips = [_share(site.control.flipped), _range(site.counterfactual.flipped)]
        effects = [signed((e.logit_difference or e.divergence).known) for e in edits]
        table.add_row(
            name,
            _range(site.probe_accuracy),
            _share(site.shuffled_accuracy),
            *(flips if answered else ()),
            *effects,
            f"{site.counterfactual.distance:.2f}",
            f"{site.worst_log_odds_margin:.0e}".replace("-", "−"),
            style="bold" if name in results.used_sites else "",
        )
    if len(most) < len(results.sites):
        left_out = len(results.sites) - len(most)
        table.caption = f"{table.caption}\n{left_out} more sites, where less changes: results.json"
    return table


def _change(results: StudyResults, name: str) -> tuple[float, float]:
    edit = results.sites[name].counterfactual
    return (edit.flipped and edit.flipped.value) or 0.0, edit.divergence.known


def _share(share: Estimate | None) -> str:
    return percent(None if share is None else share.value)


def _range(share: Estimate | None) -> str:
    return "–" if share is None else f"{_share(share)} ({between(share, 0, 100)})"
