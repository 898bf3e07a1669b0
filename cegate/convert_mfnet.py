"""MFNet's checkpoints by the names of cegate's parts.

The authors publish code and no weights, so this reads what users trained with that code: the encoder, once or twice
(``sam.image_encoder.*``, ``image_encoder.*``), with adapters or low-rank updates in it, and beside it pyramids, fusions
and decoder.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cegate.errors import CheckpointError

UNUSED = re.compile(
    r"(sam\.)?(prompt_encoder\.|mask_decoder\.|pixel_(mean|std)$)|.*(relative_position_index|num_batches_tracked)$"
)
"""What serves prompts, and buffers that follow from the configuration or count."""
ENCODER = re.compile(r"(sam\.)?image_encoder\.")
PARTS = ("modal", "fusion", "head", "vit")
BACKBONES = {768: "samvit_base_patch16", 1024: "samvit_large_patch16", 1280: "samvit_huge_patch16"}
"""Width -> timm's name."""
KEPT_TWICE = "the same again"
NO_USE = "not used"

_RENAMED: tuple[tuple[str, str], ...] = (
    (r"^decoder\.pre_conv\.", "head.start."),
    *((rf"^decoder\.b{level}\.", f"head.blocks.{4 - level}.") for level in (4, 3, 2)),
    *((rf"^decoder\.p{level}\.", f"head.fusions.{3 - level}.") for level in (3, 2, 1)),
    (r"^decoder\.segmentation_head\.0\.", "head.classifier.0."),
    (r"^decoder\.segmentation_head\.2\.0\.", "head.classifier.2."),
    (r"\.attn\.relative_position_bias_table$", ".attention.position"),
    (r"\.attn\.qkv\.0\.", ".attention.qkv."),
    (r"\.attn\.local1\.", ".attention.local3."),  # named after its place there, after its side here
    (r"\.attn\.local2\.", ".attention.local1."),
    (r"\.attn\.proj\.", ".attention.project."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
    (r"\.pre_conv\.0\.", ".skip."),
    (r"\.post_conv\.", ".smooth."),
    (r"\.pa\.0\.", ".place."),
    (r"\.ca\.1\.0\.", ".squeeze."),
    (r"\.ca\.3\.0\.", ".excite."),
    (r"^head\.fusions\.2\.proj\.", "head.fusions.2.project."),
    *((rf"^fpn1{m}\.", f"fusion.finest.{n}.") for n, m in enumerate("xy")),
    *((rf"^fpn2{m}\.0\.", f"fusion.finer.{n}.") for n, m in enumerate("xy")),
    (r"^(fusion\.finest\.\d\.1)\.ln\.", r"\1."),
    *((rf"^fusion{level + 1}\.", f"fusion.weigh.{level}.") for level in range(4)),
    *((rf"\.se_{m}\.fc\.0\.", f".{n}.down.") for n, m in enumerate(("rgb", "depth"))),
    *((rf"\.se_{m}\.fc\.2\.", f".{n}.up.") for n, m in enumerate(("rgb", "depth"))),
)
"""Pyramids and decoder: every pattern in this order."""
_ENCODER = ((r"\.mlp\.lin(\d)\.", r".mlp.fc\1."), (r"\.rel_([hw])$", r".rel_pos_\1"))


@dataclass
class MFNet:
    """A converted checkpoint."""

    weights: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {part: {} for part in PARTS})
    """``modal`` (MMAdapter or MMLoRA), ``fusion`` (DFM), ``head`` (UNetFormer) and ``vit`` (the frozen encoder, by
    timm's names; empty where there is none) -> state dict."""
    report: dict[str, str] = field(default_factory=dict)
    """Key of the checkpoint -> what became of it: ``part.name``, 'the same again' or 'not used'."""

    @property
    def method(self) -> str:
        """mfnet_adapter or mfnet_lora."""
        return "mfnet_lora" if "layers.0.fc1.down" in self.weights["modal"] else "mfnet_adapter"

    @property
    def depth(self) -> int:
        """Blocks of the encoder."""
        return 1 + max(int(name.split(".")[1]) for name in self.weights["modal"])

    @property
    def width(self) -> int:
        """Channels of the encoder's stream."""
        first = "fc1.down" if self.method == "mfnet_lora" else "attention.down"
        return self.weights["modal"][f"layers.0.{first}"].shape[2]

    @property
    def bottleneck(self) -> int:
        """Rank of the updates, or width of the adapters."""
        first = "fc1.down" if self.method == "mfnet_lora" else "attention.down"
        return self.weights["modal"][f"layers.0.{first}"].shape[1]

    @property
    def classes(self) -> int:
        """K."""
        return len(self.weights["head"]["classifier.2.weight"])

    @property
    def official_norm(self) -> bool:
        """Whether the second pyramid has BatchNorm."""
        return "finest.1.1.running_mean" in self.weights["fusion"]

    @property
    def official_relpos(self) -> bool:
        """Whether the tables of relative positions are zero, as the published code leaves them."""
        tables = [table for name, table in self.weights["vit"].items() if "rel_pos" in name]
        return bool(tables) and not any(table.any() for table in tables)

    def lines(self) -> list[str]:
        """The report in short: how many keys became what."""
        by_fate = defaultdict(list)
        for key, became in self.report.items():
            by_fate[became.partition(".")[0]].append(key)
        return [f"{fate}: {len(keys)} keys, such as {keys[0]}" for fate, keys in by_fate.items()]


def convert_mfnet(checkpoint: Mapping[str, object]) -> MFNet:
    """A checkpoint of the published code, complete and without a key that is not understood.

    Args:
        checkpoint: weight name -> tensor, in a ``state_dict`` or ``model`` of it or not, named from ``module.`` or not.

    Raises:
        CheckpointError: no MFNet, something is missing, two copies differ, or a key is unknown; it is named.
    """
    for wrapper in ("state_dict", "model"):
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
    state = {str(key).removeprefix("module."): value for key, value in checkpoint.items()}
    if not any("_Adapter" in key or "lora_" in key for key in state):
        first = next(iter(state), "none")
        raise CheckpointError(
            f"no checkpoint of MFNet: none of its {len(state)} keys has _Adapter or lora_ in it ({first} is the first);"
            " give the state dict that its train script saves"
        )
    found = convert_weights(state)
    lacking = [part for part in ("modal", "fusion", "head") if not found.weights[part]]
    if lacking:
        raise CheckpointError(
            f"a checkpoint of MFNet without {' and '.join(lacking)}; give the whole model's state dict"
        )
    return found


def is_mfnet(state: Mapping[str, object]) -> bool:
    """Whether a state dict is of MFNet's published code."""
    return any(re.search(r"\.(Img|DSM)_Adapter\.|\.lora_[AB][xy]$", key) for key in state)


def write_mfnet(
    state: Mapping[str, Tensor],
    file: Path,
    out: Path,
    *,
    weights: str | Path | None = None,
    backbone: str | None = None,
    classes: Sequence[str] | None = None,
    crop: int | None = None,
    stride: int | None = None,
) -> list[str]:
    """Convert a checkpoint into an adapter folder.

    Args:
        state: its weights by name.
        file: where it comes from, for messages.
        out: new folder.
        weights: SAM's own file; needed where the checkpoint holds no encoder.
        backbone: timm's name of the encoder; default: by its width.
        classes: names in order; default: class_0, ...
        crop: side of the windows; default 256.
        stride: their step; default 128.

    Returns:
        What was done, a line each.

    Raises:
        CheckpointError: no whole MFNet, or of another encoder.
    """
    from cegate.adapter_folder import save_adapter
    from cegate.backbone.vit import weight_hash
    from cegate.checkpoint import load_trained, trained_weights
    from cegate.configfile import read_config
    from cegate.runfolder import write_json, written_aside
    from cegate.segmenter import build

    found = convert_mfnet(state)
    encoder, names = found.weights["vit"], list(classes or (f"class_{k}" for k in range(found.classes)))
    if len(names) != found.classes:
        raise CheckpointError(f"--classes names {len(names)} classes, {file} has {found.classes}")
    if backbone is None and found.width not in BACKBONES:
        raise CheckpointError(f"{file} has an encoder of width {found.width}, which is none of SAM's; give --backbone")
    if not encoder and weights is None:
        raise CheckpointError(f"{file} holds no encoder; give SAM's own file, sam_vit_*.pth, with --weights FILE")
    if encoder:
        weights = out / "backbone.safetensors"
        with written_aside(weights) as aside:
            save_file({key: value.float().contiguous() for key, value in encoder.items()}, aside)
    lora = found.method == "mfnet_lora"
    modal = {"rank": found.bottleneck} if lora else {"ratio": found.bottleneck / found.width}
    modal |= {"method": "mmlora" if lora else "mmadapter", "official_norm": found.official_norm}
    model = {"backbone": backbone or BACKBONES[found.width], "weights": str(weights), "head": "unetformer"}
    model |= {"normalize": "unit", "resample": "plain", "official_relpos": found.official_relpos or not encoder}
    model["features"] = [*range(found.depth - 4, found.depth)]  # of four, the pyramid is made of the last
    source = {"bands": [1, 2, 3], "second": {"bands": [1], "scale": "tile"}}
    data = {"classes": names, "crop": crop or 256, "stride": stride or 128, "source": source}
    segmenter = build(read_config({"data": data, "model": model, "modal": modal, "gate": {"method": "none"}}))
    if segmenter.backbone.depth != found.depth:
        raise CheckpointError(
            f"{file} was trained on {found.depth} blocks, {model['backbone']} has {segmenter.backbone.depth}; give "
            "--backbone NAME"
        )
    own = trained_weights(segmenter, ())
    kept = {"streams.absent": own["streams.absent"]}  # the published code knows no missing raster
    parts = {f"{part}.{key}": value for part in PARTS[:-1] for key, value in found.weights[part].items()}
    load_trained(segmenter, kept | {key: value.float() for key, value in parts.items()}, (), file)
    save_adapter(out, segmenter, weight_hash(segmenter.vit), {})
    write_json(out / "conversion.json", {"kind": found.method, "keys": found.report})
    size = f"{found.depth} blocks of width {found.width}, {found.classes} classes"
    return [f"{file}: MFNet ({found.method}), {size}", *found.lines(), f"written: {out}"]


def convert_weights(state: Mapping[str, Tensor]) -> MFNet:
    """As :func:`convert_mfnet`, of any part of a checkpoint; encoder keys may lack their prefix."""
    found, stacks, unknown = MFNet(), defaultdict(dict), []
    taken: dict[str, Tensor] = {}
    for key, value in state.items():
        inner = ENCODER.sub("", key, count=1)
        if UNUSED.match(key):
            found.report[key] = NO_USE
        elif inner in taken:
            if not torch.equal(taken[inner], value):
                raise CheckpointError(f"{key} is there twice, with different values; keep the copy that was trained")
            found.report[key] = KEPT_TWICE
        elif pieces := list(_modal_pieces(inner, value)):
            for name, stream, piece in pieces:
                stacks[name][stream] = piece
            found.report[key] = f"modal.{pieces[0][0]}"
        elif re.match(r"(decoder|fpn[12][xy]|fusion[1-4])\.", key):
            part, _, name = _renamed(key, _RENAMED).partition(".")
            found.weights[part][name] = value
            found.report[key] = f"{part}.{name}"
        elif re.match(r"(blocks\.\d+|patch_embed|neck)\.|pos_embed$", inner):
            name = _renamed(inner, _ENCODER)
            found.weights["vit"][name] = value
            found.report[key] = f"vit.{name}"
        else:
            unknown.append(key)
        taken[inner] = value
    if unknown:
        raise CheckpointError(f"{len(unknown)} keys are none of MFNet's, {unknown[0]} first; remove or rename them")
    for name, streams in stacks.items():
        if len(streams) < 2:
            raise CheckpointError(f"the checkpoint has {name} for one modality alone; MFNet trains two")
        found.weights["modal"][name] = torch.stack([streams[0], streams[1]])
    return found


def _renamed(key: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in patterns:
        key = re.sub(pattern, replacement, key)
    return key


def _modal_pieces(key: str, value: Tensor):
    """(name, modality, tensor) of each weight in ``modal`` that a key of the encoder holds; none for others."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(Img|DSM|MLPx|MLPy)_Adapter\.D_fc([12])\.(weight|bias)", key):
        layer, which, linear, kind = match.groups()
        name = ("down" if linear == "1" else "up") + ("_bias" if kind == "bias" else "")
        yield f"layers.{layer}.{'mlp' if 'MLP' in which else 'attention'}.{name}", int(which in ("DSM", "MLPy")), value
    elif match := re.fullmatch(r"blocks\.(\d+)\.w([xy])_Adapter", key):
        yield f"layers.{match[1]}.mix", int(match[2] == "y"), value.reshape(())
    elif match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.lora_([AB])([xy])", key):
        for part, half in zip(("query", "value"), value.chunk(2), strict=True):
            yield f"layers.{match[1]}.{part}.{'down' if match[2] == 'A' else 'up'}", int(match[3] == "y"), half
    elif match := re.fullmatch(r"blocks\.(\d+)\.mlp\.lin([12])\.lora_([ABw])([xy])", key):
        layer, linear, which, modality = match.groups()
        name = {"A": "down", "B": "up", "w": "mix"}[which]
        yield f"layers.{layer}.fc{linear}.{name}", int(modality == "y"), value.reshape(()) if which == "w" else value
