"""In which precision a forward pass computes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

Precision = Callable[[], AbstractContextManager[Any]]
"""Makes the autocast context of a forward pass."""

# of the first GPUs with bfloat16; older ones emulate it, slowly
AMPERE = (8, 0)


def precision_of(name: str, device: torch.device) -> tuple[str, Precision]:
    """The precision that is used, and a maker of its autocast context.

    Args:
        name: ``run.precision``; ``auto`` is bf16 on a GPU that has it and fp32 elsewhere.
        device: where the model is.
    """
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE
        name = "bf16" if has_bf16 else "fp32"
    if name == "fp32":
        return name, nullcontext
    return name, partial(torch.autocast, device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[name])
