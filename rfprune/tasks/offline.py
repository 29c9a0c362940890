"""Ask the hub quickly: what is not reachable is answered from the cache, not by retries."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

PROBE_SECONDS = 3.0
_SILENT = 50  # logging.CRITICAL


def is_reachable() -> bool:
    """Whether the hub's address (HF_ENDPOINT or huggingface.co) takes a connection.

    Behind a proxy the probe would say nothing, so the answer is yes.
    """
    if {"https", "http", "all"} & getproxies().keys():
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), PROBE_SECONDS):
            return True
    except (OSError, UnicodeError):
        return False


@contextmanager
def cached_when_unreachable() -> Iterator[bool]:
    """Within, transformers and datasets read the hub's cache alone if the hub is not reachable.

    Left to themselves they retry every file for half a minute before they say so. Yields whether
    the hub may be asked. Its client is kept from a line for each retry: the error says it once.
    """
    import huggingface_hub.constants

    before = huggingface_hub.constants.HF_HUB_OFFLINE
    if before or is_reachable():
        with _silent_client():
            yield not before
        return
    # datasets keeps its own copy of the flag, made when it is imported.
    try:
        _set_offline(True)
        yield False
    finally:
        _set_offline(before)


@contextmanager
def _silent_client() -> Iterator[None]:
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(_SILENT)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _set_offline(offline: bool) -> None:
    """Tell the hub's client, and datasets if it is there, whether to stay off the network."""
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = offline
