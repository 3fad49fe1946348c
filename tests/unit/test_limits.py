"""Limits of accounts: the rule, the configuration that sets it, and the transactions that it is judged in."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from ebsd.control.catalogue import Catalogue
from ebsd.daemon.config import load
from ebsd.domain.errors import ConfigurationError, EbsdError, ExitStatus
from ebsd.domain.ids import AccountId, JobId, LineageId, SnapshotId, VolumeId, account_of_uid
from ebsd.domain.limits import AccountLimits, Counted
from ebsd.domain.model import Cipher, Integrity, Job, Lineage, Modification, Snapshot, Volume
from ebsd.domain.states import JobKind, JobState, ModificationState, SnapshotState, VolumeState
from ebsd.store.catalog import Catalog, Transaction

ALICE, BOB = account_of_uid(1001), account_of_uid(1002)
MIB = 1 << 20
LINEAGE = LineageId("3c5ff022-21c3-4d47-9af3-cb1d88279c4f")
CODES = {
    Counted.VOLUMES: "VolumeLimitExceeded",
    Counted.VOLUME_BYTES: "VolumeLimitExceeded",
    Counted.SNAPSHOTS: "SnapshotLimitExceeded",
    Counted.JOBS: "ResourceLimitExceeded",
}


# --- the rule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", Counted)
def test_a_limit_can_be_reached_and_not_passed(counted: Counted) -> None:
    limits = AccountLimits(everybody={counted: 5})
    limits.check(ALICE, counted, 5)
    with pytest.raises(EbsdError) as caught:
        limits.check(ALICE, counted, 6)
    assert (caught.value.code, caught.value.exit_status) == (CODES[counted], ExitStatus.CONFLICT)
    assert "5" in caught.value.message
    assert "ebsctl" in caught.value.hint
    for other in set(Counted) - {counted}:
        limits.check(ALICE, other, 1 << 60)


def test_a_users_own_limit_takes_the_place_of_everybodys_and_administrators_have_none() -> None:
    limits = AccountLimits(
        everybody={Counted.VOLUMES: 2, Counted.JOBS: 1},
        users={1001: {Counted.VOLUMES: 3}},
        administrators=frozenset({0, 1002}),
    )
    assert limits.of(ALICE) == {Counted.VOLUMES: 3, Counted.JOBS: 1}
    assert limits.of(account_of_uid(1003)) == {Counted.VOLUMES: 2, Counted.JOBS: 1}
    assert limits.of(BOB) == limits.of(account_of_uid(0)) == {}


def test_who_may_create() -> None:
    limits = AccountLimits(creators=frozenset({1001}))
    for counted in Counted:
        limits.check(ALICE, counted, 1)
        limits.check(account_of_uid(0), counted, 1)
    for counted in (Counted.VOLUMES, Counted.SNAPSHOTS):
        with pytest.raises(EbsdError, match="may make no volumes and no snapshots") as caught:
            limits.check(BOB, counted, 1)
        assert (caught.value.code, caught.value.exit_status) == ("UnauthorizedOperation", ExitStatus.DENIED)
    limits.check(BOB, Counted.VOLUME_BYTES, 1)  # what he has may grow


# --- the configuration ------------------------------------------------------------------------------------


def limits_of(tmp_path: Path, text: str) -> AccountLimits:
    file = tmp_path / "ebsd.toml"
    file.write_text(text)
    return load(file=file, state_dir=tmp_path, runtime_dir=tmp_path, uid=0, environment={}).limits


def test_without_a_table_there_are_no_limits(tmp_path: Path) -> None:
    assert limits_of(tmp_path, "") == AccountLimits()


def test_the_table_is_read(tmp_path: Path) -> None:
    me = pwd.getpwuid(os.getuid())
    group = grp.getgrgid(me.pw_gid).gr_name
    limits = limits_of(
        tmp_path,
        f"""
        [accounts]
        create = [1001, "1002", "@{group}"]
        volumes = 3
        volume_bytes = "2G"
        jobs = 0
        [accounts.users.{me.pw_name}]
        snapshots = 7
        [accounts.users.1002]
        volume_bytes = 4096
        """,
    )
    assert limits.everybody == {Counted.VOLUMES: 3, Counted.VOLUME_BYTES: 2 << 30, Counted.JOBS: 0}
    assert limits.users == {me.pw_uid: {Counted.SNAPSHOTS: 7}, 1002: {Counted.VOLUME_BYTES: 4096}}
    assert limits.creators is not None
    assert limits.creators >= {1001, 1002, me.pw_uid}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("volumes = -1", "accounts.volumes: it is a number from 0"),
        ('volumes = "3"', "accounts.volumes"),
        ('volume_bytes = "much"', "accounts.volume_bytes"),
        ('create = ["no-such-user-of-this-host"]', "no user of this host"),
        ('create = ["@no-such-group-of-this-host"]', "no group of this host"),
        ("create = [-1]", "is no uid"),
        ("volume = 3", "unknown field"),
        ("[accounts.users.no-such-user-of-this-host]\nvolumes = 1", "no user of this host"),
    ],
)
def test_what_is_wrong_in_it_is_told(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        limits_of(tmp_path, f"[accounts]\n{text}\n")


# --- transactions -----------------------------------------------------------------------------------------


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    made = Catalog(tmp_path / "catalog")
    made.run(lambda t: t.add_lineage(Lineage(LINEAGE, ALICE, 4096, Cipher.NONE)))
    yield made
    made.close()


def limited(catalog: Catalog, **limits: int) -> Catalogue:
    everybody = {Counted(name): most for name, most in limits.items()}
    return Catalogue(catalog, None, AccountLimits(everybody=everybody))  # type: ignore[arg-type]


def volume(number: int, account: AccountId = ALICE, size: int = MIB) -> Volume:
    ident = VolumeId(f"vol-{number:017x}")
    return Volume(
        id=ident, account=account, owner="a", name=f"v{number}", size=size, state=VolumeState.CREATING,
        cipher=Cipher.NONE, key_arn=None, wrapped_key=None, context={}, lineage=LINEAGE, head=1, snapshot=None,
        attach_generation=0, integrity=Integrity.NEW, authority=None,
        created="2026-01-01T00:00:00Z", reason="", tags={},
    )  # fmt: skip


def snapshot(number: int, account: AccountId = ALICE) -> Snapshot:
    ident = SnapshotId(f"snap-{number:017x}")
    return Snapshot(
        id=ident, account=account, owner="a", name=f"s{number}", volume=VolumeId("vol-00000000000000001"), size=MIB,
        state=SnapshotState.PENDING, message="", description="", cipher=Cipher.NONE, key_arn=None, wrapped_key=None,
        context={}, lineage=LINEAGE, new_head=0, integrity=Integrity.NEW, authority=None, pause_us=None,
        started="2026-01-01T00:00:00Z", completed=None, tags={},
    )  # fmt: skip


def job(number: int, state: JobState = JobState.RUNNING) -> Job:
    return Job(
        id=JobId(f"job-{number:017x}"), account=ALICE, owner="a", kind=JobKind.COPY_SNAPSHOT, state=state,
        source="snap-1", destination="snap-2", total=0, done=0, done_through=0, started="2026-01-01T00:00:00Z",
        ended=None, error=None,
    )  # fmt: skip


def growth(number: int, target: int, state: ModificationState = ModificationState.MODIFYING) -> Modification:
    ident = VolumeId(f"vol-{number:017x}")
    return Modification(ident, state, MIB, target, "2026-01-01T00:00:00Z", None, "")


async def refused(catalogue: Catalogue, code: str, change: Callable[[Transaction], object]) -> None:
    before = await catalogue.run(lambda t: [t.used(ALICE, counted) for counted in Counted])
    with pytest.raises(EbsdError) as caught:
        await catalogue.run(change)
    assert caught.value.code == code
    assert await catalogue.run(lambda t: [t.used(ALICE, counted) for counted in Counted]) == before


@pytest.mark.trio
async def test_the_transaction_that_adds_too_much_leaves_nothing(catalog: Catalog) -> None:
    catalogue = limited(catalog, volumes=2, volume_bytes=4 * MIB, snapshots=1, jobs=1)
    await catalogue.run(lambda t: t.add_volume(volume(1)))
    await refused(catalogue, "VolumeLimitExceeded", lambda t: t.add_volume(volume(2, size=4 * MIB)))
    await catalogue.run(lambda t: t.add_volume(volume(2, size=3 * MIB)))
    await refused(catalogue, "VolumeLimitExceeded", lambda t: t.add_volume(volume(3)))
    await catalogue.run(lambda t: t.add_snapshot(snapshot(1)))
    await refused(catalogue, "SnapshotLimitExceeded", lambda t: t.add_snapshot(snapshot(2)))
    await catalogue.run(lambda t: t.put_job(job(1)))
    await refused(catalogue, "ResourceLimitExceeded", lambda t: t.put_job(job(2)))
    await catalogue.run(lambda t: t.add_volume(volume(9, BOB)))  # another account's own


@pytest.mark.trio
async def test_one_of_several_that_go_together_is_enough(catalog: Catalog) -> None:
    catalogue = limited(catalog, snapshots=2)
    await refused(catalogue, "SnapshotLimitExceeded", lambda t: [t.add_snapshot(snapshot(n)) for n in (1, 2, 3)])
    await catalogue.run(lambda t: [t.add_snapshot(snapshot(n)) for n in (1, 2)])

    def for_a_clone(t: Transaction) -> None:
        t.add_snapshot(snapshot(3))
        t.add_implicit(snapshot(3).id)

    await catalogue.run(for_a_clone)  # which is no snapshot of the account's
    await refused(catalogue, "SnapshotLimitExceeded", lambda t: t.add_snapshot(snapshot(4)))


@pytest.mark.trio
async def test_of_many_at_once_as_many_are_made_as_fit(catalog: Catalog) -> None:
    catalogue, made, errors = limited(catalog, volumes=3), [], []

    async def make(number: int) -> None:
        try:
            await catalogue.run(lambda t: t.add_volume(volume(number)))
            made.append(number)
        except EbsdError as error:
            errors.append(error.code)

    async with trio.open_nursery() as nursery:
        for number in range(1, 11):
            nursery.start_soon(make, number)
    assert (len(made), errors) == (3, ["VolumeLimitExceeded"] * 7)


@pytest.mark.trio
async def test_a_growth_counts_from_its_beginning_until_it_failed(catalog: Catalog) -> None:
    catalogue = limited(catalog, volume_bytes=10 * MIB)
    await catalogue.run(lambda t: [t.add_volume(volume(n)) for n in (1, 2)])
    await catalogue.run(lambda t: t.put_modification(growth(1, 6 * MIB)))
    await refused(catalogue, "VolumeLimitExceeded", lambda t: t.put_modification(growth(2, 6 * MIB)))
    await refused(catalogue, "VolumeLimitExceeded", lambda t: t.add_volume(volume(3, size=4 * MIB)))
    await catalogue.run(lambda t: t.set_volume_size(volume(1).id, 6 * MIB))  # it has its size now
    await catalogue.run(lambda t: t.put_modification(growth(1, 6 * MIB, ModificationState.COMPLETED)))
    await refused(catalogue, "VolumeLimitExceeded", lambda t: t.put_modification(growth(2, 6 * MIB)))
    await catalogue.run(lambda t: t.put_modification(growth(2, 4 * MIB)))
    await catalogue.run(lambda t: t.put_modification(growth(2, 4 * MIB, ModificationState.FAILED)))
    await catalogue.run(lambda t: t.add_volume(volume(3, size=3 * MIB)))


@pytest.mark.trio
async def test_who_is_above_a_lowered_limit_can_do_all_that_is_not_more(catalog: Catalog) -> None:
    free = limited(catalog)
    await free.run(lambda t: [t.add_volume(volume(n)) for n in (1, 2, 3)])
    await free.run(lambda t: t.add_snapshot(snapshot(1)))
    await free.run(lambda t: [t.put_job(job(n)) for n in (1, 2)])
    low = limited(catalog, volumes=1, volume_bytes=MIB, jobs=1, snapshots=9)
    await low.run(lambda t: t.set_tags(volume(1).id, {"a": "b"}))
    await low.run(lambda t: t.put_job(replace(job(1), done=5)))
    await low.run(lambda t: t.put_job(job(1, JobState.INTERRUPTED)))
    await low.run(lambda t: t.put_job(job(1)))  # as at the next start
    await low.run(lambda t: t.put_job(job(2, JobState.FAILED)))
    await low.run(lambda t: t.add_snapshot(snapshot(2)))
    await low.run(lambda t: t.remove_volume(volume(3).id))
    await refused(low, "VolumeLimitExceeded", lambda t: t.add_volume(volume(4)))
    await refused(low, "ResourceLimitExceeded", lambda t: t.put_job(job(2)))  # begun again
