"""Opening GGUF files: what is read, what is refused, and that no file can do worse than a GGUFError."""

import gc
import json
import os
import struct
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_writer import (
    ARRAY,
    F64,
    I32,
    STRING,
    U8,
    U16,
    U64,
    Tensor,
    Value,
    gguf_bytes,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib_qswap.quant.gguf_file import FileSlice, GGUFError, MappedFile, open_gguf
from lib_qswap.quant.inspect import format_report, inspect_file
from lib_qswap.quant.packed import PackedTensor

MIB = 1 << 20


@pytest.fixture
def write(tmp_path):
    """Writes bytes to a file, "model.gguf" by default, and gives its path."""

    def write(content, name="model.gguf"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def noise(nbytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8).tobytes()


def error_of(path):
    """The message of the GGUFError that opening gives, checked to be one line that names the file."""
    with pytest.raises(GGUFError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert "\n" not in message
    assert os.fspath(path) in message
    return message


# -- What is read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_come_with_name_type_shape_and_the_bytes_of_the_file(write, version):
    data = {"a.weight": noise(4 * 144, 1), "b.weight": noise(3 * 2 * 18, 2)}
    path = write(
        gguf_bytes(
            [
                Tensor("a.weight", (4, 256), "Q4_K", data["a.weight"]),
                Tensor("b.weight", (3, 64), "Q4_0", data["b.weight"]),
            ],
            version=version,
        )
    )
    file = open_gguf(path)
    assert file.version == version
    assert file.path == os.fspath(path)
    assert list(file) == ["a.weight", "b.weight"]
    assert len(file) == 2
    assert "c.weight" not in file
    a, b = file["a.weight"], file["b.weight"]
    assert isinstance(a, PackedTensor)
    assert (a.ggml_type, tuple(a.shape), a.dtype) == ("Q4_K", (4, 256), torch.float16)
    assert (b.ggml_type, tuple(b.shape)) == ("Q4_0", (3, 64))
    for name, tensor in file.items():
        assert tensor.packed.numpy().tobytes() == data[name]
        assert path.read_bytes()[tensor.source.offset :][: tensor.source.nbytes] == data[name]


def test_an_unknown_name_is_a_key_error(write):
    with pytest.raises(KeyError):
        open_gguf(write(gguf_bytes([Tensor("a")])))["b"]


def test_tensors_written_by_gguf_py_have_its_bytes_and_its_values(tmp_path):
    types = [gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q8_0", "F16", "F32")]
    values = np.random.default_rng(3).standard_normal((8, 64)).astype(np.float32)
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    for kind in types:
        writer.add_tensor(kind.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = open_gguf(path)
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert set(file) == {"Q4_0", "Q8_0", "F16", "F32"} == set(expected)
    for name, tensor in file.items():
        raw = expected[name].data
        assert tensor.packed.numpy().tobytes() == raw.tobytes()
        dequantized = gguf.quants.dequantize(raw, expected[name].tensor_type)
        assert np.std(dequantized) > 0.5
        np.testing.assert_array_equal(tensor.dequantize(torch.float32).numpy(), dequantized.reshape(8, 64))


def test_metadata_is_plain_python(write):
    metadata = {
        "general.architecture": "flux",
        "general.name": "Ünïcode",
        "flag": True,
        "small": Value(U8, 7),
        "large": Value(U64, 2**63),
        "negative": Value(I32, -3),
        "precise": Value(F64, 0.1),
        "names": ["a", "b"],
        "numbers": Value(ARRAY, [1, 2, 3], I32),
        "empty": Value(ARRAY, [], I32),
        "nested": Value(ARRAY, [Value(ARRAY, [1, 2], I32), Value(ARRAY, [3], I32)], ARRAY),
    }
    read = open_gguf(write(gguf_bytes(metadata=metadata))).metadata
    assert read == {
        "general.architecture": "flux",
        "general.name": "Ünïcode",
        "flag": True,
        "small": 7,
        "large": 2**63,
        "negative": -3,
        "precise": 0.1,
        "names": ["a", "b"],
        "numbers": [1, 2, 3],
        "empty": [],
        "nested": [[1, 2], [3]],
    }
    assert type(read["flag"]) is bool


@pytest.mark.parametrize("items", [[f"token {i}" for i in range(1000)], list(range(1000))])
def test_a_long_array_is_a_sequence_that_is_decoded_when_it_is_looked_into(write, items):
    file = open_gguf(write(gguf_bytes([Tensor("a")], {"tokens": items, "after": "read"})))
    tokens = file.metadata["tokens"]
    assert len(tokens) == 1000
    assert tokens[0] == items[0]
    assert tokens[-1] == items[-1]
    assert list(tokens) == items
    assert tokens[10:12] == items[10:12]
    assert file.metadata["after"] == "read"
    assert list(file) == ["a"]


def test_strings_of_a_vocabulary_that_straddle_the_reading_window_are_found(write):
    tokens = ["x" * length for length in range(3000)]  # 4.5 MB
    file = open_gguf(write(gguf_bytes([Tensor("a")], {"tokens": tokens})))
    assert list(file) == ["a"]
    assert list(file.metadata["tokens"]) == tokens


def test_a_token_that_is_not_utf8_is_read_with_a_replacement_character(write):
    raw = struct.pack("<IQ", STRING, 1) + struct.pack("<Q", 2) + b"a\xff"
    assert open_gguf(write(gguf_bytes(metadata={"t": Value(ARRAY, raw)}))).metadata["t"] == ["a\ufffd"]


def test_the_noted_original_shape_is_the_logical_shape(write):
    file = open_gguf(
        write(
            gguf_bytes(
                [Tensor("conv", (36, 256), "Q4_K"), Tensor("other", (36, 256), "Q4_K")],
                {
                    "comfy.gguf.orig_shape.conv": Value(ARRAY, [64, 16, 3, 3], I32),
                    "comfy.gguf.orig_shape.other": Value(ARRAY, [64, 16, 3, 4], I32),  # holds more elements
                },
            )
        )
    )
    assert tuple(file["conv"].shape) == (64, 16, 3, 3)
    assert file["conv"].packed.dim() == 1  # a row of 3 is no whole block
    assert tuple(file["other"].shape) == (36, 256)


def test_a_scalar_has_no_dimensions(write):
    scalar = open_gguf(write(gguf_bytes([Tensor("scale", (), "F32", struct.pack("<f", 2.5))])))["scale"]
    assert scalar.shape == ()
    assert scalar.dequantize().item() == 2.5


def test_another_alignment_is_honoured(write):
    path = write(
        gguf_bytes([Tensor("a", (3,), "I8", b"abc"), Tensor("b")], {"general.alignment": 256}, alignment=256)
    )
    a, b = open_gguf(path).tensors
    assert a.offset % 256 == b.offset % 256 == 0
    assert b.offset - a.offset == 256


# -- Aliasing the file ---------------------------------------------------------------------------------------


def test_quantized_tensors_alias_one_map_of_the_file(write):
    path = write(gguf_bytes([Tensor("a"), Tensor("b")]))
    file = open_gguf(path)
    assert file["a"].packed.data_ptr() == file["a"].packed.data_ptr()
    distance = file["b"].packed.data_ptr() - file["a"].packed.data_ptr()
    assert distance == file["b"].source.offset - file["a"].source.offset


@pytest.mark.parametrize("type", ["F32", "F16", "BF16"])
def test_plain_tensors_of_a_mebibyte_alias_the_map_and_smaller_ones_are_in_ram(write, type):
    size = 4 if type == "F32" else 2
    large, small = MIB // size, MIB // size - 1
    file = open_gguf(write(gguf_bytes([Tensor("large", (large,), type), Tensor("small", (small,), type)])))
    map_start = file.file.tensor(0, 1).data_ptr()
    for name, is_mapped in (("large", True), ("small", False)):
        tensor = file[name]
        assert isinstance(tensor, PackedTensor)
        assert tensor.ggml_type == type
        assert tensor.dtype == {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type]
        assert (tensor.packed.data_ptr() == map_start + tensor.source.offset) is is_mapped
        assert tensor.source.nbytes == tensor.packed_nbytes


def test_no_operation_writes_into_the_map(write):
    file = open_gguf(write(gguf_bytes([Tensor("large", (512, 512), "F32"), Tensor("a")])))
    for tensor in file.values():
        with pytest.raises(RuntimeError, match="immutable"):
            tensor.mul_(2)
        with pytest.raises(RuntimeError, match="immutable"):
            tensor[0] = 1
        values = tensor.dequantize()
        values.fill_(1)  # a copy, else this is signal 11
        assert tensor.dequantize().sum() == 0


def test_tensors_outlive_the_file_object_and_the_deletion_of_the_file(write):
    data = noise(2 * 144)
    path = write(gguf_bytes([Tensor("a", data=data)]))
    tensor = open_gguf(path)["a"]
    gc.collect()
    os.unlink(path)
    assert tensor.packed.numpy().tobytes() == data


def test_tensors_taken_in_inference_mode_are_ordinary_ones(write):
    path = write(gguf_bytes([Tensor("a"), Tensor("small", (4,), "F32")]))
    with torch.inference_mode():
        tensors = list(open_gguf(path).values())
    for tensor in tensors:
        assert not tensor.is_inference()
        assert not tensor.packed.is_inference()
        torch.nn.Parameter(tensor, requires_grad=True)


def test_opening_warns_of_nothing_and_leaves_no_file_open(write):
    path = write(gguf_bytes([Tensor("a"), Tensor("small", (4,), "F32")]))
    open_files = Path("/proc/self/fd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = len(list(open_files.iterdir())) if open_files.exists() else 0
        for _ in range(3):
            dict(open_gguf(path))
        with pytest.raises(GGUFError):
            open_gguf(write(b"GGUF", "broken.gguf"))
        gc.collect()
        after = len(list(open_files.iterdir())) if open_files.exists() else 0
    assert after == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_two_gigabytes_takes_neither_memory_nor_time(tmp_path):
    nbytes = 3072 * 1536 // 256 * 144
    tensors = [Tensor(f"blocks.{i}.weight", (3072, 1536), "Q4_K", b"", i * nbytes) for i in range(800)]
    path = tmp_path / "sparse.gguf"
    path.write_bytes(gguf_bytes(tensors))
    os.truncate(path, os.path.getsize(path) + 800 * nbytes)
    assert os.path.getsize(path) > 2e9

    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    dict(open_gguf(path))  # what Python and torch load for the first time
    seconds = []
    before = resident_bytes()
    for _ in range(5):
        start = time.perf_counter()
        file = open_gguf(path)
        seconds.append(time.perf_counter() - start)
    tensors = dict(file)
    assert resident_bytes() - before < 4 * MIB  # 800 tensor objects included
    assert len(tensors) == 800
    assert min(seconds) < 0.25  # reading two gigabytes takes longer on any machine


# -- Reading from the file -----------------------------------------------------------------------------------


@pytest.fixture(params=["positioned reads", "a handle for each thread"])
def reads(request, monkeypatch):
    """Both ways of reading: Windows has no os.preadv."""
    if request.param == "a handle for each thread":
        monkeypatch.delattr(os, "preadv", raising=False)
    elif not hasattr(os, "preadv"):
        pytest.skip("this system has no os.preadv")


def test_a_slice_reads_any_part_of_itself_into_a_tensor(write, reads):
    content = noise(1000)
    part = FileSlice(MappedFile(write(content)), 100, 500)
    whole = torch.empty(500, dtype=torch.uint8)
    part.read_into(whole)
    assert whole.numpy().tobytes() == content[100:600]
    rows = torch.zeros(4, 10, dtype=torch.uint8)
    part.read_into(rows[1:3], start=30)
    assert rows[1:3].numpy().tobytes() == content[130:150]
    assert rows[0].sum() == rows[3].sum() == 0
    inner = part.part(200, 50)
    assert (inner.offset, inner.nbytes) == (300, 50)


def test_a_long_read_comes_in_several_pieces(write, reads, monkeypatch):
    monkeypatch.setattr("lib_qswap.quant.mapped_file._READ_BYTES", 7)
    content = noise(100)
    destination = torch.empty(100, dtype=torch.uint8)
    FileSlice(MappedFile(write(content)), 0, 100).read_into(destination)
    assert destination.numpy().tobytes() == content


def test_threads_read_from_one_file_at_once(write, reads):
    content = noise(64 * 4096)
    file = MappedFile(write(content))
    wrong = []

    def read(first):
        for index in range(first, 64, 8):
            page = torch.empty(4096, dtype=torch.uint8)
            FileSlice(file, index * 4096, 4096).read_into(page)
            if page.numpy().tobytes() != content[index * 4096 :][:4096]:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    "destination",
    [
        torch.empty(10, dtype=torch.int8),
        torch.empty(20, dtype=torch.uint8)[::2],
        torch.empty(10, dtype=torch.uint8, device="meta"),
        torch.empty(11, dtype=torch.uint8),
    ],
    ids=["another dtype", "not contiguous", "not in host memory", "too long"],
)
def test_a_destination_that_does_not_fit_is_refused(write, destination):
    part = FileSlice(MappedFile(write(noise(100))), 0, 10)
    with pytest.raises(ValueError, match=r"slice|host memory"):
        part.read_into(destination)


def test_a_file_that_shrank_is_an_error_and_not_a_signal(write, reads):
    path = write(noise(1000))
    file = MappedFile(path)
    file.check_unchanged()
    os.truncate(path, 300)
    with pytest.raises(GGUFError, match=r"ends at byte 300, 200 bytes too early|size: 1000, now 300"):
        FileSlice(file, 200, 300).read_into(torch.empty(300, dtype=torch.uint8))
    with pytest.raises(GGUFError, match="size: 1000, now 300"):
        file.check_unchanged()


def test_a_file_that_was_written_to_replaced_or_deleted_is_noticed(write, tmp_path):
    path = write(noise(100))
    file = MappedFile(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(GGUFError, match="modification time"):
        file.check_unchanged()
    path = write(noise(100), "replaced.gguf")
    file = MappedFile(path)
    twin = write(noise(100), "twin.gguf")
    os.utime(twin, ns=(file.mtime_ns, file.mtime_ns))
    os.replace(twin, path)
    with pytest.raises(GGUFError, match="inode"):
        file.check_unchanged()
    os.unlink(path)
    with pytest.raises(GGUFError, match="gone"):
        file.check_unchanged()


# -- What is refused -----------------------------------------------------------------------------------------


def test_paths_that_are_no_readable_file_are_refused_in_one_line(write, tmp_path):
    assert "No such file" in error_of(tmp_path / "missing.gguf")
    assert "not a regular file" in error_of(tmp_path)
    assert "empty" in error_of(write(b""))
    with pytest.raises(GGUFError, match="cannot be opened"):
        open_gguf("a\0b")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "not a regular file" in error_of(tmp_path / "pipe")
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        locked = write(gguf_bytes(), "locked.gguf")
        locked.chmod(0)
        assert "Permission denied" in error_of(locked)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gguf_bytes(magic=b"PK\3\4"), "not a GGUF file"),
        (gguf_bytes(version=1), "version 1 is not supported"),
        (gguf_bytes(version=4), "version 4 is not supported"),
        (gguf_bytes(tensor_count=2**60), f"{2**60} tensors"),
        (gguf_bytes(metadata_count=2**60), f"{2**60} metadata values"),
        (gguf_bytes(tensor_count=70_000) + bytes(1 << 22), "70000 tensors"),
        (gguf_bytes(metadata={b"k\0": 1}), "NUL"),
        (gguf_bytes(metadata={b"\xff": 1}), "not UTF-8"),
        (gguf_bytes(metadata={"": 1}), "empty"),
        (gguf_bytes(metadata=[("twice", 1), ("twice", 2)]), "twice: appears twice"),
        (gguf_bytes(metadata={"k": struct.pack("<I", 13)}), "k: value type 13"),
        (gguf_bytes(metadata={"k": Value(STRING, struct.pack("<Q", 2**63))}), "k: needs"),
        (gguf_bytes(metadata={"k": Value(ARRAY, struct.pack("<IQ", U8, 2**63))}), f"k ({2**63} items)"),
        (gguf_bytes(metadata={"k": Value(ARRAY, struct.pack("<IQ", STRING, 2**61))}), f"k ({2**61} items)"),
        (gguf_bytes(metadata={"k": Value(ARRAY, struct.pack("<IQ", 13, 1))}), "item type 13"),
        (gguf_bytes(metadata={"k": Value(ARRAY, struct.pack("<IQ", ARRAY, 1) * 9)}), "nested"),
        (gguf_bytes(metadata={"k": Value(ARRAY, struct.pack("<IQ", ARRAY, 2**60))}), f"k ({2**60} items)"),
        (gguf_bytes(metadata={"general.alignment": Value(U16, 32)}), "general.alignment: must be a u32"),
        (gguf_bytes(metadata={"general.alignment": "32"}), "general.alignment: must be a u32"),
        (gguf_bytes(metadata={"general.alignment": 48}), "general.alignment: 48 is not a power of two"),
        (gguf_bytes(metadata={"general.alignment": 0}), "general.alignment: 0 is not a power of two"),
        (gguf_bytes(metadata={"split.count": "x"}), "split.count"),
    ],
)
def test_a_header_that_cannot_be_is_refused_with_the_field(write, content, says):
    assert says in error_of(write(content))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([Tensor("a"), Tensor("a")], "tensor a: appears twice"),
        ([Tensor("")], "name of tensor 0"),
        ([Tensor(b"a\0b")], "name of tensor 0"),
        ([Tensor("a\nb")], "name of tensor 0"),
        ([Tensor(b"\xc3(")], "name of tensor 0"),
        ([Tensor("n" * 2000)], "name of tensor 0"),
        ([Tensor("a", (1,) * 9, "F32")], "tensor a (dimension count): 9"),
        ([Tensor("a", (4, 0), "F32")], "tensor a (dimensions)"),
        ([Tensor("a", type=99)], "tensor a (type): type id 99 is unknown"),
        ([Tensor("a", type=4)], "tensor a (type): Q4_2 (type id 4) is no longer part of GGUF"),
        ([Tensor("a", type=31)], "tensor a (type): Q4_0_4_4 (type id 31) is no longer part of GGUF"),
        ([Tensor("a", (2, 255), "Q4_K", bytes(288))], "tensor a (shape): rows of 255"),
        ([Tensor("a", (2**32, 2**32), "F32", b"")], "tensor a (offset)"),
        ([Tensor("a", (2**63, 2**63, 2**63), "I8", b"")], "tensor a (offset)"),
        ([Tensor("a", (2, 256), "Q4_K", bytes(287))], "tensor a (offset)"),
        ([Tensor("a", offset=2**64 - 32)], "tensor a (offset)"),
        ([Tensor("a", offset=16)], "tensor a (offset): 16 is not a multiple of the alignment, 32"),
        ([Tensor("a"), Tensor("b", offset=32)], "tensor b (offset): begins inside of tensor a"),
        ([Tensor("a"), Tensor("b", offset=0)], "begins inside of tensor"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused_with_its_name_and_field(write, tensors, says):
    assert says in error_of(write(gguf_bytes(tensors)))


def test_an_unknown_type_says_what_to_do(write):
    assert "update QSwap" in error_of(write(gguf_bytes([Tensor("a", type=99)])))


def test_a_type_that_nothing_unpacks_is_named_when_its_tensor_is_asked_for(write):
    q8_1 = 9
    content = gguf_bytes([Tensor("fine"), Tensor("blocks.0.odd", (1, 256), q8_1, bytes(320))])
    file = open_gguf(write(content))
    assert file["fine"].ggml_type == "Q4_K"
    with pytest.raises(
        GGUFError, match=r"tensor blocks\.0\.odd \(type\): Q8_1 .* take a file of another type"
    ):
        dict(file)


def test_a_big_endian_file_says_how_to_convert_it(write):
    message = error_of(write(gguf_bytes([Tensor("a")], {"general.name": "big"}, byte_order=">")))
    assert "tensor a" in message
    assert "big-endian" in message
    assert "convert" in message


def test_the_metadata_of_a_big_endian_file_without_tensors_is_read(write):
    file = open_gguf(write(gguf_bytes(metadata={"general.name": "big", "n": 7}, byte_order=">")))
    assert file.metadata == {"general.name": "big", "n": 7}


def test_a_part_of_a_split_model_says_how_to_join_it(write):
    split = {"split.count": Value(U16, 3), "split.no": Value(U16, 0)}
    assert "part 1 of a model split into 3" in error_of(write(gguf_bytes([Tensor("a")], split)))
    by_name = write(gguf_bytes([Tensor("a")]), "model-00002-of-00003.gguf")
    message = error_of(by_name)
    assert "part 2 of a model split into 3" in message
    assert "llama-gguf-split --merge" in message
    single = {"split.count": Value(U16, 1), "split.no": Value(U16, 0)}
    assert len(open_gguf(write(gguf_bytes([Tensor("a")], single), "model-00001-of-00001.gguf"))) == 1


def test_hostile_arrays_cost_bounded_time(write):
    # 80 MB of empty strings: a loop over them would take seconds.
    count = 10_000_000
    content = gguf_bytes(metadata={"k": Value(ARRAY, struct.pack("<IQ", STRING, count) + bytes(8 * count))})
    path = write(content)
    start = time.perf_counter()
    assert "array items" in error_of(path)
    assert time.perf_counter() - start < 1


def test_a_header_that_never_ends_is_refused(tmp_path):
    path = tmp_path / "endless.gguf"
    path.write_bytes(gguf_bytes(metadata={"k": Value(STRING, struct.pack("<Q", 1 << 30))}))
    os.truncate(path, 2 << 30)
    assert "the header exceeds" in error_of(path)


# -- Any damage at all ---------------------------------------------------------------------------------------

VALID = gguf_bytes(
    [
        Tensor("a.weight", (4, 256), "Q4_K", noise(576)),
        Tensor("b.weight", (2, 3, 32), "Q8_0", noise(204)),
        Tensor("norm", (16,), "F32", noise(64)),
    ],
    {
        "general.architecture": "flux",
        "general.alignment": 32,
        "list": Value(ARRAY, [Value(ARRAY, ["x", "yz"])], ARRAY),
        "tokens": [f"t{i}" for i in range(300)],
        "comfy.gguf.orig_shape.b.weight": Value(ARRAY, [6, 32], I32),
    },
)
HEADER_BYTES = len(VALID) - 576 - 224 - 64


def opens_or_is_refused(path):
    """Everything that reading a file can do; only a GGUFError on opening may stop it."""
    try:
        file = open_gguf(path)
    except GGUFError as refusal:
        message = str(refusal)
    else:
        message = None
        for value in file.metadata.values():
            if isinstance(value, Sequence):
                list(value)
        for name, tensor in file.items():
            assert tensor.packed.nbytes == tensor.source.nbytes
            assert tensor.source.offset + tensor.source.nbytes <= os.path.getsize(path), name
            tensor.packed.sum()
        format_report(inspect_file(path))
    if message is not None:
        assert os.fspath(path) in message
        assert "\n" not in message


def test_every_truncation_of_a_file_is_refused(write):
    lengths = {*range(1, len(VALID), 17), *range(HEADER_BYTES - 100, HEADER_BYTES), len(VALID) - 1}
    for length in lengths:
        with pytest.raises(GGUFError):
            open_gguf(write(VALID[:length]))
    assert len(open_gguf(write(VALID))) == 3


fuzz = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_wrong_bytes_give_a_gguf_error_or_a_file_that_can_be_read(tmp_path, changes):
    content = bytearray(VALID)
    for position, byte in changes:
        content[position] = byte
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    opens_or_is_refused(path)


@fuzz
@given(
    st.integers(0, HEADER_BYTES - 8),
    st.sampled_from([0, 1, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**60, 2**63 - 1, 2**63, 2**64 - 1]),
    st.integers(0, len(VALID)),
)
def test_wrong_numbers_and_lengths_give_a_gguf_error_or_a_file_that_can_be_read(
    tmp_path, position, number, cut
):
    content = bytearray(VALID)
    content[position : position + 8] = struct.pack("<Q", number)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content[: len(content) - cut % 97] if cut % 3 == 0 else content)
    opens_or_is_refused(path)


# -- The report ----------------------------------------------------------------------------------------------


def test_the_report_counts_tensors_and_bytes_by_type(write):
    path = write(
        gguf_bytes(
            [Tensor("a", (4, 256)), Tensor("b", (2, 256)), Tensor("norm", (16,), "F32")],
            {"general.architecture": "flux", "tokens": [str(i) for i in range(500)]},
        )
    )
    report = inspect_file(path)
    json.dumps(report, allow_nan=False)
    assert report["version"] == 3
    assert report["file_bytes"] == os.path.getsize(path)
    assert report["tensor_count"] == 3
    assert report["parameters"] == 6 * 256 + 16
    assert report["packed_bytes"] == 6 * 144 + 64
    assert report["types"] == [
        {"type": "Q4_K", "tensors": 2, "parameters": 6 * 256, "bytes": 6 * 144},
        {"type": "F32", "tensors": 1, "parameters": 16, "bytes": 64},
    ]
    assert report["tensors"][1]["name"] == "b"
    assert report["tensors"][1]["shape"] == [2, 256]
    assert report["metadata"] == {"general.architecture": "flux"}
    assert report["metadata_count"] == 2
    assert report["problems"] == []


def test_the_report_names_what_will_make_trouble(write):
    q8_1 = 9  # 40 bytes a block of 32, and no published unpacking
    content = gguf_bytes([Tensor("odd", (1, 256), q8_1, bytes(320)), Tensor("a", offset=320)])
    report = inspect_file(write(content + bytes(1000)))
    problems = "\n".join(report["problems"])
    assert "odd" in problems
    assert "Q8_1" in problems
    assert "general.architecture is missing" in problems
    assert "1000 bytes of the data belong to no tensor" in problems
    assert "no tensors" in inspect_file(write(gguf_bytes()))["problems"][0]


def test_the_report_fits_on_a_screen_and_says_what_matters(write):
    tensors = [Tensor(f"blocks.{i}." + "x" * 200) for i in range(300)]
    metadata = {f"key.{i}": float("nan") for i in range(40)} | {"general.architecture": "flux"}
    text = format_report(inspect_file(write(gguf_bytes(tensors, metadata))))
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines[1:])) <= 110
    assert "300 tensors" in text
    assert "Q4_K" in text
    assert "4.50" in text  # bits per weight: 144 bytes for 256
    assert "no problems found" in text
