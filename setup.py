"""Builds the compiled extension ``cegate._C`` with CMake and Ninja; everything else is in pyproject.toml.

The extension uses LibTorch's stable ABI, so it needs the headers of any torch from 2.11 on and no torch library: the
torch that is being built with, else the one in the environment that is installed into (pip hides it from an isolated
build), else the headers alone, taken out of torch's wheel. The last spares a bare machine a second torch with its CUDA
packages in the build environment; pip's cache hands the same wheel to the installation afterwards.

Where it cannot be built (no compiler, no headers) the package installs without it and says so.

    CEGATE_NO_EXT=1       do not build it
    CEGATE_REQUIRE_EXT=1  fail where it cannot be built
    CEGATE_SANITIZE=...   build with a sanitizer, for example address
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MIN_TORCH = (2, 11)


class CannotBuildError(Exception):
    """Why the extension cannot be built here, in one line."""


def is_wanted(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off")


def version_of(torch: Path) -> tuple[int, int]:
    """Version of the torch in a folder, (0, 0) if there is none."""
    version_file = torch / "version.py"
    if not version_file.is_file() or not (torch / "include/torch/csrc/stable/ops.h").is_file():
        return 0, 0
    values: dict[str, str] = {}
    exec(version_file.read_text(), values)
    major, minor = values["__version__"].split(".")[:2]
    return int(major), int(minor)


def torch_headers(work: Path) -> Path:
    """Folder with the headers of a torch that is new enough."""
    spec = importlib.util.find_spec("torch")
    installed = [Path(spec.origin).parent] if spec and spec.origin else []
    installed += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    for torch in installed:
        if version_of(torch) >= MIN_TORCH:
            return torch / "include"
    return headers_from_wheel(work)


def headers_from_wheel(work: Path) -> Path:
    folder = work / "torch_wheel"
    wanted = f"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    try:
        subprocess.run([*command, "--dest", str(folder), wanted], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise CannotBuildError(f"no headers of {wanted}: none is installed, and pip download says: {reason}") from error
    wheel = next(folder.glob("torch-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/torch/")])
    wheel.unlink()
    return folder / "torch" / "include"


def run(command: list[str], step: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise CannotBuildError(f"{step} did not start: {error}") from error
    except subprocess.CalledProcessError as error:
        output = f"{error.stdout}\n{error.stderr}"
        print(output, file=sys.stderr)
        if "CMAKE_CXX_COMPILER" in output:
            raise CannotBuildError("no C++ compiler was found") from error
        errors = [line.strip() for line in output.splitlines() if "error" in line.lower()]
        raise CannotBuildError(f"{step} failed: {errors[0] if errors else 'see the output above'}") from error


class CMakeBuild(build_ext):
    """Runs CMake; a failure leaves the extension out unless CEGATE_REQUIRE_EXT is set."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # of an earlier build
        try:
            if is_wanted("CEGATE_NO_EXT"):
                raise CannotBuildError("CEGATE_NO_EXT is set")
            self.build_with_cmake(target)
        except CannotBuildError as error:
            if is_wanted("CEGATE_REQUIRE_EXT"):
                raise SystemExit(f"cegate: the compiled extension is required, but {error}") from error
            print(
                f"\ncegate: installing without its compiled extension ({error}). Everything works; the gated modules "
                "run on plain PyTorch and are slower on a CPU. To get the extension, install a C++20 compiler (Debian: "
                "apt-get install g++; conda: conda install cxx-compiler) and run pip install again.\n",
                file=sys.stderr,
            )

    def build_with_cmake(self, target: Path) -> None:
        missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
        missing += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
        if missing:
            raise CannotBuildError(f"{' and '.join(missing)} cannot be found; pip install {' '.join(missing)}")
        import pybind11

        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        # it remembers the tools of an earlier build environment, which pip has deleted since
        (work / "CMakeCache.txt").unlink(missing_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": work / "out",
            "CEGATE_VERSION": self.distribution.get_version(),
            "CEGATE_TORCH_INCLUDE": torch_headers(work),
            "CEGATE_SANITIZE": os.environ.get("CEGATE_SANITIZE", ""),
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "Python_EXECUTABLE": sys.executable,
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        run(["cmake", "-S", str(Path(__file__).parent), "-B", str(work), "-G", "Ninja", *defines], "CMake")
        run(["cmake", "--build", str(work), "--target", "_C"], "compilation")
        built = next((work / "out").glob("_C.*"))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)


setup(
    packages=[*find_packages(include=["cegate", "cegate.*"]), "cegate.kernels"],
    # kernels/ stands on its own at the top of the repository and imports nothing of cegate
    package_dir={"cegate": "cegate", "cegate.kernels": "kernels"},
    ext_modules=[Extension("cegate._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
