"""Whether pretrained weights can be fetched, told in seconds: without a network the hub's client tries for a minute."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

PATIENCE_S = 5.0
"""For a connection to the hub."""


@contextmanager
def quick_hub() -> Iterator[str]:
    """Inside the block the hub's client uses its cache alone, where the hub cannot be reached. Gives what to say of it
    if weights are not there: "" where the network is not to blame."""
    if constants.HF_HUB_OFFLINE:
        yield "HF_HUB_OFFLINE is set and they are not in the cache"
        return
    place = urlsplit(constants.ENDPOINT)
    if place.scheme in getproxies() or _answers(place.hostname, place.port or (80 if place.scheme == "http" else 443)):
        yield ""
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield f"no connection to {place.hostname} within {PATIENCE_S:g} s, and they are not in the cache"
    finally:
        constants.HF_HUB_OFFLINE = False


def _answers(host: str, port: int) -> bool:
    found = []

    def connect() -> None:
        with suppress(OSError), socket.create_connection((host, port), PATIENCE_S):
            found.append(True)

    attempt = threading.Thread(target=connect, daemon=True)  # no limit covers the look-up of a name
    attempt.start()
    attempt.join(PATIENCE_S)
    return bool(found)
