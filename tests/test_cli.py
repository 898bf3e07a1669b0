from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cegate import cli, configfile, evaluate, inspect, predict, train
from cegate.__main__ import main as cegate
from cegate.config import Config, DataConfig, SetConfig, TrainConfig
from cegate.configfile import changed_values, find_config, read_config, to_mapping, to_yaml
from cegate.errors import CegateError, ConfigError, DataError

GOOD_DATA = {"classes": ["a", "b"], "source": {"kind": "folder", "root": "somewhere"}}


def refused(capsys, *argv: str) -> str:
    """Run `cegate train`, expect exit code 2 and one line on stderr, and return it."""
    assert train.main(argv) == cli.USAGE
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").strip()


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gate.kk", "3"], "unknown key 'gate.kk'; did you mean 'gate.k'?"),
        (["--lr", "3"], "unknown option --lr; did you mean --train.lr?"),
        (["--resum"], "unknown option --resum; did you mean --resume?"),
        (["--gat.k", "3"], "unknown option --gat.k; did you mean --gate.k?"),
        (["--toolbox.spatal.rank", "3"], "unknown key 'toolbox.spatal'; did you mean 'toolbox.spatial'?"),
        (
            ["--data.targets.arid.kindd", "x"],
            "unknown key 'data.targets.arid.kindd'; did you mean 'data.targets.arid.kind'?",
        ),
        (
            ["--data.targets", "{a: {limt: 3}}"],
            "unknown key 'data.targets.a.limt'; did you mean 'data.targets.a.limit'?",
        ),
        (["--gate.k", "many"], "gate.k=many is not accepted; expected an integer"),
        (["--run.deterministic", "maybe"], "run.deterministic=maybe is not accepted; expected true or false"),
        (["--train.clip", "x"], "train.clip=x is not accepted; expected a number or null"),
        (["--gate.method", "fischer"], "expected fisher, random, all, none or fixed; did you mean 'fisher'?"),
        (
            ["--data.validation.kind", "x"],
            "data.validation.kind=x is not accepted; expected folder, loveda, prepared or gen",
        ),
        (
            ["--toolbox.frequency.cutoff", "x"],
            "frequency.cutoff=x is not accepted; expected a number or learnable",
        ),
        (["--toolbox.kinds", "[spatial, semantc]"], "expected a list of (spatial, semantic or frequency)"),
        (["--data", "3"], "data=3 is not accepted; expected a mapping of source, targets"),
        (["--train.iterations"], "--train.iterations: expected one argument"),
        (["stray"], "unexpected argument 'stray'"),
        (
            ["--config", "quickstar"],
            "config 'quickstar' is no file and no shipped configuration; did you mean 'quickstart'? cegate",
        ),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["mine.yaml"], "unexpected argument 'mine.yaml'; did you mean --config mine.yaml? cegate train --help"),
        (["--config", "mine.yaml"], "config 'mine.yaml': no such file"),
        (["--config", "dg/p_i2v.yaml"], "config 'dg/p_i2v.yaml': no such file; did you mean 'dg/p_i2v'?"),
        (["--data.targets.tgt", "/dir"], "targets.tgt=/dir is not accepted; expected a mapping of kind, root, images"),
        (["--data.targets.tgt", "/dir"], "did you mean --data.targets.tgt.root /dir?"),
        (["--data.source.label_map", "{1:road,0:bg}"], "; put a space after the colon: '1: road'"),
        (["--data.augment", "{flip:false}"], "unknown key 'data.augment.flip:false'; put a space after the colon"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_that_names_key_and_nearest(capsys, argv, message):
    assert message in refused(capsys, *argv)


def test_a_file_with_wrong_keys_is_named_with_all_of_them(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("gate: {kk: 3, k: x}\ntrian: {lr: 1}\ndata: {targets: {north: {rot: d}}}\n")
    line = refused(capsys, "--config", str(path))
    assert line.startswith(f"{path}: ")
    for part in (
        "'gate.kk'; did you mean 'gate.k'",
        "gate.k=x",
        "'trian'; did you mean 'train'",
        "'data.targets.north.root'",
    ):
        assert part in line


def test_all_bad_values_are_named_at_once(capsys):
    line = refused(capsys, "--train.lr", "-1", "--gate.k", "0", "--data.crop", "-3", "--model.features", "[1, 2]")
    for part in ("train.lr=-1.0", "gate.k=0", "data.crop=-3", "model.features=[1, 2]"):
        assert part in line


def test_overrides_go_on_top_of_the_file_in_order(tmp_path):
    path = tmp_path / "mine.yaml"
    text = "train: {lr: 1e-4, iterations: 9}\ndata:\n  targets: {a: {kind: generated, split: arid, limit: 3}}\n"
    path.write_text(text + "  source: {kind: generated, split: temperate, label_map: {0: road}}\n")
    argv = ["--train.lr", "2e-3", "--data.targets.a.limit=5", "--data.targets.b.kind", "generated"]
    argv += ["--data.targets.b.split", "arid", "--run.name", "123", "--gate.k", "3", "--gate.k", "4"]
    config = cli.parse_config(argv, train.USAGE, base=path, training=True)
    assert (config.train.lr, config.train.iterations, config.gate.k, config.run.name) == (2e-3, 9, 4, "123")
    assert config.data.targets["a"] == SetConfig(kind="generated", split="arid", limit=5)
    assert config.data.targets["b"].limit is None
    assert config.data.source.label_map == {"0": "road"}


def test_an_override_of_one_key_keeps_a_mapping_given_before():
    argv = ["--data.augment", "{flip: false, resize: [1.0, 1.0]}", "--data.augment.photometric", "false"]
    augment = cli.parse_config(argv, train.USAGE, base="quickstart").data.augment
    assert (augment.flip, augment.resize, augment.photometric) == (False, [1.0, 1.0], False)
    argv = ["--data.source.label_map", "{0: road}", "--data.source.label_map.1", "water"]
    source = cli.parse_config(argv, train.USAGE, base="quickstart").data.source
    assert source.label_map == {"0": "road", "1": "water"}


def test_a_mapping_replaces_what_the_file_says():
    argv = ["--data.targets", "{only: {kind: generated, split: tropical}}", "--data.validation", "null"]
    config = cli.parse_config(argv, train.USAGE, base="quickstart")
    assert list(config.data.targets) == ["only"] and config.data.validation is None


def test_print_config_can_be_read_back(capsys, tmp_path):
    assert train.main(["--print_config", "--train.lr", "3e-4"]) == cli.GOOD
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert read_config(path) == read_config("quickstart", [("train.lr", "3e-4")])


def test_help_lists_every_key_with_its_text(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "--gate.interval" in text and "Training iterations between two scorings" in text
    assert "--resume" in text and "CONFIG" not in text


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict", "inspect", "bench"])
def test_help_needs_no_torch(verb):
    checked = f"try: {verb}.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    code = f"import sys; from cegate import {verb}\n{checked}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage: cegate" in done.stdout, done.stderr


def test_module_and_entry_point_are_the_same_command():
    for argv in (["-m", "cegate.train"], ["-m", "cegate", "train"]):
        done = subprocess.run([sys.executable, *argv, "--gate.kk", "1"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: unknown key 'gate.kk'; did you mean 'gate.k'?\n"


@pytest.mark.parametrize(("verb", "option"), [("predict", "weights"), ("evaluate", "run"), ("train", "config")])
def test_an_option_that_is_empty_is_not_one_left_out(capsys, verb, option):
    assert cegate([verb, f"--{option}", ""]) == cli.USAGE
    line = f"error: --{option} is empty, as an unset variable leaves it; give a value, or leave it out\n"
    assert capsys.readouterr().err == line


def test_the_entry_point_knows_its_verbs(capsys):
    assert cegate(["evaluat"]) == cli.USAGE
    assert "did you mean 'evaluate'?" in capsys.readouterr().err
    assert cegate(["--version"]) == cegate(["--help"]) == cli.GOOD
    assert cegate([]) == cli.USAGE
    capsys.readouterr()
    assert cegate(["convert"]) == cli.USAGE and "the file to convert is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("bad\n  key"), 2, "error: bad key"),
        (DataError("bad file"), 1, "error: bad file"),
        (CegateError("bad"), 1, "error: bad"),
        (
            PermissionError(13, "Permission denied", "ro/x"),
            1,
            "error: ro/x: Permission denied; see that it can be read and written",
        ),
        (
            OSError(5, "Input/output error", "disk/x"),
            1,
            "error: disk/x: Input/output error; see that it can be read and written",
        ),
        (KeyboardInterrupt("saved; go on with --resume"), 130, "saved; go on with --resume"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=str,
)
def test_errors_become_one_line_and_an_exit_code(capsys, error, code, line):
    @cli.command
    def main(argv):
        raise error

    assert main([]) == code
    assert capsys.readouterr().err == line + "\n"


def test_our_own_bugs_keep_their_traceback():
    @cli.command
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main([])


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        (evaluate.main, [], "--run is missing"),
        (evaluate.main, ["--runn", "x"], "did you mean --run?"),
        (
            evaluate.main,
            ["--run", "x", "--gate.k", "3"],
            "not take --gate.k; it takes keys of data, run, evaluate",
        ),
        (predict.main, ["--input", "a", "--output", "b"], "give one of --run and --adapter"),
        (predict.main, ["--run", "a", "--output", "b"], "--input is missing"),
        (predict.main, ["--run", "a", "--train.lr", "1"], "does not take --train.lr; it takes no configuration keys"),
        (inspect.main, [], "give one of --run, --adapter and --backends"),
        (inspect.main, ["--backends", "stray"], "unexpected argument 'stray'; cegate inspect --help"),
        (evaluate.main, ["runs/x"], "did you mean --run runs/x?"),
    ],
)
def test_other_commands_refuse_wrong_usage(capsys, command, argv, message):
    assert command(argv) == cli.USAGE
    assert message in capsys.readouterr().err


def test_evaluate_takes_weights_that_have_moved(tmp_path, monkeypatch):
    from cegate.engine import evaluator

    (tmp_path / "config.yaml").write_text(to_yaml(read_config({"data": GOOD_DATA})))
    seen = []
    monkeypatch.setattr(evaluator, "evaluate_run", lambda run, config, **_: seen.append(config) or [])
    assert evaluate.main(["--run", str(tmp_path), "--weights", "moved/vit.pth"]) == cli.GOOD
    assert seen[0].model.weights == "moved/vit.pth"


def test_windows_of_another_size_leave_the_backbone_as_it_was(tmp_path, monkeypatch):
    from cegate.engine import evaluator

    (tmp_path / "config.yaml").write_text(to_yaml(read_config({"data": GOOD_DATA | {"crop": 64}})))
    seen = []
    monkeypatch.setattr(evaluator, "evaluate_run", lambda run, config, **_: seen.append(config) or [])
    assert evaluate.main(["--run", str(tmp_path), "--data.crop", "128"]) == cli.GOOD
    assert (seen[0].data.crop, seen[0].model.image_size) == (128, 64)


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        (evaluate.main, ["--run", "DIR"]),
        (predict.main, ["--adapter", "DIR", "--input", __file__, "--output", "out.png"]),
        (inspect.main, ["--run", "DIR"]),
        (inspect.main, ["--adapter", "DIR"]),
    ],
)
def test_a_folder_that_is_no_run_is_an_error_of_code_1(capsys, tmp_path, command, argv):
    assert command([str(tmp_path) if word == "DIR" else word for word in argv]) == cli.FAILED
    err = capsys.readouterr().err
    assert str(tmp_path) in err and err.count("\n") == 1


# --- reading and checking -------------------------------------------------------------------------------------------


def test_defaults_are_valid_and_survive_yaml():
    assert read_config({}) == Config()
    assert read_config(yaml.safe_load(to_yaml(Config()))) == Config()


@settings(max_examples=25, deadline=None)
@given(
    st.builds(
        TrainConfig,
        iterations=st.integers(5, 10**6),
        lr=st.floats(1e-8, 1.0),
        clip=st.none() | st.floats(0.1, 9.0),
        schedule=st.sampled_from(["poly", "cosine", "constant"]),
        baseline=st.booleans(),
    )
)
def test_any_section_survives_yaml(section):
    config = replace(Config(), train=section)
    assert read_config(yaml.safe_load(to_yaml(config))) == config
    assert changed_values(config, config) == {}


def test_changed_values_are_dotted():
    old = read_config({"data": {"targets": {"a": {"root": "x"}}}})
    new = replace(old, data=replace(old.data, targets={"a": SetConfig(root="y"), "b": SetConfig(root="z")}))
    changed = changed_values(old, new)
    assert changed["data.targets.a.root"] == ("x", "y") and changed["data.targets.b.root"] == (None, "z")


def test_every_leaf_is_listed():
    flat = {key.replace("<name>", "x") for key in configfile.all_keys()}
    nested = to_mapping(replace(Config(), data=DataConfig(targets={"x": SetConfig(root="d")})))
    assert {key for key, _ in configfile._leaves(nested)} == flat


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"run": {"name": "a/b"}}, "run.name='a/b' is no folder name"),
        ({"run": {"device": "gpu"}}, "run.device='gpu' is no device; use auto, cpu, cuda"),
        ({"data": {"crop": 64, "stride": 65}}, "data.stride=65 leaves gaps"),
        ({"data": {"classes": ["a", "a"]}}, "data.classes names a more than once"),
        ({"data": {"classes": ["a"]}}, "data.classes has 1 names; give 2 to 255"),
        ({"data": {"classes": ["a", "b"], "palette": ["#000000"]}}, "1 colours for 2 classes"),
        ({"data": {"classes": ["a", "b"], "palette": ["#000000", "red"]}}, "'red' is no '#RRGGBB'"),
        ({"data": {"source": {"kind": "generated"}, "palette": ["red"]}}, "'red' is no '#RRGGBB'"),
        ({"data": {"augment": {"resize": [2.0, 0.5]}}}, "data.augment.resize=[2.0, 0.5] must be [low, high]"),
        ({"data": {"augment": {"max_class_share": 1.5}}}, "data.augment.max_class_share=1.5 is out of range"),
        ({"data": {"targets": {"source": {"root": "x"}}}}, "'source' cannot name a target"),
        ({"data": {"targets": {"a": {}}}}, "data.targets.a.root is missing"),
        ({"data": {"targets": {"a": {"kind": "loveda", "root": "x"}}}}, "data.targets.a.split is missing"),
        ({"data": {"targets": {"a": {"root": "x", "value_range": [3.0, 3.0]}}}}, "value_range=[3.0, 3.0] must be"),
        ({"data": {"targets": {"a": {"root": "x", "bands": [0, 1]}}}}, "bands=0 is out of range; use 1 to 65535"),
        (
            {"data": {"classes": ["road", "water"], "targets": {"a": {"root": "x", "label_map": {3: "watr"}}}}},
            "data.targets.a.label_map.3='watr' is no class; did you mean 'water'?",
        ),
        (
            {"data": {"classes": ["road", "water"], "targets": {"a": {"root": "x", "label_map": {3: 2}}}}},
            "data.targets.a.label_map.3='2' is no class",
        ),
        ({"model": {"features": [1, 2, 2, 3]}}, "model.features=[1, 2, 2, 3] must be four increasing"),
        ({"toolbox": {"kinds": []}}, "toolbox.kinds=[] must be one or more kinds"),
        ({"toolbox": {"frequency": {"cutoff": 1.5}}}, "toolbox.frequency.cutoff=1.5 is out of range"),
        ({"gate": {"method": "fixed"}}, "gate.sites is empty"),
        ({"gate": {"method": "fixed", "sites": ["spatial"]}}, "gate.sites: site 'spatial' is not <kind>.<layer>"),
        ({"train": {"warmup": 50, "iterations": 50}}, "train.warmup=50 leaves nothing"),
        ({"train": {"lr": float("nan")}}, "train.lr=nan is out of range"),
        ({"train": {"iterations": 2.5}}, "train.iterations=2.5 is not accepted; expected an integer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_a_type_lets_through_are_checked(mapping, message):
    with pytest.raises(ConfigError) as error:
        read_config(mapping)
    assert message in str(error.value)


def test_training_needs_a_source_and_classes():
    with pytest.raises(ConfigError, match=r"data\.classes has 0 names.*data\.source\.root is missing"):
        read_config({}, training=True)
    assert read_config({"data": GOOD_DATA}, training=True).data.source.root == "somewhere"


def test_sites_that_would_be_ignored_are_refused_in_training_and_can_be_read():
    ignored = {"data": GOOD_DATA, "gate": {"sites": ["spatial.1"]}}
    with pytest.raises(ConfigError, match=r"gate\.sites counts with .*fixed alone, it is fisher; .* as \[\]"):
        read_config(ignored, training=True)
    assert read_config(ignored, [("gate.sites", "[]")], training=True).gate.sites == []
    assert read_config(ignored).gate.method == "fisher"


def test_a_label_map_takes_class_indices():
    classes = {"classes": ["road", "water"], "source": {"root": "x", "label_map": {"0": 1, "4": 0}}}
    assert read_config({"data": classes}, training=True).data.source.label_map == {"0": 1, "4": 0}


def test_adaptation_needs_images_and_iterations():
    data = GOOD_DATA | {"unlabelled": {"kind": "generated", "split": "arid"}}
    with pytest.raises(ConfigError, match=r"data\.unlabelled is used by nothing; give adapt\.method"):
        read_config({"data": data}, training=True)
    adapted = {"data": data, "adapt": {"method": "dacs", "warmup": 50}, "train": {"iterations": 50}}
    with pytest.raises(ConfigError, match=r"adapt\.warmup=50 leaves dacs nothing of train\.iterations=50; use fewer"):
        read_config(adapted, training=True)
    assert read_config(adapted, [("adapt.warmup", "49")], training=True).adapt.warmup == 49
    assert read_config(adapted).adapt.warmup == 50  # nothing is trained


def test_broken_files_are_named(tmp_path):
    for text, message in (("a: [1", "is no valid YAML"), ("- 1\n", "holds a list; a mapping with run, data")):
        path = tmp_path / "broken.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_config(path)


def test_the_shipped_quick_start_is_valid():
    config = read_config(find_config("quickstart"), training=True)
    assert len(config.data.targets) == 2 and config.train.baseline


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_unwinds_a_command_as_ctrl_c_does(capsys, monkeypatch, number):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = signal.signal(number, signal.SIG_DFL)
    tidied = []

    @cli.command
    def main(argv):
        try:
            if not (child := os.fork()):  # what a command forks ends at once
                os.kill(os.getpid(), number)
                os._exit(0)
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == number
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            tidied.append(True)

    try:
        assert main([]) == cli.INTERRUPTED
        assert tidied and signal.getsignal(number) is signal.SIG_DFL
        assert capsys.readouterr().err == f"interrupted by {number.name}\n"
    finally:
        signal.signal(number, before)
