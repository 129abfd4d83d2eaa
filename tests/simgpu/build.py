"""Compiles the simulated accelerator once per source, PyTorch and Python version, and loads it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).resolve().parent
EXTENSION = "simgpu_ext"
FLAGS = ["-O2", "-fopenmp", "-Wno-deprecated-declarations"]


def compiler() -> str | None:
    """The C++ compiler that PyTorch's builder calls ($CXX, else c++), or None where there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def cache_folder() -> Path:
    """Where builds are kept: $SIMGPU_BUILD, else a folder in the user's cache."""
    if chosen := os.environ.get("SIMGPU_BUILD"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simgpu"


def _build_key() -> str:
    """A name that changes with anything that the compiled extension depends on."""
    digest = hashlib.sha256()
    for source in sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update(f"{torch.__version__} {sys.implementation.cache_tag} {FLAGS} {compiler()}".encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    """Holds a file lock, which the kernel releases when its process ends, however it ends."""
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _scripts_on_path() -> Iterator[None]:
    """Ninja from PyPI sits beside the interpreter, which is on PATH only in an activated environment."""
    old = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join(
        [sysconfig.get_path("scripts"), str(Path(sys.executable).parent), old]
    )
    try:
        yield
    finally:
        os.environ["PATH"] = old


def _load_compiled(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(EXTENSION, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(folder: Path) -> ModuleType:
    from torch.utils.cpp_extension import load

    with _scripts_on_path():
        return load(
            EXTENSION,
            [str(HERE / "simgpu.cpp")],
            build_directory=str(folder),
            extra_cflags=FLAGS,
            verbose=bool(os.environ.get("SIMGPU_VERBOSE")),
        )


def load_extension() -> ModuleType:
    """The compiled extension, built first where this source, PyTorch and Python have no finished build yet.

    Processes that start at once build one after the other, and the later ones find the first one's build. A
    build counts only once its `complete` marker is there: what an interrupted one left is removed.

    Raises ImportError where there is no C++ compiler, RuntimeError (from PyTorch's builder) where there is no
    ninja or the compiler fails.
    """
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / _build_key()
    library, complete = folder / f"{EXTENSION}.so", folder / "complete"
    if complete.exists():
        return _load_compiled(library)
    with _exclusive(cache / f"{folder.name}.lock"):
        if complete.exists():
            return _load_compiled(library)
        if compiler() is None:
            raise ImportError(
                "simgpu is compiled on first use and found no C++ compiler: install g++, or set CXX"
            )
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        module = _compile(folder)
        complete.touch()
        return module
