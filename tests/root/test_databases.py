"""Databases under load on a mounted volume: each snapshot is a moment that the database itself recovers from.

SQLite and PostgreSQL (Debian's) commit transactions that keep a sum while snapshots are taken. Each snapshot is
restored and mounted, the database recovers as after a power cut, checks itself, and must hold every transaction that
was acknowledged before the snapshot was asked for, and none that was begun after it was there.

By default a few seconds each; ``EBSD_DATABASE_SECONDS=120`` makes it as long as wanted.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from installation import Installation, installation

SECONDS = float(os.environ.get("EBSD_DATABASE_SECONDS", "6"))
LIMIT = 300 + 20 * SECONDS
EVERY = 2.0
"""Seconds between snapshots."""
ACCOUNTS = 100
BALANCE = 1000


@dataclass(frozen=True)
class Moment:
    """A snapshot, and how many transactions were acknowledged before the call and begun before its answer."""

    name: str
    acknowledged: int
    begun: int


class Load:
    """Commits one transaction after the other in a thread: number n is in the ledger, and the sum stays."""

    def __init__(self, commit: Callable[[int], None]) -> None:
        self._commit = commit
        self._end = threading.Event()
        self._executor = ThreadPoolExecutor(1)
        self.begun = self.acknowledged = 0

    def _run(self) -> None:
        while not self._end.is_set():
            self.begun += 1
            self._commit(self.begun)
            self.acknowledged = self.begun

    def __enter__(self) -> Load:
        self._future = self._executor.submit(self._run)
        return self

    @property
    def broken(self) -> bool:
        return self._future.done()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        with self._executor:
            self._future.result(60)


def take_snapshots(ebsd: Installation, load: Load) -> list[Moment]:
    moments: list[Moment] = []
    began = time.monotonic()
    while time.monotonic() < began + SECONDS and not load.broken:
        time.sleep(max(0.0, began + EVERY * (len(moments) + 0.5) - time.monotonic()))
        acknowledged, name = load.acknowledged, f"s{len(moments)}"
        ebsd.ok("snapshot", "data", "--name", name)
        moments.append(Moment(name, acknowledged, load.begun))
    assert len(moments) >= min(3, SECONDS / EVERY)
    assert moments[-1].acknowledged > moments[0].acknowledged + 10, "the database was hardly under load"
    return moments


@contextlib.contextmanager
def restored(ebsd: Installation, snapshot: str, at: Path) -> Iterator[Path]:
    """Mount a volume made from a snapshot; the file system replays its journal."""
    ebsd.ok("create", "restored", "--from", snapshot, "--mount", at)
    try:
        yield at
    finally:
        ebsd.ok("detach", "restored")
        ebsd.ok("delete", "restored", "--yes")


@pytest.fixture
def ebsd() -> Iterator[Installation]:
    # pytest's own directories are closed to other users, and PostgreSQL does not run as root.
    with tempfile.TemporaryDirectory(prefix="ebsd-databases.", dir="/var/tmp") as root:
        os.chmod(root, 0o755)
        with installation(Path(root)) as made:
            yield made


# --- SQLite


def open_sqlite(path: Path, mode: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
    assert db.execute(f"PRAGMA journal_mode={mode}").fetchone() == (mode,)
    db.execute("PRAGMA synchronous=FULL" if mode == "wal" else "PRAGMA synchronous=EXTRA")
    return db


@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize(("mode", "file_system"), [("wal", "ext4"), ("delete", "xfs")])
def test_each_snapshot_of_a_busy_sqlite_is_whole(ebsd: Installation, mode: str, file_system: str) -> None:
    tree = ebsd.root / "data"
    ebsd.ok("create", "data", "--size", "384M", "--mkfs", file_system, "--mount", tree)
    db = open_sqlite(tree / "bank.sqlite", mode)
    db.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL)")
    db.execute("CREATE TABLE ledger (number INTEGER PRIMARY KEY, note BLOB NOT NULL)")
    db.executemany("INSERT INTO account VALUES (?, ?)", [(number, BALANCE) for number in range(ACCOUNTS)])
    dice = random.Random(1)

    def transfer(number: int) -> None:
        giver, taker = dice.sample(range(ACCOUNTS), 2)
        amount = dice.randrange(100)
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE account SET balance=balance-? WHERE id=?", (amount, giver))
        db.execute("INSERT INTO ledger VALUES (?, ?)", (number, dice.randbytes(dice.randrange(6000))))
        db.execute("UPDATE account SET balance=balance+? WHERE id=?", (amount, taker))
        db.execute("COMMIT")

    with Load(transfer) as load:
        moments = take_snapshots(ebsd, load)
    db.close()
    ebsd.ok("detach", "data")
    for moment in moments:
        with restored(ebsd, moment.name, ebsd.root / "restored") as at:
            found = open_sqlite(at / "bank.sqlite", mode)
            assert found.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert found.execute("SELECT sum(balance), count(*) FROM account").fetchone() == (
                ACCOUNTS * BALANCE,
                ACCOUNTS,
            )
            count, last = found.execute("SELECT count(*), max(number) FROM ledger").fetchone()
            found.close()
            assert count == (last or 0)
            assert moment.acknowledged <= count <= moment.begun
            print(f"{moment.name}: {count} transactions, {moment.acknowledged} were acknowledged before")


# --- PostgreSQL


class PostgreSql:
    """A server over a data directory, reached by its socket only."""

    def __init__(self, data: Path, sockets: Path) -> None:
        (self._bin,) = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]
        self._data = data
        self._sockets = sockets
        self._process: subprocess.Popen[bytes] | None = None

    def command(self, program: str, *arguments: str | Path) -> list[str]:
        return ["runuser", "-u", "postgres", "--", str(self._bin / program), *map(str, arguments)]

    def run(self, program: str, *arguments: str | Path) -> str:
        done = subprocess.run(self.command(program, *arguments), capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def client(self, program: str, *arguments: str) -> list[str]:
        return self.command(program, "-h", self._sockets, *arguments)

    def sql(self, text: str) -> str:
        done = subprocess.run(self.client("psql", "-XAtqc", text, "postgres"), capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def initialise(self) -> None:
        self._data.mkdir()
        shutil.chown(self._data, "postgres", "postgres")
        self.run("initdb", "-D", self._data, "--data-checksums", "--auth=trust")

    def __enter__(self) -> PostgreSql:
        log = (self._sockets / "log").open("ab")
        options = [
            "-c",
            "listen_addresses=",
            "-c",
            f"unix_socket_directories={self._sockets}",
            "-c",
            "shared_buffers=16MB",
        ]
        self._process = subprocess.Popen(
            self.command("postgres", "-D", self._data, *options), stdout=log, stderr=log, cwd="/"
        )
        log.close()
        deadline = time.monotonic() + 60
        while subprocess.run(self.client("pg_isready", "-q"), cwd="/").returncode != 0:
            failed = self._process.poll() is not None or time.monotonic() > deadline
            assert not failed, (self._sockets / "log").read_text()
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self.run("pg_ctl", "stop", "-D", self._data, "-m", "fast", "-t", "60")
        assert self._process.wait(60) == 0


@pytest.mark.timeout(LIMIT)
def test_each_snapshot_of_a_busy_postgresql_is_whole(ebsd: Installation) -> None:
    tree, sockets = ebsd.root / "data", ebsd.root / "sockets"
    ebsd.ok("create", "data", "--size", "768M", "--mkfs", "ext4", "--mount", tree)
    os.chmod(tree, 0o755)
    sockets.mkdir()
    shutil.chown(sockets, "postgres", "postgres")
    server = PostgreSql(tree / "pg", sockets)
    server.initialise()
    with server:
        subprocess.run(server.client("pgbench", "-iq", "postgres"), check=True, capture_output=True, cwd="/")
        server.sql("CREATE TABLE ledger (number integer PRIMARY KEY, note text NOT NULL)")
        with subprocess.Popen(
            server.client("psql", "-XAtq", "postgres"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        ) as session:

            def insert(number: int) -> None:
                assert session.stdin is not None
                assert session.stdout is not None
                session.stdin.write(
                    f"INSERT INTO ledger VALUES ({number}, repeat('x', {number * 37 % 3000})) RETURNING number;\n"
                )
                session.stdin.flush()
                assert session.stdout.readline() == f"{number}\n"  # after the commit: psql is not in a transaction

            with subprocess.Popen(
                server.client("pgbench", "-c", "4", "-T", str(int(SECONDS) + 600), "-n", "postgres"),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
            ) as bench:  # fmt: skip
                try:
                    with Load(insert) as load:
                        moments = take_snapshots(ebsd, load)
                    assert bench.poll() is None
                finally:
                    bench.terminate()
            assert session.stdin is not None
            session.stdin.close()
    ebsd.ok("detach", "data")
    for moment in moments:
        with restored(ebsd, moment.name, ebsd.root / "restored") as at:
            copy = PostgreSql(at / "pg", sockets)
            with copy:  # it replays its log, as after a power cut
                copy.sql("CREATE EXTENSION IF NOT EXISTS amcheck")
                subprocess.run(
                    copy.client("pg_amcheck", "--heapallindexed", "--parent-check", "postgres"), check=True, cwd="/"
                )
                sums = "(SELECT sum(abalance) FROM pgbench_accounts)", "(SELECT sum(bbalance) FROM pgbench_branches)"
                sums += (
                    "(SELECT sum(tbalance) FROM pgbench_tellers)",
                    "(SELECT coalesce(sum(delta), 0) FROM pgbench_history)",
                )
                assert len(set(copy.sql("SELECT " + ", ".join(sums)).split("|"))) == 1
                history = int(copy.sql("SELECT count(*) FROM pgbench_history"))
                count, last = map(int, copy.sql("SELECT count(*), coalesce(max(number), 0) FROM ledger").split("|"))
            copy.run("pg_checksums", "--check", "-D", at / "pg")
            assert count == last
            assert moment.acknowledged <= count <= moment.begun
            print(f"{moment.name}: {count} transactions ({moment.acknowledged} acknowledged before), pgbench {history}")
