from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import re
import typing

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cegate import configfile, train
from cegate.config import Config, StyleConfig
from cegate.configfile import SYNONYMS, all_keys, read_config, to_mapping, to_yaml
from cegate.errors import ConfigError, shown
from cegate.fields import choices, hints_of, section_of, texts_of
from cegate.methods import METHODS
from cegate.sites import PAPER_KINDS


def write(path, **sections):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(sections))
    return path


def test_a_file_stands_on_its_bases_and_wins(tmp_path):
    write(tmp_path / "parts/low.yaml", train={"lr": 1.0, "iterations": 5}, gate={"k": 3})
    write(tmp_path / "parts/high.yaml", base="low.yaml", train={"lr": 2.0})
    config = read_config(write(tmp_path / "top.yaml", base=["parts/high.yaml"], gate={"interval": 7}))
    assert (config.train.lr, config.train.iterations, config.gate.k, config.gate.interval) == (2.0, 5, 3, 7)


def test_a_file_that_is_its_own_base_is_refused(tmp_path):
    write(tmp_path / "a.yaml", base="b.yaml")
    write(tmp_path / "b.yaml", base="a.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml is its own base"):
        read_config(tmp_path / "a.yaml")


def test_a_missing_base_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"a\.yaml: base: config 'nowhere\.yaml': no such file"):
        read_config(write(tmp_path / "a.yaml", base="nowhere.yaml"))


def test_a_base_may_be_a_shipped_configuration(tmp_path):
    config = read_config(
        write(tmp_path / "a.yaml", base="dg/casid_sub2tem", gate={"k": 3}), [("data.roots.casid", "/c")]
    )
    assert config.gate.k == 3 and config.data.source.split == "SubMs/train"


def test_a_wrong_key_of_a_base_is_refused_with_the_file(tmp_path):
    write(tmp_path / "low.yaml", trian={"lr": 1.0})
    with pytest.raises(ConfigError, match=r"unknown key 'trian'; did you mean 'train'"):
        read_config(write(tmp_path / "top.yaml", base="low.yaml"))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_in_a_file_or_on_the_command_line_means_the_same(tmp_path, method):
    in_file = read_config(write(tmp_path / "a.yaml", run={"method": method}))
    assert in_file == read_config(to_mapping(in_file))
    below = write(tmp_path / "b.yaml", run={"method": "gate"})
    assert (
        in_file
        == read_config(below, [("run.method", method)])
        == read_config(below, [("run", f"{{method: {method}}}")])
    )


def test_methods_differ_only_in_what_they_decide():
    lora, gate = (read_config({"run": {"method": method}}) for method in ("lora", "gate"))
    assert lora.toolbox.kinds == ["spatial"] and lora.gate.method == "all"
    assert gate.toolbox.kinds == list(PAPER_KINDS) and gate.gate.method == "fisher"
    assert (lora.train, lora.data, lora.toolbox.spatial) == (gate.train, gate.data, gate.toolbox.spatial)


def test_a_method_on_the_command_line_takes_the_place_of_sites_in_a_file():
    gate = read_config({"gate": {"method": "fixed", "sites": ["spatial.1"]}}, [("run.method", "random")]).gate
    assert (gate.method, gate.sites) == ("random", [])


@pytest.mark.parametrize("overrides", [[("gate.method", "fisher")], [("toolbox.kinds", "[semantic]")]])
def test_a_key_that_contradicts_the_method_is_refused(overrides):
    with pytest.raises(ConfigError, match=r"run\.method=lora means .*; leave out one of the two"):
        read_config({"run": {"method": "lora"}}, overrides)


def test_roots_stand_for_folders():
    sets = {"source": {"root": "${tiles}/a"}, "targets": {"b": {"root": "${tiles}/b"}}, "classes": ["x", "y"]}
    config = read_config({"data": sets}, [("data.roots.tiles", "/data")], training=True)
    assert (config.data.source.root, config.data.targets["b"].root) == ("/data/a", "/data/b")
    assert read_config(yaml.safe_load(to_yaml(config))) == config
    with pytest.raises(ConfigError, match=r"source\.root names \$\{tiles\}; give --data\.roots\.tiles the"):
        read_config({"data": sets}, training=True)


def test_a_root_that_is_resolved_already_cannot_be_given_again():
    sets = {"source": {"root": "${tiles}/a"}, "targets": {"b": {"root": "${tiles}/b"}, "c": {"root": "/c"}}}
    saved = to_mapping(read_config({"data": {**sets, "roots": {"tiles": "/data"}, "classes": ["x", "y"]}}))
    for training in (False, True):
        assert read_config(saved, [("data.roots.tiles", "/data")], training=training).data.roots == {"tiles": "/data"}
        with pytest.raises(ConfigError) as error:
            read_config(saved, [("data.roots.tiles", "/new")], training=training)
        assert "data.roots.tiles=/new changes nothing" in str(error.value)
        assert str(error.value).endswith("give --data.source.root, --data.targets.b.root instead")
    moved = [("data.targets.b.root", "${other}/b"), ("data.roots.other", "/new")]
    assert read_config(saved, moved).data.targets["b"].root == "/new/b"
    with pytest.raises(ConfigError, match=r"data\.roots\.other=/new changes nothing"):
        read_config(saved, moved[1:])
    assert read_config(saved, moved[1:], training=True)  # a matrix gives the roots of all its settings to each


@pytest.mark.parametrize("key", [key for key in all_keys() if "<name>" not in key])
def test_an_empty_value_is_a_key_left_out_or_one_of_its_values_but_never_a_number(key, caplog):
    section, _, name = key.rpartition(".")
    empty: dict = {name: None}
    for part in reversed(section.split(".")):
        empty = {part: empty}
    default = functools.reduce(getattr, key.split("."), read_config({}))
    if isinstance(default, int | float):
        with pytest.raises(ConfigError, match=rf"^{key} is empty; expected .*, or no such line$"):
            read_config(empty)
        return
    assert read_config(empty) == read_config({})
    if caplog.records:  # null is none of its values
        assert f"{key} is empty, as if it were left out" in caplog.text
        if not isinstance(default, str):  # text may be the word null
            with pytest.raises(ConfigError, match=rf"{key} is empty; expected"):
                read_config({}, [(key, "null")])
    else:
        assert functools.reduce(getattr, key.split("."), read_config({}, [(key, "null")])) is None


def test_an_empty_value_does_not_hide_that_of_the_base(tmp_path):
    (tmp_path / "base.yaml").write_text("run: {name: mine}\ntrain: {lr: 0.5}")
    (tmp_path / "top.yaml").write_text("base: base.yaml\nrun:\n  name:\n")
    assert read_config(tmp_path / "top.yaml").run.name == "mine"
    (tmp_path / "top.yaml").write_text("base: base.yaml\ntrain:\n  lr:\n")
    with pytest.raises(ConfigError, match=r"train\.lr is empty; expected"):
        read_config(tmp_path / "top.yaml")


@pytest.mark.parametrize("text", ["", "~", "null"])
def test_a_key_left_empty_is_told_where_null_is_none(tmp_path, caplog, text):
    (tmp_path / "base.yaml").write_text("data: {stride: 64, validation: {root: there}}\nrun: {work_dir: mine}")
    (tmp_path / "top.yaml").write_text(
        f"base: base.yaml\ndata:\n  stride: {text}\n  validation: {text}\nrun: {{work_dir: {text}}}\n"
    )
    config = read_config(tmp_path / "top.yaml")
    values = config.data.stride, config.data.validation and config.data.validation.root, config.run.work_dir
    keys = ("data.stride", "data.validation", "run.work_dir")
    told = [f"{key} is empty, as if it were left out" for key in keys]
    assert (values, caplog.messages) == ((None, None, None), []) if text else ((64, "there", "mine"), told)


# --- YAML that means something else, or too much --------------------------------------------------------------------


def read_text(tmp_path, text: str, **options) -> Config:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return read_config(path, **options)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("run: {name: 2020-99-99}", "run.name", "2020-99-99"),
        ("run: {name: 2024-01-31}", "run.name", "2024-01-31"),
        ("run: {name: 1e-4}", "run.name", "1e-4"),
        ("run: {name: 007}", "run.name", "007"),
        ("run: {name: 'off'}", "run.name", "off"),
        ("run: {method: no}", "run.method", None),
        ("gate: {inactive: off}", "gate.inactive", "off"),
        ("data: {augment: {flip: off}}", "data.augment.flip", False),
        ("data: {augment: {flip: Yes}}", "data.augment.flip", True),
        ("data: {classes: [no, yes, 12]}", "data.classes", ["no", "yes", "12"]),
        (
            "data: {source: {label_map: {0: 1, 1: '1', 010: no}}}",
            "data.source.label_map",
            {"0": 1, "1": "1", "010": "no"},
        ),
        ("train: {lr: 1e-4}", "train.lr", 1e-4),
        ("train: {lr: 1}", "train.lr", 1.0),
        ("train: {iterations: 40_000}", "train.iterations", 40000),
        ("train: {clip: null}", "train.clip", None),
        ("x: &a {lr: 3}\ntrain: *a", None, "unknown key 'x'"),
        ("base: []\ntrain: {<<: {lr: 3, power: 2}, power: 1}", "train.power", 1.0),
        ("\ufefftrain: {lr: 3}", "train.lr", 3.0),
    ],
)
def test_a_key_says_what_type_a_text_has(tmp_path, text, key, value):
    if key == "run.method":
        with pytest.raises(ConfigError, match=r"run\.method=no is not accepted; expected gate, random"):
            read_text(tmp_path, text)
    elif key is None:
        with pytest.raises(ConfigError, match=value):
            read_text(tmp_path, text)
    else:
        config = read_text(tmp_path, text)
        found = functools.reduce(getattr, key.split("."), config)
        assert found == value and type(found) is type(value)
        assert read_text(tmp_path, to_yaml(config)) == config
        assert read_config(yaml.safe_load(to_yaml(config))) == config


@given(
    st.lists(st.text("019_+-.:eExXo~'\"#&*!|>%@` ,[]{}nullyesof=<é漢", min_size=1, max_size=8), min_size=1, max_size=3)
)
@settings(max_examples=25, deadline=None)
def test_any_text_survives_the_file(texts):
    source = dataclasses.replace(Config().data.source, root=texts[0], label_map=dict.fromkeys(texts, texts[0]))
    data = dataclasses.replace(Config().data, roots={"a": texts[0]}, source=source)
    mapping = {"data": configfile.parse_yaml(to_yaml(Config(data=data)))["data"]}
    assert mapping["data"]["roots"] == {"a": texts[0]}
    assert read_config(mapping).data.source == source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lr: 1}\ngate: {k: 3}\ntrain: {power: 1}", "key 'train' is given twice, in lines 1 and 3; keep one"),
        ("train: {lr: 1, lr: 2}", "key 'lr' is given twice, in line 1; keep one"),
        ("data: {targets: {a: {root: x}, 'a': {root: y}}}", "key 'a' is given twice, in line 1"),
        ("data: {source: {label_map: {1: a, '1': b}}}", "key '1' is given twice, in line 1"),
        ("[" * 100_000, "line 1 is nested more than 32 deep"),
        ("a: " * 40, "is no valid YAML"),
        ("\n".join(f"{'  ' * n}a:" for n in range(40)), "line 32 is nested more than 32 deep"),
        ("- - - " * 400, "nested more than 32 deep"),
        ("train: &a {lr: *a}", "line 1: an alias stands for what it is itself a part of"),
        (
            "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"{n}: &{n} [{', '.join([f'*{p}'] * 10)}]\n" for p, n in zip("abcde", "bcdef", strict=True)),
            "line 5: more than 100000 values, with what aliases stand for",
        ),
        ("run: {name: !!python/object/apply:os.system [x]}", "the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("train: {iterations: !!int 3}", "the tag tag:yaml.org,2002:int in line 1 is not accepted"),
        ("{[a]: 1}", "the key in line 1 is no word"),
        ("run: {name: \0}", "is no valid YAML: unacceptable character #x0000"),
        ("--- {}\n--- {}", "is no valid YAML: expected a single document"),
        ("just text", "holds a text; a mapping with run, data"),
        ("train: {<<: 3}", "line 1: << takes a mapping"),
        ("base: {a: b}", "base={a: b} is not accepted; expected a file, or a list of files"),
        ("#" * 2**20 + "\n{}", "holds more than 1048576 bytes"),
    ],
    ids=lambda value: value[:24],
)
def test_yaml_that_cannot_be_meant_is_refused_with_file_and_line(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        read_text(tmp_path, text)
    line = str(error.value)
    assert line.startswith(str(tmp_path / "mine.yaml")) and message in line
    assert len(line) < 500 + len(str(tmp_path))


def test_an_override_mends_a_value_of_the_file(tmp_path):
    assert read_text(tmp_path, "train: {lr: -1, iterations: x}", overrides=[("train", "{lr: 1, iterations: 3}")])
    with pytest.raises(ConfigError, match=r"mine\.yaml: train\.iterations=x is not accepted; expected an integer$"):
        read_text(tmp_path, "train: {lr: -1, iterations: x}", overrides=[("train.lr", "1"), ("gate.k", "0")])
    with pytest.raises(ConfigError, match=r"^gate\.k=0 is out of range; use 1 to"):
        read_text(tmp_path, "train: {lr: -1}", overrides=[("train.lr", "1"), ("gate.k", "0")])


def test_a_repetition_on_the_command_line_is_refused_within_a_mapping_alone():
    with pytest.raises(ConfigError, match=r"--train: key 'lr' is given twice"):
        read_config({}, [("train", "{lr: 1, lr: 2}")])
    assert read_config({}, [("train.lr", "1"), ("train.lr", "2")]).train.lr == 2
    with pytest.raises(ConfigError, match=r"label_map=.* gives a name twice"):
        read_config({"data": {"source": {"label_map": {1: "a", "1": "b"}}}})


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("train.iterations", "9" * 5000, "is not accepted; expected an integer"),
        ("train.iterations", str(10**12), "train.iterations=1000000000000 is out of range; use 1 to 1000000000"),
        ("train.lr", "9" * 5000, "is out of range; use a finite number"),
        ("train.lr", "inf", "train.lr=inf is out of range"),
        ("data.crop", str(10**6), "data.crop=1000000 is out of range; use 1 to 16384"),
        ("data.workers", "100000", "use 0 to 1024"),
        ("toolbox.spatial.rank", str(10**6), "toolbox.spatial.rank=1000000 is out of range; use 1 to 4096"),
        ("run.device", "cuda:" + "9" * 300, "is no device; use auto, cpu, cuda or cuda:<index>"),
        ("run.name", "a\0b", r"run.name='a\x00b' is no text of one line"),
        ("run.name", "..", "run.name='..' is no folder name"),
        ("run.name", "", "run.name='' is no folder name"),
        ("run.name", "x" * 500, "is no folder name; use letters, digits, '.', '_' and '-', 80 at most"),
        ("run.work_dir", "a\nb", "is no text of one line; use up to 4096 letters that can be printed"),
        ("run.work_dir", "\udcff", "is no text of one line"),
        ("data.source.root", "x" * 5000, "is no text of one line; use up to 4096 letters"),
        ("data.targets.a\0b.root", "x", "cannot name a target"),
        ("data.targets", "{'': {root: x}}", "cannot name a target"),
        ("data.a.b.c.d.e.f.g.h.i.j", "1", "no key has so many dots"),
        ("data.classes", "a, b", "data.classes=a, b is not accepted; expected a list of (text)"),
        ("data.source.label_map", "[1, 2]", "expected a mapping from text to text or an integer"),
        ("gate.sites", "[spatial.1, 3]", "gate.sites: site '3' is not <kind>.<layer>"),
        (
            "train.loss.name",
            "ce+ce",
            "train.loss.name='ce+ce' is no loss; use ce, dice, focal or a sum such as ce+dice",
        ),
    ],
    ids=lambda value: value[:24],
)
def test_absurd_values_are_one_line(key, text, message):
    with pytest.raises(ConfigError) as error:
        read_config({}, [(key, text)])
    line = str(error.value)
    assert message in line and len(line) < 400 and line.isprintable()


@pytest.mark.parametrize("text", ["", "''"])
def test_weights_without_a_name_are_told_what_they_may_be(text):
    with pytest.raises(ConfigError, match=r"^model\.weights='' must be auto, none, or the path of a \.pth or \.safe"):
        read_config({}, [("model.weights", text)])


def test_a_number_that_python_cannot_write_is_named():
    with pytest.raises(ConfigError, match=r"gate\.k=an integer of 16610 bits is out of range"):
        read_config({"gate": {"k": 10**5000}})
    with pytest.raises(ConfigError, match=r"train\.lr=an integer of 16610 bits is out of range"):
        read_config({"train": {"lr": 10**5000}})


@pytest.mark.parametrize(("word", "key"), list(SYNONYMS.items()))
def test_words_of_other_libraries_lead_to_ours(word, key, capsys):
    assert key in all_keys() or any(known.startswith(f"{key}.") for known in all_keys())
    with pytest.raises(ConfigError, match=rf"unknown key '{re.escape(word)}.*'; did you mean '{re.escape(key)}'\?"):
        read_config({}, [(word, "1")])
    assert train.main([f"--{word}", "1"]) == 2
    assert f"did you mean {repr(key) if '.' in word else f'--{key}'}?" in capsys.readouterr().err


def test_a_word_of_another_library_means_the_key_beside_it():
    data = {"targets": {"a": {"root": "x", "ignore_index": 0}}}
    with pytest.raises(ConfigError, match=r"'data\.targets\.a\.ignore_index'; did you mean 'data\.targets\.a\.ignore'"):
        read_config({"data": data})
    with pytest.raises(ConfigError, match=r"'train\.learning_rate'; did you mean 'train\.lr'"):
        read_config({"train": {"learning_rate": 1}})


@pytest.mark.parametrize("word", ["LR", "learningRate", "Learning-Rate", "LearningRate"])
def test_words_mean_the_same_however_they_are_written(word):
    with pytest.raises(ConfigError, match=rf"'train\.{word}'; did you mean 'train\.lr'"):
        read_config({"train": {word: 1}})


@pytest.mark.parametrize("key", ["train.lr", "train.weight_decay", "toolbox.spatial.alpha"])
def test_numbers_whose_products_no_float32_holds_are_refused(key):
    with pytest.raises(ConfigError, match=rf"{key}=1e\+300 is out of range; use .* at most 1e\+15|to 1e\+15"):
        read_config({}, [(key, "1e300")])
    read_config({}, [(key, "1e15")])


@pytest.mark.parametrize("name", ["", " "])
def test_a_class_without_a_name_is_refused(name):
    with pytest.raises(ConfigError, match=r"data\.classes has an empty name; give every class one"):
        read_config({"data": {"classes": ["road", name]}})


def test_a_class_that_is_ignored_is_said_aloud(caplog):
    data = {"classes": ["ground", "road"], "source": {"root": "x", "ignore": 0}}
    assert read_config({"data": data}).data.source.ignore == 0 and not caplog.records  # nothing is trained
    read_config({"data": data}, training=True)
    assert caplog.messages == ["data.source.ignore=0 hides class 0 (ground): it is neither trained nor counted there"]
    caplog.clear()
    read_config({"data": data}, [("data.source.label_map", "{0: ignore, 1: road}")], training=True)
    assert not caplog.records


def test_a_split_that_a_folder_would_not_heed_is_refused():
    data = {"classes": ["ground", "road"], "source": {"root": "x", "split": "train.txt"}}
    assert read_config({"data": data}, training=True).data.source.split == "train.txt"
    data["source"]["split"] = "train"
    with pytest.raises(ConfigError, match=r"data\.source\.split=train is no text file; a folder takes a \.txt"):
        read_config({"data": data}, training=True)


def test_what_val_fraction_holds_out_is_the_validation_set():
    data = {"classes": ["ground", "road"], "source": {"root": "x", "val_fraction": 0.2}}
    config = read_config({"data": data}, training=True)
    assert config.data.validation == config.data.source
    assert read_config(to_mapping(config), training=True) == config  # as a run folder has it
    moved = read_config(to_mapping(config), [("data.validation.root", "y")])
    assert (moved.data.validation.root, moved.data.source.root) == ("y", "x")
    with pytest.raises(ConfigError, match=r"val_fraction and data\.validation exclude each other"):
        read_config({"data": data | {"validation": {"root": "y"}}})
    with pytest.raises(ConfigError, match=r"data\.targets\.a\.val_fraction counts in data\.source alone"):
        read_config({"data": {"targets": {"a": {"root": "y", "val_fraction": 0.1}}}})
    drawn = {"kind": "generated", "split": "arid", "val_fraction": 0.1}
    with pytest.raises(ConfigError, match=r"data\.source\.val_fraction: scenes are drawn"):
        read_config({"data": {"source": drawn}}, training=True)


# --- what is still to come ------------------------------------------------------------------------------------------

TOGETHER = {
    "run.speed": "eager",
    "run.log": "[jsonl, tensorboard]",
    "data.<set>.second": "{images: dsm/*}",
    "data.<set>.attribute": "class",
    "model.head": "unetformer",
    "model.resample": "plain",
    "model.official_relpos": "true",
    "style": "{method: earth}",
    "mim": "{method: restore}",
    "injector": "{method: gse}",
    "modal": "{method: mmadapter}",
    "train.horizon": "40000",
    "train.optimizer": "sgd",
    "train.momentum": "0.8",
    "train.schedule": "steps",
    "train.milestones": "[10]",
    "train.gamma": "0.5",
    "train.loss": "{name: ce+dice}",
}


def test_keys_that_go_together_are_accepted():
    for key, text in TOGETHER.items():
        together = {"train.schedule": [("train.milestones", "[5]")], "train.milestones": [("train.schedule", "steps")]}
        read_config(
            {"data": {"targets": {"a": {"root": "x"}}}},
            [(key.replace("<set>", "targets.a"), text), *together.get(key, [])],
        )


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"style": {"method": "earth", "block": 600}}, "style.block=600 is larger than data.crop=512; use at most"),
        ({"mim": {"method": "restore", "block": 600}}, "mim.block=600 is larger than data.crop=512; use at most"),
        ({"mim": {"ratio": 1.5}}, "mim.ratio=1.5 is out of range; use 0 to 1"),
        ({"style": {"probability": -0.1}}, "style.probability=-0.1 is out of range; use 0 to 1"),
        ({"injector": {"width": 100}}, "injector.width=100 is no multiple of injector.heads=8"),
        ({"train": {"horizon": 10}}, "train.horizon=10 ends the schedule before train.iterations=20000"),
        ({"train": {"schedule": "steps"}}, "train.schedule=steps and train.milestones go together; give both or none"),
        ({"train": {"milestones": [5, 5]}}, "train.milestones=[5, 5] must be increasing iterations"),
        (
            {"train": {"loss": {"class_weights": [0, 0]}}},
            "class_weights=[0.0, 0.0] must be factors of which one is abo",
        ),
        (
            {"train": {"loss": {"class_weights": [1]}}, "data": {"classes": ["a", "b"]}},
            "train.loss.class_weights has 1 numbers for 2 classes",
        ),
        ({"evaluate": {"stride": 600}}, "evaluate.stride=600 leaves gaps between windows of data.crop=512"),
        (
            {"evaluate": {"mean_classes": ["rod"]}, "data": {"classes": ["road", "water"]}},
            "evaluate.mean_classes: 'rod' is no class; did you mean 'road'?",
        ),
        (
            {"data": {"targets": {"a": {"root": "x", "second": {"scale": "fixed"}}}}},
            "data.targets.a.second: scale=fixed and value_range go together; give both or none",
        ),
        (
            {"data": {"targets": {"a": {"root": "x", "val_fraction": 1}}}},
            "val_fraction=1.0 is out of range; use a numb",
        ),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_values_of_many_sections_are_checked(mapping, message):
    with pytest.raises(ConfigError) as error:
        read_config(mapping)
    assert message in str(error.value)


# --- all keys -------------------------------------------------------------------------------------------------------


def sections(cls: type = Config) -> typing.Iterator[type]:
    yield cls
    for hint in hints_of(cls).values():
        if section_of(hint)[0]:
            yield from sections(section_of(hint)[0])


@pytest.mark.parametrize("cls", dict.fromkeys(sections()), ids=lambda cls: cls.__name__)
def test_every_field_says_what_it_means(cls):
    assert list(texts_of(cls)) == list(hints_of(cls))
    assert all(len(text) > 3 and text.endswith(".") for text in texts_of(cls).values())


def test_defaults_are_what_their_types_accept():
    assert read_config(to_mapping(Config())) == Config()
    assert Config().style == StyleConfig()


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(400, 5000).map(lambda digits: 10**digits),
    st.sampled_from([2**63, math.nan, math.inf, -math.inf, 1e308, b"bytes", 1j, object()]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["", "~", "null", "off", "[", "{", "{a: ", "&a [*a]", "*a", "!!int x", "<<", "\0", "\udcff", "a\nb"]
    ),
    st.sampled_from(
        ["{a: 1, a: 2}", "[" * 5000, "9" * 5000, "2020-99-99", "12:30", "1e999", "${x}", "../..", "%s", "'a"]
    ),
    st.sampled_from(sorted({word for words in TOGETHER.values() for word in words.strip("{}[]").split()})),
)
VALUES = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ODD.filter(hash), inner, max_size=3), max_leaves=6
)
NAMES = st.sampled_from(["a", "", "source", "a b", "\0", "é", ".", "x" * 300])


def every_key(cls: type = Config, prefix: str = "") -> typing.Iterator[tuple[str, object]]:
    """Dotted key -> type, of values and of sections, also of sections that may be null."""
    for name, hint in hints_of(cls).items():
        inner, named, _ = section_of(hint)
        yield prefix + name, hint
        if inner:
            yield from every_key(inner, f"{prefix}{name}.<name>." if named else f"{prefix}{name}.")


HINTS = dict(every_key())
GOOD = ["0", "1", "2", "8", "0.5", "true", "false", "[1]", "[0, 1]", "a", "[a, b]", "null", "{}", "{root: x}"]
"""What is right for some key or other, so that values meet each other."""


@st.composite
def keys_and_values(draw) -> tuple[str, object]:
    key = draw(st.sampled_from(sorted(HINTS)))
    right = st.sampled_from(choices(HINTS[key]) or GOOD)
    return key.replace("<name>", draw(NAMES)), draw(right | st.sampled_from(GOOD) | VALUES)


def call(argv) -> str:
    """Run `cegate train` and return its standard error; wrong usage is one line and exit code 2."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train.main(argv)
    assert code == 0 or (code == 2 and not out.getvalue() and err.getvalue().count("\n") == 1), (argv, err.getvalue())
    return err.getvalue()


@settings(max_examples=60, deadline=None)
@given(st.lists(keys_and_values(), min_size=1, max_size=4))
def test_no_key_and_value_ends_in_a_traceback(pairs):
    texts = [(key, value if isinstance(value, str) else shown(value)) for key, value in pairs]
    line = call(["--print_config", *(f"--{key}={text}" for key, text in texts)])
    assert len(line) < 4000
    for training in (False, True):
        mapping = functools.reduce(configfile._put, pairs, {})
        with contextlib.suppress(ConfigError):
            config = read_config(mapping, training=training)
            assert read_config(configfile.parse_yaml(to_yaml(config))) == config


def test_the_keys_that_are_tried_are_all_keys():
    assert {*all_keys(), *configfile.SECTIONS} <= HINTS.keys()
    assert {
        "data.source.second.scale",
        "data.targets.<name>.second.bands",
        "data.unlabelled.val_fraction",
    } <= HINTS.keys()


@settings(max_examples=100, deadline=None)
@given(st.text("ab: \n-[]{},&*!|>'\"#%@`?<01~.\t\0") | st.binary(max_size=40))
def test_no_file_ends_in_a_traceback(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "odd.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with contextlib.suppress(ConfigError):
        read_config(path)
