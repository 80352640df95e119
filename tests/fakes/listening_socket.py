"""The socket on which a fake server listens."""

import errno
import socket
import time

_BIND_TRIES_S = 5.0


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket; after a restart the old port may need a moment."""
    deadline = time.monotonic() + _BIND_TRIES_S
    while True:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as exc:
            listener.close()
            if exc.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return listener
