"""io.ebsd.Broker on kms.sock: the key service as ebsd sees it.

1. There is no Decrypt, Encrypt or GenerateDataKey here. What ebsd can have is a wrapped key, and a session that
   somebody else asks.
2. The caller is ebsd's word; that the call came through ebsd follows from the socket.
3. Every context here names a resource (``aws:ebs:id``) and its format (``ebsd:format``). One that names an archive,
   too, is good for a new wrapped key and for ``OpenArchiveSession`` alone (archive_sessions.py).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import trio

from ebsd.crypto.context import check_user_pairs
from ebsd.domain.errors import (
    AuthFailure,
    EbsdError,
    IntegrityFailure,
    InvalidParameterCombination,
    InvalidParameterValue,
    KmsValidation,
    NeedsRoot,
)
from ebsd.domain.ids import AccountId, account_of_uid
from ebsd.domain.model import Caller
from ebsd.domain.sharing import PublicAccess
from ebsd.ipc.peer import NO_UID, Peer
from ebsd.ipc.varlink_server import Call, Handler, Reply
from ebsd.kms import accounts, admission, anchors
from ebsd.kms.admission_interface import AdmissionMethods
from ebsd.kms.archive_sessions import ArchiveRecorder, ArchiveSessions, check_archive_context, is_archive_context
from ebsd.kms.broker import Broker
from ebsd.kms.kms_interface import decode_blob, encode_blob
from ebsd.kms.policy import Action, Requester
from ebsd.kms.service import KeyDescription, SessionRequest
from ebsd.kms.sessions import Answer, Sessions

_log: Final = logging.getLogger(__name__)

RESOURCE: Final = "aws:ebs:id"
FORMAT: Final = "ebsd:format"
SessionRecorder = Callable[[str, AccountId, SessionRequest | None, EbsdError | None, Requester | None], Awaitable[None]]
"""Records a key session's answer: resource, its owner, what was asked, the error if it was refused, and the recipient
of a shared snapshot."""
CHECK_SECONDS: Final = 5.0
"""For an answer of AWS to doctor, which does not wait long."""
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,32}")
"""User names become parts of principals; ebsd sends the uid where a name is not like this (ipc/peer.py)."""


def check_context(context: Mapping[str, str]) -> str:
    """Return the resource that a context of ebsd names; raises KmsValidation or a malformed id's error."""
    if RESOURCE not in context or FORMAT not in context:
        raise KmsValidation(reason=f"The encryption context must name {RESOURCE} and {FORMAT}")
    users = {key: value for key, value in context.items() if key not in (RESOURCE, FORMAT)}
    check_user_pairs(users)
    if not context[FORMAT]:
        raise KmsValidation(reason=f"{FORMAT} must not be empty")
    return anchors.check_resource(context[RESOURCE])


class BrokerInterface:
    """The handlers; ``handlers`` maps method names to them."""

    def __init__(
        self,
        broker: Broker,
        sessions: Sessions,
        admin_uid: int,
        shutdown: Callable[[], None],
        record_session: SessionRecorder,
        record_archive: ArchiveRecorder,
    ) -> None:
        self._broker = broker
        self._sessions = sessions
        self._admin_uid = admin_uid
        self._shutdown = shutdown
        self._record_session = record_session
        self._archives = ArchiveSessions(broker, sessions, self._requester, record_archive)

    def handlers(self) -> dict[str, Handler]:
        return {
            "GetStatus": self._get_status,
            "DescribeKey": self._describe_key,
            "GenerateDataKeyWithoutPlaintext": self._generate_data_key_without_plaintext,
            "ReEncrypt": self._re_encrypt,
            "DescribeDataKey": self._describe_data_key,
            "CreateGrant": self._create_grant,
            "RetireGrant": self._retire_grant,
            "OpenKeySession": self._open_key_session,
            "OpenArchiveSession": self._archives.open,
            "CheckSharedKey": self._check_shared_key,
            "CreateAnchor": self._create_anchor,
            "DescribeAnchor": self._describe_anchor,
            "RaiseFloor": self._raise_floor,
            "AcceptRollback": self._accept_rollback,
            "DeleteAnchor": self._delete_anchor,
            "GetAccount": self._get_account,
            "SetAccount": self._set_account,
            "ListPublicAccessBlocks": self._list_public_access_blocks,
            "RecordSharing": self._record_sharing,
            "CheckAws": self._check_aws,
            "Shutdown": self._end,
            **AdmissionMethods(self._broker, self._requester).handlers(),
        }

    def _requester(self, call: Call) -> Requester:
        """Return the user that ebsd acts for."""
        uid, name = call.parameters["Caller"]["Uid"], call.parameters["Caller"]["Name"]
        if not 0 <= uid < NO_UID:
            raise InvalidParameterValue(value=uid, parameter="Caller.Uid", reason="it is no uid")
        if _NAME.fullmatch(name) is None:
            raise InvalidParameterValue(value="a name", parameter="Caller.Name", reason="it is no user name")
        is_admin = uid in (0, self._admin_uid)
        return Requester(Caller(uid, name, account_of_uid(uid), is_admin), via_service=True)

    async def _get_status(self, _call: Call) -> dict[str, Any]:
        status = self._broker.status()
        members: dict[str, Any] = {
            "State": status.state,
            "Pid": os.getpid(),
            "StateDirectory": status.directory,
            "RootKey": status.root_key,
            "RootKeyKind": status.root_key_kind,
        }
        if status.reason is not None:
            members["Reason"] = status.reason
        if status.configured_root_key is not None:
            members["ConfiguredRootKey"] = status.configured_root_key
        pending = self._broker.running.deletion.pending() if status.state == "running" else None
        if pending is not None:
            members["PendingDeletion"] = {
                "Keys": pending.keys,
                "Resources": pending.resources,
                "Next": pending.next,
            }
        return members

    # --- keys -----------------------------------------------------------------------------------------------

    async def _describe_key(self, call: Call) -> dict[str, Any]:
        key = await self._broker.running.services.describe(self._requester(call), call.parameters["KeyId"])
        return {
            "Key": {
                "KeyId": key.key_id,
                "Arn": key.arn,
                "AccountId": key.account,
                "KeyState": key.state,
                "KeyManager": key.manager,
                "KeySpec": key.spec,
                "KeyUsage": key.usage,
            }
        }

    async def _generate_data_key_without_plaintext(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        check = check_archive_context if is_archive_context(p["EncryptionContext"]) else check_context
        check(p["EncryptionContext"])
        wrapped = await self._broker.running.services.generate_data_key_without_plaintext(
            self._requester(call), p["KeyId"], p["NumberOfBytes"], p["EncryptionContext"]
        )
        return {"CiphertextBlob": encode_blob(wrapped.blob), "KeyId": wrapped.key_arn}

    async def _re_encrypt(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        source_context, context = p["SourceEncryptionContext"], p["DestinationEncryptionContext"]
        source_resource = check_context(source_context)
        check_context(context)
        running = self._broker.running
        source, wrapped = await running.services.re_encrypt(
            self._requester(call),
            decode_blob(p["CiphertextBlob"]),
            None,
            source_context,
            p["DestinationKeyId"],
            context,
        )
        # A snapshot keeps the context of its volume, which may be gone by now with its anchor; while there is one,
        # a blob of another CMK than the anchored one is not carried over into a new resource.
        anchor = running.registry.anchor_if_any(source_resource)
        if anchor is not None:
            anchors.check_key(anchor, source.key_arn)
        if p.get("ResourceId") is not None:
            anchors.check_key(running.registry.anchor(p["ResourceId"]), source.key_arn)
        return {
            "CiphertextBlob": encode_blob(wrapped.blob),
            "KeyId": wrapped.key_arn,
            "SourceKeyMaterialId": source.material_id,
            "DestinationKeyMaterialId": wrapped.material_id,
        }

    async def _describe_data_key(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        running = self._broker.running
        anchor = running.registry.anchor(p["ResourceId"])
        material = running.keys.material_of(decode_blob(p["CiphertextBlob"]))
        members: dict[str, Any] = {}
        if anchor.data_key_created is not None:
            members["DataKeyCreationDate"] = anchor.data_key_created
        if material is not None:
            members |= zip(("KeyMaterialId", "KeyMaterialCreationDate", "KeyMaterialState"), material, strict=True)
        return members

    async def _create_grant(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        context = p["EncryptionContextEquals"]
        check_context(context)
        requester = self._requester(call)
        made = await self._broker.running.services.create_attach_grant(requester, p["KeyId"], context, p.get("Name"))
        return {"GrantId": made.grant_id}

    async def _retire_grant(self, call: Call) -> None:
        p = call.parameters
        await self._broker.running.services.retire_attach_grant(p["KeyId"], p["GrantId"])

    async def _check_shared_key(self, call: Call) -> None:
        p = call.parameters
        check_context(p["EncryptionContext"])
        services = self._broker.running.services
        await services.check_shared_use(self._requester(call), p["KeyId"], p["EncryptionContext"])

    # --- key sessions ---------------------------------------------------------------------------------------

    async def _open_key_session(self, call: Call) -> Reply:
        p = call.parameters
        resource = p["ResourceId"]
        running = self._broker.running
        anchor = running.registry.anchor(resource)
        request = _session_request(p)
        recipient = None if p.get("Caller") is None else self._requester(call)
        if request is None:
            anchors.check_key(anchor, None)
        else:
            check_context(request.context)
            await running.services.check_session(anchor, request)
            if recipient is not None:
                await running.services.check_shared_use(recipient, request.key_name, request.context)

        async def question() -> Answer:
            # The state may have changed since: everything is read again.
            now = self._broker.running
            present = now.registry.anchor(resource)
            if request is None:
                anchors.check_key(present, None)
                return Answer(present, None)
            if recipient is not None:
                await now.services.check_shared_use(recipient, request.key_name, request.context)
            data_key = await now.services.decrypt_for_session(present, request)
            try:
                # Another back end may have taken its time over it.
                return Answer(anchors.unchanged(present, self._broker.running.registry.anchor(resource)), data_key)
            except BaseException:
                data_key.wipe()
                raise

        async def witness(error: EbsdError | None) -> None:
            await self._record_session(resource, anchor.owner, request, error, recipient)

        return Reply({"Session": 0}, [self._sessions.open(resource, question, witness)])

    # --- anchors --------------------------------------------------------------------------------------------

    async def _create_anchor(self, call: Call) -> None:
        p = call.parameters
        requester = self._requester(call)
        resource = anchors.check_resource(p["ResourceId"])
        running = self._broker.running
        parts = [p.get(member) for member in ("KeyId", "CiphertextBlob", "EncryptionContext")]
        source, made_from = p.get("SourceResourceId"), p.get("MadeFromResourceId")
        if source is not None:
            if made_from is not None or any(part is not None for part in parts):
                raise InvalidParameterCombination(reason="An anchor that inherits its source's key takes no other")
            anchor = await running.registry.inherit_anchor(resource, requester.account, source)
            if anchor.encrypted is not p["Encrypted"]:
                await running.registry.delete_anchor(resource)
                raise IntegrityFailure(
                    resource=source, reason="ebsd and the key service disagree whether it is encrypted"
                )
            return
        if not p["Encrypted"]:
            if any(part is not None for part in parts):
                raise InvalidParameterCombination(reason="An unencrypted resource has no key")
            await running.registry.create_anchor(resource, requester.account, None, None, None, made_from)
            return
        key_id, blob, context = parts
        if key_id is None or blob is None or context is None:
            raise InvalidParameterCombination(
                reason="An encrypted resource has KeyId, CiphertextBlob and EncryptionContext"
            )
        context_id = check_context(context)
        arn, kcv = await running.services.check_value(requester, key_id, decode_blob(blob), context)
        await running.registry.create_anchor(resource, requester.account, arn, kcv, context_id, made_from)

    async def _describe_anchor(self, call: Call) -> dict[str, Any]:
        anchor = self._broker.running.registry.anchor(call.parameters["ResourceId"])
        return {"Anchor": anchors.as_members(anchor)}

    async def _raise_floor(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        return {"Floor": await self._broker.running.registry.raise_floor(p["ResourceId"], p["Generation"])}

    async def _accept_rollback(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        caller = self._requester(call).caller
        if not caller.is_admin:
            raise NeedsRoot(operation="Accepting a rollback", remedy="Ask an administrator of this host.")
        former = await self._broker.running.registry.accept_rollback(p["ResourceId"], p["Generation"])
        _log.warning(
            "uid %d accepted that %s went back from generation %d to %d",
            caller.uid, p["ResourceId"], former, p["Generation"],
        )  # fmt: skip
        return {"FormerFloor": former}

    async def _delete_anchor(self, call: Call) -> None:
        await self._broker.running.registry.delete_anchor(call.parameters["ResourceId"])

    # --- accounts -------------------------------------------------------------------------------------------

    async def _get_account(self, call: Call) -> dict[str, Any]:
        requester = self._requester(call)
        running = self._broker.running
        judged = bool(admission.binding(running.store.model, requester.account))
        return {**accounts.as_members(running.registry.account(requester.account)), "AdmissionRules": judged}

    async def _set_account(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        requester = self._requester(call)
        running = self._broker.running
        default_key: tuple[KeyDescription | None] | None = None
        name = p.get("EbsDefaultKmsKeyId")
        if name == "":
            default_key = (None,)
        elif name is not None:
            action = Action.GENERATE_DATA_KEY_WITHOUT_PLAINTEXT
            default_key = (await running.services.describe(requester, name, action),)
        account = await running.registry.set_account(
            requester.account, p.get("EbsEncryptionByDefault"), default_key, _public_access(p)
        )
        return accounts.as_members(account)

    async def _list_public_access_blocks(self, _call: Call) -> dict[str, Any]:
        return {"AccountIds": self._broker.running.registry.accounts_without_public_snapshots()}

    async def _record_sharing(self, call: Call) -> None:
        """Being served is being recorded; of a snapshot that the key service does not know nothing is shared."""
        self._requester(call)
        self._broker.running.registry.anchor(call.parameters["ResourceId"])

    # --- back ends ------------------------------------------------------------------------------------------

    async def _check_aws(self, _call: Call) -> dict[str, Any]:
        aws = self._broker.aws
        if aws is None:
            return {}
        members: dict[str, Any] = {"Place": aws.settings.place}
        try:
            with trio.fail_after(CHECK_SECONDS):
                seconds, members["Principal"] = await aws.probe()
        except trio.TooSlowError:
            return {**members, "Problem": f"it did not answer within {CHECK_SECONDS:g} seconds"}
        except EbsdError as exc:
            return {**members, "Problem": exc.message}
        return {**members, "Milliseconds": round(seconds * 1000)}

    # --- end ------------------------------------------------------------------------------------------------

    async def _end(self, _call: Call) -> None:
        self._shutdown()


def _public_access(parameters: Mapping[str, Any]) -> PublicAccess | None:
    value = parameters.get("SnapshotBlockPublicAccess")
    try:
        return None if value is None else PublicAccess(value)
    except ValueError:
        raise InvalidParameterValue(
            value=value, parameter="SnapshotBlockPublicAccess", reason=f"it is {', '.join(PublicAccess)}"
        ) from None


def _session_request(parameters: Mapping[str, Any]) -> SessionRequest | None:
    members = ("KeyId", "GrantId", "CiphertextBlob", "EncryptionContext")
    parts = [parameters.get(member) for member in members]
    if all(part is None for part in parts):
        return None
    key_id, grant_id, blob, context = parts
    if key_id is None or grant_id is None or blob is None or context is None:
        raise InvalidParameterCombination(reason=f"A key session takes all of {', '.join(members)}, or none")
    return SessionRequest(key_id, grant_id, decode_blob(blob), dict(context))


def admit_only(admin_uid: int) -> Callable[[Peer], None]:
    """Return the rule of kms.sock, and of keys.sock without root: root and the daemon's uid, whatever the mode."""

    def admit(peer: Peer) -> None:
        if peer.uid not in (0, admin_uid):
            raise AuthFailure(uid=peer.uid, reason=f"this socket serves uid {admin_uid} only")

    return admit
