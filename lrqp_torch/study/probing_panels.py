"""Panels and sentences about what can be read from the clean activations."""

from typing import TYPE_CHECKING, Any

from lrqp_torch.study.by_site import TASK_COLOURS, TASK_SYMBOLS, capitalised, task_in_words
from lrqp_torch.study.interactive import add_line, new_figure
from lrqp_torch.study.panel import Panel, Table
from lrqp_torch.study.variables import (
    CLAUSE_IO,
    CLAUSE_S1,
    MEANINGS,
    NAME_IO,
    NAME_S,
    ORDER,
    POSITION_IO,
    POSITION_S1,
    VARIABLES,
)

if TYPE_CHECKING:
    from lrqp_torch.study.probing import ProbingResult, VariableScores

CURVES = {
    ORDER: ("#D55E00", "square", "solid"),
    POSITION_S1: ("#0072B2", "circle", "solid"),
    POSITION_IO: ("#56B4E9", "diamond", "solid"),
    CLAUSE_S1: ("#0072B2", "circle-open", "dash"),
    CLAUSE_IO: ("#56B4E9", "diamond-open", "dash"),
    NAME_S: ("#009E73", "triangle-up", "solid"),
    NAME_IO: ("#CC79A7", "triangle-down", "solid"),
}
"""Colour, marker and dash of each variable; from Okabe and Ito's palette."""


def findings(result: "ProbingResult") -> list[str]:
    """See :func:`lrqp_torch.study.probing.findings`."""
    sentences = []
    tasks = sorted({item.task for item in result.variables})
    for position in dict.fromkeys(item.position for item in result.variables):
        groups: dict[str, list[str]] = {}
        for variable in VARIABLES:
            found = [result.find(task, position, variable) for task in tasks]
            items = [item for item in found if item is not None]
            if items:
                groups.setdefault(_verdict(items), []).append(f"{variable} ({_bests(items)})")
        for verdict, variables in groups.items():
            sentences.append(f"At {position}, {verdict}: {'; '.join(variables)}.")
    return sentences


def _verdict(items: "list[VariableScores]") -> str:
    yes = [task_in_words(item.task) for item in items if item.readable]
    no = [task_in_words(item.task) for item in items if not item.readable]
    parts = []
    if yes:
        parts.append("readable " + " and ".join(yes))
    if no:
        parts.append("not readable " + " or ".join(no))
    return " but ".join(parts)


def _bests(items: "list[VariableScores]") -> str:
    best = " and ".join(
        f"{100 * item.best.accuracy:.0f} % {task_in_words(item.task)}" for item in items
    )
    return f"{best}; guessing {' and '.join(f'{100 * i.baseline:.0f} %' for i in items)}"


def panels(result: "ProbingResult") -> list[Panel]:
    """See :func:`lrqp_torch.study.probing.panels`."""
    meanings = " ".join(f"{capitalised(name)}: {MEANINGS[name]}." for name in VARIABLES)
    by_token: dict[str, list[VariableScores]] = {}
    by_variable: dict[str, list[VariableScores]] = {}
    for item in result.variables:
        by_token.setdefault(f"{item.position}, {task_in_words(item.task)}", []).append(item)
        by_variable.setdefault(item.variable, []).append(item)
    return [
        Panel(
            name="probing",
            title="What can be read from the clean activations",
            text=(
                "\n\n".join(findings(result))
                + "\n\nThe shares are those of the best site. A variable counts as readable where "
                "the lower end of a Wilson 95 % interval lies more than 0.1 above that of "
                "guessing, which is the share of the most frequent class among the held-out "
                "prompts; that it can be read does not mean that the model uses it."
            ),
            figures={key: _token_figure(result, items) for key, items in by_token.items()},
            choice="token and task",
        ),
        Panel(
            name="probing-variables",
            title="Each variable beside its controls",
            text=(
                f"{meanings}\n\nPositions are classes of their own while they take at most "
                f"{result.bins} values, and are else cut at quantiles into at most {result.bins} "
                f"ranges; of the names the {result.names} most frequent are told apart. Crosses "
                "are probes fitted to shuffled labels, which should be no better than guessing; "
                "dotted lines show guessing: the share of the most frequent class among the "
                "held-out prompts. Bars are Wilson 95 % intervals on held-out prompts."
            ),
            figures={
                name: _variable_figure(result, by_variable[name])
                for name in VARIABLES
                if name in by_variable
            },
            choice="variable",
            table=_table(result),
        ),
    ]


def _empty(result: "ProbingResult", panes: tuple[str, ...]) -> Any:
    figure = new_figure(
        x_title="site, in order of computation",
        y_title="held-out accuracy",
        panes=panes,
        y_range=(-0.03, 1.03),
    )
    # Some curves skip sites; without this, plotly would put the others last.
    figure.update_xaxes(categoryorder="array", categoryarray=result.sites)
    return figure


def _token_figure(result: "ProbingResult", items: "list[VariableScores]") -> Any:
    figure = _empty(result, ("",))
    for item in items:
        colour, symbol, dash = CURVES[item.variable]
        _add(figure, item, item.variable, colour, symbol, dash, 1)
    return figure


def _variable_figure(result: "ProbingResult", items: "list[VariableScores]") -> Any:
    tasks = list(dict.fromkeys(item.task for item in result.variables))
    positions = list(dict.fromkeys(item.position for item in items))
    figure = _empty(result, tuple(f"at {position}" for position in positions))
    named = set()
    for item in items:
        column, index = positions.index(item.position) + 1, tasks.index(item.task)
        colour, label = TASK_COLOURS[index], task_in_words(item.task)
        _add(figure, item, label, colour, TASK_SYMBOLS[index], "solid", column, label not in named)
        control = [score for score in item.scores if score.shuffled is not None]
        figure.add_scatter(
            x=[score.site for score in control],
            y=[score.shuffled for score in control],
            mode="markers",
            name=f"shuffled labels, {label}",
            legendgroup=f"shuffled labels, {label}",
            showlegend=label not in named,
            marker={"color": colour, "symbol": "x", "size": 8, "opacity": 0.7},
            hovertemplate="%{x}: %{y:.3f}<extra>shuffled labels, " + label + "</extra>",
            row=1,
            col=column,
        )
        line = {"color": colour, "dash": "dot", "width": 1}
        figure.add_hline(y=item.baseline, line=line, row=1, col=column)
        named.add(label)
    return figure


def _add(
    figure: Any,
    item: "VariableScores",
    name: str,
    colour: str,
    symbol: str,
    dash: str,
    column: int,
    legend: bool = True,
) -> None:
    add_line(
        figure,
        name,
        [score.site for score in item.scores],
        [score.accuracy for score in item.scores],
        colour=colour,
        symbol=symbol,
        dash=dash,
        interval=([score.lower for score in item.scores], [score.upper for score in item.scores]),
        pane=(1, column),
        legend=legend,
        hover=(
            f"%{{x}}: %{{y:.3f}}<br>{len(item.classes)} classes, guessing {item.baseline:.3f}"
            f"<br>{item.test} held-out prompts"
        ),
    )


def _table(result: "ProbingResult") -> Table:
    return Table(
        columns=(
            "token",
            "task",
            "variable",
            "site",
            "accuracy",
            "lower 95 %",
            "upper 95 %",
            "most frequent class, held out",
            "shuffled labels",
            "classes",
            "training prompts",
            "held-out prompts",
        ),
        rows=tuple(
            (
                item.position,
                task_in_words(item.task),
                item.variable,
                score.site,
                round(score.accuracy, 4),
                round(score.lower, 4),
                round(score.upper, 4),
                round(item.baseline, 4),
                None if score.shuffled is None else round(score.shuffled, 4),
                len(item.classes),
                item.train,
                item.test,
            )
            for item in result.variables
            for score in item.scores
        ),
    )
