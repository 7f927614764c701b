"""Compile every Triton kernel for three GPUs without having one, and record what the compiler says of them.

Registers, spills, shared memory and tensor-core instructions come from the cubin (tools of the Triton wheel). They
prove that a kernel compiles and does not spill; they say nothing of its speed or of a GPU's numerics.

    python benchmarks/triton_compile.py              # the whole table, appended to results/triton_compile.jsonl
    python benchmarks/triton_compile.py --no-record
"""

import argparse
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from harness import append_rows, environment
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flora_vllm.ops.gpu import kernels as triton_kernels
from flora_vllm.ops.gpu import low_rank as triton_low_rank
from flora_vllm.ops.gpu.config import launch_config

RESULTS = Path(__file__).parent / "results" / "triton_compile.jsonl"
TOOLS = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
# Shared memory a program may have, bytes: CUDA C++ Programming Guide, technical specifications per capability.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# The tensor-core instruction that the main loop must be made of.
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "LDGSTS", "LDG.E.128", "LDG.E.U16", "LDL", "STL", "FFMA")

INDICES = ("tokens", "token_slots", "segments", "counts", "layout", "tiles")
ADDRESSES = ("table",)
# Numbers that are multiples of 16 where a layer's sizes are; Triton sees the same at a launch.
MULTIPLES_OF_16 = ("in_features", "out_features", "x_stride", "w_stride", "y_stride", "split_stride")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One kernel with one set of launch parameters."""

    name: str
    kernel: Any
    dtype: torch.dtype
    constants: dict[str, Any]
    warps: int
    tensor_core: bool = True  # whether it must use it


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case for one target."""

    kernel: str
    dtype: str
    sm: int
    warps: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    compile_s: float

    def faults(self, tensor_core: bool) -> list[str]:
        """Why this build must not ship; empty if it may."""
        faults = []
        if self.stack_bytes or self.local_bytes:
            faults.append(f"spills: {self.stack_bytes} B stack, {self.local_bytes} B local")
        if self.shared_bytes > SHARED_BYTES[self.sm]:
            faults.append(f"{self.shared_bytes} B of shared memory, the chip has {SHARED_BYTES[self.sm]}")
        if tensor_core and not self.instructions[TENSOR_CORE[self.sm]]:
            faults.append(f"no {TENSOR_CORE[self.sm]} instruction")
        return [f"{self.kernel} on sm_{self.sm}: {fault}" for fault in faults]


def compile_case(case: Case, sm: int) -> Report:
    """Compile one case for one target and read its cubin. Raises what Triton raises if it does not compile."""
    names = case.kernel.arg_names
    signature = {name: _argument_type(name, case) for name in names}
    multiples = MULTIPLES_OF_16 if case.constants["ALIGNED"] else ()
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in multiples]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    stages = case.constants.get("STAGES", 1)
    start = time.perf_counter()
    built = triton.compile(
        source, target=GPUTarget("cuda", sm, 32), options={"num_warps": case.warps, "num_stages": stages}
    )
    seconds = time.perf_counter() - start
    usage, instructions = _read_cubin(built.asm["cubin"])
    return Report(
        kernel=case.name,
        dtype=NAMES[case.dtype],
        sm=sm,
        warps=case.warps,
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        local_bytes=usage["LOCAL"],
        shared_bytes=max(usage["SHARED"], built.metadata.shared),
        instructions=instructions,
        compile_s=round(seconds, 2),
    )


def _argument_type(name: str, case: Case) -> str:
    if name in case.constants:
        return "constexpr"
    if name in INDICES:
        return "*i32"
    if name in ADDRESSES:
        return "*i64"
    if name in ("parts", "middle") or (name == "y" and case.constants.get("SPLIT", 1) > 1):
        return "*fp32"
    if name in ("x", "w", "y", "bias"):
        return f"*{NAMES[case.dtype]}"
    return "i32"


def _read_cubin(cubin: bytes) -> tuple[dict[str, int], dict[str, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        listing = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    fields = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage.stdout + usage.stderr)
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", listing)) for name in INSTRUCTIONS}
    return {name: int(value) for name, value in fields}, counts


def cases(dtype: torch.dtype, sm: int) -> Iterator[Case]:
    """Every kernel as `launch_config` launches it on that target."""
    wide = dtype == torch.float32
    dot = {"DOT": "tf32x3" if wide else "tf32"}
    for aligned, rows in ((True, 16), (True, 1024), (False, 16)):
        config = launch_config(dtype, 16, 4096, 4096, rows, aligned, capability=sm // 10)
        common = {"HAS_BIAS": True, "ALIGNED": aligned, **dot}
        tile = {"BM": config.stacked_m, "BN": config.stacked_n, "BK": config.stacked_k, "STAGES": config.stacked_stages}
        name = f"stacked {config.stacked_m}x{config.stacked_n}x{config.stacked_k}{'' if aligned else ' odd'}"
        for split in (1, 2) if rows == 16 or not wide else ():
            constants = {**common, **tile, "SPLIT": split, "FINISH": split == 1, "EXACT_SUM": wide}
            yield Case(f"{name} split={split}", triton_kernels.flora_stacked, dtype, constants, config.stacked_warps)
        tile = {"BM": config.modulated_m, "BN": config.modulated_n, "BK": config.modulated_k}
        name = f"modulated {config.modulated_n}x{config.modulated_m}x{config.modulated_k}{'' if aligned else ' odd'}"
        for rank in (16, 32) if rows == 16 else ():
            constants = {**common, **tile, "RANKS": rank, "STAGES": config.modulated_stages, "FINISH": True}
            name_of_rank = f"{name} rank={rank}"
            yield Case(name_of_rank, triton_kernels.flora_modulated, dtype, constants, config.modulated_warps)
    config = launch_config(dtype, 16, 4096, 4096, 1024)
    last = {"HAS_BIAS": True, "ALIGNED": True, "BN": config.sum_n, "FINISH": True}
    low = {"BR": config.low_r, "BK": config.low_k, "ALIGNED": True}
    yield Case("low down", triton_low_rank.flora_low_down, dtype, low, 4, tensor_core=False)
    for parts, count, with_low in ((4, 2, False), (1, 3, False), (2, 3, True)):
        constants = {**last, "PARTS": parts, "COUNT": count, "LOW": with_low}
        name = f"sum of {parts}{' and low rank' if with_low else ''}"
        yield Case(name, triton_low_rank.flora_sum, dtype, constants, 4, tensor_core=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-record", action="store_true", help="print only, append no rows")
    parser.add_argument("--sm", type=int, nargs="*", default=list(TENSOR_CORE), help="targets (default: all)")
    parser.add_argument("--only", default="", help="only kernels whose name (with its dtype) contains this")
    options = parser.parse_args()
    print(f"{'kernel':34} sm warps regs stack shared  instructions")
    rows, faults = [], []
    for dtype in NAMES:
        for sm in options.sm:
            for case in cases(dtype, sm):
                name = f"{NAMES[dtype]} {case.name}"
                if options.only not in name:
                    continue
                report = compile_case(case, sm)
                faults += report.faults(case.tensor_core)
                counts = " ".join(f"{name}={count}" for name, count in report.instructions.items() if count)
                print(
                    f"{name:34}{sm:4}{case.warps:4}{report.registers:6}{report.stack_bytes:5}"
                    f"{report.shared_bytes:8}  {counts}",
                    flush=True,
                )
                rows.append(asdict(report))
    if not options.no_record:
        here = environment()
        append_rows(RESULTS, [here | {"bench": "triton_compile"} | row for row in rows])
    for fault in faults:
        print("FAULT", fault)
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
