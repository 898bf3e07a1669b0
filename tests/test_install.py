"""What is installed: the package itself, not the folder beside the tests, with or without a compiler."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cegate
import cegate.kernels
from cegate import native

ROOT = Path(__file__).resolve().parents[1]
needs_source = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no checkout around these tests")


def is_editable() -> bool:
    direct = importlib.metadata.distribution("cegate").read_text("direct_url.json") or ""
    return '"editable": true' in direct


@pytest.mark.skipif(is_editable(), reason="an editable install is the source folder")
def test_the_installed_package_is_tested():
    package = Path(cegate.__file__).parent
    assert package.parent.name == "site-packages"
    assert Path(cegate.kernels.__file__).parent == package / "kernels"
    assert native.EXTENSION is None or Path(native.EXTENSION.__file__).parent == package


def test_version_is_that_of_the_metadata():
    assert importlib.metadata.version("cegate") == cegate.__version__


def test_the_command_is_installed():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="cegate")
    assert script.value == "cegate.__main__:main"


def run_in_checkout(code: str, **env: str) -> str:
    """Python as a user has it who types `python -m cegate.train` in the checkout: the source folder comes first."""
    command = [sys.executable, "-c", f"import sys; sys.path[0] = {str(ROOT)!r}\n{code}"]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=True, timeout=120
    )
    return result.stdout.strip()


@needs_source
def test_a_checkout_finds_kernels_and_the_installed_extension():
    code = "import cegate.ops, cegate.kernels; print(cegate.__file__, cegate.kernels.__file__, cegate.ops.backends())"
    found = run_in_checkout(code)
    assert str(ROOT / "cegate" / "__init__.py") in found
    assert str(ROOT / "kernels" / "__init__.py") in found
    assert ("loaded: cegate._C" in found) == (native.EXTENSION is not None)


STRANGERS = ("cegate", "benchmarks", "tests", "setup", "scripts", "studies")
"""What lies beside the package in a checkout and is none of it."""


@needs_source
def test_a_checkout_makes_nothing_but_kernels_a_part_of_the_package():
    code = f"""
import importlib.util, cegate, cegate.kernels
assert importlib.util.find_spec("cegate.kernels.low_pass")
found = [name for name in {STRANGERS} if importlib.util.find_spec(f"cegate.{{name}}")]
print(found, cegate.kernels is sys.modules["cegate.kernels"], len(cegate.__path__))
"""
    assert run_in_checkout(code) == "[] True 1"


def test_what_is_installed_has_no_strangers_and_says_that_it_is_typed():
    assert [name for name in STRANGERS if importlib.util.find_spec(f"cegate.{name}")] == []
    assert (Path(cegate.__file__).parent / "py.typed").is_file()


@needs_source
def test_a_wheel_holds_the_package_and_nothing_beside_it(tmp_path):
    """Built without the extension, then imported by a Python that has nothing of cegate but the wheel."""
    pytest.importorskip("setuptools", minversion="77")
    steps = ["egg_info", "-e", str(tmp_path), "build_py", "-d", str(tmp_path / "lib")]
    env = {**os.environ, "CEGATE_NO_EXT": "1"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", *steps], cwd=ROOT, env=env, capture_output=True, check=True, timeout=120
    )
    names = {path.name for path in (tmp_path / "lib").iterdir()}
    assert names == {"cegate"}
    package = tmp_path / "lib" / "cegate"
    for name in (
        "py.typed",
        "kernels/low_pass.py",
        "page/page.html",
        "page/page.css",
        "matrix/published.yaml",
        "configs",
        "weights",
    ):
        assert (package / name).exists(), name
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path / "lib")!r})
import importlib.util, cegate, cegate.kernels
assert importlib.util.find_spec("cegate.kernels.low_pass")
found = [name for name in {STRANGERS} if importlib.util.find_spec(f"cegate.{{name}}")]
print(found, cegate.__file__, cegate.kernels.__file__)
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["[]", str(package / "__init__.py"), str(package / "kernels" / "__init__.py")]


@needs_source
def test_a_broken_extension_is_an_error(tmp_path):
    package = tmp_path / "cegate"
    package.mkdir()
    for source in (ROOT / "cegate").glob("*.py"):
        (package / source.name).write_bytes(source.read_bytes())
    (package / "kernels").symlink_to(ROOT / "kernels")
    suffix = next(s for s in __import__("importlib.machinery", fromlist=["x"]).EXTENSION_SUFFIXES if "cpython" in s)
    (package / f"_C{suffix}").write_bytes(b"torn")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import cegate.ops"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "is there but does not load" in result.stderr
    assert "reinstall cegate" in result.stderr


@needs_source
@pytest.mark.parametrize(
    ("env", "reason"),
    [({"CEGATE_NO_EXT": "1"}, "CEGATE_NO_EXT is set"), ({"CXX": "/nowhere/c++"}, "no C++ compiler was found")],
    ids=["asked", "no compiler"],
)
def test_without_a_compiler_the_build_says_so_and_goes_on(env, reason, tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pybind11")
    output = build_extension(tmp_path, **env)
    assert output.returncode == 0, output.stderr
    assert f"installing without its compiled extension ({reason})" in output.stderr
    assert not list(tmp_path.glob("lib/**/_C*"))
    refused = build_extension(tmp_path, **env, CEGATE_REQUIRE_EXT="1")
    assert refused.returncode == 1
    assert f"the compiled extension is required, but {reason}" in refused.stderr


def build_extension(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(folder / "lib"), "-t", str(folder / "temp")]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=120
    )


@needs_source
def test_headers_come_out_of_a_torch_wheel_where_none_is_installed(tmp_path, monkeypatch):
    setup = load_setup(monkeypatch)
    header = "torch/include/torch/csrc/stable/ops.h"

    def download(command, **options):
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        with zipfile.ZipFile(folder / "torch-2.99.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(header, "// stable")
            wheel.writestr("torch/lib/libtorch_cpu.so", "large")

    monkeypatch.setattr(setup["subprocess"], "run", download)
    assert setup["headers_from_wheel"](tmp_path) == tmp_path / "torch_wheel/torch/include"
    files = [str(path.relative_to(tmp_path / "torch_wheel")) for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [header]


def load_setup(monkeypatch) -> dict:
    """The functions of setup.py, without running setup()."""
    setuptools = pytest.importorskip("setuptools", minversion="77")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    names: dict = {"__name__": "setup", "__file__": str(ROOT / "setup.py")}
    exec((ROOT / "setup.py").read_text(), names)
    return names
