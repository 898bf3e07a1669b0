from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from cegate.errors import CheckpointError
from cegate.matrix import published_mfnet, report
from cegate.matrix.cells import find_cells
from cegate.matrix.reading import read_cells
from cegate.matrix.report import write_report
from cegate.matrix.statistics import resample_tiles
from cegate.matrix.summary import Matrix
from cegate.matrix.tables import COLUMNS, make_tables, to_csv, to_markdown
from cegate.metrics import Confusion

from .conftest import CLASSES, draw_tiles

SKILL = {"gate": 0.82, "lora": 0.78, "frozen": 0.6}


@pytest.fixture
def no_picture(monkeypatch):
    """Spare the second that drawing takes."""
    monkeypatch.setattr(report, "draw_differences", lambda matrix, path: False)


def matrix_of(cells) -> Matrix:
    results, problems = read_cells(cells)
    assert not problems
    return Matrix(results)


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def table_under(page: str, title: str) -> dict[str, dict[str, str]]:
    """First column -> column -> text of the table under a title of a Markdown page."""
    lines = [line for line in page.split(f"## {title}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    header, _, *rows = ([text.strip() for text in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


@pytest.mark.usefixtures("no_picture")
def test_a_row_per_cell_and_domain_and_none_twice(write_matrix, tmp_path):
    write_matrix("dg/x", SKILL, ("source", "north", "south"))
    write_report(tmp_path)
    write_report(tmp_path)
    rows = rows_of((tmp_path / "table.csv").read_text())
    keys = [(row["setting"], row["method"], row["seed"], row["domain"]) for row in rows]
    assert len(keys) == len(set(keys)) == 3 * 3 * 3 and tuple(rows[0]) == COLUMNS
    assert {row["tiles"] for row in rows} == {"12"}


@pytest.mark.usefixtures("no_picture")
def test_numbers_are_those_of_the_cells(write_matrix, tmp_path):
    cells = write_matrix("x", SKILL, ("north", "south", "source"))
    page = write_report(tmp_path).files[0].read_text()
    matrix = matrix_of(cells)
    scores = {m: [matrix.results["x", m, s].domains["north"].score for s in range(3)] for m in SKILL}
    row = table_under(page, "x")["lora"]
    half = stats.t.ppf(0.975, 2) * stats.sem(scores["lora"])
    assert row["north"] == f"{100 * np.mean(scores['lora']):.1f} ± {100 * half:.1f}" and row["n"] == "3"
    assert (row["weights (M)"], row["iteration (s)"], row["memory (GiB)"]) == ("3.40", "1.25", "3.00")
    gap = table_under(page, "x: difference to gate")["lora"]
    assert gap["north"].startswith(f"{100 * np.subtract(scores['lora'], scores['gate']).mean():+.2f}".replace("-", "−"))
    assert set(table_under(page, "x: difference to gate")) == {"lora", "frozen"}


def test_an_average_of_domains_is_over_targets_without_the_held_out_source(write_matrix):
    matrix = matrix_of(write_matrix("x", SKILL, ("north", "south", "source")))
    single = [matrix.mean(["x"], "lora", domain).value for domain in ("north", "south")]
    assert matrix.mean(["x"], "lora").value == pytest.approx(np.mean(single))
    gaps = [matrix.difference(["x"], "lora", domain).value for domain in ("north", "south")]
    assert matrix.difference(["x"], "lora").value == pytest.approx(np.mean(gaps))
    assert matrix.validation("x", "lora").value == pytest.approx(matrix.mean(["x"], "lora", "source").value)


@pytest.mark.usefixtures("no_picture")
def test_all_settings_are_averaged_each_counting_once(write_matrix, tmp_path):
    cells = write_matrix("x", SKILL, ("north", "south")) + write_matrix("longer", SKILL, ("west",))
    matrix = matrix_of(cells)
    settings = ["x", "longer"]
    assert matrix.mean(settings, "lora").value == pytest.approx(
        np.mean([matrix.mean([setting], "lora").value for setting in settings])
    )
    assert matrix.difference(settings, "lora").value == pytest.approx(
        np.mean([matrix.difference([setting], "lora").value for setting in settings])
    )
    assert "## All settings: 2 settings" in write_report(tmp_path).files[0].read_text()


def test_settings_that_train_alike_are_one_group(write_cell):
    """Two settings of equal training and one of another: the first two share their seeds."""
    cells = [
        write_cell(setting, method, seed, {domain: draw_tiles(score, domain=domain, seed=seed)})
        for setting, domain in (("ab", "north"), ("cd", "south"), ("longer", "west"))
        for method, score in (("gate", 0.8), ("lora", 0.7))
        for seed in range(2)
    ]
    groups = list(matrix_of(cells)._pairs(["ab", "cd", "longer"], "lora", None))
    assert sorted(group.weight for group in groups) == pytest.approx([1 / 3, 2 / 3])


def test_equal_models_do_not_differ(write_cell):
    cells = [
        write_cell("x", method, seed, {"north": draw_tiles(0.8)}) for method in ("gate", "lora") for seed in (0, 1)
    ]
    gap = matrix_of(cells).difference(["x"], "lora")
    assert (gap.value, gap.low, gap.p, gap.seeds) == (0.0, None, None, 2)


def test_only_seeds_of_both_methods_are_paired(write_cell):
    seeds = {"gate": (0, 1, 2), "lora": (1, 2, 3), "full": (7,)}
    cells = [write_cell("x", m, s, {"north": draw_tiles(0.8, seed=s)}) for m in seeds for s in seeds[m]]
    matrix = matrix_of(cells)
    assert matrix.difference(["x"], "lora").seeds == 2 and matrix.difference(["x"], "full") is None
    assert matrix.mean(["x"], "lora").seeds == 3


@pytest.mark.usefixtures("no_picture")
def test_one_seed_says_so(write_matrix, tmp_path):
    write_matrix("x", SKILL, seeds=1)
    page = write_report(tmp_path).files[0].read_text()
    assert re.fullmatch(r"\d\d\.\d", table_under(page, "x")["lora"]["north"])
    assert table_under(page, "x: difference to gate")["lora"]["north"].endswith("tiles only")


@pytest.mark.usefixtures("no_picture")
def test_a_binary_task_shows_both_figures(write_cell, tmp_path):
    for method, score in SKILL.items():
        write_cell("x", method, 0, {"north": draw_tiles(score, classes=2)}, classes=("background", "road"))
    page = write_report(tmp_path).files[0].read_text()
    row = rows_of((tmp_path / "table.csv").read_text())[0]
    assert row["headline"] == "foreground_IoU" and row["score"] == row["foreground_IoU"] != row["mIoU"]
    expected = f"{100 * float(row['foreground_IoU']):.1f} ({100 * float(row['mIoU']):.1f})"
    assert table_under(page, "x")["gate"]["north"] == expected and "foreground IoU (two-class mean)" in page


@pytest.mark.usefixtures("no_picture")
def test_the_papers_numbers_stand_beside_ours(write_matrix, tmp_path):
    for target in ("tem", "tms", "trf"):
        write_matrix(f"dg/casid_sub2{target}", SKILL, (target,), seeds=2)
    written = write_report(tmp_path)
    page = written.files[0].read_text()
    paper = "paper, DINOv2-L"
    assert table_under(page, "dg/casid_sub2tem")["gate"][paper] == "50.1"
    assert table_under(page, "dg/casid_sub2tem")["lora"][paper] == "–"
    assert table_under(page, "CASID Sub: 3 settings")["lora"][paper] == "57.2"
    assert "All settings" not in page  # they are the group
    assert "rein and crossearth are of arXiv:2410.22629" in page


@pytest.mark.usefixtures("no_picture")
def test_without_published_numbers_nothing_is_said_of_the_paper(write_matrix, tmp_path):
    write_matrix("x", SKILL, seeds=1)
    assert "paper" not in "".join(path.read_text() for path in write_report(tmp_path).files if path.suffix != ".png")


@pytest.mark.usefixtures("no_picture")
def test_latex_is_escaped_and_of_booktabs(write_matrix, tmp_path):
    write_matrix("a_b", {"gate": 0.8, "earth_adapter": 0.7}, seeds=2)
    text = next(path for path in write_report(tmp_path).files if path.suffix == ".tex").read_text()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.count(r"\toprule") == body.count(r"\bottomrule") == 2
    assert r"earth\_adapter &" in body and r"$\pm$" in body and "$-$" in body
    assert not re.search(r"(?<!\\)[_%#]|[±−–]", body)
    for line in body.splitlines():
        if line.rstrip().endswith(r"\\"):
            assert line.count("&") in (5, 3)


@pytest.mark.usefixtures("no_picture")
def test_tables_are_the_same_every_time(write_matrix, tmp_path):
    write_matrix("x", SKILL, ("north", "south"))
    first = [path.read_bytes() for path in write_report(tmp_path).files]
    assert [path.read_bytes() for path in write_report(tmp_path).files] == first


@pytest.mark.usefixtures("no_picture")
def test_what_is_missing_is_noted(write_matrix, write_cell, tmp_path):
    cells = write_matrix("x", SKILL, seeds=2)
    (cells[1].folder / "result.json").unlink()
    cells[2].error.write_text("no\n")  # a cell that has finished since
    (tmp_path / "x/full").mkdir()
    (tmp_path / "x/full/seed_0.error").write_text("out of memory\n")
    written = write_report(tmp_path)
    assert written.notes == [
        "x full seed 0 failed: out of memory (log: x/full/seed_0.log)",
        "Not finished: x gate seed 1.",
    ]
    assert "* x full seed 0 failed: out of memory" in written.files[0].read_text()


def test_without_gate_there_are_scores_and_no_differences(write_matrix, tmp_path):
    write_matrix("x", {"lora": 0.7, "full": 0.6})
    written = write_report(tmp_path)
    assert written.notes == ["There is no finished cell of gate, so there are no differences."]
    assert [table.title for table in written.tables] == ["x"] and not (tmp_path / "figure.png").exists()


def test_the_picture_is_written(write_matrix, tmp_path):
    write_matrix("x", SKILL, ("north", "south"))
    write_matrix("longer", SKILL, ("west",), seeds=1)
    written = write_report(tmp_path)
    assert written.files[-1].name == "figure.png" and written.files[-1].stat().st_size > 10_000


def test_the_legends_of_low_panels_cover_no_numbers(write_matrix, tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        drawn.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    for setting in "xyzuv":
        write_matrix(setting, {"gate": 0.8, "lora": 0.7}, ("north", "south", "east", "west"))
    write_report(tmp_path)
    (figure,) = drawn
    figure.draw_without_rendering()  # places are those of the picture's dpi until then
    panels = [ax for ax in figure.axes if ax.get_legend()]
    assert len(panels) == 5
    for ax in panels:
        numbers = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
        assert numbers and not ax.get_legend().get_window_extent().count_overlaps(numbers)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="holds no finished cell to make tables of"):
        write_report(tmp_path)


def test_cells_are_found_in_order_and_runs_moved_aside_are_not(write_cell, tmp_path):
    tiles = {"north": draw_tiles(0.8)}
    cells = [write_cell(*place, tiles) for place in (("dg/x", "gate", 10), ("dg/x", "gate", 2), ("dg/x", "frozen", 0))]
    cells[0].folder.with_name("seed_10.old-1").mkdir()
    (tmp_path / "gate/seed_0").mkdir(parents=True)
    assert find_cells(tmp_path) == [cells[1], cells[0], cells[2]]
    results, _ = read_cells(cells)
    assert len(rows_of(to_csv(results))) == 3


def test_figures_of_the_other_paper_stand_beside_its_settings(write_cell):
    cells = [
        write_cell("mfnet/potsdam", "mfnet_lora", seed, {"potsdam": draw_tiles(0.7, seed=seed)}) for seed in (0, 1)
    ]
    results, problems = read_cells(cells)
    text = to_markdown(make_tables(Matrix(results)), [])
    assert not problems and "paper, SAM ViT-L" in text and "85.7" in text
    assert published_mfnet.NOTE in text and "DINOv2-L" not in text


def test_scores_are_means_over_the_classes_that_were_asked_for(write_cell):
    cells = [write_cell("north", "gate", 0, {"north": draw_tiles(0.7)})]
    path = cells[0].folder / "result.json"
    result, counts = json.loads(path.read_text()), draw_tiles(0.7)
    result["after"]["north"] |= Confusion(CLASSES, counts.sum(0)).scores(CLASSES[:2]).to_dict()
    path.write_text(json.dumps(result))
    (found,), problems = read_cells(cells)
    assert not problems and found.domains["north"].chosen == [0, 1]
    drawn = resample_tiles(found.domains["north"].names, counts[None], binary=False, chosen=[0, 1])
    assert np.median(drawn) == pytest.approx(found.domains["north"].score, abs=0.03)
    assert not np.allclose(drawn, resample_tiles(found.domains["north"].names, counts[None], binary=False))


@pytest.mark.usefixtures("no_picture")
def test_rates_are_compared_and_the_validation_set_alone_chooses(write_cell, tmp_path):
    for rate, validation, target in (("1e-4", 0.6, 0.7), ("1e-3", 0.8, 0.5)):
        tiles = {"source": draw_tiles(validation, domain="source"), "north": draw_tiles(target)}
        write_cell(f"dg/x/lr_{rate}", "gate", 0, tiles, train__lr=rate)
    report = write_report(tmp_path)
    titles = [table.title for table in report.tables]
    assert titles[0] == "dg/x: learning rates" and not any("All settings" in title for title in titles)
    rows = [dict(zip(report.tables[0].header, row, strict=True)) for row in report.tables[0].rows]
    assert [(row["lr"], row["chosen"]) for row in rows] == [("1e-4", ""), ("1e-3", "best")]
    assert float(rows[0]["targets"].split()[0]) > float(rows[1]["targets"].split()[0])
