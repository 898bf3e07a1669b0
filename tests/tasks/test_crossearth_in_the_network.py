"""CrossEarth's parts and tasks in a real network: what an ablation leaves out changes nothing else."""

from __future__ import annotations

import pytest
import torch

import cegate
from cegate.data.stream import Batch
from cegate.masks import BlockMask
from cegate.tasks.masked_images import MaskedImages
from cegate.tasks.task import Step, View

CROP = 32


def network(**injector):
    config = {
        "run": {"seed": 4},
        "data": {"classes": ["a", "b", "c"], "crop": CROP, "stride": CROP},
        "model": {"backbone": "tiny", "weights": "none"},
        "toolbox": {"spatial": {"rank": 2}, "semantic": {"width": 2}, "frequency": {"width": 2}},
        "gate": {"method": "none"},
        "refiner": {"method": "rein", "tokens": 4, "rank": 2},
        "injector": injector,
    }
    return cegate.build(config).train()


def batch() -> Batch:
    image, label = torch.randn(2, 3, CROP, CROP), torch.randint(0, 3, (2, CROP, CROP))
    return Batch(image, label, ["one", "two"])


def masked(model, **options) -> MaskedImages:
    return MaskedImages(BlockMask(0.5, 8), channels=model.backbone.width, bands=3, crop=CROP, seed=1, **options)


def run(model, given: Batch, tasks) -> tuple[Step, dict[str, torch.Tensor]]:
    step = Step(0, given, model, 1, views={"image": View(given.image, given.label)})
    for task in tasks:
        task.prepare(step)
    step.encode()
    return step, {term.name: term.losses for task in tasks for term in task.terms(step)}


@pytest.mark.parametrize("at", ["outputs", "blocks"])
def test_a_fresh_injection_is_rein_to_the_last_bit(at):
    given = batch()
    with_it, without = network(method="gse", at=at), network()
    for name, value in without.state_dict().items():
        assert torch.equal(with_it.state_dict()[name], value), name  # nothing else is drawn otherwise
    one, _ = run(with_it, given, [])
    other, _ = run(without, given, [])
    assert torch.equal(one.loss("image"), other.loss("image"))
    assert torch.equal(with_it.eval()(given.image), without.eval()(given.image))


def test_masked_images_leave_the_segmentation_loss_alone():
    model, given = network(), batch()
    alone, _ = run(model, given, [])
    beside, terms = run(model, given, [masked(model)])
    torch.testing.assert_close(beside.loss("image"), alone.loss("image"), rtol=1e-6, atol=0)
    assert list(terms) == ["mim"]


@pytest.mark.parametrize("at", ["outputs", "blocks"])
def test_what_is_injected_is_not_restored_from(at):
    """Restoration sees the backbone alone: its loss does not change with the injection, nor reaches it."""
    model, given = network(method="gse", at=at), batch()
    task = masked(model, separate=at == "blocks")
    _, before = run(model, given, [task])
    injection = model.parts()["injector"]
    with torch.no_grad():
        for injector in injection.injectors:
            injector.gamma.fill_(0.5)
    step, after = run(model, given, [task])
    torch.testing.assert_close(after["mim"], before["mim"], rtol=1e-6, atol=0)
    after["mim"].mean().backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in injection.parameters())
    assert model.refiner.scale.grad is not None and not any(p.grad is not None for p in model.vit.parameters())
    step.loss("image").mean().backward()
    assert all(parameter.grad is not None for parameter in injection.gse.parameters())


def test_switched_off_at_test_it_is_rein_again():
    given = batch()
    model, plain = network(method="gse", test=False), network()
    with torch.no_grad():
        for injector in model.parts()["injector"].injectors:
            injector.gamma.fill_(0.5)
    assert not torch.equal(run(model, given, [])[0].loss("image"), run(plain, given, [])[0].loss("image"))
    assert torch.equal(model.eval()(given.image), plain.eval()(given.image))
