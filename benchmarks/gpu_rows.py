"""Rows about a GPU, one a process, for scripts/gpu_check.sh: wall time, time of the kernels alone, their number.

    python benchmarks/gpu_rows.py ROW... [--out FILE] [--device cpu --small]

Each row checks its result, prints its lines and appends them to the file at once. ``--small`` is for trying the program
where there is no GPU; its numbers say nothing.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import bench_training_step as steps
import numpy as np
import timm
import torch
from gpu_side_by_side import device_rates
from models import SIZES, VIT_L_512, Probe, make_batch, make_segmenter, mixed_precision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cegate import ops
from cegate.backbone.backbone import Features
from cegate.compute import Numerics
from cegate.data.stream import Batch
from cegate.engine.passes import Passes
from cegate.engine.step_losses import Found
from cegate.fisher import measure_fisher
from cegate.gate import GatePlan
from cegate.kernels.frequency_adapter import frequency_adapter_fft
from cegate.scenes.mosaic import default_stride, window_starts
from cegate.segmenter import Segmenter
from cegate.tasks.stream import StepData

HEADER = ("what", "wall ms", "kernels ms", "kernels", "wall / kernels", "of bf16 peak", "memory GB", "note")
STEPS, LARGEST = 20, 20
FORWARD_TFLOP = 2.89
"""Of DINOv2-L at 512 px with 4 images; the gradient through the frozen backbone takes as much again."""
LOSS_TOLERANCE = 2e-2


class Measured(NamedTuple):
    """Medians of one call."""

    wall: float
    """Milliseconds between two calls of many in a row."""
    busy: float | None
    """Milliseconds that kernels ran; None on a CPU."""
    launches: int | None
    memory: float | None
    """Peak, GB."""


def measure(call: Callable[[], object], rounds: int = STEPS, warm: int = 4) -> Measured:
    """Time of a call as training makes it, one after the other without a wait between them."""
    for _ in range(warm):
        call()
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for _ in range(2):
            call()
        return Measured((time.perf_counter() - began) / 2 * 1e3, None, None, None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    walls = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(rounds):
            call()
        torch.cuda.synchronize()
        walls.append((time.perf_counter() - began) / rounds * 1e3)
    memory = torch.cuda.max_memory_allocated() / 1e9
    kernels = kernels_of(call)
    busy = sum(time for _, time, _ in kernels)
    return Measured(statistics.median(walls), busy, sum(count for *_, count in kernels), memory)


def kernels_of(call: Callable[[], object], rounds: int = 3) -> list[tuple[str, float, int]]:
    """(name, milliseconds, launches) of the kernels of one call, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(rounds):
            call()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    table = [(e.key, e.self_device_time_total / rounds / 1e3, e.count // rounds) for e in events]
    return sorted(table, key=lambda row: -row[1])


def line(what: str, found: Measured, tflop: float | None = None, note: str = "") -> str:
    """A row of the table."""
    on_gpu = found.busy is not None
    share = f"{tflop * 1e12 / device_rates()[1] / found.wall * 1e3:.0%}" if tflop and on_gpu else ""
    number = lambda value, form: "" if value is None else format(value, form)  # noqa: E731
    cells = [what, f"{found.wall:.2f}", number(found.busy, ".2f"), number(found.launches, ",")]
    cells += [f"{found.wall / found.busy:.2f}" if on_gpu else "", share, number(found.memory, ".1f"), note]
    return f"| {' | '.join(cells)} |"


# training steps -----------------------------------------------------------------------------------------------------


def fast_step(model: Segmenter, images: Tensor, labels: Tensor, device: str) -> tuple[Callable[[], Tensor], Passes]:
    """As training with run.speed=auto makes it, the optimiser behind it; and what says whether it was recorded."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    run, batch = model.encode, Batch(images, labels, [str(k) for k in range(len(images))])

    def work(data: StepData, encode: Callable[..., Features] | None) -> Found:
        optimiser.zero_grad(set_to_none=True)
        with mixed_precision(device):
            features = model.neck((encode or run)(data.source.image), data.source.image)
            loss = model.loss_of(features, data.source.label).mean()
        loss.backward()
        return Found(loss.detach(), [])

    numerics = Numerics(torch.device(device), "bf16", partial(mixed_precision, device))
    task = SimpleNamespace(name="segmentation", recordable=model.head.recordable)
    passes, data = Passes(work, "auto", numerics, model, [task]), StepData(batch, {}, torch.empty(0))

    def step() -> Tensor:
        loss = passes(data).loss.clone()
        optimiser.step()
        return loss

    return step, passes


def compiled_lora() -> nn.Module:
    """PEFT's LoRA under torch.compile, block by block."""
    model = steps.peft_lora()
    for block in model.vit.blocks:
        block.compile()
    return model


def training_step(name: str, builder: Callable[[], nn.Module], passes: float, ours: bool, device: str) -> Iterator[str]:
    """Rows of a step, as it is written and, if it is ours, with run.speed=auto; the losses must fall alike.

    Args:
        passes: forward passes of the backbone that the work comes to, for the share of the peak.
    """
    batch = make_batch(steps.SIZE, device=device)
    losses = {}
    for way in ("as written", "auto")[: 1 + ours]:
        torch.manual_seed(0)
        model = builder()
        began = time.perf_counter()
        fast = way == "auto"
        step, passes_of = fast_step(model, *batch, device) if fast else (steps.make_step(model, *batch), None)
        losses[way] = [step().item() for _ in range(4)]
        note = f"first four steps {time.perf_counter() - began:.1f} s"
        off = max(abs(a - b) / abs(a) for a, b in zip(losses["as written"], losses[way], strict=True))
        note += "" if way == "as written" else f"; losses off by {off:.1e} at most"
        if fast and device == "cuda" and not passes_of.is_played:
            note += "; **recording failed, as written**"
        if off > LOSS_TOLERANCE:
            note = f"**WRONG: losses {losses}**"
        yield line(f"{name}, {way}", measure(step), FORWARD_TFLOP * passes, note)
        del model, step, passes_of


def largest_kernels(device: str) -> Iterator[str]:
    """The twenty that a step with 18 sites spends most time in."""
    step, _ = fast_step(steps.gated(steps.SITES), *make_batch(steps.SIZE, device=device), device)
    for _ in range(4):
        step()
    yield f"\n| kernel of a step with run.speed=auto and {steps.SITES} sites | ms | launches |\n|---|--:|--:|"
    for name, milliseconds, count in kernels_of(step)[:LARGEST] if device == "cuda" else ():
        yield f"| `{name[:90]}` | {milliseconds:.3f} | {count} |"


# scoring, operators, prediction -------------------------------------------------------------------------------------


def scoring(device: str) -> Iterator[str]:
    """Fisher scores of 16 samples, all sites, beside forward and backward of as many."""
    model = make_segmenter(steps.SIZE).to(device)
    model.head.requires_grad_(False)
    model.toolbox.apply(GatePlan(model.toolbox.sites))
    images, labels = make_batch(steps.SIZE, 16 if device == "cuda" else 2, device)
    precision = partial(mixed_precision, device)
    score = lambda: measure_fisher(model, model.toolbox, [Probe(images, labels)], precision=precision)  # noqa: E731

    def plain() -> tuple[Tensor, ...]:
        with precision():
            loss = model.loss(images, labels).sum()
        return torch.autograd.grad(loss, list(model.toolbox.parameters()))

    assert all(np.isfinite(list(score().values())))
    ours, theirs = measure(score, 5, 2), measure(plain, 5, 2)
    yield line(f"Fisher scores of {len(images)} samples", ours, note=f"{ours.wall / theirs.wall:.2f} of the next row")
    yield line("forward and backward of the same", theirs)


def frequency(device: str) -> Iterator[str]:
    """The frequency operator, forward and backward, beside the published form."""
    batch, side, channels, width = (8, 64, 1024, 32) if device == "cuda" else (1, 8, 32, 4)
    shapes = [(3, width, channels), (3, width), (3, channels, width), (3, channels), (3, channels), (3,)]
    weights = [torch.randn(shape, device=device) * 0.02 for shape in shapes] + [torch.tensor(0.1, device=device)]
    weights = [w.bfloat16().requires_grad_() for w in weights]
    x = torch.randn(batch, side * side, channels, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)

    def run(op: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        y = op(tensors[0], (side, side), *tensors[1:], cutoff=0.3)
        return torch.autograd.grad(y, tensors, dy.to(y.dtype))

    exact = [t.detach().float().requires_grad_() for t in (x, *weights)]
    ours, published = partial(run, ops.frequency_adapter, x, *weights), partial(run, frequency_adapter_fft, *exact)
    for mine, theirs in zip(ours(), published(), strict=True):
        if theirs.numel() == 1:  # of the scale: a sum of random signs, which may cancel
            continue
        error = (mine.float() - theirs).norm() / theirs.norm().clamp(min=1e-12)
        assert error < 0.05, f"a gradient is off by {error:.1%}"
    yield line(f"frequency operator, {batch} x {side * side} tokens, forward and backward", measure(ours))
    yield line("the same by FFT in float32", measure(published, 5))


def predict_scene(device: str) -> Iterator[str]:
    """``predict`` of a large GeoTIFF, beside the model time of its windows."""
    import rasterio

    side = 8192 if device == "cuda" else 256
    model = make_segmenter(steps.SIZE).to(device).eval()
    crop = steps.SIZE.pixels
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scene.tif"
        pixels = np.random.default_rng(0).integers(0, 255, (3, side, side), np.uint8)
        with rasterio.open(path, "w", driver="GTiff", width=side, height=side, count=3, dtype="uint8") as file:
            file.write(pixels)
        began = time.perf_counter()
        mask = model.predict(path)
        seconds = time.perf_counter() - began
    assert mask.shape == (side, side)
    windows = len(window_starts(side, crop, default_stride(crop))) ** 2
    images = torch.randn(8, 3, crop, crop, device=device)
    with torch.no_grad(), mixed_precision(device):
        of_eight = measure(lambda: model(images), 5, 2)
    note = f"its {windows} windows take {of_eight.wall / 8 * windows / 1e3:.1f} s of the model"
    yield f"| predict of {side} x {side} px, its first call | {seconds * 1e3:.0f} | | | | | | {note} |"


ROWS: dict[str, Callable[[str], Iterator[str]]] = {
    "step_18": lambda d: training_step("step, 18 sites", partial(steps.gated, steps.SITES), 2, True, d),
    "step_frozen": lambda d: training_step("step, frozen backbone", steps.frozen, 1, True, d),
    "peft": lambda d: training_step("step, PEFT LoRA on every layer", steps.peft_lora, 2, False, d),
    "step_72": lambda d: training_step("step, all sites", partial(steps.gated, None), 2, True, d),
    "peft_compiled": lambda d: training_step("step, PEFT LoRA under torch.compile", compiled_lora, 2, False, d),
    "scoring": scoring,
    "frequency": frequency,
    "predict": predict_scene,
    "fft_adapter": lambda d: training_step("step, Earth-Adapter by FFT", steps.earth_adapter, 2, False, d),
    "mask2former": lambda d: training_step("step, 18 sites, mask2former", _with_mask2former, 2, True, d),
    "kernels": largest_kernels,
}
"""In order of importance."""


def _with_mask2former() -> Segmenter:
    model = make_segmenter(steps.SIZE, "mask2former").to(steps.DEVICE).train()
    model.toolbox.apply(steps.spread(model.toolbox.depth, steps.SITES))
    return model


def heading() -> str:
    """Device, versions and commit."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = f"{name}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"
    rates = ""
    if torch.cuda.is_available():
        copy, product = device_rates()
        rates = f"copy {copy / 1e12:.2f} TB/s, bf16 product {product / 1e12:.0f} TFLOP/s. "
    return (
        f"\n## {time.strftime('%Y-%m-%d %H:%M')}, commit {commit.stdout.strip() or 'unknown'}\n\n{about}. {rates}"
        f"DINOv2-L, patch 16, {steps.SIZE.pixels} px, batch {steps.SIZE.batch}, bfloat16. *wall*: of one of many calls "
        "in a row; *kernels*: their time alone, by torch.profiler."
    )


def table() -> str:
    """The head of the table."""
    return f"\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}"


PARTS = {"heading": heading, "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=[*PARTS, *ROWS], metavar="ROW", help=", ".join([*PARTS, *ROWS]))
    parser.add_argument("--list", action="version", version=" ".join(ROWS), help="name the rows, and stop")
    parser.add_argument("--out", type=Path, help="append to this file")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the program")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU is there; --device cpu --small tries the program without one")
    steps.DEVICE, steps.SIZE = given.device, VIT_L_512
    if given.small:
        steps.SIZE, steps.SITES = SIZES["vit_t"]._replace(pixels=32, batch=2), 6
    for row in given.rows:
        torch.manual_seed(0)
        for text in [PARTS[row]()] if row in PARTS else ROWS[row](given.device):
            print(text, flush=True)
            if given.out is not None:
                with given.out.open("a") as file:
                    file.write(text + "\n")


if __name__ == "__main__":
    main()
