"""MixLoRA, experts of LoRA in feed-forward blocks: from the authors' files to the block, against their equation."""

import json
from pathlib import Path
from typing import Any

import mixlora_support as support
import peft
import pytest
import torch
from formats_support import (
    edit_config,
    edit_tensors,
    faults_of,
    linear_layout,
    save_peft_adapter,
    the_fault,
    tiny_model,
)
from mixlora_support import EXPERTS, RANK, TOP
from torch.nn.functional import silu

from flora_vllm.commands.cli import main
from flora_vllm.errors import AdapterError
from flora_vllm.feed_forward import FeedForward
from flora_vllm.formats import read_adapter
from flora_vllm.layers import AdaptedLinear
from flora_vllm.mixing import mixed
from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.terms import LayerTerms
from flora_vllm.ops.torch_linear import TorchLinear
from flora_vllm.step import Step
from flora_vllm.terms import Added, Cut, Routed, Term, fold, merged

torch.set_num_threads(1)

CPU = torch.device("cpu")
H, M = 16, 24
UP0 = "model.layers.0.mlp.up_proj"
ROUTER0 = "base_model.model.model.layers.0.mlp.moe_gate.weight"


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {"gate": normal(M, H, seed=1, std=0.3), "up": normal(M, H, seed=2, std=0.3), "down": normal(H, M, seed=3)}
BIAS = normal(H, seed=4)


def experts_of(number: int, top: int, seed: int, names: tuple[str, ...] = ("gate", "up", "down")) -> dict[str, Routed]:
    router = normal(number, H, seed=seed)
    terms = {}
    for i, name in enumerate(names):
        out, into = WEIGHTS[name].shape
        down, up = normal(number * 2, into, seed=seed + 10 + i), normal(out, number * 2, seed=seed + 20 + i)
        terms[name] = Routed(router, down, up, top)
    return terms


def equation(x_H: torch.Tensor, terms: dict[str, Routed]) -> torch.Tensor:
    """The block of one row, expert by expert, in float64."""
    x = x_H.double()
    term = next(iter(terms.values()))
    shares = torch.softmax(term.router.double() @ x, 0)
    best = shares.topk(term.top)

    def layer(name: str, e: int, x: torch.Tensor) -> torch.Tensor:
        y = WEIGHTS[name].double() @ x
        if name in terms:
            rank = len(terms[name].down) // len(terms[name].router)
            part = slice(e * rank, (e + 1) * rank)
            y += terms[name].up[:, part].double() @ (terms[name].down[part].double() @ x)
        return y + BIAS.double() if name == "down" else y

    y = torch.zeros(H, dtype=torch.float64)
    for share, e in zip(best.values, best.indices.tolist(), strict=True):
        y += share / best.values.sum() * layer("down", e, silu(layer("gate", e, x)) * layer("up", e, x))
    return y


class Rank:
    """One rank of a block: columns of the inner features, and the bias on the first."""

    def __init__(self, columns: slice) -> None:
        self.step, self.columns = Step(), columns
        self.size = columns.stop - columns.start
        gate_up = torch.cat([WEIGHTS["gate"][columns], WEIGHTS["up"][columns]])
        self.bias = BIAS if columns.start == 0 else torch.zeros(H)
        self.gate_up = self._layer(gate_up, (self.size, self.size))
        self.down = self._layer(WEIGHTS["down"][:, columns].contiguous(), (H,))
        self.block = FeedForward(self.gate_up, self._activation, self.down)

    def _layer(self, weight: torch.Tensor, sizes: tuple[int, ...]) -> AdaptedLinear:
        rule = DispatchRule("stacked")
        kernel = TorchLinear(weight, lambda x: x @ weight.T, sizes, rule, weight.shape[1])
        return AdaptedLinear(kernel, self.step, sizes)

    @staticmethod
    def _activation(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return silu(gate) * up

    def write(self, slot: int, terms: dict[str, tuple[Term, ...]]) -> None:
        def cut(name: str, rows: slice, columns: slice, **options: Any) -> Any:
            return fold(terms[name], Cut(rows, columns, torch.float32, CPU, **options)) if name in terms else None

        whole, mine = slice(0, H), self.columns
        ends: list[LayerTerms] = [(cut("gate", mine, whole), cut("up", mine, whole))]
        ends.append((cut("down", whole, mine, sums=self.size < M, adds_bias=mine.start == 0),))
        for layer, part in zip((self.gate_up, self.down), ends, strict=True):
            layer.write_slot(slot, part if any(part) else None)

    def run(self, x_TH: torch.Tensor, slots: list[int]) -> torch.Tensor:
        self.step.set_mapping(slots, {slot: slot for slot in slots})
        inner = self._activation(self.gate_up.forward(x_TH, None))
        return self.down.forward(inner, self.bias)


LORA = normal(3, M, seed=50), normal(H, 3, seed=51)
# The base, as one expert that changes nothing.
NO_EXPERTS = {"down": Routed(normal(1, H), normal(1, M), torch.zeros(H, 1), 1)}
SLOTS: dict[int, dict[str, Any]] = {
    1: experts_of(5, 2, seed=100),
    2: experts_of(3, 3, seed=200, names=("gate", "down")),
    3: experts_of(4, 1, seed=300),
    4: experts_of(4, 2, seed=400, names=("down",)),
    5: experts_of(4, 2, seed=500, names=("up",)),
}


@pytest.mark.parametrize("cuts", [[slice(0, M)], [slice(0, 8), slice(8, M)]])
def test_a_row_goes_through_its_own_experts(cuts: list[slice]) -> None:
    """Beside base rows and another family's, on one rank and as the sum of two; alone as in the batch."""
    ranks = [Rank(columns) for columns in cuts]
    for rank in ranks:
        for slot, terms in SLOTS.items():
            rank.write(slot, {name: (term,) for name, term in terms.items()})
        rank.write(6, {"down": (Added(*LORA),)})
    slots = [0, 1, 6, 2, 1, 3, 0, 4, 5, 2, 1]
    x_TH = normal(len(slots), H, seed=9)
    found = torch.stack([rank.run(x_TH, slots).double() for rank in ranks]).sum(0)
    for t, slot in enumerate(slots):
        wanted = equation(x_TH[t], SLOTS.get(slot, NO_EXPERTS))
        if slot == 6:
            inner = silu(WEIGHTS["gate"] @ x_TH[t]) * (WEIGHTS["up"] @ x_TH[t])
            wanted = wanted + (LORA[1] @ (LORA[0] @ inner)).double()
        alone = torch.stack([rank.run(x_TH[t : t + 1], [slot]).double() for rank in ranks]).sum(0)
        for answer in (found[t], alone[0]):
            assert float((answer - wanted).abs().max()) < 1e-4 * max(float(wanted.abs().max()), 1), (t, slot)


def test_a_cleared_slot_leaves_nothing_behind() -> None:
    rank = Rank(slice(0, M))
    x_TH = normal(4, H, seed=9)
    before = rank.run(x_TH, [0] * 4)
    rank.write(1, {name: (term,) for name, term in SLOTS[4].items()})
    assert rank.gate_up._has_rare.value, "compiled code must come here for the layer that only routes, too"
    assert not torch.equal(rank.run(x_TH, [0, 1, 0, 1])[1], before[1])
    rank.write(1, {})
    assert not rank.block.slots
    assert not rank.gate_up._has_rare.value
    assert torch.equal(rank.run(x_TH, [0] * 4), before)


def test_what_routed_terms_cannot_be() -> None:
    term = SLOTS[1]["gate"]
    with pytest.raises(AdapterError, match="of 5 experts a token takes 1 to 5, got 6"):
        Routed(term.router, term.down, term.up, 6)
    with pytest.raises(AdapterError, match="a router must be"):
        Routed(term.router, term.down[1:], term.up[:, 1:], 2)
    with pytest.raises(AdapterError, match="no weight can say"):
        merged(WEIGHTS["gate"], None, [term])
    part = fold([term], Cut(slice(0, M), slice(0, H), torch.float32, CPU))
    with pytest.raises(AdapterError, match="routes the tokens"):
        mixed([(0.5, {"x": (part,)}), (0.5, {"x": (part,)})], {"x": (M,)})


def test_conditional_mixlora_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether its routers come in the authors' pickle or in a folder that says LoRA, as its config would."""
    module = "model.layers.0.self_attn.q_proj"
    router = {f"base_model.model.{module}.cmoa_selector.loraA_selector.weight": normal(4, 64)}
    torch.save(router, tmp_path / "pytorch_model.bin")
    assert main(["convert", "--pickle", str(tmp_path / "pytorch_model.bin"), str(tmp_path / "out")]) == 1
    assert "conditional MixLoRA (VT-NLP), which is not served: its routers read the mean" in capsys.readouterr().err
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    save_peft_adapter(tiny_model("llama"), config, tmp_path / "lora")
    edit_tensors(tmp_path / "lora", **router)
    assert "its output depends on how an engine cuts a prompt into steps" in the_fault(tmp_path / "lora")


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    support.write(tmp_path / "theirs", support.config_of(act_fn="silu"), support.random_tensors(tiny_model("llama")))
    return tmp_path / "theirs"


@pytest.fixture
def ours(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["convert", "--repair", str(theirs), str(tmp_path / "ours")]) == 1
    assert "is a pickle" in capsys.readouterr().err
    assert main(["convert", "--pickle", str(theirs), str(tmp_path / "ours")]) == 0
    assert "mixlora. is base_model.model.model. now" in capsys.readouterr().out
    return tmp_path / "ours"


def test_the_authors_folder_is_read(ours: Path) -> None:
    model = tiny_model("llama")
    adapter = read_adapter(ours, layout=linear_layout(model), max_lora_rank=RANK)
    assert (adapter.family, adapter.rank) == ("MIXLORA", RANK)
    tensors = support.random_tensors(model)
    (term,) = adapter.modules[UP0].of(Routed)
    assert (term.top, term.activation) == (TOP, "silu")
    assert torch.equal(term.router, tensors["mixlora.layers.0.mlp.moe_gate.weight"])
    for e in range(EXPERTS):
        part = slice(e * RANK, (e + 1) * RANK)
        name = f"mixlora.layers.0.mlp.up_proj.experts.{e}"
        assert torch.equal(term.down[part], tensors[f"{name}.lora_A.weight"])
        wanted = support.ALPHA / RANK * tensors[f"{name}.lora_B.weight"]
        assert torch.allclose(term.up[:, part], wanted)
    (attention,) = adapter.modules["model.layers.1.self_attn.q_proj"].of(Added)
    assert attention.scale == support.ALPHA / RANK
    assert set(adapter.modules) == {
        f"model.layers.{layer}.{part}"
        for layer in (0, 1)
        for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }


def test_targets_may_be_switches(tmp_path: Path) -> None:
    """As older versions of the authors' code write them."""
    switches = {"q_proj": True, "k_proj": False, "down_proj": True, "gate_proj": False}
    tensors = support.random_tensors(tiny_model("llama"), ("q_proj", "down_proj"))
    support.write(tmp_path / "theirs", support.config_of(switches), tensors)
    assert main(["convert", "--pickle", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["down_proj", "q_proj"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jitter_noise": 0.1}, "'jitter_noise' is 0.1; allowed: 0 or 0.0"),
        ({"act_fn": "relu"}, "'act_fn' is 'relu'; allowed: None or 'silu'"),
        ({"use_dora": True}, "'use_dora' is True; allowed: False"),
        ({"expert_lora": {"r": 4}}, "'expert_lora' is {'r': 4}; allowed: None"),
        ({"routing_strategy": "mixtral"}, "legacy_weights_convertor.py makes it of 'mixtral'"),
        ({"top_k": 9}, "of 4 experts a token takes 1 to 4, got 9"),
        ({"top_k": 0}, "'top_k' is 0"),
        ({"bias": "all"}, "'bias' is 'all'"),
        ({"num_experts": 10**9}, "'num_experts' is 1000000000; allowed: an integer from 1 to 256"),
        ({"num_experts": 5}, "experts.4.lora_A.weight' is missing"),
    ],
)
def test_configs_that_are_something_else(changes: dict[str, Any], message: str, ours: Path) -> None:
    edit_config(ours, **changes)
    assert any(message in fault for fault in faults_of(ours, layout=linear_layout(tiny_model("llama"))))


def test_files_that_are_not_whole(ours: Path) -> None:
    layout = linear_layout(tiny_model("llama"))
    edit_tensors(ours, **{ROUTER0: None})
    faults = faults_of(ours, layout=layout)
    assert len(faults) == 3
    assert all(ROUTER0 in fault and "the router of its block, is missing" in fault for fault in faults)
    edit_tensors(ours, **{ROUTER0: normal(EXPERTS, 7)})
    assert all("the router of its block reads 7 features" in fault for fault in faults_of(ours, layout=layout))
    edit_tensors(ours, **{ROUTER0: normal(EXPERTS + 1, 64)})
    assert "has shape (5, 64)" in the_fault(ours, layout=layout)
    edit_tensors(ours, **{ROUTER0: normal(EXPERTS, 64)})
    assert "rank 3 is above the limit 2" in the_fault(ours, layout=layout, max_lora_rank=2)
    assert "dense matrices take" in the_fault(ours, layout=layout, max_dense_bytes=1000)
