"""Attention heads: their names, the roles they play, and the rules by which a program finds them.

Source of the roles: Wang et al. 2022, "Interpretability in the Wild" (arXiv 2211.00593).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from lrqp_torch.errors import SiteError
from lrqp_torch.stream.sites import Site
from lrqp_torch.study.estimates import Estimate


class Role(StrEnum):
    """The published roles, and answer writers: heads with a large direct effect wherever they look.

    So a model that carries names to the answer by way of other tokens is not left without any.
    """

    PREVIOUS = "previous token"
    DUPLICATE = "duplicate token"
    INDUCTION = "induction"
    S_INHIBITION = "S-inhibition"
    MOVER = "name mover"
    NEGATIVE = "negative name mover"
    BACKUP = "backup name mover"
    WRITER = "answer writer"


ATTENTION = 0.3
"""A head has a role only if it puts at least this much attention where the role says, on average
over prompts; a head that ignores the content puts about one over the number of tokens there."""

BACKUP_ATTENTION = 0.1
"""The same for backup name movers, which attend to IO less."""

SELECTIVE = 2.0
"""Name movers of all kinds attend to IO at least this many times as much as to S1."""

STRONG = 0.2
"""A name mover's direct effect on the answer is at least this share of the strongest one among the
heads that attend to IO as a name mover does, and half of this share of the strongest of all heads;
an answer writer's, this share of the strongest of all.

A direct effect counts by the end of its 95 % interval that is nearer to 0, and not at all where the
interval includes 0: a head that copies either name alike has an effect that differs from prompt to
prompt, and from 0 by chance."""

WEAK = 0.01
"""A backup's is at least this share: less is no effect worth a name."""

EFFECT = 0.01
"""Without an S-inhibition head, the name movers' attention to IO less that to S1 falls by this."""

WRITING_EFFECT = 0.02
"""In a model without name movers: the answer writers' direct effect falls by this share of it."""

_PUBLISHED: dict[str, str] = {
    Role.PREVIOUS: "2.2 4.11",
    Role.DUPLICATE: "0.1 3.0 0.10",
    Role.INDUCTION: "5.5 5.9 5.8 6.9",
    Role.S_INHIBITION: "7.3 7.9 8.6 8.10",
    Role.MOVER: "9.9 9.6 10.0",
    Role.NEGATIVE: "10.7 11.10",
    Role.BACKUP: "9.0 9.7 10.1 10.2 10.6 10.10 11.2 11.9",
}
_HEAD = re.compile(r"L(\d+)\.H(\d+)")


def head_name(layer: int, head: int) -> str:
    """``"L9.H6"`` for head 6 of layer 9."""
    return f"L{layer}.H{head}"


def parse_head(name: str) -> tuple[int, int]:
    """Layer and number of a head's name; a :class:`SiteError` where it is not ``Ln.Hh``."""
    match = _HEAD.fullmatch(name)
    if match is None:
        raise SiteError(f"{name!r} is no head; write L<layer>.H<head>, as in 'L9.H6'")
    return int(match[1]), int(match[2])


def layers_of(heads: Iterable[str]) -> list[int]:
    """The layers of some heads, the lowest first."""
    return sorted({parse_head(name)[0] for name in heads})


def published_heads(config: Any) -> dict[str, list[str]] | None:
    """The published heads by role if the model is GPT-2 small, else None.

    It is recognised by its name (or its folder's), ``gpt2``, and its shape.
    """
    name = Path(str(getattr(config, "_name_or_path", ""))).name
    shape = (config.num_hidden_layers, config.num_attention_heads, config.hidden_size)
    if name != "gpt2" or shape != (12, 12, 768):
        return None
    return {
        role: ["L{}.H{}".format(*head.split(".")) for head in heads.split()]
        for role, heads in _PUBLISHED.items()
    }


def first_reader(site: str | Site) -> int:
    """The lowest layer whose attention reads a site: its own for ``pre``, else the next."""
    parsed = Site.parse(site)
    return parsed.layer if parsed.part == "pre" else parsed.layer + 1


def attend_roles(attention: Mapping[str, Mapping[str, float]]) -> dict[str, list[str]]:
    """Heads whose role shows in their mean attention alone, by head and by the keys below."""
    keys = {Role.PREVIOUS: "S1+1→S1", Role.DUPLICATE: "S2→S1", Role.INDUCTION: "S2→S1+1"}
    return {
        role: [head for head, scores in attention.items() if scores[key] >= ATTENTION]
        for role, key in keys.items()
    }


def mover_roles(
    to_io: Mapping[str, float], to_s1: Mapping[str, float], effects: Mapping[str, Estimate]
) -> dict[str, list[str]]:
    """Name movers, negative and backup ones, and writers, from the strongest effect down.

    By each head's mean attention END → IO and END → S1, and its direct effect on IO − S.
    """
    effect = {head: value.certain for head, value in effects.items()}
    selective = [h for h in effect if to_io[h] >= SELECTIVE * to_s1[h] and effect[h]]
    selective.sort(key=lambda head: -abs(effect[head]))
    looking = [head for head in selective if to_io[head] >= ATTENTION]
    strongest = max((abs(value) for value in effect.values()), default=0.0)
    among = max((abs(effect[head]) for head in looking), default=0.0)
    needed = max(STRONG * among, STRONG * strongest / 2)
    movers = [head for head in looking if effect[head] >= needed]
    lowest = min((parse_head(head)[0] for head in movers), default=float("inf"))
    others = [h for h in selective if to_io[h] >= BACKUP_ATTENTION and h not in movers]
    weak = [head for head in others if effect[head] >= WEAK * strongest]
    return {
        Role.MOVER: movers,
        Role.NEGATIVE: [head for head in looking if -effect[head] >= needed],
        Role.BACKUP: [head for head in weak if parse_head(head)[0] >= lowest],
        Role.WRITER: writers(effects),
    }


def writers(effects: Mapping[str, Estimate]) -> list[str]:
    """Heads with a large direct effect for the answer, wherever they look, the strongest first."""
    effect = {head: value.certain for head, value in effects.items()}
    strongest = max((abs(value) for value in effect.values()), default=0.0)
    ranked = sorted(effect, key=lambda head: -effect[head])
    return [head for head in ranked if effect[head] >= STRONG * strongest and effect[head]]


def overlap(found: Sequence[str], published: Sequence[str]) -> str:
    """How many published heads were found, and how many others: ``"3 of 4, 1 more"``."""
    both = len(set(found) & set(published))
    return f"{both} of {len(published)}, {len(set(found) - set(published))} more"


@dataclass(frozen=True)
class InhibitionTest:
    """What the name movers above a head do with its output at END set to its mean over prompts.

    In a model without name movers, the answer writers above it.
    """

    attention: Estimate  # mean change of their mean attention END→IO less END→S1
    # Mean change of their summed direct effect on IO − S, in logits, with the final norm's scale
    # and the answer's direction as they were.
    writing: Estimate


@dataclass(frozen=True)
class HeadScore:
    """One head's scores over the held-out prompts."""

    head: str  # such as `"L9.H6"`
    attribution: Estimate  # direct effect on the logit difference IO − S at END, in logits
    attention: dict[str, float]  # mean attention by the keys of `ATTENTIONS`
    # What the name movers do without the head; None for a head not tested: one with END→S2 below
    # `ATTENTION`, with no name mover above it, or beyond the first `MOST_TESTED`.
    test: InhibitionTest | None


@dataclass(frozen=True)
class TruthCheck:
    """Whether the S-inhibition heads found can have read the order where it is known to be used."""

    first_layer: int  # the lowest layer whose attention reads a site at which the order is used
    last_layer: int  # the lowest layer whose attention reads the last such site
    # Every head found is in `first_layer` or above, and some in `last_layer` or above; None where
    # no head was found.
    agrees: bool | None


@dataclass(frozen=True)
class HeadsResult:
    """Scores of all heads, and which heads have which role."""

    prompts: int  # held-out prompts
    logit_difference: float  # mean of IO − S at END, in logits
    # Mean shares of it: `embedding`, `heads` with their output biases, `MLPs` and `constant`; they
    # add up to it.
    parts: dict[str, float]
    scores: list[HeadScore]  # every head, in order of computation
    # Role to heads found by the program, the strongest first; empty lists for none.
    found: dict[str, list[str]]
    published: dict[str, list[str]] | None  # role to published heads, for GPT-2 small only
    truth: TruthCheck | None  # set only for a model whose true sites are known

    def members(self, role: str) -> list[str]:
        """The heads that the rest of the study means by a role: published ones where there are."""
        known = self.published or {}
        return list(known[role] if role in known else self.found[role])

    def attending(self) -> dict[str, list[str]]:
        """Name movers of all three kinds; where there are none, answer writers too."""
        movers: dict[str, list[str]] = {
            role: self.members(role) for role in (Role.MOVER, Role.NEGATIVE, Role.BACKUP)
        }
        return movers if movers[Role.MOVER] else movers | {Role.WRITER: self.members(Role.WRITER)}
