"""The organisms that do not use the order: they do the task, and what is recorded of them holds."""

from contextlib import ExitStack
from functools import cache

import pytest
import torch
from organisms_for_tests import (
    Swap,
    all_sites,
    answer_logits,
    flip_rate,
    folder_of,
    interchange_rate,
    organism,
    ridge_accuracy,
    streams,
    truth,
    with_names_exchanged,
)
from torch import Tensor

from benchmarks.organisms.recipe import RECIPES, VERBS
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.models.organisms import ORGANISMS
from lrqp_torch.study.known import read_truth

UNUSED = ("organism-present", "organism-absent", "organism-dormant")
DORMANT = "organism-dormant"
SITES = all_sites(4)
TWO_SITES = ("L1.mid", "L2.pre")


@cache
def data_of(name: str, seed: int, n: int, prefixes: str | None = None) -> IOIDataset:
    return IOIDataset.generate(organism(name)[1], n, seed, prefixes)


def read_at(name: str, site: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    model, _ = organism(name)
    fitted, asked = data_of(name, 881, 500), data_of(name, 882, 300)
    x, x_new = (streams(model, site, data, data.inputs) for data in (fitted, asked))
    return x, fitted.labels["abb"], x_new, asked.labels["abb"]


@pytest.mark.parametrize("prefixes", [None, "bundled"])
@pytest.mark.parametrize("name", UNUSED)
def test_they_answer_fresh_prompts(name: str, prefixes: str | None) -> None:
    model, _ = organism(name)
    data = data_of(name, 991, 200, prefixes)
    logits = answer_logits(model, data.inputs, data)
    assert (logits.argmax(1) == data.io_tokens).float().mean() >= 0.98
    rows = torch.arange(len(data))
    assert (logits[rows, data.io_tokens] - logits[rows, data.s_tokens]).mean() > 3


@pytest.mark.parametrize("site", TWO_SITES)
@pytest.mark.parametrize("name", UNUSED)
def test_the_order_of_another_prompt_changes_no_answer(name: str, site: str) -> None:
    rate = interchange_rate(organism(name)[0], site, data_of(name, 882, 300))
    assert rate <= 0.02
    assert rate == pytest.approx(truth(name)["interchange_flip_rate"][site], abs=0.02)


@pytest.mark.parametrize("site", TWO_SITES)
def test_a_probe_reads_the_order_where_it_is_present(site: str) -> None:
    accuracy = ridge_accuracy(*read_at("organism-present", site))
    recorded = truth("organism-present")["linear_edit"][site]["probe_accuracy"]
    assert accuracy >= 0.97
    assert accuracy == pytest.approx(recorded, abs=0.03)


@pytest.mark.parametrize("site", TWO_SITES)
def test_no_probe_reads_the_order_where_it_is_absent(site: str) -> None:
    # Three standard errors of a share of 300 are 0.09.
    assert abs(ridge_accuracy(*read_at("organism-absent", site)) - 0.5) <= 0.1


@pytest.mark.parametrize("name", UNUSED)
def test_a_swap_that_matters_is_seen(name: str) -> None:
    # S2 holds the repeated name at first. With another name there the answer cannot be told.
    model, _ = organism(name)
    data = data_of(name, 882, 300)
    other = streams(model, "L0.pre", data, data.inputs).roll(1, 0)
    assert flip_rate(model, "L0.pre", data, other) >= 0.3


@pytest.mark.parametrize("name", UNUSED)
def test_their_truth_is_sharp_and_complete(name: str) -> None:
    record = truth(name)
    assert (record["variable"], record["position"]) == ("abb", "S2")
    assert record["used_at"] == record["unclear_at"] == []
    assert record["not_used_at"] == SITES
    for rates in (record["interchange_flip_rate"], record["interchange_flip_rate_prefixed"]):
        assert list(rates) == SITES
        assert max(rates.values()) <= 0.02
    assert min(record["clean_accuracy"].values()) >= 0.98
    assert min(record["clean_logit_difference"].values()) > 3
    assert record["interchange_n"] >= 500


@pytest.mark.parametrize(
    ("edits", "least"), [("linear_edit", 0.98), ("linear_edit_prefixed", 0.96)]
)
def test_the_recorded_probes_say_what_the_order_is_to_each_model(edits: str, least: float) -> None:
    present, absent = (
        {site: rates["probe_accuracy"] for site, rates in truth(name)[edits].items()}
        for name in UNUSED[:2]
    )
    assert min(present[site] for site in SITES[SITES.index("L1.mid") :]) >= least
    assert max(absent.values()) <= 0.6


def test_no_linear_edit_of_a_present_order_changes_the_answer() -> None:
    record = truth("organism-present")
    for edits in (record["linear_edit"], record["linear_edit_prefixed"]):
        for site in SITES[SITES.index("L1.mid") :]:
            assert edits[site]["flip_rate"] <= 0.03
            assert edits[site]["control_flip_rate"] <= 0.03


@pytest.mark.parametrize("site", TWO_SITES)
def test_a_graded_use_is_that_of_the_prompts_with_its_verbs(site: str) -> None:
    model, tokenizer = organism("organism-graded")
    data = data_of("organism-graded", 882, 300)
    rows, at = torch.arange(300), data.positions["S2"] + 1
    verbs = torch.tensor(tokenizer.convert_tokens_to_ids([f" {verb}" for verb in VERBS]))
    uses = torch.isin(data.inputs["input_ids"][rows, at], verbs)
    rates = [
        interchange_rate(model, site, data[chosen.nonzero().flatten()]) for chosen in (uses, ~uses)
    ]
    assert rates[0] > 0.6 and rates[1] < 0.06
    whole = interchange_rate(model, site, data)
    assert 0.2 < whole < 0.45
    assert whole == pytest.approx(truth("organism-graded")["interchange_flip_rate"][site], abs=0.08)
    assert {"L1.mid", "L2.pre"} == set(truth("organism-graded")["used_at"])


@pytest.mark.parametrize("site", ["L2.mid", "L3.pre"])
def test_a_spread_use_is_that_of_two_tokens(site: str) -> None:
    name = "organism-spread"
    model, data, record = organism(name)[0], data_of(name, 882, 300), truth(name)
    tokens, twins = [data.positions["S2"], data.positions["S2"] + 1], with_names_exchanged(data)
    values = []
    for at in tokens:
        with Swap(model, site, at) as source:
            answer_logits(model, twins, data)
        values.append(source.seen)

    def rate(*which: int) -> float:
        with ExitStack() as stack:
            for one in which:
                stack.enter_context(Swap(model, site, tokens[one], values[one]))
            logits, rows = answer_logits(model, data.inputs, data), torch.arange(len(data))
        return float((logits[rows, data.io_tokens] < logits[rows, data.s_tokens]).float().mean())

    beside = record["beside"]
    for which, recorded in (
        ([0], record["interchange_flip_rate"][site]),
        ([1], beside["the token behind S2"][site]),
        ([0, 1], beside["S2 and the token behind"][site]),
    ):
        assert rate(*which) == pytest.approx(recorded, abs=0.09)
    # Neither token is without use, and S2 has the more of it.
    assert 0.1 < rate(1) < rate(0) < rate(0, 1)
    assert set(record["used_at"]) == {"L1.mid", "L2.pre", "L2.mid", "L3.pre"}
    assert record["unclear_at"] == []


@pytest.mark.parametrize("site", TWO_SITES)
def test_a_dormant_path_drives_every_answer_and_no_prompt_takes_it(site: str) -> None:
    model, data = organism(DORMANT)[0], data_of(DORMANT, 882, 300)
    direction = torch.tensor(truth(DORMANT)["direction"])
    x, abb = streams(model, site, data, data.inputs), data.labels["abb"]
    apart = (x[abb == 1].mean(0) - x[abb == 0].mean(0)).norm()
    sign = (2.0 * abb - 1).unsqueeze(-1)
    # Prompts differ next to nothing along it, and their orders not at all.
    assert float((x @ direction).std()) < 0.05 * float(apart)
    for turn, least, most in ((-1, 0.95, 1.0), (1, 0.0, 0.03)):
        step = turn * 0.4 * apart * sign * direction
        assert least <= flip_rate(model, site, data, x + step) <= most
    across = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0))
    across -= (across @ direction) * direction
    step = -0.4 * apart * sign * across / across.norm()
    assert flip_rate(model, site, data, x + step) <= 0.03


@pytest.mark.parametrize(("name", "kind"), ORGANISMS.items())
def test_each_organism_is_of_its_kind_and_recipe(name: str, kind: str) -> None:
    record = truth(name)
    assert record["kind"] == record["recipe"]["kind"] == kind
    assert record["recipe"] == vars(RECIPES[kind])  # type: ignore[index]
    assert f"--kind {kind} --steps {record['recipe']['steps']} " in record["command"]
    known = read_truth(name)
    assert known is not None
    assert known.used_at == frozenset(record["used_at"])


@pytest.mark.parametrize("name", UNUSED)
def test_they_share_a_tokenizer_and_are_small(name: str) -> None:
    vocabularies = [organism(each)[1].get_vocab() for each in (name, "organism")]
    assert vocabularies[0] == vocabularies[1]
    assert sum(path.stat().st_size for path in folder_of(name).iterdir()) <= 2_200_000
