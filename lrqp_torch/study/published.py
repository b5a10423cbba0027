"""What has been published about GPT-2 small on this task, to set beside a run's own figures.

Sources:

* Wang et al. 2022, *Interpretability in the Wild: a Circuit for Indirect Object Identification
  in GPT-2 small*, arXiv 2211.00593.
* Makelov, Lange, Nanda 2023, *Is This the Subspace You Are Looking for?*, arXiv 2311.17030.
"""

from dataclasses import dataclass

WANG = "Wang et al. 2022, arXiv 2211.00593"
MAKELOV = "Makelov et al. 2023, arXiv 2311.17030"


@dataclass(frozen=True)
class PublishedFigure:
    """One published number.

    Attributes:
        quantity: what was measured, in words.
        value: the number; shares and probabilities lie between 0 and 1, the rest are logits.
        source: authors, year and arXiv number.
    """

    quantity: str
    value: float
    source: str


PUBLISHED: dict[str, PublishedFigure] = {
    "logit_difference": PublishedFigure("mean logit difference IO − S", 3.56, WANG),
    "accuracy": PublishedFigure("share of prompts with IO above S", 0.993, WANG),
    "io_probability": PublishedFigure("mean probability of IO", 0.49, WANG),
    "logit_difference_long_prefix": PublishedFigure(
        "mean logit difference, S-inhibition heads patched from sentences with a longer prefix",
        3.57,
        WANG,
    ),
    "inhibition_patched": PublishedFigure(
        "mean logit difference, S-inhibition outputs patched, both signals kept", 3.55, WANG
    ),
    "position_inverted": PublishedFigure(
        "mean logit difference, S-inhibition outputs patched, position signal inverted", -0.99, WANG
    ),
    "position_and_token_inverted": PublishedFigure(
        "mean logit difference, S-inhibition outputs patched, both signals inverted", -3.16, WANG
    ),
    "logit_difference_makelov": PublishedFigure(
        "mean logit difference on their prompts, no edit", 3.364, MAKELOV
    ),
    "full_patch": PublishedFigure(
        "mean logit difference, full patch at END after layer 8", -0.723, MAKELOV
    ),
    "full_patch_flipped": PublishedFigure(
        "share of answers flipped, full patch at END after layer 8", 0.544, MAKELOV
    ),
    "mean_difference": PublishedFigure(
        "mean logit difference, mean difference ABB − BAB at END after layer 8", -0.650, MAKELOV
    ),
    "mean_difference_flipped": PublishedFigure(
        "share of answers flipped, mean difference ABB − BAB at END after layer 8", 0.523, MAKELOV
    ),
}
"""Published figures of GPT-2 small, by a short key."""
