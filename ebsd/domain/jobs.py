"""Jobs: the table of their kinds, what may be done with one in which state, and how fast one goes.

A kind is added here, in ``states.JobKind``, and with a ``JobWork`` that registers for it (``control/job_work.py``).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ebsd.domain.errors import InvalidParameterValue
from ebsd.domain.ids import AccountId, JobId
from ebsd.domain.model import Job
from ebsd.domain.states import JobKind, JobState
from ebsd.domain.units import KIB

MIN_RATE: Final = 64 * KIB
"""Bytes per second: the least limit. Below it a job would look as if it hung."""

MAX_RATE: Final = 1 << 50

WINDOW_SECONDS: Final = 10.0
"""The rate of a job is what it did in the last so many seconds."""

KEPT_ENDED: Final = 500
"""Ended jobs that are kept of each account; the oldest are forgotten."""


class Makes(StrEnum):
    """What a job fills: it is not usable before the job has completed, and goes when the job is cancelled or fails."""

    NOTHING = "nothing"
    SNAPSHOT = "snapshot"
    VOLUME = "volume"


class Resumption(StrEnum):
    """How a job goes on that was running when ebsd ended."""

    BY_ITSELF = "by itself"
    """Another worker starts where the last committed progress was."""
    WITH_CLIENT = "with its client"
    """It needs a descriptor that only its client can open. It is ``interrupted`` until ResumeJob brings it again."""


@dataclass(frozen=True, slots=True)
class KindRules:
    """What distinguishes a kind of job from the others, but for what its worker is given."""

    worker: str
    """The module of its worker process."""
    makes: Makes
    resumption: Resumption
    holds_source: bool = True
    """Whether what it reads cannot be deleted while it has not ended."""


KINDS: Final[dict[JobKind, KindRules]] = {
    JobKind.COPY_SNAPSHOT: KindRules("ebsd.volume.copier", Makes.SNAPSHOT, Resumption.BY_ITSELF),
    JobKind.RESTORE_VOLUME: KindRules("ebsd.volume.copier", Makes.VOLUME, Resumption.BY_ITSELF),
    # What is verified may be deleted: the verification then ends with an error.
    JobKind.VERIFY: KindRules("ebsd.volume.verifier", Makes.NOTHING, Resumption.BY_ITSELF, holds_source=False),
    JobKind.EXPORT_ARCHIVE: KindRules("ebsd.volume.archive_exporter", Makes.NOTHING, Resumption.WITH_CLIENT),
    JobKind.IMPORT_ARCHIVE: KindRules("ebsd.volume.archive_importer", Makes.SNAPSHOT, Resumption.WITH_CLIENT),
    JobKind.IMPORT_VOLUME: KindRules("ebsd.volume.importer", Makes.VOLUME, Resumption.WITH_CLIENT),
    JobKind.EXPORT_IMAGE: KindRules("ebsd.volume.exporter", Makes.NOTHING, Resumption.WITH_CLIENT),
}


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it is now: fresher than its row, and with its pace."""

    job: Job
    limit: int
    """Bytes per second at most, 0 for none."""
    rate: int | None = None
    """Bytes per second of late, while it runs."""
    seconds_left: int | None = None


def new_job(
    ident: JobId,
    kind: JobKind,
    *,
    account: AccountId,
    owner: str,
    source: str,
    destination: str,
    started: str,
    rate: int | None = None,
    parameters: dict[str, object] | None = None,
) -> Job:
    """Return a job that has done nothing yet."""
    return Job(
        id=ident,
        account=account,
        owner=owner,
        kind=kind,
        state=JobState.RUNNING,
        source=source,
        destination=destination,
        total=0,
        done=0,
        done_through=0,
        started=started,
        ended=None,
        error=None,
        rate=rate,
        parameters=parameters or {},
    )


def check_rate(rate: int | None) -> int | None:
    """Return a rate limit in bytes per second when there can be such a one; 0: none, None: the configured one."""
    if rate is None or rate == 0 or MIN_RATE <= rate <= MAX_RATE:
        return rate
    reason = f"a rate is at least {MIN_RATE} bytes per second, or 0 for no limit"
    raise InvalidParameterValue(value=rate, parameter="Rate", reason=reason)


class Pace:
    """How fast a job goes, from what it had done at which times."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, now: float, done: int) -> None:
        """Take bytes that were done at a time in seconds, of any clock that only goes forward."""
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()  # another worker does again what was not durable
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW_SECONDS:
            self._seen.popleft()

    @property
    def rate(self) -> int | None:
        """Bytes per second of late; None when it is too early to say."""
        if len(self._seen) < 2:
            return None
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        return None if last <= first else int((after - before) / (last - first))

    def seconds_left(self, total: int) -> int | None:
        """Return the seconds, rounded up, that the rest of ``total`` bytes will take; None when nobody can say."""
        rate = self.rate
        if not rate or not total:
            return None
        return -(-max(total - self._seen[-1][1], 0) // rate)
