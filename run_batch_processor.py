"""The batch worker under its older name; the same as ``python cli.py``."""

from __future__ import annotations

if __name__ == "__main__":
    from utils.interpreter import require_packages

    require_packages()

import sys

import cli

if __name__ == "__main__":
    sys.exit(cli.main())
