"""What files of tensors say of themselves: names, dtypes and shapes. No value is read, and torch isn't imported."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..names import ITEM_SIZES
from ..plain_text import plain
from .errors import ConversionError
from .json_files import load_json


# The format's names of dtypes -> torch's.
SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
# The format's own limit is 100 MB, of which a parser makes a gigabyte; 20,000 tensors take 3 MB.
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 20_000

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_ADVICE = " It is Git LFS's pointer to the file: fetch the file itself with git lfs pull."


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as a file's header knows it."""

    name: str
    dtype: str
    """`"float16"` and so on."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_SIZES[self.dtype]


def safetensors_header(path: str | os.PathLike) -> dict[str, TensorHeader]:
    """Names, dtypes and shapes of a safetensors file; its values aren't read.

    Raises:
        ConversionError: if the file is damaged or its header absurd.
        OSError: if it can't be opened.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ConversionError(
                f"{path} is no safetensors file: its header claims {length:,} bytes, but the file has {size:,} and "
                f"{MAX_HEADER_BYTES:,} is the limit here.{LFS_ADVICE if is_lfs_pointer(path) else ''}"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            raise ValueError(f"it has {len(header):,} tensors, and {MAX_TENSORS:,} is the limit here")
        specs = {
            name: TensorHeader(name, SAFETENSORS_DTYPES[entry["dtype"]], tuple(map(_size, entry["shape"])))
            for name, entry in header.items()
        }
        offsets = {name: _span(entry["data_offsets"]) for name, entry in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{path} is no safetensors file: its header makes no sense ({plain(error)}).") from error
    for name, spec in specs.items():
        begin, stop = offsets[name]
        if spec.nbytes != stop - begin:
            raise ConversionError(
                f"{path} is damaged: {plain(name)} of shape {plain(spec.shape)} needs {spec.nbytes:,} bytes, and the "
                f"header gives it {stop - begin:,}."
            )
    end = 0
    for begin, stop in sorted(offsets.values()):
        if begin != end:
            raise ConversionError(f"{path} is damaged: its tensors overlap or leave gaps at byte {begin:,}.")
        end = stop
    if 8 + length + end != size:
        raise ConversionError(
            f"{path} is damaged: it has {size:,} bytes, but its tensors need {8 + length + end:,}; was it cut short?"
        )
    return specs


def _size(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**62:
        raise ValueError(f"{plain(value)} is no size")
    return value


def _span(offsets: Any) -> tuple[int, int]:
    begin, stop = map(_size, offsets)
    return begin, stop


def is_lfs_pointer(path: str | os.PathLike) -> bool:
    """Whether a file is what Git leaves of a big one if Git LFS isn't installed."""
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def weight_files(folder: Path, name: str) -> list[str]:
    """File names of a folder's weights, one or many.

    Raises:
        ConversionError: if the index is damaged or names files outside the folder.
        FileNotFoundError: if there are no weights, or some of them are missing.
    """
    index_file = folder / f"{name}.safetensors.index.json"
    if (folder / f"{name}.safetensors").exists():
        files = [f"{name}.safetensors"]
    elif index_file.exists():
        try:
            weight_map = load_json(index_file)["weight_map"]
            files = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(f"{index_file} is no index of weights: {plain(error)}.") from error
    else:
        raise FileNotFoundError(f"{folder} has neither {name}.safetensors nor {index_file.name}.")
    for file in files:
        check_inside(folder, file, index_file)
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} lacks {file}, one of the {len(files)} files that its index names.")
    return files


def check_weight_files(folder: Path, name: str) -> None:
    """Looks at the headers and sizes of a folder's weights, if it has any, before a library reads them, which would
    tell neither the file nor what to do.

    Raises:
        ConversionError: if a file is damaged, cut short, or a pointer of Git LFS.
        FileNotFoundError: if a shard is missing.
    """
    if any((folder / f"{name}.safetensors{suffix}").exists() for suffix in ("", ".index.json")):
        for file in weight_files(folder, name):
            safetensors_header(folder / file)


def check_inside(folder: Path, file: str, index_file: Path, is_there: bool = True) -> None:
    """Raises [`ConversionError`] if a file name of an index, or the file itself if it is there, leads out of the
    folder."""
    is_plain = isinstance(file, str) and file == os.path.basename(file) and file not in ("", ".", "..")
    if not is_plain or "\\" in file:
        raise ConversionError(f"{index_file} was refused: it names {plain(file)!r}, which isn't a file beside it.")
    if not is_there:
        return
    target = (folder / file).resolve()
    if target.parent not in (folder.resolve(), *_cache_blobs(folder)):
        raise ConversionError(f"{folder / file} was refused: it is a link to {target}, outside its folder.")


def _cache_blobs(folder: Path) -> Iterator[Path]:
    """In the Hub's cache every file is a link into the repository's own `blobs/`: that place, for a folder of it."""
    for parent in folder.resolve().parents:
        if parent.name == "snapshots":
            yield parent.parent / "blobs"
