"""Names, templates, and the text of prompts."""

import random
from string import Formatter

import pytest

from lrqp_torch.errors import PromptError
from lrqp_torch.ioi import ABBA_TEMPLATES, BABA_TEMPLATES, NAMES, OBJECTS, PLACES
from lrqp_torch.ioi.prompts import draw


def fields(template: str) -> list[str]:
    return [field for _, field, _, _ in Formatter().parse(template) if field is not None]


def test_word_lists() -> None:
    for words, least in ((NAMES, 99), (PLACES, 8), (OBJECTS, 8), (BABA_TEMPLATES, 15)):
        assert len(words) == len(set(words)) >= least
    assert all(name.isalpha() and name == name.title() for name in NAMES)
    assert all(word[0] not in "aeiou" and word.islower() for word in OBJECTS)
    assert len(ABBA_TEMPLATES) == len(BABA_TEMPLATES)


@pytest.mark.parametrize("baba, abba", [*zip(BABA_TEMPLATES, ABBA_TEMPLATES, strict=True)])
def test_templates(baba: str, abba: str) -> None:
    names = {"BABA": ["S", "IO", "S"], "ABBA": ["IO", "S", "S"]}
    for kind, template in (("BABA", baba), ("ABBA", abba)):
        used = fields(template)
        assert [field for field in used if field in ("S", "IO")] == names[kind]
        assert sorted(set(used)) == ["IO", "OBJECT", "PLACE", "S"]
        assert template.endswith(" to") and template[0].isupper()
        # Each name has a space on both sides, so that no tokenizer joins it to anything.
        assert template.count(" {S} ") == 2 and template.count(" {IO} ") == 1
        assert len(template[template.rindex("{S}") :].split()) >= 4
    # The twins differ in the order of the names, and in nothing else.
    assert baba.format(S="X", IO="X", PLACE="p", OBJECT="o") == abba.format(
        S="X", IO="X", PLACE="p", OBJECT="o"
    )


@pytest.mark.parametrize("prefixes", [("",), ("It was late.", "Rain fell on the roof.")])
def test_starts_are_where_the_names_stand(prefixes: tuple[str, ...]) -> None:
    for prompt in draw(200, NAMES, prefixes, random.Random(0)):
        order = [prompt.io_name, prompt.s_name] if prompt.abb else [prompt.s_name, prompt.io_name]
        for name, start in zip([*order, prompt.s_name], prompt.starts, strict=True):
            assert prompt.text[start : start + len(name)] == name and prompt.text[start - 1] == " "
        template = (ABBA_TEMPLATES if prompt.abb else BABA_TEMPLATES)[prompt.template]
        opening = template.split("{")[0]
        assert prompt.text.startswith(f"{prompt.prefix} {opening}" if prompt.prefix else opening)
        assert prompt.prefix in prefixes


def test_every_distinct_prompt_can_be_drawn_and_no_more() -> None:
    names = ("Alice", "Brian")
    capacity = 2 * 2 * len(BABA_TEMPLATES) * len(PLACES) * len(OBJECTS)
    prompts = draw(capacity, names, ("",), random.Random(0))
    assert len({prompt.text for prompt in prompts}) == capacity
    with pytest.raises(PromptError, match=f"make only {capacity}"):
        draw(capacity + 1, names, ("",), random.Random(0))
    more = draw(capacity + 1, names, ("", "It was late."), random.Random(0))
    assert len({prompt.text for prompt in more}) == capacity + 1


def test_prompts_are_uniform() -> None:
    prompts = draw(20_000, NAMES, ("", "It was late."), random.Random(0))
    for chosen, choices in (
        ([prompt.template for prompt in prompts], len(BABA_TEMPLATES)),
        ([prompt.io_name for prompt in prompts], len(NAMES)),
        ([prompt.s_name for prompt in prompts], len(NAMES)),
        ([prompt.prefix for prompt in prompts], 2),
    ):
        expected = len(prompts) / choices
        counts = [chosen.count(choice) for choice in set(chosen)]
        # Chi-squared over its degrees of freedom is 1 on average, 2 far in its tail.
        statistic = sum((count - expected) ** 2 for count in counts) / expected
        assert len(counts) == choices and statistic < 2 * choices + 8
