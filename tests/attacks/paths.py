"""Paths at which there is no file that could be read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from gguf_writer import Tensor, gguf_bytes

from .catalogue import FILE_NAME, attack, attack_in_folder


@attack("the file is empty")
def an_empty_file() -> bytes:
    return b""


@attack_in_folder(f"cannot be opened: {os.strerror(errno.ENOENT)}")
def no_file(folder: Path) -> Path:
    return folder / FILE_NAME


@attack_in_folder("not a regular file")
def a_folder(folder: Path) -> Path:
    (folder / FILE_NAME).mkdir()
    return folder / FILE_NAME


if hasattr(os, "mkfifo"):

    @attack_in_folder("not a regular file")
    def a_pipe_that_nobody_writes_to(folder: Path) -> Path:
        os.mkfifo(folder / FILE_NAME)
        return folder / FILE_NAME

    @attack_in_folder("not a regular file")
    def a_device_that_never_ends(folder: Path) -> Path:
        (folder / FILE_NAME).symlink_to("/dev/zero")
        return folder / FILE_NAME

    @attack_in_folder(f"cannot be opened: {os.strerror(errno.ELOOP)}")
    def links_in_a_circle(folder: Path) -> Path:
        (folder / FILE_NAME).symlink_to("other.gguf")
        (folder / "other.gguf").symlink_to(FILE_NAME)
        return folder / FILE_NAME


if hasattr(os, "geteuid") and os.geteuid() != 0:  # root may read anything

    @attack_in_folder(f"cannot be opened: {os.strerror(errno.EACCES)}")
    def a_file_of_somebody_else(folder: Path) -> Path:
        (folder / FILE_NAME).write_bytes(gguf_bytes([Tensor("a")]))
        (folder / FILE_NAME).chmod(0)
        return folder / FILE_NAME
