"""Raster files that reach for more than themselves are not opened, whatever they are called."""

from __future__ import annotations

import ast
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import rasterio
from scipy.io import netcdf_file

import cegate
from cegate.data import door
from cegate.data.door import open_raster
from cegate.data.rasters import open_image, read_image
from cegate.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore")


def write(path: Path, bands: int = 3, **profile) -> Path:
    shape = {"count": bands, "height": 64, "width": 64, "dtype": "uint8"} | profile
    with rasterio.open(path, "w", **({"driver": "GTiff"} | shape)) as dst:
        dst.write(np.ones((shape["count"], 64, 64), shape["dtype"]))
    return path


def vrt(source: str, relative: int = 1, band: str = "") -> str:
    return (
        f'<VRTDataset rasterXSize="64" rasterYSize="64"><VRTRasterBand dataType="Byte" band="1"{band}><SimpleSource>'
        f'<SourceFilename relativeToVRT="{relative}">{source}</SourceFilename><SourceBand>1</SourceBand>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )


def wms(address: str) -> str:
    return (
        f'<GDAL_WMS><Service name="TMS"><ServerUrl>{address}/${{z}}/${{x}}/${{y}}.png</ServerUrl></Service><DataWindow>'
        "<UpperLeftX>0</UpperLeftX><UpperLeftY>1</UpperLeftY><LowerRightX>1</LowerRightX><LowerRightY>0</LowerRightY>"
        "<TileLevel>1</TileLevel><TileCountX>1</TileCountX><TileCountY>1</TileCountY></DataWindow>"
        "<BlockSizeX>256</BlockSizeX><BlockSizeY>256</BlockSizeY><BandsCount>3</BandsCount></GDAL_WMS>"
    )


@pytest.fixture(scope="module")
def server():
    """Address of a server that counts what is asked of it, and the count."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def overviews_elsewhere(path: Path, address: str) -> None:
    with rasterio.open(write(path), "r+") as dst:
        dst.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=f"/vsicurl/{address}/a.tif")


def sidecar_overviews(path: Path, address: str) -> None:
    text = f'<MDI key="OVERVIEW_FILE">/vsicurl/{address}/b.tif</MDI>'
    write(path).with_name(path.name + ".aux.xml").write_text(
        f'<PAMDataset><Metadata domain="OVERVIEWS">{text}</Metadata></PAMDataset>'
    )


REACHING = {
    "net.png": lambda path, address: path.write_text(vrt(f"/vsicurl/{address}/x.tif", 0)),
    "wms.jpg": lambda path, address: path.write_text(wms(address)),
    "nested.tif": lambda path, address: (
        path.with_name("inner.png").write_text(wms(address)),
        path.write_text(vrt("inner.png")),
    ),
    "warped.vrt": lambda path, address: path.write_text(
        '<VRTDataset rasterXSize="64" rasterYSize="64" subClass="VRTWarpedDataset"><GDALWarpOptions><SourceDataset>'
        f"/vsicurl/{address}/y.tif</SourceDataset></GDALWarpOptions></VRTDataset>"
    ),
    "masked.tif": lambda path, address: (write(path), path.with_name("masked.tif.msk").write_text(wms(address))),
    "small.tif": lambda path, address: (
        write(path),
        path.with_name("small.tif.ovr").write_text(vrt(f"/vsicurl/{address}/z.tif", 0)),
    ),
    "tagged.tif": overviews_elsewhere,
    "beside.tif": sidecar_overviews,
}


def read_all(path: Path) -> None:
    with open_image(path) as image:
        image.read()
        image.without_data()


@pytest.mark.parametrize("name", REACHING)
def test_a_file_that_reaches_for_the_network_is_refused_before_it_does(tmp_path, server, name):
    address, asked = server
    REACHING[name](tmp_path / name, address)
    asked.clear()
    with pytest.raises(DataError, match=str(tmp_path)) as caught:
        read_all(tmp_path / name)
    assert asked == []
    assert "\n" not in str(caught.value)


RAW = ' subClass="VRTRawRasterBand"'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (vrt("../secret.tif"), r"its source '\.\./secret\.tif' is no file beside or below it"),
        (vrt("in/../../secret.tif"), "is no file beside"),
        (vrt("/etc/hostname", 0), "is no file beside"),
        (vrt("x.tif", band=RAW), "VRTRawRasterBand is more than files side by side"),
        (vrt("loop.vrt"), "VRTs in VRTs do not end"),
        ("<!DOCTYPE a><VRTDataset/>", "it declares entities"),
        ("<VRTDataset", "unclosed token"),
    ],
)
def test_a_vrt_keeps_to_plain_files_of_its_folder(tmp_path, text, why):
    home = tmp_path / "home"
    (home / "in").mkdir(parents=True)
    write(tmp_path / "secret.tif"), write(home / "x.tif")
    (home / "loop.vrt").write_text(text)
    with pytest.raises(DataError, match=why):
        read_image(home / "loop.vrt")


def test_a_mosaic_of_the_folder_is_opened(tmp_path, monkeypatch):
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts/a.tif")
    (tmp_path / "b.vrt").write_text(vrt("parts/a.tif"))
    (tmp_path / "c.vrt").write_text(vrt("b.vrt"))
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "c.vrt", "c.vrt"):
        assert (read_image(name) == 1).all()
    (tmp_path / "d.vrt").write_text(vrt("parts/a.tif", 0))  # relative to where one is
    assert (read_image("d.vrt") == 1).all()


def test_other_formats_are_opened_for_those_who_name_them(tmp_path, monkeypatch):
    write(tmp_path / "a.gif", bands=1, driver="GIF")
    with pytest.raises(DataError, match=r"a\.gif: cannot be read .*GDAL driver of another format in CEGATE_GDAL_DRIV"):
        read_image(tmp_path / "a.gif")
    monkeypatch.setenv(door.DRIVERS_VARIABLE, "gif, VRT")
    assert (read_image(tmp_path / "a.gif") == 1).all()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/up.vrt").write_text(vrt("../a.gif"))
    assert (read_image(tmp_path / "deep/up.vrt") == 1).all()
    monkeypatch.setenv(door.DRIVERS_VARIABLE, "GIFF")
    with pytest.raises(DataError, match="CEGATE_GDAL_DRIVERS=GIFF: this GDAL has no such raster driver; did you mean"):
        read_image(tmp_path / "a.gif")


def test_what_people_have_is_opened(tmp_path):
    for name, driver in {"a.tif": "GTiff", "a.png": "PNG", "a.jpg": "JPEG", "a.bmp": "BMP", "a.img": "HFA"}.items():
        assert read_image(write(tmp_path / name, driver=driver)).shape == (3, 64, 64)
    assert read_image(write(tmp_path / "raw.dat", driver="ENVI")).shape == (3, 64, 64)
    for name, driver, quality in (("a.webp", "WEBP", {"LOSSLESS": True}), ("a.jp2", "JP2OpenJPEG", {})):
        assert read_image(write(tmp_path / name, driver=driver, **quality)).shape == (3, 64, 64)


def test_a_container_of_rasters_is_refused_in_a_line(tmp_path, monkeypatch):
    path = tmp_path / "a.nc"
    with netcdf_file(path, "w") as file:
        file.createDimension("y", 8), file.createDimension("x", 8)
        for name in ("height", "slope"):
            file.createVariable(name, "f4", ("y", "x"))[:] = np.ones((8, 8))
    monkeypatch.setenv(door.DRIVERS_VARIABLE, "netCDF")
    with pytest.raises(DataError, match=r"a\.nc: a container with 2 rasters, the first is .*write one raster a file"):
        read_image(path)


def test_complex_radar_is_refused_in_a_line(tmp_path):
    path = write(tmp_path / "slc.tif", bands=1, dtype="complex64")
    with pytest.raises(DataError, match=r"slc\.tif: pixels are complex64.*write amplitude, intensity or dB"):
        read_image(path)


def test_a_name_that_is_no_text_is_refused_in_a_line(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.tif")
    shutil.copy(write(tmp_path / "a.tif"), path)
    with pytest.raises(DataError, match=r"udcff\.tif': a name that is no UTF-8, which GDAL does not open; rename"):
        read_image(path)


def test_a_link_to_nothing_says_so(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"a\.png: a link to .*gone\.png, which is not there"):
        read_image(tmp_path / "a.png")


def test_every_raster_file_is_opened_by_the_one_door():
    def opens(path: Path) -> set[str]:
        """What opens files of images in a module, but to write."""
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        readers = {
            ast.unparse(call.func)
            for call in calls
            if not any(isinstance(value, ast.Constant) and value.value == "w" for value in call.args)
        }
        return readers & {"DatasetReader", "rasterio.open", "gdal.Open", "Image.open", "plt.imread", "imread"}

    root = Path(cegate.__file__).parent
    opened = {path.name: found for path in root.rglob("*.py") if (found := opens(path))}
    assert opened == {"door.py": {"DatasetReader"}}


def test_a_coordinate_system_that_cannot_be_told_is_a_line(shared):
    (path,) = (shared / "data/odd_geotiffs").rglob("unsupported-srs.tif")
    with pytest.raises(DataError, match=r"unsupported-srs\.tif: cannot be read as a raster \(PROJ: .* natural"):
        read_image(path)


def test_real_odd_files_open_as_before(shared):
    refused = []
    for path in sorted((shared / "data/odd_geotiffs").rglob("*")):
        if path.suffix.lower() in (".tif", ".tiff", ".jp2", ".img", ".png", ".vrt"):
            with rasterio.open(path) as src:
                assert src.count > 0
            try:
                with open_raster(path) as src:
                    assert src.count > 0
            except DataError as error:
                refused.append((path.name, str(error)))
    why = dict(refused)
    assert all("is no file beside" in text or "complex" in text for text in why.values()), why
    assert all(name.endswith(".vrt") for name in why), why
