"""Names of places for a root key, as configuration, requests and notes have them, and the sources they stand for."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import msgspec

from ebsd.domain.errors import InvalidParameterValue
from ebsd.kms.passphrase import PassphraseFile
from ebsd.kms.rootkey import Credential, KeyFile, RootKeySource


class RootKeyPlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``{"kind": "file", "path"}``, ``{"kind": "credential", "name", "directory"}`` or ``{"kind": "passphrase"}``."""

    kind: str
    path: str | None = None
    name: str | None = None
    directory: str | None = None

    def check_outside(self, state_directory: Path) -> None:
        """Raise InvalidParameterValue for a key file in the state directory, whose files are replaced and destroyed."""
        if self.path is None:
            return
        path = absolute(self.path, "root_key.path")
        for parent in (path.parent, *path.parent.parents):
            with suppress(OSError):  # what does not exist is not the state directory
                if parent.samefile(state_directory):
                    raise invalid(self.path, "root_key.path", "it lies in the state directory of the key service")
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(state_directory)):
            raise invalid(self.path, "root_key.path", "it lies in the state directory of the key service")

    def source(self, state_directory: Path) -> RootKeySource:
        """Return the place; raises InvalidParameterValue."""
        if self.kind == "passphrase" and not (self.path or self.name or self.directory):
            return PassphraseFile(state_directory)
        if self.kind == "file" and self.path and self.name is None and self.directory is None:
            return KeyFile(absolute(self.path, "root_key.path"))
        if self.kind == "credential" and self.name and self.directory and self.path is None:
            if "/" in self.name or self.name.startswith("."):
                raise invalid(self.name, "root_key.name", "it is no name of a credential")
            return Credential(self.name, absolute(self.directory, "root_key.directory"))
        raise invalid(self.kind, "root_key", "it is neither a file nor a credential nor a passphrase")


def invalid(value: object, parameter: str, reason: str) -> InvalidParameterValue:
    return InvalidParameterValue(value=value, parameter=parameter, reason=reason)


def absolute(path: str, parameter: str) -> Path:
    """Return a path that is absolute; raises InvalidParameterValue."""
    if not path.startswith("/") or "\0" in path:
        raise invalid(path, parameter, "it is not an absolute path")
    return Path(path)
