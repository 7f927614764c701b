"""The heads of classifiers with adapters: they run on pooled rows, one a request, or on a request's tokens.

vLLM's pooler hands runs of the batch's requests, in its order, to the pooler of their task, whose head calls the layer
(the checkpoint's `score`) once for the run's pooled rows, or once a request for all its tokens (`token_classify`). So
whose a call's rows are follows from the mapping and from counting; calls of anyone else are the base model's.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.pooler.seqwise import ClassifierPoolerHead
from vllm.model_executor.layers.pooler.special import DispatchPooler
from vllm.model_executor.layers.pooler.tokwise import TokenClassifierPoolerHead

from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.opaque_linear import OpaqueLinear
from flora_vllm.ops.terms import group_by_slot
from flora_vllm.plugin.attach import LEFT_OUT, Attached
from flora_vllm.plugin.head import AdaptedHead
from flora_vllm.plugin.hook_table import POOLER_HOOKS
from flora_vllm.plugin.hooks import verify
from flora_vllm.slots import LinearLayout, SliceLayout
from flora_vllm.step import Step, slots_of


class PooledRows:
    """Whose the rows are that a classifier's head is called with. `step`: what its op reads, set for each call."""

    def __init__(self) -> None:
        self.step = Step(may_pad=False)
        self._slot_of_request: torch.Tensor | None = None  # None: no request's adapter has the layer
        self._next = 0  # the first request of the run that comes
        self._run: torch.Tensor | None = None  # slots of the run that is pooled now
        self._chunk = 0  # its next request where they come one by one

    def set_mapping(self, requests: Sequence[int], _tokens: Sequence[int], slot_of_adapter: Mapping[int, int]) -> None:
        """Adapter ids of the coming step's requests (0 or less: none); slot 0 for adapters without the layer."""
        self.clear()
        if any(slot_of_adapter.values()):
            slot_Q = slots_of(requests, slot_of_adapter)
            self._slot_of_request = slot_Q if slot_Q.any() else None

    def clear(self) -> None:
        self.step.clear()
        self._slot_of_request = self._run = None

    def begin(self) -> None:
        """A model run starts under the present mapping."""
        self.step.begin()
        self._next = 0

    def pool(self, pooler: Callable[..., Any], hidden_states: torch.Tensor, pooling_metadata: Any) -> Any:
        """One run of requests is pooled: `pooler`'s forward."""
        count, slots = len(pooling_metadata.pooling_params), self._slot_of_request
        if slots is not None:
            run = slots[self._next : self._next + count]
            # More requests than the step has: no rows of that many, which the op then refuses.
            self._run = run if len(run) == count else run[:0]
        self._next, self._chunk = self._next + count, 0
        try:
            return pooler(hidden_states, pooling_metadata)
        finally:
            self._run = None

    def head(self, head: Callable[..., Any], pooled_data: Any, pooling_metadata: Any) -> Any:
        """The forward of a head that calls the layer with a row a request of the run."""
        with self._rows(self._run):
            return head(pooled_data, pooling_metadata)

    def chunk(self, forward_chunk: Callable[..., Any], pooled_data: torch.Tensor | None, param: Any) -> Any:
        """The same of one that calls it with all tokens of the run's next request, None where more are to come."""
        self._chunk += 1
        slot_N = self._run
        if slot_N is not None and pooled_data is not None:
            slot_N = slot_N[self._chunk - 1 : self._chunk].expand(len(pooled_data))
        with self._rows(slot_N if pooled_data is not None else None):
            return forward_chunk(pooled_data, param)

    @contextmanager
    def _rows(self, slot_N: torch.Tensor | None) -> Iterator[None]:
        """Within it the layer's rows have these slots; none of them says that they are not known."""
        if slot_N is not None and (slot_N.any() or not len(slot_N)):
            self.step.segments = group_by_slot(slot_N)
        try:
            yield
        finally:
            self.step.segments = None


def attach_classifier(
    model: Any, attached: Attached, only: Callable[[str], bool], device: torch.device
) -> PooledRows | None:
    """Take over a classifier's head where adapters may change it. Whose its rows are; None if there is none."""
    pooler = getattr(model, "pooler", None)
    if type(pooler) is not DispatchPooler:
        return None
    poolers = list(pooler.poolers_by_task.values())
    heads: list[Any] = [one.head for one in poolers if type(getattr(one, "head", None)) in _CALLS]
    layers = {id(head.classifier): head.classifier for head in heads if isinstance(head.classifier, LinearBase)}
    names = [name for name, module in model.named_modules() if id(module) in layers]
    if len(heads) != len(poolers) or len(layers) != 1 or len(names) != 1:
        return None
    name, layer = names[0], next(iter(layers.values()))
    if not only(name):
        attached.refused[name] = LEFT_OUT
        return None
    verify(device.type, POOLER_HOOKS)
    rows = PooledRows()
    _take_over(name, layer, attached, rows, device)
    for one in poolers:
        one.forward = functools.partial(rows.pool, one.forward)
        _CALLS[type(one.head)](rows, one.head)
    return rows


def _of_requests(rows: PooledRows, head: Any) -> None:
    head.forward = functools.partial(rows.head, head.forward)


def _of_tokens(rows: PooledRows, head: Any) -> None:
    head.forward_chunk = functools.partial(rows.chunk, head.forward_chunk)


_CALLS = {ClassifierPoolerHead: _of_requests, TokenClassifierPoolerHead: _of_tokens}


def _take_over(name: str, module: Any, attached: Attached, rows: PooledRows, device: torch.device) -> None:
    method = module.quant_method
    stock_apply = method.apply
    width, size = module.input_size, module.output_size

    def base(x_NI: torch.Tensor) -> torch.Tensor:
        return stock_apply(module, x_NI, None)

    layer = AdaptedHead(
        OpaqueLinear(base, (size,), DispatchRule("stacked"), width, device), rows.step, (size,), None, device
    )

    def apply(_module: Any, x_NI: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return stock_apply(module, x_NI, bias) if rows.step.segments is None else layer.forward(x_NI, bias)

    attached.layouts[name] = LinearLayout(name, width, 0, width, (SliceLayout(name, size, 0, 0, size),), size)
    attached.dtypes[name] = module.params_dtype
    attached.biases[name] = getattr(module, "bias", None)
    attached.layers[name] = layer
    attached.refused.pop(name, None)
    module.quant_method = copy.copy(method)
    module.quant_method.apply = apply
