"""What may be shared: an adapter folder gives the same predictions elsewhere, and nothing in it is believed."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import cegate
from cegate import segmenter as segmenter_module
from cegate.adapter_folder import load_adapter, save_adapter
from cegate.backbone.vit import build_vit, tiny_vit, weight_hash
from cegate.checkpoint import load_state
from cegate.config import InjectorConfig, ModalConfig, ModelConfig, RefinerConfig, SecondConfig
from cegate.convert import read_checkpoint
from cegate.errors import BackboneError, CegateError, CheckpointError
from cegate.fields import choices, hints_of
from cegate.inspect import main as inspect_command
from cegate.predict import main as predict_command
from cegate.style.networks import read_weights as read_style_weights

SITES = ("spatial.1", "semantic.0", "frequency.7")


@pytest.fixture(scope="module")
def segmenter(trained):
    model = trained()
    model.recipe = dataclasses.replace(model.recipe, value_range=[[0.0, 1000.0]] * 3)
    return model


@pytest.fixture(scope="module")
def written(segmenter, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "adapter"
    save_adapter(folder, segmenter, weight_hash(segmenter.vit), {"arid": 0.5})
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """An adapter folder of one's own."""
    return Path(shutil.copytree(written, tmp_path / "adapter"))


def test_an_adapter_gives_the_same_predictions(segmenter, folder):
    loaded = cegate.load(folder, "cpu")
    image = np.random.default_rng(0).integers(0, 1000, (3, 40, 50)).astype(np.uint16)
    assert np.array_equal(loaded.predict_proba(image), segmenter.predict_proba(image))
    assert loaded.toolbox.plan == segmenter.toolbox.plan
    assert not loaded.training and loaded.classes == ("land", "water")
    assert np.array_equal(cegate.load(folder.parent, "cpu").predict(image), segmenter.predict(image))


def test_an_adapter_holds_trained_sites_and_head_only(segmenter, folder):
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    sites = {".".join(key.split(".")[1:3]) for key in weights if key.startswith("toolbox.")}
    assert sites == set(SITES)
    rest = {key for key in weights if not key.startswith("toolbox.")}
    assert rest == {f"head.{key}" for key in segmenter.head.state_dict()}


def test_adapter_config_has_the_promised_keys(folder):
    description = json.loads((folder / "adapter_config.json").read_text())
    promised = "format_version cegate_version backbone backbone_sha256 image_size patch_size toolbox active_sites head"
    assert set(promised.split()) <= description.keys()
    assert {"classes", "palette", "bands", "mean", "std", "ignore", "value_range"} <= description.keys()
    assert description["active_sites"] == list(SITES[:2]) and description["frozen_sites"] == list(SITES[2:])
    card = (folder / "README.md").read_text()
    assert "| arid | 50.0 |" in card and "land, water" in card and description["backbone_sha256"] in card


def rewrite(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone_sha256": "0" * 64}, "trained on a backbone with sha256 000000000000, this one"),
        ({"seed": 7}, "trained on a backbone with sha256"),
        ({"classes": ["land", "water", "road"], "palette": ["#000000"] * 3}, "of another shape head."),
        ({"active_sites": ["spatial.2", *SITES]}, "missing toolbox.spatial.2"),
        ({"active_sites": [], "frozen_sites": []}, "unexpected toolbox.frequency.7.down"),
        ({"active_sites": ["spatial.99"]}, "names the site 'spatial.99', which the backbone does not have"),
        ({"format_version": 99}, "has format_version 99; this cegate"),
        (
            {"head": "liner"},
            "head=liner is not accepted; expected linear, mask2former or unetformer; did you mean 'linear'?",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_adapter_that_does_not_fit_is_refused(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(CheckpointError) as error:
        load_adapter(folder, "cpu")
    assert message in str(error.value)


def test_a_description_without_a_key_names_it(folder):
    description = json.loads((folder / "adapter_config.json").read_text())
    del description["mean"], description["bands"]
    (folder / "adapter_config.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="lacks bands, mean"):
        load_adapter(folder, "cpu")


def test_damaged_files_are_named(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors cannot be read"):
        load_adapter(folder, "cpu")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        load_adapter(folder, "cpu")
    with pytest.raises(CheckpointError, match="neither a run nor an adapter folder"):
        load_adapter(folder / "nowhere", "cpu")


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (load_adapter, "adapter_model.safetensors"),
        (load_adapter, "adapter_config.json"),
        (lambda folder: build_vit("tiny", weights=str(folder / "vit.safetensors"), image_size=32), "vit.safetensors"),
        (lambda folder: load_state(folder / "last.pt"), "last.pt"),
        (lambda folder: read_checkpoint(folder / "rein.safetensors"), "rein.safetensors"),
        (lambda folder: read_style_weights(folder / "style.safetensors"), "style.safetensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_the_system_does_not_let_us_read_is_not_called_missing(folder, monkeypatch, read, name):
    (folder / name).touch()
    opened = Path.open

    def refuse(self, *args, **kwargs):  # root may read all, and so may tests
        if self.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CegateError) as error:
        read(folder)
    assert str(error.value) == f"{folder / name} cannot be read (Permission denied); see that it can be read"


# --- backbone files -------------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_file(tmp_path, trained) -> Path:
    """A run folder whose adapter was trained on the file ``tmp_path/vit.safetensors``."""
    file = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(tiny_vit(32).state_dict(), file)
    segmenter = cegate.build(trained.mapping | {"model": {"weights": str(file)}})
    save_adapter(tmp_path / "run/adapter", segmenter, weight_hash(segmenter.vit), {})
    return tmp_path / "run"


ELSEWHERE = (
    r"adapter_config\.json names backbone_weights=\S+, which is no file of the adapter folder, .*: --weights FILE, or "
    r"cegate\.load\(folder, weights=FILE\)"
)


def test_an_adapter_opens_no_file_elsewhere_unless_the_caller_does(on_a_file, tmp_path):
    file, folder = tmp_path / "vit.safetensors", on_a_file / "adapter"
    with pytest.raises(CheckpointError, match=ELSEWHERE):
        cegate.load(folder, "cpu")
    with pytest.raises(CheckpointError, match=ELSEWHERE):
        cegate.load_many({"a": on_a_file}, "cpu")
    known = weight_hash(cegate.load(folder, "cpu", weights=file).vit)
    assert cegate.load_many({"a": on_a_file}, "cpu", weights=file).adapters
    assert cegate.read_adapter(folder).backbone_sha256 == known  # it builds nothing
    file.rename(folder / "vit.safetensors")
    assert weight_hash(cegate.load(folder, "cpu").vit) == known
    (folder / "vit.safetensors").rename(file)
    (folder / "vit.safetensors").symlink_to(file)  # it leads elsewhere
    with pytest.raises(CheckpointError, match=ELSEWHERE):
        cegate.load(folder, "cpu")


def test_the_configuration_of_ones_own_run_may_name_the_file(on_a_file, tmp_path):
    config = on_a_file / "config.yaml"
    config.write_text(f"model: {{weights: {tmp_path / 'vit.safetensors'}}}\n")
    assert cegate.load(on_a_file, "cpu") and cegate.load(on_a_file / "adapter", "cpu")
    config.write_text("model: {weights: other.pth}\n")
    with pytest.raises(CheckpointError, match=ELSEWHERE):
        cegate.load(on_a_file, "cpu")
    config.write_text(f"model: {{weights: {tmp_path / 'vit.safetensors'}}}\n")
    (tmp_path / "vit.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"vit\.safetensors does not exist; .*--weights FILE, or cegate\.load\("):
        cegate.load(on_a_file, "cpu")


class Planted:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_a_pickle_is_never_run_not_even_one_in_the_folder(folder, tmp_path):
    torch.save({"pos_embed": Planted(tmp_path / "ran")}, folder / "vit.pth")
    rewrite(folder, backbone_weights="vit.pth")
    for weights in (None, folder / "vit.pth"):
        with pytest.raises(BackboneError, match=r"vit\.pth is no weight file .* a pickled object is never run"):
            cegate.load(folder, "cpu", weights=weights)
    assert not (tmp_path / "ran").exists()


# --- hostile descriptions and weights -------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
WRONG = [
    ({"std": [0.5, NAN, 0.5]}, "std=nan is out of range"),
    ({"std": [0.5, 0.0, 0.5]}, "std=0.0 is out of range; use 1e-06 to 10"),
    ({"std": [0.5, -0.5, 0.5]}, "std=-0.5 is out of range"),
    ({"std": [0.5, 0.5]}, "std has 2 entries for 3 bands; give a number for each"),
    ({"mean": [NAN] * 3}, "mean=nan is out of range"),
    ({"mean": [0.5] * 4}, "mean has 4 entries for 3 bands"),
    ({"mean": 0.5}, "mean=0.5 is not accepted; expected a list of (a number)"),
    ({"bands": [1, 2]}, "mean has 3 entries for 2 bands"),
    ({"bands": [1, 2, 0]}, "bands=0 is out of range"),
    ({"bands": [1, 2, 2.5]}, "bands=[1, 2, 2.5] is not accepted; expected a list of (an integer)"),
    ({"palette": ["#000000"]}, "palette has 1 entries for 2 classes; give a colour for each"),
    ({"palette": ["#000000", "red"]}, "palette='red' is no '#RRGGBB'"),
    ({"value_range": [[0, 1000]]}, "value_range has 1 entries for 3 bands; give [low, high] for each"),
    ({"value_range": [[0, 9], [9, 0], [0, 9]]}, "value_range=[9.0, 0.0] must be [low, high] with low < high"),
    ({"value_range": [[9, 9]] * 3}, "must be [low, high] with low < high for a band at least"),
    ({"value_range": [[0, INF]] * 3}, "value_range=inf is out of range"),
    ({"classes": [1, 2]}, "classes=[1, 2] is not accepted; expected a list of (text)"),
    ({"classes": ["land", "land"]}, "classes=[land, land] must be 2 to 255 different names"),
    ({"classes": "land"}, "classes=land is not accepted; expected a list of (text)"),
    ({"classes": None}, "classes is empty; expected a list of (text)"),
    ({"toolbox": None}, "toolbox=null is not accepted; expected a mapping of kinds, spatial"),
    ({"toolbox": {"spatial": {"rank": 0}}}, "toolbox.spatial.rank=0 is out of range"),
    ({"toolbox": {"spatial": None}}, "toolbox.spatial=null is not accepted"),
    ({"toolbox": {"spatal": {}}}, "unknown key 'toolbox.spatal'; did you mean 'spatial'?"),
    ({"crop": 0}, "crop=0 is out of range"),
    ({"crop": 4}, "crop=4 is a window smaller than one patch, patch_size=8"),
    ({"crop": 16384}, "crop=16384 is 4194304 patches of patch_size=8; no more than 262144 are run at once"),
    ({"image_size": 10**4000}, "image_size=an integer of 13288 bits is out of range"),
    ({"stride": 33}, "stride=33 leaves gaps between windows of crop=32"),
    ({"stride": -1}, "stride=-1 is out of range"),
    ({"patch_size": None}, "patch_size is empty"),
    ({"features": [1, 3, 2, 7]}, "features=[1, 3, 2, 7] must be four increasing 0-based layers"),
    ({"active_sites": ["spatial"]}, "active_sites: site 'spatial' is not <kind>.<layer>"),
    ({"frozen_sites": [7]}, "frozen_sites=[7] is not accepted"),
    ({"backbone_sha256": 5}, "backbone_sha256=5 is not accepted"),
    ({"backbone_sha256": "abc"}, "backbone_sha256='abc' is no sha256; use 64 hexadecimal digits"),
    ({"seed": -1}, "seed=-1 is out of range"),
    ({"precision": "fp8"}, "precision=fp8 is not accepted; expected auto, fp32, bf16 or fp16"),
    ({"ignore": 256}, "ignore=256 is out of range; use 0 to 255"),
    ({"format_version": True}, "has format_version true; this cegate"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[f"{next(iter(c))}-{m[:30]}" for c, m in WRONG])
def test_a_value_that_cannot_be_is_refused_by_its_key_whichever_way_it_comes_in(folder, changes, message, capfd):
    rewrite(folder, **changes)
    for read in (cegate.load, cegate.read_adapter, lambda path: cegate.load_many({"a": path})):
        with pytest.raises(CheckpointError) as error:
            read(folder)
        assert "adapter_config.json" in str(error.value) and message in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert inspect_command(["--adapter", str(folder)]) == 1
    out, err = capfd.readouterr()
    assert not out and message in err and err.count("\n") == 1


@pytest.mark.parametrize("key", ["crop", "stride", "value_range", "ignore", "classes", "std", "toolbox", "seed"])
def test_a_missing_key_is_named(folder, key):
    path = folder / "adapter_config.json"
    mapping = json.loads(path.read_text())
    del mapping[key]
    path.write_text(json.dumps(mapping))
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: lacks {key}; copy"):
        cegate.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 1, "crop": 8, "crop": 16}', "the key crop is given twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "has format_version null"),
        ("7" * 5000, "cannot be read"),
        (" " * 2**20 + "{}", "more than 1048576 bytes"),
        (b"\xff\xfe{}", "cannot be read"),
        ("", "cannot be read"),
    ],
    ids=["twice", "deep", "list", "number", "long", "latin", "empty"],
)
def test_a_description_that_is_no_json_object_is_one_line(folder, text, message):
    path = folder / "adapter_config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError) as error:
        cegate.load(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def change_weights(folder: Path, change) -> None:
    """Other weights in the file, as other tools write them."""
    file = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file)


def one(key: str, value) -> Callable[[dict], dict]:
    def change(weights):
        first = next(name for name in sorted(weights) if name.startswith(key))
        new = value(weights[first].clone())
        return weights | {first: new}

    return change


def planted(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def plant(weight):
        weight.flatten()[-1] = value
        return weight

    return plant


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one("head", planted(NAN)), r"head\.\S+ has 1 values that are not finite"),
        (one("toolbox.spatial", planted(-INF)), r"toolbox\.spatial\.1\.\S+ has 1 values that are not finite"),
        (one("head", lambda w: w.double() * 0 + 1e300), r"head\.\S+ has \d+ values that are not finite"),
        (one("head", lambda w: w.to(torch.int8)), r"head\.\S+ holds torch\.int8"),
        (one("head", lambda w: w.bool()), r"head\.\S+ holds torch\.bool"),
        (one("head", lambda w: w[..., None]), r"of another shape head\."),
    ],
    ids=["nan", "inf", "overflow", "int8", "bool", "shape"],
)
def test_weights_that_are_no_numbers_are_refused_whichever_way_they_come_in(folder, change, message):
    change_weights(folder, change)
    for read in (cegate.load, lambda path: cegate.load_many({"a": path})):
        with pytest.raises(CheckpointError, match=message) as error:
            read(folder)
        assert "adapter_model.safetensors" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_of_another_precision_are_taken(folder, dtype):
    change_weights(folder, lambda weights: {key: value.to(dtype) for key, value in weights.items()})
    assert all(value.dtype == torch.float32 for value in cegate.load(folder).head.state_dict().values())


def test_a_flipped_bit_in_the_weights_is_refused_and_files_of_others_have_no_checksum(folder):
    file = folder / "adapter_model.safetensors"
    good = bytearray(file.read_bytes())
    good[-5] ^= 1  # in the mantissa of a weight: nothing else would tell
    file.write_bytes(good)
    with pytest.raises(CheckpointError, match=r"safetensors is damaged \(its checksum is another\); copy the adapter"):
        cegate.load(folder)
    change_weights(folder, lambda weights: weights)
    assert cegate.load(folder).classes == ("land", "water")


def test_a_folder_without_weights_says_so(folder):
    file = folder / "adapter_model.safetensors"
    file.unlink()
    for make in (lambda: None, file.mkdir):
        make()
        with pytest.raises(CheckpointError, match=r"adapter has no file adapter_model\.safetensors"):
            cegate.load(folder)


def test_a_terminal_without_accents_stops_no_command(folder, monkeypatch):
    rewrite(folder, classes=["Straße", "Gewässer"])
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", terminal)
    assert inspect_command(["--adapter", str(folder)]) == 0
    assert b"Stra\\xdfe" in terminal.buffer.getvalue()


def test_class_names_are_no_markup(folder, capfd):
    rewrite(folder, classes=["[/bold]", "[red]water"])
    assert inspect_command(["--adapter", str(folder)]) == 0
    assert "[/bold], [red]water" in capfd.readouterr().out


# --- anything at all ------------------------------------------------------------------------------------------------

WORDS = sorted(
    {
        word
        for section in (ModalConfig, InjectorConfig, RefinerConfig, ModelConfig, SecondConfig)
        for hint in hints_of(section).values()
        for word in choices(hint)
    }
)
ANY = st.sampled_from(WORDS) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**400, "a\0b"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FUZZ = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def built(monkeypatch):
    """The backbone is built once, as if the caller held it: what is tried is the door, hundreds of times."""
    from cegate import adapter_folder

    made: dict = {}

    def build(config):
        plain = dataclasses.replace(config, data=dataclasses.replace(config.data, palette=[]))
        key = repr(plain)
        if key not in made:
            made[key] = segmenter_module.build(config)
        return made[key]

    monkeypatch.setattr(adapter_folder, "build", build)


def _sections(mapping: dict) -> Iterator[dict]:
    """Mappings within mappings, at any depth."""
    for value in mapping.values():
        if isinstance(value, dict):
            yield value
            yield from _sections(value)


def accepted(folder: Path) -> bool:
    """Whether an adapter is taken; where it is, it predicts classes that it names."""
    try:
        model = cegate.load(folder, "cpu")
        image = np.full((len(model.recipe.bands), 9, 8), 7, np.uint16)
        mask, shares = model.predict(image), model.predict_proba(image)
    except CegateError as error:
        message = str(error)
    else:
        assert mask.max() < len(model.classes) and np.isfinite(shares).all()
        return True
    assert "\n" not in message and message.strip()
    return False


@FUZZ
@given(data=st.data())
def test_any_value_of_any_key_is_taken_or_refused_in_a_line(folder, built, data):
    path = folder / "adapter_config.json"
    good = path.read_text()
    mapping = json.loads(good)
    sections = list(_sections(mapping))
    where = data.draw(st.sampled_from([mapping] * len(sections) + sections))
    key = data.draw(st.sampled_from(sorted(where)))
    if isinstance(where[key], list) and where[key] and data.draw(st.booleans()):
        where[key][data.draw(st.integers(0, len(where[key]) - 1))] = data.draw(ANY)
    else:
        where[key] = data.draw(ANY)
    try:
        path.write_text(json.dumps(mapping))
        taken = accepted(folder)
        assert inspect_command(["--adapter", str(folder)]) in ((0,) if taken else (0, 1))
    finally:
        path.write_text(good)


@FUZZ
@given(data=st.data())
def test_any_damage_to_the_weights_is_refused_in_a_line(folder, built, data):
    path = folder / "adapter_model.safetensors"
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header - 1) | st.integers(0, len(good) - 1))
        bad[place] ^= 1 << data.draw(st.integers(0, 7))
    bad = bytes(bad[: data.draw(st.just(len(good)) | st.integers(0, len(good)))])
    try:
        path.write_bytes(bad)
        taken = accepted(folder)
        assert inspect_command(["--adapter", str(folder)]) == (0 if taken else 1)
        if taken:  # the damage is in a part that says nothing of the weights
            assert bad[header:] == good[header:]
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("option", ["--adapter", "--run"])
def test_predict_says_it_in_a_line(folder, tmp_path, capfd, option):
    Image.fromarray(np.full((9, 8, 3), 7, np.uint8)).save(tmp_path / "image.png")
    rewrite(folder, std=[0.5, 0.0, 0.5])
    place = {"--adapter": folder, "--run": folder.parent}[option]
    arguments = [option, str(place), "--input", str(tmp_path / "image.png"), "--output", str(tmp_path / "out")]
    assert predict_command(arguments) == 1
    out, err = capfd.readouterr()
    assert not out and "adapter_config.json: std=0.0 is out of range" in err and err.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))
