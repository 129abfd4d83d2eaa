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
VALUES: Any = None  # as in unpack_triton


def _multiply(
    packed,
    table,
    inputs,
    bias,
    out,
    rows,
    row_blocks,
    BLOCK_ELEMENTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    # Rows and blocks past the end are the last one once more, the latter with inputs of 0.
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    tile = tl.arange(0, ROWS * STEP)
    first_block = tl.minimum(first_row + tile // STEP, rows - 1) * row_blocks
    row_elements = row_blocks * BLOCK_ELEMENTS
    element = tl.arange(0, STEP * BLOCK_ELEMENTS)[None, :]
    token = tl.arange(0, INPUTS)[:, None]
    sums = tl.zeros((INPUTS, ROWS, STEP * BLOCK_ELEMENTS), tl.float32)
    for start in range(0, row_blocks, STEP):
        blocks = first_block + tl.minimum(start + tile % STEP, row_blocks - 1)
        values = VALUES(packed, table, blocks, ROWS * STEP)
        values = tl.reshape(values, (ROWS, STEP * BLOCK_ELEMENTS))
        position = start * BLOCK_ELEMENTS + element
        given = tl.load(inputs + token * row_elements + position, mask=position < row_elements, other=0)
        sums += values[None, :, :] * given.to(tl.float32)[:, None, :]
    row = tl.minimum(first_row + tl.arange(0, ROWS), rows - 1)[None, :]
    products = tl.sum(sums, axis=2)
    if bias is not None:
        products += tl.load(bias + row).to(tl.float32)
    store(out + token * rows + row, products)


@lru_cache(maxsize=64)
def _launch(kernel: Kernel) -> Any:
    return compiled(_multiply, kernel.values, ["rows", "row_blocks"])


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
            BLOCK_ELEMENTS=block_elements,
            INPUTS=count,
            ROWS=_ROWS,
            STEP=_STEP_ELEMENTS // block_elements,
            num_warps=_WARPS,
        )
