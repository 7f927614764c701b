"""The speech task: Whisper adapted to one speaker of one language, measured in words wrong.

In bfloat16, a third quicker than float32 on a CPU that has it; the encoder hears 30 s of every clip, as Whisper does.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quality_data import read_rows
from quality_plan import Size
from torch import nn
from transformers import PreTrainedModel
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from flora_vllm.training.build import DEFAULT_TARGETS
from flora_vllm.training.speech import (
    Clips,
    ClipSplit,
    SpeechBase,
    input_features,
    load_speech_base,
    read_clips,
)

TARGETS = ",".join(DEFAULT_TARGETS["whisper"])  # every fully connected layer, the paper's for speech
MOST_TOKENS = 128


def prepare(model: Path, data: Path, size: Size) -> tuple[PreTrainedModel, ClipSplit]:
    """The frozen base model, and clips to train on and to choose a rate by."""
    base = load_speech_base(str(model))
    nn.Module.to(base.model, torch.bfloat16)
    train, dev = (read_clips(data / f"{name}.jsonl", base, size.length) for name in ("train", "dev"))
    return base.model, ClipSplit(Clips(base, train), Clips(base, dev[: size.dev]))


def score(base: PreTrainedModel, model: Path, data: Path, size: Size) -> dict:
    """Word error rates in percent over the test clips, with Whisper's normalisation (`wer`) and without (`wer_raw`).

    `heard` is what the model wrote for each clip.
    """
    speech = replace(load_speech_base(str(model)), model=base)
    clips = read_rows(data / "test.jsonl")[: size.test]
    heard = transcribe(speech, [data / clip["audio"] for clip in clips], clips[0]["language"])
    said = [clip["text"] for clip in clips]
    normal = EnglishTextNormalizer({}) if clips[0]["language"] == "en" else BasicTextNormalizer()
    return {
        "wer": word_error_rate([normal(text) for text in said], [normal(text) for text in heard]),
        "wer_raw": word_error_rate(said, heard),
        "heard": heard,
        "test_clips": len(clips),
        "test_words": sum(len(normal(text).split()) for text in said),
    }


@torch.no_grad()
def transcribe(base: SpeechBase, files: Sequence[Path], language: str, batch: int = 16) -> list[str]:
    """Greedy transcripts, language and task given; no token is suppressed, as in vLLM."""
    model: Any = base.model
    texts = []
    model.eval()
    model.config.use_cache = True
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    for start in range(0, len(files), batch):
        features = input_features(base, files[start : start + batch])
        ids = model.generate(
            input_features=features, language=language, task="transcribe", max_new_tokens=MOST_TOKENS, num_beams=1
        )
        texts += base.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [tidy(text) for text in texts]


def tidy(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def word_error_rate(said: Sequence[str], heard: Sequence[str]) -> float:
    """Insertions, deletions and substitutions of words over the words that were said, in percent."""
    wrong = sum(edit_distance(a.split(), b.split()) for a, b in zip(said, heard, strict=True))
    return 100 * wrong / sum(len(text.split()) for text in said)


def edit_distance(one: Sequence[str], other: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that turn `one` into `other`."""
    costs = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        diagonal, costs[0] = costs[0], i
        for j, b in enumerate(other, start=1):
            diagonal, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, diagonal + (a != b))
    return costs[-1]
