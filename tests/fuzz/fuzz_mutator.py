"""Changes to bytes as damage and malice make them; the same dice give the same changes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

_WORDS: Final = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFF00, 0xFFFFFFFF,
                 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)  # fmt: skip
_TOKENS: Final = (b"\0", b'"', b"\\u0000", b"\\ud800", b"null", b"[[[[[[[[", b"{}", b"1e999", b"-1", b"true",
                  b",", b"\xff\xfe", b"*", b"9" * 30, b"../", b"\n")  # fmt: skip


def _flip(data: bytearray, dice: random.Random, others: Sequence[bytes]) -> None:
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _byte(data: bytearray, dice: random.Random, others: Sequence[bytes]) -> None:
    if data:
        data[dice.randrange(len(data))] = dice.randrange(256)


def _word(data: bytearray, dice: random.Random, others: Sequence[bytes]) -> None:
    width = dice.choice((1, 2, 4, 8))
    if len(data) >= width:
        at = dice.randrange(len(data) - width + 1)
        value = dice.choice(_WORDS) % (1 << 8 * width)
        data[at : at + width] = value.to_bytes(width, dice.choice(("little", "big")))


def _step(data: bytearray, dice: random.Random, others: Sequence[bytes]) -> None:
    """A number one up or down: lengths and counts."""
    width = dice.choice((1, 2, 4, 8))
    if len(data) >= width:
        at = dice.randrange(len(data) - width + 1)
        order = dice.choice(("little", "big"))
        value = int.from_bytes(data[at : at + width], order) + dice.choice((-1, 1))
        data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, order)


def _cut(data: bytearray, dice: random.Random, others: Sequence[bytes]) -> None:
    del data[dice.randrange(len(data) + 1) :]


def _remove(data: bytearray, dice: random.Random, others: Sequence[bytes]) -> None:
    at = dice.randrange(len(data) + 1)
    del data[at : at + dice.randrange(1, 33)]


def _repeat(data: bytearray, dice: random.Random, others: Sequence[bytes]) -> None:
    at = dice.randrange(len(data) + 1)
    data[at:at] = data[at : at + dice.randrange(1, 65)] * dice.randrange(1, 4)


def _token(data: bytearray, dice: random.Random, others: Sequence[bytes]) -> None:
    at = dice.randrange(len(data) + 1)
    data[at : at + dice.choice((0, 1, 4))] = dice.choice(_TOKENS)


def _splice(data: bytearray, dice: random.Random, others: Sequence[bytes]) -> None:
    other = dice.choice(others)
    at = dice.randrange(min(len(data), len(other)) + 1)
    data[at:] = other[at:]


def _zeros(data: bytearray, dice: random.Random, others: Sequence[bytes]) -> None:
    at = dice.randrange(len(data) + 1)
    length = min(dice.randrange(1, 257), len(data) - at)
    data[at : at + length] = bytes(length)


_CHANGES: Final[tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...]] = (
    _flip, _byte, _word, _step, _cut, _remove, _repeat, _token, _splice, _zeros
)  # fmt: skip


def changed(seeds: Sequence[bytes], dice: random.Random, longest: int) -> bytes:
    """Return one of the seeds with a few changes, of at most ``longest`` bytes (a seed may be longer)."""
    seed = dice.choice(seeds)
    data = bytearray(seed)
    for _ in range(dice.choice((1, 1, 1, 2, 3, 6))):
        dice.choice(_CHANGES)(data, dice, seeds)
    return bytes(data[: max(longest, len(seed))])
