"""Adapters of many domains over one resident backbone, and batches whose samples differ in gates, adapter and head."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from threading import RLock
from types import MappingProxyType

import torch
from torch import Tensor, nn

from cegate import dispatch
from cegate.backbone.vit import feature_layers, weight_hash
from cegate.config import Config
from cegate.errors import CheckpointError, ConfigError, nearest
from cegate.gate import GatePlan
from cegate.heads.build import build_head
from cegate.network import Network
from cegate.parts.part import Use
from cegate.parts.toolbox import Toolbox
from cegate.recipe import Recipe
from cegate.sites import SiteId

Gates = Tensor | Sequence
"""[rows, L] for a whole batch or [B, rows, L], rows as `Toolbox.rows` (spatial, semantic, frequency); 0 or 1."""
Chosen = str | int | Sequence[str | int]
"""Name or index of the adapter of every sample, or of all samples."""

_CALLS = RLock()
"""Over the compiled calls of a bank: several threads may call its model. No part of it, for locks cannot be copied."""
KEPT_CALLS = 16
"""Compiled calls that are kept; a server sees few combinations, a stream of random gates must not fill memory."""


@dataclass(frozen=True)
class Adapter:
    """What one domain adds to a frozen backbone: which sites are on, their weights, and those of a head."""

    config: Config
    """Backbone, toolbox, head, classes and windows it was trained with."""
    plan: GatePlan
    """Sites that are on."""
    backbone_sha256: str
    """:func:`~cegate.backbone.vit.weight_hash` of the backbone it was trained on."""
    recipe: Recipe
    """How images are read, normalised and cut into windows for it, and its classes."""
    source: str
    """File of the weights, for messages."""
    weights: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """``toolbox.<site>.<weight>`` and ``head.<weight>``; empty once a model holds them."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their indices."""
        return self.recipe.classes


def misfits(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with weights by name: missing, left over, of another shape, no numbers; one entry for each, keys
    named."""
    wrong = {
        "missing": [key for key in expected if key not in weights],
        "unexpected": [key for key in weights if key not in expected],
        "of another shape": [k for k in expected if k in weights and expected[k].shape != weights[k].shape],
    }
    return [f"{label} {some(keys)}" for label, keys in wrong.items() if keys] or not_numbers(weights)


def not_numbers(weights: Mapping[str, Tensor]) -> list[str]:
    """Weights that are not floating-point, or are NaN or infinite as float32, which all of them become; the counters
    of batch norm are no weights."""
    weights = {key: value for key, value in weights.items() if not key.endswith(".num_batches_tracked")}
    other = [f"{key} holds {value.dtype}" for key, value in weights.items() if not value.is_floating_point()]
    floats = {key: value.float() for key, value in weights.items() if value.is_floating_point()}
    counts = {key: int((~value.isfinite()).sum()) for key, value in floats.items()}
    wrong = [f"{key} has {count} values that are not finite" for key, count in counts.items() if count]
    return [f"{some(names)}" for names in (other, wrong) if names]


def some(keys: Sequence[str]) -> str:
    """The first four of many names."""
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


@dataclass(frozen=True)
class Call:
    """How one batch runs."""

    uses: Mapping[SiteId, Use]
    """Site -> how it takes part, samples in running order."""
    order: list[int] | None
    """Samples in running order, equal ones side by side; None: as they came."""
    heads: list[tuple[slice, int | None]]
    """Samples in running order, and the adapter whose head takes them; None: the model's own."""

    def sort(self, samples: Tensor) -> Tensor:
        """Samples as they came -> running order."""
        return samples if self.order is None else torch.stack([samples[b] for b in self.order])

    def restore(self, parts: Sequence[Tensor]) -> Tensor:
        """Results in running order, one tensor for each entry of ``heads`` -> one tensor, as the samples came."""
        if self.order is None:
            return parts[0] if len(parts) == 1 else torch.cat(list(parts))
        rows = dict(zip(self.order, (row for part in parts for row in part), strict=True))
        return torch.stack([rows[b] for b in range(len(rows))])


class AdapterBank(nn.Module):
    """Weights of many adapters: of each site stacked, a row for each adapter that has the site on; and their heads.

    They move with the model, but they are none of its parameters and no part of its state dict: they are frozen, and
    heads stay in evaluation mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self._adapters: dict[str, Adapter] = {}
        self._heads: list[nn.Module] = []  # in the order of the adapters
        self._stacks: dict[str, dict[str, Tensor]] = {}  # site -> weight -> [rows, ...]
        self._rows: dict[str, list[str]] = {}  # site -> adapters in the order of its rows
        self._backbone_sha256: str | None = None
        self._calls: OrderedDict[tuple, Call] = OrderedDict()

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Name -> adapter, in the order of their indices."""
        return MappingProxyType(self._adapters)

    def head(self, index: int) -> nn.Module:
        """The head of an adapter."""
        return self._heads[index]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterBank:
        for head in self._heads:
            head._apply(fn)
        self._stacks = {site: {key: fn(stack) for key, stack in own.items()} for site, own in self._stacks.items()}
        self._calls.clear()  # they hold the tensors as they were
        return super()._apply(fn, recurse)

    def add(self, name: str, adapter: Adapter, network: Network) -> None:
        """Stack an adapter's weights; see :meth:`~cegate.segmenter.Segmenter.add_adapter`."""
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{name!r} is no name of an adapter; give a word, such as 'arid'")
        if name in self._adapters:
            raise ConfigError(f"there is an adapter {name!r} already; delete_adapter({name!r}) first, or name it anew")
        self._backbone_sha256 = self._backbone_sha256 or weight_hash(network.vit)
        check_fit(network, adapter, self._backbone_sha256)
        sites = {site: network.toolbox.parameters_of(site) for site in adapter.plan.on}
        head = _build_head(network, adapter)
        expected = {f"toolbox.{site}.{key}": value for site, own in sites.items() for key, value in own.items()}
        expected |= {f"head.{key}": value for key, value in head.state_dict().items()}
        if problems := misfits(expected, adapter.weights):
            raise CheckpointError(f"{adapter.source} cannot be added as {name!r}: {'; '.join(problems)}")
        head.load_state_dict({key: adapter.weights[f"head.{key}"] for key in head.state_dict()})
        self._heads.append(head.to(next(network.vit.parameters()).device).requires_grad_(False).eval())
        for site, own in sites.items():
            rows = {key: adapter.weights[f"toolbox.{site}.{key}"].to(value)[None] for key, value in own.items()}
            before = self._stacks.get(site)
            self._stacks[site] = {key: torch.cat([before[key], row]) for key, row in rows.items()} if before else rows
            self._rows.setdefault(site, []).append(name)
        self._adapters[name] = replace(adapter, weights={})
        self._calls.clear()

    def delete(self, name: str | int) -> None:
        """Remove an adapter; see :meth:`~cegate.segmenter.Segmenter.delete_adapter`."""
        index = self.index(name)
        name = list(self._adapters)[index]
        del self._heads[index]
        for site in self._adapters.pop(name).plan.on:
            kept = [row for row, owner in enumerate(self._rows[site]) if owner != name]
            self._rows[site].remove(name)
            self._stacks[site] = {key: stack[kept] for key, stack in self._stacks[site].items()}
            if not kept:
                del self._stacks[site], self._rows[site]
        self._calls.clear()

    def index(self, chosen: str | int) -> int:
        """Index of an adapter by name or index.

        Raises:
            ConfigError: there is none; the nearest name is given.
        """
        names = list(self._adapters)
        held = f"this model holds {', '.join(names)}" if names else "this model holds none, see add_adapter"
        if isinstance(chosen, str):
            if chosen not in self._adapters:
                raise ConfigError(f"there is no adapter {chosen!r}; {held}{nearest(chosen, names)}")
            return names.index(chosen)
        try:
            index = operator.index(chosen)
        except TypeError:
            raise ConfigError(f"adapter {chosen!r} is neither a name nor an index; {held}") from None
        if not 0 <= index < len(names):
            raise ConfigError(f"adapter {index} is out of range 0..{len(names) - 1}; {held}")
        return index

    def named(self, chosen: str | int) -> Adapter:
        """An adapter by name or index."""
        return list(self._adapters.values())[self.index(chosen)]

    def call(self, toolbox: Toolbox, samples: int, gates: Gates | None, adapter: Chosen | None) -> Call:
        """Compile gates and adapters of a batch; equal ones give the same object again.

        Args:
            toolbox: of the backbone.
            samples: number of samples in the batch.
            gates: which sites run; None: those of each sample's adapter.
            adapter: of all samples or of each; None: the model's own weights and head.

        Raises:
            ConfigError, ValueError: an entry is unknown, out of range or does not fit; it is named.
        """
        if not samples:
            raise ValueError("gates and adapters need at least one sample; the batch is empty")
        indices = None if adapter is None else self._indices(adapter, samples)
        table = None if gates is None else _table(gates)
        given = () if table is None else (table.dtype, table.shape, *table.flatten().tolist())
        key = (samples, indices and tuple(indices), given)
        with _CALLS:
            if key in self._calls:
                self._calls.move_to_end(key)
                return self._calls[key]
            if table is None:
                held = list(self._adapters.values())
                table = torch.tensor([held[i].plan.matrix(toolbox.depth, toolbox.rows) for i in indices or []])
            self._calls[key] = call = self._compile(toolbox, samples, table, indices)
            if len(self._calls) > KEPT_CALLS:
                self._calls.popitem(last=False)
            return call

    def _indices(self, adapter: Chosen, samples: int) -> list[int]:
        if isinstance(adapter, str) or not isinstance(adapter, Iterable):
            return [self.index(adapter)] * samples
        if isinstance(adapter, Tensor):
            adapter = adapter.tolist()
        adapter = list(adapter)
        if len(adapter) != samples:
            raise ConfigError(
                f"adapter has {len(adapter)} entries for {samples} samples; give one for each, or one name"
            )
        indices = [self.index(chosen) for chosen in adapter]
        numbers = {len(a.recipe.classes): name for i, (name, a) in enumerate(self._adapters.items()) if i in indices}
        if len(numbers) > 1:
            (few, one), (many, other) = sorted(numbers.items())[:2]
            raise ConfigError(
                f"adapter {one!r} has {few} classes and {other!r} has {many}, which is no one tensor of logits; "
                "call them apart"
            )
        return indices

    def _compile(self, toolbox: Toolbox, samples: int, gates: Tensor, indices: list[int] | None) -> Call:
        plan = dispatch.compile_gates(gates, adapters=indices, kinds=toolbox.rows)
        if gates.ndim == 3 and len(gates) != samples:
            raise ValueError(f"gates are of {len(gates)} samples, the batch has {samples}")
        if plan.layers != toolbox.depth:
            raise ValueError(f"gates are of {plan.layers} layers, the backbone has {toolbox.depth}")
        sites = {
            SiteId.of(kind, layer, *stream): plan.assignment(number, layer)
            for number, (kind, *stream) in enumerate(row.split(".") for row in toolbox.rows)
            for layer in range(toolbox.depth)
            if plan.is_on(number, layer)
        }
        self._check_sites(toolbox, sites, indices)
        columns = [indices or [0] * samples, *(whose for whose in sites.values() if whose)]
        order = sorted(range(samples), key=lambda b: [column[b] for column in columns])
        uses = {
            site: self._use(site, [whose[b] for b in order] if whose else [], indices is not None)
            for site, whose in sites.items()
        }
        heads = [(slice(0, samples), None)] if indices is None else _runs([indices[b] for b in order])
        return Call(uses, None if order == list(range(samples)) else order, heads)

    def _check_sites(self, toolbox: Toolbox, sites: Mapping[str, Sequence[int]], indices: list[int] | None) -> None:
        """Whether what is switched on is there, in the toolbox and in each sample's adapter."""
        names = list(self._adapters)
        for site, whose in sites.items():
            if site not in toolbox.sites:
                raise ValueError(f"gates switch on {site}, which this toolbox lacks; it has {some(toolbox.sites)}")
            for b, adapter in enumerate(whose if indices is not None else []):
                if adapter >= 0 and names[adapter] not in self._rows.get(site, []):
                    has = some(self._adapters[names[adapter]].plan.on) or "no sites"
                    raise ValueError(
                        f"gates switch on {site} of sample {b}, but its adapter {names[adapter]!r} has no weights for "
                        f"it; it has {has}"
                    )

    def _use(self, site: str, whose: list[int], stacked: bool) -> Use:
        """What a site does for samples in running order; whose is empty for a whole batch with the model's weights."""
        if not stacked:
            return Use(whose or None)
        names = list(self._adapters)
        stack, rows = self._stacks[site], self._rows[site]
        assigned = [rows.index(names[adapter]) if adapter >= 0 else -1 for adapter in whose]
        if len(set(assigned)) > 1:
            return Use(assigned, stack)
        return Use(None, {key: value[assigned[0]] for key, value in stack.items()})


def _table(gates: Gates) -> Tensor:
    try:
        return torch.as_tensor(gates)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"gates are no table [3, L] or [B, 3, L] of 0 and 1 ({error})") from error


def _runs(adapters: Sequence[int]) -> list[tuple[slice, int]]:
    """(samples, adapter) of neighbours with equal adapters."""
    starts = [b for b, adapter in enumerate(adapters) if b == 0 or adapter != adapters[b - 1]]
    ends = [*starts[1:], len(adapters)]
    return [(slice(start, end), adapters[start]) for start, end in zip(starts, ends, strict=True)]


def check_fit(network: Network, adapter: Adapter, backbone_sha256: str) -> None:
    """Whether an adapter was trained with this backbone and toolbox.

    Raises:
        CheckpointError: it was not; every difference is named with both values.
    """
    theirs, ours = adapter.config, network.config
    sizes = {
        "model.image_size": (theirs.model.image_size or theirs.data.crop, ours.model.image_size or ours.data.crop),
        "model.patch_size": (theirs.model.patch_size or network.backbone.patch, network.backbone.patch),
    }
    if adapter.backbone_sha256 != backbone_sha256:
        names = {"model.backbone": (theirs.model.backbone, ours.model.backbone)}
        bands = {"the number of bands": (len(adapter.recipe.bands), len(network.recipe.bands))}
        hashes = {"its sha256": (adapter.backbone_sha256[:12], backbone_sha256[:12])}
        why = _differences(names | sizes | bands) or _differences(hashes)
        raise CheckpointError(
            f"{adapter.source} was trained on another backbone: {'; '.join(why)}; adapters share one backbone"
        )
    values = {
        "model.tune": (theirs.model.tune, "frozen"),
        "model.features": (feature_layers(network.toolbox.depth, theirs.model.features), network.layers),
        "refiner.method": (theirs.refiner.method, "none"),
    }
    problems = _differences(values | sizes | _toolbox_values(theirs, ours))
    if unknown := [site for site in adapter.plan.on if site not in network.toolbox.sites]:
        problems.append(f"it has the sites {some(unknown)}, which the toolbox lacks")
    if others := [name for name in network.parts() if name not in ("toolbox", "head")]:
        problems.append(f"this model has a {others[0]}, which would change what every adapter sees")
    if problems:
        raise CheckpointError(f"{adapter.source} does not fit this model: {'; '.join(problems)}")


def _differences(values: Mapping[str, tuple[object, object]]) -> list[str]:
    """Key -> (theirs, ours) that differ, one text each."""
    return [f"{key} is {their}, not {our}" for key, (their, our) in values.items() if their != our]


def _toolbox_values(theirs: Config, ours: Config) -> dict[str, tuple[object, object]]:
    """Settings of the toolbox that change what weights mean; how weights were drawn does not."""
    pairs: dict[str, tuple[object, object]] = {}
    other = asdict(ours.toolbox)
    for key, value in asdict(theirs.toolbox).items():
        if isinstance(value, dict):
            pairs |= {f"toolbox.{key}.{k}": (v, other[key][k]) for k, v in value.items() if k != "init"}
        else:
            pairs[f"toolbox.{key}"] = (value, other[key])
    return pairs


def _build_head(network: Network, adapter: Adapter) -> nn.Module:
    with torch.random.fork_rng():
        return build_head(
            adapter.config.model.head, channels=network.vit.embed_dim, classes=len(adapter.config.data.classes)
        )
