"""Exact unpacking on a CPU, chunk by chunk, in buffers that a thread keeps for its next tensor of the type.

A chunk's buffers stay in the caches, and its few operations run over long rows. A chunk is first split into
planes, the runs of numbers that the same bits of consecutive bytes hold, one plane after the other:
`ChunkUnpacker.read`. Then each plane is widened, scaled in place and rounded to where it belongs, in a buffer
that is the next one's too. torch gives every thread its own part of an operation's elements: with a plane at
a time a thread's part is the same in each operation, and in the cache next to its core.
What an operation of torch costs beyond its memory traffic is the call and each of its views, and each row of
a broadcast: so views are made once where they can be, and never have a third dimension.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from .words import BLOCK_GRANULE, is_tracing

# The scales of chunks with so many elements are unpacked at once: they are few numbers for as many calls.
# torch leaves an operation on 32,768 numbers or fewer to one thread: here it is on 65,536 super-blocks.
_SCALED_AT_ONCE, _SCALED_AT_ONCE_OF_THREADS = 1 << 21, 1 << 24


class ChunkUnpacker:
    """Unpacks chunks of a fixed number of blocks of one type.

    planes: planes that lie beside each other in the result. width: elements of a plane that lie together
    there, a row of it. parts: that a chunk is scaled in, one after the other, once it is read.
    """

    width: int
    planes: int
    parts: int
    signed = False

    def __init__(self, words: tuple[int, ...]) -> None:
        """For numbers that are bytes in a buffer, plane by plane. words: its shape in int64."""
        self.words = torch.empty(words, dtype=torch.int64)
        self.planes_of_words = self.words.view(self.planes, -1).unbind(0)
        of_bytes = self.words.view(-1).view(torch.int8 if self.signed else torch.uint8)
        self.parts_of_bytes = of_bytes.view(self.planes, self.parts, -1).unbind(1)
        self.make_buffers()

    def make_buffers(self) -> None:
        """What `unpack` needs besides."""
        self.use_numbers(self.parts_of_bytes[0].shape[1])

    def use_numbers(self, count: int) -> None:
        """The buffer for a part of a plane in fp32."""
        self.numbers = torch.empty(count, dtype=torch.float32)
        self.rows = self.numbers.view(-1, self.width)

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...] | None:
        """For any number of chunks, fp32 (planes, groups, 1): what the groups of numbers of each plane are
        multiplied by, and, where there is a second one, what is then added to them.

        They may be overwritten by the next call. None: these have to be unpacked in another way.
        """
        raise NotImplementedError

    def read(self, blocks: Tensor) -> Sequence[Tensor]:
        """A chunk's numbers, part by part, each (planes, n): mostly `parts_of_bytes`, signed or not."""
        raise NotImplementedError

    def unpack(self, part: Tensor, values: Tensor, *scales: Tensor) -> None:
        """A part, from `read`, into its values, of any dtype."""
        planes = values.view(-1, self.planes, self.width).unbind(1)
        of_planes = zip(*(scale.unbind(0) for scale in scales), strict=True)
        for of_plane, plane, scales_of_plane in zip(part.unbind(0), planes, of_planes, strict=True):
            self.widen(of_plane)
            # In place: a second buffer as large would drive this one out of the cache next to the core.
            for operation, scale in zip((Tensor.mul_, Tensor.add_), scales_of_plane, strict=False):
                operation(self.groups(scale.shape[0]), scale)
            plane.copy_(self.rows)

    def groups(self, count: int) -> Tensor:
        """`numbers` in rows that have one scale each."""
        return self.numbers.view(count, -1)

    def widen(self, of_plane: Tensor) -> None:
        """What `read` returns for a part of a plane, into `numbers`."""
        self.numbers.copy_(of_plane)


class Kind(Protocol):
    """A subclass of `ChunkUnpacker`."""

    parts: int

    def __call__(self, blocks: int) -> ChunkUnpacker:
        """blocks: of a chunk, a multiple of BLOCK_GRANULE for each part."""


class HalfChunkUnpacker(ChunkUnpacker):
    """Unpacks types with scales and minima into fp16, with one operation for all arithmetic: `scaled_rows`.

    Bytes widened to 16 bits are, read as fp16, subnormal numbers: q * 2**-24.
    """

    parts = 1
    rows_of_bytes: Sequence[Tensor] = ()
    planes_of_widened: Sequence[Tensor] = ()
    scaled_width: int | None = None
    """How many elements that lie together have one scale; None: a row of a plane."""
    UNIT = 2.0**24
    """What scales have to be multiplied by."""

    def make_buffers(self) -> None:
        (of_bytes,) = self.parts_of_bytes
        widened = torch.empty(of_bytes.numel(), dtype=torch.int16)
        self.rows_of_bytes = of_bytes.view(self.planes, -1, self.width).unbind(0)
        self.planes_of_widened = widened.view(-1, self.planes, self.width).unbind(1)
        self.use_widened(widened)

    def use_widened(self, widened: Tensor) -> None:
        """int16, of all numbers in order."""
        self.subnormals = widened.view(torch.float16).view(1, -1, self.scaled_width or self.width)
        self.variance = torch.ones(self.subnormals.shape[1], dtype=torch.float32)

    def unpack(self, part: Tensor, values: Tensor, *scales: Tensor) -> None:
        """values: fp16. scales: in the order of the result, times UNIT; minima; `means` of the scales; each
        (1, groups)."""
        for of_plane, widened in zip(self.rows_of_bytes, self.planes_of_widened, strict=True):
            widened.copy_(of_plane)
        scale, minimum, mean = (of_rows[0] for of_rows in scales)
        out = values.view(self.subnormals.shape)
        scaled_rows(self.subnormals, scale, minimum, mean, self.variance, out)


def column(blocks: Tensor, number: int) -> Tensor:
    """One of every block's fp16 numbers, fp32 (n,): copied first, to be converted in one run."""
    return blocks.view(torch.int16)[:, number].contiguous().view(torch.float16).float()


_NO_STATISTICS = torch.empty(0, dtype=torch.float32, device="cpu")


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
    if is_tracing():
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
    elements, granule = values.shape[1], BLOCK_GRANULE * kind.parts
    chunk = chunk_elements // elements // granule * granule
    chunks = blocks.shape[0] // chunk if chunk else 0
    if not chunks:
        return 0
    unpacker, of_part = _unpacker_of(kind, chunk), chunk // kind.parts
    scaled = _SCALED_AT_ONCE if torch.get_num_threads() == 1 else _SCALED_AT_ONCE_OF_THREADS
    at_once = -(-scaled // (chunk * elements))
    for first in range(0, chunks, at_once):
        count = min(at_once, chunks - first)
        several = slice(first * chunk, (first + count) * chunk)
        scales = unpacker.scales(blocks[several])
        if scales is None:
            return first * chunk
        scales_of_parts = [scale.split(scale.shape[1] // (count * kind.parts), 1) for scale in scales]
        outs = zip(values[several].split(of_part), *scales_of_parts, strict=False)
        for packed in blocks[several].split(chunk):
            # Takes an output only where there is a part for it.
            for part, (out, *own_scales) in zip(unpacker.read(packed), outs, strict=False):
                unpacker.unpack(part, out, *own_scales)
    return chunks * chunk
