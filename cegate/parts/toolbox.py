"""The toolbox: every kind on every layer of a frozen ViT, plugged in only where the plan says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from cegate.backbone.backbone import Backbone
from cegate.backbone.ports import Circuit, Plug
from cegate.config import ToolboxConfig
from cegate.errors import ConfigError, nearest
from cegate.gate import GatePlan
from cegate.parts import adapter, earth_adapter, lora  # noqa: F401 - they register their kinds
from cegate.parts.lora import Lora
from cegate.parts.part import KINDS, PLAIN, Part, Site, Tap, Use
from cegate.sites import PAPER_KINDS, SiteId, kinds

_TAPPED: ContextVar[tuple[int, Tap] | None] = ContextVar("tapped", default=None)
"""The toolbox (by id) that a tap listens to, in this thread alone."""


class Toolbox(Part):
    """Modules of all kinds on all layers of one ViT.

    A site that is off is not plugged in at all, so it costs nothing; ``apply`` changes which ones are. The state dict
    holds the sites only (``spatial.7.down_q`` ...), never the backbone.

    Args:
        backbone: the program of the ViT, which is frozen.
        config: kinds, ranks and widths.
        streams: names of modalities after the first, for sites of their own in each of them (``spatial.7.dsm``); the
            sites without a stream then serve the first alone.

    Raises:
        ConfigError: there is no such kind.
    """

    def __init__(self, backbone: Backbone, config: ToolboxConfig, streams: Sequence[str] = ()) -> None:
        super().__init__()
        backbone.vit.requires_grad_(False)
        self.backbone, self.streams = backbone, tuple(streams)
        self._merged: dict[nn.Parameter, Tensor] = {}
        self._sites: dict[SiteId, Site] = {}
        for kind in sorted(config.kinds, key=_place):
            sites = [KINDS[kind].build(SiteId.of(kind, layer), backbone, config) for layer in range(backbone.depth)]
            for stream in self.streams:
                for site in list(sites):
                    name = SiteId.of(kind, site.site.layer, stream)
                    site.add_module(stream, KINDS[kind].build(name, backbone, config))
            self.add_module(kind, nn.ModuleList(sites))
        self._sites = {m.site: m for m in self.modules() if isinstance(m, Site)}
        self.plan = GatePlan()
        self.apply(self.plan)

    @property
    def sites(self) -> list[SiteId]:
        """All site names in (kind, layer, stream) order."""
        return sorted(self._sites)

    @property
    def rows(self) -> list[str]:
        """The rows of a table of gates: the paper's kinds, whether the toolbox has them or not, its further kinds, and
        the same in further streams."""
        rows = list(dict.fromkeys((*PAPER_KINDS, *(site.kind for site in self.sites))))
        return [*rows, *(f"{kind}.{stream}" for stream in self.streams for kind in rows)]

    @property
    def depth(self) -> int:
        """Number of layers L of the backbone."""
        return self.backbone.depth

    def counts(self) -> dict[SiteId, int]:
        """Site -> number of weights."""
        return {name: self._sites[name].count() for name in self.sites}

    def parameters_of(self, site: str) -> dict[str, nn.Parameter]:
        """Weight name -> parameter of one site."""
        return self._sites[SiteId(site)].own_parameters()

    def parameters(self, recurse: bool = True, active_only: bool = False) -> Iterator[nn.Parameter]:
        """Weights of all sites, or only of those that learn."""
        if not active_only:
            yield from super().parameters(recurse)
            return
        for site in self.plan.active:
            yield from self._sites[site].own_parameters().values()

    # what runs ------------------------------------------------------------------------------------------------------

    def apply(self, plan: GatePlan) -> Toolbox:  # type: ignore[override]
        """Switch to a plan: its sites run, its active sites learn, every other site is out.

        A function in place of a plan is called with every module, as `torch.nn.Module.apply` does.

        Raises:
            ConfigError: the plan names a site that this toolbox lacks, or spatial sites are merged.
        """
        if callable(plan):
            return super().apply(plan)
        self.check(plan.on)
        if self._merged:
            raise ConfigError("spatial sites are merged into the backbone; call toolbox.unmerge() before another plan")
        for name, site in self._sites.items():
            learns = name in plan.active
            for parameter in site.own_parameters().values():
                parameter.requires_grad_(learns)
                if not learns:
                    parameter.grad = None
        self.plan = plan
        return self

    def check(self, sites: Iterable[str]) -> None:
        """Raise a ConfigError where there is no such site."""
        unknown = [site for site in sites if site not in self._sites]
        if unknown:
            raise ConfigError(f"site {unknown[0]!r} is not in this toolbox; it has {', '.join(self.sites)}")

    def plugs(self, uses: Mapping[str, Use] | None = None) -> list[Plug]:
        """The plugs of a call.

        Args:
            uses: site -> how it takes part; a site that is not named is off. Default: what the plan, or a tap that
                listens in this thread, says.

        Raises:
            ConfigError: there is no such site, sites are being scored, or spatial sites are merged.
        """
        tapped = _TAPPED.get()
        listens = tapped is not None and tapped[0] == id(self)
        if uses is not None:
            if listens:
                raise ConfigError("sites are being scored; measure Fisher scores without gates or adapters of samples")
            if self._merged:
                raise ConfigError("spatial sites are merged into the backbone; call toolbox.unmerge() first")
            self.check(uses)
        elif listens:
            uses = dict.fromkeys(self.sites, Use(tap=tapped[1]))
        else:
            merged = {site for site in self.plan.on if site.kind == "spatial"} if self._merged else ()
            uses = {site: PLAIN for site in self.plan.on if site not in merged}
        plugs = [(site, plug) for site in sorted(map(SiteId, uses)) for plug in self._sites[site].plugs(uses[site])]
        return [self._in_stream(site, plug) for site, plug in plugs]

    def _in_stream(self, site: SiteId, plug: Plug) -> Plug:
        """Let a plug act on the samples of its stream alone, where there are several."""
        if not self.streams:
            return plug
        place = ("", *self.streams).index(site.stream or "")

        def run(*arguments):
            *tensors, tokens = arguments
            mine = [_samples(tensor, tokens.streams)[place] for tensor in tensors]
            mine[-1] = _copy(mine[-1])  # it may be changed in place, which autograd does not follow through a view
            changed = plug.function(*mine, tokens._replace(streams=1))
            return _put(tensors[-1], tokens.streams, place, changed)

        return plug._replace(function=run)

    def state_of_plugs(self) -> object:
        """Equal as long as ``plugs()`` gives the same."""
        return self.plan, bool(self._merged), _TAPPED.get()

    def circuit(self) -> Circuit:
        """What a call of the ViT alone runs with."""
        return Circuit(self.plugs())

    @contextmanager
    def tapped(self, tap: Tap) -> Iterator[None]:
        """In this context and thread all sites are on and shown to ``tap``, and none of them collects gradients."""
        if self._merged:
            raise ConfigError("spatial sites are merged into the backbone; call toolbox.unmerge() before scoring")
        token = _TAPPED.set((id(self), tap))
        try:
            yield
        finally:
            _TAPPED.reset(token)

    # merging --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the spatial sites that are on into the frozen projections, for inference; ``unmerge`` undoes it.

        Raises:
            ConfigError: with several streams, of which each has sites of its own over shared projections.
        """
        if self.streams:
            raise ConfigError("sites of several streams share one projection and cannot be merged into it")
        for site in [] if self._merged else self.plan.on:
            module = self._sites[site]
            if isinstance(module, Lora):
                attn = self.backbone.vit.blocks[site.layer].attn
                for weight in _spatial_weights(attn):
                    self._merged[weight] = weight.detach().clone()
                module.merge(attn)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo ``merge`` bit by bit."""
        for weight, original in self._merged.items():
            weight.copy_(original)
        self._merged = {}

    def unwrap(self) -> nn.Module:
        """Give the ViT back as it was; the toolbox keeps its weights."""
        self.unmerge()
        self.apply(GatePlan())
        self.backbone.uninstall()
        return self.backbone.vit


def _place(kind: str) -> int:
    """Where a kind stands.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"toolbox.kinds: {kind!r} is unknown; use {', '.join(KINDS)}{nearest(kind, KINDS)}")
    return kinds().index(kind)


def _samples(tensor: Tensor | tuple, streams: int) -> list:
    if isinstance(tensor, Tensor):
        return list(tensor.chunk(streams))
    return list(zip(*(part.chunk(streams) for part in tensor), strict=True))


def _copy(tensor: Tensor | tuple) -> Tensor | tuple:
    return tensor.clone() if isinstance(tensor, Tensor) else tuple(map(_copy, tensor))


def _put(whole: Tensor | tuple, streams: int, place: int, changed: Tensor | tuple) -> Tensor | tuple:
    if isinstance(whole, Tensor):
        return torch.cat([changed if n == place else part for n, part in enumerate(whole.chunk(streams))])
    return tuple(_put(part, streams, place, new) for part, new in zip(whole, changed, strict=True))


def _spatial_weights(attn: nn.Module) -> list[nn.Parameter]:
    if getattr(attn, "qkv", None) is not None:
        return [attn.qkv.weight]
    return [attn.q_proj.weight, attn.v_proj.weight]


def wrap(vit: nn.Module, config: ToolboxConfig | None = None) -> Toolbox:
    """Put a toolbox on any timm ViT, in place and frozen; all sites start off until ``toolbox.apply(plan)``.

    ``vit(images)``, ``vit.forward_features`` and ``vit.forward_intermediates`` run with the sites; ``toolbox.unwrap()``
    gives the ViT back untouched.

    Raises:
        BackboneError: the blocks are of no form that is known; the block is named.
    """
    toolbox = Toolbox(Backbone(vit), config or ToolboxConfig())
    toolbox.backbone.install(toolbox.circuit)
    return toolbox
