"""Many clients draw from one rollout server at once while its engine is killed again and again.

    python benchmarks/server_load.py --minutes 10 --clients 64 --kills 3

Every answer is compared with that of a server nobody disturbed: equal seeds give equal tokens, each
exactly once. Exit code 1 where a request was lost, wrong or answered twice.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from rlalign.models.load import resolve_model_path

BATCHES = 128  # different ones
PROMPTS, SAMPLES, LENGTH = 2, 4, 48
START_S, SILENCE_S, WATCH_S = 300.0, 120.0, 2.0
FINE = ("right", "left early")
FLAT = 0.03
LEAVING = 0.1  # of all draws: their client goes away at the first line

Drawn = dict[tuple[int, int], tuple[list[int], list[float]]]


@dataclass
class Tally:
    answers: Counter[str] = field(default_factory=Counter)
    latency_s: list[float] = field(default_factory=list)
    restart_s: list[float] = field(default_factory=list)
    server_mib: list[float] = field(default_factory=list)
    engine_mib: dict[int, list[float]] = field(default_factory=dict)  # by process
    spool_mib: list[float] = field(default_factory=list)


def batch(number: int) -> dict[str, Any]:
    rng = random.Random(number)
    return {
        "requests": [
            {
                "ids": [rng.randrange(5, 50) for _ in range(rng.randrange(4, 24))],
                "seeds": [rng.randrange(2**62) for _ in range(SAMPLES)],
            }
            for _ in range(PROMPTS)
        ],
        "params": {"max_completion_length": LENGTH, "ignore_eos": True},
    }


async def draw(http: httpx.AsyncClient, job: str, number: int, leave: bool = False) -> Drawn:
    """RuntimeError says what was wrong with the answer."""
    drawn: Drawn = {}
    async with http.stream("POST", f"/v1/jobs/{job}/draw", json=batch(number)) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"refused: {(await answer.aread()).decode()}")
        async for text in answer.aiter_lines():
            line = json.loads(text) if text else {}
            if "error" in line:
                raise RuntimeError(f"failed: {line['error']}")
            if "request" in line:
                key = line["request"], line["index"]
                if key in drawn:
                    raise RuntimeError(f"sent twice: {key}")
                drawn[key] = line["ids"], line["logp"]
                if leave:
                    return drawn
    if len(drawn) != PROMPTS * SAMPLES:
        raise RuntimeError(f"lost: {len(drawn)} of {PROMPTS * SAMPLES} sequences came")
    return drawn


async def client(
    http: httpx.AsyncClient, job: str, seed: int, until: float, expected: list[Drawn], tally: Tally
) -> None:
    rng = random.Random(seed)
    while time.monotonic() < until:
        number, leave = rng.randrange(BATCHES), rng.random() < LEAVING
        began = time.monotonic()
        try:
            drawn = await draw(http, job, number, leave)
        except (RuntimeError, httpx.HTTPError) as error:
            tally.answers[f"{type(error).__name__}: {str(error)[:100]}"] += 1
            await asyncio.sleep(0.1)
            continue
        same = all(expected[number][key] == got for key, got in drawn.items())
        tally.answers[("left early" if leave else "right") if same else "wrong tokens"] += 1
        if not leave:
            tally.latency_s.append(time.monotonic() - began)


def engine_of(server: psutil.Process) -> psutil.Process | None:
    for child in server.children():
        try:
            if any("engine_main" in part for part in child.cmdline()):
                return child
        except psutil.NoSuchProcess:
            continue
    return None


async def killer(
    http: httpx.AsyncClient, server: psutil.Process, until: float, kills: int, tally: Tally
) -> None:
    gap_s = (until - time.monotonic()) / (kills + 1)
    for _ in range(kills):
        await asyncio.sleep(gap_s)
        engine = engine_of(server)
        if engine is None:
            raise RuntimeError("there is no engine to kill")
        began = time.monotonic()
        engine.kill()
        await asyncio.sleep(0.5)
        while (await http.get("/health")).json().get("status") != "ok":
            await asyncio.sleep(0.1)
        tally.restart_s.append(time.monotonic() - began)


async def watch(server: psutil.Process, tally: Tally) -> None:
    while True:
        engine = engine_of(server)
        if engine is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                mib = engine.memory_info().rss / 2**20
                tally.engine_mib.setdefault(engine.pid, []).append(mib)
        tally.server_mib.append(server.memory_info().rss / 2**20)
        files = Path("/dev/shm").glob(f"rlalign-serve-{server.pid}-*/**/*")
        tally.spool_mib.append(sum(file.stat().st_size for file in files if file.is_file()) / 2**20)
        await asyncio.sleep(WATCH_S)


async def start(model: str, connection: Path) -> asyncio.subprocess.Process:
    main = "from rlalign.cli import main; main()"
    arguments = ["serve", model, f"name={connection}", "num_threads=1", "max_len=256"]
    arguments.append("vllm.kv_cache_gib=1")  # full soon: what grows then is a leak
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", main, *arguments, stdout=sys.stderr
    )
    deadline = time.monotonic() + START_S
    while not connection.exists():
        if process.returncode is not None or time.monotonic() > deadline:
            raise RuntimeError("the server did not start; see its output above")
        await asyncio.sleep(0.1)
    return process


async def load(minutes: float, clients: int, kills: int) -> dict[str, Any]:
    model, tally = resolve_model_path("mini:chain", 0), Tally()
    with tempfile.TemporaryDirectory() as folder:
        process = await start(model, Path(folder) / "server.json")
        try:
            content = json.loads((Path(folder) / "server.json").read_text())
            server = psutil.Process(content["pid"])
            async with httpx.AsyncClient(
                base_url=content["url"],
                headers={"Authorization": f"Bearer {content['tokens']['job']}"},
                timeout=SILENCE_S,
                limits=httpx.Limits(max_connections=None),
                trust_env=False,
            ) as http:
                lease = {"name": "load", "ttl_s": 3600}
                job = (await http.post("/v1/jobs", json=lease)).json()["id"]
                expected = [await draw(http, job, number) for number in range(BATCHES)]
                began = time.monotonic()
                until = began + 60 * minutes
                watching = asyncio.create_task(watch(server, tally))
                killing = asyncio.create_task(killer(http, server, until, kills, tally))
                await asyncio.gather(
                    *(client(http, job, i, until, expected, tally) for i in range(clients))
                )
                seconds = time.monotonic() - began
                await killing
                watching.cancel()
                state = (await http.get("/v1/server")).json()
                await http.delete(f"/v1/jobs/{job}")
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            code = await process.wait()
    return report(tally, seconds, state, code)


def report(tally: Tally, seconds: float, state: dict[str, Any], code: int) -> dict[str, Any]:
    def course(values: list[float]) -> list[float]:
        """Medians of its four quarters, MiB."""
        size = max(1, len(values) // 4)
        quarters = [values[i * size : (i + 1) * size] for i in range(4)]
        return [round(statistics.median(quarter), 1) for quarter in quarters if quarter]

    latency = sorted(tally.latency_s)
    return {
        "seconds": round(seconds, 1),
        "answers": dict(tally.answers),
        "answers_per_s": round(sum(tally.answers.values()) / seconds, 1),
        "latency_s": {
            "median": round(statistics.median(latency), 3),
            "p99": round(latency[int(0.99 * len(latency))], 3),
            "highest": round(latency[-1], 3),
        },
        "restarts": state["restarts"],
        "restart_s": [round(value, 1) for value in tally.restart_s],
        "left": {"waiting": state["waiting"], "in_flight": state["in_flight"]},
        "server_mib": course(tally.server_mib),
        "engine_mib": [course(values) for values in tally.engine_mib.values()],
        "spool_mib": max(tally.spool_mib),
        "exit_code": code,
    }


def run(quick: bool) -> dict[str, Any]:
    """As a benchmark."""
    clients, kills = (16, 1) if quick else (64, 3)
    result = asyncio.run(load(0.5 if quick else 10.0, clients, kills))
    wrong = sum(n for what, n in result["answers"].items() if what not in FINE)
    bars = [
        {"what": f"answers lost or wrong, {kills} deaths", "value": wrong, "bar": "0"},
        {"what": "sequences left behind", "value": sum(result["left"].values()), "bar": "0"},
    ]
    grown = max(growth(course) for course in [result["server_mib"], *result["engine_mib"]])
    bars.append(
        {"what": "memory, last quarter against the second", "value": grown, "bar": f"<= {FLAT}"}
    )
    rows = [{"side": name, "value": json.dumps(value)} for name, value in result.items()]
    machine = f"{os.cpu_count()} cores, {clients} clients"
    bars = [
        {**bar, "holds": bar["value"] <= (FLAT if "memory" in bar["what"] else 0)} for bar in bars
    ]
    return {"name": "server_load", "machine": machine, "rows": rows, "bars": bars}


def growth(course: list[float]) -> float:
    """As a share, of the medians of four quarters; the first one warms up."""
    return course[-1] / course[1] - 1 if len(course) == 4 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result = asyncio.run(load(options.minutes, options.clients, options.kills))
    print(json.dumps(result, indent=2))
    bad = set(result["answers"]) - set(FINE)
    if bad or result["exit_code"] or any(result["left"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
