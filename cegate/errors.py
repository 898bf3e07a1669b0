"""Exceptions of cegate. Each is one line: what was given, what is accepted, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CegateError(Exception):
    """Anything a user can mend; commands print it as one line and exit with 1."""


class ConfigError(CegateError, ValueError):
    """A key or value of the configuration; commands exit with 2."""


class DataError(CegateError, ValueError):
    """An image, a mask, a label or a data set."""


class CheckpointError(CegateError, ValueError):
    """A run folder, checkpoint or adapter folder that cannot be written or read."""


class BackboneError(CegateError, ValueError):
    """A vision transformer that cannot be built, loaded or wrapped."""


class BackendError(CegateError, RuntimeError):
    """An explicitly requested backend cannot run; the message holds every reason."""


class TrainingError(CegateError, RuntimeError):
    """Training cannot go on."""


def nearest(name: str, accepted: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest accepted name, or an empty string."""
    match = difflib.get_close_matches(name, list(accepted), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
