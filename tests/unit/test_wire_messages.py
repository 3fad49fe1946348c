"""Calls, replies and errors as they cross."""

import pytest

from ebsd.domain.errors import ExitStatus, ProtocolError, RemoteError, VolumeInUse
from ebsd.wire import messages
from ebsd.wire.messages import CallMessage, VarlinkError, parse_call, parse_reply


def test_a_call_survives_the_way():
    for call in (CallMessage("a.B", {"x": 1}), CallMessage("a.B", {}, more=True), CallMessage("a.B", {}, oneway=True)):
        assert parse_call(call.as_message()) == call


def test_absent_and_null_members_mean_the_same():
    absent = parse_call({"method": "a.B"})
    assert absent == parse_call({"method": "a.B", "parameters": None, "more": None, "oneway": False})


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"method": 1},
        {"method": "a.B", "parameters": []},
        {"method": "a.B", "more": 1},
        {"method": "a.B", "more": True, "oneway": True},
        {"method": "a.B", "colour": "red"},
    ],
)
def test_a_malformed_call_is_a_protocol_error(message):
    with pytest.raises(ProtocolError):
        parse_call(message)


def test_an_upgrade_is_not_implemented():
    with pytest.raises(VarlinkError) as info:
        parse_call({"method": "a.B", "upgrade": True})
    assert info.value.name == "org.varlink.service.MethodNotImplemented"


def test_the_interface_is_what_stands_before_the_last_dot():
    assert messages.split_method("io.ebsd.EC2.CreateVolume") == ("io.ebsd.EC2", "CreateVolume")
    assert messages.split_method("CreateVolume") == ("", "CreateVolume")


def test_an_error_of_ours_crosses_with_code_message_hint_and_exit_status():
    error = VolumeInUse(volume="vol-1", state="busy")
    with pytest.raises(RemoteError) as info:
        parse_reply(messages.make_service_error("io.ebsd.EC2", error))
    got = info.value
    assert (got.code, got.message, got.hint) == (error.code, error.message, error.hint)
    assert got.exit_status is ExitStatus.CONFLICT


def test_an_error_that_mentions_an_odd_path_can_still_be_sent():
    members = messages.error_members(RemoteError("X", "no /mnt/\udcff", "\udcff"))
    assert members == {"Code": "X", "Message": "no /mnt/?", "Hint": "?"}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("InvalidParameter", "InvalidParameterValue"),
        ("MethodNotFound", "UnsupportedOperation"),
        ("MethodNotImplemented", "UnsupportedOperation"),
        ("InterfaceNotFound", "UnsupportedOperation"),
        ("PermissionDenied", "UnauthorizedOperation"),
        ("ExpectedMore", "Ebsd.Protocol"),
    ],
)
def test_standard_errors_become_errors_of_the_domain(name, code):
    reply = messages.make_error(f"org.varlink.service.{name}", {"parameter": "P", "method": "M", "interface": "I"})
    assert messages.error_from_reply(reply).code == code


def test_a_foreign_error_names_itself():
    assert "com.example.Bad" in messages.error_from_reply({"error": "com.example.Bad"}).message


@pytest.mark.parametrize(
    "reply",
    [
        {"error": 5},
        {"error": "io.ebsd.EC2.ServiceError"},
        {"error": "io.ebsd.EC2.ServiceError", "parameters": {"Code": "X", "Message": 1, "Hint": ""}},
        {"parameters": 1},
        {"continues": "yes"},
        {"stranger": 1},
    ],
)
def test_a_malformed_reply_is_a_protocol_error(reply):
    with pytest.raises(ProtocolError):
        parse_reply(reply)


def test_a_reply_says_whether_others_follow():
    assert parse_reply(messages.make_reply({"a": 1}, continues=True)) == ({"a": 1}, True)
    assert parse_reply(messages.make_reply({})) == ({}, False)
