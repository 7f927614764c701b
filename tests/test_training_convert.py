"""Other families as FLoRA: exact where it can be, honest where it can't."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from training_support import sentences, tiny_llama, tiny_tokenizer

from flora_vllm.adapter import Adapter, ModuleTerms
from flora_vllm.commands.cli import main
from flora_vllm.errors import AdapterError
from flora_vllm.formats import read_adapter
from flora_vllm.terms import Added
from flora_vllm.training.convert import input_energy
from flora_vllm.training.fit import fit_lora, fit_product

IDS = torch.arange(2, 16).view(2, 7)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def lora(tmp_path):
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.5)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(sentences(150)))
    return path


def logits(path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(tiny_llama(), path).eval()(IDS).logits


def test_fit_finds_a_product_that_exists_even_where_the_weight_is_zero():
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*s, generator=generator).double() for s in ((20, 16), (3, 16), (20, 3)))
    weight[torch.rand(20, 16, generator=generator) < 0.3] = 0
    weight[4], weight[:, 5] = 0, 0
    target = weight * (b @ a)
    found_a, found_b = fit_product(weight, target, 3, torch.ones(16).double())
    # Alternating least squares converges linearly; from the identity (share of order 1) 60 rounds gain 4 digits.
    assert (weight * (found_b @ found_a) - target).square().sum() < 1e-4 * target.square().sum()
    assert torch.isfinite(found_a).all()
    assert torch.isfinite(found_b).all()


def test_fit_improves_with_rank_and_is_never_worse_than_no_adapter():
    generator = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(*s, generator=generator) for s in ((24, 20), (2, 20), (24, 2)))
    adapter = Adapter("LORA", 2, {"m": ModuleTerms((Added(down, up, scale=0.1),))}, "digest")
    lost = [fit_lora(adapter, {"m": weight}, rank).total_lost for rank in (1, 2, 4, 8, 16, 20)]
    assert lost == sorted(lost, reverse=True)
    assert lost[0] <= 1
    assert lost[-1] < 1e-3


def test_what_is_lost_is_counted_as_the_layer_serves_the_factors():
    generator = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(*s, generator=generator).bfloat16() for s in ((24, 20), (2, 20), (24, 2)))
    adapter = Adapter("LORA", 2, {"m": ModuleTerms((Added(down, up, scale=0.01),))}, "digest")
    fit = fit_lora(adapter, {"m": weight}, 20)
    assert {factor.dtype for factor in fit.factors["m"]} == {torch.bfloat16}
    delta, (a, b) = 0.01 * (up.double() @ down.double()), (factor.double() for factor in fit.factors["m"])
    missed = weight.double() * (b @ a) - weight.double() - delta
    assert fit.total_lost == pytest.approx(float(missed.square().sum() / delta.square().sum()), rel=1e-9)
    assert fit.total_lost > 0.01, "bfloat16 cannot hold more of so small an update"


def test_fit_spends_itself_where_inputs_are_large():
    generator = torch.Generator().manual_seed(0)
    weight, target = (torch.randn(12, 10, generator=generator).double() for _ in range(2))
    energy = torch.ones(10).double()
    energy[:2] = 1e4
    a, b = fit_product(weight, target, 2, energy)
    missed = (weight * (b @ a) - target).square().sum(0)
    assert missed[:2].max() < 0.01 * missed[2:].min()


def test_fit_refuses_other_families_and_too_large_ranks():
    terms = ModuleTerms((Added(torch.ones(1, 4), torch.ones(3, 1)),))
    adapter = Adapter("LORA", 1, {"a": terms, "b": ModuleTerms()}, "digest")
    with pytest.raises(AdapterError, match=r"(?s)2 faults.*b: has other terms.*a: \(3, 4\) is too small for rank 4"):
        fit_lora(adapter, {"a": torch.ones(3, 4), "b": torch.ones(9, 9)}, 4)


def test_input_energy_is_the_mean_square_of_what_the_layer_sees():
    model, seen = tiny_llama(), []
    name = "model.layers.0.mlp.down_proj"
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    model(IDS)
    handle.remove()
    found = input_energy(model, [name], IDS, 1)[name]
    torch.testing.assert_close(found, seen[0].detach().double().square().mean((0, 1)), rtol=1e-5, atol=0)


def test_full_rank_conversion_gives_the_loras_logits(base, lora, text, tmp_path, capsys):
    assert main(["convert", "--from-lora", str(base), str(lora), str(tmp_path / "out"), "--rank", "32"]) == 0
    assert "not measured" in capsys.readouterr().out
    difference = (logits(tmp_path / "out") - logits(lora)).abs().max()
    assert difference < 0.02 * (logits(lora) - tiny_llama()(IDS).logits).abs().max()


def test_large_loss_is_refused_and_distillation_wins_some_back(base, lora, text, tmp_path, capsys):
    words = ["--from-lora", str(base), str(lora), str(tmp_path / "out"), "--rank", "1", "--text", str(text)]
    words += ["--length", "16"]
    assert main(["convert", *words, "--max-lost", "0.1"]) == 1
    captured = capsys.readouterr()
    assert "nothing was written" in captured.err
    assert not (tmp_path / "out").exists()
    assert "perplexity on held-out text: base" in captured.out
    assert main(["convert", *words, "--max-lost", "1", "--distill", "40", "--lr", "0.02"]) == 0
    printed = capsys.readouterr().out
    shares = [float(line.split()[9]) for line in printed.splitlines() if line.startswith("lost share of the LoRA")]
    assert len(shares) == 2
    assert shares[1] < 0.9 * shares[0]
    assert read_adapter(tmp_path / "out").rank == 1


def test_what_is_measured_after_distilling_is_what_is_written(lora, text, tmp_path, monkeypatch):
    tiny_llama().bfloat16().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    measured = []

    def watched(model, blocks, batch):
        measured.append({n: p.clone() for n, p in model.named_parameters() if "flora_" in n})
        return 0.0

    monkeypatch.setattr("flora_vllm.training.loop.held_out_loss", watched)
    words = ["--from-lora", str(tmp_path / "base"), str(lora), str(tmp_path / "out"), "--text", str(text)]
    assert main(["convert", *words, "--length", "16", "--distill", "2", "--max-lost", "9"]) == 0
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    last = {name.replace(".default", ""): factor for name, factor in measured[-1].items()}
    assert last.keys() == written.keys()
    assert all(torch.equal(last[name], tensor.float()) for name, tensor in written.items())


def test_ia3_converts_exactly_or_is_refused(base, tmp_path, capsys):
    torch.manual_seed(4)
    # q_proj has a bias in this model, gate_proj and down_proj have none.
    for name, targets in (("plain", ["gate_proj", "down_proj"]), ("biased", ["q_proj", "down_proj"])):
        config = IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
        model = get_peft_model(tiny_llama(), config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "ia3_" in key:
                    parameter.uniform_(0.5, 1.5)
        model.save_pretrained(tmp_path / name)
    assert main(["convert", "--from-ia3", str(base), str(tmp_path / "plain"), str(tmp_path / "out")]) == 0
    assert read_adapter(tmp_path / "out").family == "FLORA"
    # The same products in another order of rounding, through two layers: a few float32 ulps of logits of order 10.
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "plain"), rtol=1e-4, atol=1e-4)
    assert main(["convert", "--from-ia3", str(base), str(tmp_path / "biased"), str(tmp_path / "refused")]) == 1
    assert "2 faults" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("option", "config"),
    [
        ("--from-ia3", IA3Config(target_modules=["up_proj"], feedforward_modules=[], modules_to_save=["o_proj"])),
        ("--from-lora", LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["o_proj"])),
    ],
)
def test_a_module_saved_whole_is_lost_only_where_it_is_the_bases(option, config, base, tmp_path, capsys):
    words = [option, str(base), str(tmp_path / "whole"), str(tmp_path / "out"), "--max-lost", "9"]
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path / "whole")
    assert main(["convert", *words]) == 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "whole")
    assert main(["convert", *words[:3], str(tmp_path / "refused"), *words[4:]]) == 1
    assert "layers.1.self_attn.o_proj.weight saved whole and not equal to the base" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_mistakes_are_named(base, lora, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["convert", "--from-ia3", str(base), str(lora), out]) == 1
    assert "the adapter is LORA, not IA3" in capsys.readouterr().err
    assert main(["convert", "--from-lora", str(base), str(lora), out, "--distill", "3", "--rank", "0"]) == 1
    message = capsys.readouterr().err
    assert "--rank is 0" in message
    assert "give --text" in message
