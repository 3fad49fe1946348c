"""One failing call of one operation: it ends with an error that says so, loses nothing, leaves nothing half made."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from typing import Final, NamedTuple

from ebsd.domain.errors import EbsdError, InternalFailure
from ebsd.ipc.incidents import as_ebsd_error, log_incident

from .crash_disk import Call
from .crashes import SEED, go_on, prepare
from .stories import Operation
from .world import Broken, JobEnded, World

ERRORS: Final = {
    "open": (errno.EMFILE, errno.EIO),
    "pread": (errno.EIO,),
    "pwrite": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "fdatasync": (errno.EIO, errno.ENOSPC),
    "fsync": (errno.EIO, errno.EDQUOT),
    "fsync_directory": (errno.EIO,),
    "punch": (errno.EIO,),
    "fallocate": (errno.ENOSPC,),
    "ftruncate": (errno.EIO, errno.ENOSPC),
    "fchmod": (errno.EIO,),
    "rename": (errno.EIO, errno.ENOSPC),
    "unlink": (errno.EIO,),
    "rmdir": (errno.EIO,),
    "mkdir": (errno.ENOSPC, errno.EIO),
    "listdir": (errno.EIO,),
    "lseek": (errno.EIO,),
    "mmap": (errno.ENOMEM,),
}
"""What each call of a disk may answer: EIO of the device, no space, a quota, too many files, no memory."""


class Failure(NamedTuple):
    """The number of the call, counted from the begin of the operation, and its error."""

    at: int
    code: int


def every_call(operation: Operation) -> list[Call]:
    """Do an operation once, and return all its calls."""
    with World(SEED) as world:
        names = prepare(world, operation)
        operation.run(world, names)
        return list(world.disk.every)


def all_failures(calls: list[Call]) -> Iterator[Failure]:
    for at, call in enumerate(calls):
        for code in ERRORS.get(call.name, ()):
            yield Failure(at, code)


def thinned_failures(calls: list[Call]) -> Iterator[Failure]:
    """Each call once, its errors in turn."""
    for at, call in enumerate(calls):
        codes = ERRORS.get(call.name, ())
        if codes:
            yield Failure(at, codes[at % len(codes)])


def fail(operation: Operation, failure: Failure) -> bool:
    """Do one failure and all checks; return whether the operation ended with an error."""
    dice = random.Random(f"{failure}")
    failed = False
    with World(SEED) as world:
        names = prepare(world, operation)
        world.disk.arm(fail_at={failure.at: failure.code})
        try:
            operation.run(world, names)
        except JobEnded as exc:
            failed = True
            if exc.code == InternalFailure.code:
                raise Broken(f"it is told as a bug: {exc!r}") from exc
        except (EbsdError, OSError) as exc:
            failed = True
            told = as_ebsd_error(exc, log_incident)
            if isinstance(told, InternalFailure):
                raise Broken(f"it is told as a bug: {exc!r}") from exc
        world.disk.disarm()
        if world._use is None:  # a start that failed is tried again
            world.crash("ebsd")
            world.recover()
        end_failed(world)
        if dice.random() < 0.5:
            world.crash("power", dice.choice(("lose", "random")))
        else:
            world.crash("ebsd")
        world.recover()
        end_failed(world)
        go_on(world, to_the_end=dice.random() < 0.3)
    return failed


def end_failed(world: World) -> None:
    """End by force the engines that stopped: what was not flushed may be lost with them."""
    for volume in world.volumes():
        process = world.hosting.process_of(volume.id)
        engine = None if process is None else process.own._engine
        if engine is not None and engine.failed:
            world.truth[volume.id].cut()
            if volume.attachment is not None:
                world.detach(volume.id, force=True)


__all__ = ["ERRORS", "Failure", "all_failures", "end_failed", "every_call", "fail", "thinned_failures"]
