"""Methods of io.ebsd.Control on admission rules; the key service keeps them, and judges who may change them."""

from __future__ import annotations

from typing import Any

from ebsd.control.broker import Broker
from ebsd.ipc.peer import caller_of
from ebsd.ipc.varlink_server import Call, Handler


class AdmissionMethods:
    """The handlers."""

    def __init__(self, broker: Broker, admin_uid: int) -> None:
        self._broker = broker
        self._admin_uid = admin_uid

    def table(self) -> dict[str, Handler]:
        """Return method -> handler."""
        return {
            "DescribeAdmissionRules": self._describe,
            "PutAdmissionRule": self._put,
            "DeleteAdmissionRule": self._delete,
        }

    async def _describe(self, call: Call) -> dict[str, Any]:
        return {"Rules": await self._broker.admission_rules(caller_of(call.peer, self._admin_uid))}

    async def _put(self, call: Call) -> dict[str, Any]:
        caller = caller_of(call.peer, self._admin_uid)
        p = call.parameters
        return {"Rule": await self._broker.put_admission_rule(caller, p.get("AccountId"), p["AllowedKeys"])}

    async def _delete(self, call: Call) -> dict[str, Any]:
        await self._broker.delete_admission_rule(
            caller_of(call.peer, self._admin_uid), call.parameters.get("AccountId")
        )
        return {}
