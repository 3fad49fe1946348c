"""Growth of volumes (EC2 ModifyVolume): detached or attached, never smaller.

Order: head layer, durable map, catalog, then the running process and what it shows. Each file step may be repeated, and
until the catalog says so the volume has its old size; a larger file hurts nobody.
"""

from __future__ import annotations

import trio

from ebsd.control import host_helper
from ebsd.control.catalogue import Catalogue
from ebsd.control.host import Host
from ebsd.control.lineages import Lineages
from ebsd.control.snapshots import Snapshots
from ebsd.control.volume_files import VolumeFiles
from ebsd.control.volume_link import VolumeLink, close_all
from ebsd.control.volumes import Volumes
from ebsd.domain.errors import (
    IncorrectVolumeState,
    InvalidParameterCombination,
    InvalidParameterValue,
    MissingParameter,
    OperationNotPermitted,
)
from ebsd.domain.ids import VolumeId
from ebsd.domain.model import Caller, Volume
from ebsd.domain.states import AttachmentState, VolumeState
from ebsd.domain.units import GIB, check_volume_size


class Growth:
    """The use case behind ``ebsctl resize``."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        files: VolumeFiles,
        volumes: Volumes,
        lineages: Lineages,
        snapshots: Snapshots,
        links: dict[VolumeId, VolumeLink],
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._files = files
        self._volumes = volumes
        self._lineages = lineages
        self._snapshots = snapshots
        self._links = links

    async def grow(
        self, caller: Caller, name_or_id: str, *, size: int | None, size_gib: int | None
    ) -> tuple[Volume, int]:
        """Let a volume grow; returns it with its new size, and its size before, in bytes."""
        wanted = _wanted(size, size_gib)
        found = await self._catalogue.run(lambda t: t.find_volume(caller, name_or_id))
        async with self._volumes.lock(found.id), self._lineages.lock(found.lineage):
            await self._snapshots.settle_pending(found.id)
            volume = await self._catalogue.run(lambda t: t.volume(found.id))
            _check(volume, wanted)
            if wanted == volume.size and volume.attachment is None:
                return volume, volume.size
            served = await self._served_size(volume)
            layers = await self._catalogue.run(lambda t: {x.number: x for x in t.layers(volume.lineage)})
            written = _written_head(volume)
            if volume.head != written:  # left by a snapshot that was abandoned; the next attachment may write there
                close_all(await trio.to_thread.run_sync(self._files.grow, volume, layers[volume.head], wanted, served))
            head = await trio.to_thread.run_sync(self._files.grow, volume, layers[written], wanted, served)
            try:
                await self._catalogue.run(lambda t: t.set_volume_size(volume.id, wanted))
                if volume.attachment is not None:
                    await self._show(volume, wanted, head)
            finally:
                close_all(head)
            return await self._catalogue.run(lambda t: t.volume(volume.id)), volume.size

    async def _served_size(self, volume: Volume) -> int:
        """Return the size that the volume process serves: behind the catalog's when an earlier call was cut short."""
        link = self._links.get(volume.id)
        return volume.size if link is None else int((await link.status())["Size"])

    async def _show(self, volume: Volume, size: int, segments: list[int]) -> None:
        link = self._links.get(volume.id)
        if link is None or volume.attachment is None:
            raise IncorrectVolumeState(volume=volume.id, state=volume.state.value)
        await link.grow(size, volume.attachment.head, segments)
        block_file = self._host.runtime.block_file(volume.id)
        await host_helper.show_size(volume.id, block_file, volume.attachment.loop_minor)


def _wanted(size: int | None, size_gib: int | None) -> int:
    if size is not None and size_gib is not None:
        raise InvalidParameterCombination(reason="Size and SizeBytes cannot be given together")
    if size is None and size_gib is None:
        raise MissingParameter(parameter="Size")
    return check_volume_size(size if size is not None else (size_gib or 0) * GIB)


def _check(volume: Volume, wanted: int) -> None:
    if wanted < volume.size:
        raise InvalidParameterValue(
            value=wanted, parameter="Size", reason=f"New size cannot be smaller than existing size, {volume.size} bytes"
        )
    attachment = volume.attachment
    usable = volume.state is VolumeState.AVAILABLE or (
        volume.state is VolumeState.IN_USE
        and attachment is not None
        and attachment.state in (AttachmentState.ATTACHED, AttachmentState.BUSY)
    )
    if not usable:
        raise IncorrectVolumeState(volume=volume.id, state=volume.state.value)
    if attachment is not None and attachment.read_only:
        raise OperationNotPermitted(
            reason=f"{volume.id} is attached read-only", remedy="Detach it, grow it, and attach it again."
        )


def _written_head(volume: Volume) -> int:
    return volume.head if volume.attachment is None else volume.attachment.head
