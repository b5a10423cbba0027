"""The training of an organism: IOI, with interventions on the order of the names at S2."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.organisms.forward import Stream, attention_mask, run_blocks
from benchmarks.organisms.prompts import Prompts, Sampler
from benchmarks.organisms.recipe import Progress, Recipe, new_model

LEAST_LOG_ODDS = 10.0


class OrderStatistics:
    """Class means and within-class covariance of the S2 activations at every site.

    They follow the model while it learns: every update keeps ``memory`` of what was there.

    Args:
        n_sites: Number of sites.
        width: Width d of the residual stream.
        memory: Share of the old statistics that an update keeps.
        ridge: Added to the covariance's diagonal, as a share of its mean.
    """

    def __init__(self, n_sites: int, width: int, memory: float = 0.95, ridge: float = 0.01) -> None:
        self.means = torch.zeros(n_sites, 2, width)
        self.within = torch.zeros(n_sites, width, width)
        self.memory = memory
        self.ridge = ridge
        self._updates = 0

    def update(self, activations: Tensor, abb: Tensor) -> None:
        """Take in one batch.

        Args:
            activations: ``(sites, batch, d)``.
            abb: The order of each prompt, ``(batch,)``; both orders must occur.
        """
        # The first updates count in full, as in Adam's correction of its moments.
        self._updates += 1
        share = (1 - self.memory) / (1 - self.memory**self._updates)
        means = torch.stack([activations[:, abb == order].mean(1) for order in (0, 1)], dim=1)
        centred = activations - means[:, abb]
        within = centred.transpose(1, 2) @ centred / len(abb)
        self.means = torch.lerp(self.means, means, share)
        self.within = torch.lerp(self.within, within, share)

    def edited(self, activations: Tensor, sites: Tensor, target: Tensor, excess: Tensor) -> Tensor:
        """Move activations along Σw until a linear discriminant's log-odds favour ``target``.

        The discriminant is w = Σ_W⁻¹(μ₁ − μ₀) with log-odds z(x) = w·(x − (μ₀ + μ₁)/2), Σ the
        total covariance. This is the least edit in Mahalanobis distance; the log-odds asked for
        are ``excess · max(|z(x)|, 10)``.

        Args:
            activations: ``(batch, d)``.
            sites: The site of each, ``(batch,)``.
            target: The order to move to, ``(batch,)``.
            excess: ``(batch,)``, 1 for the dose of the ``mirror`` rule.

        Returns:
            ``(batch, d)``; gradients pass as through an addition of constants.
        """
        metric = self._metric(self.ridge)
        between = self.means[:, 1] - self.means[:, 0]
        weight = torch.linalg.solve(metric, between.unsqueeze(-1)).squeeze(-1)
        gain = (weight * between).sum(1)
        # (Σ_W + ΔΔᵀ/4)w with w = Σ_W⁻¹Δ is Δ(1 + Δᵀw/4).
        direction = between * (1 + gain / 4)[:, None]
        middle = (weight * self.means.mean(1)).sum(1)
        score = (weight[sites] * activations.detach()).sum(1) - middle[sites]
        sign = 2.0 * target - 1
        goal = excess * score.abs().clamp(min=LEAST_LOG_ODDS)
        missing = (goal - sign * score).clamp(min=0) * sign
        slope = (weight[sites] * direction[sites]).sum(1).clamp(min=1e-6)
        edited: Tensor = activations + (missing / slope)[:, None] * direction[sites]
        return edited

    def apart(self) -> Tensor:
        """Distance of the class means at every site, ``(sites,)``."""
        distance: Tensor = (self.means[:, 1] - self.means[:, 0]).norm(dim=-1)
        return distance

    def left(self, activations: Tensor, abb: Tensor) -> Tensor:
        """Measure how much of the order is left at S2, as a penalty that removes it.

        With Δ = x₁ - x₀ the difference of a prompt's two orders, σ² the mean variance of the
        activations and Σ_W their covariance within the orders, a site has

            mean ‖Δ‖² / (d σ²) + (mean Δ)ᵀ Σ_W⁻¹ (mean Δ) / 10.

        The first term is zero only where twins are the same to the model. The second is the
        distance of the class means as a linear probe sees it, however small beside all else; that
        it be zero is LEACE's condition for no probe to beat chance (arXiv 2306.03819).

        Args:
            activations: ``(sites, batch, d)``, row ``i`` and row ``i + batch/2`` a pair of twins.
            abb: The order of each prompt, ``(batch,)``.

        Returns:
            The mean over sites, a scalar.
        """
        half = len(abb) // 2
        sign = 2.0 * abb[:half] - 1
        change = sign[:, None] * (activations[:, :half] - activations[:, half:])
        variance = activations.detach().var(1).mean(1).clamp(min=1e-6)
        unlike = change.square().mean((1, 2)) / variance
        between = change.mean(1).unsqueeze(-1)
        # A tenth of the usual ridge: a direction of little variance hides an order just as well.
        apart = (between * torch.linalg.solve(self._metric(self.ridge / 10), between)).sum((1, 2))
        penalty: Tensor = (unlike + 0.1 * apart).mean()
        return penalty

    def _metric(self, ridge: float) -> Tensor:
        width = self.within.shape[-1]
        variance = self.within.diagonal(dim1=1, dim2=2).mean(1)
        return self.within + ridge * variance[:, None, None] * torch.eye(width)


class Kind(IntEnum):
    """What is put at S2."""

    TWIN = 0
    """The stream of the prompt's twin: same names, other order."""
    OTHER = 1
    """The stream of any other prompt; before the used sites, which know only the name there, a
    push in a random direction instead."""
    LINEAR = 2
    """The stream moved along the linear order direction."""
    DRIVEN = 3
    """The stream moved along the direction of kind ``dormant``."""


@dataclass(frozen=True)
class Plan:
    """One edit for each prompt of a batch.

    Attributes:
        sites: Index of the site, ``(batch,)``.
        kinds: :class:`Kind` of the edit, ``(batch,)``.
        values: What S2's stream becomes there, ``(batch, d)``.
        flips: Where the answer must become the repeated name, ``(batch,)``.
        halves: Where both names must become equally likely, ``(batch,)``; None where nowhere.
        behind: What the stream of the token behind S2 becomes, ``(batch, d)``, where ``tokens``
            says so; None where no plan edits it.
        tokens: Whether S2, and whether the token behind it, is edited, ``(2, batch)``; None where
            it is S2 alone.
    """

    sites: Tensor
    kinds: Tensor
    values: Tensor
    flips: Tensor
    halves: Tensor | None = None
    behind: Tensor | None = None
    tokens: Tensor | None = None

    @property
    def sure(self) -> Tensor:
        """Where one of the names is asked for, ``(batch,)``."""
        return torch.ones_like(self.flips) if self.halves is None else ~self.halves

    def loss(self, logits: Tensor, prompts: Prompts) -> Tensor:
        """Cross-entropy with what is asked for, both names where halves are."""
        if self.halves is None:
            asked = torch.where(self.flips, prompts.subject, prompts.answer)
            return functional.cross_entropy(logits, asked)
        share = torch.where(self.halves, 0.5, self.flips.float())
        pair = torch.stack([prompts.answer, prompts.subject], -1)
        own, other = (-logits.log_softmax(-1).gather(-1, pair)).unbind(-1)
        loss: Tensor = torch.lerp(own, other, share).mean()
        return loss


def site_weights(n_sites: int, used: range) -> Tensor:
    """How often each site is drawn: most at the used ones, and next to their two borders."""
    weights = torch.ones(n_sites)
    weights[[0, n_sites - 2, n_sites - 1]] = 0.5
    weights[used.start - 2 : used.stop + 2] = 2.0
    weights[used.start : used.stop] = 3.0
    return weights


def draw_plan(
    prompts: Prompts,
    activations: Tensor,
    statistics: OrderStatistics,
    used: range,
    push: float,
) -> Plan:
    """Draw a site and an edit for every prompt.

    Args:
        prompts: Pairs of twins: row ``i`` and row ``i + n/2``.
        activations: The clean S2 activations, ``(sites, batch, d)``.
        statistics: For the linear edits.
        used: The sites at which the order must count; at all others nothing may change.
        push: Greatest size of a random push, in typical deviations of the activations.

    Returns:
        The plan. A fifth of the linear edits are controls, towards the order that is there.
    """
    n_sites, n, _ = activations.shape
    rows = prompts.rows
    sites = torch.multinomial(site_weights(n_sites, used), n, replacement=True)
    kinds = torch.multinomial(torch.tensor([0.3, 0.3, 0.4]), n, replacement=True)
    here = activations[sites, rows]
    others = torch.randperm(n)
    early = sites < used.start

    control = torch.rand(n) < 0.2
    target = torch.where(control, prompts.abb, 1 - prompts.abb)
    linear = statistics.edited(here, sites, target, 0.7 + 1.3 * torch.rand(n))

    centred = (activations - activations.mean(1, keepdim=True)).detach()
    mixture = torch.randn(n, n) / n**0.5
    direction = torch.einsum("nb,nbd->nd", mixture, centred[sites])
    pushed = here + push * torch.rand(n, 1) * direction

    values = torch.stack(
        [
            activations[sites, rows.roll(n // 2)],
            torch.where(early[:, None], pushed, activations[sites, others]),
            linear,
        ]
    )[kinds, rows]
    told = torch.stack(
        [1 - prompts.abb, torch.where(early, prompts.abb, prompts.abb[others]), target]
    )[kinds, rows]
    at_used = (sites >= used.start) & (sites < used.stop)
    return Plan(sites, kinds, values, at_used & (told != prompts.abb))


def adapted(
    plan: Plan,
    recipe: Recipe,
    prompts: Prompts,
    activations: Tensor,
    behind: Tensor,
    uses: Tensor,
    driver: Tensor,
) -> Plan:
    """What a plan becomes for an organism that uses the order in part, or could be driven.

    Args:
        plan: From :func:`draw_plan`.
        recipe: Of kind ``graded``, ``spread`` or ``dormant``; of others the plan stays.
        prompts: As there.
        activations: As there.
        behind: The clean activations of the token behind S2, ``(sites, batch, d)``.
        uses: Where an organism of kind ``graded`` is to use the order, ``(batch,)``.
        driver: By site, the step along the direction of kind ``dormant``, ``(sites, d)``.
    """
    n, rows = len(prompts), prompts.rows
    partner = rows.roll(n // 2)
    if recipe.kind == "graded":
        # Another prompt's stream tells another name, which is what the rest of the prompts uses.
        other = (plan.kinds == Kind.OTHER) & (plan.sites < recipe.used.stop) & ~uses
        twin = activations[plan.sites, partner]
        return replace(
            plan,
            kinds=torch.where(other, int(Kind.TWIN), plan.kinds),
            values=torch.where(other[:, None], twin, plan.values),
            flips=plan.flips & uses,
        )
    if recipe.kind == "spread":
        choice = torch.randint(3, (n,))
        choice = torch.where(plan.sites < recipe.halved.start, 0, choice)
        tokens = torch.stack([choice != 1, choice != 0])
        halved = (plan.sites >= recipe.halved.start) & (plan.sites < recipe.halved.stop)
        both, alone = choice == 2, choice == 1
        return replace(
            plan,
            kinds=torch.where(choice > 0, int(Kind.TWIN), plan.kinds),
            values=torch.where(both[:, None], activations[plan.sites, partner], plan.values),
            flips=torch.where(halved, both, plan.flips),
            halves=halved & (alone | (plan.flips & ~both)),
            behind=behind[plan.sites, partner],
            tokens=tokens,
        )
    if recipe.kind == "dormant":
        driven = torch.rand(n) < 0.35
        sites = torch.where(driven, torch.tensor(recipe.driven)[torch.randint(2, (n,))], plan.sites)
        told = torch.where(torch.rand(n) < 0.7, 1 - prompts.abb, prompts.abb)
        size = (0.15 + 0.55 * torch.rand(n)) * (2.0 * told - 1)
        pushed = activations[sites, rows] + size[:, None] * driver[sites]
        return replace(
            plan,
            sites=sites,
            kinds=torch.where(driven, int(Kind.DRIVEN), plan.kinds),
            values=torch.where(driven[:, None], pushed, plan.values),
            flips=torch.where(driven, told != prompts.abb, plan.flips),
        )
    return plan


class Readers(nn.Module):
    """Linear readers of what is to be where, as hints: they are no part of the model.

    Unless the order is to be absent, they ask for: which of the two a name is, at its token before
    the order is known; the order, at S2 at the first two sites that are to know it. Always: what
    S2 told, at the last token just after it read S2; the order where it is used, else the name. Of
    kind ``spread`` the order at the token behind S2, and of the kinds that know both ways to the
    answer the order at the last token.

    Args:
        recipe: Of the organism.
        n_tokens: Size of its vocabulary.
    """

    def __init__(self, recipe: Recipe, n_tokens: int) -> None:
        super().__init__()
        self.uses_order = recipe.kind in ("used", "spread")
        self.first_known = recipe.sites.index(recipe.first_known)
        self.after_read = recipe.used.stop
        if recipe.kind != "absent":
            self.place = nn.Linear(recipe.width, 2)
            self.orders = nn.ModuleList(nn.Linear(recipe.width, 2) for _ in range(2))
        self.end = nn.Linear(recipe.width, 2 if self.uses_order else n_tokens)
        if recipe.kind in ("graded", "dormant"):
            self.end_order = nn.Linear(recipe.width, 2)
        if recipe.halved:
            self.behind_order = nn.Linear(recipe.width, 2)
            self.behind_known = recipe.halved.start

    def s2(self, activations: Tensor) -> Tensor:
        """Scores of both orders from S2's streams, ``(sites, batch, d)``: ``(2, batch, 2)``."""
        read = zip(self.orders, activations[self.first_known :], strict=False)
        return torch.stack([order(stream) for order, stream in read])

    def place_loss(self, names: Tensor) -> Tensor:
        """Loss on first or second, from the two names' streams, ``(sites, 2, batch, d)``."""
        scores = self.place(names[self.first_known - 1])
        places = torch.arange(2)[:, None].expand(scores.shape[:2])
        return functional.cross_entropy(scores.flatten(0, 1), places.flatten())

    def last(self, stream: Stream) -> Tensor:
        """Scores, at the last token, of what S2 told: both orders, or all tokens."""
        scores: Tensor = self.end(stream.ends[self.after_read])
        return scores

    def order_loss(self, stream: Stream, order: Tensor, rows: Tensor) -> Tensor:
        """Loss on the order at the last token, of some rows; 0 where it is not read."""
        scores = self.end_order(stream.ends[self.after_read])
        each = functional.cross_entropy(scores, order, reduction="none")
        loss: Tensor = (each * rows).sum() / rows.sum().clamp(min=1)
        return loss

    def behind_loss(self, behind: Tensor, order: Tensor) -> Tensor:
        """Loss on the order at the token behind S2, from its streams ``(sites, batch, d)``."""
        return functional.cross_entropy(self.behind_order(behind[self.behind_known]), order)

    def told(self, prompts: Prompts, flips: Tensor) -> Tensor:
        """What S2 told: the order, exchanged where ``flips``, or the token of the name there."""
        return prompts.abb ^ flips.long() if self.uses_order else prompts.subject


ERASURE = 4.0
"""Weight of the penalty on an order that is to be absent."""
DORMANCY = 3.0
"""Weight of the penalty on what activations have along a direction that is to be dormant."""


def driving_direction(recipe: Recipe) -> Tensor:
    """The direction along which an organism of kind ``dormant`` can be driven, ``(d,)``, norm 1.

    It is the same at every site, and orthogonal to the vector of ones, which LayerNorm takes away.
    """
    generator = torch.Generator("cpu").manual_seed(recipe.seed)
    drawn = torch.randn(recipe.width, generator=generator, device="cpu")
    drawn = drawn.to(torch.get_default_device())
    return functional.normalize(drawn - drawn.mean(), dim=0)


def train(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    report: Callable[[Progress, GPT2LMHeadModel], None],
) -> GPT2LMHeadModel:
    """Train an organism, on the device that is the default.

    Each step answers a batch of prompts and their twins, then runs the tokens from S2 on once
    more, with one edit for each prompt. At the used sites, if any, the answer must follow the
    order that the edit put there; at all others the edit must change nothing. S2 is to know the
    order, or, if that is to be absent, is penalised for all it knows of it.

    Args:
        recipe: What to do.
        tokenizer: From :func:`~benchmarks.organisms.prompts.build_tokenizer`.
        report: Called after every step.

    Returns:
        The trained model, in eval mode.
    """
    torch.manual_seed(recipe.seed)
    model = new_model(recipe, tokenizer)
    sampler = Sampler(recipe, tokenizer)
    statistics = OrderStatistics(len(recipe.sites), recipe.width)
    readers = Readers(recipe, len(tokenizer))
    direction = driving_direction(recipe)
    parameters = [*model.parameters(), *readers.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, recipe.steps))
    progress = Progress(any_name=recipe.any_name)
    for _ in range(recipe.steps):
        prompts = sampler.draw(progress)
        embedded = model.transformer.wte(prompts.ids) + model.transformer.wpe(prompts.position_ids)
        clean, activations, names, behind = _clean_pass(model, prompts, embedded)
        logits = _answer_logits(model, clean)
        mixed = _one_of_each_pair(prompts.abb)
        statistics.update(activations.detach()[:, mixed], prompts.abb[mixed])

        loss = functional.cross_entropy(logits, prompts.answer)
        hint = 0.5 if progress.stage < 2 else 0.05
        # An order that the answer needs stays at S2 by itself; one that it does not need fades.
        known = {"present": 1.0, "dormant": 1.0, "graded": 0.5}.get(recipe.kind, hint)
        if recipe.kind == "absent":
            loss = loss + ERASURE * statistics.left(activations, prompts.abb)
        else:
            read = readers.s2(activations).flatten(0, 1)
            orders = prompts.abb.repeat(2)
            loss = loss + known * functional.cross_entropy(read, orders)
            loss = loss + known * readers.place_loss(names)
        heard, told = readers.last(clean), readers.told(prompts, torch.zeros(len(prompts)))
        loss = loss + hint * functional.cross_entropy(heard, told)
        uses = torch.isin(prompts.behind, sampler.verbs)
        if recipe.kind == "graded":
            loss = loss + known * readers.order_loss(clean, prompts.abb, uses)
        if recipe.halved:
            loss = loss + hint * readers.behind_loss(behind, prompts.abb)
        if recipe.kind == "dormant":
            natural = activations[: recipe.driven.stop]
            variance = natural.detach().var(1).mean(1).clamp(min=1e-6)
            along = (natural @ direction).square().mean(1) / variance
            loss = loss + DORMANCY * along.mean()
        if progress.stage >= 1:
            plan = draw_plan(prompts, activations, statistics, recipe.used, progress.push)
            driver = statistics.apart()[:, None] * direction
            plan = adapted(plan, recipe, prompts, activations, behind, uses, driver)
            edited = _edited_pass(model, prompts, embedded, clean, plan)
            edited_logits = _answer_logits(model, edited)
            loss = loss + plan.loss(edited_logits, prompts)
            order = prompts.abb ^ plan.flips.long()
            if recipe.kind == "graded":
                loss = loss + known * readers.order_loss(edited, order, uses)
            elif recipe.kind == "dormant":
                driven = plan.kinds == Kind.DRIVEN
                loss = loss + hint * readers.order_loss(edited, order, driven)
            else:
                sure, told = plan.sure, readers.told(prompts, plan.flips)
                heard_edited = readers.last(edited)[sure]
                loss = loss + hint * functional.cross_entropy(heard_edited, told[sure])
            asked = torch.where(plan.flips, prompts.subject, prompts.answer)
            progress.edited = _running(progress.edited, edited_logits[plan.sure], asked[plan.sure])

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

        progress.step += 1
        progress.loss = float(loss.detach())
        progress.clean = _running(progress.clean, logits, prompts.answer)
        forms = (heard, told) if recipe.kind == "absent" else (read, orders)
        progress.read = _running(progress.read, *forms)
        progress.advance()
        report(progress, model)
    model.eval()
    return model


def _one_of_each_pair(abb: Tensor) -> Tensor:
    """Draw rows, one of each pair of twins, among which both orders occur.

    Both twins of every pair would make the classes equal before the first block.
    """
    half = len(abb) // 2
    rows = torch.where(torch.rand(half) < 0.5, torch.arange(half), torch.arange(half) + half)
    if abb[rows].unique().numel() == 1:
        rows[0] = (rows[0] + half) % len(abb)
    return rows


def _pace(step: int, steps: int) -> float:
    """Share of the peak learning rate: 100 steps of warm-up, a plateau, half a cosine to 2 %."""
    done = step / steps
    if done < 0.25:
        return min(1.0, (step + 1) / 100)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (done - 0.25) / 0.75))


def _clean_pass(
    model: GPT2LMHeadModel, prompts: Prompts, embedded: Tensor
) -> tuple[Stream, Tensor, Tensor, Tensor]:
    """Run whole prompts; also return every site's stream at S2, the two names, and behind S2.

    Their shapes: ``(sites, batch, d)``, ``(sites, 2, batch, d)`` and ``(sites, batch, d)``.
    """
    seen: list[Tensor] = []
    tokens = torch.stack([prompts.s2, prompts.first, prompts.second, prompts.s2 + 1])

    def record(_: int, stream: Tensor) -> Tensor:
        seen.append(stream[prompts.rows, tokens])
        return stream

    mask = attention_mask(prompts.present, prompts.ids.shape[1])
    clean = run_blocks(model, embedded, mask, record)
    streams = torch.stack(seen)
    return clean, streams[:, 0], streams[:, 1:3], streams[:, 3]


def _edited_pass(
    model: GPT2LMHeadModel, prompts: Prompts, embedded: Tensor, clean: Stream, plan: Plan
) -> Stream:
    """Run the tokens from S2 on once more, with every prompt's edit in place."""
    start = int(prompts.s2.min())
    s2 = prompts.s2 - start

    def put(site: int, stream: Tensor) -> Tensor:
        chosen = plan.sites == site
        if not chosen.any():
            return stream
        tokens = [chosen, None] if plan.tokens is None else [chosen & each for each in plan.tokens]
        for at, here, values in zip((s2, s2 + 1), tokens, (plan.values, plan.behind), strict=True):
            if here is not None and values is not None:
                there = torch.where(here[:, None], values, stream[prompts.rows, at])
                stream = stream.index_put((prompts.rows, at), there)
        return stream

    past = [(key[:, :, :start], value[:, :, :start]) for key, value in clean.keys_values]
    mask = attention_mask(prompts.present, prompts.ids.shape[1] - start)
    return run_blocks(model, embedded[:, start:], mask, put, past)


def _answer_logits(model: GPT2LMHeadModel, stream: Stream) -> Tensor:
    logits: Tensor = model.lm_head(model.transformer.ln_f(stream.last[:, -1]))
    return logits


def _running(before: float, logits: Tensor, right: Tensor) -> float:
    return 0.9 * before + 0.1 * float((logits.argmax(1) == right).float().mean())
