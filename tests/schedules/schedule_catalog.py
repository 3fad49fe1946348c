"""The product's catalog in memory: a transaction is there whole or not at all, durable at commit; and who is around.

Its database is SQLite's own matter and survives everything here; what is preempted is the time before and after each
transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from schedule_dice import Dice

from ebsd.store.catalog import Catalog


class _Shared:
    """One connection for all schedules; each begins with the image of an empty catalog."""

    catalog: Catalog | None = None
    empty: bytes = b""


MEMORY: Final = Path(":memory:")


def empty_catalog() -> Catalog:
    """Return the catalog without rows; what an earlier caller did to it is gone."""
    if _Shared.catalog is None:
        _Shared.catalog = Catalog(MEMORY)
        _Shared.empty = _Shared.catalog.image()
    else:
        _Shared.catalog._db.deserialize("main", _Shared.empty)
    return _Shared.catalog


class Catalogue:
    """``ebsd.control.catalogue.Catalogue`` over it; each ebsd has one."""

    def __init__(self, dice: Dice, catalog: Catalog) -> None:
        self._dice = dice
        self._catalog = catalog

    async def run(self, use_case: Callable[[Any], Any]) -> Any:
        await self._dice.point("catalog")
        result = self._catalog.run(use_case)
        await self._dice.point("committed")
        return result


class FakeBroker:
    """Anchors have no part in the order of data and maps."""

    def __init__(self, dice: Dice) -> None:
        self._dice = dice

    async def _nothing(self, *_: object, **__: object) -> None:
        await self._dice.point("broker")

    inherit_anchor = raise_floor = delete_anchor = _nothing


class FakeHost:
    """Clock and random numbers."""

    def __init__(self, dice: Dice, boot_id: str) -> None:
        self.random = dice.random.randbytes
        self.boot_id = boot_id

    @staticmethod
    def now() -> str:
        return "2030-01-01T00:00:00Z"

    @staticmethod
    def clock_is_even() -> bool:
        return True
