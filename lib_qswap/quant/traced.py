"""Unpacking as one operation of torch's, for graphs: `torch.compile` traces tensors that have no bytes yet.

It is registered when something is traced for the first time. (Compiled with its own default backend, a graph
needs a C++ compiler or Triton, as all of `torch.compile` does.)
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import unpack as of_bytes
from .formats import Format, scaled


def is_traced(packed: Tensor) -> bool:
    """Whether `packed` stands for bytes that come when a graph runs."""
    return type(packed) is not Tensor and type(packed) is not torch.nn.Parameter


def is_pinned(packed: Tensor) -> bool:
    """Whether the bytes are page-locked; nobody can say of what is traced."""
    return not is_traced(packed) and packed.is_pinned()


def unpack(
    format: Format,
    packed: Tensor,
    out: Tensor,
    *,
    arithmetic: of_bytes.Arithmetic = "exact",
    computation_dtype: torch.dtype | None = None,
) -> None:
    """As `unpack.unpack`, for tensors that are traced."""
    dtype = computation_dtype or torch.float16
    _operation()(packed, out, format.name, format.scale, arithmetic, dtype)


@lru_cache(maxsize=1)
def _operation() -> Any:
    library = torch.library.Library("qswap", "FRAGMENT")
    library.define(
        "unpack(Tensor packed, Tensor(a!) out, str format, float scale, str arithmetic, ScalarType dtype)"
        " -> ()"
    )
    library.impl("unpack", _unpack, "CompositeExplicitAutograd")
    library.impl("unpack", lambda *_arguments: None, "Meta")
    _libraries.append(library)  # What it has defined goes with it.
    return torch.ops.qswap.unpack.default


_libraries: list[torch.library.Library] = []


def _unpack(
    packed: Tensor, out: Tensor, format: str, scale: float, arithmetic: Any, dtype: torch.dtype
) -> None:
    of_bytes.unpack(scaled(format, scale), packed, out, arithmetic=arithmetic, computation_dtype=dtype)
