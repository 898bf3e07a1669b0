"""Scores -> plan. Names and numbers only: nothing here knows a model.

Source: CrossEarth-Gate, arXiv:2511.20302, section on Fisher-guided selection.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from cegate.config import KINDS
from cegate.errors import ConfigError, nearest

Normalization = Literal["kind", "layer", "mean", "none"]


def site_key(site: str) -> tuple[int, int]:
    """Sort key (kind, layer) of a site name such as ``spatial.7``; the order in which ties are broken.

    Raises:
        ConfigError: not ``<kind>.<layer>`` with a known kind.
    """
    kind, _, layer = site.partition(".")
    if kind not in KINDS or not layer.isdecimal():
        raise ConfigError(
            f"site {site!r} is not <kind>.<layer>; kinds are {', '.join(KINDS)}, layers from 0 on{nearest(kind, KINDS)}"
        )
    return KINDS.index(kind), int(layer)


@dataclass(frozen=True)
class GatePlan:
    """Which sites are on. Equal choices make equal plans: names are kept in (kind, layer) order.

    Args:
        active: sites that contribute and learn.
        frozen: sites that contribute what they learned earlier and do not learn.
    """

    active: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def __init__(self, active: Iterable[str] = (), frozen: Iterable[str] = ()) -> None:
        active = set(active)
        object.__setattr__(self, "active", tuple(sorted(active, key=site_key)))
        object.__setattr__(self, "frozen", tuple(sorted(set(frozen) - active, key=site_key)))

    @property
    def on(self) -> tuple[str, ...]:
        """Every site that contributes to the forward pass."""
        return tuple(sorted(self.active + self.frozen, key=site_key))

    def matrix(self, layers: int) -> list[list[int]]:
        """Gates g[kind][layer] in {0, 1} of the contributing sites, 3 x ``layers``."""
        on = set(self.on)
        return [[int(f"{kind}.{layer}" in on) for layer in range(layers)] for kind in KINDS]


def normalize(
    scores: Mapping[str, float], how: Normalization = "kind", weights: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Make the scores of different kinds comparable.

    Args:
        scores: site -> Fisher mass, >= 0.
        how: ``kind`` divides by the sum over the layers of the site's kind (the paper's S), ``layer`` by the sum over
            the kinds of its layer (a second reading), ``mean`` by the site's number of weights, ``none`` by 1.
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
    axis = 0 if how == "kind" else 1
    total: dict[int, float] = {}
    for site, score in scores.items():
        group = site_key(site)[axis]
        total[group] = total.get(group, 0.0) + score
    return {site: score / total[g] if total[g := site_key(site)[axis]] > 0 else 0.0 for site, score in scores.items()}


def select_top_k(scores: Mapping[str, float], k: int) -> GatePlan:
    """Activate the k sites with the largest score.

    Args:
        scores: site name -> normalised Fisher mass; unitless, >= 0.
        k: number of active sites, 1..len(scores).

    Returns:
        Plan with exactly k active sites; ties go to the lower (kind, layer), so equal input gives an equal plan.

    Raises:
        ConfigError: k is out of range, or a score is not finite; the site is named.

    Source: CrossEarth-Gate, arXiv:2511.20302.
    """
    _check_k(k, len(scores))
    for site, score in scores.items():
        if not math.isfinite(score):
            raise ConfigError(f"score of {site} is {score}; lower the learning rate or look for NaN in the data")
    ranked = sorted(scores, key=lambda site: (-scores[site], site_key(site)))
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
    ranked = sorted(sites, key=site_key)
    _check_k(k, len(ranked))
    return GatePlan(random.Random(f"gate {seed} {iteration}").sample(ranked, k))


def _check_k(k: int, sites: int) -> None:
    if not 1 <= k <= sites:
        raise ConfigError(f"gate.k={k} is out of range; the model has {sites} sites, use 1..{sites}")
