"""Decoding with `CUDA_MEMORY_CPMBEE_MAX`: layers that stream through the GPU, against the bandwidth of the bus.

    python benchmarks/streaming.py                    # full size, random fp16 weights, 1g: a GPU, 24 GB of RAM
    python benchmarks/streaming.py --budget 4g        # with some layers that stay
    python benchmarks/streaming.py --layers 6 --tiny  # does it run at all; without a GPU the copies are the CPU's own

The bandwidth is that of copies from pinned memory of a layer's size, measured before. The last line printed is one
JSON object; the target is a share of at least 0.8 of the bandwidth.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import transformers

import viscpm_hf
from viscpm_hf import CpmBeeConfig, CpmBeeForCausalLM
from viscpm_hf.loading.layer_streaming import LayerStreamer
from viscpm_hf.loading.placement import parse_size


TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 16}
PROMPT_TOKENS = 164  # an image and a hundred tokens
FEW, MANY = 2, 12


def random_model(config: CpmBeeConfig) -> CpmBeeForCausalLM:
    """A model in fp16 on the CPU. Its weights repeat, since twenty gigabytes of noise take minutes."""
    with torch.device("meta"):
        model = CpmBeeForCausalLM(config).half()
    model.to_empty(device="cpu").tie_weights()
    noise = (0.02 * torch.randn(2**20)).half()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
        else:
            flat = parameter.data.view(-1)
            for begin in range(0, flat.numel(), noise.numel()):
                piece = flat[begin : begin + noise.numel()]
                piece.copy_(noise[: piece.numel()])
    return model.eval().requires_grad_(False)


def seconds(device: torch.device, run: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second from pinned memory to the device."""
    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target.copy_(source)
    return num_bytes / min(seconds(device, lambda: target.copy_(source, non_blocking=True)) for _ in range(10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--budget", default="1g", help="as CUDA_MEMORY_CPMBEE_MAX")
    parser.add_argument("--tiny", action="store_true", help="small layers; the budget is then two of them")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = TINY if arguments.tiny else {}
    model = random_model(CpmBeeConfig(num_hidden_layers=arguments.layers, **sizes))
    layers = model.model.layers
    layer_bytes = sum(parameter.nbytes for parameter in layers[0].parameters())
    budget = round(2.1 * layer_bytes) if arguments.tiny else parse_size(arguments.budget)
    bus = bandwidth(device, layer_bytes)

    model.model.layers = torch.nn.ModuleList()
    model.to(device)
    model.model.layers = layers
    streamer = LayerStreamer(layers, device, budget)
    inputs = torch.arange(5, 5 + PROMPT_TOKENS, device=device)[None]

    def decode(count: int) -> object:
        return model.generate(inputs, min_new_tokens=count, max_new_tokens=count, do_sample=False)

    decode(FEW)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    few, many = (seconds(device, lambda count=count: decode(count)) for count in (FEW, MANY))
    step = (many - few) / (MANY - FEW)
    streamed = layer_bytes * (arguments.layers - streamer.plan.num_resident)
    result = {
        "benchmark": "streaming",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "layers": arguments.layers,
        "budget_gb": budget / 1e9,
        "resident_layers": streamer.plan.num_resident,
        "layers_gb_on_device": streamer.plan.device_bytes / 1e9,
        "peak_gpu_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        "bus_gb_per_second": bus / 1e9,
        "streamed_gb_per_second": streamed / step / 1e9,
        "share_of_bus": streamed / step / bus,
        "target_share_of_bus": 0.8,
        "tokens_per_second": 1 / step,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, viscpm_hf)},
    }
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()}))


if __name__ == "__main__":
    main()
