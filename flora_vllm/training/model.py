"""The tuner PEFT drives: finds the target layers, refuses what can't be adapted, routes mixed batches."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn
from torch.utils.hooks import RemovableHandle

from flora_vllm.errors import ConfigError
from flora_vllm.training.config import FloraConfig
from flora_vllm.training.layer import FloraLinear, linear_features
from flora_vllm.training.peft_type import PREFIX, register

MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


class FloraModel(BaseTuner):
    """A model with FLoRA adapters; made by `peft.get_peft_model(model, FloraConfig(...))`."""

    prefix: str = PREFIX
    tuner_layer_cls = FloraLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: FloraConfig, model: nn.Module) -> None:
        """Refuse, before anything is replaced, every target that can't be adapted: one error with all of them."""
        config = cast(FloraConfig, _maybe_include_all_linear_layers(copy(peft_config), model))
        heads = {id(head) for head in [getattr(model, "get_output_embeddings", lambda: None)()] if head is not None}
        inside: list[str] = []
        faults = []
        for key, module in model.named_modules():
            if not key or key.startswith(tuple(inside)):
                continue
            if isinstance(module, BaseTunerLayer):
                inside.append(f"{key}.")
            if not check_target_module_exists(config, key):
                continue
            if id(module) in heads:
                faults.append(f"{key} is the output layer, which PEFT would save whole beside the factors")
                continue
            try:
                sides = linear_features(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
            except ConfigError as error:
                faults.append(f"{key}: {error}")
                continue
            if (rank := rank_of(config, key)) > min(sides):
                faults.append(f"{key} is {sides[0]} to {sides[1]} features, too small for rank {rank}")
        if faults:
            raise ConfigError(f"FLoRA can't adapt {len(faults)} of the target modules:\n  " + "\n  ".join(faults))

    def _check_target_module_compatiblity(self, _peft_config: FloraConfig, model: nn.Module, target_name: str) -> None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type in MAMBA_TYPES and target_name in ("out_proj", "conv1d"):
            raise ConfigError(
                f"{target_name} of a {model_type} model is read by a fused kernel, not called; leave it out"
            )

    def _create_and_replace(
        self,
        peft_config: FloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,  # noqa: ARG002  (PEFT's signature)
    ) -> None:
        rank = rank_of(peft_config, current_key)
        if isinstance(target, FloraLinear):
            target.update_layer(adapter_name, rank, peft_config)
            return
        layer = FloraLinear(target, adapter_name, rank, peft_config, **get_quantization_kwargs(self.model))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Generator[None]:
        """PEFT's door for `adapter_names=` in `forward` and `generate`; refused while training, as for LoRA.

        And for the places where examples invoke their adapters, which it finds in `input_ids`.
        """
        names, offsets = kwargs.pop("adapter_names", None), kwargs.pop("alora_offsets", None)
        if offsets is not None:
            with (
                self._adapters_from(offsets, kwargs.get("num_beams") or 1),
                self._enable_peft_forward_hooks(adapter_names=names),
            ):
                yield
            return
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        with self.adapter_of_each_example(names, num_beams=kwargs.get("num_beams") or 1):
            yield

    @contextmanager
    def _adapters_from(self, offsets: Sequence[int | None], num_beams: int) -> Generator[None]:
        """Inside the context example i's adapter begins `offsets[i]` tokens before the end. Raises ConfigError."""
        if num_beams > 1:
            raise ConfigError("beam search with alora_invocation_tokens is not supported, as in PEFT; use num_beams=1")
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ConfigError(
                "gradient checkpointing runs layers again where the places of alora_invocation_tokens are no longer "
                "known; turn it off to train this adapter"
            )
        hook = partial(pass_on, alora_offsets=list(offsets))
        handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, FloraLinear)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def adapter_of_each_example(self, adapter_names: Sequence[str], num_beams: int = 1) -> Generator[None]:
        """Inside the context example i of every batch goes through adapter `adapter_names[i]` ("__base__": none).

        Works while training too; with gradient checkpointing `backward` must run inside the context, because the
        forward runs again there. With beams each name counts `num_beams` times, but not in an encoder, which sees
        the examples once. Raises ValueError for an adapter that no layer has.
        """
        layers = [m for m in self.modules() if isinstance(m, FloraLinear | AuxiliaryTrainingWrapper)]
        known = {name for layer in layers if isinstance(layer, FloraLinear) for name in layer.flora_A}
        if unknown := sorted(set(adapter_names) - known - {"__base__"}):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        encoder = _encoder(self.model) if num_beams > 1 else None
        in_encoder = set() if encoder is None else {id(m) for m in encoder.modules()}
        repeated = [name for name in adapter_names for _ in range(num_beams)]
        handles: list[RemovableHandle] = []
        try:
            for layer in layers:
                names = list(adapter_names) if id(layer) in in_encoder else repeated
                hook = partial(pass_on, adapter_names=names)
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def rank_of(config: FloraConfig, module_name: str) -> int:
    """The rank `config` gives the module, `rank_pattern` first."""
    return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module_name), config.r)


def pass_on(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], **more: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's forward pre-hook that says more: which adapter each example is for, or where it begins."""
    return args, {**kwargs, **more}


def _encoder(model: nn.Module) -> nn.Module | None:
    encoder = getattr(model, "get_encoder", lambda: None)()
    # transformers 5 gives every model a get_encoder that returns the model itself if it has none.
    return None if encoder is model or not isinstance(encoder, torch.nn.Module) else encoder


register(FloraConfig, FloraModel)
