"""Growth of volumes (EC2 ModifyVolume): detached or attached, never smaller.

Order: head layer, durable map, catalog, then the running process and what it shows. Each file step may be repeated,
and until the catalog says so the volume has its old size; a larger file hurts nobody. The latest modification of each
volume is kept: ``modifying`` before the first step, ``optimizing`` from the commit on. That decides what a crash cut.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import trio

from ebsd.control import host_helper
from ebsd.control.catalogue import Catalogue
from ebsd.control.describe import MODIFICATION_FILTERS, describe_modification
from ebsd.control.host import Host
from ebsd.control.lineages import Lineages
from ebsd.control.pages import parse_page, taken
from ebsd.control.snapshots import Snapshots
from ebsd.control.volume_files import VolumeFiles
from ebsd.control.volume_link import VolumeLink, close_all
from ebsd.control.volumes import Volumes
from ebsd.domain.errors import (
    EbsdError,
    IncorrectVolumeState,
    InvalidParameterCombination,
    InvalidParameterValue,
    MissingParameter,
    ModificationNotFound,
    OperationNotPermitted,
)
from ebsd.domain.filters import parse_filters, passes
from ebsd.domain.ids import VolumeId, looks_like_volume_id, uid_of_account
from ebsd.domain.model import Caller, Modification, Volume
from ebsd.domain.states import (
    AttachmentState,
    ModificationEvent,
    ModificationState,
    VolumeState,
    next_modification_state,
)
from ebsd.domain.units import GIB, check_volume_size
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)

_CUT = "ebsd ended before it was done; the volume has the size that it had."


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
            await self._catalogue.run(lambda t: self._begin(t, volume, wanted))
            try:
                await self._grow(volume, wanted)
            except BaseException as exc:
                with trio.CancelScope(shield=True):
                    await self._note(volume.id, ModificationEvent.FAILED, str(exc) or type(exc).__name__)
                raise
            await self._note(volume.id, ModificationEvent.SHOWN)
            return await self._catalogue.run(lambda t: t.volume(volume.id)), volume.size

    async def _grow(self, volume: Volume, wanted: int) -> None:
        served = await self._served_size(volume)
        layers = await self._catalogue.run(lambda t: {x.number: x for x in t.layers(volume.lineage)})
        written = _written_head(volume)
        if volume.head != written:  # left by a snapshot that was abandoned; the next attachment may write there
            close_all(await trio.to_thread.run_sync(self._files.grow, volume, layers[volume.head], wanted, served))
        head = await trio.to_thread.run_sync(self._files.grow, volume, layers[written], wanted, served)
        try:

            def commit(t: Transaction) -> None:
                t.set_volume_size(volume.id, wanted)
                self._step(t, volume.id, ModificationEvent.COMMITTED)

            await self._catalogue.run(commit)
            if volume.attachment is not None:
                await self._show(volume, wanted, head)
        finally:
            close_all(head)

    # --- the modification

    def _begin(self, t: Transaction, volume: Volume, wanted: int) -> None:
        present = t.modification(volume.id)
        if wanted == volume.size and present is not None and present.target == wanted:
            # Asked for again, to catch up with: it is the same modification still.
            began, original = present.started, present.original
        else:
            began, original = self._host.now(), volume.size
        t.put_modification(Modification(volume.id, ModificationState.MODIFYING, original, wanted, began, None, ""))

    def _step(self, t: Transaction, volume: VolumeId, event: ModificationEvent, message: str = "") -> None:
        present = t.modification(volume)
        if present is None:
            return
        state = next_modification_state(volume, present.state, event)
        ended = None if event is ModificationEvent.COMMITTED else self._host.now()
        t.put_modification(replace(present, state=state, ended=ended, message=message))

    async def _note(self, volume: VolumeId, event: ModificationEvent, message: str = "") -> None:
        await self._catalogue.run(lambda t: self._step(t, volume, event, message))

    async def recover(self) -> None:
        """Decide the modifications that were under way when ebsd ended; after adoption, before any request."""

        def load(t: Transaction) -> list[tuple[Modification, Volume]]:
            under_way = (ModificationState.MODIFYING, ModificationState.OPTIMIZING)
            return [(found, t.volume(found.volume)) for found in t.modifications() if found.state in under_way]

        for found, volume in await self._catalogue.run(load):
            if volume.size != found.target:
                await self._note(volume.id, ModificationEvent.FAILED, _CUT)
            elif volume.state is VolumeState.IN_USE:
                await self._catch_up(volume)
            else:  # whatever attaches it next shows the size that the catalog has
                if found.state is ModificationState.MODIFYING:
                    await self._note(volume.id, ModificationEvent.COMMITTED)
                await self._note(volume.id, ModificationEvent.SHOWN)

    async def _catch_up(self, volume: Volume) -> None:
        """Have the process that serves a volume show the size that the catalog has."""
        owner = Caller(uid_of_account(volume.account), volume.owner, volume.account, is_admin=False)
        try:
            await self.grow(owner, volume.id, size=volume.size, size_gib=None)
        except (EbsdError, OSError) as exc:
            log.error("%s has its new size in the catalog, and its process may not show it: %s", volume.id, exc)

    async def describe(
        self,
        caller: Caller,
        names: Sequence[str] | None,
        filters: Sequence[Mapping[str, Any]],
        limit: int | None,
        token: str | None,
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Return the latest modification of each volume (EC2 DescribeVolumesModifications), oldest first, in pages.

        Raises ModificationNotFound for a named volume without one, the errors of DescribeVolumes otherwise.
        """
        page, chosen = parse_page(limit, token, looks_like_volume_id), parse_filters(filters, MODIFICATION_FILTERS)

        def load(t: Transaction) -> list[Modification]:
            if names is None:
                return t.modifications(None if caller.is_admin else caller.account, page.after, page.size + 1)
            found = []
            for name in names:
                volume = t.find_volume(caller, name).id
                modification = t.modification(volume)
                if modification is None:
                    raise ModificationNotFound(volume=volume)
                found.append(modification)
            return found

        def view(found: Modification) -> dict[str, Any] | None:
            described = describe_modification(found)
            return described if passes(described, chosen) else None

        rows = await self._catalogue.run(load)
        size = page.size if names is None else len(names)
        return taken(rows, size, lambda found: (found.started, found.volume), view)

    # --- sizes

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
