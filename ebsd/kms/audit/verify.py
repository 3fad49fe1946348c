"""Verification of an audit log, anywhere: by its hashes for everybody, by its MACs with the verification key.

1. *Public*: every record names the hash of the one before, so together with a known head (COUNT:HASH, from the
   journal) nothing up to that head can have been changed, removed, added, repeated or moved, nor cut off.
   Without a known head whoever may write the log may have made all of it anew.
2. *Keyed*: the start of each chain has a MAC under a start key that the host has forgotten, and each record one under a
   chain key that it has forgotten: what was written before somebody took the host over is what he could not rewrite.
   What he wrote himself afterwards, and a tail that he cut off behind the last known head, are not found.
Run as a program it reads a task from standard input and writes a report: ``ebsctl audit --verify`` starts it so.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final

from ebsd.crypto.kdf import LABEL_AUDIT, LABEL_AUDIT_START
from ebsd.crypto.ratchet import KEY_BYTES, Ratchet
from ebsd.crypto.seal import SealBroken
from ebsd.crypto.sealedbox import open_box, public_key
from ebsd.crypto.secret import Secret
from ebsd.kms.audit.keys import TEXT_BYTES, read_verification_key
from ebsd.kms.audit.lines import EMPTY, Head, Line, parse_head, parse_line
from ebsd.kms.audit.log import BEGIN, END, MISFIT, start_content

_MOST_STARTS: Final = 10_000_000
MAX_FINDINGS: Final = 20
"""What is told one by one; a log that is broken everywhere is broken enough."""


@dataclass(frozen=True, slots=True)
class Segment:
    name: str
    lines: Iterable[bytes]
    """With their newlines."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it was written, and where."""

    segment: str
    line: int
    """Counted from 1; 0 for the log as a whole."""
    number: int
    """Of the record."""
    what: str


@dataclass(slots=True)
class Report:
    findings: list[Finding] = field(default_factory=list)
    more_findings: int = 0
    notes: list[str] = field(default_factory=list)
    first: int = 0
    records: int = 0
    chains: int = 0
    head: Head = EMPTY
    keyed: bool = False
    heads_met: int = 0
    """Known heads that the log agrees with."""

    def members(self) -> dict[str, Any]:
        return {
            "Level": "keyed" if self.keyed else "public",
            "Intact": not self.findings,
            "FirstRecord": self.first,
            "Records": self.records,
            "Chains": self.chains,
            "Head": str(self.head),
            "KnownHeadsMet": self.heads_met,
            "Findings": [
                {"Segment": found.segment, "Line": found.line, "Record": found.number, "What": found.what}
                for found in self.findings
            ],
            "FurtherFindings": self.more_findings,
            "Notes": self.notes,
        }


class VerificationKey:
    """The private key and the start key that ``verification-key`` holds."""

    def __init__(self, private: Secret, start: Secret) -> None:
        self.private = private
        self.public = public_key(private)
        self._starts = Ratchet(start, LABEL_AUDIT_START)
        self._last: Ratchet | None = None
        """As ``_starts`` was before the last start: a power cut may have left that start key for the next one, too."""
        self.next_index = 0

    def start_mac(self, index: int, content: bytes) -> bytes | None:
        """Return the MAC of start ``index``; None for one before the last, and for numbers that nobody counts up to."""
        if index == self.next_index - 1 and self._last is not None:
            last, self._last = self._last, None
            return last.mac(content)
        if not 0 <= index - self.next_index <= _MOST_STARTS:
            return None
        while self.next_index < index:
            self._starts.mac(b"")
            self.next_index += 1
        with self._starts.key() as key:
            self._last = Ratchet(key, LABEL_AUDIT_START)
        self.next_index += 1
        return self._starts.mac(content)


class Verifier:
    """Goes through the lines of a log once."""

    def __init__(
        self, heads: Sequence[Head] = (), key: VerificationKey | None = None, *, until: int | None = None
    ) -> None:
        """``until``: the number of records to look at; what a running broker has appended since is left out."""
        self.report = Report(keyed=key is not None)
        self._heads = {head.count: head.hash for head in heads}
        self._key = key
        self._until = until
        self._expected: Head | None = None
        self._ratchet: Ratchet | None = None
        self._segment, self._line = "", 0
        self._ended = True
        self._in_chain = 0
        """Records of the present chain, its beginning included."""

    def run(self, segments: Iterable[Segment]) -> Report:
        for segment in segments:
            self._segment, self._line = segment.name, 0
            for raw in segment.lines:
                if self._until is not None and self.report.head.count >= self._until:
                    return self._finish()
                self._line += 1
                self._take(raw)
        return self._finish()

    def _take(self, raw: bytes) -> None:
        number = self.report.head.count
        if not raw.endswith(b"\n"):
            self._find(number, "the log ends within this record")
            return
        line = parse_line(raw[:-1])
        if line is None:
            self._find(number, "this is no record")
            return
        self._follow(line)
        begin = self._begin_of(line)
        if begin is not None:
            self._begin(line, begin)
        elif self.report.records:
            self._in_chain += 1
        else:
            self._find(line.number, "the log begins within a chain: the records before this one were removed")
        if self._key is not None:
            self._check_mac(line)
        self.report.records += 1
        self.report.head = self._expected = line.head
        known = self._heads.pop(line.head.count, None)
        if known is not None:
            if known != line.head.hash:
                self._find(
                    line.number, f"the log up to here has not the hash of the known head {line.head.count}:{known}"
                )
            else:
                self.report.heads_met += 1

    def _follow(self, line: Line) -> None:
        """Compare a line with the one before it."""
        if self._expected is None:
            self.report.first = line.number
            if line.number == 0 and line.prev != EMPTY.hash:
                self._find(0, "the first record of all names one before it")
            if line.number:
                self.report.notes.append(f"records 0 to {line.number - 1} are not here")
            return
        expected = self._expected
        if (line.number, line.prev) == (expected.count, expected.hash):
            return
        if line.number > expected.count:
            missing = line.number - expected.count
            what = f"{missing} record{'s are' if missing > 1 else ' is'} missing before this one"
        elif line.number < expected.count:
            what = f"record {line.number} stands where {expected.count} belongs: repeated, moved or put in"
        else:
            what = "the record before this one was changed, or this one belongs to another log"
        self._find(line.number, what)

    # --- chains ---------------------------------------------------------------------------------------------

    def _begin_of(self, line: Line) -> dict[str, Any] | None:
        """Return the details when the line begins a chain; notes whether it ends one."""
        if b'"serviceEventDetails":{' not in line.body:
            self._ended = False
            return None
        try:
            record = line.record()
            name, identity = record["eventName"], record["userIdentity"]
            details = record["serviceEventDetails"] if identity.get("type") == "AWSService" else None
        except (ValueError, KeyError, TypeError, AttributeError):
            self._ended = False
            return None
        if name == BEGIN and isinstance(details, dict):
            return details
        self._ended = name == END
        return None

    def _begin(self, line: Line, details: dict[str, Any]) -> None:
        self.report.chains += 1
        reason, cut = details.get("reason"), details.get("cut")
        if not self._ended and reason == "start":
            self.report.notes.append(
                f"the broker before record {line.number} ended without closing its chain: killed, a power cut, or "
                "records cut off; only a head known from elsewhere tells"
            )
        if isinstance(cut, dict) and cut.get("reason") == MISFIT:
            self._find(line.number, f"at this start the broker found records that had been changed: {cut.get('file')}")
        elif isinstance(cut, dict):
            self.report.notes.append(
                f"before record {line.number} the broker set aside {cut.get('bytes')} bytes in {cut.get('file')}"
            )
        self._ended = False
        if self._ratchet is not None:
            self._ratchet.wipe()
            self._ratchet = None
        if self._key is not None:
            self._ratchet = self._unseal(line, details, self._key)

    def _unseal(self, line: Line, details: dict[str, Any], key: VerificationKey) -> Ratchet | None:
        """Return the keys of a chain whose start is authentic."""
        try:
            content = start_content(details, Head(line.number, line.prev))
            sealed = base64.b64decode(details["sealedKey"], validate=True)
            public = base64.b64decode(details["publicKey"], validate=True)
            index, claimed = int(details["index"]), bytes.fromhex(details["startMac"])
        except (KeyError, ValueError, TypeError, AttributeError, binascii.Error):
            self._find(line.number, "the start of a chain is incomplete")
            return None
        if public != key.public:
            self._find(line.number, "a chain begins under another key pair: of another host, or made later")
            return None
        skipped, in_chain = index - key.next_index, self._in_chain
        self._in_chain = 1
        mac = key.start_mac(index, content + b"\0" + sealed)
        if mac is None or not hmac.compare_digest(mac, claimed):
            self._find(line.number, "the start of a chain is not the broker's: its MAC is another")
            return None
        if skipped < 0 and in_chain > 1:
            self._find(line.number, "a chain begins with the start key of the one before it, which had records already")
        elif skipped > 0 and (self.report.chains > 1 or not line.number):
            self._find(line.number, f"{skipped} chains that were begun before this record are missing")
        try:
            with open_box(key.private, aad=content, sealed=sealed) as secret:
                if len(secret) == KEY_BYTES:
                    return Ratchet(secret, LABEL_AUDIT)
        except SealBroken:
            pass
        self._find(line.number, "the key of a chain does not open")
        return None

    def _check_mac(self, line: Line) -> None:
        if self._ratchet is not None and not hmac.compare_digest(self._ratchet.mac(line.body).hex(), line.mac):
            self._find(line.number, "the MAC of this record is not the broker's")

    # --- result ---------------------------------------------------------------------------------------------

    def _find(self, number: int, what: str) -> None:
        if len(self.report.findings) < MAX_FINDINGS:
            self.report.findings.append(Finding(self._segment, self._line, number, what))
        else:
            self.report.more_findings += 1

    def _finish(self) -> Report:
        self._line = 0
        count = self.report.head.count
        for known in sorted(self._heads):
            if known > count:
                self._find(count, f"the log ends after {count} records, but {known} are known: its end was cut off")
            elif known and known > self.report.first:
                self._find(known - 1, f"record {known - 1} is not there, so the known head {known} cannot be compared")
            elif known:
                self.report.notes.append(f"the known head {known} is older than the records that are here")
        return self.report


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a segment with their newlines; one that is far too long is cut into several."""
    while raw := file.readline(1 << 20):
        yield raw


def main() -> int:
    """Verify what the task on standard input names: segments by descriptor, known heads, the descriptor of the key."""
    task = json.load(sys.stdin)
    key: VerificationKey | None = None
    if task.get("key") is not None:
        content = bytearray(TEXT_BYTES + 1)
        del content[os.readv(task["key"], [content]) :]
        try:
            key = VerificationKey(*read_verification_key(content))
        except ValueError as exc:
            json.dump({"Error": str(exc)}, sys.stdout)
            return 1
    heads = [parse_head(text) for text in task["heads"]]
    segments = (Segment(part["name"], lines_of(os.fdopen(part["fd"], "rb"))) for part in task["segments"])
    report = Verifier(heads, key, until=task.get("until")).run(segments)
    json.dump(report.members(), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
