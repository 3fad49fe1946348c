"""A virtual machine for tests: boot, root commands, an orderly reboot, and power cuts.

What a power cut here takes away: everything in the machine's memory, and, since its disk is a qcow2 file whose tables
qemu keeps in its own memory until the guest flushes, also what was written to new places of the disk and not flushed.
What had been written over an older place stays written: real disks lose more.
"""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BOOT_SECONDS = 300.0

CPU = "max,cx16=off"
"""Linux 6.12 allocates memory with cmpxchg16b, which qemu 7.2 emulates wrongly at times: it panics at its boot."""


@dataclass
class Done:
    """What a command in the machine answered."""

    status: int
    stdout: str
    stderr: str


@dataclass
class Machine:
    """One machine on a disk of its own, in a directory that is removed with it."""

    base: Path
    """What ``scripts/vm build`` made."""
    root: Path
    memory: int = 2048
    accel: str = "tcg"
    _qemu: subprocess.Popen[bytes] | None = None
    _channel: socket.socket | None = None
    _number: int = 0
    _heard: int = 0

    @property
    def disk(self) -> Path:
        return self.root / "disk.qcow2"

    @property
    def console(self) -> Path:
        return self.root / "console.log"

    @property
    def is_on(self) -> bool:
        return self._qemu is not None and self._qemu.poll() is None

    def create(self) -> None:
        """Make the disk, whose content is the base system's."""
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.base / "root.raw", self.disk],
            check=True,
        )

    def boot(self) -> float:
        """Start the machine and wait until its units have settled; returns the seconds that took."""
        begun = time.monotonic()
        self._heard = 0
        address = self.root / "agent.sock"
        address.unlink(missing_ok=True)
        with self.console.open("ab") as log:
            self._qemu = subprocess.Popen(
                [
                    "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                    "-accel", self.accel, "-cpu", CPU, "-smp", "2", "-m", str(self.memory),
                    "-kernel", self.base / "vmlinuz", "-initrd", self.base / "initrd",
                    "-append", "root=/dev/vda rw console=ttyS0 panic=1 quiet",
                    "-drive", f"file={self.disk},format=qcow2,if=virtio,cache=none,discard=unmap",
                    "-drive", f"file={self.base / 'media.raw'},format=raw,if=virtio,readonly=on",
                    "-device", "virtio-rng-pci", "-serial", "stdio",
                    "-device", "virtio-serial-pci",
                    "-chardev", f"socket,id=agent,path={address},server=on,wait=off",
                    "-device", "virtserialport,chardev=agent,name=agent",
                    # Written by qemu into a file: what it has taken is not lost with the machine.
                    "-chardev", f"file,id=acks,path={self.root / 'acks'}",
                    "-device", "virtserialport,chardev=acks,name=acks",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )  # fmt: skip
        self._channel = self._connected(address)
        deadline = time.monotonic() + BOOT_SECONDS
        while self.run("true", timeout=5, patience=20, check=False).status != 0:
            assert time.monotonic() < deadline, self.tail()
        self.run("systemctl is-system-running --wait", timeout=BOOT_SECONDS, check=False)
        return time.monotonic() - begun

    def _connected(self, address: Path) -> socket.socket:
        deadline = time.monotonic() + 30
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(str(address))
            except OSError:
                sock.close()
                assert self._qemu is not None
                assert self._qemu.poll() is None, self.tail()
                assert time.monotonic() < deadline, self.tail()
                time.sleep(0.1)
            else:
                return sock

    def run(self, command: str, *, timeout: float = 120, patience: float | None = None, check: bool = True) -> Done:
        """Run a command of bash as root; ``patience``: seconds to wait for any answer (default: ``timeout``)."""
        self._number += 1
        assert self._channel is not None
        request = {"id": self._number, "command": command, "timeout": timeout}
        self._channel.settimeout(timeout + 30 if patience is None else patience)
        try:
            self._channel.sendall(json.dumps(request).encode() + b"\n")
            answer = self._answer()
        except TimeoutError:
            return Done(125, "", "no answer")
        done = Done(answer["status"], answer["stdout"], answer["stderr"])
        assert not check or done.status == 0, f"{command}: {done.status}\n{done.stdout}\n{done.stderr}\n{self.tail()}"
        return done

    def _answer(self) -> dict[str, Any]:
        assert self._channel is not None
        pending = b""
        while True:
            data = self._channel.recv(1 << 16)
            assert data, f"the machine is gone: {self.tail()}"
            pending += data
            while b"\n" in pending:
                line, pending = pending.split(b"\n", 1)
                answer: dict[str, Any] = json.loads(line)
                if answer["id"] == self._number:  # not that of a request that was given up
                    return answer

    def ok(self, command: str, *, timeout: float = 120) -> str:
        """Run a command that must succeed; returns its output without the newline."""
        return self.run(command, timeout=timeout).stdout.strip()

    def json(self, command: str) -> Any:
        return json.loads(self.ok(command))

    def put(self, path: str, content: str) -> None:
        """Write a file."""
        self.ok(f"base64 -d >{path} <<'END'\n{base64.encodebytes(content.encode()).decode()}END")

    def acks(self) -> str:
        """Return what was written to the port ``acks`` since the last time, also after a power cut."""
        text = (self.root / "acks").read_bytes()[self._heard :].decode()
        whole = text[: text.rfind("\n") + 1]
        self._heard += len(whole.encode())
        return whole

    def power_off(self) -> float:
        """Shut the machine down in order; returns the seconds that took."""
        begun = time.monotonic()
        self.run("systemctl poweroff --no-block", check=False, patience=20)
        assert self._qemu is not None
        self._qemu.wait(300)
        self._gone()
        return time.monotonic() - begun

    def reboot(self) -> tuple[float, float]:
        """Shut down in order and boot again; returns the seconds of each."""
        return self.power_off(), self.boot()

    def cut_power(self) -> None:
        """End the machine at once: SIGKILL for qemu."""
        assert self._qemu is not None
        self._qemu.kill()
        self._qemu.wait(60)
        self._gone()

    def _gone(self) -> None:
        self._qemu = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def tail(self) -> str:
        """Return the end of the console, for messages."""
        return self.console.read_text(errors="replace")[-3000:] if self.console.exists() else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._qemu is not None:
            self.cut_power()
