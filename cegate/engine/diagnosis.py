"""`cegate inspect --report`: what an issue should say of versions, machine and run, and no names of folders."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import os
import platform
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import rasterio
import torch

from cegate import __version__, native, ops
from cegate.checkpoint import load_state
from cegate.config import Config
from cegate.configfile import changed_values
from cegate.errors import CegateError
from cegate.figures import STAGES
from cegate.runfolder import RunFolder

_PACKAGES = ("torch", "torchvision", "triton", "timm", "transformers", "numpy", "rasterio", "safetensors")
_VARIABLES = ("CEGATE_", "OMP_", "MKL_", "TORCH", "TRITON_", "CUDA_VISIBLE", "GDAL_")
_LOG_LINES = 12
_FOLDERS = r"(?:(?<![\w.:/~…])~?/|\b[A-Za-z]:\\)[^\s'\"`,;:|<>()\[\]{}]+"  # an absolute path within a text


def report(run: Path | None = None) -> str:
    """Markdown for an issue.

    Args:
        run: folder of a run whose progress, configuration and last lines belong to it.

    Raises:
        CheckpointError: the folder is no run.
    """
    parts = [("versions", _versions()), ("machine", _machine()), ("backends", _backends())]
    if variables := _environment():
        parts.append(("environment", variables))
    if run is not None:
        parts += _run(RunFolder(run))
    text = "\n\n".join(f"**{title}**\n\n```text\n" + "\n".join(lines) + "\n```" for title, lines in parts)
    return without_names(text)


def _versions() -> list[str]:
    place = Path(native.__file__).parent
    how = "checkout" if (place.parent / "csrc").is_dir() else "installed"
    found = {name: _version(name) for name in _PACKAGES}
    lines = [f"cegate {__version__} ({how}), Python {platform.python_version()}"]
    lines.append(", ".join(f"{name} {version}" for name, version in found.items() if version))
    if missing := [name for name, version in found.items() if not version]:
        lines.append(f"not there: {', '.join(missing)}")
    return [*lines, f"GDAL {rasterio.__gdal_version__}"]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _machine() -> list[str]:
    lines = [platform.platform(), f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        lines.append(f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB of memory")
    if not torch.cuda.is_available():
        built = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for CPUs alone"
        )
        return [*lines, f"no GPU that torch sees; {built}"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        lines.append(f"GPU {index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    return [*lines, f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, {_driver()}"]


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = re.findall(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "driver not known"
    return f"driver {found[0]}" if (found := re.findall(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)) else "driver not known"


def _backends() -> list[str]:
    lines = [f"{name:<7} {state}" for name, state in ops.backends().items()]
    for dtype in (torch.float32, torch.bfloat16):
        reasons = native.obstacles({"x": torch.empty(0, dtype=dtype)})
        chosen = f"torch, because {'; '.join(reasons)}" if reasons else "cpp"
        lines.append(f"auto takes for {str(dtype).removeprefix('torch.')} on the CPU: {chosen}")
    if torch.cuda.is_available():
        lines.append(
            f"auto takes on the GPU: {'triton' if _version('triton') else 'torch, because triton is not there'}"
        )
    return lines


def _environment() -> list[str]:
    return [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)]


def _run(run: RunFolder) -> Iterator[tuple[str, list[str]]]:
    config = run.config()
    yield "run", [_progress(run, config)]
    told = changed_values(Config(), config)
    yield (
        "configuration (what is not the default)",
        [f"{key}: {_shortened(now)}" for key, (_, now) in told.items() if now is not None],
    )
    log = run.path / "train.log"
    if log.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        yield "last lines of train.log", [_without_folders(line, config) for line in lines]


def _progress(run: RunFolder, config: Config) -> str:
    try:
        state = load_state(run.last)
    except CegateError:
        return "no checkpoint that can be read"
    return f"iteration {state.iteration} of {config.train.iterations}, stage {STAGES[state.stage]}"


# --- names ----------------------------------------------------------------------------------------------------------


def _shortened(value: Any) -> Any:
    """A value with its paths cut to their last part."""
    if isinstance(value, Mapping):
        return {key: _shortened(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(inner) for inner in value]
    return _last_part(value) if isinstance(value, str) else value


def _last_part(text: str) -> str:
    absolute = text.startswith(("/", "~", "..")) or PureWindowsPath(text).is_absolute()
    if not absolute:
        return text
    pure = PureWindowsPath(text) if "\\" in text else PurePosixPath(text)
    return f"…/{pure.name}"


def _without_folders(line: str, config: Config) -> str:
    """A line of a log; folders of the configuration go first, for they may hold spaces."""
    told = changed_values(Config(), config)
    paths = {text for _, now in told.values() for text in _texts(now) if _last_part(text) != text}
    for path in sorted(paths, key=len, reverse=True):
        line = line.replace(path, _last_part(path))
    return line


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    for inner in value if isinstance(value, list | tuple) else [value]:
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, Mapping | list | tuple):
            yield from _texts(inner)


def without_names(text: str) -> str:
    """A text in which paths are cut to their last part, and user and host are not named."""
    text = re.sub(_FOLDERS, lambda match: _last_part(match[0]), text)
    names = {Path.home().name: "USER", socket.gethostname(): "HOST"}
    with contextlib.suppress(KeyError, OSError):  # some containers know no such user
        names[getpass.getuser()] = "USER"
    for name, word in names.items():
        if len(name) > 2 and name != "root":
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", word, text)
    return text
