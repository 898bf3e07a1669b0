"""What a person watching sees."""

from __future__ import annotations

import io

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
    reporter.step(0.25)
    reporter.evaluated("validation 40.0")
    assert " 8/50 loss 0.250  mIoU validation 40.0" in shown(reporter)
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
