"""Is a file of `torch.save` what it claims to be? Asked before a byte of it is used.

`torch.load(weights_only=True)` keeps a file from running code. It does not keep it from lying: a record may unpack to
more than the disk holds, a tensor may claim more bytes than its record has (and so read its neighbour's), or repeat
one number a million times. None of that can come from `torch.save` of a state dict.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from .errors import OriginalCheckpointError


# The pickle of a state dict holds about 100 bytes a tensor; the released files' have 0.2 MB.
MAX_PICKLE_BYTES = 64 * 2**20

LOCAL_HEADER_BYTES = 30

# Two that are one tensor where a language model was saved with its weights tied: the last two words of their names.
TIED_NAMES = ({"embed_tokens.weight", "lm_head.weight"}, {"input_embedding.weight", "lm_head.weight"})


def record_sizes(path: Path) -> Counter[int] | None:
    """How many tensor records of which size the archive has; None if the file is no zip archive at all.

    Raises:
        OriginalCheckpointError: if its records are compressed, overlap, leave the file, or its pickle is absurdly big.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = sorted(archive.infolist(), key=lambda record: record.header_offset)
            end_of_records = archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError):
        return None
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise OriginalCheckpointError(
                f"{path} was refused: its record {record.filename} of {record.compress_size:,} bytes unpacks to "
                f"{record.file_size:,}, but torch.save never compresses."
            )
        if record.filename.endswith("/data.pkl") and record.file_size > MAX_PICKLE_BYTES:
            raise OriginalCheckpointError(
                f"{path} was refused: the list of its tensors takes {record.file_size:,} bytes; the released files' "
                f"take 200 thousand, and {MAX_PICKLE_BYTES:,} is the limit here."
            )
    ends = [record.header_offset for record in records[1:]] + [end_of_records]
    for record, end in zip(records, ends, strict=True):
        needed = record.header_offset + LOCAL_HEADER_BYTES + len(record.filename.encode()) + record.file_size
        if needed > end:
            raise OriginalCheckpointError(
                f"{path} was refused: its record {record.filename} claims {record.file_size:,} bytes, which reach "
                f"{needed - end:,} bytes into what follows."
            )
    return Counter(record.file_size for record in records if "/data/" in record.filename)


def check_tensors(path: Path, state_dict: Mapping[str, torch.Tensor], records: Counter[int]) -> None:
    """Compares mapped tensors with the records of their file.

    Raises:
        OriginalCheckpointError: if a tensor has more values than bytes, more bytes than its record, or shares them
            with another tensor. Only a language model's head may be its embedding.
    """
    storages: dict[int, tuple[str, int]] = {}
    spans = []
    for name, tensor in state_dict.items():
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise OriginalCheckpointError(
                f"{path} was refused: {name} has the shape {tuple(tensor.shape)}, {tensor.numel():,} values, but the "
                f"file holds {storage.nbytes():,} bytes of it."
            )
        storages[storage.data_ptr()] = (name, storage.nbytes())
        if tensor.numel():
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size(), name))
    spans.sort()
    for (_, end, name), (begin, _, follower) in zip(spans, spans[1:], strict=False):
        if begin < end:
            if _are_tied({name: state_dict[name], follower: state_dict[follower]}):
                continue
            raise OriginalCheckpointError(
                f"{path} was refused: {name} and {follower} share {end - begin:,} bytes; tensors of a checkpoint have "
                "their own."
            )
    remaining = records.copy()
    for name, nbytes in storages.values():
        if nbytes and not remaining[nbytes]:
            raise OriginalCheckpointError(
                f"{path} was refused: {name} claims {nbytes:,} bytes, and the file has no record of that size for it."
            )
        remaining[nbytes] -= 1


def _are_tied(pair: Mapping[str, torch.Tensor]) -> bool:
    """Whether two tensors are one, a language model's embedding and its head."""
    one, other = pair.values()
    return (
        {".".join(name.split(".")[-2:]) for name in pair} in TIED_NAMES
        and one.data_ptr() == other.data_ptr()
        and one.nbytes == one.untyped_storage().nbytes()
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
    )
