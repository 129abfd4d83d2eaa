"""Four-bit weights of bitsandbytes (NF4, FP4) as one run of blocks.

bitsandbytes has a weight in two tensors: the nibbles, and for every `blocksize` elements their largest
absolute value, absmax, in fp32. With nested statistics absmax is quantized once more, to bytes. Here the
absmax of every 64 elements lies before their 32 bytes of nibbles, as in a GGML type, so that such a weight is
copied, cut into rows, joined and unpacked as every other. That costs one copy when a weight is loaded, and
nothing of the values: larger blocks repeat their absmax, nested statistics are computed as bitsandbytes does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .formats import FORMATS
from .packed import PackedTensor
from .unpack_bnb import FP4_VALUES, NF4_VALUES

BLOCK_ELEMENTS = 64
STATE_KEY = "quant_state.bitsandbytes__"
"""What the name of the tensor with the JSON of a weight's state begins with, after the weight's own name."""

_MAX_JSON_BYTES = 1 << 16
_VALUES = {"nf4": NF4_VALUES, "fp4": FP4_VALUES}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def pack_blocks(
    nibbles: Tensor,
    absmax: Tensor,
    *,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    quant_map: Tensor,
) -> PackedTensor:
    """The weight of `shape`, on the CPU, with the logical dtype that bitsandbytes unpacks it to.

    nibbles: any dtype and shape, the bytes count. absmax: one number for each `blocksize` elements (the last
    may be fewer). quant_map: the 16 values that a nibble stands for.

    Raises ValueError, with the reason, for what these blocks cannot hold.
    """
    if quant_type not in _VALUES:
        raise ValueError(f"the quantization type is {quant_type!r}; nf4 and fp4 are known")
    if quant_map.shape != (16,) or not torch.equal(
        quant_map.cpu().float(), torch.tensor(_VALUES[quant_type], dtype=torch.float32, device="cpu")
    ):
        raise ValueError(f"its quant_map is not that of {quant_type}")
    if dtype not in _DTYPES.values():
        raise ValueError(f"its dtype is {dtype}; fp16, bf16 and fp32 are known")
    elements = math.prod(shape)
    if elements % BLOCK_ELEMENTS or blocksize <= 0 or blocksize % BLOCK_ELEMENTS:
        raise ValueError(
            f"{elements} elements in blocks of {blocksize} are no whole number of blocks of {BLOCK_ELEMENTS}"
        )
    data = nibbles.cpu().contiguous().view(-1).view(torch.uint8)
    if data.numel() * 2 != elements or absmax.numel() != -(-elements // blocksize):
        raise ValueError(
            f"shape {tuple(shape)} takes {elements // 2} bytes and {-(-elements // blocksize)} scales,"
            f" not {data.numel()} and {absmax.numel()}"
        )
    scales = absmax.cpu().float().view(-1, 1).expand(-1, blocksize // BLOCK_ELEMENTS)
    blocks = torch.empty((elements // BLOCK_ELEMENTS, 36), dtype=torch.uint8, device="cpu")
    blocks.view(torch.float32)[:, 0] = scales.reshape(-1)[: len(blocks)]
    blocks[:, 4:] = data.view(-1, BLOCK_ELEMENTS // 2)
    return PackedTensor(blocks, FORMATS[f"BNB_{quant_type.upper()}"], shape, dtype)


def unnested(
    absmax: Tensor, quant_map: Tensor, nested_absmax: Tensor, nested_blocksize: int, offset: float
) -> Tensor:
    """absmax in fp32 from nested statistics: two fp32 operations a number, as in bitsandbytes.

    absmax: uint8 indices into `quant_map`; nested_absmax: one scale for each `nested_blocksize` of them.

    Raises ValueError when they do not fit each other.
    """
    absmax, nested_absmax = absmax.view(-1), nested_absmax.view(-1).float()
    expected = -(-absmax.numel() // nested_blocksize) if nested_blocksize > 0 else -1
    if absmax.dtype != torch.uint8 or quant_map.numel() != 256 or nested_absmax.numel() != expected:
        raise ValueError(
            f"its nested statistics do not fit each other: {absmax.numel()} of {absmax.dtype} in blocks of"
            f" {nested_blocksize} with {nested_absmax.numel()} scales"
        )
    values = quant_map.view(-1).float().index_select(0, absmax.int())
    scales = nested_absmax.repeat_interleave(nested_blocksize)[: absmax.numel()]
    return values.mul_(scales).add_(offset)


def from_checkpoint(weight: Tensor, state: Mapping[str, Tensor]) -> PackedTensor:
    """The weight that a checkpoint holds quantized.

    state: the tensors that come with it, by what follows its name: `absmax`, `quant_map`, `nested_absmax`,
    `nested_quant_map` and the JSON, `quant_state.bitsandbytes__nf4` or `__fp4`, as bitsandbytes saves them.

    Raises ValueError, with the reason, for a state that is damaged or not supported.
    """
    fields = _fields(state)
    try:
        absmax, quant_map = state["absmax"], state["quant_map"]
        if "nested_absmax" in state:
            absmax = unnested(
                absmax,
                state["nested_quant_map"],
                state["nested_absmax"],
                int(fields["nested_blocksize"]),
                float(fields["nested_offset"]),
            )
        return pack_blocks(
            weight,
            absmax,
            quant_type=str(fields["quant_type"]),
            blocksize=int(fields["blocksize"]),
            shape=[int(size) for size in fields["shape"]],
            dtype=_DTYPES[fields["dtype"]],
            quant_map=quant_map,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"its quantization state lacks or garbles {error}") from error


def _fields(state: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """The JSON of a state."""
    texts = [tensor for name, tensor in state.items() if name.startswith(STATE_KEY)]
    if len(texts) != 1 or texts[0].dtype != torch.uint8 or texts[0].numel() > _MAX_JSON_BYTES:
        raise ValueError("its quantization state is not one short text")
    try:
        fields = json.loads(bytes(texts[0].flatten().tolist()))
    except ValueError as error:
        raise ValueError(f"its quantization state is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("its quantization state is not a JSON object")
    return fields
