"""Names of gated sites, and the registry of module kinds. No torch here: configurations and pages use it too."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from cegate.errors import ConfigError, nearest, quoted


@dataclass(frozen=True)
class Kind:
    """A kind of gated module: its word in site names, and how figures and pages show it."""

    name: str
    title: str
    """What stands over its part of a figure, after the name."""
    colour: str
    """'#RRGGBB' of its lines."""
    marker: str
    """matplotlib's sign of its points."""


_KINDS: dict[str, Kind] = {}
_WORD = "[a-z][a-z0-9_]*"
# six digits hold every layer, and no site is written in two ways
_SITE = re.compile(rf"({_WORD})\.(0|[1-9][0-9]{{0,5}})(?:\.({_WORD}))?")


def register_kind(name: str, *, title: str = "", colour: str = "#666666", marker: str = "o") -> Kind:
    """Make a module kind known to configurations, site names, figures and pages; later ones sort behind earlier ones.

    Args:
        name: word in site names: small letters, digits and '_', a letter first.
        title: what the kind is, in a few words.
        colour: '#RRGGBB'.
        marker: matplotlib's sign for points.

    Raises:
        ConfigError: no such word, or another kind has the name; to register the same again is harmless.
    """
    if not re.fullmatch(_WORD, name):
        raise ConfigError(f"kind {name!r} is no name; use small letters, digits and '_', a letter first")
    kind = Kind(name, title, colour, marker)
    if _KINDS.setdefault(name, kind) != kind:
        raise ConfigError(f"kind {name!r} is registered already, as {_KINDS[name]}; choose another name")
    return kind


def kinds() -> tuple[str, ...]:
    """Names of all kinds, in the order in which sites sort and ties are broken."""
    return tuple(_KINDS)


def find_kind(name: str) -> Kind:
    """The kind of that name.

    Raises:
        ConfigError: it is unknown; the nearest is named.
    """
    if name not in _KINDS:
        raise ConfigError(f"kind {name!r} is unknown; kinds are {', '.join(_KINDS)}{nearest(name, _KINDS)}")
    return _KINDS[name]


class SiteId(str):
    """A gated site: a module kind at a layer, in one stream where there are several; ``spatial.7``, ``spatial.7.dsm``.

    Equal to its text, with its hash, so that it is a JSON text and a key that users' strings find; sorted by (order of
    the kind in the registry, layer, stream), the site without a stream first.

    Raises:
        ConfigError: the text is no site of a known kind; the nearest is named.
    """

    __slots__ = ("kind", "layer", "stream")

    kind: str
    layer: int
    stream: str | None

    def __new__(cls, text: str) -> SiteId:
        if isinstance(text, cls):
            return text
        match = _SITE.fullmatch(text)
        if not match or match[1] not in _KINDS:
            raise ConfigError(
                f"site {quoted(text)} is not <kind>.<layer> or <kind>.<layer>.<stream>; kinds are "
                f"{', '.join(_KINDS)}, layers count from 0{_meant(text)}"
            )
        site = super().__new__(cls, text)
        site.kind, site.layer, site.stream = match[1], int(match[2]), match[3]
        return site

    @classmethod
    def parse(cls, text: str) -> SiteId:
        """The site of a text; see the class."""
        return cls(text)

    @classmethod
    def of(cls, kind: str, layer: int, stream: str | None = None) -> SiteId:
        """The site of a kind at a 0-based layer, in a stream."""
        return cls(f"{kind}.{layer}" if stream is None else f"{kind}.{layer}.{stream}")

    @property
    def row(self) -> str:
        """Kind and stream: the row of a table of gates."""
        return self.kind if self.stream is None else f"{self.kind}.{self.stream}"

    @property
    def sort_key(self) -> tuple[int, int, str]:
        """(place of the kind in the registry, layer, stream or '')."""
        return kinds().index(self.kind), self.layer, self.stream or ""

    def __lt__(self, other: str) -> bool:
        return self.sort_key < SiteId(other).sort_key

    def __le__(self, other: str) -> bool:
        return self.sort_key <= SiteId(other).sort_key

    def __gt__(self, other: str) -> bool:
        return self.sort_key > SiteId(other).sort_key

    def __ge__(self, other: str) -> bool:
        return self.sort_key >= SiteId(other).sort_key


def _meant(text: str) -> str:
    """A guess at ``spatal.7``, ``Spatial_7``, ``7.spatial`` or ``spatial.07``."""
    word, layer = re.search(r"[^\W\d_]+", text), re.search(r"[0-9]{1,6}", text)
    kind = difflib.get_close_matches(word[0].lower(), _KINDS, n=1, cutoff=0.5) if word else []
    return f"; did you mean '{kind[0]}.{int(layer[0]) if layer else 0}'?" if kind else ""


SPATIAL = register_kind("spatial", title="LoRA on query and value", colour="#0072B2", marker="o")
SEMANTIC = register_kind("semantic", title="adapter beside the MLP", colour="#D55E00", marker="s")
FREQUENCY = register_kind("frequency", title="Earth-Adapter", colour="#009E73", marker="^")
PAPER_KINDS = (SPATIAL.name, SEMANTIC.name, FREQUENCY.name)
"""The three kinds of CrossEarth-Gate, the default of ``toolbox.kinds``."""
