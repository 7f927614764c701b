"""`flora_vllm.LLM`: vLLM's offline LLM with adapters on."""

import inspect
from collections.abc import Mapping
from typing import Any

from flora_vllm.errors import ConfigError
from flora_vllm.options import fields_of, keyword, keywords
from flora_vllm.plugin.options import KEY, FloraOptions, faults_without_server


def LLM(model: str, **options: Any) -> Any:  # noqa: N802 - stands where vllm.LLM stands
    """A `vllm.LLM` that serves adapters of every family.

        llm = flora_vllm.LLM("BASE", max_loras=8, max_flora_rank=32)
        llm.generate(prompts, sampling, lora_request=[LoRARequest("poems", 1, "poems_dir"), None])

    `options`: those of `vllm serve --enable-flora` with underscores (max_flora_rank, flora_path, …; the signature has
    them all), before those of additional_config["flora"]; all others go to vLLM unchanged. Raises ConfigError for a bad
    value and for what only the HTTP server keeps, HookError if this vLLM cannot be used safely, and vLLM's TypeError
    for an unknown name.
    """
    import vllm

    ours = {name: options.pop(keyword(f)) for name, f in fields_of(FloraOptions).items() if keyword(f) in options}
    config = options.pop("additional_config", None) or {}
    given = config.get(KEY, {})
    chosen = {**given, **ours} if isinstance(given, Mapping) else given
    if faults := faults_without_server(FloraOptions.from_mapping(chosen)):
        raise ConfigError("; ".join(faults))
    options["enable_lora"] = True
    return vllm.LLM(model=model, additional_config={**config, KEY: chosen}, **options)


# What `help`, editors and notebooks show.
LLM.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
    [
        inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=str),
        *keywords(FloraOptions),
        inspect.Parameter("vllm_options", inspect.Parameter.VAR_KEYWORD),
    ]
)
