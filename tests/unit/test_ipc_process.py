"""Children: what they are given, how they end, and helpers with a deadline."""

import os
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import trio
import trio.testing

from ebsd.domain.errors import HostUnsupported, RemoteError, Timeout
from ebsd.ipc import commands, hardening, process
from ebsd.ipc.channel import Channel, ChannelClosed
from ebsd.ipc.process import adopt, boot_id, harden, helper_running, run_helper, start_module

pytestmark = pytest.mark.trio
CHILD = "tests.unit.ipc_child"


@pytest.fixture(autouse=True)
def _children_come_from_this_checkout(monkeypatch):
    monkeypatch.setattr(commands, "package_directory", lambda: str(Path(__file__).parents[2]))


def children() -> set[str]:
    """Pids of this process's children, ended ones that nobody reaped included."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = file.read_text().rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):  # it ended just now
            continue
        if int(parent) == os.getpid():
            found.add(file.parent.name)
    return found


class Started:
    def __init__(self, log_fd=None):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.child = start_module(CHILD, stdin_socket=theirs, log_fd=log_fd)
        self.channel = Channel(ours)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
        self.channel.close()
        self.child.kill()
        await self.child.wait()


async def test_a_child_gets_nothing_but_its_socket(monkeypatch):
    monkeypatch.setenv("EBSD_SECRET", "hunter2")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    leak = os.open("/", os.O_RDONLY)
    os.set_inheritable(leak, True)
    async with Started() as started:
        seen = (await started.channel.request("report", {"a": 1}, [leak, leak], deadline=10)).message
    os.close(leak)
    assert seen["environment"] == {"LANG": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    assert "hunter2" not in str(seen)
    assert len(seen["argv"]) == 1
    assert seen["isolated"] == 1
    assert seen["cwd"] == "/"
    assert seen["umask"] == 0o077
    assert seen["session"]
    assert len(seen["open"]) == 3 + 2 + 1  # standard ones, the two sent, and the listing itself
    assert (seen["received"], seen["params"]) == (2, {"a": 1})


async def test_an_installed_package_is_started_as_a_module(monkeypatch):
    monkeypatch.setattr(process.site, "getsitepackages", lambda: [process.package_directory()])
    assert process.command("ebsd.volume") == [sys.executable, "-I", "-m", "ebsd.volume"]


async def test_what_a_child_writes_goes_to_the_log(tmp_path):
    log = tmp_path / "log"
    fd = os.open(log, os.O_WRONLY | os.O_CREAT)
    async with Started(log_fd=fd) as started:
        os.close(fd)
        with pytest.raises(RemoteError, match="incident"):
            await started.channel.request("crash", deadline=10)
    assert "ValueError" in log.read_text()


async def test_a_child_that_hangs_up_ends_and_its_status_is_known_to_all_who_wait():
    async with Started() as started:
        with pytest.raises(ChannelClosed):
            await started.channel.request("die", deadline=10)
        assert started.channel.closed
        async with trio.open_nursery() as nursery:
            nursery.start_soon(started.child.wait)
            nursery.start_soon(started.child.wait)
        assert await started.child.wait() == 7
        assert started.child.status == 7
        started.child.kill()  # nobody is hit
    with pytest.raises(ChildProcessError):
        os.waitpid(started.child.pid, os.WNOHANG)


async def test_a_killed_child_shows_the_signal():
    async with Started() as started:
        assert not started.child.poll()
        assert started.child.status is None
        started.child.kill(signal.SIGTERM)
        assert await started.child.wait() == -signal.SIGTERM


async def test_a_process_of_others_can_be_adopted_waited_for_and_killed():
    # The shell ends at once and leaves the sleeper to init (or to whoever is its subreaper).
    shell = await trio.run_process(["sh", "-c", "sleep 1000 >/dev/null & echo $!"], capture_stdout=True)
    adopted = adopt(int(shell.stdout))
    assert not adopted.poll()
    adopted.kill()
    with trio.fail_after(5):
        assert await adopted.wait() is None
    assert adopted.ended


async def test_who_waits_for_a_child_hears_of_its_end_also_when_somebody_else_looked_first():
    """epoll forgets a descriptor that is closed: a look that reaped the child must not take it from who waits."""
    before = set(os.listdir("/proc/self/fd"))
    async with Started() as started:
        child = started.child
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child.wait)
                nursery.start_soon(child.wait)
                await trio.testing.wait_all_tasks_blocked()
                child.kill()
                while not child.poll():
                    pass  # the loop, and with it the waiting tasks, must not come between
        assert child.status == -signal.SIGKILL
    assert set(os.listdir("/proc/self/fd")) == before


async def test_a_child_that_is_given_up_while_somebody_waits_leaves_no_descriptor():
    before = set(os.listdir("/proc/self/fd"))
    async with Started() as started, trio.open_nursery() as nursery:
        nursery.start_soon(started.child.wait)
        await trio.testing.wait_all_tasks_blocked()
        pid = started.child.pid
        started.child.release()
        nursery.cancel_scope.cancel()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert set(os.listdir("/proc/self/fd")) == before


async def test_a_process_that_is_gone_cannot_be_adopted():
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(ProcessLookupError):
        adopt(gone.pid)


async def test_a_released_child_goes_on():
    async with Started() as started:
        pid = started.child.pid
        started.child.release()
        seen = await started.channel.request("report", deadline=10)
        assert seen.message["session"]
        started.channel.close()  # the child sees the end of its channel and leaves
    assert os.waitpid(pid, 0) == (pid, 0)


async def test_a_helper_answers_one_request_and_is_gone():
    before = children()
    fds = len(os.listdir("/proc/self/fd"))
    packet = await run_helper(CHILD, {"method": "report", "params": {"x": 1}}, [0], deadline=10)
    assert packet.message["received"] == 1
    packet = await run_helper(CHILD, {"method": "hand_out"}, deadline=10)
    assert os.read(packet.fds[0], 100) == b"from the child"
    os.close(packet.fds[0])
    assert len(os.listdir("/proc/self/fd")) == fds
    assert children() == before


async def test_an_error_of_a_helper_arrives():
    with pytest.raises(RemoteError) as info:
        await run_helper(CHILD, {"method": "fail"}, deadline=10)
    assert info.value.code == "InvalidVolume.NotFound"
    with pytest.raises(RemoteError, match="no_such"):
        await run_helper(CHILD, {"method": "no_such"}, [0], deadline=10)


async def test_a_helper_that_runs_answers_several_requests_and_is_gone_at_the_end():
    before = children()
    async with helper_running(CHILD) as channel:
        (helper,) = children() - before
        assert (await channel.request("report", {"x": 1}, [0], deadline=10)).message["received"] == 1
        with pytest.raises(RemoteError):
            await channel.request("fail", deadline=10)
        await channel.request("report", deadline=10)
        assert children() - before == {helper}
    assert children() == before
    async with helper_running(CHILD) as channel:
        with pytest.raises(Timeout, match="hang"):
            await channel.request("hang", deadline=0.3)
        with pytest.raises(ChannelClosed):
            await channel.request("report", deadline=10)
    assert children() == before


async def test_a_helper_is_killed_and_reaped_at_its_deadline():
    before = children()
    with pytest.raises(Timeout, match="hang"):
        await run_helper(CHILD, {"method": "hang"}, deadline=0.3)
    assert children() == before


async def test_a_helper_dies_with_the_task_that_wanted_it():
    before = children()
    with trio.move_on_after(0.3):
        await run_helper(CHILD, {"method": "hang"}, deadline=100)
    assert children() == before


async def test_a_helper_that_cannot_die_is_left_behind_and_reaped_later(monkeypatch):
    # As one in uninterruptible sleep: signals do nothing for now.
    monkeypatch.setattr(process, "REAP_DEADLINE", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(process.Child, "kill", lambda self: None)
        with pytest.raises(Timeout):
            await run_helper(CHILD, {"method": "hang"}, deadline=0.05)
    (left,) = process._leftovers
    left.kill()
    await left.wait()
    process._reap_leftovers()
    assert process._leftovers == []


async def test_a_module_that_does_not_exist_is_an_error_and_leaves_nothing(tmp_path):
    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(ChannelClosed):
        await run_helper("tests.unit.no_such_module", {"method": "x"}, deadline=10, log_fd=fd)
    os.close(fd)


async def test_a_hardened_process_cannot_be_dumped():
    seen = (await run_helper(CHILD, {"method": "tightened"}, deadline=10)).message
    assert seen["failures"] == []
    assert seen["core"] == [0, 0]
    assert seen["no_new_privs"]
    assert seen["dumpable"] == 0


async def test_what_could_not_be_hardened_is_returned_or_raised(monkeypatch):
    monkeypatch.setattr(hardening, "_prctl", lambda option, value: "Operation not permitted")
    monkeypatch.setattr(hardening.resource, "setrlimit", lambda *args: None)
    monkeypatch.setattr(hardening.os, "umask", lambda mask: 0)
    assert len(harden(False)) == 2
    assert len(harden(False, no_new_privs=False)) == 1
    with pytest.raises(HostUnsupported, match="dumpable"):
        harden(True)


async def test_the_boot_id_is_a_canonical_uuid_and_stays():
    assert str(uuid.UUID(boot_id())) == boot_id()
