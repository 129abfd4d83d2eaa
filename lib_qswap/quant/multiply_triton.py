"""A few inputs times a packed weight, which is unpacked on the way and never written.

Sums are fp32, of fp32 numbers times the inputs, and scaled and rounded afterwards: no weight is rounded to
the inputs' dtype first. A program has one row of the weight and goes through its blocks. (With two rows or
four, Triton 3.6 compiles some types to code that gives wrong sums, and hardly any is faster.)
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

from .unpack_triton import Kernel, compiled, names_of, on_device, store, striped

if TYPE_CHECKING:
    from .formats import Format

_STEP_ELEMENTS = 1024  # that a program takes at a time
_WARPS = 1
_RUN = tl.constexpr(8)  # elements whose products are added up before they are scaled, all of one group
PARTS: Any = None  # as in unpack_triton
OFFSETS: Any = None
STRIPES: Any = None


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
def _of_runs(groups, RUNS: tl.constexpr, STRIPES: tl.constexpr):
    """A number for each group (blocks, groups) -> (RUNS,), that of each run's group."""
    each: tl.constexpr = RUNS // (groups.shape[0] * groups.shape[1])
    groups = tl.broadcast_to(groups[:, :, None], (groups.shape[0], groups.shape[1], each))
    groups = tl.reshape(groups, (groups.shape[0], groups.shape[1] * each))
    return tl.reshape(striped(groups, STRIPES), (RUNS,))


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
    STEP: tl.constexpr,
):
    RUNS: tl.constexpr = STEP * BLOCK_ELEMENTS // _RUN
    row = tl.program_id(0)
    packed += row.to(tl.int64) * row_blocks * BLOCK_BYTES
    row_elements = row_blocks * BLOCK_ELEMENTS
    # Runs are numbered as the threads have them: by stripe, then block.
    run = tl.arange(0, RUNS)
    if STRIPES > 1:
        stripe: tl.constexpr = BLOCK_ELEMENTS // STRIPES // _RUN
        block = run // stripe % STEP
        run = (block * STRIPES + run // (stripe * STEP)) * stripe + run % stripe
    element = run[None, :, None] * _RUN + tl.arange(0, _RUN)[None, None, :]
    token = tl.arange(0, INPUTS)[:, None, None]
    sums = tl.zeros((INPUTS, RUNS), tl.float32)
    for start in range(0, row_blocks, STEP):
        # Blocks past the end are the last one once more, with inputs of 0.
        blocks = tl.minimum(start + tl.arange(0, STEP), row_blocks - 1)
        position = start * BLOCK_ELEMENTS + element
        given = tl.load(inputs + token * row_elements + position, mask=position < row_elements, other=0)
        given = given.to(tl.float32)
        if OFFSETS == 0:
            numbers, scales = PARTS(packed, table, blocks, STEP, tl.float32)
        else:
            numbers, scales, offsets = PARTS(packed, table, blocks, STEP, tl.float32)
            sums += tl.sum(given, axis=2) * _of_runs(offsets * OFFSETS, RUNS, STRIPES)[None, :]
        numbers = striped(tl.reshape(numbers, (STEP, BLOCK_ELEMENTS)), STRIPES)
        numbers = tl.reshape(numbers, (1, RUNS, 2, 2, 2))
        given = tl.reshape(given, (INPUTS, RUNS, 2, 2, 2))
        products = _eight(tl.zeros((INPUTS, RUNS), tl.float32), numbers, given)
        sums += products * _of_runs(scales, RUNS, STRIPES)[None, :]
    products = tl.sum(sums, axis=1)
    if bias is not None:
        products += tl.load(bias + row).to(tl.float32)
    store(out + tl.arange(0, INPUTS) * rows + row, products)


@lru_cache(maxsize=64)
def _launch(kernel: Kernel) -> Any:
    names = names_of(kernel.parts, kernel.offsets, kernel.stripes)
    return compiled(_multiply, names, ["rows", "row_blocks"])


def multiply(
    kernel: Kernel, format: Format, packed: Tensor, inputs: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """packed: uint8, whole blocks, rows of as many as inputs' rows have elements. inputs: (1 or 2, elements),
    out: (as many, rows), both fp32, fp16 or bf16; bias: (rows,) or None. All contiguous, on one device."""
    block_elements = format.block_elements
    count, rows = out.shape
    with on_device(out.device):
        _launch(kernel)[(rows,)](
            packed,
            None if kernel.table is None else kernel.table(out.device),
            inputs,
            bias,
            out,
            rows,
            inputs.shape[1] // block_elements,
            BLOCK_BYTES=format.block_bytes,
            BLOCK_ELEMENTS=block_elements,
            INPUTS=count,
            STEP=_STEP_ELEMENTS // block_elements,
            num_warps=_WARPS,
        )
