"""The output layer (`lm_head`) with adapters: it runs on rows of its own.

vLLM runs it through the model's `compute_logits`, on two kinds of rows: those tokens of a step after which it samples
(one a request, and one more for each speculated token), and, for prompts whose logprobs are asked for, runs of the
step's tokens. vLLM's mapping says whose they are; which kind a call is of is known by where it comes from. Anyone
else's calls (a draft model that shares the layer) are the base model's.
"""

import copy
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from flora_vllm.layers import AdaptedLinear
from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.opaque_linear import OpaqueLinear
from flora_vllm.ops.terms import LayerTerms, Segments, group_by_slot
from flora_vllm.plugin.attach import LEFT_OUT, POOLED_ROWS, UNKNOWN_ROWS, Attached
from flora_vllm.plugin.embeddings import vocabulary_part
from flora_vllm.plugin.hook_table import PROMPT_HOOKS
from flora_vllm.plugin.hooks import verify
from flora_vllm.plugin.trial import TOKENS, watched
from flora_vllm.slots import LinearLayout
from flora_vllm.step import Step, slots_of


class HeadRows:
    """Whose the rows are that the output layer is called with. `step`: what its op reads, set for each call."""

    def __init__(self) -> None:
        self.step = Step(may_pad=False)
        self._sampled: Segments | None = None
        self._slot_of_token: torch.Tensor | None = None  # None: no token's adapter has the layer
        self._hidden_TH: torch.Tensor | None = None  # of which the calls that come see rows

    def set_mapping(self, sampled: Sequence[int], tokens: Sequence[int], slot_of_adapter: Mapping[int, int]) -> None:
        """Adapter ids of the rows that the coming step samples from, and of all its tokens (0 or less: none).

        `slot_of_adapter`: 0 for adapters that leave the layer alone.
        """
        self.clear()
        if not any(slot_of_adapter.values()):
            return
        slot_S, slot_T = slots_of(sampled, slot_of_adapter), slots_of(tokens, slot_of_adapter)
        self._sampled = group_by_slot(slot_S) if slot_S.any() else None
        self._slot_of_token = slot_T if slot_T.any() else None

    def clear(self) -> None:
        self.step.clear()
        self._sampled = self._slot_of_token = None

    def begin(self) -> None:
        """A model run starts under the present mapping; it must sample through the layer."""
        self.step.segments = self._sampled
        self.step.begin()
        self.step.segments = None

    def logits(self, compute: Callable[..., Any], x_NH: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's `compute_logits`, with the layer's rows known for as long as it runs."""
        self.step.segments = self._segments_of(x_NH)
        try:
            return compute(x_NH, *args, **kwargs)
        finally:
            self.step.segments = None

    @contextmanager
    def of_tokens(self, hidden_TH: torch.Tensor) -> Iterator[None]:
        """Within it the layer is called with runs of the step's tokens, views of `hidden_TH`."""
        self._hidden_TH = hidden_TH
        try:
            yield
        finally:
            self._hidden_TH = None

    def _segments_of(self, x_NH: torch.Tensor) -> Segments | None:
        if self._hidden_TH is None:
            return self._sampled
        if self._slot_of_token is None or not len(x_NH):
            return None
        bytes_before = x_NH.data_ptr() - self._hidden_TH.data_ptr()
        first = bytes_before // (self._hidden_TH.stride(0) * self._hidden_TH.element_size())
        # Not a view of them: no segments of that many rows, which the op then refuses.
        is_view = x_NH.untyped_storage().data_ptr() == self._hidden_TH.untyped_storage().data_ptr()
        slot_N = self._slot_of_token[first : first + len(x_NH)] if is_view else self._slot_of_token[:0]
        return group_by_slot(slot_N) if slot_N.any() or not is_view else None


class AdaptedHead(AdaptedLinear):
    """No part of any CUDA graph: vLLM samples outside of them."""

    def why_not_captured(self) -> str | None:
        return None

    def graph_rows(self, _terms: LayerTerms) -> int:
        return 1


def attach_heads(
    model: Any,
    attached: Attached,
    step_of: Callable[[str], Step | None],
    only: Callable[[str], bool],
    config: Any,
    device: torch.device,
) -> HeadRows | None:
    """Take over the output layer where adapters may change it, and have `attached` say why where not.

    `step_of`, `only`: as for `attach`. The rows of the layer taken over; None if there is none.
    """
    heads = {name: module for name, module in model.named_modules() if isinstance(module, ParallelLMHead)}
    refused = {name: reason for name in heads if (reason := _refusal(name, heads[name], model, step_of, only, config))}
    heads = {name: module for name, module in heads.items() if name not in refused}
    refused |= _called_otherwise(model, heads, device)
    attached.refused |= refused
    heads = {name: module for name, module in heads.items() if name not in refused}
    if not heads:
        return None
    rows = HeadRows()
    for name, module in heads.items():
        _take_over(name, module, attached, rows, device)
    compute: Any = functools.partial(rows.logits, model.compute_logits)
    compute.head_rows = rows  # where the readers of prompts' logprobs, which are given this call, find it
    model.compute_logits = compute
    follow_prompts(2 if config.use_v2_model_runner else 1)
    return rows


def _refusal(
    name: str,
    head: Any,
    model: Any,
    step_of: Callable[[str], Step | None],
    only: Callable[[str], bool],
    config: Any,
) -> str | None:
    if hasattr(model, "pooler"):
        return POOLED_ROWS
    if step_of(name) is None:
        return UNKNOWN_ROWS
    if not only(name):
        return LEFT_OUT
    if getattr(config.model_config.hf_text_config, "norm_head", False):  # Bailing: columns of length one
        return "this model's norm_head normalises its weight when it is read, and would an adapter's change with it"
    if config.use_v2_model_runner and config.speculative_config is not None:
        return "with speculative decoding this model runner does not say whose the rows of its output layer are"
    if getattr(config.parallel_config, "enable_batch_sharded_sampling", False):
        return "with batch-sharded sampling its rows are not in the order of the batch"
    if vocabulary_part(name, head) is None:
        return "its vocabulary is laid out in a way that adapters cannot follow"
    return None


def _called_otherwise(model: Any, heads: Mapping[str, Any], device: torch.device) -> dict[str, str]:
    """Layer name -> why it cannot be adapted, of those that `compute_logits` does not run once, on its own rows."""
    if not heads:
        return {}
    head = next(iter(heads.values()))
    with watched(heads) as rows, torch.inference_mode():
        try:
            model.compute_logits(torch.zeros(TOKENS, head.embedding_dim, dtype=head.params_dtype, device=device))
        except Exception as error:  # noqa: BLE001 - models differ in what they take
            return dict.fromkeys(heads, f"the model's logits could not be tried at start ({error})")
    return {
        name: "the model's logits do not come from one plain call of it (a head_dtype of its own?)"
        for name, counts in rows.items()
        if counts != [TOKENS]
    }


def _take_over(name: str, head: Any, attached: Attached, rows: HeadRows, device: torch.device) -> None:
    """Its op sees the vocabulary's own rows; the padding that vLLM puts behind them stays vLLM's."""
    method = head.quant_method
    stock_apply = method.apply
    part = vocabulary_part(name, head)
    assert part is not None, "asked before"
    size, width = part.size, head.embedding_dim
    padding = head.num_embeddings_per_partition - size

    def base(x_NH: torch.Tensor) -> torch.Tensor:
        return stock_apply(head, x_NH, None)[:, :size].contiguous()

    kernel = OpaqueLinear(base, (size,), DispatchRule("stacked"), width, device)
    layer = AdaptedHead(kernel, rows.step, (size,), None, device)

    def apply(_head: Any, x_NH: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if rows.step.segments is None:
            return stock_apply(head, x_NH, bias)
        y_NV = layer.forward(x_NH, None if bias is None else bias[:size])
        return torch.nn.functional.pad(y_NV, (0, padding)) if padding else y_NV

    attached.layouts[name] = LinearLayout(name, width, 0, width, (part,), head.org_vocab_size)
    attached.dtypes[name] = head.params_dtype
    attached.biases[name] = getattr(head, "bias", None)
    attached.layers[name] = layer
    head.quant_method = copy.copy(method)
    head.quant_method.apply = apply


@functools.cache
def follow_prompts(runner_version: int) -> None:
    """Have vLLM's model runner of this version say when it asks for the logits of prompts' tokens. Raises HookError."""
    verify(importlib.import_module("vllm.platforms").current_platform.device_type, PROMPT_HOOKS[runner_version])
    {1: _follow_v1, 2: _follow_v2}[runner_version]()


def _follow_v1() -> None:
    runner: Any = importlib.import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner
    original = runner._get_prompt_logprobs_dict

    @functools.wraps(original)
    def prompt_logprobs(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with _of_tokens(getattr(self.model, "compute_logits", None), hidden_states):
            return original(self, hidden_states, *args, **kwargs)

    runner._get_prompt_logprobs_dict = prompt_logprobs


def _follow_v2() -> None:
    worker: Any = importlib.import_module("vllm.v1.worker.gpu.sample.prompt_logprob").PromptLogprobsWorker

    def following(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def compute(self: Any, logits_fn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            with _of_tokens(logits_fn, hidden_states):
                return original(self, logits_fn, hidden_states, *args, **kwargs)

        return compute

    worker.compute_prompt_logprobs = following(worker.compute_prompt_logprobs)
    worker.compute_prompt_token_id_logprobs = following(worker.compute_prompt_token_id_logprobs)


def _of_tokens(compute_logits: Any, hidden_TH: torch.Tensor) -> AbstractContextManager[None]:
    rows: HeadRows | None = getattr(compute_logits, "head_rows", None)
    return nullcontext() if rows is None else rows.of_tokens(hidden_TH)
