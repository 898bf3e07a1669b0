"""How stable a choice of sites is: over rounds, over seeds, and against chance. Names and numbers only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

Choice = frozenset[str]
Matrix = list[list[float | None]]


def jaccard(one: Collection[str], other: Collection[str]) -> float | None:
    """Share of the sites in either choice that are in both, 0..1; ``None`` for two empty choices."""
    either = set(one) | set(other)
    return len(set(one) & set(other)) / len(either) if either else None


def chance_jaccard(k: int, sites: int) -> float:
    """Expected Jaccard index of two independent, uniform choices of k out of ``sites`` sites: the mean over their
    overlap, which is hypergeometric.

    Raises:
        ValueError: k is not 1..sites.
    """
    if not 1 <= k <= sites:
        raise ValueError(f"k={k} is not 1..{sites}")
    overlaps = range(max(0, 2 * k - sites), k + 1)
    return sum(math.comb(k, i) * math.comb(sites - k, k - i) * i / (2 * k - i) for i in overlaps) / math.comb(sites, k)


def between_rounds(choices: Sequence[Choice]) -> list[float | None]:
    """Jaccard index of every choice but the first with the one before it."""
    return [jaccard(old, new) for old, new in pairwise(choices)]


def between_runs(runs: Sequence[Mapping[int, Choice]]) -> tuple[Matrix, Matrix]:
    """Jaccard indices of every two runs, given iteration -> choice of each.

    Returns:
        Two symmetric matrices: of the last choices, and the mean over the iterations at which both runs chose.
        ``None`` where there is nothing to compare.
    """
    last = [[jaccard(a[max(a)], b[max(b)]) if a and b else None for b in runs] for a in runs]
    return last, [[mean(jaccard(a[i], b[i]) for i in a.keys() & b.keys()) for b in runs] for a in runs]


def share_on(choices: Sequence[Choice], site: str) -> float | None:
    """Share of the rounds that chose a site."""
    return mean(site in choice for choice in choices)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are defined; ``None`` without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def spread(values: Iterable[float | None]) -> float | None:
    """Sample standard deviation (divisor n - 1) of the values that are defined; ``None`` for fewer than two."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None
