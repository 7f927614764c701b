"""Rows of encoder-decoder models that are no tokens: whose they are, and which models we know it of.

vLLM says of a step's tokens which adapter they use, and knows two more mappings for models with a tower: of the rows
the tower runs on and of those of the connector behind it. Whisper fits that. Its encoder is the tower. What is called
a connector elsewhere is the kv_proj of every cross-attention: it runs on the encoder's output, in the step that
computes a request's first token and in no other (later ones read the key-value cache). In that step the encoder runs
once, on the audio of all requests that begin, each padded to max_source_positions rows, in the order of the mapping;
its outputs go to kv_proj in the same order. So both mappings have the same length, and any other is an error.

Outputs of the encoder depend on the adapter: with vLLM's option for towers the identity of an audio includes the
adapter's, wherever vLLM may keep its encoding.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from flora_vllm.errors import ConfigError
from flora_vllm.plugin.hook_table import ENCODER_HOOKS
from flora_vllm.plugin.hooks import offers, verify
from flora_vllm.plugin.speech import detect_language_with_adapter
from flora_vllm.plugin.towers import ItemRows
from flora_vllm.step import Step

WHISPER = "WhisperForConditionalGeneration"
_MAPPING = f"vllm.model_executor.models.whisper:{WHISPER}.get_mm_mapping"  # patches/0013


def prepare_config(config: Any) -> None:
    """Make an encoder-decoder engine tell encodings of one audio under two adapters apart. Raises ConfigError."""
    architecture = config.model_config.architecture
    if architecture != WHISPER:
        raise ConfigError(
            f"encoder-decoder models of architecture {architecture} cannot be served with adapters: which of their "
            f"rows belong to which request is known for {WHISPER} only; start without --enable-flora"
        )
    verify(config.device_config.device_type, ENCODER_HOOKS)
    config.lora_config.enable_tower_connector_lora = True
    detect_language_with_adapter()


def describe_whisper(model: Any) -> None:
    """Give a Whisper model the two methods by which vLLM finds a tower's rows."""
    if offers(_MAPPING):
        return
    model.get_mm_mapping = MethodType(_whisper_mapping, model)
    model.get_mm_lora_token_counts = MethodType(_whisper_rows, model)


def _whisper_mapping(self: Any) -> Any:
    from vllm.model_executor.models.module_mapping import MultiModelKeys

    return MultiModelKeys.from_string_field(
        language_model="model.decoder.",
        connector=[f"model.decoder.layers.{i}.encoder_attn.kv_proj" for i in range(len(self.model.decoder.layers))],
        tower_model="model.encoder.",
    )


def _whisper_rows(_model: Any, *, modality: str, mm_kwargs: Any, num_mm_embeds: int) -> tuple[int, int]:
    """(encoder rows, cross-attention rows) of one audio: both see each of its positions once."""
    del modality, mm_kwargs
    return num_mm_embeds, num_mm_embeds


@dataclass(frozen=True)
class RowSpaces:
    """Which layers run on which rows: mapping type of vLLM's (by name) -> step, and layer prefix -> mapping type.

    `items`: of multimodal models whose towers and connectors can be adapted; the other mappings' rows are theirs.
    """

    steps: Mapping[str, Step]
    prefixes: Mapping[str, str] = field(default_factory=dict)
    items: ItemRows | None = None

    @property
    def tokens(self) -> Step:
        return self.steps["LANGUAGE"]

    @property
    def others(self) -> Iterator[Step]:
        return (step for kind, step in self.steps.items() if kind != "LANGUAGE")

    @property
    def has_encoder(self) -> bool:
        """Whether this is an encoder-decoder model, whose encoder's rows follow vLLM's mapping of them."""
        return len(self.steps) > 1 and self.items is None

    def step_of(self, layer: str) -> Step | None:
        """The step of the longest prefix the layer's name has; without prefixes all rows are tokens."""
        if not self.prefixes:
            return self.tokens
        matching = [prefix for prefix in self.prefixes if layer.startswith(prefix)]
        return self.steps[self.prefixes[max(matching, key=len)]] if matching else None

    def runs_on_tokens(self, layer: str) -> bool:
        """Whether the layer's rows are a step's tokens. Of an output layer that stands beside the model they are."""
        return self.step_of(layer) not in (*self.others,)

    def begin(self, kind: str) -> None:
        """The mapping of this kind was set. A step's first is that of its tokens, with which the others' end."""
        self.steps[kind].begin()
        if kind == "LANGUAGE":
            if self.items is not None:
                self.items.forget()
            for step in self.others:
                step.expire(is_base=self.tokens.segments is None)

    def set_mapping(self, mapping: Any, slot_of_adapter: Mapping[int, int]) -> None:
        """Take vLLM's mapping of one kind of rows. Of items it counts the rows, which we need not know."""
        if mapping.type.name == "LANGUAGE" or self.items is None:
            self.steps[mapping.type.name].set_mapping(mapping.index_mapping, slot_of_adapter)
        elif mapping.type.name == "TOWER":
            self.items.set(mapping.prompt_mapping, slot_of_adapter)

    def clear(self) -> None:
        for step in self.steps.values():
            step.clear()


def row_spaces(model: Any, items: ItemRows | None = None) -> RowSpaces:
    """The row spaces of a model: tokens alone, but for encoder-decoder models that `prepare_config` let pass, and for
    multimodal ones with `items`."""
    if type(model).__name__ == WHISPER:
        describe_whisper(model)
        steps = {kind: Step(may_pad=kind == "LANGUAGE") for kind in ("LANGUAGE", "TOWER", "CONNECTOR")}
        return RowSpaces(steps, _prefixes(model))
    if not hasattr(model, "get_mm_mapping"):
        return RowSpaces({"LANGUAGE": Step()})
    if items is None:
        return RowSpaces({"LANGUAGE": Step()}, dict.fromkeys(model.get_mm_mapping().language_model[:1], "LANGUAGE"))
    return RowSpaces({"LANGUAGE": Step(), "TOWER": items.step, "CONNECTOR": items.step}, _prefixes(model), items)


def _prefixes(model: Any) -> dict[str, str]:
    """Prefix of a multimodal model's layers -> the mapping of vLLM's that their rows have."""
    keys = model.get_mm_mapping()
    kinds = {"LANGUAGE": keys.language_model, "TOWER": keys.tower_model, "CONNECTOR": keys.connector}
    return {prefix: kind for kind, prefixes in kinds.items() for prefix in prefixes}
