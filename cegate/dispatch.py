"""Gates of a whole batch or of each sample, compiled once into what the operators need.

``model(images, gates=..., adapter=[...])`` compiles a plan, and each site asks it two things: does it run
(:meth:`is_on`), and on which samples with whose weights (:meth:`assignment`, the ``adapters`` of :mod:`cegate.ops`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cegate import native
from cegate.config import KINDS


class PythonGatePlan:
    """What ``csrc/gate_plan.cpp`` does, for installs without the extension."""

    def __init__(self, gates: Sequence, adapters: Sequence[int], weights: Sequence[int]) -> None:
        self.layers = len(gates[0][0])
        self._check(gates, adapters, weights)
        self.samples = max(len(adapters), len(gates) if len(gates) > 1 else 0)
        self.packed_weights = 0
        self._adapters = list(adapters)
        self._offsets: dict[tuple[int, int], int] = {}
        self._assignments: dict[tuple[int, int], list[int]] = {}
        for kind in range(3):
            for layer in range(self.layers):
                on = [gate[kind][layer] for gate in gates]
                every = on * self.samples if len(gates) == 1 else on
                names = adapters or [0] * self.samples
                assignment = [name if g else -1 for name, g in zip(names, every, strict=True)]
                whole = not adapters and -1 not in assignment
                self._assignments[kind, layer] = [] if whole else assignment
                if any(on):
                    self._offsets[kind, layer] = self.packed_weights
                    self.packed_weights += weights[kind]
        layers = [layer for _, layer in self._offsets]
        self.first_layer, self.last_layer = min(layers, default=-1), max(layers, default=-1)

    def _check(self, gates: Sequence, adapters: Sequence[int], weights: Sequence[int]) -> None:
        for b, rows in enumerate(gates):
            for kind, row in enumerate(rows):
                for layer, gate in enumerate(row):
                    if gate not in (0, 1):
                        name = f"{KINDS[kind]}.{layer}"
                        raise ValueError(f"GatePlan: gate {name} of sample {b} is {gate}, accepted are 0 and 1")
        if len(gates) > 1 and len(adapters) not in (0, len(gates)):
            raise ValueError(f"GatePlan: adapters has {len(adapters)} entries for gates of {len(gates)} samples")
        for b, adapter in enumerate(adapters):
            if adapter < 0:
                raise ValueError(f"GatePlan: adapters[{b}] is {adapter}, accepted are 0 and more")
        for kind, count in zip(KINDS, weights, strict=True):
            if count < 0:
                raise ValueError(f"GatePlan: a {kind} site has {count} weights, accepted are 0 and more")

    def _key(self, kind: int, layer: int) -> tuple[int, int]:
        if not (0 <= kind < 3 and 0 <= layer < self.layers):
            raise IndexError(f"GatePlan: kind {kind}, layer {layer} is outside 0..2, 0..{self.layers - 1}")
        return kind, layer

    def is_on(self, kind: int, layer: int) -> bool:
        return self._key(kind, layer) in self._offsets

    def offset(self, kind: int, layer: int) -> int:
        return self._offsets.get(self._key(kind, layer), -1)

    def assignment(self, kind: int, layer: int) -> list[int]:
        return self._assignments[self._key(kind, layer)]

    @property
    def order(self) -> list[int]:
        return sorted(range(self.samples), key=lambda b: self._adapters[b] if self._adapters else 0)

    def __repr__(self) -> str:
        on = " ".join(f"{KINDS[kind]}.{layer}" for kind, layer in self._offsets) or "nothing"
        samples = f"{self.samples} samples, " if self.samples else ""
        return f"GatePlan({self.layers} layers, {samples}on: {on})"


GatePlan = PythonGatePlan if native.EXTENSION is None else native.EXTENSION.GatePlan


def compile_gates(
    gates: Tensor | Sequence, *, adapters: Sequence[int] | None = None, weights: Sequence[int] = (0, 0, 0)
) -> GatePlan:
    """Compile gates into a dispatch plan.

    Args:
        gates: [3, L] for a whole batch of any size, or [B, 3, L] for each sample; rows spatial, semantic, frequency;
            integers or booleans, 0 or 1.
        adapters: index of each sample's adapter, >= 0; default: all samples share one set of weights.
        weights: number of weights of one spatial, semantic and frequency site, for ``offset``.

    Returns:
        Plan with ``layers``, ``samples`` (0: any), ``first_layer`` and ``last_layer`` that are on (-1: none),
        ``packed_weights`` (of one adapter, active sites only) and ``order`` (samples sorted by adapter). By kind 0..2
        and layer: ``is_on``; ``offset`` into the packed weights (-1: off); ``assignment``, the adapter of each sample
        (-1: off; empty: the whole batch with one set of weights).

    Raises:
        ValueError: shape, dtype or a value is wrong; it is named.
    """
    table = torch.as_tensor(gates)
    if table.ndim not in (2, 3) or table.shape[-2] != 3 or table.shape[-1] == 0 or table.shape[0] == 0:
        raise ValueError(f"GatePlan: gates have shape {tuple(table.shape)}, expected [3, L] or [B, 3, L]")
    if table.is_floating_point() or table.is_complex():
        raise ValueError(f"GatePlan: gates are {table.dtype}, expected integers or booleans")
    rows = table.to(torch.int64).reshape(-1, *table.shape[-2:])
    named = [] if adapters is None else [int(adapter) for adapter in adapters]
    if table.ndim == 3 and len(rows) == 1 and len(named) > 1:
        raise ValueError(f"GatePlan: adapters has {len(named)} entries for gates of 1 sample")
    if len(weights) != 3:
        raise ValueError(f"GatePlan: weights has {len(weights)} entries, expected 3 (spatial, semantic, frequency)")
    return GatePlan(rows.tolist(), named, [int(count) for count in weights])
