"""Channels between our own processes."""

import os
import socket

import pytest
import trio
import trio.testing

from ebsd.domain.errors import ProtocolError, RemoteError, Timeout, VolumeNotFound
from ebsd.ipc.channel import MAX_PACKET, Channel, ChannelClosed, Packet, serve
from ebsd.ipc.sockets import close_all

pytestmark = pytest.mark.trio


def socket_pair():
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@pytest.fixture
async def pair():
    ours, theirs = map(Channel, socket_pair())
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
async def raw():
    """A channel and the bare socket at its other end."""
    ours, theirs = socket_pair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def echo(params, fds):
    return {"got": params, "count": len(fds)}, fds


async def fail(params, fds):
    close_all(fds)
    raise VolumeNotFound(volume="vol-1")


async def crash(params, fds):
    raise KeyError("secret")


HANDLERS = {"echo": echo, "fail": fail, "crash": crash}


async def test_packets_cross_whole_with_their_descriptors(pair):
    ours, theirs = pair
    before = open_fds()
    await ours.send({"n": 1}, [0] * 253)
    await ours.send({"n": 2})
    first, second = await theirs.receive(), await theirs.receive()
    assert (first.message, len(first.fds)) == ({"n": 1}, 253)
    assert second == Packet({"n": 2}, [])
    close_all(first.fds)
    assert open_fds() == before


async def test_the_largest_packet_fits_and_a_larger_one_is_refused_by_the_sender(pair):
    ours, theirs = pair
    text = "x" * (MAX_PACKET - len('{"a":""}'))
    await ours.send({"a": text})
    assert (await theirs.receive()).message == {"a": text}
    with pytest.raises(ProtocolError):
        await ours.send({"a": text + "x"})
    await ours.send({"a": "still usable"})


async def test_the_end_of_the_other_side_is_none_for_the_reader_and_an_error_for_the_writer(pair):
    ours, theirs = pair
    await ours.send({"never": "read"})
    theirs.close()
    assert await ours.receive() is None
    with pytest.raises(ChannelClosed):
        await ours.send({})
    with pytest.raises(ChannelClosed):
        await theirs.send({})
    with pytest.raises(ChannelClosed):
        await theirs.receive()


async def test_closing_wakes_the_own_reader(pair, nursery):
    ours, _ = pair
    woken = trio.Event()

    async def read():
        with pytest.raises(ChannelClosed):
            await ours.receive()
        woken.set()

    nursery.start_soon(read)
    await trio.testing.wait_all_tasks_blocked()
    await ours.aclose()
    await woken.wait()


@pytest.mark.parametrize("data", [b"junk", b"[]", b"\xff", b"x" * (MAX_PACKET + 1), b'{"a":1,"a":1}'])
async def test_a_bad_packet_is_an_error_and_its_descriptors_are_closed(raw, data):
    channel, other = raw
    other.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_PACKET)
    before = open_fds()
    socket.send_fds(other, [data], [0, 0])
    with pytest.raises(ProtocolError):
        await channel.receive()
    assert open_fds() == before


async def test_requests_are_answered_with_results_errors_and_descriptors(pair, nursery):
    ours, theirs = pair
    incidents = []
    report = lambda number, exc: incidents.append((number, exc))  # noqa: E731
    nursery.start_soon(lambda: serve(theirs, HANDLERS, on_incident=report))
    before = open_fds()
    packet = await ours.request("echo", {"x": [1]}, [0, 0], deadline=5)
    assert packet.message == {"got": {"x": [1]}, "count": 2}
    close_all(packet.fds)
    with pytest.raises(RemoteError) as info:
        await ours.request("fail", fds=[0], deadline=5)
    assert (info.value.code, info.value.hint) == ("InvalidVolume.NotFound", VolumeNotFound(volume="").hint)
    with pytest.raises(RemoteError, match="incident") as info:
        await ours.request("crash", deadline=5)
    assert incidents[0][0] in info.value.message
    with pytest.raises(RemoteError, match="missing") as info:
        await ours.request("missing", {}, [0], deadline=5)
    assert info.value.code == "UnsupportedOperation"
    assert (await ours.request("echo", deadline=None)).message["count"] == 0
    assert open_fds() == before
    ours.close()


@pytest.mark.parametrize("result", [{"x": object()}, {"x": "y" * MAX_PACKET}])
async def test_a_result_that_cannot_be_sent_is_answered_as_an_error_and_its_descriptors_are_closed(
    pair, nursery, result
):
    async def bad(params, fds):
        return result, [os.dup(0)]

    ours, theirs = pair
    nursery.start_soon(lambda: serve(theirs, {"bad": bad}, on_incident=lambda number, exc: None))
    before = open_fds()
    with pytest.raises(RemoteError):
        await ours.request("bad", deadline=5)
    assert open_fds() == before
    ours.close()


async def test_requests_of_several_tasks_take_turns(pair, nursery):
    ours, theirs = pair
    nursery.start_soon(serve, theirs, HANDLERS)
    got = []

    async def one(number):
        got.append((number, (await ours.request("echo", {"n": number}, deadline=5)).message["got"]["n"]))

    async with trio.open_nursery() as inner:
        for number in range(20):
            inner.start_soon(one, number)
    assert sorted(got) == [(n, n) for n in range(20)]
    ours.close()


async def test_a_request_without_answer_times_out_and_closes_the_channel(pair, autojump_clock):
    ours, _theirs = pair
    with pytest.raises(Timeout, match="30 seconds"):
        await ours.request("echo", deadline=30)
    with pytest.raises(ChannelClosed):
        await ours.request("echo", deadline=30)


async def test_a_cancelled_request_closes_the_channel(pair, autojump_clock):
    ours, _theirs = pair
    with trio.move_on_after(1):
        await ours.request("echo", deadline=30)
    assert ours.closed


async def test_a_request_that_is_too_large_leaves_the_channel_usable(pair, nursery):
    ours, theirs = pair
    nursery.start_soon(serve, theirs, HANDLERS)
    with pytest.raises(ProtocolError):
        await ours.request("echo", {"x": "y" * MAX_PACKET}, deadline=5)
    assert (await ours.request("echo", deadline=5)).message["count"] == 0
    ours.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"{}",
        b'{"id":2,"result":{}}',
        b'{"id":1}',
        b'{"id":1,"result":1}',
        b'{"id":1,"result":{},"error":{}}',
        b'{"id":1,"error":{}}',
        b"junk",
    ],
)
async def test_an_answer_that_is_none_closes_the_channel(raw, answer):
    channel, other = raw
    before = open_fds()
    socket.send_fds(other, [answer], [0])
    with pytest.raises(ProtocolError):
        await channel.request("echo", deadline=5)
    assert channel.closed
    assert open_fds() == before - 1


async def test_another_version_is_refused_with_a_reason(raw, nursery):
    channel, other = raw
    nursery.start_soon(serve, channel, HANDLERS)
    other.send(b'{"v":2,"id":7,"method":"echo","params":{}}')
    other.setblocking(False)
    await trio.lowlevel.wait_readable(other)
    answer = other.recv(10_000).decode()
    assert '"id":7' in answer
    assert "version 2" in answer
    other.shutdown(socket.SHUT_RDWR)


async def test_what_is_no_request_ends_the_service(raw):
    channel, other = raw
    before = open_fds()
    socket.send_fds(other, [b'{"v":1,"method":"echo"}'], [0])
    with pytest.raises(ProtocolError):
        await serve(channel, HANDLERS)
    assert open_fds() == before


async def test_the_service_ends_when_the_other_side_leaves_even_before_its_answer(pair):
    ours, theirs = pair
    await ours.send({"v": 1, "id": 1, "method": "echo", "params": {}})
    ours.close()
    await serve(theirs, HANDLERS)
