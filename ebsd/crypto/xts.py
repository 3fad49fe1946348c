"""XTS-AES-256 (IEEE 1619, NIST SP 800-38E) over whole requests: one native call, many data units."""

from __future__ import annotations

import mmap
from types import TracebackType
from typing import Final, Self, TypeAlias

from ebsd.crypto._xts import ffi, lib
from ebsd.crypto.secret import Buffer, Secret

KEY_BYTES: Final = 64
"""Key1 || Key2, each of 256 bits."""
MIN_UNIT: Final = 16
MAX_UNIT: Final = 16 << 20
"""IEEE 1619 and SP 800-38E: a data unit has at most 2**20 blocks of 16 bytes."""
_NEAR_LAST_TWEAK: Final = (1 << 128) - (1 << 60)

# Bound once: a 4 KiB request costs 1.4 us of cipher, so each look-up would show.
_BYTES: Final = ffi.typeof("unsigned char[]")
_from_buffer: Final = ffi.from_buffer
_xts_run: Final = lib.ebsd_xts_run
_DONE: Final = lib.EBSD_XTS_DONE

IoBuffer: TypeAlias = Buffer | mmap.mmap


class XtsError(Exception):
    """OpenSSL failed or had no memory; what the destination holds is undefined."""


class XtsKeyRefused(ValueError):
    """Both halves of the key are equal (SP 800-38E forbids it), or it has not 64 bytes."""


class XtsClosed(ValueError):
    """The key was used after ``close``: a bug of the caller."""


class XtsKey:
    """One XTS key, ready in both directions, for any number of threads at once.

    The raw key is not kept. Its key schedules, which allow to compute it, live on the heap: they are
    cleared by ``close`` or by the garbage collector, but that memory is ordinary (see FORMAT.md, "What
    memory holds").
    """

    __slots__ = ("_closed", "_handle")

    def __init__(self, key: Secret | Buffer, *, plain: bool = False) -> None:
        """Take Key1 || Key2, 64 bytes. Raises XtsKeyRefused for equal halves, XtsError when OpenSSL fails.

        ``plain``: have OpenSSL compute everything, as where the processor has no VAES; for tests.
        """
        self._closed = True
        view = key.view if isinstance(key, Secret) else key
        if len(view) != KEY_BYTES:
            raise XtsKeyRefused(f"an XTS-AES-256 key has {KEY_BYTES} bytes, not {len(view)}")
        result = ffi.new("int *")
        handle = lib.ebsd_xts_new(_from_buffer(_BYTES, view), plain, result)
        if result[0] == lib.EBSD_XTS_EQUAL_HALVES:
            raise XtsKeyRefused("both halves of the XTS key are equal")
        if result[0] != _DONE:
            raise XtsError("OpenSSL made no XTS-AES-256 context")
        # Each call below holds a reference to the handle while it runs, so the destructor never meets a
        # running call.
        self._handle = ffi.gc(handle, lib.ebsd_xts_free)
        self._closed = False

    def encrypt(self, src: IoBuffer, dst: IoBuffer, *, unit: int, first_tweak: int) -> None:
        """Encrypt ``src`` into ``dst`` of the same length as data units of ``unit`` bytes.

        ``unit`` is 16 .. 2**24 bytes; one that is no multiple of 16 ends in ciphertext stealing. The tweak
        of the first unit is ``first_tweak``, the next ones count up; it enters the cipher as 16 bytes,
        little endian (IEEE 1619, 5.1). ``dst`` may be ``src``, but must not overlap it otherwise. Raises
        ValueError for lengths and ranges, XtsClosed after ``close``, XtsError when OpenSSL fails.
        """
        self._run(1, src, dst, unit, first_tweak)

    def decrypt(self, src: IoBuffer, dst: IoBuffer, *, unit: int, first_tweak: int) -> None:
        """Decrypt ``src`` into ``dst``; all else as ``encrypt``."""
        self._run(0, src, dst, unit, first_tweak)

    def close(self) -> None:
        """Wait for calls that run in other threads, then clear every key schedule; may be called again."""
        self._closed = True
        if hasattr(self, "_handle"):  # absent when the constructor failed
            lib.ebsd_xts_close(self._handle)

    @property
    def address(self) -> int:
        """Where the key is, for C code of this process that calls ``run_address``; valid as long as this object."""
        return int(ffi.cast("uintptr_t", self._handle))

    @property
    def is_wide(self) -> bool:
        """Whether data units of multiples of 256 bytes are computed by VAES instructions, 16 blocks at a time."""
        return bool(lib.ebsd_xts_is_wide(self._handle))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<XtsKey, closed>" if self._closed else "<XtsKey>"

    def _run(self, encrypt: int, src: IoBuffer, dst: IoBuffer, unit: int, first_tweak: int) -> None:
        source = _from_buffer(_BYTES, src)
        destination = _from_buffer(_BYTES, dst, True)
        length = len(source)
        # Before the call, because C sees pointers only; the other limits are C's.
        if len(destination) != length:
            raise ValueError(f"{length} bytes do not go into {len(destination)}")
        if unit < MIN_UNIT:
            raise _error(lib.EBSD_XTS_BAD_UNIT, length, unit)
        if first_tweak > _NEAR_LAST_TWEAK and first_tweak + length // unit > 1 << 128:
            raise ValueError("the tweaks leave 128 bits")
        try:
            tweak = first_tweak.to_bytes(16, "little")
        except OverflowError:
            raise ValueError(f"{first_tweak} is no tweak: 0 .. 2**128 - 1") from None
        result = _xts_run(self._handle, encrypt, source, destination, length, unit, tweak)
        if result != _DONE:
            raise _error(result, length, unit)


def _error(result: int, length: int, unit: int) -> Exception:
    if result == lib.EBSD_XTS_CLOSED:
        return XtsClosed("the XTS key has been closed")
    if result == lib.EBSD_XTS_BAD_UNIT:
        return ValueError(f"{length} bytes in data units of {unit} ({MIN_UNIT} .. {MAX_UNIT}) bytes")
    if result == lib.EBSD_XTS_OVERLAP:
        return ValueError("source and destination overlap without being the same")
    if result == lib.EBSD_XTS_NO_MEMORY:
        return XtsError("no memory for a cipher context")
    return XtsError("OpenSSL failed")


def run_address() -> int:
    """Return the address of ``ebsd_xts_run`` (xts_kernel.h), for C code that works without the interpreter."""
    return int(ffi.cast("uintptr_t", ffi.addressof(lib, "ebsd_xts_run")))


def library() -> str:
    """Return the version text of the OpenSSL that the kernel runs on, such as ``OpenSSL 3.0.17 1 Jul
    2025``."""
    return ffi.string(lib.ebsd_xts_library()).decode()
