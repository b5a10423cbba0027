"""Prompts of your own: marks, labels and answers become the right tokens, and errors name rows."""

import csv
import io
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from lrqp_torch import models
from lrqp_torch.errors import PromptError, SettingError, TokenizerError, VocabularyWarning
from lrqp_torch.study.prompts import Prompt
from lrqp_torch.study.reading import EXAMPLES, RowLog, front, screen, write_prompts
from lrqp_torch.study.running import batches
from lrqp_torch.tasks import PromptSet, read_prompts, split

ANSWERS = {"ABBA": (" Mary", " John"), "BABA": (" Paul", " James")}
PROMPTS = [
    Prompt("When Mary and John went to the [[park]], John gave a drink to", "ABBA", ANSWERS),
    Prompt("When Paul and James went to the park, [[James]] gave a book to", "BABA", ANSWERS),
    Prompt("Then, Mary and [[Paul went]] to the school", "ABBA", ANSWERS),
]
NAMED = ("Mary", "John", "Paul", "James", "Anna", "Simon", "Lisa", "Mark", "Peter", "Sarah", "Adam",
         "Laura", "Kevin", "Emma", "Alice", "Brian", "Frank", "Grace")  # fmt: skip
MARKED = ("park", "James", "went")


@pytest.fixture(scope="module")
def tokenizer():
    return models.load("organism")[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_position_is_the_last_token_of_the_marked_words(tokenizer, side: str) -> None:
    prompts = PromptSet.encode(tokenizer, PROMPTS, padding_side=side)
    ids = prompts.inputs["input_ids"]
    for row, word in enumerate(MARKED):
        assert tokenizer.decode(ids[row, prompts.position[row]]).strip() == word
        last = prompts.prompts[row].split()[-1]
        assert tokenizer.decode(ids[row, prompts.end[row]]).strip() == last
        real = prompts.inputs["attention_mask"][row].bool()
        assert (
            tokenizer.decode(ids[row][real]).split()
            == tokenizer.decode(tokenizer(prompts.prompts[row])["input_ids"]).split()
        )
    assert prompts.classes == ("ABBA", "BABA")
    assert prompts.labels.tolist() == [0, 1, 0]


def test_without_a_mark_it_is_the_last_token(tokenizer) -> None:
    prompts = PromptSet.encode(tokenizer, [Prompt("Mary and John", "a"), Prompt("Paul", "b")])
    assert torch.equal(prompts.position, prompts.end)
    assert prompts.answers is None
    with pytest.raises(PromptError, match="no answers"):
        prompts.scores(torch.zeros(2, 10))


def test_scores_are_the_log_of_the_summed_odds(tokenizer) -> None:
    prompts = PromptSet.encode(tokenizer, PROMPTS)
    logits = torch.randn(3, len(tokenizer), generator=torch.Generator().manual_seed(0))
    probability = logits.double().softmax(-1)

    def mass(row: int, name: str) -> torch.Tensor:
        ids = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(a))[-1] for a in ANSWERS[name]]
        return probability[row, ids].sum()

    preference = prompts.preference(logits, 1 - prompts.labels)
    for row, prompt in enumerate(PROMPTS):
        other = {"ABBA": "BABA", "BABA": "ABBA"}[prompt.label]
        expected = (mass(row, prompt.label) / mass(row, other)).log()
        torch.testing.assert_close(preference[row], expected)
    # Answers of different numbers: the padding counts for nothing.
    fewer = [
        Prompt(p.text, p.label, {"ABBA": (" Mary",), "BABA": ANSWERS["BABA"]}) for p in PROMPTS
    ]
    scores = PromptSet.encode(tokenizer, fewer).scores(logits)
    mary = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(" Mary"))[-1]
    torch.testing.assert_close(scores[:, 0], logits[:, mary].double())


def test_selection_keeps_rows_together(tokenizer) -> None:
    prompts = PromptSet.encode(tokenizer, PROMPTS)
    two = prompts[[2, 1]]
    assert two.prompts == (prompts.prompts[2], prompts.prompts[1])
    for name in ("position", "end", "labels", "answers"):
        assert torch.equal(getattr(two, name), getattr(prompts, name)[[2, 1]])
    assert [len(one) for one in prompts] == [1, 1, 1]


def test_twins_are_of_one_pair_and_of_the_class_asked_for(tokenizer) -> None:
    def made(text: str, label: str, pair: str | None = None, group: str | None = None) -> Prompt:
        return Prompt(text, label, None, pair, group)

    matched = PromptSet.encode(
        tokenizer,
        [
            made("Then, [[Mary]] went to the park", "a"),
            made("Then, [[John]] went to the school", "b"),
            made("Then, [[John]] went to the park", "b"),
            made("Then, [[Paul]] went to the park", "a"),
            made("Then, [[James]] went to the park", "b", group="other"),
        ],
    )
    twins = matched.twins()
    assert twins is not None and twins.rows is not None
    assert twins.known.tolist() == [True, False, True, True, False]
    assert twins.rows.tolist() == [2, 1, 3, 2, 4]
    assert twins.prompts.prompts[0] == matched.prompts[2]
    assert matched[[0, 1]].twins() is None
    told = [
        made("Mary went", "a", "1"),
        made("John", "b", "1"),
        made("Paul", "c", "1"),
        made("Paul went", "c"),
    ]
    three = PromptSet.encode(tokenizer, told)
    twins = three.twins(target=torch.tensor([2, 0, 2, 0]))
    assert twins is not None and twins.rows is not None
    assert twins.rows.tolist() == [2, 0, 2, 3]
    assert PromptSet.encode(tokenizer, [Prompt("Mary", "a"), Prompt("Paul", "b")]).twins() is None
    with pytest.raises(SettingError, match="differ in 'name'"):
        three.twins("name")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("The [[keys to the cabinet", "prompt 1.*one marked span"),
        ("The keys]] to the cabinet", "prompt 1.*one marked span"),
        ("The [[keys [[to]] the]] cabinet", "prompt 1.*one marked span"),
        ("[[]]The keys", "prompt 1.*one marked span"),
        ("", "prompt 1.*one marked span"),
        ("The [[keys]] to the ]]", "prompt 1.*one marked span"),
        ("The [[k\0ys]]", "prompt 1.*NUL"),
    ],
)
def test_marks_that_do_not_pair_are_named(tokenizer, text: str, what: str) -> None:
    with pytest.raises(PromptError, match=what):
        PromptSet.encode(tokenizer, [Prompt("Mary", "a"), Prompt(text, "b")])


@pytest.mark.parametrize(
    ("prompts", "classes", "what"),
    [
        ([], None, "no prompts"),
        ([Prompt("Mary", "a")], None, "at least two different classes"),
        ([Prompt("Mary", "a"), Prompt("John", "c")], ("a", "b"), "prompt 1 names the class 'c'"),
        ([Prompt("Mary", "a"), Prompt("John", "b", ANSWERS)], None, "prompt 1 names the class"),
        (
            [Prompt("Mary", "a"), Prompt("John", "b", {"a": (" Paul",), "b": (" Paul",)})],
            None,
            "prompts 0 and 1",
        ),
        (
            [Prompt(name, name, {"a": (" Paul",)}) for name in ("a", "b")],
            None,
            "prompt 0 has no answer for the class 'b'",
        ),
        (
            [Prompt("Mary", name, {"a": (" Paul",), "b": (" Paul",)}) for name in ("a", "b")],
            None,
            "given twice",
        ),
        ([Prompt("Mary", "a\0"), Prompt("Paul", "b")], None, "prompt 0 holds a NUL"),
        (
            [Prompt("Mary", name, {"a": (" \0",), "b": (" Paul",)}) for name in ("a", "b")],
            None,
            "prompt 0 holds a NUL",
        ),
    ],
)
def test_labels_and_answers_that_do_not_fit_are_named(tokenizer, prompts, classes, what) -> None:
    with pytest.raises(PromptError, match=what):
        PromptSet.encode(tokenizer, prompts, classes)


def test_one_answer_may_stand_by_itself_and_other_kinds_are_refused(tokenizer) -> None:
    alone = [replace(p, answers={"ABBA": " Mary", "BABA": " Paul"}) for p in PROMPTS]
    listed = [replace(p, answers={"ABBA": (" Mary",), "BABA": (" Paul",)}) for p in PROMPTS]
    encoded = (PromptSet.encode(tokenizer, prompts) for prompts in (alone, listed))
    assert torch.equal(*(each.answers for each in encoded))
    for wrong, what in (
        ({"label": 1}, "label of a prompt must be text, got 1; name the class, such as '1'"),
        ({"text": None}, "text of a prompt must be text"),
        ({"answers": [" Mary"]}, "answers must be those of each class"),
    ):
        with pytest.raises(PromptError, match=what):
            replace(PROMPTS[0], **wrong)
    with pytest.raises(PromptError, match=r"list of Prompt\(text, label, \.\.\.\), got 'Then'"):
        PromptSet.encode(tokenizer, ["Then"])


def test_answers_that_are_not_tokens_of_their_own_are_refused(tokenizer) -> None:
    answers = {"a": ("ville and",), "b": (" Paul",)}
    with pytest.raises(TokenizerError, match=r"prompt 0: the answer 'ville and' is not tokens of"):
        PromptSet.encode(tokenizer, [Prompt("John", name, answers) for name in ("a", "b")])


def test_answers_of_several_tokens_are_scored_as_continuations(tokenizer) -> None:
    model = models.load("organism")[0]
    answers = {
        "a": (" Mary and Paul", " John"),
        "b": (" Paul and James",),
        "c": (" Paul and Anna",),
    }
    texts = ("Then, Mary and Paul gave a book to", "John [[gave]] a drink to")
    prompts = PromptSet.encode(
        tokenizer,
        [Prompt(text, label, answers) for text in texts for label in answers],
    )
    log_p = {}
    for row, text in enumerate(prompts.prompts):
        for name, said in answers.items():
            for answer in said:
                ids = torch.tensor([tokenizer(text + answer)["input_ids"]])
                start = len(tokenizer(text)["input_ids"])
                with torch.no_grad():
                    each = model(input_ids=ids).logits.double().log_softmax(-1)[0, start - 1 : -1]
                found = each.gather(-1, ids[0, start:, None]).sum()
                log_p.setdefault((row, name), []).append(found)
    expected = torch.tensor(
        [[torch.stack(log_p[row, name]).logsumexp(0) for name in answers] for row in range(6)]
    ).double()
    for start in ("mark", "end"):  # with a prefix that is kept, of one length or another
        (batch,) = batches(model, prompts, 8, start=start)
        batch = replace(batch, first=batch.first if start == "end" else 0)
        scores = batch.prompts.scores(batch.clean, batch.clean_rest)
        differences = scores - scores[:, :1]
        wanted = expected[batch.rows]
        torch.testing.assert_close(differences, wanted - wanted[:, :1], atol=2e-4, rtol=1e-4)
        chance = batch.prompts.probability(batch.clean, batch.clean_rest).log()
        rows = torch.arange(6)
        torch.testing.assert_close(chance, wanted[rows, batch.prompts.labels], atol=2e-4, rtol=1e-4)
    with pytest.raises(PromptError, match=r"several tokens.*rest"):
        batch.prompts.scores(batch.clean)
    # What trains on logits reads the one token by which two answers differ.
    short = prompts.deciding()
    assert short.continued is None and short.answers.shape == (6, 3, 1)
    row = prompts.labels.tolist().index(1)
    real = short.inputs["attention_mask"][row].bool()
    assert tokenizer.decode(short.inputs["input_ids"][row][real]).endswith("to Paul and")
    assert tokenizer.decode(short.answers[row, 1]).strip() == "James"
    assert tokenizer.decode(short.answers[row, 2]).strip() == "Anna"
    at = [prompts.inputs["input_ids"][row, prompts.position[row]] for row in range(6)]
    assert at == [short.inputs["input_ids"][row, short.position[row]] for row in range(6)]


def test_answers_may_name_two_classes_that_differ_from_row_to_row(tokenizer) -> None:
    said = {"a": (" Mary",), "b": (" Paul",), "c": (" John",)}
    rows = [("a", "c"), ("b", "a"), ("c", "b"), ("a", "b")]
    prompts = PromptSet.encode(
        tokenizer,
        [Prompt("James", own, {name: said[name] for name in (own, other)}) for own, other in rows],
    )
    assert [prompts.classes[k] for k in prompts.other] == [other for _, other in rows]
    assert prompts.called == tuple(rows)
    scores = prompts.scores(torch.zeros(4, len(tokenizer)))
    assert torch.equal(scores.isfinite(), prompts.named)
    assert prompts.named.sum(1).tolist() == [2, 2, 2, 2]
    assert prompts[[2, 1]].other.tolist() == prompts.other[[2, 1]].tolist()


def test_an_empty_span_is_the_token_before_it(tokenizer) -> None:
    prompts = PromptSet.encode(
        tokenizer, [Prompt("Mary[[]] and John", "a"), Prompt("Mary [[and]] John", "b")]
    )
    ids = prompts.inputs["input_ids"][torch.arange(2), prompts.position]
    assert [tokenizer.decode(i).strip() for i in ids] == ["Mary", "and"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_balanced_reproducible_and_distinct(name: str, tmp_path: Path) -> None:
    prompts = EXAMPLES[name](101, 3)
    assert prompts == EXAMPLES[name](101, 3) != EXAMPLES[name](101, 4)
    assert len({prompt.text for prompt in prompts}) == 101
    counts = [sum(p.label == label for p in prompts) for label in {p.label for p in prompts}]
    assert sorted(counts) == [50, 51]
    assert read_prompts(write_prompts(prompts, tmp_path / "a" / "p.jsonl")) == [
        Prompt(p.text, p.label, dict(p.answers)) for p in prompts
    ]
    with pytest.raises(PromptError, match="ask for 2 to"):
        EXAMPLES[name](10**6, 0)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    lines = [
        {"text": "The [[keys]], red", "number": "plural", "answers": {"plural": " are"}},
        {"text": "A [[key]]", "number": "singular", "answers": {"singular": [" is", " was"]}},
    ]
    jsonl = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, lines)))
    csv = write(
        tmp_path / "a.csv",
        "\ufeffnumber,text,answers.plural,answers.singular\n"
        'plural,"The [[keys]], red", are,\nsingular,A [[key]],, is| was\n',
    )
    expected = [
        Prompt("The [[keys]], red", "plural", {"plural": (" are",)}),
        Prompt("A [[key]]", "singular", {"singular": (" is", " was")}),
    ]
    assert read_prompts(jsonl, label="number") == expected == read_prompts(csv, label="number")


def test_tables_and_lists_come_in_many_forms(tmp_path: Path) -> None:
    """Columns apart by tabs or semicolons, a mark before the first, lists within an object."""
    lines = [
        {"text": f'The [[{word}]]; no, "it"', "label": label, "answers": {"a": " x", "b": " y"}}
        for word, label in (("key", "a"), ("keys", "b"))
    ]
    wanted = read_prompts(jsonl(tmp_path / "a.jsonl", lines))
    flat = [[line["text"], line["label"], " x", " y"] for line in lines]
    for name, apart, encoding, end in (
        ("a.csv", ",", "utf-8", "\n"), ("b.csv", ";", "utf-8", "\n"),
        ("c.csv", "\t", "utf-8", "\n"),
        ("a.tsv", "\t", "utf-8-sig", "\r\n"), ("d.CSV", ";", "utf-8-sig", "\r\n"),
    ):  # fmt: skip
        out = io.StringIO()
        rows = [["text", "label", "answers.a", "answers.b"], *flat]
        csv.writer(out, delimiter=apart, lineterminator=end).writerows(rows)
        (tmp_path / name).write_bytes(out.getvalue().encode(encoding))
        assert read_prompts(tmp_path / name) == wanted, name
    for name, whole in (("a.json", lines), ("b.json", {"version": [1], "data": lines})):
        assert read_prompts(write(tmp_path / name, json.dumps(whole))) == wanted, name
    assert read_prompts(jsonl(tmp_path / "a.ndjson", lines)) == wanted
    with pytest.raises(PromptError, match="no 'text'; its columns are x, y"):
        two = {"x": lines, "y": lines}
        read_prompts(write(tmp_path / "c.json", json.dumps(two)))


def test_positions_can_be_the_last_token_or_a_column(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.csv", "text,label,who\nMary met [[John]] here,a,Mary\nPaul met Ann,b,Ann\n"
    )
    with pytest.raises(PromptError, match="prompt 1, 'Paul met Ann', marks no words"):
        read_prompts(file)
    assert [p.text for p in read_prompts(file, position="last")] == [
        "Mary met John here",
        "Paul met Ann",
    ]
    file = write(tmp_path / "b.csv", "text,label,who\nMary met John,a,Mary\nPaul met Paul,b,Paul\n")
    with pytest.raises(PromptError, match="prompt 1: 'Paul' occurs 2 times"):
        read_prompts(file, position="who")
    file = write(tmp_path / "c.csv", "text,label,who\nMary met John,a,Mary\nPaul met Ann,b,Ann\n")
    assert [p.text for p in read_prompts(file, position="who")] == [
        "[[Mary]] met John",
        "Paul met [[Ann]]",
    ]


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.csv", "text,label\n", "holds no prompts"),
        ("a.csv", "text,label\nonly\n", "line 2.*2 columns"),
        ("a.csv", "text,label,answers\na,b,c\n", r"in a CSV file a column for each class.*got 'c'"),
        ("a.csv", "text,label\na,b,c\n", "line 2.*2 columns"),
        ("a.csv", "text,class\n[[a]],b\n", "prompt 0 has no 'label'; its columns are text, class"),
        ("a.jsonl", '{"text": 1\n', "line 1.*not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1.*no JSON object"),
        ("a.jsonl", '{"text": "[[a]]", "label": "b", "answers": 3}', "answers must be an object"),
        ("a.jsonl", '{"text": "[[a]]", "label": "b", "answers": {"b": 3}}', "must be text"),
        ("a.txt", "hello", r"must end in \.csv, \.tsv, .* or \.parquet"),
    ],
)
def test_files_that_hold_no_prompts_are_named(
    tmp_path: Path, name: str, text: str, what: str
) -> None:
    with pytest.raises(PromptError, match=what):
        read_prompts(write(tmp_path / name, text))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_files_that_are_not_utf_8_are_named(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_bytes('{"text": "[[caf\u00e9]]", "label": "a"}\n'.encode(encoding))
    with pytest.raises(PromptError, match=rf"{name}' is not UTF-8 text .*save it as UTF-8"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.jsonl", "[" * 100_000, "line 1.*not valid JSON"),
        ("a.csv", "text,label,label\n[[a]],b,c\n", "two columns named 'label'"),
        ("a.csv", "text,label\n[[a]],b\n[[c]],  \n", "prompt 1: 'label' must be text"),
        ("a.csv", "text,label\n  ,b\n", "prompt 0: 'text' must be text"),
        ("a.jsonl", '{"text": "[[a]]", "label": NaN}', "prompt 0: 'label'.*got nan"),
        ("a.jsonl", '{"text": "[[a]]", "label": 0.5}', "prompt 0: 'label'.*got 0.5"),
        ("a.jsonl", '{"text": "[[a]]", "label": ["b"]}', "prompt 0: 'label'.*got .'b'"),
        ("a.jsonl", '{"text": {"a": "[[a]]"}, "label": "b"}', "prompt 0: 'text' must be text"),
        ("a.jsonl", '{"text": NaN, "label": "b"}', "prompt 0: 'text' must be text, got nan"),
        ("a.jsonl", '{"text": "[[a]]", "label": 1e999}', "prompt 0: 'label'.*got inf"),
        (
            "a.jsonl",
            '{"text": "[[a]]", "label": "b", "answers": {"b": " x", "b ": " y"}}',
            "prompt 0 has answers for 'b' twice",
        ),
    ],
)
def test_columns_that_cannot_be_read_are_named(
    tmp_path: Path, name: str, text: str, what: str
) -> None:
    with pytest.raises(PromptError, match=what):
        read_prompts(write(tmp_path / name, text))


def test_labels_that_are_written_differently_are_one_class(tmp_path: Path) -> None:
    lines = [
        {"text": "[[a]]", "label": label, "answers": {" 1": " x"}} for label in (1, 1.0, " 1 ")
    ]
    found = read_prompts(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines))))
    assert [(p.label, p.answers) for p in found] == [("1", {"1": (" x",)})] * 3
    line = {"text": "[[a]]", "label": True, "answers": {True: " x"}}
    found = read_prompts(write(tmp_path / "b.jsonl", json.dumps(line)))
    assert [(p.label, p.answers) for p in found] == [("true", {"true": (" x",)})]


@pytest.mark.parametrize(
    ("text", "wanted", "marked"),
    [
        ("The catalog", "cat", 0),
        ("The concat", "cat", 0),
        ("The catalog of a cat", "cat", "The catalog of a [[cat]]"),
        ("In 1732 and 17", 17, "In 1732 and [[17]]"),
        ("John's key", "'s", "John[['s]] key"),
        ("aaa", "aa", 0),
        ("a --- b", "--", 2),
    ],
)
def test_a_position_is_whole_words_once(
    tmp_path: Path, text: str, wanted: str | int, marked: str | int
) -> None:
    line = json.dumps({"text": text, "label": "a", "who": wanted})
    file = write(tmp_path / "a.jsonl", line)
    if isinstance(marked, str):
        assert read_prompts(file, position="who")[0].text == marked
    else:
        with pytest.raises(PromptError, match=f"prompt 0: '{wanted}' occurs {marked} times"):
            read_prompts(file, position="who")


@pytest.mark.parametrize("text", ["The [[keys", "keys]]", "[[a [[b]]", "a\0b"])
def test_marks_count_also_where_the_last_token_is_meant(tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "a.jsonl", json.dumps({"text": text, "label": "a"}))
    with pytest.raises(PromptError, match=r"prompt 0.*(one marked span|NUL)"):
        read_prompts(file, position="last")


def test_positions_and_labels_are_integers_one_a_prompt(tokenizer) -> None:
    prompts = PromptSet.encode(tokenizer, PROMPTS)
    for name in ("position", "end", "labels"):
        whole = getattr(prompts, name)
        for wrong in (whole.to(torch.complex64), whole.double(), whole[:2], whole > 0):
            with pytest.raises(PromptError, match=f"{name} must be"):
                replace(prompts, **{name: wrong})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"cannot read .*nothing\.csv"):
        read_prompts(tmp_path / "nothing.csv")


# ---- rows that cannot be used --------------------------------------------------------------------


def jsonl(path: Path, rows: list[dict]) -> Path:
    return write(path, "\n".join(map(json.dumps, rows)))


def test_rows_that_cannot_be_used_are_left_out_and_counted(tokenizer, tmp_path: Path) -> None:
    said = {"a": " Mary", "b": " John"}
    good = [
        {"text": f"[[{name}]] gave a book to", "label": "ab"[row % 2], "answers": said}
        for row, name in enumerate(NAMED)
    ]
    bad = {
        "no label": {"text": "[[Mary]] went to", "answers": said},
        "no marked words": {"text": "Mary went to", "label": "a", "answers": said},
        "marks that do not pair": {"text": "[[Mary went to", "label": "a", "answers": said},
        "an answer that is no text": {"text": "[[Mary]]", "label": "a", "answers": {"a": 3}},
        "no answers, where most rows have them": {"text": "[[Mary]] gave to", "label": "a"},
        "a text under two labels": good[0] | {"label": "b"},
        "an answer that the tokenizer does not know": {
            "text": "[[Mary]] in", "label": "a", "answers": {"a": " zzz", "b": " John"},
        },
        "no answer for its class, or for no other": {
            "text": "[[John]] in", "label": "a", "answers": {"a": " Mary"},
        },
        "an answer that two classes share": {
            "text": "[[Paul]] in", "label": "a", "answers": {"a": " Mary", "b": " Mary and"},
        },
        "an empty answer": {
            "text": "[[Anna]] in", "label": "a", "answers": {"a": "", "b": " Mary"},
        },
    }  # fmt: skip
    file = jsonl(tmp_path / "a.jsonl", [*good, *bad.values()])
    with file.open("a") as lines:
        lines.write("\n{not json\n")
        lines.write(json.dumps(good[2]))
    bad |= {"a line that is not valid JSON": {}, "a row that stands there twice": {}}
    log = RowLog()
    kept = screen(tokenizer, read_prompts(file, log=log), log)
    assert [prompt.text for prompt in kept] == [row["text"] for row in good]
    assert dict(log.left_out) == dict.fromkeys(bad, 1)
    assert any("1 row was left out: no label (prompt" in line for line in log.says())
    assert PromptSet.encode(tokenizer, kept).answers.shape == (len(good), 2, 1)
    with pytest.raises(PromptError, match=r"not valid JSON|no 'label'"):
        read_prompts(file)
    with pytest.raises(PromptError, match=r"holds no prompts; prompt 0 has no.*1 rows like it"):
        read_prompts(jsonl(tmp_path / "b.jsonl", [{"text": "", "label": "a"}]), log=RowLog())


def test_classes_with_few_prompts_are_left_out_and_so_are_their_answers(
    tokenizer, tmp_path: Path
) -> None:
    said = {"a": " Mary", "b": " John", "c": " Paul"}
    rows = [
        {"text": f"[[{name}]] gave a book to", "label": "abc"[row % 2], "answers": said}
        for row, name in enumerate(NAMED)
    ]
    rows += [{"text": f"[[{n}]] went", "label": "c", "answers": said} for n in NAMED[:3]]
    log = RowLog()
    kept = screen(tokenizer, read_prompts(jsonl(tmp_path / "a.jsonl", rows), log=log), log)
    assert log.left_out == {"a class with fewer than 8 prompts": 3}
    assert PromptSet.encode(tokenizer, kept).classes == ("a", "b")
    # Rows whose only other answer was of that class have none to be told from.
    for row in rows[:4]:
        row["answers"] = {row["label"]: " Mary", "c": " Paul"}
    log = RowLog()
    kept = screen(tokenizer, read_prompts(jsonl(tmp_path / "b.jsonl", rows), log=log), log)
    assert len(kept) == len(NAMED) - 4
    assert log.left_out["no answer for its class, or for no other"] == 4


def test_answers_get_the_space_that_a_word_needs(tmp_path: Path) -> None:
    rows = [
        {"text": "[[Mary]] gave to", "label": "a", "answers": {"a": "John", "b": " Paul"}},
        {"text": "[[Mary]] gave to ", "label": "a", "answers": {"a": "Anna", "b": "."}},
        {"text": "the year [[17]]", "label": "b", "answers": {"a": "32", "b": "s"}},
        {"text": "她[[去]]", "label": "b", "answers": {"a": "了", "b": "。"}},
    ]
    file, log = jsonl(tmp_path / "a.jsonl", rows), RowLog()
    found = read_prompts(file, log=log)
    assert [p.text for p in found] == [row["text"].rstrip() for row in rows]
    assert [p.answers for p in found] == [
        {"a": (" John",), "b": (" Paul",)},
        {"a": (" Anna",), "b": (" .",)},
        {"a": ("32",), "b": ("s",)},
        {"a": ("了",), "b": ("。",)},
    ]
    assert len(log.notes) == 2 and not log.left_out
    assert [p.answers["a"] for p in read_prompts(file)] == [("John",), ("Anna",), ("32",), ("了",)]


def test_without_marks_the_last_token_is_meant(tmp_path: Path) -> None:
    file, log = jsonl(tmp_path / "a.jsonl", [{"text": "Mary went", "label": "a"}]), RowLog()
    assert [p.text for p in read_prompts(file, log=log)] == ["Mary went"]
    assert "marks no words" in log.notes[0]
    with pytest.raises(PromptError, match="marks no words"):
        read_prompts(file, position="mark")


def test_columns_have_other_names_and_one_that_is_missing_is_named(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"[[{name}]] went", "kind": "ab"[row % 2], "who": name, "twin": row // 2,
         "target": "ba"[row % 2]}
        for row, name in enumerate(NAMED)
    ]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(rows))
    columns = {"text": "prompt", "label": "kind", "group": "who", "pair": "twin"}
    found = read_prompts(tmp_path / "a.json", **columns)
    assert (found[3].group, found[3].pair, found[3].target) == (NAMED[3], "1", "a")
    for name in ("text", "label", "group"):
        given = columns | {name: "nothing"}
        with pytest.raises(PromptError, match=f"no 'nothing'; its columns are prompt.*--{name}"):
            read_prompts(tmp_path / "a.json", **given, log=RowLog())


def test_groups_and_pairs_stay_on_one_side() -> None:
    prompts = [
        Prompt(f"text {row}", "ab"[row % 2], pair=str(row // 2), group=str(row // 10))
        for row in range(100)
    ]
    for given in (prompts, [replace(p, group=None) for p in prompts]):
        train, test = split(given, 0.5, 0)
        assert len(train) + len(test) == 100 and 40 <= len(train) <= 60
        for name in ("group", "pair"):
            both = {getattr(p, name) for p in train} & {getattr(p, name) for p in test}
            assert both <= {None}
    # The same words under two groups bind them together.
    bound = [*prompts, Prompt("text 0", "a", group="9", pair="x")]
    train, test = split(bound, 0.5, 0)
    sides = {g: s for s, half in enumerate((train, test)) for p in half for g in [p.group]}
    assert sides["0"] == sides["9"]


# ---- the front token, and sinks ------------------------------------------------------------------


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, with one that begins a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: row for row, token in enumerate([*alphabet, "<s>"])}
    whole = Tokenizer(token_models.BPE(vocabulary, []))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>")


def test_a_character_of_several_tokens_ends_at_its_last() -> None:
    prompts = PromptSet.encode(byte_tokenizer(), [Prompt("[[é]] x", "a"), Prompt("x 😀", "b")])
    assert prompts.trimmed().position.tolist()[0] >= 0
    lengths = prompts.inputs["attention_mask"].sum(1)
    assert lengths.tolist() == [4, 6]
    first = prompts.inputs["input_ids"].shape[1] - lengths
    assert (prompts.position - first).tolist() == [1, 5]


@pytest.mark.parametrize(
    ("bos", "marked_first", "in_front"),
    [("auto", True, True), ("auto", False, False), ("always", False, True), ("never", True, False)],
)
def test_a_token_is_put_in_front_where_words_stand_first(
    bos: str, marked_first: bool, in_front: bool
) -> None:
    tokenizer, log = byte_tokenizer(), RowLog()
    texts = ("[[a]]b", "[[c]]d") if marked_first else ("a[[b]]", "c[[d]]")
    prompts = [Prompt(text, label) for text, label in zip(texts, "xy", strict=True)]
    found = PromptSet.encode(tokenizer, prompts, bos=front(tokenizer, prompts, bos, log))
    assert found.inputs["input_ids"].shape == (2, 2 + in_front)
    assert bool((found.inputs["input_ids"][:, 0] == tokenizer.bos_token_id).all()) == in_front
    assert found.position.tolist() == [in_front + (not marked_first)] * 2
    assert len(log.notes) == (bos == "auto" and marked_first)
    assert all("attention sink" in note for note in log.notes)


def test_words_that_a_closed_vocabulary_lacks_are_warned_of(tokenizer) -> None:
    known = [
        Prompt(f"After Mary and [[{name}]] arrived at the", "ab"[row % 2])
        for row, name in enumerate(NAMED[:6])
    ]
    strange = Prompt("After Zebulon and [[Mary]] arrived at the", "a")
    with pytest.warns(VocabularyWarning, match=r"1 of 7 prompts, such as 'Zebulon' in .*<unk>"):
        PromptSet.encode(tokenizer, [*known, strange])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PromptSet.encode(tokenizer, known)
