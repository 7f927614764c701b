"""Rows of hook_table.py: vLLM's scheduler, its queues and its requests."""

from flora_vllm.plugin.hook import Hook

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_REQUEST = "vllm.v1.request"

SCHEDULER_HOOKS = (
    Hook(
        f"{_SCHEDULER}.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    Hook(f"{_SCHEDULER}.finish_requests", ("self", "request_ids", "finished_status")),
    Hook(
        f"{_SCHEDULER}.__init__",
        ("self",),
        sets=(
            "requests",
            "kv_cache_manager",
            "encoder_cache_manager",
            "vllm_config",
            "policy",
            "running",
            "waiting",
            "connector",
        ),
    ),
    Hook(f"{_SCHEDULER}.schedule", ("self",)),
    Hook(f"{_SCHEDULER}.reset_connector_cache", ("self",)),
    Hook("vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.reset_cache", ("self",)),
    Hook(f"{_SCHEDULER}.has_requests", ("self",)),
    Hook(f"{_SCHEDULER}._handle_blocked_waiting_request", ("self", "request")),
    Hook("vllm.v1.core.sched.request_queue:SchedulingPolicy.FCFS"),
    *(
        Hook(f"vllm.v1.core.sched.request_queue:RequestQueue.{name}", ("self", *given))
        for name, given in {
            "add_request": ("request",),
            "prepend_request": ("request",),
            "prepend_requests": ("requests",),
            "peek_request": (),
            "pop_request": (),
            "remove_request": ("request",),
            "remove_requests": ("requests",),
        }.items()
    ),
    Hook("vllm.v1.core.sched.output:SchedulerOutput.num_scheduled_tokens"),
    Hook("vllm.v1.engine.async_llm:AsyncLLM._add_request", ("self", "request")),
    Hook("vllm.v1.engine:EngineCoreRequest.trace_headers"),
    Hook(f"{_REQUEST}:RequestStatus.FINISHED_ERROR"),
    Hook(f"{_REQUEST}:RequestStatus.WAITING"),
    Hook(f"{_REQUEST}:RequestStatus.PREEMPTED"),
    Hook(f"{_REQUEST}:RequestStatus.RUNNING"),
    Hook(f"{_REQUEST}:Request.num_output_tokens"),
    Hook(f"{_REQUEST}:Request.num_tokens"),
    Hook(f"{_REQUEST}:Request.get_finished_reason", ("self",)),
    Hook(f"{_REQUEST}:Request.take_events", ("self",)),
    Hook(
        f"{_REQUEST}:Request.__init__",
        ("self",),
        sets=(
            "lora_request",
            "mm_features",
            "prompt_token_ids",
            "_block_hasher",
            "arrival_time",
            "trace_headers",
            "max_tokens",
            "num_computed_tokens",
            "status",
        ),
    ),
    Hook("vllm.v1.core.kv_cache_manager:KVCacheManager.__init__", ("self",), sets=("block_pool",)),
    Hook("vllm.v1.core.block_pool:BlockPool.__init__", ("self",), sets=("blocks", "null_block")),
    Hook("vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids", ("self", "request_id")),
    Hook("vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks", ("self", "block_ids")),
)
