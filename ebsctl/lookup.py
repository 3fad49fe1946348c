"""Finding what a word of the command line names: volumes, snapshots and jobs, also for a shell that completes it.

1. An id says by itself what it is; for a name ebsd is asked, as volumes and snapshots share their names.
2. Completion never fails and hardly waits: what cannot be learned is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from ebsctl.app import App
from ebsctl.render import Document
from ebsd.domain.errors import (
    EbsdError,
    InvalidParameterValue,
    JobNotFound,
    ProtocolError,
    SnapshotNotFound,
    VolumeNotFound,
)
from ebsd.domain.ids import looks_like_snapshot_id, looks_like_volume_id

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ebsctl.client import Client

VOLUME: Final = "volume"
SNAPSHOT: Final = "snapshot"
JOB: Final = "job"

ID_MEMBER: Final = {VOLUME: "VolumeId", SNAPSHOT: "SnapshotId", JOB: "JobId"}
"""Kind -> the member that holds its id."""

COMPLETION_SECONDS = 0.2
"""Longest wait for ebsd while a shell completes a word."""


class Found(NamedTuple):
    kind: str
    document: Document

    @property
    def ident(self) -> str:
        ident: str = self.document[ID_MEMBER[self.kind]]
        return ident


def describe_volume(client: Client, volume: str) -> Document:
    """Return the Volume of a name or id; raises VolumeNotFound."""
    volumes: list[Document] = client.ec2("DescribeVolumes", VolumeIds=[volume])["Volumes"]
    if not volumes:
        raise VolumeNotFound(volume=volume)
    return volumes[0]


def describe_snapshot(client: Client, snapshot: str) -> Document:
    """Return the Snapshot of a name or id; raises SnapshotNotFound."""
    snapshots: list[Document] = client.ec2("DescribeSnapshots", SnapshotIds=[snapshot])["Snapshots"]
    if not snapshots:
        raise SnapshotNotFound(snapshot=snapshot)
    return snapshots[0]


def describe_job(client: Client, job: str) -> Document:
    """Return the Job of an id; raises JobNotFound."""
    jobs: list[Document] = client.control("DescribeJobs", JobIds=[job])["Jobs"]
    if not jobs:
        raise JobNotFound(job=job)
    return jobs[0]


DESCRIBE: Final[Mapping[str, Callable[[Client, str], Document]]] = {
    VOLUME: describe_volume,
    SNAPSHOT: describe_snapshot,
    JOB: describe_job,
}
"""Kind -> what returns one of it, or raises the NotFound error of the kind."""


def kind_of_id(text: str) -> str | None:
    """Return the kind that an id stands for; None for what may be a name."""
    if looks_like_volume_id(text):
        return VOLUME
    if looks_like_snapshot_id(text):
        return SNAPSHOT
    return JOB if text.startswith("job-") else None


def identify(client: Client, resource: str) -> tuple[str, str]:
    """Return (kind, id) of a name or id; an id is not checked here."""
    if kind := kind_of_id(resource):
        return kind, resource
    reply = client.control("Identify", Resource=resource)
    if reply["Kind"] not in (VOLUME, SNAPSHOT):
        raise ProtocolError(reason=f"{resource} is of the unknown kind {reply['Kind']}")
    return reply["Kind"], reply["ResourceId"]


def describe(app: App, resource: str) -> Found:
    """Return the volume, snapshot or job of a name or id; raises the NotFound error of its kind."""
    kind, ident = identify(app.client, resource)
    return Found(kind, DESCRIBE[kind](app.client, ident))


def matches(document: Document, filters: Iterable[Mapping[str, Any]] | None, what: str) -> bool:
    """Say whether for every filter a member has one of the values, as JSON would write it: true for True.

    Raises InvalidParameterValue, naming ``what`` one filters, for a member that is no text or boolean.
    """
    return all(_matches_one(document, wanted, what) for wanted in filters or ())


def _matches_one(document: Document, wanted: Mapping[str, Any], what: str) -> bool:
    value = document.get(wanted["Name"])
    if isinstance(value, bool):
        return str(value).lower() in wanted["Values"]
    if not isinstance(value, str):
        known = sorted(name for name, known_value in document.items() if isinstance(known_value, str | bool))
        reason = f"{what} can be filtered by {', '.join(known)}"
        raise InvalidParameterValue(value=wanted["Name"], parameter="--filter", reason=reason)
    return value in wanted["Values"]


# --- words for the shell ----------------------------------------------------------------------------------


def _completed(ctx: click.Context, incomplete: str, kinds: Sequence[str]) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    app = ctx.ensure_object(App)
    app.socket = ctx.find_root().params.get("socket")
    client = app.impatient_client(COMPLETION_SECONDS)
    ask: Mapping[str, Callable[[], list[Document]]] = {
        VOLUME: lambda: client.volumes(),
        SNAPSHOT: lambda: client.snapshots(),
        JOB: lambda: client.control("DescribeJobs")["Jobs"],
    }
    named = kind_of_id(incomplete)
    words: list[str] = []
    for kind in kinds if named is None else [named] if named in kinds else []:
        member = ID_MEMBER[kind] if named is not None or kind == JOB else "Name"
        try:
            words += [item[member] for item in ask[kind]()]
        except EbsdError:
            return []
    return [CompletionItem(word) for word in words if word and word.startswith(incomplete)]


def complete_volume(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names and, after ``vol-``, the ids of volumes; nothing when ebsd does not answer."""
    return _completed(ctx, incomplete, [VOLUME])


def complete_snapshot(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names and, after ``snap-``, the ids of snapshots."""
    return _completed(ctx, incomplete, [SNAPSHOT])


def complete_job(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the ids of jobs."""
    return _completed(ctx, incomplete, [JOB])


def complete_resource(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names of volumes and snapshots and, after ``vol-``, ``snap-`` or ``job-``, the ids."""
    if kind := kind_of_id(incomplete):
        return _completed(ctx, incomplete, [kind])
    return _completed(ctx, incomplete, [VOLUME, SNAPSHOT])
