"""The toolbox: every kind on every layer of a frozen ViT, hooked in only where the plan says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cegate.config import KINDS, ToolboxConfig
from cegate.errors import BackboneError, ConfigError
from cegate.gate import GatePlan, site_key
from cegate.toolbox.adapter import Adapter
from cegate.toolbox.base import Share, Site, Tap, TokenLayout
from cegate.toolbox.frequency import EarthAdapter
from cegate.toolbox.lora import Lora

BUILDERS = {
    "spatial": lambda layer, width, inner, config: Lora(layer, width, inner, config.spatial),
    "semantic": lambda layer, width, inner, config: Adapter(layer, width, config.semantic),
    "frequency": lambda layer, width, inner, config: EarthAdapter(layer, width, config.frequency),
}


class Toolbox(nn.Module):
    """Modules of all kinds on all layers of one ViT.

    A site that is off is not hooked in at all, so it costs nothing; ``apply`` changes which ones are. The state dict
    holds the sites only (``spatial.7.down_q`` ...), never the backbone.

    Args:
        vit: timm vision transformer with pre-norm blocks (norm1, attn, norm2, mlp); it is frozen.
        config: kinds, ranks and widths.

    Raises:
        BackboneError: the blocks have another form; the block is named.
    """

    def __init__(self, vit: nn.Module, config: ToolboxConfig) -> None:
        super().__init__()
        blocks = check_blocks(vit)
        vit.requires_grad_(False)
        self._vit = (vit,)  # a tuple, so that the backbone is no part of this module
        self._tokens = TokenLayout(prefix=getattr(vit, "num_prefix_tokens", 0))
        self._handles: list[RemovableHandle] = []
        self._hooked: tuple[str, ...] = ()
        self._shares: Mapping[str, Share] | None = None  # those in force
        self._unfused: list[nn.Module] = []
        self._merged: dict[nn.Parameter, Tensor] = {}
        width, inner = blocks[0].norm1.normalized_shape[0], _query_width(blocks[0].attn)
        for kind in sorted(config.kinds, key=KINDS.index):
            build = BUILDERS[kind]
            setattr(self, kind, nn.ModuleList(build(layer, width, inner, config) for layer in range(len(blocks))))
        self._sites: dict[str, Site] = {m.name: m for m in self.modules() if isinstance(m, Site)}
        self.plan = GatePlan()
        self.apply(self.plan)

    @property
    def sites(self) -> list[str]:
        """All site names in (kind, layer) order."""
        return sorted(self._sites, key=site_key)

    @property
    def depth(self) -> int:
        """Number of layers L of the backbone."""
        return len(self._vit[0].blocks)

    def counts(self) -> dict[str, int]:
        """Site -> number of weights."""
        return {name: self._sites[name].count() for name in self.sites}

    def parameters_of(self, site: str) -> dict[str, nn.Parameter]:
        """Weight name -> parameter of one site."""
        return dict(self._sites[site].named_parameters())

    def parameters(self, recurse: bool = True, active_only: bool = False) -> Iterator[nn.Parameter]:
        """Weights of all sites, or only of those that learn."""
        if not active_only:
            yield from super().parameters(recurse)
            return
        for site in self.plan.active:
            yield from self._sites[site].parameters()

    def apply(self, plan: GatePlan) -> Toolbox:  # type: ignore[override]
        """Switch to a plan: its sites run, its active sites learn, every other site is unhooked.

        A function in place of a plan is called with every module, as `torch.nn.Module.apply` does.

        Raises:
            ConfigError: the plan names a site that this toolbox lacks, or spatial sites are merged.
        """
        if callable(plan):
            return super().apply(plan)
        self._check(plan.on)
        self._unhook()
        for name, site in self._sites.items():
            learns = name in plan.active
            for parameter in site.parameters():
                parameter.requires_grad_(learns)
                if not learns:
                    parameter.grad = None
        self.plan = plan
        self._hook(plan.on)
        return self

    def _check(self, sites: Iterable[str]) -> None:
        """Whether the sites can be switched on now."""
        unknown = [site for site in sites if site not in self._sites]
        if unknown:
            raise ConfigError(f"site {unknown[0]!r} is not in this toolbox; it has {', '.join(self.sites)}")
        if self._merged:
            raise ConfigError("spatial sites are merged into the backbone; call toolbox.unmerge() before another plan")
        if self._shares is not None:
            raise ConfigError("a call with gates or adapters of its own is running; let it end before another plan")

    @contextmanager
    def dispatched(self, shares: Mapping[str, Share]) -> Iterator[None]:
        """Run other sites, on some samples only or with other weights, than the plan says; then the plan again.

        What learns stays as it is: a site learns where it is active in the plan and runs here.

        Args:
            shares: site -> what it does; a site that is not named is off.

        Raises:
            ConfigError: there is no such site, spatial sites are merged, scores are being measured, or another such
                call is running (one thread at a time).
        """
        self._check(shares)
        if any(site.tap is not None for site in self._sites.values()):
            raise ConfigError("sites are being scored; measure Fisher scores without gates or adapters of samples")
        planned = self._hooked
        try:
            self._shares = shares
            for name, share in shares.items():
                self._sites[name].share = share
            self._rehook(tuple(sorted(shares, key=site_key)))
            yield
        finally:
            for name in shares:
                self._sites[name].share = Share()
            self._rehook(planned)
            self._shares = None

    def _rehook(self, sites: tuple[str, ...]) -> None:
        if sites != self._hooked:
            self._unhook()
            self._hook(sites)

    def _hook(self, sites: tuple[str, ...]) -> None:
        vit = self._vit[0]
        self._hooked = sites
        if any(site.startswith("frequency.") for site in sites):
            self._handles.append(vit.patch_embed.register_forward_pre_hook(self._note_grid))
        # in (kind, layer) order: the semantic delta is part of what the frequency site of its block sees
        for name in sites:
            site = self._sites[name]
            block = vit.blocks[site.layer]
            if site.kind == "spatial" and _bypasses_qkv(block.attn):
                block.attn.qkv_bias_separate = True
                self._unfused.append(block.attn)
            self._handles += site.attach(block, self._tokens)

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        for attn in self._unfused:
            attn.qkv_bias_separate = False
        self._handles, self._unfused, self._hooked = [], [], ()

    def _note_grid(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self._tokens.grid = tuple(module.dynamic_feat_size(args[0].shape[-2:]))

    @contextmanager
    def tapped(self, tap: Tap) -> Iterator[None]:
        """All sites on and shown to ``tap``, none collecting gradients; plan and gradients are as before afterwards."""
        plan = self.plan
        kept = {p: (p.requires_grad, p.grad) for p in self.parameters()}
        self.apply(GatePlan(frozen=self.sites))
        for site in self._sites.values():
            site.tap = tap
        try:
            yield
        finally:
            for site in self._sites.values():
                site.tap = None
            self.apply(plan)
            for parameter, (learns, grad) in kept.items():
                parameter.requires_grad_(learns)
                parameter.grad = grad

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the spatial sites that are on into the frozen projections, for inference; ``unmerge`` undoes it."""
        if self._merged:
            return
        self._unhook()
        for name in self.plan.on:
            site = self._sites[name]
            if isinstance(site, Lora):
                attn = self._vit[0].blocks[site.layer].attn
                for weight in _spatial_weights(attn):
                    self._merged[weight] = weight.detach().clone()
                site.merge(attn)
        self._hook(tuple(name for name in self.plan.on if not name.startswith("spatial.")))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo ``merge`` bit by bit."""
        for weight, original in self._merged.items():
            weight.copy_(original)
        self._merged = {}
        self._unhook()
        self._hook(self.plan.on)

    def unwrap(self) -> nn.Module:
        """Remove every hook and give the ViT back as it was; the toolbox keeps its weights."""
        self.unmerge()
        self.apply(GatePlan())
        return self._vit[0]


def check_blocks(vit: nn.Module) -> nn.ModuleList:
    """Return the blocks of a timm ViT that the toolbox can serve.

    Raises:
        BackboneError: no plain pre-norm transformer; what is missing is named.
    """
    blocks = getattr(vit, "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks):
        raise BackboneError(f"{type(vit).__name__} has no list of blocks; use a timm vision transformer")
    if hasattr(vit, "blocks_token_only"):
        raise BackboneError(f"{type(vit).__name__} keeps its class token out of the first blocks; use a plain ViT")
    for index, block in enumerate(blocks):
        if hasattr(block, "window_size"):
            raise BackboneError(
                f"block {index} of {type(vit).__name__} sees its tokens as a map, in windows; use a ViT whose blocks "
                "take [B, tokens, C] (DINOv2, DINOv3, MAE, DeiT, AugReg, EVA-02)"
            )
        missing = [part for part in ("norm1", "attn", "norm2", "mlp") if not hasattr(block, part)]
        attn = getattr(block, "attn", None)
        if not missing and not (hasattr(attn, "qkv") or (hasattr(attn, "q_proj") and hasattr(attn, "v_proj"))):
            missing = ["attn.qkv or attn.q_proj"]
        if missing or "Post" in type(block).__name__:
            why = f"has no {', '.join(missing)}" if missing else "normalises after its parts"
            raise BackboneError(
                f"block {index} of {type(vit).__name__} ({type(block).__name__}) {why}; "
                "use a ViT with pre-norm blocks (DINOv2, DINOv3, MAE, DeiT, AugReg, EVA-02)"
            )
    if not hasattr(getattr(vit, "patch_embed", None), "dynamic_feat_size"):
        raise BackboneError(f"the patch embedding of {type(vit).__name__} does not tell its grid; use a plain ViT")
    return blocks


def _bypasses_qkv(attn: nn.Module) -> bool:
    # with a bias of its own, timm's EVA attention multiplies by qkv.weight and never calls the module, nor its hooks
    return getattr(attn, "qkv_bias_separate", None) is False and getattr(attn, "q_bias", None) is not None


def _spatial_weights(attn: nn.Module) -> list[nn.Parameter]:
    if getattr(attn, "qkv", None) is not None:
        return [attn.qkv.weight]
    return [attn.q_proj.weight, attn.v_proj.weight]


def _query_width(attn: nn.Module) -> int:
    if getattr(attn, "qkv", None) is not None:
        return attn.qkv.out_features // 3
    return attn.q_proj.out_features


def wrap(vit: nn.Module, config: ToolboxConfig | None = None) -> Toolbox:
    """Put a toolbox on any timm ViT, in place and frozen; all sites start off until ``toolbox.apply(plan)``."""
    return Toolbox(vit, config or ToolboxConfig())
