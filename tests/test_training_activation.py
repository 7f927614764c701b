"""Training FLoRA adapters that begin at their invocation tokens: the base model before, forward, gradient and generate.

The oracle continues the base model's keys and values with the same factors in an ordinary adapter.
"""

from collections.abc import Sequence

import pytest
import torch
from peft import PeftModel, get_peft_model
from training_support import tiny_llama

from flora_vllm.errors import ConfigError
from flora_vllm.formats import read_adapter
from flora_vllm.training import FloraConfig

INVOCATION = [5, 6]
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
# Invoked in the middle, at the start, twice, never, cut off.
EXAMPLES = (
    [1, 2, 3, 4, 5, 6, 7, 8],
    [5, 6, 3, 4, 9, 2, 7, 8],
    [5, 6, 3, 4, 5, 6, 7, 8],
    [1, 2, 3, 4, 9, 2, 7, 8],
    [1, 2, 3, 4, 9, 2, 7, 5],
)
STARTS = (4, 0, 4, 8, 8)


def model_of(**options: object) -> PeftModel:
    torch.manual_seed(3)
    config = FloraConfig(r=2, target_modules=TARGETS, init_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(tiny_llama(), config)


@pytest.fixture
def woken() -> PeftModel:
    return model_of(alora_invocation_tokens=INVOCATION).eval()


@pytest.fixture
def ordinary() -> PeftModel:
    return model_of().eval()


def continued(model: PeftModel, tokens: Sequence[int], start: int) -> torch.Tensor:
    """(tokens, vocabulary) logits: `model`'s base up to `start`, then the model."""
    ids = torch.tensor([list(tokens)])
    parts, cache = [], None
    if start:
        with model.disable_adapter(), torch.no_grad():
            out = model(input_ids=ids[:, :start], use_cache=True)
        parts, cache = [out.logits[0]], out.past_key_values
    if start < len(tokens):
        parts.append(model(input_ids=ids[:, start:], past_key_values=cache).logits[0])
    return torch.cat(parts)


def test_forward_of_a_batch(woken, ordinary):
    logits = woken(input_ids=torch.tensor(EXAMPLES)).logits
    for row, (tokens, start) in enumerate(zip(EXAMPLES, STARTS, strict=True)):
        torch.testing.assert_close(logits[row], continued(ordinary, tokens, start), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients(dropout, ordinary):
    woken = model_of(alora_invocation_tokens=INVOCATION, flora_dropout=dropout)
    woken.train(dropout > 0)
    wanted = dict(ordinary.named_parameters())
    woken(input_ids=torch.tensor(EXAMPLES)).logits.square().mean().backward()
    if not dropout:
        all_logits = torch.stack([continued(ordinary, t, s) for t, s in zip(EXAMPLES, STARTS, strict=True)])
        all_logits.square().mean().backward()
    for name, parameter in woken.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            if not dropout:
                torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-6, rtol=1e-4)


def test_a_batch_without_the_tokens_has_a_gradient_of_zero():
    woken = model_of(alora_invocation_tokens=INVOCATION).train()
    woken(input_ids=torch.tensor(EXAMPLES[3:4])).logits.sum().backward()
    assert all(not p.grad.any() for p in woken.parameters() if p.requires_grad)


def test_generate_keeps_the_prompts_decision(woken, ordinary):
    for tokens, start in zip(EXAMPLES, STARTS, strict=True):
        out = woken.generate(input_ids=torch.tensor([tokens]), max_new_tokens=5, min_new_tokens=5, do_sample=False)[0]
        logits = continued(ordinary, out.tolist(), start if start < len(tokens) else len(out)).detach()
        logits[:, 0] = -torch.inf  # the end of the text, which `min_new_tokens` keeps away
        assert out[len(tokens) :].tolist() == logits[len(tokens) - 1 : -1].argmax(-1).tolist()


def test_mixed_batch(woken):
    woken.add_adapter("always", FloraConfig(r=2, target_modules=TARGETS, init_weights=False))
    ids = torch.tensor([EXAMPLES[0]] * 3)
    logits = woken(input_ids=ids, adapter_names=["default", "always", "__base__"]).logits
    torch.testing.assert_close(logits[0], woken(input_ids=ids).logits[0], atol=1e-5, rtol=1e-5)
    woken.set_adapter("always")
    torch.testing.assert_close(logits[1], woken(input_ids=ids).logits[1], atol=1e-5, rtol=1e-5)
    with woken.disable_adapter():
        torch.testing.assert_close(logits[2], woken(input_ids=ids).logits[2], atol=1e-5, rtol=1e-5)


def test_what_is_saved_is_what_the_server_reads(woken, tmp_path):
    woken.save_pretrained(str(tmp_path))
    assert read_adapter(tmp_path).invocation_tokens == tuple(INVOCATION)


def test_what_it_cannot_do_is_refused(woken):
    ids = torch.tensor(EXAMPLES)
    with pytest.raises(ConfigError, match="which no weight can say"):
        woken.merge_adapter()
    with pytest.raises(ConfigError, match="num_beams=1"):
        woken.generate(input_ids=ids, num_beams=2, max_new_tokens=2)
    with pytest.raises(ConfigError, match="called with `input_ids`"):
        woken.get_base_model()(input_ids=ids)
    woken.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        woken.train()(input_ids=ids)
    with pytest.raises(ConfigError, match=r"alora_invocation_tokens=.*token ids"):
        FloraConfig(target_modules=["q_proj"], alora_invocation_tokens=["a"])
