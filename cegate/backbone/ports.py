"""What can be added to a block, and where: ports, plugs, and the circuit that is handed down with a call.

At every port a tensor is [samples, tokens, C], whatever the block does inside (windows, rotary positions). A function
at a port gets what the block computed there and how its tokens lie, and returns what takes its place:

    port        called with          stands
    qkv         u, qkv               after the projections of u = norm1(x); a tensor [B, T, 3 inner], or (q, k, v) where
                                     the block projects separately
    attention   a                    after attention and its projection, before layer scale
    fc1, fc2    h, fc(h)             after each linear map of the MLP
    mlp         x1, h, y             after the MLP's residual: x1 the stream before it, h = norm2(x1), y the stream
    block       y                    on the block's output

Nothing in a circuit changes while it is in use and no module keeps the state of a call, so that threads do not meet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

PORTS = ("qkv", "attention", "fc1", "fc2", "mlp", "block")


class Tokens(NamedTuple):
    """How the tokens of a call lie: prefix tokens first, then the grid row by row."""

    prefix: int
    grid: tuple[int, int]
    streams: int = 1
    """Modalities that lie behind each other in the batch, each with its share of the samples."""


class Plug(NamedTuple):
    """A function at a port of a layer. Where several meet, a lower ``order`` comes first."""

    port: str
    layer: int
    order: int
    function: Callable


class Ports(NamedTuple):
    """The functions at the ports of one block."""

    qkv: tuple[Callable, ...] = ()
    attention: tuple[Callable, ...] = ()
    fc1: tuple[Callable, ...] = ()
    fc2: tuple[Callable, ...] = ()
    mlp: tuple[Callable, ...] = ()
    block: tuple[Callable, ...] = ()


EMPTY = Ports()


class Circuit:
    """What is plugged in, by layer."""

    def __init__(self, plugs: Iterable[Plug] = ()) -> None:
        self.plugs = tuple(plugs)
        by_layer: dict[int, dict[str, list[Plug]]] = defaultdict(lambda: defaultdict(list))
        for plug in self.plugs:
            by_layer[plug.layer][plug.port].append(plug)
        self._ports = {
            layer: Ports(
                **{
                    port: tuple(plug.function for plug in sorted(own, key=lambda plug: plug.order))
                    for port, own in ports.items()
                }
            )
            for layer, ports in by_layer.items()
        }

    def at(self, layer: int) -> Ports:
        """The functions of a layer."""
        return self._ports.get(layer, EMPTY)
