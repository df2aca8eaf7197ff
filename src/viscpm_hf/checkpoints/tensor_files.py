"""Reading and writing files of tensors piece by piece, so that memory stays small however big a tensor is."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from ..names import DTYPE_NAMES, full_dtype_name
from ..plain_text import plain
from .archive import Record, StoredTensor
from .errors import ConversionError
from .headers import SAFETENSORS_DTYPES, TensorHeader, safetensors_header, weight_files


# Values of a tensor that are worked on at a time: 1 MB as fp32, which stays in the processor's cache. Pieces of 64 MB
# take five times as long.
PIECE_VALUES = 2**18

# Pieces that may wait for the thread that computes checksums.
MAX_WAITING_PIECES = 16

# Bytes of a file that are read at a time for a checksum.
BLOCK_BYTES = 2**20

# Bytes that may wait in memory for the disk while more are computed.
MAX_UNFLUSHED_BYTES = 2**28

DTYPES_IN_SAFETENSORS = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

# Alignment of a tensor's bytes, as torch.save and safetensors have it.
ARCHIVE_ALIGNMENT = 64
HEADER_ALIGNMENT = 8
PADDING_FIELD = b"FB"  # torch's own name for it
FIXED_ZIP_HEADER_BYTES = 30
ZIP64_FIELD_BYTES = 20
FIELD_HEADER_BYTES = 4


@dataclass(frozen=True)
class TensorSpec(TensorHeader):
    """A tensor to be written."""

    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


# What a model's dtype is called, with or without `torch.` before it.
def named_dtype(dtype: str | torch.dtype, *others: str) -> torch.dtype | str:
    """The dtype of any of its names.

    Args:
        others: words of another meaning (`"auto"`), which are returned as they are.

    Raises:
        ValueError: for anything but float32, bfloat16 and float16.
    """
    if dtype in others:
        return dtype
    name = full_dtype_name(str(dtype))
    if name not in DTYPE_NAMES.values():
        names = ", ".join((*dict.fromkeys(DTYPE_NAMES.values()), *others))
        raise ValueError(f"A model's dtype is one of {names} (fp32, bf16 and fp16 are the same), got {dtype!r}.")
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """`"float16"` and so on."""
    return str(dtype).removeprefix("torch.")


def pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Cuts a tensor along its first dimension into pieces of about `PIECE_VALUES` values."""
    if tensor.ndim < 2 or tensor.numel() <= PIECE_VALUES:
        yield tensor
        return
    rows = max(1, PIECE_VALUES * tensor.shape[0] // tensor.numel())
    yield from tensor.split(rows)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The values' bytes, without a copy where they lie in one row."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


# ------------------------------------------------------------------------------------------------------------ writing


class Checksum:
    """CRC-32 of what goes by, computed in a thread of its own.

    It has to tell a whole file from a spoilt one, not to withstand an attacker, and takes half the time of SHA-256.
    """

    def __init__(self):
        self._value = 0
        self._thread = ThreadPoolExecutor(1, "crc32")
        self._waiting: deque[Future] = deque()

    def update(self, data: memoryview) -> None:
        """The data must not change until the digest is asked for."""
        self._waiting.append(self._thread.submit(self._add, data))
        if len(self._waiting) > MAX_WAITING_PIECES:
            self._waiting.popleft().result()

    def _add(self, data: memoryview) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        while self._waiting:
            self._waiting.popleft().result()
        return f"{self._value:08x}"

    def close(self) -> None:
        self._thread.shutdown()


def crc32_of(path: str | os.PathLike) -> str:
    """Checksum of a file, as [`Checksum`] computes it."""
    value = 0
    for block in _blocks(path):
        value = zlib.crc32(block, value)
    return f"{value:08x}"


def sha256_of(path: str | os.PathLike, wait_for: Callable[[int], bool] = lambda position: True) -> str | None:
    """SHA-256 of a file.

    Args:
        wait_for: called with the position before every block; returns when it may be read, with False to give up.
    """
    digest = hashlib.sha256()
    for block in _blocks(path, wait_for):
        if block is None:
            return None
        digest.update(block)
    return digest.hexdigest()


def _blocks(
    path: str | os.PathLike, wait_for: Callable[[int], bool] = lambda position: True
) -> Iterator[memoryview | None]:
    """A file's bytes, in one buffer that is used again and again; None once it is given up."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    position = 0
    with open(path, "rb", buffering=0) as file:
        while True:
            if not wait_for(position):
                yield None
                return
            size = file.readinto(buffer)
            if not size:
                return
            position += size
            yield buffer[:size]


class SafetensorsWriter:
    """Writes a safetensors file, tensor after tensor in the order of `tensors`.

    Args:
        tensors: everything that the file will hold.

    Raises:
        OSError: if the disk is full, or the file can't be written.
    """

    def __init__(self, path: str | os.PathLike, tensors: Sequence[TensorSpec]):
        self.path = Path(path)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in tensors:
            header[tensor.name] = {
                "dtype": DTYPES_IN_SAFETENSORS[dtype_name(tensor.dtype)],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % HEADER_ALIGNMENT)
        self.nbytes = 8 + len(text) + offset
        self._checksum = Checksum()
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flushing: Future | None = None
        self._unflushed = 0
        self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115 - closed in close()
        self._write(memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, name: str, data: Iterable[torch.Tensor]) -> None:
        """Writes the next tensor."""
        for piece in data:
            self._write(as_bytes(piece))

    def _write(self, data: memoryview) -> None:
        self._checksum.update(data)
        self._unflushed += len(data)
        while data:
            data = data[self._file.write(data) :]
        if self._unflushed > MAX_UNFLUSHED_BYTES:
            # The disk works while the next bytes are computed, rather than at the end of the file.
            self._wait_for_flush()
            self._flushing, self._unflushed = self._flusher.submit(os.fsync, self._file.fileno()), 0

    def _wait_for_flush(self) -> None:
        if self._flushing is not None:
            self._flushing.result()

    def finish(self) -> str:
        """Brings the file to the disk; returns its CRC-32."""
        self._wait_for_flush()
        os.fsync(self._file.fileno())
        digest = self._checksum.hexdigest()
        self.close()
        size = self.path.stat().st_size
        if size != self.nbytes:
            raise ConversionError(f"{self.path} has {size:,} bytes instead of {self.nbytes:,}.")
        return digest

    def close(self) -> None:
        self._checksum.close()
        self._flusher.shutdown()
        self._file.close()


class _Storage:
    """Stands for the bytes of a tensor in the pickle of an archive."""

    def __init__(self, key: str, spec: TensorSpec):
        self.identity = ("storage", _storage_type(spec.dtype), key, "cpu", spec.numel)


class _Tensor:
    """Stands for a tensor in the pickle of an archive."""

    def __init__(self, key: str, spec: TensorSpec):
        self.key, self.spec = key, spec

    def __reduce_ex__(self, protocol: int):
        strides, stride = [], 1
        for size in reversed(self.spec.shape):
            strides.insert(0, stride)
            stride *= size
        storage = _Storage(self.key, self.spec)
        arguments = (storage, 0, tuple(self.spec.shape), tuple(strides), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _StateDictPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple | None:
        return obj.identity if isinstance(obj, _Storage) else None


def _storage_type(dtype: torch.dtype) -> type:
    names = {
        torch.float16: "HalfStorage",
        torch.bfloat16: "BFloat16Storage",
        torch.float32: "FloatStorage",
        torch.float64: "DoubleStorage",
        torch.int64: "LongStorage",
    }
    return getattr(torch, names[dtype])


class ArchiveWriter:
    """Writes a state dict as `torch.save` would, tensor after tensor in the order of `tensors`.

    `torch.save` needs all of them in memory at once.
    """

    def __init__(self, path: str | os.PathLike, tensors: Sequence[TensorSpec]):
        self.path = Path(path)
        self._keys = {tensor.name: str(index) for index, tensor in enumerate(tensors)}
        self._sizes = {tensor.name: tensor.nbytes for tensor in tensors}
        self._file: BinaryIO = open(self.path, "wb")  # noqa: SIM115 - closed in close()
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._root = "archive"
        self._file_of("data.pkl", _pickled(tensors, self._keys))
        self._file_of("byteorder", b"little")

    def write(self, name: str, data: Iterable[torch.Tensor]) -> None:
        """Writes the next tensor."""
        with self._archive.open(self._record(f"data/{self._keys[name]}"), "w", force_zip64=True) as record:
            for piece in data:
                record.write(as_bytes(piece))

    def finish(self) -> str:
        """Brings the file to the disk; returns its CRC-32."""
        self.finish_unhashed()
        return crc32_of(self.path)

    def finish_unhashed(self) -> None:
        """As [`finish`], without reading the file again."""
        self._file_of("version", b"3\n")
        self._archive.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Gives up an unfinished file."""
        self._archive.fp = None  # or it would try to write the list of records
        self._file.close()

    def _file_of(self, name: str, content: bytes) -> None:
        with self._archive.open(self._record(name), "w", force_zip64=True) as record:
            record.write(content)

    def _record(self, name: str) -> zipfile.ZipInfo:
        record = zipfile.ZipInfo(f"{self._root}/{name}")
        begin = self._file.tell() + FIXED_ZIP_HEADER_BYTES + len(record.filename.encode()) + ZIP64_FIELD_BYTES
        padding = -(begin + FIELD_HEADER_BYTES) % ARCHIVE_ALIGNMENT
        record.extra = PADDING_FIELD + padding.to_bytes(2, "little") + b"Z" * padding
        return record


def _pickled(tensors: Sequence[TensorSpec], keys: Mapping[str, str]) -> bytes:
    from io import BytesIO

    content = BytesIO()
    state_dict = OrderedDict((tensor.name, _Tensor(keys[tensor.name], tensor)) for tensor in tensors)
    _StateDictPickler(content, protocol=2).dump(state_dict)
    return content.getvalue()


# ------------------------------------------------------------------------------------------------------------ reading


def map_tensors(path: Path, tensors: dict[str, StoredTensor], records: dict[str, Record]) -> dict[str, torch.Tensor]:
    """Maps checked tensors; none is read before it is used, and writing to one doesn't change the file."""
    mapped = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    storages: dict[str, torch.UntypedStorage] = {}
    result = {}
    for name, tensor in tensors.items():
        value = torch.empty(0, dtype=getattr(torch, tensor.dtype))
        if tensor.numel:
            key = tensor.storage.record
            if key not in storages:
                storages[key] = mapped[records[key].begin : records[key].begin + records[key].nbytes]
            value.set_(storages[key], tensor.offset, tensor.shape, tensor.strides)
        else:
            value = value.new_empty(tensor.shape)
        result[name] = value
    return result


class SafetensorsFolder:
    """The weights of a folder, mapped: no tensor is read before it is used.

    Args:
        folder: where `name.safetensors` or `name.safetensors.index.json` is.
        name: `"model"` or `"diffusion_pytorch_model"`.

    Raises:
        ConversionError: if the index points outside the folder, or files are damaged.
        OSError: if there are none, or they can't be opened.
    """

    def __init__(self, folder: str | os.PathLike, name: str):
        self.folder = Path(folder)
        self.files = weight_files(self.folder, name)
        self.specs: dict[str, TensorHeader] = {}
        self.file_of: dict[str, str] = {}
        for file in self.files:
            for tensor, spec in safetensors_header(self.folder / file).items():
                if tensor in self.specs:
                    raise ConversionError(
                        f"{self.folder} has {plain(tensor)} twice, in {self.file_of[tensor]} and {file}."
                    )
                self.specs[tensor], self.file_of[tensor] = spec, file

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, file by file."""
        for file in self.files:
            yield from mapped_tensors(self.folder / file).items()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self)


def mapped_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, in its own order, mapped."""
    specs = safetensors_header(path)
    try:
        with ExitStack() as stack:
            file = stack.enter_context(safe_open(os.fspath(path), framework="pt"))
            return {name: file.get_tensor(name) for name in specs}
    except SafetensorError as error:
        raise ConversionError(f"{path} is no readable safetensors file ({error}).") from error
