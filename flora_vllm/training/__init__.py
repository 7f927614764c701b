"""FLoRA as a PEFT method: importing this package registers it, after which PEFT treats it like any method of its own.

`import flora_vllm.training` must come before `PeftModel.from_pretrained` or `PeftConfig.from_pretrained` of a FLoRA
checkpoint; without it PEFT stops with `KeyError: 'FLORA'`, because PEFT 0.21 knows no entry point for methods from
outside. May use PEFT, torch and transformers; knows nothing of vLLM.
"""

try:
    import peft as _peft  # noqa: F401  (the check is the point)
except ImportError as error:
    raise ImportError('training needs PEFT: pip install "flora-vllm[train]"') from error

from flora_vllm.training.config import FloraConfig
from flora_vllm.training.layer import FloraLinear
from flora_vllm.training.learning_rate import DEFAULT_LEARNING_RATE, FloraLearningRateCallback
from flora_vllm.training.model import FloraModel

__all__ = ["DEFAULT_LEARNING_RATE", "FloraConfig", "FloraLearningRateCallback", "FloraLinear", "FloraModel"]
