"""The host's time for a layer call on a GPU, without one: all of ours and of Triton's but the driver.

Kernels are compiled for an H100 by Triton itself; what would load and launch them is stood in for. The base's own
product, which is not ours, is left out. Thread CPU time, 32 tokens of 8 adapters, the step already on the device.

    python benchmarks/gpu_host.py              # appended to results/gpu_host.jsonl
    python benchmarks/gpu_host.py --no-record
"""

import argparse
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast
from unittest import mock

import harness
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from flora_vllm.ops.gpu import compiled as triton_compiled
from flora_vllm.ops.gpu import launch as triton_launch
from flora_vllm.ops.gpu import linear as triton_linear
from flora_vllm.ops.gpu.check import Trial
from flora_vllm.ops.terms import SlotLimits, group_by_slot

TURNS, RUNS = 300, 15


class StandIn:
    """A driver for Triton whose last launches are kept: (the number of the loaded kernel, grid, arguments)."""

    def __init__(self) -> None:
        self.utils = self
        # Few, for it keeps their tensors' memory from being used again.
        self.launched: deque[tuple] = deque(maxlen=8)
        self._loaded = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 99  # no other driver's: Triton keeps compiled kernels by it

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, _name: str, _code: bytes, _shared: int, _device: int) -> tuple[int, int, int, int, int]:
        self._loaded += 1
        return 1, self._loaded, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, _module: int) -> None: ...

    def launcher_cls(self, _source: Any, _metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, _stream: int, function: int, *rest: Any) -> None:
            # Two records of the kernel's and two hooks come before its arguments.
            self.launched.append((function, (x, y, z), rest[4:]))

        return launch


# One: what Triton has compiled keeps the launcher it was loaded with.
_stand_in = StandIn()


@contextlib.contextmanager
def standing_in() -> Iterator[StandIn]:
    """Layers on the CPU take the launches that they take on a GPU meanwhile."""
    before = driver._active
    driver.set_active(cast(Any, _stand_in))
    _stand_in.launched.clear()
    with (
        mock.patch.object(triton_linear, "why_unavailable", return_value=None),
        # Where it would run; nothing does.
        mock.patch.object(triton_launch, "INTERPRETED", new=True),
        mock.patch.dict(triton_compiled._compiled, clear=True),
    ):
        try:
            yield _stand_in
        finally:
            driver._active = before


def layer_call(rank: int, low: int, slot_T: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call of a layer for a step: 8 adapters of scaled products of `rank`, low-rank terms of `low`, or both."""
    trial = Trial(torch.device("cpu"), torch.float16, (64, 32), 64, tokens=len(slot_T))
    one = None if rank else torch.ones(1)  # low-rank terms alone stand beside W x as it is
    slots = [None, *(tuple(replace(p, plain_O=one) for p in trial.terms(rank, low) if p) for _ in range(8))]
    kernel = trial.kernel("auto", SlotLimits(slots=8, rank=8, low_rank=16), slots)
    y_TO = torch.empty(len(slot_T), 96, dtype=torch.float16)
    kernel.base = lambda _: y_TO
    segments = group_by_slot(slot_T)
    return lambda: kernel.forward(trial.x_TI, None, segments)


IN_TURN = torch.arange(32) % 8 + 1
CASES = {
    "FLoRA rank 8": (8, 0, IN_TURN),
    "LoRA rank 8": (0, 8, IN_TURN),
    "FLoRA and LoRA rank 8, some in a long segment": (
        8,
        8,
        torch.cat([torch.ones(16, dtype=torch.int64), IN_TURN[:16]]),
    ),
}


def host_rows() -> Iterator[dict[str, Any]]:
    """(case, launches, host_us): each the median and spread of runs of many calls."""
    for name, case in CASES.items():
        with standing_in() as stand_in:
            call = layer_call(*case)
            call()  # compiled here
            launches = len(stand_in.launched)
            samples = []
            for _ in range(RUNS):
                begin = time.thread_time()
                for _ in range(TURNS):
                    call()
                samples.append((time.thread_time() - begin) / TURNS * 1e6)
        yield {"bench": "gpu_host", "case": name, "launches": launches, "host_us": harness.summary(samples, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-record", action="store_true", help="print only, append no rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = list(host_rows())
    for row in rows:
        harness.progress(f"{row['case']}: {row['launches']} launches, {row['host_us']['median']} µs")
    if not options.no_record:
        harness.append_rows(harness.RESULTS / "gpu_host.jsonl", [harness.environment() | row for row in rows])
    harness.finish({"bench": "gpu_host", "host_us": {row["case"]: row["host_us"]["median"] for row in rows}})


if __name__ == "__main__":
    main()
