-- A catalog of schema version 1, as the first ebsd made it. Never edit it.
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

INSERT INTO lineage VALUES ('6ba7b810-9dad-41d1-80b4-00c04fd430c8', '000000000000', 4096, 1, 4);
INSERT INTO layer VALUES ('6ba7b810-9dad-41d1-80b4-00c04fd430c8', 1, x'00112233445546678899aabbccddeeff', 'vol-0123456789abcdef0', 'sealed', 4194304);
INSERT INTO layer VALUES ('6ba7b810-9dad-41d1-80b4-00c04fd430c8', 2, x'10112233445546678899aabbccddeeff', 'vol-0123456789abcdef0', 'head', 4194304);
INSERT INTO layer VALUES ('6ba7b810-9dad-41d1-80b4-00c04fd430c8', 3, x'20112233445546678899aabbccddeeff', 'vol-0123456789abcdef1', 'head', 4194304);
INSERT INTO volume VALUES ('vol-0123456789abcdef0', '000000000000', 'root', 4194304, 'available', '', 1, 'arn:aws:kms:local:000000000000:key/00000000-0000-4000-8000-000000000000', x'01', '{"aws:ebs:id": "vol-0123456789abcdef0"}', '6ba7b810-9dad-41d1-80b4-00c04fd430c8', 2, NULL, 3, 'verified', NULL, '2026-01-01T00:00:00Z');
INSERT INTO volume VALUES ('vol-0123456789abcdef1', '000000000000', 'root', 4194304, 'in-use', '', 1, 'arn:aws:kms:local:000000000000:key/00000000-0000-4000-8000-000000000000', x'02', '{"aws:ebs:id": "vol-0123456789abcdef1"}', '6ba7b810-9dad-41d1-80b4-00c04fd430c8', 3, 'snap-0123456789abcdef0', 1, 'verified', 'snap-0123456789abcdef0', '2026-01-02T00:00:00Z');
INSERT INTO attachment VALUES ('vol-0123456789abcdef1', 'attached', '11111111-2222-4333-8444-555555555555', 1, 'file', 0, '/run/ebsd/volumes/vol-0123456789abcdef1', NULL, 'grant', 3, '/srv', '2026-01-02T00:00:00Z');
INSERT INTO snapshot VALUES ('snap-0123456789abcdef0', '000000000000', 'root', 'vol-0123456789abcdef0', 4194304, 'completed', '', 'before', 1, 'arn:aws:kms:local:000000000000:key/00000000-0000-4000-8000-000000000000', x'01', '{"aws:ebs:id": "vol-0123456789abcdef0"}', '6ba7b810-9dad-41d1-80b4-00c04fd430c8', 2, 'verified', NULL, 70, '2026-01-01T12:00:00Z', '2026-01-01T12:00:01Z');
INSERT INTO name VALUES ('000000000000', 'data', 'vol-0123456789abcdef0');
INSERT INTO name VALUES ('000000000000', 'again', 'vol-0123456789abcdef1');
INSERT INTO name VALUES ('000000000000', 'monday', 'snap-0123456789abcdef0');
INSERT INTO tag VALUES ('vol-0123456789abcdef0', 'team', 'blue');
INSERT INTO job VALUES ('job-0123456789abcdef0', '000000000000', 'root', 'copy-snapshot', 'completed', 'snap-0123456789abcdef0', 'snap-0123456789abcdef1', 65536, 65536, 64, '2026-01-03T00:00:00Z', '2026-01-03T00:00:01Z', NULL);
INSERT INTO removing VALUES ('snap-0123456789abcdef2');
PRAGMA user_version=1;
