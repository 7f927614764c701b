"""`flora_vllm.LLM`: vLLM's offline LLM with adapters on."""

from typing import Any

from flora_vllm.plugin.options import KEY


def LLM(  # noqa: N802 - stands where vllm.LLM stands
    model: str,
    *,
    max_flora_rank: int = 16,
    flora_path: str = "auto",
    flora_adapter_root: str | None = None,
    flora_graph_rows: int = 0,
    **vllm_options: Any,
) -> Any:
    """A `vllm.LLM` that serves FLoRA, HiRA, IA3 and LoRA adapters; `vllm_options` go to vLLM unchanged.

        llm = flora_vllm.LLM("BASE", max_loras=8)
        llm.generate(prompts, sampling, lora_request=[LoRARequest("poems", 1, "poems_dir"), None])

    Raises ConfigError for a bad option and HookError if this vLLM cannot be used safely.
    """
    import vllm

    options = {
        "max_rank": max_flora_rank,
        "path": flora_path,
        "adapter_root": flora_adapter_root,
        "graph_rows": flora_graph_rows,
    }
    config = {**(vllm_options.pop("additional_config", None) or {}), KEY: options}
    vllm_options["enable_lora"] = True
    return vllm.LLM(model=model, additional_config=config, **vllm_options)
