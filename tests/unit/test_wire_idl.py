"""Interface files: the grammar, our own files, and messages checked against them."""

from pathlib import Path

import pytest
import varlink

import ebsd.wire
from ebsd.domain.errors import InvalidParameterValue, MissingParameter, UnknownParameter
from ebsd.wire.idl import Enum, IdlError, Interface, Struct

OURS = sorted(path.stem for path in (Path(ebsd.wire.__file__).parent / "interfaces").glob("*.varlink"))

SAMPLE = Interface.parse(
    """# About the sample.
interface org.example.sample

type Colour (red, green)
type Point (x: int, y: ?int)

# Does it.
# Twice.
method Do(
  flag: bool, number: ?float, points: ?[]Point, names: ?[string]string, colour: ?Colour, any: ?object,
  inner: ?(a: string), # a comment
  set: ?[string](), maybe: ?[]?int
) -> (done: bool)
method Nothing() -> ()
error Bad (why: string)
"""
)


@pytest.mark.parametrize("name", OURS)
def test_our_files_parse_as_the_reference_parser_parses_them(name):
    ours = Interface.load(name)
    reference = varlink.Interface(ours.description)
    assert ours.name == reference.name == name
    assert {*ours.types, *ours.methods, *ours.errors} == set(reference.members)


@pytest.mark.parametrize("name", [name for name in OURS if name.startswith("io.ebsd.")])
def test_every_interface_of_ours_declares_the_service_error(name):
    error = Interface.load(name).errors["ServiceError"]
    error.check({"Code": "", "Message": "", "Hint": ""}, "")


def test_an_interface_that_has_no_file_is_refused():
    with pytest.raises(IdlError):
        Interface.load("io.ebsd.Nothing")


def test_comments_document_interface_and_methods():
    assert SAMPLE.doc == "About the sample."
    assert SAMPLE.methods["Do"].doc == "Does it.\nTwice."
    assert isinstance(SAMPLE.types["Colour"], Enum)
    assert isinstance(SAMPLE.errors["Bad"], Struct)


@pytest.mark.parametrize(
    "parameters",
    [
        {"flag": True},
        {"flag": False, "number": None, "points": None},
        {"flag": True, "number": 1, "points": [{"x": -(2**63)}, {"x": 2**63 - 1, "y": None}]},
        {"flag": True, "number": 1.5, "names": {"": "", "ü": "x"}, "colour": "red", "any": {"z": [1]}},
        {"flag": True, "inner": {"a": ""}, "set": {"one": {}}, "maybe": [1, None]},
    ],
)
def test_what_the_file_allows_is_taken(parameters):
    SAMPLE.check_parameters("Do", parameters)


@pytest.mark.parametrize(
    ("parameters", "kind", "place"),
    [
        ({}, MissingParameter, "flag"),
        ({"flag": None}, MissingParameter, "flag"),
        ({"flag": 1}, InvalidParameterValue, "flag"),
        ({"flag": "true"}, InvalidParameterValue, "flag"),
        ({"flag": True, "number": True}, InvalidParameterValue, "number"),
        ({"flag": True, "points": {}}, InvalidParameterValue, "points"),
        ({"flag": True, "points": [{"x": 1}, {"y": 1}]}, MissingParameter, "points[1].x"),
        ({"flag": True, "points": [None]}, MissingParameter, "points[0]"),
        ({"flag": True, "points": [{"x": True}]}, InvalidParameterValue, "points[0].x"),
        ({"flag": True, "points": [{"x": 1.0}]}, InvalidParameterValue, "points[0].x"),
        ({"flag": True, "points": [{"x": 2**63}]}, InvalidParameterValue, "points[0].x"),
        ({"flag": True, "points": [{"x": 1, "z": 1}]}, UnknownParameter, "points[0].z"),
        ({"flag": True, "names": {"k": 1}}, InvalidParameterValue, 'names["k"]'),
        ({"flag": True, "names": {"k": None}}, MissingParameter, 'names["k"]'),
        ({"flag": True, "names": []}, InvalidParameterValue, "names"),
        ({"flag": True, "colour": "blue"}, InvalidParameterValue, "colour"),
        ({"flag": True, "colour": 1}, InvalidParameterValue, "colour"),
        ({"flag": True, "any": 1}, InvalidParameterValue, "any"),
        ({"flag": True, "inner": 1}, InvalidParameterValue, "inner"),
        ({"flag": True, "inner": {"b": 1}}, UnknownParameter, "inner.b"),
        ({"flag": True, "fag": True}, UnknownParameter, "fag"),
        ({"flag": True, "a\nb": True}, UnknownParameter, '"a\\nb"'),
    ],
)
def test_what_the_file_does_not_allow_is_refused_with_its_place(parameters, kind, place):
    with pytest.raises(kind) as info:
        SAMPLE.check_parameters("Do", parameters)
    assert info.value.facts["parameter"] == place


def test_a_wrong_value_is_repeated_shortly_and_on_one_line():
    with pytest.raises(InvalidParameterValue) as info:
        SAMPLE.check_parameters("Do", {"flag": "\n" * 10_000})
    assert len(info.value.message) < 200
    assert "\n" not in info.value.message


def test_results_are_checked_too():
    SAMPLE.check_result("Do", {"done": True})
    with pytest.raises(MissingParameter):
        SAMPLE.check_result("Do", {})
    with pytest.raises(UnknownParameter):
        SAMPLE.check_result("Nothing", {"more": 1})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "interface x",
        "interface a.b\nmethod lower() -> ()",
        "interface a.b\nmethod M()",
        "interface a.b\nmethod M() -> (x)",
        "interface a.b\nmethod M(x: int,) -> ()",
        "interface a.b\nmethod M(x: ??int) -> ()",
        "interface a.b\nmethod M(x: Nope) -> ()",
        "interface a.b\nmethod M(x: int, x: int) -> ()",
        "interface a.b\nmethod M(x: int, y) -> ()",
        "interface a.b\nmethod M(x: number) -> ()",
        "interface a.b\nmethod M() -> ()\nmethod M() -> ()",
        "interface a.b\nerror E (a, b)",
        "interface a.b\nfunction F() -> ()",
        "interface a.b\n!",
    ],
)
def test_a_text_that_is_no_interface_is_refused(text):
    with pytest.raises(IdlError):
        Interface.parse(text)
