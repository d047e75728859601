"""A real `rlalign serve` in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from rlalign.config.schema import ServerConfig
from rlalign.rollout.client import RolloutClient

START_S = 120.0


class LiveServer:
    """`rlalign serve MODEL options...`; `close` stops it and checks that it leaves nothing."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        self.connection = folder / "server.json"
        self.log = folder / "server.log"
        defaults = ("max_len=128", "num_threads=1", "vllm.max_num_seqs=16")
        arguments = ["serve", str(model), f"name={self.connection}", *defaults, *options]
        main = "from rlalign.cli import main; main()"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", main, *arguments], stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_S
        while not self.connection.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"not ready: {self.log.read_text()}"
            time.sleep(0.1)
        content = json.loads(self.connection.read_text())
        self.url, self.tokens = content["url"], content["tokens"]
        self._http = self.http()  # kept: to make one takes longer than to ask

    def client(
        self, tokenizer: Any, name: str = "test", adapter: Any = None, **options: Any
    ) -> RolloutClient:
        cfg = ServerConfig(name=str(self.connection), **options)
        return RolloutClient(name, tokenizer, cfg, adapter)

    def http(self, scope: str = "admin", token: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token or self.tokens[scope]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def state(self) -> dict[str, Any]:
        return self._http.get("/v1/server").json()

    def engine_pid(self) -> int:
        """Of the engine process: the server's child that runs engine_main.py."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for pid in children.split():
            if "engine_main" in Path(f"/proc/{pid}/cmdline").read_text():
                return int(pid)
        raise AssertionError(f"no engine among the children {children!r}")

    def kill_engine(self) -> None:
        os.kill(self.engine_pid(), signal.SIGKILL)

    def close(self) -> int:
        self._http.close()
        self.process.terminate()
        return self.process.wait(30)
