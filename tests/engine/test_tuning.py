from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from cegate import tune_lr
from cegate.configfile import to_yaml
from cegate.engine.sets import open_sets
from cegate.engine.tuning import Trial, Tuning, divide, shortened, tune_rate
from cegate.errors import ConfigError, rate_text


def test_the_lowest_rate_that_comes_close_is_recommended():
    scores = {1e-4: 0.395, 3e-4: 0.40, 1e-3: 0.403, 3e-3: None}
    trials = [Trial(rate, {"validation": score}, None if score is None else 1.0) for rate, score in scores.items()]
    tuning = Tuning(tuple(trials), by_place=False)
    assert tuning.recommended == 1e-4
    how, first, end, warning = tuning.advice()
    assert how == "Measured on the held-out part of the source."
    assert "--train.lr 1e-4" in first and "--rates 3.33e-5" in end and "too high for other places" in warning
    assert len(Tuning(tuple(trials[1:]), by_place=True).advice()) == 3
    assert Tuning(tuple(trials[3:]), by_place=True).recommended is None
    places = Trial(1e-4, {"a": 0.2, "b": 0.4}, 1.0)
    (nothing,) = Tuning((Trial(1e-4, {"validation": 0.0}, 1.0),), by_place=False).advice()
    assert nothing.startswith("Nothing was learned at any rate; give more --iterations")
    assert places.score == pytest.approx(0.3) and rate_text(1e-3) == "1e-3" and rate_text(2.5e-4) == "2.5e-4"


def test_a_short_run_has_the_whole_schedule(small):
    changes = {"train__schedule": "steps", "train__milestones": "[50, 80]", "run__speed": "auto"}
    short = shortened(small(train__iterations=100, train__warmup=10, **changes), 20)
    assert short.run.speed == "eager"  # a trial looks at every loss
    train = short.train
    assert (train.iterations, train.warmup, train.milestones) == (20, 2, [10, 16])


def folders(root, names, side=48):
    """A folder set with a folder for each place."""
    random = np.random.default_rng(0)
    for place in names:
        for kind in ("images", "masks"):
            (root / place / kind).mkdir(parents=True)
        for k in range(2):
            mask = (random.random((side, side)) > 0.5).astype(np.uint8)
            image = np.repeat(mask[..., None] * 200, 3, 2) + random.integers(0, 50, (side, side, 3), dtype=np.uint8)
            Image.fromarray(image.astype(np.uint8)).save(root / place / "images" / f"{k}.png")
            Image.fromarray(mask).save(root / place / "masks" / f"{k}.png")


def test_places_are_left_out_in_turn(small, tmp_path):
    folders(tmp_path / "set", ["east", "north", "west", "south"])
    source = f"{{kind: folder, root: {tmp_path / 'set'}, images: '*/images/*', masks: '*/masks/*'}}"
    changes = {"data__source": source, "data__classes": "[no, yes]", "data__targets": "{}", "data__validation": "null"}
    _, sets = open_sets(small(**changes))
    divisions = dict(divide(sets))
    assert list(divisions) == ["east", "north", "south"]
    for place, part in divisions.items():
        held, kept = ([s.item_name(k) for k in range(len(s))] for s in (part.validation, part.source))
        assert len(held) == 2 and len(kept) == 6 and all(name.startswith(place) for name in held)
        assert not any(name.startswith(place) for name in kept)
        assert part.source.read(0).name == kept[0] and part.source.read_label(0).shape == part.source.size(0)
    one = small(**{**changes, "data__source": source.replace("*/", "north/")})
    with pytest.raises(ConfigError, match=r"nothing to measure on: give data\.validation"):
        tune_rate(one, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_table_and_writes_its_folder_alone(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(to_yaml(small()))
    given = ["--config", "c.yaml", "--rates", "1e-3,1e30,1e-2", "--iterations", "4", "--output", "lr"]
    assert tune_lr.main(given) == 0
    shown = capsys.readouterr().out
    assert "mIoU (%)" in shown and "Recommended: --train.lr 1e-" in shown
    assert "not finite" in shown and "too high for other places" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "lr"]
    written = json.loads((tmp_path / "lr/tune_lr.json").read_text())
    assert [trial["rate"] for trial in written["trials"]] == [1e-3, 1e-2, 1e30] and written["iterations"] == 4
    assert list(written["trials"][0]["scores"]) == ["validation"]
    assert tune_lr.main(given) == 1 and "tune_lr.json exists; give another --output" in capsys.readouterr().err
    assert tune_lr.main(["--config", "c.yaml", "--rates", "1e-3,fast"]) == 2
    assert "--rates 'fast' is no learning rate" in capsys.readouterr().err.replace("fast is", "'fast' is")
