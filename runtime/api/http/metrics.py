"""Figures for Prometheus: vLLM's names where it has them, `troupe:` for what it has not."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.control.controller import Controller
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.request import Chunk
from runtime.events import CallEnded, Event
from runtime.jobs.job import JobState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TTFT = ("vllm:time_to_first_token_seconds", "Seconds until a request's first token.")
_E2EL = ("vllm:e2e_request_latency_seconds", "Seconds until a request's last token.")


class Timed:
    """One request on its way."""

    def __init__(self) -> None:
        self.asked_s = time.monotonic()
        self.first_s: float | None = None

    def chunk(self, chunk: Chunk) -> None:
        """Tokens have come."""
        if self.first_s is None:
            self.first_s = chunk.time_s


class Metrics(Collector):
    """What has been timed, and what engines, jobs and controller say when they are asked."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._ttft = Histogram(*_TTFT, ["model_name"], registry=self._registry, buckets=_SECONDS)
        self._e2el = Histogram(*_E2EL, ["model_name"], registry=self._registry, buckets=_SECONDS)
        self._registry.register(self)
        self.engines: Mapping[str, EngineHandle] = {}
        self.controller: Controller | None = None
        self.jobs: Mapping[JobState, int] = {}

    def hear(self, event: Event) -> None:
        """A listener: the calls of jobs."""
        if isinstance(event, CallEnded) and event.chunk_times_s:
            self._ttft.labels(event.engine).observe(event.chunk_times_s[0] - event.asked_s)
            self._e2el.labels(event.engine).observe(event.chunk_times_s[-1] - event.asked_s)

    @contextmanager
    def request(self, engine: str) -> Iterator[Timed]:
        """Time a request that is no job's."""
        timed = Timed()
        try:
            yield timed
        finally:
            if timed.first_s is not None:
                self._ttft.labels(engine).observe(timed.first_s - timed.asked_s)
                self._e2el.labels(engine).observe(time.monotonic() - timed.asked_s)

    def text(self, jobs: Mapping[JobState, int]) -> bytes:
        """All of it, in Prometheus' text format; `jobs` by their state."""
        self.jobs = jobs
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What is asked for at the moment."""
        yield from self._of_engines()
        jobs = GaugeMetricFamily("troupe:jobs", "Jobs in the journal by state.", labels=["state"])
        for state, count in self.jobs.items():
            jobs.add_metric([str(state)], count)
        yield jobs
        if self.controller is not None:
            counts = self.controller.counts
            for name, help_text, value in (
                ("decisions", "Decisions of the controller.", counts.decisions),
                ("decision_faults", "Decisions that a policy got wrong.", counts.faults),
                ("resizes", "Grants that engines took.", counts.resizes),
                ("resizes_rejected", "Grants that engines refused.", counts.rejected),
                ("moved_bytes", "Memory that was moved.", counts.moved_bytes),
            ):
                yield CounterMetricFamily(f"troupe:{name}", help_text, value)

    def _of_engines(self) -> Iterator[Metric]:
        gauges = {
            "vllm:num_requests_running": "Requests that an engine runs.",
            "vllm:num_requests_waiting": "Requests that wait for an engine.",
            "vllm:kv_cache_usage_perc": "Part of the KV cache that is in use, 1 being all.",
            "troupe:engine_up": "Whether an engine serves.",
            "troupe:gpu_memory_utilization": "An engine's share of the device.",
            "troupe:kv_cache_bytes": "An engine's KV cache.",
        }
        counters = {
            "vllm:num_preemptions": "Requests that had to give way.",
            "vllm:prompt_tokens": "Tokens of prompts.",
            "vllm:generation_tokens": "Tokens of replies.",
        }
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
            **{name: GaugeMetricFamily(name, text, labels=["model_name"]) for name, text in gauges.items()},
            **{name: CounterMetricFamily(name, text, labels=["model_name"]) for name, text in counters.items()},
        }
        for name, engine in self.engines.items():
            stats = engine.stats()
            values = {
                "vllm:num_requests_running": stats.running,
                "vllm:num_requests_waiting": stats.waiting,
                "vllm:kv_cache_usage_perc": stats.kv_cache_usage,
                "troupe:engine_up": int(stats.state is EngineState.READY),
                "troupe:gpu_memory_utilization": stats.grant.gpu_memory_utilization if stats.grant else 0,
                "troupe:kv_cache_bytes": stats.kv_cache_bytes,
                "vllm:num_preemptions": stats.preemptions,
                "vllm:prompt_tokens": stats.prompt_tokens,
                "vllm:generation_tokens": stats.completion_tokens,
            }
            for family, value in values.items():
                families[family].add_metric([name], value)
        yield from families.values()
