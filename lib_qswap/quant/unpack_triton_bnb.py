"""Triton's NF4 and FP4 of bitsandbytes. Layout: `unpack_bnb`; arguments: `unpack_triton`."""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from .unpack_bnb import FP4_VALUES, NF4_VALUES
from .unpack_triton import kernel, spread, value_table


@triton.jit
def _parts(packed, table, blocks, TILE: tl.constexpr):
    """The values themselves: what is rounded in Forge's arithmetic is the product, not the absmax."""
    start = packed.to(tl.pointer_type(tl.uint32)) + blocks * 9
    data = spread(tl.load(start[:, None] + 1 + tl.arange(0, 8)[None, :])).to(tl.int32)
    nibbles = data[:, :, :, None] >> (4 - tl.arange(0, 2) * 4)[None, None, None, :]
    numbers = tl.load(table + (tl.reshape(nibbles, (TILE, 1, 64)) & 15))
    absmax = tl.load(start).to(tl.float32, bitcast=True)
    return numbers * absmax[:, None, None], tl.full((TILE, 1), 1.0, tl.float32)


@kernel(alignment=4, table=partial(value_table, NF4_VALUES))
def BNB_NF4(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    return _parts(packed, table, blocks, TILE)


@kernel(alignment=4, table=partial(value_table, FP4_VALUES))
def BNB_FP4(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    return _parts(packed, table, blocks, TILE)
