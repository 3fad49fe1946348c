"""A scheduler that throws dice at every point: which task goes on, decided by a seed or by a script of names."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import Any


class _Step:
    """Awaited to hand control to the runner; ``ready`` says when the task may go on."""

    def __init__(self, name: str, ready: Callable[[], bool]) -> None:
        self.name = name
        self.ready = ready

    def __await__(self):
        yield self


class DiceEvent:
    def __init__(self) -> None:
        self.is_set = False

    def set(self) -> None:
        self.is_set = True

    async def wait(self) -> None:
        await _Step("event", lambda: self.is_set)


class Task:
    def __init__(self, name: str, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.name = name
        self.coroutine = coroutine
        self.step: _Step | None = None
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None

    @property
    def ready(self) -> bool:
        return not self.done and (self.step is None or self.step.ready())

    @property
    def at(self) -> str:
        return "done" if self.done else "start" if self.step is None else self.step.name

    def go(self) -> None:
        try:
            self.step = self.coroutine.send(None)
        except StopIteration as end:
            self.done, self.result = True, end.value
        except Exception as error:  # noqa: BLE001 - whatever a task raises is its result
            self.done, self.error = True, error

    def cancel(self) -> None:
        """What a cancelled scope does: an exception out of the await."""
        try:
            self.coroutine.throw(Cancelled())
        except Cancelled:
            self.done = True
        else:
            raise AssertionError("a cancelled task went on")


class Cancelled(BaseException):
    pass


class DiceScheduler:
    def __init__(self, seed: int = 0) -> None:
        self.dice = random.Random(seed)
        self.tasks: list[Task] = []
        self.hooks: dict[str, Callable[[], None]] = {}
        """Point -> called when a task arrives there."""
        self.on_sleep: Callable[[float], None] | None = None

    async def point(self, name: str) -> None:
        if name in self.hooks:
            self.hooks[name]()
        await _Step(name, lambda: True)

    async def blocking(self, function, *args):
        await _Step("blocking", lambda: True)
        result = function(*args)
        await _Step("blocked", lambda: True)
        return result

    def event(self) -> DiceEvent:
        return DiceEvent()

    async def sleep(self, seconds: float) -> None:
        if self.on_sleep is not None:
            self.on_sleep(seconds)
        await _Step("sleep", lambda: True)

    def spawn(self, name: str, coroutine: Coroutine[Any, Any, Any]) -> Task:
        task = Task(name, coroutine)
        self.tasks.append(task)
        return task

    def run_to(self, task: Task, name: str) -> None:
        """Let one task alone go on until it stands at a point (or has to wait there)."""
        while task.at != name:
            assert task.ready, f"{task.name} waits at {task.at} and never came to {name}"
            task.go()

    def run(self, steps: int | None = None) -> None:
        """Let random tasks go on, to the end of all of them or for some steps."""
        while steps is None or steps > 0:
            ready = [task for task in self.tasks if task.ready]
            if not ready:
                waiting = [task.name for task in self.tasks if not task.done]
                assert not waiting, f"deadlock: {waiting}"
                return
            self.dice.choice(ready).go()
            if steps is not None:
                steps -= 1
