"""Hostile GGUF files, each made by a small function, and a fuzzer of the reader.

`ATTACKS` lists them; tests/test_attacks.py runs them. In tests/, this writes them out for others to try:

    python -m attacks FOLDER
"""

from . import exhaustion, headers, metadata, paths, splits, tensors, truncation  # noqa: F401 (enter attacks)
from .catalogue import ATTACKS, Attack

__all__ = ["ATTACKS", "Attack"]
