"""Recorded clips with their transcripts, for Whisper: what is trained on beside blocks of text.

A manifest is a .jsonl file of {"audio": path, "text": transcript, "language": code} lines; paths are relative to it.
Audio is read again for every batch (a clip's features take 1 MB, a step takes seconds). The decoder starts with
Whisper's own prompt, start, language, task, no timestamps, on which no loss counts: only the transcript and its end
are learnt.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from flora_vllm.errors import ConfigError
from flora_vllm.training.audio import SAMPLE_RATE, load_audio
from flora_vllm.training.build import UNLOADABLE
from flora_vllm.training.data import IGNORED, Batch, parse_line, read_lines

# Whisper writes a space before the first word, but not in these.
WITHOUT_SPACES = {"zh", "yue", "ja", "th", "lo", "my"}
HEARD_AT_ONCE = 8


@dataclass(frozen=True, eq=False)
class SpeechBase:
    """A frozen Whisper with what turns sound into its input and text into its tokens."""

    model: WhisperForConditionalGeneration
    features: WhisperFeatureExtractor
    tokenizer: WhisperTokenizer

    @property
    def generation(self) -> Any:
        """Its generation config, where Whisper's special tokens are."""
        return self.model.generation_config

    @property
    def languages(self) -> dict[str, int]:
        """Code -> token of the languages the model knows; empty for a model of English alone."""
        if not getattr(self.generation, "is_multilingual", False):
            return {}
        return {token.strip("<|>"): number for token, number in self.generation.lang_to_id.items()}

    def prompt(self, language: str | None) -> list[int]:
        """The tokens the decoder starts with for a transcript in `language`."""
        start = self.model.config.decoder_start_token_id
        assert isinstance(start, int)
        task = [] if language is None else [self.languages[language], self.generation.task_to_id["transcribe"]]
        return [start, *task, self.generation.no_timestamps_token_id]


@dataclass(frozen=True)
class Clip:
    """A recording and what is said in it; `language` is None for a model of English alone, or until it is heard."""

    audio: Path
    text: str
    language: str | None


class Clips:
    """Clips as examples: `clips[rows]` reads and pads them to one batch."""

    def __init__(self, base: SpeechBase, clips: Sequence[Clip]) -> None:
        self._base, self._clips = base, list(clips)
        self._targets = [target(base, clip) for clip in clips]

    def __len__(self) -> int:
        return len(self._clips)

    @property
    def tokens(self) -> int:
        return sum(len(tokens) for _, tokens in self._targets)

    def __getitem__(self, rows: list[int], /) -> Batch:
        targets = [self._targets[row] for row in rows]
        longest = max(len(prompt) + len(tokens) for prompt, tokens in targets) - 1
        end = self._base.tokenizer.eos_token_id
        assert isinstance(end, int)
        ids = torch.full((len(rows), longest), end)
        labels = torch.full((len(rows), longest), IGNORED)
        for i, (prompt, tokens) in enumerate(targets):
            whole = torch.tensor([*prompt, *tokens])
            ids[i, : len(whole) - 1] = whole[:-1]
            labels[i, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
        features = input_features(self._base, [self._clips[row].audio for row in rows])
        return Batch({"input_features": features, "decoder_input_ids": ids}, labels)


@dataclass(frozen=True, eq=False)
class ClipSplit:
    """Clips to train on and, apart from them, to measure with."""

    train: Clips
    held_out: Clips

    @property
    def train_tokens(self) -> int:
        return self.train.tokens


def is_speech_model(base: str) -> bool:
    """Whether `base` (directory or hub id) is a Whisper. Raises ConfigError if its configuration can't be read."""
    try:
        return AutoConfig.from_pretrained(base).model_type == "whisper"
    except (OSError, ValueError) as error:
        raise ConfigError(f"base model {base} can't be loaded: {error}") from None


def load_speech_base(base: str) -> SpeechBase:
    """The Whisper at `base`, frozen, on the GPU if there is one. Raises ConfigError if it can't be loaded.

    A float16 checkpoint is trained in float32: float16 gradients overflow without loss scaling.
    """
    try:
        model = WhisperForConditionalGeneration.from_pretrained(base, dtype="auto")
        features = WhisperFeatureExtractor.from_pretrained(base)
        tokenizer = WhisperTokenizer.from_pretrained(base)
    except UNLOADABLE as error:
        raise ConfigError(f"base model {base} can't be loaded: {error}") from None
    if model.dtype == torch.float16:
        nn.Module.to(model, torch.float32)
    model.config.use_cache = False
    model.requires_grad_(False)
    model.eval()
    if torch.cuda.is_available():
        nn.Module.to(model, "cuda")
    return SpeechBase(model, features, tokenizer)


def read_clips(path: Path, base: SpeechBase, length: int) -> list[Clip]:
    """The clips of the manifest `path`, each with its language, each checked: readable, short enough, with words.

    A line without a language gets the one the model hears. Raises ConfigError listing every line at fault; `length`
    is the most tokens a transcript may have.
    """
    if not path.exists():
        raise ConfigError(f"training data {path}: no such file or directory")
    if path.suffix != ".jsonl":
        shape = '{"audio": path, "text": transcript}'
        raise ConfigError(f"training data {path}: a Whisper base needs a .jsonl manifest of {shape} lines")
    clips = read_lines(path, lambda line: _clip(line, path.parent, base, length), desc="checking clips")
    if not clips:
        raise ConfigError(f"training data {path}: no clips in it")
    return _with_languages(clips, base) if base.languages else clips


def split_clips(clips: Sequence[Clip], base: SpeechBase, held_out_share: float, seed: int, where: str) -> ClipSplit:
    """Shuffle and split; at least one clip on each side. Raises ConfigError if there is only one."""
    if len(clips) < 2:
        raise ConfigError(f"training data {where}: one clip is too few; one to train on and one to measure with needed")
    order: list[int] = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = min(max(1, round(len(clips) * held_out_share)), len(clips) - 1)
    held_out, train = order[:cut], order[cut:]
    return ClipSplit(Clips(base, [clips[i] for i in train]), Clips(base, [clips[i] for i in held_out]))


def input_features(base: SpeechBase, files: Sequence[Path]) -> torch.FloatTensor:
    """(N, mel bins, frames) of whole recordings, padded to the model's chunk, in the model's dtype."""
    sounds = [load_audio(file) for file in files]
    features = base.features(sounds, sampling_rate=SAMPLE_RATE, return_tensors="pt")
    return features["input_features"].to(base.model.device, base.model.dtype)


def target(base: SpeechBase, clip: Clip) -> tuple[list[int], list[int]]:
    """The prompt of a clip's transcript, and the transcript with its end."""
    space = "" if clip.language in WITHOUT_SPACES else " "
    ids = base.tokenizer(space + clip.text.strip(), add_special_tokens=False)["input_ids"]
    return base.prompt(clip.language), [*cast(list[int], ids), cast(int, base.tokenizer.eos_token_id)]


def _clip(line: str, folder: Path, base: SpeechBase, length: int) -> Clip:
    row = _row(line)
    faults = []
    audio = folder / row["audio"]
    try:
        seconds = len(load_audio(audio)) / SAMPLE_RATE
        if seconds > base.features.chunk_length:
            faults.append(
                f"{row['audio']} lasts {seconds:.1f} s, the model hears {base.features.chunk_length} s: cut it"
            )
    except ConfigError as error:
        faults.append(f"{row['audio']}: {error}")
    language = row.get("language")
    try:
        language = _language(language, base)
    except ConfigError as error:
        faults.append(str(error))
    text = row["text"].strip()
    if not text:
        faults.append("the transcript is empty")
    most = min(length, base.model.config.max_target_positions - 4)
    tokens = len(cast(list[int], base.tokenizer(text, add_special_tokens=False)["input_ids"])) + 2
    if tokens > most:
        faults.append(f"the transcript has {tokens} tokens, at most {most} fit (--length, and what the model holds)")
    if faults:
        raise ConfigError("; ".join(faults))
    return Clip(audio, text, language)


def _row(line: str) -> dict[str, Any]:
    row = parse_line(line)
    if not isinstance(row, dict) or not isinstance(row.get("audio"), str) or not isinstance(row.get("text"), str):
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ConfigError(
            f'a Whisper base needs "audio": a path, and "text": what is said; it has {keys}. '
            "Text alone trains a text model"
        )
    return row


def _language(name: Any, base: SpeechBase) -> str | None:
    """The code of a language given by code or English name, if the model knows it."""
    if name is None:
        return None
    code = TO_LANGUAGE_CODE.get(str(name).lower(), str(name).lower())
    if not base.languages:
        if code != "en":
            raise ConfigError(f"language {name!r}, and the model knows English alone")
        return None
    if code not in base.languages:
        raise ConfigError(f"language {name!r}, the model knows {', '.join(sorted(base.languages))}")
    return code


def _with_languages(clips: Sequence[Clip], base: SpeechBase) -> list[Clip]:
    """Clips without a language get the one the model hears in them."""
    silent = [i for i, clip in enumerate(clips) if clip.language is None]
    heard = list(clips)
    codes = {number: code for code, number in base.languages.items()}
    starts = range(0, len(silent), HEARD_AT_ONCE)
    for start in tqdm(starts, desc="hearing languages", unit="batch", file=sys.stderr, disable=not silent):
        rows = silent[start : start + HEARD_AT_ONCE]
        features = input_features(base, [clips[i].audio for i in rows])
        for i, number in zip(rows, base.model.detect_language(input_features=features).tolist(), strict=True):
            heard[i] = replace(clips[i], language=codes[number])
    return heard
