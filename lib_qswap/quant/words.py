"""Bytes handled eight at a time, as the int64 words they lie in, and the step from bytes to scaled numbers.

torch shifts and masks int64 as fast as uint8, so one operation on words does the work of eight on bytes. Bits
that a shift carries over from the neighbouring byte are masked away afterwards.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK_GRANULE = 8
"""Unpack functions get a multiple of so many blocks, so that blocks of any size fill whole words."""


def every_byte(byte: int) -> int:
    """The word, as a signed number, whose eight bytes are all `byte`."""
    return int.from_bytes(bytes([byte]) * 8, "little", signed=True)


def byte_masks(*bytes_: int) -> Tensor:
    """int64, on the CPU: `every_byte` of each. Kept, no call has to make a tensor of a number."""
    return torch.tensor([every_byte(byte) for byte in bytes_])


def aligned(data: Tensor, size: int) -> Tensor:
    """The tensor, copied unless elements of so many bytes can be read where it lies."""
    return data.clone() if (data.storage_offset() | data.data_ptr()) % size else data


def as_words(data: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, flat, as int64 words (a view; the bytes fill whole words)."""
    return data.view(-1).view(torch.int64)


def as_numbers(words: Tensor, *shape: int, signed: bool = False) -> Tensor:
    """The bytes of words, in `shape`, ready to be multiplied by fp32 scales.

    fp32 on the CPU, where a contiguous conversion is quick and one within an operation slow. Elsewhere the
    bytes themselves: an accelerator converts as it reads.
    """
    data = words.view(torch.int8 if signed else torch.uint8).view(shape)
    return data.float() if data.device.type == "cpu" else data


def product(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`numbers` of `as_numbers` times an fp32 scale, rounded to `dtype`. May overwrite `numbers`.

    On the CPU the rounded values come back as fp32, which is faster to go on with, to the same result.
    """
    if numbers.is_floating_point():
        return numbers.mul_(scale).to(dtype).float()
    return torch.mul(numbers, scale, out=torch.empty_like(numbers, dtype=dtype))


def scaled_sum(numbers: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """`numbers` of `as_numbers` times an fp32 scale, rounded to `dtype`, plus an fp32 offset, into `out`.

    In fp32 the product has to be exact: it may be fused with the sum. May overwrite `numbers`.
    """
    if dtype == torch.float32 and not numbers.is_floating_point():
        torch.addcmul(offset, numbers, scale, out=out)
    else:
        torch.add(product(numbers, scale, dtype), offset, out=out)


def half_scale(blocks: Tensor, offset: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The fp16 number at an even byte offset of every block, rounded to `dtype`, as a new fp32 (n, 1)."""
    return blocks.view(torch.float16)[:, offset // 2 : offset // 2 + 1].to(dtype).float()


def bit_fields(data: Tensor, width: int, step: int, count: int) -> Tensor:
    """int32 (n, m) -> int32 (n, m * count): `count` fields of `width` bits, `step` apart, lowest first."""
    shifts = constant(data.device, torch.int32, *range(0, step * count, step))
    return (data[:, :, None] >> shifts).bitwise_and_((1 << width) - 1).flatten(1)


@lru_cache(maxsize=64)
def constant(device: torch.device, dtype: torch.dtype, *values: int) -> Tensor:
    """A small constant, copied to its device once: copying it again would make the host wait."""
    return torch.tensor(values, dtype=dtype, device=device)
