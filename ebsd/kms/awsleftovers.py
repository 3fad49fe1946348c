"""Attach grants in AWS that may be left over: their making or their retirement was given up without an answer.

A grant that is left allows ebsd's own principal a Decrypt of one context, which it may do anyway; but a key has a quota
of them. What is noted here is gone with the broker. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

MAX_NOTED: Final = 4096

Leftover = tuple[str, str, bool]
"""Key ARN; grant id, or name of a grant whose id was never told; whether it is a name."""


class Leftovers:
    """The grants to retire when AWS answers again; more than MAX_NOTED are forgotten, oldest first."""

    def __init__(self) -> None:
        self._noted: OrderedDict[Leftover, None] = OrderedDict()

    def note_grant(self, key_arn: str, grant_id: str) -> None:
        self._note((key_arn, grant_id, False))

    def note_name(self, key_arn: str, name: str) -> None:
        self._note((key_arn, name, True))

    def _note(self, leftover: Leftover) -> None:
        self._noted[leftover] = None
        while len(self._noted) > MAX_NOTED:
            self._noted.popitem(last=False)

    def settled(self, key_arn: str, grant_id: str, name: str | None = None) -> None:
        """Forget a grant: it was retired, or, by its name, it is in use after all."""
        self._noted.pop((key_arn, grant_id, False), None)
        if name is not None:
            self._noted.pop((key_arn, name, True), None)

    def drop(self, leftover: Leftover) -> None:
        self._noted.pop(leftover, None)

    def all(self) -> list[Leftover]:
        return list(self._noted)
