"""DLP-LoRA folders: what the classifier keeps is the authors' code's, what is served is their equation in float64."""

import asyncio
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import peft
import pytest
import torch
from dlp_support import TransformerClassifier, classifier_output, word_tokenizer, write_adapters, write_classifier
from engine_support import load, save_peft_adapter
from safetensors.torch import load_file, save_file

from flora_vllm.commands.cli import main
from flora_vllm.errors import AdapterError
from flora_vllm.formats import read_adapter
from flora_vllm.formats.dlp import Chooser, chosen, read_chooser
from flora_vllm.mixing import mixed
from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.shell import Shell
from flora_vllm.ops.terms import group_by_slot
from flora_vllm.ops.torch_linear import TorchLinear
from flora_vllm.plugin.choosers import (
    MOST_CHOOSERS,
    check_room,
    choice_of,
    choosers_of,
    key_of,
    mix_of_choice,
    named,
    prompt_of,
    trials,
    weights_of,
)
from flora_vllm.terms import Cut, fold

torch.set_num_threads(1)

NAMES = ("poems", "law/old", "code")
PROMPTS = ("w1 w2 w3", "w9", "w4 w4 w20 w7 w0", " ".join(f"w{i % 30}" for i in range(50)), "x y w5")
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dlp")
    write_classifier(folder, NAMES)
    write_adapters(tiny_model("llama"), folder, NAMES)
    return folder


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    return to


def theirs(network: TransformerClassifier, prompt: str, top_p: float) -> tuple[list[int], list[float]]:
    tokens = word_tokenizer().encode(prompt).ids[-20:]
    with torch.no_grad():
        out = network(torch.tensor([tokens])).squeeze(0)
    indices, weights = classifier_output(out, top_p)
    return indices.tolist(), weights.tolist()


@pytest.mark.parametrize("mode", ["albert", "roberta"])
@pytest.mark.parametrize("top_p", [0.0, 0.6, 0.9, 1.0])
def test_a_prompt_gets_the_adapters_that_the_authors_code_gives_it(
    folder: Path, tmp_path: Path, mode: str, top_p: float
) -> None:
    copy(folder, tmp_path)
    network = write_classifier(tmp_path, NAMES, mode, top_p=top_p)
    chooser = read_chooser(tmp_path)
    seen = set()
    for prompt in PROMPTS:
        found = chooser.choose(prompt)
        indices, weights = theirs(network, prompt, top_p)
        seen.add(tuple(indices))
        assert [choice.name for choice, _ in found] == [NAMES[i] for i in indices]
        assert [weight for _, weight in found] == pytest.approx(weights, abs=1e-6)
        assert len(found) <= chooser.most
    assert len(seen) > 1


def test_kept_are_those_up_to_the_one_that_crosses_p() -> None:
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log()
    assert [place for place, _ in chosen(logits, 0.4)] == [1]
    assert [place for place, _ in chosen(logits, 0.6)] == [1, 2]
    assert [place for place, _ in chosen(logits, 0.85)] == [1, 2, 0]
    weights = [weight for _, weight in chosen(logits, 0.6)]
    assert weights == pytest.approx(torch.softmax(torch.tensor([0.5, 0.3]), 0).tolist())


@pytest.mark.parametrize(("count", "top_p"), [(3, 0.6), (5, 0.6), (10, 0.3), (100, 0.29), (7, 0.0), (4, 1.0)])
def test_most_is_what_equal_adapters_give(folder: Path, count: int, top_p: float) -> None:
    some = read_chooser(folder)
    chooser = Chooser(some.choices[:1] * count, top_p, some.classifier, "")
    equal = len(chosen(torch.zeros(count), top_p))
    assert equal <= chooser.most <= equal + 1


def test_the_mix_is_the_authors_equation(folder: Path, tiny_model: Callable[[str], Path]) -> None:
    """y = W x + s_first Σ_n w_n B_n A_n x, in float64, from the files; through the mix that the engine is given."""
    base: Any = load(tiny_model("llama")).get_submodule(Q0)
    weight_OI = base.weight.detach()
    outputs, inputs = weight_OI.shape
    x_TI = torch.randn(6, inputs, generator=torch.Generator().manual_seed(3))
    chooser = read_chooser(folder)
    first = json.loads((folder / NAMES[0] / "adapter_config.json").read_text())
    scale = first["lora_alpha"] / first["r"]
    own = [4 / 2, 5 / 4, 6 / 2]
    assert [choice.share for choice in chooser.choices] == pytest.approx([scale / s for s in own])
    sizes = {"q": (outputs,)}
    for prompt in PROMPTS:
        found = chooser.choose(prompt)
        wanted = x_TI.double() @ weight_OI.double().T
        parts = []
        for part, (choice, weight) in zip(mix_of_choice(found).parts, found, strict=True):
            file = load_file(Path(choice.path) / "adapter_model.safetensors")
            down, up = (file[f"base_model.model.{Q0}.lora_{side}.weight"].double() for side in "AB")
            wanted += scale * weight * (x_TI.double() @ down.T @ up.T)
            terms = read_adapter(choice.path).modules[Q0].terms
            cut = Cut(slice(0, outputs), slice(0, inputs), torch.float32, torch.device("cpu"))
            parts.append((part.weight, {"q": (fold(terms, cut),)}))
        shell = Shell(
            TorchLinear(weight_OI, lambda x: x @ weight_OI.T, (outputs,), DispatchRule("auto"), inputs), (outputs,)
        )
        shell.write_slot(1, mixed(parts, sizes)["q"])
        y_TO = shell.forward(x_TI, None, group_by_slot([1] * 6))
        assert float((y_TO.double() - wanted).abs().max()) < 1e-5


def test_trials_hold_each_adapter_and_the_largest_ranks_together(folder: Path) -> None:
    chooser = read_chooser(folder)
    assert chooser.most == 2
    one, two = trials(chooser)
    assert [part.name.partition("@")[0] for part in one.parts] == ["law/old", "poems"]  # ranks 4 and 2
    assert [part.name.partition("@")[0] for part in two.parts] == ["code"]
    assert weights_of(two) == {"code": pytest.approx(2 / 3)}


def test_the_digest_is_of_all_that_has_an_effect(folder: Path, tmp_path: Path) -> None:
    digests = {read_chooser(folder).digest}
    assert read_chooser(copy(folder, tmp_path / "same")).digest in digests
    for number, (file, old, new) in enumerate(
        (("dlp_config.json", "0.6", "0.7"), ("config.json", "gelu_new", "relu"), ("tokenizer.json", '"w1"', '"v1"'))
    ):
        other = copy(folder, tmp_path / str(number))
        text = (other / file).read_text()
        assert old in text
        (other / file).write_text(text.replace(old, new))
        digests.add(read_chooser(other).digest)
    other = copy(folder, tmp_path / "weights")
    tensors = load_file(other / "code" / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, other / "code" / "adapter_model.safetensors")
    digests.add(read_chooser(other).digest)
    assert len(digests) == 5


def edit(folder: Path, file: str, **changes: Any) -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **changes}))


def edit_classifier(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "classifier.safetensors")
    change(tensors)
    save_file(tensors, folder / "classifier.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: edit(f, "dlp_config.json", top_k=1), "it must have adapters, top_p, max_tokens"),
        (lambda f: edit(f, "dlp_config.json", adapters=["poems"]), "Decode.weight has shape (3, 16), must be (1, 16)"),
        (lambda f: edit(f, "dlp_config.json", adapters=["poems", "poems"]), "different folders below this one"),
        (lambda f: edit(f, "dlp_config.json", adapters=["poems", "../x", "code"]), "different folders below this one"),
        (lambda f: edit(f, "dlp_config.json", adapters=[*NAMES, "x"]), "adapter 'x': the path does not exist"),
        (lambda f: edit(f, "dlp_config.json", top_p=1.5), "'top_p' is 1.5, must be a number from 0 to 1"),
        (lambda f: edit(f, "dlp_config.json", max_tokens=0), "'max_tokens' is 0"),
        (lambda f: edit(f, "dlp_config.json", max_tokens=513), "max_tokens is 513; the encoder has 512 positions"),
        (lambda f: (f / "classifier.safetensors").unlink(), "classifier.safetensors: cannot be read"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
        (lambda f: edit(f, "config.json", model_type="bert"), "model_type is 'bert'; allowed: albert, roberta"),
        (lambda f: edit(f, "config.json", num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
        (lambda f: edit(f, "config.json", hidden_act="x"), "transformers builds no albert of it"),
        (lambda f: edit(f, "config.json", hidden_size=10**6, num_attention_heads=1), "must be (1000000, 8)"),
        (lambda f: edit(f, "config.json", num_attention_heads=16, embedding_size="x"), "transformers builds no albert"),
        (lambda f: edit(f, "config.json", vocab_size=20), "word_embeddings.weight has shape (40, 8)"),
        (lambda f: edit_classifier(f, lambda t: t.pop("norm.bias")), "tensors are missing: ['norm.bias']"),
        (lambda f: edit_classifier(f, lambda t: t.update(x=torch.ones(1))), "no place for: ['x']"),
        (lambda f: edit_classifier(f, lambda t: t["norm.bias"].fill_(float("nan"))), "values that are not finite"),
        (lambda f: edit(f / "code", "adapter_config.json", alpha_pattern={"v_proj": 1}), "code': its modules have the"),
        (lambda f: edit(f / "code", "adapter_config.json", peft_type="X"), "adapter 'code': "),
    ],
)
def test_what_is_wrong_with_a_folder(folder: Path, tmp_path: Path, change: Callable[[Path], Any], words: str) -> None:
    change(copy(folder, tmp_path))
    with pytest.raises(AdapterError) as raised:
        read_chooser(tmp_path)
    assert words in str(raised.value)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_an_encoder_brings_no_kernel_of_the_hubs(folder: Path, tmp_path: Path, key: str) -> None:
    copy(folder, tmp_path)
    edit(tmp_path, "config.json", **{key: "someone/attention"})
    chooser = read_chooser(tmp_path)
    assert chooser.classifier._network.model.config._attn_implementation == "sdpa"
    assert chooser.choose(PROMPTS[0])[0][1] == read_chooser(folder).choose(PROMPTS[0])[0][1]


def test_only_plain_loras_are_chosen_among(folder: Path, tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    copy(folder, tmp_path)
    shutil.rmtree(tmp_path / "code")
    config = peft.HiraConfig(r=2, target_modules=["q_proj"])
    save_peft_adapter(tiny_model("llama"), tmp_path / "code", config, 0)
    with pytest.raises(AdapterError, match="adapter 'code': it is HIRA"):
        read_chooser(tmp_path)


def test_nothing_outside_the_root_is_read(folder: Path, tmp_path: Path) -> None:
    inside = copy(folder, tmp_path / "root" / "tasks")
    assert read_chooser(inside, tmp_path / "root").digest == read_chooser(folder).digest
    for name in ("tokenizer.json", "code"):
        outside = tmp_path / f"moved-{name}"
        (inside / name).rename(outside)
        (inside / name).symlink_to(outside)
        read_chooser(inside)
        with pytest.raises(AdapterError, match="leads out of the adapter root"):
            read_chooser(inside, tmp_path / "root")
        (inside / name).unlink()
        outside.rename(inside / name)


def test_the_text_to_choose_by() -> None:
    user, other = {"role": "user", "content": "one"}, {"role": "system", "content": "two"}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}, {"text": "b"}]}
    for given, text in (
        ({"prompt": "x"}, "x"),
        ({"prompt": ["x"]}, "x"),
        ({"input": "x"}, "x"),
        ({"messages": [user, other]}, "one"),
        ({"messages": [user, parts]}, "a\nb"),
        ({"input": [other, user]}, "one"),
    ):
        assert prompt_of(SimpleNamespace(**given)) == text
    for given in ({"prompt": [1, 2]}, {"prompt": ["x", "y"]}, {"prompt": [[1]]}, {"messages": [other]}, {}):
        with pytest.raises(AdapterError, match="give one prompt as text"):
            prompt_of(SimpleNamespace(**given))


def test_what_a_tokenizer_cannot_read_is_refused(folder: Path, tmp_path: Path) -> None:
    """A word that is not in its vocabulary, nor is one for such; and text that is none."""
    copy(folder, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["unk_token"] = "[NONE]"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    chooser = read_chooser(tmp_path)
    assert chooser.choose("w1 w2")
    for prompt in ("w1 unknown", "w1 \ud800"):
        with pytest.raises(AdapterError, match="makes no tokens of the prompt"):
            chooser.choose(prompt)


def test_a_server_keeps_so_many_choosers(folder: Path) -> None:
    models: Any = SimpleNamespace()
    for number in range(MOST_CHOOSERS):
        check_room(models, f"tasks{number}")
        choosers_of(models)[f"tasks{number}@{number:064x}"] = read_chooser(folder)
    check_room(models, "tasks0")  # the one that it replaces goes
    with pytest.raises(AdapterError, match=f"at most {MOST_CHOOSERS}; unload one"):
        check_room(models, "one-more")


def test_prompts_wait_for_each_other_and_hold_up_nothing_else() -> None:
    """However many are read at once, two threads do it, and none of those that loads use."""
    seen, ends = set[str](), threading.Event()

    class Slow:
        def choose(self, _prompt: str) -> list[Any]:
            seen.add(threading.current_thread().name)
            ends.wait(10)
            return []

    async def ask() -> None:
        asked = [asyncio.ensure_future(choice_of(cast("Chooser", Slow()), "p")) for _ in range(64)]
        await asyncio.sleep(0.1)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "a load"), 5) == "a load"
        ends.set()
        await asyncio.gather(*asked)

    asyncio.run(ask())
    assert {name.rpartition("_")[0] for name in seen} == {"flora-choosers"}
    assert len(seen) == 2


def test_a_prompt_without_tokens_is_refused(folder: Path) -> None:
    chooser = read_chooser(folder)
    assert chooser.choose(" ") == chooser.choose("")  # the marks alone are tokens
    text = (folder / "tokenizer.json").read_text()
    bare = json.dumps({**json.loads(text), "post_processor": None})
    try:
        (folder / "tokenizer.json").write_text(bare)
        with pytest.raises(AdapterError, match="no text to choose"):
            read_chooser(folder).choose(" ")
    finally:
        (folder / "tokenizer.json").write_text(text)


def test_a_name_and_its_alias_find_the_chooser(folder: Path) -> None:
    chooser = read_chooser(folder)
    models = SimpleNamespace(
        lora_requests={n: SimpleNamespace(lora_name=f"{n}@{'0' * 64}") for n in ("tasks", "other")},
        _flora_choosers={f"tasks@{'0' * 64}": chooser},
    )
    for model in ("tasks", "dlp:tasks"):
        found = named(models, model)
        assert found is not None
        assert (found.name, found.chooser) == ("tasks", chooser)
    assert [named(models, model) for model in (None, "", "other", "dlp:other", "dlp:")] == [None] * 5
    mix = mix_of_choice([(chooser.choices[0], 0.25)])
    assert key_of("tasks", mix) == "tasks?poems*0.25"


def test_the_authors_files_become_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which then chooses as the one that was written by hand does."""
    encoder, listing, pickled, out = (tmp_path / name for name in ("encoder", "list.txt", "dlp.pth", "out"))
    network = write_classifier(encoder, NAMES, "roberta")
    (encoder / "classifier.safetensors").unlink()
    torch.save({**network.state_dict(), "model.embeddings.position_ids": torch.arange(512)}, pickled)
    listing.write_text("\n".join(str(folder / name) for name in NAMES).replace("/code", "\\code") + "\n")
    arguments = [*map(str, ("--dlp", listing, encoder, pickled, out))]
    assert main(["convert", *arguments, "--max-tokens", "20"]) == 0
    assert "choose among poems, old, code, at most 2 at once" in capsys.readouterr().out
    chooser = read_chooser(out)
    for prompt in PROMPTS:
        indices, weights = theirs(network, prompt, 0.6)
        found = chooser.choose(prompt)
        assert [choice.name for choice, _ in found] == [("poems", "old", "code")[i] for i in indices]
        assert [weight for _, weight in found] == pytest.approx(weights, abs=1e-6)
    for changed, words in (
        (arguments, "is not an empty directory"),
        ([*arguments[:-1], str(tmp_path / "x"), "--max-tokens", "600"], "the encoder has 511 positions"),
        ([*arguments[:-1], str(tmp_path / "x"), "--alpha", "1"], "are for --pickle and --repair"),
        (["--pickle", *arguments[2:], "--top-p", "1"], "are for --dlp"),
        (["--dlp", str(tmp_path / "none"), *arguments[2:-1], str(tmp_path / "x")], "cannot be read"),
    ):
        assert main(["convert", *changed]) == 1
        assert words in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
    listing.write_text(f"{folder / 'code'}\n{tmp_path / 'code'}\n")
    assert main(["convert", *arguments[:-1], str(tmp_path / "x")]) == 1
    assert "no two folders may have one name" in capsys.readouterr().err
