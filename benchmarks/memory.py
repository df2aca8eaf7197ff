"""VisCPM-Chat at full size on a machine without GPU: quantised, or offloaded to the disk, from the original file.

    python benchmarks/memory.py                     # 20.6 GB of disk in --scratch, kept for the next run
    python benchmarks/memory.py --layers 4          # the same, smaller
    python benchmarks/memory.py --steps nf4 4bit    # only these

Every step runs in a process of its own, with the file dropped from the page cache: it loads the file, then answers a
question about a picture with 16 tokens (greedy); `tokens_per_second` are those of the second answer, its prompt
included, `seconds_of_a_step` are those without it. `RssAnon` is what the process itself needs; pages of the mapped
file, which count in `RSS`, can be taken back at any time. The weights are random, so the answers mean nothing. The
last line of the output is one JSON object, which also goes to `--output`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from convert import SAMPLE_SECONDS, drop_cache, memory_of, write_checkpoint


# Arguments of `VisCPMChat`, and what RssAnon may be in GB.
STEPS = {
    "4bit": ({"quantization": "4bit"}, 8),
    "4bit-embedding": ({"quantization": "4bit", "quantize_embedding": True}, 8),
    "8bit": ({"quantization": "8bit"}, 14),
    "8bit-embedding": ({"quantization": "8bit", "quantize_embedding": True}, 14),
    "nf4": ({"quantization": "nf4"}, 10),
    "int8": ({"quantization": "int8"}, 14),
    "disk": ({"dtype": "float16", "device_map": "auto", "max_memory": {"cpu": "5GB"}}, 8),
}
NEW_TOKENS = 16
QUESTION = "What is in this picture?"


def read(weights: Path) -> dict[str, float]:
    """Reads the file once, as the yardstick of loading it."""
    drop_cache(weights)
    buffer = bytearray(16 * 2**20)
    begin = time.perf_counter()
    with open(weights, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return {"seconds": time.perf_counter() - begin}


def load_and_answer(weights: Path, options: dict) -> dict[str, float]:
    from PIL import Image

    from viscpm_hf.chat.chat import VisCPMChat

    drop_cache(weights)
    begin = time.perf_counter()
    where = {} if "device_map" in options else {"device": "cpu"}
    chat = VisCPMChat(weights, **where, **options)
    loaded = time.perf_counter()
    print(json.dumps({"loaded": True}), flush=True)
    tokens = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    first = chat.ask(Image.new("RGB", (640, 480), "red"), QUESTION, mode="generate", **tokens)
    answer = {"first_answer_seconds": first.seconds, "tokens": first.num_tokens}
    if "device_map" not in options:  # the second finds everything unpacked and read
        second = chat.ask(None, QUESTION, "", first.vision_hidden_states, mode="generate", **tokens)
        answer["tokens_per_second"] = second.tokens_per_second
        one = {"min_new_tokens": 1, "max_new_tokens": 1}
        short = chat.ask(None, QUESTION, "", first.vision_hidden_states, mode="generate", **one)
        answer["seconds_of_a_step"] = (second.seconds - short.seconds) / (second.num_tokens - short.num_tokens)
    else:
        answer["tokens_per_second"] = first.tokens_per_second
    return {"seconds": loaded - begin, **answer}


def run_step(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Runs a step of this script in a process of its own, and watches its memory."""
    command = [sys.executable, __file__, "--step", name, "--scratch", str(arguments.scratch)]
    process = subprocess.Popen(
        [*command, "--layers", str(arguments.layers)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    peaks = {"peak_rss_anon_gb": 0.0, "peak_rss_anon_loading_gb": 0.0}
    is_loaded = threading.Event()

    def watch() -> None:
        while process.poll() is None:
            try:
                anon = memory_of(process.pid)[0] / 1e9
            except (OSError, KeyError):  # it is gone
                return
            for key in list(peaks)[: 1 if is_loaded.is_set() else 2]:
                peaks[key] = max(peaks[key], anon)
            time.sleep(SAMPLE_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    values = {}
    for line in process.stdout:
        values = json.loads(line)
        is_loaded.set()
    watcher.join()
    if process.wait() or not values:
        raise SystemExit(f"step {name} failed with exit status {process.returncode}")
    result = {key: round(value, 3) for key, value in {**values, **peaks}.items()}
    print(f"{name}: {result}", file=sys.stderr, flush=True)
    return result


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def summary(arguments: argparse.Namespace, steps: dict[str, dict]) -> dict:
    import bitsandbytes
    import transformers

    reading = steps["read"]["seconds"]
    for name, values in steps.items():
        if name != "read":
            values["time_to_reading"] = round(values["seconds"] / reading, 2)
            values["target_rss_anon_gb"] = STEPS[name][1]
    return {
        "benchmark": "memory",
        "layers": arguments.layers,
        "gb": round(weights_of(arguments).stat().st_size / 1e9, 2),
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {memory_gb():.0f} GB",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, bitsandbytes)},
        },
        "steps": steps,
    }


def memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def weights_of(arguments: argparse.Namespace) -> Path:
    return arguments.scratch / f"chat-{arguments.layers}" / "pytorch_model.bin"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48, help="of the language model; 48 is the real size")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--scratch", type=Path, default=Path(__file__).parent / ".scratch")
    parser.add_argument("--output", type=Path, help="keep the result in this file")
    parser.add_argument("--step", choices=("read", *STEPS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    weights = weights_of(arguments)
    if arguments.step:
        step = read(weights) if arguments.step == "read" else load_and_answer(weights, STEPS[arguments.step][0])
        print(json.dumps(step))
        return
    if not (weights.parent / "vocab.txt").is_file():  # what is written last
        write_checkpoint(weights.parent, "chat", arguments.layers)
    result = summary(arguments, {name: run_step(name, arguments) for name in ("read", *arguments.steps)})
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
