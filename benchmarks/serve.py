"""The HTTP API under load: 1, 4, 16 and 64 clients that ask one question after another.

    python benchmarks/serve.py                      # the embedded model, a minute each, then ten minutes of memory
    python benchmarks/serve.py --model DIR --device cuda --seconds 60

With the same clients another server is measured, one that puts a lock around `VisCPMChat.ask`: what batching is worth
is the ratio of the two. Server and clients are processes of their own on one machine, so on few cores the clients take
their part of what is measured. The last line of the output is one JSON object, which also goes to `--output`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import torch
import transformers
from fastapi import FastAPI

from viscpm_hf import VisCPMChat
from viscpm_hf.images import decode_image
from viscpm_hf.serving.images import read_data_uri
from viscpm_hf.serving.schemas import AnswerMessage, ChatCompletion, ChatCompletionRequest, Choice, Usage
from viscpm_hf.serving.server import bind, serve
from viscpm_hf.shapes import draw, make_scene


CLIENTS = (1, 4, 16, 64)
MAX_TOKENS = 32
QUESTIONS = (
    "这是什么形状？",
    "What colour is it?",
    "描述这张图片。",
    "Describe the picture.",
    "有几个图形？",
    "Is there a star?",
)


@dataclass
class Load:
    """What came of so many clients."""

    clients: int
    seconds: float
    answers: int
    refused: int
    """429: the queue was full."""
    errors: int
    requests_per_second: float
    tokens_per_second: float
    median_seconds: float
    p95_seconds: float


class Process:
    """A server process that says where it listens on its stderr."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        ready: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(ready,), daemon=True).start()
        self.url = ready.get(timeout=900)
        if self.url is None:
            raise SystemExit(f"the server did not start: {' '.join(command)}")

    def _read(self, ready: queue.Queue) -> None:
        for line in self.process.stderr:
            if '"event": "listening"' in line:
                ready.put(json.loads(line)["url"])
        ready.put(None)

    def rss_anon(self) -> int:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


# ------------------------------------------------------------------------------------------------------- what is asked


def pictures(count: int) -> list[str]:
    """Data URIs of scenes of the demo's world."""
    uris = []
    for index in range(count):
        file = io.BytesIO()
        draw(make_scene("test", index)).save(file, "PNG")
        uris.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return uris


def bodies(model: str, count: int = 24) -> list[dict]:
    return [
        {
            "model": model,
            "max_tokens": MAX_TOKENS,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": uri}},
                        {"type": "text", "text": QUESTIONS[index % len(QUESTIONS)]},
                    ],
                }
            ],
        }
        for index, uri in enumerate(pictures(count))
    ]


async def ask_for(url: str, clients: int, seconds: float, model: str) -> Load:
    """So many clients, each with one request open at a time."""
    asked = bodies(model)
    latencies: list[float] = []
    counts = {"refused": 0, "errors": 0, "tokens": 0}
    begin = time.perf_counter()
    end = begin + seconds

    async def ask_on(number: int, client: httpx.AsyncClient) -> None:
        turn = number
        while time.perf_counter() < end:
            sent = time.perf_counter()
            try:
                response = await client.post(f"{url}/v1/chat/completions", json=asked[turn % len(asked)])
            except httpx.HTTPError:
                counts["errors"] += 1
                continue
            turn += clients
            if response.status_code == 200:
                latencies.append(time.perf_counter() - sent)
                counts["tokens"] += response.json()["usage"]["completion_tokens"]
            elif response.status_code == 429:
                counts["refused"] += 1
                await asyncio.sleep(float(response.headers["retry-after"]))
            else:
                counts["errors"] += 1
                print(f"{response.status_code}: {response.text[:300]}", file=sys.stderr)

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        await asyncio.gather(*(ask_on(number, client) for number in range(clients)))
    taken = time.perf_counter() - begin
    if not latencies:
        raise SystemExit(f"the server at {url} gave {clients} clients no answer in {taken:.0f} s")
    latencies.sort()
    return Load(
        clients=clients,
        seconds=taken,
        answers=len(latencies),
        refused=counts["refused"],
        errors=counts["errors"],
        requests_per_second=len(latencies) / taken,
        tokens_per_second=counts["tokens"] / taken,
        median_seconds=statistics.median(latencies),
        p95_seconds=latencies[int(0.95 * (len(latencies) - 1))],
    )


# ---------------------------------------------------------------------------------------------------- the other server


def serve_with_lock(model: str, device: str) -> None:
    """The same route, answered by one `ask` at a time."""
    chat, lock, app = VisCPMChat(model, device=device), threading.Lock(), FastAPI()

    @app.post("/v1/chat/completions")
    def answer(body: ChatCompletionRequest) -> ChatCompletion:
        image, text = body.messages[-1].content
        picture = decode_image(read_data_uri(image.image_url.url))
        with lock:
            turn = chat.ask(picture, text.text, mode="generate", max_new_tokens=body.max_tokens)
        return ChatCompletion(
            model=body.model,
            choices=[Choice(index=0, message=AnswerMessage(content=turn.answer), finish_reason="stop")],
            usage=Usage(prompt_tokens=0, completion_tokens=turn.num_tokens, total_tokens=turn.num_tokens),
        )

    serve(app, bind("127.0.0.1", 0))


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(arguments: argparse.Namespace, command: list[str], clients: tuple[int, ...], what: str) -> list[Load]:
    server = Process(command)
    try:
        asyncio.run(ask_for(server.url, 4, min(5.0, arguments.seconds), arguments.name))  # warm
        loads = []
        for count in clients:
            load = asyncio.run(ask_for(server.url, count, arguments.seconds, arguments.name))
            print(
                f"{what}, {count} clients: {load.requests_per_second:.1f} requests/s, median "
                f"{load.median_seconds * 1000:.0f} ms, p95 {load.p95_seconds * 1000:.0f} ms, {load.refused} refused, "
                f"{load.errors} errors",
                file=sys.stderr,
                flush=True,
            )
            loads.append(load)
        return loads
    finally:
        server.stop()


def measure_memory(arguments: argparse.Namespace, command: list[str]) -> dict:
    """RssAnon of the server over minutes of load."""
    server = Process(command)
    try:
        asyncio.run(ask_for(server.url, 16, min(60.0, arguments.memory_seconds / 10), arguments.name))
        samples = [server.rss_anon()]
        parts = 10
        for _ in range(parts):
            asyncio.run(ask_for(server.url, 16, arguments.memory_seconds / parts, arguments.name))
            samples.append(server.rss_anon())
    finally:
        server.stop()
    return {
        "seconds": arguments.memory_seconds,
        "rss_anon_mb": [round(sample / 1e6, 1) for sample in samples],
        "growth": samples[-1] / samples[0] - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="viscpm-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load for each number of clients")
    parser.add_argument("--memory-seconds", type=float, default=600.0)
    parser.add_argument("--output", type=Path, default=None, help="a file for the JSON")
    parser.add_argument("--with-lock", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.with_lock:
        serve_with_lock(arguments.model, arguments.device)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    arguments.name = Path(arguments.model).name
    common = ["--device", arguments.device]
    ours = [sys.executable, "-m", "viscpm_hf.cli", "serve", arguments.model, "--port", "0", *common]
    locked = [sys.executable, __file__, "--with-lock", "--model", arguments.model, *common]
    with_lock = measure(arguments, locked, (1, 16), "with a lock")
    loads = measure(arguments, ours, CLIENTS, "served")
    memory = measure_memory(arguments, ours)
    by_clients = {load.clients: load for load in loads}
    result = {
        "benchmark": "serve",
        "model": arguments.model,
        "device": torch.cuda.get_device_name()
        if arguments.device.startswith("cuda")
        else platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "max_tokens": MAX_TOKENS,
        "served": [asdict(load) for load in loads],
        "with_lock": [asdict(load) for load in with_lock],
        "times_lock_at_16": by_clients[16].requests_per_second / with_lock[-1].requests_per_second,
        "memory": memory,
    }
    text = json.dumps(result)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
