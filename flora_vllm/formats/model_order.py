"""The linear layers of a model in the order of its Hugging Face class.

Some families number their modules (TinyLoRA, UniLoRA): what a file means then depends on that order, which neither the
checkpoint's files nor an engine's packed layers keep. The class is built without memory for its weights.
Embeddings are none of them: no such family adapts one here, and PEFT's "all-linear" names none.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from flora_vllm.errors import AdapterError


@lru_cache(maxsize=4)
def modules_in_order(directory: Path | str) -> Mapping[str, tuple[int, int]]:
    """Module path -> (O, I). Raises AdapterError if transformers cannot build the model."""
    from transformers import AutoConfig

    return modules_of(AutoConfig.from_pretrained(directory))


def modules_elsewhere(directory: str) -> Mapping[str, tuple[int, int]]:
    """The same in a process of its own, for one in which transformers' classes are no longer what they were."""
    code = (
        "import json, sys; from flora_vllm.formats.model_order import modules_in_order; "
        "json.dump(modules_in_order(sys.argv[1]), sys.stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code, directory], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AdapterError(f"the modules of {directory} cannot be listed: {done.stderr.strip()[-300:]}")
    return {name: (rows, columns) for name, (rows, columns) in json.loads(done.stdout).items()}


def modules_of(config: Any) -> Mapping[str, tuple[int, int]]:
    """The same for a Hugging Face config in memory."""
    import transformers

    names = getattr(config, "architectures", None) or []
    model_class = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if model_class is None:
        raise AdapterError(
            f"this family numbers its modules in the order of the Hugging Face model, and transformers has no class "
            f"{' or '.join(names) or 'for this model'}"
        )
    with torch.device("meta"):
        return in_order(model_class(config))


def in_order(model: torch.nn.Module) -> Mapping[str, tuple[int, int]]:
    """The same for a model in memory."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif type(module).__name__ == "Conv1D":
            weight = module.weight
            assert isinstance(weight, torch.Tensor), "transformers' Conv1D has a weight"
            shapes[name] = (weight.shape[1], weight.shape[0])
    return shapes
