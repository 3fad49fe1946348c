"""Syncs left out and steps exchanged in a copy of the product: the crash that shows each, or why none can.

``hunt`` looks for a crash that shows a mutation, over all places of its operation; the table has what it found.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).resolve().parent.parent
PRODUCT: Final = TESTS.parent / "ebsd"


@dataclass(frozen=True)
class Mutation:
    """``old`` occurs once in ``file`` and becomes ``new``; a ``crash`` (kind, at, dice) of the operation shows it."""

    what: str
    file: str
    old: str
    new: str
    operation: str
    crash: tuple[str, int, int] | None = None
    unshown: str = ""
    """Why no crash of this world shows it."""


def _without(what: str, file: str, old: str, operation: str, *, keep: str = "", **more: str) -> Mutation:
    """``old`` begins with the call that is left out; what follows its first line stays as it is."""
    lines = old.split("\n")
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return Mutation(what, file, old, "\n".join([f"{indent}pass{keep}", *lines[1:]]), operation, FOUND.get(what), **more)


def _swapped(what: str, file: str, first: str, second: str, operation: str, **more: str) -> Mutation:
    return Mutation(what, file, f"{first}\n{second}", f"{second}\n{first}", operation, FOUND.get(what), **more)


FOUND: Final[dict[str, tuple[str, int, int]]] = {
    "blocks: data": ("power lose", 31, 1),
    "blocks: map": ("power lose", 70, 1),
    "flush: data": ("power lose", 2, 0),
    "flush: map": ("power lose", 2, 0),
    "flush: copies before data": ("power random", 1, 0),
    "drain: data": ("power lose", 26, 0),
    "salvage: data": ("power lose", 9, 0),
    "salvage: map": ("power lose", 10, 0),
    "new layer: segments": ("power lose", 23, 0),
    "new layer: names": ("power lose", 23, 0),
    "new lineage: name": ("power lose", 25, 0),
    "new map: file": ("power lose", 25, 0),
    "new map: name": ("power lose", 25, 0),
    "map of a restore: entries": ("power lose", 22, 0),
    "record: file": ("power lose", 18, 0),
    "record: name": ("power lose", 18, 0),
    "record: rename before its bytes are durable": ("kill", 13, 0),
    "attach: floor before record": ("power lose", 14, 0),
    "detach: floor before record": ("power lose", 20, 0),
    "snapshot: floor before record": ("power lose", 15, 0),
    "snapshot: record over the new table": ("power lose", 37, 0),
    "sealed map: file, attached": ("power lose", 41, 0),
    "seal: head of the live map": ("power lose", 41, 0),
    "sealed map: name": ("power lose", 23, 0),
    "sealed map before record": ("kill", 18, 0),
    "recovery: name of a finished map": ("kill", 20, 1),
    "recovery: segments of a head": ("kill", 7, 0),
    "recovery: names of a head": ("kill", 7, 0),
    "recovery: table entry": ("ebsd", 3, 3),
    "table entry": ("power lose", 24, 1),
    "growing: header of the map": ("power lose", 8, 1),
    "salvage: live map goes first": ("kill", 8, 3),
    "growing: length of the head": ("power lose", 7, 0),
    "growing: length of the map": ("power random", 5, 1),
    "growing: catalog first": ("power lose", 3, 0),
    "copy: data": ("power lose", 66, 0),
    "copy: sealed map": ("power lose", 67, 0),
    "copy: durable map": ("power lose", 54, 0),
    "leaf file": ("power lose", 68, 0),
    "sweep after a deletion: names of layers": ("power lose", 14, 1),
    "sweep: names of layers": ("power lose", 6, 1),
    "leaf file, hashed beside a device": ("power lose", 40, 0),
    "leaf file: name": ("power lose", 40, 0),
    "leaf table: slot before the leaf file has its name": ("power lose", 22, 0),
    "root of the leaves: floor before record": ("power lose", 38, 0),
    "deletion: record of a volume": ("power lose", 14, 0),
    "deletion: record of a snapshot": ("power lose", 15, 0),
    "deletion: map": ("power lose", 15, 0),
    "deletion: directory of a lineage": ("power lose", 13, 0),
}
"""What ``hunt`` printed."""

# fmt: off
MUTATIONS: Final = (
    _without("flush: data", "volume/engine.py",
             "                await self._scheduler.blocking(self._disk.fdatasync, fd)", "flush"),
    _without("flush: map", "volume/engine.py",
             "                await self._scheduler.blocking(self._durable.sync)", "flush"),
    Mutation("flush: copies before data", "volume/engine.py",
             '            await self._point("flush.frozen")\n',
             '            self._write_copies(copies)\n            await self._point("flush.frozen")\n', "flush",
             FOUND.get("flush: copies before data")),
    _without("drain: data", "volume/engine.py",
             "                await self._scheduler.blocking(self._disk.fdatasync, fd)", "drain"),
    Mutation("drain: flush at its end", "volume/draining.py",
             "            await engine.flush()\n\n    async def _count", "\n    async def _count", "drain",
             unshown="whoever sweeps has the volume flushed before it reads its map"),
    Mutation("drain: flush before the sweep", "control/lineages.py",
             "            if not await self._flush(around.attached):\n                return False\n            known",
             "            known", "drain",
             unshown="the drain flushes at its end, and what is written later does not go back to a layer it left"),
    _without("salvage: head once more", "store/salvage.py", "            disk.fdatasync(fd)", "detach after a death",
             unshown="sync_layer has synced the head just before, and nobody writes between the two; this one is for "
             "errors that only a descriptor opened before the write is told of"),
    Mutation("salvage: data", "store/salvage.py",
             "                sync_layer(disk, dirfd, layer, table.uuid_of(layer))",
             "                data_fds = ()", "detach after a death", FOUND.get("salvage: data")),
    _without("salvage: map", "store/salvage.py", "        durable.sync()\n        disk.unlink(path)",
             "detach after a death"),
    _swapped("salvage: live map goes first", "store/salvage.py", "        durable.sync()", "        disk.unlink(path)",
             "detach after a death"),
    _without("new layer: segments", "store/layers.py",
             "            disk.fsync(fd)\n    disk.fsync(dirfd)\n\n\ndef grow_layer", "snapshot detached"),
    _without("new layer: names", "store/layers.py", "    disk.fsync(dirfd)\n\n\ndef grow_layer", "snapshot detached"),
    _without("blocks: data", "volume/block_writer.py",
             "                    self._disk.fdatasync(target.segments[segment])", "blocks over a parent"),
    _without("blocks: map", "volume/block_writer.py", "            self._disk.fsync(map_fd)", "blocks over a parent"),
    _without("table entry", "store/layertable.py", "        disk.fdatasync(fd)\n    return LayerTable",
             "snapshot detached"),
    _without("recovery: table entry", "store/layertable.py", "    _sync(disk, path)\n    for layer in layers",
             "snapshot attached"),
    Mutation("table entry after the files", "control/snapshot_files.py",
             "            self._extend_table(layers)\n"
             "            dirfd = self._disk.open(self._state.lineage(newest.lineage), os.O_RDONLY | os.O_DIRECTORY)\n"
             "            try:\n"
             "                create_layer(self._disk, dirfd, newest.number, newest.uuid, size)\n",
             "            dirfd = self._disk.open(self._state.lineage(newest.lineage), os.O_RDONLY | os.O_DIRECTORY)\n"
             "            try:\n"
             "                create_layer(self._disk, dirfd, newest.number, newest.uuid, size)\n"
             "                self._extend_table(layers)\n",
             "restore", unshown="the row precedes both, and recovery and sweep complete the table by it"),
    _without("new lineage: name", "store/layout.py", "        fsync_directory(disk, self.layers)", "create"),
    _without("new map: file", "store/durablemap.py",
             "            disk.fsync(fd)\n            fsync_directory(disk, path.parent)", "create"),
    _without("new map: name", "store/durablemap.py", "            fsync_directory(disk, path.parent)", "create"),
    _without("map of a restore: entries", "store/durablemap.py",
             "            created.sync()\n    finally:\n        created.close()\n\n\ndef grow_durable_map", "restore"),
    _without("record: file", "store/atomic.py", "            disk.fsync(fd)", "attach"),
    _without("record: name", "store/atomic.py", "    fsync_directory(disk, path.parent)", "attach"),
    Mutation("record: rename before its bytes are durable", "store/atomic.py",
             "            disk.fsync(fd)\n        disk.rename(temporary, path)\n",
             "            disk.rename(temporary, path)\n            disk.fsync(fd)\n", "attach",
             FOUND.get("record: rename before its bytes are durable")),
    _swapped("attach: floor before record", "control/attachments.py",
             "            await trio.to_thread.run_sync("
             "self._files.write_signed_record, volume.id, verified.next_record)",
             "            signed = parse_signed(verified.next_record, file=volume.id)\n"
             "            await self._broker.raise_floor(volume.id, signed.generation)", "attach"),
    _swapped("detach: floor before record", "control/attachments.py",
             "                    await trio.to_thread.run_sync("
             "self._files.write_signed_record, volume.id, stopped.record)",
             "                    await self._raise_floor(volume.id, stopped.generation)", "detach"),
    _swapped("snapshot: floor before record", "control/snapshots.py",
             "        await trio.to_thread.run_sync(self._volume_files.write_signed_record, volume.id, record)",
             "        await self._broker.raise_floor(volume.id, generation)", "snapshot attached"),
    _without("snapshot: record over the new table", "control/snapshots.py",
             "        await trio.to_thread.run_sync(self._volume_files.write_signed_record, volume.id, record)\n"
             "        await self._broker.raise_floor(volume.id, generation)", "snapshot attached"),
    _without("sealed map: file, attached", "volume/process.py", "        self._disk.fsync(output)",
             "snapshot attached"),
    _without("sealed map: the layer that was the head", "volume/engine.py",
             '            await self.flush()\n            await self._point("seal.synced")', "snapshot attached",
             unshown="nobody writes between the two flushes of a seal here; a seed of tests/schedules shows it (R16)"),
    _without("seal: head of the live map", "volume/engine.py",
             "                self._live.head = new_head.number\n", "snapshot attached"),
    _without("sealed map: name", "control/snapshot_files.py",
             "            fsync_directory(self._disk, self._state.maps)\n\n    def _write_record", "snapshot detached"),
    _swapped("sealed map before record", "control/snapshot_files.py",
             "            self._write_record(snapshot, signed, authority)",
             "            self._disk.rename(self._new_map(snapshot.id), self._state.map(snapshot.id))",
             "snapshot detached"),
    _without("recovery: name of a finished map", "control/snapshot_files.py",
             "        fsync_directory(self._disk, self._state.maps)\n        return True", "snapshot detached"),
    _without("recovery: segments of a head", "control/snapshot_files.py",
             "                self._disk.fsync(fd)\n            self._disk.fsync(dirfd)", "snapshot detached"),
    _without("recovery: names of a head", "control/snapshot_files.py", "            self._disk.fsync(dirfd)",
             "snapshot detached"),
    Mutation("growing: length of the head", "store/layers.py",
             "                disk.ftruncate(fd, length)\n            disk.fsync(fd)\n        finally",
             "                disk.ftruncate(fd, length)\n        finally", "resize detached",
             FOUND.get("growing: length of the head")),
    _without("growing: names of further segments", "store/layers.py",
             "    disk.fsync(dirfd)\n\n\ndef _has_data", "resize detached",
             unshown="a volume gets another segment at 1 TiB, whose maps take too long here; the same sync after the "
             "creation of a layer's segments is shown"),
    _without("growing: length of the map", "store/durablemap.py",
             "        disk.fdatasync(fd)\n        pwrite_all", "resize over a map page"),
    Mutation("growing: header of the map", "store/durablemap.py",
             "replace(header, chunks=chunks)), 0)\n        disk.fdatasync(fd)",
             "replace(header, chunks=chunks)), 0)", "resize detached", FOUND.get("growing: header of the map")),
    Mutation("growing: catalog first", "control/growth.py",
             "        head = await trio.to_thread.run_sync("
             "self._files.grow, volume, layers[written], wanted, served)\n"
             "        try:\n"
             "\n"
             "            def commit(t: Transaction) -> None:\n"
             "                t.set_volume_size(volume.id, wanted)\n"
             "                self._step(t, volume.id, ModificationEvent.COMMITTED)\n"
             "\n"
             "            await self._catalogue.run(commit)\n",
             "        def commit(t: Transaction) -> None:\n"
             "            t.set_volume_size(volume.id, wanted)\n"
             "            self._step(t, volume.id, ModificationEvent.COMMITTED)\n"
             "\n"
             "        await self._catalogue.run(commit)\n"
             "        head = await trio.to_thread.run_sync("
             "self._files.grow, volume, layers[written], wanted, served)\n"
             "        try:\n", "resize detached", FOUND.get("growing: catalog first")),
    _without("copy: data", "volume/copier.py", "                self._disk.fdatasync(self._target_fds[segment])",
             "copy under another key"),
    _without("copy: sealed map", "volume/copier.py", "                self._disk.fsync(destination.map_fd)",
             "copy under another key"),
    _without("copy: durable map", "volume/copier.py", "    durable.sync()", "restore under another key"),
    _without("leaf file", "store/leaves.py", "        self._disk.fsync(self._fd)", "copy under another key"),
    _without("leaf file, hashed beside a device", "store/leaves.py", "        self._disk.fsync(self._fd)",
             "hash sealed layers"),
    _without("leaf file: name", "store/leaftable.py", "            disk.fsync(dirfd)", "hash sealed layers"),
    _without("leaf table: slot", "store/leaftable.py", "            disk.fdatasync(fd)\n            return slot",
             "hash sealed layers",
             unshown="whoever signs a root over a slot syncs the table first, as who set it may have been killed; that "
             "rule is shown by test_what_a_start_completes_after_a_kill_is_durable"),
    Mutation("leaf table: slot before the leaf file has its name", "store/leaftable.py",
             '            disk.rename(f"{directory}/{writer.temporary}", f"{directory}/{writer.name}")\n'
             "            disk.fsync(dirfd)\n"
             "            slot = LeafSlot(number, uuid, digest)\n"
             "            pwrite_all(disk, fd, encode_slot(slot), number * SLOT)\n"
             "            disk.fdatasync(fd)\n",
             "            slot = LeafSlot(number, uuid, digest)\n"
             "            pwrite_all(disk, fd, encode_slot(slot), number * SLOT)\n"
             "            disk.fdatasync(fd)\n"
             '            disk.rename(f"{directory}/{writer.temporary}", f"{directory}/{writer.name}")\n'
             "            disk.fsync(dirfd)\n", "hash sealed layers",
             FOUND.get("leaf table: slot before the leaf file has its name")),
    Mutation("root of the leaves: floor before record", "control/leaf_roots.py",
             "            if not await trio.to_thread.run_sync(self._files.sign_again, ident, generation, signed):\n"
             "                return False\n"
             "            await self._broker.raise_floor_soon(ident, generation)\n",
             "            await self._broker.raise_floor_soon(ident, generation)\n"
             "            if not await trio.to_thread.run_sync(self._files.sign_again, ident, generation, signed):\n"
             "                return False\n", "hash sealed layers",
             FOUND.get("root of the leaves: floor before record")),
    _without("sweep: maps that were read", "store/sweep.py",
             "        source.sync()\n\n\ndef give_back", "sweep",
             unshown="here every map was flushed, or salvaged, before a sweep reads it; with a pass under way "
             "meanwhile a seed of tests/schedules shows it (sweep, of all maps)"),
    _without("sweep: names of layers", "store/sweep.py", "        disk.fsync(dirfd)\n    return SweepReport",
             "sweep of a whole layer"),
    _without("sweep after a deletion: names of layers", "store/sweep.py",
             "            self._disk.fsync(self._dirfd)", "delete volume"),
    _without("deletion: record of a volume", "control/volume_files.py",
             "        fsync_directory(self._disk, self._state.records)", "delete volume"),
    _without("deletion: record of a snapshot", "control/snapshot_files.py",
             "        fsync_directory(self._disk, self._state.records)\n\n    # --- using", "delete snapshot"),
    _without("deletion: map", "control/lineage_files.py",
             "        fsync_directory(self._disk, self._state.maps)", "delete snapshot"),
    _without("deletion: directory of a lineage", "control/lineage_files.py",
             "        fsync_directory(self._disk, self._state.layers)", "delete all of a lineage"),
    _without("abandoned snapshot: names of maps", "control/snapshot_files.py",
             "        fsync_directory(self._disk, self._state.maps)\n        fsync_directory(self._disk, "
             "self._state.records)\n\n    def remove_record", "snapshot detached",
             unshown="the map of an abandoned one never had a durable name"),
    _without("sealed layer read-only", "store/layers.py",
             "            disk.fsync(fd)\n        finally:\n            disk.close(fd)\n\n\ndef sync_layer",
             "snapshot detached",
             unshown="its data was synced before the sealed map; the mode is for eyes, and the next check mends it"),
)
# fmt: on


def mutate(mutation: Mutation, product: Path) -> None:
    """Change one file of a copy of the product. Raises ValueError when the text is not there once."""
    path = product / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.what}: its text occurs {text.count(mutation.old)} times in {mutation.file}")
    path.write_text(text.replace(mutation.old, mutation.new))


def run_on(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this module on the product below ``root``."""
    code = (
        f"import sys; sys.path[:0] = {[str(root), str(TESTS)]!r}; from world.mutations import main; main(sys.argv[1:])"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=root, check=False, timeout=600
    )


def copy_product(root: Path) -> Path:
    return Path(shutil.copytree(PRODUCT, root / "ebsd", ignore=shutil.ignore_patterns("__pycache__")))


def main(arguments: list[str]) -> None:
    """``show operation kind at dice``: exit status 1 when it is noticed. ``hunt operation``: print one that is."""
    import logging

    from .crashes import KINDS, Crash, all_crashes, calls_of, explore
    from .stories import BY_NAME

    logging.disable(logging.CRITICAL)
    command, operation, *rest = arguments
    if command == "show":
        kind, at, dice = rest
        try:
            explore(BY_NAME[operation], Crash(kind, int(at), int(dice)))
        except BaseException as exc:  # noqa: BLE001 - a Died that comes out of a check is one, too
            print(f"{type(exc).__name__}: {exc}")
            sys.exit(1)
        return
    kinds = rest or ["power lose", "kill", "power random"]
    calls = calls_of(BY_NAME[operation])
    assert {*kinds} <= {*KINDS}
    for crash in sorted(all_crashes(calls, 4), key=lambda c: (kinds.index(c.kind) if c.kind in kinds else 99, -c.at)):
        if kinds and crash.kind not in kinds:
            continue
        try:
            explore(BY_NAME[operation], crash)
        except BaseException as exc:  # noqa: BLE001
            print(f"{tuple(crash)!r}\t{type(exc).__name__}: {exc}"[:200])
            return
    print("nothing")


__all__ = ["MUTATIONS", "Mutation", "copy_product", "mutate", "run_on"]
