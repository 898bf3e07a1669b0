"""`cegate data` on the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cegate import cli
from cegate.__main__ import main as cegate
from cegate.data.__main__ import main
from cegate.data.climates import CLIMATES
from cegate.data.published.catalogue import CATALOGUE


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def test_from_a_miniature_to_a_checked_folder(capsys, tmp_path):
    download, folder = tmp_path / "download", tmp_path / "whu"
    code, out, _ = run(capsys, "generate", "whu", "--out", download, "--seed", 4)
    assert code == cli.GOOD
    assert f"next: cegate data prepare whu --root {download} --out PREPARED --partial" in out
    code, out, _ = run(capsys, "prepare", "whu", "--root", download, "--out", folder, "--partial", "--dry_run")
    assert code == cli.GOOD and "aerial/val" in out and "1036" in out and not folder.exists()
    assert (
        run(capsys, "prepare", "whu", "--root", download, "--out", folder, "--partial", "--workers", 1)[0] == cli.GOOD
    )
    code, out, _ = run(capsys, "check", folder, "--workers", 1)
    assert code == cli.GOOD and "satellite/test" in out and out.endswith(f"{folder}: all is well\n")


def test_missing_files_and_wrong_labels_end_with_1(capsys, tmp_path, miniature):
    code, _, err = run(capsys, "prepare", "whu", "--root", miniature("whu"), "--out", tmp_path / "whu")
    assert code == cli.FAILED and err.count("\n") == 1
    assert err.startswith("error: whu: 3 of 4736 images in aerial/train")
    labels = ("--labels", "Val/*/masks_png/*.png", "--workers", "1")
    assert run(capsys, "check", miniature("loveda"), *labels, "--allowed", "loveda")[0] == cli.GOOD
    code, _, err = run(capsys, "check", miniature("loveda"), *labels, "--allowed", "0,2-7")
    assert code == cli.FAILED and "3514.png: values out of range: 1 (" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["prepar"],
            "cegate data knows list, prepare, check, generate, style-stats, style-preview; did you mean 'prepare'?",
        ),
        (["prepare", "--root", "x"], "the name of a data set is missing"),
        (["prepare", "whu", "--out", "x"], "--root is missing"),
        (["prepare", "wuh", "--root", "x", "--out", "y"], "no data set is called 'wuh'"),
        (["prepare", "whu", "--root", "x", "--out", "y", "--crop", "9"], "whu does not take --crop"),
        (["prepare", "whu", "--rot", "x"], "unknown option --rot; did you mean --root?"),
        (["prepare", "whu", "--root", "x", "--out", "y", "--workers", "two"], "--workers=two is not accepted"),
        (["generate", "whu"], "--out is missing"),
        (["check", ".", "--labels", "*", "--allowed", "1-0"], "--allowed=1-0 is neither values"),
        (["check", ".", "--labels", "*", "--allowed", "0-" + "9" * 5000], "is neither values, as in 0-6,255"),
        (["check", ".", "--labels", "a\0b"], "argument 'a\\x00b' holds a NUL"),
        (["generate", "wuh", "--out", "x"], "no miniature of 'wuh'"),
        (["check"], "the folder to check is missing"),
        (["check", "x", "--labels", "y"], "give --labels and --allowed together"),
        (["check", "x", "--images", "y"], "--images needs --labels"),
        (["check", "x", "--labels", "y", "--allowed", "0-b"], "--allowed=0-b is neither values, as in 0-6,255, nor"),
        (["list", "casd"], "no data set is called 'casd'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert code == cli.USAGE and out == "" and err.count("\n") == 1
    assert message in err


def test_a_miniature_is_not_written_over_something(capsys, tmp_path):
    (tmp_path / "x").write_text("x")
    code, _, err = run(capsys, "generate", "whu", "--out", tmp_path)
    assert code == cli.FAILED and "is not empty; give a new folder" in err
    code, _, err = run(capsys, "generate", "climates", "--out", "/proc/x")
    assert (
        code == cli.FAILED and err == "error: /proc/x: No such file or directory; see that it can be read and written\n"
    )


def test_climates_are_images_with_masks(capsys, tmp_path):
    assert run(capsys, "generate", "climates", "--out", tmp_path / "scenes")[0] == cli.GOOD
    for climate in CLIMATES:
        names = [
            {path.name for path in (tmp_path / f"scenes/{climate}/{kind}").iterdir()} for kind in ("images", "masks")
        ]
        assert names[0] == names[1] and len(names[0]) == 4


def test_the_catalogue_is_shown(capsys):
    code, out, _ = run(capsys, "list")
    assert code == cli.GOOD
    for name in CATALOGUE:
        assert name in out
        _, about, _ = run(capsys, "list", name)
        assert f"{name}: {CATALOGUE[name].title}" in about and CATALOGUE[name].origin in about


def test_the_verb_is_known_and_its_help_needs_no_torch(capsys):
    assert cegate(["data"]) == cli.USAGE
    assert cegate(["data", "--help"]) == cli.GOOD
    assert "prepare" in capsys.readouterr().out
    code = (
        "import sys\nfrom cegate.__main__ import main\n"
        "for words in (['data', '--help'], ['data', 'list', 'casid'], ['data', 'prepare', 'whu', '--help']):\n"
        "    try: main(words)\n    except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "cegate.data", "list", "whu"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("whu: ")
