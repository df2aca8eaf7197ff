"""Speed of fast decoding: the growing cache, fixed shapes, compiled graphs, fused projections, quantised weights.

    python benchmarks/fast.py            # CPU, fp32: 12 layers, width 1024; some minutes, 4 GB
    python benchmarks/fast.py --cuda     # CUDA, fp16: full size, random weights; 45 GB of GPU memory
    python benchmarks/fast.py --quick    # does it run at all

Weights are random and seeded, nothing is downloaded. The floor is reading all weights that a step reads, measured
beside every way to decode. The last line printed is one JSON object. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from chat import QUESTION, Bandwidth, build, device_name, generate, log, prompt_inputs, search, seconds
from chat import synthetic_vocabulary as synthetic_words
from torch import nn

import viscpm_hf
from viscpm_hf.loading.quantization import quantization_config


# Bytes of a quantised weight, its share of the scales included.
WEIGHT_BYTES = {"int8wo": 1.0, "int4wo": 0.53, "nf4": 0.5625}

# Targets on the CPU and, of the full size, on an H100: (figure, limit, whether the limit is a maximum).
CPU_TARGETS = (("share_of_floor fused and compiled, 1 beam", 0.90, False),)
CUDA_TARGETS = (
    ("tokens_per_second compiled, greedy", 120, False),
    ("tokens_per_second int8wo, greedy", 180, False),
    ("tokens_per_second int4wo, greedy", 230, False),
    ("step ratio of 3 beams", 1.3, True),
    ("throughput ratio of batch 16", 8, False),
)


@dataclass(frozen=True)
class Way:
    """One way to decode."""

    name: str
    run: Callable[[], Any]
    """Returns a `Clock`."""
    rows: int = 1


class DeviceBandwidth:
    """As `Bandwidth`, on CUDA: seconds to read as many bytes as a step does, from the best of several large copies."""

    def __init__(self, num_bytes: float, device: torch.device):
        self.num_bytes = num_bytes
        self.source = torch.empty(2**31, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)

    def measure(self, repeats: int) -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        self.target.copy_(self.source)
        for event in events[:-1]:
            event.record()
            self.target.copy_(self.source)
        events[-1].record()
        torch.cuda.synchronize()
        times = [before.elapsed_time(after) / 1e3 for before, after in zip(events, events[1:], strict=False)]
        return min(times) * self.num_bytes / (2 * self.source.numel())


def quantize(model, name: str) -> None:
    """Quantises the language model's layers in place."""
    layers = model.language_model().layers
    if name != "nf4":
        from torchao.quantization import quantize_

        quantize_(layers, quantization_config(name, model.dtype).quant_type)
        return
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in list(layers.modules()):
        for child_name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                linear = Linear4bit(
                    child.in_features, child.out_features, bias=False, quant_type="nf4", compute_dtype=model.dtype
                )
                linear.weight = Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, child_name, linear.to(model.device))


def bytes_per_step(model, quantization: str | None) -> float:
    layers = sum(parameter.numel() for parameter in model.language_model().layers.parameters())
    size = model.dtype.itemsize
    return layers * WEIGHT_BYTES.get(quantization, size) + model.lm_head.weight.numel() * size


def set_decoder(model, *, fast: bool, compile: bool = False) -> None:
    decoder = model.fast_decoder
    decoder.enabled, decoder.compile = fast, compile


def measure(way: Way, bandwidth, rounds: int) -> dict[str, Any]:
    """The best round, which the other processes of the machine disturbed least."""
    first = seconds(way.run)  # compiles
    samples = []
    for _ in range(rounds):
        before = bandwidth.measure(3)
        clock = way.run()
        floor = min(before, bandwidth.measure(3))
        step = median(clock.steps)
        samples.append({"ms_per_step": 1e3 * step, "floor_ms": 1e3 * floor, "share_of_floor": floor / step})
    best = min(samples, key=lambda sample: sample["ms_per_step"])
    row = {
        "way": way.name,
        "first_seconds": first,
        **best,
        "median_share_of_floor": median(sample["share_of_floor"] for sample in samples),
        "tokens_per_second": 1e3 * way.rows / best["ms_per_step"],
        "bytes_per_step": bandwidth.num_bytes,
    }
    log(f"{way.name}: {best['ms_per_step']:.2f} ms, floor {best['floor_ms']:.2f} ms, {best['share_of_floor']:.0%}")
    return row


def repeated(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    return {name: tensor.repeat(rows, *[1] * (tensor.ndim - 1)) for name, tensor in inputs.items()}


def ways_of(model, inputs, segments, name: str, length: int, *, everything: bool) -> Iterator[Way]:
    yield Way(f"{name}, 1 beam", lambda: search(model, inputs, segments, 1, length))
    yield Way(f"{name}, greedy", lambda: generate(model, inputs, length))
    if everything:
        yield Way(f"{name}, 3 beams", lambda: search(model, inputs, segments, 3, length))
        batch = repeated(inputs, 16)
        yield Way(f"{name}, greedy, batch 16", lambda: generate(model, batch, length), rows=16)


def measure_all(args: argparse.Namespace, vocab_file: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    def fresh(quantization: str | None = None):
        gc.collect()
        half = torch.bfloat16 if quantization == "int4wo" else torch.float16  # its kernel knows bf16 alone
        with torch.device(device):
            torch.set_default_dtype(half if device.type == "cuda" else torch.float32)
            model, processor = build(args, vocab_file)
            torch.set_default_dtype(torch.float32)
        inputs, segments = prompt_inputs(model, processor, QUESTION * (3 if device.type == "cuda" else 1))
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        return model, inputs, segments

    def bandwidth_of(model, quantization=None):
        if device.type == "cuda":
            return DeviceBandwidth(bytes_per_step(model, quantization), device)
        return Bandwidth(model)

    def run(name: str, bandwidth, *, everything: bool = False) -> Iterator[dict[str, Any]]:
        for length in args.lengths:
            for way in ways_of(model, inputs, segments, name, length, everything=everything):
                yield {"length": length, **measure(way, bandwidth, args.rounds)}

    model, inputs, segments = fresh()
    bandwidth = bandwidth_of(model)
    set_decoder(model, fast=False)
    yield from run("growing cache", bandwidth, everything=True)
    set_decoder(model, fast=True)
    yield from run("static", bandwidth)
    set_decoder(model, fast=True, compile=True)
    yield from run("compiled", bandwidth)
    model.fuse_projections()
    yield from run("fused and compiled", bandwidth_of(model), everything=True)
    for quantization in args.quantizations:
        del model, bandwidth
        model, inputs, segments = fresh(quantization)
        bandwidth = bandwidth_of(model, quantization)  # before: on a CPU the floor stays that of the full weights
        try:
            quantize(model, quantization)
        except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
            log(f"{quantization}: {error}")
            continue
        set_decoder(model, fast=False)
        yield from run(quantization, bandwidth)
        set_decoder(model, fast=True, compile=True)
        yield from run(f"{quantization}, compiled", bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cuda", action="store_true", help="the full size in fp16 on the GPU")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a tiny model, one round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden-size", type=int, help="a multiple of 128")
    parser.add_argument("--lengths", type=int, nargs="+", help="answer lengths")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantizations", nargs="*", choices=WEIGHT_BYTES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = torch.device("cuda" if args.cuda else "cpu")
    defaults = (
        (48, 4096, [256], ["int8wo", "int4wo", "nf4"]) if args.cuda else (12, 1024, [32, 256], ["int8wo", "nf4"])
    )
    if args.quick:
        args.rounds, defaults = 1, (2, 128, [8], ["int8wo", "nf4"])
    for name, default in zip(("layers", "hidden_size", "lengths", "quantizations"), defaults, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, default)
    torch.set_num_threads(args.threads)

    with tempfile.TemporaryDirectory() as folder:
        vocab_file = Path(folder) / "vocab.txt"
        vocab_file.write_text("".join(f"{word}\n" for word in synthetic_words(args.seed)), encoding="utf-8")
        rows = list(measure_all(args, vocab_file, device))

    by_way = {(row["way"], row["length"]): row for row in rows}
    report: dict[str, Any] = {
        "benchmark": "fast",
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "device": torch.cuda.get_device_name() if args.cuda else device_name(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "dtype": "float16" if args.cuda else "float32",
        "versions": {
            "viscpm_hf": viscpm_hf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "model": {"layers": args.layers, "hidden_size": args.hidden_size, "seed": args.seed},
        "decoding": rows,
    }
    if args.cuda:
        report["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
    for length in args.lengths:
        one, three = by_way["fused and compiled, 1 beam", length], by_way["fused and compiled, 3 beams", length]
        greedy, batch = (
            by_way["fused and compiled, greedy", length],
            by_way["fused and compiled, greedy, batch 16", length],
        )
        figures = {
            "share_of_floor fused and compiled, 1 beam": one["share_of_floor"],
            "tokens_per_second compiled, greedy": by_way["compiled, greedy", length]["tokens_per_second"],
            "step ratio of 3 beams": three["ms_per_step"] / one["ms_per_step"],
            "throughput ratio of batch 16": batch["tokens_per_second"] / greedy["tokens_per_second"],
        }
        for name in args.quantizations:
            if (f"{name}, compiled, greedy", length) in by_way:
                figures[f"tokens_per_second {name}, greedy"] = by_way[f"{name}, compiled, greedy", length][
                    "tokens_per_second"
                ]
        report[f"figures_{length}"] = figures

    print(f"{report['device']}, {args.threads} threads, torch {torch.__version__}, {report['dtype']}\n")
    columns = ("length", "ms/step", "tok/s", "floor", "of it", "median", "first s")
    print(f"{'decoding':38}" + "".join(f"{column:>9}" for column in columns))
    for row in rows:
        print(
            f"{row['way']:38}{row['length']:>9}{row['ms_per_step']:>9.2f}{row['tokens_per_second']:>9.1f}"
            f"{row['floor_ms']:>9.2f}{row['share_of_floor']:>9.0%}{row['median_share_of_floor']:>9.0%}"
            f"{row['first_seconds']:>9.1f}"
        )
    print()
    for length in args.lengths:
        for name, limit, is_maximum in CUDA_TARGETS if args.cuda else CPU_TARGETS:
            value = report[f"figures_{length}"].get(name)
            if value is not None:
                kept = value <= limit if is_maximum else value >= limit
                verdict = "kept" if kept else "MISSED"
                print(f"{name:46}{length:>6}{value:>9.2f} {'<=' if is_maximum else '>='} {limit:<6} {verdict}")
    print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    main()
