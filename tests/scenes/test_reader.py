from __future__ import annotations

import io

import numpy as np
import pytest
import rasterio
import torch

from cegate.data.transforms import normalise
from cegate.errors import DataError
from cegate.recipe import Recipe
from cegate.scenes import reader
from cegate.scenes.reader import open_reader

LEARNED = Recipe(("a", "b"), ("#000000", "#FFFFFF"), (3, 1), (0.4, 0.6), (0.2, 0.3), crop=32)


def strips(image, learned=LEARNED, **options):
    """An image read in strips of 7 rows: pixels [C, H, W], and empty [H, W] or None."""
    with open_reader(image, learned, **options) as opened:
        height = opened.size[0]
        read = [opened.read(first, min(first + 7, height)) for first in range(0, height, 7)]
    empty = None if read[0].empty is None else np.concatenate([strip.empty for strip in read])
    return torch.cat([strip.pixels for strip in read], 1), empty


def test_rows_are_the_bands_that_were_learned_from_normalised(write_scene):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 30, 20), dtype=np.uint8)
    found, empty = strips(write_scene("a.tif", pixels))
    expected = normalise(pixels[[2, 0]].astype(np.float32) / 255, LEARNED.mean, LEARNED.std)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32 and empty is None
    assert torch.equal(found, strips(pixels[[2, 0]])[0]), "an array holds the model's bands already"


def test_each_strip_says_where_it_is_empty(write_scene):
    pixels = np.random.default_rng(0).integers(1, 256, (3, 30, 20), dtype=np.uint8)
    pixels[:, 5:12, 3:9] = 0
    file = write_scene("a.tif", pixels, nodata=0)
    _, empty = strips(file)
    np.testing.assert_array_equal(empty, (pixels == 0).all(0))
    assert strips(file, all_pixels=True)[1] is None
    floats = np.random.default_rng(0).uniform(300, 900, (3, 30, 20)).astype(np.float32)
    floats[2, 9, 4], floats[0, 29, 19] = np.nan, np.inf
    learned = Recipe(("a", "b"), ("#000000", "#FFFFFF"), (3, 1), (0.4, 0.6), (0.2, 0.3), [[300, 900]] * 2, crop=32)
    found, empty = strips(write_scene("b.tif", floats), learned)
    np.testing.assert_array_equal(empty, ~np.isfinite(floats[[2, 0]]).all(0))
    assert torch.isfinite(found).all()


VRT = """<VRTDataset rasterXSize="20" rasterYSize="30">{}</VRTDataset>"""
BAND = """<VRTRasterBand dataType="{}" band="{}"><SimpleSource><SourceFilename relativeToVRT="1">a.tif</SourceFilename>
<SourceBand>{}</SourceBand></SimpleSource></VRTRasterBand>"""


def test_bands_of_different_types_are_refused_in_a_line(write_scene, tmp_path):
    write_scene("a.tif", np.full((3, 30, 20), 9, np.uint8))
    kinds = ("Byte", "Float32", "UInt16")
    (tmp_path / "a.vrt").write_text(VRT.format("".join(BAND.format(kind, b, b) for b, kind in enumerate(kinds, 1))))
    with pytest.raises(DataError, match=r"a\.vrt: bands are stored in different types: 3 is uint16, 1 is uint8; give"):
        strips(tmp_path / "a.vrt")
    kinds = ("UInt16", "Float32", "UInt16")
    (tmp_path / "a.vrt").write_text(VRT.format("".join(BAND.format(kind, b, b) for b, kind in enumerate(kinds, 1))))
    learned = Recipe(("a", "b"), ("#000000", "#FFFFFF"), (3, 1), (0.4, 0.6), (0.2, 0.3), [[0, 1000]] * 2, crop=32)
    assert strips(tmp_path / "a.vrt", learned)[0].shape == (2, 30, 20), "the other band is not read"


def test_a_tiff_of_nothing_but_promises_is_refused(tmp_path):
    profile = {"height": 1_000_000, "width": 1_000_000, "count": 3, "dtype": "uint8", "sparse_ok": True}
    with rasterio.open(tmp_path / "hollow.tif", "w", driver="GTiff", tiled=True, bigtiff="yes", **profile):
        pass
    with pytest.raises(
        DataError, match=r"hollow\.tif is 1000000x1000000 pixels by its header, 3 TB, but the file holds"
    ):
        strips(tmp_path / "hollow.tif")


FLOATS = Recipe(("a", "b"), ("#000000", "#FFFFFF"), (3, 1), (0.4, 0.6), (0.2, 0.3), [[0, 100]] * 2, crop=32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32], ids=str)
def test_tensors_are_read_as_arrays_are(dtype):
    tensor = torch.arange(60).reshape(2, 5, 6).to(dtype)
    if tensor.is_floating_point():
        tensor.requires_grad_(True)
    np.testing.assert_array_equal(strips(tensor, FLOATS)[0], strips(tensor.detach().double().numpy(), FLOATS)[0])


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (io.BytesIO(b"PNG"), "of type BytesIO"),
        (b"PNG", "of type bytes"),
        (5, "of type int"),
        (np.full((2, 5, 6), "x"), "an array of <U1"),
        (np.zeros((2, 5, 6), complex), "an array of complex128"),
        (np.zeros((2, 5, 6), object), "an array of object"),
        ([[1], [1, 2]], "of type list and becomes no array"),
        (torch.zeros(2, 5, 6).to_sparse(), "of type Tensor and becomes no array"),
        (torch.zeros(2, 5, 6, device="meta"), "of type Tensor and becomes no array"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_image_is_said_in_a_line(image, what):
    with pytest.raises(DataError) as error:
        strips(image)
    assert str(error.value).startswith(f"image is {what}") and "PIL.Image.open" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_that_no_file_can_have_is_no_file():
    for name in ("x" * 5000, "a\0b.png", ""):
        with pytest.raises(DataError, match=r"(no such file|neither|is a folder|cannot be read)"):
            strips(name)


def test_an_image_too_wide_for_the_memory_is_refused(write_scene, monkeypatch):
    file = write_scene("wide.tif", np.zeros((3, 4, 900), np.uint8))
    needed = 900 * 32 * (2 * (1 + 4) + 2 * 2 * 4)
    monkeypatch.setattr(reader, "_free_memory", lambda: needed)
    assert strips(file)[0].shape == (2, 4, 900)
    monkeypatch.setattr(reader, "_free_memory", lambda: needed - 1)
    with pytest.raises(DataError, match=r"wide\.tif is 900x4 pixels: a row of windows takes 749 kB, and 749 kB of mem"):
        strips(file)
    monkeypatch.undo()
    assert 1 << 20 < reader._free_memory() < 1 << 50
