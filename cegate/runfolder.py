"""The folder of a run: who may write there, and files that are either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cegate.config import Config, Length
from cegate.configfile import changed_values, read_config, to_yaml
from cegate.errors import CheckpointError, ConfigError
from cegate.fields import read_fields

log = logging.getLogger(__name__)

LOCK = ".lock"
# what training alone writes: files of the run folder, and folders below it
_OWN_FILES = ("config.yaml", "env.json", "result.json", "nan_batch.json", "metrics.jsonl", "gates.jsonl")
_OWN_FOLDERS = ("checkpoints", "adapter", "figures")
_OF_A_FALSE_START = ("config.yaml", "env.json", "train.log", "nan_batch.json", "metrics.jsonl", "gates.jsonl")
_ASIDE = re.compile(r"\.(?P<stem>.+)\.[a-z0-9_]{8}(?P<suffix>\.\w+)")  # as `written_aside` calls its files

# a resumed run may differ in these: the same numbers, but for last digits on another device
FREE_ON_RESUME = (
    "run.name",
    "run.work_dir",
    "run.device",
    "run.speed",
    "run.log",
    "data.workers",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)


@contextlib.contextmanager
def written_aside(path: Path, *, make_folder: bool = True) -> Iterator[Path]:
    """Give a path to write to that takes the place of ``path`` when the block ends well, and is removed when it fails.

    Data reaches the disk before the name does, so that a power cut leaves the old file or the new one. What a process
    leaves that is killed meanwhile, `remove_leftovers` knows.

    Args:
        path: the file.
        make_folder: make its folder if needed.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    aside, handle = _locked_aside(path)
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~_umask())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
        os.close(handle)


def _locked_aside(path: Path) -> tuple[Path, int]:
    """A new empty file beside another, and what holds a lock on it until it is closed, where there are locks."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else `remove_leftovers` of another process was here before the lock
            return Path(name), handle
        os.close(handle)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove what `written_aside` has left beside these files in processes that were killed; what a living one writes
    is locked, and stays, as does all where there are no locks."""
    wanted = set(paths)
    for folder in {path.parent for path in wanted}:
        for aside in folder.glob(".*"):
            name = _ASIDE.fullmatch(aside.name)
            if name and folder / (name["stem"] + name["suffix"]) in wanted:
                with contextlib.suppress(OSError), aside.open("rb+") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    aside.unlink()


def writable_folder(path: Path, option: str) -> Path:
    """Make a folder if needed, or say before any work is done why nothing can be written there.

    Raises:
        CheckpointError: it cannot be made or written to; the option to change is named.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written to ({error.strerror}); give another {option}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _leftovers(folder: Path) -> list[Path]:
    """What the writes of a training that was killed have left aside in its run folder."""
    evaluated = [place for place in (folder / "eval").glob("*") if not place.is_symlink()]
    places = [place for place in (folder, *(folder / name for name in _OWN_FOLDERS), *evaluated) if place.is_dir()]
    found = [(path, match) for place in places for path in place.iterdir() if (match := _ASIDE.fullmatch(path.name))]
    return [path for path, name in found if path.parent != folder or name["stem"] + name["suffix"] in _OWN_FILES]


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or nothing."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file or nothing; NaN becomes null."""
    write_text(path, json.dumps(_without_nan(value), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or "nested too deeply" * isinstance(error, RecursionError) or error
        raise CheckpointError(f"{path} cannot be read: {why}; restore the file from a copy") from error


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: it is missing, no JSON, or holds anything else.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} holds no JSON object; restore the file from a copy")
    return record


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


class Journal:
    """An append-only file of one JSON object a line, kept in memory too."""

    def __init__(self, path: Path, line: type | None = None) -> None:
        """
        Args:
            path: the file.
            line: see `read_journal`.
        """
        self.path = path
        self.records: list[dict[str, Any]] = list(read_journal(path, line))

    def append(self, *records: Mapping[str, Any]) -> None:
        """Add one or more lines together, which are on the disk when this returns."""
        lines = [_without_nan(dict(record)) for record in records]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.records += lines

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop lines that a resumed run is going to write again; they are the only ones ever dropped."""
        self.records = [record for record in self.records if wanted(record)]
        write_text(self.path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records))


@dataclass(frozen=True)
class MetricsLine:
    """What every line of metrics.jsonl holds, beside more."""

    iteration: Length
    split: Literal["train", "before", "after"]
    stage: Literal["before", "after"] = "after"
    loss: float | None = None


@dataclass(frozen=True)
class GatesLine:
    """What every line of gates.jsonl holds, beside more."""

    iteration: Length
    scores: dict[str, float]
    active: list[str]


def read_journal(path: Path, line: type | None = None) -> Iterator[dict[str, Any]]:
    """Lines of a journal; a last line that a crash cut short, be it within a character, is left out.

    Args:
        path: the file.
        line: dataclass of the keys that every record has; default: none are asked for.

    Raises:
        CheckpointError: a line is no JSON, or no record with those keys; it is named.
    """
    if not path.is_file():
        return
    # not splitlines: a record may hold other line separators of Unicode
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    for number, text in enumerate(lines, 1):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise CheckpointError(f"{path} line {number} is no JSON; restore the file from a copy") from error
            return
        if not isinstance(record, dict):
            raise CheckpointError(f"{path} line {number} is no record; restore the file from a copy")
        try:
            known = line and read_fields(line, record)
        except ConfigError as error:
            raise CheckpointError(f"{path} line {number}: {error}; restore the file from a copy") from error
        yield {key: getattr(known, key, value) for key, value in record.items()}


class RunFolder:
    """Paths and journals of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.figures = path / "figures"
        self.eval = path / "eval"
        self.result = path / "result.json"
        self.metrics = Journal(path / "metrics.jsonl", MetricsLine)
        self.gates = Journal(path / "gates.jsonl", GatesLine)

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.checkpoints / "last.pt"

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """What is written inside, a training writes in its folder.

        Raises:
            CheckpointError: the folder is gone, which is not made anew behind the user's back, or cannot be written to.
        """
        try:
            self._refuse_gone()
            yield
        except OSError as error:
            self._refuse_gone()
            raise CheckpointError(
                f"{error.filename or self.path} could not be written ({error.strerror or error}); make room or mend "
                "the disk, then go on with --resume"
            ) from error

    def _refuse_gone(self) -> None:
        if not self.config_file.is_file():
            raise CheckpointError(
                f"{self.path} was removed or moved while it was trained in, so the run stops; put it back and go on "
                "with --resume, or start again"
            )

    def config(self) -> Config:
        """The configuration that is saved with the run.

        Raises:
            CheckpointError: the folder is no run.
        """
        if not self.config_file.is_file():
            raise CheckpointError(
                f"{self.path} is no run folder (it has no config.yaml); give the folder of a cegate run"
            )
        return read_config(self.config_file)

    def overrides(self, weights: str | None = None) -> list[tuple[str, str]]:
        """What a later look at the run puts on top of its configuration.

        The image size of the backbone stays, so that data.crop may be another: then windows are of another size.

        Args:
            weights: of the backbone, where they lie elsewhere than in training.
        """
        config = self.config()
        size = [] if config.model.image_size else [("model.image_size", str(config.data.crop))]
        return size + ([("model.weights", weights)] if weights else [])


def folder_of(config: Config) -> Path:
    """Where the run goes: run.work_dir, or runs/<name>."""
    return Path(config.run.work_dir or f"runs/{config.run.name}")


def check_folder(config: Config, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Say where the run goes, or why it cannot; nothing is touched.

    Raises:
        CheckpointError: the folder is taken, or is not there to be resumed.
    """
    path = folder_of(config)
    is_run = (path / "config.yaml").is_file()
    taken = path.exists() and not _is_free(path)
    if resume and not is_run:
        raise CheckpointError(f"there is no run in {path} to resume; leave out --resume to start one")
    if taken and not is_run:
        raise CheckpointError(f"{path} is not empty and no cegate run; give another run.work_dir or run.name")
    if taken and not (resume or overwrite):
        raise CheckpointError(
            f"{path} holds a run already; --resume goes on with it, --overwrite moves it aside and starts again, "
            "another run.name or run.work_dir starts beside it"
        )
    return path


def _is_free(path: Path) -> bool:
    """Whether a folder has nothing to lose: it is empty but for what a killed process left aside, or it is of a run
    that failed before it had measured or saved anything."""
    if not path.is_dir():
        return False
    trifles = {path / LOCK, *_leftovers(path)}
    if (path / "env.json").is_file():  # a config.yaml alone may be a user's own
        trifles |= {path / name for name in _OF_A_FALSE_START}
        metrics = path / "metrics.jsonl"
        trifles -= {metrics} if metrics.is_file() and metrics.stat().st_size else set()
    return all(file in trifles for file in path.iterdir())


@contextlib.contextmanager
def open_run(config: Config, *, resume: bool = False, overwrite: bool = False) -> Iterator[RunFolder]:
    """Prepare the folder of a run, save the resolved configuration in it, and let nobody else train there meanwhile.

    Args:
        config: the run.
        resume: go on in an existing folder.
        overwrite: move an existing run aside, to the next free ``<folder>.old-<n>``, and start in an empty folder.

    Raises:
        CheckpointError: see `check_folder`; another process is training in the folder; or the run was started with
            another configuration.
    """
    path = check_folder(config, resume=resume, overwrite=overwrite)
    writable_folder(path, "run.work_dir or run.name")
    with contextlib.ExitStack() as held:
        held.enter_context(_locked(path))
        check_folder(config, resume=resume, overwrite=overwrite)  # another process may just have been here
        if resume:
            _refuse_changes(RunFolder(path).config(), config, path)
        elif _is_free(path):
            for name in _OF_A_FALSE_START:
                (path / name).unlink(missing_ok=True)
        elif (path / "config.yaml").is_file():
            path.rename(_free_name(path))
            held.enter_context(_locked(path))
            check_folder(config)
        for file in _leftovers(path):
            file.unlink()
        run = RunFolder(path)
        write_text(run.config_file, to_yaml(config))
        yield run


def take_lock(path: Path) -> int | None:
    """An open file that nobody else holds until it is closed, here and in the processes that inherited it; or None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            os.close(handle)
            raise
        log.warning("%s: this file system has no locks; see to it that no other process writes there", path)
    return handle


_held: set[int] = set()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Be the only one who trains in a folder, which is made if needed."""
    handle = take_lock(folder / LOCK)
    if handle is None:
        raise CheckpointError(
            f"{folder} is in use: another process is training there; wait until it ends, or give another run.name or "
            "run.work_dir"
        )
    _held.add(handle)
    try:
        yield
    finally:
        if handle in _held:
            _held.remove(handle)
            os.close(handle)


def _let_go() -> None:
    """A forked data worker may outlive its killed parent for seconds, in which the run could not be resumed."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def _refuse_changes(old: Config, new: Config, path: Path) -> None:
    changed = [key for key in changed_values(old, new) if key not in FREE_ON_RESUME]
    if changed:
        raise CheckpointError(
            f"{path} was started with other values of {', '.join(changed)}; resume it with "
            f"--config {path / 'config.yaml'}, or start anew with another run.name or with --overwrite"
        )


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return aside
