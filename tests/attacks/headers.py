"""Magic, version, byte order, counts."""

from __future__ import annotations

import struct

from gguf_writer import Tensor, gguf_bytes

from .catalogue import attack, oddity


@attack("not a GGUF file (it begins with b'PK\\x03\\x04'")
def another_format() -> bytes:
    return gguf_bytes([Tensor("a")], magic=b"PK\3\4")


@attack("not a GGUF file (it begins with b'ggml'")
def the_predecessor_of_gguf() -> bytes:
    return gguf_bytes([Tensor("a")], magic=b"ggml")


@attack("not a GGUF file (it begins with b'FUGG'")
def magic_in_the_wrong_order() -> bytes:
    return gguf_bytes([Tensor("a")], magic=b"FUGG", byte_order=">")


@attack("this is a web page, not the file: download it again")
def a_page_of_html_that_was_saved_instead() -> bytes:
    return b"<!DOCTYPE html><html><body>Sign in to download this model</body></html>"


@attack("this is a web page, not the file: download it again")
def a_page_of_html_after_a_byte_order_mark() -> bytes:
    return b"\xef\xbb\xbf\r\n<html>"


@attack("this is a Git LFS pointer: run `git lfs pull`")
def a_pointer_of_git_lfs() -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 6796816384\n"


@attack("this is a safetensors file: rename it to .safetensors (`qswap run` takes GGUF only)")
def a_safetensors_file() -> bytes:
    return struct.pack("<Q", 2) + b"{}"


@attack("not a GGUF file (it begins with b'\\x01\\x00\\x00\\x00'")
def what_could_be_a_safetensors_file_but_for_its_length() -> bytes:
    return struct.pack("<Q", 1 << 40 | 1) + b"{" + bytes(64)


@attack("not a GGUF file (it begins with b'<htm'")
def four_bytes_of_a_page() -> bytes:
    return b"<htm"


@attack("not a GGUF file (it begins with b'\\x00\\x00\\x00\\x00'")
def zeros() -> bytes:
    return bytes(1 << 20)


@attack("version 0 is not supported")
def version_0() -> bytes:
    return gguf_bytes([Tensor("a")], version=0)


@attack("version 1 is not supported (2 and 3 are): convert the model again")
def version_1() -> bytes:
    # Counts and lengths have 32 bits there.
    return b"GGUF" + struct.pack("<III", 1, 1, 0) + struct.pack("<I", 1) + b"a" + bytes(64)


@attack("version 1 (big-endian) is not supported")
def version_1_of_a_big_endian_machine() -> bytes:
    return gguf_bytes([Tensor("a")], version=1, byte_order=">")


@attack("version 4 is not supported")
def a_version_to_come() -> bytes:
    return gguf_bytes([Tensor("a")], version=4)


@attack("is not supported (2 and 3 are)")
def version_of_all_ones() -> bytes:
    return gguf_bytes([Tensor("a")], version=2**32 - 1)


@attack("tensor a (byte order): the file is big-endian, which is not supported for Q4_K: convert it")
def big_endian() -> bytes:
    return gguf_bytes([Tensor("a")], {"general.name": "big"}, byte_order=">")


@attack("tensor a (byte order): the file is big-endian")
def big_endian_of_version_2() -> bytes:
    return gguf_bytes([Tensor("a")], version=2, byte_order=">")


@attack(f"{2**60} tensors")
def tensor_count_of_2_to_60() -> bytes:
    return gguf_bytes([Tensor("a")], tensor_count=2**60)


@attack(f"{2**64 - 1} tensors")
def tensor_count_of_minus_one() -> bytes:
    return gguf_bytes([Tensor("a")], tensor_count=2**64 - 1)


@attack(f"{2**60} metadata values")
def metadata_count_of_2_to_60() -> bytes:
    return gguf_bytes([Tensor("a")], {"k": 1}, metadata_count=2**60)


@attack(f"{2**61} tensors and {2**63} metadata values")
def counts_whose_sizes_overflow_to_nothing() -> bytes:
    return gguf_bytes(tensor_count=2**61, metadata_count=2**63)


@attack("70000 tensors and 0 metadata values make no sense")
def more_tensors_than_any_model() -> bytes:
    return gguf_bytes(tensor_count=70_000) + bytes(1 << 22)


@attack("name of tensor 1")
def one_tensor_more_than_there_are() -> bytes:
    return gguf_bytes([Tensor("a")], tensor_count=2)


@attack("metadata key k: appears twice")
def one_metadata_value_more_than_there_are() -> bytes:
    # The first tensor is taken for it: its name for a key, the number of its dimensions for a type.
    return gguf_bytes([Tensor("k")], {"k": 1}, metadata_count=2)


@oddity("no tensors")
def no_tensors() -> bytes:
    return gguf_bytes(metadata={"general.architecture": "flux"})


@oddity("no tensors")
def nothing_at_all() -> bytes:
    return gguf_bytes()


@oddity("general.name = big")
def big_endian_without_tensors() -> bytes:
    return gguf_bytes(metadata={"general.name": "big"}, byte_order=">")


@oddity("GGUF version 2")
def version_2() -> bytes:
    return gguf_bytes([Tensor("a")], version=2)
