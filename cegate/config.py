"""The configuration: frozen dataclasses, one per section. No torch here, so that ``--help`` is instant.

The docstring under a field is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["spatial", "semantic", "frequency"]
KINDS: tuple[Kind, ...] = ("spatial", "semantic", "frequency")
IGNORE = 255

Method = Literal[
    *("gate", "random", "all_on", "no_spatial", "no_semantic", "no_frequency"),
    *("frozen", "lora", "adaptformer", "earth_adapter", "rein", "full"),
]


@dataclass(frozen=True)
class RunConfig:
    """Where a run goes and how it computes."""

    name: str = "run"
    """Name of the run."""
    work_dir: str | None = None
    """Folder of the run; default runs/<name>."""
    method: Method | None = None
    """What adapts the backbone, in a word that sets toolbox.kinds, gate.method, refiner.method and model.tune."""
    seed: int = 0
    """Seed of weights, data stream and Fisher probes."""
    deterministic: bool = False
    """Use only deterministic torch algorithms."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:<index>."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 on a GPU that has it and fp32 elsewhere."""


@dataclass(frozen=True)
class SecondConfig:
    """A second raster of every image: elevation, SAR, infrared."""

    images: str = "second/*"
    """Glob below root, or below '/'; paired with the images as masks are. Without wildcards it is one file for all."""
    bands: list[int] | None = None
    """1-based bands to read; default: all but alpha, of a grey picture stored three times the first."""
    scale: Literal["tile", "scene", "fixed"] = "tile"
    """Mapped to 0..1 by the smallest and largest value of the tile, of the whole file, or by value_range."""
    value_range: list[float] | None = None
    """[low, high] mapped to 0..1 (fixed), in the raster's unit."""
    align: bool = True
    """Warp it to the image's grid where coordinate system, pixel size or extent differ; else refuse such a pair."""
    missing: Literal["error", "allow"] = "error"
    """An image without a second raster: refuse it, or let the model do without."""


@dataclass(frozen=True)
class SetConfig:
    """One set of images and masks."""

    kind: Literal["folder", "loveda", "prepared", "generated"] = "folder"
    """folder (images and masks by glob), loveda (as downloaded), prepared (by cegate data prepare) or generated
    (procedural scenes)."""
    root: str | None = None
    """Folder that holds the set; ${name} stands for data.roots.<name>."""
    images: str = "images/*"
    """Glob of the images below root (folder)."""
    masks: str = "masks/*"
    """Glob of the masks below root (folder). Pairs are formed by the part of the name that the two globs leave open."""
    split: str | None = None
    """loveda: Train/Urban, Train/Rural, Val/Urban or Val/Rural. prepared: a part of the set, such as train or IRRG/val.
    generated: the climate."""
    label_map: dict[str | int, str | int] | None = None
    """Mask value or '#RRGGBB' -> class name, class index or 'ignore'; default: values are class indices."""
    bands: list[int] | None = None
    """1-based bands to read, in the order the backbone takes them; default: the first three."""
    value_range: list[float] | None = None
    """[low, high] mapped to 0..1; default: the source's. The source's own: 0..255 for 8-bit files,
    else each band's 1st..99th percentile over the set."""
    nan: Literal["error", "ignore"] = "error"
    """NaN pixels: refuse the file, or set them to the range's low end and their label to ignore."""
    ignore: int = IGNORE
    """Mask value that is never trained on nor counted."""
    limit: int | None = None
    """Use only the first so many pairs (generated: the number of scenes, default 64)."""
    first: int = 0
    """generated: number of the first scene, so that splits do not overlap."""
    fit: int | None = None
    """Evaluate on images shrunk, aspect kept, to fit a square of this side; the prediction is enlarged again and
    counted at full size. Evaluation only: training and cegate predict take images as they are, as all do by default."""
    tile: int | None = None
    """generated: side of a scene in pixels; default 256."""
    second: SecondConfig | None = None
    """A second raster of every image (elevation, SAR, infrared); default: none. generated: elevation in metres."""


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training crop."""

    resize: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Range of the random scale."""
    max_class_share: float = 0.75
    """Draw a crop again (up to 10 times) while one class covers more than this share."""
    flip: bool = True
    """Flip horizontally with probability 0.5."""
    photometric: bool = True
    """Random brightness, contrast, saturation and hue (the last two for three bands)."""


@dataclass(frozen=True)
class DataConfig:
    """What is read."""

    source: SetConfig = field(default_factory=SetConfig)
    """Labelled set that is trained on."""
    targets: dict[str, SetConfig] = field(default_factory=dict)
    """Name -> set that is only evaluated."""
    unlabelled: SetConfig | None = None
    """Images of the target domain to adapt to (adapt.method); masks are never read."""
    validation: SetConfig | None = None
    """Held-out part of the source domain, evaluated as 'source'; it alone picks the best checkpoint (without: the
    last), and targets are never used for a choice."""
    roots: dict[str, str] = field(default_factory=dict)
    """Name -> folder, for sets whose root is written as ${name}."""
    classes: list[str] = field(default_factory=list)
    """Class names in the order of their indices."""
    palette: list[str] = field(default_factory=list)
    """One '#RRGGBB' per class; default: a colour-blind-safe palette."""
    crop: int = 512
    """Side of a training crop in pixels."""
    stride: int | None = None
    """Step of the sliding test window in pixels; default two thirds of the crop."""
    batch_size: int = 4
    """Crops per iteration."""
    workers: int = 2
    """Processes that read and augment."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of a training crop."""


@dataclass(frozen=True)
class ModelConfig:
    """Frozen backbone and trained head."""

    backbone: str = "tiny"
    """Name of a timm vision transformer, or tiny (ships with cegate)."""
    weights: str = "auto"
    """auto (timm's hub, or the shipped file for tiny), none (random), or the path of a .pth or .safetensors file."""
    image_size: int | None = None
    """Side in pixels that fixes the position grid; default data.crop."""
    patch_size: int | None = None
    """Resample the patch embedding to this size; default: the backbone's own."""
    features: list[int] | None = None
    """Four 0-based layers that the head sees; default 1/3, 1/2, 2/3 and all of the depth."""
    head: Literal["linear", "mask2former"] = "linear"
    """linear (fast) or mask2former (the paper's)."""
    tune: Literal["frozen", "full"] = "frozen"
    """The backbone keeps its weights, or learns too (full fine-tuning)."""


@dataclass(frozen=True)
class SpatialConfig:
    """LoRA on query and value."""

    rank: int = 64
    """Rank r."""
    alpha: float | None = None
    """Scale is alpha / rank; default alpha = rank."""


@dataclass(frozen=True)
class SemanticConfig:
    """Adapter parallel to the MLP."""

    width: int = 64
    """Bottleneck width."""
    scale: float = 0.1
    """Factor of the adapter's output."""


@dataclass(frozen=True)
class FrequencyConfig:
    """Earth-Adapter on the block output."""

    width: int = 32
    """Bottleneck width d of each of the three experts."""
    cutoff: float | Literal["learnable"] = 0.3
    """Share rho of the spectrum that is low frequency, 0..1; learnable starts at 0.3 and has a smooth edge."""
    band: Literal["official", "symmetric"] = "official"
    """official keeps -c..c-1, symmetric keeps -c..c."""
    init: Literal["zero", "official"] = "zero"
    """zero: a fresh module changes nothing; official: as Earth-Adapter initialises."""


@dataclass(frozen=True)
class ToolboxConfig:
    """The modules on every layer."""

    kinds: list[Kind] = field(default_factory=lambda: list(KINDS))
    """Module kinds."""
    spatial: SpatialConfig = field(default_factory=SpatialConfig)
    """LoRA on query and value."""
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    """Adapter parallel to the MLP."""
    frequency: FrequencyConfig = field(default_factory=FrequencyConfig)
    """Earth-Adapter on the block output."""


@dataclass(frozen=True)
class GateConfig:
    """Which sites train, and when that is decided again."""

    method: Literal["fisher", "random", "all", "none", "fixed"] = "fisher"
    """fisher (the paper), random (k sites drawn anew each round, the control), all sites on, none (frozen backbone +
    head), or fixed (gate.sites)."""
    k: int = 18
    """Active sites out of layers x kinds."""
    interval: int = 100
    """Training iterations between two scorings (paper: 100 for DG, 50 for DA)."""
    samples: int = 16
    """Training samples M of one scoring."""
    normalize: Literal["kind", "layer", "mean", "none"] = "kind"
    """Divide a site's Fisher mass by the sum over all layers of its kind (paper), by the sum over the kinds of its
    layer, by its number of weights, or not at all."""
    estimator: Literal["per_sample", "batch"] = "per_sample"
    """Square every sample's gradient (Fisher), or the batch's mean gradient."""
    loss: Literal["task", "nll"] = "task"
    """log-likelihood of a sample: minus its training loss, or minus its mean pixel cross entropy."""
    inactive: Literal["off", "frozen"] = "off"
    """An inactive site is skipped, or keeps contributing what it has learned."""
    sites: list[str] = field(default_factory=list)
    """Active sites of method 'fixed', e.g. spatial.7."""


@dataclass(frozen=True)
class RefinerConfig:
    """Trained tokens that refine the patch tokens after every block, outside the gate."""

    method: Literal["none", "rein"] = "none"
    """none, or rein (CVPR 2024)."""
    tokens: int = 100
    """Learned tokens m of each layer; with mask2former also the number of queries they are linked to."""
    rank: int = 16
    """Rank r of a layer's tokens."""


@dataclass(frozen=True)
class AdaptConfig:
    """Self-training on unlabelled images of the target domain."""

    method: Literal["none", "dacs"] = "none"
    """none, or dacs (WACV 2021): pseudo-labels of an EMA teacher, mixed with the source by ClassMix."""
    warmup: int = 4000
    """Iterations on the source alone."""
    ema: float = 0.99
    """Largest share of its old weights that the teacher keeps in one iteration."""
    weight: float = 0.5
    """Factor of the mixed images' loss."""
    confidence: float | None = None
    """Weigh pseudo-labels by the share of them that are at least this sure (DACS: 0.968); default: off."""
    fisher_domains: Literal["source", "both"] = "both"
    """Samples of a Fisher probe after the warm-up: source alone, or as many target images with pseudo-labels beside."""


@dataclass(frozen=True)
class TrainConfig:
    """The schedule, in iterations."""

    iterations: int = 20000
    """Training iterations."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """Decoupled weight decay; none on norms, biases and embeddings."""
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    """Course of the learning rate after the warm-up: poly and cosine fall to zero, constant stays at lr."""
    power: float = 0.9
    """Exponent of the poly schedule."""
    warmup: int = 0
    """Iterations of linear warm-up."""
    clip: float | None = None
    """Largest gradient norm; default: no clipping."""
    eval_every: int = 2000
    """Iterations between evaluations; the last iteration is always evaluated."""
    log_every: int = 50
    """Iterations between two lines of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Iterations between checkpoints; every evaluation begins with one too."""
    keep_checkpoints: int = 1
    """Numbered checkpoints kept beside last and best."""
    baseline: bool = False
    """First train frozen backbone + head on the same stream, for the 'before' rows of the table."""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where a run goes and how it computes."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Frozen backbone and trained head."""
    toolbox: ToolboxConfig = field(default_factory=ToolboxConfig)
    """The modules on every layer."""
    gate: GateConfig = field(default_factory=GateConfig)
    """Which sites train, and when that is decided again."""
    refiner: RefinerConfig = field(default_factory=RefinerConfig)
    """Trained tokens that refine the patch tokens after every block, outside the gate."""
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    """Self-training on unlabelled images of the target domain."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The schedule, in iterations."""
