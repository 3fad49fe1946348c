"""The Varlink server and client on real sockets, against honest, clumsy and hostile clients."""

import errno
import json
import logging
import os
import socket
import struct
import subprocess
import sys

import pytest
import trio
import trio.testing
import varlink

from ebsd.domain.errors import (
    AuthFailure,
    DaemonUnreachable,
    ProtocolError,
    RemoteError,
    Timeout,
    VolumeNotFound,
)
from ebsd.ipc.peer import Peer
from ebsd.ipc.sockets import close_all, listen, recv_with_fds, send_with_fds
from ebsd.ipc.varlink_client import VarlinkClient
from ebsd.ipc.varlink_server import Call, Reply, VarlinkServer
from ebsd.wire import descriptors
from ebsd.wire.framing import MAX_FRAME, FrameReader, encode
from ebsd.wire.idl import Interface

pytestmark = pytest.mark.trio
CONTROL = "io.ebsd.Control"


async def identify(call: Call):
    return {"Kind": "volume", "ResourceId": call.parameters["Resource"]}


async def nothing(call: Call):
    return None


class Daemon:
    """A server on a socket of its own; tests replace single handlers."""

    def __init__(self, path, nursery):
        self.path = path
        self.nursery = nursery
        self.incidents = []

    async def start(self, handlers=None, **options):
        services = {CONTROL: dict.fromkeys(Interface.load(CONTROL).methods, nothing)}
        services[CONTROL] |= {"Identify": identify, **(handlers or {})}
        options.setdefault("on_incident", lambda number, exc: self.incidents.append((number, exc)))
        self.server = VarlinkServer(
            vendor="ebsd", product="ebsd", version="1", url="https://example.org", services=services, **options
        )
        await self.nursery.start(self.server.serve, listen(self.path, 0o600))
        return self

    async def open_fds_without_connections(self):
        while self.server.connections:
            await trio.lowlevel.checkpoint()
        return open_fds()

    async def client(self):
        return await VarlinkClient.connect(self.path)

    async def raw(self):
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await sock.connect(str(self.path))
        return sock

    async def is_well(self):
        async with await self.client() as client:
            result = await client.call(f"{CONTROL}.Identify", {"Resource": "x"}, deadline=5)
            return result.parameters == {"Kind": "volume", "ResourceId": "x"}


@pytest.fixture
async def daemon(tmp_path, nursery):
    return Daemon(tmp_path / "s", nursery)


def ask(method: str, **parameters) -> bytes:
    return encode({"method": f"{CONTROL}.{method}", "parameters": parameters})


async def read_replies(sock) -> list[dict]:
    """Read until the server hangs up."""
    reader, replies = FrameReader(), []
    while True:
        try:
            data = await sock.recv(65536)
        except ConnectionResetError:
            return replies
        if not data:
            return replies
        replies += reader.feed(data)


async def read_reply(sock) -> dict:
    reader = FrameReader()
    while not (replies := reader.feed(await sock.recv(65536))):
        pass
    return replies[0]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- calls ------------------------------------------------------------------------------------------------


async def test_a_call_gets_its_reply_and_a_connection_takes_many(daemon):
    await daemon.start()
    async with await daemon.client() as client:
        for name in ("a", "b", "ü\0"):
            result = await client.call(f"{CONTROL}.Identify", {"Resource": name})
            assert result.parameters["ResourceId"] == name
        assert (await client.call(f"{CONTROL}.Doctor")).parameters == {}


async def test_every_method_needs_a_handler_and_every_handler_a_method():
    complete = dict.fromkeys(Interface.load(CONTROL).methods, nothing)
    for wrong in ({**complete, "Extra": nothing}, {k: v for k, v in complete.items() if k != "Rename"}):
        with pytest.raises(ValueError, match=r"Extra|Rename"):
            VarlinkServer(vendor="", product="", version="", url="", services={CONTROL: wrong})


async def test_a_handler_sees_the_peer_and_the_full_method_name(daemon):
    seen = []

    async def doctor(call):
        seen.append(call)

    await daemon.start({"Doctor": doctor})
    async with await daemon.client() as client:
        await client.call(f"{CONTROL}.Doctor")
    assert seen[0].peer == Peer(os.getuid(), os.getgid(), os.getpid())
    assert seen[0].method == f"{CONTROL}.Doctor"


@pytest.mark.parametrize(
    ("method", "parameters", "code"),
    [
        ("Identify", {}, "MissingParameter"),
        ("Identify", {"Resource": None}, "MissingParameter"),
        ("Identify", {"Resource": 1}, "InvalidParameterValue"),
        ("Identify", {"Resource": "x", "Other": 1}, "UnknownParameter"),
        ("Missing", {}, "UnsupportedOperation"),
    ],
)
async def test_what_the_interface_does_not_allow_never_reaches_a_handler(daemon, method, parameters, code):
    async def forbidden(call):
        raise AssertionError("reached")

    await daemon.start({"Identify": forbidden})
    async with await daemon.client() as client:
        with pytest.raises(RemoteError) as info:
            await client.call(f"{CONTROL}.{method}", parameters)
        assert info.value.code == code
        await client.call(f"{CONTROL}.Doctor")


async def test_unknown_interfaces_get_the_standard_error(daemon):
    await daemon.start()
    async with await daemon.client() as client:
        for method in ("com.example.Do", "Do", ""):
            with pytest.raises(RemoteError, match="no interface"):
                await client.call(method)


async def test_an_error_of_a_handler_arrives_with_code_message_and_hint(daemon):
    async def fail(call):
        raise VolumeNotFound(volume="vol-1")

    async def fail_in_a_nursery(call):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, call)

    await daemon.start({"Doctor": fail, "GetStatus": fail_in_a_nursery})
    async with await daemon.client() as client:
        for method in ("Doctor", "GetStatus"):
            with pytest.raises(RemoteError) as info:
                await client.call(f"{CONTROL}.{method}")
            expected = VolumeNotFound(volume="vol-1")
            assert (info.value.code, info.value.message) == (expected.code, expected.message)
            assert info.value.hint == expected.hint
    assert not daemon.incidents


async def test_a_crashing_handler_is_an_incident_and_the_server_goes_on(daemon):
    async def crash(call):
        raise KeyError("secret")

    await daemon.start({"Doctor": crash})
    async with await daemon.client() as client:
        with pytest.raises(RemoteError) as info:
            await client.call(f"{CONTROL}.Doctor")
        assert await daemon.is_well()
        await client.call(f"{CONTROL}.Identify", {"Resource": "same connection"})
    ((number, exc),) = daemon.incidents
    assert info.value.code == "InternalFailure"
    assert number in info.value.message
    assert len(number) == 8
    assert isinstance(exc, KeyError)
    assert "secret" not in info.value.message


async def test_the_log_of_an_incident_has_the_traceback_without_values(daemon, caplog):
    async def crash(call):
        passphrase = "hunter2"[:]
        raise ValueError(len(passphrase))

    await daemon.start({"Doctor": crash}, on_incident=None)
    with caplog.at_level(logging.ERROR):
        async with await daemon.client() as client:
            with pytest.raises(RemoteError, match="incident"):
                await client.call(f"{CONTROL}.Doctor", {})
    formatted = logging.Formatter().format(caplog.records[0])
    assert "in crash" in formatted
    assert "'passphrase':" not in formatted


async def test_a_failing_incident_report_does_not_hide_the_answer(daemon):
    def broken(number, exc):
        raise OSError("disk full")

    async def crash(call):
        raise ValueError

    await daemon.start({"Doctor": crash}, on_incident=broken)
    async with await daemon.client() as client:
        with pytest.raises(RemoteError, match="incident"):
            await client.call(f"{CONTROL}.Doctor")


@pytest.mark.parametrize(
    "result", [{"x": "y" * MAX_FRAME}, {"x": "\udc80"}, {"x": object()}, {"x": float("nan")}, "not a dict"]
)
async def test_a_reply_that_cannot_be_sent_becomes_an_error(daemon, result):
    async def doctor(call):
        return result

    await daemon.start({"Doctor": doctor})
    async with await daemon.client() as client:
        with pytest.raises(RemoteError):
            await client.call(f"{CONTROL}.Doctor")
        await client.call(f"{CONTROL}.Identify", {"Resource": "x"})


async def test_replies_are_checked_against_the_interface_on_request(daemon):
    await daemon.start(check_replies=True)
    async with await daemon.client() as client:
        await client.call(f"{CONTROL}.Identify", {"Resource": "x"})
        with pytest.raises(RemoteError, match="incident"):
            await client.call(f"{CONTROL}.Doctor")
    assert "BUG" in str(daemon.incidents[0][1])


async def test_several_replies_come_only_to_those_who_ask_for_them(daemon):
    async def doctor(call):
        await call.stream({"Findings": [1]})
        await call.stream({"Findings": [2]})
        return {"Findings": [3]}

    await daemon.start({"Doctor": doctor})
    with await daemon.raw() as sock:
        await sock.send(encode({"method": f"{CONTROL}.Doctor", "more": True}))
        sock.shutdown(socket.SHUT_WR)
        assert await read_replies(sock) == [
            {"parameters": {"Findings": [1]}, "continues": True},
            {"parameters": {"Findings": [2]}, "continues": True},
            {"parameters": {"Findings": [3]}},
        ]
    async with await daemon.client() as client:
        assert (await client.call(f"{CONTROL}.Doctor")).parameters == {"Findings": [3]}


async def test_a_oneway_call_gets_no_reply_and_pipelined_calls_are_answered_in_order(daemon):
    await daemon.start()
    with await daemon.raw() as sock:
        oneway = encode({"method": f"{CONTROL}.Identify", "parameters": {"Resource": "0"}, "oneway": True})
        await sock.send(ask("Identify", Resource="1") + oneway + ask("Identify", Resource="2"))
        sock.shutdown(socket.SHUT_WR)
        replies = await read_replies(sock)
    assert [reply["parameters"]["ResourceId"] for reply in replies] == ["1", "2"]


# --- hostile and unlucky clients --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"GET / HTTP/1.1\r\n\r\n\0",
        b"\xff\xff\0",
        b"[" * 100_000 + b"\0",
        b'{"method":1}\0',
        b'{"method":"a.B","method":"a.C"}\0',
        b'{"method":"a.B","strange":true}\0',
        b"x" * (MAX_FRAME + 1),
    ],
    ids=lambda data: repr(data[:30]),
)
async def test_garbage_gets_an_error_and_a_hang_up_and_nobody_else_notices(daemon, data):
    await daemon.start()
    with await daemon.raw() as sock:
        try:
            while data:
                data = data[await sock.send(data) :]
        except (BrokenPipeError, ConnectionResetError):
            pass
        replies = await read_replies(sock)
    assert [reply["parameters"]["Code"] for reply in replies] == ["Ebsd.Protocol"]
    assert await daemon.is_well()
    assert not daemon.incidents


async def test_a_good_call_before_garbage_is_still_answered(daemon):
    await daemon.start()
    with await daemon.raw() as sock:
        await sock.send(ask("Identify", Resource="1") + b"garbage\0")
        first, second = await read_replies(sock)
    assert first["parameters"]["ResourceId"] == "1"
    assert second["error"] == f"{CONTROL}.ServiceError"


async def test_an_upgrade_is_refused_and_the_connection_goes_on(daemon):
    await daemon.start()
    with await daemon.raw() as sock:
        await sock.send(encode({"method": f"{CONTROL}.Doctor", "upgrade": True}))
        assert (await read_reply(sock))["error"] == "org.varlink.service.MethodNotImplemented"
        await sock.send(ask("Identify", Resource="x"))
        assert "parameters" in await read_reply(sock)


async def test_a_frame_that_stalls_is_given_up_at_its_deadline(daemon, autojump_clock):
    await daemon.start(frame_deadline=30)
    with await daemon.raw() as sock:
        await trio.sleep(1000)  # between calls a client may take its time
        begin = trio.current_time()
        await sock.send(b'{"method"')
        (reply,) = await read_replies(sock)
        assert trio.current_time() - begin == pytest.approx(30)
    assert "too long" in reply["parameters"]["Message"]


async def test_a_frame_that_trickles_in_is_given_up_at_the_same_deadline(daemon, autojump_clock):
    await daemon.start(frame_deadline=30)
    with await daemon.raw() as sock:
        begin = trio.current_time()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012
            for byte in ask("Identify", Resource="x" * 1000):
                await sock.send(bytes([byte]))
                await trio.sleep(1)
        # The mock clock runs on while the kernel hands over the end of the connection: seconds, not the frame's 1000.
        assert 30 <= trio.current_time() - begin < 300


async def test_the_time_of_a_handler_does_not_count_for_the_frame_behind_it(daemon, autojump_clock):
    async def slow(call):
        await trio.sleep(100)

    await daemon.start({"Doctor": slow}, frame_deadline=30)
    with await daemon.raw() as sock:
        rest = ask("Identify", Resource="x")
        await sock.send(ask("Doctor") + rest[:10])
        await sock.send(rest[10:])
        sock.shutdown(socket.SHUT_WR)
        assert all("error" not in reply for reply in await read_replies(sock))


async def test_an_idle_client_is_dropped_where_that_is_wanted(daemon, autojump_clock):
    await daemon.start(idle_deadline=60)
    with await daemon.raw() as sock:
        assert await read_replies(sock) == []
        assert trio.current_time() == pytest.approx(60, abs=1)


async def test_a_client_that_reads_no_replies_is_dropped_at_the_deadline(daemon, autojump_clock):
    ended = trio.Event()

    async def chatty(call):
        for _ in range(100):
            await call.stream({"x": "y" * 500_000})
        ended.set()

    await daemon.start({"Doctor": chatty}, frame_deadline=30)
    with await daemon.raw() as sock:
        await sock.send(encode({"method": f"{CONTROL}.Doctor", "more": True}))
        await ended.wait()
        assert trio.current_time() < 60
    assert await daemon.is_well()


async def test_a_handler_runs_to_its_end_although_its_client_has_gone(daemon):
    started, proceed, ended = trio.Event(), trio.Event(), trio.Event()

    async def slow(call):
        started.set()
        await proceed.wait()
        await call.stream({"x": 1})
        ended.set()

    await daemon.start({"Doctor": slow})
    sock = await daemon.raw()
    await sock.send(encode({"method": f"{CONTROL}.Doctor", "more": True}))
    await started.wait()
    sock.close()
    assert await daemon.is_well()
    proceed.set()
    await ended.wait()
    assert await daemon.is_well()
    assert not daemon.incidents


async def test_a_uid_has_a_limited_number_of_connections_and_gets_told(daemon):
    await daemon.start(max_connections_per_uid=3)
    clients = [await daemon.client() for _ in range(3)]
    for client in clients:
        await client.call(f"{CONTROL}.Doctor")
    async with await daemon.client() as refused:
        with pytest.raises(RemoteError) as info:
            await refused.call(f"{CONTROL}.Doctor")
        assert info.value.code == "RequestLimitExceeded"
        with pytest.raises(DaemonUnreachable):
            await refused.call(f"{CONTROL}.Doctor")
    for client in clients:
        client.close()
    await daemon.open_fds_without_connections()
    assert await daemon.is_well()


async def test_a_peer_that_is_not_admitted_is_told_why(daemon):
    def admit(peer):
        raise AuthFailure(uid=peer.uid, reason="today is Monday")

    await daemon.start(admit=admit)
    async with await daemon.client() as client:
        with pytest.raises(RemoteError, match="Monday") as info:
            await client.call(f"{CONTROL}.Doctor")
        assert info.value.code == "AuthFailure"


async def test_a_crash_outside_of_handlers_ends_one_connection_only(daemon):
    blows = iter([True])

    def admit(peer):
        if next(blows, False):
            raise RuntimeError("boom")

    await daemon.start(admit=admit)
    with await daemon.raw() as sock:
        assert await read_replies(sock) == []
    assert await daemon.is_well()
    assert len(daemon.incidents) == 1


async def test_accepting_pauses_when_descriptors_run_out(autojump_clock, nursery):
    class Listener:
        def __init__(self):
            self.errors = [errno.EMFILE, errno.ECONNABORTED, errno.ENFILE]
            self.times = []

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        async def accept(self):
            self.times.append(trio.current_time())
            if not self.errors:
                await trio.sleep_forever()
            raise OSError(self.errors.pop(0), "x")

    listener = Listener()
    server = VarlinkServer(
        vendor="",
        product="",
        version="",
        url="",
        services={CONTROL: dict.fromkeys(Interface.load(CONTROL).methods, nothing)},
    )
    await nursery.start(server.serve, listener)
    await trio.sleep(1)
    assert [time - listener.times[0] for time in listener.times] == pytest.approx([0, 0.1, 0.1, 0.2])


async def test_cancelling_the_server_closes_connections_and_listener(daemon):
    async with trio.open_nursery() as inner:
        daemon.nursery = inner
        await daemon.start()
        client = await daemon.client()
        await client.call(f"{CONTROL}.Doctor")
        inner.cancel_scope.cancel()
    with pytest.raises(DaemonUnreachable):
        await client.call(f"{CONTROL}.Doctor")
    with pytest.raises(DaemonUnreachable):
        await daemon.client()


# --- descriptors ------------------------------------------------------------------------------------------


async def test_descriptors_cross_both_ways_and_none_is_left_over(daemon):
    async def exchange(call):
        fd = call.take_fd(0)
        os.write(fd, b"from the daemon")
        os.close(fd)
        read, write = os.pipe()
        os.write(write, b"handed out")
        os.close(write)
        return Reply({"Findings": []}, [read])

    await daemon.start({"Doctor": exchange})
    before = open_fds()
    async with await daemon.client() as client:
        read, write = os.pipe()
        result = await client.call(f"{CONTROL}.Doctor", fds=[write, write])
        os.close(write)
        assert os.read(read, 100) == b"from the daemon"
        assert os.read(read, 100) == b""  # also the second one, which nobody took, is closed
        assert os.read(result.fds[0], 100) == b"handed out"
        close_all([read, *result.fds])
    assert await daemon.open_fds_without_connections() == before


async def test_a_descriptor_can_be_taken_once_and_only_if_it_came(daemon):
    async def take(call):
        os.close(call.take_fd(1))
        call.take_fd(call.parameters.get("index", 1))

    await daemon.start({"Doctor": take})
    async with await daemon.client() as client:
        for count in (2, 1, 0):
            with pytest.raises(RemoteError) as info:
                await client.call(f"{CONTROL}.Doctor", fds=[0] * count)
            assert info.value.code == "InvalidParameterValue"
    for index in (-1, 0):
        with pytest.raises(Exception, match="no such descriptor"):
            Call(Peer(0, 0, 0), "m", {}).take_fd(index)


async def test_descriptors_belong_to_the_message_they_came_with(daemon):
    counts = []

    async def count(call):
        counts.append((call.parameters["Resource"], len(call.received)))

    await daemon.start({"Identify": count})
    with await daemon.raw() as sock:
        await send_with_fds(sock, ask("Identify", Resource="none"))
        await send_with_fds(sock, ask("Identify", Resource="two"), [0, 0])
        await send_with_fds(sock, ask("Identify", Resource="none again"))
        split = ask("Identify", Resource="split")
        await send_with_fds(sock, split[:5], [0])
        await send_with_fds(sock, split[5:9])
        await send_with_fds(sock, split[9:], [0, 0])
        large = ask("Identify", Resource="x" * 500_000)
        await send_with_fds(sock, large, [0])
        sock.shutdown(socket.SHUT_WR)
        await read_replies(sock)
    assert counts == [("none", 0), ("two", 2), ("none again", 0), ("split", 3), ("x" * 500_000, 1)]


async def test_a_flood_of_descriptors_is_refused_and_nothing_stays_open(daemon):
    await daemon.start()
    assert await daemon.is_well()
    before = await daemon.open_fds_without_connections()
    for fds, times in ((17, 1), (253, 1), (16, 625)):
        with await daemon.raw() as sock:
            with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012
                for _ in range(times):
                    await send_with_fds(sock, b'{"method":"' if times == 1 else b" ", [0] * fds)
                    await trio.testing.wait_all_tasks_blocked()
                    assert open_fds() < before + 300
                await send_with_fds(sock, b" ")
            (reply,) = await read_replies(sock)
            assert "descriptors" in reply["parameters"]["Message"]
    assert await daemon.is_well()
    assert await daemon.open_fds_without_connections() == before


async def test_descriptors_of_refused_calls_and_failed_handlers_are_closed(daemon):
    async def crash(call):
        raise ValueError

    async def unsendable(call):
        return Reply({"x": object()}, [os.dup(0)])

    await daemon.start({"Doctor": crash, "GetStatus": unsendable})
    async with await daemon.client() as client:
        await client.call(f"{CONTROL}.Identify", {"Resource": "x"})
        before = open_fds()
        for method, parameters in (("Doctor", {}), ("Identify", {"Resource": 1}), ("Nope", {}), ("GetStatus", {})):
            with pytest.raises(RemoteError):
                await client.call(f"{CONTROL}.{method}", parameters, fds=[0, 0])
            assert open_fds() == before
    with await daemon.raw() as sock:
        await send_with_fds(sock, b"garbage\0", [0])
        await read_replies(sock)
    with await daemon.raw() as sock:
        await send_with_fds(sock, b"{", [0])
    assert await daemon.is_well()  # it came later, so the others were accepted
    assert await daemon.open_fds_without_connections() == before - 2  # less the two ends of the client


# --- the client -------------------------------------------------------------------------------------------


async def test_the_client_gives_up_at_its_deadline_and_does_not_use_the_connection_again(daemon, autojump_clock):
    async def slow(call):
        await trio.sleep(100)

    await daemon.start({"Doctor": slow})
    async with await daemon.client() as client:
        with pytest.raises(Timeout, match="5 seconds"):
            await client.call(f"{CONTROL}.Doctor", deadline=5)
        assert client.closed
        with pytest.raises(DaemonUnreachable):
            await client.call(f"{CONTROL}.Identify", {"Resource": "x"})


async def test_a_cancelled_call_closes_the_connection(daemon, autojump_clock):
    async def slow(call):
        await trio.sleep(100)

    await daemon.start({"Doctor": slow})
    async with await daemon.client() as client:
        with trio.move_on_after(1):
            await client.call(f"{CONTROL}.Doctor")
        assert client.closed


async def test_calls_of_several_tasks_take_turns_on_one_connection(daemon):
    await daemon.start()
    got = []

    async def one(client, name):
        result = await client.call(f"{CONTROL}.Identify", {"Resource": name})
        got.append((name, result.parameters["ResourceId"]))

    async with await daemon.client() as client, trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(one, client, str(number))
    assert sorted(got) == sorted((str(n), str(n)) for n in range(20))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", DaemonUnreachable),
        (b"{", DaemonUnreachable),
        (b"junk\0", ProtocolError),
        (b"{}\0{}\0", ProtocolError),
        (b'{"continues":true}\0', ProtocolError),
        (b'{"error":"x.y.ServiceError"}\0', ProtocolError),
    ],
)
async def test_a_daemon_that_answers_nonsense_is_an_error_of_the_domain(tmp_path, nursery, answer, error):
    listener = listen(tmp_path / "s", 0o600)

    async def nonsense():
        sock, _ = await listener.accept()
        with sock, listener:
            await sock.recv(1000)
            await send_with_fds(sock, answer, [0]) if answer else None

    nursery.start_soon(nonsense)
    async with await VarlinkClient.connect(tmp_path / "s") as client:
        with pytest.raises(error):
            await client.call("a.B")
        assert client.closed


async def test_a_busy_listener_is_waited_for(tmp_path, nursery):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(path))
            with pytest.raises(DaemonUnreachable, match="wait"):
                await VarlinkClient.connect(path, deadline=0.05)
            accepted = []

            async def accept_later():
                await trio.testing.wait_all_tasks_blocked()
                accepted.extend(listener.accept()[0] for _ in range(1))

            nursery.start_soon(accept_later)
            (await VarlinkClient.connect(path, deadline=5)).close()
            accepted[0].close()


# --- the reference client ---------------------------------------------------------------------------------


async def test_the_reference_library_introspects_and_calls(daemon):
    async def missing(call):
        raise VolumeNotFound(volume="vol-1")

    await daemon.start({"Rename": missing})

    def use():
        with varlink.Client.new_with_address(f"unix:{daemon.path}") as client:
            connection = client.open(CONTROL)
            interfaces = client.get_interfaces()
            found = connection.Identify("data")
            with pytest.raises(varlink.VarlinkError) as info:
                connection.Rename("a", "b")
            connection.close()
            return interfaces, client.info["vendor"], found, info.value

    interfaces, vendor, found, error = await trio.to_thread.run_sync(use)
    assert interfaces == ["org.varlink.service", CONTROL]
    assert vendor == "ebsd"
    assert found == {"Kind": "volume", "ResourceId": "data"}
    assert error.error() == f"{CONTROL}.ServiceError"
    assert error.parameters()["Code"] == "InvalidVolume.NotFound"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["info", "unix:{}"], "Vendor: ebsd"),
        (["help", "unix:{}/io.ebsd.Control"], "method Doctor()"),
        (["help", "unix:{}/org.varlink.service"], "GetInterfaceDescription"),
        (["call", "unix:{}/io.ebsd.Control.Identify", json.dumps({"Resource": "x"})], '"Kind": "volume"'),
    ],
)
async def test_the_reference_command_line_works(daemon, arguments, expected):
    await daemon.start()
    command = [sys.executable, "-m", "varlink.cli", *(part.replace("{}", str(daemon.path)) for part in arguments)]
    done = await trio.run_process(command, capture_stdout=True, stderr=subprocess.STDOUT)
    assert expected in done.stdout.decode()


async def test_wrong_calls_of_the_service_interface_get_its_own_errors(daemon):
    await daemon.start()
    with await daemon.raw() as sock:
        for parameters, name in (
            ({}, "InvalidParameter"),
            ({"interface": "a.b"}, "InterfaceNotFound"),
            ({"interface": "a.b", "x": 1}, "InvalidParameter"),
        ):
            method = "org.varlink.service.GetInterfaceDescription"
            await sock.send(encode({"method": method, "parameters": parameters}))
            assert (await read_reply(sock))["error"] == f"org.varlink.service.{name}"


async def test_received_descriptors_are_not_inherited_by_children(daemon):
    flags = []

    async def look(call):
        flags.append(os.get_inheritable(call.received[0]))

    await daemon.start({"Doctor": look})
    async with await daemon.client() as client:
        await client.call(f"{CONTROL}.Doctor", fds=[0])
    assert flags == [False]


async def test_trio_reads_descriptors_as_the_blocking_code_does():
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        await send_with_fds(ours, b"x", [0])
        data, fds = await recv_with_fds(theirs, 10)
        close_all(fds)
        assert (data, len(fds)) == (b"x", 1)


async def test_the_calls_of_a_user_are_handled_a_few_at_a_time_and_nobody_else_waits_for_them(tmp_path, nursery):
    under_way, most, finish = 0, 0, trio.Event()

    async def slow(call: Call):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await finish.wait()
        under_way -= 1
        return {"Kind": "volume", "ResourceId": "x"}

    async def identify(call: Call):
        return await slow(call) if call.peer.uid == 1 else {"Kind": "volume", "ResourceId": "y"}

    daemon = await Daemon(tmp_path / "sock", nursery).start({"Identify": identify}, calls_per_uid=2)
    answers = []

    async def ask(uid):
        call = Call(Peer(uid, uid, 1), f"{CONTROL}.Identify", {"Resource": "x"})
        answers.append(
            (uid, json.loads((await daemon.server.answer_in_turn(call))[0][:-1])["parameters"]["ResourceId"])
        )

    async with trio.open_nursery() as callers:
        for _ in range(7):
            callers.start_soon(ask, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert under_way == 2
        with trio.fail_after(5):
            await ask(2)
        assert answers == [(2, "y")]
        finish.set()
    assert (most, len(answers)) == (2, 8)
    async with await daemon.client() as client:
        assert (await client.call(f"{CONTROL}.Identify", {"Resource": "x"}, deadline=5)).parameters["ResourceId"] == "y"
        assert os.getuid() in daemon.server._turns
    while daemon.server.connections:
        await trio.lowlevel.checkpoint()
    assert os.getuid() not in daemon.server._turns, "nothing is kept of a user without connections"


def slow_to_close(seconds: int) -> tuple[socket.socket, list[socket.socket]]:
    """Return a TCP socket whose last close(2) takes so many seconds, and what keeps it so."""
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    client.setblocking(False)
    with pytest.raises(BlockingIOError):  # noqa: PT012
        while True:
            client.send(b"x" * 65536)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
    return client, [server]


@pytest.mark.parametrize(
    "way", ["a call", "half a call", "no message", "too many", "not received", "one over the limit"]
)
async def test_a_descriptor_that_takes_long_to_close_is_its_senders_business(daemon, way):
    await daemon.start(max_connections_per_uid=2)
    slow, kept = slow_to_close(3)
    null = os.open(os.devnull, os.O_RDONLY)
    others = [await daemon.client()] + ([await daemon.client()] if way == "one over the limit" else [])
    await others[0].call(f"{CONTROL}.Identify", {"Resource": "x"})
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.path))
        fds, data = [slow.fileno()], ask("Identify", Resource="x")
        if way == "half a call":
            data = data[:9]
        elif way == "no message":
            data = b"]\0"
        elif way == "too many":
            fds = [null] * 40 + fds
        elif way == "not received":
            data = b"]\0" + data
        descriptors.send_with_fds(sock, data, fds)
        slow.close()
        os.close(null)
    started = trio.current_time()
    for _ in range(20):
        assert (await others[0].call(f"{CONTROL}.Identify", {"Resource": "x"}, deadline=5)).parameters
        await trio.sleep(0.01)
    assert trio.current_time() - started < 2
    for end in (*kept, *others):
        end.close()


@pytest.mark.trio
async def test_a_call_is_not_begun_when_its_client_has_hung_up(tmp_path, nursery):
    """A daemon that was stopped would do late what was given up; who only writes no more still waits for the answer."""
    begun = []

    async def note(call: Call):
        begun.append(call.parameters["Resource"])
        return {"Kind": "volume", "ResourceId": "x"}

    daemon = Daemon(tmp_path / "s", nursery)
    listener = listen(daemon.path, 0o600)
    gone, patient = await daemon.raw(), await daemon.raw()
    await gone.send(ask("Identify", Resource="gone"))
    gone.close()
    oneway = await daemon.raw()
    message = {"method": f"{CONTROL}.Identify", "parameters": {"Resource": "oneway"}, "oneway": True}
    await oneway.send(encode(message))
    oneway.close()
    await patient.send(ask("Identify", Resource="patient"))
    patient.shutdown(socket.SHUT_WR)
    server = VarlinkServer(
        vendor="", product="", version="", url="",
        services={CONTROL: {**dict.fromkeys(Interface.load(CONTROL).methods, nothing), "Identify": note}},
    )  # fmt: skip
    await nursery.start(server.serve, listener)
    with trio.fail_after(10):
        assert (await read_reply(patient))["parameters"]["ResourceId"] == "x"
        while server.connections:
            await trio.sleep(0.01)
    patient.close()
    assert sorted(begun) == ["oneway", "patient"]
