"""What an engine deposits of its volume with the holder, and how a successor makes a volume of it again.

1. Nothing is created and nothing salvaged: live map, head and durable map are gone on with as the dead one left them.
2. What that engine had verified is verified again: that the key is the one it had (what was wiped reads as zeros, a key
   that ciphers take), that the layer table begins with what was signed, that the leaves are those that a record covers.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ebsd.crypto.kdf import key_check_value
from ebsd.crypto.secret import Secret
from ebsd.domain.geometry import segment_count
from ebsd.domain.ids import LineageId, VolumeId, parse_uuid
from ebsd.domain.model import Cipher
from ebsd.ipc.memfds import sealed_memfd
from ebsd.store.disk import Disk
from ebsd.store.durablemap import DurableMap
from ebsd.store.layertable import LayerTable, read_durable_table
from ebsd.store.leaftable import LeafSlot, read_slots
from ebsd.store.livemap import LiveIdentity, LiveMap
from ebsd.store.signedrecord import SignedBody
from ebsd.volume.engine import Head
from ebsd.volume.holding import Deposit, Holding, content_of
from ebsd.volume.verify import Claim, check_leaf_root, check_prefix, refuse

_NOT_KEPT: Final = ("Record", "Unsynced")
"""Of the configuration: a first engine has verified the one; to a successor nothing is synced."""

RESEND_SINCE: Final = 6, 9
"""Version of Linux that knows FUSE_NOTIFY_RESEND."""

Sealing = tuple[str, dict[str, Any]]
"""A snapshot and the answer that was given for it."""


@dataclass(slots=True)
class Restored:
    """A volume as the engine before this one had it. The descriptors and maps are the caller's."""

    params: dict[str, Any]
    claim: Claim
    key: Secret | None
    body: SignedBody
    table: LayerTable
    slots: Mapping[int, LeafSlot]
    durable: DurableMap
    live: LiveMap
    head: Head
    next_head: Head | None
    last_seal: Sealing | None
    control: int
    lineage: int
    fuse: int
    older_heads: list[int]
    """Deposited, and not written to any more; what they got is durable, or the witnesses would have told."""
    grown: bool
    """A growth was deposited; what it came to is to be deposited anew."""


def claim_of(params: Mapping[str, Any]) -> Claim:
    """Return what a configuration says of the volume."""
    return Claim(
        volume=str(params["VolumeId"]),
        owner=params["Owner"],
        lineage=params["Lineage"],
        size=params["Size"],
        head=params["Head"],
        cipher=Cipher(params["Cipher"]),
        key_arn=params["KeyArn"],
        sources=frozenset(params["Sources"]),
    )


def identity_of(params: Mapping[str, Any]) -> LiveIdentity:
    """Return whose live map it is."""
    return LiveIdentity(
        parse_uuid(params["BootId"]),
        VolumeId(params["VolumeId"]),
        LineageId(params["Lineage"]),
        params["AttachGeneration"],
    )


def is_possible(transport: str, kernel: str) -> bool:
    """Say whether another engine can go on with a connection: the kernel must send requests again (Linux 6.9)."""
    numbers = re.match(r"(\d+)\.(\d+)", kernel)
    return transport == "native" and numbers is not None and (int(numbers[1]), int(numbers[2])) >= RESEND_SINCE


# --- deposits


def keep_volume(holder: Holding, params: Mapping[str, Any], key: Secret | None, control: int, lineage: int) -> None:
    """Deposit the configuration, the key and what no engine changes."""
    kept = {name: value for name, value in params.items() if name not in _NOT_KEPT}
    check = None if key is None else key_check_value(key).hex()
    holder.keep("volume", {**kept, "KeyCheckValue": check}, [control, lineage])
    if key is not None:
        copy = key.shared_copy()
        try:
            holder.keep("key", {"Length": len(key)}, [copy])
        finally:
            os.close(copy)


def keep_leaves(holder: Holding, covering: SignedBody | None, layers: Collection[int]) -> None:
    """Deposit which layers' leaves a signed body covers; memory, because there may be many."""
    body = None if covering is None else base64.b64encode(covering.encode()).decode()
    memory = sealed_memfd(json.dumps({"Covering": body, "Layers": sorted(layers)}).encode())
    try:
        holder.keep("leaves", {}, [memory])
    finally:
        os.close(memory)


def keep_record(holder: Holding, body: SignedBody) -> None:
    """Deposit the body that was signed last, before anybody gets to see it: a successor signs what comes after it."""
    holder.keep("record", {"Body": base64.b64encode(body.encode()).decode()})


def keep_maps(holder: Holding, size: int, durable: DurableMap, live: LiveMap) -> None:
    """Deposit both maps."""
    holder.keep("maps", {"Size": size}, [durable.fd, live.descriptor()], watch=[0])


def keep_growth(holder: Holding, size: int, durable: DurableMap, live: LiveMap, segments: Sequence[int]) -> None:
    """Deposit what a volume consists of if the growth that follows takes place."""
    fds = [durable.fd, live.descriptor(), *segments]
    holder.keep("growth", {"Size": size}, fds, watch=[0, *range(2, len(fds))])


def keep_head(holder: Holding, head: Head) -> None:
    """Deposit a layer that may be written to from now on, as the newest of them."""
    holder.keep(_head_name(head.number), {"Number": head.number}, head.fds, watch=range(len(head.fds)))


def drop_head(holder: Holding, number: int) -> None:
    """Take back a layer that is sealed and durable."""
    holder.drop(_head_name(number))


def keep_next_head(holder: Holding, head: Head) -> None:
    """Deposit a layer that is not to be written to before ``keep_head``."""
    holder.keep("next", {"Number": head.number}, head.fds)


def keep_seal(holder: Holding, seal: Sealing) -> None:
    """Deposit what a seal is answered with."""
    holder.keep("sealed", {"SnapshotId": seal[0], "Answer": seal[1]})


def _head_name(number: int) -> str:
    return f"head-{number}"


# --- and back


def restore(disk: Disk, deposits: Mapping[str, Deposit]) -> Restored:
    """Make a volume of what was deposited. Raises IntegrityFailure, StoreDamaged, OSError, KeyError."""
    params = deposits["volume"].value
    control, lineage = deposits["volume"].fds
    claim = claim_of(params)
    key = None
    if "key" in deposits:
        key = Secret.of_descriptor(deposits["key"].fds[0], deposits["key"].value["Length"])
        os.close(deposits["key"].fds[0])
        if key_check_value(key).hex() != params["KeyCheckValue"]:
            raise refuse(claim, "the key that was kept for it is another one")
    body = _body(deposits["record"].value["Body"])
    maps, segments = _present(deposits)
    head = _newest_head(deposits, segments, segment_count(maps.value["Size"]))
    claim = replace(claim, size=maps.value["Size"], head=head.number)
    table = read_durable_table(disk, Path(f"/proc/self/fd/{lineage}/table"))
    check_prefix(claim, body, table, "record")
    live = LiveMap.inherited(disk, maps.fds[1], identity_of(params))
    # A growth that was cut has lengthened the durable map already: it is gone on with as far as the live one goes.
    durable = DurableMap.from_fd(disk, maps.fds[0], "map", chunks=live.chunks)
    upcoming, sealed = deposits.get("next"), deposits.get("sealed")
    heads = [d.value["Number"] for name, d in deposits.items() if name.startswith("head-")]
    if upcoming is not None and upcoming.value["Number"] <= head.number:
        for fd in upcoming.fds:
            os.close(fd)
        upcoming = None
    return Restored(
        params=params,
        claim=claim,
        key=key,
        body=body,
        table=table,
        slots=_slots(disk, claim, lineage, table, deposits["leaves"]),
        durable=durable,
        live=live,
        head=head,
        next_head=None if upcoming is None else Head(upcoming.value["Number"], upcoming.fds),
        last_seal=None if sealed is None else (sealed.value["SnapshotId"], sealed.value["Answer"]),
        control=control,
        lineage=lineage,
        fuse=deposits["fuse"].fds[0],
        older_heads=[number for number in heads if number != head.number],
        grown="growth" in deposits,
    )


def _body(encoded: str) -> SignedBody:
    return SignedBody.parse(base64.b64decode(encoded), file="record")


def _present(deposits: Mapping[str, Deposit]) -> tuple[Deposit, list[int]]:
    """Return the maps that are in use, and the segments of a growth; what is not in use is closed."""
    maps, growth = deposits["maps"], deposits.get("growth")
    if growth is None:
        return maps, []
    grown = os.fstat(maps.fds[1]).st_nlink == 0
    used, unused = (growth, maps) if grown else (maps, growth)
    for fd in unused.fds:
        if not (fd in growth.fds[2:] and grown):
            os.close(fd)
    return used, growth.fds[2:] if grown else []


def _newest_head(deposits: Mapping[str, Deposit], further: Sequence[int], count: int) -> Head:
    """Return the newest layer that may have been written to; files of older ones are closed."""
    heads = sorted((d for name, d in deposits.items() if name.startswith("head-")), key=lambda d: d.value["Number"])
    for deposit in heads[:-1]:
        for fd in deposit.fds:
            os.close(fd)
    fds = [*heads[-1].fds, *further]
    for fd in fds[count:]:  # those of a growth that the newest head knows already
        os.close(fd)
    return Head(heads[-1].value["Number"], fds[:count])


def _slots(disk: Disk, claim: Claim, lineage: int, table: LayerTable, deposit: Deposit) -> Mapping[int, LeafSlot]:
    (memory,) = deposit.fds
    kept = content_of(memory)
    os.close(memory)
    covering = None if kept["Covering"] is None else _body(kept["Covering"])
    layers = {int(layer): table.uuid_of(layer) for layer in kept["Layers"]}
    slots = read_slots(disk, lineage, LineageId(claim.lineage), layers)
    check_leaf_root(claim, covering, layers, slots)
    return slots
