"""What a person watching sees."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cegate.configfile import domain_title
from cegate.engine.progress import Reporter
from cegate.engine.results import Result, stage_title


def shown(reporter: Reporter) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(reporter.bar.get_renderable())
    return console.file.getvalue()


def test_the_bar_knows_all_stages_and_moves_while_steps_wait():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    reporter = Reporter(console, {"before": "frozen", "after": "gate"}, 50)
    reporter.begin("before", 7)
    assert "frozen" in shown(reporter) and " 7/50" in shown(reporter) and " 0/50" in shown(reporter)
    reporter.step(None)  # not read yet
    assert " 8/50 loss –" in shown(reporter)
    reporter.step(0.25)
    reporter.evaluated("mIoU validation 40.0")
    assert " 9/50 loss 0.250  mIoU validation 40.0" in shown(reporter)
    with reporter.meanwhile("evaluating validation", 4) as progress:
        progress(3)
        assert "evaluating validation" in shown(reporter) and " 3/4" in shown(reporter)
    assert "evaluating" not in shown(reporter)
    with reporter.meanwhile("scoring before iteration 10", 16):
        assert "scoring before iteration 10" in shown(reporter) and " 0/16" in shown(reporter)


def test_stages_and_domains_are_called_by_one_name():
    assert [stage_title("before"), stage_title("after"), stage_title("after", "rein")] == ["frozen", "gate", "rein"]
    assert [domain_title("source"), domain_title("arid")] == ["validation", "arid"]


def test_the_table_says_what_adapted_the_backbone(tmp_path):
    records = {"source": {"mIoU": 0.5, "per_class": {"road": {"IoU": 0.5}}, "absent": []}}
    table = Result(tmp_path, records, records, method="rein").table()
    assert all(word in table for word in ("frozen", "rein", "validation")) and "source" not in table


def test_a_binary_table_is_led_by_the_foreground(tmp_path):
    per_class = {"background": {"IoU": 0.9}, "road": {"IoU": 0.3}}
    records = {"source": {"mIoU": 0.6, "per_class": per_class, "absent": []}}
    result = Result(tmp_path, {}, records)
    lines = [line for line in result.table().splitlines() if "│" in line]
    assert [line.split("│")[2].strip() for line in lines] == ["road", "background", "mean"]
    assert [row.style for row in result.rich_table().rows] == ["bold", None, None]


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_stays_on_one_line_and_keeps_its_numbers(width):
    reporter = Reporter(Console(file=io.StringIO(), force_terminal=True, width=width), {"after": "gate"}, 20_000)
    reporter.begin("after", 19_990)
    reporter.evaluated("mIoU " + ", ".join(f"place_{k} 40.0" for k in range(9)))
    with reporter.meanwhile("evaluating validation", 7):
        console = Console(file=io.StringIO(), width=width)
        console.print(reporter.bar.get_renderable())
    stage, aside = console.file.getvalue().splitlines()
    assert "19990/20000 loss" in stage and "evaluating validation" in aside and "0/7" in aside
