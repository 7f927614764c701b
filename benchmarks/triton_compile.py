"""Compile every Triton kernel for three GPUs without having one, and record what the compiler says of them.

Registers, spills, shared memory and tensor-core instructions come from the cubin (tools of the Triton wheel). They
prove that a kernel compiles and does not spill; they say nothing of its speed or of a GPU's numerics.

    python benchmarks/triton_compile.py              # the whole table, appended to results/triton_compile.jsonl
    python benchmarks/triton_compile.py --no-record --sm 89 120
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
from flora_vllm.ops.gpu.config import Machine, low_rank_config, modulated_config, stacked_config

RESULTS = Path(__file__).parent / "results" / "triton_compile.jsonl"
TOOLS = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
# Shared memory a program may have, bytes: CUDA C++ Programming Guide, technical specifications per capability.
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# The tensor-core instruction that the main loop must be made of.
TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
# What the launch parameters are made for; on the others some kernels spill a few registers.
SERVED = (80, 90, 100)
INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "LDGSTS", "LDG.E.128", "LDG.E.U16", "LDL", "STL", "FFMA")

INDICES = ("tokens", "segments", "counts", "layout", "tiles", "counters")
ADDRESSES = ("table",)
# Numbers that are multiples of 16 where a layer's sizes are; Triton sees the same at a launch.
STRIDES = ("x_stride", "w_stride", "y_stride", "part_stride", "middle_stride")
MULTIPLES_OF_16 = ("in_features", "out_features", "most_low", *STRIDES)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One kernel with one set of launch parameters."""

    name: str
    kernel: Any
    dtype: torch.dtype
    constants: dict[str, Any]
    warps: int
    # Whether it must use the newest instruction; a product of 16 tokens is too small for it and takes the older one.
    newest: bool = True


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

    def faults(self, newest: bool = True) -> list[str]:
        """Why this build must not ship; empty if it may."""
        faults = []
        if self.stack_bytes or self.local_bytes:
            faults.append(f"spills: {self.stack_bytes} B stack, {self.local_bytes} B local")
        if self.shared_bytes > SHARED_BYTES[self.sm]:
            faults.append(f"{self.shared_bytes} B of shared memory, the chip has {SHARED_BYTES[self.sm]}")
        wanted = TENSOR_CORE[self.sm] if newest else "HMMA"
        if not self.instructions[wanted]:
            faults.append(f"no {wanted} instruction")
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
    if name in ("parts", "middle"):
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
    """Every kernel as `linear` launches it on that target: decode and prefill steps, aligned layers and odd ones."""
    wide = dtype == torch.float32
    machine = Machine(capability=sm // 10)
    for aligned, out_features, rows in ((True, 4096, 32), (True, 14336, 1024), (False, 4096, 32)):
        odd = "" if aligned else " odd"
        common = {"HAS_BIAS": True, "ALIGNED": aligned, "DOT": "tf32x3" if wide else "tf32"}
        config = stacked_config(dtype, 17, 4096, out_features, rows, aligned, machine)
        low = low_rank_config(dtype, 32, 4096, 1, 2, aligned, machine)
        tile = {"BM": config.m, "BN": config.n, "BK": config.k, "STAGES": config.stages, "EXACT_SUM": wide}
        down = {"LOW_M": low.m, "LOW_R": low.r, "LOW_K": low.k, "LOW_SPLIT": 4}
        for split, with_low in ((1, False), (2, True)):
            name = f"stacked {config.m}x{config.n}x{config.k}{odd} split={split}{' and down' if with_low else ''}"
            constants = {**common, **tile, **down, "SPLIT": split, "LOW": with_low}
            yield Case(name, triton_kernels.flora_stacked, dtype, constants, config.warps)
        if rows > 32:
            continue
        for rank in (16, 32):
            config = modulated_config(dtype, rank, aligned)
            tile = {"BM": config.m, "BN": config.n, "BK": config.k, "RANKS": config.rank, "STAGES": config.stages}
            name = f"modulated {config.n}x{config.m}x{config.k}{odd} rank={rank}"
            yield Case(name, triton_kernels.flora_modulated, dtype, {**common, **tile}, config.warps)
        del common["HAS_BIAS"]
        for most_low in (16, 64):
            low = low_rank_config(dtype, most_low, 4096, 1, 2, aligned, machine)
            tile = {"BM": low.m, "BR": low.r, "SPLIT": 4, **common}
            name = f"{low.m}x{low.r}x{low.k}{odd}"
            constants = {**tile, "BK": low.k, "STAGES": 3}
            yield Case(f"down {name}", triton_low_rank.flora_low_down, dtype, constants, low.warps, newest=False)
            constants = {**tile, "BN": low.n}
            yield Case(f"up {name}", triton_low_rank.flora_low_up, dtype, constants, low.warps, newest=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-record", action="store_true", help="print only, append no rows")
    parser.add_argument("--sm", type=int, nargs="*", choices=TENSOR_CORE, default=SERVED, help="targets")
    parser.add_argument("--only", default="", help="only kernels whose name (with its dtype) contains this")
    options = parser.parse_args()
    print(f"{'kernel':44} sm warps regs stack shared  instructions")
    rows, faults = [], []
    for dtype in NAMES:
        for sm in options.sm:
            for case in cases(dtype, sm):
                name = f"{NAMES[dtype]} {case.name}"
                if options.only not in name:
                    continue
                report = compile_case(case, sm)
                faults += report.faults(case.newest)
                counts = " ".join(f"{name}={count}" for name, count in report.instructions.items() if count)
                print(
                    f"{name:44}{sm:4}{case.warps:4}{report.registers:6}{report.stack_bytes:5}"
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
