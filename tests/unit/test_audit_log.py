"""The audit log's files: what survives power cuts, full disks and restarts, and that every tampering is found."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kms_rig import memory_directory

from ebsd.domain.ids import AccountId
from ebsd.kms.audit import keys, space
from ebsd.kms.audit import log as log_module
from ebsd.kms.audit.lines import GENESIS, MAX_LINE, Head, parse_head, parse_line
from ebsd.kms.audit.log import AuditLog
from ebsd.kms.audit.reader import Query, read_page
from ebsd.kms.audit.verify import Report, Segment, VerificationKey, Verifier


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


def chain_record(name: str, details: dict[str, Any]) -> dict[str, Any]:
    return {"eventName": name, "userIdentity": {"type": "AWSService"}, "serviceEventDetails": details}


def event(number: int, **more: Any) -> dict[str, Any]:
    """Return a record whose fields stand for those that a real one has."""
    return {
        "userIdentity": {"type": "IAMUser", "accountId": "000000001001", "userName": "alice"},
        "eventTime": f"2026-01-02T03:04:{number % 60:02}.000Z",
        "eventName": "Decrypt",
        "errorCode": "AccessDeniedException",
        "requestParameters": {"encryptionContext": {"aws:ebs:id": f"vol-{number:017x}"}},
        "eventID": f"{number:032x}",
        **more,
    }


@dataclass
class Host:
    """One log and, outside of it, what left the host."""

    directory: Path
    segment_bytes: int = log_module.SEGMENT_BYTES
    written: int = 0
    log: AuditLog = field(init=False)
    key: bytes = b""

    def __post_init__(self) -> None:
        self.start()
        self.key = (self.directory / keys.VERIFICATION_KEY).read_bytes()
        keys.destroy(self.directory)

    def start(self) -> None:
        self.log = AuditLog(self.directory, chain_record, lambda: "T", segment_bytes=self.segment_bytes)
        self.log.open()

    def write(self, count: int) -> None:
        for _ in range(count):
            self.log.append([event(self.written)], sync=True)
            self.written += 1

    def die(self) -> None:
        """End as SIGKILL does: nothing is written any more."""
        descriptor = self.log._fd
        assert descriptor is not None
        os.close(descriptor)
        self.log._fd = None

    def verify(self, *heads: Head, keyed: bool = True, until: int | None = None) -> Report:
        key = VerificationKey(*keys.read_verification_key(bytearray(self.key))) if keyed else None
        return Verifier(heads, key, until=until).run(segments(self.directory))


def segments(directory: Path) -> list[Segment]:
    return [
        Segment(path.name, path.read_bytes().splitlines(keepends=True))
        for path in sorted(directory.glob("log-*.jsonl"))
    ]


def records_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["record"] for segment in segments(directory) for line in segment.lines]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "audit")


# --- chains and heads -------------------------------------------------------------------------------------


def test_a_log_of_several_chains_and_segments_is_intact(tmp_path: Path) -> None:
    host = Host(tmp_path / "audit", segment_bytes=3000)
    host.write(20)
    host.log.close()
    head = host.log.head
    host.start()
    host.write(20)
    host.log.close()
    report = host.verify(head, host.log.head)
    assert (report.findings, report.notes) == ([], [])
    assert report.heads_met == 2
    assert report.records == host.log.head.count == 40 + report.chains + 2
    assert len(segments(tmp_path / "audit")) > 5
    firsts = [json.loads(next(iter(segment.lines)))["record"]["eventName"] for segment in segments(host.directory)]
    assert set(firsts) == {"BeginAuditChain"}  # each segment can be verified by itself


def test_the_next_start_names_the_head_it_found(host: Host) -> None:
    host.write(3)
    host.log.close()
    head = host.log.head
    host.start()
    begin = records_of(host.directory)[-1]
    assert begin["eventName"] == "BeginAuditChain"
    assert begin["serviceEventDetails"]["previousHead"] == str(head)
    assert host.verify().notes == []


def test_a_broker_that_was_killed_is_told_of(host: Host) -> None:
    host.write(3)
    host.die()
    host.start()
    report = host.verify()
    assert report.findings == []
    assert "ended without closing its chain" in report.notes[0]


def test_no_key_of_the_past_is_left_on_the_host(host: Host) -> None:
    """The start key on the disk is the next one, and the first one is nowhere in the directory."""
    first = bytes.fromhex(host.key.decode().split()[1])[32:]
    private = bytes.fromhex(host.key.decode().split()[1])[:32]
    host.write(2)
    for path in host.directory.iterdir():
        content = path.read_bytes()
        for secret in (first, private):
            assert secret not in content
            assert secret.hex().encode() not in content
    slots = (host.directory / keys.STATE).read_bytes()
    assert slots[:512] == bytes(512)  # overwritten in place, not only forgotten
    assert slots[512:520] == b"EBSDAUDK"


def test_a_power_cut_while_the_start_key_moves_leaves_one_of_the_two(host: Host) -> None:
    path = host.directory / keys.STATE
    before = path.read_bytes()
    host.log.close()
    host.start()
    after = path.read_bytes()
    for cut in (before, before[:512] + after[512:] if after[:512] == bytes(512) else after[:512] + before[512:], after):
        path.write_bytes(cut)
        found = keys.load(host.directory)
        assert found is not None
        found.wipe()
    path.write_bytes(bytes(1024))
    assert keys.load(host.directory) is None


def test_a_lost_start_key_is_replaced_and_the_old_verification_key_says_so(host: Host) -> None:
    host.write(2)
    host.log.close()
    (host.directory / keys.STATE).unlink()
    host.start()
    assert records_of(host.directory)[-1]["serviceEventDetails"]["newKeys"] is True
    report = host.verify()
    assert "another key pair" in report.findings[0].what
    assert host.verify(keyed=False).findings == []


# --- what a crash leaves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [1, 70, 200, -1])
def test_a_record_cut_by_a_power_cut_is_set_aside_and_said(host: Host, left: int) -> None:
    host.write(4)
    head = host.log.head
    host.write(1)
    host.die()
    (path,) = host.log.segments()
    content = path.read_bytes()
    start = content.rindex(b"\n", 0, -1) + 1
    cut = content[: start + left] if left >= 0 else content[:-1]
    path.write_bytes(cut)
    assert "ends within this record" in host.verify().findings[0].what
    host.start()
    host.write(2)
    details = records_of(host.directory)[head.count]["serviceEventDetails"]
    assert details["cut"]["bytes"] == len(cut) - start
    assert details["previousHead"] == str(head)
    aside = host.directory / details["cut"]["file"]
    assert aside.read_bytes() == cut[start:]
    report = host.verify(head, host.log.head)
    assert report.findings == []
    assert any("set aside" in note for note in report.notes)


def test_zeros_that_a_power_cut_left_are_set_aside(host: Host) -> None:
    host.write(2)
    head = host.log.head
    host.die()
    (path,) = host.log.segments()
    with path.open("ab") as file:
        file.write(bytes(5000))
    host.start()
    assert host.log.head.count == head.count + 1
    assert host.verify(head).findings == []


def test_a_segment_that_was_only_begun_is_no_obstacle(host: Host) -> None:
    host.write(2)
    head = host.log.head
    host.die()
    empty = host.directory / "log-000000000000099.jsonl"
    empty.write_bytes(b"")
    torn = host.directory / "log-000000000000100.jsonl"
    torn.write_bytes(b'{"mac":"')
    host.start()
    assert not empty.exists()
    assert not torn.exists()
    assert records_of(host.directory)[head.count]["serviceEventDetails"]["previousHead"] == str(head)
    assert host.verify(head).findings == []


def test_records_that_were_changed_before_a_start_are_evidence_and_not_overwritten(host: Host) -> None:
    host.write(5)
    host.log.close()
    head = host.log.head
    (path,) = host.log.segments()
    forged = path.read_bytes().replace(b"alice", b"mally", 1)
    path.write_bytes(forged)
    host.start()
    (aside,) = host.directory.glob("cut-*")
    assert aside.read_bytes() in forged
    found = [finding.what for finding in host.verify(head, keyed=False).findings]
    assert found[0] == f"at this start the broker found records that had been changed: {aside.name}"
    assert found[-1] == f"the log ends after 3 records, but {head.count} are known: its end was cut off"


# --- full disks and failing ones --------------------------------------------------------------------------


def test_space_is_kept_for_what_was_admitted(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.log.make_room()
    assert host.log.has_room()

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(log_module, "allocate", full)
    admitted = 0
    while host.log.has_room():
        host.log.promise()
        admitted += 1
    assert admitted > 10
    with pytest.raises(OSError, match="full"):
        host.log.make_room()
    for _ in range(admitted):
        host.log.append([{"eventName": "x", "pad": "y" * (MAX_LINE - 2048)}], sync=True)
        host.log.redeem()
    assert host.log._size <= host.log._allocated
    assert host.verify().findings == []


def test_a_file_system_without_allocation_is_no_obstacle(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "_fallocate", lambda *_: -1)
    monkeypatch.setattr("ctypes.get_errno", lambda: errno.EOPNOTSUPP)
    host.log.make_room()
    host.write(1)
    monkeypatch.setattr("ctypes.get_errno", lambda: errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        space.allocate(0, 1)


@pytest.mark.parametrize("call", ["write_all", "fdatasync"])
def test_after_a_failed_write_a_new_chain_begins(host: Host, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host.write(2)
    head = host.log.head

    def failing(descriptor: int, content: bytes = b"") -> None:
        os.write(descriptor, content[:100])
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        if call == "write_all":
            patched.setattr(log_module, "write_all", failing)
        else:
            patched.setattr(os, "fdatasync", failing)
        with pytest.raises(OSError, match="full"):
            host.log.append([event(98)], sync=True)
    assert not host.log.has_room()
    host.write(2)
    names = [record["eventName"] for record in records_of(host.directory)]
    assert names == ["BeginAuditChain", "Decrypt", "Decrypt", "BeginAuditChain", "Decrypt", "Decrypt"]
    report = host.verify(head, host.log.head)
    assert (report.findings, report.notes) == ([], [])


def test_a_rotation_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path / "audit", segment_bytes=2000)
    monkeypatch.setattr(log_module, "_segment_name", lambda _number: "no/such/directory")
    host.write(20)
    assert len(host.log.segments()) == 1
    assert host.verify(host.log.head).findings == []


# --- tampering --------------------------------------------------------------------------------------------


def lines_of(directory: Path) -> list[bytes]:
    (path,) = sorted(directory.glob("log-*.jsonl"))
    return path.read_bytes().splitlines(keepends=True)


def put(directory: Path, lines: list[bytes]) -> None:
    (path,) = sorted(directory.glob("log-*.jsonl"))
    path.write_bytes(b"".join(lines))


def flips(line: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the line with a bit flipped in every field of it, and in its punctuation."""
    fields = (b'"mac":"', b'"n":', b'"prev":"', b'"record":{', b'"userIdentity":{', b'"accountId":"', b'"userName":"',
              b'"eventTime":"', b'"eventName":"', b'"errorCode":"', b'"aws:ebs:id":"', b'"eventID":"')  # fmt: skip
    for name in fields:
        for at in (line.index(name) + 1, line.index(name) + len(name)):
            yield name.decode(), line[:at] + bytes((line[at] ^ 1,)) + line[at + 1 :]


def test_a_bit_flipped_in_any_field_of_any_record_is_found(host: Host) -> None:
    host.write(6)
    lines = lines_of(host.directory)
    for at in (1, 3, len(lines) - 1):
        for name, flipped in flips(lines[at]):
            put(host.directory, [*lines[:at], flipped, *lines[at + 1 :]])
            public, keyed = host.verify(host.log.head, keyed=False), host.verify()
            for report in (public, keyed):
                assert report.findings, (at, name)
                assert report.findings[0].line in (at + 1, at + 2), (at, name, report.findings)
                assert report.findings[0].segment == "log-000000000000000.jsonl"


def test_a_bit_flipped_in_the_start_of_a_chain_is_found(host: Host) -> None:
    host.write(1)
    lines = lines_of(host.directory)
    for name in (b'"chain":"', b'"index":', b'"publicKey":"', b'"sealedKey":"', b'"startMac":"', b'"previousHead":"'):
        at = lines[0].index(name) + len(name)
        put(host.directory, [lines[0][:at] + bytes((lines[0][at] ^ 1,)) + lines[0][at + 1 :], *lines[1:]])
        assert host.verify().findings, name
        assert host.verify(host.log.head, keyed=False).findings, name


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "first removed": lambda lines: lines[1:],
    "first event removed": lambda lines: [lines[0], *lines[2:]],
    "middle removed": lambda lines: [*lines[:4], *lines[5:]],
    "two removed": lambda lines: [*lines[:4], *lines[6:]],
    "last removed": lambda lines: lines[:-1],
    "two exchanged": lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]],
    "one repeated": lambda lines: [*lines[:4], lines[3], *lines[4:]],
    "last repeated": lambda lines: [*lines, lines[-1]],
    "empty line": lambda lines: [*lines[:4], b"\n", *lines[4:]],
    "something else": lambda lines: [*lines[:4], b'{"n":4}\n', *lines[4:]],
    "newline removed": lambda lines: [*lines[:3], lines[3][:-1], *lines[4:]],
    "emptied": lambda _lines: [],
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_removal_repetition_and_move_is_found_and_named(host: Host, change: str) -> None:
    host.write(8)
    put(host.directory, CHANGES[change](lines_of(host.directory)))
    for keyed in (False, True):
        report = host.verify(host.log.head, keyed=keyed)
        assert report.findings, change
        assert report.findings[0].what


def test_what_is_found_says_what_and_where(host: Host) -> None:
    host.write(8)
    lines = lines_of(host.directory)
    put(host.directory, [*lines[:4], *lines[6:]])
    found = host.verify(keyed=False).findings[0]
    assert (found.segment, found.line, found.number) == ("log-000000000000000.jsonl", 5, 6)
    assert found.what == "2 records are missing before this one"
    put(host.directory, [*lines[:5], lines[3], *lines[5:]])
    found = host.verify(keyed=False).findings[0]
    assert (found.line, found.what) == (6, "record 3 stands where 5 belongs: repeated, moved or put in")
    put(host.directory, lines[:-3])
    found = host.verify(host.log.head, keyed=False).findings[0]
    assert found.what == "the log ends after 6 records, but 9 are known: its end was cut off"


def rehashed(lines: list[bytes]) -> list[bytes]:
    """Return the lines with numbers and hashes made to fit, as somebody does who can write the log but has no key."""
    head, fitted = Head(0, GENESIS), []
    for raw in lines:
        found = json.loads(raw)
        record = json.dumps(found["record"], separators=(",", ":"))
        line = f'{{"mac":"{found["mac"]}","n":{head.count},"prev":"{head.hash}","record":{record}}}'.encode()
        parsed = parse_line(line)
        assert parsed is not None
        head = parsed.head
        fitted.append(line + b"\n")
    return fitted


def test_history_that_was_written_anew_passes_without_a_head_and_fails_with_one_or_with_the_key(host: Host) -> None:
    """Exactly what the two levels promise: hashes alone say nothing when all of them were computed anew."""
    host.write(8)
    lines = lines_of(host.directory)
    put(host.directory, rehashed([*lines[:3], lines[3].replace(b"alice", b"mally"), *lines[4:]]))
    assert host.verify(keyed=False).findings == []
    assert "known head" in host.verify(host.log.head, keyed=False).findings[0].what
    found = host.verify().findings[0]
    assert (found.line, found.what) == (4, "the MAC of this record is not the broker's")
    put(host.directory, rehashed([*lines[:3], *lines[4:]]))
    assert host.verify(keyed=False).findings == []
    assert host.verify().findings


def test_root_after_the_fact_cannot_make_a_chain_anew(host: Host, tmp_path: Path) -> None:
    """He has all of the host: the log, the public key, the start key of the next chain. Not those of the past."""
    host.write(5)
    host.die()
    stolen = (host.directory / keys.STATE).read_bytes()
    for path in host.directory.iterdir():
        path.unlink()
    (host.directory / keys.STATE).write_bytes(stolen)
    forger = AuditLog(host.directory, chain_record, lambda: "T")
    forger.open()
    forger.append([event(0)], sync=True)
    # What he makes with the stolen start key is the second chain, and there is no first one.
    assert records_of(host.directory)[0]["serviceEventDetails"]["index"] == 1
    assert host.verify().findings[0].what == "1 chains that were begun before this record are missing"
    lines = lines_of(host.directory)
    put(host.directory, [lines[0].replace(b'"index":1', b'"index":0'), *lines[1:]])
    assert "MAC" in host.verify().findings[0].what


def test_a_tail_that_was_cut_off_with_a_chain_in_it_leaves_a_gap(host: Host) -> None:
    """Without any known head: what he cuts off, he cannot begin again."""
    host.write(3)
    host.log.close()
    (path,) = host.log.segments()
    before = path.read_bytes()
    host.start()
    host.write(2)
    host.log.close()
    path.write_bytes(before)
    host.start()
    assert host.verify(keyed=False).findings == []
    assert host.verify().findings[0].what == "1 chains that were begun before this record are missing"


def test_a_power_cut_after_the_first_record_of_a_chain_repeats_its_start_key(host: Host) -> None:
    host.write(2)
    host.log.close()
    state = host.directory / keys.STATE
    before = state.read_bytes()
    host.start()
    host.die()
    state.write_bytes(before)
    host.start()
    host.write(2)
    indexes = [record["serviceEventDetails"]["index"] for record in records_of(host.directory)
               if record["eventName"] == "BeginAuditChain"]  # fmt: skip
    assert indexes == [0, 1, 1]
    assert host.verify().findings == []


def test_a_start_key_that_was_put_back_is_found(host: Host) -> None:
    host.write(2)
    host.log.close()
    state = host.directory / keys.STATE
    before = state.read_bytes()
    for expected in ("", "had records already", "its MAC is another"):
        state.write_bytes(before)
        host.start()
        host.write(1)
        host.log.close()
        found = [finding.what for finding in host.verify().findings]
        assert (expected in found[-1]) if expected else not found


@pytest.mark.parametrize("call", ["save", "sync_directory"])
def test_a_start_that_fails_leaves_no_record_and_no_gap(host: Host, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host.write(1)
    host.log.close()

    def failing(*_args: object) -> None:
        raise OSError(errno.EIO, "failed")

    with monkeypatch.context() as patched:
        patched.setattr(keys.StartKey if call == "save" else log_module, call, failing)
        for _ in range(2):
            with pytest.raises(OSError, match="failed"):
                host.start()
    assert len(records_of(host.directory)) == 3
    host.start()
    host.write(1)
    report = host.verify(host.log.head)
    assert (report.findings, report.notes) == ([], [])


def test_a_chain_of_another_host_is_found(host: Host, tmp_path: Path) -> None:
    other = Host(tmp_path / "other")
    other.write(3)
    host.write(3)
    mine = lines_of(host.directory)
    put(host.directory, [*mine, *lines_of(other.directory)])
    assert "record 0 stands where 4 belongs" in host.verify(keyed=False).findings[0].what
    put(host.directory, lines_of(other.directory))
    assert host.verify(keyed=False).findings == []
    assert "another key pair" in host.verify().findings[0].what
    assert "known head" in host.verify(host.log.head, keyed=False).findings[0].what


def test_spliced_segments_are_found(tmp_path: Path) -> None:
    host = Host(tmp_path / "audit", segment_bytes=2500)
    host.write(24)
    paths = host.log.segments()
    assert len(paths) >= 4
    contents = [path.read_bytes() for path in paths]
    paths[1].write_bytes(contents[2])
    paths[2].write_bytes(contents[1])
    for keyed in (False, True):
        assert host.verify(keyed=keyed).findings[0].segment == paths[1].name
    paths[1].unlink()
    paths[2].write_bytes(contents[2])
    assert "missing" in host.verify(keyed=False).findings[0].what
    assert host.verify().findings


def test_older_segments_may_be_kept_elsewhere(tmp_path: Path) -> None:
    host = Host(tmp_path / "audit", segment_bytes=2500)
    host.write(24)
    first, *rest = host.log.segments()
    first.unlink()
    report = host.verify(host.log.head)
    assert report.findings == []
    assert report.notes == [f"records 0 to {int(rest[0].stem[4:]) - 1} are not here"]
    host.log.close()
    host.start()
    host.write(1)
    assert host.verify(host.log.head).findings == []


def test_what_a_running_broker_appends_meanwhile_is_left_out(host: Host) -> None:
    host.write(3)
    head = host.log.head
    host.write(2)
    report = host.verify(head, until=head.count)
    assert (report.findings, report.records, report.heads_met) == ([], head.count, 1)


def test_many_findings_are_counted_and_not_all_told(host: Host) -> None:
    host.write(30)
    put(host.directory, [line.replace(b"alice", b"mally") for line in lines_of(host.directory)])
    report = host.verify()
    assert len(report.findings) == 20
    assert report.more_findings == 39  # 30 MACs, and 29 hashes in the records after them
    assert report.members()["FurtherFindings"] == 39


# --- reading ----------------------------------------------------------------------------------------------


def full(number: int, account: str) -> dict[str, Any]:
    return event(
        number, userIdentity={"type": "IAMUser", "accountId": account}, recipientAccountId=account, resources=[]
    )


def pages(host: Host, query: Query, limit: int) -> Iterator[list[int]]:
    """Yield the numbers in the event ids of each page."""
    position, complete = None, False
    while not complete:
        page = read_page(host.log.segments(), position, host.log.head.count, query, limit)
        position, complete = page.position, page.complete
        yield [int(json.loads(text)["eventID"], 16) for _, text in page.records]


def test_pages_run_through_all_segments_and_each_sees_its_own(tmp_path: Path) -> None:
    host = Host(tmp_path / "audit", segment_bytes=2500)
    accounts = [AccountId(f"{1001 + number % 3:012}") for number in range(30)]
    for number, account in enumerate(accounts):
        host.log.append([full(number, account)], sync=True)
    assert len(host.log.segments()) > 4
    for limit in (1, 4, 200):
        for account in set(accounts):
            got = list(pages(host, Query(account=account), limit))
            assert [number for page in got for number in page] == [n for n in range(30) if accounts[n] == account]
            assert all(len(page) <= limit for page in got)
    resource = Query(account=accounts[7], resource=f"vol-{7:017x}")
    assert [number for page in pages(host, resource, 9) for number in page] == [7]
    later = Query(account=accounts[0], since="2026-01-02T03:04:20.000Z")
    assert [number for page in pages(host, later, 9) for number in page] == [21, 24, 27]


def test_what_is_being_written_is_not_read_yet_and_the_next_page_has_it(host: Host) -> None:
    host.log.append([full(0, "000000001001")], sync=True)
    query = Query(account=AccountId("000000001001"))
    first = read_page(host.log.segments(), None, host.log.head.count - 1, query, 9)
    assert (first.records, first.complete) == ((), True)
    (path,) = host.log.segments()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert read_page([path], first.position, host.log.head.count, query, 9).records == ()
    path.write_bytes(whole)
    page = read_page([path], first.position, host.log.head.count, query, 9)
    assert [number for number, _ in page.records] == [1]
    again = read_page([path], page.position, host.log.head.count, query, 9)
    assert (again.records, again.position) == ((), page.position)


def test_a_position_whose_segment_was_moved_away_goes_on_with_the_next(tmp_path: Path) -> None:
    host = Host(tmp_path / "audit", segment_bytes=2500)
    for number in range(20):
        host.log.append([full(number, "000000001001")], sync=True)
    query = Query(account=AccountId("000000001001"))
    page = read_page(host.log.segments(), None, host.log.head.count, query, 2)
    host.log.segments()[0].unlink()
    rest = read_page(host.log.segments(), page.position, host.log.head.count, query, 200)
    numbers = [int(json.loads(text)["eventID"], 16) for _, text in rest.records]
    assert numbers == list(range(numbers[0], 20))


# --- small parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "5", "x:" + "0" * 64, "5:" + "0" * 63, "5:" + "A" * 64, "-1:" + "0" * 64])
def test_what_is_no_head(text: str) -> None:
    with pytest.raises(ValueError, match="COUNT:HASH"):
        parse_head(text)


@pytest.mark.parametrize("text", [b"", b"ebsd-audit-key-1 00\n", b"ebsd-audit-key-1 " + b"g" * 128, b"0" * 200])
def test_what_is_no_verification_key(text: bytes) -> None:
    content = bytearray(text)
    with pytest.raises(ValueError, match="no verification key"):
        keys.read_verification_key(content)
    assert content == bytes(len(text))


def test_a_pair_of_a_user_that_looks_like_the_start_of_a_chain_is_none(host: Host) -> None:
    nested = chain_record("BeginAuditChain", {"reason": "start"})
    host.log.append([event(0, requestParameters={"encryptionContext": nested})], sync=True)
    report = host.verify()
    assert (report.findings, report.chains) == ([], 1)
