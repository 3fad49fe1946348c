"""The holder with engines of a few lines: what it keeps, whom it replaces, and when it gives up."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import RemoteError
from ebsd.ipc.blocking_channel import BlockingChannel
from ebsd.volume import holder as holder_module
from ebsd.volume.holder import RESTART, Engine, Holder
from ebsd.volume.holding import AtHolder, NoHolder, Succession, content_of, meet_holder

FLAG_AT = 128


class Rig:
    """A holder in a thread; its engines are forks of this process that run a function."""

    def __init__(self, tmp_path: Path, *lives: Callable[[AtHolder, Succession | None], int]) -> None:
        self.lives = list(lives)
        self.live = tmp_path / "live"
        self.live.write_bytes(bytes(4096))
        self.live_fd = os.open(self.live, os.O_RDWR)
        self.started = 0
        self.pids: list[int] = []
        self.mute: set[int] = set()
        """Engines that read nothing: 1 is the first."""
        self.holder = Holder(self.start)
        self.status: int | None = None
        self.parent, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs = theirs.detach()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.status = self.holder.run(self.theirs)

    def start(self, parent: int) -> Engine:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        life = self.lives[min(self.started, len(self.lives) - 1)]
        self.started += 1
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                ours.close()
                channel = os.dup(theirs.fileno())
                os.dup2(channel, holder_module.ENGINE_CHANNEL)
                os.close(channel)
                theirs.close()
                if self.started in self.mute:
                    signal.pause()
                status = life(*meet_holder())
            finally:
                os._exit(status)
        theirs.close()
        self.pids.append(pid)
        return Engine(pid, ours)

    def end(self) -> int | None:
        self.thread.join(30)
        assert not self.thread.is_alive()
        os.close(self.live_fd)
        self.parent.close()
        os.close(self.theirs)
        return self.status


def die(number: int = signal.SIGKILL) -> int:
    faulthandler.disable()  # pytest's would tell of this end as of one of its own
    os.kill(os.getpid(), number)
    return 1


def test_a_successor_gets_what_was_deposited_last(tmp_path: Path) -> None:
    results = tmp_path / "results"

    def first(holder: AtHolder, succession: Succession | None) -> int:
        assert succession is None
        read, write = os.pipe()
        os.write(write, b"from the first engine")
        holder.keep("a", {"n": 1})
        holder.keep("a", {"n": 2}, [read])
        holder.keep("b", {"n": 3})
        holder.drop("b")
        holder.keep("maps", {}, [read, live])
        holder.arm(failed_at=FLAG_AT, deaths=5)
        return die()

    def second(holder: AtHolder, succession: Succession | None) -> int:
        assert succession is not None
        found = {name: (deposit.value, len(deposit.fds)) for name, deposit in succession.deposits.items()}
        text = os.read(succession.deposits["a"].fds[0], 100).decode()
        results.write_text(json.dumps([succession.number, found, text]))
        holder.done()
        return 0

    live = os.open(tmp_path / "live", os.O_RDWR | os.O_CREAT)
    rig = Rig(tmp_path, first, second)
    assert rig.end() == 0
    os.close(live)
    number, found, text = json.loads(results.read_text())
    assert number == 1
    assert found == {"a": [{"n": 2}, 1], "maps": [{}, 2]}
    assert text == "from the first engine"


@pytest.mark.parametrize(
    ("last", "status"), [(lambda: 0, 0), (lambda: 3, 3), (die, 1), (lambda: die(signal.SIGSEGV), 1)]
)
def test_an_engine_that_was_not_armed_gets_no_successor(tmp_path: Path, last: Callable[[], int], status: int) -> None:
    def only(holder: AtHolder, succession: Succession | None) -> int:
        holder.keep("a", {})
        return last()

    rig = Rig(tmp_path, only)
    assert rig.end() == status
    assert rig.started == 1


def test_more_deaths_than_agreed_are_the_end(tmp_path: Path) -> None:
    live = os.open(tmp_path / "live", os.O_RDWR | os.O_CREAT)

    def life(holder: AtHolder, succession: Succession | None) -> int:
        holder.keep("maps", {}, [live, live])
        holder.arm(failed_at=FLAG_AT, deaths=3)
        return die()

    rig = Rig(tmp_path, life)
    assert rig.end() == 1
    os.close(live)
    assert rig.started == 4


def test_a_restart_that_was_asked_for_is_no_death(tmp_path: Path) -> None:
    live = os.open(tmp_path / "live", os.O_RDWR | os.O_CREAT)

    def life(holder: AtHolder, succession: Succession | None) -> int:
        if succession is not None and succession.number == 6:
            holder.done()
            return 0
        holder.keep("maps", {}, [live, live])
        holder.arm(failed_at=FLAG_AT, deaths=0)
        return RESTART

    rig = Rig(tmp_path, life)
    assert rig.end() == 0
    os.close(live)
    assert rig.started == 7


@pytest.mark.parametrize("where", ["before its deposits", "after its deposits"])
def test_a_successor_that_hangs_is_a_death_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(holder_module, "SETUP", 0.3)
    live = os.open(tmp_path / "live", os.O_RDWR | os.O_CREAT)
    results = tmp_path / "results"

    def first(holder: AtHolder, succession: Succession | None) -> int:
        holder.keep("maps", {}, [live, live])
        for number in range(8):  # more than a socket takes: the holder would wait for who does not read
            holder.keep(f"much-{number}", {"Text": "x" * 100_000})
        holder.arm(failed_at=FLAG_AT, deaths=5)
        return die()

    def third(holder: AtHolder, succession: Succession | None) -> int:
        assert succession is not None
        holder.serving()
        time.sleep(4 * holder_module.SETUP)  # whoever serves has time
        holder.keep("a", {})
        results.write_text(str(succession.number))
        holder.done()
        return 0

    rig = Rig(tmp_path, first, hang, third)
    if where == "before its deposits":
        rig.mute.add(2)
    assert rig.end() == 0
    os.close(live)
    assert results.read_text() == "2"
    assert rig.started == 3


def hang(holder: AtHolder, succession: Succession | None) -> int:
    signal.pause()
    return 0


def test_successors_that_all_hang_are_too_many_deaths_however_long_they_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder_module, "SETUP", 0.2)
    monkeypatch.setattr(holder_module, "WINDOW", 0.1)
    live = os.open(tmp_path / "live", os.O_RDWR | os.O_CREAT)

    def first(holder: AtHolder, succession: Succession | None) -> int:
        holder.keep("maps", {}, [live, live])
        holder.arm(failed_at=FLAG_AT, deaths=3)
        return die()

    rig = Rig(tmp_path, first, hang)
    assert rig.end() == 1
    os.close(live)
    assert rig.started == 4


def test_an_engine_that_has_failed_gets_no_successor(tmp_path: Path) -> None:
    live = os.open(tmp_path / "live", os.O_RDWR | os.O_CREAT)

    def life(holder: AtHolder, succession: Succession | None) -> int:
        holder.keep("maps", {}, [live, live])
        holder.arm(failed_at=FLAG_AT, deaths=5)
        os.pwrite(live, b"\1\0\0\0", FLAG_AT)
        return die()

    rig = Rig(tmp_path, life)
    assert rig.end() == 1
    os.close(live)
    assert rig.started == 1


def test_an_error_that_only_a_witness_reports_is_the_end_and_is_marked(tmp_path: Path) -> None:
    live = os.open(tmp_path / "live", os.O_RDWR | os.O_CREAT)
    took_over = tmp_path / "took over"

    def first(holder: AtHolder, succession: Succession | None) -> int:
        read, _ = os.pipe()  # cannot be synced: EINVAL
        holder.keep("maps", {}, [live, live])
        holder.keep("head-1", {}, [read], watch=[0])
        holder.arm(failed_at=FLAG_AT, deaths=5)
        return die()

    def second(holder: AtHolder, succession: Succession | None) -> int:
        took_over.touch()
        return 0

    rig = Rig(tmp_path, first, second)
    assert rig.end() == 1
    assert os.pread(live, 4, FLAG_AT) == b"\1\0\0\0"
    os.close(live)
    assert not took_over.exists()


def test_a_witness_stays_the_same_until_nobody_wants_it(tmp_path: Path) -> None:
    """A new one would not report an error that an earlier sync was told of."""
    holder = Holder(lambda parent: Engine(0, socket.socket()))
    fds = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("one", "two")]
    holder._keep("head-1", {}, [os.dup(fds[0])], [0])
    witness = dict(holder._witnesses)
    holder._keep("head-1", {}, [os.dup(fd) for fd in fds], [0, 1])
    holder._keep("growth", {}, [os.dup(fds[1])], [0])
    assert witness.items() <= holder._witnesses.items()
    assert len(holder._witnesses) == 2
    (file,) = set(holder._witnesses) - set(witness)
    assert os.fstat(holder._witnesses[file]).st_ino == os.fstat(fds[1]).st_ino
    holder._drop("head-1")
    assert set(holder._witnesses) == {file}
    holder._drop("growth")
    assert holder._witnesses == {}
    for fd in fds:
        os.close(fd)


def test_the_key_is_wiped_when_it_is_done_and_at_the_end(tmp_path: Path) -> None:
    key = Secret.random(64)
    for last in ("done", "end"):
        copy = key.shared_copy()

        def life(holder: AtHolder, succession: Succession | None, last: str = last, copy: int = copy) -> int:
            holder.keep("key", {"Length": 64}, [copy])
            if last == "done":
                holder.done()
                assert Secret.of_descriptor(copy, 64).equals(bytes(64))
            else:
                assert Secret.of_descriptor(copy, 64).equals(key)
            return 0

        rig = Rig(tmp_path, life)
        assert rig.end() == 0
        assert Secret.of_descriptor(copy, 64).equals(bytes(64))
        os.close(copy)
    key.wipe()


def test_a_request_that_is_none_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    def life(holder: AtHolder, succession: Succession | None) -> int:
        for method, params in (
            ("steal", {}),
            ("keep", {"Name": "a"}),
            ("keep", {"Name": "a", "Value": {}, "Watch": [7]}),
        ):
            with pytest.raises(RemoteError, match="The holder"):
                holder._ask(method, params, [0])
        holder.keep("a", {})
        return 0

    rig = Rig(tmp_path, life)
    assert rig.end() == 0


def test_a_real_engine_does_not_outlive_its_holder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "import os, time; os.read(3, 100); os.write(0, str(os.getpid()).encode()); time.sleep(60)"
    monkeypatch.setattr(holder_module, "command_from_directory", lambda module: [sys.executable, "-c", script])
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            os.dup2(theirs.fileno(), 0)
            Holder(holder_module.start_engine).run(0)
        finally:
            os._exit(1)
    theirs.close()
    ours.settimeout(20)
    engine = os.pidfd_open(int(ours.recv(100)))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert ours.recv(100) == b""  # the engine's end of the channel closes with it
    os.close(engine)
    ours.close()


def test_without_a_holder_nothing_is_kept() -> None:
    nobody = NoHolder()
    nobody.keep("a", {}, [])
    nobody.drop("a")
    nobody.arm(failed_at=FLAG_AT, deaths=5)
    nobody.done()
    assert nobody.pid == os.getpid()


def test_a_channel_is_what_both_ends_speak(tmp_path: Path) -> None:
    """The holder has the protocol without its imports; this is the other end as everybody else has it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory = os.memfd_create("document")
    os.write(memory, b'{"a": [1, 2]}')
    with ours, BlockingChannel(theirs) as channel:
        channel.send({"method": "keep"}, [memory])
        packet = holder_module._receive(ours)
        assert packet is not None
        message, fds = packet
        assert message == {"method": "keep"}
        assert content_of(fds[0]) == {"a": [1, 2]}
        holder_module._send(ours, {"Name": "\u00e4"}, fds)
        answer = channel.receive()
        assert answer is not None
        assert answer.message == {"Name": "\u00e4"}
        for fd in (*fds, *answer.fds, memory):
            os.close(fd)
