"""Whether a compiled kernel gives the values of torch's operations, on a few blocks and on the CPU's word.

Compilers have errors: Triton 3.6 made wrong sums of two types in a kernel that every interpreter and every
other type agreed with. So a kernel is compared before it is used for the first time in a process, for each
type, dtype and device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .formats import Format

_ELEMENTS = 3 * 4096
"""That are unpacked, and three blocks: some programs, the last one not full."""

_ROWS, _ROW_ELEMENTS = 5, 2304
_LARGEST = 64.0
"""Value in blocks for products, which stay within fp16."""
_TOLERANCE = 1e-4
"""Of the sum of the terms' sizes, beside the rounding of the result."""


class WrongValues(RuntimeError):
    """A kernel's values are not those of torch's operations."""

    def __init__(self) -> None:
        super().__init__("its values are not those of PyTorch's operations")


def check_unpack(
    kernel: Any, format: Format, device: torch.device, out_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Compares a `unpack_triton.Kernel`'s values, bit for bit but for what is not a number.

    dtype: what Forge's arithmetic computes in; fp32 for exact arithmetic.

    Raises:
        WrongValues: they differ.
    """
    from .unpack import unpack_with_torch

    packed = _blocks(format, _ELEMENTS // format.block_elements + 3)
    expected = packed.new_empty((len(packed), format.block_elements), dtype=out_dtype)
    unpack_with_torch(format, packed, expected, dtype)
    out = torch.empty_like(expected, device=device)
    kernel.unpack(packed.to(device), out, format.block_elements, dtype)
    if not torch.allclose(out.cpu(), expected, rtol=0, atol=0, equal_nan=True):
        raise WrongValues


def check_product(kernel: Any, format: Format, inputs: Tensor, bias: Tensor | None) -> None:
    """Compares what `multiply_triton` makes of inputs and a bias like these.

    Raises:
        WrongValues: the results differ by more than rounding.
    """
    from .multiply_triton import multiply
    from .unpack import unpack_with_torch

    count = _ROWS * _ROW_ELEMENTS // format.block_elements
    packed = _blocks(format, 32 * count)
    values = packed.new_empty((len(packed), format.block_elements), dtype=torch.float32)
    unpack_with_torch(format, packed, values, torch.float32)
    usable = (values.abs().amax(1) < _LARGEST).nonzero().flatten()
    packed, weight = packed[usable[:count]], values[usable[:count]].view(_ROWS, _ROW_ELEMENTS).double()
    generator = torch.Generator("cpu").manual_seed(1)
    x = torch.randn((len(inputs), _ROW_ELEMENTS), generator=generator, device="cpu").to(inputs.dtype)
    out = inputs.new_empty((len(inputs), _ROWS))
    added = None if bias is None else bias.new_zeros(_ROWS)
    multiply(kernel, packed.to(inputs.device), x.to(inputs.device), added, out, format.block_elements)
    exact = torch.nn.functional.linear(x.double(), weight)
    sizes = torch.nn.functional.linear(x.double().abs(), weight.abs())
    allowed = _TOLERANCE * sizes + torch.finfo(inputs.dtype).eps * exact.abs()
    if not bool(((out.cpu().double() - exact).abs() <= allowed).all()):
        raise WrongValues


def _blocks(format: Format, count: int) -> Tensor:
    """Random bytes, uint8 (count, block bytes): valid blocks of every type."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (count, format.block_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device="cpu")
