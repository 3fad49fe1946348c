"""The root key under a passphrase: a file in the state directory, opened once for each life of the broker.

1. The root key is random; the file holds it sealed under what Argon2id makes of the passphrase. The passphrase is wiped
   as soon as it was tried, and never kept.
2. Argon2id is what slows guessing down: one try at a time, each with the memory and passes that the file names.
3. The file says which root key it holds by its check value. While the passphrase is changed there are two of them,
   ``root`` and ``root.next``, and the epoch file decides which one counts: never neither.
Source: RFC 9106 (Argon2id). Byte layout: FORMAT.md.
"""

from __future__ import annotations

import hmac
import os
import struct
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from ebsd.crypto.seal import OVERHEAD, SealBroken, open_sealed, seal
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import IntegrityFailure, WrongPassphrase
from ebsd.kms.backup import Argon2, check_passphrase
from ebsd.kms.epoch import check_value_of, read_epoch_file, root_check_value
from ebsd.kms.rootkey import ROOT_KEY_BYTES, Fault, RootKeyFault
from ebsd.kms.statefiles import overwrite, read_limited, sync_directory, write_synced

ROOT: Final = "root"
NEXT: Final = "root.next"
FILE_BYTES: Final = 60 + 4 + ROOT_KEY_BYTES + OVERHEAD
MAGIC: Final = b"EBSDROOT"
_VERSION: Final = 1
_SALT_BYTES: Final = 16
_CHECK_BYTES: Final = 16
_HEADER: Final = struct.Struct(f">8sIIII{_SALT_BYTES}s{_CHECK_BYTES}s4x")
_LENGTH: Final = struct.Struct(">I")
_LABEL: Final = b"ebsd/1/root-passphrase"


class PassphraseFile:
    """The root key of a state directory that asks for a passphrase; a RootKeySource that must be unlocked first."""

    def __init__(self, directory: Path, cost: Argon2 | None = None) -> None:
        self._directory = directory
        self._cost = cost or Argon2()
        self._opened: Secret | None = None
        self._offered: bytearray | None = None

    @property
    def kind(self) -> str:
        return "passphrase"

    def describe(self) -> str:
        return "passphrase"

    @property
    def is_set(self) -> bool:
        """Whether there is a passphrase; without one, the first that is given becomes it."""
        return any(os.path.lexists(self._directory / name) for name in (ROOT, NEXT))

    def read(self) -> Secret:
        """Return a copy of the root key; raises RootKeyFault with LOCKED before it was unlocked."""
        if self._opened is not None:
            return Secret.from_buffer(self._opened.view)
        if self.is_set:
            raise RootKeyFault(Fault.LOCKED, "its passphrase was not given since the key service started")
        raise RootKeyFault(Fault.MISSING, f"{self._directory / ROOT} does not exist")

    def unlock(self, passphrase: bytearray) -> None:
        """Open the root key. Takes as long as Argon2id does. Raises WrongPassphrase, IntegrityFailure, RootKeyFault."""
        check_passphrase(passphrase)
        path = self._path()
        self._hold(open_root(_content(path), passphrase))
        if path.name == NEXT:
            finish_next(self._directory)
        elif os.path.lexists(self._directory / NEXT) and self._counts(path):
            overwrite(self._directory / NEXT)  # of a change that was cut before the state had it
            (self._directory / NEXT).unlink()

    def make(self, passphrase: bytearray) -> None:
        """Make the first root key, under its first passphrase."""
        check_passphrase(passphrase)
        key = Secret.random(ROOT_KEY_BYTES)
        self._write(ROOT, key, passphrase)
        self._hold(key)

    def make_next(self, passphrase: bytearray) -> Secret:
        """Make a further root key beside the present one, and return it; ``finish_next`` when the state has it."""
        check_passphrase(passphrase)
        if self._path().name == NEXT:
            finish_next(self._directory)  # an earlier change could not: ``root.next`` is the one that opens the state
        key = Secret.random(ROOT_KEY_BYTES)
        self._write(NEXT, key, passphrase)
        self._hold(Secret.from_buffer(key.view))
        return key

    def offer(self, passphrase: bytearray) -> None:
        """Let ``store`` seal under this passphrase: that of a backup which brings a root key back."""
        self._offered = passphrase

    def store(self, key: Secret) -> None:
        """Keep a root key where none is, under the passphrase that was offered."""
        if self._offered is None or self.is_set:
            raise RootKeyFault(Fault.MALFORMED, f"{self._directory / ROOT} exists already, or there is no passphrase")
        self._write(ROOT, key, self._offered)
        self._hold(Secret.from_buffer(key.view))

    def set_aside(self, stamp: str) -> None:
        path = self._path()
        path.rename(path.with_name(f"{path.name}.before-restore-{stamp}"))

    def close(self) -> None:
        """Wipe what is held; locked again."""
        if self._opened is not None:
            self._opened.wipe()
        self._opened = self._offered = None

    def _hold(self, key: Secret) -> None:
        self.close()
        self._opened = key

    def _path(self) -> Path:
        """Return the file whose root key the epoch file is sealed under."""
        root, following = self._directory / ROOT, self._directory / NEXT
        if not os.path.lexists(following):
            return root
        return following if self._counts(following) else root

    def _counts(self, path: Path) -> bool:
        """Say whether the epoch is sealed under the root key in a file."""
        try:
            wanted = check_value_of(read_epoch_file(self._directory))
            return hmac.compare_digest(_check_value(_content(path)), wanted)
        except (IntegrityFailure, RootKeyFault):
            return False

    def _write(self, name: str, key: Secret, passphrase: bytearray) -> None:
        draft = self._directory / f"{name}.draft"
        write_synced(draft, seal_root(key, passphrase, self._cost))
        draft.rename(self._directory / name)
        sync_directory(self._directory)


def finish_next(directory: Path) -> None:
    """Make the next root file the only one; the earlier is destroyed. Once the epoch is sealed under its root key."""
    old = directory / ROOT
    if os.path.lexists(old):
        overwrite(old)
    (directory / NEXT).rename(old)
    sync_directory(directory)


def seal_root(key: Secret, passphrase: bytearray, cost: Argon2) -> bytes:
    """Return the content of a root file."""
    salt = os.urandom(_SALT_BYTES)
    header = _HEADER.pack(MAGIC, _VERSION, cost.memory, cost.passes, cost.lanes, salt, root_check_value(key))
    with _stretched(header, passphrase) as stretched:
        sealed = seal(stretched, label=_LABEL, aad=header, plaintext=key.view)
    return header + _LENGTH.pack(len(sealed)) + sealed


def open_root(content: bytes, passphrase: bytearray) -> Secret:
    """Return the root key of a root file; raises WrongPassphrase, RootKeyFault for what is no root file."""
    check = _check_value(content)
    header = content[: _HEADER.size]
    sealed = content[_HEADER.size + _LENGTH.size :]
    with _stretched(header, passphrase) as stretched:
        try:
            key = open_sealed(stretched, label=_LABEL, aad=header, sealed=sealed)
        except SealBroken as exc:
            raise WrongPassphrase() from exc
    if len(key) != ROOT_KEY_BYTES or not hmac.compare_digest(root_check_value(key), check):
        key.wipe()
        raise RootKeyFault(Fault.MALFORMED, "the root file does not hold the root key that it names")
    return key


def _content(path: Path) -> bytes:
    try:
        return read_limited(path, FILE_BYTES)
    except FileNotFoundError as exc:
        raise RootKeyFault(Fault.MISSING, f"{path} does not exist") from exc
    except OSError as exc:
        raise RootKeyFault(Fault.INSECURE, f"{path} cannot be read: {exc.strerror}") from exc


def _check_value(content: bytes) -> bytes:
    """Return the check value that a root file names, once the file has the form of one."""
    if len(content) != FILE_BYTES or not content.startswith(MAGIC):
        raise RootKeyFault(Fault.MALFORMED, "the root file of the key service is damaged, or is none")
    _, version, memory, passes, lanes, _, check = _HEADER.unpack_from(content)
    if version != _VERSION:
        raise RootKeyFault(Fault.INSECURE, f"the root file has format version {version}, of a newer ebsd")
    (length,) = _LENGTH.unpack_from(content, _HEADER.size)
    is_whole = length == FILE_BYTES - _HEADER.size - _LENGTH.size
    if not Argon2(memory, passes, lanes).is_bearable() or not is_whole:
        raise RootKeyFault(Fault.MALFORMED, "the root file of the key service is damaged")
    return bytes(check)


def _stretched(header: bytes, passphrase: bytearray) -> Secret:
    _, _, memory, passes, lanes, salt, _ = _HEADER.unpack(header)
    key = Secret(ROOT_KEY_BYTES)
    function = Argon2id(salt=salt, length=ROOT_KEY_BYTES, iterations=passes, lanes=lanes, memory_cost=memory)
    function.derive_into(passphrase, key.view)  # type: ignore[arg-type]  # takes any buffer; the stub says bytes
    return key
