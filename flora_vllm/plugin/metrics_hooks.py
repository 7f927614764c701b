"""Rows of hook_table.py: what vLLM's frontend keeps of a request, and what it counts and tells of it."""

from flora_vllm.plugin.hook import Hook

_OUTPUT = "vllm.v1.engine.output_processor"
_STATS = "vllm.v1.metrics.stats"

METRICS_HOOKS = (
    Hook(f"{_OUTPUT}:OutputProcessor.__init__", ("self",), sets=("request_states",)),
    Hook(f"{_OUTPUT}:OutputProcessor.process_outputs", ("self", "engine_core_outputs")),
    Hook(f"{_OUTPUT}:OutputProcessor.do_tracing", ("self", "engine_core_output", "req_state", "iteration_stats")),
    Hook(f"{_OUTPUT}:instrument_manual", ("attributes",)),
    Hook(
        f"{_OUTPUT}:OutputProcessor._update_stats_from_output",
        ("self", "req_state", "engine_core_output", "engine_core_timestamp", "iteration_stats"),
    ),
    Hook(
        f"{_OUTPUT}:OutputProcessor._update_stats_from_finished",
        ("self", "req_state", "finish_reason", "iteration_stats"),
    ),
    Hook(f"{_OUTPUT}:RequestOutputCollector.put", ("self", "output")),
    Hook(
        f"{_OUTPUT}:RequestState.__init__",
        ("self",),
        sets=("lora_name", "lora_request", "queue", "detokenizer", "is_prefilling", "stats"),
    ),
    Hook(f"{_STATS}:RequestStateStats.first_token_latency"),
    Hook(f"{_STATS}:PrefillStats.num_prompt_tokens"),
    Hook(f"{_STATS}:IterationStats.__init__", ("self",), sets=("iteration_timestamp",)),
    Hook("vllm.v1.engine:EngineCoreOutput.new_token_ids"),
    Hook("vllm.v1.engine:EngineCoreOutput.prefill_stats"),
    Hook("vllm.v1.metrics.loggers:PrometheusStatLogger.__init__", ("self", "vllm_config"), sets=("gauge_lora_info",)),
)
