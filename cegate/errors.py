"""Exceptions of cegate. Each is one line: what was given, what is accepted, what to do next."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

LONGEST = 80
"""Characters of a given value that a message repeats."""


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


def refuse_unreadable(path: Path, kind: type[CegateError]) -> None:
    """Raise an error of that kind where the system does not let a file be read: libraries that read weights give such a
    file another reason, safetensors that it does not exist."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise kind(f"{path} cannot be read ({error.strerror}); see that it can be read") from error


def nearest(name: str, accepted: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest accepted name, or an empty string."""
    match = difflib.get_close_matches(name[:LONGEST], list(accepted), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def shown(value: Any) -> str:
    """A value as a configuration would have it, for a message: one printable line of 80 characters at most."""
    text = _flow(value, 3)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def quoted(text: str) -> str:
    """A text in quotes, for a message: one printable line of some 80 characters at most."""
    return repr(text) if len(text) <= LONGEST else f"{text[: LONGEST - 1]!r}…"


def is_printable(text: str) -> bool:
    """No control characters, line ends or halves of characters."""
    return not any(unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") for sign in text)


def _flow(value: Any, levels: int) -> str:
    if isinstance(value, str):
        text = value[: LONGEST + 1]
        return text if text and is_printable(text) else ascii(str(text))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 10**LONGEST:  # Python writes no integer of more than 4300 digits
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple | Mapping) and not levels:
        return "…"
    if isinstance(value, Mapping):
        pairs = islice(value.items(), LONGEST)
        return f"{{{', '.join(f'{_flow(k, 0)}: {_flow(item, levels - 1)}' for k, item in pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_flow(item, levels - 1) for item in islice(value, LONGEST))}]"
    return repr(value)


def bytes_text(count: float) -> str:
    """A number of bytes, as people write it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def rate_text(rate: float) -> str:
    """1e-4, as people write it."""
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
