"""What the numbers of a matrix say: means over seeds, and paired differences over seeds and tiles. Numpy only.

Scores are shares 0..1. An interval covers 95 % and comes from Student's t, so that few seeds give wide intervals.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
REPLICATES = 2000
NO_VARIANCE = 1e-24
"""Variances of shares up to this are rounding."""
BLOCK_COUNTS = 2**23
"""Numbers held at once while tiles are drawn; it does not change them."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    value: float
    low: float | None
    """Ends of the interval; ``None`` with one seed, which says nothing about others."""
    high: float | None
    seeds: int


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences."""

    value: float
    low: float | None
    """Ends of the interval; ``None`` where nothing varies."""
    high: float | None
    p: float | None
    """Two-sided p value of no difference, not corrected for other comparisons."""
    seeds: int
    """Seeds that both methods have, the fewest of the settings; with one the interval is about tiles alone."""


@dataclass(frozen=True)
class Paired:
    """Differences between two methods on trainings that share their seeds' randomness.

    One such group is one setting, or several whose runs differ in nothing but the domains they are tested on.
    """

    key: str
    """Name of the group; the draws of seeds depend on it alone."""
    weight: float
    """Share of the group in the average."""
    observed: np.ndarray
    """[n] float64, difference of the scores of each seed, averaged over the domains of the group."""
    resampled: np.ndarray
    """[n, R] float64, the same on resampled tiles."""
    tiles: int
    """Test tiles of the smallest domain."""


def iou(confusion: np.ndarray) -> np.ndarray:
    """IoU of each class [..., K] of pixel counts [..., K, K] (rows truth); NaN for a class in neither truth nor
    prediction."""
    right = np.einsum("...kk->...k", confusion).astype(float)
    union = confusion.sum(-1) + confusion.sum(-2) - right
    with np.errstate(invalid="ignore"):
        return right / union


def headline(confusion: np.ndarray, *, binary: bool, chosen: Sequence[int] | None = None) -> np.ndarray:
    """The score that is compared, [...] of counts [..., K, K]: mIoU over the chosen classes (default: all), or the
    foreground's IoU of a binary task."""
    shares = iou(confusion)
    if binary:
        return shares[..., 1]
    shares = shares if chosen is None else shares[..., list(chosen)]
    known = np.isfinite(shares)
    with np.errstate(invalid="ignore"):
        return np.where(known, shares, 0.0).sum(-1) / known.sum(-1)


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Mean of one score per seed, with Student's interval of n - 1 degrees of freedom."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Mean(mean, None, None, n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * stats.sem(values))
    return Mean(mean, mean - half, mean + half, n)


def resample_tiles(
    names: Sequence[str],
    confusions: np.ndarray,
    *,
    binary: bool,
    chosen: Sequence[int] | None = None,
    replicates: int = REPLICATES,
) -> np.ndarray:
    """Score every model on resampled test sets.

    A replicate draws T - 1 of the T tiles with replacement (T - 1, so that the spread of the scores is that of T new
    tiles: T of T are too much alike, by the factor (T - 1) / T of the variance), adds up their pixel counts and scores
    the sum. The draws depend on the tiles alone, by name and true pixels of each class: all models, seeds and settings
    that are tested on the same tiles get the same ones, which is what makes differences paired; domains of other tiles
    get others, even where names are equal.

    Args:
        names: [T] names of the tiles.
        confusions: [M, T, K, K] int64 pixel counts of M models on each tile, rows truth.
        binary: score the foreground's IoU instead of mIoU.
        chosen: classes of the mIoU; default: all.
        replicates: R.

    Returns:
        [M, R] float64; NaN where a draw has no pixel of any class that counts.
    """
    models, tiles, classes = confusions.shape[:3]
    flat = confusions.reshape(models, tiles, classes * classes).astype(float)  # exact up to 2^53 pixels
    truth = np.ascontiguousarray(confusions[:1].sum(-1), np.int64)
    rng = _generator("tiles", *names, truth.tobytes().hex())
    scores = []
    step = max(1, BLOCK_COUNTS // max(tiles, 1))
    for first in range(0, replicates, step):
        rows = min(step, replicates - first)
        drawn = rng.integers(0, tiles, (rows, max(tiles - 1, 1)))
        cells = drawn + tiles * np.arange(rows)[:, None]
        counts = np.bincount(cells.ravel(), minlength=rows * tiles).reshape(rows, tiles).astype(float)
        pooled = (counts @ flat).reshape(models, rows, classes, classes)
        scores.append(headline(pooled, binary=binary, chosen=chosen))
    return np.concatenate(scores, axis=1)


def difference(groups: Sequence[Paired]) -> Difference:
    """Weighted sum of the mean differences of independent groups, with a hierarchical bootstrap over seeds and tiles.

    A replicate draws, in each group, n - 1 of its n seeds with replacement (n - 1, so that the spread of the drawn
    means is that of a mean of n), the same for both methods; and, in each domain, T - 1 of its T tiles with replacement
    for the same reason, the same for both methods and all seeds, because every seed is tested on the same tiles
    (`resample_tiles`). Noise that belongs to one seed on one tile enters both draws: intervals err on the wide side.

    The standard error is the standard deviation over replicates. Percentiles of the replicates are not used: of three
    seeds they never reach beyond the least and the greatest, which hold the truth three times in four. Interval and p
    value are Student's instead, with Welch and Satterthwaite's degrees of freedom: n - 1 for the part of the variance
    that the seeds explain, T - 1 for the tiles'. A setting with one seed has no such part.

    Raises:
        ValueError: no groups.
    """
    if not groups:
        raise ValueError("a difference needs at least one group of paired trainings")
    value = sum(group.weight * float(group.observed.mean()) for group in groups)
    replicates = sum(group.weight * _drawn_means(group) for group in groups)
    variance = float(np.nanvar(replicates, ddof=1))
    of_seeds = [(group.weight**2 * _mean_variance(group.observed), len(group.observed) - 1) for group in groups]
    of_tiles = (max(0.0, variance - sum(part for part, _ in of_seeds)), min(group.tiles for group in groups) - 1)
    seeds = min(len(group.observed) for group in groups)
    freedom = _degrees_of_freedom([*of_seeds, of_tiles])
    if freedom is None or not variance > NO_VARIANCE:
        return Difference(value, None, None, None, seeds)
    error = math.sqrt(variance)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Difference(value, value - half, value + half, float(2 * stats.t.sf(abs(value) / error, freedom)), seeds)


def _drawn_means(group: Paired) -> np.ndarray:
    """[R] mean differences of drawn seeds on drawn tiles."""
    n, replicates = group.resampled.shape
    if n == 1:
        return group.resampled[0]
    drawn = _generator("seeds", group.key).integers(0, n, (replicates, n - 1))
    return group.resampled[drawn, np.arange(replicates)[:, None]].mean(1)


def _mean_variance(values: np.ndarray) -> float:
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else 0.0


def _degrees_of_freedom(parts: Sequence[tuple[float, int]]) -> float | None:
    """Welch and Satterthwaite's, of (variance, degrees of freedom) pairs; ``None`` where nothing varies."""
    varying = [(variance, freedom) for variance, freedom in parts if variance > NO_VARIANCE and freedom > 0]
    if not varying:
        return None
    return sum(v for v, _ in varying) ** 2 / sum(v * v / freedom for v, freedom in varying)


def _generator(*words: str) -> np.random.Generator:
    """A generator that depends on the words alone."""
    digest = hashlib.sha256("\n".join(words).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))
