"""Every test: seeded, one thread, and ``torch.empty`` full of NaN so that nothing unwritten passes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from cegate.config import Config
    from cegate.segmenter import Segmenter

# the models are tiny: a second thread only waits for the first; set before torch is imported, for subprocesses too
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


def _has_interpreter() -> bool:
    """Triton 3.6 takes numbers out of arrays in a way that NumPy refuses since 2.4."""
    release = {name: tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")}
    return release["triton"] > (3, 6) or release["numpy"] < (2, 4)


if not torch.cuda.is_available() and find_spec("triton") and _has_interpreter():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before cegate is imported

settings.register_profile("steady", deadline=None)  # a busy machine is no failure
settings.load_profile("steady")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real imagery, weights and reference vectors that are not ours to redistribute; CEGATE_SHARED points elsewhere."""
    folder = Path(os.environ.get("CEGATE_SHARED", SHARED))
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set CEGATE_SHARED to the folder with data/, weights/ and vectors/")
    return folder


THREE_SITES: dict[str, Any] = {
    "data": {"classes": ["land", "water"], "crop": 32},
    "model": {"weights": "none"},
    "toolbox": {"spatial": {"rank": 2}, "semantic": {"width": 4}, "frequency": {"width": 2}},
}


@pytest.fixture(scope="session")
def trained() -> Callable[..., Segmenter]:
    """Makes a model of THREE_SITES, changed by sections, whose every trained weight is random; two sites are on, one is
    on and frozen."""
    import cegate
    from cegate.checkpoint import trained_weights
    from cegate.gate import GatePlan

    def make(**changes: object) -> Segmenter:
        segmenter = cegate.build({**THREE_SITES, **changes})
        with torch.no_grad():
            for value in trained_weights(segmenter).values():
                value.copy_(0.3 * torch.randn(value.shape))
        segmenter.toolbox.apply(GatePlan(("spatial.1", "semantic.0"), ("frequency.7",)))
        return segmenter.eval()

    make.mapping = THREE_SITES
    return make


SMALL: dict[str, Any] = {
    "run": {"name": "small", "device": "cpu"},
    "data": {
        "classes": ["background", "building", "forest", "road", "water"],
        "source": {"kind": "generated", "split": "temperate", "limit": 4, "tile": 48},
        "validation": {"kind": "generated", "split": "temperate", "first": 100, "limit": 1, "tile": 32},
        "targets": {"arid": {"kind": "generated", "split": "arid", "limit": 1, "tile": 40}},
        "crop": 32,
        "batch_size": 2,
        "workers": 0,
    },
    "model": {"weights": "none"},
    "toolbox": {"spatial": {"rank": 2}, "semantic": {"width": 4}, "frequency": {"width": 2}},
    "gate": {"k": 5, "interval": 3, "samples": 3},
    "train": {"iterations": 7, "lr": 1e-2, "eval_every": 4, "log_every": 2, "checkpoint_every": 3},
}


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Config]:
    """Configuration of a run of seconds; keywords are dotted keys with two underscores for the dot."""
    from cegate.configfile import read_config

    def make(folder: str = "run", **changes: object) -> Config:
        overrides = [("run.work_dir", str(tmp_path / folder))]
        overrides += [(key.replace("__", "."), str(value)) for key, value in changes.items()]
        return read_config(SMALL, overrides, training=True)

    return make


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that drawing takes."""
    monkeypatch.setattr("cegate.engine.trainer.draw_run", lambda *_, **__: None)


@pytest.fixture
def little_mask2former(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that are built are small: for tests of what goes on around them."""
    from cegate.heads.mask2former import Mask2FormerHead

    for name, less in {"queries": 5, "width": 32, "encoder_layers": 1, "decoder_layers": 2, "points": 64}.items():
        monkeypatch.setitem(Mask2FormerHead.__init__.__kwdefaults__, name, less)


@pytest.fixture(scope="session")
def forked() -> Callable[[int, Callable[[int], Any]], list[Any]]:
    """Gives what ``work(rank)`` gives, or ends with, in each of so many processes that begin as copies of this one."""
    context = multiprocessing.get_context("fork")

    def call(size: int, work: Callable[[int], Any]) -> list[Any]:
        answers = context.Queue()

        def run(rank: int) -> None:
            try:
                answers.put((rank, work(rank)))
            except BaseException as error:  # an interrupt, too: the parent asserts what each process ended with
                answers.put((rank, error))

        processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(size)]
        for process in processes:
            process.start()
        try:
            return [answer for _, answer in sorted((answers.get(timeout=60) for _ in processes), key=lambda a: a[0])]
        finally:
            for process in processes:
                process.join(10)
                process.kill()

    return call


@pytest.fixture
def in_a_group(forked, tmp_path: Path) -> Callable[[int, Callable[[int], Any]], list[Any]]:
    """As `forked`, of processes that are one group of torch.distributed; their errors are raised."""

    def call(size: int, work: Callable[[int], Any]) -> list[Any]:
        def run(rank: int) -> Any:
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{tmp_path / 'group'}", rank=rank, world_size=size
            )
            try:
                return work(rank)
            finally:
                torch.distributed.destroy_process_group()

        answers = forked(size, run)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    return call
