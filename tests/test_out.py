"""An OUT that nothing can be put to is refused in one message, before the work."""

from pathlib import Path

import pytest
import torch

from flora_vllm.commands.cli import main
from flora_vllm.errors import AdapterError
from flora_vllm.formats import read_adapter, write_flora
from flora_vllm.formats.out import replaceable

PAIRS = {"m.q_proj": (torch.ones(1, 4), torch.ones(4, 1))}
# What they read is not there: whoever looks at it first says so in place of what is asserted.
COMMANDS = {
    "merge": ["merge", "./base", "./adapter", "OUT"],
    "merge --method": ["merge", "--method", "linear", "--weights", "1,1", "./one", "./two", "OUT"],
    "merge arrow": ["merge", "--method", "arrow", "./one", "./two", "OUT"],
    "train": ["train", "./base", "./text", "OUT"],
    "convert --from-lora": ["convert", "--from-lora", "./base", "./adapter", "OUT"],
    "convert --to-lora": ["convert", "--to-lora", "./base", "./adapter", "OUT"],
    "convert --repair": ["convert", "--repair", "./adapter", "OUT"],
    "convert --dlp": ["convert", "--dlp", "list.txt", "./encoder", "./classifier.pth", "OUT"],
    "model": ["model", "OUT"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("out", "words"),
    [(".", "is the directory that you are in"), ("/proc", "is a mount point"), ("file/x", "can't be written")],
)
def test_a_place_that_cannot_be_replaced_is_refused_before_the_work(tmp_path, monkeypatch, capsys, command, out, words):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    if out == "file/x":
        Path("file").write_text("")
    if command == "model" and out == "/proc":
        words = "remove it or name another place"  # it holds something, which is said first
    assert main([out if word == "OUT" else word for word in COMMANDS[command]]) == 1
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == (["here", "file"] if out == "file/x" else ["here"])


def test_a_link_stays_and_leads_to_what_was_written(tmp_path):
    link, real = tmp_path / "links" / "poems", tmp_path / "real"
    link.parent.mkdir()
    link.symlink_to(real)
    for _ in range(2):  # to a place that is not there yet, and to one that is
        write_flora(link, PAIRS)
        assert link.readlink() == real
        assert read_adapter(real).rank == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["links", "real"]
    assert [path.name for path in link.parent.iterdir()] == ["poems"]


def test_what_may_be_replaced(tmp_path):
    assert replaceable(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    (tmp_path / "old").mkdir()
    assert replaceable(tmp_path / "old" / ".." / "old") == tmp_path / "old"
    (tmp_path / "old" / "README.md").write_text("")
    assert replaceable(tmp_path / "old", ["README.md"]) == tmp_path / "old"
    for names, words in (
        ((), "not an empty directory"),
        (("config.json",), "holds more than"),
    ):
        with pytest.raises(AdapterError, match=words):
            replaceable(tmp_path / "old", names)
