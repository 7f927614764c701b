"""The part of patched_vllm.py about encoder-decoder models: whose rows are whose, in which order, and speech."""

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import torch

FLORA = {"flora": {"max_rank": 4}}
SCHEDULED = {"old": [0], "new": [0]}  # a request that was preempted, and one that begins
IN_BATCH = ["new", "old"]


def encoder_results() -> list[Any]:
    """Whisper's row spaces, and the order of encoder inputs in both runners where it is not that of scheduling."""
    from vllm.model_executor.models.whisper import WhisperForConditionalGeneration

    from flora_vllm.plugin.encoder_order import run_encoder_in_batch_order
    from flora_vllm.plugin.encoder_rows import row_spaces

    model: Any = object.__new__(WhisperForConditionalGeneration)
    torch.nn.Module.__init__(model)
    model.model = torch.nn.Module()
    model.model.decoder = torch.nn.Module()
    model.model.decoder.layers = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
    rows = row_spaces(model)
    layers = ("encoder.layers.0.mlp.fc1", "decoder.layers.1.encoder_attn.kv_proj", "decoder.layers.1.mlp.fc1")
    kinds: dict[Any, str] = {step: kind for kind, step in rows.steps.items()}
    seen: list[Any] = [kinds[rows.step_of(f"model.{layer}")] for layer in layers]
    counts = model.get_mm_lora_token_counts(modality="audio", mm_kwargs=None, num_mm_embeds=100)
    run_encoder_in_batch_order(1)
    run_encoder_in_batch_order(2)
    return [[*seen, rows.step_of("proj_out"), *counts], v1_order(), *v2_order(model)]


def features() -> dict[str, list[Any]]:
    place = SimpleNamespace(get_num_embeds=lambda: 2)
    return {
        name: [SimpleNamespace(identifier=name, data=name, modality="audio", mm_position=place)] for name in SCHEDULED
    }


def v1_order() -> list[str]:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner: Any = object.__new__(GPUModelRunner)
    runner.model_config = SimpleNamespace(is_encoder_decoder=True)
    runner.vllm_config = SimpleNamespace(model_config=runner.model_config, additional_config=FLORA)
    runner.input_batch = SimpleNamespace(req_ids=IN_BATCH)
    runner.requests = {name: SimpleNamespace(mm_features=items) for name, items in features().items()}
    output = SchedulerOutput.make_empty()
    output.scheduled_encoder_inputs = SCHEDULED
    return [request for request, _ in runner._batch_mm_inputs_from_scheduler(output)[2]]


def v2_order(model: Any) -> tuple[list[list[int]], list[str]]:
    """(rows' adapters: encoder, cross-attention; audio in the order it is encoded)."""
    from vllm.v1.worker import utils
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.model_states.encoder_decoder import EncoderDecoderModelState

    from flora_vllm.plugin.worker_manager import FloraWorkerManager

    mapped: list[list[int]] = []
    manager: Any = object.__new__(FloraWorkerManager)
    manager.supports_tower_connector_lora = lambda: True
    manager.set_active_adapters = lambda _, mapping: mapped.append(list(mapping.index_mapping))
    adapters = SimpleNamespace(lora_ids=[1, 2], lora_requests={})
    encoded: list[str] = []
    state: Any = object.__new__(EncoderDecoderModelState)
    state.encoder_runner = SimpleNamespace(prepare_mm_inputs=lambda inputs: (encoded.extend(inputs), [])[::-1])
    # What the runner does between its two calls, on vLLM with the diff.
    order: Any = getattr(utils, "encoder_inputs_in_batch_order", lambda scheduled, _: scheduled)
    scheduled = order(SCHEDULED, IN_BATCH)
    model_runner.set_active_mm_loras(
        model=model,
        lora_manager=manager,
        encoder_cache=SimpleNamespace(mm_features=features()),
        req_id_to_index={"old": 0, "new": 1},
        lora_state=adapters,
        scheduled_encoder_inputs=scheduled,
    )
    state.prepare_inputs_embeds(scheduled, SimpleNamespace(req_ids=IN_BATCH), None)
    return mapped, encoded


async def speech_results() -> dict[str, str | None]:
    """Model named by a transcription request without language -> the adapter that detects it."""
    from vllm.entrypoints.speech_to_text.base.serving import SpeechToTextBaseServing
    from vllm.lora.request import LoRARequest

    from flora_vllm.plugin.speech import detect_language_with_adapter

    detect_language_with_adapter()
    asked: dict[str, str | None] = {}

    class DetectedError(Exception):
        pass

    async def generate(_prompt: Any, _params: Any, request_id: str, lora_request: Any = None) -> Any:
        asked[request_id.removesuffix("-lang_detect")] = lora_request and lora_request.lora_name
        yield SimpleNamespace(finished=True, outputs=[SimpleNamespace(token_ids=[1])])

    def stop(**_: Any) -> None:
        raise DetectedError

    served: Any = object.__new__(SpeechToTextBaseServing)
    served.__dict__["model_cls"] = SimpleNamespace(
        validate_language=lambda language: language,
        supports_explicit_language_detection=True,
        get_language_detection_prompt=lambda *_: "prompt",
        get_language_token_ids=lambda _: [1],
        parse_language_detection_output=lambda *_: "en",
    )
    served.models = SimpleNamespace(
        lora_requests={"a": LoRARequest("one", 1, "a")}, is_base_model=lambda name: name == "base"
    )
    served.engine_client = SimpleNamespace(
        generate=generate, abort=None, vllm_config=SimpleNamespace(additional_config=FLORA)
    )
    served.asr_config, served.tokenizer, served.task_type, served.model_config = None, None, "transcribe", None
    served._decode_and_chunk_speech_async = lambda _: asyncio.sleep(0, ([torch.zeros(1)], 1.0))
    for name in ("a", "base"):
        request: Any = SimpleNamespace(model=name, language=None, to_language=None, build_stt_params=stop)
        with contextlib.suppress(DetectedError):
            await served._preprocess_speech_to_text(request, b"", name)
    return asked
