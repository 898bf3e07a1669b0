from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from cegate.scenes.predictor import evaluation_mode


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
