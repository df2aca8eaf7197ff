"""A real server process, and what talks to it."""

from __future__ import annotations

import base64
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai


class Server:
    """`viscpm-hf serve` as users start it, on a free port of the loopback."""

    def __init__(self, *arguments: str | os.PathLike):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "viscpm_hf.cli", "serve", *map(os.fspath, arguments), "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []
        ready: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(ready,), daemon=True)
        self._reader.start()
        self.url = ready.get(timeout=180)
        if self.url is None:
            raise RuntimeError("the server did not start:\n" + "\n".join(self.lines))

    def _read(self, ready: queue.Queue) -> None:
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if '"event": "listening"' in line:
                ready.put(json.loads(line)["url"])
        ready.put(None)

    @property
    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def metric(self, name: str) -> float:
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.split(" ")[0] == name:
                return float(line.split(" ")[1])
        raise KeyError(name)

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(with_signal)
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            self._reader.join()


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def question(text: str, image: str | None = None) -> list[dict]:
    """Messages of one question."""
    parts = [] if image is None else [{"type": "image_url", "image_url": {"url": image}}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
