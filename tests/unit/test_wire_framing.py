"""Framing: whatever comes is a message or a ProtocolError, however it was cut up."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebsd.domain.errors import ProtocolError
from ebsd.wire.framing import MAX_DEPTH, MAX_FRAME, FrameReader, decode_object, encode, encode_object

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(texts, values, max_size=5)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@given(st.lists(objects, max_size=4), st.lists(st.integers(0, 10**6), max_size=8))
def test_messages_arrive_as_sent_however_the_stream_is_split(messages, cuts):
    reader = FrameReader()
    got = [m for piece in pieces(b"".join(map(encode, messages)), cuts) for m in reader.feed(piece)]
    assert got == messages
    assert not reader.partial


@given(st.binary(max_size=200), st.lists(st.integers(0, 10**6), max_size=5))
def test_arbitrary_bytes_give_the_same_messages_and_the_same_error_however_split(data, cuts):
    def outcome(parts):
        reader, got = FrameReader(limit=100), []
        try:
            for part in parts:
                got += reader.feed(part)
            reader.check()
        except ProtocolError:
            return got, "error"
        return got, reader.partial

    assert outcome(pieces(data, cuts)) == outcome([data])


def nested(depth: int) -> str:
    return '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "not JSON"),
        (b"nonsense", "not JSON"),
        (b"\xff{}", "UTF-8"),
        (b'{"a":"\xed\xa0\x80"}', "UTF-8"),
        (b'{"a":"\\ud800"}', "Unicode"),
        (b'{"\\udc80":1}', "Unicode"),
        (b"[]", "not a JSON object"),
        (b"1", "not a JSON object"),
        (b'{"a":1}{}', "not JSON"),
        (b'{"a":1,"a":2}', "twice"),
        (b'{"a":{"b":1,"b":1}}', "twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "Infinity"),
        (b'{"a":1e999}', "too large"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
        (nested(MAX_DEPTH + 1).encode(), "nested"),
        (b'{"a":' + b"[" * (MAX_DEPTH) + b"]" * (MAX_DEPTH) + b"}", "nested"),
        (b'{"a":' + b"[" * 500_000, "nested"),
        (b'{"a":' * 150_000, "nested"),
        (b'{"a":"\xef\xbb\xbf', "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
    ],
)
def test_a_bad_frame_is_a_protocol_error(frame, reason):
    with pytest.raises(ProtocolError, match=reason):
        FrameReader().feed(frame + b"\0")


def test_the_deepest_message_allowed_is_taken():
    assert decode_object(nested(MAX_DEPTH).encode()) == json.loads(nested(MAX_DEPTH))


def test_a_frame_of_exactly_the_limit_is_taken_and_one_byte_more_is_refused_before_its_end():
    frame = b'{"a":"' + b"x" * (MAX_FRAME - 8) + b'"}'
    assert len(frame) == MAX_FRAME
    assert FrameReader().feed(frame + b"\0") == [{"a": "x" * (MAX_FRAME - 8)}]
    with pytest.raises(ProtocolError, match="longer"):
        FrameReader().feed(frame + b" ")


def test_messages_before_a_bad_frame_are_delivered_and_then_it_is_reported_for_good():
    reader = FrameReader()
    assert reader.feed(b'{"a":1}\0rubbish\0{"b":2}\0') == [{"a": 1}]
    for _ in range(2):
        with pytest.raises(ProtocolError):
            reader.check()
        with pytest.raises(ProtocolError):
            reader.feed(b"{}\0")


def test_a_message_that_the_receiver_could_not_read_is_not_sent():
    for bad in ({"a": "\udc80"}, {"a": "x" * MAX_FRAME}):
        with pytest.raises(ProtocolError):
            encode(bad)
    with pytest.raises(ValueError):
        encode({"a": float("nan")})
    with pytest.raises(ProtocolError):
        encode_object({"a": "é"}, limit=9)
    assert encode_object({"a": "é"}, limit=10) == '{"a":"é"}'.encode()


def test_a_nul_inside_a_text_does_not_end_the_frame():
    assert FrameReader().feed(encode({"a": "x\0y"})) == [{"a": "x\0y"}]
