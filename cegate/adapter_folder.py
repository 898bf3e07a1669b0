"""The folder that one shares: trained weights, what is needed to rebuild the model, and a card.

It comes from anywhere, so nothing in it is believed: `read_description` and `read_weights` are the only ways in, for
`cegate.load`, `cegate.read_adapter` and the commands alike, and no file outside it is opened because it says so.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor

from cegate import __version__
from cegate.adapters import Adapter, not_numbers
from cegate.checkpoint import check_fit, load_trained, trained_weights
from cegate.compute import pick_device
from cegate.config import (
    Config,
    DataConfig,
    FourLayers,
    GateConfig,
    Head,
    InjectorConfig,
    ModalConfig,
    ModelConfig,
    Normalize,
    Patch,
    RefinerConfig,
    Resample,
    RunConfig,
    SecondConfig,
    Seed,
    SetConfig,
    Side,
    ToolboxConfig,
    Tune,
)
from cegate.configfile import MOST_BYTES, read_config
from cegate.consistency import find_problems
from cegate.errors import CheckpointError, ConfigError, refuse_unreadable, shown
from cegate.fields import Pattern, read_fields
from cegate.gate import GatePlan
from cegate.recipe import Recipe
from cegate.runfolder import write_json, write_text, written_aside
from cegate.segmenter import Segmenter, build

FORMAT_VERSION = 1
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
NAMED_WEIGHTS = ("auto", "none")
CHECKSUM = "cegate_sha256"
"""Key of the weight file's own metadata; who changes weights with other tools writes none."""
MOST_PATCHES = 2**18
"""Of a window: what a file may ask a machine to compute at once, ten times what is trained with."""
Sha256 = Annotated[str, Pattern("[0-9a-f]{64}", "sha256", "64 hexadecimal digits")]


@dataclass(frozen=True)
class Description:
    """What ``adapter_config.json`` says of the model; how to run it, the `Recipe`, is in keys beside these."""

    backbone: str
    backbone_weights: str
    """auto, none, or a file."""
    backbone_sha256: Sha256
    """`weight_hash` of the backbone."""
    image_size: Side
    patch_size: Patch
    features: FourLayers
    toolbox: ToolboxConfig
    active_sites: tuple[str, ...]
    frozen_sites: tuple[str, ...]
    head: Head
    seed: Seed
    refiner: RefinerConfig = field(default_factory=RefinerConfig)
    injector: InjectorConfig = field(default_factory=InjectorConfig)
    modal: ModalConfig = field(default_factory=ModalConfig)
    tune: Tune = "frozen"
    resample: Resample = "timm"
    normalize: Normalize = "pretrained"
    official_relpos: bool = False
    cegate_version: str = "unknown"
    """That wrote it."""

    @property
    def plan(self) -> GatePlan:
        """Sites that are on."""
        return GatePlan(self.active_sites, self.frozen_sites)


SECTIONS = ("toolbox", "refiner", "injector", "modal")
"""Of the configuration, those whose parts are built anew."""
MODEL_WORDS = ("head", "tune", "resample", "normalize", "official_relpos")
"""Of the section model, what is kept as it is."""
NEEDED_KEYS = ("crop", "stride", "value_range", "ignore")
"""Keys that a `Recipe` may do without, but not a file: a default would change what is predicted."""


def save_adapter(folder: Path, segmenter: Segmenter, backbone_sha256: str, results: Mapping[str, float | None]) -> None:
    """Write the folder that one shares: trained sites that are on, the refiner, the head, and what is needed to rebuild
    the model.

    Args:
        folder: made if needed; its three files are replaced.
        segmenter: model with its final plan applied.
        backbone_sha256: `weight_hash` of the frozen backbone.
        results: domain -> mIoU, 0..1, for the card; None where no pixel has a label.
    """
    on = segmenter.toolbox.plan.on
    shared = [name for name, part in segmenter.learning_modules().items() if getattr(part, "deployed", True)]
    weights = {
        key: value.cpu().contiguous()
        for key, value in trained_weights(segmenter, on).items()
        if key.partition(".")[0] in shared
    }
    with written_aside(folder / WEIGHTS_FILE) as aside:
        safetensors.torch.save_file(weights, aside, metadata={"format": "pt", CHECKSUM: _checksum(weights)})
        _sort_metadata(aside)
    mapping = _describe(segmenter, backbone_sha256)
    write_json(folder / CONFIG_FILE, mapping)
    write_text(folder / "README.md", _card(mapping, weights, results))


def _sort_metadata(path: Path) -> None:
    """safetensors writes them in another order each time; equal models are equal files."""
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def _describe(segmenter: Segmenter, backbone_sha256: str) -> dict[str, Any]:
    config, plan = segmenter.config, segmenter.toolbox.plan
    return {
        "format_version": FORMAT_VERSION,
        "cegate_version": __version__,
        "torch_version": torch.__version__,
        "timm_version": timm.__version__,
        "backbone": config.model.backbone,
        "backbone_weights": config.model.weights,
        "backbone_sha256": backbone_sha256,
        "image_size": config.model.image_size or config.data.crop,
        "patch_size": segmenter.backbone.patch,
        **{word: getattr(config.model, word) for word in MODEL_WORDS},
        "features": segmenter.layers,
        **{name: asdict(getattr(config, name)) for name in SECTIONS},
        "active_sites": list(plan.active),
        "frozen_sites": list(plan.frozen),
        **segmenter.recipe.to_mapping(),
        "seed": config.run.seed,
    }


def _card(description: Mapping[str, Any], weights: Mapping[str, Tensor], results: Mapping[str, float | None]) -> str:
    sites = [*description["active_sites"], *description["frozen_sites"]]
    shown = {domain: "–" if miou is None else f"{100 * miou:.1f}" for domain, miou in results.items()}
    rows = "".join(f"| {domain} | {miou} |\n" for domain, miou in shown.items())
    table = f"\n| domain | mIoU (%) |\n|---|---|\n{rows}" if rows else ""
    count = sum(weight.numel() for weight in weights.values())
    refiner = description["refiner"]
    tokens = f", {refiner['tokens']} rein tokens a layer" if refiner["method"] == "rein" else ""
    tokens += ", geospatial queries" if description["injector"]["method"] == "gse" else ""
    backbone = "a tuned backbone, " if description["tune"] == "full" else ""
    parts = f"{backbone}{len(sites)} sites{tokens} and a {description['head']} head"
    without = "was tuned from" if backbone else "is not included; its"
    where = "'.'" if description["backbone_weights"] in NAMED_WEIGHTS else "'.', weights='the backbone'"
    return (
        f"# CrossEarth-Gate adapter for {description['backbone']}\n\n"
        f"{count:,} trained weights: {parts}. The frozen backbone {without} weights have sha256 "
        f"`{description['backbone_sha256']}`.\n\n"
        f"Classes: {', '.join(description['classes'])}.\n\nSites: {', '.join(sites) or 'none'}.\n{table}\n"
        f"```python\nimport cegate\n\nsegmenter = cegate.load({where})\nmask = segmenter.predict('image.tif')\n```\n\n"
        f"Written by cegate {description['cegate_version']} on Python {platform.python_version()}.\n"
    )


def find_adapter(path: Path) -> Path:
    """The adapter folder at or below a path.

    Raises:
        CheckpointError: there is none.
    """
    for folder in (path, path / "adapter"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if (path / "config.yaml").is_file():
        raise CheckpointError(
            f"{path} has no adapter yet; finish the run with --resume, or evaluate a checkpoint of it"
        )
    raise CheckpointError(f"{path} is neither a run nor an adapter folder (it has no {CONFIG_FILE})")


def read_description(folder: Path) -> tuple[Description, Recipe]:
    """What an adapter folder says it holds.

    Raises:
        CheckpointError: unreadable, of another format version, or keys are missing or hold what they cannot; they are
            named.
    """
    path = folder / CONFIG_FILE
    mapping = _read_mapping(path)
    try:
        if missing := [key for key in NEEDED_KEYS if key not in mapping]:
            raise ConfigError(f"lacks {', '.join(missing)}")
        recipe, description = Recipe.from_mapping(mapping), read_fields(Description, mapping)
        if problems := list(_problems(description, recipe)):
            raise ConfigError("; ".join(problems))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; copy the adapter folder again") from error
    return description, recipe


def _read_mapping(path: Path) -> dict[str, Any]:
    refuse_unreadable(path, CheckpointError)
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        mapping = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_keys_once)
    except (OSError, ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be read: {why}; copy the adapter folder again") from error
    version = mapping.get("format_version") if isinstance(mapping, dict) else None
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"{path} has format_version {shown(version)}; this cegate {__version__} reads {FORMAT_VERSION}"
        )
    return mapping


def _keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} is given twice")
    return mapping


def _problems(description: Description, recipe: Recipe) -> Iterator[str]:
    """Values of the file that are accepted by themselves and do not fit the others."""
    patch = description.patch_size
    if recipe.crop < patch:
        yield f"crop={recipe.crop} is a window smaller than one patch, patch_size={patch}"
    for key, side in (("image_size", description.image_size), ("crop", recipe.crop)):
        if (count := (side // patch) ** 2) > MOST_PATCHES:
            yield f"{key}={side} is {count} patches of patch_size={patch}; no more than {MOST_PATCHES} are run at once"
    for key in ("active_sites", "frozen_sites"):
        try:
            GatePlan(getattr(description, key))
        except ConfigError as error:
            yield f"{key}: {error}"
    yield from find_problems(_config_of(description, recipe, description.backbone_weights))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Trained weights of an adapter folder, by name.

    Raises:
        CheckpointError: unreadable, not what was written, not floating-point, NaN or infinite; the first are named.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{folder} has no file {WEIGHTS_FILE}; copy the adapter folder again")
    refuse_unreadable(file, CheckpointError)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no dict
            metadata = opened.metadata() or {}
    except Exception as error:  # safetensors and torch raise whatever comes up where a file is damaged
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{file} cannot be read: {why}; copy the adapter folder again") from error
    if problems := not_numbers(weights):
        raise CheckpointError(f"{file}: {'; '.join(problems)}; copy the adapter folder again")
    if metadata.get(CHECKSUM, _checksum(weights)) != _checksum(weights):
        raise CheckpointError(f"{file} is damaged (its checksum is another); copy the adapter folder again")
    if strange := sorted(metadata.keys() - {"format", CHECKSUM}):  # as the checksum's own name is where it is damaged
        raise CheckpointError(
            f"{file} has metadata {strange[0][:40]!r}, which no adapter has: it may be damaged; copy the adapter "
            f"folder again, or save the weights with no metadata but 'format'"
        )
    return weights


def _checksum(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_adapter(path: Path, device: str | torch.device | None = None, *, weights: str | None = None) -> Segmenter:
    """Rebuild a model from an adapter folder, or from the run that holds one.

    Args:
        path: run or adapter folder.
        device: where to put it; default: a GPU if there is one.
        weights: backbone weights, where the file used in training lies elsewhere here.

    Raises:
        CheckpointError: no adapter, what it says or holds cannot be, another backbone, a backbone file elsewhere, or
            missing or extra weights; they are named.
        BackboneError: the backbone cannot be built.
    """
    folder = find_adapter(Path(path))
    description, recipe = read_description(folder)
    trained = read_weights(folder)
    backbone = weights or _backbone_weights(folder, description.backbone_weights)
    segmenter = build(_config_of(description, recipe, backbone))
    check_fit(segmenter, folder, recipe.classes, description.backbone_sha256)
    plan = description.plan
    if unknown := [site for site in plan.on if site not in segmenter.toolbox.sites]:
        raise CheckpointError(f"{folder / CONFIG_FILE} names the site {unknown[0]!r}, which the backbone does not have")
    load_trained(segmenter, trained, plan.on, folder / WEIGHTS_FILE)
    segmenter.toolbox.apply(plan)
    segmenter.recipe = recipe
    return segmenter.to(pick_device(device or "auto") if isinstance(device, str | None) else device).eval()


def _backbone_weights(folder: Path, named: str) -> str:
    """What the backbone is loaded from where the caller names no file: timm's hub, a file in the folder, or the file
    that the configuration of the run around the folder names too, for that is the user's own.

    Raises:
        CheckpointError: it is a file elsewhere; what to type is said.
    """
    if named in NAMED_WEIGHTS:
        return named
    home = folder.resolve()
    for file in (folder / named, Path(named), folder / Path(named).name):
        with suppress(OSError):  # a name that no file can have
            if file.is_file() and file.resolve().is_relative_to(home):
                return str(file)
    if folder.name == "adapter" and (folder.parent / "config.yaml").is_file():
        with suppress(ConfigError):
            if read_config(folder.parent / "config.yaml").model.weights == named:
                return named
    raise CheckpointError(
        f"{folder / CONFIG_FILE} names backbone_weights={shown(named)}, which is no file of the adapter folder, and an "
        "adapter opens no other unasked; give the backbone yourself: --weights FILE, or "
        "cegate.load(folder, weights=FILE)"
    )


def read_adapter(path: Path) -> Adapter:
    """An adapter folder, or that of a run, in memory, for :meth:`Segmenter.add_adapter`; no model is built.

    Raises:
        CheckpointError: no adapter, or what it says or holds cannot be.
    """
    folder = find_adapter(Path(path))
    description, recipe = read_description(folder)
    return Adapter(
        config=_config_of(description, recipe, description.backbone_weights),
        plan=description.plan,
        backbone_sha256=description.backbone_sha256,
        recipe=recipe,
        source=str(folder / WEIGHTS_FILE),
        weights=read_weights(folder),
    )


def _config_of(description: Description, recipe: Recipe, weights: str) -> Config:
    """The configuration that a model is rebuilt with."""
    return Config(
        run=RunConfig(seed=description.seed, precision=recipe.precision),
        data=DataConfig(
            classes=list(recipe.classes),
            palette=list(recipe.palette),
            crop=recipe.crop,
            stride=recipe.stride,
            source=SetConfig(bands=list(recipe.bands), second=_second_of(recipe)),
        ),
        model=ModelConfig(
            backbone=description.backbone,
            weights=weights,
            image_size=description.image_size,
            patch_size=description.patch_size,
            features=list(description.features),
            **{word: getattr(description, word) for word in MODEL_WORDS},
        ),
        **{name: getattr(description, name) for name in SECTIONS},
        gate=GateConfig(method="none"),
    )


def _second_of(recipe: Recipe) -> SecondConfig | None:
    """``data.source.second`` of a model of two rasters."""
    second = recipe.second
    if second is None:
        return None
    given = {key: getattr(second, key) for key in ("name", "scale", "value_range", "align", "surplus")}
    return SecondConfig(
        bands=list(second.bands), missing="allow" if "second" in second.dispensable else "error", **given
    )
