"""The keys for labels and actions, the same on the terminal and on the page. Pure."""

from __future__ import annotations

import string
from collections.abc import Sequence

# Enter accepts; the letters of the actions are no keys of labels.
NOTE, SKIP, UNDO, QUIT = "n", "s", "u", "q"
_KEYS = [key for key in "1234567890" + string.ascii_lowercase + string.ascii_uppercase if key not in "nsuqNSUQ"]


def label_keys(names: Sequence[str]) -> dict[str, str]:
    """Return the label for each key, in the order of *names*. Labels after the 54th have none: the page has buttons."""
    return dict(zip(_KEYS, names, strict=False))
