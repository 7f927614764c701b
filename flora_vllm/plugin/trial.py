"""One run of the model at start, to see which modules run on a step's rows, and which on others or never.

A layer that runs on part of the batch (a head on pooled rows, an expert, a projection within a recurrence) or whose
weight is used without a call (absorbed, fused) cannot be given an adapter by row; found out in traffic it would fail
requests, or leave an adapter out. vLLM's own profile run does the same before there is a cache: attention returns
zeros, everything else is computed.
"""

import copy
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from vllm.distributed.parallel_state import get_pp_group
from vllm.forward_context import set_forward_context

logger = logging.getLogger(__name__)

TOKENS = 5


def run_once(model: Any, vllm_config: Any, device: torch.device) -> None:
    """Run `model` on TOKENS tokens, uncompiled and without attention metadata. Raises what the model raises."""
    positions = torch.arange(TOKENS, device=device)
    if vllm_config.model_config.uses_mrope:
        positions = positions.expand(3, -1)
    first = get_pp_group().is_first_rank
    intermediate = None
    if not first:
        intermediate = model.make_empty_intermediate_tensors(
            batch_size=TOKENS, dtype=vllm_config.model_config.dtype, device=device
        )
    with torch.inference_mode(), set_forward_context(None, vllm_config, num_tokens=TOKENS, skip_compiled=True):
        model(
            input_ids=torch.zeros(TOKENS, dtype=torch.int64, device=device) if first else None,
            positions=positions,
            intermediate_tensors=intermediate,
            inputs_embeds=None,
        )


def _input_rows(layer: Any, x: torch.Tensor, *_: Any, **__: Any) -> int:
    del layer  # named as callers name it
    return x.numel() // x.shape[-1]


@contextmanager
def watched(
    modules: Mapping[str, Any], call: str = "apply", rows_of: Callable[..., int] = _input_rows
) -> Iterator[dict[str, list[int]]]:
    """Within it, module name -> the numbers of rows, by `rows_of`, of each `call` of its quant method, or "forward"."""
    rows: dict[str, list[int]] = {name: [] for name in modules}
    methods = {name: module.quant_method for name, module in modules.items() if call != "forward"}

    def watching(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def watched_call(*args: Any, **kwargs: Any) -> Any:
            rows[name].append(rows_of(*args, **kwargs))
            return original(*args, **kwargs)

        return watched_call

    try:
        for name, module in modules.items():
            owner = module
            if name in methods:
                owner = module.quant_method = copy.copy(methods[name])
            setattr(owner, call, watching(name, getattr(owner, call)))
        yield rows
    finally:
        for name, module in modules.items():
            if name in methods:
                module.quant_method = methods[name]
            else:
                module.__dict__.pop("forward", None)


class Trial:
    """The run, made once for all that may be adapted. `embeddings`, `norms`: modules by name, beside linear layers.

    rows: module name -> the rows of each of its calls. fault: why the model could not be run, if it could not.
    """

    def __init__(
        self,
        model: Any,
        vllm_config: Any,
        device: torch.device,
        embeddings: Mapping[str, Any],
        norms: Mapping[str, Any],
    ) -> None:
        self._asked = model, vllm_config, device
        self.embeddings = embeddings
        self.norms = norms
        self.rows: dict[str, list[int]] = {}
        self.fault: str | None = None

    def layers_elsewhere(self, layers: Mapping[str, Any]) -> dict[str, str]:
        """Makes the run. Layer name -> why it cannot be adapted, for those that do not run on exactly a step's rows.

        An encoder runs on rows of its own, which a run of the model on tokens alone does not show: nothing is tried.
        """
        if self._asked[1].model_config.is_encoder_decoder:
            return {}
        with (
            watched(layers) as of_layers,
            watched(self.embeddings, "embedding", lambda _layer, ids: ids.numel()) as of_embeddings,
            watched(self.norms, "forward", lambda x=None, *_, **__: 0 if x is None else len(x)) as of_norms,
        ):
            try:
                run_once(*self._asked)
            except Exception as error:
                self.fault = f"the model could not be tried at start ({type(error).__name__}: {error})"
                logger.error("%s: no adapter of any of its layers can be served", self.fault, exc_info=error)
                # A layer that is never called would leave an adapter out in silence, which no step can notice.
                return dict.fromkeys(layers, self.fault)
        self.rows = of_embeddings | of_norms
        found = {}
        for name, counts in of_layers.items():
            if not counts:
                found[name] = (
                    "the model never calls it: its weight is used in another way, where no adapter would follow"
                )
            elif set(counts) != {TOKENS}:
                found[name] = "it runs on other rows than a step's tokens, where adapters cannot follow"
        return found


def layers_unused(layers: Mapping[str, Any], model: Any, vllm_config: Any, device: torch.device) -> dict[str, str]:
    """Layer name -> why it cannot be adapted, for those that no item of any modality is run through in a trial."""
    budget_class = importlib.import_module("vllm.multimodal.encoder_budget").MultiModalBudget
    registry = importlib.import_module("vllm.multimodal").MULTIMODAL_REGISTRY
    batches = importlib.import_module("vllm.v1.worker.gpu_model_runner").group_and_batch_mm_kwargs
    with watched(layers) as rows, torch.inference_mode():
        try:
            budget = budget_class(vllm_config, registry, enable_cache=False)
            for modality, _ in sorted(budget.mm_max_toks_per_item.items(), key=lambda size: size[1]):
                if all(rows.values()):
                    return {}  # a larger one shows nothing more
                items = budget.get_dummy_encoder_profile_inputs(modality, 1)
                for _, _, batch in batches(items, device=device):
                    model.embed_multimodal(**batch)
        except Exception as error:  # noqa: BLE001 - models differ in what they take
            return dict.fromkeys(layers, f"the model's encoder could not be tried at start ({error})")
    return {
        name: "no image or sound is run through it in a trial at start: its weight is used in another way, or never"
        for name, counts in rows.items()
        if not counts
    }
