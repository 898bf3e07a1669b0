"""The folder of a run: who may write there, and files that are either whole or absent."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cegate.config import Config
from cegate.configfile import changed_keys, read_config, to_yaml
from cegate.errors import CheckpointError

# a resumed run may differ in these and still give the same numbers
FREE_ON_RESUME = (
    "run.name",
    "run.work_dir",
    "run.device",
    "data.workers",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a path to write to that takes the place of ``path`` when the block ends well, and is removed when it fails.

    Data reaches the disk before the name does, so that a power cut leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~_umask())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


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

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = list(read_journal(path))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line."""
        record = _without_nan(dict(record))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.records.append(record)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop lines that a resumed run is going to write again; they are the only ones ever dropped."""
        self.records = [record for record in self.records if wanted(record)]
        write_text(self.path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records))


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a journal; a last line that a crash cut short is left out."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise CheckpointError(f"{path} line {number} is no JSON; restore the file from a copy") from error


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
        self.metrics = Journal(path / "metrics.jsonl")
        self.gates = Journal(path / "gates.jsonl")

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.checkpoints / "last.pt"

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
    taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
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


def open_run(config: Config, *, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """Prepare the folder of a run and save the resolved configuration in it.

    Args:
        config: the run.
        resume: go on in an existing folder.
        overwrite: move an existing run aside, to the next free ``<folder>.old-<n>``, and start in an empty folder.

    Raises:
        CheckpointError: see `check_folder`; or the run was started with another configuration.
    """
    path = check_folder(config, resume=resume, overwrite=overwrite)
    if resume:
        _refuse_changes(RunFolder(path).config(), config, path)
    elif (path / "config.yaml").is_file():
        path.rename(_free_name(path))
    path.mkdir(parents=True, exist_ok=True)
    run = RunFolder(path)
    write_text(run.config_file, to_yaml(config))
    return run


def _refuse_changes(old: Config, new: Config, path: Path) -> None:
    changed = [key for key in changed_keys(old, new) if key not in FREE_ON_RESUME]
    if changed:
        raise CheckpointError(
            f"{path} was started with other values of {', '.join(changed)}; resume it with "
            f"--config {path / 'config.yaml'}, or start a run of another name"
        )


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return aside
