"""Images for the tiny Idefics3, adapters of every family for its parts, and transformers on merged weights as judge."""

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
from PIL import Image
from tiny_models import IMAGE_SIDE
from whisper_support import FAMILIES

LANGUAGE = r".*text_model.*\.(q_proj|v_proj|up_proj)"
TOWER = r".*vision_model.*\.(q_proj|v_proj|out_proj|fc1)"
CONNECTOR = r".*connector.*\.proj"
ALL = r".*(text_model|vision_model|connector).*proj|.*fc[12]"
LORA = {"language": LANGUAGE, "tower": TOWER, "connector": CONNECTOR, "all": ALL}
OTHERS: dict[str, peft.PeftConfig] = FAMILIES | {
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
    "hira": peft.HiraConfig(r=3, target_modules=["q_proj", "k_proj", "out_proj", "fc1"]),
}


@dataclass(frozen=True)
class Seen:
    """A request: which images (by their seeds) and which adapter (by its label, None for the base model)."""

    images: tuple[int, ...]
    adapter: str | None = None


def image_of(seed: int) -> Image.Image:
    """Noise, square or wide: 5 tiles or 3."""
    height = IMAGE_SIDE * (2 - seed % 2)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, 2 * IMAGE_SIDE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class World:
    """The tiny Idefics3 with its adapters, and what each amounts to."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = model
        base = support.load(model)
        self.states: dict[str | None, State] = {None: dict(base.state_dict())}
        for seed, (label, modules) in enumerate(LORA.items()):
            config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules)
            self.states[label] = support.save_peft_adapter(model, folder / label, config, seed)
        towers = [name for name in support.linear_modules(base) if "text_model" not in name]
        self.states["flora"] = support.write_flora_adapter(base, folder / "flora", 3, "mean", 0, towers)
        for label, config in OTHERS.items():
            fill: Fill = partial(fill_normal, std=0.05) if label == "oft" else fill_normal
            wrapped: Any = save_filled(support.load(model), config, folder / label, fill)
            self.states[label] = wrapped.merge_and_unload().state_dict()
        self.paths: Mapping[str | None, Path | None] = {
            label: None if label is None else folder / label for label in self.states
        }
        self._processor: Any = transformers.AutoProcessor.from_pretrained(model)
        self._judge: Any = support.load(model).double()

    def _text(self, ask: Seen) -> str:
        return "".join(f"{chr(97 + i)}<image>" for i in range(len(ask.images))) + "? "

    def prompt(self, ask: Seen) -> dict[str, Any]:
        """In vLLM's form."""
        return {"prompt": self._text(ask), "multi_modal_data": {"image": [image_of(seed) for seed in ask.images]}}

    def ask(self, engine: support.Engine, asks: Sequence[Seen], tokens: int = 6) -> list[Answer]:
        return engine.generate([self.prompt(ask) for ask in asks], [self.paths[ask.adapter] for ask in asks], tokens)

    def _inputs(self, ask: Seen) -> Any:
        images = [image_of(seed) for seed in ask.images]
        how = {"input_data_format": "channels_last", "return_tensors": "pt"}
        return self._processor(text=self._text(ask), images=images, **how)

    def oracle(self, ask: Seen) -> Oracle:
        """transformers looking at a request's images."""
        inputs, judge = self._inputs(ask), self._judge
        pixels, mask = inputs["pixel_values"].double(), inputs["pixel_attention_mask"]

        class Seeing(torch.nn.Module):
            def forward(self, tokens: torch.Tensor) -> Any:
                return judge(input_ids=tokens, pixel_values=pixels, pixel_attention_mask=mask)

            def load_state_dict(self, state: Any, *_: Any, **__: Any) -> Any:
                return judge.load_state_dict(state)

        seeing: Any = Seeing()
        return Oracle(seeing)

    def error(self, ask: Seen, answer: Answer, prompt: Sequence[int] | None = None) -> float:
        """Largest difference of a logprob from the merged model's; infinite where a token differs.

        `prompt`: what was asked about the images, if not `self.prompt`.
        """
        tokens = tuple(prompt or self._inputs(ask)["input_ids"][0].tolist())
        return self.oracle(ask).error(self.states[ask.adapter], Ask(tokens), answer)

    def errors(self, asks: Sequence[Seen], answers: Sequence[Answer]) -> dict[Seen, float]:
        """Those beyond the tolerance."""
        found = {ask: self.error(ask, answer) for ask, answer in zip(asks, answers, strict=True)}
        return {ask: error for ask, error in found.items() if error >= support.LOGPROB_TOLERANCE}
