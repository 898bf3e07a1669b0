"""The forward and backward pass of a stage's steps: as it is written, or as ``run.speed=auto`` lets a GPU run it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from cegate import ops
from cegate.backbone.backbone import Features
from cegate.backbone.frozen import Cast, cast_frozen
from cegate.compute import Numerics, tf32
from cegate.engine.recorded import CudaGraph, Encoder, Pass
from cegate.engine.step_losses import Found
from cegate.segmenter import Segmenter
from cegate.tasks.stream import StepData
from cegate.tasks.task import Task

log = logging.getLogger(__name__)


def is_fast(speed: str, device: torch.device) -> bool:
    """Whether steps may run in another way than they are written."""
    return speed == "auto" and device.type == "cuda"


class Passes:
    """What a step computes, in the fastest way that is safe.

    Args:
        work: ``(data, encode)`` -> what a step gives; leaves its gradients on the weights, and no others. ``encode``
            takes the place of the network's, where it is one.
        speed: ``run.speed``.
        numerics: how to compute.
        network: whose backbone is recorded where no whole step can be.
        tasks: of the steps.
    """

    def __init__(
        self,
        work: Callable[[StepData, Callable[..., Features] | None], Found],
        speed: str,
        numerics: Numerics,
        network: Segmenter,
        tasks: Sequence[Task],
    ) -> None:
        self.work, self.numerics, self.network = work, numerics, network
        self.is_fast = is_fast(speed, numerics.device)
        hindrances = [f"the task {task.name}" for task in tasks if not task.recordable]
        hindrances += ["run.precision=fp16"] if numerics.name == "fp16" else []
        if self.is_fast and hindrances:
            log.info("run.speed=auto: of a step the backbone alone is recorded, because of %s", ", ".join(hindrances))
        self.whole = Pass(self._run, CudaGraph if self.is_fast and not hindrances else None, self._cast)
        self.encoder = None
        if self.is_fast and hindrances:
            self.encoder = Encoder(network.encode, self._weights_of_features, CudaGraph, self._cast)

    @property
    def records(self) -> bool:
        """Whether whole steps are meant to be recorded: the same in every process of a team."""
        return self.whole.records

    @property
    def is_recorded(self) -> bool:
        """Whether the last step was played, so that its gradients lie where the next one's will."""
        return self.whole.is_recorded

    @property
    def is_played(self) -> bool:
        """Whether anything of a step is recorded by now."""
        return self.is_recorded or (self.encoder is not None and self.encoder.is_recorded)

    def forget(self) -> None:
        """Give back what recorded passes hold; the next one runs as it is written."""
        self.whole.forget()
        if self.encoder is not None:
            self.encoder.forget()

    def __call__(self, data: StepData) -> Found:
        """What a step gives, and its gradients on the weights."""
        return self.whole(data)

    def _run(self, data: StepData) -> Found:
        if not self.is_fast:
            return self.work(data, None)
        encode = None if self.encoder is None else self.encoder.of_a_step()
        # who asks for half precision does not ask for more in what autocast leaves alone
        with ops.fused(), nullcontext() if self.numerics.name == "fp32" else tf32():
            return self.work(data, encode)

    def _weights_of_features(self) -> list[nn.Parameter]:
        return [w for name, m in self.network.learning_modules().items() if name != "head" for w in m.parameters()]

    def _cast(self) -> Cast:
        return cast_frozen(self.network.vit, torch.bfloat16) if self.numerics.name == "bf16" else {}
