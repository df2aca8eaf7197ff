"""The files of `examples/serving`: their commands exist, and so does what they watch."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from support import Golden

from viscpm_hf.cli.main import build_parser
from viscpm_hf.serving.engine import ChatEngine
from viscpm_hf.serving.metrics import Metrics


FOLDER = Path(__file__).parents[2] / "examples" / "serving"
CONTAINERS = ("Containerfile.cpu", "Containerfile.cuda")


def served(arguments):
    return build_parser().parse_args(["serve", *arguments])


def test_the_unit_starts_a_server_that_only_this_machine_sees():
    lines = (FOLDER / "viscpm-hf.service").read_text("utf-8").splitlines()
    (command,) = (line.partition("=")[2] for line in lines if line.startswith("ExecStart="))
    program, name, *arguments = shlex.split(command)
    assert Path(program).name == "viscpm-hf" and name == "serve"
    given = served(arguments)
    assert given.host == "127.0.0.1" and given.api_key_file


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_serve_with_a_key_and_as_nobody_special(name):
    text = (FOLDER / name).read_text("utf-8")
    instructions = re.findall(r"^([A-Z]+) (.*(?:\\\n.*)*)", text, re.MULTILINE)
    last = dict(instructions)
    assert yaml.safe_load(last["ENTRYPOINT"]) == ["viscpm-hf", "serve"]
    given = served(yaml.safe_load(last["CMD"]))
    assert given.api_key_file and given.device == name.partition(".")[2]
    assert int(last["USER"]) > 0 and given.port == int(last["EXPOSE"])
    for kind, sources in instructions:
        if kind == "COPY":
            assert all((FOLDER.parents[1] / source).exists() for source in sources.split()[:-1]), sources


def test_alerts_watch_what_there_is():
    engine = ChatEngine(Golden("chat_a").load_chat())
    metrics = Metrics(engine, None)
    engine.close()
    metrics.note_request("POST", "/v1/chat/completions", 200, 0.1)
    known = set(re.findall(r"^(viscpm_\w+)", metrics.text().decode(), re.MULTILINE))
    (group,) = yaml.safe_load((FOLDER / "alerts.yml").read_text("utf-8"))["groups"]
    watched = {name for rule in group["rules"] for name in re.findall(r"viscpm_\w+", rule["expr"])}
    assert len(watched) >= 5 and watched <= known
