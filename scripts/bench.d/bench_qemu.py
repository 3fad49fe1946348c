"""qemu-storage-daemon as a peer: a LUKS image, or a qcow2 image with LUKS, exported over FUSE, with a loop device."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from bench_hosts import BenchError, Device, make_luks, stop, tail


class Qemu:
    """One image below one directory, served until ``close``."""

    def __init__(self, root: Path, *, qcow2: bool = False) -> None:
        """``qcow2``: encrypted with LUKS as well, and able to take snapshots."""
        self.root = root
        self._qcow2 = qcow2
        self._daemon: subprocess.Popen[bytes] | None = None
        self._loop: str | None = None
        self._monitor: socket.socket | None = None

    @staticmethod
    def version() -> str | None:
        """Return name and version, None when it is not installed."""
        if shutil.which("qemu-storage-daemon") is None:
            return None
        done = subprocess.run(["qemu-storage-daemon", "--version"], capture_output=True, text=True, check=True)
        return "qemu " + done.stdout.split("version")[1].split()[0]

    def start(self, size: int) -> Device:
        """Serve an image of ``size`` bytes. Raises BenchError."""
        self.root.mkdir()
        secret, image, exported, log = (self.root / name for name in ("secret", "image", "export", "log"))
        secret.touch(0o600)
        secret.write_text(secrets.token_hex(32))
        make_luks(image, size, secret, qcow2=self._qcow2)
        exported.touch()
        qcow2, luks = "driver=qcow2,encrypt.format=luks,encrypt.key-secret=key", "driver=luks,key-secret=key"
        driver = qcow2 if self._qcow2 else luks
        with log.open("ab") as output:
            self._daemon = subprocess.Popen(
                [
                    "qemu-storage-daemon",
                    *("--object", f"secret,id=key,file={secret}"),
                    *("--blockdev", f"driver=file,node-name=file,filename={image}"),
                    *("--blockdev", f"{driver},node-name=disk,file=file"),
                    *("--export", f"type=fuse,id=export,node-name=disk,mountpoint={exported},writable=on"),
                    *("--chardev", f"socket,id=monitor,path={self.root / 'monitor'},server=on,wait=off"),
                    *("--monitor", "chardev=monitor"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + 30
        while exported.stat().st_size != size:
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"qemu-storage-daemon does not start:\n{tail(log)}")
            time.sleep(0.05)
        # As ebsd's own loop devices: direct I/O, sectors of 4096 bytes.
        loop = ["losetup", "--find", "--show", "--direct-io=on", "--sector-size", "4096", str(exported)]
        done = subprocess.run(loop, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            raise BenchError(f"losetup: {done.stderr.strip()}")
        self._loop = done.stdout.strip()
        return Device(self._loop, (self._daemon.pid,))

    def snapshot(self, name: str) -> None:
        """Take an internal snapshot of a qcow2 image. Raises BenchError."""
        if self._monitor is None:
            self._monitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._monitor.connect(str(self.root / "monitor"))
            self._monitor.settimeout(60)
            self._answer()
            self._ask("qmp_capabilities")
        self._ask("blockdev-snapshot-internal-sync", device="disk", name=name)

    def _ask(self, command: str, **arguments: Any) -> None:
        assert self._monitor is not None
        self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        answer = self._answer()
        if "error" in answer:
            raise BenchError(f"qemu-storage-daemon, {command}: {answer['error']}")

    def _answer(self) -> dict[str, Any]:
        assert self._monitor is not None
        text = b""
        while True:
            text += (more := self._monitor.recv(65536))
            if not more:
                raise BenchError("qemu-storage-daemon closed its monitor")
            for line in text.splitlines(keepends=True):
                if line.endswith(b"\n") and "event" not in (document := json.loads(line)):
                    return dict(document)

    def close(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        if self._loop is not None:
            subprocess.run(["losetup", "--detach", self._loop], stdin=subprocess.DEVNULL, check=False)
            self._loop = None
        if self._daemon is not None:
            stop(self._daemon)
            self._daemon = None
        exported = self.root / "export"
        # Of a mount whose process has ended nobody can ask whether it is one: stat(2) fails.
        subprocess.run(["umount", "--lazy", exported], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
