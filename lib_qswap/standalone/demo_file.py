"""Makes the demonstration model: a Flux-shaped GGUF file of random weights, full in depth and small in width.

No quantizer is needed: any bytes are valid quants, so the blocks are random bytes around scales that give
weights of a standard deviation of about 1 / sqrt(fan-in). Files are reproducible: the bytes come straight
from a bit generator whose stream NumPy guarantees, and depend on the seed and the shape alone.
"""

from __future__ import annotations

import math
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch

from lib_qswap.quant.formats import FORMATS
from lib_qswap.standalone.flux import FluxShape, FluxTransformer

HEAD_DIM = 128
ALIGNMENT = 32
BIAS_STD = 0.02
CHUNK_BLOCKS = 1 << 16
# What the disk must have left once the file is written.
DISK_RESERVE = 256 << 20
# Part of the file's name: files of another recipe are made anew.
RECIPE = 1

UINT32, STRING = 4, 8  # metadata value types of the GGUF specification


class Field(NamedTuple):
    """One field of a block: `nbytes` random bytes, or, where `scale` is not 0, an fp16 number.

    The number is `scale` times the wanted standard deviation of the weights, give or take a fifth.
    """

    nbytes: int
    scale: float = 0.0


def fp16(scale: float) -> Field:
    return Field(2, scale)


# The fields of a block in the order of the GGUF specification, for uniformly random quants. Where a weight is
# d * q with q of standard deviation s, the scale is 1 / s; a minimum is the scale times the mean of q, and of
# the opposite sign, so that the weights' mean is 0. K-quants have a random sub-block scale as well, and
# its root mean square joins s.
BLOCKS: dict[str, tuple[Field, ...]] = {
    "Q4_0": (fp16(1 / 4.61), Field(16)),
    "Q4_1": (fp16(1 / 4.61), fp16(-7.5 / 4.61), Field(16)),
    "Q5_0": (fp16(1 / 9.23), Field(4), Field(16)),
    "Q5_1": (fp16(1 / 9.23), fp16(-15.5 / 9.23), Field(4), Field(16)),
    "Q8_0": (fp16(1 / 73.9), Field(32)),
    "Q2_K": (Field(16), Field(64), fp16(1 / 13.7), fp16(1.5 / 13.7)),
    "Q3_K": (Field(32), Field(64), Field(12), fp16(1 / 42.4)),
    "Q4_K": (fp16(1 / 258), fp16(7.5 / 258), Field(12), Field(128)),
    "Q5_K": (fp16(1 / 523), fp16(15.5 / 523), Field(12), Field(32), Field(128)),
    "Q6_K": (Field(128), Field(64), Field(16), fp16(1 / 1366)),
    "IQ4_NL": (fp16(1 / 67.7), Field(16)),
    "IQ4_XS": (fp16(1 / 1257), Field(2), Field(4), Field(128)),
}
# Plain numbers are drawn as such.
PLAIN = "F16"
QUANTS = (*BLOCKS, PLAIN)


class DemoTensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    format_name: str
    offset: int  # bytes from the start of the tensor data
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def cache_folder() -> Path:
    """$QSWAP_CACHE, or this platform's folder for what a program can make again."""
    if chosen := os.environ.get("QSWAP_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "qswap"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qswap"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qswap"


def demo_file(
    quant: str,
    *,
    hidden: int = 768,
    on_progress: Callable[[float], None] | None = None,
    folder: Path | None = None,
) -> Path:
    """The demonstration model of this quantization type in the cache folder, made there if need be.

    Args and errors are `make_demo_file`'s.
    """
    path = (folder or cache_folder()) / f"flux-demo-{quant}-{hidden}-v{RECIPE}.gguf"
    if not path.is_file():
        make_demo_file(path, quant, hidden=hidden, on_progress=on_progress)
    return path


def make_demo_file(
    path: Path,
    quant: str,
    *,
    hidden: int = 768,
    double: int = 19,
    single: int = 38,
    seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> None:
    """Writes a Flux-shaped GGUF file; a file of that name appears whole or not at all.

    Args:
        quant: the GGML type of the blocks' weights, one of `QUANTS`.
        hidden: width in channels, a multiple of 256 (a super-block of the K types).
        double, single: number of double-stream and of single-stream blocks.
        on_progress: called with the share that is written, 0 to 1.

    Raises:
        ValueError: a type or a width that cannot be made.
        OSError: the disk is too full, or cannot be written.
    """
    if quant not in QUANTS:
        raise ValueError(f"no demo model of type {quant}; choose one of {', '.join(QUANTS)}")
    if hidden <= 0 or hidden % 256:
        raise ValueError(f"the demo model's width must be a multiple of 256, not {hidden}")
    tensors = layout(quant, hidden=hidden, double=double, single=single)
    header = gguf_header(tensors, f"QSwap demo {quant} {hidden}")
    data_bytes = tensors[-1].offset + padded(tensors[-1].nbytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < len(header) + data_bytes + DISK_RESERVE:
        raise OSError(
            f"the demo model needs {data_bytes / 1e6:.0f} MB and {path.parent} has {free / 1e6:.0f} MB left; "
            "make room there, or set QSWAP_CACHE to another folder"
        )
    descriptor, unfinished = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(header)
            write_data(file, tensors, seed, on_progress or (lambda share: None))
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def layout(quant: str, *, hidden: int, double: int, single: int) -> list[DemoTensor]:
    """Name, type and place of every tensor: block weights quantized, other matrices F16, vectors F32."""
    shape = FluxShape(
        hidden=hidden, head_dim=HEAD_DIM, mlp=4 * hidden, double_blocks=double, single_blocks=single
    )
    with torch.device("meta"):
        parameters = FluxTransformer(shape).state_dict()
    tensors, offset = [], 0
    for name, parameter in parameters.items():
        if parameter.ndim != 2:
            format_name = "F32"
        elif name.startswith(("double_blocks.", "single_blocks.")):
            format_name = quant
        else:
            format_name = "F16"
        nbytes = FORMATS[format_name].packed_bytes(parameter.numel())
        tensors.append(DemoTensor(name, tuple(parameter.shape), format_name, offset, nbytes))
        offset += padded(nbytes)
    return tensors


def padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def gguf_header(tensors: list[DemoTensor], model_name: str) -> bytes:
    """Everything before the tensor data, as the GGUF specification (version 3) lays it out."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return struct.pack("<Q", len(raw)) + raw

    metadata = [
        text("general.architecture") + struct.pack("<I", STRING) + text("flux"),
        text("general.name") + struct.pack("<I", STRING) + text(model_name),
        text("general.alignment") + struct.pack("<II", UINT32, ALIGNMENT),
        text("general.quantization_version") + struct.pack("<II", UINT32, 2),
    ]
    infos = [
        text(tensor.name)
        + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        + struct.pack("<IQ", FORMATS[tensor.format_name].ggml_id, tensor.offset)
        for tensor in tensors
    ]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + b"".join(metadata + infos)
    return header.ljust(padded(len(header)), b"\0")


def write_data(
    file: IO[bytes], tensors: list[DemoTensor], seed: int, on_progress: Callable[[float], None]
) -> None:
    total = tensors[-1].offset + padded(tensors[-1].nbytes)
    for index, tensor in enumerate(tensors):
        # A stream of its own for each tensor: a shallower model's weights are the same as far as they go.
        bits = np.random.PCG64([seed, index])
        for chunk in tensor_chunks(tensor, bits):
            file.write(chunk.tobytes())
        file.write(bytes(padded(tensor.nbytes) - tensor.nbytes))
        on_progress((tensor.offset + padded(tensor.nbytes)) / total)


def tensor_chunks(tensor: DemoTensor, bits: np.random.PCG64) -> Iterator[np.ndarray]:
    if tensor.name.endswith(".bias"):
        yield uniform(bits, tensor.elements, BIAS_STD).astype("<f4")
    elif tensor.name.endswith(".scale"):
        yield (1 + uniform(bits, tensor.elements, BIAS_STD)).astype("<f4")
    else:
        std = 1 / math.sqrt(tensor.shape[-1])
        blocks = tensor.elements // FORMATS[tensor.format_name].block_elements
        for start in range(0, blocks, CHUNK_BLOCKS):
            count = min(CHUNK_BLOCKS, blocks - start)
            if tensor.format_name == PLAIN:
                yield uniform(bits, count, std).astype("<f2")
            else:
                yield random_blocks(bits, count, tensor.format_name, std)


def random_bytes(bits: np.random.PCG64, count: int) -> np.ndarray:
    return bits.random_raw(-(-count // 8)).astype("<u8", copy=False).view(np.uint8)[:count]


def uniform(bits: np.random.PCG64, count: int, std: float) -> np.ndarray:
    """fp32 numbers of mean 0 and this standard deviation, from 16 random bits each."""
    steps = random_bytes(bits, 2 * count).view("<u2").astype(np.float32)
    return (steps / 65535 - 0.5) * (math.sqrt(12) * std)


def quantized_weight(quant: str, shape: tuple[int, int], *, seed: int = 0) -> torch.Tensor:
    """The packed bytes of one random weight, uint8 (rows, bytes per row), for measurements without a file."""
    blocks = shape[0] * shape[1] // FORMATS[quant].block_elements
    packed = random_blocks(np.random.PCG64(seed), blocks, quant, 1 / math.sqrt(shape[1]))
    return torch.from_numpy(packed).view(shape[0], -1)


def random_blocks(bits: np.random.PCG64, count: int, quant: str, std: float) -> np.ndarray:
    """(count, bytes per block): random quants between scales that give weights of this standard deviation."""
    fields = BLOCKS[quant]
    block_bytes = sum(field.nbytes for field in fields)
    blocks = random_bytes(bits, count * block_bytes).reshape(count, block_bytes)
    jitter = 0.8 + 0.4 / 255 * random_bytes(bits, count).astype(np.float32)
    start = 0
    for field in fields:
        if field.scale:
            scale = (jitter * (field.scale * std)).astype("<f2")
            blocks[:, start : start + 2] = scale.view(np.uint8).reshape(count, 2)
        start += field.nbytes
    return blocks
