"""Whole runs of CrossEarth: with Rein, and around the gate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from cegate.adapter_folder import load_adapter
from cegate.checkpoint import load_checkpoint, load_state, trained_weights
from cegate.compute import Numerics, precision_of
from cegate.engine.sets import open_sets
from cegate.engine.stage import Stage
from cegate.engine.team import Team
from cegate.engine.trainer import describe, train
from cegate.errors import CheckpointError, ConfigError
from cegate.gate import GatePlan
from cegate.masks import BlockMask
from cegate.parts.restore import build_decoder
from cegate.runfolder import RunFolder
from cegate.segmenter import build
from cegate.style.statistics import StyleStatistics

pytestmark = pytest.mark.usefixtures("no_figures")

TINY = {
    **{"refiner__tokens": 5, "refiner__rank": 2, "injector__width": 16, "injector__heads": 2},
    **{"style__probability": 1.0, "style__ratio": 0.5, "style__block": 8, "style__alpha": 0.5, "mim__block": 8},
    **{"train__iterations": 3, "train__checkpoint_every": 1, "train__log_every": 1, "train__eval_every": 3},
    **{"data__validation": "null", "mim__decoder": "linear"},
}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def make(small):
    return lambda method, folder=None, **changes: small(folder or method, run__method=method, **TINY | changes)


@pytest.mark.parametrize("method", ["crossearth", "crossearth_gate"])
def test_a_run_cut_in_a_styled_iteration_goes_on_to_the_same_bytes_and_is_shared_without_what_only_trains(
    make, monkeypatch, method
):
    step, config = Stage.step, make(method, "cut")

    def step_until(self, batch):
        if self.iteration == 1:
            raise RuntimeError("power cut")
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "step", step_until)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    cut, whole = train(config, resume=True).path, train(make(method, "whole")).path
    for name in ("metrics.jsonl", "gates.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    a, b = (load_state(folder / "checkpoints/last.pt") for folder in (whole, cut))
    assert a.tasks["style"]["styled"] == b.tasks["style"]["styled"]
    assert {key.split(".")[1] for key in a.task_weights} == {"prompt", "decoder"}
    for kept, other in ((a.trained, b.trained), (a.task_weights, b.task_weights)):
        assert kept.keys() == other.keys() and all(torch.equal(kept[key], other[key]) for key in kept)
    losses = [line for line in lines(whole / "metrics.jsonl") if line["split"] == "train"]
    assert [line["styled"] for line in losses] == [1.0] * 3
    assert all(line[name] > 0 for line in losses for name in ("mim", "mim_styled", "style_consistency"))

    shared = safetensors.torch.load_file(whole / "adapter/adapter_model.safetensors")
    learns = {"crossearth": {"refiner"}, "crossearth_gate": {"toolbox"}}[method]
    assert {key.partition(".")[0] for key in shared} == {"head", "injector", *learns}
    loaded = load_adapter(whole, "cpu")
    trained = load_checkpoint(RunFolder(whole), "best", config, "cpu").eval()
    image = torch.randn(2, 3, 40, 36)
    with torch.no_grad():
        assert torch.equal(loaded(image), trained(image))
        assert not torch.equal(loaded(image), build(config).eval()(image))


def test_pictures_show_what_is_styled_masked_and_restored_by_the_weights_that_count(make, monkeypatch):
    seen = {}
    monkeypatch.setattr("cegate.figures.draw_images", lambda columns, path: seen.update(columns, path=path))
    config = make("crossearth", gate__samples=3)
    path = train(config).path
    assert seen.pop("path") == path / "figures/restored.png"
    assert {title: np.shape(images) for title, images in seen.items()} == dict.fromkeys(
        ("image", "styled", "masked", "restored"), (3, 3, 32, 32)
    )
    hidden = ~BlockMask(0.7, 8).draw((32, 32), 0, 3, range(3)).numpy()
    kept = np.broadcast_to(~hidden, (3, 3, 32, 32))
    image, masked, restored = (np.stack(seen[title]) for title in ("image", "masked", "restored"))
    assert image.min() >= 0 and image.max() <= 1
    np.testing.assert_allclose(masked[kept], image[kept], atol=1e-6)
    state = load_state(path / "checkpoints/best.pt")
    network, decoder = load_checkpoint(RunFolder(path), "best", config, "cpu").eval(), build_decoder("linear", 128, 3)
    decoder.load_state_dict(
        {key.removeprefix("mim.decoder."): v for key, v in state.task_weights.items() if ".decoder." in key}
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (network.recipe.mean, network.recipe.std))
    with torch.no_grad():
        x = ((torch.from_numpy(masked) - mean) / std).float()
        expected = decoder(network.encode(x, plain=True).maps, (32, 32)) * std + mean
    np.testing.assert_allclose(restored, expected.numpy(), atol=1e-4)


def test_what_is_switched_off_is_as_if_it_were_not_there(make):
    never = train(make("crossearth", style__probability=0.0)).path
    absent = train(make("rein_gse_mim")).path
    for name in ("adapter/adapter_model.safetensors", "gates.jsonl"):
        assert (never / name).read_bytes() == (absent / name).read_bytes()
    first, second = (lines(path / "metrics.jsonl") for path in (never, absent))
    assert [{key: value for key, value in line.items() if key != "styled"} for line in first] == second


def stage_of(config) -> Stage:
    config, sets = open_sets(config)
    network = build(config)
    numerics = Numerics(torch.device("cpu"), *precision_of("fp32", torch.device("cpu")))
    initial = {key: value.clone() for key, value in trained_weights(network).items()}
    return Stage("after", config, network, sets, numerics, Team(), initial)


def test_the_gate_is_scored_on_clean_samples_of_the_source(make):
    """A fresh injection changes nothing, so the masses are those of the gate alone although every iteration is
    styled."""
    around, alone = (stage_of(make(method)).measure() for method in ("crossearth_gate", "gate"))
    assert around == alone and any(around.values())


def test_all_of_the_loss_is_scored_sample_by_sample(make):
    """Against one backward pass per sample over its segmentation loss and its restoration."""
    stage = stage_of(make("crossearth_gate", gate__loss="all", gate__samples=3))
    toolbox, network = stage.network.toolbox, stage.network
    with torch.no_grad():
        for weight in toolbox.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))  # fresh ones know no gradient of what they multiply
    before = [weight.grad for part in stage.task_parts.values() for weight in part.parameters()]
    found = stage.measure()
    assert before == [weight.grad for part in stage.task_parts.values() for weight in part.parameters()]
    assert all(part.training for part in stage.task_parts.values())

    segmentation, _, mim = stage.tasks
    network.eval()
    expected, slot = dict.fromkeys(toolbox.sites, 0.0), 0
    toolbox.apply(GatePlan(toolbox.sites))
    for batch in segmentation.probe(0):
        for image, label in zip(batch.image, batch.label, strict=True):
            network.zero_grad()
            kept = mim.mask.draw(tuple(image.shape[-2:]), 0, 0, [slot])
            loss = network.loss(image[None], label[None])[0]
            masked = network.encode(network.whole_patches(mim.prompt(image[None], kept), 0.0), plain=True)
            loss = loss + (mim.decoder(masked.maps, image.shape[-2:])[0] - image).square().mean()
            loss.backward()
            for site in toolbox.sites:
                squares = [p.grad.double().square().sum() for p in toolbox.parameters_of(site).values()]
                expected[site] += float(sum(squares)) / 3
            slot += 1
    assert found == pytest.approx(expected, rel=1e-4)
    only = stage_of(make("crossearth_gate", "task")).measure()
    assert any(found[site] != pytest.approx(only[site], rel=1e-2) for site in toolbox.sites)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("gate", {"gate__loss": "all"}, "gate.loss=all adds the restoration of masked images, but mim.method is none"),
        ("crossearth_gate", {"gate__loss": "all", "injector__at": "blocks"}, "gate.loss=all needs injector.at=outputs"),
    ],
)
def test_a_loss_that_cannot_be_scored_is_refused(make, method, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(method, **changes)


def test_what_a_run_would_do_is_said_before_it_begins(make):
    told = describe(make("crossearth")).splitlines()
    assert (
        "styles: the source's own, by colour statistics (style.weights is not given); in 100 % of the iterations, "
        in ("".join(told))
    )
    assert "masked images: 70 % of blocks of 8 px, linear, mse" in told
    assert any(line.startswith("injector: gse at outputs, ") for line in told)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"style__weights": "{}/other.safetensors"},
            CheckpointError,
            r"other\.safetensors is no pair of style networks",
        ),
        ({"style__weights": "{}"}, CheckpointError, r"there is no \S+checkpoint_stylepredictor\.pth; give the folder"),
        (
            {"style__statistics": "{}/hundred.npz"},
            CheckpointError,
            r"hundred\.npz is of embeddings of 100 numbers, but",
        ),
        ({"style__statistics": "{}/none.npz"}, CheckpointError, r"none\.npz cannot be read"),
        ({"style__ratio": 1.5}, ConfigError, r"style\.ratio=1\.5 is out of range; use 0 to 1"),
        ({"mim__ratio": -0.1}, ConfigError, r"mim\.ratio=-0\.1 is out of range; use 0 to 1"),
        ({"style__block": 33}, ConfigError, r"style\.block=33 is larger than data\.crop=32; use at most the crop"),
        ({"mim__block": 64}, ConfigError, r"mim\.block=64 is larger than data\.crop=32; use at most the crop"),
        ({"injector__heads": 3}, ConfigError, r"injector\.width=16 is no multiple of injector\.heads=3"),
        ({"injector__at": "blocks", "injector__chain": True}, ConfigError, r"injector\.chain=true goes with"),
        ({"mim__method": "none"}, ConfigError, r"run\.method=crossearth means mim\.method=restore, but it is none"),
    ],
)
def test_what_does_not_fit_is_one_line_and_makes_no_folder(make, tmp_path, changes, error, message):
    safetensors.torch.save_file({"encoder.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    StyleStatistics(np.zeros(100), np.eye(100)).save(tmp_path / "hundred.npz")
    with pytest.raises(error, match=message) as raised:
        train(make("crossearth", "run", **{key: str(value).format(tmp_path) for key, value in changes.items()}))
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()
