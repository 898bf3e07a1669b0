"""The published style networks, and the numbers that stand in for them."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cegate.errors import CheckpointError
from cegate.style.networks import PREDICTOR_FILE, TRANSFER_FILE, ColourStatistics, StyleNetworks, load_style
from cegate.style.predictor import StylePredictor, scale_input
from cegate.style.transfer import StyleTransfer


def recipe(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The weight of a name, as the vectors' README has it."""
    n = np.random.RandomState((zlib.crc32(name.encode("ascii")) + seed) % 2**32).standard_normal(shape)
    if name.endswith("running_mean"):
        n = 0.1 * n
    elif name.endswith("running_var"):
        n = 0.9 + 0.2 * abs(n)
    elif name.endswith("bn.weight"):
        n = 1 + 0.05 * n
    elif len(shape) == 1:
        n = 0.1 * n
    elif len(shape) == 4:
        n = n * np.sqrt(2 / np.prod(shape[1:]))
    else:
        n = n * np.sqrt(1 / shape[1])
    return n.astype(np.float32)


def fill(network: nn.Module, seed: int) -> list[np.ndarray]:
    own = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    values = {name: recipe(name, tuple(value.shape), seed) for name, value in own.items()}
    network.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()}, strict=False)
    return list(values.values())


@pytest.fixture(scope="module")
def networks() -> StyleNetworks:
    networks = StyleNetworks()
    fill(networks.predictor, 301)
    fill(networks.transfer, 301)
    return networks.double()


@pytest.fixture(scope="module")
def vectors(shared):
    with np.load(shared / "vectors" / "crossearth_style_nets.npz") as file:
        return {name: torch.from_numpy(file[name]).double() for name in file.files if name != "recipe_seed"}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("name", "network"), [("predictor", StylePredictor), ("transfer", StyleTransfer)])
def test_weights_carry_the_published_names(vectors, name, network):
    values = np.concatenate([v.ravel().astype(np.float64) for v in fill(network(), 301)])
    expected = vectors[f"check_{name}"].numpy()
    np.testing.assert_allclose([values.sum(), abs(values).sum(), values.size], expected, rtol=1e-9)


def test_the_transfer_network_has_as_many_weights_as_published():
    assert sum(p.numel() for p in StyleTransfer().parameters()) == 1_954_593


def test_the_predictor_gives_the_published_embedding(networks, vectors):
    image = vectors["image"]
    assert error(scale_input(image), vectors["predictor.scaled_input"]) < 1e-6
    features = networks.predictor.features(scale_input(image))
    assert error(features, vectors["predictor.Mixed_6e"]) < 2e-6
    assert error(networks.embed(image), vectors["embedding"]) < 2e-6


@pytest.mark.parametrize("downsample", [0, 1])
def test_the_transfer_network_gives_the_published_image(networks, vectors, downsample):
    image, alpha = vectors["image"], float(vectors["alpha"])
    mixed = alpha * vectors["style"] + (1 - alpha) * networks.embed(image)
    assert error(mixed, vectors["mixed"]) < 2e-6
    name = "styled_down1" if downsample else "styled"
    assert error(networks.restyle(image, mixed, downsample), vectors[name]) < 2e-6
    if not downsample:
        assert error(networks.restyle(image, vectors["style"]), vectors["transfer"]) < 2e-6


@pytest.mark.parametrize("size", [(16, 16), (21, 38), (50, 7)], ids=str)
@pytest.mark.parametrize("downsample", [0, 1])
def test_any_size_is_embedded_and_comes_back_as_it_was(networks, size, downsample):
    image = torch.rand(2, 3, *size).double()
    embedding = networks.embed(image)
    assert embedding.shape == (2, 100)
    styled = networks.restyle(image, embedding, downsample)
    assert styled.shape == image.shape
    assert styled.min() > 0 and styled.max() < 1


def test_samples_of_a_batch_do_not_meet(networks):
    image, style = torch.rand(3, 3, 32, 48).double(), torch.randn(3, 100).double()
    together = networks.restyle(image, style)
    alone = [networks.restyle(image[b : b + 1], style[b : b + 1]) for b in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_style_model_never_trains():
    networks = StyleNetworks().train()
    assert not any(module.training for module in networks.modules())
    assert not any(parameter.requires_grad for parameter in networks.parameters())
    image = torch.rand(1, 3, 48, 48, requires_grad=True)
    assert not networks.restyle(image, networks.embed(image)).requires_grad


def test_colour_statistics_are_those_of_the_image_and_put_back_exactly():
    style, image = ColourStatistics(), torch.rand(2, 3, 20, 24) * 0.3 + 0.3
    wanted = torch.tensor([[0.5, 0.45, 0.55, 0.05, 0.06, 0.07]]).expand(2, -1)
    styled = style.restyle(image, wanted)
    torch.testing.assert_close(style.embed(styled), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(style.restyle(image, style.embed(image)), image, atol=1e-6, rtol=0)
    assert style.restyle(torch.zeros(1, 3, 8, 8), wanted[:1] * 9).max() <= 1


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_public_files_and_one_file_of_both_load(tmp_path, networks):
    networks = StyleNetworks()
    torch.save({"state_dict_stylepredictor": networks.predictor.state_dict()}, tmp_path / PREDICTOR_FILE)
    torch.save({"state_dict_ghiasi": networks.transfer.state_dict()}, tmp_path / TRANSFER_FILE)
    torch.save(networks.state_dict(), tmp_path / "both.pth")
    for given in (tmp_path, tmp_path / "both.pth"):
        loaded = load_style(given).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in networks.state_dict().items())


def test_weights_of_another_network_are_refused_by_key(tmp_path):
    torch.save({"state_dict_stylepredictor": StyleTransfer().state_dict()}, tmp_path / PREDICTOR_FILE)
    torch.save({"state_dict_ghiasi": StyleTransfer().state_dict()}, tmp_path / TRANSFER_FILE)
    with pytest.raises(
        CheckpointError, match=r"checkpoint_stylepredictor.pth is no style predictor \(missing Conv2d_1a"
    ):
        load_style(tmp_path)


def test_a_missing_file_says_what_is_expected(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no .*checkpoint_stylepredictor.pth; give the folder with"):
        load_style(tmp_path)


def test_without_weights_the_statistics_serve_and_say_so(caplog):
    assert isinstance(load_style(None), ColourStatistics)
    assert "no style.weights" in caplog.text


def test_a_pickle_in_a_weight_file_never_runs(tmp_path):
    torch.save({"model": nn.Conv2d(1, 1, 1)}, tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"whole.pth is no file of weights"):
        load_style(tmp_path / "whole.pth")


def test_reflection_and_upsampling_are_written_out_by_hand(networks):
    """One styled layer in independent words: nearest twice, reflect, convolve, normalise, scale and shift, ReLU."""
    layer, x, e = networks.transfer.layers[8], torch.randn(1, 128, 5, 6).double(), torch.randn(1, 100).double()
    padded = F.pad(x.repeat_interleave(2, 2).repeat_interleave(2, 3), (1, 1, 1, 1), mode="reflect")
    y = F.conv2d(padded, layer.conv.weight, layer.conv.bias)
    y = (y - y.mean((2, 3), keepdim=True)) / (y.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    gamma = (layer.fc_gamma.weight @ e[0] + layer.fc_gamma.bias)[:, None, None]
    beta = (layer.fc_beta.weight @ e[0] + layer.fc_beta.bias)[:, None, None]
    torch.testing.assert_close(layer(x, e), (gamma * y + beta).clamp(min=0))
