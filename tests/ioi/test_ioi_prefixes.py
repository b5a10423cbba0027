"""Prefix sentences: the rule, the bundled list, and every source."""

import re
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lrqp_torch.errors import LRQPError, MissingExtraError, PrefixError
from lrqp_torch.ioi import NAMES, IOIDataset
from lrqp_torch.ioi.prefixes import (
    OPENWEBTEXT_FILES,
    broken_rule,
    bundled,
    load_prefixes,
    split_sentences,
    usable,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or mark; every word but the names is unknown."""
    vocabulary = {word: row for row, word in enumerate(["<unk>", *NAMES])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize(
    "sentence",
    ["It was late.", "A day in 1999, wasn't it.", "Élan is a word.", "Nine char."],
)
def test_rule_keeps(sentence: str) -> None:
    assert broken_rule(sentence) is None


@pytest.mark.parametrize(
    "sentence, rule",
    [
        ("Too bad.", "shorter than 10"),
        ("it was very late.", "first character not upper-case"),
        ("“It was late,” they said.", "first character not upper-case"),
        ("It was late in Paris.", "upper-case after the first"),
        ("Was it late at all?", "no full stop"),
        ("Write to me@home.", "@"),
        ("See http colon something.", "http"),
        ("Use and/or instead.", "/"),
        ("Mary had a lamb.", "name of the task"),
    ],
)
def test_rule_drops(sentence: str, rule: str) -> None:
    broken = broken_rule(sentence)
    assert broken is not None and rule in broken


def test_rule_limits_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    fifty, longer = "A" + 48 * " a" + ".", "A" + 49 * " a" + "."
    assert usable([longer, fifty], tokenizer, "test") == (fifty,)
    with pytest.raises(PrefixError, match="1 more than 50 tokens"):
        usable([longer], tokenizer, "test")


def test_bundled_list(tokenizer: PreTrainedTokenizerFast) -> None:
    sentences = bundled()
    assert len(sentences) == len(set(sentences)) >= 240
    assert usable(sentences, tokenizer, "bundled") == sentences
    names = {name.lower() for name in NAMES}
    for sentence in sentences:
        assert sentence.isascii() and sentence == sentence.strip()
        assert names.isdisjoint(re.findall(r"[a-z]+", sentence.lower())), sentence
        assert 4 <= len(sentence.split()) <= 35, sentence
    lengths = {len(sentence.split()) for sentence in sentences}
    assert lengths >= set(range(4, 27)) and max(lengths) > 30


def test_prefix_stands_in_front(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = IOIDataset.generate(tokenizer, 8)
    assert plain.prefixes == ("",) * 8
    data = IOIDataset.generate(tokenizer, 50, prefixes="bundled")
    assert len(set(data.prefixes)) > 30 and set(data.prefixes) <= set(bundled())
    for prompt, prefix in zip(data.prompts, data.prefixes, strict=True):
        assert prompt.startswith(prefix + " ") and prompt[len(prefix) + 1].isupper()
    assert data[3:5].prefixes == data.prefixes[3:5]


@pytest.mark.parametrize("kind", [str, Path])
def test_file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: type) -> None:
    path = tmp_path / "sentences.txt"
    path.write_text(
        "It was late.\n\n  The café was shut. \r\nNo, NOT this one.\nIt was late.\n",
        encoding="utf-8",
    )
    kept = ("It was late.", "The café was shut.")
    assert load_prefixes(kind(path), tokenizer, 1) == kept
    data = IOIDataset.generate(tokenizer, 40, prefixes=kind(path))
    assert set(data.prefixes) == set(kept)


def test_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    data = IOIDataset.generate(tokenizer, 10, prefixes=("It was late.", "nothing here"))
    assert set(data.prefixes) == {"It was late."}


def test_all_filtered_out_is_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "sentences.txt"
    path.write_text("no capital here.\nno capital there.\nShort.\nWas it late then?\n")
    with pytest.raises(PrefixError) as caught:
        IOIDataset.generate(tokenizer, 4, prefixes=path)
    message = str(caught.value)
    assert str(path) in message and "4 lines read" in message
    assert "2 first character not upper-case" in message
    assert "1 shorter than 10 characters" in message and "1 no full stop at its end" in message
    assert isinstance(caught.value, LRQPError) and isinstance(caught.value, ValueError)


def test_bad_sources(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    for source, message in (
        (tmp_path / "missing.txt", "no file .*missing.txt"),
        ("It rained.", "no file 'It rained.'"),
        (empty, r"empty \(0 lines read\)"),
        (binary, "UTF-8"),
        (tmp_path, "cannot be read"),
        ([], "0 lines read"),
        (["It was late.", 3], "sequence of strings"),
        (7, "prefixes is a int"),
        ((s for s in ["It was late."]), "prefixes is a generator"),
    ):
        with pytest.raises(PrefixError, match=message):
            IOIDataset.generate(tokenizer, 4, prefixes=source)


def test_split_sentences() -> None:
    texts = ["One here. Two there! Is it three?\n\nFour.  Five", ""]
    kept = [sentence for sentence in split_sentences(texts) if sentence]
    assert kept == ["One here.", "Two there!", "Is it three?", "Four.", "Five"]


def test_an_endless_stream_is_read_no_further_than_needed(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield f"It was late on day {read}."

    kept = usable(endless(), tokenizer, "test", at_most=30)
    assert kept == tuple(f"It was late on day {day}." for day in range(1, 31))
    assert read < 5000


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Iterator[dict[str, str]]) -> list[object]:
    calls: list[object] = []
    module = ModuleType("datasets")

    def load_dataset(*arguments: object, **options: object) -> Iterator[dict[str, str]]:
        calls.append((arguments, options))
        return rows

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_openwebtext(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ({"text": f"Port number {row} was closed. Then Mary left.\nShe ran."} for row in count())
    calls = fake_datasets(monkeypatch, rows)
    data = IOIDataset.generate(tokenizer, 60, prefixes="openwebtext")
    assert calls == [
        (("parquet",), {"data_files": OPENWEBTEXT_FILES, "split": "train", "streaming": True})
    ]
    assert set(data.prefixes) <= {f"Port number {row} was closed." for row in range(60)}
    assert len(set(data.prefixes)) > 20


def test_openwebtext_without_the_package(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install lrqp_torch\[datasets\]") as caught:
        IOIDataset.generate(tokenizer, 4, prefixes="openwebtext")
    assert isinstance(caught.value, ImportError)


def test_openwebtext_unreachable(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[dict[str, str]]:
        yield {"text": "It was late."}
        raise ConnectionError("no route")

    fake_datasets(monkeypatch, broken())
    with pytest.raises(PrefixError, match=r"could not be streamed.*no route"):
        IOIDataset.generate(tokenizer, 4, prefixes="openwebtext")
