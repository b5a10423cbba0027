"""Sentences to put in front of a prompt, which make the task as messy as web text.

The rule for a sentence is that of the post's author in earlier public code: first character
upper-case and all others lower-case (so it holds no names), a full stop at its end, no "@", "http"
or "/", at least 10 characters and at most 50 tokens. One rule is added to it, because a first word
is upper-case whether or not it is a name: that word must not be one of the task's names.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lrqp_torch.errors import MissingExtraError, PrefixError
from lrqp_torch.ioi.words import NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_CHARACTERS = 10
MOST_TOKENS = 50
OPENWEBTEXT_FILES = "hf://datasets/Skylion007/openwebtext@refs/convert/parquet/**/*.parquet"
_BATCH = 1024
_WORD = re.compile(r"\w+")
_NAMES = frozenset(NAMES)


def broken_rule(sentence: str) -> str | None:
    """The first rule that a sentence breaks, in words; None for one that may be a prefix.

    The limit on tokens is left to :func:`usable`, which tokenises many sentences at once.
    """
    if len(sentence) < LEAST_CHARACTERS:
        return f"shorter than {LEAST_CHARACTERS} characters"
    if not sentence[0].isupper():
        return "first character not upper-case"
    if sentence[1:] != sentence[1:].lower():
        return "upper-case after the first character"
    if not sentence.endswith("."):
        return "no full stop at its end"
    if any(mark in sentence for mark in ("@", "http", "/")):
        return 'holds "@", "http" or "/"'
    if _WORD.findall(sentence)[0] in _NAMES:
        return "begins with a name of the task"
    return None


def usable(
    sentences: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    source: str,
    at_most: int | None = None,
) -> tuple[str, ...]:
    """Sentences that keep the rule, each once, in the order read.

    Args:
        sentences: read lazily, no further than needed.
        tokenizer: counts the tokens of a sentence, without special tokens.
        source: what to call the sentences in an error.
        at_most: stop after this many; None reads all.

    Raises:
        PrefixError: none remains. The message counts what each rule dropped.
    """
    kept: dict[str, None] = {}
    dropped: Counter[str] = Counter()
    read = 0
    stream = (sentence.strip() for sentence in sentences)
    while batch := list(islice(stream, _BATCH)):
        read += len(batch)
        candidates = []
        for sentence in batch:
            rule = broken_rule(sentence)
            if rule is None:
                candidates.append(sentence)
            else:
                dropped[rule] += 1
        if candidates:
            encoding = tokenizer(candidates, add_special_tokens=False, verbose=False)
            for sentence, ids in zip(candidates, encoding["input_ids"], strict=True):
                if len(ids) > MOST_TOKENS:
                    dropped[f"more than {MOST_TOKENS} tokens"] += 1
                else:
                    kept[sentence] = None
        if at_most is not None and len(kept) >= at_most:
            break
    if not kept:
        counts = "; ".join(f"{count} {rule}" for rule, count in dropped.most_common())
        raise PrefixError(
            f"no usable prefix in {source}: {read} lines read"
            + (f", dropped: {counts}" if counts else "")
            + ". Give sentences with one upper-case letter at the beginning and a full stop at "
            "the end, or prefixes='bundled'"
        )
    return tuple(islice(kept, at_most))


def split_sentences(texts: Iterable[str]) -> Iterator[str]:
    """Sentences of running texts: split at line ends, and at spaces after a full stop, ! or ?."""
    for text in texts:
        for line in text.splitlines():
            yield from re.split(r"(?<=[.!?])\s+", line.strip())


def openwebtext() -> Iterator[str]:
    """Documents of OpenWebText (Gokaslan and Cohen 2019), streamed from the Hugging Face Hub.

    Raises:
        MissingExtraError: the package ``datasets`` is not installed.
        PrefixError: the stream cannot be read.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(
            "prefixes='openwebtext' streams with the package datasets, which is not installed: "
            "pip install lrqp_torch[datasets], or use prefixes='bundled' or a text file"
        ) from error
    try:
        # The parquet copy that the Hub keeps is asked for, because the data set itself is behind
        # a loading script, which datasets no longer runs since version 4.
        for row in load_dataset(
            "parquet", data_files=OPENWEBTEXT_FILES, split="train", streaming=True
        ):
            yield row["text"]
    except Exception as error:  # what fails in a download is up to five packages below
        raise PrefixError(
            f"OpenWebText could not be streamed ({type(error).__name__}: {error}): check the "
            f"network, or use prefixes='bundled' or a text file with one sentence a line"
        ) from error


def bundled() -> tuple[str, ...]:
    """The sentences that come with the package."""
    text = files("lrqp_torch.ioi").joinpath("bundled_prefixes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def read_lines(path: Path) -> list[str]:
    """Lines of a text file in UTF-8.

    Raises:
        PrefixError: the file is missing, empty, a folder, or not UTF-8 text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise PrefixError(
            f"no file {str(path)!r}: prefixes is None, 'bundled', 'openwebtext', the path of a "
            f"text file with one sentence a line, or a sequence of sentences"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise PrefixError(
            f"{str(path)!r} cannot be read as UTF-8 text ({error}): give a text file with one "
            f"sentence a line"
        ) from error
    if not lines:
        raise PrefixError(f"{str(path)!r} is empty (0 lines read): put one sentence on a line")
    return lines


def load_prefixes(
    source: str | Path | Sequence[str], tokenizer: "PreTrainedTokenizerBase", needed: int
) -> tuple[str, ...]:
    """Usable prefix sentences from any source; see :meth:`IOIDataset.generate` for the sources.

    Args:
        source: ``"bundled"``, ``"openwebtext"``, a path, or a sequence of sentences.
        tokenizer: counts the tokens of a sentence.
        needed: how many to stream from OpenWebText; the other sources are read whole.

    Raises:
        PrefixError: the source is missing, unreadable, empty, or holds no usable sentence.
        MissingExtraError: ``"openwebtext"`` without the package ``datasets``.
    """
    if isinstance(source, str) and source == "bundled":
        return usable(bundled(), tokenizer, "the bundled list")
    if isinstance(source, str) and source == "openwebtext":
        return usable(split_sentences(openwebtext()), tokenizer, "OpenWebText", at_most=needed)
    if isinstance(source, str | Path):
        path = Path(source)
        return usable(read_lines(path), tokenizer, repr(str(path)))
    if not isinstance(source, Sequence) or not all(isinstance(item, str) for item in source):
        raise PrefixError(
            f"prefixes is a {type(source).__name__}: it must be None, 'bundled', 'openwebtext', a "
            f"path, or a sequence of strings"
        )
    return usable(source, tokenizer, "the sequence given")
