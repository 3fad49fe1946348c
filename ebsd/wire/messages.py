"""Varlink calls and replies as typed values, and errors on their way through a socket.

Our errors cross as ``<interface>.ServiceError`` with the members Code, Message and Hint; the errors of
``org.varlink.service`` are those of https://varlink.org/Service.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from ebsd.domain.errors import EbsdError, ProtocolError, RemoteError

SERVICE: Final = "org.varlink.service"
SERVICE_ERROR: Final = "ServiceError"
"""Name of the one error that every interface of ours declares."""

_CALL_MEMBERS: Final = frozenset(("method", "parameters", "more", "oneway", "upgrade"))
_REPLY_MEMBERS: Final = frozenset(("parameters", "continues", "error"))
_OTHER_VERSION: Final = "The program and the daemon are probably of different versions."


class CallMessage(NamedTuple):
    """What a client asks: ``method`` with its interface, as in ``io.ebsd.EC2.CreateVolume``."""

    method: str
    parameters: dict[str, Any]
    more: bool = False
    """The client takes several replies."""
    oneway: bool = False
    """The client takes no reply."""

    def as_message(self) -> dict[str, Any]:
        """Return the call as it is sent; false members are left out."""
        message: dict[str, Any] = {"method": self.method, "parameters": self.parameters}
        if self.more:
            message["more"] = True
        if self.oneway:
            message["oneway"] = True
        return message


class ReplyMessage(NamedTuple):
    parameters: dict[str, Any]
    continues: bool = False
    """More replies to the same call follow."""


class VarlinkError(Exception):
    """An error of org.varlink.service: full name and parameters."""

    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        super().__init__(name)
        self.name = name
        self.parameters = parameters


def method_not_found(method: str) -> VarlinkError:
    return VarlinkError(f"{SERVICE}.MethodNotFound", {"method": method})


def method_not_implemented(method: str) -> VarlinkError:
    return VarlinkError(f"{SERVICE}.MethodNotImplemented", {"method": method})


def interface_not_found(interface: str) -> VarlinkError:
    return VarlinkError(f"{SERVICE}.InterfaceNotFound", {"interface": interface})


def invalid_parameter(parameter: str) -> VarlinkError:
    return VarlinkError(f"{SERVICE}.InvalidParameter", {"parameter": parameter})


def split_method(method: str) -> tuple[str, str]:
    """Split ``io.ebsd.EC2.CreateVolume`` into interface and method; without a dot the interface is empty."""
    interface, _, name = method.rpartition(".")
    return interface, name


def parse_call(message: dict[str, Any]) -> CallMessage:
    """Return the call that a message is, or raise ProtocolError.

    ``upgrade`` raises VarlinkError (MethodNotImplemented): no method of ours changes the protocol.
    """
    _refuse_others(message, _CALL_MEMBERS, "call")
    method = message.get("method")
    if not isinstance(method, str):
        raise ProtocolError(reason="a call names no method")
    more, oneway, upgrade = (_flag(message, name) for name in ("more", "oneway", "upgrade"))
    if more and oneway:
        raise ProtocolError(reason="a call asks for several replies and for none")
    if upgrade:
        raise method_not_implemented(method)
    return CallMessage(method, _parameters(message), more, oneway)


def parse_reply(message: dict[str, Any]) -> ReplyMessage:
    """Return the reply that a message is; raise RemoteError for an error reply, else ProtocolError."""
    _refuse_others(message, _REPLY_MEMBERS, "reply")
    if message.get("error") is not None:
        raise error_from_reply(message)
    return ReplyMessage(_parameters(message), _flag(message, "continues"))


def make_reply(parameters: dict[str, Any], *, continues: bool = False) -> dict[str, Any]:
    return {"parameters": parameters, "continues": True} if continues else {"parameters": parameters}


def make_error(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return an error reply; ``name`` is the full one, with its interface."""
    return {"error": name, "parameters": parameters}


def make_service_error(interface: str, error: EbsdError) -> dict[str, Any]:
    """Return the reply that carries one of our errors."""
    return make_error(f"{interface}.{SERVICE_ERROR}", error_members(error))


def error_members(error: EbsdError) -> dict[str, str]:
    """Return what crosses of an error: ``{"Code", "Message", "Hint"}``, always valid Unicode.

    Those of the EBS direct APIs have their ``Reason``, too.
    """
    # A path with odd bytes may stand in a message, and an error that cannot be sent helps nobody.
    message, hint = (text.encode(errors="replace").decode() for text in (error.message, error.hint))
    members = {"Code": error.code, "Message": message, "Hint": hint}
    return {**members, "Reason": error.aws_reason} if error.aws_reason else members


def error_from_members(members: Any) -> RemoteError:
    """Return the error that ``error_members`` made, or raise ProtocolError."""
    if isinstance(members, dict):
        texts = [members.get(name, "") for name in ("Code", "Message", "Hint", "Reason")]
        if all(isinstance(text, str) for text in texts) and texts[0]:
            return RemoteError(*texts)
    raise ProtocolError(reason="an error reply has no Code, Message and Hint")


def error_from_reply(message: dict[str, Any]) -> RemoteError:
    """Return what an error reply says as RemoteError; raise ProtocolError when it cannot be read.

    The errors of org.varlink.service become InvalidParameterValue, UnsupportedOperation and
    UnauthorizedOperation, any foreign error Ebsd.Protocol.
    """
    error = message.get("error")
    if not isinstance(error, str):
        raise ProtocolError(reason="an error reply has no name")
    parameters = _parameters(message)
    interface, name = split_method(error)
    if name == SERVICE_ERROR:
        return error_from_members(parameters)
    if interface != SERVICE:
        return RemoteError(ProtocolError.code, f"The daemon answered with the unknown error {error}.")
    match name:
        case "InvalidParameter":
            text = f"The parameter {parameters.get('parameter')} is invalid."
            return RemoteError("InvalidParameterValue", text)
        case "MethodNotFound" | "MethodNotImplemented":
            text = f"The daemon has no method {parameters.get('method')}."
            return RemoteError("UnsupportedOperation", text, _OTHER_VERSION)
        case "InterfaceNotFound":
            text = f"The daemon has no interface {parameters.get('interface')}."
            return RemoteError("UnsupportedOperation", text, _OTHER_VERSION)
        case "PermissionDenied":
            return RemoteError("UnauthorizedOperation", "You are not authorized to perform this operation.")
        case _:
            return RemoteError(ProtocolError.code, f"The daemon answered with the unknown error {error}.")


def _refuse_others(message: dict[str, Any], known: frozenset[str], kind: str) -> None:
    for member in message:
        if member not in known:
            raise ProtocolError(reason=f"a {kind} has the unknown member {member[:64]!r}")


def _flag(message: dict[str, Any], name: str) -> bool:
    value = message.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ProtocolError(reason=f"{name} is not true or false")
    return value


def _parameters(message: dict[str, Any]) -> dict[str, Any]:
    parameters = message.get("parameters")
    if parameters is None:  # absent and null mean the same (varlink.org/Method-Call)
        return {}
    if not isinstance(parameters, dict):
        raise ProtocolError(reason="parameters is not a JSON object")
    return parameters
