"""Systems outside PEFT: our reading of their files against the equations of their papers and code, in float64 loops."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from formats_support import edit_config, edit_tensors, the_fault, tiny_model
from safetensors.torch import save_file

from flora_vllm.adapter import ModelLayout
from flora_vllm.formats import content_digest, examine, read_adapter
from flora_vllm.slots import LinearLayout, SliceLayout, layer_terms
from flora_vllm.terms import Added, merged

torch.set_num_threads(1)

PREFIX = "base_model.model."
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
OUT, IN = 12, 24
LAYOUT = ModelLayout({Q: (OUT, IN), V: (OUT, IN)})


def write(path: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], **sidecar: float) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"target_modules": ["q_proj", "v_proj"], **config}))
    save_file({f"{PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}, path / WEIGHTS)
    if sidecar:
        (path / "flora_sidecar.json").write_text(json.dumps(sidecar))
    return path


WEIGHTS = "adapter_model.safetensors"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def output(path: Path, x_TI: torch.Tensor, module: str = Q, task: str | None = None) -> torch.Tensor:
    """What the adapter adds for the rows of `x_TI`, by our terms merged in float64."""
    adapter = read_adapter(path, layout=LAYOUT, task=task)
    weight, _ = merged(torch.zeros(OUT, IN, dtype=torch.float64), None, adapter.modules[module].terms)
    return x_TI.double() @ weight.T


def check(found: torch.Tensor, wanted: torch.Tensor, bound: float = 1e-6) -> None:
    assert wanted.abs().max() > 0.1, "the adapter must do something"
    assert float((found - wanted).abs().max() / wanted.abs().max()) < bound


RANKS, ALPHAS = [2, 4, 1], [6, 2, 5]


def melora(path: Path, **changes: Any) -> Path:
    tensors = {}
    for module in (Q, V):
        for i, rank in enumerate(RANKS):
            tensors[f"{module}.lora_A.{i}.weight"] = random(rank, IN // 3, seed=i)
            tensors[f"{module}.lora_B.{i}.weight"] = random(OUT // 3, rank, seed=i + 7)
    config = {
        "peft_type": "MELORA",
        "r": RANKS,
        "lora_alpha": ALPHAS,
        "mode": "me",
        "bias": "none",
        "lora_dropout": 0.1,
    }
    return write(path, {**config, **changes}, tensors)


def test_melora_adapts_each_slice_alone(tmp_path: Path) -> None:
    path = melora(tmp_path / "a")
    x = random(3, IN)
    wanted = torch.zeros(3, OUT, dtype=torch.float64)
    for i, (rank, alpha) in enumerate(zip(RANKS, ALPHAS, strict=True)):
        a, b = random(rank, IN // 3, seed=i).double(), random(OUT // 3, rank, seed=i + 7).double()
        for t in range(3):
            part = x[t, i * 8 : (i + 1) * 8].double()
            wanted[t, i * 4 : (i + 1) * 4] = alpha / rank * torch.stack([row @ (a @ part) for row in b])
    check(output(path, x), wanted)
    (term,) = read_adapter(path).modules[Q].terms
    assert isinstance(term, Added)
    assert term.rank == sum(RANKS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": [2, 0, 1]}, "'r' is [2, 0, 1]; allowed: a list of integers of at least 1"),
        ({"r": 4}, "'r' is 4; allowed: a list"),
        ({"lora_alpha": [1, 2]}, "'r' has 3 slices and 'lora_alpha' 2"),
        ({"bias": "some"}, "'bias' is 'some'"),
    ],
)
def test_melora_that_cannot_be_served(changes: dict, message: str, tmp_path: Path) -> None:
    found = examine(melora(tmp_path / "a", **changes), layout=LAYOUT)
    assert found.adapter is None
    assert message in found.faults[0]


def test_melora_needs_equal_slices(tmp_path: Path) -> None:
    path = melora(tmp_path / "a")
    faults = examine(path, layout=ModelLayout({Q: (OUT, IN + 1), V: (OUT + 2, IN)})).faults
    assert any("its 25 in features cannot be cut into 3 equal slices" in fault for fault in faults)
    assert any("its 14 out features cannot be cut into 3 equal slices" in fault for fault in faults)


TASKS, RANK, MIXED = 3, 4, 2


def mtl_tensors(diagonal: bool, scaler: bool) -> dict[str, torch.Tensor]:
    tensors = {}
    for module in (Q, V):
        tensors[f"{module}.lora_A"] = random(1, RANK, IN)
        tensors[f"{module}.lora_lambdas"] = random(TASKS, RANK) if diagonal else random(TASKS, RANK, RANK)
        tensors[f"{module}.lora_B"] = random(MIXED, OUT, RANK)
        tensors[f"{module}.lora_B_w"] = random(TASKS, MIXED)
        if scaler:
            tensors[f"{module}.lora_scaler"] = torch.tensor(0.3)
    return tensors


def mtl_output(
    tensors: Mapping[str, torch.Tensor], x: torch.Tensor, task: int, alpha: float, tau: float
) -> torch.Tensor:
    """The authors' equation for one task, a number at a time."""
    a, core, b, w = (tensors[f"{Q}.lora_{part}"].double() for part in ("A", "lambdas", "B", "B_w"))
    shares = [math.exp(float(w[task, j]) / tau) for j in range(MIXED)]
    mixed = sum(share / sum(shares) * b[j] for j, share in enumerate(shares))
    scale = alpha / RANK
    if f"{Q}.lora_scaler" in tensors:
        scale /= 1 + math.exp(-float(tensors[f"{Q}.lora_scaler"]))
    rows = []
    for row in x.double():
        low = a[0] @ row
        low = core[task] * low if core.ndim == 2 else core[task] @ low
        rows.append(scale * (mixed @ low))
    return torch.stack(rows)


def mtl(path: Path, diagonal: bool, scaler: bool = False, **sidecar: float) -> Path:
    config = {"peft_type": "MTLLORA", "r": RANK, "n_tasks": TASKS, "diagonal": diagonal}
    return write(path, config, mtl_tensors(diagonal, scaler), **(sidecar or {"alpha": 6, "temperature": 0.7}))


@pytest.mark.parametrize(("diagonal", "scaler"), [(False, False), (True, True)])
def test_mtl_lora_is_one_lora_a_task(diagonal: bool, scaler: bool, tmp_path: Path) -> None:
    path, x = mtl(tmp_path / "a", diagonal, scaler), random(3, IN)
    for task in range(TASKS):
        wanted = mtl_output(mtl_tensors(diagonal, scaler), x, task, 6, 0.7)
        check(output(path, x, task=str(task)), wanted, 2e-6)


def test_the_sidecar_is_part_of_the_adapter(tmp_path: Path) -> None:
    path = mtl(tmp_path / "a", diagonal=True)
    other = mtl(tmp_path / "b", diagonal=True, alpha=6, temperature=0.8)
    assert content_digest(path) != content_digest(other)
    assert content_digest(path) == read_adapter(path, task="1").digest
    sidecar = path / "flora_sidecar.json"
    for text, message in (
        ('{"alpha": 6, "temperature": 0}', "flora_sidecar.json: 'temperature' is 0; allowed: a number above 0"),
        ('{"alpha": 6}', "flora_sidecar.json: key 'temperature' is missing"),
        ('{"alpha": 6, "temperature": 1, "beta": 1}', "flora_sidecar.json: key 'beta' (value 1) is unknown"),
        ("nonsense", "flora_sidecar.json: not valid JSON"),
        (" " * (64 * 1024 + 1), "flora_sidecar.json: has 65537 bytes; at most 65536 are read"),
    ):
        sidecar.write_text(text)
        found = examine(path, task="0")
        assert found.adapter is None
        assert any(message in fault for fault in found.faults), found.faults
    sidecar.unlink()
    assert "key 'alpha' is missing" in str(examine(path, task="0").faults)


def test_a_sidecar_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    path = lora(tmp_path / "a")
    (path / "flora_sidecar.json").write_text('{"alpha": 1}')
    assert "flora_sidecar.json: key 'alpha' (value 1) is unknown" in the_fault(path)


def xgb(path: Path, **changes: Any) -> Path:
    tensors = {}
    for module, boosters in ((Q, 3), (V, 1)):
        tensors[f"{module}.booster_A"] = random(boosters, IN)
        tensors[f"{module}.booster_B"] = random(OUT, boosters)
    return write(path, {"peft_type": "XGBLORA", "r": 1, "n_boosters": 4, **changes}, tensors)


def test_xgblora_sums_its_boosters(tmp_path: Path) -> None:
    path, x = xgb(tmp_path / "a"), random(3, IN)
    weight = torch.zeros(OUT, IN, dtype=torch.float64)
    for a, b in zip(random(3, IN).double(), random(OUT, 3).T.double(), strict=True):
        weight = weight + torch.tensor([[float(bo * ai) for ai in a] for bo in b], dtype=torch.float64)
    check(output(path, x), x.double() @ weight.T)


def test_xgblora_has_no_more_boosters_than_it_says(tmp_path: Path) -> None:
    assert "rank 3; of 2 boosters of rank 1" in the_fault(xgb(tmp_path / "a", n_boosters=2))
    faults = examine(xgb(tmp_path / "b", r=2)).faults
    assert any("rank 3; of 4 boosters of rank 2 it is a multiple of 2" in fault for fault in faults)


def lora(path: Path, **config: Any) -> Path:
    """ShareLoRA's: modules of one projection have one A."""
    tensors = {}
    for seed, module in enumerate((Q, V)):
        tensors[f"{module}.lora_A.weight"] = random(RANK, IN)
        tensors[f"{module}.lora_B.weight"] = random(OUT, RANK, seed=seed)
    return write(path, {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, **config}, tensors)


def test_sharelora_is_lora_and_its_a_is_held_once(tmp_path: Path) -> None:
    path, x = lora(tmp_path / "a"), random(3, IN)
    for seed, module in enumerate((Q, V)):
        low = [random(RANK, IN).double() @ row for row in x.double()]
        check(output(path, x, module), torch.stack([2 * (random(OUT, RANK, seed=seed).double() @ row) for row in low]))
    adapter = read_adapter(path)
    downs = [term.down for terms in adapter.modules.values() for term in terms.of(Added)]
    assert len(downs) == 2
    assert downs[0] is downs[1]
    assert adapter.nbytes == 4 * (RANK * IN + 2 * OUT * RANK)

    # In the slots' contents too, and only there where the layers are alike.
    inputs: dict[tuple, torch.Tensor] = {}
    folded = [
        layer_terms(layout(module), adapter.modules, dtype, inputs=inputs)
        for module, dtype in ((Q, torch.float32), (V, torch.float32), (V, torch.bfloat16))
    ]
    q, v, half = (terms[0] for terms in folded if terms is not None)
    assert q is not None
    assert v is not None
    assert half is not None
    assert q.down_RI is v.down_RI
    assert half.down_RI is not None
    assert half.down_RI.dtype == torch.bfloat16

    edit_tensors(path, **{f"{PREFIX}{V}.lora_A.weight": random(RANK, IN, seed=1)})
    downs = [term.down for terms in read_adapter(path).modules.values() for term in terms.of(Added)]
    assert downs[0] is not downs[1]
    assert not torch.equal(downs[0], downs[1])


def layout(module: str) -> LinearLayout:
    return LinearLayout(module, IN, 0, IN, (SliceLayout(module, OUT, 0, 0, OUT),), OUT)


def test_icm_lora_generates_plain_lora(tmp_path: Path) -> None:
    """Its decoder's folders: rsLoRA, alpha 8; one written as PEFT writes them, read back to the equation."""
    model = tiny_model("llama")
    config = peft.LoraConfig(r=RANK, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1
        for name, tensor in peft.get_peft_model_state_dict(wrapped).items()
    }
    wrapped.save_pretrained(str(tmp_path))
    save_file(state, tmp_path / WEIGHTS)
    terms = read_adapter(tmp_path).modules["model.layers.0.self_attn.q_proj"].terms
    a, b = (state[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_{side}.weight"].double() for side in "AB")
    found, _ = merged(torch.zeros(64, 64, dtype=torch.float64), None, terms)
    check(found, 8 / math.sqrt(RANK) * torch.stack([torch.stack([row @ column for column in a.T]) for row in b]), 1e-9)


def test_keys_of_old_peft_at_harmless_values(tmp_path: Path) -> None:
    path = lora(tmp_path / "a", enable_lora=None, merge_weights=False)
    assert read_adapter(path).rank == RANK
    for name in ("optimizer.pt", "README.md", "training_args.bin"):
        (path / name).write_bytes(b"whatever")
    (path / "checkpoint-10").mkdir()
    assert read_adapter(path).rank == RANK
    edit_config(path, enable_lora=[True, False])
    assert "'enable_lora' is [True, False]; allowed: None" in the_fault(path)
