from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from cegate.errors import ConfigError
from cegate.scenes.mosaic import Mosaic, Pixels
from cegate.scenes.predictor import Predictor, evaluation_mode


def test_eight_threads_get_the_masks_of_single_calls(segmenter):
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (3, 60 + 5 * k, 70), dtype=np.uint8).repeat(2, 1) for k in range(8)]
    expected = [segmenter.predict(image) for image in images]
    assert len({mask.tobytes() for mask in expected}) == 8 and all(len(np.unique(mask)) > 1 for mask in expected)
    problems: list[str] = []
    start = threading.Barrier(8)

    def work(k: int) -> None:
        start.wait()
        for _ in range(4):
            try:
                wrong = int((segmenter.predict(images[k]) != expected[k]).sum())
            except Exception as error:
                problems.append(f"image {k}: {error!r}")
            else:
                problems.extend([f"image {k}: {wrong} px"] if wrong else [])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_modes_come_back_when_the_last_one_is_through():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()))
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    assert before == [True, True, True, False, True]
    first, second = evaluation_mode(model), evaluation_mode(model)
    first.__enter__()
    second.__enter__()
    assert not any(module.training for module in model.modules())
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules()), "the second is not through"
    second.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before


def test_prediction_leaves_mode_gradients_and_random_state(segmenter):
    segmenter.train()
    try:
        state = torch.get_rng_state()
        first = segmenter.predict(np.zeros((3, 40, 50), np.uint8))
        assert segmenter.training and segmenter.head.training and not segmenter.vit.training
        assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled()
        assert all(weight.grad is None for weight in segmenter.parameters())
    finally:
        segmenter.eval()
    assert np.array_equal(segmenter.predict(np.zeros((3, 40, 50), np.uint8)), first)


@pytest.mark.parametrize("size", [(8, 8), (8, 13)], ids=["one window", "three windows"])
def test_flip_is_the_mean_of_the_shares_of_windows_and_their_mirrors(size):
    weight = torch.randn(4, 3, 3, 3)  # not symmetric
    forward = lambda images: torch.nn.functional.conv2d(images, weight, padding=1)  # noqa: E731
    image, starts = torch.randn(3, *size), {8: [0], 13: [0, 4, 5]}[size[1]]
    expected, times = torch.zeros(4, *size, dtype=torch.float64), torch.zeros(size)
    for x in starts:
        window = image[None, :, :, x : x + 8]
        for flips in ([], [-1]):
            shares = forward(window.flip(flips)).double().softmax(1).flip(flips)[0]
            expected[:, :, x : x + 8] += shares
            times[:, x : x + 8] += 1
    predictor = Predictor(forward, Mosaic(8, 4), tta="flip")
    found = torch.cat([rows.logits for rows in predictor.rows(Pixels(image))], 1)
    torch.testing.assert_close(found.double().exp(), expected / times, rtol=1e-5, atol=1e-6)


def test_flip_of_a_mirrored_image_is_the_mirrored_result(segmenter):
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    shares, mirrored = (segmenter.predict_proba(x, tta="flip") for x in (image, image[..., ::-1].copy()))
    assert np.abs(mirrored[..., ::-1] - shares).max() < 1e-5
    assert np.abs(segmenter.predict_proba(image) - shares).max() > 1e-4
    with pytest.raises(ConfigError, match="stride=0 does not fit windows"):
        segmenter.predictor(stride=0)
    with pytest.raises(ConfigError, match="tta=None is unknown"):
        segmenter.predictor(tta=None)
    with pytest.raises(ConfigError, match=r"tta=flp is unknown; use none or flip; did you mean 'flip'"):
        segmenter.predict(image, tta="flp")
