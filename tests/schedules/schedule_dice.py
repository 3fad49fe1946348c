"""Tasks of several processes on one thread; dice decide at every point who goes on, and which process dies.

1. Coroutines hand control back at points, events, locks and before and after blocking calls.
2. Code in a helper thread (``blocking``, ``to_thread``) is preempted before its disk calls: other tasks then run inside
   that call, nested.
3. A process that died does nothing any more: each of its steps and disk calls raises ``Died``.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any


class Died(BaseException):
    """The process of this task is dead."""


class Cancelled(BaseException):
    """The request was cancelled."""


class TimedOut(Exception):
    """A time limit passed; raised at once by whoever waits for what will never come."""


class Step:
    """Awaited to hand control back; the task may go on when ``ready`` says so."""

    __slots__ = ("name", "ready")

    def __init__(self, name: str, ready: Callable[[], bool] | None = None) -> None:
        self.name = name
        self.ready = ready

    def __await__(self) -> Iterator[Step]:
        yield self


class Process:
    """Something that can be killed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.die_in: int | None = None
        """Disk calls until it dies."""


class Task:
    __slots__ = ("coroutine", "done", "error", "name", "process", "result", "running", "step", "threads")

    def __init__(self, name: str, process: Process, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.name = name
        self.process = process
        self.coroutine = coroutine
        self.step: Step | None = None
        self.done = False
        self.running = False
        self.threads = 0
        """Helper-thread calls that it is in."""
        self.result: Any = None
        self.error: Exception | None = None

    @property
    def at(self) -> str:
        return "done" if self.done else "start" if self.step is None else self.step.name


class Dice:
    """The tasks of all processes of one machine, and the scheduler that each of them sees."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tasks: list[Task] = []
        self.current: Task | None = None
        self.hooks: dict[str, Callable[[], None]] = {}
        self.sticky: frozenset[str] = frozenset()
        """Points at which a task stays for long."""
        self.stay_odds = 0.0
        self.preempt_odds = 0.0
        self.accident_odds = 0.0
        self.accident: Callable[[], None] = lambda: None
        self.depth = 0
        self.trace: list[str] | None = None

    # --- what the engine's scheduler and trio are to the product

    def alive(self) -> None:
        """Raise ``Died`` in a task whose process is dead: whatever it met while it was unwound is nobody's."""
        if self.current is not None and self.current.process.dead:
            raise Died

    async def point(self, name: str) -> None:
        self.alive()
        hook = self.hooks.get(name)
        if hook is not None:
            hook()
        await Step(name)

    async def until(self, name: str, ready: Callable[[], bool]) -> None:
        self.alive()
        await Step(name, ready)

    async def blocking(self, function: Callable[..., Any], *args: Any) -> Any:
        self.alive()
        await Step("blocking")
        task = self.current
        assert task is not None
        task.threads += 1
        try:
            result = function(*args)
        finally:
            task.threads -= 1
        self.alive()
        await Step("blocked")
        return result

    def event(self) -> Event:
        return Event(self)

    async def sleep(self, seconds: float) -> None:
        await self.point("sleep")

    # --- running

    def spawn(self, name: str, process: Process, coroutine: Coroutine[Any, Any, Any]) -> Task:
        task = Task(name, process, coroutine)
        self.tasks.append(task)
        return task

    def ready(self) -> list[Task]:
        return [
            t for t in self.tasks
            if not t.done and not t.running and (t.step is None or t.step.ready is None or t.step.ready())
        ]  # fmt: skip

    def go(self, task: Task, thrown: BaseException | None = None) -> None:
        before, self.current = self.current, task
        task.running = True
        if self.trace is not None:
            self.trace.append(f"{'  ' * self.depth}{task.name} from {task.at}")
        try:
            task.step = task.coroutine.send(None) if thrown is None else task.coroutine.throw(thrown)
        except StopIteration as end:
            task.done, task.result = True, end.value
        except (Died, Cancelled):
            task.done = True
        except Exception as error:  # noqa: BLE001 - whatever a task raises is its result
            task.done = True
            task.error = None if task.process.dead else error
        finally:
            task.running = False
            self.current = before
        if task.process.dead and not task.done:
            self.drop(task)

    def cancel(self, task: Task) -> None:
        """An exception out of the await that the task stands at."""
        self.go(task, Cancelled())
        if task.done and task in self.tasks:
            self.tasks.remove(task)

    def drop(self, task: Task) -> None:
        """What is left of a task when its process is dead: nothing, and its cleaning up must not show either."""
        before, self.current = self.current, task
        task.done = True
        for _ in range(9):
            try:
                task.coroutine.close()
                break
            except BaseException:  # noqa: BLE001 - a dead task's own cleaning up fails, as it must
                continue
        self.current = before

    def kill(self, process: Process) -> None:
        process.dead = True
        for task in [t for t in self.tasks if t.process is process and not t.running and not t.done]:
            self.drop(task)
        self.tasks = [t for t in self.tasks if not t.done]

    def step(self) -> bool:
        """Let one task go on, or an accident happen; False when no task can go on."""
        if self.random.random() < self.accident_odds:
            self.accident()
        ready = self.ready()
        if not ready:
            return False
        task = self.random.choice(ready)
        if task.at in self.sticky and self.random.random() < self.stay_odds:
            others = [t for t in ready if t.at not in self.sticky]
            task = self.random.choice(others or ready)
        self.go(task)
        if task.done:
            with contextlib.suppress(ValueError):
                self.tasks.remove(task)
        return True

    def preempt(self) -> None:
        """Inside a helper thread's call: let others go on for a while."""
        if self.depth < 3 and self.random.random() < self.preempt_odds:
            self.depth += 1
            try:
                for _ in range(self.random.choice((1, 2, 5, 12, 30))):
                    if not self.step():
                        break
            finally:
                self.depth -= 1


class Event:
    def __init__(self, dice: Dice) -> None:
        self._dice = dice
        self.is_set_now = False

    def set(self) -> None:
        self.is_set_now = True

    def is_set(self) -> bool:
        return self.is_set_now

    async def wait(self) -> None:
        if not self.is_set_now:
            await self._dice.until("event", self.is_set)


class Lock:
    """First come, first served, as trio's."""

    def __init__(self, dice: Dice) -> None:
        self._dice = dice
        self._queue: list[object] = []

    def locked(self) -> bool:
        return bool(self._queue)

    async def __aenter__(self) -> None:
        mine = object()
        self._queue.append(mine)
        await self._dice.until("lock", lambda: self._queue[0] is mine)

    async def __aexit__(self, *_: object) -> None:
        del self._queue[0]


@contextlib.contextmanager
def _time_limit(_seconds: float) -> Iterator[None]:
    with contextlib.suppress(TimedOut):
        yield


def fake_trio(dice: Dice) -> SimpleNamespace:
    """Return what the product uses of trio, on these dice."""
    return SimpleNamespace(
        to_thread=SimpleNamespace(run_sync=dice.blocking),
        Lock=lambda: Lock(dice),
        Event=lambda: Event(dice),
        CancelScope=lambda **_: contextlib.nullcontext(),
        move_on_after=_time_limit,
    )
