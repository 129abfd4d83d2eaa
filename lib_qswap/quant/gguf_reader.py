"""Reading GGUF's numbers, strings and arrays from a file, none of which is believed.

A string is a u64 length and UTF-8 bytes; an array is an item type (u32), a count (u64) and the items. Each
length and count is compared with what is left of the file before anything is allocated or looped over. Limits
far above any real model's bound what a hostile file can take: 0.1 s and 50 MB for a whole header.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from .mapped_file import GGUFError, MappedFile

# Value types of metadata: struct codes by type number; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, UINT32 = 8, 9, 4

MAX_HEADER_BYTES = 64 << 20
MAX_ARRAY_DEPTH = 4

# What a header may consist of, weighed by the time that each takes: a string of an array counts 1, a nested
# array, a metadata value or a tensor ENTRY_PIECES. The largest vocabularies have 780,000 strings, merges
# included; a checkpoint has some 3,000 tensors.
MAX_PIECES = 1_000_000
ENTRY_PIECES = 80

# Values of the metadata that are kept in memory: short ones, as long as all together are few. The others are
# read when they are looked into.
_KEPT_ITEMS = 256
_KEPT_BYTES = 1 << 16
_KEPT_BYTES_IN_ALL = 4 << 20
_BYTES_PER_KEPT_ITEM = 256  # counted for each item of an array beside its bytes in the file

# A window of the file's bytes: small at first and after a jump over so many, doubled as long as one follows
# the other.
_SMALLEST_WINDOW_BYTES = 1 << 12
_LARGEST_WINDOW_BYTES = 1 << 17
_JUMPED_WINDOWS = 16

# A table of all strings of a window pays where the first ones in it are short.
_STRINGS_LOOKED_AT = 32
_SHORT_BYTES = 160

_LENGTH_BYTES = 8


class MetadataArray(Sequence):
    """A long array of the metadata (a tokenizer's vocabulary), decoded when it is first looked into."""

    __slots__ = ("_count", "_item_type", "_items", "_place")

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
            self._items = Reader(file, byte_order, offset).items(key, self._item_type, self._count)
        return self._items[index]

    def __repr__(self) -> str:
        return f"<array of {self._count}>"


class MetadataText:
    """A long string of the metadata (a tokenizer's JSON), read each time that `str()` asks for it."""

    __slots__ = ("_nbytes", "_place")

    def __init__(self, file: MappedFile, key: str, offset: int, nbytes: int) -> None:
        self._place = (file, key, offset)
        self._nbytes = nbytes

    def __str__(self) -> str:
        file, key, offset = self._place
        return Reader(file, position=offset).take(self._nbytes, key).decode(errors="replace")

    def __repr__(self) -> str:
        return f"<text of {self._nbytes} bytes>"


class Reader:
    """A position in the file, and a window of its bytes. `field` is what errors call the bytes read."""

    def __init__(self, file: MappedFile, byte_order: str = "<", position: int = 0) -> None:
        self.file = file
        self.byte_order = byte_order
        self.position = position
        self._end = min(file.size, MAX_HEADER_BYTES)
        self._numbers = {code: struct.Struct(byte_order + code) for code in "BbHhIif?Qqd"}
        self._pieces = 0
        self._kept_bytes = 0
        # The window's memory is used again: fresh memory costs more than reading into it.
        self._window = bytearray(_SMALLEST_WINDOW_BYTES)
        self._window_start = position  # never behind `position`
        self._window_bytes = 0  # valid ones
        self._strides = b""  # of the strings in the window, once they were asked for
        self._scratch = np.empty((2, 0), np.uint8)

    def error(self, message: str) -> GGUFError:
        return GGUFError(f"{self.file.path}: {message}")

    def need(self, nbytes: int, field: str) -> None:
        """GGUFError unless `nbytes` more bytes are there to be the header's."""
        if self.position + nbytes <= self._end:
            return
        if self.position + nbytes <= self.file.size:
            raise self.error(
                f"{field}: the header exceeds {MAX_HEADER_BYTES >> 20} MiB: damaged; download it again"
            )
        raise self.error(
            f"{field}: needs {nbytes} bytes at {self.position}, the file has {self.file.size}:"
            " truncated or damaged; download it again"
        )

    def spend(self, pieces: int, field: str) -> None:
        """GGUFError when the header consists of more than any real one."""
        self._pieces += pieces
        if self._pieces > MAX_PIECES:
            raise self.error(f"{field}: more entries than any model's header has: damaged; download it again")

    def _bytes_at(self, nbytes: int, field: str) -> int:
        """Position of the next `nbytes` bytes in the window."""
        start = self.position - self._window_start
        if start + nbytes <= self._window_bytes:
            return start
        self.need(nbytes, field)
        size = _SMALLEST_WINDOW_BYTES
        if start < _JUMPED_WINDOWS * self._window_bytes:
            size = max(size, min(2 * self._window_bytes, _LARGEST_WINDOW_BYTES))
        size = min(max(nbytes, size), self._end - self.position)
        if size > len(self._window):
            self._window = bytearray(size)
        try:
            with memoryview(self._window) as view, view[:size] as part:
                count = self.file.read_at(self.position, part)
        except OSError as error:
            raise self.error(f"{field}: cannot be read: {error.strerror or error}") from error
        if count < nbytes:
            raise self.error(f"{field}: the file ended while it was read")
        self._window_start, self._window_bytes, self._strides = self.position, count, b""
        return 0

    def take(self, nbytes: int, field: str) -> bytes:
        start = self._bytes_at(nbytes, field)
        self.position += nbytes
        return bytes(self._window[start : start + nbytes])

    def skip(self, nbytes: int, field: str) -> None:
        self.need(nbytes, field)
        self.position += nbytes

    def _go_back(self, position: int) -> None:
        self.position = position
        if position < self._window_start:
            self._window_start, self._window_bytes, self._strides = position, 0, b""

    def number(self, code: str, field: str) -> Any:
        layout = self._numbers[code]
        start = self.position - self._window_start
        if start + layout.size > self._window_bytes:
            start = self._bytes_at(layout.size, field)
        self.position += layout.size
        return layout.unpack_from(self._window, start)[0]

    def numbers(self, code: str, count: int, field: str) -> tuple[Any, ...]:
        layout = f"{self.byte_order}{count}{code}"
        size = struct.calcsize(layout)
        start = self._bytes_at(size, field)
        self.position += size
        return struct.unpack_from(layout, self._window, start)

    def name(self, field: str, max_bytes: int) -> str:
        """A string that something is called by: UTF-8, printable, not empty."""
        length = self.number("Q", field)
        if length > max_bytes:
            raise self.error(f"{field}: {length} bytes long, at most {max_bytes} make sense: damaged file")
        raw = self.take(length, field)
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
        if kind == STRING:
            return self._text(field)
        if kind == ARRAY:
            return self._array(field, depth=1)
        raise self.error(f"{field}: value type {kind} is not one of GGUF's (0 to 12)")

    def _text(self, field: str) -> str | MetadataText:
        length = self.number("Q", f"{field} (length)")
        if self._keeps(length):
            return self.take(length, field).decode(errors="replace")
        text = MetadataText(self.file, field, self.position, length)
        self.skip(length, field)
        return text

    def _keeps(self, nbytes: int, items: int = 0) -> bool:
        cost = nbytes + items * _BYTES_PER_KEPT_ITEM
        if nbytes > _KEPT_BYTES or items > _KEPT_ITEMS or self._kept_bytes + cost > _KEPT_BYTES_IN_ALL:
            return False
        self._kept_bytes += cost
        return True

    def _array(self, field: str, depth: int) -> Any:
        if depth > MAX_ARRAY_DEPTH:
            raise self.error(f"{field}: arrays nested more than {MAX_ARRAY_DEPTH} deep")
        item_type = self.number("I", f"{field} (item type)")
        count = self.number("Q", f"{field} (item count)")
        items = f"{field} ({count} items)"
        start = self.position
        if item_type in _SCALARS:
            self.skip(count * self._numbers[_SCALARS[item_type]].size, items)
        elif item_type == STRING:
            self.need(count * 8, items)  # their lengths
            self.spend(count, items)
            self._skip_strings(field, count)
        elif item_type == ARRAY:
            self.need(count * 12, items)  # their types and counts
            self.spend(count * ENTRY_PIECES, items)
            return [self._array(field, depth + 1) for _ in range(count)]
        else:
            raise self.error(f"{field}: item type {item_type} is not one of GGUF's (0 to 12)")
        if not self._keeps(self.position - start, count):
            return MetadataArray(self.file, self.byte_order, field, item_type, count, start)
        self._go_back(start)
        return self.items(field, item_type, count)

    def items(self, field: str, item_type: int, count: int) -> list[Any]:
        """The next `count` numbers or strings."""
        if item_type != STRING:
            return list(self.numbers(_SCALARS[item_type], count, field))
        return [self.take(self.number("Q", field), field).decode(errors="replace") for _ in range(count)]

    def _skip_strings(self, field: str, count: int) -> None:
        length_at = self._numbers["Q"].unpack_from
        strings = iter(range(count))
        while True:
            window, last = self._window, self._window_bytes - _LENGTH_BYTES
            index = start = self.position - self._window_start
            strides = b""
            try:
                for nth, _ in enumerate(strings, 1):
                    if index > last:
                        raise IndexError
                    index += _LENGTH_BYTES + length_at(window, index)[0]
                    if nth == _STRINGS_LOOKED_AT and index - start < nth * _SHORT_BYTES:
                        strides = self._strides_in_window()
                        break
                # A vocabulary has a quarter of a million strings: nothing but this for most of them.
                for _ in strings if strides else ():
                    index += strides[index] or _LENGTH_BYTES + length_at(window, index)[0]
            except (IndexError, struct.error, OverflowError):
                # The window ends before this string's length does.
                self._move_in_window(index, field)
                self.skip(self.number("Q", field), field)
            else:
                self._move_in_window(index, field)
                return

    def _strides_in_window(self) -> bytes:
        """At each byte of the window, as if a string began there: the bytes to the next one, 0 for many."""
        count = self._window_bytes - _LENGTH_BYTES
        if not self._strides and count > 0:
            if self._scratch.shape[1] < self._window_bytes:
                self._scratch = np.empty((2, len(self._window)), np.uint8)
            first, second = self._scratch
            window = np.frombuffer(self._window, np.uint8)
            low, high = (window, window[1:]) if self.byte_order == "<" else (window[7:], window)
            # Not zero where one of the seven high bytes of a length is: of 2, of 4, of 4 and the last 3.
            np.bitwise_or(high[: count + 5], high[1 : count + 6], out=first[: count + 5])
            np.bitwise_or(first[: count + 3], first[2 : count + 5], out=second[: count + 3])
            np.bitwise_or(second[:count], second[3 : count + 3], out=first[:count])
            is_short = np.equal(first[:count], 0, out=first[:count].view(np.bool_))
            strides = np.add(low[:count], np.uint8(_LENGTH_BYTES), out=second[:count])  # low where it wraps
            strides *= is_short.view(np.uint8)
            strides *= np.greater_equal(strides, _LENGTH_BYTES, out=is_short).view(np.uint8)
            self._strides = strides.tobytes()
        return self._strides

    def _move_in_window(self, index: int, field: str) -> None:
        """To byte `index` of the window, which may lie behind its end."""
        self.position = self._window_start
        self.skip(index, field)
