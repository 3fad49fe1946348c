"""Secrets: what is written on an encrypted volume, and its data key, are found in no file and no memory of ours.

The data key is the real one: the volume is encrypted under a customer key, so its owner may have the wrapped key of
the record decrypted. Every search is shown to find what is there before it is believed to find nothing.
"""

from __future__ import annotations

import base64
import os
import secrets
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from installation import Installation, installation

from ebsctl.client import Client
from ebsd.store.record import parse_record

GROUP = 65534
"""Group of all processes of this installation: of a process that is not dumpable, /proc shows the group 0 instead."""

PREFIX = ("setpriv", f"--regid={GROUP}", "--clear-groups")
MIB = 1 << 20


def forms(secret: bytes) -> dict[str, bytes]:
    """Return the ways in which a secret could be written down; each is searched for as it is."""
    found = {"raw": secret, "hex": secret.hex().encode(), "HEX": secret.hex().upper().encode()}
    for shift in range(3):
        # Inside of a longer text base64 starts at any of three places; what depends on the neighbours is cut off.
        encoded = base64.b64encode(bytes(shift) + secret)
        inner = encoded[4 if shift else 0 : -4 if (shift + len(secret)) % 3 else None]
        found[f"base64+{shift}"] = inner
        found[f"base64url+{shift}"] = inner.translate(bytes.maketrans(b"+/", b"-_"))
    return found


def needles(data_key: bytes, marker: bytes) -> dict[str, bytes]:
    """Return name -> bytes of everything that must be nowhere."""
    parts = {"marker": marker, "data key": data_key, "first half": data_key[:32], "second half": data_key[32:]}
    return {f"{what}, {how}": form for what, part in parts.items() for how, form in forms(part).items()}


def search(content: bytes, wanted: dict[str, bytes]) -> set[str]:
    return {name for name, needle in wanted.items() if needle in content}


def files_below(*roots: Path) -> Iterator[Path]:
    """Yield the regular files, block files (which show the content, as they must) left out."""
    for root in roots:
        for directory, names, files in os.walk(root):
            if directory.endswith("/run/volumes"):
                names.clear()
                continue
            for name in files:
                path = Path(directory, name)
                if stat.S_ISREG(path.lstat().st_mode):
                    yield path


def search_files(ebsd: Installation, wanted: dict[str, bytes]) -> tuple[set[str], set[str]]:
    """Return the paths that were searched, and those of them that hold any of the wanted."""
    paths = {ebsd.log, *files_below(ebsd.state, ebsd.kms_state, ebsd.runtime)}
    found = {f"{path}: {what}" for path in paths for what in search(path.read_bytes(), wanted)}
    return {str(path.relative_to(ebsd.root)) for path in paths}, found


@dataclass
class Memory:
    """What of a process's memory can be read, and which mappings cannot."""

    found: set[str]
    read: int = 0
    """Bytes."""
    refused: int = 0
    """Readable mappings of which the kernel gives nothing out."""
    secret: int = 0
    """Mappings of memfd_secret(2) among them."""


def search_memory(pid: int, wanted: dict[str, bytes]) -> Memory:
    """Search all readable mappings of a process through /proc/PID/mem, as a debugger reads them."""
    memory = Memory(set())
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            name = fields[5] if len(fields) > 5 else ""
            if not fields[1].startswith("r") or name.startswith("[v"):
                continue
            start, end = (int(number, 16) for number in fields[0].split("-"))
            try:
                mem.seek(start)
                content = b""
                while len(content) < end - start and (piece := mem.read(end - start - len(content))):
                    content += piece
            except OSError:
                memory.refused += 1
                memory.secret += "secretmem" in name
                continue
            memory.read += len(content)
            memory.found |= search(content, wanted)
    return memory


def everybody(ebsd: Installation) -> dict[str, int]:
    """Return role -> pid of the three processes of an installation with one attached volume."""
    return {role: pid for role, (pid,) in ebsd.processes().items()}


@dataclass
class Attached:
    ebsd: Installation
    mount: Path
    volume: str
    marker: bytes
    data_key: bytes
    pids: dict[str, int]

    @property
    def wanted(self) -> dict[str, bytes]:
        return needles(self.data_key, self.marker)


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attached]:
    """A mounted volume under a customer key, with the marker on it; ebsd was restarted while it was attached."""
    root = tmp_path_factory.mktemp("secrets")
    marker = f"marker {secrets.token_hex(24)} of a secret text".encode()
    mount = root / "mnt"
    with installation(root, prefix=PREFIX) as ebsd:
        ebsd.ok("key", "create", "mine")
        volume = ebsd.ok("create", "data", "--size", "64M", "--encrypted", "--key", "mine")
        ebsd.ok("attach", "data", "--mkfs", "ext4", "--mount", mount)
        with open(mount / "file", "wb") as file:
            file.write(marker * 500)
            file.flush()
            os.fsync(file.fileno())
        os.sync()
        pids = everybody(ebsd)
        yield Attached(ebsd, mount, volume, marker, decrypted_data_key(ebsd, volume), pids)


def decrypted_data_key(ebsd: Installation, volume: str) -> bytes:
    """Return the data key of a volume as its owner gets it: Decrypt of the wrapped key in the record."""
    wrapped = parse_record((ebsd.state / "records" / volume).read_bytes(), file="record").wrapped_key
    assert wrapped is not None
    client = Client(str(ebsd.socket))
    reply = client.call(
        client.keys_path,
        "io.ebsd.KMS.Decrypt",
        {"CiphertextBlob": base64.b64encode(wrapped.blob).decode(), "EncryptionContext": dict(wrapped.context)},
    )
    (descriptor,) = reply.descriptors
    try:
        key = os.pread(descriptor, 100, 0)
    finally:
        os.close(descriptor)
    assert len(key) == 64
    assert len(set(key)) > 20
    return key


# --- the searches themselves ---------------------------------------------------------------------------------


def test_every_form_of_a_secret_is_found_wherever_it_stands() -> None:
    secret = secrets.token_bytes(32)
    wanted = forms(secret)
    for before in range(7):
        for content, how in (
            (secret, "raw"),
            (secret.hex().encode(), "hex"),
            (secret.hex().upper().encode(), "HEX"),
            (base64.b64encode(bytes(before) + secret + b"behind"), "base64"),
            (base64.urlsafe_b64encode(bytes(before) + secret + b"behind"), "base64url"),
        ):
            assert any(name.startswith(how) for name in search(b"x" * before + content + b"y", wanted)), how
    assert not search(secrets.token_bytes(10_000), wanted)


def test_the_data_key_is_the_one_that_the_volume_is_encrypted_with(attached: Attached) -> None:
    from ebsd.crypto import record_mac
    from ebsd.crypto.secret import Secret

    signed = parse_record((attached.ebsd.state / "records" / attached.volume).read_bytes(), file="record").signed
    with Secret.from_buffer(attached.data_key) as key:
        record_mac.verify(key, signed[:256], signed[256:])
        with pytest.raises(record_mac.BadMac):
            record_mac.verify(key, bytes([signed[0] ^ 1]) + signed[1:256], signed[256:])


# --- files, arguments, environments --------------------------------------------------------------------------


def test_no_file_of_an_attached_volume_holds_the_text_or_the_key(attached: Attached) -> None:
    ebsd = attached.ebsd
    assert search(attached.mount.joinpath("file").read_bytes(), attached.wanted) == {"marker, raw"}
    block_file = (ebsd.runtime / "volumes" / attached.volume).read_bytes()
    assert search(block_file, attached.wanted) == {"marker, raw"}, "the decrypted view is where it must be found"
    searched, found = search_files(ebsd, attached.wanted)
    assert not found
    assert searched >= {
        "ebsd.log", "state/catalog.sqlite", "state/catalog.sqlite-wal", "keys/keys.sqlite", "keys/epoch",
        *(f"{place}/{attached.volume}" for place in ("state/records", "state/maps", "run/live")),
    }  # fmt: skip
    assert sum(path.startswith("state/layers/") for path in searched) == 2, "layer table and segment"
    _, found = search_files(ebsd, {"canary": attached.volume.encode()})
    assert {line.split("/")[-2] for line in found} >= {"records", "maps", "live"}
    assert f"{ebsd.log}: canary" in found


def test_no_process_is_given_a_secret_in_arguments_or_environment(attached: Attached) -> None:
    for role, pid in everybody(attached.ebsd).items():
        arguments, environment = (Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
        assert b"ebsd" in arguments, role
        assert b"PATH=" in environment, role
        assert not search(arguments + environment, attached.wanted), role
        if role != "daemon":
            assert attached.volume.encode() not in arguments + environment
            assert environment.count(b"\0") == 2, f"{role} was started with more than LANG and PATH"


# --- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["daemon", "broker", "volumes"])
def test_readable_memory_holds_neither_the_data_key_nor_its_halves(attached: Attached, role: str) -> None:
    keys = {name: needle for name, needle in attached.wanted.items() if not name.startswith("marker")}
    memory = search_memory(attached.pids[role], {**keys, "canary": attached.volume.encode()})
    assert memory.found == {"canary"}, f"{role}: {memory}"
    assert memory.read > 10 * MIB
    if role == "volumes":
        assert memory.secret >= 1, f"the page with the data key is ordinary memory: {memory}"


def test_the_memory_of_ebsd_holds_no_text_of_the_volume(attached: Attached) -> None:
    wanted = {**attached.wanted, "canary": attached.volume.encode()}
    assert search_memory(attached.pids["daemon"], wanted).found == {"canary"}
    assert search_memory(attached.pids["broker"], wanted).found == {"canary"}


def test_the_search_of_memory_finds_a_key_that_is_there(attached: Attached) -> None:
    program = "import sys; key = sys.stdin.buffer.read(64); print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(attached.data_key)
        holder.stdout.readline()
        found = search_memory(holder.pid, attached.wanted).found
        holder.stdin.close()
    assert {"data key, raw", "first half, raw", "second half, raw"} <= found


# --- dumps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["daemon", "broker", "volumes", "holders"])
def test_no_process_can_be_dumped(attached: Attached, role: str) -> None:
    pid = attached.pids[role]
    limits = Path(f"/proc/{pid}/limits").read_text()
    (core,) = (line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core == ["0", "0"]
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert status["Gid"].split() == [str(GROUP)] * 4
    assert os.stat(f"/proc/{pid}/mem").st_gid == 0, "the process is dumpable"
    if role != "daemon":  # which executes fusermount3, a setuid program, when it does not run as root
        assert status["NoNewPrivs"] == "1"


def test_of_a_dumpable_process_proc_shows_its_own_group() -> None:
    with subprocess.Popen([*PREFIX, "sleep", "60"]) as sleeper:
        try:
            while Path(f"/proc/{sleeper.pid}/comm").read_text() != "sleep\n":
                pass
            assert os.stat(f"/proc/{sleeper.pid}/mem").st_gid == GROUP
        finally:
            sleeper.kill()


# --- after the end -------------------------------------------------------------------------------------------


def test_neither_restarts_nor_detach_leave_the_text_or_the_key_anywhere(attached: Attached) -> None:
    ebsd = attached.ebsd
    ebsd.kill()
    ebsd.start()
    ebsd.ok("detach", "data")
    assert not search_files(ebsd, attached.wanted)[1]
    for role, pids in ebsd.processes().items():
        for pid in pids:
            assert not search_memory(pid, attached.wanted).found, role
    ebsd.stop()
    assert not search_files(ebsd, attached.wanted)[1]
    ebsd.start()
