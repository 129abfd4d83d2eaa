"""Which kernel unpacks: Triton's where it can, torch's own operations everywhere else.

Both unpack to the same bits. Triton is optional and imported when the first weight on a device that it serves
is unpacked. A type whose kernel does not compile or start there, or whose values `kernel_check` finds wrong,
is left to torch from then on.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from . import kernel_check

if TYPE_CHECKING:
    from .formats import Format

Choice = Literal["Auto", "Triton", "Torch"]

# Device types of torch that Triton compiles for; "cuda" is AMD's HIP as well.
_SERVED = ("cuda", "xpu")
# The oldest whose interpreter gives the right bits; those before it interpret too little to be tried.
_OLDEST_TRITON = (3, 2)

_PRODUCT = "{} in products"

_choice: Choice = "Auto"
_given_up: set[tuple[str, str]] = set()
_without_lanes: set[tuple[object, ...]] = set()
_checked: set[tuple[object, ...]] = set()
_listener: Callable[[str], None] = logging.getLogger("qswap").warning


def choose(choice: Choice) -> None:
    """What unpacks from now on, in the whole process. "Auto" takes Triton where it can, and so does "Triton",
    which says so where it cannot."""
    global _choice
    _choice = choice


def report_to(listener: Callable[[str], None]) -> None:
    """`listener` is called with a sentence when a kernel has failed; it is the log's otherwise."""
    global _listener
    _listener = listener


def in_use(device: torch.device | str) -> str:
    """For people: "Triton" or "Torch" on `device`, or "Triton, Torch for Q4_K" after a failure there."""
    device_type = torch.device(device).type
    if _choice == "Torch" or why_not_triton(device_type) is not None:
        return "Torch"
    left = sorted(name for name, where in _given_up if where == device_type)
    return "Triton" + (f", Torch for {', '.join(left)}" if left else "")


@lru_cache(maxsize=16)
def why_not_triton(device_type: str) -> str | None:
    """Why Triton unpacks nothing on devices of this type; None where it does."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type not in _SERVED and not (interpreted and device_type == "cpu"):
        return f"it does not serve {device_type}"
    try:
        import triton
    except Exception as error:  # a broken installation raises whatever it likes
        return f"it cannot be imported ({_first_line(error)})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST_TRITON:
        return f"version {triton.__version__} is too old"
    return None


def could_be_faster(device_type: str) -> str | None:
    """For people: why Triton, which compiles for devices of this type, unpacks nothing although it may; None:
    it does, it cannot, or the user has chosen one."""
    reason = why_not_triton(device_type) if _choice == "Auto" and device_type in _SERVED else None
    if reason is None:
        return None
    oldest = ".".join(map(str, _OLDEST_TRITON))
    return (
        f"Triton does not unpack here: {reason}. PyTorch's own operations do it, several times slower."
        f" Version {oldest} or newer is needed; it comes with PyTorch 2.6 on Linux, and for Windows as"
        " triton-windows."
    )


def unpack_with_triton(
    format: Format, packed: Tensor, out: Tensor, dtype: torch.dtype = torch.float32
) -> bool:
    """Unpack as `unpack.unpack` does; False where that is left to torch's operations. dtype: what Forge's
    arithmetic computes in; fp32 for exact arithmetic."""
    kernel = _kernel(format, out.device)
    if kernel is None or packed.data_ptr() % kernel.alignment:
        return False
    if not out.numel():
        return True
    try:
        # Triton compiles once more for addresses that are no multiple of 16.
        key = (format.name, out.device, out.dtype, dtype, packed.data_ptr() % 16 == 0)
        if key not in _checked and not _is_captured(out.device):
            kernel_check.check_unpack(kernel, format, packed.data_ptr() % 16, out, dtype)
            _checked.add(key)
        kernel.unpack(packed, out, format.block_elements, dtype)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler, the C compiler, the driver: each has its own
        _give_up(format.name, out.device.type, error)
        return False
    return True


def product_with_triton(
    format: Format, packed: Tensor, inputs: Tensor, bias: Tensor | None, rows: int
) -> Tensor | None:
    """`inputs` (1 or 2, elements) times the transposed weight of `rows` rows, plus bias, in inputs' dtype;
    None where that is left to torch. The weight is unpacked as in exact arithmetic, but not rounded."""
    kernel = _kernel(format, inputs.device)
    if kernel is None or packed.data_ptr() % kernel.alignment or _given_up_product(format, inputs.device):
        return None
    try:
        from . import multiply_lanes, multiply_triton

        faster = multiply_lanes.multiply_for(format, packed, inputs, rows)
        if faster is not None and _variant(faster, format, inputs) not in _without_lanes:
            out = _product_by_lanes(faster, format, packed, inputs, bias, rows)
            if out is not None:
                return out
        multiply = partial(multiply_triton.multiply, kernel)
        return _product(multiply, format, packed, inputs, bias, rows)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        _give_up(_PRODUCT.format(format.name), inputs.device.type, error)
        return None


def _product_by_lanes(
    multiply: partial[None], format: Format, packed: Tensor, inputs: Tensor, bias: Tensor | None, rows: int
) -> Tensor | None:
    """None where it fails: the kernel that serves every type takes its place."""
    try:
        return _product(multiply, format, packed, inputs, bias, rows)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        if "out of memory" not in str(error).lower():  # of a driver that has no room for a kernel
            _without_lanes.add(_variant(multiply, format, inputs))
            _say_once(
                f"{format.name} is multiplied more slowly here than it could be ({_first_line(error)})."
                " Another version of Triton may do better."
            )
        return None


def _variant(multiply: partial[None], format: Format, inputs: Tensor) -> tuple[object, ...]:
    """What Triton compiles a product for, but for addresses."""
    return multiply.func, multiply.args[1:], format.name, inputs.device, inputs.dtype, len(inputs)


def _product(
    multiply: partial[None], format: Format, packed: Tensor, inputs: Tensor, bias: Tensor | None, rows: int
) -> Tensor:
    """multiply: of `multiply_triton` or `multiply_lanes`, with the type and how it goes about it."""
    out = inputs.new_empty((inputs.shape[0], rows))
    # Triton compiles once more for addresses that are no multiple of 16; `packed` alone may have such.
    inputs, bias = _aligned(inputs), None if bias is None else _aligned(bias)
    variant, aligned = _variant(multiply, format, inputs), packed.data_ptr() % 16 == 0
    key = (variant, None if bias is None else bias.dtype, aligned)
    if key not in _checked and not _is_captured(out.device):
        kernel_check.check_product(multiply, format, packed.data_ptr() % 16, inputs, bias)
        _checked.add(key)
    multiply(format, packed, inputs, bias, out)
    return out


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _is_captured(device: torch.device) -> bool:
    """Whether what is launched goes into a CUDA graph, which no check can be part of."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def has_product(format: Format, device: torch.device) -> bool:
    """Whether `product_with_triton` can be expected to serve this type on `device`."""
    return _kernel(format, device) is not None and not _given_up_product(format, device)


def _given_up_product(format: Format, device: torch.device) -> bool:
    return (_PRODUCT.format(format.name), device.type) in _given_up


def _kernel(format: Format, device: torch.device) -> Any:
    """The `unpack_triton.Kernel` that unpacks `format` on `device`, None for torch."""
    if _choice == "Torch" or (format.name, device.type) in _given_up:
        return None
    reason = why_not_triton(device.type)
    if reason is not None:
        if _choice == "Triton":
            _say_once(f"Triton cannot unpack here: {reason}. PyTorch's own operations do it.")
        return None
    try:
        return load(format)
    except Exception as error:
        _give_up(format.name, device.type, error)
        return None


def load(format: Format) -> Any:
    """The `unpack_triton.Kernel` of a type, beside the function that unpacks it with torch: `Q4_K` of
    `unpack_triton_k` for one of `unpack_k`. None where there is none. Imports Triton."""
    kind = "" if format.unpack is None else format.unpack.__module__.rpartition(".unpack_")[2]
    return _load(kind, format.name)


@lru_cache(maxsize=256)
def _load(kind: str, name: str) -> Any:
    # Not by the format: of FP8 each scale is one.
    module = f"{__package__}.unpack_triton_{kind}"
    if importlib.util.find_spec(module) is None:
        return None
    return getattr(importlib.import_module(module), name, None)


def _give_up(what: str, device_type: str, error: Exception) -> None:
    _given_up.add((what, device_type))
    _say_once(
        f"Triton cannot unpack {what} here ({_first_line(error)}). PyTorch's own operations do it from now"
        " on, more slowly."
    )


@lru_cache(maxsize=256)
def _say_once(text: str) -> None:
    _listener(text)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
