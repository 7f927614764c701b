"""The Triton kernels tried on the GPU at hand before they serve on it: they were written and tested without one."""

import functools
from collections.abc import Iterator

import torch

from flora_vllm.ops.dispatch import DispatchRule, PathChoice
from flora_vllm.ops.gpu.linear import TritonLinear
from flora_vllm.ops.gpu.step import StepBuffers
from flora_vllm.ops.reference import reference_linear
from flora_vllm.ops.terms import LayerTerms, SliceTerms, SlotLimits, group_by_slot

# Largest error allowed, in units of the reference's root mean square: a few roundings of an output that is up to four
# times as large. A wrong index or a row left out is off by about one.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
_SIZES, _IN, _RANK, _TOKENS = (64, 33), 96, 5, 41


@functools.cache
def why_wrong(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels' results on `device` in `dtype`, or None. Compiles a few kernels once."""
    try:
        errors = dict(_errors(device, dtype))
    except RuntimeError as error:  # a launch that fails, and what torch and Triton raise for CUDA errors
        return f"the kernels do not run on this GPU ({error})"
    worst = max(errors, key=lambda name: errors[name])
    # Not <=: a NaN is an error too.
    if not all(error <= TOLERANCE[dtype] for error in errors.values()):
        return f"the kernels compute something else on this GPU (error {errors[worst]:.2g} in {worst})"
    return None


def _errors(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """(what, error) of each path and of the form that graphs capture, on a small layer with every kind of term."""
    random = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=random) * shape[-1] ** -0.5).to(dtype)

    def terms(rank: int, low: int, plain: bool) -> LayerTerms:
        return tuple(
            SliceTerms(
                plain_O=1 + tensor(size if rank > 1 else 1).float() if plain else None,
                a_RI=1 + tensor(rank, _IN), b_RO=1 + tensor(rank, size),
                down_RI=tensor(low, _IN), up_RO=tensor(low, size), offset_O=tensor(size).float(),
            )
            for size in _SIZES
        )  # fmt: skip

    slots = [None, terms(1, 3, plain=False), terms(_RANK, 1, plain=True), (SliceTerms(1 + tensor(64).float()), None)]
    weight_OI, bias_O, x_TI = tensor(sum(_SIZES), _IN), tensor(sum(_SIZES)), tensor(_TOKENS, _IN) * _IN**0.5
    segments = group_by_slot(torch.arange(_TOKENS) * 7 % 4)
    wanted_TO = reference_linear(x_TI, weight_OI, bias_O, _SIZES, slots, segments)
    on_device = [t.to(device) for t in (weight_OI, bias_O, x_TI)]
    paths: tuple[PathChoice, ...] = ("stacked", "modulated")
    for path in paths:
        weight, bias, x = on_device
        limits = SlotLimits(slots=3, rank=_RANK, low_rank=3)
        base = functools.partial(torch.nn.functional.linear, weight=weight)
        kernel = TritonLinear(weight, base, _SIZES, DispatchRule(path), _IN, limits)
        for slot, content in enumerate(slots[1:], 1):
            kernel.write_slot(slot, content)
        yield path, _error(kernel.forward(x, bias, segments), wanted_TO)
        if path == "stacked":
            buffers = StepBuffers(_TOKENS, 4, device)
            buffers.fill(segments, [False] * len(segments.slots))
            rows = kernel.stacked_rows(segments, [False] * len(segments.slots))
            yield "captured form", _error(kernel.graph_form(x, bias, buffers, rows), wanted_TO)


def _error(y_TO: torch.Tensor, wanted_TO: torch.Tensor) -> float:
    return float((y_TO.cpu().double() - wanted_TO).abs().max() / wanted_TO.square().mean().sqrt())
