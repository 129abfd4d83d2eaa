"""Writes every attack into a folder of its own: python -m attacks FOLDER."""

import sys
from pathlib import Path

from . import ATTACKS

for attack in ATTACKS:
    folder = Path(sys.argv[1]) / attack.name
    folder.mkdir(parents=True)
    print(attack.write(folder))
