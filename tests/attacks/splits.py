"""Models split over several files whose parts do not belong together."""

from __future__ import annotations

import shutil
from pathlib import Path

from gguf_writer import I32, STRING, U16, Tensor, Value, gguf_bytes

from .catalogue import attack, attack_in_folder


def part(number: int, count: int, *names: str, total: int | None = None) -> bytes:
    """Part `number` (from 0) of `count`, with a tensor for each name."""
    metadata = {"split.no": Value(U16, number), "split.count": Value(U16, count)}
    if total is not None:
        metadata["split.tensors.count"] = Value(I32, total)
    return gguf_bytes([Tensor(name) for name in names], metadata)


def write_parts(folder: Path, *parts: bytes, stem: str = "model") -> Path:
    """The parts under the names that splitters give; the path of the first."""
    paths = [folder / f"{stem}-{i + 1:05d}-of-{len(parts):05d}.gguf" for i in range(len(parts))]
    for path, content in zip(paths, parts, strict=True):
        path.write_bytes(content)
    return paths[0]


@attack_in_folder("is split into 3 files, and model-00002-of-00003.gguf is not beside this one")
def a_part_is_missing(folder: Path) -> Path:
    first = write_parts(folder, part(0, 3, "a"), part(1, 3, "b"), part(2, 3, "c"))
    (folder / "model-00002-of-00003.gguf").unlink()
    return first


@attack_in_folder("model-00004-of-00999.gguf and 995 more are not beside this one")
def nearly_all_parts_are_missing(folder: Path) -> Path:
    path = folder / "model-00001-of-00999.gguf"
    path.write_bytes(part(0, 999, "a"))
    return path


@attack_in_folder("part 2 of a model split into 3 files: open the first, model-00001-of-00003.gguf")
def a_later_part_is_opened(folder: Path) -> Path:
    write_parts(folder, part(0, 3, "a"), part(1, 3, "b"), part(2, 3, "c"))
    return folder / "model-00002-of-00003.gguf"


@attack_in_folder("part 2 of a model split into 3 files: open the first, model-00001-of-00003.gguf")
def a_later_part_says_so_only_by_its_name(folder: Path) -> Path:
    path = folder / "model-00002-of-00003.gguf"
    path.write_bytes(gguf_bytes([Tensor("a")]))
    return path


@attack("this one must end in -00001-of-00003.gguf")
def a_part_was_given_another_name() -> bytes:
    return part(0, 3, "a")


@attack_in_folder("model-00002-of-00002.gguf: split.no, split.count: part 1 of 2, unlike its name")
def parts_that_lead_back_to_the_first(folder: Path) -> Path:
    first = write_parts(folder, part(0, 2, "a"), b"")
    shutil.copy(first, folder / "model-00002-of-00002.gguf")
    return first


@attack_in_folder("model-00002-of-00002.gguf: split.no, split.count: part 2 of 3, unlike its name")
def a_part_of_another_split(folder: Path) -> Path:
    return write_parts(folder, part(0, 2, "a"), part(1, 3, "b"))


@attack_in_folder("model-00002-of-00002.gguf: tensor a: part 1 of the model has one of the same name")
def a_tensor_that_two_parts_have(folder: Path) -> Path:
    return write_parts(folder, part(0, 2, "a"), part(1, 2, "b", "a"))


@attack_in_folder("split.tensors.count: 3 tensors, the 2 files have 2")
def a_tensor_that_no_part_has(folder: Path) -> Path:
    return write_parts(folder, part(0, 2, "a", total=3), part(1, 2, "b", total=3))


@attack_in_folder("model-00002-of-00002.gguf: not a GGUF file")
def a_part_in_another_format(folder: Path) -> Path:
    return write_parts(folder, part(0, 2, "a"), b"PK\3\4 and so on")


@attack_in_folder("model-00002-of-00002.gguf: not a regular file")
def a_part_that_is_a_folder(folder: Path) -> Path:
    first = write_parts(folder, part(0, 2, "a"), part(1, 2, "b"))
    (folder / "model-00002-of-00002.gguf").unlink()
    (folder / "model-00002-of-00002.gguf").mkdir()
    return first


@attack_in_folder("model-00002-of-00002.gguf: tensor b (offset): Q4_K of shape (2, 256) ends at byte")
def a_later_part_is_truncated(folder: Path) -> Path:
    return write_parts(folder, part(0, 2, "a"), part(1, 2, "b")[:-1])


@attack("split.no, split.count: part 4 of 3 makes no sense")
def a_part_beyond_the_last() -> bytes:
    return part(3, 3, "a")


@attack("split.no, split.count: part 1 of 65535 makes no sense")
def more_parts_than_any_model() -> bytes:
    return part(0, 65535, "a")


@attack("split.count: must be a number of 0 or more, not 'x'")
def split_count_that_is_text() -> bytes:
    return gguf_bytes([Tensor("a")], {"split.count": Value(STRING, "x")})


@attack("split.count: must be a number of 0 or more, not -1")
def split_count_that_is_negative() -> bytes:
    return gguf_bytes([Tensor("a")], {"split.count": Value(I32, -1)})


@attack("split.no: must be a number of 0 or more, not True")
def split_number_that_is_a_truth_value() -> bytes:
    return gguf_bytes([Tensor("a")], {"split.count": Value(U16, 2), "split.no": True})
