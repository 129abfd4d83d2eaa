"""Reading the header of a GGUF file: metadata and tensor descriptions, none of which is believed.

Layout (GGUF specification, versions 2 and 3): magic "GGUF", version u32, tensor count u64, metadata count
u64; the metadata (key string, value type u32, value); the tensor descriptions (name string, dimension count
u32, dimensions u64 each with the fastest first, ggml_type u32, offset u64 from the start of the data);
padding up to `general.alignment`; the data. A string is a u64 length and UTF-8 bytes.

Each length and count is compared with what is left of the file before anything is allocated or looped over,
and limits far above any real model's bound the time and memory that a hostile file can take.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .mapped_file import GGUFError, MappedFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Value types of metadata: struct codes by type number; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _UINT32 = 8, 9, 4

# Limits of a header. The largest vocabularies have some 260,000 tokens and as many merges in about 20 MB.
MAX_HEADER_BYTES = 256 << 20
MAX_ARRAY_ITEMS = 1 << 22
MAX_TENSORS = MAX_METADATA = 1 << 16
MAX_NAME_BYTES = 1024
MAX_KEY_BYTES = 1 << 16
MAX_DIMENSIONS = 8
MAX_ARRAY_DEPTH = 4

# Longer arrays are decoded when they are first looked into.
_EAGER_ARRAY_ITEMS = 256
_WINDOW_BYTES = 1 << 18


class RawTensor(NamedTuple):
    """A tensor as the header describes it: fastest dimension first, offset from the start of the data."""

    name: str
    dimensions: tuple[int, ...]
    ggml_id: int
    offset: int


class Header(NamedTuple):
    version: int
    byte_order: str  # of struct: "<" or ">"
    metadata: dict[str, Any]
    tensors: tuple[RawTensor, ...]
    alignment: int
    data_start: int


class MetadataArray(Sequence):
    """A long array of the metadata (a tokenizer's vocabulary), decoded when it is first looked into."""

    def __init__(
        self, file: MappedFile, byte_order: str, key: str, item_type: int, count: int, offset: int
    ) -> None:
        self._place = (file, byte_order, key, offset)
        self._item_type = item_type
        self._count = count
        self._items: list[Any] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if self._items is None:
            file, byte_order, key, offset = self._place
            reader = _Reader(file, byte_order, offset)
            self._items = reader.array_items(key, self._item_type, self._count, depth=1)
        return self._items[index]

    def __repr__(self) -> str:
        return f"<array of {self._count}>"


class _Reader:
    """A position in the file, and a window of its bytes. `field` is what errors call the bytes read."""

    def __init__(self, file: MappedFile, byte_order: str = "<", position: int = 0) -> None:
        self.file = file
        self.byte_order = byte_order
        self.position = position
        self.array_items_seen = 0
        self._window = b""
        self._window_start = 0

    def error(self, message: str) -> GGUFError:
        return GGUFError(f"{self.file.path}: {message}")

    @property
    def remaining(self) -> int:
        return min(self.file.size, MAX_HEADER_BYTES) - self.position

    def need(self, nbytes: int, field: str) -> None:
        """GGUFError unless `nbytes` more bytes are there to be the header's."""
        if nbytes <= self.remaining:
            return
        if self.position + nbytes <= self.file.size:
            raise self.error(
                f"{field}: the header exceeds {MAX_HEADER_BYTES >> 20} MiB: damaged; download it again"
            )
        raise self.error(
            f"{field}: needs {nbytes} bytes at {self.position}, the file has {self.file.size}:"
            " truncated or damaged; download it again"
        )

    def _bytes_at(self, nbytes: int, field: str) -> int:
        """Position of the next `nbytes` bytes in the window."""
        self.need(nbytes, field)
        start = self.position - self._window_start
        if start < 0 or start + nbytes > len(self._window):
            window = bytearray(min(max(nbytes, _WINDOW_BYTES), self.file.size - self.position))
            try:
                count = self.file.read_at(self.position, memoryview(window))
            except OSError as error:
                raise self.error(f"{field}: cannot be read: {error.strerror or error}") from error
            if count < nbytes:
                raise self.error(f"{field}: the file ended while it was read")
            self._window, self._window_start, start = bytes(window), self.position, 0
        return start

    def take(self, nbytes: int, field: str) -> bytes:
        start = self._bytes_at(nbytes, field)
        self.position += nbytes
        return self._window[start : start + nbytes]

    def numbers(self, code: str, count: int, field: str) -> tuple[Any, ...]:
        layout = f"{self.byte_order}{count}{code}"
        size = struct.calcsize(layout)
        start = self._bytes_at(size, field)
        self.position += size
        return struct.unpack_from(layout, self._window, start)

    def number(self, code: str, field: str) -> Any:
        return self.numbers(code, 1, field)[0]

    def string(self, field: str, max_bytes: int | None = None) -> bytes:
        length = self.number("Q", f"{field} (length)")
        if max_bytes is not None and length > max_bytes:
            raise self.error(f"{field}: {length} bytes long, at most {max_bytes} make sense: damaged file")
        return self.take(length, field)

    def name(self, field: str, max_bytes: int) -> str:
        """A string that something is called by: UTF-8, printable, not empty."""
        raw = self.string(field, max_bytes)
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{field}: {raw[:40]!r} is not UTF-8") from error
        if not text or not text.isprintable():
            raise self.error(f"{field}: {text[:40]!r} is empty or contains NUL or other control characters")
        return text

    def value(self, field: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], field)
        if kind == _STRING:
            return self.string(field).decode(errors="replace")
        if kind == _ARRAY:
            return self.array(field, depth=1)
        raise self.error(f"{field}: value type {kind} is not one of GGUF's (0 to 12)")

    def array(self, field: str, depth: int) -> Any:
        if depth > MAX_ARRAY_DEPTH:
            raise self.error(f"{field}: arrays nested more than {MAX_ARRAY_DEPTH} deep")
        item_type = self.number("I", f"{field} (item type)")
        count = self.number("Q", f"{field} (item count)")
        self.need(count * self._smallest_item(field, item_type), f"{field} ({count} items)")
        self.array_items_seen += count
        if self.array_items_seen > MAX_ARRAY_ITEMS:
            raise self.error(f"{field}: more than {MAX_ARRAY_ITEMS} array items: damaged; download it again")
        start = self.position
        if count <= _EAGER_ARRAY_ITEMS or item_type == _ARRAY:
            return self.array_items(field, item_type, count, depth)
        if item_type == _STRING:
            self._skip_strings(field, count)
        else:
            self.position += count * self._smallest_item(field, item_type)
        return MetadataArray(self.file, self.byte_order, field, item_type, count, start)

    def _smallest_item(self, field: str, item_type: int) -> int:
        """Bytes that an item takes at least."""
        if item_type in _SCALARS:
            return struct.calcsize(_SCALARS[item_type])
        if item_type == _STRING:
            return 8
        if item_type == _ARRAY:
            return 12
        raise self.error(f"{field}: item type {item_type} is not one of GGUF's (0 to 12)")

    def array_items(self, field: str, item_type: int, count: int, depth: int) -> list[Any]:
        if item_type in _SCALARS:
            return list(self.numbers(_SCALARS[item_type], count, field))
        if item_type == _STRING:
            return [self.string(field).decode(errors="replace") for _ in range(count)]
        return [self.array(field, depth + 1) for _ in range(count)]

    def _skip_strings(self, field: str, count: int) -> None:
        length_at = struct.Struct(f"{self.byte_order}Q").unpack_from
        end = self.position + self.remaining
        # `_bytes_at` without a call for most of the strings: a vocabulary has a quarter of a million.
        window, window_start, position = self._window, self._window_start, self.position
        for _ in range(count):
            index = position - window_start
            if index + 8 > len(window):
                self.position = position
                index = self._bytes_at(8, field)
                window, window_start = self._window, self._window_start
            length = length_at(window, index)[0]
            if position + 8 + length > end:
                self.position = position
                self.need(8 + length, field)
            position += 8 + length
        self.position = position


def read_header(file: MappedFile) -> Header:
    """Read all before the data, and check what can be without knowing tensor types. Raises GGUFError."""
    reader = _Reader(file)
    magic = reader.take(4, "magic")
    if magic != MAGIC:
        raise reader.error(f"not a GGUF file (it begins with {magic!r}, not {MAGIC!r})")
    version = reader.number("I", "version")
    if version not in VERSIONS and _swapped(version) in VERSIONS:
        reader.byte_order, version = ">", _swapped(version)
    if version not in VERSIONS:
        raise reader.error(
            f"version {version} is not supported (2 and 3 are): convert the model again with current tools"
        )
    tensor_count = reader.number("Q", "tensor count")
    # The smallest description: an empty name, no dimensions. The smallest metadata: an empty key, one byte.
    metadata_count = reader.number("Q", "metadata count")
    counts = f"{tensor_count} tensors and {metadata_count} metadata values"
    reader.need(tensor_count * 24 + metadata_count * 13, counts)
    if tensor_count > MAX_TENSORS or metadata_count > MAX_METADATA:
        raise reader.error(f"{counts} make no sense: damaged; download it again")

    metadata = dict(_unique(reader, "metadata key", _metadata(reader, metadata_count)))
    alignment = _alignment(reader, metadata)
    tensors = dict(_unique(reader, "tensor", _tensors(reader, tensor_count)))
    data_start = -(-reader.position // alignment) * alignment
    values = {key: value for key, (_, value) in metadata.items()}
    return Header(version, reader.byte_order, values, tuple(tensors.values()), alignment, data_start)


def _swapped(number: int) -> int:
    return int.from_bytes(number.to_bytes(4, "little"), "big")


def _unique(reader: _Reader, what: str, pairs: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    seen = set()
    for name, value in pairs:
        if name in seen:
            raise reader.error(f"{what} {name}: appears twice")
        seen.add(name)
        yield name, value


def _metadata(reader: _Reader, count: int) -> Iterator[tuple[str, tuple[int, Any]]]:
    """(key, (value type, value)) of each."""
    for index in range(count):
        key = reader.name(f"metadata key {index}", MAX_KEY_BYTES)
        kind = reader.number("I", f"{key} (value type)")
        yield key, (kind, reader.value(key, kind))


def _alignment(reader: _Reader, metadata: dict[str, tuple[int, Any]]) -> int:
    kind, alignment = metadata.get("general.alignment", (_UINT32, DEFAULT_ALIGNMENT))
    if kind != _UINT32:
        raise reader.error(f"general.alignment: must be a u32 (value type {_UINT32}), not value type {kind}")
    if alignment == 0 or alignment & (alignment - 1):
        raise reader.error(f"general.alignment: {alignment} is not a power of two")
    return alignment


def _tensors(reader: _Reader, count: int) -> Iterator[tuple[str, RawTensor]]:
    for index in range(count):
        name = reader.name(f"name of tensor {index}", MAX_NAME_BYTES)
        dimension_count = reader.number("I", f"tensor {name} (dimension count)")
        if dimension_count > MAX_DIMENSIONS:
            raise reader.error(
                f"tensor {name} (dimension count): {dimension_count}, at most {MAX_DIMENSIONS} make sense"
            )
        dimensions = reader.numbers("Q", dimension_count, f"tensor {name} (dimensions)")
        if 0 in dimensions:
            raise reader.error(f"tensor {name} (dimensions): one of {dimensions} is 0")
        ggml_id = reader.number("I", f"tensor {name} (type)")
        offset = reader.number("Q", f"tensor {name} (offset)")
        yield name, RawTensor(name, dimensions, ggml_id, offset)
