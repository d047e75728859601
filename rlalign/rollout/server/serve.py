"""`rlalign serve MODEL`: start the engine, then listen until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from getpass import getuser
from pathlib import Path
from typing import Any

import psutil
import torch
import uvicorn

from rlalign.config.load import ConfigError
from rlalign.config.schema import ServeConfig
from rlalign.models.load import context_of, resolve_model_path
from rlalign.rollout.server.app import RolloutServer
from rlalign.rollout.server.connection import (
    connection_path,
    sole_server,
    write_connection,
)
from rlalign.rollout.server.doors import make_tokens
from rlalign.rollout.server.engine_host import EngineHost
from rlalign.rollout.server.methods import Methods
from rlalign.rollout.server.quotas import Quotas
from rlalign.rollout.server.texts import Texts
from rlalign.rollout.server.tls import Tls, load_tls
from rlalign.rollout.server.wire import HttpProtocol

MEMORY = Path("/dev/shm")  # a file system in memory: weights go through it without a disk
BACKLOG = 2048
MAX_LEN = 2048  # tokens, where max_len is unset and the model's context is not shorter
# An idle connection is the client's to close: closed by us as it sends, its request is lost. httpx
# keeps one for 5 s, which is uvicorn's patience too.
KEEP_ALIVE_S = 60
DRAIN_S = 4  # what requests in flight have left when the server is told to stop
LAST_WORDS_S = 2  # and to be told so


def serve(
    config: ServeConfig,
    on_ready: Callable[[str, Path], None] | None = None,
    methods: Methods | None = None,
) -> None:
    """Serve `config.model` until SIGINT or SIGTERM; `on_ready` is told the URL and the connection
    file once requests are taken. `methods` are models by the name of NAME@METHOD.

    Raises ConfigError for an address that others can reach without TLS and for a certificate that
    cannot be used, ConnectionFileError where another server has the name, and EngineLost where the
    engine cannot start.
    """
    tls = load_tls(config.tls_certificate, config.tls_key)
    _check_address(config, tls)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sole_server(connection_path(config.name)))
        listener = stack.enter_context(_listen(config))
        spool = Path(stack.enter_context(_spool()))
        asyncio.run(_run(config, listener, tls, spool, on_ready, methods))


async def _run(
    config: ServeConfig,
    listener: socket.socket,
    tls: Tls | None,
    spool: Path,
    on_ready: Callable[[str, Path], None] | None,
    methods: Methods | None,
) -> None:
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = resolve_model_path(config.model, config.seed)
    setup = {
        "model": folder,
        "vllm": dataclasses.asdict(config.vllm),
        "max_len": config.max_len or context_of(folder, MAX_LEN),
        "dtype": config.dtype,
        "device": device,
        "num_threads": config.num_threads,
    }
    # Twice what runs together, so that a sequence is at hand when another one ends.
    slots = 2 * config.vllm.max_num_seqs
    host = EngineHost(
        setup,
        slots=slots,
        start_timeout_s=config.start_timeout_s,
        stall_s=config.stall_s,
        quotas=Quotas(config.max_queued, config.max_in_flight),
    )
    texts = Texts(folder)
    told, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    stopped, started = loop.create_task(told.wait()), loop.create_task(host.start())
    try:
        await asyncio.wait((stopped, started), return_when=asyncio.FIRST_COMPLETED)
        if started.done():
            started.result()
            await _listen_until_stopped(
                config, host, texts, methods, listener, tls, spool, stopped, on_ready
            )
    finally:
        texts.close()
        started.cancel()
        stopped.cancel()
        await host.close()


async def _listen_until_stopped(
    config: ServeConfig,
    host: EngineHost,
    texts: Texts,
    methods: Methods | None,
    listener: socket.socket,
    tls: Tls | None,
    spool: Path,
    stopped: asyncio.Task[Any],
    on_ready: Callable[[str, Path], None] | None,
) -> None:
    tokens, path = make_tokens(), connection_path(config.name)
    described = {
        "model": config.model, "dtype": config.dtype, "name": config.name,
        "max_loras": config.vllm.max_loras, "max_lora_rank": config.vllm.max_lora_rank,
    }  # fmt: skip
    max_weights = config.max_weights_mib * 2**20
    rollouts = RolloutServer(host, spool, texts, described, max_weights, methods)
    server = _Server(
        uvicorn.Config(
            rollouts.asgi(tokens, config.max_body_mib * 2**20, config.max_requests),
            http=HttpProtocol,
            ssl_context_factory=tls and (lambda *_: tls.context),
            ws="none",
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=DRAIN_S + LAST_WORDS_S,
        )
    )
    stopped.add_done_callback(server.stop)
    closing = asyncio.create_task(_close_after(stopped, rollouts))
    address, port = listener.getsockname()[:2]
    scheme, certificate = ("http", None) if tls is None else ("https", tls.certificate)
    url = f"{scheme}://{f'[{address}]' if ':' in address else address}:{port}"
    listener.listen(BACKLOG)  # before anybody can read where
    write_connection(path, url, tokens, certificate)
    try:
        if on_ready is not None:
            on_ready(url, path)
        await server.serve(sockets=[listener])
    finally:
        closing.cancel()
        rollouts.searches.close()
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


async def _close_after(stopped: asyncio.Task[Any], rollouts: RolloutServer) -> None:
    await stopped
    await asyncio.sleep(DRAIN_S)
    await rollouts.close()


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to us: it would raise them again before we have cleaned up."""

    def stop(self, _: object = None) -> None:
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self):
        yield


def _check_address(config: ServeConfig, tls: Tls | None) -> None:
    try:
        loopback = ipaddress.ip_address(config.host).is_loopback
    except ValueError:
        raise ConfigError(f"host = {config.host!r} is no IP address; use 127.0.0.1") from None
    if not loopback and tls is None and not config.allow_plain_http:
        raise ConfigError(
            f"host = {config.host!r} can be reached by others, and plain HTTP lets whoever listens "
            "read the tokens. Give tls_certificate and tls_key, use 127.0.0.1 and a tunnel, or set "
            "allow_plain_http=true where the network is yours"
        )


def _listen(config: ServeConfig) -> socket.socket:
    """A bound socket: a port that is taken is known before the engine is started."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # With the protocol named, asyncio sends small answers at once (TCP_NODELAY): 40 ms each.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # A client whose machine is gone says nothing, and its place in a line would last for a day.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror}; port=0 takes a "
            "free one"
        ) from error
    return listener


@contextlib.contextmanager
def _spool():
    """A private folder for weights on their way, in memory where that can be had. What servers left
    that were killed is cleared away."""
    root = MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())
    for left in root.glob("rlalign-serve-*"):
        owner = left.name.split("-")[2]
        if owner.isdigit() and not psutil.pid_exists(int(owner)) and left.owner() == getuser():
            shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=f"rlalign-serve-{os.getpid()}-", dir=root)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
