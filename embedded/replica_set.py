"""A replica set with one member, so that the embedded MongoDB has change streams."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from embedded.mongod import POLL_S, START_TIMEOUT_S, EmbeddedMongod
from error_handler import ConfigurationError

NAME = "rs0"
INVALID = "InvalidReplicaSetConfig"


class ReplicaSetMongod(EmbeddedMongod):
    """An EmbeddedMongod that is the only member of the replica set ``rs0``; it takes writes after ``start``."""

    def __init__(self, data_dir: Path, *, extra_arguments: Sequence[str] = ()) -> None:
        arguments = ("--replSet", NAME, "--oplogSize", "256", *extra_arguments)
        super().__init__(data_dir, extra_arguments=arguments)

    @property
    def uri(self) -> str:
        """Its connection string; valid after the first start."""
        return f"{super().uri}?replicaSet={NAME}"

    def start(self) -> None:
        """Start it and wait until it accepts writes; convert a data folder of a standalone server or of another port.

        Raises:
            ConfigurationError: It cannot run on this machine, or not with this folder. Nothing is left running.
        """
        if self.pid is not None:
            return
        super().start()
        with contextlib.ExitStack() as undo:
            undo.callback(self.kill)
            self._become_primary()
            undo.pop_all()

    def _become_primary(self) -> None:
        deadline, problem = time.monotonic() + START_TIMEOUT_S, ""
        address, patience_ms = f"{super().uri}?directConnection=true", int(1000 * START_TIMEOUT_S)
        with MongoClient[dict[str, Any]](address, serverSelectionTimeoutMS=patience_ms) as client:
            while True:
                try:
                    if client.admin.command("hello")["isWritablePrimary"]:
                        return
                    self._configure(client)
                except PyMongoError as exc:  # also those of an election
                    problem = f" ({type(exc).__name__})"
                if time.monotonic() > deadline:
                    raise ConfigurationError(
                        f"The embedded MongoDB took no writes after {START_TIMEOUT_S:.0f} s{problem}; "
                        "see mongod.log in its folder."
                    )
                time.sleep(POLL_S)

    def _configure(self, client: MongoClient[dict[str, Any]]) -> None:
        members = [{"_id": 0, "host": f"127.0.0.1:{self.port}"}]
        config: dict[str, Any] = {"_id": NAME, "version": 1, "members": members}
        try:
            client.admin.command("replSetGetStatus")
        except OperationFailure as exc:
            name = (exc.details or {}).get("codeName")
            if name == "NotYetInitialized":
                client.admin.command("replSetInitiate", config)
            elif name == INVALID:  # it had another port
                self._reconfigure(client, config)

    def _reconfigure(self, client: MongoClient[dict[str, Any]], config: dict[str, Any]) -> None:
        try:
            client.admin.command("replSetReconfig", config, force=True)
        except OperationFailure as exc:
            if (exc.details or {}).get("codeName") != INVALID:
                raise
            raise ConfigurationError(
                f"The folder of the embedded MongoDB belongs to another replica set than {NAME}; move the folder away, or start a "
                "mongod of your own with it and set MONGODB_URI."
            ) from exc
