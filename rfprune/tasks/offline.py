"""Use the hub's local cache at once if the hub is not reachable, instead of after retries."""

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
    """Whether the hub's address (HF_ENDPOINT or huggingface.co) accepts a connection.

    True behind a proxy, where a connection of our own says nothing.
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
    """Within, transformers and datasets use only the hub's cache if the hub is not reachable.

    Without this they retry every file for half a minute. The client's line per retry is hidden,
    since the error says the same once. Yields whether the hub is reachable and may be used.
    """
    import huggingface_hub.constants

    before = huggingface_hub.constants.HF_HUB_OFFLINE
    if before or is_reachable():
        with _silent_client():
            yield not before
        return
    # datasets copies the flag when it is imported.
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
    """Set the offline flag of the hub's client, and of datasets if it is imported."""
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = offline
