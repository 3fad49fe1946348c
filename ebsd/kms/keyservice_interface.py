"""io.ebsd.KeyService on keys.sock: the state of the key service, and the backup of all keys by administrators."""

from __future__ import annotations

import os
from typing import Any, Final

from ebsd.domain.errors import NeedsRoot
from ebsd.domain.ids import foreign_region
from ebsd.ipc.peer import caller_of
from ebsd.ipc.varlink_server import Call, Handler
from ebsd.kms.aws import refusal
from ebsd.kms.backup import MAX_BACKUP, MAX_PASSPHRASE
from ebsd.kms.broker import Broker
from ebsd.kms.descriptors import Descriptors
from ebsd.kms.kms_interface import requester_of
from ebsd.kms.rootplace import RootKeyPlace

MAX_LISTED: Final = 1000
"""Resources in one reply of ListKeyResources."""


class KeyServiceInterface:
    """The handlers; ``handlers`` maps method names to them."""

    def __init__(self, broker: Broker, descriptors: Descriptors, admin_uid: int) -> None:
        self._broker = broker
        self._descriptors = descriptors
        self._admin_uid = admin_uid

    def handlers(self) -> dict[str, Handler]:
        return {
            "GetStatus": self._get_status,
            "Unlock": self._unlock,
            "ChangeRootKey": self._change_root_key,
            "Backup": self._backup,
            "Restore": self._restore,
            "ListKeyResources": self._list_key_resources,
        }

    async def _get_status(self, _call: Call) -> dict[str, Any]:
        status = self._broker.status()
        members: dict[str, Any] = {
            "State": status.state,
            "Pid": os.getpid(),
            "StateDirectory": status.directory,
            "RootKey": status.root_key,
            "RootKeyKind": status.root_key_kind,
            "Keys": status.keys,
        }
        if status.reason is not None:
            members["Reason"] = status.reason
        if status.configured_root_key is not None:
            members["ConfiguredRootKey"] = status.configured_root_key
        if status.passphrase_set is not None:
            members["PassphraseSet"] = status.passphrase_set
        return members

    def _refuse_others(self, call: Call, operation: str) -> None:
        if not caller_of(call.peer, self._admin_uid).is_admin:
            raise NeedsRoot(operation=operation, remedy="Ask an administrator of this host.")

    async def _passphrase(self, call: Call) -> bytearray:
        fd = call.take_fd(call.parameters["PassphraseDescriptor"])
        return await self._descriptors.read(fd, MAX_PASSPHRASE, call.peer.uid, "PassphraseDescriptor")

    async def _unlock(self, call: Call) -> dict[str, Any]:
        self._refuse_others(call, "Unlocking the key service")
        passphrase = await self._passphrase(call)
        try:
            return {"Keys": await self._broker.unlock(passphrase)}
        finally:
            passphrase[:] = bytes(len(passphrase))

    async def _change_root_key(self, call: Call) -> dict[str, Any]:
        self._refuse_others(call, "Changing the root key")
        p = call.parameters
        passphrase = await self._passphrase(call) if p.get("PassphraseDescriptor") is not None else None
        try:
            place = RootKeyPlace(p["Kind"], p.get("Path"), p.get("Name"))
            now, former = await self._broker.change_root_key(place, passphrase)
        finally:
            if passphrase is not None:
                passphrase[:] = bytes(len(passphrase))
        return {"RootKey": now, "FormerRootKey": former}

    async def _backup(self, call: Call) -> dict[str, Any]:
        self._refuse_others(call, "Backup of the keys")
        passphrase = await self._passphrase(call)
        try:
            count, file = await self._broker.backup(passphrase)
        finally:
            passphrase[:] = bytes(len(passphrase))
        fd = call.take_fd(call.parameters["Destination"])
        await self._descriptors.write(fd, file, call.peer.uid, "Destination")
        return {"Keys": count, "Bytes": len(file)}

    async def _restore(self, call: Call) -> dict[str, Any]:
        self._refuse_others(call, "Restore of the keys")
        passphrase = await self._passphrase(call)
        try:
            fd = call.take_fd(call.parameters["Source"])
            file = await self._descriptors.read(fd, MAX_BACKUP, call.peer.uid, "Source")
            return {"Keys": await self._broker.restore(file, passphrase)}
        finally:
            passphrase[:] = bytes(len(passphrase))

    async def _list_key_resources(self, call: Call) -> dict[str, Any]:
        requester = await requester_of(call.peer, self._admin_uid)
        name = call.parameters["KeyId"]
        if foreign_region(name) is not None:
            raise refusal("ScheduleKeyDeletion", name)  # which is what the list is for
        found = self._broker.running.deletion.resources(requester, name)
        listed = [{"ResourceId": anchor.resource, "OwnerId": anchor.owner} for anchor in found[:MAX_LISTED]]
        return {"Resources": listed, "Total": len(found)}
