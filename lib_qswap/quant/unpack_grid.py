"""The IQ1, IQ2 and IQ3 types: an index into a lattice for 8 or 4 elements at once. Arguments as in
`unpack_legacy`.

Rows of a lattice are signed bytes in one integer, so that one look-up fetches them all; signs are applied to
all bytes at once: `(row ^ s) - s` where s is 0xFF in every byte to negate.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import iq_grids
from .iq_grids import Grid, grid_rows
from .words import bit_fields, half_scale


@lru_cache(maxsize=16)
def _sign_bytes(device: torch.device) -> Tensor:
    """int64 (256,): 0xFF in byte j where bit j of the index is set."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return bits.neg().to(torch.int8).view(torch.int64).view(-1).to(device)


@lru_cache(maxsize=16)
def _seven_signs(device: torch.device) -> Tensor:
    """int64 (128,): as `_sign_bytes`, for 7 stored bits; the eighth makes the number of set bits even."""
    index = torch.arange(128)
    parity = (index[:, None] >> torch.arange(7) & 1).sum(1) & 1
    return _sign_bytes(torch.device("cpu"))[index | parity << 7].to(device)


def _nibbles(data: Tensor) -> Tensor:
    """uint8 (n, m) -> fp32 (n, 2 m): the low, then the high nibble of every byte."""
    return torch.stack((data & 0x0F, data >> 4), 2).flatten(1).float()


def _write(grid: Grid, index: Tensor, signs: Tensor, scale: Tensor, out: Tensor) -> None:
    """index (n, rows), signs int64 (n, 32) for 8 elements each, scale fp32 (n, groups) -> out (n, 256)."""
    n, groups = scale.shape
    dtype = torch.int64 if grid.width == 8 else torch.int32
    rows = grid_rows(grid, out.device, dtype).index_select(0, index.reshape(-1)).view(torch.int64)
    signs = signs.view(-1)
    values = rows.bitwise_xor_(signs).view(torch.int8).sub_(signs.view(torch.int8)).float()
    torch.mul(values.view(n, groups, -1), scale[:, :, None], out=out.view(n, groups, -1))


def unpack_iq2_xxs(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, 8 x (4 indices of 8 bits, 4 signs of 7 bits, 4-bit scale); d * (sc + 1/2) / 4 * grid * sign."""
    n = blocks.shape[0]
    groups = blocks[:, 2:].contiguous().view(torch.int32).view(n, 8, 2)
    index = groups[:, :, 0].contiguous().view(torch.uint8).view(n, 32).int()
    high = groups[:, :, 1].contiguous()
    signs = _seven_signs(blocks.device).index_select(0, bit_fields(high, 7, 7, 4).view(-1))
    scale = (high >> 28).bitwise_and_(15).float().add_(0.5).mul_(half_scale(blocks, 0).mul_(0.25))
    _write(iq_grids.IQ2_XXS, index, signs, scale, out)


def unpack_iq2_xs(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, 32 x (9-bit index, 7-bit signs), 16 scale nibbles; d * (sc + 1/2) / 4 * grid * sign."""
    pairs = blocks.view(torch.int16)[:, 1:33].int()
    signs = _seven_signs(blocks.device).index_select(0, (pairs >> 9).bitwise_and_(127).view(-1))
    scale = _nibbles(blocks[:, 66:]).add_(0.5).mul_(half_scale(blocks, 0).mul_(0.25))
    _write(iq_grids.IQ2_XS, pairs & 511, signs, scale, out)


def unpack_iq2_s(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, 32 index bytes, 32 sign bytes, 8 bytes of index tops, 16 scale nibbles; as IQ2_XS."""
    tops = bit_fields(blocks[:, 66:74].int(), 2, 2, 4)
    index = tops.bitwise_left_shift_(8).bitwise_or_(blocks[:, 2:34])
    signs = _sign_bytes(blocks.device).index_select(0, blocks[:, 34:66].int().view(-1))
    scale = _nibbles(blocks[:, 74:]).add_(0.5).mul_(half_scale(blocks, 0).mul_(0.25))
    _write(iq_grids.IQ2_S, index, signs, scale, out)


def unpack_iq3_xxs(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, 64 index bytes, 8 x (4 signs of 7 bits, 4-bit scale); d * (sc + 1/2) / 2 * grid * sign."""
    high = blocks[:, 66:].contiguous().view(torch.int32)
    signs = _seven_signs(blocks.device).index_select(0, bit_fields(high, 7, 7, 4).view(-1))
    scale = (high >> 28).bitwise_and_(15).float().add_(0.5).mul_(half_scale(blocks, 0).mul_(0.5))
    _write(iq_grids.IQ3_XXS, blocks[:, 2:66].int(), signs, scale, out)


def unpack_iq3_s(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, 64 index bytes, 8 of index tops, 32 of signs, 8 scale nibbles; d * (2 sc + 1) * grid * sign."""
    tops = bit_fields(blocks[:, 66:74].int(), 1, 1, 8)
    index = tops.bitwise_left_shift_(8).bitwise_or_(blocks[:, 2:66])
    signs = _sign_bytes(blocks.device).index_select(0, blocks[:, 74:106].int().view(-1))
    scale = _nibbles(blocks[:, 106:]).mul_(2).add_(1).mul_(half_scale(blocks, 0))
    _write(iq_grids.IQ3_S, index, signs, scale, out)


@lru_cache(maxsize=16)
def _shifted_iq1_rows(device: torch.device) -> Tensor:
    """int64 (4096,): the IQ1 lattice in eighths, plus 1/8, then minus 1/8."""
    eighths = grid_rows(iq_grids.IQ1, torch.device("cpu"), torch.int64).view(torch.int8) * 8
    return torch.cat((eighths + 1, eighths - 1)).view(torch.int64).to(device)


def _write_iq1(index: Tensor, scale: Tensor, out: Tensor) -> None:
    """index (n, 32): 11 bits, and bit 11 for a shift of -1/8, not 1/8; scale (n, groups), in eighths."""
    n, groups = scale.shape
    values = _shifted_iq1_rows(out.device).index_select(0, index.reshape(-1)).view(torch.int8).float()
    torch.mul(values.view(n, groups, -1), scale[:, :, None], out=out.view(n, groups, -1))


def unpack_iq1_s(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, 32 index bytes, 8 x (4 tops of 3 bits, 3-bit scale, shift); d * (2 sc + 1) * (grid +- 1/8)."""
    n = blocks.shape[0]
    high = blocks.view(torch.int16)[:, 17:].int()
    tops = bit_fields(high, 3, 3, 4).bitwise_left_shift_(8).view(n, 8, 4)
    tops.bitwise_or_((high >> 4).bitwise_and_(0x800).unsqueeze(2))
    scale = (high >> 12).bitwise_and_(7).float().mul_(2).add_(1).mul_(half_scale(blocks, 0).mul_(1 / 8))
    _write_iq1(tops.view(n, 32).bitwise_or_(blocks[:, 2:34]), scale, out)


def unpack_iq1_m(blocks: Tensor, out: Tensor) -> None:
    """32 index bytes, 32 x (3-bit top, shift), 4 x (4 scales of 3 bits, a nibble of the fp16 d); as IQ1_S."""
    n = blocks.shape[0]
    nibbles = bit_fields(blocks[:, 32:48].int(), 4, 4, 2)
    index = (nibbles << 8).bitwise_or_(blocks[:, :32])
    high = blocks.view(torch.int16)[:, 24:].int()
    parts = [(high[:, k] >> 12).bitwise_and_(0x0F) << 4 * k for k in range(4)]
    d = (parts[0] | parts[1] | parts[2] | parts[3]).short().view(torch.float16).float().view(n, 1)
    scale = bit_fields(high, 3, 3, 4).float().mul_(2).add_(1).mul_(d.mul_(1 / 8))
    _write_iq1(index, scale, out)
