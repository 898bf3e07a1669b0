"""TensorBoard's files of a run, beside its journal: the same scalars, and the picture of the gate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from cegate.configfile import domain_title
from cegate.engine.results import Record, stage_title
from cegate.errors import ConfigError
from cegate.figures import gate_figure


def refuse_missing() -> None:
    """Raises:
    ConfigError: TensorBoard is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "run.log names tensorboard, which is not installed; pip install 'cegate[tensorboard]', or leave it out"
        ) from error


class Board:
    """Writes ``tensorboard/<stage>`` of a run folder, which is made with the first number.

    Args:
        folder: ``tensorboard`` of the run.
        method: ``run.method``, which names the stage that adapts.
        position: (stage, iteration) that the run goes on from; what was written after it, TensorBoard forgets.
    """

    def __init__(self, folder: Path, method: str | None, position: tuple[str, int] | None = None) -> None:
        self.folder, self.method, self.position = folder, method, position
        self._writers: dict[str, Any] = {}

    def _writer(self, stage: str):
        from torch.utils.tensorboard import SummaryWriter  # seconds, and not installed everywhere

        if stage not in self._writers:
            going_on = self.position is not None and self.position[0] == stage
            purge = self.position[1] + 1 if going_on else None
            self._writers[stage] = SummaryWriter(str(self.folder / stage_title(stage, self.method)), purge_step=purge)
        return self._writers[stage]

    def write(self, *records: Record) -> None:
        """Numbers of lines of metrics.jsonl."""
        for record in records:
            writer = self._writer(record.get("stage", record["split"]))
            for name, value in scalars(record):
                writer.add_scalar(name, value, record["iteration"])
            writer.flush()

    def gate(self, iteration: int, rounds: Sequence[Record], sites: Sequence[str]) -> None:
        """The picture of the gate so far."""
        canvas = FigureCanvasAgg(gate_figure(rounds, sites, end=iteration))
        canvas.figure.set_facecolor("white")
        canvas.draw()
        writer = self._writer("after")
        writer.add_image("gate", np.asarray(canvas.buffer_rgba())[..., :3], iteration, dataformats="HWC")
        writer.flush()

    def close(self) -> None:
        """Let go of the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """(name, number) of a line: ``train/loss``, ``<domain>/mIoU``, ``<domain> IoU/<class>``."""
    domain = "train" if record["split"] == "train" else domain_title(record["domain"])
    for key, value in record.items():
        if key != "iteration" and isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{domain}/{key}", value
    classes: Mapping[str, Mapping[str, float | None]] = record.get("per_class", {})
    for name, scores in classes.items():
        if scores["IoU"] is not None:
            yield f"{domain} IoU/{name}", scores["IoU"]
