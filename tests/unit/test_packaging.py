"""What an installation consists of: every package of the source tree, and programs that exist."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_of_the_source_is_installed() -> None:
    """In a checkout nobody misses one that is not listed."""
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("ebsd", "ebsctl")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_program_exists() -> None:
    for place in PROJECT["project"]["scripts"].values():
        module, function = place.split(":")
        assert callable(getattr(importlib.import_module(module), function))
