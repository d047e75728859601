"""Who sees whom on a canvas: positions, attention masks, and where its blocks begin and end.

A row's positions count its real tokens from 0, wherever its padding is, so a padded row gives what
it gives alone. Blocks are `block_size` positions each; a token sees its own block and earlier ones.
Without blocks (`block_size` 0) it sees every real token.

Shapes: B rows, T columns, C cached columns, H key-value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class KV:
    """Keys and values of the first columns of a canvas, a pair [B, H, C, d] for each layer."""

    layers: tuple[tuple[Tensor, Tensor], ...] = ()

    def __len__(self) -> int:
        """Columns."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def rows(self, index_B: Tensor) -> KV:
        """Those of rows `index_B`, which may repeat."""
        return KV(tuple((key[index_B], value[index_B]) for key, value in self.layers))

    def columns(self, stop: int) -> KV:
        """Those of columns 0 to `stop`."""
        if stop == len(self):
            return self
        return KV(tuple((key[:, :, :stop], value[:, :, :stop]) for key, value in self.layers))


def positions(real_BT: Tensor) -> Tensor:
    """Position [B, T] of each real token within its row; at padding, that of the token before."""
    return (real_BT.long().cumsum(1) - 1).clamp(min=0)


def sources(real_BT: Tensor) -> Tensor:
    """[B, T]: the column of the real token before each column; the column itself where there is
    none."""
    column_T = torch.arange(real_BT.shape[1], device=real_BT.device)
    last_BT = torch.where(real_BT, column_T, -1).cummax(1).values
    before_BT = torch.cat([torch.full_like(last_BT[:, :1], -1), last_BT[:, :-1]], 1)
    return torch.where(before_BT < 0, column_T, before_BT)


def visible(real_BT: Tensor, block_size: int, begin: int, end: int) -> Tensor:
    """Whether columns `begin` to `end` see columns 0 to `end`: bool [B, 1, end - begin or 1, end].

    Padding sees something too, itself or what is real, and a row of nothing but padding all of it:
    a softmax over nothing is NaN, and a weight of 0 does not make that 0.
    """
    if not block_size:
        real_BT = real_BT | ~real_BT.any(1, keepdim=True)
        return real_BT[:, None, None, :end]
    block_BT = positions(real_BT) // block_size
    column_T = torch.arange(end, device=real_BT.device)
    earlier_BQK = block_BT[:, begin:end, None] >= block_BT[:, None, :end]
    own_QK = column_T[begin:, None] == column_T
    return ((earlier_BQK & real_BT[:, None, :end]) | own_QK)[:, None]


def whole_blocks(real_BT: Tensor, block_size: int, stop: int) -> int:
    """The number of columns, at most `stop`, before the first one of a block that has a column from
    `stop` on in its row: what these columns hold depends on none from `stop` on."""
    block_BT = positions(real_BT) // block_size
    later_T = torch.arange(real_BT.shape[1], device=real_BT.device) >= stop
    beyond = block_BT.max() + 1
    next_B1 = torch.where(real_BT & later_T, block_BT, beyond).amin(1, keepdim=True)
    open_T = (real_BT & (block_BT == next_B1)).any(0)
    return min([stop, *open_T.nonzero()[:1, 0].tolist()])


def blocks_end(real_BT: Tensor, block_size: int, stop: int) -> int:
    """The number of columns, at least `stop`, that the columns before `stop` see."""
    block_BT = positions(real_BT) // block_size
    before_T = torch.arange(real_BT.shape[1], device=real_BT.device) < stop
    last_B1 = torch.where(real_BT & before_T, block_BT, -1).amax(1, keepdim=True)
    seen_T = (real_BT & (block_BT <= last_B1)).any(0)
    return max([stop, *(seen_T.nonzero()[-1:, 0] + 1).tolist()])
