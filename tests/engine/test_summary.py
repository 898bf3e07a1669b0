from __future__ import annotations

import io

from rich.console import Console

from cegate import sites as sites_module
from cegate.engine.summary import site_table


def test_streams_are_further_rows_and_a_kind_of_any_name_has_a_column(monkeypatch):
    monkeypatch.setitem(sites_module._KINDS, "new", sites_module.Kind("new", "", "#666666", "o"))
    sites = ["spatial.0.image", "new.0.image", "spatial.0.dsm", "new.3.dsm"]
    scores = dict.fromkeys(sites, 0.25)
    rounds = [
        {"scores": scores, "active": sites[:1]},
        {"scores": scores, "active": sites[:2]},
        {"scores": {}, "active": []},
    ]
    console = Console(file=io.StringIO(), width=100)
    console.print(site_table(sites, dict.fromkeys(sites, 1000), sites[:2], rounds))
    text = console.file.getvalue()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert "2 sites on, 2,000 weights" in text
    assert [name in text for name in ("spatial", "new", "semantic")] == [True, True, False]
    assert rows == [
        ["0 image", "● 0.250 100 %", "● 0.250  50 %"],
        ["0 dsm", "· 0.250   0 %", ""],
        ["3 dsm", "", "· 0.250   0 %"],
    ]
