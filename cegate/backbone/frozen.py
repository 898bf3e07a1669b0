"""Frozen matrices once in the dtype of a pass, where autocast would cast every one of them in every pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

Cast = Mapping[nn.Parameter, Tensor]
"""Weight -> what is read in its place."""
_READ: ContextVar[Cast] = ContextVar("read")


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> Cast:
    """Weights and biases of a model's linear layers that do not learn, in another dtype, as they are now."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    weights = [w for layer in layers for w in layer.parameters(recurse=False) if not w.requires_grad]
    return {w: w.detach().to(dtype) for w in weights}


@contextmanager
def reading(cast: Cast) -> Iterator[None]:
    """Inside, and in this thread alone, blocks read cast weights. Under autocast to their dtype every number stays what
    it was."""
    token = _READ.set(cast)
    try:
        yield
    finally:
        _READ.reset(token)


def as_read(weight: Tensor | None) -> Tensor | None:
    """What blocks read for a weight."""
    return _READ.get({}).get(weight, weight)
