"""Where and in which precision a forward pass computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cegate.errors import ConfigError
from cegate.kernels._support import MIN_CAPABILITY

Precision = Callable[[], AbstractContextManager[Any]]
"""Makes the autocast context of a forward pass."""


@dataclass(frozen=True)
class Numerics:
    """How a run computes."""

    device: torch.device
    name: str
    """fp32, bf16 or fp16."""
    precision: Precision
    """Makes the autocast context of a forward pass."""


_DEVICES = "use auto, cpu, cuda or cuda:<index>"


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU without one. A GPU with an index becomes the current one.

    Raises:
        ConfigError: no device has that name, or it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown; {_DEVICES}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not served; {_DEVICES}")
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r} is not there; this machine has {torch.cuda.device_count()} GPUs, use cpu or auto"
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Triton launches on the current device, wherever the tensors are
    return device


def precision_of(name: str, device: torch.device) -> tuple[str, Precision]:
    """The precision that is used, and a maker of its autocast context.

    Args:
        name: ``run.precision``; ``auto`` is bf16 on a GPU that has it and fp32 elsewhere.
        device: where the model is.
    """
    if name == "auto":
        # torch calls bfloat16 supported where it is emulated, slowly, too
        has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
        name = "bf16" if has_bf16 else "fp32"
    if name == "fp32":
        return name, nullcontext
    return name, partial(torch.autocast, device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[name])


@contextmanager
def tf32() -> Iterator[None]:
    """Inside, a GPU rounds what float32 products multiply to TF32, 10 bits of mantissa, as its convolutions do anyway;
    without it they leave the tensor cores idle. What a program has said of it by torch's newer settings stays."""
    try:
        chosen = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # by `fp32_precision`, beside which torch refuses this one
        chosen = True
    if chosen:
        yield
        return
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
