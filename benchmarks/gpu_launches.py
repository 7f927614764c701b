"""Stand-ins for the Triton kernels: they count launches, or keep them and launch them again as a CUDA graph would."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import harness
import torch

from flora_vllm.ops.gpu import kernels as triton_kernels
from flora_vllm.ops.gpu import low_rank as triton_low_rank
from flora_vllm.ops.gpu.check import Trial, capture_on_gpu
from flora_vllm.ops.terms import LayerTerms, SlotLimits, group_by_slot

KERNELS = {
    "flora_stacked": triton_kernels,
    "flora_modulated": triton_kernels,
    "flora_low_down": triton_low_rank,
    "flora_low_up": triton_low_rank,
}
Launch = tuple[Any, Any, tuple, dict[str, Any]]


class _Kept:
    """A kernel whose launches are kept in a list, and also made if `runs`."""

    def __init__(self, kernel: Any, launches: list[Launch], runs: bool) -> None:
        self._kernel, self._launches, self._runs = kernel, launches, runs

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self._launches.append((self._kernel, grid, args, kwargs))
            if self._runs:
                self._kernel[grid](*args, **kwargs)

        return launch


@contextlib.contextmanager
def kept_launches(*, runs: bool) -> Iterator[list[Launch]]:
    """The list that every launch of our kernels is added to meanwhile; without `runs` nothing is computed."""
    launches: list[Launch] = []
    kernels = {name: getattr(module, name) for name, module in KERNELS.items()}
    for name, module in KERNELS.items():
        setattr(module, name, _Kept(kernels[name], launches, runs))
    try:
        yield launches
    finally:
        for name, module in KERNELS.items():
            setattr(module, name, kernels[name])


def capture_interpreted(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
    """What `capture_on_gpu` does, without a GPU: the launches are kept and made again on the same memory."""
    with kept_launches(runs=True) as launches:
        output = run()

    def replay() -> None:
        for kernel, grid, args, kwargs in launches:
            kernel[grid](*args, **kwargs)

    return output, replay


def capture_for(device: torch.device) -> Callable:
    return capture_on_gpu if device.type == "cuda" else capture_interpreted


def _decode(device: torch.device, rank: int, tokens: int, adapters: int) -> tuple[Trial, Any, Any]:
    """A layer, its kernels and a decode step of tokens that take turns at the adapters."""
    trial = Trial(device, torch.float32 if device.type == "cpu" else torch.bfloat16, (64, 32), 64, tokens)
    slots: list[LayerTerms | None] = [None, *(trial.terms(rank) for _ in range(adapters))]
    # One path: what is counted and timed does not hang on a machine's constants.
    kernel = trial.kernel("stacked", SlotLimits(slots=adapters, rank=max(rank, 1), low_rank=16), slots)
    return trial, kernel, group_by_slot(torch.arange(tokens) % adapters + 1)


def launches_of(device: torch.device, rank: int) -> int:
    """Launches of a layer for eight tokens with a FLoRA adapter each; the base's own product is one of them."""
    trial, kernel, segments = _decode(device, rank, tokens=8, adapters=8)
    with kept_launches(runs=False) as launches:
        trial.forward(kernel, segments)
    return len(launches)


def host_us(device: torch.device, turns: int = 2000, runs: int = 10) -> dict[str, Any]:
    """This process's CPU time for one layer call with its launches left out, microseconds: median and spread of runs.

    32 tokens, 8 adapters of rank 8; the step is on the device already, as for all layers but the first. What Triton
    adds to a launch is in `gpu_host.py`.
    """
    trial, kernel, segments = _decode(device, 8, tokens=32, adapters=8)
    samples = []
    with kept_launches(runs=False) as launches:
        for _ in range(runs):
            begin = time.thread_time()
            for _ in range(turns // runs):
                trial.forward(kernel, segments)
            samples.append((time.thread_time() - begin) / (turns // runs) * 1e6)
            launches.clear()
    return harness.summary(samples, 2)
