"""The runs of the model that the table needs at one site."""

from collections.abc import Sequence

from torch import Tensor

from lrqp_torch.baselines import Baseline, Paired
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.study.compare.editable import Effects, Run
from lrqp_torch.study.compare.measuring import Swept
from lrqp_torch.study.compare.methods import NOTHING, Candidate
from lrqp_torch.study.compare.options import CompareOptions
from lrqp_torch.study.compare.oracles import Oracles
from lrqp_torch.study.compare.partners import partners, partners_of_class
from lrqp_torch.study.compare.running import run_edits
from lrqp_torch.study.compare.texts import held_out, only_first, unrelated
from lrqp_torch.study.compare.variants import DosedLRQP
from lrqp_torch.study.context import Advance, StudyContext

POSITION = "S2"


class SiteRuns:
    """Every method on the held-out prompts and on unrelated text, at one site.

    Args:
        context: the model and its prompts.
        site: where all methods edit.
        candidates: of them, those that could be built.
        options: what to run.
        advance: called with the number of texts after each run of a batch.

    Attributes:
        pairs: what a method that patches writes into each prompt, (n, d).
    """

    def __init__(
        self,
        context: StudyContext,
        site: str,
        candidates: Sequence[Candidate],
        options: CompareOptions,
        advance: Advance,
    ) -> None:
        self._context, self._site, self._advance = context, site, advance
        self._edits = {item.name: item.edit for item in candidates if item.edit is not None}
        self._titles = {item.name: item.title for item in candidates}
        self._options = options
        self._prompts = held_out(context.task.test)
        self._labels = context.task.test.labels.to(context.device)
        x = context.activations(context.task, "test", POSITION, [site])[site]
        patched = any(isinstance(edit, Paired) for edit in self._edits.values())
        self.pairs = partners(context, site, control=False) if patched else x
        self._others = partners(context, site, control=True) if patched else x

    def table(self, watched: list[str]) -> tuple[Effects, dict[str, Effects], dict[str, Effects]]:
        """The clean run, control edits and counterfactual ones, of all held-out prompts.

        The clean activations are those that no edit, which leaves every bit, let through.
        """
        labels, n = self._labels, len(self._edits)
        runs = [Run(edit, labels, self._others) for edit in self._edits.values()]
        runs += [Run(edit, 1 - labels, self.pairs) for edit in self._edits.values()]
        clean, done = run_edits(
            self._context, self._site, self._prompts, runs, watched, self._advance
        )
        control = dict(zip(self._edits, done[:n], strict=True))
        counterfactual = dict(zip(self._edits, done[n:], strict=True))
        return (
            Effects(clean.columns, control[NOTHING].activations),
            control,
            counterfactual,
        )

    def curves(
        self,
        reference: LRQP,
        clean: Effects,
        counterfactual: dict[str, Effects],
        oracles: Oracles,
    ) -> list[Swept]:
        """The sweep over strengths, and over LRQP's own odds, of the first held-out prompts."""
        options, target = self._options, 1 - self._labels
        prompts = only_first(self._prompts, options.sweep_prompts)
        doses = [strength for strength in options.strengths if strength != 1]
        planned: dict[tuple[str, float], Baseline] = {
            (name, dose): edit.at_strength(dose)
            for name, edit in self._edits.items()
            if name != NOTHING
            for dose in doses
        }
        planned |= {(DosedLRQP.name, a): DosedLRQP(reference, a) for a in options.log_alphas}
        runs = [Run(edit, target, self.pairs) for edit in planned.values()]
        _, done = run_edits(self._context, self._site, prompts, runs, [], self._advance)
        found: dict[str, dict[float, Effects]] = {}
        for (name, dose), effects in zip(planned, done, strict=True):
            found.setdefault(name, {})[dose] = effects
        swept = []
        for name in (*(n for n in self._edits if n != NOTHING), DosedLRQP.name):
            by_odds = name == DosedLRQP.name
            runs_of = found.get(name, {}) | ({} if by_odds else {1.0: counterfactual[name]})
            title = DosedLRQP.title if by_odds else self._titles[name]
            rising = "log α" if by_odds else "strength"
            if runs_of:
                swept.append(Swept.of(name, title, rising, runs_of, clean, oracles, len(prompts)))
        return swept

    def texts(self) -> tuple[dict[str, Tensor], int]:
        """KL behind an edited token of unrelated text, by method, and how many texts there are."""
        found = unrelated(self._context, self._options.texts)
        if found is None:
            return {}, 0
        texts, target = found
        target = target.to(self._context.device)
        written = partners_of_class(self._context, self._site, target)
        runs = [Run(edit, target, written) for edit in self._edits.values()]
        _, done = run_edits(self._context, self._site, texts, runs, [], self._advance)
        columns = [effects.columns["divergence"] for effects in done]
        return dict(zip(self._edits, columns, strict=True)), len(texts)
