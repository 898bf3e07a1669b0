"""How styles are spread over a collection of images: mean and covariance of their embeddings, measured once, offline
(CrossEarth, Eq. 1-2), and the drawing of a new style from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cegate.data.rasters import SUFFIXES, OpenImage, Window, open_image
from cegate.data.scale import EIGHT_BIT, to_unit
from cegate.errors import CheckpointError, ConfigError, DataError
from cegate.runfolder import written_aside
from cegate.style.networks import STATISTICS_FILE, StyleModel

Covariance = Literal["full", "diag"]

SIDE_PX = 256
"""Images are resized to it before they are embedded."""
BATCH = 16
"""Images embedded together; part of the result's last digits, so no option."""
SAVE_EVERY = 64
"""Batches after which a long measurement is saved."""
LARGE_PX = 4096
"""An image with a longer side is read in strips and averaged down first."""
NAMES = (("mean", "covariance"), ("pbn_embedding_mean", "pbn_embedding_covariance"))
"""Names of the two arrays in a file: ours, and those of the public Painter-by-Numbers statistics."""


@dataclass(frozen=True)
class StyleStatistics:
    """A normal distribution of style embeddings."""

    mean: np.ndarray
    """[d] float64."""
    covariance: np.ndarray
    """[d, d] float64, unbiased."""
    source: str = "the statistics"
    """Where they come from, for messages."""

    @property
    def dim(self) -> int:
        """Length d of an embedding."""
        return len(self.mean)

    def check(self, style: StyleModel) -> None:
        """Whether they are of the embeddings of a style model.

        Raises:
            CheckpointError: another dimension; both are named.
        """
        if self.dim != style.dim:
            raise CheckpointError(
                f"style.statistics: {self.source} is of embeddings of {self.dim} numbers, but {style.about} has "
                f"{style.dim}; measure it anew with `cegate data style-stats`"
                f"{' without' if style.dim == 6 else ' with'} --weights"
            )

    def factor(self, kind: Covariance = "full") -> np.ndarray:
        """[d, d] such that ``mean + factor @ z`` with standard normal z has the wanted spread.

        ``full``: the covariance itself. Of its many factors this is the symmetric one, in which no choice of signs
        enters that another machine's library would make differently. ``diag``: Eq. 2 taken literally, independent
        numbers whose variances are the covariance's singular values, largest first.
        """
        vectors, values, _ = np.linalg.svd(self.covariance, hermitian=True)
        root = np.sqrt(values)
        return np.diag(root) if kind == "diag" else (vectors * root) @ vectors.T

    def save(self, path: Path) -> None:
        """Write an .npz file, or mean.npy and covariance.npy into a folder."""
        if path.suffix == ".npz":
            with written_aside(path) as aside:
                np.savez(aside, mean=self.mean, covariance=self.covariance)
            return
        for name in ("mean", "covariance"):
            with written_aside(path / f"{name}.npy") as aside:
                np.save(aside, getattr(self, name))


def load_statistics(path: str | Path) -> StyleStatistics:
    """Read statistics.

    Args:
        path: an .npz file, a folder with mean.npy and covariance.npy (or either of the two files), or the public
            ``checkpoint_embeddings.pth``, of which those of Painter-by-Numbers are taken.

    Raises:
        CheckpointError: missing, unreadable, or not mean [d] and covariance [d, d], finite and positive.
    """
    path = Path(path).expanduser()
    try:
        mean, covariance = _read_arrays(path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"style.statistics: {path} cannot be read ({error}); give an .npz file with mean and covariance, a folder "
            f"with mean.npy and covariance.npy, or {STATISTICS_FILE}"
        ) from error
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise CheckpointError(
            f"style.statistics: {path} holds a mean {list(mean.shape)} and a covariance {list(covariance.shape)}; "
            "expected [d] and [d, d]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise CheckpointError(f"style.statistics: {path} holds numbers that are not finite; measure it anew")
    return StyleStatistics(mean, (covariance + covariance.T) / 2, str(path))


def _read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if path.is_dir() or path.suffix == ".npy":
        folder = path if path.is_dir() else path.parent
        return tuple(np.load(folder / f"{name}.npy", allow_pickle=False) for name in NAMES[0])
    if path.suffix == ".pth":
        if not path.is_file():
            raise FileNotFoundError("no such file")
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever its zip or pickle reader raises
            raise ValueError(f"{type(error).__name__}: no file of tensors by name") from error
        arrays = {name: np.asarray(value) for name, value in held.items()}
    else:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    pair = next((pair for pair in NAMES if set(pair) <= set(arrays)), None)
    if pair is None:
        raise ValueError(f"it holds {', '.join(arrays) or 'nothing'}")
    return arrays[pair[0]], arrays[pair[1]]


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of vectors that come batch by batch; float64, in the order given."""

    count: int
    mean: np.ndarray
    """[d]"""
    scatter: np.ndarray
    """[d, d] sum of outer products about the mean."""

    @classmethod
    def none(cls, dim: int) -> Moments:
        """Of no vector at all."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def with_more(self, vectors: np.ndarray) -> Moments:
        """With vectors [n, d] taken in (Chan, Golub and LeVeque's pairwise update)."""
        n, mean = len(vectors), vectors.mean(0)
        away, total, centred = mean - self.mean, self.count + n, vectors - mean
        scatter = self.scatter + centred.T @ centred + np.outer(away, away) * (self.count * n / total)
        return Moments(total, self.mean + away * (n / total), scatter)

    def statistics(self, source: str) -> StyleStatistics:
        """Mean and unbiased covariance.

        Raises:
            DataError: fewer than two vectors.
        """
        if self.count < 2:
            raise DataError(f"{source}: style statistics need two images or more, there is {self.count}")
        return StyleStatistics(self.mean, self.scatter / (self.count - 1), source)


def measure(style: StyleModel, images: Iterable[Tensor], source: str) -> StyleStatistics:
    """Statistics of images [3, H, W] in 0..1 of any size; nothing is written.

    Raises:
        DataError: fewer than two images.
    """
    moments = Moments.none(style.dim)
    for batch in _batches(images):
        moments = moments.with_more(embed(style, batch))
    return moments.statistics(source)


def embed(style: StyleModel, images: Sequence[Tensor]) -> np.ndarray:
    """Embeddings [n, d] float64 of images [3, H, W] in 0..1, each resized to 256 x 256."""
    device = next(style.parameters(), torch.empty(0)).device
    resized = [
        F.interpolate(image[None], size=(SIDE_PX, SIDE_PX), mode="bilinear", align_corners=False, antialias=True)
        for image in images
    ]
    return style.embed(torch.cat(resized).to(device)).double().cpu().numpy()


def _batches(items: Iterable, size: int = BATCH) -> Iterator[list]:
    held: list = []
    for item in items:
        held.append(item)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


def list_images(folder: Path, pattern: str | None = None) -> list[Path]:
    """The images below a folder in a fixed order.

    Args:
        pattern: glob below the folder; default: every file that looks like a raster.

    Raises:
        DataError: there is none.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give a folder of images")
    found = sorted(folder.glob(pattern) if pattern else folder.rglob("*"))
    images = [path for path in found if path.is_file() and (pattern or path.suffix.lower() in SUFFIXES)]
    if not images:
        raise DataError(f"{folder}: no image matches {pattern or '*' + ', *'.join(SUFFIXES)}")
    return images


def measure_folder(
    folder: Path,
    out: Path,
    style: StyleModel,
    *,
    pattern: str | None = None,
    bands: Sequence[int] | None = None,
    value_range: tuple[float, float] | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> StyleStatistics:
    """Measure the styles of a folder of images and write them.

    A measurement that was cut off goes on where it was saved, and gives the same numbers to the last bit. What is saved
    lies beside ``out`` as ``<out>.part.npz`` until the end.

    Args:
        folder: searched with its subfolders.
        out: .npz file, or folder for mean.npy and covariance.npy; replaced if it is there.
        style: whose embeddings are measured.
        pattern: glob of the images below the folder; default: all rasters.
        bands: 1-based bands that are red, green and blue; default: the first three, or the only one three times.
        value_range: pixel values that become 0 and 1; default 0..255, for 8-bit images only.
        limit: at most so many images, evenly spread over the folder.
        progress: told how many of how many images are done.

    Raises:
        DataError: no images, an unreadable one, one of another depth or without the bands; it is named.
        CheckpointError: what is saved is of other images or settings.
    """
    if bands is not None and len(bands) != 3:
        raise ConfigError(
            f"--bands={','.join(map(str, bands))} are {len(bands)}; a style is of three: red, green, blue"
        )
    images = list_images(folder, pattern)
    if limit is not None and limit < len(images):
        images = [images[i * len(images) // limit] for i in range(limit)]
    part = out.with_name(f"{out.name}.part.npz")
    settings = repr((style.dim, style_hash(style), bands, value_range, SIDE_PX, BATCH))
    moments = _resume(part, images, folder, settings, style.dim)
    progress = progress or (lambda done, total: None)
    progress(moments.count, len(images))
    remaining = (read_small(path, bands, value_range) for path in images[moments.count :])
    try:
        for number, batch in enumerate(_batches(remaining), 1):
            moments = moments.with_more(embed(style, batch))
            progress(moments.count, len(images))
            if number % SAVE_EVERY == 0:
                _save(part, moments, images, folder, settings)
    except BaseException:  # an interrupt, too: what is done is kept
        _save(part, moments, images, folder, settings)
        raise
    statistics = moments.statistics(str(folder))
    statistics.save(out)
    part.unlink(missing_ok=True)
    return statistics


def style_hash(style: StyleModel) -> str:
    """sha256 over the weights of a style model."""
    digest = hashlib.sha256(type(style).__name__.encode())
    for name, value in sorted(style.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _fingerprint(images: Sequence[Path], folder: Path, settings: str) -> str:
    names = "\n".join(path.relative_to(folder).as_posix() for path in images)
    return hashlib.sha256(f"{settings}\n{names}".encode()).hexdigest()


def _save(part: Path, moments: Moments, images: Sequence[Path], folder: Path, settings: str) -> None:
    done = moments.count // BATCH * BATCH  # the rest of a last batch is only there when all is done
    if not done or done != moments.count:
        return
    # of the images done, not of all: a damaged one further on may be taken away
    mark = _fingerprint(images[:done], folder, settings)
    with written_aside(part) as aside:
        np.savez(aside, count=done, mean=moments.mean, scatter=moments.scatter, mark=mark)


def _resume(part: Path, images: Sequence[Path], folder: Path, settings: str, dim: int) -> Moments:
    if not part.is_file():
        return Moments.none(dim)
    try:
        with np.load(part, allow_pickle=False) as file:
            count, mean, scatter, mark = int(file["count"]), file["mean"], file["scatter"], str(file["mark"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{part} is damaged ({error}); remove it to measure from the beginning") from error
    if count > len(images) or mark != _fingerprint(images[:count], folder, settings):
        raise CheckpointError(
            f"{part} was begun with other images, bands or weights; repeat that call to go on with it, or remove it to "
            "measure from the beginning"
        )
    return Moments(count, mean, scatter)


def read_small(
    path: Path, bands: Sequence[int] | None = None, value_range: tuple[float, float] | None = None
) -> Tensor:
    """An image as RGB [3, H, W] float32 in 0..1; one with a side of more than 4096 px averaged down, strip by strip.

    Raises:
        DataError: unreadable, too few bands, no finite pixel, or another depth than 8 bit without a value range.
    """
    with open_image(path) as image:
        header = image.header
        if bands is None:
            bands = (1, 2, 3) if header.bands >= 3 else (1, 1, 1)
        if value_range is None and header.dtype != "uint8":
            raise DataError(
                f"{path}: pixels are {header.dtype}; say with --value_range LOW,HIGH what is black and what is white, "
                "e.g. 0,3000"
            )
        ranges = [value_range or EIGHT_BIT] * 3
        step = -(-max(header.size) // (LARGE_PX // 2)) if max(header.size) > LARGE_PX else 1
        strips = [to_unit(strip, ranges) for strip in _strips(image, bands, step)]
    if all(empty.all() for _, empty in strips):
        raise DataError(f"{path}: no finite pixel, so it has no style; mend it, or leave it out with --images")
    return torch.from_numpy(np.concatenate([strip for strip, _ in strips], axis=1))


def _strips(image: OpenImage, bands: Sequence[int], step: int) -> Iterator[np.ndarray]:
    """Rows of an image at 1 / step of its size, each pixel the mean of its step x step square."""
    height, width = image.header.size
    if step == 1:
        yield image.read(bands)
        return
    rows, columns = 64 * step, width // step * step
    for top in range(0, height // step * step, rows):
        count = min(rows, height // step * step - top)
        pixels = image.read(bands, window=Window(top, 0, count, columns)).astype(np.float32)
        yield pixels.reshape(3, count // step, step, columns // step, step).mean((2, 4))
