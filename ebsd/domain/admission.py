"""Admission: whether what a request would make may be made, judged by its resolved key. Pure.

Encryption by default mends a request; admission refuses it.
"""

from __future__ import annotations

from enum import Enum

from ebsd.domain.errors import OperationNotPermitted
from ebsd.domain.ids import KeyArn


class Making(Enum):
    """What is made, as messages call it."""

    VOLUME = "volume"
    COPY = "copy"
    SNAPSHOT = "snapshot"


def admit(making: Making, key: KeyArn | None, *, allow_unencrypted: bool) -> None:
    """Return when it may be made under this key (None: unencrypted); raises OperationNotPermitted."""
    if key is None and not allow_unencrypted:
        raise OperationNotPermitted(
            reason=f"The {making.value} would be unencrypted, and this installation does not allow unencrypted volumes",
            remedy="Add --encrypted, turn encryption by default on (ebsctl defaults enable-encryption), "
            "or set allow_unencrypted = true in the configuration of ebsd.",
        )
