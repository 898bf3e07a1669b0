"""CrossEarth-Gate: Fisher-guided adaptive tuning of frozen vision transformers for remote sensing."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["build", "fisher", "gate", "load", "load_many", "ops", "read_adapter", "wrap"]

# In a checkout (`python -m cegate.train` there imports this folder, whatever is installed) kernels/ lies beside this
# folder, not in it: setup.py maps it to cegate.kernels. Searching the parent as well finds it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

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
