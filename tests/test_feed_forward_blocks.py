"""Which of vLLM's own feed-forward blocks rows may be routed through, and that they then are; without an engine."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, silu

from flora_vllm.ops.terms import SlotLimits
from flora_vllm.step import Step
from flora_vllm.terms import Cut, Routed, fold

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM and what it imports warn

H, M, E, R, TOP = 64, 96, 4, 3, 2
SILU, TANH = frozenset({"silu", "swish"}), frozenset({"gelu_new", "gelu_pytorch_tanh"})


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return gelu(x, approximate="tanh")


# Class -> what makes one, its activation's names, and the activation.
BLOCKS: dict[str, tuple[str, tuple[Any, ...], frozenset[str], Callable[[torch.Tensor], torch.Tensor]]] = {
    "LlamaMLP": ("llama", (H, M, "silu"), SILU, silu),
    "Qwen2MLP": ("qwen2", (H, M, "silu"), SILU, silu),
    "Gemma2MLP": ("gemma2", (H, M, "gelu_pytorch_tanh"), TANH, tanh_gelu),
}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's layers may be made here."""
    config, parallel = importlib.import_module("vllm.config"), importlib.import_module("vllm.distributed")
    with config.set_current_vllm_config(config.VllmConfig()):
        place = tmp_path_factory.mktemp("group") / "file"
        parallel.init_distributed_environment(1, 0, f"file://{place}", 0, backend="gloo")
        parallel.initialize_model_parallel(1, 1)
        yield
    parallel.cleanup_dist_env_and_memory()


def _made(name: str) -> Any:
    where, sizes, *_ = BLOCKS[name]
    module = importlib.import_module(f"vllm.model_executor.models.{where}")
    block = getattr(module, name)(*sizes, prefix="mlp")
    for i, layer in enumerate((block.gate_up_proj, block.down_proj)):
        layer.weight.data.copy_(0.2 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(i)))
    return block


def _attached(block: torch.nn.Module, step: Step) -> Any:
    from flora_vllm.plugin.attach import attach

    packed = {"gate_up_proj": ["gate_proj", "up_proj"]}
    device = torch.device("cpu")
    model = torch.nn.ModuleDict({"mlp": block})
    return attach(model, packed, lambda _: step, "stacked", device, SlotLimits(), lambda _: True, lambda _: {})


def _terms() -> dict[str, Routed]:
    def normal(*shape: int, seed: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    router = normal(E, H, seed=3)
    shapes = {"gate": (M, H), "up": (M, H), "down": (H, M)}
    return {
        name: Routed(router, normal(E * R, into, seed=10 + i), 0.1 * normal(out, E * R, seed=20 + i), TOP)
        for i, (name, (out, into)) in enumerate(shapes.items())
    }


def _contents(terms: dict[str, Routed]) -> dict[str, Any]:
    parts = {
        name: fold(
            [term], Cut(slice(0, len(term.up)), slice(0, term.down.shape[1]), torch.float32, torch.device("cpu"))
        )
        for name, term in terms.items()
    }
    return {"mlp.gate_up_proj": (parts["gate"], parts["up"]), "mlp.down_proj": (parts["down"],)}


@pytest.mark.parametrize(("name", "is_traced"), [*((name, False) for name in BLOCKS), ("LlamaMLP", True)])
def test_rows_are_routed_through_vllms_own_blocks(vllm: None, name: str, is_traced: bool) -> None:
    """As a module, and as a graph that was traced before any adapter was there."""
    block, step, terms = _made(name), Step(), _terms()
    *_, names, activation = BLOCKS[name]
    gate_up, down = (layer.weight.detach().double().clone() for layer in (block.gate_up_proj, block.down_proj))
    x_TH = torch.randn(7, H, generator=torch.Generator().manual_seed(5))
    attached = _attached(block, step)
    assert attached.blocks == {"mlp.gate_up_proj": names, "mlp.down_proj": names}
    run = torch.compile(block, backend="aot_eager", dynamic=True) if is_traced else block
    run(x_TH)
    for path, part in _contents(terms).items():
        attached.layers[path].write_slot(1, part)
    slots = [0, 1, 1, 0, 1, 0, 1]
    step.set_mapping(slots, {1: 1})
    found = run(x_TH)

    def layer(which: str, weight: torch.Tensor, e: int, x: torch.Tensor) -> torch.Tensor:
        part = slice(e * R, (e + 1) * R)
        return weight @ x + terms[which].up[:, part].double() @ (terms[which].down[part].double() @ x)

    for t, slot in enumerate(slots):
        x = x_TH[t].double()
        wanted = down @ (activation(gate_up[:M] @ x) * (gate_up[M:] @ x))
        if slot:
            best = torch.softmax(terms["gate"].router.double() @ x, 0).topk(TOP)
            wanted = torch.zeros(H, dtype=torch.float64)
            for share, e in zip(best.values, best.indices.tolist(), strict=True):
                gate, up = layer("gate", gate_up[:M], e, x), layer("up", gate_up[M:], e, x)
                wanted += share / best.values.sum() * layer("down", down, e, activation(gate) * up)
        assert float((found[t] - wanted).abs().max()) < 1e-4 * float(wanted.abs().max()), (t, slot)


@pytest.mark.parametrize("what", ["scaled", "shifted", "negated", "of two"])
def test_a_block_of_another_shape_is_none(vllm: None, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an adapter's experts there are refused by name, and so are experts of another activation."""
    from flora_vllm.plugin.feed_forward import routed_faults

    block = _made("LlamaMLP")
    stock = type(block).forward
    others: dict[str, Callable[..., torch.Tensor]] = {
        "scaled": lambda x: 2 * stock(block, x),
        "shifted": lambda x: stock(block, x + 1),
        "negated": lambda x: block.down_proj(-block.act_fn(block.gate_up_proj(x)[0]))[0],
        "of two": lambda x, y: stock(block, x) + y,
    }
    monkeypatch.setattr(block, "forward", others[what])
    attached = _attached(block, Step())
    assert set(attached.layers) == {"mlp.gate_up_proj", "mlp.down_proj"}
    assert not attached.blocks
    (fault,) = routed_faults(_contents(_terms()), attached.blocks)
    assert "2 layers, the first 'mlp.gate_up_proj', have experts of a whole feed-forward block" in fault
    terms = {name: Routed(term.router, term.down, term.up, TOP, "gelu") for name, term in _terms().items()}
    faults = routed_faults(_contents(terms), dict.fromkeys(("mlp.gate_up_proj", "mlp.down_proj"), SILU))
    assert len(faults) == 2
    assert "its experts have the activation 'gelu', the model has silu or swish" in faults[0]
