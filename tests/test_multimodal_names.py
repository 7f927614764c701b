"""What trainers call the modules of a multimodal model's language model, found in vLLM's own models of them.

Engines: test_engine_towers.py. The processors of most such models need torchvision, which is not here.
"""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")

QUERY = "self_attn.q_proj"
# vLLM's class -> a module of its language model and one of its tower, by their paths in the engine.
MODELS = {
    "idefics3:Idefics3ForConditionalGeneration": (
        f"model.text_model.layers.0.{QUERY}",
        f"model.vision_model.encoder.layers.0.{QUERY}",
    ),
    "paligemma:PaliGemmaForConditionalGeneration": (
        f"language_model.model.layers.0.{QUERY}",
        f"vision_tower.vision_model.encoder.layers.0.{QUERY}",
    ),
}


def _renamer(model: Any, known: set[str]) -> Any:
    return importlib.import_module("flora_vllm.plugin.module_names").renamer(model, known)


def _model(name: str) -> Any:
    """vLLM's model without layers: names are its class's."""
    module, _, own = name.partition(":")
    kind = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), own)
    config = SimpleNamespace(is_encoder_decoder=False)
    return type(
        own, (), {**{n: getattr(kind, n, None) for n in ("hf_to_vllm_mapper", "get_mm_mapping")}, "config": config}
    )()


@pytest.mark.parametrize("name", MODELS)
def test_a_text_models_names_are_the_language_models(name: str) -> None:
    language, tower = MODELS[name]
    rename = _renamer(_model(name), {language, tower})
    assert rename(f"model.layers.0.{QUERY}") == language
    assert rename(language) == language
    assert rename(tower) == tower


def test_a_multimodal_checkpoints_names_are_mapped() -> None:
    language, tower = MODELS["paligemma:PaliGemmaForConditionalGeneration"]
    rename = _renamer(_model("paligemma:PaliGemmaForConditionalGeneration"), {language, tower})
    assert rename(f"model.language_model.layers.0.{QUERY}") == language
    assert rename(f"model.vision_tower.vision_model.encoder.layers.0.{QUERY}") == tower


def test_a_speech_models_decoder_is_no_text_model() -> None:
    language, tower = MODELS["idefics3:Idefics3ForConditionalGeneration"]
    model = _model("idefics3:Idefics3ForConditionalGeneration")
    model.config.is_encoder_decoder = True
    assert _renamer(model, {language, tower})(f"model.layers.0.{QUERY}") not in (language, tower)
