"""Trainable tokens as PEFT 0.21 saves them: rows of the embedding in the base's place, one for each of `token_indices`.

Of a model whose output layer shares the embedding's weight the file has the rows twice, once under each name
(`peft/tuners/trainable_tokens/model.py`).
"""

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOKKEEPING, OPTIONAL_MODULES, TOKEN_INDICES, Key
from flora_vllm.formats.families.family import Family, ModuleFile, Part
from flora_vllm.terms import Replaced, Term

ROWS = "trainable_tokens_delta"


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    tokens, size = module.config["token_indices"], module.scope.out_features
    if size is not None and max(tokens) >= size:
        raise AdapterError(f"token {max(tokens)} of token_indices is beyond the base model's {size} tokens")
    return (Replaced(module[ROWS], torch.tensor(tokens, dtype=torch.int64)),)


TRAINABLE_TOKENS = Family(
    name="TRAINABLE_TOKENS",
    title="Trainable tokens",
    keys={
        **BOOKKEEPING,
        "target_modules": OPTIONAL_MODULES,
        "exclude_modules": OPTIONAL_MODULES,
        "init_weights": ANYTHING,
        "token_indices": Key(
            "a list of different token ids", lambda v: isinstance(v, list) and TOKEN_INDICES.check(v), required=True
        ),
    },
    names=(ROWS,),
    of_embeddings=(ROWS,),
    of_heads=frozenset({ROWS}),
    parts=lambda scope: {ROWS: Part((len(scope.config["token_indices"]), "I"))},
    terms=_terms,
    kinds=(Replaced,),
    note="also `trainable_token_indices` beside LoRA",
)
