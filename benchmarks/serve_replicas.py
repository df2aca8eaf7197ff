"""What a second replica on Ray is worth: the same clients, one replica and then two, each with a core of its own.

    python benchmarks/serve_replicas.py --seconds 30

Each request has four long answers (lists, by `response_format`), so that decoding is what takes the time: proxy and
clients need little of it.
Replicas use one thread each. The last line of the output is one JSON object, which also goes to `--output`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import httpx


QUESTIONS = ("这是什么形状？", "What colour is it?", "描述这张图片。", "Describe the picture.")
WARM_SECONDS = 4.0
LIST = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 40, "maxItems": 40}
# Autoscaling is off: the number of replicas is what is measured.
LIMITS = {"max_rows": 16, "max_waiting": 64}


def bodies(model: str, max_tokens: int, count: int = 64) -> list[dict]:
    return [
        {
            "model": model,
            "max_tokens": max_tokens,
            "n": 4,
            "temperature": 1.0,
            "response_format": {"type": "json_schema", "json_schema": {"name": "list", "schema": LIST}},
            "seed": seed,
            "messages": [{"role": "user", "content": QUESTIONS[seed % len(QUESTIONS)]}],
        }
        for seed in range(count)
    ]


async def load(url: str, clients: int, seconds: float, asked: list[dict]) -> dict:
    """So many clients, each with one request open at a time; what is open in the end is waited for."""
    latencies, counts = [], {"tokens": 0, "errors": 0}
    begin = time.perf_counter()

    async def ask_on(number: int, client: httpx.AsyncClient) -> None:
        turn = number
        while (sent := time.perf_counter()) < begin + seconds:
            response = await client.post(f"{url}/v1/chat/completions", json=asked[turn % len(asked)])
            turn += clients
            if response.status_code != 200:
                counts["errors"] += 1
                continue
            latencies.append(time.perf_counter() - sent)
            counts["tokens"] += response.json()["usage"]["completion_tokens"]

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    used = time.process_time()
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        await asyncio.gather(*(ask_on(number, client) for number in range(clients)))
    seconds = time.perf_counter() - begin
    return {
        "answers": len(latencies),
        "errors": counts["errors"],
        "requests_per_second": len(latencies) / seconds,
        "tokens_per_second": counts["tokens"] / seconds,
        "median_seconds": statistics.median(latencies),
        "p95_seconds": sorted(latencies)[int(0.95 * (len(latencies) - 1))],
        "cores_of_clients": (time.process_time() - used) / seconds,
    }


def measure(arguments: argparse.Namespace, num_replicas: int) -> dict:
    from ray import serve

    from viscpm_hf.serving.ray_app import ChatDeployment

    deployment = ChatDeployment.options(
        num_replicas=num_replicas, max_ongoing_requests=96, ray_actor_options={"num_cpus": 1}
    )
    serve.run(deployment.bind(arguments.model, load={"device": "cpu"}, limits=LIMITS))
    url = f"http://127.0.0.1:{arguments.port}"
    asked = bodies(Path(arguments.model).name, arguments.max_tokens)
    asyncio.run(load(url, arguments.clients, WARM_SECONDS, asked))
    found = {"replicas": num_replicas, **asyncio.run(load(url, arguments.clients, arguments.seconds, asked))}
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="viscpm-tiny")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=30.0, help="of load for each number of replicas")
    parser.add_argument("--port", type=int, default=8321)
    parser.add_argument("--output", type=Path, default=None, help="a file for the JSON")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    import ray
    from ray import serve

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            num_cpus=2,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
            runs = [measure(arguments, count) for count in (1, 2)]
        finally:
            serve.shutdown()
            ray.shutdown()
    one, two = runs
    result = {
        "benchmark": "serve_replicas",
        "model": arguments.model,
        "device": platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "ray": ray.__version__,
        "clients": arguments.clients,
        "max_tokens": arguments.max_tokens,
        "seconds": arguments.seconds,
        "runs": runs,
        "times_one": two["tokens_per_second"] / one["tokens_per_second"],
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
