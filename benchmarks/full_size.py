"""VisCPM-Chat's original file at full size on a GPU: in memory, quantised, and spread over GPU, RAM, disk, two GPUs.

    python benchmarks/full_size.py                   # an H100 or H200, 64 GB of RAM; writes 20.6 GB, and removes them
    python benchmarks/full_size.py --ways nf4 disk   # only these
    python benchmarks/full_size.py --tiny            # a small file, on the CPU where there is no GPU

The weights are random. Every way loads the file and answers the same question: seconds, gigabytes of the GPU after
loading and at the peak, tokens a second, whether the logits are finite and how close they are to half precision's, and
for spread models whether the answer is the one that the model gives in one piece. The last line printed is one JSON
object; the exit status is 1 if a way failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from chat import log
from convert import write_checkpoint
from PIL import Image

import viscpm_hf
from viscpm_hf import VisCPMChat


CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
QUESTION = "What is in this picture?"
# Tokens of an answer, and of one for which layers are moved at every token.
TOKENS, SPREAD_TOKENS = 32, 3
FILE_GB = 20.6
# Half precision first: the others are compared with it.
WAYS = ("half", "nf4", "ram", "disk", "int8", "int4wo", "int8wo", "two_gpus")
# Gigabytes that weights may take on the GPU: docs/quantization.md and 5 %.
MOST_GB = {"half": 21.7, "nf4": 7.1, "int8": 11.8, "int4wo": 7.3, "int8wo": 11.8}


def options_of(way: str, tiny: bool) -> dict[str, Any]:
    """Arguments of `VisCPMChat`.

    Raises:
        ValueError: for what can't be on this machine.
    """
    half = {"dtype": "float16" if CUDA else "float32"}
    if way in ("ram", "disk", "two_gpus") and not CUDA and way != "disk":
        raise ValueError("there is no GPU to share a model with")
    if way == "two_gpus" and torch.cuda.device_count() < 2:
        raise ValueError(f"there are {torch.cuda.device_count()} GPUs")
    on_gpu, in_ram = ("1500KB", "10MB") if tiny else ("8GB", "16GB")
    if way == "ram":
        return {**half, "device_map": "auto", "max_memory": {0: on_gpu, "cpu": in_ram}}
    if way == "disk":
        return {**half, "device_map": "auto", "max_memory": {0: on_gpu, "cpu": 0} if CUDA else {"cpu": on_gpu}}
    if way == "two_gpus":
        return {**half, "device_map": "balanced"}
    if way == "half":
        return {**half, "device": DEVICE}
    if way == "int4wo" and not CUDA:
        raise ValueError("torchao's int4 needs a GPU")
    return {"device": DEVICE, "quantization": way, **({} if way in ("int4wo", "int8wo") else half)}


def places_of(model: torch.nn.Module) -> dict[str, int]:
    """Parameters by device; `meta` are those on the disk."""
    places: dict[str, int] = {}
    for parameter in model.parameters():
        places[str(parameter.device)] = places.get(str(parameter.device), 0) + parameter.numel()
    return places


def gigabytes(function: str) -> float | None:
    return getattr(torch.cuda, function)() / 1e9 if CUDA else None


def next_logits(chat: VisCPMChat, image: Image.Image) -> torch.Tensor:
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    messages = [[{"role": "user", "content": content}]]
    inputs = chat.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    inputs = inputs.to(chat.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(chat.model.dtype)
    with torch.no_grad():
        logits = chat.model(**inputs, logits_to_keep=1).logits[0, -1]
    return logits[: chat.processor.tokenizer.num_words].float().cpu()


def measure(way: str, weights: Path, tiny: bool, known: dict[str, Any]) -> dict[str, Any]:
    """Args:
    known: what half precision answered and its logits; filled by that way.
    """
    options = options_of(way, tiny)
    is_spread = "device_map" in options
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    chat = VisCPMChat(weights, **options)
    if CUDA:
        torch.cuda.synchronize()
    figures: dict[str, Any] = {
        "load_seconds": time.perf_counter() - begin,
        "held_gb": gigabytes("memory_allocated"),
        "peak_loading_gb": gigabytes("max_memory_allocated"),
        "parameters_by_place": places_of(chat.model),
    }
    image = Image.effect_noise((448, 448), 80).convert("RGB") if not known else known["image"]
    count = SPREAD_TOKENS if is_spread else TOKENS
    tokens = {"mode": "generate", "min_new_tokens": count, "max_new_tokens": count}
    if not is_spread:
        chat.ask(image, QUESTION, mode="generate", max_new_tokens=2)  # kernels are chosen and loaded
    turn = chat.ask(image, QUESTION, **tokens)
    figures |= {"answer_seconds": turn.seconds, "tokens_per_second": turn.tokens_per_second}
    if is_spread:
        figures["same_answer"] = turn.answer == known["few"]
    else:
        logits = next_logits(chat, image)
        if way == "half":
            few = {**tokens, "min_new_tokens": SPREAD_TOKENS, "max_new_tokens": SPREAD_TOKENS}
            known |= {"image": image, "logits": logits, "few": chat.ask(image, QUESTION, **few).answer}
        figures["finite"] = bool(logits.isfinite().all())
        figures["cosine_to_half"] = torch.cosine_similarity(logits, known["logits"], dim=0).item()
    figures["peak_gb"] = gigabytes("max_memory_allocated")
    figures["kept"] = figures.get("same_answer", True) and figures.get("finite", True)
    if CUDA and not tiny and way in MOST_GB:
        figures["kept"] &= figures["held_gb"] <= MOST_GB[way]
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}


def write_tiny(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from quantization_support import write_chat

    write_chat(folder)


def scratch(tiny: bool) -> str | None:
    """Where there is room: in RAM, whose speed is known, else beside this file."""
    room = 0 if tiny else 1.2 * FILE_GB * 1e9
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free > room:
        return str(shared)
    folder = Path(__file__).parent / ".scratch"
    folder.mkdir(exist_ok=True)
    return str(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small file")
    parser.add_argument("--ways", nargs="+", choices=WAYS[1:], default=WAYS[1:], help="beside half precision")
    parser.add_argument("--scratch", default=None, help="folder with room for the file; /dev/shm if there is enough")
    parser.add_argument("--as-it-comes", action="store_true", help="print the JSON anew after every way")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    report: dict[str, Any] = {
        "benchmark": "full_size",
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, viscpm_hf)},
        "ways": {},
        "skipped": {},
        "failed": {},
    }
    known: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch or scratch(options.tiny)) as folder:
        begin = time.perf_counter()
        write_tiny(Path(folder)) if options.tiny else write_checkpoint(Path(folder), "chat", 48)
        weights = Path(folder) / "pytorch_model.bin"
        report |= {"file_gb": weights.stat().st_size / 1e9, "write_seconds": round(time.perf_counter() - begin, 1)}
        for way in ("half", *options.ways):
            try:
                report["ways"][way] = measure(way, weights, options.tiny, known)
            except (ImportError, ValueError) as error:
                report["skipped"][way] = str(error)[:500]
            except Exception as error:
                traceback.print_exc()
                report["failed"][way] = f"{type(error).__name__}: {str(error)[:500]}"
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
            log(f"{way}: {[report[it].get(way) for it in ('ways', 'skipped', 'failed') if way in report[it]]}")
            if options.as_it_comes:
                print(json.dumps(report), flush=True)
    print(json.dumps(report))
    return 1 if report["failed"] or not all(it["kept"] for it in report["ways"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
