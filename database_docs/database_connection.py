"""A read-only connection to the database of DATABASE_URL through SQLAlchemy, with errors that name the remedy."""

from __future__ import annotations

import re
import sqlite3
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import SecretStr
from sqlalchemy import URL, Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, ProgrammingError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from error_handler import ConfigurationError, DatabaseUnavailableError

CONNECT_TIMEOUT_S = 10
STATEMENT_TIMEOUT_S = 60

_POSTGRESQL_NAMES = ("postgres", "postgresql")

# Error texts of drivers, with the remedy; the first match counts.
_REMEDIES = (
    (r'role ".*" does not exist|authentication|password|pg_hba|denied for user', "correct its user and password"),
    (r'database ".*" does not exist|Unknown database', "correct the name of the database in it"),
    (r"resolve|getaddrinfo|Name or service|nodename", "correct its host"),
    (r"statement timeout|database is locked", "run again when the database is less busy"),
    (r"permission denied|unable to open", "give its user the right to read the database's structure"),
    (r"not a database|malformed", "name the file of a database in it"),
)
_USUAL_REMEDY = "check that the database runs, and correct host and port"
_UNKNOWN_OPTION = "DATABASE_URL has an option that its driver does not know; remove what follows the question mark."


@contextmanager
def connected(url: SecretStr) -> Iterator[Connection]:
    """Yield a connection to *url* inside a read-only transaction; raises like ``read_database``."""
    target = _parsed(url)
    engine = _engine(target)
    try:
        with engine.connect() as connection:
            if target.get_backend_name() == "postgresql":
                connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
                connection.execute(text(f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT_S}s'"))
            elif target.get_backend_name() == "sqlite":
                connection.exec_driver_sql("BEGIN")  # all queries see one state of the file
            yield connection
    except SQLAlchemyError as exc:
        raise _translated(exc, target) from _quotable(exc, target)
    finally:
        engine.dispose()


def _parsed(url: SecretStr) -> URL:
    try:
        target = make_url(url.get_secret_value())
    except (ArgumentError, ValueError):
        target = None
    # Raised outside the handler, because the original error may quote a part of a password with an unescaped : or @.
    if target is None or "@" in (target.host or ""):
        raise ConfigurationError(
            "DATABASE_URL cannot be read as an address; write it as postgresql://user:password@host:5432/database or "
            "sqlite:///path/to/file.db, with the characters @ : / % of a password percent-encoded (@ is %40)."
        )
    if target.drivername in _POSTGRESQL_NAMES:
        target = target.set(drivername="postgresql+psycopg")
    return target


def _engine(target: URL) -> Engine:
    """Return an engine that has not connected yet."""
    options: dict[str, Any] = {"poolclass": NullPool}
    if target.drivername.split("+")[0] == "sqlite":
        path = _sqlite_file(target)
        # Quoted, so that no file name can add an option to the address.
        options["creator"] = lambda: sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, isolation_level=None)
        target = URL.create("sqlite")
    elif target.drivername == "postgresql+psycopg" and "connect_timeout" not in target.query:
        options["connect_args"] = {"connect_timeout": CONNECT_TIMEOUT_S}
    try:
        engine = create_engine(target, **options)
    except NoSuchModuleError:
        raise ConfigurationError(
            f"DATABASE_URL names an unknown kind of database or driver, {target.drivername}; "
            "write postgresql:// or sqlite:///, or install its package."
        ) from None
    except ImportError as exc:
        package = exc.name or target.drivername
        raise ConfigurationError(
            f"the driver of DATABASE_URL is not installed ({package}); pip install -r requirements-index.txt installs the "
            "one for PostgreSQL, other databases need their own."
        ) from exc
    except (ArgumentError, TypeError) as exc:
        raise ConfigurationError(_UNKNOWN_OPTION) from _quotable(exc, target)
    if engine.dialect.is_async:
        raise ConfigurationError(
            f"DATABASE_URL names an asynchronous driver, {target.drivername}; remove the part from + to ://."
        )
    return engine


def _sqlite_file(target: URL) -> Path:
    name = target.database or ""
    if name.startswith("file:"):
        name = name.removeprefix("file:").partition("?")[0]
    if name in ("", ":memory:"):
        raise ConfigurationError("DATABASE_URL names no SQLite file; write sqlite:///path/to/file.db.")
    path = Path(name).absolute()
    if not path.is_file():
        raise DatabaseUnavailableError(f"there is no SQLite file {path}; correct DATABASE_URL.")
    return path


def _translated(exc: SQLAlchemyError, target: URL) -> ConfigurationError | DatabaseUnavailableError:
    original = getattr(exc, "orig", None) or exc
    reason = next(iter(str(original).strip().splitlines()), "").rstrip(".")
    if any(secret in reason for secret in _secrets(target)):
        reason = ""
    if isinstance(exc, ProgrammingError) and "connection option" in str(original):
        return ConfigurationError(_UNKNOWN_OPTION)
    place = target.database if target.get_backend_name() == "sqlite" else _place(target)
    remedy = next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, reason)), _USUAL_REMEDY)
    said = f" ({reason or type(original).__name__})"
    return DatabaseUnavailableError(f"the database {place} of DATABASE_URL cannot be read{said}; {remedy}.")


def _place(target: URL) -> str:
    port = f":{target.port}" if target.port else ""
    return f"{target.database or ''} at {target.host or 'the local socket'}{port}".strip()


def _secrets(target: URL) -> list[str]:
    password = str(target.password or "")
    options = [value for values in target.query.values() for value in ([values] if isinstance(values, str) else values)]
    return [secret for secret in (password, quote(password, safe=""), *options) if secret]


def _quotable(exc: Exception, target: URL) -> Exception | None:
    """Return *exc* as the cause for tracebacks; None if a part of it quotes a secret of the address."""
    shown = "".join(traceback.format_exception(exc))
    return None if any(secret in shown for secret in _secrets(target)) else exc
