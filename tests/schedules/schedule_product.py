"""The product's own modules, loaded once more from their sources, so that one rule at a time can be switched off.

1. A mutation replaces a text that must occur exactly once in a file; a text that is gone is an error, not a pass.
2. Copies import copies: nothing here touches the modules that other tests use. What has no part in the protocol
   (errors, model, crypto, ipc) is the original.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import ebsd.control.growth
import ebsd.control.snapshots
import ebsd.volume.process

ROOT = Path(ebsd.volume.process.__file__).parents[1]

ORDER = (
    "store.atomic", "store.entries", "store.layers", "store.layertable", "store.durablemap", "store.livemap",
    "store.salvage", "store.sealedmap", "store.signedrecord", "store.record", "store.sweep",
    "volume.scheduling", "volume.chunklocks", "volume.engine", "volume.draining", "volume.verify", "volume.process",
    "control.lineage_files", "control.volume_files", "control.snapshot_files", "control.lineages",
    "control.drains", "control.snapshots", "control.growth",
)  # fmt: skip
"""In the order of their imports."""


@dataclass(frozen=True)
class Edit:
    """A change of one file: ``old`` must occur exactly once in it."""

    file: str
    """Below ``ebsd``."""
    old: str
    new: str


@lru_cache(maxsize=256)
def _compiled(file: str, edits: tuple[Edit, ...]) -> CodeType:
    path = ROOT / file
    text = path.read_text()
    for edit in edits:
        if text.count(edit.old) != 1:
            raise AssertionError(
                f"ebsd/{file} has a text of the table of mutations {text.count(edit.old)} times, not once:\n{edit.old}"
            )
        text = text.replace(edit.old, edit.new)
    return compile(text, str(path), "exec")


class Product:
    """The copies, by their last names; ``use`` gives them a machine to run on."""

    def __init__(self, edits: Sequence[Edit] = ()) -> None:
        self.modules: dict[str, ModuleType] = {}
        names = {f"ebsd.{name}" for name in ORDER}
        kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
        try:
            for name in ORDER:
                file = name.replace(".", "/") + ".py"
                module = ModuleType(f"ebsd.{name}")
                module.__file__ = str(ROOT / file)
                sys.modules[module.__name__] = module
                exec(_compiled(file, tuple(e for e in edits if e.file == file)), module.__dict__)
                self.modules[name.split(".")[1]] = module
        finally:
            for name in names:
                sys.modules.pop(name, None)
            sys.modules.update(kept)
        unknown = {e.file for e in edits} - {name.replace(".", "/") + ".py" for name in ORDER}
        if unknown:
            raise AssertionError(f"not loaded, so no mutation of it shows: {unknown}")

    def __getattr__(self, name: str) -> Any:
        try:
            return self.modules[name]
        except KeyError:
            raise AttributeError(name) from None

    def use(self, replacements: Mapping[str, Any], closing: Any) -> None:
        """Put ``replacements`` (trio, os.close and so on) into the modules that use them."""
        for module in self.modules.values():
            for name, value in replacements.items():
                if name in module.__dict__:
                    module.__dict__[name] = value
            if "os" in module.__dict__:
                module.__dict__["os"] = closing


class Os:
    """``os`` for code of the product that closes and duplicates descriptors of the machine's files."""

    def __init__(self, close: Any, dup: Any) -> None:
        self.close = close
        self.dup = dup

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


SILENT = SimpleNamespace(**{name: lambda *_: None for name in ("debug", "info", "warning", "error", "exception")})
