"""Opening GGUF files: what is read, what is refused, and that no file can do worse than a GGUFError."""

import errno
import gc
import json
import os
import struct
import sys
import threading
import time
import warnings
from pathlib import Path
from random import Random

import gguf
import numpy as np
import pytest
import torch
from gguf_writer import (
    ARRAY,
    F32,
    F64,
    I32,
    STRING,
    U8,
    U64,
    Tensor,
    Value,
    gguf_bytes,
)

from lib_qswap.quant import iq_grids
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


def test_a_default_device_is_of_no_account(write):
    packed, plain = Tensor("a", (4, 256), "Q4_K", noise(4 * 144)), Tensor("b", (32,), "F32", noise(32 * 4))
    file = open_gguf(write(gguf_bytes([packed, plain])))

    def both():
        return file["a"].dequantize(torch.float32), file["b"]

    usual = both()
    iq_grids.grid_rows.cache_clear()
    with torch.device("meta"):
        found = both()
        table = iq_grids.grid_rows(iq_grids.IQ2_XXS, torch.device("cpu"), torch.int64)
    assert table.device.type == "cpu"
    for one, other in zip(usual, found, strict=True):
        assert other.device.type == "cpu"
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


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


@pytest.mark.parametrize("byte_order", "<>")
@pytest.mark.parametrize("seed", range(3))
def test_what_follows_strings_of_any_length_is_found(write, byte_order, seed):
    # Lengths below 248 are read in one way, others in another; a window has 4,096 to 131,072 bytes.
    lengths = [0, 1, 7, 8, 9, 40, 240, 247, 248, 249, 255, 256, 300, 4_088, 4_096, 5_000, 70_000, 200_000]
    random = Random(seed)
    metadata = {}
    for count in [3, 40, 1, 400, 2000, 20, 20]:
        # Of all together a header has room for 64 MiB.
        weights = [random.choice([1, 100, 5000]) / max(1, length / 1000) for length in lengths]
        strings = [
            chr(random.randrange(1, 128)) * length for length in random.choices(lengths, weights, k=count)
        ]
        metadata |= {f"{count} strings, {len(metadata)}": strings, f"after {len(metadata)}": 7}
    file = open_gguf(write(gguf_bytes(metadata=metadata, byte_order=byte_order)))
    found = {key: value if value == 7 else list(value) for key, value in file.metadata.items()}
    assert found == metadata


def test_the_header_of_a_model_with_a_very_large_vocabulary_is_within_the_limits(write):
    # Gemma 3 with 27 billion parameters: 262,144 tokens with scores and types, 514,906 merges, 808 tensors.
    def strings(count):
        return Value(ARRAY, struct.pack("<IQ", STRING, count) + (struct.pack("<Q", 9) + b"two words") * count)

    metadata = {f"gemma3.key.{i}": i for i in range(50)} | {
        "tokenizer.ggml.tokens": strings(262_144),
        "tokenizer.ggml.scores": Value(ARRAY, struct.pack("<IQ", F32, 262_144) + bytes(4 * 262_144)),
        "tokenizer.ggml.token_type": Value(ARRAY, struct.pack("<IQ", I32, 262_144) + bytes(4 * 262_144)),
        "tokenizer.ggml.merges": strings(514_906),
    }
    file = open_gguf(write(gguf_bytes([Tensor(f"blk.{i}.weight") for i in range(808)], metadata)))
    assert len(file) == 808
    assert file.metadata["tokenizer.ggml.merges"][-1] == "two words"


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


@pytest.mark.parametrize("type", ["F32", "Q8_0"])
@pytest.mark.parametrize("behind", [True, False])
def test_an_empty_tensor_is_a_mark_that_stays(write, type, behind):
    """SDXL checkpoints of v-prediction have one named v_pred; a converter may not pad behind the last."""
    tensors = [Tensor("weight", (32,), "F32", bytes(128)), Tensor("v_pred", (0,), type, b"")]
    file = open_gguf(write(gguf_bytes(tensors if behind else tensors[::-1])))
    mark = file["v_pred"]
    assert tuple(mark.shape) == (0,)
    assert mark.dequantize().numel() == torch.nn.Parameter(mark.dequantize()).numel() == 0
    assert file["weight"].shape == (32,)
    assert not any("belong to no tensor" in problem for problem in inspect_file(file.path)["problems"])


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


def test_an_empty_tensor_lies_in_its_file(write):
    marks = [Tensor("weight", (32,), "F32", bytes(128)), Tensor("v_pred", (0,), "F32", b"", offset=1 << 40)]
    with pytest.raises(GGUFError, match=r"tensor v_pred .*the file has "):
        open_gguf(write(gguf_bytes(marks)))


@pytest.mark.parametrize("type", ["F32", "F16", "BF16"])
def test_plain_tensors_of_a_mebibyte_alias_the_map_and_smaller_ones_are_in_ram(write, type):
    size = 4 if type == "F32" else 2
    large, small = MIB // size, MIB // size - 1
    file = open_gguf(write(gguf_bytes([Tensor("large", (large,), type), Tensor("small", (small,), type)])))
    map_start = file.files[0].tensor(0, 1).data_ptr()
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
    assert min(seconds) < 0.05  # reading two gigabytes takes longer on any machine


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


class Gone:
    """A handle of a network drive that was gone for a while."""

    def seek(self, _offset):
        raise OSError(errno.ESTALE, "Stale file handle")


def test_a_handle_that_went_bad_is_opened_anew_once(write, monkeypatch):
    monkeypatch.delattr(os, "preadv", raising=False)
    content = noise(100)
    file = MappedFile(write(content))
    destination = torch.zeros(100, dtype=torch.uint8)
    file._handles.file = Gone()
    FileSlice(file, 0, 100).read_into(destination)
    assert destination.numpy().tobytes() == content
    file._handles.file = Gone()
    Path(file.path).unlink()
    with pytest.raises(OSError, match=Path(file.path).name):
        FileSlice(file, 0, 100).read_into(destination)


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


# -- What is refused (most of it in tests/attacks) -----------------------------------------------------------


def test_a_path_that_no_file_can_have_is_refused():
    with pytest.raises(GGUFError, match="cannot be opened"):
        open_gguf("a\0b")


def test_a_long_text_is_read_when_it_is_asked_for(write):
    text = "é" * 100_000
    value = open_gguf(write(gguf_bytes(metadata={"tokenizer.json": text}))).metadata["tokenizer.json"]
    assert not isinstance(value, str)
    assert repr(value) == "<text of 200000 bytes>"
    assert str(value) == text


def test_a_type_that_nothing_unpacks_is_named_when_its_tensor_is_asked_for(write):
    q8_1 = 9
    content = gguf_bytes([Tensor("fine"), Tensor("blocks.0.odd", (1, 256), q8_1, bytes(320))])
    file = open_gguf(write(content))
    assert file["fine"].ggml_type == "Q4_K"
    assert "blocks.0.odd" in file
    with pytest.raises(
        GGUFError, match=r"tensor blocks\.0\.odd \(type\): Q8_1 .* take a file of another type"
    ):
        dict(file)


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
