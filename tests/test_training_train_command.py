"""`flora-vllm train`: what it reads, what it leaves, how it goes on, and what it says to bad input."""

import argparse
import errno
import json
import pickle
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_support import WORDS, interrupted_at_step, sentences, tiny_llama, tiny_tokenizer

from flora_vllm.commands import train as train_command
from flora_vllm.commands.cli import main
from flora_vllm.errors import ConfigError
from flora_vllm.formats import read_adapter
from flora_vllm.train_request import RATES, Request
from flora_vllm.training import build, checkpoint, loop, run
from flora_vllm.training.data import batches, make_blocks, read_documents
from flora_vllm.training.learning_rate import DEFAULT_LEARNING_RATE


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(200)))
    return path


def command(base, data, out, *options: str) -> int:
    words = [str(base), str(data), str(out), "--length", "16", "--batch", "4", "--targets", "all-linear", *options]
    return main(["train", *words])


@pytest.mark.parametrize("method", ["flora", "lora", "ia3"])
def test_trains_and_leaves_what_the_server_reads(method, base, data, tmp_path, capsys):
    options = ["--targets", "q_proj,down_proj"] if method == "ia3" else ["--rank", "2"]
    assert command(base, data, tmp_path / "out", "--method", method, "--steps", "12", *options) == 0
    adapter = read_adapter(tmp_path / "out")
    assert adapter.family == method.upper()
    card = {"README.md"} if method == "flora" else set()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        *card,
    }
    printed = capsys.readouterr().out
    assert f"vllm serve {base} --enable-flora --lora-modules out={tmp_path / 'out'}" in printed
    rows = [json.loads(line) for line in (tmp_path / "out.training" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows[:-1]] == list(range(1, 13))
    assert rows[-1]["held_out_adapter"] < rows[-1]["held_out_base"]


def test_interrupted_run_goes_on_to_the_same_end(base, data, tmp_path):
    options = ["--steps", "6", "--rank", "2"]
    assert command(base, data, tmp_path / "whole", *options) == 0
    with interrupted_at_step(3):
        assert command(base, data, tmp_path / "parts", *options) == 130
    assert not (tmp_path / "parts").exists()
    assert command(base, data, tmp_path / "parts", *options) == 0
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_ctrl_c_between_an_update_and_its_count_trains_no_step_twice(base, data, tmp_path, monkeypatch):
    options = ["--steps", "6", "--rank", "2"]
    assert command(base, data, tmp_path / "whole", *options) == 0
    step = torch.optim.AdamW.step
    updates = []

    def interrupted(self, *args, **keywords):
        step(self, *args, **keywords)
        updates.append(1)
        if len(updates) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    # Of a shell's background jobs it is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert command(base, data, tmp_path / "parts", *options) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert torch.load(tmp_path / "parts.training" / "state.pt", weights_only=True)["step"] == len(updates) == 3
    assert command(base, data, tmp_path / "parts", *options) == 0
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_other_settings_are_not_mixed_into_a_run(base, data, tmp_path, capsys):
    assert command(base, data, tmp_path / "out", "--steps", "2") == 0
    assert command(base, data, tmp_path / "out", "--steps", "2", "--rank", "2") == 1
    assert "rank was 1, now 2" in capsys.readouterr().err
    assert command(base, data, tmp_path / "out", "--steps", "2", "--rank", "2", "--restart") == 0
    assert read_adapter(tmp_path / "out").rank == 2


def test_a_finished_run_says_that_nothing_is_left_to_train(base, data, tmp_path, capsys):
    assert command(base, data, tmp_path / "out", "--steps", "2") == 0
    assert "--restart" not in capsys.readouterr().out
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert command(base, data, tmp_path / "out", "--steps", "2", "--lr", "0.5") == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'out'} holds this run, all 2 steps: nothing is left to train" in said
    assert "--restart trains anew" in said
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"", b"garbage", pickle.dumps(print, 2), [1], {"settings": [], "step": 1}, {"step": 1}]
)
def test_a_state_that_is_none_says_how_to_begin_anew(content, tmp_path):
    request = Request("base", tmp_path / "data", tmp_path / "out", steps=2)
    path = tmp_path / "out.training" / "state.pt"
    path.parent.mkdir()
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    settings = run.settings_of(request, make_blocks(["the cat "] * 400, tiny_tokenizer(), 256, 0.05, 0, "here"), 0.01)
    with pytest.raises(ConfigError, match=r"state\.pt can't be read .*--restart") as caught:
        checkpoint.load_state(request.out, settings)
    assert "weights_only" not in str(caught.value)


def test_restart_forgets_the_earlier_run_only_when_the_new_one_can_begin(base, data, tmp_path, monkeypatch, capsys):
    assert command(base, data, tmp_path / "out", "--steps", "2") == 0
    state = tmp_path / "out.training" / "state.pt"
    before = state.read_bytes()
    for where, options in ((tmp_path / "none", []), (data, ["--targets", "nope"]), (data, ["--rank", "33"])):
        assert command(base, where, tmp_path / "out", "--steps", "2", *options, "--restart") == 1
        assert state.read_bytes() == before
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(f"base: {base}\njobs: [{{data: {tmp_path}/none, out: {tmp_path}/out}}]")
    assert main(["train", "--jobs", str(jobs), "--restart"]) == 1
    assert state.read_bytes() == before
    capsys.readouterr()

    def busy(path, *_args, **_options):
        raise OSError(errno.EBUSY, "in use", str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    assert command(base, data, tmp_path / "out", "--steps", "2", "--restart") == 1
    assert "in use" in capsys.readouterr().err


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(base, data, tmp_path, monkeypatch, capsys):
    real = loop.cross_entropy
    calls = []

    def breaking(logits, ids):
        calls.append(1)
        return real(logits, ids) * (torch.nan if logits.requires_grad and len(calls) > 12 else 1)

    monkeypatch.setattr(loop, "cross_entropy", breaking)
    assert command(base, data, tmp_path / "out", "--steps", "60", "--save-every", "2") == 1
    message = capsys.readouterr().err
    assert "loss nan" in message
    assert "of 60 with learning rate 0.00" in message
    assert "same command with a lower --lr goes on from it" in message
    state = torch.load(tmp_path / "out.training" / "state.pt", weights_only=True)
    assert state["step"] % 2 == 0
    assert all(torch.isfinite(factor).all() for factor in state["factors"].values())
    monkeypatch.setattr(loop, "cross_entropy", real)
    assert command(base, data, tmp_path / "out", "--steps", "60", "--save-every", "2", "--lr", "0.004") == 0


def test_full_disk_keeps_the_last_checkpoint(base, data, tmp_path, monkeypatch, capsys):
    real = checkpoint.os.fsync
    calls = []

    def full(descriptor):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    assert command(base, data, tmp_path / "out", "--steps", "4", "--save-every", "2") == 1
    assert "No space left on device" in capsys.readouterr().err
    names = {p.name for p in (tmp_path / "out.training").iterdir()}
    assert names == {"state.pt", "log.jsonl"}
    assert torch.load(tmp_path / "out.training" / "state.pt", weights_only=True)["step"] == 2


def test_sweep_takes_the_best_rate(base, data, tmp_path, capsys):
    assert command(base, data, tmp_path / "out", "--steps", "10", "--sweep") == 0
    printed = capsys.readouterr().out
    tried = {float(line.split()[2]): float(line.split()[6]) for line in printed.splitlines() if "sweep: rate" in line}
    assert sorted(tried) == [DEFAULT_LEARNING_RATE * factor for factor in run.SWEEP_FACTORS]
    row = json.loads((tmp_path / "out.training" / "log.jsonl").read_text().splitlines()[0])
    assert row["rate"] == min(tried, key=tried.__getitem__)


def test_an_out_that_cannot_be_used_is_told_before_the_base_is_loaded(base, data, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "folder", base):
        assert command(tmp_path / "no-base", data, out) == 1
        assert f"{out} exists and holds more than" in capsys.readouterr().err
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(f"base: {base}\njobs: [{{data: {tmp_path}/none, out: a}}, {{data: d, out: {tmp_path}/folder}}]")
    assert main(["train", "--jobs", str(jobs)]) == 1
    assert f"{tmp_path / 'folder'} exists" in capsys.readouterr().err


def test_another_method_takes_the_place_of_flora_and_keeps_what_others_wrote(base, data, tmp_path):
    card = tmp_path / "out" / "README.md"

    def card_of(method):
        assert command(base, data, tmp_path / "out", "--method", method, "--steps", "1", "--restart") == 0
        assert read_adapter(tmp_path / "out").family == method.upper()
        return card.read_text() if card.exists() else ""

    assert "## FLoRA" in card_of("flora")
    assert card_of("lora") == ""
    card.write_text("Mine.\n")
    assert card_of("lora") == "Mine.\n"
    assert card_of("flora").startswith("Mine.\n\n## FLoRA")
    assert card_of("lora") == "Mine.\n"


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("", [], "no text in it"),
        ('{"text": "the cat sat"}\n', [], "tokens in 1 document\\(s\\) are too few"),
        ('{"txt": "the cat"}\nnot json\n', [], "2 line\\(s\\) can't be used"),
        (None, [], "no such file"),
        ("ok", ["--targets", "q_proj,nope"], "'nope' matches no module; linear layers here: .*q_proj"),
        ("ok", ["--targets", ".*nope"], "not found in the base model.*Linear layers here"),
        ("ok", ["--targets", "(q_proj"], "'\\(q_proj' is no regular expression"),
        ("ok", ["--rank", "33"], "too small for rank 33"),
        ("ok", ["--lr", "0.1", "--sweep"], "leave one out"),
        ("ok", ["--epochs", "1"], "leave one out"),
        ("ok", ["--method", "ia3", "--rank", "2"], "IA3 has no rank"),
    ],
)
def test_bad_input_is_named(content, options, words, base, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    if content == "ok":
        content = "".join(json.dumps({"text": text}) + "\n" for text in sentences(200))
    if content is not None:
        path.write_text(content)
    assert command(base, path, tmp_path / "out", "--steps", "2", *options) == 1
    message = capsys.readouterr().err
    assert re.search(words, message), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", "0"], "--rank: must be a whole number of at least 1, got '0'"),
        (["--lr", "-1"], "--lr: must be a number above 0, got '-1'"),
        (["--epochs", "inf"], "--epochs: must be a number above 0, got 'inf'"),
        (["--seed", str(10**20)], "--seed: must be a whole number of at least 0 and at most 4294967295, got"),
        (["--method", "dora"], "--method: invalid choice: 'dora'"),
    ],
)
def test_an_option_that_cannot_be_is_a_usage_error(options, words, base, data, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(base, data, tmp_path / "out", *options)
    assert words in capsys.readouterr().err


def test_every_method_has_a_rate():
    assert build.METHODS.keys() == RATES.keys()


def test_a_base_that_is_not_there_is_named(data, tmp_path, capsys):
    assert command(tmp_path / "nothing", data, tmp_path / "out") == 1
    assert "can't be loaded" in capsys.readouterr().err


def test_a_base_with_a_broken_file_is_named(base, data, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert command(tmp_path / "cut", data, tmp_path / "out") == 1
    assert f"base model {tmp_path / 'cut'} can't be loaded: " in capsys.readouterr().err


def test_reads_chats_directories_and_text_files(tmp_path):
    tokenizer = tiny_tokenizer()
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "the cat"}]}) + "\n\n")
    assert read_documents(chat, tokenizer) == ["user the cat "]
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "b.txt").write_text("dog")
    (tmp_path / "texts" / "deep" / "a.txt").write_text("cat")
    (tmp_path / "texts" / ".hidden").write_text("no")
    assert sorted(read_documents(tmp_path / "texts", tokenizer)) == ["cat", "dog"]
    assert read_documents(tmp_path / "texts" / "b.txt", tokenizer) == ["dog"]
    (tmp_path / "texts" / "image.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ConfigError, match=r"image\.png: not UTF-8"):
        read_documents(tmp_path / "texts", tokenizer)


def test_chats_in_a_chat_are_refused(tmp_path):
    """The template makes a list of them, whose Python text would be trained on."""
    chat = [{"role": "user", "content": "the cat"}]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in (chat, [chat], [chat, chat])))
    with pytest.raises(ConfigError, match=r"2 line.*\n.*line 2: .*give each chat a line of its own"):
        read_documents(tmp_path / "chat.jsonl", tiny_tokenizer())


def test_lines_end_where_json_lines_end(tmp_path):
    texts = ["the\u2028cat", "the\u2029dog", "a\x85mat"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "data.jsonl").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    assert read_documents(tmp_path / "data.jsonl", tiny_tokenizer()) == texts


def test_json_that_no_tokeniser_takes_is_named(tmp_path):
    chat = json.dumps({"messages": [{"role": "user", "content": "\udfff"}]})
    lines = [r'{"text": "\ud800"}', chat, "[" * 100_000, r'{"text": "\ud83d\ude00"}', "9" * 5000]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="4 line") as caught:
        read_documents(tmp_path / "data.jsonl", tiny_tokenizer())
    faults = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert [fault.split()[1] for fault in faults] == ["1:", "2:", "3:", "5:"]
    assert all("half a character" in fault for fault in faults[:2])
    assert "nested too deep" in faults[2]


def test_twenty_faults_stand_for_all(tmp_path):
    (tmp_path / "data.jsonl").write_text("no\n" * 1000)
    with pytest.raises(ConfigError, match="1000 line") as caught:
        read_documents(tmp_path / "data.jsonl", tiny_tokenizer())
    assert str(caught.value).splitlines()[-1].strip().startswith("line 20: ")


def test_held_out_text_is_never_trained_on():
    documents = [f"{word} " * 20 for word in WORDS[:14]] * 3
    blocks = make_blocks(documents, tiny_tokenizer(), 21, 0.1, 0, "here")
    assert len(blocks.held_out) == 4
    assert len(blocks.train) == 38
    assert all(len(set(row.tolist())) == 2 for row in torch.cat([blocks.train, blocks.held_out]))


def test_more_documents_are_held_out_until_they_fill_a_block():
    documents = [f"{word} " * 4 for word in WORDS[:14]] * 3  # 42 of 5 tokens; 5 % are 2 documents
    blocks = make_blocks(documents, tiny_tokenizer(), 20, 0.05, 0, "here")
    assert (len(blocks.held_out), len(blocks.train)) == (1, 9)
    blocks = make_blocks(documents[:23], tiny_tokenizer(), 57, 0.05, 0, "here")  # a block is 11.4 documents
    assert (len(blocks.held_out), len(blocks.train)) == (1, 1)
    with pytest.raises(ConfigError, match=r"115 tokens in 23 .* are too few.*: add text or lower --length"):
        make_blocks(documents[:23], tiny_tokenizer(), 58, 0.05, 0, "here")
    with pytest.raises(ConfigError, match=r"are too few.*: lower --held-out"):
        make_blocks(documents, tiny_tokenizer(), 20, 0.99, 0, "here")


def test_batches_pass_over_all_blocks_and_resume_where_they_were():
    blocks = torch.arange(10).view(10, 1)
    stream = batches(blocks, 4, seed=3, first_step=0)
    first = [next(stream) for _ in range(10)]
    seen = torch.cat(first).flatten().tolist()
    assert all(sorted(seen[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))
    resumed = batches(blocks, 4, seed=3, first_step=7)
    assert all(torch.equal(next(resumed), batch) for batch in first[7:])


def test_help_states_the_rates_that_are_used(capsys):
    parser = argparse.ArgumentParser()
    train_command.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    assert "its own rate (flora 0.008, lora 0.0002, ia3 0.005)" in text


def test_serve_line_raises_the_rank_limits():
    def line(ranks, method="flora"):
        return train_command.serve_line("B", {Path(f"o/{n}"): rank for n, rank in ranks.items()}, method)

    assert line({"x": 1}) == "vllm serve B --enable-flora --lora-modules x=o/x"
    assert "--max-flora-rank 20" in line({"x": 20})
    assert "--max-lora-rank 32" in line({"x": 20}, "lora")
    assert "--max-loras 2 --lora-modules x=o/x y=o/y" in line({"x": 1, "y": 2})


def test_serve_line_gives_no_name_twice():
    line = train_command.serve_line("B", dict.fromkeys(map(Path, ("ta/x", "tb/x", "y", "c/d/z", "b/d/z")), 1))
    assert line.endswith("--lora-modules ta-x=ta/x tb-x=tb/x y=y c-d-z=c/d/z b-d-z=b/d/z")
