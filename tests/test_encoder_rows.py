"""Which encoder-decoder models are served, and what an engine that serves one is told."""

from types import SimpleNamespace
from typing import Any

import pytest

from flora_vllm.errors import ConfigError

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


def config_of(architecture: str) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(architecture=architecture),
        lora_config=SimpleNamespace(enable_tower_connector_lora=False),
        device_config=SimpleNamespace(device_type="cpu"),
    )


def test_models_whose_rows_are_unknown_are_refused_at_start():
    from flora_vllm.plugin.encoder_rows import prepare_config

    with pytest.raises(ConfigError, match=r"NemotronParse.*known for WhisperForConditionalGeneration only"):
        prepare_config(config_of("NemotronParseForConditionalGeneration"))


def test_an_encoding_belongs_to_one_adapter():
    """vLLM makes the adapter part of an audio's identity if it takes the encoder for adapted."""
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.input_processor import InputProcessor

    from flora_vllm.plugin.encoder_rows import prepare_config

    config = config_of("WhisperForConditionalGeneration")
    prepare_config(config)
    processor: Any = object.__new__(InputProcessor)
    processor.lora_config = config.lora_config
    adapters = [None, LoRARequest("a@1", 1, "x"), LoRARequest("a@2", 2, "x")]
    assert len({processor._get_mm_identifier("audio", adapter) for adapter in adapters}) == 3
