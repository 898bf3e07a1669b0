from __future__ import annotations

import functools

import pytest
import yaml

from cegate.config import KINDS
from cegate.configfile import all_keys, read_config, to_mapping, to_yaml
from cegate.errors import ConfigError
from cegate.methods import METHODS


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
    assert gate.toolbox.kinds == list(KINDS) and gate.gate.method == "fisher"
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
def test_an_empty_value_is_a_key_left_out_or_one_of_its_values(key, caplog):
    section, _, name = key.rpartition(".")
    empty: dict = {name: None}
    for part in reversed(section.split(".")):
        empty = {part: empty}
    assert read_config(empty) == read_config({})
    if caplog.records:  # null is none of its values
        assert f"{key} is empty, as if it were left out" in caplog.text
        default = functools.reduce(getattr, key.split("."), read_config({}))
        if not isinstance(default, str):  # text may be the word null
            with pytest.raises(ConfigError, match=rf"{key} is empty; expected"):
                read_config({}, [(key, "null")])
    else:
        assert functools.reduce(getattr, key.split("."), read_config({}, [(key, "null")])) is None


def test_an_empty_value_does_not_hide_that_of_the_base(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {lr: 0.5}")
    (tmp_path / "top.yaml").write_text("base: base.yaml\ntrain:\n  lr:\n")
    assert read_config(tmp_path / "top.yaml").train.lr == 0.5
