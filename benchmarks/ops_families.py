"""`bench_ops.py --families`: what a step of each family costs over our op without adapters, and what a load costs.

32 decoding tokens on 32 adapters beside a prefill of 512 on one more, square layers of 576 and 2048, bfloat16, one
pinned thread; candidates of a layer take turns. A family is its slot contents as the engine has them, run through the
shell around the kernel. Loads are of an adapter of SmolLM2's shape (30 layers, 210 modules) from files on disk.
"""

import importlib
import json
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import harness
import torch
from bench_ops import CPU, MIXED, MIXED8, MIXES, Bench, measure
from safetensors.torch import save_file

from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.opaque_linear import OpaqueLinear
from flora_vllm.ops.rare import SharedLow, Swapped, Turned
from flora_vllm.ops.shell import Shell
from flora_vllm.ops.terms import SliceTerms, group_by_slot

WIDTHS = (576, 2048)
PLAIN = torch.ones(1)
# name -> mix; the rest take the mix of distinct adapters
ON_EIGHT = {"hira_r8_on_8": MIXED8}
FAMILIES = (
    "ia3", "road", "lora_r8", "dora_r8", "vera_r256", "fourierft_n1000", "oft_b32", "hira_r8", "hira_r8_on_8",
    "flora_r1", "flora_r4", "flora_r8", "flora_r16",
)  # fmt: skip


class Slots:
    """Slot contents of each family for one square layer of a bench."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        width = bench.out_features
        self._vera = bench.tensor(256, width), bench.tensor(width, 256)
        self._fourier = bench.tensor(2000, width), bench.tensor(width, 2000)

    def of(self, family: str) -> SliceTerms:
        bench, width = self._bench, self._bench.out_features
        name, _, size = family.partition("_")
        rank = int("".join(filter(str.isdigit, size.removesuffix("_on_8"))) or 0)
        vector = torch.rand(width) + 0.5
        match name:
            case "ia3":
                return SliceTerms(vector)
            case "road":
                return SliceTerms(PLAIN, rare=(Swapped(vector, torch.rand(width), 64),))
            case "lora" | "dora":
                down_RI, up_RO = bench.tensor(rank, width), bench.tensor(rank, width)
                return SliceTerms(PLAIN if name == "lora" else vector, down_RI=down_RI, up_RO=up_RO)
            case "vera":
                return SliceTerms(PLAIN, rare=(SharedLow(*self._vera, torch.rand(256), vector),))
            case "fourierft":
                return SliceTerms(PLAIN, rare=(SharedLow(*self._fourier, torch.rand(2000)),))
            case "oft":
                return SliceTerms(PLAIN, rare=(Turned(torch.eye(rank).repeat(width // rank, 1, 1)),))
            case _:
                plain = PLAIN if name == "hira" else None
                return SliceTerms(plain, bench.tensor(rank, width), bench.tensor(rank, width))


def calls_of(bench: Bench) -> dict[tuple[str, int], Callable[[], torch.Tensor]]:
    """A call a family, and the base's; every copy of the layer has every family's adapters in slots of their own."""
    slots = Slots(bench)
    shells = [Shell(kernel, (bench.out_features,)) for kernel in bench.ours]
    calls: dict[tuple[str, int], Callable[[], torch.Tensor]] = {}
    first = 1
    x_TI = bench.tensor(sum(MIXES[MIXED]), bench.in_features)
    for family in FAMILIES:
        mix = MIXES[ON_EIGHT.get(family, MIXED)]
        numbers = range(first, first + len(mix))
        first = numbers.stop
        contents = [slots.of(family) for _ in mix]
        for shell in shells:
            for number, terms in zip(numbers, contents, strict=True):
                shell.write_slot(number, (terms,))
        segments = group_by_slot([slot for slot, n in zip(numbers, mix, strict=True) for _ in range(n)])
        calls[family, 0] = bench.rotating([_call(shell, x_TI[: sum(mix)], segments) for shell in shells])
    calls["base", 0] = bench.rotating([_call(shell, x_TI, None) for shell in shells])
    # What two products with the shared bases alone cost beside the base: the floor of a family over them.
    for family, (down, up) in {"vera_r256": slots._vera, "fourierft_n1000": slots._fourier}.items():
        calls[f"{family}_floor", 0] = lambda down=down, up=up: (x_TI @ down.T) @ up.T
    return calls


def _call(shell: Shell, x_TI: torch.Tensor, segments: Any) -> Callable[[], torch.Tensor]:
    return lambda: shell.forward(x_TI, None, segments)


def opaque_calls() -> int:
    """Base calls of a step with adapters on all three slices of a layer whose base is opaque."""
    called = count()
    weight_OI = torch.randn(192, 64)

    def base(x_TI: torch.Tensor) -> torch.Tensor:
        next(called)
        return x_TI @ weight_OI.T

    layer = OpaqueLinear(base, (64, 64, 64), DispatchRule(), 64, CPU)
    low = SliceTerms(PLAIN, down_RI=torch.randn(8, 64), up_RO=torch.randn(8, 64))
    hadamard = SliceTerms(a_RI=torch.randn(4, 64), b_RO=torch.randn(4, 64))
    layer.write_slot(1, (low, low, low))
    layer.write_slot(2, (hadamard, hadamard, None))
    layer.forward(torch.randn(10, 64), None, group_by_slot([0, 1, 1, 1, 2, 2, 1, 0, 2, 2]))
    return next(called)


def run() -> dict[str, Any]:
    ratios: dict[str, list[float]] = {}
    rows = []
    setup = harness.environment() | {"bench": "ops_families", "threads": 1, "core": harness.pin_to_one_core()}
    for width in WIDTHS:
        bench = Bench(width, width, torch.bfloat16)
        found = measure(calls_of(bench), 25.0)
        times = {name: harness.summary(samples["cpu_us"]) for (name, _), samples in found.items()}
        base = times["base"]["median"]
        for name, summary in times.items():
            rows.append(setup | {"width": width, "candidate": name, "cpu_us": summary})
            if name != "base":
                ratios.setdefault(name, []).append(summary["median"] / base)
        text = "  ".join(f"{name} {times[name]['median'] / base:.2f}" for name in times)
        harness.progress(f"{width}: base {base:.0f} µs; {text}")
    result = {f"{name}_vs_base": round(harness.geometric_mean(values), 3) for name, values in ratios.items()}
    result |= {"opaque_base_calls": opaque_calls(), **load_times()}
    harness.append_rows(harness.RESULTS / "ops.jsonl", [*rows, setup | result])
    from ops_plots import plot

    plot(result, harness.RESULTS)
    return result


def load_times() -> dict[str, float]:
    """Milliseconds of one thread's CPU time to read, check and cut an adapter, and vLLM's own for the LoRA.

    `first`: of an adapter whose structure the worker has not met.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: _adapter(Path(folder) / name, name) for name in ("flora", "lora")}
        result = {f"load_ms_{name}_r8": round(_median_ms(_loader(path, True)), 1) for name, path in paths.items()}
        firsts = {name: _median_ms(_loader(path, False)) for name, path in paths.items()}
        result |= {f"load_ms_{name}_r8_first": round(first, 1) for name, first in firsts.items()}
        result["load_ms_vllm_lora_r8"] = round(_median_ms(_vllm_loader(paths["lora"])), 1)
    return result


def _median_ms(load: Callable[[], object], times: int = 15) -> float:
    load()
    samples = []
    for _ in range(times):
        start = time.thread_time()
        load()
        samples.append((time.thread_time() - start) * 1e3)
    return sorted(samples)[times // 2]


HIDDEN, FEED_FORWARD, KEY_VALUE, LAYERS, RANK = 576, 1536, 192, 30, 8
PARTS = {
    "self_attn.qkv_proj": {"q_proj": HIDDEN, "k_proj": KEY_VALUE, "v_proj": KEY_VALUE},
    "self_attn.o_proj": {"o_proj": HIDDEN},
    "mlp.gate_up_proj": {"gate_proj": FEED_FORWARD, "up_proj": FEED_FORWARD},
    "mlp.down_proj": {"down_proj": HIDDEN},
}


def _shapes() -> dict[str, tuple[int, int]]:
    found = {}
    for layer in range(LAYERS):
        for packed, parts in PARTS.items():
            group = packed.split(".")[0]
            for name, size in parts.items():
                inputs = FEED_FORWARD if name == "down_proj" else HIDDEN
                found[f"model.layers.{layer}.{group}.{name}"] = (size, inputs)
    return found


def _adapter(path: Path, family: str) -> Path:
    tensors = {}
    for module, (rows, columns) in _shapes().items():
        tensors[f"base_model.model.{module}.{family}_A.weight"] = torch.randn(RANK, columns)
        tensors[f"base_model.model.{module}.{family}_B.weight"] = torch.randn(rows, RANK)
    names = sorted({module.rpartition(".")[2] for module in _shapes()})
    config = {"peft_type": family.upper(), "r": RANK, "target_modules": names}
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config | ({"lora_alpha": 16} if family == "lora" else {})))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def _loader(path: Path, knows: bool) -> Callable[[], object]:
    """What a worker does with an adapter's directory, but for the copy it keeps. `knows`: it has met its structure."""
    from flora_vllm.adapter import ModelLayout
    from flora_vllm.compact import CompactLayers
    from flora_vllm.formats.files import collect_files
    from flora_vllm.formats.ranks import Limits
    from flora_vllm.formats.reader import examine_files
    from flora_vllm.plugin.planned import Plans
    from flora_vllm.slots import layer_terms
    from flora_vllm.terms import Arena

    layouts = [_layout(layer, packed, parts) for layer in range(LAYERS) for packed, parts in PARTS.items()]
    layout, limits = ModelLayout(_shapes()), Limits(16, 16)
    known = Plans()

    def load() -> CompactLayers:
        plans = known if knows else Plans()
        files, _ = collect_files(path)
        if (planned := plans.load(files, None)) is not None:
            return planned[1]
        adapter = examine_files(files, layout, limits).adapter
        assert adapter is not None
        arena = Arena(torch.bfloat16, sum(t.numel() for m in adapter.modules.values() for t in m.tensors()))
        layers = {one.module: layer_terms(one, adapter.modules, torch.bfloat16, arena=arena) for one in layouts}
        kept = CompactLayers({name: terms for name, terms in layers.items() if terms is not None}, arena.finished())
        assert kept.is_finite()
        plans.learn(files, None, adapter, [arena], kept)
        return kept

    return load


def _layout(layer: int, packed: str, parts: dict[str, int]):
    from flora_vllm.slots import LinearLayout, SliceLayout

    prefix = f"model.layers.{layer}.{packed.split('.')[0]}"
    slices, start = [], 0
    for name, size in parts.items():
        slices.append(SliceLayout(f"{prefix}.{name}", size, 0, start, size))
        start += size
    inputs = FEED_FORWARD if packed.endswith("down_proj") else HIDDEN
    return LinearLayout(f"model.layers.{layer}.{packed}", inputs, 0, inputs, tuple(slices), start)


def _vllm_loader(path: Path) -> Callable[[], object]:
    """vLLM's own reading of the LoRA, without what it does to put it into a slot."""
    lora_model: Any = importlib.import_module("vllm.lora.lora_model").LoRAModel
    helper: Any = importlib.import_module("vllm.lora.peft_helper").PEFTHelper

    def load() -> object:
        return lora_model.from_local_checkpoint(
            str(path),
            {name for parts in PARTS.values() for name in parts},
            peft_helper=helper.from_local_dir(str(path), 4096),
            lora_model_id=1,
            device="cpu",
            dtype=torch.bfloat16,
        )

    return load
