"""The ground truth of a trained organism: at which sites the order of the names at S2 is used."""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.organisms.forward import attention_mask, run_blocks, site_names
from benchmarks.organisms.prompts import Prompts, generate
from benchmarks.organisms.recipe import SPREAD_FROM, Kind, Recipe
from benchmarks.organisms.training import LEAST_LOG_ODDS, driving_direction

USED_FROM: dict[Kind, float] = {"graded": 0.25, "spread": 0.25}
"""Least rate of a used site, by kind; 0.95 of the others, which use the order wholly or not."""
UNUSED_TO = 0.03
DRIVEN_BY = 0.4
"""Step along the direction of kind ``dormant``, as a share of the distance of the class means."""


@dataclass(frozen=True)
class Truth:
    """What is written to ``ground_truth.json``; rates and accuracies are shares of prompts.

    Attributes:
        variable: The variable, as a data set labels it.
        position: The token at which it is looked for.
        used_at: Sites at which swapping the order changes the answer, in order.
        not_used_at: Sites at which it does not.
        unclear_at: Sites between the two thresholds.
        interchange_flip_rate: Flips at each site under :func:`interchange_flip_rates`.
        interchange_flip_rate_prefixed: The same on prompts with bundled prefixes.
        linear_edit: At each site, what :func:`linear_flip_rates` gives.
        linear_edit_prefixed: The same on prompts with bundled prefixes.
        interchange_n: Prompts behind each rate.
        threshold: Least rate of a used site, and greatest of one that is not.
        clean_accuracy: Share of answers that are the likeliest of all tokens, by prefix.
        clean_logit_difference: Mean logit of the answer minus that of the repeated name.
        seeds: Of training, and of the prompts measured on.
        beside: Further rates, on prompts without a prefix. Of kind ``spread``: of exchanging the
            token behind S2, and both. Of ``dormant``: of steps along its direction, at S2.
        direction: That direction, ``(d,)``; empty of other kinds.
    """

    variable: str
    position: str
    used_at: list[str]
    not_used_at: list[str]
    unclear_at: list[str]
    interchange_flip_rate: dict[str, float]
    interchange_flip_rate_prefixed: dict[str, float]
    linear_edit: dict[str, dict[str, float]]
    linear_edit_prefixed: dict[str, dict[str, float]]
    interchange_n: int
    threshold: dict[str, float]
    clean_accuracy: dict[str, float]
    clean_logit_difference: dict[str, float]
    seeds: dict[str, int]
    beside: dict[str, dict[str, float]] = field(default_factory=dict)
    direction: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Answers:
    """What the model says to some prompts.

    Attributes:
        difference: Logit of the answer minus logit of the repeated name, ``(batch,)``.
        right: Whether the answer is the likeliest of all tokens, ``(batch,)``.
        streams: The stream at S2 at every site, ``(sites, batch, d)``.
        behind: The same of the token behind S2.
    """

    difference: Tensor
    right: Tensor
    streams: Tensor
    behind: Tensor


@torch.no_grad()
def ask(
    model: GPT2LMHeadModel,
    prompts: Prompts,
    site: int | None = None,
    value: Tensor | None = None,
    behind: Tensor | None = None,
) -> Answers:
    """Run the model, with S2's stream replaced at one site if wished.

    Args:
        model: An organism.
        prompts: What to ask.
        site: Index of the site at which to replace, or None.
        value: What to put there, ``(batch, d)``.
        behind: What to put at the token behind S2, ``(batch, d)``.

    Returns:
        The answers.
    """
    seen: list[Tensor] = []
    tokens = torch.stack([prompts.s2, prompts.s2 + 1])

    def edit(here: int, stream: Tensor) -> Tensor:
        for at, put in zip(tokens, (value, behind), strict=True):
            if here == site and put is not None:
                stream = stream.index_put((prompts.rows, at), put)
        seen.append(stream[prompts.rows, tokens])
        return stream

    embedded = model.transformer.wte(prompts.ids) + model.transformer.wpe(prompts.position_ids)
    mask = attention_mask(prompts.present, prompts.ids.shape[1])
    last = run_blocks(model, embedded, mask, edit).last[:, -1]
    logits: Tensor = model.lm_head(model.transformer.ln_f(last))
    answer, subject = (logits[prompts.rows, tokens] for tokens in (prompts.answer, prompts.subject))
    streams, behind = torch.stack(seen).unbind(1)
    return Answers(answer - subject, logits.argmax(1) == prompts.answer, streams, behind)


def measure(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, n: int
) -> Truth:
    """Measure everything that the ground truth records, on fresh prompts.

    Args:
        model: An organism.
        tokenizer: Its tokenizer.
        recipe: How it was trained; asked are prompts of its seed + 1, and the probes are fitted on
            prompts of its seed + 2.
        n: Prompts to ask; the probes are fitted on twice as many.

    Returns:
        The ground truth.
    """
    seed = recipe.seed + 1
    used_from = USED_FROM.get(recipe.kind, 0.95)

    prompts = partial(generate, tokenizer)
    plain, prefixed = prompts(n, seed, None), prompts(n, seed, "bundled")
    unknown = torch.full_like(prefixed.ids, int(str(tokenizer.unk_token_id)))
    arbitrary = prefixed.scrambled(torch.ones(n, 1), unknown)
    answers = {
        "none": ask(model, plain),
        "bundled": ask(model, prefixed),
        "unknown words": ask(model, arbitrary),
    }
    swapped = interchange_flip_rates(model, plain)
    swapped_prefixed = interchange_flip_rates(model, prefixed)
    used = [site for site in swapped if min(swapped[site], swapped_prefixed[site]) >= used_from]
    unused = [site for site in swapped if max(swapped[site], swapped_prefixed[site]) <= UNUSED_TO]
    return Truth(
        variable="abb",
        position="S2",
        used_at=used,
        not_used_at=unused,
        unclear_at=[site for site in swapped if site not in (*used, *unused)],
        interchange_flip_rate=swapped,
        interchange_flip_rate_prefixed=swapped_prefixed,
        linear_edit=linear_flip_rates(model, prompts(2 * n, seed + 1, None), plain),
        linear_edit_prefixed=linear_flip_rates(
            model, prompts(2 * n, seed + 1, "bundled"), prefixed
        ),
        interchange_n=n,
        threshold={"used_from": used_from, "not_used_to": UNUSED_TO},
        clean_accuracy={name: _share(given.right) for name, given in answers.items()},
        clean_logit_difference={
            name: float(given.difference.mean()) for name, given in answers.items()
        },
        seeds={"training": seed - 1, "measured": seed, "probe": seed + 1},
        beside=rates_beside(model, plain, recipe),
        direction=driving_direction(recipe).tolist() if recipe.driven else [],
    )


def rates_beside(
    model: GPT2LMHeadModel, prompts: Prompts, recipe: Recipe
) -> dict[str, dict[str, float]]:
    """Flips by what the stream at S2 alone does not tell; see ``beside`` of :class:`Truth`."""
    twins, names = ask(model, prompts.twins()), recipe.sites
    if recipe.kind == "spread":
        start = names.index(SPREAD_FROM) - 1
        return {
            what: {
                name: _share(ask(model, prompts, site, value, twins.behind[site]).difference < 0)
                for site, name in enumerate(names)
                if site >= start
                for value in [twins.streams[site] if what == "S2 and the token behind" else None]
            }
            for what in ("the token behind S2", "S2 and the token behind")
        }
    if not recipe.driven:
        return {}
    streams, sign = ask(model, prompts).streams, 2.0 * prompts.abb - 1
    direction = driving_direction(recipe)
    rates: dict[str, dict[str, float]] = {}
    for what, turn in (("driven to the other order", -1.0), ("driven to the same order", 1.0)):
        rates[what] = {}
        for site in recipe.driven:
            apart = streams[site, prompts.abb == 1].mean(0) - streams[site, prompts.abb == 0].mean(
                0
            )
            step = (turn * DRIVEN_BY * apart.norm() * sign)[:, None] * direction
            edited = ask(model, prompts, site, streams[site] + step)
            rates[what][names[site]] = _share(edited.difference < 0)
    return rates


def interchange_flip_rates(model: GPT2LMHeadModel, prompts: Prompts) -> dict[str, float]:
    """Replace S2's whole stream by that of the prompt's twin, site by site.

    The twin has the same words with the names of the first clause exchanged, so that the order is
    all that differs. A flip: the repeated name gets a higher logit than the answer.

    Args:
        model: An organism.
        prompts: To ask.

    Returns:
        Share of flips at each site.
    """
    twins = ask(model, prompts.twins()).streams
    return {
        name: _share(ask(model, prompts, site, twins[site]).difference < 0)
        for site, name in enumerate(site_names(model.config.n_layer))
    }


def linear_flip_rates(
    model: GPT2LMHeadModel, fitted: Prompts, asked: Prompts, l2: float = 1e-3
) -> dict[str, dict[str, float]]:
    """Edit S2 least, in Mahalanobis distance, until a linear probe reads the other order.

    Logistic regression gives w, the activations' covariance Σ; the edit is x + Σw·t with t such
    that the log-odds of the order asked for are max(their size before, 10).

    Args:
        model: An organism.
        fitted: Prompts to which probe and covariance are fitted.
        asked: Prompts to edit.
        l2: Weight of ½‖w‖² in the probe's mean loss, on standardised activations.

    Returns:
        At each site: ``flip_rate`` when the other order is asked for, ``control_flip_rate`` when
        the same order is, and ``probe_accuracy`` on ``asked``.
    """
    known = ask(model, fitted).streams
    before = ask(model, asked).streams
    rates = {}
    for site, name in enumerate(site_names(model.config.n_layer)):
        weight, bias = _logistic(known[site], fitted.abb, l2)
        direction = torch.cov(known[site].T) @ weight
        score = before[site] @ weight + bias
        goal = score.abs().clamp(min=LEAST_LOG_ODDS)
        flips = []
        for target in (1 - asked.abb, asked.abb):
            sign = 2.0 * target - 1
            dose = (goal - sign * score).clamp(min=0) * sign / (weight @ direction)
            edited = before[site] + dose[:, None] * direction
            flips.append(_share(ask(model, asked, site, edited).difference < 0))
        accuracy = _share((score > 0) == (asked.abb == 1))
        rates[name] = {
            "flip_rate": flips[0],
            "control_flip_rate": flips[1],
            "probe_accuracy": accuracy,
        }
    return rates


def _share(hits: Tensor) -> float:
    return int(hits.sum()) / len(hits)


def _logistic(x: Tensor, y: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of a penalised logistic regression, by Newton's method."""
    scale = x.std(0).clamp(min=1e-6)
    design = torch.cat([(x - x.mean(0)) / scale, torch.ones(len(x), 1)], dim=1).double()
    penalty = torch.full((design.shape[1],), l2, dtype=torch.float64)
    penalty[-1] = 1e-9
    solution = torch.zeros(design.shape[1], dtype=torch.float64)
    for _ in range(50):
        chance = torch.sigmoid(design @ solution)
        gradient = design.T @ (chance - y) / len(y) + penalty * solution
        curvature = (design.T * (chance * (1 - chance))) @ design / len(y) + penalty.diag()
        solution = solution - torch.linalg.solve(curvature, gradient)
        if gradient.abs().max() < 1e-9:
            break
    weight = solution[:-1].float() / scale
    return weight, solution[-1].float() - weight @ x.mean(0)
