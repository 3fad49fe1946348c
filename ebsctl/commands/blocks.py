"""``ebsctl blocks``: list, changed, get, start, put, complete: snapshots block by block, for back-up tools."""

from __future__ import annotations

import base64
import hashlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import click

from ebsctl import render
from ebsctl.app import App, Group, UsageFailure, tag_list
from ebsctl.blocks import Blocks, batches
from ebsctl.lookup import complete_snapshot
from ebsctl.terminal import ProgressBar
from ebsd.domain.blocks import BLOCK, block_count
from ebsd.domain.units import parse_size

COMPLETION_PAUSE: Final = 1.0
"""Seconds before it is asked again whether a snapshot is complete."""

_ZEROS: Final = bytes(BLOCK)


@click.group(cls=Group, short_help="Snapshots block by block: list, changed, get, start, put, complete.")
def blocks() -> None:
    """Snapshots block by block (512 KiB), for back-up tools: the EBS direct APIs.

    \b
    A full copy of a snapshot in a file, brought up to date with a later one:
      ebsctl blocks get monday copy.img
      ebsctl blocks get tuesday copy.img --since monday
    And back into a snapshot:
      id=$(ebsctl blocks start --size 10G)
      ebsctl blocks complete "$id" --count "$(ebsctl blocks put "$id" copy.img)"
    """


@blocks.command("list", short_help="List the blocks of SNAPSHOT that hold data.")
@click.argument("snapshot", shell_complete=complete_snapshot)
@click.pass_obj
def list_blocks(app: App, snapshot: str) -> None:
    """List the numbers of the blocks of SNAPSHOT that hold data; block N begins at byte N * 524288."""
    pages = list(Blocks(app.client).pages("ListSnapshotBlocks", SnapshotId=snapshot))
    found = [block for page in pages for block in page["Blocks"]]
    rows = [[str(block["BlockIndex"])] for block in found]
    document = {**_without_token(pages[-1]), "Blocks": found}
    app.emit(document, render.table(["BLOCK"], rows, for_people=app.for_people))


@blocks.command("changed", short_help="List the blocks that differ between two snapshots.")
@click.argument("first", shell_complete=complete_snapshot)
@click.argument("second", shell_complete=complete_snapshot)
@click.option("--exact", is_flag=True, help="Read both, and leave out what was written with the same bytes.")
@click.pass_obj
def changed(app: App, first: str, second: str, exact: bool) -> None:
    """List the blocks that were written between the snapshots FIRST and SECOND, and which of both has data there.

    They must share a data key: snapshots of one volume, or of volumes made from its snapshots under the same key.
    """
    members: dict[str, Any] = {"FirstSnapshotId": first, "SecondSnapshotId": second, "Exact": True if exact else None}
    pages = list(Blocks(app.client).pages("ListChangedBlocks", **members))
    found = [block for page in pages for block in page["ChangedBlocks"]]
    rows = [[str(block["BlockIndex"]), _where(block)] for block in found]
    document = {**_without_token(pages[-1]), "ChangedBlocks": found}
    app.emit(document, render.table(["BLOCK", "DATA IN"], rows, for_people=app.for_people))


@blocks.command("get", short_help="Copy blocks of SNAPSHOT into FILE.")
@click.argument("snapshot", shell_complete=complete_snapshot)
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--since", metavar="SNAPSHOT", help="FILE is a copy of this one: bring it up to date.")
@click.option("--exact", is_flag=True, help="With --since: write only what really differs.")
@click.pass_obj
def get(app: App, snapshot: str, file: str, since: str | None, exact: bool) -> None:
    """Copy SNAPSHOT into FILE, which is made anew and has holes where the snapshot has; with --since, into an old copy.

    Every block is compared with its checksum. Prints how many blocks were written.

    \b
    Examples:
      ebsctl blocks get monday copy.img
      ebsctl blocks get tuesday copy.img --since monday
    """
    if exact and since is None:
        raise UsageFailure("--exact goes with --since.", "Without it, all blocks that hold data are written.")
    source = Blocks(app.client)
    wanted: Iterator[tuple[int, str | None]]
    if since is None:
        wanted = source.stored(snapshot)
        size = source.call("ListSnapshotBlocks", SnapshotId=snapshot, MaxResults=100)["SizeBytes"]
    else:
        wanted = source.changed(since, snapshot, exact=exact)
        size = source.call("ListChangedBlocks", FirstSnapshotId=since, SecondSnapshotId=snapshot, MaxResults=100)[
            "SizeBytes"
        ]
    flags = os.O_WRONLY | (os.O_CREAT | os.O_EXCL if since is None else 0)
    fd = os.open(file, flags | os.O_CLOEXEC, 0o600)
    bar = ProgressBar(wanted=not app.as_json, things="blocks")
    written = 0
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.ftruncate(fd, size)
        for batch in batches(wanted):
            stored = [(number, token) for number, token in batch if token is not None]
            data = dict(zip((n for n, _ in stored), source.read(snapshot, stored), strict=True)) if stored else {}
            for number, _ in batch:
                _write_at(fd, data.get(number, _ZEROS)[: max(0, size - number * BLOCK)], number * BLOCK)
            written += len(batch)
            bar.show(written, block_count(size))
        os.fsync(fd)
    finally:
        bar.clear()
        os.close(fd)
    app.emit({"SnapshotId": snapshot, "Blocks": written, "SizeBytes": size}, str(written))


@blocks.command("start", short_help="Begin a snapshot that is filled block by block.")
@click.option("--size", metavar="SIZE", required=True, help="Its size, for example 10G.")
@click.option("--parent", metavar="SNAPSHOT", help="Begin with the blocks of this one, under its key.")
@click.option("--name", metavar="NAME", help="Name of the snapshot.")
@click.option("--description", metavar="TEXT", help="What it is for.")
@click.option("--tag", "tags", multiple=True, metavar="K=V", help="Add a tag; may be repeated.")
@click.option("--encrypted/--no-encrypted", default=None, help="Encrypt it, or not; otherwise your defaults decide.")
@click.option("--key", metavar="ARN", help="Encrypt it under this key.")
@click.option("--timeout", type=int, metavar="MINUTES", help="Give it up after so long without a block (60).")
@click.option("--client-token", metavar="TEXT", help="Begin only one for all calls with this text.")
@click.pass_obj
def start(
    app: App,
    size: str,
    parent: str | None,
    name: str | None,
    description: str | None,
    tags: tuple[str, ...],
    encrypted: bool | None,
    key: str | None,
    timeout: int | None,
    client_token: str | None,
) -> None:
    """Begin a snapshot and print its id; it is pending until `ebsctl blocks complete`."""
    made = Blocks(app.client).call(
        "StartSnapshot",
        SizeBytes=int(parse_size(size)),
        ParentSnapshotId=parent,
        Name=name,
        Description=description,
        Tags=tag_list(tags),
        Encrypted=encrypted,
        KmsKeyArn=key,
        Timeout=timeout,
        ClientToken=client_token,
    )
    app.emit(made, made["SnapshotId"])


@blocks.command("put", short_help="Write blocks of FILE to a pending SNAPSHOT.")
@click.argument("snapshot", shell_complete=complete_snapshot)
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--block", "numbers", type=click.IntRange(0), multiple=True, metavar="N", help="Only this one; repeat.")
@click.option("--blocks-from", type=click.File("r"), metavar="LIST", help="Only those in this file, one a line.")
@click.pass_obj
def put(app: App, snapshot: str, file: str, numbers: tuple[int, ...], blocks_from: Any) -> None:
    """Write blocks of FILE, an image of a volume, to SNAPSHOT, and print how many.

    Without --block: all that are not zeros. Named ones are written whatever they hold. They are durable at the end;
    what was interrupted can be done again.
    """
    chosen: Sequence[int] | None = None
    if numbers or blocks_from is not None:
        try:
            listed = [] if blocks_from is None else [int(line) for line in blocks_from if line.strip()]
        except ValueError:
            raise UsageFailure(
                "--blocks-from has a line that is no number.", "It has one number in each line."
            ) from None
        chosen = sorted({*numbers, *listed})
    target = Blocks(app.client)
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    bar = ProgressBar(wanted=not app.as_json, things="blocks")
    aggregate = hashlib.sha256()
    written = 0
    try:
        total = block_count(os.lseek(fd, 0, os.SEEK_END))
        for batch in batches(_blocks_of(fd, total, chosen)):
            target.write(snapshot, batch)
            for _, data in batch:
                aggregate.update(hashlib.sha256(data).digest())
            written += len(batch)
            bar.show(batch[-1][0] + 1, total)
    finally:
        bar.clear()
        os.close(fd)
    checksum = base64.b64encode(aggregate.digest()).decode()
    app.emit({"SnapshotId": snapshot, "ChangedBlocksCount": written, "Checksum": checksum}, str(written))


@blocks.command("complete", short_help="Complete a snapshot whose blocks were written.")
@click.argument("snapshot", shell_complete=complete_snapshot)
@click.option("--count", type=int, required=True, metavar="N", help="How many blocks were written, in all.")
@click.option("--checksum", metavar="BASE64", help="SHA-256 of the digests of all written blocks, by their numbers.")
@click.pass_obj
def complete(app: App, snapshot: str, count: int, checksum: str | None) -> None:
    """Complete SNAPSHOT; from then on it is a snapshot like any other. Refused when count or checksum do not fit."""
    target = Blocks(app.client)
    members: dict[str, Any] = {"SnapshotId": snapshot, "ChangedBlocksCount": count, "Checksum": checksum}
    if checksum is not None:
        members |= {"ChecksumAlgorithm": "SHA256", "ChecksumAggregationMethod": "LINEAR"}
    while (reply := target.call("CompleteSnapshot", **members))["Status"] == "pending":
        time.sleep(COMPLETION_PAUSE)
    app.emit({"SnapshotId": snapshot, **reply}, reply["Status"])


def _blocks_of(fd: int, total: int, chosen: Sequence[int] | None) -> Iterator[tuple[int, bytes]]:
    """Yield (number, data) of the blocks to be written; a block that the file ends in is filled up with zeros."""
    for number in range(total) if chosen is None else chosen:
        data = b"".join(iter_pread(fd, number * BLOCK))
        data += bytes(BLOCK - len(data))
        if chosen is not None or data != _ZEROS:
            yield number, data


def iter_pread(fd: int, offset: int) -> Iterator[bytes]:
    """Yield what a file has from an offset on, up to a block of it."""
    left = BLOCK
    while left:
        part = os.pread(fd, left, offset + BLOCK - left)
        if not part:
            return
        left -= len(part)
        yield part


def _write_at(fd: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        done = os.pwrite(fd, rest, offset)
        rest, offset = rest[done:], offset + done


def _where(block: dict[str, Any]) -> str:
    first, second = "FirstBlockToken" in block, "SecondBlockToken" in block
    return "both" if first and second else "first" if first else "second" if second else "none"


def _without_token(page: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in page.items() if name != "NextToken"}
