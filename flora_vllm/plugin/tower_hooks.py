"""Rows of hook_table.py: vLLM's encoder runs, whose each of their items is, and what their outputs are kept by."""

from flora_vllm.plugin.hook import Hook

_RUN, _RUNNER = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.mm.encoder_runner"
_BUDGET = "vllm.multimodal.encoder_budget:MultiModalBudget"
_MODEL = "vllm.model_executor.models.interfaces:SupportsMultiModal"

TOWER_HOOKS = (
    Hook("vllm.config.lora:LoRAConfig.enable_tower_connector_lora"),
    Hook("vllm.v1.engine.input_processor:InputProcessor._get_mm_identifier", ("self", "mm_hash", "lora_request")),
    Hook("vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.supports_tower_connector_lora", ("self",)),
    Hook("vllm.lora.layers:LoRAMappingType.TOWER"),
    Hook("vllm.lora.layers:LoRAMappingType.CONNECTOR"),
    Hook("vllm.model_executor.models.module_mapping:MultiModelKeys.tower_model"),
    Hook("vllm.model_executor.models.module_mapping:MultiModelKeys.connector"),
    Hook(f"{_MODEL}.get_mm_lora_token_counts", ("self", "modality", "mm_kwargs", "num_mm_embeds")),
    Hook(f"{_MODEL}.supports_tower_connector_lora"),
    Hook(f"{_MODEL}.embed_multimodal", ("self",)),
    Hook(f"{_RUN}:GPUModelRunner._execute_mm_encoder", ("self", "scheduler_output")),
    Hook(f"{_RUN}:group_and_batch_mm_kwargs", ("mm_kwargs",)),
    Hook(f"{_RUNNER}:group_and_batch_mm_kwargs", ("mm_kwargs",)),
    Hook(f"{_RUNNER}:EncoderRunner.prepare_mm_inputs", ("self", "scheduled_encoder_inputs")),
    Hook(f"{_RUNNER}:EncoderRunner.execute_mm_encoder", ("self", "mm_kwargs")),
    Hook(
        "vllm.v1.worker.gpu.mm.encoder_cache:EncoderCache.__init__", ("self",), sets=("mm_features", "encoder_outputs")
    ),
    Hook(
        "vllm.v1.worker.gpu.model_runner:set_active_mm_loras",
        ("model", "lora_manager", "encoder_cache", "scheduled_encoder_inputs"),
    ),
    Hook(
        "vllm.v1.core.encoder_cache_manager:EncoderCacheManager.__init__",
        ("self",),
        sets=("cached", "freeable", "freed", "num_embeds_by_hash", "num_free_slots"),
    ),
    Hook(f"{_BUDGET}.__init__", ("self", "vllm_config", "mm_registry"), sets=("mm_max_toks_per_item",)),
    Hook(f"{_BUDGET}.get_dummy_encoder_profile_inputs", ("self", "modality", "max_items_per_batch")),
    Hook("vllm.multimodal:MULTIMODAL_REGISTRY"),
    Hook("vllm.config:CompilationConfig.cudagraph_mm_encoder"),
    Hook("vllm.config:CompilationConfig.compile_mm_encoder"),
    Hook("vllm.config:ModelConfig.multimodal_config"),
)
