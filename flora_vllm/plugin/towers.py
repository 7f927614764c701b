"""Towers and connectors of multimodal models: whose rows they run on, and which of their layers can be adapted.

vLLM encodes images and sounds of many requests at once. Which rows of a layer belong to which of them only the model
knows (patches are dropped, padded, merged, run in pieces); vLLM's own LoRA counts them by a formula of each model. Here
an encoder run holds items of one adapter only, so that all its rows are that adapter's, whatever their number. Runs
are in the order of the items, so an item's neighbours with the same adapter, or with none, are encoded together as in
stock vLLM.

Outputs of the encoder are kept by the adapter's identity beside the item's: vLLM's option does that.
"""

import functools
import importlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from flora_vllm.errors import ConfigError
from flora_vllm.plugin.hooks import verify
from flora_vllm.plugin.tower_hooks import TOWER_HOOKS
from flora_vllm.step import Step

FLAG = "--enable-tower-connector-lora"
OFF = f"it belongs to a tower or connector, which adapters change only where the server was started with {FLAG}"
NOT_IN_VLLM = (
    "vLLM serves no adapters of this model's towers and connectors; train its language model only, "
    "or merge this part into the base model"
)


def prepare_config(config: Any) -> None:
    """Check an engine that is asked for adapters of towers. Raises ConfigError or HookError."""
    verify(config.device_config.device_type, TOWER_HOOKS)
    for option, why in {
        "cudagraph_mm_encoder": "a graph of the encoder replays without adapters",
        "compile_mm_encoder": "which layers images are run through is found by running the encoder uncompiled",
    }.items():
        if getattr(config.compilation_config, option):
            raise ConfigError(f"{option} cannot be used with {FLAG}: {why}; leave one of the two out")


def is_asked(vllm_config: Any) -> bool:
    return bool(vllm_config.lora_config.enable_tower_connector_lora)


def why_not(model: Any, vllm_config: Any) -> str | None:
    """Why towers and connectors of this model are not adapted, or None."""
    if not is_asked(vllm_config):
        return OFF
    if not getattr(model, "supports_tower_connector_lora", False):
        return NOT_IN_VLLM
    settings = vllm_config.model_config.multimodal_config
    if settings is not None and settings.language_model_only:
        return "this engine runs the language model only (--language-model-only)"
    if (
        settings is not None
        and settings.mm_encoder_tp_mode == "data"
        and vllm_config.parallel_config.tensor_parallel_size > 1
    ):
        return "its weights are not shared among ranks (--mm-encoder-tp-mode data); leave that option out"
    return None


def name_refused(
    model: Any, refused: dict[str, str], adapted: Collection[str], unknown: str, reason: str | None
) -> None:
    """Have `refused` say of all modules of the model's towers and connectors that are not `adapted` why: `reason`, if
    there is one for all of them, in place of `unknown`."""
    keys = model.get_mm_mapping()
    prefixes = (*keys.tower_model, *keys.connector)
    for name, module in model.named_modules():
        if name.startswith(prefixes) and name not in adapted and module._parameters.get("weight") is not None:
            kind = f"in towers and connectors vLLM's linear layers take adapters, and it is a {type(module).__name__}"
            refused.setdefault(name, reason or kind)
    for name, given in refused.items():
        if given == unknown and name.startswith(prefixes):
            refused[name] = reason or unknown


class ItemRows:
    """The items that the encoder runs on next, by slot. `step`: that of all layers in towers and connectors."""

    def __init__(self) -> None:
        self.step = Step()
        self._slots: tuple[int, ...] | None = None

    def set(self, adapter_of_item: Sequence[int], slot_of_adapter: Mapping[int, int]) -> None:
        """Item i, in the order of the encoder, uses adapter id `adapter_of_item[i]` (0 or less: none)."""
        self._slots = tuple(slot_of_adapter[adapter] if adapter > 0 else 0 for adapter in adapter_of_item)
        # Until a run begins nobody's rows are known.
        self.step.expire(is_base=not any(self._slots))
        _expected[:] = [self]

    def forget(self) -> None:
        self._slots = None

    def runs(self, items: Sequence[Any], batches: Callable[[Sequence[Any]], Iterator[Any]]) -> Iterator[Any]:
        """`batches` of the items, of one slot each; while one is out, the step is its slot's."""
        slots, self._slots = self._slots, None
        if slots is None or len(slots) != len(items):
            yield from batches(items)  # not the run that was spoken of
            return
        start = 0
        for slot, run in groupby(slots):
            stop = start + len(list(run))
            self.step.use_for_all(slot)
            yield from batches(items[start:stop])
            start = stop
        self.step.expire(is_base=not any(slots))


# Of the manager whose encoder runs next; nobody else's encoder runs between its mapping and its run.
_expected: list[ItemRows] = []


def follow_items() -> None:
    """Have vLLM's model runners of this process encode items of one adapter at a time."""
    for module in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.mm.encoder_runner"):
        _batch_by_adapter(importlib.import_module(module))
    _leave_out_what_is_encoded()


@functools.cache
def _batch_by_adapter(runner: Any) -> None:
    original = runner.group_and_batch_mm_kwargs

    @functools.wraps(original)
    def group_and_batch_mm_kwargs(mm_kwargs: Any, **how: Any) -> Any:
        batches = functools.partial(original, **how)
        rows = _expected.pop() if _expected else None
        return batches(mm_kwargs) if rows is None else rows.runs(mm_kwargs, batches)

    runner.group_and_batch_mm_kwargs = group_and_batch_mm_kwargs


@functools.cache
def _leave_out_what_is_encoded() -> None:
    """vLLM's V2 runner says of all scheduled items whose they are, and encodes those whose output it does not have."""
    from flora_vllm.plugin.worker_manager import FloraWorkerManager

    runner: Any = importlib.import_module("vllm.v1.worker.gpu.model_runner")
    original = runner.set_active_mm_loras

    @functools.wraps(original)
    def set_active_mm_loras(**inputs: Any) -> None:
        cache = inputs["encoder_cache"]
        if isinstance(inputs["lora_manager"], FloraWorkerManager) and cache is not None:

            def is_run(item: Any) -> bool:
                known = item.identifier in cache.encoder_outputs
                return item.data is not None and not known and item.modality != "prompt_embeds"

            inputs["scheduled_encoder_inputs"] = {
                request: [i for i in items if is_run(cache.mm_features[request][i])]
                for request, items in inputs["scheduled_encoder_inputs"].items()
            }
        original(**inputs)

    runner.set_active_mm_loras = set_active_mm_loras
