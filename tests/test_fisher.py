"""Fisher in one backward pass against one backward pass per sample, in float64, weight by weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from cegate.config import (
    Config,
    DataConfig,
    FrequencyConfig,
    ModelConfig,
    SemanticConfig,
    SpatialConfig,
    ToolboxConfig,
)
from cegate.errors import TrainingError
from cegate.fisher import measure_fisher
from cegate.gate import GatePlan
from cegate.segmenter import build

CONFIG = Config(
    data=DataConfig(classes=["background", "building", "road"], crop=32),
    model=ModelConfig(backbone="tiny", weights="none"),
    toolbox=ToolboxConfig(
        spatial=SpatialConfig(rank=3), semantic=SemanticConfig(width=4), frequency=FrequencyConfig(width=5, cutoff=0.9)
    ),
)


pytestmark = pytest.mark.usefixtures("little_mask2former")


@dataclass
class Probe:
    image: torch.Tensor
    label: torch.Tensor


def make_model(head="linear", cutoff=0.9):
    frequency = replace(CONFIG.toolbox.frequency, cutoff=cutoff)
    config = replace(
        CONFIG,
        model=replace(CONFIG.model, head=head, features=[0, 1, 2, 3]),
        toolbox=replace(CONFIG.toolbox, frequency=frequency),
    )
    model = build(config).double()
    with torch.no_grad():
        for parameter in [*model.toolbox.parameters(), *model.head.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, parameter in model.toolbox.named_parameters():
            if name.endswith("cutoff"):
                parameter.fill_(0.5)
    return model


def make_probe(samples=3):
    label = torch.randint(0, 3, (samples, 32, 32))
    label[:, :3] = 255
    return Probe(torch.randn(samples, 3, 32, 32, dtype=torch.float64), label)


def loop_over_samples(model, probe):
    """The definition: one forward and backward for each sample, squared, averaged."""
    model.eval()
    model.toolbox.apply(GatePlan(model.toolbox.sites))
    total = {name: torch.zeros_like(p) for name, p in model.toolbox.named_parameters()}
    for image, label in zip(probe.image, probe.label, strict=True):
        model.zero_grad()
        with torch.random.fork_rng():
            model.loss(image[None], label[None]).sum().backward()
        for name, parameter in model.toolbox.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad.square() / len(probe.image)
    model.zero_grad()
    model.toolbox.apply(GatePlan())
    return total


@pytest.mark.parametrize("cutoff", [0.9, "learnable"])
@pytest.mark.parametrize("head", ["linear", "mask2former"])
def test_every_weight_of_every_kind_matches_the_loop_over_samples(head, cutoff):
    model, probe = make_model(head, cutoff), make_probe(samples=2 if head == "mask2former" else 3)
    truth = loop_over_samples(model, probe)
    diagonal = measure_fisher(model, model.toolbox, [probe], diagonal=True)
    assert diagonal.keys() == truth.keys()
    for name, value in truth.items():
        assert diagonal[name].shape == value.shape
        torch.testing.assert_close(diagonal[name], value, rtol=1e-7, atol=1e-12 * truth_scale(truth), msg=name)
    seen = {name for name, value in truth.items() if value.abs().max() > 0}
    assert {n.split(".", 2)[2] for n in seen} >= {"down_q", "up_v", "down", "up_bias", "router", "scale"}


def truth_scale(truth):
    return max(float(value.max()) for value in truth.values())


def test_scores_are_the_diagonal_summed_over_a_site_and_ordered():
    model, probe = make_model(), make_probe()
    scores = measure_fisher(model, model.toolbox, [probe])
    diagonal = measure_fisher(model, model.toolbox, [probe], diagonal=True)
    assert list(scores) == model.toolbox.sites
    for site, score in scores.items():
        mass = sum(float(v.sum()) for name, v in diagonal.items() if name.rsplit(".", 1)[0] == site)
        assert score == pytest.approx(mass, rel=1e-9)


def test_micro_batches_do_not_change_the_scores():
    model, probe = make_model(), make_probe(4)
    whole = measure_fisher(model, model.toolbox, [probe])
    parts = [Probe(probe.image[i : i + n], probe.label[i : i + n]) for i, n in ((0, 1), (1, 3))]
    assert measure_fisher(model, model.toolbox, parts) == pytest.approx(whole, rel=1e-9)


def test_the_batch_estimator_squares_the_mean_gradient():
    model, probe = make_model(), make_probe()
    model.eval()
    model.toolbox.apply(GatePlan(model.toolbox.sites))
    model.loss(probe.image, probe.label).mean().backward()
    truth = {name: p.grad.square() for name, p in model.toolbox.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = [Probe(probe.image[i : i + 1], probe.label[i : i + 1]) for i in range(3)]
    diagonal = measure_fisher(model, model.toolbox, parts, diagonal=True, estimator="batch")
    for name, value in truth.items():
        torch.testing.assert_close(diagonal[name], value, rtol=1e-7, atol=1e-18)
    scores = measure_fisher(model, model.toolbox, parts, estimator="batch")
    assert sum(scores.values()) == pytest.approx(sum(float(v.sum()) for v in truth.values()))


def test_nll_scores_the_pixel_cross_entropy():
    model, probe = make_model(), make_probe()
    assert measure_fisher(model, model.toolbox, [probe], loss="nll") == pytest.approx(
        measure_fisher(model, model.toolbox, [probe], loss="task"), rel=1e-9
    )  # for the linear head the task loss is the mean pixel cross entropy


def test_a_loss_scale_is_divided_out():
    model, probe = make_model(), make_probe()
    plain = measure_fisher(model, model.toolbox, [probe])
    assert measure_fisher(model, model.toolbox, [probe], loss_scale=1024.0) == pytest.approx(plain, rel=1e-9)
    plain = measure_fisher(model, model.toolbox, [probe], estimator="batch")
    scaled = measure_fisher(model, model.toolbox, [probe], estimator="batch", loss_scale=8.0)
    assert scaled == pytest.approx(plain, rel=1e-9)


def test_bfloat16_autocast_gives_nearly_the_scores_of_float32_and_ends_before_backward(monkeypatch):
    model, probe = make_model().float(), make_probe()
    probe.image = probe.image.float()
    exact = measure_fisher(model, model.toolbox, [probe])
    backward, narrow = torch.Tensor.backward, []
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda loss: narrow.append(torch.is_autocast_enabled("cpu")) or backward(loss)
    )
    bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)
    rounded = measure_fisher(model, model.toolbox, [probe], precision=bfloat16)
    assert narrow == [False]
    for site, score in exact.items():
        assert rounded[site] == pytest.approx(score, rel=0.25, abs=1e-3 * max(exact.values())), site
    assert rounded != exact


@pytest.mark.parametrize("head", ["linear", "mask2former"])
def test_scoring_leaves_gradients_modes_plan_flags_and_random_state_as_found(head):
    model, probe = make_model(head), make_probe(2)
    model.train()
    model.toolbox.apply(GatePlan(["semantic.1"]))
    model.loss(probe.image, probe.label).sum().backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    state, plan = torch.get_rng_state(), model.toolbox.plan
    measure_fisher(model, model.toolbox, [probe])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.toolbox.plan == plan
    assert {n: m.training for n, m in model.named_modules()} == modes
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == flags[name], name
        if grads[name] is None:
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad, grads[name]), name


def test_every_process_gets_the_scores_of_all_samples(in_a_group):
    torch.manual_seed(0)
    model, probe = make_model(), make_probe()
    parts = [Probe(probe.image[part], probe.label[part]) for part in (slice(0, 1), slice(1, 3))]

    def measure(rank):
        scores = [measure_fisher(model, model.toolbox, [parts[rank]], estimator=e) for e in ("per_sample", "batch")]
        diagonal = measure_fisher(model, model.toolbox, [parts[rank]], diagonal=True)
        with pytest.raises(TrainingError, match="empty"):
            measure_fisher(model, model.toolbox, [parts[rank]] if rank else [])
        return [*scores, {name: float(value.sum()) for name, value in diagonal.items()}]

    first, second = in_a_group(2, measure)
    assert first == second
    *scores, diagonal = first
    for found, estimator in zip(scores, ("per_sample", "batch"), strict=True):
        alone = measure_fisher(model, model.toolbox, [probe], estimator=estimator)
        assert found == pytest.approx(alone, rel=1e-9)
    alone = measure_fisher(model, model.toolbox, [probe], diagonal=True)
    assert diagonal == pytest.approx({name: float(value.sum()) for name, value in alone.items()}, rel=1e-9)


def test_an_empty_probe_and_a_nan_loss_are_refused():
    model, probe = make_model(), make_probe()
    with pytest.raises(TrainingError, match="empty"):
        measure_fisher(model, model.toolbox, [])
    probe.image[0] = float("nan")
    with pytest.raises(TrainingError, match="probe has losses"):
        measure_fisher(model, model.toolbox, [probe])
