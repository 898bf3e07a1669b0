"""What the documents say is so: their commands run or parse, their links lead somewhere, the reference is whole."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import rasterio
import torch.distributed.run
import yaml

from cegate import cli, configfile
from cegate.__main__ import VERBS
from cegate.__main__ import main as cegate
from cegate.data.__main__ import USAGES
from cegate.data.generator import render_scene
from cegate.data.rasters import write_image, write_mask

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

SHORT = {
    "train": "--train.iterations 2 --train.eval_every 2 --data.batch_size 2 --data.workers 0 --gate.samples 2",
    "cegate train": "--data.source.limit 2 --data.validation.limit 1 --data.targets.boreal.limit 1 "
    "--data.targets.monsoon.limit 1",
    "cegate train --config roads.yaml": "--data.crop 32",
    "report": "--tiles 1",
}
"""Verb, or a whole command -> what is added to a command of README and tutorial, so that it takes a moment."""
NOT_RUN = ("pip", "pytest", "mkdocs")
"""First words of shell lines that are left out."""


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of the code blocks of a page, in order; indented ones are of the shell."""
    language, lines = "", []
    for line in [*text.splitlines(), ""]:
        if language and language != "shell":
            if line == "```":
                yield language, "".join(lines)
                language, lines = "", []
            else:
                lines.append(line + "\n")
        elif line.startswith("    ") or (not line and lines):
            language = "shell"
            lines.append(line[4:] + "\n")
        else:
            if lines:
                yield language, "".join(lines)
            language, lines = line[3:] if line.startswith("```") else "", []
    if lines:
        yield language, "".join(lines)


def commands(shell: str) -> Iterator[str]:
    """Commands of a block, continued lines joined, comments gone."""
    for line in re.sub(r"\\\n\s*", " ", shell).splitlines():
        if words := shlex.split(line, comments=True):
            yield shlex.join(words)


# --- what runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> dict[str, str]:
    """The folders that README speaks of, and where they are here."""
    for place, climate in (("epfl", "temperate"), ("shanghai", "boreal")):
        for k in range(10 if place == "epfl" else 2):
            image, label = render_scene(climate, k, 48)
            for kind in ("images", "masks"):
                (tmp_path / "data" / place / kind).mkdir(parents=True, exist_ok=True)
            write_image(tmp_path / f"data/{place}/images/{k}.png", image)
            write_mask(tmp_path / f"data/{place}/masks/{k}.png", (label == 3).astype(np.uint8))
    (tmp_path / "new").mkdir()
    image, _ = render_scene("boreal", 9, 48)
    for name in ("new/a.tif", "new/b.tif", "tile.tif"):
        write_image(tmp_path / name, image)
    return {"/data/": f"{tmp_path}/data/"}


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_every_block_of_a_page_runs(page, data, tmp_path, monkeypatch, capsys, no_figures):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    ran = []
    for language, content in blocks((ROOT / page).read_text(encoding="utf-8")):
        for written, here in data.items():
            content = content.replace(written, here)
        if language == "yaml":
            file = re.match(r"# (\S+\.yaml)\n", content)
            assert file, f"{page}: a yaml block begins with the name of its file, as in '# roads.yaml'\n{content}"
            Path(file[1]).write_text(content)
        elif language == "python":
            exec(content, names)
        elif language == "shell":
            for command in commands(content):
                program, *argv = shlex.split(command)
                if program in NOT_RUN:
                    continue
                assert program == "cegate", f"{page}: {command}"
                added = f"{SHORT.get(command, '')} {SHORT.get(argv[0], '')}"
                assert cegate([*argv, *shlex.split(added)]) == cli.GOOD, f"{page}: {command}\n{capsys.readouterr().err}"
                ran.append(command)
    assert len(ran) >= 4 and names["classes"].dtype == np.uint8
    if page == "docs/tutorial.md":
        with rasterio.open("maps/valley.tif") as valley:
            assert valley.crs.to_epsg() == 32632 and valley.shape == names["classes"].shape
            assert valley.colormap(1)[4][:3] == (0x5A, 0xA9, 0xDD)


def test_the_notebook_runs(tmp_path, monkeypatch, capsys, no_figures):
    """Its code cells in one process; the cell of parameters gives way to small ones."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "notebooks/gate_and_frozen.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["metadata"].get("tags") for cell in code].count(["parameters"]) == 1
    names: dict = {}
    for cell in code:
        content = "iterations = 2" if cell["metadata"].get("tags") == ["parameters"] else "".join(cell["source"])
        if content.startswith("!cegate "):
            assert cegate(shlex.split(content.partition(" 2> ")[0])[1:]) == cli.GOOD, capsys.readouterr().err
        else:
            exec(content, names)
        pictures = [out["data"]["image/png"] for out in cell["outputs"] if "image/png" in out.get("data", {})]
        assert all(len(base64.b64decode(picture)) < 200_000 for picture in pictures)
    assert names["mask"].shape == (512, 512) and len(names["last"]["active"]) == 8
    assert "gate" in capsys.readouterr().out


# --- what is at least understood ------------------------------------------------------------------------------------


def usage_of(argv: list[str]) -> tuple[cli.Usage, list[str]]:
    """The usage of a command, and what follows its verb and its leading arguments."""
    if argv[0] == "data":
        usage, rest = USAGES[argv[1]], argv[2:]
    else:
        usage, rest = importlib.import_module(f"cegate.{argv[0].replace('-', '_')}").USAGE, argv[1:]
    leads = re.search(r" \[?[A-Z]+\]?$", usage.prog)
    return usage, rest[1:] if leads and rest and not rest[0].startswith("-") else rest


def started_by_torchrun(argv: list[str]) -> list[str]:
    """The command that torchrun takes from its line: it looks for options of its own behind the module's name too."""
    read = torch.distributed.run.parse_args(argv)
    assert read.module
    return [read.training_script.removeprefix("cegate."), *read.training_script_args]


@pytest.mark.parametrize("page", NAMES)
def test_every_command_has_options_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [c for language, content in blocks(text) if language == "shell" for c in commands(content)]
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found += [shlex.join(shlex.split(c)) for c in re.findall(r"`(cegate [^`]+)`", " ".join(plain.split()))]
    for command in found:
        program, *argv = shlex.split(command)
        if program == "torchrun":
            program, argv = "cegate", started_by_torchrun(argv)
        if program != "cegate" or argv[0].startswith("-") or argv[0] == "VERB" or argv[-1] == "--help":
            continue
        assert argv[0] in VERBS, command
        if argv == ["data"]:
            continue
        usage, rest = usage_of(argv)
        try:
            cli.parse_options(rest, usage)
        except cli.ConfigError as error:
            pytest.fail(f"{page}: {command}: {error}")


@pytest.mark.parametrize("page", NAMES)
def test_every_key_of_a_yaml_block_exists(page):
    for language, content in blocks((ROOT / page).read_text(encoding="utf-8")):
        if language != "yaml":
            continue
        for mapping in alternatives(content):
            mapping.pop("base", None)
            outer = mapping if set(mapping) <= set(configfile.SECTIONS) else None
            if outer is None:  # the keys of a set, or of data
                of_data = set(mapping) <= {"source", "validation", "targets", "unlabelled"}
                outer = {"data": mapping if of_data else {"source": mapping}}
            _, problems = configfile._build(outer)
            assert not problems, f"{page}: {problems}\n{content}"


def alternatives(content: str) -> list[dict]:
    """The mappings of a block; lines of one key each that say the same thing in several ways stand for themselves."""
    lines = content.splitlines()
    if len({line.partition(":")[0] for line in lines}) == 1:
        return [yaml.safe_load(line) for line in lines]
    return [yaml.safe_load(content)]


@pytest.mark.parametrize("page", [*NAMES, "RESULTS.md", "CHANGELOG.md"])
def test_every_link_leads_to_a_file(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text)
    gone = [t for t in targets if "://" not in t and not ((ROOT / page).parent / t).exists()]
    assert not gone
    paths = re.findall(r"\bdocs/[\w/-]+\.md", text)
    assert not [path for path in paths if not (ROOT / path).is_file()]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1000


# --- the site -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """The hook of mkdocs."""
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_and_every_option_is_in_the_reference(site):
    text = site.configuration()
    for key in configfile.all_keys():
        told = re.sub(r"^data\.(validation|unlabelled|targets\.<name>)", "data.source", key)
        assert f"`{told}`" in text or f"# {told}\n" in text, key
    for key in ("data.targets.<name>", "data.validation", "data.unlabelled"):
        assert f"`{key}`" in text
    # a key of a section that may be null, which is reached by no option of its own
    assert "| `data.source.second.scale` |" in text and "| `train.lr` | Peak learning rate of AdamW. |" in text
    usages = [importlib.import_module(f"cegate.{v.replace('-', '_')}").USAGE for v in VERBS if v != "data"]
    sections = re.split(r"^## ", site.commands(), flags=re.MULTILINE)[1:]
    assert len(sections) == len(usages) + len(USAGES)
    for usage in [*usages, *USAGES.values()]:
        (section,) = [s for s in sections if f"    {usage.prog}{' [options]' if usage.options else ''}\n" in s]
        for option in usage.options:
            assert (
                f"| `--{option.name}{f' {option.metavar}' if option.metavar else ''}`".replace("|", "\\|")[2:]
                in section
            )


def test_the_python_reference_holds_what_the_package_offers(site):
    import cegate as package

    text = site.api()
    named = [line.removeprefix("::: ") for line in text.splitlines() if line.startswith("::: ")]
    for name in named:
        module, _, attribute = name.rpartition(".")
        owner = module.rpartition(".")
        try:
            holder = importlib.import_module(module)
        except ModuleNotFoundError:
            holder = getattr(importlib.import_module(owner[0]), owner[2])
        assert getattr(holder, attribute).__doc__ or attribute == "forward", name
    for name in package.__all__:
        assert any(line.startswith(f"cegate.{name}.") or line.endswith(f".{name}") for line in named), name


def test_the_site_builds_without_a_warning(tmp_path):
    for needed in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"no {needed}: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("index.html", "reference/configuration/index.html", "project/RESULTS/index.html"):
        assert "<h1" in (tmp_path / "site" / page).read_text(encoding="utf-8")
