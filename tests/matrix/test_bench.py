from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

import cegate
from cegate import bench, cli
from cegate.backbone.vit import build_vit, weight_hash
from cegate.configfile import to_yaml
from cegate.matrix import runner
from cegate.matrix.cells import WEIGHTS, configure, name_settings, plan_cells, read_configs, with_rates
from cegate.runfolder import write_json, write_text

from .conftest import draw_tiles

TINY = {
    "data": {
        "classes": ["background", "building", "forest", "road", "water"],
        "source": {"kind": "generated", "split": "temperate", "limit": 4, "tile": 48},
        "targets": {
            "arid": {"kind": "generated", "split": "arid", "limit": 3, "tile": 40},
            "boreal": {"kind": "generated", "split": "boreal", "limit": 2, "tile": 32},
        },
        "crop": 32,
        "batch_size": 2,
        "workers": 0,
    },
    "model": {"weights": "none"},
    "toolbox": {"spatial": {"rank": 2}, "semantic": {"width": 4}, "frequency": {"width": 2}},
    "gate": {"k": 5, "interval": 3, "samples": 3},
    "train": {"iterations": 12, "lr": 1e-2, "eval_every": 12, "log_every": 4, "checkpoint_every": 6},
}
WITHOUT_PICTURES = (
    "import sys; from cegate.engine import trainer; trainer.draw_run = lambda *_, **__: None\n"
    "from cegate import train; sys.exit(train.main(sys.argv[1:]))"
)
TIMES = ("step_seconds", "score_seconds", "peak_memory_bytes")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def rows_without_times(path: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_a_matrix_of_real_trainings_does_not_depend_on_jobs(tiny, tmp_path, monkeypatch, capsys):
    command = ["--settings", str(tiny), "--methods", "frozen", "gate", "--seeds", "3", "--devices", "cpu"]
    command += ["--train.lr", "2e-2"]
    assert bench.main([*command, "--output", str(tmp_path / "two"), "--jobs", "2"]) == cli.GOOD
    out, err = capsys.readouterr()
    assert "## tiny" in out and "2 of 2 done" in err
    for file in ("table.md", "table.tex", "figure.png", "tiny/gate/seed_3/eval/arid/tiles.npz"):
        assert (tmp_path / "two" / file).is_file(), file
    rows = rows_without_times(tmp_path / "two/table.csv")
    assert [(row["method"], row["domain"]) for row in rows] == [
        (method, domain) for method in ("gate", "frozen") for domain in ("arid", "boreal")
    ]
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, "-c", WITHOUT_PICTURES))
    command.remove("frozen")  # the other one is enough
    assert bench.main([*command, "--output", str(tmp_path / "one"), "--jobs", "1"]) == cli.GOOD
    assert rows[:2] == rows_without_times(tmp_path / "one/table.csv")
    assert rows[0]["score"] != rows[2]["score"] and rows[2]["trained_parameters"] == "0"

    for file in [path for path in (tmp_path / "one/tiny").rglob("*") if path.is_file()]:
        if file.name not in ("config.yaml", "env.json", "result.json", "tiles.npz"):
            file.unlink()
    monkeypatch.setattr(runner, "PROGRAM", ("false",))
    assert bench.main([*command, "--output", str(tmp_path / "one"), "--jobs", "1"]) == cli.GOOD
    assert rows[:2] == rows_without_times(tmp_path / "one/table.csv")


def refused(capsys, *argv: str, code: int = cli.USAGE) -> str:
    assert bench.main(argv) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--settings", "TINY", "--methods", "gate"], "--output is missing"),
        (["--output", "o", "--methods", "gate"], "--settings is missing"),
        (["--output", "o", "--settings", "TINY"], "--methods is missing"),
        (
            ["--output", "o", "--settings", "TINY", "--methods", "loro"],
            "unknown method 'loro'; methods are gate, random",
        ),
        (["--output", "o", "--settings", "dg/p_i2", "--methods", "gate"], "did you mean 'dg/p_i2v'"),
        (["--output", "o", "--settings", "TINY", "--methods", "gate", "--seeds", "x"], "--seeds x is not accepted"),
        (
            ["--output", "o", "--settings", "TINY", "--methods", "gate", "--run.seed", "1"],
            "--run.seed is not for the command line here; cegate bench sets it for every cell",
        ),
        (["--output", "o", "--settings", "TINY", "--methods", "gate", "--gate.kk", "1"], "did you mean 'gate.k'?"),
        (
            ["--output", "o", "--settings", "TINY", "--methods", "gate", "lora", "--toolbox.kinds", "[spatial]"],
            "tiny with gate: run.method=gate means toolbox.kinds=[spatial, semantic, frequency], but it is",
        ),
        (["--output", "o", "--settings", "TINY", "--methods", "gate", "--data.targets", "{}"], "nothing to test on"),
        (
            ["--output", "o", "--settings", "quickstart", "--methods", "gate", "--data.targets", "{}"],
            "quickstart: there is nothing to test on; give data.targets",
        ),
        (["--output", "o", "--settings", "TINY", "--methods", "gate", "--devices", "gpu"], "--devices gpu is unknown"),
        (
            ["--output", "o", "--settings", "TINY", "--methods", "gate", "--devices", "cuda:0", "--jobs", "2"],
            "--jobs is for the CPU alone; name a device twice",
        ),
        (["--output", "o", "--tables_only", "--dry_run"], "exclude each other"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_usage_is_one_line(capsys, tiny, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *[str(tiny) if word == "TINY" else word for word in argv])
    assert not (tmp_path / "o").exists()


def test_missing_roots_of_all_settings_are_named_at_once(capsys, tmp_path):
    settings = ["dg/casid_sub2tem", "dg/casid_sub", "dg/p_i2v"]
    argv = ["--settings", *settings, "--methods", "gate", "lora", "--output", str(tmp_path / "o")]
    line = refused(capsys, *argv, "--data.roots.potsdam", "/potsdam")
    assert "--data.roots.casid DIR for dg/casid_sub2tem, dg/casid_sub; --data.roots.vaihingen DIR for dg/p_i2v" in line
    assert "potsdam" not in line


def test_two_files_of_one_name_are_refused(capsys, tiny, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tiny.yaml").write_text(tiny.read_text())
    argv = ["--settings", str(tiny), str(tmp_path / "other/tiny.yaml"), "--methods", "gate", "--output", "o"]
    assert "would share the folder tiny; rename one file" in refused(capsys, *argv)


def test_dry_run_lists_the_cells_and_writes_nothing(capsys, tiny, tmp_path):
    output = tmp_path / "o"
    argv = ["--settings", str(tiny), "--methods", "gate", "lora", "gate", "--seeds", "0", "1", "0"]
    assert bench.main([*argv, "--output", str(output), "--dry_run"]) == cli.GOOD
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["new", "tiny", method, "seed", str(seed)] for seed in (0, 1) for method in ("gate", "lora")
    ]
    assert not output.exists()


def test_runs_of_another_configuration_are_not_mixed_in(capsys, tiny, tmp_path):
    output = tmp_path / "o"
    argv = ["--settings", str(tiny), "--methods", "gate", "--seeds", "0", "--output", str(output), "--dry_run"]
    settings, configs = read_tiny(tiny)
    (cell,) = plan_cells(settings, ["gate"], [0], output)
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(to_yaml(configure(cell, configs["tiny", "gate"])))
    assert bench.main(argv) == cli.GOOD
    assert capsys.readouterr().out.split() == ["unfinished", "tiny", "gate", "seed", "0"]
    line = refused(capsys, *argv, "--train.lr", "3e-4", "--gate.k", "4")
    assert "seed_0 holds a run with other values of gate.k, train.lr; give the values they were run with" in line
    (cell.folder / "result.json").write_text("{}")
    assert bench.main(argv) == cli.GOOD
    assert capsys.readouterr().out.startswith("done")


def test_a_moved_weight_file_does_not_make_another_cell(capsys, tiny, tmp_path):
    shipped = Path(cegate.__file__).parent / "weights" / "tiny.safetensors"
    old, moved, other = (tmp_path / name / "vit.safetensors" for name in ("old", "moved", "other"))
    for path in (old, moved, other):
        path.parent.mkdir()
        path.write_bytes(shipped.read_bytes())
    weights = load_file(other)
    save_file({**weights, "pos_embed": weights["pos_embed"] + 1}, other)
    output = tmp_path / "o"
    settings = name_settings([str(tiny)])
    configs = read_configs(settings, ["gate"], [(WEIGHTS, str(old))])
    (cell,) = plan_cells(settings, ["gate"], [0], output)
    write_text(cell.folder / "config.yaml", to_yaml(configure(cell, configs["tiny", "gate"])))
    digest = weight_hash(build_vit("tiny", weights=str(old), image_size=32))
    write_json(cell.folder / "env.json", {"backbone_sha256": digest})
    write_json(cell.folder / "result.json", {})
    argv = ["--settings", str(tiny), "--methods", "gate", "--seeds", "0", "--output", str(output), "--dry_run"]
    old.unlink()
    assert bench.main([*argv, f"--{WEIGHTS}", str(moved)]) == cli.GOOD
    assert capsys.readouterr().out.startswith("done")
    assert "with other values of model.weights" in refused(capsys, *argv, f"--{WEIGHTS}", str(other))
    (cell.folder / "result.json").unlink()  # a run that goes on keeps its place
    assert "with other values of model.weights" in refused(capsys, *argv, f"--{WEIGHTS}", str(moved))


def read_tiny(tiny: Path):
    settings = name_settings([str(tiny)])
    return settings, read_configs(settings, ["gate"], [])


def test_tables_only_needs_nothing_but_the_folder(capsys, write_cell, tmp_path):
    for method in ("gate", "lora"):
        write_cell("x", method, 0, {"north": draw_tiles(0.8, seed=len(method))})
    assert bench.main(["--tables_only", "--output", str(tmp_path)]) == cli.GOOD
    out = capsys.readouterr().out
    assert "## x" in out and str(tmp_path / "table.csv") in out


def test_the_table_of_every_setting_is_shown(capsys, write_cell, tmp_path):
    for setting in ("a", "b", "c"):
        for method in ("gate", "lora"):
            write_cell(setting, method, 0, {"north": draw_tiles(0.8, seed=len(method))})
    assert bench.main(["--tables_only", "--output", str(tmp_path)]) == cli.GOOD
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith("## ")]
    assert titles == ["## All settings: 3 settings", "## a", "## b", "## c"]
    assert "## a: difference to gate" in (tmp_path / "table.md").read_text()


def test_a_cell_that_cannot_be_read_makes_the_exit_code_1(capsys, write_cell, tmp_path):
    _, bad = (write_cell("x", "gate", seed, {"north": draw_tiles(0.8)}) for seed in (0, 1))
    (bad.folder / "result.json").write_text("{}")
    assert bench.main(["--tables_only", "--output", str(tmp_path)]) == cli.FAILED
    assert "x gate seed 1 is left out" in capsys.readouterr().out


def test_cells_without_a_target_leave_the_tables_of_others(capsys, write_cell, tmp_path):
    write_cell("a", "gate", 0, {"source": draw_tiles(0.8, domain="source")})
    write_cell("x", "gate", 0, {"north": draw_tiles(0.8)})
    assert bench.main(["--tables_only", "--output", str(tmp_path)]) == cli.FAILED
    out = capsys.readouterr().out
    assert "## x" in out and "a gate seed 0 is left out" in out and "holds no target domain to compare" in out


def test_threads_of_a_process_do_not_depend_on_jobs():
    options = {"devices": ["cpu"], "jobs": None, "threads": None}
    slots, threads = bench._slots(options)
    assert threads == 1 and set(slots) == {"cpu"}
    assert bench._slots({**options, "jobs": "3"}) == (["cpu"] * 3, 1)
    assert bench._slots({**options, "jobs": "2", "threads": "4"}) == (["cpu"] * 2, 4)
    slots, threads = bench._slots({**options, "devices": ["cuda:0", "cuda:0"]})
    assert slots == ["cuda:0", "cuda:0"] and threads >= 1


def test_help_lists_settings_and_methods(capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == cli.GOOD and "dg/casid_sub2tem" in text and "earth_adapter" in text


def test_rates_are_an_axis(tiny, tmp_path, capsys):
    command = ["--settings", str(tiny), "--methods", "gate", "--seeds", "0", "--output", str(tmp_path / "m")]
    assert bench.main([*command, "--lrs", "0.0001", "1e-4", "3e-3", "--dry_run"]) == cli.GOOD
    assert capsys.readouterr().out.split("\n")[:2] == [
        f"new         tiny/lr_{rate} gate seed 0" for rate in ("1e-4", "3e-3")
    ]
    settings = with_rates(name_settings([str(tiny)]), ["1e-4", "3e-3"])
    configs = read_configs(settings, ["gate"], [])
    assert [config.train.lr for config in configs.values()] == [1e-4, 3e-3]
    running = runner.Runner(settings, configs, [], slots=["cpu"], threads=1, display=None)
    (cell,) = plan_cells(settings[1:], ["gate"], [0], tmp_path)
    assert "--train.lr=3e-3" in running._command(cell, "cpu")
    assert bench.main([*command, "--lrs", "fast"]) == cli.USAGE
    assert "--lrs fast is no learning rate" in capsys.readouterr().err
    assert bench.main([*command, "--lrs", "1e-4", "--train.lr", "1e-3"]) == cli.USAGE
    assert "--train.lr is not for the command line here" in capsys.readouterr().err
