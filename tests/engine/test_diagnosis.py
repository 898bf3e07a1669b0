"""`cegate inspect --report`: all that an issue needs, and nobody's name."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re

import pytest
import rasterio

import cegate
from cegate import cli, configfile, inspect, native
from cegate.engine import diagnosis


@pytest.fixture
def bob(monkeypatch):
    """A user and a machine with names."""
    monkeypatch.setattr(diagnosis.getpass, "getuser", lambda: "bobby")
    monkeypatch.setattr(diagnosis.socket, "gethostname", lambda: "bobs-laptop")
    monkeypatch.setattr(diagnosis.Path, "home", lambda: diagnosis.Path("/home/bobby"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_bobby")


def test_versions_machine_and_backends_are_told(capsys, monkeypatch):
    assert inspect.main(["--report"]) == cli.GOOD
    text = capsys.readouterr().out
    assert f"cegate {cegate.__version__} (" in text and f"GDAL {rasterio.__gdal_version__}" in text
    for name in ("torch", "timm", "rasterio", "numpy"):
        assert f"{name} {importlib.metadata.version(name)}" in text
    assert re.search(r"\d+ cores, 1 threads\n", text) and "GiB of memory" in text
    assert ("no GPU that torch sees" in text) != ("GPU 0: " in text)
    assert text.count("```") == 2 * text.count("```text")
    monkeypatch.setattr(native, "EXTENSION", None)
    monkeypatch.setattr(native, "REASON", "it was not built")
    assert "auto takes for float32 on the CPU: torch, because it was not built" in diagnosis.report()


def test_a_run_is_told_without_the_names_of_folders_people_and_machines(small, bob, capsys, monkeypatch):
    config = small()
    source = dataclasses.replace(config.data.source, kind="folder", root="/data/Secret Client/tiles")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
    folder = diagnosis.Path(config.run.work_dir)
    folder.mkdir()
    (folder / "config.yaml").write_text(configfile.to_yaml(config))
    log = (
        "12:00 INFO reading /data/Secret Client/tiles/images/7.png\n"
        "12:01 ERROR /mnt/bobby/work/a.tif: no such file; C:\\Users\\bobby\\b.tif neither, on bobs-laptop\n"
        "12:02 INFO 3/4 of 12 and/or https://example.org/page stay\n"
    )
    (folder / "train.log").write_text("an older line\n" * 20 + log)
    assert inspect.main(["--report", "--run", str(folder)]) == cli.GOOD
    text = capsys.readouterr().out
    for name in ("bobby", "bobs-laptop", "Secret", "/data/", str(folder.parent)):
        assert name not in text
    assert "no checkpoint that can be read" in text
    assert "train.lr: 0.01\n" in text and "data.source.root: …/tiles\n" in text and "train.clip" not in text
    assert "reading …/tiles/images/7.png" in text and "ERROR …/a.tif: no such file; …/b.tif neither, on HOST" in text
    assert "3/4 of 12 and/or https://example.org/page stay" in text
    assert text.count("an older line") == 9
    assert "TORCHINDUCTOR_CACHE_DIR=…/torchinductor_USER" in text


def test_what_does_not_go_together_is_refused(tmp_path, capsys):
    assert inspect.main(["--report", "--backends"]) == cli.USAGE
    assert "or --report alone or with --run" in capsys.readouterr().err
    assert inspect.main(["--report", "--run", str(tmp_path / "gone")]) == cli.FAILED
    assert "is no run folder" in capsys.readouterr().err
