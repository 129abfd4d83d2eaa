"""`python -m lib_qswap` is `qswap`."""

import sys

from lib_qswap.cli import main

sys.exit(main())
