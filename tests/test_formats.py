"""The table of formats, row by row."""

from __future__ import annotations

import pytest
import torch

from lib_qswap.quant.formats import FORMATS, WITHDRAWN, by_ggml_id, scaled

ROWS = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())


# Of ggml: number, elements and bytes of a block.
NEWER_THAN_GGUF_PY = {"Q2_0": (42, 64, 18)}


def test_every_type_of_gguf_py_has_its_number_and_block_size():
    gguf = pytest.importorskip("gguf")
    published = {
        kind.name: (kind.value, *gguf.GGML_QUANT_SIZES[kind])
        for kind in gguf.GGMLQuantizationType
        if kind in gguf.GGML_QUANT_SIZES
    }
    table = {
        row.name: (row.ggml_id, row.block_elements, row.block_bytes)
        for row in FORMATS.values()
        if row.ggml_id is not None
    }
    published = NEWER_THAN_GGUF_PY | published
    assert table == {name: published[name] for name in table}
    assert {name for name in published if name not in table} == set()


def test_every_type_that_gguf_py_dequantizes_is_unpacked():
    gguf = pytest.importorskip("gguf")
    import numpy as np

    missing = []
    for row in FORMATS.values():
        if row.ggml_id is None or row.name not in gguf.GGMLQuantizationType.__members__:
            continue
        try:
            gguf.quants.dequantize(
                np.zeros((1, row.block_bytes), np.uint8), gguf.GGMLQuantizationType[row.name]
            )
        except NotImplementedError:
            continue
        if row.unpack is None:
            missing.append(row.name)
    assert missing == []


def test_the_types_that_forge_rounds_can_be_unpacked_like_forge():
    like_forge = {row.name for row in FORMATS.values() if row.unpack_like_forge is not None}
    # Forge's eleventh GGML type, BF16, is exact in both arithmetics.
    of_ggml = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    assert like_forge == of_ggml | {"BNB_NF4", "BNB_FP4"}


def test_only_activations_have_a_type_that_nothing_unpacks():
    assert [row.name for row in FORMATS.values() if row.unpack is None] == ["Q8_1"]


@ROWS
def test_a_row_is_found_by_its_number_in_a_file(format):
    if format.ggml_id is None:
        assert format.name in {"F8_E4M3", "F8_E5M2", "BNB_NF4", "BNB_FP4"}
    else:
        assert by_ggml_id(format.ggml_id) is format
    assert FORMATS[format.name] is format


@pytest.mark.parametrize("ggml_id", [*WITHDRAWN, 10_000, -1])
def test_a_number_without_a_type_finds_nothing(ggml_id):
    assert by_ggml_id(ggml_id) is None


@ROWS
def test_whole_blocks_have_a_size_and_parts_of_blocks_do_not(format):
    assert format.packed_bytes(0) == 0
    assert format.packed_bytes(7 * format.block_elements) == 7 * format.block_bytes
    with pytest.raises(ValueError, match="whole number"):
        format.packed_bytes(-format.block_elements)
    if format.block_elements > 1:
        with pytest.raises(ValueError, match=format.name):
            format.packed_bytes(format.block_elements + 1)


@ROWS
def test_a_plain_type_is_one_element_of_its_dtype(format):
    if format.dtype is None:
        assert format.block_elements > 1
    else:
        assert format.block_elements == 1
        assert format.block_bytes == torch.empty((), dtype=format.dtype).element_size()


def test_every_number_up_to_the_largest_is_a_type_or_was_one():
    known = {row.ggml_id for row in FORMATS.values()} - {None}
    assert sorted({*known, *WITHDRAWN}) == list(range(max(known) + 1))


def test_a_scale_makes_a_format_of_its_own_and_the_same_one_every_time():
    format = scaled("F8_E4M3", 0.25)
    assert (format.name, format.scale, format.dtype, format.packed_bytes(7)) == ("F8_E4M3", 0.25, None, 7)
    assert scaled("F8_E4M3", 0.25) is format
    assert scaled("F8_E4M3", 0.5) is not format
    assert scaled("F8_E4M3", 1.0) is FORMATS["F8_E4M3"]
    assert scaled("Q4_K", 1.0) is FORMATS["Q4_K"]
    with pytest.raises(ValueError, match="Q4_K takes no scale"):
        scaled("Q4_K", 0.5)


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        FORMATS["Q4_0"] = FORMATS["Q8_0"]
