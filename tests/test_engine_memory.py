"""A prefill of 2,000 tokens and 32 decodes at rank 8 add no more temporaries to a step than the ops state.

Measured in the engine: the peak of resident memory in steps with adapters over that of the same steps without, on
layers so wide that stacking 2,000 tokens 8 times would take ten times the bound.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import engine_support as support
import pytest
import transformers
from engine_support import Ask, Engine
from tiny_models import HEADS, KV_HEADS, VOCABULARY, randomise

from flora_vllm.ops.cpu import linear as native
from flora_vllm.ops.torch_linear import SCRATCH_BYTES

pytestmark = support.ENGINE_MARKS

TOKENS, DECODES, RANK = 2000, 32, 8
WIDTH, FEED_FORWARD = 512, 4096
# What the C library keeps of memory freed within a step: blocks below 32 MiB (glibc's DEFAULT_MMAP_THRESHOLD_MAX).
ALLOCATOR_BYTES = 32 * 2**20
STACKED_BYTES = TOKENS * RANK * 2 * FEED_FORWARD * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide") / "model"
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4096,
    )
    wide = transformers.LlamaForCausalLM(config)
    randomise(wide, seed=0)
    wide.save_pretrained(path)
    return path


@pytest.fixture(
    scope="module",
    params=[("native", "auto"), ("native", "stacked"), ("torch", "stacked"), ("torch", "modulated")],
    ids="-".join,
)
def engine(request: pytest.FixtureRequest, model: Path) -> Iterator[Engine]:
    implementation, path = request.param
    options = {"max_model_len": 4096, "max_num_batched_tokens": 4096, "enable_prefix_caching": False, "max_loras": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLORA_NATIVE", "1" if implementation == "native" else "0")
        with support.running(model, flora_path=path, kv_cache_memory_bytes=256 << 20, **options) as engine:
            layers = engine.manager().attached.layers.items()
            # The output layer is vLLM's own call with its adapters around it.
            assert {layer.kernel.implementation for name, layer in layers if name != "lm_head"} == {implementation}
            yield engine


def _peak_bytes(engine: Engine, asks: list[Ask], tokens: int) -> int:
    """How far resident memory rises above its present level while `asks` are served."""
    ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier must be taken, and seen, anew
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    engine.ask(asks, tokens=tokens)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def test_prefill_and_decodes_stay_within_the_stated_bound(engine, model, tmp_path, record_property):
    implementation = engine.manager().attached.layers["model.layers.0.mlp.down_proj"].kernel.implementation
    bound = {"native": native.scratch_bound, "torch": lambda: SCRATCH_BYTES}[implementation]() + ALLOCATOR_BYTES
    assert 5 * bound < STACKED_BYTES
    base = support.load(model)
    adapters = [tmp_path / f"flora-{i}" for i in range(4)]
    for i, path in enumerate(adapters):
        support.write_flora_adapter(base, path, RANK, "mean", seed=i)
    long, short = support.prompt(TOKENS, seed=0), [support.prompt(3, seed=i) for i in range(DECODES)]
    steps = {
        "prefill": ([Ask(long, adapters[0])], 1),
        "decode": ([Ask(p, adapters[i % 4]) for i, p in enumerate(short)], 4),
    }
    for asks, tokens in steps.values():  # touches the base's buffers and loads the adapters
        engine.ask([Ask(a.prompt) for a in asks], tokens)
        engine.ask([Ask(asks[0].prompt[:4], a.adapter) for a in asks], tokens)
    for name, (asks, tokens) in steps.items():
        plain = _peak_bytes(engine, [Ask(a.prompt) for a in asks], tokens)
        grown = _peak_bytes(engine, asks, tokens) - plain
        record_property(name, grown)
        assert grown <= bound, f"{name}: {grown / 2**20:.0f} MiB beyond the base's, allowed {bound / 2**20:.0f}"
