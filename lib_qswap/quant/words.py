"""Bytes handled eight at a time, as the int64 words they lie in, and the step from bytes to scaled numbers.

torch shifts and masks int64 as fast as uint8, so one operation on words does the work of eight on bytes. Bits
that a shift carries over from the neighbouring byte are masked away afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
from torch import Tensor

BLOCK_GRANULE = 8
"""Unpack functions get a multiple of so many blocks, so that blocks of any size fill whole words."""


def every_byte(byte: int) -> int:
    """The word, as a signed number, whose eight bytes are all `byte`."""
    return int.from_bytes(bytes([byte]) * 8, "little", signed=True)


def kept_numbers(*numbers: int) -> tuple[Tensor, ...]:
    """int64, on the CPU, whatever device is the default. Kept, no call has to make a tensor of a number."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").unbind(0)


def byte_masks(*bytes_: int) -> tuple[Tensor, ...]:
    """`kept_numbers`: `every_byte` of each."""
    return kept_numbers(*map(every_byte, bytes_))


def is_aligned(data: Tensor, size: int) -> bool:
    """Whether elements of so many bytes can be read where `data`, uint8, lies."""
    return (data.storage_offset() | data.data_ptr()) % size == 0


def aligned(data: Tensor, size: int) -> Tensor:
    """`data`, copied unless `is_aligned`."""
    return data if is_aligned(data, size) else data.clone()


def is_tracing() -> bool:
    """Whether new tensors are none just now, but stand for some: nothing of them may be kept."""
    return type(torch.empty(0)) is not Tensor


def kept_table(maxsize: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """`lru_cache` for a function that makes a tensor, but for those of somebody who traces."""

    def decorate(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kept = lru_cache(maxsize)(make)
        call = wraps(make)(lambda *args: make(*args) if is_tracing() else kept(*args))
        call.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
        return call

    return decorate


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
