"""The root of the leaves in a signed body: which layers it is over, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ebsd.domain.errors import IntegrityFailure
from ebsd.domain.ids import AccountId, LineageId, SnapshotId, VolumeId
from ebsd.domain.model import Cipher
from ebsd.store.leaftable import LeafSlot, leaf_root
from ebsd.store.signedrecord import NO_HASH, RecordState, SignedBody
from ebsd.volume.verify import Claim, check_leaf_root, covered_layers

LINEAGE = LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
VOLUME = VolumeId("vol-0123456789abcdef0")
SLOTS = {n: LeafSlot(n, bytes([n]) * 16, bytes([n]) * 32) for n in (1, 2, 3, 4)}
CLAIM = Claim(VOLUME, "000000001000", LINEAGE, 16 * 65536, 4, Cipher.AES_256_XTS, "arn")
BODY = SignedBody(
    RecordState.CLEAN, VOLUME, LINEAGE, AccountId("000000001000"), 16 * 65536, Cipher.AES_256_XTS, 2, 4, 4,
    bytes([2]) * 32, bytes([3]) * 32, leaf_root=leaf_root([SLOTS[1], SLOTS[3]]),
)  # fmt: skip


def entries(*values: int) -> memoryview:
    return memoryview(b"".join(value.to_bytes(4, "little") for value in values)).cast("I")


MAP = entries(1, 4, 0, 3)


def test_a_root_is_over_what_the_map_names_but_the_own_head():
    assert covered_layers(BODY, MAP) == {1, 3}
    snapshot = replace(BODY, resource=SnapshotId("snap-0123456789abcdef0"), head=0)
    assert covered_layers(snapshot, MAP) == {1, 3, 4}
    assert covered_layers(replace(BODY, leaf_root=NO_HASH), MAP) == set()
    assert covered_layers(None, MAP) == set()


def test_the_right_slots_are_accepted_and_say_that_a_root_covers_them():
    assert check_leaf_root(CLAIM, BODY, {1, 3}, SLOTS) is True
    assert check_leaf_root(CLAIM, replace(BODY, leaf_root=NO_HASH), set(), {}) is False
    assert check_leaf_root(CLAIM, None, set(), {}) is False
    empty = replace(BODY, leaf_root=leaf_root([]))
    assert check_leaf_root(CLAIM, empty, set(), {}) is True


@pytest.mark.parametrize("layer", [1, 3])
def test_a_missing_slot_is_named(layer):
    slots = {n: slot for n, slot in SLOTS.items() if n != layer}
    with pytest.raises(IntegrityFailure, match=f"{VOLUME} .* its leaf table lacks layer {layer}"):
        check_leaf_root(CLAIM, BODY, {1, 3}, slots)


@pytest.mark.parametrize("layer", [1, 3])
def test_another_digest_is_refused(layer):
    slots = {**SLOTS, layer: replace(SLOTS[layer], digest=bytes(32))}
    with pytest.raises(IntegrityFailure, match="the leaves of its layers are not those"):
        check_leaf_root(CLAIM, BODY, {1, 3}, slots)


def test_slots_of_two_layers_cannot_be_exchanged():
    slots = {1: replace(SLOTS[3], number=1), 3: replace(SLOTS[1], number=3)}
    with pytest.raises(IntegrityFailure, match="the leaves of its layers are not those"):
        check_leaf_root(CLAIM, BODY, {1, 3}, slots)
