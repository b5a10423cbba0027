"""The interactive page of a study of your own."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from lrqp_torch.study.drawing import CLEAN, CONTROL, COUNTERFACTUAL, NOTE, PROBE
from lrqp_torch.study.flipping import CONDITIONS, USED_THRESHOLD
from lrqp_torch.study.html import (
    REPORT_FILE,
    Section,
    made_section,
    summary_section,
    write_page,
)
from lrqp_torch.study.interactive import add_line, new_figure
from lrqp_torch.study.panel import Panel, Table
from lrqp_torch.study.summary import percent, signed
from lrqp_torch.tasks import words
from lrqp_torch.tasks.results import Mean, Share, TaskResults

COLOURS = {"control": CONTROL, "counterfactual": COUNTERFACTUAL}
SYMBOLS = {"control": "triangle-up", "counterfactual": "square"}
MOST_POINTS = 500
"""Held-out prompts drawn at each site; the numbers are of all of them."""


def write_report(results: TaskResults, folder: Path) -> Path:
    """Write ``report.html``, one file that opens without a network.

    Raises:
        MissingExtraError: plotly is not installed.
        OutputError: the file cannot be written.
    """
    panels = [sites_panel(results)]
    if results.answered is not None:
        panels.append(answers_panel(results))
    path = folder / REPORT_FILE
    write_page(
        path,
        title=f"Where {results.model['name']} uses {' / '.join(results.classes)}",
        subtitle=words.subtitle(results),
        opening=summary_section(words.question(results), _tiles(results), words.findings(results)),
        sections=[Section("Site by site", "One site is edited at a time.", panels)],
        closing=made_section(
            command=words.command(results, folder),
            files="results.json, prompts.json and prompts.safetensors",
            settings=results.settings,
            model=results.model,
            versions=results.versions,
            elapsed=results.elapsed,
        ),
    )
    return path


def sites_panel(results: TaskResults) -> Panel:
    """Probe accuracy and flips above, the size of the effect below, and every number as a table."""
    figure = new_figure(x_title="", y_title="Held-out prompts (%)", panes=("", ""), down=True)
    names, sites = list(results.sites), list(results.sites.values())

    def curve(
        label: str, points: Sequence[Share | Mean], colour: str, symbol: str, pane: int = 1
    ) -> None:
        scale = 100.0 if pane == 1 else 1.0
        values = [None if p.value is None else scale * p.value for p in points]
        ends = ([scale * p.interval[0] for p in points], [scale * p.interval[1] for p in points])
        add_line(
            figure,
            label,
            names,
            values,
            colour=colour,
            symbol=symbol,
            interval=ends,
            pane=(pane, 1),
            legend=pane == 1 or results.answered is None,
            hover="%{x}: %{y:.1f} %" if pane == 1 else "%{x}: %{y:+.3f}",
        )

    curve("probe accuracy", [site.probe for site in sites], PROBE, "circle")
    curve("probe fitted to shuffled labels", [site.shuffled for site in sites], NOTE, "x")
    for condition in reversed(CONDITIONS):
        edits = [getattr(site, condition) for site in sites]
        if results.answered is not None:
            flips = [edit.flipped for edit in edits]
            curve(f"flipped, {condition} edit", flips, COLOURS[condition], SYMBOLS[condition])
        effects = [words.measured(edit) for edit in edits]
        curve(f"{condition} edit", effects, COLOURS[condition], SYMBOLS[condition], pane=2)
    for site in results.used_sites:
        column = names.index(site)
        figure.add_vrect(
            x0=column - 0.5,
            x1=column + 0.5,
            fillcolor=COUNTERFACTUAL,
            opacity=0.11,
            line_width=0,
            layer="below",
        )
    majority = {"color": NOTE, "dash": "dot", "width": 1}
    figure.add_hline(y=100 * results.majority, line=majority, row=1, col=1)
    if results.preference is not None:
        clean = {"color": CLEAN, "dash": "dash", "width": 1.4}
        figure.add_hline(y=results.preference.value, line=clean, row=2, col=1)
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=names, tickangle=-45)
    figure.update_xaxes(range=[-0.6, len(names) - 0.4])
    figure.update_yaxes(range=[-4, 104], row=1, col=1)
    figure.update_yaxes(title_text=words.effect_title(results), row=2, col=1)
    figure.update_layout(height=680, margin={"l": 70, "r": 20, "t": 40, "b": 120})
    counted = (
        "and how many answers each edit turns from the class that holds to the counterfactual one; "
        f"sites at which the counterfactual edit flips {100 * USED_THRESHOLD:.0f} % more than the "
        "control are shaded. Below: the mean preference for the class that holds; the dashed line "
        "is the model without an edit."
        if results.answered is not None
        else "for the prompts have no answers whose flips could be counted. Below: how much each "
        "edit changes the distribution of the next token."
    )
    return Panel(
        name="sites",
        title="What can be read, and what is used",
        text="On prompts that neither the probe nor the metric has seen. Above: how often the "
        "probe reads the class right, beside a probe fitted to labels in random order and the "
        f"most frequent class (dotted), {counted} Bars are 95 % intervals. The control edit writes "
        "the class that is true, so it should change nothing.",
        figures={"": figure},
        table=sites_table(results),
    )


def sites_table(results: TaskResults) -> Table:
    """Every number by site, with intervals as text."""
    return Table(
        columns=(
            "site",
            "probe accuracy (%)",
            "95 % interval",
            "shuffled labels (%)",
            "flipped, counterfactual (%)",
            "95 % interval, flipped",
            "flipped, control (%)",
            "preference, counterfactual",
            "preference, control",
            "KL, counterfactual (nats)",
            "KL, control (nats)",
            "edit length, Mahalanobis",
            "edit length, Euclidean",
            "worst log-odds margin",
            "failed edits",
        ),
        rows=tuple(
            (
                name,
                _percent(site.probe),
                _range(site.probe),
                _percent(site.shuffled),
                _percent(site.counterfactual.flipped),
                _range(site.counterfactual.flipped),
                _percent(site.control.flipped),
                _value(site.counterfactual.preference),
                _value(site.control.preference),
                site.counterfactual.divergence.value,
                site.control.divergence.value,
                site.counterfactual.distance,
                site.counterfactual.euclidean,
                site.worst_log_odds_margin,
                site.counterfactual.failed + site.control.failed,
            )
            for name, site in results.sites.items()
        ),
    )


def answers_panel(results: TaskResults) -> Panel:
    """The preference of each prompt under the edit against its clean one, site by site."""
    shown = min(len(results.texts), MOST_POINTS)
    flat = results.prompts
    clean = flat["clean.preference"][:shown].tolist()
    others = [results.classes[row] for row in flat["other"][:shown].tolist()]
    labels = [results.classes[row] for row in flat["labels"][:shown].tolist()]
    hovers = [
        f"{text}<br>{label}, not {other}"
        for text, label, other in zip(
            map(_wrapped, results.texts[:shown]), labels, others, strict=True
        )
    ]
    figures = {}
    best = results.best_site
    for site in [best, *(name for name in results.sites if name != best)]:
        figure = new_figure(
            x_title="Preference without an edit (nats)", y_title="Under the edit (nats)"
        )
        for condition in CONDITIONS:
            share = getattr(results.sites[site], condition).flipped
            figure.add_scatter(
                x=clean,
                y=flat[f"{site}.{condition}.preference"][:shown].tolist(),
                text=hovers,
                mode="markers",
                name=f"{condition} edit, {percent(share.value)} flipped",
                marker={
                    "color": COLOURS[condition],
                    "symbol": SYMBOLS[condition],
                    "size": 6.5,
                    "opacity": 0.6,
                    "line": {"width": 0},
                },
                hovertemplate="%{text}<br><br>%{x:+.2f} → %{y:+.2f}<extra></extra>",
            )
        figure.update_layout(height=560)
        figures[f"{site} (strongest)" if site == best else site] = figure
    fewer = "" if shown == len(results.texts) else f" The first {shown} prompts are drawn."
    return Panel(
        name="answers",
        title="Every held-out prompt, before and after the edit",
        text="Across: how much the model prefers to answer with the class that holds rather than "
        "the counterfactual one, without an edit; up: the same under the edit. Below 0 it prefers "
        f"the counterfactual one. Point at a prompt to read it.{fewer}",
        figures=figures,
        choice="site",
    )


def _tiles(results: TaskResults) -> list[tuple[str, str, str]]:
    best = results.sites[results.best_site]
    low, high = best.probe.interval
    tiles = [
        (
            percent(best.probe.value),
            f"probe accuracy at {results.best_site}",
            f"95 % interval {100 * low:.1f} to {100 * high:.1f} %",
        )
    ]
    if results.answered is not None and results.preference is not None:
        flips, mean = best.counterfactual.flipped, best.counterfactual.preference
        assert flips is not None and mean is not None
        tiles += [
            (
                percent(results.answered.value),
                "prompts answered with the class that holds",
                f"mean preference {signed(results.preference.value)} nats",
            ),
            (
                percent(flips.value),
                f"answers flipped at {results.best_site}",
                f"95 % interval {_range(flips)} %",
            ),
            (
                signed(mean.value),
                f"mean preference, edited at {results.best_site}",
                f"95 % interval {signed(mean.interval[0])} to {signed(mean.interval[1])}",
            ),
        ]
    else:
        change = best.counterfactual.divergence
        tiles.append(
            (
                signed(change.value),
                f"nats of change of the next token, edited at {results.best_site}",
                f"control edit {signed(best.control.divergence.value)}",
            )
        )
    return tiles


def _wrapped(text: str) -> str:
    # Plotly reads tags in hover texts.
    plain = text.replace("&", "&amp;").replace("<", "&lt;")
    return "<br>".join(wrap(plain, 70))


def _percent(share: Share | None) -> float | None:
    return None if share is None or share.value is None else 100 * share.value


def _value(mean: Mean | None) -> float | None:
    return None if mean is None else mean.value


def _range(share: Share | None) -> str | None:
    if share is None:
        return None
    return f"{100 * share.interval[0]:.1f} to {100 * share.interval[1]:.1f}"
