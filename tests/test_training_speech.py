"""`flora-vllm train` on recordings: what a Whisper is taught, what is left, and what is said to bad manifests."""

import json
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import WHISPER_CHUNK_S, tiny_whisper
from training_support import interrupted_at_step, tiny_llama, tiny_tokenizer
from transformers import WhisperForConditionalGeneration

from flora_vllm.commands.cli import main
from flora_vllm.errors import ConfigError
from flora_vllm.formats import read_adapter
from flora_vllm.training.audio import SAMPLE_RATE, load_audio
from flora_vllm.training.data import IGNORED
from flora_vllm.training.loop import cross_entropy, held_out_loss
from flora_vllm.training.speech import Clip, Clips, load_speech_base, read_clips, split_clips

WORDS = ("yes", "no", "one two three", "press the pound key")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def base(whisper):
    return load_speech_base(str(whisper))


def tone(hertz: float, seconds: float, rate: int) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def write_wav(path: Path, samples: np.ndarray, rate: int, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(samples * 32767, channels).astype("<i2").tobytes())
    return path


def write_manifest(folder: Path, count: int = 12, language: str | None = "en") -> Path:
    """Clips whose words follow from their pitch, at three sample rates, in one and two channels."""
    lines = []
    for i in range(count):
        words = WORDS[i % len(WORDS)]
        rate = (8_000, 16_000, 44_100)[i % 3]
        write_wav(folder / f"{i}.wav", tone(300 * (1 + i % len(WORDS)), 0.5 + 0.05 * i, rate), rate, 1 + i % 2)
        lines.append({"audio": f"{i}.wav", "text": words} | ({"language": language} if language else {}))
    return write_lines(folder / "clips.jsonl", lines)


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(base, data, out, *options: str) -> int:
    return main(["train", str(base), str(data), str(out), "--batch", "3", *options])


@pytest.mark.parametrize("method", ["flora", "lora", "ia3"])
def test_trains_every_fully_connected_layer_and_peft_loads_it(method, whisper, tmp_path, capsys):
    manifest = write_manifest(tmp_path)
    assert command(whisper, manifest, tmp_path / "out", "--method", method, "--steps", "20", "--held-out", "0.25") == 0
    adapter = read_adapter(tmp_path / "out")
    assert adapter.family == method.upper()
    linears = {
        name
        for name, module in WhisperForConditionalGeneration.from_pretrained(whisper).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "proj_out"
    }
    assert set(adapter.modules) == linears
    rows = [json.loads(line) for line in (tmp_path / "out.training" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["held_out_adapter"] < rows[-1]["held_out_base"]
    assert f"vllm serve {whisper} --enable-flora --lora-modules out={tmp_path / 'out'}" in capsys.readouterr().out

    fresh = load_speech_base(str(whisper))
    split = split_clips(read_clips(manifest, fresh, 256), fresh, 0.25, 0, "here")
    loaded = PeftModel.from_pretrained(fresh.model, tmp_path / "out")
    assert held_out_loss(loaded, split.held_out, 3) == pytest.approx(rows[-1]["held_out_adapter"], abs=1e-5)


def test_interrupted_run_goes_on_to_the_same_end(whisper, tmp_path):
    manifest, options = write_manifest(tmp_path), ["--steps", "6", "--rank", "2"]
    assert command(whisper, manifest, tmp_path / "whole", *options) == 0
    with interrupted_at_step(3):
        assert command(whisper, manifest, tmp_path / "parts", *options) == 130
    assert command(whisper, manifest, tmp_path / "parts", *options) == 0
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_only_the_transcript_and_its_end_are_learnt(base, tmp_path):
    clips = read_clips(write_manifest(tmp_path, count=4), base, 256)
    batch = Clips(base, clips)[[0, 3]]
    tokenizer = base.tokenizer
    for row, clip in enumerate((clips[0], clips[3])):
        wanted = batch.labels[row][batch.labels[row] != IGNORED].tolist()
        assert tokenizer.decode(wanted[:-1]) == f" {clip.text}"
        assert wanted[-1] == tokenizer.eos_token_id
        told = batch.inputs["decoder_input_ids"][row].tolist()
        start = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
        assert tokenizer.convert_ids_to_tokens(told[:4]) == start
        assert batch.labels[row, :3].tolist() == [IGNORED] * 3
        # What is wanted at a place is what is told at the next.
        assert told[4 : 3 + len(wanted)] == wanted[:-1]


def test_loss_is_that_of_whisper_itself(base, tmp_path):
    """transformers shifts labels itself and starts them with the start token: its loss of the same transcript."""
    batch = Clips(base, read_clips(write_manifest(tmp_path, count=4), base, 256))[[3]]
    labels = batch.labels.clone()
    with torch.no_grad():
        ours = cross_entropy(base.model(**batch.inputs).logits, batch.labels)
        labels[:, :3] = batch.inputs["decoder_input_ids"][:, 1:4]
        logits = base.model(input_features=batch.inputs["input_features"], labels=labels).logits
    logprobs = logits.double().log_softmax(-1)[0, 3:]
    expected = -logprobs.gather(-1, labels[0, 3:, None]).mean()
    assert float(ours) == pytest.approx(float(expected), abs=1e-5)


def test_a_clip_has_the_same_loss_alone_and_padded_in_a_batch(base, tmp_path):
    clips = Clips(base, read_clips(write_manifest(tmp_path, count=4), base, 256))
    with torch.no_grad():
        both, alone = clips[[0, 3]], clips[[0]]
        assert both.labels.shape[1] > alone.labels.shape[1]
        together = cross_entropy(base.model(**both.inputs).logits[:1], both.labels[:1])
        assert float(together) == pytest.approx(float(cross_entropy(base.model(**alone.inputs).logits, alone.labels)))


def test_a_line_without_a_language_gets_the_one_the_model_hears(base, tmp_path):
    clips = read_clips(write_manifest(tmp_path, language=None), base, 256)
    heard = [
        base.model.detect_language(input_features=Clips(base, [clip])[[0]].inputs["input_features"]) for clip in clips
    ]
    assert [base.languages[clip.language] for clip in clips] == [int(token) for token in heard]
    given = read_clips(write_manifest(tmp_path, language="French"), base, 256)
    assert {clip.language for clip in given} == {"fr"}


def test_held_out_clips_are_never_trained_on(base):
    clips = [Clip(Path(f"{i}.wav"), f"{'one ' * (i + 1)}", "en") for i in range(10)]
    split = split_clips(clips, base, 0.2, 0, "here")
    assert (len(split.train), len(split.held_out)) == (8, 2)
    whole = Clips(base, clips)
    assert split.train_tokens + split.held_out.tokens == whole.tokens
    with pytest.raises(ConfigError, match="one clip is too few"):
        split_clips(clips[:1], base, 0.2, 0, "here")


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_of_any_rate_becomes_mono_at_16_khz(rate, channels, tmp_path):
    path = write_wav(tmp_path / "a.wav", tone(440, 1.0, rate), rate, channels)
    samples = load_audio(path)
    assert samples.dtype == np.float32
    # The filter's ends may cost a few samples.
    assert abs(len(samples) - SAMPLE_RATE) <= 32
    spectrum = np.abs(np.fft.rfft(samples[: SAMPLE_RATE // 2]))
    assert spectrum.argmax() * 2 == 440
    assert np.abs(samples[1000:-1000]).max() == pytest.approx(0.5, abs=0.02)


def test_reads_flac(tmp_path):
    import av

    with av.open(str(tmp_path / "a.flac"), "w") as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono", format="s16")
        samples = (tone(440, 0.5, SAMPLE_RATE) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate, frame.time_base = SAMPLE_RATE, Fraction(1, SAMPLE_RATE)
        container.mux([*stream.encode(frame), *stream.encode(None)])
    assert np.abs(load_audio(tmp_path / "a.flac") - samples / 32768).max() < 1e-4


def test_every_line_at_fault_is_named_at_once(whisper, tmp_path, capsys):
    write_manifest(tmp_path, count=3)
    (tmp_path / "text.wav").write_text("not sound at all")
    write_wav(tmp_path / "long.wav", tone(300, WHISPER_CHUNK_S + 1, 16_000), 16_000)
    write_wav(tmp_path / "empty.wav", np.zeros(0), 16_000)
    lines = [
        {"audio": "0.wav", "text": "fine"},
        {"audio": "absent.wav", "text": "yes"},
        {"audio": "0.wav", "text": "   "},
        {"audio": "text.wav", "text": "yes"},
        {"audio": "long.wav", "text": "yes"},
        {"audio": "empty.wav", "text": "yes"},
        {"audio": "0.wav", "text": "yes", "language": "Klingon"},
        {"audio": "0.wav", "text": "yes " * 200},
        {"text": "yes"},
        {"audio": "absent.wav", "text": "", "language": "xx"},
    ]
    path = write_lines(tmp_path / "bad.jsonl", lines)
    path.write_text(path.read_text() + "no json\n")
    assert command(whisper, path, tmp_path / "out", "--steps", "2") == 1
    message = capsys.readouterr().err
    for words in (
        "10 line(s) can't be used",
        "line 2: absent.wav: no such file",
        "line 3: the transcript is empty",
        "line 4: text.wav: can't be read as sound",
        "line 5: long.wav lasts 3.0 s, the model hears 2 s: cut it",
        "line 6: empty.wav: ",
        "line 7: language 'Klingon', the model knows en, es, fr, it, ru",
        "line 8: the transcript has ",
        "at most 256 fit",
        'line 9: a Whisper base needs "audio"',
        "line 10: absent.wav: no such file; language 'xx', the model knows en, es, fr, it, ru; the transcript is empty",
        "line 11: not JSON",
    ):
        assert words in message, message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.jsonl", None, "no such file or directory"),
        ("clips.txt", "one", "needs a .jsonl manifest"),
        ("clips.jsonl", "\n", "no clips in it"),
        ("clips.jsonl", '{"text": "the cat"}\n{"messages": []}\n', "2 line(s) can't be used"),
    ],
)
def test_text_does_not_train_a_whisper(name, content, words, whisper, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert command(whisper, tmp_path / name, tmp_path / "out") == 1
    assert words in capsys.readouterr().err


def test_clips_do_not_train_a_text_model(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    manifest = write_manifest(tmp_path, count=3)
    assert command(tmp_path / "llama", manifest, tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "3 line(s) can't be used" in message
    assert all(f'line {i}: has "audio", and the base is a text model' in message for i in (1, 2, 3))


def test_jobs_are_for_text(whisper, tmp_path, capsys):
    (tmp_path / "jobs.yaml").write_text(
        f"base: {whisper}\njobs: [{{data: {write_manifest(tmp_path)}, out: {tmp_path}/a}}]"
    )
    assert main(["train", "--jobs", str(tmp_path / "jobs.yaml")]) == 1
    assert "train its adapters one by one" in capsys.readouterr().err
