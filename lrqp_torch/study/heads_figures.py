"""Figures and tables of the attention heads' scores and roles."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrqp_torch.study.drawing import (
    DIVERGING,
    RISING,
    as_interval,
    interactive,
    signed,
    write_figures,
)
from lrqp_torch.study.panel import Panel, Table
from lrqp_torch.study.roles import (
    MOVER,
    NEGATIVE,
    ROLES,
    RULES,
    WRITER,
    overlap,
    parse_head,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lrqp_torch.study.heads import HeadScore, HeadsResult

DIRECT = "direct effect on IO − S (logits)"
LOOKS, WRITES = "name movers' attention without the head", "their direct effect without the head"
NO_ROLE = "no role"
ROLE_COLOURS = {
    "name mover": "#009E73",
    "negative name mover": "#D55E00",
    "backup name mover": "#E69F00",
    "S-inhibition": "#0072B2",
    "induction": "#CC79A7",
    "duplicate token": "#56B4E9",
    "previous token": "#000000",
    "answer writer": "#009E73",
    NO_ROLE: "#999999",
}


def draw(result: "HeadsResult", folder: Path) -> list[Path]:
    """Write ``heads``: every head's scores as maps of layer by head, PNG and SVG."""
    return write_figures({"heads": lambda: _draw_maps(result)}, folder)


def panels(result: "HeadsResult") -> list[Panel]:
    """Maps of all scores, the direct effect against attention, and the roles."""
    return [_map_panel(result), _scatter_panel(result), _role_panel(result)]


def _scores(result: "HeadsResult") -> dict[str, list[float | None]]:
    """Every score by its name, one value a head."""
    scores: dict[str, list[float | None]] = {DIRECT: [s.attribution for s in result.scores]}
    for key in result.scores[0].attention:
        scores[f"attention {key}"] = [score.attention[key] for score in result.scores]
    tests = [score.test for score in result.scores]
    scores[LOOKS] = [None if test is None else test.attention for test in tests]
    scores[WRITES] = [None if test is None else test.writing for test in tests]
    return scores


def _grid(result: "HeadsResult", values: list[float | None]) -> list[list[float | None]]:
    """The values as rows of layers and columns of heads."""
    n_heads = max(parse_head(score.head)[1] for score in result.scores) + 1
    return [values[start : start + n_heads] for start in range(0, len(values), n_heads)]


def _limit(values: list[float | None]) -> float:
    return max((abs(value) for value in values if value is not None), default=0.0) or 1.0


def _draw_maps(result: "HeadsResult") -> "Figure":
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    scores = {
        name: values for name, values in _scores(result).items() if name not in (LOOKS, WRITES)
    }
    layers = len(_grid(result, scores[DIRECT]))
    figure = Figure(figsize=(11, min(11.0, 3.4 + 0.36 * layers)), layout="constrained")
    axes = figure.subplots(2, -(-len(scores) // 2), squeeze=False).flatten()
    for spare in axes[len(scores) :]:
        spare.set_axis_off()
    for number, (panel, (name, values)) in enumerate(zip(axes, scores.items(), strict=False)):
        around_zero = name == DIRECT
        limit = _limit(values) if around_zero else 1.0
        picture = panel.imshow(
            [[float("nan") if v is None else v for v in row] for row in _grid(result, values)],
            cmap=LinearSegmentedColormap.from_list("study", DIVERGING if around_zero else RISING),
            vmin=-limit if around_zero else 0.0,
            vmax=limit,
            aspect="auto",
            interpolation="nearest",
        )
        panel.set_title("direct effect (logits)" if around_zero else name, fontsize=10)
        if number % (-(-len(scores) // 2)) == 0:
            panel.set_ylabel("layer")
        panel.set_xlabel("head")
        panel.yaxis.get_major_locator().set_params(integer=True)
        panel.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(picture, ax=panel, shrink=0.8)
    figure.suptitle(
        f"What every attention head does, mean over {result.prompts} clean held-out prompts",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
    )
    return figure


def _map_panel(result: "HeadsResult") -> Panel:
    figures = {}
    for name, values in _scores(result).items():
        around_zero = name in (DIRECT, LOOKS, WRITES)
        limit = _limit(values) if around_zero else 1.0
        trace = {
            "type": "heatmap",
            "z": _grid(result, values),
            "colorscale": DIVERGING if around_zero else RISING,
            "zmin": -limit if around_zero else 0.0,
            "zmax": limit,
            "hovertemplate": "L%{y}.H%{x}<br>" + name + ": %{z:.3f}<extra></extra>",
            "hoverongaps": False,
            "xgap": 1,
            "ygap": 1,
        }
        figures[name] = interactive(
            [trace],
            xaxis={"title": {"text": "head"}, "dtick": 1},
            yaxis={"title": {"text": "layer"}, "autorange": "reversed"},
        )
    shares = ", ".join(f"{name} {signed(value)}" for name, value in result.parts.items())
    return Panel(
        name="head-scores",
        title="What every attention head does",
        text="Each cell is a head, its score a mean over "
        f"{result.prompts} clean held-out prompts. The direct effect is what the head itself adds "
        "to the logit difference IO − S at END, through the final norm with its scale frozen; the "
        f"parts of the model add up to the mean difference of {signed(result.logit_difference)} "
        f"({shares}). “{LOOKS}” is the change of their attention to IO less that to S1 when the "
        f"head's output at END is set to its mean, and “{WRITES}” that of what they write, in "
        "logits (of the answer writers, in a model without name movers); heads without a value "
        "were not tested.",
        figures=figures,
        choice="score",
    )


def _scatter_panel(result: "HeadsResult") -> Panel:
    by_role: dict[str, list[HeadScore]] = {role: [] for role in (*ROLES[::-1], NO_ROLE)}
    for score in result.scores:
        by_role[_main_role(result, score.head)].append(score)
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": role,
            "x": [score.attention["END→IO"] for score in scores],
            "y": [score.attribution for score in scores],
            "text": [
                f"{score.head}: {role}<br>direct effect {score.attribution:+.3f} "
                f"({as_interval(score.attribution_interval, 3)})<br>"
                + "<br>".join(f"attention {k} {v:.2f}" for k, v in score.attention.items())
                for score in scores
            ],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"size": 6 if role == NO_ROLE else 11, "color": ROLE_COLOURS[role]},
        }
        for role, scores in by_role.items()
        if scores
    ]
    figure = interactive(
        traces,
        xaxis={"title": {"text": "mean attention END → IO"}},
        yaxis={"title": {"text": "direct effect on IO − S (logits)"}},
    )
    return Panel(
        name="head-movers",
        title="Name movers: heads that look at IO and write it",
        text="Name movers are far right and high, negative name movers far right and low. Colours "
        f"show the roles that the program found; {COLOUR_NOTE}",
        figures={"": figure},
    )


COLOUR_NOTE = "a head with several roles has the colour of the one nearest to the answer."


def _main_role(result: "HeadsResult", head: str) -> str:
    """The role of a head that is nearest to the answer."""
    for role in (MOVER, NEGATIVE, WRITER, *ROLES[::-1]):
        if head in result.found[role]:
            return role
    return NO_ROLE


def _role_panel(result: "HeadsResult") -> Panel:
    published = result.published
    columns = ["role", "heads found", "rule"]
    rows: list[tuple[str | float | int | None, ...]] = []
    for role in ROLES:
        found = result.found[role]
        row: list[str] = [role, ", ".join(found) or "none found", RULES[role]]
        if published is not None:
            known = published.get(role)
            row[2:2] = ["–", "–"] if known is None else [", ".join(known), overlap(found, known)]
        rows.append(tuple(row))
    text = "A role is given by the rule beside it, to as many heads as meet it, or to none."
    if published is not None:
        columns[2:2] = ["published", "published ones found"]
        text += (
            " The published heads (Wang et al. 2022) were found with other prompts and by removing "
            "heads; the parts that follow use the published ones."
        )
    if result.truth is not None:
        text += " " + _truth_text(result)
    return Panel(
        name="head-roles",
        title="The roles of heads",
        text=text,
        table=Table(tuple(columns), tuple(rows)),
    )


def _truth_text(result: "HeadsResult") -> str:
    truth = result.truth
    assert truth is not None
    known = (
        "This model was trained so that the order is read from S2 by attention in layer "
        f"{truth.first_layer} or above, and until layer {truth.last_layer} at the least"
    )
    if truth.agrees is None:
        return f"{known}; no S-inhibition head was found to compare with that."
    verdict = "agree" if truth.agrees else "DISAGREE"
    return f"{known}; the S-inhibition heads found {verdict} with that."
