"""FLoRA's learning rate: a multiplicative update needs tens of times LoRA's.

The paper trains LoRA at 1e-4 to 2e-4 and FLoRA at 6e-3 to 8e-3 (arXiv 2312.05677, section 5): a factor starts at 1
and has to move by a good part of 1, while LoRA's start at 0 and small values do.
"""

import warnings
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from flora_vllm.train_request import RATES

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

DEFAULT_LEARNING_RATE = RATES["flora"]
SMALLEST_SENSIBLE_RATE = 1e-3


def warn_if_lora_sized(rate: float) -> bool:
    """Warn if `rate` is one for LoRA; returns whether it did."""
    if rate >= SMALLEST_SENSIBLE_RATE:
        return False
    warnings.warn(
        f"learning rate {rate:g} is sized for LoRA; FLoRA's factors multiply the weight and need about "
        f"{DEFAULT_LEARNING_RATE:g} (at least {SMALLEST_SENSIBLE_RATE:g}), or they barely move",
        stacklevel=2,
    )
    return True


class FloraLearningRateCallback(TrainerCallback):
    """For transformers' Trainer and TRL's: warns once, as training begins, if a FLoRA adapter gets LoRA's rate."""

    def on_train_begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",  # noqa: ARG002  (the Trainer's signature)
        control: "TrainerControl",  # noqa: ARG002  (the Trainer's signature)
        **kwargs: Any,
    ) -> None:
        configs = getattr(kwargs.get("model"), "peft_config", {})
        if any(str(getattr(c.peft_type, "value", c.peft_type)) == "FLORA" for c in configs.values()):
            warn_if_lora_sized(args.learning_rate)
