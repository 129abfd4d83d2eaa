"""A few inputs times a packed weight, which is unpacked on the way and never written.

Sums are fp32, of fp32 values times the inputs, and rounded once: no weight is rounded to the inputs' dtype
first. A program has a few rows of the weight and goes through their blocks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .unpack_triton import Kernel, compiled, on_device, store

# A program's: rows of the weight, and elements of each that it takes at a time.
_ROWS = 4
_STEP_ELEMENTS = 512
_WARPS = 2
_RUN = tl.constexpr(8)  # elements whose products are added up before they are scaled, all of one group
PARTS: Any = None  # as in unpack_triton
OFFSETS: Any = None


# Splitting keeps the elements of a run in one thread; a sum over an axis would go from thread to thread.
@triton.jit
def _two(sums, numbers, given):
    """sums + the products of numbers and given (..., 2), which are broadcast to each other."""
    a, b = tl.split(numbers)
    x, y = tl.split(given)
    return sums + a * x + b * y


@triton.jit
def _four(sums, numbers, given):
    """The same of (..., 2, 2)."""
    a, b = tl.split(numbers)
    x, y = tl.split(given)
    return _two(_two(sums, a, x), b, y)


@triton.jit
def _eight(sums, numbers, given):
    """The same of (..., 2, 2, 2)."""
    a, b = tl.split(numbers)
    x, y = tl.split(given)
    return _four(_four(sums, a, x), b, y)


@triton.jit
def _of_runs(groups, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """A number for each group (blocks, groups) -> (ROWS, RUNS), that of each run's group."""
    each: tl.constexpr = ROWS * RUNS // (groups.shape[0] * groups.shape[1])
    groups = tl.broadcast_to(groups[:, :, None], (groups.shape[0], groups.shape[1], each))
    return tl.reshape(groups, (ROWS, RUNS))


def _multiply(
    packed,
    table,
    inputs,
    bias,
    out,
    rows,
    row_blocks,
    BLOCK_BYTES: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    # Rows and blocks past the end are the last one once more, the latter with inputs of 0.
    RUNS: tl.constexpr = STEP * BLOCK_ELEMENTS // _RUN
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    packed += first_row * row_blocks * BLOCK_BYTES
    last_row = (rows - 1 - first_row).to(tl.int32)
    tile = tl.arange(0, ROWS * STEP)
    first_block = tl.minimum(tile // STEP, last_row) * row_blocks
    row_elements = row_blocks * BLOCK_ELEMENTS
    element = tl.arange(0, RUNS)[None, :, None] * _RUN + tl.arange(0, _RUN)[None, None, :]
    token = tl.arange(0, INPUTS)[:, None, None]
    sums = tl.zeros((INPUTS, ROWS, RUNS), tl.float32)
    for start in range(0, row_blocks, STEP):
        blocks = first_block + tl.minimum(start + tile % STEP, row_blocks - 1)
        position = start * BLOCK_ELEMENTS + element
        given = tl.load(inputs + token * row_elements + position, mask=position < row_elements, other=0)
        given = given.to(tl.float32)
        if OFFSETS == 0:
            numbers, scales = PARTS(packed, table, blocks, ROWS * STEP)
        else:
            numbers, scales, offsets = PARTS(packed, table, blocks, ROWS * STEP)
            offsets = _of_runs(offsets * OFFSETS, ROWS, RUNS)
            sums += tl.sum(given, axis=2)[:, None, :] * offsets[None, :, :]
        numbers = tl.reshape(numbers, (1, ROWS, RUNS, 2, 2, 2))
        given = tl.reshape(given, (INPUTS, 1, RUNS, 2, 2, 2))
        products = _eight(tl.zeros((INPUTS, ROWS, RUNS), tl.float32), numbers, given)
        sums += products * _of_runs(scales, ROWS, RUNS)[None, :, :]
    row = (first_row + tl.minimum(tl.arange(0, ROWS), last_row))[None, :]
    products = tl.sum(sums, axis=2)
    if bias is not None:
        products += tl.load(bias + row).to(tl.float32)
    store(out + tl.arange(0, INPUTS)[:, None] * rows + row, products)


@lru_cache(maxsize=64)
def _launch(kernel: Kernel) -> Any:
    return compiled(_multiply, kernel.parts, kernel.offsets, ["rows", "row_blocks"])


def multiply(
    kernel: Kernel, packed: Tensor, inputs: Tensor, bias: Tensor | None, out: Tensor, block_elements: int
) -> None:
    """packed: uint8, whole blocks, rows of as many as inputs' rows have elements. inputs: (1 or 2, elements),
    out: (as many, rows), both fp32, fp16 or bf16; bias: (rows,) or None. All contiguous, on one device."""
    count, rows = out.shape
    with on_device(out.device):
        _launch(kernel)[(triton.cdiv(rows, _ROWS),)](
            packed,
            None if kernel.table is None else kernel.table(out.device),
            inputs,
            bias,
            out,
            rows,
            inputs.shape[1] // block_elements,
            BLOCK_BYTES=packed.numel() * block_elements // (rows * inputs.shape[1]),
            BLOCK_ELEMENTS=block_elements,
            INPUTS=count,
            ROWS=_ROWS,
            STEP=_STEP_ELEMENTS // block_elements,
            num_warps=_WARPS,
        )
