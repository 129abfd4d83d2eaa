"""Unpacking with Triton: what every type's kernel is made of, and its launch.

A type has one function, decorated with `kernel`, which `unpack_triton_*` hold: the numbers and the scales of
some of its blocks. What surrounds it is here. Packed bytes are read once and values written once; nothing is
allocated and nothing waits for the device.

What holds for every such function, `parts(packed, table, blocks, TILE, DTYPE)`: packed points to uint8, table
to the type's `table`, if it has one. blocks is int32 (TILE,), the numbers of the blocks to unpack, counted
from packed; they may come more than once. It returns the numbers, fp32 (TILE, groups, elements of a group),
the scales, fp32 (TILE, groups), and the offsets of a type that has them. A value is number * scale, with its
offset added or taken off as gguf-py does it. DTYPE is fp32, or for Forge's arithmetic what a block's fp16
scales are rounded to, and then every further result. Bytes are taken four at a time, as words, and so are
their bits: `spread` comes last. The types with grids have all of an element in the thread that writes it
(`load_each`, `Kernel.stripes`): to load something in several threads takes less time than to pass it on.
"""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
PARTS: Any = None  # the function of a type, in the globals that `compiled` makes
OFFSETS: Any = None  # its `Kernel.offsets`, likewise
STRIPES: Any = None  # its `Kernel.stripes`
# The interpreter cuts off what a conversion to bf16 should round, and small numbers as well.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """fp32 -> fp32: rounded to DTYPE, to nearest, ties to even."""
    if DTYPE != tl.float32:  # noqa: SIM300
        if _INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
            bits = values.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
        else:
            values = values.to(DTYPE).to(tl.float32)
    return values


@triton.jit
def half(bits, DTYPE: tl.constexpr):
    """uint16 -> the fp16 numbers of these bits, rounded to DTYPE, as fp32."""
    return rounded(bits.to(tl.float16, bitcast=True).to(tl.float32), DTYPE)


@triton.jit
def load_each(pointers):
    """What they point to, in the same shape: neighbouring threads have neighbours in the last dimension."""
    # In one dimension, and nothing is known of them any more: where several lie in a row, Triton would load
    # them in one thread, and then send them to where they are needed.
    return tl.reshape(tl.load(tl.reshape(pointers, (pointers.numel,))), pointers.shape)


@triton.jit
def word_at(halves):
    """uint32: four bytes at an even address, from pointers to uint16."""
    return tl.load(halves).to(tl.uint32) | (tl.load(halves + 1).to(tl.uint32) << 16)


@triton.jit
def two_nibbles(words):
    """uint32 (n, m, w) -> uint32 (n, m, 2, w): the low, then the high nibble of every byte."""
    return (words[:, :, None, :] >> (tl.arange(0, 2) * 4)[None, None, :, None]) & 0x0F0F0F0F


@triton.jit
def four_pairs(words):
    """uint32 (n, m, w) -> uint32 (n, m, 4, w): the four pairs of bits of every byte, lowest first."""
    return (words[:, :, None, :] >> (tl.arange(0, 4) * 2)[None, None, :, None]) & 0x03030303


@triton.jit
def bits_to_bytes(bits):
    """uint32, 4 bits each -> uint32: bit j as byte j, 0 or 1."""
    # The product has bit j at bit 8 * j.
    return (bits * 0x00204081) & 0x01010101


@triton.jit
def spread(words):
    """uint32 (..., n) -> uint8 (..., n, 4): the bytes of every word, lowest first."""
    return (tl.expand_dims(words, -1) >> (tl.arange(0, 4) * 8)).to(tl.uint8)


@triton.jit
def signed(data):
    """uint8 -> the signed bytes of these bits, as fp32."""
    return data.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def store(pointers, values):
    """fp32 values, rounded where they are to be kept in another dtype."""
    values = rounded(values, pointers.dtype.element_ty)
    if _INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        bits = (values.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
        tl.store(pointers, bits.to(tl.bfloat16, bitcast=True))
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty))


@triton.jit
def striped(values, STRIPES: tl.constexpr):
    """(n, m) -> (STRIPES, n, m // STRIPES): the first stripe of every row, then the second."""
    values = tl.reshape(values, (values.shape[0], STRIPES, values.shape[1] // STRIPES))
    return tl.permute(values, (1, 0, 2))


def _unpack(
    packed,
    table,
    out,
    count,
    BLOCK_BYTES: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
    TILE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * TILE
    packed += first * BLOCK_BYTES
    out += first * BLOCK_ELEMENTS
    # What lies past the end does the last block once more, which needs no masks.
    blocks = tl.minimum(tl.arange(0, TILE), (count - 1 - first).to(tl.int32))
    if OFFSETS == 0:
        numbers, scales = PARTS(packed, table, blocks, TILE, DTYPE)
        values = rounded(numbers * rounded(scales, DTYPE)[:, :, None], DTYPE)
    else:
        numbers, scales, offsets = PARTS(packed, table, blocks, TILE, DTYPE)
        offsets = rounded(offsets, DTYPE)[:, :, None]
        values = rounded(numbers * rounded(scales, DTYPE)[:, :, None], DTYPE)
        # Adding what is negated would give a NaN another sign.
        values = rounded(values + offsets if OFFSETS > 0 else values - offsets, DTYPE)
    values = tl.reshape(values, (TILE, BLOCK_ELEMENTS))
    if STRIPES == 1:
        store(out + blocks[:, None] * BLOCK_ELEMENTS + tl.arange(0, BLOCK_ELEMENTS)[None, :], values)
    else:
        stripe: tl.constexpr = BLOCK_ELEMENTS // STRIPES
        values = tl.reshape(striped(values, STRIPES), (STRIPES, TILE * stripe))
        element = tl.arange(0, TILE * stripe)
        blocks = tl.minimum(element // stripe, (count - 1 - first).to(tl.int32))
        out += tl.arange(0, STRIPES)[:, None] * stripe + element[None, :] % stripe
        store(out + (blocks * BLOCK_ELEMENTS)[None, :], values)


def compiled(source: Callable[..., Any], names: dict[str, Any], do_not_specialize: list[str]) -> Any:
    """`source`, a kernel, with `names` among its globals: what it calls and computes with for one type.

    A function of its own, with globals of its own: older Tritons take no function as an argument.
    """
    its_globals = {**source.__globals__, **names}
    own = types.FunctionType(source.__code__, its_globals, source.__name__)
    own.__annotations__, own.__module__ = source.__annotations__, source.__module__
    return triton.jit(own, do_not_specialize=do_not_specialize)


def names_of(parts: Any, offsets: int, stripes: int) -> dict[str, Any]:
    """For `compiled`, of kernels that call `PARTS`; arguments: see `Kernel`."""
    return {"PARTS": parts, "OFFSETS": tl.constexpr(offsets), "STRIPES": tl.constexpr(stripes)}


@dataclass(frozen=True, slots=True)
class Kernel:
    """How Triton unpacks one type.

    parts: the decorated function. offsets: 0 where it returns none, 1 where they are added, -1 where they are
    taken off. stripes: parts of a block; neighbouring threads have the elements of one, then that of the next
    block, and each thread has some of every stripe. (Of 256 elements in 4 stripes the first thread has 0 to
    7, 64 to 71, 128 to 135 and 192 to 199, the next one 8 to 15 and so on.) launch: `_unpack` with it.
    alignment: of the packed bytes' address, in bytes. table: made once for each device. tile_elements, warps:
    of a program; they are what measured best.
    """

    parts: Any
    offsets: int
    stripes: int
    launch: Any
    alignment: int
    table: Callable[[torch.device], Tensor] | None
    tile_elements: int
    warps: int

    def unpack(
        self, packed: Tensor, out: Tensor, block_elements: int, dtype: torch.dtype = torch.float32
    ) -> None:
        """packed: uint8, whole blocks, one or more; out: fp32, fp16 or bf16; contiguous, on one device.
        dtype: what Forge's arithmetic computes in; fp32 for exact arithmetic."""
        count = out.numel() // block_elements
        tile = self.tile_elements // block_elements
        table = None if self.table is None else self.table(out.device)
        with on_device(out.device):
            self.launch[(triton.cdiv(count, tile),)](
                packed,
                table,
                out,
                count,
                BLOCK_BYTES=packed.numel() // count,
                BLOCK_ELEMENTS=block_elements,
                TILE=tile,
                DTYPE=_TRITON_DTYPES[dtype],
                num_warps=self.warps,
                # A product and a sum are two roundings, as everywhere else.
                enable_fp_fusion=False,
            )


def kernel(
    *,
    alignment: int = 1,
    offsets: int = 0,
    stripes: int = 1,
    table: Callable[[torch.device], Tensor] | None = None,
    tile_elements: int = 2048,
    warps: int = 2,
) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorates the function of one type (see above and `Kernel`)."""

    def decorate(function: Callable[..., Any]) -> Kernel:
        parts = triton.jit(function)
        launch = compiled(_unpack, names_of(parts, offsets, stripes), ["count"])
        return Kernel(parts, offsets, stripes, launch, alignment, table, tile_elements, warps)

    return decorate


@lru_cache(maxsize=16)
def value_table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A `table` of these values, fp32."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    module = getattr(torch, device.type)
    if device.type == "cpu" or device.index in (None, module.current_device()):
        return contextlib.nullcontext()
    return module.device(device)
