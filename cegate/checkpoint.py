"""What is kept of a model: the full state for resume, and the adapter folder that is shared."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor

from cegate import __version__
from cegate.adapters import Adapter, misfits
from cegate.backbone.vit import weight_hash
from cegate.compute import pick_device
from cegate.config import Config
from cegate.configfile import read_config
from cegate.errors import CheckpointError, ConfigError, nearest
from cegate.gate import GatePlan
from cegate.recipe import Recipe
from cegate.runfolder import RunFolder, write_json, write_text, written_aside
from cegate.segmenter import Segmenter, build

FORMAT_VERSION = 1
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
STAGES = ("before", "after")
NEEDED_KEYS = (
    *("backbone", "backbone_weights", "backbone_sha256", "image_size", "patch_size", "features", "toolbox"),
    *("active_sites", "frozen_sites", "head", "classes", "palette", "bands", "mean", "std", "value_range", "ignore"),
    *("crop", "stride", "seed"),
)


@dataclass
class State:
    """Everything that the rest of a run depends on besides its configuration.

    No random state is among it: every draw is a function of (seed, iteration).
    """

    stage: str
    """before (frozen backbone + head) or after (with the gate)."""
    iteration: int
    """Iterations done in this stage."""
    trained: dict[str, Tensor]
    """Weights of every site, of the head, and of the refiner and a tuned backbone if there are."""
    active: list[str]
    frozen: list[str]
    """Plan: sites that learn, and sites that contribute what they learned."""
    ever_active: list[str]
    optimizer: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    loss_sum: float = 0.0
    loss_count: int = 0
    """Losses since the last line of metrics.jsonl."""
    objective: dict[str, Any] = field(default_factory=dict)
    """What the objective carries from iteration to iteration."""
    step_seconds: list[float] = field(default_factory=list)
    score_seconds: list[float] = field(default_factory=list)
    """How long each iteration and each scoring of this stage took."""
    peak_memory_bytes: int | None = None
    value_range: list[list[float]] | None = None
    backbone_sha256: str = ""
    classes: list[str] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    @property
    def position(self) -> tuple[int, int]:
        """Order of states within a run."""
        return STAGES.index(self.stage), self.iteration


def save_state(path: Path, state: State) -> None:
    """Write a checkpoint aside and rename it, so that the file is the old one or the new one."""
    sites = {name: [str(site) for site in getattr(state, name)] for name in ("active", "frozen", "ever_active")}
    with written_aside(path) as aside:
        torch.save({**vars(state), **sites}, aside)  # plain text: a safe reader takes no class of ours


def load_state(path: Path) -> State:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: no file, unreadable, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its zip or pickle reader raises
        raise CheckpointError(
            f"{path} is damaged or no checkpoint ({type(error).__name__}); use another one"
        ) from error
    if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
        found = values.get("format_version") if isinstance(values, dict) else None
        raise CheckpointError(f"{path} has format {found}; this cegate {__version__} reads format {FORMAT_VERSION}")
    return State(**values)


def keep_newest(folder: Path, keep: int) -> None:
    """Remove numbered checkpoints but for the newest ``keep``."""
    numbered = sorted(folder.glob("iter_*.pt"), key=lambda path: int(path.stem.removeprefix("iter_")))
    for path in numbered[: max(len(numbered) - keep, 0)]:
        path.unlink()


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint aside and rename it."""
    with written_aside(target) as aside:
        shutil.copyfile(source, aside)


def trained_weights(segmenter: Segmenter, sites: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Weights of the head (``head.<weight>``), of some sites (default: all; ``toolbox.<site>.<weight>``), of a refiner
    (``refiner.<weight>``), and of a backbone that is tuned (``vit.<weight>``)."""
    chosen = segmenter.toolbox.sites if sites is None else list(sites)
    weights = {
        f"toolbox.{site}.{name}": parameter.detach()
        for site in chosen
        for name, parameter in segmenter.toolbox.parameters_of(site).items()
    }
    modules = {name: module for name, module in segmenter.learning_modules().items() if name != "toolbox"}
    parts = {name: module.state_dict() for name, module in modules.items()}
    return weights | {
        f"{part}.{name}": value.detach() for part, state in parts.items() for name, value in state.items()
    }


@torch.no_grad()
def load_trained(
    segmenter: Segmenter, weights: Mapping[str, Tensor], sites: Iterable[str] | None, where: str | Path
) -> None:
    """Copy weights into head and sites, strictly.

    Raises:
        CheckpointError: keys are missing, left over or of another shape; they are named, and nothing is copied.
    """
    own = trained_weights(segmenter, sites)
    if problems := misfits(own, weights):
        raise CheckpointError(
            f"{where} does not fit the model: {'; '.join(problems)}; use the configuration it was made with"
        )
    for key, value in own.items():
        value.copy_(weights[key])


def restore(segmenter: Segmenter, state: State, where: str | Path, *, backbone_sha256: str | None = None) -> None:
    """Put a checkpoint's weights and plan into a freshly built model.

    Raises:
        CheckpointError: other classes, another backbone, or weights that do not fit.
    """
    _check_fit(segmenter, where, state.classes, state.backbone_sha256, backbone_sha256)
    load_trained(segmenter, state.trained, None, where)
    segmenter.toolbox.apply(GatePlan(state.active, state.frozen))
    segmenter.adapts(state.stage == "after")
    segmenter.recipe = replace(segmenter.recipe, value_range=state.value_range)


def _check_fit(
    segmenter: Segmenter, where: str | Path, classes: Iterable[str], expected: str, found: str | None = None
) -> None:
    if tuple(classes) != tuple(segmenter.classes):
        raise CheckpointError(
            f"{where} was trained for the classes {', '.join(classes)}, not {', '.join(segmenter.classes)}; "
            "give data.classes as they were in training"
        )
    found = found or weight_hash(segmenter.vit)
    if found != expected:
        raise CheckpointError(
            f"{where} was trained on a backbone with sha256 {expected[:12]}, this one "
            f"({segmenter.config.model.backbone}) has {found[:12]}; give the weights that were used in training"
        )


# --- adapter folder -------------------------------------------------------------------------------------------------


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
    weights = {key: value.cpu().contiguous() for key, value in trained_weights(segmenter, on).items()}
    description = _describe(segmenter, backbone_sha256)
    with written_aside(folder / WEIGHTS_FILE) as aside:
        safetensors.torch.save_file(weights, aside, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, description)
    write_text(folder / "README.md", _card(description, weights, results))


def _describe(segmenter: Segmenter, backbone_sha256: str) -> dict[str, Any]:
    config = segmenter.config
    plan = segmenter.toolbox.plan
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
        "features": segmenter.layers,
        "toolbox": asdict(config.toolbox),
        "refiner": asdict(config.refiner),
        "active_sites": list(plan.active),
        "frozen_sites": list(plan.frozen),
        "head": config.model.head,
        "tune": config.model.tune,
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
    backbone = "a tuned backbone, " if description["tune"] == "full" else ""
    parts = f"{backbone}{len(sites)} sites{tokens} and a {description['head']} head"
    without = "was tuned from" if backbone else "is not included; its"
    return (
        f"# CrossEarth-Gate adapter for {description['backbone']}\n\n"
        f"{count:,} trained weights: {parts}. The frozen backbone {without} weights have sha256 "
        f"`{description['backbone_sha256']}`.\n\n"
        f"Classes: {', '.join(description['classes'])}.\n\nSites: {', '.join(sites) or 'none'}.\n{table}\n"
        "```python\nimport cegate\n\nsegmenter = cegate.load('.')\nmask = segmenter.predict('image.tif')\n```\n\n"
        f"Written by cegate {description['cegate_version']} on Python {platform.python_version()}.\n"
    )


def adapter_folder(path: Path) -> Path:
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


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The description in an adapter folder.

    Raises:
        CheckpointError: unreadable, another format version, or keys are missing.
    """
    path = folder / CONFIG_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format_version {version}; this cegate {__version__} reads {FORMAT_VERSION}")
    if missing := [key for key in NEEDED_KEYS if key not in description]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; copy the adapter folder again")
    return description


def load_adapter(path: Path, device: str | torch.device | None = None, *, weights: str | None = None) -> Segmenter:
    """Rebuild a model from an adapter folder, or from the run that holds one.

    Args:
        path: run or adapter folder.
        device: where to put it; default: a GPU if there is one.
        weights: backbone weights, where the file used in training lies elsewhere here.

    Raises:
        CheckpointError: no adapter, another backbone, or missing or extra weights; they are named.
        BackboneError: the backbone cannot be built.
    """
    folder = adapter_folder(Path(path))
    description = read_adapter_config(folder)
    segmenter = build(_rebuild_config(description, folder, weights))
    _check_fit(segmenter, folder, description["classes"], description["backbone_sha256"])
    file = folder / WEIGHTS_FILE
    trained = _read_weights(file)
    plan = GatePlan(description["active_sites"], description["frozen_sites"])
    if unknown := [site for site in plan.on if site not in segmenter.toolbox.sites]:
        raise CheckpointError(f"{folder / CONFIG_FILE} names the site {unknown[0]!r}, which the backbone does not have")
    load_trained(segmenter, trained, plan.on, file)
    segmenter.toolbox.apply(plan)
    segmenter.recipe = Recipe.from_mapping(description)
    return segmenter.to(pick_device(device or "auto") if isinstance(device, str | None) else device).eval()


def read_adapter(path: Path) -> Adapter:
    """An adapter folder, or that of a run, in memory, for :meth:`Segmenter.add_adapter`; no model is built.

    Raises:
        CheckpointError: no adapter, or its files cannot be read.
    """
    folder = adapter_folder(Path(path))
    description = read_adapter_config(folder)
    return Adapter(
        config=_rebuild_config(description, folder, None),
        plan=GatePlan(description["active_sites"], description["frozen_sites"]),
        backbone_sha256=description["backbone_sha256"],
        recipe=Recipe.from_mapping(description),
        source=str(folder / WEIGHTS_FILE),
        weights=_read_weights(folder / WEIGHTS_FILE),
    )


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _rebuild_config(description: Mapping[str, Any], folder: Path, weights: str | None) -> Config:
    mapping = {
        "run": {"seed": description["seed"], "precision": description.get("precision", "auto")},
        "data": {
            "classes": description["classes"],
            "palette": description["palette"],
            "crop": description["crop"],
            "stride": description["stride"],
            "source": {"bands": description["bands"]},
        },
        "model": {
            "backbone": description["backbone"],
            "weights": weights or description["backbone_weights"],
            "image_size": description["image_size"],
            "patch_size": description["patch_size"],
            "features": description["features"],
            "head": description["head"],
            "tune": description.get("tune", "frozen"),
        },
        "toolbox": description["toolbox"],
        "refiner": description.get("refiner", {}),
        "gate": {"method": "none"},
    }
    try:
        return read_config(mapping)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error


def load_checkpoint(run: RunFolder, which: str, config: Config, device: str | torch.device) -> Segmenter:
    """Rebuild a run's model from one of its checkpoints.

    Args:
        run: the run.
        which: ``best``, ``last``, or the path of a checkpoint. As long as there is no best one, the last of the stage
            ``after`` is best.
        config: the run's configuration, perhaps with other data.
        device: where to put it.

    Raises:
        CheckpointError: no such checkpoint, or it does not fit.
    """
    named = {"best": run.checkpoints / "best.pt", "last": run.last}
    path = named.get(which, Path(which))
    if which not in named and not path.is_file():
        raise CheckpointError(f"there is no checkpoint {which}; use best, last or a path{nearest(which, named)}")
    falls_back = which == "best" and not path.is_file() and run.last.is_file()
    if falls_back:
        path = run.last
    state = load_state(path)
    if falls_back and state.stage != "after":
        raise CheckpointError(
            f"{run.path} has no best checkpoint yet, its last is the frozen backbone and head of the baseline after "
            f"{state.iteration} iterations; finish the run with --resume, or use the checkpoint last"
        )
    segmenter = build(config)
    restore(segmenter, state, path)
    return segmenter.to(device).eval()
