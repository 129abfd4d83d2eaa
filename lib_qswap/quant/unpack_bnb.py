"""bitsandbytes' four-bit types, NF4 and FP4, in the blocks that `bnb_weight` makes: fp32 absmax, 32 bytes,
element 2i in the high nibble of byte i, 2i + 1 in the low one; absmax * value. Arguments as in
`unpack_legacy`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# bitsandbytes' `get_4bit_type`. NF4: quantiles of the normal distribution. FP4: sign, two exponent bits, one
# mantissa bit, with a largest value of 1.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
FP4_VALUES = (
    0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12,
    0.0, -0.0625 / 12, -8 / 12, -12 / 12, -4 / 12, -6 / 12, -2 / 12, -3 / 12,
)  # fmt: skip


@lru_cache(maxsize=16)
def _pair_table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """int64 (256,): entry 16 * a + b is fp32 `values[a]`, `values[b]`."""
    ordered = torch.tensor(values, dtype=torch.float32)
    pairs = torch.cartesian_prod(ordered, ordered)
    return pairs.view(torch.int64).view(-1).to(device)


def _unpack(blocks: Tensor, out: Tensor, values: tuple[float, ...]) -> None:
    n = blocks.shape[0]
    pairs = blocks[:, 4:].int().view(-1)
    numbers = _pair_table(values, blocks.device).index_select(0, pairs).view(torch.float32).view(n, 64)
    torch.mul(numbers, blocks.view(torch.float32)[:, :1], out=out)


def unpack_nf4(blocks: Tensor, out: Tensor, _computation_dtype: torch.dtype = torch.float32) -> None:
    _unpack(blocks, out, NF4_VALUES)


def unpack_fp4(blocks: Tensor, out: Tensor, _computation_dtype: torch.dtype = torch.float32) -> None:
    _unpack(blocks, out, FP4_VALUES)
