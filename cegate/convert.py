"""`cegate convert`: a checkpoint of Rein, CrossEarth, Earth-Adapter or MFNet becomes an adapter folder."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cegate import cli
from cegate.errors import CheckpointError, ConfigError, refuse_unreadable

if TYPE_CHECKING:
    from torch import Tensor

    from cegate.released import Converted

USAGE = cli.Usage(
    "cegate convert FILE",
    "Turn a released mmsegmentation checkpoint of Rein, CrossEarth or Earth-Adapter, or one that MFNet's published "
    "code has saved, into an adapter folder that every command takes, or a DINOv2 backbone into weights at the size "
    "that those were trained with. Nothing in a file is run, and no key goes unaccounted for: conversion.json lists "
    "all of them.",
    (
        cli.Option("out", "New adapter folder; for a backbone, a .safetensors file.", "PATH"),
        cli.Option(
            "weights",
            "The DINOv2 weights that the checkpoint belongs to: the authors' converted file, or Meta's own, which is "
            "then resampled as theirs was. Not needed where the checkpoint holds its backbone.",
            "FILE",
        ),
        cli.Option("backbone", "timm's name of the backbone (default: by width and depth, DINOv2).", "NAME"),
        cli.Option("classes", "Class names in order (default: those in the file, else class_0, ...).", "A,B,C"),
        cli.Option("crop", "Side of the training crops (default: 512, of MFNet 256).", "PX"),
        cli.Option("stride", "Step of the windows in prediction (default: two thirds of a crop, 341 for 512).", "PX"),
        cli.Option("features", "Layers that the head sees (default: 7,11,15,23 of 24).", "LAYERS"),
        cli.Option("fft_layers", "Earth-Adapter: layers with frequency experts, its fft_layer.", "LAYERS"),
        cli.Option("leave", "Beginnings of further keys to leave.", "PREFIX", many=True),
    ),
)
PATCH_PX = 16
"""Patch side to which all released backbones were converted."""
BACKBONE_FILE, STYLE_FILE, ACCOUNT_FILE = "backbone.safetensors", "style_networks.safetensors", "conversion.json"


@cli.command
def main(argv: Sequence[str]) -> int:
    """Convert the file in the first argument."""
    if not argv or argv[0].startswith("-"):
        cli.parse_options(argv, USAGE)
        raise ConfigError("the file to convert is missing; it comes first, as in cegate convert FILE --out ADAPTER")
    options = cli.parse_options(argv[1:], USAGE)
    if not options["out"]:
        raise ConfigError("--out is missing; give a new folder for the adapter")
    lines = convert_file(
        Path(argv[0]).expanduser(),
        Path(options["out"]).expanduser(),
        weights=options["weights"],
        backbone=options["backbone"],
        classes=[name.strip() for name in options["classes"].split(",")] if options["classes"] else None,
        crop=_number(options, "crop"),
        stride=_number(options, "stride"),
        features=_numbers(options, "features"),
        fft_layers=_numbers(options, "fft_layers"),
        leave=options["leave"] or (),
    )
    print("\n".join(lines))
    return cli.GOOD


def _number(options: Mapping[str, Any], name: str) -> int | None:
    text = options[name]
    if text is not None and not (text.isdecimal() and int(text)):
        raise ConfigError(f"--{name}={text} is not accepted; expected a whole number of 1 or more")
    return None if text is None else int(text)


def _numbers(options: Mapping[str, Any], name: str) -> list[int] | None:
    """Numbers of "0,1,5" or "0-5"; an empty text is none."""
    if options[name] is None:
        return None
    numbers: list[int] = []
    for part in filter(None, (part.strip() for part in options[name].split(","))):
        low, _, high = part.partition("-")
        if not low.isdecimal() or not (high or low).isdecimal():
            raise ConfigError(f"--{name}={options[name]} is not accepted; expected layers, as in 0,1,5 or 0-5")
        numbers += range(int(low), int(high or low) + 1)
    return numbers


def convert_file(
    file: Path,
    out: Path,
    *,
    weights: str | Path | None = None,
    backbone: str | None = None,
    classes: Sequence[str] | None = None,
    crop: int | None = None,
    stride: int | None = None,
    features: Sequence[int] | None = None,
    fft_layers: Sequence[int] | None = None,
    leave: Sequence[str] = (),
) -> list[str]:
    """Convert a file; see the command.

    Returns:
        What was done, a line each.

    Raises:
        CheckpointError: the file is of another kind, does not fit the backbone, or ``out`` is taken.
        BackboneError: the backbone's weights do not fit.
    """
    from cegate.convert_mfnet import is_mfnet, write_mfnet
    from cegate.released import convert, groups

    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already; give another --out")
    with _fresh(out):
        state, meta = read_checkpoint(file)
        if is_mfnet(state):
            return write_mfnet(
                state, file, out, weights=weights, backbone=backbone, classes=classes, crop=crop, stride=stride
            )
        crop = crop or 512
        stride = stride or crop * 2 // 3
        found = convert(state, str(file), fft_layers=fft_layers, leave=leave)
        if found.kind == "backbone":
            target = out if out.suffix == ".safetensors" else out / BACKBONE_FILE
            _write_backbone(found.backbone, target, crop)
            return [
                f"{file}: a DINOv2 backbone",
                *found.account.summary(),
                f"written: {target}; give it as model.weights",
            ]
        depth, width = _size(found)
        name = backbone or _backbone_name(width, depth, file)
        config, folder = _config(found, meta, name, classes, crop, stride, features, depth), out
        if found.backbone:
            _write_backbone(found.backbone, folder / BACKBONE_FILE, crop)
            config["model"]["weights"] = str(folder / BACKBONE_FILE)
        elif weights is None:
            raise CheckpointError(
                f"{file} holds no backbone; give the one it belongs to with --weights FILE, such as "
                "dinov2_converted.pth or dinov2_vitl14_pretrain.pth"
            )
        else:
            config["model"]["weights"] = _fitting_backbone(Path(weights).expanduser(), folder, crop)
        _write_adapter(found, config, folder, file)
        if found.style:
            _save(found.style, folder / STYLE_FILE)
        _write_account(found, folder / ACCOUNT_FILE)
        kind = {"rein": "Rein or CrossEarth", "earth_adapter": "Earth-Adapter"}[found.kind]
        lines = [f"{file}: {kind}, {depth} layers of width {width}, {found.classes} classes", *found.account.summary()]
        lines += [f"style networks: {folder / STYLE_FILE}, for style.weights"] if found.style else []
        return [*lines, f"written: {folder}; every key is in {ACCOUNT_FILE}, groups: {groups(found.weights)}"]


@contextmanager
def _fresh(out: Path) -> Iterator[None]:
    """Leave nothing behind where a conversion fails: the next call would find the folder taken."""
    was_there = out.exists()
    try:
        yield
    except BaseException:  # an interrupt, too, is no reason to leave half a folder
        if not was_there and out.is_dir():
            shutil.rmtree(out)
        raise


def read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a .pth or .safetensors file by name, and what it says of its data set.

    Whatever else is pickled in it, such as the logs of a training, becomes an empty object: none of its code is looked
    up, let alone run.

    Raises:
        CheckpointError: missing, unreadable, or without weights by name.
    """
    import safetensors.torch
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    if not file.is_file():
        raise CheckpointError(f"there is no {file}; give a .pth or .safetensors file")
    refuse_unreadable(file, CheckpointError)
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file), {}
        try:
            strange = get_unsafe_globals_in_checkpoint(file)
        except ValueError:  # the format of before torch 1.6
            strange = []
        with safe_globals([(type("Inert", (_Inert,), {}), name) for name in strange]):
            held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its zip or pickle reader raises
        raise CheckpointError(
            f"{file} is no checkpoint that can be read without running what is in it ({type(error).__name__}); save "
            "its state_dict alone: torch.save(checkpoint['state_dict'], FILE)"
        ) from error
    if isinstance(held, dict) and "trained" in held and "format_version" in held:
        raise CheckpointError(f"{file} is a checkpoint of cegate; use cegate evaluate --run, or the adapter of its run")
    meta = held.get("meta") if isinstance(held, dict) else None
    state = next((held[key] for key in ("state_dict", "model") if isinstance(held, dict) and key in held), held)
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{file} holds no weights by name; give an mmsegmentation checkpoint")
    data = meta.get("dataset_meta") if isinstance(meta, dict) else None
    return {key.removeprefix("module."): value for key, value in state.items()}, data if isinstance(data, dict) else {}


class _Inert:
    """Stands for any pickled class or function: takes everything, does nothing."""

    def __new__(cls, *args: object, **options: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **options: object) -> None: ...
    def __setstate__(self, state: object) -> None: ...


def _size(found: Converted) -> tuple[int, int]:
    """(depth, width) of the backbone that a file was trained on."""
    if found.kind == "rein":
        needed = [f"refiner.{name}" for name in ("token_a", "token_b") if f"refiner.{name}" not in found.weights]
        if needed:
            raise CheckpointError(f"the file lacks backbone.reins.learnable_tokens_a or _b ({', '.join(needed)})")
        return len(found.weights["refiner.token_b"]), found.weights["refiner.token_b"].shape[-1]
    return len(found.sites), found.weights[f"toolbox.{found.sites[0]}.router"].shape[-1]


def _backbone_name(width: int, depth: int, file: Path) -> str:
    from cegate.released import BACKBONES

    if (width, depth) not in BACKBONES:
        raise CheckpointError(
            f"{file} belongs to a backbone of {depth} layers of width {width}, which is no DINOv2; give --backbone NAME"
        )
    return BACKBONES[width, depth]


def _config(
    found: Converted,
    meta: Mapping[str, Any],
    backbone: str,
    classes: Sequence[str] | None,
    crop: int,
    stride: int,
    features: Sequence[int] | None,
    depth: int,
) -> dict[str, Any]:
    """The configuration of the model, as sections."""
    if "head.decoder.class_predictor.bias" not in found.weights:
        raise CheckpointError("the file lacks decode_head.cls_embed; cegate converts Mask2Former heads only")
    known = [str(name) for name in meta.get("classes") or ()]
    count = found.classes
    names = list(classes or (known if len(known) == count else [f"class_{k}" for k in range(count)]))
    if len(names) != count:
        raise CheckpointError(f"--classes names {len(names)} classes, the head has {count}")
    palette = meta.get("palette") if not classes and len(known) == count else None
    if features is None and depth != 24:
        features = [depth * 8 // 24 - 1, depth // 2 - 1, depth * 16 // 24 - 1, depth - 1]
    data: dict[str, Any] = {"classes": names, "crop": crop, "stride": stride, "source": {"bands": [1, 2, 3]}}
    if palette and len(palette) == count:
        data["palette"] = ["#{:02X}{:02X}{:02X}".format(*map(int, colour)) for colour in palette]
    model = {
        "backbone": backbone,
        "patch_size": PATCH_PX,
        "image_size": crop,
        "features": list(features or (7, 11, 15, 23)),
        "head": "mask2former",
        "resample": "plain",
    }
    config: dict[str, Any] = {"data": data, "model": model, "gate": {"method": "none"}}
    if found.kind == "rein":
        tokens, rank = found.weights["refiner.token_a"].shape[1:]
        config["refiner"] = {"method": "rein", "tokens": int(tokens), "rank": int(rank)}
    else:
        width = found.weights[f"toolbox.{found.sites[0]}.down"].shape[1]
        config["toolbox"] = {"kinds": ["frequency"], "frequency": {"width": int(width)}}
        config["gate"] = {"method": "fixed", "sites": list(found.sites)}
    return config


def _write_adapter(found: Converted, config: Mapping[str, Any], folder: Path, file: Path) -> None:
    """Build the model, load every weight strictly, and write what one shares."""
    from cegate.adapter_folder import save_adapter
    from cegate.backbone.vit import weight_hash
    from cegate.checkpoint import load_trained
    from cegate.configfile import read_config
    from cegate.segmenter import build

    segmenter = build(read_config(dict(config)))
    wanted, own = _size(found), (len(segmenter.vit.blocks), segmenter.vit.embed_dim)
    if own != wanted:
        raise CheckpointError(
            f"{file} was trained on {wanted[0]} layers of width {wanted[1]}, but {config['model']['backbone']} has "
            f"{own[0]} of width {own[1]}; give the backbone it belongs to with --backbone and --weights"
        )
    load_trained(segmenter, {name: value.float() for name, value in found.weights.items()}, found.sites, file)
    save_adapter(folder, segmenter, weight_hash(segmenter.vit), {})


def _fitting_backbone(path: Path, folder: Path, crop: int) -> str:
    """A backbone file at the size that is wanted, in the folder, for an adapter opens no file elsewhere: the same file
    once more, without taking room where the disk can do that, or a resampled copy."""
    state, _ = read_checkpoint(path)
    state = {key.removeprefix("backbone."): value for key, value in state.items()}
    kernel, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if kernel is None or positions is None:
        raise CheckpointError(f"--weights {path} is no ViT: patch_embed.proj.weight or pos_embed is missing")
    fits = kernel.shape[-1] == PATCH_PX and positions.shape[1] == 1 + (crop // PATCH_PX) ** 2
    if fits and path.suffix in (".pth", ".safetensors") and not any(key.startswith("reins.") for key in state):
        own = folder / Path(BACKBONE_FILE).with_suffix(path.suffix)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            own.hardlink_to(path.resolve())
        except OSError:  # another disk, or one without links
            shutil.copyfile(path, own)
        return str(own)
    _write_backbone(state, folder / BACKBONE_FILE, crop)
    return str(folder / BACKBONE_FILE)


def _write_backbone(state: Mapping[str, Tensor], path: Path, crop: int) -> None:
    """Weights of a ViT with both embeddings resampled plainly to the patch and the grid of a crop."""
    from cegate.backbone.resample import resample_plain

    side = crop // PATCH_PX
    kept = {key: value.float() for key, value in state.items() if key != "mask_token"}
    _save(resample_plain(kept, patch=PATCH_PX, grid=(side, side)), path)


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    import safetensors.torch

    from cegate.runfolder import written_aside

    with written_aside(path) as aside:
        safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, aside)


def _write_account(found: Converted, path: Path) -> None:
    from cegate.runfolder import write_json

    write_json(path, {"kind": found.kind, **asdict(found.account)})


if __name__ == "__main__":
    sys.exit(main())
