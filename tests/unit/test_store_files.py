"""Files of the store on a real file system: layers, maps, atomic replacement and salvage."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from engine_rig import LINEAGE, VOLUME, Died, FakeDisk, Rig

from ebsd.domain.errors import MemoryForMapMissing, StoreDamaged, UnsupportedFormat, VolumeIdMalformed
from ebsd.domain.ids import LineageId, SnapshotId, VolumeId
from ebsd.domain.units import CHUNK, GIB, MIB, TIB
from ebsd.store.atomic import write_file_atomically
from ebsd.store.disk import RealDisk, pread_all, read_file
from ebsd.store.durablemap import EXTENT, FIRST_ENTRY, DurableMap, MapHeader, create_durable_map, grow_durable_map
from ebsd.store.entries import HOLE, PAGE_SHIFT, is_all_holes
from ebsd.store.layers import create_layer, open_layer, open_segment, parse_segment_name, seal_layer, segment_name
from ebsd.store.layout import LiveLayout, StateLayout
from ebsd.store.livemap import CLEAN, DIRTY, LiveIdentity, LiveMap, LiveMapInUse
from ebsd.store.salvage import SalvageOutcome

DISK = RealDisk()
UUID = bytes(range(16))
SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None


@pytest.fixture
def dirfd(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def rig():
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        rig = Rig(Path(directory), 20 * CHUNK)
        yield rig
        rig.close()


# --- layout and atomic files


def test_paths_stay_in_their_directories():
    layout = StateLayout(Path("/s"))
    assert layout.table(LINEAGE) == Path("/s/layers") / LINEAGE / "table"
    assert layout.map(VOLUME) == Path("/s/maps") / VOLUME
    assert layout.record(SnapshotId("snap-0123456789abcdef0")).name == "snap-0123456789abcdef0"
    assert LiveLayout(Path("/r")).live_map(VOLUME) == Path("/r") / VOLUME
    for wrong in ("../x", "vol-", "", "vol-0123456789abcdef0/.."):
        with pytest.raises(VolumeIdMalformed):
            layout.map(VolumeId(wrong))
    with pytest.raises(ValueError):
        layout.lineage(LineageId("../.."))


def test_a_state_directory_is_private_and_may_be_made_twice(tmp_path):
    layout = StateLayout(tmp_path / "state")
    for _ in range(2):
        layout.create(DISK)
        layout.create_lineage(DISK, LINEAGE)
    assert layout.root.stat().st_mode & 0o777 == 0o700
    assert layout.maps.stat().st_mode & 0o777 == 0o700


def test_replacing_a_file_syncs_before_and_after_the_rename(tmp_path):
    events = []

    class Log(RealDisk):
        def fsync(self, fd):
            events.append("fsync dir" if os.path.isdir(os.readlink(f"/proc/self/fd/{fd}")) else "fsync file")
            super().fsync(fd)

        def pwrite(self, fd, data, offset):
            events.append("write")
            return super().pwrite(fd, data, offset)

        def rename(self, source, target):
            events.append("rename")
            super().rename(source, target)

    write_file_atomically(Log(), tmp_path / "f", b"new")
    assert events == ["write", "fsync file", "rename", "fsync dir"]
    assert (tmp_path / "f").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["pwrite", "fsync"])
def test_a_replacement_that_fails_leaves_the_old_file_and_no_other(tmp_path, name):
    (tmp_path / "f").write_bytes(b"old")
    disk = FakeDisk()
    disk.fail[(name, 0)] = errno.ENOSPC
    with pytest.raises(OSError):
        write_file_atomically(disk, tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_temporary_file_of_a_crash_is_overwritten(tmp_path):
    (tmp_path / ".f.tmp").write_bytes(b"longer than what comes")
    write_file_atomically(DISK, tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"


def test_a_small_file_is_read_whole_or_refused(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert read_file(DISK, tmp_path / "f", 3) == b"abc"
    with pytest.raises(StoreDamaged):
        read_file(DISK, tmp_path / "f", 2)
    os.mkfifo(tmp_path / "p")
    with pytest.raises(StoreDamaged):
        read_file(DISK, tmp_path / "p", 2)
    os.symlink("f", tmp_path / "l")
    with pytest.raises(StoreDamaged):
        read_file(DISK, tmp_path / "l", 3)


# --- layers


def test_segment_names_carry_number_uuid_and_segment():
    assert segment_name(7, UUID, 2) == "0000000007-000102030405060708090a0b0c0d0e0f.002"
    assert parse_segment_name(segment_name(7, UUID, 2)) == (7, UUID, 2)
    for name in ("table", segment_name(7, UUID, 2) + "0", "0000000000-" + "00" * 16 + ".000", "1-00.0"):
        assert parse_segment_name(name) is None
    for number, segment in ((0, 0), (0xFFFFFF00, 0), (1, 64), (1, -1)):
        with pytest.raises(ValueError):
            segment_name(number, UUID, segment)


def test_a_layer_is_created_sparse_with_all_its_segments_and_opens(tmp_path, dirfd):
    size = TIB + 5 * MIB
    create_layer(DISK, dirfd, 1, UUID, size)
    create_layer(DISK, dirfd, 1, UUID, size)
    first, second = tmp_path / segment_name(1, UUID, 0), tmp_path / segment_name(1, UUID, 1)
    assert (first.stat().st_size, second.stat().st_size) == (TIB, 5 * MIB)
    assert first.stat().st_mode & 0o777 == 0o600
    assert first.stat().st_blocks * 512 < MIB
    fds = open_layer(DISK, dirfd, 1, UUID, size, writable=True)
    assert len(fds) == 2
    for fd in fds:
        assert not os.get_inheritable(fd)
        os.close(fd)


def test_a_layer_with_data_is_never_created_again(tmp_path, dirfd):
    create_layer(DISK, dirfd, 1, UUID, MIB)
    fd = open_segment(DISK, dirfd, 1, UUID, 0, writable=True)
    os.pwrite(fd, b"data", 0)
    os.close(fd)
    with pytest.raises(StoreDamaged):
        create_layer(DISK, dirfd, 1, UUID, MIB)


def test_segments_that_are_missing_short_ragged_or_no_files_are_damage(tmp_path, dirfd):
    path = tmp_path / segment_name(1, UUID, 0)
    with pytest.raises(StoreDamaged, match="missing"):
        open_segment(DISK, dirfd, 1, UUID, 0, writable=False)
    create_layer(DISK, dirfd, 1, UUID, MIB)
    with pytest.raises(StoreDamaged, match="are needed"):
        open_segment(DISK, dirfd, 1, UUID, 0, writable=False, least=MIB + CHUNK)
    os.truncate(path, MIB - 1)
    with pytest.raises(StoreDamaged, match="whole chunks"):
        open_segment(DISK, dirfd, 1, UUID, 0, writable=False)
    path.unlink()
    path.symlink_to("table")
    with pytest.raises(StoreDamaged, match="regular"):
        open_segment(DISK, dirfd, 1, UUID, 0, writable=False)
    path.unlink()
    for make in (os.mkdir, os.mkfifo):
        make(path)
        for writable in (False, True):
            with pytest.raises(StoreDamaged, match="regular"):
                open_segment(DISK, dirfd, 1, UUID, 0, writable=writable)
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_sealed_layer_cannot_be_written_through_its_descriptor(tmp_path, dirfd):
    create_layer(DISK, dirfd, 1, UUID, MIB)
    seal_layer(DISK, dirfd, 1, UUID, MIB)
    seal_layer(DISK, dirfd, 1, UUID, MIB)
    assert (tmp_path / segment_name(1, UUID, 0)).stat().st_mode & 0o777 == 0o440
    fd = open_segment(DISK, dirfd, 1, UUID, 0, writable=False)
    with pytest.raises(OSError):
        os.pwrite(fd, b"x", 0)
    os.close(fd)


# --- durable map

CHUNKS = 600_000  # 2.3 extents of entries
HEADER = MapHeader(LINEAGE, VOLUME, 1, CHUNKS)


def test_the_touched_extent_of_a_map_gets_real_blocks_and_the_others_stay_sparse(tmp_path):
    durable = DurableMap.create(DISK, tmp_path / "m", HEADER)
    durable.write_page(300, bytes([1]) * 4096)
    durable.write_out(EXTENT // 4, EXTENT // 4 + 1)
    durable.sync()
    assert EXTENT <= (tmp_path / "m").stat().st_blocks * 512 < 1.5 * EXTENT
    assert os.lseek(durable.fd, FIRST_ENTRY + EXTENT, os.SEEK_HOLE) >= FIRST_ENTRY + 2 * EXTENT
    entries = durable.entries()
    assert entries[300 * 1024] == 0x01010101
    assert not any(entries[: 300 * 1024])
    assert not any(entries[301 * 1024 :])
    durable.write_out(0, CHUNKS)
    assert durable.entries() == entries
    durable.close()
    durable.close()


def test_writing_out_costs_nothing_the_second_time(tmp_path):
    disk = FakeDisk()
    durable = DurableMap.create(disk, tmp_path / "m", HEADER)
    durable.write_out(0, 10)
    disk.reset()
    durable.write_out(5, 20)
    assert not disk.calls
    durable.close()


def test_a_map_page_outside_the_map_is_a_bug(tmp_path):
    durable = DurableMap.create(DISK, tmp_path / "m", HEADER)
    for page, data in ((-1, bytes(4096)), (586, bytes(4096)), (585, bytes(8192)), (0, bytes(4095))):
        with pytest.raises(ValueError):
            durable.write_page(page, data)
    durable.close()


def test_a_map_is_copied_with_its_entries_and_its_head_can_move(tmp_path):
    entries = memoryview(bytearray(586 * 4096)).cast("I")
    entries[0], entries[CHUNKS - 1] = 1, 1
    create_durable_map(DISK, tmp_path / "m", HEADER, entries)
    durable = DurableMap.open(DISK, tmp_path / "m")
    assert durable.entries() == entries
    durable.write_head(9)
    durable.close()
    again = DurableMap.open(DISK, tmp_path / "m", writable=False)
    assert again.header.head == 9
    again.close()


class RecordingDisk(RealDisk):
    """Notes the calls that change a file or make it durable."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def ftruncate(self, fd: int, length: int) -> None:
        self.calls.append("longer")
        super().ftruncate(fd, length)

    def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        self.calls.append("header" if offset == 0 else "entries")
        return super().pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        self.calls.append("durable")
        super().fdatasync(fd)


def test_a_map_that_grows_is_longer_on_the_disk_before_its_header_says_so(tmp_path: Path) -> None:
    """A power cut must not leave a header that promises more than the file has."""
    path = tmp_path / "map"
    DurableMap.create(DISK, path, MapHeader(LINEAGE, VOLUME, 1, MIB // CHUNK)).close()
    disk = RecordingDisk()
    grow_durable_map(disk, path, GIB)
    assert disk.calls == ["longer", "durable", "header", "durable"]


def test_a_map_grows_and_a_cut_while_it_grows_is_completed(tmp_path):
    path = tmp_path / "m"
    DurableMap.create(DISK, path, MapHeader(LINEAGE, VOLUME, 1, 16)).close()
    os.truncate(path, FIRST_ENTRY + 16 * 4096)  # cut between the length and the header
    grow_durable_map(DISK, path, GIB)
    grow_durable_map(DISK, path, GIB)
    grow_durable_map(DISK, path, MIB)  # a growth that was cut before the catalog, and then a smaller one
    durable = DurableMap.open(DISK, path)
    assert durable.header.chunks == GIB // CHUNK
    durable.close()


# --- live map


def identity(**changes: object) -> LiveIdentity:
    values = {"boot_id": bytes(16), "volume": VOLUME, "lineage": LINEAGE, "generation": 1}
    return LiveIdentity(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def durable(tmp_path):
    opened = DurableMap.create(DISK, tmp_path / "m", HEADER)
    yield opened
    opened.close()


def test_a_live_map_holds_the_durable_entries_and_survives_its_process(tmp_path, durable):
    durable.write_page(585, bytes([1]) * 3600 + bytes(496))
    live = LiveMap.create(DISK, tmp_path / "live", identity(), durable, head=4)
    assert live.entries[585 * 1024] == 0x01010101
    live.store(5, 4)
    live.init_values = bytes([7]) * 64
    live.close()
    live.close()
    live = LiveMap.open(DISK, tmp_path / "live", identity())
    assert (live.head, live.chunks, live.entries[5]) == (4, CHUNKS, 4)
    assert live.marked_pages() == [0]
    assert live.init_values == bytes([7]) * 64
    assert not live.failed
    live.mark_failed()
    live.close()
    live = LiveMap.open(DISK, tmp_path / "live", identity())
    assert live.failed
    live.close()


def test_pages_that_were_let_go_are_the_files_and_come_back() -> None:
    chunks = 4 * MIB  # 16 MiB of entries
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="ebsd-live-") as directory:
        durable = DurableMap.create(DISK, Path(directory) / "map", replace(HEADER, chunks=chunks))
        live = LiveMap.create(DISK, Path(directory) / "live", identity(), durable, head=4)
        live.store(chunks - 1, 4)
        assert not is_all_holes(live.raw_entries)
        seen = resident(Path(directory) / "live")
        assert seen >= 16 * MIB
        live.let_pages_go()
        assert resident(Path(directory) / "live") < seen // 8
        assert (live.entries[chunks - 1], live.entries[0], live.marked_pages()) == (
            4,
            HOLE,
            [(chunks - 1) >> PAGE_SHIFT],
        )
        live.close()
        durable.close()


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's page tables."""
    found = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef" and "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_every_other_identity_is_void(tmp_path, durable):
    LiveMap.create(DISK, tmp_path / "live", identity(), durable, head=4).close()
    for change in (
        {"boot_id": bytes(15) + b"1"},
        {"generation": 2},
        {"generation": 0},
        {"volume": VolumeId("vol-0123456789abcdef1")},
    ):
        assert LiveMap.open(DISK, tmp_path / "live", identity(**change)) is None
    assert LiveMap.open(DISK, tmp_path / "absent", identity()) is None
    for length in (0, 7, 8, 111):
        (tmp_path / "cut").write_bytes((tmp_path / "live").read_bytes()[:length])
        assert LiveMap.open(DISK, tmp_path / "cut", identity()) is None


def test_a_live_map_of_ours_with_a_wrong_structure_is_not_void_but_refused(tmp_path, durable):
    path = tmp_path / "live"
    LiveMap.create(DISK, path, identity(), durable, head=4).close()
    good = path.read_bytes()
    for at, raw, error in (
        (8, b"\x02", UnsupportedFormat),
        (12, b"\x01", UnsupportedFormat),
        (56, bytes(16), StoreDamaged),
        (80, bytes(4), StoreDamaged),
        (84, bytes(4), StoreDamaged),
        (84, b"\xff", StoreDamaged),
        (88, b"\x01\x00", StoreDamaged),
        (96, b"\x01", StoreDamaged),
        (104, b"\x01", StoreDamaged),
    ):
        path.write_bytes(good[:at] + raw + good[at + len(raw) :])
        with pytest.raises(error):
            LiveMap.open(DISK, path, identity())
    path.write_bytes(good + b"\0")
    with pytest.raises(StoreDamaged):
        LiveMap.open(DISK, path, identity())


def test_a_live_map_has_one_user(tmp_path, durable):
    live = LiveMap.create(DISK, tmp_path / "live", identity(), durable, head=4)
    with pytest.raises(LiveMapInUse):
        LiveMap.open(DISK, tmp_path / "live", identity())
    with pytest.raises(LiveMapInUse):
        LiveMap.create(DISK, tmp_path / "live", identity(generation=2), durable, head=4)
    live.close()
    LiveMap.create(DISK, tmp_path / "live", identity(generation=2), durable, head=4).close()
    assert LiveMap.open(DISK, tmp_path / "live", identity()) is None


def test_two_that_create_a_live_map_at_once_do_not_both_get_it(tmp_path, durable):
    """One opens, the other takes the file that is not locked yet for void and makes its own."""
    others = []

    class Slow(RealDisk):
        def flock(self, fd, operation):
            if not others:
                others.append(None)
                others[0] = LiveMap.create(DISK, tmp_path / "live", identity(), durable, head=4)
            super().flock(fd, operation)

    with pytest.raises(LiveMapInUse):
        LiveMap.create(Slow(), tmp_path / "live", identity(), durable, head=4)
    with pytest.raises(LiveMapInUse):  # the other's file is still there, and locked
        LiveMap.open(DISK, tmp_path / "live", identity())
    others[0].close()


def test_a_full_tmpfs_is_told_at_attach_and_leaves_nothing(tmp_path, durable):
    class Full(RealDisk):
        def fallocate(self, fd, offset, length):
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(MemoryForMapMissing) as caught:
        LiveMap.create(Full(), tmp_path / "live", identity(), durable, head=4)
    assert caught.value.facts["directory"] == tmp_path
    assert not (tmp_path / "live").exists()


def test_a_mark_is_set_before_its_entry(tmp_path, durable):
    live = LiveMap.create(DISK, tmp_path / "live", identity(), durable, head=4)
    order = []

    class Watched:
        def __init__(self, name, inner):
            self.name, self.inner = name, inner

        def __setitem__(self, at, value):
            order.append((self.name, at, value))
            self.inner[at] = value

    marks, entries = live.marks, live.entries
    live.marks, live.entries = Watched("mark", marks), Watched("entry", entries)
    live.store(2048, 4)
    assert order == [("mark", 2, DIRTY), ("entry", 2048, 4)]
    live.marks, live.entries = marks, entries
    assert live.marks[1] == CLEAN
    live.close()


def test_another_process_never_sees_a_half_stored_entry(tmp_path, durable):
    """A store that zeroed first was seen as a hole 692 424 times in 1.5 s."""
    live = LiveMap.create(DISK, tmp_path / "live", identity(), durable, head=4)
    live.store(7, 0x01020304)
    offset = len((tmp_path / "live").read_bytes()) - 586 * 4096 + 28
    script = (
        "import mmap, time\n"
        f"file = open({os.fspath(tmp_path / 'live')!r}, 'r+b')\n"
        f"m = memoryview(mmap.mmap(file.fileno(), 0))[{offset}:{offset + 4}].cast('I')\n"
        "print('ready', flush=True)\n"
        "end = time.monotonic() + 0.5\n"
        "while time.monotonic() < end:\n"
        "    for _ in range(1000):\n"
        "        assert m[0] in (0x01020304, 0x10203040), hex(m[0])\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        while child.poll() is None:
            for _ in range(1000):
                live.entries[7] = 0x10203040
                live.entries[7] = 0x01020304
        assert child.returncode == 0
    live.close()


# --- salvage


def test_salvage_without_a_live_map_does_nothing(rig):
    assert rig.salvage().outcome is SalvageOutcome.ABSENT


def test_salvage_brings_acknowledged_writes_into_the_durable_map_once(rig):
    rig.start()
    rig.write(3 * CHUNK, b"kept")
    rig.drop()
    rig.disk.reset()
    assert rig.salvage().outcome is SalvageOutcome.APPLIED
    order = [name for name, *_ in rig.disk.log if name != "pread"]
    assert order == ["fdatasync", "pwrite", "fdatasync", "unlink"]
    assert rig.durable_entries()[3] == rig.head
    assert rig.salvage().outcome is SalvageOutcome.ABSENT


def test_salvage_of_a_running_engine_is_refused(rig):
    rig.start()
    with pytest.raises(LiveMapInUse):
        rig.salvage()


def test_salvage_of_a_failed_engine_changes_nothing_and_says_so(rig):
    rig.start()
    rig.write(0, b"lost")
    rig.live.mark_failed()
    rig.drop()
    for _ in range(2):
        assert rig.salvage().outcome is SalvageOutcome.FAILED
    assert not any(rig.durable_entries())
    rig.start()  # the next generation
    assert rig.read(0, 4) == bytes(4)


@pytest.mark.parametrize("value", [4, 0xFFFFFF00])
def test_salvage_of_impossible_entries_changes_nothing(rig, value):
    rig.start()
    rig.write(0, b"x")
    rig.live.store(9, value)
    rig.drop()
    with pytest.raises(StoreDamaged):
        rig.salvage()
    assert rig.live_path.exists()
    assert not any(rig.durable_entries())


def test_salvage_can_be_cut_at_every_call_and_repeated(rig):
    for calls in range(6):
        rig.start()
        rig.write(calls * CHUNK, b"kept")
        rig.drop()
        rig.disk.reset()
        rig.disk.die_at = calls
        try:
            rig.salvage()
        except Died:
            rig.disk.reset()
            assert rig.salvage().outcome is SalvageOutcome.APPLIED
        rig.disk.reset()
        assert rig.durable_entries()[: calls + 1] == [rig.head] * (calls + 1)


def test_the_end_of_a_file_inside_a_read_is_damage(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    with pytest.raises(StoreDamaged, match="ends before byte 4"):
        pread_all(DISK, fd, 4, 0, "f")
    os.close(fd)
