"""Requests to AWS KMS: boto3 in a bounded number of threads, each request with one deadline for all its attempts.

1. boto3 is imported here and nowhere else, when the first request needs it.
2. A request that passes its deadline is given up; its thread ends by itself, for botocore's own time-outs are shorter
   than that, and until then it counts against ``THREADS``. More requests than that wait, no longer than the deadline.
3. A plaintext is copied into a ``Secret`` in the thread that received it; then the two ``bytes`` that botocore made
   (the body and the decoded key) are overwritten in place. What cannot be wiped: the text between them that the JSON
   parser made, and buffers of the HTTP and TLS layers. They are freed and stay in this process, which dumps no core
   and which nobody may trace, until the allocator uses them again.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import trio

from ebsd import __version__
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import EbsdError, KeyServiceUnavailable
from ebsd.kms.aws_errors import GARBLED, Garbled, from_answer, from_way
from ebsd.kms.aws_settings import AwsSettings

T = TypeVar("T")

THREADS: Final = 16
"""Requests under way at one time."""
MAX_BLOB: Final = 6144
"""Bytes; KMS's own limit for CiphertextBlob."""


class Connection:
    """The blocking end: one client of KMS, used from several threads, which botocore allows."""

    def __init__(self, settings: AwsSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._clients: dict[str, Any] = {}
        self._session: Any = None
        self._principal = settings.principal

    @property
    def place(self) -> str:
        return self._settings.place

    def call(self, operation: str, key: str, grant: str = "", **parameters: Any) -> dict[str, Any]:
        """Do one KMS action (``decrypt``, ...) and return its answer; blocks. ``key``, ``grant``: named in errors."""
        return self._exchange("kms", operation, key, grant, parameters)

    def principal(self) -> str:
        """Return the ARN of who we are there; blocks at first."""
        if self._principal is None:
            answer = self._exchange("sts", "get_caller_identity", "the caller's identity", "", {})
            self._principal = text_of(answer, "Arn")
        return self._principal

    def connect(self) -> None:
        """Import boto3 and make the client, so that the first request need not. Raises KeyServiceUnavailable."""
        self._client("kms")

    def _exchange(
        self, service: str, operation: str, key: str, grant: str, parameters: Mapping[str, Any]
    ) -> dict[str, Any]:
        client = self._client(service)
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        action = "".join(word.capitalize() for word in operation.split("_"))
        try:
            answer = getattr(client, operation)(**parameters)
        except ClientError as exc:
            raise from_answer(exc.response, self.place, action, key, grant) from None
        except (BotoCoreError, HTTPClientError, OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
            # The last four are what a parser meets in an answer that is none: bad base64, a list where an object is
            # due. No text of theirs is shown or kept: it may quote a body.
            raise from_way(exc, self.place) from None
        if not isinstance(answer, dict):
            raise KeyServiceUnavailable(reason=f"{self.place} {GARBLED}")
        return answer

    def _client(self, service: str) -> Any:
        with self._lock:
            if service not in self._clients:
                self._clients[service] = self._make_client(service)
            return self._clients[service]

    def _make_client(self, service: str) -> Any:
        settings = self._settings
        os.environ.update(settings.environment)
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ImportError as exc:
            raise KeyServiceUnavailable(
                reason=f"{self.place} needs boto3, which is not installed: pip install 'ebsd[aws]'"
            ) from exc
        # Their debug messages have whole answers in them.
        for name in ("boto3", "botocore", "urllib3"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            if self._session is None:
                self._session = boto3.session.Session(profile_name=settings.profile, region_name=settings.region)
            config = Config(
                connect_timeout=settings.connect_timeout,
                read_timeout=settings.read_timeout,
                # Waits a random part of 1, 2, 4... seconds before the second and each further attempt.
                retries={"mode": "standard", "total_max_attempts": settings.attempts},
                max_pool_connections=THREADS,
                user_agent_extra=f"ebsd/{__version__}",
            )
            client = self._session.client(service, endpoint_url=settings.endpoint_url, config=config)
        except (BotoCoreError, OSError, ValueError) as exc:  # ValueError: no such URL
            raise from_way(exc, self.place) from exc
        if service == "kms":
            client.meta.events.register("after-call.kms.Decrypt", _wipe_body)
        return client


def _wipe_body(http_response: Any, **_other: Any) -> None:
    if isinstance(http_response.content, bytes):
        overwrite(http_response.content)


def overwrite(value: bytes) -> None:
    """Overwrite a bytes object in place, which CPython allows nobody but who looks away.

    Only for an object that this process just made and that nothing else holds: equal constants are shared.
    """
    if len(value) > 1:  # each single byte exists once
        ctypes.memset(ctypes.cast(ctypes.c_char_p(value), ctypes.c_void_p), 0, len(value))


class AwsClient:
    """The asynchronous end: runs blocking requests in threads."""

    def __init__(self, settings: AwsSettings) -> None:
        self.settings = settings
        self._connection = Connection(settings)
        self._threads = trio.CapacityLimiter(THREADS)

    async def request(self, work: Callable[[Connection], T]) -> T:
        """Run a request, of one or several calls, in a thread. Raises KeyServiceUnavailable after the deadline."""

        def run() -> T:
            try:
                return work(self._connection)
            except Garbled:
                raise KeyServiceUnavailable(reason=f"{self.settings.place} {GARBLED}") from None

        try:
            with trio.fail_after(self.settings.deadline):
                return await trio.to_thread.run_sync(run, abandon_on_cancel=True, limiter=self._threads)
        except trio.TooSlowError:
            raise KeyServiceUnavailable(
                reason=f"{self.settings.place} did not answer within {self.settings.deadline:g} seconds"
            ) from None

    async def connect(self) -> EbsdError | None:
        """Get ready for the first request; returns what is in the way."""
        try:
            await self.request(lambda connection: connection.connect())
        except EbsdError as exc:
            return exc
        return None


def text_of(answer: Mapping[str, Any], member: str) -> str:
    """Return a text of an answer; raises Garbled."""
    value = answer.get(member)
    if not isinstance(value, str) or not value:
        raise Garbled(member)
    return value


def blob_of(answer: Mapping[str, Any]) -> bytes:
    """Return the wrapped key of an answer; raises Garbled."""
    value = answer.get("CiphertextBlob")
    if not isinstance(value, bytes) or not 1 <= len(value) <= MAX_BLOB:
        raise Garbled("CiphertextBlob")
    return value


def secret_of(answer: dict[str, Any]) -> Secret:
    """Take the plaintext out of an answer, as secret memory of the receiver's; raises Garbled."""
    value = answer.pop("Plaintext", None)
    if not isinstance(value, bytes) or not value:
        raise Garbled("Plaintext")
    try:
        return Secret.from_buffer(value)
    finally:
        overwrite(value)
