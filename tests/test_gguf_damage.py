"""Files made at random: valid ones are read as they were written, damaged ones are read or refused."""

import math
import struct

import pytest
from gguf_damage import HEADER_BYTES, KINDS, NUMBERS, VALID, Change, damaged, fields_of, read_all_or_refuse
from gguf_writer import (
    ARRAY,
    BOOL,
    F32,
    F64,
    GGML,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Tensor,
    Value,
    gguf_bytes,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib_qswap.quant.gguf_file import GGUFError, open_gguf
from lib_qswap.quant.gguf_reader import MetadataArray, MetadataText

fuzz = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(tmp_path, content, name="model.gguf"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


# -- Valid files ---------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=40)
SCALARS = {
    U8: st.integers(0, 2**8 - 1), I8: st.integers(-(2**7), 2**7 - 1), U16: st.integers(0, 2**16 - 1),
    I16: st.integers(-(2**15), 2**15 - 1), U32: st.integers(0, 2**32 - 1),
    I32: st.integers(-(2**31), 2**31 - 1), F32: st.floats(width=32, allow_nan=False), BOOL: st.booleans(),
    STRING: st.text(st.characters(codec="utf-8"), max_size=40), U64: st.integers(0, 2**64 - 1),
    I64: st.integers(-(2**63), 2**63 - 1), F64: st.floats(allow_nan=False),
}  # fmt: skip
KIND = st.sampled_from(sorted(SCALARS))


def array_of(kind):
    few = st.lists(SCALARS[kind], max_size=5)
    return st.one_of(few, few.map(lambda items: items * 300)).map(lambda items: Value(ARRAY, items, kind))


SIMPLE = KIND.flatmap(lambda kind: SCALARS[kind].map(lambda value: Value(kind, value)))
NESTED = st.lists(KIND.flatmap(array_of), max_size=3).map(lambda arrays: Value(ARRAY, arrays, ARRAY))
VALUES = st.one_of(SIMPLE, KIND.flatmap(array_of), NESTED, st.just(Value(STRING, "x" * 70_000)))
SHAPES = st.tuples(
    st.lists(st.integers(1, 3), max_size=3), st.integers(1, 2), st.sampled_from(sorted(GGML))
).map(lambda drawn: ((*drawn[0], drawn[1] * GGML[drawn[2]][1]), drawn[2]))


def plain(value):
    return (
        [plain(item) for item in value.value]
        if isinstance(value, Value) and value.kind == ARRAY
        else (value.value if isinstance(value, Value) else value)
    )


def as_read(value):
    if isinstance(value, MetadataText):
        return str(value)
    return [as_read(item) for item in value] if isinstance(value, (list, MetadataArray)) else value


@fuzz
@given(
    st.dictionaries(NAMES, VALUES, max_size=6),
    st.dictionaries(NAMES, SHAPES, max_size=6),
    st.sampled_from([8, 32, 256]),
    st.sampled_from([2, 3]),
)
def test_a_valid_file_is_read_as_it_was_written(tmp_path, metadata, shapes, alignment, version):
    metadata = {f"{key}.": value for key, value in metadata.items()} | {"general.alignment": alignment}
    tensors = []
    for i, (name, (shape, type)) in enumerate(shapes.items()):
        _, block_elements, block_bytes = GGML[type]
        data = bytes([i + 1]) * (math.prod(shape) // block_elements * block_bytes)
        tensors.append(Tensor(name, shape, type, data))
    path = written(tmp_path, gguf_bytes(tensors, metadata, alignment=alignment, version=version))
    file = open_gguf(path)
    assert {key: as_read(value) for key, value in file.metadata.items()} == {
        key: plain(value) for key, value in metadata.items()
    }
    assert list(file) == list(shapes)
    for tensor, read in zip(tensors, file.values(), strict=True):
        assert (read.ggml_type, tuple(read.shape)) == (tensor.type, tuple(tensor.shape))
        assert read.packed.numpy().tobytes() == tensor.data
    assert read_all_or_refuse(path) is None


# -- Damaged files -------------------------------------------------------------------------------------------


def test_every_truncation_of_a_file_is_refused(tmp_path):
    lengths = {*range(1, len(VALID), 17), *range(HEADER_BYTES - 100, HEADER_BYTES), len(VALID) - 1}
    for length in lengths:
        with pytest.raises(GGUFError):
            open_gguf(written(tmp_path, VALID[:length]))
    assert len(open_gguf(written(tmp_path, VALID))) == 3


@fuzz
@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_wrong_bytes_give_a_gguf_error_or_a_file_that_can_be_read(tmp_path, changes):
    content = bytearray(VALID)
    for position, byte in changes:
        content[position] = byte
    read_all_or_refuse(written(tmp_path, content))


@fuzz
@given(st.integers(0, HEADER_BYTES - 8), st.sampled_from(NUMBERS), st.integers(0, len(VALID)))
def test_wrong_numbers_and_lengths_give_a_gguf_error_or_a_file_that_can_be_read(
    tmp_path, position, number, cut
):
    content = bytearray(VALID)
    content[position : position + 8] = struct.pack("<Q", number)
    read_all_or_refuse(written(tmp_path, content[: len(content) - cut % 97] if cut % 3 == 0 else content))


CHANGES = st.lists(
    st.builds(Change, st.integers(0, len(KINDS) - 1), st.integers(0, 999), st.integers(0, 9999)),
    min_size=1,
    max_size=4,
)


@fuzz
@given(CHANGES)
def test_fields_that_are_wrong_missing_or_exchanged_give_a_gguf_error_or_a_file_that_can_be_read(
    tmp_path, changes
):
    read_all_or_refuse(written(tmp_path, damaged(VALID, changes)))


def split_in_two():
    return [
        gguf_bytes(
            [Tensor(name)],
            {
                "split.no": Value(U16, number),
                "split.count": Value(U16, 2),
                "split.tensors.count": Value(I32, 2),
            },
        )
        for number, name in enumerate("ab")
    ]


@fuzz
@given(CHANGES, st.sampled_from([0, 1]))
def test_a_damaged_part_of_a_split_model_gives_a_gguf_error_or_a_file_that_can_be_read(
    tmp_path, changes, which
):
    parts = split_in_two()
    parts[which] = damaged(parts[which], changes)
    first, _ = (written(tmp_path, part, f"model-0000{i + 1}-of-00002.gguf") for i, part in enumerate(parts))
    read_all_or_refuse(first)


def test_damage_begins_with_the_fields_of_the_file():
    fields = fields_of(VALID)
    assert b"".join(fields) == VALID
    assert len(fields) > 600  # 300 tokens and their lengths
    assert fields[0] == b"GGUF"
    assert b"tokens" in fields
    assert damaged(VALID, [Change(KINDS.index("delete"), 0, 0)]) == VALID[4:]
    assert damaged(VALID, [Change(KINDS.index("cut"), 3, 1)]) == VALID[:17]
