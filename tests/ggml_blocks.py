"""Blocks of every format for tests: random bytes, the same on every machine, with chosen scales."""

from __future__ import annotations

import hashlib

import numpy as np

from lib_qswap.quant.formats import Format

# Byte offsets of the fp16 scales (and minima) in a block. IQ1_M's is spread over four nibbles.
HALF_OFFSETS = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q1_0": (0,),
    "Q2_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,), "F16": (0,),
}  # fmt: skip

# Zero, the smallest and largest subnormal, the smallest and largest normal number, 1 and 1/3, in both signs.
_EDGES = np.array([0x0000, 0x0001, 0x03FF, 0x0400, 0x7BFF, 0x3C00, 0x3555], np.uint16)
EDGE_SCALES = np.concatenate((_EDGES, _EDGES | 0x8000))
# The same of fp32; absmax has no sign.
EDGE_ABSMAX = np.array([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x3F800000, 0x3EAAAAAB], np.uint32)


def random_blocks(format: Format, count: int, scales: str = "any", seed: int = 0) -> np.ndarray:
    """uint8 (count, block_bytes).

    scales: "any" finite fp16 number, "ordinary" (0.001 to 0.011, as trained weights have), "edge"
    (`EDGE_SCALES` in turn), or "zero".
    """
    label = f"{format.name} {seed}".encode()
    data = hashlib.shake_256(label).digest(count * format.block_bytes)
    blocks = np.frombuffer(data, np.uint8).reshape(count, format.block_bytes).copy()
    for position, offset in enumerate(HALF_OFFSETS.get(format.name, ())):
        halves = _halves(blocks[:, offset : offset + 2].copy().view(np.uint16)[:, 0], scales, position)
        blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(count, 2)
    if format.name == "IQ1_M":
        halves = _halves(blocks[:, :2].copy().view(np.uint16)[:, 0], scales, 0)
        for nibble in range(4):
            high = (halves >> 4 * nibble & 0x0F).astype(np.uint8) << 4
            blocks[:, 49 + 2 * nibble] = blocks[:, 49 + 2 * nibble] & 0x0F | high
    if format.name == "MXFP4":  # 2 ** 123 times the largest value, 12 / 2, is still finite
        blocks[:, 0] = {"zero": 0, "ordinary": 120}.get(scales, blocks[:, 0] % 250)
    if format.name == "NVFP4" and scales in ("zero", "ordinary"):
        blocks[:, :4] = 0 if scales == "zero" else 0x20
    if format.name in ("F32", "BF16", "F8_E4M3", "F8_E5M2"):  # finite: not all exponent bits set
        blocks[:, -1] &= 0xBF
    if format.name == "F64":  # finite in fp32: exponents of -127 to 0
        wide = blocks.view(np.uint64)
        wide[:] = wide & 0x87FFFFFFFFFFFFFF | 0x3800000000000000
    if format.name.startswith("BNB_"):
        absmax = blocks[:, :4].copy().view(np.uint32)[:, 0]
        blocks[:, :4] = _absmax(absmax, scales).view(np.uint8).reshape(count, 4)
    if format.name == "Q8_K":
        blocks[:, :4] = np.frombuffer(np.float32(0 if scales == "zero" else 0.01).tobytes(), np.uint8)
    return blocks


def _absmax(random: np.ndarray, scales: str) -> np.ndarray:
    """fp32 numbers of no sign as uint32."""
    if scales == "zero":
        return np.zeros_like(random)
    if scales == "edge":
        return EDGE_ABSMAX[np.arange(len(random)) % len(EDGE_ABSMAX)]
    if scales == "ordinary":
        return (random / 2**32 * 0.01 + 0.001).astype(np.float32).view(np.uint32)
    infinite = random & 0x7F800000 == 0x7F800000
    return np.where(infinite, random & 0x3FFFFFFF, random & 0x7FFFFFFF).astype(np.uint32)


def _halves(random: np.ndarray, scales: str, position: int) -> np.ndarray:
    """fp16 numbers as uint16. The second number of a block goes through the edges at another pace."""
    if scales == "zero":
        return np.zeros_like(random)
    if scales == "edge":
        turn = np.arange(len(random)) // (len(EDGE_SCALES) if position else 1)
        return EDGE_SCALES[turn % len(EDGE_SCALES)]
    if scales == "ordinary":
        return (random.astype(np.float64) / 65536 * 0.01 + 0.001).astype(np.float16).view(np.uint16)
    infinite = (random & 0x7C00) == 0x7C00
    return np.where(infinite, random & 0xFBFF, random).astype(np.uint16)
