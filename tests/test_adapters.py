"""One backbone, many adapters: every sample as if it were alone, and whatever does not fit is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import cegate
from cegate import adapters as adapters_module
from cegate import ops
from cegate import segmenter as segmenter_module
from cegate.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, save_adapter
from cegate.backbone.vit import weight_hash
from cegate.checkpoint import trained_weights
from cegate.errors import CheckpointError, ConfigError
from cegate.gate import GatePlan
from cegate.heads.build import build_head
from cegate.kernels._support import HAS_TRITON, is_interpreted

KINDS = ("spatial", "semantic", "frequency")
DEPTH = 8
MAPPING = {
    "data": {"classes": ["land", "water"], "crop": 32},
    "model": {"weights": "none"},
    "toolbox": {"spatial": {"rank": 2}, "semantic": {"width": 4}, "frequency": {"width": 2}},
}
PLANS = {
    "arid": ["spatial.1", "semantic.0", "frequency.7"],
    "boreal": ["spatial.1", "spatial.4", "frequency.7"],
    "monsoon": ["semantic.0", "semantic.5", "frequency.2"],
}


def small_heads(name: str, **options: int) -> torch.nn.Module:
    small = {"queries": 5, "width": 32, "encoder_layers": 1, "decoder_layers": 2} if name == "mask2former" else {}
    return build_head(name, **options, **small)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(adapters_module, "build_head", small_heads)
    monkeypatch.setattr(segmenter_module, "build_head", small_heads)


def randomise(segmenter) -> None:
    with torch.no_grad():
        for value in trained_weights(segmenter).values():
            if value.is_floating_point():
                value.add_(0.2 * torch.randn(value.shape))


def write(folder: Path, sites=PLANS["arid"], *, value_range=None, **changes) -> Path:
    """An adapter folder with random weights; changes replace whole sections of the configuration."""
    segmenter = cegate.build({**MAPPING, **changes})
    randomise(segmenter)
    segmenter.toolbox.apply(GatePlan(sites[:2], sites[2:]))
    segmenter.recipe = dataclasses.replace(segmenter.recipe, value_range=value_range)
    save_adapter(folder, segmenter, weight_hash(segmenter.vit), {})
    return folder


@pytest.fixture(params=["linear", "mask2former", "both"])
def folders(request, tmp_path) -> dict[str, Path]:
    heads = {"linear": ["linear"] * 3, "mask2former": ["mask2former"] * 3, "both": ["linear", "mask2former", "linear"]}
    return {
        name: write(tmp_path / name, sites, model={"weights": "none", "head": head})
        for (name, sites), head in zip(PLANS.items(), heads[request.param], strict=True)
    }


@pytest.fixture
def model(tmp_path):
    """Three adapters with linear heads."""
    return cegate.load_many({name: write(tmp_path / name, sites) for name, sites in PLANS.items()}, "cpu")


@pytest.fixture
def own():
    """A model without adapters, every site on and learning."""
    segmenter = cegate.build({**MAPPING, "gate": {"method": "all"}})
    randomise(segmenter)
    return segmenter


def images(samples: int, size: tuple[int, int] = (36, 48)) -> torch.Tensor:
    return torch.randn(samples, 3, *size)


def table(*sites: str) -> list[list[int]]:
    return GatePlan(sites).matrix(DEPTH)


def random_gates(samples: int) -> torch.Tensor:
    return torch.randint(0, 2, (samples, 3, DEPTH))


def plan_of(gates) -> GatePlan:
    return GatePlan(f"{KINDS[kind]}.{layer}" for kind, layer in torch.as_tensor(gates).nonzero().tolist())


@torch.no_grad()
def test_every_sample_equals_its_adapter_loaded_alone(folders):
    model, batch = cegate.load_many(folders, "cpu"), images(6)
    names = ["monsoon", "arid", "boreal", "arid", "monsoon", "boreal"]
    logits = model(batch, adapter=names)
    assert logits.shape == (6, 2, 36, 48)
    alone = {name: cegate.load(folder, "cpu") for name, folder in folders.items()}
    for b, name in enumerate(names):
        torch.testing.assert_close(logits[b : b + 1], alone[name](batch[b : b + 1]), rtol=1e-5, atol=1e-5)
        assert (logits[b] - alone["arid"](batch[b : b + 1])).abs().max() > 1e-3 or name == "arid"
    # two copies of equal weights lie elsewhere in memory, and a product rounds by alignment: close, not equal
    close = {"rtol": 1e-5, "atol": 1e-5}
    for index, name in enumerate(folders):
        torch.testing.assert_close(model(batch, adapter=name), alone[name](batch), **close)
        torch.testing.assert_close(model(batch, adapter=[index] * 6), alone[name](batch), **close)
    torch.testing.assert_close(model(batch), alone["arid"](batch), **close)


@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "mask2former"])
def test_samples_with_gates_of_their_own_equal_each_alone(head):
    model = cegate.build({**MAPPING, "model": {"weights": "none", "head": head}, "gate": {"method": "none"}}).eval()
    randomise(model)
    batch, gates = images(5), random_gates(5)
    gates[3] = gates[0]
    together = model(batch, gates=gates.bool())
    assert torch.equal(model(batch, gates=gates.numpy()), together)
    assert torch.equal(model(batch, gates=gates[1]), [model.toolbox.apply(plan_of(gates[1])), model(batch)][1])
    for b in range(5):
        model.toolbox.apply(plan_of(gates[b]))
        torch.testing.assert_close(together[b : b + 1], model(batch[b : b + 1]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gates_switch_off_sites_of_adapters(model, tmp_path):
    batch, names = images(3), ["boreal", "arid", "boreal"]
    gates = [table("spatial.1"), table(), table("spatial.4", "frequency.7")]
    together = model(batch, gates=gates, adapter=names)
    for b, name in enumerate(names):
        alone = cegate.load(tmp_path / name, "cpu")
        alone.toolbox.apply(plan_of(gates[b]))
        torch.testing.assert_close(together[b : b + 1], alone(batch[b : b + 1]), rtol=1e-5, atol=1e-5)
    shared = model(batch, gates=table("frequency.7"), adapter=["arid", "boreal", "arid"])
    assert torch.equal(shared[1:2], model(batch[1:2], gates=[table("frequency.7")], adapter="boreal"))


@pytest.mark.parametrize("head", ["linear", "mask2former"])
def test_gradients_under_gates_are_those_of_each_sample_alone(head):
    model = cegate.build({**MAPPING, "model": {"weights": "none", "head": head}, "gate": {"method": "all"}}).double()
    randomise(model)
    batch, labels, gates = images(4).double(), torch.randint(0, 2, (4, 36, 48)), random_gates(4)
    learns = [*model.toolbox.parameters(), *model.head.parameters()]
    every = model.toolbox.plan

    def gradients(losses) -> list[torch.Tensor]:
        return torch.autograd.grad(losses.sum(), learns, allow_unused=True, materialize_grads=True)

    torch.manual_seed(1)
    losses = model.loss(batch, labels, gates=gates)
    together, alone = gradients(losses), [torch.zeros_like(p) for p in learns]
    for b in range(4):
        model.toolbox.apply(plan_of(gates[b]))
        for parameter in learns:
            parameter.requires_grad_()
        torch.manual_seed(1)
        loss = model.loss(batch[b : b + 1], labels[b : b + 1])
        torch.testing.assert_close(losses[b : b + 1], loss)
        for total, gradient in zip(alone, gradients(loss), strict=True):
            total += gradient
    model.toolbox.apply(every)
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    logits = model(batch, gates=gates)
    for parameter, gradient in zip(learns, gradients(torch.logsumexp(logits, 1)), strict=True):
        assert gradient.shape == parameter.shape
        assert gradient.isfinite().all()


def test_only_what_the_plan_lets_learn_gets_a_gradient(own):
    own.toolbox.apply(GatePlan(["spatial.0"]))
    own(images(2), gates=[table("spatial.0", "semantic.3"), table()]).sum().backward()
    learned = {name.rsplit(".", 1)[0] for name, p in own.toolbox.named_parameters() if p.grad is not None}
    assert learned == {"spatial.0"}
    assert own.toolbox.plan == GatePlan(["spatial.0"])


@torch.no_grad()
def test_a_call_of_its_own_leaves_the_plan_alone(own):
    batch, plan = images(2), GatePlan(["semantic.1"], ["spatial.0"])
    own.toolbox.apply(plan)
    before = own(batch)
    own(batch, gates=random_gates(2))
    assert own.toolbox.plan == plan
    assert torch.equal(own(batch), before)


def test_equal_calls_are_compiled_once(model):
    names = ["arid", "monsoon"]
    call = model.bank.call(model.toolbox, 2, None, names)
    assert model.bank.call(model.toolbox, 2, None, [0, 2]) is call
    assert model.bank.call(model.toolbox, 2, None, names[::-1]) is not call


def test_threads_do_not_meet(model):
    batch = [images(2) for _ in range(4)]
    ways = [{}, {"adapter": "arid"}, {"adapter": ["monsoon", "arid"]}, {"gates": model.toolbox.plan.matrix(DEPTH)}]
    jobs = [(image, way) for image in batch for way in ways] * 3
    with torch.no_grad():
        alone = [model(image, **way) for image, way in jobs]

    def run(job):
        with torch.no_grad():  # a thread's own
            return model(job[0], **job[1])

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, jobs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_merged_sites_take_no_gates(own):
    own.toolbox.merge()
    with pytest.raises(ConfigError, match=r"merged into the backbone; call toolbox\.unmerge"):
        own(images(1), gates=table())
    own.toolbox.unmerge()


BAD_CALLS = [
    ({"adapter": "arids"}, r"there is no adapter 'arids'; .* arid, boreal, monsoon; did you mean 'arid'\?"),
    ({"adapter": ["arid", 3]}, r"adapter 3 is out of range 0\.\.2; this model holds arid, boreal, monsoon"),
    ({"adapter": [0, -1]}, "adapter -1 is out of range"),
    ({"adapter": [0, 1.5]}, "adapter 1.5 is neither a name nor an index"),
    ({"adapter": ["arid"]}, "adapter has 1 entries for 2 samples"),
    ({"gates": torch.zeros(3, 3, 8, dtype=torch.int)}, "gates are of 3 samples, the batch has 2"),
    ({"gates": torch.zeros(1, 3, 8, dtype=torch.int)}, "gates are of 1 samples, the batch has 2"),
    ({"gates": torch.zeros(2, 3, 7, dtype=torch.int)}, "gates are of 7 layers, the backbone has 8"),
    ({"gates": torch.zeros(2, 2, 8, dtype=torch.int)}, r"gates have shape \(2, 2, 8\), expected \[3, L\]"),
    ({"gates": torch.zeros(3, 8)}, "gates are torch.float32, expected integers or booleans"),
    ({"gates": [[[0] * 8] * 3, [[0] * 8, [0] * 7 + [2], [0] * 8]]}, r"gate semantic\.7 of sample 1 is 2, accepted"),
    ({"gates": [[0, 1], [1]]}, r"gates are no table \[3, L\] or \[B, 3, L\]"),
    ({"gates": "spatial.1"}, r"gates are no table \[3, L\]"),
    (
        {"gates": table("spatial.4"), "adapter": ["boreal", "arid"]},
        r"gates switch on spatial\.4 of sample 1, but its adapter 'arid' has no weights for it; it has spatial\.1, sem",
    ),
    (
        {"gates": torch.zeros(3, 3, 8, dtype=torch.int), "adapter": "arid"},
        "adapters has 2 entries for gates of 3 samples",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_a_bad_call_is_named_and_changes_nothing(model, options, message):
    plan = model.toolbox.plan
    with pytest.raises(ValueError, match=message) as caught:
        model(images(2), **options)
    assert "\n" not in str(caught.value)
    assert model.toolbox.plan == plan


def test_an_empty_batch_and_a_model_without_adapters_are_named(own):
    with pytest.raises(ValueError, match="the batch is empty"):
        own(images(0), gates=random_gates(1))
    with pytest.raises(ConfigError, match="there is no adapter 'arid'; this model holds none, see add_adapter"):
        own(images(1), adapter="arid")


def test_gates_of_a_kind_that_the_toolbox_lacks_are_named():
    model = cegate.build({**MAPPING, "toolbox": {"kinds": ["semantic"]}, "gate": {"method": "none"}})
    with pytest.raises(ValueError, match=r"gates switch on frequency\.3, which this toolbox lacks; it has semantic\.0"):
        model(images(1), gates=table("frequency.3"))


def test_adapters_with_other_classes_run_but_not_in_one_call(model, tmp_path):
    roads = write(tmp_path / "roads", data={"classes": ["land", "road", "roof"], "crop": 32})
    model.add_adapter("roads", cegate.read_adapter(roads))
    assert model.adapters["roads"].recipe.classes == ("land", "road", "roof")
    assert model(images(2), adapter="roads").shape[1] == 3
    with pytest.raises(ConfigError, match="adapter 'arid' has 2 classes and 'roads' has 3"):
        model(images(2), adapter=["roads", "arid"])


def change_weights(folder: Path, **weights: torch.Tensor) -> None:
    kept = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    safetensors.torch.save_file(kept | weights, folder / WEIGHTS_FILE)


def test_weights_that_are_not_finite_or_do_not_fit_are_refused(model, tmp_path):
    batch, folder = images(2), write(tmp_path / "broken")
    before = model(batch, adapter="arid")
    nan = torch.zeros(128, 2)
    nan[3, 0], nan[5, 1] = float("nan"), float("inf")
    change_weights(folder, **{"toolbox.spatial.1.up_q": nan})
    with pytest.raises(CheckpointError) as caught:
        model.add_adapter("broken", cegate.read_adapter(folder))
    message = str(caught.value)
    assert message.startswith(f"{folder / WEIGHTS_FILE}: toolbox.spatial.1.up_q has 2 values that are not finite")
    whole = cegate.read_adapter(write(tmp_path / "whole"))
    half = dataclasses.replace(whole, weights={**whole.weights, "toolbox.spatial.1.up_q": nan})
    with pytest.raises(CheckpointError, match=r"cannot be added as 'broken': toolbox\.spatial\.1\.up_q has 2 values"):
        model.add_adapter("broken", half)
    change_weights(folder, **{"toolbox.spatial.1.up_q": torch.zeros(128, 3), "vit.more": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"unexpected vit\.more; of another shape toolbox\.spatial\.1\.up_q"):
        model.add_adapter("broken", cegate.read_adapter(folder))
    assert list(model.adapters) == list(PLANS)
    assert torch.equal(model(batch, adapter="arid"), before)


OTHERS = [
    ({"run": {"seed": 3}}, "was trained on another backbone: its sha256 is [0-9a-f]{12}, not [0-9a-f]{12}; adapters"),
    (
        {"model": {"weights": "none", "image_size": 64, "patch_size": 16}},
        r"another backbone: model\.image_size is 64, not 32; model\.patch_size is 16, not 8; adapters share one",
    ),
    (
        {"data": MAPPING["data"] | {"source": {"bands": [1, 2, 3, 4]}}},
        "another backbone: the number of bands is 4, not 3; adapters share one",
    ),
    ({"toolbox": MAPPING["toolbox"] | {"spatial": {"rank": 3}}}, r"toolbox\.spatial\.rank is 3, not 2"),
    ({"toolbox": MAPPING["toolbox"] | {"kinds": ["semantic", "spatial", "frequency"]}}, r"toolbox\.kinds is"),
    (
        {"toolbox": MAPPING["toolbox"] | {"frequency": {"width": 2, "cutoff": 0.5, "band": "symmetric"}}},
        r"toolbox\.frequency\.cutoff is 0\.5, not 0\.3; toolbox\.frequency\.band is symmetric, not official",
    ),
    (
        {"model": {"weights": "none", "features": [0, 1, 2, 3]}},
        r"model\.features is \[0, 1, 2, 3\], not \[2, 3, 5, 7\]",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), OTHERS, ids=["backbone", "sizes", "bands", "rank", "kinds", "cutoff", "features"]
)
def test_an_adapter_of_another_model_is_refused(model, tmp_path, changes, message):
    other = cegate.read_adapter(write(tmp_path / "other", **changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        model.add_adapter("other", other)
    assert str(caught.value).startswith(other.source)
    assert "other" not in model.adapters


def test_a_refiner_or_a_tuned_backbone_is_refused(own, tmp_path):
    adapter = cegate.read_adapter(write(tmp_path / "a"))
    tuned = dataclasses.replace(adapter.config, model=dataclasses.replace(adapter.config.model, tune="full"))
    refined = dataclasses.replace(adapter.config, refiner=dataclasses.replace(adapter.config.refiner, method="rein"))
    with pytest.raises(CheckpointError, match=r"model\.tune is full, not frozen"):
        own.add_adapter("a", dataclasses.replace(adapter, config=tuned))
    with pytest.raises(CheckpointError, match=r"refiner\.method is rein, not none"):
        own.add_adapter("a", dataclasses.replace(adapter, config=refined))
    with_refiner = cegate.build({**MAPPING, "refiner": {"method": "rein", "tokens": 4, "rank": 2}})
    with pytest.raises(CheckpointError, match="this model has a refiner"):
        with_refiner.add_adapter("a", adapter)


def test_a_site_that_the_toolbox_lacks_is_refused(own, tmp_path):
    folder = write(tmp_path / "a")
    description = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(description | {"active_sites": ["spatial.99"]}))
    with pytest.raises(CheckpointError, match=r"it has the sites spatial\.99, which the toolbox lacks"):
        own.add_adapter("a", cegate.read_adapter(folder))


def test_a_name_is_taken_once_and_none_is_no_mapping(model, tmp_path):
    with pytest.raises(ConfigError, match="there is an adapter 'arid' already"):
        model.add_adapter("arid", cegate.read_adapter(tmp_path / "arid"))
    with pytest.raises(ConfigError, match="'' is no name of an adapter"):
        model.add_adapter("", cegate.read_adapter(tmp_path / "arid"))
    with pytest.raises(ConfigError, match="load_many needs at least one adapter"):
        cegate.load_many({})


@torch.no_grad()
def test_a_deleted_adapter_leaves_the_others_as_they_were(model):
    batch = images(2)
    boreal, both = model(batch, adapter="boreal"), model(batch, adapter=["monsoon", "boreal"])
    model.delete_adapter("arid")
    assert list(model.adapters) == ["boreal", "monsoon"]
    assert torch.equal(model(batch, adapter=0), boreal)
    assert torch.equal(model(batch, adapter=["monsoon", "boreal"]), both)
    with pytest.raises(ConfigError, match="there is no adapter 'arid'"):
        model.delete_adapter("arid")
    model.delete_adapter("boreal")
    model.delete_adapter("monsoon")
    assert not model.adapters


@torch.no_grad()
def test_adapters_move_with_the_model_and_are_no_part_of_its_state(model):
    batch, names = images(2), ["monsoon", "boreal"]
    single = model(batch, adapter=names)
    fresh = cegate.build(MAPPING)
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert len(list(model.parameters())) == len(list(fresh.parameters()))
    twin = copy.deepcopy(model).train().double()
    lent = twin.bank.call(twin.toolbox, 2, None, names).uses["spatial.1"].weights
    assert {weight.dtype for weight in lent.values()} == {torch.float64}
    model.delete_adapter("boreal")
    double = twin(batch.double(), adapter=names)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-4)


def test_predictions_use_the_adapters_bands_range_and_windows(tmp_path):
    folders = {
        "bytes": write(tmp_path / "bytes"),
        "words": write(
            tmp_path / "words",
            value_range=[[0, 2000], [10, 3000], [0, 1000]],
            data={"classes": ["land", "water"], "crop": 32, "stride": 8, "source": {"bands": [3, 2, 1]}},
        ),
    }
    model = cegate.load_many(folders, "cpu")
    image = np.random.default_rng(0).integers(0, 2500, (3, 40, 50)).astype(np.uint16)
    alone = cegate.load(folders["words"], "cpu")
    assert np.array_equal(model.predict_proba(image, adapter="words"), alone.predict_proba(image))
    assert np.array_equal(model.predict(image, adapter=1), alone.predict(image))
    assert np.array_equal(model.predict(image.astype(np.uint8)), model.predict(image.astype(np.uint8), adapter="bytes"))


@torch.no_grad()
def test_learnable_cutoffs_are_each_adapters_own(tmp_path):
    toolbox = MAPPING["toolbox"] | {"frequency": {"width": 2, "cutoff": "learnable"}}
    folders = {name: write(tmp_path / name, sites, toolbox=toolbox) for name, sites in PLANS.items()}
    for name, cutoff in (("arid", 0.2), ("boreal", 0.9)):
        change_weights(folders[name], **{"toolbox.frequency.7.cutoff": torch.tensor(cutoff)})
    model, batch = cegate.load_many(folders, "cpu"), images(2)
    together = model(batch, adapter=["boreal", "arid"])
    for b, name in enumerate(["boreal", "arid"]):
        alone = cegate.load(folders[name], "cpu")(batch[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.skipif(
    not HAS_TRITON or not (torch.cuda.is_available() or is_interpreted()), reason="Triton has no GPU nor an interpreter"
)
def test_the_triton_path_gives_the_same(model, device, monkeypatch):
    model, batch, names = model.to(device), images(4, (32, 32)).to(device), ["boreal", "arid", "boreal", "monsoon"]
    gates = torch.tensor([model.adapters[name].plan.matrix(DEPTH) for name in names])
    gates[2, 0] = 0
    logits = {}
    for backend in ("torch", "triton"):
        with monkeypatch.context() as patched:
            for name in ("low_rank", "low_rank_qv_", "frequency_adapter"):
                patched.setattr(ops, name, partial(getattr(ops, name), backend=backend))
            logits[backend] = model(batch, gates=gates, adapter=names)
    torch.testing.assert_close(logits["triton"], logits["torch"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits["triton"], model(batch, gates=gates, adapter=names), rtol=1e-3, atol=1e-3)


def test_the_guide_runs(tmp_path, monkeypatch):
    from PIL import Image

    for name in PLANS:
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name, sites in PLANS.items():
        write(tmp_path / "runs" / name / "adapter", sites)
    (tmp_path / "tiles").mkdir()
    for name in ("dunes", "taiga", "rocks"):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "tiles" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    guide = Path(__file__).parents[1] / "docs" / "how-to" / "serving.md"
    blocks = guide.read_text().split("```python\n")[1:]
    names: dict = {}
    for block in blocks:
        exec(block.split("```")[0], names)
    assert names["scene"].shape == (40, 40)
    assert np.array_equal(names["scene"], cegate.load("runs/arid").predict("tiles/dunes.png"))
    assert list(names["model"].adapters) == ["arid", "monsoon"]
    assert names["logits"].shape == (2, 2, 40, 40)
