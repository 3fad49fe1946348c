"""Where the root key comes from: a key file of its own, or a systemd credential; under a passphrase: passphrase.py.

1. 32 bytes, held in a Secret; the text form is ``ebsd-root-key-1 <base64>`` and a newline.
2. A root key is made only with a new state. Where state exists and the key does not fit, nobody makes another one:
   it could not open anything, and would hide what is missing.
3. A key file that others may read is refused, not repaired: who read it already is not known.
Source of the credential: systemd.exec(5), LoadCredential= and $CREDENTIALS_DIRECTORY.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, Protocol

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import RootKeyUnavailable
from ebsd.kms.statefiles import sync_directory, write_synced

ROOT_KEY_BYTES: Final = 32
_PREFIX: Final = b"ebsd-root-key-1 "
_ALPHABET: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_TEXT_BYTES: Final = 44
"""Base64 characters of 32 bytes, the padding included."""


class Fault(Enum):
    MISSING = "missing"
    INSECURE = "insecure"
    MALFORMED = "malformed"
    LOCKED = "locked"
    """It is there, under a passphrase that was not given yet."""


class RootKeyFault(RootKeyUnavailable):
    """RootKeyUnavailable with the kind of fault: Restore may put a key where none is, not where one is insecure."""

    def __init__(self, fault: Fault, reason: str) -> None:
        super().__init__(reason=reason)
        self.fault = fault


class RootKeySource(Protocol):
    """A place that has the root key."""

    @property
    def kind(self) -> str:
        """``file``, ``credential`` or ``passphrase``."""

    def describe(self) -> str:
        """Return what GetStatus shows: a path, or ``credential:NAME``."""

    def read(self) -> Secret:
        """Return the root key; raises RootKeyFault."""

    def store(self, key: Secret) -> None:
        """Keep a root key durably where none is; raises RootKeyFault where that is not possible."""

    def set_aside(self, stamp: str) -> None:
        """Give a place that holds no root key another name, so that ``store`` finds it free."""


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A file of mode 0600 that belongs to the service or to root."""

    path: Path

    @property
    def kind(self) -> str:
        return "file"

    def describe(self) -> str:
        return str(self.path)

    def read(self) -> Secret:
        return _parse(_read(self.path, private=True), str(self.path))

    def store(self, key: Secret) -> None:
        """Write the key file; an existing file is never replaced."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = _format(key)
        draft = self.path.with_name(self.path.name + ".new")
        try:
            write_synced(draft, text)
            os.link(draft, self.path)  # unlike rename(2), link(2) never replaces
        except FileExistsError as exc:
            raise RootKeyFault(Fault.MALFORMED, f"{self.path} exists already") from exc
        except OSError as exc:
            raise RootKeyFault(Fault.MISSING, f"{self.path} cannot be written: {exc.strerror}") from exc
        finally:
            text[:] = bytes(len(text))
            with suppress(FileNotFoundError):
                draft.unlink()
        sync_directory(self.path.parent)

    def set_aside(self, stamp: str) -> None:
        self.path.rename(self.path.with_name(f"{self.path.name}.before-restore-{stamp}"))


@dataclass(frozen=True, slots=True)
class Credential:
    """A systemd credential: decrypted by systemd into a directory that only this service can read."""

    name: str
    directory: Path

    @property
    def kind(self) -> str:
        return "credential"

    def describe(self) -> str:
        return f"credential:{self.name}"

    def read(self) -> Secret:
        # systemd grants access by an ACL, whose mask shows as group bits: the mode says nothing here.
        return _parse(_read(self.directory / self.name, private=False), self.describe())

    def store(self, key: Secret) -> None:
        raise RootKeyFault(Fault.MISSING, f"{self.describe()} is not given to the service, which cannot make one")

    def set_aside(self, stamp: str) -> None:
        raise RootKeyFault(Fault.MALFORMED, f"{self.describe()} holds no root key; give the service another one")


def _read(path: Path, *, private: bool) -> bytearray:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        raise RootKeyFault(Fault.MISSING, f"{path} does not exist") from exc
    except OSError as exc:
        reason = "it is a symbolic link" if path.is_symlink() else str(exc.strerror)
        raise RootKeyFault(Fault.INSECURE, f"{path} cannot be opened: {reason}") from exc
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RootKeyFault(Fault.INSECURE, f"{path} is not a regular file")
        if private and status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise RootKeyFault(Fault.INSECURE, f"{path} has mode {mode:04o}: others may have read it")
        if private and status.st_uid not in (0, os.geteuid()):
            raise RootKeyFault(Fault.INSECURE, f"{path} belongs to uid {status.st_uid}")
        content = bytearray(len(_PREFIX) + _TEXT_BYTES + 2)
        length = os.readv(descriptor, [content])
        del content[length:]
        return content
    finally:
        os.close(descriptor)


def _parse(content: bytearray, name: str) -> Secret:
    try:
        text = memoryview(content).toreadonly()
        end = len(text) - (len(text) > 0 and text[-1] == 0x0A)
        if bytes(text[: len(_PREFIX)]) != _PREFIX or end != len(_PREFIX) + _TEXT_BYTES:
            raise RootKeyFault(Fault.MALFORMED, f"{name} does not hold one line of the form ebsd-root-key-1 BASE64")
        key = Secret(ROOT_KEY_BYTES)
        if not _decode_into(text[len(_PREFIX) : end], key.view):
            key.wipe()
            raise RootKeyFault(Fault.MALFORMED, f"{name} does not hold 32 bytes in base64")
        return key
    finally:
        content[:] = bytes(len(content))


# base64 by hand: the standard library's functions return ``bytes``, which nobody can wipe.


def _decode_into(text: memoryview, out: memoryview) -> bool:
    """Decode 44 characters into 32 bytes; say whether they are canonical base64."""
    if text[-1] != 0x3D or any(c not in _ALPHABET for c in text[:-1]):
        return False
    bits = count = at = 0
    for character in text[:-1]:
        bits = (bits << 6 | _ALPHABET.index(character)) & 0xFFFF
        count += 6
        if count >= 8:
            count -= 8
            out[at] = bits >> count & 0xFF
            at += 1
    return at == len(out) and bits & ((1 << count) - 1) == 0


def _format(key: Secret) -> bytearray:
    out = bytearray(_PREFIX)
    bits = count = 0
    for byte in key.view:
        bits = (bits << 8 | byte) & 0xFFFF
        count += 8
        while count >= 6:
            count -= 6
            out.append(_ALPHABET[bits >> count & 63])
    out.append(_ALPHABET[bits << (6 - count) & 63])
    out += b"=\n"
    return out
