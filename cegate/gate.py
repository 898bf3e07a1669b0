"""Scores -> plan. Names and numbers only: nothing here knows a model.

Source: CrossEarth-Gate, arXiv:2511.20302, section on Fisher-guided selection.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cegate.errors import ConfigError
from cegate.sites import PAPER_KINDS, SiteId

Normalization = Literal["kind", "layer", "mean", "none"]


@dataclass(frozen=True)
class GatePlan:
    """Which sites are on. Equal choices make equal plans: names are kept in (kind, layer, stream) order.

    Args:
        active: sites that contribute and learn.
        frozen: sites that contribute what they learned earlier and do not learn.
    """

    active: tuple[SiteId, ...] = ()
    frozen: tuple[SiteId, ...] = ()

    def __init__(self, active: Iterable[str] = (), frozen: Iterable[str] = ()) -> None:
        active = set(active)
        object.__setattr__(self, "active", _in_order(active))
        object.__setattr__(self, "frozen", _in_order(set(frozen) - active))

    @property
    def on(self) -> tuple[SiteId, ...]:
        """Every site that contributes to the forward pass."""
        return tuple(sorted(self.active + self.frozen))

    def matrix(self, layers: int, rows: Sequence[str] | None = None) -> list[list[int]]:
        """Gates ``g[row][layer]`` in {0, 1} of the contributing sites; default: a row for each of the paper's kinds."""
        on = {(site.row, site.layer) for site in self.on}
        return [[int((row, layer) in on) for layer in range(layers)] for row in rows or PAPER_KINDS]


def _in_order(sites: Iterable[str]) -> tuple[SiteId, ...]:
    return tuple(sorted(map(SiteId, sites)))


def normalize(
    scores: Mapping[str, float], how: Normalization = "kind", weights: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Make the scores of different kinds comparable.

    Args:
        scores: site -> Fisher mass, >= 0.
        how: ``kind`` divides by the sum over all sites of the site's kind (the paper's S; the streams of a kind
            compete), ``layer`` by the sum over the sites of its layer (a second reading), ``mean`` by the site's number
            of weights, ``none`` by 1.
        weights: site -> number of weights; needed by ``mean``.

    Returns:
        site -> score; a group without any mass keeps its zeros.

    Raises:
        ConfigError: a score is negative or not finite (the site is named), or ``how`` is unknown.
    """
    for site, score in scores.items():
        if not (math.isfinite(score) and score >= 0):
            raise ConfigError(f"score of {site} is {score}; scores must be finite and not negative")
    if how == "none":
        return dict(scores)
    if how == "mean":
        if weights is None or scores.keys() - weights.keys():
            raise ConfigError("normalize 'mean' needs the number of weights of every site")
        return {site: score / weights[site] for site, score in scores.items()}
    if how not in ("kind", "layer"):
        raise ConfigError(f"gate.normalize={how!r} is unknown; use kind, layer, mean or none")
    group = {site: SiteId(site).kind if how == "kind" else SiteId(site).layer for site in scores}
    total: dict[str | int, float] = {}
    for site, score in scores.items():
        total[group[site]] = total.get(group[site], 0.0) + score
    return {site: score / total[g] if total[g := group[site]] > 0 else 0.0 for site, score in scores.items()}


def select_top_k(scores: Mapping[str, float], k: int) -> GatePlan:
    """Activate the k sites with the largest score.

    Args:
        scores: site name -> normalised Fisher mass; unitless, >= 0.
        k: number of active sites, 1..len(scores).

    Returns:
        Plan with exactly k active sites; ties go to the lower (kind, layer, stream), so equal input gives equal plans.

    Raises:
        ConfigError: k is out of range, or a score is not finite; the site is named.

    Source: CrossEarth-Gate, arXiv:2511.20302.
    """
    _check_k(k, len(scores))
    for site, score in scores.items():
        if not math.isfinite(score):
            raise ConfigError(f"score of {site} is {score}; lower the learning rate or look for NaN in the data")
    ranked = sorted(_in_order(scores), key=lambda site: -scores[site])  # stable: ties keep their order
    return GatePlan(ranked[:k])


def draw_k(sites: Iterable[str], k: int, *, seed: int, iteration: int) -> GatePlan:
    """Activate k sites drawn at random: the control that a choice by scores must beat.

    Args:
        sites: all site names.
        k: number of active sites, 1..len(sites).
        seed: the run's.
        iteration: equal (seed, iteration) draw equal sites; different ones draw independently.

    Raises:
        ConfigError: k is out of range.
    """
    ranked = _in_order(sites)
    _check_k(k, len(ranked))
    return GatePlan(random.Random(f"gate {seed} {iteration}").sample(ranked, k))


def _check_k(k: int, sites: int) -> None:
    if not 1 <= k <= sites:
        raise ConfigError(f"gate.k={k} is out of range; the model has {sites} sites, use 1..{sites}")
