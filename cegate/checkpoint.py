"""The full state of a training, for resume: written whole, with its checksum; what is shared is in `adapter_folder`."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from cegate import __version__
from cegate.adapters import misfits
from cegate.backbone.vit import weight_hash
from cegate.config import Config
from cegate.errors import CheckpointError, nearest, refuse_unreadable
from cegate.fields import is_union
from cegate.gate import GatePlan
from cegate.runfolder import RunFolder, written_aside
from cegate.segmenter import Segmenter, build

STATE_VERSION = 2
STAGES = ("before", "after")


@dataclass
class State:
    """Everything that the rest of a run depends on.

    No random state is among it: every draw is a function of (seed, iteration, slot).
    """

    stage: str
    """before (frozen backbone + head) or after (with the gate)."""
    iteration: int
    """Iterations done in this stage."""
    trained: dict[str, Tensor]
    """Weights of every part of the network that learns, ``<part>.<weight>``; see `trained_weights`."""
    active: list[str]
    frozen: list[str]
    """Plan: sites that learn, and sites that contribute what they learned."""
    ever_active: list[str]
    optimizer: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    loss_sum: float = 0.0
    loss_count: int = 0
    """Losses since the last line of metrics.jsonl."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Task -> what it carries from iteration to iteration."""
    task_weights: dict[str, Tensor] = field(default_factory=dict)
    """Weights of what tasks train beside the network, ``<task>.<part>.<weight>``; never deployed."""
    class_pixels: list[int] = field(default_factory=list)
    """Label value -> its pixels in the source crops of this stage; empty where nobody counted."""
    step_seconds: list[float] = field(default_factory=list)
    score_seconds: list[float] = field(default_factory=list)
    """How long each iteration and each scoring of this stage took."""
    elapsed_seconds: float = 0.0
    """How long the run has worked in all, over every resume."""
    peak_memory_bytes: int | None = None
    value_range: list[list[float]] | None = None
    backbone_sha256: str = ""
    classes: list[str] = field(default_factory=list)
    config: str = ""
    """The run's configuration as YAML, seed included; empty in files of older versions."""
    format_version: int = STATE_VERSION

    @property
    def position(self) -> tuple[int, int]:
        """Order of states within a run."""
        return STAGES.index(self.stage), self.iteration


def save_state(path: Path, state: State) -> None:
    """Write a checkpoint with its checksum aside and rename it, so that the file is the old one or the new one.

    Raises:
        CheckpointError: the disk is full, or the file cannot be written for another reason; the old one stays.
    """
    # plain text: a safe reader takes no class of ours
    sites = {name: [str(site) for site in getattr(state, name)] for name in ("active", "frozen", "ever_active")}
    around = sys.exception()
    with _whole(path) as aside, aside.open("wb") as file:
        sink = _Signed(file)
        try:
            torch.save({**vars(state), **sites}, sink)
        except Exception as error:  # torch's writer hides what went wrong below it
            cause = sink.failure or error
            while cause.__context__ not in (None, around):
                cause = cause.__context__
            raise cause from None
        sink.sign()


def load_state(path: Path) -> State:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: no file, unreadable, damaged, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    refuse_unreadable(path, CheckpointError)
    try:
        signed = _verify(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its zip or pickle reader raises
        why = str(error) if isinstance(error, _DamagedError) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or no checkpoint ({why}); use another one") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version not in (1, STATE_VERSION):
        raise CheckpointError(
            f"{path} has format {version}; this cegate {__version__} reads formats 1 to {STATE_VERSION}"
        )
    if version == 1:
        values = _from_format_1(values)
    elif not signed:
        raise CheckpointError(f"{path} is damaged or no checkpoint (its checksum is missing); use another one")
    if unknown := values.keys() - {item.name for item in fields(State)}:
        raise CheckpointError(
            f"{path} holds {', '.join(sorted(unknown))}, which this cegate {__version__} does not know; use the "
            "version that wrote it"
        )
    state = State(**values)
    if wrong := _not_of_their_kind(state):
        raise CheckpointError(f"{path} holds what is no {', '.join(wrong)} of a checkpoint; use another one")
    return state


def _not_of_their_kind(state: State) -> list[str]:
    """Fields of a state that hold what they cannot; none in a file that `save_state` wrote."""
    alike = {float: (int, float), list: (list, tuple)}
    wrong = []
    for name, hint in get_type_hints(State).items():
        kinds = [get_origin(kind) or kind for kind in (get_args(hint) if is_union(hint) else [hint])]
        if not any(isinstance(getattr(state, name), alike.get(kind, kind)) for kind in kinds):
            wrong.append(name)
    tensors = [name for name in ("trained", "task_weights") if name not in wrong]
    wrong += [name for name in tensors if not all(isinstance(x, Tensor) for x in getattr(state, name).values())]
    plans = [name for name in ("active", "frozen", "ever_active") if name not in wrong]
    wrong += [name for name in plans if not all(isinstance(site, str) for site in getattr(state, name))]
    return wrong + (["stage"] if "stage" not in wrong and state.stage not in STAGES else [])


def _from_format_1(values: dict[str, Any]) -> dict[str, Any]:
    """A state of format 2: what the objective kept is the state of the one task that had any."""
    objective = values.get("objective") or {}
    rest = {name: value for name, value in values.items() if name != "objective"}
    return rest | {"tasks": {"dacs": objective} if objective else {}, "format_version": STATE_VERSION}


class _DamagedError(Exception):
    pass


# a zip archive may end in a comment, which torch's reader passes over
_MARK = b"cegate sha256 "
_COMMENT = len(_MARK) + 64
_END_OF_ZIP = 22  # bytes of an archive's last record, which closes with the length of the comment


_OF_ANY_RECORD = (
    *("create_version", "create_system", "extract_version", "flag_bits", "compress_type", "date_time", "volume"),
    *("internal_attr", "external_attr", "comment"),
)


class _Signed:
    """File for `torch.save` that hashes what passes, keeps the first failure, and closes the archive with the hash."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.tail = file, hashlib.sha256(), b""
        self.failure: Exception | None = None

    def write(self, data: bytes | memoryview) -> int:
        size, last = len(data), _END_OF_ZIP
        if size < last:
            data = self.tail + bytes(data)
        else:
            self._put(self.tail)
        self._put(data[:-last])
        self.tail = bytes(data[-last:])
        return size

    def _put(self, data: bytes | memoryview) -> None:
        try:
            self.file.write(data)
        except Exception as error:
            self.failure = self.failure or error
            raise
        self.hash.update(data)

    def flush(self) -> None:
        """For torch; `sign` does it."""

    def sign(self) -> None:
        assert self.tail.startswith(b"PK\x05\x06") and self.tail.endswith(bytes(2)), "no end of a zip archive"
        self._put(self.tail[:-2] + _COMMENT.to_bytes(2, "little"))
        self.file.write(_MARK + self.hash.hexdigest().encode())


def _verify(path: Path) -> bool:
    """Whether a checkpoint carries its checksum; one of an older version is checked by those of its records.

    Raises:
        _DamagedError: what is in the file is not what was written.
    """
    left = max(path.stat().st_size - _COMMENT, 0)
    with path.open("rb") as file:
        found = hashlib.sha256()
        while left and (piece := file.read(min(left, 1 << 20))):
            found.update(piece)
            left -= len(piece)
        comment = file.read()
    if comment.startswith(_MARK):
        if comment.removeprefix(_MARK) != found.hexdigest().encode():
            raise _DamagedError("its checksum is another")
        return True
    with zipfile.ZipFile(path) as archive:
        # torch writes all records alike; one that says otherwise of itself is read otherwise, whatever its checksum
        if len({tuple(getattr(record, name) for name in _OF_ANY_RECORD) for record in archive.infolist()}) != 1:
            raise _DamagedError("its records are not written alike")
        if name := archive.testzip():
            raise _DamagedError(f"the checksum of its record {name} is another")
    return False


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """`written_aside`, whose failures say that the file before is still there."""
    try:
        with written_aside(path) as aside:
            yield aside
    except OSError as error:
        kept = "the one before it is whole" if path.is_file() else "there was none before it"
        raise CheckpointError(
            f"{path} could not be written ({error.strerror or error}), {kept}; make room or mend the disk, then go on "
            "with --resume"
        ) from error


def keep_newest(folder: Path, keep: int) -> None:
    """Remove numbered checkpoints but for the newest ``keep``; copies of other names are somebody's own."""
    ours = [path for path in folder.glob("iter_*.pt") if re.fullmatch("iter_[0-9]{1,10}", path.stem)]
    numbered = sorted(ours, key=lambda path: int(path.stem.removeprefix("iter_")))
    for path in numbered[: max(len(numbered) - keep, 0)]:
        path.unlink()


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint aside and rename it."""
    with _whole(target) as aside:
        shutil.copyfile(source, aside)


def trained_weights(segmenter: Segmenter, sites: Iterable[str] | None = None) -> dict[str, Tensor]:
    """``<part>.<weight>`` -> weights of every part; of the toolbox those of some sites (default: all), as
    ``toolbox.<site>.<weight>``."""
    weights: dict[str, Tensor] = {}
    for name, part in segmenter.learning_modules().items():
        if part is segmenter.toolbox:
            chosen = part.sites if sites is None else sites
            own = {f"{site}.{key}": value for site in chosen for key, value in part.parameters_of(site).items()}
        else:
            own = {key: value for key, value in part.state_dict().items() if value.is_floating_point()}  # no counts
        weights |= {f"{name}.{key}": value.detach() for key, value in own.items()}
    return weights


@torch.no_grad()
def load_trained(
    segmenter: Segmenter, weights: Mapping[str, Tensor], sites: Iterable[str] | None, where: str | Path
) -> None:
    """Copy weights into head and sites, strictly.

    Raises:
        CheckpointError: keys are missing, left over or of another shape; they are named, and nothing is copied.
    """
    own = trained_weights(segmenter, sites)
    if problems := misfits(own, weights):
        raise CheckpointError(
            f"{where} does not fit the model: {'; '.join(problems)}; use the configuration it was made with"
        )
    for key, value in own.items():
        value.copy_(weights[key])


def restore(segmenter: Segmenter, state: State, where: str | Path, *, backbone_sha256: str | None = None) -> None:
    """Put a checkpoint's weights and plan into a freshly built model.

    Raises:
        CheckpointError: other classes, another backbone, or weights that do not fit.
    """
    check_fit(segmenter, where, state.classes, state.backbone_sha256, backbone_sha256)
    load_trained(segmenter, state.trained, None, where)
    segmenter.toolbox.apply(GatePlan(state.active, state.frozen))
    segmenter.adapts(state.stage == "after")
    segmenter.recipe = replace(segmenter.recipe, value_range=state.value_range)


def check_fit(
    segmenter: Segmenter, where: str | Path, classes: Iterable[str], expected: str, found: str | None = None
) -> None:
    """Whether weights belong to a model's classes and backbone.

    Raises:
        CheckpointError: they do not; both sides are named.
    """
    if tuple(classes) != tuple(segmenter.classes):
        raise CheckpointError(
            f"{where} was trained for the classes {', '.join(classes)}, not {', '.join(segmenter.classes)}; "
            "give data.classes as they were in training"
        )
    found = found or weight_hash(segmenter.vit)
    if found != expected:
        raise CheckpointError(
            f"{where} was trained on a backbone with sha256 {expected[:12]}, this one "
            f"({segmenter.config.model.backbone}) has {found[:12]}; give the weights that were used in training"
        )


def load_checkpoint(run: RunFolder, which: str, config: Config, device: str | torch.device) -> Segmenter:
    """Rebuild a run's model from one of its checkpoints.

    Args:
        run: the run.
        which: ``best``, ``last``, or the path of a checkpoint. As long as there is no best one, the last of the stage
            ``after`` is best.
        config: the run's configuration, perhaps with other data.
        device: where to put it.

    Raises:
        CheckpointError: no such checkpoint, or it does not fit.
    """
    named = {"best": run.checkpoints / "best.pt", "last": run.last}
    path = named.get(which, Path(which))
    if which not in named and not path.is_file():
        raise CheckpointError(f"there is no checkpoint {which}; use best, last or a path{nearest(which, named)}")
    falls_back = which == "best" and not path.is_file() and run.last.is_file()
    if falls_back:
        path = run.last
    state = load_state(path)
    if falls_back and state.stage != "after":
        raise CheckpointError(
            f"{run.path} has no best checkpoint yet, its last is of stage frozen (backbone and head alone) after "
            f"{state.iteration} iterations; finish the run with --resume, or use the checkpoint last"
        )
    segmenter = build(config)
    restore(segmenter, state, path)
    return segmenter.to(device).eval()
