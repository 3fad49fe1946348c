"""Rebuilding the catalog while ebsd runs in rescue mode, volumes that are still attached included.

The order: read the store; find what is attached on the host; write the new catalog beside the old one; swap them, the
old one is kept. Then ebsd starts again inside, and takes over what is attached as after any restart.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio

from ebsd.control.broker import Broker
from ebsd.control.host import Host
from ebsd.control.mounts import loop_minors_of, read_mounts
from ebsd.control.volume_link import VolumeLink
from ebsd.domain.errors import EbsdError, IncorrectState, NeedsRoot
from ebsd.domain.ids import parse_uuid, uid_of_account
from ebsd.domain.model import Attachment, Caller, ExposedAs, Volume
from ebsd.domain.states import AttachmentState
from ebsd.store.disk import Disk
from ebsd.store.layout import StateLayout
from ebsd.store.rebuild import LOST, Plan, plan_rebuild, swap_catalog, write_catalog

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rescue:
    """Why there is no catalog."""

    reason: str
    """For people; empty when there is one."""
    may_rebuild: bool
    """False where the catalog is whole, and of a version that this program does not know."""


class Rebuilding:
    """The use case; ``done`` is set when there is a new catalog, and ebsd must start again inside."""

    def __init__(self, host: Host, state: StateLayout, disk: Disk, broker: Broker, rescue: Rescue) -> None:
        self._host = host
        self._state = state
        self._disk = disk
        self._broker = broker
        self._rescue = rescue
        self._one = trio.Lock()
        self.done = trio.Event()

    async def rebuild(self, caller: Caller) -> dict[str, Any]:
        """Make a new catalog; returns the members of Control.RebuildCatalog. Raises IncorrectState, NeedsRoot."""
        if not caller.is_admin:
            raise NeedsRoot(operation="Rebuilding the catalog", remedy="Ask the administrator.")
        async with self._one:
            self._check()
            plan = await trio.to_thread.run_sync(self._plan)
            attachments = {}
            for volume in plan.volumes:
                found = await self._find_attachment(volume, plan)
                if found is not None:
                    attachments[str(volume.id)] = found
            with trio.CancelScope(shield=True):
                kept = await trio.to_thread.run_sync(self._replace, plan, attachments)
            self.done.set()
        log.warning("the catalog was rebuilt: %d volumes, %d snapshots", len(plan.volumes), len(plan.snapshots))
        members: dict[str, Any] = {
            "Volumes": len(plan.volumes),
            "Snapshots": len(plan.snapshots),
            "AttachedVolumes": len(attachments),
            "Lost": list(LOST),
            "Notes": plan.notes,
            "Left": [{"ResourceId": name, "Reason": reason} for name, reason in sorted(plan.left.items())],
        }
        return members if kept is None else {**members, "Kept": str(kept)}

    def _check(self) -> None:
        if not self._rescue.reason or self.done.is_set():
            error = IncorrectState(reason="The catalog can be used, and is not rebuilt")
            error.hint = (
                f"To rebuild it all the same, end ebsd, move {self._state.catalog} away with its -wal and -shm, "
                "start ebsd, and ask again."
            )
            raise error
        if not self._rescue.may_rebuild:
            error = IncorrectState(reason=f"The catalog is not damaged: {self._rescue.reason.rstrip('.')}")
            error.hint = "Run the ebsd that wrote it."
            raise error

    def _plan(self) -> Plan:
        boot = parse_uuid(self._host.boot_id)
        return plan_rebuild(self._disk, self._state, self._host.runtime.live, boot, self._host.now())

    def _replace(self, plan: Plan, attachments: dict[str, tuple[Attachment, int]]) -> Path | None:
        fresh = self._state.catalog.with_name(".catalog.sqlite.tmp")
        for extra in ("", "-wal", "-shm", "-journal"):
            fresh.with_name(fresh.name + extra).unlink(missing_ok=True)
        write_catalog(fresh, plan, attachments)
        suffix = f"{self._host.now()}-{self._host.random(4).hex()}"
        return swap_catalog(self._disk, self._state, fresh, suffix)

    async def _find_attachment(self, volume: Volume, plan: Plan) -> tuple[Attachment, int] | None:
        """Return the attachment of a volume that is still on the host, with the size that is served; None for none."""
        runtime = self._host.runtime
        block_file = runtime.block_file(volume.id)
        link = await VolumeLink.find(volume.id, runtime.control_socket(volume.id))
        mounted = any(mount.mount_point == str(block_file) for mount in read_mounts())
        if link is None and not mounted:
            return None
        head, size, read_only = volume.head, volume.size, not (runtime.live / volume.id).exists()
        if link is not None:
            try:
                status = await link.status()
                head, size = int(status["Head"]), int(status["Size"])
            except EbsdError as exc:
                plan.notes.append(f"{volume.id}: its process does not answer: {exc.message}")
            finally:
                await link.leave()
        minors = loop_minors_of(block_file)
        attachment = Attachment(
            volume=volume.id,
            state=AttachmentState.ATTACHED,
            boot_id=self._host.boot_id,
            generation=volume.attach_generation,
            exposed_as=ExposedAs.LOOP if minors else ExposedAs.FILE,
            read_only=read_only,
            path=f"/dev/loop{minors[0]}" if minors else str(block_file),
            loop_minor=minors[0] if minors else None,
            grant=None,
            head=head,
            mount_point=None,
            time=self._host.now(),
        )
        return replace(attachment, grant=await self._grant_of(volume)), size

    async def _grant_of(self, volume: Volume) -> str | None:
        """Return the attach grant: the same name and context again mean the same grant."""
        if volume.key_arn is None:
            return None
        owner = Caller(uid_of_account(volume.account), volume.owner, volume.account, is_admin=False)
        name = f"attach-{volume.id}-{volume.attach_generation}"
        try:
            return await self._broker.create_grant(owner, volume.key_arn, volume.context, name)
        except EbsdError as exc:
            log.warning("the attach grant of %s is not known: %s", volume.id, exc)
            return None
