"""The keys of archives: each is opened once, for one user whom its KMS key allows Decrypt, and never by ebsd itself.

1. An archive's context has ``ebsd:archive``; no volume's or snapshot's has (``check_context`` refuses it there). So no
   session of this kind opens a key of the store, whatever blob it is given, and no other opens an archive's.
2. There is no anchor: an archive comes from elsewhere. What stands in its place is the right of the user himself to
   Decrypt under this KMS key, in this context, through ebsd; it is looked at when the session is asked.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping

from ebsd.crypto.kdf import DATA_KEY_BYTES
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import EbsdError, KmsValidation
from ebsd.domain.ids import parse_snapshot_id, split_key_arn
from ebsd.ipc.varlink_server import Call, Reply
from ebsd.kms.broker import Broker
from ebsd.kms.kms_interface import decode_blob
from ebsd.kms.policy import Requester
from ebsd.kms.records import Anchor
from ebsd.kms.sessions import Answer, Sessions

RESOURCE = "aws:ebs:id"
FORMAT = "ebsd:format"
ARCHIVE = "ebsd:archive"
FORMAT_VALUE = "1/archive"

ArchiveRecorder = Callable[[Requester, str, bytes, Mapping[str, str], EbsdError | None], Awaitable[None]]
"""Records the one Decrypt of such a session: who, key ARN, blob, context, and the error if it was refused."""


def is_archive_context(context: Mapping[str, str]) -> bool:
    return ARCHIVE in context


def check_archive_context(context: Mapping[str, str]) -> str:
    """Return the archive's id; raises KmsValidation, and SnapshotIdMalformed for the snapshot in it."""
    if set(context) != {RESOURCE, FORMAT, ARCHIVE} or context[FORMAT] != FORMAT_VALUE:
        raise KmsValidation(reason=f"The encryption context of an archive is {RESOURCE}, {FORMAT} and {ARCHIVE}")
    parse_snapshot_id(context[RESOURCE])
    try:
        archive = uuid.UUID(context[ARCHIVE])
    except ValueError:
        raise KmsValidation(reason=f"{ARCHIVE} is the UUID of an archive") from None
    if str(archive) != context[ARCHIVE]:
        raise KmsValidation(reason=f"{ARCHIVE} is the UUID of an archive")
    return context[ARCHIVE]


class ArchiveSessions:
    """Opens sessions for the keys of archives."""

    def __init__(
        self, broker: Broker, sessions: Sessions, requester_of: Callable[[Call], Requester], record: ArchiveRecorder
    ) -> None:
        self._broker = broker
        self._sessions = sessions
        self._requester_of = requester_of
        self._record = record

    async def open(self, call: Call) -> Reply:
        """Handle OpenArchiveSession."""
        p = call.parameters
        requester, key, context = self._requester_of(call), p["KeyId"], dict(p["EncryptionContext"])
        archive, blob = check_archive_context(context), decode_blob(p["CiphertextBlob"])
        split_key_arn(key)  # an ARN: an alias may mean another key by the time that the session is asked

        async def question() -> Answer:
            services = self._broker.running.services
            data_key = await services.decrypt_for_archive(requester, key, blob, context)
            return Answer(_described(archive, requester, key), _checked(data_key))

        async def witness(error: EbsdError | None) -> None:
            await self._record(requester, key, blob, context, error)

        return Reply({"Session": 0}, [self._sessions.open(archive, question, witness)])


def _checked(data_key: Secret) -> Secret:
    if len(data_key) != DATA_KEY_BYTES:
        length = len(data_key)
        data_key.wipe()
        raise KmsValidation(reason=f"The key of an archive has {DATA_KEY_BYTES} bytes, this one {length}")
    return data_key


def _described(archive: str, requester: Requester, key: str) -> Anchor:
    """Return what the session says beside the key, in the form of an anchor; nobody keeps it."""
    return Anchor(resource=archive, owner=requester.account, encrypted=True, key_arn=key, kcv=None, context_id=archive)
