"""Where the parts of a model lie: several devices, RAM, disk.

accelerate's hooks move weights and inputs, transformers decides what goes where. Here is what comes before: checks of
what was asked for, and the weights of an original file that stay on the disk, which are read from that very file.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil
import torch
from accelerate import dispatch_model
from accelerate.utils import extract_submodules_state_dict, set_module_tensor_to_device
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import _get_device_map, compute_module_sizes, offload_weight

from ..checkpoints.key_matching import KeyMatcher
from ..checkpoints.original import checkpoint_kind, key_map_of
from ..checkpoints.weight_transforms import apply_operation, rows_as_stored
from ..plain_text import size_text


AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
# Where weights may lie beside GPUs.
HOST = ("cpu", "disk")
UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20,
         "gib": 2**30}  # fmt: skip


def parse_size(size: int | str, what: str = "A size") -> int:
    """Bytes of `1g`, `500m`, `2GB` (powers of ten), `2GiB`, or a number of bytes.

    Raises:
        ValueError: for anything else; `what` says whose size it is.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", size.lower()) if isinstance(size, str) else None
    if match is None or match[2] not in UNITS:
        raise ValueError(f"{what} is a number of bytes, or as 1g, 500m, 2GB, 2GiB; got {size!r}.")
    return int(float(match[1]) * UNITS[match[2]])


# ------------------------------------------------------------------------------------------------------------- checks


def check_placement(
    device_map: str | Mapping[str, Any] | None,
    max_memory: Mapping[int | str, int | str] | None,
    offload_folder: str | os.PathLike | None,
    device: str | torch.device | None = None,
) -> dict[int | str, int] | None:
    """Checks what can be checked without a model; returns `max_memory` in bytes.

    Raises:
        ValueError: for devices that there are none of, more memory than there is, or arguments that exclude each
            other.
        OSError: if the folder can't be written to.
    """
    if device_map is None:
        for name, value in (("max_memory", max_memory), ("offload_folder", offload_folder)):
            if value is not None:
                raise ValueError(
                    f'{name} says how to spread a model over devices: it needs a device_map, e.g. "auto".'
                )
        return None
    if device is not None:
        raise ValueError(
            f"device={str(device)!r} puts the whole model on one device, device_map={device_map!r} spreads it over "
            "several: give one of the two."
        )
    if isinstance(device_map, Mapping):
        for module, place in device_map.items():
            _check_device(place, f"device_map puts {module or 'the model'!r} on")
    elif device_map not in AUTOMATIC:
        _check_device(device_map, f"device_map is one of {', '.join(AUTOMATIC)}, a device, or a dict, and names")
    if max_memory is not None:
        max_memory = _check_memory(max_memory)
    if offload_folder is not None:
        check_writable(offload_folder)
    return max_memory


def check_writable(folder: str | os.PathLike) -> None:
    """Makes the folder, unless it is there.

    Raises:
        OSError: if it can't be made or written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise OSError(f"offload_folder {os.fspath(folder)} can't be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"offload_folder {os.fspath(folder)} can't be written to.")


def _known_devices() -> list[int | str]:
    gpus: list[int | str] = list(range(torch.cuda.device_count()))
    return gpus + (["mps"] if torch.backends.mps.is_available() else []) + list(HOST)


def _check_device(device: Any, what: str) -> None:
    if device in HOST:
        return
    try:
        torch.empty(0, device=device if isinstance(device, (int, torch.device)) else torch.device(device))
    except (RuntimeError, AssertionError, TypeError) as error:
        known = ", ".join(map(str, _known_devices()))
        raise ValueError(f"{what} {str(device)!r}, but the devices here are: {known}.") from error


def _check_memory(max_memory: Mapping[int | str, int | str]) -> dict[int | str, int]:
    known = _known_devices()
    sizes = {}
    for device, size in max_memory.items():
        if device not in known:
            raise ValueError(
                f"max_memory names the device {device!r}, but the devices here are: {', '.join(map(str, known))}."
            )
        sizes[device] = parse_size(size, f"max_memory[{device!r}]")
        if device == "disk":
            continue
        there_is = total_memory(device)
        if sizes[device] > there_is:
            raise ValueError(
                f"max_memory asks for {size_text(sizes[device])} on device {device!r}, which has "
                f"{size_text(there_is)}: give at most that."
            )
    return sizes


def total_memory(device: int | str) -> int:
    """Bytes that a device has in all."""
    if isinstance(device, int):
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def main_device(device_map: str | Mapping[str, Any]) -> torch.device:
    """Where inputs belong: the first GPU that has a part of the model, or the CPU."""
    if isinstance(device_map, str):
        places = _known_devices() if device_map in AUTOMATIC else [device_map]
    else:
        places = list(device_map.values())
    devices = [torch.device("cuda", place) if isinstance(place, int) else place for place in places if place != "disk"]
    gpus = [device for device in map(torch.device, devices) if device.type != "cpu"]
    return min(gpus, key=lambda device: device.index or 0, default=torch.device("cpu"))


def _plain(device: Any) -> int | str:
    """A device as accelerate names it: `"cpu"`, `"disk"`, the number of a GPU."""
    if isinstance(device, int) or device in HOST:
        return device
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.current_device() if device.index is None else device.index
    return str(device)


def place_of(name: str, device_map: Mapping[str, Any]) -> Any:
    """The device of a parameter by the longest matching entry; None if there is none."""
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        prefix = ".".join(parts[:end])
        if prefix in device_map:
            return device_map[prefix]
    return None


def check_device_map(model: PreTrainedModel, device_map: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a map against a model (on whatever device); completes it with the tied head.

    Raises:
        ValueError: for names that the model doesn't have, parameters without a device, a layer in two places, or a
            tied head elsewhere than its embedding.
    """
    device_map = {name: _plain(device) for name, device in device_map.items()}
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    modules = dict(model.named_modules())
    unknown = [name for name in device_map if name not in modules and name not in parameters]
    if unknown:
        raise ValueError(
            f"device_map names {', '.join(map(repr, unknown))}, but {type(model).__name__} has no such part; its "
            f"parts are {', '.join(name for name, _ in model.named_children())}, and theirs with a dot between."
        )
    for head, embedding in model.all_tied_weights_keys.items():
        place = place_of(embedding, device_map)
        if place_of(head, device_map) is None and place is not None:
            device_map[head.rpartition(".")[0]] = place
        elif place_of(head, device_map) != place:
            raise ValueError(
                f"device_map puts {head} on {place_of(head, device_map)!r} and {embedding} on {place!r}, but they are "
                "one and the same tensor: give them the same device."
            )
    homeless = [name for name in parameters if place_of(name, device_map) is None]
    if homeless:
        raise ValueError(
            f"device_map gives {len(homeless)} of {len(parameters)} parameters no device, {homeless[0]} for example; "
            'add their modules, or "" for all the rest.'
        )
    for name, module in modules.items():
        if is_piece(module, model):
            own = (f"{name}.{parameter}" for parameter, _ in module.named_parameters())
            places = {str(place_of(parameter, device_map)) for parameter in own}
            if len(places) > 1:
                raise ValueError(
                    f"device_map puts parts of {name} on {', '.join(sorted(places))}, but a "
                    f"{type(module).__name__} stays in one piece: give one device for {name!r}."
                )
    return _spelt_out(model, device_map)


def _spelt_out(model: PreTrainedModel, device_map: dict[str, Any]) -> dict[str, Any]:
    """The same map without entries within entries, which accelerate's hooks take for the outer one."""
    for name in list(device_map):
        prefix = f"{name}." if name else ""
        if not any(other.startswith(prefix) and other != name for other in device_map):
            continue
        device, module = device_map.pop(name), model.get_submodule(name)
        own = [part for part, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
        return _spelt_out(model, {f"{prefix}{part}": device for part in own} | device_map)
    return device_map


def check_fits(model: PreTrainedModel, max_memory: Mapping[int | str, int]) -> None:
    """Raises ValueError if a device is to be used that has no room for the largest part that stays in one piece."""
    sizes, leaves = compute_module_sizes(model)
    pieces = {name: sizes[name] for name, module in model.named_modules() if is_piece(module, model)}
    pieces |= {name: size for name, size in leaves.items() if not any(name.startswith(f"{of}.") for of in pieces)}
    largest = max(pieces, key=pieces.__getitem__)
    for device, size in max_memory.items():
        if device != "disk" and 0 < size < pieces[largest]:
            raise ValueError(
                f"max_memory gives device {device!r} {size_text(size)}, but {largest}, the largest part that stays "
                f"in one piece, has {size_text(pieces[largest])}: give at least {size_text(2 * pieces[largest])}, or "
                "0 to leave the device out."
            )


def is_piece(module: torch.nn.Module, model: PreTrainedModel) -> bool:
    """Whether all of a module has to lie on one device."""
    return type(module).__name__ in model._no_split_modules


# ------------------------------------------------------------------------------------------------------------ loading


class OriginalWeights(Mapping):
    """The tensors of a mapped original file by a model's own names and in its dtype, read when they are asked for.

    Args:
        state_dict: of the file, as of `load_state_dict`.
        model: the model, on whatever device.
    """

    def __init__(self, state_dict: Mapping[str, torch.Tensor], model: PreTrainedModel):
        matcher = KeyMatcher(key_map_of(checkpoint_kind(state_dict), state_dict))
        own = model.state_dict()
        prefix = f"{model.base_model_prefix}."
        self._sources: dict[str, tuple[torch.Tensor, str, torch.dtype]] = {}
        for name, tensor in state_dict.items():
            match = matcher.match(name)
            if match is None:
                continue
            # The maps know the language model's parts by their names within `...ForCausalLM`, and so on.
            target = match[0] if match[0] in own else match[0].removeprefix(prefix)
            if target in own:
                self._sources[target] = (tensor, match[1].operation, own[target].dtype)
        for head, embedding in model.all_tied_weights_keys.items():
            self._sources[head] = self._sources[embedding]

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor, operation, dtype = self._sources[name]
        return apply_operation(operation, tensor.to(dtype))

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def load_with_device_map(
    load: Callable[..., PreTrainedModel],
    model_class: type[PreTrainedModel],
    name_or_path: Any,
    config: PreTrainedConfig,
    state_dict: Mapping[str, torch.Tensor] | None,
    *,
    device_map: Any,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike | None = None,
    **kwargs,
) -> PreTrainedModel:
    """`from_pretrained` with a `device_map`.

    Args:
        load: transformers' own `from_pretrained` of the class.
        name_or_path: folder or Hub id, None if there is only a state dict.
        config: of the model, to see what it will be like.
        state_dict: of the mapped original file, if it is one.
        device_map, max_memory, offload_folder: as of `from_pretrained`. Weights of an original file that go to the
            disk are read from that file unless there is a folder, which then gets a copy of them.
        kwargs: further arguments of `from_pretrained`.
    """
    if not isinstance(device_map, (str, Mapping)):
        device_map = {"": device_map}
    max_memory = check_placement(device_map, max_memory, offload_folder)
    if isinstance(device_map, str) and device_map not in AUTOMATIC:
        device_map = {"": device_map}
    with torch.device("meta"):
        model = model_class(config).to(_dtype(kwargs.get("dtype"), config, state_dict))
    is_quantized = kwargs.get("quantization_config") is not None or hasattr(config, "quantization_config")
    if isinstance(device_map, Mapping):
        device_map = check_device_map(model, device_map)
        if is_quantized and "disk" in device_map.values():
            raise ValueError(
                "device_map leaves parts on the disk, but quantised weights stay in RAM or on a GPU: change the map, "
                "or load the model in full precision."
            )
    elif not is_quantized:  # else only the quantiser knows how large the parts are
        if max_memory is not None:
            check_fits(model, max_memory)
        device_map = _get_device_map(model, device_map, max_memory and dict(max_memory), None)
    is_original = state_dict is not None and checkpoint_kind(state_dict) is not None
    if is_quantized or not is_original or "disk" not in device_map.values():
        if name_or_path is None:
            kwargs["state_dict"] = state_dict
        placement = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
        is_in_place = isinstance(device_map, Mapping) and "disk" in device_map.values() and offload_folder is None
        with rows_as_stored() if is_in_place else contextlib.nullcontext():
            return load(name_or_path, **placement, **kwargs)
    # Nothing is read yet, but everything else is done that belongs to loading.
    loaded = load(None, state_dict=state_dict, device_map={"": "meta"}, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.config.name_or_path = str(name_or_path or "")
    _fill(model, device_map, OriginalWeights(state_dict, model), offload_folder)
    return loaded


def _fill(
    model: PreTrainedModel,
    device_map: Mapping[str, Any],
    weights: OriginalWeights,
    offload_folder: str | os.PathLike | None,
) -> None:
    """Reads what belongs into memory, and lets accelerate read the rest whenever it is needed."""
    index: dict[str, Any] = {}
    for name, _ in tqdm(list(model.named_parameters()), desc="Loading weights", disable=None):
        device = place_of(name, device_map)
        if device != "disk":
            set_module_tensor_to_device(model, name, device, value=weights[name])
        elif offload_folder is not None:
            offload_weight(weights[name].contiguous(), name, os.fspath(offload_folder), index)
    model.tie_weights()
    index |= {head: index[source] for head, source in model.all_tied_weights_keys.items() if source in index}
    in_memory = [name for name, device in device_map.items() if device == "cpu"]
    state_dict = extract_submodules_state_dict(model.state_dict(), in_memory)
    dispatch_model(
        model,
        device_map=dict(device_map),
        state_dict=state_dict if offload_folder is not None else ChainMap(state_dict, weights),
        offload_index=index,
        skip_keys=model._skip_keys_device_placement,
    )


def _dtype(
    dtype: str | torch.dtype | None, config: PreTrainedConfig, state_dict: Mapping[str, torch.Tensor] | None
) -> torch.dtype:
    """The dtype that loading will end up with."""
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    if isinstance(dtype, torch.dtype):
        return dtype
    stored = (tensor.dtype for tensor in (state_dict or {}).values() if tensor.is_floating_point())
    return config.dtype or next(stored, torch.float32)
