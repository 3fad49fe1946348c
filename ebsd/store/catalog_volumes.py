"""Volumes and their attachments in the catalog."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ebsd.domain.errors import VolumeNotFound
from ebsd.domain.ids import AccountId, KeyArn, LineageId, SnapshotId, VolumeId, looks_like_volume_id, parse_volume_id
from ebsd.domain.limits import Counted
from ebsd.domain.model import Attachment, Caller, Cipher, ExposedAs, Integrity, Verification, Volume
from ebsd.domain.states import AttachmentState, VolumeState
from ebsd.store.catalog_family import FamilyRows, Kin
from ebsd.store.catalog_names import NameRows
from ebsd.store.catalog_rows import json_column
from ebsd.store.catalog_tokens import TokenRows


class VolumeRows(NameRows, FamilyRows, TokenRows):
    """Rows of volumes and attachments."""

    def add_volume(self, volume: Volume) -> None:
        self._rows(
            "INSERT INTO volume VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            volume.id,
            volume.account,
            volume.owner,
            volume.size,
            volume.state.value,
            volume.reason,
            int(volume.cipher),
            volume.key_arn,
            volume.wrapped_key,
            json_column(volume.context),
            volume.lineage,
            volume.head,
            volume.snapshot,
            volume.attach_generation,
            volume.integrity.value,
            volume.authority,
            volume.created,
        )
        self.note_growth(volume.account, Counted.VOLUMES, Counted.VOLUME_BYTES)
        self.give_name(volume.account, volume.name, volume.id)
        self.set_tags(volume.id, volume.tags)
        if volume.token is not None:
            self.note_token(volume.token, volume.id)
        if volume.source_volume is not None:
            self._rows("INSERT INTO clone VALUES (?,?)", volume.id, volume.source_volume)
        self._add_kin(Kin(volume.id, volume.lineage, None, volume.id, volume.head, 0, frozenset(), False))

    def volume(self, volume: VolumeId) -> Volume:
        """Return one volume with its name, tags and attachment; raises VolumeNotFound."""
        found = self._volumes("WHERE volume.id=?", volume)
        if not found:
            raise VolumeNotFound(volume=volume)
        return found[0]

    def volumes(
        self,
        account: AccountId | None = None,
        after: tuple[str, str] | None = None,
        limit: int = -1,
        *,
        in_bin: bool = True,
    ) -> list[Volume]:
        """Return all volumes, or those of one account, oldest first; a page of them behind (time, id).

        ``in_bin``: those in the recycle bin, too.
        """
        return self._volumes(
            "WHERE (?1 IS NULL OR volume.account=?1) AND (?2 IS NULL OR (volume.created, volume.id) > (?2, ?3))"
            + ("" if in_bin else " AND volume.state<>'recoverable'"),
            account,
            *(after or (None, None)),
            limit=limit,
        )

    def _volumes(self, where: str, *args: Any, limit: int = -1) -> list[Volume]:
        tags: dict[str, dict[str, str]] = {}
        for resource, key, value in self._rows(
            f"SELECT resource, key, value FROM tag JOIN volume ON volume.id=tag.resource {where} ORDER BY key", *args
        ):
            tags.setdefault(resource, {})[key] = value
        rows = self._rows(
            "SELECT volume.id, volume.account, owner, name.name, size, volume.state, reason, cipher, key_arn, "
            "wrapped_key, context, lineage, volume.head, snapshot, attach_generation, integrity, authority, created, "
            "a.state, a.boot_id, a.generation, a.exposed_as, a.read_only, a.path, a.loop_minor, a.grant_id, "
            "a.head, a.mount_point, a.time, "
            "(SELECT preallocated FROM layer l WHERE l.lineage=volume.lineage AND l.number=volume.head), "
            "(SELECT source FROM clone WHERE clone.volume=volume.id) "
            "FROM volume JOIN name ON name.resource=volume.id LEFT JOIN attachment a ON a.volume=volume.id "
            f"{where} ORDER BY volume.created, volume.id LIMIT {limit:d}",
            *args,
        )
        found = self._verifications("volume", where, *args)
        return [_volume_from_row(row, tags.get(row[0], {}), found.get(row[0])) for row in rows]

    def find_volume(self, caller: Caller, name_or_id: str, *, in_bin: bool = False) -> Volume:
        """Return the volume a caller means by a name or an id.

        What lies in the recycle bin is found with ``in_bin`` only.
        Names resolve in the caller's account; administrators name others' volumes by id. A volume of
        somebody else is not found (EC2 answers InvalidVolume.NotFound, not a denial, so ids cannot be probed).
        """
        if looks_like_volume_id(name_or_id):
            volume_id = parse_volume_id(name_or_id)
        else:
            resource = self.resource_named(caller.account, name_or_id)
            if resource is None or not looks_like_volume_id(resource):
                raise VolumeNotFound(volume=name_or_id)
            volume_id = VolumeId(resource)
        volume = self.volume(volume_id)
        if volume.account != caller.account and not caller.is_admin:
            raise VolumeNotFound(volume=name_or_id)
        if volume.state is VolumeState.RECOVERABLE and not in_bin:
            error = VolumeNotFound(volume=name_or_id)
            error.hint = f"It is in the recycle bin; to have it back: ebsctl undelete {volume.id}"
            raise error
        return volume

    def set_volume_state(self, volume: VolumeId, state: VolumeState, reason: str = "") -> None:
        self._rows("UPDATE volume SET state=?, reason=? WHERE id=?", state.value, reason, volume)

    def set_integrity(self, volume: VolumeId, integrity: Integrity) -> None:
        self._rows("UPDATE volume SET integrity=? WHERE id=?", integrity.value, volume)

    def set_wrapped_key(
        self, volume: VolumeId, key_arn: KeyArn, wrapped_key: bytes, context: Mapping[str, str]
    ) -> None:
        self._rows(
            "UPDATE volume SET key_arn=?, wrapped_key=?, context=? WHERE id=?",
            key_arn,
            wrapped_key,
            json_column(context),
            volume,
        )

    def set_volume_head(self, volume: VolumeId, head: int) -> None:
        self._rows("UPDATE volume SET head=? WHERE id=?", head, volume)

    def set_volume_size(self, volume: VolumeId, size: int) -> None:
        self._rows("UPDATE volume SET size=? WHERE id=?", size, volume)

    def lineage_volumes(self, lineage: LineageId) -> list[Volume]:
        return self._volumes("WHERE volume.lineage=?", lineage)

    def remove_volume(self, volume: VolumeId) -> None:
        for table, column in (
            ("attachment", "volume"),
            ("modification", "volume"),
            ("clone", "volume"),
            ("client_token", "resource"),
            ("recycle_bin", "resource"),
            ("tag", "resource"),
            ("name", "resource"),
            ("verification", "resource"),
            ("volume", "id"),
        ):
            self._rows(f"DELETE FROM {table} WHERE {column}=?", volume)
        self._bury_kin(volume)

    def next_attach_generation(self, volume: VolumeId) -> int:
        """Return a generation no earlier attachment of the volume had."""
        row = self._row(
            "UPDATE volume SET attach_generation=attach_generation+1 WHERE id=? RETURNING attach_generation", volume
        )
        if row is None:
            raise VolumeNotFound(volume=volume)
        return int(row[0])

    def put_attachment(self, attachment: Attachment) -> None:
        self._rows(
            "INSERT OR REPLACE INTO attachment VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
            attachment.volume,
            attachment.state.value,
            attachment.boot_id,
            attachment.generation,
            attachment.exposed_as.value,
            int(attachment.read_only),
            attachment.path,
            attachment.loop_minor,
            attachment.grant,
            attachment.head,
            attachment.mount_point,
            attachment.time,
        )

    def remove_attachment(self, volume: VolumeId) -> None:
        self._rows("DELETE FROM attachment WHERE volume=?", volume)

    def used_loop_minors(self) -> set[int]:
        return {int(row[0]) for row in self._rows("SELECT loop_minor FROM attachment WHERE loop_minor IS NOT NULL")}


def _volume_from_row(row: tuple[Any, ...], tags: Mapping[str, str], verification: Verification | None) -> Volume:
    (
        ident,
        account,
        owner,
        name,
        size,
        state,
        reason,
        cipher,
        key_arn,
        wrapped_key,
        context,
        lineage,
        head,
        snapshot,
        attach_generation,
        integrity,
        authority,
        created,
        a_state,
        boot_id,
        generation,
        exposed_as,
        read_only,
        path,
        loop_minor,
        grant,
        active_head,
        mount_point,
        time,
        preallocated,
        source_volume,
    ) = row
    volume_id = VolumeId(ident)
    attachment = None
    if a_state is not None:
        attachment = Attachment(
            volume_id,
            AttachmentState(a_state),
            boot_id,
            generation,
            ExposedAs(exposed_as),
            bool(read_only),
            path,
            loop_minor,
            grant,
            active_head,
            mount_point,
            time,
        )
    return Volume(
        id=volume_id,
        account=AccountId(account),
        owner=owner,
        name=name,
        size=size,
        state=VolumeState(state),
        cipher=Cipher(cipher),
        key_arn=None if key_arn is None else KeyArn(key_arn),
        wrapped_key=None if wrapped_key is None else bytes(wrapped_key),
        context=json.loads(context),
        lineage=LineageId(lineage),
        head=head,
        snapshot=None if snapshot is None else SnapshotId(snapshot),
        attach_generation=attach_generation,
        integrity=Integrity(integrity),
        authority=authority,
        created=created,
        reason=reason,
        tags=dict(tags),
        attachment=attachment,
        verification=verification,
        preallocated=preallocated or 0,
        source_volume=None if source_volume is None else VolumeId(source_volume),
    )
