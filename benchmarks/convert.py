"""Conversion at real size: writes a random checkpoint in the original's format, converts, verifies and loads it.

    python benchmarks/convert.py --kind chat            # 20.6 GB; needs 45 GB of disk
    python benchmarks/convert.py --kind paint           # 22.7 GB; needs 50 GB
    python benchmarks/convert.py --kind chat --layers 4 # the same, smaller

Every step runs in a process of its own, with the files it reads dropped from the page cache, while its memory is
watched. `RssAnon` is what a process itself needs; pages of mapped files, which count in `RSS`, can be taken back
at any time. The last line of the output is one JSON object, which also goes to `--output`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


PIECE_VALUES = 16 * 2**20
SAMPLE_SECONDS = 0.02
# fp16 values with the spread of a trained checkpoint.
SPREAD = 0.5


@dataclass
class Step:
    """What a step took."""

    seconds: float
    peak_rss_anon_gb: float
    peak_rss_gb: float
    values: dict


def memory_of(pid: int) -> tuple[int, int]:
    """RssAnon and RSS of a process in bytes."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))


def run_step(name: str, arguments: argparse.Namespace) -> Step:
    """Runs a step of this script in a process of its own."""
    command = [sys.executable, __file__, "--step", name, "--kind", arguments.kind, "--scratch", str(arguments.scratch)]
    command += ["--layers", str(arguments.layers), "--direct-layers", str(arguments.direct_layers)]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks = [0, 0]

    def watch() -> None:
        while process.poll() is None:
            try:
                peaks[:] = map(max, peaks, memory_of(process.pid))
            except (OSError, KeyError):  # it is gone
                return
            time.sleep(SAMPLE_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"step {name} failed with exit status {process.returncode}")
    values = json.loads(output.splitlines()[-1])
    step = Step(values.pop("seconds", time.perf_counter() - begin), peaks[0] / 1e9, peaks[1] / 1e9, values)
    print(
        f"{name}: {step.seconds:.1f} s, RssAnon {step.peak_rss_anon_gb:.2f} GB, {values}", file=sys.stderr, flush=True
    )
    return step


def drop_cache(path: Path) -> None:
    """Makes the next reading of a file, or of a folder's files, come from the disk."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------ the checkpoint


def original_specs(kind: str, layers: int) -> list:
    """Names, dtypes and shapes of a released checkpoint, with `layers` layers in its language model."""
    from viscpm_hf import CpmBeeConfig, VisCPMChatConfig, VisCPMChatForConditionalGeneration
    from viscpm_hf.checkpoints.tensor_files import TensorSpec
    from viscpm_hf.checkpoints.weight_transforms import KeyMatcher
    from viscpm_hf.families import key_maps

    def specs(model: torch.nn.Module, key_map, dtype: torch.dtype) -> list:
        matcher, tied = KeyMatcher(key_map), set(getattr(model, "all_tied_weights_keys", ()))
        found = []
        for name, tensor in model.state_dict().items():
            if name not in tied:
                original, entry = matcher.match_target(name)
                shape = tuple(tensor.shape)
                if entry.operation == key_maps.TOKEN_ROWS:  # without the rows that ours has on top
                    shape = (text.num_words, *shape[1:])
                found.append(TensorSpec(original, dtype, shape))
        return found

    text = CpmBeeConfig(num_hidden_layers=layers)
    if kind == "chat":
        with torch.device("meta"):
            model = VisCPMChatForConditionalGeneration(VisCPMChatConfig(text_config=text.to_dict()))
        dropped = {
            "vpm.beit3.text_embed.weight": (64010, 1024),
            "vpm.beit3.vision_embed.mask_token": (1, 1, 1024),
            "vpm.mim_head.weight": (8192, 1024),
            "vpm.mim_head.bias": (8192,),
        }
        extras = [TensorSpec(name, torch.float16, shape) for name, shape in dropped.items()]
        return specs(model, key_maps.CHAT, torch.float16) + extras
    from diffusers import UNet2DConditionModel

    from viscpm_hf import VisCPMPaintTextEncoder, VisCPMPaintTextEncoderConfig
    from viscpm_hf.loading.paint import UNET_CONFIG

    with torch.device("meta"):
        encoder = VisCPMPaintTextEncoder(VisCPMPaintTextEncoderConfig(num_hidden_layers=layers))
        unet = UNet2DConditionModel.from_config(UNET_CONFIG)
    return specs(encoder, key_maps.PAINT_TEXT_ENCODER, torch.float16) + specs(unet, key_maps.PAINT_UNET, torch.float32)


def random_pieces(spec, pool: torch.Tensor, seed: int):
    """A tensor's values, as pieces of a pool of random numbers that begin at different places."""
    left, at = spec.numel, seed * 7919 % (len(pool) // 2)
    while left:
        piece = pool[at : at + min(left, len(pool) - at)]
        yield piece.to(spec.dtype)
        left, at = left - len(piece), (at * 31 + 1) % (len(pool) // 2)


def write_checkpoint(folder: Path, kind: str, layers: int) -> dict:
    from viscpm_hf.checkpoints.tensor_files import ArchiveWriter

    folder.mkdir(parents=True, exist_ok=True)
    specs = original_specs(kind, layers)
    pool = (torch.randn(PIECE_VALUES, generator=torch.Generator().manual_seed(0)) * SPREAD).to(torch.float16)
    writer = ArchiveWriter(folder / "pytorch_model.bin", specs)
    for index, spec in enumerate(specs):
        writer.write(spec.name, random_pieces(spec, pool, index))
    writer.finish_unhashed()
    model_type = {"chat": "viscpmchatbee", "paint": "cpmbee"}[kind]
    sizes = {"vocab_size": 86583, "dim_model": 4096, "num_layers": layers, "dim_head": 128, "dim_ff": 10240}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **sizes}), "utf-8")
    write_vocabulary(folder / "vocab.txt", 86583)
    if kind == "paint":
        write_vae(folder / "vae")
    return {"gb": (folder / "pytorch_model.bin").stat().st_size / 1e9, "tensors": len(specs)}


def write_vocabulary(path: Path, tokens: int) -> None:
    """One of the right size, with the special tokens in their places."""
    special = "<pad> <unk> <mask> <sep> </n> </_> <s> </s> <root> <ans> <option>".split()
    words = [*special, *(f"token{index}" for index in range(tokens - len(special) - 1)), "<eod>"]
    path.write_text("\n".join(words), "utf-8")


def write_vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    from viscpm_hf.loading.paint import VAE_CONFIG

    AutoencoderKL.from_config(VAE_CONFIG).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------- steps


def step_write(source: Path, converted: Path, arguments: argparse.Namespace) -> dict:
    begin = time.perf_counter()
    values = write_checkpoint(source, arguments.kind, arguments.layers)
    return {"seconds": time.perf_counter() - begin, **values}


def step_copy(source: Path, converted: Path, arguments: argparse.Namespace) -> dict:
    """`cp`, and until the copy is on the disk."""
    weights, copy = source / "pytorch_model.bin", source / "copy.tmp"
    drop_cache(weights)
    begin = time.perf_counter()
    subprocess.run(["cp", str(weights), str(copy)], check=True)
    copied = time.perf_counter() - begin
    subprocess.run(["sync", str(copy)], check=True)
    seconds = time.perf_counter() - begin
    copy.unlink()
    return {"seconds": seconds, "seconds_without_sync": copied, "gb": weights.stat().st_size / 1e9}


def step_convert(source: Path, converted: Path, arguments: argparse.Namespace) -> dict:
    from viscpm_hf import convert

    shutil.rmtree(converted, ignore_errors=True)
    drop_cache(source)
    begin = time.perf_counter()
    result = convert(source, converted)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "gb": result.num_bytes / 1e9, "files": len(result.files)}


def step_verify(source: Path, converted: Path, arguments: argparse.Namespace) -> dict:
    from viscpm_hf.checkpoints.location import locate
    from viscpm_hf.conversion.paint import verify_loading_paint
    from viscpm_hf.conversion.planning import open_original, plan_conversion
    from viscpm_hf.conversion.verify import verify_files, verify_loading

    drop_cache(source), drop_cache(converted)
    begin = time.perf_counter()
    checkpoint = open_original(locate(source))
    report = verify_files(checkpoint.tensors, plan_conversion(checkpoint, None, 5 * 10**9), converted)
    report.raise_for_differences()
    loading = (verify_loading_paint if checkpoint.kind == "paint" else verify_loading)(checkpoint, converted)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "tensors_equal": report.num_tensors, "parameters": loading.num_parameters}


def step_load(source: Path, converted: Path, arguments: argparse.Namespace) -> dict:
    """Loads the converted folder in its own dtype: weights stay in their files until they are used."""
    drop_cache(converted)
    begin = time.perf_counter()
    model = load(arguments.kind, converted)
    return {"seconds": time.perf_counter() - begin, "parameters": sum(p.numel() for p in model.parameters())}


def step_inspect(source: Path, converted: Path, arguments: argparse.Namespace) -> dict:
    from viscpm_hf import inspect

    drop_cache(source), drop_cache(converted)
    begin = time.perf_counter()
    inspect(source)
    original = time.perf_counter() - begin
    inspect(converted)
    return {"seconds": original, "seconds_converted": time.perf_counter() - begin - original}


def step_read(source: Path, converted: Path, arguments: argparse.Namespace) -> dict:
    """Reads the direct loading's file once, as its yardstick."""
    weights = source.with_name("direct") / "pytorch_model.bin"
    write_checkpoint(weights.parent, arguments.kind, arguments.direct_layers)
    drop_cache(weights)
    begin = time.perf_counter()
    buffer = bytearray(16 * 2**20)
    with open(weights, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return {"seconds": time.perf_counter() - begin, "gb": weights.stat().st_size / 1e9}


def step_direct(source: Path, converted: Path, arguments: argparse.Namespace) -> dict:
    """Loads an original file as it is. Its folded weights are new ones, so it is a smaller model than the machine's
    memory."""
    folder = source.with_name("direct")
    drop_cache(folder)
    begin = time.perf_counter()
    model = load(arguments.kind, folder)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "model_gb": sum(parameter.nbytes for parameter in model.parameters()) / 1e9}


def load(kind: str, folder: Path) -> torch.nn.Module:
    import viscpm_hf  # noqa: F401

    if kind == "chat":
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    from viscpm_hf import VisCPMPaintPipeline

    pipeline = VisCPMPaintPipeline.from_pretrained(folder)
    return torch.nn.ModuleList([pipeline.text_encoder, pipeline.unet, pipeline.vae])


STEPS = {
    "write": step_write,
    "copy": step_copy,
    "inspect": step_inspect,
    "convert": step_convert,
    "verify": step_verify,
    "load": step_load,
    "read": step_read,
    "direct": step_direct,
}
ORDER = ("write", "copy", "convert", "inspect", "verify", "load", "read", "direct")


def summary(arguments: argparse.Namespace, steps: dict[str, Step]) -> dict:
    import diffusers
    import safetensors
    import transformers

    direct = steps["direct"]
    return {
        "benchmark": "convert",
        "kind": arguments.kind,
        "layers": arguments.layers,
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {_memory_gb():.0f} GB",
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, diffusers, safetensors)},
        },
        "speed_to_cp": round(steps["copy"].values["seconds_without_sync"] / steps["convert"].seconds, 2),
        "speed_to_cp_and_sync": round(steps["copy"].seconds / steps["convert"].seconds, 2),
        "direct_time_to_reading": round(direct.seconds / steps["read"].seconds, 2),
        "direct_rss_anon_above_model_gb": round(direct.peak_rss_anon_gb - direct.values["model_gb"], 2),
        "steps": {name: _rounded(asdict(step)) for name, step in steps.items()},
    }


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def import_everything(kind: str) -> None:
    """What a step measures is its work, not Python's imports."""
    import viscpm_hf.conversion.convert  # noqa: F401
    from viscpm_hf import VisCPMChatForConditionalGeneration, inspect  # noqa: F401

    if kind == "paint":
        from viscpm_hf import VisCPMPaintPipeline  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("chat", "paint"), default="chat")
    parser.add_argument("--layers", type=int, default=48, help="of the language model; 48 is the real size")
    parser.add_argument("--direct-layers", type=int, default=12, help="of the file that is loaded directly")
    parser.add_argument("--scratch", type=Path, default=Path(__file__).parent / ".scratch")
    parser.add_argument("--output", type=Path, help="keep the result in this file")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.scratch / arguments.kind
    source, converted = folder / "original", folder / "converted"
    if arguments.step:
        import_everything(arguments.kind)
        print(json.dumps(STEPS[arguments.step](source, converted, arguments)))
        return
    try:
        steps = {name: run_step(name, arguments) for name in ORDER}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = summary(arguments, steps)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
