from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import cegate.page
from cegate import cli, report
from cegate.backbone.vit import weight_hash
from cegate.checkpoint import State, save_state, trained_weights
from cegate.engine.evaluator import evaluate_run, percent
from cegate.figures import DARK, GREY, RULE, gate_figure, run_charts, svg_uri
from cegate.page.reading import read_runs
from cegate.page.writing import render_page
from cegate.runfolder import RunFolder
from cegate.segmenter import build, starting_plan

VOID = {"meta", "link", "img", "path", "source"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """An HTML text as elements: checks that tags close in order, and keeps attributes, texts and tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> where {self.open[-3:]} are open"

    def handle_data(self, data):
        if self.open[-1:] == ["title"]:
            self.titles.append(data)
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def rows(self, first: str) -> list[str]:
        """Cells of the one row that starts with a text."""
        (row,) = [row for table in self.tables for row in table if row[0].strip() == first and len(row) > 1]
        return [" ".join(cell.split()) for cell in row]


def page_of(*folders: Path, tiles: int = 0) -> tuple[str, Page]:
    runs = read_runs(list(folders))
    text = render_page(runs, runs[0].config, tiles=tiles)
    return text, Page(text)


def score_table(page: Page) -> dict[str, list[str]]:
    return {row[0]: row[1:4] for row in page.tables[0][1:]}


def tile_pictures(page: Page) -> list[dict[str, str | None]]:
    return [image for image in page.all("img") if " of " in image["alt"] and "iterations" not in image["alt"]]


# --- what the page says ---------------------------------------------------------------------------------------------


def test_the_scores_are_those_of_the_result(make_run):
    folder = make_run()
    result = json.loads((folder / "result.json").read_text())
    table = score_table(page_of(folder)[1])
    assert set(table) == {"validation", "arid"}
    for domain, title in (("source", "validation"), ("arid", "arid")):
        before, after = result["before"][domain]["mIoU"], result["after"][domain]["mIoU"]
        assert table[title] == [percent(before), percent(after), f"{100 * (after - before):+.1f}".replace("-", "−")]


def test_the_gate_is_the_picture_of_the_run_folder(make_run, drawn):
    folder = make_run(gates=gates_of({"spatial.0"}, {"semantic.1"}))
    _, page = page_of(folder)
    (run,) = read_runs([folder])
    records = [json.loads(line) for line in (folder / "gates.jsonl").read_text().splitlines()]
    shown = {"end": 600, "marker": 600, "measure": "share of the kind's Fisher mass"}
    (wide,) = [image["src"] for image in page.all("img") if "and when it was on" in image["alt"]]
    assert wide == svg_uri(gate_figure(records, run.sites, **shown))
    assert page.all("source")[0]["srcset"] == svg_uri(gate_figure(records, run.sites, columns=1, **shown))


def test_pictures_come_before_numbers_and_numbers_before_the_gate(model_run):
    ids = [attrs["id"] for _, attrs in page_of(model_run, tiles=1)[1].elements if "id" in attrs]
    assert ids[:2] == ["pictures", "scores"]
    assert [link["href"] for link in page_of(model_run, tiles=1)[1].all("a")] == [f"#{name}" for name in ids]


def test_a_binary_task_is_led_by_the_iou_of_its_foreground(make_run):
    folder = make_run(data__classes="[background, road]")
    result = json.loads((folder / "result.json").read_text())["after"]["arid"]
    _, page = page_of(folder, tiles=1)
    assert "IoU of road, %" in page.text
    row = next(row for row in page.tables[0] if row[0].startswith("arid"))
    assert row[2] == percent(result["per_class"]["road"]["IoU"])
    assert row[0] == f"aridmIoU {percent(result['mIoU'])}"
    assert "IoU of road" in page.text.partition("Confusion")[2]


def test_the_mass_table_holds_the_shares_of_the_last_round_and_their_mean(make_run):
    folder = make_run()
    lines = [json.loads(line)["mass"] for line in (folder / "gates.jsonl").read_text().splitlines()]
    shares = [sum(v for site, v in mass.items() if site.startswith("spatial")) / sum(mass.values()) for mass in lines]
    (row,) = [row for table in page_of(folder)[1].tables for row in table if row[0] == "spatial" and len(row) == 14]
    assert row[-1] == f"{100 * np.mean(shares):.0f}{100 * shares[-1]:.0f}"


def test_the_confusion_is_normalised_by_the_truth_and_names_absent_classes(make_run):
    folder = make_run(absent=3)
    counts = np.load(folder / "eval" / "arid" / "confusion.npy")
    _, page = page_of(folder)
    cells = [attrs.get("title") for attrs in page.all("td")]
    assert f"building taken for forest: {counts[1, 2]:,} of {counts[1].sum():,} pixels" in cells
    assert "no pixel is road" in cells
    assert "Absent, neither in truth nor predicted: road." in page.text
    assert "without road: absent" in page.text


def test_a_class_that_is_only_predicted_is_told_from_an_absent_one(make_run):
    folder = make_run()
    counts = np.load(folder / "eval" / "arid" / "confusion.npy")
    counts[3] = 0
    np.save(folder / "eval" / "arid" / "confusion.npy", counts)
    assert "Predicted, but not in the truth: road." in page_of(folder)[1].text


def test_settings_and_versions_are_there(make_run):
    folder = make_run()
    _, page = page_of(folder)
    assert (folder / "config.yaml").read_text() in page.text
    assert page.rows("versions")[1] == "cegate 0.1.0, torch 2.15.0"
    assert page.rows("trained on")[1:] == ["generated scenes of the climate temperate", "4", "0123456789ab"]


def test_sets_are_told_by_place_and_adaptation_is_said(make_run):
    source = "{kind: folder, root: /data/roads/epfl, images: 'part 1/*.tif'}"
    target = "{kind: prepared, root: /data/vaihingen, split: train}"
    folder = make_run(data__source=source, data__unlabelled=target, adapt__method="dacs")
    line = {"iteration": 600, "split": "train", "stage": "after", "domain": "source", "loss": 0.5, "mixed": 0.125}
    with (folder / "metrics.jsonl").open("a") as journal:
        journal.write(json.dumps(line) + "\n")
    _, page = page_of(folder)
    assert "Trained on epfl; adapted without labels to vaihingen train, tested on arid." in page.text
    assert page.rows("trained on")[1] == "/data/roads/epfl/part 1/*.tif"
    assert page.rows("adapted to, without labels")[1] == "/data/vaihingen/train"
    assert [curve.name for curve in run_charts(read_runs([folder])[0].metrics)[0].curves if curve.points][
        -1
    ] == "mixed images"


def test_equal_runs_give_equal_pages(make_run, drawn):
    folder = make_run(gates=gates_of({"spatial.0"}, {"semantic.1"}))
    assert page_of(folder)[0] == page_of(folder)[0]


# --- several runs ---------------------------------------------------------------------------------------------------


def gates_of(*choices: set[str]) -> list[dict]:
    sites = [f"{kind}.{layer}" for kind in ("spatial", "semantic") for layer in range(2)]
    scores = dict.fromkeys(sites, 0.5)
    return [{"iteration": 100 * n, "scores": scores, "active": sorted(choice)} for n, choice in enumerate(choices)]


def test_several_runs_are_averaged(make_run):
    folders = [make_run(f"seed{seed}", seed=seed) for seed in range(3)]
    _, page = page_of(*folders)
    miou = [json.loads((folder / "result.json").read_text())["after"]["arid"]["mIoU"] for folder in folders]
    assert page.rows("mean")[2].startswith(percent(float(np.mean(miou))))
    assert page.rows("standard deviation")[2].startswith(percent(float(np.std(miou, ddof=1))))
    assert page.rows("lowest to highest")[2] == f"{percent(min(miou))} to {percent(max(miou))}"
    assert "over 3 runs of equal settings" in page.text


def test_choices_of_several_runs_are_compared(make_run):
    one = make_run("one", gates=gates_of({"spatial.0", "spatial.1"}, {"spatial.1", "semantic.0"}))
    two = make_run("two", gates=gates_of({"spatial.0", "spatial.1"}, {"spatial.1", "semantic.1"}), seed=1)
    _, page = page_of(one, two)
    by_corner = {table[0][0] + str(len(table[0])): table for table in page.tables}
    assert by_corner["run5"][1] == ["one", "2", "0.33", "0.33", "0.39"]
    matrices = [table for table in page.tables if table[0] == ["run", "one", "two"]]
    assert [table[1] for table in matrices] == [["one", "1.00", "0.33"], ["one", "1.00", "0.67"]]
    assert ["spatial", "500/2", "1002/2"] in [row for table in page.tables for row in table]


def test_runs_of_other_settings_are_listed_and_not_averaged(make_run):
    one, other = make_run("one"), make_run("other", gate__k=7)
    _, page = page_of(one, other)
    assert "other differs from one in gate.k, so it is listed and not averaged." in page.text
    assert "of equal settings" not in page.text


def test_an_unfinished_run_is_not_averaged(make_run):
    folders = [make_run("one"), make_run("two", seed=1), make_run("three", seed=2, finished=False)]
    _, page = page_of(*folders)
    assert "over 2 runs of equal settings" in page.text
    assert "three has no result.json, so it is not averaged." in page.text


# --- runs that lack something ---------------------------------------------------------------------------------------


NO_SITES = [{"iteration": 0, "scores": {}, "active": []}]
ALL_SPATIAL = [{"iteration": 0, "scores": {}, "active": ["spatial.0", "spatial.1"]}]


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({"gates": NO_SITES, "run__method": "frozen"}, "no sites, the head alone learns", "What the gate chose"),
        ({"gates": [], "run__method": "rein"}, "tokens of rank", "What the gate chose"),
        ({"gates": ALL_SPATIAL, "run__method": "lora"}, "The choice was made once", "Fisher mass"),
        ({"before": False}, "generated scenes", "frozen"),
        ({"data__targets": "{}"}, "tested on no other domain", "arid"),
        ({"data__targets": "{}", "data__validation": "null"}, "Nothing was measured", "Confusion"),
        ({"finished": False}, "The run has no result.json", "Peak memory"),
        ({"run__method": "full", "gates": NO_SITES}, "full: the whole backbone learns", "How stable"),
    ],
)
def test_what_a_run_lacks_is_left_out(make_run, changes, said, unsaid):
    _, page = page_of(make_run(**changes))
    shown = page.text.partition("Settings")[0] + page.text.partition("Settings")[2].partition("Settings")[0]
    assert said in shown
    assert unsaid not in shown


def test_a_run_that_has_only_begun_has_a_page(make_run):
    folder = make_run(finished=False, gates=[])
    for name in ("metrics.jsonl", "env.json"):
        (folder / name).unlink()
    _, page = page_of(folder)
    assert "none measured yet" in page.text and "Curves" not in page.text


def test_scores_stand_in_for_masses_that_were_not_recorded(make_run):
    _, page = page_of(make_run(gates=gates_of({"spatial.0"}, {"spatial.0"})))
    assert "This run recorded no Fisher mass before normalisation" in page.text
    assert ["spatial", "0.50.5", "0.50.5", "11"] in [row for table in page.tables for row in table]


@pytest.mark.parametrize(
    ("lost", "said"),
    [("tiles.npz", "There is no "), ("confusion.npy", "There is no ")],
)
def test_files_of_an_older_version_are_asked_for(make_run, lost, said):
    folder = make_run()
    (folder / "eval" / "arid" / lost).unlink()
    _, page = page_of(folder, tiles=1)
    path = folder / "eval" / "arid" / lost
    again = f"cegate evaluate --run {folder} --output {folder / 'eval'} --overwrite"
    assert f"{said}{path}; evaluate again with this version: {again}" in page.text


def test_a_damaged_file_of_a_domain_is_named_in_the_page(make_run):
    folder = make_run()
    (folder / "eval" / "arid" / "tiles.npz").write_bytes(b"torn")
    assert f"{folder / 'eval' / 'arid' / 'tiles.npz'} cannot be read" in page_of(folder, tiles=1)[1].text


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_run(make_run) -> Path:
    """A run with a model that was never trained, and with its true evaluation."""
    folder = make_run("model", before=False, gates=NO_SITES, run__method="frozen")
    run = RunFolder(folder)
    config = run.config()
    segmenter = build(config)
    segmenter.toolbox.apply(starting_plan(config, segmenter.toolbox))
    state = State("after", 600, trained_weights(segmenter), [], [], [])
    state.backbone_sha256, state.classes = weight_hash(segmenter.vit), list(segmenter.classes)
    save_state(run.checkpoints / "best.pt", state)
    evaluate_run(run, config, output=run.eval, overwrite=True)
    return folder


def test_tiles_are_pictured_by_the_best_checkpoint(model_run):
    _, page = page_of(model_run, tiles=1)
    assert Counter(image["alt"].rpartition(" of ")[0] for image in tile_pictures(page)) == {
        "Image": 4,
        "True classes": 4,
        "Predicted classes": 4,
        "Confidence of the prediction": 4,
    }
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert "Recomputed" not in page.text and "No pictures" not in page.text


def test_pictures_that_are_not_those_of_the_evaluation_say_so(model_run):
    file = model_run / "eval" / "arid" / "tiles.npz"
    with np.load(file) as found:
        names, counts = found["names"], found["confusion"]
    np.savez(file, names=names, confusion=counts[:, ::-1])
    _, page = page_of(model_run, tiles=1)
    assert page.text.count("of the pixels are counted otherwise than by the evaluation") == 2


def test_the_page_says_what_its_measures_mean(make_run):
    _, page = page_of(make_run(), tiles=0)
    assert page.text.count("The Jaccard index of two choices is the share of") == 1
    assert page.text.count("The Fisher mass of a site: squared gradients") == 1


def test_a_missing_checkpoint_takes_the_place_of_the_pictures(make_run):
    folder = make_run()
    _, page = page_of(folder, tiles=2)
    assert f"No pictures: there is no checkpoint {folder / 'checkpoints'}" in page.text
    assert not tile_pictures(page) and page.text.count(" · tile ") == 8
    top = page.text.partition("Settings")[2].partition("Scores")[0]
    assert "not labelled" not in top and "confidence" not in top


def test_missing_data_takes_the_place_of_the_pictures(model_run, tmp_path):
    (run,) = read_runs([model_run])
    config = run.config
    config.data.targets["arid"] = type(config.data.source)(kind="folder", root=str(tmp_path / "gone"))
    page = Page(render_page([run], config, tiles=1))
    assert f"No pictures: set 'arid': root {tmp_path / 'gone'} is not a folder" in page.text
    assert len(tile_pictures(page)) == 8


def test_a_tile_that_is_not_in_the_data_is_named(model_run):
    file = model_run / "eval" / "arid" / "tiles.npz"
    with np.load(file) as found:
        counts = found["confusion"]
    np.savez(file, names=[f"other/{index}" for index in range(len(counts))], confusion=counts)
    assert "the set 'arid' has no tile other/" in page_of(model_run, tiles=1)[1].text


# --- one file, escaped, for everybody -------------------------------------------------------------------------------


def test_the_page_loads_nothing(model_run, drawn):
    text, page = page_of(model_run, tiles=1)
    assert not page.all("script") and not page.all("iframe") and not page.all("object")
    for tag, attrs in page.elements:
        for name in ("src", "href", "srcset", "data", "xlink:href", "action", "poster"):
            value = attrs.get(name) or ""
            assert not value or value.startswith(("#", "data:")), (tag, name, value)
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert "http://" not in text and "https://" not in text


def test_names_are_escaped(make_run):
    nasty = "<script>alert(1)</script>"
    classes = f"['{nasty}', 'b & c', '\"d', e, f]"
    folder = make_run("a<i>&amp;", data__classes=classes, run__name="plain", gates=gates_of({"spatial.0"}))
    text, page = page_of(folder, make_run("second <u>", run__name="plain"), tiles=1)
    assert not {"script", "i", "u"} & {tag for tag, _ in page.elements if tag != "i" or "class" not in _}
    assert nasty in page.text and "b & c" in page.text and "a<i>&amp;" in page.text
    assert any((attrs.get("title") or "").startswith(f"b & c taken for {nasty}: ") for attrs in page.all("td"))
    assert "<script" not in text


def test_headings_labels_and_targets_are_in_order(model_run):
    _, page = page_of(model_run, tiles=1)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in page.all("a")} == set(ids)
    assert all(svg.get("aria-label") or svg.get("aria-hidden") == "true" for svg in page.all("svg"))
    assert page.all("html")[0]["lang"] == "en" and page.all("meta")[1]["name"] == "viewport"


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_and_lines_stand_out(mode):
    style = (Path(cegate.page.__file__).parent / "page.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in blocks[:2])
    colours = light if mode == "light" else {**light, **dark}
    paper, ink = colours["paper"], colours["ink"]
    for name in ("ink", "soft", "up", "down"):
        assert contrast(colours[name], paper) >= 4.5, name
        assert contrast(colours[name], colours["tint"]) >= 4.5, name
    for light, dark in DARK.items():
        least = 1 if light == RULE else 2.5 if light == GREY else 3
        assert contrast(light if mode == "light" else dark, paper) >= least, light
    for level in range(9):
        assert contrast(colours[f"h{level}"], ink if level < 5 else colours["on-deep"]) >= 4.5, level
    ramp = [luminance(colours[f"h{level}"]) for level in range(9)]
    assert ramp == sorted(ramp, reverse=mode == "light")


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome to look at the page with")
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_needs_no_sideways_scrolling(make_run, drawn, tmp_path, width):
    folder = make_run("a_rather_long_name_of_a_run_without_a_single_space_in_it", tiles=2)
    page = tmp_path / "page.html"
    page.write_text(page_of(folder, tiles=1)[0], encoding="utf-8")
    measure = "document.title = 'width ' + frames[0].document.documentElement.scrollWidth"
    frame = tmp_path / "frame.html"
    style = f"width:{width}px;height:900px;border:0"
    frame.write_text(f'<iframe src="page.html" style="{style}" onload="{measure}"></iframe>')
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", frame.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert f"<title>width {width}</title>" in shown


# --- the command ----------------------------------------------------------------------------------------------------


def refused(capsys, *argv: str) -> tuple[int, str]:
    """Run `cegate report`, expect one line on stderr, and return exit code and line."""
    code = report.main(argv)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return code, err


def test_the_command_writes_the_page_into_the_first_run(make_run, capsys):
    one, two = make_run("one"), make_run("two", seed=1)
    assert report.main(["--run", str(one), str(two), "--tiles", "0"]) == cli.GOOD
    assert capsys.readouterr().out.strip() == str(one / "report.html")
    assert "Over runs" in Page((one / "report.html").read_text(encoding="utf-8")).text


def test_an_existing_page_is_only_replaced_if_asked(make_run, tmp_path, capsys):
    page = tmp_path / "page.html"
    page.write_text("mine")
    argv = ["--run", str(make_run()), "--output", str(page), "--tiles", "0"]
    code, line = refused(capsys, *argv)
    assert code == cli.FAILED and "exists; give another --output, or --overwrite to replace it" in line
    assert page.read_text() == "mine"
    assert report.main([*argv, "--overwrite"]) == cli.GOOD
    assert page.read_text() != "mine" and not list(tmp_path.glob(".page*"))


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], cli.USAGE, "--run is missing; give the folder of a run, or of several"),
        (["--run", "{gone}"], cli.FAILED, "is no run folder"),
        (["--run", "{run}", "{run}"], cli.USAGE, "give every run once"),
        (["--run", "{run}", "--tiles", "many"], cli.USAGE, "--tiles many is not accepted; expected a whole number"),
        (["--run", "{run}", "--output", "{gone}/page.txt"], cli.FAILED, "is no .html file; give a name such as"),
        (["--run", "{run}", "--train.lr", "1"], cli.USAGE, "cegate report does not take --train.lr"),
        (["--run", "{run}", "--outptu", "x"], cli.USAGE, "did you mean --output?"),
    ],
)
def test_errors_are_one_line(make_run, tmp_path, capsys, argv, code, message):
    names = {"run": str(make_run()), "gone": str(tmp_path / "gone")}
    found, line = refused(capsys, *(word.format(**names) for word in argv))
    assert found == code and message in line


def test_restored_crops_of_a_run_are_in_its_page(make_run):
    path = make_run()
    config = RunFolder(path).config()
    assert 'id="restored"' not in render_page(read_runs([path]), config, tiles=0)
    (path / "figures").mkdir()
    (path / "figures/restored.png").write_bytes(b"picture")
    page = render_page(read_runs([path]), config, tiles=0)
    assert 'id="restored"' in page and base64.b64encode(b"picture").decode() in page and 'href="#restored"' in page
