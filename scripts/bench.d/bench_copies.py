"""Part ``copies``: re-encrypting copies against qemu-img from LUKS to LUKS, and copies that share their key.

Both parties begin and end alike. Before each turn the data that it reads is dropped from the page cache, or read into
it, and nothing waits to be written; each of the two states is a table of its own. A turn ends when what was written is
durable: ebsd syncs within its job, and qemu-img, which leaves that to the kernel, is followed by an fsync of its image,
timed with it. Making the target (a volume, an empty LUKS image) is timed for ebsd alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_figures import MIB, Table, median_ratio, spread
from bench_hosts import BenchError, Device, Ebsd, allocated
from bench_run import Outcome, Run, say

Progress = Callable[[str], None]

STATES = ("dropped from", "in")
"""Where the source is before a turn, as to the page cache."""

SIZES = {"1 MiB": 1 << 20, "100 GiB": 100 << 30}
"""Provisioned sizes of the volumes whose snapshots are copied under their own key."""

OPENING = "iter-time=100"
"""Milliseconds of key derivation when an image is opened: not what is measured."""


class CopyResults:
    """Figures of part 5."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.mib_s: dict[str, dict[str, list[float]]] = {
            state: {"copy": [], "restore": [], "qemu": []} for state in STATES
        }
        """State of the source -> who -> a figure for each round."""
        self.peer = ""
        self.equal = ""
        self.instant_ms: dict[str, dict[str, list[float]]] = {}
        """Operation -> provisioned size -> milliseconds."""
        self.instant_bytes: dict[str, dict[str, int]] = {}
        """As above: bytes of layers that it added."""

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))

    def tables(self) -> list[Table]:
        tables = [self._copies(state) for state in STATES]
        tables[-1].notes.append(
            "In turn, and all is durable at the end of each. ebsd verifies what it reads and hashes what it writes; "
            "qemu-img does neither. " + self.equal
        )
        columns = [""]
        for name in SIZES:
            columns += [f"{name}, ms", f"{name}, bytes of data"]
        instant = Table("Under its own key: no data is read or written, whatever is provisioned", columns)
        for operation, by in self.instant_ms.items():
            cells = []
            for name in SIZES:
                cells += [spread(by[name]).text(1), str(self.instant_bytes[operation][name])]
            instant.add(operation, *cells)
        return [*tables, instant]

    def _copies(self, state: str) -> Table:
        title = f"Re-encrypting {self.size / (1 << 30):g} GiB under another key, the source {state} the page cache"
        table = Table(title, ["", "MiB/s", "ratio to qemu-img"])
        figures = self.mib_s[state]
        for name, ours in (("ebsd copy", figures["copy"]), ("ebsd create --from", figures["restore"])):
            ratio = f"{median_ratio(ours, figures['qemu']):.1f}" if figures["qemu"] else ""
            table.add(name, spread(ours).text(), ratio)
        if figures["qemu"]:
            table.add(f"{self.peer} convert, LUKS to LUKS, and fsync", spread(figures["qemu"]).text(), "1")
        return table


def run(run: Run) -> Outcome:
    with run.ebsd("ebsd-copies") as ebsd:
        size = run.copied or ((512 << 20) if run.quick else (4 << 30))
        results = measure_copies(ebsd, run.root, size, run.rounds, say)
    return Outcome(results.tables(), results.as_json())


def measure_copies(ebsd: Ebsd, root: Path, size: int, rounds: int, say: Progress) -> CopyResults:
    """Copy and restore a snapshot of ``size`` written bytes under another key, in turn with qemu-img."""
    results = CopyResults(size)
    _instant(ebsd, results, rounds, say)
    say(f"writing {size // MIB} MiB")
    ebsd.create("source", size)
    device = ebsd.attach("source")
    content = _fill(device, size)
    ebsd.client.ec2("CreateSnapshot", VolumeId="source", Name="full")
    key = ebsd.client.kms("CreateKey", Description="bench")["KeyMetadata"]["KeyId"]
    peer = _Qemu(root / "qemu", size) if shutil.which("qemu-img") else None
    if peer is not None:
        say("making the LUKS image to convert")
        results.peer = peer.version()
        peer.make_source(device)
    ebsd.ctl("detach", "source")
    # The one that holds the data; there are sparse ones of 100 GiB as well.
    layers = [path for path in (ebsd.state / "layers").rglob("*") if path.stat().st_blocks * 512 >= size]
    for at in range(rounds):
        for state in STATES:
            say(f"copies, round {at + 1} of {rounds}, the source {state} the page cache")
            ready = _Ready(in_cache=state == "in")
            figures = results.mib_s[state]
            turns = [
                lambda ready=ready, into=figures["copy"]: into.append(_copy(ebsd, size, key, lambda: ready(layers))),
                lambda ready=ready, into=figures["restore"]: into.append(
                    _restore(ebsd, size, key, lambda: ready(layers))
                ),
            ]
            if peer is not None:
                turns.append(lambda ready=ready, into=figures["qemu"], peer=peer: into.append(peer.convert(ready)))
            for turn in turns if at % 2 == 0 else reversed(turns):
                turn()
    say("comparing what the copies hold")
    ebsd.ctl("create", "compared", "--from", "copy")
    made = ebsd.attach("compared")
    if _digest(made.path, size) != content:
        raise BenchError("the copy does not hold what was written")
    results.equal = "The copy holds what was written, byte for byte"
    if peer is not None:
        peer.compare(made.path)
        results.equal += ", as does that of qemu-img"
        peer.remove()
    results.equal += "."
    ebsd.ctl("detach", "compared")
    return results


class _Ready:
    """Makes the state in which a turn begins: nothing is left to write, and where the page cache has the source."""

    def __init__(self, *, in_cache: bool) -> None:
        self._in_cache = in_cache

    def __call__(self, sources: Sequence[Path]) -> None:
        time.sleep(1)
        os.sync()  # what was deleted is given back by now, and not while the next turn is timed
        for path in sources:
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while self._in_cache and file.read(4 * MIB):
                    pass


def _copy(ebsd: Ebsd, size: int, key: str, ready: Callable[[], None]) -> float:
    with contextlib.suppress(BenchError):
        ebsd.ctl("delete", "copy", "--yes")
    ready()
    begin = time.perf_counter()
    reply = ebsd.client.ec2("CopySnapshot", SourceSnapshotId="full", Name="copy", Encrypted=True, KmsKeyId=key)
    return _awaited(ebsd, reply["JobId"], size, begin)


def _restore(ebsd: Ebsd, size: int, key: str, ready: Callable[[], None]) -> float:
    ready()
    begin = time.perf_counter()
    reply = ebsd.client.ec2("CreateVolume", Name="restored", SnapshotId="full", Encrypted=True, KmsKeyId=key)
    rate = _awaited(ebsd, reply["JobId"], size, begin)
    ebsd.ctl("delete", "restored", "--yes")
    return rate


def _awaited(ebsd: Ebsd, job: str, size: int, begin: float) -> float:
    """Return MiB/s until the job has completed, its sync included."""
    ended = ebsd.client.control("WaitJob", JobId=job)["Job"]
    took = time.perf_counter() - begin
    if ended["State"] != "completed" or ended["Total"] != size:
        raise BenchError(f"the job is {ended['State']}, of {ended['Total']} bytes: {ended.get('Error')}")
    return size / MIB / took


def _instant(ebsd: Ebsd, results: CopyResults, rounds: int, say: Progress) -> None:
    for name, size in SIZES.items():
        say(f"copies under the same key, {name}")
        volume = f"small-{size}"
        ebsd.create(volume, size)
        device = ebsd.attach(volume)
        _fill(device, MIB)
        ebsd.client.ec2("CreateSnapshot", VolumeId=volume, Name=f"of-{volume}")
        ebsd.ctl("detach", volume)
        source = ebsd.client.ec2("DescribeSnapshots", SnapshotIds=[f"of-{volume}"])["Snapshots"][0]
        own = {"Encrypted": True, "KmsKeyId": source["KmsKeyId"]}
        for at in range(rounds * 4):
            with _timed(ebsd, results, "copy", name):
                ebsd.client.ec2("CopySnapshot", SourceSnapshotId=f"of-{volume}", Name=f"copy-{size}-{at}", **own)
            with _timed(ebsd, results, "create --from", name):
                ebsd.client.ec2("CreateVolume", SnapshotId=f"of-{volume}", Name=f"new-{size}-{at}")


@contextlib.contextmanager
def _timed(ebsd: Ebsd, results: CopyResults, operation: str, name: str) -> Iterator[None]:
    before = allocated(ebsd.state / "layers")
    begin = time.perf_counter()
    yield
    took = time.perf_counter() - begin
    results.instant_ms.setdefault(operation, {}).setdefault(name, []).append(took * 1000)
    # Tables of layers grow by a slot; a chunk of data would be 64 KiB.
    grown = (allocated(ebsd.state / "layers") - before) // 65536 * 65536
    of = results.instant_bytes.setdefault(operation, {})
    of[name] = max(of.get(name, 0), grown)


def _fill(device: Device, size: int) -> str:
    """Write blocks that are all different; return the digest of all of them."""
    block, digest = os.urandom(4 * MIB), hashlib.sha256()
    with open(device.path, "r+b", buffering=0) as raw:
        for at in range(0, size, len(block)):
            piece = (at.to_bytes(8, "little") + block[8:])[: size - at]
            raw.write(piece)
            digest.update(piece)
        os.fsync(raw)
    return digest.hexdigest()


def _digest(path: str, size: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as raw:
        while size > 0 and (piece := raw.read(min(4 * MIB, size))):
            digest.update(piece)
            size -= len(piece)
    return digest.hexdigest()


class _Qemu:
    """Two LUKS images below one directory, with passphrases that protect nothing."""

    def __init__(self, root: Path, size: int) -> None:
        self._root = root
        self._size = size
        root.mkdir()
        self._source, self._target = root / "source.luks", root / "target.luks"
        self._secrets = ["--object", "secret,id=s,data=one", "--object", "secret,id=t,data=two"]

    def version(self) -> str:
        words = self._run("--version").split()
        return f"qemu-img {words[2]}"

    def make_source(self, device: Device) -> None:
        self._create(self._source, "s")
        self._run(
            *("convert", "-n", *self._secrets, "-f", "raw", "--target-image-opts", device.path),
            self._image(self._source, "s"),
        )

    def convert(self, ready: Callable[[Sequence[Path]], None]) -> float:
        """Return MiB/s of a conversion into an image that was just created, until it is durable."""
        self._target.unlink(missing_ok=True)
        self._create(self._target, "t")
        ready([self._source])
        begin = time.perf_counter()
        self._run(
            *("convert", "-n", *self._secrets, "--image-opts", "--target-image-opts"),
            *(self._image(self._source, "s"), self._image(self._target, "t")),
        )
        with self._target.open("rb") as image:
            os.fsync(image)
        return self._size / MIB / (time.perf_counter() - begin)

    def compare(self, path: str) -> None:
        """Raise BenchError unless the converted image holds what a device does."""
        self._run(
            *("compare", *self._secrets, "--image-opts", self._image(self._target, "t")),
            f"driver=raw,file.driver=host_device,file.filename={path}",
        )

    def remove(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)

    def _create(self, path: Path, secret: str) -> None:
        arguments = ("create", *self._secrets, "-f", "luks", "-o", f"key-secret={secret},{OPENING}")
        for attempt in range(5):
            try:
                self._run(*arguments, str(path), str(self._size))
                return
            except BenchError:
                # It measures how fast it derives keys, which fails now and then on a busy host.
                if attempt == 4:
                    raise

    @staticmethod
    def _image(path: Path, secret: str) -> str:
        return f"driver=luks,key-secret={secret},file.filename={path}"

    @staticmethod
    def _run(*arguments: str) -> str:
        done = subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, check=False, timeout=1800)
        if done.returncode != 0:
            raise BenchError(f"qemu-img {arguments[0]}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout
