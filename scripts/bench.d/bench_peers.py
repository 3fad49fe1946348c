"""Part ``peers``: encrypted volumes against what Debian has in user space, each by the way that both offer.

Through loop devices: qemu-storage-daemon with a LUKS image, exported over FUSE. On a file: gocryptfs, and nbdkit's LUKS
filter behind nbdfuse; ebsd's block file then.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bench_arena import as_json, bars_of, compete, table_of
from bench_hosts import BenchError, Device, make_luks, stop, tail
from bench_qemu import Qemu
from bench_run import Outcome, Run, say

WAIT = 30.0
"""Seconds in which a peer has to serve."""


class OnFile:
    """A peer that serves one file in a mount of its own; below one directory, ended by ``close``."""

    programs: tuple[str, ...] = ()

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mount = root / "mount"
        self._processes: list[subprocess.Popen[bytes]] = []

    @classmethod
    def version(cls) -> str | None:
        """Return name and version, None where a program is missing."""
        if any(shutil.which(program) is None for program in cls.programs):
            return None
        done = subprocess.run([cls.programs[0], "--version"], capture_output=True, text=True)
        return " ".join(done.stdout.replace(";", " ").split()[:2])

    def start(self, size: int) -> Device:
        """Serve a file of ``size`` bytes. Raises BenchError."""
        self.root.mkdir()
        self.mount.mkdir()
        self.secret = self.root / "secret"
        self.secret.touch(0o600)
        self.secret.write_text(secrets.token_hex(32))
        path = self.serve(size)
        return Device(str(path), tuple(process.pid for process in self._processes))

    def serve(self, size: int) -> Path:
        raise NotImplementedError

    def close(self) -> None:
        if os.path.ismount(self.mount):
            subprocess.run(["umount", self.mount], stdin=subprocess.DEVNULL, check=False)
        for process in reversed(self._processes):
            stop(process)
        if os.path.ismount(self.mount):
            subprocess.run(["umount", "--lazy", self.mount], stdin=subprocess.DEVNULL, check=False)

    def _begin(self, *command: str | Path) -> None:
        with (self.root / "log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            )

    def _await(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT
        while not ready():
            if self._processes[-1].poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{type(self).__name__} does not start:\n{tail(self.root / 'log')}")
            time.sleep(0.05)


class Gocryptfs(OnFile):
    """gocryptfs with its own defaults (AES-256-GCM) but the cost of its passphrase."""

    programs = ("gocryptfs",)

    def serve(self, size: int) -> Path:
        cipher = self.root / "cipher"
        cipher.mkdir()
        options = ("-q", "-passfile", self.secret)
        done = subprocess.run(
            ["gocryptfs", "-init", "-scryptn", "10", *options, cipher],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise BenchError(f"gocryptfs -init: {done.stdout.strip()} {done.stderr.strip()}")
        self._begin("gocryptfs", "-fg", *options, cipher, self.mount)
        self._await(lambda: os.path.ismount(self.mount))
        path = self.mount / "file"
        with path.open("wb") as file:
            file.truncate(size)
        return path


class Nbdkit(OnFile):
    """nbdkit's LUKS filter over a file, made a file again by nbdfuse."""

    programs = ("nbdkit", "nbdfuse", "qemu-img")

    def serve(self, size: int) -> Path:
        image, sock = self.root / "image.luks", self.root / "sock"
        make_luks(image, size, self.secret)
        server = ("nbdkit", "--foreground", "--exit-with-parent", "--unix", sock, "--filter=luks", "file")
        self._begin(*server, f"file={image}", f"passphrase=+{self.secret}")
        self._await(sock.exists)
        path = self.mount / "nbd"
        self._begin("nbdfuse", path, "--unix", sock)
        self._await(lambda: os.path.ismount(self.mount) and path.exists() and path.stat().st_size == size)
        return path


ON_FILE: tuple[type[OnFile], ...] = (Gocryptfs, Nbdkit)


def run(run: Run) -> Outcome:
    """Measure whoever is installed."""
    outcome = Outcome([], {})
    with contextlib.ExitStack() as stack:
        ebsd = stack.enter_context(run.ebsd("ebsd-peers"))
        ebsd.create("loop", run.size)
        devices = {"ebsd": ebsd.attach("loop")}
        version = Qemu.version()
        if version is not None:
            qemu = Qemu(run.root / "qemu")
            stack.callback(qemu.close)
            devices[version] = qemu.start(run.size)
            samples = compete(devices, run.size, run.rounds, run.seconds)
            outcome.tables.append(
                table_of("Peers through loop devices", samples, ["The peer: a LUKS image, exported over FUSE."])
            )
            outcome.figures["loop"] = as_json(samples)
            outcome.bars += bars_of(samples)
        else:
            say("qemu-storage-daemon is not installed and left out")
        ebsd.ctl("detach", "loop")
        ebsd.create("file", run.size)
        devices = {"ebsd": ebsd.attach("file", as_file=True)}
        for kind in ON_FILE:
            version = kind.version()
            if version is None:
                say(f"{kind.programs[0]} is not installed and left out")
                continue
            peer = kind(run.root / kind.__name__.lower())
            stack.callback(peer.close)
            devices[version] = peer.start(run.size)
        if len(devices) > 1:
            samples = compete(devices, run.size, run.rounds, run.seconds)
            outcome.tables.append(table_of("Peers that serve a file; ebsd's block file", samples))
            outcome.figures["file"] = as_json(samples)
            outcome.bars += bars_of(samples)
    return outcome
