"""Split models: the first part opens all of them. Parts that do not fit together are in attacks/splits.py."""

import json
import os
import shutil

import gguf
import numpy as np
import pytest
import torch
from attacks.splits import part, write_parts
from gguf_writer import ARRAY, I32, STRING, U16, Tensor, Value, gguf_bytes

from lib_qswap.quant.gguf_file import GGUFError, open_gguf
from lib_qswap.quant.inspect import format_report, inspect_file
from lib_qswap.swap.manager import attached


@pytest.fixture(scope="module")
def written_by_gguf_py(tmp_path_factory):
    """A folder with a model of five tensors in three parts; the first part has no tensors."""
    folder = tmp_path_factory.mktemp("split")
    writer = gguf.GGUFWriter(folder / "model.gguf", "flux", split_max_tensors=3, small_first_shard=True)
    for i in range(5):
        values = np.random.default_rng(i).standard_normal((8, 64)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"blocks.{i}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def test_the_first_part_opens_what_gguf_py_split(written_by_gguf_py):
    names = sorted(os.listdir(written_by_gguf_py))
    assert names == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    file = open_gguf(written_by_gguf_py / names[0])
    assert list(file) == [f"blocks.{i}.weight" for i in range(5)]
    assert file.metadata["general.architecture"] == "flux"
    assert [info.part for info in file.tensors] == [1, 1, 1, 2, 2]
    expected = {
        tensor.name: tensor
        for name in names[1:]
        for tensor in gguf.GGUFReader(written_by_gguf_py / name).tensors
    }
    for name, tensor in file.items():
        raw = expected[name].data
        assert tensor.packed.numpy().tobytes() == raw.tobytes()
        read = torch.empty(tensor.packed_nbytes, dtype=torch.uint8)
        tensor.source.read_into(read)
        assert read.numpy().tobytes() == raw.tobytes()


def test_the_report_is_of_all_parts(written_by_gguf_py):
    paths = sorted(os.fspath(path) for path in written_by_gguf_py.iterdir())
    report = inspect_file(paths[0])
    json.dumps(report, allow_nan=False)
    assert report["files"] == [{"path": path, "bytes": os.path.getsize(path)} for path in paths]
    assert report["file_bytes"] == sum(map(os.path.getsize, paths))
    assert report["packed_bytes"] == 5 * 8 * 68
    assert [tensor["part"] for tensor in report["tensors"]] == [2, 2, 2, 3, 3]
    assert report["problems"] == []
    assert "GGUF version 3, 3 files," in format_report(report)


def test_bytes_that_belong_to_no_tensor_are_counted_in_each_part(tmp_path):
    first = write_parts(tmp_path, part(0, 2, "a") + bytes(100), part(1, 2, "b") + bytes(1000))
    assert any("1100 bytes" in problem for problem in inspect_file(first)["problems"])


def test_parts_are_found_beside_the_first_through_links(written_by_gguf_py, tmp_path, monkeypatch):
    (tmp_path / "blobs").mkdir()  # as download caches lay them out
    for i, path in enumerate(written_by_gguf_py.iterdir()):
        shutil.copy(path, tmp_path / "blobs" / str(i))
        (tmp_path / path.name).symlink_to(tmp_path / "blobs" / str(i))
    monkeypatch.chdir(tmp_path)
    assert len(open_gguf("model-00001-of-00003.gguf")) == 5


def test_the_original_shapes_in_the_first_part_are_for_all_parts(tmp_path):
    key = "comfy.gguf.orig_shape.conv"
    split = {"split.no": Value(U16, 0), "split.count": Value(U16, 2)}
    first = gguf_bytes(metadata={**split, key: Value(ARRAY, [64, 16, 3, 3], I32)})
    second = gguf_bytes([Tensor("conv", (36, 256))], {**split, "split.no": Value(U16, 1)})
    assert tuple(open_gguf(write_parts(tmp_path, first, second))["conv"].shape) == (64, 16, 3, 3)


def test_names_alone_are_enough_to_make_parts(tmp_path):
    first = write_parts(tmp_path, gguf_bytes([Tensor("a")]), gguf_bytes([Tensor("b")]), stem="flux.v1-00001")
    assert list(open_gguf(first)) == ["a", "b"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_model_that_was_joined_again_may_keep_the_name_of_a_part(tmp_path, count):
    path = tmp_path / "model-00001-of-00003.gguf"
    path.write_bytes(gguf_bytes([Tensor("a")], {"split.no": Value(U16, 0), "split.count": Value(U16, count)}))
    assert list(open_gguf(path)) == ["a"]


def test_a_part_that_changed_is_noticed(tmp_path):
    file = open_gguf(write_parts(tmp_path, part(0, 2, "a"), part(1, 2, "b")))
    file.check_unchanged()
    os.utime(tmp_path / "model-00002-of-00002.gguf", ns=(1, 1))
    with pytest.raises(GGUFError, match=r"model-00002-of-00002\.gguf: the model file changed"):
        file.check_unchanged()


def test_a_split_model_computes_from_all_its_files(tmp_path):
    shapes = {f"{i}.weight": np.random.default_rng(i).standard_normal((256, 256)) / 16 for i in range(4)}
    contents = []
    for number in range(2):
        names = list(shapes)[2 * number : 2 * number + 2]
        tensors = [
            Tensor(name, (256, 256), "Q8_0", gguf.quants.quantize(
                shapes[name].astype(np.float32), gguf.GGMLQuantizationType.Q8_0).tobytes())
            for name in names
        ]  # fmt: skip
        contents.append(
            gguf_bytes(tensors, {"split.no": Value(U16, number), "split.count": Value(U16, 2),
                                 "general.architecture": Value(STRING, "test")})
        )  # fmt: skip
    file = open_gguf(write_parts(tmp_path, *contents))
    with torch.device("meta"):
        layers = [torch.nn.Linear(256, 256, bias=False) for _ in range(4)]
        model = torch.nn.Sequential(*layers).requires_grad_(False)
    model.load_state_dict(dict(file), assign=True)
    x = torch.randn(3, 256)
    expected = x
    for tensor in file.values():
        expected = expected @ tensor.dequantize(torch.float32).T
    with attached(
        model, device="cpu", location="disk", budget_bytes=0, compute_dtype=torch.float32
    ) as attachment:
        attachment.check_files()
        with torch.inference_mode():
            torch.testing.assert_close(model(x), expected)
        assert {layer.home.kind for layer in attachment.layers} == {"disk"}
        os.utime(tmp_path / "model-00002-of-00002.gguf", ns=(1, 1))
        with pytest.raises(GGUFError, match="model-00002-of-00002"):
            attachment.check_files()
