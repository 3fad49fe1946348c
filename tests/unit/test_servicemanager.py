"""What ebsd and its key service say to a service manager and take from it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from ebsd.domain.errors import ConfigurationError
from ebsd.ipc.servicemanager import keep_alive, notify, take_listeners, watchdog_pause

ME = str(os.getpid())


def passed(monkeypatch: pytest.MonkeyPatch, *sockets: socket.socket) -> None:
    """Have the sockets stand where the service manager puts them, as far as this process is concerned."""
    first = max((sock.fileno() for sock in sockets), default=3)
    for at, sock in enumerate(sockets):
        os.dup2(sock.fileno(), first + 50 + at)
    monkeypatch.setattr("ebsd.ipc.servicemanager.FIRST_DESCRIPTOR", first + 50)


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def test_listening_sockets_are_found_by_name_and_inherited_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"LISTEN_PID": ME, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "kms:keys", "PATH": "/bin"}
    with listening(tmp_path / "one") as one, listening(tmp_path / "two") as two:
        passed(monkeypatch, one, two)
        found = take_listeners(environment)
    assert environment == {"PATH": "/bin"}, "a child would take them for its own"
    assert {name: sock.getsockname() for name, sock in found.items()} == {
        "kms": str(tmp_path / "one"),
        "keys": str(tmp_path / "two"),
    }
    for sock in found.values():
        assert not sock.get_inheritable()
        sock.close()


@pytest.mark.parametrize(
    "environment",
    [{}, {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "ebsd"}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}],
    ids=["none", "nobody's", "another's"],
)
def test_sockets_of_somebody_else_are_left_alone(environment: dict[str, str]) -> None:
    assert take_listeners(environment) == {}


def test_what_is_no_listening_socket_is_refused_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(tmp_path / "one") as one, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        for names, second, reason in (
            ("kms:keys", other, "no listening Unix socket"),
            ("kms:kms", one, "a name of its own"),
            ("kms", one, "a name of its own"),
        ):
            passed(monkeypatch, one, second)
            before = set(os.listdir("/proc/self/fd"))
            with pytest.raises(ConfigurationError, match=reason):
                take_listeners({"LISTEN_PID": ME, "LISTEN_FDS": "2", "LISTEN_FDNAMES": names})
            assert len(before - set(os.listdir("/proc/self/fd"))) >= 2, "both were closed"


def test_the_watchdog_wants_to_hear_twice_in_its_time() -> None:
    assert watchdog_pause({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": ME}) == 15
    assert watchdog_pause({"WATCHDOG_USEC": "30000000"}) == 15
    assert watchdog_pause({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}) is None
    assert watchdog_pause({"WATCHDOG_USEC": "0"}) is None
    assert watchdog_pause({}) is None


@pytest.mark.trio
async def test_signs_of_life_come_from_the_event_loop(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        with trio.move_on_after(31):
            await keep_alive({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "20000000"})
        heard = [manager.recv(100) for _ in range(4)]
        with pytest.raises(BlockingIOError):
            manager.recv(100)
    assert set(heard) == {b"WATCHDOG=1"}, "after 0, 10, 20 and 30 seconds"


@pytest.mark.trio
async def test_a_service_manager_that_is_away_for_a_moment_ends_nothing(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.move_on_after(31) as scope:
        await keep_alive({"NOTIFY_SOCKET": str(tmp_path / "absent"), "WATCHDOG_USEC": "20000000"})
    assert scope.cancelled_caught


@pytest.mark.trio
async def test_a_service_manager_that_reads_nothing_holds_nobody_up(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        with contextlib.suppress(BlockingIOError):
            while True:
                notify(address, "X=1", wait=False)
        with trio.move_on_after(10):
            await keep_alive({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "2000000"})
    assert "no sign of life could be sent" in caplog.text


def test_the_journal_is_told_the_level_of_each_line(tmp_path: Path) -> None:
    program = (
        "import logging, os, sys\n"
        "from ebsd.ipc.servicemanager import log_to_stderr\n"
        "seen = os.fstat(2)\n"
        "log_to_stderr('%(message)s', {'JOURNAL_STREAM': sys.argv[1] or f'{seen.st_dev}:{seen.st_ino}'})\n"
        "logging.debug('no'); logging.info('well'); logging.warning('hm\\nhm'); logging.error('oh')\n"
    )
    for stream, expected in (("", "<6>well\n<4>hm\n<4>hm\n<3>oh\n"), ("1:2", "well\nhm\nhm\noh\n")):
        log = tmp_path / "log"
        with log.open("wb") as output:
            subprocess.run([sys.executable, "-c", program, stream], stderr=output, check=True)
        assert log.read_text() == expected


def test_without_a_service_manager_nothing_is_said() -> None:
    notify(None, "READY=1")
    notify("", "READY=1")
