"""A whole ebsd in one process and one thread, over a disk that forgets: for crash tests and property tests.

The product's own code does everything but the disk's forgetting (``crash_disk``) and the key service
(``memory_broker``): use cases, catalog, store, volume processes, copy workers, recovery. ``model`` holds the truth.

How to write a test on it::

    from world import Died, World

    def test_something():
        with World(seed=1) as world:                      # a directory below /dev/shm, gone at the end
            volume = world.create(World.SIZE)
            world.attach(volume)
            world.write(volume, 0, b"a" * 4096)           # the model is told by itself
            world.flush(volume)
            world.disk.arm(die_at=7)                      # the 8th changing call kills everything
            with world.may_die():
                world.snapshot(volume)
            world.crash("power")                          # or "kill", or "ebsd"
            world.recover()                               # the product's start-up recovery, then detaches what failed
            world.check()                                 # every byte of everything, and the invariants of FORMAT.md

To cut after every call: run the operation once, take ``len(world.disk.log)`` after ``disarm``, then run the story anew
for each ``die_at`` below that number. ``world.count(lambda: ...)`` does the first half; ``stories`` has every operation
with a history before it, ``crashes`` cuts one of them and checks what comes of it. A ``seed`` gives the same ids,
keys, order and dice each time.
"""

from .crash_disk import CrashDisk, Died
from .model import Lost, Truth
from .world import Broken, JobEnded, World

__all__ = ["Broken", "CrashDisk", "Died", "JobEnded", "Lost", "Truth", "World"]
