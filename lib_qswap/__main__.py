"""`python -m lib_qswap` is `qswap`, and so is `python lib_qswap`, the folder itself.

A Python that comes with a ._pth file, as in packages for Windows, looks for modules where that file says and
not in the current folder: there `-m lib_qswap` finds nothing.
"""

import sys
from pathlib import Path

if not __package__:  # the folder, which Python has then put on the path itself: its files would hide others
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent), *(entry for entry in sys.path if Path(entry).resolve() != folder)]

from lib_qswap.cli import main

sys.exit(main())
