"""Families over shared bases and structured matrices, from the files that PEFT saves, against PEFT's own forward."""

from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families_support import ModelProbe, fill_normal, save_filled, worst_errors
from formats_support import (
    edit_config,
    edit_tensors,
    faults_of,
    linear_layout,
    save_peft_adapter,
    the_fault,
    tiny_model,
)
from peft.tuners.lokr.layer import factorization
from safetensors.torch import load_file
from tqdm import tqdm

from flora_vllm.errors import AdapterError
from flora_vllm.formats import read_adapter
from flora_vllm.formats.base_model import base_layout, open_base
from flora_vllm.formats.families.lokr import split
from flora_vllm.formats.families.tinylora import drawn
from flora_vllm.formats.merge import merge_model
from flora_vllm.terms import Cut, fold, merged, resolve
from flora_vllm.terms.shared import held_bytes

torch.set_num_threads(1)

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
CONV1D = ["c_attn", "c_fc", "c_proj"]
UNSAVED = {"save_projection": False}
CPU = torch.device("cpu")


def made(config: type, *targets: str, **changes):
    """Made in the test: some configs warn that they leave something out of the file."""
    return partial(config, target_modules=list(targets or LINEAR), **changes)


def vera(*targets: str, **changes):
    return made(peft.VeraConfig, *targets, r=16, projection_prng_key=11, **changes)


def pvera(*targets: str, **changes):
    return made(peft.PveraConfig, *targets, r=16, projection_prng_key=11, **changes)


def randlora(*targets: str, **changes):
    return made(peft.RandLoraConfig, *targets, **{"r": 10, "projection_prng_key": 11, "randlora_alpha": 2, **changes})


def tinylora(*targets: str, **changes):
    return made(peft.TinyLoraConfig, *targets, **{"r": 3, "u": 8, **changes})


def fourierft(*targets: str, **changes):
    return made(peft.FourierFTConfig, *targets, **{"n_frequency": 50, "scaling": 100.0, **changes})


def waveft(*targets: str, **changes):
    return made(peft.WaveFTConfig, *targets, **{"n_frequency": 200, "scaling": 2.0, **changes})


def lokr(*targets: str, **changes):
    return made(peft.LoKrConfig, *targets, **{"r": 2, "alpha": 5, **changes})


def c3a(*targets: str, block_size: int = 16, **changes):
    return made(peft.C3AConfig, *targets, block_size=block_size, **changes)


def shira(*targets: str, **changes):
    return made(peft.ShiraConfig, *targets, **changes)


def frod(*targets: str, **changes):
    return made(peft.FrodConfig, *targets, progressbar=False, **changes)


def _fill(name: str, parameter: torch.Tensor) -> None:
    if "frod_lambda_l" in name:  # starts as the base's own
        parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    elif "tinylora_v" in name:
        fill_normal(name, parameter, std=1.0)
    else:
        fill_normal(name, parameter, std=3.0 if "fourierft" in name or "c3a" in name else 0.3)


# name -> (architecture, config)
_CASES = {
    "vera": ("llama", vera()),
    "vera-unsaved": ("llama", vera(**UNSAVED)),
    "vera-some": ("qwen2", vera("v_proj", "down_proj", bias="vera_only", **UNSAVED)),
    "vera-fused": ("phi3", vera(*FUSED, **UNSAVED)),
    "vera-conv1d": ("gpt2", vera(*CONV1D, fan_in_fan_out=True, **UNSAVED)),
    "vera-layer": ("llama", vera(layers_to_transform=[1], bias="all", **UNSAVED)),
    "pvera": ("qwen2", pvera()),
    "pvera-conv1d": ("gpt2", pvera(*CONV1D, fan_in_fan_out=True)),
    "pvera-unsaved": ("llama", pvera(**UNSAVED)),
    "randlora": ("llama", randlora()),
    "randlora-unsaved": ("llama", randlora(**UNSAVED)),
    "randlora-sparse": ("qwen2", randlora(sparse=True, bias="randlora_only", **UNSAVED)),
    "randlora-very-sparse": ("qwen2", randlora(very_sparse=True, **UNSAVED)),
    "randlora-conv1d": ("gpt2", randlora(*CONV1D, fan_in_fan_out=True)),
    "randlora-fused": ("phi3", randlora(*FUSED, r=7, **UNSAVED)),
    "tinylora": ("llama", tinylora()),
    "tinylora-unsaved": ("qwen2", tinylora(bias="all", **UNSAVED)),
    "tinylora-tied": ("llama", tinylora(weight_tying=0.5)),
    "tinylora-one-vector": ("qwen2", tinylora(weight_tying=1.0, **UNSAVED)),
    "tinylora-conv1d": ("gpt2", tinylora(*CONV1D, fan_in_fan_out=True)),
    "fourierft": ("llama", fourierft()),
    "fourierft-pattern": ("qwen2", fourierft(n_frequency_pattern={"q_proj": 7}, random_loc_seed=3, bias="all")),
    # PEFT's expression has no group: the first alternative is any path that goes on after it.
    "fourierft-alternatives": ("llama", fourierft(n_frequency_pattern={"q_proj|v_proj": 7})),
    "fourierft-path": ("llama", fourierft(n_frequency_pattern={"model.layers.0.self_attn.q_proj": 7, "q_proj": 9})),
    "fourierft-conv1d": ("gpt2", fourierft(*CONV1D, fan_in_fan_out=True)),
    "fourierft-fused": ("phi3", fourierft(*FUSED, init_weights=True)),
    "waveft": ("llama", waveft()),
    "waveft-db2": ("llama", waveft(wavelet_family="db2")),
    "waveft-sym5": ("qwen2", waveft(wavelet_family="sym5", bias="waveft_only")),
    "waveft-coif3": ("llama", waveft(wavelet_family="coif3")),
    "waveft-db10": ("phi3", waveft(*FUSED, wavelet_family="db10")),
    "waveft-plain": ("qwen2", waveft(use_idwt=False)),
    "waveft-pattern": ("llama", waveft(n_frequency_pattern={"q_proj": 30})),
    "waveft-proportional": ("llama", waveft(proportional_parameters=True)),
    "waveft-conv1d": ("gpt2", waveft(*CONV1D, fan_in_fan_out=True)),
    "lokr": ("llama", lokr()),
    "lokr-whole": ("qwen2", lokr(r=8)),
    "lokr-both": ("llama", lokr(r=1, decompose_both=True, decompose_factor=8)),
    "lokr-both-whole": ("llama", lokr(r=4, decompose_both=True)),
    "lokr-both-left": ("llama", lokr(r=1, decompose_both=True, decompose_factor=32)),
    "lokr-factor": ("llama", lokr(r=3, decompose_factor=4)),
    "lokr-patterns": ("qwen2", lokr(rank_pattern={"q_proj": 1}, alpha_pattern={"down_proj": 3})),
    "lokr-fused": ("phi3", lokr(*FUSED)),
    "c3a": ("llama", c3a()),
    "c3a-bias": ("qwen2", made(peft.C3AConfig, block_size=32, bias="c3a_only")),
    "c3a-fused": ("phi3", c3a(*FUSED)),
    "c3a-pattern": ("llama", made(peft.C3AConfig, block_size=16, block_size_pattern={"q_proj": 32})),
    "shira": ("llama", shira(r=4, random_seed=5)),
    "shira-fused": ("phi3", shira(*FUSED, r=4)),
    "shira-unseeded": ("qwen2", shira(r=4)),
    "supertuning": ("llama", made(peft.SupertuningConfig, sparsity=0.9)),
    "supertuning-lora": ("qwen2", made(peft.SupertuningConfig, sparsity=0.9, r=3, lora_alpha=5)),
    "supertuning-smallest": ("llama", made(peft.SupertuningConfig, sparsity=0.8, select_top=False)),
    "frod": ("llama", frod(sparse_rate=0.05)),
    "frod-conv1d": ("gpt2", frod(*CONV1D, fan_in_fan_out=True)),
    "frod-bias": ("qwen2", frod("q_proj", "down_proj", bias="frod_only")),
}  # fmt: skip
CASES = {name: (*case, _fill) for name, case in _CASES.items()}


pytestmark = [
    # What PEFT leaves out of a file and draws again.
    pytest.mark.filterwarnings("ignore:Specified to not"),
    pytest.mark.filterwarnings("ignore:save_precomputed_indices=False"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
]


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_pefts_forward(case: str, tmp_path: Path, record_property) -> None:
    architecture, config, fill = CASES[case]
    error, effect = worst_errors(config(), tmp_path, architecture, fill)
    record_property("error", error)
    assert effect > 0.01, "the adapter must do something"
    assert error < 1e-4
    assert error < 0.01 * effect


Q0 = "model.layers.0.self_attn.q_proj"
FILE = f"base_model.model.{Q0}"

# name -> (config, changes of the config file, changes of the tensors, what the fault says)
FAULTS = {
    "vera-incomplete": (vera(), {}, {"base_model.vera_A": None}, "tensor 'base_model.vera_A' is missing"),
    "vera-not-saved": (vera(**UNSAVED), {"save_projection": True}, {}, "tensor 'base_model.vera_"),
    "vera-narrow": (vera(), {}, {"base_model.vera_A": torch.ones(16, 48)}, "has 48 features and the layer 64"),
    "vera-key": (vera(), {"projection_prng_key": ...}, {}, "key 'projection_prng_key' is missing"),
    "pvera-sampled": (pvera(), {"sample_at_inference": True}, {}, "'sample_at_inference' is True; allowed: False"),
    "randlora-gamma": (randlora(), {}, {f"{FILE}.randlora_gamma": torch.ones(7, 63)}, "has shape (7, 63)"),
    "tinylora-rank": (tinylora(), {}, {f"{FILE}.tinylora_B": torch.ones(64, 4)}, "'tinylora_A' has rank 3"),
    "waveft-coif5": (waveft(), {"wavelet_family": "coif5"}, {}, "'wavelet_family' is 'coif5'; allowed: db1, db2"),
    "fourierft-scaling": (fourierft(), {"scaling": None}, {}, "'scaling' is None"),
    "lokr-conv": (lokr(), {}, {f"{FILE}.lokr_t2": torch.ones(2, 2, 1, 1)}, "lokr_t2' is not understood"),
    "lokr-size": (lokr(r=8), {}, {f"{FILE}.lokr_w2": torch.ones(4, 8)}, "PEFT reads {'lokr_w1': (8, 8)"),
    "lokr-factors": (lokr(), {}, {f"{FILE}.lokr_w2_b": torch.ones(3, 8)}, "'lokr_w2_b': (2, 8)}"),
    "lokr-both-key": (lokr(), {"decompose_both": 1}, {}, "'decompose_both' is 1; allowed: true or false"),
    "lokr-factor-key": (lokr(), {"decompose_factor": 4.0}, {}, "'decompose_factor' is 4.0; allowed: an integer"),
    "c3a-size": (c3a(), {}, {f"{FILE}.c3a_kernel": torch.ones(4, 3, 16)}, "(64, 48) do"),
    "shira-place": (
        shira(r=1), {}, {f"{FILE}.shira_indices": torch.full((2, 128), 64)}, "in rows 64 to 64 of a layer",
    ),
    "shira-half": (
        shira(r=1), {}, {f"{FILE}.shira_indices": torch.full((2, 128), 0.5)}, "values that are no integers",
    ),
    "frod-unsaved": (
        frod(), {"save_projection": False}, {}, "'save_projection' is False; allowed: True",
    ),
    "fourierft-count": (fourierft(), {}, {f"{FILE}.fourierft_spectrum": torch.ones(49)}, "allow (50)"),
    "fourierft-pattern": (fourierft(), {"n_frequency_pattern": {"q_proj": 7}}, {}, "allow (7)"),
    "waveft-count": (waveft(), {}, {f"{FILE}.waveft_spectrum": torch.ones(201)}, "allow (200)"),
    "supertuning-count": (
        made(peft.SupertuningConfig, sparsity=0.9), {"sparsity": 0.8}, {}, "allow (819)",
    ),
    "frod-sides": (
        frod(), {}, {"base_model.frod_s_size.self_attn_q_proj": torch.zeros(2, dtype=torch.int64)}, "is [0, 0], and",
    ),
    "frod-place": (
        frod(), {}, {"base_model.frod_s_indices.self_attn_q_proj": torch.full((2, 40), 64)}, "has places outside of",
    ),
    "frod-incomplete": (
        frod(), {}, {"base_model.frod_V.self_attn_q_proj": None}, "is missing; the file is incomplete",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_what_cannot_be_served_is_refused(case: str, tmp_path: Path) -> None:
    make, changes, tensors, message = FAULTS[case]
    config = make()
    config.target_modules = {Q0}
    save_peft_adapter(tiny_model("llama"), config, tmp_path)
    layout = linear_layout(tiny_model("llama"))
    read_adapter(tmp_path, layout=layout)
    edit_config(tmp_path, **changes)
    edit_tensors(tmp_path, **tensors)
    assert any(message in fault for fault in faults_of(tmp_path, layout=layout))


def test_a_key_that_does_not_matter_may_be_anything(tmp_path: Path) -> None:
    """OSF's `rank_pattern`: the tensors have the ranks."""
    save_peft_adapter(tiny_model("llama"), made(peft.OSFConfig, Q0, effective_rank=40)(), tmp_path)
    edit_config(tmp_path, rank_pattern="none")
    assert read_adapter(tmp_path, layout=linear_layout(tiny_model("llama"))).modules


def test_structured_matrices_count_their_own_bytes(tmp_path: Path) -> None:
    """FRoD a whole matrix, SHiRA its values with their places, C3A its kernels."""
    layout = linear_layout(tiny_model("llama"))
    for number, (make, size) in enumerate((
        (frod(Q0), 4 * 64 * 64),
        (made(peft.ShiraConfig, Q0, r=4), 12 * 4 * (64 + 64)),
        (made(peft.SupertuningConfig, Q0, sparsity=0.9), 12 * 409),
        (made(peft.C3AConfig, Q0, block_size=16), 4 * 4 * 4 * 16),
    )):  # fmt: skip
        path = tmp_path / str(number)
        save_peft_adapter(tiny_model("llama"), make(), path)
        read_adapter(path, layout=layout, max_dense_bytes=size)
        message = f"its dense matrices take {size} bytes, above the limit of {size - 1}"
        assert message in the_fault(path, layout=layout, max_dense_bytes=size - 1)


def test_supertuning_without_its_places_is_refused_and_what_the_message_advises_is_served(tmp_path: Path) -> None:
    """The places are an order of weights' sizes, which float32 and bfloat16 do not share."""
    make = made(peft.SupertuningConfig, Q0, sparsity=0.9)
    trained = save_filled(tiny_model("llama"), make(save_precomputed_indices=False), tmp_path / "unsaved")
    layout = linear_layout(tiny_model("llama"))
    said = "'save_precomputed_indices' is False; allowed: True, for rounding"
    assert any(said in fault for fault in faults_of(tmp_path / "unsaved", layout=layout))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        again = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "unsaved"), config=make())
    again.save_pretrained(str(tmp_path / "saved"))
    served = tiny_model("llama").bfloat16()
    (terms,) = read_adapter(tmp_path / "saved", layout=layout).modules.values()
    ours, _ = merged(torch.zeros(64, 64), None, resolve(terms.terms, ModelProbe(served, served.state_dict(), Q0)))
    assert torch.equal(ours, trained.get_submodule(f"base_model.model.{Q0}").get_delta_weight("default"))


def drawn_again(model, config, path: Path) -> tuple[torch.nn.Module, dict[str, tuple]]:
    """PEFT's model, and our terms of the folder it saved, by module."""
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = tiny_model("llama").to(model.dtype)
    wrapped = save_filled(model, config, path)
    modules = read_adapter(path, layout=linear_layout(plain)).modules
    return wrapped, {name: resolve(terms.terms, ModelProbe(plain, base, name)) for name, terms in modules.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vera", "pvera", "randlora", "randlora-sparse", "tinylora"])
def test_projections_are_drawn_again_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make = {
        "vera": vera(**UNSAVED),
        "pvera": pvera(**UNSAVED),
        "randlora": randlora(**UNSAVED),
        "randlora-sparse": randlora(sparse=True, **UNSAVED),
        "tinylora": tinylora(**UNSAVED),
    }[name]
    wrapped, terms = drawn_again(tiny_model("llama").to(dtype), make(), tmp_path)
    module = "model.layers.1.mlp.down_proj"
    theirs = wrapped.get_submodule(f"base_model.model.{module}")
    (term,) = terms[module]
    if name == "tinylora":
        number = len(terms) - 1
        assert torch.equal(drawn(3, 8, 42 + number, dtype), theirs.tinylora_P["default"].float())
        return
    kind = name.partition("-")[0]
    down, up = (getattr(theirs, f"{kind}_{side}")["default"].float() for side in "AB")
    if kind == "randlora":
        ours = term.small.tensor, term.large.tensor
        assert torch.equal(ours[0], down[:, 0])
        assert torch.equal(ours[1], up.flatten(1))
    else:
        assert torch.equal(term.down.tensor, down[:16])
        assert torch.equal(term.up.tensor, up)


def test_a_thousand_vera_adapters_add_their_own_vectors_and_one_basis(tmp_path: Path) -> None:
    """Every adapter read from its own file, projections in it; a thousand slots' contents of two files."""
    layout, before = linear_layout(tiny_model("llama")), held_bytes()
    contents = []
    for number in range(2):
        path = tmp_path / str(number)
        save_peft_adapter(tiny_model("llama"), vera()(), path, seed=number)
        modules = read_adapter(path, layout=layout).modules
        shapes = {name: layout.shapes[name] for name in modules}
        for _ in range(500):
            contents += [
                fold(terms.terms, Cut(slice(0, shapes[name][0]), slice(0, shapes[name][1]), torch.float32, CPU))
                for name, terms in modules.items()
            ]
    own = sum(4 * tensor.numel() for part in contents for tensor in part.tensors())
    basis = 4 * 16 * (96 + 96)
    assert held_bytes() - before == basis
    assert own == 4 * 1000 * sum(1 + 16 + out_features for out_features, _ in shapes.values())


def test_a_module_that_the_hugging_face_model_names_otherwise_has_no_number(tmp_path: Path) -> None:
    """Trained without the head, and served with it."""
    model = tiny_model("llama")
    save_peft_adapter(tiny_model("llama"), tinylora(Q0)(), tmp_path)
    terms = read_adapter(tmp_path).modules[Q0].terms
    probe = ModelProbe(model, model.state_dict(), Q0)
    assert len(resolve(terms, probe)) == 1
    probe.module = Q0.removeprefix("model.")
    with pytest.raises(AdapterError, match=r"module 'layers\.0\.self_attn\.q_proj' is not among the 1 that the config"):
        resolve(terms, probe)


@pytest.mark.parametrize("case", ["vera-unsaved", "tinylora-conv1d", "supertuning"])
def test_a_base_in_files_answers_what_a_family_asks(case: str, tmp_path: Path) -> None:
    """The order of its modules, its dtype and its weights, for a merge."""
    architecture, make, fill = CASES[case]
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "base")
    theirs = save_filled(model, make(), tmp_path / "adapter", fill)
    base = open_base(str(tmp_path / "base"))
    adapter = read_adapter(tmp_path / "adapter", layout=base_layout(base))
    merge_model(base, adapter, tmp_path / "merged", tqdm(disable=True))
    ours = type(model).from_pretrained(tmp_path / "merged").eval()
    tokens = torch.randint(0, 80, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert float((ours(tokens).logits - theirs(tokens).logits).abs().max()) < 1e-4


def test_a_share_lora_folder_is_a_lora_folder(tmp_path: Path) -> None:
    """Its A is the same for all layers, and its file has it once for each."""
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"])
    shared = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))

    def fill(name: str, parameter: torch.Tensor) -> None:
        if "lora_A" in name:
            parameter.copy_(shared)
        else:
            fill_normal(name, parameter)

    error, effect = worst_errors(config, tmp_path, "llama", fill)
    assert error < 1e-4
    assert error < 0.01 * effect


def test_lokr_splits_sides_as_peft_does() -> None:
    sizes = [(size, factor) for size in range(1, 200) for factor in range(-2, 40)]
    assert all(split(*pair) == factorization(*pair) for pair in sizes)


LOKR = [
    {"r": rank, "decompose_both": both, "decompose_factor": factor}
    for rank in (1, 2, 8)
    for both in (False, True)
    for factor in (-1, 16)
]


def test_lokr_reads_a_file_as_peft_does_or_refuses_it(tmp_path: Path) -> None:
    """Whatever another config than the file's own says: whole factors where it has two, and the other way round."""
    layout = linear_layout(tiny_model("llama"))
    read = refused = 0
    for number, saved in enumerate(LOKR):
        config = lokr(**saved)()
        config.target_modules = {Q0}
        save_peft_adapter(tiny_model("llama"), config, tmp_path / str(number))
        tensors = load_file(tmp_path / str(number) / "adapter_model.safetensors")
        for claimed in LOKR:
            edit_config(tmp_path / str(number), **claimed)
            config = lokr(**claimed)()
            config.target_modules = {Q0}
            theirs = peft.get_peft_model(tiny_model("llama"), config)
            try:
                result = peft.set_peft_model_state_dict(theirs, tensors)
                complete = not result.unexpected_keys and not any("lokr" in name for name in result.missing_keys)
            except RuntimeError:  # of sizes
                complete = False
            if not complete:
                refused += 1
                for known in (layout, None):
                    assert "PEFT reads" in the_fault(tmp_path / str(number), layout=known)
                continue
            read += 1
            terms = read_adapter(tmp_path / str(number), layout=layout).modules[Q0].terms
            layer: Any = theirs.get_submodule(f"base_model.model.{Q0}")
            wanted = layer.get_delta_weight("default").detach()
            torch.testing.assert_close(merged(torch.zeros(64, 64), None, terms)[0], wanted, atol=1e-5, rtol=1e-5)
    assert (read, refused) == (20, 124), "both happen"
