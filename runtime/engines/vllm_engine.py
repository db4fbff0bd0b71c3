"""The real engine: an AsyncLLM in this process, with its engine core in a process of its own.

Only this module imports vLLM's client side. The import takes seconds, so `fleet` runs it in a thread while the
forkserver imports the engine's side.
"""

import asyncio
import signal
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import vllm.v1.engine.utils
from pydantic import ValidationError
from vllm.config import VllmConfig
from vllm.exceptions import VLLMError
from vllm.platforms import current_platform
from vllm.renderers.params import ChatParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from runtime.engines import forkserver
from runtime.engines.elastic.reports import (
    PREEMPTIONS,
    WORK,
    ResizeApplied,
    ResizeDeferred,
    ResizeRefused,
    ResizeReport,
    ResizeSuperseded,
    parse_limits,
    parse_report,
)
from runtime.engines.elastic.settings import Settings
from runtime.engines.grant import Applied, Deferred, EngineLimits, Grant, Rejected, ResizeOutcome, Superseded
from runtime.engines.handle import EngineHandle, EngineState, EngineStats, Work
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.sampling import check_limits, to_params
from runtime.engines.spec import COPIES_BLOCKS, EngineSpec
from runtime.engines.step_time import StepTime
from runtime.engines.usage import UsageMeter
from runtime.engines.vllm_config import vllm_config
from runtime.errors import Death, EngineDead, EngineError, RequestRefused

_CHAT = ChatParams(chat_template_kwargs={"add_generation_prompt": True})
_GONE = (EngineState.DEAD, EngineState.CLOSED)
_KILL_EVERY_S = 0.05

# vLLM offers only "fork", which is unsafe in a process with threads, and "spawn", which imports everything again for
# each engine. Engines come from our forkserver instead.
vllm.v1.engine.utils.get_mp_context = forkserver.context


def visible_gpus() -> tuple[int, ...]:
    """Return the GPUs that CUDA sees, in its order, by their numbers as NVML counts. None on a CPU."""
    if not current_platform.is_cuda():
        return ()
    count = current_platform.device_count()
    return tuple(current_platform.visible_device_id_to_physical_device_id(number) for number in range(count))


class VllmEngine(EngineHandle):
    """One vLLM engine.

    - `log`: the file that the engine's process writes its log to.
    - `temporary`: the folder with the socket for its start-up reports.
    - `device_bytes`: what counts as the whole device. None takes all of the device's memory.
    - `grant`: the grant that it starts with. None takes the one in its specification.
    - `step_time`: emulate a device on which a step takes this long. None runs steps as fast as they are.
    - `may_sleep`: on a GPU, hold the weights where they can leave the GPU while the process lives.
    - `starts_small`: without a `grant`, start with the smallest KV cache.
    - `device`: the numbers of the GPUs to run on, as NVML counts, or of emulated ones. Empty takes the first GPUs that
      are visible.
    """

    def __init__(
        self,
        name: str,
        spec: EngineSpec,
        log: Path,
        temporary: Path,
        device_bytes: int | None = None,
        grant: Grant | None = None,
        step_time: StepTime | None = None,
        may_sleep: bool = False,
        starts_small: bool = False,
        device: tuple[int, ...] = (),
    ) -> None:
        self.name = name
        self.spec = spec
        self.log = log
        self.usage = UsageMeter()
        self._temporary = temporary
        self._device_bytes = device_bytes
        self._step_time = step_time
        self._may_sleep = may_sleep
        self._starts_small = starts_small
        self._device = device
        self._limits: EngineLimits | None = None
        self._grant = grant
        self._kv_cache_bytes = 0
        self._resizing = asyncio.Lock()
        self._latest = LatestStats()
        self._state = EngineState.STARTING
        self._llm: AsyncLLM | None = None
        self._starting: asyncio.Future[AsyncLLM] | None = None
        self._started: list[BaseProcess] = []
        self._leaving: list[Any] = []
        self._ranks: list[psutil.Process] = []
        self._requests = self._prompt_tokens = self._completion_tokens = 0

    @property
    def state(self) -> EngineState:
        return self._state

    async def start(self) -> None:
        with forkserver.started() as self._started:
            self._starting = asyncio.ensure_future(asyncio.to_thread(self._start))
        try:
            self._llm = await asyncio.shield(self._starting)
        except asyncio.CancelledError:
            await self.close()
            raise
        except Exception as error:  # vLLM's start-up raises all kinds of errors, and each one means that it failed
            self._state = EngineState.DEAD
            raise EngineError(f"engine {self.name} did not start: {_reason(error)} (log: {self.log})") from error
        self._starting = None
        for process in self._processes():
            asyncio.get_running_loop().add_reader(process.sentinel, self._process_ended)
            self._ranks += self._children(process.pid)
        try:
            await self._take_first_grant()
        except EngineError:
            await self.close()
            raise
        self._state = EngineState.READY

    async def _take_first_grant(self) -> None:
        """Grow from the floor, with which vLLM starts the engine, to its first grant."""
        limits = parse_limits(await self._call("troupe_limits"))
        if self._device_bytes is not None:
            limits = replace(limits, device_bytes=self._device_bytes)
        self._limits = limits
        self._grant = self._first_grant(limits)
        if limits.smallest_bytes > limits.device_bytes:
            reason = (
                f"it does not fit the device even alone: it needs {limits.smallest_bytes} of {limits.device_bytes} "
                f"bytes; use a smaller model, lower engines.{self.name}.max_model_len, or raise device.memory_bytes"
            )
        else:
            outcome = await self.resize(self._grant)
            if not isinstance(outcome, Rejected):
                return
            reason = outcome.reason
        raise EngineError(f"engine {self.name} did not start: {reason} (log: {self.log})")

    def _first_grant(self, limits: EngineLimits) -> Grant:
        if self._grant is not None:  # a restart, in which `fixed_bytes` and so the floor differ a little
            floor = limits.share(limits.kv_floor_bytes)
            return replace(self._grant, gpu_memory_utilization=max(self._grant.gpu_memory_utilization, floor))
        if self._starts_small:
            return limits.smallest_grant
        kv_cache_bytes = self.spec.kv_cache_memory_bytes
        share = self.spec.gpu_memory_utilization if kv_cache_bytes is None else limits.share(kv_cache_bytes)
        return Grant(share, limits.seqs_ceiling, limits.step_tokens_ceiling)

    async def _call(self, method: str, *arguments: object) -> Any:
        """Call a method of the engine core, which runs it between two steps.

        Raises EngineError if the method fails, and EngineDead if the engine core is gone.
        """
        core = self._ready().engine_core
        try:
            return await core.call_utility_async(method, *arguments)
        except EngineDeadError as error:
            raise self._dead() from error
        except Exception as error:  # vLLM's client raises a plain Exception if the method fails
            raise EngineError(f"engine {self.name}: {method} failed: {error} (log: {self.log})") from error

    def _dead(self) -> EngineDead:
        """Mark the engine as dead, unless it was closed, and return the error to raise."""
        if self._state is not EngineState.CLOSED:
            self._state = EngineState.DEAD
        return EngineDead(f"engine {self.name} {self._death()} (log: {self.log})", self._death())

    def _death(self) -> Death:
        """Return how the engine ended. An engine that is still ending has crashed, because a signal ends it at once."""
        killed = any(process.exitcode in (-signal.SIGKILL, -signal.SIGTERM) for process in self._processes())
        return Death.KILLED if killed else Death.CRASHED

    def _start(self) -> AsyncLLM:
        llm = AsyncLLM.from_vllm_config(
            self._config(),
            stat_loggers=[lambda config, index: self._latest, NoPrometheus],
            disable_log_stats=True,
        )
        if not llm.output_processor.tracing_enabled:  # traces contain the statistics
            # The engine's process still sends the scheduler's figures. Of each token, this one keeps no statistics.
            llm.log_stats = llm.output_processor.log_stats = False
        return llm

    def _config(self) -> VllmConfig:
        if self._step_time is not None and not current_platform.is_cpu():
            raise EngineError("only engines on a CPU can emulate a device; leave out --emulate on a GPU")
        spec = self.spec
        executor = "InCoreExecutor" if spec.gpus == 1 else "RanksExecutor"
        further: dict[str, Any] = {
            "distributed_executor_backend": f"runtime.engines.elastic.executor.{executor}",
            **({"enable_cumem_allocator": True} if self._may_sleep and current_platform.is_cuda() else {}),
        }
        config = vllm_config(spec, further)
        if config.kv_transfer_config is not None:
            raise EngineError(f"{COPIES_BLOCKS}; remove what sets vLLM's kv_transfer_config")
        config.troupe_settings = Settings(
            name=self.name,
            device=min(self._device, default=0),
            log=self.log,
            temporary=self._temporary,
            ceiling_share=spec.max_gpu_memory_utilization,
            device_bytes=self._device_bytes,
            granule_bytes=int(spec.kv_granule_bytes),
            sleep_keeps_kv=spec.sleep_keeps_kv,
            step_time=self._step_time,
        )
        # The right worker and scheduler depend on the platform and the model, which are only known now.
        worker = "cuda_worker.ElasticCUDAWorker" if current_platform.is_cuda() else "cpu_worker.ElasticCPUWorker"
        scheduler = "ElasticAsyncScheduler" if config.scheduler_config.async_scheduling else "ElasticScheduler"
        config.parallel_config.worker_cls = f"runtime.engines.elastic.{worker}"
        if self._device and current_platform.is_cuda():
            config.parallel_config.assigned_physical_gpu_ids = [*self._device]
        config.scheduler_config.scheduler_cls = f"runtime.engines.elastic.scheduler.{scheduler}"
        return config

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        llm = self._ready()
        prompt_tokens = 0
        try:
            prompt = await self._rendered(llm, request)
            if request.resume_tokens:  # the reply continues after the tokens that the caller already has
                prompt = {**prompt, "prompt_token_ids": [*prompt["prompt_token_ids"], *request.resume_tokens]}
            self._requests += 1
            rank = request.rank(asyncio.get_running_loop().time())
            params = to_params(request, llm.model_config.max_model_len)
            check_limits(params, llm.input_processor.generation_config_fields, llm.renderer.get_eos_token_id())
            # vLLM warns about trace headers while it does not trace.
            headers = request.trace_headers if llm.output_processor.tracing_enabled else None
            replies = llm.generate(
                prompt, params, request.request_id, trace_headers=headers, priority=rank, **request.generate_options
            )
            async for output in replies:
                new = output.outputs[0]
                if not prompt_tokens:
                    prompt_tokens = len(output.prompt_token_ids) - len(request.resume_tokens)
                    self._prompt_tokens += prompt_tokens
                self._completion_tokens += len(new.token_ids)
                yield Chunk(
                    new.text,
                    tuple(new.token_ids),
                    time.monotonic(),
                    prompt_tokens,
                    new.finish_reason,
                    new.stop_reason,
                    tuple(new.logprobs or ()),
                    output.num_cached_tokens,
                )
        except EngineDeadError as error:
            raise self._dead() from error
        except (VLLMError, ValueError) as error:  # VLLMError is the base of vLLM's request errors
            raise RequestRefused(f"engine {self.name} refused the request: {_reason(error)}") from error

    async def _rendered(self, llm: AsyncLLM, request: GenerateRequest) -> Any:
        """Return the request's prompt in the form that vLLM takes, tokenized."""
        if request.rendered is not None:
            return request.rendered
        conversation = [{"role": m.role, "content": m.content} for m in request.messages]
        _, (prompt,) = await llm.renderer.render_chat_async([conversation], _CHAT)
        return prompt

    def _ready(self) -> AsyncLLM:
        if self._llm is None or self._state in _GONE:
            raise EngineDead(f"engine {self.name} is {self._state} (log: {self.log})", self._death())
        return self._llm

    @property
    def limits(self) -> EngineLimits:
        if self._limits is None:
            raise EngineError(f"engine {self.name} is {self._state}: its limits are known only after it has started")
        return self._limits

    async def resize(self, grant: Grant, grace_s: float = 0) -> ResizeOutcome:
        if self._limits is None or self._state in _GONE:
            return Rejected(grant, f"engine {self.name} is {self._state}")
        if violation := self._limits.violation(grant):
            return Rejected(grant, f"engine {self.name}: {violation}")
        kv_cache_bytes = self._limits.kv_cache_bytes(grant.gpu_memory_utilization)
        arguments = (kv_cache_bytes, grant.max_active_seqs, grant.max_step_tokens, grace_s, grant.preempt)
        async with self._resizing:  # a deferred shrink needs two calls that no other resize may come between
            try:
                report = parse_report(await self._call("troupe_resize", *arguments))
                if isinstance(report, ResizeRefused):
                    return Rejected(grant, f"engine {self.name}: {report.reason}")
                self._grant = grant
                if isinstance(report, ResizeDeferred):
                    self._kv_cache_bytes = report.kv_cache_bytes
                    settled = asyncio.ensure_future(self._settle(grant))
                    await asyncio.sleep(0)  # sends the second call before another resize can start
                    return Deferred(grant, report.held_bytes, grace_s, settled)
            except EngineError as error:
                return self._rejected(grant, error)
        return self._applied(grant, report)

    async def _settle(self, grant: Grant) -> Applied | Rejected | Superseded:
        try:
            report = parse_report(await self._call("troupe_settled"))
        except EngineError as error:
            return self._rejected(grant, error)
        return Superseded(grant) if isinstance(report, ResizeSuperseded) else self._applied(grant, report)

    def _rejected(self, grant: Grant, error: EngineError) -> Rejected:
        """Reject a grant because the engine is dead. If it only failed to resize, kill it: what it holds is unknown."""
        if not isinstance(error, EngineDead):
            self.kill()
        return Rejected(grant, str(error))

    def _applied(self, grant: Grant, report: ResizeReport) -> Applied:
        assert isinstance(report, ResizeApplied), report
        self._kv_cache_bytes = report.kv_cache_bytes
        if grant.preempt:
            self._latest.all_preempted()
        return Applied(
            grant,
            report.kv_cache_bytes,
            report.moved_bytes,
            report.seconds,
            report.stall_seconds,
            report.preempted,
        )

    def stats(self) -> EngineStats:
        latest = self._latest.scheduler
        return EngineStats(
            state=self._state,
            grant=self._grant,
            kv_cache_bytes=self._kv_cache_bytes,
            running=latest.num_running_reqs if latest else 0,
            waiting=latest.num_waiting_reqs if latest else 0,
            kv_cache_usage=latest.kv_cache_usage if latest else 0.0,
            preemptions=self._latest.preemptions,
            requests=self._requests,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            work=self._latest.work,
            pid=next((process.pid for process in self._processes()), None),
        )

    async def pulse(self) -> None:
        await self._call("is_scheduler_paused")  # any call shows that the engine answers

    def kill(self) -> None:
        for process in self._processes():
            process.kill()

    def _children(self, pid: int | None) -> list[psutil.Process]:
        """Return the ranks of an engine that runs on several GPUs, given its process; none for another engine."""
        if self.spec.gpus == 1:
            return []
        try:
            return psutil.Process(pid).children()
        except psutil.NoSuchProcess:
            return []

    def _processes(self) -> list[Any]:
        manager = self._llm and self._llm.engine_core.resources.engine_manager
        return list(manager.processes) if manager else []

    def _process_ended(self) -> None:
        """Fail everything that waits for the engine. vLLM itself fails only the requests that run."""
        self._state = EngineState.DEAD
        self._fail_waiters()

    def _fail_waiters(self) -> None:
        """Make everything that waits for a token or for an answer raise EngineDeadError. Stop watching the process."""
        for process in self._processes():
            asyncio.get_running_loop().remove_reader(process.sentinel)
        assert self._llm is not None
        self._llm.output_processor.propagate_error(EngineDeadError())
        for answer in self._llm.engine_core.utility_results.values():
            if not answer.done():
                answer.set_exception(EngineDeadError())

    async def sleep(self, deep: bool = False) -> None:
        self._ready()
        if deep or not self.limits.copy_bytes:
            await self.close()
            self._state = EngineState.COLD
            return
        self._kv_cache_bytes = (await self._move("troupe_sleep")).kv_cache_bytes
        self._state = EngineState.ASLEEP

    async def wake(self) -> None:
        if self._state is not EngineState.ASLEEP:
            raise EngineError(f"engine {self.name} is {self._state} and cannot wake")
        self._kv_cache_bytes = (await self._move("troupe_wake")).kv_cache_bytes
        self._grant = self.limits.smallest_grant
        self._state = EngineState.READY

    async def _move(self, method: str) -> ResizeApplied:
        """Call `troupe_sleep` or `troupe_wake`. Raise EngineError if the engine refuses or fails."""
        report = parse_report(await self._call(method))
        if isinstance(report, ResizeApplied):
            return report
        reason = report.reason if isinstance(report, ResizeRefused) else report.state
        raise EngineError(f"engine {self.name}: {method} was refused: {reason} (log: {self.log})")

    async def _end_start(self) -> None:
        """Kill a process that is still starting. The thread that waits for it cannot be cancelled; it ends then."""
        starting = self._starting
        if starting is not None:
            while not starting.done():
                while self._started:
                    process = self._started.pop()
                    self._ranks += self._children(process.pid)
                    process.kill()
                await asyncio.wait([starting], timeout=_KILL_EVERY_S)
            if self._starting is not None and not starting.exception():  # otherwise another call has closed it
                self._llm = starting.result()
            self._starting = None

    async def close(self) -> None:
        self._state = EngineState.CLOSED
        await self._end_start()
        if self._llm is not None:
            self._fail_waiters()
            self._leaving = self._processes()
            llm, self._llm = self._llm, None
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # it would report the engine's end as a failure
            await asyncio.to_thread(llm.shutdown, 0)  # kills the process, which holds nothing that would be lost
        for process in self._leaving:  # also if an earlier call was cancelled
            await asyncio.to_thread(process.join)  # its memory is free then
        while not all(map(_has_ended, self._ranks)):  # noqa: ASYNC110  the kernel tells only their parent
            await asyncio.sleep(0.01)


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class LatestStats(StatLoggerBase):  # type: ignore[misc]  # vLLM is not analysed: see pyproject.toml
    """A stat logger that keeps the scheduler's latest figures, our counts included, instead of logging them."""

    def __init__(self) -> None:
        self.scheduler: SchedulerStats | None = None
        self.preemptions = 0
        self.work = Work()

    def record(self, scheduler_stats: SchedulerStats | None, *unused: Any, **further: Any) -> None:
        if scheduler_stats:
            self.scheduler = scheduler_stats
            counts = scheduler_stats.kv_connector_stats or {}
            self.work = Work(*counts.get(WORK, ()))
            self.preemptions = counts.get(PREEMPTIONS, 0)

    def all_preempted(self) -> None:
        """Count all running requests as waiting: the engine makes no step that would report it."""
        if latest := self.scheduler:
            waiting = latest.num_waiting_reqs + latest.num_running_reqs
            self.scheduler = replace(latest, num_running_reqs=0, num_waiting_reqs=waiting, kv_cache_usage=0.0)

    def log_engine_initialized(self) -> None:
        return None


class NoPrometheus(PrometheusStatLogger):  # type: ignore[misc]  # see above
    """A Prometheus logger that registers and records nothing.

    Unless vLLM is given a subclass of its Prometheus logger, it adds one that registers metrics in a registry of the
    whole process, without a lock. Engines that start at the same time can then fail with "Duplicated timeseries".
    Troupe has metrics of its own.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        pass

    def record(self, *stats: Any, **further: Any) -> None:
        pass

    def record_admission_rejection(self, reason: str) -> None:
        pass

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
        pass

    def log_engine_initialized(self) -> None:
        pass


def _reason(error: BaseException) -> str:
    """Return an error's innermost cause in one line, because vLLM wraps the useful message several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ValidationError):
        return "; ".join(e["msg"] for e in error.errors())
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
