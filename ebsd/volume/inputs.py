"""What comes with a request to a worker: claims, records, tables and maps, read and refused in one way."""

from __future__ import annotations

import base64
import binascii
import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ebsd.domain.errors import IntegrityFailure, StoreDamaged, UnsupportedFormat
from ebsd.domain.geometry import chunk_count
from ebsd.domain.ids import SnapshotId
from ebsd.domain.model import Cipher
from ebsd.store.disk import Disk, pread_all
from ebsd.store.layertable import LayerTable, read_layer_table
from ebsd.store.record import Record, parse_record
from ebsd.store.sealedmap import SealedMap, most_bytes, parse_sealed_map
from ebsd.volume.verify import Claim

_MAP_CHUNKS: Final = slice(64, 72)
"""Where a map's header has its chunk count."""


def claim_of(members: dict[str, Any], *, head: int) -> Claim:
    return Claim(
        volume=str(members["ResourceId"]),
        owner=members["Owner"],
        lineage=members["Lineage"],
        size=members["Size"],
        head=head,
        cipher=Cipher(members["Cipher"]),
        key_arn=members["KeyArn"],
    )


@contextlib.contextmanager
def found_in(claim: Claim) -> Iterator[None]:
    """What is damaged or unknown in the files of a resource is a failure of its verification."""
    try:
        yield
    except (StoreDamaged, UnsupportedFormat) as exc:
        raise IntegrityFailure(resource=claim.volume, reason=exc.message.removesuffix(".")) from exc
    except FileNotFoundError as exc:
        raise IntegrityFailure(resource=claim.volume, reason="its layer table is missing") from exc


def record_of(encoded: str) -> Record:
    try:
        raw = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise StoreDamaged(file="record", reason="it is not base64") from exc
    return parse_record(raw, file="record")


def table_of(disk: Disk, lineage_fd: int, count: int | None) -> LayerTable:
    return read_layer_table(disk, Path(f"/proc/self/fd/{lineage_fd}/table"), count=count)


def sealed_map_of(disk: Disk, fd: int, claim: Claim) -> SealedMap:
    """Read the sealed map behind a descriptor; no more than a map of this size can have."""
    chunks = chunk_count(claim.size)
    limit = most_bytes(chunks)
    status = disk.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        raise StoreDamaged(file="map", reason=f"it is no regular file of at most {limit} bytes")
    data = pread_all(disk, fd, status.st_size, 0, "map")
    # Before the parser gives memory to a count that anybody may have written there.
    if int.from_bytes(data[_MAP_CHUNKS], "little") > chunks:
        raise StoreDamaged(file="map", reason=f"it has more than {chunks} chunks")
    return parse_sealed_map(data, SnapshotId(claim.volume), file="map")
