"""BOFT (arXiv 2311.06243) as PEFT 0.21 saves it: m butterfly stages of block rotations on the input, gain `boft_s`.

`boft_R` (m, D, B, B): skew parts, mapped by (I - S)(I + S)⁻¹; stage i turns blocks of features that its permutation
puts together, the last stage first. `boft_s` scales W but not the bias (`peft/tuners/boft/layer.py`).
"""

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, TUNER, Key, is_rank
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import Family, ModuleFile, Part
from flora_vllm.formats.families.oft import cayley
from flora_vllm.terms import Gain, Offset, Term, Turn

BOFT_R, BOFT_S = "boft_R", "boft_s"


def butterfly_order(features: int, blocks: int, half: int) -> torch.Tensor:
    """Which feature each place of a stage takes: in each of `blocks` groups even runs of `half`, then odd ones."""
    group = features // blocks
    runs = torch.arange(group).reshape(-1, half)
    inside = torch.cat([runs[0::2], runs[1::2]]).flatten()
    return (torch.arange(blocks)[:, None] * group + inside).flatten()


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    stages_MDBB = module[BOFT_R].double()
    stages, blocks, size, other = stages_MDBB.shape
    factor = module.config.get("boft_n_butterfly_factor", 1)
    # Without its CUDA extension PEFT trains one stage whatever the config says.
    if size != other or stages not in (1, factor) or (stages > 1 and (size % 2 or blocks % 2 ** (stages - 1))):
        raise AdapterError(
            f"{BOFT_R!r} has shape {tuple(stages_MDBB.shape)}; a config with boft_n_butterfly_factor {factor} allows "
            "(1 or that, blocks, size, size), above 1 with an even size and a multiple of 2^(factor - 1) blocks"
        )
    turns: list[Term] = []
    for stage in reversed(range(stages)):
        skew_DBB = stages_MDBB[stage]
        turned_DBB = cayley(0.5 * (skew_DBB - skew_DBB.transpose(1, 2))).float()
        # The first stage's places are the features themselves.
        if stage == 0:
            turns.append(Turn(turned_DBB))
            continue
        order = torch.argsort(butterfly_order(blocks * size, blocks >> stage, size // 2))
        turns.append(Turn(turned_DBB, order))
    return (*turns, Gain(module[BOFT_S][:, 0], scales_bias=False))


BOFT = Family(
    name="BOFT",
    title="BOFT, any butterfly factor",
    keys={
        **TUNER,
        "bias": bias_key("boft"),
        # Blocks are counted and sized by the file.
        "boft_block_size": ANYTHING,
        "boft_block_num": ANYTHING,
        "boft_n_butterfly_factor": Key("an integer of at least 1", is_rank),
        # Used only while training.
        "boft_dropout": ANYTHING,
        "init_weights": ANYTHING,
    },
    names=(BOFT_R, BOFT_S, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=lambda scope: {BOFT_R: Part((None, None, None, None)), BOFT_S: Part(("O", 1)), **bias_parts(scope)},
    terms=and_biases(_terms),
    kinds=(Turn, Gain, Offset),
)
