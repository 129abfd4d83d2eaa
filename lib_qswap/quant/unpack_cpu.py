"""Exact unpacking on a CPU, chunk by chunk, in buffers that a thread keeps for its next tensor of the type.

A chunk's buffers stay in the caches, and its few operations run over long rows. A chunk is first split into
planes, the runs of numbers that the same bits of consecutive bytes hold, one plane after the other:
`ChunkUnpacker.read`. Then all planes are scaled where they are, and the last operation on each rounds it to
where it belongs.
What an operation of torch costs beyond its memory traffic is the call and each of its views, and each row of
a broadcast: so views are made once where they can be, and never have a third dimension.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from .words import BLOCK_GRANULE

# The scales of so many chunks are unpacked at once: they are few numbers for as many calls. torch leaves an
# operation on 32,768 numbers or fewer to one thread; a chunk has 2,048 super-blocks or fewer for each.
_CHUNKS_OF_SCALES, _CHUNKS_OF_SCALES_OF_THREADS = 4, 16


class ChunkUnpacker:
    """Unpacks chunks of a fixed number of blocks of one type.

    planes: planes that lie beside each other in the result. width: elements of a plane that lie together
    there, a row of it. numbers: fp32, (planes, rows, width) in one dimension: the bytes of `words`, whether
    signed or not, which then become values.
    """

    width: int
    planes: int
    signed = False
    chunk_divisor = 2
    """So many times smaller are the chunks than those of what computes without `numbers`."""

    def __init__(self, words: tuple[int, ...]) -> None:
        """words: shape of the buffer for the numbers as bytes, plane by plane, eight in an int64."""
        self.words = torch.empty(words, dtype=torch.int64)
        self.bytes = self.words.view(-1).view(torch.int8 if self.signed else torch.uint8)
        self.make_buffers()

    def make_buffers(self) -> None:
        """What `unpack` needs besides."""
        self.numbers = torch.empty(self.bytes.numel(), dtype=torch.float32)
        self.planes_of_numbers = self.numbers.view(self.planes, -1, self.width).unbind(0)

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...] | None:
        """For any number of chunks, fp32 (planes, groups, 1): what the groups of numbers of each plane are
        multiplied by, and, where there is a second one, what is then added to them.

        They may be overwritten by the next call. None: these have to be unpacked in another way.
        """
        raise NotImplementedError

    def read(self, blocks: Tensor) -> Tensor:
        """A chunk's numbers, a byte each, plane by plane: mostly `bytes`."""
        raise NotImplementedError

    def unpack(self, blocks: Tensor, values: Tensor, *scales: Tensor) -> None:
        """A chunk into its values, of any dtype."""
        self.numbers.copy_(self.read(blocks))
        # In place: a second buffer as large would drive this one out of the cache next to the core.
        for operation, scale in zip((Tensor.mul_, Tensor.add_), scales, strict=False):
            operation(self.numbers.view(scale.shape[0], scale.shape[1], -1), scale)
        planes = values.view(-1, self.planes, self.width).unbind(1)
        for numbers, plane in zip(self.planes_of_numbers, planes, strict=True):
            plane.copy_(numbers)


class Kind(Protocol):
    """A subclass of `ChunkUnpacker`."""

    chunk_divisor: int

    def __call__(self, blocks: int) -> ChunkUnpacker:
        """blocks: of a chunk, a multiple of BLOCK_GRANULE."""


class HalfChunkUnpacker(ChunkUnpacker):
    """Unpacks types with scales and minima into fp16, with one operation for all arithmetic: `scaled_rows`.

    Bytes widened to 16 bits are, read as fp16, subnormal numbers: q * 2**-24.
    """

    chunk_divisor = 1
    UNIT = 2.0**24
    """What scales have to be multiplied by."""

    def make_buffers(self) -> None:
        widened = torch.empty(self.bytes.numel(), dtype=torch.int16)
        self.planes_of_bytes = self.bytes.view(self.planes, -1, self.width).unbind(0)
        self.planes_of_widened = widened.view(-1, self.planes, self.width).unbind(1)
        self.subnormals = widened.view(torch.float16).view(1, -1, self.width)
        self.variance = torch.ones(self.subnormals.shape[1], dtype=torch.float32)

    def unpack(self, blocks: Tensor, values: Tensor, *scales: Tensor) -> None:
        """values: fp16. scales: of the rows as they lie in the result, times UNIT; minima; `means` of the
        scales; each (1, rows)."""
        self.read(blocks)
        for of_bytes, widened in zip(self.planes_of_bytes, self.planes_of_widened, strict=True):
            widened.copy_(of_bytes)
        scale, minimum, mean = (of_rows[0] for of_rows in scales)
        out = values.view(self.subnormals.shape)
        scaled_rows(self.subnormals, scale, minimum, mean, self.variance, out)


_NO_STATISTICS = torch.empty(0, dtype=torch.float32)


def scaled_rows(
    rows: Tensor, scale: Tensor, offset: Tensor, mean: Tensor, variance: Tensor, out: Tensor
) -> None:
    """fp16 (1, n, m) rows times fp32 (n,) scales plus fp32 (n,) offsets, rounded once.

    It is what torch normalizes a batch of n channels with, given their means (zero, see `means`) and their
    variances (one). It may fuse the product with the sum: the product has to be exact in fp32.
    """
    torch.native_batch_norm(
        rows, scale, offset, mean, variance, False, 0.0, 0.0, out=(out, _NO_STATISTICS, _NO_STATISTICS)
    )


def means(scale: Tensor, out: Tensor) -> None:
    """The means for `scaled_rows`: their products with the scales are taken off the offsets, and take nothing
    off, not even the sign of a zero, where they are zeros with the signs of the scales."""
    torch.mul(scale, 0.0, out=out)


@lru_cache(maxsize=1)
def can_scale_rows() -> bool:
    """Whether `scaled_rows` does here what it says: torch does not promise it for every CPU."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 256, (1, 64, 32), dtype=torch.int16, generator=generator)
    scale, offset = torch.randn((2, 64), generator=generator).half().float().unbind(0)
    offset[::3] = -0.0
    mean, variance = torch.ones((2, 64), dtype=torch.float32).unbind(0)
    out = torch.empty((1, 64, 32), dtype=torch.float16)
    unit = HalfChunkUnpacker.UNIT
    means(scale, mean)
    try:
        scaled_rows(numbers.view(torch.float16), scale * unit, offset, mean, variance, out)
    except (RuntimeError, TypeError):
        return False
    expected = (numbers.float() * scale[:, None] + offset[:, None]).half()
    return torch.equal(out.view(torch.int16), expected.view(torch.int16))


_kept = threading.local()


def _unpacker_of(kind: Kind, chunk: int) -> ChunkUnpacker:
    """The one that this thread used last, where that is of the same kind: the page faults of fresh buffers
    take longer than a chunk does."""
    if type(torch.empty(0)) is not Tensor:  # Somebody traces, with tensors that are none.
        return kind(chunk)
    if getattr(_kept, "key", None) != (kind, chunk):
        _kept.unpacker = _kept.key = None
        _kept.unpacker, _kept.key = kind(chunk), (kind, chunk)
    return _kept.unpacker


def unpack_whole_chunks(kind: Kind, blocks: Tensor, values: Tensor, chunk_elements: int) -> int:
    """Unpack as many blocks as fill whole chunks, and return their number; fewer, where some cannot be
    unpacked in this way.

    blocks: uint8 (n, block_bytes), contiguous, 8-byte aligned. values: fp32, fp16 or bf16 (n,
    block_elements), contiguous.
    """
    elements = values.shape[1]
    chunk = chunk_elements // elements // BLOCK_GRANULE * BLOCK_GRANULE
    chunks = blocks.shape[0] // chunk if chunk else 0
    if not chunks:
        return 0
    unpacker = _unpacker_of(kind, chunk)
    at_once = _CHUNKS_OF_SCALES if torch.get_num_threads() == 1 else _CHUNKS_OF_SCALES_OF_THREADS
    for first in range(0, chunks, at_once):
        count = min(at_once, chunks - first)
        several = slice(first * chunk, (first + count) * chunk)
        scales = unpacker.scales(blocks[several])
        if scales is None:
            return first * chunk
        of_chunks = [scale.split(scale.shape[1] // count, 1) for scale in scales]
        for packed, out, *of_chunk in zip(
            blocks[several].split(chunk), values[several].split(chunk), *of_chunks, strict=True
        ):
            unpacker.unpack(packed, out, *of_chunk)
    return chunks * chunk
