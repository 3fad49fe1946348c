"""States of volumes, attachments, snapshots, modifications and jobs, and the only ways between them.

1. Every change of state in the program goes through one of the ``next_..._state`` functions.
2. A pair that is not in a table is refused and changes nothing.
State names are EC2's (https://docs.aws.amazon.com/ebs/latest/userguide/ebs-describing-volumes.html, the enumerations
SnapshotState and VolumeModificationState of its API reference).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from ebsd.domain.errors import (
    DirectSnapshotNotPending,
    IncorrectModificationState,
    IncorrectSnapshotState,
    IncorrectState,
    IncorrectVolumeState,
)


class VolumeState(StrEnum):
    CREATING = "creating"
    AVAILABLE = "available"
    IN_USE = "in-use"
    DELETING = "deleting"
    DELETED = "deleted"
    ERROR = "error"
    RECOVERABLE = "recoverable"
    """In the recycle bin; EC2 has the name for snapshots."""


class VolumeEvent(StrEnum):
    CREATED = "created"
    ATTACH = "attach"
    RELEASED = "released"
    """The attachment ended, or could not be made, and the durable map is authoritative again."""
    FAILED = "failed"
    """The volume process died or reported an error it cannot go on from."""
    DELETE = "delete"
    REMOVED = "removed"
    RECYCLE = "recycle"
    """Deleted, and kept in the recycle bin."""
    RECOVER = "recover"


VOLUME_TRANSITIONS: Final[dict[tuple[VolumeState, VolumeEvent], VolumeState]] = {
    (VolumeState.CREATING, VolumeEvent.CREATED): VolumeState.AVAILABLE,
    (VolumeState.CREATING, VolumeEvent.DELETE): VolumeState.DELETING,
    (VolumeState.AVAILABLE, VolumeEvent.ATTACH): VolumeState.IN_USE,
    (VolumeState.AVAILABLE, VolumeEvent.DELETE): VolumeState.DELETING,
    (VolumeState.IN_USE, VolumeEvent.RELEASED): VolumeState.AVAILABLE,
    (VolumeState.IN_USE, VolumeEvent.FAILED): VolumeState.ERROR,
    (VolumeState.ERROR, VolumeEvent.RELEASED): VolumeState.AVAILABLE,
    (VolumeState.ERROR, VolumeEvent.FAILED): VolumeState.ERROR,
    (VolumeState.DELETING, VolumeEvent.REMOVED): VolumeState.DELETED,
    (VolumeState.DELETING, VolumeEvent.DELETE): VolumeState.DELETING,
    (VolumeState.AVAILABLE, VolumeEvent.RECYCLE): VolumeState.RECOVERABLE,
    (VolumeState.RECOVERABLE, VolumeEvent.RECOVER): VolumeState.AVAILABLE,
    (VolumeState.RECOVERABLE, VolumeEvent.DELETE): VolumeState.DELETING,
}


class AttachmentState(StrEnum):
    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"
    DETACHED = "detached"
    BUSY = "busy"


class AttachmentEvent(StrEnum):
    EXPOSED = "exposed"
    DETACH = "detach"
    REFUSED = "refused"
    """The kernel still has users of the device or the block file."""
    GONE = "gone"


ATTACHMENT_TRANSITIONS: Final[dict[tuple[AttachmentState, AttachmentEvent], AttachmentState]] = {
    (AttachmentState.ATTACHING, AttachmentEvent.EXPOSED): AttachmentState.ATTACHED,
    (AttachmentState.ATTACHING, AttachmentEvent.GONE): AttachmentState.DETACHED,
    (AttachmentState.ATTACHED, AttachmentEvent.DETACH): AttachmentState.DETACHING,
    (AttachmentState.ATTACHED, AttachmentEvent.GONE): AttachmentState.DETACHED,
    (AttachmentState.BUSY, AttachmentEvent.DETACH): AttachmentState.DETACHING,
    (AttachmentState.BUSY, AttachmentEvent.GONE): AttachmentState.DETACHED,
    (AttachmentState.DETACHING, AttachmentEvent.DETACH): AttachmentState.DETACHING,
    (AttachmentState.DETACHING, AttachmentEvent.REFUSED): AttachmentState.BUSY,
    (AttachmentState.DETACHING, AttachmentEvent.GONE): AttachmentState.DETACHED,
}


class SnapshotState(StrEnum):
    PENDING = "pending"
    COMPLETED = "completed"
    ERROR = "error"
    RECOVERABLE = "recoverable"
    """In the recycle bin. EC2's ``recovering`` is not needed: the way back is one commit."""


class SnapshotEvent(StrEnum):
    COMPLETE = "complete"
    FAIL = "fail"
    DELETE = "delete"
    RECYCLE = "recycle"
    """Deleted, and kept in the recycle bin."""
    RECOVER = "recover"


SNAPSHOT_TRANSITIONS: Final[dict[tuple[SnapshotState, SnapshotEvent], SnapshotState | None]] = {
    # None: it is gone. What comes to nothing while it is pending leaves no snapshot at all: nobody saw it complete.
    (SnapshotState.PENDING, SnapshotEvent.COMPLETE): SnapshotState.COMPLETED,
    (SnapshotState.PENDING, SnapshotEvent.FAIL): SnapshotState.ERROR,
    (SnapshotState.COMPLETED, SnapshotEvent.DELETE): None,
    (SnapshotState.ERROR, SnapshotEvent.DELETE): None,
    (SnapshotState.COMPLETED, SnapshotEvent.RECYCLE): SnapshotState.RECOVERABLE,
    (SnapshotState.RECOVERABLE, SnapshotEvent.RECOVER): SnapshotState.COMPLETED,
    (SnapshotState.RECOVERABLE, SnapshotEvent.DELETE): None,
}


class LockState(StrEnum):
    GOVERNANCE = "governance"
    COMPLIANCE_COOLOFF = "compliance-cooloff"
    COMPLIANCE = "compliance"
    EXPIRED = "expired"


class LockEvent(StrEnum):
    GOVERN = "govern"
    COMPLY = "comply"
    COOL_OFF = "cool-off"
    """Locked in compliance mode, with a cooling-off period."""
    COOLED = "cooled"
    EXPIRE = "expire"
    UNLOCK = "unlock"


LOCK_TRANSITIONS: Final[dict[tuple[LockState | None, LockEvent], LockState | None]] = {
    # None: there is no lock.
    (None, LockEvent.GOVERN): LockState.GOVERNANCE,
    (None, LockEvent.COMPLY): LockState.COMPLIANCE,
    (None, LockEvent.COOL_OFF): LockState.COMPLIANCE_COOLOFF,
    (LockState.GOVERNANCE, LockEvent.GOVERN): LockState.GOVERNANCE,
    (LockState.GOVERNANCE, LockEvent.COMPLY): LockState.COMPLIANCE,
    (LockState.GOVERNANCE, LockEvent.COOL_OFF): LockState.COMPLIANCE_COOLOFF,
    (LockState.GOVERNANCE, LockEvent.EXPIRE): LockState.EXPIRED,
    (LockState.GOVERNANCE, LockEvent.UNLOCK): None,
    (LockState.COMPLIANCE_COOLOFF, LockEvent.GOVERN): LockState.GOVERNANCE,
    (LockState.COMPLIANCE_COOLOFF, LockEvent.COMPLY): LockState.COMPLIANCE,
    (LockState.COMPLIANCE_COOLOFF, LockEvent.COOL_OFF): LockState.COMPLIANCE_COOLOFF,
    (LockState.COMPLIANCE_COOLOFF, LockEvent.COOLED): LockState.COMPLIANCE,
    (LockState.COMPLIANCE_COOLOFF, LockEvent.EXPIRE): LockState.EXPIRED,
    (LockState.COMPLIANCE_COOLOFF, LockEvent.UNLOCK): None,
    (LockState.COMPLIANCE, LockEvent.COMPLY): LockState.COMPLIANCE,
    (LockState.COMPLIANCE, LockEvent.EXPIRE): LockState.EXPIRED,
    (LockState.EXPIRED, LockEvent.GOVERN): LockState.GOVERNANCE,
    (LockState.EXPIRED, LockEvent.COMPLY): LockState.COMPLIANCE,
    (LockState.EXPIRED, LockEvent.COOL_OFF): LockState.COMPLIANCE_COOLOFF,
    (LockState.EXPIRED, LockEvent.UNLOCK): None,
}


class ModificationState(StrEnum):
    MODIFYING = "modifying"
    OPTIMIZING = "optimizing"
    """The catalog has the new size; the running process and what it shows are being told."""
    COMPLETED = "completed"
    FAILED = "failed"


class ModificationEvent(StrEnum):
    COMMITTED = "committed"
    SHOWN = "shown"
    FAILED = "failed"


MODIFICATION_TRANSITIONS: Final[dict[tuple[ModificationState, ModificationEvent], ModificationState]] = {
    (ModificationState.MODIFYING, ModificationEvent.COMMITTED): ModificationState.OPTIMIZING,
    (ModificationState.MODIFYING, ModificationEvent.FAILED): ModificationState.FAILED,
    (ModificationState.OPTIMIZING, ModificationEvent.SHOWN): ModificationState.COMPLETED,
    (ModificationState.OPTIMIZING, ModificationEvent.FAILED): ModificationState.FAILED,
}


class DirectState(StrEnum):
    """What becomes of a snapshot that StartSnapshot made."""

    STARTING = "starting"
    """Its key and files are being made."""
    OPEN = "open"
    SEALING = "sealing"
    """No block can be written any more; its layer is hashed and its map written, however often that is begun."""
    COMPLETED = "completed"
    ABANDONED = "abandoned"
    """Deleted before it was completed."""
    TIMED_OUT = "timed out"


class DirectEvent(StrEnum):
    STARTED = "started"
    SEAL = "seal"
    COMPLETE = "complete"
    ABANDON = "abandon"
    TIME_OUT = "time out"


DIRECT_TRANSITIONS: Final[dict[tuple[DirectState, DirectEvent], DirectState]] = {
    (DirectState.STARTING, DirectEvent.STARTED): DirectState.OPEN,
    (DirectState.STARTING, DirectEvent.ABANDON): DirectState.ABANDONED,
    (DirectState.OPEN, DirectEvent.SEAL): DirectState.SEALING,
    (DirectState.OPEN, DirectEvent.ABANDON): DirectState.ABANDONED,
    (DirectState.OPEN, DirectEvent.TIME_OUT): DirectState.TIMED_OUT,
    (DirectState.SEALING, DirectEvent.COMPLETE): DirectState.COMPLETED,
    (DirectState.SEALING, DirectEvent.ABANDON): DirectState.ABANDONED,
    (DirectState.SEALING, DirectEvent.TIME_OUT): DirectState.TIMED_OUT,
}


class JobKind(StrEnum):
    COPY_SNAPSHOT = "copy-snapshot"
    RESTORE_VOLUME = "restore-volume"
    VERIFY = "verify"
    EXPORT_ARCHIVE = "export-archive"
    IMPORT_ARCHIVE = "import-archive"
    IMPORT_VOLUME = "import-volume"
    EXPORT_IMAGE = "export-image"


class JobState(StrEnum):
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    """It waits for its client to pass its descriptor again (ResumeJob)."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobEvent(StrEnum):
    COMPLETE = "complete"
    FAIL = "fail"
    CANCEL = "cancel"
    INTERRUPT = "interrupt"
    RESUME = "resume"


JOB_TRANSITIONS: Final[dict[tuple[JobState, JobEvent], JobState]] = {
    (JobState.RUNNING, JobEvent.COMPLETE): JobState.COMPLETED,
    (JobState.RUNNING, JobEvent.FAIL): JobState.FAILED,
    (JobState.RUNNING, JobEvent.CANCEL): JobState.CANCELLED,
    (JobState.RUNNING, JobEvent.INTERRUPT): JobState.INTERRUPTED,
    (JobState.INTERRUPTED, JobEvent.RESUME): JobState.RUNNING,
    # At a start of ebsd it may turn out that its worker had ended, or left nothing to go on with.
    (JobState.INTERRUPTED, JobEvent.COMPLETE): JobState.COMPLETED,
    (JobState.INTERRUPTED, JobEvent.FAIL): JobState.FAILED,
    (JobState.INTERRUPTED, JobEvent.CANCEL): JobState.CANCELLED,
}

ACTIVE_JOBS: Final = frozenset((JobState.RUNNING, JobState.INTERRUPTED))
"""Of such a job source and destination are in use."""


def next_volume_state(volume: str, state: VolumeState, event: VolumeEvent) -> VolumeState:
    """Return the state after the event; raises IncorrectVolumeState (EC2's IncorrectState) for an illegal pair."""
    try:
        return VOLUME_TRANSITIONS[state, event]
    except KeyError:
        raise IncorrectVolumeState(volume=volume, state=state.value) from None


def next_attachment_state(volume: str, state: AttachmentState, event: AttachmentEvent) -> AttachmentState:
    """Return the state after the event; raises IncorrectVolumeState for an illegal pair."""
    try:
        return ATTACHMENT_TRANSITIONS[state, event]
    except KeyError:
        raise IncorrectVolumeState(volume=volume, state=state.value) from None


def next_snapshot_state(snapshot: str, state: SnapshotState, event: SnapshotEvent) -> SnapshotState | None:
    """Return the state after the event, None for a snapshot that is gone then.

    Raises IncorrectSnapshotState (EC2's IncorrectState) for an illegal pair.
    """
    try:
        return SNAPSHOT_TRANSITIONS[state, event]
    except KeyError:
        raise IncorrectSnapshotState(snapshot=snapshot, state=state.value) from None


def next_lock_state(snapshot: str, state: LockState | None, event: LockEvent) -> LockState | None:
    """Return the state of a snapshot's lock after the event, None for no lock; raises IncorrectState."""
    try:
        return LOCK_TRANSITIONS[state, event]
    except KeyError:
        what = "not locked" if state is None else f"locked ({state.value})"
        raise IncorrectState(reason=f"The snapshot {snapshot} is {what}") from None


def next_direct_state(snapshot: str, state: DirectState, event: DirectEvent) -> DirectState:
    """Return the state after the event; raises DirectSnapshotNotPending for an illegal pair."""
    try:
        return DIRECT_TRANSITIONS[state, event]
    except KeyError:
        raise DirectSnapshotNotPending(snapshot=snapshot, state=state.value) from None


def next_modification_state(volume: str, state: ModificationState, event: ModificationEvent) -> ModificationState:
    """Return the state after the event; raises IncorrectModificationState for an illegal pair."""
    try:
        return MODIFICATION_TRANSITIONS[state, event]
    except KeyError:
        raise IncorrectModificationState(volume=volume, state=state.value) from None


def next_job_state(job: str, state: JobState, event: JobEvent) -> JobState:
    """Return the state after the event; raises IncorrectState for an illegal pair, a job that has ended among them."""
    try:
        return JOB_TRANSITIONS[state, event]
    except KeyError:
        raise IncorrectState(reason=f"The job {job} is {state.value}") from None
