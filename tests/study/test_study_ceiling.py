"""Ceiling, null and verdict: what they are of an edit that is the interchange, and exact tests."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from prompts_for_tests import names_task, organism
from scipy import stats
from torch import Tensor

from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.study.ceiling import (
    PROBES,
    Null,
    excess,
    interchange_of,
    likenesses,
    needed_for_half,
    null_edits,
    null_of,
    shuffled,
    turns,
    verdicts,
)
from lrqp_torch.study.estimates import (
    Estimate,
    Sample,
    bca,
    bootstrap,
    holm,
    prompts_to_tell,
    sign_test,
    wilson,
)
from lrqp_torch.study.prompts import PromptSet
from lrqp_torch.study.run import study


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def columns(preference: Tensor, **more: Tensor) -> dict[str, Tensor]:
    return {
        "logit_difference": preference,
        "own_lead": preference,
        "other_lead": -preference,
        **more,
    }


def runs(n: int = 90) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """A clean run, an interchange, and who has a twin."""
    clean = 2 + torch.randn(n, generator=seeded(1), dtype=torch.float64)
    patch = clean - 3 - torch.rand(n, generator=seeded(2), dtype=torch.float64)
    sizes = {"divergence": torch.rand(n).double(), "distance": torch.full((n,), 2.0).double()}
    return columns(clean), columns(patch, **sizes), torch.arange(n) % 3 > 0


def likeness(clean: dict, edit: dict, patch: dict, known: Tensor) -> dict:
    """Of one edit alone, as long as its interchange."""
    edit = {"distance": patch["distance"]} | edit
    return likenesses(clean, {"edit": (edit, patch)}, Sample(0, rows=known))["edit"]


def test_the_interchange_recovers_all_of_itself_and_the_clean_run_nothing() -> None:
    clean, patch, known = runs()
    edit = patch | {"kl_to_interchange": torch.zeros(90).double()}
    found = likeness(clean, edit, patch, known)
    assert found["recovered"].value == 1 and found["recovered"].interval == [1, 1]
    assert found["agreement"].value == 1 and found["agreement"].n == int(known.sum())
    assert found["kl_to_interchange"].value == 0 and found["beyond"] is None
    assert excess(clean, patch, patch, Sample(0, rows=known)) == 1
    assert likeness(clean, clean, patch, known)["recovered"].value == 0
    half = columns((clean["logit_difference"] + patch["logit_difference"]) / 2)
    assert likeness(clean, half, patch, known)["recovered"].value == pytest.approx(0.5)


def test_an_interchange_without_effect_leaves_nothing_to_recover() -> None:
    clean, patch, known = runs()
    same = clean | {"distance": patch["distance"]}
    assert "recovered" not in likeness(clean, patch, same, known)
    ceiling = interchange_of(clean, patch, Sample(0, rows=known))
    answered = known & (clean["own_lead"] > 0)
    flips = (patch["other_lead"] > 0)[answered]
    assert ceiling.flipped == Estimate.share(flips)
    assert ceiling.distance == 2 and ceiling.prompts == int(known.sum())
    assert interchange_of({}, patch, Sample(0, rows=known)).flipped is None


def test_an_edit_beyond_its_own_patch_is_flagged_with_the_reason() -> None:
    clean, patch, known = runs()
    weak = columns(clean["logit_difference"] - 1, distance=patch["distance"])
    found = likeness(clean, patch, weak, known)
    shares = [100 * interchange_of(clean, one | patch | one, Sample(0, rows=known)).flipped.value
              for one in (patch, weak)]  # fmt: skip
    assert excess(clean, patch, weak, Sample(0, rows=known)) < 1e-3
    assert found["beyond"] == "flips {:.0f} %, its own patch {:.0f} %".format(*shares)
    longer = patch | {"distance": patch["distance"] + 1}
    assert likeness(clean, longer, patch, known)["beyond"] == "is 3.0 sd long, its own patch 2.0"
    # One in twenty by chance: of many edits alike none is flagged for what one would be.
    few = {"other_lead": patch["other_lead"].clone()}
    few["other_lead"][known.nonzero().flatten()[:5]] = -1.0
    edge = patch | few
    assert excess(clean, patch, edge, Sample(0, rows=known)) < 0.05
    many = likenesses(clean, dict.fromkeys(range(60), (patch, edge)), Sample(0, rows=known))
    assert not any(one["beyond"] for one in many.values())


def test_the_sign_test_is_scipys_binomial_test() -> None:
    for more in range(6):
        for less in range(6):
            first = torch.tensor([True] * more + [False] * less + [True, False])
            second = torch.tensor([False] * more + [True] * less + [True, False])
            pairs = more + less
            wanted = stats.binomtest(more, pairs, alternative="greater").pvalue if pairs else 1.0
            assert sign_test(first, second) == pytest.approx(wanted, rel=1e-12)


def test_holm_keeps_the_order_and_never_lowers_a_p_value() -> None:
    drawn = torch.rand(30, generator=seeded(4), dtype=torch.float64) ** 3
    p_values = dict(enumerate(drawn.tolist()))
    adjusted = holm(p_values)
    ordered = sorted(p_values, key=p_values.__getitem__)
    assert [adjusted[key] for key in ordered] == sorted(adjusted.values())
    assert all(p <= adjusted[key] <= 1 for key, p in p_values.items())
    assert adjusted[ordered[0]] == pytest.approx(min(1, 30 * p_values[ordered[0]]))
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06}
    )
    # Among those it lets pass it is as strict as Bonferroni's for the smallest alone.
    assert sum(p < 0.05 / 30 for p in p_values.values()) <= sum(p < 0.05 for p in adjusted.values())


def test_bca_has_scipys_ends_on_scipys_resamples() -> None:
    values = torch.randn(40, generator=seeded(6), dtype=torch.float64).exp()
    found = stats.bootstrap(
        (values.numpy(),), lambda x, axis: x.mean(axis), n_resamples=4999, method="BCa", rng=0
    )
    left_out = (values.sum() - values) / (len(values) - 1)
    drawn = torch.from_numpy(found.bootstrap_distribution)
    ends = bca(float(values.mean()), drawn, left_out)
    assert ends == pytest.approx(tuple(found.confidence_interval), rel=1e-2)
    # It leans to the right of a skewed sample, which the percentiles do not.
    assert ends[0] > float(drawn.quantile(0.025)) and ends[1] > float(drawn.quantile(0.975))


def test_intervals_over_groups_are_those_of_the_groups() -> None:
    groups = torch.arange(400) % 20
    effect = torch.randn(20, generator=seeded(7), dtype=torch.float64)
    values = effect[groups] + 0.01 * torch.randn(400, generator=seeded(8), dtype=torch.float64)
    alone = bootstrap(values, seeded())
    together = bootstrap(values, seeded(), groups=groups)
    assert together[1] - together[0] > 3 * (alone[1] - alone[0])
    assert bootstrap(values, seeded(), groups=torch.arange(400)) == alone
    share = Estimate.share(values > 0, groups)
    hits = int((values > 0).sum())
    wide, narrow = share.interval, wilson(hits, 400)
    assert share.value == hits / 400 and wide is not None
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])
    assert Estimate.share(values > 99, groups) == Estimate.count(0, 400)


def test_the_number_of_prompts_to_tell_is_that_of_a_paired_test() -> None:
    below = 1 + 0.1 * torch.randn(500, generator=seeded(9), dtype=torch.float64)
    above = below + torch.randn(500, generator=seeded(10), dtype=torch.float64)
    needed = prompts_to_tell(above, below)
    spread = float((above - above.mean() / below.mean() * below).std())
    quantiles = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert needed == math.ceil((quantiles * spread / (0.5 * float(below.mean()))) ** 2)
    assert prompts_to_tell(above, torch.zeros(500)) is None
    clean, patch, known = runs()
    assert needed_for_half(clean, patch, patch, known) == 2


@pytest.mark.parametrize("n", [30, 120, 1000])
def test_each_shuffled_probe_meets_as_many_prompts(n: int) -> None:
    met = turns(n, seeded())
    assert len(met) == {30: 2, 120: 2, 1000: 1}[n]
    for run in met:
        counts = torch.bincount(run, minlength=PROBES)
        assert counts.max() - counts.min() <= 1
    for first, second in pairwise(met):
        assert not bool((first == second).any())
    labels = torch.arange(n) % 2
    assert all(
        torch.equal(y.sort().values, labels.sort().values) for y in shuffled(labels, seeded())
    )


def test_null_edits_are_as_long_as_asked_and_the_least_edits_of_their_probes() -> None:
    x = torch.randn(60, 5, generator=seeded(11), dtype=torch.float64)
    metric, labels = Mahalanobis.fit(x), torch.arange(60) % 2
    probes = [LinearProbe.fit(x, y) for y in shuffled(labels, seeded(), 3)]
    length, turn = torch.rand(60, generator=seeded(12)).double(), torch.arange(60) % 3
    delta = null_edits(probes, metric, 1 - labels, labels, length, turn)
    torch.testing.assert_close(metric.distance(delta), length)
    for row in (0, 1, 2):
        weight = probes[row].weight.double()
        normal = weight[1 - labels[row]] - weight[labels[row]]
        wanted = metric.covariance @ normal
        cosine = torch.nn.functional.cosine_similarity(delta[row], wanted, dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-4)


def test_the_verdict_asks_for_more_flips_than_the_null_and_for_no_probe_as_strong() -> None:
    n = 100
    clean = columns(torch.ones(n).double())
    edit = columns(torch.where(torch.arange(n) < 40, -1.0, 1.0).double())
    idle = columns(torch.ones(n).double(), probe=torch.arange(n) % PROBES)
    # The third probe lowers every preference further, and no answer turns.
    strong = idle | {"logit_difference": torch.where(idle["probe"] == 2, -9.0, 1.0).double()}
    for null, as_strong in ((idle, 0), (strong, 1)):
        found = null_of(clean, edit, [null], 0)
        assert (found.probes, found.as_strong) == (PROBES, as_strong)
        verdict = verdicts({"here": 1e-9}, {"here": found}, {"here": None})["here"]
        assert verdict.used == (as_strong == 0)
    quiet = Null(PROBES, Estimate.count(0, 9), Estimate(0.0, 0.0, 0.0, 9), 0)
    many = verdicts(dict.fromkeys(range(60), 0.01), dict.fromkeys(range(60), quiet),
                    dict.fromkeys(range(60)))  # fmt: skip
    assert not any(verdict.used for verdict in many.values())


def test_a_study_of_own_prompts_with_pairs_has_ceiling_verdict_and_spread() -> None:
    model, tokenizer = organism()
    prompts = [replace(prompt, pair=str(row)) for row, prompt in enumerate(names_task(120, seed=4))]
    # The twin of each: the names of the first clause in the other order, nothing else.
    twins = []
    for prompt in prompts:
        said = dict(prompt.answers)
        (io,), (s,) = said[prompt.label], said[{"ABBA": "BABA", "BABA": "ABBA"}[prompt.label]]
        pair = (io[1:], s[1:]) if prompt.label == "ABBA" else (s[1:], io[1:])
        text = prompt.text.replace("{} and {}".format(*pair), "{1} and {0}".format(*pair))
        label = {"ABBA": "BABA", "BABA": "ABBA"}[prompt.label]
        own = {label: (io,), prompt.label: (s,)}
        twins.append(replace(prompt, text=text, label=label, answers=own))
    train, test = (
        PromptSet.encode(tokenizer, half)
        for half in (prompts[:60] + twins[:60], prompts[60:] + twins[60:])
    )
    found = study(model, train, test, ["L1.pre", "L2.mid"], refits=2, batch_size=120)
    used, idle = found.sites["L2.mid"], found.sites["L1.pre"]
    assert found.used_sites == ["L2.mid"] == [found.best_site]
    assert used.interchange.prompts == len(test) and used.interchange.flipped.value > 0.9
    assert 0.8 < used.recovered.value < 1.1 and used.agreement.value > 0.8
    assert used.verdict.p_adjusted < 1e-6 and used.null.as_strong == 0
    assert used.verdict.prompts_needed >= 2 and used.beyond is None
    assert not idle.used and idle.verdict.p_adjusted > 0.05
    assert len(used.refits.flipped) == len(used.refits.recovered) == 2
    assert used.refits.flipped_sd < 0.2
    assert found.best.probe_accuracy.n == len(test) // 2
    # Both of a pair are in one half, so every prompt of it has its twin there.
    assert found.best.interchange.prompts == len(test) // 2
