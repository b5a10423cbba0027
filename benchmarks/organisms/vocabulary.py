"""The organisms' word-level tokenizer: every name with its leading space is one token."""

from collections.abc import Iterable
from itertools import chain

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from lrqp_torch.ioi.names import NAMES
from lrqp_torch.ioi.templates import BABA_TEMPLATES, OBJECTS, PLACES

UNKNOWN = "<unk>"
PADDING = "<pad>"
# A word with the space before it, a number likewise, or one other sign likewise.
WORD = r" ?[A-Za-z]+(?:['’][A-Za-z]+)*| ?[0-9]+| ?[^\sA-Za-z0-9]|\s+"


def build_tokenizer(sentences: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build the tokenizer over the task's words and those of some more sentences.

    Every word is entered with and without a leading space, because a sentence behind a prefix
    starts with one. Words outside the vocabulary become ``<unk>``.

    Args:
        sentences: Text whose words join the vocabulary, for example the bundled prefixes.

    Returns:
        The tokenizer; ids follow the sorted order of the words, so the result depends on the set
        of words alone.
    """
    split = Split(Regex(WORD), behavior="isolated")
    task = chain(BABA_TEMPLATES, NAMES, PLACES, OBJECTS)
    words = {
        piece.strip()
        for text in chain(task, sentences)
        for piece, _ in split.pre_tokenize_str(text)
    } - {""}
    entries = [PADDING, UNKNOWN, *sorted(chain(words, (f" {word}" for word in words)))]
    tokenizer = Tokenizer(
        WordLevel({word: index for index, word in enumerate(entries)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=PADDING,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
