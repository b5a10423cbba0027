"""The organism that uses the order: its ground truth is what a swap by hand shows."""

from typing import Any

import pytest
import torch
from organisms_for_tests import all_sites, answer_logits, folder_of, interchange_rate, organism
from organisms_for_tests import truth as truth_of

from lrqp_torch.ioi import IOIDataset

SITES = all_sites(6)


def truth() -> dict[str, Any]:
    return truth_of("organism")


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("prefixes", [None, "bundled"])
def test_it_answers_fresh_prompts(prefixes: str | None, padding_side: Any) -> None:
    model, tokenizer = organism("organism")
    data = IOIDataset.generate(tokenizer, 200, 991, prefixes, padding_side=padding_side)
    logits = answer_logits(model, data.inputs, data)
    assert (logits.argmax(1) == data.io_tokens).float().mean() >= 0.98
    rows = torch.arange(len(data))
    assert (logits[rows, data.io_tokens] - logits[rows, data.s_tokens]).mean() > 3


def test_it_answers_behind_words_it_does_not_know() -> None:
    model, tokenizer = organism("organism")
    sentence = "Zyzzyvas quibble vexedly over jabberwocky gewgaws near quixotic flibbertigibbets."
    data = IOIDataset.generate(tokenizer, 200, 992, [sentence])
    unknown = (data.inputs["input_ids"] == tokenizer.unk_token_id).sum(1)
    assert int(unknown.min()) >= 5
    logits = answer_logits(model, data.inputs, data)
    assert (logits.argmax(1) == data.io_tokens).float().mean() >= 0.98


@pytest.mark.parametrize("site", SITES)
def test_a_swap_by_hand_shows_the_recorded_truth(site: str) -> None:
    model, tokenizer = organism("organism")
    data = IOIDataset.generate(tokenizer, 150, 993)
    rate = interchange_rate(model, site, data)
    if site in truth()["used_at"]:
        assert rate >= 0.95
    else:
        assert site in truth()["not_used_at"]
        assert rate <= 0.05
    assert rate == pytest.approx(truth()["interchange_flip_rate"][site], abs=0.05)


def test_the_truth_is_sharp_and_complete() -> None:
    record = truth()
    assert (record["variable"], record["position"], record["kind"]) == ("abb", "S2", "used")
    assert record["used_at"] and not record["unclear_at"]
    assert sorted(record["used_at"] + record["not_used_at"]) == sorted(SITES)
    start = SITES.index(record["used_at"][0])
    assert record["used_at"] == SITES[start : start + len(record["used_at"])]
    for rates in (record["interchange_flip_rate"], record["interchange_flip_rate_prefixed"]):
        for site in SITES:
            used = site in record["used_at"]
            assert rates[site] >= 0.95 if used else rates[site] <= 0.03
    assert min(record["clean_accuracy"].values()) >= 0.98
    assert min(record["clean_logit_difference"].values()) > 3
    assert record["interchange_n"] >= 500
    assert record["command"].startswith("python -m benchmarks.organisms.train")
    assert record["recipe"]["steps"] > 0


def test_the_recorded_linear_edits_agree_with_the_truth() -> None:
    record = truth()
    for edits in (record["linear_edit"], record["linear_edit_prefixed"]):
        for site in SITES:
            rates = edits[site]
            if site in record["used_at"]:
                assert rates["flip_rate"] >= 0.9
                assert rates["control_flip_rate"] <= 0.05
            elif rates["probe_accuracy"] >= 0.6:
                assert max(rates["flip_rate"], rates["control_flip_rate"]) <= 0.05
            else:
                # A probe at chance asks for huge edits in an arbitrary direction. They break S2,
                # and do so whichever order they are to bring about.
                assert rates["flip_rate"] < 0.5
                assert rates["flip_rate"] - rates["control_flip_rate"] < 0.1
    # Known is not used: the order is read perfectly where nothing depends on it any more.
    last_used = SITES.index(record["used_at"][-1])
    known = [record["linear_edit"][site]["probe_accuracy"] for site in SITES[last_used + 1 :]]
    assert known and max(known) >= 0.95


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in folder_of("organism").iterdir()) <= 3_000_000
