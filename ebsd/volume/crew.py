"""A few threads that do the same to many things, each with tools of its own; results come in the order of the things.

With one worker there is no thread: everything happens where the results are asked for, in one order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import Final, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

AHEAD: Final = 32
"""Things given to each thread before its first result is awaited: it goes on while whoever takes results is busy."""


class Crew(Generic[T, R]):
    """Threads, from ``with`` to its end; then none of them works any more."""

    def __init__(self, workers: Sequence[Callable[[T], R]]) -> None:
        """One thread for each worker, which is called by that thread alone."""
        self._alone = workers[0] if len(workers) == 1 else None
        self._lanes = [] if self._alone else [_Lane(worker) for worker in workers]

    def __enter__(self) -> Crew[T, R]:
        for lane in self._lanes:
            lane.start()
        return self

    def __exit__(self, *_: object) -> None:
        for lane in self._lanes:
            lane.dismiss()
        for lane in self._lanes:
            lane.join()

    def results(self, things: Iterable[T]) -> Iterator[tuple[T, R]]:
        """Yield each thing with what became of it, in order; raises what the first of them raised."""
        if self._alone is not None:
            for thing in things:
                yield thing, self._alone(thing)
            return
        waiting: deque[tuple[T, _Lane[T, R]]] = deque()
        for at, thing in enumerate(things):
            lane = self._lanes[at % len(self._lanes)]
            lane.give(thing)
            waiting.append((thing, lane))
            if len(waiting) >= AHEAD * len(self._lanes):
                earliest, lane = waiting.popleft()
                yield earliest, lane.take()
        while waiting:
            earliest, lane = waiting.popleft()
            yield earliest, lane.take()


class _Lane(Generic[T, R]):
    """One thread: what is given to it first comes out first."""

    def __init__(self, worker: Callable[[T], R]) -> None:
        self._worker = worker
        self._given: SimpleQueue[tuple[T] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[R] | BaseException] = SimpleQueue()
        self._dismissed = threading.Event()
        # A daemon, as one that hangs in the kernel must not keep the process.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.start, self.join = self._thread.start, self._thread.join

    def give(self, thing: T) -> None:
        self._given.put((thing,))

    def take(self) -> R:
        result = self._done.get()
        if isinstance(result, BaseException):
            raise result
        return result[0]

    def dismiss(self) -> None:
        """Leave what was not begun."""
        self._dismissed.set()
        self._given.put(None)

    def _run(self) -> None:
        while (given := self._given.get()) is not None and not self._dismissed.is_set():
            try:
                self._done.put((self._worker(given[0]),))
            except BaseException as exc:  # noqa: BLE001 - raised where the result is taken
                self._done.put(exc)
