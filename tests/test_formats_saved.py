"""What a file holds in the base's place: which tensors are read so, and what is refused before a model is asked."""

from pathlib import Path

import peft
import pytest
import torch
from formats_support import edit_config, edit_tensors, the_fault, tiny_model
from safetensors.torch import load_file, save_file

from flora_vllm.adapter import ModelLayout
from flora_vllm.formats import examine
from flora_vllm.formats.names import saved_part
from flora_vllm.terms import Replaced

ROOT = "base_model.model."
ROWS = f"{ROOT}model.embed_tokens.token_adapter.trainable_tokens_delta"
Q0, NORM, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.norm", "model.embed_tokens"
WIDTH = 64  # of the tiny model
LORA = {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [0]}


def layout(tokens: int = 80, *, tied: bool = False) -> ModelLayout:
    shapes = {Q0: (WIDTH, WIDTH), NORM: (WIDTH, WIDTH), EMBEDDING: (tokens, WIDTH), "lm_head": (tokens, WIDTH)}
    return ModelLayout(
        shapes,
        embeddings=frozenset({EMBEDDING}),
        norms=frozenset({NORM}),
        tied={EMBEDDING: "lm_head"} if tied else {},
    )


def saved(path: Path, config: peft.PeftConfig) -> Path:
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(str(path))
    return path


def renamed(path: Path, old: str, new: str) -> None:
    file = path / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("name", "kept", "within", "wanted"),
    [
        ("lm_head.weight", (), False, ("lm_head", "weight")),
        ("lm_head.bias", (), False, None),
        ("lm_head.bias", ("lm_head",), False, ("lm_head", "bias")),
        ("model.embed_tokens.base_layer.weight", (), False, ("model.embed_tokens.base_layer", "weight")),
        ("score.modules_to_save.default.weight", ("score",), False, ("score", "weight")),
        ("score.weight", (), False, None),
        ("model.layers.0.mlp.up_proj.weight", ("mlp",), False, None),
        ("model.layers.0.mlp.up_proj.weight", ("mlp",), True, ("model.layers.0.mlp.up_proj", "weight")),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", ("q_proj",), False, None),
    ],
)
def test_names_of_what_is_held_whole(
    name: str, kept: tuple[str, ...], within: bool, wanted: tuple[str, str] | None
) -> None:
    assert saved_part(ROOT + name, kept, within=within) == wanted


def test_an_adapters_own_tensors_are_never_taken_for_a_module(tmp_path: Path) -> None:
    """PEFT matches any ending, so that `proj` names every projection, with the factors in them."""
    path = saved(tmp_path / "a", peft.LoraConfig(**LORA))
    edit_config(path, modules_to_save=["proj", "lora_A", "norm"])
    edit_tensors(path, **{f"{ROOT}{NORM}.weight": torch.ones(WIDTH)})
    found = examine(path, layout=layout())
    assert not found.faults
    assert found.adapter is not None
    assert set(found.adapter.modules) == {Q0}
    assert set(found.adapter.saved) == {f"{NORM}.weight"}


def test_rows_of_tokens_are_of_both_ends_of_a_tied_model_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", peft.LoraConfig(**LORA, trainable_token_indices=[3, 1, 9]))
    for tied, modules in ((False, {Q0, EMBEDDING}), (True, {Q0, EMBEDDING, "lm_head"})):
        adapter = examine(path, layout=layout(tied=tied)).adapter
        assert adapter is not None
        assert set(adapter.modules) == modules
        (term,) = adapter.modules[EMBEDDING].of(Replaced)
        assert term.rows is not None
        assert term.rows.tolist() == [3, 1, 9]


# PEFT warns where the key does nothing, and where it wants it.
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`", "ignore:ensure_weight_tying=True but")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [None, [3, 1, 9]])
def test_weight_tying_that_changes_nothing_is_read(rows: list[int] | None, tied: bool, tmp_path: Path) -> None:
    """Of linear layers, and of rows that a tied model has twice with it and without."""
    config = peft.LoraConfig(**LORA, trainable_token_indices=rows, ensure_weight_tying=True, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("qwen2", tie_word_embeddings=tied), config)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += 1
    model.save_pretrained(tmp_path)
    tokens, read, said = torch.arange(12)[None], [], []
    for value in (True, False):
        edit_config(tmp_path, ensure_weight_tying=value)
        read.append(examine(tmp_path, layout=layout(tied=tied)))
        plain = tiny_model("qwen2", tie_word_embeddings=tied)
        said.append(peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()(tokens).logits)
    assert torch.equal(*said)
    assert not read[0].faults
    assert {*read[0].adapter.modules} == {*read[1].adapter.modules}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:ensure_weight_tying=True but")
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
@pytest.mark.parametrize(
    "trained",
    [{"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["lm_head"]}],
    ids=["target", "saved"],
)
def test_weight_tying_is_refused_where_it_ties(trained: dict, tmp_path: Path) -> None:
    config = peft.LoraConfig(**{**LORA, "layers_to_transform": None, **trained}, ensure_weight_tying=True)
    path = saved(tmp_path, config)  # on a model that ties nothing
    message = f"'ensure_weight_tying' is True and '{next(iter(trained))}' names an embedding or an output layer"
    for place in (None, layout(tied=True)):
        assert message in "\n".join(examine(path, layout=place).faults)
    assert not any("tying" in fault for fault in examine(path, layout=layout()).faults)


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", peft.LoraConfig(**LORA, trainable_token_indices=[3, 1, 9]))
    assert "token 9 of module 'model.embed_tokens' is beyond" in the_fault(path, layout=layout(tokens=9))
    edit_config(path, trainable_token_indices=[3, 1])
    assert "has shape (3, 64)" in the_fault(path, layout=layout())
    edit_config(path, trainable_token_indices={"lm_head": [1, 2, 3]})
    assert "names 0 times which" in "\n".join(examine(path, layout=layout()).faults)
    edit_config(path, trainable_token_indices={"embed_tokens": [1, 2, 3], "lm_head": [1, 2, 3]})
    assert "tokens of 'lm_head' whose rows are not in the file" in the_fault(path, layout=layout())
    assert not examine(path, layout=layout(tied=True)).faults


def test_rows_of_tokens_alone_fit_the_base_and_its_tied_output_layer(tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(token_indices=[3, 1, 9], target_modules=["embed_tokens"])
    path = saved(tmp_path / "a", config)
    for tied, modules in ((False, {EMBEDDING}), (True, {EMBEDDING, "lm_head"})):
        adapter = examine(path, layout=layout(tied=tied)).adapter
        assert adapter is not None
        assert set(adapter.modules) == modules
    assert "token 9 of token_indices is beyond the base model's 9 tokens" in the_fault(path, layout=layout(tokens=9))
    edit_config(path, token_indices=[3, 1, 1 << 70])
    assert "'token_indices' is" in the_fault(path, layout=layout())


def test_a_module_saved_whole_in_numbers_that_are_not_read_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", peft.LoraConfig(**LORA))
    edit_tensors(path, **{f"{ROOT}lm_head.weight": torch.ones(80, WIDTH).to(torch.float8_e4m3fn)})
    assert "lm_head.weight' has dtype F8_E4M3; allowed" in the_fault(path, layout=layout())


def test_a_module_that_the_config_says_is_saved_is_in_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", peft.LoraConfig(**LORA))
    # PEFT names a classifier's head by itself, and its other name, too.
    edit_config(path, modules_to_save=["classifier", "score"])
    assert not examine(path, layout=layout()).faults
    for name in ("lm_head", "norm"):
        edit_config(path, modules_to_save=[name])
        assert f"modules_to_save names ['{name}'], of which the file has no tensor" in the_fault(path, layout=layout())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_module_that_is_saved_whole_is_not_adapted(tmp_path: Path) -> None:
    """As PEFT has it, whatever target_modules says; what lies in such a module is not adapted either."""
    path = saved(tmp_path / "a", peft.LoraConfig(target_modules=[Q0, "lm_head"], modules_to_save=["lm_head"]))
    found = examine(path, layout=layout())
    assert not found.faults
    assert found.adapter is not None
    assert set(found.adapter.modules) == {Q0}
    assert set(found.adapter.saved) == {"lm_head.weight"}
    edit_config(path, modules_to_save=["lm_head", "self_attn"])
    assert f"module '{Q0}' has tensors but the config does not select it" in the_fault(path, layout=layout())


def test_rows_that_act_on_every_token_are_none_of_an_adapter_that_does_not(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", peft.LoraConfig(**LORA, trainable_token_indices=[3, 1, 9]))
    edit_config(path, alora_invocation_tokens=[5])
    assert "'model.embed_tokens' has a weight or bias in the base's place: with alora_inv" in the_fault(
        path, layout=layout()
    )


# PEFT does not know the sizes of every model's norms, and says so.
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_norms_are_ln_tunings_and_nothing_else_is(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", peft.LNTuningConfig(target_modules=["norm"]))
    assert not examine(path, layout=layout()).faults
    renamed(path, NORM, Q0)
    edit_config(path, target_modules=["q_proj"])
    assert "is no norm, and LN tuning is for these" in the_fault(path, layout=layout())
    lora = saved(tmp_path / "b", peft.LoraConfig(**LORA))
    renamed(lora, Q0, NORM)
    edit_config(lora, target_modules=["norm"], layers_to_transform=None)
    assert "is a norm, which LN tuning alone adapts" in the_fault(lora, layout=layout())
