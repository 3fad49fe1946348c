"""Where calls become audit records: around every handler of the broker's interfaces, and at each key session's answer.

1. Every method is recorded unless RULES says otherwise, so that a new one is by being there.
2. The record is durable before the reply, and before the data key, leaves the broker. When it cannot be, the reply
   does not leave.
3. What only shows (Describe, Get, List) is recorded without waiting for the disk.
4. A user whose records fill the log too fast is refused before anything is done or recorded (``throttle``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import Any, Final

import trio

from ebsd.crypto.wrap import parse_blob
from ebsd.domain.errors import EbsdError, InternalFailure, KeyServiceUnavailable, Throttled
from ebsd.domain.ids import AccountId, account_of_uid, split_alias_arn, split_key_arn, user_arn
from ebsd.domain.model import Caller
from ebsd.domain.sharing import PublicAccess
from ebsd.ipc.incidents import host_failure
from ebsd.ipc.peer import NO_UID
from ebsd.ipc.sockets import close_all
from ebsd.ipc.varlink_server import Call, Handler, Reply
from ebsd.kms import grants
from ebsd.kms.audit import records
from ebsd.kms.audit.lines import encode_record
from ebsd.kms.audit.records import EBSD, EC2, KMS, Event, Outcome
from ebsd.kms.audit.throttle import Throttle
from ebsd.kms.audit.trail import Trail
from ebsd.kms.broker import Broker
from ebsd.kms.kms_interface import decode_blob, requester_of
from ebsd.kms.model import ManagedKeyMissing
from ebsd.kms.policy import SERVICE, Action, Requester, may_touch_account
from ebsd.kms.service import SessionRequest

BROKER: Final = "io.ebsd.Broker"
_log = logging.getLogger(__name__)


class Rule(Enum):
    ALWAYS = "every call"
    FAILURES = "calls that failed"
    NEVER = "no call"


RULES: Final[Mapping[str, Rule]] = {
    "io.ebsd.Broker.GetStatus": Rule.NEVER,
    "io.ebsd.Broker.GetAccount": Rule.NEVER,
    "io.ebsd.Broker.ListPublicAccessBlocks": Rule.NEVER,
    "io.ebsd.Broker.DescribeAnchor": Rule.NEVER,
    "io.ebsd.Broker.DescribeDataKey": Rule.NEVER,
    "io.ebsd.Broker.CheckAws": Rule.NEVER,
    "io.ebsd.Broker.Shutdown": Rule.NEVER,  # the chain's end says it
    "io.ebsd.Broker.RaiseFloor": Rule.FAILURES,  # at every start and end of an attachment, and it only ever goes up
    "io.ebsd.Broker.OpenKeySession": Rule.FAILURES,  # the session's Decrypt is the record
    "io.ebsd.Broker.OpenArchiveSession": Rule.FAILURES,
    "io.ebsd.KeyService.GetStatus": Rule.NEVER,
    "io.ebsd.Audit.LookupEvents": Rule.NEVER,  # each look would be something new to see
    "io.ebsd.Audit.GetLog": Rule.NEVER,
    "io.ebsd.Audit.OpenSegment": Rule.NEVER,
}
"""What is not recorded every time."""

ANNOUNCED: Final = frozenset(("io.ebsd.KeyService.Backup", "io.ebsd.Audit.TakeVerificationKey"))
"""What gives secrets away before it is done: a durable ``BeginX`` comes first, or a kill in between would hide it."""
UNNAMED: Final = "users without a name"
"""Who has no name in the user database shares one bucket: anybody has 65,536 such uids where there is subuid(5)."""
_LINE_BYTES: Final = 192
"""What a line of the log has around its record, about."""

_SOURCES: Final = {
    "CreateAnchor": EBSD, "DeleteAnchor": EBSD, "RaiseFloor": EBSD, "OpenKeySession": EBSD, "SetAccount": EC2,
    "AcceptRollback": EBSD, "OpenArchiveSession": EBSD, "CheckSharedKey": EBSD, "Admit": EBSD,
    "PutAdmissionRule": EBSD, "DeleteAdmissionRule": EBSD, "ListAdmissionRules": EBSD,
}  # fmt: skip
"""eventSource of the methods of kms.sock that are no actions of KMS."""


class Boundary:
    """Wraps handlers and key sessions; one for both sockets."""

    def __init__(self, trail: Trail, broker: Broker, admin_uid: int, throttle: Throttle) -> None:
        self._throttle = throttle
        self._trail = trail
        self._broker = broker
        self._admin_uid = admin_uid

    def audited(self, interface: str, handlers: Mapping[str, Handler]) -> dict[str, Handler]:
        """Return the handlers, each with its record."""
        return {name: self._wrapped(interface, name, handler) for name, handler in handlers.items()}

    def _wrapped(self, interface: str, name: str, handler: Handler) -> Handler:
        rule = RULES.get(f"{interface}.{name}", Rule.ALWAYS)
        if rule is Rule.NEVER:
            return handler

        async def only_failures(call: Call) -> Reply | dict[str, Any] | None:
            try:
                return await handler(call)
            except Exception as exc:
                await self._failed(await self._event(interface, name, call), exc)
                raise

        async def always(call: Call) -> Reply | dict[str, Any] | None:
            async with self._trail.admitted():
                event = await self._event(interface, name, call)
                await self._refuse_throttled(event)
                if f"{interface}.{name}" in ANNOUNCED and self._is_admin(call.peer.uid):
                    event = await self._announced(event)
                try:
                    result = await handler(call)
                except trio.Cancelled:
                    # The broker ends. What the handler had committed by then has happened.
                    with trio.CancelScope(shield=True):
                        await self._failed(event, KeyServiceUnavailable(reason="it ended before its answer"))
                    raise
                except Exception as exc:
                    await self._failed(event, exc)
                    raise
                await self._succeeded(event, result)
                return result

        return always if rule is Rule.ALWAYS else only_failures

    # --- before the handler ---------------------------------------------------------------------------------

    async def _refuse_throttled(self, event: Event) -> None:
        """Raise Throttled for a user who filled too much of the log, and tell of it now and then."""
        payer = self._payer(event.identity)
        if payer is None or not self._throttle.refuses(payer):
            return
        error = Throttled()
        refused = self._throttle.summary(payer)
        if refused is not None:
            _log.warning("calls of uid %s are refused: they fill the audit log too fast", event.identity["principalId"])
            summary = Event(
                EBSD, "ThrottleUser", event.identity, {"RefusedCalls": refused}, Outcome(error=error),
                user_agent=event.user_agent, type="AwsServiceEvent",
            )  # fmt: skip
            try:
                await self._trail.record(records.record_of(summary, self._trail.stamp()))
            except EbsdError as problem:
                _log.error("that calls are refused was not recorded: %s", problem.message)
        raise error

    def _payer(self, identity: Mapping[str, Any]) -> str | None:
        """Return whose bucket a record empties; None for ebsd itself, for key sessions and for administrators."""
        if identity["type"] != "IAMUser" or self._is_admin(int(identity["principalId"])):
            return None
        uid = str(identity["principalId"])
        return uid if identity["userName"] != uid else UNNAMED

    def _is_admin(self, uid: int) -> bool:
        return uid in (0, self._admin_uid)

    async def _announced(self, event: Event) -> Event:
        """Return the event of an operation whose beginning is in the log, durably; raises what ``admitted`` raises."""
        async with self._trail.admitted():
            record = records.record_of(replace(event, name=f"Begin{event.name}"), self._trail.stamp())
            await self._trail.record(record)
        return replace(event, additional={**event.additional, "announcedBy": record["eventID"]})

    # --- key sessions ---------------------------------------------------------------------------------------

    async def session_answered(
        self,
        resource: str,
        owner: AccountId,
        request: SessionRequest | None,
        error: EbsdError | None,
        recipient: Requester | None = None,
    ) -> None:
        """Record the one Decrypt of a key session, durably; raises when that cannot be done.

        ``recipient``: on whose behalf a snapshot of another account is read; the record is his, too.
        """
        if request is None:
            return  # an unencrypted resource: no key was used
        account = _account_of(request.key_name)
        principal = grants.infrastructure_principal(account)
        identity = {
            "type": "AssumedRole",
            "principalId": principal.partition("assumed-role/")[2],
            "arn": principal,
            "accountId": account,
            "invokedBy": SERVICE,
        }
        additional: dict[str, Any] = {
            "resourceId": resource,
            "grantId": request.grant_id,
            **_material(request.blob),
        }
        if recipient is not None:
            additional["onBehalfOf"] = {"accountId": recipient.account, "arn": recipient.principal}
        event = Event(
            KMS,
            "Decrypt",
            identity,
            {"EncryptionContext": dict(request.context), "EncryptionAlgorithm": "SYMMETRIC_DEFAULT"},
            Outcome(error=error),
            (request.key_name,),
            owner,
            additional=additional,
        )
        stamp = self._trail.stamp(records.request_id_of_grant(request.grant_id))
        await self._trail.record(records.record_of(event, stamp))

    async def archive_answered(
        self, requester: Requester, key: str, blob: bytes, context: Mapping[str, str], error: EbsdError | None
    ) -> None:
        """Record the Decrypt of an archive's key, which was the user's own; raises when that cannot be done."""
        account = _account_of(key)
        acting = requester.caller.is_admin and account not in (requester.account, "")
        event = Event(
            KMS,
            "Decrypt",
            _identity(requester) | {"invokedBy": SERVICE},
            {"EncryptionContext": dict(context), "EncryptionAlgorithm": "SYMMETRIC_DEFAULT"},
            Outcome(error=error),
            (key,),
            requester.account,
            additional={**_material(blob), **({"actingFor": [account]} if acting else {})},
        )
        await self._trail.record(records.record_of(event, self._trail.stamp()))

    # --- calls ----------------------------------------------------------------------------------------------

    async def _event(self, interface: str, name: str, call: Call) -> Event:
        """Return what is known of a call before its handler runs."""
        p = call.parameters
        requester: Requester | None = None
        if interface != BROKER:
            requester = await requester_of(call.peer, self._admin_uid)
            identity = _identity(requester)
        elif "Caller" in p:
            requester = _caller(p["Caller"], self._admin_uid)
            identity = _identity(requester) | {"invokedBy": SERVICE}
        else:
            identity = records.service_identity()
        source = _SOURCES.get(name, KMS) if interface == BROKER else KMS if interface == "io.ebsd.KMS" else EBSD
        keys = self._keys_of(requester, p)
        additional: dict[str, Any] = {}
        if requester is not None and requester.caller.is_admin:
            owners = {_account_of(key) for key in keys} - {requester.account, ""}
            additional |= {"actingFor": sorted(owners)} if owners else {}
        event_name, parameters = _as_on_aws(interface, name, p, keys)
        agent = "" if interface == BROKER else f"keys.sock uid {call.peer.uid}"
        return Event(source, event_name, identity, parameters, Outcome(), keys, self._owner_of(p), agent, additional)

    def _keys_of(self, requester: Requester | None, p: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the ARNs of the keys that a request names, as far as names mean anything."""
        names = [p.get(member) for member in ("KeyId", "TargetKeyId", "SourceKeyId", "DestinationKeyId")]
        names.append(p.get("AliasName"))
        return tuple(arn for name in names if isinstance(name, str) and (arn := self._arn(requester, name)))

    def _arn(self, requester: Requester | None, name: str) -> str | None:
        if requester is None:
            return name if name.startswith("arn:") else None
        if _is_foreign_alias(requester, name):
            return name  # whose record he can read: what it means is told by the reply, if he gets one
        try:
            return self._broker.running.store.model.find(requester, name, Action.DESCRIBE_KEY).arn
        except (EbsdError, ManagedKeyMissing):
            return name if name.startswith("arn:") and len(name) <= 256 else None

    def _owner_of(self, p: Mapping[str, Any]) -> AccountId | None:
        resource = p.get("ResourceId")
        try:
            anchor = self._broker.running.store.model.anchors.get(resource) if isinstance(resource, str) else None
        except EbsdError:
            return None
        if anchor is not None:
            return anchor.owner
        caller = p.get("Caller")
        return account_of_uid(caller["Uid"]) if caller and 0 <= caller["Uid"] < NO_UID else None

    async def _failed(self, event: Event, exc: Exception) -> None:
        """Record a refusal; it is one, recorded or not, so a failure here is told in the log."""
        error = exc if isinstance(exc, EbsdError) else _failure(exc)
        try:
            await self._trail.record(self._record(event, Outcome(error=error)))
        except EbsdError as problem:
            _log.error("a refused %s was not recorded: %s", event.name, problem.message)

    async def _succeeded(self, event: Event, result: Reply | dict[str, Any] | None) -> None:
        reply = result.parameters if isinstance(result, Reply) else result or {}
        try:
            await self._trail.record(self._record(event, Outcome(reply)), sync=not records.is_a_look(event.name))
        except BaseException:
            if isinstance(result, Reply):
                close_all(result.fds)
            raise

    def _record(self, event: Event, outcome: Outcome) -> dict[str, Any]:
        grant, request_id = outcome.reply.get("GrantId"), None
        if event.name == "CreateGrant" and isinstance(grant, str) and "invokedBy" in event.identity:
            request_id = records.request_id_of_grant(grant)
        additional = dict(event.additional)
        blob = outcome.reply.get("CiphertextBlob") or event.parameters.get("CiphertextBlob")
        if isinstance(blob, str):
            additional |= _material_of_text(blob)
        full = Event(
            event.source, event.name, event.identity, event.parameters, outcome, event.keys, event.owner,
            event.user_agent, additional,
        )  # fmt: skip
        record = records.record_of(full, self._trail.stamp(request_id))
        payer = self._payer(event.identity)
        if payer is not None:
            self._throttle.charge(payer, len(encode_record(record)) + _LINE_BYTES)
        return record


def _failure(exc: Exception) -> EbsdError:
    """Return what a client will be told of an unexpected exception, but for the number of the incident."""
    if isinstance(exc, OSError) and exc.errno is not None:
        return host_failure(exc)
    return InternalFailure(incident="in the log")


def _identity(requester: Requester) -> dict[str, Any]:
    caller = requester.caller
    return {
        "type": "IAMUser",
        "principalId": str(caller.uid),
        "arn": user_arn(caller.account, caller.name),
        "accountId": caller.account,
        "userName": caller.name,
    }


def _caller(caller: Mapping[str, Any], admin_uid: int) -> Requester:
    """Return the user that ebsd names, whether or not there can be such a user: a refusal has one, too."""
    uid, name = caller["Uid"], caller["Name"]
    account = account_of_uid(uid) if 0 <= uid < NO_UID else AccountId("")
    return Requester(Caller(uid, name[:64], account, uid in (0, admin_uid)), via_service=True)


def _is_foreign_alias(requester: Requester, name: str) -> bool:
    try:
        alias = split_alias_arn(name)
    except EbsdError:
        return False
    return alias is not None and len(name) <= 512 and not may_touch_account(requester, alias[0])


def _account_of(arn: str) -> AccountId:
    try:
        return split_key_arn(arn)[1]
    except EbsdError:
        return AccountId("")


def _as_on_aws(interface: str, name: str, p: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Mapping[str, Any]]:
    """Return event name and request parameters under the names that AWS has for what a method of kms.sock does."""
    if interface != BROKER:
        return name, p
    if name == "CreateGrant":
        request = grants.attach_request(_account_of(keys[0] if keys else ""), {}, None)
        return name, {
            "KeyId": p["KeyId"],
            "Constraints": {"EncryptionContextEquals": p["EncryptionContextEquals"]},
            "Operations": list(request.operations),
            "GranteePrincipal": request.grantee,
            "RetiringPrincipal": request.retiring,
            "Name": p.get("Name"),
        }
    if name == "RecordSharing":
        return ("ResetSnapshotAttribute" if p["Reset"] else "ModifySnapshotAttribute"), p
    if name == "SetAccount":
        blocking = p.get("SnapshotBlockPublicAccess")
        if blocking is not None:
            word = "Disable" if blocking == PublicAccess.UNBLOCKED else "Enable"
            return f"{word}SnapshotBlockPublicAccess", p
        default = p.get("EbsEncryptionByDefault")
        if default is not None:
            return f"{'Enable' if default else 'Disable'}EbsEncryptionByDefault", p
        return ("ModifyEbsDefaultKmsKeyId" if p.get("EbsDefaultKmsKeyId") else "ResetEbsDefaultKmsKeyId"), p
    return name, p


def _material_of_text(blob: str) -> dict[str, str]:
    try:
        return _material(decode_blob(blob))
    except EbsdError:
        return {}


def _material(blob: bytes) -> dict[str, str]:
    """Return which backing key a wrapped key names; nothing of a blob that is not the local back end's."""
    try:
        return {"keyMaterialId": parse_blob(blob).backing_id.hex()}
    except EbsdError:
        return {}
