"""The server behind TLS: who trusts its certificate, and which files cannot be one."""

from __future__ import annotations

import datetime
import importlib.util
import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rlalign import serve
from rlalign.config import ConfigError
from rlalign.config.schema import ServerConfig
from rlalign.rollout.client import RolloutClient
from rlalign.rollout.engine import EngineError, GenerateRequest, SamplingParams
from rlalign.rollout.server.tls import load_tls, trust
from tests.rollout.live_server import LiveServer

pytest.importorskip("cryptography")
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

REQUEST = GenerateRequest("p", tuple(range(10, 50)), seeds=(1, 2, 3))
PARAMS = SamplingParams(16)
DAY = datetime.timedelta(days=1)


class Pair:
    """A certificate and its key as PEM files, as `openssl req -x509` makes them; or signed by
    another one, which comes after it in the file."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        address: str = "127.0.0.1",
        days: int = 9,
        signer: Pair | None = None,
        passphrase: bytes | None = None,
    ) -> None:
        self.certificate, self.key = str(folder / f"{name}.pem"), str(folder / f"{name}.key")
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.private, now = (
            ec.generate_private_key(ec.SECP256R1()),
            datetime.datetime.now(datetime.UTC),
        )
        alternative = x509.IPAddress(ipaddress.ip_address(address))
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name((signer or self).name)
            .public_key(self.private.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 10 * DAY)
            .not_valid_after(now + days * DAY)
            .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
            .add_extension(x509.BasicConstraints(signer is None, None), critical=True)
        )
        signed = builder.sign((signer or self).private, hashes.SHA256())
        self.pem = signed.public_bytes(serialization.Encoding.PEM).decode()
        Path(self.certificate).write_text(self.pem + (signer.pem if signer else ""))
        cipher = (
            serialization.BestAvailableEncryption(passphrase)
            if passphrase
            else serialization.NoEncryption()
        )
        form = serialization.PrivateFormat.PKCS8
        pem = self.private.private_bytes(serialization.Encoding.PEM, form, cipher)
        Path(self.key).write_bytes(pem)

    @property
    def options(self) -> tuple[str, str]:
        return f"tls_certificate={self.certificate}", f"tls_key={self.key}"


# --- a real server, on every address of this machine ---------------------------------------------

on_a_server = [
    pytest.mark.xdist_group("server"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return Pair(tmp_path_factory.mktemp("tls"), "ours")


@pytest.fixture(scope="module")
def server(folder: Path, pair: Pair, tmp_path_factory) -> Iterator[LiveServer]:
    server = LiveServer(folder, tmp_path_factory.mktemp("server"), "host=0.0.0.0", *pair.options)
    yield server
    assert server.close() == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()


def copied(server: LiveServer, folder: Path, **changes: str) -> ServerConfig:
    """The connection file as a job on another machine has it."""
    path = folder / "copy.json"
    content = {**json.loads(server.connection.read_text()), **changes}
    path.touch(0o600)
    path.write_text(json.dumps(content))
    return ServerConfig(name=str(path))


class TestServer:
    pytestmark = on_a_server

    def test_a_job_trusts_the_certificate_in_its_file_wherever_it_lies(
        self, server, tokenizer, tmp_path
    ):
        assert server.url.startswith("https://0.0.0.0:")
        port = server.url.rpartition(":")[2]
        with server.client(tokenizer) as engine:
            here = engine.generate([REQUEST], PARAMS)
        # An address that the certificate does not name: the certificate is what counts.
        for host in ("127.0.0.2", "localhost"):
            cfg = copied(server, tmp_path, url=f"https://{host}:{port}")
            with RolloutClient("far", tokenizer, cfg) as engine:
                assert engine.generate([REQUEST], PARAMS) == here

    def test_a_client_without_the_certificate_refuses(self, server, pair, tokenizer, tmp_path):
        stranger = Pair(tmp_path, "ours")  # the same names, another key
        cfg = copied(server, tmp_path, certificate=stranger.pem)
        with pytest.raises(EngineError, match="CERTIFICATE_VERIFY_FAILED"):
            RolloutClient("misled", tokenizer, cfg)
        with httpx.Client(trust_env=False) as http, pytest.raises(httpx.ConnectError, match="CERT"):
            http.get(f"{server.url}/health")

    def test_plain_http_gets_nothing(self, server):
        with httpx.Client(trust_env=False) as http, pytest.raises(httpx.TransportError):
            http.get(f"http{server.url.removeprefix('https')}/health")

    def test_other_programs_name_the_file(self, server, pair, folder):
        """As docs/server.md says."""
        openai = pytest.importorskip("openai")
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        knowing = httpx.Client(verify=ssl.create_default_context(cafile=pair.certificate))
        with openai.OpenAI(
            base_url=f"{url}/v1", api_key=server.tokens["generate"], http_client=knowing
        ) as client:
            assert str(folder) in [model.id for model in client.models.list()]

    def test_who_does_not_begin_to_encrypt_disturbs_nobody(self, server, pair):
        host, port = "127.0.0.1", int(server.url.rpartition(":")[2])
        with socket.create_connection((host, port)), socket.create_connection((host, port)) as sock:
            sock.sendall(b"\x00" * 100)
            verify = trust({"certificate": pair.pem})
            with httpx.Client(verify=verify, trust_env=False) as http:
                assert http.get(f"{server.url}/health").json() == {"status": "ok"}


# --- files ---------------------------------------------------------------------------------------


def connects(server: ssl.SSLContext, client: ssl.SSLContext) -> bool:
    """Whether a handshake over a pair of sockets succeeds."""
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    theirs.settimeout(5)

    def accept() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        client.wrap_socket(ours).close()
        return True
    except ssl.SSLCertVerificationError:
        return False
    finally:
        ours.close()
        thread.join()


def test_a_certificate_of_an_authority_is_trusted_and_the_authoritys_others_are_not(tmp_path):
    root = Pair(tmp_path, "root")
    first, second = (Pair(tmp_path, name, signer=root) for name in ("first", "second"))
    ours, others = (load_tls(p.certificate, p.key) for p in (first, second))
    assert ours is not None and others is not None
    assert ours.certificate == first.pem  # without its signer
    client = trust({"certificate": ours.certificate})
    assert isinstance(client, ssl.SSLContext)
    assert connects(ours.context, client) and not connects(others.context, client)


def test_a_connection_without_a_certificate_trusts_the_usual_authorities():
    assert trust({"url": "https://example.org"}) is True


def test_files_that_no_client_would_accept_stop_the_server_before_its_engine(tmp_path):
    good, other = Pair(tmp_path, "good"), Pair(tmp_path, "other")
    late = Pair(tmp_path, "late", days=-1)
    secret = Pair(tmp_path, "secret", passphrase=b"x")
    (tmp_path / "empty").write_text("")
    empty, nothing = str(tmp_path / "empty"), str(tmp_path / "nothing")
    wrong = [
        (good.certificate, None, r"tls_key is not set: TLS needs tls_certificate and tls_key"),
        (None, good.key, r"tls_certificate is not set"),
        (nothing, good.key, r"tls_certificate = '.*nothing' cannot be read: No such file"),
        (good.certificate, nothing, r"tls_key = '.*nothing' cannot be read: No such file"),
        (str(tmp_path), good.key, r"cannot be read: Is a directory"),
        (good.key, good.key, r"good.key' holds no certificate"),
        (good.certificate, empty, r"empty' cannot be used together"),
        (good.certificate, other.key, r"cannot be used together: KEY_VALUES_MISMATCH"),
        (late.certificate, late.key, r"refused by every client: certificate has expired"),
        (secret.certificate, secret.key, r"wants a passphrase"),
    ]
    for certificate, key, reason in wrong:
        given = {"tls_certificate": certificate, "tls_key": key}
        options = [f"{name}={value}" for name, value in given.items() if value is not None]
        with pytest.raises(ConfigError, match=reason):
            serve("no-such-model", ["host=0.0.0.0", f"name={tmp_path}/x.json", *options])
