"""The key-state table: every pair, and the texts of AWS."""

from __future__ import annotations

import pytest

from ebsd.domain.errors import EbsdError
from ebsd.kms.keystates import MATRIX, Group, KeyState, check_state

ARN = "arn:aws:kms:local:000000001001:key/12345678-1234-1234-1234-123456789abc"
DISABLED = ("DisabledException", f"{ARN} is disabled.")
PENDING = ("KMSInvalidStateException", f"{ARN} is pending deletion.")
NOT_PENDING = ("KMSInvalidStateException", f"{ARN} is not pending deletion.")

EXPECTED = {
    # Enabled, Disabled, PendingDeletion
    Group.CRYPTO: (None, DISABLED, PENDING),
    Group.CREATE_GRANT: (None, DISABLED, PENDING),
    Group.READ: (None, None, None),
    Group.LABEL: (None, None, PENDING),
    Group.NEW_ALIAS_TARGET: (None, None, PENDING),
    Group.SWITCH: (None, None, PENDING),
    Group.ROTATION: (None, DISABLED, PENDING),
    Group.SCHEDULE_DELETION: (None, None, PENDING),
    Group.CANCEL_DELETION: (NOT_PENDING, NOT_PENDING, None),
}


def test_the_table_is_complete() -> None:
    assert set(MATRIX) == {(group, state) for group in Group for state in KeyState}
    assert set(EXPECTED) == set(Group)


@pytest.mark.parametrize(
    ("group", "state", "expected"),
    [
        (group, state, expected)
        for group, row in EXPECTED.items()
        for state, expected in zip(KeyState, row, strict=True)
    ],
)
def test_state_decides(group: Group, state: KeyState, expected: tuple[str, str] | None) -> None:
    try:
        check_state(ARN, state, group)
        got = None
    except EbsdError as exc:
        got = (exc.code, exc.message)
    assert got == expected


def test_who_meets_a_key_that_waits_for_its_deletion_is_told_how_it_is_kept() -> None:
    with pytest.raises(EbsdError) as caught:
        check_state(ARN, KeyState.PENDING_DELETION, Group.SWITCH)
    assert f"ebsctl key cancel-deletion {ARN}" in caught.value.hint
