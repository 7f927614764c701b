"""C3A (arXiv 2407.19342) as PEFT 0.21 saves it: blocks of circulant matrices, `1 / I` of them added.

`c3a_kernel` (O/B, I/B, B): entry (i, j) of a block is `kernel[(j - i) mod B]` (`peft/tuners/c3a/layer.py`).
"""

from flora_vllm.formats.config_keys import ANYTHING, TUNER
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import Family, ModuleFile, Part
from flora_vllm.terms import Circulant, Offset, Term

KERNEL = "c3a_kernel"


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    kernel = module[KERNEL]
    return (Circulant(kernel, 1.0 / (kernel.shape[1] * kernel.shape[2])),)


C3A = Family(
    name="C3A",
    title="C3A",
    keys={
        **TUNER,
        "bias": bias_key("c3a"),
        # The file's kernels say how large their blocks are.
        "block_size": ANYTHING,
        "block_size_pattern": ANYTHING,
        "init_weights": ANYTHING,
    },
    names=(KERNEL, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=lambda scope: {KERNEL: Part((None, None, None)), **bias_parts(scope)},
    terms=and_biases(_terms),
    kinds=(Circulant, Offset),
    note="as products of spectra",
)
