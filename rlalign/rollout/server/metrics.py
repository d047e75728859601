"""The server's counters in Prometheus' text format, read when somebody asks for them.

Counts go by the job's name, so that a run which comes back with another lease goes on counting; the
gauges are of the jobs there are, by name and id. The last names are kept when their jobs are over.
An older one is forgotten: its series ends, and should it come back it counts from 0, which rate()
takes as the reset that it is. A row for all that was forgotten would grow without a token having
been drawn; the totals, which have no job, lose nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from rlalign.rollout.server.engine_host import EngineHost
from rlalign.rollout.server.jobs import KINDS, Job, JobTable
from rlalign.rollout.server.sequences import Tally

PREFIX = "rlalign_server_"
KEPT_NAMES = 100  # of jobs that are over


class Metrics(Collector):
    """All metrics of one server, in a registry of its own."""

    def __init__(self, host: EngineHost, jobs: JobTable) -> None:
        self._host, self._jobs = host, jobs
        self._past: dict[str, Tally] = {}  # of leases that are over, by name; the last one last
        self._registry = CollectorRegistry()
        self._registry.register(self)

    async def scrape(self, request: Request) -> Response:
        text = generate_latest(self._registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    def over(self, job: Job) -> None:
        """Take over what was counted of a job that gets nothing any more."""
        tally = self._past.pop(job.name, Tally())
        self._past[job.name] = tally + self._host.counters.by_job.pop(job.id, Tally())
        alive = {job.name for job in self._jobs}
        for name in [name for name in self._past if name not in alive][:-KEPT_NAMES]:
            del self._past[name]

    def collect(self) -> Iterator[Metric]:
        host, counters = self._host, self._host.counters
        yield _gauge("engine_up", "1 while there is an engine with the weights in use.", host.alive)
        yield _gauge("waiting_sequences", "Sequences the engine has not got.", len(host.queue))
        yield _gauge("in_flight_sequences", "Sequences in the engine.", host.in_flight)
        yield _counter("engine_restarts", "Engines in a dead one's place.", counters.restarts)
        yield _counter("weight_updates", "Weights and adapters taken over.", counters.updates)
        yield from self._of_jobs()
        total = counters.total
        yield _counter(
            "all_generated_tokens", "Of all jobs there ever were.", total.generated_tokens
        )
        yield _counter("all_sequences", "Of all jobs there ever were.", total.sequences)
        tokens = CounterMetricFamily(
            f"{PREFIX}generated_tokens", "Tokens of finished sequences.", labels=["job"]
        )
        sequences = CounterMetricFamily(
            f"{PREFIX}sequences", "Sequences drawn or scored.", labels=["job"]
        )
        for name, tally in self._by_name().items():
            tokens.add_metric([name], tally.generated_tokens)
            sequences.add_metric([name], tally.sequences)
        yield tokens
        yield sequences

    def _of_jobs(self) -> Iterator[Metric]:
        kinds = [job.kind for job in self._jobs]
        count = GaugeMetricFamily(f"{PREFIX}jobs", "Jobs with a lease.", labels=["kind"])
        for kind in KINDS:
            count.add_metric([kind], kinds.count(kind))
        yield count
        version = GaugeMetricFamily(
            f"{PREFIX}policy_version", "Of a job's weights.", labels=["job", "id"]
        )
        for job in self._jobs:
            version.add_metric([job.name, job.id], job.version.version)
        yield version

    def _by_name(self) -> dict[str, Tally]:
        tallies = dict(self._past)
        for job, tally in self._host.counters.by_job.items():
            name = self._jobs.names.get(job, job)
            tallies[name] = tallies.get(name, Tally()) + tally
        return tallies


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)
