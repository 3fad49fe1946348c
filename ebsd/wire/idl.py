"""Varlink interface files: a parser, and the check of messages against them.

The grammar is that of https://varlink.org/Interface-Definition. The files are package data beside this
module; they are the contract of the sockets, so the server takes nothing that they do not declare:

1. A member that is not declared is UnknownParameter, a required one that is absent or null MissingParameter,
   a value of another type InvalidParameterValue. Each names the place, as in ``Tags[0].Key``.
2. ``int`` is a JSON integer within 64 bits; true and false are not integers, and 1.0 is none either.
3. ``?type`` may be absent or null, which mean the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final

from ebsd.domain.errors import InvalidParameterValue, MissingParameter, UnknownParameter

INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**63 - 1


class IdlError(ValueError):
    """The text is not a Varlink interface definition: a fault of the file, not of a message."""


class Type:
    """What a value may be; ``check`` raises the domain error that names ``place``."""

    def check(self, value: Any, place: str) -> None:
        raise NotImplementedError

    def names(self) -> Iterator[str]:
        """Yield the names of declared types that this one uses."""
        return iter(())


class Basic(Type):
    """``bool``, ``int``, ``float``, ``string`` or ``object``."""

    _ARTICLES: Final = {"bool": "true or false", "int": "an integer", "float": "a number", "string": "a text"}

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, value: Any, place: str) -> None:
        match self.name:
            case "bool":
                fits = isinstance(value, bool)
            case "int":
                fits = isinstance(value, int) and not isinstance(value, bool)
                if fits and not INT_MIN <= value <= INT_MAX:
                    raise _invalid(value, place, "it does not fit 64 bits")
            case "float":
                fits = isinstance(value, int | float) and not isinstance(value, bool)
            case "string":
                fits = isinstance(value, str)
            case _:
                fits = isinstance(value, dict)
        if not fits:
            raise _invalid(value, place, f"it must be {self._ARTICLES.get(self.name, 'an object')}")


class Optional(Type):
    """``?type``."""

    def __init__(self, inner: Type) -> None:
        self.inner = inner

    def check(self, value: Any, place: str) -> None:
        if value is not None:
            self.inner.check(value, place)

    def names(self) -> Iterator[str]:
        return self.inner.names()


class Array(Type):
    """``[]type``."""

    def __init__(self, inner: Type) -> None:
        self.inner = inner

    def check(self, value: Any, place: str) -> None:
        if not isinstance(value, list):
            raise _invalid(value, place, "it must be a list")
        for number, item in enumerate(value):
            _check_present(self.inner, item, f"{place}[{number}]")

    def names(self) -> Iterator[str]:
        return self.inner.names()


class Map(Type):
    """``[string]type``."""

    def __init__(self, inner: Type) -> None:
        self.inner = inner

    def check(self, value: Any, place: str) -> None:
        if not isinstance(value, dict):
            raise _invalid(value, place, "it must be an object")
        for key, item in value.items():
            _check_present(self.inner, item, f"{place}[{_shown(key)}]")

    def names(self) -> Iterator[str]:
        return self.inner.names()


class Struct(Type):
    """``(Name: type, ...)``."""

    def __init__(self, fields: Mapping[str, Type]) -> None:
        self.fields = fields

    def check(self, value: Any, place: str) -> None:
        if not isinstance(value, dict):
            raise _invalid(value, place, "it must be an object")
        prefix = f"{place}." if place else ""
        for name in value:
            if name not in self.fields:
                raise UnknownParameter(parameter=f"{prefix}{_name(name)}")
        for name, kind in self.fields.items():
            _check_present(kind, value.get(name), f"{prefix}{name}")

    def names(self) -> Iterator[str]:
        for kind in self.fields.values():
            yield from kind.names()


class Enum(Type):
    """``(one, two)``."""

    def __init__(self, members: tuple[str, ...]) -> None:
        self.members = members

    def check(self, value: Any, place: str) -> None:
        if not isinstance(value, str) or value not in self.members:
            raise _invalid(value, place, f"it must be one of {', '.join(self.members)}")


class Named(Type):
    """A type declared elsewhere in the same interface."""

    def __init__(self, name: str, declared: Mapping[str, Type]) -> None:
        self.name = name
        self._declared = declared

    def check(self, value: Any, place: str) -> None:
        self._declared[self.name].check(value, place)

    def names(self) -> Iterator[str]:
        yield self.name


class Method:
    """A method: what goes in, what comes out, and the comment above it."""

    def __init__(self, name: str, parameters: Struct, result: Struct, doc: str) -> None:
        self.name = name
        self.parameters = parameters
        self.result = result
        self.doc = doc


class Interface:
    """One interface; ``description`` is the text of its file, ``doc`` the comment at its head."""

    def __init__(self, name: str, description: str, doc: str) -> None:
        self.name = name
        self.description = description
        self.doc = doc
        self.types: dict[str, Type] = {}
        self.methods: dict[str, Method] = {}
        self.errors: dict[str, Struct] = {}

    @staticmethod
    def parse(text: str) -> Interface:
        """Return the interface that the text defines, or raise IdlError."""
        return _Parser(text).interface()

    @staticmethod
    @cache
    def load(name: str) -> Interface:
        """Return the interface of this name from the package's files; raise IdlError when there is none."""
        from importlib import resources  # here: it costs more than the rest of this module

        file = resources.files("ebsd.wire") / "interfaces" / f"{name}.varlink"
        try:
            text = file.read_text("utf-8")
        except FileNotFoundError as exc:
            raise IdlError(f"there is no interface file for {name}") from exc
        interface = Interface.parse(text)
        if interface.name != name:
            raise IdlError(f"{name}.varlink defines {interface.name}")
        return interface

    def check_parameters(self, method: str, parameters: Mapping[str, Any]) -> None:
        """Check a call's parameters; raise UnknownParameter, MissingParameter or InvalidParameterValue.

        The method must exist (KeyError).
        """
        self.methods[method].parameters.check(parameters, "")

    def check_result(self, method: str, result: Mapping[str, Any]) -> None:
        """Check a reply's parameters; raises what ``check_parameters`` raises."""
        self.methods[method].result.check(result, "")


def _check_present(kind: Type, value: Any, place: str) -> None:
    if value is None and not isinstance(kind, Optional):
        raise MissingParameter(parameter=place)
    kind.check(value, place)


def _invalid(value: Any, place: str, reason: str) -> InvalidParameterValue:
    return InvalidParameterValue(value=_shown(value), parameter=place, reason=reason)


def _shown(value: Any) -> str:
    """Return the value as one short line of JSON without control characters."""
    if isinstance(value, str):
        value = value[:_SHOWN]  # before the work of quoting it
    elif isinstance(value, list | dict) and len(value) > _SHOWN:
        return "[...]" if isinstance(value, list) else "{...}"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _name(text: str) -> str:
    return text if _IDENTIFIER.fullmatch(text) and len(text) <= _SHOWN else _shown(text)


_SHOWN: Final = 64
"""Characters of a wrong value that a message repeats."""

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_TOKEN = re.compile(r"->|\[\]|\[string\]|[():,?]|[A-Za-z][A-Za-z0-9_.-]*")
_INTERFACE_NAME = re.compile(r"[A-Za-z](?:-*[A-Za-z0-9])*(?:\.[A-Za-z0-9](?:-*[A-Za-z0-9])*)+")
_MEMBER_NAME = re.compile(r"[A-Z][A-Za-z0-9]*")
_IDENTIFIER = re.compile(r"[A-Za-z](?:_?[A-Za-z0-9])*")
_BASIC = frozenset(("bool", "int", "float", "string", "object"))


class _Parser:
    """Recursive descent over tokens; comments before a declaration are its documentation."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._comment = ""
        self._token = ""
        self._types: dict[str, Type] = {}
        self._next()

    def interface(self) -> Interface:
        doc = self._comment
        self._expect("interface")
        interface = Interface(self._take(_INTERFACE_NAME, "an interface name"), self._text, doc)
        interface.types = self._types
        while self._token:
            doc, keyword = self._comment, self._token
            if keyword not in ("type", "method", "error"):
                raise self._wrong("type, method or error")
            self._next()
            name = self._take(_MEMBER_NAME, f"the name of a {keyword}")
            if name in interface.types or name in interface.methods or name in interface.errors:
                raise IdlError(f"{interface.name} declares {name} twice")
            if keyword == "type":
                self._types[name] = self._struct_or_enum()
            elif keyword == "error":
                interface.errors[name] = self._struct()
            else:
                parameters = self._struct()
                self._expect("->")
                interface.methods[name] = Method(name, parameters, self._struct(), doc)
        self._check_names(interface)
        return interface

    def _check_names(self, interface: Interface) -> None:
        users: list[Type] = [*interface.types.values(), *interface.errors.values()]
        for method in interface.methods.values():
            users += (method.parameters, method.result)
        for user in users:
            for name in user.names():
                if name not in interface.types:
                    raise IdlError(f"{interface.name} uses the type {name}, which it does not declare")

    def _struct(self) -> Struct:
        kind = self._struct_or_enum()
        if not isinstance(kind, Struct):
            raise IdlError("an enum stands where a struct is wanted")
        return kind

    def _struct_or_enum(self) -> Struct | Enum:
        self._expect("(")
        fields: dict[str, Type] = {}
        members: list[str] = []
        while self._token != ")":
            name = self._take(_IDENTIFIER, "the name of a member")
            if name in fields or name in members:
                raise IdlError(f"the member {name} stands twice")
            if self._token == ":":
                self._next()
                fields[name] = self._type()
            else:
                members.append(name)
            if self._token != ",":
                break
            self._next()
            if self._token == ")":
                raise self._wrong("the name of a member")
        self._expect(")")
        if members and fields:
            raise IdlError(f"the member {members[0]} has no type")
        return Enum(tuple(members)) if members else Struct(fields)

    def _type(self) -> Type:
        token = self._token
        if token == "(":
            return self._struct_or_enum()
        self._next()
        if token == "?":
            if self._token == "?":
                raise IdlError("?? is no type")
            return Optional(self._type())
        if token == "[]":
            return Array(self._type())
        if token == "[string]":
            return Map(self._type())
        if token in _BASIC:
            return Basic(token)
        if _MEMBER_NAME.fullmatch(token):
            return Named(token, self._types)
        raise IdlError(f"{token or 'the end of the file'} is no type")

    def _take(self, pattern: re.Pattern[str], what: str) -> str:
        token = self._token
        if pattern.fullmatch(token) is None:
            raise self._wrong(what)
        self._next()
        return token

    def _expect(self, token: str) -> None:
        if self._token != token:
            raise self._wrong(token)
        self._next()

    def _wrong(self, wanted: str) -> IdlError:
        line = self._text.count("\n", 0, self._at) + 1
        return IdlError(f"line {line}: {wanted} expected, found {self._token or 'the end of the file'}")

    def _next(self) -> None:
        blank = _BLANK.match(self._text, self._at)
        self._at = blank.end() if blank else self._at
        lines = blank.group().splitlines() if blank else []
        self._comment = "\n".join(line.strip().lstrip("#").strip() for line in lines if "#" in line)
        if self._at == len(self._text):
            self._token = ""
            return
        token = _TOKEN.match(self._text, self._at)
        if token is None:
            line = self._text.count("\n", 0, self._at) + 1
            raise IdlError(f"line {line}: unexpected {self._text[self._at]!r}")
        self._token = token.group()
        self._at = token.end()
