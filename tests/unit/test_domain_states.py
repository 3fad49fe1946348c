"""Every state with every event of each table: the pairs of the table lead where it says, all others are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

import pytest

from ebsd.domain import states
from ebsd.domain.errors import EbsdError

Machine = tuple[type[StrEnum], type[StrEnum], Mapping[tuple[Any, Any], Any], Callable[[str, Any, Any], Any], str]

MACHINES: list[Machine] = [
    (states.VolumeState, states.VolumeEvent, states.VOLUME_TRANSITIONS, states.next_volume_state, "IncorrectState"),
    (
        states.AttachmentState,
        states.AttachmentEvent,
        states.ATTACHMENT_TRANSITIONS,
        states.next_attachment_state,
        "IncorrectState",
    ),
    (
        states.SnapshotState,
        states.SnapshotEvent,
        states.SNAPSHOT_TRANSITIONS,
        states.next_snapshot_state,
        "IncorrectState",
    ),
    (
        states.ModificationState,
        states.ModificationEvent,
        states.MODIFICATION_TRANSITIONS,
        states.next_modification_state,
        "IncorrectModificationState",
    ),
    (states.LockState, states.LockEvent, states.LOCK_TRANSITIONS, states.next_lock_state, "IncorrectState"),
    (
        states.DirectState,
        states.DirectEvent,
        states.DIRECT_TRANSITIONS,
        states.next_direct_state,
        "ValidationException",
    ),
    (states.JobState, states.JobEvent, states.JOB_TRANSITIONS, states.next_job_state, "IncorrectState"),
]

LEGAL: dict[str, dict[tuple[str | None, str], str | None]] = {
    "VolumeState": {
        ("creating", "created"): "available",
        ("creating", "delete"): "deleting",
        ("available", "attach"): "in-use",
        ("available", "delete"): "deleting",
        ("in-use", "released"): "available",
        ("in-use", "failed"): "error",
        ("error", "released"): "available",
        ("error", "failed"): "error",
        ("deleting", "removed"): "deleted",
        ("deleting", "delete"): "deleting",
        ("available", "recycle"): "recoverable",
        ("recoverable", "recover"): "available",
        ("recoverable", "delete"): "deleting",
    },
    "AttachmentState": {
        ("attaching", "exposed"): "attached",
        ("attaching", "gone"): "detached",
        ("attached", "detach"): "detaching",
        ("attached", "gone"): "detached",
        ("busy", "detach"): "detaching",
        ("busy", "gone"): "detached",
        ("detaching", "detach"): "detaching",
        ("detaching", "refused"): "busy",
        ("detaching", "gone"): "detached",
    },
    "SnapshotState": {
        ("pending", "complete"): "completed",
        ("pending", "fail"): "error",
        ("completed", "delete"): None,
        ("error", "delete"): None,
        ("completed", "recycle"): "recoverable",
        ("recoverable", "recover"): "completed",
        ("recoverable", "delete"): None,
    },
    "ModificationState": {
        ("modifying", "committed"): "optimizing",
        ("modifying", "failed"): "failed",
        ("optimizing", "shown"): "completed",
        ("optimizing", "failed"): "failed",
    },
    "LockState": {
        (None, "govern"): "governance",
        (None, "comply"): "compliance",
        (None, "cool-off"): "compliance-cooloff",
        ("governance", "govern"): "governance",
        ("governance", "comply"): "compliance",
        ("governance", "cool-off"): "compliance-cooloff",
        ("governance", "expire"): "expired",
        ("governance", "unlock"): None,
        ("compliance-cooloff", "govern"): "governance",
        ("compliance-cooloff", "comply"): "compliance",
        ("compliance-cooloff", "cool-off"): "compliance-cooloff",
        ("compliance-cooloff", "cooled"): "compliance",
        ("compliance-cooloff", "expire"): "expired",
        ("compliance-cooloff", "unlock"): None,
        ("compliance", "comply"): "compliance",
        ("compliance", "expire"): "expired",
        ("expired", "govern"): "governance",
        ("expired", "comply"): "compliance",
        ("expired", "cool-off"): "compliance-cooloff",
        ("expired", "unlock"): None,
    },
    "DirectState": {
        ("starting", "started"): "open",
        ("starting", "abandon"): "abandoned",
        ("open", "seal"): "sealing",
        ("open", "abandon"): "abandoned",
        ("open", "time out"): "timed out",
        ("sealing", "complete"): "completed",
        ("sealing", "abandon"): "abandoned",
        ("sealing", "time out"): "timed out",
    },
    "JobState": {
        ("running", "complete"): "completed",
        ("running", "fail"): "failed",
        ("running", "cancel"): "cancelled",
        ("running", "interrupt"): "interrupted",
        ("interrupted", "resume"): "running",
        ("interrupted", "complete"): "completed",
        ("interrupted", "fail"): "failed",
        ("interrupted", "cancel"): "cancelled",
    },
}
"""Written a second time, by hand: a slip in a table shall not pass by being copied."""


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m[0].__name__)
def test_every_state_with_every_event(machine: Machine) -> None:
    state_type, event_type, _, step, code = machine
    legal = LEGAL[state_type.__name__]
    seen = 0
    for state in (*state_type, *([None] if any(pair[0] is None for pair in legal) else [])):
        for event in event_type:
            if (_value(state), event.value) in legal:
                seen += 1
                assert step("x-1", state, event) == legal[_value(state), event.value]
                continue
            with pytest.raises(EbsdError) as caught:
                step("x-1", state, event)
            assert caught.value.code == code
            assert "x-1" in caught.value.message
            assert (_value(state) or "not locked") in caught.value.message
    assert seen == len(legal)


def _value(state: StrEnum | None) -> str | None:
    return None if state is None else state.value


def test_every_table_is_exercised() -> None:
    tables = {name for name in vars(states) if name.endswith("_TRANSITIONS")}
    assert {id(machine[2]) for machine in MACHINES} == {id(getattr(states, name)) for name in tables}
