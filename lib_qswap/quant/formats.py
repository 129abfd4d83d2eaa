"""Every format of packed weights: how many elements a block holds, what it takes, and who unpacks it.

The numbers of GGML types are those of the GGUF specification and of ggml's block structures; those of FP8 are
safetensors'; those of bitsandbytes are `bnb_weight`'s. To add a format, write a function that unpacks it,
beside those of its kind (`unpack_legacy` says what it may rely on), and add a row to `_ROWS`. For speed on a
GPU, write one for Triton as well, under the type's name (`unpack_triton` says how): where the row names
`unpack_k.unpack_q4_k`, `unpack_triton_k.Q4_K` is found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType

import torch
from torch import Tensor

from . import unpack_bnb, unpack_codebook, unpack_grid, unpack_k, unpack_legacy, unpack_plain, unpack_ternary

UnpackFunction = Callable[[Tensor, Tensor], None]
"""`(blocks, out)`: blocks uint8 (n, block_bytes), out fp32, fp16 or bf16 (n, block_elements)."""

UnpackLikeForgeFunction = Callable[[Tensor, Tensor, torch.dtype], None]
"""`(blocks, out, computation_dtype)`: the same, scales and products rounded to fp16 or bf16 as in Forge."""


@dataclass(frozen=True, slots=True)
class Format:
    """One format.

    name: as the GGUF (or safetensors) specification spells it. ggml_id: its number in a .gguf file; None for
    what no such file holds. dtype: the torch dtype of a plain type, whose bytes are the values; None where
    blocks have to be unpacked. unpack: None where the layout is known but nothing unpacks it.
    unpack_like_forge: for the types of which Forge rounds intermediate values. scale: what every value is
    multiplied by; 1 in the table, others by `scaled`.
    """

    name: str
    ggml_id: int | None
    block_elements: int
    block_bytes: int
    dtype: torch.dtype | None = None
    unpack: UnpackFunction | None = None
    unpack_like_forge: UnpackLikeForgeFunction | None = None
    scale: float = 1.0

    def packed_bytes(self, elements: int) -> int:
        """The bytes that `elements` take; ValueError unless they fill whole blocks."""
        blocks, rest = divmod(elements, self.block_elements)
        if rest or elements < 0:
            raise ValueError(
                f"{elements} elements are no whole number of {self.name} blocks of {self.block_elements}."
            )
        return blocks * self.block_bytes


_ROWS = (
    Format("F32", 0, 1, 4, torch.float32, unpack_plain.unpack_f32),
    Format("F16", 1, 1, 2, torch.float16, unpack_plain.unpack_f16),
    Format("BF16", 30, 1, 2, torch.bfloat16, unpack_plain.unpack_bf16),
    Format("F64", 28, 1, 8, torch.float64, unpack_plain.unpack_f64),
    Format("I8", 24, 1, 1, torch.int8, unpack_plain.unpack_i8),
    Format("I16", 25, 1, 2, torch.int16, unpack_plain.unpack_i16),
    Format("I32", 26, 1, 4, torch.int32, unpack_plain.unpack_i32),
    Format("I64", 27, 1, 8, torch.int64, unpack_plain.unpack_i64),
    Format("F8_E4M3", None, 1, 1, torch.float8_e4m3fn, unpack_plain.unpack_f8_e4m3),
    Format("F8_E5M2", None, 1, 1, torch.float8_e5m2, unpack_plain.unpack_f8_e5m2),
    Format("Q4_0", 2, 32, 18, unpack=unpack_legacy.unpack_q4_0, unpack_like_forge=unpack_legacy.unpack_q4_0),
    Format("Q4_1", 3, 32, 20, unpack=unpack_legacy.unpack_q4_1, unpack_like_forge=unpack_legacy.unpack_q4_1),
    Format("Q5_0", 6, 32, 22, unpack=unpack_legacy.unpack_q5_0, unpack_like_forge=unpack_legacy.unpack_q5_0),
    Format("Q5_1", 7, 32, 24, unpack=unpack_legacy.unpack_q5_1, unpack_like_forge=unpack_legacy.unpack_q5_1),
    Format("Q8_0", 8, 32, 34, unpack=unpack_legacy.unpack_q8_0, unpack_like_forge=unpack_legacy.unpack_q8_0),
    # ggml's kernels keep activations in Q8_1, no tool writes weights in it. 40 bytes as gguf-py counts them,
    # with two fp32 scales; ggml's own structure has shrunk to 36 since, with two fp16 ones. A file does not
    # say which it means, so nothing unpacks it.
    Format("Q8_1", 9, 32, 40),
    Format("Q1_0", 41, 128, 18, unpack=unpack_legacy.unpack_q1_0),
    Format("Q2_0", 42, 64, 18, unpack=unpack_legacy.unpack_q2_0),
    Format("Q2_K", 10, 256, 84, unpack=unpack_k.unpack_q2_k, unpack_like_forge=unpack_k.unpack_q2_k),
    Format("Q3_K", 11, 256, 110, unpack=unpack_k.unpack_q3_k, unpack_like_forge=unpack_k.unpack_q3_k),
    Format("Q4_K", 12, 256, 144, unpack=unpack_k.unpack_q4_k, unpack_like_forge=unpack_k.unpack_q4_k),
    Format("Q5_K", 13, 256, 176, unpack=unpack_k.unpack_q5_k, unpack_like_forge=unpack_k.unpack_q5_k),
    Format("Q6_K", 14, 256, 210, unpack=unpack_k.unpack_q6_k, unpack_like_forge=unpack_k.unpack_q6_k),
    Format("Q8_K", 15, 256, 292, unpack=unpack_k.unpack_q8_k),
    Format("IQ2_XXS", 16, 256, 66, unpack=unpack_grid.unpack_iq2_xxs),
    Format("IQ2_XS", 17, 256, 74, unpack=unpack_grid.unpack_iq2_xs),
    Format("IQ2_S", 22, 256, 82, unpack=unpack_grid.unpack_iq2_s),
    Format("IQ3_XXS", 18, 256, 98, unpack=unpack_grid.unpack_iq3_xxs),
    Format("IQ3_S", 21, 256, 110, unpack=unpack_grid.unpack_iq3_s),
    Format("IQ1_S", 19, 256, 50, unpack=unpack_grid.unpack_iq1_s),
    Format("IQ1_M", 29, 256, 56, unpack=unpack_grid.unpack_iq1_m),
    Format("IQ4_NL", 20, 32, 18, unpack=unpack_codebook.unpack_iq4_nl),
    Format("IQ4_XS", 23, 256, 136, unpack=unpack_codebook.unpack_iq4_xs),
    Format("TQ1_0", 34, 256, 54, unpack=unpack_ternary.unpack_tq1_0),
    Format("TQ2_0", 35, 256, 66, unpack=unpack_ternary.unpack_tq2_0),
    Format("MXFP4", 39, 32, 17, unpack=unpack_codebook.unpack_mxfp4),
    Format("NVFP4", 40, 64, 36, unpack=unpack_codebook.unpack_nvfp4),
    # As bitsandbytes: one product in fp32, rounded to the dtype that its quantization state names.
    Format("BNB_NF4", None, 64, 36, None, unpack_bnb.unpack_nf4, unpack_bnb.unpack_nf4),
    Format("BNB_FP4", None, 64, 36, None, unpack_bnb.unpack_fp4, unpack_bnb.unpack_fp4),
)

FORMATS: Mapping[str, Format] = MappingProxyType({row.name: row for row in _ROWS})
_BY_GGML_ID = {row.ggml_id: row for row in _ROWS if row.ggml_id is not None}

WITHDRAWN: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
        36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
    }
)  # fmt: skip
"""Types by `ggml_type` number that the GGUF specification has had and given up."""


def by_ggml_id(ggml_id: int) -> Format | None:
    """The row of a `ggml_type` number read from a file; None for a number that no known type has."""
    return _BY_GGML_ID.get(ggml_id)


@cache
def scaled(name: str, scale: float) -> Format:
    """The FP8 format `name` with one scale for the tensor: every value is multiplied by it, an fp32 number.

    The scale is part of the format, so that the bytes stay those of the file, and rows of a weight can be
    taken without it. The same arguments give the same object; a scale of 1 is the row of the table.

    Raises ValueError for a format that takes no scale.
    """
    row = FORMATS[name]
    if scale == 1.0:
        return row
    if row.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise ValueError(f"{name} takes no scale beside its blocks; F8_E4M3 and F8_E5M2 do.")
    return Format(
        name,
        None,
        row.block_elements,
        row.block_bytes,
        unpack=partial(unpack_plain.unpack_f8_scaled, dtype=row.dtype, scale=scale),
        unpack_like_forge=partial(unpack_plain.unpack_f8_scaled_like_forge, dtype=row.dtype, scale=scale),
        scale=scale,
    )
