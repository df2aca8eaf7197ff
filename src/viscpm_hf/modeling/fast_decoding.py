"""What fast decoding needs, whichever language model is decoded."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import nn

from .cpp_kernels import cpp_compiler
from .packed_linear import PackedLinear
from .row_products import has_packed_products, is_for_kernel, kernel


_BITSANDBYTES = ("Linear4bit", "Linear8bitLt")


def has_kernel(*modules: nn.Module) -> bool:
    """Whether all products of these modules are those of our kernels, beside which compilation gains nothing."""
    layers = [
        layer for module in modules for layer in module.modules() if isinstance(layer, (nn.Linear, PackedLinear))
    ]
    return all(layer.weight.device.type == "cpu" and _is_in_kernel(layer) for layer in layers)


def _is_in_kernel(layer: nn.Module) -> bool:
    if isinstance(layer, PackedLinear):
        return has_packed_products(kernel())
    return is_for_kernel(layer) and kernel() is not None


def compilation_problem(model, device: torch.device) -> str | None:
    """Why nothing can be compiled for the model on this device; None if it can."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return f"{quantizer.quantization_config.quant_method} weights can't be compiled"
    if device.type == "cpu":
        if cpp_compiler() is None:
            return "there is no C++ compiler (g++, clang++, cl)"
    elif device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton is missing"
        # Of a C compiler Triton makes, with Python's headers, what starts its kernels.
        if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang", "cc", "cl"))):
            return "there is no C compiler (gcc, clang), which Triton needs"
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            return "Python's headers (python3-dev) are missing, which Triton needs"
    else:
        return f"it isn't used on {device.type}"
    return None


def capture_problem(module: nn.Module) -> str | None:
    """Why a module's step can't be captured in a CUDA graph; None if it can."""
    if any(type(layer).__name__ == "Linear8bitLt" for layer in module.modules()):
        return "bitsandbytes' int8 looks for outliers, and waits for the GPU, at every product"
    return None


def check_fast_decoding(*modules: nn.Module) -> None:
    """Checks that a language model, in one or several modules, can be decoded by graphs and kernels.

    Raises:
        ValueError: for a model that is spread over several devices or offloaded, that has hooks, or that
            bitsandbytes quantised on a CPU: uncompiled, as it is there, its steps over fixed shapes are slower.
    """
    devices = {parameter.device for module in modules for parameter in module.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        names = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(
            f"Fast decoding needs the whole language model on one device, but it is on {names} (meta: offloaded). "
            "Load it without device_map, or quantised so that it fits, or decode with fast=False."
        )
    for name, module in modules[0].named_modules():
        if type(module).__name__ in _BITSANDBYTES and module.weight.device.type == "cpu":
            raise ValueError(
                "Fast decoding gains nothing from bitsandbytes' weights on a CPU, where nothing compiles them and our "
                f"kernels don't read them, but {name} is a {type(module).__name__}. Decode with fast=False (without "
                "--fast), or quantise to packed '8bit' or, with AVX-512, '4bit'."
            )
        if hasattr(module, "_hf_hook") or (name and (module._forward_pre_hooks or module._forward_hooks)):
            raise ValueError(
                "Fast decoding runs no hooks (of offloading, of streamed layers, or your own), but "
                f"{name or 'the model'} has hooks. Load it without device_map and layer streaming, take the hooks "
                "away, or decode with fast=False."
            )


__all__ = ["capture_problem", "check_fast_decoding", "compilation_problem", "has_kernel"]
