"""Styling and masked images in an iteration, with a network of one convolution."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cegate.data.stream import Batch
from cegate.errors import ConfigError
from cegate.masks import BlockMask
from cegate.style.injection import EarthStyleInjection
from cegate.style.networks import ColourStatistics
from cegate.style.statistics import StyleStatistics
from cegate.tasks.masked_images import MaskedImages
from cegate.tasks.styling import Styling
from cegate.tasks.task import Step, View

CROP, BANDS, CHANNELS = 32, 3, 8
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.2]).view(3, 1, 1)


class Encoder(nn.Module):
    """Four maps of a batch; no samples meet."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(BANDS, CHANNELS, 8, stride=8) for _ in range(4)])
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> SimpleNamespace:
        self.seen.append(tuple(images.shape))
        return SimpleNamespace(maps=[layer(images).tanh() for layer in self.layers])


def styling(**options) -> Styling:
    a = np.random.default_rng(0).normal(size=(6, 6)) * 0.05
    spread = StyleStatistics(np.array([0.5, 0.4, 0.3, 0.2, 0.2, 0.2]), a @ a.T)
    injection = EarthStyleInjection(
        ColourStatistics(), spread, mean=MEAN.flatten().tolist(), std=STD.flatten().tolist(), alpha=0.5
    )
    return Styling(injection, BlockMask(0.5, 8, section="style"), **{"probability": 1.0} | options)


def masked(**options) -> MaskedImages:
    sizes = {"channels": CHANNELS, "bands": BANDS, "crop": CROP, "seed": 3}
    return MaskedImages(BlockMask(0.5, 8), **sizes | options)


def batch(size: int = 2, seed: int = 0) -> Batch:
    image = torch.rand(size, BANDS, CROP, CROP, generator=torch.Generator().manual_seed(seed))
    label = torch.zeros(size, CROP, CROP, dtype=torch.int64)
    return Batch((image - MEAN) / STD, label, [f"image {b}" for b in range(size)])


def run(tasks, iteration: int = 0, given: Batch | None = None, encoder: Encoder | None = None):
    given, encoder = given or batch(), encoder or Encoder()
    step = Step(iteration, given, encoder, seed=3, views={"image": View(given.image, given.label)})
    for task in tasks:
        task.prepare(step)
    step.features = {name: encoder(view.images) for name, view in step.views.items()}
    return step, [term for task in tasks for term in task.terms(step)]


def fires(style: Styling, iteration: int, size: int = 2) -> torch.Tensor:
    return style.fires(Step(iteration, SimpleNamespace(__len__=None), None, seed=3, slots=range(size)))


def values(terms) -> dict[str, torch.Tensor]:
    return {term.name: term.losses for term in terms}


@pytest.mark.parametrize("loss", ["mse", "l1"])
@pytest.mark.parametrize("target", ["clean", "input"])
def test_losses_are_those_written_out_in_float64(loss, target):
    style = styling()
    task = masked(styling=style, loss=loss, target=target)
    encoder = Encoder()
    step, terms = run([style, task], encoder=encoder)
    x, x_m, x_s = step.batch.image, step.views["masked"].images, step.views["image"].images
    restored = {
        name: task.decoder(encoder(images).maps, (CROP, CROP)).detach().double()
        for name, images in (("m", x_m), ("s", x_s))
    }
    d = (lambda a, b: (a - b).abs().mean((1, 2, 3))) if loss == "l1" else (lambda a, b: ((a - b) ** 2).mean((1, 2, 3)))
    expected = {
        "mim": d(restored["m"], (x if target == "clean" else x_m).double()),
        "mim_styled": d(restored["s"], (x if target == "clean" else x_s).double()),
        "style_consistency": (restored["m"] - restored["s"]).abs().mean((1, 2, 3)),
    }
    found = values(terms)
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].detach().numpy(), value.detach().numpy(), rtol=2e-5)
    assert all(term.weight == 1 and term.samples == ["image 0", "image 1"] for term in terms)


def test_terms_of_styled_images_stand_exactly_in_styled_iterations():
    style = styling(probability=0.3)
    task, seen = masked(styling=style), []
    for iteration in range(20):
        step, terms = run([style, task], iteration)
        fired = bool(fires(style, iteration).any())
        seen.append(fired)
        assert [term.name for term in terms] == (["mim", "mim_styled", "style_consistency"] if fired else ["mim"])
        assert torch.equal(step.views["image"].images, step.batch.image) != fired
    assert 1 < sum(seen) < 15


def test_a_tenth_of_the_iterations_is_styled():
    style = styling(probability=0.1)
    fired = torch.stack([fires(style, iteration, 3) for iteration in range(2000)])
    assert (fired[:, 0] == fired[:, 1]).all()  # one draw for all samples
    assert abs(fired[:, 0].float().mean() - 0.1) < 3 * (0.09 / 2000) ** 0.5
    apart = styling(probability=0.1, draw="sample")
    fired = torch.stack([fires(apart, iteration, 3) for iteration in range(2000)]).float()
    assert (fired[:, 0] != fired[:, 1]).any()
    assert abs(fired.mean() - 0.1) < 3 * (0.09 / 6000) ** 0.5


def test_where_samples_draw_for_themselves_weights_keep_the_mean_over_the_batch():
    style = styling(probability=0.5, draw="sample")
    iteration = next(i for i in range(50) if fires(style, i, 4).tolist() == [False, True, False, False])
    step, terms = run([style, masked(styling=style)], iteration, batch(4))
    changed = (step.views["image"].images != step.batch.image).flatten(1).any(1)
    assert changed.tolist() == [False, True, False, False]
    assert [term.weight for term in terms] == [1.0, 0.25, 0.25]
    assert terms[1].samples == ["image 1"] and terms[1].losses.shape == (1,)


def test_everything_is_a_function_of_seed_iteration_and_slot():
    """A second process, or a resumed run, makes the same: fresh tasks, other order, other global state."""
    encoder = Encoder()
    first = {}
    style = styling(probability=0.5)
    task = masked(styling=style)
    for iteration in range(6):
        first[iteration] = values(run([style, task], iteration, encoder=encoder)[1])
    for iteration in (5, 2):
        torch.manual_seed(iteration + 99)
        style = styling(probability=0.5)
        again = masked(styling=style)
        found = values(run([style, again], iteration, encoder=encoder)[1])
        assert list(found) == list(first[iteration])
        assert all(torch.equal(found[name], first[iteration][name]) for name in found)


def test_nothing_is_drawn_from_torchs_generator():
    style = styling()
    task, encoder = masked(styling=style), Encoder()
    before = torch.get_rng_state()
    run([style, task], encoder=encoder)
    assert torch.equal(torch.get_rng_state(), before)


def test_masked_images_are_made_of_clean_ones_and_without_injection():
    style = styling()
    step, _ = run([style, masked(styling=style)])
    view = step.views["masked"]
    kept = BlockMask(0.5, 8).draw((CROP, CROP), 3, 0, [0, 1])
    assert view.beside == "image" and not view.plain  # one pass
    assert torch.equal(view.images, step.batch.image * kept)  # the prompt starts at 0
    assert torch.equal(step.views["image"].labels, step.batch.label)


def test_with_injection_at_blocks_styled_images_are_encoded_apart():
    style = styling()
    encoder = Encoder()
    apart = masked(styling=style, separate=True)
    step, terms = run([style, apart], encoder=encoder)
    assert step.views["masked"].plain and step.views["masked"].beside is None
    assert step.views["styled"].plain and torch.equal(step.views["styled"].images, step.views["image"].images)
    _, others = run([style, masked(styling=style)], encoder=encoder)
    for a, b in zip(terms, others, strict=True):
        torch.testing.assert_close(a.losses, b.losses)
    assert (
        "styled"
        not in run([styling(probability=0.0), masked(styling=styling(probability=0.0), separate=True)])[0].views
    )


def test_what_is_filled_up_does_not_count():
    given = batch()
    given.image[0, :, 16:], given.image[0, :, :, 24:] = 0, 0
    task, encoder = masked(), Encoder()
    step, terms = run([task], given=given, encoder=encoder)
    restored = task.decoder(step.features["masked"].maps, (CROP, CROP))
    expected = (restored - given.image)[0, :, :16, :24].square().mean()
    torch.testing.assert_close(terms[0].losses[0], expected)
    given.image[0] = 0
    assert run([task], given=given)[1][0].losses[0] == 0


def test_a_large_crop_is_compared_at_512_px(monkeypatch):
    monkeypatch.setattr("cegate.tasks.masked_images.LARGEST_PX", 16)
    task, encoder = masked(), Encoder()
    step, terms = run([task], encoder=encoder)
    restored = task.decoder(step.features["masked"].maps, (16, 16))
    target = F.interpolate(step.batch.image, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(terms[0].losses, (restored - target).square().mean((1, 2, 3)))


def test_prompt_decoder_and_backbone_learn_and_styles_do_not():
    style = styling()
    task, encoder = masked(styling=style), Encoder()
    step, terms = run([style, task], encoder=encoder)
    sum(term.weight * term.losses.mean() for term in terms).backward()
    learned = [p for part in task.parts().values() for p in part.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [*learned, *encoder.parameters()])
    kept = BlockMask(0.5, 8).draw((CROP, CROP), 3, 0, [0, 1])
    assert not task.prompt.value.grad[0, :, kept.all(0)[0]].any()
    assert not style.parts() and not step.views["image"].images.requires_grad
    assert {name: part.deployed for name, part in task.parts().items()} == {"prompt": False, "decoder": False}


def test_the_journal_goes_on_where_it_was():
    style, encoder = styling(probability=0.5), Encoder()
    task, losses = masked(styling=style), []
    for iteration in range(10):
        losses += run([style, task], iteration, encoder=encoder)[1]
    resumed, again = styling(probability=0.5), masked()
    resumed.load_state(style.state())
    again.load_state(task.state())
    said = again.journal()
    assert said == task.journal() and resumed.journal() == style.journal()
    for name in ("mim", "mim_styled", "style_consistency"):
        mean = torch.cat([term.losses for term in losses if term.name == name]).double().mean()
        assert said[name] == pytest.approx(mean.item(), rel=1e-12)
    assert style.journal() == task.journal() == {}


def test_a_probability_out_of_range_names_the_key():
    with pytest.raises(ConfigError, match=r"style.probability=2 is no probability; use 0 \(never\) to 1 \(always\)"):
        styling(probability=2)
