"""Tiny random checkpoints, made in a second and read by transformers, PEFT and vLLM alike.

Two layers, width 128, four heads of 32 (vLLM's CPU attention takes no smaller head), feed-forward width 192 so that no
layer but o_proj is square and no two axes can be mixed up, 512 tokens. Float32, seeded. Weights keep the variance of
what flows through them and biases are not zero, so that every layer matters: logits have a standard deviation of
about LOGIT_STD, greedy text is no constant, and dropping any one layer's bias or factor shows.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

LAYERS, WIDTH, HEADS, KV_HEADS, FEED_FORWARD, VOCABULARY, POSITIONS = 2, 128, 4, 2, 192, 512, 4096
LOGIT_STD = 3.0
ATTENDS = ("q_proj", "k_proj", "qkv_proj", "c_attn")
ADDS_TO_RESIDUAL = ("o_proj", "down_proj", "c_proj", "out_proj", "fc2")
SPECIAL = ("<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
UNKNOWN, BEGIN, END = range(3)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WHISPER_SPECIAL = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    *("<|en|>", "<|fr|>", "<|it|>", "<|ru|>", "<|es|>"),
    *("<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
)
IMAGE_SIDE = 32
WHISPER_CHUNK_S = 2  # instead of Whisper's 30: 100 encoder positions instead of 1,500


def tiny_llama(directory: Path, seed: int = 0) -> Path:
    """Llama: separate q, k, v, gate, up; no biases."""
    return _save(LlamaForCausalLM(LlamaConfig(**_decoder_settings())), directory, seed)


def tiny_qwen2(directory: Path, seed: int = 0) -> Path:
    """Qwen2: as Llama, with biases on q, k and v."""
    return _save(Qwen2ForCausalLM(Qwen2Config(**_decoder_settings())), directory, seed)


def tiny_classifier(directory: Path, seed: int = 0) -> Path:
    """A Qwen2 with a head of three labels."""
    config = Qwen2Config(**_decoder_settings(), num_labels=3, pad_token_id=UNKNOWN)
    return _save(Qwen2ForSequenceClassification(config), directory, seed)


def tiny_embedder(directory: Path, seed: int = 0) -> Path:
    """A Qwen2 without a head, as embedding models are saved: `layers.0...` without `model.`."""
    return _save(Qwen2Model(Qwen2Config(**_decoder_settings())), directory, seed)


def tiny_idefics3(directory: Path, seed: int = 0) -> Path:
    """Idefics3: a tower of two layers, a projection, a Llama; an image is tiles of IMAGE_SIDE pixels, 4 tokens each."""
    tokenizer = tiny_tokenizer()
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * IMAGE_SIDE}, max_image_size={"longest_edge": IMAGE_SIDE}, do_image_splitting=True
        ),
        tokenizer,
        image_seq_len=4,
    )
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": IMAGE_SIDE,
        "patch_size": IMAGE_SIDE // 4,
    }
    config = Idefics3Config(
        vision_config=vision,
        text_config={**_decoder_settings(), "model_type": "llama", "vocab_size": len(tokenizer)},
        image_token_id=processor.image_token_id,
        scale_factor=2,
        pad_token_id=UNKNOWN,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    _write(Idefics3ForConditionalGeneration(config), directory, seed)
    processor.save_pretrained(directory)
    return directory


def tiny_phi3(directory: Path, seed: int = 0) -> Path:
    """Phi-3: qkv_proj and gate_up_proj are one tensor each in the checkpoint."""
    settings = {**_decoder_settings(), "original_max_position_embeddings": POSITIONS, "pad_token_id": UNKNOWN}
    return _save(Phi3ForCausalLM(Phi3Config(**settings)), directory, seed)


def tiny_gptbigcode(directory: Path, seed: int = 0) -> Path:
    """StarCoder's architecture: one key and value head for all queries (c_attn is 128 -> 192), biases everywhere."""
    config = GPTBigCodeConfig(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=FEED_FORWARD,
        multi_query=True,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    return _save(GPTBigCodeForCausalLM(config), directory, seed)


def tiny_nemotron_h(directory: Path, seed: int = 0) -> Path:
    """Nemotron-H: Mamba, attention and dense layers without a gate; no experts."""
    kinds = ["linear_attention", "mlp", "full_attention", "mlp"]
    mamba = {"mamba_num_heads": HEADS, "mamba_head_dim": WIDTH // HEADS, "n_groups": 2, "ssm_state_size": 16}
    settings = {**_decoder_settings(), "head_dim": WIDTH // HEADS, "pad_token_id": UNKNOWN, "num_hidden_layers": 4}
    config = NemotronHConfig(**settings, **mamba, layers_block_type=kinds, chunk_size=16)
    return _save(NemotronHForCausalLM(config), directory, seed)


def tiny_whisper(directory: Path, seed: int = 0) -> Path:
    """Whisper: encoder-decoder over chunks of WHISPER_CHUNK_S seconds, with its processor."""
    special = {token: len(_byte_vocabulary()) + i for i, token in enumerate(WHISPER_SPECIAL)}
    end = special["<|endoftext|>"]
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FEED_FORWARD,
        decoder_ffn_dim=FEED_FORWARD,
        max_source_positions=50 * WHISPER_CHUNK_S,
        max_target_positions=448,
        decoder_start_token_id=special["<|startoftranscript|>"],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    model = WhisperForConditionalGeneration(config)
    languages = {token: i for token, i in special.items() if len(token) == len("<|en|>")}
    model.generation_config = GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id,
        eos_token_id=end,
        pad_token_id=end,
        is_multilingual=True,
        lang_to_id=languages,
        task_to_id={task: special[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=special["<|notimestamps|>"],
        return_timestamps=False,
        max_length=config.max_target_positions,
    )
    _write(model, directory, seed)
    tokenizer = WhisperTokenizer(
        vocab={**_byte_vocabulary(), **special, **_filler(len(_byte_vocabulary()) + len(special))},
        merges=[],
        additional_special_tokens=list(WHISPER_SPECIAL[1:]),
    )
    tokenizer.save_pretrained(directory)
    WhisperFeatureExtractor(chunk_length=WHISPER_CHUNK_S).save_pretrained(directory)
    return directory


TINY_MODELS: dict[str, Callable[..., Path]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "phi3": tiny_phi3,
    "gptbigcode": tiny_gptbigcode,
    "classifier": tiny_classifier,
    "embedder": tiny_embedder,
}


def _decoder_settings() -> dict[str, int | bool]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "tie_word_embeddings": False,
    }


def _save(model: PreTrainedModel, directory: Path, seed: int) -> Path:
    _write(model, directory, seed)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def _write(model: PreTrainedModel, directory: Path, seed: int) -> None:
    randomise(model, seed)
    model.save_pretrained(directory)


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> None:
    """Give every parameter a value by its place; the same for the same seed whatever ran before."""
    generator = torch.Generator().manual_seed(seed)
    output = model.get_output_embeddings()
    head = None if output is None else output.weight
    is_tied = head is model.get_input_embeddings().weight
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name or ".ln_" in name
        if parameter is head:
            # The last norm's output has variance 1.
            parameter.copy_(noise * LOGIT_STD / parameter.shape[1] ** 0.5)
        elif is_norm and name.endswith("weight"):
            parameter.copy_(1 + 0.1 * noise)
        elif is_norm:
            parameter.copy_(0.1 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.3 * noise)
        elif "wpe" in name or "position" in name:
            # A place must not say more than the token there.
            parameter.copy_(0.3 * noise)
        elif "embed" in name or "wte" in name:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(_gain(name.split(".")[-2], is_tied) * noise / parameter[0].numel() ** 0.5)


def _gain(layer: str, is_tied: bool) -> float:
    if layer in ATTENDS:
        return 2.0  # sharper attention: with the mean of all places every text ends in one token
    # What layers add to the residual stream must outweigh a tied embedding, or the model repeats its input.
    return 3.0 if is_tied and layer in ADDS_TO_RESIDUAL else 1.0


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte after the special ones, filled up to VOCABULARY with tokens that are only ever decoded."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    vocabulary |= {token: len(SPECIAL) + i for token, i in _byte_vocabulary().items()}
    vocabulary |= _filler(len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL[UNKNOWN]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL[UNKNOWN],
        bos_token=SPECIAL[BEGIN],
        eos_token=SPECIAL[END],
        pad_token=SPECIAL[UNKNOWN],
        additional_special_tokens=list(SPECIAL[3:]),
        model_max_length=POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


def _byte_vocabulary() -> dict[str, int]:
    return {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def _filler(start: int) -> dict[str, int]:
    return {f"Ġw{i}": i for i in range(start, VOCABULARY)}
