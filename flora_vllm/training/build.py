"""A frozen base model with adapters of one of three methods, built with the mistakes caught that users make."""

import re
from collections.abc import Callable

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from flora_vllm.errors import ConfigError
from flora_vllm.training.config import FloraConfig

# What transformers raises for a model that is not there or is damaged.
UNLOADABLE = (OSError, ValueError, SafetensorError)

# IA3 scales the input of these and the output of all others.
FEEDFORWARD = ("down_proj", "fc2", "dense_4h_to_h", "wo", "w2")
ALL_LINEAR = "all-linear"

# What is adapted if nobody says, for architectures PEFT has no default for. Whisper's are the paper's: every fully
# connected layer of encoder and decoder.
DEFAULT_TARGETS = {"whisper": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}

Targets = list[str] | str | None


def _task(model_type: str) -> str | None:
    # PEFT's wrapper for sequence-to-sequence models insists on input_ids, which Whisper has none of.
    return None if model_type == "whisper" else "CAUSAL_LM"


def _flora(rank: int, targets: Targets, model_type: str) -> PeftConfig:
    return FloraConfig(r=rank, target_modules=targets, task_type=_task(model_type))


def _lora(rank: int, targets: Targets, model_type: str) -> PeftConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type=_task(model_type))


def _ia3(rank: int, targets: Targets, model_type: str) -> PeftConfig:
    if rank != 1:
        raise ConfigError(f"IA3 has no rank, got --rank {rank}; leave it out")
    if isinstance(targets, str):
        raise ConfigError(f"IA3 needs its target modules by name, got {targets!r}")
    feedforward = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model_type, [])
    if targets is not None:
        feedforward = [name for name in targets if name in (*FEEDFORWARD, *feedforward)]
    return IA3Config(
        target_modules=targets,
        feedforward_modules=feedforward if targets is not None else None,
        task_type=_task(model_type),
    )


# Name -> (rank, targets, model type) -> PEFT's configuration.
METHODS: dict[str, Callable[[int, Targets, str], PeftConfig]] = {"flora": _flora, "lora": _lora, "ia3": _ia3}


def load_base(base: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and tokenizer at `base` (directory or hub id), in the checkpoint's dtype, frozen.

    On the GPU if there is one. Raises ConfigError with transformers' reason if it can't be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    except UNLOADABLE as error:
        raise ConfigError(f"base model {base} can't be loaded: {error}") from None
    model.config.use_cache = False
    model.requires_grad_(False)
    if torch.cuda.is_available():
        nn.Module.to(model, "cuda")
    return model, tokenizer


def parse_targets(text: str | None, model_type: str) -> Targets:
    """`--targets`: "all-linear", names with commas, or a regular expression; None leaves it to our table or PEFT's.

    Raises ConfigError for an expression that is none.
    """
    if text is None:
        return DEFAULT_TARGETS.get(model_type)
    if text == ALL_LINEAR or re.search(r"[^\w,.\s-]|\.\*", text):
        try:
            re.compile(text)
        except re.error as error:
            raise ConfigError(f"targets (--targets): {text!r} is no regular expression ({error})") from None
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def add_adapter(model: PreTrainedModel, config: PeftConfig, name: str = "default") -> PeftModel:
    """`get_peft_model`, with an unknown target answered by the names that are there. Raises ConfigError."""
    names = linear_names(model)
    targets = getattr(config, "target_modules", None)
    for target in sorted(targets) if isinstance(targets, set) else []:
        alone = FloraConfig(target_modules=[target])
        if not any(check_target_module_exists(alone, name) for name, _ in model.named_modules()):
            raise ConfigError(f"target {target!r} matches no module; linear layers here: {', '.join(names)}")
    try:
        return get_peft_model(model, config, adapter_name=name)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{error} Linear layers here: {', '.join(names)}") from None


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all linear layers."""
    return sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})
