"""A quantised base: the adapter is applied around the base's own product, whatever its format.

The oracle is transformers' model whose every linear layer calls plain vLLM's quantised layer, taken from a plain
engine, with the adapter's equation written out around that call. No weight is ever dequantised.
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine_support as support
import peft
import pytest
import torch
import transformers
from engine_support import Answer, Ask
from safetensors.torch import load_file, save_file

import flora_vllm
from flora_vllm.adapter import ModuleTerms
from flora_vllm.ops.rare import Turned
from flora_vllm.ops.terms import group_by_slot
from flora_vllm.terms import Added, Gain, Product, Turn, resolve

pytestmark = support.ENGINE_MARKS

# Plain vLLM's layer (x to y, without bias) and the output features of one of the checkpoint's modules in it.
PlainLayer = tuple[Callable[[torch.Tensor], torch.Tensor], slice]
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
PEFT_CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=16, target_modules=["q_proj", "k_proj", "down_proj"]),
    "hira": peft.HiraConfig(r=3, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"]),
}
FLORA_RANKS = (1, 5, 8)
# A layer's input is rounded to 8 bits of its largest value. Where the engine's and the oracle's inputs, which differ by
# float32 rounding, fall on two sides of a step, that input moves by 1/127 of the largest; the logprobs of 2 layers then
# move by a few hundredths at most. The adapters move them by several units.
END_TO_END_TOLERANCE = 2e-2
# One layer on the same input takes the same steps, relative to its largest output: in float32 only the order of sums
# differs; in bfloat16 the op may round each of the few terms of an output at another place, by 2^-9 of the term each.
LAYER_TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 4 * 2**-9}


def quantise(model: Path, path: Path, bits: int) -> Path:
    """`model` with its linear layers (not the head) in compressed-tensors' format, one scale per output row.

    8 bits: inputs are quantised too, per token (W8A8). 4 bits: weights only, packed eight to an int32 (W4A16).
    """
    path.mkdir()
    tensors = load_file(model / "model.safetensors")
    for name in [n for n, t in tensors.items() if t.ndim == 2 and "proj" in n]:
        weight_OI = tensors.pop(name)
        scale_O1 = weight_OI.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        whole_OI = (weight_OI / scale_O1).round()
        tensors[f"{name}_scale"] = scale_O1
        if bits == 8:
            tensors[name] = whole_OI.to(torch.int8)
        else:
            tensors[f"{name}_packed"] = _packed(whole_OI)
            tensors[f"{name}_shape"] = torch.tensor(weight_OI.shape)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    group: dict[str, Any] = {"targets": ["Linear"], "input_activations": None}
    group["weights"] = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    if bits == 8:
        group["input_activations"] = group["weights"] | {"strategy": "token", "dynamic": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def _packed(whole_OI: torch.Tensor) -> torch.Tensor:
    """Four-bit numbers from -8 to 7, offset by 8, the first of eight in an int32's lowest bits."""
    nibbles = (whole_OI + 8).to(torch.int64).view(whole_OI.shape[0], whole_OI.shape[1] // 8, 8)
    words = (nibbles << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


class Around:
    """`terms.Probe`, as far as these adapters ask: the quantised product itself, and its norms."""

    stores_in_out = False

    def __init__(self, base: Callable[[torch.Tensor], torch.Tensor], rows: slice, x_TI: torch.Tensor) -> None:
        self._base, self._rows, self.dtype, self._in_features = base, rows, x_TI.dtype, x_TI.shape[1]
        self.shape = (rows.stop - rows.start, self._in_features)

    def product(self, x_NI: torch.Tensor) -> torch.Tensor:
        return self._base(x_NI.to(self.dtype))[:, self._rows].float()

    def squared_row_norms(self) -> torch.Tensor:
        return self.product(torch.eye(self._in_features)).square().sum(0)


def adapted(
    base: Callable[[torch.Tensor], torch.Tensor], rows: slice, x_TI: torch.Tensor, terms: ModuleTerms | None
) -> torch.Tensor:
    """g ∘ [s Σ_j b_j ∘ W(a_j ∘ turn x) + s U(V x)] of output features `rows`, float32, W only through `base`."""
    if terms is None:
        return base(x_TI)[:, rows].float()
    terms = ModuleTerms(resolve(terms.terms, Around(base, rows, x_TI)))
    whole_TI = x_TI
    for turn in terms.of(Turn):
        x_TI = Turned(turn.blocks.float(), turn.order).apply(x_TI)
    plain_TO = y_TO = base(x_TI)[:, rows].float()
    if terms.of(Product):
        y_TO = torch.zeros_like(plain_TO)
    for product in terms.of(Product):
        if product.input is None:
            y_TO = y_TO + plain_TO
            continue
        b_OR = torch.ones(y_TO.shape[1], 1) if product.output is None else product.output
        for a_I, b_O in zip(product.input, b_OR.T, strict=True):
            y_TO = y_TO + product.scale * b_O * base(a_I.to(x_TI.dtype) * x_TI)[:, rows]
    for low in terms.of(Added):
        y_TO = y_TO + low.scale * (whole_TI.float() @ low.down.T) @ low.up.T
    for gain in terms.of(Gain):
        y_TO = y_TO * gain.gain
    return y_TO


def _parts(layer: str, sizes: Sequence[int]) -> list[tuple[str, slice]]:
    """The checkpoint's modules in the engine's layer, with their output features."""
    parent, _, own = layer.rpartition(".")
    names = [f"{parent}.{child}" for child in PACKED.get(own, (own,))]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [(name, slice(start, start + size)) for name, start, size in zip(names, starts, sizes, strict=True)]


@dataclass(frozen=True)
class Served:
    quantised: Path
    dtype: torch.dtype
    adapters: Mapping[str, Path | None]
    asks: Mapping[str, Ask]
    answers: Mapping[str, Answer]
    # Worst difference of one layer's output on the engine's own input, by layer.
    layer_errors: Mapping[str, float]


@pytest.fixture(scope="module", params=[8, 4])
def served(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Served:
    importlib.import_module("vllm._custom_ops")  # loads the build for this CPU

    if request.param == 4 and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM's build for this CPU has no 4-bit product")
    has_tiles = torch.cpu._is_amx_tile_supported()
    if request.param == 4 and has_tiles:
        pytest.skip("vLLM's 4-bit kernel for CPUs with AMX takes no layer as small as these")
    folder = tmp_path_factory.mktemp("quantised")
    model = tiny_model("llama")
    quantised = quantise(model, folder / "model", request.param)
    # Neither vLLM's 4-bit kernel nor that of 8 bits for CPUs with AMX takes float32.
    dtype = torch.float32 if request.param == 8 and not has_tiles else torch.bfloat16
    adapters: dict[str, Path | None] = {"base": None}
    for rank in FLORA_RANKS:
        adapters[f"flora-{rank}"] = folder / f"flora-{rank}"
        support.write_flora_adapter(
            support.load(model), folder / f"flora-{rank}", rank, ("sum", "mean")[rank % 2], seed=rank
        )
    for seed, (name, config) in enumerate(PEFT_CONFIGS.items()):
        adapters[name] = folder / name
        support.save_peft_adapter(model, folder / name, config, seed)
    asks = {name: Ask(support.prompt(6 + i, seed=i), path) for i, (name, path) in enumerate(adapters.items())}
    options = {"max_loras": len(adapters) - 1, "dtype": str(dtype).removeprefix("torch.")}
    with support.running(quantised, **options) as engine:
        answers = dict(zip(asks, engine.ask(list(asks.values())), strict=True))
        layer_errors = _layer_errors(engine, list(adapters.values()), dtype)
    return Served(quantised, dtype, adapters, asks, answers, layer_errors)


def _layer_errors(engine: support.Engine, adapters: Sequence[Path | None], dtype: torch.dtype) -> dict[str, float]:
    """Each adapted layer of the running engine on one random batch of all adapters against the equation."""
    manager = engine.manager()
    slot_of = {i: slot + 1 for slot, i in enumerate(manager.lora_index_to_id)}
    slots = [0 if path is None else slot_of[engine.request_for(path).lora_int_id] for path in adapters] * 3
    read = [None if path is None else flora_vllm.read_adapter(path).modules for path in adapters] * 3
    errors = {}
    for name, layer in manager.attached.layers.items():
        layout = manager.attached.layouts[name]
        assert layer.kernel.implementation == "torch", "a quantised base shows no weight"
        x_TI = torch.randn(len(slots), layout.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
        y_TO = layer._shell.forward(x_TI, None, group_by_slot(slots)).float()
        wanted = torch.cat(
            [
                torch.cat(
                    [
                        adapted(
                            layer.kernel.base, rows, x_TI[t : t + 1], None if modules is None else modules.get(part)
                        )
                        for part, rows in _parts(name, layout.sizes)
                    ],
                    1,
                )
                for t, modules in enumerate(read)
            ]
        )
        errors[name] = float((y_TO - wanted).abs().max() / wanted.abs().max())
    return errors


def test_each_layer_is_the_equation_around_the_quantised_product(served, record_property):
    record_property("worst", max(served.layer_errors.values()))
    assert len(served.layer_errors) == 9, "four a layer, and the output layer"
    assert max(served.layer_errors.values()) < LAYER_TOLERANCES[served.dtype]


def test_answers_are_those_of_adapters_around_plain_vllms_quantised_layers(served, tiny_model, record_property):
    if served.dtype != torch.float32:
        pytest.skip("two layers in bfloat16 agree to 1e-1 only; the test above compares layer by layer")
    errors = {}
    with support.running(served.quantised, flora=False) as engine, torch.no_grad():
        layers = _plain_layers(engine.model())
        for name, ask in served.asks.items():
            modules = {} if ask.adapter is None else flora_vllm.read_adapter(ask.adapter).modules
            oracle = support.Oracle(_around(support.load(tiny_model("llama")), layers, modules))
            errors[name] = oracle.error(None, ask, served.answers[name])
    record_property("worst", errors)
    assert max(errors.values()) < END_TO_END_TOLERANCE
    assert len({answer.tokens for answer in served.answers.values()}) == len(served.answers)


def _plain_layers(model: torch.nn.Module) -> dict[str, PlainLayer]:
    """By checkpoint module."""
    from vllm.model_executor.layers.linear import LinearBase

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            sizes: Any = module.output_partition_sizes
            for part, rows in _parts(name, sizes):
                found[part] = (lambda x_TI, layer=module: layer.quant_method.apply(layer, x_TI, None), rows)
    return found


def _around(
    model: transformers.PreTrainedModel, layers: Mapping[str, PlainLayer], modules: Mapping[str, ModuleTerms]
) -> transformers.PreTrainedModel:
    """`model` with every linear layer computed by `layers` and adapted by `modules`."""
    for name, module in support.linear_modules(model).items():
        base, rows = layers[name]
        terms = modules.get(name)

        def forward(input, base=base, rows=rows, terms=terms):  # noqa: A002 - torch's name
            return adapted(base, rows, input.reshape(-1, input.shape[-1]), terms).view(*input.shape[:-1], -1)

        module.forward = forward
    return model
