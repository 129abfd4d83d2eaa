"""JSON of results that is whole or absent at any moment, however a run ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write(path: Path, result: Any) -> None:
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(unfinished, path)
