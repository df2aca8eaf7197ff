"""One tensor on its way: its place in the source and in the new file, and what is done to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..families.key_maps import FOLD_WIDTH, KEEP, THIRDS, TOKEN_ROWS, TRANSPOSED, WITHOUT_BATCH
from ..modeling.token_space_cpm_bee import slot_rows
from .tensor_files import TensorSpec, pieces
from .weight_transforms import apply_operation, revert_operation


# Operations that say which values come where, and are of a whole tensor, not of its pieces.
REARRANGING = (*THIRDS, WITHOUT_BATCH, TRANSPOSED)


@dataclass(frozen=True)
class TensorTransfer:
    """A tensor's way from one file to another."""

    source: TensorSpec
    target: TensorSpec
    operation: str = KEEP
    is_reverted: bool = False
    others: tuple[str, ...] = ()
    """Of a tensor that was split, the names of the parts whose rows come after those of `source`."""

    def tensor(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What is on its way, of the source's tensors."""
        first = tensors[self.source.name]
        return torch.cat([first, *(tensors[name] for name in self.others)]) if self.others else first

    @property
    def is_narrowed(self) -> bool:
        """Whether the new dtype holds less than the old one."""
        if not self.source.dtype.is_floating_point:
            return False
        source, target = torch.finfo(self.source.dtype), torch.finfo(self.target.dtype)
        return target.eps > source.eps or target.max < source.max

    @property
    def is_rounded(self) -> bool:
        """Whether the operation's result is rounded so that undoing it may not give the source back."""
        is_folded = self.operation in (FOLD_WIDTH, TOKEN_ROWS)
        return is_folded and torch.finfo(self.target.dtype).eps >= torch.finfo(self.source.dtype).eps


def rearranged(tensor: torch.Tensor, transfer: TensorTransfer) -> Iterator[torch.Tensor]:
    """What of a source tensor becomes the new one, where that is another part or order of its values, in pieces."""
    operate = revert_operation if transfer.is_reverted else apply_operation
    if transfer.operation in REARRANGING:
        tensor = operate(transfer.operation, tensor)
    elif transfer.operation == TOKEN_ROWS:
        tensor = tensor[: transfer.target.shape[0]]
    yield from pieces(tensor)
    if transfer.operation == TOKEN_ROWS and not transfer.is_reverted:
        yield slot_rows(*tensor.shape).to(tensor.dtype)


def written_pieces(tensor: torch.Tensor, transfer: TensorTransfer) -> Iterator[torch.Tensor]:
    """The new tensor in the same pieces."""
    if transfer.operation == TOKEN_ROWS and not transfer.is_reverted:
        num_words = transfer.source.shape[0]
        yield from pieces(tensor[:num_words])
        yield tensor[num_words:]
    else:
        yield from pieces(tensor)


def converted_pieces(
    tensor: torch.Tensor, transfer: TensorTransfer, report: Callable[[int], object] = lambda nbytes: None
) -> Iterator[torch.Tensor]:
    """The new tensor, piece by piece; `report` hears of the bytes of each."""
    operate = revert_operation if transfer.is_reverted else apply_operation
    for piece in rearranged(tensor, transfer):
        # As loading does it: to a wider dtype before the operation, to a narrower one after it.
        piece = piece.to(torch.promote_types(transfer.source.dtype, transfer.target.dtype))
        if transfer.operation not in REARRANGING:
            # What remains of `TOKEN_ROWS` once the rows are there.
            piece = operate(FOLD_WIDTH if transfer.operation == TOKEN_ROWS else transfer.operation, piece)
        piece = piece.to(transfer.target.dtype)
        yield piece
        report(piece.numel() * piece.element_size())


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keeps torch to one thread: other threads have the other cores, and torch's own wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
