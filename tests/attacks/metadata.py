"""Keys, values, arrays and the alignment."""

from __future__ import annotations

import struct

from gguf_writer import ARRAY, F32, F64, I32, STRING, U8, U16, U64, Tensor, Value, gguf_bytes

from .catalogue import add, attack, oddity


def with_value(value: object, key: str | bytes = "k") -> bytes:
    return gguf_bytes([Tensor("a")], [(key, value)])


def array_of(item_type: int, count: int, rest: bytes = b"") -> bytes:
    return with_value(Value(ARRAY, struct.pack("<IQ", item_type, count) + rest))


@attack("metadata key 0: 'k\\x00' is empty or contains NUL")
def key_with_a_nul() -> bytes:
    return with_value(1, b"k\0")


@attack("metadata key 0: b'\\xff' is not UTF-8")
def key_that_is_not_utf8() -> bytes:
    return with_value(1, b"\xff")


@attack("metadata key 0: '' is empty")
def key_of_nothing() -> bytes:
    return with_value(1, b"")


@attack("metadata key 0: '\\x1b[2J' is empty or contains NUL or other control characters")
def key_that_clears_the_screen() -> bytes:
    return with_value(1, b"\x1b[2J")


@attack("metadata key 0: 1048576 bytes long")
def key_of_a_megabyte() -> bytes:
    return with_value(1, b"k" * (1 << 20))


@attack(f"metadata key 0: {2**60} bytes long")
def key_length_of_2_to_60() -> bytes:
    return gguf_bytes(metadata_count=1)[:24] + struct.pack("<Q", 2**60) + bytes(64)


@attack("metadata key twice: appears twice")
def duplicate_key() -> bytes:
    return gguf_bytes([Tensor("a")], [("twice", 1), ("twice", "2")])


@attack("k: value type 13 is not one of GGUF's")
def value_of_no_type() -> bytes:
    return with_value(struct.pack("<I", 13))


@attack(f"k: value type {2**32 - 1} is not one of GGUF's")
def value_type_of_all_ones() -> bytes:
    return with_value(struct.pack("<I", 2**32 - 1))


@attack(f"k: needs {2**60} bytes")
def string_length_of_2_to_60() -> bytes:
    return with_value(Value(STRING, struct.pack("<Q", 2**60)))


@attack(f"k: needs {2**64 - 1} bytes")
def string_length_of_minus_one() -> bytes:
    return with_value(Value(STRING, struct.pack("<Q", 2**64 - 1)))


@attack(f"k ({2**60} items)")
def array_of_2_to_60_bytes() -> bytes:
    return array_of(U8, 2**60)


@attack(f"k ({2**61} items)")
def array_whose_size_overflows_to_nothing() -> bytes:
    return array_of(U64, 2**61)


@attack(f"k ({2**61} items)")
def array_of_2_to_61_strings() -> bytes:
    return array_of(STRING, 2**61)


@attack(f"k ({2**60} items)")
def array_of_2_to_60_arrays() -> bytes:
    return array_of(ARRAY, 2**60)


@attack("k: item type 13 is not one of GGUF's")
def array_of_no_type() -> bytes:
    return array_of(13, 1)


@attack("k: item type 13 is not one of GGUF's")
def empty_array_of_no_type() -> bytes:
    return array_of(13, 0)


@attack("k: needs")
def array_whose_last_string_is_endless() -> bytes:
    strings = struct.pack("<Q", 1) + b"x"
    return array_of(STRING, 1000, strings * 999 + struct.pack("<Q", 2**60))


@attack("k: needs")
def array_whose_first_string_swallows_the_others() -> bytes:
    return array_of(STRING, 1000, struct.pack("<Q", 2**63 - 8) + bytes(8000))


@attack("k: needs")
def array_whose_strings_lead_back_to_its_beginning() -> bytes:
    # With 64-bit wrap-around, the position after this string is the string again.
    return array_of(STRING, 500_000, struct.pack("<Q", 2**64 - 8) + bytes(4_000_000))


@attack("k: arrays nested more than")
def arrays_nested_deeply() -> bytes:
    return with_value(Value(ARRAY, struct.pack("<IQ", ARRAY, 1) * 100_000))


@attack("k: arrays nested more than")
def arrays_nested_a_little_too_deeply() -> bytes:
    return with_value(Value(ARRAY, struct.pack("<IQ", ARRAY, 1) * 4 + struct.pack("<IQ", U8, 0)))


@attack("general.alignment: must be a u32 (value type 4), not value type 2")
def alignment_of_another_integer_type() -> bytes:
    return with_value(Value(U16, 32), "general.alignment")


@attack("general.alignment: must be a u32 (value type 4), not value type 8")
def alignment_that_is_text() -> bytes:
    return with_value("32", "general.alignment")


@attack("general.alignment: must be a u32 (value type 4), not value type 9")
def alignment_that_is_an_array() -> bytes:
    return with_value(Value(ARRAY, [32], I32), "general.alignment")


@attack("general.alignment: must be a u32 (value type 4), not value type 6")
def alignment_that_is_not_a_number() -> bytes:
    return with_value(Value(F32, float("nan")), "general.alignment")


for alignment in (0, 3, 48, 2**32 - 1):
    add(
        f"alignment_of_{alignment}",
        f"general.alignment: {alignment} is not a power of two",
        with_value(alignment, "general.alignment"),
    )


@attack("tensor a (offset): Q4_K of shape (2, 256) ends at byte")
def alignment_beyond_the_file() -> bytes:
    return with_value(2**31, "general.alignment")


@attack("tensor b (offset): 288 is not a multiple of the alignment, 64")
def alignment_that_the_tensors_do_not_have() -> bytes:
    return gguf_bytes([Tensor("a"), Tensor("b")], {"general.alignment": 64})


@oddity("no tensors")
def alignment_beyond_the_file_without_tensors() -> bytes:
    return gguf_bytes(metadata={"general.alignment": 2**31})


@oddity("1 tensors")
def original_shape_of_wrong_types() -> bytes:
    shapes = (["2", "256"], "2, 256", Value(F64, 2.0), Value(ARRAY, [-2, -256], I32), Value(U64, 2**64 - 1))
    return gguf_bytes(
        [Tensor("a", (2, 256))], [(f"comfy.gguf.orig_shape.{'abcde'[i]}", shapes[i]) for i in (1, 0, 2, 3, 4)]
    )


@oddity("k = ")
def value_that_is_not_utf8() -> bytes:
    return with_value(Value(STRING, struct.pack("<Q", 3) + b"a\xff\x1b"))


@oddity("k = nan")
def value_that_is_not_a_number() -> bytes:
    return with_value(Value(F64, float("nan")))


@oddity("1 more metadata values")
def value_of_a_megabyte() -> bytes:
    return with_value("x" * (1 << 20))
