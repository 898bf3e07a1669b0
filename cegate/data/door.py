"""The one way in for raster files: which formats are opened, and what a file may make GDAL reach for.

GDAL tells a format by a file's content, whatever its name: ``net.png`` may be a VRT that sends requests or reads other
folders. So only plain raster formats are opened; a VRT, which is a recipe, only if it is a mosaic or a stack of plain
files that lie beside or below it. `DRIVERS_VARIABLE` names further drivers for those who trust their files; with VRT
among them, a VRT may reach for anything.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import rasterio
from rasterio._err import CPLE_BaseError  # what GDAL said, where rasterio passes it on as it is
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader

from cegate.errors import DataError, nearest, shown

DRIVERS: tuple[str, ...] = (
    *("GTiff", "PNG", "JPEG", "BMP", "WEBP", "ENVI", "HFA"),
    *("JP2OpenJPEG", "JPEG2000", "JP2KAK", "JP2ECW", "JP2MrSID"),  # JPEG 2000, by whichever GDAL was built with
)
"""GDAL drivers whose files are pixels and nothing else."""
DRIVERS_VARIABLE = "CEGATE_GDAL_DRIVERS"
"""Environment variable: further GDAL drivers, with commas between, as in ``netCDF,VRT``."""
IN_ARCHIVE = "/vsizip/"
"""GDAL's spelling of a file in a zip."""
_OPTIONS = {
    # by default GDAL fills what is missing of a truncated JPEG with grey and of a truncated PNG with zeros, in silence
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": False,
    # nothing below /vsicurl/ and its kin has this name
    "CPL_VSIL_CURL_ALLOWED_FILENAME": "nothing",
}
# of a mosaic or a stack; what may stand in it without being looked into
_VRT_PLAIN = frozenset(
    (
        *("VRTDataset", "VRTRasterBand", "MaskBand", "OverviewList", "BlockXSize", "BlockYSize", "GeoTransform"),
        *("SimpleSource", "ComplexSource", "AveragedSource", "SourceFilename", "SourceBand", "SourceProperties"),
        *("SrcRect", "DstRect", "NODATA", "UseMaskBand", "ColorTableComponent", "LUT", "Exponent"),
        *("ScaleOffset", "ScaleRatio", "SrcMin", "SrcMax", "DstMin", "DstMax", "Clamp"),
        *("ColorInterp", "NoDataValue", "HideNoDataValue", "UnitType", "Offset", "Scale", "Description"),
    )
)
_VRT_INERT = frozenset(("SRS", "GCPList", "Metadata", "CategoryNames", "ColorTable", "Histograms"))
_VRT_DEPTH = 8  # of a VRT in a VRT


@contextmanager
def open_raster(path: str | Path) -> Iterator[rasterio.DatasetReader]:
    """Open a raster file for reading; a missing georeference is no news.

    Args:
        path: a file, or one in a zip (``/vsizip/``).

    Raises:
        DataError: the file is missing, damaged, of a format that is not opened, or reaches for what it should not; also
            inside the block, where a part cannot be read.
    """
    path = Path(path)
    if os.fsencode(path).decode("utf-8", "replace") != str(path):
        raise DataError(f"{str(path)!a}: a name that is no UTF-8, which GDAL does not open; rename the file")
    if len(os.fsencode(path.name)) > 255:  # which no file system has; asked for, it is no answer but an error
        raise DataError(f"{shown(path.name)}: no such file")
    with _refusals_named(path):
        if not path.is_file() and not path.as_posix().startswith(IN_ARCHIVE):
            if path.is_symlink():
                raise DataError(f"{path}: a link to {path.readlink()}, which is not there; mend or remove the link")
            raise DataError(f"{path}: no such file")
    try:
        with rasterio.Env(**_OPTIONS), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with _refusals_named(path):
                drivers = _drivers_for(path)
            # rasterio.open takes one driver, its reader takes many
            with DatasetReader(str(path), driver=drivers) as src:
                _refuse_far_overviews(path, src)
                if src.count == 0:
                    parts = [name.rpartition("/")[2] for name in src.subdatasets]
                    inside = f"{len(parts)} rasters, the first is {parts[0]}" if parts else "no band"
                    raise DataError(f"{path}: a container with {inside}; write one raster a file (gdal_translate)")
                if any(dtype.startswith("complex") for dtype in src.dtypes):
                    raise DataError(
                        f"{path}: pixels are {src.dtypes[0]}, which has no order; write amplitude, intensity or dB as "
                        "real numbers, and phase as a band of its own if it counts"
                    )
                yield src
    except (RasterioError, CPLE_BaseError) as error:
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise DataError(
            f"{path}: cannot be read as a raster ({reason}); use an intact PNG, JPEG, TIFF or GeoTIFF, or name the "
            f"GDAL driver of another format in {DRIVERS_VARIABLE}"
        ) from error


@contextmanager
def _refusals_named(path: Path) -> Iterator[None]:
    """The system's refusal of a file, before GDAL sees it, is that file's failure; what fails elsewhere is not."""
    try:
        yield
    except OSError as error:
        if isinstance(error, RasterioError):
            raise
        raise DataError(f"{path} cannot be read ({error.strerror}); see that it can be read") from error


def _drivers_for(path: Path) -> list[str]:
    """Drivers that may open a file, once it and what lies beside it are known to keep to their folder."""
    further = _further_drivers()
    for suffix in (".ovr", ".OVR", ".msk", ".MSK"):  # which GDAL opens by any driver
        if (side := path.with_name(path.name + suffix)).is_file():
            _check_plain(side)
    if "VRT" not in further and _is_vrt(path):
        _check_vrt(path, _VRT_DEPTH)
        return ["VRT"]
    return [*DRIVERS, *further]


def _further_drivers() -> tuple[str, ...]:
    """What the environment variable names.

    Raises:
        DataError: GDAL has no driver of that name.
    """
    named = [name.strip() for name in os.environ.get(DRIVERS_VARIABLE, "").split(",") if name.strip()]
    if not named:
        return ()
    with rasterio.Env() as env:
        known = {name.upper(): name for name in env.drivers()}
    for name in named:
        if name.upper() not in known:
            raise DataError(
                f"{DRIVERS_VARIABLE}={name}: this GDAL has no such raster driver{nearest(name, known.values())}; "
                "names are those that gdalinfo --formats lists"
            )
    return tuple(known[name.upper()] for name in named)


def _check_plain(path: Path) -> None:
    """Refuse a file that is not opened by itself either."""
    with DatasetReader(str(path), driver=_drivers_for(path)) as src:
        _refuse_far_overviews(path, src)


def _is_vrt(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"<VRTDataset" in file.read(4096)


def _check_vrt(path: Path, depth: int) -> None:
    """Refuse a VRT that is anything but plain files of its folder, or those below it, side by side.

    Raises:
        DataError: it is not.
    """
    for element in _vrt_elements(path):
        kind = element.get("subClass", "VRTSourcedRasterBand")
        if element.tag not in _VRT_PLAIN or kind != "VRTSourcedRasterBand":
            what = element.tag if element.tag not in _VRT_PLAIN else kind
            raise DataError(_refusal(path, f"{what} is more than files side by side"))
        if element.tag != "SourceFilename":
            continue
        name = (element.text or "").strip()
        source = path.parent / name if element.get("relativeToVRT") == "1" else Path(name)
        if os.path.relpath(source, path.parent).startswith("..") or not source.is_file():
            raise DataError(_refusal(path, f"its source {name!r} is no file beside or below it"))
        if not _is_vrt(source):
            _check_plain(source)
        elif depth:
            _check_vrt(source, depth - 1)
        else:
            raise DataError(_refusal(path, "VRTs in VRTs do not end"))


def _vrt_elements(path: Path) -> Iterator[ElementTree.Element]:
    text = path.read_bytes()
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise DataError(_refusal(path, "it declares entities"))
    try:
        todo = [ElementTree.fromstring(text)]
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: cannot be read as a raster (VRT: {error}); write it anew") from error
    while todo:
        element = todo.pop()
        if element.tag not in _VRT_INERT:
            yield element
            todo += element


def _refusal(path: Path, why: str) -> str:
    return (
        f"{path} is a VRT and not opened: {why}; write it as a GeoTIFF (gdal_translate), or set {DRIVERS_VARIABLE}=VRT "
        "if you trust all your files"
    )


def _refuse_far_overviews(path: Path, src: rasterio.DatasetReader) -> None:
    """A file, or its .aux.xml, may say that its overviews lie elsewhere; GDAL opens them by any driver."""
    told = src.tags(ns="OVERVIEWS").get("OVERVIEW_FILE")
    if told is not None and not re.fullmatch(r"(:::BASE:::)?[^/\\:]+", told):
        raise DataError(f"{path} names {told!r} as its overviews, which is no file beside it; remove that tag")
