"""Our speed beside others' on the same sizes, in one run: llama.cpp, transformers' Llama, diffusers' Stable Diffusion.

    python benchmarks/peers.py --llama-python PYTHON     # of an environment with llama-cpp-python and gguf
    python benchmarks/peers.py --parts diffusers          # one part; the others' results stay in the file
    python benchmarks/peers.py --quick                    # does it run at all

    # builds from source; version 0.3.36 crashes on 8- and 4-bit files if it is built for AMX
    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON \
        -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" pip install llama-cpp-python gguf

Weights are random and seeded, nothing is downloaded. Steps of the two sides take turns (A B A B), and beside them the
read bandwidth of the machine is measured, since a decoding step is at best the time to read its weights once. Results
are ratios and medians; the file that `--output` names keeps the parts that aren't run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any


SIZES = {"layers": 12, "hidden_size": 1024, "intermediate_size": 2560, "heads": 8, "vocabulary": 87_040}
QUICK_SIZES = {"layers": 2, "hidden_size": 256, "intermediate_size": 640, "heads": 2, "vocabulary": 1024}
PROMPT_TOKENS, CONTEXT = 113, 512

# Ours and the format of llama.cpp that holds as many bits; our embedding and head in 8 bits too where theirs are.
FORMATS = {"fp32": None, "bf16": "F16", "8bit": "Q8_0", "4bit": "Q4_0"}

PAUSE = 0.3  # seconds for the other side's threads to stop waiting for work

# (figure, limit, whether the limit is a maximum)
POINTS_BEHIND_LLAMA_CPP = 10
SLOWER_THAN_LLAMA = 1.0


# ------------------------------------------------------------------------------------------ llama.cpp, another process


def write_gguf(path: str, name: str, sizes: dict[str, int]) -> None:
    """A file of random weights with a Llama's names; the head is the embedding."""
    import gguf
    import numpy as np

    draw = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType[name]
    width, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(width)
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(sizes["vocabulary"])
    writer.add_tokenizer_model("no_vocab")

    def add(tensor: str, *shape: int) -> None:
        if len(shape) == 1:
            writer.add_tensor(tensor, np.ones(shape, np.float32))
            return
        values = (0.02 * draw.standard_normal(shape)).astype(np.float32)
        writer.add_tensor(tensor, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", sizes["vocabulary"], width)
    add("output_norm.weight", width)
    for layer in range(sizes["layers"]):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{norm}.weight", width)
        for matrix in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{matrix}.weight", width, width)
        add(f"blk.{layer}.ffn_gate.weight", inner, width)
        add(f"blk.{layer}.ffn_up.weight", inner, width)
        add(f"blk.{layer}.ffn_down.weight", width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve_llama_cpp(path: str, threads: int) -> None:
    """Answers every line of stdin, `[prompt tokens, steps]`, with the seconds of the prompt and of every step."""
    import ctypes

    import llama_cpp
    import numpy as np

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = CONTEXT
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError(f"llama.cpp can't load {path}.")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    facts = {
        "version": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode().strip(" |"),
        "bytes": llama_cpp.llama_model_size(model),
    }
    print(json.dumps(facts), flush=True)

    def advance(tokens: list[int]) -> int:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)  # which the batch points to
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama.cpp failed to decode.")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(vocabulary,))
        return int(logits.argmax())

    for line in sys.stdin:
        tokens, steps = json.loads(line)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        times = [time.perf_counter()]
        for _ in range(steps + 1):
            tokens = [advance(tokens)]
            times.append(time.perf_counter())
        print(json.dumps([after - before for before, after in zip(times, times[1:], strict=False)]), flush=True)


class LlamaCpp:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, path: Path, threads: int):
        self.process = subprocess.Popen(
            [python, __file__, "--serve", str(path), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp's process ended with {self.process.wait()}.")
        return json.loads(line)

    def run(self, prompt: list[int], steps: int) -> list[float]:
        self.process.stdin.write(json.dumps([prompt, steps]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------------------------------------- ours, and transformers


def bytes_of_a_step(model) -> int:
    """Every weight that a step reads; of an embedding that isn't the head too it reads one row."""
    tensors = {
        tensor.data_ptr(): tensor.nbytes
        for module, whole in ((model, False), (model.lm_head, True))
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if whole or "embed_tokens" not in name
    }
    return sum(tensors.values())


def build(kind: str, name: str, sizes: dict[str, int], folder: Path):
    """A language model with random weights, quantised as it is loaded; `kind` is `ours` or `llama`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from viscpm_hf import CpmBeeConfig, CpmBeeForCausalLM
    from viscpm_hf.loading.quantization import quantization_config

    common = {
        "vocab_size": sizes["vocabulary"],
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["intermediate_size"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "tie_word_embeddings": True,
    }
    if kind == "llama":
        model_class, config = LlamaForCausalLM, LlamaConfig(**common, eos_token_id=None, pad_token_id=0)
    else:
        model_class = CpmBeeForCausalLM
        config = CpmBeeConfig(**common, num_words=sizes["vocabulary"] - 457, head_dim=128, eos_token_id=None)
    source = folder / kind
    if not source.exists():
        torch.manual_seed(0)
        model_class(config).to(torch.bfloat16).save_pretrained(source)
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype}
    if name.endswith("bit"):
        options["quantization_config"] = quantization_config(
            name, dtype, quantize_embedding=True, device=torch.device("cpu")
        )
    return model_class.from_pretrained(source, **options).eval()


def run_model(model, prompt: list[int], steps: int) -> list[float]:
    """Seconds of the prompt with the first token, and of every further step of plain greedy `generate`."""
    import torch
    from chat import generate

    clock = generate(model, {"input_ids": torch.tensor([prompt])}, steps + 1)
    return [clock.first_token_seconds, *clock.steps]


class ReadBandwidth:
    """Bytes a second that this machine reads with the threads that torch has, by the best of plain kernels."""

    def __init__(self) -> None:
        import torch

        self.matrix = torch.ones(16_384, 8192)
        self.vector = torch.ones(8192)

    def measure(self) -> float:
        def seconds(kernel: Callable[[], Any]) -> float:
            begin = time.perf_counter()
            kernel()
            return time.perf_counter() - begin

        kernels = (self.matrix.sum, self.matrix.amax, lambda: self.matrix @ self.vector)
        return self.matrix.nbytes / min(seconds(kernel) for kernel in kernels for _ in range(3))


Side = Callable[[list[int], int], list[float]]


def compare(ours: Side, theirs: Side, bandwidth: ReadBandwidth, options: argparse.Namespace) -> dict[str, float]:
    """Medians of both sides, which take turns, and the best bandwidth of the readings in between."""
    prompt = [7 + 13 * place % 500 for place in range(PROMPT_TOKENS)]
    sides: dict[str, tuple[Side, list[list[float]]]] = {"ours": (ours, []), "theirs": (theirs, [])}
    rates = []
    for number in range(options.rounds + 1):
        for side, samples in sides.values():
            time.sleep(PAUSE)
            rates.append(bandwidth.measure())
            seconds = side(prompt, options.steps)
            if number:  # the first round fills caches
                samples.append(seconds)
    found = {"bandwidth": max(rates)}
    for name, (_, samples) in sides.items():
        found[f"{name}_prompt"] = median(sample[0] for sample in samples)
        found[f"{name}_step"] = median(step for sample in samples for step in sample[1:])
    return found


def row(found: dict[str, float], our_bytes: int, their_bytes: int) -> dict[str, float]:
    floors = {"ours": our_bytes / found["bandwidth"], "theirs": their_bytes / found["bandwidth"]}
    shares = {name: floor / found[f"{name}_step"] for name, floor in floors.items()}
    return {
        "ms_per_step": round(1e3 * found["ours_step"], 2),
        "their_ms_per_step": round(1e3 * found["theirs_step"], 2),
        "step_ratio": round(found["ours_step"] / found["theirs_step"], 3),
        "prompt_ratio": round(found["ours_prompt"] / found["theirs_prompt"], 3),
        "megabytes_per_step": round(our_bytes / 1e6, 1),
        "their_megabytes_per_step": round(their_bytes / 1e6, 1),
        "gigabytes_per_second": round(found["bandwidth"] / 1e9, 1),
        "share_of_floor": round(shares["ours"], 3),
        "their_share_of_floor": round(shares["theirs"], 3),
        "points_ahead": round(100 * (shares["ours"] - shares["theirs"]), 1),
        "time_per_byte_ratio": round(shares["theirs"] / shares["ours"], 3),
    }


def language_models(part: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import torch

    bandwidth = ReadBandwidth()
    for name in options.formats:
        file_format = FORMATS[name]
        if part == "llama.cpp" and file_format is None:
            continue
        ours = build("ours", name, options.sizes, options.scratch)
        if part == "llama.cpp":
            path = options.scratch / f"{file_format}.gguf"
            if not path.exists():
                write = [options.llama_python, __file__, "--write", str(path), file_format, json.dumps(options.sizes)]
                subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
        else:
            llama = build("llama", name, options.sizes, options.scratch)
        for threads in options.threads:
            torch.set_num_threads(threads)
            if part == "llama.cpp":
                peer = LlamaCpp(options.llama_python, path, threads)
                their_bytes, theirs = peer.facts["bytes"], peer.run
            else:
                their_bytes = bytes_of_a_step(llama)
                theirs = partial(run_model, llama)
            found = compare(partial(run_model, ours), theirs, bandwidth, options)
            label = {"format": name, **({"their_format": file_format} if part == "llama.cpp" else {})}
            result = {**label, "threads": threads, **row(found, bytes_of_a_step(ours), their_bytes)}
            if part == "llama.cpp":
                result["llama_cpp"] = {key: peer.facts[key] for key in ("version", "system")}
                peer.close()
                if name.endswith("bit"):
                    result["target_kept"] = result["points_ahead"] >= -POINTS_BEHIND_LLAMA_CPP
            else:
                result["target_kept"] = result["time_per_byte_ratio"] <= SLOWER_THAN_LLAMA
            print(json.dumps(result), file=sys.stderr, flush=True)
            yield result


# ----------------------------------------------------------------------------------------------------------- diffusers


def pipelines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Denoising with guidance on the same UNet and scheduler; prompts are encoded beforehand."""
    import torch
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from paint import Bench

    bench_options = argparse.Namespace(
        device="cpu", steps=10, rounds=1, batches=[1], quick=options.quick, only_four=False
    )
    ours = Bench(bench_options).pipe
    theirs = StableDiffusionPipeline(
        vae=ours.vae, text_encoder=None, tokenizer=None, unet=ours.unet, safety_checker=None, feature_extractor=None,
        scheduler=DDPMScheduler.from_config(ours.scheduler.config, steps_offset=1), requires_safety_checker=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    width = ours.unet.config.cross_attention_dim
    prompts = {name: torch.randn(1, 32, width) for name in ("prompt_embeds", "negative_prompt_embeds")}
    side = ours.unet.config.sample_size * 8

    def seconds(pipe: Any, latents: torch.Tensor) -> float:
        begin = time.perf_counter()
        pipe(
            **prompts, latents=latents, height=side, width=side, num_inference_steps=10, guidance_scale=7.5,
            output_type="pil",
        )  # fmt: skip
        return time.perf_counter() - begin

    for threads in options.threads:
        torch.set_num_threads(threads)
        for images in (1, 4):
            latents = torch.randn(images, 4, side // 8, side // 8)
            prompts = {name: embeds[:1].expand(images, -1, -1) for name, embeds in prompts.items()}
            pairs = []
            for number in range(options.rounds + 1):
                pair = [seconds(pipe, latents.clone()) for pipe in (ours, theirs)]
                if number:
                    pairs.append(pair)
            result = {
                "threads": threads,
                "images": images,
                "seconds": round(median(mine for mine, _ in pairs), 3),
                "their_seconds": round(median(other for _, other in pairs), 3),
                "ratio": round(median(mine / other for mine, other in pairs), 3),
            }
            print(json.dumps(result), file=sys.stderr, flush=True)
            yield result


PARTS = ("llama.cpp", "transformers", "diffusers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="after one that isn't counted")
    parser.add_argument("--steps", type=int, default=16, help="greedy steps a turn")
    parser.add_argument(
        "--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python and gguf"
    )
    parser.add_argument("--scratch", type=Path, default=Path(__file__).with_name(".scratch") / "peers")
    parser.add_argument("--output", type=Path, help="JSON file; parts that aren't run are kept")
    parser.add_argument("--quick", action="store_true", help="a smoke run on tiny models")
    # The two ways in which this file is run by the interpreter that has llama.cpp.
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        path, name, sizes = options.write
        return write_gguf(path, name, json.loads(sizes))
    if options.serve:
        return serve_llama_cpp(options.serve, options.threads[0])

    import diffusers
    import torch
    import transformers
    from chat import device_name

    import viscpm_hf

    options.sizes = QUICK_SIZES if options.quick else SIZES
    if options.quick:
        options.rounds, options.steps = 1, 4
        options.scratch /= "quick"
    options.scratch.mkdir(parents=True, exist_ok=True)
    report = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    report |= {
        "benchmark": "peers",
        "device": device_name(),
        "cores": os.cpu_count(),
        "model": options.sizes,
        "prompt_tokens": PROMPT_TOKENS,
        "versions": {
            **{module.__name__: module.__version__ for module in (viscpm_hf, torch, transformers, diffusers)},
            "python": platform.python_version(),
        },
    }
    for part in options.parts:
        rows = pipelines(options) if part == "diffusers" else language_models(part, options)
        kept = [old for old in report.get(part, ()) if old.get("format") not in (*options.formats, None)]
        report[part] = [*kept, *rows]
        if options.output:
            options.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(report, ensure_ascii=False))
    return None


if __name__ == "__main__":
    main()
