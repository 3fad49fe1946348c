"""The table of ARCHITECTURE.md, "Layers of the code": who may import whom. Imports go downwards only."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ALLOWED: dict[str, set[str]] = {
    # package -> packages of ours, then packages of others
    "ebsd": set(),
    "ebsd.domain": set(),
    "ebsd.wire": {"ebsd.domain"},
    "ebsd.crypto": {"ebsd.domain", "cryptography", "cffi"},
    "ebsd.store": {"ebsd.domain", "apsw"},
    "ebsd.ipc": {"ebsd.domain", "ebsd.wire", "trio"},
    "ebsd.kms": {
        "ebsd", "ebsd.domain", "ebsd.wire", "ebsd.crypto", "ebsd.ipc", "trio", "apsw", "cryptography", "msgspec",
        "boto3", "botocore",
    },
    "ebsd.volume": {"ebsd.domain", "ebsd.crypto", "ebsd.store", "ebsd.ipc", "trio", "pyfuse3", "cffi"},
    "ebsd.control": {"ebsd", "ebsd.domain", "ebsd.wire", "ebsd.store", "ebsd.ipc", "trio"},
    "ebsd.daemon": {
        "ebsd", "ebsd.domain", "ebsd.wire", "ebsd.store", "ebsd.ipc", "ebsd.control", "trio", "msgspec",
    },
    "ebsctl": {"ebsd", "ebsd.domain", "ebsd.wire", "click"},
}  # fmt: skip

PURE_FORBIDDEN = {"os", "socket", "subprocess", "time", "random", "secrets", "io", "pathlib", "tempfile"}
"""Standard modules that the domain has no business with: no I/O, no clock, no chance."""

MODULES = sorted(p for top in ("ebsd", "ebsctl") for p in (ROOT / top).rglob("*.py"))


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] == "ebsctl" or len(parts) == 2 else f"{parts[0]}.{parts[1]}"


def imported(path: Path) -> set[str]:
    """Return all modules that a file names in imports, those inside functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {node.module} if node.module.count(".") else {f"{node.module}.{a.name}" for a in node.names}
    return names


def target_of(name: str) -> str | None:
    """Return the row of the table that an imported module belongs to; None for the standard library."""
    parts = name.split(".")
    if parts[0] == "ebsctl":
        return "ebsctl"
    if parts[0] == "ebsd":
        package = ".".join(parts[:2])
        return package if package in ALLOWED else "ebsd"
    return None if parts[0] in sys.stdlib_module_names else parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    package = package_of(path)
    targets = {target_of(name) for name in imported(path)} - {None, package}
    assert targets <= ALLOWED[package], f"{package} may not import {sorted(targets - ALLOWED[package])}"


@pytest.mark.parametrize("path", [p for p in MODULES if package_of(p) == "ebsd.domain"], ids=lambda p: p.name)
def test_the_domain_has_no_io_no_clock_and_no_chance(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & PURE_FORBIDDEN


def test_boto3_is_imported_only_where_it_is_used() -> None:
    """It costs a third of a second and 35 MB, which hosts without AWS shall not pay."""
    users = [path for path in MODULES if {"boto3", "botocore"} & {name.split(".")[0] for name in imported(path)}]
    assert [path.name for path in users] == ["aws_client.py"]
    tree = ast.parse(users[0].read_text())
    at_start = {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}
    at_start |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not {name for name in at_start if name.startswith("boto")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_opens_with_its_job(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, "a module says in its first sentence what it is for"


def test_the_document_shows_the_same_table() -> None:
    """The table in ARCHITECTURE.md is a copy for readers; this keeps it one."""
    rows = {}
    for line in (ROOT / "ebsd" / "ARCHITECTURE.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if (
            len(cells) == 4
            and cells[0].startswith("`")
            and cells[0].strip("`") in {n.removeprefix("ebsd.") for n in ALLOWED}
        ):
            rows[cells[0].strip("`")] = cells
    for package in ALLOWED:
        if package == "ebsd":
            continue
        cells = rows[package.removeprefix("ebsd.")]
        ours = {word.strip("` ") for word in cells[2].split(",")} - {"-"}
        others = {word.strip("` ") for word in cells[3].split(",")} - {"-"}
        expected = ALLOWED[package] - {"ebsd"}
        assert ours == {n.removeprefix("ebsd.") for n in expected if n.startswith("ebsd")}, package
        assert others == {n for n in expected if not n.startswith("ebsd")}, package


def test_no_two_test_modules_have_one_name() -> None:
    """pytest imports test modules by their bare names: two of one name, and a whole run collects neither."""
    paths: dict[str, list[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        paths.setdefault(path.name, []).append(str(path.relative_to(ROOT)))
    assert not [found for found in paths.values() if len(found) > 1]
