"""Key derivation: NIST SP 800-108r1 in counter mode with HMAC-SHA-512, and every key ebsd derives with it.

    K(i) = HMAC-SHA-512(key, be32(i) || label || 0x00 || context || be32(bits of output)),  i = 1, 2, ...

1. One label per use; a label never means two things (SP 800-108r1, 4).
2. Contexts are of fixed length per label, so no two contexts can read alike.
3. HKDF is not used here: SP 800-56C is for secrets of a key agreement (sealedbox.py), and HKDF-SHA-256 would
   squeeze 512 bits of key through 256.
"""

from __future__ import annotations

import struct
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

from ebsd.crypto.secret import Secret

LABEL_XTS: Final = b"ebsd/1/xts"
"""Data key -> XTS key of one segment of one layer."""
LABEL_RECORD: Final = b"ebsd/1/record"
"""Data key -> key of the record's MAC."""
LABEL_KCV: Final = b"ebsd/1/kcv"
"""Data key -> key check value, which is public."""
LABEL_WRAP: Final = b"ebsd/1/wrap"
"""Backing key -> AES-GCM key and commitment of one wrapped key."""
LABEL_DOCUMENT: Final = b"ebsd/1/document"
"""Epoch key -> AES-GCM key of one sealed document of the broker."""
LABEL_BACKUP: Final = b"ebsd/1/backup"
"""Backup key -> AES-GCM key of one backup."""
LABEL_ARCHIVE_HEADER: Final = b"ebsd/1/archive-header"
"""Key of an archive -> key of the MAC over its header."""
LABEL_ARCHIVE_FRAMES: Final = b"ebsd/1/archive-frames"
"""Key of an archive -> AES-GCM key of the frames that have one salt."""
LABEL_IMPORTED: Final = b"ebsd/1/imported"
"""Data key -> key of the MAC over what an imported snapshot is the content of."""
LABEL_AUDIT: Final = b"ebsd/1/audit"
"""Chain key of the audit log -> chain key of the next record, and the MAC key of this one."""
LABEL_AUDIT_START: Final = b"ebsd/1/audit-start"
"""Start key of the audit log -> start key of the next chain, and the MAC key of this chain's start."""

DATA_KEY_BYTES: Final = 64
XTS_KEY_BYTES: Final = 64
RECORD_KEY_BYTES: Final = 64
KCV_BYTES: Final = 16

_LAYER_CONTEXT: Final = struct.Struct(">16sIII")


def derive(key: Secret, label: bytes, context: bytes, out_len: int, into: Secret | None = None) -> Secret:
    """Return ``out_len`` bytes (1 .. 2**16) derived from ``key`` for one label and context, in ``into`` if given.

    Neither key nor result passes through ``bytes``. Raises ValueError for an empty label or a zero byte in
    it, since the zero byte ends the label.
    """
    if not label or b"\0" in label:
        raise ValueError(f"no label for key derivation: {label!r}")
    if not 1 <= out_len <= 1 << 16:
        raise ValueError(f"{out_len} bytes cannot be derived")
    function = KBKDFHMAC(
        algorithm=SHA512(),
        mode=Mode.CounterMode,
        length=out_len,
        rlen=4,
        llen=4,
        location=CounterLocation.BeforeFixed,
        label=label,
        context=context,
        fixed=None,
    )
    if into is not None and len(into) != out_len:
        raise ValueError(f"{out_len} bytes do not go into a secret of {len(into)}")
    out = Secret(out_len) if into is None else into
    function.derive_into(key.view, out.view)
    return out


def layer_key(
    data_key: Secret, layer_uuid: bytes, segment: int, sector_size: int, cipher: int, into: Secret | None = None
) -> Secret:
    """Return Key1 || Key2 (64 bytes) of one segment of one layer: a single HMAC output.

    ``layer_uuid`` has 16 bytes; ``segment`` counts the volume's 1 TiB segments; ``sector_size`` is in bytes;
    ``cipher`` is the id of the on-disk format (ebsd.domain.model.Cipher).
    Disjoint parts of one output are independent keys (SP 800-108r1, 4); one key per segment keeps below
    IEEE 1619-2025's 2**36 blocks per key, and one per layer keeps two versions of a sector from sharing key
    and tweak. ``into``, of 64 bytes, is filled and returned instead of new memory.
    """
    _check_data_key(data_key)
    if len(layer_uuid) != 16:
        raise ValueError(f"a layer's id has 16 bytes, not {len(layer_uuid)}")
    context = _LAYER_CONTEXT.pack(layer_uuid, segment, sector_size, cipher)
    return derive(data_key, LABEL_XTS, context, XTS_KEY_BYTES, into)


def record_key(data_key: Secret) -> Secret:
    """Return the 64-byte key of the MAC over a volume's record."""
    _check_data_key(data_key)
    return derive(data_key, LABEL_RECORD, b"", RECORD_KEY_BYTES)


def key_check_value(data_key: Secret) -> bytes:
    """Return 16 bytes that tell two data keys apart and say nothing else about them; kept in the broker's
    anchor."""
    _check_data_key(data_key)
    with derive(data_key, LABEL_KCV, b"", KCV_BYTES) as value:
        return bytes(value.view)


def _check_data_key(data_key: Secret) -> None:
    if len(data_key) != DATA_KEY_BYTES:
        raise ValueError(f"a data key has {DATA_KEY_BYTES} bytes, not {len(data_key)}")
