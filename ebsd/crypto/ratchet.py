"""A MAC key that only moves forward: each MAC has a key of its own, and no earlier key follows from the present one.

    chain key(i + 1) || MAC key(i) = KBKDF(chain key(i), label, empty context), 64 bytes

1. Both halves come from one HMAC output, so they are independent (SP 800-108r1, 4).
2. The chain key that was used and the MAC key are overwritten before ``mac`` returns: who reads this memory later
   can continue the chain, and cannot have written its past (forward security: Bellare and Yee, "Forward-security in
   private-key cryptography").
"""

from __future__ import annotations

from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256, SHA512
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

from ebsd.crypto.secret import Secret

KEY_BYTES: Final = 32
MAC_BYTES: Final = 32
_STATE_BYTES: Final = 64


class Ratchet:
    """The chain key of the next MAC, in two pieces of secret memory that take turns."""

    def __init__(self, key: Secret, label: bytes) -> None:
        """Begin with a chain key of 32 bytes, which is copied."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"a chain key has {KEY_BYTES} bytes, not {len(key)}")
        self._label = label
        self._state, self._spare = Secret(_STATE_BYTES), Secret(_STATE_BYTES)
        self._state.view[:KEY_BYTES] = key.view

    def mac(self, *parts: bytes) -> bytes:
        """Return HMAC-SHA-256 (32 bytes) over the parts, one after the other, and move on to the next key."""
        function = KBKDFHMAC(
            algorithm=SHA512(),
            mode=Mode.CounterMode,
            length=_STATE_BYTES,
            rlen=4,
            llen=4,
            location=CounterLocation.BeforeFixed,
            label=self._label,
            context=b"",
            fixed=None,
        )
        function.derive_into(self._state.view[:KEY_BYTES], self._spare.view)
        self._state.view[:] = bytes(_STATE_BYTES)
        self._state, self._spare = self._spare, self._state
        code = HMAC(self._state.view[KEY_BYTES:], SHA256())
        for part in parts:
            code.update(part)
        self._state.view[KEY_BYTES:] = bytes(_STATE_BYTES - KEY_BYTES)
        return code.finalize()

    def key(self) -> Secret:
        """Return a copy of the chain key that the next MAC uses, the caller's to wipe."""
        return Secret.from_buffer(self._state.view[:KEY_BYTES])

    def wipe(self) -> None:
        """End it; may be called again."""
        self._state.wipe()
        self._spare.wipe()
