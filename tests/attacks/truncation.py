"""A file that ends within each of its fields, one after the other."""

from __future__ import annotations

import struct

from gguf_writer import ARRAY, STRING, U16, U32

from .catalogue import add

# (what an error calls the field, its bytes) of a valid file.
FIELDS = [
    ("magic", b"GGUF"),
    ("version", struct.pack("<I", 3)),
    ("tensor count", struct.pack("<Q", 1)),
    ("metadata count", struct.pack("<Q", 3)),
    ("metadata key 0", struct.pack("<Q", 20)),
    ("metadata key 0", b"general.architecture"),
    ("general.architecture (value type)", struct.pack("<I", STRING)),
    ("general.architecture (length)", struct.pack("<Q", 4)),
    ("general.architecture", b"flux"),
    ("metadata key 1", struct.pack("<Q", 17)),
    ("metadata key 1", b"general.alignment"),
    ("general.alignment (value type)", struct.pack("<I", U32)),
    ("general.alignment", struct.pack("<I", 32)),
    ("metadata key 2", struct.pack("<Q", 4)),
    ("metadata key 2", b"list"),
    ("list (value type)", struct.pack("<I", ARRAY)),
    ("list (item type)", struct.pack("<I", ARRAY)),
    ("list (item count)", struct.pack("<Q", 2)),
    ("list", struct.pack("<IQ", U16, 2)),
    ("list", struct.pack("<HH", 1, 2)),
    ("list (item type)", struct.pack("<I", STRING)),
    ("list (item count)", struct.pack("<Q", 1)),
    ("list", struct.pack("<Q", 5)),
    ("list", b"token"),
    ("name of tensor 0", struct.pack("<Q", 6)),
    ("name of tensor 0", b"weight"),
    ("tensor weight (dimension count)", struct.pack("<I", 2)),
    ("tensor weight (dimensions)", struct.pack("<QQ", 256, 2)),
    ("tensor weight (type)", struct.pack("<I", 12)),
    ("tensor weight (offset)", struct.pack("<Q", 0)),
    ("tensor weight (offset)", bytes(288)),
]

_HEADER = b"".join(field for _, field in FIELDS[:-1])
_PADDING = bytes(-len(_HEADER) % 32)
VALID = _HEADER + _PADDING + FIELDS[-1][1]

# What counts announce takes so much at least, which is checked before any of it is read: (where the first of
# it begins, how long it is, what the error calls it).
_ANNOUNCED = [(24, 1 * 24 + 3 * 13, "1 tensors and 3 metadata values"), (129, 2 * 12, "list (2 items)")]


def _says(cut: int, field: str) -> str:
    for start, nbytes, name in _ANNOUNCED:
        if start <= cut < start + nbytes:
            return name
    return field


def _enter_all() -> None:
    start = 0
    for index, (name, field) in enumerate(FIELDS):
        if index == len(FIELDS) - 1:
            start += len(_PADDING)
        for cut in sorted({max(start, 1), start + len(field) - 1}):  # an empty file is another attack
            add(f"truncated_after_{cut}_bytes_in_{name.replace(' ', '_')}", _says(cut, name), VALID[:cut])
        start += len(field)


_enter_all()
