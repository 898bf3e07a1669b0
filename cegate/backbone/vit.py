"""The frozen vision transformer: any timm ViT at the wanted patch and image size, its weights checked."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import timm
import torch
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from cegate.backbone.backbone import Backbone
from cegate.backbone.hub import quick_hub
from cegate.backbone.resample import resample_plain
from cegate.backbone.sam import create_sam, forget_relative_positions, from_sam_names
from cegate.errors import BackboneError, nearest, refuse_unreadable

log = logging.getLogger(__name__)

TINY = "tiny"
TINY_WEIGHTS = "tiny.safetensors"
HEAD_KEYS = ("head.", "head_dist.", "fc_norm.")  # classifiers, which no feature passes
DEPTH_SHARES = (1 / 3, 1 / 2, 2 / 3, 1.0)  # layers 8, 12, 16 and 24 of 24: CrossEarth-Gate, section 4.1


def build_vit(
    name: str,
    *,
    weights: str = "auto",
    image_size: int,
    patch_size: int | None = None,
    in_chans: int = 3,
    resample: str = "timm",
    official_relpos: bool = False,
) -> nn.Module:
    """Build a frozen timm vision transformer.

    Args:
        name: timm model name, or ``tiny``.
        weights: ``auto`` (timm's hub; the shipped file for ``tiny``), ``none`` (random), or a .pth / .safetensors path.
        image_size: side in pixels that fixes the position grid; position embeddings are resampled to it. Other sizes
            still run where the model supports them.
        patch_size: patch side in pixels to which the patch embedding is resampled; ``None`` keeps the model's own.
        in_chans: bands of the input; the patch embedding of pretrained weights is adapted when it is not 3.
        resample: how both embeddings come to another size: ``timm`` (pseudo-inverse kernel, antialiased positions), or
            ``plain`` (bicubic, as the published DINOv2 conversions).
        official_relpos: SAM without its relative positions, as MFNet's published code has it.

    Returns:
        The model in evaluation mode; no parameter requires a gradient.

    Raises:
        BackboneError: unknown name, an architecture that the toolbox cannot serve, unsuitable size, unreachable hub, or
            weights that do not fit; keys are named.
    """
    plain = resample == "plain" and weights == "auto" and name != TINY
    vit = _create(name, weights == "auto" and not plain, image_size, patch_size, in_chans)
    if image_size < (patch := Backbone(vit).patch):
        raise BackboneError(f"{image_size} px are less than a patch of {patch}; use a larger data.crop")
    if weights == "none":
        log.warning("backbone %s has RANDOM weights (model.weights=none)", name)
    elif name == TINY and weights == "auto":
        with resources.as_file(resources.files("cegate") / "weights" / TINY_WEIGHTS) as path:
            load_weights(vit, path, name, resample=resample)
    elif weights != "auto":
        load_weights(vit, Path(weights), name, resample=resample)
    elif plain:
        native = _create(name, True, None, None, 3)  # at its own sizes: timm would resample its own way
        _load_state(vit, native.state_dict(), f"timm's weights of {name}", name, resample)
    if official_relpos:
        if not isinstance(vit, VisionTransformerSAM):
            raise BackboneError(f"model.official_relpos=true is for SAM's encoders, not {name}; leave it out")
        forget_relative_positions(vit)
    return vit.eval().requires_grad_(False)


def _create(name: str, pretrained: bool, image_size: int | None, patch_size: int | None, in_chans: int) -> nn.Module:
    if name == TINY:
        return tiny_vit(image_size, patch_size or 8, in_chans)
    if not timm.is_model(name):
        raise BackboneError(f"model.backbone={name!r} is neither tiny nor a timm model{_near_vits(name)}")
    if pretrained:
        with quick_hub() as absence:
            return _create_known(name, True, image_size, patch_size, in_chans, absence)
    return _create_known(name, False, image_size, patch_size, in_chans)


def _create_known(
    name: str, pretrained: bool, image_size: int | None, patch_size: int | None, in_chans: int, absence: str = ""
) -> nn.Module:
    own_size = timm.get_pretrained_cfg(name).input_size[-1] if timm.get_pretrained_cfg(name) else None
    options: dict[str, object] = {"in_chans": in_chans, "num_classes": 0}
    options |= {key: v for key, v in (("img_size", image_size), ("patch_size", patch_size)) if v is not None}
    try:
        if name.startswith("samvit"):
            return create_sam(name, pretrained=pretrained, in_chans=in_chans, patch_size=patch_size)
        if pretrained:
            _refuse_unsuited(name, options)
        return _create_any_size(name, pretrained, options)
    except (OSError, RuntimeError) as error:  # the hub, or weights that do not fit
        if not pretrained:
            raise BackboneError(f"cannot build {name} at image_size={image_size}: {_line(error)}") from error
        raise BackboneError(
            f"weights of {name} cannot be had from timm's hub ({absence or _line(error)}); connect to the network "
            "once, give model.weights a file (cegate predict: --weights FILE), or 'none' for random weights"
        ) from error
    except (TypeError, ValueError, AssertionError) as error:
        if isinstance(error, BackboneError):
            raise
        if "'img_size'" in str(error):
            raise BackboneError(f"model.backbone={name!r} is no vision transformer{_near_vits(name)}") from error
        own = f" (its own image size is {own_size})" if own_size else ""
        raise BackboneError(
            f"cannot build {name} with image_size={image_size}, patch_size={patch_size}{own}: {_line(error)}"
        ) from error


def _refuse_unsuited(name: str, options: dict[str, object]) -> None:
    """Whether an architecture can be served, before its weights are looked for; without memory for its weights."""
    with torch.device("meta"):
        try:
            vit = _create_any_size(name, False, options)
        except RuntimeError:  # some models compute with their weights while they are made; they are checked later
            return
    Backbone(vit)


def _near_vits(name: str) -> str:
    """Vision transformers that hold every part of a name, shortest first, else the one spelt most alike."""
    vits = [TINY, *timm.list_models(module="vision_transformer")]
    parts = re.findall(r"[a-z0-9]+", name.lower())
    holding = sorted((vit for vit in vits if all(part in vit for part in parts)), key=lambda vit: (len(vit), vit))
    return f"; did you mean {' or '.join(map(repr, holding[:2]))}?" if holding else nearest(name, vits)


def _create_any_size(name: str, pretrained: bool, options: dict[str, object]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, dynamic_img_size=True, **options)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
        return timm.create_model(name, pretrained=pretrained, **options)


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def tiny_vit(image_size: int, patch_size: int = 8, in_chans: int = 3) -> VisionTransformer:
    """The ViT that ships with cegate: width 128, 8 layers, no class token; scripts/pretrain_tiny.py remakes it."""
    return VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=0,
        global_pool="",
        embed_dim=128,
        depth=8,
        num_heads=4,
        class_token=False,
        dynamic_img_size=True,
    )


def load_weights(vit: nn.Module, path: Path, name: str = "this backbone", *, resample: str = "timm") -> None:
    """Load a weight file, resampling patch and position embeddings to the model's sizes.

    Args:
        vit: the model.
        path: .pth or .safetensors file.
        name: of the backbone, for messages.
        resample: as in `build_vit`.

    Raises:
        BackboneError: missing file, unreadable file, or keys or shapes that do not fit (they are named).
    """
    _load_state(vit, _read_weights(path), path, name, resample)


def _load_state(vit: nn.Module, given: Mapping[str, object], path: Path | str, name: str, resample: str) -> None:
    own = {key: value for key, value in vit.state_dict().items() if not key.startswith(HEAD_KEYS)}
    try:
        state = _converted(given, vit, resample)
    except BackboneError as error:
        raise BackboneError(f"{path} does not fit the backbone {name}: {error}") from error
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        # timm's conversion stumbles over weights of another architecture; resampling changes the two embeddings alone
        resampled = ("patch_embed.proj.weight", "pos_embed")
        problems = _misfits(given, {key: value for key, value in own.items() if key not in resampled})
        raise _unfit(path, name, problems or [_line(error)]) from error
    # intermediate features never pass the final norm, and some conversions drop it
    state = {key: own[key] for key in ("norm.weight", "norm.bias") if key in own} | state
    if problems := _misfits(state, own):
        raise _unfit(path, name, problems)
    vit.load_state_dict(state, strict=False)


def _read_weights(path: Path) -> dict[str, object]:
    """What a weight file holds, by name."""
    if not path.is_file():
        is_what = "is no file" if path.exists() else "does not exist"
        raise BackboneError(
            f"model.weights={path} {is_what}; give a .pth or .safetensors file, 'auto' or 'none'; where the file of "
            "the training lies elsewhere now: --weights FILE, or cegate.load(folder, weights=FILE)"
        )
    refuse_unreadable(path, BackboneError)
    try:
        return timm.models.load_state_dict(str(path), weights_only=True)  # a pickle could run anything
    except Exception as error:  # torch raises whatever the pickle or zip reader raises
        raise BackboneError(
            f"{path} is no weight file that PyTorch or safetensors reads ({type(error).__name__}); give a .pth or "
            ".safetensors file of weights by name and nothing else: a pickled object is never run"
        ) from error


def _converted(state: dict[str, object], vit: nn.Module, resample: str) -> dict[str, Tensor]:
    """Weights by the model's names, without classifiers, embeddings resampled."""
    if isinstance(vit, VisionTransformerSAM):
        if any(key.startswith("image_encoder.") for key in state):
            state = from_sam_names(state, vit)
    elif resample == "plain":
        state = resample_plain(state, patch=vit.patch_embed.patch_size[0], grid=vit.patch_embed.grid_size)
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, vit)
    state = {key: value for key, value in state.items() if not key.startswith(HEAD_KEYS)}
    conv = state.get("patch_embed.proj.weight")
    if conv is not None and conv.shape[1] != vit.patch_embed.proj.in_channels:
        state["patch_embed.proj.weight"] = adapt_input_conv(vit.patch_embed.proj.in_channels, conv)
    return state


def _misfits(state: Mapping[str, object], own: Mapping[str, Tensor]) -> list[str]:
    """What is missing, left over or of another shape, one text each; classifiers and the final norm do not count."""
    found = {key: list(getattr(value, "shape", [])) for key, value in state.items()}
    other = [key for key in own if key in found and found[key] != list(own[key].shape)]
    problems = {
        "missing": sorted(own.keys() - found.keys() - {"norm.weight", "norm.bias"}),
        "unexpected": sorted(key for key in found.keys() - own.keys() if not key.startswith(HEAD_KEYS)),
        "of wrong shape": [f"{key} {found[key]} for {list(own[key].shape)}" for key in other],
    }
    return [f"{label}: {_some(keys)}" for label, keys in problems.items() if keys]


def _unfit(path: Path | str, name: str, problems: Sequence[str]) -> BackboneError:
    return BackboneError(
        f"{path} does not fit the backbone {name} ({'; '.join(problems)}); check model.backbone and model.patch_size"
    )


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def feature_layers(depth: int, features: Sequence[int] | None) -> list[int]:
    """The four 0-based layers that feed the head; default one third, one half, two thirds and all of the depth.

    Raises:
        BackboneError: not four increasing layers of the backbone.
    """
    layers = [math.ceil(depth * share) - 1 for share in DEPTH_SHARES] if features is None else list(features)
    if len(layers) != 4 or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        raise BackboneError(
            f"model.features={layers} must be four increasing layers of 0..{depth - 1}; "
            f"the default is {[math.ceil(depth * share) - 1 for share in DEPTH_SHARES]}"
        )
    return layers


def weight_hash(vit: nn.Module) -> str:
    """sha256 over names, shapes and float32 values of the backbone, the same for equal weights on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(vit.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
