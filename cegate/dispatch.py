"""Gates of a whole batch or of each sample, compiled once into what the operators need.

``model(images, gates=..., adapter=[...])`` compiles a plan, and each site asks it two things: does it run
(:meth:`is_on`), and on which samples with whose weights (:meth:`assignment`, the ``adapters`` of :mod:`cegate.ops`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from cegate import native
from cegate.sites import PAPER_KINDS


class PythonDispatchPlan:
    """What ``csrc/dispatch_plan.cpp`` does, for installs without the extension."""

    def __init__(self, kinds: Sequence[str], gates: Sequence, adapters: Sequence[int]) -> None:
        self._kinds = kinds
        self.layers = len(gates[0][0])
        self._check(gates, adapters)
        self.samples = max(len(adapters), len(gates) if len(gates) > 1 else 0)
        self._on: set[tuple[int, int]] = set()
        self._assignments: dict[tuple[int, int], list[int]] = {}
        for site in product(range(len(kinds)), range(self.layers)):
            on = [gate[site[0]][site[1]] for gate in gates]
            every = on * self.samples if len(gates) == 1 else on
            names = adapters or [0] * self.samples
            assignment = [name if g else -1 for name, g in zip(names, every, strict=True)]
            whole = not adapters and -1 not in assignment
            self._assignments[site] = [] if whole else assignment
            if any(on):
                self._on.add(site)

    def _check(self, gates: Sequence, adapters: Sequence[int]) -> None:
        for b, rows in enumerate(gates):
            for kind, row in zip(self._kinds, rows, strict=True):
                for layer, gate in enumerate(row):
                    if gate not in (0, 1):
                        name = f"{kind}.{layer}"
                        raise ValueError(f"DispatchPlan: gate {name} of sample {b} is {gate}, accepted are 0 and 1")
        if len(gates) > 1 and len(adapters) not in (0, len(gates)):
            raise ValueError(f"DispatchPlan: adapters has {len(adapters)} entries for gates of {len(gates)} samples")
        for b, adapter in enumerate(adapters):
            if adapter < 0:
                raise ValueError(f"DispatchPlan: adapters[{b}] is {adapter}, accepted are 0 and more")

    def _site(self, kind: int, layer: int) -> tuple[int, int]:
        if (kind, layer) not in self._assignments:
            last = f"0..{len(self._kinds) - 1}, 0..{self.layers - 1}"
            raise IndexError(f"DispatchPlan: kind {kind}, layer {layer} is outside {last}")
        return kind, layer

    def is_on(self, kind: int, layer: int) -> bool:
        return self._site(kind, layer) in self._on

    def assignment(self, kind: int, layer: int) -> list[int]:
        return self._assignments[self._site(kind, layer)]

    def __repr__(self) -> str:
        on = " ".join(f"{self._kinds[kind]}.{layer}" for kind, layer in sorted(self._on)) or "nothing"
        samples = f"{self.samples} samples, " if self.samples else ""
        return f"DispatchPlan({self.layers} layers, {samples}on: {on})"


DispatchPlan = PythonDispatchPlan if native.EXTENSION is None else native.EXTENSION.DispatchPlan


def compile_gates(
    gates: Tensor | Sequence, *, adapters: Sequence[int] | None = None, kinds: Sequence[str] = PAPER_KINDS
) -> DispatchPlan:
    """Compile gates into a dispatch plan.

    Args:
        gates: [kinds, L] for a whole batch of any size, or [B, kinds, L] for each sample; integers or booleans, 0 or 1.
        adapters: index of each sample's adapter, >= 0; default: all samples share one set of weights.
        kinds: names of the rows, for messages.

    Returns:
        Plan with ``layers`` and ``samples`` (0: any). By index of the kind and layer: ``is_on``, whether any sample has
        the site; ``assignment``, the adapter of each sample (-1: off; empty: the whole batch with one set of weights).

    Raises:
        ValueError: shape, dtype or a value is wrong; it is named.
    """
    table = torch.as_tensor(gates)
    rows = len(kinds)
    if table.ndim not in (2, 3) or table.shape[-2] != rows or 0 in table.shape:
        expected = f"[{rows}, L] or [B, {rows}, L] for the kinds {', '.join(kinds)}"
        raise ValueError(f"DispatchPlan: gates have shape {tuple(table.shape)}, expected {expected}")
    if table.is_floating_point() or table.is_complex():
        raise ValueError(f"DispatchPlan: gates are {table.dtype}, expected integers or booleans")
    named = [] if adapters is None else [int(adapter) for adapter in adapters]
    if table.ndim == 3 and len(table) == 1 and len(named) > 1:
        raise ValueError(f"DispatchPlan: adapters has {len(named)} entries for gates of 1 sample")
    every = table.to(torch.int64).reshape(-1, *table.shape[-2:])
    return DispatchPlan(list(kinds), every.tolist(), named)
