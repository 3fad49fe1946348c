"""What reads and writes images, against sources that lie: descriptors, extents, streams, NBD servers and formats."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ebsctl.images import form_of, needs_more
from ebsd.control.importing import ImportRequest, sizes
from ebsd.control.volumes import CreateRequest
from ebsd.domain.errors import EbsdError, ImageChanged, ImageUnusable
from ebsd.domain.units import CHUNK, MIB, SECTOR
from ebsd.volume.image_source import FileSource, ImageSource, StreamSource, image_of, look_at
from ebsd.volume.nbd import Gone, NbdClient, NbdSource
from ebsd.volume.transfer import aligned_buffer


def spans(source: ImageSource) -> list[tuple[int, bytes]]:
    """Read a source to its end; return where each span began and what it held."""
    found, buffer = [], aligned_buffer()
    while (span := source.claim(buffer)) is not None:
        source.fill(span, buffer)
        found.append((span.start, bytes(buffer[: span.length])))
    source.check_end()
    return found


def assembled(found: list[tuple[int, bytes]], size: int) -> bytes:
    image = bytearray(size)
    for start, data in found:
        image[start : start + len(data)] = data
    return bytes(image)


# --- files


@pytest.mark.parametrize("seed", range(8))
def test_a_sparse_file_is_read_whole_and_its_holes_are_not(tmp_path: Path, seed: int) -> None:
    dice, path = random.Random(seed), tmp_path / "image"
    size = dice.choice((5 * MIB, 5 * MIB + 77, 4096, CHUNK + 1))
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(dice.randrange(5)):
            file.seek(dice.randrange(size))
            file.write(dice.randbytes(dice.randrange(1, 3 * CHUNK)))
        file.truncate(size)
    with path.open("rb") as file:
        source = image_of(file.fileno(), size, threading.Event())
        found = spans(source)
        assert assembled(found, size) == path.read_bytes()
        assert all(start % CHUNK == 0 for start, _ in found)
        assert sum(len(data) for _, data in found) == source.total
        again = image_of(file.fileno(), size, threading.Event())
        again.go_on_at(2 * CHUNK)
        assert [(s, d) for s, d in found if s >= 2 * MIB] == [(s, d) for s, d in spans(again) if s >= 2 * MIB]


class Lying(FileSource):
    """A file whose file system tells extents that make no sense."""

    answers: Callable[[int, int], int] = staticmethod(lambda offset, whence: offset)

    def _seek(self, offset: int, whence: int) -> int:
        return self.answers(offset, whence)


@pytest.mark.parametrize(
    "answers",
    [
        lambda offset, whence: offset,  # a hole at once: extents without bytes
        lambda offset, whence: 0,
        lambda offset, whence: -1,
        lambda offset, whence: offset - 4096,
    ],
)
def test_extents_that_make_no_sense_hide_no_data(tmp_path: Path, answers: Callable[[int, int], int]) -> None:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(3 * CHUNK))
    with path.open("rb") as file:
        lying = type("L", (Lying,), {"answers": staticmethod(answers)})
        source = lying(file.fileno(), look_at(file.fileno()), 3 * CHUNK)
        assert assembled(spans(source), 3 * CHUNK) == path.read_bytes()


def test_a_file_that_shrinks_is_not_filled_up_with_zeros(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(3 * MIB))
    with path.open("rb") as file:
        source = image_of(file.fileno(), 3 * MIB, threading.Event())
        os.truncate(path, MIB)
        with pytest.raises(ImageChanged):
            spans(source)


@pytest.mark.parametrize(
    "make", [lambda p: os.open(p, os.O_RDONLY), lambda p: os.open("/dev/null", os.O_RDONLY),
     lambda p: os.open(p / "f", os.O_WRONLY | os.O_CREAT)],
    ids=["directory", "character device", "write-only"],
)  # fmt: skip
def test_what_is_no_image_is_refused(tmp_path: Path, make: Callable[[Path], int]) -> None:
    fd = make(tmp_path)
    try:
        with pytest.raises(ImageUnusable):
            look_at(fd)
    finally:
        os.close(fd)


# --- streams


@pytest.mark.parametrize("size", [1, CHUNK, 2 * MIB, 5 * MIB + 3])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_stream_has_the_length_that_was_announced(size: int, more: int) -> None:
    data = random.Random(size).randbytes(size + more)
    reader, writer = os.pipe()

    def write() -> None:
        with open(writer, "wb", buffering=0) as pipe, contextlib.suppress(BrokenPipeError):
            view = memoryview(data)
            while len(view):
                view = view[pipe.write(view[:70001]) :]

    thread = threading.Thread(target=write)
    thread.start()
    try:
        source = image_of(reader, size, threading.Event())
        if more:
            with pytest.raises(ImageUnusable):
                spans(source)
        else:
            assert assembled(spans(source), size) == data
    finally:
        os.close(reader)
        thread.join(20)


def test_a_silent_stream_notices_that_it_is_stopped() -> None:
    reader, writer = os.pipe()
    stopping = threading.Event()
    try:
        source = StreamSource(reader, MIB, stopping)
        threading.Timer(0.1, stopping.set).start()
        assert source.claim(aligned_buffer()) is None
    finally:
        os.close(reader)
        os.close(writer)


# --- NBD


GREETING = b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3)


def reply(option: int, kind: int, body: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(body)) + body


NEGOTIATED = (
    GREETING + reply(8, 1) + reply(10, 4, struct.pack(">I", 7) + b"base:allocation") + reply(10, 1)
    + reply(7, 3, struct.pack(">HQH", 0, 4 * CHUNK, 1)) + reply(7, 1)
)  # fmt: skip


def chunk(kind: int, body: bytes, *, cookie: int = 1, flags: int = 1) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(body)) + body


@contextmanager
def served(answer: bytes) -> Iterator[Callable[[], NbdClient]]:
    """Serve fixed bytes, whatever is asked, and hang up."""
    ours, theirs = socket.socketpair()
    theirs.sendall(answer)
    theirs.shutdown(socket.SHUT_WR)
    clients: list[NbdClient] = []

    def make() -> NbdClient:
        clients.append(NbdClient(ours.fileno(), threading.Event()))
        return clients[0]

    try:
        yield make
    finally:
        for client in clients:
            client.close()
        ours.close()
        theirs.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"GET / HTTP/1.0\r\n\r\n",
        GREETING[:-1],
        b"NBDMAGIC" + b"\0\0\x42\x02\x81\x86\x12\x53" + bytes(200),  # the old style of the protocol
        GREETING + reply(8, 1) + reply(10, 1) + reply(7, 1 << 31 | 6),
        GREETING + struct.pack(">QIII", 1, 8, 1, 0),
        GREETING + struct.pack(">QIII", 0x3E889045565A9, 8, 1, 0xFFFFFFFF),
        GREETING + reply(8, 3) * 100,
    ],
)
def test_a_server_that_is_none_is_refused(answer: bytes) -> None:
    with served(answer) as connect, pytest.raises(OSError):
        connect()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        chunk(1, struct.pack(">Q", 0) + bytes(100)),  # too little
        chunk(1, struct.pack(">Q", 0) + bytes(CHUNK), cookie=2),
        chunk(1, struct.pack(">Q", CHUNK) + bytes(CHUNK)),  # another place
        chunk(1, struct.pack(">Q", 0) + bytes(2 * CHUNK)),  # more than was asked for
        chunk(2, struct.pack(">QI", 0, 0xFFFFFFFF)),
        chunk(5, struct.pack(">III", 7, CHUNK, 0)),
        chunk(1 << 15 | 1, struct.pack(">IH", 5, 0)),  # EIO
        struct.pack(">IIQ", 0x67446698, 5, 1),
        b"\0" * 100,
    ],
)
def test_an_answer_that_is_wrong_is_no_data(answer: bytes) -> None:
    with served(NEGOTIATED + answer) as connect:
        client = connect()
        assert client.size == 4 * CHUNK
        assert client.read_only is False
        with pytest.raises(OSError):
            client.read_into(0, aligned_buffer()[:CHUNK])


@pytest.mark.parametrize(
    "extents", [b"", struct.pack(">I", 8), struct.pack(">III", 8, CHUNK, 3), struct.pack(">III", 7, 0, 3)]
)
def test_a_status_that_is_wrong_is_no_hole(extents: bytes) -> None:
    with served(NEGOTIATED + chunk(5, extents)) as connect, pytest.raises(Gone):
        connect().status(0, CHUNK)


def test_an_image_that_is_served_with_another_size_is_refused() -> None:
    with served(NEGOTIATED) as connect, pytest.raises(ImageChanged):
        NbdSource(connect(), {}, 5 * CHUNK, dict)


# --- what ebsctl and ebsd decide


@pytest.mark.parametrize(
    ("head", "form"),
    [
        (b"QFI\xfb", "qcow2"), (b"KDMV", "vmdk"), (b"# Disk DescriptorFile\n", "vmdk"), (b"vhdxfile", "vhdx"),
        (bytes(64) + b"\x7f\x10\xda\xbe", "vdi"), (b"", "raw"), (bytes(512), "raw"), (b"\x7f\x10\xda\xbe", "raw"),
    ],
)  # fmt: skip
def test_formats_are_told_by_their_first_bytes(head: bytes, form: str) -> None:
    assert form_of(head) == form


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({}, ""),
        ({"format-specific": {"data": {"extents": [{"filename": "/me"}]}}}, ""),
        ({"backing-filename": "/etc/shadow"}, "backing file /etc/shadow"),
        ({"full-backing-filename": "nbd://host"}, "backing file nbd://host"),
        ({"format-specific": {"data": {"data-file": "/etc/shadow"}}}, "in the file /etc/shadow"),
        ({"format-specific": {"data": {"extents": [{"filename": "/me"}, {"filename": "/x"}]}}}, "in the file /x"),
        ({"encrypted": True}, "encrypted"),
        ({"format-specific": {"data": {"encrypt": {"format": "luks"}}}}, "encrypted"),
    ],
)
def test_an_image_that_needs_more_than_its_file_is_told(info: dict[str, Any], says: str) -> None:
    found = needs_more(info, "/me")
    assert found == says if not says else says in found


def request(size: int | None, served_bytes: int | None = None) -> ImportRequest:
    create = CreateRequest(
        name=None, size=size, size_gib=None, snapshot=None, encrypted=None, key=None, context={}, tags={}
    )
    return ImportRequest(create, served_bytes, detect_zeros=False)


FILE = {"Kind": "file", "Size": 2 * MIB + 1}


@pytest.mark.parametrize(
    ("found", "wanted", "volume", "image"),
    [
        (FILE, request(None), 2 * MIB + SECTOR, 2 * MIB + 1),
        (FILE, request(8 * MIB), 8 * MIB, 2 * MIB + 1),
        (FILE, request(None, 5 * MIB), 5 * MIB, 5 * MIB),
        ({"Kind": "device", "Size": 512}, request(None), MIB, 512),
        ({"Kind": "stream"}, request(3 * MIB + 1), 3 * MIB + SECTOR, 3 * MIB + 1),
        (FILE, request(2 * MIB), "InvalidParameterValue", None),
        ({"Kind": "stream"}, request(None), "MissingParameter", None),
        ({"Kind": "stream"}, request(MIB, MIB), "Ebsd.ImageUnusable", None),
        ({"Kind": "file", "Size": 0}, request(None), "Ebsd.ImageUnusable", None),
        ({"Kind": "file", "Size": 0}, request(MIB), "Ebsd.ImageUnusable", None),
        ({"Kind": "file", "Size": 1 << 60}, request(None), "InvalidParameterValue", None),
    ],
)
def test_sizes(found: dict[str, Any], wanted: ImportRequest, volume: int | str, image: int | None) -> None:
    if isinstance(volume, str):
        with pytest.raises(EbsdError) as caught:
            sizes(found, wanted)
        assert caught.value.code == volume
    else:
        size, bytes_of_image, notes = sizes(found, wanted)
        assert (size, bytes_of_image) == (volume, image)
        assert bool(notes) is (volume % MIB != 0 or image == 512)
