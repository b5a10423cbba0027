"""The sets of heads whose attention patterns the study compares."""

import random

from lrqp_torch.stream.sites import blocks_of, head_count
from lrqp_torch.study.circuit import attention_roles
from lrqp_torch.study.context import StudyContext
from lrqp_torch.study.heads import HeadsResult
from lrqp_torch.study.roles import (
    BACKUP,
    MOVER,
    NEGATIVE,
    S_INHIBITION,
    WRITER,
    first_reader,
    head_name,
    parse_head,
)

RANDOM_SETS = 3
"""Sets of random heads, each as large as the first set of heads with a role."""

CEILING = "all heads above the site"


def head_groups(context: StudyContext, site: str, heads: HeadsResult) -> dict[str, list[str]]:
    """The sets of heads that the study compares; sets without heads are left out.

    Name movers alone, with negative, with backup name movers, and with both; answer writers where
    there are no name movers; S-inhibition heads, which look at S2 whatever it says, so that what
    they carry should be in what they read there and not in their patterns; all heads above the
    site; and random ones, drawn from heads above the site that are in none of these roles.
    """
    roles = attention_roles(heads)
    movers, negative, backup = roles[MOVER], roles[NEGATIVE], roles[BACKUP]
    groups = {"name movers": movers}
    if movers:
        groups |= {
            "with negative ones": [*movers, *negative] if negative else [],
            "with backups": [*movers, *backup] if backup else [],
            "with both": [*movers, *negative, *backup] if negative and backup else [],
        }
    groups["answer writers"] = roles.get(WRITER, [])
    groups["S-inhibition heads"] = heads.members(S_INHIBITION)
    everything = [
        head_name(layer, head)
        for layer in range(first_reader(site), len(blocks_of(context.model)))
        for head in range(head_count(context.model))
    ]
    known = {head for group in groups.values() for head in group}
    others = [head for head in everything if head not in known]
    size = len([head for head in movers or groups["answer writers"] if head in everything])
    draws = random.Random(context.seed)
    groups[CEILING] = everything
    if len(others) <= size:
        name = "the other head" if len(others) == 1 else f"all {len(others)} other heads"
        groups[name] = others
    else:
        for number in range(1, RANDOM_SETS + 1):
            drawn = draws.sample(others, size)
            name = f"{size} other head{'' if size == 1 else 's'}, draw {number}"
            groups[name] = sorted(drawn, key=parse_head)
    return {name: members for name, members in groups.items() if members}
