"""The head over all documents: kinds that came later may be missing in it, no other may."""

from __future__ import annotations

import pytest

from ebsd.domain.errors import IntegrityFailure
from ebsd.kms import documents
from ebsd.kms.documents import Entry, Head, ledger_digest, verify
from ebsd.kms.epoch import Epoch
from ebsd.kms.records import Kind

FIRST = [kind.value for kind in Kind if kind.value not in documents.LATER_KINDS]


def head_over(epoch: Epoch, kinds: list[str]) -> documents.Row:
    return documents._head_row(epoch, Head(1, 1, {kind: ledger_digest({}) for kind in kinds}))


def test_a_head_of_the_first_version_has_no_documents_of_later_kinds() -> None:
    epoch = Epoch.first()
    head = head_over(epoch, FIRST)
    assert set(verify(epoch, [head], {}).head.digests) == {kind.value for kind in Kind}
    for kind in documents.LATER_KINDS:
        with pytest.raises(IntegrityFailure, match=f"the ledger of {kind} documents is not the one"):
            verify(epoch, [head], {kind: {"*": Entry(1, bytes(32))}})


@pytest.mark.parametrize("kinds", [*([k for k in FIRST if k != gone] for gone in FIRST), [*FIRST, "future"]])
def test_a_head_with_other_kinds_is_refused(kinds: list[str]) -> None:
    epoch = Epoch.first()
    with pytest.raises(IntegrityFailure, match="other kinds of documents"):
        verify(epoch, [head_over(epoch, kinds)], {})
