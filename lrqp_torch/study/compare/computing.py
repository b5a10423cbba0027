"""Running the league table."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import SettingError
from lrqp_torch.study.compare.editable import Effects
from lrqp_torch.study.compare.measuring import draw_curves, relative_costs, score, summarise
from lrqp_torch.study.compare.methods import Candidate, build_candidates
from lrqp_torch.study.compare.options import DEFAULTS, CompareOptions
from lrqp_torch.study.compare.oracles import Oracles
from lrqp_torch.study.compare.partners import with_partners
from lrqp_torch.study.compare.resampling import RESAMPLES, Resampling
from lrqp_torch.study.compare.result import CompareResult, MethodResult, SiteComparison
from lrqp_torch.study.compare.running import seconds_per_text
from lrqp_torch.study.compare.site_runs import POSITION, SiteRuns
from lrqp_torch.study.compare.texts import unrelated
from lrqp_torch.study.context import Advance, StudyContext, no_progress
from lrqp_torch.study.heads import MOVER, WRITER, HeadsResult


def work(context: StudyContext, /, options: CompareOptions = DEFAULTS, sites: int = 1) -> int:
    """Units that :func:`compute` advances: texts run under each edit, and methods built."""
    methods = len(options.names)
    doses = len(options.log_alphas)
    return sites * (
        methods
        + methods * _texts_each(context, options)
        + min(len(context.task.test), options.sweep_prompts)
        * (doses + (methods - 1) * (len(options.strengths) - 1))
    )


def _texts_each(context: StudyContext, options: CompareOptions) -> int:
    """Texts on which every method runs at strength 1."""
    found = unrelated(context, options.texts)
    return 2 * len(context.task.test) + (0 if found is None else len(found[0]))


def compute(
    context: StudyContext,
    edits: Mapping[str, LRQP],
    heads: HeadsResult | None = None,
    *,
    options: CompareOptions = DEFAULTS,
    advance: Advance = no_progress,
) -> CompareResult:
    """Put all methods to the same test: turn the order of the names at S2, on held-out prompts.

    All are fitted to the training prompts; what they did is read on the held-out ones by the model,
    and by probes that share no prompt with any of them.

    Args:
        context: the model and its prompts.
        edits: site to the study's LRQP there.
        heads: the heads and their roles, for the attention of the name movers; None leaves it out.
        options: what to run.
        advance: called with units of :func:`work`.

    Raises:
        SettingError: no site.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    if not edits:
        raise SettingError("no site to compare edits at")
    return CompareResult(
        sites={
            site: _at_site(context, site, edit, heads, options, advance)
            for site, edit in edits.items()
        },
        position=POSITION,
        seed=context.seed,
        resamples=RESAMPLES,
    )


def _at_site(
    context: StudyContext,
    site: str,
    reference: LRQP,
    heads: HeadsResult | None,
    options: CompareOptions,
    advance: Advance,
) -> SiteComparison:
    data = context.task.test
    candidates = build_candidates(context, site, reference, options.names, options.training)
    advance(len(candidates))
    runs = SiteRuns(context, site, candidates, options, advance)
    role, watched = _watched(heads)
    clean, control, counterfactual = runs.table(watched)
    oracles = Oracles(clean.activations, data, context.generator())
    swept = runs.curves(reference, clean, counterfactual, oracles)
    by_text, texts = runs.texts()
    few = len(swept[0].fall)
    unbuilt = sum(item.edit is None for item in candidates)
    advance(unbuilt * (_texts_each(context, options) + few * (len(options.strengths) - 1)))

    of_prompts = Resampling(len(data), context.generator())
    of_swept = Resampling(few, context.generator())
    of_texts = Resampling(texts, context.generator()) if texts else None
    relative = relative_costs(swept, of_swept)
    target = 1 - data.labels.cpu()
    differences = clean.columns["logit_difference"]

    def row(item: Candidate) -> MethodResult:
        unfilled = MethodResult(item.name, item.title, item.settings, item.problem)
        if item.edit is None:
            return unfilled
        done = counterfactual[item.name]
        return replace(
            unfilled,
            control=summarise(clean, control[item.name], oracles, 1 - target, of_prompts),
            counterfactual=summarise(clean, done, oracles, target, of_prompts),
            text_divergence=None if of_texts is None else of_texts.mean(by_text[item.name]),
            scores=score(
                item.name, clean.activations, done.activations, oracles, target, of_prompts
            ),
            seconds=_seconds(context, item, clean, target, runs.pairs),
            relative=relative.get(item.name, {}),
        )

    return SiteComparison(
        site=site,
        prompts=len(data),
        answered=int((differences > 0).sum()),
        clean=of_prompts.mean(differences),
        said_elsewhere=float(clean.columns["said_elsewhere"].mean()),
        sweep_prompts=few,
        texts=texts,
        watched=watched,
        role=role,
        oracles=oracles.scores,
        methods=[row(item) for item in candidates],
        curves=draw_curves(swept, differences[:few], of_swept),
    )


def _seconds(
    context: StudyContext, item: Candidate, clean: Effects, target: Tensor, pairs: Tensor
) -> float:
    assert item.edit is not None
    device = context.device
    x, target = clean.activations.to(device), target.to(device)
    return seconds_per_text(with_partners(item.edit, pairs), x, target, 1 - target)


def _watched(heads: HeadsResult | None) -> tuple[str, list[str]]:
    """Name movers; answer writers where there are none."""
    if heads is None:
        return "", []
    roles = heads.attending()
    role = MOVER if roles[MOVER] else WRITER
    return (role, roles[role]) if roles[role] else ("", [])
