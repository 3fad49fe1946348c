"""The schema of the catalog, as the steps from each version to the next; every column is explained here."""

from __future__ import annotations

from typing import Final

SCHEMA_VERSION: Final = 5

MIGRATIONS: Final[dict[int, str]] = {
    # From version N - 1 to N. Never edit a migration that was released; add the next one.
    1: """
    CREATE TABLE lineage (
        id          TEXT PRIMARY KEY,   -- UUID text; EC2's DataEncryptionKeyId
        account     TEXT NOT NULL,
        sector_size INTEGER NOT NULL,
        cipher      INTEGER NOT NULL,   -- domain.model.Cipher
        next_layer  INTEGER NOT NULL    -- never goes back, so a layer number is never used twice
    ) STRICT;
    CREATE TABLE layer (
        lineage TEXT NOT NULL REFERENCES lineage(id),
        number  INTEGER NOT NULL,
        uuid    BLOB NOT NULL UNIQUE,
        volume  TEXT NOT NULL,          -- the volume it was made as the head of
        state   TEXT NOT NULL,          -- creating, head, sealed
        size    INTEGER NOT NULL,       -- bytes of the volume it was made for
        PRIMARY KEY (lineage, number)
    ) STRICT;
    CREATE TABLE volume (
        id          TEXT PRIMARY KEY,
        account     TEXT NOT NULL,
        owner       TEXT NOT NULL,      -- user name when it was made; the account binds
        size        INTEGER NOT NULL,   -- bytes
        state       TEXT NOT NULL,      -- domain.states.VolumeState
        reason      TEXT NOT NULL,      -- why it is in error, else ''
        cipher      INTEGER NOT NULL,
        key_arn     TEXT,
        wrapped_key BLOB,
        context     TEXT NOT NULL,      -- encryption context of wrapped_key, JSON
        lineage     TEXT NOT NULL REFERENCES lineage(id),
        head        INTEGER NOT NULL,
        snapshot    TEXT,
        attach_generation INTEGER NOT NULL,
        integrity   TEXT NOT NULL,      -- domain.model.Integrity: what the last check of record and map said
        authority   TEXT,               -- id of whose signed record covers the map before the first attachment
        created     TEXT NOT NULL       -- RFC 3339 UTC
    ) STRICT;
    CREATE INDEX volume_account ON volume(account);
    CREATE TABLE name (                 -- volumes and snapshots of an account share one namespace
        account  TEXT NOT NULL,
        name     TEXT NOT NULL,
        resource TEXT NOT NULL UNIQUE,
        PRIMARY KEY (account, name)
    ) STRICT;
    CREATE TABLE tag (
        resource TEXT NOT NULL,
        key      TEXT NOT NULL,
        value    TEXT NOT NULL,
        PRIMARY KEY (resource, key)
    ) STRICT;
    CREATE TABLE attachment (
        volume      TEXT PRIMARY KEY REFERENCES volume(id),
        state       TEXT NOT NULL,      -- domain.states.AttachmentState
        boot_id     TEXT NOT NULL,      -- another boot's attachment is void
        generation  INTEGER NOT NULL,
        exposed_as  TEXT NOT NULL,
        read_only   INTEGER NOT NULL,
        path        TEXT NOT NULL,
        loop_minor  INTEGER,
        grant_id    TEXT,
        head        INTEGER NOT NULL,   -- layer the volume process writes to
        mount_point TEXT,
        time        TEXT NOT NULL
    ) STRICT;
    CREATE TABLE snapshot (
        id          TEXT PRIMARY KEY,
        account     TEXT NOT NULL,
        owner       TEXT NOT NULL,
        volume      TEXT NOT NULL,      -- the volume it was taken of, which may be gone
        size        INTEGER NOT NULL,
        state       TEXT NOT NULL,      -- domain.states.SnapshotState
        message     TEXT NOT NULL,
        description TEXT NOT NULL,
        cipher      INTEGER NOT NULL,
        key_arn     TEXT,
        wrapped_key BLOB,
        context     TEXT NOT NULL,
        lineage     TEXT NOT NULL REFERENCES lineage(id),
        new_head    INTEGER NOT NULL,   -- the layer that became the volume's head; 0 for a copy
        integrity   TEXT NOT NULL,
        authority   TEXT,               -- id of whose signed record covers the map, if not its own
        pause_us    INTEGER,
        started     TEXT NOT NULL,
        completed   TEXT
    ) STRICT;
    CREATE INDEX snapshot_account ON snapshot(account);
    CREATE INDEX snapshot_lineage ON snapshot(lineage);
    CREATE INDEX volume_lineage ON volume(lineage);
    CREATE TABLE removing (             -- deleted in the catalog, files and anchor perhaps not yet
        resource TEXT PRIMARY KEY
    ) STRICT;
    CREATE TABLE job (
        id           TEXT PRIMARY KEY,
        account      TEXT NOT NULL,
        owner        TEXT NOT NULL,
        kind         TEXT NOT NULL,     -- domain.states.JobKind
        state        TEXT NOT NULL,     -- domain.states.JobState
        source       TEXT NOT NULL,
        destination  TEXT NOT NULL,
        total        INTEGER NOT NULL,  -- bytes
        done         INTEGER NOT NULL,  -- bytes
        done_through INTEGER NOT NULL,  -- chunks below are durable in the destination; committed after the sync
        started      TEXT NOT NULL,
        ended        TEXT,
        error        TEXT               -- JSON with Code, Message, Hint
    ) STRICT;
    CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    """,
    # Which map descends from which: what a deletion compares a map with (store/sweep.py). A resource without a parent
    # hangs on a root that never had a map, as all do that were made before this was remembered.
    2: """
    CREATE TABLE family (
        id      TEXT PRIMARY KEY,       -- a volume or snapshot, there or deleted
        lineage TEXT NOT NULL,
        parent  TEXT,                   -- the one its map was made from
        writer  TEXT NOT NULL,          -- only this one and its descendants name this volume's layers
        first   INTEGER NOT NULL,       -- from first up to beyond
        beyond  INTEGER NOT NULL,       -- 0: no end
        left    TEXT NOT NULL,          -- JSON: layers that its volume left since its parent was taken
        deleted INTEGER NOT NULL        -- 1: it has no row of its own any more, and joins its relatives
    ) STRICT;
    CREATE INDEX family_parent ON family(parent);
    CREATE INDEX family_roots ON family(lineage) WHERE parent IS NULL;
    INSERT INTO family SELECT id, lineage, NULL, id, head, 0, '[]', 0 FROM volume;
    INSERT INTO family SELECT id, lineage, NULL, volume, 1, 1, '[]', 0 FROM snapshot;
    CREATE INDEX snapshot_started ON snapshot(started, id);
    CREATE INDEX snapshot_pending ON snapshot(lineage) WHERE state='pending';
    CREATE INDEX layer_unsealed ON layer(lineage, number) WHERE state<>'sealed';
    CREATE INDEX layer_creating ON layer(lineage) WHERE state='creating';
    CREATE INDEX layer_volume ON layer(volume, number);
    """,
    3: """
    CREATE TABLE verification (         -- the last one of each volume and snapshot
        resource TEXT PRIMARY KEY,
        time     TEXT NOT NULL,
        kind     TEXT NOT NULL,         -- authenticity or integrity
        chunks   INTEGER NOT NULL,      -- that were read
        damaged  INTEGER NOT NULL,      -- of them
        files    INTEGER NOT NULL       -- damaged files other than those of chunks, a refused record included
    ) STRICT;
    """,
    # Bytes from the start of the layer that have blocks whether anything was written there or not. Of a layer that
    # nobody writes to any more it says that the blocks which no map names are still to be given back.
    4: """
    ALTER TABLE layer ADD COLUMN preallocated INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX layer_preallocated ON layer(lineage, number) WHERE preallocated>0;
    """,
    # Sharing, locks, the recycle bin, schedules, client tokens, transfers.
    5: """
    CREATE TABLE snapshot_set (         -- snapshots of one moment, from their intent until all are completed or none
        snapshot  TEXT PRIMARY KEY,
        name      TEXT NOT NULL,        -- of the set: random, seen by nobody
        abandoned INTEGER NOT NULL      -- 1: it was found that not all of them can be completed
    ) STRICT;
    CREATE TABLE bin_rule (             -- retention rules of the recycle bin
        id          TEXT PRIMARY KEY,
        account     TEXT NOT NULL,
        type        TEXT NOT NULL,      -- domain.recycling.ResourceType
        days        INTEGER NOT NULL,
        tags        TEXT NOT NULL,      -- JSON list of [key, value or null]; empty: all
        excluded    TEXT NOT NULL,      -- the same
        description TEXT NOT NULL,
        created     TEXT NOT NULL
    ) STRICT;
    CREATE TABLE recycle_bin (          -- volumes and snapshots in state recoverable
        resource TEXT PRIMARY KEY,
        account  TEXT NOT NULL,
        name     TEXT NOT NULL,         -- that it had; in table name its id stands for it
        entered  TEXT NOT NULL,
        leaves   TEXT NOT NULL,         -- when it is deleted for good
        rule     TEXT NOT NULL          -- the one that kept it, which may be gone
    ) STRICT;
    CREATE TABLE implicit_snapshot (    -- taken to make a clone of, shown to nobody, removed when that is made
        snapshot TEXT PRIMARY KEY
    ) STRICT;
    CREATE TABLE schedule (             -- snapshot schedules
        id           TEXT PRIMARY KEY,
        account      TEXT NOT NULL,
        owner        TEXT NOT NULL,
        name         TEXT NOT NULL,
        volume       TEXT,              -- what it takes: a volume, which may be gone, or
        tag_key      TEXT,              -- the volumes of the account with this tag
        tag_value    TEXT,
        every        INTEGER NOT NULL,  -- seconds; 0: at
        at           TEXT NOT NULL,     -- JSON: seconds since midnight UTC, ascending
        keep_count   INTEGER,
        keep_seconds INTEGER,
        prefix       TEXT NOT NULL,
        paused       INTEGER NOT NULL,
        handled      INTEGER NOT NULL,  -- seconds since 1970: beginning of the last slot that needs no run any more
        created      TEXT NOT NULL,
        last_time    TEXT,              -- of the last run, which may have been asked for by hand
        last_state   TEXT,              -- domain.schedules.RunState
        last_message TEXT NOT NULL,
        UNIQUE (account, name)
    ) STRICT;
    CREATE TABLE schedule_snapshot (    -- what a schedule made; it goes with its snapshot, and with its schedule
        number   INTEGER PRIMARY KEY AUTOINCREMENT,     -- in the order in which they were taken
        snapshot TEXT NOT NULL UNIQUE,
        schedule TEXT NOT NULL REFERENCES schedule(id),
        volume   TEXT NOT NULL
    ) STRICT;
    CREATE INDEX schedule_snapshot_schedule ON schedule_snapshot(schedule, number);
    CREATE TABLE clone (                -- volumes that were made from volumes
        volume TEXT PRIMARY KEY REFERENCES volume(id),
        source TEXT NOT NULL            -- a volume, which may be gone
    ) STRICT;
    CREATE TABLE snapshot_lock (
        snapshot TEXT PRIMARY KEY REFERENCES snapshot(id),
        state    TEXT NOT NULL,         -- domain.states.LockState, as far as a clock to be trusted has told
        days     INTEGER NOT NULL,      -- LockDuration
        cool_off INTEGER,               -- CoolOffPeriod, hours
        created  TEXT NOT NULL,
        started  TEXT,                  -- NULL while the snapshot is pending
        expires  TEXT,                  -- NULL until it is known
        cool_off_expires TEXT
    ) STRICT;
    CREATE TABLE client_token (         -- requests that are not to be done twice; it goes with its resource
        account  TEXT NOT NULL,         -- whose request it was
        action   TEXT NOT NULL,         -- CreateVolume, ...
        token    TEXT NOT NULL,
        digest   BLOB NOT NULL,         -- SHA-256 of the other parameters
        resource TEXT NOT NULL,
        PRIMARY KEY (account, action, token)
    ) STRICT;
    CREATE INDEX client_token_resource ON client_token(resource);
    CREATE TABLE modification (         -- the latest growth of each volume
        volume   TEXT PRIMARY KEY REFERENCES volume(id),
        state    TEXT NOT NULL,         -- domain.states.ModificationState
        original INTEGER NOT NULL,      -- bytes
        target   INTEGER NOT NULL,      -- bytes
        started  TEXT NOT NULL,
        ended    TEXT,
        message  TEXT NOT NULL          -- why it failed, else ''
    ) STRICT;
    CREATE TABLE imported (             -- snapshots that were made of an archive
        snapshot TEXT PRIMARY KEY,
        account  TEXT NOT NULL,
        archive  TEXT NOT NULL,         -- UUID
        source   TEXT NOT NULL,         -- id of the snapshot where it was exported
        content  BLOB NOT NULL,         -- identity of the content (volume/ARCHIVE.md): what an incremental one asks for
        mac      BLOB NOT NULL          -- over snapshot and content, under the data key
    ) STRICT;
    CREATE INDEX imported_content ON imported(account, content);
    ALTER TABLE job ADD COLUMN rate INTEGER;        -- bytes per second at most; 0: no limit, NULL: the configured one
    ALTER TABLE job ADD COLUMN parameters TEXT NOT NULL DEFAULT '{}';   -- JSON: what was asked for
    ALTER TABLE job ADD COLUMN checkpoint TEXT NOT NULL DEFAULT '{}';   -- JSON: what goes with done_through
    CREATE INDEX job_account ON job(account, started, id);
    CREATE TABLE share (                -- create volume permissions of snapshots
        snapshot  TEXT NOT NULL,
        account   TEXT NOT NULL,        -- an account, or all: the snapshot is public
        suspended INTEGER NOT NULL,     -- 1: it does not count while the snapshot is in the recycle bin or archived
        PRIMARY KEY (snapshot, account)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX share_account ON share(account);
    CREATE TABLE direct_snapshot (      -- made by StartSnapshot; kept for a day after its end
        id           TEXT PRIMARY KEY,
        account      TEXT NOT NULL,
        state        TEXT NOT NULL,     -- domain.states.DirectState
        parent       TEXT,              -- a snapshot of the same lineage, whose map it begins with
        layer        INTEGER NOT NULL,  -- the one layer that blocks are written to
        timeout      INTEGER NOT NULL,  -- minutes
        active       INTEGER NOT NULL,  -- seconds since 1970: start, last block, or end
        written      INTEGER NOT NULL,  -- blocks that are durable in the layer
        client_token TEXT,
        request      TEXT NOT NULL,     -- SHA-256 of what StartSnapshot was asked for
        UNIQUE (account, client_token)
    ) STRICT;
    CREATE TABLE direct_blocks (        -- which blocks were written and are durable: the row follows the sync
        snapshot TEXT NOT NULL REFERENCES direct_snapshot(id) ON DELETE CASCADE,
        page     INTEGER NOT NULL,      -- 4096 blocks each
        bits     BLOB NOT NULL,         -- 512 bytes, the lowest bit of the first one is the first block
        PRIMARY KEY (snapshot, page)
    ) STRICT;
    """,
}
