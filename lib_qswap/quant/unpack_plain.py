"""The plain types, whose bytes are the values, and FP8 with a scale. Arguments as `unpack_legacy` says, but
that `out` may always have any of its dtypes.

torch converts by way of fp32, which rounds twice where fp32 does not hold the value: fp64 and long integers
are rounded here so that the second rounding gives what one would have given.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_f32(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.float32))


def unpack_f16(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.float16))


def unpack_bf16(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.bfloat16))


def unpack_f64(blocks: Tensor, out: Tensor) -> None:
    values = blocks.view(torch.float64)
    out.copy_(values if out.dtype == torch.float32 else _rounded_to_odd(values))


def unpack_i8(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.int8))


def unpack_i16(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.int16))


def unpack_i32(blocks: Tensor, out: Tensor) -> None:
    values = blocks.view(torch.int32)
    # What fp16 can hold is exact in fp32, and all else is infinite in fp16.
    out.copy_(_rounded_to_odd(values.double()) if out.dtype == torch.bfloat16 else values)


def unpack_i64(blocks: Tensor, out: Tensor) -> None:
    values = blocks.view(torch.int64)
    if out.dtype != torch.bfloat16:
        out.copy_(values)
        return
    # Two runs of bits that fp64 holds exactly; the lower only tells whether there is something.
    low = (values & 0x7FF).ne(0).long().bitwise_left_shift_(11)
    long = (values & -0x800).bitwise_or_(low)
    short = (values >> 53).add_(1).bitwise_right_shift_(1).eq(0)
    out.copy_(_rounded_to_odd(torch.where(short, values, long).double()))


def _rounded_to_odd(values: Tensor) -> Tensor:
    """fp64 values in fp32: those that it does not hold become the odd one of their two neighbours.

    That is on the same side of every number of fewer bits, and of every middle between two, as the value was.
    """
    rounded = values.float()
    bits = rounded.view(torch.int32)
    # Away from zero by rounding: the neighbour towards zero has the next lower bits, in either sign.
    bits.sub_((rounded.double().abs_() > values.clone().abs_()).int())
    return bits.bitwise_or_((rounded.double() != values).int()).view(torch.float32)


def unpack_f8_e4m3(blocks: Tensor, out: Tensor) -> None:
    """E4M3 without infinities: 0x7F and 0xFF are NaN."""
    out.copy_(blocks.view(torch.float8_e4m3fn))


def unpack_f8_e5m2(blocks: Tensor, out: Tensor) -> None:
    """E5M2 as IEEE 754 has it: 0x7C and 0xFC are infinite, what follows them is NaN."""
    out.copy_(blocks.view(torch.float8_e5m2))


def unpack_f8_scaled(blocks: Tensor, out: Tensor, *, dtype: torch.dtype, scale: float) -> None:
    torch.mul(blocks.view(dtype).float(), scale, out=out)


def unpack_f8_scaled_like_forge(
    blocks: Tensor, out: Tensor, computation_dtype: torch.dtype, *, dtype: torch.dtype, scale: float
) -> None:
    """The scale is rounded to the computation dtype, and so is the product (every value fits into it)."""
    rounded = torch.tensor(scale, dtype=torch.float32).to(computation_dtype).item()
    torch.mul(blocks.view(dtype).float(), rounded, out=out)
