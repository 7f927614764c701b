"""`flora-vllm completion bash|zsh`: a shell script that knows every command and option; made from the parsers."""

import argparse
import re

from flora_vllm.commands import cli

EXAMPLES = """\
examples:
  source <(flora-vllm completion bash)                 # now, or in ~/.bashrc
  source <(flora-vllm completion zsh)                  # in ~/.zshrc, after compinit
"""
# Directories and files complete by themselves: the shell does that where nothing else fits.
SCRIPT = """\
_flora_vllm() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" words="{commands}"
    if (( COMP_CWORD > 1 )); then
        case "${{COMP_WORDS[1]}}" in
{cases}
            *) words="" ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _flora_vllm flora-vllm
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print a script that completes flora-vllm's commands and options in your shell."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shell", choices=("bash", "zsh"))


def run(args: argparse.Namespace) -> int:
    """0, always."""
    print((ZSH if args.shell == "zsh" else "") + script(), end="")
    return 0


def script() -> str:
    cases = [
        f'            {command.name}) words="{" ".join(words_of(command.name))}" ;;' for command in cli.available()
    ]
    names = [command.name for command in cli.available()]
    return SCRIPT.format(commands=" ".join([*names, "--help", "--version"]), cases="\n".join(cases))


def words_of(command: str) -> list[str]:
    """The options, choices and sub-commands of a command, as its parser has them."""
    words: list[str] = []
    waiting = [_subparsers(cli.make_parser([command]))[command]]
    while waiting:
        parser = waiting.pop()
        for action in parser._actions:
            words += [option for option in action.option_strings if option.startswith("--")]
            if not isinstance(action, argparse._SubParsersAction):
                words += [] if action.option_strings else [str(choice) for choice in action.choices or ()]
        nested = _subparsers(parser)
        words += nested
        waiting += nested.values()
    return [word for word in dict.fromkeys(words) if re.fullmatch(r"[\w.-]+", word)]


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: nested for action in actions for name, nested in action.choices.items()}
