"""Files of `torch.save`, read by a parser that knows nothing but tensors.

`torch.load(weights_only=True)` runs no code of a file. It does not keep a file from lying, or from costing: a call
it allows may take gigabytes (`bytearray(2**31)`), a record may unpack to more than the disk holds, a tensor may claim
more bytes than its record has (and so read its neighbour's), or repeat one number a million times, and its errors
advise to load the file nevertheless. So nothing is called here: the pickle is a list of instructions, of which those
that describe a state dict are followed, and the others are named and refused. What is described is compared with the
records of the archive before a byte of them is mapped.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..names import ITEM_SIZES
from ..plain_text import plain
from .errors import OriginalCheckpointError
from .headers import MAX_TENSORS


# The pickle of a state dict holds about 100 bytes a tensor; the released files' have 0.2 MB.
MAX_PICKLE_BYTES = 64 * 2**20

# The released files have 1,400 tensors at most, each of some 40 instructions.
MAX_INSTRUCTIONS = 50 * MAX_TENSORS

# Of the archive: what lies beside the tensors, and the list of all records with some 80 bytes each.
MAX_OTHER_RECORDS = 100
MAX_DIRECTORY_BYTES = 8 * 2**20

MAX_DIMENSIONS = 8
MAX_NAME_LENGTH = 1000

# Two that are one tensor where a language model was saved with its weights tied: the last two words of their names.
TIED_NAMES = ({"embed_tokens.weight", "lm_head.weight"}, {"input_embedding.weight", "lm_head.weight"})

LOCAL_HEADER = struct.Struct("<4s22xHH")
LOCAL_SIGNATURE = b"PK\x03\x04"

STORAGES = {
    "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "FloatStorage": "float32", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


class UnreadableError(ValueError):
    """The bytes aren't those of such a file at all."""


class RefusedError(ValueError):
    """The file is whole, but asks for something else than tensors."""


@dataclass(frozen=True)
class Storage:
    """Numbers of a tensor, or of several."""

    record: str
    """Name of its record in the archive, below the archive's own folder."""
    dtype: str
    """`"float16"` and so on."""
    numel: int

    @property
    def itemsize(self) -> int:
        return ITEM_SIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the pickle describes it; offset and strides in numbers of its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.storage.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """Behind the last number that it reaches."""
        reach = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.offset + reach + 1 if self.numel else self.offset


@dataclass(frozen=True)
class Record:
    """Where bytes of an archive are in its file."""

    begin: int
    nbytes: int


# --------------------------------------------------------------------------------------------------------- the archive


def read_archive(path: Path) -> tuple[Any, dict[str, Record]]:
    """What the pickle of an archive describes, and the archive's records by their names below its folder.

    Raises:
        UnreadableError: if the file is no such archive.
        RefusedError: if the pickle asks for anything but tensors, numbers, texts and containers of them.
        OriginalCheckpointError: if its records are compressed, overlap or leave the file, or there is too much of
            something.
        OSError: if it can't be opened.
    """
    with path.open("rb") as file:
        file.read(1)  # the system's own words for one that can't be read
        _check_directory(path, file)
        try:
            with zipfile.ZipFile(file) as archive:
                infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
                _check_records(path, infos, archive.start_dir)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
            if isinstance(error, OriginalCheckpointError):
                raise
            raise UnreadableError(str(error)) from error
        if len(infos) > MAX_TENSORS + MAX_OTHER_RECORDS:
            raise OriginalCheckpointError(_too_many(path, len(infos), "records"))
        pickles = [info.filename for info in infos if info.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or len({info.filename for info in infos}) != len(infos):
            raise UnreadableError(f"it has {len(pickles)} lists of tensors, or two records of one name")
        root = pickles[0].removesuffix("data.pkl")
        records = {
            info.filename.removeprefix(root): Record(_begin_of(file, info), info.file_size)
            for info in infos
            if info.filename.startswith(root)
        }
        order = _content(file, records.get("byteorder", Record(0, 0)))
        if order not in (b"", b"little"):
            raise UnreadableError(f"its numbers are {plain(order)}-endian")
        return describe(_content(file, records["data.pkl"])), records


def _check_directory(path: Path, file: BinaryIO) -> None:
    """Looks at how long the list of records is before it is read."""
    try:
        end = zipfile._EndRecData(file)  # what `ZipFile` itself goes by, which has no limit
    except (OSError, zipfile.BadZipFile, struct.error) as error:
        raise UnreadableError(plain(error)) from error
    if end is None:
        raise UnreadableError("it is no archive of torch.save, or without its end")
    nbytes = end[zipfile._ECD_SIZE]
    if nbytes > MAX_DIRECTORY_BYTES:
        raise OriginalCheckpointError(
            f"{path} was refused: the list of its records takes {nbytes:,} bytes; the released files' take 100 "
            f"thousand, and {MAX_DIRECTORY_BYTES:,} is the limit here."
        )


def _too_many(path: Path, count: int, what: str) -> str:
    return (
        f"{path} was refused: it has {count:,} {what}; the released files have 1,400 at most, and {MAX_TENSORS:,} is "
        "the limit here."
    )


def _check_records(path: Path, infos: list[zipfile.ZipInfo], end_of_records: int) -> None:
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise OriginalCheckpointError(
                f"{path} was refused: its record {plain(info.filename)} of {info.compress_size:,} bytes unpacks to "
                f"{info.file_size:,}, but torch.save never compresses."
            )
        if info.filename.endswith("/data.pkl") and info.file_size > MAX_PICKLE_BYTES:
            raise OriginalCheckpointError(
                f"{path} was refused: the list of its tensors takes {info.file_size:,} bytes; the released files' "
                f"take 200 thousand, and {MAX_PICKLE_BYTES:,} is the limit here."
            )
    ends = [info.header_offset for info in infos[1:]] + [end_of_records]
    for info, end in zip(infos, ends, strict=True):
        needed = (
            info.header_offset + LOCAL_HEADER.size + len(info.filename.encode("utf-8", "replace")) + info.file_size
        )
        if info.header_offset < 0 or needed > end:
            raise OriginalCheckpointError(
                f"{path} was refused: its record {plain(info.filename)} claims {info.file_size:,} bytes, which reach "
                f"{needed - end:,} bytes into what follows."
            )


def _begin_of(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: behind a header whose length only itself knows."""
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size:
        raise UnreadableError(f"its record {plain(info.filename)} has no header")
    signature, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
    if signature != LOCAL_SIGNATURE:
        raise UnreadableError(f"its record {plain(info.filename)} has no header")
    return info.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes


def _content(file: BinaryIO, record: Record) -> bytes:
    file.seek(record.begin)
    return file.read(min(record.nbytes, MAX_PICKLE_BYTES))


# ---------------------------------------------------------------------------------------------------------- the pickle


@dataclass(frozen=True)
class _Global:
    """Something that the pickle names. It is never looked up."""

    name: str


class _Mark:
    pass


MARK = _Mark()
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = (
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES",
)  # fmt: skip
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def describe(content: bytes) -> Any:
    """Follows a pickle that describes tensors.

    Returns:
        Dicts, lists, tuples, texts, numbers and [`StoredTensor`]s.

    Raises:
        UnreadableError: if it is no pickle, or breaks off.
        RefusedError: at an instruction that no state dict needs.
        OriginalCheckpointError: if it has too many instructions.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if number == MAX_INSTRUCTIONS:
                raise OriginalCheckpointError(
                    f"The list of tensors was refused: it has more than {MAX_INSTRUCTIONS:,} instructions; the "
                    "released files' have 60 thousand."
                )
            if opcode.name == "STOP":
                break
            _follow(opcode.name, argument, stack, memo)
        (result,) = stack
        return result
    except (RefusedError, OriginalCheckpointError):
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise UnreadableError(f"the list of its tensors makes no sense: {plain(error)}") from error


def _follow(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in VALUES:
        stack.append(argument)
    elif name in CONSTANTS:
        stack.append(CONSTANTS[name])
    elif name in EMPTY:
        stack.append(EMPTY[name]())
    elif name == "MARK":
        stack.append(MARK)
    elif name == "TUPLE":
        stack.append(tuple(_to_mark(stack)))
    elif name in TUPLES:
        items = [_pop(stack) for _ in range(TUPLES[name])]
        stack.append(tuple(reversed(items)))
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = _top(stack)
    elif name == "MEMOIZE":
        memo[len(memo)] = _top(stack)
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name in ("SETITEM", "SETITEMS"):
        items = _to_mark(stack) if name == "SETITEMS" else [_pop(stack), _pop(stack)][::-1]
        target = _of_type(_top(stack), dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of nested tuples may take for ever.
            target[_key(key)] = value
    elif name in ("APPEND", "APPENDS"):
        items = _to_mark(stack) if name == "APPENDS" else [_pop(stack)]
        _of_type(_top(stack), list).extend(items)
    elif name == "GLOBAL":
        stack.append(_Global(argument.replace(" ", ".", 1)))
    elif name == "STACK_GLOBAL":
        attribute, module = _of_type(_pop(stack), str), _of_type(_pop(stack), str)
        stack.append(_Global(f"{module}.{attribute}"))
    elif name == "BINPERSID":
        stack.append(_storage(_pop(stack)))
    elif name == "REDUCE":
        arguments, called = _of_type(_pop(stack), tuple), _pop(stack)
        stack.append(_call(_of_type(called, _Global).name, arguments))
    elif name == "BUILD":
        _pop(stack)  # attributes of a dict or of a parameter: torch's notes, no numbers
        if not isinstance(_top(stack), (dict, StoredTensor)):
            raise RefusedError("it sets attributes")
    elif name not in ("PROTO", "FRAME"):
        raise RefusedError(f"its pickle has an instruction that none of tensors needs, {name}")


def _pop(stack: list[Any]) -> Any:
    value = stack.pop()
    if value is MARK:
        raise ValueError("a mark in place of a value")
    return value


def _top(stack: list[Any]) -> Any:
    if stack[-1] is MARK:
        raise ValueError("a mark in place of a value")
    return stack[-1]


def _to_mark(stack: list[Any]) -> list[Any]:
    for position in range(len(stack) - 1, -1, -1):
        if stack[position] is MARK:
            items = stack[position + 1 :]
            del stack[position:]
            return items
    raise ValueError("no mark")


def _of_type(value: Any, wanted: type) -> Any:
    if type(value) is not wanted:
        raise TypeError(f"a {type(value).__name__} in place of a {wanted.__name__}")
    return value


def _key(key: Any) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(f"a {type(key).__name__} as a name")
    if isinstance(key, str) and len(key) > MAX_NAME_LENGTH:
        raise ValueError(f"a name of {len(key):,} characters, {plain(key)}")
    return key


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{plain(value)} is no number of numbers")
    return value


def _counts(values: Any) -> tuple[int, ...]:
    if len(_of_type(values, tuple)) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(values):,} dimensions")
    return tuple(map(_count, values))


def _storage(identity: Any) -> Storage:
    what, storage_type, record, _, numel = _of_type(identity, tuple)
    name = _of_type(storage_type, _Global).name
    dtype = STORAGES.get(name.removeprefix("torch."))
    if what != "storage" or dtype is None:
        raise RefusedError(f"it has numbers of the kind {plain(name)}")
    return Storage(f"data/{_of_type(record, str)}", dtype, _count(numel))


def _call(name: str, arguments: tuple) -> Any:
    """What a call would make, if it is one of a state dict's."""
    if name == "torch._utils._rebuild_tensor_v2":
        storage, offset, shape, strides = arguments[:4]
        tensor = StoredTensor(_of_type(storage, Storage), _count(offset), _counts(shape), _counts(strides))
        if len(tensor.shape) != len(tensor.strides):
            raise ValueError("a tensor with more dimensions than strides, or fewer")
        return tensor
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return _of_type(arguments[0], StoredTensor)
    if name == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes, as OmniLMM-12B's have: notes too
        called, kind, own, _ = arguments
        names = _of_type(called, _Global).name, _of_type(kind, _Global).name
        if names != ("torch._utils._rebuild_tensor_v2", "torch.Tensor"):
            raise RefusedError(f"it asks for {plain(names[0])} as {plain(names[1])}")
        return _call(names[0], _of_type(own, tuple))
    if name == "collections.OrderedDict" and not arguments:
        return {}
    if name == "torch.Size":
        return _counts(*arguments)
    raise RefusedError(f"it asks for {plain(name)}")


# --------------------------------------------------------------------------------------------------------- the tensors


def check_tensors(path: Path, tensors: dict[str, StoredTensor], records: dict[str, Record]) -> None:
    """Compares described tensors with the records of their file.

    Raises:
        OriginalCheckpointError: if a tensor has more values than bytes, more bytes than its record, or shares them
            with another tensor (only a language model's head may be its embedding); if there are too many.
    """
    if len(tensors) > MAX_TENSORS:
        raise OriginalCheckpointError(_too_many(path, len(tensors), "tensors"))
    spans = []
    size_of_file = path.stat().st_size
    for name, tensor in tensors.items():
        storage = tensor.storage
        record = records.get(storage.record)
        if tensor.numel * storage.itemsize > storage.nbytes:
            raise OriginalCheckpointError(
                f"{path} was refused: {plain(name)} has the shape {tensor.shape}, {tensor.numel:,} values, but the "
                f"file holds {storage.nbytes:,} bytes of it."
            )
        if storage.nbytes and (record is None or record.nbytes != storage.nbytes):
            raise OriginalCheckpointError(
                f"{path} was refused: {plain(name)} claims {storage.nbytes:,} bytes, and the file has no record of "
                "that size for it."
            )
        if record is not None and record.begin + record.nbytes > size_of_file:
            raise OriginalCheckpointError(
                f"{path} was refused: {plain(name)} ends at byte {record.begin + record.nbytes:,} of a file of "
                f"{size_of_file:,}. It is incomplete or damaged: download it again."
            )
        if tensor.numel and tensor.end > storage.numel:
            raise OriginalCheckpointError(
                f"{path} was refused: {plain(name)} reaches to number {tensor.end:,} of {storage.numel:,} that the "
                "file holds of it."
            )
        if tensor.numel:
            size = storage.itemsize
            spans.append((record.begin + tensor.offset * size, record.begin + tensor.end * size, name))
    spans.sort()
    for (_, end, name), (begin, _, follower) in zip(spans, spans[1:], strict=False):
        if begin < end:
            if _are_tied((name, tensors[name]), (follower, tensors[follower])):
                continue
            raise OriginalCheckpointError(
                f"{path} was refused: {plain(name)} and {plain(follower)} share {end - begin:,} bytes; tensors of a "
                "checkpoint have their own."
            )


def _are_tied(one: tuple[str, StoredTensor], other: tuple[str, StoredTensor]) -> bool:
    """Whether two tensors are one, a language model's embedding and its head."""
    names = {".".join(name.split(".")[-2:]) for name, _ in (one, other)}
    return names in TIED_NAMES and one[1] == other[1] and one[1].numel == one[1].storage.numel
