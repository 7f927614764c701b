"""`flora-vllm` itself: what it offers, how it fails; each command's own work is tested with its module."""

import argparse
import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from flora_vllm import __version__
from flora_vllm.commands import bench as bench_command
from flora_vllm.commands import cli
from flora_vllm.commands.cli import COMMANDS, Command, available, main
from flora_vllm.errors import ConfigError


@pytest.fixture
def command(monkeypatch):
    """`command(run)` makes `flora-vllm probe` run that function."""

    def make(run):
        module = ModuleType("flora_probe_command")
        vars(module).update(
            add_arguments=lambda parser: parser.add_argument("--size", type=int, default=1),
            run=run,
            __spec__=argparse.Namespace(name="flora_probe_command"),
        )
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cli, "COMMANDS", (*COMMANDS, Command("probe", module.__name__, "a probe")))

    return make


class TestHelp:
    def test_top_level_lists_what_is_there_and_teaches_by_example(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["--help"])
        text = capsys.readouterr().out
        assert all(re.search(rf"\n    {command.name}\s", text) for command in available())
        assert "vllm serve MODEL --enable-flora" in text

    @pytest.mark.parametrize("command", available(), ids=lambda command: command.name)
    def test_each_command_teaches_by_example(self, command, capsys):
        with pytest.raises(SystemExit, match="0"):
            main([command.name, "--help"])
        text = capsys.readouterr().out
        assert "example" in text
        assert f"flora-vllm {command.name}" in text.split("example")[1]
        parser = argparse.ArgumentParser()
        import_module(command.module).add_arguments(parser)
        assert parser.description, "says in one sentence what it does"

    def test_a_command_that_is_not_there_is_not_offered(self, monkeypatch, capsys):
        monkeypatch.setattr(cli, "COMMANDS", (*COMMANDS, Command("dance", "flora_vllm.no_such_module", "dance")))
        assert "dance" not in [command.name for command in available()]
        with pytest.raises(SystemExit, match="2"):
            main(["dance"])
        assert "invalid choice: 'dance'" in capsys.readouterr().err

    def test_the_environment_table_is_shown(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["--help"])
        assert "FLORA_CACHE: where models" in capsys.readouterr().out

    def test_version(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["--version"])
        assert capsys.readouterr().out == f"flora-vllm {__version__}\n"

    def test_no_command_is_a_usage_error(self, capsys):
        with pytest.raises(SystemExit, match="2"):
            main([])
        assert "usage: flora-vllm" in capsys.readouterr().err

    def test_help_imports_neither_torch_nor_engines(self):
        code = (
            "import sys\nfrom flora_vllm.commands import cli\n"
            f"for name in {[command.name for command in available()]!r}:\n"
            "    cli.make_parser([name])\n"
            "print(*sorted({'torch', 'vllm', 'ray', 'peft', 'transformers'} & sys.modules.keys()))"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert found.stdout.split() == []


class TestOutcome:
    def test_arguments_reach_the_command_and_its_status_comes_back(self, command):
        seen = []
        command(lambda args: seen.append(args.size) or 7)
        assert main(["probe", "--size", "5"]) == 7
        assert seen == [5]

    def test_our_errors_are_one_message_on_stderr(self, command, capsys):
        def run(args):
            raise ConfigError("rank is 0, must be at least 1")

        command(run)
        assert main(["probe"]) == 1
        out, err = capsys.readouterr()
        assert (out, err) == ("", "flora-vllm: error: rank is 0, must be at least 1\n")

    def test_debug_shows_where_our_error_was_found(self, command, capsys):
        def run(args):
            raise ConfigError("rank is 0")

        command(run)
        assert main(["--debug", "probe"]) == 1
        error = capsys.readouterr().err
        assert "Traceback" in error
        assert error.endswith("flora-vllm: error: rank is 0\n")

    def test_errors_of_the_system_are_one_message_too(self, command, capsys):
        command(lambda args: Path("/no/such/file").stat())
        assert main(["probe"]) == 1
        out, err = capsys.readouterr()
        assert (out, err) == ("", "flora-vllm: error: [Errno 2] No such file or directory: '/no/such/file'\n")

    @pytest.mark.parametrize("words", ["merge A B C OUT", "convert --repair A OUT --rank 0", "train"])
    def test_debug_shows_where_a_commands_error_was_found(self, words, capsys):
        assert main(["--debug", *words.split()]) == 1
        error = capsys.readouterr().err
        assert "Traceback" in error
        assert error.splitlines()[-1].startswith("flora-vllm: error: ")

    @pytest.mark.parametrize(
        ("words", "module", "extra"),
        [
            ("train B D O", "peft", "train"),
            ("convert --from-lora B A O", "peft", "train"),
            ("convert --from-ia3 B A O", "peft", "train"),
            ("cluster status", "ray", "cluster"),
            ("cluster manifest C --serve", "ray", "cluster"),
        ],
    )
    def test_an_extra_that_is_not_installed_is_named(self, words, module, extra, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, module, None)
        assert main(words.split()) == 1
        assert f'needs {module}: pip install "flora-vllm[{extra}]"' in capsys.readouterr().err

    def test_interrupt_is_130(self, command, capsys):
        def run(args):
            raise KeyboardInterrupt

        command(run)
        assert main(["probe"]) == 130
        assert "interrupted" in capsys.readouterr().err

    def test_other_errors_keep_their_traceback(self, command):
        def run(args):
            raise ZeroDivisionError

        command(run)
        with pytest.raises(ZeroDivisionError):
            main(["probe"])

    def test_a_reader_that_goes_away_is_no_traceback(self):
        code = (
            "import sys\nfrom flora_vllm.commands import cli, inspect as inspect_command\n"
            "inspect_command.run = lambda args: print('x' * 10**6) or 0\n"
            "sys.exit(cli.main(['inspect', 'x']))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.read(3) == "xxx"
        process.stdout.close()
        assert process.stderr is not None
        with process.stderr as stderr:
            assert stderr.read() == ""
        assert process.wait() == 1

    def test_real_interrupt_ends_the_process_with_130(self):
        code = (
            "import signal, sys, time\nfrom flora_vllm.commands import cli, inspect as inspect_command\n"
            # As in a terminal, also where these tests run in the background, which ignores the signal.
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "inspect_command.run = lambda args: print('here', flush=True) or time.sleep(60)\n"
            "sys.exit(cli.main(['inspect', 'x']))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "Traceback" not in err


class TestBench:
    @pytest.fixture
    def benchmarks(self, tmp_path, monkeypatch):
        monkeypatch.setattr(bench_command, "BENCHMARKS", tmp_path)
        for name, status in (("good", 0), ("other", 0), ("poor", 3)):
            (tmp_path / f"bench_{name}.py").write_text(
                f"import sys; print({name!r}, *sys.argv[1:]); sys.exit({status})"
            )

    @pytest.mark.usefixtures("benchmarks")
    def test_runs_those_named_shortened_unless_told(self, capfd):
        assert main(["bench", "good", "other"]) == 0
        assert main(["bench", "good", "--full"]) == 0
        assert capfd.readouterr().out.split("\n")[:3] == ["good --quick", "other --quick", "good"]

    @pytest.mark.usefixtures("benchmarks")
    def test_stops_at_the_first_that_fails(self, capfd):
        assert main(["bench", "poor", "good"]) == 3
        assert "good" not in capfd.readouterr().out

    @pytest.mark.usefixtures("benchmarks")
    def test_unknown_name_lists_the_known(self, capsys):
        assert main(["bench", "warp"]) == 1
        assert "no benchmark warp" in capsys.readouterr().err


def test_starting_is_quick():
    """Less than a second of processor time: nothing heavy is imported on the way to a command's help."""
    before = os.times()
    for _ in range(3):
        subprocess.run(
            [sys.executable, "-m", "flora_vllm.commands.cli", "merge", "--help"], capture_output=True, check=True
        )
    after = os.times()
    spent_s = after.children_user - before.children_user + after.children_system - before.children_system
    assert spent_s / 3 < 1
