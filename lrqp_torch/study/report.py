"""The short summary of a study on the terminal, with the published figures beside it."""

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lrqp_torch.study.results import SiteResult, StudyResults
from lrqp_torch.study.summary import key_figures, percent

MOST_ROWS = 30


def print_summary(results: StudyResults, console: Console) -> None:
    """Print the clean run and the sweep as two tables, then what they say."""
    console.print(_clean_table(results))
    if results.sites:
        console.print(Group(Text(), _site_table(results), *_findings(results)))


def _clean_table(results: StudyResults) -> RenderableType:
    table = Table(title="On held-out prompts", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("quantity")
    table.add_column(str(results.model["name"]), justify="right")
    table.add_column("GPT-2 small,\npublished", justify="right")
    for figure in key_figures(results):
        table.add_row(figure.quantity, figure.own, figure.published)
    return table


def _site_table(results: StudyResults) -> RenderableType:
    table = Table(
        title="Edits of the belief about the order, at S2",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption="logits: mean IO − S at END; length: Mahalanobis, counterfactual; "
        "margin: log odds read after the edit minus those asked, worst prompt",
        caption_justify="left",
    )
    table.add_column("site", no_wrap=True)
    for heading in (
        "probe\naccuracy",
        "flipped,\ncontrol",
        "flipped,\ncounter-\nfactual",
        "logits,\ncontrol",
        "logits,\ncounter-\nfactual",
        "edit\nlength",
        "worst\nmargin",
    ):
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    shown = _shown(results)
    for name in shown:
        site = results.sites[name]
        table.add_row(
            name,
            percent(site.probe_accuracy),
            percent(site.control.flipped),
            percent(site.counterfactual.flipped),
            _number(site.control.logit_difference),
            _number(site.counterfactual.logit_difference),
            _number(site.counterfactual.distance),
            _number(site.worst_log_odds_margin, ".0e"),
            style="bold" if name in results.used_sites else "",
        )
    if len(shown) < len(results.sites):
        left_out = len(results.sites) - len(shown)
        table.caption = f"{table.caption}\n{left_out} more sites, where fewer flip: results.json"
    return table


def _shown(results: StudyResults) -> list[str]:
    """Every site if they are few, else those that flip most, in order of computation."""

    def flips(name: str) -> float:
        return results.sites[name].counterfactual.flipped or 0.0

    most = set(sorted(results.sites, key=flips, reverse=True)[:MOST_ROWS])
    return [name for name in results.sites if name in most]


def _findings(results: StudyResults) -> list[Text]:
    used = ", ".join(results.used_sites) or "none"
    lines = [
        Text(
            f"The order is used at: {used} (the counterfactual edit flips half of the answers or "
            "more, beyond the control edit)."
        )
    ]
    if results.ground_truth is not None:
        true = ", ".join(results.ground_truth.used_sites) or "none"
        verdict, style = (
            ("the study agrees", "green")
            if results.ground_truth.agrees
            else ("the study DISAGREES", "bold red")
        )
        lines.append(Text.assemble(f"Truly used at: {true}; ", (f"{verdict}.", style)))
        if results.ground_truth.unclear_sites:
            unclear = ", ".join(results.ground_truth.unclear_sites)
            lines.append(Text(f"Not compared, since used in part: {unclear}."))
    failed = sum(_failed(site) for site in results.sites.values())
    if failed:
        lines.append(
            Text(
                f"{failed} edits were infeasible or inaccurate; results.json counts them by site.",
                style="bold red",
            )
        )
    return lines


def _failed(site: SiteResult) -> int:
    return sum(c.infeasible + c.inaccurate for c in (site.control, site.counterfactual))


def _number(value: float, style: str = "z.2f") -> str:
    return f"{value:{style}}".replace("-", "−")
