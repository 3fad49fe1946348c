"""The change of epoch: documents that are deleted for good, by destroying the key that sealed them.

1. What stays is sealed again under a fresh epoch key and stands complete beside the old state, read back and verified,
   before anything is destroyed.
2. The switch (statefiles.py) is the point of no return. Then the old epoch file is overwritten, the old database with
   its logs, and whatever restores had kept; the start after a crash goes on with that.
3. SQLite's pages and logs, and blocks that a file system did not overwrite, hold sealed documents only: without the old
   epoch key they are noise, whoever has the root key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ebsd.crypto.secret import Secret
from ebsd.kms import statefiles
from ebsd.kms.documents import DocumentStore, Drop, create_database, resealed
from ebsd.kms.epoch import FILE_BYTES, open_epoch, seal_epoch

NEW_EPOCH = statefiles.EPOCH + statefiles.NEW
NEW_DATABASE = statefiles.DATABASE + statefiles.NEW


def change_epoch(
    directory: Path, root_key: Secret, documents: DocumentStore, dropped: Sequence[Drop], stamp: str
) -> DocumentStore:
    """Destroy some documents and the epoch that sealed them; returns the open store of the next one. Blocks.

    ``documents`` can be read afterwards, until it is closed, and written to only when this raised before it closed the
    database. Raises NoSpace, KeyServiceUnavailable, IntegrityFailure, OSError.
    """
    documents.check_writable()
    try:
        _write_beside(directory, root_key, documents, {(drop.kind.value, drop.id) for drop in dropped})
        successor = _read_back(directory, root_key)
    except BaseException:
        statefiles.finish_switch(directory)  # removes what was written
        raise
    try:
        with statefiles.log_of_database(directory) as log:
            documents.close_database()
            statefiles.commit_switch(directory, stamp, destroy=True)
            if log is not None:
                statefiles.overwrite_open(log)
        successor.reopen_database(directory / statefiles.DATABASE)
    except BaseException:
        successor.close()
        raise
    return successor


def _write_beside(directory: Path, root_key: Secret, documents: DocumentStore, dropped: set[tuple[str, str]]) -> None:
    rows = [row for row in documents.rows() if (row.kind, row.id) not in dropped]
    epoch = documents.epoch.next()
    with epoch.key:
        kept, ledger = resealed(documents.epoch, epoch, rows, documents.counter + 1)
        statefiles.write_synced(directory / NEW_EPOCH, seal_epoch(root_key, epoch))
    create_database(directory / NEW_DATABASE, kept, ledger)


def _read_back(directory: Path, root_key: Secret) -> DocumentStore:
    """Open and verify the files that are about to be all there is, and close the database; raises IntegrityFailure."""
    epoch = open_epoch(root_key, statefiles.read_limited(directory / NEW_EPOCH, FILE_BYTES))
    try:
        successor = DocumentStore(directory / NEW_DATABASE, epoch)
    except BaseException:
        epoch.key.wipe()
        raise
    successor.close_database()
    return successor
