"""The operations that keep a PackedTensor packed, or need none of its bytes; `packed` lists them in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .packed import PackedTensor, implements
from .traced import is_pinned


@implements(
    "detach.default",
    "alias.default",
    "lift_fresh.default",
    "contiguous.default",
    "resolve_conj.default",
    "resolve_neg.default",
)
def _alias(func: Any, tensor: PackedTensor, **_: Any) -> Any:
    return tensor._with(tensor.packed, tensor.shape, source=tensor.source)


@implements("copy_.default")
def _copy_into(func: Any, tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
    # As `load_state_dict` does: rounded once, to the dtype of where it goes.
    if isinstance(tensor, PackedTensor) or not isinstance(source, PackedTensor):
        return NotImplemented
    return func(tensor, source.dequantize(tensor.dtype), non_blocking)


# -- Copies and moves ----------------------------------------------------------------------------------------


def _copy_of(tensor: PackedTensor, *, pin: bool = False) -> Tensor:
    return tensor.copy_packed(torch.empty_like(tensor.packed, pin_memory=pin or is_pinned(tensor.packed)))


def _packed_on(tensor: PackedTensor, device: torch.device | None, non_blocking: bool) -> Tensor:
    """The bytes on `device`: those of the tensor themselves where they are there."""
    packed = tensor.packed
    if device is None or device.type in (packed.device.type, "meta") or not tensor.is_mapped:
        return packed.to(device=device, non_blocking=non_blocking)
    return tensor.copy_packed(torch.empty_like(packed, device=device))


def _moved(
    tensor: PackedTensor,
    device: torch.device | None,
    dtype: torch.dtype | None,
    non_blocking: bool,
    copy: bool,
    pin: bool = False,
) -> Any:
    """What every overload of `.to()` comes down to. Memory formats mean nothing to packed bytes."""
    dtype = dtype or tensor.dtype
    if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.dtype.is_floating_point):
        return tensor.dequantize().to(device=device, dtype=dtype, non_blocking=non_blocking)
    packed = _packed_on(tensor, device, non_blocking)
    if packed is tensor.packed and (copy or (pin and not packed.is_pinned())):
        packed = _copy_of(tensor, pin=pin)
    if packed is not tensor.packed:
        return tensor._with(packed, tensor.shape, dtype=dtype)
    return tensor if dtype == tensor.dtype else tensor.with_dtype(dtype)


@implements("clone.default")
def _clone(func: Any, tensor: PackedTensor, *, memory_format: Any = None) -> Any:
    return tensor._with(_copy_of(tensor), tensor.shape)


@implements("_to_copy.default")
def _to_copy(
    func: Any,
    tensor: PackedTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> Any:
    # `.to(dtype)` and `.to(memory_format=...)` arrive here as well; to the same place and dtype it is
    # `copy=True`.
    copy = dtype in (None, tensor.dtype) and memory_format in (None, torch.preserve_format)
    return _moved(tensor, device, dtype, non_blocking, copy, bool(pin_memory))


@implements("to.dtype_layout")
def _to_dtype_layout(
    func: Any,
    tensor: PackedTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    copy: bool = False,
    memory_format: Any = None,
) -> Any:
    return _moved(tensor, device, dtype, non_blocking, copy, bool(pin_memory))


@implements("to.device", "to.prim_Device")
def _to_device(
    func: Any,
    tensor: PackedTensor,
    device: torch.device | None,
    dtype: torch.dtype | None = None,
    non_blocking: bool = False,
    copy: bool = False,
    memory_format: Any = None,
) -> Any:
    return _moved(tensor, device, dtype, non_blocking, copy)


@implements("to.dtype", "to.prim_dtype")
def _to_dtype(
    func: Any,
    tensor: PackedTensor,
    dtype: torch.dtype | None = None,
    non_blocking: bool = False,
    copy: bool = False,
    memory_format: Any = None,
) -> Any:
    return _moved(tensor, None, dtype, non_blocking, copy)


@implements("to.other", "to.prim_other")
def _to_other(
    func: Any,
    tensor: Tensor,
    other: Tensor,
    non_blocking: bool = False,
    copy: bool = False,
    memory_format: Any = None,
) -> Any:
    if isinstance(tensor, PackedTensor):
        return _moved(tensor, other.device, other.dtype, non_blocking, copy)
    return tensor.to(other.device, other.dtype, non_blocking, copy, memory_format=memory_format)


@implements("is_pinned.default")
def _is_pinned(func: Any, tensor: PackedTensor, device: Any = None) -> bool:
    return func(tensor.packed, device)


@implements("pin_memory.default", "_pin_memory.default")
def _pin_memory(func: Any, tensor: PackedTensor, device: Any = None) -> Any:
    packed = func(_copy_of(tensor) if tensor.is_mapped else tensor.packed, device)
    return tensor if packed is tensor.packed else tensor._with(packed, tensor.shape)


@implements("record_stream.default")
def _record_stream(func: Any, tensor: PackedTensor, stream: Any) -> None:
    func(tensor.packed, stream)


# -- Rows: positions along dim 0 -----------------------------------------------------------------------------


def _rows(tensor: PackedTensor, start: int, stop: int, shape: Sequence[int]) -> Any:
    """Rows [start, stop) as an alias of `shape`; NotImplemented when they begin or end inside of a block."""
    row_elements = math.prod(tensor.shape[1:])
    if any((row * row_elements) % tensor.format.block_elements for row in (start, stop)):
        return NotImplemented
    first, end = (tensor.format.packed_bytes(row * row_elements) for row in (start, stop))
    source = None if tensor.source is None else tensor.source.part(first, end - first)
    return tensor._with(tensor.packed.view(-1)[first:end], shape, source=source)


@implements("slice.Tensor")
def _slice(
    func: Any,
    tensor: PackedTensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    first, stop, _ = slice(start, end).indices(tensor.shape[dim])
    if (first, stop, step) == (0, tensor.shape[dim], 1):
        return _alias(func, tensor)
    if dim % tensor.dim() != 0 or step != 1:
        return NotImplemented
    stop = max(first, stop)
    return _rows(tensor, first, stop, (stop - first, *tensor.shape[1:]))


@implements("narrow.default")
def _narrow(func: Any, tensor: PackedTensor, dim: int, start: int, length: int) -> Any:
    start = start % tensor.shape[dim] if start < 0 else start
    if length < 0 or start + length > tensor.shape[dim]:
        return NotImplemented
    return _slice(func, tensor, dim, start, start + length)


@implements("select.int")
def _select(func: Any, tensor: PackedTensor, dim: int, index: int) -> Any:
    rows = tensor.shape[0]
    if dim % tensor.dim() != 0 or tensor.dim() < 2 or not -rows <= index < rows:
        return NotImplemented
    return _rows(tensor, index % rows, index % rows + 1, tensor.shape[1:])


@implements("split_with_sizes.default", "split.sizes")
def _split_with_sizes(func: Any, tensor: PackedTensor, sizes: Sequence[int], dim: int = 0) -> Any:
    if dim % tensor.dim() != 0 or sum(sizes) != tensor.shape[0] or min(sizes, default=-1) < 0:
        return NotImplemented
    parts = [
        _rows(tensor, stop - size, stop, (size, *tensor.shape[1:]))
        for size, stop in zip(sizes, accumulate(sizes), strict=True)
    ]
    return NotImplemented if any(part is NotImplemented for part in parts) else parts


@implements("split.Tensor")
def _split(func: Any, tensor: PackedTensor, split_size: int, dim: int = 0) -> Any:
    rows = tensor.shape[dim]
    if split_size <= 0:
        return NotImplemented
    sizes = [min(split_size, rows - start) for start in range(0, rows, split_size)]
    return _split_with_sizes(func, tensor, sizes, dim)


@implements("chunk.default")
def _chunk(func: Any, tensor: PackedTensor, chunks: int, dim: int = 0) -> Any:
    return NotImplemented if chunks <= 0 else _split(func, tensor, -(-tensor.shape[dim] // chunks), dim)


@implements("cat.default")
def _cat(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if not isinstance(first, PackedTensor) or dim % first.dim() != 0:
        return NotImplemented
    parts = [tensor for tensor in tensors if isinstance(tensor, PackedTensor) and _joins(first, tensor)]
    if len(parts) < len(tensors):
        return NotImplemented
    packed = first.packed.new_empty(sum(part.packed_nbytes for part in parts))
    for part, room in zip(parts, packed.split([part.packed_nbytes for part in parts]), strict=True):
        part.copy_packed(room)
    return first._with(packed, (sum(part.shape[0] for part in parts), *first.shape[1:]))


def _joins(first: PackedTensor, tensor: PackedTensor) -> bool:
    return (
        tensor.format is first.format
        and tensor.dtype == first.dtype
        and tensor.device == first.device
        and tensor.shape[1:] == first.shape[1:]
    )


# -- Shape, dtype and device only: computed on a tensor without data -----------------------------------------


def _without_data(leaf: Any) -> Any:
    if isinstance(leaf, PackedTensor):
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
    return leaf


@implements(
    "is_same_size.default",
    "is_floating_point.default",
    "is_complex.default",
    "is_signed.default",
    "is_conj.default",
    "is_neg.default",
    "size.int",
    "stride.int",
    "result_type.Tensor",
    "result_type.Scalar",
    "result_type.Scalar_Tensor",
)
def _query(func: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = tree_map(_without_data, (args, kwargs))
    return func(*args, **kwargs)


@implements(
    "empty_like.default",
    "zeros_like.default",
    "ones_like.default",
    "full_like.default",
    "rand_like.default",
    "randn_like.default",
    "new_empty.default",
    "new_empty_strided.default",
    "new_zeros.default",
    "new_ones.default",
    "new_full.default",
)
def _plain_like(func: Any, tensor: PackedTensor, *args: Any, **kwargs: Any) -> Tensor:
    kwargs["device"] = kwargs.get("device") or tensor.device
    return func(_without_data(tensor), *args, **kwargs)


@implements("_has_compatible_shallow_copy_type.default")
def _has_compatible_shallow_copy_type(func: Any, tensor: Any, other: Any) -> bool:
    # Asked by `module.to(...)` of older PyTorch, before it assigns `param.data`.
    both_packed = isinstance(tensor, PackedTensor) and isinstance(other, PackedTensor)
    return both_packed and func(tensor.packed, other.packed)
