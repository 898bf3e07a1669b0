"""The configuration: frozen dataclasses, one per section. No torch here, so that ``--help`` is instant.

The docstring under a field is its help text on the command line; its type, with bounds, is what `cegate.fields`
accepts. What several fields must agree on is in `cegate.configfile`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from cegate.fields import Meets, OneOf, Pattern, Range
from cegate.methods import METHODS
from cegate.sites import PAPER_KINDS, kinds

IGNORE = 255
SOURCE_DOMAIN = "source"
"""Its name among the domains that a model is measured in."""

# bounds end where a number is surely a slip of the keyboard; memory ends earlier
Word = Annotated[str, Pattern(r"[a-z][a-z0-9_]*", "word", "small letters, digits and '_', a letter first")]
Scale = Literal["tile", "scene", "fixed"]
Count = Annotated[int, Range(1, 10**9)]
Length = Annotated[int, Range(0, 10**9)]
Side = Annotated[int, Range(1, 16384)]
Width = Annotated[int, Range(1, 4096)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
SomeShare = Annotated[float, Range(0, 1, above=True)]
LowHigh = Annotated[
    list[float], Meets(lambda ends: len(ends) == 2 and ends[0] < ends[1], "[low, high] with low < high")
]
Bands = Annotated[list[Annotated[int, Range(1, 65535)]], Meets(bool, "one or more band numbers counted from 1")]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Head = Literal["linear", "mask2former", "unetformer"]
Tune = Literal["frozen", "full"]
Resample = Literal["timm", "plain"]
Normalize = Literal["pretrained", "unit"]
Patch = Annotated[int, Range(1, 256)]
FourLayers = Annotated[
    list[Annotated[int, Range(0, 999)]],
    Meets(lambda layers: len(layers) == 4 and layers == sorted(set(layers)), "four increasing 0-based layers"),
]
Colour = Annotated[str, Pattern(r"#[0-9a-fA-F]{6}", "'#RRGGBB'", "six hexadecimal digits behind '#'")]


@dataclass(frozen=True)
class RunConfig:
    """Where a run goes and how it computes."""

    name: Annotated[
        str, Pattern(r"(?!\.{1,2}$)[\w.\-]{1,80}", "folder name", "letters, digits, '.', '_' and '-', 80 at most")
    ] = "run"
    """Name of the run."""
    work_dir: str | None = None
    """Folder of the run; default runs/<name>."""
    method: Annotated[str, OneOf(METHODS.keys)] | None = None
    """What adapts the backbone, in a word that sets toolbox.kinds, gate.method, refiner.method and model.tune."""
    seed: Seed = 0
    """Seed of weights, data stream and Fisher probes."""
    deterministic: bool = False
    """Use only deterministic torch algorithms."""
    device: Annotated[str, Pattern(r"auto|cpu|cuda(:[0-9]{1,3})?", "device", "auto, cpu, cuda or cuda:<index>")] = (
        "auto"
    )
    """auto, cpu, cuda or cuda:<index>."""
    precision: Precision = "auto"
    """auto is bf16 on a GPU that has it and fp32 elsewhere."""
    speed: Literal["auto", "eager"] = "eager"
    """eager runs every operation of a step as it is written. auto, on a GPU, records a step as one graph where that is
    safe, else its backbone, and says so; it fuses sums with norms, and lets the float32 products of bf16 and fp16 steps
    round to TF32 (not yet measured on a GPU)."""
    log: list[Literal["jsonl", "tensorboard"]] = field(default_factory=lambda: ["jsonl"])
    """Where numbers go beside the terminal: metrics.jsonl, always, and TensorBoard's files."""


@dataclass(frozen=True)
class SecondConfig:
    """A second raster of every image: elevation, SAR, infrared."""

    name: Word = "dsm"
    """Word for it in the names of sites (spatial.7.dsm), pictures and pages."""
    images: str = "second/*"
    """Glob below root, or below '/'; paired with the images as masks are. Without wildcards it is one file for all."""
    bands: Bands | None = None
    """1-based bands to read; default: all but alpha, of a grey picture stored three times the first."""
    surplus: Literal["error", "ignore"] | None = None
    """A file with further bands: refuse it (default where bands are not given), or leave them out (where they are)."""
    scale: Scale = "tile"
    """Mapped to 0..1 by the smallest and largest value under the image, of the whole file, or by value_range."""
    value_range: LowHigh | None = None
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
    generated: the climate. folder: a .txt below root, or elsewhere, with the names of its images, one a line."""
    label_map: dict[str, str | int] | None = None
    """Mask value or '#RRGGBB' -> class name, class index or 'ignore'; default: values are class indices."""
    bands: Bands | None = None
    """1-based bands to read, in the order the backbone takes them; default: the first three."""
    value_range: LowHigh | None = None
    """[low, high] mapped to 0..1; default: the source's. The source's own: 0..255 for 8-bit files,
    else each band's 1st..99th percentile over the set."""
    nan: Literal["error", "ignore"] = "error"
    """NaN pixels: refuse the file, or set them to the range's low end and their label to ignore."""
    ignore: Annotated[int, Range(-(2**31), 2**32 - 1)] = IGNORE
    """Mask value that is never trained on nor counted."""
    limit: Count | None = None
    """Use only the first so many pairs (generated: the number of scenes, default 64)."""
    first: Length = 0
    """generated: number of the first scene, so that splits do not overlap."""
    fit: Annotated[int, Range(1, 65536)] | None = None
    """Evaluate on images shrunk, aspect kept, to fit a square of this side; the prediction is enlarged again and
    counted at full size. Evaluation only: training and cegate predict take images as they are, as all do by default."""
    tile: Side | None = None
    """generated: side of a scene in pixels; default 256."""
    second: SecondConfig | None = None
    """A second raster of every image (elevation, SAR, infrared); default: none. generated: elevation in metres."""
    val_fraction: Annotated[float, Range(0, 0.9, above=True)] | None = None
    """Share of the source that is held out of training as data.validation: a whole place where images know theirs, else
    whole folders, else neighbours by name; run.seed decides which."""
    attribute: str | None = None
    """Masks as vector files (.gpkg, .geojson, .shp): the attribute that holds the class, a value of label_map or a
    class name; default: every feature is class 1. Where features overlap the later counts; where there is none, or
    one without value, the pixel is class 0, or what label_map says of ''."""


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training crop."""

    resize: Annotated[
        list[Annotated[float, Range(0.01, 100)]],
        Meets(lambda ends: len(ends) == 2 and ends[0] <= ends[1], "[low, high] with low <= high"),
    ] = field(default_factory=lambda: [0.5, 2.0])
    """Range of the random scale."""
    max_class_share: SomeShare = 0.75
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
    palette: list[Colour] = field(default_factory=list)
    """One '#RRGGBB' per class; default: a colour-blind-safe palette."""
    crop: Side = 512
    """Side of a training crop in pixels."""
    stride: Side | None = None
    """Step of the sliding test window in pixels; default two thirds of the crop."""
    batch_size: Annotated[int, Range(1, 4096)] = 4
    """Crops per iteration."""
    workers: Annotated[int, Range(0, 1024)] = 2
    """Processes that read and augment; one more for the scoring rounds, where there are any."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of a training crop."""


@dataclass(frozen=True)
class ModelConfig:
    """Frozen backbone and trained head."""

    backbone: str = "tiny"
    """Name of a timm vision transformer, or tiny (ships with cegate)."""
    weights: Annotated[str, Meets(bool, "auto, none, or the path of a .pth or .safetensors file")] = "auto"
    """auto (timm's hub, or the shipped file for tiny), none (random), or the path of a .pth or .safetensors file."""
    image_size: Side | None = None
    """Side in pixels that fixes the position grid; default data.crop."""
    patch_size: Patch | None = None
    """Resample the patch embedding to this size; default: the backbone's own."""
    features: FourLayers | None = None
    """Four 0-based layers that the head sees; default 1/3, 1/2, 2/3 and all of the depth."""
    head: Head = "linear"
    """linear (fast) or mask2former (the paper's)."""
    tune: Tune = "frozen"
    """The backbone keeps its weights, or learns too (full fine-tuning)."""
    resample: Resample = "timm"
    """Positions and patches of another size: as timm resamples them, or bicubic as CrossEarth's files are made."""
    normalize: Normalize = "pretrained"
    """Pixels as the backbone was pretrained (mean and deviation of each band), or 0..1 as they are."""
    official_relpos: bool = False
    """SAM without its relative positions, which MFNet's published code never loads."""


@dataclass(frozen=True)
class SpatialConfig:
    """LoRA on query and value."""

    rank: Width = 64
    """Rank r."""
    alpha: Positive | None = None
    """Scale is alpha / rank; default alpha = rank."""


@dataclass(frozen=True)
class SemanticConfig:
    """Adapter parallel to the MLP."""

    width: Width = 64
    """Bottleneck width."""
    scale: Positive = 0.1
    """Factor of the adapter's output."""


@dataclass(frozen=True)
class FrequencyConfig:
    """Earth-Adapter on the block output."""

    width: Width = 32
    """Bottleneck width d of each of the three experts."""
    cutoff: Share | Literal["learnable"] = 0.3
    """Share rho of the spectrum that is low frequency, 0..1; learnable starts at 0.3 and has a smooth edge."""
    band: Literal["official", "symmetric"] = "official"
    """official keeps -c..c-1, symmetric keeps -c..c."""
    init: Literal["zero", "official"] = "zero"
    """zero: a fresh module changes nothing; official: as Earth-Adapter initialises."""


@dataclass(frozen=True)
class ToolboxConfig:
    """The modules on every layer."""

    kinds: Annotated[
        list[Annotated[str, OneOf(kinds)]],
        Meets(lambda given: 0 < len(given) == len(set(given)), "one or more kinds, each once"),
    ] = field(default_factory=lambda: list(PAPER_KINDS))
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
    k: Count = 18
    """Active sites out of layers x kinds."""
    interval: Count = 100
    """Training iterations between two scorings (paper: 100 for DG, 50 for DA)."""
    samples: Annotated[int, Range(1, 10**6)] = 16
    """Training samples M of one scoring."""
    normalize: Literal["kind", "layer", "mean", "none"] = "kind"
    """Divide a site's Fisher mass by the sum over all layers of its kind (paper), by the sum over the kinds of its
    layer, by its number of weights, or not at all."""
    estimator: Literal["per_sample", "batch"] = "per_sample"
    """Square every sample's gradient (Fisher), or the batch's mean gradient."""
    loss: Literal["task", "nll", "all"] = "task"
    """log-likelihood of a sample: minus its segmentation loss (all: and that of its restoration, see mim), or minus its
    mean pixel cross entropy."""
    inactive: Literal["off", "frozen"] = "off"
    """An inactive site is skipped, or keeps contributing what it has learned."""
    sites: list[str] = field(default_factory=list)
    """Active sites of method 'fixed', e.g. spatial.7."""


@dataclass(frozen=True)
class RefinerConfig:
    """Trained tokens that refine the patch tokens after every block, outside the gate."""

    method: Literal["none", "rein"] = "none"
    """none, or rein (CVPR 2024)."""
    tokens: Annotated[int, Range(2, 4096)] = 100
    """Learned tokens m of each layer; with mask2former also the number of queries they are linked to."""
    rank: Width = 16
    """Rank r of a layer's tokens."""


@dataclass(frozen=True)
class AdaptConfig:
    """Self-training on unlabelled images of the target domain."""

    method: Literal["none", "dacs"] = "none"
    """none, or dacs (WACV 2021): pseudo-labels of an EMA teacher, mixed with the source by ClassMix."""
    warmup: Length = 4000
    """Iterations on the source alone."""
    ema: SomeShare = 0.99
    """Largest share of its old weights that the teacher keeps in one iteration."""
    weight: NotNegative = 0.5
    """Factor of the mixed images' loss."""
    confidence: SomeShare | None = None
    """Weigh pseudo-labels by the share of them that are at least this sure (DACS: 0.968); default: off."""
    fisher_domains: Literal["source", "both"] = "both"
    """Samples of a Fisher probe after the warm-up: source alone, or as many target images with pseudo-labels beside."""


@dataclass(frozen=True)
class StyleConfig:
    """Crops in the style of other places (CrossEarth, arXiv:2410.22629)."""

    method: Literal["none", "earth"] = "none"
    """none, or earth: blocks of a crop take on a style drawn from statistics of many images."""
    weights: str | None = None
    """Folder with the style networks' public weight files; default: channel statistics in their place."""
    statistics: str | None = None
    """.npz with mean and covariance of style embeddings, as cegate data style-stats writes it."""
    alpha: Share = 0.1
    """Share of the drawn style; the rest is the crop's own."""
    covariance: Literal["full", "diag"] = "full"
    """Draw with the whole covariance, or with its singular values alone."""
    region: Literal["masked", "kept"] = "masked"
    """Blocks that are styled: those that the mask takes (authors' code), or those it leaves (the paper's formula)."""
    ratio: Share = 0.1
    """Share of blocks that the mask takes."""
    block: Side = 64
    """Side of a block in pixels."""
    probability: Share = 0.1
    """Share of iterations, or samples, that are styled."""
    draw: Literal["iteration", "sample"] = "iteration"
    """Whether to style is drawn once for all samples of an iteration, or for each."""
    renormalize: bool = True
    """Normalise a styled crop again (the authors' code does not)."""


@dataclass(frozen=True)
class MimConfig:
    """Restoring masked crops beside the segmentation (CrossEarth)."""

    method: Literal["none", "restore"] = "none"
    """none, or restore: a decoder that training alone needs draws the crop from its masked version."""
    decoder: Literal["per_level", "full_aspp", "linear"] = "per_level"
    """A dilated convolution per level, one ASPP for all levels, or none."""
    target: Literal["clean", "input"] = "clean"
    """What is to be restored: the clean crop, or what the backbone saw."""
    loss: Literal["l1", "mse"] = "mse"
    """Mean absolute error (the paper's for CASID), or mean squared error (for all others)."""
    ratio: Share = 0.7
    """Share of blocks that are masked."""
    block: Side = 64
    """Side of a block in pixels."""
    prompt: Literal["fill", "add", "literal"] = "fill"
    """Learned pixels stand in masked blocks, are added everywhere, or multiply (the paper's formula)."""


@dataclass(frozen=True)
class InjectorConfig:
    """Features of the image itself, brought in beside the backbone (CrossEarth)."""

    method: Literal["none", "gse"] = "none"
    """none, or gse: geospatial semantic extractor and injectors."""
    width: Annotated[int, Range(1, 4096)] = 256
    """Inner width of an injector's attention."""
    heads: Annotated[int, Range(1, 256)] = 8
    """Its heads; they divide the width."""
    at: Literal["outputs", "blocks"] = "outputs"
    """On the features that the head sees, or behind those blocks, so that later blocks see it."""
    chain: bool = False
    """The result of one level joins the query of the next."""
    residual: bool = True
    """Add to the features, or take their place."""
    test: bool = True
    """Also on when predicting."""


@dataclass(frozen=True)
class ModalConfig:
    """Modules for two rasters in one frozen backbone (MFNet, arXiv:2410.11160)."""

    method: Literal["none", "mmadapter", "mmlora"] = "none"
    """none, mmadapter or mmlora."""
    rank: Width = 4
    """Rank of mmlora."""
    ratio: SomeShare = 0.25
    """Bottleneck width of mmadapter as a share of the backbone's."""
    fusion: Literal["dfm", "sum"] = "dfm"
    """How the two streams become one: pyramids with squeeze and excitation (dfm), or their sum."""
    single: bool = False
    """Leave the second raster of every set out: the same modules for the image alone."""
    exchange: bool = True
    """Whether the modalities learn of each other within the blocks."""
    official_norm: bool = False
    """BatchNorm in the second raster's pyramid (dfm), as in the published code."""
    dropout: Annotated[float, Range(0, 0.9)] = 0.0
    """Share of training samples that lose one of the two rasters, so that the model serves without it."""


_TERM = r"(ce|dice|focal)"


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    name: Annotated[
        str, Pattern(rf"{_TERM}(\+(?!\1){_TERM}){{0,2}}", "loss", "ce, dice, focal or a sum such as ce+dice")
    ] = "ce"
    """Cross entropy (ce), dice, focal, or a sum such as ce+dice. mask2former brings its own and takes class_weights."""
    class_weights: Annotated[list[NotNegative], Meets(any, "factors of which one is above 0")] | None = None
    """One factor per class; default: all 1."""


@dataclass(frozen=True)
class TrainConfig:
    """The schedule, in iterations."""

    iterations: Count = 20000
    """Training iterations."""
    lr: Positive = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: NotNegative = 0.05
    """Decoupled weight decay; none on norms, biases and embeddings."""
    schedule: Literal["poly", "cosine", "constant", "steps"] = "poly"
    """Course of the learning rate after the warm-up: poly and cosine fall to zero, constant stays at lr."""
    power: Positive = 0.9
    """Exponent of the poly schedule."""
    warmup: Length = 0
    """Iterations of linear warm-up."""
    clip: Positive | None = None
    """Largest gradient norm; default: no clipping."""
    eval_every: Count = 2000
    """Iterations between evaluations; the last iteration is always evaluated."""
    log_every: Count = 50
    """Iterations between two lines of metrics.jsonl."""
    checkpoint_every: Count = 1000
    """Iterations between checkpoints; every evaluation begins with one too."""
    keep_checkpoints: Length = 1
    """Numbered checkpoints kept beside last and best."""
    baseline: bool = False
    """First train frozen backbone + head on the same stream, to compare with."""
    horizon: Count | None = None
    """Iterations over which the schedule runs; default: train.iterations."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    momentum: Annotated[float, Range(0, 0.9999)] = 0.9
    """Momentum of SGD."""
    milestones: Annotated[list[Count], Meets(lambda given: given == sorted(set(given)), "increasing iterations")] = (
        field(default_factory=list)
    )
    """Iterations at which the rate falls (schedule steps)."""
    gamma: SomeShare = 0.1
    """What is left of the rate at a milestone."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is minimised."""


@dataclass(frozen=True)
class EvaluateConfig:
    """How whole images are predicted and measured, in training and by cegate evaluate."""

    stride: Side | None = None
    """Step of the sliding window in pixels; default data.stride."""
    blend: Literal["none", "linear", "cosine"] = "none"
    """Weight of a window's pixels where windows overlap: equal (the published protocol), or falling to its border."""
    tta: Literal["none", "flip"] = "none"
    """Average over flipped images too."""
    mean_classes: list[str] = field(default_factory=list)
    """Classes that means are taken over; default: all."""


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
    style: StyleConfig = field(default_factory=StyleConfig)
    """Crops in the style of other places."""
    mim: MimConfig = field(default_factory=MimConfig)
    """Restoring masked crops beside the segmentation."""
    injector: InjectorConfig = field(default_factory=InjectorConfig)
    """Features of the image itself, brought in beside the backbone."""
    modal: ModalConfig = field(default_factory=ModalConfig)
    """Modules for two rasters in one frozen backbone."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The schedule, in iterations."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """How whole images are predicted and measured, in training and by cegate evaluate."""
