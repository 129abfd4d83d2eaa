"""A model split over several files, `NAME-00001-of-00003.gguf` and so on: finding all parts by the first.

Each part is a GGUF file with tensors of its own. `split.no` (from 0), `split.count` and, in the first,
`split.tensors.count` (of all parts) say so; the first holds the metadata of the model. Splitters are
llama.cpp's gguf-split and gguf-py's writer.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

from .gguf_header import Header, read_header
from .mapped_file import GGUFError, MappedFile

_NAME = re.compile(r"-(\d{5})-of-(\d{5})(\.gguf)$", re.IGNORECASE)
MAX_PARTS = 1000
_NAMED_MISSING = 3  # of the missing parts, in the message


class Part(NamedTuple):
    file: MappedFile
    header: Header


def open_parts(path: str | os.PathLike[str]) -> list[Part]:
    """The file at `path`, with all the others where it is the first of several.

    Raises GGUFError for a later part (naming the first), for a part that is missing or belongs to another
    model, and for any part that cannot be opened.
    """
    first = _open(path)
    number, count = _place(first)
    if count == 1:
        return [first]
    paths = _paths(first.file.path, number, count)
    if number > 0:
        raise GGUFError(
            f"{first.file.path}: part {number + 1} of a model split into {count} files:"
            f" open the first, {os.path.basename(paths[0])}"
        )
    _refuse_missing(first, paths)
    parts = [first, *(_open(name) for name in paths[1:])]
    for i, part in enumerate(parts):
        number, of = _place(part)
        if (number, of) != (i, count):
            raise GGUFError(
                f"{part.file.path}: split.no, split.count: part {number + 1} of {of}, unlike its name:"
                " not of this model; download it again"
            )
    _check_total(parts)
    return parts


def _open(path: str | os.PathLike[str]) -> Part:
    file = MappedFile(path)
    return Part(file, read_header(file))


def _place(part: Part) -> tuple[int, int]:
    """(number from 0, count) of a part, by its metadata or else its name; (0, 1) of a file that is whole."""
    count = _integer(part, "split.count", -1)
    number = _integer(part, "split.no", 0)
    match = _NAME.search(part.file.path)
    if count < 0:
        number, count = (int(match[1]) - 1, int(match[2])) if match else (0, 1)
    if count <= 1:  # 0 where parts have been merged
        return 0, 1
    if number not in range(count) or count > MAX_PARTS:
        raise GGUFError(
            f"{part.file.path}: split.no, split.count: part {number + 1} of {count} makes no sense:"
            " damaged; download it again"
        )
    return number, count


def _integer(part: Part, key: str, default: int) -> int:
    value: Any = part.header.metadata.get(key, default)
    if type(value) is not int or (value < 0 and key in part.header.metadata):
        raise GGUFError(f"{part.file.path}: {key}: must be a number of 0 or more, not {value!r}")
    return value


def _paths(path: str, number: int, count: int) -> list[str]:
    """Where all parts are, by the path of one of them."""
    match = _NAME.search(path)
    if match is None or (int(match[1]), int(match[2])) != (number + 1, count):
        raise GGUFError(
            f"{path}: part {number + 1} of a model split into {count} files, which are found by their names:"
            f" this one must end in -{number + 1:05d}-of-{count:05d}.gguf"
        )
    stem = path[: match.start()]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}{match[3]}" for i in range(count)]


def _refuse_missing(first: Part, paths: list[str]) -> None:
    missing = [os.path.basename(path) for path in paths if not os.path.exists(path)]
    if missing:
        more = f" and {len(missing) - _NAMED_MISSING} more" if len(missing) > _NAMED_MISSING else ""
        are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise GGUFError(
            f"{first.file.path}: the model is split into {len(paths)} files, and"
            f" {', '.join(missing[:_NAMED_MISSING])}{more} {are} not beside this one: download {them} too"
        )


def _check_total(parts: list[Part]) -> None:
    first = parts[0]
    found = sum(len(part.header.tensors) for part in parts)
    announced = _integer(first, "split.tensors.count", found)
    if announced != found:
        raise GGUFError(
            f"{first.file.path}: split.tensors.count: {announced} tensors, the {len(parts)} files have"
            f" {found}: damaged, or parts of different models; download them again"
        )
