from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from cegate.matrix import statistics
from cegate.matrix.statistics import Paired, difference, headline, iou, mean_over_seeds, resample_tiles
from cegate.metrics import Confusion

COUNTS = arrays(np.int64, st.integers(2, 5).map(lambda k: (k, k)), elements=st.integers(0, 3) | st.just(10**9))


@given(COUNTS)
def test_scores_of_counts_are_those_of_the_evaluation(counts):
    scores = Confusion([str(k) for k in range(len(counts))], counts).scores()
    np.testing.assert_allclose(iou(counts), scores.iou)
    np.testing.assert_allclose(headline(counts, binary=False), scores.mIoU)
    np.testing.assert_allclose(headline(counts, binary=True), scores.iou[1])


def test_an_interval_over_seeds_is_students():
    values = [0.5, 0.53, 0.51]
    mean = mean_over_seeds(values)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (mean.low, mean.high) == (pytest.approx(low), pytest.approx(high)) and mean.seeds == 3


def test_one_seed_has_no_interval():
    mean = mean_over_seeds([0.5])
    assert (mean.value, mean.low, mean.high, mean.seeds) == (0.5, None, None, 1)


def counts_of(rng: np.random.Generator, models: int, tiles: int, k: int = 3) -> np.ndarray:
    """Counts of models that are tested on the same tiles."""
    first = rng.integers(0, 500, (tiles, k, k))
    return np.stack([rng.permuted(first, axis=-1) for _ in range(models)])


def foreground_counts(shares: np.ndarray) -> np.ndarray:
    """Counts [..., 2, 2] of tiles of a million foreground pixels each, so that the IoU of many is the mean share."""
    right = np.round(1e6 * shares).astype(np.int64)
    none = np.zeros_like(right)
    return np.stack((np.stack((none, none), -1), np.stack((10**6 - right, right), -1)), -2)


def test_a_replicate_scores_the_pooled_counts_of_drawn_tiles():
    whole = counts_of(np.random.default_rng(0), 1, 3)
    scores = resample_tiles(["a", "b", "c"], whole, binary=False)[0]
    pairs = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]
    possible = [headline(whole[0, list(pair)].sum(0), binary=False) for pair in pairs]
    shares = [np.isclose(scores, score).mean() for score in possible]
    assert sum(shares) == 1 and shares == pytest.approx([1 / 9] * 3 + [2 / 9] * 3, abs=0.04)


@pytest.mark.parametrize("tiles", [2, 3, 30])
def test_replicates_spread_as_scores_of_new_tiles_do(tiles):
    shares = np.random.default_rng(tiles).uniform(0.2, 0.8, tiles)
    scores = resample_tiles([f"t{n}" for n in range(tiles)], foreground_counts(shares)[None], binary=True)
    assert scores.var(ddof=1) == pytest.approx(shares.var(ddof=1) / tiles, rel=0.1)


def test_one_tile_is_drawn_again_and_again():
    counts = counts_of(np.random.default_rng(0), 1, 1)
    assert (resample_tiles(["a"], counts, binary=False) == headline(counts[0].sum(0), binary=False)).all()


def test_draws_depend_on_the_tiles_alone(monkeypatch):
    names, counts = [f"t{n}" for n in range(40)], counts_of(np.random.default_rng(0), 3, 40)
    scores = resample_tiles(names, counts, binary=False)
    alone = resample_tiles(names, counts[1:2], binary=False)
    monkeypatch.setattr(statistics, "BLOCK_COUNTS", 40 * 7)
    np.testing.assert_array_equal(resample_tiles(names, counts, binary=False), scores)
    np.testing.assert_array_equal(alone[0], scores[1])
    assert not np.array_equal(resample_tiles([*names[:-1], "other"], counts, binary=False), scores)


def test_domains_of_equal_names_and_other_tiles_are_drawn_apart():
    rng, names = np.random.default_rng(0), [f"t{n}" for n in range(40)]
    shares = rng.uniform(0.2, 0.8, 40)
    north = foreground_counts(shares)
    south = np.concatenate((north[:-1], north[-1:] + np.array([[1, 0], [0, 0]])))  # one more pixel of background
    one, other = (resample_tiles(names, counts[None], binary=True)[0] for counts in (north, south))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


def paired(observed, resampled, key="a", weight=1.0, tiles=50) -> Paired:
    return Paired(key, weight, np.asarray(observed, float), np.asarray(resampled, float), tiles)


def without_tiles(observed, **rest) -> Paired:
    """Seeds vary, tiles do not."""
    return paired(observed, np.repeat(np.array(observed)[:, None], statistics.REPLICATES, 1), **rest)


@pytest.mark.parametrize("observed", [[0.01, 0.03], [0.02, 0.05, 0.01], [0.01, -0.02, 0.03, 0.0, 0.02]], ids=len)
def test_where_only_seeds_vary_it_is_the_paired_t_test(observed):
    found, expected = difference([without_tiles(observed)]), stats.ttest_1samp(observed, 0.0)
    low, high = expected.confidence_interval(0.95)
    assert found.value == pytest.approx(np.mean(observed)) and found.seeds == len(observed)
    assert found.high - found.low == pytest.approx(high - low, rel=0.06)
    assert found.p == pytest.approx(expected.pvalue, rel=0.12)


def test_one_seed_leaves_the_tiles():
    rng = np.random.default_rng(0)
    found = difference([paired([0.03], rng.normal(0.03, 0.01, (1, 2000)))])
    assert (found.low, found.high) == pytest.approx((0.01, 0.05), abs=0.002) and found.seeds == 1
    assert found.p == pytest.approx(0.004, abs=0.002)


def test_where_nothing_varies_there_is_no_interval():
    found = difference([paired([0.0], np.zeros((1, 2000)))])
    assert (found.value, found.low, found.high, found.p) == (0.0, None, None, None)


def test_settings_that_train_alike_do_not_count_as_independent():
    observed = [0.02, 0.05, 0.01]
    alone = difference([without_tiles(observed)])
    same = difference([without_tiles(observed, key="a", weight=0.5), without_tiles(observed, key="a", weight=0.5)])
    other = difference([without_tiles(observed, key="a", weight=0.5), without_tiles(observed, key="b", weight=0.5)])
    assert same.value == other.value == pytest.approx(alone.value)
    assert other.high - other.low < 0.75 * (alone.high - alone.low)


def test_no_groups_are_refused():
    with pytest.raises(ValueError, match="at least one group"):
        difference([])


def test_rounding_is_no_difference():
    noise = 1e-16 * np.random.default_rng(0).normal(size=(3, 2000))
    found = difference([paired([1e-16, -1e-16, 0.0], noise)])
    assert (found.low, found.high, found.p) == (None, None, None)
    found = difference([paired([0.02, 0.02, 0.02], 0.02 + noise)])
    assert found.value == pytest.approx(0.02) and found.p is None


@pytest.mark.parametrize(
    ("of_seeds", "of_tiles", "of_both", "tiles"),
    [(1.0, 0.1, 0.1, 40), (0.1, 5.0, 1.0, 40), (1.0, 6.0, 4.0, 40), (0.0, 1.0, 0.0, 4), (0.2, 2.0, 0.2, 4)],
)
def test_intervals_of_three_seeds_hold_the_truth_nineteen_times_in_twenty(of_seeds, of_tiles, of_both, tiles):
    rng, trials = np.random.default_rng(7), 300
    held = 0
    for trial in range(trials):
        gaps = of_seeds * rng.normal(size=(3, 1)) + of_tiles * rng.normal(size=(1, tiles))
        gaps = 0.01 * (gaps + of_both * rng.normal(size=(3, tiles)))
        names = [f"{trial}/{n}" for n in range(tiles)]
        scores = resample_tiles(names, foreground_counts(0.5 + gaps), binary=True, replicates=300)
        found = difference([paired(gaps.mean(1), scores - 0.5, key=str(trial), tiles=tiles)])
        held += found.low <= 0 <= found.high
    assert 0.91 <= held / trials <= 0.99
