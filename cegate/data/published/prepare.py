"""From a download to a prepared folder: FOLDER/img_dir/<split>/*, FOLDER/ann_dir/<split>/*.png and a manifest."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cegate.data.prepared import (
    FILE,
    IMAGES,
    LABELS,
    Counts,
    Manifest,
    Source,
    Split,
    read_manifest,
    write_manifest,
)
from cegate.data.published.catalogue import plan_of
from cegate.data.published.downloads import list_members
from cegate.data.published.plan import Box, Options, Piece, Plan, Published, crop_boxes
from cegate.data.rasters import read_header
from cegate.data.writing import write_image, write_mask
from cegate.errors import DataError

ASIDE = ".unfinished"
"""Folder of files that are being written; each is renamed when it is whole."""
_SHOWN = 5
T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class Target:
    """The files that one crop, or one whole image, becomes; paths below the prepared folder."""

    box: Box | None
    image: str
    label: str
    extras: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return self.image, self.label, *self.extras


@dataclass(frozen=True)
class Job:
    """A piece and what it becomes."""

    piece: Piece
    targets: tuple[Target, ...]


def prepare(
    published: Published,
    roots: Sequence[str | Path],
    out: Path,
    options: Options,
    *,
    partial_data: bool = False,
    dry_run: bool = False,
    workers: int = 1,
    console: Console | None = None,
) -> Manifest:
    """Prepare a download, or go on where an earlier call was interrupted.

    Files that are there already are kept as they are. The same download and options give the same bytes.

    Args:
        published: the set.
        roots: folders or zips with the download.
        out: folder to write to.
        options: every option of the set.
        partial_data: accept other numbers than the published ones, and missing files.
        dry_run: look, compare and print, write nothing.
        workers: processes that convert.
        console: takes the table of found and expected numbers, and notes.

    Returns:
        What is written to the folder's manifest.

    Raises:
        DataError: files are missing or unfit, or the folder holds something else.
    """
    console = console or Console()
    members = list_members(roots)
    plan = plan_of(published, members, options)
    closed = [m for m in members if m.inner is not None and m.name.lower().endswith(".zip")]
    unpack = f"unpack {closed[0].file}, a zip in a zip is not looked into; " if closed else ""
    where = f"{unpack}{published.name} comes from {published.origin}; the layout is {published.layout}"
    if not plan.pieces:
        missing = f" (for instance {'; '.join(plan.missing[:_SHOWN])})" if plan.missing else ""
        raise DataError(f"no image with a label found below {', '.join(map(str, roots))}{missing}; {where}")
    jobs = _list_jobs(plan)
    manifest = _describe(published, plan, jobs, options)
    for line in plan.notes:
        _say(console, line)
    console.print(counts_table(f"{published.name}: found and published", manifest))
    if (manifest.partial or plan.missing) and not partial_data:
        raise DataError(
            f"{_shortfall(manifest, plan)}; {where}; add what is missing, or take what is there with --partial"
        )
    finished = _compare(manifest, out, jobs)
    if dry_run:
        done = sum(_is_done(target, out) for job in jobs for target in job.targets)
        total = sum(len(job.targets) for job in jobs)
        first = jobs[0].targets[0].image
        _say(console, f"dry run: {total - done} of {total} images with labels would be written to {out}, as {first}")
        return manifest
    out.mkdir(parents=True, exist_ok=True)
    if not finished:
        write_manifest(out, replace(manifest, finished=False))
    _convert_all(jobs, out, workers, console)
    shutil.rmtree(out / ASIDE, ignore_errors=True)
    if not finished:
        write_manifest(out, manifest)
    split = manifest.sources[0].split
    _say(console, f"{out} is prepared; in a configuration: {{kind: prepared, root: {out}, split: {split}}}")
    return manifest


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def counts_table(title: str, manifest: Manifest) -> Table:
    """Found and expected numbers of every split, side by side."""
    table = Table(title=title, title_justify="left")
    table.add_column("split", style="bold")
    for name in ("images", "published", "prepared", "published"):
        table.add_column(name, justify="right")
    for name, split in manifest.splits.items():
        found, expected = split.found, split.expected
        table.add_row(
            name,
            *_compared(found.images, expected.images),
            *_compared(found.files, expected.files),
        )
    return table


def _compared(found: int | None, expected: int | None) -> tuple[str, str]:
    style = "" if expected in (None, found) else "[red]"
    return f"{style}{found}", "-" if expected is None else str(expected)


def _list_jobs(plan: Plan) -> list[Job]:
    """What every piece becomes. The size of an image that is cut is read from its header."""
    jobs, seen = [], {}
    for piece in plan.pieces:
        key = (piece.split, piece.name)
        if key in seen:
            raise DataError(f"{seen[key]} and {piece.image} would both become {piece.name} of {piece.split}; keep one")
        seen[key] = piece.image
        jobs.append(Job(piece, tuple(_targets(piece))))
    return jobs


def _targets(piece: Piece) -> Iterator[Target]:
    def target(box: Box | None, suffix: str) -> Target:
        stem = f"{piece.split}/{piece.name}" + ("" if box is None else "_" + "_".join(map(str, box)))
        extras = tuple(f"{extra.folder}/{stem}{extra.suffix}" for extra in piece.extras)
        return Target(box, f"{IMAGES}/{stem}{suffix}", f"{LABELS}/{stem}.png", extras)

    if piece.crop is None:
        yield target(None, ".png" if piece.read_image else Path(piece.image.name).suffix.lower())
        return
    header = read_header(piece.image.readable)
    try:
        boxes = crop_boxes(header.height, header.width, piece.crop)
    except DataError as error:
        raise DataError(f"{piece.image}: {error}") from error
    yield from (target(box, ".png") for box in boxes)


def _describe(published: Published, plan: Plan, jobs: Sequence[Job], options: Options) -> Manifest:
    images, files = Counter(), Counter()
    for job in jobs:
        images[job.piece.split] += 1
        files[job.piece.split] += len(job.targets)
    splits = {
        split: Split(Counts(images[split], files[split]), expected, plan.bands[split])
        for split, expected in plan.expected.items()
    }
    sources = sorted(
        (
            Source(p.split, p.name, p.image.name, p.image.size, p.label.name, p.label.size)
            for p in (job.piece for job in jobs)
        ),
        key=lambda source: (source.split, source.name),
    )
    return Manifest(
        name=published.name,
        classes=published.classes,
        palette=published.palette,
        label_map={str(value): meaning for value, meaning in published.stored.items()},
        options={**options, **plan.recorded},
        splits=splits,
        sources=tuple(sources),
    )


def _shortfall(manifest: Manifest, plan: Plan) -> str:
    """One line on what differs from the published numbers."""
    numbers = []
    for name, split in manifest.splits.items():
        for what, found, expected in (
            ("images", split.found.images, split.expected.images),
            ("prepared images", split.found.files, split.expected.files),
        ):
            if expected not in (None, found):
                numbers.append(f"{found} of {expected} {what} in {name}")
                break
    more = f" and {len(plan.missing) - _SHOWN} more" if len(plan.missing) > _SHOWN else ""
    names = f"; missing: {', '.join(plan.missing[:_SHOWN])}{more}" if plan.missing else ""
    return f"{manifest.name}: {', '.join(numbers) or 'numbers are as published'}{names}"


def _compare(new: Manifest, out: Path, jobs: Sequence[Job]) -> bool:
    """True if the folder holds this very set already, at least by its manifest.

    Raises:
        DataError: the folder holds another set, the same one with other options, or files of another download.
    """
    if not (out / FILE).is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"--out {out} is not empty and no prepared data set; give a new folder")
        return False
    old = read_manifest(out)
    if (old.name, dict(old.options)) != (new.name, dict(new.options)):
        raise DataError(
            f"--out {out} holds {old.name} with {_spell(old.options)}, not {new.name} with {_spell(new.options)}; "
            "give another folder"
        )
    before = {(s.split, s.name): (s.image_bytes, s.label_bytes) for s in old.sources}
    now = {(s.split, s.name): (s.image_bytes, s.label_bytes) for s in new.sources}
    gone = sorted(before.keys() - now.keys())
    begun = {
        (job.piece.split, job.piece.name)
        for job in jobs
        if any((out / file).exists() for target in job.targets for file in target.files)
    }
    changed = [key for key in now if key in begun and before.get(key, now[key]) != now[key]]
    if gone or changed:
        (split, name), *others = gone or changed
        how = "is not in this download" if gone else "has files of another size now"
        raise DataError(
            f"--out {out} was prepared from other files: {name} of {split} {how}"
            f"{f' (and {len(others)} more)' if others else ''}; give another folder"
        )
    wanted = {file for job in jobs for target in job.targets for file in target.files}
    strange = sorted(
        path.relative_to(out).as_posix()
        for folder in {file.partition("/")[0] for file in wanted}
        for path in (out / folder).rglob("*")
        if path.is_file() and path.relative_to(out).as_posix() not in wanted
    )
    if strange:
        raise DataError(f"{out / strange[0]} ({len(strange)} such files) is not of this data set; move it away")
    return old == new


def _spell(options: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items()) or "no options"


def _is_done(target: Target, out: Path) -> bool:
    return all((out / file).is_file() for file in target.files)


def _convert_all(jobs: Sequence[Job], out: Path, workers: int, console: Console) -> None:
    open_jobs = [job for job in jobs if not all(_is_done(target, out) for target in job.targets)]
    for folder in {(out / file).parent for job in open_jobs for target in job.targets for file in target.files}:
        folder.mkdir(parents=True, exist_ok=True)
    told = set()
    for job, pixels in run_all(partial(_convert, out=out), open_jobs, workers, "preparing", console):
        if pixels and job.piece.label not in told:
            told.add(job.piece.label)
            _say(console, f"{job.piece.label}: {pixels} px of colours that mean nothing are ignored")


def run_all(
    function: Callable[[T], R], items: Sequence[T], workers: int, title: str, console: Console
) -> Iterator[tuple[T, R]]:
    """Call a function on every item, in order, in other processes if there are several workers; shows progress."""

    def shown(results: Iterable[R]) -> Iterator[tuple[T, R]]:
        tracked = track(results, title, total=len(items), transient=True, console=console, disable=not items)
        return zip(items, tracked, strict=True)

    if workers <= 1 or len(items) < 2:
        yield from shown(map(function, items))
        return
    quiet = (signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), signal.signal, quiet)
    try:
        yield from shown(pool.map(function, items))
    except BrokenProcessPool as error:
        raise DataError(
            "a process was killed, as when memory runs out; use fewer --workers and call it again, which goes on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _convert(job: Job, out: Path) -> int:
    """Write what is not there yet of a job; the number of pixels with colours that mean nothing."""
    piece = job.piece
    label = piece.read_label(piece.label.readable)
    image = piece.read_image(piece.image.readable) if piece.read_image else None
    size = read_header(piece.image.readable).size if image is None else image.shape[-2:]
    if size != label.ids.shape:
        raise DataError(
            f"{piece.label} is {label.ids.shape[1]}x{label.ids.shape[0]} pixels, but its image {piece.image} is "
            f"{size[1]}x{size[0]}; download them again"
        )
    extras = [extra.read(extra.member.readable) for extra in piece.extras]
    for target in job.targets:
        x0, y0, x1, y1 = target.box or (0, 0, size[1], size[0])
        part = np.s_[..., y0:y1, x0:x1]
        if image is None:
            _put(out / target.image, out, lambda path: path.write_bytes(piece.image.read_bytes()))
        else:
            _put(out / target.image, out, partial(write_image, image=image[part]))
        for file, extra in zip(target.extras, extras, strict=True):
            _put(out / file, out, partial(write_image, image=extra[part]))
        _put(out / target.label, out, partial(write_mask, mask=label.ids[part]))
    return label.unknown_px


def _put(path: Path, out: Path, write: Callable[[Path], object]) -> None:
    """Write a file aside and rename it, unless it is there.

    Raises:
        DataError: it cannot be written, as on a full disk.
    """
    if path.is_file():
        return
    aside = out / ASIDE / f"{os.getpid()}-{path.name}"
    try:
        aside.parent.mkdir(exist_ok=True)
        write(aside)
        aside.replace(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror or error}); mend that and run cegate data prepare again, which "
            "goes on"
        ) from error
