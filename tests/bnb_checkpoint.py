"""Weights as bitsandbytes quantizes and saves them, and what it makes of them again: numpy, by its documented
format alone. Tables of values: as published with QLoRA (appendix E), and as numbers of one sign, two exponent
bits and one mantissa bit."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import torch

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [sign * value for sign in (1, -1) for value in (0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4)]
TABLES = {"nf4": np.array(NF4, np.float32), "fp4": np.array(FP4, np.float32) + np.float32(0)}


class Quantized(NamedTuple):
    """A weight's tensors by what their names end with, the weight's own under ""; and its values in fp32."""

    tensors: dict[str, torch.Tensor]
    values: torch.Tensor

    def under(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors as the state dict of a model has them, for the weight `name`."""
        return {f"{name}.{field}" if field else name: tensor for field, tensor in self.tensors.items()}


def quantized(
    quant_type: str = "nf4",
    shape: tuple[int, int] = (48, 128),
    *,
    blocksize: int = 64,
    nested: bool = False,
    dtype: str = "bfloat16",
    seed: int = 0,
) -> Quantized:
    """Random nibbles and scales; with `nested`, scales that are bytes in blocks of 256 themselves."""
    random = np.random.default_rng(seed)
    elements = shape[0] * shape[1]
    count = -(-elements // blocksize)
    data = random.integers(0, 256, elements // 2, dtype=np.uint8)
    fields = {"quant_type": quant_type, "blocksize": blocksize, "dtype": dtype, "shape": list(shape)}
    tensors = {"": data.reshape(-1, 1), "quant_map": TABLES[quant_type]}
    if nested:
        indices = random.integers(0, 256, count, dtype=np.uint8)
        nested_map = np.sort(random.uniform(-1, 1, 256)).astype(np.float32)
        nested_absmax = random.uniform(0.001, 0.02, -(-count // 256)).astype(np.float32)
        offset = np.float32(0.03)
        absmax = nested_map[indices] * nested_absmax.repeat(256)[:count] + offset
        tensors |= {"absmax": indices, "nested_absmax": nested_absmax, "nested_quant_map": nested_map}
        fields |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    else:
        tensors["absmax"] = absmax = random.uniform(0.001, 0.05, count).astype(np.float32)
    text = np.frombuffer(json.dumps(fields).encode(), np.uint8).copy()
    tensors[f"quant_state.bitsandbytes__{quant_type}"] = text
    nibbles = np.stack((data >> 4, data & 0x0F), -1).reshape(-1)
    values = TABLES[quant_type][nibbles] * absmax.repeat(blocksize)[:elements]
    return Quantized(
        {name: torch.from_numpy(array) for name, array in tensors.items()},
        torch.from_numpy(values.reshape(shape)),
    )
