"""Receive the webhooks of jobs, check their signatures, and print what is done; needs only Python.

python examples/receive_job_webhook.py 9000 SECRET_FILE

SECRET_FILE holds the value of API_WEBHOOK_SECRET; the service needs API_WEBHOOK_ORIGINS=http://127.0.0.1:9000.
"""

import base64
import hashlib
import hmac
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

TOLERANCE_S = 300  # an older message may be one that somebody recorded
MAX_BODY_BYTES = 100_000


def is_genuine(secret: str, headers: dict[str, str], body: bytes, now: float) -> bool:
    """Return whether *body* was signed with *secret* at most TOLERANCE_S ago; *headers* have lower-case names."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    sent_at = headers.get("webhook-timestamp", "")
    if not sent_at.isdigit() or abs(now - int(sent_at)) > TOLERANCE_S:
        return False
    signed = f"{headers.get('webhook-id', '')}.{sent_at}.".encode() + body
    expected = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    signatures = headers.get("webhook-signature", "").split(" ")  # several while a secret is replaced
    return any(hmac.compare_digest(expected.encode(), given.encode()) for given in signatures)


class Receiver(BaseHTTPRequestHandler):
    """Answers 204 to a genuine message, and 400 to all others."""

    timeout = 10  # seconds without a byte
    secret = ""
    seen: ClassVar[set[str]] = set()

    def do_POST(self) -> None:
        """Check the signature before anything else is believed. A message may come twice, with the same webhook-id."""
        length = self.headers.get("Content-Length", "")
        body = self.rfile.read(min(int(length), MAX_BODY_BYTES)) if length.isdecimal() else b""
        headers = {name.lower(): value for name, value in self.headers.items()}
        if not is_genuine(self.secret, headers, body, time.time()):
            self.send_error(400)
            return
        if headers["webhook-id"] not in self.seen:
            self.seen.add(headers["webhook-id"])
            done = json.loads(body)["data"]
            print(f"job {done['job']}: {done['succeeded']} of {done['total']} labelled", flush=True)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing else."""


def main(port: str, secret_file: str) -> None:
    """Serve until Ctrl-C."""
    Receiver.secret = Path(secret_file).read_text(encoding="ascii").strip()
    ThreadingHTTPServer(("127.0.0.1", int(port)), Receiver).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
