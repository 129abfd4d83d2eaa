"""Exact unpacking on a CPU, chunk by chunk, in buffers that are allocated once for a tensor.

A chunk's buffers stay in the caches, and its few operations run over long rows. A chunk is first split into
planes, the runs of numbers that the same bits of consecutive bytes hold, one plane after the other:
`ChunkUnpacker.read`. Then every plane is scaled, and the last operation on it writes it to where it belongs.
What an operation of torch costs beyond its memory traffic is the call and each of its views, and each row of
a broadcast: so views are made once where they can be, and never have a third dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .words import BLOCK_GRANULE

# The scales of so many chunks are unpacked at once: they are few numbers for as many calls.
_CHUNKS_OF_SCALES = 8


class ChunkUnpacker:
    """Unpacks chunks of a fixed number of blocks of one type.

    width: elements of a row of a plane, which share a scale. planes: planes that lie beside each other in the
    result. numbers: fp32 (planes, rows, width) or of the same memory: what `read` writes. signed: whether
    the bytes in `words` are.
    """

    width: int
    planes: int
    signed = False

    def __init__(self, words: tuple[int, ...]) -> None:
        """words: shape of the buffer for the numbers as bytes, plane by plane, eight in an int64."""
        self.words = torch.empty(words, dtype=torch.int64)
        self.bytes = self.words.view(-1).view(torch.int8 if self.signed else torch.uint8)
        self.numbers = torch.empty(self.bytes.numel(), dtype=torch.float32)
        self.rows = self.planes_of_numbers()

    def planes_of_numbers(self) -> Sequence[Tensor]:
        """`numbers` as a (rows, width) for each plane."""
        return self.numbers.view(self.planes, -1, self.width).unbind(0)

    def planes_of_values(self, values: Tensor) -> Sequence[Tensor]:
        """The same of the result of a chunk."""
        return values.view(-1, self.planes, self.width).unbind(1)

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...]:
        """For any number of chunks, fp32: what the planes are multiplied by, (planes, rows, 1).

        Or two: what `numbers`, as one (rows of all planes, width), are multiplied by, given with a dimension
        for the planes before that of the rows, and what is then added to the planes, (planes, rows, 1).
        They may be overwritten by the next call.
        """
        raise NotImplementedError

    def read(self, blocks: Tensor) -> None:
        """Split a chunk's numbers into `words`, a byte each."""
        raise NotImplementedError

    def unpack(self, blocks: Tensor, values: Sequence[Tensor], *scales: Tensor) -> None:
        """A chunk into planes of fp32 values."""
        self.read(blocks)
        self.numbers.copy_(self.bytes)
        if len(scales) == 1:
            for numbers, scale, plane in zip(self.rows, scales[0].unbind(0), values, strict=True):
                torch.mul(numbers, scale, out=plane)
            return
        scale, minima = scales
        self.numbers.view(scale.shape[0], scale.shape[1], self.width).mul_(scale)
        for numbers, minimum, plane in zip(self.rows, minima.unbind(0), values, strict=True):
            torch.add(numbers, minimum, out=plane)


def unpack_whole_chunks(
    kind: Callable[[int], ChunkUnpacker], blocks: Tensor, values: Tensor, chunk_elements: int
) -> int:
    """Unpack as many blocks as fill whole chunks, and return their number.

    kind: makes the unpacker of chunks of so many blocks, a multiple of BLOCK_GRANULE. blocks: uint8 (n,
    block_bytes), contiguous, 8-byte aligned. values: fp32, fp16 or bf16 (n, block_elements), contiguous.
    """
    elements = values.shape[1]
    chunk = chunk_elements // elements // BLOCK_GRANULE * BLOCK_GRANULE
    chunks = blocks.shape[0] // chunk if chunk else 0
    if not chunks:
        return 0
    unpacker = kind(chunk)
    rounded = values.dtype != torch.float32
    unrounded = torch.empty((chunk, elements), dtype=torch.float32) if rounded else values
    planes = unpacker.planes_of_values(unrounded) if rounded else ()
    for first in range(0, chunks, _CHUNKS_OF_SCALES):
        count = min(_CHUNKS_OF_SCALES, chunks - first)
        several = slice(first * chunk, (first + count) * chunk)
        scales = unpacker.scales(blocks[several])
        of_chunks = [scale.split(scale.shape[1] // count, 1) for scale in scales]
        for packed, out, *of_chunk in zip(
            blocks[several].split(chunk), values[several].split(chunk), *of_chunks, strict=True
        ):
            unpacker.unpack(packed, planes or unpacker.planes_of_values(out), *of_chunk)
            if rounded:
                out.copy_(unrounded)
    return chunks * chunk
