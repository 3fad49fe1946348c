"""ImportVolume: a new volume with what an image of the client's holds, filled by a job.

1. An import is a create: the same parameters, outcomes and admission (``Volumes.plan``), and data of its own key.
2. ebsd never touches the image: a process that can be killed looks at it before anything is made, the worker reads it.
3. The job keeps what told the image from others. One that an end of ebsd interrupted goes on with the same image only.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import trio

from ebsd.control.filling import Filling, claim_members, destination_of
from ebsd.control.job_work import START_DEADLINE, Sessions, Worker, close_given
from ebsd.control.volume_link import close_all
from ebsd.control.volumes import CreateRequest
from ebsd.domain.errors import ImageChanged, ImageUnusable, InvalidParameterValue, MissingParameter, Timeout
from ebsd.domain.ids import ID_RANDOM_BYTES, JobId, new_id
from ebsd.domain.jobs import new_job
from ebsd.domain.model import Caller, Job, Volume
from ebsd.domain.states import JobKind
from ebsd.domain.units import MIN_VOLUME, SECTOR, check_volume_size
from ebsd.ipc.process import run_helper
from ebsd.store.catalog import Transaction

PROBE: Final = "ebsd.volume.image_probe"
PROBE_SECONDS: Final = 20.0

RAW, NBD = "raw", "nbd"
STREAM: Final = "stream"


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """The parameters of ImportVolume after parsing, but for the descriptors."""

    create: CreateRequest
    """``size``: of the volume in bytes; of a stream its exact length. None: as large as the image."""
    served_bytes: int | None
    """What an image holds that is served by NBD; None for others."""
    detect_zeros: bool
    rate: int | None = None


async def look_at(image: int) -> dict[str, Any]:
    """Return what is behind a descriptor of a client (``volume/image_source.py``).

    Raises ImageUnusable, also when the owner of the file does not answer.
    """
    try:
        answer = await run_helper(PROBE, {"method": "look"}, [image], deadline=PROBE_SECONDS)
    except Timeout:
        raise ImageUnusable(
            reason=f"its file system does not answer within {PROBE_SECONDS:g} seconds", remedy=""
        ) from None
    found: dict[str, Any] = answer.message["Image"]
    return found


class Importing(Filling):
    """Makes volumes from images."""

    async def import_volume(
        self, caller: Caller, request: ImportRequest, given: Sequence[int]
    ) -> tuple[Volume, JobId, str | None]:
        """Make a volume, ``creating`` until its job is done; the third value is a note.

        ``given``: the image, and a connection to what serves it where it is served; taken over, whatever happens.
        Raises what CreateVolume raises, ImageUnusable.
        """
        handed_on = False
        try:
            found = await look_at(given[0])
            size, image, notes = sizes(found, request)
            create = replace(request.create, size=size)
            plan = await self._volumes.plan(caller, create, None)
            await self._host.space.require()
            job = new_job(
                JobId(new_id("job", self._host.random(ID_RANDOM_BYTES))),
                JobKind.IMPORT_VOLUME,
                account=plan.volume.account,
                owner=plan.volume.owner,
                source="",
                destination=plan.volume.id,
                started=self._host.now(),
                rate=request.rate,
                parameters={
                    "Image": {
                        "Size": image,
                        "DetectZeros": request.detect_zeros,
                        "Format": RAW if len(given) == 1 else NBD,
                    },
                    "Found": found,
                },
            )
            handed_on = True
            job = await self.fill(caller, job, plan.volume, _nothing_to_check, given)
        finally:
            if not handed_on:
                await close_given(given)
        return plan.volume, job.id, " ".join([*notes, *([plan.note] if plan.note else [])]) or None

    # --- JobWork

    async def hand_over(self, job: Job, worker: Worker, sessions: Sessions, given: Sequence[int], rate: int) -> None:
        destination, layer = await self._catalogue.run(lambda t: destination_of(t, job))
        fds: list[int] = []
        try:
            fds.append(await sessions.open(destination, "destination"))
            fds += await self.open_destination(destination, layer)
            record = await trio.to_thread.run_sync(self._files.record_bytes, destination.id)
            params = {
                "Destination": {**claim_members(destination), "Layer": layer.number},
                "DestinationRecord": base64.b64encode(record).decode(),
                "Image": job.parameters["Image"],
                "DoneThrough": job.done_through,
                "Checkpoint": job.checkpoint or job.parameters["Found"],
                "SpaceReserve": self._host.space.limits.reserve,
                "Rate": rate,
            }
            await worker.request("start", params, [*fds, *given], deadline=START_DEADLINE)
        finally:
            close_all(fds)

    async def is_prepared(self, job: Job) -> bool:
        """A stream is lost with ebsd, and what was imported of it is not worth keeping."""
        return job.parameters["Found"]["Kind"] != STREAM and await super().is_prepared(job)

    async def check_given(self, job: Job, given: Sequence[int]) -> None:
        """Refuse another image than the one that the job began with, and leave the job as it is."""
        wanted = 1 if job.parameters["Image"]["Format"] == RAW else 2
        if len(given) != wanted:
            reason = f"this import needs {wanted} of them; is the image of another format than it was?"
            raise InvalidParameterValue(value=len(given), parameter="Descriptors", reason=reason)
        found = await look_at(given[0])
        if found != job.parameters["Found"]:
            error = ImageChanged(reason="it is another file, or somebody wrote to it since the import began")
            error.hint = f"Cancel the import (ebsctl job cancel {job.id}), and begin anew."
            raise error


def sizes(found: Mapping[str, Any], request: ImportRequest) -> tuple[int, int, list[str]]:
    """Return the size of the volume and of the image in bytes, and what to tell of them.

    A volume is whole sectors and at least as large as its image; behind the image it reads as zeros. Raises
    MissingParameter, ImageUnusable, InvalidParameterValue, InvalidSize.
    """
    wanted = request.create.size
    if found["Kind"] == STREAM:
        if request.served_bytes is not None:
            raise ImageUnusable(reason="what is served must have a file", remedy="")
        if wanted is None:
            raise MissingParameter(parameter="SizeBytes")
        image = wanted
    else:
        image = int(found["Size"]) if request.served_bytes is None else request.served_bytes
        wanted = image if wanted is None else wanted
    if image <= 0:
        raise ImageUnusable(reason="it is empty", remedy="")
    if wanted < image:
        reason = f"it is smaller than the image, expect size >= {image} bytes"
        raise InvalidParameterValue(value=wanted, parameter="SizeBytes", reason=reason)
    size = max(wanted + -wanted % SECTOR, MIN_VOLUME)
    notes = []
    if size != wanted:
        what = "the least that a volume has" if size == MIN_VOLUME else f"rounded up to whole sectors of {SECTOR}"
        notes.append(f"The volume has {size} bytes: {wanted}, {what}.")
    return check_volume_size(size), image, notes


def _nothing_to_check(t: Transaction) -> None:
    """There is no source in the catalog."""
