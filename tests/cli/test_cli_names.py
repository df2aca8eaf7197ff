"""Names of models that aren't here: what can't be a repository is asked of nobody, and nobody is waited for."""

import socket
import time

import pytest
from huggingface_hub import constants
from support import GOLDEN

from viscpm_hf.cli import main, network


IMAGE = str(GOLDEN / "chat_a" / "image_0.png")
COMMANDS = {
    "chat": lambda name: ["chat", name, IMAGE, "hi"],
    "paint": lambda name: ["paint", name, "hi", "-o", "x.png"],
    "inspect": lambda name: ["inspect", name],
    "convert": lambda name: ["convert", name, "out"],
    "memory": lambda name: ["memory", name],
}


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A Hub that nobody answers for; its addresses are those that were looked up."""
    asked = []
    real = socket.create_connection

    def connect(address, *arguments, **keywords):
        asked.append(address)
        return real(address, *arguments, **keywords)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(network, "look", network._Look())
    monkeypatch.setattr(network.urllib.request, "getproxies", dict)
    monkeypatch.chdir(tmp_path)
    return asked


NAMES = ["model.bin", "some/model.pt", "a/b/model.bin/", "viscpm_tiny", "VisCPM-Tiny", "viscpm-tinny", "/nowhere",
         "./openbmb/VisCPM-Chat", "~/nowhere", "bare-name", "a b/c", "\x1b[2Jx.bin"]  # fmt: skip


def sentence(capsys) -> str:
    """The one that says what is wrong; libraries may say something about themselves."""
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("viscpm-hf: error: "))
    assert line.isprintable()
    return line


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_can_not_be_a_repository_is_asked_of_nobody(capsys, online, command, name):
    assert main(COMMANDS[command](name)) == 1
    error = sentence(capsys)
    assert "There is no" in error
    assert ("is called viscpm-tiny" in error) == ("tin" in name.lower())
    assert not online


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hub_that_can_not_be_reached_is_asked_once(capsys, online, command):
    begin = time.monotonic()
    assert main(COMMANDS[command]("owner/name")) == 1
    assert time.monotonic() - begin < 15  # of which nearly all is importing
    assert "owner/name" in sentence(capsys)
    assert len(online) <= 1
