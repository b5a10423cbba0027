"""The sweep of edits for the interactive report: by site, and prompt by prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lrqp_torch.study.by_site import TASK_COLOURS, TASK_SYMBOLS, task_in_words
from lrqp_torch.study.drawing import CLEAN, CONTROL, COUNTERFACTUAL, NOTE, PROBE
from lrqp_torch.study.flipping import CONDITIONS, USED_THRESHOLD, TaskFlipping
from lrqp_torch.study.interactive import add_line, new_figure
from lrqp_torch.study.panel import Panel, Table
from lrqp_torch.study.prompt_texts import PromptTexts
from lrqp_torch.study.results import CleanResult, SiteResult
from lrqp_torch.study.summary import percent, signed

MOST_POINTS = 500
"""Held-out prompts drawn at each site; the numbers are of all of them."""

COLOURS = {"control": CONTROL, "counterfactual": COUNTERFACTUAL}
SYMBOLS = {"control": "circle", "counterfactual": "square"}


def sweep_panel(clean: CleanResult, sites: Mapping[str, SiteResult], used: Sequence[str]) -> Panel:
    """Probe accuracy beside the share of answers flipped, and the logit difference, by site.

    Args:
        clean: the run without edits.
        sites: the sweep's summary.
        used: sites to shade.
    """
    figure = new_figure(
        x_title="", y_title="Held-out prompts (%)", panes=("", ""), down=True, y_range=None
    )
    names = list(sites)

    def shares(values: list[float | None]) -> list[float | None]:
        return [None if value is None else 100 * value for value in values]

    accuracy = [site.probe_accuracy for site in sites.values()]
    curves: list[tuple[str, list[float | None], str, str]] = [
        ("probe accuracy", shares([*accuracy]), PROBE, "circle"),
        *(
            (
                f"flipped, {condition} edit",
                shares([getattr(site, condition).flipped for site in sites.values()]),
                COLOURS[condition],
                {"control": "triangle-up", "counterfactual": "square"}[condition],
            )
            for condition in reversed(CONDITIONS)
        ),
    ]
    for label, values, colour, symbol in curves:
        add_line(
            figure, label, names, values, colour=colour, symbol=symbol, hover="%{x}: %{y:.1f} %"
        )
    for condition in reversed(CONDITIONS):
        add_line(
            figure,
            f"logits, {condition} edit",
            names,
            [getattr(site, condition).logit_difference for site in sites.values()],
            colour=COLOURS[condition],
            symbol={"control": "triangle-up", "counterfactual": "square"}[condition],
            pane=(2, 1),
            legend=False,
            hover="%{x}: %{y:+.2f}",
        )
    for site in used:
        column = names.index(site)
        figure.add_vrect(
            x0=column - 0.5,
            x1=column + 0.5,
            fillcolor=COUNTERFACTUAL,
            opacity=0.11,
            line_width=0,
            layer="below",
        )
    figure.add_hline(y=50, line={"color": NOTE, "dash": "dot", "width": 1}, row=1, col=1)
    figure.add_hline(
        y=clean.logit_difference, line={"color": CLEAN, "dash": "dash", "width": 1.4}, row=2, col=1
    )
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=names, tickangle=-45)
    figure.update_xaxes(range=[-0.6, len(names) - 0.4])
    figure.update_yaxes(range=[-4, 104], row=1, col=1)
    figure.update_yaxes(title_text="Mean IO − S (logits)", row=2, col=1)
    # The space between the panes is for titles, which these two do without.
    figure.update_yaxes(domain=[0.46, 1], row=1, col=1)
    figure.update_yaxes(domain=[0, 0.4], row=2, col=1)
    figure.update_layout(height=620, margin={"l": 70, "r": 20, "t": 40, "b": 60})
    return Panel(
        name="flipping-sweep",
        title="What can be read, and what is used",
        text="One site is edited at a time, at S2, on prompts that neither the probe nor the "
        "metric has seen. Above: how often the probe reads the order right, and how many answers "
        "each edit turns from IO to S; sites at which the counterfactual edit flips at least "
        f"{100 * USED_THRESHOLD:.0f} % more than the control edit are shaded, and the dotted line "
        "is chance for the probe. "
        "Below: the mean logit difference; the dashed line is the model without an edit. The "
        "control edit writes the order that is true, so it should change nothing.",
        figures={"": figure},
        table=sites_table(sites),
    )


def tasks_panel(task: str, sites: Mapping[str, SiteResult], other: TaskFlipping) -> Panel:
    """Probe accuracy and answers flipped, with and without a sentence before the prompt.

    Args:
        task: name of the study's own task.
        sites: its sweep.
        other: the other task's sweep.
    """
    panes = ("probe accuracy", "answers flipped by the counterfactual edit")
    figure = new_figure(
        x_title="", y_title="Held-out prompts (%)", panes=panes, down=True, y_range=(-4, 104)
    )
    tasks = {task_in_words(task): sites, task_in_words(other.task): other.sites}
    for index, (words, swept) in enumerate(tasks.items()):
        measures: tuple[list[float | None], ...] = (
            [site.probe_accuracy for site in swept.values()],
            [site.counterfactual.flipped for site in swept.values()],
        )
        for row, values in enumerate(measures, start=1):
            add_line(
                figure,
                words,
                list(swept),
                [_percent(value) for value in values],
                colour=TASK_COLOURS[index],
                symbol=TASK_SYMBOLS[index],
                dash=("solid", "dash")[index],
                pane=(row, 1),
                legend=row == 1,
                hover="%{x}: %{y:.1f} %",
            )
    names = list(sites)
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=names, tickangle=-45)
    figure.update_yaxes(title_text="Held-out prompts (%)", row=2, col=1)
    figure.update_layout(height=620)
    clean = other.clean
    return Panel(
        name="flipping-tasks",
        title="The same with and without a prefix",
        text="Both tasks on the same axes, each with probes and metrics fitted to its own training "
        "prompts. A sentence in front moves the names to positions that differ from prompt to "
        "prompt, so a probe that had read the position instead of the order fails there. The other "
        f"task ({task_in_words(other.task)}) has a mean logit difference of "
        f"{signed(clean.logit_difference)} without an edit, and {percent(clean.accuracy)} of its "
        "prompts are answered IO.",
        figures={"": figure},
    )


def sites_table(sites: Mapping[str, SiteResult]) -> Table:
    """Every number of the sweep by site."""
    return Table(
        columns=(
            "site",
            "probe accuracy (%)",
            "flipped, counterfactual (%)",
            "flipped, control (%)",
            "IO − S, counterfactual",
            "IO − S, control",
            "edit length, Mahalanobis",
            "edit length, Euclidean",
            "worst log-odds margin",
            "failed edits",
        ),
        rows=tuple(
            (
                name,
                _percent(site.probe_accuracy),
                _percent(site.counterfactual.flipped),
                _percent(site.control.flipped),
                site.counterfactual.logit_difference,
                site.control.logit_difference,
                site.counterfactual.distance,
                site.counterfactual.euclidean,
                site.worst_log_odds_margin,
                sum(c.infeasible + c.inaccurate for c in (site.control, site.counterfactual)),
            )
            for name, site in sites.items()
        ),
    )


def answers_panel(
    sites: Mapping[str, SiteResult],
    best_site: str,
    prompts: Mapping[str, Tensor],
    texts: PromptTexts,
) -> Panel:
    """The edited logit difference of each prompt against its clean one, site by site.

    Args:
        sites: the sweep's summary.
        best_site: shown first.
        prompts: the per-prompt tensors, as in ``prompts.safetensors``.
        texts: the prompts' words, in the same order.
    """
    shown = min(len(texts.prompts), MOST_POINTS)
    hovers = [texts.hover(row) for row in range(shown)]
    clean = prompts["clean.logit_difference"][:shown].tolist()
    every = [
        prompts[f"{site}.{condition}.logit_difference"][:shown].tolist()
        for site in sites
        for condition in CONDITIONS
    ]
    x_range = _padded(clean)
    # The same axes at every site, so that choosing another one shows what changes.
    y_range = _padded([value for values in [clean, *every] for value in values])
    figures = {}
    for site in [best_site, *(name for name in sites if name != best_site)]:
        key = f"{site} (flips most)" if site == best_site else site
        figures[key] = _scatter(site, sites[site], clean, hovers, prompts, texts)
        figures[key].update_xaxes(range=x_range)
        figures[key].update_yaxes(range=y_range)
    fewer = "" if shown == len(texts.prompts) else f" The first {shown} prompts are drawn."
    return Panel(
        name="flipping-answers",
        title="Every held-out prompt, before and after the edit",
        text="Each point is a prompt: its logit difference without an edit (across) and under the "
        "edit (up). Above 0 the model answers IO, below 0 it answers S. Points on the dashed "
        "diagonal did not change: the control edit should leave them there, and the "
        "counterfactual edit should carry them below 0 where the order is used. Point at one to "
        f"read its prompt.{fewer}",
        figures=figures,
        choice="site",
    )


def _scatter(
    site: str,
    result: SiteResult,
    clean: list[float],
    hovers: list[str],
    prompts: Mapping[str, Tensor],
    texts: PromptTexts,
) -> Any:
    figure = new_figure(
        x_title="Clean logit difference IO − S at END (logits)", y_title="Under the edit (logits)"
    )
    low, high = _padded(clean)
    figure.add_shape(
        type="line",
        x0=low,
        y0=low,
        x1=high,
        y1=high,
        line={"color": NOTE, "dash": "dash", "width": 1},
        layer="below",
    )

    def answer(row: int, difference: float) -> str:
        io, s = texts.io_names[row], texts.s_names[row]
        return f"{io} (IO)" if difference > 0 else f"{s} (S)" if difference < 0 else "a tie"

    for condition in CONDITIONS:
        edited = prompts[f"{site}.{condition}.logit_difference"][: len(clean)].tolist()
        answers = [
            f"{answer(row, before)} → {answer(row, after)}"
            for row, (before, after) in enumerate(zip(clean, edited, strict=True))
        ]
        flipped = percent(getattr(result, condition).flipped)
        figure.add_scatter(
            x=clean,
            y=edited,
            text=hovers,
            customdata=answers,
            mode="markers",
            name=f"{condition} edit, {flipped} flipped",
            marker={
                "color": COLOURS[condition],
                "symbol": SYMBOLS[condition],
                "size": 6.5,
                "opacity": 0.6,
                "line": {"width": 0},
            },
            hovertemplate=f"%{{text}}<br><br><b>{condition} edit at {site}</b><br>"
            "IO − S: %{x:+.2f} → %{y:+.2f}<br>answer: %{customdata}<extra></extra>",
        )
    figure.update_layout(height=560)
    return figure


def _padded(values: list[float]) -> list[float]:
    low, high = min(*values, 0.0), max(*values, 0.0)
    margin = 0.05 * (high - low or 1.0)
    return [low - margin, high + margin]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
