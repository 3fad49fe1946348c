"""AWS KMS for tests: moto's server as a process of its own, spoken to over HTTP, with faults that tests can order.

Run as a program it serves the listening socket that it was given. Around moto it adds what KMS does and moto does not:
key states and grant tokens are obeyed, and CreateGrant of a known name makes no second grant.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REGION = "eu-central-1"
ACCOUNT = "123456789012"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    "AWS_EC2_METADATA_DISABLED": "true",  # nothing outside this host is ever asked
}
_ORDERS = "/orders"
_CRYPTO = {"Encrypt", "Decrypt", "ReEncrypt", "GenerateDataKey", "GenerateDataKeyWithoutPlaintext", "CreateGrant"}
_REFUSED = {
    "Disabled": ("DisabledException", "is disabled."),
    "PendingDeletion": ("KMSInvalidStateException", "is pending deletion."),
}


class Endpoint:
    """One server process on one port of 127.0.0.1; it can be ended and started again there."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it; what it knew of keys it has forgotten."""
        with socket.socket() as listener, self._log.open("ab") as log:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self._port))
            listener.listen(64)
            self._port = listener.getsockname()[1]
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno())],
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **CREDENTIALS},
            )
        self.seen()  # waits for the first answer

    def kill(self) -> None:
        """End it at once, with every connection."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None

    def stall(self) -> None:
        """Stop it: its kernel still takes connections, and nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def order(self, fault: str = "", *, on: Iterable[str] = (), times: int = 1_000_000, **facts: Any) -> None:
        """Have the next ``times`` requests for these actions fail so; without a fault all is well again."""
        self._ask({"fault": fault, "on": list(on), "times": times, **facts})

    def seen(self) -> Counter[str]:
        """Return how often each action was asked for since the last order."""
        return Counter(self._ask(None))

    def _ask(self, order: dict[str, Any] | None) -> Any:
        body = None if order is None else json.dumps(order).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + _ORDERS, body), timeout=60) as answer:
            return json.load(answer)

    def client(self) -> Any:
        """Return a boto3 client, as an administrator of the keys has one."""
        import boto3

        session = boto3.session.Session(
            aws_access_key_id="AKIAEXAMPLE", aws_secret_access_key="not-a-secret", region_name=REGION
        )
        return session.client("kms", endpoint_url=self.url)


@contextmanager
def endpoint(log: Path) -> Iterator[Endpoint]:
    made = Endpoint(log)
    made.start()
    try:
        yield made
    finally:
        made.kill()


# --- the server's side --------------------------------------------------------------------------------------


def _error(status: int, code: str, message: str) -> tuple[int, bytes]:
    return status, json.dumps({"__type": code, "message": message}).encode()


class Rules:
    """The WSGI application around moto's."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._order: dict[str, Any] = {"fault": "", "on": [], "times": 0}
        self._seen: Counter[str] = Counter()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if environ["PATH_INFO"] == _ORDERS:
            if body:
                self._order, self._seen = json.loads(body), Counter()
            return self._plain(start_response, 200, json.dumps(self._seen).encode())
        environ["wsgi.input"] = io.BytesIO(body)
        operation = environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2] or "GetCallerIdentity"
        self._seen[operation] += 1
        if operation in self._order["on"] and self._order["times"] > 0:
            self._order["times"] -= 1
            answer = self._fault(environ)
        else:
            answer = self._rule(operation, body)
        if answer is not None:
            return self._plain(start_response, *answer)
        inner: Iterable[bytes] = self._inner(environ, start_response)
        return inner

    @staticmethod
    def _plain(start_response: Any, status: int, body: bytes) -> Iterable[bytes]:
        start_response(
            f"{status} X", [("Content-Type", "application/x-amz-json-1.1"), ("Content-Length", str(len(body)))]
        )
        return [body]

    def _fault(self, environ: dict[str, Any]) -> tuple[int, bytes] | None:
        order = self._order
        if order["fault"] == "slow":
            time.sleep(order["seconds"])
            return None
        if order["fault"] == "error":
            return _error(order.get("status", 400), order["code"], order.get("message", ""))
        if order["fault"] == "body":
            return order.get("status", 200), order["body"].encode("latin-1")
        if order["fault"] == "half":
            environ["werkzeug.socket"].sendall(b'HTTP/1.1 200 X\r\nContent-Length: 500\r\n\r\n{"Plain')
        if order["fault"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return 200, b""

    @staticmethod
    def _rule(operation: str, body: bytes) -> tuple[int, bytes] | None:
        from moto.kms.models import kms_backends

        if operation not in _CRYPTO:
            return None
        request = json.loads(body)
        keys = kms_backends[ACCOUNT][REGION].keys
        key = keys.get(request.get("KeyId", request.get("DestinationKeyId", "")).rpartition("/")[2])
        if key is None:
            return None
        if key.key_state in _REFUSED:
            code, text = _REFUSED[key.key_state]
            return _error(400, code, f"{key.arn} {text}")
        tokens = {grant.token for each in keys.values() for grant in each.grants.values()}
        if not set(request.get("GrantTokens", ())) <= tokens:
            return _error(400, "InvalidGrantTokenException", "")
        for grant in key.grants.values():
            if operation == "CreateGrant" and request.get("Name") and grant.name == request["Name"]:
                return 200, json.dumps({"GrantId": grant.id, "GrantToken": grant.token}).encode()
        return None


def _serve(descriptor: int) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = Rules(DomainDispatcherApplication(create_backend_app))
    make_server("127.0.0.1", 0, application, threaded=True, fd=descriptor).serve_forever()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
