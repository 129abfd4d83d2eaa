"""TQ2_0 on a CPU: the values of `unpack_ternary`, in the way of `unpack_cpu`."""

from __future__ import annotations

import torch
from torch import Tensor

from .unpack_cpu import ChunkUnpacker
from .words import as_words, every_byte


class TQ2_0(ChunkUnpacker):
    """Every 32 bytes hold four planes of two bits."""

    width, planes = 32, 4
    signed = True

    def __init__(self, blocks: int) -> None:
        super().__init__((4, 8 * blocks))
        self.pairs = torch.empty((blocks, 32), dtype=torch.int16)
        self.pair_words = as_words(self.pairs)
        self.shifts = torch.tensor([0, 2, 4, 6])[:, None]
        masks = torch.tensor([every_byte(byte) for byte in (0x03, 0x7F, 0x80)])
        self.two, self.up, self.top = masks.unbind(0)

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...]:
        of_halves = blocks.view(torch.float16)[:, 32].float().repeat_interleave(2)
        return (of_halves.expand(4, -1)[:, :, None],)

    def read(self, blocks: Tensor) -> None:
        self.pairs.copy_(blocks.view(torch.int16)[:, :32])
        torch.bitwise_right_shift(self.pair_words, self.shifts, out=self.words)
        # q + 127 with the top bit flipped is q - 1, and no byte overflows into the next.
        self.words.bitwise_and_(self.two).add_(self.up).bitwise_xor_(self.top)
