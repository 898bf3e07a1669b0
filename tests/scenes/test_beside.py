from __future__ import annotations

import errno
import os
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest
import rasterio
import torch

from cegate.data.rasters import OpenImage
from cegate.errors import DataError
from cegate.scenes import mosaic, predictor, sink
from cegate.scenes.beside import Behind, ahead
from cegate.scenes.files import predict_files
from cegate.scenes.mosaic import BLENDS, Mosaic, Pixels
from cegate.scenes.sink import ShareArray


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_one_part_is_made_while_the_one_before_it_is_used():
    made, used = [], []
    next_is_made = [threading.Event() for _ in range(6)]

    def make(part):
        assert threading.current_thread() is not threading.main_thread()
        made.append(part)
        next_is_made[part].set()
        return part * 10

    with ahead(make, range(6)) as parts:
        for part in parts:
            used.append(part)
            if len(used) < 6:
                assert next_is_made[len(used)].wait(5), "while this one is used"
            time.sleep(0.005)
            assert len(made) <= len(used) + 1
    assert used == [0, 10, 20, 30, 40, 50] and made == list(range(6))
    with ahead(lambda part: (part, threading.current_thread()), [7]) as parts:
        assert list(parts) == [(7, threading.current_thread())], "no thread for one"


def test_an_error_comes_where_the_part_would_have():
    with ahead(lambda part: 1 / (2 - part), range(4)) as parts:
        assert [next(parts), next(parts)] == [0.5, 1]
        with pytest.raises(ZeroDivisionError):
            next(parts)
    with ahead(lambda part: time.sleep(0.02) or part, range(100)) as parts:
        assert next(parts) == 0  # and no more are asked for


def test_a_call_is_made_while_the_caller_goes_on():
    go_on, done = threading.Event(), []

    def call(number):
        assert go_on.wait(5)
        done.append(number)

    with Behind() as later:
        later(partial(call, 0))
        assert not done
        go_on.set()
        for number in (1, 2):
            later(partial(call, number))
            assert len(done) >= number, "one at most is under way"
    assert done == [0, 1, 2]


@pytest.mark.parametrize("further", [0, 2])
def test_an_error_of_a_call_comes_with_the_next_or_at_the_end(further):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    done = []

    def work():
        with Behind() as later:
            later(fail)
            for _ in range(further):
                later(partial(done.append, 0))

    with pytest.raises(OSError, match="No space"):
        work()
    assert not done


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("size", [(20, 25), (32, 90), (101, 70)], ids=str)
def test_results_are_those_of_one_thread_to_the_last_bit(segmenter, write_scene, in_turn, monkeypatch, size, blend):
    monkeypatch.setattr(mosaic, "PIXELS_ON_CPU", 4 * 32**2)  # so that there are several strips
    pixels = np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8)
    pixels[:, 12:17, :9] = 0
    scene = write_scene("scene.tif", pixels, nodata=0)
    ways = [{"stride": 7}, {"stride": None, "tta": "flip"}]
    found = [
        (segmenter.predict(scene, blend=blend, **way), segmenter.predict_proba(scene, blend=blend, **way))
        for way in ways
    ]
    with in_turn():
        for way, (classes, shares) in zip(ways, found, strict=True):
            np.testing.assert_array_equal(segmenter.predict(scene, blend=blend, **way), classes)
            np.testing.assert_array_equal(segmenter.predict_proba(scene, blend=blend, **way), shares)
            assert (classes == 255).sum() == 45 and np.isnan(shares[:, classes == 255]).all()


@pytest.mark.parametrize(("fit", "batch"), [(None, 1), (None, 3), (50, None)], ids=str)
def test_slow_readers_and_slow_writers_change_nothing(in_turn, fit, batch):
    """Whoever is late waits or is waited for; what is held by one is not written over by another."""
    weight, image = torch.randn(5, 3, 3, 3), torch.randn(3, 130, 60)
    forward = lambda windows: torch.nn.functional.conv2d(windows, weight, padding=1)  # noqa: E731
    delays = np.random.default_rng(0)

    class Source(Pixels):
        def read(self, first, last):
            time.sleep(delays.choice([0, 0.004]))
            return super().read(first, last)

    class Slow(ShareArray):
        def write(self, rows):
            time.sleep(delays.choice([0, 0.004]))
            super().write(rows)

    through = predictor.Predictor(forward, Mosaic(24, 9, "cosine", batch=batch, fit=fit))
    shares, expected, told = Slow(5, (130, 60)), ShareArray(5, (130, 60)), []
    through.run(Source(image), shares, told.append)
    with in_turn():
        through.run(Pixels(image), expected)
    np.testing.assert_array_equal(shares.array, expected.array)
    assert told == sorted(told) and told[-1] == 1


@pytest.fixture
def scenes(write_scene, monkeypatch):
    """Two of several strips."""
    monkeypatch.setattr(mosaic, "PIXELS_ON_CPU", 2 * 32**2)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 90, 40), dtype=np.uint8)
    return [write_scene(name, pixels) for name in ("a.tif", "b.tif")]


def on_call(monkeypatch, owner, name, number, action):
    """Have the number-th call of a method do something else."""
    original, calls = getattr(owner, name), []

    def method(*given, **named):
        calls.append(threading.current_thread())
        return action() if len(calls) == number else original(*given, **named)

    monkeypatch.setattr(owner, name, method)
    return calls


def plan(scenes, tmp_path):
    (tmp_path / "out").mkdir()
    return {scene: tmp_path / "out" / scene.name for scene in scenes}


def test_a_second_strip_that_cannot_be_read_stops_no_other_image(segmenter, scenes, tmp_path, monkeypatch):
    def fail():
        raise rasterio.errors.RasterioIOError("Read failed")

    threads = on_call(monkeypatch, OpenImage, "read", 2, fail)
    written = predict_files(segmenter, plan(scenes, tmp_path))
    assert next(written).mask.name == "b.tif"
    with pytest.raises(DataError, match=r"1 of 2 images have no mask: .*a\.tif: cannot be read as a raster") as caught:
        next(written)
    assert "\n" not in str(caught.value) and threads[1] is not threading.main_thread()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["b.tif"]


@pytest.mark.parametrize("number", [2, 4])  # of writes: one that others follow, and the last
def test_a_disk_that_fills_up_later_on_leaves_nothing(segmenter, scenes, tmp_path, monkeypatch, number):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    threads = on_call(monkeypatch, sink.MaskFile, "write", number, fail)
    with pytest.raises(DataError, match=r"out/a\.tif cannot be written \(No space left on device\)"):
        next(predict_files(segmenter, plan(scenes, tmp_path), stride=20))
    assert not list((tmp_path / "out").iterdir())
    assert len(threads) == number and threads[1] is not threading.main_thread()


def test_an_image_of_one_window_needs_no_thread(segmenter, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail("a thread"))
    assert segmenter.predict(np.zeros((3, 32, 32), np.uint8)).shape == (32, 32)


@pytest.mark.parametrize("where", ["read", "model", "write"])
def test_an_interrupt_ends_all_and_leaves_nothing(segmenter, scenes, tmp_path, monkeypatch, where):
    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # a thread goes on
        raise ValueError("that nobody waits for")

    owner, name = {
        "read": (OpenImage, "read"),
        "model": (predictor.Predictor, "_call"),
        "write": (sink.MaskFile, "write"),
    }[where]
    calls = on_call(monkeypatch, owner, name, 2, interrupt)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        next(predict_files(segmenter, plan(scenes, tmp_path), stride=10))
    assert set(threading.enumerate()) <= before, "before the error is forgotten"
    assert not list((tmp_path / "out").iterdir()) and len(calls) == 2


def test_the_reading_thread_keeps_gdals_options(segmenter, tmp_path):
    """Of a truncated JPEG GDAL makes up the rest, unless told not to; rasterio tells single threads."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 400, 40), dtype=np.uint8)
    path = tmp_path / "a.jpg"
    with rasterio.open(path, "w", driver="JPEG", width=40, height=400, count=3, dtype="uint8") as out:
        out.write(pixels)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3] + b"\xff\xd9")
    errors = []

    def predict():
        try:
            segmenter.predict(path)
        except DataError as error:
            errors.append(str(error))

    thread = threading.Thread(target=predict)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "a.jpg: cannot be read as a raster" in errors[0]


def test_an_error_of_the_model_closes_the_file_after_the_reader_is_through(segmenter, scenes, monkeypatch):
    reading, read = threading.Event(), OpenImage.read
    ends = []

    def slow(self, *given, **named):
        if threading.current_thread() is threading.main_thread():
            return read(self, *given, **named)
        reading.set()
        pixels = read(self, *given, **named)
        time.sleep(0.02)
        ends.append(self._src.closed)
        return pixels

    def fail(self, windows):
        assert reading.wait(5)
        raise ZeroDivisionError

    monkeypatch.setattr(OpenImage, "read", slow)
    monkeypatch.setattr(predictor.Predictor, "_call", fail)
    with pytest.raises(ZeroDivisionError):
        segmenter.predict(scenes[0])
    assert ends and not any(ends)
