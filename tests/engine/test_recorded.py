"""Recorded steps, by a stand-in for CUDA graphs that runs on a CPU; the real ones wait for a GPU (pytest -m gpu)."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cegate import ops
from cegate.backbone.backbone import Features
from cegate.checkpoint import load_state
from cegate.compute import Numerics
from cegate.engine import passes
from cegate.engine import stage as stage_module
from cegate.engine.recorded import CudaGraph, Encoder
from cegate.engine.sets import open_sets
from cegate.engine.stage import Stage
from cegate.engine.step_losses import Found
from cegate.engine.trainer import train
from cegate.errors import TrainingError
from cegate.segmenter import build
from cegate.tasks.segmentation import Segmentation
from cegate.tasks.task import Task

pytestmark = pytest.mark.usefixtures("no_figures")
SAME = ("metrics.jsonl", "gates.jsonl", "adapter/adapter_model.safetensors")


class StandIn:
    """Records by running the work and spoiling all that it gave, as a graph's tensors hold nothing before it plays;
    plays into the same tensors."""

    weights: tuple[torch.nn.Parameter, ...] = ()
    recorded = played = 0

    def record(self, work):
        StandIn.recorded += 1
        self.work, self.found = work, work()
        self.grads = {weight: weight.grad for weight in self.weights if weight.grad is not None}
        for tensor in (*_tensors(self.found), *self.grads.values()):
            tensor.detach().fill_(math.nan)
        return self.found

    def play(self):
        StandIn.played += 1
        for weight in self.weights:
            assert weight.grad is self.grads.get(weight), "another gradient was put in place of the recorded one"
            weight.grad = None
        found = self.work()
        for still, new in zip(_tensors(self.found), _tensors(found), strict=True):
            still.detach().copy_(new.detach())
        for weight in self.weights:
            assert (weight.grad is None) == (weight not in self.grads)
            if weight in self.grads:
                weight.grad = self.grads[weight].copy_(weight.grad)


def _tensors(found: Found) -> list[torch.Tensor]:
    return [found.loss, *(term.losses for term in found.terms)]


@pytest.fixture
def recording(monkeypatch):
    """Let every stage record, on the CPU."""

    begin = passes.Passes.__init__

    def note(self, work, *rest):
        StandIn.weights = tuple(p for group in work.__self__.optimizer.param_groups for p in group["params"])
        begin(self, work, *rest)

    monkeypatch.setattr(StandIn, "recorded", 0)
    monkeypatch.setattr(StandIn, "played", 0)
    monkeypatch.setattr(passes, "CudaGraph", StandIn)
    monkeypatch.setattr(passes, "is_fast", lambda speed, device: True)
    monkeypatch.setattr(passes.Passes, "__init__", note)


CHANGES = {"train__iterations": 9, "train__baseline": True, "gate__inactive": "frozen", "train__clip": 1.0}


EAGER = pytest.StashKey[dict]()


@pytest.fixture
def eager(small, request):
    """One run as written for all tests of this file."""
    cache = request.config.stash.setdefault(EAGER, {})
    if "path" not in cache:
        cache["path"] = train(small("eager", **CHANGES)).path
    return cache["path"]


def assert_same(one, other):
    for name in SAME:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_recorded_steps_give_the_losses_gates_and_weights_of_steps_as_written(eager, small, request):
    request.getfixturevalue("recording")
    recorded = train(small("recorded", **CHANGES)).path
    assert_same(eager, recorded)
    # before: one plan; after: one for each of the scorings at 0, 3, 6; the first step of each is as written
    assert (StandIn.recorded, StandIn.played) == (4, 8 + 3 * 2)


def test_a_recorded_run_resumes_exactly(eager, small, monkeypatch, request):
    request.getfixturevalue("recording")
    step = Stage.step

    def until(self, data):
        if (self.name, self.iteration) == ("after", 5):
            raise RuntimeError("power cut")
        return step(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "step", until)
        with pytest.raises(RuntimeError, match="power cut"):
            train(small("cut", **CHANGES))
    assert_same(eager, train(small("cut", **CHANGES), resume=True).path)


def test_a_loss_that_is_not_finite_is_found_late_with_its_batch_and_nothing_of_it_is_saved(
    small, monkeypatch, recording
):
    config = small("nan", train__iterations=9, train__log_every=4, train__checkpoint_every=4, gate__interval=100)
    names, run = [], passes.Pass.__call__

    def call(self, data):
        names.append(data.source.names)
        found = run(self, data)
        if len(names) == 6:  # iteration 5
            found.terms[0].losses.detach()[0] = math.nan
            found.loss.fill_(math.nan)
        return found

    monkeypatch.setattr(passes.Pass, "__call__", call)
    with pytest.raises(TrainingError, match=r"the loss of iteration 5 is not finite for ") as error:
        train(config)
    assert names[5][0] in str(error.value)
    folder = config.run.work_dir
    state = load_state(Path(folder) / "checkpoints/last.pt")
    assert state.iteration == 4
    assert all(value.isfinite().all() for value in state.trained.values())


def test_a_recording_that_fails_is_said_and_does_without(eager, small, caplog, monkeypatch, request):
    request.getfixturevalue("recording")

    def fail(self, work):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(StandIn, "record", fail)
    with caplog.at_level(logging.WARNING):
        assert_same(eager, train(small("failed", **CHANGES)).path)
    assert "recording one failed: operation not permitted when stream is capturing" in caplog.text


def test_a_recording_that_fails_half_way_leaves_no_gradient_and_no_process_alone(small, monkeypatch, request):
    changes = {"train__iterations": 3, "train__baseline": False, "gate__method": "all"}
    eager = train(small("eager", **changes)).path
    request.getfixturevalue("recording")
    reads, read, record = [], stage_module.StepLosses.read, StandIn.record

    def fail(self, work):
        record(self, work)
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(StandIn, "record", fail)
    monkeypatch.setattr(stage_module.StepLosses, "read", lambda self: reads.append(len(self._unread)) or read(self))
    assert (eager / SAME[2]).read_bytes() == (train(small("failed", **changes)).path / SAME[2]).read_bytes()
    assert max(reads) > 1  # still together: reading is a sum over the team, in which nothing may have failed elsewhere


def test_gradients_and_memory_of_the_stage_before_are_not_in_the_next_one(small, monkeypatch, request):
    changes = {"train__iterations": 3, "train__baseline": True, "gate__method": "all"}  # nothing is scored
    eager = train(small("eager", **changes)).path
    request.getfixturevalue("recording")
    stages, begin = [], Stage.__init__

    def note(self, *args):
        stages.append(self)
        assert StandIn.recorded == len(stages) - 1 and not any(stage.passes.is_recorded for stage in stages[:-1])
        begin(self, *args)

    monkeypatch.setattr(Stage, "__init__", note)
    recorded = train(small("recorded", **changes)).path
    assert len(stages) == 2
    for name in (SAME[0], SAME[2]):
        assert (eager / name).read_bytes() == (recorded / name).read_bytes(), name


def test_a_capture_that_fails_does_not_leave_its_stream_the_current_one(monkeypatch):
    current = ["default"]

    class Within:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            self.before, current[0] = current[0], self.stream

        def __exit__(self, *_):
            current[0] = self.before

    class Failing:
        def capture_begin(self, *_, **__):
            pass

        def capture_end(self):
            raise RuntimeError("operation failed due to a previous error during capture")

    for name, stub in (("stream", Within), ("current_stream", lambda: current[0]), ("Stream", lambda: "of captures")):
        monkeypatch.setattr(torch.cuda, name, stub)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Failing)
    with pytest.raises(RuntimeError, match="previous error"):
        CudaGraph().record(lambda: current.append(current[0]))
    assert current == ["default", "of captures"]


# the backbone alone ---------------------------------------------------------------------------------------------------


class PartStandIn:
    """As `StandIn`, of any tensors: what was recorded holds nothing until it is played."""

    plays = 0

    def record(self, work):
        self.work, self.still = work, work()
        for tensor in self.still:
            if tensor is not None:
                tensor.data.fill_(math.nan)
        return self.still

    def play(self):
        PartStandIn.plays += 1
        with torch.enable_grad():  # what a graph holds was recorded so
            found = self.work()
        for still, new in zip(self.still, found, strict=True):
            if still is not None:
                still.data.copy_(new.detach())


def in_part(monkeypatch):
    """Let stages that record no whole step record the backbone, on the CPU."""
    monkeypatch.setattr(passes, "is_fast", lambda speed, device: True)
    monkeypatch.setattr(passes, "CudaGraph", PartStandIn)
    monkeypatch.setattr(PartStandIn, "plays", 0)


PARTLY = {
    "mask2former": {"model__head": "mask2former", "train__baseline": True},
    "dacs": {
        **{"adapt__method": "dacs", "adapt__warmup": 0},
        "data__unlabelled": "{kind: generated, split: monsoon, limit: 3, tile: 48}",
    },
    "crossearth": {
        **{"run__method": "crossearth_gate", "refiner__tokens": 5, "refiner__rank": 2, "injector__width": 16},
        **{"injector__heads": 2, "style__probability": 0.5, "style__ratio": 0.5, "style__block": 8, "mim__block": 8},
        **{"mim__decoder": "linear"},
    },
}


@pytest.mark.parametrize("kind", PARTLY)
def test_a_recorded_backbone_gives_the_losses_gates_and_weights_of_steps_as_written(kind, small, monkeypatch, request):
    changes = {"train__iterations": 7, "gate__interval": 3, "train__baseline": False} | PARTLY[kind]
    if kind == "mask2former":
        request.getfixturevalue("little_mask2former")
    eager = train(small("eager", **changes)).path
    with monkeypatch.context() as patch:
        in_part(patch)
        recorded = train(small("recorded", **changes)).path
        plays = PartStandIn.plays
    # of the plans of 0, 3 and 6 all steps but the first, both ways; before, 6 of 7 steps, forward alone
    assert plays == {"mask2former": 6 + 8, "dacs": 2 * 8, "crossearth": 8}[kind]
    assert_same(eager, recorded)


def test_a_backbone_that_cannot_be_recorded_is_said_once(small, caplog, monkeypatch, little_mask2former):
    changes = {"train__iterations": 4, "gate__interval": 2, "model__head": "mask2former"}
    eager = train(small("eager", **changes)).path

    def fail(self, work):
        raise RuntimeError("operation not permitted when stream is capturing")

    in_part(monkeypatch)
    monkeypatch.setattr(PartStandIn, "record", fail)
    with caplog.at_level(logging.WARNING):
        assert_same(eager, train(small("failed", **changes)).path)
    assert caplog.text.count("recording one failed: operation not permitted when stream is capturing") == 1


def test_where_recording_a_pass_fails_the_others_give_their_memory_back():
    def encode(images, *, plain):
        if fails and images.shape[0] == 2:
            raise RuntimeError("CUDA out of memory")
        return Features([images * 2], (1, 1))

    casts: list[int] = []
    fails, encoder = False, Encoder(encode, list, PartStandIn, lambda: casts.append(0) or {})
    for batch, held in ((1, 0), (1, 1), (2, 1), (2, 0), (1, 0)):
        fails = (batch, held) == (2, 0) and not encoder.fails and encoder._passes[(0, (2, 1), False, False)] is None
        with contextlib.suppress(RuntimeError):  # as written it fails too, here
            encoder.of_a_step()(torch.ones(batch, 1))
        assert sum(known is not None for known in encoder._passes.values()) == held
    assert encoder.fails and len(casts) == 1


@pytest.mark.parametrize(("precision", "narrow"), [("bf16", True), ("fp32", False)])
def test_only_steps_of_half_precision_round_products_to_tf32_and_only_where_speed_is_auto(
    precision, narrow, small, monkeypatch
):
    seen, work = [], Stage._forward_backward

    def look(self, data, encode):
        seen.append((torch.backends.cuda.matmul.allow_tf32, ops.is_fused()))
        return work(self, data, encode)

    monkeypatch.setattr(Stage, "_forward_backward", look)
    changes = {"train__iterations": 1, "train__baseline": False, "run__precision": precision}
    train(small("eager", **changes))
    in_part(monkeypatch)
    train(small("auto", **changes))
    assert seen == [(False, False), (narrow, True)]


def records(caplog, *tasks: Task, speed="auto", device="cuda", scales=False) -> bool:
    numerics = Numerics(torch.device(device), "fp16" if scales else "bf16", nullcontext)
    network = SimpleNamespace(encode=None)
    with caplog.at_level(logging.INFO):
        return passes.Passes(None, speed, numerics, network, tasks).records


def test_what_cannot_be_recorded_runs_as_written_and_says_why(caplog):
    same = SimpleNamespace(name="segmentation", recordable=True)
    assert records(caplog, same)
    assert not records(caplog, same, speed="eager")
    assert not records(caplog, same, device="cpu")
    assert not caplog.records
    assert not records(caplog, same, SimpleNamespace(name="dacs", recordable=False), scales=True)
    assert "because of the task dacs, run.precision=fp16" in caplog.text


def test_a_head_that_matches_on_the_host_is_not_recorded(small):
    for head, expected in (("linear", True), ("mask2former", False)):
        config, sets = open_sets(small(head, model__head=head))
        assert Segmentation(config, build(config), sets.source).recordable is expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["linear", *PARTLY])
def test_recorded_steps_on_a_gpu_equal_steps_as_written(kind, small, caplog, request):
    """Equal gates, and losses within the noise of bfloat16: 50 steps, 12 of those of which the backbone is recorded."""
    steps, interval = (50, 10) if kind == "linear" else (12, 4)  # the first of a plan as written, the next one recorded
    changes = {"run__device": "cuda", "train__iterations": steps, "gate__interval": interval, "train__log_every": 1}
    changes |= {"train__eval_every": steps, "train__checkpoint_every": steps} | PARTLY.get(kind, {})
    if kind == "mask2former":
        request.getfixturevalue("little_mask2former")
    found = []
    for speed in ("eager", "auto"):
        path = train(small(speed, run__speed=speed, **changes)).path
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        gates = [json.loads(line)["active"] for line in (path / "gates.jsonl").read_text().splitlines()]
        found.append(([line["loss"] for line in lines if "loss" in line], gates))
    (a, gates_a), (b, gates_b) = found
    assert "recording one failed" not in caplog.text
    assert gates_a == gates_b
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_capture_that_fails_leaves_the_device_as_it_was():
    before, images = torch.cuda.current_stream(), torch.ones(2, 1, device="cuda")

    def encode(images: torch.Tensor, *, plain: bool) -> Features:
        return Features([images * images.sum().item() + torch.rand(1, device="cuda") * 0], (1, 1))

    encoder = Encoder(encode, list, CudaGraph)
    for _ in range(3):
        (found,) = encoder.of_a_step()(images).maps
        assert found.tolist() == [[2], [2]]
        torch.manual_seed(0)
    assert encoder.fails and torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
