"""Coverage-guided fuzzing of opening and inspecting GGUF files, run by hand (Linux; `pip install atheris`):

    python tests/attacks/fuzz_gguf.py CORPUS -runs=1000000 -max_len=4096 -timeout=2 -rss_limit_mb=1000

CORPUS is a folder: when it is new, the valid file and the attacks of this folder are put there; libFuzzer
adds what reaches new code. An input is a file, or the two parts of a split model where it contains NEXT_PART.
A finding is anything but a GGUFError in one line that names the file, and a file that opens and cannot be
read to its end. Half of the inputs are libFuzzer's mutations of bytes, half are damage to whole fields.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import torch  # noqa: E402, F401 (before the instrumentation: none of its code is to be followed)

with atheris.instrument_imports(include=["lib_qswap.quant.gguf", "lib_qswap.quant.mapped_file"]):
    import lib_qswap.quant.gguf_file  # noqa: F401
    from lib_qswap.quant import gguf_reader

from gguf_damage import KINDS, VALID, Change, damaged, read_all_or_refuse  # noqa: E402

from attacks import ATTACKS  # noqa: E402
from attacks.splits import part  # noqa: E402

NEXT_PART = b"||NEXT PART||"
LARGEST_SEED_BYTES = 4096

# Small, so that inputs of a few kilobytes reach what lies beyond.
gguf_reader.MAX_HEADER_BYTES = 3000
gguf_reader._SMALLEST_WINDOW_BYTES = 16
gguf_reader._LARGEST_WINDOW_BYTES = 64
gguf_reader._KEPT_BYTES = 32
gguf_reader._KEPT_BYTES_IN_ALL = 4096

FOLDER = Path(tempfile.mkdtemp(prefix="qswap-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
WHOLE = FOLDER / "model.gguf"
PARTS = [FOLDER / f"split-0000{i}-of-00002.gguf" for i in (1, 2)]


def try_input(data: bytes) -> None:
    first, separator, second = data.partition(NEXT_PART)
    if not separator:
        WHOLE.write_bytes(data)
        read_all_or_refuse(WHOLE)
        return
    for path, content in zip(PARTS, (first, second), strict=True):
        path.write_bytes(content)
    read_all_or_refuse(PARTS[0])


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    chance = random.Random(seed)
    if chance.random() < 0.5:
        return atheris.Mutate(data, max_size)
    parts = data.split(NEXT_PART, 1)
    which = chance.randrange(len(parts))
    changes = [
        Change(chance.randrange(len(KINDS)), chance.randrange(1000), chance.randrange(10_000))
        for _ in range(chance.randint(1, 3))
    ]
    parts[which] = damaged(parts[which], changes)
    return NEXT_PART.join(parts)[:max_size]


def seeds() -> list[bytes]:
    """A valid file, a valid split model, and each attack that is small."""
    found = [VALID, part(0, 2, "a", total=2) + NEXT_PART + part(1, 2, "b")]
    for attack in ATTACKS:
        with tempfile.TemporaryDirectory() as folder:
            path = attack.write(Path(folder))
            files = [path, *(part for part in sorted(path.parent.glob("*-of-00002.gguf")) if part != path)]
            if all(file.is_file() and file.stat().st_size <= LARGEST_SEED_BYTES for file in files):
                found.append(NEXT_PART.join(file.read_bytes() for file in files))
    return found


def main() -> None:
    corpus = Path(sys.argv[1])
    if not corpus.is_dir():
        corpus.mkdir(parents=True)
        for i, content in enumerate(seeds()):
            (corpus / f"seed-{i:03d}").write_bytes(content)
    atheris.Setup(sys.argv, try_input, custom_mutator=mutate)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    main()
