"""The tiny models are what the tests that use them take for granted."""

import pytest
import torch
from tiny_models import FEED_FORWARD, TINY_MODELS, VOCABULARY, WIDTH, tiny_llama, tiny_whisper
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperForConditionalGeneration, WhisperProcessor

PROMPTS = ("hello world", "The quick brown fox", "1234")


@pytest.mark.parametrize("kind", [kind for kind in TINY_MODELS if kind not in ("classifier", "embedder")])
class TestDecoders:
    def test_text_is_no_constant_and_decided_beyond_rounding(self, tiny_model, kind):
        model = AutoModelForCausalLM.from_pretrained(tiny_model(kind))
        tokenizer = AutoTokenizer.from_pretrained(tiny_model(kind))
        texts = set()
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt")
            out = model.generate(
                **inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            best = torch.stack(out.logits)[:, 0].topk(2).values
            # Two correct float32 implementations of these models differ by less than 1e-4.
            assert (best[:, 0] - best[:, 1]).min() > 1e-3
            new = out.sequences[0, inputs.input_ids.shape[1] :].tolist()
            assert len(set(new)) >= 3
            texts.add(tuple(new))
        assert len(texts) == len(PROMPTS)

    def test_every_parameter_is_float32_and_none_is_trivial(self, tiny_model, kind):
        model = AutoModelForCausalLM.from_pretrained(tiny_model(kind))
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32, name
            assert parameter.std() > 0.02, name

    def test_tokenizer_round_trips_and_covers_the_vocabulary(self, tiny_model, kind):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model(kind))
        assert len(tokenizer) == VOCABULARY
        assert tokenizer.decode(tokenizer("héllo, wörld\n").input_ids) == "héllo, wörld\n"
        assert tokenizer.decode([VOCABULARY - 1]) == f" w{VOCABULARY - 1}"
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
        )
        assert chat == "<s><|user|>hi</s><|assistant|>"


def test_layers_are_what_the_names_promise(tiny_model):
    shapes = {
        kind: {n: tuple(p.shape) for n, p in AutoModelForCausalLM.from_pretrained(tiny_model(kind)).named_parameters()}
        for kind in TINY_MODELS
    }
    assert shapes["llama"]["model.layers.1.mlp.down_proj.weight"] == (WIDTH, FEED_FORWARD)
    assert shapes["qwen2"]["model.layers.0.self_attn.k_proj.bias"] == (64,)
    assert shapes["phi3"]["model.layers.0.self_attn.qkv_proj.weight"] == (256, WIDTH)
    assert shapes["phi3"]["model.layers.0.mlp.gate_up_proj.weight"] == (2 * FEED_FORWARD, WIDTH)
    assert shapes["gptbigcode"]["transformer.h.0.attn.c_attn.weight"] == (WIDTH + 64, WIDTH)


def test_same_seed_same_weights_other_seed_others(tmp_path):
    torch.manual_seed(5)
    one, same, other = tiny_llama(tmp_path / "a"), tiny_llama(tmp_path / "b"), tiny_llama(tmp_path / "c", seed=1)
    weights = [(path / "model.safetensors").read_bytes() for path in (one, same, other)]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.filterwarnings("ignore")  # transformers warns about its own Whisper generation
def test_whisper_hears_the_difference(tmp_path):
    directory = tiny_whisper(tmp_path)
    model = WhisperForConditionalGeneration.from_pretrained(directory)
    processor = WhisperProcessor.from_pretrained(directory)
    time_s = torch.arange(32_000) / 16_000
    heard = []
    for hertz in (300, 2000):
        audio = torch.sin(2 * torch.pi * hertz * time_s).numpy()
        features = processor(audio, sampling_rate=16_000, return_tensors="pt").input_features
        out = model.generate(features, language="fr", task="transcribe", max_new_tokens=8, output_logits=True,
                             return_dict_in_generate=True)  # fmt: skip
        heard.append(out.logits[0])
    assert (heard[0] - heard[1]).abs().max() > 0.1
