"""Panels of the league table in the report: what it says, the sortable table, and the curves."""

from typing import Any

from lrqp_torch.study.compare.measures import MEASURES
from lrqp_torch.study.compare.methods import FITTED
from lrqp_torch.study.compare.reading import reading
from lrqp_torch.study.compare.result import SIDE_EFFECTS, CompareResult, Curve, SiteComparison
from lrqp_torch.study.compare.styles import style_of
from lrqp_torch.study.interactive import ZERO, add_line, new_figure
from lrqp_torch.study.panel import Panel, Table


def panels(result: CompareResult) -> list[Panel]:
    """Two panels a site: the table with a figure a measure, and the curves with their points."""
    shown = []
    for number, site in enumerate(result.sites.values()):
        shown += [_table_panel(result, site, number), _pareto_panel(site, number)]
    return shown


def _table_panel(result: CompareResult, site: SiteComparison, number: int) -> Panel:
    trained = [f"{row.title}: {row.settings}" for row in site.methods if row.settings]
    others = [score.variable for score in site.oracles[1:] if score.readable]
    watched = (
        f"Attention is that of {len(site.watched)} heads ({site.role}s), END→IO less END→S1."
        if site.watched
        else "No heads were watched."
    )
    text = "\n\n".join(reading(site)) + (
        f"\n\nAll methods are fitted to the training prompts and edit {result.position} of the "
        f"same {site.prompts} held-out prompts at {site.site}, towards the other order "
        "(counterfactual) and the true one (control). A patch writes the same prompt in the other "
        "order, and as a control another prompt in the same order. Unrelated text is "
        f"{site.texts} beginnings of prompts, edited at a random token towards a random order. "
        "Independent probes are fitted to one half of the held-out prompts and read the other; "
        f"selectivity is over {', '.join(others) or 'nothing, as they read nothing else'}. "
        f"{watched} Shares of answers have Wilson 95 % intervals, all else bootstrap ones "
        f"({result.resamples} resamples, seed {result.seed}); clearly means beyond such an "
        "interval, each taken by itself. LEACE erases the order, so its completeness is measured "
        "against even odds. "
        + (f"Trained through the model: {'; '.join(trained)}." if trained else "")
    )
    figures = {
        measure.title: figure
        for name, measure in MEASURES.items()
        if (figure := _measure_figure(site, name)) is not None
    }
    return Panel(
        name=f"compare-{number}",
        title=f"Every method on the same flip, at {site.site}",
        text=text,
        figures=figures,
        choice="measure",
        table=_table(site),
    )


def _measure_figure(site: SiteComparison, name: str) -> Any:
    known = [
        (row, mean)
        for row in site.methods
        if row.counterfactual is not None and (mean := MEASURES[name].read(row)) is not None
    ]
    if not known:
        return None
    figure = new_figure(x_title="method", y_title=MEASURES[name].title)
    for row, mean in known:
        style = style_of(row.name)
        add_line(
            figure,
            row.title,
            [row.title],
            [mean.value],
            colour=_colour(row.name),
            symbol=style.symbol,
            interval=([mean.lower], [mean.upper]),
            legend=False,
        )
    own = next((mean.value for row, mean in known if row.name == FITTED), None)
    if own is not None:
        figure.add_hline(y=own, line={"color": ZERO, "width": 1, "dash": "dot"})
    return figure


def _table(site: SiteComparison) -> Table:
    rows: list[tuple[str | float | int | None, ...]] = []
    for row in site.methods:
        values: list[float | None] = []
        for measure in MEASURES.values():
            mean = None if row.counterfactual is None else measure.read(row)
            values += (
                [None, None, None]
                if mean is None
                else [float(f"{v:.4g}") for v in (mean.value, mean.lower, mean.upper)]
            )
        seconds = None if row.seconds is None else round(1e6 * row.seconds, 1)
        rows.append((row.title, *values, seconds, row.problem or row.settings or None))
    headings = [h for m in MEASURES.values() for h in (m.title, "lower 95 %", "upper 95 %")]
    return Table(("method", *headings, "time a prompt (µs)", "notes"), tuple(rows))


def _pareto_panel(site: SiteComparison, number: int) -> Panel:
    costs = list(site.curves[0].points[0].costs)
    return Panel(
        name=f"compare-pareto-{number}",
        title=f"Effect against side effect at equal strength, at {site.site}",
        text=(
            f"Each curve is one method at rising strength s, x' = x + s (edit(x) − x), on "
            f"{site.sweep_prompts} held-out prompts; the larger marker is strength 1, the method "
            "as it is. The dotted LRQP curve rises with the odds asked for instead. Up and to the "
            "left is better: more fall of the logit difference for less change of all else. The "
            "table marks the points of the Pareto front, which no other point beats in both."
        ),
        figures={SIDE_EFFECTS[cost]: _pareto(site, cost) for cost in costs},
        choice="side effect",
        table=_points(site, costs),
    )


def _pareto(site: SiteComparison, cost: str) -> Any:
    figure = new_figure(
        x_title=f"side effect: {SIDE_EFFECTS[cost]}",
        y_title="effect: mean fall of IO − S (logits)",
    )
    for curve in site.curves:
        style = style_of(curve.name)
        figure.add_scatter(
            x=[point.costs[cost].value for point in curve.points],
            y=[point.effect.value for point in curve.points],
            text=_hover(curve),
            mode="lines+markers",
            name=curve.title,
            line={
                "color": _colour(curve.name),
                "dash": style.plotly_dash,
                "width": 3 if curve.name == FITTED else 1.5,
            },
            marker={
                "symbol": style.symbol,
                "size": [14 if _plain(curve, point.dose) else 7 for point in curve.points],
            },
            error_x=_bars([point.costs[cost] for point in curve.points]),
            error_y=_bars([point.effect for point in curve.points]),
            hovertemplate="%{text}<br>side effect %{x:.3g}<br>effect %{y:.3g}"
            f"<extra>{curve.title}</extra>",
        )
    figure.update_layout(height=640)
    return figure


def _colour(name: str) -> str:
    """The method's colour; sky blue for what is black on paper, since reports may be dark."""
    colour = style_of(name).colour
    return "#56B4E9" if colour == "#000000" else colour


def _plain(curve: Curve, dose: float) -> bool:
    return curve.dose == "strength" and dose == 1


def _hover(curve: Curve) -> list[str]:
    return [
        f"{curve.dose} {point.dose:g}"
        + ("" if point.flipped is None else f", {100 * point.flipped:.0f} % flipped")
        for point in curve.points
    ]


def _bars(means: list[Any]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(mean.upper - mean.value, 0.0) for mean in means],
        "arrayminus": [max(mean.value - mean.lower, 0.0) for mean in means],
        "thickness": 0.6,
        "width": 0,
    }


def _points(site: SiteComparison, costs: list[str]) -> Table:
    rows = []
    for curve in site.curves:
        for point in curve.points:
            values: list[str | float | None] = [
                curve.title,
                f"{curve.dose} {point.dose:g}",
                round(point.effect.value, 4),
                None if point.flipped is None else round(point.flipped, 4),
            ]
            for cost in costs:
                values += [
                    float(f"{point.costs[cost].value:.4g}"),
                    "yes" if point.optimal[cost] else "no",
                ]
            rows.append(tuple(values))
    headings = [h for cost in costs for h in (SIDE_EFFECTS[cost], "on its front")]
    return Table(("method", "dose", "fall of IO − S", "flipped", *headings), tuple(rows))
