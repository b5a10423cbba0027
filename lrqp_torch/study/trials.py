"""Trials: many edits of the same prompts, each batch of which runs clean only once.

trials = Trials(context, context.task.test)
moved = trials.add("L6.mid", delta)
written = trials.write("L7.pre", edit, target)
trials.run()
flipped(trials.clean, moved), written["preference"]
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.baselines import Baseline, Paired
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import WidthError
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.intervene import EditContext, Intervention, intervene
from lrqp_torch.stream.sites import Site
from lrqp_torch.study.attribution import attention_to
from lrqp_torch.study.ceiling import Interchange, interchange_of, likenesses
from lrqp_torch.study.context import Advance, StudyContext, Task, no_progress
from lrqp_torch.study.estimates import Estimate, Sample
from lrqp_torch.study.heads import parse_head
from lrqp_torch.study.prompts import PromptSet
from lrqp_torch.study.running import (
    Batch,
    Twinned,
    answers,
    batches,
    divergences,
    finite,
    placed,
    put,
)


class Trial:
    """One edit of every prompt, and what it did once it has run.

    Args:
        site: where it acts; None for no edit.
        place: gives the edit of the prompts ``rows``, (B,), at columns ``at``, (B,).
        patch: the trial, added before, that it is held against.
    """

    def __init__(
        self,
        site: str | None,
        place: Callable[[Tensor, Tensor], Intervention] | None,
        patch: "Trial | None" = None,
    ) -> None:
        self.site, self.place, self.patch = site, place, patch
        self.found: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """What was seen of each prompt, (n, ...) on the CPU, by the names in :class:`Trials`."""
        return self.found[name]


class Trials:
    """Edits of the marked token of n prompts, run batch by batch.

    Every trial has ``preference``, ``own_lead`` and ``other_lead`` of :func:`~.running.answers`
    where the prompts have answers, and ``said`` of :meth:`PromptSet.said`, (n, K); and where it is
    asked for:

    - ``divergence``, KL(clean ‖ edited) of the next token in nats, mean over the columns
      ``elsewhere``, and ``rest``, the part of it that is not about the answers. By the chain rule
      KL is that of the events "this answer", for each, and "none of them", and P(none) times the KL
      of the next token given none; the latter is ``rest``. Without answers it is all. The clean run
      has ``said_elsewhere``, the mean probability of the answers there;
    - ``attention``, the change of the watched heads' attention from the last column to the first
      key less that to the second, mean over heads; missing where all lie below the edits;
    - ``activations`` that the stream holds at the marked token after the edit, (n, d);
    - ``kl_to_interchange``, KL(interchange ‖ edited) of the token at the end, in nats, where there
      is an :meth:`ceiling`, or the trial has a patch of its own; the interchange has
      ``kl_at_end``, KL(clean ‖ interchange) there.

    Args:
        context: the model, and how many prompts a batch has.
        prompts: padded on the left.
        elsewhere: columns at which the next-token distribution should stay, BoolTensor (n, T), at
            least one a prompt and none before the marked one.
        watched: heads.
        keys: the two columns to which their attention is read, (n, 2).
        activations: whether to keep them.

    Attributes:
        clean: the trial without an edit.
        sample: estimates over the prompts, from the study's seed.
        twinned: the ceiling, see :meth:`ceiling`; None where no prompt has a twin.
        known: which prompts have one, BoolTensor (n,).
    """

    def __init__(
        self,
        context: StudyContext,
        prompts: PromptSet,
        *,
        elsewhere: Tensor | None = None,
        watched: Sequence[str] = (),
        keys: Tensor | None = None,
        activations: bool = False,
    ) -> None:
        self._context, self._prompts = context, prompts
        self.elsewhere, self.keys, self.activations = elsewhere, keys, activations
        self.watched = [] if keys is None else [parse_head(name) for name in watched]
        self.clean, self.sample = Trial(None, None), Sample(context.seed, prompts.groups)
        self.twinned: Trial | None = None
        self.known = torch.zeros(len(prompts), dtype=torch.bool)
        self._trials: list[Trial] = []

    def add(
        self,
        site: str,
        delta: Tensor,
        patch: Trial | None = None,
        metric: Mahalanobis | None = None,
    ) -> Trial:
        """Add a displacement to the stream of each prompt, (n, d); the clean run where all are 0.

        ``patch`` is as of :class:`Trial`; what changes nothing is not held against it. With a
        metric the trial has the ``distance``, (n,).

        Raises:
            WidthError: not one displacement for each prompt.
        """
        n = len(self._prompts)
        if delta.ndim != 2 or len(delta) != n:
            raise WidthError(
                f"a trial at {site} has displacements {tuple(delta.shape)}; give one for each of "
                f"the {n} held-out prompts"
            )

        def place(rows: Tensor, at: Tensor) -> Intervention:
            own = _rows(delta, rows, at)

            def add(x: Tensor, context: EditContext) -> Tensor:
                return (x.double() + own[context.index]).to(x.dtype)

            return Intervention(site, at, add)

        made = self._added(Trial(site, place, patch)) if bool(delta.any()) else self.clean
        if metric is not None:
            made.found["distance"] = metric.distance(delta).cpu()
        return made

    def ceiling(self, site: str, metric: Mahalanobis) -> None:
        """Put the activation of each prompt's twin in the place of its own, where there are twins.

        Add it before all edits, which are then held against it.

        Args:
            site: where.
            metric: in which the distance of both is measured.
        """
        task = Task("", self._context.task.train, self._prompts)
        item = Twinned.of(self._context, task, site, metric.distance)
        if item is None:
            return

        def place(rows: Tensor, at: Tensor) -> Intervention:
            return Intervention(site, at, placed(_rows(item.x, rows, at)))

        self.twinned, self.known = self._added(Trial(site, place)), item.known
        self.twinned.found["distance"] = item.distance

    def likenesses(
        self,
        edits: Mapping[str, Trial],
        patch: Trial | None = None,
        known: Tensor | None = None,
    ) -> tuple[Interchange | None, dict[str, dict[str, Any]]]:
        """The ceiling, and how edits that are shown together compare with it.

        Args:
            edits: of which each knows its ``distance``, (n,).
            patch: another ceiling than that of :meth:`ceiling`.
            known: which prompts have a twin by it, (n,).

        Returns:
            None, and nothing, where no prompt has a twin.
        """
        patch, known = patch or self.twinned, self.known if known is None else known
        if patch is None:
            return None, {}
        if patch is self.twinned:
            patch.found["divergence"] = patch["kl_at_end"]
        clean, how = self.clean.found, (known, self._context.seed, self._prompts.groups)
        held = {name: (trial.found, patch.found) for name, trial in edits.items()}
        return interchange_of(clean, patch.found, *how), likenesses(clean, held, *how)

    def write(
        self,
        site: str,
        edit: Baseline,
        target: Tensor,
        source: Tensor | None = None,
        partners: Tensor | None = None,
    ) -> Trial:
        """Make an edit of each prompt.

        Args:
            site: where it acts.
            edit: at the strength wanted.
            target: class to write, (n,).
            source: class that holds, (n,); None for the reference probe's own reading.
            partners: what a method that patches writes, (n, d).
        """

        def place(rows: Tensor, at: Tensor) -> Intervention:
            own = edit if partners is None else with_partners(edit, _rows(partners, rows, at))
            holds = None if source is None else _rows(source, rows, at)
            wanted = _rows(target, rows, at)
            return own.on(site, positions=at, target=wanted, source=holds, record=False)

        return self._added(Trial(site, place))

    @torch.no_grad()
    def run(self, trial_done: Advance = no_progress, batch_done: Advance = no_progress) -> None:
        """Run every prompt clean and under every edit.

        The clean run goes the way of the edits, from the lowest site's layer on, so that an edit
        there which changes nothing leaves every bit as it is.

        Args:
            trial_done: called with the number of prompts after each trial of a batch.
            batch_done: the same after each batch.

        Raises:
            NonFiniteError: a displacement or the model's logits hold NaN or infinity.
        """
        model, n = self._context.model, len(self._prompts)
        sites = [trial.site for trial in self._trials if trial.site]
        lowest = min((Site.parse(site).layer for site in sites), default=0)
        # No edit changes what heads below all of them attend to.
        layers = sorted({layer for layer, _ in self.watched if layer >= lowest})
        for batch in batches(model, self._prompts, self._context.batch_size):
            with ExitStack() as stack:
                patterns: dict[int, Tensor] = {}
                if layers:  # recording them makes attention slower
                    end = batch.prompts.end
                    patterns = stack.enter_context(record_patterns(model, layers, end))
                seen = _Seen(self, batch, lowest, patterns)
                put(self.clean.found, seen.clean, batch.rows, n)
                for trial in self._trials:
                    put(trial.found, seen.under(trial), batch.rows, n)
                    trial_done(len(batch))
            batch_done(len(batch))

    @property
    def patches(self) -> set[Trial]:
        """The trials that others are held against."""
        return {trial.patch for trial in self._trials if trial.patch is not None}

    def _added(self, trial: Trial) -> Trial:
        self._trials.append(trial)
        return trial


class _Seen:
    """What is seen of one batch, clean and under each edit.

    Attributes:
        clean: of the clean run, by the names in :class:`Trials`.
    """

    def __init__(
        self, trials: Trials, batch: Batch[PromptSet], lowest: int, patterns: dict[int, Tensor]
    ) -> None:
        self._trials, self._batch, self._patterns = trials, batch, patterns
        self._heads = [head for head in trials.watched if head[0] >= lowest]
        end, self._mask, self._columns = batch.prompts.end, torch.ones(0), None
        if trials.elsewhere is not None:
            mask = _rows(trials.elsewhere, batch.rows, end)
            # The last column is read for the answers.
            self._columns = mask.any(0).index_fill(0, end[:1], True).nonzero().flatten()
            self._mask = mask[:, self._columns]
        self._ends: dict[Trial, Tensor] = {}
        logits = self._run(lowest, "the clean run")
        self._end = logits[:, -1]
        self.clean = self._answers(logits)
        if trials.elsewhere is not None:
            self._log_p = logits.float().log_softmax(-1)
            self.clean["said_elsewhere"] = self._mean(self._said(self._log_p))
        if self._heads:
            self._attended = self._attention()

    def under(self, trial: Trial) -> dict[str, Tensor]:
        """What is seen under an edit."""
        assert trial.site is not None and trial.place is not None
        item = trial.place(self._batch.rows, self._batch.prompts.position)
        found: dict[str, Tensor] = {}

        def keep(x: Tensor, context: EditContext) -> Tensor:
            found["activations"] = x[context.index.argsort()]
            return x

        # Edits at one site run in their order, so that this one reads what the other wrote.
        reader = Intervention(item.site, item.positions, keep)
        with intervene(self._batch.model, [item, reader] if self._trials.activations else [item]):
            logits = self._run(Site.parse(trial.site).layer, f"an edit at {trial.site}")
        found |= self._answers(logits)
        if trial is self._trials.twinned:
            found["kl_at_end"] = divergences(self._end, logits[:, -1])
        if trial is self._trials.twinned or trial in self._trials.patches:
            self._ends[trial] = logits[:, -1]
        patch = self._trials.twinned if trial.patch is None else trial.patch
        if patch in self._ends:
            found["kl_to_interchange"] = divergences(self._ends[patch], logits[:, -1])
        if self._trials.elsewhere is not None:
            found |= self._divergences(logits.float().log_softmax(-1))
        if self._heads:
            shift = (self._attention() - self._attended).sum(-1)
            found["attention"] = (shift / len(self._trials.watched)).double()
        return found

    def _run(self, layer: int, where: str) -> Tensor:
        """Logits of the columns that are read, (B, columns, vocabulary)."""
        logits = self._batch.replay.run(layer, self._columns)
        return finite(logits if logits.ndim == 3 else logits.unsqueeze(1), where)

    def _answers(self, logits: Tensor) -> dict[str, Tensor]:
        prompts, rest = self._batch.prompts, self._batch.rest()
        if prompts.answers is None:
            return {}
        said = prompts.said(logits[:, -1], rest)
        return answers(prompts, logits[:, -1], rest) | {"said": said}

    def _divergences(self, log_q: Tensor) -> dict[str, Tensor]:
        terms = self._log_p.exp() * (self._log_p - log_q)
        none, still = (
            torch.log1p(-self._said(log).clamp_max(1 - 1e-7)) for log in (self._log_p, log_q)
        )
        about = self._of_answers(terms).sum(-1) + none.exp() * (none - still)
        # Rounding may leave a sum of 1e-9 below 0.
        whole, rest = terms.sum(-1).clamp_min(0), (terms.sum(-1) - about).clamp_min(0)
        return {"divergence": self._mean(whole), "rest": self._mean(rest)}

    def _said(self, log_p: Tensor) -> Tensor:
        """Probability of any answer at each column, (B, columns)."""
        return self._of_answers(log_p.exp()).sum(-1)

    def _of_answers(self, values: Tensor) -> Tensor:
        """The entries of the answers, (B, columns, answers), of values (B, columns, vocabulary)."""
        said = self._batch.prompts.first_tokens
        tokens = said.unsqueeze(1).expand(-1, values.shape[1], -1)
        return values.gather(-1, tokens.clamp_min(0)).masked_fill(tokens < 0, 0.0)

    def _mean(self, values: Tensor) -> Tensor:
        """Mean over the columns elsewhere, (B, columns) → (B,), float64."""
        return ((values * self._mask).sum(-1) / self._mask.sum(-1)).double()

    def _attention(self) -> Tensor:
        """Attention to the first key less that to the second, (B, heads)."""
        assert self._trials.keys is not None
        first, second = _rows(self._trials.keys, self._batch.rows, self._batch.prompts.end).T
        rows = [(self._patterns[layer][:, [head]]) for layer, head in self._heads]
        return torch.cat([attention_to(p, first) - attention_to(p, second) for p in rows], dim=-1)


def flipped(own_lead: Tensor, other_lead: Tensor) -> Estimate:
    """Of the prompts answered by the class that holds, the share then answered by the next one.

    By the lead of the one in the clean run and of the other under an edit, (n,) each.
    """
    return Sample(0).flipped({"own_lead": own_lead}, {"other_lead": other_lead})


def displacements(
    edit: LRQP, x: Tensor, target: Tensor, source: Tensor, asked: Tensor | None = None
) -> Tensor:
    """What an edit adds to activations (n, d), in float64; 0 where it cannot reach the target.

    ``asked`` is as in :meth:`LRQP.solve`.
    """
    wide = x.double()
    return edit.solve(wide, target, source, asked=asked).x_new.detach() - wide


def with_partners(edit: Baseline, activations: Tensor) -> Baseline:
    """The edit, with what it writes, (n, d), if it is one that needs to be told."""
    return edit.paired(activations) if isinstance(edit, Paired) else edit


def _rows(values: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """Some rows of a tensor, on the device of another one."""
    return values[rows.to(values.device)].to(like.device)
