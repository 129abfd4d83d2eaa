"""Triton's IQ1, IQ2 and IQ3 types. Layouts: `unpack_grid`; arguments: `unpack_triton`.

A block is 32 rows of 8 elements, a thread's unit: everything is loaded and computed where its row is, some of
it by several threads, so that no thread waits for another. Rows lie as (4, TILE, 8), by the stripes of a
block, of which each thread has a row. Every row is a group of its own, with its scale.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import iq_grids
from .iq_grids import Grid, grid_rows
from .unpack_triton import bits_to_bytes, half, kernel, signed, spread


@triton.jit
def _places():
    """A row's number: of its stripe, int32 (4, 1, 1), and in that, (1, 1, 8)."""
    return tl.arange(0, 4)[:, None, None], tl.arange(0, 8)[None, None, :]


@triton.jit
def _load(start, offset):
    """From pointers (TILE,) and offsets (4, 1, 8): int32 (4, TILE, 8)."""
    # Of neighbours, Triton would load several in one thread, and send them to where they are needed.
    return tl.load(tl.max_contiguous(start[None, :, None] + offset, (1, 1, 1))).to(tl.int32)


@triton.jit
def _load_pairs(start, offset):
    """As `_load`, also what follows each: int32 (4, TILE, 8, 2)."""
    pointers = start[None, :, None, None] + offset[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
    return tl.load(tl.max_contiguous(pointers, (1, 1, 1, 2))).to(tl.int32)


@triton.jit
def _in_halves(data, width: tl.constexpr):
    """int32 (4, n, 8) -> uint32 (4, n, 8, 2): from the lowest bit on, then from bit `width` on."""
    return data.to(tl.uint32)[:, :, :, None] >> (tl.arange(0, 2) * width)[None, None, None, :]


@triton.jit
def _by_block(words, scales, TILE: tl.constexpr):
    """Words of signed bytes (4, TILE, 8, 2), scales (4, TILE, 8) -> numbers and scales."""
    numbers = tl.permute(signed(spread(words)), (1, 0, 2, 3, 4))
    return tl.reshape(numbers, (TILE, 32, 8)), tl.reshape(tl.permute(scales, (1, 0, 2)), (TILE, 32))


@triton.jit
def _with_signs(words, signs):
    """Words of bytes 1 to 127 (4, n, 8, 2), signs int32 (4, n, 8): negative where a bit is set."""
    minus = bits_to_bytes(_in_halves(signs, 4) & 15)
    return (words ^ (minus * 0xFF)) + minus


@triton.jit
def _eighth_sign(signs):
    """7 stored bits and the eighth, which makes the number of set bits even."""
    # Bit n of the constant: whether the number of bits set in n is odd.
    return signs | (((0x6996 << 7) >> ((signs ^ (signs >> 4)) & 15)) & 0x80)


@triton.jit
def _odd(data, shift, mask: tl.constexpr):
    """2 * n + 1 of the bits n at `shift`, 1 or more; mask: 2 * the largest n."""
    return (((data >> (shift - 1)) & mask) | 1).to(tl.float32)


def _bytes(grid: Grid, device: torch.device) -> Tensor:
    """int32: the entries of every row, a byte each."""
    return grid_rows(grid, device, torch.int64 if grid.width == 8 else torch.int32).view(torch.int32)


@triton.jit
def _iq2(table, index, signs):
    """Rows of 8; int32 (4, n, 8) each -> words (4, n, 8, 2)."""
    words = tl.load(table + (index * 2)[:, :, :, None] + tl.arange(0, 2)[None, None, None, :])
    return _with_signs(words.to(tl.uint32), signs)


@kernel(alignment=2, table=partial(_bytes, iq_grids.IQ2_XXS), stripes=4)
def IQ2_XXS(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    stripe, row = _places()
    halves = packed.to(tl.pointer_type(tl.uint16)) + blocks * 33
    group = stripe * 8 + row // 4 * 4
    index = _load(packed + blocks * 66, 2 + group * 2 + row % 4)
    top = _load(halves, 4 + group)
    signs = ((_load(halves, 3 + group) | (top << 16)) >> (row % 4 * 7)) & 127
    d = half(tl.load(halves), DTYPE) * 0.125
    words = _iq2(table, index, _eighth_sign(signs))
    return _by_block(words, _odd(top, 12, 30) * d[None, :, None], TILE)


@kernel(alignment=2, table=partial(_bytes, iq_grids.IQ2_XS), stripes=4)
def IQ2_XS(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    stripe, row = _places()
    halves = packed.to(tl.pointer_type(tl.uint16)) + blocks * 37
    pairs = _load(halves, 1 + stripe * 8 + row)
    small = _load(packed + blocks * 74, 66 + stripe * 2 + row // 4)
    d = half(tl.load(halves), DTYPE) * 0.125
    words = _iq2(table, pairs & 511, _eighth_sign(pairs >> 9))
    return _by_block(words, _odd(small * 2, row // 2 % 2 * 4 + 1, 30) * d[None, :, None], TILE)


@kernel(alignment=2, table=partial(_bytes, iq_grids.IQ2_S), stripes=4)
def IQ2_S(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    stripe, row = _places()
    start = packed + blocks * 82
    top = _load(start, 66 + stripe * 2 + row // 4) << (8 - row % 4 * 2)
    index = _load(start, 2 + stripe * 8 + row) | (top & 0x300)
    signs = _load(start, 34 + stripe * 8 + row)
    small = _load(start, 74 + stripe * 2 + row // 4)
    d = half(tl.load(packed.to(tl.pointer_type(tl.uint16)) + blocks * 41), DTYPE) * 0.125
    words = _iq2(table, index, signs)
    return _by_block(words, _odd(small * 2, row // 2 % 2 * 4 + 1, 30) * d[None, :, None], TILE)


@kernel(alignment=2, table=partial(_bytes, iq_grids.IQ3_XXS), tile_elements=1024, warps=1, stripes=4)
def IQ3_XXS(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    stripe, row = _places()
    halves = packed.to(tl.pointer_type(tl.uint16)) + blocks * 49
    group = stripe * 4 + row // 4 * 2
    top = _load(halves, 34 + group)
    signs = ((_load(halves, 33 + group) | (top << 16)) >> (row % 4 * 7)) & 127
    index = _load_pairs(packed + blocks * 98, 2 + stripe * 16 + row * 2)
    d = half(tl.load(halves), DTYPE) * 0.25
    words = _with_signs(tl.load(table + index).to(tl.uint32), _eighth_sign(signs))
    return _by_block(words, _odd(top, 12, 30) * d[None, :, None], TILE)


@kernel(alignment=2, table=partial(_bytes, iq_grids.IQ3_S), tile_elements=1024, warps=1, stripes=4)
def IQ3_S(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    stripe, row = _places()
    start = packed + blocks * 110
    top = _load(start, 66 + stripe * 2 + row // 4) << (8 - row % 4 * 2)
    top = (top[:, :, :, None] >> tl.arange(0, 2)[None, None, None, :]) & 0x100
    index = _load_pairs(start, 2 + stripe * 16 + row * 2) | top
    signs = _load(start, 74 + stripe * 8 + row)
    small = _load(start, 106 + stripe)
    d = half(tl.load(packed.to(tl.pointer_type(tl.uint16)) + blocks * 55), DTYPE)
    words = _with_signs(tl.load(table + index).to(tl.uint32), signs)
    return _by_block(words, _odd(small * 2, row // 4 * 4 + 1, 30) * d[None, :, None], TILE)


@lru_cache(maxsize=16)
def _iq1_codes(device: torch.device) -> Tensor:
    """int32 (2048,): rows of 8 entries; the highest two bits of an entry that is in eighths, in a byte whose
    lowest bit is an eighth of an eighth: with 1/8 taken off, and with 1/8 added."""
    rows = grid_rows(iq_grids.IQ1, torch.device("cpu"), torch.int64).view(torch.int8).view(-1, 8).int()
    less, more = (8 * rows - 1) >> 3 & 3, (8 * rows + 1) >> 3 & 3
    codes = more[:, :4] << 6 | less[:, :4] << 4 | more[:, 4:] << 2 | less[:, 4:]
    return codes.to(torch.uint8).view(torch.int32).view(-1).to(device)


@triton.jit
def _iq1(table, index, minus):
    """Rows of 8 of -1, 0 and 1, with 1/8 added, or taken off where `minus` is 1; int32 (4, n, 8) each ->
    words (4, n, 8, 2), in 64ths."""
    minus = minus.to(tl.uint32)[:, :, :, None]
    codes = tl.load(table + index).to(tl.uint32)[:, :, :, None] << (minus * 2)
    codes = codes << (tl.arange(0, 2) * 4)[None, None, None, :]
    # The bits below them are those of 8 or of -8.
    return (codes & 0xC0C0C0C0) | (0x08080808 + minus * 0x30303030)


@kernel(alignment=2, table=_iq1_codes, stripes=4)
def IQ1_S(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    stripe, row = _places()
    halves = packed.to(tl.pointer_type(tl.uint16)) + blocks * 25
    high = _load(halves, 17 + stripe * 2 + row // 4)
    index = _load(packed + blocks * 50, 2 + stripe * 8 + row)
    index = index | (((high >> (row % 4 * 3)) & 7) << 8)
    scales = _odd(high, 12, 14) * (half(tl.load(halves), DTYPE) * 0.015625)[None, :, None]
    return _by_block(_iq1(table, index, high >> 15), scales, TILE)


@kernel(alignment=4, table=_iq1_codes, tile_elements=1024, warps=1, stripes=4)
def IQ1_M(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    stripe, row = _places()
    words = packed.to(tl.pointer_type(tl.uint32)) + blocks * 14
    first, second = tl.load(words + 12), tl.load(words + 13)
    d = ((first >> 12) & 0x000F) | ((first >> 24) & 0x00F0)
    d = d | ((second >> 4) & 0x0F00) | ((second >> 16) & 0xF000)
    d = half(d.to(tl.uint16), DTYPE) * 0.015625
    start = packed + blocks * 56
    small = _load(packed.to(tl.pointer_type(tl.uint16)) + blocks * 28, 24 + stripe)
    nibbles = _load(start, 32 + stripe * 4 + row // 2) >> (row % 2 * 4)
    index = _load(start, stripe * 8 + row) | ((nibbles & 7) << 8)
    words = _iq1(table, index, (nibbles >> 3) & 1)
    return _by_block(words, _odd(small * 2, row // 2 * 3 + 1, 14) * d[None, :, None], TILE)
