"""Numbers, sites and tasks in words, as reports, figures and the terminal show them."""

from collections.abc import Collection, Sequence

from lrqp_torch.study.estimates import Estimate

NO_BREAK = "\u00a0"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in per cent, ``"95.4 %"``; a dash for none."""
    return "–" if share is None else f"{_minus(f'{100 * share:z.{digits}f}')}{NO_BREAK}%"


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign: ``"+0.31"`` or ``"−0.20"``."""
    return _minus(f"{value:+z.{digits}f}")


def between(estimate: Estimate, digits: int = 2, scale: float = 1.0) -> str:
    """The interval of an estimate times ``scale``, ``"0.31 to 0.42"``; a dash for none."""
    if estimate.interval is None:
        return "–"
    lower, upper = (f"{scale * end:z.{digits}f}" for end in estimate.interval)
    return _minus(f"{lower} to {upper}")


def share_in_words(estimate: Estimate, digits: int = 1) -> str:
    """A share with its interval: ``"95.4 % (93.1 to 96.9)"``."""
    return f"{percent(estimate.value, digits)} ({between(estimate, digits, 100)})"


def in_ranges(chosen: Collection[str], order: Sequence[str]) -> str:
    """Sites in words, neighbours joined: "L1.mid to L3.pre, L4.mid"; "no site" for none.

    Args:
        chosen: the sites to name.
        order: all sites, in order of computation.
    """
    runs: list[list[str]] = []
    broken = True
    for site in order:
        if site in chosen and broken:
            runs.append([site])
        elif site in chosen:
            runs[-1].append(site)
        broken = site not in chosen
    if not runs:
        return "no site"
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def task_in_words(name: str) -> str:
    """A task's name as figures and sentences show it."""
    return {"plain": "without a prefix", "prefixed": "with a prefix"}.get(name, name)


def capitalised(words: str) -> str:
    """Words with a capital first letter; ``str.capitalize`` would turn S1 into s1."""
    return words[:1].upper() + words[1:]


def _minus(number: str) -> str:
    return number.replace("-", "−")
