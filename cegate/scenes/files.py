"""Masks of image files."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from cegate.data.rasters import SUFFIXES
from cegate.data.writing import MASK_SUFFIXES, is_georeferenced
from cegate.errors import DataError
from cegate.recipe import Recipe
from cegate.runfolder import remove_leftovers, writable_folder
from cegate.scenes.predictor import Predictor
from cegate.scenes.reader import check_rasters, open_reader
from cegate.scenes.sink import open_mask_file


class Segmenting(Protocol):
    """What masks are made with: a segmenter."""

    @property
    def recipe(self) -> Recipe: ...
    def predictor(self, *, stride: int | None = None, blend: str = "cosine", tta: str = "none") -> Predictor: ...


class Written(NamedTuple):
    """A mask that was written."""

    mask: Path
    image: Path
    without_data: float
    """Share of its pixels, 0..1, that were not predicted because the image has no data there; they are 255."""
    lacking: float = 0.0
    """Share of its pixels, 0..1, that were predicted from the image alone: its second raster is unknown there."""
    unread: str = ""
    """Which bands of the image were read, where it has more and nobody seems to have chosen."""


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Image files that are named by files, folders (not below them) or globs, each once, in order: another way to one
    file, as through ``..`` or a link, counts where it gives the file another name.

    Of a folder, files whose names begin with a dot are left out: what a killed process left, or a system's notes. A
    glob that ends in a wildcard takes raster files only, as those of sets do; none takes folders.

    Raises:
        DataError: an input names no image.
    """
    found: dict[tuple[Path, str], Path] = {}
    for name in inputs:
        if not name:  # as an unset variable of a shell gives it; it is not the working directory
            raise DataError("an input is empty; give a file, a folder or a glob")
        path = Path(name)
        if path.is_dir():
            images = sorted(file for file in path.iterdir() if _is_image(file))
        else:
            matches = sorted(map(Path, glob.glob(name, recursive=True)))  # noqa: PTH207 - Path.glob takes no absolute one
            images = [path] if path.is_file() else [file for file in matches if _is_meant(file, name)]
            if "**" in name:
                circles = {folder for folder in {file.parent for file in images} if _is_in_circle(folder)}
                images = [file for file in images if file.parent not in circles]
        if not images:
            raise DataError(f"{name} names no image; give a file, a folder with {', '.join(SUFFIXES)} files, or a glob")
        for image in images:
            found.setdefault((image.resolve(), image.stem), image)
    return list(found.values())


def pair_second(images: Sequence[Path], seconds: Sequence[Path]) -> dict[Path, Path]:
    """Image -> its second raster: one for all of them, or one each, whose name is the image's.

    Names may differ by a word of letters before the first or behind the last ``_`` or ``-`` that all files of a side
    have in common: a_1_rgb.tif goes with a_1_dsm.tif.

    Raises:
        DataError: an image has none, or two.
    """
    if len(seconds) == 1:
        return dict.fromkeys(images, seconds[0])
    first_missing: Path | None = None
    for of_second, of_image in itertools.product(_ways_to_name(seconds), _ways_to_name(images)):
        by_name: dict[str, Path] = {}
        for second, name in zip(seconds, of_second, strict=True):
            if by_name.setdefault(name, second) != second:
                raise DataError(f"{by_name[name]} and {second} have one name; give the second rasters of one folder")
        missing = [image for image, name in zip(images, of_image, strict=True) if name not in by_name]
        if not missing:
            return {image: by_name[name] for image, name in zip(images, of_image, strict=True)}
        first_missing = first_missing or missing[0]
    raise DataError(
        f"{first_missing} has no second raster of its name among the {len(seconds)} of --second; add it, or leave that "
        "image out"
    )


def _ways_to_name(files: Sequence[Path]) -> Iterator[list[str]]:
    """What files may be called: their stems, and these without a last or first word that all have."""
    stems = [file.stem for file in files]
    yield stems
    for word in (r"[_-][A-Za-z]+$", r"^[A-Za-z]+[_-]"):
        words = {found and found[0] for found in (re.search(word, stem) for stem in stems)}
        if len(words) == 1 and None not in words:
            yield [re.sub(word, "", stem) for stem in stems]


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and not file.is_dir()


def _is_meant(file: Path, pattern: str) -> bool:
    """Whether what a glob finds is an image, and not what lies beside images."""
    beside = "__MACOSX" in file.parts or (pattern.endswith("*") and file.suffix.lower() not in SUFFIXES)
    return not beside and not file.is_dir()


def _is_in_circle(folder: Path) -> bool:
    """Whether a folder is found below a link to a folder that the link lies in, and so found before."""
    folders = [os.path.realpath(above) for above in (folder, *folder.parents)]
    return len(set(folders)) < len(folders)


def _suffix_for(image: Path) -> str:
    try:
        return ".tif" if is_georeferenced(image) else ".png"
    except DataError:  # there will be no mask; why is said when its turn comes
        return ".tif" if image.suffix.lower() in (".tif", ".tiff") else ".png"


def plan_outputs(
    images: Sequence[Path],
    output: Path,
    *,
    overwrite: bool = False,
    keep: bool = False,
    seconds: Iterable[Path] = (),
) -> dict[Path, Path]:
    """Decide where each mask goes, before any work is done.

    Args:
        images: image files.
        output: a .png or .tif file for one image, else a folder. In a folder a mask is named after its image: a .tif
            for a georeferenced image, a .png for others.
        overwrite: existing masks may be replaced.
        keep: images that have a mask already are left out.
        seconds: second rasters, which no mask may replace either.

    Returns:
        Image -> mask file.

    Raises:
        DataError: a mask exists, would replace an image, or two images want the same name; or output has a suffix that
            is no mask's and is no folder yet.
        CheckpointError: nothing can be written there.
    """
    if output.suffix.lower() in MASK_SUFFIXES and not output.is_dir():
        if len(images) != 1:
            raise DataError(f"--output {output} is one file for {len(images)} images; give a folder")
        masks = {images[0]: output}
    elif re.search("[A-Za-z]", output.suffix) and not output.is_dir():
        raise DataError(
            f"--output {output}: a mask cannot be written as {output.suffix}; give a .png or .tif file, or a folder "
            "(make one of that name first if you mean it)"
        )
    else:
        masks = {image: output / f"{image.stem}{_suffix_for(image)}" for image in images}
    taken: dict[Path, Path] = {}
    given = {file.resolve() for file in (*images, *seconds)}
    for image, mask in masks.items():
        if mask in taken:
            raise DataError(f"{taken[mask]} and {image} would both be written to {mask}; predict them into two folders")
        if mask.resolve() in given:
            raise DataError(f"the mask of {image} would replace {mask}, which is read; give another --output")
        if mask.exists() and not (overwrite or keep):
            raise DataError(
                f"{mask} exists; give another --output, --overwrite to replace it, or --keep to leave its image out"
            )
        taken[mask] = image
    for folder in {mask.parent for mask in masks.values()}:
        writable_folder(folder, "--output")
    return {image: mask for image, mask in masks.items() if not (keep and mask.exists())}


def predict_files(
    segmenter: Segmenting,
    masks: dict[Path, Path],
    progress: Callable[[float], None] = lambda done: None,
    *,
    seconds: Mapping[Path, Path] | None = None,
    alone: bool = False,
    all_pixels: bool = False,
    stride: int | None = None,
    blend: str = "cosine",
    tta: str = "none",
) -> Iterator[Written]:
    """Segment images and write their masks: single-band class indices with the palette as colour table.

    A georeferenced image's coordinate system and transform go into a .tif. Each mask is whole or absent, and is written
    while its image is read: what is held of either does not grow with its height. An image that cannot be used does not
    stop the others. What an earlier call left beside these masks when it was killed is removed.

    Args:
        segmenter: the model.
        masks: image -> mask file, see `plan_outputs`.
        progress: told how many of the images are done, with the share of the one that is being segmented.
        seconds: image -> its second raster, for a model of two.
        alone: the images are second rasters, and there is nothing beside them.
        all_pixels: predict also where an image says that it has no data.
        stride, blend: see `cegate.scenes.mosaic.Mosaic`.
        tta: see `cegate.scenes.predictor.TTA`.

    Yields:
        Masks as they are written.

    Raises:
        DataError: the model needs a raster that is not given, or a mask cannot be written, as where its folder is gone:
            at once; masks before it stay, and so does an older one in its place. Or, at the end: images that cannot be
            read, take more memory than there is, or do not fit the model. Each is named with its reason in either.
        ConfigError: stride or blend does not fit.
    """
    predictor, recipe = segmenter.predictor(stride=stride, blend=blend, tta=tta), segmenter.recipe
    check_rasters(recipe, image=not alone, second=alone or bool(seconds))
    remove_leftovers(masks.values())
    failed: list[str] = []
    for done, (image, mask) in enumerate(masks.items()):
        given = (None, image) if alone else (image, (seconds or {}).get(image))
        try:
            with (
                _memory_errors_named(image),
                open_reader(given[0], recipe, second=given[1], all_pixels=all_pixels) as reader,
                open_mask_file(mask, reader.size, like=image, palette=recipe.palette) as sink,
            ):
                predictor.run(reader, sink, lambda share, done=done: progress(done + share))
        except DataError as error:
            failed.append(str(error))
            progress(done + 1)
            continue
        except OSError as error:
            reason = f"{mask} cannot be written ({error.strerror or error}); give another --output"
            if not mask.parent.is_dir():  # not made anew: what was written there before is gone
                reason = (
                    f"{mask.parent} was removed or moved while masks were written there; put it back and go on with "
                    "--keep, or start again"
                )
            raise DataError("; ".join([reason, *failed])) from error
        without_second = reader.lacking if seconds else 0.0
        yield Written(mask, image, sink.without_data, without_second, reader.unread)
    if failed:
        raise DataError(f"{len(failed)} of {len(masks)} images have no mask: {'; '.join(failed)}")


@contextmanager
def _memory_errors_named(image: Path) -> Iterator[None]:
    """Turn what says that memory is used up, on the host or a GPU, into a DataError that names the image."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{image}: out of memory ({reason}); cut it into parts that are less wide") from error
