"""How the command line is read and explained: short help with examples, suggestions, and completion for shells."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any


# What `--help` of every command leaves to `--help-all`, by the option's name.
RARE = frozenset(
    """
    --device-map --max-memory --offload-folder --config --vocab --revision --token --cache-dir --vision-config
    --llm-config --diffusion-config --vae --ranker --prompt-checker --image-checker --offload --quantize-vision
    --quantize-embedding --quantize-unet --length-penalty --repetition-penalty --max-image-pixels --max-image-seconds
    --max-image-memory --image-workers --max-body-bytes --client-timeout --max-cache-tokens --max-waiting
    --allow-remote-images --cors-origin --log-content --served-paint-name --api-key-file --max-shard-size
    --contact-sheet --save-all --num-processes --engine --retry-errors --share
    """.split()
)
LIKENESS = 0.6
# With more options than this a command's help is short, unless all of it is asked for.
MANY_OPTIONS = 12
FEW = 2  # left out, they would not make it shorter
# Of an unadorned number's type.
METAVARS = {"int": "N", "float": "X"}


class Formatter(argparse.HelpFormatter):
    """One line an option, where the terminal is wide enough."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(shutil.get_terminal_size().columns, 120) - 2)

    def _format_action_invocation(self, action):
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0].removeprefix('--')}"
        return super()._format_action_invocation(action)

    def _get_default_metavar_for_optional(self, action):
        kind = getattr(action.type, "__name__", None)
        return METAVARS.get(kind) or super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """A command's parser.

    Args:
        examples: commands that `--help` ends with.
        rare: further options that `--help` leaves to `--help-all`, here alone.
    """

    def __init__(self, *args: Any, examples: tuple[str, ...] = (), rare: str = "", **kwargs: Any):
        kwargs.setdefault("formatter_class", Formatter)
        super().__init__(*args, **kwargs)
        self.examples, self.rare = examples, RARE.union(rare.split())
        self._has_rare = False

    def finish(self) -> None:
        """Once all arguments are there: a usage of one line, and `--help-all` if `--help` leaves something out."""
        formatter = self._get_formatter()
        kept = [action for action in self._actions if not action.option_strings or action.required]
        formatter.add_usage(None, kept, [], "")
        if len(kept) < len(self._actions):
            words = " ".join(formatter.format_help().split()).removeprefix(self.prog)
            self.usage = f"%(prog)s [options]{words}"
        if (
            len([action for action in self._actions if action.option_strings]) > MANY_OPTIONS
            and len(self._rare()) > FEW
        ):
            self._has_rare = True
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="every option / 显示全部选项")

    def _rare(self) -> list[argparse.Action]:
        return [action for action in self._actions if self.rare.intersection(action.option_strings)]

    def format_help(self, everything: bool = False) -> str:
        rare = self._rare() if self._has_rare and not everything else []
        helps = [(action, action.help) for action in self._actions if action in rare or isinstance(action, _HelpAll)]
        try:
            for action, _ in helps:
                action.help = argparse.SUPPRESS
            text = super().format_help()
        finally:
            for action, help in helps:
                action.help = help
        if rare:
            # With what they take, which stays on the option's line.
            invocation = self._get_formatter()._format_action_invocation
            names = ", ".join(invocation(action).replace(" ", "\0") for action in rare)
            text += "\n" + _wrapped(f"--help-all explains also / 更多选项见 --help-all: {names}").replace("\0", " ")
        if self.examples:
            text += "\nexamples / 示例:\n" + "".join(f"  {example}\n" for example in self.examples)
        if rare:  # on one screen, which empty lines between the groups would spoil
            usage, about, *groups = text.split("\n\n")
            text = "\n\n".join([usage, about, "\n".join(groups)])
        return text

    def parse_known_args(self, args=None, namespace=None):
        self._given = sys.argv[1:] if args is None else list(args)
        return self._without_unknown(super().parse_known_args(args, namespace))

    def _without_unknown(self, result: tuple[argparse.Namespace, list[str]]) -> tuple[argparse.Namespace, list[str]]:
        if result[1]:
            self.error(f"unrecognized arguments: {' '.join(result[1])}")
        return result

    def error(self, message: str):
        """One sentence, with what was probably meant, and where help is."""
        names = [name for action in self._actions for name in action.option_strings]
        if message.startswith("the following arguments are required"):  # which a mistyped option may have swallowed
            options = (word.partition("=")[0] for word in self._given if word.startswith("--") and word != "--")
            wrong = [word for word in options if not any(name.startswith(word) for name in names)]
            message = f"unrecognized arguments: {' '.join(wrong)}" if wrong else message
        match = re.match(r"unrecognized arguments: (--?[\w-]+)", message)
        if match:
            message += self._suggestion(match[1], names)
        elif match := re.match(r"argument .*: invalid choice: '([^']*)' \(choose from (.*)\)$", message):
            message += self._suggestion(match[1], [name.strip("'") for name in match[2].split(", ")])
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help / 用法见 {self.prog} --help\n")

    @staticmethod
    def _suggestion(word: str, names: list[str]) -> str:
        close = difflib.get_close_matches(word, names, 1, LIKENESS)
        return f". Did you mean {close[0]}? / 是否想用 {close[0]}？" if close else ""


class IntermixedParser(Parser):
    """Takes options before, between and after the arguments, also where some of these may be missing."""

    def parse_known_args(self, args=None, namespace=None):
        self._given = sys.argv[1:] if args is None else list(args)
        # Which the way of parsing below asks for, several times, and not all is known each time.
        self.parse_known_args = partial(argparse.ArgumentParser.parse_known_args, self)
        try:
            return self._without_unknown(self.parse_known_intermixed_args(args, namespace))
        finally:
            del self.parse_known_args


class _HelpAll(argparse.Action):
    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help(everything=True), end="")
        parser.exit()


def _wrapped(text: str) -> str:
    import textwrap

    width = min(shutil.get_terminal_size().columns, 120) - 2
    return textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False) + "\n"


# ---------------------------------------------------------------------------------------------------------- completion


def parsers(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command, as the words that lead to it, with its parser; the first is the program itself."""
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from parsers(child, (*path, name))


def words_of(parser: argparse.ArgumentParser) -> tuple[list[str], dict[str, list[str]]]:
    """What may follow a command, and the values of its options that have a list of them."""
    words, values = [], {}
    for action in parser._actions:
        if action.help == argparse.SUPPRESS and not action.option_strings:
            continue
        choices = [str(choice) for choice in action.choices or ()]
        if action.option_strings:
            words += action.option_strings
            values |= dict.fromkeys(action.option_strings, choices) if choices else {}
        else:
            words += choices
    return words, values


BASH = """\
_viscpm_hf() {{
    local word path="" next current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        next="${{path:+$path }}$word"
        case "$next" in {paths}) path="$next" ;; esac
    done
    case "$path $before" in
{values}
    esac
    if [ -z "$words" ]; then
        case "$path" in
{words}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _viscpm_hf viscpm-hf
"""


def bash_script(parser: argparse.ArgumentParser) -> str:
    """Completion for bash, of words known now: files are completed where no word fits."""
    paths, values, words = [], [], []
    for path, child in parsers(parser):
        name = " ".join(path)
        if path:
            paths.append(f'"{name}"')
        options, choices = words_of(child)
        words.append(f'            "{name}") words="{" ".join(options)}" ;;')
        values += [f'        "{name} {option}") words="{" ".join(found)}" ;;' for option, found in choices.items()]
    return BASH.format(paths="|".join(paths), values="\n".join(values), words="\n".join(words))


def zsh_script(parser: argparse.ArgumentParser) -> str:
    return "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" + bash_script(parser)


def fish_script(parser: argparse.ArgumentParser) -> str:
    """Completion for fish, with what each option does."""
    lines = []
    for path, child in parsers(parser):
        tests = [f"__fish_seen_subcommand_from {name}" for name in path]
        for action in child._actions:
            is_command = isinstance(action, argparse._SubParsersAction)
            if is_command:
                names = " ".join(action.choices)
                condition = "; and ".join([*tests, f"not __fish_seen_subcommand_from {names}"])
                lines.append(f"complete -c viscpm-hf -f -n '{condition}' -a '{names}'")
            condition = f" -n '{'; and '.join(tests)}'" if tests else ""
            choices = f" -x -a '{' '.join(map(str, action.choices))}'" if action.choices and not is_command else ""
            for option in action.option_strings:
                flag = "-l" if option.startswith("--") else "-s"
                about = (action.help or "").replace("%%", "%").replace("'", "\\'")
                lines.append(f"complete -c viscpm-hf{condition} {flag} {option.lstrip('-')}{choices} -d '{about}'")
    return "\n".join(lines) + "\n"


SCRIPTS = {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}
