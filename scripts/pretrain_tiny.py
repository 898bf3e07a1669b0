"""Remake the ViT that ships with cegate: masked autoencoding of unlabelled generated scenes.

    python scripts/pretrain_tiny.py --output cegate/weights/tiny.safetensors

The scenes come from the climates marked for pretraining; none of them is a source or a target of the quick start, and
no label is read. The recipe is that of masked autoencoders (He et al., CVPR 2022): three quarters of the patches are
hidden, the encoder sees the rest, and a small decoder restores the hidden patches, normalised patch by patch. Only the
encoder is kept, in float16 (3.2 MB).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cegate.backbone.vit import tiny_vit
from cegate.data.climates import PRETRAINING
from cegate.data.generator import render_scene

CROP, PATCH, MASKED = 128, 8, 0.75
MEAN, STD = 0.5, 0.5


class MaskedAutoencoder(nn.Module):
    """The tiny ViT with a two-layer decoder that is thrown away afterwards."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.vit = tiny_vit(CROP, PATCH)
        self.enter = nn.Linear(self.vit.embed_dim, width)
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (CROP // PATCH) ** 2, width))
        self.decoder = nn.Sequential(Block(width, 4), Block(width, 4), nn.LayerNorm(width))
        self.restore = nn.Linear(width, 3 * PATCH**2)

    def forward(self, images: Tensor) -> Tensor:
        """Mean squared error on the hidden patches of normalised images [B, 3, CROP, CROP]; a scalar."""
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))  # [B, N, D]
        batch, count, _ = tokens.shape
        order = torch.rand(batch, count).argsort(1)
        seen, hidden = order.split([count - int(count * MASKED), int(count * MASKED)], dim=1)
        code = self.vit.norm(self.vit.blocks(take(tokens, seen)))
        known = self.enter(code)
        filler = self.hidden_token.expand(batch, hidden.shape[1], -1)
        full = torch.cat([known, filler], 1)[torch.arange(batch)[:, None], order.argsort(1)] + self.position
        restored = self.restore(take(self.decoder(full), hidden))
        return F.mse_loss(restored, take(patch_targets(images), hidden))


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, N, D] at index [B, M] -> [B, M, D]."""
    return tokens[torch.arange(len(tokens))[:, None], index]


def patch_targets(images: Tensor) -> Tensor:
    """Pixels of each patch, standardised within the patch: [B, N, 3 PATCH^2]."""
    patches = F.unfold(images, PATCH, stride=PATCH).mT
    return (patches - patches.mean(-1, keepdim=True)) / (patches.std(-1, keepdim=True) + 0.1)


def draw_scenes(per_climate: int) -> np.ndarray:
    """Unlabelled pictures [S, 3, 256, 256] uint8 of the pretraining climates."""
    return np.stack([render_scene(climate, n, 256)[0] for climate in PRETRAINING for n in range(per_climate)])


def draw_batch(scenes: np.ndarray, size: int, rng: np.random.Generator) -> Tensor:
    """Random windows of random scale, flipped and with a random gain per band; normalised [size, 3, CROP, CROP]."""
    crops = []
    for index in rng.integers(len(scenes), size=size):
        side = int(rng.integers(CROP // 2, 257))
        top, left = rng.integers(0, 257 - side, size=2)
        crop = torch.from_numpy(scenes[index][:, top : top + side, left : left + side]).float() / 255
        crop = F.interpolate(crop[None], CROP, mode="bilinear", antialias=True)[0]
        crop = crop.rot90(int(rng.integers(4)), (1, 2))
        gain = torch.from_numpy(rng.uniform(0.7, 1.3, size=(3, 1, 1))).float()
        crops.append((crop * gain).clamp(0, 1))
    return (torch.stack(crops) - MEAN) / STD


def main() -> None:
    """Pretrain and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="where the .safetensors file goes")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=150, help="scenes of each climate")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    scenes = draw_scenes(args.scenes)
    model = MaskedAutoencoder()
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = max(1, args.iterations // 20)
    start, running = time.time(), math.nan
    for step in range(args.iterations):
        share = step / args.iterations
        lr = args.lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimiser.param_groups:
            group["lr"] = lr
        loss = model(draw_batch(scenes, args.batch_size, rng))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        if step % 200 == 0 or step == args.iterations - 1:
            print(f"{step:6d}  loss {running:.4f}  {time.time() - start:6.0f} s", flush=True)
            save(model, args.output)


def save(model: MaskedAutoencoder, path: Path) -> None:
    """Write the encoder in float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in model.vit.state_dict().items()}, path)


if __name__ == "__main__":
    main()
