"""ebsd's side of kms.sock: each broker method as a typed call.

1. There is no way here to ask for a data key: a key session's descriptor is passed on unread.
2. A reply that the interface file does not declare, and a descriptor that nobody asked for, come from something that
   is no broker of ours: KeyServiceUnavailable, and nothing of it is kept.
3. Each call has a deadline, by what may have to be waited for (``DEADLINES``). One that hangs is told from one that is
   slow: while a call is not answered, GetStatus is asked beside it, which a broker answers from memory, and when that
   has no answer either the call is given up. After that nothing is sent before GetStatus was answered.
4. What was given up is not begun later: a broker drops a call whose client has hung up (``ipc/varlink_server.py``). It
   may have been begun before. So what undoes it is kept here until the key service answers again (``afterwards``); all
   of those may be done twice, and of an ebsd that ends first the next one finds them in the catalog, but for a grant.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, Final

import trio

from ebsd.domain.admission import Making
from ebsd.domain.errors import (
    DaemonUnreachable,
    EbsdError,
    IntegrityFailure,
    KeyServiceNotAnswering,
    KeyServiceUnavailable,
    NoSpace,
    ProtocolError,
    RemoteError,
    Timeout,
)
from ebsd.domain.ids import AccountId, KeyArn
from ebsd.domain.model import Caller
from ebsd.domain.sharing import PublicAccess
from ebsd.ipc.sockets import close_all
from ebsd.ipc.varlink_client import Result, VarlinkClient
from ebsd.store.ballast import Ballast
from ebsd.wire.idl import Interface

log = logging.getLogger(__name__)


class Wait(Enum):
    """What the answer to a call may have to wait for."""

    NOTHING = auto()
    """It is in the broker's memory."""
    HERE = auto()
    """The broker's database and audit log."""
    KEYS = auto()
    """AWS, for which a broker has 25 s at most (``daemon/aws_config.py``)."""


DEADLINES: Final = {Wait.NOTHING: 10.0, Wait.HERE: 20.0, Wait.KEYS: 30.0}
"""Seconds for a broker that is alive; for one that is not, ``SILENCE`` and ``PROBE`` together."""

WAITS: Final[Mapping[str, Wait]] = {
    "GetStatus": Wait.NOTHING,
    "Shutdown": Wait.NOTHING,
    "DescribeKey": Wait.KEYS,
    "GenerateDataKeyWithoutPlaintext": Wait.KEYS,
    "ReEncrypt": Wait.KEYS,
    "CreateGrant": Wait.KEYS,
    "RetireGrant": Wait.KEYS,
    "OpenKeySession": Wait.KEYS,
    "OpenArchiveSession": Wait.KEYS,
    "CreateAnchor": Wait.KEYS,
    "DescribeDataKey": Wait.KEYS,
    "CheckSharedKey": Wait.KEYS,
    "CheckAws": Wait.KEYS,
    "SetAccount": Wait.KEYS,
    "DescribeAnchor": Wait.HERE,
    "DeleteAnchor": Wait.HERE,
    "RaiseFloor": Wait.HERE,
    "AcceptRollback": Wait.HERE,
    "GetAccount": Wait.HERE,
    "ListPublicAccessBlocks": Wait.HERE,
    "RecordSharing": Wait.HERE,
    "Admit": Wait.HERE,
    "PutAdmissionRule": Wait.HERE,
    "DeleteAdmissionRule": Wait.HERE,
    "ListAdmissionRules": Wait.HERE,
}
"""Each method that is asked here."""

SILENCE = 3.0
"""Seconds without an answer after which GetStatus is asked beside a call, and again."""
PROBE = 4.0
"""Seconds for that answer."""
RECHECK = 1.0
"""Seconds for it before a call, where the last one had none."""
RETURN_PAUSE = 1.0
"""Seconds between two looks whether it answers again."""

PATIENCE = 15.0
"""Seconds for which a call that may be repeated waits for a broker that died and is being started again."""
RETRY_PAUSE = 0.1

INTERFACE: Final = "io.ebsd.Broker"
MAX_BLOB: Final = 6144
"""Bytes; KMS's own limit for CiphertextBlob."""


@dataclass(frozen=True, slots=True)
class KeyDescription:
    arn: KeyArn
    account: AccountId
    state: str
    manager: str
    spec: str
    usage: str


@dataclass(frozen=True, slots=True)
class AccountSettings:
    encryption_by_default: bool
    default_key: str
    """Key ARN, or alias/aws/ebs."""
    public_access: PublicAccess
    """Whether its snapshots can be public."""
    admission_rules: bool = False
    """What the account makes is to be judged first (``admit``)."""


class Broker:
    """A client that connects anew for every call, so that a restarted broker is simply found again."""

    def __init__(self, socket_path: Path, ballast: Ballast) -> None:
        self._path = socket_path
        self._ballast = ballast
        self._interface = Interface.load(INTERFACE)
        self._is_silent = False
        """A call had no answer in time, and GetStatus none since."""
        self._owed: dict[str, Callable[[], Awaitable[object]]] = {}
        self._owing = trio.Event()
        self._grants_owed: set[str] = set()
        """Ids and names of grants to be retired afterwards, unless they are asked for again before."""
        self._granting = trio.Lock()

    async def _exchange(self, method: str, parameters: dict[str, Any]) -> Result:
        """Return the declared reply; its descriptors are the caller's. Raises KeyServiceUnavailable."""
        if self._is_silent:
            await self.status(deadline=RECHECK)
        result: Result | None = None
        problem: EbsdError | None = None
        silence: KeyServiceNotAnswering | None = None
        try:
            async with trio.open_nursery() as nursery:

                async def attend() -> None:
                    nonlocal silence
                    while True:
                        await trio.sleep(SILENCE)
                        try:
                            await self.status(deadline=PROBE)
                        except KeyServiceNotAnswering:
                            silence = KeyServiceNotAnswering(seconds=f"{SILENCE + PROBE:g}")
                            nursery.cancel_scope.cancel()
                        except EbsdError:
                            continue  # whatever it is, the call meets it, too

                nursery.start_soon(attend)
                try:
                    result = await self._ask(method, parameters, DEADLINES[WAITS[method]])
                except EbsdError as exc:
                    problem = exc
                nursery.cancel_scope.cancel()
        except BaseException:
            if result is not None:
                close_all(result.fds)
            raise
        if result is not None:
            return result
        raise problem or silence or KeyServiceUnavailable(reason="it was not asked")

    async def _ask(self, method: str, parameters: dict[str, Any], deadline: float) -> Result:
        try:
            async with await VarlinkClient.connect(self._path, deadline=min(deadline, 5.0)) as client:
                result = await client.call(f"{INTERFACE}.{method}", parameters, deadline=deadline)
        except Timeout as exc:
            self._is_silent = True
            raise KeyServiceNotAnswering(seconds=f"{deadline:g}") from exc
        except (DaemonUnreachable, ProtocolError) as exc:
            raise KeyServiceUnavailable(reason=exc.message.rstrip(".")) from exc
        try:
            self._interface.check_result(method, result.parameters)
        except EbsdError as exc:
            close_all(result.fds)
            raise KeyServiceUnavailable(reason=f"its answer to {method} cannot be understood") from exc
        return result

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        result = await self._exchange(method, parameters)
        close_all(result.fds)
        return result.parameters

    async def _call_again(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Call a method whose repetition changes nothing: ends, undoings and named grants outlive a broker's death.

        They draw on the ballast, too, where the broker's files share the disk that is full.
        """
        with trio.move_on_after(PATIENCE):
            while True:
                try:
                    return await self._call(method, parameters)
                except KeyServiceNotAnswering:
                    raise
                except KeyServiceUnavailable:
                    await trio.sleep(RETRY_PAUSE)
                except RemoteError as exc:
                    if exc.code != NoSpace.code or not await trio.to_thread.run_sync(self._ballast.release):
                        raise
        return await self._call(method, parameters)

    async def status(self, *, deadline: float | None = None) -> dict[str, Any]:
        result = await self._ask("GetStatus", {}, deadline or DEADLINES[WAITS["GetStatus"]])
        self._is_silent = False
        close_all(result.fds)
        return result.parameters

    # --- what is owed to a key service that does not answer

    def afterwards(self, name: str, step: Callable[[], Awaitable[object]]) -> None:
        """Have a step done, in the background, as soon as the key service answers; in place of one of that name.

        It may be done twice. Its errors are logged, and KeyServiceUnavailable means that it is tried again.
        """
        self._owed[name] = step
        self._owing.set()

    async def tend(self) -> None:
        """Do what is owed whenever the key service answers; never returns."""
        while True:
            await self._owing.wait()
            await self.answering()
            for name in list(self._owed):
                step = self._owed.pop(name)
                try:
                    await step()
                except KeyServiceUnavailable:
                    self._owed.setdefault(name, step)
                except (EbsdError, OSError) as exc:
                    log.error("%s: %s", name, exc)
            if self._owed:
                await trio.sleep(RETURN_PAUSE)
            else:
                self._owing = trio.Event()

    async def answering(self) -> None:
        """Wait, however long, until the key service answers and works."""
        while True:
            try:
                if (await self.status(deadline=PROBE))["State"] == "running":
                    return
            except EbsdError:
                log.debug("the key service does not answer yet")
            await trio.sleep(RETURN_PAUSE)

    async def describe_key(self, caller: Caller, key: str) -> KeyDescription:
        """Resolve a key id, ARN or alias as the caller sees it; makes alias/aws/ebs on first use."""
        found = (await self._call("DescribeKey", {"Caller": _wire(caller), "KeyId": key}))["Key"]
        return KeyDescription(
            KeyArn(found["Arn"]),
            AccountId(found["AccountId"]),
            found["KeyState"],
            found["KeyManager"],
            found["KeySpec"],
            found["KeyUsage"],
        )

    async def generate_wrapped_key(
        self, caller: Caller, key: KeyArn, size: int, context: Mapping[str, str]
    ) -> tuple[bytes, KeyArn]:
        """Return (wrapped data key, key ARN); the plaintext never leaves the broker."""
        result = await self._call(
            "GenerateDataKeyWithoutPlaintext",
            {"Caller": _wire(caller), "KeyId": key, "NumberOfBytes": size, "EncryptionContext": dict(context)},
        )
        return _blob(result), KeyArn(result["KeyId"])

    async def create_grant(self, caller: Caller, key: KeyArn, context: Mapping[str, str], name: str) -> str:
        """Make the attach grant: Decrypt, for exactly this encryption context. Returns its id.

        The same name and context again mean the same grant: so its id can be had again when an answer was lost. Of a
        key service that does not answer it may have been made: then that is how it is found and retired afterwards.
        """
        wanted = {"Caller": _wire(caller), "KeyId": key, "EncryptionContextEquals": dict(context), "Name": name}
        async with AsyncExitStack() as stack:
            if self._grants_owed:
                await stack.enter_async_context(self._granting)
            try:
                grant = str((await self._call_again("CreateGrant", wanted))["GrantId"])
            except KeyServiceUnavailable:
                self._retire_afterwards(key, name, wanted)
                raise
            self._grants_owed -= {name, grant}
            return grant

    async def retire_grant(self, key: KeyArn, grant: str) -> None:
        """Retire a grant; later, and with an error now, where the key service does not answer."""
        try:
            await self._call_again("RetireGrant", {"KeyId": key, "GrantId": grant})
        except KeyServiceUnavailable:
            self._retire_afterwards(key, grant, None)
            raise

    def _retire_afterwards(self, key: KeyArn, which: str, wanted: dict[str, Any] | None) -> None:
        """Have a grant retired that is known by its id, or by what was ``wanted``: asking again gives its id."""

        async def retire() -> None:
            async with self._granting:  # who asks for it again meanwhile keeps it, or gets another one
                if which in self._grants_owed:
                    grant = which if wanted is None else (await self._call_again("CreateGrant", wanted))["GrantId"]
                    await self._call_again("RetireGrant", {"KeyId": key, "GrantId": grant})
                    self._grants_owed.discard(which)

        self._grants_owed.add(which)
        self.afterwards(f"retiring the grant {which}", retire)

    async def open_session(
        self,
        resource: str,
        *,
        key: KeyArn | None,
        grant: str | None,
        blob: bytes | None,
        context: Mapping[str, str] | None,
        recipient: Caller | None = None,
    ) -> int:
        """Return the descriptor of a key session for one resource; the caller owns it and must not read it.

        ``recipient``: whom a snapshot of somebody else is shared with, and whose rights on its key therefore count.
        """
        parameters: dict[str, Any] = {"ResourceId": resource}
        if recipient is not None:
            parameters["Caller"] = _wire(recipient)
        if key is not None:
            parameters |= {
                "KeyId": key,
                "GrantId": grant,
                "CiphertextBlob": base64.b64encode(blob or b"").decode(),
                "EncryptionContext": dict(context or {}),
            }
        result = await self._exchange("OpenKeySession", parameters)
        return _one_session(result)

    async def open_archive_session(self, caller: Caller, key: KeyArn, blob: bytes, context: Mapping[str, str]) -> int:
        """Return the descriptor of a session for an archive's key, if the caller may use it; not to be read here."""
        result = await self._exchange(
            "OpenArchiveSession",
            {
                "Caller": _wire(caller),
                "KeyId": key,
                "CiphertextBlob": base64.b64encode(blob).decode(),
                "EncryptionContext": dict(context),
            },
        )
        return _one_session(result)

    async def check_shared_key(self, caller: Caller, key: KeyArn, context: Mapping[str, str]) -> None:
        """Raise what forbids the caller to use a snapshot of another account that is encrypted under this key."""
        await self._call("CheckSharedKey", {"Caller": _wire(caller), "KeyId": key, "EncryptionContext": dict(context)})

    async def create_anchor(
        self,
        caller: Caller,
        resource: str,
        *,
        key: KeyArn | None,
        blob: bytes | None,
        context: Mapping[str, str] | None,
        made_from: str | None = None,
    ) -> None:
        """Have the key service remember a new resource; its key check value is computed there from the blob.

        ``made_from``: the snapshot whose signed record covers its map at first.
        """
        parameters: dict[str, Any] = {"Caller": _wire(caller), "ResourceId": resource, "Encrypted": key is not None}
        if key is not None:
            parameters |= {
                "KeyId": key,
                "CiphertextBlob": base64.b64encode(blob or b"").decode(),
                "EncryptionContext": dict(context or {}),
            }
        if made_from is not None:
            parameters["MadeFromResourceId"] = made_from
        await self._call("CreateAnchor", parameters)

    async def inherit_anchor(self, caller: Caller, resource: str, *, encrypted: bool, source: str) -> None:
        """Have the key service remember a snapshot that has its source's wrapped key; the key need not be usable."""
        await self._call(
            "CreateAnchor",
            {"Caller": _wire(caller), "ResourceId": resource, "Encrypted": encrypted, "SourceResourceId": source},
        )

    async def re_encrypt(
        self, caller: Caller, blob: bytes, source_context: Mapping[str, str], key: KeyArn, context: Mapping[str, str]
    ) -> bytes:
        """Return the same data key wrapped for another resource; its plaintext never leaves the broker."""
        result = await self._call(
            "ReEncrypt",
            {
                "Caller": _wire(caller),
                "CiphertextBlob": base64.b64encode(blob).decode(),
                "SourceEncryptionContext": dict(source_context),
                "DestinationKeyId": key,
                "DestinationEncryptionContext": dict(context),
            },
        )
        return _blob(result)

    async def rewrap(
        self, caller: Caller, resource: str, blob: bytes, key: KeyArn, context: Mapping[str, str]
    ) -> bytes | None:
        """Return a resource's data key under the newest backing key of its own CMK; None when it is so already."""
        result = await self._call(
            "ReEncrypt",
            {
                "Caller": _wire(caller),
                "CiphertextBlob": base64.b64encode(blob).decode(),
                "SourceEncryptionContext": dict(context),
                "DestinationKeyId": key,
                "DestinationEncryptionContext": dict(context),
                "ResourceId": resource,
            },
        )
        return None if result["SourceKeyMaterialId"] == result["DestinationKeyMaterialId"] else _blob(result)

    async def describe_data_key(self, resource: str, blob: bytes) -> dict[str, str]:
        """Return what is known of the ages of a resource's data key and of what wraps it, as members of a reply."""
        members = {"ResourceId": resource, "CiphertextBlob": base64.b64encode(blob).decode()}
        return {name: str(value) for name, value in (await self._call("DescribeDataKey", members)).items()}

    async def raise_floor(self, resource: str, generation: int) -> None:
        await self._call_again("RaiseFloor", {"ResourceId": resource, "Generation": generation})

    async def raise_floor_soon(self, resource: str, generation: int) -> None:
        """Raise a floor below which a record lies already: later, where the key service does not answer."""
        try:
            await self.raise_floor(resource, generation)
        except KeyServiceUnavailable as exc:
            log.warning("the floor of %s is raised afterwards: %s", resource, exc.message)
            name = f"raising the floor of {resource} to {generation}"
            self.afterwards(name, lambda: self.raise_floor(resource, generation))

    async def accept_rollback(self, caller: Caller, resource: str, generation: int) -> int:
        """Lower the floor of a restored resource to the generation of its record; returns the former floor."""
        result = await self._call(
            "AcceptRollback", {"Caller": _wire(caller), "ResourceId": resource, "Generation": generation}
        )
        return int(result["FormerFloor"])

    async def describe_anchor(self, resource: str) -> tuple[str, bool, int, str | None] | None:
        """Return (owner, encrypted, lowest generation of its record, key); None for what has no anchor."""
        try:
            found = (await self._call("DescribeAnchor", {"ResourceId": resource}))["Anchor"]
        except RemoteError as exc:
            if exc.code == IntegrityFailure.code:
                return None
            raise
        return found["OwnerId"], found["Encrypted"], found["Floor"], found.get("KeyId")

    async def delete_anchor(self, resource: str) -> None:
        await self._call_again("DeleteAnchor", {"ResourceId": resource})

    async def account(self, caller: Caller) -> AccountSettings:
        return _settings(await self._call("GetAccount", {"Caller": _wire(caller)}))

    async def accounts_without_public_snapshots(self) -> frozenset[AccountId]:
        """Return the accounts whose public snapshots are treated as private."""
        return frozenset(map(AccountId, (await self._call("ListPublicAccessBlocks", {}))["AccountIds"]))

    async def record_sharing(
        self, caller: Caller, resource: str, add: Collection[str], remove: Collection[str], *, reset: bool = False
    ) -> None:
        """Have it in the audit log that the caller changes with whom a snapshot is shared. Raises what forbids that."""
        members = {"ResourceId": resource, "Add": sorted(add), "Remove": sorted(remove), "Reset": reset}
        await self._call("RecordSharing", {"Caller": _wire(caller), **members})

    async def set_account(
        self,
        caller: Caller,
        *,
        encryption_by_default: bool | None = None,
        default_key: str | None = None,
        public_access: PublicAccess | None = None,
    ) -> AccountSettings:
        """Change account settings; ``default_key=""`` returns to alias/aws/ebs."""
        parameters: dict[str, Any] = {"Caller": _wire(caller)}
        if encryption_by_default is not None:
            parameters["EbsEncryptionByDefault"] = encryption_by_default
        if default_key is not None:
            parameters["EbsDefaultKmsKeyId"] = default_key
        if public_access is not None:
            parameters["SnapshotBlockPublicAccess"] = public_access.value
        return _settings(await self._call("SetAccount", parameters))

    async def admit(self, caller: Caller, making: Making, key: KeyArn | None) -> None:
        """Return when the caller may make that under this key (None: unencrypted); raises UnauthorizedOperation."""
        parameters: dict[str, Any] = {"Caller": _wire(caller), "Making": making.value}
        if key is not None:
            parameters["KeyId"] = key
        await self._call("Admit", parameters)

    async def put_admission_rule(
        self, caller: Caller, account: str | None, allowed_keys: Sequence[str]
    ) -> dict[str, Any]:
        """Return the rule that binds the account, or all (None), from now on, as members."""
        parameters = {**_bound(caller, account), "AllowedKeys": list(allowed_keys)}
        return dict((await self._call("PutAdmissionRule", parameters))["Rule"])

    async def delete_admission_rule(self, caller: Caller, account: str | None) -> None:
        await self._call("DeleteAdmissionRule", _bound(caller, account))

    async def admission_rules(self, caller: Caller) -> list[dict[str, Any]]:
        """Return the rules that the caller may see, as members."""
        return list((await self._call("ListAdmissionRules", {"Caller": _wire(caller)}))["Rules"])

    async def check_aws(self) -> dict[str, Any]:
        """Return Place, Principal, Milliseconds and Problem of AWS KMS, as far as there are any."""
        return await self._call("CheckAws", {})

    async def shutdown(self) -> None:
        await self._call("Shutdown", {})


def _settings(result: Mapping[str, Any]) -> AccountSettings:
    try:
        public_access = PublicAccess(result["SnapshotBlockPublicAccess"])
    except ValueError as exc:
        raise KeyServiceUnavailable(reason="its account settings cannot be understood") from exc
    rules = bool(result.get("AdmissionRules"))  # SetAccount does not tell
    return AccountSettings(result["EbsEncryptionByDefault"], result["EbsDefaultKmsKeyId"], public_access, rules)


def _one_session(result: Result) -> int:
    is_one = len(result.fds) == 1 and result.parameters["Session"] == 0
    if not is_one or not stat.S_ISSOCK(os.fstat(result.fds[0]).st_mode):
        close_all(result.fds)
        raise KeyServiceUnavailable(reason="it opened no key session")
    return result.fds[0]


def _blob(result: Mapping[str, Any]) -> bytes:
    """Return the wrapped key of a reply; raises KeyServiceUnavailable for what no key service wrapped."""
    try:
        blob = base64.b64decode(result["CiphertextBlob"], validate=True)
    except (binascii.Error, ValueError) as exc:
        raise KeyServiceUnavailable(reason="it answered with a wrapped key that is not base64") from exc
    if not 1 <= len(blob) <= MAX_BLOB:
        raise KeyServiceUnavailable(reason=f"it answered with a wrapped key of {len(blob)} bytes")
    return blob


def _bound(caller: Caller, account: str | None) -> dict[str, Any]:
    """Return the members of a request that name the account which a rule binds."""
    return {"Caller": _wire(caller)} | ({} if account is None else {"AccountId": account})


def _wire(caller: Caller) -> dict[str, Any]:
    return {"Uid": caller.uid, "Name": caller.name}
