"""The table of `viscpm-hf memory`: precisions and placements of one model, and which of them suits a machine best."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..checkpoints.location import hub_arguments_for
from ..checkpoints.original import CPM_BEE, PAINT
from ..loading.layer_streaming import BUDGET_VARIABLE, NUM_SLOTS, StreamingPlan, plan_streaming
from ..plain_text import size_text
from .machine import BUS_BANDWIDTH, DISK_BANDWIDTH, Machine
from .sizes import ModelSizes, model_sizes
from .work import Work, WorkBytes, flops_of_painting, work_bytes


GPU, GPU_STREAMED, GPU_OFFLOAD, CPU, DISK = "GPU", "GPU + streamed layers", "GPU + model offload", "CPU", "CPU + disk"
FP32, HALF, INT8, NF4, INT4 = "fp32", "half", "int8", "nf4", "int4"
# The options for them; and the weights of rows on a GPU and on a CPU, as `sizes.quantized_bytes` has them.
QUANTIZATIONS = {INT8: "8bit", NF4: "4bit", INT4: "4bit"}
ON_GPU, ON_CPU = {INT8: "int8", NF4: "nf4"}, {INT8: "packed8", INT4: "packed4"}

# Bytes that a process has before any weight: Python, torch and the libraries, and the vocabulary (anonymous memory,
# measured on Linux); what accelerate's hooks for weights on the disk take on top; and the driver's
# context with the kernels' workspaces on a GPU (not measured).
HOST_BASE, HOST_EXTRA, HOST_BASE_WITH_GPU, GPU_BASE = 0.33e9, 0.06e9, 1.5e9, 0.6e9
# Of a GPU's or the host's memory, what a plan leaves to others.
RESERVE = 0.05

# Plain execution launches its kernels one by one, which takes so long a layer whatever its size; and of a bandwidth so
# much is reached (measured by others on an A100; sources in docs/memory.md). 8-bit layers launch more of them.
SECONDS_PER_LAYER, BANDWIDTH_REACHED, INT8_OVERHEAD = 0.85e-3, 0.7, 1.3
# Of the dense peak, convolutions and attention of the UNet reach so much.
FLOPS_REACHED = {GPU: 0.3, CPU: 0.6}


@dataclass(frozen=True)
class MemoryRow:
    """One precision in one placement; sizes in bytes."""

    precision: str
    placement: str
    dtype: str
    weights: int
    weights_gpu: int
    weights_ram: int
    weights_disk: int
    kv_cache: int
    activations: int
    peak_gpu: int
    peak_ram: int
    fits: bool
    problem: str | None
    """Why it doesn't fit."""
    command: str
    tokens_per_second: float | None = None
    """Of all rows of the batch together."""
    tokens_per_second_fast: float | None = None
    """Likewise with `--fast`, where that applies."""
    seconds_per_image: float | None = None

    @property
    def speed(self) -> float:
        """To compare rows by; more is better."""
        if self.seconds_per_image is not None:
            return 1 / self.seconds_per_image
        return self.tokens_per_second_fast or self.tokens_per_second


@dataclass(frozen=True)
class MemoryPlan:
    """What a model needs."""

    model: str
    kind: str
    parameters: dict[str, int]
    machine: Machine
    work: Work
    rows: list[MemoryRow]
    best: MemoryRow | None
    """The row to choose on this machine; None if nothing fits."""
    title: str
    """The system's name."""

    @property
    def advice(self) -> str:
        """The command of the best row, or what it would take."""
        if self.best is not None:
            return self.best.command
        by_gpu = min((row for row in self.rows if row.placement == GPU), key=lambda row: row.peak_gpu)
        by_ram = min((row for row in self.rows if not row.peak_gpu), key=lambda row: row.peak_ram)
        return (
            f"{self.model} fits nowhere on this machine ({self.machine.describe()}). It would take a GPU of "
            f"{size_text(math.ceil(by_gpu.peak_gpu / (1 - RESERVE)))} ({by_gpu.precision}), or RAM of "
            f"{size_text(math.ceil(by_ram.peak_ram / (1 - RESERVE)))} ({by_ram.precision}, {by_ram.placement})."
        )


def memory_plan(
    model: str | os.PathLike,
    *,
    machine: Machine | None = None,
    work: Work | Mapping[str, int] | None = None,
    kind: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> MemoryPlan:
    """What a model needs, in every precision and place.

    Args:
        model: a file, folder, cached Hub id, `"viscpm-tiny"`, or a released checkpoint's id without having it
            (`sizes.RELEASED`).
        machine: where it is to run; this one if None.
        work: what is to be computed; what a mapping of [`Work`]'s fields lacks is as the original does it: one answer,
            or one image.
        kind: `"chat"` or `"paint"`, of `"viscpm-tiny"`.
        revision, cache_dir: of the Hub, whose cache alone is looked at.

    Raises:
        OriginalCheckpointError, OSError, ValueError: if there is no such model, or the work makes no sense.
    """
    sizes = model_sizes(model, kind, **hub_arguments_for(model, revision=revision, cache_dir=cache_dir))
    machine = machine or Machine.detect()
    if not isinstance(work, Work):
        work = Work.of(sizes, **(work or {}))
    work.check(sizes)
    rows = [row for precision in (FP32, HALF, INT8, NF4, INT4) for row in _rows(sizes, machine, work, precision)]
    return MemoryPlan(sizes.name, sizes.kind, sizes.parameters, machine, work, rows, _best(rows), sizes.title)


def _best(rows: list[MemoryRow]) -> MemoryRow | None:
    """The most precise of what is nearly as fast as anything that fits; half precision is precise enough."""
    fitting = [row for row in rows if row.fits]
    if not fitting:
        return None
    order = [HALF, FP32, INT8, NF4, INT4]
    fastest = max(row.speed for row in fitting)
    return min(
        (row for row in fitting if row.speed >= fastest / 2), key=lambda row: (order.index(row.precision), -row.speed)
    )


# --------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class _Precision:
    """One precision on one kind of device."""

    name: str
    dtype: torch.dtype
    weights: dict[str, int]
    layers: list[int]
    work: WorkBytes

    @property
    def total(self) -> int:
        return sum(self.weights.values())

    @property
    def outside_layers(self) -> int:
        return self.total - sum(self.layers)


def _precision(sizes: ModelSizes, work: Work, name: str, on_gpu: bool) -> _Precision:
    half = getattr(torch, sizes.family.half) if on_gpu else torch.bfloat16
    dtype = torch.float32 if name == FP32 else half
    quantization = (ON_GPU if on_gpu else ON_CPU).get(name)
    # On a CPU UNet and VAE stay as they are stored.
    diffusion_dtype = dtype if on_gpu else torch.float32
    return _Precision(
        name,
        dtype,
        sizes.weights(dtype, quantization, diffusion_dtype),
        sizes.layers(dtype, quantization),
        work_bytes(sizes, work, dtype, quantization, diffusion_dtype, on_gpu=on_gpu),
    )


def _rows(sizes: ModelSizes, machine: Machine, work: Work, name: str) -> Iterator[MemoryRow]:
    if name != INT4:
        yield from _gpu_rows(sizes, machine, work, _precision(sizes, work, name, True))
    if name == NF4:
        return
    on_cpu = _precision(sizes, work, name, False)
    yield _row(sizes, machine, work, on_cpu, CPU, ram=on_cpu.total)
    if name not in QUANTIZATIONS:  # whose layers can't be left on the disk
        unfolded = 3 * sizes.largest_linear * on_cpu.dtype.itemsize  # a weight as it is read, cast and scaled
        ram, disk = on_cpu.outside_layers + unfolded, sum(on_cpu.layers)
        yield _row(sizes, machine, work, on_cpu, DISK, ram=ram, disk=disk)


def _gpu_rows(sizes: ModelSizes, machine: Machine, work: Work, on_gpu: _Precision) -> Iterator[MemoryRow]:
    yield _row(sizes, machine, work, on_gpu, GPU, gpu=on_gpu.total)
    plan = _streaming(on_gpu, machine) if sizes.family.streams_layers else None
    if plan is not None:
        yield _row(
            sizes, machine, work, on_gpu, GPU_STREAMED, gpu=on_gpu.outside_layers + plan.device_bytes,
            ram=sum(on_gpu.layers[plan.num_resident :]), budget=plan.device_bytes,
        )  # fmt: skip
    if sizes.kind == PAINT and on_gpu.name != INT8:  # bitsandbytes' 8-bit layers can't be moved
        diffusion = {part: on_gpu.weights[part] for part in ("UNet", "VAE")}
        models = {"text": on_gpu.total - sum(diffusion.values()), **diffusion}
        largest = max(models, key=lambda part: models[part] + on_gpu.work.stages[part])
        yield _row(
            sizes, machine, work, on_gpu, GPU_OFFLOAD, gpu=models[largest], ram=on_gpu.total,
            working=on_gpu.work.stages[largest],
        )  # fmt: skip


def _streaming(precision: _Precision, machine: Machine) -> StreamingPlan | None:
    """As many layers on the GPU as there is room for; None if all have it, or no two."""
    least = NUM_SLOTS * max(precision.layers)
    budget = least
    if machine.gpu is not None:
        taken = GPU_BASE + precision.outside_layers + precision.work.total
        budget = int(machine.gpu * (1 - RESERVE) - taken)
    if budget >= sum(precision.layers):
        return None
    return plan_streaming(precision.layers, max(budget, least))


def _row(
    sizes: ModelSizes,
    machine: Machine,
    work: Work,
    precision: _Precision,
    placement: str,
    *,
    gpu: int = 0,
    ram: int = 0,
    disk: int = 0,
    budget: int = 0,
    working: int | None = None,
) -> MemoryRow:
    """`gpu`, `ram`, `disk`: the weights there; `working`: bytes of the work, if not all of it is done beside them."""
    uses_gpu = gpu > 0
    working = precision.work.total if working is None else working
    peak_gpu = math.ceil(GPU_BASE + gpu + working) if uses_gpu else 0
    base = HOST_BASE + (HOST_EXTRA if placement == DISK else 0)
    peak_ram = math.ceil(HOST_BASE_WITH_GPU + ram if uses_gpu else base + ram + working)
    problem = None
    if uses_gpu and machine.gpu is None:
        problem = "no GPU"
    elif uses_gpu and peak_gpu > machine.gpu * (1 - RESERVE):
        problem = f"GPU has {size_text(machine.gpu)}"
    elif peak_ram > machine.ram * (1 - RESERVE):
        problem = f"RAM has {size_text(machine.ram)}"
    row = MemoryRow(
        precision=precision.name,
        placement=placement,
        dtype=str(precision.dtype).removeprefix("torch."),
        weights=precision.total,
        weights_gpu=gpu,
        weights_ram=ram,
        weights_disk=disk,
        kv_cache=precision.work.kv_cache,
        activations=precision.work.activations,
        peak_gpu=peak_gpu,
        peak_ram=peak_ram,
        fits=problem is None,
        problem=problem,
        command=_command(sizes, work, precision, placement, budget),
    )
    return _with_speed(row, sizes, machine, work, precision)


# ------------------------------------------------------------------------------------------------------------- speeds


def _with_speed(row: MemoryRow, sizes: ModelSizes, machine: Machine, work: Work, precision: _Precision) -> MemoryRow:
    """Adds what a row can be expected to reach; the formulas are explained in docs/memory.md."""
    layers, head = sum(precision.layers), precision.weights["embedding"]
    on_gpu = row.peak_gpu > 0
    bandwidth = BANDWIDTH_REACHED * (machine.gpu_bandwidth if on_gpu else machine.ram_bandwidth)
    launches = sum(map(bool, precision.layers)) * SECONDS_PER_LAYER * (INT8_OVERHEAD if precision.name == INT8 else 1)
    read = layers + head + (precision.work.kv_cache if sizes.kind != PAINT else 0)
    step = read / bandwidth
    has_fast = sizes.has_fast_decoding and row.placement == GPU and precision.name in (FP32, HALF)
    fast = step if has_fast else None
    if on_gpu:
        step = max(step, launches)
    if row.placement == GPU_STREAMED:
        step = max(step, (row.weights_ram) / BUS_BANDWIDTH)
    elif row.placement == GPU_OFFLOAD:
        step += row.weights / BUS_BANDWIDTH
    elif row.placement == DISK:
        step += row.weights_disk / DISK_BANDWIDTH  # nothing is fetched ahead
    if sizes.kind != PAINT:
        return replace(
            row,
            tokens_per_second=work.batch / step,
            tokens_per_second_fast=None if fast is None else work.batch / fast,
        )
    rate = FLOPS_REACHED[GPU] * machine.gpu_flops if on_gpu else FLOPS_REACHED[CPU] * machine.cpu_flops
    if on_gpu and precision.name == FP32:
        rate /= 8  # without tensor cores, or with TF32
    return replace(row, seconds_per_image=step + flops_of_painting(sizes, work) / rate / work.batch)


# ----------------------------------------------------------------------------------------------------------- commands


def _command(sizes: ModelSizes, work: Work, precision: _Precision, placement: str, budget: int) -> str:
    if sizes.kind == CPM_BEE:
        return _python(sizes, precision, placement)
    words = ["viscpm-hf", "chat", sizes.name, "IMAGE"]
    if sizes.kind == PAINT:
        words = ["viscpm-hf", "paint", sizes.name, "PROMPT", "-o", "out.png"]
    words += ["--dtype", str(precision.dtype).removeprefix("torch.")]
    if precision.name in QUANTIZATIONS:
        words += ["--quantization", QUANTIZATIONS[precision.name]]
    if placement == DISK:
        words += ["--device-map", json.dumps({"": "cpu", f"{sizes.family.language_model}.layers": "disk"})]
    else:
        words += ["--device", "cpu" if placement == CPU else "cuda"]
    if placement == GPU_OFFLOAD:
        words += ["--offload", "model"]
    words += work.options(sizes)
    prefix = f"{BUDGET_VARIABLE}={math.ceil(budget / 2**20)}m " if placement == GPU_STREAMED else ""
    return prefix + shlex.join(words)


def _python(sizes: ModelSizes, precision: _Precision, placement: str) -> str:
    """CPM-Bee alone has no command; this is how it is loaded."""
    device_map: Any = "cpu" if placement == CPU else "cuda"
    if placement == DISK:
        device_map = {"": "cpu", f"{sizes.family.language_model}.layers": "disk"}
    dtype = str(precision.dtype).removeprefix("torch.")
    options = [f'dtype="{dtype}"', f"device_map={json.dumps(device_map)}"]
    if placement == CPU and precision.name in ON_CPU:
        options.append(f"quantization_config=PackedConfig({8 if precision.name == INT8 else 4})")
    elif precision.name == INT8:
        options.append("quantization_config=BitsAndBytesConfig(load_in_8bit=True)")
    elif precision.name == NF4:
        options.append(
            'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            f'bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="{dtype}")'
        )
    return f"AutoModelForCausalLM.from_pretrained({json.dumps(sizes.name)}, {', '.join(options)})"
