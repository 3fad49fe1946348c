"""What a part of the benchmark is given, and what it gives back."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_figures import Bar, Table
from bench_hosts import Ebsd

STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"bench: {time.monotonic() - STARTED:4.0f} s  {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Run:
    """What was asked for; sizes in bytes. ``copied``, ``depth`` and ``chain`` are None unless they were named."""

    root: Path
    quick: bool
    rounds: int
    seconds: float
    size: int
    sized: bool = False
    """Whether the size was named."""
    settings: str = ""
    """Further lines of ebsd's configuration."""
    copied: int | None = None
    depth: int | None = None
    chain: int | None = None

    @contextmanager
    def ebsd(self, name: str) -> Iterator[Ebsd]:
        """Have an ebsd of one's own during the body; its directory goes with all others at the end."""
        made = Ebsd(self.root / name, self.settings)
        try:
            made.start()
            yield made
        finally:
            made.close()


@dataclass
class Outcome:
    """What a part found: tables, every figure for the JSON file, bars for the picture."""

    tables: list[Table]
    figures: Any
    bars: list[Bar] = field(default_factory=list)
