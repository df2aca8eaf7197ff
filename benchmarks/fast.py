"""Speed of fast decoding: the growing cache, fixed shapes, compiled graphs, fused projections, quantised weights.

    python benchmarks/fast.py            # CPU, fp32: 12 layers, width 1024; some minutes, 4 GB
    python benchmarks/fast.py --cuda     # CUDA, fp16: full size, random weights; 45 GB of GPU memory
    python benchmarks/fast.py --quick    # does it run at all; with --stages cuda what --cuda would do

Compiling takes most of the time on CUDA: there, prompt and answers are sized so that none outgrows its first class.
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
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from chat import QUESTION, Bandwidth, Clock, build, device_name, generate, log, prompt_inputs, search, seconds
from chat import synthetic_vocabulary as synthetic_words
from torch import nn

import viscpm_hf
from viscpm_hf.loading.quantization import computing_dtype, quantization_config
from viscpm_hf.modeling.fast_decoding_cpm_bee import LEAST_PLACES


# Bytes of a quantised weight, its share of the scales included.
WEIGHT_BYTES = {"int8wo": 1.0, "int4wo": 0.53, "nf4": 0.5625}

# Targets on the CPU and, of the full size, on an H100: (figure, limit, whether the limit is a maximum).
CPU_TARGETS = (("share_of_floor fused and compiled, 1 beam", 0.90, False),)
CUDA_TARGETS = (
    ("tokens_per_second fused and compiled, greedy", 120, False),
    ("tokens_per_second int8wo, compiled, greedy", 180, False),
    ("tokens_per_second int4wo, compiled, greedy", 230, False),
    ("step ratio of 3 beams", 1.3, True),
    ("throughput ratio of batch 16", 8, False),
)


EVERYTHING = ("1 beam", "greedy", "3 beams", "greedy, batch 16")


@dataclass(frozen=True)
class Stage:
    """How a model is set up, and the ways that it then decodes."""

    name: str
    ways: tuple[str, ...] = ("1 beam", "greedy")
    quantization: str | None = None
    fast: bool = True
    compile: bool = True
    fused: bool = False


def cpu_stages(quantizations: Sequence[str]) -> Iterator[Stage]:
    yield Stage("growing cache", EVERYTHING, fast=False)
    yield Stage("static", compile=False)
    yield Stage("compiled")
    yield Stage("fused and compiled", EVERYTHING, fused=True)
    for name in quantizations:
        yield Stage(name, quantization=name, fast=False)
        yield Stage(f"{name}, compiled", quantization=name)


def cuda_stages(quantizations: Sequence[str]) -> Iterator[Stage]:
    """The most telling first; bitsandbytes' weights are captured, but not compiled."""
    yield Stage("fused and compiled", fused=True)
    for name in quantizations:
        is_compiled = name != "nf4"
        title = f"{name}, {'compiled' if is_compiled else 'captured'}"
        yield Stage(title, ("greedy",), quantization=name, compile=is_compiled)
    yield Stage("growing cache", ("greedy",), fast=False)
    yield Stage("static", ("greedy",), compile=False)
    yield Stage("fused and compiled", ("3 beams", "greedy, batch 16"), fused=True)


STAGES = {"cpu": cpu_stages, "cuda": cuda_stages}


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
    """Quantises the language model's layers in place.

    Raises:
        ValueError: if that can't be on the model's device.
    """
    layers = model.language_model().layers
    if name != "nf4":
        from torchao.quantization import quantize_

        if name == "int4wo" and model.device.type != "cuda":
            raise ValueError("torchao's int4 needs CUDA")
        quantize_(layers, quantization_config(name, model.dtype, device=model.device).quant_type)
        return
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in list(layers.modules()):
        for child_name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                linear = Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    quant_type="nf4",
                    compute_dtype=model.dtype,
                    device="meta",
                )
                linear.weight = Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, child_name, linear.to(child.weight.device))


def bytes_per_step(model, quantization: str | None) -> float:
    layers = sum(parameter.numel() for parameter in model.language_model().layers.parameters())
    size = model.dtype.itemsize
    return layers * WEIGHT_BYTES.get(quantization, size) + model.lm_head.weight.numel() * size


def measure(name: str, run: Callable[[], Clock], rows: int, bandwidth, rounds: int) -> dict[str, Any]:
    """The best round, which the other processes of the machine disturbed least."""
    first = seconds(run)  # compiles
    samples = []
    for _ in range(rounds):
        before = bandwidth.measure(3)
        clock = run()
        floor = min(before, bandwidth.measure(3))
        step = median(clock.steps)
        samples.append({"ms_per_step": 1e3 * step, "floor_ms": 1e3 * floor, "share_of_floor": floor / step})
    best = min(samples, key=lambda sample: sample["ms_per_step"])
    row = {
        "way": name,
        "first_seconds": first,
        **best,
        "median_share_of_floor": median(sample["share_of_floor"] for sample in samples),
        "tokens_per_second": 1e3 * rows / best["ms_per_step"],
        "bytes_per_step": bandwidth.num_bytes,
    }
    log(f"{name}: {best['ms_per_step']:.2f} ms, floor {best['floor_ms']:.2f} ms, {best['share_of_floor']:.0%}")
    return row


def repeated(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    return {name: tensor.repeat(rows, *[1] * (tensor.ndim - 1)) for name, tensor in inputs.items()}


def way_of(name: str, model, inputs, segments, length: int) -> tuple[Callable[[], Clock], int]:
    """What to run, and how many rows that decodes."""
    if name.endswith("batch 16"):
        batch = repeated(inputs, 16)
        return lambda: generate(model, batch, length), 16
    if name == "greedy":
        return lambda: generate(model, inputs, length), 1
    return lambda: search(model, inputs, segments, int(name.split()[0]), length), 1


def long_prompt(model, processor, least: int) -> tuple[dict[str, Any], list[list[int]]]:
    """A prompt of at least so many tokens, and hardly more."""
    text = QUESTION * (1 + 4 * least // len(QUESTION))
    for end in range(5, len(text), 5):
        inputs, segments = prompt_inputs(model, processor, text[:end])
        if inputs["input_ids"].shape[1] >= least:
            break
    return inputs, segments


def measure_all(
    args: argparse.Namespace, vocab_file: Path, device: torch.device, without: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """A row for every way of every stage; a stage that can't be is noted in `without`, with the reason."""
    is_cuda = device.type == "cuda"

    def fresh(quantization: str | None) -> tuple:
        gc.collect()
        torch.compiler.reset()
        half = computing_dtype(quantization, device, torch.float16)
        with torch.device(device):
            torch.set_default_dtype(half if is_cuda else torch.float32)
            model, processor = build(args, vocab_file)
            torch.set_default_dtype(torch.float32)
        least = LEAST_PLACES + 1 if args.stages == "cuda" else 0
        inputs, segments = long_prompt(model, processor, least) if least else prompt_inputs(model, processor)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        return model, inputs, segments

    def bandwidth_of(model, quantization: str | None = None) -> Bandwidth | DeviceBandwidth:
        return DeviceBandwidth(bytes_per_step(model, quantization), device) if is_cuda else Bandwidth(model)

    model = bandwidth = built = None
    for stage in STAGES[args.stages](args.quantizations):
        try:
            if built is None or built[0] != stage.quantization or (built[1] and not stage.fused):
                model = bandwidth = decoder = run = None  # which all hold it
                model, inputs, segments = fresh(stage.quantization)
                # Before quantising: on a CPU the floor stays that of the full weights.
                bandwidth = bandwidth_of(model, stage.quantization)
                if stage.quantization is not None:
                    quantize(model, stage.quantization)
                built = stage.quantization, False
            if stage.fused and not built[1]:
                model.fuse_projections()
                built, bandwidth = (stage.quantization, True), bandwidth_of(model)
            decoder = model.fast_decoder
            decoder.enabled, decoder.compile = stage.fast, stage.compile
            for length in args.lengths:
                for way in stage.ways:
                    run, rows = way_of(way, model, inputs, segments, length)
                    row = measure(f"{stage.name}, {way}", run, rows, bandwidth, args.rounds)
                    if args.stages == "cuda" and len({shape.places for shape, *_ in decoder.graphs}) > 1:
                        raise RuntimeError(f"The answers outgrew their class: {list(decoder.graphs)}")
                    yield {"length": length, **row}
        except Exception as error:
            built = None
            without[stage.name] = f"{type(error).__name__}: {str(error)[:500]}"
            log(f"{stage.name}: {without[stage.name]}")
            if not isinstance(error, (ImportError, ValueError)):
                traceback.print_exc()


def figures_of(rows: list[dict[str, Any]], length: int) -> dict[str, float]:
    """What the targets are about, as far as it has been measured."""
    by_way = {row["way"]: row for row in rows if row["length"] == length}
    figures = {
        f"tokens_per_second {way}": row["tokens_per_second"] for way, row in by_way.items() if way.endswith("greedy")
    }
    one, greedy, three, batch = (by_way.get(f"fused and compiled, {way}") for way in EVERYTHING)
    if one:
        figures["share_of_floor fused and compiled, 1 beam"] = one["share_of_floor"]
    if one and three:
        figures["step ratio of 3 beams"] = three["ms_per_step"] / one["ms_per_step"]
    if greedy and batch:
        figures["throughput ratio of batch 16"] = batch["tokens_per_second"] / greedy["tokens_per_second"]
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cuda", action="store_true", help="the full size in fp16 on the GPU")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a tiny model, one round")
    parser.add_argument("--stages", choices=STAGES, help="those of the device unless given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden-size", type=int, help="a multiple of 128")
    parser.add_argument("--lengths", type=int, nargs="+", help="answer lengths")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quantizations", nargs="*", choices=WEIGHT_BYTES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--as-it-comes", action="store_true", help="print the JSON anew after every way")
    args = parser.parse_args()
    device = torch.device("cuda" if args.cuda else "cpu")
    args.stages = args.stages or device.type
    defaults = {"layers": 12, "hidden_size": 1024, "lengths": [32, 256], "quantizations": ["int8wo", "nf4"]}
    if args.stages == "cuda":
        defaults = {"layers": 48, "hidden_size": 4096, "lengths": [64], "quantizations": list(WEIGHT_BYTES)}
    defaults["rounds"] = 3 if args.stages == "cuda" else 5
    if args.quick:
        defaults |= {"layers": 2, "hidden_size": 128, "lengths": [8], "rounds": 1}
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    torch.set_num_threads(args.threads)

    rows: list[dict[str, Any]] = []
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
        "without": {},
        "decoding": rows,
    }
    with tempfile.TemporaryDirectory() as folder:
        vocab_file = Path(folder) / "vocab.txt"
        vocab_file.write_text("".join(f"{word}\n" for word in synthetic_words(args.seed)), encoding="utf-8")
        for row in measure_all(args, vocab_file, device, report["without"]):
            rows.append(row)
            report |= {f"figures_{length}": figures_of(rows, length) for length in args.lengths}
            if args.cuda:
                report["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
            if args.as_it_comes:
                print(json.dumps(report, ensure_ascii=False), flush=True)

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
    return (
        1 if any(not reason.startswith(("ImportError", "ValueError")) for reason in report["without"].values()) else 0
    )


if __name__ == "__main__":
    raise SystemExit(main())
