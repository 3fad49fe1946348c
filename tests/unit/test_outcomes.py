"""Encryption outcomes: ebsd's tables are those that AWS publishes, combination by combination.

Every decision is compared with tests/published_outcomes.py, which was written from AWS's pages and not from the code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import published_outcomes
import pytest

from ebsd.domain.admission import Making, admit
from ebsd.domain.errors import EbsdError, ExitStatus, OperationNotPermitted
from ebsd.domain.ids import KeyArn
from ebsd.domain.outcomes import (
    COPY_SNAPSHOT,
    COPY_VOLUMES,
    CREATE_SNAPSHOT,
    CREATE_VOLUME,
    IMPORT_ARCHIVE,
    START_SNAPSHOT,
    Cell,
    Origin,
    Outcome,
    Parent,
    Source,
    decide_copy_snapshot,
    decide_create_snapshot,
    decide_create_volume,
    decide_import_archive,
    decide_start_snapshot,
    source_of,
)

OUTCOMES = {
    "U": Outcome.UNENCRYPTED,
    "DEF": Outcome.DEFAULT_KEY,
    "SAME": Outcome.SOURCE_KEY,
    "K": Outcome.NAMED_KEY,
}
REFUSALS = {
    "DEP": ("InvalidParameterDependency", "The parameter KmsKeyId requires the parameter Encrypted to be set."),
    "VAL": ("InvalidParameterValue", "a copy cannot be made unencrypted"),
    "VALIDATION": ("ValidationException", ""),
}

SOURCES = {
    "none": Source.NONE,
    "unencrypted, own": Source.PLAIN_SNAPSHOT,
    "unencrypted, another's": Source.SHARED_PLAIN_SNAPSHOT,
    "encrypted, own": Source.OWN_ENCRYPTED_SNAPSHOT,
    "encrypted, another's": Source.SHARED_ENCRYPTED_SNAPSHOT,
}


def check(decide: Callable[[], Outcome], expected: str) -> None:
    if expected in OUTCOMES:
        assert decide() is OUTCOMES[expected]
        return
    code, words = REFUSALS[expected]
    with pytest.raises(EbsdError) as caught:
        decide()
    assert (caught.value.code, caught.value.exit_status) == (code, ExitStatus.USAGE)
    assert words in caught.value.message
    assert caught.value.hint, "a refusal says what to do"


def test_the_60_combinations_of_create_volume() -> None:
    published = list(published_outcomes.combinations(published_outcomes.CREATE_VOLUME))
    assert len({row[:4] for row in published}) == len(list(product((0, 1), Source, published_outcomes.REQUESTS))) == 60
    for default, source, encrypted, key, expected in published:
        check(
            partial(
                decide_create_volume,
                encrypted=encrypted,
                key_named=key,
                source=SOURCES[source],
                encryption_by_default=default,
            ),
            expected,
        )


def test_the_48_combinations_of_copy_snapshot() -> None:
    published = list(published_outcomes.combinations(published_outcomes.COPY_SNAPSHOT))
    assert len({row[:4] for row in published}) == 48
    assert {SOURCES[row[1]] for row in published} == set(Source) - {Source.NONE}
    for default, source, encrypted, key, expected in published:
        check(
            partial(
                decide_copy_snapshot,
                encrypted=encrypted,
                key_named=key,
                source=SOURCES[source],
                encryption_by_default=default,
            ),
            expected,
        )


def test_the_36_combinations_of_start_snapshot() -> None:
    given = {"omitted": None, "true": True, "false": False}
    seen = set()
    for parent, encrypted, key, on, off in published_outcomes.rows(published_outcomes.START_SNAPSHOT):
        for default, expected in ((True, on), (False, off)):
            seen.add((parent, encrypted, key, default))
            check(
                partial(
                    decide_start_snapshot,
                    encrypted=given[encrypted],
                    key_named=key == "specified",
                    parent=Parent(parent),
                    encryption_by_default=default,
                ),
                expected,
            )
    assert len(seen) == 36


@pytest.mark.parametrize("default", [True, False])
def test_a_snapshot_is_encrypted_as_its_volume_whatever_the_default(default: bool) -> None:
    plain = decide_create_snapshot(volume_encrypted=False, encryption_by_default=default)
    assert plain is Outcome.UNENCRYPTED
    assert decide_create_snapshot(volume_encrypted=True, encryption_by_default=default) is Outcome.SOURCE_KEY


@pytest.mark.parametrize(
    ("default", "encrypted", "without_key"),
    [(False, False, "U"), (False, True, "SAME"), (True, False, "DEF"), (True, True, "SAME")],
)
def test_a_clone_is_what_a_restore_of_its_snapshot_is(default: bool, encrypted: bool, without_key: str) -> None:
    plain, named = COPY_VOLUMES[default, encrypted]
    assert (plain.result, named.result) == (OUTCOMES[without_key], Outcome.NAMED_KEY)
    source = source_of(encrypted=encrypted, own=True)
    for key, cell in ((False, plain), (True, named)):
        decided = decide_create_volume(
            encrypted=True if key else None, key_named=key, source=source, encryption_by_default=default
        )
        assert cell.result is decided


@pytest.mark.parametrize("default", [True, False])
def test_what_comes_from_an_archive_is_encrypted(default: bool) -> None:
    decide = partial(decide_import_archive, encryption_by_default=default)
    assert decide(key_named=False, is_incremental=False) is Outcome.DEFAULT_KEY
    assert decide(key_named=True, is_incremental=False) is Outcome.NAMED_KEY
    assert decide(key_named=False, is_incremental=True) is Outcome.SOURCE_KEY


def cells() -> list[Cell]:
    tables = (CREATE_VOLUME, COPY_SNAPSHOT, START_SNAPSHOT)
    return [
        *(cell for table in tables for row in table.values() for cell in row),
        *CREATE_SNAPSHOT.values(),
        *(cell for table in (COPY_VOLUMES, IMPORT_ARCHIVE) for row in table.values() for cell in row),
    ]


def test_every_cell_names_a_page_of_aws_or_says_why_ebsd_decides() -> None:
    assert len(cells()) == 60 + 48 + 36 + 4 + 8 + 4
    assert {cell.origin for cell in cells()} == set(Origin), "an origin that no cell has"
    for origin in Origin:
        assert "decision of ebsd: " in origin.value or "API reference" in origin.value or "https://" in origin.value


def test_nothing_encrypted_becomes_unencrypted() -> None:
    for (_, source), row in (*CREATE_VOLUME.items(), *COPY_SNAPSHOT.items()):
        if source in (Source.OWN_ENCRYPTED_SNAPSHOT, Source.SHARED_ENCRYPTED_SNAPSHOT):
            assert Outcome.UNENCRYPTED not in [cell.result for cell in row]
    for (default, parent), row in START_SNAPSHOT.items():
        if default or parent is Parent.ENCRYPTED:
            assert Outcome.UNENCRYPTED not in [cell.result for cell in row]


def test_kinds_of_sources() -> None:
    assert {source_of(encrypted=e, own=o) for e, o in product((True, False), repeat=2)} == set(Source) - {Source.NONE}
    assert source_of(encrypted=True, own=False) is Source.SHARED_ENCRYPTED_SNAPSHOT
    assert source_of(encrypted=False, own=False) is Source.SHARED_PLAIN_SNAPSHOT


@pytest.mark.parametrize("making", Making)
def test_unencrypted_is_admitted_only_where_the_installation_allows_it(making: Making) -> None:
    admit(making, None, allow_unencrypted=True)
    admit(making, KeyArn("arn:aws:kms:local:000000000000:key/1"), allow_unencrypted=False)
    with pytest.raises(OperationNotPermitted, match=f"The {making.value} would be unencrypted") as caught:
        admit(making, None, allow_unencrypted=False)
    assert "--encrypted" in caught.value.hint
