"""Metrics for Prometheus: vLLM's names for what vLLM measures, and the prefix `troupe:` for everything else."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.control.snapshot import Snapshot
from runtime.devices.controllers import Controllers
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.request import Chunk
from runtime.events import CallEnded, Event, JobEnded
from runtime.jobs.job import JobState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_JOB_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_TTFT = ("vllm:time_to_first_token_seconds", "Time to first token in seconds.")
_E2EL = ("vllm:e2e_request_latency_seconds", "End-to-end request latency in seconds.")
_JOB = ("troupe:job_seconds", "Time that the service worked on a job, in seconds. Each attempt counts.")


class RequestTimer:
    """The start of a request and the time of its first chunk, in time.monotonic seconds."""

    def __init__(self) -> None:
        self.start_s = time.monotonic()
        self.first_chunk_s: float | None = None

    def record(self, chunk: Chunk) -> None:
        """Note the time of a chunk if it is the first."""
        if self.first_chunk_s is None:
            self.first_chunk_s = chunk.time_s


class Metrics(Collector):
    """Latency histograms, and gauges and counters that are read from engines, jobs and controller on each scrape.

    Set `engines` and `controllers` once they are up.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._ttft = Histogram(*_TTFT, ["model_name"], registry=self._registry, buckets=_BUCKETS_S)
        self._e2el = Histogram(*_E2EL, ["model_name"], registry=self._registry, buckets=_BUCKETS_S)
        self._job = Histogram(*_JOB, registry=self._registry, buckets=_JOB_BUCKETS_S)
        self._registry.register(self)
        self.engines: Mapping[str, EngineHandle] = {}
        self.controllers: Controllers | None = None
        self._jobs: Mapping[JobState, int] = {}
        self._ended: Mapping[JobState, int] = {}

    def on_event(self, event: Event) -> None:
        """Record the duration of a job, and the latency of its calls to engines."""
        match event:
            case CallEnded() if event.chunk_times_s:
                self._ttft.labels(event.engine).observe(event.chunk_times_s[0] - event.asked_s)
                self._e2el.labels(event.engine).observe(event.chunk_times_s[-1] - event.asked_s)
            case JobEnded():
                self._job.observe(event.seconds)

    @contextmanager
    def timed_request(self, engine: str) -> Iterator[RequestTimer]:
        """Record the latency of a request that belongs to no job, if it produced a token."""
        timer = RequestTimer()
        try:
            yield timer
        finally:
            if timer.first_chunk_s is not None:
                self._ttft.labels(engine).observe(timer.first_chunk_s - timer.start_s)
                self._e2el.labels(engine).observe(time.monotonic() - timer.start_s)

    def text(self, jobs: Mapping[JobState, int], ended: Mapping[JobState, int]) -> bytes:
        """Return all metrics in Prometheus' text format.

        `jobs` counts the jobs in the journal by state; `ended` counts those that ended since the service started.
        """
        self._jobs, self._ended = jobs, ended
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the current gauges and counters."""
        yield from self._of_engines()
        if self.controllers is not None:
            yield from _of_snapshots(self.controllers.snapshots)
        jobs = GaugeMetricFamily("troupe:jobs", "Jobs in the journal by state.", labels=["state"])
        for state, count in self._jobs.items():
            jobs.add_metric([str(state)], count)
        yield jobs
        ended = CounterMetricFamily("troupe:jobs_ended", "Jobs that ended, by state.", labels=["state"])
        for state, count in self._ended.items():
            ended.add_metric([str(state)], count)
        yield ended
        if self.controllers is not None:
            counts = self.controllers.counts
            for name, help_text, value in (
                ("decisions", "Decisions of the controllers.", counts.decisions),
                ("decision_faults", "Decisions that failed.", counts.faults),
                ("resizes", "Grants that engines applied.", counts.resizes),
                ("resizes_rejected", "Grants that engines rejected.", counts.rejected),
                ("moved_bytes", "Bytes of memory moved.", counts.moved_bytes),
            ):
                yield CounterMetricFamily(f"troupe:{name}", help_text, value)

    def _of_engines(self) -> Iterator[Metric]:
        gauges = {
            "vllm:num_requests_running": "Requests that the engine is running.",
            "vllm:num_requests_waiting": "Requests that wait for the engine.",
            "vllm:kv_cache_usage_perc": "KV-cache usage; 1 means 100 percent.",
            "troupe:engine_up": "1 if the engine is ready, else 0.",
            "troupe:engine_wake_seconds": "How long the engine takes to wake.",
            "troupe:gpu_memory_utilization": "The engine's share of the device.",
            "troupe:kv_cache_bytes": "Size of the engine's KV cache in bytes.",
        }
        counters = {
            "vllm:num_preemptions": "Preempted requests.",
            "vllm:prompt_tokens": "Prompt tokens.",
            "vllm:generation_tokens": "Generated tokens.",
            "troupe:engine_held_requests": "Requests that arrived while the engine slept or woke.",
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
                "troupe:engine_wake_seconds": stats.wake_s,
                "troupe:gpu_memory_utilization": stats.grant.gpu_memory_utilization if stats.grant else 0,
                "troupe:kv_cache_bytes": stats.kv_cache_bytes,
                "vllm:num_preemptions": stats.preemptions,
                "vllm:prompt_tokens": stats.prompt_tokens,
                "vllm:generation_tokens": stats.completion_tokens,
                "troupe:engine_held_requests": stats.held,
            }
            for family, value in values.items():
                families[family].add_metric([name], value)
        yield from families.values()
        yield from self._of_memory()

    def _of_memory(self) -> Iterator[Metric]:
        """Yield how long each engine was resident, waking and asleep, and what it held meanwhile."""
        labels = ["model_name", "held"]
        seconds = CounterMetricFamily("troupe:engine_seconds", "Seconds in each state of its memory.", labels=labels)
        byte_seconds = CounterMetricFamily(
            "troupe:engine_byte_seconds", "Bytes held, on all GPUs of the engine, times seconds.", labels=labels
        )
        for name, engine in self.engines.items():
            for held, spent in engine.usage.spent().items():
                seconds.add_metric([name, held], spent.seconds)
                byte_seconds.add_metric([name, held], spent.byte_seconds)
        yield seconds
        yield byte_seconds


def _of_snapshots(snapshots: Mapping[str, Snapshot]) -> Iterator[Metric]:
    """Yield what the controllers measure: pauses, costs and utilization. A value that is not reported has no sample."""
    of_device = {
        "troupe:lanes": "How many engines the device serves at full speed at once.",
        "troupe:lanes_confidence": "The measured part of troupe:lanes, from 0 (assumed) to 1.",
        "troupe:device_utilization": "The device's utilization, from 0 to 1.",
        "troupe:device_memory_bytes": "Size of the device's memory in bytes.",
        "troupe:device_memory_used_bytes": "Used memory of the device in bytes, other processes included.",
    }
    of_engine = {
        "troupe:max_active_seqs": "Requests that the engine may run at once; 0 if its admission is paused.",
        "troupe:admission_paused_seconds": "How long the engine's admission has been paused; 0 if it is not.",
        "troupe:step_seconds": "Time of a step without its sequences and prompt tokens.",
        "troupe:step_seconds_per_sequence": "Time that each sequence adds to a step.",
        "troupe:step_seconds_per_prompt_token": "Time that each prompt token adds to a step.",
        "troupe:step_seconds_confidence": "The measured part of a step's times, from 0 (assumed) to 1.",
        "troupe:engine_utilization": "The part of the time in which the engine used the GPU, from 0 to 1.",
    }
    families = {name: GaugeMetricFamily(name, text, labels=["device"]) for name, text in of_device.items()}
    families |= {name: GaugeMetricFamily(name, text, labels=["model_name"]) for name, text in of_engine.items()}
    for device, snapshot in snapshots.items():
        measured = {
            "troupe:lanes": snapshot.lanes,
            "troupe:lanes_confidence": snapshot.lanes_confidence,
            "troupe:device_utilization": snapshot.device.utilization,
        }
        if snapshot.device.total_bytes:  # otherwise there is no reading of the device
            measured["troupe:device_memory_bytes"] = snapshot.device.total_bytes
            measured["troupe:device_memory_used_bytes"] = snapshot.device.used_bytes
        _add(families, device, measured)
        for view in snapshot.views:
            values = {
                "troupe:max_active_seqs": view.grant.max_active_seqs,
                "troupe:admission_paused_seconds": view.paused_s,
                "troupe:step_seconds": view.cost.step_s,
                "troupe:step_seconds_per_sequence": view.cost.sequence_s,
                "troupe:step_seconds_per_prompt_token": view.cost.prompt_token_s,
                "troupe:step_seconds_confidence": view.cost.confidence,
                "troupe:engine_utilization": view.utilization,
            }
            _add(families, view.name, values)
    yield from families.values()


def _add(families: Mapping[str, GaugeMetricFamily], label: str, values: Mapping[str, float | None]) -> None:
    for name, value in values.items():
        if value is not None:
            families[name].add_metric([label], value)
