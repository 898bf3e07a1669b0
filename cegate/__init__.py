"""CrossEarth-Gate: Fisher-guided adaptive tuning of frozen vision transformers for remote sensing."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

__version__ = "0.2.0"
__all__ = ["build", "fisher", "gate", "load", "load_many", "ops", "read_adapter", "wrap"]


def _kernels_of_checkout() -> None:
    """In a checkout kernels/ lies beside this folder, not in it (setup.py maps it): make it `cegate.kernels`, and
    nothing else that lies there."""
    folder = Path(__file__).resolve().parents[1] / "kernels"
    if (Path(__file__).parent / "kernels").is_dir() or not (folder / "__init__.py").is_file():
        return
    name = f"{__name__}.kernels"
    spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    globals()["kernels"] = sys.modules[name]


_kernels_of_checkout()

# resolved on first use: `cegate --help` needs none of torch
_LAZY = {
    "build": ("cegate.api", "build"),
    "load": ("cegate.api", "load"),
    "load_many": ("cegate.api", "load_many"),
    "read_adapter": ("cegate.api", "read_adapter"),
    "wrap": ("cegate.parts.toolbox", "wrap"),
    "fisher": ("cegate.fisher", None),
    "gate": ("cegate.gate", None),
    "ops": ("cegate.ops", None),
}


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'cegate' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)
