"""The flags that all clients of the REST service have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from service.client.protocol import ServiceTarget, service_target


def add_service_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --url, --api-key-file, --api-key, --timeout and --verbose to *parser*."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service is (%(default)s)")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="file with the key, where the service wants one"
    )
    parser.add_argument("--api-key", metavar="KEY", help="the key itself; other users of this machine can see it in ps")
    parser.add_argument(
        "--timeout", type=_seconds, default=90.0, metavar="S", help="longest wait of an attempt (%(default)g)"
    )
    parser.add_argument("--verbose", action="store_true", help="log lines, and a traceback with an error")


def target_from(arguments: argparse.Namespace) -> ServiceTarget:
    """Return the service that *arguments* name; raises ConfigurationError where they cannot."""
    return service_target(arguments.url, arguments.api_key, arguments.api_key_file)


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return the parser of an argument that is a whole number from *least* to *most*."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}")
        return int(text)

    return parse


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError("must be seconds, more than 0 and at most 3600")
    return value
