"""The machine that a model is to run on: found out, or as given."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import torch

from ..loading.placement import parse_size
from ..plain_text import size_text


# Memory bandwidth in GB/s and dense half-precision TFLOPS, from the makers' data sheets, by a part of the name that
# torch gives the device; the first that fits.
KNOWN_GPUS = {
    "H200": (4800, 989),
    "H100": (3350, 989),
    "A100-SXM4-80": (2039, 312),
    "A100": (1555, 312),
    "A6000": (768, 155),
    "L4": (300, 121),
    "T4": (320, 65),
    "V100": (900, 125),
    "4090": (1008, 165),
    "3090": (936, 71),
}
KNOWN_GPU_MEMORY = {
    "H200": 141e9, "H100": 80e9, "A100-SXM4-80": 80e9, "A100": 40e9, "A6000": 48e9, "L4": 24e9, "T4": 16e9,
    "V100": 16e9, "4090": 24e9, "3090": 24e9,
}  # fmt: skip
# What a GPU of unknown make is taken for.
ORDINARY_GPU = (300, 65)
# PCIe 4.0 with 16 lanes, and a common NVMe disk; not measured.
BUS_BANDWIDTH, DISK_BANDWIDTH = 25e9, 2e9

PROBE_BYTES = 2**28


@dataclass(frozen=True)
class Machine:
    """What there is to run on."""

    ram: int
    """Bytes that may be used."""
    gpu: int | None = None
    """Bytes; None without a GPU."""
    gpu_name: str = ""
    gpu_bandwidth: float = ORDINARY_GPU[0] * 1e9
    """Bytes a second."""
    gpu_flops: float = ORDINARY_GPU[1] * 1e12
    """Dense operations a second in half precision."""
    ram_bandwidth: float = 50e9
    cpu_flops: float = 1e12
    """In fp32."""
    notes: tuple[str, ...] = ()
    """Where the figures come from."""

    @classmethod
    def detect(cls, gpu: str | None = None, ram: str | None = None) -> Machine:
        """This machine, or what is given of one.

        Args:
            gpu: memory of a GPU (`8GB`), the name of a known one (`4090`), or `none`. What torch finds if None.
            ram: likewise of the host (`16GB`). What is available now if None.

        Raises:
            ValueError: for what is neither.
        """
        size, name, speeds, source = _gpu(gpu)
        bandwidth, flops = _probe_cpu()
        notes = [
            f"RAM: {bandwidth / 1e9:.0f} GB/s and {flops / 1e12:.2f} TFLOPS in fp32, measured here now",
            f"bus: {BUS_BANDWIDTH / 1e9:.0f} GB/s (PCIe 4.0 x16) and disk: {DISK_BANDWIDTH / 1e9:.0f} GB/s, assumed",
        ]
        if size is not None:
            notes.insert(0, f"GPU: {speeds[0]} GB/s and {speeds[1]} TFLOPS in half precision, {source}")
        return cls(
            ram=parse_size(ram, "--ram") if ram is not None else psutil.virtual_memory().available,
            gpu=size,
            gpu_name=name,
            gpu_bandwidth=speeds[0] * 1e9,
            gpu_flops=speeds[1] * 1e12,
            ram_bandwidth=bandwidth,
            cpu_flops=flops,
            notes=tuple(notes),
        )

    def describe(self) -> str:
        gpu = "no GPU" if self.gpu is None else f"GPU {self.gpu_name} {size_text(self.gpu)}".replace("  ", " ")
        return f"{gpu}, RAM {size_text(self.ram)}"


def _gpu(given: str | None) -> tuple[int | None, str, tuple[int, int], str]:
    """Memory, name, speeds, and where the speeds come from."""
    if given is None:
        if not torch.cuda.is_available():
            return None, "", ORDINARY_GPU, ""
        properties = torch.cuda.get_device_properties(0)
        known = _known(properties.name)
        if known is None:
            return properties.total_memory, properties.name, ORDINARY_GPU, "assumed for a GPU of unknown make"
        return properties.total_memory, properties.name, KNOWN_GPUS[known], "by its data sheet"
    if given.lower() in ("none", "0"):
        return None, "", ORDINARY_GPU, ""
    known = _known(given)
    if known is not None:
        return int(KNOWN_GPU_MEMORY[known]), known, KNOWN_GPUS[known], "by its data sheet"
    try:
        size = parse_size(given)
    except ValueError as error:
        raise ValueError(f"--gpu is a size (8GB), none, or one of {', '.join(KNOWN_GPUS)}; got {given!r}.") from error
    return size, "", ORDINARY_GPU, "assumed for a GPU of unknown make"


def _known(name: str) -> str | None:
    name = name.lower().replace(" ", "-")
    return next((known for known in KNOWN_GPUS if known.lower() in name), None)


def _probe_cpu() -> tuple[float, float]:
    """Bytes a second that all cores read, and operations a second in fp32; the best of a few tries."""
    values = torch.ones(PROBE_BYTES // 4)
    square = torch.ones(1024, 1024)

    def best(compute, tries: int) -> float:
        times = []
        for _ in range(tries):
            begin = time.perf_counter()
            compute()
            times.append(time.perf_counter() - begin)
        return min(times)

    return PROBE_BYTES / best(values.sum, 4), 2 * 1024**3 / best(lambda: square @ square, 4)
