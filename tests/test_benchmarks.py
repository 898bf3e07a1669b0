"""The benchmarks that wait for a GPU still run: the same code on the CPU, with tiny sizes and no clock that counts."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


class Recorder(SimpleNamespace):
    """What a benchmark needs of pytest-benchmark."""

    def __init__(self) -> None:
        super().__init__(name="row", extra_info={})

    def pedantic(self, way, args=(), rounds=1):
        return way(*args)


@pytest.fixture
def load(monkeypatch):
    """Import a module of benchmarks/ for the CPU, with other values of its constants; ``rows`` is the final table."""
    monkeypatch.syspath_prepend(FOLDER)
    timing, table = (importlib.import_module(name) for name in ("gpu_side_by_side", "side_by_side"))
    monkeypatch.setattr(table, "ROWS", [])
    monkeypatch.setattr(timing, "milliseconds", lambda way, *tensors: (way(*tensors), 2.0)[1])
    monkeypatch.setattr(timing, "device_rates", lambda: (1e9, 1e9))

    def load(name: str, **constants):
        module = importlib.import_module(name)
        for key, value in {"DEVICE": "cpu", **constants}.items():
            monkeypatch.setattr(module, key, value, raising=False)
        if hasattr(module, "rotate"):
            monkeypatch.setattr(module, "rotate", lambda make: [make(), make()])
        return module

    load.rows = lambda: table.ROWS
    return load


@pytest.fixture
def tiny(load):
    return load("models", DEVICE="cpu").Size("tiny", 8, 32, 2)


def test_training_step(load, tiny):
    bench = load("bench_training_step", SIZE=tiny, SITES=6, ROUNDS=1)
    bench.bench_training_step(Recorder())
    assert {way for _, way, *_ in load.rows()} >= {bench.CANDIDATE, bench.FROZEN, "all sites"}


def test_training_step_beside_peft(load, tiny):
    pytest.importorskip("peft", exc_type=ImportError)
    bench = load("bench_training_step", SIZE=tiny, SITES=6, RANK=4, ROUNDS=1)
    bench.bench_training_step_beside_peft(Recorder())


def test_fisher_pass(load, tiny):
    bench = load("bench_fisher_on_gpu", SIZE=tiny, SAMPLES=3, ROUNDS=1)
    bench.bench_fisher_pass_on_the_gpu(Recorder())
    assert load.rows()[-1][-1] == "<= 2"


def test_fisher_rivals(load, tiny):
    bench = load("bench_fisher_rivals", GPU_SIZE=tiny, GPU_SAMPLES=2, ROUNDS=1)
    bench.bench_fisher_beside_on_the_gpu(Recorder(), "vmap with math attention")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", ["adapter", "lora"])
def test_low_rank(load, case, backward):
    bench = load("bench_low_rank", BACKEND="torch")
    bench.bench_low_rank(Recorder(), case, (1, 9), backward)
    assert load.rows()[-1][1:3] == ("share of the higher floor reached", f"{share(bench, case, backward):.0%}")


def share(bench, case: str, backward: bool) -> float:
    """Of 2 ms, at one operation and one byte a nanosecond."""
    return max(bench.floors(case, 9, backward).values()) / 1e9 / 2e-3


@pytest.mark.parametrize("backward", [False, True])
def test_lora_layer_beside_peft(load, backward):
    pytest.importorskip("peft", exc_type=ImportError)
    load("bench_low_rank", BACKEND="torch").bench_lora_layer_beside_peft(Recorder(), (1, 9), backward)


def test_gradient_is_the_last_input(load):
    timing = load("gpu_side_by_side", DEVICE="cpu")
    x, dy = timing.with_gradient(lambda: [torch.randn(2, 3, requires_grad=True)])()
    y, dx = timing.forward_backward(torch.sin)(x, dy)
    assert torch.equal(y, x.sin())
    assert torch.allclose(dx, dy * x.cos())


def test_sams_encoder_and_two_modalities(load):
    timing = load("gpu_side_by_side", DEVICE="cpu").gpu_side_by_side

    def timed(benchmark, candidate, others, *, rounds, target):
        timing(benchmark, {"candidate": candidate, **others}, targets=target, rounds=rounds)

    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "global_attn_indexes": (1,)}
    bench = load("bench_sam", SIZES={"small": small}, PIXELS=64, side_by_side=timed)
    for ways in (bench.ways_of_encoder("small", 2), bench.ways_of_two("small", bench.MMAdapter, 2)):
        bench.measure(Recorder(), ways, {bench.PAIR: "<= 1.05"}, 1)
    bench.measure(Recorder(), bench.ways_of_exchange(8, 5), {}, 1)
    bench.measure_behind(Recorder(), "small", 1)
    assert [row[-1] for row in load.rows() if row[1] == bench.PAIR] == ["<= 1.05", ""]
