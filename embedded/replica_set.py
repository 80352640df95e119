"""A replica set with one member: the embedded MongoDB has change streams, as those of production do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from pymongo.errors import OperationFailure

from embedded.mongod import POLL_S, START_TIMEOUT_S, EmbeddedMongod
from error_handler import ConfigurationError

NAME = "rs0"


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
        """Start it and wait until it takes writes; a data folder of a standalone server or of another port is converted.

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
        members = [{"_id": 0, "host": f"127.0.0.1:{self.port}"}]
        config: dict[str, Any] = {"_id": NAME, "version": 1, "members": members}
        deadline = time.monotonic() + START_TIMEOUT_S
        with MongoClient[dict[str, Any]](f"{super().uri}?directConnection=true") as client:
            while not client.admin.command("hello")["isWritablePrimary"]:
                if time.monotonic() > deadline:
                    raise ConfigurationError(
                        f"The embedded MongoDB took no writes after {START_TIMEOUT_S:.0f} s; see mongod.log in its folder."
                    )
                try:
                    client.admin.command("replSetGetStatus")
                except OperationFailure as exc:
                    name = (exc.details or {}).get("codeName")
                    if name == "NotYetInitialized":
                        client.admin.command("replSetInitiate", config)
                    elif name == "InvalidReplicaSetConfig":  # it had another port
                        client.admin.command("replSetReconfig", config, force=True)
                time.sleep(POLL_S)
