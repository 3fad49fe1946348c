"""Secret memory: bytes the kernel keeps from swap, dumps and other processes, and that are wiped by name.

1. A secret lives in memfd_secret(2) memory: its pages are outside the kernel's own map, never swapped,
   never in a core dump, and not readable through /proc/PID/mem. Its presence blocks hibernation, which is
   wanted.
2. Where the kernel has none (before 5.14, or ``secretmem.enable=0``, the default before 6.5) it is anonymous
   memory, locked and left out of dumps. ``protection`` says which; nothing else differs.
3. Nothing here makes ``bytes`` of a secret: Python could neither wipe nor move them.
"""

from __future__ import annotations

import ctypes
import errno
import hmac
import mmap
import os
import platform
from enum import Enum
from types import TracebackType
from typing import Final, NoReturn, Self, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
"""What functions of this package take where content is not secret or belongs to the caller."""

_SYS_MEMFD_SECRET: Final = {"x86_64": 447, "aarch64": 447, "riscv64": 447}
_O_CLOEXEC: Final = os.O_CLOEXEC

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.getrandom.restype = ctypes.c_ssize_t
_libc.getrandom.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
_libc.mlock.restype = ctypes.c_int
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Protection(Enum):
    """How the kernel guards the memory of a secret."""

    MEMFD_SECRET = "memfd_secret"
    LOCKED = "locked"
    """Anonymous memory with mlock(2) and MADV_DONTDUMP; readable by a debugger of this process."""
    UNLOCKED = "unlocked"
    """mlock(2) was refused (RLIMIT_MEMLOCK): the memory can reach swap."""


class SecretWiped(ValueError):
    """The secret was used after ``wipe``: a bug of the caller."""


class _Pages(mmap.mmap):
    """Memory that wipes itself when the last view of it is gone.

    Not the Secret does this: a view taken from a Secret that nobody names any more would turn into zeros,
    and zeros are a key that HMAC and AES take without complaint.
    """

    owner = -1

    def wipe(self) -> None:
        self[:] = bytes(len(self))

    def __del__(self) -> None:
        # The pages are shared with a forked child, whose garbage must not wipe what its parent uses.
        if not self.closed and self.owner == os.getpid():
            self.wipe()


class Secret:
    """``length`` bytes of secret memory, zero at first.

    It is not a bytes-like object, cannot be copied, pickled, iterated or shown, and compares by identity;
    ``equals`` compares content. The memory is reached through ``view`` alone. ``wipe`` ends it, as do the
    end of a ``with`` block and, at the latest, the garbage collector. One object costs one page and one
    descriptor.
    """

    __slots__ = ("__weakref__", "_length", "_map", "_protection", "_view")

    def __init__(self, length: int) -> None:
        if length < 1:
            raise ValueError(f"a secret has at least 1 byte, not {length}")
        self._length = length
        self._map, self._protection = _secret_map(length)
        self._view = memoryview(self._map)

    @classmethod
    def random(cls, length: int) -> Self:
        """Return ``length`` bytes from getrandom(2), written by the kernel straight into the secret
        memory."""
        secret = cls(length)
        holder = ctypes.c_char.from_buffer(secret._map)
        try:
            address = ctypes.addressof(holder)
            done = 0
            while done < length:  # the kernel may stop short of more than 256 bytes when a signal arrives
                got = _libc.getrandom(address + done, length - done, 0)
                if got < 0:
                    number = ctypes.get_errno()
                    if number == errno.EINTR:
                        continue
                    raise OSError(number, f"getrandom: {os.strerror(number)}")
                done += got
        finally:
            del holder  # else the map could not be closed
        return secret

    @classmethod
    def from_buffer(cls, source: Buffer) -> Self:
        """Return a copy of ``source``; wiping the source remains with the caller."""
        secret = cls(len(source))
        secret._view[:] = source
        return secret

    @classmethod
    def of_descriptor(cls, fd: int, length: int) -> Self:
        """Return a copy of what ``shared_copy`` made; the descriptor stays the caller's. Raises OSError, ValueError."""
        with mmap.mmap(fd, length) as pages, memoryview(pages) as source:
            return cls.from_buffer(source)

    def shared_copy(self) -> int:
        """Return a descriptor of memory with a copy, for a process that keeps it beyond the end of this one.

        memfd_secret, or else a memfd, which is locked and out of reach only while a process that is not dumpable
        has it mapped and locked. It is nobody's to wipe but its keeper's. Raises OSError.
        """
        fd = _secret_descriptor()
        if fd >= 0:
            try:
                return self._copied_to(fd)
            except OSError:
                pass  # as in ``_map``: other memory may still be had
        return self._copied_to(os.memfd_create("ebsd-secret", os.MFD_CLOEXEC))

    def _copied_to(self, fd: int) -> int:
        try:
            os.ftruncate(fd, self._length)
            with mmap.mmap(fd, self._length) as pages:
                pages[:] = self.view
        except BaseException:
            os.close(fd)
            raise
        return fd

    @property
    def view(self) -> memoryview:
        """The bytes, writable and in place. Slice it, fill it, pass it on; do not keep it past ``wipe``.

        Raises SecretWiped after ``wipe``.
        """
        if self._length == 0:
            raise SecretWiped("the secret has been wiped")
        return self._view

    @property
    def protection(self) -> Protection:
        return self._protection

    @property
    def is_wiped(self) -> bool:
        return self._length == 0

    def equals(self, other: Secret | Buffer) -> bool:
        """Say whether both hold the same bytes, in a time that depends on the lengths only."""
        return hmac.compare_digest(self.view, other.view if isinstance(other, Secret) else other)

    def wipe(self) -> None:
        """Overwrite the memory with zeros and give it back; may be called again.

        A view that somebody still holds reads zeros from now on; the pages go with the last such view.
        """
        if self._length == 0:
            return
        self._map.wipe()
        self._length = 0
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            # A view is still held, so unmapping would turn its next use into a segmentation fault. What
            # matters has happened: the bytes are zero.
            return

    def __len__(self) -> int:
        return self._length

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wipe()

    def __repr__(self) -> str:
        return "<Secret, wiped>" if self._length == 0 else f"<Secret of {self._length} bytes>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        # pickle, copy and deepcopy all come through here
        raise TypeError("a secret is neither copied nor pickled")


def _secret_map(length: int) -> tuple[_Pages, Protection]:
    """Return zeroed memory of ``length`` bytes, the best the kernel gives."""
    pages, protection = _map(length)
    pages.owner = os.getpid()
    return pages, protection


def _secret_descriptor() -> int:
    """Return a descriptor of memfd_secret(2), -1 where there is none."""
    number = _SYS_MEMFD_SECRET.get(platform.machine())
    return -1 if number is None else int(_libc.syscall(number, _O_CLOEXEC))


def _map(length: int) -> tuple[_Pages, Protection]:
    descriptor = _secret_descriptor()
    if descriptor >= 0:
        try:
            os.ftruncate(descriptor, length)
            return _Pages(descriptor, length), Protection.MEMFD_SECRET
        except OSError:
            # mmap of a secret counts against RLIMIT_MEMLOCK (EAGAIN): other memory may still be had.
            pass
        finally:
            os.close(descriptor)  # the map keeps its own
    memory = _Pages(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTDUMP)
    holder = ctypes.c_char.from_buffer(memory)
    locked = _libc.mlock(ctypes.addressof(holder), length) == 0
    del holder
    return memory, Protection.LOCKED if locked else Protection.UNLOCKED
