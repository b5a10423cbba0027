"""How each method looks in every figure: related methods share a colour, and differ by marker."""

from dataclasses import dataclass

from lrqp_torch.study.compare.variants import DosedLRQP

OTHER_COLOUR = "#999999"


@dataclass(frozen=True)
class Style:
    """Of one method.

    Attributes:
        colour: from the palette of Okabe and Ito, which readers with any colour vision tell apart.
        marker: of matplotlib.
        symbol: of plotly, the same shape.
        dash: of matplotlib; :attr:`plotly_dash` is plotly's name for it.
    """

    colour: str
    marker: str
    symbol: str
    dash: str = "-"

    @property
    def plotly_dash(self) -> str:
        """The dash in plotly's words."""
        return {"-": "solid", "--": "dash", ":": "dot"}[self.dash]


_LRQP, _LEAST, _MEAN, _MAP, _ERASE, _PAIR = (
    "#000000",
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
)
STYLES = {
    "none": Style(OTHER_COLOUR, "x", "x"),
    "random": Style(OTHER_COLOUR, "x", "x", ":"),
    "lrqp": Style(_LRQP, "*", "star"),
    "lrqp_learned": Style(_LRQP, "P", "cross", "--"),
    DosedLRQP.name: Style(_LRQP, ".", "circle", ":"),
    "euclidean": Style(_LEAST, "o", "circle"),
    "inverse_metric": Style(_LEAST, "v", "triangle-down", "--"),
    "mean_difference": Style(_MEAN, "s", "square"),
    "mean_difference_exact": Style(_MEAN, "D", "diamond", "--"),
    "conditional_mean": Style(_MEAN, "^", "triangle-up", ":"),
    "optimal_transport": Style(_MAP, "o", "circle"),
    "neuron_transport": Style(_MAP, "s", "square", "--"),
    "leace": Style(_ERASE, "o", "circle"),
    "alterrep": Style(_ERASE, "s", "square", "--"),
    "das": Style(_PAIR, "o", "circle"),
    "full_patch": Style(_PAIR, "s", "square", "--"),
}


def style_of(name: str) -> Style:
    """The style of a method; grey for one that is not listed."""
    return STYLES.get(name, Style(OTHER_COLOUR, "o", "circle"))
