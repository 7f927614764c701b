"""Adapters among which tokens choose: Arrow against PEFT's own model, MeteoRA against its equation, in float64."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families_support import fill_normal, save_filled
from formats_support import edit_config, edit_tensors, faults_of, linear_layout, the_fault, tiny_model
from peft.tuners.lora.arrow import create_arrow_model
from safetensors.torch import load_file, save_file

from flora_vllm.commands.cli import main
from flora_vllm.errors import AdapterError
from flora_vllm.formats import read_adapter
from flora_vllm.formats.arrow import Routing, prototype
from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.reference import reference_linear
from flora_vllm.ops.shell import Shell
from flora_vllm.ops.terms import group_by_slot
from flora_vllm.ops.torch_linear import TorchLinear
from flora_vllm.terms import Cut, Gain, Gated, Product, Term, fold, merged

torch.set_num_threads(1)

CPU = torch.device("cpu")
LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
Q0 = "model.layers.0.self_attn.q_proj"
O, I, E, R = 20, 16, 5, 3  # noqa: E741 - the shape letters


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gated(**options: Any) -> Gated:
    return Gated(normal(E, I), normal(E * R, I, seed=1), normal(O, E * R, seed=2), **{"top": 2, **options})


def by_token(term: Gated, x_I: torch.Tensor) -> torch.Tensor:
    """The equation for one row, expert by expert."""
    x, rank = x_I.double(), len(term.down) // len(term.gate)
    scores = [float(row.double() @ x) for row in term.gate]
    scores = [abs(score) for score in scores] if term.is_absolute else scores
    best = sorted(range(len(scores)), key=lambda e: -scores[e])[: term.top]
    shares = torch.softmax(torch.tensor([scores[e] for e in best], dtype=torch.float64) / term.temperature, 0)
    y = torch.zeros(len(term.up), dtype=torch.float64)
    for share, e in zip(shares, best, strict=True):
        part = slice(e * rank, (e + 1) * rank)
        y += share * (term.up[:, part].double() @ (term.down[part].double() @ x))
    return y


@pytest.mark.parametrize("options", [{}, {"is_absolute": True, "temperature": 0.3}, {"top": 1}, {"top": E}])
@pytest.mark.parametrize("rows", [slice(0, O), slice(0, 8), slice(8, O)])
def test_a_token_gets_its_own_experts(options: dict[str, Any], rows: slice) -> None:
    """By reference and by shell: alone, and beside rows of the base and of an adapter that scales what is added."""
    term, weight, x_TI = gated(**options), normal(O, I, seed=3), normal(9, I, seed=4)
    gain = normal(O, seed=5)
    slots: list[tuple[Term, ...]] = [(term,), (Product(), term, Gain(gain, scales_bias=False))]
    contents = [(fold(terms, Cut(rows, slice(0, I), torch.float32, CPU)),) for terms in slots]
    w = weight[rows]
    sizes = (len(w),)
    shell = Shell(TorchLinear(w, lambda x: x @ w.T, sizes, DispatchRule("auto"), I), sizes)
    for slot, part in enumerate(contents, 1):
        shell.write_slot(slot, part)
    slot_of = [1, 0, 2, 1, 2, 0, 1, 1, 2]
    segments = group_by_slot(slot_of)
    wanted = x_TI.double() @ w.double().T
    for t, slot in enumerate(slot_of):
        if slot:
            wanted[t] += by_token(term, x_TI[t])[rows]
        if slot == 2:
            wanted[t] *= gain[rows].double()
    for found in (
        reference_linear(x_TI, w, None, sizes, [None, *contents], segments),
        shell.forward(x_TI, None, segments).double(),
    ):
        assert float((found - wanted).abs().max()) < 2e-5
    for t, slot in enumerate(slot_of):
        alone = shell.forward(x_TI[t : t + 1], None, group_by_slot([slot])).double()
        assert float((alone[0] - wanted[t]).abs().max()) < 2e-5


def test_what_a_gate_cannot_be() -> None:
    for options in ({"top": 0}, {"top": E + 1}, {"temperature": 0.0}):
        with pytest.raises(AdapterError, match=f"of {E} experts"):
            gated(**options)
    with pytest.raises(AdapterError, match="a gate must be"):
        Gated(normal(E, I), normal(E * R + 1, I), normal(O, E * R + 1), 2)
    with pytest.raises(AdapterError, match="serve it with --tensor-parallel-size 1"):
        fold([gated()], Cut(slice(0, O), slice(0, 8), torch.float32, CPU, sums=True))
    with pytest.raises(AdapterError, match="no weight can say"):
        merged(normal(O, I), None, [gated()])


def save_loras(folder: Path, **options: Any) -> list[str]:
    paths = []
    for number in range(4):
        config = peft.LoraConfig(**{"r": 3, "lora_alpha": 4 + number, "target_modules": LINEAR, **options})
        path = folder / f"lora{number}"
        save_filled(tiny_model("llama"), config, path, partial(fill_normal, std=0.3 * (1 + number)))
        edit_tensors(path, **{k: t.roll(number, 1) for k, t in load_file(path / "adapter_model.safetensors").items()})
        paths.append(str(path))
    return paths


def arrow(*words: str) -> int:
    return main(["merge", "--method", "arrow", *words])


@pytest.mark.parametrize(
    ("words", "options", "general"),
    [
        (("--top-k", "2", "--seed", "5"), {"top_k": 2, "rng_seed": 5}, 0),
        (("--temperature", "0.3"), {"router_temperature": 0.3, "rng_seed": 0}, 0),
        (("--top-k", "1", "--seed", "1"), {"top_k": 1, "rng_seed": 1}, 1),
        (("--top-k", "2"), {"top_k": 2, "rng_seed": 0}, 2),
    ],
)
def test_arrow_is_pefts_forward(
    words: tuple[str, ...], options: dict[str, Any], general: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every layer's output, for the inputs that PEFT's own model gives it."""
    paths = save_loras(tmp_path)
    tasks, others = paths[: 4 - general if general else 3], paths[4 - general :] if general else []
    out = tmp_path / "out"
    assert arrow(*words, *(word for path in others for word in ("--general", path)), *tasks, str(out)) == 0
    assert "each token chooses" in capsys.readouterr().out
    base = tiny_model("llama")
    adapter = read_adapter(out, layout=linear_layout(base))
    assert (adapter.family, adapter.rank) == ("ARROW", 3)
    config = peft.ArrowConfig(**options, use_gks=bool(general))
    theirs = create_arrow_model(tiny_model("llama"), tasks, config, others or None).eval()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in adapter.modules:
        layer = theirs.get_submodule(f"base_model.model.{name}")
        layer.register_forward_hook(lambda _, args, y, name=name: seen.update({name: (args[0], y)}))
    with torch.no_grad():
        theirs(torch.randint(0, 80, (2, 9), generator=torch.Generator().manual_seed(3)))
    assert set(seen) == set(adapter.modules)
    for name, (x, y) in seen.items():
        layer: Any = base.get_submodule(name)
        (term,) = adapter.modules[name].of(Gated)
        x_TI, plain = x.flatten(0, 1), layer(x).flatten(0, 1).detach()
        part = fold([term], Cut(slice(0, len(term.up)), slice(0, x_TI.shape[1]), torch.float32, CPU))
        added = part.rare[0].apply(x_TI)
        wanted = y.flatten(0, 1) - plain
        scale = float(wanted.abs().max())
        assert scale > 0.01
        assert float((added - wanted).abs().max()) < 1e-5 * max(scale, 1)
        for t in range(3):
            assert float((by_token(term, x_TI[t]) - wanted[t]).abs().max()) < 1e-5 * max(scale, 1)


def test_the_prototype_is_the_direction_that_is_stretched_most() -> None:
    down, up = normal(3, 40), normal(24, 3, seed=1)
    right = torch.linalg.svd(up.double() @ down.double(), full_matrices=False)[2][0]
    assert abs(float(prototype(down, up, 1).double() @ right)) > 0.99


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
def test_what_arrow_cannot_route(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, *_ = save_loras(tmp_path / "a")
    other = save_loras(tmp_path / "b", r=2)[0]
    fewer = save_loras(tmp_path / "c", target_modules=["q_proj"])[0]
    pattern = save_loras(tmp_path / "d", rank_pattern={"q_proj": 2})[:2]
    out = str(tmp_path / "out")
    for words, message in (
        ([one, two], "top_k is 3, and there are 2 adapters"),
        (["--top-k", "0", one, two], "top_k is 0"),
        (["--temperature", "0", one, two], "temperature is 0.0"),
        (["--seed", "-1", one, two], "seed is -1"),
        (["--top-k", "1", one, other], f"{other} has several ranks, or others than {one}"),
        (["--top-k", "1", one, fewer], f"{fewer} has other modules than {one}"),
        (["--top-k", "1", *pattern], f"{pattern[0]} has several ranks"),
        (["--top-k", "1", "--general", fewer, one, two], f"{fewer} has other modules"),
        (["--top-k", "1", one, two, str(tmp_path)], "exists and is not an empty directory"),
    ):
        target = [] if words[-1] == str(tmp_path) else [out]
        assert arrow(*words, *target) == 1
        assert message in capsys.readouterr().err
        assert not Path(out).exists()
    with pytest.raises(AdapterError, match="temperature is inf"):
        Routing(temperature=float("inf"))
    edit_config(Path(two), use_dora=True)
    assert arrow("--top-k", "1", one, two, out) == 1
    assert "cannot be served" in capsys.readouterr().err


def write_meteora(path: Path, model: torch.nn.Module, alphas: list[float], **sidecar: Any) -> None:
    layer: Any = model.get_submodule(Q0)
    out, into = layer.weight.shape
    tensors = {"moe_gate.weight": normal(E, into), "lora_A.weight": 0.3 * normal(E * R, into, seed=1)}
    tensors["lora_B.weight"] = 0.3 * normal(out, E * R, seed=2)
    path.mkdir(exist_ok=True)
    config = {"peft_type": "METEORA", "r": R, "n_adapters": E, "target_modules": [Q0]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"base_model.model.{Q0}.{name}": t for name, t in tensors.items()}, path / "adapter_model.safetensors")
    beside = {"alphas": alphas, "top_k": 2, "temperature": 1.0, **sidecar}
    (path / "flora_sidecar.json").write_text(json.dumps(beside))


def test_meteora_is_its_equation(tmp_path: Path) -> None:
    """Σ w_i α_i/r B_i A_i x of the two adapters that G x is largest for, w = softmax of these scores / T."""
    model, alphas = tiny_model("llama"), [1.0, 2.0, 3.0, 4.0, 6.0]
    write_meteora(tmp_path, model, alphas, temperature=2.5)
    adapter = read_adapter(tmp_path, layout=linear_layout(model))
    (term,) = adapter.modules[Q0].of(Gated)
    file = load_file(tmp_path / "adapter_model.safetensors")
    gate, down, up = (
        file[f"base_model.model.{Q0}.{name}.weight"].double() for name in ("moe_gate", "lora_A", "lora_B")
    )
    part = fold([term], Cut(slice(0, 64), slice(0, 64), torch.float32, CPU))
    for x in normal(6, 64, seed=7):
        best, chosen = (gate @ x.double()).topk(2)
        wanted = torch.zeros(64, dtype=torch.float64)
        for share, i in zip(torch.softmax(best / 2.5, 0), chosen.tolist(), strict=True):
            its = slice(i * R, (i + 1) * R)
            wanted += share * alphas[i] / R * up[:, its] @ (down[its] @ x.double())
        assert float((part.rare[0].apply(x[None])[0] - wanted).abs().max()) < 1e-5


def test_meteora_is_taken_out_of_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The authors' shards, which hold the base too, become the folder that the test above reads."""
    model = tiny_model("llama")
    write_meteora(tmp_path / "wanted", model, [6.0] * E, temperature=1.5)
    tensors = load_file(tmp_path / "wanted" / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    layer: Any = model.get_submodule(Q0)
    names[f"{Q0}.base_layer.weight"] = layer.weight.detach()
    source = tmp_path / "model"
    source.mkdir()
    for number, some in enumerate((dict(list(names.items())[:2]), dict(list(names.items())[2:]))):
        save_file(some, source / f"model-0000{number + 1}-of-00002.safetensors")
    arguments = ["--repair", str(source), str(tmp_path / "out")]
    assert main(["convert", *arguments]) == 1
    assert "is MeteoRA, whose files leave out" in capsys.readouterr().err
    assert main(["convert", *arguments, "--alpha", "6", "--temperature", "1.5", "--top-k", "2"]) == 0
    assert "left out the base model" in capsys.readouterr().out
    one, other = (read_adapter(tmp_path / name, layout=linear_layout(model)).modules for name in ("wanted", "out"))
    for term, same in zip(one[Q0].of(Gated), other[Q0].of(Gated), strict=True):
        assert (term.top, term.temperature, term.is_absolute) == (same.top, same.temperature, same.is_absolute)
        assert all(torch.equal(getattr(term, name), getattr(same, name)) for name in ("gate", "down", "up"))
    assert (
        main(["convert", "--to-lora", str(tmp_path), str(tmp_path / "out"), str(tmp_path / "x"), "--top-k", "2"]) == 1
    )
    assert "are for --pickle and --repair" in capsys.readouterr().err
    (source / "model-00001-of-00002.safetensors").write_bytes(b"junk")
    assert main(["convert", *arguments, "--alpha", "6"]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_a_gate_is_no_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    model.save_pretrained(str(tmp_path / "base"))
    write_meteora(tmp_path / "meteora", model, [6.0] * E)
    base, adapter, out = (str(tmp_path / name) for name in ("base", "meteora", "out"))
    assert main(["merge", base, adapter, out]) == 1
    assert f"module {Q0!r}: its gate chooses by token" in capsys.readouterr().err
    assert main(["convert", "--to-lora", base, adapter, out]) == 1
    assert "its Gated is more than LoRA can say" in capsys.readouterr().err


def test_faults_of_gated_folders(tmp_path: Path) -> None:
    model = tiny_model("llama")
    layout = linear_layout(model)
    write_meteora(tmp_path, model, [1.0] * 4)
    assert "'alphas' has 4 numbers; there are 5 adapters" in the_fault(tmp_path, layout=layout)
    write_meteora(tmp_path, model, [1.0] * 5, top_k=6)
    assert "of 5 experts a gate takes 1 to 5" in the_fault(tmp_path, layout=layout)
    write_meteora(tmp_path, model, [1.0] * 5, temperature=0)
    assert "'temperature' is 0; allowed: a number above 0" in the_fault(tmp_path, layout=layout)
    write_meteora(tmp_path, model, [1.0] * 5)
    assert "rank 3 is above the limit 2" in the_fault(tmp_path, layout=layout, max_lora_rank=2)
    assert "dense matrices take" in the_fault(tmp_path, layout=layout, max_dense_bytes=1000)
    edit_tensors(tmp_path, **{f"base_model.model.{Q0}.moe_gate.weight": normal(4, 64)})
    assert any("has shape (4, 64)" in fault for fault in faults_of(tmp_path, layout=layout))
    (tmp_path / "flora_sidecar.json").unlink()
    assert any("'top_k' is missing" in fault for fault in faults_of(tmp_path, layout=layout))
