"""One or two inputs times a packed weight, for the types that most weights have, faster than what
`multiply_triton` makes of every type's numbers.

A GPU with fast memory can issue five or six instructions in the time in which it reads a weight of four bits.
So every thread has 32 elements of a block for itself, in four runs of eight: their bytes stay in the words
that they were loaded in, numbers and inputs meet in registers, and nothing goes from thread to thread before
the end. A few rows share the inputs, which are converted and added up once for all of them.

Integers are converted to fp32 at a fraction of the rate of other instructions. Where inputs are in half
precision, numbers below 2^b are placed in the mantissa of 2^b instead, which makes them 2^b + the number, and
sums begin with as much less. They are a few times less accurate then, as far as fp32 goes. b is odd: 2^b then
has no bit in the byte of its mantissa that numbers are placed in. Others are placed in the mantissa of 2^15,
which is subtracted from each: exact, with one instruction more.

A type has one function, `Name(packed, block, part, UP)`: packed are pointers (threads,) to the first byte of
a row, block (threads,) the number of a block in it, part (threads,) which 32 elements of the block. It
returns eight words, uint32 (threads,), whose bytes are the numbers of the four runs, two words each, from bit
UP of the byte on; as many scales as `Lanes.groups`, and as many offsets, fp32 (threads,). A value is number *
scale - offset. Layouts: `unpack_k`, `unpack_legacy`.

Offsets are multiplied by sums of inputs, so that an infinite input makes all results NaN that depend on it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from .unpack_triton import compiled, half, on_device, signed, store

if TYPE_CHECKING:
    from .formats import Format

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
_OLDEST = (3, 3)  # that passes tuples on from one jitted function to another
_WARPS = 2
_MANY_ROWS = 8192
_EVERY_BYTE = tl.constexpr(0x01010101)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_EMULATED = tl.constexpr(_INTERPRETED)
WORDS: Any = None  # of `Lanes`, in the globals that `_launch` makes
START: Any = None


@triton.jit
def _four(words):
    """(threads, 4) -> four of (threads,)"""
    even, odd = tl.split(tl.reshape(words, (words.shape[0], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _byte(word, POSITION: tl.constexpr):
    return ((word >> (8 * POSITION)) & 255).to(tl.float32)


@triton.jit
def _bits(word, FROM: tl.constexpr, TO: tl.constexpr, MASK: tl.constexpr):
    """Of every byte the bits from FROM on, as many as MASK has, from bit TO on."""
    moved = word >> (FROM - TO) if FROM > TO else word << (TO - FROM)
    return moved & ((MASK << TO) * _EVERY_BYTE)


@triton.jit
def _nibbles(a, b, c, d, UP: tl.constexpr):
    """The low nibbles of four words, then the high ones."""
    return (
        _bits(a, 0, UP, 15), _bits(b, 0, UP, 15), _bits(c, 0, UP, 15), _bits(d, 0, UP, 15),
        _bits(a, 4, UP, 15), _bits(b, 4, UP, 15), _bits(c, 4, UP, 15), _bits(d, 4, UP, 15),
    )  # fmt: skip


@triton.jit
def _as_half(bits):
    """uint32 with fp16 in its lower half -> fp32"""
    return half((bits & 0xFFFF).to(tl.uint16), tl.float32)


@triton.jit
def _word(halves):
    """uint32 (threads,): four bytes at an even address, from pointers to uint16."""
    return tl.load(halves).to(tl.uint32) | (tl.load(halves + 1).to(tl.uint32) << 16)


# ------------------------------------------------------------------------------------------------ K types
@triton.jit
def _from_chunks(part):
    # A chunk has 32 bytes: their low nibbles are one group, the high ones the next. A part is half of it.
    return part // 2 * 64 + part % 2 * 16


@triton.jit
def _two_groups(start, part):
    """Scales and minima of the two groups of a part: Q4_K's and Q5_K's."""
    # One load of 16 bytes: small ones would each be looked up in the cache for as many lines as the weights.
    header = start.to(tl.pointer_type(tl.uint32))
    both, first, second, rest = _four(tl.load(header[:, None] + tl.arange(0, 4)[None, :]))
    d, least = _as_half(both), _as_half(both >> 16)
    shift = (part // 2 % 2 * 16).to(tl.uint32)
    first, second, rest = first >> shift, second >> shift, rest >> shift
    late = part >= 4
    scales = tl.where(late, (rest & 0x0F0F) | ((first >> 2) & 0x3030), first & 0x3F3F)
    minima = tl.where(late, ((rest >> 4) & 0x0F0F) | ((second >> 2) & 0x3030), second & 0x3F3F)
    scales = _byte(scales, 0) * d, _byte(scales, 1) * d
    return scales, (_byte(minima, 0) * least, _byte(minima, 1) * least)


@triton.jit
def Q4_K(packed, block, part, UP: tl.constexpr):
    start = packed + block * 144
    words = (start + 16 + part * 16).to(tl.pointer_type(tl.uint32))
    a, b, c, d = _four(tl.load(words[:, None] + tl.arange(0, 4)[None, :]))
    scales, minima = _two_groups(start, part)
    return _nibbles(a, b, c, d, UP), scales, minima


@triton.jit
def _fifth(word, high, UP: tl.constexpr):
    """A word's low and high nibbles, with the lowest two bits of every byte of high above them."""
    low = _bits(word, 0, UP, 15) | _bits(high, 0, UP + 4, 1)
    return low, _bits(word, 4, UP, 15) | _bits(high, 1, UP + 4, 1)


@triton.jit
def Q5_K(packed, block, part, UP: tl.constexpr):
    start = packed + block * 176
    words = (start + 48 + part * 16).to(tl.pointer_type(tl.uint32))
    a, b, c, d = _four(tl.load(words[:, None] + tl.arange(0, 4)[None, :]))
    high = (start + 16 + part % 2 * 16).to(tl.pointer_type(tl.uint32))
    high = tl.load(high[:, None] + tl.arange(0, 4)[None, :])
    w, x, y, z = _four(high >> (part // 2 * 2)[:, None].to(tl.uint32))
    a, e = _fifth(a, w, UP)
    b, f = _fifth(b, x, UP)
    c, g = _fifth(c, y, UP)
    d, h = _fifth(d, z, UP)
    scales, minima = _two_groups(start, part)
    return (a, b, c, d, e, f, g, h), scales, minima


@triton.jit
def _from_halves(part):
    # A half has four runs of 32 elements; a part is eight of each.
    return part // 4 * 128 + part % 4 * 8


@triton.jit
def _sixth(word, LOW: tl.constexpr, high, HIGH: tl.constexpr, UP: tl.constexpr):
    """Nibbles of a word, from bit LOW on, with two bits of every byte of high, from bit HIGH on, above."""
    return _bits(word, LOW, UP, 15) | _bits(high, HIGH, UP + 4, 3)


@triton.jit
def Q6_K(packed, block, part, UP: tl.constexpr):
    start = packed + block * 210
    halves = (start + part // 4 * 64 + part % 4 * 8).to(tl.pointer_type(tl.uint16))
    a, b, c, d = _word(halves), _word(halves + 2), _word(halves + 16), _word(halves + 18)
    halves = (start + 128 + part * 8).to(tl.pointer_type(tl.uint16))
    x, y = _word(halves), _word(halves + 2)
    scale = _as_half(tl.load((start + 208).to(tl.pointer_type(tl.uint16))).to(tl.uint32))
    small = start + 192 + part // 4 * 8 + part % 4 // 2
    s, t = signed(tl.load(small)) * scale, signed(tl.load(small + 2)) * scale
    u, v = signed(tl.load(small + 4)) * scale, signed(tl.load(small + 6)) * scale
    return (
        _sixth(a, 0, x, 0, UP), _sixth(b, 0, y, 0, UP), _sixth(c, 0, x, 2, UP), _sixth(d, 0, y, 2, UP),
        _sixth(a, 4, x, 4, UP), _sixth(b, 4, y, 4, UP), _sixth(c, 4, x, 6, UP), _sixth(d, 4, y, 6, UP),
    ), (s, t, u, v), (s * 32, t * 32, u * 32, v * 32)  # fmt: skip


@triton.jit
def Q2_K(packed, block, part, UP: tl.constexpr):
    start = packed + block * 84
    words = (start + 16 + part * 8).to(tl.pointer_type(tl.uint32))
    a, b = tl.load(words), tl.load(words + 1)
    both = tl.load((start + 80).to(tl.pointer_type(tl.uint32)))
    d, least = _as_half(both), _as_half(both >> 16)
    # Every other byte of eight: those of the four runs.
    small = (start + part // 4 * 8).to(tl.pointer_type(tl.uint32))
    shift = (part % 4 // 2 * 8).to(tl.uint32)
    x, y = tl.load(small) >> shift, tl.load(small + 1) >> shift
    return (
        _bits(a, 0, UP, 3), _bits(b, 0, UP, 3), _bits(a, 2, UP, 3), _bits(b, 2, UP, 3),
        _bits(a, 4, UP, 3), _bits(b, 4, UP, 3), _bits(a, 6, UP, 3), _bits(b, 6, UP, 3),
    ), (
        (x & 15).to(tl.float32) * d, ((x >> 16) & 15).to(tl.float32) * d,
        (y & 15).to(tl.float32) * d, ((y >> 16) & 15).to(tl.float32) * d,
    ), (
        ((x >> 4) & 15).to(tl.float32) * least, ((x >> 20) & 15).to(tl.float32) * least,
        ((y >> 4) & 15).to(tl.float32) * least, ((y >> 20) & 15).to(tl.float32) * least,
    )  # fmt: skip


@triton.jit
def _third(word, bits, RUN: tl.constexpr, UP: tl.constexpr):
    """The pairs of bits of a word that are a run's, with a bit of every byte of bits above them."""
    return _bits(word, 2 * RUN, UP, 3) | _bits(bits, RUN, UP + 2, 1)


@triton.jit
def Q3_K(packed, block, part, UP: tl.constexpr):
    start = packed + block * 110
    halves = (start + 32 + part * 8).to(tl.pointer_type(tl.uint16))
    a, b = _word(halves), _word(halves + 2)
    halves = (start + part % 4 * 8).to(tl.pointer_type(tl.uint16))
    plane = (part // 4 * 4).to(tl.uint32)
    x, y = _word(halves) >> plane, _word(halves + 2) >> plane
    scale = _as_half(tl.load((start + 108).to(tl.pointer_type(tl.uint16))).to(tl.uint32))
    # The four lower bits of eight groups are bytes' low nibbles, of the other eight the high ones; the two
    # upper ones of every fourth group are in one byte.
    late = part // 4
    halves = (start + 96).to(tl.pointer_type(tl.uint16))
    shift = (part % 4 // 2 * 8).to(tl.uint32)
    top = _word(halves + 4) >> (shift + late * 4)
    first, second = _word(halves) >> (shift + late * 4), _word(halves + 2) >> (shift + late * 4)
    s = (((first & 15) | ((top & 3) << 4)).to(tl.float32) - 32) * scale
    t = ((((first >> 16) & 15) | (((top >> 16) & 3) << 4)).to(tl.float32) - 32) * scale
    u = (((second & 15) | (((top >> 2) & 3) << 4)).to(tl.float32) - 32) * scale
    v = ((((second >> 16) & 15) | (((top >> 18) & 3) << 4)).to(tl.float32) - 32) * scale
    return (
        _third(a, x, 0, UP), _third(b, y, 0, UP), _third(a, x, 1, UP), _third(b, y, 1, UP),
        _third(a, x, 2, UP), _third(b, y, 2, UP), _third(a, x, 3, UP), _third(b, y, 3, UP),
    ), (s, t, u, v), (s * 4, t * 4, u * 4, v * 4)  # fmt: skip


# ------------------------------------------------------------------------------------------ blocks of 32
@triton.jit
def _from_block(part):
    return part * 32


@triton.jit
def _paired(packed, block, WORDS: tl.constexpr):
    """Blocks of 4 * WORDS + 2 bytes at addresses that are even: two of them begin at a multiple of four, and
    their words are loaded whole. Pointers (threads,) to the first word that a block has bytes in, and whether
    those begin in the middle of it."""
    odd = block % 2
    words = packed.to(tl.pointer_type(tl.uint32)) + block // 2 * (2 * WORDS + 1) + odd * WORDS
    return words, odd != 0


@triton.jit
def _moved(odd, low, high):
    """A word of a block whose fp16 in front is at the first or at the second half of the word before."""
    return tl.where(odd, high, (low >> 16) | (high << 16))


@triton.jit
def _scale(odd, word):
    return _as_half(tl.where(odd, word >> 16, word))


@triton.jit
def Q8_0(packed, block, part, UP: tl.constexpr):
    words, odd = _paired(packed, block, 8)
    a, b, c, d = tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    e, f, g, h = tl.load(words + 4), tl.load(words + 5), tl.load(words + 6), tl.load(words + 7)
    s = _scale(odd, a)
    i = tl.load(words + 8)
    signs: tl.constexpr = 0x80808080  # Without them the bytes count from -128.
    return (
        _moved(odd, a, b) ^ signs, _moved(odd, b, c) ^ signs, _moved(odd, c, d) ^ signs,
        _moved(odd, d, e) ^ signs, _moved(odd, e, f) ^ signs, _moved(odd, f, g) ^ signs,
        _moved(odd, g, h) ^ signs, _moved(odd, h, i) ^ signs,
    ), (s,), (s,)  # fmt: skip


@triton.jit
def Q4_0(packed, block, part, UP: tl.constexpr):
    words, odd = _paired(packed, block, 4)
    a, b, c, d = tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    s = _scale(odd, a)
    o = s * 8
    e = tl.load(words + 4)
    a, b, c, d = _moved(odd, a, b), _moved(odd, b, c), _moved(odd, c, d), _moved(odd, d, e)
    return _nibbles(a, b, c, d, UP), (s,), (o,)


@triton.jit
def Q4_1(packed, block, part, UP: tl.constexpr):
    words = packed.to(tl.pointer_type(tl.uint32)) + block * 5
    both = tl.load(words)
    a, b, c, d = tl.load(words + 1), tl.load(words + 2), tl.load(words + 3), tl.load(words + 4)
    s, o = _as_half(both), -_as_half(both >> 16)
    return _nibbles(a, b, c, d, UP), (s,), (o,)


@triton.jit
def _with_bits(word, LOW: tl.constexpr, bits, POSITION: tl.constexpr, UP: tl.constexpr):
    """Nibbles of a word, from bit LOW on, with four of the bits, lowest first, above them."""
    # The product has bit j at bit 8 * j.
    fifth = (((bits >> POSITION) & 15) * 0x00204081) & _EVERY_BYTE
    return _bits(word, LOW, UP, 15) | (fifth << (UP + 4))


@triton.jit
def _nibbles_with(bits, a, b, c, d, UP: tl.constexpr):
    """As `_nibbles`, with the 32 bits above them."""
    return (
        _with_bits(a, 0, bits, 0, UP), _with_bits(b, 0, bits, 4, UP),
        _with_bits(c, 0, bits, 8, UP), _with_bits(d, 0, bits, 12, UP),
        _with_bits(a, 4, bits, 16, UP), _with_bits(b, 4, bits, 20, UP),
        _with_bits(c, 4, bits, 24, UP), _with_bits(d, 4, bits, 28, UP),
    )  # fmt: skip


@triton.jit
def Q5_0(packed, block, part, UP: tl.constexpr):
    words, odd = _paired(packed, block, 5)
    a, b, c = tl.load(words), tl.load(words + 1), tl.load(words + 2)
    s = _scale(odd, a)
    bits = _moved(odd, a, b)
    d, e, f = tl.load(words + 3), tl.load(words + 4), tl.load(words + 5)
    a, b, c, d = _moved(odd, b, c), _moved(odd, c, d), _moved(odd, d, e), _moved(odd, e, f)
    o = s * 16
    return _nibbles_with(bits, a, b, c, d, UP), (s,), (o,)


@triton.jit
def Q5_1(packed, block, part, UP: tl.constexpr):
    words = packed.to(tl.pointer_type(tl.uint32)) + block * 6
    both, bits = tl.load(words), tl.load(words + 1)
    a, b, c, d = tl.load(words + 2), tl.load(words + 3), tl.load(words + 4), tl.load(words + 5)
    s, o = _as_half(both), -_as_half(both >> 16)
    return _nibbles_with(bits, a, b, c, d, UP), (s,), (o,)


@dataclass(frozen=True, slots=True)
class Lanes:
    """How the threads of a type go through its blocks.

    words: the type's function. start: the jitted function that tells where a part's first run begins in the
    block. bits: of a number. groups: how many scales a part's four runs have, 1, 2 or 4. runs: where the
    other runs begin, counted from the first. alignment: of every row's address, in bytes. less: by how
    much the numbers of a type with eight bits and one group are larger than those that are meant; what it
    returns as its offset is not looked at.
    """

    words: Any
    start: Any
    bits: int
    groups: int
    runs: tuple[int, int, int]
    alignment: int = 4
    less: int = 0


LANES = {
    "Q4_K": Lanes(Q4_K, _from_chunks, 4, 2, (8, 32, 40)),
    "Q5_K": Lanes(Q5_K, _from_chunks, 5, 2, (8, 32, 40)),
    "Q6_K": Lanes(Q6_K, _from_halves, 6, 4, (32, 64, 96), alignment=2),
    "Q2_K": Lanes(Q2_K, _from_halves, 2, 4, (32, 64, 96)),
    "Q3_K": Lanes(Q3_K, _from_halves, 3, 4, (32, 64, 96), alignment=2),
    "Q8_0": Lanes(Q8_0, _from_block, 8, 1, (8, 16, 24), less=128),
    "Q4_0": Lanes(Q4_0, _from_block, 4, 1, (8, 16, 24)),
    "Q4_1": Lanes(Q4_1, _from_block, 4, 1, (8, 16, 24)),
    "Q5_0": Lanes(Q5_0, _from_block, 5, 1, (8, 16, 24)),
    "Q5_1": Lanes(Q5_1, _from_block, 5, 1, (8, 16, 24)),
}


# ------------------------------------------------------------------------------------------------ products
@triton.jit
def _loaded(inputs, position, inside):
    """A run of inputs, fp32 (threads, 2, 2, 2), 0 where the row has ended."""
    x = tl.load(inputs + position[:, None] + tl.arange(0, 8)[None, :], mask=inside[:, None], other=0)
    return tl.reshape(x.to(tl.float32), (x.shape[0], 2, 2, 2))


@triton.jit
def _total(run):
    even, odd = tl.split(run)
    even, odd = tl.split(even + odd)
    even, odd = tl.split(even + odd)
    return even + odd


@triton.jit
def _placed(word, POSITION: tl.constexpr, EXPONENT: tl.constexpr):
    """What the instructions of `_bytes_times` make of a byte."""
    byte = (word >> (8 * POSITION)) & 255
    return ((byte << 16) | (EXPONENT << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _bytes_times(sums, word, a, b, c, d, PLACED: tl.constexpr, LESS: tl.constexpr):
    """sums + the four numbers of word, each less LESS, times a to d; with PLACED, 2^PLACED + each."""
    if PLACED == 0:
        if _EMULATED:
            sums += (_byte(word, 0) - LESS) * a
            sums += (_byte(word, 1) - LESS) * b
            sums += (_byte(word, 2) - LESS) * c
            sums += (_byte(word, 3) - LESS) * d
        else:
            # 2^15 + the number, in the mantissa of 2^15, is exact, and so is what is left without the 2^15.
            placed = tl.full(word.shape, 0x47000000, tl.uint32)
            more = tl.full(word.shape, 32768 + LESS, tl.float32)
            sums = tl.inline_asm_elementwise(
                """{
                .reg .f32 number, sum;
                prmt.b32 number, $2, $7, 0x7404;
                sub.rn.f32 number, number, $8;
                fma.rn.f32 sum, number, $3, $1;
                prmt.b32 number, $2, $7, 0x7414;
                sub.rn.f32 number, number, $8;
                fma.rn.f32 sum, number, $4, sum;
                prmt.b32 number, $2, $7, 0x7424;
                sub.rn.f32 number, number, $8;
                fma.rn.f32 sum, number, $5, sum;
                prmt.b32 number, $2, $7, 0x7434;
                sub.rn.f32 number, number, $8;
                fma.rn.f32 $0, number, $6, sum;
                }""",
                "=f,f,r,f,f,f,f,r,f",
                [sums, word, a, b, c, d, placed, more],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
    else:
        EXPONENT: tl.constexpr = (127 + PLACED) // 2  # The highest byte of 2^PLACED.
        if _EMULATED:
            sums += _placed(word, 0, EXPONENT) * a
            sums += _placed(word, 1, EXPONENT) * b
            sums += _placed(word, 2, EXPONENT) * c
            sums += _placed(word, 3, EXPONENT) * d
        else:
            sums = tl.inline_asm_elementwise(
                """{
                .reg .f32 number, sum;
                prmt.b32 number, $2, $7, 0x7044;
                fma.rn.f32 sum, number, $3, $1;
                prmt.b32 number, $2, $7, 0x7144;
                fma.rn.f32 sum, number, $4, sum;
                prmt.b32 number, $2, $7, 0x7244;
                fma.rn.f32 sum, number, $5, sum;
                prmt.b32 number, $2, $7, 0x7344;
                fma.rn.f32 $0, number, $6, sum;
                }""",
                "=f,f,r,f,f,f,f,r",
                [sums, word, a, b, c, d, tl.full(word.shape, EXPONENT << 24, tl.uint32)],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
    return sums


@triton.jit
def _run(sums, first, second, given, PLACED: tl.constexpr, LESS: tl.constexpr):
    """sums + the eight numbers of two words times a run of inputs."""
    even, odd = tl.split(given)
    left, right = tl.split(even)
    a, e = tl.split(left)
    c, g = tl.split(right)
    left, right = tl.split(odd)
    b, f = tl.split(left)
    d, h = tl.split(right)
    sums = _bytes_times(sums, first, a, b, c, d, PLACED, LESS)
    return _bytes_times(sums, second, e, f, g, h, PLACED, LESS)


@triton.jit
def _zeros(totals, PLACED: tl.constexpr):
    """What sums of numbers times inputs begin with."""
    LESS: tl.constexpr = -(1 << PLACED)
    if PLACED == 0:
        none = tl.zeros_like(totals[0])
        return none, none, none, none
    elif len(totals) == 4:  # noqa: RET505 the compiler takes one branch of such a chain
        return totals[0] * LESS, totals[1] * LESS, totals[2] * LESS, totals[3] * LESS
    elif len(totals) == 2:
        return totals[0] * LESS, totals[1] * LESS
    else:
        return (totals[0] * LESS,)


@triton.jit
def _row(
    words, scales, offsets, runs, totals, GROUPS: tl.constexpr, PLACED: tl.constexpr, LESS: tl.constexpr
):
    """The 32 values of every thread times four runs of inputs, with their totals."""
    zeros = _zeros(totals, PLACED)
    if GROUPS == 4:
        sums = _run(zeros[0], words[0], words[1], runs[0], PLACED, LESS) * scales[0] - totals[0] * offsets[0]
        sums += _run(zeros[1], words[2], words[3], runs[1], PLACED, LESS) * scales[1] - totals[1] * offsets[1]
        sums += _run(zeros[2], words[4], words[5], runs[2], PLACED, LESS) * scales[2] - totals[2] * offsets[2]
        sums += _run(zeros[3], words[6], words[7], runs[3], PLACED, LESS) * scales[3] - totals[3] * offsets[3]
    else:
        first = _run(zeros[0], words[0], words[1], runs[0], PLACED, LESS)
        first = _run(first, words[2], words[3], runs[1], PLACED, LESS)
        if GROUPS == 2:
            second = _run(zeros[1], words[4], words[5], runs[2], PLACED, LESS)
            second = _run(second, words[6], words[7], runs[3], PLACED, LESS)
            sums = first * scales[0] - totals[0] * offsets[0]
            sums += second * scales[1] - totals[1] * offsets[1]
        else:
            first = _run(first, words[4], words[5], runs[2], PLACED, LESS)
            first = _run(first, words[6], words[7], runs[3], PLACED, LESS)
            sums = first * scales[0]
            if LESS == 0:
                sums -= totals[0] * offsets[0]
    return sums


@triton.jit
def _given(
    inputs,
    position,
    inside,
    GROUPS: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    FOURTH: tl.constexpr,
):
    """Four runs, and the totals of those that share a scale."""
    a, b = _loaded(inputs, position, inside), _loaded(inputs, position + SECOND, inside)
    c, d = _loaded(inputs, position + THIRD, inside), _loaded(inputs, position + FOURTH, inside)
    e, f, g, h = _total(a), _total(b), _total(c), _total(d)
    if GROUPS == 4:
        return (a, b, c, d), (e, f, g, h)
    elif GROUPS == 2:  # noqa: RET505
        return (a, b, c, d), (e + f, g + h)
    else:
        return (a, b, c, d), ((e + f) + (g + h),)


@triton.jit
def _beside(a, b, c, d, ROWS: tl.constexpr):
    """As many tensors (threads,) as there are rows -> (threads, rows)"""
    if ROWS == 1:
        joined = a[:, None]
    elif ROWS == 2:
        joined = tl.join(a, b)
    else:
        joined = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4))
    return joined


@triton.jit
def _finish(sums, bias, out, row, WARPS: tl.constexpr, ROWS: tl.constexpr):
    products = tl.sum(tl.reshape(sums, (WARPS, 32, ROWS)), axis=1)
    if bias is not None:
        products += tl.load(bias + row).to(tl.float32)
    store(out + row, products)


def _multiply(
    packed,
    inputs,
    bias,
    out,
    rows,
    row_blocks,
    BLOCK_BYTES: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
    GROUPS: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    FOURTH: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    PLACED: tl.constexpr,
    LESS: tl.constexpr,
):
    PARTS: tl.constexpr = BLOCK_ELEMENTS // 32
    UP: tl.constexpr = 7 - PLACED if PLACED else 0
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    part = lane % PARTS
    first_row = tl.program_id(0) * WARPS * ROWS
    # Rows past the end are the last one once more.
    row = first_row + thread // 32 * ROWS
    row_bytes = row_blocks.to(tl.int64) * BLOCK_BYTES
    first = packed + tl.minimum(row, rows - 1) * row_bytes
    second = packed + tl.minimum(row + 1, rows - 1) * row_bytes
    third = packed + tl.minimum(row + 2, rows - 1) * row_bytes
    fourth = packed + tl.minimum(row + 3, rows - 1) * row_bytes
    sums = tl.zeros((32 * WARPS, ROWS), tl.float32)
    others = sums
    for start in range(0, row_blocks, 32 // PARTS):
        block = start + lane // PARTS
        # Blocks past the end are the last one once more, with inputs of 0.
        inside = block < row_blocks
        position = block * BLOCK_ELEMENTS + START(part)
        block = tl.minimum(block, row_blocks - 1)
        x, x_totals = _given(inputs, position, inside, GROUPS, SECOND, THIRD, FOURTH)
        words, scales, offsets = WORDS(first, block, part, UP)
        a = _row(words, scales, offsets, x, x_totals, GROUPS, PLACED, LESS)
        b, c, d = a, a, a
        if INPUTS == 2:
            y = inputs + row_blocks * BLOCK_ELEMENTS
            y, y_totals = _given(y, position, inside, GROUPS, SECOND, THIRD, FOURTH)
            e = _row(words, scales, offsets, y, y_totals, GROUPS, PLACED, LESS)
            f, g, h = e, e, e
        if ROWS >= 2:
            words, scales, offsets = WORDS(second, block, part, UP)
            b = _row(words, scales, offsets, x, x_totals, GROUPS, PLACED, LESS)
            if INPUTS == 2:
                f = _row(words, scales, offsets, y, y_totals, GROUPS, PLACED, LESS)
        if ROWS >= 4:
            words, scales, offsets = WORDS(third, block, part, UP)
            c = _row(words, scales, offsets, x, x_totals, GROUPS, PLACED, LESS)
            if INPUTS == 2:
                g = _row(words, scales, offsets, y, y_totals, GROUPS, PLACED, LESS)
            words, scales, offsets = WORDS(fourth, block, part, UP)
            d = _row(words, scales, offsets, x, x_totals, GROUPS, PLACED, LESS)
            if INPUTS == 2:
                h = _row(words, scales, offsets, y, y_totals, GROUPS, PLACED, LESS)
        sums += _beside(a, b, c, d, ROWS)
        if INPUTS == 2:
            others += _beside(e, f, g, h, ROWS)
    row = first_row + tl.arange(0, WARPS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    row = tl.minimum(row, rows - 1)
    _finish(sums, bias, out, row, WARPS, ROWS)
    if INPUTS == 2:
        _finish(others, bias, out + rows, row, WARPS, ROWS)


@lru_cache(maxsize=16)
def _launch(lanes: Lanes) -> Any:
    names = {"WORDS": lanes.words, "START": lanes.start}
    return compiled(_multiply, names, ["rows", "row_blocks"])


Multiply: TypeAlias = "partial[None]"
"""Called with what `multiply_triton.multiply` has behind its kernel."""


def multiply_for(format: Format, packed: Tensor, inputs: Tensor, rows: int) -> Multiply | None:
    """How a weight of so many rows is multiplied here: `multiply` with its first two arguments; None where it
    is not."""
    lanes = LANES.get(format.name)
    if lanes is None or _TRITON < _OLDEST or not _is_served(inputs.device):
        return None
    if (packed.data_ptr() | format.packed_bytes(inputs.shape[1])) % lanes.alignment:
        return None
    # More rows at once are less work, and leave few threads for a small weight.
    return partial(multiply, lanes, (4 if rows >= _MANY_ROWS else 2) // len(inputs))


def _is_served(device: torch.device) -> bool:
    """It is made for NVIDIA's warps of 32 threads, and has instructions of theirs."""
    return (device.type == "cuda" and torch.version.hip is None) or _INTERPRETED


def multiply(
    lanes: Lanes,
    at_once: int,
    format: Format,
    packed: Tensor,
    inputs: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """at_once: rows that share a thread's inputs, 1, 2 or 4. The rest: see `multiply_triton.multiply`."""
    count, rows = out.shape
    with on_device(out.device):
        _launch(lanes)[(triton.cdiv(rows, at_once * _WARPS),)](
            packed,
            inputs,
            bias,
            out,
            rows,
            inputs.shape[1] // format.block_elements,
            BLOCK_BYTES=format.block_bytes,
            BLOCK_ELEMENTS=format.block_elements,
            GROUPS=lanes.groups,
            SECOND=lanes.runs[0],
            THIRD=lanes.runs[1],
            FOURTH=lanes.runs[2],
            INPUTS=count,
            ROWS=at_once,
            WARPS=_WARPS,
            PLACED=lanes.bits | 1 if lanes.bits < 8 and inputs.dtype != torch.float32 else 0,
            LESS=lanes.less,
            num_warps=_WARPS,
        )
