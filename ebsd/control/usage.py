"""What an account uses of what it may have."""

from __future__ import annotations

from typing import Any, Final

from ebsd.control.catalogue import Catalogue
from ebsd.domain.admission import check_rule_account
from ebsd.domain.errors import NeedsRoot
from ebsd.domain.ids import AccountId
from ebsd.domain.limits import Counted
from ebsd.domain.model import Caller
from ebsd.store.catalog import Transaction

_NAMES: Final = {
    Counted.VOLUMES: "Volumes",
    Counted.VOLUME_BYTES: "VolumeBytes",
    Counted.SNAPSHOTS: "Snapshots",
    Counted.JOBS: "Jobs",
}


class AccountUsage:
    """The view that DescribeAccountLimits gives; the limits themselves are judged by the catalogue."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    async def describe(self, caller: Caller, account: str | None) -> dict[str, Any]:
        """Return use and limits of the caller's account, or for administrators of another one, as members."""
        whose = check_rule_account(account) or caller.account
        if whose != caller.account and not caller.is_admin:
            raise NeedsRoot(operation="Seeing another account's limits", remedy="Leave the account out to see yours.")
        limits = self._catalogue.limits.of(whose)

        def count(t: Transaction) -> list[dict[str, Any]]:
            return [_member(counted, t.used(whose, counted), limits.get(counted)) for counted in Counted]

        return {
            "AccountId": AccountId(whose),
            "MayCreate": self._catalogue.limits.may_create(whose),
            "Limits": await self._catalogue.run(count),
        }


def _member(counted: Counted, used: int, limit: int | None) -> dict[str, Any]:
    member: dict[str, Any] = {"Name": _NAMES[counted], "Used": used}
    if limit is not None:
        member["Limit"] = limit
    return member
