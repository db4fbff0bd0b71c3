"""Lists what Troupe uses of vLLM's internals, and checks that the installed vLLM has all of it.

These tests need no GPU and start no engine, so they can judge a vLLM release that Troupe does not run on yet. See
runtime/engines/README.md.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import vllm.envs

from runtime.api.http import vllm_serving
from runtime.engines import engine_client, vllm_engine
from runtime.engines.elastic import core, cpu_worker, cuda_weights, cuda_worker, executor, pool, scheduler, worker

SOURCES = (*Path(vllm_engine.__file__).parent.rglob("*.py"), Path(vllm_serving.__file__))
X: Any = object()
"""A placeholder for an argument."""


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments that our code passes."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]


def call(*positional: Any, **keywords: Any) -> Call:
    return Call(positional, keywords)


BLOCKS = "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue"
POOL = "vllm.v1.core.block_pool:BlockPool"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
WORKER = "vllm.v1.worker.gpu_worker:Worker"
CPU_WORKER = "vllm.v1.worker.cpu_worker:CPUWorker"
V1_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
V2_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
EXECUTOR = "vllm.v1.executor.abstract:Executor"
RANKS = "vllm.v1.executor.multiproc_executor:MultiprocExecutor"
CLIENT = "vllm.v1.engine.core_client:AsyncMPClient"
ASYNC_LLM = "vllm.v1.engine.async_llm:AsyncLLM"

ENGINE_ARGUMENTS = (
    "model gpu_memory_utilization kv_cache_memory_bytes max_model_len max_num_seqs dtype enforce_eager load_format"
    " structured_outputs_config distributed_executor_backend disable_log_stats scheduling_policy"
    " enable_cumem_allocator reasoning_parser language_model_only tensor_parallel_size pipeline_parallel_size"
    " prefill_context_parallel_size data_parallel_size nnodes numa_bind kv_cache_dtype"
    " kv_offloading_size kv_transfer_config"
)
"""The arguments that we pass, and those that our checks and errors of `engines.NAME.vllm` name."""
HANDLER = {
    "chat_template": X,
    "chat_template_content_format": X,
    "enable_auto_tools": X,
    "enable_prompt_tokens_details": X,
    "online_renderer": X,
    "reasoning_parser": X,
    "request_logger": X,
    "tool_parser": X,
}
"""The arguments with which we make each of vLLM's chat handlers."""
SERVING = "vllm.entrypoints.openai"
ANTHROPIC = "vllm.entrypoints.anthropic.serving:AnthropicServingMessages"
TOKENIZE = "vllm.entrypoints.serve.tokenize.serving:ServingTokenization"
SAMPLING = (
    "temperature top_p max_tokens min_tokens logprobs stop seed structured_outputs repetition_detection output_kind"
    " stream_interval"
)

CALLED = {
    # In the client's process.
    "vllm.engine.arg_utils:AsyncEngineArgs": call(**dict.fromkeys(ENGINE_ARGUMENTS.split(), X)),
    "vllm.engine.arg_utils:AsyncEngineArgs.create_engine_config": call(X),
    f"{ASYNC_LLM}.from_vllm_config": call(X, X, stat_loggers=X, disable_log_stats=X),
    f"{ASYNC_LLM}.generate": call(
        X, X, X, X, trace_headers=X, priority=X, reasoning_ended=X, reasoning_parser_kwargs=X
    ),
    f"{ASYNC_LLM}.shutdown": call(X, X),
    f"{CLIENT}.call_utility_async": call(X, X, X, X, X, X),
    "vllm.renderers.base:BaseRenderer.render_chat_async": call(X, X, X),
    "vllm.renderers.base:BaseRenderer.get_eos_token_id": call(X),
    "vllm.renderers.params:ChatParams": call(chat_template_kwargs=X),
    "vllm.sampling_params:SamplingParams": call(**dict.fromkeys(SAMPLING.split(), X)),
    "vllm.sampling_params:SamplingParams.update_from_generation_config": call(X, X, X),
    "vllm.sampling_params:StructuredOutputsParams": call(json=X),
    "vllm.sampling_params:RepetitionDetectionParams": call(max_pattern_size=X, min_count=X),
    "vllm.logprobs:Logprob": call(logprob=X, rank=X, decoded_token=X),  # as another node sends it
    "vllm.v1.engine.exceptions:EngineDeadError": call(),
    # vLLM's serving layer, over our EngineClient.
    "vllm.config:StructuredOutputsConfig": call(backend=X, disable_any_whitespace=X),
    "vllm.renderers:renderer_from_config": call(X),
    "vllm.v1.engine.input_processor:InputProcessor": call(X, X),
    "vllm.renderers.online_renderer:OnlineRenderer": call(
        X, X, **{name: X for name in HANDLER if name not in ("enable_prompt_tokens_details", "online_renderer")}
    ),
    "vllm.renderers.online_renderer:OnlineRenderer.warmup": call(X),
    f"{SERVING}.models.protocol:BaseModelPath": call(name=X, model_path=X),
    f"{SERVING}.models.serving:OpenAIServingModels": call(X, X),
    f"{SERVING}.chat_completion.serving:OpenAIServingChat": call(X, X, X, **HANDLER),
    f"{SERVING}.chat_completion.serving:OpenAIServingChat.create_chat_completion": call(X, X, X),
    f"{SERVING}.completion.serving:OpenAIServingCompletion": call(
        X, X, online_renderer=X, request_logger=X, enable_prompt_tokens_details=X
    ),
    f"{SERVING}.completion.serving:OpenAIServingCompletion.create_completion": call(X, X, X),
    f"{SERVING}.responses.serving:OpenAIServingResponses": call(X, X, **HANDLER),
    f"{SERVING}.responses.serving:OpenAIServingResponses.create_responses": call(X, X, X),
    ANTHROPIC: call(X, X, X, **HANDLER),
    f"{ANTHROPIC}.create_messages": call(X, X, X),
    f"{ANTHROPIC}.count_tokens": call(X, X, X),
    TOKENIZE: call(X, online_renderer=X, request_logger=X, chat_template=X, chat_template_content_format=X),
    f"{TOKENIZE}.create_tokenize": call(X, X, X),
    f"{TOKENIZE}.create_detokenize": call(X, X, X),
    "vllm.entrypoints.serve:create_error_response": call(X),
    "vllm.outputs:CompletionOutput": call(
        index=X, text=X, token_ids=X, cumulative_logprob=X, logprobs=X, finish_reason=X, stop_reason=X
    ),
    "vllm.outputs:RequestOutput": call(
        request_id=X,
        prompt=X,
        prompt_token_ids=X,
        prompt_logprobs=X,
        outputs=X,
        finished=X,
        num_cached_tokens=X,
    ),
    "vllm.outputs:RequestOutput.add": call(X, X, aggregate=X),
    "vllm.v1.engine.output_processor:OutputProcessor.propagate_error": call(X, X),
    "vllm.platforms.interface:Platform.is_cuda": call(X),
    "vllm.platforms.interface:Platform.is_cpu": call(X),
    "vllm.platforms.interface:Platform.visible_device_id_to_physical_device_id": call(X, X),
    # In the engine's process.
    "vllm.v1.engine.core:EngineCore.is_scheduler_paused": call(X),
    "vllm.v1.executor.uniproc_executor:UniProcExecutor._init_executor": call(X),
    f"{RANKS}._init_executor": call(X),
    f"{RANKS}._ensure_worker_termination": call([]),
    f"{RANKS}.collective_rpc": call(X, X, args=X),
    "vllm.utils.system_utils:get_mp_context": call(),
    BLOCKS: call([]),
    f"{BLOCKS}.popleft_n": call(X, X),
    f"{BLOCKS}.remove": call(X, X),
    f"{BLOCKS}.get_all_free_blocks": call(X),
    f"{POOL}._maybe_evict_cached_block": call(X, X),
    f"{POOL}._insert_block_hash": call(X, X, X, X),
    f"{POOL}.free_blocks": call(X, X),
    f"{POOL}.get_num_free_blocks": call(X),
    f"{POOL}.reset_prefix_cache": call(X),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids": call(X, X),
    f"{SCHEDULER}._preempt_request": call(X, X, X),
    f"{SCHEDULER}.get_request_counts": call(X),
    "vllm.v1.core.kv_cache_utils:get_max_concurrency_for_kv_cache_config": call(X, X),
    f"{WORKER}.determine_available_memory": call(X),
    f"{WORKER}.initialize_from_config": call(X, X),
    f"{WORKER}._maybe_get_memory_pool_context": call(X, X),
    f"{WORKER}.get_supported_kv_cache_layouts": call(X),
    f"{WORKER}.compile_or_warm_up_model": call(X),
    f"{WORKER}.execute_model": call(X, X),
    "vllm.utils.mem_utils:memory_profiling": call(X),
    "vllm.device_allocator.cumem:create_and_map": call(X),
    "vllm.device_allocator.cumem:unmap_and_release": call(X),
    "vllm.device_allocator.cumem:CuMemAllocator.get_instance": call(),
    f"{V1_RUNNER}.get_model": call(X),
    f"{V2_RUNNER}.get_model": call(X),
    "vllm.v1.worker.block_table:BlockTable.get_numpy_array": call(X),
    "vllm.utils.torch_utils:current_stream": call(),
    f"{CPU_WORKER}.init_device": call(X),
    f"{CPU_WORKER}.initialize_from_config": call(X, X),
    f"{CPU_WORKER}._maybe_get_memory_pool_context": call(X, X),
    f"{CPU_WORKER}.get_supported_kv_cache_layouts": call(X),
    f"{CPU_WORKER}.compile_or_warm_up_model": call(X),
    f"{CPU_WORKER}.execute_model": call(X, X),
    f"{CPU_WORKER}._should_warm_up_model": call(X),
    "vllm.platforms.cpu:CpuPlatform.register_triton_kernel_overrides": call(X),
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.warming_up_model": call(X),
}
"""The functions that our code calls and the arguments that it passes, `self` included."""

ELASTIC_WORKER = {
    "determine_available_memory",
    "get_supported_kv_cache_layouts",
    "initialize_from_config",
    "compile_or_warm_up_model",
    "execute_model",
    "_maybe_get_memory_pool_context",
}
OVERRIDDEN: dict[type, set[str]] = {
    vllm_engine.LatestStats: {"__init__", "record", "log_engine_initialized"},
    vllm_engine.NoPrometheus: {
        "__init__",
        "record",
        "record_admission_rejection",
        "record_sleep_state",
        "log_engine_initialized",
    },
    executor.InCoreExecutor: {"_init_executor"},
    executor.RanksExecutor: {"_init_executor", "_ensure_worker_termination"},
    pool.CompactQueue: {"__init__", "popleft", "popleft_n", "remove", "prepend_n", "get_all_free_blocks"},
    pool.ElasticBlockPool: {"__init__", "free_blocks", "_insert_block_hash", "get_usage", "reset_prefix_cache"},
    scheduler.ElasticScheduler: {"__init__", "schedule", "update_from_output", "make_stats", "_preempt_request"},
    scheduler.ElasticAsyncScheduler: {"__init__", "schedule", "update_from_output", "make_stats", "_preempt_request"},
    cpu_worker.ElasticCPUWorker: ELASTIC_WORKER | {"init_device"},
    cuda_worker.ElasticCUDAWorker: ELASTIC_WORKER,
}
"""The vLLM methods that our subclasses override, directly or through our mixins."""

CALLERS = [
    (pool.CompactQueue, "popleft_n", "free_block_queue", "vllm.v1.core.block_pool"),
    (pool.CompactQueue, "remove", "free_block_queue", "vllm.v1.core.block_pool"),
    (pool.CompactQueue, "prepend_n", "free_block_queue", "vllm.v1.core.block_pool"),
    (pool.CompactQueue, "append_n", "free_block_queue", "vllm.v1.core.block_pool"),
    (pool.ElasticBlockPool, "__init__", "BlockPool", "vllm.v1.core.kv_cache_coordinator"),
    (pool.ElasticBlockPool, "free_blocks", "pool", "vllm.v1.core.single_type_kv_cache_manager"),
    (pool.ElasticBlockPool, "_insert_block_hash", "self", "vllm.v1.core.block_pool"),
    (pool.ElasticBlockPool, "get_usage", "pool", "vllm.v1.core.kv_cache_manager"),
    (pool.ElasticBlockPool, "reset_prefix_cache", "pool", "vllm.v1.core.kv_cache_coordinator"),
    (scheduler.ElasticScheduler, "schedule", "scheduler", "vllm.v1.engine.core"),
    (scheduler.ElasticScheduler, "update_from_output", "scheduler", "vllm.v1.engine.core"),
    (scheduler.ElasticScheduler, "make_stats", "self", "vllm.v1.core.sched.scheduler"),
    (scheduler.ElasticScheduler, "_preempt_request", "self", "vllm.v1.core.sched.scheduler"),
    (worker.ElasticWorker, "_maybe_get_memory_pool_context", "self", "vllm.v1.worker.gpu_worker"),
    (worker.ElasticWorker, "initialize_from_config", "self.worker", "vllm.v1.worker.worker_base"),
    (worker.ElasticWorker, "execute_model", "self.worker", "vllm.v1.worker.worker_base"),
    (cpu_worker.ElasticCPUWorker, "execute_model", "self.worker", "vllm.v1.worker.worker_base"),
    (cpu_worker.ElasticCPUWorker, "init_device", "self.worker", "vllm.v1.worker.worker_base"),
    (executor.InCoreExecutor, "_init_executor", "self", "vllm.v1.executor.abstract"),
    (executor.RanksExecutor, "_init_executor", "self", "vllm.v1.executor.abstract"),
    (executor.RanksExecutor, "_ensure_worker_termination", "self", "vllm.v1.executor.multiproc_executor"),
    (vllm_engine.LatestStats, "record", "per_engine_stat_loggers[engine_idx]", "vllm.v1.metrics.loggers"),
    (vllm_engine.LatestStats, "log_engine_initialized", "per_engine_stat_logger", "vllm.v1.metrics.loggers"),
    (vllm_engine.NoPrometheus, "__init__", "stat_logger_factory", "vllm.v1.metrics.loggers"),
    (vllm_engine.NoPrometheus, "record", "logger", "vllm.v1.metrics.loggers"),
    (vllm_engine.NoPrometheus, "record_admission_rejection", "logger", "vllm.v1.metrics.loggers"),
    (vllm_engine.NoPrometheus, "record_sleep_state", "logger", "vllm.v1.metrics.loggers"),
    (vllm_engine.NoPrometheus, "log_engine_initialized", "logger", "vllm.v1.metrics.loggers"),
    (engine_client.EngineClient, "check_admission", "engine_client", "vllm.entrypoints.generate.base.serving"),
]
"""Calls in vLLM that reach our subclasses: the class, the method, how the receiver's expression ends, the module."""

READ = {
    # In the client's process.
    ASYNC_LLM: "engine_core input_processor log_stats model_config output_handler output_processor renderer",
    "vllm.v1.engine.output_processor:OutputProcessor": "log_stats tracing_enabled",
    "vllm.v1.engine.input_processor:InputProcessor": "generation_config_fields",
    "vllm.inputs.engine:TokensInput": "prompt prompt_token_ids",
    "vllm.sampling_params:SamplingParams": "__struct_fields__ n temperature top_p max_tokens min_tokens stop seed"
    " logprobs prompt_logprobs stream_interval stop_token_ids all_stop_token_ids allowed_token_ids logit_bias bad_words"
    " structured_outputs repetition_detection output_kind skip_clone output_text_buffer_length",
    CLIENT: "resources utility_results",
    "vllm.v1.engine.core_client:BackgroundResources": "engine_manager",
    "vllm.v1.engine.utils:CoreEngineProcManager": "processes",
    "vllm.outputs:RequestOutput": "outputs prompt_token_ids prompt_logprobs num_cached_tokens",
    "vllm.outputs:CompletionOutput": "index text token_ids finish_reason stop_reason logprobs",
    "vllm.v1.metrics.stats:SchedulerStats": "num_running_reqs num_waiting_reqs kv_cache_usage kv_connector_stats",
    "vllm.sampling_params:RequestOutputKind": "DELTA FINAL_ONLY",
    f"{SERVING}.chat_completion.protocol:ChatCompletionRequest": "model_fields model tools tool_choice",
    f"{SERVING}.completion.protocol:CompletionRequest": "model_fields model prompt",
    f"{SERVING}.responses.protocol:ResponsesRequest": "model_fields model tools tool_choice",
    f"{SERVING}.responses.protocol:ResponseCreatedEvent": "sequence_number type",
    f"{SERVING}.responses.protocol:ResponseInProgressEvent": "sequence_number type",
    f"{SERVING}.responses.protocol:ResponseCompletedEvent": "sequence_number type",
    f"{SERVING}.responses.serving:OpenAIServingResponses": "enable_store",
    "vllm.entrypoints.anthropic.protocol:AnthropicMessagesRequest": "model_fields model tools tool_choice",
    "vllm.entrypoints.anthropic.protocol:AnthropicCountTokensRequest": "model_fields model tools tool_choice",
    "vllm.entrypoints.serve.tokenize.protocol:TokenizeCompletionRequest": "model_fields model prompt",
    "vllm.entrypoints.serve.tokenize.protocol:TokenizeChatRequest": "model_fields model tools",
    "vllm.entrypoints.serve.tokenize.protocol:DetokenizeRequest": "model_fields model",
    "vllm.entrypoints.serve.engine.protocol:ErrorResponse": "error",
    "vllm.entrypoints.serve.engine.protocol:ErrorInfo": "message code param",
    # The configuration.
    "vllm.config:VllmConfig": "cache_config model_config parallel_config scheduler_config"
    " kv_transfer_config max_concurrent_batches structured_outputs_config",
    "vllm.config:CacheConfig": "block_size kv_cache_memory_bytes use_replayssm",
    "vllm.config:ModelConfig": "enable_cumem_allocator enforce_eager max_model_len",
    "vllm.config:ParallelConfig": "assigned_physical_gpu_ids worker_cls world_size",
    "vllm.config:SchedulerConfig": "async_scheduling enable_chunked_prefill max_num_batched_tokens max_num_seqs"
    " scheduler_cls watermark",
    "vllm.config:StructuredOutputsConfig": "reasoning_parser",
    # In the engine's process.
    "vllm.v1.engine.core:EngineCore": "scheduler model_executor",
    "vllm.v1.executor.uniproc_executor:UniProcExecutor": "driver_worker vllm_config",
    RANKS: "vllm_config workers",
    "vllm.v1.executor.multiproc_executor:WorkerProcHandle": "proc",
    "vllm.v1.worker.worker_base:WorkerWrapperBase": "worker",
    WORKER: "cache_config device init_snapshot local_rank model_runner parallel_config use_v2_model_runner vllm_config",
    CPU_WORKER: "cache_config device init_snapshot is_driver_worker local_rank model_runner use_v2_model_runner"
    " vllm_config",
    V1_RUNNER: "input_batch requests",
    "vllm.v1.worker.gpu_input_batch:InputBatch": "block_table num_reqs req_id_to_index",
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": "block_ids",
    "vllm.v1.worker.block_table:MultiGroupBlockTable": "block_tables",
    V2_RUNNER: "block_tables",
    "vllm.v1.worker.gpu.block_table:BlockTables": "block_tables input_block_tables",
    "vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor": "gpu",
    SCHEDULER: "kv_cache_manager scheduler_config vllm_config running prev_step_scheduled_req_ids max_model_len"
    " max_num_running_reqs max_num_active_reqs max_num_scheduled_tokens defer_block_free _pause_state"
    " deferred_waiting",
    "vllm.v1.core.sched.interface:PauseState": "PAUSED_NEW UNPAUSED",
    "vllm.v1.engine:EngineCoreOutputs": "scheduler_stats",
    "vllm.v1.core.kv_cache_manager:KVCacheManager": "block_pool usage watermark_blocks",
    POOL: "blocks free_block_queue num_gpu_blocks",
    BLOCKS: "num_free_blocks",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock": "block_id ref_cnt",
    "vllm.v1.request:Request": "request_id",
    "vllm.v1.kv_cache_layout:KVCacheLayout": "is_block_outermost is_block_compact",
    "vllm.v1.core.sched.output:SchedulerOutput": "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens"
    " total_num_scheduled_tokens scheduled_spec_decode_tokens",
    "vllm.v1.core.sched.output:NewRequestData": "block_ids",
    "vllm.v1.core.sched.output:CachedRequestData": "new_block_ids",
    "vllm.utils.mem_utils:MemoryProfilingResult": "transient_peak_headroom",
    "vllm.device_allocator.cumem:CuMemAllocator": "pointer_to_data",
    "vllm.device_allocator:AllocationData": "handle tag is_asleep",
    "vllm.v1.kv_cache_interface:KVCacheConfig": "num_blocks kv_cache_tensors",
    "vllm.v1.kv_cache_interface:KVCacheTensor": "size layers layer_stride block_stride offset",
}
"""The attributes, fields and keys that our code reads, sets or names."""

LOOKED_UP = {
    # Functions that must look up a name that we replace.
    "vllm.v1.engine.utils:CoreEngineProcManager.__init__": "get_mp_context Process",
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.__init__": "BlockPool",
    "vllm.v1.worker.utils:allocate_kv_cache": "torch zeros",
    "vllm.v1.worker.worker_base:WorkerWrapperBase.init_worker": "register_triton_kernel_overrides"
    " resolve_obj_by_qualname worker_cls",
    # Functions that must load our classes, or leave them in place.
    f"{EXECUTOR}.get_class": "resolve_obj_by_qualname distributed_executor_backend",
    "vllm.config:SchedulerConfig.get_scheduler_cls": "resolve_obj_by_qualname scheduler_cls",
    "vllm.platforms.cpu:CpuPlatform.check_and_update_config": "distributed_executor_backend uni worker_cls auto",
    # Functions that must call our methods or read our limits.
    f"{EXECUTOR}.determine_available_memory": "collective_rpc determine_available_memory",
    f"{EXECUTOR}.get_supported_kv_cache_layouts": "collective_rpc get_supported_kv_cache_layouts",
    f"{EXECUTOR}.initialize_from_config": "collective_rpc initialize_from_config",
    f"{EXECUTOR}.compile_or_warm_up_model": "collective_rpc compile_or_warm_up_model",
    f"{RANKS}.collective_rpc": "cloudpickle dumps",
    "vllm.v1.executor.multiproc_executor:WorkerProc._execute_worker_rpc": "cloudpickle loads partial worker",
    f"{WORKER}.init_device": "assigned_physical_gpu_ids set_assigned_physical_gpu_ids",
    f"{WORKER}.determine_available_memory": "kv_cache_memory_bytes profile_run",
    "vllm.v1.engine.core:EngineCoreProc._handle_client_request": "getattr _invoke_utility_method",
    "vllm.v1.engine.core:EngineCoreProc._invoke_utility_method": "Future add_done_callback",
    "vllm.v1.engine.core:EngineCore.step": "update_from_output",
    "vllm.v1.engine.core:EngineCore.step_with_batch_queue": "update_from_output",
    f"{RANKS}._init_executor": "get_mp_context OMPProcessManager _ensure_worker_termination",
    f"{RANKS}.shutdown": "_ensure_worker_termination",
    "vllm.v1.executor.multiproc_executor:WorkerProc.__init__": "WorkerWrapperBase",  # our functions get one
    f"{WORKER}.initialize_from_config": "_maybe_get_memory_pool_context kv_cache initialize_kv_cache",
    f"{WORKER}.load_model": f"_maybe_get_memory_pool_context {cuda_weights.TAG}",
    f"{WORKER}._maybe_get_memory_pool_context": "enable_cumem_allocator use_memory_pool",
    f"{V1_RUNNER}.initialize_kv_cache_tensors": "allocate_kv_cache",
    # Functions that must take block ids from the tables in which we replace released ones, at every step.
    f"{V1_RUNNER}._update_states": "block_ids input_batch append_row",
    f"{V1_RUNNER}._prepare_inputs": "block_table commit_block_table",
    "vllm.v1.worker.gpu_input_batch:InputBatch.add_request": "block_ids add_row",
    f"{V2_RUNNER}.execute_model": "block_tables apply_staged_writes",
    f"{V2_RUNNER}.prepare_attn": "block_tables gather_block_tables",
    "vllm.v1.worker.gpu.attn_utils:init_kv_cache": "allocate_kv_cache",
    "vllm.v1.engine.core:EngineCore._initialize_kv_caches": "determine_available_memory get_supported_kv_cache_layouts"
    " initialize_from_config compile_or_warm_up_model",
    f"{WORKER}.compile_or_warm_up_model": "execute_model",
    f"{SCHEDULER}.schedule": "max_num_active_reqs max_num_scheduled_tokens _pause_state UNPAUSED",
    f"{SCHEDULER}.get_num_unfinished_requests": "_pause_state PAUSED_NEW",  # so that a paused engine core waits
    f"{SCHEDULER}._preempt_request": "waiting prepend_request",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots": "watermark_blocks",
    f"{POOL}.get_new_blocks": "popleft_n _maybe_evict_cached_block",
    f"{POOL}.touch": "remove",
    f"{POOL}.free_blocks": "prepend_n append_n",
    f"{POOL}.reset_prefix_cache": "num_gpu_blocks get_num_free_blocks",
    # Functions that name the files in shared memory which we delete.
    f"{CPU_WORKER}.init_device": "environ VLLM_DIST_IDENT",
    "vllm.distributed.device_communicators.cpu_communicator:_CPUSHMDistributed.make_group_name": "VLLM_DIST_IDENT",
    "vllm.distributed.device_communicators.shm_broadcast:ShmRingBuffer.__init__": "SharedMemory",
}
"""vLLM functions and the names (globals, attributes, methods) and strings that they must use so that our code works."""

VARIABLES = (
    "VLLM_ALLOW_INSECURE_SERIALIZATION VLLM_CONFIGURE_LOGGING VLLM_CPU_OMP_THREADS_BIND VLLM_ENGINE_READY_TIMEOUT_S"
    " VLLM_KV_CACHE_LAYOUT VLLM_NO_USAGE_STATS VLLM_RPC_BASE_PATH VLLM_WORKER_MULTIPROC_METHOD"
)
"""The environment variables that our code sets, or whose effect it expects."""
ADDED = ("troupe_limits", "troupe_resize", "troupe_settled", "troupe_sleep", "troupe_wake")
"""The methods that `core.install` adds to EngineCore."""
ATTACHED = {
    "vllm.config:VllmConfig": "troupe_settings",
    "vllm.v1.core.sched.output:SchedulerOutput": "troupe_began_s",
    "vllm.v1.engine.core:EngineCore": "_troupe_resizer",
}
"""The attributes that we attach to vLLM's objects."""


def look_up(place: str) -> Any:
    """Return the object at "module:Qualified.name"."""
    module, _, name = place.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part) if isinstance(found, type) else getattr(found, part)
    return plain(found)


def plain(thing: Any) -> Any:
    """Return the function in a class method or a static method, and anything else unchanged."""
    return thing.__func__ if isinstance(thing, classmethod | staticmethod) else thing


def imports() -> Iterator[str]:
    """Yield what our sources import from vLLM, as "module:name" or "module"."""
    for path in sorted(SOURCES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                yield from (f"{node.module}:{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "vllm")


@cache
def syntax(thing: Any) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(thing)))


def attributes(cls: type) -> set[str]:
    """Return the names of the class, its annotations, and what its methods assign to `self`."""
    found = set(dir(cls))
    for base in cls.__mro__:
        found |= {*vars(base), *inspect.get_annotations(base)}  # `dir` omits the properties of an enum
        if base.__module__.startswith("vllm"):
            found |= {
                node.attr
                for node in ast.walk(syntax(base))
                if isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            }
    return found


def names_used(code: CodeType) -> set[str]:
    """Return the globals, attributes, methods and strings that a function and its inner functions use."""
    inner = (names_used(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    strings = (constant for constant in code.co_consts if isinstance(constant, str))
    return {*code.co_names, *strings}.union(*inner)


def base_method(cls: type, name: str) -> Any:
    """Return the vLLM method that the class overrides, or None if vLLM has no method of that name."""
    theirs = (base for base in cls.__mro__ if base.__module__.startswith("vllm"))
    return next((plain(base.__dict__[name]) for base in theirs if name in base.__dict__), None)


def replaced(cls: type) -> set[str]:
    """Return the names of the vLLM methods that one of our classes overrides."""
    first = next(index for index, base in enumerate(cls.__mro__) if base.__module__.startswith("vllm"))
    members = (member for base in cls.__mro__[:first] for member in vars(base).items())
    ours = {name for name, value in members if inspect.isfunction(plain(value))}
    return {name for name in ours if inspect.isfunction(base_method(cls, name))}


def calls_in(module: str, method: str, receiver: str) -> Iterator[ast.Call]:
    """Yield the calls `<...receiver>.method(...)` in a module, or `receiver(...)` for __init__."""
    for node in ast.walk(syntax(importlib.import_module(module))):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Name(id=name) if method == "__init__" and name == receiver:
                yield node
            case ast.Attribute(value=value, attr=name) if name == method and ast.unparse(value).endswith(receiver):
                yield node


@pytest.mark.parametrize("place", sorted(set(imports())))
def test_imported_names_exist(place: str) -> None:
    look_up(place) if ":" in place else importlib.import_module(place)


@pytest.mark.parametrize("place", CALLED)
def test_called_functions_accept_our_arguments(place: str) -> None:
    passed = CALLED[place]
    inspect.signature(look_up(place)).bind(*passed.positional, **passed.keywords)


@pytest.mark.parametrize("cls", OVERRIDDEN, ids=lambda cls: cls.__name__)
def test_overridden_methods_exist_and_are_all_listed(cls: type) -> None:
    assert replaced(cls) == OVERRIDDEN[cls]
    assert not getattr(cls, "__abstractmethods__", ()), "our class lacks an abstract method of vLLM"


@pytest.mark.parametrize(
    ("cls", "method"), [(cls, name) for cls, names in OVERRIDDEN.items() for name in sorted(names - {"__init__"})]
)
def test_overrides_take_the_arguments_of_vllms_methods(cls: type, method: str) -> None:
    theirs = [
        parameter
        for parameter in inspect.signature(base_method(cls, method)).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    positional = [X for parameter in theirs if parameter.kind is not parameter.KEYWORD_ONLY]
    keywords = {parameter.name: X for parameter in theirs if parameter.kind is parameter.KEYWORD_ONLY}
    inspect.signature(getattr(cls, method)).bind(*positional, **keywords)
    required = [X for p in theirs if p.default is p.empty and p.kind is not p.KEYWORD_ONLY]
    inspect.signature(getattr(cls, method)).bind(*required)


@pytest.mark.parametrize(("cls", "method", "receiver", "module"), CALLERS)
def test_overrides_accept_what_vllm_passes(cls: type, method: str, receiver: str, module: str) -> None:
    found = list(calls_in(module, method, receiver))
    assert found, f"{module} no longer calls {receiver}.{method}"
    for node in found:
        assert not any(isinstance(argument, ast.Starred) for argument in node.args)
        keywords = {str(keyword.arg): X for keyword in node.keywords}
        owner = () if isinstance(inspect.getattr_static(cls, method), staticmethod) else (X,)
        inspect.signature(getattr(cls, method)).bind(*owner, *(X for _ in node.args), **keywords)


def test_vllm_makes_a_stat_logger_from_the_configuration_and_the_engines_index() -> None:
    found = list(calls_in("vllm.v1.metrics.loggers", "__init__", "per_engine_stat_logger_factory"))
    assert [[ast.unparse(argument) for argument in node.args] for node in found] == [["vllm_config", "engine_index"]]
    assert not found[0].keywords


def test_cuda_platform_counts_its_devices() -> None:
    found = importlib.util.find_spec("vllm.platforms.cuda")  # only a CUDA build on a GPU can import it
    assert found is not None
    methods = [
        node
        for node in ast.walk(ast.parse(Path(str(found.origin)).read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "device_count"
    ]
    assert methods
    assert all(len(node.args.args) == 1 for node in methods), "our call passes no arguments"


@pytest.mark.parametrize("place", READ)
def test_used_attributes_exist(place: str) -> None:
    assert set(READ[place].split()) - attributes(look_up(place)) == set()


@pytest.mark.parametrize("place", LOOKED_UP)
def test_vllm_looks_up_the_names_that_we_replace(place: str) -> None:
    assert set(LOOKED_UP[place].split()) - names_used(inspect.unwrap(look_up(place)).__code__) == set()


@pytest.mark.parametrize(
    "module",
    [
        "vllm.entrypoints.generate.base.serving",
        f"{SERVING}.chat_completion.serving",
        f"{SERVING}.completion.serving",
        f"{SERVING}.models.serving",
        f"{SERVING}.responses.serving",
        "vllm.entrypoints.anthropic.serving",
        "vllm.entrypoints.serve.engine.serving",
        "vllm.entrypoints.serve.tokenize.serving",
    ],
)
def test_handlers_use_only_what_our_engine_client_has(module: str) -> None:
    used = {
        node.attr
        for node in ast.walk(syntax(importlib.import_module(module)))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("engine_client")
    }
    ours = attributes(engine_client.EngineClient) | {"vllm_config", "model_config", "renderer", "input_processor"}
    # A dead engine's error, LoRA adapters, and hand-overs between servers do not occur here.
    assert used - ours <= {"dead_error", "add_lora", "notify_kv_transfer_request_rejected"}


@pytest.mark.parametrize("module", ["chat_completion", "completion", "responses"])
def test_our_engine_client_accepts_what_handlers_pass(module: str) -> None:
    found = list(calls_in(f"{SERVING}.{module}.serving", "generate", "engine_client"))
    assert found
    for node in found:
        keywords = {str(keyword.arg): X for keyword in node.keywords if keyword.arg}
        inspect.signature(engine_client.EngineClient.generate).bind(X, *(X for _ in node.args), **keywords)


def test_refused_keys_are_keys_of_vllms_requests() -> None:
    keys = {key for api in vllm_serving.ROUTES.values() for cls in api.classes for key in cls.model_fields}
    assert vllm_serving.REFUSED - keys == set()


def test_vllm_reads_the_environment_variables_that_we_use() -> None:
    assert set(VARIABLES.split()) - set(vllm.envs.environment_variables) == set()


def test_added_engine_core_methods_replace_nothing() -> None:
    engine_core = look_up("vllm.v1.engine.core:EngineCore")
    before = {name: getattr(engine_core, name, None) for name in ADDED}
    core.install()
    assert {name for name in vars(engine_core) if name.startswith("troupe_")} == set(ADDED)
    assert all(method is None or method.__module__ == core.__name__ for method in before.values())


@pytest.mark.parametrize("place", ATTACHED)
def test_attached_attributes_are_possible_and_replace_nothing(place: str) -> None:
    cls = look_up(place)
    assert cls.__dictoffset__, "objects of a class with slots take no further attributes"
    assert ATTACHED[place] not in attributes(cls)


def test_workers_keep_vllms_allocation_of_the_cache() -> None:
    ours = cpu_worker.ElasticCPUWorker, cuda_worker.ElasticCUDAWorker
    stock = look_up(f"{WORKER}.initialize_from_config")
    assert [base_method(cls, "initialize_from_config") for cls in ours] == [stock, stock]
