"""RAM of this machine, as far as this process may have it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

CONTROL_GROUPS = "/sys/fs/cgroup"
OWN_GROUPS = "/proc/self/cgroup"


def total_ram_bytes() -> int:
    """RAM of this machine, or of the container where that is less."""
    return min([_meminfo("MemTotal"), *(group.limit for group in _groups())])


def available_ram_bytes() -> int:
    """RAM that can be had without swapping, within the container's limit. What caches files can be had."""
    free = (group.limit - group.used + group.cached for group in _groups())
    return min([_meminfo("MemAvailable"), *free])


def give_back_freed_ram() -> None:
    """Returns what was freed to the system: glibc keeps it for each thread, in pieces that the next model's
    weights do not fit into, so that a web UI grows with every checkpoint that it changes to."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # Another C library has no such function.
            ctypes.CDLL(None).malloc_trim(0)


def _meminfo(field: str) -> int:
    if sys.platform == "win32":

        class Status(ctypes.Structure):  # MEMORYSTATUSEX
            _fields_ = [
                ("length", ctypes.c_ulong),
                ("load", ctypes.c_ulong),
                *((n, ctypes.c_ulonglong) for n in ("total", "available", "a", "b", "c", "d", "e")),
            ]

        status = Status(length=ctypes.sizeof(Status))
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status.total if field == "MemTotal" else status.available
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if field == "MemTotal":
        return total
    with contextlib.suppress(ValueError, OSError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total // 2  # macOS does not say.


class _Group(NamedTuple):
    """What a control group may have and has, bytes; `cached`: of files, part of what it has."""

    limit: int
    used: int
    cached: int


def _groups() -> Iterator[_Group]:
    """The control groups that limit this process: its own and those around it, as far as they can be seen. In
    a container that is mostly the container's alone."""
    for folder, limit_name, used_name, prefix in _group_folders():
        limit = _number(f"{folder}/{limit_name}")
        used = _number(f"{folder}/{used_name}")
        if limit and used:
            kinds = (f"{prefix}inactive_file", f"{prefix}active_file")
            cached = sum(_number(f"{folder}/memory.stat", kind) for kind in kinds)
            yield _Group(limit, used, cached)


def _group_folders() -> Iterator[tuple[str, str, str, str]]:
    """Their folders, and what the files there are called, in the two versions that Linux has of them."""
    own = {"": "/", "memory": "/"}
    with contextlib.suppress(OSError, ValueError), open(OWN_GROUPS, encoding="utf-8") as lines:
        for line in lines:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            own.update((controller, path) for controller in controllers.split(","))
    versions = (
        ("", CONTROL_GROUPS, "memory.max", "memory.current", ""),
        ("memory", f"{CONTROL_GROUPS}/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    )
    for controller, base, limit, used, prefix in versions:
        innermost = PurePosixPath(own[controller])
        for group in (innermost, *innermost.parents):
            yield f"{base}/{str(group).lstrip('/')}".rstrip("/"), limit, used, prefix


def _number(file: str, field: str | None = None) -> int:
    """The number in a file, or in its line `field`; 0: there is none."""
    with contextlib.suppress(OSError, ValueError), open(file, encoding="ascii") as lines:
        if field is None:
            return int(lines.read())
        return next((int(line.split()[1]) for line in lines if line.startswith(field + " ")), 0)
    return 0
