from __future__ import annotations

import base64
import xml.dom.minidom

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cegate import sites as sites_module
from cegate.data.sets import Item
from cegate.figures import (
    DARK,
    HOLE,
    chart_figure,
    draw_curves,
    draw_gate,
    draw_images,
    draw_panels,
    gate_figure,
    headline,
    run_charts,
    site_groups,
    svg_uri,
)
from cegate.palette import BACKGROUND, SAFE, palette_of

PALETTE = ("#E69F00", "#009E73")


def sites_of(layers: int) -> list[str]:
    return [f"{kind}.{layer}" for kind in ("spatial", "semantic", "frequency") for layer in range(layers)]


def colour_share(picture: np.ndarray, colour: str) -> float:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float((np.abs(picture[..., :3] - wanted).max(-1) < 0.02).mean())


ON = "#D55E00"


@pytest.mark.parametrize(("layers", "rounds"), [(6, 1), (12, 40)])
def test_the_heat_map_marks_what_was_chosen(tmp_path, layers, rounds):
    sites, rng = sites_of(layers), np.random.default_rng(0)
    shares = []
    for count in (1, layers):
        scores = [dict(zip(sites, rng.random(len(sites)).tolist(), strict=True)) for _ in range(rounds)]
        records = [{"iteration": 100 * i, "scores": s, "active": sites[:count]} for i, s in enumerate(scores)]
        draw_gate(records, sites, tmp_path / "gate.png")
        shares.append(colour_share(matplotlib.image.imread(tmp_path / "gate.png"), ON))
    assert shares[1] > 3 * shares[0] > 0


def lines_of(ax) -> list[tuple[int, int, int]]:
    """(row, from, to) of every line of a panel."""
    segments = [segment for lines in ax.collections[1:] for segment in lines.get_segments()]
    return [(int(a[1]), int(a[0]), int(b[0])) for a, b in segments]


SITES = ["spatial.0", "spatial.1", "frequency.0"]


@settings(deadline=None, max_examples=12)
@given(st.lists(st.sets(st.sampled_from(SITES)), min_size=1, max_size=12))
def test_the_lines_say_exactly_what_was_on(choices):
    records = [{"iteration": 10 * n, "scores": {}, "active": sorted(choice)} for n, choice in enumerate(choices)]
    figure = gate_figure(records, SITES, end=10 * len(choices))
    drawn = set()
    for ax, members in zip(figure.axes, site_groups(SITES).values(), strict=True):
        for row, start, end in lines_of(ax):
            drawn |= {(members[row], iteration) for iteration in range(start, end, 10)}
    assert drawn == {(site, record["iteration"]) for record in records for site in record["active"]}


def test_the_heat_is_that_of_the_scores_and_the_axis_that_of_the_iterations():
    rng = np.random.default_rng(0)
    records = [
        {"iteration": 50 * n, "scores": dict(zip(SITES, rng.random(3), strict=True)), "active": ["spatial.1"]}
        for n in range(4)
    ]
    spatial, frequency, bar = gate_figure(records, SITES, end=300, marker=150, measure="share").axes
    heat = spatial.collections[0]
    assert np.array_equal(heat.get_array(), [[record["scores"][site] for record in records] for site in SITES[:2]])
    assert heat.get_coordinates()[0, :, 0].tolist() == [0, 50, 100, 150, 300]
    assert spatial.get_title("left") == "spatial" and spatial.get_title("right") == "1 of 2 on"
    assert lines_of(spatial) == [(1, 0, 300)] and not lines_of(frequency)
    assert bar.get_ylabel() == "share"


def test_streams_are_further_rows_and_a_kind_of_any_name_is_drawn(monkeypatch):
    monkeypatch.setitem(sites_module._KINDS, "new", sites_module.Kind("new", "", "#666666", "o"))
    sites = [
        f"{kind}.{layer}.{stream}" for stream in ("image", "dsm") for kind in ("spatial", "new") for layer in (0, 3)
    ]
    figure = gate_figure([{"iteration": 0, "scores": {}, "active": ["new.3.dsm"]}], sites)
    titles = ["spatial · image", "new · image", "spatial · dsm", "new · dsm"]
    assert [ax.get_title("left") for ax in figure.axes] == titles
    rows = [ax.get_subplotspec().rowspan.start for ax in figure.axes]
    assert rows == [0, 0, 1, 1]
    assert lines_of(figure.axes[3]) == [(1, 0, 1)]
    assert [label.get_text() for label in figure.axes[3].get_yticklabels()] == ["0", "3"]


def test_the_streams_of_a_model_are_rows_whatever_the_order_of_its_sites():
    sites = [
        f"{kind}.{layer}{stream}" for kind in ("spatial", "semantic") for stream in ("", ".dsm") for layer in (0, 1)
    ]
    record = {"iteration": 0, "scores": {}, "active": ["semantic.1"]}
    figure, narrow = gate_figure([record], sites), gate_figure([record], sites, columns=1)
    titles = ["spatial · image", "semantic · image", "spatial · dsm", "semantic · dsm"]
    assert [ax.get_title("left") for ax in figure.axes] == titles
    assert [len(lines_of(ax)) for ax in figure.axes] == [0, 1, 0, 0]
    assert [ax.get_title("left") for ax in narrow.axes] == [titles[k] for k in (0, 2, 1, 3)]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_second_raster_has_a_column_of_its_own(tmp_path, rows):
    image = np.random.default_rng(0).random((5, 24, 24)).astype(np.float32) * 0.5
    image[3, :8] = np.nan
    items = [Item(image, np.zeros((24, 24), np.uint8), "a", None, 2)] * rows
    masks = {"after": [np.zeros((24, 24), np.uint8)] * rows}
    pictures = {}
    for name, shown in {"two": items, "one": [Item(image[:3], item.label, "a") for item in items]}.items():
        draw_panels(shown, masks, ("road", "house"), PALETTE, tmp_path / f"{name}.png", second="sar")
        pictures[name] = matplotlib.image.imread(tmp_path / f"{name}.png")
    assert pictures["two"].shape[1] / pictures["one"].shape[1] == pytest.approx(4 / 3, abs=0.01)
    assert colour_share(pictures["two"], HOLE) > 0.02 and not colour_share(pictures["one"], HOLE)
    assert (pictures["two"][0] == 1).all(), "the titles are whole"


def test_nothing_is_announced_that_is_not_drawn():
    idle = gate_figure([{"iteration": 0, "scores": dict.fromkeys(SITES, 0.0), "active": []}], SITES)
    assert not idle.legends and len(idle.axes) == 2  # neither a legend nor a colour bar
    record = {"iteration": 10, "split": "after", "domain": "source", "mIoU": 0.5}
    (score,) = chart_figure(run_charts([record])).axes
    assert [text.get_text() for text in score.get_legend().get_texts()] == ["validation  50.0"]
    assert score.get_title("left") == "mIoU, %"


@pytest.mark.parametrize("low", [9.0, 42.0])
def test_tick_labels_have_the_digits_they_need(low):
    records = [{"iteration": i, "split": "after", "domain": "arid", "mIoU": (low + 0.1 * i) / 100} for i in range(4)]
    (ax,) = chart_figure(run_charts(records)).axes
    ax.figure.draw_without_rendering()
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(set(labels)) == len(labels) > 1


def test_a_binary_task_is_led_by_its_foreground(tmp_path):
    per_class = {"background": {"IoU": 0.9}, "road": {"IoU": 0.25}}
    record = {"iteration": 10, "split": "after", "domain": "arid", "mIoU": 0.575, "per_class": per_class}
    assert headline(record) == ("IoU of road", 0.25)
    assert headline({**record, "per_class": {"land": {"IoU": 0.9}, "water": {"IoU": 0.2}}}) == ("mIoU", 0.575)
    (chart,) = run_charts([record])
    assert chart.title == "IoU of road, %" and list(chart.curves[0].points) == [(10, 25.0)]


def test_an_svg_takes_the_colours_of_the_page_and_is_equal_for_equal_figures():
    records = [{"iteration": 0, "scores": dict.fromkeys(SITES, 0.5), "active": SITES[:1]}]
    one, two = (svg_uri(gate_figure(records, SITES, marker=0)) for _ in range(2))
    text = base64.b64decode(one.partition(",")[2]).decode()
    assert one == two
    xml.dom.minidom.parseString(text)
    assert "prefers-color-scheme:dark" in text
    body = text.partition("</style>")[2]
    assert "var(--cd55e00)" in body and not any(colour in body for colour in DARK)


def test_one_kind_and_zero_scores_are_drawn(tmp_path):
    sites = ["semantic.0", "semantic.1"]
    draw_gate([{"iteration": 0, "scores": dict.fromkeys(sites, 0.0), "active": sites}], sites, tmp_path / "gate.png")
    assert (tmp_path / "gate.png").stat().st_size > 0


@pytest.mark.parametrize("evaluated", [True, False])
def test_curves_are_drawn_with_and_without_evaluations(tmp_path, evaluated):
    records = [
        {"iteration": i, "split": "train", "stage": stage, "domain": "source", "loss": 1 / (i + 1)}
        for stage in ("before", "after")
        for i in range(0, 50, 10)
    ]
    if evaluated:
        records += [{"iteration": i, "split": "after", "domain": "arid", "mIoU": m} for i, m in ((10, 0.2), (40, None))]
    draw_curves(records, tmp_path / "figures" / "curves.png")
    assert colour_share(matplotlib.image.imread(tmp_path / "figures/curves.png"), "#0072B2") > 0


@pytest.mark.parametrize(("bands", "height", "width"), [(3, 40, 40), (1, 30, 60), (4, 700, 1200)])
def test_panels_show_the_palette_for_any_bands_and_size(tmp_path, bands, height, width):
    label = np.zeros((height, width), np.uint8)
    label[:, width // 2 :] = 1
    label[0] = 255
    item = Item(np.full((bands, height, width), 0.5, np.float32), label, "a")
    draw_panels([item, item], {"prediction": [label, 1 - label % 2]}, ("land", "water"), PALETTE, tmp_path / "p.png")
    picture = matplotlib.image.imread(tmp_path / "p.png")
    assert all(colour_share(picture, colour) > 0.1 for colour in PALETTE)


def test_images_stand_side_by_side_whatever_their_size_and_bands(tmp_path):
    columns = {"image": [np.zeros((4, 40, 30)), np.ones((4, 40, 30))], "restored": [np.full((1, 20, 15), 0.5)] * 2}
    draw_images(columns, tmp_path / "restored.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "restored.png").shape
    assert width > 400 and height > 400


def test_a_background_is_paper_and_every_other_class_keeps_its_colour():
    assert palette_of(["Background", "road"]) == [BACKGROUND, SAFE[0]]
    assert palette_of(["land", "background"]) == list(SAFE[:2])
    assert palette_of([]) == [] and len(palette_of([str(k) for k in range(40)])) == 40
