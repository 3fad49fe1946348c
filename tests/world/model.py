"""The truth of a volume or snapshot: which bytes each block of 512 may hold, live, after a kill, after a power cut."""

from __future__ import annotations

from dataclasses import dataclass, field

BLOCK = 512


class Lost(AssertionError):
    """A block holds what it may not hold: data was lost, or came back, or is somebody else's."""


@dataclass
class _Version:
    value: bytes
    acknowledged: bool
    number: int


@dataclass
class Write:
    """A change under way; ``Truth.acknowledge`` ends it. One that never is may or may not have happened."""

    blocks: list[int] = field(default_factory=list)
    number: int = 0


class Truth:
    """Blocks of 512 bytes: the durable value, and every version since, acknowledged or not.

    *Live*, and after a kill of processes alone: the newest acknowledged version, or a later one. After a *power cut*:
    the durable value or any version since. A flush makes what was acknowledged before it began durable.
    """

    def __init__(self, size: int, content: bytes | bytearray | None = None) -> None:
        self.size = size
        self.base = bytearray(content if content is not None else bytes(size))
        self._versions: dict[int, list[_Version]] = {}
        """Block -> versions after ``base``, oldest first."""
        self._number = 0

    def copy(self, size: int | None = None) -> Truth:
        """Return what a snapshot of it shows, or a volume of ``size`` bytes made from it: its live values."""
        other = Truth(self.size, self.base)
        for block in self._versions:
            live = self._live(block)
            at = block * BLOCK
            other.base[at : at + BLOCK] = live[0]
            if len(live) > 1:  # a change that failed: nobody knows
                other._versions[block] = [_Version(value, False, 0) for value in live[1:]]
        if size is not None:
            other.grow(size)
        return other

    def grow(self, size: int) -> None:
        self.base.extend(bytes(size - self.size))
        self.size = size

    # --- changes

    def begin(self, offset: int, data: bytes) -> Write:
        """A write begins: from here on each of its blocks may hold the old or the new bytes."""
        self._number += 1
        write = Write(number=self._number)
        end = offset + len(data)
        for block in range(offset // BLOCK, -(-end // BLOCK)):
            at = block * BLOCK
            first, last = max(offset, at), min(end, at + BLOCK)
            part = data[first - offset : last - offset]
            line = self._versions.setdefault(block, [])
            for old in self._live(block) if len(part) < BLOCK else [b""]:
                value = old[: first - at] + part + old[last - at :]
                line.append(_Version(value, False, self._number))
            write.blocks.append(block)
        return write

    def acknowledge(self, write: Write) -> None:
        for block in write.blocks:
            for version in self._versions.get(block, []):
                if version.number == write.number:
                    version.acknowledged = True

    def flush_begins(self) -> int:
        """Return a mark: what was acknowledged by now is durable when this flush is answered."""
        return self._number

    def flushed(self, mark: int) -> None:
        for block, line in list(self._versions.items()):
            newest = max((v.number for v in line if v.acknowledged and v.number <= mark), default=None)
            if newest is None:
                continue
            same = [v for v in line if v.number == newest]
            later = [v for v in line if v.number > newest]
            self.base[block * BLOCK : (block + 1) * BLOCK] = same[0].value
            for variant in same[1:]:  # which one became durable nobody knows
                variant.acknowledged = False
            rest = same[1:] + later
            if rest:
                self._versions[block] = rest
            else:
                del self._versions[block]

    # --- questions

    def _live(self, block: int) -> list[bytes]:
        """The newest acknowledged version (all variants of it), and everything later."""
        line = self._versions.get(block, [])
        newest = max((v.number for v in line if v.acknowledged), default=None)
        if newest is None:
            return [bytes(self.base[block * BLOCK : (block + 1) * BLOCK]), *(v.value for v in line)]
        return [v.value for v in line if v.number >= newest]

    def _after_cut(self, block: int) -> list[bytes]:
        base = bytes(self.base[block * BLOCK : (block + 1) * BLOCK])
        return [base, *(v.value for v in self._versions.get(block, []))]

    def content(self) -> bytes:
        """Return the live bytes; only while no change failed."""
        content = bytearray(self.base)
        for block in self._versions:
            content[block * BLOCK : (block + 1) * BLOCK] = self._live(block)[-1]
        return bytes(content)

    def cut(self) -> None:
        """The power went: whatever may be there after it is live now, and nobody knows which."""
        for line in self._versions.values():
            for version in line:
                version.acknowledged = False

    def check(self, content: bytes, what: str, *, offset: int = 0, after_cut: bool = False) -> None:
        """Raise Lost unless the bytes at ``offset`` (whole blocks) may be read there."""
        allowed = self._after_cut if after_cut else self._live
        first = offset // BLOCK
        wanted_bytes = self.base[offset : offset + len(content)]
        for block in self._versions:
            at = block * BLOCK - offset
            if 0 <= at < len(content):
                values = allowed(block)
                got = content[at : at + BLOCK]
                wanted_bytes[at : at + BLOCK] = got if got in values else values[0]
        if wanted_bytes != content:
            bad = [
                first + at // BLOCK
                for at in range(0, len(content), BLOCK)
                if content[at : at + BLOCK] != wanted_bytes[at : at + BLOCK]
            ]
            block = bad[0]
            at = (block - first) * BLOCK
            wanted = " or ".join(value[:8].hex() for value in allowed(block))
            raise Lost(
                f"{what}: {len(bad)} wrong blocks, the first at byte {block * BLOCK} (chunk {block // 128}): "
                f"{content[at : at + 8].hex()} instead of {wanted}"
            )

    def settle(self, content: bytes) -> None:
        """What was read is what it is from now on, durable: after a recovery, whose reading was checked."""
        self.__init__(self.size, content)  # type: ignore[misc]


__all__ = ["BLOCK", "Lost", "Truth", "Write"]
