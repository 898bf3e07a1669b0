"""The house has floors, and imports point down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cegate

ROOT = Path(cegate.__file__).parent
KERNELS = Path(__import__("cegate.kernels", fromlist=["x"]).__file__).parent

# lowest first; a module may import from floors below its own, and from its own package
FLOORS = [
    ("errors", "palette", "kernels", "_C"),
    ("sites", "yamltext"),
    ("methods", "fields"),
    ("config",),
    ("recipe",),
    ("native", "gate", "losses", "metrics"),
    ("configfile",),
    ("ops",),
    ("dispatch", "data", "runfolder"),
    ("scenes",),
    ("toolbox", "refiners"),
    ("models", "fisher"),
    ("checkpoint",),
    ("api", "figures", "tasks"),
    ("engine",),
    ("matrix", "page"),
    ("cli",),
    ("train", "evaluate", "predict", "inspect", "bench", "report"),
    ("__main__",),
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT).with_suffix("")
        if relative.parts != ("__init__",) and relative.parts[0] != "kernels":
            yield ".".join(relative.parts), path


def imports(path: Path) -> Iterator[str]:
    """Names of cegate's own modules that a file imports, without the leading ``cegate.``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cegate":
            below = node.module.split(".")[1:]
            yield from [".".join(below)] if below else (alias.name for alias in node.names)
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


def test_kernels_know_nothing_of_cegate():
    for path in KERNELS.glob("*.py"):
        assert not list(imports(path)), path.name


def test_the_gate_sees_names_and_numbers_only():
    source = (ROOT / "gate.py").read_text()
    assert "torch" not in source
    assert "models" not in "".join(imports(ROOT / "gate.py"))


@pytest.mark.parametrize(
    "module", ["config", "errors", "sites", "fields", "yamltext", "methods", "gate", "configfile", "cli", "recipe"]
)
def test_what_help_needs_does_not_import_torch(module):
    import subprocess
    import sys

    code = f"import sys, cegate.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
