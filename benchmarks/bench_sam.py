"""SAM's encoder as a program of blocks beside timm's, two modalities beside a batch of two, and what is behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from gpu_side_by_side import gpu_side_by_side, needs_gpu
from memory import peak_bytes
from side_by_side import note, side_by_side
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from cegate.backbone import sam
from cegate.backbone.backbone import Backbone
from cegate.backbone.ports import Circuit, Tokens
from cegate.heads.unetformer import UNetFormerHead
from cegate.necks.dfm import DFM
from cegate.parts.mm_adapter import MMAdapter
from cegate.parts.mm_lora import MMLoRA
from cegate.parts.part import Part

SIZES = {
    "width 192": {"embed_dim": 192, "depth": 6, "num_heads": 3, "global_attn_indexes": (2, 5)},
    "ViT-B": "samvit_base_patch16",
    "ViT-L": "samvit_large_patch16",
}
ON_CPU = ("width 192", "ViT-B")
DEVICE, GPU_SIZES, BATCH, PIXELS, ROUNDS = "cuda", ("ViT-B", "ViT-L"), 8, 256, 15
TIMM, PAIR, SINGLE = "timm's encoder", "the encoder on a batch of two", "one modality, batch of two"
NAIVE, STEP = "a product for each of the four updates", "a step"
ATOL = {"cpu": 1e-5, "cuda": 1e-3}  # of values around 1; a GPU may round products to TF32


def make_encoder(size: str, device: str = "cpu") -> nn.Module:
    """Random weights, frozen; positions resampled beforehand as SAM does it, so that timm's own run agrees."""
    of = SIZES[size]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = {"img_size": 1024, "num_classes": 0, "use_rel_pos": True, "window_size": 14}
        vit = sam.create_sam(of) if isinstance(of, str) else VisionTransformerSAM(**plain, **of)
        for weight in vit.parameters():
            nn.init.normal_(weight, std=0.02)
    grid = (PIXELS // 16, PIXELS // 16)
    vit.pos_embed = nn.Parameter(sam.resize_positions(vit.pos_embed.detach(), grid))
    return vit.to(device).eval().requires_grad_(False)


def make_images(samples: int, device: str = "cpu") -> Tensor:
    return torch.randn(samples, 3, PIXELS, PIXELS, device=device)


def silent(part: Part) -> Part:
    """A part whose updates are 0, so that the result is known; what it costs does not depend on it."""
    with torch.no_grad():
        for name, weight in part.named_parameters():
            if "up" in name.rpartition(".")[2]:
                weight.zero_()
    return part


@torch.no_grad()
def measure(
    benchmark, ways: Mapping[str, Callable[[], Tensor]], targets: Mapping[str, str], rounds: int, device: str = "cpu"
) -> None:
    """Check that all ways give the first one's result, then their times, and their memory beside them."""
    candidate, *others = ways
    for got in [ways[name]() for name in others if name != SINGLE]:
        torch.testing.assert_close(ways[candidate](), got, rtol=ATOL[device], atol=ATOL[device])
    if device == "cpu":
        side_by_side(benchmark, ways[candidate], {n: ways[n] for n in others}, rounds=rounds, target=targets)
    else:
        gpu_side_by_side(benchmark, ways, targets=targets, rounds=rounds)
    note_peaks(benchmark, ways, device)


def note_peaks(benchmark, ways: Mapping[str, Callable[[], object]], device: str) -> None:
    peaks = {name: peak_bytes(way, device) for name, way in ways.items()}
    own = next(iter(peaks.values()))
    for name, peak in peaks.items():
        note(f"{benchmark.name} peak memory", name, f"{peak / 1e6:.1f} MB", f"{own / max(peak, 1):.3f}")


# --- ways ------------------------------------------------------------------------------------------------------------


def ways_of_encoder(size: str, samples: int, device: str = "cpu") -> dict[str, Callable[[], Tensor]]:
    vit, images = make_encoder(size, device), make_images(samples, device)
    backbone = Backbone(vit)
    return {
        "the block program": lambda: vit.neck(backbone.run(images, [backbone.depth - 1]).maps[0]),
        TIMM: lambda: vit.forward_features(images),
    }


def ways_of_two(size: str, part: type[Part], samples: int, device: str = "cpu") -> dict[str, Callable[[], Tensor]]:
    """The same images, as two modalities of half of them each and as a batch."""
    backbone, images = Backbone(make_encoder(size, device)), make_images(samples, device)
    layers = [backbone.depth - 1]
    two, one = (Circuit(silent(part.build(backbone, streams=n)).to(device).plugs()) for n in (2, 1))
    return {
        "two modalities": lambda: backbone.run(images, layers, two, streams=2).maps[0],
        PAIR: lambda: backbone.run(images, layers).maps[0],
        SINGLE: lambda: backbone.run(images, layers, one).maps[0],
    }


def ways_of_exchange(width: int, tokens: int, device: str = "cpu") -> dict[str, Callable[[], Tensor]]:
    """MMLoRA at both linear maps of an MLP, on what they take and give: [2 B, T, ...]."""
    lora = MMLoRA(1, width).to(device)
    layer = lora.layers[0]
    for weight in lora.parameters():
        nn.init.normal_(weight, std=0.02)
    shapes = {"fc1": (width, 4 * width), "fc2": (4 * width, width)}
    given = {
        name: (torch.randn(2, tokens, wide, device=device), torch.randn(2, tokens, out, device=device))
        for name, (wide, out) in shapes.items()
    }

    def one_product() -> Tensor:
        grid = Tokens(0, (tokens, 1), 2)
        return torch.cat([lora._linear(getattr(layer, n), *given[n], grid).flatten() for n in given])

    def four_products() -> Tensor:
        """As the paper writes it."""
        results = []
        for name, (u, f) in given.items():
            update = getattr(layer, name)
            low = [u[m : m + 1] @ update.down[m].mT @ update.up[m].mT for m in (0, 1)]
            results += [f[m : m + 1] + update.mix[m] * low[m] + (1 - update.mix[m]) * low[1 - m] for m in (0, 1)]
        return torch.cat([part.flatten() for part in results])

    return {"one product for both": one_product, NAIVE: four_products}


def ways_behind(size: str, device: str = "cpu") -> dict[str, Callable[[], Tensor]]:
    """Neck and head alone, and a whole step: forward and backward with MMLoRA. Both give the gradient of the neck."""
    backbone = Backbone(make_encoder(size, device))
    lora = MMLoRA.build(backbone).to(device)
    neck = DFM(backbone.width, project=backbone.finish).to(device)
    head = UNetFormerHead(neck.width, 6).to(device)
    images, layers = make_images(2, device), [backbone.depth - 1]
    labels = torch.randint(0, 6, (1, PIXELS, PIXELS), device=device)
    circuit = Circuit(lora.plugs())
    with torch.no_grad():
        maps = backbone.run(images, layers, circuit, streams=2).maps[0]
    maps.requires_grad_()

    def learn(given: Tensor) -> Tensor:
        for module in (lora, neck, head):
            module.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of the dropout
            head.loss(neck(given), labels).mean().backward()
        return torch.cat([weight.grad.flatten() for weight in neck.parameters()])

    return {
        "DFM and decoder": lambda: learn(maps),
        STEP: lambda: learn(backbone.run(images, layers, circuit, streams=2).maps[0]),
    }


def measure_behind(benchmark, size: str, rounds: int, device: str = "cpu") -> None:
    with torch.enable_grad():
        ways = ways_behind(size, device)
        results = {name: way() for name, way in ways.items()}
        torch.testing.assert_close(*results.values(), rtol=1e-3, atol=ATOL[device])
        candidate, step = ways
        if device == "cpu":
            side_by_side(benchmark, ways[candidate], {step: ways[step]}, rounds=rounds, target={STEP: "<= 0.2"})
        else:
            gpu_side_by_side(benchmark, ways, targets={STEP: "<= 0.2"}, rounds=rounds)
        note_peaks(benchmark, ways, device)


# --- rows ------------------------------------------------------------------------------------------------------------


def rounds_of(size: str) -> int:
    return 9 if size == "width 192" else 3


@pytest.mark.parametrize("size", ON_CPU)
def bench_encoder(benchmark, size):
    measure(benchmark, ways_of_encoder(size, 2), {TIMM: "<= 0.8"}, rounds_of(size))


@pytest.mark.parametrize("part", [MMLoRA, MMAdapter])
@pytest.mark.parametrize("size", ON_CPU)
def bench_two_modalities(benchmark, size, part):
    measure(benchmark, ways_of_two(size, part, 2), {PAIR: "<= 1.05", SINGLE: "<= 1.05"}, rounds_of(size))


@pytest.mark.parametrize("width", [192, 768])
def bench_exchange(benchmark, width):
    measure(benchmark, ways_of_exchange(width, 256), {NAIVE: "<= 1"}, 25)


def bench_neck_and_head_in_a_training_step(benchmark):
    """ViT-B, a pair of 256 px; the rest of the step is the encoder's forward and backward pass with MMLoRA."""
    measure_behind(benchmark, "ViT-B", 3)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("size", GPU_SIZES)
def bench_encoder_on_the_gpu(benchmark, size):
    measure(benchmark, ways_of_encoder(size, BATCH, DEVICE), {TIMM: "<= 0.8"}, ROUNDS, DEVICE)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("part", [MMLoRA, MMAdapter])
@pytest.mark.parametrize("size", GPU_SIZES)
def bench_two_modalities_on_the_gpu(benchmark, size, part):
    measure(benchmark, ways_of_two(size, part, BATCH, DEVICE), {PAIR: "<= 1.05", SINGLE: "<= 1.05"}, ROUNDS, DEVICE)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("size", GPU_SIZES)
def bench_neck_and_head_on_the_gpu(benchmark, size):
    measure_behind(benchmark, size, ROUNDS, DEVICE)
