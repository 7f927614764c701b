"""The trained code adapters through vLLM, every language and method in one batch, against PEFT's own forward.

Both compute in float32 from the same bfloat16 checkpoint and the published factors, so the difference is the order of
sums. Speech adapters are not served here yet: SPEECH_IS_SERVED turns to True with Whisper's serving.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from quality_code import test_blocks
from quality_plan import Cell, Size

SPEECH_IS_SERVED = False
BLOCKS = 4  # test blocks of each language
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}


def served_equals_peft(model: Path, adapters: Mapping[Cell, Path], data: Mapping[Cell, Path], size: Size) -> dict:
    """The largest difference of a test token's logprob, over all adapters and the bare model, and mean losses of both.

    Returns the fields of a row.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = {cell: test_blocks(data[cell], tokenizer, size)[:BLOCKS].tolist() for cell in adapters}
    asked: list[tuple[Cell | None, list[int]]] = [(cell, ids) for cell, blocks in texts.items() for ids in blocks]
    asked += [(None, ids) for blocks in list(texts.values())[:1] for ids in blocks]
    served = _served(model, adapters, asked, size.length)
    own = _peft(model, adapters, asked)
    worst = max(float((a - b).abs().max()) for a, b in zip(served, own, strict=True))
    return {
        "served_equals_peft": worst,
        "dtype": "float32",
        "adapters": len(adapters),
        "requests_in_one_batch": len(asked),
        "tokens": sum(map(len, served)),
        "mean_loss_served": -float(torch.cat(served).mean()),
        "mean_loss_peft": -float(torch.cat(own).mean()),
        "speech": "served" if SPEECH_IS_SERVED else "not served: Whisper's serving is not there yet",
    }


@contextlib.contextmanager
def open_engine(model: Path, adapters: Mapping[Cell, Path], **options: Any) -> Iterator[Any]:
    """vLLM with the plugin and a slot for every adapter."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import flora_vllm

    llm = flora_vllm.LLM(
        str(model),
        enforce_eager=True,
        max_loras=len(adapters),
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        **options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def requests_for(adapters: Mapping[Cell, Path], cells: Sequence[Cell | None]) -> list[Any]:
    """What names each cell's adapter to vLLM; None for the bare model."""
    from vllm.lora.request import LoRARequest

    named = {cell: LoRARequest(cell.name, i, str(path)) for i, (cell, path) in enumerate(adapters.items(), start=1)}
    return [None if cell is None else named[cell] for cell in cells]


def _served(
    model: Path, adapters: Mapping[Cell, Path], asked: list[tuple[Cell | None, list[int]]], length: int
) -> list[torch.Tensor]:
    """Logprobs of each request's tokens but the first, all requests in one call."""
    import vllm

    sampling = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for _, ids in asked]
    with open_engine(model, adapters, dtype="float32", max_model_len=length + 8, max_num_seqs=len(asked)) as llm:
        outputs = llm.generate(prompts, sampling, lora_request=requests_for(adapters, [cell for cell, _ in asked]))
    return [
        torch.tensor([place[token].logprob for place, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)])
        for output, (_, ids) in zip(outputs, asked, strict=True)
    ]


@torch.no_grad()
def _peft(model: Path, adapters: Mapping[Cell, Path], asked: list[tuple[Cell | None, list[int]]]) -> list[torch.Tensor]:
    """The same logprobs from PEFT, adapter by adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import flora_vllm.training  # noqa: F401  (registers FLoRA)

    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found: dict[int, torch.Tensor] = {}
    for cell in [None, *adapters]:
        adapted = base if cell is None else PeftModel.from_pretrained(base, adapters[cell]).eval()
        for i, (wanted, ids) in enumerate(asked):
            if wanted == cell:
                logprobs = adapted(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                found[i] = logprobs[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        if cell is not None:
            base = adapted.unload()
    return [found[i] for i in range(len(asked))]
