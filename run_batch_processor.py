"""The batch worker under the name that older scripts call; the same as ``python cli.py``."""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # as cli.py does

import sys

import cli

if __name__ == "__main__":
    sys.exit(cli.main())
