"""What a piece of work asks a device to do, by call: each stands for a kernel's launch, or more than one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

MAKE_NOTHING = (
    "empty",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "empty_like",
    "detach",
    "lift_fresh",
    "device",
)
"""Operators beside views that launch no kernel."""
FILL = ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "zero_", "fill_")
"""Operators that read nothing."""
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class OperatorCalls(TorchDispatchMode):
    """Counts, inside, the calls of PyTorch's operators that compute something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, result = function.__name__.split(".")[0], function(*args, **kwargs)
        if not (function.is_view or name in MAKE_NOTHING or name == "_unsafe_view"):
            self.found[name] += 1
            self.seen(function, name, args, kwargs, result)
        return result

    def seen(self, function, name, args, kwargs, result) -> None:
        """Of one call."""


class Traffic(OperatorCalls):
    """Also what they move and multiply, by name: every input is read once and every output written once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter = Counter()
        self.flop: Counter = Counter()

    def seen(self, function, name, args, kwargs, result) -> None:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.bytes[name] += size_of(made) + (0 if name in FILL else size_of(given))
        if name == ATTENTION:
            self.flop[name] += sdpa_flop(*args[:3], out_val=result)
        elif name == f"{ATTENTION}_backward":
            self.flop[name] += sdpa_backward_flop(*args[:4], out_val=result)
        elif function.overloadpacket in flop_registry:
            self.flop[name] += flop_registry[function.overloadpacket](*args, **kwargs, out_val=result)

    def launch(self, kernel: object, *args: object, **options: object) -> None:
        """Of a Triton kernel."""
        given = [t for t in (*args, *options.values()) if isinstance(t, Tensor)]
        self.found[kernel.__name__] += 1
        self.bytes[kernel.__name__] += size_of(given)

    def milliseconds(self, rate: float, peak: float) -> float:
        """The least that a device needs which moves ``rate`` bytes and makes ``peak`` operations a second, call kind by
        call kind."""
        return 1e3 * sum(max(self.bytes[name] / rate, self.flop[name] / peak) for name in self.found)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that are there; what was expanded counts once."""
    return sum(t.element_size() * prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s) for t in tensors)
