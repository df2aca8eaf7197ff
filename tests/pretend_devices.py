"""Devices that don't exist, to see on a CPU what lies where.

`pretend:0` and `pretend:1` are devices to torch, transformers and accelerate. A tensor there is one on the CPU with a
label: operations compute on the CPU, so results are exact, and refuse tensors of two devices, as real ones do.

torch keeps a registered device for the rest of the process, and libraries then take it for the accelerator of this
machine, so the tests run this file in a process of its own.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


NAME = "pretend"
CPU = torch.device("cpu")


class PretendTensor(torch.Tensor):
    """A tensor on a device that doesn't exist; `held` has its values."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False):
        if device is None:  # accelerate makes parameters anew, with the class of the old one
            return torch.nn.Parameter(held, requires_grad=requires_grad)
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            held.stride(),
            held.storage_offset(),
            dtype=held.dtype,
            device=device,
            requires_grad=requires_grad,
        )
        self.held = held
        return self

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __repr__(self, **kwargs) -> str:
        return f"PretendTensor({self.device}, {self.held!r})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def held(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


def is_pretended(device: torch.device | None) -> bool:
    return device is not None and device.type == NAME


def compute(func, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    device = kwargs.get("device")
    if device is not None:
        device = torch.device(device)
        kwargs = {**kwargs, "device": CPU if is_pretended(device) else device}
    elif func is not torch.ops.aten.copy_.default:
        # As everywhere, a number on the CPU goes with any device.
        places = {tensor.device for tensor in tensors if tensor.ndim > 0 or isinstance(tensor, PretendTensor)}
        if len(places) > 1:
            raise RuntimeError(f"{func} of tensors on {', '.join(sorted(map(str, places)))}")
    if device is None and ours:
        device = ours[0].device
    result = func(*tree_map(held, args), **tree_map(held, kwargs))
    same = {id(tensor.held): tensor for tensor in ours}  # of operations in place

    def label(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not is_pretended(device):
            return value
        return same.get(id(value)) or PretendTensor(value, device)

    return tree_map(lambda value: same[id(value)] if id(value) in same else label(value), result)


class PretendDevices(TorchDispatchMode):
    """While it is active, tensors can be put on pretended devices.

    Attributes:
        moves: how often tensors of a shape went to a device.
    """

    def __init__(self):
        super().__init__()
        self.moves: Counter[tuple[tuple[int, ...], str]] = Counter()

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # so that `torch.tensor(..., device=...)` comes by here
        return super().__enter__()

    def __exit__(self, *exception):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") not in (None, args[0].device):
            self.moves[tuple(args[0].shape), str(kwargs["device"])] += 1
        return compute(func, args, kwargs)


def register() -> None:
    _setup_privateuseone_for_python_backend(NAME)
