"""The list that the attacks of this folder are entered in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

FILE_NAME = "model.gguf"


class Attack(NamedTuple):
    """A hostile file.

    Attributes:
        name: of the function that makes it.
        says: what the GGUFError must contain; for an oddity, what the listing of `qswap inspect` must.
        refused: whether opening must fail; an oddity is strange and harmless.
        write: puts the file into a folder and gives its path.
    """

    name: str
    says: str
    refused: bool
    write: Callable[[Path], Path]


ATTACKS: list[Attack] = []


def attack(says: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    """Enters the function, which gives the bytes of a file that must be refused."""
    return lambda content: _enter(content, says, refused=True)


def oddity(says: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    """Enters the function, which gives the bytes of a file that must open."""
    return lambda content: _enter(content, says, refused=False)


def attack_in_folder(says: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    """Enters the function, which writes files into a folder and gives the path of the one to refuse."""

    def enter(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
        ATTACKS.append(Attack(write.__name__, says, True, write))
        return write

    return enter


def add(name: str, says: str, content: bytes) -> None:
    """Enters an attack that is one of a series."""
    ATTACKS.append(Attack(name, says, True, _writer(lambda: content)))


def _enter(content: Callable[[], bytes], says: str, *, refused: bool) -> Callable[[], bytes]:
    ATTACKS.append(Attack(content.__name__, says, refused, _writer(content)))
    return content


def _writer(content: Callable[[], bytes]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / FILE_NAME
        path.write_bytes(content())
        return path

    return write
