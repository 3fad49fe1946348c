"""What serves devices during a benchmark: an ebsd of our own; and the workloads of fio."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench_figures import Sample, descendants, parse_fio, parse_fio_output, parse_pss

from ebsctl.client import Client

BIN = Path(sys.executable).parent
TICKS = os.sysconf("SC_CLK_TCK")
FORMAT_TRIES = 20
"""qemu-img times its PBKDF2 by the CPU clock, and gives up where the clock's tick is coarse and the host is fast."""


class BenchError(Exception):
    """Something that was to be measured does not work."""


@dataclass(frozen=True)
class Device:
    """A block device or file, and the processes that serve it."""

    path: str
    pids: tuple[int, ...]

    def cpu_seconds(self) -> float:
        """User and system time of the serving processes, ended threads included."""
        total = 0
        for pid in self.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / TICKS

    def memory(self) -> int:
        """Bytes of memory of the serving processes, shared pages by share (PSS)."""
        return sum(parse_pss(Path(f"/proc/{pid}/smaps_rollup").read_text()) for pid in self.pids)


@dataclass(frozen=True)
class Row:
    """One fio workload."""

    name: str
    mode: str
    block: int
    depth: int
    engine: str = "libaio"

    @property
    def sequential(self) -> bool:
        return not self.mode.startswith("rand")

    @property
    def writes(self) -> bool:
        return "write" in self.mode


def run_fio(row: Row, device: Device, size: int, seconds: float) -> Sample:
    """Run one workload with direct I/O over the first ``size`` bytes."""
    return run_fio_on(row, [device], size, seconds)


def run_fio_on(row: Row, devices: Sequence[Device], size: int, seconds: float) -> Sample:
    """Run one workload on several devices at the same time; rates are those of all together."""
    before = sum(device.cpu_seconds() for device in devices)
    command = _fio(row, [device.path for device in devices], size, seconds)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchError(f"fio failed on {devices[0].path}: {done.stderr.strip() or done.stdout.strip()}")
    took = sum(device.cpu_seconds() for device in devices) - before
    return parse_fio(json.loads(parse_fio_output(done.stdout)), took)


@contextmanager
def fio_running(row: Row, device: Device, size: int) -> Iterator[None]:
    """Have a workload run during the body."""
    process = subprocess.Popen(
        _fio(row, [device.path], size, 3600),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(1)
        yield
        if process.poll() is not None:
            raise BenchError(f"fio ended on {device.path}, with status {process.returncode}")
    finally:
        process.terminate()
        process.wait(60)


def _fio(row: Row, paths: Sequence[str], size: int, seconds: float) -> list[str]:
    jobs = [word for number, path in enumerate(paths) for word in (f"--name=bench-{number}", f"--filename={path}")]
    return [
        "fio",
        "--group_reporting=1",
        f"--rw={row.mode}",
        f"--bs={row.block}",
        f"--iodepth={row.depth}",
        f"--ioengine={row.engine}",
        f"--size={size}",
        f"--runtime={round(seconds * 1000)}ms",
        "--time_based=1",
        "--direct=1",
        "--thread=1",
        "--norandommap=1",
        "--randrepeat=1",
        "--output-format=json",
        *jobs,  # what stands before the first of them is for all
    ]


def fill(device: Device, size: int) -> float:
    """Write every byte once and return the seconds that took, without the sync at the end."""
    block = aligned(os.urandom(1 << 20))
    fd = os.open(device.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        begin = time.perf_counter()
        for at in range(0, size, len(block)):
            if os.pwritev(fd, [block[: size - at]], at) != min(len(block), size - at):
                raise BenchError(f"a short write to {device.path}")
        took = time.perf_counter() - begin
        os.fsync(fd)
    finally:
        os.close(fd)
    return took


def aligned(data: bytes) -> memoryview:
    """Return a copy that direct I/O can use."""
    area = mmap.mmap(-1, len(data))
    area[:] = data
    return memoryview(area)


def sync(device: Device) -> None:
    """Flush the device, so that what one row wrote is not written back during the next."""
    fd = os.open(device.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def stop(process: subprocess.Popen[bytes], seconds: float = 30) -> None:
    """End a process of ours in order, or else by force."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(seconds)


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:] if log.exists() else ""


class Ebsd:
    """A private ebsd: state, sockets and keys below one directory."""

    def __init__(self, root: Path, settings: str = "") -> None:
        """``settings``: further lines of the configuration."""
        self.root = root
        self._settings = settings
        self.state = root / "state"
        self.log = root / "ebsd.log"
        self.client = Client(str(root / "run" / "ebsd.sock"), timeout=600)
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.root.mkdir()
        config = self.root / "ebsd.toml"
        config.write_text(
            f'state_dir = "{self.state}"\nruntime_dir = "{self.root / "run"}"\nallow_unencrypted = true\n'
            f"{self._settings}\n"
            f'[key_service.local]\nstate_dir = "{self.root / "keys"}"\nroot_key = "{self.root / "root.key"}"\n'
        )
        with self.log.open("ab") as log:
            self._daemon = subprocess.Popen(
                [BIN / "ebsd", "--config", config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: volumes are to be detached before ebsd ends
            )
        deadline = time.monotonic() + 60
        while self._ctl("status").returncode != 0:
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"ebsd does not start:\n{tail(self.log)}")
            time.sleep(0.05)

    def close(self) -> None:
        """Detach everything and end ebsd and its key service."""
        if self._daemon is None:
            return
        if self._daemon.poll() is None:
            if self._ctl("detach", "--all").returncode != 0:
                self._ctl("detach", "--all", "--force")
            stop(self._daemon)
        self._daemon = None

    def ctl(self, *arguments: str) -> str:
        """Run ebsctl and return what it printed."""
        done = self._ctl(*arguments)
        if done.returncode != 0:
            raise BenchError(f"ebsctl {' '.join(arguments)}: {done.stderr.strip()}\n{tail(self.log)}")
        return done.stdout.strip()

    def _ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [BIN / "ebsctl", "--socket", self.client.path, *arguments]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)

    def create(self, name: str, size: int, *, encrypted: bool = True) -> None:
        self.ctl("create", name, "--size", str(size), "--encrypted" if encrypted else "--no-encrypted")

    def attach(self, name: str, *, as_file: bool = False) -> Device:
        """Attach a volume as a loop device, or ``as_file``; its processes are those that were not there before."""
        before = self._processes()
        path = self.ctl("attach", name, *(["--file"] if as_file else []))
        return Device(path, tuple(sorted(self._processes() - before)))

    def _processes(self) -> set[int]:
        """Return the volume processes of this ebsd: those below it, and those that hold a socket of its volumes."""
        assert self._daemon is not None
        control = f"{self.root}/run/control/"
        inodes = {
            f"socket:[{fields[6]}]"
            for fields in (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
            if len(fields) == 8 and fields[7].startswith(control)
        }
        parents, holders = {}, set()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                pid, command = int(process.name), (process / "cmdline").read_bytes()
                parents[pid] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                if b"ebsd.volume" in command and any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir()):
                    holders.add(pid)
        return (holders | descendants(parents, self._daemon.pid)) - self._passing(parents)

    @staticmethod
    def _passing(parents: Mapping[int, int]) -> set[int]:
        """Return processes that have ended, or are about to: helpers of an attachment."""
        time.sleep(0.2)
        return {pid for pid in parents if not os.path.exists(f"/proc/{pid}/exe")}


def make_luks(image: Path, size: int, secret: Path, *, qcow2: bool = False) -> None:
    """Make an image as ebsd's volumes are: AES-256-XTS, SHA-256; its passphrase costs nothing. Raises BenchError."""
    options = "cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha256,iter-time=10,key-secret=key"
    if qcow2:
        options = "encrypt.format=luks," + ",".join(f"encrypt.{option}" for option in options.split(","))
    create = [
        *("qemu-img", "create", "-q", "-f", "qcow2" if qcow2 else "luks"),
        *("--object", f"secret,id=key,file={secret}", "-o", options),
    ]
    for _ in range(FORMAT_TRIES):
        done = subprocess.run(
            [*create, str(image), str(size)], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if "accurate CPU usage" not in done.stderr:
            break
    if done.returncode != 0:
        raise BenchError(f"qemu-img: {done.stderr.strip()}")


def loop_settings(device: Device) -> dict[str, str]:
    """Return what the kernel says of a loop device, so that a report shows that both are alike."""
    queue = Path("/sys/block") / Path(device.path).name
    names = ("loop/dio", "queue/logical_block_size", "queue/max_sectors_kb", "queue/nr_requests", "queue/scheduler")
    return {name: (queue / name).read_text().strip() for name in names if (queue / name).exists()}


def allocated(directory: Path) -> int:
    """Return the bytes that the files below a directory take on the disk."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total
