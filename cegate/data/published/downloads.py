"""Files of a download, in folders and in zips alike."""

from __future__ import annotations

import functools
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cegate.errors import DataError


@dataclass(frozen=True)
class Member:
    """A downloaded file, on its own or in a zip."""

    path: str
    """Where it lies, from the name of the root on; a zip counts as a folder of its name."""
    size: int
    """Bytes."""
    file: Path
    """The file, or the zip that holds it."""
    inner: str | None = None
    """Name within the zip."""

    @property
    def readable(self) -> Path:
        """The path that rasters are read from."""
        return self.file if self.inner is None else Path(f"/vsizip/{{{self.file}}}/{self.inner}")

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.path.rpartition("/")[2]

    def read_bytes(self) -> bytes:
        """The file's content."""
        return self.file.read_bytes() if self.inner is None else _archive(self.file).read(self.inner)

    def __str__(self) -> str:
        return str(self.file) if self.inner is None else f"{self.file}:{self.inner}"


@functools.lru_cache(maxsize=8)
def _archive(path: Path) -> zipfile.ZipFile:
    """A zip whose list of contents is read once, not for each of its thousands of files."""
    return zipfile.ZipFile(path)


def list_members(roots: Sequence[str | Path]) -> list[Member]:
    """Every file below the roots, those in zips too (a zip in a zip stays closed), in a fixed order.

    Raises:
        DataError: a root is neither folder nor zip, or a zip is damaged or encrypted.
    """
    members: list[Member] = []
    for root in (Path(r).expanduser().absolute() for r in roots):
        if root.is_dir():
            for path in _walk(root):
                relative = f"{root.name}/{path.relative_to(root).as_posix()}"
                members += _entries(path, relative) if _is_zip(path) else [Member(relative, path.stat().st_size, path)]
        elif root.is_file() and _is_zip(root):
            members += _entries(root, root.name)
        else:
            raise DataError(f"--root {root} is neither a folder nor a .zip file; give what was downloaded")
    return members


def _is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root, followlinks=True):  # downloads are often linked from another disk
        folders.sort()
        yield from (Path(folder, name) for name in sorted(files))


def _entries(path: Path, relative: str) -> Iterator[Member]:
    folder = relative[: -len(path.suffix)]
    try:
        entries = zipfile.ZipFile(path).infolist()
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: {error}; download it again") from error
    for entry in sorted(entries, key=lambda e: e.filename):
        if entry.flag_bits & 1:
            raise DataError(f"{path}: the zip is encrypted; unpack it and give the folder as --root")
        if not entry.is_dir() and not entry.filename.startswith("__MACOSX/"):
            yield Member(f"{folder}/{entry.filename}", entry.file_size, path, entry.filename)


def find(members: Sequence[Member], *patterns: str) -> dict[tuple[str, ...], Member]:
    """Files by the groups of a regular expression that their path ends in.

    Args:
        members: where to look.
        patterns: expressions with the same groups, the preferred one first: a later one fills what the earlier ones
            have not found. A group that is not there is "".

    Returns:
        Groups -> file.

    Raises:
        DataError: one expression finds two files of different size for the same groups.
    """
    found: dict[tuple[str, ...], Member] = {}
    for pattern in patterns:
        expression = re.compile(rf"(?:.*/)?{pattern}")
        here: dict[tuple[str, ...], Member] = {}
        for member in members:
            match = expression.fullmatch(member.path)
            if match is None:
                continue
            key = tuple(group or "" for group in match.groups())
            if key in found:
                continue
            other = here.setdefault(key, member)
            if other.size != member.size:
                raise DataError(f"{other} and {member} are of one name and of different size; give --root only one")
        found |= here
    return found
