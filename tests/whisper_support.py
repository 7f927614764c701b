"""Audio for the tiny Whisper, adapters of every family for it, and transformers on merged weights as the judge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import engine_support as support
import numpy as np
import peft
import torch
import transformers
from engine_support import Answer, Ask, Oracle, State
from families_support import Fill, fill_normal, save_filled
from tiny_models import WHISPER_CHUNK_S

RATE_HZ = 16000
ENCODER_ROWS = 50 * WHISPER_CHUNK_S
PROMPT = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
PEFT_CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "fc1", "fc2"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
    "hira": peft.HiraConfig(r=3, target_modules=["q_proj", "k_proj", "out_proj", "fc1"]),
}
# One of each kind of term, on layers of the encoder, the decoder and between them.
FAMILIES: dict[str, peft.PeftConfig] = {
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj", "fc1"]),
    "lora-bias": peft.LoraConfig(r=4, bias="lora_only", target_modules=["v_proj", "fc2"]),
    "loha": peft.LoHaConfig(r=3, target_modules=["k_proj", "out_proj"], init_weights=False),
    "lokr": peft.LoKrConfig(r=4, target_modules=["q_proj", "fc2"], init_weights=False),
    "oft": peft.OFTConfig(r=0, oft_block_size=16, target_modules=["k_proj", "v_proj", "fc1"]),
    "road": peft.RoadConfig(variant="road_1", group_size=32, target_modules=["q_proj", "out_proj"]),
    "vera": peft.VeraConfig(r=16, target_modules=["q_proj", "v_proj"]),
    "fourierft": peft.FourierFTConfig(n_frequency=40, scaling=100.0, target_modules=["v_proj", "out_proj"]),
    "miss": peft.MissConfig(r=8, target_modules=["k_proj", "fc1"]),
}
# label -> (rank, reduction, what of a module's name it needs to be adapted)
FLORA = {
    "flora-all": (2, "mean", ""),
    "flora-sum": (5, "sum", ""),
    "flora-encoder": (3, "mean", "encoder.layers"),
    "flora-decoder": (3, "mean", "decoder.layers"),
    "flora-cross": (4, "sum", "encoder_attn"),
}


@dataclass(frozen=True)
class Heard:
    """A request: which audio (by its seed) and which adapter (by its label, None for the base model)."""

    audio: int
    adapter: str | None = None


def audio_of(seed: int) -> np.ndarray:
    """Two tones and noise in 16 bits, as long as the model's chunk or shorter: what is missing is padding."""
    generator = np.random.default_rng(seed)
    seconds = np.arange(int(RATE_HZ * WHISPER_CHUNK_S * generator.uniform(0.5, 1.0))) / RATE_HZ
    tones = [np.sin(2 * np.pi * hertz * seconds) for hertz in generator.uniform(100, 3000, 2)]
    samples = 0.2 * sum(tones) + 0.05 * generator.standard_normal(len(seconds))
    return (np.round(32768 * samples) / 32768).astype(np.float32)


class World:
    """The tiny Whisper with its adapters, and what each amounts to."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = model
        base = support.load(model)
        self.states: dict[str | None, State] = {None: dict(base.state_dict())}
        for seed, (label, (rank, reduction, part)) in enumerate(FLORA.items()):
            modules = [name for name in support.linear_modules(base) if part in name]
            self.states[label] = support.write_flora_adapter(base, folder / label, rank, reduction, seed, modules)
        for seed, (label, config) in enumerate(PEFT_CONFIGS.items()):
            self.states[label] = support.save_peft_adapter(model, folder / label, config, seed)
        for label, config in FAMILIES.items():
            # Of a large map the powers that PEFT sums would be all that is left, and they round.
            fill: Fill = partial(fill_normal, std=0.05) if label == "oft" else fill_normal
            wrapped: Any = save_filled(support.load(model), config, folder / label, fill)
            self.states[label] = wrapped.merge_and_unload().state_dict()
        self.paths: Mapping[str | None, Path | None] = {
            label: None if label is None else folder / label for label in self.states
        }
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.prompt: tuple[int, ...] = tuple(tokenizer.convert_tokens_to_ids(list(PROMPT)))
        self._extractor = transformers.AutoFeatureExtractor.from_pretrained(model)
        self._judge: Any = support.load(model).double()

    def prompts(self, asks: Sequence[Heard]) -> list[Any]:
        """In vLLM's form; one audio has one identity, whoever hears it."""
        return [
            {
                "encoder_prompt": {
                    "prompt": "",
                    "multi_modal_data": {"audio": (audio_of(ask.audio), RATE_HZ)},
                    "multi_modal_uuids": {"audio": [f"audio-{ask.audio}"]},
                },
                "decoder_prompt": {"prompt_token_ids": list(self.prompt)},
            }
            for ask in asks
        ]

    def ask(self, engine: support.Engine, asks: Sequence[Heard], tokens: int = 8) -> list[Answer]:
        return engine.generate(self.prompts(asks), [self.paths[ask.adapter] for ask in asks], tokens)

    def oracle(self, audio: int) -> Oracle:
        """transformers listening to one audio."""
        features = self._extractor(audio_of(audio), sampling_rate=RATE_HZ, return_tensors="pt").input_features.double()
        judge = self._judge

        class Listening(torch.nn.Module):
            def forward(self, tokens: torch.Tensor) -> Any:
                return judge(input_features=features, decoder_input_ids=tokens)

            def load_state_dict(self, state: Any, *_: Any, **__: Any) -> Any:
                return judge.load_state_dict(state)

        listening: Any = Listening()
        return Oracle(listening)

    def error(self, ask: Heard, answer: Answer) -> float:
        """Largest difference of a logprob from the merged model's; infinite where a token differs."""
        return self.oracle(ask.audio).error(self.states[ask.adapter], Ask(self.prompt), answer)
