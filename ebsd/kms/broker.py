"""The broker's life: find or make its state, be ``running``, ``locked`` or in ``rescue``, back up and restore.

1. In rescue nothing but GetStatus, Shutdown and Restore works, and every refusal says why. Locked, Unlock works instead
   of Restore.
2. A root key and a state are made only where there is no part of a state, and only when ebsd says that none is
   expected (``may_create``).
3. Restore replaces a state only where there is none worth keeping: no keys and anchors yet, or one that cannot be
   read. The old files stay beside the new ones.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import (
    BackupRefused,
    EbsdError,
    IncorrectState,
    InRescue,
    IntegrityFailure,
    KeyServiceLocked,
    KeysMissing,
    RootKeyUnavailable,
)
from ebsd.kms import rootchange, statefiles
from ebsd.kms.audit.trail import Trail
from ebsd.kms.aws import AwsKeys
from ebsd.kms.aws_settings import AwsSettings
from ebsd.kms.backends import BackEnds
from ebsd.kms.backup import Argon2, Content, check_passphrase, read_backup, write_backup
from ebsd.kms.deletion import Deletion
from ebsd.kms.documents import DocumentStore, Drop, create_database, empty_rows, ledger_of, verify
from ebsd.kms.epoch import Epoch, open_epoch, read_epoch_file, seal_epoch
from ebsd.kms.epochchange import change_epoch
from ebsd.kms.local import Clock, LocalKeys, RandomBytes
from ebsd.kms.passphrase import PassphraseFile, finish_next
from ebsd.kms.records import Cmk, Kind
from ebsd.kms.registry import Registry
from ebsd.kms.rootkey import ROOT_KEY_BYTES, Fault, RootKeyFault, RootKeySource
from ebsd.kms.rootplace import RootKeyPlace
from ebsd.kms.store import Store

T = TypeVar("T")

_log = logging.getLogger(__name__)


def utc_now() -> str:
    """Return the time as RFC 3339 UTC text, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Settings:
    state_directory: Path
    root_key: RootKeySource
    may_create: bool
    """No keys are expected yet, so a new root key and state may be made where there is no state at all."""
    aws: AwsSettings | None = None
    credentials_directory: str | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """Everything that works while the state is good."""

    root_key: Secret
    store: Store
    keys: LocalKeys
    """Of this host: what users administer."""
    services: BackEnds
    """All keys that volumes may have."""
    deletion: Deletion
    registry: Registry


@dataclass(frozen=True, slots=True)
class Status:
    state: str
    """``running``, ``locked`` or ``rescue``."""
    reason: str | None
    directory: str
    root_key: str
    root_key_kind: str
    configured_root_key: str | None
    """What the configuration names, when that is not where the root key is since it was changed."""
    passphrase_set: bool | None
    """None where the root key has no passphrase."""
    keys: int


class Broker:
    """One state directory, held by its lock from ``open`` to ``close``."""

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Clock = utc_now,
        random: RandomBytes = os.urandom,
        backup_cost: Argon2 | None = None,
    ) -> None:
        self._settings = settings
        self._source = settings.root_key
        """Where the root key is: elsewhere than configured, when it was changed since."""
        self._clock = clock
        self._random = random
        self._backup_cost = backup_cost or Argon2()
        self._directory = settings.state_directory
        self.aws = None if settings.aws is None else AwsKeys(settings.aws)
        """Lives as long as the broker: no state of this host is in it."""
        self.trail = Trail(settings.state_directory / statefiles.AUDIT, clock=clock)
        self._lock_fd: int | None = None
        self._running: Running | None = None
        self._problem: EbsdError = InRescue(reason="the key service has not started")
        self._restoring = trio.Lock()

    # --- start and end --------------------------------------------------------------------------------------

    def open(self) -> None:
        """Lock the directory and load the state; blocks, for a few milliseconds per thousand documents.

        A state that cannot be used is no error here: the broker is then in rescue. Raises StateDirectoryInUse
        and ConfigurationError (a directory of somebody else).
        """
        self._directory = statefiles.prepare_directory(self._settings.state_directory)
        self._lock_fd = statefiles.lock_directory(self._directory)
        self.trail.open()
        self._load()

    def _load(self) -> None:
        try:
            self._running = self._load_state()
        except (EbsdError, OSError) as exc:
            self._running = None
            self._problem = _as_problem(exc)
            state = "locked" if isinstance(self._problem, KeyServiceLocked) else "in rescue"
            _log.error("%s: %s", state, self._problem.message)

    def _load_state(self) -> Running:
        statefiles.finish_switch(self._directory)
        has_state = statefiles.exists(self._directory)
        root_key = self._find_root_key() if has_state else self._make_state()
        try:
            epoch = open_epoch(root_key, read_epoch_file(self._directory))
            documents = DocumentStore(self._directory / statefiles.DATABASE, epoch)
            try:
                store = Store(documents)
            except BaseException:
                documents.close()
                raise
            if not self._is_moved():
                rootchange.forget_old(self._directory, self._source)
        except BaseException:
            root_key.wipe()
            raise
        keys = LocalKeys(store, self._clock, self._random)
        deletion = Deletion(store, keys, self._clock)
        return Running(root_key, store, keys, BackEnds(keys, self.aws), deletion, Registry(store, self._clock))

    def _is_moved(self) -> bool:
        """Say whether the root key is elsewhere than the configuration says."""
        return self._source.describe() != self._settings.root_key.describe()

    def _find_root_key(self) -> Secret:
        """Return the root key from where it is, or, when that was changed, from where it went."""
        try:
            root_key = self._source.read()
        except RootKeyFault as fault:
            moved = rootchange.named_by_note(self._directory)
            if fault.fault is Fault.MISSING and moved:
                reason = f"{fault.facts['reason']}; it was changed to {moved}, which root_key must name"
                raise RootKeyFault(Fault.MISSING, reason) from fault
            raise
        place = rootchange.follow_note(self._directory, root_key)
        if place is None:
            return root_key
        root_key.wipe()
        self._source = place.source(self._directory)
        _log.warning("the root key was changed to %s: set root_key in the configuration", self._source.describe())
        return self._source.read()

    def _make_state(self) -> Secret:
        """Make the first state and return its root key, which is made as well where there is none."""
        if not self._settings.may_create:
            raise KeysMissing(directory=self._directory, root_key=_told(self._source))
        source = self._source
        try:
            root_key = source.read()
        except RootKeyFault as fault:
            if fault.fault is not Fault.MISSING:
                raise
            if isinstance(source, PassphraseFile):
                raise KeyServiceLocked(reason="it is new, and its passphrase was not chosen yet") from fault
            root_key = Secret.random(ROOT_KEY_BYTES)
            source.store(root_key)
            _log.warning("made a new root key: %s", source.describe())
        with Epoch.first().key as key:
            self._write_state(root_key, Epoch(1, key))
        return root_key

    def _write_state(self, root_key: Secret, epoch: Epoch) -> None:
        rows, ledger = empty_rows(epoch)
        statefiles.write_synced(self._directory / (statefiles.EPOCH + statefiles.NEW), seal_epoch(root_key, epoch))
        create_database(self._directory / (statefiles.DATABASE + statefiles.NEW), rows, ledger)
        statefiles.commit_switch(self._directory, self._stamp())

    def _stamp(self) -> str:
        return "".join(character for character in self._clock() if character.isalnum())

    async def close(self) -> None:
        """Close the database, wipe the keys, give up the lock; may be called again."""
        running, self._running = self._running, None
        if running is not None:
            self._problem = InRescue(reason="the key service is ending")
            await running.store.close()
            running.root_key.wipe()
        if isinstance(self._source, PassphraseFile):
            self._source.close()
        if self._lock_fd is not None:
            await self.trail.close()
            os.close(self._lock_fd)
            self._lock_fd = None

    # --- state ----------------------------------------------------------------------------------------------

    @property
    def running(self) -> Running:
        """What works; raises RootKeyUnavailable or InRescue while nothing does."""
        if self._running is None:
            raise self._problem
        return self._running

    def status(self) -> Status:
        running = self._running
        source = self._source
        stopped = "locked" if isinstance(self._problem, KeyServiceLocked) else "rescue"
        return Status(
            stopped if running is None else "running",
            self._problem.message if running is None else None,
            str(self._directory),
            source.describe(),
            source.kind,
            self._settings.root_key.describe() if self._is_moved() else None,
            source.is_set if isinstance(source, PassphraseFile) else None,
            0 if running is None else len(running.store.model.keys),
        )

    # --- the end of keys ------------------------------------------------------------------------------------

    async def destroy_due(self) -> list[Cmk]:
        """Delete the keys whose waiting period is over, for good; return them.

        Raises what the files' or the disk's condition is. Whatever it raises, a key is either whole or gone.
        """
        async with self._restoring:
            running = self.running

            def rewrite(documents: DocumentStore, drops: Sequence[Drop]) -> DocumentStore:
                return change_epoch(self._directory, running.root_key, documents, drops, self._stamp())

            try:
                return await running.deletion.destroy_due(rewrite)
            except (EbsdError, OSError):
                if not running.store.is_open:
                    await self._reload(running)
                raise

    async def _reload(self, running: Running) -> None:
        """Go on with what is on the disk; what it refuses leaves the broker in rescue."""
        self._running = None
        self._problem = InRescue(reason="the state of the key service is read again")
        await running.store.close()
        running.root_key.wipe()
        await _in_thread(self._load)

    # --- the passphrase -------------------------------------------------------------------------------------

    async def unlock(self, passphrase: bytearray) -> int:
        """Open the root key with its passphrase, which the first one given becomes; returns the number of keys.

        One try at a time, and each takes what Argon2id takes. Raises WrongPassphrase, IncorrectState where nothing is
        locked, KmsValidation for a short passphrase, and what is wrong with the state otherwise.
        """
        async with self._restoring:
            source = self._source
            if not isinstance(source, PassphraseFile):
                raise IncorrectState(reason=f"The root key is not under a passphrase: it is {source.describe()}")
            if self._running is not None:
                raise IncorrectState(reason="The key service is not locked")
            if not isinstance(self._problem, KeyServiceLocked):
                raise self._problem
            await _in_thread(lambda: (source.unlock if source.is_set else source.make)(passphrase))
            await _in_thread(self._load)
        return len(self.running.store.model.keys)

    async def change_root_key(self, place: RootKeyPlace, passphrase: bytearray | None) -> tuple[str, str]:
        """Put the state into a new epoch under another root key; returns (its place, the former place).

        What a crash leaves is opened by the old root key or by the new one, wherever the configuration looks.
        Raises IncorrectState for the place where the root key is, and what is wrong with a place or passphrase.
        """
        async with self._restoring:
            running, former = self.running, self._source
            if place.kind == "credential":
                place = msgspec.structs.replace(place, directory=self._settings.credentials_directory)
            place.check_outside(self._directory)
            source = place.source(self._directory)
            if source.describe() == former.describe() and not isinstance(source, PassphraseFile):
                raise IncorrectState(reason=f"The root key is {former.describe()} already")
            new = await _in_thread(lambda: rootchange.new_root_key(source, running.root_key, passphrase))
            await _in_thread(lambda: rootchange.write_note(self._directory, running.root_key, place, new))

            def rewrite(documents: DocumentStore, drops: Sequence[Drop]) -> DocumentStore:
                return change_epoch(self._directory, new, documents, drops, self._stamp())

            try:
                async with running.store.destruction(rewrite) as destroy:
                    await destroy(())
            except BaseException:
                new.wipe()
                if not running.store.is_open:
                    await self._reload(running)
                raise
            self._source, self._running = source, replace(running, root_key=new)
            running.root_key.wipe()
            if isinstance(source, PassphraseFile):
                await _in_thread(lambda: finish_next(self._directory))
            if isinstance(former, PassphraseFile):
                former.close()
        _log.warning("the root key was changed from %s to %s", former.describe(), source.describe())
        return source.describe(), former.describe()

    # --- backup and restore ---------------------------------------------------------------------------------

    async def backup(self, passphrase: bytearray) -> tuple[int, bytes]:
        """Return (number of keys, backup file). Raises KmsValidation for a short passphrase."""
        check_passphrase(passphrase)
        async with self._restoring:  # of one moment: a change of the root key wipes the old one
            running = self.running
            rows = await running.store.copy()
            # The epoch file is sealed anew rather than read: the disk is not asked what it was trusted with.
            epoch_file = seal_epoch(running.root_key, running.store.epoch)
            content = Content(Secret.from_buffer(running.root_key.view), epoch_file, rows)
        with content.root_key:
            file = await _in_thread(lambda: write_backup(content, passphrase, self._backup_cost))
        return sum(row.kind == Kind.KEY for row in rows), file

    async def restore(self, file: bytearray, passphrase: bytearray) -> int:
        """Take the state of a backup and go on with it; returns the number of keys.

        A key whose waiting period is over meanwhile gets another seven days, in which its deletion can be cancelled.
        Raises IncorrectState where there are keys or anchors, BackupRefused, and RootKeyUnavailable where the
        root key's place has something that must be looked at first.
        """
        check_passphrase(passphrase)
        async with self._restoring:
            if self._running is not None:
                _refuse_unless_empty(self._running)
            elif isinstance(self._problem, KeyServiceLocked) and self.status().passphrase_set:
                raise self._problem  # a state that only waits is worth keeping
            content = await _in_thread(lambda: read_backup(file, passphrase))
            if isinstance(self._source, PassphraseFile):
                self._source.offer(passphrase)
            with content.root_key:
                await self._replace_state(content)
            await self.running.deletion.postpone_due()
        return len(self.running.store.model.keys)

    async def _replace_state(self, content: Content) -> None:
        running, self._running = self._running, None
        self._problem = InRescue(reason="a restore is under way")
        try:
            if running is not None:
                # Closing waits for a mutation under way; nobody finds the store any more, so none follows.
                await running.store.close()
                running.root_key.wipe()
                _refuse_unless_empty(running)
            await _in_thread(lambda: self._install(content))
        finally:
            await _in_thread(self._load)

    def _install(self, content: Content) -> None:
        """Write the backup's state beside the present one and switch to it; blocks."""
        try:
            epoch = open_epoch(content.root_key, content.epoch_file)
        except EbsdError as exc:
            raise BackupRefused(reason="its epoch does not open") from exc
        with epoch.key:
            ledger = ledger_of(content.rows)
            try:
                verify(epoch, content.rows, ledger)
            except IntegrityFailure as exc:
                raise BackupRefused(reason=str(exc.facts["reason"])) from exc
            statefiles.finish_switch(self._directory)
            new_epoch = self._directory / (statefiles.EPOCH + statefiles.NEW)
            create_database(self._directory / (statefiles.DATABASE + statefiles.NEW), content.rows, ledger)
            with self._root_key_for(content.root_key) as root_key:
                statefiles.write_synced(new_epoch, seal_epoch(root_key, epoch))
            statefiles.commit_switch(self._directory, self._stamp())

    def _root_key_for(self, restored: Secret) -> Secret:
        """Return the root key to seal the epoch under: the one that is in place, else the backup's, now put there."""
        source = self._source
        try:
            return source.read()
        except RootKeyFault as fault:
            if fault.fault in (Fault.INSECURE, Fault.LOCKED):
                raise
            if fault.fault is Fault.MALFORMED:
                source.set_aside(self._stamp())
        source.store(restored)
        return Secret.from_buffer(restored.view)


def _refuse_unless_empty(running: Running) -> None:
    if running.store.model.keys or running.store.model.anchors:
        raise IncorrectState(
            reason="The key service has keys or volumes already, which a restore would replace; "
            "restore into an empty state directory"
        )


def _told(source: RootKeySource) -> str:
    """Say where the root key should be, and whether one is there."""
    try:
        source.read().wipe()
    except RootKeyFault as fault:
        return f"{source.describe()}, is not there either" if fault.fault is Fault.MISSING else source.describe()
    return f"{source.describe()}, is there"


def _as_problem(exc: EbsdError | OSError) -> EbsdError:
    """Return what every call is refused with while the state is in this condition."""
    if isinstance(exc, RootKeyFault) and exc.fault is Fault.LOCKED:
        return KeyServiceLocked(reason=str(exc.facts["reason"]))
    if isinstance(exc, RootKeyUnavailable | KeyServiceLocked | KeysMissing):
        return exc
    if isinstance(exc, EbsdError):
        return InRescue(reason=exc.message.rstrip("."))
    return InRescue(reason=f"the state of the key service cannot be read: {exc.strerror}")


async def _in_thread(work: Callable[[], T]) -> T:
    with trio.CancelScope(shield=True):
        result = await trio.to_thread.run_sync(work)
    return result
