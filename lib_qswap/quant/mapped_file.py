"""A file as the home of weights: mapped for the tensors that alias it, and read for bulk bytes.

A read through a map beyond the end of a file that has shrunk, or from a disk that fails, is a signal (SIGBUS)
that ends the process, and no check before excludes it. So bytes always come by `FileSlice.read_into`, where
the same accident is an exception; the map only gives tensors an address that takes no memory.
"""

from __future__ import annotations

import io
import mmap
import os
import stat
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Linux reads at most 0x7ffff000 bytes at a time, and an interrupt waits for one read.
_READ_BYTES = 1 << 30


class GGUFError(ValueError):
    """A GGUF file that cannot be used: names the file, the tensor or field, and what to do."""


class MappedFile:
    """A regular file, opened and mapped read-only.

    Attributes:
        path: as given.
        size: bytes. mtime_ns, inode: with the size, the identity that `check_unchanged` compares.

    Raises GGUFError when the path is no regular file, is empty or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):  # opening a pipe would wait for its writer
                raise GGUFError(f"{self.path}: not a regular file")
            self._fd = os.open(
                self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
            )
            weakref.finalize(self, os.close, self._fd)
            status = os.fstat(self._fd)
            self.size, self.mtime_ns, self.inode = status.st_size, status.st_mtime_ns, status.st_ino
            if self.size == 0:
                raise GGUFError(f"{self.path}: the file is empty")
            self._map = mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            if isinstance(error, GGUFError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise GGUFError(f"{self.path}: cannot be opened: {reason}") from error
        self._handles = threading.local()
        self._address = self.tensor(0, 1).data_ptr()

    def check_unchanged(self) -> None:
        """GGUFError when the file at `path` is no longer the one that was opened."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise GGUFError(
                f"{self.path}: the model file is gone ({error.strerror}): load the model again"
            ) from error
        self._compare(status)

    def _compare(self, status: os.stat_result) -> None:
        for what, now, then in (
            ("size", status.st_size, self.size),
            ("modification time", status.st_mtime_ns, self.mtime_ns),
            ("identity (inode)", status.st_ino, self.inode),
        ):
            if now != then:
                raise GGUFError(
                    f"{self.path}: the model file changed since it was opened"
                    f" ({what}: {then}, now {now}): load the model again"
                )

    def tensor(self, offset: int, nbytes: int) -> Tensor:
        """uint8 tensor that aliases the map; reading it is a signal that ends the process if the file has
        shrunk, writing into it always."""
        with warnings.catch_warnings():
            # "The given buffer is not writable": nobody writes, PackedTensor sees to it.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=offset)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` aliases the map."""
        address = tensor.data_ptr()
        return self._address <= address < self._address + self.size and tensor.device.type == "cpu"

    def read_at(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset` on; how many bytes: fewer only where the file ends. Raises OSError."""
        done = 0
        while done < len(buffer):
            part = buffer[done : done + _READ_BYTES]
            count = self._read_once(offset + done, part)
            if count == 0:
                break
            done += count
        return done

    def _read_once(self, offset: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [buffer], offset)
        # Windows: no positioned read, so that each thread needs a file position of its own.
        kept = getattr(self._handles, "file", None)
        try:
            return _read_from(kept or self._open_handle(), offset, buffer)
        except OSError:
            if kept is None:
                raise
        # A network drive that was gone for a while is back, but what was open on it is not.
        self._handles.file = None
        return _read_from(self._open_handle(), offset, buffer)

    def _open_handle(self) -> io.FileIO:
        handle = open(self.path, "rb", buffering=0)  # noqa: SIM115 (closed with its thread)
        self._compare(os.fstat(handle.fileno()))
        self._handles.file = handle
        return handle


def _read_from(handle: io.FileIO, offset: int, buffer: memoryview) -> int:
    handle.seek(offset)
    return handle.readinto(buffer)


class FileSlice(NamedTuple):
    """`nbytes` bytes of a file from `offset` on."""

    file: MappedFile
    offset: int
    nbytes: int

    def part(self, start: int, nbytes: int) -> FileSlice:
        """The slice of `nbytes` bytes that begins `start` bytes into this one."""
        return FileSlice(self.file, self.offset + start, nbytes)

    def mapped(self) -> Tensor:
        """uint8 tensor that aliases the map, which takes no memory; see `MappedFile.tensor`."""
        return self.file.tensor(self.offset, self.nbytes)

    def pieces(self, piece_bytes: int) -> Iterator[tuple[int, Tensor]]:
        """All bytes in order, as (where they start in this slice, uint8 tensor of `piece_bytes` bytes); the
        last piece has what is left. Each is valid until the next one is asked for.

        Raises what `read_into` raises.
        """
        buffer = torch.empty(min(piece_bytes, self.nbytes), dtype=torch.uint8, device="cpu")
        for start in range(0, self.nbytes, piece_bytes):
            piece = buffer[: self.nbytes - start]
            self.read_into(piece, start)
            yield start, piece

    def read_into(self, destination: Tensor, start: int = 0) -> None:
        """Read from the file into `destination`, straight into its memory; other threads run meanwhile.

        Args:
            destination: uint8, contiguous, in host memory; as many bytes are read as it holds.
            start: bytes into this slice where reading begins.

        Raises ValueError for a destination that does not fit, OSError when reading fails, GGUFError when the
        file has become too short.
        """
        nbytes = destination.numel()
        if (
            destination.dtype != torch.uint8
            or destination.device.type != "cpu"
            or not destination.is_contiguous()
        ):
            raise ValueError(
                "read_into needs a contiguous uint8 tensor in host memory,"
                f" not {destination.dtype} on {destination.device}"
            )
        if start < 0 or start + nbytes > self.nbytes:
            raise ValueError(
                f"bytes {start} to {start + nbytes} are not within this slice of {self.nbytes} bytes"
            )
        memory: Any = destination.view(-1).numpy()
        try:
            done = self.file.read_at(self.offset + start, memoryview(memory))
        except OSError as error:  # of a descriptor: it does not name the file
            raise OSError(error.errno, error.strerror, self.file.path) from error
        if done < nbytes:
            end = self.offset + start + done
            raise GGUFError(
                f"{self.file.path}: the file ends at byte {end}, {nbytes - done} bytes too early:"
                " it has shrunk since it was opened; load the model again"
            )
