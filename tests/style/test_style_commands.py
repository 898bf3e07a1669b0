"""The two commands: statistics of a folder, and a picture of what they do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cegate.cli import FAILED, GOOD, USAGE
from cegate.data.__main__ import main
from cegate.data.rasters import read_image, write_image
from cegate.masks import BlockMask
from cegate.style.networks import ColourStatistics
from cegate.style.preview import GAP_PX, TITLE_PX, preview
from cegate.style.statistics import StyleStatistics, load_statistics


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(5):
        pixels = rng.integers(number * 20, 140 + number * 20, (3, 40, 48)).astype(np.uint8)
        write_image(tmp_path / "images" / f"{number}.png", pixels)
    return tmp_path


def test_statistics_then_a_picture(folder, capsys):
    stats, picture = folder / "styles.npz", folder / "picture.png"
    assert main(["style-stats", str(folder / "images"), "--out", str(stats), "--limit", "4"]) == GOOD
    assert "embeddings of 6 numbers" in capsys.readouterr().out
    assert load_statistics(stats).dim == 6
    command = ["style-preview", str(folder / "images" / "1.png"), "--statistics", str(stats), "--out", str(picture)]
    assert (
        main([*command, "--rows", "2", "--alpha", "0.8", "--style_block", "8", "--block", "8", "--crop", "32"]) == GOOD
    )
    assert read_image(picture).shape == (3, 2 * (32 + GAP_PX) - GAP_PX + TITLE_PX, 4 * (32 + GAP_PX) - GAP_PX)


@pytest.mark.parametrize("region", ["masked", "kept"])
def test_the_picture_shows_image_style_blocks_and_mask(region):
    image = torch.rand(3, 32, 32) * 0.5
    image[:, 20:] = 0  # a black border is picture
    statistics = StyleStatistics(np.array([0.9, 0.1, 0.5, 0.05, 0.05, 0.05]), np.eye(6) * 1e-6)
    options = {"rows": 1, "crop": 32, "alpha": 1.0, "style_ratio": 0.5, "style_block": 8, "ratio": 0.5, "block": 8}
    sheet = preview(image, ColourStatistics(), statistics, region=region, **options)
    shown, styled, blocks, masked = (
        sheet[:, TITLE_PX:, column * (32 + GAP_PX) : column * (32 + GAP_PX) + 32].astype(int) for column in range(4)
    )
    expected = (image * 255).round().int().numpy()
    np.testing.assert_allclose(shown, expected, atol=1)
    assert abs(styled[0].mean() - 0.9 * 255) < 4 and abs(styled[1].mean() - 0.1 * 255) < 4
    kept = BlockMask(0.5, 8, section="style").draw((32, 32), 0, 0, [0])[0, 0].numpy()
    untouched = kept if region == "masked" else ~kept
    assert (blocks == np.where(untouched, shown, styled)).all()
    hidden = ~BlockMask(0.5, 8).draw((32, 32), 0, 0, [0])[0, 0].numpy()
    assert (masked[:, ~hidden] == shown[:, ~hidden]).all()
    assert (masked[:, hidden] == 128).all()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--out", "x.jpg"], FAILED, "a preview is a PNG"),
        (["--alpha", "2"], USAGE, "style.alpha=2.0 is no share"),
        (["--alpha", "much"], USAGE, "--alpha=much is not accepted"),
        (["--region", "mask"], USAGE, "use masked or kept; did you mean 'masked'?"),
        (["--ratio", "7"], USAGE, "mim.ratio=7.0 is no share of blocks"),
        (["--rows", "10000000"], USAGE, "--rows=10000000 is not accepted; expected a number of 1 or more, up to 64"),
        (["--alpha", "inf"], USAGE, "--alpha=inf is not accepted"),
        (["--block", "600"], USAGE, "mim.block=600 is larger than the crop"),
        (["--bands", "1,2,x"], USAGE, "--bands=1,2,x is not accepted"),
        (["--value_range", "5,5"], USAGE, "expected LOW,HIGH"),
        (["--statistics", "nowhere.npz"], FAILED, "style.statistics: nowhere.npz cannot be read"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, change, code, message):
    StyleStatistics(np.zeros(6), np.eye(6)).save(folder / "s.npz")
    options = {"--out": str(folder / "p.png"), "--statistics": str(folder / "s.npz")} | dict([change])
    command = ["style-preview", str(folder / "images" / "1.png"), *(part for pair in options.items() for part in pair)]
    assert main(command) == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_statistics_are_of_images_that_have_pixels_and_go_into_files_of_their_kind(capsys, folder, tmp_path):
    assert main(["style-stats", str(folder), "--out", str(tmp_path / "s.txt")]) == USAGE
    assert "statistics are not written as .txt; give an .npz file, or a folder" in capsys.readouterr().err
    (tmp_path / "nan").mkdir()
    write_image(tmp_path / "nan/0.tif", np.full((3, 8, 8), np.nan, np.float32))
    command = ["style-stats", str(tmp_path / "nan"), "--out", str(tmp_path / "s.npz"), "--value_range", "0,1"]
    assert main(command) == FAILED
    assert "0.tif: no finite pixel, so it has no style" in capsys.readouterr().err


def test_unknown_actions_and_missing_arguments(capsys, folder):
    assert main(["style-stat"]) == USAGE
    assert "did you mean 'style-stats'?" in capsys.readouterr().err
    assert main(["style-stats"]) == USAGE
    assert main(["style-stats", str(folder)]) == USAGE
    assert main(["style-stats", str(folder / "none"), "--out", str(folder / "s.npz")]) == FAILED
