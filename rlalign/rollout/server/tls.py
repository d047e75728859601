"""TLS with the one certificate that the server has: its connection file carries it, and a client
trusts it and nothing else.

No authority is asked, so a certificate that anybody has made for himself will do, and the names in
it do not matter: whoever has its key is the server.
"""

from __future__ import annotations

import contextlib
import re
import ssl
from os.path import expanduser
from pathlib import Path
from typing import Any, NamedTuple

from rlalign.config.load import ConfigError

PEM = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n?", re.DOTALL)
FLIGHTS = 4  # messages each way are enough for a handshake


class Tls(NamedTuple):
    """What the server needs, and the certificate as text for those who shall trust it."""

    context: ssl.SSLContext
    certificate: str


def load_tls(certificate: str | None, key: str | None) -> Tls | None:
    """From the paths of two PEM files; None where neither is given.

    Raises ConfigError for one without the other, and for what a client would not accept: files that
    cannot be read or do not belong together, a certificate that is out of date.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        missing = "tls_certificate" if certificate is None else "tls_key"
        raise ConfigError(f"{missing} is not set: TLS needs tls_certificate and tls_key")
    certificate, key = expanduser(certificate), expanduser(key)
    text, _ = _read("tls_certificate", certificate), _read("tls_key", key)
    found = PEM.search(text)
    if found is None:
        raise ConfigError(f"tls_certificate = {certificate!r} holds no certificate in PEM format")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=lambda: _no_passphrase(key))
        _shake_hands(context, trusting(found[0]))
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"tls_certificate = {certificate!r} would be refused by every client: "
            f"{error.verify_message}"
        ) from error
    except ssl.SSLError as error:
        raise ConfigError(
            f"tls_certificate = {certificate!r} and tls_key = {key!r} cannot be used together: "
            f"{error.reason or error}. They must be the PEM files of one key"
        ) from error
    return Tls(context, found[0])


def trusting(certificate: str) -> ssl.SSLContext:
    """For a client of the server that has `certificate`, whatever its address is called."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not have signed itself
    context.load_verify_locations(cadata=certificate)
    return context


def trust(connection: dict[str, Any]) -> ssl.SSLContext | bool:
    """What httpx takes as `verify`, for the server of a connection file."""
    certificate = connection.get("certificate")
    return True if certificate is None else trusting(certificate)


def _read(option: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="latin-1")
    except OSError as error:
        raise ConfigError(f"{option} = {path!r} cannot be read: {error.strerror}") from error


def _no_passphrase(key: str) -> str:
    raise ConfigError(
        f"tls_key = {key!r} wants a passphrase, which nobody is there to type: give a key without"
    )


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """A handshake in memory. Raises SSLError where one over the network would fail."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True)
    for _ in range(FLIGHTS):
        for side in sides:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
