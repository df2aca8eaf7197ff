"""`transformers serve` with this package imported. It streams through Rust tokenizers alone, so answers come whole."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec

import pytest

from viscpm_hf import VisCPMChat


pytestmark = pytest.mark.skipif(
    not (find_spec("fastapi") and find_spec("uvicorn")), reason="what `transformers serve` needs is not installed"
)
START = "import viscpm_hf; from transformers.cli.transformers import main; main()"
QUESTION = "What colour is the shape?"


@pytest.fixture
def url(chat_folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", START, "serve", str(chat_folder), *options],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            end = time.monotonic() + 120
            while time.monotonic() < end and process.poll() is None:
                with socket.socket() as attempt:
                    if attempt.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            else:
                log.seek(0)
                pytest.fail(log.read()[-3000:])
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            process.kill()
            process.wait()


def test_answers_are_those_of_chat(url, chat_folder, pictures):
    picture = "data:image/png;base64," + base64.b64encode(pictures[0].read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": QUESTION}]
    body = {"model": str(chat_folder), "max_tokens": 12, "messages": [{"role": "user", "content": content}]}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        answer = json.load(reply)["choices"][0]["message"]["content"]
    expected = VisCPMChat(chat_folder, device="cpu").ask(pictures[0], QUESTION, mode="generate", max_new_tokens=12)
    assert answer == expected.answer
