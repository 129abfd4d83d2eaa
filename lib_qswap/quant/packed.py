"""PackedTensor: quantized bytes that look like the weight they stand for.

A PackedTensor is a *wrapper* tensor subclass: PyTorch sees a tensor with the logical shape and dtype of the
weight, and no storage of its own; the bytes are in the inner tensor `packed`, exactly as in the file. So
`nn.Parameter(PackedTensor(...), requires_grad=False)` is a Parameter for every module class, every state dict
and every `module.to(...)`.

What an operation does with one:

- `detach`, `.data`, `.to()` the same place: alias the bytes and keep `source`.
- `.to(dtype)`, `.half()` and the like, between floating dtypes: alias the bytes under another *logical* dtype
  and keep `source`. Converting a module's dtype never unpacks its weights.
- `.to(device)`, `clone`, `deepcopy`, `pin_memory`: copy the bytes and drop `source`. A clone is page-locked
  where the original was.
- slices, `narrow`, `select`, `split`, `chunk` along dim 0, on block boundaries: alias the bytes; `source` is
  cut to fit. `cat` along dim 0 joins the bytes of equal formats.
- `copy_` into a plain tensor unpacks to that tensor's dtype.
- `empty_like`, `new_zeros` and their kin, and questions about shape or dtype, need no bytes.
- what would write into it raises: packed weights are immutable.
- anything else unpacks to the logical dtype and computes with that plain tensor. Views such as `t()` are
  views of the unpacked copy.

The same holds in `inference_mode`, where PyTorch dispatches composite operations (`aten.to.dtype_layout`,
`aten.chunk`, `aten.linear` ...) whole instead of in parts.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from . import packed_bytes
from .formats import Format, scaled
from .traced import is_pinned
from .unpack import Arithmetic

if TYPE_CHECKING:
    from .mapped_file import FileSlice


class PackedTensor(torch.Tensor):
    """A weight in its quantized bytes; immutable.

    Tensor data:
        packed: uint8, contiguous, exactly the bytes of the file (of bitsandbytes' types: those of its two
            tensors, put together by `bnb_weight`). Shape (rows, bytes per row), where rows is the product of
            all logical dimensions but the last, or flat when a row is no whole number of blocks.

    Attributes:
        format: a row of `formats.FORMATS`, or what `formats.scaled` makes of one.
        source: where in which file the same bytes are; None when they came from elsewhere or were copied.

    Where `packed` aliases the map of a file (`is_mapped`), operations read from the file instead of touching
    it: a file that has shrunk is a GGUFError then, one that cannot be read an OSError.

    Raises ValueError when `packed` is not what `format` needs for `shape`.
    """

    packed: Tensor
    format: Format
    source: FileSlice | None

    @staticmethod
    def __new__(
        cls: type[PackedTensor],
        packed: Tensor,
        format: Format,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float16,
        source: FileSlice | None = None,
    ) -> PackedTensor:
        shape = torch.Size(shape)
        packed = _rows_of_blocks(packed, format, shape)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)
        self.packed = packed
        self.format = format
        self.source = source
        return self

    # Tensor's own would refuse the arguments of __new__.
    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    @property
    def ggml_type(self) -> str:
        """The format's name, as the table of formats spells it: "Q4_K", "F8_E4M3", "BNB_NF4"."""
        return self.format.name

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the packed weight (`nbytes` is what it would take unpacked)."""
        return self.packed.nbytes

    @property
    def is_mapped(self) -> bool:
        """Whether `packed` aliases the map of `source`, so that reading it can end the process."""
        return packed_bytes.is_mapped(self.packed, self.source)

    def copy_packed(self, destination: Tensor) -> Tensor:
        """Write the packed bytes into `destination` (uint8, contiguous, of any device) and return it.

        Raises GGUFError or OSError when they have to be read from a file and cannot be.
        """
        packed_bytes.copy_bytes(self.packed, self.source, destination)
        return destination

    def dequantize(  # type: ignore[override]
        self,
        dtype: torch.dtype | None = None,
        *,
        out: Tensor | None = None,
        arithmetic: Arithmetic = "exact",
        computation_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Unpack into a plain tensor of the logical shape, on the device where the bytes are.

        Args:
            dtype: of the result; the logical dtype when None (`out`'s, when `out` is given).
            out: contiguous, of the logical shape, where the result is written; returned.
            arithmetic, computation_dtype: see `unpack.unpack`.

        Raises ValueError when `out` does not fit, what `unpack` raises for a type that nobody can unpack, and
        GGUFError or OSError when the bytes have to be read from a file and cannot be.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.packed.device)
        elif out.shape != self.shape or not out.is_contiguous() or dtype not in (None, out.dtype):
            raise ValueError(
                f"dequantize(out=...): a contiguous tensor of shape {tuple(self.shape)}"
                f" and dtype {dtype or out.dtype} is needed, not {tuple(out.shape)} of {out.dtype}"
            )
        packed_bytes.write_values(
            self.format,
            self.packed,
            self.source,
            out,
            arithmetic=arithmetic,
            computation_dtype=computation_dtype,
        )
        return out

    def with_dtype(self, dtype: torch.dtype) -> PackedTensor:
        """The same bytes with another logical dtype."""
        return self._with(self.packed, self.shape, dtype=dtype, source=self.source)

    def _with(
        self,
        packed: Tensor,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        source: FileSlice | None = None,
    ) -> PackedTensor:
        """A tensor of this class (a subclass stays one) and format over other bytes."""
        return type(self)(packed, self.format, shape, dtype or self.dtype, source)

    # The default would turn the plain tensors that operations return into PackedTensors again.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # A view must be an inference tensor exactly if its base is one, whatever mode is on; otherwise
        # autograd ends with "Cannot set version_counter for inference tensor".
        if _returns_view(func):
            base_is_inference = next(packed_tensors((args, kwargs))).is_inference()
            if base_is_inference != torch.is_inference_mode_enabled():
                with torch.inference_mode(base_is_inference), torch.no_grad():
                    return _compute(func, args, kwargs)
        return _compute(func, args, kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, float, torch.dtype]]:
        return ["packed"], (self.format.name, self.format.scale, self.dtype)

    @classmethod
    def __tensor_unflatten__(
        cls,
        inner_tensors: dict[str, Tensor],
        context: tuple[str, float, torch.dtype],
        outer_size: Sequence[int],
        outer_stride: Sequence[int],
    ) -> PackedTensor:
        name, scale, dtype = context
        return cls(inner_tensors["packed"], scaled(name, scale), outer_size, dtype)

    @property
    def data(self) -> PackedTensor:
        return cast(PackedTensor, self.detach())

    @data.setter
    def data(self, value: Tensor) -> None:
        # `module.to(...)` of older PyTorch assigns `param.data`, which moves the outside (device, dtype) of a
        # wrapper and would leave its bytes behind.
        if not isinstance(value, PackedTensor):
            raise TypeError(
                f"cannot put a plain tensor into {self!r} through .data: assign a new Parameter to the module"
            )
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.packed, self.format, self.source = value.packed, value.format, value.source

    def __setitem__(self, index: Any, value: Any) -> None:
        # PyTorch would write through a view, which may be one of an unpacked copy.
        raise self._immutable("assigning to an index")

    def _immutable(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{what} would write into {self!r}: packed weights are immutable. Compute with a copy,"
            " tensor.dequantize(), or put a new Parameter in its place (load_state_dict(assign=True))"
        )

    def share_memory_(self) -> PackedTensor:
        raise RuntimeError(
            f"{self!r} cannot be moved to shared memory: open the same file in the other process instead"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedTensor:
        if id(self) not in memo:
            duplicate = cast(PackedTensor, self.detach().clone().requires_grad_(self.requires_grad))
            # What others have set on it, and the mark that makes it a Parameter.
            for name, value in vars(self).items():
                if name not in vars(duplicate):
                    setattr(duplicate, name, copy.deepcopy(value, memo))
            memo[id(self)] = duplicate
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        packed = self.packed
        # Part of an arena: pickle these bytes only.
        if self.is_mapped or packed.untyped_storage().nbytes() != packed.nbytes:
            packed = self.copy_packed(torch.empty_like(packed))
        is_parameter = isinstance(self, torch.nn.Parameter)
        format = (self.format.name, self.format.scale)
        values = (packed, format, tuple(self.shape), self.dtype, is_parameter)
        return _rebuild, (type(self), *values)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"{type(self).__name__}({self.format.name}, shape={tuple(self.shape)}, dtype={self.dtype},"
            f" device={self.device}, pinned={is_pinned(self.packed)})"
        )


def _rows_of_blocks(packed: Tensor, format: Format, shape: torch.Size) -> Tensor:
    """`packed` in the shape that PackedTensor promises; ValueError when it cannot be."""
    elements = math.prod(shape)
    if packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise ValueError(
            f"packed bytes must be contiguous uint8, not {packed.dtype} of strides {packed.stride()}"
        )
    nbytes = format.packed_bytes(elements)
    if packed.numel() != nbytes:
        raise ValueError(f"{format.name} of shape {tuple(shape)} takes {nbytes} bytes, not {packed.numel()}")
    if not shape or elements == 0 or shape[-1] % format.block_elements:
        return packed.view(-1)
    return packed.view(elements // shape[-1], -1)


def _rebuild(
    cls: type[PackedTensor],
    packed: Tensor,
    format: tuple[str, float],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    is_parameter: bool,
) -> PackedTensor:
    tensor = cls(packed, scaled(*format), shape, dtype)
    return cast(PackedTensor, torch.nn.Parameter(tensor, requires_grad=False)) if is_parameter else tensor


if hasattr(torch.serialization, "add_safe_globals"):  # torch >= 2.4: for `torch.load(weights_only=True)`
    torch.serialization.add_safe_globals([PackedTensor, _rebuild])


# Operations that stay packed or need no bytes, by aten overload: see `packed_ops`.
_HANDLERS: dict[Any, Callable[..., Any]] = {}


def implements(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated handler for aten overloads ("slice.Tensor"), as far as this PyTorch has them.

    A handler is called with the overload and its arguments; NotImplemented means: unpack and compute after
    all.
    """

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            packet_name, overload = name.split(".")
            packet = getattr(torch.ops.aten, packet_name, None)
            if packet is not None and overload in packet.overloads():
                _HANDLERS[getattr(packet, overload)] = handler
        return handler

    return register


def packed_tensors(tree: Any) -> Iterator[PackedTensor]:
    """The PackedTensors among the arguments of an operation."""
    return (leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, PackedTensor))


@functools.cache
def _returns_view(func: Any) -> bool:
    return any(result.alias_info is not None for result in func._schema.returns)


def _compute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    handler = _HANDLERS.get(func)
    result = NotImplemented if handler is None else handler(func, *args, **kwargs)
    return _unpack_and_compute(func, args, kwargs) if result is NotImplemented else result


def _unpack_and_compute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    for tensor in packed_tensors(_written(func, args, kwargs)):
        raise tensor._immutable(str(func))

    def plain(leaf: Any) -> Any:
        return leaf.dequantize() if isinstance(leaf, PackedTensor) else leaf

    args, kwargs = tree_map(plain, (args, kwargs))
    return func(*args, **kwargs)


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that `func` writes into."""
    return [
        args[position] if position < len(args) else kwargs.get(argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


from . import packed_ops  # noqa: E402, F401  (fills _HANDLERS)
