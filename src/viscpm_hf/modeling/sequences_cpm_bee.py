"""Generated ids that know what the extension tokens of their prompts stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .document_cpm_bee import own_strings


class TokenSequences(torch.Tensor):
    """Ids `(rows, length)` as `generate` returns them, or of one row `(length)`.

    Rows, columns and copies know their strings too; of whatever else is made of them nothing is known.
    """

    extension_table: torch.Tensor | None = None
    """`(rows, E, 3 + characters)`."""
    prompt_length: int = 0
    """How many of the tokens are the prompt's."""

    @classmethod
    def of(cls, ids: torch.Tensor, extension_table: torch.Tensor, prompt_length: int) -> torch.Tensor:
        """`ids (n * rows, length)` of the prompts with that table. Other kinds of tensors stay what they are."""
        if type(ids) is not torch.Tensor:
            return ids
        times = ids.shape[0] // extension_table.shape[0]
        return cls._made(ids, extension_table.repeat_interleave(times, dim=0).cpu(), prompt_length)

    @classmethod
    def _made(cls, ids: torch.Tensor, table: torch.Tensor | None, prompt_length: int) -> TokenSequences:
        made = ids.as_subclass(cls)
        made.extension_table, made.prompt_length = table, prompt_length
        return made

    @property
    def extension_strings(self) -> list[dict[int, str]]:
        """For every row, `id -> string` of what is no token of the vocabulary."""
        return [] if self.extension_table is None else own_strings(self.extension_table)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        source = args[0] if args and isinstance(args[0], TokenSequences) else None
        if source is None or source.extension_table is None:
            return _plain(result)
        if func is torch.Tensor.__getitem__:
            return _selected(result, source, args[1])
        if func in (torch.Tensor.unbind, torch.Tensor.__iter__, torch.unbind) and source.ndim == 2:
            rows = zip(result, source.extension_table.split(1), strict=True)
            made = [cls._made(row, table, source.prompt_length) for row, table in rows]
            return iter(made) if func is torch.Tensor.__iter__ else tuple(made)
        is_copy = isinstance(result, torch.Tensor) and result.shape == source.shape
        if func in _COPIES and is_copy:
            return cls._made(result, source.extension_table, source.prompt_length)
        return _plain(result)

    def __reduce_ex__(self, protocol):
        return TokenSequences._made, (self.as_subclass(torch.Tensor), self.extension_table, self.prompt_length)

    def __deepcopy__(self, memo: Mapping[int, Any]) -> TokenSequences:
        return self.clone()


_COPIES = (
    torch.Tensor.to,
    torch.Tensor.cpu,
    torch.Tensor.cuda,
    torch.Tensor.clone,
    torch.Tensor.detach,
    torch.Tensor.contiguous,
    torch.Tensor.long,
    torch.Tensor.int,
    torch.clone,
)


def _plain(result: Any) -> Any:
    if isinstance(result, TokenSequences):
        return result.as_subclass(torch.Tensor)
    if type(result) in (list, tuple):
        return type(result)(map(_plain, result))
    return result


def _selected(result: Any, source: TokenSequences, key: Any) -> Any:
    """Rows and columns of sequences."""
    rows, *columns = key if isinstance(key, tuple) else (key,)
    table = source.extension_table
    if source.ndim == 1:
        rows, columns = slice(None), [rows]
    is_axis_or_all = rows is None or rows is Ellipsis
    if not isinstance(result, torch.Tensor) or result.ndim == 0 or len(columns) > 1 or is_axis_or_all:
        return _plain(result)
    if isinstance(rows, int):
        table = table[rows : rows + 1 or None]
    elif not isinstance(rows, slice) or rows != slice(None):
        table = table[rows.cpu() if isinstance(rows, torch.Tensor) else rows]
    if not columns:
        return TokenSequences._made(result, table, source.prompt_length)
    (column,) = columns
    if not isinstance(column, slice) or column.step not in (None, 1):
        return _plain(result)
    begin, end, _ = column.indices(source.shape[-1])
    prompt_length = min(max(source.prompt_length - begin, 0), max(end - begin, 0))
    return TokenSequences._made(result, table, prompt_length)


__all__ = ["TokenSequences"]
