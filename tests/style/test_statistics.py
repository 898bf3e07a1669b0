"""Style statistics: what is measured, drawn and read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cegate.data.rasters import write_image
from cegate.errors import CheckpointError, ConfigError, DataError
from cegate.style import statistics
from cegate.style.networks import ColourStatistics, StyleNetworks
from cegate.style.statistics import Moments, StyleStatistics, load_statistics, measure, measure_folder, read_small


@pytest.fixture(scope="module")
def public(shared) -> StyleStatistics:
    return load_statistics(shared / "vectors" / "style_statistics.npz")


def test_the_public_statistics_load_and_their_factor_is_a_root(public, shared):
    assert public.dim == 100
    with np.load(shared / "vectors" / "style_statistics.npz") as file:
        np.testing.assert_array_equal(public.mean, file["pbn_embedding_mean"])
        scale = abs(file["pbn_embedding_covariance"]).max()
        root = public.factor("full")
        np.testing.assert_allclose(root @ root.T, file["pbn_embedding_covariance"], atol=3e-7 * scale)
        diagonal = public.factor("diag")
        np.testing.assert_allclose(np.diag(diagonal) ** 2, file["singular_values"], atol=3e-7 * scale)
        assert np.count_nonzero(diagonal - np.diag(np.diag(diagonal))) == 0


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_draws_have_the_spread_that_is_asked_for(kind):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4, 4))
    held = StyleStatistics(rng.normal(size=4), a @ a.T)
    drawn = rng.standard_normal((200_000, 4)) @ held.factor(kind).T + held.mean
    expected = held.covariance if kind == "full" else np.diag(np.linalg.svd(held.covariance)[1])
    scale = np.linalg.norm(held.covariance, 2)
    np.testing.assert_allclose(np.cov(drawn.T), expected, atol=0.02 * scale)
    np.testing.assert_allclose(drawn.mean(0), held.mean, atol=0.02 * np.sqrt(scale))


def test_moments_in_pieces_are_those_of_the_whole():
    x = np.random.default_rng(1).normal(100.0, 1e-2, size=(70, 5))  # a naive sum of squares would lose it all
    moments = Moments.none(5)
    for piece in np.split(x, [1, 17, 18, 60]):
        moments = moments.with_more(piece)
    found = moments.statistics("x")
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("name", ["styles.npz", "styles"])
def test_what_is_saved_is_read_back(tmp_path, name):
    held = StyleStatistics(np.arange(6.0), np.diag(np.arange(1.0, 7.0)))
    held.save(tmp_path / name)
    found = load_statistics(tmp_path / name)
    np.testing.assert_array_equal(found.mean, held.mean)
    np.testing.assert_array_equal(found.covariance, held.covariance)
    if name == "styles":
        np.testing.assert_array_equal(load_statistics(tmp_path / name / "mean.npy").covariance, held.covariance)


def test_the_public_checkpoint_is_read_too(tmp_path):
    torch.save(
        {"pbn_embedding_mean": torch.zeros(5), "pbn_embedding_covariance": torch.eye(5).double()}, tmp_path / "e.pth"
    )
    assert load_statistics(tmp_path / "e.pth").dim == 5


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(3)}, r"cannot be read \(it holds mean\); give an .npz file with mean and covariance"),
        ({"mean": np.zeros(3), "covariance": np.eye(4)}, r"a mean \[3\] and a covariance \[4, 4\]"),
        ({"mean": np.zeros(3), "covariance": np.full((3, 3), np.nan)}, "numbers that are not finite"),
    ],
)
def test_other_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(CheckpointError, match=message):
        load_statistics(tmp_path / "s.npz")


def test_statistics_of_another_dimension_are_refused(public):
    with pytest.raises(
        CheckpointError, match=r"style_statistics.npz is of embeddings of 100 numbers, but colour .* has 6"
    ):
        public.check(ColourStatistics())


# --- measuring ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(3)
    (tmp_path / "in").mkdir()
    for number in range(7):
        size = (20 + 3 * number, 31 - number)
        base = rng.integers(40, 200, size=(3, 1, 1))
        image = np.clip(base + rng.integers(-20, 20, size=(3, *size)), 0, 255).astype(np.uint8)
        write_image(tmp_path / "in" / f"{number}.png", image)
    return tmp_path / "in"


def test_a_folder_is_measured_as_its_images_are(folder, tmp_path):
    found = measure_folder(folder, tmp_path / "s.npz", ColourStatistics())
    images = [read_small(path) for path in sorted(folder.iterdir())]
    expected = measure(ColourStatistics(), images, "images")
    np.testing.assert_array_equal(found.mean, expected.mean)
    np.testing.assert_array_equal(load_statistics(tmp_path / "s.npz").covariance, found.covariance)
    means = np.array([image.double().mean((1, 2)).numpy() for image in images])
    np.testing.assert_allclose(found.mean[:3], means.mean(0), atol=2e-3)  # resized, so not quite


def test_bands_may_be_in_any_order(folder, tmp_path):
    forwards = measure_folder(folder, tmp_path / "a.npz", ColourStatistics())
    backwards = measure_folder(folder, tmp_path / "b.npz", ColourStatistics(), bands=[3, 2, 1])
    np.testing.assert_allclose(backwards.mean, forwards.mean[[2, 1, 0, 5, 4, 3]], rtol=1e-6)


class Interrupted(Exception):
    pass


def test_a_measurement_cut_off_goes_on_to_the_same_bits(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "BATCH", 2)
    monkeypatch.setattr(statistics._batches, "__defaults__", (2,))
    whole = measure_folder(folder, tmp_path / "whole.npz", ColourStatistics())

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        measure_folder(folder, tmp_path / "cut.npz", ColourStatistics(), progress=stop)
    assert not (tmp_path / "cut.npz").exists()
    seen = []
    resumed = measure_folder(folder, tmp_path / "cut.npz", ColourStatistics(), progress=lambda d, t: seen.append(d))
    assert seen[0] == 4
    np.testing.assert_array_equal(resumed.mean, whole.mean)
    np.testing.assert_array_equal(resumed.covariance, whole.covariance)
    assert not (tmp_path / "cut.npz.part.npz").exists()


def test_what_was_begun_otherwise_is_not_gone_on_with(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics._batches, "__defaults__", (2,))
    monkeypatch.setattr(statistics, "BATCH", 2)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        measure_folder(folder, tmp_path / "s.npz", ColourStatistics(), progress=stop)
    with pytest.raises(CheckpointError, match=r"s.npz.part.npz was begun with other images, bands or weights"):
        measure_folder(folder, tmp_path / "s.npz", ColourStatistics(), bands=[3, 2, 1])


def test_a_large_image_is_averaged_down(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "LARGE_PX", 64)
    pixels = np.random.default_rng(0).integers(0, 255, size=(3, 100, 131)).astype(np.uint8)
    write_image(tmp_path / "large.png", pixels)
    found = read_small(tmp_path / "large.png").numpy()
    expected = pixels[:, :100, :130].reshape(3, 20, 5, 26, 5).mean((2, 4)) / 255
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_other_depths_need_a_range_and_a_grey_image_is_seen_as_grey(tmp_path):
    import rasterio

    with rasterio.open(tmp_path / "deep.tif", "w", driver="GTiff", height=8, width=8, count=1, dtype="uint16") as dst:
        dst.write(np.full((1, 8, 8), 1500, np.uint16))
    with pytest.raises(DataError, match=r"deep.tif: pixels are uint16; say with --value_range"):
        read_small(tmp_path / "deep.tif")
    assert torch.equal(read_small(tmp_path / "deep.tif", value_range=(0, 3000)), torch.full((3, 8, 8), 0.5))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bands": [1, 2]}, ConfigError, "--bands=1,2 are 2"),
        ({"pattern": "*.tif"}, DataError, "no image matches"),
        ({"limit": 1}, DataError, "need two images or more, there is 1"),
    ],
)
def test_bad_calls_are_one_line(folder, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        measure_folder(folder, tmp_path / "s.npz", ColourStatistics(), **change)


def test_networks_are_measured_too(folder, tmp_path):
    assert measure_folder(folder, tmp_path / "n.npz", StyleNetworks(), limit=3).dim == 100
