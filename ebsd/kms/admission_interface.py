"""The methods of kms.sock about admission: Admit judges, and only administrators change what it judges by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ebsd.domain.admission import Making, refuse_unlisted
from ebsd.domain.errors import InvalidParameterValue, NeedsRoot
from ebsd.domain.ids import KeyArn
from ebsd.ipc.varlink_server import Call, Handler
from ebsd.kms import admission
from ebsd.kms.broker import Broker
from ebsd.kms.policy import Requester


class AdmissionMethods:
    """The handlers; refusals are in the audit log, for every call is."""

    def __init__(self, broker: Broker, requester: Callable[[Call], Requester]) -> None:
        self._broker = broker
        self._requester = requester

    def handlers(self) -> dict[str, Handler]:
        return {
            "Admit": self._admit,
            "PutAdmissionRule": self._put,
            "DeleteAdmissionRule": self._delete,
            "ListAdmissionRules": self._list,
        }

    async def _admit(self, call: Call) -> None:
        p = call.parameters
        requester = self._requester(call)
        try:
            making = Making(p["Making"])
        except ValueError as exc:
            raise InvalidParameterValue(
                value=p["Making"][:64], parameter="Making", reason="nothing of it is made"
            ) from exc
        key = None if p.get("KeyId") is None else KeyArn(p["KeyId"])
        rules = admission.binding(self._broker.running.store.model, requester.account)
        refuse_unlisted(making, key, map(admission.as_rule, rules))

    async def _put(self, call: Call) -> dict[str, Any]:
        self._require_admin(call)
        p = call.parameters
        rule = await self._broker.running.registry.put_admission(p.get("AccountId"), p["AllowedKeys"])
        return {"Rule": admission.as_members(rule)}

    async def _delete(self, call: Call) -> None:
        self._require_admin(call)
        await self._broker.running.registry.delete_admission(call.parameters.get("AccountId"))

    async def _list(self, call: Call) -> dict[str, Any]:
        """Administrators see all rules, everybody else what binds him."""
        requester = self._requester(call)
        model = self._broker.running.store.model
        if requester.caller.is_admin:
            found = sorted(model.admissions.values(), key=lambda rule: rule.account)
        else:
            found = admission.binding(model, requester.account)
        return {"Rules": [admission.as_members(rule) for rule in found]}

    def _require_admin(self, call: Call) -> None:
        if not self._requester(call).caller.is_admin:
            raise NeedsRoot(operation="Changing an admission rule", remedy="Ask an administrator of this host.")
