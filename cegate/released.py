"""Released checkpoints by name: what is in a file of Rein, CrossEarth or Earth-Adapter, and what it is called here.

Nothing is read or written; tensors by name go in, tensors by name and an account of every key come out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cegate.errors import CheckpointError

# mmdet's Mask2Former -> transformers' below our head; {n} is a layer's number, (w) weight or bias
_PIXEL, _LAYERS = "decoder.pixel_decoder.", "decoder.transformer.decoder.layers."
_HEAD_RULES: tuple[tuple[str, str], ...] = (
    (r"pixel_decoder\.input_convs\.(\d+)\.conv\.(\w+)", _PIXEL + r"input_projections.\1.0.\2"),
    (r"pixel_decoder\.input_convs\.(\d+)\.gn\.(\w+)", _PIXEL + r"input_projections.\1.1.\2"),
    (r"pixel_decoder\.encoder\.layers\.(\d+)\.self_attn\.(\w+\.\w+)", _PIXEL + r"encoder.layers.\1.self_attn.\2"),
    (r"pixel_decoder\.encoder\.layers\.(\d+)\.ffn\.layers\.0\.0\.(\w+)", _PIXEL + r"encoder.layers.\1.fc1.\2"),
    (r"pixel_decoder\.encoder\.layers\.(\d+)\.ffn\.layers\.1\.(\w+)", _PIXEL + r"encoder.layers.\1.fc2.\2"),
    (r"pixel_decoder\.encoder\.layers\.(\d+)\.norms\.0\.(\w+)", _PIXEL + r"encoder.layers.\1.self_attn_layer_norm.\2"),
    (r"pixel_decoder\.encoder\.layers\.(\d+)\.norms\.1\.(\w+)", _PIXEL + r"encoder.layers.\1.final_layer_norm.\2"),
    (r"pixel_decoder\.level_encoding\.weight", _PIXEL + r"level_embed"),
    (r"pixel_decoder\.lateral_convs\.0\.conv\.(\w+)", _PIXEL + r"adapter_1.0.\1"),
    (r"pixel_decoder\.lateral_convs\.0\.gn\.(\w+)", _PIXEL + r"adapter_1.1.\1"),
    (r"pixel_decoder\.output_convs\.0\.conv\.(\w+)", _PIXEL + r"layer_1.0.\1"),
    (r"pixel_decoder\.output_convs\.0\.gn\.(\w+)", _PIXEL + r"layer_1.1.\1"),
    (r"pixel_decoder\.mask_feature\.(\w+)", _PIXEL + r"mask_projection.\1"),
    (r"transformer_decoder\.layers\.(\d+)\.(self|cross)_attn\.attn\.(.+)", _LAYERS + r"\1.\2_attn.\3"),
    (r"transformer_decoder\.layers\.(\d+)\.ffn\.layers\.0\.0\.(\w+)", _LAYERS + r"\1.fc1.\2"),
    (r"transformer_decoder\.layers\.(\d+)\.ffn\.layers\.1\.(\w+)", _LAYERS + r"\1.fc2.\2"),
    (r"transformer_decoder\.layers\.(\d+)\.norms\.0\.(\w+)", _LAYERS + r"\1.cross_attn_layer_norm.\2"),
    (r"transformer_decoder\.layers\.(\d+)\.norms\.1\.(\w+)", _LAYERS + r"\1.self_attn_layer_norm.\2"),
    (r"transformer_decoder\.layers\.(\d+)\.norms\.2\.(\w+)", _LAYERS + r"\1.final_layer_norm.\2"),
    (r"transformer_decoder\.post_norm\.(\w+)", r"decoder.transformer.decoder.layernorm.\1"),
    (r"query_embed\.weight", r"decoder.transformer.queries_embedder.weight"),
    (r"query_feat\.weight", r"decoder.transformer.queries_features.weight"),
    (r"querys2feat\.(\w+)", r"decoder.transformer.queries_features.change.\1"),
    (r"level_embed\.weight", r"decoder.transformer.level_embed.weight"),
    (r"cls_embed\.(\w+)", r"decoder.class_predictor.\1"),
    (r"mask_embed\.0\.(\w+)", r"decoder.transformer.decoder.mask_predictor.mask_embedder.0.0.\1"),
    (r"mask_embed\.2\.(\w+)", r"decoder.transformer.decoder.mask_predictor.mask_embedder.1.0.\1"),
    (r"mask_embed\.4\.(\w+)", r"decoder.transformer.decoder.mask_predictor.mask_embedder.2.0.\1"),
)
_REIN = {
    "learnable_tokens_a": "token_a",
    "learnable_tokens_b": "token_b",
    "mlp_token2feat": "token_mlp",
    "mlp_delta_f": "patch_mlp",
    "transform": "query_mlp",
    "merge": "query_merge",
    "scale": "scale",
}
# what a file may hold that no prediction needs, or that is written elsewhere
_LEFT = (
    ("task_head.", "restores masked images, in training only"),
    ("mask_token", "fills masked images, in training only"),
    ("augmentor.", "style networks, in training only"),
    ("backbone.mask_token", "of DINOv2's own pretraining"),
    ("backbone.refine_feat.layer_norm.", "never used by the published code"),
    ("backbone.refine_feat.refine_token", "never used by the published code"),
)
BACKBONES = {
    (384, 12): "vit_small_patch14_dinov2",
    (768, 12): "vit_base_patch14_dinov2",
    (1024, 24): "vit_large_patch14_dinov2",
    (1536, 40): "vit_giant_patch14_dinov2",
}
"""(width, depth) -> timm's name of the DINOv2 that released files are on."""
ONLY_DIRECT = -1e4
"""Router bias of the two filtered experts where Earth-Adapter has a plain adapter: their share is exactly 0."""


@dataclass
class Account:
    """What became of every key of a file, and of every weight that was needed."""

    used: dict[str, list[str]] = field(default_factory=dict)
    """Key of the file -> names here."""
    left: dict[str, str] = field(default_factory=dict)
    """Key of the file -> why it was left."""
    filled: dict[str, str] = field(default_factory=dict)
    """Name here that the file does not have -> what stands there."""
    missing: list[str] = field(default_factory=list)
    """Names here that nothing gave."""
    unknown: list[str] = field(default_factory=list)
    """Keys of the file that are of no part known here."""

    def summary(self) -> list[str]:
        """A line for each group of keys."""
        lines = [f"used {len(self.used)} keys: {groups(self.used)}"]
        for reason in dict.fromkeys(self.left.values()):
            keys = [key for key, why in self.left.items() if why == reason]
            lines.append(f"left {len(keys)} keys, {groups(keys)}: {reason}")
        for reason in dict.fromkeys(self.filled.values()):
            names = [name for name, why in self.filled.items() if why == reason]
            lines.append(f"filled {len(names)} weights, {', '.join(names)}: {reason}")
        lines += [f"missing {len(self.missing)} weights: {groups(self.missing)}"] if self.missing else []
        return lines


@dataclass
class Converted:
    """Weights of a released file by their names here."""

    kind: str
    """``rein``, ``earth_adapter`` or ``backbone``."""
    weights: dict[str, Tensor]
    """``head.*``, ``refiner.*``, ``toolbox.<site>.*``."""
    account: Account
    backbone: dict[str, Tensor]
    """Weights of the ViT that the file holds; empty where it holds none."""
    style: dict[str, Tensor]
    """``predictor.*`` and ``transfer.*`` of style networks that the file holds."""
    sites: list[str] = field(default_factory=list)
    """Sites that are on."""

    @property
    def classes(self) -> int:
        """K of the head."""
        return len(self.weights["head.decoder.class_predictor.bias"]) - 1


def groups(keys: Iterable[str]) -> str:
    """Keys by their first two parts, counted: ``decode_head.pixel_decoder (78), ...``."""
    counts: dict[str, int] = {}
    for key in keys:
        group = ".".join(key.split(".")[:2])
        counts[group] = counts.get(group, 0) + 1
    return ", ".join(f"{group} ({count})" if count > 1 else group for group, count in counts.items())


def recognise(state: Mapping[str, Tensor], where: str) -> str:
    """The kind of file: ``rein`` (Rein and CrossEarth), ``earth_adapter`` or ``backbone`` (a DINOv2).

    Raises:
        CheckpointError: another kind; it is named.
    """
    keys = list(state)
    has = lambda *starts: any(key.startswith(starts) for key in keys)  # noqa: E731
    inner = [key.removeprefix("backbone.") for key in keys if not key.startswith("decode_head.")]
    refused = ""
    # stripped of its backbone such a file shows no key that tells, but its name does
    named = re.search(r"(^|[-_.])mtp([-_.]|$)", where.rsplit("/", 1)[-1].lower())
    if named or any(".sampling_" in key or "rel_pos" in key for key in inner):
        refused = "it has another backbone, RVSA (MTP), which cegate does not run"
    elif has("image_encoder.", "sam.", "backbone.image_encoder."):
        refused = "it holds a SAM encoder, not a DINOv2"
    elif has("toolbox.", "refiner."):
        refused = "these are weights of cegate itself; load the adapter folder with cegate.load"
    elif has("backbone.stages.", "backbone.layer1.", "backbone.patch_embed1.", "backbone.downsample_layers."):
        refused = "its backbone is no plain vision transformer"
    if not refused:
        if has("backbone.refine_feat."):
            return "earth_adapter"
        if has("backbone.reins."):
            return "rein"
        if {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= set(inner) and not has("decode_head."):
            return "backbone"
        refused = f"its keys are {groups(keys)[:200] or 'none'}"
    raise CheckpointError(
        f"{where} cannot be converted: {refused}; expected a checkpoint of Rein, CrossEarth or Earth-Adapter "
        "(backbone.reins.* or backbone.refine_feat.*, decode_head.*), or a DINOv2 backbone (blocks.*.attn.qkv.*)"
    )


def convert(
    state: Mapping[str, Tensor], where: str, *, fft_layers: Sequence[int] | None = None, leave: Sequence[str] = ()
) -> Converted:
    """Rename everything in a file.

    Args:
        state: tensors by their published names.
        where: the file, for messages.
        fft_layers: Earth-Adapter: the layers with a mixture of frequency experts, ``fft_layer`` in its configuration;
            the others have a plain adapter. The weights do not tell.
        leave: beginnings of further keys to leave.

    Raises:
        CheckpointError: another kind of file, keys that are not known, or parts that are missing; they are named.
    """
    kind = recognise(state, where)
    account = Account()
    if kind == "backbone":
        return Converted(kind, {}, account, _backbone(state, "", account), {})
    weights = _head(state, account)
    sites: list[str] = []
    if kind == "rein":
        weights |= _rein(state, account)
        _link(weights, account, where)
    else:
        found = _earth_adapter(state, account, fft_layers, where)
        weights |= found
        sites = list(dict.fromkeys(".".join(name.split(".")[1:3]) for name in found))
    classes = weights.get("head.decoder.class_predictor.bias")
    if classes is not None:
        no_object = torch.ones(len(classes))
        no_object[-1] = 0.1
        weights["head.criterion.empty_weight"] = no_object
        account.filled["head.criterion.empty_weight"] = "class weights of the loss, 1 and 0.1 for no object"
    held = any(key.startswith("backbone.blocks.") for key in state)
    backbone = _backbone(state, "backbone.", account) if held else {}
    style = _style(state)
    _leave(state, account, (*leave,))
    if account.unknown:
        raise CheckpointError(
            f"{where}: no part known here has {groups(account.unknown)} (first: {account.unknown[0]}); check the file, "
            "or name the beginnings of keys to leave with --leave"
        )
    return Converted(kind, weights, account, backbone, style, sites)


def head_name(name: str) -> str | None:
    """Our name of a weight of mmdet's Mask2Former head (without ``decode_head.``), ``None`` where it has none.

    The three projections of a self-attention come apart: their name here ends in ``in_proj_weight`` or ``in_proj_bias``
    still.
    """
    for pattern, ours in _HEAD_RULES:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    return None


def _head(state: Mapping[str, Tensor], account: Account) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        name = head_name(key.removeprefix("decode_head.")) if key.startswith("decode_head.") else None
        if name is None:
            continue
        parts = {name: value}
        if ".self_attn.in_proj_" in name:
            stem, ending = name.split("in_proj_")
            parts = {f"{stem}{p}_proj.{ending}": v for p, v in zip("qkv", value.chunk(3), strict=True)}
        weights |= {f"head.{part}": v for part, v in parts.items()}
        account.used[key] = [f"head.{part}" for part in parts]
    return weights


def _rein(state: Mapping[str, Tensor], account: Account) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        if not key.startswith("backbone.reins."):
            continue
        module, dot, rest = key.removeprefix("backbone.reins.").partition(".")
        if module == "learnable_tokens":  # full tokens are a product, too: T = 1 T
            layers, tokens = value.shape[:2]
            identity = torch.eye(tokens, dtype=value.dtype).expand(layers, -1, -1)
            parts = {"refiner.token_a": identity.clone(), "refiner.token_b": value}
        elif module in _REIN:
            parts = {f"refiner.{_REIN[module]}{dot}{rest}": value}
        else:
            continue
        weights |= parts
        account.used[key] = list(parts)
    if "refiner.scale" in weights:
        weights["refiner.scale"] = weights["refiner.scale"].reshape(())
    return weights


def _link(weights: dict[str, Tensor], account: Account, where: str) -> None:
    """Our head beside Rein has both tables of its own, which serve while the refiner is off; released heads have
    none."""
    tables = "head.decoder.transformer.queries_{}.{}"
    linked = tables.format("features", "change.weight") in weights
    if not linked:
        own = tables.format("features", "weight") in weights
        raise CheckpointError(
            f"{where}: decode_head.querys2feat is missing{', and query_feat is there' if own else ''}: its queries are "
            "not those of Rein's tokens, which cegate's head takes; only heads with replace_query_feat=True fit"
        )
    tokens, width = weights["refiner.token_a"].shape[1], len(weights[tables.format("features", "change.weight")])
    for part in ("embedder", "features"):
        name, table = tables.format(part, "weight"), tables.format(part, "table.weight")
        if name in weights:
            weights[table] = weights.pop(name)
            account.used |= {key: [table] for key, names in account.used.items() if names == [name]}
        else:
            weights[table] = torch.zeros(tokens, width)
            account.filled[table] = "0: queries come from Rein's tokens"


def _earth_adapter(
    state: Mapping[str, Tensor], account: Account, fft_layers: Sequence[int] | None, where: str
) -> dict[str, Tensor]:
    prefix = "backbone.refine_feat."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if "scale" not in own or "mlp_list1.0.0.weight" not in own:
        raise CheckpointError(f"{where} is no Earth-Adapter: {prefix}scale or {prefix}mlp_list1.0.0.weight is missing")
    depth, width = len(own["scale"]), own["mlp_list1.0.0.weight"].shape[1]
    mixed = "router.0.weight" in own
    if mixed and fft_layers is None:
        raise CheckpointError(
            f"{where}: which of its {depth} layers mix frequencies is not in the weights; give --fft_layers as "
            "fft_layer of its configuration has it, e.g. --fft_layers 0,1,2,3,4,5"
        )
    if own["mlp_list1.0.0.weight"].shape[1] != own["mlp_list1.0.2.weight"].shape[0]:
        raise CheckpointError(f"{where}: Earth-Adapter with tokens (with_token=True) is not supported")
    layers = set(fft_layers or ()) if mixed else set()
    if not layers <= set(range(depth)):
        raise CheckpointError(f"--fft_layers {sorted(layers)} are not all among the layers 0..{depth - 1} of {where}")
    weights: dict[str, Tensor] = {}

    def take(name: str, ours: str) -> Tensor:
        if name not in own:
            raise CheckpointError(f"{where}: {prefix}{name} is missing")
        account.used.setdefault(prefix + name, []).append(ours)
        return own[name]

    for layer in range(depth):
        site = f"toolbox.frequency.{layer}."
        experts = (1, 2, 3) if mixed else (1,)
        for ours, part in (("down", "0.weight"), ("down_bias", "0.bias"), ("up", "2.weight"), ("up_bias", "2.bias")):
            stacked = [take(f"mlp_list{expert}.{layer}.{part}", site + ours) for expert in experts]
            weights[site + ours] = torch.stack(stacked + [torch.zeros_like(stacked[0])] * (3 - len(stacked)))
        if layer in layers:
            weights[site + "router"] = take(f"router.{layer}.weight", site + "router")
            weights[site + "router_bias"] = take(f"router.{layer}.bias", site + "router_bias")
        else:
            weights[site + "router"] = torch.zeros(3, width)
            weights[site + "router_bias"] = torch.tensor([0.0, ONLY_DIRECT, ONLY_DIRECT])
            reason = "a plain adapter: the direct expert alone"
            account.filled |= {site + name: reason for name in ("router", "router_bias")}
            for name in (f"router.{layer}.weight", f"router.{layer}.bias"):
                if name in own:
                    account.left[prefix + name] = "router of a layer without frequency experts"
        weights[site + "scale"] = take("scale", site + "scale")[layer].reshape(())
    return weights


def _backbone(state: Mapping[str, Tensor], prefix: str, account: Account) -> dict[str, Tensor]:
    """Weights of the ViT below a prefix (or below ``backbone.``), without what is plugged into it."""
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix(prefix or "backbone.")
        if not key.startswith(prefix) or name.startswith(("reins.", "refine_feat.")):
            continue
        if name == "mask_token":
            account.left[key] = "of DINOv2's own pretraining"
        else:
            weights[name] = value
            account.used[key] = [f"vit.{name}"]
    return weights


def _style(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = (("augmentor.stylePredictor.", "predictor."), ("augmentor.ghiasi.", "transfer."))
    return {
        ours + key.removeprefix(theirs): v
        for theirs, ours in named
        for key, v in state.items()
        if key.startswith(theirs)
    }


def _leave(state: Mapping[str, Tensor], account: Account, leave: Sequence[str]) -> None:
    reasons = (*_LEFT, *((start, "as asked by --leave") for start in leave))
    for key in state:
        if key in account.used or key in account.left:
            continue
        reason = next((why for start, why in reasons if key.startswith(start)), None)
        if (
            reason is None
            and key.startswith("backbone.")
            and not key.startswith(("backbone.reins.", "backbone.refine_feat."))
        ):
            reason = "of a backbone that is not whole"
        if reason is None:
            account.unknown.append(key)
        else:
            account.left[key] = reason
