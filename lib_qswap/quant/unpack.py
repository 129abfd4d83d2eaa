"""Packed blocks to numbers: the one entry point, on any device.

One of `kernels` does it where there is one, else torch's operations do, in chunks: a chunk's temporaries fit
into a CPU's caches, or, on an accelerator, where small ones would be many launches, into 64 MB. On a CPU the
types in `_CPU_KINDS` have a way of their own, `unpack_cpu`, for all but the rest that fills no chunk.
Nothing here waits for a device, but for a kernel's first check, and all memory comes from torch's allocator,
on the current stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from . import kernels, unpack_cpu, unpack_cpu_codebook, unpack_cpu_k, unpack_cpu_legacy, unpack_cpu_ternary
from .formats import Format, UnpackFunction, UnpackLikeForgeFunction
from .words import BLOCK_GRANULE, aligned, is_aligned

Arithmetic = Literal["exact", "like Forge"]

_ON_CPU, _ANYWHERE = torch.device("cpu"), contextlib.nullcontext()
_CPU_KINDS: dict[str, unpack_cpu.Kind] = {
    kind.__name__: kind
    for kind in (
        unpack_cpu_legacy.Q4_0,
        unpack_cpu_legacy.Q4_1,
        unpack_cpu_legacy.Q5_0,
        unpack_cpu_legacy.Q5_1,
        unpack_cpu_legacy.Q8_0,
        unpack_cpu_k.Q2_K,
        unpack_cpu_k.Q3_K,
        unpack_cpu_k.Q4_K,
        unpack_cpu_k.Q5_K,
        unpack_cpu_k.Q6_K,
        unpack_cpu_ternary.TQ1_0,
        unpack_cpu_ternary.TQ2_0,
        unpack_cpu_codebook.IQ4_NL,
        unpack_cpu_codebook.IQ4_XS,
        unpack_cpu_codebook.MXFP4,
        unpack_cpu_codebook.NVFP4,
        unpack_cpu_codebook.BNB_NF4,
        unpack_cpu_codebook.BNB_FP4,
    )
}
_CPU_KINDS_TO_HALF: dict[str, unpack_cpu.Kind] = {
    "Q4_K": unpack_cpu_k.Q4_KToHalf,
    "Q5_K": unpack_cpu_k.Q5_KToHalf,
    "TQ1_0": unpack_cpu_ternary.TQ1_0ToHalf,
    "TQ2_0": unpack_cpu_ternary.TQ2_0ToHalf,
}

# For each thread. Smaller chunks spend their time on calls, larger ones on memory outside the caches. torch
# leaves 32,768 numbers or fewer to one thread: with a little more than a power of two, two threads share the
# words of a plane, of which a chunk has four at the most.
_CPU_CHUNK_ELEMENTS = 9 << 16
# No type takes more than 14 bytes of temporaries for an element on a CPU; `unpack_cpu`, which unpacks the
# scales of several chunks at once, less than 13; 8 on an accelerator. There every chunk is some thirty
# launches, and it pays to have few: these take less, into fp32 2 bytes more.
_TEMPORARY_BYTES = 64 << 20
_BYTES_PER_ELEMENT = 8.0
_FEWER_BYTES_PER_ELEMENT = {
    "Q4_0": 2.0,
    "Q4_1": 2.0,
    "Q5_0": 4.0,
    "Q5_1": 4.0,
    "Q8_0": 2.0,
    "Q2_K": 4.0,
    "Q3_K": 2.0,
    "Q4_K": 1.8,
    "Q5_K": 1.8,
    "Q6_K": 2.5,
    "TQ2_0": 2.0,
}
_MOST_CPU_CHUNK_ELEMENTS = 1 << 22
_MOST_CPU_CHUNK_ELEMENTS_OF_KINDS = 9 << 19


def unpack(
    format: Format,
    packed: Tensor,
    out: Tensor,
    *,
    arithmetic: Arithmetic = "exact",
    computation_dtype: torch.dtype | None = None,
) -> Tensor:
    """Write the values of `packed` into `out` and return it.

    packed: uint8, contiguous, whole blocks, any shape. out: fp32, fp16 or bf16, contiguous, any shape, as
    many elements as the blocks hold, on the same device. arithmetic: "exact" computes in fp32 and rounds once
    to out's dtype. "like Forge" computes in `computation_dtype` (fp16 by default, as in Forge, or bf16) in
    Forge's order of operations, and casts to out's dtype. In fp32, and for types that Forge does not unpack,
    the two are the same.

    Raises ValueError for tensors that do not fit each other, NotImplementedError for a type that cannot be
    unpacked.
    """
    _check(format, packed, out)
    function, rounding = _choose(format, arithmetic, computation_dtype)
    # The bytes of a plain type are its values: torch's copy is one kernel already.
    of_blocks = format.dtype is None
    if not (of_blocks and kernels.unpack_with_triton(format, packed, out, rounding or torch.float32)):
        _with_torch(format, packed, out, function, rounding)
    return out


def unpack_with_torch(format: Format, packed: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """The same by torch's operations alone. dtype: what Forge's arithmetic computes in; fp32 for exact
    arithmetic."""
    _with_torch(format, packed, out, *_choose(format, "like Forge", dtype))
    return out


def _with_torch(
    format: Format, packed: Tensor, out: Tensor, function: UnpackFunction, rounding: torch.dtype | None
) -> None:
    exact = function is format.unpack and format.dtype is None
    # Most operations here are short, and cheaper in inference mode; `out` may come from either mode. Tables
    # and the CPU's buffers are made on the CPU, whatever device somebody has made the default.
    with torch.inference_mode(), _ANYWHERE if torch.empty(0).device.type == "cpu" else _ON_CPU:
        blocks = packed.view(-1, format.block_bytes)
        values = out.view(-1, format.block_elements)
        if exact and out.device.type == "cpu" and is_aligned(packed, 8):
            chunk_elements = _CPU_CHUNK_ELEMENTS * torch.get_num_threads()
            chunk_elements = min(chunk_elements, _MOST_CPU_CHUNK_ELEMENTS_OF_KINDS)
            for kind in _cpu_kinds(format, out.dtype):
                done = unpack_cpu.unpack_whole_chunks(kind, blocks, values, chunk_elements)
                blocks, values = blocks[done:], values[done:]
        _in_chunks(format, function, blocks, values, rounding)


def _cpu_kinds(format: Format, dtype: torch.dtype) -> Iterator[unpack_cpu.Kind]:
    """The quickest way first; each takes on what the one before left."""
    to_half = _CPU_KINDS_TO_HALF.get(format.name) if dtype == torch.float16 else None
    if to_half is not None and unpack_cpu.can_scale_rows():
        yield to_half
    kind = _CPU_KINDS.get(format.name)
    if kind is not None:
        yield kind


def _check(format: Format, packed: Tensor, out: Tensor) -> None:
    if packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise ValueError(f"packed {format.name} blocks are contiguous uint8, not {packed.dtype}.")
    if out.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not out.is_contiguous():
        raise ValueError(f"{format.name} is unpacked into contiguous fp32, fp16 or bf16, not {out.dtype}.")
    expected = format.packed_bytes(out.numel())
    if packed.numel() != expected:
        raise ValueError(
            f"{out.numel()} elements of {format.name} take {expected} bytes, but there are {packed.numel()}."
        )
    if packed.device != out.device:
        raise ValueError(f"packed {format.name} blocks are on {packed.device}, their values on {out.device}.")


def _choose(
    format: Format, arithmetic: Arithmetic, computation_dtype: torch.dtype | None
) -> tuple[UnpackFunction, torch.dtype | None]:
    """The function to call, and the dtype that its values are rounded to before they are cast to out's."""
    if format.unpack is None:
        raise NotImplementedError(
            f"{format.name} has no published way to unpack it: take a file of another type."
        )
    if arithmetic == "exact":
        return format.unpack, None
    if arithmetic != "like Forge":
        raise ValueError(f'the arithmetic is "exact" or "like Forge", not {arithmetic!r}.')
    dtype = torch.float16 if computation_dtype is None else computation_dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the computation dtype is fp16, bf16 or fp32, not {dtype}.")
    if format.unpack_like_forge is None or dtype == torch.float32:
        return format.unpack, None
    return _in_dtype(format.unpack_like_forge, dtype), dtype


def _in_dtype(function: UnpackLikeForgeFunction, dtype: torch.dtype) -> UnpackFunction:
    return lambda blocks, out: function(blocks, out, dtype)


def _in_chunks(
    format: Format, function: UnpackFunction, blocks: Tensor, values: Tensor, rounding: torch.dtype | None
) -> None:
    """Call `function` for every chunk."""
    on_cpu = values.device.type == "cpu"
    direct = format.dtype is not None  # It may write into `values` itself in any dtype.
    count, elements = values.shape
    if on_cpu:
        chunk_elements = min(_CPU_CHUNK_ELEMENTS * torch.get_num_threads(), _MOST_CPU_CHUNK_ELEMENTS)
    else:
        chunk_elements = _accelerator_chunk_elements(format, values.dtype)
    # Plain types compute in their own width where that is more than fp32's.
    chunk = chunk_elements // (blocks.shape[1] if direct else elements)
    # Whole granules, which begin where words do.
    chunk = max(1, chunk // BLOCK_GRANULE) * BLOCK_GRANULE
    # On the CPU planes are written in fp32 and rounded in one contiguous pass: short strided ones are slow.
    written = torch.float32 if on_cpu else rounding or values.dtype
    buffer = None
    if not direct and (written != values.dtype or rounding not in (None, written)):
        rows = min(chunk, max(count, BLOCK_GRANULE))
        buffer = torch.empty((rows, elements), dtype=written, device=values.device)

    def unpack_chunk(packed: Tensor, out: Tensor) -> None:
        if buffer is None:
            function(packed, out)
            return
        unrounded = buffer[: out.shape[0]]
        function(packed, unrounded)
        out.copy_(unrounded if rounding in (None, out.dtype) else unrounded.to(rounding))

    whole = count - count % BLOCK_GRANULE
    for start in range(0, whole, chunk):
        stop = min(start + chunk, whole)
        unpack_chunk(aligned(blocks[start:stop], 8), values[start:stop])
    if whole < count:
        padded = blocks.new_zeros((BLOCK_GRANULE, blocks.shape[1]))
        padded[: count - whole] = blocks[whole:]
        rest = values.new_empty((BLOCK_GRANULE, elements))
        unpack_chunk(padded, rest)
        values[whole:] = rest[: count - whole]


def _accelerator_chunk_elements(format: Format, dtype: torch.dtype) -> int:
    each = _FEWER_BYTES_PER_ELEMENT.get(format.name)
    each = _BYTES_PER_ELEMENT if each is None else each + dtype.itemsize - 2
    return int(_TEMPORARY_BYTES / each)
