"""How stable a choice of sites is: over rounds, over seeds, and against chance. Names and numbers only."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import pairwise

Choice = frozenset[str]


def jaccard(one: Collection[str], other: Collection[str]) -> float | None:
    """Share of the sites in either choice that are in both, 0..1; ``None`` for two empty choices."""
    either = set(one) | set(other)
    return len(set(one) & set(other)) / len(either) if either else None


def chance_jaccard(k: int, sites: int) -> float:
    """Expected Jaccard index of two independent, uniform choices of k out of ``sites`` sites.

    The overlap of the two is hypergeometric; the expectation is over its exact distribution.

    Raises:
        ValueError: k is not 1..sites.
    """
    if not 1 <= k <= sites:
        raise ValueError(f"k={k} is not 1..{sites}")
    total = math.comb(sites, k)
    overlaps = range(max(0, 2 * k - sites), k + 1)
    return sum(math.comb(k, i) * math.comb(sites - k, k - i) / total * i / (2 * k - i) for i in overlaps)


def between_rounds(choices: Sequence[Choice]) -> list[float | None]:
    """Jaccard index of every choice but the first with the one before it."""
    return [jaccard(old, new) for old, new in pairwise(choices)]


def between_runs(runs: Sequence[dict[int, Choice]]) -> tuple[list[list[float | None]], list[list[float | None]]]:
    """Jaccard indices of every two runs.

    Args:
        runs: iteration -> choice, one mapping a run.

    Returns:
        Two symmetric matrices: of the last choices, and the mean over the iterations at which both runs chose.
        ``None`` where there is nothing to compare.
    """
    last = [[_last(a, b) for b in runs] for a in runs]
    return last, [[_mean(a, b) for b in runs] for a in runs]


def _last(one: dict[int, Choice], other: dict[int, Choice]) -> float | None:
    return jaccard(one[max(one)], other[max(other)]) if one and other else None


def _mean(one: dict[int, Choice], other: dict[int, Choice]) -> float | None:
    return mean([jaccard(one[iteration], other[iteration]) for iteration in one.keys() & other.keys()])


def share_on(choices: Sequence[Choice], site: str) -> float | None:
    """Share of the rounds that chose a site."""
    return sum(site in choice for choice in choices) / len(choices) if choices else None


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are defined; ``None`` without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def spread(values: Sequence[float | None]) -> float | None:
    """Sample standard deviation (divisor n - 1) of the values that are defined; ``None`` for fewer than two."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    centre = math.fsum(known) / len(known)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in known) / (len(known) - 1))
