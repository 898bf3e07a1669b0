from __future__ import annotations

import json

import numpy as np
import pytest

from cegate.errors import CheckpointError, ConfigError
from cegate.page.reading import read_domain, read_runs


def test_a_finished_run_is_read_from_its_result(make_run):
    folder = make_run()
    (run,) = read_runs([folder])
    result = json.loads((folder / "result.json").read_text())
    assert run.iteration == result["iteration"] == run.reached == 600
    assert run.after == result["after"] and run.before == result["before"]
    assert run.domains == ("source", "arid")
    assert len(run.rounds) == 6 and len(run.sites) == 36 and run.sites[0] == "spatial.0"


def test_an_unfinished_run_is_read_from_its_journal(make_run):
    (run,) = read_runs([make_run(finished=False)])
    assert run.result is None and run.iteration == 600
    assert set(run.after) == set(run.before) == {"source", "arid"}


def test_a_run_that_has_only_begun_is_read(make_run):
    folder = make_run(finished=False, gates=[])
    (folder / "metrics.jsonl").write_text("")
    (folder / "env.json").unlink()
    (run,) = read_runs([folder])
    assert run.iteration is None and run.reached == 0
    assert run.sites == run.domains == () and run.environment == {}


def test_sites_without_scores_come_from_the_choices_and_the_adapter(make_run):
    gates = [{"iteration": 0, "scores": {}, "active": ["spatial.1", "spatial.0"]}]
    folder = make_run(gates=gates, run__method="lora")
    assert read_runs([folder])[0].sites == ("spatial.0", "spatial.1")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"features": [0, 1, 2, 3]}')
    assert read_runs([folder])[0].sites == ("spatial.0", "spatial.1", "spatial.2", "spatial.3")


def test_runs_are_told_apart(make_run, tmp_path):
    folders = [make_run("a/one"), make_run("b/one"), make_run("b/two")]
    assert [run.label for run in read_runs(folders)] == [str(folder) for folder in folders]
    assert [run.label for run in read_runs(folders[1:])] == ["one", "two"]


def test_cells_of_a_matrix_are_titled_by_setting_method_and_seed(make_run):
    places = [("dg/x", "gate", 0), ("dg/x", "lora", 0), ("dg/x", "gate", 1)]
    folders = [
        make_run(f"o/{setting}/{method}/seed_{seed}", run__method=method, run__name="x", seed=seed)
        for setting, method, seed in places
    ]
    titles = ["x / gate / seed 0", "x / lora / seed 0", "x / gate / seed 1"]
    assert [run.label for run in read_runs(folders)] == titles
    assert read_runs(folders[1:2])[0].label == titles[1]


def test_the_same_run_twice_is_refused(make_run):
    folder = make_run()
    with pytest.raises(ConfigError, match="twice; give every run once"):
        read_runs([folder, folder / ".." / folder.name])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", b"{", "result.json cannot be read"),
        ("result.json", b'{"iteration": 3}', "result.json lacks iteration, before or after"),
        ("result.json", b'{"iteration": 3, "before": [], "after": {}}', "result.json holds no scores by domain"),
        ("result.json", b'{"iteration": 3, "before": {}, "after": {"arid": {}}}', "result.json: lacks mIoU; finish or"),
        (
            "result.json",
            b'{"iteration": 3, "before": {"arid": 5}, "after": {}}',
            "result.json: 5 is no record of scores",
        ),
        (
            "result.json",
            b'{"iteration": 3, "before": {}, "after": {"arid": {"mIoU": null, "per_class": {"a": {}}}}}',
            "result.json: per_class.a.IoU='' is not accepted",
        ),
        ("env.json", b"no", "env.json cannot be read"),
        ("config.yaml", None, "is no run folder"),
    ],
)
def test_a_damaged_run_is_one_line(make_run, name, content, message):
    folder = make_run()
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_runs([folder])
    assert "\n" not in str(caught.value)


def test_files_of_a_domain(make_run):
    (run,) = read_runs([make_run(tiles=5)])
    files = read_domain(run, "arid")
    assert files.tile_names == tuple(f"arid/{index:05d}" for index in range(5))
    assert np.array_equal(files.tile_confusion.sum(axis=0), files.confusion)
    assert read_domain(run, "elsewhere").confusion is None


def test_scores_of_a_domain_that_lack_their_numbers_are_named(make_run):
    folder = make_run()
    (folder / "eval/arid/metrics.json").write_text("{}")
    (run,) = read_runs([folder])
    with pytest.raises(CheckpointError, match=r"arid/metrics\.json: lacks mIoU; finish or evaluate the run again"):
        read_domain(run, "arid")


@pytest.mark.parametrize("name", ["tiles.npz", "confusion.npy"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x93NUMPY"])
def test_a_damaged_array_is_named(make_run, name, content):
    folder = make_run()
    (folder / "eval" / "arid" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read .*evaluate the run again"):
        read_domain(read_runs([folder])[0], "arid")


def test_counts_of_other_classes_are_refused(make_run):
    folder = make_run()
    np.save(folder / "eval" / "arid" / "confusion.npy", np.zeros((3, 3), np.int64))
    with pytest.raises(CheckpointError, match=r"counts \[3, 3\], but the run's 5 classes need \[5, 5\]"):
        read_domain(read_runs([folder])[0], "arid")
