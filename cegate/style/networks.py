"""What tells the style of an image and gives it another one: the published pair of networks, or a few numbers.

Both are frozen, take RGB images in 0..1 and are interchangeable; statistics of one do not fit the other.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cegate.errors import CheckpointError, nearest, refuse_unreadable
from cegate.style.predictor import DIM, LEAST_SIDE_PX, StylePredictor
from cegate.style.transfer import STEP_PX, StyleTransfer

log = logging.getLogger(__name__)

PREDICTOR_FILE, TRANSFER_FILE = "checkpoint_stylepredictor.pth", "checkpoint_transformer.pth"
STATISTICS_FILE = "checkpoint_embeddings.pth"
WRAPPERS = ("state_dict_stylepredictor", "state_dict_ghiasi", "state_dict")
"""Keys of the public files under which the weights lie."""
LEAST_STD = 1e-3
"""Of a channel whose contrast is changed: an even channel has none to stretch."""


class StyleModel(nn.Module, ABC):
    """A style as a vector: told of an image, and put on one. Frozen, in evaluation mode, without gradients."""

    dim: ClassVar[int]
    """Length of an embedding."""
    about: str
    """Where it comes from, for messages."""

    @abstractmethod
    def embed(self, image: Tensor) -> Tensor:
        """RGB images [B, 3, H, W] in 0..1 -> embeddings [B, dim]."""

    @abstractmethod
    def restyle(self, image: Tensor, embedding: Tensor, downsample: int = 0) -> Tensor:
        """RGB images [B, 3, H, W] in 0..1 in the style of embeddings [B, dim], same size, in 0..1.

        Args:
            downsample: style the image at 1 / 2^downsample of its size, and enlarge the result.
        """

    def train(self, mode: bool = True) -> StyleModel:
        """Stay in evaluation mode: the networks' running statistics are part of what was published."""
        return super().train(False)


class StyleNetworks(StyleModel):
    """The published predictor and transfer network."""

    dim = DIM

    def __init__(self, about: str = "random style networks") -> None:
        super().__init__()
        self.about = about
        self.predictor, self.transfer = StylePredictor(), StyleTransfer()
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def embed(self, image: Tensor) -> Tensor:
        shorter = min(image.shape[-2:])
        if shorter < LEAST_SIDE_PX:
            size = [-(-side * LEAST_SIDE_PX // shorter) for side in image.shape[-2:]]
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        return self.predictor(image)

    @torch.no_grad()
    def restyle(self, image: Tensor, embedding: Tensor, downsample: int = 0) -> Tensor:
        height, width = image.shape[-2:]
        step, factor = STEP_PX << downsample, 1 << downsample
        below, right = (max(-side % step, 4 * step - side) for side in (height, width))  # 16 px for reflection at 1/4
        x = F.pad(image, (0, right, 0, below), mode="replicate") if below or right else image
        if downsample:
            x = F.avg_pool2d(x, factor)
        x = self.transfer(x, embedding)
        if downsample:
            x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
        return x[..., :height, :width]


class ColourStatistics(StyleModel):
    """Mean and deviation of each channel as embedding [B, 6]; another style shifts and stretches the channels.

    Needs no weights: the default offline. It changes colour and contrast, never texture.
    """

    dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.about = "colour statistics (style.weights is not given)"

    @torch.no_grad()
    def embed(self, image: Tensor) -> Tensor:
        pixels = image.flatten(2)
        return torch.cat([pixels.mean(2), pixels.std(2, correction=0)], dim=1)

    @torch.no_grad()
    def restyle(self, image: Tensor, embedding: Tensor, downsample: int = 0) -> Tensor:
        own = self.embed(image)[:, :, None, None]
        wanted = embedding[:, :, None, None]
        stretch = wanted[:, 3:].clamp(min=0) / own[:, 3:].clamp(min=LEAST_STD)
        return ((image - own[:, :3]) * stretch + wanted[:, :3]).clamp(0, 1)


def load_style(weights: str | Path | None) -> StyleModel:
    """The style model of a configuration.

    Args:
        weights: folder with the public files ``checkpoint_stylepredictor.pth`` and ``checkpoint_transformer.pth``, or
            one .safetensors or .pth file with both networks as ``predictor.*`` and ``transfer.*`` (as `cegate convert`
            takes them out of a CrossEarth checkpoint); None: no networks, colour statistics.

    Raises:
        CheckpointError: files are missing or unreadable, or are of another network; keys are named.
    """
    if weights is None:
        log.warning("style: no style.weights, so styles are means and deviations of colours")
        return ColourStatistics()
    path = Path(weights).expanduser()
    networks = StyleNetworks(str(path))
    if path.is_dir():
        _load(networks.predictor, path / PREDICTOR_FILE, read_weights(path / PREDICTOR_FILE), "style predictor")
        _load(networks.transfer, path / TRANSFER_FILE, read_weights(path / TRANSFER_FILE), "style transfer network")
    else:
        _load(networks, path, read_weights(path), "pair of style networks")
    return networks


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or .pth file by name, without ``module.``; nothing of a pickle is run.

    Raises:
        CheckpointError: missing, unreadable, or no weights by name.
    """
    if not path.is_file():
        raise CheckpointError(
            f"style.weights: there is no {path}; give the folder with {PREDICTOR_FILE} and {TRANSFER_FILE}, or leave "
            "style.weights out for colour statistics"
        )
    refuse_unreadable(path, CheckpointError)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its zip or pickle reader raises
        raise CheckpointError(
            f"style.weights: {path} is no file of weights that PyTorch or safetensors reads ({type(error).__name__})"
        ) from error
    for key in WRAPPERS:
        state = state.get(key, state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"style.weights: {path} holds no weights by name; it was not made by style augmentation")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _load(network: nn.Module, path: Path, state: Mapping[str, Tensor], what: str) -> None:
    own = network.state_dict()
    counters = {
        name: value for name, value in own.items() if name.endswith("num_batches_tracked")
    }  # old files have none
    state = counters | dict(state)
    missing, left = [name for name in own if name not in state], [name for name in state if name not in own]
    wrong = [
        f"{k} {list(state[k].shape)} for {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    texts = {"missing": missing, "unexpected": left, "of another shape": wrong}
    if problems := [f"{label} {_some(names)}" for label, names in texts.items() if names]:
        guess = nearest(left[0], own) if left else ""
        raise CheckpointError(
            f"style.weights: {path} is no {what} ({'; '.join(problems)}{guess}); give the public files of style "
            "augmentation (arXiv:1809.05375)"
        )
    network.load_state_dict(state)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
