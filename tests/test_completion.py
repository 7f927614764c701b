"""The completion script knows the commands and options that the parsers know, and bash runs it."""

import subprocess

import pytest

from flora_vllm.commands.cli import available, main
from flora_vllm.commands.completion import script, words_of


def complete(*words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    program = f'{script()}\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _flora_vllm; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "-c", program, "bash", "flora-vllm", *words], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_commands_and_their_options() -> None:
    assert complete("in") == ["inspect"]
    assert set(complete("")) >= {command.name for command in available()}
    assert complete("inspect", "--js") == ["--json"]
    assert complete("deploy", "graf") == ["grafana"]
    assert complete("cluster", "man") == ["manifest"]
    assert "--held-out" in complete("train", "--h")
    assert complete("no-such-command", "--") == []


def test_every_command_has_its_help() -> None:
    assert all("--help" in words_of(command.name) for command in available())


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_command_prints_it(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(script())
    assert ("bashcompinit" in printed) == (shell == "zsh")
