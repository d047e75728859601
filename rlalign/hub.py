"""The Hugging Face hub within seconds: is it in reach, and how to do without it.

Left alone, its client retries an unreachable hub for half a minute.
"""

from __future__ import annotations

import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub.constants as hub

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
PROBE_TIMEOUT_S = 5.0


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name."""
    return HUB_ID.fullmatch(name) is not None


def hub_problem(timeout_s: float = PROBE_TIMEOUT_S) -> str | None:
    """Why the hub cannot be asked right now; None when it answers, whatever it says.

    One request, given up after `timeout_s` seconds; proxies are taken from the environment.
    """
    if hub.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    request = urllib.request.Request(hub.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=timeout_s).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # the hub's client may know other certificates
            return None
        return f"{hub.ENDPOINT} is out of reach ({reason})"
    return None


@contextmanager
def cached_only() -> Iterator[None]:
    """Within it the hub's client reads its cache and never the network."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
