"""Ciphertext: what lies in a layer is AES-256-XTS under the documented keys, computed here without any code of ours."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import XTS
from installation import Installation, installation

from ebsctl.client import Client

SECTOR = 4096
CHUNK = 65536
TIB = 1 << 40
SMALL = 64 << 20
LARGE = TIB + 16 * CHUNK
"""Just over a segment, so that the last sectors lie in another file under another key."""


@dataclass(frozen=True)
class Write:
    offset: int
    length: int


def writes(size: int) -> tuple[Write, ...]:
    return (
        Write(0, SECTOR),  # the first sector, in a chunk that nothing else writes
        Write(2 * CHUNK, CHUNK),  # a whole chunk
        Write(5 * CHUNK - 2 * SECTOR, 3 * CHUNK),  # more than one chunk, from sector to sector
        Write(10 * CHUNK + 1000, 3000),  # inside of a sector
        Write(12 * CHUNK + 100, 2 * CHUNK + 77),  # over chunks, not on sectors
        Write(12 * CHUNK + 50, 100),  # over what is there already
        Write(size - SECTOR, SECTOR),  # the last sector
    )


def derive(data_key: bytes, label: bytes, context: bytes) -> bytes:
    """SP 800-108 in counter mode with HMAC-SHA-512, 512 bits: a single block."""
    message = struct.pack(">I", 1) + label + b"\0" + context + struct.pack(">I", 512)
    return hmac.new(data_key, message, hashlib.sha512).digest()


def layer_key(data_key: bytes, layer: bytes, segment: int) -> bytes:
    return derive(data_key, b"ebsd/1/xts", layer + struct.pack(">III", segment, SECTOR, 1))


def decrypt_sector(key: bytes, number: int, stored: bytes) -> bytes:
    decryptor = Cipher(AES(key), XTS(number.to_bytes(16, "little"))).decryptor()
    return decryptor.update(stored) + decryptor.finalize()


def segments_of(ebsd: Installation, lineage: str) -> dict[int, tuple[bytes, Path]]:
    """Return segment -> (layer's id, path) from the file names: ``<number>-<id in hexadecimal>.<segment>``."""
    found = {}
    for path in (ebsd.state / "layers" / lineage).glob("*-*.[0-9][0-9][0-9]"):
        identity, segment = path.name.rsplit(".", 1)
        found[int(segment)] = (bytes.fromhex(identity.split("-")[1]), path)
    return found


def data_key(ebsd: Installation, record: Path) -> bytes:
    """Have the key service decrypt the wrapped key, found in the record's own JSON."""
    raw = record.read_bytes()
    start = raw.index(b'{"blob":')
    wrapped, _ = json.JSONDecoder().raw_decode(raw[start:].decode("utf-8", errors="replace"))
    client = Client(str(ebsd.socket))
    reply = client.call(
        client.keys_path,
        "io.ebsd.KMS.Decrypt",
        {"CiphertextBlob": wrapped["blob"], "EncryptionContext": wrapped["context"]},
    )
    (descriptor,) = reply.descriptors
    try:
        return os.pread(descriptor, 65, 0)
    finally:
        os.close(descriptor)


def write_patterns(device: str, size: int, seed: int) -> dict[int, bytes]:
    """Write through the device and return sector -> content of all that was touched."""
    source = random.Random(seed)
    sectors: dict[int, bytearray] = {}
    fd = os.open(device, os.O_RDWR)
    try:
        for write in writes(size):
            content = source.randbytes(write.length)
            assert os.pwrite(fd, content, write.offset) == write.length
            for at, byte in enumerate(content, write.offset):
                sectors.setdefault(at // SECTOR, bytearray(SECTOR))[at % SECTOR] = byte
        os.fsync(fd)
    finally:
        os.close(fd)
    return {number: bytes(content) for number, content in sectors.items()}


def data_ranges(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the parts of a file that are no holes."""
    with path.open("rb") as file:
        at = 0
        while True:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: none from here on
                return
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, at


def stored_chunks(path: Path) -> set[int]:
    return {chunk for start, end in data_ranges(path) for chunk in range(start // CHUNK, -(-end // CHUNK))}


@dataclass
class Written:
    """A detached volume of which it is known what was written on it."""

    ebsd: Installation
    size: int
    sectors: dict[int, bytes]
    segments: dict[int, tuple[bytes, Path]]
    record: Path

    @property
    def chunks(self) -> set[int]:
        return {number * SECTOR // CHUNK for number in self.sectors}

    def stored(self, sector: int) -> bytes:
        segment, offset = divmod(sector * SECTOR, TIB)
        with self.segments[segment][1].open("rb") as file:
            return os.pread(file.fileno(), SECTOR, offset)

    def content(self, sector: int) -> bytes:
        return self.sectors.get(sector, bytes(SECTOR))


def written_volume(ebsd: Installation, size: int, *options: str) -> Written:
    volume = ebsd.ok("create", f"c{size}{''.join(options)}".replace(" ", ""), "--size", str(size), *options)
    described = ebsd.ctl_json("attach", volume)
    sectors = write_patterns(described["Attachments"][0]["Device"], size, seed=size)
    ebsd.ok("detach", volume)
    lineage = described["DataEncryptionKeyId"] if described["Encrypted"] else ""
    return Written(
        ebsd, size, sectors, segments_of(ebsd, lineage or lineage_of(ebsd, volume)), ebsd.state / "records" / volume
    )


def lineage_of(ebsd: Installation, volume: str) -> str:
    """Return the lineage of a volume from the JSON in its record."""
    raw = (ebsd.state / "records" / volume).read_bytes()
    start = raw.index(b'{"account":')
    return json.JSONDecoder().raw_decode(raw[start:].decode("utf-8", errors="replace"))[0]["lineage"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installation(tmp_path_factory.mktemp("ciphertext"), settings="allow_unencrypted = true") as ebsd:
        ebsd.ok("key", "create", "mine")
        ebsd.ok("defaults", "disable-encryption")
        yield ebsd


@pytest.fixture(scope="module", params=[SMALL, LARGE], ids=["64 MiB", "over 1 TiB"])
def encrypted(request: pytest.FixtureRequest, running: Installation) -> Written:
    return written_volume(running, request.param, "--encrypted", "--key", "mine")


def test_every_sector_decrypts_to_what_was_written(encrypted: Written) -> None:
    key = data_key(encrypted.ebsd, encrypted.record)
    assert len(key) == 64
    keys = {segment: layer_key(key, layer, segment) for segment, (layer, _) in encrypted.segments.items()}
    compared = 0
    for chunk in sorted(encrypted.chunks):
        for sector in range(chunk * CHUNK // SECTOR, (chunk + 1) * CHUNK // SECTOR):
            if sector * SECTOR >= encrypted.size:
                continue
            segment = sector * SECTOR // TIB
            plain = decrypt_sector(keys[segment], sector, encrypted.stored(sector))
            assert plain == encrypted.content(sector), f"sector {sector}"
            compared += 1
    assert compared == len(encrypted.chunks) * CHUNK // SECTOR
    assert len(keys) == -(-encrypted.size // TIB)


def test_neither_key_nor_tweak_is_any_other(encrypted: Written) -> None:
    """A control: the comparison fails with the next sector's tweak, the next segment's key and the data key itself."""
    key = data_key(encrypted.ebsd, encrypted.record)
    last = encrypted.size // SECTOR - 1
    segment = last * SECTOR // TIB
    layer, _ = encrypted.segments[segment]
    stored, content = encrypted.stored(last), encrypted.content(last)
    own = layer_key(key, layer, segment)
    assert decrypt_sector(own, last, stored) == content
    for wrong_key, wrong_tweak in (
        (own, last + 1),
        (own, last * SECTOR % TIB // SECTOR if segment else last - 1),
        (layer_key(key, layer, segment + 1), last),
        (key, last),
    ):
        assert decrypt_sector(wrong_key, wrong_tweak, stored) != content


def test_chunks_that_were_not_written_are_holes_of_the_file(encrypted: Written) -> None:
    stored = set()
    allocated = 0
    for segment, (_, path) in encrypted.segments.items():
        stored |= {segment * TIB // CHUNK + chunk for chunk in stored_chunks(path)}
        allocated += path.stat().st_blocks * 512
    assert stored == encrypted.chunks
    # The host's file system may add blocks of its own for extents.
    assert len(encrypted.chunks) * CHUNK <= allocated <= len(encrypted.chunks) * CHUNK + 4 * SECTOR
    assert sum(path.stat().st_size for _, path in encrypted.segments.values()) == encrypted.size


def test_stored_sectors_look_like_noise(encrypted: Written) -> None:
    """No sector of a stored chunk is stored as it is, and none twice: not even those that hold zeros."""
    seen = set()
    for chunk in encrypted.chunks:
        for sector in range(chunk * CHUNK // SECTOR, (chunk + 1) * CHUNK // SECTOR):
            stored = encrypted.stored(sector)
            assert stored != encrypted.content(sector)
            assert len(set(stored)) > 200, f"sector {sector} is no ciphertext"
            seen.add(stored)
    assert len(seen) == len(encrypted.chunks) * CHUNK // SECTOR


# --- unencrypted volumes -------------------------------------------------------------------------------------


def test_an_unencrypted_volume_stores_plaintext_and_is_linked_apart(running: Installation) -> None:
    token = os.urandom(6).hex()
    volume = running.ok("create", f"plain-{token}", "--size", str(SMALL), "--no-encrypted")
    attached = running.ctl_json("attach", volume)
    assert not attached["Encrypted"]
    device = attached["Attachments"][0]["Device"]
    names = (volume, f"plain-{token}")
    for name in names:
        assert os.readlink(f"/dev/ebsd/unencrypted/{name}") == device
        assert not os.path.lexists(f"/dev/ebsd/{name}")
    sectors = write_patterns(device, SMALL, seed=3)
    running.ok("detach", volume)
    for name in names:
        assert not os.path.lexists(f"/dev/ebsd/unencrypted/{name}")
    ((_, path),) = segments_of(running, lineage_of(running, volume)).values()
    chunks = {number * SECTOR // CHUNK for number in sectors}
    assert stored_chunks(path) == chunks
    with path.open("rb") as file:
        for chunk in chunks:
            for sector in range(chunk * CHUNK // SECTOR, (chunk + 1) * CHUNK // SECTOR):
                assert os.pread(file.fileno(), SECTOR, sector * SECTOR) == sectors.get(sector, bytes(SECTOR))


def test_an_encrypted_volume_is_linked_where_unencrypted_ones_never_are(running: Installation) -> None:
    name = f"sealed-{os.urandom(6).hex()}"
    volume = running.ok("create", name, "--size", str(SMALL), "--encrypted")
    device = running.ok("attach", volume)
    for link in (name, volume):
        assert os.readlink(f"/dev/ebsd/{link}") == device
        assert not os.path.lexists(f"/dev/ebsd/unencrypted/{link}")
    running.ok("detach", volume)
    assert not any(os.path.lexists(f"/dev/ebsd/{link}") for link in (name, volume))


def test_without_the_setting_no_unencrypted_volume_is_made(ebsd: Installation) -> None:
    # With encryption by default it is encrypted all the same; without, it is refused.
    assert ebsd.ctl_json("create", "overruled", "--size", "64M", "--no-encrypted")["Encrypted"]
    ebsd.ok("delete", "overruled", "--yes")
    ebsd.ok("defaults", "disable-encryption")
    status, error = ebsd.refused("create", "plain", "--size", "64M", "--no-encrypted")
    assert (status, error["Code"]) == (4, "OperationNotPermitted")
    assert ebsd.ctl_json("list")["Volumes"] == []
    assert not list((ebsd.state / "layers").iterdir())
