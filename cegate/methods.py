"""Methods by one word: what each of them decides in a configuration. Everything else stays equal between them."""

from __future__ import annotations

from typing import Any

from cegate.sites import PAPER_KINDS

_FROZEN: dict[str, Any] = {
    "toolbox.kinds": list(PAPER_KINDS),
    "gate.method": "none",
    "gate.sites": [],
    "refiner.method": "none",
    "model.tune": "frozen",
    "style.method": "none",
    "mim.method": "none",
    "injector.method": "none",
    "modal.method": "none",
    "modal.single": False,
}
_CROSSEARTH = {"style.method": "earth", "mim.method": "restore", "injector.method": "gse"}

# a row says what differs from the frozen backbone + head; a key that a new row needs goes into _FROZEN too, so that
# every word decides it
_ROWS: dict[str, dict[str, Any]] = {
    "gate": {"gate.method": "fisher"},
    "random": {"gate.method": "random"},
    "all_on": {"gate.method": "all"},
    "no_spatial": {"toolbox.kinds": ["semantic", "frequency"], "gate.method": "fisher"},
    "no_semantic": {"toolbox.kinds": ["spatial", "frequency"], "gate.method": "fisher"},
    "no_frequency": {"toolbox.kinds": ["spatial", "semantic"], "gate.method": "fisher"},
    "frozen": {},
    "lora": {"toolbox.kinds": ["spatial"], "gate.method": "all"},
    "adaptformer": {"toolbox.kinds": ["semantic"], "gate.method": "all"},
    "earth_adapter": {"toolbox.kinds": ["frequency"], "gate.method": "all"},
    "rein": {"refiner.method": "rein"},
    "full": {"model.tune": "full"},
    "crossearth": {"refiner.method": "rein", **_CROSSEARTH},
    "rein_gse": {"refiner.method": "rein", "injector.method": "gse"},
    "rein_gse_mim": {"refiner.method": "rein", "injector.method": "gse", "mim.method": "restore"},
    "crossearth_gate": {"gate.method": "fisher", **_CROSSEARTH},
    "mfnet_adapter": {"modal.method": "mmadapter"},
    "mfnet_lora": {"modal.method": "mmlora"},
    "mfnet_adapter_single": {"modal.method": "mmadapter", "modal.single": True},
    "mfnet_lora_single": {"modal.method": "mmlora", "modal.single": True},
    "mfnet_gate": {"gate.method": "fisher"},
}

OF_TWO_RASTERS = ("mfnet_adapter", "mfnet_lora", "mfnet_gate")
"""Methods that need ``data.source.second``."""
METHODS: dict[str, dict[str, Any]] = {word: {**_FROZEN, **row} for word, row in _ROWS.items()}
"""Method -> dotted key -> value. Ranks and widths are those of the toolbox section."""
