"""The house has floors, and imports point down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cegate

ROOT = Path(cegate.__file__).parent
KERNELS = Path(__import__("cegate.kernels", fromlist=["x"]).__file__).parent

# lowest first; a module may import from floors below its own, and from its own room as long as no circle arises
FLOORS = [
    ("errors", "cores", "draws", "palette", "kernels", "_C"),
    ("sites", "yamltext", "native", "compute", "masks", "released", "resize"),
    ("fields", "methods", "gate", "ops"),
    ("config",),
    ("consistency",),
    ("configfile", "losses", "recipe", "metrics", "dispatch"),
    ("backbone", "runfolder"),
    ("parts", "data", "figures"),
    ("necks", "heads", "network", "fisher", "scenes", "style"),
    ("adapters",),
    ("segmenter",),
    ("checkpoint",),
    ("adapter_folder",),
    ("api", "tasks", "convert_mfnet"),
    ("engine",),
    ("matrix", "page"),
    ("cli",),
    ("train", "tune_lr", "evaluate", "predict", "inspect", "bench", "report", "convert", "init"),
    ("__main__",),
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT).with_suffix("")
        if relative.parts != ("__init__",) and relative.parts[0] != "kernels":
            yield ".".join(relative.parts), path


def imports(path: Path, *, whole: bool = False) -> Iterator[str]:
    """Names of cegate's own modules that a file imports, without the leading ``cegate.``; ``whole`` with what is taken
    from them, which may be a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cegate":
            below = node.module.split(".")[1:]
            named = [".".join([*below, alias.name]) for alias in node.names]
            yield from named if whole or not below else [".".join(below)]
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "cegate")


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_down(module, path):
    room = module.split(".")[0]
    if module.endswith(".__main__"):  # the command of a package is on the floor of the commands
        room = "train"
    assert room in FLOOR, f"{module} has no floor: add it to FLOORS"
    for name in imports(path):
        other = name.split(".")[0]
        if other.startswith("__") or other == room:
            continue
        assert FLOOR[other] < FLOOR[room], f"{module} (floor {FLOOR[room]}) imports {name} (floor {FLOOR[other]})"


def test_no_imports_go_in_a_circle():
    paths = {module.removesuffix(".__init__"): path for module, path in modules()}
    needs = {
        module: {
            other for name in imports(path, whole=True) for other in (name, name.rpartition(".")[0]) if other in paths
        }
        for module, path in paths.items()
    }
    done: list[str] = []
    while ready := [module for module in needs if module not in done and needs[module] - {module} <= {*done}]:
        done += ready
    assert set(needs) == set(done), f"in a circle, or above one: {sorted(set(needs) - set(done))}"


def test_kernels_know_nothing_of_cegate():
    for path in KERNELS.glob("*.py"):
        assert not list(imports(path)), path.name


def test_the_gate_sees_names_and_numbers_only():
    source = (ROOT / "gate.py").read_text()
    assert "torch" not in source
    assert set(imports(ROOT / "gate.py")) == {"errors", "sites"}


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "errors",
        "sites",
        "fields",
        "yamltext",
        "methods",
        "gate",
        "consistency",
        "configfile",
        "cli",
        "recipe",
    ],
)
def test_what_help_needs_does_not_import_torch(module):
    import subprocess
    import sys

    code = f"import sys, cegate.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
