"""Images in and out through the real ebsctl: files, devices, streams and other formats, bad ones, and kills."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from installation import BIN, Installation, installation, run

pytestmark = pytest.mark.timeout(240)

KIB, MIB, CHUNK = 1024, 1024**2, 65536


@pytest.fixture(scope="module")
def ebsd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installation(tmp_path_factory.mktemp("transfers")) as made:
        yield made


def sparse_image(path: Path, size: int, seed: int) -> set[int]:
    """Make a file with data in some places and holes elsewhere; return the chunks that hold data."""
    dice, stored = random.Random(seed), set()
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(12):
            at = dice.randrange(size) // 4096 * 4096
            piece = dice.randbytes(min(dice.choice((4096, 3 * CHUNK, 2 * MIB + 4096)), size - at))
            file.seek(at)
            file.write(piece)
        os.fsync(file.fileno())
    with path.open("rb") as file:
        at = 0
        while True:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return stored
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            stored |= set(range(start // CHUNK, -(-at // CHUNK)))


def stored_chunks(ebsd: Installation, volume: str) -> int:
    """Return how many chunks the layers of a volume take on the disk."""
    document = ebsd.ctl_json("show", volume)
    lineage = ebsd.state / "layers" / document["DataEncryptionKeyId"]
    return sum(path.stat().st_blocks * 512 // CHUNK for path in lineage.iterdir() if re.search(r"\.\d{3}$", path.name))


def content(ebsd: Installation, volume: str) -> bytes:
    device = ebsd.ok("attach", volume, "--file", "--read-only")
    try:
        return Path(device).read_bytes()
    finally:
        ebsd.ok("detach", volume)


def same(first: Path, second: Path) -> bool:
    return subprocess.run(["cmp", "-s", first, second], timeout=60).returncode == 0


def worker_of(ebsd: Installation, module: str) -> int:
    """Return the pid of the only worker that logs into this installation's log."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = os.readlink(process / "fd" / "2") == str(ebsd.log)
            if ours and module.encode() in (process / "cmdline").read_bytes():
                return int(process.name)
    raise AssertionError("there is no worker")


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def job_of(ebsd: Installation, kind: str) -> dict[str, Any]:
    jobs = [job for job in ebsd.ctl_json("job", "list")["Jobs"] if job["Kind"] == kind]
    return max(jobs, key=lambda job: (job["StartTime"], job["State"] == "running"))


def _hangs(pid: int) -> bool:
    """Say whether a thread of a process waits for a FUSE file system."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            if "fuse" in (task / "wchan").read_text() or "request_wait" in (task / "stack").read_text():
                return True
    return False


# --- round trips


@pytest.mark.parametrize("seed", range(3))
def test_a_sparse_file_comes_in_and_out_byte_for_byte_and_hole_for_hole(
    ebsd: Installation, tmp_path: Path, seed: int
) -> None:
    size = (24 * MIB, 24 * MIB + 4096, 20 * MIB + 5 * 4096)[seed]
    image, out = tmp_path / "image", tmp_path / "out"
    stored = sparse_image(image, size, seed)
    ident = ebsd.ok("import", image, f"sparse{seed}", "--encrypted")
    document = ebsd.ctl_json("show", ident)
    assert document["State"] == "available"
    assert document["Encrypted"]
    assert document["SizeBytes"] == size
    assert stored_chunks(ebsd, ident) == len(stored)
    assert content(ebsd, ident) == image.read_bytes()
    assert ebsd.ok("export", ident, out) == str(out)
    assert same(image, out)
    assert out.stat().st_blocks * 512 // CHUNK <= len(stored)
    assert out.stat().st_mode & 0o777 == 0o600
    assert [each for each in ebsd.ctl_json("list", "snapshots")["Snapshots"] if "export" in each["Description"]] == []
    ebsd.ok("delete", "--yes", ident)


def test_what_ebsd_stores_of_an_import_is_not_plaintext(ebsd: Installation, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"THIS IS THE PLAINTEXT OF AN IMAGE" * 4096)
    ident = ebsd.ok("import", image, "secret", "--encrypted")
    assert subprocess.run(["grep", "-rq", "THIS IS THE PLAINTEXT", ebsd.state], timeout=60).returncode == 1
    ebsd.ok("delete", "--yes", ident)


@pytest.mark.parametrize(("options", "chunks"), [((), 64), (("--detect-zeros",), 2)])
def test_written_zeros_are_data_unless_it_is_said_otherwise(
    ebsd: Installation, tmp_path: Path, options: tuple[str, ...], chunks: int
) -> None:
    image = tmp_path / "image"
    data = bytearray(4 * MIB)
    data[0] = 1
    data[-1] = 2
    image.write_bytes(data)
    ident = ebsd.ok("import", image, "zeros", "--encrypted", *options)
    assert stored_chunks(ebsd, ident) == chunks
    assert content(ebsd, ident) == data
    ebsd.ok("delete", "--yes", ident)


def test_an_odd_size_is_rounded_up_and_told(ebsd: Installation, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(random.Random(1).randbytes(3 * MIB + 5))
    outcome = ebsd.ctl("import", image, "odd", "--encrypted")
    assert outcome.status == 0, outcome.stderr
    assert f"note: The volume has {3 * MIB + 4096} bytes" in outcome.stderr
    assert content(ebsd, "odd") == image.read_bytes() + bytes(4091)
    ebsd.ok("delete", "--yes", "odd")


def test_a_volume_may_be_larger_than_its_image(ebsd: Installation, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(random.Random(2).randbytes(MIB + 7))
    ebsd.ok("import", image, "larger", "--encrypted", "--size", "10M")
    assert content(ebsd, "larger") == image.read_bytes().ljust(10 * MIB, b"\0")
    ebsd.ok("delete", "--yes", "larger")


def test_streams_in_and_out(ebsd: Installation, tmp_path: Path) -> None:
    data = random.Random(3).randbytes(5 * MIB + 4096) + bytes(2 * MIB) + b"end".ljust(4096)
    outcome = ebsd.ctl("import", "-", "stream", "--encrypted", "--size", str(len(data)), stdin=data)
    assert outcome.status == 0, outcome.stderr
    assert content(ebsd, "stream") == data
    exported = subprocess.run(
        [BIN / "ebsctl", "--socket", ebsd.socket, "export", "stream", "-"], capture_output=True, timeout=60, check=True
    )
    assert exported.stdout == data
    out = tmp_path / "redirected"
    with out.open("wb") as file:
        subprocess.run([BIN / "ebsctl", "--socket", ebsd.socket, "export", "stream", "-"], stdout=file, check=True)
    assert out.read_bytes() == data
    ebsd.ok("delete", "--yes", "stream")


def test_a_file_system_survives(ebsd: Installation, tmp_path: Path) -> None:
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    run("mkfs.ext4", "-q", "-F", "-b", "4096", "-d", str(Path(__file__).parent), str(image))
    ebsd.ok("import", image, "files", "--encrypted")
    ebsd.ok("attach", "files", "--mount", mounted)
    run("diff", "-r", "--exclude=lost+found", str(Path(__file__).parent), str(mounted))
    (mounted / "new").write_bytes(b"written after the import")
    os.sync()
    out = tmp_path / "out"
    ebsd.ok("export", "files", out)  # attached: of a snapshot, which goes away
    assert ebsd.ctl_json("list", "snapshots")["Snapshots"] == []
    # As after a crash: the journal is replayed, which e2fsck tells by status 1.
    assert subprocess.run(["e2fsck", "-fp", out], capture_output=True, timeout=60).returncode in (0, 1)
    run("e2fsck", "-fn", str(out))
    found = run("debugfs", "-R", "cat new", str(out)).stdout
    assert found == "written after the import"
    ebsd.ok("detach", "files")
    ebsd.ok("delete", "--yes", "files")


def test_a_snapshot_is_exported_as_it_was(ebsd: Installation, tmp_path: Path) -> None:
    image, out = tmp_path / "image", tmp_path / "out"
    sparse_image(image, 8 * MIB, 5)
    ebsd.ok("import", image, "moment", "--encrypted")
    ebsd.ok("snapshot", "moment", "--name", "kept")
    device = ebsd.ok("attach", "moment", "--file")
    with Path(device).open("r+b") as file:
        file.write(b"later" * 4096)
    ebsd.ok("export", "kept", out)
    assert same(image, out)
    ebsd.ok("detach", "moment")
    ebsd.ok("delete", "--yes", "kept")
    ebsd.ok("delete", "--yes", "moment")


def test_block_devices_in_and_out(ebsd: Installation, tmp_path: Path) -> None:
    image, backing = tmp_path / "image", tmp_path / "backing"
    sparse_image(image, 16 * MIB, 6)
    shutil.copy(image, backing)
    device = run("losetup", "--show", "-f", str(backing)).stdout.strip()
    try:
        ebsd.ok("import", device, "device", "--encrypted", "--detect-zeros")
        assert content(ebsd, "device") == image.read_bytes()
        status, error = ebsd.refused("export", "device", device)
        assert (status, error["Code"]) == (4, "Ebsd.OutputExists")
        subprocess.run(["dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=16", "status=none"], check=True)
        ebsd.ok("export", "device", device, "--force")
        assert Path(device).read_bytes() == image.read_bytes()
        small = tmp_path / "small"
        small.write_bytes(bytes(MIB))
        run("losetup", "-d", device)
        device = run("losetup", "--show", "-f", str(small)).stdout.strip()
        status, error = ebsd.refused("export", "device", device, "--force")
        assert (status, error["Code"]) == (1, "Ebsd.ImageUnusable"), error
    finally:
        run("losetup", "-d", device)
    ebsd.ok("delete", "--yes", "device")


@pytest.mark.parametrize("form", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_other_formats_in_and_out(ebsd: Installation, tmp_path: Path, form: str) -> None:
    raw, image, out, back = (tmp_path / name for name in ("raw", f"image.{form}", f"out.{form}", "back"))
    stored = sparse_image(raw, 24 * MIB, 7)
    run("qemu-img", "convert", "-O", form, str(raw), str(image))
    outcome = ebsd.ctl("import", image, "foreign", "--encrypted")
    assert outcome.status == 0, outcome.stderr
    assert f"is taken for a {form} image" in outcome.stderr
    assert content(ebsd, "foreign")[: 24 * MIB] == raw.read_bytes()
    if form in ("qcow2", "vmdk"):  # blocks of 64 KiB; those of the others are larger than a chunk
        assert stored_chunks(ebsd, "foreign") <= len(stored) + 24
    ebsd.ok("export", "foreign", out, "--format", form)
    assert json.loads(run("qemu-img", "info", "--output=json", str(out)).stdout)["format"] == form
    run("qemu-img", "convert", "-f", form, "-O", "raw", str(out), str(back))
    assert back.read_bytes()[: 24 * MIB] == raw.read_bytes()
    if form in ("qcow2", "vmdk"):
        assert out.stat().st_size < (len(stored) + 48) * CHUNK, "holes were written"
    ebsd.ok("delete", "--yes", "foreign")


def servers() -> list[str]:
    """Return the command lines of the NBD servers that ebsctl has started on this host."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if "--socket /tmp/ebsctl-nbd-" in line and "qemu-nbd" in line]


def test_no_server_stays_whatever_becomes_of_an_image(ebsd: Installation, tmp_path: Path) -> None:
    before = servers()
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(image), "4M")
    ebsd.ok("import", image, "once", "--encrypted")
    assert ebsd.refused("import", image, "once", "--encrypted")[1]["Code"] == "Ebsd.NameInUse"
    assert ebsd.refused("import", image, "twice", "--encrypted", "--key", "none")[0] != 0
    assert ebsd.refused("export", "none", tmp_path / "out", "--format", "qcow2")[0] == 3
    ebsd.ok("export", "once", tmp_path / "out", "--format", "qcow2")
    ebsd.ok("delete", "--yes", "once")
    wait_for(lambda: not set(servers()) - set(before))


# --- what is refused


def _directory(tmp_path: Path) -> list[str]:
    return [str(tmp_path)]


def _missing(tmp_path: Path) -> list[str]:
    return [str(tmp_path / "none")]


def _empty(tmp_path: Path) -> list[str]:
    (tmp_path / "empty").touch()
    return [str(tmp_path / "empty")]


def _character_device(_: Path) -> list[str]:
    return ["/dev/zero", "--size", "1M"]


def _smaller(tmp_path: Path) -> list[str]:
    (tmp_path / "image").write_bytes(bytes(2 * MIB))
    return [str(tmp_path / "image"), "--size", "1M"]


def _backing_file(tmp_path: Path) -> list[str]:
    image = str(tmp_path / "image.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", image, "1M")
    return [image]


def _data_file(tmp_path: Path) -> list[str]:
    image = str(tmp_path / "image.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", image, "1M")
    return [image]


def _flat_extent(tmp_path: Path) -> list[str]:
    image = str(tmp_path / "image.vmdk")
    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", image, "1M")
    text = Path(image).read_bytes().replace(b'"image-flat.vmdk"', f'"{tmp_path}/image-flat.vmdk"'.encode())
    Path(image).write_bytes(text)
    return [image]


def _not_qcow2(tmp_path: Path) -> list[str]:
    (tmp_path / "image").write_bytes(os.urandom(MIB))
    return [str(tmp_path / "image"), "--format", "qcow2"]


def _broken_qcow2(tmp_path: Path) -> list[str]:
    (tmp_path / "image").write_bytes(b"QFI\xfb" + os.urandom(MIB))
    return [str(tmp_path / "image")]


@pytest.mark.parametrize(
    ("make", "status", "code", "says"),
    [
        (_directory, 1, "Ebsd.ImageUnusable", "directory"),
        (_missing, 1, "Ebsd.ImageUnusable", "No such file"),
        (_empty, 1, "Ebsd.ImageUnusable", "empty"),
        (_character_device, 1, "Ebsd.ImageUnusable", "character device"),
        (_smaller, 2, "InvalidParameterValue", "smaller than the image"),
        (_backing_file, 1, "Ebsd.ImageUnusable", "backing file /etc/shadow"),
        (_data_file, 1, "Ebsd.ImageUnusable", "its data are in the file"),
        (_flat_extent, 1, "Ebsd.ImageUnusable", "a part of it is in the file"),
        (_not_qcow2, 1, "Ebsd.ImageUnusable", "does not know it as qcow2"),
        (_broken_qcow2, 1, "Ebsd.ImageUnusable", "does not know it as qcow2"),
    ],
)
def test_what_is_no_image_is_refused_before_anything_is_made(
    ebsd: Installation, tmp_path: Path, make: Callable[[Path], list[str]], status: int, code: str, says: str
) -> None:
    image, *options = make(tmp_path)
    found, error = ebsd.refused("import", image, "bad", "--encrypted", *options)
    assert (found, error["Code"]) == (status, code), error
    assert says in error["Message"], error
    assert ebsd.ctl("show", "bad").status == 3


@pytest.mark.parametrize(("given", "says"), [(MIB - 1, "ended after"), (MIB + 1, "more than"), (0, "ended after 0")])
def test_a_stream_of_another_length_leaves_nothing(ebsd: Installation, given: int, says: str) -> None:
    outcome = ebsd.ctl("--json", "import", "-", "short", "--encrypted", "--size", "1M", stdin=bytes(given))
    assert outcome.status == 1
    assert outcome.error["Code"] == "Ebsd.ImageUnusable"
    assert says in outcome.error["Message"], outcome.error
    assert ebsd.ctl("show", "short").status == 3


def test_a_stream_needs_its_size_and_a_terminal_is_none(ebsd: Installation) -> None:
    outcome = ebsd.ctl("import", "-", "short", stdin=b"x")
    assert outcome.status == 2
    assert "--size" in outcome.stderr
    primary, secondary = os.openpty()
    try:
        ebsctl = [BIN / "ebsctl", "--socket", ebsd.socket]
        done = subprocess.run([*ebsctl, "import", "-", "x", "--size", "1M"], stdin=secondary, capture_output=True)
        assert (done.returncode, b"is a terminal" in done.stderr) == (2, True)
        ebsd.ok("create", "shown", "--size", "1M", "--encrypted")
        done = subprocess.run([*ebsctl, "export", "shown", "-"], stdout=secondary, stderr=subprocess.PIPE)
        assert (done.returncode, b"is a terminal" in done.stderr) == (2, True)
    finally:
        os.close(primary)
        os.close(secondary)
    ebsd.ok("delete", "--yes", "shown")


@pytest.mark.parametrize("change", ["shrinks", "grows", "is written to"])
def test_an_image_that_changes_meanwhile_leaves_nothing(ebsd: Installation, tmp_path: Path, change: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(random.Random(8).randbytes(48 * MIB))
    made = json.loads(ebsd.ok("--json", "import", image, "moving", "--encrypted", "--no-wait", "--rate", "16M"))
    with image.open("r+b") as file:
        if change == "shrinks":
            file.truncate(40 * MIB)
        else:
            file.seek(0, os.SEEK_END if change == "grows" else os.SEEK_SET)
            file.write(b"changed")
    job = job_of(ebsd, "import-volume")
    outcome = ebsd.ctl("--json", "job", "wait", job["JobId"])
    assert outcome.status == 4
    assert outcome.error["Code"] == "Ebsd.ImageChanged", outcome.error
    assert ebsd.ctl("show", made["VolumeId"]).status == 3


def test_a_source_that_never_answers_can_be_cancelled(ebsd: Installation) -> None:
    reader, writer = os.pipe()
    ebsctl = [BIN / "ebsctl", "--socket", ebsd.socket, "import", "-", "silent", "--encrypted", "--size", "4M"]
    with subprocess.Popen(ebsctl, stdin=reader, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as command:
        os.close(reader)
        wait_for(lambda: ebsd.ctl("show", "silent").status == 0)
        os.write(writer, bytes(5000))
        job = job_of(ebsd, "import-volume")
        assert job["State"] == "running"
        status, error = ebsd.refused("attach", "silent")
        assert (status, error["Code"]) == (4, "IncorrectState"), error
        ebsd.ok("job", "cancel", job["JobId"])
        assert command.wait(30) == 1
        os.close(writer)
    assert ebsd.ctl("show", "silent").status == 3


def test_a_file_system_that_hangs_stops_nobody_else(ebsd: Installation, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(random.Random(13).randbytes(24 * MIB))
    ebsd.ok("import", image, "server", "--encrypted")
    served = ebsd.ok("attach", "server", "--file")  # a file of a FUSE file system
    (server,) = ebsd.processes()["volumes"]
    ebsd.ok("import", served, "hanging", "--encrypted", "--no-wait", "--rate", "1M")
    job = job_of(ebsd, "import-volume")["JobId"]
    try:
        os.kill(server, signal.SIGSTOP)
        worker = worker_of(ebsd, "ebsd.volume.importer")
        wait_for(lambda: _hangs(worker))
        began = time.monotonic()
        ebsd.ok("job", "cancel", job)
        assert time.monotonic() - began < 20
        assert ebsd.ctl("show", "hanging").status == 3
        ebsd.ok("create", "other", "--size", "1M", "--encrypted")
    finally:
        os.kill(server, signal.SIGCONT)
    ebsd.ok("detach", "server")
    for name in ("server", "other"):
        ebsd.ok("delete", "--yes", name)


def test_ctrl_c_removes_what_a_stream_had_begun(ebsd: Installation) -> None:
    reader, writer = os.pipe()
    ebsctl = [BIN / "ebsctl", "--socket", ebsd.socket, "import", "-", "stopped", "--encrypted", "--size", "4M"]
    with subprocess.Popen(ebsctl, stdin=reader, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as command:
        os.close(reader)
        wait_for(lambda: ebsd.ctl("show", "stopped").status == 0)
        time.sleep(0.3)
        command.send_signal(signal.SIGINT)
        assert command.wait(30) == 130, command.stderr
    os.close(writer)
    assert ebsd.ctl("show", "stopped").status == 3


# --- targets


def test_nothing_is_overwritten_without_force(ebsd: Installation, tmp_path: Path) -> None:
    image, out = tmp_path / "image", tmp_path / "out"
    sparse_image(image, 2 * MIB, 9)
    ebsd.ok("import", image, "forced", "--encrypted")
    out.write_bytes(b"precious")
    status, error = ebsd.refused("export", "forced", out)
    assert (status, error["Code"]) == (4, "Ebsd.OutputExists")
    assert out.read_bytes() == b"precious"
    ebsd.ok("export", "forced", out, "--force", "--no-sparse")
    assert same(image, out)
    assert out.stat().st_blocks * 512 >= 2 * MIB
    ebsd.ok("delete", "--yes", "forced")


def test_a_full_file_system_is_told_and_nothing_stays(ebsd: Installation, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1M", "none", str(place))
    try:
        image = tmp_path / "image"
        image.write_bytes(os.urandom(4 * MIB))
        ebsd.ok("import", image, "toobig", "--encrypted")
        status, error = ebsd.refused("export", "toobig", place / "out")
        assert (status, error["Code"]) == (10, "Ebsd.NoSpace"), error
        assert list(place.iterdir()) == []
    finally:
        run("umount", str(place))
    assert ebsd.ctl_json("list", "snapshots")["Snapshots"] == []
    ebsd.ok("delete", "--yes", "toobig")


def test_a_reader_that_goes_away_is_told(ebsd: Installation, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(4 * MIB))
    ebsd.ok("import", image, "unread", "--encrypted")
    ebsctl = [BIN / "ebsctl", "--socket", ebsd.socket, "--json", "export", "unread", "-"]
    ebsctl.remove("--json")
    with subprocess.Popen(ebsctl, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.read(100)
        command.stdout.close()
        assert command.wait(30) == 1
        assert b"[Ebsd.OutputClosed]" in command.stderr.read()
    assert ebsd.ctl_json("list", "snapshots")["Snapshots"] == []
    ebsd.ok("delete", "--yes", "unread")


def test_damage_ends_an_export_unless_it_is_allowed(ebsd: Installation, tmp_path: Path) -> None:
    image, out = tmp_path / "image", tmp_path / "out"
    image.write_bytes(random.Random(10).randbytes(4 * MIB))
    ebsd.ok("import", image, "hurt", "--encrypted")
    ebsd.ok("snapshot", "hurt", "--name", "wound")
    assert ebsd.ctl("verify", "wound").status == 0  # hashes the layer
    lineage = ebsd.state / "layers" / ebsd.ctl_json("show", "hurt")["DataEncryptionKeyId"]
    (layer,) = [path for path in lineage.glob("*.000") if path.stat().st_blocks]
    with layer.open("r+b") as file:
        file.seek(5 * CHUNK + 1000)
        file.write(b"damage")
    status, error = ebsd.refused("export", "wound", out)
    assert (status, error["Code"]) == (7, "Ebsd.StoreDamaged"), error
    assert "chunk 5 " in error["Message"]
    assert not out.exists()
    outcome = ebsd.ctl("export", "wound", out, "--allow-damaged")
    assert outcome.status == 0, outcome.stderr
    assert "1 chunks of 64 KiB are damaged: 5" in outcome.stderr
    exported, data = out.read_bytes(), image.read_bytes()
    assert exported[: 5 * CHUNK] == data[: 5 * CHUNK]
    assert exported[6 * CHUNK :] == data[6 * CHUNK :]
    assert exported != data
    ebsd.ok("delete", "--yes", "wound")
    ebsd.ok("delete", "--yes", "hurt")


# --- kills


def _begun(ebsd: Installation, image: Path, name: str) -> dict[str, Any]:
    """Start an import and return its job when the first part of it is durable."""
    ebsd.ok("import", image, name, "--encrypted", "--no-wait", "--rate", "20M")
    ident = job_of(ebsd, "import-volume")["JobId"]
    wait_for(lambda: ebsd.ctl_json("job", "show", ident)["Done"] >= 60 * MIB)
    return ebsd.ctl_json("job", "show", ident)


def test_an_import_goes_on_after_kills(tmp_path: Path) -> None:
    image, other = tmp_path / "image", tmp_path / "other"
    data = random.Random(11).randbytes(MIB)
    with image.open("wb") as file:
        for number in range(128):
            file.write(number.to_bytes(8, "little") + data[8:])
    shutil.copy(image, other)
    with installation(tmp_path) as ebsd:
        job = _begun(ebsd, image, "data")
        os.kill(worker_of(ebsd, "ebsd.volume.importer"), signal.SIGKILL)
        wait_for(lambda: f"{job['JobId']} goes on from chunk" in ebsd.log.read_text())
        ebsd.kill()
        ebsd.start()
        job = ebsd.ctl_json("job", "show", job["JobId"])
        assert job["State"] == "interrupted", job
        assert job["Done"] > 0
        assert ebsd.ctl_json("show", "data")["State"] == "creating"
        assert ebsd.refused("attach", "data")[0] == 4
        status, error = ebsd.refused("import", other, "data", "--resume", job["JobId"])
        assert (status, error["Code"]) == (4, "Ebsd.ImageChanged"), error
        assert ebsd.ctl_json("job", "show", job["JobId"])["State"] == "interrupted"
        ebsd.ok("import", image, "data", "--resume", job["JobId"])
        assert content(ebsd, "data") == image.read_bytes()
        chunks = [line.rpartition(" ")[2] for line in ebsd.log.read_text().splitlines() if "goes on from chunk" in line]
        assert int(chunks[-1]) > 0, chunks
        # and an export that ebsd's end cut leaves neither snapshot nor file
        ebsctl = [BIN / "ebsctl", "--socket", ebsd.socket, "export", "data", tmp_path / "out", "--rate", "10M"]
        with subprocess.Popen(ebsctl, stderr=subprocess.PIPE) as command:
            wait_for(lambda: ebsd.ctl_json("list", "snapshots")["Snapshots"])
            time.sleep(0.5)
            ebsd.kill()
            assert command.wait(30) == 9
        assert not (tmp_path / "out").exists()
        ebsd.start()
        assert ebsd.ctl_json("list", "snapshots")["Snapshots"] == []
        assert job_of(ebsd, "export-image")["State"] == "failed"
        assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []


def test_an_import_of_another_format_goes_on_with_another_server(tmp_path: Path) -> None:
    raw, image = tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(random.Random(14).randbytes(16 * MIB))
    run("qemu-img", "convert", "-O", "qcow2", str(raw), str(image))
    with installation(tmp_path) as ebsd:
        ebsd.ok("import", image, "data", "--encrypted", "--no-wait", "--rate", "2M")
        job = job_of(ebsd, "import-volume")["JobId"]
        wait_for(lambda: ebsd.ctl_json("job", "show", job)["Done"] >= 8 * MIB)
        ebsd.kill()
        ebsd.start()
        assert ebsd.ctl_json("job", "show", job)["State"] == "interrupted"
        status, error = ebsd.refused("import", raw, "data", "--resume", job)
        assert (status, error["Code"]) == (2, "InvalidParameterValue"), error
        ebsd.ok("import", image, "data", "--resume", job)
        assert content(ebsd, "data") == raw.read_bytes()
        (chunk,) = re.findall(rf"{job} goes on from chunk (\d+)", ebsd.log.read_text())
        assert int(chunk) > 0


def test_an_import_goes_on_without_its_command(ebsd: Installation, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(random.Random(12).randbytes(24 * MIB))
    ebsctl = [BIN / "ebsctl", "--socket", ebsd.socket, "import", image, "alone", "--encrypted", "--rate", "16M"]
    with subprocess.Popen(ebsctl, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as command:
        wait_for(lambda: ebsd.ctl("show", "alone").status == 0)
        command.kill()
    image.unlink()
    ebsd.ok("wait", "alone", "--for", "available")
    assert content(ebsd, "alone") == random.Random(12).randbytes(24 * MIB)
    ebsd.ok("delete", "--yes", "alone")
