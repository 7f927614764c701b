"""The op table on a GPU: our op beside cuBLAS, LoRA two ways and the paper's stacking, mix by mix, from cold weights.

Each candidate's calls over copies of W that together exceed the cache are captured in one CUDA graph, so what is timed
is the device's time for them and nothing of the host's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
from bench_ops import MIXES, RANKS
from rows_model import RIDGES, flora_ratio, gpu_modulation, lora_ratio
from torch.nn.functional import linear

from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.gpu.check import capture_on_gpu
from flora_vllm.ops.gpu.linear import TritonLinear
from flora_vllm.ops.table import calibrated_rule
from flora_vllm.ops.terms import SliceTerms, SlotLimits, group_by_slot

SHAPES = ((4096, 4096), (4096, 14336), (8192, 8192))  # in features, out features
TINY_SHAPES = ((32, 48),)
TINY_MIXES = {"3 decode/3 adapters + 5 prefill": [1, 1, 1, 5]}
# More than twice an H200's second-level cache.
COLD_BYTES = 160 * 2**20
REPLAYS = 20
Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Mix:
    """A step of `counts[s - 1]` tokens of slot s, in order."""

    counts: Sequence[int]
    slot_T: torch.Tensor  # from 0

    @staticmethod
    def of(counts: Sequence[int], device: torch.device) -> "Mix":
        return Mix(counts, torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device))


class Layer:
    """Copies of one weight and every candidate's call over each."""

    def __init__(self, in_features: int, out_features: int, device: torch.device, dtype: torch.dtype) -> None:
        self.in_features, self.out_features, self.device, self.dtype = in_features, out_features, device, dtype
        copies = -(-COLD_BYTES // (in_features * out_features * dtype.itemsize)) + 1 if device.type == "cuda" else 1
        self.weights = [self.tensor(out_features, in_features) for _ in range(copies)]
        self.rule = DispatchRule()
        if device.type == "cuda":
            self.rule = calibrated_rule("auto", in_features, out_features, dtype, device, SlotLimits())

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype) * shape[-1] ** -0.5

    def calls(self, mix: Mix, rank: int) -> dict[str, list[Call]]:
        """Candidate -> its call over each copy. What they compute differs; what they must read does not."""
        tokens = sum(mix.counts)
        x_TI = self.tensor(tokens, self.in_features)
        inputs = self.tensor(len(mix.counts), rank, self.in_features)
        outputs = self.tensor(len(mix.counts), rank, self.out_features)
        pairs = list(zip(inputs, outputs, strict=True))
        flora = [SliceTerms(a_RI=a_RI, b_RO=b_RO) for a_RI, b_RO in pairs]
        lora = [SliceTerms(torch.ones(1), down_RI=down_RI, up_RO=up_RO) for down_RI, up_RO in pairs]
        makers: dict[str, Callable[[torch.Tensor], Call]] = {
            "base": lambda w: lambda: linear(x_TI, w),
            "flora": lambda w: self._ours(w, x_TI, mix, flora),
            "lora": lambda w: self._ours(w, x_TI, mix, lora),
            "bmm_lora": lambda w: lambda: _bmm_lora(w, x_TI, inputs, outputs, mix),
            "loop_lora": lambda w: lambda: _loop_lora(w, x_TI, inputs, outputs, mix),
            "stacked": lambda w: lambda: _stacked(w, x_TI, inputs, outputs, mix),
        }
        return {name: [make(weight_OI) for weight_OI in self.weights] for name, make in makers.items()}

    def _ours(self, weight_OI: torch.Tensor, x_TI: torch.Tensor, mix: Mix, terms: list[SliceTerms]) -> Call:
        def base(x: torch.Tensor) -> torch.Tensor:
            return linear(x, weight_OI)

        limits = SlotLimits(slots=len(terms))
        kernel = TritonLinear(weight_OI, base, (self.out_features,), self.rule, self.in_features, limits)
        for slot, part in enumerate(terms, 1):
            kernel.write_slot(slot, (part,))
        segments = group_by_slot(mix.slot_T.cpu() + 1)
        return lambda: kernel.forward(x_TI, None, segments)


def _bmm_lora(weight_OI, x_TI, down_SRI, up_SRO, mix: Mix) -> torch.Tensor:
    """LoRA by gathered factors: two batched products of a row each."""
    middle_TR = torch.bmm(down_SRI[mix.slot_T], x_TI[:, :, None])
    return linear(x_TI, weight_OI) + torch.bmm(middle_TR.transpose(1, 2), up_SRO[mix.slot_T])[:, 0]


def _loop_lora(weight_OI, x_TI, down_SRI, up_SRO, mix: Mix) -> torch.Tensor:
    """LoRA by segments (SGMV's products), each two calls of cuBLAS."""
    y_TO = linear(x_TI, weight_OI)
    start = 0
    for slot, count in enumerate(mix.counts):
        run = slice(start, start + count)
        y_TO[run].addmm_(x_TI[run] @ down_SRI[slot].T, up_SRO[slot])
        start += count
    return y_TO


def _stacked(weight_OI, x_TI, a_SRI, b_SRO, mix: Mix) -> torch.Tensor:
    """arXiv 2312.05677, equations 5 and 6, as its authors run it: r copies of every token through the base."""
    tokens, rank = x_TI.shape[0], a_SRI.shape[1]
    stacked_VI = (x_TI[:, None, :] * a_SRI[mix.slot_T]).reshape(tokens * rank, -1)
    return (linear(stacked_VI, weight_OI).reshape(tokens, rank, -1) * b_SRO[mix.slot_T]).sum(1)


def device_us(calls: Sequence[Call]) -> dict[str, Any]:
    """Microseconds of the device for one call: a graph of all of them, replayed."""

    def run() -> torch.Tensor:
        output = torch.empty(0)
        for call in calls:
            output = call()
        return output

    _, replay = capture_on_gpu(run)
    samples = []
    for turn in range(REPLAYS + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        if turn >= 3:
            samples.append(begin.elapsed_time(end) * 1000 / len(calls))
    return harness.summary(samples)


def op_rows(device: torch.device, ranks: Sequence[int] = RANKS) -> Iterator[dict]:
    """A row for each shape, mix, rank and candidate; without a GPU each call is made once and its numbers looked at."""
    on_gpu = device.type == "cuda"
    chip = "H200" if on_gpu and "H200" in torch.cuda.get_device_name(device) else "H100"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for shape in SHAPES if on_gpu else TINY_SHAPES:
        layer = Layer(*shape, device, dtype)
        for (name, counts), rank in (
            (item, rank) for item in (MIXES if on_gpu else TINY_MIXES).items() for rank in (ranks if on_gpu else (2,))
        ):
            predicted = {
                "flora": flora_ratio(counts, rank, shape, RIDGES[chip], gpu_modulation),
                "lora": lora_ratio(counts, rank, shape, RIDGES[chip]),
            }
            times: dict[str, dict] = {}
            for candidate, calls in layer.calls(Mix.of(counts, device), rank).items():
                setup = {"in": shape[0], "out": shape[1], "mix": name, "rank": rank, "candidate": candidate}
                if not on_gpu:
                    assert all(call().isfinite().all() for call in calls), setup
                    yield setup
                    continue
                times[candidate] = device_us(calls)
                ratio = times[candidate]["median"] / times["base"]["median"]
                yield (
                    setup
                    | {"device_us": times[candidate], "vs_base": round(ratio, 3)}
                    | ({"predicted_vs_base": round(predicted[candidate], 3)} if candidate in predicted else {})
                )
