"""The trained adapters through vLLM, every language and method of a task in one batch, against PEFT's own forward.

Both compute in float32 from the same checkpoint and the published factors, so the difference is the order of sums.
Judged are the logprobs of held-out text (code) and of what is said in held-out clips (speech); a clip is also
transcribed by both.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import quality_speech
import torch
from quality_code import test_blocks
from quality_data import read_rows
from quality_plan import Cell, Size
from transformers import PreTrainedModel

from flora_vllm.training.audio import SAMPLE_RATE, load_audio
from flora_vllm.training.speech import Clip, SpeechBase, input_features, load_speech_base, target

EXAMPLES = 4  # test blocks or clips of each language
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
ENGINE = {"code": {"max_num_batched_tokens": 4096}, "speech": {"max_model_len": 448, "max_num_batched_tokens": 6000}}


@dataclass(frozen=True, eq=False)
class Asked:
    """One request: its adapter (None: the bare model), its prompt in vLLM's form and in PEFT's, the tokens judged.

    `ids` ends with them, `judged` says how many they are. A clip's `open_prompt` is for transcribing it.
    """

    cell: Cell | None
    prompt: dict[str, Any]
    inputs: dict[str, torch.Tensor]
    ids: list[int]
    judged: int
    open_prompt: dict[str, Any] | None = None
    clip: Clip | None = None


def served_equals_peft(
    task: str, model: Path, adapters: Mapping[Cell, Path], data: Mapping[Cell, Path], size: Size
) -> dict:
    """The largest difference of a judged token's logprob, over all adapters and the bare model, and both mean losses.

    Returns the fields of a row.
    """
    first = next(iter(adapters))
    whose: list[tuple[Cell | None, Path]] = [*((cell, data[cell]) for cell in adapters), (None, data[first])]
    ask = partial(_ask_code, size=size) if task == "code" else _ask_speech
    asked = [request for cell, folder in whose for request in ask(cell, model, folder)]
    served, heard = _served(task, model, adapters, asked, size)
    own, own_heard = _peft(task, model, adapters, asked)
    row: dict[str, Any] = {
        "task": task,
        "served_equals_peft": max(float((a - b).abs().max()) for a, b in zip(served, own, strict=True)),
        "dtype": "float32",
        "adapters": len(adapters),
        "requests_in_one_batch": len(asked) + len(heard),
        "tokens": sum(map(len, served)),
        "mean_loss_served": -float(torch.cat(served).mean()),
        "mean_loss_peft": -float(torch.cat(own).mean()),
    }
    if heard:
        said = [request.clip.text for request in asked if request.clip is not None]
        row |= {
            "transcripts": len(said),
            "transcripts_equal": sum(a == b for a, b in zip(heard, own_heard, strict=True)),
            "wer_raw_served": quality_speech.word_error_rate(said, heard),
            "wer_raw_peft": quality_speech.word_error_rate(said, own_heard),
        }
    return row


def _ask_code(cell: Cell | None, model: Path, data: Path, size: Size) -> list[Asked]:
    from transformers import AutoTokenizer

    blocks = test_blocks(data, AutoTokenizer.from_pretrained(model), size)[:EXAMPLES].tolist()
    return [
        Asked(cell, {"prompt_token_ids": ids}, {"input_ids": torch.tensor([ids])}, ids, len(ids) - 1) for ids in blocks
    ]


def _ask_speech(cell: Cell | None, model: Path, data: Path) -> list[Asked]:
    base = load_speech_base(str(model))
    asked = []
    for row in read_rows(data / "test.jsonl")[:EXAMPLES]:
        clip = Clip(data / row["audio"], row["text"], row["language"])
        start, tokens = target(base, clip)
        sound = {"prompt": "", "multi_modal_data": {"audio": (load_audio(clip.audio), SAMPLE_RATE)}}
        prompt, open_prompt = (
            {"encoder_prompt": sound, "decoder_prompt": {"prompt_token_ids": ids}} for ids in ([*start, *tokens], start)
        )
        inputs = {
            "input_features": input_features(base, [clip.audio]),
            "decoder_input_ids": torch.tensor([[*start, *tokens]]),
        }
        asked.append(Asked(cell, prompt, inputs, [*start, *tokens], len(tokens), open_prompt, clip))
    return asked


@contextlib.contextmanager
def open_engine(model: Path, adapters: Mapping[Cell, Path], **options: Any) -> Iterator[Any]:
    """vLLM with the plugin and a slot for every adapter."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import flora_vllm

    llm = flora_vllm.LLM(
        str(model),
        enforce_eager=True,
        max_loras=len(adapters),
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        **options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def requests_for(adapters: Mapping[Cell, Path], cells: Sequence[Cell | None]) -> list[Any]:
    """What names each cell's adapter to vLLM; None for the bare model."""
    from vllm.lora.request import LoRARequest

    named = {cell: LoRARequest(cell.name, i, str(path)) for i, (cell, path) in enumerate(adapters.items(), start=1)}
    return [None if cell is None else named[cell] for cell in cells]


def _served(
    task: str, model: Path, adapters: Mapping[Cell, Path], asked: list[Asked], size: Size
) -> tuple[list[torch.Tensor], list[str]]:
    """Logprobs of each request's judged tokens, and a transcript of each clip; all requests in one call."""
    import vllm

    judging = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    writing = vllm.SamplingParams(temperature=0, max_tokens=quality_speech.MOST_TOKENS)
    clips = [request for request in asked if request.open_prompt is not None]
    prompts = [request.prompt for request in asked] + [request.open_prompt for request in clips]
    sampling = [judging] * len(asked) + [writing] * len(clips)
    options = {"max_model_len": size.length + 8, **ENGINE[task]}
    with open_engine(model, adapters, dtype="float32", max_num_seqs=len(prompts), **options) as llm:
        named = requests_for(adapters, [request.cell for request in [*asked, *clips]])
        outputs = llm.generate(prompts, sampling, lora_request=named)
    logprobs = [_judged(request, output) for request, output in zip(asked, outputs[: len(asked)], strict=True)]
    return logprobs, [quality_speech.tidy(output.outputs[0].text) for output in outputs[len(asked) :]]


def _judged(request: Asked, output: Any) -> torch.Tensor:
    places = zip(output.prompt_logprobs[1:], request.ids[1:], strict=True)
    return torch.tensor([place[token].logprob for place, token in places][-request.judged :])


@torch.no_grad()
def _peft(
    task: str, model: Path, adapters: Mapping[Cell, Path], asked: list[Asked]
) -> tuple[list[torch.Tensor], list[str]]:
    """The same logprobs and transcripts from PEFT, adapter by adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import flora_vllm.training  # noqa: F401  (registers FLoRA)

    speech = load_speech_base(str(model)) if task == "speech" else None
    base: Any = speech.model if speech else AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base.eval()
    found: dict[int, torch.Tensor] = {}
    heard: dict[int, str] = {}
    for cell in [None, *adapters]:
        adapted = base if cell is None else PeftModel.from_pretrained(base, adapters[cell]).eval()
        mine = [i for i, request in enumerate(asked) if request.cell == cell]
        for i in mine:
            found[i] = _judge(adapted, asked[i])
        if speech:
            heard |= dict(zip(mine, _transcripts(speech, base, [asked[i] for i in mine]), strict=True))
        if cell is not None:
            base = adapted.unload()
    return [found[i] for i in range(len(asked))], [heard[i] for i in sorted(heard)]


def _judge(adapted: Any, request: Asked) -> torch.Tensor:
    logprobs = adapted(**request.inputs).logits[0].double().log_softmax(-1)
    return logprobs[:-1].gather(-1, torch.tensor(request.ids[1:])[:, None])[-request.judged :, 0]


def _transcripts(speech: SpeechBase, model: PreTrainedModel, asked: list[Asked]) -> list[str]:
    clips = [request.clip for request in asked if request.clip is not None]
    language = clips[0].language
    assert language is not None, "every clip of the benchmark has its language"
    return quality_speech.transcribe(replace(speech, model=model), [clip.audio for clip in clips], language)
