"""How our own programs are started: the interpreter's arguments and environment; nothing else is imported for it."""

from __future__ import annotations

import os
import sys
from typing import Final

ENVIRONMENT: Final = {"LANG": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}

# A checkout or an editable install is not on the path of an isolated interpreter (-I).
_FROM_DIRECTORY: Final = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
_MAIN_OF: Final = "import importlib, sys; sys.path.insert(0, sys.argv[1]); importlib.import_module(sys.argv[2]).main()"


def command_from_directory(module: str) -> list[str]:
    """Return the arguments that start a module of this project wherever it lies, in an isolated interpreter."""
    return [sys.executable, "-I", "-c", _FROM_DIRECTORY, package_directory(), module]


def light_command(module: str) -> list[str]:
    """Return the arguments that call ``main`` of a module that needs the standard library only.

    Without ``site``: a third less memory, and a start in half the time.
    """
    return [sys.executable, "-I", "-S", "-c", _MAIN_OF, package_directory(), module]


def package_directory() -> str:
    """Return the directory that holds this package."""
    return os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))
