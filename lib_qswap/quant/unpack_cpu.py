"""Exact unpacking on a CPU, chunk by chunk, in buffers that a thread keeps for its next tensor of the type.

A chunk's buffers stay in the caches, and its few operations run over long rows. A chunk is first split into
planes, the runs of numbers that the same bits of consecutive bytes hold, one plane after the other:
`ChunkUnpacker.read`. Then every plane is scaled, and the last operation on it writes it to where it belongs.
What an operation of torch costs beyond its memory traffic is the call and each of its views, and each row of
a broadcast: so views are made once where they can be, and never have a third dimension.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .words import BLOCK_GRANULE

# The scales of so many chunks are unpacked at once: they are few numbers for as many calls. torch leaves an
# operation on 32,768 numbers or fewer to one thread; a chunk has 2,048 super-blocks for each.
_CHUNKS_OF_SCALES, _CHUNKS_OF_SCALES_OF_THREADS = 4, 16


class ChunkUnpacker:
    """Unpacks chunks of a fixed number of blocks of one type.

    width: elements of a row of a plane, which share a scale. planes: planes that lie beside each other in the
    result. numbers: fp32 (planes, rows, width) or of the same memory: what `read` writes. signed: whether
    the bytes in `words` are. writes: the dtype of the values that `unpack` writes.
    """

    width: int
    planes: int
    signed = False
    writes = torch.float32

    def __init__(self, words: tuple[int, ...]) -> None:
        """words: shape of the buffer for the numbers as bytes, plane by plane, eight in an int64."""
        self.words = torch.empty(words, dtype=torch.int64)
        self.bytes = self.words.view(-1).view(torch.int8 if self.signed else torch.uint8)
        self.values: Tensor | None = None
        self.make_buffers()

    def make_buffers(self) -> None:
        """What `unpack` needs besides."""
        self.numbers = torch.empty(self.bytes.numel(), dtype=torch.float32)
        self.rows = self.planes_of_numbers()

    def unrounded(self, elements: int) -> Tensor:
        """fp32 (blocks, elements): where values wait to be rounded."""
        if self.values is None:
            self.values = torch.empty((self.bytes.numel() // elements, elements), dtype=torch.float32)
        return self.values

    def planes_of_numbers(self) -> Sequence[Tensor]:
        """`numbers` as a (rows, width) for each plane."""
        return self.numbers.view(self.planes, -1, self.width).unbind(0)

    def planes_of_values(self, values: Tensor) -> Sequence[Tensor]:
        """The same of the result of a chunk."""
        return values.view(-1, self.planes, self.width).unbind(1)

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...] | None:
        """For any number of chunks, fp32: what the planes are multiplied by, (planes, rows, 1).

        Or two: what `numbers`, as one (rows of all planes, width), are multiplied by, given with a dimension
        for the planes before that of the rows, and what is then added to the planes, (planes, rows, 1).
        They may be overwritten by the next call. None: these have to be unpacked in another way.
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


class HalfChunkUnpacker(ChunkUnpacker):
    """Unpacks types with scales and minima into fp16, with one operation for all arithmetic: `scaled_rows`.

    Bytes widened to 16 bits are, read as fp16, subnormal numbers: q * 2**-24.
    """

    writes = torch.float16
    UNIT = 2.0**24
    """What scales have to be multiplied by."""

    def make_buffers(self) -> None:
        widened = torch.empty(self.bytes.numel(), dtype=torch.int16)
        self.planes_of_bytes = self.bytes.view(self.planes, -1, self.width).unbind(0)
        self.planes_of_widened = widened.view(-1, self.planes, self.width).unbind(1)
        self.subnormals = widened.view(torch.float16).view(1, -1, self.width)
        self.variance = torch.ones(self.subnormals.shape[1], dtype=torch.float32)

    def planes_of_values(self, values: Tensor) -> Sequence[Tensor]:
        return (values.view(self.subnormals.shape),)

    def unpack(self, blocks: Tensor, values: Sequence[Tensor], *scales: Tensor) -> None:
        """scales: of the rows as they lie in the result, times UNIT; minima; `means` of the scales; each
        (1, rows)."""
        self.read(blocks)
        for of_bytes, widened in zip(self.planes_of_bytes, self.planes_of_widened, strict=True):
            widened.copy_(of_bytes)
        scale, minimum, mean = (of_rows[0] for of_rows in scales)
        scaled_rows(self.subnormals, scale, minimum, mean, self.variance, values[0])


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


def _unpacker_of(kind: Callable[[int], ChunkUnpacker], chunk: int) -> ChunkUnpacker:
    """The one that this thread used last, where that is of the same kind: the page faults of fresh buffers
    take longer than a chunk does."""
    if type(torch.empty(0)) is not Tensor:  # Somebody traces, with tensors that are none.
        return kind(chunk)
    if getattr(_kept, "key", None) != (kind, chunk):
        _kept.unpacker = _kept.key = None
        _kept.unpacker, _kept.key = kind(chunk), (kind, chunk)
    return _kept.unpacker


def unpack_whole_chunks(
    kind: Callable[[int], ChunkUnpacker], blocks: Tensor, values: Tensor, chunk_elements: int
) -> int:
    """Unpack as many blocks as fill whole chunks, and return their number; fewer, where some cannot be
    unpacked in this way.

    kind: makes the unpacker of chunks of so many blocks, a multiple of BLOCK_GRANULE. blocks: uint8 (n,
    block_bytes), contiguous, 8-byte aligned. values: fp32, fp16 or bf16 (n, block_elements), contiguous.
    """
    elements = values.shape[1]
    chunk = chunk_elements // elements // BLOCK_GRANULE * BLOCK_GRANULE
    chunks = blocks.shape[0] // chunk if chunk else 0
    if not chunks:
        return 0
    unpacker = _unpacker_of(kind, chunk)
    rounded = values.dtype != unpacker.writes
    unrounded = unpacker.unrounded(elements) if rounded else values
    planes = unpacker.planes_of_values(unrounded) if rounded else ()
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
            unpacker.unpack(packed, planes or unpacker.planes_of_values(out), *of_chunk)
            if rounded:
                out.copy_(unrounded)
    return chunks * chunk
