"""How the command line explains itself: examples that hold, suggestions, completion."""

import os
import re
import shlex
import subprocess

import pytest

from viscpm_hf.cli import main
from viscpm_hf.cli.main import build_parser
from viscpm_hf.cli.parsing import SCRIPTS, parsers


def complaint(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_every_command_has_examples_and_they_can_be_read():
    for path, parser in parsers(build_parser()):
        if parser.examples:
            for example in parser.examples:
                words = shlex.split(example)
                if words[0] == "viscpm-hf" and "|" not in words and "--help" not in words:
                    build_parser().parse_args(words[1:])
        else:
            assert path[0] == "eval" and len(path) > 1, path


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--hlep"], "--help"),
        (["chta"], "chat"),
        (["chat", "model", "image", "--num-beems", "3"], "--num-beams"),
        (["paint", "--preset", "fasst", "model", "prompt"], "fast"),
        (["train", "chatt"], "chat"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_one_that_was_meant(capsys, words, meant):
    said = complaint(capsys, *words)
    assert f"Did you mean {meant}?" in said


@pytest.mark.parametrize(
    "command",
    ["chat", "paint", "batch", "inspect", "memory", "convert", "serve", "train chat", "train paint"],
)
def test_common_help_is_a_screen_and_rare_options_are_named(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 35
    if "--help-all" in short:
        with pytest.raises(SystemExit):
            main([*command.split(), "--help-all"])
        every = capsys.readouterr().out
        assert len(every.splitlines()) > len(short.splitlines())
        assert all(name in short for name in re.findall(r"^  (--[a-z[][][a-z-]+)", every, re.M))
    assert command != "serve" or "--cors-origin ORIGIN" in short  # what an option takes is told, whatever is left out


def test_one_mode_of_training(capsys):
    for words in (["--full"], ["--mode", "full"]):
        assert build_parser().parse_args(["train", "chat", *words]).mode == "full"
    assert "there is one mode, lora or full" in complaint(capsys, "train", "chat", "--lora", "--full")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (["viscpm-hf", "comp"], "completion"),
        (["viscpm-hf", "chat", "--num-b"], "--num-beams"),
        (["viscpm-hf", "chat", "model", "--mode", "ref"], "reference"),
        (["viscpm-hf", "train", "ch"], "chat"),
    ],
)
def test_bash_completes(capsys, line, found):
    main(["completion", "bash"])
    script = capsys.readouterr().out
    words = " ".join(shlex.quote(word) for word in line)
    ask = f'COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}; _viscpm_hf; echo "${{COMPREPLY[@]}}"'
    run = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True)
    assert run.stdout.split() == [found], run.stderr


def test_every_shell_gets_all_options():
    parser = build_parser()
    for write in SCRIPTS.values():
        script = write(parser)
        assert "temperature" in script and "max-shard-size" in script


def test_converting_what_is_converted_says_so(capsys, tmp_path):
    assert main(["convert", "viscpm-tiny", "--kind", "chat", os.fspath(tmp_path / "out")]) == 0
    assert "Nothing was to do" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
