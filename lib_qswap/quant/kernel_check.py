"""Whether a compiled kernel gives the values of torch's operations, on a few blocks and on the CPU's word.

Compilers have errors: Triton 3.6 made wrong sums of two types in a kernel that was right in its interpreter,
for every type. So a kernel is compared before it is used for the first time in a process, for each type,
dtype and device: the one time that unpacking waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .formats import Format

_ELEMENTS = 3 * 4096
"""That are unpacked, and three blocks: some programs, the last one not full."""

_ROWS, _ROW_ELEMENTS = 5, 2304
_SMALLEST, _LARGEST = 2.0**-6, 64.0
"""Of the largest values in the blocks that products are made of: no block is lost among the others, and all
sums fit into fp16."""
_CANDIDATES = 64
"""Random blocks for each that is taken; of some types one in twenty is right."""
_TOLERANCE = 1e-5
"""Of the sum of the terms' sizes, beside the rounding of the result."""


class WrongValues(RuntimeError):
    """A kernel's values are not those of torch's operations."""

    def __init__(self) -> None:
        super().__init__("its values are not those of PyTorch's operations")


def check_unpack(kernel: Any, format: Format, address: int, out: Tensor, dtype: torch.dtype) -> None:
    """Compares a `unpack_triton.Kernel`'s values, bit for bit but for what is not a number, and what is too
    small for a normal fp32.

    address: of the packed bytes, modulo 16; out: of the dtype and on the device that are asked for. dtype:
    what Forge's arithmetic computes in; fp32 for exact arithmetic.

    Raises:
        WrongValues: they differ.
    """
    packed = _blocks(format, _ELEMENTS // format.block_elements + 3)
    expected = _unpacked(format, packed, out.dtype, dtype)
    values = torch.empty_like(expected, device=out.device)
    kernel.unpack(_at(address, packed, out.device), values, format.block_elements, dtype)
    found, wanted = values.cpu().float(), expected.float()
    tiny = torch.finfo(torch.float32).tiny
    same = (
        (found == wanted) | (found.isnan() & wanted.isnan()) | ((found.abs() < tiny) & (wanted.abs() < tiny))
    )
    if not bool(same.all()):
        raise WrongValues


def check_product(
    multiply: Callable[[Format, Tensor, Tensor, Tensor | None, Tensor], None],
    format: Format,
    address: int,
    inputs: Tensor,
    bias: Tensor | None,
) -> None:
    """Compares what a product makes of inputs and a bias like these; address: see `check_unpack`.

    multiply: as `multiply_triton.multiply` without its kernel.

    Raises:
        WrongValues: the results differ by more than rounding.
    """
    count = _ROWS * _ROW_ELEMENTS // format.block_elements
    packed = _blocks(format, _CANDIDATES * count)
    values = _unpacked(format, packed, torch.float32, torch.float32)
    largest = values.abs().amax(1)
    usable = ((largest > _SMALLEST) & (largest < _LARGEST)).nonzero().flatten()[:count]
    weight = values[usable].view(_ROWS, _ROW_ELEMENTS).double()
    x, added = _normal((len(inputs), _ROW_ELEMENTS), inputs.dtype), None
    exact = torch.nn.functional.linear(x.double(), weight)
    if bias is not None:
        added = _normal((_ROWS,), bias.dtype)
        exact += added.double()
        added = added.to(inputs.device)
    out = inputs.new_empty((len(inputs), _ROWS))
    blocks = _at(address, packed[usable], inputs.device)
    multiply(format, blocks, x.to(inputs.device), added, out)
    sizes = torch.nn.functional.linear(x.double().abs(), weight.abs())
    limits = torch.finfo(inputs.dtype)
    allowed = _TOLERANCE * sizes + limits.eps * (exact.abs() + limits.tiny)
    if not bool(((out.cpu().double() - exact).abs() <= allowed).all()):
        raise WrongValues


def _blocks(format: Format, count: int) -> Tensor:
    """Random bytes, uint8 (count, block bytes): valid blocks of every type."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (count, format.block_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device="cpu")


def _normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def _unpacked(format: Format, packed: Tensor, out_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    from .unpack import unpack_with_torch

    out = packed.new_empty((len(packed), format.block_elements), dtype=out_dtype)
    return unpack_with_torch(format, packed, out, dtype)


def _at(address: int, packed: Tensor, device: torch.device) -> Tensor:
    """`packed` on `device`, at an address that is this modulo 16."""
    buffer = torch.empty(packed.numel() + 32, dtype=torch.uint8, device=device)
    start = (address - buffer.data_ptr()) % 16
    return buffer[start : start + packed.numel()].view(packed.shape).copy_(packed)
