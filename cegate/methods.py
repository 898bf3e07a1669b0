"""Methods by one word: what each of them decides in a configuration. Everything else stays equal between them."""

from __future__ import annotations

from cegate.config import KINDS, Kind, Method


def _method(
    *kinds: Kind, gate: str = "none", refiner: str = "none", tune: str = "frozen"
) -> dict[str, str | list[Kind]]:
    return {
        "toolbox.kinds": list(kinds or KINDS),
        "gate.method": gate,
        "gate.sites": [],
        "refiner.method": refiner,
        "model.tune": tune,
    }


METHODS: dict[Method, dict[str, str | list[Kind]]] = {
    "gate": _method(gate="fisher"),
    "random": _method(gate="random"),
    "all_on": _method(gate="all"),
    "no_spatial": _method("semantic", "frequency", gate="fisher"),
    "no_semantic": _method("spatial", "frequency", gate="fisher"),
    "no_frequency": _method("spatial", "semantic", gate="fisher"),
    "frozen": _method(),
    "lora": _method("spatial", gate="all"),
    "adaptformer": _method("semantic", gate="all"),
    "earth_adapter": _method("frequency", gate="all"),
    "rein": _method(refiner="rein"),
    "full": _method(tune="full"),
}
"""Method -> dotted key -> value. Ranks and widths are those of the toolbox section."""
