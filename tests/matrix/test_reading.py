from __future__ import annotations

import json

import numpy as np
import pytest

from cegate.errors import CheckpointError
from cegate.matrix.reading import changed_settings, read_cell, read_cells

from .conftest import draw_tiles


def test_a_cell_is_read_as_it_was_written(write_cell):
    counts = draw_tiles(0.8)
    result = read_cell(write_cell("dg/x", "gate", 2, {"source": draw_tiles(0.9), "north": counts}))
    north = result.domains["north"]
    assert result.targets == ["north"] and result.cell.seed == 2 and result.device == "cpu"
    assert north.score == north.record["mIoU"] and not north.binary and north.foreground is None
    assert len(north.names) == len(counts) and np.array_equal(north.confusion, counts)


def test_a_binary_task_is_judged_by_its_foreground(write_cell):
    cell = write_cell("x", "gate", 0, {"north": draw_tiles(0.8, classes=2)}, classes=("background", "road"))
    north = read_cell(cell).domains["north"]
    assert north.score == north.foreground == north.record["per_class"]["road"]["IoU"] != north.record["mIoU"]


def test_two_classes_without_background_are_judged_by_their_mean(write_cell):
    cell = write_cell("x", "gate", 0, {"north": draw_tiles(0.8, classes=2)}, classes=("land", "water"))
    assert read_cell(cell).domains["north"].score == read_cell(cell).domains["north"].record["mIoU"]


def damage(cell, how: str) -> None:
    tiles = cell.folder / "eval/north/tiles.npz"
    if how == "missing":
        tiles.unlink()
    elif how == "cut":
        tiles.write_bytes(tiles.read_bytes()[:200])
    elif how == "of another model":
        np.savez(tiles, names=[f"north/{n}" for n in range(12)], confusion=draw_tiles(0.3))
    elif how == "of other classes":
        np.savez(tiles, names=[f"north/{n}" for n in range(12)], confusion=draw_tiles(0.8, classes=2))
    elif how == "no number":
        path = cell.folder / "result.json"
        result = json.loads(path.read_text())
        result["after"]["north"]["mIoU"] = None
        path.write_text(json.dumps(result))
    elif how == "old":
        path = cell.folder / "result.json"
        path.write_text(json.dumps({"after": {}}))
    elif how == "no json":
        (cell.folder / "result.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "tiles.npz cannot be read"),
        ("cut", "tiles.npz cannot be read"),
        ("of another model", "where result.json says"),
        ("of other classes", r"holds counts of shape \[12, 2, 2\] for 12 tiles and 3 classes"),
        ("no number", "domain north has no score"),
        ("old", r"is not what this version writes \(KeyError: 'iteration'\)"),
        ("no json", "result.json cannot be read"),
    ],
)
def test_a_damaged_cell_is_named_and_left_out(write_cell, how, message):
    good, bad = (write_cell("x", "gate", seed, {"north": draw_tiles(0.8)}) for seed in (0, 1))
    damage(bad, how)
    with pytest.raises(CheckpointError, match=message):
        read_cell(bad)
    results, problems = read_cells([good, bad])
    assert [result.cell for result in results] == [good]
    assert len(problems) == 1 and problems[0].startswith("x gate seed 1 is left out: ")


def test_cells_of_other_tiles_are_left_out(write_cell):
    cells = [
        write_cell("x", "gate", 0, {"north": draw_tiles(0.8)}),
        write_cell("x", "lora", 0, {"north": draw_tiles(0.8, tiles=11)}),
        write_cell("x", "full", 0, {"south": draw_tiles(0.8)}),
        write_cell("y", "lora", 0, {"north": draw_tiles(0.8, tiles=11)}),
    ]
    results, problems = read_cells(cells)
    assert [result.cell for result in results] == [cells[0], cells[3]]
    assert "tiles or classes of domain north are not those of x gate seed 0" in problems[0]
    assert "it was tested on south, x gate seed 0 on north" in problems[1]


def test_an_unfinished_cell_is_no_problem(write_cell):
    cell = write_cell("x", "gate", 0, {"north": draw_tiles(0.8)})
    (cell.folder / "result.json").unlink()
    assert read_cells([cell]) == ([], [])


def test_other_values_than_the_method_s_are_noted_once_for_all_settings(write_cell):
    tiles = {"north": draw_tiles(0.8)}
    cells = [
        write_cell("x", "gate", 0, tiles),
        write_cell("x", "gate", 1, tiles, data__workers="0", data__roots="{a: b}"),
        write_cell("x", "lora", 0, tiles, train__lr="3e-4"),
        write_cell("y", "gate", 0, tiles),
        write_cell("y", "gate", 1, tiles, train__iterations="7"),
        write_cell("y", "lora", 0, tiles, train__lr="3e-4"),
        write_cell("y", "lora", 1, tiles, train__lr="3e-4"),
        write_cell("z", "gate", 0, tiles),
        write_cell("z", "lora", 0, tiles),
        write_cell("z", "lora", 1, tiles, train__lr="3e-4"),
    ]
    results, _ = read_cells(cells)
    lr = results[0].config.train.lr
    iterations = results[0].config.train.iterations
    assert changed_settings(results) == [
        f"lora differs from gate seed 0 in train.lr (0.0003, not {lr}): x, y, z (seed 1).",
        f"gate differs from gate seed 0 in train.iterations (7, not {iterations}): y (seed 1).",
    ]


def test_a_moved_weight_file_is_no_change_where_the_backbone_is_the_same(write_cell):
    cells = [
        write_cell("x", "gate", 0, {"north": draw_tiles(0.8)}, model__weights="/old/vit.pth"),
        write_cell("x", "gate", 1, {"north": draw_tiles(0.8)}, model__weights="/new/vit.pth"),
    ]
    results, _ = read_cells(cells)
    assert "model.weights" in changed_settings(results)[0]  # nothing tells what was in them
    for cell in cells:
        (cell.folder / "env.json").write_text(json.dumps({"gpu": None, "backbone_sha256": "ab"}))
    assert changed_settings(read_cells(cells)[0]) == []
