"""What the copy worker refuses: each thing that could be exchanged in the store, and before any data is read."""

from __future__ import annotations

import base64
import os
from dataclasses import replace

import pytest
from test_copier_copying import (
    FROM,
    INTO,
    OWNER,
    PLAIN,
    SNAPSHOT,
    VOLUME,
    XTS,
    Rig,
    has_data,
    opened,
    wait_until_ended,
    worker,
)

from ebsd.domain.errors import RemoteError
from ebsd.domain.units import MIB
from ebsd.store.durablemap import FIRST_ENTRY
from ebsd.store.entries import map_hash
from ebsd.store.layertable import LayerEntry, LayerTable, encode_table
from ebsd.store.signedrecord import NO_HASH, RecordState, born

pytestmark = pytest.mark.trio
OTHER = "vol-99999999999999999"
OTHER_KEY = "arn:aws:kms:local:000000001000:key/00000000-0000-4000-8000-000000000000"


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def write_table(end, layers) -> None:
    table = end.table()
    encoded = encode_table(LayerTable(table.lineage, table.sector_size, table.cipher, tuple(layers)))
    (end.directory / "table").write_bytes(encoded)


def change_entry(rig: Rig, chunk_of, value: int) -> None:
    """Write a sealed map that is whole in itself and has another entry."""
    entries = memoryview(bytearray(rig.entries)).cast("I")
    entries[next(chunk for chunk, layer in enumerate(entries) if chunk_of(layer))] = value
    rig.write_map(entries)


def source_record(rig: Rig, signed: bytes, authority: bytes | None = None) -> None:
    rig.source.record = rig.source.make_record(signed, authority)


def authority_body(rig: Rig, **changes):
    body = rig.source.body(
        state=RecordState.CLEAN, resource=VOLUME, generation=6, head=rig.source.layers,
        map_hash=map_hash(rig.entries, rig.chunks),
    )  # fmt: skip
    return replace(body, **changes)


def with_authority(rig: Rig, **changes) -> None:
    source_record(rig, born(rig.source.body()), rig.source.sign(authority_body(rig, **changes)))


def clean_body(rig: Rig, **changes):
    return rig.source.body(
        **{
            "state": RecordState.CLEAN,
            "generation": 1,
            "map_hash": map_hash(rig.entries, rig.chunks),
            **changes,
        }
    )


def signed_by_another_key(rig: Rig) -> None:
    body = authority_body(rig)
    source_record(rig, born(rig.source.body()), replace(rig.source, key=os.urandom(64)).sign(body))


SOURCE = {
    # anchor and claim
    "an anchor of another resource": (lambda r: r.source.anchor.update(resource=OTHER), "answered for"),
    "an anchor of another owner": (lambda r: r.source.anchor.update(owner="000000002000"), "belongs to"),
    "an anchor of another key": (lambda r: r.source.anchor.update(key_arn=OTHER_KEY), "anchored to"),
    "an unencrypted anchor": (lambda r: r.source.anchor.update(encrypted=False), "unencrypted"),
    "another data key": (lambda r: setattr(r.source, "key", os.urandom(64)), "another data key"),
    "a claim of no encryption": (lambda r: r.source.claim.update(Cipher=2, KeyArn=None), "unencrypted"),
    "a claim of another owner": (lambda r: r.source.claim.update(Owner="000000002000"), "belongs to"),
    "a claim of another lineage": (
        lambda r: r.source.claim.update(Lineage="00000000-9dad-41d1-80b4-00c04fd430c8"), "lineage"
    ),
    "a claim of another size": (lambda r: r.source.claim.update(Size=4 * MIB), "bytes, but its record"),
    # the record
    "a record that is no base64": (lambda r: setattr(r, "encode", lambda record: "!"), "base64"),
    "a flipped bit of a clean record": (
        lambda r: source_record(r, flipped(r.source.sign(clean_body(r)), 140)), "signature"
    ),
    "a flipped bit of its MAC": (lambda r: source_record(r, flipped(r.source.sign(clean_body(r)), 300)), "signature"),
    "an open record": (
        lambda r: source_record(r, r.source.sign(clean_body(r, state=RecordState.OPEN, map_hash=NO_HASH))), "open"
    ),
    "a clean record of another map": (
        lambda r: source_record(r, r.source.sign(clean_body(r, map_hash=os.urandom(32)))), "map is not the one"
    ),
    "a clean record of another table": (
        lambda r: source_record(r, r.source.sign(clean_body(r, table_hash=os.urandom(32)))), "table is not the one"
    ),
    # the authority
    "no authority, but data": (lambda r: source_record(r, born(r.source.body())), "nobody has signed"),
    "a born authority, but data": (
        lambda r: source_record(
            r,
            born(r.source.body()),
            born(authority_body(r, state=RecordState.BORN, generation=0, map_hash=NO_HASH)),
        ),
        "nobody has signed",
    ),
    "an authority that is not named": (lambda r: r.source.claim.update(AuthorityIds=[OTHER]), "of which it was not"),
    "no authority named": (lambda r: r.source.claim.update(AuthorityIds=[]), "of which it was not"),
    "an authority under another key": (signed_by_another_key, "authority is not valid"),
    "a flipped bit of the authority": (
        lambda r: source_record(r, born(r.source.body()), flipped(r.source.sign(authority_body(r)), 88)),
        "authority is not valid",
    ),
    "an authority of another map": (lambda r: with_authority(r, map_hash=os.urandom(32)), "map is not the one"),
    "an authority of another table": (lambda r: with_authority(r, table_hash=os.urandom(32)), "table is not the one"),
    "an authority of another owner": (lambda r: with_authority(r, account="000000002000"), "owner"),
    "an authority of another lineage": (
        lambda r: with_authority(r, lineage="00000000-9dad-41d1-80b4-00c04fd430c8"), "lineage"
    ),
    "an authority of a larger volume": (lambda r: with_authority(r, size=64 * MIB), "but its authority"),
    "an authority of fewer layers": (
        lambda r: with_authority(r, table_count=1, table_hash=r.source.table().prefix_hash(1), head=1),
        "names the unknown layer",
    ),
    # the layer table
    "another uuid in the table": (
        lambda r: write_table(
            r.source, [replace(e, uuid=os.urandom(16)) if e.number == 2 else e for e in r.source.table().layers]
        ),
        "table is not the one",
    ),
    "a table that is too short": (lambda r: write_table(r.source, r.source.table().layers[:2]), "ends before"),
    "a table with a flipped bit": (
        lambda r: (r.source.directory / "table").write_bytes(
            flipped((r.source.directory / "table").read_bytes(), 70)
        ),
        "checksum",
    ),
    "a missing table": (lambda r: (r.source.directory / "table").unlink(), "missing"),
    # the map
    "a hole where data was": (lambda r: change_entry(r, bool, 0), "map is not the one"),
    "an entry of another layer": (lambda r: change_entry(r, lambda e: e == 1, 2), "map is not the one"),
    "an unknown layer": (lambda r: change_entry(r, bool, 99), "unknown layer"),
    "a reserved entry": (lambda r: change_entry(r, bool, 0xFFFFFFF0), "reserved"),
    "the map of another snapshot": (
        lambda r: r.write_map(r.entries, snapshot="snap-99999999999999999"), "is the map of"
    ),
    "a map of another lineage": (lambda r: r.write_map(r.entries, lineage=INTO), "another snapshot or lineage"),
    "a shorter map": (lambda r: r.write_map(r.entries[:-1]), "not that of a snapshot"),
    "a longer map": (
        lambda r: r.write_map(memoryview(bytearray((r.chunks + 1) * 4)).cast("I")), "more than"
    ),
    "a map cut short": (lambda r: os.truncate(r.map_path, 500), "too short"),
    "a map with a flipped bit": (
        lambda r: r.map_path.write_bytes(flipped(r.map_path.read_bytes(), 520)), "checksum"
    ),
    "an endless map": (lambda r: os.truncate(r.map_path, 1 << 40), "at most"),
}  # fmt: skip

TARGET = {
    "another data key": (lambda r: setattr(r.target, "key", os.urandom(64)), "another data key"),
    "an anchor of another resource": (lambda r: r.target.anchor.update(resource=OTHER), "answered for"),
    "an unencrypted anchor": (lambda r: r.target.anchor.update(encrypted=False), "unencrypted"),
    "an anchor of another key": (lambda r: r.target.anchor.update(key_arn=OTHER_KEY), "anchored to"),
    "a signed record": (
        lambda r: setattr(
            r.target,
            "record",
            r.target.make_record(r.target.sign(r.target.body(state=RecordState.OPEN, generation=1))),
        ),
        "no new resource",
    ),
    "an authority": (
        lambda r: setattr(
            r.target,
            "record",
            r.target.make_record(born(r.target.body()), r.source.sign(authority_body(r))),
        ),
        "no new resource",
    ),
    "two layers": (
        lambda r: write_table(
            r.target, [*r.target.table().layers, LayerEntry(2, os.urandom(16), VOLUME)]
        ),
        "exactly layer 1",
    ),
    "another layer": (
        lambda r: write_table(r.target, [LayerEntry(1, os.urandom(16), VOLUME)]), "table is not the one"
    ),
    "the lineage of the source": (lambda r: r.target.claim.update(Lineage=FROM), "of the lineage"),
    "less space than the source": (lambda r: r.target.claim.update(Size=4 * MIB), "cannot hold"),
    "more space than its record": (lambda r: r.target.claim.update(Size=16 * MIB), "bytes, but its record"),
    "another head": (lambda r: r.target.claim.update(Layer=2), "layer 2"),
    "a short segment": (lambda r: os.truncate(r.target_segment(), 7 * MIB), "wrong length|bytes, "),
    "a map that names other data": (lambda r: name_in_map(r, 1), "this copy does not write"),
    "a map of another layer": (lambda r: name_in_map(r, 2), "this copy does not write"),
    "no map": (lambda r: os.truncate(r.output, 0), "ends before"),
}  # fmt: skip


def name_in_map(rig: Rig, layer: int) -> None:
    """Enter a layer for a chunk of the destination: one that the copy leaves a hole, or that it names otherwise."""
    chunk = next(at for at, entry in enumerate(rig.entries) if bool(entry) is (layer != 1))
    with opened(rig.output, os.O_RDWR) as fd:
        os.pwrite(fd, layer.to_bytes(4, "little"), FIRST_ENTRY + chunk * 4)


async def refused(rig: Rig, code="Ebsd.IntegrityFailure") -> str:
    """Start, and return the message of the refusal; whoever read data meets files that are not there."""
    fds = set(os.listdir("/proc/self/fd"))
    for file in rig.source.directory.glob("*.000"):
        file.unlink()
    async with worker() as (channel, made):
        with pytest.raises(RemoteError) as caught:
            await rig.start(channel)
        assert caught.value.code == code, caught.value.message
        assert made._job is None
        assert made._copy is None
    with opened(rig.target_segment()) as fd:
        assert not any(has_data(fd, chunk) for chunk in range(rig.chunks))
    assert set(os.listdir("/proc/self/fd")) <= fds
    return caught.value.message


@pytest.mark.parametrize("case", SOURCE)
async def test_a_source_that_is_not_what_it_must_be(tmp_path, case):
    rig = Rig(tmp_path)
    tamper, reason = SOURCE[case]
    tamper(rig)
    message = await refused(rig)
    assert reason in message
    assert message.startswith(SNAPSHOT)
    assert ".." not in message


@pytest.mark.parametrize("case", TARGET)
async def test_a_destination_that_is_not_what_it_must_be(tmp_path, case):
    rig = Rig(tmp_path, kind="volume")
    tamper, reason = TARGET[case]
    if case == "a short segment":
        opened_before = rig.target_fds()
        rig.target_fds = lambda: opened_before
    tamper(rig)
    message = await refused(rig)
    assert any(each in message for each in reason.split("|")), message
    assert message.startswith(rig.target.id)


async def test_the_same_data_key_on_both_ends(tmp_path):
    rig = Rig(tmp_path)
    rig.target.key = rig.source.key
    rig.target.anchor["kcv"] = rig.source.anchor["kcv"]
    assert "data key is that of" in await refused(rig)


@pytest.mark.parametrize("end", ["source", "target"])
async def test_a_record_older_than_the_key_service_knows(tmp_path, end):
    rig = Rig(tmp_path)
    getattr(rig, end).anchor["floor"] = 1
    await refused(rig, "Ebsd.RecordTooOld")


async def test_an_unencrypted_source_that_is_encrypted_to_the_key_service(tmp_path):
    rig = Rig(tmp_path, source=PLAIN)
    rig.source.anchor |= {"encrypted": True, "key_arn": OTHER_KEY}
    assert "unencrypted" in await refused(rig)


async def test_a_plain_checksum_does_not_sign_an_encrypted_snapshot(tmp_path):
    rig = Rig(tmp_path)
    forged = replace(rig.source, cipher=PLAIN).sign(clean_body(rig))
    source_record(rig, forged)
    assert "signature" in await refused(rig)


async def test_a_session_that_refuses_is_told(tmp_path):
    rig = Rig(tmp_path)
    rig.target.anchor = {"nothing": 1, "encrypted": False}
    assert "not available" in await refused(rig, "KMSInternalException")


async def test_after_a_refusal_start_may_come_again(tmp_path):
    rig = Rig(tmp_path)
    rig.source.claim["Owner"] = "000000002000"
    async with worker() as (channel, _):
        with pytest.raises(RemoteError):
            await rig.start(channel)
        rig.source.claim["Owner"] = OWNER
        rig.check(await rig.copy(channel))


@pytest.mark.parametrize("done_through", [-1, 129])
async def test_an_impossible_done_through(tmp_path, done_through):
    rig = Rig(tmp_path)
    rig.done_through = done_through
    await refused(rig, "IncorrectState")


# --- what is not refused


async def test_layers_appended_since_and_a_torn_append_are_not_looked_at(tmp_path):
    rig = Rig(tmp_path)
    write_table(rig.source, [*rig.source.table().layers, LayerEntry(4, os.urandom(16), VOLUME)])
    with (rig.source.directory / "table").open("ab") as file:
        file.write(b"torn")
    rig.source.table = lambda: None  # the rig cannot read it any more
    async with worker() as (channel, _):
        rig.check(await rig.copy(channel))


async def test_a_snapshot_of_a_volume_that_grew_after_its_record(tmp_path):
    """The authority covers the smaller map; what lies behind it is holes, or it is refused."""
    grown = [1, 0, 2] * 10
    rig = Rig(tmp_path, entries=grown + [0] * 34, size=4 * MIB, layers=2)
    small = memoryview(bytearray(rig.entries))[: 32 * 4]
    with_authority(rig, size=2 * MIB, map_hash=map_hash(small, 32))
    async with worker() as (channel, _):
        rig.check(await rig.copy(channel))
    entries = memoryview(bytearray(rig.entries)).cast("I")
    entries[40] = 1
    rig.write_map(entries)
    assert "map is not the one" in await refused_again(rig)


async def refused_again(rig: Rig) -> str:
    rig.new_output()
    async with worker() as (channel, _):
        with pytest.raises(RemoteError) as caught:
            await rig.start(channel)
    return caught.value.message


async def test_an_open_authority_covers_structure_only(tmp_path):
    rig = Rig(tmp_path, signed="open")
    async with worker() as (channel, _):
        assert (await rig.start(channel))["Unverified"] is True
        await wait_until_ended(channel)
        answer = (await channel.request("finish", {}, deadline=20)).message
        rig.check(base64.b64decode(answer["Record"]))


async def test_an_open_authority_does_not_cover_a_layer_it_does_not_know(tmp_path):
    rig = Rig(tmp_path, signed="open")
    change_entry(rig, bool, 4)
    assert "unknown layer" in await refused(rig)


async def test_an_anchor_whose_key_was_never_seen(tmp_path):
    rig = Rig(tmp_path, target=XTS)
    rig.target.anchor["kcv"] = None
    async with worker() as (channel, _):
        rig.check(await rig.copy(channel))
