"""Names, shapes, types and places of tensors."""

from __future__ import annotations

import struct

from gguf_writer import Tensor, gguf_bytes

from .catalogue import add, attack, oddity


@attack("tensor a: appears twice")
def duplicate_name() -> bytes:
    return gguf_bytes([Tensor("a"), Tensor("a")])


@attack("name of tensor 0: '' is empty")
def name_of_nothing() -> bytes:
    return gguf_bytes([Tensor("")])


@attack("name of tensor 1: 'a\\x00b' is empty or contains NUL")
def name_with_a_nul() -> bytes:
    return gguf_bytes([Tensor("a"), Tensor(b"a\0b")])


@attack("name of tensor 0: 'a\\nb'")
def name_of_two_lines() -> bytes:
    return gguf_bytes([Tensor("a\nb")])


@attack("name of tensor 0: b'\\xc3(' is not UTF-8")
def name_that_is_not_utf8() -> bytes:
    return gguf_bytes([Tensor(b"\xc3(")])


@attack("name of tensor 0: b'\\xed\\xa0\\x80' is not UTF-8")
def name_of_half_a_surrogate_pair() -> bytes:
    return gguf_bytes([Tensor(b"\xed\xa0\x80")])


@attack("name of tensor 0: '\\u202egpj.exe'")
def name_that_is_written_backwards() -> bytes:
    return gguf_bytes([Tensor("\u202egpj.exe")])


@attack("name of tensor 0: 1048576 bytes long")
def name_of_a_megabyte() -> bytes:
    return gguf_bytes([Tensor("n" * (1 << 20))])


@attack(f"name of tensor 0: {2**60} bytes long")
def name_length_of_2_to_60() -> bytes:
    return gguf_bytes(tensor_count=1)[:24] + struct.pack("<Q", 2**60) + bytes(64)


@attack("tensor a (dimension count): 9, at most 8")
def nine_dimensions() -> bytes:
    return gguf_bytes([Tensor("a", (1,) * 9, "F32")])


@attack(f"tensor a (dimension count): {2**32 - 1}")
def dimension_count_of_all_ones() -> bytes:
    description = struct.pack("<Q", 1) + b"a" + struct.pack("<I", 2**32 - 1)
    return gguf_bytes(tensor_count=1)[:24] + description + bytes(64)


@attack("tensor a (dimensions): one of (0, 4) is 0")
def a_dimension_of_0() -> bytes:
    return gguf_bytes([Tensor("a", (4, 0), "F32")])


@attack("tensor a (shape): (4294967296, 4294967296) of F32 are more than any file can hold")
def shape_whose_product_overflows_64_bits_to_0() -> bytes:
    return gguf_bytes([Tensor("a", (2**32, 2**32), "F32", b"")])


@attack("more than any file can hold")
def shape_whose_product_overflows_everything() -> bytes:
    return gguf_bytes([Tensor("a", (2**63,) * 8, "I8", b"")])


@attack("tensor a (shape): (2, 9223372036854775809) of F32 are more than any file can hold")
def shape_whose_product_overflows_to_2() -> bytes:
    return gguf_bytes([Tensor("a", (2, 2**63 + 1), "F32", bytes(8))])


@attack("tensor a (shape): (4611686018427387904,) of F32 are more than any file can hold")
def shape_whose_bytes_overflow_to_0() -> bytes:
    return gguf_bytes([Tensor("a", (2**62,), "F32", b"")])


@attack("tensor a (type): type id 99 is unknown: update QSwap")
def type_that_nobody_knows() -> bytes:
    return gguf_bytes([Tensor("a", type=99)])


@attack(f"tensor a (type): type id {2**32 - 1} is unknown")
def type_of_all_ones() -> bytes:
    return gguf_bytes([Tensor("a", type=2**32 - 1)])


for number, name in (
    (4, "Q4_2"),
    (5, "Q4_3"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
):
    add(
        f"type_{number}_that_was_withdrawn",
        f"tensor a (type): {name} (type id {number}) is no longer part of GGUF",
        gguf_bytes([Tensor("a", type=number)]),
    )


@attack("tensor a (shape): rows of 255 elements are no whole number of Q4_K blocks")
def rows_of_no_whole_block() -> bytes:
    return gguf_bytes([Tensor("a", (256, 255), "Q4_K", bytes(255 * 144))])


@attack("tensor a (shape): rows of 1 elements are no whole number of Q8_0 blocks")
def a_scalar_of_a_block_type() -> bytes:
    return gguf_bytes([Tensor("a", (), "Q8_0", bytes(34))])


@attack("tensor b (offset): Q4_K of shape (2, 256) ends at byte")
def data_that_ends_a_byte_too_early() -> bytes:
    return gguf_bytes([Tensor("a"), Tensor("b")])[:-1]


@attack("tensor a (offset): Q4_K of shape (2, 256) ends at byte")
def data_that_is_missing() -> bytes:
    return gguf_bytes([Tensor("a", data=b"")])


@attack("tensor a (offset): Q4_K of shape (2, 256) ends at byte")
def offset_just_past_the_end() -> bytes:
    return gguf_bytes([Tensor("a", offset=288)])


@attack("tensor a (offset): Q4_K of shape (2, 256) ends at byte")
def offset_of_2_to_60() -> bytes:
    return gguf_bytes([Tensor("a", offset=2**60)])


@attack("tensor a (offset): Q4_K of shape (2, 256) ends at byte")
def offset_that_wraps_to_the_header() -> bytes:
    return gguf_bytes([Tensor("a", offset=2**64 - 32)])


@attack("tensor a (offset): 16 is not a multiple of the alignment, 32")
def offset_that_is_not_aligned() -> bytes:
    return gguf_bytes([Tensor("a", offset=16)]) + bytes(64)


@attack("tensor b (offset): begins inside of tensor a")
def tensors_that_overlap_by_one_block() -> bytes:
    return gguf_bytes([Tensor("a"), Tensor("b", offset=256)])


@attack("begins inside of tensor")
def tensors_in_the_same_place() -> bytes:
    return gguf_bytes([Tensor("a"), Tensor("b", offset=0)])


@attack("tensor c (offset): begins inside of tensor a")
def tensor_within_another_and_listed_out_of_order() -> bytes:
    large = Tensor("a", (64, 256), offset=576)
    return gguf_bytes([Tensor("b", offset=0), Tensor("c", offset=576 + 288), large]) + bytes(1 << 14)


@oddity("1 tensors")
def a_scalar() -> bytes:
    return gguf_bytes([Tensor("scale", (), "F32")])


@oddity("1 x 1 x 1 x 1 x 1 x 1 x 8 x 256  conv")
def eight_dimensions() -> bytes:
    return gguf_bytes([Tensor("conv", (1, 1, 1, 1, 1, 1, 8, 256))])


@oddity("1000000 bytes of the data belong to no tensor")
def data_that_nobody_owns() -> bytes:
    return gguf_bytes([Tensor("a")]) + bytes(1_000_000)
