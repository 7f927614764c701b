"""Merges of LoRA adapters: the tensors of PEFT's `add_weighted_adapter`, for every method, and its forward."""

import hashlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families_support import fill_normal, save_filled
from formats_support import edit_config, edit_tensors, tiny_model
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from flora_vllm.commands.cli import main
from flora_vllm.errors import AdapterError
from flora_vllm.formats.merge_methods import METHODS, Method, drawn

torch.set_num_threads(1)

TARGETS = ["q_proj", "v_proj", "down_proj"]
LAYER = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"


def lora(r: int = 4, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": r, "lora_alpha": 10, "target_modules": TARGETS, **options})


# Equal ranks; scales that differ, by adapter and module; a module that one adapter lacks.
EQUAL = (
    lora(lora_alpha=10),
    lora(lora_alpha=3, alpha_pattern={"v_proj": 7}),
    lora(lora_alpha=5, target_modules=["q_proj", "o_proj"]),
)
UNEQUAL = (lora(4), lora(6, lora_alpha=3, rank_pattern={"v_proj": 8}), lora(2, use_rslora=True))
EMBEDDED = (lora(target_modules=["q_proj", "embed_tokens"]), lora(lora_alpha=3, target_modules=["embed_tokens"]))
WEIGHTS = (0.7, -0.4, 1.3)

# Arguments beside the adapters and weights.
DENSE: dict[str, Any] = {"density": 0.4}
CASES: dict[str, tuple[tuple[peft.LoraConfig, ...], dict[str, Any]]] = {
    "linear": (EQUAL, {"method": "linear"}),
    "ties": (EQUAL, {"method": "ties", **DENSE}),
    "ties-frequency": (EQUAL, {"method": "ties", **DENSE, "majority_sign_method": "frequency"}),
    "ties-whole": (EQUAL, {"method": "ties", "density": 1.0}),
    "magnitude_prune": (EQUAL, {"method": "magnitude_prune", **DENSE}),
    "dare_linear": (EQUAL, {"method": "dare_linear", **DENSE, "seed": 3}),
    "dare_ties": (EQUAL, {"method": "dare_ties", **DENSE, "seed": 4}),
    "cat": (UNEQUAL, {"method": "cat"}),
    "cat-rslora-first": (UNEQUAL[::-1], {"method": "cat"}),
    "linear-rslora": ((lora(use_rslora=True), lora(lora_alpha=3)), {"method": "linear"}),
    "linear-patterns": ((lora(8, rank_pattern={"v_proj": 3}),) * 2, {"method": "linear"}),
    "svd": (UNEQUAL, {"method": "svd"}),
    "svd-rank": (UNEQUAL, {"method": "svd", "svd_rank": 3}),
    "ties_svd": (UNEQUAL, {"method": "ties_svd", **DENSE}),
    "magnitude_prune_svd": (UNEQUAL, {"method": "magnitude_prune_svd", **DENSE}),
    "dare_linear_svd": (UNEQUAL, {"method": "dare_linear_svd", **DENSE, "seed": 5}),
    "dare_ties_svd": (UNEQUAL, {"method": "dare_ties_svd", **DENSE, "seed": 6}),
    "embedding-linear": (EMBEDDED, {"method": "linear"}),
    "embedding-cat": (EMBEDDED, {"method": "cat"}),
    "embedding-svd": (EMBEDDED, {"method": "svd"}),
    "embedding-ties": (EMBEDDED, {"method": "ties", **DENSE}),
    "embedding-dare_linear": (EMBEDDED, {"method": "dare_linear", **DENSE, "seed": 7}),
}


def save_parts(configs: tuple[peft.LoraConfig, ...], folder: Path, *, as_saved: bool = False) -> list[Path]:
    def fill(name: str, parameter: torch.Tensor) -> None:
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{len(paths)}{name}".encode()).digest()[:4], "little"))
        fill_normal(name, parameter)

    paths: list[Path] = []
    for number, config in enumerate(configs):
        path = folder / f"part{number}"
        save_filled(tiny_model("llama"), config, path, fill)
        # PEFT saves the base's own weights of an embedding, too.
        whole = [name for name in load_file(path / "adapter_model.safetensors") if "lora_" not in name]
        assert bool(whole) == ("embed_tokens" in config.target_modules)
        if as_saved:
            whole = []
        edit_tensors(path, **dict.fromkeys(whole))
        paths.append(path)
    return paths


class OurDraws(TorchFunctionMode):
    """PEFT's own merge with the choices that our seed makes, in the order in which PEFT asks for them."""

    def __init__(self, method: Method, places: list[str]) -> None:
        self._method = method
        self._places = iter(places)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.bernoulli:
            return drawn(args[0].shape, self._method, next(self._places))
        return func(*args, **(kwargs or {}))


def places_of(model: peft.PeftModel, names: list[str], method: Method) -> list[str]:
    """The tensors that PEFT draws for, in its order: by module, A of all adapters that have it, then B."""
    places = []
    for module, layer in model.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            there = range(sum(name in layer.lora_A or name in layer.lora_embedding_A for name in names))
            sides = ("",) if method.decomposes else ("/A", "/B")
            places += [f"{module}{side}/{number}" for side in sides for number in there]
    return places


def pefts(paths: list[Path], weights: tuple[float, ...], options: dict[str, Any]) -> peft.PeftModel:
    model = peft.PeftModel.from_pretrained(tiny_model("llama"), str(paths[0]), adapter_name="part0")
    for number, path in enumerate(paths[1:], 1):
        model.load_adapter(str(path), adapter_name=f"part{number}")
    names = [f"part{number}" for number in range(len(paths))]
    method = Method(**options)
    arguments = {key: value for key, value in options.items() if key not in ("method", "seed")}
    if method.decomposes:
        arguments["svd_full_matrices"] = False
    tuner: Any = model.base_model
    with OurDraws(method, places_of(model, names, method)):
        tuner.add_weighted_adapter(names, list(weights), "merged", combination_type=method.method, **arguments)
    model.set_adapter("merged")
    return model.eval()


def ours(paths: list[Path], weights: tuple[float, ...], options: dict[str, Any], out: Path) -> int:
    words = [f"--weights={','.join(map(str, weights))}"]
    words += [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    return main(["merge", *words, *map(str, paths), str(out)])


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 80, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("case", CASES)
def test_equals_pefts(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs, options = CASES[case]
    paths, weights = save_parts(configs, tmp_path), WEIGHTS[: len(configs)]
    theirs = pefts(paths, weights, options)
    assert ours(paths, weights, options, tmp_path / "out") == 0, capsys.readouterr().err
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    wanted = peft.get_peft_model_state_dict(theirs, adapter_name="merged", save_embedding_layers=False)
    assert set(found) == set(wanted)
    unequal = {name for name, tensor in found.items() if not torch.equal(tensor, wanted[name])}
    assert not unequal
    # And so says PEFT, reading it.
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "out")).eval()
    before, after = logits_of(tiny_model("llama")), logits_of(theirs)
    assert float((after - before).abs().max()) > 0.01, "the merge must do something"
    torch.testing.assert_close(logits_of(loaded), after, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapted_embedding_as_peft_saves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base's own weight lies beside its factors: passed over where --base says that it is that."""
    paths, options = save_parts(EMBEDDED, tmp_path, as_saved=True), {"method": "cat"}
    theirs = pefts(paths, WEIGHTS[: len(paths)], options)
    found = refused(paths, options, tmp_path / "out", capsys)
    assert "['model.embed_tokens.base_layer.weight'] whole, which no merge has; save it without" in found
    assert "--base" in found
    tiny_model("llama").save_pretrained(tmp_path / "base")
    options["base"] = str(tmp_path / "base")
    assert ours(paths, WEIGHTS[: len(paths)], options, tmp_path / "out") == 0, capsys.readouterr().err
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "out")).eval()
    assert float((logits_of(loaded) - logits_of(theirs)).abs().max()) < 1e-5
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    edit_tensors(paths[0], **{name: load_file(paths[0] / "adapter_model.safetensors")[name] + 1})
    assert f"{paths[0]} holds ['model.embed_tokens" in refused(paths, options, tmp_path / "no", capsys)


def test_every_method_has_a_case() -> None:
    assert {options["method"] for _, options in CASES.values()} == set(METHODS)


def test_full_matrices_are_the_same_merge(tmp_path: Path) -> None:
    """PEFT's default decomposes fully: the same product of factors, whatever the signs of the vectors."""
    paths = save_parts(UNEQUAL, tmp_path)
    assert ours(paths, WEIGHTS, {"method": "svd"}, tmp_path / "out") == 0
    model = peft.PeftModel.from_pretrained(tiny_model("llama"), str(paths[0]), adapter_name="part0")
    for number in (1, 2):
        model.load_adapter(str(paths[number]), adapter_name=f"part{number}")
    model.base_model.add_weighted_adapter(["part0", "part1", "part2"], list(WEIGHTS), "merged", "svd")
    wanted = peft.get_peft_model_state_dict(model, adapter_name="merged")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in (name for name in found if "lora_A" in name):
        up = name.replace("lora_A", "lora_B")
        torch.testing.assert_close(found[up] @ found[name], wanted[up] @ wanted[name], atol=1e-5, rtol=0)


def test_a_seed_says_what_dare_keeps(tmp_path: Path) -> None:
    paths = save_parts(EQUAL[:2], tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert ours(paths, WEIGHTS[:2], {"method": "dare_linear", **DENSE, "seed": seed}, tmp_path / name) == 0
    one, same, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "mean"}, "method is 'mean'; allowed: linear"),
        ({"method": "ties"}, "needs density"),
        ({"method": "ties", "density": 0.0}, "density is 0.0, must be a number above 0"),
        ({"method": "ties", "density": True}, "density is True"),
        ({"method": "ties", "density": 0.5, "majority_sign_method": "most"}, "must be total or frequency"),
        ({"method": "dare_ties", "density": 0.5}, "needs seed"),
        ({"method": "dare_ties", "density": 0.5, "seed": -1}, "seed is -1"),
        ({"method": "linear", "density": 0.5}, "has no density"),
        ({"method": "cat", "svd_rank": 4}, "has no svd_rank"),
        ({"method": "svd", "svd_rank": 0}, "svd_rank is 0"),
        ({"method": "svd", "seed": 0, "density": 1}, "has no density; leave it out; it has no seed"),
    ],
)
def test_options_that_a_method_lacks(options: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError) as raised:
        Method(**options)
    assert words in str(raised.value)


def refused(paths: list[Path], options: dict[str, Any], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert ours(paths, (1.0,) * len(paths), options, out) == 1
    assert not out.exists()
    return capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*the targeted layer of type Linear has no bias", "ignore:Adapter 'default'")
def test_what_pefts_merge_would_lose_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = (
        lora(),
        lora(6),
        lora(lora_bias=True),
        lora(use_dora=True),
        lora(layers_to_transform=[0]),
        lora(alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
        lora(rank_pattern={"v_proj": 2}),
    )
    plain, higher, bias, dora, part, activated, pattern = save_parts(configs, tmp_path)
    out = tmp_path / "out"
    assert "ranks differ" in refused([plain, higher], {"method": "linear"}, out, capsys)
    assert "module 'model.layers.0.self_attn.v_proj': ranks differ here ([4, 2])" in refused(
        [plain, pattern], {"method": "linear"}, out, capsys
    )
    found = refused([plain, bias, dora, part, activated], {"method": "cat"}, out, capsys)
    for words in (f"{bias} has biases", f"{dora} is DORA", "layers_to_transform differs", f"{activated} has alora"):
        assert words in found
    edit_config(plain, exclude_modules=["o_proj"])
    assert "exclude_modules differs" in refused([plain, higher], {"method": "cat"}, out, capsys)
    edit_config(plain, exclude_modules=None)
    assert "svd_rank 99 is above the 64 singular values" in refused(
        [plain, higher], {"method": "svd", "svd_rank": 99}, out, capsys
    )
    edit_config(plain, lora_alpha="much")
    assert "'lora_alpha' is 'much'" in refused([plain, higher], {"method": "cat"}, out, capsys)


def test_arguments_of_the_two_merges_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["a", "b", "c", "out"], "2 adapters need --method"),
        (["--seed", "1", "a", "b", "out"], "--seed: for what merges LoRA adapters"),
        (["--base", "model", "a", "b", "out"], "--base: for what merges LoRA adapters"),
        (["--method", "cat", "--top-k", "1", "a", "b", "out"], "--top-k: for --method arrow"),
        (["--method", "arrow", "--weights", "1,1", "a", "b", "out"], "--weights: for methods other than arrow"),
        (["--method", "cat", "a", "b", "out"], "must be 2 finite numbers"),
        (["--method", "cat", "--weights", "1,nan", "a", "b", "out"], "must be 2 finite numbers"),
        (["--method", "cat", "--weights", "1", "a", "b", "out"], "must be 2 finite numbers"),
        (["--method", "cat", "--weights", "1,1", "a", "b", str(tmp_path / "out")], "the path does not exist"),
    ):
        assert main(["merge", *words]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["merge", "--method", "cat", "--weights", "1,1", "a", "b", str(tmp_path)]) == 1
    assert "exists and is not an empty directory" in capsys.readouterr().err
