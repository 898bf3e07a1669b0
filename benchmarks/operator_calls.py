"""What a piece of work asks a device to do, counted: each call stands for a kernel's launch, or more than one."""

from __future__ import annotations

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

MAKE_NOTHING = ("empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "detach", "lift_fresh")
"""Operators beside views that launch no kernel."""


class OperatorCalls(TorchDispatchMode):
    """Counts, inside, the calls of PyTorch's operators that compute something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if not function.is_view and name not in MAKE_NOTHING:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))
